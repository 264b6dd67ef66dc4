"""The check of what a network sees: wrong images are declined and good ones are not, with onnx and torch alike; damage is refused."""
import base64, json, shutil
import numpy as np, pandas as pd, pytest
from covid_cxr.bundle import export_bundle, join_bundles, read_bundle
from covid_cxr.core import BundleError, choices
from covid_cxr.images import load_image
from covid_cxr.ood import (WIDER, FeatureCheck, InputCheck, OODKind, WrongKind, declines, make_ood_images, make_other_machine, make_wrong,
                           measure_place, move_input_check)
from covid_cxr.phantom import make_other_view, make_phantom
from covid_cxr.predict import load_predictor


@pytest.fixture(scope='module')
def predictor(phantom_run): return load_predictor(phantom_run)


@pytest.fixture(scope='module')
def held_out(phantom_run, predictor):
    "Images of patients that were not trained on, as the network sees them"
    t = pd.read_csv(phantom_run / 'predictions.csv').query('split != "train"')
    return [load_image(f, predictor.rule) for f in t['path']]


def _share(predictor, images): return np.mean(predictor.input_check.score(images) > 1)


def test_held_out_images_pass_and_wrong_ones_do_not(predictor, held_out):
    assert isinstance(predictor.input_check, InputCheck) and predictor.feature_check.keep == .98
    assert _share(predictor, held_out) <= .1
    assert _share(predictor, [make_other_machine(a, i) for i, a in enumerate(held_out)]) <= .4
    for kind in choices(WrongKind):
        least = .8 if kind in ('a part', 'no chest') else .9
        assert _share(predictor, [make_wrong(a, kind, i) for i, a in enumerate(held_out)]) >= least, kind


@pytest.mark.parametrize('kind', choices(OODKind))
def test_what_is_no_radiograph_is_declined(predictor, kind):
    answers = [predictor.predict(a) for a in make_ood_images(kind, 4, 64, seed=50)]
    assert all(a.label is None and a.declined.endswith('.') and '\n' not in a.declined for a in answers)


def test_slices_and_side_views_of_phantoms_are_declined(predictor):
    for view in ('ct', 'lateral'): assert _share(predictor, [make_other_view(view, 5, i, size=64) for i in range(12)]) >= .7, view


def test_reasons_name_what_is_wrong(predictor, held_out):
    for kind in ('inverted', 'upside down', 'turned by 90 degrees'):
        said = [predictor.input_check.check(make_wrong(a, kind, i)) or '' for i, a in enumerate(held_out)]
        assert np.mean([kind in s for s in said]) >= .8, (kind, said[:3])


def test_the_network_alone_tells_what_is_wrong(predictor, held_out):
    "Every kind that was shown at the fit has a sentence of its own"
    said = {kind: predictor.feature_check.check(predictor.features([make_wrong(held_out[0], kind)])[0], doubtful=True)
            for kind in ('inverted', 'turned by 90 degrees')}
    assert all(kind in (why or '') for kind, why in said.items()), said


def test_onnx_and_torch_decline_alike(phantom_run, predictor, held_out, tmp_path):
    onnx = load_predictor(export_bundle(phantom_run, tmp_path / 'b'))
    assert (onnx.backend, predictor.backend) == ('onnx', 'torch')
    some = [*held_out[:6], *(make_wrong(a, k, 3) for a, k in zip(held_out, choices(WrongKind)))]
    np.testing.assert_allclose(onnx.features(some), predictor.features(some), atol=1e-4)
    for ood in ('decline', 'warn'):
        for a in some:
            p, q = onnx.predict(a, ood=ood), predictor.predict(a, ood=ood)
            assert (p.label, p.declined, p.warning) == (q.label, q.declined, q.warning)


def test_the_answer_and_the_features_come_from_one_pass(predictor, held_out, monkeypatch):
    runs = []
    hook = predictor.model[0].register_forward_hook(lambda *a: runs.append(1))
    predictor.predict(held_out[0])                                # the layer to look at is found once
    runs.clear()
    predictor.predict(held_out[0])
    hook.remove()
    assert len(runs) == 1


def _changed(run, to, change):
    shutil.copytree(run / 'bundle', to)
    b = json.loads((to / 'bundle.json').read_text())
    change(b)
    (to / 'bundle.json').write_text(json.dumps(b))
    return to


def test_a_bundle_without_features_is_used_as_before(phantom_run, held_out, tmp_path):
    old = load_predictor(_changed(phantom_run, tmp_path / 'old', lambda b: b.pop('feature_check')))
    assert old.feature_check is None and old.input_check is old.ood_check
    for a in (held_out[0], make_wrong(held_out[0], 'inverted')): assert old.predict(a).declined == old.ood_check.check(a)


@pytest.mark.parametrize('change', [
    dict(features=10**12), dict(features=True), dict(directions_kept=-1), dict(mean='A' * 10**6), dict(mean='%%%'), dict(weights=[1, 2]),
    dict(wrong=float('nan')), dict(doubt=1e5), dict(far=0), dict(keep=2), dict(n='x'), dict(version=9), None])
def test_damaged_numbers_are_refused_by_name(phantom_run, tmp_path, change):
    def damage(b): b['feature_check'] = {} if change is None else dict(b['feature_check'], **change)
    with pytest.raises(BundleError, match='check'): load_predictor(_changed(phantom_run, tmp_path / 'b', damage))


def test_numbers_beyond_any_measurement_are_refused(predictor):
    d, f = predictor.feature_check.to_dict(), len(predictor.feature_check.mean)
    for value in (np.nan, np.inf, 1e7):
        bad = base64.b64encode(np.full(f, value, '<f4').tobytes()).decode()
        with pytest.raises(BundleError, match='mean'): FeatureCheck.from_dict(dict(d, mean=bad))
    with pytest.raises(BundleError, match='features'): predictor.feature_check.check(np.zeros(f - 1))
    assert predictor.feature_check.check(np.full(f, np.nan)).endswith('no numbers).')


def test_the_check_is_small(phantom_run):
    assert len(json.dumps(read_bundle(phantom_run)['feature_check'])) < 300_000


def test_an_ensemble_asks_its_first_network(phantom_run, predictor, held_out, tmp_path):
    both = load_predictor(join_bundles([phantom_run, phantom_run], tmp_path / 'b'))
    np.testing.assert_allclose(both.features(held_out[:3]), predictor.features(held_out[:3]), atol=1e-5)


def test_a_check_moves_to_a_place(predictor):
    "A machine with other tones: the moved check declines few of its images, and still those that are upside down"
    images = [load_image_of(i) for i in range(60)]
    place = measure_place(predictor.input_check, images[:40])
    moved = move_input_check(predictor.input_check, place)
    assert moved.pixels.limit >= predictor.ood_check.limit and declines(moved, place).mean() <= .05
    fresh = measure_place(moved, images[40:])
    assert declines(moved, fresh).mean() <= .2
    assert declines(moved, measure_place(moved, [a[::-1] for a in images[40:]])).mean() >= .8


def load_image_of(i):
    shades = make_phantom(11, i, 0, size=64).image / 255
    return (255 * shades**.6).astype(np.uint8)


def test_smaller_doubts_of_both_checks_are_enough(predictor, held_out):
    x, check = predictor.features(held_out[:1]), predictor.feature_check
    odds = check.kinds(x)[0]
    between = np.log(np.exp(odds).sum()) - 1e-6
    d = dict(check.to_dict(), wrong=float(between + 1), doubt=float(between))
    near = FeatureCheck.from_dict(d)
    assert near.check(x[0]) is None and near.check(x[0], doubtful=True) and WIDER > 1
    assert near.score(x)[0] <= 1 < near.score(x, np.array([True]))[0]
