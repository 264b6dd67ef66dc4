"""evaluate and stats: known answers, agreement with scikit-learn over random cases, laws over all metrics, coverage of the intervals."""
import itertools, json, math, sys, warnings
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from scipy import stats
from sklearn import metrics as sk
from conftest import ROOT, examples

sys.path.insert(0, str(ROOT / 'benchmarks'))
import coverage as cover
from covid_cxr.audit.checks_numbers import slope_verdict
from covid_cxr.core import CxrError, choices, write_json
from covid_cxr.evaluate import (GOALS, METRICS, Estimate, Evaluation, EvaluationError, Needs, OperatingPoint, Rates, Scope,
                                UndefinedMetric, UnmetGoal, auc_and_ap, auc_covariance, bounded_interval, check_scores,
                                choose_threshold, compute_metrics, describe_precision, estimate_metrics, evaluate, group_resamples,
                                mean_interval, patient_wilson, percentile_interval, predictive_values, rank_sums, ratio_interval,
                                resample_spread, threshold_regret, wilson)
from covid_cxr.stats.bootstrap import design_effect, patient_mean, patient_ratio
from covid_cxr.stats.calibration import (apply_temperature, brier_parts, calibration, calibration_error, fit_temperature, net_benefit,
                                         predictive_values_at)
from covid_cxr.stats.paired import (auc_over_trainings, check_published, compare_accuracy, compare_auc, describe_paired,
                                    describe_worst_subgroup, holm, mcnemar_exact, mcnemar_power, n_needed, paired_difference, sign_flip,
                                    subgroups, worst_gap)

FEW = settings(max_examples=examples(150), deadline=None, derandomize=True)
FEWER = settings(FEW, max_examples=examples(60))           # where one example takes a tenth of a second


def quiet(f, *args, **kw):
    "Call with our two warnings allowed; any other warning (a division by zero, an empty mean) is an error"
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for ours in (UndefinedMetric, UnmetGoal): warnings.simplefilter('ignore', ours)
        return f(*args, **kw)


# --- agreement with scikit-learn -----------------------------------------------------------------------------------------

def _lr(y, c, positive):
    tn, fp, fn, tp = sk.confusion_matrix(y, c, labels=[0, 1]).ravel().astype(float)
    with np.errstate(all='ignore'):
        tpr, fpr = tp / (tp + fn), fp / (fp + tn)
        return np.divide(tpr, fpr) if positive else np.divide(1 - tpr, 1 - fpr)

def _both(f): return lambda y, p, c: f(y, p, c) if len(set(y)) == 2 else np.nan
def _constant(y, c): return len(set(y)) < 2 or len(set(c)) < 2

ORACLE = {
    'auc':                 _both(lambda y, p, c: sk.roc_auc_score(y, p)),
    'average_precision':   lambda y, p, c: sk.average_precision_score(y, p) if y.sum() else np.nan,
    'accuracy':            lambda y, p, c: sk.accuracy_score(y, c),
    'balanced_accuracy':   _both(lambda y, p, c: sk.balanced_accuracy_score(y, c)),
    'precision':           lambda y, p, c: sk.precision_score(y, c, zero_division=np.nan),
    'recall':              lambda y, p, c: sk.recall_score(y, c, zero_division=np.nan),
    'specificity':         lambda y, p, c: sk.recall_score(y, c, pos_label=0, zero_division=np.nan),
    'npv':                 lambda y, p, c: sk.precision_score(y, c, pos_label=0, zero_division=np.nan),
    'false_positive_rate': lambda y, p, c: 1 - sk.recall_score(y, c, pos_label=0, zero_division=np.nan),
    'false_negative_rate': lambda y, p, c: 1 - sk.recall_score(y, c, zero_division=np.nan),
    'f1':                  lambda y, p, c: sk.f1_score(y, c, zero_division=np.nan),
    'lr_positive':         lambda y, p, c: _lr(y, c, True),
    'lr_negative':         lambda y, p, c: _lr(y, c, False),
    'mcc':                 lambda y, p, c: np.nan if _constant(y, c) else sk.matthews_corrcoef(y, c),
    'kappa':               lambda y, p, c: np.nan if set(y) == set(c) and len(set(y)) == 1 else sk.cohen_kappa_score(y, c),
    'brier':               lambda y, p, c: sk.brier_score_loss(y, p, pos_label=1),
    'log_loss':            lambda y, p, c: sk.log_loss(y, p, labels=[0, 1]),
    'prevalence':          lambda y, p, c: y.mean(),
}


def test_no_metric_is_left_off_the_list():
    e = evaluate([0, 1, 0, 1], [.2, .7, .6, .9], n_boot=100)
    assert set(ORACLE) == set(METRICS) == set(e.estimates)
    assert all(m.formula and m.needs in choices(Needs) and m.scope in choices(Scope) for m in METRICS.values())


@FEWER
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 12)), min_size=1, max_size=40), st.integers(0, 12))
def test_every_metric_agrees_with_scikit_learn(rows, at):
    "Ties everywhere (13 possible scores), one class, one image, thresholds on a score"
    y, p = np.array([r[0] for r in rows]), np.array([r[1] / 12 for r in rows])
    e = quiet(evaluate, y, p, threshold=at / 12, n_boot=0)
    c = (p >= at / 12).astype(int)
    for name, oracle in ORACLE.items():
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            want = oracle(y, p, c)
        np.testing.assert_allclose(e[name].value, want, rtol=1e-9, atol=1e-12, err_msg=name)
    assert e.confusion == sk.confusion_matrix(y, c, labels=[0, 1]).tolist()


@FEWER
@given(st.integers(0, 10**6), st.integers(3, 5), st.integers(8, 60))
def test_several_classes_agree_with_scikit_learn(seed, k, n):
    rng = np.random.default_rng(seed)
    y = np.r_[np.arange(k), rng.integers(0, k, n)]
    p = rng.integers(1, 6, (len(y), k)) + 4. * np.eye(k)[y] * (rng.random(len(y)) < .5)[:, None]
    p /= p.sum(1, keepdims=True)
    names = np.array([f'class {i}' for i in range(k)])
    e, c = quiet(evaluate, names[y], p, classes=names, n_boot=0), p.argmax(1)
    for i, name in enumerate(names):
        np.testing.assert_allclose(e[f'auc:{name}'].value, sk.roc_auc_score(y == i, p[:, i]))
        np.testing.assert_allclose(e[f'average_precision:{name}'].value, sk.average_precision_score(y == i, p[:, i]))
        np.testing.assert_allclose(e[f'sensitivity:{name}'].value, sk.recall_score(y, c, labels=[i], average=None)[0])
    np.testing.assert_allclose(e['auc_macro'].value, sk.roc_auc_score(y, p, multi_class='ovr'))
    known = dict(accuracy=sk.accuracy_score(y, c), balanced_accuracy=sk.balanced_accuracy_score(y, c), mcc=sk.matthews_corrcoef(y, c),
                 kappa=sk.cohen_kappa_score(y, c), log_loss=sk.log_loss(y, p, labels=range(k)),
                 brier=((p - np.eye(k)[y]) ** 2).sum(1).mean())
    for name, want in known.items():
        np.testing.assert_allclose(e[name].value, want, atol=1e-12, err_msg=name)
    assert e.threshold is None and e.confusion == sk.confusion_matrix(y, c, labels=range(k)).tolist()


@FEW
@given(st.integers(0, 10**6))
def test_a_weighted_auc_is_the_auc_of_the_repeated_images(seed):
    rng = np.random.default_rng(seed)
    y, s, w = np.r_[0, 1, rng.integers(0, 2, 20)], rng.integers(0, 6, 22) / 6, rng.integers(0, 4, (3, 22))
    w[:, :2] = 1
    auc, ap = auc_and_ap(*rank_sums(y == 1, s, w.astype(float)))
    for i in range(3):
        yy, ss = np.repeat(y, w[i]), np.repeat(s, w[i])
        np.testing.assert_allclose((auc[i], ap[i]), (sk.roc_auc_score(yy, ss), sk.average_precision_score(yy, ss)))


# --- laws ------------------------------------------------------------------------------------------------------------------

def some_scores(seed, n=120, images=(1, 4), gap=1.5):
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(n), rng.integers(*images, n))
    y = (rng.random(n) < .4).astype(int)[patient]
    logit = gap * (y - .5) + .8 * rng.normal(size=n)[patient] + .5 * rng.normal(size=len(y))
    return y, 1 / (1 + np.exp(-logit)), np.array([f'p{i}' for i in patient])


RESAMPLED = {'average_precision', 'f1', 'mcc', 'kappa', 'brier', 'log_loss'}      # the intervals that depend on the seed

@pytest.mark.parametrize('seed', range(4))
def test_laws_over_all_metrics(seed):
    y, p, g = some_scores(seed)
    e = evaluate(y, p, groups=g, threshold=.45, n_boot=400, seed=3)
    i = np.random.default_rng(9).permutation(len(y))
    assert evaluate(y[i], p[i], groups=g[i], threshold=.45, n_boot=400, seed=3).to_dict() == e.to_dict()           # order means nothing
    twice = evaluate(np.tile(y, 2), np.tile(p, 2), groups=np.tile(g, 2), threshold=.45, n_boot=400, seed=3)
    other = evaluate(y, p, groups=g, threshold=.45, n_boot=400, seed=4)
    for m, a in e.estimates.items():
        assert a.low <= a.value <= a.high or m == 'prevalence', m
        np.testing.assert_allclose(twice[m][:3], a[:3], err_msg=f'{m}: every image twice says nothing new')
        assert m == 'prevalence' or (m in RESAMPLED) == ((other[m].low, other[m].high) != (a.low, a.high)), m        # where it matters
    assert e['sensitivity'] == e['recall'] and e['ppv'] == e['precision']
    np.testing.assert_allclose((e['fpr'].low, e['fpr'].high), (1 - e['specificity'].high, 1 - e['specificity'].low))


def test_a_wider_level_gives_a_wider_interval():
    y, p, g = some_scores(1)
    a, b = (evaluate(y, p, groups=g, level=l, n_boot=500) for l in (.8, .95))
    assert all(b[m].low <= a[m].low and a[m].high <= b[m].high for m in METRICS if m != 'prevalence')


def test_patients_that_cancel_out_have_no_standard_error():
    "Two groups whose residuals sum to nothing: the robust variance is rounding, not precision"
    y, p = np.array([0, 0, 0, 0, 1, 1]), np.array([0, 0, 0, .75, 0, .75])
    found = quiet(calibration, y, p, np.array([1, 1, 1, 1, 0, 0]), n_sim=20)
    assert np.isfinite(found.slope.value) and np.isnan([found.slope.low, found.slope.high]).all()
    assert slope_verdict(found.slope, p=.001) == 'UNDERPOWERED'



@FEWER
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 4), st.integers(0, 5)), max_size=12), st.sampled_from([0., .25, .5, 1.]))
def test_nothing_but_numbers_and_our_own_warning_comes_out(rows, threshold):
    "Empty, one class, one group, constant scores, patients with both classes: never an exception, never a foreign warning, always JSON"
    y, p, g = ([r[0] for r in rows], [r[1] / 4 for r in rows], [f'g{r[2]}' for r in rows])
    for groups in (g, None):
        e = quiet(evaluate, y, p, groups=groups, threshold=threshold, n_boot=100)
        text = json.dumps(e.to_dict(), allow_nan=False)
        assert Evaluation.from_dict(json.loads(text)).to_dict() == e.to_dict()
        assert str(e) and len(e.table()) == len(METRICS)
        for m, r in e.estimates.items():
            assert np.isnan(r.low) == np.isnan(r.high)
            assert np.isnan(r.low) or r.low <= r.value + 1e-12 and r.value <= r.high + 1e-12 or 'undefined in' in r.note, (m, r)
            assert not np.isnan(r.value) or r.note.startswith('undefined: '), m
    c, d = quiet(calibration, y, p, g, n_sim=20), quiet(compare_auc, y, p, p[::-1], g, margin=.1)
    assert str(c) and str(d) and json.dumps([c.to_dict(), d.to_dict()], allow_nan=False)
    if len(set(y)) == 2:
        for goal in GOALS: quiet(choose_threshold, y, p, goal)
        quiet(predictive_values_at, y, p, threshold, groups=g)
        assert quiet(threshold_regret, y, p, threshold).regret >= -1e-12


BAD = [([0, 1], [.5]), ([0, 1], [.5, np.nan]), ([0, 1], [.5, -.1]), ([0, 1], [.5, 1.1]), ([0, 1], [.5, np.inf]), ([0, 2], [.5, .5]),
       (['a', 'b'], [.5, .5]), ([0, np.nan], [.5, .5]), ([0, 1], [[.5, .6], [.5, .5]]), ([0, 1], [[1.], [0.]]), ([[0], [1]], [.5, .5])]

@pytest.mark.parametrize('y, p', BAD)
def test_bad_input_is_one_sentence(y, p):
    with pytest.raises(EvaluationError) as e: evaluate(y, p)
    assert isinstance(e.value, CxrError) and '\n' not in str(e.value) and len(str(e.value)) > 20


def test_evaluation_survives_a_file(tmp_path):
    y, p, g = some_scores(0)
    e = evaluate(y, p, groups=g, classes=('other', 'covid'), n_boot=200)
    back = Evaluation.from_dict(json.loads(write_json(tmp_path / 'e.json', e.to_dict()).read_text()))
    assert str(back) == str(e) and back.table().equals(e.table())
    point = choose_threshold(y, p, 'specificity>=0.9')
    assert OperatingPoint.from_dict(json.loads(write_json(tmp_path / 'p.json', point.to_dict()).read_text())) == point


def test_evaluations_of_kept_runs_are_read():
    "What was written before today's names is read, and written again without a change"
    kept = sorted((ROOT / 'benchmarks' / 'results').glob('*/evaluation.json'))
    assert kept
    for f in kept:
        d = json.loads(f.read_text())
        for key in (d.get('split') or d['part'], 'source_only', 'source_baseline'):
            if d.get(key): assert Evaluation.from_dict(d[key]).to_dict() == dict(curves={}) | d[key], (f, key)
        if d['operating_point']: assert OperatingPoint.from_dict(d['operating_point']).to_dict() == d['operating_point'], f


# --- operating point ---------------------------------------------------------------------------------------------------------

@FEW
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 8)), min_size=2, max_size=25).filter(lambda r: len({a for a, _ in r}) == 2))
def test_no_other_threshold_serves_the_goal_better(rows):
    y, p = np.array([r[0] for r in rows]), np.array([r[1] / 8 for r in rows])
    every = np.r_[0, np.unique(p), (np.unique(p) + np.roll(np.unique(p), 1)) / 2, 1]
    sens, spec = (np.array([((p >= t) == k)[y == k].mean() for t in every]) for k in (1, 0))
    q = quiet(choose_threshold, y, p, 'youden')
    assert q.sensitivity + q.specificity >= (sens + spec).max() - 1e-9
    assert (q.sensitivity, q.specificity) == ((p >= q.threshold)[y == 1].mean(), (p < q.threshold)[y == 0].mean())       # as it says
    q = quiet(choose_threshold, y, p, 'sensitivity>=0.8')
    assert q.met and q.sensitivity >= .8 and q.specificity >= spec[sens >= .8].max() - 1e-9
    q = quiet(choose_threshold, y, p, 'specificity>=0.8')
    assert not (spec >= .8).any() or (q.met and q.sensitivity >= sens[spec >= .8].max() - 1e-9)
    i = np.random.default_rng(0).permutation(len(y))
    assert quiet(choose_threshold, y[i], p[i], 'youden') == quiet(choose_threshold, y, p, 'youden')


def test_a_frozen_threshold_falls_on_a_shifted_site_and_the_best_one_does_not():
    y, p, _ = some_scores(0, n=400)
    y2, p2, _ = some_scores(1, n=400)
    t = choose_threshold(y, p).threshold
    same, shifted = threshold_regret(y2, p2, t), threshold_regret(y2, p2 ** .3, t)         # a gamma on the scores: the order stays
    assert shifted.best_accuracy == pytest.approx(same.best_accuracy)
    assert same.regret < .03 and shifted.frozen_accuracy < same.frozen_accuracy - .05 and shifted.regret > .05


# --- intervals -----------------------------------------------------------------------------------------------------------------

def test_patients_must_be_drawn_not_images():
    "100 patients, 1 to 8 images, true AUC .776: the image bootstrap misses the truth far too often"
    rng, truth, runs = np.random.default_rng(0), .776, 250
    between, within = 1., .5
    mu = stats.norm.ppf(truth) * math.sqrt(2 * (between ** 2 + within ** 2))
    hits, width = dict(patient=0, image=0), dict(patient=0., image=0.)
    for run in range(runs):
        g = np.repeat(np.arange(100), rng.integers(1, 9, 100))
        y = (np.arange(100) % 2)[g]
        z = mu * y + between * rng.normal(size=100)[g] + within * rng.normal(size=len(g))
        for unit, groups in (('patient', g), ('image', None)):
            s = check_scores(y, stats.norm.cdf(z / 3), groups)
            auc = np.concatenate([auc_and_ap(*rank_sums(s.y == 1, s.score, w))[0] for w in group_resamples(s, 200, run)])
            low, high, _ = percentile_interval(auc)
            hits[unit] += low <= truth <= high
            width[unit] += (high - low) / runs
    assert hits['image'] / runs < .8 and hits['patient'] / runs >= .88, hits
    assert width['patient'] > 1.3 * width['image']


def test_with_very_few_errors_the_interval_still_covers():
    "65 patients, two images each that mostly agree, true sensitivity .97: some samples are perfect, most have fewer than ten errors"
    rng, runs, inside, perfect = np.random.default_rng(1), 150, 0, 0
    g = np.repeat(np.arange(65), 2)
    for run in range(runs):
        found = np.where(rng.random(65) < .7, (rng.random(65) < .97)[None], rng.random((2, 65)) < .97).T.ravel()
        e = quiet(evaluate, np.ones(130, int), found * .8 + .1, groups=g, n_boot=200, seed=run)['recall']
        perfect += e.value == 1
        inside += e.low <= .97 <= e.high
        assert e.low < e.value < e.high or e.value == e.high == 1 > e.low
    assert perfect > 3 and inside / runs >= .9, (perfect, inside)


COVERAGE = json.loads(cover.OUT.read_text())

def test_what_coverage_json_holds():
    "Every metric in every setting, over enough studies, and the settings are those of today's script"
    for kind, found in COVERAGE['kinds'].items():
        assert found['settings'] == list(cover.settings(kind)) and len(found['settings']) == 81
        for m, v in found['metrics'].items():
            assert {len(x) for x in v.values()} == {81}, m
            assert min(v['samples']) >= .8 * cover.RESAMPLED[kind] * found['samples'], m
        assert found['samples'] >= 400 and found['level'] == .95
    known = {m for found in COVERAGE['kinds'].values() for m in found['metrics']}
    assert set(METRICS) - known == {'false_positive_rate', 'false_negative_rate', 'prevalence'}     # 1 - a share; no interval


@pytest.mark.parametrize('kind', cover.KINDS)
def test_most_intervals_cover_as_they_promise(kind):
    for m, v in COVERAGE['kinds'][kind]['metrics'].items():
        c, se = np.array(v['coverage']), np.array(v['se'])
        clear = (c + 2 * se < .93).sum()                     # of 81; what the stats notebook says of the two losses
        assert .93 <= np.median(c) <= .98 and clear <= (4 if m in ('brier', 'log_loss') else 0) and c.min() > .85, (m, clear, c.min())
        assert m in ('brier', 'log_loss') or (c < .93).mean() < .15 and abs(c.mean() - .95) < .015, (m, c.mean())


FEW_ILL = dict(patients=60, prevalence=.15, images=5, both_classes=0.)

@pytest.mark.parametrize('kind, true, metrics', [
    ('predictions', dict(sensitivity=.97, specificity=.5), ('accuracy', 'precision', 'recall', 'f1', 'lr_negative')),
    ('scores', dict(auc=.98), ('auc',)), ('differences', dict(auc=.9), ('compare_auc', 'compare_accuracy', 'paired_difference f1'))])
def test_kept_coverage_is_found_again(kind, true, metrics):
    "The first studies of a hard setting: bounds that percentiles of resamples, or images counted as patients, do not keep"
    setting = dict(true, **FEW_ILL)
    i = list(cover.settings(kind)).index(setting)
    again = quiet(cover.measure, kind, setting, 120, 100, seed=i)
    for m in metrics:
        hit, n = again[m]
        kept = COVERAGE['kinds'][kind]['metrics'][m]['coverage'][i]
        assert n >= 60 and hit / n >= .9 and abs(hit / n - kept) < .07, (m, hit, n, kept)


def test_percentiles_do_not_keep_these_bounds():
    rng, setting, hits = np.random.default_rng(0), dict(auc=.98, **FEW_ILL), []
    for i in range(120):
        y, group, _ = cover.sample_scores(rng, setting, 0, i)
        score = cover.gap(.98) * y + cover.draw_noise(rng, group)
        s = check_scores(y, stats.norm.cdf(score / 3), group)
        if len(set(y)) < 2: continue
        draws = np.concatenate([auc_and_ap(*rank_sums(s.y == 1, s.score, w)).auc for w in group_resamples(s, 200, i)])
        low, high, _ = percentile_interval(draws)
        hits.append(low <= .98 <= high)
    assert np.mean(hits) < .85, np.mean(hits)


def test_the_share_of_the_classes_is_not_held_fixed():
    "427 patients, 62 % ill, sensitivity .97 and specificity .50, as on a published test split: accuracy moves with the share of the ill"
    rng, true, hits = np.random.default_rng(1), cover.true_of_predictions(.97, .5, .62), {}
    names = ('accuracy', 'precision', 'recall', 'specificity', 'balanced_accuracy')
    for _ in range(400):
        y = (rng.random(427) < .62).astype(int)
        p = np.where(rng.random(427) < np.where(y, .97, .5), y, 1 - y) * .8 + .1
        s = check_scores(y, p)
        values = compute_metrics(s, s.predict(.5), np.ones((1, 427)))
        found = estimate_metrics(s, s.predict(.5), {m: values[m] for m in names}, {})
        for m, e in found.items(): hits.setdefault(m, []).append(e.low <= true[m] <= e.high)
    for m, h in hits.items(): assert .925 <= np.mean(h) <= .98, (m, np.mean(h))
    w = np.concatenate([*group_resamples(s, 500, 0)])
    share = w @ s.y / w.sum(1)
    assert share.std() == pytest.approx(np.sqrt(.62 * .38 / 427), rel=.15) and (w.sum(1) == 427).all()


def test_intervals_stay_between_the_bounds_and_few_resamples_say_nothing():
    for value in (1e-6, .02, .5, .98, 1 - 1e-6):
        low, high = bounded_interval(value, .2, df=4)
        assert 0 <= low < value < high <= 1
        low, high = bounded_interval(2 * value - 1, .2, -1)
        assert -1 <= low < 2 * value - 1 < high <= 1
    assert np.isnan([*bounded_interval(1., .1), *bounded_interval(.5, 0.), *bounded_interval(.5, np.nan)]).all()
    low, high = bounded_interval(.3, .05, high=np.inf)
    assert low * high == pytest.approx(.3 ** 2)                                       # symmetric in the logarithm
    lost = resample_spread(np.r_[np.full(40, np.nan), np.zeros(20), np.ones(40)])
    assert lost.note == 'undefined in 40 of 100 resamples' and lost.se == pytest.approx(np.sqrt(2 / 9))
    assert np.isnan(resample_spread(np.zeros(49)).se)


def test_intervals_of_means_and_ratios_are_those_of_their_parts():
    a, b, zero = Estimate(.8, .7, .9), Estimate(.4, .3, .6), Estimate(0., 0., .1)
    np.testing.assert_allclose(mean_interval([a]), (.7, .9))
    np.testing.assert_allclose(mean_interval([a, a]), (.8 - .1 / np.sqrt(2), .8 + .1 / np.sqrt(2)))
    exact = Estimate(.5, .5, .5)
    np.testing.assert_allclose(ratio_interval(a, exact), (1.4, 1.8))
    np.testing.assert_allclose(ratio_interval(exact, b), (.5 / .6, .5 / .3))
    np.testing.assert_allclose(ratio_interval(a, zero), (7, np.inf))
    np.testing.assert_allclose(ratio_interval(zero, b), (0, .1 / .3))


def test_few_patients_lose_a_class_in_some_resamples():
    "Two ill patients of twelve: the resamples without them are counted and named, and shares and AUC need none"
    y, p = np.r_[np.ones(4, int), np.zeros(20, int)], np.r_[.9, .8, .3, .7, np.linspace(.1, .6, 20)]
    e = quiet(evaluate, y, p, groups=np.repeat(np.arange(12), 2), n_boot=500)
    assert 'undefined in' in e['mcc'].note and 'undefined in' in e['average_precision'].note
    assert all('resamples' not in e[m].note and e[m].low < e[m].value for m in ('auc', 'recall', 'accuracy', 'lr_positive'))
    assert 'only 2 groups of positive' in e['auc'].note
    assert e['recall'].note.startswith('Wilson interval for 4 effective patients') and e['recall'].n == 4 and e['recall'].low < .1


def test_design_effect_of_copied_images():
    y, p, g = some_scores(0, n=150, images=(1, 2))
    d = design_effect(np.tile(y, 4), np.tile(p, 4), np.tile(g, 4), n_boot=1500)
    assert 3.3 < d.effect < 4.7 and 120 < d.effective_n < 185      # four copies of 150 images are worth 150


def test_the_interval_of_a_mean_knows_about_patients():
    rng = np.random.default_rng(0)
    g = np.repeat(np.arange(60), 4)
    values = rng.normal(1, 1, 60)[g] + .1 * rng.normal(size=240)
    over, alone = patient_mean(values, g), patient_mean(values)
    assert over.value == alone.value == pytest.approx(values.mean()) and over.high - over.low > 1.6 * (alone.high - alone.low)
    ratio = patient_ratio(values, np.full(240, 2.), g)
    np.testing.assert_allclose(ratio[:3], np.array(over[:3]) / 2)
    share = patient_wilson(values > 1, g)
    assert share.low < share.value < share.high and 'effective patients' in share.note
    assert share.high - share.low > 1.6 * np.subtract(*wilson((values > 1).sum(), 240)[::-1])


def test_words_about_65_images():
    assert describe_precision(9, 56).startswith('65 images, rates assumed: accuracy (95 %) is known to about +/- 6 points')
    assert [round(float(v), 3) for v in wilson(593, 624)] == [.930, .965]


@pytest.mark.parametrize('sensitivity, said', [
    (.5, 'sensitivity (50 % of 49) to +/- 13'), (.673, 'sensitivity (67 % of 49) to +/- 13'), (.95, 'sensitivity (95 % of 49) to +/- 7'),
    (1., 'sensitivity (100 % of 49, taken as 93 %) to +/- 8'), (0., 'sensitivity (0 % of 49, taken as 7 %) to +/- 8')])
def test_precision_follows_the_measured_rates(sensitivity, said):
    text = describe_precision(49, 160, Rates(.9, sensitivity, .96), unit='group')
    assert text.startswith('209 groups, rates as measured: accuracy (90 %)') and said in text, text
    taken = {0.: wilson(0, 49).high, 1.: wilson(49, 49).low}.get(sensitivity, sensitivity)
    assert f'+/- {100 * wilson(49 * taken, 49).half_width:.0f}, specificity (96 % of 160)' in text


def test_an_evaluation_says_its_own_precision():
    y, p = np.repeat([0, 1], 40), np.r_[np.full(36, .1), np.full(4, .9), np.full(27, .9), np.full(13, .1)]
    e = evaluate(y, p, threshold=.5, n_boot=0)
    assert e.rates == Rates(e['accuracy'].value, .675, .9)
    assert f'rates as measured: accuracy ({100 * e.rates.accuracy:.0f} %)' in str(e) and '(68 % of 40) to +/- 14' in str(e), str(e)


# --- comparisons -----------------------------------------------------------------------------------------------------------------

def test_known_answers_of_comparisons():
    known = auc_covariance([0, 0, 1, 1], [[.1, .4, .35, .8]])
    assert (known.auc[0], known.covariance[0, 0]) == (.75, .125)
    assert round(mcnemar_exact(10, 2), 5) == .03857
    np.testing.assert_allclose(holm([.01, .02, .03]), [.03, .04, .04])
    for d, want in ((.01, .25), (.015, .51), (.02, .82)): assert mcnemar_power(624, .03, d) == pytest.approx(want, abs=.03)
    assert mcnemar_power(n_needed(.03, .02), .03, .02) >= .8


def test_type_one_error_of_the_paired_tests():
    "Two equally good models: 5 % false alarms when patients are counted, many more when images are"
    rng, runs = np.random.default_rng(0), 400
    p = dict(single=[], patients=[], images=[], accuracy=[])
    for _ in range(runs):
        y1 = np.r_[0, 1, rng.integers(0, 2, 78)]
        a, b = (stats.norm.cdf(y1 + rng.normal(size=80)) for _ in range(2))
        p['single'].append(compare_auc(y1, a, b).p)
        p['accuracy'].append(compare_accuracy(y1, (a > .6).astype(int), (b > .6).astype(int)).p)
        g = np.repeat(np.arange(80), 4)
        a, b = (stats.norm.cdf(y1[g] + rng.normal(size=80)[g] + .3 * rng.normal(size=320)) for _ in range(2))
        p['patients'].append(compare_auc(y1[g], a, b, groups=g).p)
        p['images'].append(compare_auc(y1[g], a, b).p)
    alarm = {k: np.mean(np.array(v) < .05) for k, v in p.items()}
    assert .02 < alarm['single'] < .095 and .02 < alarm['patients'] < .095 and alarm['images'] > .2 and alarm['accuracy'] < .07, alarm


def test_sign_flip_is_exact():
    rng = np.random.default_rng(0)
    for _ in range(30):
        steps = rng.integers(-3, 4, rng.integers(1, 9))
        brute = np.mean([abs(np.dot(s, steps)) >= abs(steps.sum()) for s in itertools.product((-1, 1), repeat=len(steps))])
        assert sign_flip(steps) == pytest.approx(brute)


def test_paired_bootstrap_and_delong_tell_the_same_story():
    y, p, g = some_scores(2, n=200)
    q = np.clip(p + .25 * np.random.default_rng(0).normal(size=len(p)), 0, 1)
    a, s = compare_auc(y, p, q, groups=g), [check_scores(y, v, g) for v in (p, q)]
    assert paired_difference(y, p, q, groups=g) == a
    auc = lambda x, w: auc_and_ap(*rank_sums(x.y == 1, x.score, w)).auc
    draws = np.concatenate([auc(s[0], w) - auc(s[1], w) for w in group_resamples(s[0], 1500, 0)])
    low, high, _ = percentile_interval(draws)
    assert draws.mean() == pytest.approx(a.difference, abs=.003) and abs(a.low - low) < .02 and abs(a.high - high) < .02
    two = [paired_difference(y, p, q, g, 'accuracy', n_boot=1500), compare_accuracy(y, p >= .5, q >= .5, g)]
    assert two[0].difference == pytest.approx(two[1].difference)
    np.testing.assert_allclose((two[0].low, two[0].high), (two[1].low, two[1].high), atol=.01)
    one = compare_auc(y, p, q, groups=g, margin=.001)
    assert one.p_margin < .5 and json.dumps(one.to_dict(), allow_nan=False)
    assert 'not worse' in describe_paired(one) and one.non_inferior == (one.low > -.001)


def test_counts_of_an_accuracy_are_data_and_names_go_into_words():
    d = compare_accuracy([0, 1, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0])
    assert (d.only_first, d.only_second, d.verdict) == (2, 1, 'not distinguishable') and '2 images only the first got right' in str(d)
    y, p, g = some_scores(2, n=200)
    d = compare_auc(y, p, np.full(len(y), .5), groups=g, margin=.02)
    assert d.verdict == 'first is better' and d.non_inferior is True and d.only_first is None
    assert describe_paired(d, 'the model', 'the baseline') == 'the model is better; the model is not worse by 0.02 or more'


def test_a_planted_subgroup_is_the_worst_and_equal_ones_do_not_alarm():
    rng, alarms = np.random.default_rng(0), 0
    for run in range(200):
        y, site, sex = rng.integers(0, 2, 240), rng.choice(list('abc'), 240), rng.choice(list('fm'), 240)
        p = stats.norm.cdf(1.2 * (y - .5) + rng.normal(size=240))
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            alarms += worst_gap(subgroups(y, p, dict(site=site, sex=sex), n_boot=0)).alarm
    assert alarms / 200 < .05
    y, site = rng.integers(0, 2, 900), rng.choice(list('abc'), 900)
    p = stats.norm.cdf(np.where(site == 'b', 1.2, 2.4) * (y - .5) + rng.normal(size=900))
    w = worst_gap(subgroups(y, p, pd.DataFrame(dict(site=site)), n_boot=100))
    assert w.value == 'b' and w.alarm and 'site = b' in describe_worst_subgroup(w)


def test_published_numbers():
    assert len(check_published(390, 234, accuracy=.928, sensitivity=.932, specificity=.901)) == 0
    hit = check_published(390, 234, sensitivity=.931, specificity=.902)
    assert hit.to_dict('records') == [dict(tp=363, fp=23, fn=27, tn=211)]
    e = check_published(5, 60, accuracy=.938, sensitivity=1., decimals=3)
    assert e.to_dict('records') == [dict(tp=5, fp=4, fn=0, tn=56)]
    with pytest.raises(EvaluationError, match='not a percentage'): check_published(5, 60, accuracy=93.8)


@FEW
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 10**6), st.integers(1, 4), st.booleans())
def test_a_true_matrix_is_never_found_inconsistent(P, N, seed, d, cut):
    rng = np.random.default_rng(seed)
    tp, tn = rng.integers(0, P + 1), rng.integers(0, N + 1)
    values = {m: float(METRICS[m].compute(tp, N - tn, P - tp, tn)) for m in ('recall', 'specificity', 'precision', 'npv', 'f1')}
    values['accuracy'] = (tp + tn) / (P + N)
    shorten = (lambda v: math.floor(v * 10 ** d) / 10 ** d) if cut else (lambda v: round(v, d))
    r = check_published(P, N, decimals=d, **{m: shorten(v) for m, v in values.items() if not math.isnan(v)})
    assert ((r.tp == tp) & (r.tn == tn)).any()


# --- calibration -----------------------------------------------------------------------------------------------------------------

def test_known_answers_of_calibration():
    rng = np.random.default_rng(0)
    u = rng.random(5000)
    c = calibration((rng.random(5000) < u).astype(int), u)
    assert c.error.null_low <= c.error.ece <= c.error.null_high and c.error.ece_debiased < c.error.ece and not c.error.beyond_null
    assert c.slope.low < 1 < c.slope.high and c.slope_verdict == 'compatible with 1'
    z = rng.normal(0, 2, 5000)
    assert fit_temperature(2 * z, (rng.random(5000) < 1 / (1 + np.exp(-z))).astype(int)) == pytest.approx(2, abs=.1)
    assert calibration_error([1] * 60 + [0] * 40, [.8] * 100).ece == pytest.approx(.2)
    assert [round(float(predictive_values(.95, .95, v)[0]), 3) for v in (.01, .05, .2)] == [.161, .5, .826]
    assert net_benefit([1] * 50 + [0] * 150, [.9] * 40 + [.1] * 10 + [.9] * 20 + [.1] * 130, [.2]).model[0] == pytest.approx(.175)


def test_the_null_band_and_the_slope_know_about_patients():
    "Honest probabilities, four images per patient: about 5 % leave the band, about 95 % of the slopes cover 1"
    rng, out, covered, runs = np.random.default_rng(0), 0, 0, 120
    for run in range(runs):
        g = np.repeat(np.arange(120), 4)
        z = rng.normal(0, 1.5, 120)[g]
        y = (rng.random(120) < 1 / (1 + np.exp(-z[::4]))).astype(int)[g]
        c = calibration(y, 1 / (1 + np.exp(-z)), g, bins=8, n_sim=100, seed=run)
        out += c.error.beyond_null
        covered += c.slope.low <= 1 <= c.slope.high
    assert out / runs < .09 and covered / runs > .88, (out, covered)


@FEW
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 10)), min_size=1, max_size=40), st.integers(1, 15), st.floats(.2, 5))
def test_laws_of_calibration(rows, bins, temperature):
    y, p = np.array([r[0] for r in rows]), np.array([r[1] / 10 for r in rows])
    d = brier_parts(y, p, bins)
    assert d.brier == pytest.approx(np.mean((p - y) ** 2))
    assert d.reliability - d.resolution + d.uncertainty + d.rest == pytest.approx(d.brier)
    e = quiet(calibration_error, y, p, bins=bins, n_sim=20)
    assert 0 <= e.ece_debiased <= 1 and abs(y.mean() - p.mean()) - 1e-9 <= e.ece <= 1          # bins never hide the offset
    q = apply_temperature(p, temperature)
    assert (np.argsort(q, kind='stable') == np.argsort(p, kind='stable')).all() and ((q >= .5) == (p >= .5)).all()
    np.testing.assert_allclose(apply_temperature(q, 1 / temperature), p, atol=1e-9)


def test_the_words_on_coverage_follow_from_the_file():
    "The paragraph below the lists of nbs/stats/bootstrap.ipynb"
    text = (ROOT / 'nbs/stats/bootstrap.ipynb').read_text(encoding='utf-8')
    found = COVERAGE['kinds']['predictions']
    balanced = found['metrics']['balanced_accuracy']['coverage']
    lowest = found['settings'][int(np.argmin(balanced))]
    assert (lowest['sensitivity'], lowest['specificity'], lowest['patients']) == (.97, .97, 60)
    assert f'balanced accuracy falls to {100 * min(balanced):.0f} % where both classes are nearly always right' in text
    found = COVERAGE['kinds']['scores']
    auc = [[c for c, s in zip(found['metrics']['auc']['coverage'], found['settings']) if (s['auc'], s['patients']) == (.98, n)]
           for n in (150, 600)]
    assert 'an AUC of .98 lies at {:.0f} to {:.0f} % from 150 patients on'.format(*(100 * np.mean(c) for c in auc)) in text


# ---- the mean over several trainings
def test_the_interval_of_a_mean_over_trainings_covers():
    "Trainings share their patients: as if they were independent, the interval would be far too narrow"
    rng, label, delta = np.random.default_rng(5), np.repeat([0, 1], 30), 1.2
    group, trainings = np.repeat(np.arange(60), 2), 3
    truth = stats.norm.cdf(delta / np.sqrt(2 * (.8 ** 2 + .6 ** 2)))
    covered, independent = [], []
    for _ in range(250):
        patients, noise = rng.normal(0, .8, 60), rng.normal(0, .6, (trainings, 120))
        scores = 1 / (1 + np.exp(-(delta * label + patients)[group] - noise))
        m = auc_over_trainings(label[group], list(scores), group)
        half = (m.high - m.low) / 2 / np.sqrt(trainings)
        covered.append(m.low <= truth <= m.high)
        independent.append(abs(m.value - truth) <= half)
    assert .92 <= np.mean(covered) <= .985 and np.mean(independent) < .85, (np.mean(covered), np.mean(independent))
