"""How often does the headline of an audit say 'better', 'not better' and 'not known', when the truth is known?

    python benchmarks/headline_rates.py            300 samples of every setting: about two minutes on one core
    python benchmarks/headline_rates.py --quick    40 samples

Scores are drawn from two normal distributions, so that every AUC is known: 40 of 100 patients are ill, one image each. One baseline
beside a model that is better by .10, or equal to it; eight baselines, of which each is worse by .15, or one is as good as the model.
The best of the eight is chosen on as many validation patients, or on the evaluated images. `plain_defeat` is what the rule
'the interval holds zero' would have called a defeat, `plain_gain` the mean gain over whichever baseline is best on the evaluated images.
The result replaces benchmarks/results/headline_rates.json.
"""
import argparse, os
os.environ.setdefault('OMP_NUM_THREADS', '1')
import numpy as np
from scipy.stats import norm
from record import RESULTS, about, machine, write_result
from covid_cxr.audit.baselines import Baseline, gain_over_best
from covid_cxr.audit.case import GainOutcome, gain_outcome, is_better_than_chance
from covid_cxr.core import choices
from covid_cxr.evaluate import Estimate
from covid_cxr.stats.paired import auc_covariance

OUT = RESULTS / 'headline_rates.json'
ONE = {'better by 0.10': (.80, [.70]), 'equal': (.75, [.75])}                         # AUC of the model, of the baselines
EIGHT = {'better by 0.15 than each': (.75, [.60] * 8), 'equal to one, better than seven': (.75, [.75] + [.60] * 7)}


def draw(rng, ill, auc):
    "Scores between 0 and 1 with this true AUC"
    return norm.cdf(rng.normal(size=len(ill)) + 2 ** .5 * norm.ppf(auc) * ill)


def sample(rng, patients, model, baselines, with_valid):
    "Labels, scores of the model, and its baselines with what they reach on as many validation patients"
    ill = (np.arange(patients) < round(.4 * patients)).astype(int)
    here, valid = ([draw(rng, ill, auc) for auc in baselines] for _ in range(2))
    reached, on_valid = (auc_covariance(ill, scores).auc for scores in (here, valid))
    made = [Baseline(f'baseline {k}', 'image_without_lungs', 'drawn', Estimate(float(reached[k])), s, on_valid[k] if with_valid else np.nan)
            for k, s in enumerate(here)]
    return ill, draw(rng, ill, model), made


def own_auc(y, p):
    "AUC of the model with its interval (DeLong)"
    auc, covariance = auc_covariance(y, [p])
    half = 1.96 * covariance[0, 0] ** .5
    return Estimate(float(auc[0]), float(auc[0] - half), float(auc[0] + half))


def rates(patients, model, baselines, with_valid, samples, n_boot, seed=0):
    "Shares of the three outcomes, mean gain, and how often the interval holds the true gain over the best"
    rng, who, outcomes, rows = np.random.default_rng(seed), np.arange(patients), [], []
    true = model - max(baselines)
    for _ in range(samples):
        y, p, made = sample(rng, patients, model, baselines, with_valid)
        over = gain_over_best(y, p, who, made, 'image_without_lungs', n_boot, seed=int(rng.integers(1 << 31)))
        auc = own_auc(y, p)
        outcomes.append(gain_outcome(over.gain, is_better_than_chance(auc)))
        plain = auc.value - max(b.auc.value for b in made)
        rows.append((over.gain.value, plain, over.gain.low <= true <= over.gain.high, over.gain.low <= 0))
    gain, plain, holds, defeat = (float(v) for v in np.mean(rows, axis=0).round(4))
    return dict(true_gain=round(true, 4), **{w: round(outcomes.count(w) / samples, 4) for w in choices(GainOutcome)}, mean_gain=gain,
                plain_gain=plain, covers=holds, plain_defeat=defeat)


def measure(samples, n_boot):
    "Every setting as a row"
    rows = []
    for patients in (60, 150):
        for truth, (model, baselines) in ONE.items():
            found = rates(patients, model, baselines, False, samples, n_boot)
            rows.append(dict(patients=patients, baselines=1, truth=truth, chosen_on='-', **found))
            print(rows[-1], flush=True)
        for truth, (model, baselines) in EIGHT.items():
            for with_valid in (True, False):
                where = 'validation split' if with_valid else 'evaluated images'
                found = rates(patients, model, baselines, with_valid, samples, n_boot)
                rows.append(dict(patients=patients, baselines=8, truth=truth, chosen_on=where, **found))
                print(rows[-1], flush=True)
    return rows


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--quick', action='store_true', help='40 samples of every setting')
    p.add_argument('--out', default=str(OUT))
    a = p.parse_args()
    samples, n_boot = (40, 200) if a.quick else (300, 300)
    write_result(a.out, dict(about(), machine=machine(), samples=samples, n_boot=n_boot, rates=measure(samples, n_boot)))
