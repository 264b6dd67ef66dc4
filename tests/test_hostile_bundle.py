"""Bundles made to harm: each is refused with one sentence, in a process whose memory is watched, and nothing of them is run."""
import hashlib, json, os, shutil
from pathlib import Path
import pytest
from conftest import ROOT, python
from covid_cxr.bundle import DESCRIPTION, MANIFEST, ONNX, WEIGHTS, export_bundle, save_bundle

LIMIT = 120_000_000      # bytes that a refusal may cost beside what was imported

OPEN = '''
import json, sys
import onnxruntime, numpy, PIL.Image
from covid_cxr.core import BundleError
from covid_cxr.predict import load_predictor
def held(): return [int(line.split()[1]) * 1024 for line in open('/proc/self/status') if line.startswith('VmHWM')][0]
picture, before, said = numpy.random.default_rng(0).integers(0, 255, (32, 32), dtype='uint8'), held(), {}
for folder in sys.argv[1:]:
    try: said[folder] = 'answered: ' + str(load_predictor(folder, backend='onnx').predict(picture, ood='off'))
    except BundleError as e: said[folder] = str(e)
print(json.dumps(dict(said=said, more=held() - before)))
'''


@pytest.fixture(scope='module')
def good(tmp_path_factory):
    "A small bundle with both files"
    import torch
    from covid_cxr.data import cxr_dls
    from covid_cxr.learner import cxr_learner
    from conftest import small_table
    tmp = tmp_path_factory.mktemp('good')
    torch.manual_seed(1)
    learn = cxr_learner(cxr_dls(small_table(tmp, 8, ('no', 'yes'), 6), size=32, bs=2, device='cpu'), 'cnn3', 'none', path=tmp)
    return export_bundle(save_bundle(learn, tmp / 'own', synthetic=True, pickle=False), tmp / 'bundle')


def described(folder, **changes):
    file = folder / DESCRIPTION
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def with_file(folder, name, data):
    "Another file with a fitting SHA-256"
    (folder / name).write_bytes(data)
    key, old = ('onnx' if name == ONNX else 'weights'), json.loads((folder / DESCRIPTION).read_text())
    described(folder, **{key: dict(old[key], sha256=hashlib.sha256(data).hexdigest())})


def planted_pickle(folder): with_file(folder, ONNX, b'cos\nsystem\n(S"touch /tmp/harm"\ntR.')
def climbing(folder): described(folder, onnx=dict(json.loads((folder / DESCRIPTION).read_text())['onnx'], file='../../secret'))
def wrong_hash(folder): (folder / ONNX).write_bytes((folder / ONNX).read_bytes() + b'\0')


def link(folder):
    shutil.move(folder / ONNX, folder.parent / 'elsewhere')
    (folder / ONNX).symlink_to(folder.parent / 'elsewhere')


def linked_description(folder):
    shutil.move(folder / DESCRIPTION, folder.parent / 'described')
    (folder / DESCRIPTION).symlink_to(folder.parent / 'described')


def giant_file(folder): os.truncate(folder / ONNX, 3 << 30)        # sparse: the disk holds none of it
def giant_weights(folder): os.truncate(folder / WEIGHTS, 3 << 30)
def giant_description(folder): os.truncate(folder / DESCRIPTION, 1 << 30)


def changed_network(change):
    def apply(folder):
        import onnx
        proto = onnx.load_from_string((folder / ONNX).read_bytes())
        change(proto)
        with_file(folder, ONNX, proto.SerializeToString())
    return apply


def giant_shape(proto): proto.graph.initializer[0].dims[0] = 10**12


def growing(proto):
    "The input repeated a million times before the network sees it"
    import numpy as np
    from onnx import helper, numpy_helper
    proto.graph.initializer.append(numpy_helper.from_array(np.array([1_000_000, 1, 1, 1]), 'times'))
    for node in proto.graph.node: node.input[:] = ['large' if name == 'image' else name for name in node.input]
    proto.graph.node.insert(0, helper.make_node('Tile', ['image', 'times'], ['large']))


def folded(proto):
    "tensors of 360 MB made of a few bytes, which a library would compute while it opens the file"
    import numpy as np
    from onnx import helper, numpy_helper
    proto.graph.initializer.append(numpy_helper.from_array(np.array([1, 90, 1000, 1000]), 'shape'))
    for i in range(8):
        proto.graph.node.insert(0, helper.make_node('ReduceMax', [f'root{i}'], [f'most{i}'], keepdims=0))
        proto.graph.node.insert(0, helper.make_node('Sqrt', [f'made{i}'], [f'root{i}']))
        proto.graph.node.insert(0, helper.make_node('ConstantOfShape', ['shape'], [f'made{i}']))
        proto.graph.output.append(helper.make_tensor_value_info(f'most{i}', 1, None))


PLANTS = {planted_pickle: 'no ONNX file', climbing: 'it must be the name', wrong_hash: 'SHA-256 differs', link: 'is a link',
          linked_description: 'is a link', giant_file: 'larger than 2.0 GB', giant_weights: 'larger than 2.0 GB',
          giant_description: 'larger than 4.0 MB', changed_network(giant_shape): 'not of the size', changed_network(folded): 'gives [',
          changed_network(growing): 'needs more than 1.2 GB'}


def test_harm_is_refused_before_anything_is_allocated(good, tmp_path):
    folders = {}
    for i, (plant, words) in enumerate(PLANTS.items()):
        folder = Path(shutil.copytree(good, tmp_path / f'{i}' / 'bundle'))
        (folder / MANIFEST).unlink()
        plant(folder)
        folders[str(folder)] = words
    out = json.loads(python(OPEN, *folders, env=dict(PYTHONPATH=str(ROOT))))
    for folder, words in folders.items(): assert words in out['said'][folder], out['said'][folder]
    assert 0 <= out['more'] < LIMIT, out['more']
    assert not os.path.exists('/tmp/harm')
