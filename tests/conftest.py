"""Shared parts of the tests: the real data (where present), the command line, a recipe that trains in seconds, one finished run."""
import contextlib, fcntl, io, multiprocessing, os, subprocess, sys
from pathlib import Path
import pytest
from covid_cxr.core import data_folder

os.environ.setdefault('HF_HUB_OFFLINE', '1')
for name in ('no_proxy', 'NO_PROXY'):                          # servers on loopback are reached directly, whatever proxy is set
    os.environ[name] = ','.join(filter(None, [os.environ.get(name), '127.0.0.1', 'localhost']))
ROOT = Path(__file__).resolve().parent.parent
DATA = data_folder()
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason='real radiographs not present at ../shared/data (or where CXR_DATA points)')
SMALL = ['--set', 'data.phantom_patients=40', '--set', 'training.bs=8', '--set', 'training.num_it=40', '--set', 'evaluation.n_boot=200',
         '--size', '64', '--device', 'cpu', '--arch', 'resnet18', '--weights', 'none', '--set', 'model.head=concat', '--set',
         'training.average=0', '--set', 'training.keep=best', '--set', 'training.lr_ratio=100', '--set', 'model.dropout=0.5']
STAGES = ['--set', 'training.stages=[{epochs = 1, lr = 0.001}, {epochs = 2}]']
ATTACK = os.environ.get('HYPOTHESIS_PROFILE') == 'attack'      # `make attack`
# Workers take whole files, in this order: the longest first, so that both end together
SLOW_FIRST = ('test_main_job', 'test_recipes', 'test_audit', 'test_pages', 'test_external', 'test_table', 'test_results', 'test_evaluate')


def pytest_collection_modifyitems(items):
    place = {name: i for i, name in enumerate(SLOW_FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def examples(n):
    "Examples of a property test: five times as many under `make attack`"
    return 5 * n if ATTACK else n


def cli(*args, **kw):
    "covid-cxr in a fresh process; returns the finished process with its text"
    kw = dict(dict(cwd=ROOT, timeout=300), **kw)
    main = 'from covid_cxr.cli import main; raise SystemExit(main())'
    return subprocess.run([sys.executable, '-c', main, *map(str, args)], capture_output=True, text=True, **kw)


def here(*args):
    "covid-cxr in this process, which is much faster; returns what looks like a finished process"
    from covid_cxr.cli import main
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): code = main([*map(str, args)])
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


FORKS = multiprocessing.get_context('forkserver')              # imports torch and fastai once, not for every process
FORKS.set_forkserver_preload(['fastai.vision.all', 'covid_cxr.runs.train', 'covid_cxr.learner', 'covid_cxr.report.page'])


def _run_main(args, said, prepare):
    with open(said, 'w') as f: os.dup2(f.fileno(), 1), os.dup2(1, 2)
    if prepare: prepare()
    from covid_cxr.cli import main
    raise SystemExit(main([*map(str, args)]))


def start(*args, said, prepare=None):
    "covid-cxr in a process of its own, to be killed or waited for; what it prints goes into the file `said`; `prepare` runs first"
    p = FORKS.Process(target=_run_main, args=(args, said, prepare))
    p.start()
    return p


def python(code, *args, env=None):
    "A few lines of Python in a fresh process; they must succeed"
    p = subprocess.run([sys.executable, '-c', code, *map(str, args)], capture_output=True, text=True, cwd=ROOT, timeout=300,
                       env={**os.environ, **(env or {})})
    assert p.returncode == 0, p.stderr[-2000:]
    return p.stdout


TINY = '''name = "tiny"
task = "pneumonia_vs_normal"
[data]
duplicates = "exact"
[image]
size = 32
[model]
arch = "cnn3"
weights = "none"
[training]
stages = [{epochs = 1, lr = 0.001}]
[evaluation]
n_boot = 100
[[data.sources]]
'''


def tiny_recipe(source, settings=None):
    "A recipe that trains in seconds on one source, given as lines of TOML; other fields as --set takes them"
    from covid_cxr.recipe import override, parse_recipe
    return override(parse_recipe(TINY + source), settings or {})


def small_table(folder, patients, classes, first_valid):
    "Phantom patients of 64 px, two images each, every second one ill; from `first_valid` on they are for validation"
    from PIL import Image
    from covid_cxr.core import new_table
    from covid_cxr.phantom import make_phantom
    rows = []
    for p in range(patients):
        for i in range(2):
            f = folder / f'p{p}-{i}.png'
            Image.fromarray(make_phantom(seed=1, patient=p, image=i, size=64, lesion=.6 * (p % 2)).image).save(f)
            rows.append(dict(path=str(f), image_id=f'{p}-{i}', patient=f'p{p}', group=f'p{p}', label=classes[p % 2],
                             split='valid' if p >= first_valid else 'train'))
    return new_table(rows, 'phantom')


def build_once(folder, build):
    "What `build(folder)` makes, made by the worker that comes first; the others wait for it"
    done = folder.with_name(f'{folder.name}.done')
    with open(folder.with_name(f'{folder.name}.lock'), 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            build(folder)
            done.touch()
    return folder


def _contents(folder):
    "Every file but the log, to which each command adds a line"
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob('*') if p.is_file() and p.name != 'log.txt'}


def _make_phantom_run(out):
    p = cli('demo', '--no-audit', '--out', out, *SMALL, *STAGES)
    assert p.returncode == 0, p.stderr[-2000:]
    (out / 'stdout.txt').write_text(p.stdout)


@pytest.fixture(scope='session')
def shared_folder(tmp_path_factory):
    "A folder that all workers of this session see"
    base = tmp_path_factory.getbasetemp()
    return base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base


@pytest.fixture(scope='session')
def phantom_run(shared_folder):
    "One finished run of the demo recipe for all workers, small: two stages, three epochs, with lr_find. Copy it before you write to it."
    out = build_once(shared_folder / 'phantom-run', _make_phantom_run)
    before = _contents(out)
    yield out
    assert _contents(out) == before, 'a test wrote into the run that all tests share'


def _make_tiny_bundle(folder):
    from PIL import Image
    from covid_cxr.bundle import export_bundle, save_bundle
    from covid_cxr.core import new_table
    from covid_cxr.data import cxr_dls
    from covid_cxr.learner import cxr_learner
    from covid_cxr.phantom import make_phantom
    folder.mkdir()
    rows = []
    for i in range(8):
        Image.fromarray(make_phantom(seed=1, patient=i, size=32).image).save(folder / f'{i}.png')
        rows.append(dict(path=f'{folder}/{i}.png', image_id=f'{i}', patient=f'{i}', group=f'{i}', label=('no', 'yes')[i % 2],
                         split='valid' if i > 5 else 'train'))
    learn = cxr_learner(cxr_dls(new_table(rows, 'x'), size=64, bs=2, device='cpu'), 'cnn3', 'none', path=folder)
    origin = dict(recipe='tiny', split='test', headline=dict(auc=.75), licences={'CC BY 4.0': 8}, collections={'x': 8})
    export_bundle(save_bundle(learn, folder / 'own', pickle=False, provenance=origin), folder / 'bundle')


@pytest.fixture(scope='session')
def tiny_bundle(shared_folder):
    "A bundle of a small network with random weights, with its ONNX file. Copy it before you write to it."
    return build_once(shared_folder / 'tiny-bundle', _make_tiny_bundle) / 'bundle'
