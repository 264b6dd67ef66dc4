"""The small installation, as a new user makes it: an empty venv, pip, the first prediction, and what is refused without torch.

    python tools/light_install.py                              the model in the box, on a synthetic radiograph
    python tools/light_install.py --bundle DIR --image FILE    another bundle, on an image of your own

Prints the installed size and the seconds from the beginning of `pip install` to the first prediction; exit code 1 when one is
over its limit, or when something of the full installation came along."""
import argparse, json, os, shlex, shutil, subprocess, sys, tempfile, time
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUNDLE = 'covid_cxr/models/pneumonia-small'
MOST_MB, MOST_SECONDS = 250, 60
OF_A_VENV = 'pip', 'setuptools', 'pkg_resources', '_distutils_hack', 'wheel'       # there before anything is installed
NOT_THERE = 'torch', 'fastai', 'pandas', 'scipy', 'sklearn', 'matplotlib'


def settings():
    "The section of settings.ini"
    config = ConfigParser(delimiters=['='], interpolation=None)
    config.read(ROOT / 'settings.ini', encoding='utf-8')
    return config['DEFAULT']


def requirements(file=ROOT / 'requirements-predict.txt'):
    "The lines of a requirements file"
    lines = [line.partition('#')[0].strip() for line in file.read_text(encoding='utf-8').splitlines()]
    return [line for line in lines if line]


def run(*words, check=True, **kw):
    "Run a command in a clean environment; returns the finished process with its text"
    env = {k: v for k, v in os.environ.items() if not k.startswith(('PYTHON', 'VIRTUAL_ENV'))}
    kw = dict(env=env, cwd=tempfile.gettempdir()) | kw
    p = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=1800, **kw)
    if check and p.returncode: raise SystemExit(f'{shlex.join(map(str, words))}\n{p.stdout[-1000:]}\n{p.stderr[-2000:]}')
    return p


class Venv:
    "An empty virtual environment"
    def __init__(self, folder, python=sys.executable):
        self.folder = Path(folder)
        run(python, '-m', 'venv', self.folder)
        self.python, self.cli = self.folder / 'bin/python', self.folder / 'bin/covid-cxr'

    def pip(self, *words): return run(self.python, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', *words)

    @property
    def packages(self): return Path(run(self.python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))').stdout.strip())

    def megabytes(self):
        "Size of what was installed, without what every venv holds"
        files = [p for p in self.packages.rglob('*') if p.is_file() and not p.relative_to(self.packages).parts[0].startswith(OF_A_VENV)]
        return sum(p.stat().st_size for p in files) / 1e6


def copy_checkout(target, left_out=lambda path: False):
    "The files of this checkout, without those that git ignores, in a new folder"
    files = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard'], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in map(Path, files.stdout.splitlines()):
        if left_out(name) or not (ROOT / name).is_file(): continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target / name)
    return target


def build_wheel(folder):
    "The wheel of this checkout"
    source = copy_checkout(folder / 'source')
    run(sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--no-build-isolation', '-w', folder, source)
    return next(folder.glob('covid_cxr-*.whl'))


def phantom(file):
    "A synthetic radiograph, made by the full installation"
    code = ('import sys\nfrom PIL import Image\nfrom covid_cxr.phantom import make_phantom\n'
            'Image.fromarray(make_phantom(seed=1, patient=1, size=512, lesion=.5).image).save(sys.argv[1])')
    return run(sys.executable, '-c', code, file, cwd=ROOT) and Path(file)


def first_prediction(venv, bundle, image):
    "What covid-cxr says of one image; declined is an answer, too"
    p = run(venv.cli, 'predict', bundle, image, '--json', check=False)
    if p.returncode not in (0, 4): raise SystemExit(f'predict: exit code {p.returncode}\n{p.stderr[-2000:]}')
    return json.loads(p.stdout)['result']['answers'][0]


def check_refusals(venv):
    "What the small installation says where it lacks something; returns one such sentence"
    told = [run(venv.cli, *words, check=False) for words in (['train', 'demo'], ['audit', 'run'], ['recipes'])]
    for p in told:
        if p.returncode != 1 or 'pip install covid_cxr' not in p.stderr or 'Traceback' in p.stderr: raise SystemExit(p.stderr[-2000:])
    return told[0].stderr.strip()


def measure(folder, bundle, image):
    "Install, predict, check; returns what is printed"
    wheel, image = build_wheel(folder), image or phantom(folder / 'phantom.png')
    venv, began = Venv(folder / 'venv'), time.perf_counter()
    venv.pip('--no-deps', wheel)
    venv.pip('-r', ROOT / 'requirements-predict.txt')
    installed = time.perf_counter() - began
    answer = first_prediction(venv, bundle or venv.packages / BUNDLE, image)
    seconds = time.perf_counter() - began
    found = run(venv.python, '-c', f'import importlib.util as u; print([m for m in {NOT_THERE} if u.find_spec(m)])').stdout
    system = json.loads(run(venv.cli, 'checks', '--json', check=False).stdout)
    return dict(megabytes=round(venv.megabytes(), 1), seconds_of_pip=round(installed, 1), seconds_to_first_answer=round(seconds, 1),
                wheel_megabytes=round(wheel.stat().st_size / 1e6, 1), answer=answer, faults=system['result']['faults'],
                heavy=found.strip(), refusal=check_refusals(venv))


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--bundle', type=Path, help='a bundle or run directory (default: the model in the box)')
    p.add_argument('--image', type=Path, help='an image (default: a synthetic radiograph)')
    args = p.parse_args()
    if not args.bundle and not (ROOT / BUNDLE).is_dir(): raise SystemExit(f'{BUNDLE} is not there; name a bundle with --bundle.')
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), args.bundle and args.bundle.resolve(), args.image and args.image.resolve())
    print(json.dumps(found, indent=1))
    over = found['megabytes'] > MOST_MB or found['seconds_to_first_answer'] > MOST_SECONDS
    return int(over or found['heavy'] != '[]' or found['faults'] > 0)


if __name__ == '__main__': sys.exit(main())
