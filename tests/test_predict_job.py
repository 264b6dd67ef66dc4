"""A folder is answered in a process that is killed again and again: nothing is lost, nothing is written twice."""
import json, os, random, shutil, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, pytest
from covid_cxr.bundle import export_bundle, save_bundle
from covid_cxr.core import RunError
from covid_cxr.predict import list_images, load_predictor, predict_to_file

N = 40


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A small bundle that answers without torch, and a folder of phantoms"
    import torch
    from covid_cxr.core import new_table
    from covid_cxr.data import cxr_dls
    from covid_cxr.learner import cxr_learner
    from covid_cxr.phantom import make_phantom
    from PIL import Image
    tmp = tmp_path_factory.mktemp('job')
    (tmp / 'images').mkdir()
    rows = []
    for i in range(8):
        Image.fromarray(make_phantom(seed=1, patient=i, size=256, lesion=.6 * (i % 2)).image).save(tmp / 'images' / f'{i:04}.png')
        rows.append(dict(path=f'{tmp}/images/{i:04}.png', image_id=f'{i}', patient=f'{i}', group=f'{i}', label=('no', 'yes')[i % 2],
                         split='valid' if i > 5 else 'train'))
    for i in range(8, N): shutil.copy(tmp / 'images' / f'{i % 8:04}.png', tmp / 'images' / f'{i:04}.png')
    (tmp / 'images' / f'{N:04}.png').write_bytes(b'no image')
    torch.manual_seed(1)
    learn = cxr_learner(cxr_dls(new_table(rows, 'x'), size=32, bs=2, device='cpu'), 'cnn3', 'none', path=tmp)
    export_bundle(save_bundle(learn, tmp / 'own', synthetic=True, pickle=False), tmp / 'bundle', format='onnx')
    return tmp


def command(place, out):
    line = [sys.executable, '-c', 'import sys; from covid_cxr.cli import main; sys.exit(main())', 'predict', str(place / 'bundle'),
            str(place / 'images'), '--out', str(out), '--on-bad', 'decline', '--bs', '1']
    return subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize('suffix', ['csv', 'jsonl'])
def test_a_killed_job_ends_as_an_undisturbed_one(place, tmp_path, suffix):
    whole, out, part = tmp_path / f'whole.{suffix}', tmp_path / f'out.{suffix}', tmp_path / f'out.{suffix}.part'
    assert command(place, whole).wait() == 3                      # one of them was declined
    draw, kills, seen = random.Random(0), 0, []
    for _ in range(5):
        p = command(place, out)
        while p.poll() is None and (part.stat().st_size if part.is_file() else 0) <= (seen[-1] if seen else 0): time.sleep(.002)
        time.sleep(draw.uniform(0, .03))
        if p.poll() is not None: break
        p.send_signal(signal.SIGKILL)
        p.wait()
        kills += 1
        seen.append(part.stat().st_size if part.is_file() else 0)
    assert kills >= 3 and len(set(seen)) >= 3, seen                # it was killed in different rows
    if p.returncode != 3: assert command(place, out).wait() == 3
    assert out.read_bytes() == whole.read_bytes() and not part.exists() and len(list(tmp_path.iterdir())) == 2
    paths = [json.loads(line)['path'] for line in out.read_text().splitlines()] if suffix == 'jsonl' else None
    if paths: assert paths == list_images(place / 'images')


def test_exit_codes_say_what_happened(place, tmp_path):
    from covid_cxr.cli import main
    bundle, good, bad = (str(place / f) for f in ('bundle', 'images/0001.png', f'images/{N:04}.png'))
    assert main(['predict', bundle, good]) == 0
    assert main(['predict', bundle, good, bad, '--on-bad', 'decline']) == 3
    assert main(['predict', bundle, bad, '--on-bad', 'decline']) == 4
    assert main(['predict', bundle, bad]) == 1


def test_answers_do_not_depend_on_the_batch(place, tmp_path):
    predictor, files = load_predictor(place / 'bundle'), list_images(place / 'images')[:9]
    texts = set()
    for bs in (1, 4, 9):
        predict_to_file(predictor, files, tmp_path / 'a.csv', bs)
        rows = [line.split(',') for line in (tmp_path / 'a.csv').read_text().splitlines()[1:]]
        texts.add(tuple(np.round([float(r[2]) for r in rows], 6)))
    assert len(texts) == 1


def test_a_job_goes_on_with_the_engine_that_began_it(place, tmp_path):
    "The engines round at different places: no file holds the answers of two"
    files, out, seen = list_images(place / 'images')[:6], tmp_path / 'a.csv', []
    def stop_at_third(answer):
        seen.append(answer)
        if len(seen) == 3: raise KeyboardInterrupt
    first, second = (load_predictor(place / 'bundle', backend=b) for b in ('openvino', 'onnx'))
    with pytest.raises(KeyboardInterrupt): predict_to_file(first, files, out, 1, said=stop_at_third)
    with pytest.raises(RunError, match='begun with another model, other files or other options'): predict_to_file(second, files, out, 1)
    assert predict_to_file(first, files, out, 1) == (6, 0, 3)
