"""Keep what a run found, without any image and without paths of the machine it ran on:

    python benchmarks/keep_run.py RUN NAME      ->  benchmarks/results/NAME/

predictions.csv keeps ids instead of paths; run.json keeps versions, hashes, seconds per image and the command.
Every number that is printed anywhere about the run can be derived again from these files (tests/test_results.py does).
"""
import json, os, platform, shutil, sys
from pathlib import Path
import pandas as pd

HERE = Path(__file__).resolve().parent / 'results'


def cpu_model():
    for line in open('/proc/cpuinfo') if os.path.exists('/proc/cpuinfo') else []:
        if line.startswith('model name'): return line.split(':', 1)[1].strip()
    return platform.processor()


def keep(run, name, command=''):
    run, out = Path(run), HERE / name
    out.mkdir(parents=True, exist_ok=True)
    pred = pd.read_csv(run / 'predictions.csv')
    pred[['image_id', *(c for c in pred.columns if c not in ('path', 'image_id'))]].to_csv(out / 'predictions.csv', index=False)
    for f in ('recipe.toml', 'history.csv', 'lr_find.csv', 'summary.txt', 'reconciliation.txt', 'audit.json', 'audit.txt', 'floors.csv'):
        if (run / f).exists(): shutil.copy(run / f, out / f)
    e = json.loads((run / 'evaluation.json').read_text())
    for part in ('test', 'valid', 'source_only'):
        if isinstance(e.get(part), dict): e[part].pop('curves', None)          # predictions.csv draws them again
    (out / 'evaluation.json').write_text(json.dumps(e, indent=1) + '\n')
    state, h = json.loads((run / 'run.json').read_text()), pd.read_csv(run / 'history.csv')
    state.pop('data')
    state.update(command=command, cpu=cpu_model(), cores=os.cpu_count(), images_trained=int(h['images'].sum()), training_seconds=float(h['seconds'].sum()),
                 seconds_per_image=float(h['seconds'].sum() / h['images'].sum()))
    (out / 'run.json').write_text(json.dumps(state, indent=1) + '\n')
    keep_ladder(run, out)
    filter_views(run, out)
    print(out)


def keep_ladder(run, out):
    "What the frozen model did on other collections: ladder.json, and the predictions of every rung without paths"
    if not (Path(run) / 'ladder.json').exists(): return
    shutil.copy(Path(run) / 'ladder.json', Path(out) / 'ladder.json')
    (Path(out) / 'ladder').mkdir(exist_ok=True)
    for rung in json.loads((Path(run) / 'ladder.json').read_text())['rungs']:
        pd.read_csv(Path(run) / rung['predictions']).drop(columns='path').to_csv(Path(out) / rung['predictions'], index=False)


def filter_views(run, out):
    "The view of every used film, where the films of a run have several: a view can be a shortcut"
    t = pd.read_csv(Path(run) / 'table.csv', low_memory=False)
    t = t[t['excluded'].isna()]
    if t['view'].nunique() > 1: t[['image_id', 'view']].to_csv(Path(out) / 'views.csv', index=False)


if __name__ == '__main__':
    if len(sys.argv) < 3: sys.exit(__doc__)
    keep(sys.argv[1], sys.argv[2], ' '.join(sys.argv[3:]))
