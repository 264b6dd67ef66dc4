"""How often do the intervals of `evaluate` and of the paired comparisons cover the truth?

    python benchmarks/coverage.py            all settings
    python benchmarks/coverage.py --quick    a few samples of every setting, for a test
    python benchmarks/coverage.py --kinds differences    one kind; what is kept of the others stays

Samples of patients are drawn from a population whose true values are known: 60, 150 or 600 patients, of whom 15, 30 or 60 % are ill, with
one image each or with 1 to 5, and with 0 or 20 % of the patients having images of both classes. The images of a patient are alike: their
scores share half of their variance. The classes are drawn like everything else, so a sample of 60 patients has 9 ill ones on average, and
not always. Three kinds of settings:

predictions   true sensitivity and specificity .97 and .50, .85 and .85, .97 and .97
scores        true AUC .75, .90 and .98 (two normal distributions of one width); probabilities are calibrated
differences   two equally good models with this AUC, whose scores share half of their variance; predicted positive at the middle

Per metric and setting: the share of samples whose 95 % interval covers the true value, its standard error, and the samples that had an
interval. Metrics that need resamples get them in some of the samples only (RESAMPLED). Samples with fewer than two patients of a class are
not counted. Results go to benchmarks/results/coverage.json.
"""
import argparse, itertools, json, multiprocessing, os, warnings
os.environ.setdefault('OMP_NUM_THREADS', '1')
from record import RESULTS, about, load_average, machine, write_result
import numpy as np
from scipy import stats
from scipy.special import expit, logit
from covid_cxr.evaluate import BINARY, METRICS, Scores, compute_metrics, estimate_metrics, group_resamples
from covid_cxr.stats.paired import compare_accuracy, compare_auc, paired_difference

OUT = RESULTS / 'coverage.json'
PATIENTS, PREVALENCE = (60, 150, 600), (.15, .3, .6)
CLUSTERS = ((1, 0.), (5, 0.), (5, .2))                  # most images of a patient, share of patients with both classes
POINTS, AUCS = ((.97, .5), (.85, .85), (.97, .97)), (.75, .9, .98)
ALIKE = .5                                              # share of variance that the images of a patient, or two models, have in common
OF_PREDICTIONS = ('accuracy', 'balanced_accuracy', 'precision', 'recall', 'specificity', 'npv', 'f1', 'lr_positive', 'lr_negative', 'mcc',
                  'kappa')
OF_SCORES = ('auc', 'average_precision', 'brier', 'log_loss')


# ---- the population
def settings(kind):
    "Every setting of a kind, as a dict"
    for quality, n, p, (images, both) in itertools.product(POINTS if kind == 'predictions' else AUCS, PATIENTS, PREVALENCE, CLUSTERS):
        true = dict(sensitivity=quality[0], specificity=quality[1]) if kind == 'predictions' else dict(auc=quality)
        yield dict(true, patients=n, prevalence=p, images=images, both_classes=both)


def draw_labels(rng, patients, prevalence, images, both_classes, **_):
    "(n,) labels and (n,) patients of one sample"
    group = np.repeat(np.arange(patients), rng.integers(1, images + 1, patients))
    own, of_patient = rng.random(len(group)) < prevalence, rng.random(patients) < prevalence
    mixed = rng.random(patients) < both_classes
    return np.where(mixed[group], own, of_patient[group]).astype(int), group


def draw_noise(rng, group):
    "(n,) standard normal; the images of a patient are alike"
    return np.sqrt(ALIKE) * rng.standard_normal(group[-1] + 1)[group] + np.sqrt(1 - ALIKE) * rng.standard_normal(len(group))


def gap(auc): return stats.norm.ppf(auc) * np.sqrt(2)               # between the means of two normal distributions


# ---- the truth
def true_of_predictions(sensitivity, specificity, prevalence, **_):
    "{metric: its value in the population}"
    p = prevalence
    tp, fp, fn, tn = p * sensitivity, (1 - p) * (1 - specificity), p * (1 - sensitivity), (1 - p) * specificity
    matrix = np.array([[tn, fp], [fn, tp]])
    value = lambda m: m.compute(matrix) if m.scope == 'all' else m.compute(tp, fp, fn, tn)
    return {m: float(value(METRICS[m])) for m in OF_PREDICTIONS}


def true_of_scores(auc, prevalence, **_):
    "{metric: its value in the population}, by integration over the scores"
    d, p, x = gap(auc), prevalence, np.linspace(-12, 16, 200_001)
    ill, well = p * stats.norm.pdf(x - d), (1 - p) * stats.norm.pdf(x)
    tpr, fpr, prob = stats.norm.sf(x - d), stats.norm.sf(x), expit(logit(p) + d * (x - d / 2))
    total = lambda v: float(v.sum() * (x[1] - x[0]))
    precision = p * tpr / np.maximum(p * tpr + (1 - p) * fpr, 1e-300)
    return dict(auc=auc, average_precision=total(precision * ill) / p, brier=total(ill * (1 - prob) ** 2 + well * prob ** 2),
                log_loss=-total(ill * np.log(np.maximum(prob, 1e-300)) + well * np.log(np.maximum(1 - prob, 1e-300))))


# ---- one sample
def estimate(y, prob, group, n_boot, seed, only):
    "{metric: Estimate}, as `evaluate` makes them, without its curves; without resamples when n_boot is 0"
    s, needs = Scores(y, np.column_stack([1 - prob, prob]), group, BINARY, True), {METRICS[m].needs for m in only}
    predicted = s.predict(.5)
    values = compute_metrics(s, predicted, np.ones((1, len(y))), needs=needs)
    parts = [compute_metrics(s, predicted, w, needs=needs) for w in group_resamples(s, n_boot, seed)]
    draws = {m: np.concatenate([d[m] for d in parts]) for m in only} if parts else {}
    return estimate_metrics(s, predicted, {m: values[m] for m in only}, draws)


def sample_predictions(rng, setting, n_boot, seed):
    "Labels, patients and what makes the {metric: Estimate} of predictions that are right as often as the setting says"
    y, group = draw_labels(rng, **setting)
    right = draw_noise(rng, group) < stats.norm.ppf(np.where(y == 1, setting['sensitivity'], setting['specificity']))
    return y, group, lambda: estimate(y, np.where(right == (y == 1), .8, .2), group, n_boot, seed, OF_PREDICTIONS)


def sample_scores(rng, setting, n_boot, seed):
    "The same of calibrated probabilities"
    y, group = draw_labels(rng, **setting)
    d = gap(setting['auc'])
    prob = expit(logit(setting['prevalence']) + d * (d * y + draw_noise(rng, group) - d / 2))
    return y, group, lambda: estimate(y, prob, group, n_boot, seed, OF_SCORES)


def sample_differences(rng, setting, n_boot, seed):
    "The same of two equally good models, compared in several ways"
    y, group = draw_labels(rng, **setting)
    d, common = gap(setting['auc']), draw_noise(rng, group)
    models = [expit(d * y + np.sqrt(ALIKE) * common + np.sqrt(1 - ALIKE) * draw_noise(rng, group) - d / 2) for _ in range(2)]
    resampled = ('recall', 'f1') if n_boot else ()
    return y, group, lambda: {
        'compare_auc': compare_auc(y, *models, group), 'compare_accuracy': compare_accuracy(y, *(p >= .5 for p in models), group),
        **{f'paired_difference {m}': paired_difference(y, *models, group, m, n_boot=n_boot, seed=seed) for m in resampled}}


KINDS = dict(predictions=(sample_predictions, true_of_predictions), scores=(sample_scores, true_of_scores),
             differences=(sample_differences, lambda **_: {}))
SAMPLES = dict(predictions=400, scores=400, differences=400)      # of every setting
RESAMPLED = dict(predictions=1, scores=.5, differences=.5)       # share of the samples in which metrics that need resamples get them


# ---- coverage
def measure(kind, setting, samples, n_boot, seed=0):
    "{metric: [samples that covered, samples with an interval]}"
    draw, find_truth = KINDS[kind]
    rng, truth, count = np.random.default_rng(seed), find_truth(**setting), {}
    for i in range(samples):
        y, group, estimates = draw(rng, setting, n_boot if i < RESAMPLED[kind] * samples else 0, i)
        if min(len(np.unique(group[y == k])) for k in (0, 1)) < 2: continue
        for m, e in estimates().items():
            hits = count.setdefault(m, [0, 0])
            if np.isnan(e.low): continue
            hits[0] += int(e.low <= truth.get(m, 0.) <= e.high)
            hits[1] += 1
    return count


def summarise(count):
    "Coverage, its standard error and the number of samples"
    hit, n = count
    share = hit / n if n else np.nan
    return round(share, 4), round(float(np.sqrt(share * (1 - share) / n)), 4) if n else np.nan, n


def measure_setting(job):
    "One setting, in a process of its own"
    warnings.simplefilter('ignore')
    return measure(*job)


def measure_kind(kind, samples, n_boot, pool, log=print):
    "{'settings': [...], 'metrics': {metric: {'coverage': [...], 'se': [...], 'samples': [...]}}}"
    every, metrics = list(settings(kind)), {}
    jobs = [(kind, setting, samples, n_boot, i) for i, setting in enumerate(every)]
    for i, counts in enumerate(pool.imap(measure_setting, jobs), 1):
        for m, count in counts.items():
            column = metrics.setdefault(m, dict(coverage=[], se=[], samples=[]))
            for k, v in zip(column, summarise(count)): column[k].append(v)
        if i % 9 == 0: log(f'{kind}: {i} of {len(every)} settings', flush=True)
    return dict(settings=every, metrics=metrics)


def parse_args():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--quick', action='store_true', help='a few samples of every setting')
    p.add_argument('--kinds', nargs='+', choices=list(KINDS), default=list(KINDS))
    p.add_argument('--samples', type=int, help=f'of every setting ({SAMPLES})')
    p.add_argument('--n-boot', type=int, default=200, help='resamples of every sample, for metrics that need them')
    p.add_argument('--jobs', type=int, default=1, help='processes')
    p.add_argument('--out', default=str(OUT))
    return p.parse_args()


def run_kind(kind, samples, n_boot, jobs):
    "All settings of a kind, and how they were measured"
    load, before = load_average(), os.times()
    with multiprocessing.Pool(jobs) as pool:
        found = measure_kind(kind, samples, n_boot, pool)
        pool.close()
        pool.join()
    cpu = os.times().children_user - before.children_user
    return dict(about(), machine=machine(load_before=load), cpu_seconds=round(cpu), samples=samples, n_boot=n_boot, level=.95, **found)


if __name__ == '__main__':
    a, out = parse_args(), {}
    if os.path.exists(a.out): out = json.loads(open(a.out, encoding='utf-8').read())['kinds']
    for kind in a.kinds:
        samples, n_boot = (4, 100) if a.quick else (a.samples or SAMPLES[kind], a.n_boot)
        out[kind] = run_kind(kind, samples, n_boot, a.jobs)
        write_result(a.out, dict(kinds={k: out[k] for k in KINDS if k in out}))
