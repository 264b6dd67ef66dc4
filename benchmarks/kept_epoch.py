"""Which weights to keep at the end of a training? The same phantoms and splits, ten seeds of the training; three ways to choose, from one
training each where they can share it: the epoch of the lowest validation loss, the epoch of the best mean over three epochs, the last
epoch, and the last epoch of averaged weights. The test AUC should be high, and should not depend on the seed.

    python benchmarks/kept_epoch.py          about ten minutes on one core

The result replaces benchmarks/results/kept_epoch.json.
"""
import argparse, os, tempfile
from pathlib import Path
os.environ.setdefault('OMP_NUM_THREADS', '1')
from record import RESULTS, about, machine, write_result
import numpy as np
from covid_cxr.cache import ImageCache
from covid_cxr.core import used
from covid_cxr.data import cxr_augment, cxr_dls
from covid_cxr.evaluate import evaluate
from covid_cxr.images import ImageRule
from covid_cxr.learner import Stage, cxr_learner, fit_stages, predict_table
from covid_cxr.phantom import write_phantom_trees
from covid_cxr.recipe import build_table, load_recipe

ARMS = {'best epoch': dict(keep='best'), 'best mean of three epochs': dict(keep='smooth'), 'last epoch': dict(keep='last'),
        'last epoch, weights averaged': dict(keep='last', average=.95)}


def test_auc(table, dls, seed, folder, how):
    "AUC on the test split after one training"
    learn = cxr_learner(dls, 'resnet18', 'none', 'weighted_loss', path=folder, seed=seed)
    fit_stages(learn, [Stage(10, lr=1e-3)], folder, seed=seed, log=lambda line: None, **how)
    rows = predict_table(learn, table[table['split'] == 'test'])
    return evaluate(rows['label'].to_numpy(object), rows['prob_covid'].to_numpy(), classes=dls.vocab, n_boot=0)['auc'].value


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', type=int, default=10)
    p.add_argument('--size', type=int, default=64)
    p.add_argument('--out', default=RESULTS / 'kept_epoch.json')
    a = p.parse_args()
    recipe, found = load_recipe('demo'), {name: [] for name in ARMS}
    with tempfile.TemporaryDirectory() as tmp:
        n = recipe.data.phantom_patients
        write_phantom_trees(Path(tmp, 'data'), seed=recipe.seed, size=2 * a.size, n_patients=n, n_normal=n // 2, n_pneumonia=n // 6)
        table, rule = used(build_table(recipe, Path(tmp, 'data'))), ImageRule(a.size)
        dls = cxr_dls(table, rule=rule, bs=16, classes=['other', 'covid'], device='cpu', augment=cxr_augment(5),
                      cache=ImageCache(Path(tmp, 'cache'), rule))
        for seed in range(a.seeds):
            for k, (name, how) in enumerate(ARMS.items()):
                found[name].append(round(test_auc(table, dls, seed, Path(tmp, f'{seed}-{k}'), how), 4))
            print(seed, {name: v[-1] for name, v in found.items()}, flush=True)
    rows = [dict(kept=name, mean=round(float(np.mean(v)), 4), sd=round(float(np.std(v, ddof=1)), 4), auc=v) for name, v in found.items()]
    images = int((table['split'] == 'test').sum())
    write_result(a.out, dict(about(), machine=machine(), seeds=a.seeds, pixels=a.size, test_images=images, arms=rows))
    for r in rows: print(f"{r['kept']:<30} mean {r['mean']:.3f}, SD over seeds {r['sd']:.3f}")


if __name__ == '__main__': main()
