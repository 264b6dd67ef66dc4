"""What these public collections give away, measured with this library: the numbers of `nbs/articles/shortcuts.ipynb`.

    python benchmarks/measure_facts.py          about half an hour on two cores

Images are read at 64 x 64 (aspect not kept for the Kaggle copies, which come that way; padded elsewhere). Baselines of
`covid_cxr.audit.baselines`: logistic regression on pixels, random forest on metadata, and the network of four convolutions `SmallCNN`.
Everything is scored out of sample by patient group, with intervals over groups from 2,000 resamples.
The result replaces benchmarks/results/facts.json.
"""
import argparse, os, time
from pathlib import Path
os.environ.setdefault('OMP_NUM_THREADS', '1')
from record import RESULTS, about, machine, write_result
import numpy as np, pandas as pd
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from covid_cxr.audit.baselines import (estimate_auc, file_features, fit_small_cnn, group_folds, held_out_scores, intensity_numbers,
                                       metadata_features)
from covid_cxr.audit.regions import blacken, corners, lung_box
from covid_cxr.core import data_folder, used
from covid_cxr.curate.patient_ids import explain_patient_ids
from covid_cxr.duplicates import find_exact
from covid_cxr.evaluate import choose_threshold, evaluate, threshold_regret, wilson
from covid_cxr.images import ImageRule, fit_to, load_image, read_grey
from covid_cxr.sources import read_source
from covid_cxr.table import filter_views, group_leaksafe

OUT, SIDE, COVID = RESULTS / 'facts.json', 64, 'Pneumonia/Viral/COVID-19'
FACTS = {}
NOT_MEASURABLE = (('F4: file properties of untouched Kaggle files', 'these copies were all saved again by one program'),
                  ('F5: re-encoding full-size normals', 'the full-size files are not here'))


# ---- numbers
def say(fact, what, value, low=None, high=None, n=None, published=None):
    "Keep one number; `published` is what was reported elsewhere, for comparison"
    value, low, high = (None if v is None else round(float(v), 4) for v in (value, low, high))
    FACTS.setdefault(fact, []).append(dict(what=what, value=value, low=low, high=high, n=n, published=published))
    print(fact, FACTS[fact][-1], flush=True)

def say_auc(fact, what, y, scores, groups, published=None):
    "Keep an AUC with its interval over groups"
    e = estimate_auc(y, scores, groups)
    say(fact, what, e.value, e.low, e.high, f'{len(y)} images, {len(set(groups))} groups', published)

def say_share(fact, what, predicted, published=None):
    "Keep the share of images that were predicted COVID"
    n, k = len(predicted), int(predicted.sum())
    say(fact, f'{what}: share predicted COVID', k / n, *wilson(k, n), n=f'{k} of {n} images', published=published)


# ---- images
def pictures(paths, how='pad'): return np.stack([load_image(p, ImageRule(SIDE, how)) for p in paths])

def views_without_lungs(x):
    "name -> (n, f) features for a logistic regression"
    h, w = x.shape[1:]
    flat, ring, squares = x.reshape(len(x), -1), ~lung_box(h, w, .125), corners(h, w, .125)
    return {'border ring of 8 of 64 pixels': flat[:, ring.ravel()], 'four corners of 8 pixels': flat[:, squares.ravel()],
            'seven intensity numbers of the whole image': intensity_numbers(x)}

def without_lungs(x): return blacken(x, lung_box(SIDE, SIDE))


# ---- F1 to F3: what the file names say about patients, and copies
def read_file_names(table):
    "Used rows with the person number of the file name and the official split"
    t = used(table).reset_index(drop=True)
    name = t['path'].map(lambda p: Path(p).name)
    return t.assign(number=name.str.extract(r'^(person\d+)_')[0], split=t['official_split'])

def in_train_and_test(rows, columns):
    "Ids that stand in train and in test"
    splits = rows.groupby(columns)['split'].agg(set)
    return splits[splits.map(lambda s: {'train', 'test'} <= s)]

def measure_patient_ids(t, cache):
    ill = t[t['number'].notna()]
    shared = in_train_and_test(ill, 'number')
    carry = ((ill['split'] == 'test') & ill['number'].isin(shared.index)).sum()
    say('F1', 'person numbers that stand in train and in test', len(shared), published='170')
    say('F1', 'test images that carry such a number', carry, published='320 of 624')
    both = in_train_and_test(ill, ['number', 'kind'])
    say('F1', 'patients (number and kind) that stand in train and in test', len(both), published='0')
    two_kinds = (ill.groupby('number')['kind'].nunique() == 2).sum()
    say('F1', 'numbers with both kinds', two_kinds, n=f"{ill['number'].nunique()} numbers", published='979 of 1,674')
    r = explain_patient_ids(t, 'number', 'kind', split='split', cache_file=cache)
    apart, alike = (f'{s.pairs} pairs' for s in (r.across, r.joined))
    say('F1', 'z: images of one number and different kinds against chance', r.across.z, n=apart, published='p = .996')
    say('F1', 'z: images of one number and one kind against chance', r.joined.z, n=alike, published='21')
    say('F2', 'patients in all', t['patient'].nunique(), published='4,097')
    in_test = t.loc[t['split'] == 'test', 'patient'].nunique()
    say('F2', 'patients in the official test', in_test, n='624 images', published='428')

def copies_of(t, pairs):
    "(n,) set of identical images to which each row belongs"
    at = {v: i for i, v in enumerate(t['image_id'])}
    links = coo_matrix((np.ones(len(pairs)), ([at[i] for i in pairs['a']], [at[i] for i in pairs['b']])), shape=(len(t),) * 2)
    return connected_components(links, directed=False)[1]

def measure_copies(t, cache):
    pairs = find_exact(t, cache_file=cache)
    split = t.set_index('image_id')['split']
    a, b = (split.reindex(pairs[k]).to_numpy() for k in ('a', 'b'))
    copies = copies_of(t, pairs)
    sizes = pd.Series(copies).value_counts()
    sets = sizes[sizes > 1]
    say('F3', 'sets of identical images', len(sets), n=f'{sets.sum()} images', published='30 sets of 62 images')
    say('F3', 'pairs of identical images inside the test', ((a == 'test') & (b == 'test')).sum(), published='6')
    say('F3', 'pairs of identical images across train and test', (a != b).sum(), published='0')
    measure_random_splits(t, copies, sets.index)

def measure_random_splits(t, copies, sets):
    "What a random split by image does to copies and to patients"
    rng, patient = np.random.default_rng(0), pd.factorize(t['patient'])[0]
    def draw(): return rng.choice(3, len(t), p=[.7, .15, .15])
    crossing, leak = [], []
    for _ in range(100):
        where = draw()
        crossing.append(sum(len(set(where[copies == c])) > 1 for c in sets))
    for _ in range(20):
        where = draw()
        leak.append(np.isin(patient[where == 2], patient[where == 0]).mean())
    ends = [.025, .975]
    what = 'sets that a random 70/15/15 split by image cuts, mean of 100'
    say('F3', what, np.mean(crossing), *np.quantile(crossing, ends), published='15')
    what = 'share of test images whose patient is in train, after such a split'
    say('F3', what, np.mean(leak), *np.quantile(leak, ends), published='333 of 879')


# ---- F6 and F7: the official test, and what is read without lungs
def measure_which_folder(x, y, groups, train, test):
    for name, k, share, published in (('NORMAL', 0, 1, '.91'), ('PNEUMONIA', 1, .35, '.64')):
        drawn = np.random.default_rng(0).random(len(y)) < share
        some = (y == k) & (train | test) & drawn
        in_test = test[some].astype(int)
        scores = held_out_scores(x[some], in_test, groups[some], 'logistic')
        what = f'which folder (train or test) a {name} image lies in, from its pixels'
        say_auc('F6', what, in_test, scores, groups[some], published)

def cross_validated(x, y, groups):
    "(n,) scores of the small network, by patient"
    fold, scores = group_folds(y, groups, 4), np.full(len(y), np.nan)
    for k in range(fold.max() + 1):
        scores[fold == k] = fit_small_cnn(x[fold != k], y[fold != k], epochs=5).score(x[fold == k])
    return scores

def measure_official_test(x, y, groups, train, test):
    inside = cross_validated(x[train], y[train], groups[train])
    say_auc('F6', 'small network, cross-validated inside train', y[train], inside, groups[train], '.993 (hand features)')
    threshold = choose_threshold(y[train], inside, 'youden').threshold
    scores = fit_small_cnn(x[train], y[train], epochs=5).score(x[test])
    say_auc('F6', 'small network, official test', y[test], scores, groups[test], '.948 (hand features)')
    e, n = evaluate(y[test], scores, groups[test], threshold), f'{test.sum()} images'
    for m, published in (('accuracy', '.803'), ('recall', '.992'), ('specificity', '.487')):
        say('F6', f'small network, official test, threshold frozen in train: {m}', *e[m][:3], n=n, published=published)
    best = threshold_regret(y[test], scores, threshold).best_accuracy
    say('F6', 'accuracy if the threshold had been chosen on the test', best, n=n, published='.881')

def measure_edges(x, y, groups, train, test):
    published = (('.965', '.781'), ('.902', '.835'), ('.845', '.803'))
    both = train | test
    for (name, X), (inside, outside) in zip(views_without_lungs(x).items(), published):
        scores = held_out_scores(X[train], y[train], groups[train], 'logistic')
        say_auc('F7', f'{name}: cross-validated inside train', y[train], scores, groups[train], inside)
        scores = held_out_scores(X[both], y[both], groups[both], 'logistic', train=train[both])
        say_auc('F7', f'{name}: official test', y[test], scores[test[both]], groups[test], outside)

def measure_kaggle(t):
    x, y, groups = pictures(t['path'], 'squash'), (t['finding'] != 'No Finding').to_numpy().astype(int), t['patient'].to_numpy(object)
    train, test = ((t['official_split'] == s).to_numpy() for s in ('train', 'test'))
    for measure in (measure_which_folder, measure_official_test, measure_edges): measure(x, y, groups, train, test)


# ---- F8: the join of the articles
def measure_join(covid, kaggle, data):
    positive, negative = covid[covid['finding'] == COVID], kaggle[kaggle['finding'] == 'No Finding']
    both = pd.concat([positive, negative], ignore_index=True)
    x, y = pictures(both['path']), np.r_[np.ones(len(positive)), np.zeros(len(negative))].astype(int)
    groups, join = both['group'].fillna(both['patient']).to_numpy(object), 'COVID adults against normal children'
    for (name, X), published in zip(views_without_lungs(x).items(), ('.991', '.966', '.859')):
        say_auc('F8', f'{join}, {name}', y, held_out_scores(X, y, groups, 'logistic'), groups, published)
    for what, images, published in (('whole image', x, '.998'), ('lungs behind a black box', without_lungs(x), None)):
        say_auc('F8', f'{join}, small network, {what}', y, held_out_scores(images, y, groups, 'small_cnn'), groups, published)
    measure_adults(fit_small_cnn(x, y), covid, data)

def measure_adults(net, covid, data):
    "What the network of the join says of adults without COVID-19"
    def predicted(rows): return net.score(pictures(rows['path'])) >= .5
    f = covid['finding'].astype(str)
    others = {'adults with No Finding of the same collection': (f == 'No Finding', '13 of 13'),
              'adults with other pneumonia of the same collection': (f.str.startswith('Pneumonia') & (f != COVID), '68 of 68')}
    for name, (where, published) in others.items(): say_share('F8', name, predicted(covid[where]), published)
    nih = used(read_source('nih', Path(data) / 'nih-chest-xrays-512'))
    say_share('F8', 'adults with No Finding of another hospital (NIH)', predicted(nih[nih['age_years'] >= 18]))


# ---- F9: inside the COVID collection
def measure_metadata(t, y, groups):
    files = file_features(t['path'])
    features = (
        ('web host alone', metadata_features(t, ['host']), '.82'), ('year alone', metadata_features(t, ['year']), '.91'),
        ('licence alone', metadata_features(t, ['licence']), '.75'),
        ('file properties (of these re-saved files)', files, '.73 (untouched files)'),
        ('age and sex', metadata_features(t, ['age_years', 'sex']), '.68'))
    for name, X, published in features: say_auc('F9', name, y, held_out_scores(X, y, groups, 'forest'), groups, published)

def measure_lungs(t, x, y, groups):
    m = t['mask'].notna().to_numpy()
    masks = np.stack([fit_to(read_grey(p), SIDE) > 127 for p in t.loc[m, 'mask']])
    every = np.ones(len(t), bool)
    for what, images, where, published in (
            ('whole image', x, every, '.63'), ('lungs behind a black box', without_lungs(x), every, '.66'),
            ('lungs alone', blacken(x[m], ~masks), m, '.57')):
        scores = held_out_scores(images, y[where], groups[where], 'small_cnn')
        about_masks = ' (images with a lung mask)' if where is m else ''
        say_auc('F9', f'{what}, small network{about_masks}', y[where], scores, groups[where], f'{published} (hand features)')

def measure_hosts(t, x, y, groups):
    for host in t['host'].value_counts().index[:4]:
        here = (t['host'] == host).to_numpy()
        rest = ~here & ~np.isin(groups, groups[here])
        if min(np.bincount(y[here], minlength=2)) < 5: continue
        scores = fit_small_cnn(x[rest], y[rest]).score(x[here])
        say_auc('F9', f'host {host} left out, small network', y[here], scores, groups[here], '.47 to .61')

def measure_within(covid):
    t = covid[covid['finding'].notna()].reset_index(drop=True)
    x, y = pictures(t['path']), (t['finding'] == COVID).to_numpy().astype(int)
    groups = t['group'].fillna(t['patient']).to_numpy(object)
    measure_metadata(t, y, groups)
    measure_lungs(t, x, y, groups)
    measure_hosts(t, x, y, groups)


def measure(data, cache=None):
    "Everything, in order"
    data = Path(data)
    children = read_file_names(read_source('kaggle_pneumonia', data / 'chest-xray-pneumonia'))
    measure_patient_ids(children, cache)
    measure_copies(children, cache)
    measure_kaggle(children)
    covid = filter_views(read_source('covid_chestxray', data / 'covid-chestxray-dataset'), ['PA'])
    covid = used(group_leaksafe(covid, duplicates='near', cache_file=cache)).reset_index(drop=True)
    covid = covid[covid['path'].notna()].reset_index(drop=True)
    measure_join(covid, used(read_source('kaggle_pneumonia', data / 'chest-xray-pneumonia-512')).reset_index(drop=True), data)
    measure_within(covid)
    FACTS['not measurable here'] = [dict(what=what, why=why) for what, why in NOT_MEASURABLE]


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', default=str(data_folder()), help='folder that holds the collections')
    p.add_argument('--cache', help='folder that keeps fingerprints')
    p.add_argument('--out', default=str(OUT))
    a = p.parse_args()
    start = time.perf_counter()
    measure(a.data, Path(a.cache) / 'fingerprints.npz' if a.cache else None)
    seconds = round(time.perf_counter() - start)
    write_result(a.out, dict(about(), machine=machine(), seconds=seconds, pixels=SIDE, resamples=2000, facts=FACTS))
