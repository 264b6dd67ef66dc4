"""The page 'A model in one minute', for real: an empty venv, the wheel of this checkout and the small list of packages, then what a new
user types: predict, explain, serve and one request. Everything that is printed is kept ('...' for the folder). Images: one child of each
class of the published test, a lateral view of another collection, a CT slice; none of them was trained on.

    python benchmarks/one_minute.py          about two minutes

Needs the real radiographs (CXR_DATA), curl, and the model in the box. The result replaces benchmarks/results/one_minute.json.
"""
import argparse, os, shlex, shutil, subprocess, sys, tempfile, time
from pathlib import Path
from record import RESULTS, ROOT, about, machine, write_result
sys.path.insert(0, str(ROOT / 'tools'))
from light_install import BUNDLE, NOT_THERE, Venv, build_wheel
from covid_cxr.core import data_folder
from covid_cxr.sources import read_source

MODEL, OUT = Path(BUNDLE).name, RESULTS / 'one_minute.json'
COMMANDS = (f'covid-cxr predict {MODEL} new --out answers.csv', f'covid-cxr predict {MODEL} new/child-2.jpeg --json',
            f'covid-cxr explain {MODEL} new/child-2.jpeg --out explained', 'covid-cxr train demo')
ASK = 'curl -s -F files=@new/child-2.jpeg http://127.0.0.1:8000/api/predict'


def lay_out(folder, data):
    "Four new images: {name: what each of them shows}"
    (folder / 'new').mkdir()
    known = {}
    for k, (theirs, ours) in enumerate((('NORMAL', 'normal'), ('PNEUMONIA', 'pneumonia')), 1):
        files = sorted(next(data.glob('chest-xray-pneumonia/**/test')).joinpath(theirs).glob('*.jpeg'))
        shutil.copy(files[len(files) // 2], folder / f'new/child-{k}.jpeg')
        known[f'child-{k}.jpeg'] = ours
    table = read_source('covid_chestxray', data / 'covid-chestxray-dataset')
    for name, view, what in (('side', 'L', 'a lateral view'), ('slice', 'Axial', 'a CT slice')):
        file = next(f for f in map(Path, sorted(table.loc[table['view'] == view, 'path'].astype(str))) if f.is_file())
        shutil.copy(file, folder / f'new/{name}{file.suffix}')
        known[name + file.suffix] = what
    return known


def typed(command, folder, env):
    "The exit code, the seconds and the lines of one command"
    began = time.perf_counter()
    p = subprocess.run(command, shell=True, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    seconds = time.perf_counter() - began
    print(f'$ {command}\n{p.stdout}{p.stderr}', flush=True)
    lines = [text.replace(str(folder), '...').splitlines() for text in (p.stdout, p.stderr)]
    return dict(command=command, code=p.returncode, seconds=round(seconds, 1), printed=lines[0], beside=lines[1])


def served(folder, env):
    "The server, asked once by curl: its own lines and the answer"
    command = f'covid-cxr serve {MODEL}'
    server = subprocess.Popen(shlex.split(command), cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for _ in range(60):
            if subprocess.run('curl -sf http://127.0.0.1:8000/health', shell=True, capture_output=True).returncode == 0: break
            time.sleep(.5)
        answer = typed(ASK, folder, env)
    finally: server.terminate()
    return dict(command=command, printed=server.communicate(timeout=30)[0].replace(str(folder), '...').splitlines()), answer


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', default=OUT)
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        known, wheel, venv = lay_out(folder, data_folder()), build_wheel(folder), Venv(folder / 'venv')
        env = {k: v for k, v in os.environ.items() if not k.startswith(('PYTHON', 'VIRTUAL_ENV', 'COVID_CXR'))}
        env['PATH'] = f'{venv.folder / "bin"}:{env["PATH"]}'
        began = time.perf_counter()
        venv.pip('--no-deps', wheel)
        venv.pip('-r', ROOT / 'requirements-predict.txt')
        pip = time.perf_counter() - began
        commands = [typed(c, folder, env) for c in COMMANDS]
        first = pip + commands[0]['seconds']
        answers = (folder / 'answers.csv').read_text().splitlines()
        server, asked = served(folder, env)
        there = subprocess.run([venv.python, '-c', f'import importlib.util as u; print(*[m for m in {NOT_THERE} if u.find_spec(m)])'],
                               capture_output=True, text=True).stdout.split()
        size = dict(megabytes=round(venv.megabytes(), 1), wheel_megabytes=round(wheel.stat().st_size / 1e6, 1), heavy=there)
    timed = dict(seconds_of_pip=round(pip, 1), seconds_to_first_answers=round(first, 1))
    write_result(a.out, dict(about(), machine=machine(), images=known, **timed, **size, commands=commands, answers=answers, server=server,
                             asked=asked))


if __name__ == '__main__': main()
