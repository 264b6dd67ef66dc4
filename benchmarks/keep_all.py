"""Keep every finished run of a folder that `covid-cxr reproduce` fills, under the name that it has there:

    python benchmarks/keep_all.py OUT [--command '...'] [--machine SUMMARY] [NAME ...]
                                              ->  benchmarks/results/NAME/ for every run OUT/runs/NAME

It may be called again and again: a run whose files would be the same is passed over, one that has new ones (an audit, lung-free
baselines, an external test) is kept anew. Left out are runs that are not finished, runs on phantoms, and the folds of a
cross-validation that is not whole. `make_tables.py` comes afterwards, then the pages that print tables.
"""
import argparse, filecmp, json, shutil, tempfile
from pathlib import Path
from record import RESULTS
from covid_cxr.core import CxrError
from covid_cxr.recipe import override, recipe_hash
from covid_cxr.runs.folder import RunFolder
from keep_run import keep

COMMAND = 'covid-cxr reproduce --data DATA --out OUT'


def finished_runs(folder):
    "Finished runs on real images below a folder"
    runs = [RunFolder.open(f.parent, finished=False) for f in sorted(Path(folder).glob('*/run.json'))]
    return [r for r in runs if r.state.get('status') == 'finished' and not r.synthetic]


def whole(runs):
    "Those that stand for themselves, and the folds of whole cross-validations"
    folds = {}
    for r in runs: folds.setdefault(recipe_hash(override(r.recipe, {'split.fold': 0})), []).append(r)
    return {r.name for of in folds.values() for r in of if r.recipe.split.kind != 'fold' or len(of) == r.recipe.split.n_folds}


def same(first, second):
    "Do two folders hold the same files?"
    names = [sorted(f.relative_to(d).as_posix() for f in d.rglob('*') if f.is_file()) for d in (first, second)]
    return names[0] == names[1] and not any(filecmp.cmpfiles(first, second, names[0], shallow=False)[1:])


def keep_anew(run, place, command, machine=None):
    "Replace what is kept of a run; 'unchanged' when nothing is new"
    with tempfile.TemporaryDirectory() as tmp:
        new = Path(tmp) / run.name
        keep(run, new, command, machine)
        kept = place / 'baselines.csv.gz'
        if kept.exists() and not (new / kept.name).exists(): shutil.copy(kept, new / kept.name)      # of `keep_baselines.py`
        if place.is_dir() and same(new, place): return 'unchanged'
        said = 'kept anew' if place.is_dir() else 'kept'
        if place.is_dir(): shutil.rmtree(place)
        shutil.copytree(new, place)
        return said


def machine_of(summary):
    "Processor, cores and GPU, as `gpu_articles.py` wrote them down"
    said = json.loads(Path(summary).read_text(encoding='utf-8'))['machine']
    return {k: said[k] for k in ('cpu', 'cores', 'gpu')}


def keep_all(out, names=(), command=COMMAND, results=RESULTS, machine=None):
    "What was done with every finished run of a folder: 'kept', 'kept anew', 'unchanged', or why it was left out"
    runs, done = finished_runs(Path(out) / 'runs'), {}
    complete = whole(runs)
    for r in (r for r in runs if not names or r.name in names):
        if r.name not in complete: done[r.name] = 'left out: not every fold is finished'
        else: done[r.name] = keep_anew(r, Path(results) / r.name, command, machine)
    return done


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('out', help="folder of 'covid-cxr reproduce', with runs/")
    p.add_argument('names', nargs='*', help='of these runs alone')
    p.add_argument('--command', default=COMMAND, help=f'the command that made them (default: {COMMAND})')
    p.add_argument('--machine', metavar='SUMMARY', help='summary.json of `gpu_articles.py`: the machine that trained them')
    a = p.parse_args()
    there = machine_of(a.machine) if a.machine else None
    try: done = keep_all(a.out, a.names, a.command, machine=there)
    except CxrError as e: raise SystemExit(str(e)) from e
    for name, said in done.items(): print(f'{name}: {said}')
    size = sum(f.stat().st_size for f in RESULTS.rglob('*') if f.is_file())
    print(f'{size / 1e6:.2f} MB in {RESULTS.name}/')
