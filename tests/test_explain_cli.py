"""`covid-cxr explain`: maps that point at a known place, with and without torch, and what is written of them."""
import csv, hashlib, json
import numpy as np, pytest
from PIL import Image
from conftest import DATA, here, needs_data, python, small_table
from covid_cxr.bundle import ONNX, export_bundle, save_bundle
from covid_cxr.core import BundleError
from covid_cxr.deploy.explain import explain_image
from covid_cxr.model.heatmaps import grad_cam_maps
from covid_cxr.model.onnx import TorchNetwork
from covid_cxr.predict import load_predictor

SQUARE = slice(8, 16), slice(40, 48)          # rows and columns of the bright square of 64 x 64 pixels


def _reads_bright_places(model):
    "Weights by hand: the first channel keeps what is brighter than 230, and the second class is as likely as it is large"
    import torch
    first, *others = (m for m in model[0] if isinstance(m, torch.nn.Conv2d))
    dense, last = (m for m in model[1] if isinstance(m, torch.nn.Linear))
    with torch.no_grad():
        for p in model.parameters(): p.zero_()
        for conv in (first, *others): conv.weight[0, 0, 1, 1] = 1
        first.bias[0] = -(230 / 255 - .449) / .226
        dense.weight[0, :64] = 1
        last.weight[1, 0], last.bias[1] = 5, -2


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A run whose network is known, its ONNX file, an image with the bright square, one without, and a blank one"
    from covid_cxr.data import cxr_dls
    from covid_cxr.learner import cxr_learner
    d = tmp_path_factory.mktemp('explain')
    table = small_table(d, 4, ['clear', 'marked'], 2)
    learn = cxr_learner(cxr_dls(table, size=64, bs=2, device='cpu'), 'cnn3', weights='none')
    _reads_bright_places(learn.model)
    save_bundle(learn, d / 'run', threshold=.5, synthetic=True, pickle=False)
    export_bundle(d / 'run', d / 'model', format='onnx')
    plain = np.minimum(np.array(Image.open(table['path'][0])), 200)
    marked = plain.copy()
    marked[SQUARE] = 255
    (d / 'secret-name').mkdir()
    for name, a in dict(plain=plain, marked=marked, blank=np.full((64, 64), 9, np.uint8)).items():
        Image.fromarray(a).save(d / 'secret-name' / f'{name}.png')
    return d


def image(place, name): return place / 'secret-name' / f'{name}.png'


@pytest.mark.parametrize('method', ['grad_cam', 'occlusion', 'lime'])
@pytest.mark.parametrize('folder', ['model', 'run'])
def test_the_map_points_at_the_place(place, folder, method):
    if method == 'lime': pytest.importorskip('skimage', reason='the extra for LIME is not installed: pip install scikit-image')
    e = explain_image(load_predictor(place / folder), image(place, 'marked'), method=method)
    assert (e.prediction.label, e.cls, e.map.dtype, e.overlay().shape) == ('marked', 'marked', np.float32, (64, 64, 3))
    inside, outside = e.map[SQUARE].mean(), e.map.copy()
    outside[:28, 28:60] = 0                              # a patch of occlusion and a superpixel are wider than the square
    assert inside > .4 * e.map.max() and abs(outside).mean() < .1 * inside
    against = explain_image(load_predictor(place / folder), image(place, 'marked'), 'clear', method)
    assert not against.map.any() if method == 'grad_cam' else against.map.min() == pytest.approx(-e.map.max(), rel=1e-3)


def test_what_the_command_writes(place, tmp_path):
    p = here('explain', place / 'model', image(place, 'marked'), image(place, 'plain'), image(place, 'blank'), '--out', tmp_path / 'out')
    assert p.returncode == 3 and p.stdout.count('declined: ') == 1 and 'rank correlation' in p.stdout, p.stderr
    assert 'SYNTHETIC' in p.stderr and 'Not a medical device' in p.stderr
    names = {f.name for f in (tmp_path / 'out').iterdir()}
    assert {'index.html', 'explanations.csv', 'explanations.json', '0001-marked-grad_cam.png', '0001-marked-grad_cam-twin.png'} <= names
    maps = [np.array(Image.open(tmp_path / 'out' / f'0001-marked-grad_cam{t}.png')) for t in ('', '-twin')]
    assert maps[0].shape == (64, 64, 3) and not np.array_equal(*maps)
    rows = list(csv.DictReader(open(tmp_path / 'out' / 'explanations.csv')))
    assert [r['file'] for r in rows] == ['marked.png', 'plain.png', 'blank.png']
    assert rows[0]['explained'] == 'marked' and float(rows[0]['probability']) > .5 > float(rows[1]['probability'])
    assert rows[2]['declined'].startswith('not a chest radiograph') and rows[2]['map'] == '' == rows[2]['twin_correlation']
    found = json.loads((tmp_path / 'out' / 'explanations.json').read_text())
    assert found['method'] == 'grad_cam' and found['images'][2]['probability'] is None and found['synthetic']
    page = (tmp_path / 'out' / 'index.html').read_text()
    assert "default-src 'none'; img-src data:" in page and page.count('src="data:image/jpeg;base64,') == 6 and '<script' not in page
    for f in ('index.html', 'explanations.csv', 'explanations.json'): assert 'secret-name' not in (tmp_path / 'out' / f).read_text()


def test_exit_codes_and_refusals(place, tmp_path):
    def said(*args): return here('explain', place / 'model', *args, '--out', tmp_path / 'out')
    assert said(image(place, 'marked')).returncode == 0
    assert said(image(place, 'blank')).returncode == 4
    wrong = said(image(place, 'marked'), '--class', 'markd')
    assert wrong.returncode == 1 and "did you mean 'marked'" in wrong.stderr
    (tmp_path / 'bad.png').write_bytes(b'no picture')
    assert said(tmp_path / 'bad.png').returncode == 1
    assert said(tmp_path / 'bad.png', image(place, 'marked'), '--on-bad', 'decline').returncode == 3
    (tmp_path / 'file').write_text('')
    refused = here('explain', place / 'model', image(place, 'marked'), '--out', tmp_path / 'file')
    assert refused.returncode == 1 and 'choose another folder' in refused.stderr


LIGHT = """
import sys
for name in ('torch', 'fastai', 'pandas', 'matplotlib', 'sklearn', 'skimage', 'scipy', 'onnx'): sys.modules[name] = None
from covid_cxr.cli import main
raise SystemExit(main(['explain', sys.argv[1], sys.argv[2], '--out', sys.argv[3], '--method', 'grad_cam']) or
                 main(['explain', sys.argv[1], sys.argv[2], '--out', sys.argv[3], '--method', 'occlusion']))
"""

def test_without_torch_and_what_comes_with_it(place, tmp_path):
    said = python(LIGHT, place / 'model', image(place, 'marked'), tmp_path / 'light')
    assert said.count('marked.png: marked') == 2
    assert (tmp_path / 'light' / '0001-marked-occlusion.png').is_file()


def test_a_missing_package_is_one_sentence(place, tmp_path, monkeypatch):
    import sys
    for name in [n for n in sys.modules if n.split('.')[0] == 'skimage']: monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, 'skimage', None)
    p = here('explain', place / 'model', image(place, 'marked'), '--out', tmp_path / 'out', '--method', 'lime')
    assert p.returncode == 1 and 'pip install scikit-image' in p.stderr and 'Traceback' not in p.stderr


def _made_early(folder):
    "An ONNX file as it was written before it had gradients"
    import onnx
    proto = onnx.load(folder / ONNX)
    kept = [o for o in proto.graph.output if o.name != 'gradients']
    del proto.graph.output[:]
    proto.graph.output.extend(kept)
    onnx.save(proto, folder / ONNX)
    described = json.loads((folder / 'bundle.json').read_text())
    described['onnx']['sha256'] = hashlib.sha256((folder / ONNX).read_bytes()).hexdigest()
    (folder / 'bundle.json').write_text(json.dumps(described))
    (folder / 'manifest.json').unlink()
    return load_predictor(folder, backend='onnx')


def test_an_early_onnx_file_needs_torch_for_grad_cam(place, tmp_path):
    want = explain_image(load_predictor(place / 'model'), image(place, 'marked'))
    both = _made_early(export_bundle(place / 'run', tmp_path / 'both'))
    assert np.allclose(explain_image(both, image(place, 'marked')).map, want.map, atol=1e-4)
    assert here('explain', tmp_path / 'both', image(place, 'marked'), '--out', tmp_path / 'out').returncode == 0
    alone = _made_early(export_bundle(place / 'run', tmp_path / 'alone', format='onnx'))
    with pytest.raises(BundleError, match='holds model.onnx alone'): explain_image(alone, image(place, 'marked'))
    maps = [explain_image(p, image(place, 'marked'), method='occlusion').map for p in (alone, load_predictor(place / 'run'))]
    assert np.allclose(*maps, atol=1e-4)


def _untrained(seed, k, several=False):
    "A small network with a batch norm that has been somewhere"
    import torch
    from covid_cxr.model.network import cxr_model
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        net = cxr_model('test_resnet', k, weights='none', size=64)
        for t in net.parameters(): t.add_(.05 * torch.randn_like(t))
        for t in net.buffers():
            if t.is_floating_point(): t.add_(torch.rand_like(t))
        x = torch.randn(2, 1, 64, 64)
    return net.eval(), x


@pytest.mark.parametrize('several', [False, True])
def test_ensembles_as_by_autograd(several):
    import torch
    from covid_cxr.audit.explain import grad_cam
    from covid_cxr.model.network import MeanOfNetworks
    (a, x), (b, _) = _untrained(1, 3), _untrained(2, 3)
    model, heat = MeanOfNetworks([a, b], [1., 1.7], several).eval(), [1., 1.7]
    seen = []
    for cls in range(3):
        def one(m): return torch.nn.Sequential(m[0], torch.nn.Sequential(m[1], Column(cls)))
        want = grad_cam(one(model), x, cls=1) if several else grad_cam(model, x, cls=cls)
        got = grad_cam_maps(TorchNetwork(model, 64)(x.numpy()), cls, (64, 64), heat, several)
        assert np.abs(got - want).max() < 1e-4
        seen.append(want.any())
    assert any(seen)


def Column(cls):
    "One finding alone: its logit is its log-odds"
    import torch
    class Take(torch.nn.Module):
        def forward(self, logits): return logits[:, cls:cls + 1]
    return Take()


def test_the_share_inside_the_lungs(place, tmp_path, monkeypatch):
    pytest.importorskip('torch')
    from covid_cxr.model import lungs
    mask = np.zeros((64, 64), bool)
    mask[16:56, 8:26] = mask[16:56, 36:54] = True
    monkeypatch.setattr(lungs, 'load_lung_net', lambda where: where)
    monkeypatch.setattr(lungs, 'find_lungs', lambda net, x: mask[None])
    p = here('explain', place / 'model', image(place, 'marked'), '--out', tmp_path / 'out', '--lungs', 'net')
    row, = csv.DictReader(open(tmp_path / 'out' / 'explanations.csv'))
    assert float(row['lungs_area']) == pytest.approx(mask.mean(), abs=1e-6) and 0 <= float(row['share_in_lungs']) < .3
    assert 'of the map inside the lungs' in p.stdout


@needs_data
def test_real_radiographs(place, tmp_path):
    folder = DATA / 'covid-chestxray-dataset' / 'images'
    if not folder.is_dir(): pytest.skip(f'{folder} is not there')
    files = [next(iter(sorted(folder.glob(f'*.{ending}')))) for ending in ('jpg', 'png')]
    p = here('explain', place / 'model', *files, '--ood', 'off', '--out', tmp_path / 'out')
    assert p.returncode == 0 and len(list((tmp_path / 'out').glob('*.png'))) == 4, p.stderr
