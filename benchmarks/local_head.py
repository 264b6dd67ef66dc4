"""What do local images buy beyond a threshold? The head of a network is moved towards n labelled images of a new place
(`stats.recalibration.adapt_head`), and the others are predicted; beside it the frozen threshold and the moved threshold.

    python benchmarks/local_head.py --runs RUNS                 ->  benchmarks/results/local_head.json: its clusters
    python benchmarks/local_head.py --runs RUNS --published     ->  the published test as well, and local_head.csv.gz

Two encoders, both EfficientNet-Lite0 from ImageNet. `frozen`: not trained further, 224 px; the head is a logistic regression on the 944
numbers of an image, fitted on the Kaggle training images (`frozen_encoder.py` says how). `fine-tuned`: trained networks; the head reads
their logit and the 112 numbers of their middle that the input check reads, as `covid-cxr calibrate --head` does. For the published test
RUNS/pneumonia-resnet-imagenet-seed42 (covid-cxr reproduce --arms imagenet), for the clusters RUNS/wide-fold0 to 2
(`choose_augmentation.py`).

First the strength that holds the head is chosen. The training images are sorted into three clusters of look-alike patients per class; the
head is fitted on two of them and moved towards 50 images of the third, drawn by patient; the strength with the highest mean balanced
accuracy on the others is taken. Then the published test, once per encoder and seed, 200 draws each: PLAN.md was there before. What is
finished is not done again. The features take three minutes of a quiet core, every draw a twentieth of a second.
"""
import argparse, json
from pathlib import Path
from record import RESULTS, about, machine, write_compressed, write_result
import numpy as np, pandas as pd
from scipy.special import expit, logit
from sklearn.metrics import roc_auc_score
from frozen_encoder import SEEDS, arm_recipe, make_learner
from covid_cxr.cache import ImageCache
from covid_cxr.core import data_folder, used
from covid_cxr.evaluate import check_two_classes, choose_threshold
from covid_cxr.learner import embed_images, fit_frozen
from covid_cxr.predict import load_predictor
from covid_cxr.recipe import build_table, override
from covid_cxr.runs.folder import RunFolder
from covid_cxr.stats.recalibration import SIZES, LinearHead, adapt_head, calibrate_locally, draw_patients, reference_of

TASK, ARM, OUT = 'pneumonia-resnet', 'imagenet', RESULTS / 'local_head.json'
CLUSTERS, CLUSTER_DRAWS, DRAWS, CHOSEN_AT = 3, 40, 200, 50
STRENGTHS = (3., 10., 30., 100., 300., 1000.)
METRICS = ('auc', 'accuracy', 'recall', 'specificity')
ENCODERS = {'frozen': SEEDS, 'fine-tuned': (42,)}      # and their seeds on the published test


# ---- features and heads
def of_linear(last):
    "The last layer of two classes as one"
    weights, bias = (v.detach().double().numpy() for v in (last.weight, last.bias))
    return LinearHead(weights[1] - weights[0], float(bias[1] - bias[0]))


def frozen(recipe, runs, data):
    "(table of the used images, their features, the head that is fitted on the training images)"
    table = used(build_table(recipe, data, runs / 'cache'))
    learn = make_learner(recipe, table, runs, SEEDS[0])
    fit_frozen(learn, runs / 'features', log=len)
    norm, last = learn.model[1][2], learn.model[1][-1]
    x = embed_images(learn, table['path'].tolist(), runs / 'features') - norm.running_mean.numpy()
    return table, x / np.sqrt(norm.running_var.numpy() + norm.eps), of_linear(last)


def fine_tuned(folder, runs, bs=64):
    "The same of a trained network: its logit and what it sees half-way, standardised as its training images were; a head of the logit"
    run, predictor = RunFolder.open(folder), load_predictor(folder, backend='torch')
    table, store, check = used(run.table), ImageCache(runs / 'cache' / 'images', predictor.rule), predictor.feature_check
    table = table[table['split'].isin(['valid', 'test'])].reset_index(drop=True)
    pixels = [store.get(p) for p in table['path']]
    p = np.concatenate([predictor.probabilities(pixels[i:i + bs])[:, 1] for i in range(0, len(pixels), bs)])
    x = (predictor.features(pixels, bs)[:, :len(check.mean)].astype(float) - check.mean) / check.spread
    return table, np.column_stack([logit(np.clip(p, 1e-6, 1 - 1e-6)), x]), LinearHead(np.r_[1., np.zeros(x.shape[1])], 0.)


# ---- one place
def scored(y, logits, cut):
    "AUC, accuracy, sensitivity, specificity"
    right = (logits >= cut) == (y == 1)
    return dict(auc=roc_auc_score(y, logits), accuracy=right.mean(), recall=right[y == 1].mean(), specificity=right[y == 0].mean())


class Place:
    "Images of a new place, a head that was fitted elsewhere, and what the validation images of that say"

    def __init__(self, table, x, head):
        valid, there = ((table['split'] == s).to_numpy() for s in ('valid', 'test'))
        y, logits = (table['label'] == 'pneumonia').to_numpy(int), head.logits(x)
        self.x, self.y, self.head, self.logits = x[there], y[there], head, logits[there]
        self.threshold = choose_threshold(y[valid], expit(logits[valid]), classes=(0, 1)).threshold
        self.reference = reference_of(y[valid], expit(logits[valid]), self.threshold, (0, 1))
        self.scores = check_two_classes(self.y, expit(self.logits), table['group'].to_numpy()[there], (0, 1))

    def one_way(self, drawn, strength):
        "(logits of the other images, cut) with a moved threshold (strength None) or a moved head"
        y = self.y[drawn]
        if strength is not None: return adapt_head(self.x[drawn], y, self.head, strength, (0, 1)).logits(self.x[~drawn]), 0.
        found = calibrate_locally(y, expit(self.logits[drawn]), self.reference, classes=(0, 1))
        return self.logits[~drawn], logit(found.threshold)

    def draws(self, n, draws, ways, seed):
        "One row per draw and way: metrics on the images that were not drawn"
        for k, drawn in enumerate(draw_patients(self.scores, n, draws, seed)):
            y = self.y[~drawn]
            yield dict(n=n, draw=k, way='frozen', **scored(y, self.logits[~drawn], logit(self.threshold)))
            for way, strength in ways.items(): yield dict(n=n, draw=k, way=way, **scored(y, *self.one_way(drawn, strength)))


# ---- the clusters choose
def cluster_place(encoder, fold, runs, data):
    if encoder == 'fine-tuned': return Place(*fine_tuned(runs / f'wide-fold{fold}', runs))
    clusters = {'split.kind': 'cluster', 'split.n_folds': CLUSTERS, 'split.valid_pct': .15, 'split.fold': fold}
    return Place(*frozen(override(arm_recipe(TASK, ARM, SEEDS[0]), clusters), runs, data))


def of_clusters(encoder, runs, data):
    "Balanced accuracy and AUC of every strength, cluster by cluster"
    ways, rows = {'threshold': None, **{f'head {s:g}': s for s in STRENGTHS}}, []
    for fold in range(CLUSTERS):
        place = cluster_place(encoder, fold, runs, data)
        t = pd.DataFrame(place.draws(CHOSEN_AT, CLUSTER_DRAWS, ways, SEEDS[0]))
        means = t.assign(balanced=(t['recall'] + t['specificity']) / 2).groupby('way', sort=False)[['auc', 'balanced']].mean()
        rows += [dict(fold=fold, images=len(place.y), way=way, auc=float(m.auc), balanced_accuracy=float(m.balanced))
                 for way, m in means.iterrows()]
        print(encoder, fold, means.round(4).to_string(), sep='\n', flush=True)
    return rows


def choose(rows):
    "The strength with the highest balanced accuracy, mean of the clusters"
    means = pd.DataFrame(rows).groupby('way')['balanced_accuracy'].mean()
    return max(STRENGTHS, key=lambda s: means[f'head {s:g}'])


# ---- the published test
def published_place(encoder, seed, runs, data):
    if encoder == 'fine-tuned': return Place(*fine_tuned(runs / f'{TASK}-{ARM}-seed{seed}', runs))
    return Place(*frozen(arm_recipe(TASK, ARM, seed), runs, data))


def of_published_test(encoder, runs, data, strength):
    "A row for every seed, size, draw and way"
    ways, rows = dict(threshold=None, head=strength), []
    for seed in ENCODERS[encoder]:
        place = published_place(encoder, seed, runs, data)
        for n in SIZES: rows += [dict(encoder=encoder, seed=seed, **r) for r in place.draws(n, DRAWS, ways, seed)]
        print(encoder, seed, len(place.y), 'images', flush=True)
    return pd.DataFrame(rows)


def summarise(t):
    "Mean of the draws of all seeds, and between which values 95 % of them lie"
    out = []
    for (encoder, n, way), of in t.groupby(['encoder', 'n', 'way'], sort=False):
        ends = of[list(METRICS)].quantile([.025, .975])
        found = {m: dict(value=float(of[m].mean()), low=float(ends[m].iloc[0]), high=float(ends[m].iloc[1])) for m in METRICS}
        out.append(dict(encoder=encoder, n=int(n), way=way, seeds=int(of['seed'].nunique()), draws=len(of), **found))
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--runs', type=Path, required=True, help='folder of the trained networks, for features and decoded images')
    p.add_argument('--encoders', nargs='+', choices=ENCODERS, default=list(ENCODERS))
    p.add_argument('--published', action='store_true', help='the published test too, with the strength that the clusters chose')
    a = p.parse_args()
    data, found = data_folder(), json.loads(OUT.read_text()) if OUT.is_file() else dict(clusters={}, strength={})
    for encoder in (e for e in a.encoders if e not in found['clusters']):
        rows = of_clusters(encoder, a.runs, data)
        found['clusters'][encoder], found['strength'][encoder] = rows, choose(rows)
        write_result(OUT, {**found, **about(), 'machine': machine(), 'task': TASK, 'chosen_at': CHOSEN_AT})
    print('strength:', found['strength'])
    if not a.published: return
    file = OUT.with_suffix('.csv.gz')
    kept = pd.read_csv(file) if file.is_file() else pd.DataFrame(dict(encoder=[]))
    new = [of_published_test(e, a.runs, data, found['strength'][e]) for e in a.encoders if e not in set(kept['encoder'])]
    write_compressed(OUT.with_suffix('.csv'), pd.concat([*([kept] if len(kept) else []), *new]).round(5))
    found['published'] = summarise(pd.read_csv(file))
    write_result(OUT, {**json.loads(OUT.read_text()), **found})
    for r in found['published']: print(r['encoder'], r['n'], r['way'], {m: round(r[m]['value'], 3) for m in METRICS})


if __name__ == '__main__': main()
