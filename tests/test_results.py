"""Every committed result is derived again from its predictions: no number in prose without a file, no file without its predictions."""
import json, sys
import pandas as pd, pytest
from conftest import ROOT
sys.path.insert(0, str(ROOT / 'benchmarks'))

RUNS = sorted(p.parent for p in (ROOT / 'benchmarks' / 'results').glob('*/predictions.csv'))


def test_there_are_results(): assert RUNS, 'no run is kept under benchmarks/results'


@pytest.mark.parametrize('run', RUNS, ids=lambda p: p.name)
def test_a_kept_run_follows_from_its_predictions(run):
    from covid_cxr.evaluate import choose_threshold, evaluate
    from covid_cxr.recipe import parse_recipe
    from covid_cxr.table import as_task
    recipe, e = parse_recipe((run / 'recipe.toml').read_text()), json.loads((run / 'evaluation.json').read_text())
    classes = list(as_task(recipe.task).classes)
    pred = pd.read_csv(run / 'predictions.csv')
    assert 'path' not in pred and not pred.image_id.str.contains('/').any()
    assert (pred.groupby('group').split.nunique() == 1).all() or e['leaking_groups'], 'a group on two sides'
    v, t = pred[pred.split == 'valid'], pred[pred.split == e['part']]
    probs, threshold = t[[f'prob_{c}' for c in classes]].to_numpy(), .5
    if len(classes) == 2:
        point = choose_threshold(v.label.to_numpy(), v[f'prob_{classes[1]}'].to_numpy(), goal=recipe.evaluation.goal, classes=classes)
        assert point.threshold == pytest.approx(e['operating_point']['threshold'])
        probs, threshold = probs[:, 1], point.threshold
    again = evaluate(t.label.to_numpy(), probs, groups=t.group.to_numpy(), threshold=threshold, classes=classes,
                     n_boot=recipe.evaluation.n_boot, seed=recipe.seed).to_dict()['estimates']
    for m, kept in e[e['part']]['estimates'].items():
        for k in ('value', 'low', 'high'): assert (again[m][k] is None) == (kept[k] is None) and (kept[k] is None or again[m][k] == pytest.approx(kept[k], abs=1e-9)), (m, k)
    summary = (run / 'summary.txt').read_text()
    auc = e[e['part']]['estimates'].get('auc', {}).get('value') if len(classes) == 2 else None
    if auc is not None: assert f'auc {auc:.3f}' in summary          # a collection of one class that was left out has none


AUDITED = [r for r in RUNS if (r / 'audit.json').exists()]
LADDERS = [r for r in RUNS if (r / 'ladder.json').exists()]


def test_there_are_audits_and_ladders(): assert AUDITED and LADDERS


@pytest.mark.parametrize('run', AUDITED, ids=lambda p: p.name)
def test_a_kept_audit_speaks_of_this_run(run):
    a, e = json.loads((run / 'audit.json').read_text()), json.loads((run / 'evaluation.json').read_text())
    h = a['headline']
    assert h['model_auc']['value'] == pytest.approx(e[a['part']]['estimates']['auc']['value'], abs=1e-9)
    for kind, floor, gap in (('pixels', 'pixel_floor', 'floor_adjusted_auc'), ('provenance', 'provenance_floor', 'above_provenance')):
        best = max(f['auc']['value'] for f in a['floors'] if f['kind'] == kind)
        assert h[floor]['auc']['value'] == best and h[gap]['value'] == pytest.approx(h['model_auc']['value'] - best, abs=1e-9)
    assert h['reads_lungs'] == (h['floor_adjusted_auc']['low'] > 0 and h['model_auc']['low'] > .5)
    assert sum(a['verdicts'].values()) == len(a['rows']) and all(a['verdicts'][v] == sum(r['verdict'] == v for r in a['rows']) for v in a['verdicts'])
    text = (run / 'audit.txt').read_text()
    assert h['sentence'] in text and all(r['words'][:60] in text for r in a['rows'])


@pytest.mark.parametrize('run', LADDERS, ids=lambda p: p.name)
def test_a_kept_rung_follows_from_its_predictions(run):
    for rung in json.loads((run / 'ladder.json').read_text())['rungs']:
        p = pd.read_csv(run / rung['predictions'])
        prob = [c for c in p if c.startswith('prob_')][-1]
        assert len(p) == rung['n_images'] and 'path' not in p
        if rung['one_class']:
            threshold = json.loads((run / 'evaluation.json').read_text())['operating_point']['threshold']
            rate = rung.get('false_call_rate') or rung['sensitivity']
            assert (p[prob] >= threshold).mean() == pytest.approx(rate['value'], abs=1e-9)


def test_the_facts_page_prints_what_was_measured():
    facts = json.loads((ROOT / 'benchmarks/results/facts.json').read_text())['facts']
    page = (ROOT / 'nbs/articles/shortcuts.ipynb').read_text()
    value = lambda f, start: next(r['value'] for r in facts[f] if r['what'].startswith(start))
    assert value('F1', 'person numbers') == 170 and value('F1', 'patients (number and kind)') == 0 and value('F3', 'sets of identical') == 30
    assert value('F6', 'small network, cross-validated') - value('F6', 'small network, official test') > 0, 'the fall to the official test'
    for f in ('F6', 'F7', 'F8', 'F9'):
        for r in facts[f]: assert f"{r['value']:.3f}" in page, (f, r['what'])


def test_the_verdict_matrix_in_the_docs_is_the_one_expected():
    from test_audit import EXPECTED
    m = json.loads((ROOT / 'benchmarks/results/audit_matrix.json').read_text())
    for name, row in m['verdicts'].items():
        for audit, right in EXPECTED[name.split()[0]].items(): assert row[audit] in right, (name, audit, row[audit])
    assert {n.split()[0] for n in m['verdicts']} == set(EXPECTED)


def test_the_articles_numbers():
    "Kermany's headline is flagged, the numbers of the small CNN fit exactly one matrix, the published CSVs say what the article says"
    a = json.loads((ROOT / 'benchmarks/results/article_numbers.json').read_text())
    fits = {c['article'].split(',')[0].split(' (')[0]: c['matrices'] for c in a['claims']}
    assert fits['Kermany et al. 2018'] == 0 and fits['pneumonia-cnn'] == 1
    assert all(f['agrees'] for f in a['files'].values())


def test_the_lung_box_covers_what_the_notebooks_say():
    from lung_box import measure, phantom_masks
    kept = json.loads((ROOT / 'benchmarks/results/lung_box.json').read_text())
    again = measure(phantom_masks())
    for k in ('box', 'box_without_corners'): assert again[k] == pytest.approx(kept['phantoms'][k], abs=1e-9)
    floors, perturb = ((ROOT / 'nbs' / n).read_text() for n in ('audit/baselines.ipynb', 'audit/perturb.ipynb'))
    assert f"{kept['real']['box']:.1%}".replace('%', ' %') in perturb and f"{kept['real']['box_without_corners']:.1%}".replace('%', ' %') in perturb
    assert f"covers {100 * kept['real']['box']:.1f} and {100 * kept['phantoms']['box']:.1f} %" in floors and f"{100 * kept['visible']:.0f} % of the picture" in floors


FLOORS = sorted(p.parent for p in (ROOT / 'benchmarks' / 'results').glob('*/floors.csv'))


@pytest.mark.parametrize('run', FLOORS, ids=lambda p: p.name)
def test_kept_rivals_judged_the_films_of_this_run(run):
    e, pred = json.loads((run / 'evaluation.json').read_text()), pd.read_csv(run / 'predictions.csv', dtype=dict(image_id=str))
    judged, floors = set(pred[pred.split == e['part']].image_id), pd.read_csv(run / 'floors.csv', dtype=dict(image_id=str))
    for name, t in floors.groupby('floor'): assert len(t) == len(judged) and set(t.image_id) == judged and t.score.between(0, 1).all(), name
    assert {'pixels', 'file'} <= set(floors.kind)


def test_cross_validations_are_whole_and_test_every_film_once():
    from covid_cxr.runs.crossval import find_results
    found = find_results(ROOT / 'benchmarks' / 'results')
    folded = {n: rs for n, rs in found.items() if rs[0]['recipe'].split.kind == 'fold'}
    assert {'effusion-resnet-honest', 'covid-2020-within', 'covid-2020-adults', 'coronahack-vgg-honest'} <= set(folded)
    for name, rs in folded.items():
        assert [r['recipe'].split.fold for r in rs] == list(range(rs[0]['recipe'].split.n_folds)), name
        every = [pd.read_csv(r['folder'] / 'predictions.csv', dtype=dict(group=str)) for r in rs]
        tested = pd.concat([p[p.split == 'test'] for p in every])
        assert tested.image_id.is_unique and set(tested.image_id) == set(every[0].image_id), name
        for p in every: assert not set(p[p.split == 'test'].group) & set(p[p.split != 'test'].group), name


def test_no_arm_is_judged_on_what_its_weights_have_seen():
    "The in-domain arms start from the kept `pretrain`; none of its films, patients or groups is in any part of theirs; both arms judge the same films"
    from covid_cxr.articles.reproduce import ABLATION
    from covid_cxr.runs.crossval import find_arms
    kept = ROOT / 'benchmarks' / 'results'
    seen = pd.read_csv(next(p for p in kept.glob('pretrain*/predictions.csv')), dtype=str)
    for name in ABLATION:
        arms = find_arms(kept, name)
        assert {'from scratch', 'in-domain'} <= set(arms) and len({len(rs) for rs in arms.values()}) == 1, name
        for r in arms['in-domain']:
            assert r['recipe'].model.weights.endswith('pretrain/bundle/weights.safetensors')
            p = pd.read_csv(r['folder'] / 'predictions.csv', dtype=str)
            for key in ('image_id', 'group'): assert not set(p[key].dropna()) & set(seen[key].dropna()), (name, key)
        films = [{(r['recipe'].split.fold, i) for r in rs for i in pd.read_csv(r['folder'] / 'predictions.csv').query('split == "test"').image_id} for rs in arms.values()]
        assert all(f == films[0] for f in films)


def test_the_readme_prints_what_the_files_say():
    from covid_cxr.articles.reproduce import more_tables, reproduce_table
    readme, kept = (ROOT / 'README.md').read_text(), ROOT / 'benchmarks' / 'results'
    more = more_tables(kept, 500)
    for t in (reproduce_table(kept), *(more[k] for k in ('Aims', 'Starting weights', 'A collection left out', 'Above the best rival that saw no lung'))):
        for row in t.astype(str).to_numpy():
            line = '| ' + ' | '.join(v.replace('|', '\\|') for v in row) + ' |'
            assert line in readme, line
