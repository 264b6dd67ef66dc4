"""Article 2's false positives: the kept numbers, the page that reports them, and the functions that measured them."""
import json, re, sys
import numpy as np, pandas as pd, pytest
from conftest import DATA, ROOT, needs_data
from covid_cxr.articles.tables import read_measurement
from covid_cxr.runs.folder import find_file
from covid_cxr.words import format_percent
sys.path.insert(0, str(ROOT / 'benchmarks'))
from record import kept_folders

RESULTS, PLACES = ROOT / 'benchmarks' / 'results', ('diaphragm', 'sternum', 'diaphragm+sternum')
GROUPS = ('false_positives', 'true_positives', 'true_negatives')
SIZE = 64


@pytest.fixture(scope='module')
def kept(): return read_measurement(RESULTS, 'explain_errors')


def said_of_the_test(run):
    "Kept predictions of a network on its test images"
    (folder,) = (d for d in kept_folders() if d.name == run)
    return pd.read_csv(find_file(folder, 'predictions.csv')).query("split == 'test'")


@pytest.fixture(scope='module')
def page():
    "What a reader of the recipe's page sees: text and printed results"
    cells = json.loads((ROOT / 'nbs/articles/pneumonia_explained.ipynb').read_text())['cells']
    out = [''.join(c['source']) for c in cells if c['cell_type'] == 'markdown']
    for o in (o for c in cells for o in c.get('outputs', [])):
        out += [''.join(v) for v in (o.get('text', ''), *(w for k, w in o.get('data', {}).items() if k.startswith('text')))]
    return '\n'.join(out)


# ---- the kept numbers
def test_the_false_positives_are_those_of_the_kept_predictions(kept):
    m, p = kept['maps'], said_of_the_test(kept['maps']['run'])
    positive, ill = p['prob_pneumonia'] >= .5, p['label'] == 'pneumonia'
    wrong = positive & ~ill
    assert m['images'] == len(p) == 624
    assert m['counts'] == dict(false_positives=int(wrong.sum()), healthy=int((~ill).sum()), true_positives=int((positive & ill).sum()),
                               ill=int(ill.sum()), accuracy=pytest.approx((positive == ill).mean()))
    n = m['counts']['false_positives']
    assert m['false_positives']['images'] == n                                     # every one of them
    assert m['false_positives']['patients'] == p[wrong]['group'].nunique()
    assert m['true_positives']['images'] == m['true_negatives']['images'] == n
    assert m['false_positives']['probability']['median'] == pytest.approx(p[wrong]['prob_pneumonia'].median(), abs=1e-4)


def test_the_shares_hang_together(kept):
    m = kept['maps']
    for group in GROUPS:
        for kind in ('lime', 'lime_for', 'lime_against', 'grad_cam'):
            for place, r in ((k, v) for k, v in m[group][kind].items() if isinstance(v, dict) and 'ratio' in v):
                assert r['ratio']['low'] <= r['ratio']['value'] <= r['ratio']['high'] and 0 <= r['share'] <= 1
                assert r['share'] / r['area'] == pytest.approx(r['ratio']['value'])
                if 'twin' not in r: continue
                assert r['ratio']['value'] - r['twin']['value'] == pytest.approx(r['over_twin']['value'], abs=.05)
                if any(m[group][kind].get('empty_twins', ())):      # of some images a network of random weights draws no map
                    assert min(r['twins']) < r['twin']['value'] < max(r['twins'])
                else: assert r['twin']['value'] == pytest.approx(np.mean(r['twins']), abs=.01)
            both, one, two = (m[group][kind][k]['share'] for k in ('diaphragm+sternum', 'diaphragm', 'sternum'))
            assert both == pytest.approx(one + two)                               # the boxes do not overlap
        pull = {k: v['value'] for k, v in m[group]['pull'].items()}
        assert pull['diaphragm+sternum'] == pytest.approx(pull['diaphragm'] + pull['sternum'])
    f, t = (m[g]['pull']['diaphragm']['value'] for g in ('false_positives', 'true_negatives'))
    assert m['false_positives_against']['true_negatives']['diaphragm']['pull']['difference'] == pytest.approx(f - t)


def _check_differences(d):
    for k, v in d.items(): assert v['difference'] == pytest.approx(v['first'] - v['second']) and v['low'] <= v['difference'] <= v['high'], k


def _check_moved(w, healthy, ill):
    "Predictions before and after a region was covered, against the rates of the same row"
    for v in (healthy, ill): assert v['after'] == v['predicted_ill_before'] - v['no_longer'] + v['newly']
    rates = w['against_whole']
    assert rates['false_positive_rate']['first'] == pytest.approx(healthy['after'] / healthy['images'])
    assert rates['recall']['first'] == pytest.approx(ill['after'] / ill['images'])


def test_suppression_in_the_test_hangs_together(kept):
    for network in kept['test'].values():
        p = said_of_the_test(network['run'])
        for regions in network['fills'].values():
            assert tuple(sorted(regions)) == tuple(sorted(PLACES))
            for r in regions.values():
                assert r['shams'] and all(s['area'] == r['area'] for s in r['shams'])
                for w in (r, *r['shams']):
                    _check_differences(w['against_whole'])
                    healthy, ill = (w['moved'][k] for k in ('healthy', 'ill'))
                    _check_moved(w, healthy, ill)
                    wrong = (p['prob_pneumonia'] >= network['threshold']) & (p['label'] == 'normal')
                    assert healthy['predicted_ill_before'] == wrong.sum() and len(p) == network['images']
                for s in r['shams']: _check_differences(s['region_against_it'])


def test_the_trained_suppression_hangs_together(kept):
    t = kept['trained']
    assert (t['first'], t['second']) == ('pneumonia-suppressed-imagenet-seed42', 'pneumonia-explained-honest-imagenet-audited')
    assert len(set(t['epochs'])) == 1                                              # nothing but the images differs
    for r in t['pairs']: assert r['difference'] == pytest.approx(r['first_value'] - r['second_value'])
    for kind in ('frozen', 'half'):
        for k, d in t[kind].items():
            assert d['difference'] == pytest.approx((d['only_first_right'] - d['only_second_right']) / d['images']), k
        assert t[kind]['healthy']['images'] + t[kind]['ill']['images'] == t[kind]['all']['images'] == t['images']
    healthy = t['frozen']['healthy']
    assert t['false_positives'][1] - t['false_positives'][0] == healthy['only_first_right'] - healthy['only_second_right']
    assert kept['test']['honest']['threshold'] == pytest.approx(t['thresholds'][1])
    for name, threshold, n in zip((t['first'], t['second']), t['thresholds'], t['false_positives']):
        healthy = said_of_the_test(name).query("label == 'normal'")
        assert (healthy['prob_pneumonia'] >= threshold).sum() == n, name


def test_the_difference_at_one_sensitivity_is_that_of_the_kept_predictions(kept):
    from renew_intervals import renew_matched
    d = kept['trained']['at_sensitivity']
    assert d['resamples'] == 2000 and d == pytest.approx(renew_matched(kept, RESULTS), abs=1e-9)


def test_the_file_names_no_machine(kept):
    text = (RESULTS / 'explain_errors.json').read_text()
    assert not re.search(r'/(home|work|tmp|root|Users)/', text) and set(kept['versions']) >= {'torch', 'numpy'}
    assert kept['command'].startswith('python benchmarks/explain_errors.py')


def test_the_page_prints_the_file(kept, page):
    m, t = kept['maps'], kept['trained']
    say = lambda d, k='value', sign='': f"{d[k]:{sign}.2f} [{d['low']:{sign}.2f}, {d['high']:{sign}.2f}]"
    for place in (*PLACES, 'border'):
        for kind in ('lime', 'lime_for', 'grad_cam'):
            for group in GROUPS: assert say(m[group][kind][place]['ratio']) in page, (place, kind, group)
            assert say(m['false_positives'][kind][place]['twin']) in page
        assert say(m['false_positives']['pull'][place], sign='+') in page
        assert format_percent(kept['lungs'][place]['mean'], 1) in page
    three = lambda d: f"{d['difference']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]"
    for regions in (regions for network in kept['test'].values() for regions in network['fills'].values()):
        for w in (w for r in regions.values() for w in (r, *r['shams'])):
            for metric in ('auc', 'false_positive_rate'): assert three(w['against_whole'][metric]) in page
    for r in (*t['pairs'], t['at_sensitivity']): assert three(r) in page, r.get('metric', 'at one sensitivity')


# ---- the functions that measure, on scorers whose answer is known
@pytest.fixture(scope='module')
def phantoms():
    from covid_cxr.phantom import phantom_family
    return phantom_family('P1', 12, (1, 1), size=SIZE, seed=0)[0]


@pytest.fixture(scope='module')
def reader(phantoms):
    "Reads nothing but how many pixels of the breastbone's strip are bright: the noise that the article suspected"
    from covid_cxr.images import suppressed_region
    strip = suppressed_region('sternum', SIZE)
    level = np.median(phantoms[:, strip])
    return strip, lambda a: 1 / (1 + np.exp(-((a[:, strip] > level).mean(1) - .5) / .15))


def test_lime_finds_a_scorer_that_reads_one_place(phantoms, reader):
    pytest.importorskip('skimage')
    from explain_errors import KINDS, lime_maps, pull, regions, shares
    strip, score = reader
    p = score(phantoms)
    x = phantoms[(p > .2) & (p < .95)][:2]
    es = lime_maps(score, x, 200, 0)
    at = {n: shares(KINDS['lime'](es), m).mean() for n, m in regions(SIZE).items()}
    assert at['sternum'] > 3 and at['diaphragm'] < .8 and at['border'] < .7, at     # a perfect map would have 11: superpixels are wide
    for e in es:
        whole = pull(e, np.ones((SIZE, SIZE), bool))
        assert whole == pytest.approx(e.weights.sum())
        assert pull(e, strip) + pull(e, ~strip) == pytest.approx(whole)
        assert pull(e, regions(SIZE)['diaphragm+sternum']) == pytest.approx(pull(e, strip) + pull(e, regions(SIZE)['diaphragm']))


def test_suppression_removes_its_false_positives_and_the_sham_does_not(phantoms, reader):
    from explain_errors import suppress_test
    _, score = reader
    rng = np.random.default_rng(0)
    y = np.where(rng.permutation(len(phantoms)) % 2, 'pneumonia', 'normal').astype(object)
    groups = np.arange(len(phantoms)).astype(str).astype(object)
    threshold = float(np.median(score(phantoms)))
    out = suppress_test(score, phantoms, y, groups, threshold, n_boot=200)
    before = out['sternum']['moved']['healthy']['predicted_ill_before']
    assert before > 0 and out['sternum']['moved']['healthy']['after'] == out['diaphragm+sternum']['moved']['healthy']['after'] == 0
    assert out['sternum']['against_whole']['false_positive_rate']['difference'] < 0
    for s in out['sternum']['shams']:
        assert s['moved']['healthy']['after'] == before and s['against_whole']['auc']['difference'] == 0
        assert s['area'] == out['sternum']['area']
    assert out['diaphragm']['moved']['healthy']['after'] == before                       # and the other region has nothing to do with it


def test_shams_have_the_area_and_leave_the_region_alone():
    from covid_cxr.images import suppressed_region
    from explain_errors import border, cover, shams
    for size in (32, 64, 128):
        for name in PLACES:
            region = suppressed_region(name, size)
            for what, place in shams(name, size).items():
                assert place.sum() == region.sum(), (size, name, what)
                assert (place & region).sum() <= (.1 * region.sum() if '+' in name else 0)
        assert .25 < border(size).mean() < .35
    x = np.full((2, 64, 64), 200, np.uint8)
    a, b = cover(x, border(64)), cover(x, border(64), np.full((64, 64), 90.4))
    assert (a[:, border(64)] == 0).all() and (b[:, border(64)] == 90).all() and (a[:, ~border(64)] == 200).all() and (x == 200).all()


def test_means_and_differences_count_patients():
    from explain_errors import difference_of_means, estimate
    one = estimate([1., 1., 1., 0.], ['a', 'a', 'a', 'b'])
    assert one['value'] == .75 and one['n'] == 4 and one['patients'] == 2
    assert one['low'] == 0 and one['high'] == 1                                   # two patients: a wide interval
    r = np.random.default_rng(0)
    u, v = r.normal(1, 1, 200), r.normal(0, 1, 200)
    d = difference_of_means(u, v, [np.arange(200).astype(str)] * 2)
    assert d['difference'] == pytest.approx(u.mean() - v.mean())
    assert d['high'] - d['low'] == pytest.approx(2 * 1.96 * np.sqrt((u.var() + v.var()) / 200), rel=.15)
    assert d['low'] < d['difference'] < d['high']


def test_boxes_over_masks(phantoms):
    from covid_cxr.images import suppressed_region
    from explain_errors import hidden
    box, full, low = suppressed_region('diaphragm', SIZE), np.ones((SIZE, SIZE), bool), np.zeros((SIZE, SIZE), bool)
    low[-8:] = True
    assert hidden([full, low, np.zeros_like(full)], box).tolist() == [box.mean(), 1.]       # an empty mask says nothing


@needs_data
def test_the_lungs_that_the_boxes_hide(kept):
    if not (DATA / 'covid-chestxray-dataset/annotations/lungVAE-masks').is_dir(): pytest.skip('lung masks not present')
    from types import SimpleNamespace
    from explain_errors import measure_lungs
    again = measure_lungs(SimpleNamespace(data=DATA))
    for place in PLACES: assert again[place] == pytest.approx(kept['lungs'][place])
