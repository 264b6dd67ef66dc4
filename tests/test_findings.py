"""Several findings on one image: labels, masked loss, metrics and their means against answers worked out by hand."""
import json, math
import numpy as np, pandas as pd, pytest, torch
from conftest import DATA, needs_data
from covid_cxr.bundle import save_bundle
from covid_cxr.core import CxrError, new_table
from covid_cxr.evaluate import choose_threshold, evaluate
from covid_cxr.findings.evaluate import (MACRO_METRICS, FindingsEvaluation, check_finding_scores, choose_thresholds,
                                         evaluate_findings, macro_means)
from covid_cxr.findings.labels import (LEAST_PATIENTS, NIH_FINDINGS, count_labels, label_matrix, labels_of, read_label_columns,
                                       settle_uncertain, split_by_findings)
from covid_cxr.findings.learner import (FindingsInfo, decide_findings, findings_dls, findings_learner, masked_bce, mean_auc,
                                        predict_findings)
from covid_cxr.learner import Stage, fit_stages, learner_info
from covid_cxr.phantom import write_nih_tree
from covid_cxr.sources import read_nih
from covid_cxr.table import check_split

NAN = math.nan


def scored(seed=0, n=240, patients=90, shares=(.4, .3, .02), unknown=(0, .4, 0)):
    "Made-up labels with unknown ones, probabilities and patients"
    r = np.random.default_rng(seed)
    names = ['Effusion', 'Edema', 'Hernia'][:len(shares)]
    y = pd.DataFrame(r.random((n, len(shares))) < shares, columns=names).astype(float)
    p = 1 / (1 + np.exp(-r.normal(1.5 * y.to_numpy() - .7, 1)))
    for f, share in zip(names, unknown): y.loc[r.random(n) < share, f] = NAN
    return y, pd.DataFrame(p, y.index, y.columns), np.array([f'p{i}' for i in r.integers(0, patients, n)])


# labels

@pytest.mark.parametrize('findings, finding, complete, want', [
    ('Effusion|Mass', 'Effusion', True, [1, 1, 0, 0]), ('Effusion|Mass', 'Effusion', False, [1, 1, NAN, NAN]),
    ('No Finding', 'No Finding', True, [0, 0, 0, 0]), (None, 'No Finding', False, [0, 0, 0, 0]),
    (None, 'Pneumonia/Viral', False, [NAN, NAN, 1, 1]), ('Pneumonia', 'Pneumonia', True, [0, 0, 1, NAN]),
    (None, None, True, [NAN] * 4)])
def test_what_a_table_says(findings, finding, complete, want):
    row = dict(image_id='a', findings=findings, finding=finding)
    t = new_table([{k: v for k, v in row.items() if v is not None}], 'x')
    found = label_matrix(t, ['Effusion', 'Mass', 'Pneumonia', 'Pneumonia/Viral'], complete_lists=['x'] if complete else [])
    np.testing.assert_array_equal(found.to_numpy()[0], want)


def test_a_misspelt_finding_is_not_an_absent_one():
    t = new_table([dict(image_id='a', findings='Effusion|Mas')], 'nih')
    with pytest.raises(CxrError, match=r"'Mas' \(1\), did you mean 'Mass'"): label_matrix(t, ['Mass'])


@pytest.mark.parametrize('uncertain, want', [('unknown', NAN), ('positive', 1), ('negative', 0)])
def test_uncertain_is_what_the_caller_says(uncertain, want, tmp_path):
    (tmp_path / 'a.csv').write_text('image_id,Edema,Mass\n1,-1,1\n2,0,\n')
    found = read_label_columns(tmp_path / 'a.csv', ['Edema', 'Mass'], uncertain=uncertain)
    np.testing.assert_array_equal(found.to_numpy(), [[want, 1], [0, NAN]])
    np.testing.assert_array_equal(settle_uncertain(pd.DataFrame([[-1., 1]]), uncertain).to_numpy(), [[want, 1]])


def test_the_written_lists_come_back(tmp_path):
    truth = write_nih_tree(tmp_path / 'nih', n_patients=20, size=32).rows
    table = read_nih(tmp_path / 'nih')
    labels = label_matrix(table)
    for row in truth:
        there = {f for f in NIH_FINDINGS if labels.loc[f"nih:{row['file']}", f] == 1}
        assert there == set(row['labels'].split('|')) - {'No Finding'}
    assert not labels.isna().any(axis=None)


@pytest.mark.parametrize('seed', range(5))
def test_a_rare_finding_is_shared_out_and_no_group_is_cut(seed):
    r = np.random.default_rng(seed)
    n, groups = 900, np.array([f'p{i % 300}' for i in range(900)])
    labels = pd.DataFrame(dict(Mass=r.random(n) < .2, Hernia=np.isin(groups, [f'p{i}' for i in range(10)])), dtype=float)
    labels.index = pd.Index([f'x:{i}' for i in range(n)], name='image_id')
    table = new_table(dict(image_id=np.arange(n), patient=groups), 'x').assign(group=groups)
    split = split_by_findings(table, labels, seed=seed)
    assert (split.groupby('group')['split'].nunique() == 1).all()
    ill = split[labels['Hernia'].to_numpy() == 1].groupby('split')['group'].nunique()
    assert ill[['train', 'valid', 'test']].tolist() == [6, 2, 2]


# loss

def test_masked_loss_by_hand():
    logits, targets = torch.tensor([[1., -2., 5.], [0., .5, -5.]]), torch.tensor([[1., 0., NAN], [NAN, 1., NAN]])
    soft = lambda z: math.log1p(math.exp(z))
    by_hand = [soft(-1), soft(-2), soft(-.5)]
    assert masked_bce(logits, targets).item() == pytest.approx(sum(by_hand) / 3, abs=1e-6)
    heavy = masked_bce(logits, targets, torch.tensor([3., 2., 5.])).item()
    assert heavy == pytest.approx((3 * by_hand[0] + by_hand[1] + 2 * by_hand[2]) / 3, abs=1e-5)
    assert masked_bce(logits, targets, reduction='none').tolist() == pytest.approx([(by_hand[0] + by_hand[1]) / 2, by_hand[2]], abs=1e-6)


def test_unknown_entries_pull_nowhere():
    logits = torch.randn(4, 3, requires_grad=True)
    targets = torch.tensor([[1., NAN, NAN], [0., NAN, 1.], [NAN] * 3, [1., NAN, 0.]])
    masked_bce(logits, targets).backward()
    assert torch.equal(logits.grad != 0, ~targets.isnan())
    none = masked_bce(logits, torch.full((4, 3), NAN))
    none.backward()
    assert none.item() == 0 and logits.grad.isfinite().all()


def test_a_finding_with_one_class_has_no_part_in_the_mean_auc():
    scores, targets = torch.tensor([[.9, .1], [.2, .3], [.4, .2]]), torch.tensor([[1., 0.], [0., 0.], [1., NAN]])
    assert mean_auc(scores, targets) == 1
    assert math.isnan(mean_auc(scores, torch.zeros(3, 2)))


# metrics

def test_each_finding_is_evaluated_on_its_known_images():
    y, p, groups = scored()
    e = evaluate_findings(y, p, groups, dict(Effusion=.4, Edema=.6, Hernia=.5), n_boot=200)
    known = y['Edema'].notna()
    alone = evaluate(y['Edema'][known].astype(int), p['Edema'][known], groups[known], .6, ('absent', 'present'), n_boot=200, curves=False)
    assert e['Edema'].evaluation == alone and e['Edema'].count.unknown == int((~known).sum())


def test_the_mean_is_the_mean_and_names_who_is_left_out():
    y, p, groups = scored()
    y['Hernia'] = 0.
    e = evaluate_findings(y, p, groups, n_boot=200)
    assert e['Hernia']['auc'].note == 'NOT ESTIMABLE: 0 patients with it (of at least 10)' and math.isnan(e['Hernia']['auc'].value)
    assert e.estimable == ['Effusion', 'Edema'] and list(e.left_out) == ['Hernia']
    assert e.table()['note'].iloc[-1] == 'without Hernia' and 'Hernia: 0 patients with it' in str(e)
    for m in MACRO_METRICS:
        assert e.macro[m].value == pytest.approx((e['Effusion'][m].value + e['Edema'][m].value) / 2, abs=1e-12)
        assert e.macro[m].n == 2 and e.macro[m].low < e.macro[m].value < e.macro[m].high
    assert FindingsEvaluation.from_dict(json.loads(json.dumps(e.to_dict()))) == e


@pytest.mark.parametrize('n_patients, estimable', [(LEAST_PATIENTS - 1, False), (LEAST_PATIENTS, True)])
def test_the_rule_counts_patients(n_patients, estimable):
    "Thirty images with the finding, of nine or of ten patients"
    y = pd.DataFrame(dict(Mass=[1.] * 30 + [0.] * 30))
    groups = [f'ill{i % n_patients}' for i in range(30)] + [f'well{i}' for i in range(30)]
    e = evaluate_findings(y, np.linspace(1, 0, 60)[:, None], groups, n_boot=0)
    assert (e.estimable == ['Mass']) == estimable
    table = new_table(dict(image_id=[str(i) for i in range(60)])).assign(group=groups, split='test', source='x')
    note = count_labels(table, y.set_index(table['image_id'])).query('split == "test"')['note'].iloc[0]
    assert (note == '') == estimable


def test_the_interval_of_the_mean_keeps_findings_together():
    "The same finding twice is no more certain than once; two independent ones are"
    y, p, groups = scored(3, 400, 400, (.4, .4), (0, 0))
    once = macro_means(check_finding_scores(y[['Effusion']], p[['Effusion']], groups), dict(Effusion=.5))['auc']
    twin = y[['Effusion']].assign(Again=y['Effusion']), p[['Effusion']].assign(Again=p['Effusion'])
    twice = macro_means(check_finding_scores(*twin, groups), dict(Effusion=.5, Again=.5))['auc']
    both = macro_means(check_finding_scores(y, p, groups), dict(Effusion=.5, Edema=.5))['auc']
    width = lambda e: e.high - e.low
    assert twice[:3] == pytest.approx(once[:3], abs=1e-9)
    assert .6 < width(both) / width(once) < .8             # one over the square root of two, about


def test_thresholds_come_from_known_validation_images():
    y, p, _ = scored(2)
    y['Hernia'] = 0.
    points = choose_thresholds(y, p, 'f1')
    known = y['Edema'].notna()
    assert list(points) == ['Effusion', 'Edema']
    assert points['Edema'] == choose_threshold(y['Edema'][known].astype(int), p['Edema'][known], 'f1')
    late = scored(4, shares=(.4, .3, .3))
    e = evaluate_findings(*late, points, n_boot=0)
    assert e.left_out == {'Hernia': 'no threshold was chosen for it on validation images'}


def test_order_of_the_images_does_not_matter():
    y, p, groups = scored()
    order = np.random.default_rng(1).permutation(len(y))
    e = [evaluate_findings(y.iloc[i], p.iloc[i], groups[i], n_boot=100) for i in (np.arange(len(y)), order)]
    assert e[0] == e[1]


# training

@pytest.fixture(scope='module')
def phantoms(tmp_path_factory):
    write_nih_tree(tmp_path_factory.mktemp('findings') / 'nih', n_patients=30, size=64)
    table = read_nih(next(tmp_path_factory.getbasetemp().glob('findings*')) / 'nih')
    return split_by_findings(table.assign(group=table['patient']), label_matrix(table), seed=1)


def test_training_with_unknown_labels(phantoms, tmp_path):
    labels = label_matrix(phantoms, ['Effusion', 'Infiltration'])
    labels.iloc[::2, 1] = NAN
    dls = findings_dls(phantoms, labels, size=64, bs=8, device='cpu', augment=[])
    learn = findings_learner(dls, 'cnn3', weights='none', path=tmp_path)
    assert isinstance(learner_info(learn), FindingsInfo) and learner_info(learn).classes == ['Effusion', 'Infiltration']
    fit = fit_stages(learn, [Stage(2, lr=1e-3)], tmp_path / 'checkpoints', log=lambda text: None)
    assert np.isfinite(fit.history[['train_loss', 'valid_loss']]).all(axis=None)
    found = predict_findings(learn, phantoms, thresholds=dict(Effusion=.5))
    assert found['prob_Effusion'].between(0, 1).all() and found['predicted_Infiltration'].isna().all()
    assert (found['predicted_Effusion'] == (found['prob_Effusion'] >= .5)).all()
    assert decide_findings(found, dict(Effusion=0), ['Effusion'])['predicted_Effusion'].all()
    with pytest.raises(CxrError, match='has 1 of 2 thresholds'): save_bundle(learn, tmp_path / 'bundle')


def test_a_label_stays_with_its_image(phantoms):
    "Rows in another order, labels in another order: the same target per file"
    labels = label_matrix(phantoms, ['Effusion', 'Infiltration'])
    mixed = phantoms.sample(frac=1, random_state=0), labels.sample(frac=1, random_state=1)
    items = [findings_dls(*pair, size=64, device='cpu').train_ds.items.set_index('path').sort_index()
             for pair in ((phantoms, labels), mixed)]
    pd.testing.assert_frame_equal(*items)
    np.testing.assert_array_equal(labels_of(mixed[1], phantoms), labels)


# real data

@needs_data
def test_the_real_table_of_nih():
    table = read_nih(DATA / 'nih-chest-xrays')
    labels = label_matrix(table)
    text = (DATA / 'nih-chest-xrays/Data_Entry_2017_v2020.csv').read_text()
    lists = [line.split(',')[1].split('|') for line in text.splitlines()[1:]]
    assert len(labels) == len(lists) == 746 and not labels.isna().any(axis=None)
    assert {f: int(labels[f].sum()) for f in labels} == {f: sum(f in words for words in lists) for f in NIH_FINDINGS}
    assert int((labels.sum(axis=1) == 0).sum()) == sum(words == ['No Finding'] for words in lists)
    table = split_by_findings(table.assign(group=table['patient']), labels)
    assert not check_split(table)
    counts = count_labels(table, labels).set_index(['finding', 'split'])
    assert counts.loc[('Hernia', 'test'), 'note'].startswith('NOT ESTIMABLE') and counts.loc[('Pneumonia', 'test'), 'note'] == ''
