"""A prediction job that is killed again and again ends as an undisturbed one, byte for byte.

    python benchmarks/kill_job.py

2,000 small phantoms are answered by a small network, once undisturbed and once with SIGKILL at 30 random moments, each time begun again
with the same command; as CSV and as JSON lines. The result replaces benchmarks/results/kill_job.json.
"""
import argparse, hashlib, os, random, signal, subprocess, sys, tempfile, time
from pathlib import Path
from record import RESULTS, ROOT, about, machine, write_result

OUT = RESULTS / 'kill_job.json'
FILES, KILLS = 2_000, 30
MAIN = 'import sys; from covid_cxr.cli import main; sys.exit(main())'


def make_place(folder, n):
    "A small bundle that answers without torch, and n small images, of which every 97th is damaged"
    import torch
    from PIL import Image
    from covid_cxr.bundle import export_bundle, save_bundle
    from covid_cxr.core import new_table
    from covid_cxr.data import cxr_dls
    from covid_cxr.learner import cxr_learner
    from covid_cxr.phantom import make_phantom
    images = folder / 'images'
    images.mkdir()
    pictures = [Image.fromarray(make_phantom(seed=1, patient=i, size=96, lesion=.6 * (i % 2)).image) for i in range(40)]
    for i in range(n): pictures[i % 40].save(images / f'{i:05}.png')
    for i in range(50, n, 97): (images / f'{i:05}.png').write_bytes(b'no image')
    rows = [dict(path=f'{images}/{i:05}.png', image_id=f'{i}', patient=f'{i}', group=f'{i}', label=('no', 'yes')[i % 2],
                 split='valid' if i > 5 else 'train') for i in range(8)]
    torch.manual_seed(1)
    learn = cxr_learner(cxr_dls(new_table(rows, 'phantom'), size=32, bs=2, device='cpu'), 'cnn3', 'none', path=folder)
    export_bundle(save_bundle(learn, folder / 'own', synthetic=True, pickle=False), folder / 'bundle', format='onnx')


def begin(place, out):
    "The job in a process of its own"
    words = [sys.executable, '-c', MAIN, 'predict', place / 'bundle', place / 'images', '--out', out, '--on-bad', 'decline']
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    return subprocess.Popen([*map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env, cwd=ROOT)


def finish(place, out):
    "The job to its end: exit code 3, as some were declined"
    p = begin(place, out)
    said = p.communicate()[1]
    assert p.returncode == 3, said[-2000:]


def size(file): return file.stat().st_size if file.is_file() else 0


def kill_at(place, out, target, draw):
    "Begin the job, kill it a moment after its file has so many bytes; the bytes that stood there then, None: it ended before"
    part, p = out.with_name(f'{out.name}.part'), begin(place, out)
    while p.poll() is None and size(part) < target: time.sleep(.001)
    time.sleep(draw.uniform(0, .01))
    if p.poll() is not None: return None
    p.send_signal(signal.SIGKILL)
    p.communicate()
    return size(part)


def attack(place, suffix, kills, seed):
    "One undisturbed job, one that is killed: how often, after how many bytes, and are both the same?"
    whole, out, draw = place / f'whole.{suffix}', place / f'killed.{suffix}', random.Random(seed)
    finish(place, whole)
    targets = sorted(draw.randrange(0, int(.98 * size(whole))) for _ in range(kills))
    killed = [n for n in (kill_at(place, out, t, draw) for t in targets) if n is not None]
    if not out.exists(): finish(place, out)
    digests = [hashlib.sha256(f.read_bytes()).hexdigest() for f in (whole, out)]
    left = [f.name for f in place.glob(f'killed.{suffix}.*')]
    return dict(format=suffix, kills=len(killed), killed_at_bytes=killed, bytes=size(whole), lines=whole.read_bytes().count(b'\n'),
                sha256=digests[0], equal=digests[0] == digests[1], left_over=left)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--files', type=int, default=FILES)
    p.add_argument('--kills', type=int, default=KILLS)
    p.add_argument('--seed', type=int, default=7)
    p.add_argument('--out', default=str(OUT))
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as work:
        place = Path(work)
        make_place(place, a.files)
        rows = [attack(place, suffix, a.kills, a.seed) for suffix in ('csv', 'jsonl')]
    for r in rows: print({k: v for k, v in r.items() if k != 'killed_at_bytes'})
    assert all(r['equal'] and not r['left_over'] and r['kills'] == a.kills for r in rows), rows
    write_result(a.out, dict(about(), machine=machine(), files=a.files, seed=a.seed, rows=rows))
