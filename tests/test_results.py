"""Every committed result is derived again from its predictions: no number in prose without a file, no file without its predictions."""
import gzip, html, json, re, sys
import numpy as np, pandas as pd, pytest
from conftest import ROOT
from covid_cxr.articles.conditions import ABSENT, find_audited, find_networks, markdown_table
from covid_cxr.articles.reported import ABLATION, ARTICLES, OWN
from covid_cxr.articles.tables import TABLES, article_results, make_tables, read_measurement, read_tables, select_rows
from covid_cxr.audit.baselines import best_baseline
from covid_cxr.audit.case import read_audit
from covid_cxr.audit.sentences import describe_headline, describe_verdict
from covid_cxr.core import choices
from covid_cxr.evaluate import choose_threshold, evaluate
from covid_cxr.recipe import recipe_hash
from covid_cxr.runs.external import read_external_tests
from covid_cxr.runs.folder import BaselineKind, RunFolder
from covid_cxr.words import format_number, format_percent
for folder in ('benchmarks', 'tools'): sys.path.insert(0, str(ROOT / folder))
import notebooks
from record import kept_folders

KEPT = ROOT / 'benchmarks' / 'results'
NETWORKS = find_networks(KEPT)
RUNS = [RunFolder.open(f) for f in kept_folders()]
AUDITED = [r for r in RUNS if r.audit_json is not None]
TESTED_OUTSIDE = [r for r in RUNS if r.external_json is not None]
WITH_BASELINES = [r for r in RUNS if r.baseline_scores is not None]


def name_of(run): return run.name


def load(name): return json.loads((KEPT / name).read_text(encoding='utf-8'))


def test_there_are_results(): assert RUNS, 'no run is kept under benchmarks/results'


def test_there_are_audits_external_tests_and_baselines(): assert AUDITED and TESTED_OUTSIDE and WITH_BASELINES


def test_no_kept_file_names_a_place():
    for f in (f for f in KEPT.rglob('*') if f.is_file()):
        content = gzip.decompress(f.read_bytes()) if f.suffix == '.gz' else f.read_bytes()
        assert not re.search(rb'/(home|work|tmp|root|Users)/', content), f


def test_kept_results_are_compressed_and_stay_small():
    files = [f for f in KEPT.rglob('*') if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 10e6
    assert {f.name for f in files if f.suffix == '.csv'} <= {'history.csv', 'lr_find.csv'}
    for f in (f for f in files if f.suffix == '.gz'): assert f.read_bytes()[3:8] == bytes(5), f'{f} holds a name or a time'


# ---- a run
def frozen_threshold(run):
    "Chosen again on the validation split"
    v, positive = run.predictions[run.predictions['split'] == 'valid'], run.classes[1]
    goal = run.recipe.evaluation.goal
    return choose_threshold(v['label'].to_numpy(), v[f'prob_{positive}'].to_numpy(), goal=goal, classes=list(run.classes)).threshold


def evaluated_again(run, threshold):
    "The metrics of the evaluated split as evaluation.json has them"
    t, classes = run.evaluated_predictions, list(run.classes)
    probs = t[[f'prob_{c}' for c in classes]].to_numpy()
    return evaluate(t['label'].to_numpy(), probs[:, 1] if len(classes) == 2 else probs, groups=t['group'].to_numpy(), threshold=threshold,
                    classes=classes, n_boot=run.recipe.evaluation.n_boot, seed=run.recipe.seed).to_dict()['estimates']


@pytest.mark.parametrize('run', RUNS, ids=name_of)
def test_a_kept_run_follows_from_its_predictions(run):
    p, e = run.predictions, run.evaluation
    assert 'path' not in p and not p['image_id'].str.contains('/').any()
    assert (p.groupby('group')['split'].nunique() == 1).all() or e['leaking_groups'], 'a group on two sides'
    threshold = .5
    if len(run.classes) == 2:
        threshold = frozen_threshold(run)
        assert threshold == pytest.approx(run.threshold)
    again = evaluated_again(run, threshold)
    for m, kept in e[run.split]['estimates'].items():
        for k in ('value', 'low', 'high'):
            assert (again[m][k] is None) == (kept[k] is None), (m, k)
            assert kept[k] is None or again[m][k] == pytest.approx(kept[k], abs=1e-9), (m, k)
    auc = e[run.split]['estimates'].get('auc', {}).get('value') if len(run.classes) == 2 else None
    if auc is None: return                                   # a collection of one class that was left out has none
    assert f'auc {auc:.3f}' in run.file('summary.txt').read_text()


# ---- audits
@pytest.mark.parametrize('run', AUDITED, ids=name_of)
def test_a_kept_audit_speaks_of_this_run(run):
    a = read_audit(run)
    h = a.headline
    assert a.split == run.split and h.model_auc.value == pytest.approx(run.evaluation[a.split]['estimates']['auc']['value'], abs=1e-9)
    for kind, baseline, gain in (('image_without_lungs', h.best_baseline, h.auc_gain),
                                 ('metadata', h.metadata_baseline, h.auc_gain_over_metadata)):
        if baseline is None:                            # the baselines of this kind know nothing, and nothing is said of them
            assert np.isnan(gain.value) and {b.auc.value for b in a.baselines if b.kind == kind} <= {.5}
            continue
        best = best_baseline(a.baselines, kind).auc.value
        assert baseline.auc.value == best and gain.value == pytest.approx(h.model_auc.value - best, abs=1e-9)
    assert h.reads_lungs == (h.auc_gain.low > 0 and h.model_auc.low > .5 and not h.leaking_groups)
    assert sum(a.counts.values()) == len(a.verdicts)
    for word, n in a.counts.items(): assert n == sum(v.verdict == word for v in a.verdicts), word


@pytest.mark.parametrize('run', AUDITED, ids=name_of)
def test_the_text_of_a_kept_audit_is_that_of_its_data(run):
    raw, text = run.audit_json, run.file('audit.txt').read_text()
    a, one_line = read_audit(run), ' '.join(text.split())
    assert raw['version'] == 2 and not a.quick and describe_headline(a.headline) in one_line
    for v in a.verdicts: assert describe_verdict(v)[:60] in one_line, v


# ---- external tests
@pytest.mark.parametrize('run', TESTED_OUTSIDE, ids=name_of)
def test_a_kept_external_test_follows_from_its_predictions(run):
    tests = read_external_tests(run.path)
    assert tests
    for test in tests:
        p = pd.read_csv(run.file(test.predictions))
        prob = [c for c in p if c.startswith('prob_')][-1]
        assert len(p) == test.n_images and 'path' not in p
        if not test.one_class: continue
        rate = test.false_positive_rate or test.sensitivity
        assert (p[prob] >= run.threshold).mean() == pytest.approx(rate.value, abs=1e-9)


# ---- benchmarks and the pages that print them
def test_the_page_of_shortcuts_prints_what_was_measured():
    facts, page = load('facts.json')['facts'], (ROOT / 'nbs/articles/shortcuts.ipynb').read_text()
    def value(fact, start): return next(r['value'] for r in facts[fact] if r['what'].startswith(start))
    assert value('F1', 'person numbers') == 170 and value('F1', 'patients (number and kind)') == 0
    assert value('F3', 'sets of identical') == 30
    assert value('F6', 'small network, cross-validated') - value('F6', 'small network, official test') > 0, 'the fall to the official test'
    for f in ('F6', 'F7', 'F8', 'F9'):
        for r in facts[f]: assert format_number(r['value']) in page, (f, r['what'])


def test_the_verdict_matrix_in_the_docs_is_the_one_expected():
    from test_audit import EXPECTED
    m = load('audit_matrix.json')
    for name, row in m['verdicts'].items():
        for check, right in EXPECTED[name.split()[0]].items(): assert row[check] in right, (name, check, row[check])
    assert {n.split()[0] for n in m['verdicts']} == set(EXPECTED)


def test_the_articles_numbers():
    "Kermany's headline is flagged, the numbers of the small CNN fit exactly one matrix, the published CSVs say what the article says"
    a = read_measurement(KEPT, 'article_numbers')
    fits = {r['article'].split(',')[0].split(' (')[0]: r['matrices'] for r in a['reported']}
    assert fits['Kermany et al. 2018'] == 0 and fits['pneumonia-cnn'] == 1
    assert a['files'] and all(f['agrees'] for f in a['files'].values())


def test_the_lung_box_covers_what_the_notebooks_say():
    from lung_box import measure, phantom_masks
    kept, again = load('lung_box.json'), measure(phantom_masks())
    for k in ('box', 'box_without_corners'): assert again[k] == pytest.approx(kept['phantoms'][k], abs=1e-9)
    printed = json.dumps([c['outputs'] for c in notebooks.code_cells(ROOT / 'nbs/audit/regions.ipynb')], ensure_ascii=False)
    shares = [kept[masks][k] for masks in ('real', 'phantoms') for k in ('box', 'box_without_corners')]
    said = [*(format_percent(x, 1) for x in shares), f"{format_percent(kept['visible'])} of the picture"]
    for words in said: assert words in printed, words


def test_the_views_of_the_whole_collection_are_those_of_the_effusion_story():
    counts, story = load('effusion_edges.json')['views']['counts'], (ROOT / 'nbs/articles/effusion_resnet.ipynb').read_text()
    shares = {label: format_percent(n['AP'] / sum(n.values()), 1) for label, n in counts.items()}
    assert '{effusion} of the images with effusion are AP and {no_finding} of those without'.format(**shares) in story


# ---- folds, baselines, arms
@pytest.mark.parametrize('run', WITH_BASELINES, ids=name_of)
def test_kept_baselines_scored_the_evaluated_images_of_this_run(run):
    evaluated, scores = set(run.evaluated_predictions['image_id']), run.baseline_scores
    for name, t in scores.groupby('baseline'):
        assert len(t) == len(evaluated) and set(t['image_id']) == evaluated and t['score'].between(0, 1).all(), name
    assert {'image_without_lungs', 'file'} <= set(scores['kind']) <= set(choices(BaselineKind))


def test_cross_validations_are_whole_and_test_every_image_once():
    folded = [(n, runs) for of in NETWORKS.values() for n in of if n.of_folds for runs in n.trainings]
    assert {'effusion-resnet-honest', 'covid-2020-within', 'covid-2020-adults', 'coronahack-vgg-honest'} <= {n.recipe for n, _ in folded}
    for n, runs in folded:
        name = n.title
        assert [r.recipe.split.fold for r in runs] == list(range(runs[0].recipe.split.n_folds)), name
        every = [r.predictions for r in runs]
        tested = pd.concat([p[p['split'] == 'test'] for p in every])
        assert tested['image_id'].is_unique and set(tested['image_id']) == set(every[0]['image_id']), name
        for p in every: assert not set(p[p['split'] == 'test']['group']) & set(p[p['split'] != 'test']['group']), name


def test_no_arm_is_evaluated_on_what_its_weights_have_seen():
    "No image and no group of the kept `pretrain` is in any split of a recipe on which its weights are tried"
    seen = NETWORKS['pretrain'][0].first
    assert seen.recipe.model.weights == 'imagenet'
    for n in (n for name in ABLATION for n in NETWORKS[name]):
        for r in n.runs:
            assert (n.arm == 'in-domain') == (r.recipe.model.weights == 'runs/pretrain/bundle/weights.safetensors')
            for column in ('image_id', 'group'):
                assert not set(r.predictions[column].dropna()) & set(seen.predictions[column].dropna()), (r.name, column)


def test_arms_of_one_seed_share_their_folds():
    arms = [n for of in NETWORKS.values() for n in of if n.arm != OWN]
    assert arms
    folds = {}
    for n in arms:
        for runs in n.trainings:
            images = {(r.recipe.split.fold, i) for r in runs for i in r.evaluated_predictions['image_id']}
            s = runs[0].recipe
            assert folds.setdefault((n.recipe, s.seed, s.split.source), images) == images, n.title


def test_an_arm_is_what_it_is_called():
    "A kept folder of an arm has the name that the plan gives it, and stands for that arm"
    for n in (n for of in NETWORKS.values() for n in of if n.arm != OWN):
        for r in n.runs: assert r.name.startswith(f'{n.recipe}-{n.arm}-seed{r.recipe.seed}'), r.name


# ---- the tables of the documentation
@pytest.fixture(scope='module')
def tables(): return read_tables(KEPT)


def cell(v):
    "A cell as the file holds it: numbers to nine digits, NaN and None alike"
    if v is None or (isinstance(v, float) and np.isnan(v)): return None
    return round(float(v), 9) if isinstance(v, (float, np.floating)) else str(v)


def test_the_tables_are_those_of_the_kept_results(tables):
    "Made again from the predictions, 2,000 resamples for every interval, and compared cell by cell"
    n_boot = load(TABLES)['n_boot']
    again = make_tables(KEPT, n_boot=n_boot)
    assert n_boot == 2000 and list(again) == list(tables) and len(tables) == 13
    for name, t in again.items():
        kept = tables[name]
        assert list(t.columns) == list(kept.columns) and len(t) == len(kept) > 0, name
        for column in t:
            for i, (a, b) in enumerate(zip(t[column], kept[column])): assert cell(a) == cell(b), (name, column, i)
    assert not (again['articles'] == ABSENT).any().any()


def printed(path):
    "What a reader of a page sees of its tables"
    if path.suffix == '.md': return path.read_text(encoding='utf-8')
    outputs = [o for c in json.loads(path.read_text(encoding='utf-8'))['cells'] for o in c.get('outputs', [])]
    return '\n'.join(''.join(o.get('data', {}).get('text/markdown', o.get('text', ''))) for o in outputs)


def assert_rows(t, text):
    for line in markdown_table(t).splitlines(): assert line in text, line


@pytest.mark.parametrize('name', ['gains', 'leaks', 'arms', 'left_out', 'published_test', 'aims', 'local', 'audits'])
def test_the_page_of_results_prints_the_tables(tables, name):
    page = 'results_audits' if name == 'audits' else 'results'
    assert_rows(tables[name], printed(ROOT / f'nbs/{page}.ipynb'))


@pytest.mark.parametrize('key', ARTICLES)
def test_the_page_of_results_prints_every_article(tables, key):
    assert_rows(article_results(tables['articles'], key), printed(ROOT / 'nbs/results.ipynb'))


def test_the_page_of_results_prints_folds_and_runs(tables):
    text, folds, runs = printed(ROOT / 'nbs/results.ipynb'), tables['crossval'], tables['runs']
    assert_rows(folds[~folds['fold'].str.startswith('fold ')], text)
    shown = ['recipe', 'arm', 'size', 'arch', 'weights', 'epochs', 'evaluated_on', 'images', 'groups', 'leaking_groups', 'seed', 'minutes']
    for line in markdown_table(runs[shown]).splitlines()[2:]: assert line.removesuffix('|').strip() in text, line


STORIES = (   # notebook, table of tables.json, the rows that it prints
    ('pneumonia_cnn', 'articles', dict(article='pneumonia-cnn')), ('pneumonia_explained', 'articles', dict(article='pneumonia-explained')),
    ('covid_2020', 'articles', dict(article='covid-2020')), ('coronahack_vgg', 'articles', dict(article='coronahack-vgg')),
    ('effusion_resnet', 'articles', dict(article='effusion-resnet')), ('pneumonia_cnn', 'leaks', dict(run='pneumonia-cnn-imagenet-seed42')),
    ('covid_2020', 'asides', {}), ('covid_2020_fair', 'left_out', {}), ('covid_2020_fair', 'crossval', dict(recipe='covid-2020-adults')),
    ('covid_2020_fair', 'crossval', dict(recipe='covid-2020-within')), ('covid_2020_fair', 'gains', dict(recipe='covid-2020-adults')),
    ('coronahack_vgg', 'crossval', dict(recipe='coronahack-vgg-honest')), ('pretrain', 'arms', dict(recipe='effusion-resnet-honest')),
    ('effusion_resnet', 'crossval', dict(recipe='effusion-resnet-honest')),
    ('effusion_resnet', 'leaks', dict(run='effusion-resnet-imagenet-seed42')),
    ('effusion_resnet', 'gains', dict(recipe='effusion-resnet-honest')))


@pytest.mark.parametrize('story,name,rows', STORIES, ids=lambda v: v if isinstance(v, str) else '-'.join(v.values()))
def test_the_stories_print_the_tables(tables, story, name, rows):
    cells = json.loads((ROOT / f'nbs/articles/{story}.ipynb').read_text(encoding='utf-8'))['cells']
    page = '\n'.join(''.join(o.get('data', {}).get('text/html', '')) for c in cells for o in c.get('outputs', []))
    t = article_results(tables[name], rows['article']) if name == 'articles' else select_rows(tables[name], **rows)
    texts = [v for c in t if not pd.api.types.is_numeric_dtype(t[c]) for v in t[c] if v]
    for v in texts: assert f'<td>{html.escape(str(v), quote=False)}</td>' in page, v


def test_the_augmentation_of_the_arms_is_the_one_that_was_chosen_on_held_out_clusters():
    from covid_cxr.articles.reported import ARMS
    kept = load('choose_augmentation.json')
    scores = {}
    for name, r in kept['candidates'].items():
        for where in ('held_out', 'by_patient'):
            for m, value in r[where].items(): assert value == pytest.approx(np.mean([f[where][m] for f in r['folds']]))
        scores[name] = r['held_out']['balanced_accuracy']
        own = [f['threshold'] for f in r['folds']]
        if name != 'wide and other machines': assert min(own) <= r['stress_threshold']['threshold'] <= max(own)     # as the page says
        for f in (f['held_out'] for f in r['folds']):
            assert f['balanced_accuracy'] == pytest.approx((f['recall'] + f['specificity']) / 2)
    assert kept['chosen'] == max(scores, key=scores.get)
    arm, chosen = ARMS['pneumonia-resnet']['imagenet'].settings, kept['candidates'][kept['chosen']]['settings']
    assert {k: arm[k] for k in chosen} == chosen


def test_the_ratios_of_speed_follow_from_the_seconds():
    rows = json.loads((KEPT / 'predict_speed.json').read_text())['rows']
    beside = {(r['row'], r['command']): r for r in rows}
    for r in rows:
        other = beside[r['row'], r['beside']]
        for what in ('seconds', 'cpu_seconds', 'memory'):
            if what in r: assert abs(r[f'{what}_ratio'] / (other[what] / r[what]) - 1) < .005, (r['row'], r['command'], what)


def test_the_runs_of_the_gpu_are_those_that_are_kept():
    found = json.loads((KEPT / 'gpu_articles.json').read_text())
    never_begun = {r['name'] for r in found['left_out'] if 'needs about' in r['why']}
    assert found['failed'] == [] and not never_begun & {r['name'] for r in found['runs']}
    for r in found['runs']:
        if not (KEPT / r['name']).is_dir(): continue
        run = RunFolder.open(KEPT / r['name'])
        assert run.state['device'] == r['device'] == 'cuda' and run.state['gpu'] == found['machine']['gpu'], r['name']
        auc = run.result.estimates['auc'].value
        assert np.isnan(auc) if 'auc' not in r else abs(auc - r['auc']) < 1e-4, r['name']
    kept = [r['name'] for r in found['runs'] if (KEPT / r['name']).is_dir()]
    assert len(kept) > 80


def test_the_audited_networks_are_what_their_script_trains():
    from audit_articles import NAMES, recipe_of
    kept = {r.recipe.name: r for runs in find_audited(KEPT).values() for r in runs}
    assert set(NAMES) == set(kept)
    for name, r in kept.items():
        assert recipe_hash(recipe_of(name)) == r.state['recipe_hash'] and r.name == f'{name}-imagenet-audited', name


# ---- a head that is moved towards a place
def test_the_head_is_held_as_firmly_as_the_clusters_chose():
    from local_head import ENCODERS, STRENGTHS, choose
    from covid_cxr.stats.recalibration import HEAD_STRENGTH
    kept = load('local_head.json')
    assert HEAD_STRENGTH == kept['strength']['fine-tuned']      # what `covid-cxr calibrate --head` moves
    assert set(kept['clusters']) == set(kept['strength']) == set(ENCODERS)
    for encoder, rows in kept['clusters'].items():
        t = pd.DataFrame(rows).pivot(index='fold', columns='way', values='balanced_accuracy')
        means = t.mean()
        assert len(t) == 3 and kept['strength'][encoder] == choose(rows) in STRENGTHS
        assert means[f"head {kept['strength'][encoder]:g}"] == means.filter(like='head ').max()


def test_what_moved_heads_reached_is_the_mean_of_the_kept_draws():
    from local_head import DRAWS, ENCODERS, summarise
    kept, draws = load('local_head.json')['published'], pd.read_csv(KEPT / 'local_head.csv.gz')
    assert kept == summarise(draws) and set(draws['encoder']) == set(ENCODERS)
    for r in kept: assert r['draws'] == DRAWS * r['seeds'] and r['seeds'] == len(ENCODERS[r['encoder']])
    for _, of in draws.groupby(['encoder', 'seed', 'n', 'draw']): assert sorted(of['way']) == ['frozen', 'head', 'threshold']
    same = draws.pivot(index=['encoder', 'seed', 'n', 'draw'], columns='way', values='auc')
    assert (same['frozen'] == same['threshold']).all()                       # a threshold moves no order


def test_the_page_of_results_prints_the_moved_heads():
    from covid_cxr.articles.local import heads_table
    assert_rows(heads_table(KEPT), printed(ROOT / 'nbs/results.ipynb'))
