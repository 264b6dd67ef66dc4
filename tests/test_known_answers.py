"""Known answers for the data layer: a phantom tree with planted faults goes in, and every check finds its fault by name."""
import os
import numpy as np, pandas as pd, pytest
from PIL import Image
from conftest import DATA, needs_data
from covid_cxr.core import LeakError, new_table, used
from covid_cxr.curate.patient_ids import check_patient_ids, explain_patient_ids, patient_id_overlaps
from covid_cxr.phantom import FAULTS, phantom_family, write_phantom_trees
from covid_cxr.sources import read_covid_chestxray, read_kaggle_pneumonia
from covid_cxr.table import (check_split, drop_repeats, group_leaksafe, join_tables, label_for, reconcile, split_by_group, split_official,
                             split_random)

COPIES = ('exact_copy', 'recompressed', 'small_crop', 'border_added', 'mirrored', 'cross_source', 'split_copy')


@pytest.fixture(scope='module')
def tree(tmp_path_factory):
    "The faulty tree, its table, and the rows of each fault"
    root = tmp_path_factory.mktemp('faulty') / 'data'
    faults = write_phantom_trees(root, seed=3, size=160, n_patients=30, n_normal=16, n_pneumonia=16, faults=True).faults
    t = join_tables([read_covid_chestxray(root / 'covid-chestxray-dataset'), read_kaggle_pneumonia(root / 'chest-xray-pneumonia')])
    by_file = {os.path.relpath(p, root): i for i, p in zip(t['image_id'], t['path']) if isinstance(p, str)}
    return root, t, {k: [by_file[f] for f in v['files']] for k, v in faults.items()}, faults


@pytest.fixture(scope='module')
def checked(tree, tmp_path_factory):
    "The table after the checks: unreadable files out, grouped by near duplicates"
    from covid_cxr.cache import check_images
    from covid_cxr.images import ImageRule
    t = check_images(label_for(tree[1], 'covid_vs_other'), ImageRule(size=64), on_bad='exclude')
    return group_leaksafe(t, duplicates='near', cache_file=tmp_path_factory.mktemp('prints') / 'prints.npz')


def test_every_planted_fault_is_asked_for_here():
    asked = {*COPIES, 'shared_patient', 'label_conflict', 'missing_file', 'truncated_file', 'wrong_patient_id', 'split_patient'}
    assert asked == set(FAULTS)


@pytest.mark.parametrize('fault', [*COPIES, 'shared_patient', 'label_conflict'])
def test_copies_join_the_groups_of_their_patients(tree, checked, fault):
    rows = checked.set_index('image_id')
    a, b = (rows.loc[i] for i in tree[2][fault][:2])
    assert a['patient'] != b['patient'], 'the fault would be found by the patient id alone'
    assert a['group'] == b['group']


def test_unrelated_patients_stay_apart(tree, checked):
    "The price of finding copies: no group may grow beyond its planted links"
    patient = checked.set_index('image_id')['patient']
    linked = {frozenset(patient.loc[ids[:2]]) for k, ids in tree[2].items() if k in (*COPIES, 'shared_patient', 'label_conflict')}
    twice = checked[checked['path'].duplicated(keep=False) & checked['path'].notna()]
    linked |= {frozenset(g['patient']) for _, g in twice.groupby('path')}
    for _, g in used(checked).groupby('group'):
        patients = set(g['patient'])
        if len(patients) > 1: assert any(patients & l for l in linked), sorted(patients)


def test_a_picture_under_two_labels_is_not_used(tree, checked):
    t = drop_repeats(checked).set_index('image_id')
    open_again = checked.assign(excluded=checked['excluded'].where(checked['excluded_step'] != 'task'), label=None)
    kinds = label_for(open_again, 'kinds')
    c = drop_repeats(kinds).set_index('image_id')         # herpes and "No Finding" are one class of covid_vs_other, and two of kinds
    conflict, other = tree[2]['label_conflict']
    for i in (conflict, other): assert c.loc[i, 'excluded_rule'] == 'label conflict with another'
    assert c.loc[conflict, 'excluded_detail'] == other and c.loc[other, 'excluded_detail'] == conflict
    rules = [t.loc[i, 'excluded_rule'] for i in tree[2]['exact_copy']]
    assert rules.count('same picture as another') == 1


def test_missing_and_truncated_files_are_named(tree, checked):
    t = checked.set_index('image_id')
    assert t.loc[tree[2]['missing_file'][0], 'excluded'] == 'file missing'
    assert 'unreadable' in t.loc[tree[2]['truncated_file'][0], 'excluded']
    text = str(reconcile(checked))
    assert 'file missing' in text and 'unreadable' in text


def test_the_wrong_id_is_no_leak_and_the_right_one_is(tree):
    "One number for two kinds is two people (no leak); one number and kind on both sides of the official split is one"
    kaggle = label_for(tree[1][tree[1]['source'] == 'kaggle_pneumonia'].reset_index(drop=True), 'pneumonia_vs_normal')
    rows = kaggle.set_index('image_id')
    a, b = tree[2]['wrong_patient_id']
    assert rows.loc[a, 'patient'] != rows.loc[b, 'patient']
    a, b = tree[2]['split_patient']
    assert rows.loc[a, 'patient'] == rows.loc[b, 'patient']
    grouped = group_leaksafe(kaggle, duplicates='exact')
    with pytest.raises(LeakError) as e: split_official(grouped)
    assert 'person9902' in str(e.value)


def test_no_fault_survives_a_split(tree, checked):
    t = split_by_group(drop_repeats(checked), valid_pct=.2, test_pct=.2, seed=1)
    assert check_split(t) == []
    where = used(t).set_index('image_id')['split']
    for fault in (*COPIES, 'shared_patient'):
        both = where.reindex(tree[2][fault][:2]).dropna()
        assert both.nunique() <= 1, fault
    naive = t.assign(group=t['patient'])                                # what grouping by patient alone would have let through
    naive = split_by_group(naive, valid_pct=.2, test_pct=.2, seed=1)
    where = used(naive).set_index('image_id')['split']
    leaked = [f for f in (*COPIES, 'shared_patient') if where.reindex(tree[2][f]).dropna().nunique() > 1]
    assert leaked, 'the planted copies would not have leaked anyway: the test shows nothing'


@pytest.fixture(scope='module')
def p5(tmp_path_factory):
    "Member P5 of the phantom family (a label at random, several images of a patient), as a table with files"
    x, t, _ = phantom_family('P5', n_patients=30, images_per_patient=(3, 3), size=96, seed=4)
    folder = tmp_path_factory.mktemp('p5')
    for i, a in enumerate(x): Image.fromarray(a).save(folder / f'{i}.png')
    paths = [str(folder / f'{i}.png') for i in range(len(x))]
    label = ['ab'[y] for y in t['label']]
    return new_table(dict(image_id=range(len(x)), path=paths, patient=t['patient'], finding='No Finding', label=label), 'p5')


def test_true_ids_are_informative_and_shuffled_ones_are_not(p5):
    assert check_patient_ids(p5).loc[0, 'z'] > 10 and check_patient_ids(p5).loc[0, 'verdict'] == 'informative'
    z = [check_patient_ids(p5.assign(patient=np.random.default_rng(s).permutation(p5['patient'])), seed=s).loc[0, 'z'] for s in range(5)]
    assert np.max(np.abs(z)) < 3.5 and (np.abs(z) < 3).sum() >= 4, z


def test_a_planted_shared_patient_is_listed_by_name(p5):
    t = split_random(group_leaksafe(p5, duplicates='none'), .3, .3, seed=1)
    cut = t.groupby('patient')['split'].nunique()
    assert set(patient_id_overlaps(t).query("what == 'two splits'")['patient']) == set(cut.index[cut > 1]) != set()
    t = split_by_group(group_leaksafe(p5, duplicates='none'), .3, .3, seed=1)
    assert not len(patient_id_overlaps(t))
    one = t['image_id'][t['split'] == 'test'].iloc[0]
    moved = t.assign(split=t['split'].where(t['image_id'] != one, 'train'))
    patient = t.set_index('image_id').loc[one, 'patient']
    assert patient_id_overlaps(moved)[['patient', 'where']].values.tolist() == [[patient, 'train 1, test 2']]


@needs_data
def test_the_number_of_the_kaggle_children_is_no_patient(tmp_path_factory):
    "170 numbers in the official train and test, 979 of 1,674 with both kinds: and the pictures know nothing of it"
    t = read_kaggle_pneumonia(DATA / 'chest-xray-pneumonia')
    t['number'] = t['patient'].str.extract(r'(person\d+)$')[0]
    assert t['number'].nunique() == 1674
    over = patient_id_overlaps(t, 'number', split='official_split')
    test_and_not = over[(over['what'] == 'two splits') & over['where'].str.contains('test')]
    assert len(test_and_not) == 170 and not len(patient_id_overlaps(t, split='official_split'))
    assert ((t['official_split'] == 'test') & t['number'].isin(test_and_not['patient'])).sum() == 320
    assert (over['what'] == 'two labels').sum() == 979
    some = t['number'].isin(sorted(t['number'].dropna().unique())[::6])      # every sixth number: a thousand images, read in seconds
    prints = tmp_path_factory.mktemp('kaggle') / 'prints.npz'
    r = explain_patient_ids(t[some], 'number', 'kind', split='official_split', cache_file=prints)
    assert r.shared > 20 and r.shared_within == 0 and r.across.pairs > 120 and abs(r.across.z) < 3 and r.joined.z > 10
    assert r.verdict == 'incomplete' and r.within == 'kind' and 'joins different people' in str(r)
    line = check_patient_ids(t[some], cache_file=prints).iloc[0]
    assert line['z'] > 10 and line['two_splits'] == line['two_labels'] == 0
