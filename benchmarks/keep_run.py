"""Keep what a run found, without any image and without paths of the machine it ran on:

    python benchmarks/keep_run.py RUN NAME [COMMAND ...]      ->  benchmarks/results/NAME/

predictions.csv.gz keeps ids instead of paths; run.json keeps versions, hashes, seconds per image and the command that was given. A recipe
that starts from the weights of another run names that file from its folder on, and its hash is that of the recipe as it is kept.
Probabilities of training images, from which no number is made, have four digits; all others are as they were written.
Every number that is printed anywhere about the run can be derived again from these files (tests/test_results.py does).
"""
import argparse, os, shutil
from pathlib import Path
from record import RESULTS, cpu_model, write_compressed, write_result
import pandas as pd
from covid_cxr.core import used, write_text
from covid_cxr.recipe import dump_recipe, override, recipe_hash
from covid_cxr.runs.folder import RunFolder

COPIED = 'history.csv', 'lr_find.csv', 'summary.txt', 'reconciliation.txt', 'audit.json', 'audit.txt'
NO_FILE = 'none', 'imagenet'    # words of `model.weights` that name no file


def keep(run, out, command='', machine=None):
    "Copy what numbers are made from into a folder; `machine` says where it was trained, when not here"
    r, out = RunFolder.open(run), Path(out)
    recipe = kept_recipe(r)
    write_text(out / 'recipe.toml', dump_recipe(recipe))
    keep_tables(r, out)
    for f in COPIED:
        if r.file(f).exists(): shutil.copy(r.file(f), out / f)
    keep_evaluation(r, out)
    keep_state(r, out, recipe, command, machine or dict(cpu=cpu_model(), cores=os.cpu_count()))
    keep_external_tests(r, out)


def kept_recipe(r):
    "The recipe of a run without a place on this machine: RUNS/pretrain/bundle/weights.safetensors becomes runs/pretrain/bundle/..."
    weights = r.recipe.model.weights
    if weights in NO_FILE: return r.recipe
    return override(r.recipe, {'model.weights': Path('runs', *Path(weights).parts[-3:]).as_posix()})


def as_text(file): return pd.read_csv(file, dtype=str, keep_default_na=False)      # every digit as it was written


def keep_tables(r, out):
    "Predictions without paths, baselines, and the view of every used image where a run has several: a view can be a shortcut"
    pred = as_text(r.file('predictions.csv'))
    trained = pred['split'] == 'train'
    for c in (c for c in pred if c.startswith('prob_')): pred.loc[trained, c] = [f'{float(p):.4f}' for p in pred.loc[trained, c]]
    write_compressed(out / 'predictions.csv', pred[['image_id', *(c for c in pred if c not in ('path', 'image_id'))]])
    if r.file('baselines.csv').exists(): write_compressed(out / 'baselines.csv', as_text(r.file('baselines.csv')))
    t = used(r.table)
    if t['view'].nunique() > 1: write_compressed(out / 'views.csv', t[['image_id', 'view']])


def keep_evaluation(r, out):
    "evaluation.json without curves: predictions.csv draws them again"
    evaluation = dict(r.evaluation)
    for split in ('test', 'valid', 'source_baseline'):
        if isinstance(evaluation.get(split), dict): evaluation[split] = {k: v for k, v in evaluation[split].items() if k != 'curves'}
    write_result(out / 'evaluation.json', evaluation)


def keep_state(r, out, recipe, command, machine):
    "run.json without the place of the data, with machine, seconds and command"
    h = r.history
    images, seconds = int(h['images'].sum()), float(h['seconds'].sum())
    state = {k: v for k, v in r.state.items() if k != 'data'}
    state.update(recipe_hash=recipe_hash(recipe), command=command, **machine, images_trained=images,
                 training_seconds=seconds, seconds_per_image=seconds / images)
    write_result(out / 'run.json', state)


def keep_external_tests(r, out):
    "What the frozen model did on other collections: external.json, and the predictions of every test without paths"
    if not r.file('external.json').exists(): return
    external = r.external_json
    for test in external['tests']:
        name = f"external/{Path(test['predictions']).name}"
        write_compressed(out / name, as_text(r.file(test['predictions'])).drop(columns='path'))
        test.update(predictions=name, data='data')        # not the place on this machine
    write_result(out / 'external.json', external)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('run', help='directory of a finished run')
    p.add_argument('name', help='folder below benchmarks/results')
    p.add_argument('command', nargs=argparse.REMAINDER, help='the command that made the run')
    a = p.parse_args()
    keep(a.run, RESULTS / a.name, ' '.join(a.command))
    print(RESULTS / a.name)
