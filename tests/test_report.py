"""The report of a run: its own numbers, what is bad in red, nothing left out, hostile text stays text, nothing is fetched."""
import html, json, re, shutil, warnings
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
import numpy as np, pandas as pd, pytest
from conftest import ROOT
from covid_cxr.audit.case import read_audit
from covid_cxr.audit.run import audit_run
from covid_cxr.audit.sentences import describe_count, describe_headline, describe_not_run, describe_rule, describe_value, describe_verdict
from covid_cxr.bundle import AlteredWarning
from covid_cxr.core import RunError, sha256_file, write_json, write_text
from covid_cxr.evaluate import evaluate, wilson
from covid_cxr.phantom import write_phantom_trees
from covid_cxr.recipe import dump_recipe, load_recipe, override
from covid_cxr.report.checklist import ITEMS, checklist_items
from covid_cxr.report.context import list_errors, list_limits, list_warnings, read_run_data, write_example_run
from covid_cxr.report.page import write_report
from covid_cxr.runs.external import external_test, read_external_tests
from covid_cxr.runs.folder import read_table, write_table
from covid_cxr.runs.sentences import describe_external_test
from covid_cxr.runs.test_log import log_test_evaluation
from covid_cxr.words import format_estimate, format_number

SECTIONS = ['point', 'flow', 'people', 'metrics', 'shortcut', 'audit', 'external', 'errors', 'precision', 'limits', 'checklist',
            'rules', 'provenance']
HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)>{{ 7 * 7 }}|`"\'&\n# heading'
FORBIDDEN_TAGS = ('script', 'link', 'iframe', 'object', 'embed', 'base', 'form', 'use', 'image', 'video', 'audio', 'source')
FORBIDDEN_ATTRIBUTES = ('srcset', 'style', 'background', 'action', 'xlink:href', 'poster')


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
        if data.strip():
            self.text.append(data.strip())
            self.where.setdefault(self.section, []).append(data.strip())
        if 'tr' in self.open: self.rows[self.section][-1] += data + ' '

    def said(self, section=None): return ' '.join(self.where.get(section, []))


def assert_sound(page):
    "One file, nothing fetched, nothing run; headings in order, names for pictures, scopes for headers, no id twice"
    assert page.source.startswith('<!DOCTYPE html>')
    ids = [a['id'] for _, a in page.tags if 'id' in a]
    assert len(ids) == len(set(ids))
    for tag, a in page.tags:
        assert tag not in FORBIDDEN_TAGS, tag
        for k, v in a.items():
            assert not k.startswith('on') and k not in FORBIDDEN_ATTRIBUTES, (tag, k)
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

def show(e, signed=False): return format_estimate(e.value, e.low, e.high, signed=signed)

def kinds(run): return [w.kind for w in list_warnings(read_run_data(run))]

def texts(run): return ' '.join(w.text for w in list_warnings(read_run_data(run)))

def plain(card): return html.unescape(card.replace('\\', ''))


ABOVE = dict(model_auc=estimate(.83, .72, .92), auc_gain=estimate(.2138, .1019, .3231), auc_gain_over_metadata=estimate(.275, .1751, .3752),
             reads_lungs=True, better_than_chance=True)


@pytest.fixture(scope='module')
def example(tmp_path_factory): return write_example_run(tmp_path_factory.mktemp('example') / 'run', n_boot=200)

@pytest.fixture
def copy(example, tmp_path): return Path(shutil.copytree(example, tmp_path / 'run'))

@pytest.fixture(scope='module')
def finished(phantom_run, tmp_path_factory):
    "The phantom run, a second evaluation on its test split, and an external test on new phantoms; then its report"
    left_out = 'checkpoints', 'cache', 'audit.*', 'external*', 'report.html', 'model-card.md'
    run = Path(shutil.copytree(phantom_run, tmp_path_factory.mktemp('finished') / 'demo', ignore=shutil.ignore_patterns(*left_out)))
    log_test_evaluation(run, 'evaluate')
    trees = tmp_path_factory.mktemp('elsewhere')
    write_phantom_trees(trees, seed=99, size=96, n_patients=12, n_normal=10, n_pneumonia=2)
    external_test(run, 'covid_chestxray', trees, root='covid-chestxray-dataset', name='new phantoms', n_boot=100, check_files=False,
                  log=lambda text: None)
    return run, Page(write_report(run))


@pytest.fixture(scope='module')
def audited(finished, tmp_path_factory):
    "The same run after a real, quick audit: the folder, its page, its audit"
    run = Path(shutil.copytree(finished[0], tmp_path_factory.mktemp('audited') / 'demo'))
    audit_run(run, quick=True, n_boot=200, log=lambda text: None)
    return run, Page(write_report(run)), read_audit(run)


@pytest.fixture
def audit_json(audited): return json.loads((audited[0] / 'audit.json').read_text())


def test_the_page_of_a_trained_run_is_sound_and_says_first_what_it_is_not_for(finished):
    run, page = finished
    assert_sound(page)
    not_for = json.loads((run / 'bundle/bundle.json').read_text())['not_for']
    assert page.text[0] == 'Not for patients.' and page.text[1].startswith(not_for)
    assert page.text[2].startswith('SYNTHETIC DATA')
    banners = [a for t, a in page.tags if a.get('class') == 'banner']
    assert banners and all(a['role'] == 'alert' for a in banners)


def test_every_number_of_the_head_is_the_runs_own(finished):
    run, page = finished
    e = json.loads((run / 'evaluation.json').read_text())
    head, est = page.said(), e['test']['estimates']
    assert f"{est['auc']['value']:.3f} [{est['auc']['low']:.3f}, {est['auc']['high']:.3f}]" in head
    assert f"{e['source_baseline']['estimates']['auc']['value']:.3f}" in head
    (tn, fp), (fn, tp) = e['test']['confusion']
    assert f"found {tp} of {tp + fn} images of class 'covid' and missed {fn}" in head and f"it predicted 'covid' for {fp}" in head
    point = page.said('point')
    assert f"{est['recall']['value']:.3f}" in point and f"{est['specificity']['value']:.3f}" in point
    assert f"{e['operating_point']['threshold']:.4f}" in point and e['operating_point']['hash'] in point
    for m, v in est.items():
        row = next(r for r in page.rows['metrics'] if f"{format_number(v['value'])} " in r and f" {v['n']:,} " in r)
        assert row.endswith(' ')
        if v['low'] is not None:
            assert any(f"[{format_number(v['low'])}, {format_number(v['high'])}]" in r for r in page.rows['metrics']), m


def test_precision_is_that_of_the_measured_rates(finished):
    run, page = finished
    e = json.loads((run / 'evaluation.json').read_text())['test']
    neg, pos = (e['groups_per_class'][c] for c in e['classes'])
    text, known = page.said('precision'), {'recall': ('sensitivity', pos), 'specificity': ('specificity', neg)}
    assert f'{pos + neg} patient groups, rates as measured: accuracy ({100 * e["estimates"]["accuracy"]["value"]:.0f} %)' in text
    for metric, (name, n) in known.items():
        rate = e['estimates'][metric]['value']
        assert 0 < rate < 1
        half = 100 * wilson(rate * n, n).half_width
        assert f'{name} ({100 * rate:.0f} % of {n}) to +/- {half:.0f}' in text, text


def test_flow_table_one_and_errors_are_counts_of_the_table(finished):
    run, page = finished
    t, data = read_table(run / 'table.csv'), read_run_data(run)
    u, flow = t[t['excluded'].isna()], page.said('flow')
    assert f'{len(t):,} rows in = {len(u):,} used + {len(t) - len(u):,} excluded' in flow
    outs = [int(n.replace(',', '')) for n in re.findall(r'([\d,]+) excluded (?:while|by|as|because)', flow)]
    assert sum(outs) == len(t) - len(u) and len(outs) > 2 and 'older table' not in flow
    for s, r in u.groupby('split'):
        others, covid = (r['label'] == 'other').sum(), (r['label'] == 'covid').sum()
        assert f"{len(r):,} {s} {others:,} other, {covid:,} covid; {r['group'].nunique():,} patient group" in flow
    images = next(r for r in page.rows['people'] if r.startswith('images')).split()[1:]
    cells = [(s, c) for s in ('train', 'valid', 'test') for c in ('other', 'covid')]
    assert [int(v) for v in images] == [((u['split'] == s) & (u['label'] == c)).sum() for s, c in cells]
    errors = list_errors(data)
    shown = [a for t, a in page.tags if t == 'img' and a['src'].startswith('data:image/png')]
    assert len(shown) == len(errors) and f'{len(errors)} wrong prediction' in page.said('errors')
    worst = errors.iloc[0]
    assert page.said('errors').index(f'{1 - worst["prob_true"]:.3f}') < page.said('errors').index('groups with an error')


def test_evaluations_and_external_tests_of_the_run_stand_on_the_page(finished):
    run, page = finished
    data = read_run_data(run)
    n = data.test_log.evaluations
    assert n >= 2 and f'this test split was evaluated {n} times' in page.said('provenance')
    test, = read_external_tests(run)
    told = page.said('external')
    assert '1 external test' in told and test.name in told and describe_external_test(test, data.result) in told
    assert show(test.estimates['auc']) in told
    assert next(i for i in checklist_items(data) if i.number == 33).status == 'FROM THE RUN'


def test_a_run_without_an_audit_says_so_where_the_number_would_stand(finished):
    run, page = finished
    head = page.said()
    assert 'AUC gain over the best lung-free baseline NOT AUDITED: run covid-cxr audit RUN' in head and 'NOT AUDITED' in page.said('audit')
    assert any('No audit was run' in limit.text for limit in list_limits(read_run_data(run)))
    assert 'NOT AUDITED' in (run / 'model-card.md').read_text()


def test_audit_first_all_verdicts_in_words(audited):
    run, page, audit = audited
    assert_sound(page)
    h, head = audit.headline, page.said()
    gain = show(h.auc_gain, signed=True)
    assert 'NOT AUDITED' not in page.source and f'AUC gain over the best lung-free baseline {gain} {describe_headline(h)}' in head
    own = read_run_data(run).result['auc']
    assert own.value == pytest.approx(h.model_auc.value, abs=1e-6)
    assert head.index(gain) < head.index('Model AUC ' + show(own))
    for b in (h.best_baseline, h.metadata_baseline): assert f'{show(b.auc)} {b.name}' in head
    assert show(h.auc_gain_over_metadata, signed=True) in head
    rows = page.rows['audit'][1:len(audit.verdicts) + 1]
    for v, row in zip(audit.verdicts, rows, strict=True):
        assert row.startswith(f'{v.check}  {v.name}') and f' {v.verdict} ' in row
        for text in (describe_verdict(v), describe_count(v), describe_rule(v), describe_value(v)): assert text in row
        if np.isnan(v.value): assert ('not measured' if v.statistic == 'none' else 'not estimable') in row
    shortcut = page.said('shortcut')
    assert all(b.name in shortcut and show(b.auc) in shortcut for b in audit.baselines)
    signals = [v for v in audit.verdicts if v.rule == 'source_signal']
    assert not any(v.name in shortcut for v in signals)             # it tells the source, not the class: no baseline


def test_every_rule_of_the_audit_stands_on_the_page_audited_or_not(finished, audited):
    from covid_cxr.audit.case import RULES
    for page in (finished[1], audited[1]):
        for rule in RULES.values(): assert rule.words in page.said('rules')


def test_limitations_are_written_from_every_bad_verdict_and_every_check_not_run(audited):
    run, page, audit = audited
    bad = [v for v in audit.verdicts if v.verdict in ('FAIL', 'WARN', 'UNDERPOWERED', 'NOT APPLICABLE')]
    limits, card = page.said('limits'), plain((run / 'model-card.md').read_text())
    assert len(bad) > 5 and len(audit.not_run) > 2
    for text in (limits, card):
        for v in bad: assert describe_verdict(v) in text
        for n in audit.not_run: assert describe_not_run(n) in text and describe_not_run(n) in page.said('audit')
    data = read_run_data(run)
    assert sum(limit.where.startswith('A') for limit in list_limits(data)) == len(bad) + len(audit.not_run)
    assert show(audit.headline.auc_gain, signed=True) in card
    status = {i.number: i.status for i in checklist_items(data)}
    assert status[30] == status[31] == 'FROM THE RUN'


@pytest.mark.parametrize('headline, kind, words', [
    (dict(auc_gain=estimate(.02, -.05, .09), reads_lungs=False), 'no_gain', 'NO GAIN OVER A LUNG-FREE BASELINE'),
    (dict(auc_gain=estimate(.02, -.05, .19), reads_lungs=False), 'gain_not_known', 'GAIN OVER A LUNG-FREE BASELINE NOT KNOWN'),
    (dict(auc_gain=estimate(None, None, None), reads_lungs=False), 'gain_not_known', 'GAIN OVER A LUNG-FREE BASELINE NOT KNOWN'),
    (dict(auc_gain_over_metadata=estimate(-.1, -.2, .01)), 'no_gain_over_metadata', 'METADATA ALONE EXPLAIN'),
    (dict(auc_gain_over_metadata=estimate(.1, -.1, .3)), 'gain_over_metadata_not_known', 'GAIN OVER METADATA ALONE NOT KNOWN'),
    (dict(auc_gain=estimate(.02, -.05, .09), leaking_groups=3, reads_lungs=False), None, ''),
    (dict(best_baseline=None, metadata_baseline=None, reads_lungs=False), None, ''), ({}, None, '')])
def test_an_auc_that_is_not_above_a_baseline_is_said_in_red(copy, audit_json, headline, kind, words):
    write_json(copy / 'audit.json', audit_json | dict(headline=audit_json['headline'] | ABOVE | headline))
    assert {k for k in kinds(copy) if 'gain' in k} == {kind} - {None} and words in texts(copy)
    assert ('NO GAIN' in texts(copy) or 'ALONE EXPLAIN' in texts(copy)) == (kind in ('no_gain', 'no_gain_over_metadata'))
    assert 'other_model' in kinds(copy) and 'AUDIT OF ANOTHER MODEL' in texts(copy)       # its AUC is not that of the example run


def test_a_run_that_leaks_has_no_headline(copy, audit_json):
    write_json(copy / 'audit.json', audit_json | dict(headline=audit_json['headline'] | ABOVE | dict(leaking_groups=3, reads_lungs=False)))
    head, card = Page(write_report(copy)).said(), plain((copy / 'model-card.md').read_text())
    said = describe_headline(read_audit(copy).headline)
    assert said.startswith('No headline: 3 patient groups') and said in head and said in card
    gain = format_estimate(*ABOVE['auc_gain'].values(), signed=True)
    assert gain not in head and gain not in card
    assert 'NO HEADLINE: patients stand in training and in the test split' in head


def test_a_perfect_run_is_audited_and_reported(finished, tmp_path):
    "No false positive: the positive likelihood ratio is infinite, and stands in evaluation.json as text"
    run = Path(shutil.copytree(finished[0], tmp_path / 'demo'))
    p, e = pd.read_csv(run / 'predictions.csv', dtype=str, keep_default_na=False), json.loads((run / 'evaluation.json').read_text())
    ill = p['label'] == 'covid'
    p['prob_covid'], p['prob_other'] = np.where(ill, '0.9999', '0.0001'), np.where(ill, '0.0001', '0.9999')
    p.assign(predicted=p['label']).to_csv(run / 'predictions.csv', index=False)
    test = p[p['split'] == 'test']
    again = evaluate(test['label'].to_numpy(object), test['prob_covid'].to_numpy(float), test['group'].to_numpy(object),
                     e['operating_point']['threshold'], ('other', 'covid'), n_boot=100)
    write_json(run / 'evaluation.json', e | dict(test=again.to_dict()))
    assert json.loads((run / 'evaluation.json').read_text())['test']['estimates']['lr_positive']['value'] == 'inf'
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', AlteredWarning)
        audit = audit_run(run, quick=True, n_boot=100, log=lambda text: None)
        page = Page(write_report(run))
    same, = [v for v in audit.verdicts if v.rule == 'same_numbers']
    assert same.verdict == 'PASS' and audit.headline.model_auc.value == 1 and describe_verdict(same) in page.said('audit')


def test_leaks_alterations_broken_logs_and_a_missing_test_split_are_said_in_red(copy):
    state = json.loads((copy / 'run.json').read_text())
    assert kinds(copy) == ['synthetic'] and 'SYNTHETIC' in texts(copy)
    write_json(copy / 'run.json', state | dict(leaking_groups=3))
    assert 'leak' in kinds(copy) and '3 patient groups stand on both sides' in texts(copy)
    assert 'LEAKING PROTOCOL: 3 patient groups' in ' '.join(Page(write_report(copy)).text[2:5])
    write_json(copy / 'run.json', state)
    recipe = load_recipe('demo')
    for change, kind, words in (({'split.allow_leak': True}, 'leak_allowed', 'LEAK ALLOWED'),
                                ({'split.kind': 'image'}, 'leak', 'LEAKING PROTOCOL: images were split')):
        write_text(copy / 'recipe.toml', dump_recipe(override(recipe, change)))
        assert kind in kinds(copy) and words in texts(copy)
    write_text(copy / 'recipe.toml', dump_recipe(recipe))
    log_test_evaluation(copy, 'evaluate')
    log = copy / 'test_log.jsonl'
    log.write_text(log.read_text().replace('evaluate', 'nothing!'))
    assert 'broken_log' in kinds(copy) and 'THE TEST LOG IS BROKEN' in texts(copy)
    with open(copy / 'table.csv', 'a') as file: file.write('\n')
    assert 'altered_table' in kinds(copy) and 'ALTERED FILES' in texts(copy)


def test_a_run_without_a_test_split_says_so_in_red(copy):
    e = json.loads((copy / 'evaluation.json').read_text())
    n = int((pd.read_csv(copy / 'predictions.csv')['split'] == 'valid').sum())
    write_json(copy / 'evaluation.json', e | dict(split='valid', valid=e['test'] | dict(n_images=n)))
    assert 'no_test_split' in kinds(copy) and 'NO TEST SPLIT' in texts(copy)
    assert any(limit.where == 'test split' for limit in list_limits(read_run_data(copy)))


def test_where_patients_are_not_recorded_nothing_says_that_they_are_kept_apart(copy):
    def everything(): return ' '.join(Page(write_report(copy)).text) + plain((copy / 'model-card.md').read_text())
    said = everything()
    apart = 'No patient group stands in two splits', 'never used in training'
    for words in apart: assert words in said, words
    write_table(read_table(copy / 'table.csv').assign(patient=None), copy / 'table.csv')
    data = read_run_data(copy)
    said = everything()
    for words in apart: assert words not in said, words
    not_recorded = f'The patient of {len(data.rows)} of {len(data.rows)} images is not recorded'
    assert said.count(not_recorded) >= 3 and f'{data.result.n_images} images in {data.result.n_groups} groups (' in said
    assert not_recorded in next(i.text for i in checklist_items(data) if i.number == 20)
    of_patients = ('interval that patients', 'so many patients', 'images and patients', 'patients have several', 'Patient groups')
    for words in of_patients: assert words not in said, words
    of_groups = ('interval that groups, not images, allow', 'a group counts as a patient', 'What so many groups can say')
    for words in of_groups: assert words in said, words
    assert any(r.startswith('patients, where recorded') for r in Page(copy / 'report.html').rows['people'])


def test_children_joined_with_adults_are_said_in_red(copy):
    state, t = json.loads((copy / 'run.json').read_text()), read_table(copy / 'table.csv')
    write_json(copy / 'run.json', state | dict(synthetic=False))
    assert 'children' not in kinds(copy)
    t.loc[t['label'] == 'other', ['source', 'age_years']] = ['kaggle_pneumonia', np.nan]
    write_table(t, copy / 'table.csv')
    write_json(copy / 'run.json', state | dict(synthetic=False, table_sha256=sha256_file(copy / 'table.csv')))
    assert 'children' in kinds(copy) and 'CHILDREN JOINED WITH ADULTS' in texts(copy)


def test_hostile_text_stays_text_and_nothing_fetches_anything(copy, audit_json):
    t = read_table(copy / 'table.csv')
    pred = pd.read_csv(copy / 'predictions.csv')
    names = {i: f'{i}{HOSTILE}' for i in t['image_id']}
    t['image_id'], t['patient'], t['licence'], t['path'] = t['image_id'].map(names), t['patient'] + HOSTILE, HOSTILE, t['path'] + HOSTILE
    t.loc[:2, ['excluded', 'excluded_rule']] = HOSTILE
    write_table(t, copy / 'table.csv')
    write_table(pred.assign(image_id=pred['image_id'].map(names)), copy / 'predictions.csv')
    write_text(copy / 'recipe.toml', dump_recipe(load_recipe('demo')).replace('title = "', f'title = {json.dumps(HOSTILE)}\n#"'))
    for v in audit_json['verdicts']: v.update(name=HOSTILE, statistic=HOSTILE, n={HOSTILE: 1})
    for b in audit_json['baselines']: b.update(name=HOSTILE, seen=HOSTILE)
    for b in ('best_baseline', 'metadata_baseline'): audit_json['headline'][b]['name'] = HOSTILE
    for n in audit_json['not_run']: n.update(title=HOSTILE)
    write_json(copy / 'audit.json', audit_json)
    write_text(copy / 'answers.toml', f'signed = {json.dumps(HOSTILE)}\n[claim]\n41 = {json.dumps(HOSTILE)}\n')
    page = Page(write_report(copy))
    assert_sound(page)
    assert '<script>alert("x")</script>' in ' '.join(page.text) and '<script' not in page.source
    assert '{{ 7 * 7 }}' in ' '.join(page.text)                        # a text is no template
    card = (copy / 'model-card.md').read_text()
    assert '<script' not in card and '<img' not in card and not re.search(r'^# heading', card, re.M)


def test_the_checklist_has_44_items_always_and_answers_do_not_replace_what_the_run_says(copy):
    write_text(copy / 'answers.toml', 'signed = "A. Author"\n[claim]\n34 = "Not registered."\n7 = "Version of June 2020."\n')
    page = Page(write_report(copy, thumbnails=False))
    rows = [r for r in page.rows['checklist'] if re.match(r'\d+ ', r)]
    assert [int(r.split()[0]) for r in rows] == list(range(1, 45)) == list(ITEMS)
    for r in rows: assert sum(s in r for s in ('FROM THE RUN', 'DRAFT, UNSIGNED', 'ANSWERED', 'NOT REPORTED')) == 1
    assert 'Version of June 2020.' in rows[6] and 'ieee8023' in rows[6] and 'Not registered.' in rows[33] and 'NOT REPORTED' in rows[43]
    assert 'Signed by A. Author.' in page.said('checklist')
    assert not any(a['src'].startswith('data:image/png') for t, a in page.tags if t == 'img')
    assert 'pictures are left out' in page.said('errors')


def test_the_model_card_is_complete_and_the_same_run_gives_the_same_files(example, tmp_path):
    before = {p.name: sha256_file(p) for p in example.iterdir() if p.is_file()}
    pages = [write_report(example, tmp_path / name).read_bytes() for name in 'ab']
    cards = [(tmp_path / name / 'model-card.md').read_text() for name in 'ab']
    assert pages[0] == pages[1] and cards[0] == cards[1]
    assert {p.name: sha256_file(p) for p in example.iterdir() if p.is_file()} == before         # the run is left as it was
    card, data = cards[0], read_run_data(example)
    heads = re.findall('^## (.+)$', card, re.M)
    assert heads == ['Headline', 'Model details', 'Intended use', 'Factors', 'Metrics', 'Evaluation data', 'Training data',
                     'Quantitative analyses', 'Ethical considerations', 'Caveats and recommendations']
    assert card.startswith('# ') and card.splitlines()[2].startswith(f"**{data.bundle['not_for']}")
    assert 'SYNTHETIC DATA' in card.split('## ')[0]
    e = data.result['auc']
    assert f'| AUC | {e.value:.3f} | \\[{e.low:.3f}, {e.high:.3f}\\] |' in card
    for limit in list_limits(data): assert limit.text in plain(card)
    missing = card.split('NOT REPORTED:')[-1]
    assert not [i.number for i in checklist_items(data) if i.status == 'NOT REPORTED' and str(i.number) not in missing]
    assert sorted(p.name for p in (tmp_path / 'a').iterdir()) == ['model-card.md', 'report.html']


def test_more_than_two_classes_and_what_they_do_not_have(copy):
    t, rng, classes = read_table(copy / 'table.csv'), np.random.default_rng(0), ['normal', 'bacterial', 'viral', 'covid']
    t['label'] = rng.choice(classes, len(t))
    u = t[t['excluded'].isna()]
    p = rng.dirichlet(np.ones(4), len(u))
    probabilities = {f'prob_{c}': p[:, i] for i, c in enumerate(classes)}
    pred = pd.DataFrame(dict(image_id=u['image_id'], predicted=np.array(classes)[p.argmax(1)], **probabilities))
    j = (u['split'] == 'test').to_numpy()
    write_table(t, copy / 'table.csv')
    write_table(pred.assign(split=u['split'], label=u['label'], group=u['group']), copy / 'predictions.csv')
    result = evaluate(u['label'][j].to_numpy(), p[j], groups=u['group'][j].to_numpy(), classes=classes, n_boot=100)
    write_json(copy / 'evaluation.json', dict(split='test', operating_point=None, source_baseline=None, test=result.to_dict()))
    write_text(copy / 'recipe.toml', dump_recipe(override(load_recipe('demo'), {'task': 'kinds'})))
    page = Page(write_report(copy))
    assert_sound(page)
    assert 'there is no threshold' in page.said('point') and 'not computed' in page.said('metrics')
    assert f"{result['accuracy'].value:.3f}" in page.said()
    assert [i.number for i in checklist_items(read_run_data(copy))] == list(range(1, 45))


def test_a_run_of_the_old_file_names_and_keys_gives_the_same_page(copy, tmp_path):
    page = write_report(copy, tmp_path / 'new').read_text()
    e = json.loads((copy / 'evaluation.json').read_text())
    write_json(copy / 'evaluation.json', {{'split': 'part', 'source_baseline': 'source_only'}.get(k, k): v for k, v in e.items()})
    write_table(pd.read_csv(copy / 'history.csv').rename(columns={'stage': 'round'}), copy / 'history.csv')
    assert write_report(copy, tmp_path / 'old').read_text() == page


def test_templates_and_style_sheet_are_part_of_the_package():
    names = {p.name for p in files('covid_cxr.report').joinpath('templates').iterdir()}
    assert {'base.html.j2', 'parts.html.j2', 'page.html.j2', 'model-card.md.j2', 'report.css'} <= names
    assert 'report/templates/*' in (ROOT / 'setup.py').read_text()


def test_what_is_no_finished_run_is_refused(copy, tmp_path):
    with pytest.raises(RunError, match='no run directory'): write_report(tmp_path)
    state = json.loads((copy / 'run.json').read_text())
    write_json(copy / 'run.json', state | dict(status='training'))
    with pytest.raises(RunError, match='not finished'): write_report(copy)
    write_json(copy / 'run.json', state)
    (copy / 'evaluation.json').unlink()
    with pytest.raises(RunError, match='evaluation.json is missing'): write_report(copy)
