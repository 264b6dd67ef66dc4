"Laws of the table: whatever the rows, no group is ever cut, no row is ever lost, and the order of rows means nothing"
import numpy as np, pandas as pd, pytest
from pathlib import Path
from hypothesis import HealthCheck, given, settings, strategies as st
from covid_cxr.core import SPLITS, LeakError, TableError, new_table, used
from covid_cxr.table import (check_split, crossing_groups, drop_repeats, flow, fold_by_group, group_leaksafe, join_tables, filter_views, label_for, reconcile,
                             split_by_group, split_by_source, split_by_time, split_official, split_random, use_fold)

DATA = Path(__file__).resolve().parent.parent.parent / 'shared/data'
real = pytest.mark.skipif(not DATA.is_dir(), reason='real radiographs not present at ../shared/data')
def laws(n): return settings(max_examples=n, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
FINDINGS = ('No Finding', 'Pneumonia/Viral/COVID-19', 'Pneumonia/Bacterial')
CLASS = {'No Finding': 'normal', 'Pneumonia/Viral/COVID-19': 'covid', 'Pneumonia/Bacterial': 'bacterial'}


@st.composite
def tables(draw, n_classes=2, parts=3):
    "A small table of two sources: patients with one or many films of any class, unknown patients, repeated files, blanks; every class has `parts` patients of its own"
    few, many = st.integers(0, 9), st.one_of(st.none(), st.integers(0, 14))
    row = st.tuples(many, st.integers(0, n_classes - 1), st.one_of(st.none(), few), st.integers(0, 11), st.integers(0, 400))
    drawn = draw(st.lists(row, min_size=0, max_size=30))
    sure = [(100 + c * parts + i, c, None, 5, 10 * i) for c in range(n_classes) for i in range(parts)]
    rows = []
    for i, (patient, c, file, luck, day) in enumerate(drawn + sure):
        rows.append(dict(image_id=f's{luck % 2}:{i:02d}', source=f's{luck % 2}', patient=None if patient is None else f's:{patient}', path=None if file is None else f'f/{file}.png',
                         finding=None if luck == 0 else FINDINGS[c], view='L' if luck == 1 else 'PA', offset_days=None if luck == 2 else day,
                         official_split=('train', 'val', 'test')[luck % 3]))
    return new_table(rows)


def prepared(table):
    return group_leaksafe(label_for(filter_views(table, 'PA'), {f: CLASS[f] for f in FINDINGS if (table['finding'] == f).any()}), duplicates='none')

def assert_sound(before, after):
    "No row lost, every used row has a part, no excluded one has, no group, patient or file is cut, nothing but split and excluded changed"
    assert list(after['image_id']) == list(before['image_id'])
    same = [c for c in before.columns if c not in ('split', 'excluded', 'fold')]
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

def parts_of(table): return table.set_index('image_id')['split'].fillna('-').sort_index()

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
    except TableError as e:                                 # a part without one class, or a test part that takes everything
        assert name not in ('by_group', 'by_group_no_test') and any(w in str(e) for w in ('no image', 'both sides', 'no used row'))
        with pytest.raises(TableError): split(table.sample(frac=1, random_state=order), seed)
        return
    assert_sound(table, after)
    assert parts_of(after).equals(parts_of(split(table, seed)))                                        # same seed, same split
    assert parts_of(after).equals(parts_of(split(table.sample(frac=1, random_state=order), seed)))     # order means nothing

@pytest.mark.parametrize('n_classes', [1, 2, 3])
@laws(60)
@given(data=st.data(), seed=st.integers(0, 1000), pct=st.sampled_from([(.2, .2), (.1, .1), (.3, 0), (.15, .35)]))
def test_shares_are_met_within_twice_the_largest_group(n_classes, data, seed, pct):
    table = prepared(data.draw(tables(n_classes))) if n_classes > 1 else group_leaksafe(data.draw(tables(1)), duplicates='none')
    u = used(split_by_group(table, *pct, seed)).fillna({'label': 'all'})
    shares = dict(train=1 - sum(pct), valid=pct[0], test=pct[1])
    for cls, rows in u.groupby('label'):
        largest = rows.groupby('group').size().max()
        for part, share in shares.items():
            n = (rows['split'] == part).sum()
            assert abs(n - share * len(rows)) <= 2 * largest and (n > 0) == (share > 0), (cls, part, n, share * len(rows), largest)

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
    reach = {i: {i} for i in ids}                                                                     # and no coarser: walk the links by hand
    links = pairs + [(a, b) for key in ('patient', 'path') for _, m in g[g[key].notna()].groupby(key)['image_id'] for a, b in zip(m, m[1:])]
    for a, b in links:
        both = reach[a] | reach[b]
        for i in both: reach[i] = both
    assert {frozenset(s) for s in reach.values()} == {frozenset(m) for _, m in g.groupby('group')['image_id']}
    again = group_leaksafe(table.sample(frac=1, random_state=order), [(b, a) for a, b in pairs[::-1]], 'none')
    assert dict(zip(again['image_id'], again['group'])) == of

@laws(30)
@given(table=tables(3), seed=st.integers(0, 100))
def test_rows_in_are_rows_used_plus_rows_excluded_at_every_step(table, seed):
    steps = [lambda t: join_tables([t]), lambda t: filter_views(t, ['PA', 'AP']), lambda t: label_for(t, {f: c for f, c in CLASS.items() if f != 'Pneumonia/Bacterial'}),
             lambda t: group_leaksafe(t, duplicates='none'), lambda t: drop_repeats(t, pairs=[]), lambda t: split_by_source(t, 's1', .3, seed)]
    t = table
    for step in steps:
        before = t['excluded'].copy() if len(t) else t
        try: t = step(t)
        except TableError: return
        account = reconcile(t)
        n, counts = account.to_dict(), account.counts
        assert n['rows_in'] == len(table) == n['used'] + n['excluded'] and n['used'] == len(used(t))
        kept = before.notna().to_numpy()
        assert (t['excluded'][kept].to_numpy() == before[kept].to_numpy()).all()                      # the first reason stays
        assert (counts.loc['rows in'] == counts.drop('rows in').sum()).all() and (counts['all'] == counts.drop(columns='all').sum(axis=1)).all()

@laws(50)
@given(table=tables(), seed=st.integers(0, 1000))
def test_a_random_split_is_found_out_whenever_it_cuts(table, seed):
    t = split_random(prepared(table), .2, .2, seed)
    u = used(t)
    cut = sorted(g for g, n in u.groupby('group')['split'].nunique().items() if n > 1)
    assert check_split(t, allow_leak=True) == cut == reconcile(t).leaks
    if cut:
        with pytest.raises(LeakError, match='stand in more than one part'): check_split(t)
        assert f'LEAK: {len(cut)} groups' in str(reconcile(t))

@laws(60)
@given(table=tables(), seed=st.integers(0, 1000), hidden=st.sampled_from(['nothing', 'by hand', 'half', 'all']))
def test_what_crosses_is_counted_as_by_hand(table, seed, hidden):
    "Groups made by hand, or missing, hide neither a patient nor a file; the counts are those of a loop over rows"
    t = split_random(prepared(table), .2, .2, seed)
    if hidden == 'by hand': t = t.assign(group=t['image_id'])
    if hidden in ('half', 'all'): t = t.assign(group=t['group'].where((t.index % 2 == 0) & (hidden == 'half'), np.nan))
    want = {}
    for key in ('path', 'patient', 'group'):
        parts, count = {}, {}
        for r in used(t)[['group', 'patient', 'path', 'split']].to_dict('records'):
            if isinstance(r[key], str): parts.setdefault(r[key], set()).add(r['split'])
        for r in used(t)[['group', 'patient', 'path', 'split']].to_dict('records'):
            if isinstance(r[key], str) and len(parts[r[key]]) > 1:
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
    assert u['fold'].isin([0, 1, 2]).all() and t.loc[t['excluded'].notna(), 'fold'].isna().all() and (u.groupby('group')['fold'].nunique() == 1).all()
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


def test_a_late_patient_is_not_trained_on_and_a_left_out_source_is_whole():
    rows = [dict(image_id=f'{i}', patient=f'{i // 2}', label='ab'[i // 2 % 2], source='xy'[i % 3 == 0], offset_days=i, group=f'{i // 2}') for i in range(60)]
    t = split_by_time(new_table(rows), 'offset_days', test_from=41, valid_pct=.3)
    assert t['excluded'][40].startswith('group also in') and t['split'][41] == 'test' and (t['split'][:40] != 'test').all() and (t['split'][41:] == 'test').all()
    t = split_by_source(new_table(rows), 'y', .3)
    assert (t['split'][t['source'] == 'y'] == 'test').all() and (used(t)['split'] == 'test').sum() == 20


def nih_sized(n=112_120, patients=30_805):
    r = np.random.default_rng(0)
    patient = np.sort(np.concatenate([np.arange(patients), r.integers(0, patients, n - patients)]))
    return new_table(dict(image_id=[f'{i}.png' for i in range(n)], path=[f'/none/{i}.png' for i in range(n)], patient=patient.astype(str),
                          finding=np.where(r.random(n) < .18, 'Effusion', 'No Finding')), 'big')

def test_a_table_of_112120_images_is_grouped_and_split_by_patient():
    t = split_by_group(group_leaksafe(label_for(nih_sized(), 'effusion_vs_no_finding')), .1, .1)
    assert check_split(t) == [] and t['group'].nunique() == 30_805
    share = pd.crosstab(t['label'], t['split'], normalize='index')
    assert np.abs(share[['train', 'valid', 'test']].to_numpy() - [.8, .1, .1]).max() < .001
    patients = t.groupby('split')['patient'].nunique() / 30_805
    assert np.abs(patients[['train', 'valid', 'test']].to_numpy() - [.8, .1, .1]).max() < .005     # patients with many films do not gather in one part


@real
def test_the_whole_nih_table_is_read_and_split_by_patient():
    "112,120 real rows; how long it takes is measured by benchmarks/nih_table.py"
    from covid_cxr.sources import read_nih
    t = group_leaksafe(label_for(read_nih(DATA / 'nih-chest-xrays', csv='nih.csv.gz', files='ignore'), {'No Finding': 'no_finding', '*': 'finding'}), duplicates='none')
    assert len(t) == 112_120 and t['group'].nunique() == t['patient'].nunique() == 30_805 and (t['label'] == 'no_finding').sum() == 60_361
    s = split_by_group(t, .1, .1)
    assert check_split(s) == [] and (s.groupby('patient')['split'].nunique() == 1).all()
    share = pd.crosstab(s['label'], s['split'], normalize='index')
    assert np.abs(share[['train', 'valid', 'test']].to_numpy() - [.8, .1, .1]).max() < .001
    r = split_random(t, .1, .1)                                       # thousands of leaks are found as surely as one
    cut = r.groupby('group')['split'].nunique()
    assert list(crossing_groups(r)['group']) == sorted(cut.index[cut > 1]) and (cut > 1).sum() > 5000
