"The report of a run: every number is the run's own, what is bad stands in red, nothing is left out, hostile text stays text, the page asks nothing of anybody"
import html, json, re, shutil
from html.parser import HTMLParser
from pathlib import Path
import numpy as np, pandas as pd, pytest
from covid_cxr.audit.run import audit_run
from covid_cxr.report.checklist import ITEMS, checklist_items
from covid_cxr.core import RunError, sha256_file, write_json, write_text
from covid_cxr.evaluate import evaluate
from covid_cxr.report.context import analyse_run, list_warnings, list_errors, list_limits, read_run_data, format_interval, format_number, write_example_run
from covid_cxr.runs.external import external_test
from covid_cxr.runs.test_log import log_test_evaluation
from covid_cxr.phantom import write_phantom_trees
from covid_cxr.recipe import dump_recipe, load_recipe, override
from covid_cxr.report.page import write_report
from covid_cxr.runs.train import load_table, save_table

SECTIONS = ['point', 'flow', 'people', 'metrics', 'shortcut', 'audit', 'ladder', 'errors', 'power', 'limits', 'claim', 'made']
HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)>|`"\'&\n# heading'


class Page(HTMLParser):
    "A strict reading: every tag closed in order, and what a browser would be asked to do"
    VOID = {'meta', 'img', 'br', 'rect', 'line'}

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.source = Path(path).read_text(encoding='utf-8')
        self.tags, self.open, self.text, self.headings, self.rows, self.section, self.where = [], [], [], [], {}, None, {}
        self.feed(self.source)
        self.close()
        assert not self.open, f'left open: {self.open}'

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag not in self.VOID: self.open.append(tag)
        if tag == 'section': self.section = attrs['id']
        if tag == 'tr': self.rows.setdefault(self.section, []).append('')
        if re.fullmatch('h[1-6]', tag): self.headings.append(int(tag[1]))

    def handle_startendtag(self, tag, attrs):
        assert tag in self.VOID, tag
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert tag not in self.VOID and self.open and self.open[-1] == tag, f'</{tag}> closes {self.open[-3:]}'
        self.open.pop()
        if tag == 'section': self.section = None

    def handle_data(self, data):
        if not self.open or self.open[-1] in ('style', 'title'): return
        if data.strip(): self.text.append(data.strip()); self.where.setdefault(self.section, []).append(data.strip())
        if 'tr' in self.open: self.rows[self.section][-1] += data + ' '

    def said(self, section=None): return ' '.join(self.where.get(section, []))


def assert_sound(page):
    "One file, nothing fetched, nothing run; headings in order, names for pictures, scopes for headers, no id twice"
    assert page.source.startswith('<!DOCTYPE html>')
    ids = [a['id'] for _, a in page.tags if 'id' in a]
    assert len(ids) == len(set(ids))
    for tag, a in page.tags:
        assert tag not in ('script', 'link', 'iframe', 'object', 'embed', 'base', 'form', 'use', 'image', 'video', 'audio', 'source'), tag
        for k, v in a.items():
            assert not k.startswith('on') and k not in ('srcset', 'style', 'background', 'action', 'xlink:href', 'poster'), (tag, k)
            if k == 'src': assert re.match(r'data:image/(png|svg\+xml);base64,[A-Za-z0-9+/=]+$', v)
            if k == 'href': assert tag == 'a' and (v.startswith('#') and v[1:] in ids or v.startswith('https://'))
        if tag == 'img': assert a['alt'].strip()
        if tag == 'th': assert a['scope'] in ('col', 'row', 'colgroup')
        if tag == 'svg': assert a.get('aria-hidden') or a.get('aria-label')
    style = re.search('<style>(.*?)</style>', page.source, re.S).group(1)
    assert 'url(' not in style and '@import' not in style and '@media print' in style and 'max-width' in style
    assert page.headings[0] == 1 and page.headings.count(1) == 1
    assert all(b <= a + 1 for a, b in zip(page.headings, page.headings[1:]))
    assert [a['id'] for t, a in page.tags if t == 'section'] == SECTIONS
    tables, captions = (sum(t == x for t, _ in page.tags) for x in ('table', 'caption'))
    assert tables == captions > 10


def estimate(*v): return dict(zip(('value', 'low', 'high'), v))

ABOVE = dict(model_auc=estimate(.83, .72, .92), floor_adjusted_auc=estimate(.2138, .1019, .3231), above_provenance=estimate(.275, .1751, .3752), reads_lungs=True, sentence='It gains over the border.')


@pytest.fixture(scope='module')
def example(tmp_path_factory): return write_example_run(tmp_path_factory.mktemp('example') / 'run')

@pytest.fixture
def copy(example, tmp_path): return Path(shutil.copytree(example, tmp_path / 'run'))

@pytest.fixture(scope='module')
def finished(phantom_run, tmp_path_factory):
    "The phantom run, a second look at its test part, and a rung on new phantoms; then its report"
    run = Path(shutil.copytree(phantom_run, tmp_path_factory.mktemp('finished') / 'demo', ignore=shutil.ignore_patterns('checkpoints', 'cache', 'export.pkl', 'audit.*', 'ladder*', 'report.html', 'model-card.md')))
    log_test_evaluation(run, 'evaluate')
    trees = tmp_path_factory.mktemp('elsewhere')
    write_phantom_trees(trees, seed=99, size=96, n_patients=12, n_normal=10, n_pneumonia=2)
    external_test(run, 'covid_chestxray', trees, root='covid-chestxray-dataset', name='new phantoms', n_boot=100, check_files=False, log=lambda text: None)
    return run, Page(write_report(run))


@pytest.fixture(scope='module')
def audited(finished, tmp_path_factory):
    "The same run after a real, quick audit: the folder, its page, its audit.json"
    run = Path(shutil.copytree(finished[0], tmp_path_factory.mktemp('audited') / 'demo'))
    audit_run(run, quick=True, n_boot=200, log=lambda text: None)
    return run, Page(write_report(run)), json.loads((run / 'audit.json').read_text())


def test_the_page_of_a_trained_run_is_sound_and_says_first_what_it_is_not_for(finished):
    run, page = finished
    assert_sound(page)
    assert page.text[0] == 'Not for patients.' and page.text[1].startswith(json.loads((run / 'bundle/bundle.json').read_text())['not_for'])
    assert page.text[2].startswith('SYNTHETIC DATA')
    banners = [a for t, a in page.tags if a.get('class') == 'banner']
    assert banners and all(a['role'] == 'alert' for a in banners)


def test_every_number_of_the_head_is_the_runs_own(finished):
    run, page = finished
    e = json.loads((run / 'evaluation.json').read_text())
    head, est = page.said(), e['test']['estimates']
    for m in ('auc',): assert f"{est[m]['value']:.3f} [{est[m]['low']:.3f}, {est[m]['high']:.3f}]" in head
    assert f"{e['source_only']['estimates']['auc']['value']:.3f}" in head
    (tn, fp), (fn, tp) = e['test']['confusion']
    assert f"called {tp} of {tp + fn} films of class 'covid' rightly and missed {fn}" in head and f"it called {fp} 'covid' falsely" in head
    point = page.said('point')
    assert f"{est['recall']['value']:.3f}" in point and f"{est['specificity']['value']:.3f}" in point
    assert f"{e['operating_point']['threshold']:.4f}" in point and e['operating_point']['hash'] in point
    for m, v in est.items():
        row = next(r for r in page.rows['metrics'] if r.endswith(' ') and f"{format_number(v['value'])} " in r and f" {v['n']:,} " in r)
        if v['low'] is not None: assert any(f"[{format_number(v['low'])}, {format_number(v['high'])}]" in r for r in page.rows['metrics']), m


def test_flow_table_one_and_errors_are_counts_of_the_table(finished):
    run, page = finished
    t, f = load_table(run / 'table.csv'), read_run_data(run)
    u, flow = t[t['excluded'].isna()], page.said('flow')
    assert f'{len(t):,} rows in = {len(u):,} used + {len(t) - len(u):,} left out' in flow
    outs = [int(n.replace(',', '')) for n in re.findall(r'([\d,]+) left out (?:while|by|as)', flow)]
    assert sum(outs) == len(t) - len(u)
    for s, r in u.groupby('split'): assert f"{len(r):,} {s} {(r['label'] == 'other').sum():,} other, {(r['label'] == 'covid').sum():,} covid; {r['group'].nunique():,} patient group" in flow
    images = next(r for r in page.rows['people'] if r.startswith('images')).split()[1:]
    assert [int(v) for v in images] == [((u['split'] == s) & (u['label'] == c)).sum() for s in ('train', 'valid', 'test') for c in ('other', 'covid')]
    errors = list_errors(f)
    shown = [a for t, a in page.tags if t == 'img' and a['src'].startswith('data:image/png')]
    assert len(shown) == len(errors) and f"{len(errors)} wrong call" in page.said('errors')
    worst = errors.iloc[0]
    assert page.said('errors').index(f'{1 - worst["prob_true"]:.3f}') < page.said('errors').index('groups with an error')


def test_looks_and_rungs_of_the_run_stand_on_the_page(finished):
    run, page = finished
    assert f'this test part was read {read_run_data(run).looks} times' in page.said('made') and read_run_data(run).looks >= 2
    rung = json.loads((run / 'ladder.json').read_text())['rungs'][0]
    said = page.said('ladder')
    assert '1 external set' in said and rung['name'] in said and rung['words'] in said
    assert format_interval(*(rung['estimates']['auc'][k] for k in ('value', 'low', 'high'))) in said
    assert next(i for i in checklist_items(read_run_data(run)) if i.number == 33).status == 'FROM THE RUN'


def test_a_run_without_an_audit_says_so_where_the_number_would_stand(finished):
    run, page = finished
    head = page.said()
    assert 'Floor-adjusted AUC NOT AUDITED: run covid-cxr audit RUN' in head and 'NOT AUDITED' in page.said('audit')
    assert any('No audit was run' in words for _, _, words in list_limits(read_run_data(run)))
    assert 'NOT AUDITED' in (run / 'model-card.md').read_text()


def test_audit_first_all_rows_all_verdicts_in_words(audited):
    run, page, a = audited
    assert_sound(page)
    h, head, show = a['headline'], page.said(), lambda e: format_interval(e['value'], e['low'], e['high'])
    assert re.search(r'Floor-adjusted AUC \+?' + re.escape(show(h['floor_adjusted_auc']) + ' ' + h['sentence']), head) and 'NOT AUDITED' not in page.source
    own = read_run_data(run).result['auc']
    assert own.value == pytest.approx(h['model_auc']['value'], abs=1e-6)
    assert head.index(show(h['floor_adjusted_auc'])) < head.index('Model AUC ' + format_interval(*own[:3]))
    for k in ('pixel_floor', 'provenance_floor'): assert show(h[k]['auc']) + ' ' + h[k]['name'] in head
    assert show(h['above_provenance']) in head
    rows = page.rows['audit'][1:len(a['rows']) + 1]
    for r, row in zip(a['rows'], rows, strict=True):
        assert row.startswith(f"{r['audit']}  {r['name']}") and f" {r['verdict']} " in row and r['words'] in row and r['n'] in row and r['rule'] in row
        v = r['value']
        assert 'not estimable' in row if v is None else show(r) in row if r['low'] is not None else (f' {v:,.0f} ' if v == int(v) else f'{v:.3f}') in row
    shortcut = page.said('shortcut')
    assert all(f['name'] in shortcut and show(f['auc']) in shortcut for f in a['floors']) and 'probe' not in shortcut      # a probe tells the source, not the class: no rival


def test_limitations_are_written_from_every_bad_row_and_every_row_not_run(audited):
    run, page, a = audited
    bad = [r for r in a['rows'] if r['verdict'] in ('FAIL', 'WARN', 'UNDERPOWERED')]
    limits, card = page.said('limits'), html.unescape((run / 'model-card.md').read_text().replace('\\', ''))
    assert len(bad) > 5 and len(a['not_run']) > 2
    for text in (limits, card):
        for r in bad: assert r['words'] in text
        for n in a['not_run']: assert n['why'] in text and n['why'] in page.said('audit')
    assert sum(where.startswith('A') for _, where, _ in list_limits(read_run_data(run))) == len(bad) + len(a['not_run'])
    assert format_interval(*(a['headline']['floor_adjusted_auc'][k] for k in ('value', 'low', 'high'))) in card
    status = {i.number: i.status for i in checklist_items(read_run_data(run))}
    assert status[30] == status[31] == 'FROM THE RUN'


@pytest.mark.parametrize('headline, words', [
    (dict(floor_adjusted_auc=estimate(.02, -.05, .09), reads_lungs=False), 'NOT ABOVE THE FLOOR'), (dict(floor_adjusted_auc=estimate(None, None, None), reads_lungs=False), 'NOT ABOVE THE FLOOR'),
    (dict(above_provenance=estimate(-.1, -.2, .01)), 'SOURCE ALONE EXPLAINS'), (dict(pixel_floor=None, provenance_floor=None, reads_lungs=False), None), ({}, None)])
def test_an_auc_that_is_not_above_the_floor_is_said_in_red(copy, audited, headline, words):
    write_json(copy / 'audit.json', audited[2] | dict(headline=audited[2]['headline'] | ABOVE | headline))
    said = ' '.join(list_warnings(read_run_data(copy)))
    assert ('THE FLOOR' in said or 'SOURCE ALONE' in said) == (words is not None) and (words or '') in said
    assert 'AUDIT OF ANOTHER MODEL' in said                          # its AUC is not that of the example run


def test_leaks_alterations_broken_ledgers_and_a_missing_test_part_are_said_in_red(copy):
    state = json.loads((copy / 'run.json').read_text())
    said = lambda: ' '.join(list_warnings(read_run_data(copy)))
    assert 'LEAK' not in said() and 'ALTERED' not in said() and 'TEST_LOG' not in said() and 'SYNTHETIC' in said()
    write_json(copy / 'run.json', state | dict(leaking_groups=3))
    assert '3 patient groups stand on both sides' in said()
    assert 'LEAKING PROTOCOL: 3 patient groups' in ' '.join(Page(write_report(copy)).text[2:5])
    write_json(copy / 'run.json', state)
    recipe = load_recipe('demo')
    for change, words in ({'split.allow_leak': True}, 'LEAK ALLOWED'), ({'split.kind': 'image'}, 'LEAKING PROTOCOL: images were split'):
        write_text(copy / 'recipe.toml', dump_recipe(override(recipe, change)))
        assert words in said()
    write_text(copy / 'recipe.toml', dump_recipe(recipe))
    log_test_evaluation(copy, 'evaluate')
    (copy / 'ledger.jsonl').write_text((copy / 'ledger.jsonl').read_text().replace('evaluate', 'nothing!'))
    assert 'THE TEST_LOG IS BROKEN' in said()
    with open(copy / 'table.csv', 'a') as file: file.write('\n')
    assert 'ALTERED FILES' in said()


def test_children_joined_with_adults_are_said_in_red(copy):
    state, t = json.loads((copy / 'run.json').read_text()), load_table(copy / 'table.csv')
    write_json(copy / 'run.json', state | dict(synthetic=False))
    assert not any('CHILDREN' in b for b in list_warnings(read_run_data(copy)))
    t.loc[t['label'] == 'other', ['source', 'age_years']] = ['kaggle_pneumonia', np.nan]
    save_table(t, copy / 'table.csv')
    write_json(copy / 'run.json', state | dict(synthetic=False, table_sha256=sha256_file(copy / 'table.csv')))
    assert any(b.startswith('CHILDREN JOINED WITH ADULTS') for b in list_warnings(read_run_data(copy)))


def test_hostile_text_stays_text_and_nothing_fetches_anything(copy, audited):
    t = load_table(copy / 'table.csv')
    pred = pd.read_csv(copy / 'predictions.csv')
    names = {i: f'{i}{HOSTILE}' for i in t['image_id']}
    t['image_id'], t['patient'], t['licence'], t['path'] = t['image_id'].map(names), t['patient'] + HOSTILE, HOSTILE, t['path'] + HOSTILE
    t.loc[:2, 'excluded'] = HOSTILE
    save_table(t, copy / 'table.csv'); save_table(pred.assign(image_id=pred['image_id'].map(names)), copy / 'predictions.csv')
    write_text(copy / 'recipe.toml', dump_recipe(load_recipe('demo')).replace('title = "', f'title = {json.dumps(HOSTILE)}\n#"'))
    a = json.loads(json.dumps(audited[2]))
    a['headline']['sentence'] = HOSTILE
    for r in a['rows']: r.update(name=HOSTILE, words=HOSTILE, rule=HOSTILE, n=HOSTILE, statistic=HOSTILE)
    write_json(copy / 'audit.json', a)
    write_text(copy / 'answers.toml', f'signed = {json.dumps(HOSTILE)}\n[claim]\n41 = {json.dumps(HOSTILE)}\n')
    page = Page(write_report(copy))
    assert_sound(page)
    assert '<script>alert("x")</script>' in ' '.join(page.text) and '<script' not in page.source
    card = (copy / 'model-card.md').read_text()
    assert '<script' not in card and '<img' not in card and not re.search(r'^# heading', card, re.M)


def test_the_checklist_has_44_items_always_and_answers_do_not_replace_what_the_run_says(copy):
    write_text(copy / 'answers.toml', 'signed = "A. Author"\n[claim]\n34 = "Not registered."\n7 = "Version of June 2020."\n')
    page = Page(write_report(copy, thumbnails=False))
    rows = [r for r in page.rows['claim'] if re.match(r'\d+ ', r)]
    assert [int(r.split()[0]) for r in rows] == list(range(1, 45)) == list(ITEMS)
    for r in rows: assert sum(s in r for s in ('FROM THE RUN', 'DRAFT, UNSIGNED', 'ANSWERED', 'NOT REPORTED')) == 1
    assert 'Version of June 2020.' in rows[6] and 'ieee8023' in rows[6] and 'Not registered.' in rows[33] and 'NOT REPORTED' in rows[43]
    assert 'Signed by A. Author.' in page.said('claim')
    assert not any(a['src'].startswith('data:image/png') for t, a in page.tags if t == 'img') and 'pictures are left out' in page.said('errors')


def test_the_model_card_is_complete_and_the_same_run_gives_the_same_files(example, tmp_path):
    before = {p.name: sha256_file(p) for p in example.iterdir() if p.is_file()}
    pages = [write_report(example, tmp_path / name).read_bytes() for name in 'ab']
    cards = [(tmp_path / name / 'model-card.md').read_text() for name in 'ab']
    assert pages[0] == pages[1] and cards[0] == cards[1]
    assert {p.name: sha256_file(p) for p in example.iterdir() if p.is_file()} == before         # the run is left as it was
    card, f = cards[0], read_run_data(example)
    heads = re.findall('^## (.+)$', card, re.M)
    assert heads == ['Headline', 'Model details', 'Intended use', 'Factors', 'Metrics', 'Evaluation data', 'Training data', 'Quantitative analyses', 'Ethical considerations', 'Caveats and recommendations']
    assert card.startswith('# ') and card.splitlines()[2].startswith(f"**{f.bundle['not_for']}") and 'SYNTHETIC DATA' in card.split('## ')[0]
    e = f.result['auc']
    assert f'| AUC | {e.value:.3f} | \\[{e.low:.3f}, {e.high:.3f}\\] |' in card
    plain = card.replace('\\', '')
    for _, _, words in list_limits(f, analyse_run(f)): assert words in plain
    assert not [i.number for i in checklist_items(f) if i.status == 'NOT REPORTED' and str(i.number) not in card.split('NOT REPORTED:')[-1]]
    assert sorted(p.name for p in (tmp_path / 'a').iterdir()) == ['model-card.md', 'report.html']


def test_more_than_two_classes_and_what_they_do_not_have(copy):
    t, rng, classes = load_table(copy / 'table.csv'), np.random.default_rng(0), ['normal', 'bacterial', 'viral', 'covid']
    t['label'] = rng.choice(classes, len(t))
    u = t[t['excluded'].isna()]
    p = rng.dirichlet(np.ones(4), len(u))
    pred = pd.DataFrame(dict(image_id=u['image_id'], predicted=np.array(classes)[p.argmax(1)], **{f'prob_{c}': p[:, i] for i, c in enumerate(classes)}))
    j = (u['split'] == 'test').to_numpy()
    save_table(t, copy / 'table.csv'); save_table(pred.assign(split=u['split'], label=u['label'], group=u['group']), copy / 'predictions.csv')
    result = evaluate(u['label'][j].to_numpy(), p[j], groups=u['group'][j].to_numpy(), classes=classes, n_boot=100)
    write_json(copy / 'evaluation.json', dict(part='test', operating_point=None, source_only=None, test=result.to_dict()))
    write_text(copy / 'recipe.toml', dump_recipe(override(load_recipe('demo'), {'task': 'kinds'})))
    page = Page(write_report(copy))
    assert_sound(page)
    assert 'there is no threshold' in page.said('point') and 'not computed' in page.said('metrics') and f"{result['accuracy'].value:.3f}" in page.said()
    assert [i.number for i in checklist_items(read_run_data(copy))] == list(range(1, 45))


def test_what_is_no_finished_run_is_refused(copy, tmp_path):
    with pytest.raises(RunError, match='no run directory'): write_report(tmp_path)
    state = json.loads((copy / 'run.json').read_text())
    write_json(copy / 'run.json', state | dict(status='training'))
    with pytest.raises(RunError, match='not finished'): write_report(copy)
    write_json(copy / 'run.json', state)
    (copy / 'evaluation.json').unlink()
    with pytest.raises(RunError, match='evaluation.json is missing'): write_report(copy)
