"""Keep what a run found, without any image and without paths of the machine it ran on:

    python benchmarks/keep_run.py RUN NAME [COMMAND ...]      ->  benchmarks/results/NAME/

predictions.csv keeps ids instead of paths; run.json keeps versions, hashes, seconds per image and the command that was given.
Every number that is printed anywhere about the run can be derived again from these files (tests/test_results.py does).
"""
import argparse, os, shutil
from pathlib import Path
from record import RESULTS, cpu_model, write_result
import pandas as pd
from covid_cxr.core import used
from covid_cxr.runs.folder import RunFolder

COPIED = ('recipe.toml', 'history.csv', 'lr_find.csv', 'summary.txt', 'reconciliation.txt', 'audit.json', 'audit.txt', 'baselines.csv')


def keep(run, name, command=''):
    "Copy what numbers are made from into benchmarks/results/NAME"
    r, out = RunFolder.open(run), RESULTS / name
    out.mkdir(parents=True, exist_ok=True)
    pred = pd.read_csv(r.file('predictions.csv'))
    first = ['image_id', *(c for c in pred.columns if c not in ('path', 'image_id'))]
    pred[first].to_csv(out / 'predictions.csv', index=False)
    for f in COPIED:
        if r.file(f).exists(): shutil.copy(r.file(f), out / f)
    keep_evaluation(r, out)
    keep_state(r, out, command)
    keep_external_tests(r, out)
    keep_views(r, out)
    print(out)


def keep_evaluation(r, out):
    "evaluation.json without curves: predictions.csv draws them again"
    evaluation = dict(r.evaluation)
    for split in ('test', 'valid', 'source_baseline'):
        if isinstance(evaluation.get(split), dict): evaluation[split] = {k: v for k, v in evaluation[split].items() if k != 'curves'}
    write_result(out / 'evaluation.json', evaluation)


def keep_state(r, out, command):
    "run.json without the place of the data, with machine, seconds and command"
    h = r.history
    images, seconds = int(h['images'].sum()), float(h['seconds'].sum())
    state = {k: v for k, v in r.state.items() if k != 'data'}
    state.update(command=command, cpu=cpu_model(), cores=os.cpu_count(), images_trained=images, training_seconds=seconds,
                 seconds_per_image=seconds / images)
    write_result(out / 'run.json', state)


def keep_external_tests(r, out):
    "What the frozen model did on other collections: external.json, and the predictions of every test without paths"
    file = r.file('external.json')
    if not file.exists(): return
    (out / 'external').mkdir(exist_ok=True)
    external = r.external_json
    for test in external['tests']:
        name = f"external/{Path(test['predictions']).name}"
        pd.read_csv(r.path / test['predictions']).drop(columns='path').to_csv(out / name, index=False)
        test.update(predictions=name, data='data')        # not the place on this machine
    write_result(out / 'external.json', external)


def keep_views(r, out):
    "The view of every used image, where the images of a run have several: a view can be a shortcut"
    t = used(r.table)
    if t['view'].nunique() > 1: t[['image_id', 'view']].to_csv(out / 'views.csv', index=False)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('run', help='directory of a finished run')
    p.add_argument('name', help='folder below benchmarks/results')
    p.add_argument('command', nargs=argparse.REMAINDER, help='the command that made the run')
    a = p.parse_args()
    keep(a.run, a.name, ' '.join(a.command))
