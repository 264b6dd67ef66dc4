"""The external ladder and the comparison of runs, with the library's own learner: a shortcut falls outside, a lesion does not; nothing is refitted, nothing counted twice."""
import json, shutil
from pathlib import Path
import numpy as np, pandas as pd, pytest
from PIL import Image
from sklearn.metrics import roc_auc_score
from conftest import DATA, needs_data
from covid_cxr.core import LeakError, RunError, TableError, sha256_file, used, write_json
from covid_cxr.runs.external import external_test, external_table, open_frozen, read_external_tests, show_external
from covid_cxr.runs.test_log import count_test_evaluations, read_test_log
from covid_cxr.phantom import phantom_family
from covid_cxr.recipe import override, parse_recipe
from covid_cxr.runs.train import load_table, train
from covid_cxr.sources import SOURCES, Source, read_folder, register_source
from covid_cxr.runs.compare import compare_runs

RECIPE = '''name = "family"
task = "pneumonia_vs_normal"
[data]
views = ["PA"]
duplicates = "exact"
[[data.sources]]
name = "family"
root = "inside"
[image]
size = 64
[model]
arch = "cnn3"
weights = "none"
[split]
test_pct = 0.25
[training]
bs = 16
imbalance = "none"
rounds = [{epochs = 12, lr = RATE}]
rotate = 0
zoom = 1.0
lighting = 0.05
[evaluation]
n_boot = 200'''


def _write(root, name, n, broken=False):
    films, t, _ = phantom_family(name, n, (1, 2), size=64, broken=broken, lesion=.9)
    for i, (film, r) in enumerate(zip(films, t.itertuples())):
        f = root / ('PNEUMONIA' if r.label else 'NORMAL') / f'{r.patient}_{i}.png'
        f.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(film).save(f)
    (root / 'SYNTHETIC.txt').write_text('SYNTHETIC phantoms')


@pytest.fixture(scope='module')
def family(tmp_path_factory):
    "Runs on P1 (lesion) and P2 (marker) with a world outside each: {name: (data, run)}, trained when first asked for"
    register_source(Source('family', 'phantom family', lambda root, **more: read_folder(root, patient=r'(P\w+-\d+)_', source='family', view='PA', **more)), replace=True)
    made = {}
    def get(name):
        if name not in made:
            data = tmp_path_factory.mktemp(name)
            _write(data / 'inside', name, 120); _write(data / 'outside', name, 40, broken=True)
            made[name] = data, train(parse_recipe(RECIPE.replace('RATE', dict(P1='0.003', P2='0.001')[name])), data=data, out=data / 'run', device='cpu', log=lambda s: None)
        return made[name]
    yield get
    del SOURCES['family']


@pytest.fixture
def outside(family, tmp_path):
    "P2 and its outside world in a place of their own, to be spoilt"
    data, run = family('P2')
    shutil.copytree(run, tmp_path / 'run', ignore=shutil.ignore_patterns('checkpoints', 'ladder*'))
    shutil.copytree(data / 'outside', tmp_path / 'data/outside')
    return tmp_path / 'data', tmp_path / 'run'


def _on(run, data, **kw): return external_test(run, 'family', data, **dict(dict(root='outside', duplicates='exact', log=lambda s: None), **kw))


@pytest.mark.parametrize('name, low, high', [('P1', .8, 1), ('P2', .2, .75)])
def test_a_marker_falls_outside_and_a_lesion_does_not(family, name, low, high):
    data, run = family(name)
    before = sha256_file(run / 'bundle/weights.safetensors'), (run / 'bundle/bundle.json').read_bytes(), (run / 'evaluation.json').read_bytes()
    rung = _on(run, data, name='outside')
    home = json.loads((run / 'evaluation.json').read_text())['test']['estimates']['auc']['value']
    assert home > .85 and low < rung['estimates']['auc']['value'] < high, (home, rung['words'])
    assert before == (sha256_file(run / 'bundle/weights.safetensors'), (run / 'bundle/bundle.json').read_bytes(), (run / 'evaluation.json').read_bytes()), 'nothing is refitted'
    p = pd.read_csv(run / rung['predictions'])
    assert rung['estimates']['auc']['value'] == pytest.approx(roc_auc_score(p.label == 'pneumonia', p.prob_pneumonia))
    assert (p.predicted == np.where(p.prob_pneumonia >= rung['threshold'], 'pneumonia', 'normal')).all() and rung['threshold'] == open_frozen(run).predictor.threshold
    assert rung['predictions_sha256'] == sha256_file(run / rung['predictions']) and rung['table_sha256'] == sha256_file(run / rung['table'])
    assert rung['synthetic'] and rung['words'].startswith('Synthetic') and rung == read_external_tests(run)['rungs'][0]
    assert not rung['overlap']['images'] and rung['n_images'] == len(p) == sum(rung['images_per_class'].values())
    assert rung['floors']['file'] is not None and .2 < rung['floors']['file']['value'] < .8
    t = external_table(run)
    assert t.rung.tolist() == [0, 1, 2] and t.auc[1] == home and 'outside' in show_external(run)


def test_one_class_gives_a_share_of_patients(outside):
    data, run = outside
    well, ill = _on(run, data, findings=['No Finding'], name='well'), _on(run, data, findings=['Pneumonia'], name='ill')
    assert set(well['estimates']) == {'specificity', 'false_positive_rate'} and set(ill['estimates']) == {'recall', 'false_negative_rate'}
    assert well['false_call_rate'] == well['estimates']['false_positive_rate'] and well['sensitivity'] is None and ill['false_call_rate'] is None
    assert well['one_class'] and well['classes_present'] == ['normal'] and well['floors'] == dict(file=None, provenance=None)
    p = pd.read_csv(run / well['predictions'])
    e = well['false_call_rate']
    assert e['value'] == pytest.approx((p.predicted == 'pneumonia').mean()) and e['low'] < e['value'] < e['high'] and 'effective patients' in e['note']
    both = _on(run, data, name='both')                                    # the same calls, class by class
    assert both['estimates']['false_positive_rate']['value'] == pytest.approx(e['value']) and both['estimates']['recall']['value'] == pytest.approx(ill['sensitivity']['value'])
    assert [r['name'] for r in read_external_tests(run)['rungs']] == ['well', 'ill', 'both']


def test_a_rung_is_replaced_and_every_look_is_kept(outside):
    data, run = outside
    first, other, again = _on(run, data, name='a'), _on(run, data, findings=['No Finding'], name='b'), _on(run, data, name='a')
    rungs = read_external_tests(run)['rungs']
    assert [r['name'] for r in rungs] == ['a', 'b'] and rungs[0] == again and again['estimates'] == first['estimates'] and rungs[1] == other
    assert count_test_evaluations(run, 'ladder: a') == 2 and count_test_evaluations(run, 'ladder: b') == 1 and count_test_evaluations(run) == 1
    e = read_test_log(run)[-1]
    assert e['predictions_sha256'] == again['predictions_sha256'] and e['images'] == again['n_images'] and e['threshold'] == again['threshold']


def test_films_of_the_training_part_are_left_out_by_name(outside):
    "The same pixels, an edited copy, the same patient; and a test film, which is kept and told"
    data, run = outside
    clean = _on(run, data, name='clean')
    own = used(load_table(run / 'table.csv')).query('label == "normal"')
    of = {p: own[own.split == p].drop_duplicates('patient') for p in ('train', 'valid', 'test')}
    put = {'P2-1_0.png': of['train'].path.iloc[0], 'P2-3_0.png': of['valid'].path.iloc[0], 'P2-4_0.png': of['test'].path.iloc[0]}
    for name, path in put.items(): shutil.copy(path, data / 'outside/NORMAL' / name)
    edited = Image.open(of['train'].path.iloc[1]).resize((256, 256)).crop((8, 8, 248, 248))
    edited.save(data / 'outside/NORMAL/P2-2_0.jpg', quality=90)
    films = np.random.default_rng(0).integers(0, 255, (64, 64)).astype(np.uint8)
    who = of['train'].patient.iloc[2].split(':')[1]
    Image.fromarray(films).save(data / f'outside/NORMAL/{who}_77.png')
    rung = _on(run, data, name='mixed', duplicates='near', floors=False)
    o, t = rung['overlap'], load_table(run / rung['table'])
    gone = t[t.excluded.notna()].set_index('image_id')
    planted = {'P2-1_0.png', 'P2-2_0.jpg', 'P2-3_0.png', f'{who}_77.png'}         # phantoms of 64 px are much alike: another one may pass for an edited copy
    assert planted <= set(gone.index.str.split('/').str[-1]) and len(gone) <= 16
    assert o['exact'] == 2 and o['near'] >= 1 and o['patient'] >= 1 and o['images'] == len(gone) == o['exact'] + o['near'] + o['patient'] and o['with_own_test'] >= 1
    kind = {i.split('/')[-1]: (p, k) for i, p, k in zip(gone.index, gone.overlap_part, gone.overlap_kind)}
    assert kind['P2-1_0.png'] == ('train', 'exact') and kind['P2-2_0.jpg'] == ('train', 'near') and kind['P2-3_0.png'] == ('valid', 'exact') and kind[f'{who}_77.png'] == ('train', 'patient')
    assert gone.overlap_with['family:NORMAL/P2-1_0.png'] == of['train'].image_id.iloc[0]
    assert rung['n_images'] == clean['n_images'] + 5 - len(gone) and sum(rung['excluded'].values()) == len(gone)


def test_a_rung_of_training_films_is_refused(outside):
    data, run = outside
    own = used(load_table(run / 'table.csv'))
    with pytest.raises(LeakError, match='patients that the model was made with, e.g. family:'): external_test(run, own[own.split == 'train'], duplicates='exact', log=print)
    alone = external_test(run, own[own.split == 'test'], name='own test', duplicates='exact', floors=False, log=print)
    assert alone['overlap']['with_own_test'] == alone['n_images'] and alone['overlap']['images'] == 0        # told, not hidden
    home = json.loads((run / 'evaluation.json').read_text())['test']['estimates']['auc']['value']
    assert alone['estimates']['auc']['value'] == pytest.approx(home, abs=1e-6)


def test_refusals_leave_no_rung(outside):
    data, run = outside
    looks = len(read_test_log(run))
    def refused(kind, words, **kw):
        with pytest.raises(kind, match=words): _on(run, data, **kw)
        assert not (run / 'ladder.json').exists() and len(read_test_log(run)) == looks
    refused(TableError, 'age not recorded', min_age=18)
    refused(TableError, r'view not wanted: PA \(', views=['AP'])
    refused(TableError, 'finding not wanted', findings=['Hernia'])
    (data / 'outside/NORMAL/P2-9_0.png').write_bytes(b'no picture')
    refused(ValueError, 'P2-9_0.png')
    kept = _on(run, data, on_bad='exclude', name='one is broken')
    assert [k for k in kept['excluded'] if 'unreadable' in k] and sum(kept['excluded'].values()) == 1
    b = json.loads((run / 'bundle/bundle.json').read_text())
    write_json(run / 'bundle/bundle.json', dict(b, threshold=b['threshold'] / 2))
    with pytest.raises(ValueError, match='a rung uses the frozen one'): _on(run, data)
    write_json(run / 'run.json', dict(json.loads((run / 'run.json').read_text()), status='training'))
    with pytest.raises(RunError, match='not finished'): _on(run, data)


def test_runs_are_compared_film_by_film(family, outside, tmp_path):
    "A run against a twin that was spoilt: told apart; against a copy with a little noise: not ranked; against another split: refused"
    _, run = outside
    p = pd.read_csv(run / 'predictions.csv')
    def twin(name, prob):
        shutil.copytree(run, tmp_path / name, ignore=shutil.ignore_patterns('bundle', 'cache'))
        t = json.loads((run / 'evaluation.json').read_text())['operating_point']['threshold']
        p.assign(prob_normal=1 - prob, prob_pneumonia=prob, predicted=np.where(prob >= t, 'pneumonia', 'normal')).to_csv(tmp_path / name / 'predictions.csv', index=False)
        return tmp_path / name
    r = np.random.default_rng(0)
    coin, like = twin('coin', r.random(len(p))), twin('like', (p.prob_pneumonia + .02 * r.normal(size=len(p))).clip(0, 1))
    far = compare_runs(run, coin, n_boot=300)
    assert far.ranking == ['run', 'coin'] and count_test_evaluations(run) == 2 and count_test_evaluations(coin) == 2 and read_test_log(run)[-1]['what'] == 'compare'
    near = compare_runs(run, like, coin, n_boot=300)
    row = near.pairs.query('metric == "auc" and first == "run" and second == "like"').iloc[0]
    assert near.ranking is None and not row.told_apart and row.p_holm >= row.p and any('cannot be told apart' in w and 'patients for 80 % power' in w for w in near.words), near.words
    with pytest.raises(RunError, match='the test parts differ'): compare_runs(run, family('P1')[1])


@needs_data
def test_real_films_become_a_rung(tmp_path):
    "122 adult-and-younger NIH films without a finding, read by the real reader; the model is an untrained one, so only the counts mean something"
    recipe = override(parse_recipe('name = "tiny"\ntask = "covid_vs_other"\n[data]\nviews = ["PA"]\nduplicates = "none"\n[[data.sources]]\nname = "covid_chestxray"\nroot = "covid-chestxray-dataset"\nsample = 200\n'
                                   '[image]\nsize = 64\n[model]\narch = "cnn3"\nweights = "none"\n[training]\nrounds = [{epochs = 1, lr = 0.001}]\n'), {'evaluation.n_boot': 100})
    run = train(recipe, data=DATA, out=tmp_path / 'run', device='cpu', log=lambda s: None)
    rung = external_test(run, 'nih', DATA, root='nih-chest-xrays-512', findings=['No Finding'], min_age=18, duplicates='exact', log=lambda s: None)
    assert rung['name'] == 'nih-chest-xrays-512 No Finding, age 18 and above' and rung['excluded'] == {'age below 18': 26}
    assert (rung['n_images'], rung['n_groups'], rung['images_per_class']) == (96, 89, dict(other=96, covid=0)) and not rung['synthetic'] and rung['overlap']['images'] == 0
    assert 0 <= rung['false_call_rate']['low'] <= rung['false_call_rate']['value'] <= rung['false_call_rate']['high'] <= 1
