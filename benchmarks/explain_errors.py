"""Was the picture of article 2 an anecdote? LIME and Grad-CAM over every false positive of the published test, and what becomes of them when the diaphragm and the breastbone are black.

    python benchmarks/explain_errors.py --runs RUNS --data ../shared/data --cache CACHE

RUNS holds the finished runs pneumonia-explained, pneumonia-explained-honest and pneumonia-suppressed (covid-cxr train NAME --size 64). Four questions, each a part of the result:

maps    every healthy film that pneumonia-explained calls ill at one half, and as many ill and as many healthy films that it calls right (drawn with --seed): how much of LIME's weight and of
        Grad-CAM lies in the regions, over their share of the picture, next to the same for copies of the network with random weights; how much LIME says the call owes to a region ("pull");
        and whether LIME says the same twice.
test    the frozen networks, with the regions covered in the test films only; next to shams of the same area and shape at another place.
trained pneumonia-suppressed, which never saw the regions, against pneumonia-explained-honest, film by film, each at its frozen threshold; and both after the same number of epochs.
lungs   how much of the drawn lungs of adults the boxes hide.

--only does some of the parts again and leaves the others in benchmarks/results/explain_errors.json as they are. Intervals: 95 %, over patients.
"""
import argparse, json, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import numpy as np, pandas as pd, torch
from covid_cxr.cache import ImageCache
from covid_cxr.stats.paired import compare_auc, compare_accuracy, paired_difference
from covid_cxr.core import used, versions
from covid_cxr.evaluate import check_scores, group_resamples, percentile_interval
from covid_cxr.audit.explain import grad_cam, lime_explain, network_input, randomise_weights, rank_correlation, share_in_region
from covid_cxr.images import SUPPRESSED, fit_to, read_grey, suppressed_region
from covid_cxr.audit.perturb import to_logit
from covid_cxr.predict import load_predictor
from covid_cxr.runs.train import load_table
from covid_cxr.runs.compare import compare_runs, read_evaluated

OUT, RING, CELLS, CLASSES = ROOT / 'benchmarks/results/explain_errors.json', .08, 16, ('normal', 'pneumonia')
RUNS = dict(article='pneumonia-explained', honest='pneumonia-explained-honest', suppressed='pneumonia-suppressed')
PARTS = ('maps', 'test', 'trained', 'lungs')


# ---- places -------------------------------------------------------------------------------------------------------------------------------------
def border(size):
    "The outer 8 % of the side, all round"
    k, out = round(RING * size), np.ones((size, size), bool)
    out[k:-k, k:-k] = False
    return out

def regions(size): return {**{n: suppressed_region(n, size) for n in SUPPRESSED if n != 'none'}, 'border': border(size)}

def shams(name, size):
    "Places of the same shape and area as a region: the band moved from the bottom to the top, the strip from the middle into the right and the left half of the picture"
    strip, band, aside = suppressed_region('sternum', size), np.flipud(suppressed_region('diaphragm', size)), round(.24 * size)
    if name == 'diaphragm': return {'band on top': band}
    both = name == 'diaphragm+sternum'            # under a band on top the strip goes down, or the two would overlap; a twelfth of this sham lies in the region itself
    down = int(band.any(1).sum() - np.flatnonzero(strip.any(1))[0]) if both else 0
    return {('band on top, ' if both else '') + f'strip moved {to}': (band & both) | np.roll(strip, (down, way), (0, 1)) for to, way in (('left', -aside), ('right', aside))}

def cover(images, mask, fill=None): # fill: None is black, else a (h, w) picture
    out = images.copy()
    out[:, mask] = 0 if fill is None else np.asarray(fill).round().astype(np.uint8)[mask]
    return out


# ---- numbers ------------------------------------------------------------------------------------------------------------------------------------
def estimate(values, groups, n_boot=2000, seed=0):
    "Mean with its interval over patients"
    values = np.asarray(values, float)
    s = check_scores(np.zeros(len(values), int), np.zeros(len(values)), np.asarray(groups, object))
    low, high, _ = percentile_interval(np.concatenate([(w @ values) / w.sum(1) for w in group_resamples(s, n_boot, seed)]))
    return dict(value=float(values.mean()), low=low, high=high, n=len(values), patients=s.n_groups)

def apart(first, second, groups, n_boot=2000, seed=0):
    "Difference of the means of two sets of films of different patients, with its interval"
    draws = []
    for v, g, k in zip((first, second), groups, (0, 1)):
        s = check_scores(np.zeros(len(v), int), np.zeros(len(v)), np.asarray(g, object))
        draws.append(np.concatenate([(w @ np.asarray(v, float)) / w.sum(1) for w in group_resamples(s, n_boot, seed + k)]))
    low, high, _ = percentile_interval(draws[0] - draws[1])
    return dict(difference=float(np.mean(first) - np.mean(second)), low=low, high=high)

def shares(maps, mask):
    "Per film: share of the map inside, over the share of the picture; NaN for an empty map"
    total = np.abs(maps).sum((1, 2))
    with np.errstate(invalid='ignore', divide='ignore'): return np.where(total > 0, np.abs(maps)[:, mask].sum(1) / total, np.nan) / mask.mean()

def pull(explanation, mask):
    "What LIME's linear model says the probability owes to a region: every weight times the part of its superpixel inside"
    size = np.bincount(explanation.segments.ravel(), minlength=len(explanation.weights))
    return float((explanation.weights * np.bincount(explanation.segments[mask], minlength=len(explanation.weights)) / size).sum())

def inside(explanation, mask):
    "Does most of the superpixel that speaks loudest for the class lie in the region?"
    return float(mask[explanation.segments == explanation.weights.argmax()].mean() > .5)

def cells(maps):
    "(16, 16) mean of maps that each sum to 1 in absolute value, as multiples of an even map"
    total = np.abs(maps).sum((1, 2))
    m = (maps[total > 0] / total[total > 0, None, None]).mean(0) * maps[0].size
    k = maps.shape[1] // CELLS
    return m[:CELLS * k, :CELLS * k].reshape(CELLS, k, CELLS, k).mean((1, 3)).round(3).tolist()


# ---- films --------------------------------------------------------------------------------------------------------------------------------------
def films_of(run, predictor, cache, part='test', most=None, seed=0):
    "The rows of a part, and its pictures as the network takes them"
    t = used(load_table(run / 'table.csv'))
    t = t[t['split'] == part].reset_index(drop=True)
    if most and len(t) > most: t = t.iloc[np.sort(np.random.default_rng(seed).choice(len(t), most, replace=False))].reset_index(drop=True)
    store = ImageCache(Path(cache) / 'images', predictor.rule)
    return t, np.stack([store.get(p) for p in t['path']])

def scorer(predictor, bs=128): return lambda x: np.concatenate([predictor.probabilities(x[i:i + bs])[:, 1] for i in range(0, len(x), bs)])

def check_kept(run, t, p):
    "The exported network must answer what the run answered"
    kept = pd.read_csv(run / 'predictions.csv').set_index('image_id').loc[t['image_id'], 'prob_pneumonia'].to_numpy()
    if np.abs(kept - p).max() > 1e-4: sys.exit(f'{run.name}: the network answers up to {np.abs(kept - p).max():.3g} away from predictions.csv; the films or the bundle are not those of the run.')

class Twin:
    "The network with random weights; its answers are centred and spread as a probability needs it, which a random network cannot do by itself"
    def __init__(self, predictor, seed, x):
        self.model, self.bundle = randomise_weights(predictor.model, seed).eval(), predictor.bundle
        self.mean, self.std = 0., 1.
        raw = self.logit(x)
        self.mean, self.std = raw.mean(), raw.std()
    def tensor(self, x): return (torch.from_numpy(np.ascontiguousarray(x))[:, None].float() / 255 - self.bundle['mean']) / self.bundle['std']
    def logit(self, x):
        with torch.inference_mode(): out = torch.cat([self.model(p) for p in self.tensor(np.asarray(x)).split(128)]).double().numpy()
        return (out[:, 1] - out[:, 0] - self.mean) / self.std
    def score(self, x): return 1 / (1 + np.exp(-self.logit(x)))


# ---- maps ---------------------------------------------------------------------------------------------------------------------------------------
def lime_maps(score, x, samples, seed, segments=60, say=lambda i: None):
    out = []
    for i, a in enumerate(x): out.append(lime_explain(score, a, n_segments=segments, n_samples=samples, seed=seed)); say(i)
    return out

KINDS = {'lime': lambda es: np.stack([e.map for e in es]), 'lime_for': lambda es: np.stack([np.maximum(e.map, 0) for e in es]), 'lime_against': lambda es: np.stack([np.minimum(e.map, 0) for e in es])}

def share_table(maps, twins, groups, size):
    "Per region: the network, the mean over the twins, each twin, and the difference to their mean"
    out = {}
    for name, mask in regions(size).items():
        own, other = shares(maps, mask), np.array([shares(m, mask) for m in twins])
        e, keep = share_in_region(maps, mask, groups), ~np.isnan(own)
        row = dict(area=float(mask.mean()), share=float(own[keep].mean() * mask.mean()), ratio=dict(value=e.value, low=e.low, high=e.high, n=e.n))
        if len(other):
            with np.errstate(invalid='ignore'): mean = np.nanmean(other, 0)
            row.update(twin=estimate(mean, groups), twins=np.nanmean(other, 1).tolist(), over_twin=estimate((own - mean)[keep], np.asarray(groups, object)[keep]))
        out[name] = row
    return out

def explain_group(predictor, twins, x, groups, a, say):
    "LIME and Grad-CAM of some films, the network's and the twins'"
    size, es = x.shape[1], lime_maps(scorer(predictor), x, a.samples, a.seed, say=say)
    other = [lime_maps(t.score, x, a.samples, a.seed, say=say) for t in twins]
    cam, cams = grad_cam(*network_input(predictor, x)), [grad_cam(t.model, t.tensor(x)) for t in twins]
    out = dict(films=len(x), patients=int(pd.Series(groups).nunique()), fit=summary([e.fit for e in es]), **(dict(fit_twins=summary([e.fit for o in other for e in o])) if other else {}))
    for kind, of in KINDS.items(): out[kind] = share_table(of(es), [of(o) for o in other], groups, size)
    out['grad_cam'] = dict(share_table(cam, [c for c in cams if c.any((1, 2)).mean() > .5], groups, size), empty=int((~cam.any((1, 2))).sum()), empty_twins=[int((~c.any((1, 2))).sum()) for c in cams])
    out['pull'] = {n: estimate([pull(e, m) for e in es], groups) for n, m in {**regions(size), 'whole': np.ones((size, size), bool)}.items()}
    out['loudest'] = {n: dict(films=int(sum(inside(e, m) for e in es)), twins=[int(sum(inside(e, m) for e in o)) for o in other]) for n, m in regions(size).items()}
    out['mean_map'] = dict(lime=cells(KINDS['lime'](es)), grad_cam=cells(cam), **(dict(lime_twins=cells(np.concatenate([KINDS['lime'](o) for o in other]))) if other else {}))
    return out, es, cam

def summary(values): return dict(zip(('median', 'low', 'high', 'n'), [*map(float, np.quantile(values, (.5, .05, .95))), len(values)]))

def stability(predictor, x, groups, first, a, say):
    "LIME again: other random blanks, more of them, and larger and smaller superpixels"
    score, size = scorer(predictor), x.shape[1]
    again = lime_maps(score, x, a.samples, a.seed + 1, say=say)
    more = [lime_maps(score, x[:24], 1000, a.seed + k, say=say) for k in (2, 3)]
    alike = lambda p, q: [rank_correlation(u.weights, v.weights) for u, v in zip(p, q)]
    same = lambda p, q: int(sum(u.weights.argmax() == v.weights.argmax() for u, v in zip(p, q)))
    out = dict(samples=a.samples, again=dict(rank_correlation=summary(alike(first, again)), same_loudest=same(first, again), films=len(x)),
               more=dict(samples=1000, rank_correlation=summary(alike(*more)), same_loudest=same(*more), films=len(more[0])), superpixels=summary([len(e.weights) for e in first]))
    out['ratios_again'] = {n: r['ratio'] for n, r in share_table(KINDS['lime'](again), [], groups, size).items()}
    out['ratios_by_superpixels'] = {}
    for k in (30, 120):
        es = lime_maps(score, x, a.samples, a.seed, k, say)
        out['ratios_by_superpixels'][str(k)] = dict(superpixels=float(np.mean([len(e.weights) for e in es])), fit=float(np.median([e.fit for e in es])), regions={n: r['ratio'] for n, r in share_table(KINDS['lime'](es), [], groups, size).items()})
    return out

def agreement(es, cam): # LIME's green against Grad-CAM, film by film
    r = [rank_correlation(np.maximum(e.map, 0), c) for e, c in zip(es, cam)]
    return summary([v for v in r if not np.isnan(v)])

def measure_maps(a):
    run = a.runs / RUNS['article']
    predictor = load_predictor(run)
    t, x = films_of(run, predictor, a.cache)
    p, y, g = scorer(predictor)(x), (t['label'] == 'pneumonia').to_numpy(), t['group'].to_numpy(object)
    check_kept(run, t, p)
    rng, fp = np.random.default_rng(a.seed), np.flatnonzero(~y & (p >= .5))
    pick = lambda where: np.sort(rng.choice(np.flatnonzero(where), len(fp), replace=False))
    sets = dict(false_positives=fp, true_positives=pick(y & (p >= .5)), true_negatives=pick(~y & (p < .5)))
    if a.films: sets = {k: v[:a.films] for k, v in sets.items()}
    twins, start = [Twin(predictor, s, x) for s in range(a.twins)], time.time()
    def say(i):
        if i % 24 == 0: print(f'{time.time() - start:6.0f} s', flush=True)
    out = dict(run=run.name, threshold=.5, images=len(y), seed=a.seed, samples=a.samples, twins=a.twins, ring=RING, cells=CELLS, boxes={k: v for k, v in SUPPRESSED.items() if k in ('sternum', 'diaphragm')},
               counts=dict(false_positives=int((~y & (p >= .5)).sum()), healthy=int((~y).sum()), true_positives=int((y & (p >= .5)).sum()), ill=int(y.sum()), accuracy=float(((p >= .5) == y).mean())))
    found = {}
    for name, at in sets.items():
        print(name, len(at), flush=True)
        out[name], *found[name] = explain_group(predictor, twins if name != 'true_negatives' else [], x[at], g[at], a, say)
        out[name]['probability'] = summary(p[at])
        out[name]['agreement'] = agreement(*found[name])
    size, other = x.shape[1], {}
    for n, m in regions(size).items():
        for k in ('true_positives', 'true_negatives'):
            both, where = [found[v][0] for v in ('false_positives', k)], [g[sets[v]] for v in ('false_positives', k)]
            other.setdefault(k, {})[n] = dict(ratio=apart(*(shares(KINDS['lime'](es), m) for es in both), where), pull=apart(*([pull(e, m) for e in es] for es in both), where))
    out.update(false_positives_against=other, stability=stability(predictor, x[fp[:len(sets['false_positives'])]], g[sets['false_positives']], found['false_positives'][0], a, say))
    return out


# ---- test-time suppression ----------------------------------------------------------------------------------------------------------------------
def differences(y, first, second, groups, threshold, n_boot=2000, seed=0):
    "First minus second on the same films: AUC, accuracy, false positives, sensitivity"
    short = lambda d: dict(first=d.first, second=d.second, difference=d.difference, low=d.low, high=d.high, p=d.p)
    out = dict(auc=short(compare_auc(y, first, second, groups, classes=CLASSES)))
    for m in ('accuracy', 'false_positive_rate', 'recall'): out[m] = short(paired_difference(y, first, second, groups, m, (threshold, threshold), classes=CLASSES, n_boot=n_boot, seed=seed))
    return out

def moved(y, before, after, threshold):
    "Healthy and ill films: how many are called ill, before and after, and how far the log-odds moved"
    out = {}
    for name, at in (('healthy', y == 'normal'), ('ill', y == 'pneumonia')):
        b, c = before[at] >= threshold, after[at] >= threshold
        out[name] = dict(films=int(at.sum()), called_ill_before=int(b.sum()), after=int(c.sum()), no_longer=int((b & ~c).sum()), newly=int((~b & c).sum()),
                         logit_shift=float((to_logit(after[at]) - to_logit(before[at])).mean()))
    return out

def suppress_test(score, x, y, groups, threshold, fill=None, n_boot=2000):
    "Every region against the whole film and against its shams"
    plain, out = score(x), {}
    for name in [n for n in SUPPRESSED if n != 'none']:
        mask = suppressed_region(name, x.shape[1])
        covered, rows = score(cover(x, mask, fill)), []
        for what, place in shams(name, x.shape[1]).items():
            assert place.sum() == mask.sum(), (name, what)
            p = score(cover(x, place, fill))
            rows.append(dict(place=what, area=float(place.mean()), against_whole=differences(y, p, plain, groups, threshold, n_boot), region_against_it=differences(y, covered, p, groups, threshold, n_boot), moved=moved(y, plain, p, threshold)))
        out[name] = dict(area=float(mask.mean()), against_whole=differences(y, covered, plain, groups, threshold, n_boot), moved=moved(y, plain, covered, threshold), shams=rows)
    return out

def measure_test(a):
    out = {}
    for key in ('article', 'honest'):
        run = a.runs / RUNS[key]
        predictor = load_predictor(run)
        t, x = films_of(run, predictor, a.cache)
        mean, score = films_of(run, predictor, a.cache, 'train', 1000, a.seed)[1].mean(0), scorer(predictor)
        check_kept(run, t, score(x))
        threshold = .5 if key == 'article' else predictor.threshold
        out[key] = dict(run=run.name, images=len(t), patients=int(t['group'].nunique()), threshold=threshold, frozen=key == 'honest', mean_of=1000,
                        fills={n: suppress_test(score, x, t['label'].to_numpy(object), t['group'].to_numpy(object), threshold, f) for n, f in (('black', None), ('mean film', mean))})
        print(key, 'done', flush=True)
    return out


# ---- trained suppression ------------------------------------------------------------------------------------------------------------------------
def two_calls(y, first, second, groups, at):
    d = compare_accuracy(y[at], first[at], second[at], groups[at])
    only = ((first == y) & (second != y) & at).sum(), ((first != y) & (second == y) & at).sum()
    return dict(films=int(at.sum()), first=d.first, second=d.second, difference=d.difference, low=d.low, high=d.high, p=d.p, only_first_right=int(only[0]), only_second_right=int(only[1]))

def false_alarms_at(y, p, sensitivity, w=None):
    "False positive rate at the highest threshold that calls this share of the ill films; w: how often every film counts"
    w = np.ones(len(y)) if w is None else w
    ill = y == 'pneumonia'
    order = np.argsort(-p[ill], kind='stable')
    threshold = p[ill][order][np.searchsorted(np.cumsum(w[ill][order]), sensitivity * w[ill].sum() - 1e-9)]
    return float(w[~ill & (p >= threshold)].sum() / w[~ill].sum())

def matched(y, first, second, groups, sensitivity, n_boot=1000, seed=0):
    "False positive rates of two networks at one sensitivity on these films, and their difference with its interval; no threshold that was frozen"
    s = check_scores(y, first, groups, CLASSES)
    both = lambda w=None: [false_alarms_at(y, p, sensitivity, w) for p in (first, second)]
    draws = np.array([both(w) for block in group_resamples(s, n_boot, seed) for w in block])
    low, high, _ = percentile_interval(draws[:, 0] - draws[:, 1])
    u, v = both()
    return dict(sensitivity=sensitivity, first=u, second=v, difference=u - v, low=low, high=high)

def last_epoch(run, cache):
    "Answers on the test films after the last epoch, whichever epoch the run kept; with the ids of the films"
    predictor = load_predictor(run)
    t, x = films_of(run, predictor, cache)
    check_kept(run, t, scorer(predictor)(x))
    predictor.model.load_state_dict(torch.load(run / 'checkpoints/last.pt', map_location='cpu', weights_only=True)['model'])
    return pd.Series(scorer(predictor)(x), t['image_id'])

def same_epochs(a, names, ids, y, p, groups):
    "Both networks after the same number of epochs; and how much the choice of the epoch alone is worth, in the one that saw whole films"
    last, n = [last_epoch(a.runs / k, a.cache).loc[ids].to_numpy() for k in names], [json.loads((a.runs / k / 'run.json').read_text()) for k in names]
    short = lambda d: dict(first=d.first, second=d.second, difference=d.difference, low=d.low, high=d.high, p=d.p)
    auc = lambda u, v: short(compare_auc(y, u, v, groups, classes=CLASSES))
    return dict(epochs=n[0]['epochs'], kept_epochs=[k['best_epoch'] for k in n], suppressed_against_whole=auc(*last), whole_last_against_kept=auc(last[1], p[1]), at_sensitivity=matched(y, *last, groups, .95))

def measure_trained(a):
    names = [RUNS['suppressed'], RUNS['honest']]
    first, second = (read_evaluated(a.runs / n) for n in names)
    c = compare_runs(*(a.runs / n for n in names), record=False)
    ids = sorted(first.test.index)
    y, groups = (first.test.loc[ids, k].to_numpy(object) for k in ('label', 'group'))
    p = [j.test.loc[ids, 'prob_pneumonia'].astype(float).to_numpy() for j in (first, second)]
    def at(thresholds):
        calls = [np.where(v >= t, 'pneumonia', 'normal').astype(object) for v, t in zip(p, thresholds)]
        return {k: two_calls(y, *calls, groups, m) for k, m in (('all', y == y), ('healthy', y == 'normal'), ('ill', y == 'pneumonia'))}
    d = c.to_dict()
    return dict(first=names[0], second=names[1], images=c.n_images, patients=c.n_groups, thresholds=[first.threshold, second.threshold], same_epochs=same_epochs(a, names, ids, y, p, groups), at_sensitivity=matched(y, *p, groups, .95), pairs=d['pairs'], words=c.words[:-1], frozen=at((first.threshold, second.threshold)), half=at((.5, .5)),
                false_positives=[int(((v >= t) & (y == 'normal')).sum()) for v, t in zip(p, (first.threshold, second.threshold))], healthy=int((y == 'normal').sum()))


# ---- lungs --------------------------------------------------------------------------------------------------------------------------------------
def hidden(masks, region):
    "Per mask: the share of its lung pixels that the region hides"
    return np.array([(m & region).sum() / m.sum() for m in masks if m.any()])

def measure_lungs(a, size=128):
    files = sorted((a.data / 'covid-chestxray-dataset/annotations/lungVAE-masks').glob('*.png'))
    if not files: sys.exit(f'no lung masks below {a.data}; give the folder that holds covid-chestxray-dataset with --data.')
    masks = np.stack([fit_to(read_grey(f), size, 'squash') > 127 for f in files])
    out = dict(masks=len(masks), pixels=size, how='squash')
    for n, m in regions(size).items(): out[n] = dict(area=float(m.mean()), **summary(hidden(masks, m)), mean=float(hidden(masks, m).mean()))
    return out


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--runs', type=Path, required=True)
    p.add_argument('--data', type=Path, default=Path('../shared/data'))
    p.add_argument('--cache', default='cache', help='decoded films')
    p.add_argument('--only', choices=PARTS, nargs='+', default=PARTS)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--samples', type=int, default=300, help='blanked pictures per LIME explanation')
    p.add_argument('--twins', type=int, default=3, help='networks with random weights')
    p.add_argument('--films', type=int, help='no more than so many films of each kind, to try it out')
    p.add_argument('--out', type=Path, default=OUT)
    a = p.parse_args()
    torch.set_num_threads(1)
    out = json.loads(a.out.read_text()) if a.out.exists() else {}
    out.update(command='python benchmarks/explain_errors.py --runs RUNS --data ../shared/data --cache CACHE', date=time.strftime('%Y-%m-%d'), versions=versions())
    for part in a.only:
        out[part] = globals()[f'measure_{part}'](a)
        a.out.write_text(json.dumps(out, indent=1) + '\n')
        print(part, 'written', flush=True)
