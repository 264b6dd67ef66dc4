"""Bundles: every field is bounded, what is hashed is loaded; what is exported, replaced and pickled (changed at random: test_attack)."""
import hashlib, json, os, shutil, subprocess, sys, threading, warnings
from pathlib import Path
import numpy as np, pytest
from covid_cxr.bundle import (DESCRIPTION, LARGEST_IMAGE, MANIFEST, MOST_CLASSES, ONNX, PICKLE, SCHEMA, WEIGHTS, check_description,
                              check_manifest, export_bundle, find_bundle, load_model, read_bundle, write_manifest)
from covid_cxr.cli import main
from covid_cxr.core import BundleError, RunError, write_json
from covid_cxr.predict import load_predictor

@pytest.fixture(scope='module')
def bundle(tmp_path_factory):
    "A bundle of a small network, with an out-of-distribution check, and the Learner that made it"
    from covid_cxr.core import new_table
    from covid_cxr.data import cxr_dls
    from covid_cxr.learner import cxr_learner
    from covid_cxr.bundle import save_bundle
    from covid_cxr.ood import fit_ood_check
    from covid_cxr.phantom import make_phantom
    from PIL import Image
    tmp = tmp_path_factory.mktemp('secret-folder')
    rows = []
    for i in range(8):
        Image.fromarray(make_phantom(seed=1, patient=i, size=32, lesion=.6 * (i % 2)).image).save(tmp / f'{i}.png')
        rows.append(dict(path=f'{tmp}/{i}.png', image_id=f'{i}', patient=f'{i}', group=f'{i}', label=('no', 'yes')[i % 2],
                         split='valid' if i > 5 else 'train'))
    learn = cxr_learner(cxr_dls(new_table(rows, 'x'), size=32, bs=2, device='cpu'), 'cnn3', 'none', path=tmp)
    check = fit_ood_check([make_phantom(seed=2, patient=i, size=32).image for i in range(30)])
    folder = save_bundle(learn, tmp / 'b', threshold=.4, temperature=2., synthetic=True, ood_check=check)
    return folder, learn, rows


@pytest.fixture
def copied(bundle, tmp_path): return Path(shutil.copytree(bundle[0], tmp_path / 'copy'))


def _edit(folder, reseal=False, **changes):
    write_json(folder / DESCRIPTION, dict(json.loads((folder / DESCRIPTION).read_text()), **changes))
    if reseal: write_manifest(folder, [n for n in os.listdir(folder) if n != MANIFEST])


@pytest.mark.parametrize('field, values', [
    ('mean', (float('nan'), 1e9, '0', None, True)), ('std', (0, -1, float('nan'), float('inf'))),
    ('threshold', (-.1, 1.1, float('nan'), None)),
    ('temperature', (0, float('inf'), -1, 1e-9)), ('classes', (['a'], ['a', 'a'], ['a', ''], ['a', 3], ['a', 'b\x1b[31m'], 'ab', {})),
    ('image', ({}, {'size': 2 * LARGEST_IMAGE}, {'size': 64, 'how': 'x'}, {'size': '64'})),
    ('arch', (101 * 'x', '', None, [])), ('encoder', ([], dict(kind='timm'), dict(kind='x', name='y'))),
    ('tta', (-1, 10, True, 1.5)), ('head', ('deep', None)),
    ('weights', ({}, {'sha256': 'x'}, {'sha256': '0' * 64, 'file': '../w'})), ('synthetic', (0, 'no')), ('not_for', ('', 'x' * 2000, None)),
    ('ood_check', ({}, {'version': 1}, []))])
def test_every_field_is_bounded_for_reader_and_writer(bundle, copied, field, values):
    good = json.loads((copied / DESCRIPTION).read_text())
    assert field in {f.name for f in SCHEMA}
    for v in values:
        with pytest.raises(BundleError): check_description(dict(good, **{field: v}))
        (copied / DESCRIPTION).write_text(json.dumps(dict(good, **{field: v})))
        with pytest.raises(BundleError): load_predictor(copied)
    with pytest.raises(BundleError, match=f'{MOST_CLASSES:,} different'):
        check_description(dict(good, classes=[str(i) for i in range(MOST_CLASSES + 1)]))


def test_a_probability_that_is_no_number_is_no_class(bundle, copied):
    import torch
    predictor = load_predictor(copied)
    with torch.no_grad(): predictor.model[1][-1].bias.fill_(float('nan'))
    p = predictor.predict(bundle[2][0]['path'], ood='off')
    assert p.label is None and p.probabilities is None and 'no finite probability' in p.declined


def test_what_is_hashed_is_what_is_loaded(bundle, copied):
    from safetensors.numpy import load_file, save_file
    b, w = read_bundle(copied), copied / WEIGHTS
    save_file({k: -v for k, v in load_file(w).items()}, w)
    with pytest.raises(BundleError, match='replaced'): load_model(b)


def test_weights_of_another_network_or_that_are_no_numbers(bundle, copied):
    from safetensors.numpy import load_file, save_file
    w = copied / WEIGHTS
    state = load_file(w)
    first = next(iter(state))
    for change, word in ((lambda s: s.pop(first), 'is missing'), (lambda s: s.update(more=s[first]), 'none of its own'),
                         (lambda s: s.update({first: s[first].astype('float64')}), 'impossible'),
                         (lambda s: s.update({first: s[first][:1]}), 'of shape'),
                         (lambda s: s.update({first: s[first] * np.float32('nan')}), 'not all finite')):
        new = dict(state)
        change(new)
        save_file(new, w)
        _edit(copied, weights=dict(file=WEIGHTS, sha256=hashlib.sha256(w.read_bytes()).hexdigest()))
        (copied / MANIFEST).unlink(missing_ok=True)
        with pytest.raises(BundleError, match=word): load_predictor(copied)


def test_a_bundle_is_replaced_without_a_moment_of_absence(bundle, tmp_path):
    "One thread writes it again and again, another reads it: always one of the bundles, whole"
    from covid_cxr.bundle import save_bundle
    folder, (_, learn, _) = tmp_path / 'b', bundle
    save_bundle(learn, folder, threshold=.1, pickle=False)
    def write():
        for i in range(12): save_bundle(learn, folder, threshold=(i % 9 + 1) / 10, pickle=False)
    writer = threading.Thread(target=write)
    writer.start()
    seen = 0
    while writer.is_alive() or not seen:
        find_bundle(folder)                     # never absent
        seen += 1
    writer.join()
    assert seen > 3 and [p.name for p in tmp_path.iterdir()] == ['b'] and check_manifest(folder).status == 'verified'


def test_files_have_the_rights_that_the_person_sets(bundle, tmp_path):
    from covid_cxr.bundle import save_bundle
    old = os.umask(0o027)
    try: folder = save_bundle(bundle[1], tmp_path / 'b')
    finally: os.umask(old)
    assert {f.name: f.stat().st_mode & 0o777 for f in folder.iterdir()} == dict.fromkeys((DESCRIPTION, WEIGHTS, MANIFEST, PICKLE), 0o640)
    assert folder.stat().st_mode & 0o777 == 0o750


def test_export_copies_what_the_format_names(bundle, copied, tmp_path, capsys):
    (tmp_path / 'secret').write_text('KEY')
    (copied / 'notes.txt').symlink_to(tmp_path / 'secret')
    (copied / 'planted.pkl').write_bytes(b'pickle')
    assert main(['export', str(copied), '--out', str(tmp_path / 'out')]) == 0
    assert sorted(os.listdir(tmp_path / 'out')) == [DESCRIPTION, MANIFEST, ONNX, WEIGHTS]
    assert check_manifest(tmp_path / 'out').status == 'verified' and 'KEY' not in (tmp_path / 'out' / DESCRIPTION).read_text()
    assert main(['export', str(copied), '--pickle', '--out', str(tmp_path / 'all')]) == 0 and (tmp_path / 'all' / PICKLE).exists()
    assert check_manifest(tmp_path / 'all').status == 'verified' and 'only the bundle declines' in capsys.readouterr().out
    (copied / PICKLE).unlink()
    (copied / PICKLE).symlink_to(tmp_path / 'secret')
    assert main(['export', str(copied), '--pickle', '--out', str(tmp_path / 'no')]) == 1 and not (tmp_path / 'no').exists()
    (copied / MANIFEST).unlink()                # an old bundle: its copy stays unverified, and a link is no pickle
    with pytest.raises(RunError, match='a link'): export_bundle(copied, tmp_path / 'no', pickle=True)
    assert check_manifest(export_bundle(copied, tmp_path / 'old')).status == 'unverified'
    _edit(copied, reseal=True)
    _edit(copied, threshold=.9)
    with pytest.raises(BundleError, match='ALTERED'): export_bundle(copied, tmp_path / 'no')


FRESH = '''
import json, sys
calls = []
sys.addaudithook(lambda event, args: calls.append(event) if event.startswith('socket.connect') or event == 'socket.getaddrinfo' else None)
from covid_cxr.predict import load_predictor
predictor = load_predictor(sys.argv[2], backend=sys.argv[1])
answers = [predictor.predict(f, ood='off').probabilities for f in sys.argv[3:]]
heavy = sorted({'torch', 'fastai', 'pandas', 'sklearn'} & {*sys.modules})
print(json.dumps(dict(answers=answers, backend=predictor.backend, heavy=heavy, calls=calls)))
'''


@pytest.mark.parametrize('asked, backend', [('auto', 'onnx'), ('openvino', 'openvino')])
def test_an_onnx_bundle_answers_in_a_fresh_process_without_torch(bundle, tmp_path, asked, backend):
    "The same numbers as the Learner to 1e-4, nothing heavy imported, and no word to the network"
    from covid_cxr.core import new_table
    from covid_cxr.learner import predict_table
    folder, learn, rows = bundle
    given = export_bundle(folder, tmp_path / 'onnx', format='onnx')
    assert sorted(os.listdir(given)) == [DESCRIPTION, MANIFEST, ONNX] and read_bundle(given)['onnx']['largest_difference'] < 1e-5
    command = [sys.executable, '-c', FRESH, asked, str(given), *(r['path'] for r in rows)]
    said = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert (said['backend'], said['heavy'], said['calls']) == (backend, [], [])
    want = predict_table(learn, new_table(rows, 'x'))[['prob_no', 'prob_yes']].to_numpy()
    answers = np.array([[*p.values()] for p in said['answers']])
    z = np.log(want) / read_bundle(folder)['temperature']
    want = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    assert np.abs(answers - want).max() < 1e-4


def test_openvino_is_refused_in_a_sentence_where_it_cannot_run(bundle, tmp_path, monkeypatch, capsys):
    folder, _, rows = bundle
    given = export_bundle(folder, tmp_path / 'onnx', format='onnx')
    with pytest.raises(BundleError, match='has no ONNX file'): load_predictor(folder, backend='openvino')
    monkeypatch.setitem(sys.modules, 'openvino', None)       # as where the package is missing
    assert main(['predict', str(given), rows[0]['path'], '--backend', 'openvino']) == 1
    said = capsys.readouterr().err
    assert "pip install 'covid_cxr[openvino]'" in said and 'Traceback' not in said and load_predictor(given).backend == 'onnx'


def test_the_pickle_says_what_the_bundle_says(bundle, tmp_path):
    "One answer from both at any threshold and temperature; no folder of this machine in the file"
    from covid_cxr.bundle import export_pickle, save_bundle
    from fastai.learner import load_learner
    folder, learn, rows = bundle
    raw = (folder / PICKLE).read_bytes()
    assert b'secret-folder' not in raw and b'PosixPath' not in raw and os.fsencode(Path(rows[0]['path']).parent.name) not in raw
    p = load_predictor(folder).predict(rows[0]['path'], ood='off').probabilities['yes']
    for threshold in (p - .01, p + .01):
        mine = load_predictor(save_bundle(learn, tmp_path / 'b', threshold, 2., pickle=False)).predict(rows[0]['path'], ood='off')
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            again = load_learner(export_pickle(learn, tmp_path / 'p.pkl', threshold, 2.))
        with again.no_bar(): label, _, probs = again.predict(rows[0]['path'])
        assert label == mine.label and abs(float(probs[1]) - mine.probabilities['yes']) < 1e-5 and again.loss_func.threshold == threshold
    assert type(learn.loss_func).__name__ != 'FrozenDecision'               # the Learner itself is as it was


def test_altered_and_unverified_are_said_on_the_command_line(bundle, copied, capsys):
    def said(folder):
        assert main(['predict', str(folder), bundle[2][0]['path'], '--ood', 'off']) == 0
        return capsys.readouterr().err
    assert 'ALTERED' not in said(copied) and 'UNVERIFIED' not in said(copied)
    _edit(copied, threshold=.9)
    assert said(copied).count(f'ALTERED: {DESCRIPTION} in {copied}') == 1
    (copied / MANIFEST).unlink()
    assert 'note: UNVERIFIED' in said(copied)


def test_names_that_are_formulas_or_commands(bundle, copied, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = '=cmd|calc!A0.png', '+1.png', '-1.png', '@a.png', 'a\x1b[31m.png', os.fsdecode(b'b\xff.png')
    for name in names: shutil.copy(bundle[2][0]['path'], name)
    files = sorted(p for p in os.listdir() if p.endswith('.png'))
    assert main(['predict', str(copied), '--out', 'o.csv', '--ood', 'off', '--', *files]) == 0
    cells = [line.split(',')[0] for line in Path('o.csv').read_text(encoding='utf-8').splitlines()[1:]]
    assert len(cells) == 6 and not any(c.startswith(('=', '+', '-', '@')) for c in cells) and './=cmd|calc!A0.png' in cells
    assert '\x1b' not in capsys.readouterr().out
    assert main(['predict', str(copied), 'gone\x1b[31m.png']) == 1 and '\x1b' not in capsys.readouterr().err


def test_a_large_bundle_is_read_in_small_batches(bundle, tmp_path, monkeypatch):
    import dataclasses
    predictor, seen = load_predictor(bundle[0]), []
    predictor.rule = dataclasses.replace(predictor.rule, size=LARGEST_IMAGE)
    monkeypatch.setattr(predictor, '_answers', lambda paths, pictures, ood: seen.append(len(paths)) or [])
    list(predictor.stream([bundle[2][0]['path']] * 3, bs=8))
    assert seen == [1, 1, 1]
