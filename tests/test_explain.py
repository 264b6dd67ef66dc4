"""Maps on phantoms on which the right place is known, on every architecture, and next to the twin that has learned nothing."""
import numpy as np, pytest, torch
from conftest import python
from covid_cxr.core import CxrError
from covid_cxr.audit.baselines import fit_small_cnn
from covid_cxr.audit.explain import (grad_cam, lime_explain, network_input, occlusion_map, plot_explanation, pointing_game,
                                     randomise_weights, rank_correlation, share_in_region)
from covid_cxr.audit.regions import dilate_masks
from covid_cxr.model.heatmaps import grad_cam_maps
from covid_cxr.model.network import cxr_model
from covid_cxr.model.onnx import TorchNetwork
from covid_cxr.phantom import phantom_family
from covid_cxr.model.backbones import OWN, TORCHVISION

SIZE = 48


@pytest.fixture(scope='module')
def family():
    "Per phantom: a network; images of ill patients it has not seen, their lungs, the mean training image"
    out = {}
    for name, n in (('P1', 160), ('P2', 100)):
        x, t, _ = phantom_family(name, n, (2, 2), size=SIZE, seed=1)
        a, ta, lungs = phantom_family(name, 48, (1, 1), size=SIZE, seed=2)
        ill = ((ta['label'] == 1) & ((ta['marker'] == 1) if name == 'P2' else True)).to_numpy()
        out[name] = (fit_small_cnn(x, t['label'], epochs=6), a[ill], ta['patient'][ill], lungs[ill], x.mean(0))
    return out


def _letter(x):
    out = np.zeros(x.shape, bool)
    out[:, :14, :12] = True
    return out


def _covered(family, name):
    net, x, patient, lungs, mean = family[name]
    return np.maximum(occlusion_map(net.score, x, .15, .075, fill=mean), 0), patient


def test_p1_points_into_the_lungs(family):
    _, x, _, lungs, _ = family['P1']
    maps, patient = _covered(family, 'P1')
    assert pointing_game(maps, dilate_masks(lungs, .06), patient, 300).value >= .85
    assert share_in_region(maps, lungs, patient, 300).low > 1.1                  # more than the area, for all resampled patients


def test_p2_points_at_the_letter_and_not_at_the_lungs(family):
    net, x, patient, lungs, _ = family['P2']
    maps, _ = _covered(family, 'P2')
    assert pointing_game(maps, _letter(x), patient, 300).value >= .9
    assert share_in_region(maps, _letter(x), patient, 300).low > 4 and share_in_region(maps, lungs, patient, 300).high < .7
    cams = grad_cam(*network_input(net, x))
    assert pointing_game(cams, _letter(x), patient, 300).value >= .9


def test_a_network_that_has_learned_nothing_gives_the_lungs_about_their_area(family):
    net, x, patient, lungs, _ = family['P1']
    tensor, shares = net.tensor(x), []
    for seed in range(6):
        maps = grad_cam(randomise_weights(net.net, seed), tensor, '0.13')
        if maps.any(): shares.append(share_in_region(maps, lungs, patient, 100).value)
    assert len(shares) >= 4 and .7 < np.mean(shares) < 1.35, shares


def test_the_map_of_a_trained_network_is_not_the_map_of_its_twin(family):
    net, x, *_ = family['P2']
    tensor = net.tensor(x)
    maps, twins = grad_cam(net.net, tensor), grad_cam(randomise_weights(net.net, 3), tensor)
    assert np.nanmedian([rank_correlation(a, b) if np.ptp(b) else 0. for a, b in zip(maps, twins)]) < .6
    assert rank_correlation(maps[0], maps[0]) == pytest.approx(1)


SAME_KIND = ('resnet101', 'wide_resnet50_2', 'densenet169', 'efficientnet_b3', 'mobilenet_v3_large', 'resnext50_32x4d')   # as another one

@pytest.mark.parametrize('arch', [a for a in (*TORCHVISION, *OWN, 'efficientnet_lite0', 'vit_tiny_patch16_224') if a not in SAME_KIND])
def test_every_architecture_can_be_explained_and_randomised(arch):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = cxr_model(arch, 2, weights='none').eval(), torch.randn(1, 1, 64, 64)
    twin = randomise_weights(model, 1)
    for m in (model, twin):
        a, b = grad_cam(m, x, cls=0), grad_cam(m, x, cls=1)
        assert a.shape == (1, 64, 64) and np.isfinite(a).all() and 0 <= a.min() and a.max() <= 1
        assert a.any() or b.any(), 'a two-class network speaks for one of its classes somewhere'
        by_hand = TorchNetwork(m, 64)(x.numpy())
        for cls, want in enumerate((a, b)): assert np.abs(grad_cam_maps(by_hand, cls, (64, 64)) - want).max() < 1e-4
    changed = [not torch.equal(u, v) for u, v in zip(model.parameters(), twin.parameters()) if u.ndim > 1]
    assert all(changed)


def test_the_twin_of_a_trained_bundle_answers_something(phantom_run):
    "A deep twin must not fade to an empty map"
    from covid_cxr.predict import load_predictor
    p = load_predictor(phantom_run)
    x, _, lungs = phantom_family('P1', 6, (1, 1), size=p.rule.size, seed=4)
    model, tensor = network_input(p, x)
    assert tensor.shape == (6, 1, p.rule.size, p.rule.size)
    maps = np.stack([grad_cam(model, tensor), grad_cam(randomise_weights(model, 0), tensor)])
    assert np.isfinite(maps).all() and maps[0].any() and maps[1].any()
    with torch.inference_mode():
        logits = model(tensor)
    again = (logits / p.bundle['temperature']).softmax(1)[:, 1].double()
    assert torch.allclose(again, torch.from_numpy(p.probabilities(x)[:, 1]), atol=1e-5)     # scaled as in prediction


def test_nothing_is_drawn_without_the_twin(family):
    _, x, *_ = family['P2']
    maps = np.random.default_rng(0).random((2, SIZE, SIZE))
    with pytest.raises(CxrError, match='randomisation twin'): plot_explanation(x[:2], maps, None)
    with pytest.raises(CxrError, match='the maps themselves'): plot_explanation(x[:2], maps, maps.copy())
    assert len(plot_explanation(x[:2], maps, maps[::-1]).axes) == 6


def test_regions_of_chance_cover_one():
    "Maps that know nothing: the interval of share over area covers 1, and the hits are about the area"
    rng = np.random.default_rng(0)
    maps, masks, groups = rng.random((200, 24, 24)), rng.random((200, 24, 24)) < .3, np.repeat(np.arange(50), 4)
    share, hits = share_in_region(maps, masks, groups, 500), pointing_game(maps, masks, groups, 500)
    assert share.low < 1 < share.high and hits.low < masks.mean() < hits.high
    assert share == share_in_region(-maps, masks, groups, 500)                 # absolute values count


def test_lime_finds_the_letter(family):
    pytest.importorskip('skimage', reason='the extra for LIME is not installed: pip install scikit-image')
    net, x, *_ = family['P2']
    maps = np.stack([lime_explain(net.score, a, n_samples=300).map for a in x[:4]])
    assert share_in_region(np.maximum(maps, 0), _letter(x[:4]), n_boot=100).value > 2
    assert np.array_equal(maps[0], lime_explain(net.score, x[0], n_samples=300).map)      # the same seed, the same answer


def test_lime_is_that_of_the_package(family):
    "The fit is our own: with the same seed, the weights of the package `lime`"
    image = pytest.importorskip('lime.lime_image', reason='a comparison with another package: pip install lime')
    net, x, *_ = family['P2']
    e = lime_explain(net.score, x[0], n_samples=100)
    def columns(rgb): return np.column_stack([1 - (p := net.score(rgb[..., 0].astype(np.uint8))), p])
    theirs = image.LimeImageExplainer(random_state=0).explain_instance(
        np.stack([x[0]] * 3, -1), columns, labels=(1,), top_labels=None, num_features=10_000, num_samples=100,
        segmentation_fn=lambda _: e.segments, random_seed=0, progress_bar=False)
    assert np.allclose([w for _, w in sorted(theirs.local_exp[1])], e.weights, atol=1e-9)


WITHOUT_LIME = """
import sys
sys.modules["skimage"] = None
import numpy as np
from covid_cxr.core import CxrError
from covid_cxr.audit.explain import lime_explain
try: lime_explain(lambda a: np.zeros(len(a)), np.zeros((32, 32), np.uint8))
except CxrError as e: assert "pip install scikit-image" in str(e), e
else: raise SystemExit("no refusal")
"""

def test_lime_without_its_package_says_what_to_install(): python(WITHOUT_LIME)


def test_importing_explain_needs_no_extra_and_no_fastai():
    python('import sys, covid_cxr.audit.explain\nfor m in ("skimage", "fastai"): assert m not in sys.modules, m')
