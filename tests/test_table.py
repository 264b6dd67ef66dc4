"Laws of the table: whatever the rows, no group is ever cut, no row is ever lost, and the order of rows means nothing"
import os, warnings
import numpy as np, pandas as pd, pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from conftest import DATA, examples, needs_data
from covid_cxr.core import SPLITS, LeakError, Reason, Step, TableError, choices, exclude, new_table, used
from covid_cxr.reading import FILE_MISSING
from covid_cxr.table import (AGE_BANDS, NOT_RECORDED, age_bands, as_task, check_split, count_unknown_patients, crossing_groups,
                             drop_repeats, filter_ages, filter_views, flow, fold_by_group, group_leaksafe, join_tables, label_for,
                             label_of_findings, reconcile, split_by_group, split_by_source, split_by_time, split_official,
                             split_random, use_fold)

def laws(n): return settings(max_examples=examples(n), deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
FINDINGS = ('No Finding', 'Pneumonia/Viral/COVID-19', 'Pneumonia/Bacterial')
CLASS = {'No Finding': 'normal', 'Pneumonia/Viral/COVID-19': 'covid', 'Pneumonia/Bacterial': 'bacterial'}


@st.composite
def tables(draw, n_classes=2, own=3):
    "Two sources: patients with one or many images of any class, unknown patients, repeated files, blanks; every class has `own` patients"
    few, many = st.integers(0, 9), st.one_of(st.none(), st.integers(0, 14))
    row = st.tuples(many, st.integers(0, n_classes - 1), st.one_of(st.none(), few), st.integers(0, 11), st.integers(0, 400))
    drawn = draw(st.lists(row, min_size=0, max_size=30))
    sure = [(100 + c * own + i, c, None, 5, 10 * i) for c in range(n_classes) for i in range(own)]
    rows = []
    for i, (patient, c, file, luck, day) in enumerate(drawn + sure):
        rows.append(dict(image_id=f's{luck % 2}:{i:02d}', source=f's{luck % 2}', patient=None if patient is None else f's:{patient}',
                         path=None if file is None else f'f/{file}.png', finding=None if luck == 0 else FINDINGS[c],
                         view='L' if luck == 1 else 'PA', offset_days=None if luck == 2 else day,
                         official_split=('train', 'val', 'test')[luck % 3]))
    return new_table(rows)


def prepared(table):
    task = {f: CLASS[f] for f in FINDINGS if (table['finding'] == f).any()}
    return group_leaksafe(label_for(filter_views(table, 'PA'), task), duplicates='none')

def assert_sound(before, after):
    "No row lost, every used row has a split, no excluded one has, no group, patient or file is cut, nothing but split and excluded changed"
    assert list(after['image_id']) == list(before['image_id'])
    same = [c for c in before.columns if c not in ('split', 'fold') and not c.startswith('excluded')]
    pd.testing.assert_frame_equal(after[same], before[same])
    was = before['excluded'].notna()
    assert (after.loc[was, 'excluded'] == before.loc[was, 'excluded']).all()
    u = used(after)
    assert u['split'].isin(SPLITS).all() and after.loc[after['excluded'].notna(), 'split'].isna().all()
    for key in ('group', 'patient', 'path'): assert (u[u[key].notna()].groupby(key)['split'].nunique() <= 1).all()
    assert check_split(after) == []
    n = reconcile(after).to_dict()
    assert n['rows_in'] == len(before) == n['used'] + n['excluded'] and n['used'] == len(u) and n['leaks'] == []
    assert flow(after)['excluded'].sum() == n['excluded']

def splits_of(table): return table.set_index('image_id')['split'].fillna('-').sort_index()

SPLITTERS = {
    'by_group': lambda t, seed: split_by_group(t, .2, .2, seed),
    'by_group_no_test': lambda t, seed: split_by_group(t, .3, 0, seed),
    'official': lambda t, seed: split_official(t, .3, seed, crossing='exclude'),
    'fold': lambda t, seed: use_fold(fold_by_group(t, 3, seed), seed % 3, .3, seed),
    'by_source': lambda t, seed: split_by_source(t, 's0', .3, seed),
    'by_time': lambda t, seed: split_by_time(t, 'offset_days', .3, valid_pct=.3, seed=seed),
}

@pytest.mark.parametrize('name', SPLITTERS)
@laws(60)
@given(table=tables(), seed=st.integers(0, 1000), order=st.integers(0, 1000))
def test_no_splitter_ever_cuts_a_group(name, table, seed, order):
    table, split = prepared(table), SPLITTERS[name]
    try: after = split(table, seed)
    except TableError as e:                                 # a split without one class, or a test split that takes everything
        assert name not in ('by_group', 'by_group_no_test') and any(w in str(e) for w in ('no image', 'both sides', 'no used row'))
        with pytest.raises(TableError): split(table.sample(frac=1, random_state=order), seed)
        return
    assert_sound(table, after)
    assert splits_of(after).equals(splits_of(split(table, seed)))                                        # same seed, same split
    assert splits_of(after).equals(splits_of(split(table.sample(frac=1, random_state=order), seed)))     # order means nothing

@pytest.mark.parametrize('n_classes', [1, 2, 3])
@laws(60)
@given(data=st.data(), seed=st.integers(0, 1000), pct=st.sampled_from([(.2, .2), (.1, .1), (.3, 0), (.15, .35)]))
def test_shares_are_met_within_twice_the_largest_group(n_classes, data, seed, pct):
    table = prepared(data.draw(tables(n_classes))) if n_classes > 1 else group_leaksafe(data.draw(tables(1)), duplicates='none')
    u = used(split_by_group(table, *pct, seed)).fillna({'label': 'all'})
    shares = dict(train=1 - sum(pct), valid=pct[0], test=pct[1])
    for cls, rows in u.groupby('label'):
        largest = rows.groupby('group').size().max()
        for split, share in shares.items():
            n = (rows['split'] == split).sum()
            assert abs(n - share * len(rows)) <= 2 * largest and (n > 0) == (share > 0), (cls, split, n, share * len(rows), largest)

@laws(80)
@given(table=tables(), pairs=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=4), order=st.integers(0, 1000))
def test_groups_are_the_finest_partition_closed_under_every_link(table, pairs, order):
    ids = list(table['image_id'])
    pairs = [(ids[a], ids[b]) for a, b in pairs]
    g = group_leaksafe(table, pairs, 'none')
    of = dict(zip(g['image_id'], g['group']))
    assert g['group'].notna().all() and all(of[a] == of[b] for a, b in pairs)
    for key in ('patient', 'path'): assert (g[g[key].notna()].groupby(key)['group'].nunique() == 1).all()
    assert all(name == min(members) for name, members in g.groupby('group')['image_id'])              # named by a member, the smallest
    reach = {i: {i} for i in ids}                                                     # and no coarser: walk the links by hand
    same = [m for key in ('patient', 'path') for _, m in g[g[key].notna()].groupby(key)['image_id']]
    links = pairs + [(a, b) for m in same for a, b in zip(m, m[1:])]
    for a, b in links:
        both = reach[a] | reach[b]
        for i in both: reach[i] = both
    assert {frozenset(s) for s in reach.values()} == {frozenset(m) for _, m in g.groupby('group')['image_id']}
    again = group_leaksafe(table.sample(frac=1, random_state=order), [(b, a) for a, b in pairs[::-1]], 'none')
    assert dict(zip(again['image_id'], again['group'])) == of

@laws(30)
@given(table=tables(3), seed=st.integers(0, 100))
def test_rows_in_are_rows_used_plus_rows_excluded_at_every_step(table, seed):
    task = {f: c for f, c in CLASS.items() if f != 'Pneumonia/Bacterial'}
    steps = [lambda t: join_tables([t]), lambda t: filter_views(t, ['PA', 'AP']), lambda t: label_for(t, task),
             lambda t: group_leaksafe(t, duplicates='none'), lambda t: drop_repeats(t, pairs=[]),
             lambda t: split_by_source(t, 's1', .3, seed)]
    t = table
    for step in steps:
        before = t['excluded'].copy() if len(t) else t
        try: t = step(t)
        except TableError: return
        account = reconcile(t)
        n, counts = account.to_dict(), account.counts
        assert n['rows_in'] == len(table) == n['used'] + n['excluded'] and n['used'] == len(used(t))
        assert set(account.flow['step']) <= {'views', 'task', 'repeats', 'split'}
        kept = before.notna().to_numpy()
        assert (t['excluded'][kept].to_numpy() == before[kept].to_numpy()).all()                      # the first reason stays
        assert (counts.loc['rows in'] == counts.drop('rows in').sum()).all()
        assert (counts['all'] == counts.drop(columns='all').sum(axis=1)).all()

@laws(50)
@given(table=tables(), seed=st.integers(0, 1000))
def test_a_random_split_is_found_out_whenever_it_cuts(table, seed):
    t = split_random(prepared(table), .2, .2, seed)
    u = used(t)
    cut = sorted(g for g, n in u.groupby('group')['split'].nunique().items() if n > 1)
    assert check_split(t, allow_leak=True) == cut == reconcile(t).leaks
    if cut:
        with pytest.raises(LeakError, match='stand in more than one split'): check_split(t)
        assert f'LEAK: {len(cut)} group' in str(reconcile(t))

@laws(60)
@given(table=tables(), seed=st.integers(0, 1000), hidden=st.sampled_from(['nothing', 'by hand', 'half', 'all']))
def test_what_crosses_is_counted_as_by_hand(table, seed, hidden):
    "Groups made by hand, or missing, hide neither a patient nor a file; the counts are those of a loop over rows"
    t = split_random(prepared(table), .2, .2, seed)
    if hidden == 'by hand': t = t.assign(group=t['image_id'])
    if hidden in ('half', 'all'): t = t.assign(group=t['group'].where((t.index % 2 == 0) & (hidden == 'half'), np.nan))
    want = {}
    for key in ('path', 'patient', 'group'):
        splits, count = {}, {}
        for r in used(t)[['group', 'patient', 'path', 'split']].to_dict('records'):
            if isinstance(r[key], str): splits.setdefault(r[key], set()).add(r['split'])
        for r in used(t)[['group', 'patient', 'path', 'split']].to_dict('records'):
            if isinstance(r[key], str) and len(splits[r[key]]) > 1:
                name = r['group'] if isinstance(r['group'], str) else r[key]
                count.setdefault(name, dict.fromkeys(SPLITS, 0))[r['split']] += 1
        want.update({k: ', '.join(f'{s} {n}' for s, n in c.items() if n) for k, c in count.items()})
    got = crossing_groups(t)
    assert got['group'].is_monotonic_increasing and dict(zip(got['group'], got['where'])) == want
    assert check_split(t, allow_leak=True) == sorted(want)

@laws(50)
@given(table=tables(), seed=st.integers(0, 1000))
def test_folds_are_a_partition_of_the_used_rows(table, seed):
    t = fold_by_group(prepared(table), 3, seed)
    u = used(t)
    assert u['fold'].isin([0, 1, 2]).all() and t.loc[t['excluded'].notna(), 'fold'].isna().all()
    assert (u.groupby('group')['fold'].nunique() == 1).all()
    for c in u['label'].unique(): assert set(u['fold'][u['label'] == c]) == {0, 1, 2}

@laws(50)
@given(table=tables())
def test_one_picture_is_used_once_and_never_under_two_labels(table):
    t = prepared(table)
    after = drop_repeats(t, pairs=[])
    u, files = used(after), used(t)[used(t)['path'].notna()].groupby('path')
    assert not u['path'].dropna().duplicated().any()
    for path, rows in files: assert (u['path'] == path).sum() == (rows['label'].nunique() == 1)
    assert len(u) + after['excluded'].notna().sum() == len(t)


@laws(60)
@given(ages=st.lists(st.one_of(st.none(), st.floats(0, 110)), max_size=30), min_age=st.sampled_from([0, 6, 18, 65.5]))
def test_an_age_stands_in_one_band_and_a_blank_one_under_ages(ages, min_age):
    t = new_table([dict(image_id=str(i), age_years=a) for i, a in enumerate(ages)], 's')
    band = age_bands(t['age_years'])
    for a, name in zip(t['age_years'], band): assert name == NOT_RECORDED if np.isnan(a) else AGE_BANDS[name][0] <= a < AGE_BANDS[name][1]
    after = filter_ages(t, min_age)
    assert (used(after)['age_years'] >= min_age).all() and len(used(after)) == (t['age_years'] >= min_age).sum()
    below = used(filter_ages(t, min_age, 70))['age_years']
    assert sorted(below) == sorted(t['age_years'][(t['age_years'] >= min_age) & (t['age_years'] < 70)])
    f = flow(after)
    assert set(f['step']) <= {'ages'} and f['excluded'].sum() == len(t) - len(used(after))
    assert f['excluded'][f['rule'] == 'age not recorded'].sum() == t['age_years'].isna().sum()


@laws(80)
@given(data=st.data())
def test_every_reason_is_filed_under_the_step_that_gave_it_whatever_its_words(data):
    "A rule named like another step's, a text with a colon, a text written by hand: no step is guessed from wording"
    words = st.sampled_from(['age not recorded', 'view not wanted', 'finding not stated', 'group also in x', 'same picture as another',
                             'a: b'])
    reasons = st.builds(Reason, st.sampled_from(choices(Step)), words, st.sampled_from(['', 'x', 'y: z', '1']))
    drawn = data.draw(st.lists(st.one_of(st.none(), reasons), max_size=25))
    t = new_table([dict(image_id=str(i)) for i in range(len(drawn))], 's')
    t = exclude(t, [r is not None for r in drawn], drawn)
    f = flow(t)
    for step in choices(Step): assert f['excluded'][f['step'] == step].sum() == sum(r is not None and r.step == step for r in drawn)
    assert f['step'].tolist() == sorted(f['step'], key=choices(Step).index)
    old = t.drop(columns=[c for c in t if c.startswith('excluded_')])                                            # it recorded no step
    assert flow(old)['step'].isin(['unknown']).all() and flow(old)['excluded'].sum() == t['excluded'].notna().sum()


def test_a_late_patient_is_not_trained_on_and_a_left_out_source_is_whole():
    rows = [dict(image_id=f'{i}', patient=f'{i // 2}', label='ab'[i // 2 % 2], source='xy'[i % 3 == 0], offset_days=i, group=f'{i // 2}')
            for i in range(60)]
    t = split_by_time(new_table(rows), 'offset_days', test_from=41, valid_pct=.3)
    assert t['excluded_step'][40] == 'split' and t['excluded_rule'][40] == 'group also in the time from offset_days 41 on'
    assert (t['split'][:40] != 'test').all() and (t['split'][41:] == 'test').all()
    t = split_by_source(new_table(rows), 'y', .3)
    assert (t['split'][t['source'] == 'y'] == 'test').all() and (used(t)['split'] == 'test').sum() == 20


def nih_sized(n=112_120, patients=30_805):
    r = np.random.default_rng(0)
    patient = np.sort(np.concatenate([np.arange(patients), r.integers(0, patients, n - patients)]))
    return new_table(dict(image_id=[f'{i}.png' for i in range(n)], path=[f'/none/{i}.png' for i in range(n)], patient=patient.astype(str),
                          finding=np.where(r.random(n) < .18, 'Effusion', 'No Finding')), 'big')

def test_a_table_of_112120_images_is_grouped_and_split_by_patient():
    t = split_by_group(group_leaksafe(label_for(nih_sized(), 'effusion_vs_no_finding'), duplicates='none'), .1, .1)
    assert check_split(t) == [] and t['group'].nunique() == 30_805
    share = pd.crosstab(t['label'], t['split'], normalize='index')
    assert np.abs(share[['train', 'valid', 'test']].to_numpy() - [.8, .1, .1]).max() < .001
    patients = t.groupby('split')['patient'].nunique() / 30_805
    assert np.abs(patients[['train', 'valid', 'test']].to_numpy() - [.8, .1, .1]).max() < .005    # patients with many images are spread


@needs_data
def test_the_whole_nih_table_is_read_and_split_by_patient():
    "112,120 real rows; how long it takes is measured by benchmarks/nih_table.py"
    from covid_cxr.sources import read_nih
    read = read_nih(DATA / 'nih-chest-xrays', csv='nih.csv.gz', files='ignore')
    t = group_leaksafe(label_for(read, {'No Finding': 'no_finding', '*': 'finding'}), duplicates='none')
    assert len(t) == 112_120 and t['group'].nunique() == t['patient'].nunique() == 30_805 and (t['label'] == 'no_finding').sum() == 60_361
    s = split_by_group(t, .1, .1)
    assert check_split(s) == [] and (s.groupby('patient')['split'].nunique() == 1).all()
    share = pd.crosstab(s['label'], s['split'], normalize='index')
    assert np.abs(share[['train', 'valid', 'test']].to_numpy() - [.8, .1, .1]).max() < .001
    r = split_random(t, .1, .1)                                       # thousands of leaks are found as surely as one
    cut = r.groupby('group')['split'].nunique()
    assert list(crossing_groups(r)['group']) == sorted(cut.index[cut > 1]) and (cut > 1).sum() > 5000


@pytest.mark.parametrize('task, findings, label, rule', [
    ('pneumonia_vs_normal', 'Atelectasis|Pneumonia', 'pneumonia', None),
    ('pneumonia_vs_normal', 'Pneumonia|Atelectasis', 'pneumonia', None),
    ('pneumonia_vs_normal', 'No Finding|Pneumonia', None, 'findings contradict each other'),
    ('effusion_vs_no_finding', 'No Finding|Effusion', None, 'findings contradict each other'),
    ('effusion_vs_no_finding', 'Mass|No Finding', None, 'findings contradict each other'),
    ('covid_vs_other', 'No Finding|Mass', None, 'findings contradict each other'), ('covid_vs_other', 'Mass|COVID-19', 'covid', None),
    ('effusion_vs_no_finding', 'No Finding|No Finding', 'no_finding', None),
    ('effusion_vs_no_finding', 'normal|No Finding', 'no_finding', None),
    ('bacterial_vs_viral', 'Pneumonia/Viral|Pneumonia/Bacterial', None, 'findings of two classes'),
    ('bacterial_vs_viral', 'Pneumonia/Viral/SARS|Mass', None, 'finding outside the task'),
    ('kinds', 'Pneumonia/Bacterial|COVID-19', None, 'findings of two classes'),
    ({'Pneumonia': 'a', 'Effusion': 'b'}, 'Effusion|Pneumonia', None, 'findings of two classes'),
    ({'Pneumonia': 'a', '*': 'b'}, 'Effusion|Pneumonia', 'a', None), ({'Pneumonia': 'a', '*': 'b'}, 'Effusion|Mass', 'b', None)])
def test_what_several_findings_mean(task, findings, label, rule):
    found = label_of_findings(findings, as_task(task))
    assert found.name == label and (found.reason and found.reason.rule) == rule


def _with_reasons(reasons):
    rows = [dict(image_id=f'{i}', path=f'/gone/{i}.png', finding=FINDINGS[i % 2]) for i in range(2 * len(reasons))]
    t = new_table(rows, 's')
    for k, reason in enumerate(reasons): t = exclude(t, np.arange(len(t)) == 2 * k + 1, reason)
    return t


@pytest.mark.parametrize('reasons, words', [
    ([FILE_MISSING] * 3, '3 images of it not used: file missing (3), e.g. /gone/1.png; put the files there'),
    ([Reason('views', 'view not wanted', 'AP')] * 2, 'view not wanted (2); keep some of them, or add a source'),
    ([Reason('ages', 'age below 18'), FILE_MISSING], 'age below 18 (1) and file missing (1), e.g. /gone/3.png'),
    (['no consent'], '1 image of it not used: no consent (1)')])
def test_a_class_without_images_says_where_they_went(reasons, words):
    with pytest.raises(TableError) as e: label_for(_with_reasons(reasons), 'covid_vs_normal')
    assert words in str(e.value) and 'change the task' not in str(e.value)


@pytest.mark.parametrize('ids, refused', [(['1', '001'], True), (['p1', 'P01'], True), (['1', '1.0'], True), (['1', '2'], False),
                                          (['1', None], False), (['a:1', 'b:01'], False)])
def test_spellings_of_one_patient_meet_in_no_table(ids, refused):
    "Also in tables that no reader made, and when two tables of one source are joined"
    t = new_table([dict(image_id=f'{i}', patient=p) for i, p in enumerate(ids)], 's')
    for make in (lambda: join_tables([t[:1], t[1:]]), lambda: group_leaksafe(t, duplicates='none')):
        if refused:
            with pytest.raises(TableError, match='written in more than one way'): make()
        else: assert len(make()) == len(t)


def test_missing_files_are_never_passed_over(tmp_path):
    from PIL import Image
    from covid_cxr.duplicates import find_exact, find_near
    for i in range(4): Image.fromarray(np.random.default_rng(i // 2).integers(0, 255, (80, 80), dtype=np.uint8)).save(tmp_path / f'{i}.png')
    t = new_table([dict(image_id=f'{i}', path=str(tmp_path / f'{i}.png'), finding=FINDINGS[0], label='x') for i in range(4)], 's')
    assert group_leaksafe(t, duplicates='exact')['group'].nunique() == 2
    os.unlink(tmp_path / '3.png')
    for check in (lambda: group_leaksafe(t), lambda: group_leaksafe(t, duplicates='exact'), lambda: drop_repeats(t)):
        with pytest.raises(TableError, match='1 of 4 used images are not on this disk, e.g. .*3.png.*put them back'): check()
    for find in (find_exact, find_near):
        with pytest.warns(UserWarning, match='1 of 4 images are not on this disk and were not compared, e.g. .*3.png'): find(t)
    known = exclude(t, t['image_id'] == 's:3', FILE_MISSING)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert len(used(drop_repeats(group_leaksafe(known, duplicates='exact')))) == 2
        assert group_leaksafe(t, duplicates='none')['group'].nunique() == 4
        assert drop_repeats(t, pairs=[])['excluded'].isna().all()


def test_unknown_patients_are_counted():
    t = new_table([dict(image_id='1', patient='1'), dict(image_id='2'), dict(image_id='3')], 's')
    assert count_unknown_patients(t) == 2 and count_unknown_patients(exclude(t, [0, 0, 1], 'gone')) == 1
