"""RunFolder, the one reader of a finished run: every result that was kept, under whatever names; what is missing is named."""
import gzip, json, shutil, sys
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest
from conftest import ROOT, here
from covid_cxr.bundle import DESCRIPTION, MANIFEST, AlteredWarning
from covid_cxr.core import CxrError, RunError, sha256_file, used, write_json
from covid_cxr.evaluate import evaluate
from covid_cxr.recipe import load_recipe, override
from covid_cxr.runs.external import external_table, read_external_tests
from covid_cxr.runs.folder import OLD_FILES, OLD_KEYS, TEXT_COLUMNS, RunFolder, baseline_kind, find_file, read_table
from covid_cxr.runs.sentences import describe_external_test, format_external_table
from covid_cxr.runs.test_log import log_test_evaluation

KEPT = sorted(p.parent for p in (ROOT / 'benchmarks/results').glob('*/run.json'))
KINDS = {'image_without_lungs', 'file', 'metadata'}


def test_there_are_kept_results(): assert len(KEPT) >= 40


@pytest.mark.parametrize('folder', KEPT, ids=lambda p: p.name)
def test_every_kept_result_opens(folder):
    run = RunFolder.open(folder)
    p, e = run.predictions, json.loads((folder / 'evaluation.json').read_text())
    old = {v: k for k, v in OLD_KEYS['evaluation.json'].items()}
    assert run.split == e.get('split', e.get(old['split'])) and run.state['recipe'] == run.recipe.name
    assert set(run.classes) == set(run.result.classes) and {f'prob_{c}' for c in run.classes} <= set(p.columns)
    assert all(p[c].dropna().map(type).eq(str).all() for c in TEXT_COLUMNS if c in p) and p[f'prob_{run.classes[-1]}'].dtype == float
    assert len(run.evaluated_predictions) == run.result.n_images and p['image_id'].is_unique
    assert (run.operating_point is None) == (run.source_baseline is None) == (len(run.classes) > 2)
    assert run.threshold is None or run.threshold == run.result.threshold
    assert 'stage' in run.history and len(run.history) == run.state['epochs'] and not run.synthetic
    with pytest.raises(CxrError, match='table.csv is missing'): run.table
    with pytest.raises(CxrError, match='no bundle'): run.bundle


@pytest.mark.parametrize('folder', [f for f in KEPT if find_file(f, 'external.json').exists()], ids=lambda p: p.name)
def test_kept_external_tests_are_read_and_told(folder):
    run, raw = RunFolder.open(folder), json.loads(find_file(folder, 'external.json').read_text())
    tests, before = read_external_tests(run), raw.get('tests') or raw[{v: k for k, v in OLD_KEYS['external.json'].items()}['tests']]
    assert [t.name for t in tests] == [b['name'] for b in before]
    for t, b in zip(tests, before):
        p = pd.read_csv(run.file(t.predictions))
        assert len(p) == t.n_images == sum(t.images_per_class.values()) and t.predictions_sha256
        assert {m: e.value for m, e in t.estimates.items()} == {m: e['value'] for m, e in b['estimates'].items()}
        assert set(t.baselines) == {'file', 'metadata'} and t.one_class == (len(t.classes_present) == 1)
        said = describe_external_test(t, run.result)
        assert f'{t.n_images:,} images of {t.n_groups:,} patients' in said and said.endswith('.')
    assert [t.name for t in tests] == external_table(run).query('kind == "external"')['name'].tolist()
    assert len(format_external_table(external_table(run)).splitlines()) == len(tests) + 2 + (run.split == 'test')


@pytest.mark.parametrize('folder', [f for f in KEPT if find_file(f, 'baselines.csv').exists()], ids=lambda p: p.name)
def test_kept_baseline_scores_have_todays_words(folder):
    run = RunFolder.open(folder)
    t = run.baseline_scores
    assert list(t.columns) == ['image_id', 'baseline', 'kind', 'score'] and set(t['kind']) <= KINDS and 'metadata' in set(t['baseline'])
    assert set(t['image_id']) <= set(run.evaluated_predictions['image_id'])


def test_old_and_new_names_do_not_clash():
    for keys in OLD_KEYS.values(): assert not set(keys) & set(keys.values())
    assert not set(OLD_FILES) & set(OLD_FILES.values()) and baseline_kind('file') == 'file'


def test_a_run_as_training_leaves_it(phantom_run):
    run = RunFolder.open(phantom_run)
    assert run.synthetic and not run.table_altered and run.leaking_groups == 0 and run.split == 'test'
    assert len(run.rows) == len(used(run.table)) == len(run.predictions) and (run.evaluated['split'] == 'test').all()
    assert set(run.evaluated['image_id']) == set(run.evaluated_predictions['image_id'])
    e = run.evaluated
    again = evaluate(e['label'].to_numpy(), e['prob_covid'].to_numpy(), e['group'].to_numpy(), run.threshold, list(run.classes), n_boot=0)
    assert again['auc'].value == run.result['auc'].value and run.source_baseline['auc'].n == len(e)
    assert run.bundle['provenance']['split'] == 'test' and run.external_json is None and run.audit_json is None
    assert {'excluded_step', 'excluded_rule', 'excluded_detail'} <= set(run.table) and not (run.table['excluded_step'] == 'unknown').any()


def test_the_same_run_under_its_old_names(phantom_run, tmp_path):
    "Files, keys and columns as runs had them before the words changed: everything that is read is the same"
    run, old = RunFolder.open(phantom_run), tmp_path / 'old'
    shutil.copytree(phantom_run, old, ignore=shutil.ignore_patterns('cache', 'checkpoints', 'data', 'external*', 'audit*', 'baselines*'))
    def renamed(values, file): return {{v: k for k, v in OLD_KEYS[file].items()}.get(k, k): v for k, v in values.items()}
    for file in ('run.json', 'evaluation.json'): write_json(old / file, renamed(json.loads((old / file).read_text()), file))
    h = pd.read_csv(old / 'history.csv')
    h.rename(columns={v: k for k, v in OLD_KEYS['history.csv'].items()}).to_csv(old / 'history.csv', index=False)
    t = pd.read_csv(old / 'table.csv', low_memory=False)
    t.drop(columns=['excluded_step', 'excluded_rule', 'excluded_detail']).to_csv(old / 'table.csv', index=False)
    (old / 'test_log.jsonl').rename(old / OLD_FILES['test_log.jsonl'])
    found = RunFolder.open(old)
    assert found.evaluation == run.evaluation and found.split == 'test' and found.state == run.state
    pd.testing.assert_frame_equal(found.history, run.history)
    same = [c for c in run.rows if not c.startswith('excluded')]
    pd.testing.assert_frame_equal(found.rows[same], run.rows[same])
    out = found.table[found.table['excluded'].notna()]
    assert set(out['excluded_step']) == {'unknown'} and (out['excluded_rule'] == out['excluded']).all()
    assert found.table_altered and found.file('test_log.jsonl').name == OLD_FILES['test_log.jsonl']


def test_files_of_two_runs_are_refused(phantom_run, tmp_path):
    copy = tmp_path / 'copy'
    copy.mkdir()
    for f in ('run.json', 'recipe.toml', 'table.csv', 'evaluation.json'): shutil.copy(phantom_run / f, copy)
    p = pd.read_csv(phantom_run / 'predictions.csv')
    p.iloc[1:].to_csv(copy / 'predictions.csv', index=False)
    with pytest.raises(RunError, match='the files are not of one run|rows were removed'): RunFolder.open(copy).rows
    valid = p[p['split'] == 'valid'].iloc[:1]
    pd.concat([p, valid.assign(image_id='another')]).to_csv(copy / 'predictions.csv', index=False)
    with pytest.raises(RunError, match='the files are not of one run .*, 0 rows without one'): RunFolder.open(copy).rows
    write_json(copy / 'run.json', dict(json.loads((copy / 'run.json').read_text()), status='training'))
    with pytest.raises(RunError, match='is not finished'): RunFolder.open(copy)
    assert RunFolder.open(copy, finished=False).state['status'] == 'training'


def test_a_table_keeps_its_types(phantom_run, tmp_path):
    t = read_table(phantom_run / 'table.csv')
    assert t['age_years'].dtype == float and t['excluded'].dropna().map(type).eq(str).all()
    assert sha256_file(phantom_run / 'table.csv') == RunFolder.open(phantom_run).state['table_sha256']
    assert np.isnan(t.loc[t['excluded'].isna(), 'excluded_rule'].to_numpy(float)).all()


def _said(*words):
    "(exit code, everything that a command printed)"
    p = here(*words)
    return p.returncode, p.stdout + p.stderr


def _edit_json(file, **changes): write_json(file, dict(json.loads(file.read_text()), **changes))


def _perfect(run):
    p = pd.read_csv(run / 'predictions.csv', dtype={'patient': str, 'group': str})
    p['prob_covid'] = np.where(p['label'] == 'covid', .99, .01)
    p.assign(prob_other=1 - p['prob_covid'], predicted=p['label']).to_csv(run / 'predictions.csv', index=False)


@pytest.fixture
def sealed(phantom_run, tmp_path): return shutil.copytree(phantom_run, tmp_path / 'run', ignore=shutil.ignore_patterns('cache', 'data'))


@pytest.mark.parametrize('file, change', [
    ('predictions.csv', _perfect), ('run.json', lambda r: _edit_json(r / 'run.json', synthetic=False)),
    ('evaluation.json', lambda r: _edit_json(r / 'evaluation.json', leaking_groups=9)),
    ('recipe.toml', lambda r: (r / 'recipe.toml').write_text((r / 'recipe.toml').read_text() + '# other\n')),
    ('bundle/bundle.json', lambda r: _edit_json(r / 'bundle/bundle.json', not_for='Approved.')),
    ('history.csv', lambda r: (r / 'history.csv').unlink())])
def test_an_altered_file_is_named(sealed, file, change):
    assert RunFolder(sealed).integrity.status == 'verified'
    change(sealed)
    assert RunFolder(sealed).integrity.altered == (file,)
    with pytest.warns(AlteredWarning, match=file): RunFolder.open(sealed)
    code, text = _said('evaluate', sealed, '--n-boot', 100)
    assert code == 0 and text.count('ALTERED') == 1 and file in text
    if file.startswith('bundle'):
        code, text = _said('predict', sealed, sealed / 'new-image.png', '--ood', 'off')
        assert code == 0 and f'ALTERED: {DESCRIPTION}' in text
    (sealed / MANIFEST).unlink()
    assert 'UNVERIFIED' in _said('evaluate', sealed, '--n-boot', 100)[1]


def test_the_report_and_the_comparison_say_it(sealed, tmp_path):
    from covid_cxr.report.context import list_limits, list_warnings, read_run_data
    assert not [w for w in list_warnings(read_run_data(sealed)) if w.kind == 'altered_files']
    other = shutil.copytree(sealed, tmp_path / 'other')
    _perfect(sealed)
    told = [w.text for w in list_warnings(read_run_data(sealed)) if w.kind == 'altered_files']
    assert len(told) == 1 and told[0].startswith('ALTERED: predictions.csv')
    assert 'ALTERED: predictions.csv' in _said('compare', sealed, other, '--n-boot', 100)[1]
    (sealed / MANIFEST).unlink()
    data = read_run_data(sealed)
    assert not [w for w in list_warnings(data) if w.kind == 'altered_files']
    assert 'UNVERIFIED' in [x for x in list_limits(data) if x.where == 'files'][0].text


def test_what_writes_by_right_keeps_a_run_verified(sealed):
    log_test_evaluation(sealed, 'audit')
    assert RunFolder(sealed).integrity.status == 'verified' and _said('report', sealed)[0] == 0
    assert {'report.html', 'model-card.md'} <= set(json.loads((sealed / MANIFEST).read_text())['files'])
    assert _said('evaluate', sealed, '--n-boot', 100)[0] == 0 and RunFolder(sealed).integrity.status == 'verified'
    write_json(sealed / 'audit.json', dict(version=2))                    # an audit that was put in
    assert RunFolder(sealed).integrity.altered == ('audit.json',)


@pytest.mark.parametrize('change, word', [
    (lambda p: p.iloc[:-1], 'removed|one run'), (lambda p: pd.concat([p, p.iloc[-1:]]), 'repeat an image'),
    (lambda p: p.drop(columns='prob_covid'), 'prob_'),
    (lambda p: p.assign(prob_covid=np.nan), 'no probabilities'), (lambda p: p.assign(prob_covid=2.), 'no probabilities'),
    (lambda p: p.assign(prob_covid='x'), 'no probabilities'), (lambda p: p.assign(label='covd'), 'no class'),
    (lambda p: p.assign(split='tset'), 'no split'),
    (lambda p: p.drop(columns='image_id'), 'image_id'), (lambda p: p.iloc[:0], 'removed|one run')])
def test_truncated_or_doubled_predictions_are_refused(sealed, change, word):
    change(pd.read_csv(sealed / 'predictions.csv', dtype={'group': str})).to_csv(sealed / 'predictions.csv', index=False)
    with pytest.raises(RunError, match=word): RunFolder(sealed).rows
    before = (sealed / 'test_log.jsonl').read_bytes()
    assert _said('evaluate', sealed)[0] == 1 and (sealed / 'test_log.jsonl').read_bytes() == before


# ---- runs that are kept
def test_a_run_is_kept_once_and_names_no_place(phantom_run, tmp_path):
    sys.path.insert(0, str(ROOT / 'benchmarks'))
    from keep_all import keep_anew
    run, place = RunFolder.open(phantom_run), tmp_path / 'kept'
    assert [keep_anew(run, place, 'covid-cxr demo') for _ in range(2)] == ['kept', 'unchanged']
    kept, evaluated = RunFolder.open(place), run.predictions['split'] != 'train'
    assert (kept.predictions['image_id'] == run.predictions['image_id']).all() and 'path' not in kept.predictions
    assert kept.predictions[evaluated].filter(like='prob_').equals(run.predictions[evaluated].filter(like='prob_'))
    assert kept.result['auc'] == run.result['auc'] and kept.state['command'] == 'covid-cxr demo'
    for f in (f for f in place.rglob('*') if f.is_file()):
        content = gzip.decompress(f.read_bytes()) if f.suffix == '.gz' else f.read_bytes()
        assert str(phantom_run.parent).encode() not in content, f
    (place / 'history.csv').write_text('')
    assert keep_anew(run, place, 'covid-cxr demo') == 'kept anew'


def test_a_kept_recipe_names_the_weights_of_another_run_from_its_folder_on():
    sys.path.insert(0, str(ROOT / 'benchmarks'))
    from keep_run import kept_recipe
    at = override(load_recipe('covid-2020-within'), {'model.weights': '/anywhere/out/runs/pretrain/bundle/weights.safetensors'})
    assert kept_recipe(SimpleNamespace(recipe=at)).model.weights == 'runs/pretrain/bundle/weights.safetensors'
    assert kept_recipe(SimpleNamespace(recipe=load_recipe('covid-2020'))) == load_recipe('covid-2020')
