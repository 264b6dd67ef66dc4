"""The lung-free baselines of kept runs, fitted again from the images, without the weights of the run:

    python benchmarks/keep_baselines.py [NAME ...]      ->  benchmarks/results/NAME/baselines.csv.gz

A baseline needs images, labels and splits, and all of these are known of a kept run: its predictions name image, label, group and
split, its recipe names the collections. So a run that was audited with --quick, or not at all, gets the baselines of a full audit,
the network that is trained without lungs among them. A run of thousands of images takes about three minutes.
"""
import argparse, os
from pathlib import Path
os.environ.setdefault('OMP_NUM_THREADS', '1')
from record import RESULTS, write_compressed
import numpy as np, pandas as pd
from covid_cxr.audit.baselines import fit_baselines
from covid_cxr.audit.run import SMALL
from covid_cxr.core import data_folder
from covid_cxr.images import fit_to, load_image
from covid_cxr.recipe import read_one_source
from covid_cxr.runs.crossval import find_results, share_baselines
from covid_cxr.runs.folder import RunFolder


def rows_of(run, data):
    "The used images of a kept run as a table with paths and metadata"
    spoken = ['image_id', 'group', 'split', 'label']
    table = pd.concat([read_one_source(s, data, run.recipe.seed) for s in run.recipe.data.sources], ignore_index=True)
    table = table.drop(columns=spoken[1:], errors='ignore').drop_duplicates('image_id')
    rows = run.predictions[spoken].merge(table, on='image_id', how='left')
    lost = rows.loc[rows['path'].isna(), 'image_id']
    if len(lost): raise SystemExit(f'{run.name}: {len(lost)} images are not below {data}, e.g. {lost.iloc[0]}.')
    return rows


def small_images(rows, rule):
    "(n, 64, 64) uint8: what an audit shows its baselines"
    full = (load_image(p, rule) for p in rows['path'])
    return np.stack([x if x.shape[0] <= SMALL else fit_to(x, SMALL, 'squash') for x in full])


def keep(name, data):
    "Fit every baseline of one run; RESULTS/NAME/baselines.csv.gz"
    run = RunFolder.open(RESULTS / name)
    rows = rows_of(run, data)
    images = small_images(rows, run.recipe.image.to_rule())
    found = fit_baselines(rows, images, run.classes[1], run.split, n_boot=0, seed=run.recipe.seed)
    ids = rows.loc[rows['split'] == run.split, 'image_id'].to_numpy()
    tables = [pd.DataFrame(dict(image_id=ids, baseline=b.name, kind=b.kind, score=b.scores.round(6))) for b in found]
    write_compressed(RESULTS / name / 'baselines.csv', pd.concat(tables, ignore_index=True))
    for b in found: print(f'{name}: {b.name} {b.auc.value:.4f}', flush=True)


def without_baselines():
    "Names of the kept runs of two classes for which no baselines are kept: one for each split, since runs of one split share them"
    every, first = find_results(RESULTS, every=True), {}
    for r in (r for runs in every.values() for r in runs if len(r.classes) == 2 and not share_baselines([r], every)):
        split = repr((r.recipe.name, r.recipe.data, r.recipe.split, r.recipe.seed))
        if r.evaluated_predictions['label'].nunique() == 2: first.setdefault(split, r.name)
    return list(first.values())


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('names', nargs='*', help='folders below benchmarks/results; none: a run of every split that has none')
    p.add_argument('--data', type=Path, default=data_folder(), help='folder that holds the collections')
    a = p.parse_args()
    for name in a.names or without_baselines(): keep(name, a.data)
