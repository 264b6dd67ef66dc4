"""Which weights to keep at the end of a training? The demonstration's network is fine-tuned on the same phantoms and splits with
several seeds, and four rules choose among its epochs: the lowest validation loss, the lowest mean loss of three epochs, the last epoch,
and the last epoch of averaged weights. The test AUC should be high, and should not depend on the seed. The first three rules choose
from one training; the averaged weights have a training of their own.

    python benchmarks/kept_epoch.py          about fifteen minutes on one core

The result replaces benchmarks/results/kept_epoch.json.
"""
import argparse, os, tempfile
from pathlib import Path
os.environ.setdefault('OMP_NUM_THREADS', '1')
from record import RESULTS, about, machine, write_result
import numpy as np, torch
from fastai.callback.core import Callback
from covid_cxr.cache import ImageCache
from covid_cxr.core import used
from covid_cxr.data import cxr_augment, cxr_dls
from covid_cxr.evaluate import evaluate
from covid_cxr.images import ImageRule
from covid_cxr.learner import Stage, cxr_learner, fit_stages, predict_table
from covid_cxr.phantom import write_phantom_trees
from covid_cxr.recipe import build_table, load_recipe

RULES = {   # from the validation losses of all epochs: which epoch, counted from 0
    'best epoch': lambda loss: int(np.argmin(loss)),
    'best mean of three epochs': lambda loss: int(np.argmin([np.mean(loss[max(0, i - 2):i + 1]) for i in range(len(loss))])),
    'last epoch': lambda loss: len(loss) - 1}
AVERAGED = 'last epoch, weights averaged'


def test_auc(rows, classes, scores):
    "AUC on the test split"
    return evaluate(rows['label'].to_numpy(object), scores, classes=classes, n_boot=0, metrics=['auc'])['auc'].value


class EveryEpoch(Callback):
    "Scores of the test split after every epoch, which no rule reads"
    def __init__(self, test): self.test, self.scores = test, []

    def after_epoch(self):
        self.model.eval()
        with torch.no_grad(): out = torch.cat([self.model(*batch).softmax(1)[:, 1] for batch in self.dls.test_dl(self.test)])
        self.scores.append(out.numpy())


def train(recipe, dls, test, seed, folder, epochs, average):
    "Validation losses and test AUCs of all epochs of one training, and the test AUC of the weights at its end"
    m, t, seen = recipe.model, recipe.training, EveryEpoch(test)
    learn = cxr_learner(dls, m.arch, m.weights, t.imbalance, head=m.head, dropout=m.dropout, path=folder, seed=seed)
    stages = [Stage(1, lr=.003, frozen=True), Stage(epochs, lr=.003)]
    fit = fit_stages(learn, stages, folder, seed=seed, keep='last', average=average, lr_ratio=t.lr_ratio, cbs=[seen], log=lambda line: None)
    end = predict_table(learn, test)
    aucs = [test_auc(test, dls.vocab, s) for s in seen.scores]
    return fit.history['valid_loss'].to_numpy(), aucs, test_auc(end, dls.vocab, end['prob_covid'].to_numpy())


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', type=int, default=8)
    p.add_argument('--epochs', type=int, default=8)
    p.add_argument('--size', type=int, default=64)
    p.add_argument('--patients', type=int, default=160)
    p.add_argument('--out', default=RESULTS / 'kept_epoch.json')
    a = p.parse_args()
    recipe, found, epochs = load_recipe('demo'), {name: [] for name in (*RULES, AVERAGED)}, {name: [] for name in RULES}
    with tempfile.TemporaryDirectory() as tmp:
        n = a.patients
        write_phantom_trees(Path(tmp, 'data'), seed=recipe.seed, size=2 * a.size, n_patients=n, n_normal=n // 2, n_pneumonia=n // 6)
        table, rule = used(build_table(recipe, Path(tmp, 'data'))), ImageRule(a.size)
        test = table[table['split'] == 'test']
        dls = cxr_dls(table, rule=rule, bs=16, classes=['other', 'covid'], device='cpu', augment=cxr_augment(5),
                      cache=ImageCache(Path(tmp, 'cache'), rule))
        for seed in range(a.seeds):
            loss, aucs, end = train(recipe, dls, test, seed, Path(tmp, f'{seed}'), a.epochs, 0.)
            assert abs(end - aucs[-1]) < 1e-3, 'the weights at the end are those of the last epoch'
            for name, rule_of in RULES.items():
                epochs[name].append(rule_of(loss) + 1)
                found[name].append(round(aucs[rule_of(loss)], 4))
            found[AVERAGED].append(round(train(recipe, dls, test, seed, Path(tmp, f'{seed}-averaged'), a.epochs, .95)[2], 4))
            print(seed, {name: v[-1] for name, v in found.items()}, flush=True)
    rows = [dict(kept=name, mean=round(float(np.mean(v)), 4), sd=round(float(np.std(v, ddof=1)), 4), auc=v,
                 epochs=epochs.get(name, [a.epochs + 1] * a.seeds)) for name, v in found.items()]
    counts = dict(seeds=a.seeds, epochs=a.epochs + 1, pixels=a.size, test_images=len(test))
    write_result(a.out, dict(about(), machine=machine(), **counts, arms=rows))
    for r in rows: print(f"{r['kept']:<30} mean {r['mean']:.3f}, SD over seeds {r['sd']:.3f}")


if __name__ == '__main__': main()
