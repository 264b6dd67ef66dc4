"""Which augmentation holds on patients who look like none that were trained on? Chosen before the published test is opened:

    python benchmarks/choose_augmentation.py --out FOLDER      ->  benchmarks/results/choose_augmentation.json, in about an hour

The official training images of the Kaggle set are sorted into three clusters of look-alike patients per class (`split.kind = "cluster"`).
EfficientNet-Lite0 from ImageNet weights is trained on two and asked about the third, its threshold frozen on a validation split by patient
of the two. Every image is asked once. The rule, fixed beforehand: the highest balanced accuracy at the frozen threshold, mean of the three
folds. The published test has no part in it. Killed, the same command goes on where it stopped.
"""
import argparse
from pathlib import Path
from record import RESULTS, about, machine, write_result
import numpy as np, pandas as pd
from sklearn.metrics import roc_curve
from covid_cxr.core import data_folder
from covid_cxr.recipe import load_recipe, override
from covid_cxr.runs.folder import RunFolder
from covid_cxr.runs.train import train

FOLDS = 3
NETWORK = {
    'model.arch': 'efficientnet_lite0', 'model.weights': 'imagenet', 'image.size': 128, 'training.bs': 32, 'training.keep': 'last',
    'training.average': .99, 'training.stages': [dict(epochs=1, frozen=True, lr=.002), dict(epochs=2, lr=.001)],
    'split.kind': 'cluster', 'split.n_folds': FOLDS, 'split.valid_pct': .15, 'seed': 42, 'evaluation.n_boot': 100}
PLAIN = {'training.rotate': 10, 'training.zoom': 1.1, 'training.lighting': .2, 'training.shift': 0.}
WIDE = {**PLAIN, 'training.zoom': 1.2, 'training.zoom_out': .85, 'training.shift': .1, 'training.gamma': .3, 'training.lighting': .3,
        'training.erase': .3}
CANDIDATES = {'plain': PLAIN, 'wide': WIDE, 'wide and other machines': {**WIDE, 'training.scanner': 1.}}
METRICS = ('auc', 'balanced_accuracy', 'recall', 'specificity')


def trained(name, fold, out, data):
    "The finished run of one candidate and one fold"
    own = {**NETWORK, **CANDIDATES[name], 'split.fold': fold, 'title': f'held-out clusters, augmentation {name}'}
    place = out / f"{name.replace(' ', '-')}-fold{fold}"
    recipe = override(load_recipe('pneumonia-resnet'), own)
    return RunFolder.open(train(recipe, data=data, out=place, device='cpu', cache_dir=out / 'cache', figures=False))


def metrics_of(run, split):
    "At the frozen threshold, without intervals"
    e = run.evaluate(split, n_boot=0)
    return {m: e[m].value for m in METRICS}


def found_on(run):
    "What one run found on patients at random (its validation split) and on the cluster that was held out"
    e, minutes = run.evaluation['test'], float(run.history['seconds'].sum()) / 60
    return dict(fold=run.recipe.split.fold, images=e['n_images'], groups=e['n_groups'], minutes=round(minutes, 1),
                threshold=run.threshold, held_out=metrics_of(run, 'test'), by_patient=metrics_of(run, 'valid'))


def stress_threshold(runs):
    "The threshold that all held-out images together would choose: is it another one than validation chooses?"
    asked = pd.concat([run.predictions.query("split == 'test'") for run in runs])
    positive = runs[0].classes[1]
    y, p = (asked.label == positive).to_numpy(int), asked[f'prob_{positive}'].to_numpy()
    wrong, found, at = roc_curve(y, p)
    best = int(np.argmax(found - wrong))
    return dict(threshold=float(at[best]), recall=float(found[best]), specificity=float(1 - wrong[best]))


def mean_over(folds, where): return {m: float(np.mean([f[where][m] for f in folds])) for m in METRICS}


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', required=True, help='folder for the runs')
    a = p.parse_args()
    runs = {}
    for fold in range(FOLDS):                                  # fold by fold: a part of the work already compares all candidates
        for name in CANDIDATES: runs.setdefault(name, []).append(trained(name, fold, Path(a.out), data_folder()))
    rows = {}
    for name in CANDIDATES:
        folds = [found_on(run) for run in runs[name]]
        rows[name] = dict(settings=CANDIDATES[name], folds=folds, held_out=mean_over(folds, 'held_out'),
                          by_patient=mean_over(folds, 'by_patient'), stress_threshold=stress_threshold(runs[name]))
    chosen = max(rows, key=lambda name: rows[name]['held_out']['balanced_accuracy'])
    for name, r in rows.items():
        print(f'{name:24}', {k: {m: round(v, 3) for m, v in r[k].items()} for k in ('by_patient', 'held_out')})
    print('chosen:', chosen)
    write_result(RESULTS / 'choose_augmentation.json', dict(about(), machine=machine(), network=NETWORK, candidates=rows, chosen=chosen))
