"""Was the picture of article 2 an exception? LIME and Grad-CAM over every false positive of the published test, and what becomes of the
false positives when the diaphragm and the breastbone are black.

    python benchmarks/explain_errors.py --runs RUNS --cache CACHE

RUNS holds three finished runs, all EfficientNet-Lite0 from ImageNet weights at 128 px: pneumonia-explained-imagenet-seed42 and
pneumonia-suppressed-imagenet-seed42 (covid-cxr reproduce --arms imagenet), and pneumonia-explained-honest-imagenet-audited
(benchmarks/audit_articles.py). They keep the last of equally many epochs, so nothing but the images differs between the last two.
Four questions, each one entry of the result:

maps      every healthy image that pneumonia-explained predicts ill at one half, and as many ill and as many healthy images that it predicts
          rightly (drawn with --seed): how much of LIME's weight and of Grad-CAM lies in the regions, over their share of the image, next to
          the same for copies of the network with random weights; how much LIME says the prediction owes to a region ("pull"); and whether
          LIME says the same twice
test      the frozen networks, with the regions covered in the test images only; next to shams of the same area and shape elsewhere
trained   the suppressed network, which never saw the regions, against the leak-safe one of whole images, image by image, each at its
          frozen threshold, at one half, and at one sensitivity
lungs     how much of the drawn lungs of adults the boxes hide

--only makes some of the entries again and leaves the others in benchmarks/results/explain_errors.json as they are.
Intervals: 95 %, over patients.
"""
import argparse, json, sys, time
from pathlib import Path
from record import RESULTS, about, write_result
import numpy as np, pandas as pd, torch
from lung_box import read_masks
from covid_cxr.audit.explain import RandomTwin, grad_cam, lime_explain, network_input, rank_correlation, share_in_region
from covid_cxr.audit.perturb import to_logit
from covid_cxr.audit.regions import border_ring
from covid_cxr.cache import ImageCache
from covid_cxr.core import data_folder, used
from covid_cxr.evaluate import check_scores, group_resamples, percentile_interval
from covid_cxr.images import SUPPRESSED, suppressed_region
from covid_cxr.predict import load_predictor
from covid_cxr.runs.compare import compare_runs, read_evaluated
from covid_cxr.runs.folder import RunFolder
from covid_cxr.stats.bootstrap import patient_mean
from covid_cxr.stats.paired import compare_accuracy, compare_auc, paired_difference

OUT, RING, CELLS, CLASSES = RESULTS / 'explain_errors.json', .08, 16, ('normal', 'pneumonia')
RUNS = dict(article='pneumonia-explained-imagenet-seed42', honest='pneumonia-explained-honest-imagenet-audited',
            suppressed='pneumonia-suppressed-imagenet-seed42')
PLACES = tuple(n for n in SUPPRESSED if n != 'none')


# ---- places
def border(size): return border_ring(size, size, RING)

def regions(size): return {**{n: suppressed_region(n, size) for n in PLACES}, 'border': border(size)}

def shams(name, size):
    "Places of the same shape and area as a region: the band on top instead of below, the strip in the left or the right half"
    strip, band, aside = suppressed_region('sternum', size), np.flipud(suppressed_region('diaphragm', size)), round(.24 * size)
    if name == 'diaphragm': return {'band on top': band}
    both = name == 'diaphragm+sternum'   # under a band on top the strip goes down, or they would overlap; a twelfth lies in the region
    down = int(band.any(1).sum() - np.flatnonzero(strip.any(1))[0]) if both else 0
    first = 'band on top, ' if both else ''
    ways = (('left', -aside), ('right', aside))
    return {f'{first}strip moved {to}': (band & both) | np.roll(strip, (down, way), (0, 1)) for to, way in ways}

def cover(images, mask, fill=None): # fill: None is black, else a (h, w) picture
    out = images.copy()
    out[:, mask] = 0 if fill is None else np.asarray(fill).round().astype(np.uint8)[mask]
    return out


# ---- numbers
def estimate(values, groups, n_boot=2000, seed=0):
    "Mean with its interval over patients"
    e = patient_mean(values, np.asarray(groups, object), n_boot, seed)
    return dict(value=e.value, low=e.low, high=e.high, n=e.n, patients=len(set(np.asarray(groups, object).tolist())))

def resampled_means(values, groups, n_boot, seed):
    s = check_scores(np.zeros(len(values), int), np.zeros(len(values)), np.asarray(groups, object))
    return np.concatenate([(w @ np.asarray(values, float)) / w.sum(1) for w in group_resamples(s, n_boot, seed)])

def difference_of_means(first, second, groups, n_boot=2000, seed=0):
    "Difference of the means of two sets of images of different patients, with its interval"
    draws = [resampled_means(v, g, n_boot, seed + k) for k, (v, g) in enumerate(zip((first, second), groups))]
    low, high, _ = percentile_interval(draws[0] - draws[1])
    return dict(difference=float(np.mean(first) - np.mean(second)), low=low, high=high)

def shares(maps, mask):
    "Per image: share of the map inside, over the share of the picture; NaN for an empty map"
    total = np.abs(maps).sum((1, 2))
    with np.errstate(invalid='ignore', divide='ignore'):
        return np.where(total > 0, np.abs(maps)[:, mask].sum(1) / total, np.nan) / mask.mean()

def pull(explanation, mask):
    "What LIME's linear model says the probability owes to a region: every weight times the share of its superpixel inside"
    n = len(explanation.weights)
    size = np.bincount(explanation.segments.ravel(), minlength=n)
    return float((explanation.weights * np.bincount(explanation.segments[mask], minlength=n) / size).sum())

def inside(explanation, mask):
    "Does most of the superpixel with the largest weight for the class lie in the region?"
    return float(mask[explanation.segments == explanation.weights.argmax()].mean() > .5)

def cells(maps):
    "(16, 16) mean of maps that each sum to 1 in absolute value, as multiples of an even map"
    total = np.abs(maps).sum((1, 2))
    m = (maps[total > 0] / total[total > 0, None, None]).mean(0) * maps[0].size
    k = maps.shape[1] // CELLS
    return m[:CELLS * k, :CELLS * k].reshape(CELLS, k, CELLS, k).mean((1, 3)).round(3).tolist()

def summary(values):
    low, middle, high = map(float, np.quantile(values, (.05, .5, .95)))
    return dict(median=middle, low=low, high=high, n=len(values))


# ---- images and networks
def images_of(run, predictor, cache, split='test', most=None, seed=0):
    "The rows of a split, and its images as the network takes them"
    t = used(RunFolder.open(run).table)
    t = t[t['split'] == split].reset_index(drop=True)
    if most and len(t) > most:
        t = t.iloc[np.sort(np.random.default_rng(seed).choice(len(t), most, replace=False))].reset_index(drop=True)
    store = ImageCache(Path(cache) / 'images', predictor.rule)
    return t, np.stack([store.get(p) for p in t['path']])

def scorer(predictor, bs=128):
    "A function of images that gives the probability of pneumonia"
    def score(x): return np.concatenate([predictor.probabilities(x[i:i + bs])[:, 1] for i in range(0, len(x), bs)])
    return score

def check_kept(run, t, p):
    "The exported network must answer what the run answered"
    kept = RunFolder.open(run).predictions.set_index('image_id').loc[t['image_id'], 'prob_pneumonia'].to_numpy()
    if np.abs(kept - p).max() > 1e-4:
        sys.exit(f'{run.name}: the network answers up to {np.abs(kept - p).max():.3g} away from predictions.csv; '
                 'the images or the bundle are not those of the run.')


# ---- maps
def lime_maps(score, x, samples, seed, segments=60, say=lambda i: None):
    "One LIME explanation per image"
    out = []
    for i, a in enumerate(x):
        out.append(lime_explain(score, a, n_segments=segments, n_samples=samples, seed=seed))
        say(i)
    return out

KINDS = {'lime': lambda es: np.stack([e.map for e in es]),
         'lime_for': lambda es: np.stack([np.maximum(e.map, 0) for e in es]),
         'lime_against': lambda es: np.stack([np.minimum(e.map, 0) for e in es])}

def share_row(maps, twins, groups, mask):
    "One region: the network, the mean over the twins, each twin, and the difference to their mean"
    own, other = shares(maps, mask), np.array([shares(m, mask) for m in twins])
    e, keep = share_in_region(maps, mask, groups), ~np.isnan(own)
    ratio = dict(value=e.value, low=e.low, high=e.high, n=e.n)
    row = dict(area=float(mask.mean()), share=float(own[keep].mean() * mask.mean()), ratio=ratio)
    if not len(other): return row
    with np.errstate(invalid='ignore'): mean = np.nanmean(other, 0)
    over = estimate((own - mean)[keep], np.asarray(groups, object)[keep])
    return dict(row, twin=estimate(mean, groups), twins=np.nanmean(other, 1).tolist(), over_twin=over)

def share_table(maps, twins, groups, size):
    return {name: share_row(maps, twins, groups, mask) for name, mask in regions(size).items()}

def cam_table(predictor, twins, x, groups):
    "Grad-CAM of the network, and its shares beside those of the twins; a twin whose maps are mostly empty is left out"
    cam = grad_cam(*network_input(predictor, x))
    cams = [grad_cam(t.model, network_input(predictor, x).x) for t in twins]
    drawn = [c for c in cams if c.any((1, 2)).mean() > .5]
    empty = dict(empty=int((~cam.any((1, 2))).sum()), empty_twins=[int((~c.any((1, 2))).sum()) for c in cams])
    return cam, dict(share_table(cam, drawn, groups, x.shape[1]), **empty)

def explain_group(predictor, twins, x, groups, a, say):
    "LIME and Grad-CAM of some images, the network's and the twins'"
    size, es = x.shape[1], lime_maps(scorer(predictor), x, a.samples, a.seed, say=say)
    other = [lime_maps(t.score, x, a.samples, a.seed, say=say) for t in twins]
    cam, of_cam = cam_table(predictor, twins, x, groups)
    out = dict(images=len(x), patients=int(pd.Series(groups).nunique()), fit=summary([e.fit for e in es]))
    if other: out['fit_twins'] = summary([e.fit for o in other for e in o])
    for kind, of in KINDS.items(): out[kind] = share_table(of(es), [of(o) for o in other], groups, size)
    out['grad_cam'] = of_cam
    places = {**regions(size), 'whole': np.ones((size, size), bool)}
    out['pull'] = {n: estimate([pull(e, m) for e in es], groups) for n, m in places.items()}
    def count(some, m): return int(sum(inside(e, m) for e in some))
    out['loudest'] = {n: dict(images=count(es, m), twins=[count(o, m) for o in other]) for n, m in regions(size).items()}
    out['mean_map'] = dict(lime=cells(KINDS['lime'](es)), grad_cam=cells(cam))
    if other: out['mean_map']['lime_twins'] = cells(np.concatenate([KINDS['lime'](o) for o in other]))
    return out, es, cam

def compare_explanations(first, second):
    "How alike two explanations of the same images are"
    correlation = summary([rank_correlation(u.weights, v.weights) for u, v in zip(first, second)])
    same = int(sum(u.weights.argmax() == v.weights.argmax() for u, v in zip(first, second)))
    return dict(rank_correlation=correlation, same_loudest=same, images=len(first))

def stability(predictor, x, groups, first, a, say):
    "LIME again: other random blanks, more of them, and larger and smaller superpixels"
    score, size = scorer(predictor), x.shape[1]
    def ratios(es): return {n: r['ratio'] for n, r in share_table(KINDS['lime'](es), [], groups, size).items()}
    again = lime_maps(score, x, a.samples, a.seed + 1, say=say)
    more = [lime_maps(score, x[:24], 1000, a.seed + k, say=say) for k in (2, 3)]
    out = dict(samples=a.samples, again=compare_explanations(first, again), more=dict(compare_explanations(*more), samples=1000),
               superpixels=summary([len(e.weights) for e in first]), ratios_again=ratios(again), ratios_by_superpixels={})
    for k in (30, 120):
        es = lime_maps(score, x, a.samples, a.seed, k, say)
        mean, fit = float(np.mean([len(e.weights) for e in es])), float(np.median([e.fit for e in es]))
        out['ratios_by_superpixels'][str(k)] = dict(superpixels=mean, fit=fit, regions=ratios(es))
    return out

def agreement(es, cam): # LIME's green against Grad-CAM, image by image
    r = [rank_correlation(np.maximum(e.map, 0), c) for e, c in zip(es, cam)]
    return summary([v for v in r if not np.isnan(v)])

def choose_sets(y, p, a):
    "Positions of every false positive, and of as many ill and as many healthy images that were predicted rightly"
    rng, false = np.random.default_rng(a.seed), np.flatnonzero(~y & (p >= .5))
    def pick(where): return np.sort(rng.choice(np.flatnonzero(where), len(false), replace=False))
    sets = dict(false_positives=false, true_positives=pick(y & (p >= .5)), true_negatives=pick(~y & (p < .5)))
    return {k: v[:a.images] for k, v in sets.items()} if a.images else sets

def against_others(found, sets, groups, size):
    "False positives against the other two sets: share of the map, and pull"
    out = {}
    for n, m in regions(size).items():
        for k in ('true_positives', 'true_negatives'):
            both, where = [found[v][0] for v in ('false_positives', k)], [groups[sets[v]] for v in ('false_positives', k)]
            ratio = difference_of_means(*(shares(KINDS['lime'](es), m) for es in both), where)
            pulled = difference_of_means(*([pull(e, m) for e in es] for es in both), where)
            out.setdefault(k, {})[n] = dict(ratio=ratio, pull=pulled)
    return out

def counts_of(y, p):
    "Images of each kind at one half"
    ill = p >= .5
    return dict(false_positives=int((~y & ill).sum()), healthy=int((~y).sum()), true_positives=int((y & ill).sum()), ill=int(y.sum()),
                accuracy=float((ill == y).mean()))

def measure_maps(a):
    "Every false positive and as many others: where LIME and Grad-CAM point"
    run = a.runs / RUNS['article']
    predictor = load_predictor(run)
    t, x = images_of(run, predictor, a.cache)
    p, y, groups = scorer(predictor)(x), (t['label'] == 'pneumonia').to_numpy(), t['group'].to_numpy(object)
    check_kept(run, t, p)
    sets, twins, start, found = choose_sets(y, p, a), [RandomTwin(predictor, x, s) for s in range(a.twins)], time.time(), {}
    def say(i):
        if i % 24 == 0: print(f'{time.time() - start:6.0f} s', flush=True)
    out = dict(run=run.name, threshold=.5, images=len(y), seed=a.seed, samples=a.samples, twins=a.twins, ring=RING, cells=CELLS,
               boxes={k: v for k, v in SUPPRESSED.items() if k in ('sternum', 'diaphragm')}, counts=counts_of(y, p))
    for name, at in sets.items():
        print(name, len(at), flush=True)
        compared = twins if name != 'true_negatives' else []
        out[name], *found[name] = explain_group(predictor, compared, x[at], groups[at], a, say)
        out[name].update(probability=summary(p[at]), agreement=agreement(*found[name]))
    at = sets['false_positives']
    again = stability(predictor, x[at], groups[at], found['false_positives'][0], a, say)
    return dict(out, false_positives_against=against_others(found, sets, groups, x.shape[1]), stability=again)


# ---- regions covered in the test images
def plain(d): return {k: getattr(d, k) for k in ('first', 'second', 'difference', 'low', 'high', 'p')}

def differences(y, first, second, groups, threshold, n_boot=2000, seed=0):
    "First minus second on the same images: AUC, accuracy, false positive rate, sensitivity"
    def paired(metric):
        return paired_difference(y, first, second, groups, metric, (threshold, threshold), classes=CLASSES, n_boot=n_boot, seed=seed)
    out = dict(auc=plain(compare_auc(y, first, second, groups, classes=CLASSES)))
    return dict(out, **{m: plain(paired(m)) for m in ('accuracy', 'false_positive_rate', 'recall')})

def moved(y, before, after, threshold):
    "Healthy and ill images: how many are predicted ill, before and after, and how far the log-odds moved"
    out = {}
    for name, at in (('healthy', y == 'normal'), ('ill', y == 'pneumonia')):
        b, c = before[at] >= threshold, after[at] >= threshold
        shift = float((to_logit(after[at]) - to_logit(before[at])).mean())
        out[name] = dict(images=int(at.sum()), predicted_ill_before=int(b.sum()), after=int(c.sum()), no_longer=int((b & ~c).sum()),
                         newly=int((~b & c).sum()), logit_shift=shift)
    return out

def suppress_test(score, x, y, groups, threshold, fill=None, n_boot=2000):
    "Every region against the whole image and against its shams"
    whole, out = score(x), {}
    def against(p, q): return differences(y, p, q, groups, threshold, n_boot)
    def row(p, mask): return dict(area=float(mask.mean()), against_whole=against(p, whole), moved=moved(y, whole, p, threshold))
    for name in PLACES:
        mask, rows = suppressed_region(name, x.shape[1]), []
        covered = score(cover(x, mask, fill))
        for what, place in shams(name, x.shape[1]).items():
            assert place.sum() == mask.sum(), (name, what)
            p = score(cover(x, place, fill))
            rows.append(dict(row(p, place), place=what, region_against_it=against(covered, p)))
        out[name] = dict(row(covered, mask), shams=rows)
    return out

def measure_test(a):
    "The frozen networks with the regions covered in the test images only"
    out = {}
    for key in ('article', 'honest'):
        run = a.runs / RUNS[key]
        predictor = load_predictor(run)
        t, x = images_of(run, predictor, a.cache)
        mean, score = images_of(run, predictor, a.cache, 'train', 1000, a.seed)[1].mean(0), scorer(predictor)
        check_kept(run, t, score(x))
        threshold, y, groups = .5 if key == 'article' else predictor.threshold, t['label'].to_numpy(object), t['group'].to_numpy(object)
        fills = {n: suppress_test(score, x, y, groups, threshold, fill) for n, fill in (('black', None), ('mean image', mean))}
        out[key] = dict(run=run.name, images=len(t), patients=int(t['group'].nunique()), threshold=threshold, frozen=key == 'honest',
                        mean_of=1000, fills=fills)
        print(key, 'done', flush=True)
    return out


# ---- regions covered in training too
def two_predictions(y, first, second, groups, at):
    "Two classifiers on some of the images: share right, difference, and images that only one got right"
    d = compare_accuracy(y[at], first[at], second[at], groups[at])
    return dict(images=int(at.sum()), **plain(d), only_first_right=d.only_first, only_second_right=d.only_second)

def false_positives_at(y, p, sensitivity, w=None):
    "False positive rate at the highest threshold that finds this share of the ill; w: how often every image counts"
    w = np.ones(len(y)) if w is None else w
    ill = y == 'pneumonia'
    order = np.argsort(-p[ill], kind='stable')
    threshold = p[ill][order][np.searchsorted(np.cumsum(w[ill][order]), sensitivity * w[ill].sum() - 1e-9)]
    return float(w[~ill & (p >= threshold)].sum() / w[~ill].sum())

def matched(y, first, second, groups, sensitivity, n_boot=2000, seed=0):
    "False positive rates of two networks at one sensitivity on these images, and their difference with its interval"
    s = check_scores(y, first, groups, CLASSES)
    def both(w=None): return [false_positives_at(y, p, sensitivity, w) for p in (first, second)]
    draws = np.array([both(w) for block in group_resamples(s, n_boot, seed) for w in block])
    low, high, _ = percentile_interval(draws[:, 0] - draws[:, 1])
    u, v = both()
    return dict(sensitivity=sensitivity, resamples=n_boot, first=u, second=v, difference=u - v, low=low, high=high)

def measure_trained(a):
    "Two trainings on the same images: with the regions black, and on whole images"
    names = [RUNS['suppressed'], RUNS['honest']]
    pair = [read_evaluated(a.runs / n) for n in names]
    c = compare_runs(*(a.runs / n for n in names), record=False)
    ids = sorted(pair[0].test.index)
    y, groups = (pair[0].test.loc[ids, k].to_numpy(object) for k in ('label', 'group'))
    p, thresholds, healthy = [j.scores(ids) for j in pair], [j.threshold for j in pair], y == 'normal'
    kinds = dict(all=np.ones(len(y), bool), healthy=healthy, ill=~healthy)
    def at(cuts):
        predicted = [np.where(v >= t, 'pneumonia', 'normal').astype(object) for v, t in zip(p, cuts)]
        return {k: two_predictions(y, *predicted, groups, m) for k, m in kinds.items()}
    return dict(first=names[0], second=names[1], images=c.n_images, patients=c.n_groups, thresholds=thresholds,
                epochs=[RunFolder.open(a.runs / n).state['epochs'] for n in names], at_sensitivity=matched(y, *p, groups, .95),
                pairs=c.to_dict()['pairs'], frozen=at(thresholds), half=at((.5, .5)), healthy=int(healthy.sum()),
                false_positives=[int(((v >= t) & healthy).sum()) for v, t in zip(p, thresholds)])


# ---- lungs
def hidden(masks, region):
    "Per mask: the share of its lung pixels that the region hides"
    return np.array([(m & region).sum() / m.sum() for m in masks if m.any()])

def measure_lungs(a, size=128):
    "How much of the drawn lungs of adults the boxes hide"
    masks = read_masks(a.data, size, 'squash')
    out = dict(masks=len(masks), pixels=size, how='squash')
    for n, m in regions(size).items():
        share = hidden(masks, m)
        out[n] = dict(area=float(m.mean()), **summary(share), mean=float(share.mean()))
    return out


QUESTIONS = dict(maps=measure_maps, test=measure_test, trained=measure_trained, lungs=measure_lungs)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--runs', type=Path, required=True, help='folder that holds the three finished runs')
    p.add_argument('--data', type=Path, default=data_folder(), help='folder that holds covid-chestxray-dataset')
    p.add_argument('--cache', default='cache', help='folder of decoded images')
    p.add_argument('--only', choices=QUESTIONS, nargs='+', default=list(QUESTIONS))
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--samples', type=int, default=300, help='blanked images per LIME explanation')
    p.add_argument('--twins', type=int, default=3, help='networks with random weights')
    p.add_argument('--images', type=int, help='no more than so many images of each kind, to try it out')
    p.add_argument('--out', type=Path, default=OUT)
    a = p.parse_args()
    torch.set_num_threads(1)
    out = json.loads(a.out.read_text()) if a.out.exists() else {}
    out.update(about())
    for name in a.only:
        out[name] = QUESTIONS[name](a)
        write_result(a.out, out)
        print(name, 'written', flush=True)
