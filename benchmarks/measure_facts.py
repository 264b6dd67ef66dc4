"""What these public films give away, measured again with this library: the facts that `nbs/articles/shortcuts.ipynb` tells.

    python benchmarks/measure_facts.py --data ../shared/data          about half an hour on two cores

Films are read at 64 x 64 (aspect not kept for the Kaggle copies, which come that way; padded elsewhere). Rivals: `covid_cxr.audit.baselines` (logistic regression on
pixels, random forest on facts) and `covid_cxr.audit.small_cnn` (four convolutions). Everything is judged out of sample by patient group, with intervals over groups.
The result replaces benchmarks/results/facts.json.
"""
import argparse, json, os, platform, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault('OMP_NUM_THREADS', '1')
import numpy as np, pandas as pd
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from covid_cxr.core import used, versions
from covid_cxr.duplicates import find_exact
from covid_cxr.evaluate import choose_threshold, evaluate, threshold_regret, wilson
from covid_cxr.audit.baselines import blacken, corner_boxes, file_features, grow, group_folds, held_out_scores, intensity_numbers, lung_box, provenance_features
from covid_cxr.images import ImageRule, fit_to, load_image, read_grey
from covid_cxr.curate.patient_ids import explain_patient_ids, patient_id_overlaps
from covid_cxr.sources import read_source
from covid_cxr.audit.small_cnn import fit_small_cnn
from covid_cxr.table import group_leaksafe, filter_views

OUT, SIDE = ROOT / 'benchmarks/results/facts.json', 64
FACTS = {}


def say(fact, what, value, low=None, high=None, n=None, published=None):
    "Keep one number; `published` is what was reported elsewhere, for comparison"
    row = dict(what=what, value=round(float(value), 4), low=None if low is None else round(float(low), 4), high=None if high is None else round(float(high), 4), n=n, published=published)
    FACTS.setdefault(fact, []).append(row)
    print(fact, row, flush=True)

def say_auc(fact, what, y, s, groups, published=None):
    e = evaluate(y, s, groups, n_boot=1000)['auc']
    say(fact, what, e.value, e.low, e.high, f'{len(y)} films, {len(set(groups))} groups', published)
    return e

def pictures(paths, how='pad'): return np.stack([load_image(p, ImageRule(SIDE, how)) for p in paths])

def views_without_lungs(x):
    "name -> (features, rival)"
    h, w = x.shape[1:]
    flat, ring, corners = x.reshape(len(x), -1), ~lung_box(h, w, .125), corner_boxes(h, w)
    return {'border ring of 8 of 64 pixels': (flat[:, ring.ravel()], 'logistic'), 'four corners of 8 pixels': (flat[:, corners.ravel()], 'logistic'), 'seven intensity numbers of the whole film': (intensity_numbers(x), 'logistic')}


def kaggle_keys(table, cache):
    "F1 to F3: what the file names say about patients, and copies"
    t = used(table).reset_index(drop=True)
    name = t['path'].map(lambda p: Path(p).name)
    t['number'] = name.str.extract(r'^(person\d+)_')[0]
    t['part'] = t['official_split']
    ill = t[t['number'].notna()]
    parts = lambda key: ill.groupby(key)['part'].agg(set)
    both = lambda key: parts(key)[parts(key).map(lambda s: {'train', 'test'} <= s)]
    shared = both('number')
    say('F1', 'person numbers that stand in train and in test', len(shared), published='170')
    say('F1', 'test films that carry such a number', ill[(ill['part'] == 'test') & ill['number'].isin(shared.index)].shape[0], published='320 of 624')
    say('F1', 'patients (number and kind) that stand in train and in test', len(both(['number', 'kind'])), published='0')
    say('F1', 'numbers with both kinds', (ill.groupby('number')['kind'].nunique() == 2).sum(), n=f"{ill['number'].nunique()} numbers", published='979 of 1,674')
    r = explain_patient_ids(t, 'number', 'kind', part='part', cache_file=cache)
    say('F1', 'z: films of one number and different kinds against chance', r.across.z, n=f'{r.across.pairs} pairs', published='p = .996')
    say('F1', 'z: films of one number and one kind against chance', r.joined.z, n=f'{r.joined.pairs} pairs', published='21')
    say('F2', 'patients in all', t['patient'].nunique(), published='4,097')
    say('F2', 'patients in the official test', t.loc[t['part'] == 'test', 'patient'].nunique(), n='624 films', published='428')
    rng, crossing, leak, p = np.random.default_rng(0), [], [], find_exact(t, cache_file=cache)
    part = t.set_index('image_id')['part']
    ends = pd.DataFrame(dict(a=part.reindex(p['a']).to_numpy(), b=part.reindex(p['b']).to_numpy()))
    at = {v: i for i, v in enumerate(t['image_id'])}
    _, comp = connected_components(coo_matrix((np.ones(len(p)), ([at[i] for i in p['a']], [at[i] for i in p['b']])), shape=(len(t),) * 2), directed=False)
    sizes = pd.Series(comp).value_counts()
    sets = sizes[sizes > 1]
    say('F3', 'sets of identical pictures', len(sets), n=f'{sets.sum()} films', published='30 sets of 62 films')
    say('F3', 'pairs of identical pictures inside the test', ((ends['a'] == 'test') & (ends['b'] == 'test')).sum(), published='6')
    say('F3', 'pairs of identical pictures across train and test', (ends['a'] != ends['b']).sum(), published='0')
    for _ in range(100):
        where = rng.choice(3, len(t), p=[.7, .15, .15])
        crossing.append(sum(len(set(where[comp == c])) > 1 for c in sets.index))
    say('F3', 'sets that a random 70/15/15 split by image cuts, mean of 100', np.mean(crossing), *np.quantile(crossing, [.025, .975]), published='15')
    key = pd.factorize(t['patient'])[0]
    for _ in range(20):
        where = rng.choice(3, len(t), p=[.7, .15, .15])
        leak.append(np.isin(key[where == 2], key[where == 0]).mean())
    say('F3', 'share of test films whose patient is in train, after such a split', np.mean(leak), *np.quantile(leak, [.025, .975]), published='333 of 879')
    return t


def kaggle_official(t, x):
    "F6 and F7: the official test, and what is read without lungs"
    train, test = (t['official_split'] == 'train').to_numpy(), (t['official_split'] == 'test').to_numpy()
    y, groups = (t['finding'] != 'No Finding').to_numpy().astype(int), t['patient'].to_numpy(object)
    for c, k in (('NORMAL', 0), ('PNEUMONIA', 1)):
        at = (y == k) & (train | test)
        some = at & (np.random.default_rng(0).random(len(y)) < (1 if k == 0 else .35))
        say_auc('F6', f'which folder (train or test) a {c} film lies in, from its pixels', test[some].astype(int), held_out_scores(x[some], test[some].astype(int), groups[some], 'logistic'), groups[some], '.91' if k == 0 else '.64')
    fold = group_folds(y[train], groups[train], 4)
    inside = np.full(train.sum(), np.nan)
    xt, yt = x[train], y[train]
    for k in range(fold.max() + 1): inside[fold == k] = fit_small_cnn(xt[fold != k], yt[fold != k], epochs=5).score(xt[fold == k])
    e = say_auc('F6', 'small network, cross-validated inside train', yt, inside, groups[train], '.993 (hand features)')
    # threshold of the best balanced accuracy inside train, frozen
    point = choose_threshold(yt, inside, 'youden')
    net = fit_small_cnn(xt, yt, epochs=5)
    s = net.score(x[test])
    say_auc('F6', 'small network, official test', y[test], s, groups[test], '.948 (hand features)')
    ev = evaluate(y[test], s, groups[test], point.threshold, n_boot=1000)
    for m, pub in (('accuracy', '.803'), ('recall', '.992'), ('specificity', '.487')): say('F6', f'small network, official test, threshold frozen in train: {m}', *ev[m][:3], n=f'{test.sum()} films', published=pub)
    gap = threshold_regret(y[test], s, point.threshold)
    say('F6', 'accuracy if the threshold had been chosen on the test', gap['oracle_accuracy'], n=f'{test.sum()} films', published='.881')
    both = train | test
    for name, (X, rival) in views_without_lungs(x).items():
        pub = dict(b='.965 / .781', f='.902 / .835', s='.845 / .803')[name[0]]
        say_auc('F7', f'{name}: cross-validated inside train', yt, held_out_scores(X[train], yt, groups[train], rival), groups[train], pub.split(' / ')[0])
        o = held_out_scores(X[both], y[both], groups[both], rival, train=train[both])
        say_auc('F7', f'{name}: official test', y[test], o[test[both]], groups[test], pub.split(' / ')[1])


def covid_against_children(covid, kaggle):
    "F8: the join of the articles"
    pos = covid[covid['finding'] == 'Pneumonia/Viral/COVID-19']
    neg = kaggle[kaggle['finding'] == 'No Finding']
    both = pd.concat([pos, neg], ignore_index=True)
    x, y, g = pictures(both['path']), np.r_[np.ones(len(pos)), np.zeros(len(neg))].astype(int), both['group'].fillna(both['patient']).to_numpy(object)
    for (name, (X, rival)), pub in zip(views_without_lungs(x).items(), ('.991', '.966', '.859')): say_auc('F8', f'COVID adults against normal children, {name}', y, held_out_scores(X, y, g, rival), g, pub)
    say_auc('F8', 'COVID adults against normal children, small network, whole film', y, held_out_scores(x, y, g, 'net'), g, '.998')
    say_auc('F8', 'COVID adults against normal children, small network, lungs behind a black box', y, held_out_scores(blacken(x, lung_box(SIDE, SIDE)), y, g, 'net'), g)
    net = fit_small_cnn(x, y)
    for name, finding, pub in (('adults with No Finding of the same collection', lambda f: f == 'No Finding', '13 of 13'), ('adults with other pneumonia of the same collection', lambda f: f.startswith('Pneumonia') and f != 'Pneumonia/Viral/COVID-19', '68 of 68')):
        rest = covid[covid['finding'].map(lambda f: isinstance(f, str) and finding(f))]
        called = net.score(pictures(rest['path'])) >= .5
        say('F8', f'{name}: share called COVID', called.mean(), *wilson(called.sum(), len(called)), n=f'{called.sum()} of {len(called)} films', published=pub)
    nih = used(read_source('nih', Path(a.data) / 'nih-chest-xrays-512'))
    adult = nih[nih['age_years'] >= 18]
    called = net.score(pictures(adult['path'])) >= .5
    say('F8', 'adults with No Finding of another hospital (NIH): share called COVID', called.mean(), *wilson(called.sum(), len(called)), n=f'{called.sum()} of {len(called)} films')


def covid_against_other(covid):
    "F9: inside the COVID collection"
    t = covid[covid['finding'].notna()].reset_index(drop=True)
    y, g, x = (t['finding'] == 'Pneumonia/Viral/COVID-19').to_numpy().astype(int), t['group'].fillna(t['patient']).to_numpy(object), pictures(t['path'])
    for name, X, rival, pub in (('web host alone', provenance_features(t, ['host']), 'forest', '.82'), ('year alone', provenance_features(t, ['year']), 'forest', '.91'), ('licence alone', provenance_features(t, ['licence']), 'forest', '.75'),
                                ('file properties (of these re-saved files)', file_features(t['path']), 'forest', '.73 (untouched files)'), ('age and sex', provenance_features(t, ['age_years', 'sex']), 'forest', '.68')):
        say_auc('F9', name, y, held_out_scores(X, y, g, rival), g, pub)
    say_auc('F9', 'whole film, small network', y, held_out_scores(x, y, g, 'net'), g, '.63 (hand features)')
    say_auc('F9', 'lungs behind a black box, small network', y, held_out_scores(blacken(x, lung_box(SIDE, SIDE)), y, g, 'net'), g, '.66 (hand features)')
    m = t['mask'].notna().to_numpy()
    masks = np.stack([fit_to(read_grey(p), SIDE) > 127 for p in t.loc[m, 'mask']])
    say_auc('F9', 'lungs alone, small network (films with a lung mask)', y[m], held_out_scores(blacken(x[m], ~masks), y[m], g[m], 'net'), g[m], '.57 (hand features)')
    hosts = t['host'].value_counts()
    for h in hosts.index[:4]:
        here = (t['host'] == h).to_numpy()
        rest = ~here & ~np.isin(g, g[here])
        if min(np.bincount(y[here], minlength=2)) < 5: continue
        say_auc('F9', f'host {h} left out, small network', y[here], fit_small_cnn(x[rest], y[rest]).score(x[here]), g[here], '.47 to .61')


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', default='../shared/data')
    p.add_argument('--cache', default=None, help='folder that keeps fingerprints')
    a = p.parse_args()
    start = time.perf_counter()
    cache = Path(a.cache) / 'fingerprints.npz' if a.cache else None
    kaggle = kaggle_keys(read_source('kaggle_pneumonia', Path(a.data) / 'chest-xray-pneumonia'), cache)
    kaggle_official(kaggle, pictures(kaggle['path'], 'squash'))
    covid = filter_views(read_source('covid_chestxray', Path(a.data) / 'covid-chestxray-dataset'), ['PA'])
    covid = used(group_leaksafe(covid, duplicates='near', cache_file=cache)).reset_index(drop=True)
    covid = covid[covid['path'].notna()].reset_index(drop=True)
    covid_against_children(covid, used(read_source('kaggle_pneumonia', Path(a.data) / 'chest-xray-pneumonia-512')).reset_index(drop=True))
    covid_against_other(covid)
    from keep_run import cpu_model
    FACTS['not measurable here'] = [dict(what='F4: file properties of untouched Kaggle files', why='these copies were all saved again by one program'), dict(what='F5: re-encoding full-size normals', why='the full-size files are not here')]
    OUT.write_text(json.dumps(dict(command='python benchmarks/measure_facts.py --data ../shared/data', date=time.strftime('%Y-%m-%d'), versions=versions(), machine=dict(cpu=cpu_model(), cores=os.cpu_count(), threads=1, system=platform.system()),
                                   seconds=round(time.perf_counter() - start), pixels=SIDE, facts=FACTS), indent=1) + '\n')
