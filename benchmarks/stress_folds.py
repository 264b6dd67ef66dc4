"""What held-out clusters of training images foresee of the published test, and which way of using local images they favour:

    python benchmarks/stress_folds.py      ->  benchmarks/results/stress_folds.json, in about three minutes

The official training images of the Kaggle set are stressed; the published test is evaluated once, with the same classifier, after that.
The ways to move a threshold with local images are compared on the held-out clusters alone: no test image has a say in the choice.
"""
import argparse
from record import RESULTS, about, machine, write_result
import numpy as np, pandas as pd
from scipy.special import expit, logit
from covid_cxr.audit import stress
from covid_cxr.audit.stress import stress_test
from covid_cxr.curate.clusters import picture_features
from covid_cxr.core import data_folder
from covid_cxr.evaluate import check_two_classes, choose_threshold
from covid_cxr.images import ImageRule, load_image
from covid_cxr.recipe import build_table, load_recipe
from covid_cxr.stats.bootstrap import patient_wilson
from covid_cxr.stats.recalibration import _draw, _usable, divide_in_two


def pictures(table, size):
    return np.stack([np.asarray(load_image(p, ImageRule(size, 'squash')), np.uint8) for p in table['path']])


def encoded(images, bs=64):
    "(n, f) maximum and mean of the maps of the last three stages of an encoder that saw no label of ours"
    import torch
    from covid_cxr.model.backbones import load_encoder
    from covid_cxr.model.network import ConcatPool
    from covid_cxr.model.settings import MEAN, STD
    body, pool, out = load_encoder('efficientnet_lite0', 'imagenet').body.eval(), ConcatPool(), []
    with torch.no_grad():
        for k in range(0, len(images), bs):
            x = (torch.from_numpy(images[k:k + bs].astype(np.float32) / 255)[:, None] - MEAN) / STD
            maps = body.net.forward_intermediates(x * body.scale + body.shift, indices=[2, 3, 4], norm=False, intermediates_only=True)
            out.append(torch.cat([pool(m).flatten(1) for m in maps], 1).numpy())
    return np.concatenate(out)


def as_dict(found):
    worst = {m: found.worst(m)._asdict() for m in ('auc', 'recall', 'specificity')}
    return dict(by_patient=found.by_patient, worst=worst, folds=[f._asdict() for f in found.folds], left_out=found.left_out)


def published(x, y, groups, test):
    "The same classifier, trained on all training images, on the published test"
    train = ~test
    p = stress._scores(x[train], y[train], groups[train], 0, folds=5)
    threshold = choose_threshold(y[train], p).threshold
    q = stress._fit(x[train], y[train]).predict_proba(x[test])[:, 1]
    right = (q < threshold)[y[test] == 0]
    share = patient_wilson(right, groups[test][y[test] == 0])
    return dict(stress._found(y[test], q, threshold), specificity_low=share.low, specificity_high=share.high, images=int(test.sum()),
                groups=len(np.unique(groups[test])))


def middle(z, y, k): return np.median(z[y == k])


WAYS = {   # what is known of the local images -> {way: (z, y of the local images, z, y of validation, threshold) -> threshold}; all logits
    'both classes': {
        'best threshold': lambda z, y, v, w, t: float(logit(choose_threshold(y, expit(z)).threshold)),
        'mean shift of the two medians': lambda z, y, v, w, t: t + sum(middle(z, y, k) - middle(v, w, k) for k in (0, 1)) / 2},
    'negatives': {
        'quantile of the validation specificity': lambda z, y, v, w, t: np.quantile(z[y == 0], (v[w == 0] < t).mean()),
        'whole shift of the median': lambda z, y, v, w, t: t + middle(z, y, 0) - middle(v, w, 0),
        'half of the shift of the median': lambda z, y, v, w, t: t + (middle(z, y, 0) - middle(v, w, 0)) / 2},
    'none': {
        'equal share of positive predictions': lambda z, y, v, w, t: np.quantile(z, (v < t).mean()),
        'equal mean logit': lambda z, y, v, w, t: t + z.mean() - v.mean(),
        'two groups that differ most': lambda z, y, v, w, t: divide_in_two(z)}}


def balanced(y, predicted): return ((predicted == 1)[y == 1].mean() + (predicted == 0)[y == 0].mean()) / 2


def compare_ways(x, y, groups, sizes, draws):
    "Mean balanced accuracy of every way over the held-out clusters, each playing the new place"
    rows = []
    for k, (c, own, beside) in enumerate(stress._held_out(x, y, groups, 5, 0)):
        at = np.r_[own, beside]
        rest = ~np.isin(groups, np.unique(groups[at]))
        p = stress._scores(x[rest], y[rest], groups[rest], 0)
        v, w, t = logit(p), y[rest], float(logit(choose_threshold(y[rest], p).threshold))
        q = stress._fit(x[rest], y[rest]).predict_proba(x[at])[:, 1]
        z, s, rng = logit(q), check_two_classes(y[at], q, groups[at]), np.random.default_rng(k)
        rows.append(dict(fold=k, labels='', way='frozen threshold', n=0, value=balanced(y[at], z >= t)))
        for n in sizes:
            done = 0
            while done < draws:
                drawn = _draw(s, n, rng)
                if not _usable(s, drawn): continue
                done += 1
                for labels, ways in WAYS.items():
                    for way, of in ways.items():
                        moved = of(z[drawn], y[at][drawn], v, w, t)
                        rows.append(dict(fold=k, labels=labels, way=way, n=n, value=balanced(y[at][~drawn], z[~drawn] >= moved)))
    mean = pd.DataFrame(rows).groupby(['labels', 'way', 'n', 'fold'])['value'].mean().groupby(['labels', 'way', 'n']).mean()
    return [dict(zip(('labels', 'way', 'n'), k), balanced_accuracy=round(float(v), 4)) for k, v in mean.items()]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--size', type=int, default=64)
    p.add_argument('--draws', type=int, default=40)
    p.add_argument('--out', default=RESULTS / 'stress_folds.json')
    a = p.parse_args()
    t = build_table(load_recipe('pneumonia-explained-honest'), data_folder())
    t = t[t['split'].notna()].reset_index(drop=True)
    y, groups, test = (t['label'] == 'pneumonia').to_numpy().astype(int), t['group'].to_numpy(str), (t['split'] == 'test').to_numpy()
    images, by = pictures(t, a.size), {}
    for features, describe in {'ImageNet encoder': encoded, 'shades': picture_features}.items():
        x = describe(images)
        tests = [stress_test(x[~test], y[~test], groups[~test], ('normal', 'pneumonia'), seed=k) for k in range(3)]
        by[features] = dict(seeds=list(map(as_dict, tests)), published_test=published(x, y, groups, test))
        print(features, {k: v for k, v in by[features]['published_test'].items()}, flush=True)
        print(pd.DataFrame([s['worst']['specificity'] for s in by[features]['seeds']]).round(3).to_string(), flush=True)
        if features == 'shades': ways = compare_ways(x[~test], y[~test], groups[~test], (20, 50), a.draws)
    print(pd.DataFrame(ways).pivot(index=['labels', 'way'], columns='n', values='balanced_accuracy').to_string())
    counts = dict(images=int((~test).sum()), groups=len(np.unique(groups[~test])), size=a.size, draws=a.draws)
    write_result(a.out, dict(about(), machine=machine(), **counts, features=by, ways=ways))


if __name__ == '__main__': main()
