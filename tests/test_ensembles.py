"""Ensembles: several seeds in one run, several finished runs as one; the mean, the fresh process, the kill, the threshold, the trackers."""
import importlib.util, json, os, sys
from unittest import mock
import numpy as np, pandas as pd, pytest, torch
from conftest import here, python, tiny_recipe
from covid_cxr.bundle import load_model, read_bundle
from covid_cxr.core import BundleError, RecipeError, RunError
from covid_cxr.evaluate import choose_threshold
from covid_cxr.images import load_image
from covid_cxr.phantom import write_kaggle_tree
from covid_cxr.predict import load_predictor
from covid_cxr.recipe import load_recipe, override, recipe_hash
from covid_cxr.runs.ensemble import ensemble_runs, read_members
from covid_cxr.runs.folder import RunFolder
from covid_cxr.runs.outcome import calibrate, conclude
from covid_cxr.runs.test_log import read_test_log
from covid_cxr.runs.tracking import TrackingError, make_tracker
from covid_cxr.runs.train import train
from covid_cxr.stats.calibration import apply_temperature

PROBS = ['prob_normal', 'prob_pneumonia']
KAGGLE = 'name = "kaggle_pneumonia"'
INSTALLED = [name for name in ('tensorboard', 'mlflow') if importlib.util.find_spec(name)]
needs_trackers = pytest.mark.skipif(len(INSTALLED) < 2, reason="needs tensorboard and mlflow (pip install 'covid_cxr[tracking]')")


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A folder with phantoms, and MLflow pointed to a folder beside them"
    d = tmp_path_factory.mktemp('ensembles')
    write_kaggle_tree(d / 'data' / 'chest-xray-pneumonia', 40, 40, seed=3, size=64)
    here_only = {'MLFLOW_TRACKING_URI': (d / 'mlruns').as_uri(), 'MLFLOW_ALLOW_FILE_STORE': 'true', 'MLFLOW_DISABLE_TELEMETRY': 'true'}
    with mock.patch.dict(os.environ, here_only): yield d


def run(place, name, settings=None, log=len, **more):
    recipe = tiny_recipe(KAGGLE, {'split.valid_pct': .3, 'training.stages': '[{epochs = 2, lr = 0.003}]', **(settings or {})})
    return train(recipe, data=place / 'data', out=place / name, device='cpu', cache_dir=place / 'cache', figures=False, log=log, **more)


@pytest.fixture(scope='module')
def seeds(place): return run(place, 'seeds', {'training.seeds': 3, 'evaluation.tta': 2}, track=INSTALLED)


@pytest.fixture(scope='module')
def folds(place): return [run(place, f'fold-{i}', {'split.kind': 'fold', 'split.n_folds': 3, 'split.fold': i}) for i in range(3)]


@pytest.fixture(scope='module')
def folds_joined(place, folds):
    p = here('ensemble', *folds, '--out', place / 'of-folds')
    assert p.returncode == 0, p.stderr
    return place / 'of-folds'


def answers(out, files):
    "(n, 2) probabilities of every network of a bundle by itself, at its own temperature, over the views of the bundle"
    from covid_cxr.model.network import MeanOfViews
    p = load_predictor(out)
    x = torch.from_numpy(np.stack([load_image(f, p.rule) for f in files]))[:, None].float() / 255
    x, tta = (x - p.bundle['mean']) / p.bundle['std'], p.bundle.get('tta', 0)
    temperatures = [m['temperature'] for m in RunFolder.open(out).state['members']]
    with torch.no_grad():
        for net, t in zip(p.model.members, temperatures, strict=True):
            yield ((MeanOfViews(net, tta) if tta else net).eval()(x) / t).softmax(1).double().numpy()


def weights(out): return read_bundle(out)['weights']['sha256']


def test_the_probability_is_the_mean_of_the_networks(seeds):
    run_, b = RunFolder.open(seeds), read_bundle(seeds)
    rows = run_.predictions
    own = list(answers(seeds, rows['path']))
    assert len(own) == b['members'] == 3 and len({round(float(p[0, 1]), 6) for p in own}) == 3
    mean = apply_temperature(sum(own) / 3, b['temperature'])
    assert np.allclose(mean, rows[PROBS], atol=1e-5)
    assert {'valid', 'test'} <= set(rows['split'])


def test_a_fresh_process_predicts_the_same_and_so_does_the_pickle(seeds):
    from fastai.learner import load_learner
    rows, learn = RunFolder.open(seeds).evaluated.head(4), load_learner(seeds / 'export.pkl')
    code = ('import sys, json\nfrom covid_cxr.predict import load_predictor\nout, *files = sys.argv[1:]\n'
            'ps = load_predictor(out).predict(files, ood="off")\nprint(json.dumps([[p.probabilities["pneumonia"], p.label] for p in ps]))')
    found = json.loads(python(code, seeds, *rows['path']).splitlines()[-1])
    for (p, label), r in zip(found, rows.itertuples(), strict=True):
        assert abs(p - r.prob_pneumonia) < 1e-5 and label == r.predicted
        label, _, probs = learn.predict(r.path)
        assert abs(float(probs[1]) - r.prob_pneumonia) < 1e-5 and label == r.predicted


def test_a_killed_ensemble_goes_on_and_ends_the_same(place, seeds):
    said = []
    def log(line):
        said.append(line)
        if sum('epoch 1:' in s for s in said) == 2: raise KeyboardInterrupt     # the second network, after its first epoch
    settings = {'training.seeds': 3, 'evaluation.tta': 2}
    with pytest.raises(KeyboardInterrupt): run(place, 'killed', settings, log)
    said = []
    out = run(place, 'killed', settings, said.append)
    assert [s for s in said if 'resuming' in s] == ['resuming after epoch 2', 'resuming after epoch 1']
    assert sum('epoch 2:' in s for s in said) == 2 and weights(out) == weights(seeds)
    assert [(e.n, e.what) for e in read_test_log(out)] == [(1, 'train')]


def test_the_first_network_is_that_of_a_run_with_one_seed(place, seeds):
    one, three = (load_model(read_bundle(f)) for f in (run(place, 'one'), seeds))
    for k, v in one.state_dict().items():
        assert torch.equal(v, three.members[0].state_dict()[k]), k
    history = RunFolder.open(seeds).history
    assert history['network'].tolist() == [1, 1, 2, 2, 3, 3] and history['epoch'].tolist() == [1, 2, 3, 4, 5, 6]
    assert 'best_epoch' not in RunFolder.open(seeds).state and 'best_epoch' in RunFolder.open(place / 'one').state
    assert 'members' not in read_bundle(place / 'one')


def test_threshold_and_temperatures_come_from_validation_alone(seeds):
    run_, b = RunFolder.open(seeds), read_bundle(seeds)
    valid = run_.predictions[run_.predictions['split'] == 'valid']
    point = choose_threshold(valid['label'].to_numpy(), valid['prob_pneumonia'].to_numpy(), classes=run_.classes)
    assert b['threshold'] == point.threshold
    raw = run_.predictions.copy()
    raw[PROBS] = sum(answers(seeds, raw['path'])) / 3
    assert calibrate(run_.recipe, run_.table, raw).temperature == pytest.approx(b['temperature'], rel=1e-3)
    spoiled, test = raw.copy(), (raw['split'] != 'valid').to_numpy()
    spoiled.loc[test, PROBS] = raw.loc[test, PROBS[::-1]].to_numpy()                # all other images the other way round
    one, two = (conclude(run_.recipe, run_.table, p) for p in (raw, spoiled))
    assert one.decision()[:2] == two.decision()[:2] and one.result['auc'].value != two.result['auc'].value


def test_heat_maps_and_features_see_all_networks(seeds):
    from covid_cxr.audit.explain import grad_cam, network_input
    from covid_cxr.audit.run import last_features
    p = load_predictor(seeds)
    images = np.stack([load_image(f, p.rule) for f in RunFolder.open(seeds).evaluated['path'].head(3)])
    maps = [grad_cam(*network_input(p, images), cls=c) for c in (0, 1)]
    assert maps[0].shape == images.shape and max(m.max() for m in maps) == 1
    assert last_features(p, images).shape == (3, 3 * 128)
    assert p.ood_check is not None


def test_the_report_says_that_several_networks_answer(folds_joined):
    assert 'The mean probability of 3 networks (fold-0, fold-1 and fold-2)' in (folds_joined / 'report.html').read_text()
    card = (folds_joined / 'model-card.md').read_text()
    assert 'The mean of 3 networks (cnn3)' in card and 'each predicted by a network that was not trained on its patient' in card


def test_recipes_without_seeds_hash_as_before():
    recipe = load_recipe('covid-2020')
    one, two = (recipe_hash(override(recipe, {'training.seeds': n})) for n in (1, 2))
    assert one == recipe_hash(recipe) != two
    for bad in (0, 21):
        with pytest.raises(RecipeError, match='from 1 to 20'): override(recipe, {'training.seeds': bad})


def test_folds_speak_only_for_images_that_they_do_not_know(folds, folds_joined):
    joined, parts = RunFolder.open(folds_joined), [RunFolder.open(f) for f in folds]
    assert joined.split == 'valid' and set(joined.predictions['split']) == {'valid'} and read_test_log(folds_joined) == []
    by_hand = pd.concat([p.evaluated_predictions for p in parts]).set_index('image_id').loc[joined.predictions['image_id'], PROBS]
    t = read_bundle(folds_joined)['temperature']
    assert np.allclose(apply_temperature(by_hand.to_numpy(), t), joined.predictions[PROBS], atol=1e-6)
    assert 'no test of the mean' in (folds_joined / 'summary.txt').read_text()
    outside = joined.predictions['path'].head(4)                             # the mean of the three, as the bundle answers
    own = sum(answers(folds_joined, outside)) / 3
    found = [a.probabilities['pneumonia'] for a in load_predictor(folds_joined).predict(list(outside), ood='off')]
    assert np.allclose(apply_temperature(own, t)[:, 1], found, atol=1e-5)
    refused = here('audit', folds_joined, '--quick')
    assert refused.returncode == 1 and 'is an ensemble of folds' in refused.stderr


def test_runs_with_one_test_split_are_tested_together(place):
    pair = [run(place, f'official-{s}', {'split.kind': 'official', 'seed': s}) for s in (1, 2)]
    members = read_members(pair)
    assert members.design == 'one test split' and set(members.split) == {'train', 'valid', 'test'}
    assert not (members.answering & (members.splits == 'train'))[members.split != 'train'].to_numpy().any()
    def stop(line):
        if 'this test split was evaluated' in line: raise KeyboardInterrupt      # killed between bundle and end
    with pytest.raises(KeyboardInterrupt): ensemble_runs(pair, place / 'of-two', figures=False, log=stop)
    assert RunFolder.open(place / 'of-two', finished=False).state['status'] == 'training'
    joined = RunFolder.open(ensemble_runs(pair, place / 'of-two', figures=False, log=len))
    mean = sum(RunFolder.open(r).predictions.set_index('image_id')[PROBS] for r in pair) / 2
    test = joined.evaluated
    t = read_bundle(joined.path)['temperature']
    assert joined.split == 'test' and np.allclose(apply_temperature(mean.loc[test['image_id']].to_numpy(), t), test[PROBS], atol=1e-6)
    answer = load_predictor(joined.path).predict(list(test['path'].head(4)), ood='off')
    assert np.allclose([a.probabilities['pneumonia'] for a in answer], test['prob_pneumonia'].head(4), atol=1e-5)
    entries = read_test_log(joined.path)
    assert len(entries) == 1 and entries[0].note == 'its networks were evaluated 2 times on this split before'


def test_what_cannot_answer_together_is_one_sentence(place, folds):
    other = run(place, 'other', {'split.kind': 'group', 'seed': 9})
    with pytest.raises(RunError, match='that one of its networks knows'): ensemble_runs([folds[0], other], place / 'no')
    large = run(place, 'large', {'split.kind': 'fold', 'split.n_folds': 3, 'split.fold': 1, 'image.size': 40})
    with pytest.raises(BundleError, match='has another image rule'): ensemble_runs([folds[0], large], place / 'no')
    with pytest.raises(RunError, match='two different runs or more'): ensemble_runs(folds[:1], place / 'no')
    assert not (place / 'no').exists()


@needs_trackers
def test_trackers_get_numbers_of_every_epoch_and_the_result(place, seeds):
    import mlflow
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(seeds / 'tensorboard')).Reload()
    tags, auc = events.Tags(), RunFolder.open(seeds).result['auc'].value
    assert tags['images'] == [] and tags['audio'] == []
    for k in (1, 2, 3): assert [e.step for e in events.Scalars(f'network_{k}/valid_loss')] == [1, 2]
    assert events.Scalars('final/auc')[0].value == pytest.approx(auc, abs=1e-6)
    client = mlflow.MlflowClient()
    kept = client.get_run((seeds / 'checkpoints' / 'mlflow_run.txt').read_text())
    assert kept.info.status == 'FINISHED' and kept.data.params['training.seeds'] == '3' and kept.data.params['model.arch'] == 'cnn3'
    assert kept.data.metrics['final/auc'] == pytest.approx(auc) and not client.list_artifacts(kept.info.run_id)
    history = RunFolder.open(seeds).history
    losses = [m.value for m in client.get_metric_history(kept.info.run_id, 'network_2/train_loss')]
    assert losses == pytest.approx(history.loc[history['network'] == 2, 'train_loss'].tolist(), rel=1e-5)


@needs_trackers
def test_a_resumed_training_goes_on_in_the_same_mlflow_run(place):
    import mlflow
    def stop(line):
        if 'epoch 1:' in line: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): run(place, 'followed', log=stop, track='mlflow')
    begun = (place / 'followed' / 'checkpoints' / 'mlflow_run.txt').read_text()
    out = run(place, 'followed', track='mlflow')
    assert (out / 'checkpoints' / 'mlflow_run.txt').read_text() == begun
    assert [m.step for m in mlflow.MlflowClient().get_metric_history(begun, 'valid_loss')] == [1, 2]


@pytest.mark.parametrize('name', ['tensorboard', 'mlflow'])
def test_without_its_package_a_tracker_is_one_sentence(name, tmp_path):
    gone = {m: None for m in [*sys.modules, 'torch.utils.tensorboard', name] if m.split('.')[0] == name or m == 'torch.utils.tensorboard'}
    with mock.patch.dict(sys.modules, gone), pytest.raises(TrackingError, match=r"pip install 'covid_cxr\[tracking\]'"):
        make_tracker(name, tmp_path)
    p = here('train', 'demo', '--weights', 'none', '--track', 'wandb', '--out', tmp_path / 'run')
    assert p.returncode == 1 and "track='wandb' is not known" in p.stderr and not list(tmp_path.iterdir())
