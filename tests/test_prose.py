"""What the pages print is what the kept files say, and every number stands beside what it was made on.

No interval is written down here: pages are compared with what their own cells give today, tables with the files, typed numbers with what
an article reported or a recipe sets.
"""
import json, os, re
import pytest
from conftest import ROOT
from covid_cxr.articles.reported import ARTICLES
from covid_cxr.articles.conditions import (
    ABSENT, AUDITED, NOT_FITTED, NOT_NEEDED, NO_THRESHOLD, ONE_HALF, find_networks, markdown_table, seeds_text)
from covid_cxr.articles.tables import main_results, read_tables
from covid_cxr.audit.case import read_audit
from covid_cxr.recipe import load_recipe
from covid_cxr.runs.folder import RunFolder

KEPT, NBS = ROOT / 'benchmarks' / 'results', ROOT / 'nbs'
STORIES = {'pneumonia_cnn': 'pneumonia-cnn', 'pneumonia_explained': 'pneumonia-explained', 'covid_2020': 'covid-2020',
           'covid_2020_fair': 'covid-2020', 'coronahack_vgg': 'coronahack-vgg',
           'effusion_resnet': 'effusion-resnet', 'pretrain': '', 'shortcuts': ''}
PAGES = ['index', 'results', 'results_audits', 'howto', 'glossary',
         *(f'tutorials/{p.stem}' for p in sorted((NBS / 'tutorials').glob('*.ipynb'))),
         *(f'articles/{s}' for s in STORIES)]
METRIC_COLUMNS = {'accuracy', 'recall', 'sensitivity', 'specificity', 'precision', 'f1', 'false_positive_rate'}


@pytest.fixture(scope='module')
def tables(): return read_tables(KEPT)


def cells(page): return json.loads((NBS / f'{page}.ipynb').read_text(encoding='utf-8'))['cells']


# ---- conditions stand beside numbers
def speaks_of_auc(t): return 'auc' in t or ('metric' in t and 'auc' in set(t['metric']))


def test_a_table_of_evaluations_names_images_split_threshold_and_baselines(tables):
    seen = 0
    for name, t in tables.items():
        if not METRIC_COLUMNS & set(t) and not speaks_of_auc(t) or name == 'auc': continue       # 'auc' holds the numbers of a picture
        if name == 'local':          # 200 draws of local images move the threshold; the rest of the place is evaluated
            assert {'evaluated_on', 'local_images', 'labels', 'trained', 'seeds'} <= set(t) and len(t)
            continue
        about = {'evaluated_on', 'images', 'groups', 'threshold'} | ({'baselines'} if speaks_of_auc(t) and name != 'audits' else set())
        assert about <= set(t), (name, about - set(t))
        seen += 1
        for i, row in t.iterrows():
            if ABSENT in (row.get('run'), row.get('measured')): continue
            drawn = str(row['threshold']).startswith('moved with ')       # the rest of a place, other patients in each of 200 draws
            assert row['evaluated_on'] and row['images'] and (row['groups'] or drawn) and row['threshold'], (name, i)
    assert seen >= 8


def test_a_threshold_says_where_it_was_chosen(tables):
    known = {ONE_HALF, NOT_NEEDED, NO_THRESHOLD}
    for name, t in tables.items():
        for v in t[~t.isin([ABSENT]).any(axis=1)].get('threshold', []):
            chosen = re.match(r'(frozen on validation|chosen on these very images)( for \w+)?: |moved with \d+ local images$', v)
            assert chosen or v in known, (name, v)


def test_what_is_shown_at_a_chosen_threshold_was_not_chosen_there_in_silence(tables):
    "An article that was evaluated on its validation split has its second threshold from the same images, and the row says so"
    t = tables['articles']
    own = t[(t['result'] == 'protocol') & t['evaluated_on'].str.startswith('validation') & (t['threshold'] != ONE_HALF)]
    assert len(own) and own['threshold'].str.startswith('chosen on these very images').all()
    assert not t[~t['evaluated_on'].str.startswith('validation')]['threshold'].str.startswith('chosen on').any()


def test_both_thresholds_are_shown_where_an_article_used_one_half(tables):
    ours = tables['articles'].query("result != 'reported'")
    for key, t in ours.groupby(['article', 'result', 'run', 'evaluated_on']):
        assert len(t) == 2 and (t['threshold'] == ONE_HALF).sum() == 1, key
        assert t['auc'].nunique() == 1, 'the AUC needs no threshold'


def test_the_gain_stands_beside_the_metadata(tables):
    "A model above the best picture baseline may be far below the metadata: every run has a row for both"
    kinds = tables['gains'].groupby(['recipe', 'arm'])['kind'].agg(set)
    assert (kinds == {'image_without_lungs', 'file', 'metadata'}).all(), kinds
    assert {'gain', 'metadata_baseline', 'gain_over_metadata'} <= set(tables['audits'])


def audited(name):
    "The folder of a kept run that was audited, or was trained again for its audit"
    return next(d for d in (KEPT / name, KEPT / AUDITED / name) if d.is_dir())


def test_a_quick_audit_is_called_quick(tables):
    for row in tables['audits'].itertuples():
        a = read_audit(audited(row.run))
        assert row.audit.startswith('quick') == a.quick
        trained = any('network trained without lungs' in b.name for b in a.baselines)
        assert trained != a.quick, 'a full audit trains a network on images without lungs'


def test_no_run_has_one_number_with_two_intervals(tables):
    "The AUC of a run is the same, interval included, wherever it is kept or printed"
    at = tables['articles'].query("result in ('protocol', 'leak-safe') and run != 'not measured'").set_index('run')['auc']
    networks = find_networks(KEPT)
    for row in tables['published_test'].itertuples():
        of_arm = [n for n in networks.get(row.recipe, []) if n.arm == row.arm and seeds_text(n.trainings) == row.seed]
        for n in of_arm:
            if n.title in at: assert set(at[[n.title]]) == {row.auc}, n.title
    for row in tables['audits'].itertuples():
        assert row.auc == str(RunFolder.open(audited(row.run)).result['auc']), row.run
        if row.run in at: assert set(at[[row.run]]) == {row.auc}, row.run
    for (recipe, arm), t in tables['auc'].query("kind == 'model'").groupby(['recipe', 'arm']):
        for text in tables['arms'].query('recipe == @recipe and arm == @arm')['auc']:
            assert text.startswith(f"{t['auc'].iloc[0]:.3f} [{t['auc_low'].iloc[0]:.3f}"), (recipe, arm)


# ---- the README
def test_the_readme_prints_the_main_results(tables):
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    t = main_results(tables['articles'])
    assert t['article'].tolist() == list(ARTICLES)
    for c in t: assert (t[c] != '').all() or c == 'accuracy', c
    for line in markdown_table(t).splitlines(): assert line in text, line


def test_the_readme_prints_every_failed_check_of_the_audit_it_shows():
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    name = re.search(r'kept run `([\w-]+)`', text)[1]
    failed = [v for v in read_audit(KEPT / AUDITED / name).verdicts if v.verdict == 'FAIL']
    shown = re.findall(r'^FAIL +(A\d+  .+)', text, re.M)
    assert failed and len(shown) == len(failed)
    for line, v in zip(shown, failed): assert line.startswith(f'{v.check}  {v.name}: '), line


def test_the_readme_counts_the_questions_of_the_audit():
    from covid_cxr.audit.run import checks_table
    n = checks_table()['code'].nunique()
    assert f'an audit of {n} questions' in (ROOT / 'README.md').read_text(encoding='utf-8')


def test_the_page_of_audits_prints_every_failed_check(tables):
    text = '\n'.join(output_text(c) for c in cells('results_audits'))
    for name in tables['audits']['run']:
        failed = [v for v in read_audit(audited(name)).verdicts if v.verdict == 'FAIL']
        assert failed and f'{len(failed)} FAIL:' in text, name
        for v in failed: assert f'- {v.check} {v.name}: ' in text, (name, v.check, v.name)


# ---- stories are told, not programmed
MOST_LINES = {'pneumonia_cnn': 8, 'coronahack_vgg': 15, 'covid_2020': 14, 'covid_2020_fair': 5, 'effusion_resnet': 17,
              'pneumonia_explained': 49}


@pytest.mark.parametrize('story', MOST_LINES)
def test_a_story_is_text_with_a_few_lines_of_code(story):
    "What stories share stands in the rooms of `articles`; every interval comes from the usual number of resamples"
    code = [''.join(c['source']) for c in cells(f'articles/{story}') if c['cell_type'] == 'code']
    lines = [line for source in code for line in source.splitlines() if line.strip()]
    assert 0 < len(lines) <= MOST_LINES[story], len(lines)
    assert not [line for line in lines if 'n_boot' in line or 'def ' in line or len(line) > 140]


# ---- what a page prints is what its cells give
PHANTOMS = {'run', 'grid', 'lime-phantom', 'rehearse', 'refuse', 'python-example'}   # cells that train, and theirs


def output_text(cell):
    "What a reader sees of a cell, without pictures"
    said = []
    for o in cell.get('outputs', []):
        data = o.get('data', {})
        if any(k.startswith('image/') for k in data): continue
        said.append(''.join(data.get('text/markdown') or data.get('text/html') or data.get('text/plain') or o.get('text') or ''))
    return '\n'.join(said)


def run_again(page):
    "The cells of a page with what they give today; those about phantoms are left out"
    from execnb.nbio import read_nb
    from execnb.shell import CaptureShell
    nb, here = read_nb(NBS / f'{page}.ipynb'), os.getcwd()
    nb.cells = [c for c in nb.cells if c.cell_type == 'code' and c.id not in PHANTOMS]
    for c in nb.cells: c.source = '\n'.join(line for line in c.source.splitlines() if 'savefig' not in line)     # a figure of the README
    os.chdir((NBS / f'{page}.ipynb').parent)
    try: CaptureShell(NBS).run_all(nb, exc_stop=True)
    finally: os.chdir(here)
    return {c.id: output_text(c) for c in nb.cells}


@pytest.mark.parametrize('page', ['index', 'results', 'results_audits', *(f'articles/{s}' for s in STORIES)])
def test_a_page_prints_what_its_cells_give(page):
    again, compared = run_again(page), 0
    for c in cells(page):
        if c['id'] not in again: continue
        before = output_text(c)
        if not re.search(r'\d', before): continue
        assert numbers(again[c['id']]) == numbers(before), f"{page}: cell {c['id']} prints what the files no longer say"
        compared += 1
    assert compared >= 2, page


def numbers(text): return re.findall(r'[-+]?\d[\d,]*\.?\d*|[-+]?\.\d+', text)


# ---- numbers that are typed
ALLOWED = {   # page -> numbers that are no measurement: rules, versions, dropout of a network, the article's own
    'index': {'3.10', '3.12', '2.0'}, 'glossary': {'.05', '0.10'}, 'articles/coronahack_vgg': {'.0001', '.5'},
    'articles/pneumonia_cnn': {'.5'},
    'articles/effusion_resnet': {'0.64'}}
TYPED = re.compile(r'(?<![\w./-])[+-]?\d*\.\d+(?![\w.]*[/\w])')
HIDDEN = re.compile(r'\]\([^)]*\)|doi:\S+|https?://\S+|```.*?```|`[^`]*`|^ {4}.*$', re.S | re.M)


def leaves(v):
    "Every number in a nested value"
    if isinstance(v, dict): v = list(v.values())
    if isinstance(v, (list, tuple)): return [x for item in v for x in leaves(item)]
    return [float(v)] if isinstance(v, (int, float)) and not isinstance(v, bool) else []


def settings_of(names):
    "Every number of some recipes, as shipped"
    from dataclasses import asdict
    return [x for name in names for x in leaves(asdict(load_recipe(name)))]


def backed(page):
    "Numbers that may be typed on a page: what its article reported and what its recipes set, and the percentages of both"
    key = STORIES.get(page.removeprefix('articles/'), '')
    if not key: return []
    a = ARTICLES[key]
    views = json.loads((KEPT / 'effusion_edges.json').read_text())['views']['counts'] if key == 'effusion-resnet' else {}
    shares = [n['AP'] / sum(n.values()) for n in views.values()]
    return [*(r.value for r in a.reported), *shares, *settings_of([n for n in a.recipes])]


def is_backed(text, values):
    digits, v = len(text.split('.')[1]), float(text)
    return any(round(x * k, digits) == v for x in values for k in (1, 100))


@pytest.mark.parametrize('page', PAGES)
def test_a_typed_number_is_backed_by_a_file(page):
    values, allowed = backed(page), ALLOWED.get(page, set())
    for c in cells(page):
        if c['cell_type'] != 'markdown': continue
        for text in TYPED.findall(HIDDEN.sub(' ', ''.join(c['source']))):
            assert text in allowed or is_backed(text, values), f"{page}, cell {c['id']}: {text} stands in no file; compute it in a cell"


def test_the_readme_types_no_number():
    "What stands in the README comes from its notebook, and its typed numbers are those of the notebook"
    prose = [''.join(c['source']) for c in cells('index') if c['cell_type'] == 'markdown']
    typed = {t for text in prose for t in TYPED.findall(HIDDEN.sub(' ', text))}
    assert typed <= ALLOWED['index']


def test_an_invented_number_is_seen():
    assert TYPED.findall('an AUC of 0.934 and .71, 96.24 % (3.2)') == ['0.934', '.71', '96.24', '3.2']
    assert not is_backed('0.934', [.9, .94]) and is_backed('96.24', [.9624]) and is_backed('.5', [.5])
    assert numbers('0.99 [0.98, 1.00], +.05') == ['0.99', '0.98', '1.00', '+.05']


# ---- one number of resamples
def test_every_measurement_drew_as_many_resamples():
    facts, explained = (json.loads((KEPT / f'{n}.json').read_text(encoding='utf-8')) for n in ('facts', 'explain_errors'))
    assert facts['resamples'] == explained['trained']['at_sensitivity']['resamples'] == 2000


def test_baselines_that_were_not_fitted_are_said_not_to_be(tables):
    t = tables['articles']
    names = {n.title for of in find_networks(KEPT).values() for n in of if n.of_two_classes and n.with_baselines()[0]}
    assert len(names & set(t['run'])) >= 5
    for row in t[t['result'].isin(['protocol', 'leak-safe'])].itertuples():
        if row.run in names: assert row.baselines != NOT_FITTED and len(re.findall(r' [01]\.\d{3}', row.baselines)) == 3, row.run
