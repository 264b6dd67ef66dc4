"Thresholds of another place: exact shifts, what was chosen and why, the verb, and the bundle that it writes"
import json, shutil
import numpy as np, pandas as pd
import pytest
from scipy.special import expit, logit
from conftest import ROOT, here
from covid_cxr.bundle import read_bundle, site_head
from covid_cxr.core import BundleError, choices
from covid_cxr.images import read_picture
from covid_cxr.predict import load_predictor
from covid_cxr.runs.folder import RunFolder
from covid_cxr.runs.local import calibrate_for_site, find_reference, local_value, reference_of_run
from covid_cxr.stats.recalibration import LocalLabels, calibrate_locally, reference_of, value_of_local_images

STRESS = json.loads((ROOT / 'benchmarks/results/stress_folds.json').read_text())


def scores(seed=0, n=400, negatives=-3.):
    rng = np.random.default_rng(seed)
    y = (rng.random(n) < .5).astype(int)
    return y, expit(np.where(y == 1, rng.normal(3, 2, n), rng.normal(negatives, 2, n)))


@pytest.mark.parametrize('shift', [-2., 1., 4.])
def test_a_place_that_moves_all_scores_moves_the_threshold_as_far(shift):
    y, p = scores()
    reference, moved = reference_of(y, p, .4), expit(logit(p) + shift)
    found = calibrate_locally(y, moved, reference)
    assert logit(found.threshold) == pytest.approx(logit(.4) + shift, abs=1e-6)
    normals = calibrate_locally(np.zeros(sum(y == 0)), moved[y == 0], reference)
    assert logit(normals.threshold) == pytest.approx(logit(.4) + shift / 2, abs=1e-6)
    assert ((found.apply(moved) >= .5) == (p >= .4)).mean() > .995      # only rounding at the threshold itself


def test_nothing_is_bought_where_nothing_moved():
    y, p = scores()
    table = value_of_local_images(*scores(1), reference_of(y, p, .5), sizes=(100,)).set_index(['labels', 'metric'])['value']
    for known in choices(LocalLabels): assert abs(table[known, 'gain']) < .03


def test_the_ways_are_the_best_of_the_held_out_clusters_or_as_good():
    t = pd.DataFrame(STRESS['ways'])
    ours = {'both classes': 'mean shift of the two medians', 'negatives': 'half of the shift of the median',
            'none': 'two groups that differ most'}
    for labels, way in ours.items():
        for n in (20, 50):
            rows = t[(t['labels'] == labels) & (t['n'] == n)].set_index('way')['balanced_accuracy']
            assert rows[way] >= rows.max() - .005, (labels, n)


def test_a_part_of_the_fall_is_foreseen_and_no_more():
    for found in STRESS['features'].values():
        tested = found['published_test']['specificity']
        for s in found['seeds']:
            worst = min(f['specificity'] for f in s['folds'] if f['held_out'] == 'normal')
            assert s['worst']['specificity']['specificity'] == worst
            assert tested < worst < s['by_patient']['specificity'] - .1


def test_fifty_images_of_the_published_test_buy_back_specificity():
    run = RunFolder.open(ROOT / 'benchmarks/results/pneumonia-resnet-imagenet-seed42')
    t = local_value(run).query("place == 'test'").set_index(['labels', 'n', 'metric'])['value']
    assert t['both classes', 50, 'specificity'] > t['', 0, 'specificity'] + .1 and t['both classes', 50, 'gain'] > 0


def as_a_place(run, folder):
    "The evaluated images of a run in a folder per class, the patient in their names"
    for i, row in enumerate(run.evaluated.itertuples()):
        place = folder / row.label / f'{row.group}_{i}.png'.replace(':', '-').replace('/', '-')
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(row.path, place)


def test_the_verb_writes_a_bundle_of_the_place(phantom_run, tmp_path):
    run = shutil.copytree(phantom_run, tmp_path / 'run')
    r = RunFolder.open(run)
    assert list(find_reference(run)) == pytest.approx(list(reference_of_run(r)), abs=1e-6)
    as_a_place(r, tmp_path / 'place')
    p = here('calibrate', run, tmp_path / 'place', '--site', 'our ward', '--patient-pattern', r'/(.+)_\d+\.', '--out', tmp_path / 'ours')
    assert p.returncode == 0 and p.stdout.startswith('our ward: threshold') and 'labels known' in p.stdout, p.stderr
    b = read_bundle(tmp_path / 'ours')
    assert b['site']['name'] == 'our ward' and b['threshold'] == .5 and b['site']['n_groups'] == r.evaluated['group'].nunique()
    own, moved = load_predictor(run), load_predictor(tmp_path / 'ours')
    path = r.evaluated['path'][0]
    p, q = (m.predict(path, ood='off').probabilities[r.classes[-1]] for m in (own, moved))
    assert q == pytest.approx(expit((logit(p) - logit(b['site']['threshold'])) / b['site']['temperature']), abs=1e-4)
    with pytest.raises(BundleError, match='our ward already'): calibrate_for_site(tmp_path / 'ours', tmp_path / 'place', tmp_path / 'x')
    refused = here('calibrate', run, tmp_path / 'nowhere', '--out', tmp_path / 'x')
    assert refused.returncode == 1 and 'Traceback' not in refused.stderr


def test_the_verb_moves_the_head_and_every_engine_answers_with_it(phantom_run, tmp_path):
    r = RunFolder.open(phantom_run)
    as_a_place(r, tmp_path / 'place')
    p = here('calibrate', phantom_run, tmp_path / 'place', '--patient-pattern', r'/(.+)_\d+\.', '--head', '--out', tmp_path / 'ours')
    assert p.returncode == 0 and p.stdout.startswith('local: head moved with') and 'sensitivity' in p.stdout, p.stderr
    own, head = load_predictor(phantom_run), site_head(read_bundle(tmp_path / 'ours'))
    assert here('export', tmp_path / 'ours', '--out', tmp_path / 'away').returncode == 0
    files = r.evaluated['path'].tolist()[:6]
    pixels = [read_picture(f, own.rule).pixels for f in files]
    seen = (own.features(pixels) - own.feature_check.mean) / own.feature_check.spread
    x = np.column_stack([logit(own.probabilities(pixels)[:, 1]), seen])
    w = np.r_[head.logit, head.weights * own.feature_check.spread]
    wanted = expit((x @ w + head.bias + head.weights @ own.feature_check.mean) / head.temperature)
    for backend in ('torch', 'onnx'):
        said = load_predictor(tmp_path / 'away', backend=backend).predict(files, ood='off')
        assert [q.probabilities[r.classes[-1]] for q in said] == pytest.approx(wanted, abs=1e-4), backend
    shown = json.loads(here('predict', tmp_path / 'away', files[0], '--ood', 'off', '--json').stdout)
    assert str(round(wanted[0], 3))[:4] in json.dumps(shown)


@pytest.mark.parametrize('odd', [dict(weights=[0.]), dict(bias=None), dict(temperature=0), dict(logit='1'), dict(weights=[float('nan')])])
def test_a_bundle_with_an_odd_head_is_refused(phantom_run, tmp_path, odd):
    as_a_place(RunFolder.open(phantom_run), tmp_path / 'place')
    calibrate_for_site(phantom_run, tmp_path / 'place', tmp_path / 'ours', head=True)
    file = tmp_path / 'ours' / 'bundle.json'
    b = json.loads(file.read_text())
    b['site']['head'].update(odd)
    file.write_text(json.dumps(b))
    with pytest.raises(BundleError): load_predictor(tmp_path / 'ours')
