"""The page 'Your own images, three commands', for real: 60 images of children without finding and 60 with pneumonia, drawn from the
training part of the Kaggle paediatric set, go into two folders; train, report and predict are typed in a terminal, and everything that
they print is kept (the folder above them as '...'). New images: one of each class that was not trained on, and a lateral view of
another collection.

    python benchmarks/three_commands.py          about three minutes on two cores

Needs the real radiographs (CXR_DATA). The result replaces benchmarks/results/three_commands.json.
"""
import argparse, os, re, shlex, shutil, subprocess, sys, tempfile
from pathlib import Path
from record import RESULTS, about, machine, write_result
import numpy as np
from covid_cxr.core import data_folder
from covid_cxr.sources import read_source
from covid_cxr.table import filter_views

PATTERN = '(IM-[0-9]+|person[0-9]+_[a-z]+)'
COMMANDS = (f"covid-cxr train --images my-images --patient-pattern '{PATTERN}' --positive pneumonia --out runs/mine",
            'covid-cxr report runs/mine --no-thumbnails', 'covid-cxr predict runs/mine new')
RUN = 'from covid_cxr.cli import main; raise SystemExit(main())'


def lay_out(folder, data, n, seed):
    "The two folders, and three new images: what each of them shows"
    rng, new, known = np.random.default_rng(seed), folder / 'new', {}
    new.mkdir(parents=True)
    for theirs, ours in (('NORMAL', 'healthy'), ('PNEUMONIA', 'pneumonia')):
        (folder / 'my-images' / ours).mkdir(parents=True)
        files = sorted(next(data.glob('chest-xray-pneumonia/**/train')).joinpath(theirs).glob('*.jpeg'))
        drawn = [files[i] for i in rng.permutation(len(files))]
        for f in drawn[:n]: shutil.copy(f, folder / 'my-images' / ours / f.name)
        mine = {re.search(PATTERN, f.name)[1] for f in drawn[:n]}
        other = next(f for f in drawn[n:] if re.search(PATTERN, f.name)[1] not in mine)
        shutil.copy(other, new / f'child-{len(known) + 1}.jpeg')
        known[f'child-{len(known) + 1}.jpeg'] = ours
    lateral = filter_views(read_source('covid_chestxray', data / 'covid-chestxray-dataset'), ['L'])
    files = sorted(lateral.loc[lateral['excluded'].isna(), 'path'])
    picked = Path(files[rng.integers(len(files))])
    shutil.copy(picked, new / f'other{picked.suffix}')
    return known | {f'other{picked.suffix}': 'a lateral view'}


def typed(command, folder):
    "The exit status and the lines of one command"
    _, *words = shlex.split(command)
    p = subprocess.run([sys.executable, '-W', 'ignore', '-c', RUN, *words], cwd=folder, capture_output=True, text=True,
                       env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)})
    print(f'$ {command}\n{p.stdout}{p.stderr}', flush=True)
    return dict(command=command, code=p.returncode, printed=p.stdout.replace(str(folder), '...').splitlines())


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--images', type=int, default=60, help='of each class')
    p.add_argument('--seed', type=int, default=42)
    p.add_argument('--out', default=RESULTS / 'three_commands.json')
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        new = lay_out(Path(tmp), data_folder(), a.images, a.seed)
        commands = [typed(c, Path(tmp)) for c in COMMANDS]
    if any(c['code'] for c in commands): raise SystemExit('a command failed; nothing was written')
    write_result(a.out, dict(about(), machine=machine(), images=a.images, new=new, commands=commands))


if __name__ == '__main__': main()
