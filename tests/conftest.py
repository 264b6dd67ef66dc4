"""Shared parts of the tests: the real data (where present), a command line in a process of its own, one finished phantom run."""
import os, subprocess, sys
from pathlib import Path
import pytest
from covid_cxr.core import data_folder

os.environ.setdefault('HF_HUB_OFFLINE', '1')
ROOT = Path(__file__).resolve().parent.parent
DATA = data_folder()
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason='real radiographs not present at ../shared/data (or where CXR_DATA points)')
MAIN = 'from covid_cxr.cli import main; raise SystemExit(main())'
SMALL = ['--set', 'data.phantom_patients=40', '--set', 'training.bs=8', '--set', 'training.num_it=40', '--set', 'evaluation.n_boot=200',
         '--size', '64', '--device', 'cpu']

ATTACK = os.environ.get('HYPOTHESIS_PROFILE') == 'attack'      # `make attack`


def examples(n):
    "Examples of a property test: many times more under `make attack`"
    return 20 * n if ATTACK else n


def cli(*args, **kw):
    "covid-cxr in a fresh process; returns the finished process with its text"
    kw = dict(dict(cwd=ROOT, timeout=300), **kw)
    return subprocess.run([sys.executable, '-c', MAIN, *map(str, args)], capture_output=True, text=True, **kw)


def python(code, *args):
    "A few lines of Python in a fresh process; they must succeed"
    p = subprocess.run([sys.executable, '-c', code, *map(str, args)], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert p.returncode == 0, p.stderr[-2000:]
    return p.stdout


@pytest.fixture(scope='session')
def phantom_run(tmp_path_factory):
    "One finished run of the demo recipe, small: two stages, three epochs in all, with lr_find"
    out = tmp_path_factory.mktemp('run') / 'demo'
    p = cli('demo', '--out', out, *SMALL, '--set', 'training.stages=[{epochs = 1, lr = 0.001}, {epochs = 2}]')
    assert p.returncode == 0, p.stderr[-2000:]
    (out / 'stdout.txt').write_text(p.stdout)
    return out
