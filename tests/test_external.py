"""External tests and the comparison of runs, with the library's own learner: a shortcut falls, a lesion does not; nothing is refitted."""
import dataclasses, json, shutil
from pathlib import Path
import numpy as np, pandas as pd, pytest
from PIL import Image
from sklearn.metrics import roc_auc_score
from conftest import DATA, needs_data, tiny_recipe
from covid_cxr.audit.baselines import external_baselines
from covid_cxr.core import LeakError, RunError, TableError, sha256_file, used, write_json
from covid_cxr.phantom import phantom_family
from covid_cxr.runs.compare import compare_runs
from covid_cxr.runs.external import external_table, external_test, open_frozen, read_external_tests
from covid_cxr.runs.folder import OLD_FILES, OLD_KEYS, SYNTHETIC_WARNING, read_table
from covid_cxr.runs.sentences import comparison_sentences, describe_external_test, format_external_table
from covid_cxr.runs.test_log import count_test_evaluations, read_test_log
from covid_cxr.runs.train import train
from covid_cxr.sources import SOURCES, Source, read_folder, register_source

FAMILY = 'name = "family"\nroot = "inside"\n'
TRAINING = {'data.views': ['PA'], 'image.size': 64, 'split.test_pct': .25, 'training.bs': 16, 'training.imbalance': 'none',
            'training.rotate': 0, 'training.zoom': 1., 'training.lighting': .05, 'evaluation.n_boot': 200}


def _write(root, name, n, broken=False):
    images, t, _ = phantom_family(name, n, (1, 2), size=64, broken=broken, lesion=.9)
    for i, (image, r) in enumerate(zip(images, t.itertuples())):
        f = root / ('PNEUMONIA' if r.label else 'NORMAL') / f'{r.patient}_{i}.png'
        f.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(f)
    (root / 'SYNTHETIC.txt').write_text('SYNTHETIC phantoms')


@pytest.fixture(scope='module')
def family(tmp_path_factory):
    "Runs on P1 (lesion) and P2 (marker) with a world outside each: {name: (data, run)}, trained when first asked for"
    def read_family(root, **more): return read_folder(root, patient=r'(P\w+-\d+)_', source='family', view='PA', **more)
    register_source(Source('family', 'phantom family', read_family), replace=True)
    made = {}
    def get(name):
        if name not in made:
            data = tmp_path_factory.mktemp(name)
            _write(data / 'inside', name, 120)
            _write(data / 'outside', name, 40, broken=True)
            stages = [dict(epochs=12, lr=dict(P1=.003, P2=.001)[name])]
            recipe = tiny_recipe(FAMILY, {**TRAINING, 'training.stages': stages})
            made[name] = data, train(recipe, data=data, out=data / 'run', device='cpu', log=lambda s: None)
        return made[name]
    yield get
    del SOURCES['family']


@pytest.fixture
def outside(family, tmp_path):
    "P2 and its outside world in a place of their own, to be spoilt"
    data, run = family('P2')
    shutil.copytree(run, tmp_path / 'run', ignore=shutil.ignore_patterns('checkpoints', 'external*'))
    shutil.copytree(data / 'outside', tmp_path / 'data/outside')
    return tmp_path / 'data', tmp_path / 'run'


def _on(run, data, **kw):
    usual = dict(root='outside', duplicates='exact', baselines=external_baselines, log=lambda s: None)
    return external_test(run, 'family', data, **dict(usual, **kw))


@pytest.mark.parametrize('name, low, high', [('P1', .8, 1), ('P2', .2, .75)])
def test_a_marker_falls_outside_and_a_lesion_does_not(family, name, low, high):
    data, run = family(name)
    frozen = [run / f for f in ('bundle/weights.safetensors', 'bundle/bundle.json', 'evaluation.json')]
    before = [sha256_file(f) for f in frozen]
    test = _on(run, data, name='outside')
    own = json.loads((run / 'evaluation.json').read_text())['test']['estimates']['auc']['value']
    assert own > .85 and low < test.estimates['auc'].value < high, (own, test)
    assert before == [sha256_file(f) for f in frozen], 'nothing is refitted'
    p = pd.read_csv(run / test.predictions)
    assert test.estimates['auc'].value == pytest.approx(roc_auc_score(p.label == 'pneumonia', p.prob_pneumonia))
    assert (p.predicted == np.where(p.prob_pneumonia >= test.threshold, 'pneumonia', 'normal')).all()
    assert test.threshold == open_frozen(run).predictor.threshold
    assert test.predictions_sha256 == sha256_file(run / test.predictions) and test.table_sha256 == sha256_file(run / test.table)
    assert test.synthetic and describe_external_test(test).startswith(SYNTHETIC_WARNING) and test == read_external_tests(run)[0]
    assert not test.overlap.images and test.n_images == len(p) == sum(test.images_per_class.values())
    assert test.baselines['file'] is not None and .2 < test.baselines['file'].value < .8
    t = external_table(run)
    assert t.kind.tolist() == ['valid', 'test', 'external'] and t.auc[1] == own and 'outside' in format_external_table(t)


def test_one_class_gives_a_share_of_patients(outside):
    data, run = outside
    well, ill = _on(run, data, findings=['No Finding'], name='well'), _on(run, data, findings=['Pneumonia'], name='ill')
    assert set(well.estimates) == {'specificity', 'false_positive_rate'} and set(ill.estimates) == {'recall', 'false_negative_rate'}
    assert well.false_positive_rate == well.estimates['false_positive_rate'] and well.sensitivity is None
    assert ill.false_positive_rate is None
    assert well.one_class and well.classes_present == ['normal'] and well.baselines == dict(file=None, metadata=None)
    p = pd.read_csv(run / well.predictions)
    e = well.false_positive_rate
    assert e.value == pytest.approx((p.predicted == 'pneumonia').mean()) and e.low < e.value < e.high and 'effective patients' in e.note
    both = _on(run, data, name='both')                                    # the same predictions, class by class
    assert both.estimates['false_positive_rate'].value == pytest.approx(e.value)
    assert both.estimates['recall'].value == pytest.approx(ill.sensitivity.value)
    assert [t.name for t in read_external_tests(run)] == ['well', 'ill', 'both']


def test_a_test_is_replaced_and_every_evaluation_is_kept(outside):
    data, run = outside
    first, other, again = _on(run, data, name='a'), _on(run, data, findings=['No Finding'], name='b'), _on(run, data, name='a')
    tests = read_external_tests(run)
    assert [t.name for t in tests] == ['a', 'b'] and tests[0] == again and tests[1] == other
    assert again.to_dict()['estimates'] == first.to_dict()['estimates']
    assert [count_test_evaluations(run, s) for s in ('external: a', 'external: b', 'test')] == [2, 1, 1]
    e = read_test_log(run)[-1]
    assert e.predictions_sha256 == again.predictions_sha256 and e.images == again.n_images and e.threshold == again.threshold


def test_images_of_the_training_split_are_left_out_by_name(outside):
    "The same pixels, an edited copy, the same patient; and a test image, which is kept and told"
    data, run = outside
    clean = _on(run, data, name='clean')
    own = used(read_table(run / 'table.csv')).query('label == "normal"')
    of = {p: own[own.split == p].drop_duplicates('patient') for p in ('train', 'valid', 'test')}
    put = {'P2-1_0.png': of['train'].path.iloc[0], 'P2-3_0.png': of['valid'].path.iloc[0], 'P2-4_0.png': of['test'].path.iloc[0]}
    for name, path in put.items(): shutil.copy(path, data / 'outside/NORMAL' / name)
    edited = Image.open(of['train'].path.iloc[1]).resize((256, 256)).crop((8, 8, 248, 248))
    edited.save(data / 'outside/NORMAL/P2-2_0.jpg', quality=90)
    noise = np.random.default_rng(0).integers(0, 255, (64, 64)).astype(np.uint8)
    who = of['train'].patient.iloc[2].split(':')[1]
    Image.fromarray(noise).save(data / f'outside/NORMAL/{who}_77.png')
    test = _on(run, data, name='mixed', duplicates='near', baselines=None)
    o, t = test.overlap, read_table(run / test.table)
    gone = t[t.excluded.notna()].set_index('image_id')
    planted = {'P2-1_0.png', 'P2-2_0.jpg', 'P2-3_0.png', f'{who}_77.png'}     # phantoms of 64 px are alike: another may pass for a copy
    assert planted <= set(gone.index.str.split('/').str[-1]) and len(gone) <= 16 and set(gone.excluded_step) == {'split'}
    assert o.exact == 2 and o.near >= 1 and o.patient >= 1 and o.with_own_test >= 1
    assert o.images == len(gone) == o.exact + o.near + o.patient
    kind = {i.split('/')[-1]: (p, k) for i, p, k in zip(gone.index, gone.overlap_split, gone.overlap_kind)}
    assert kind['P2-1_0.png'] == ('train', 'exact') and kind['P2-2_0.jpg'] == ('train', 'near')
    assert kind['P2-3_0.png'] == ('valid', 'exact') and kind[f'{who}_77.png'] == ('train', 'patient')
    assert gone.overlap_with['family:NORMAL/P2-1_0.png'] == of['train'].image_id.iloc[0]
    assert test.n_images == clean.n_images + 5 - len(gone) and sum(test.excluded.values()) == len(gone)


def test_a_set_of_training_images_is_refused(outside):
    data, run = outside
    own = used(read_table(run / 'table.csv'))
    with pytest.raises(LeakError, match='that the model was made with, e.g. family:'):
        external_test(run, own[own.split == 'train'], duplicates='exact', log=print)
    alone = external_test(run, own[own.split == 'test'], name='own test', duplicates='exact', log=print)
    assert alone.overlap.with_own_test == alone.n_images and alone.overlap.images == 0        # told, not hidden
    value = json.loads((run / 'evaluation.json').read_text())['test']['estimates']['auc']['value']
    assert alone.estimates['auc'].value == pytest.approx(value, abs=1e-6)


def test_refusals_leave_no_test(outside):
    data, run = outside
    entries = len(read_test_log(run))
    def refused(kind, words, **kw):
        with pytest.raises(kind, match=words): _on(run, data, **kw)
        assert not (run / 'external.json').exists() and len(read_test_log(run)) == entries
    refused(TableError, 'age not recorded', min_age=18)
    refused(TableError, r'view not wanted: PA \(', views=['AP'])
    refused(TableError, 'finding not wanted', findings=['Hernia'])
    (data / 'outside/NORMAL/P2-9_0.png').write_bytes(b'no picture')
    refused(ValueError, 'P2-9_0.png')
    kept = _on(run, data, on_bad='exclude', name='one is broken')
    assert [k for k in kept.excluded if 'unreadable' in k] and sum(kept.excluded.values()) == 1
    b = json.loads((run / 'bundle/bundle.json').read_text())
    write_json(run / 'bundle/bundle.json', dict(b, threshold=b['threshold'] / 2))
    with pytest.raises(ValueError, match='chosen on the validation split; export the run again'): _on(run, data)
    write_json(run / 'run.json', dict(json.loads((run / 'run.json').read_text()), status='training'))
    with pytest.raises(RunError, match='not finished'): _on(run, data)


def test_a_blank_image_is_excluded_as_blank_and_stops_a_test_as_an_unreadable_one_does(outside):
    data, run = outside
    files = [data / f'outside/NORMAL/P2-9_{i}.png' for i in (0, 1)]
    Image.new('L', (96, 96), 255).save(files[0])
    with pytest.raises(ValueError, match='1 of .* images cannot be used: .*P2-9_0.png: it is one even shade.*on_bad'): _on(run, data)
    files[1].write_bytes(b'no picture')
    test = _on(run, data, on_bad='exclude', name='two are bad')
    assert [k.split(':')[0] for k in test.excluded] == ['blank image', 'image unreadable'] and read_external_tests(run) == [test]
    t = read_table(run / test.table)
    told = t['excluded_detail'].dropna()
    assert set(t['excluded_step'].dropna()) == {'files'} and told.str.contains('even shade|no picture format|text').all()


def test_tests_of_an_older_run_are_kept_beside_new_ones(outside):
    "external.json of version 1 under its old names: read, and carried over when another test is made"
    data, run = outside
    first, old = _on(run, data, name='a'), {v: k for k, v in OLD_KEYS['external.json'].items()}
    folder = OLD_FILES['external']
    (run / 'external').rename(run / folder)
    paths = {k: getattr(first, k).replace('external', folder) for k in ('table', 'predictions')}
    moved = dataclasses.replace(first, **paths)
    def renamed(v): return {old.get(k, k): renamed(x) for k, x in v.items()} if isinstance(v, dict) else v
    one = dict(renamed(moved.to_dict()), words='A sentence.', one_class=False, sensitivity=None, false_call_rate=None, classes_present=[])
    write_json(run / OLD_FILES['external.json'], {'format': f'covid_cxr {folder}', 'version': 1, old['tests']: [one]})
    (run / 'external.json').unlink()
    assert read_external_tests(run) == [moved]
    second = _on(run, data, findings=['No Finding'], name='b')
    assert read_external_tests(run) == [moved, second] and (run / second.predictions).is_file() and (run / moved.predictions).is_file()
    assert json.loads((run / 'external.json').read_text())['version'] == 2
    with pytest.raises(RunError, match="'A' is too like 'a', another external test"): _on(run, data, name='A')


def test_runs_are_compared_image_by_image(family, outside, tmp_path):
    "A run against a twin that was spoilt: significant; against a copy with a little noise: not ranked; against another split: refused"
    _, run = outside
    p = pd.read_csv(run / 'predictions.csv')
    def twin(name, prob):
        shutil.copytree(run, tmp_path / name, ignore=shutil.ignore_patterns('bundle', 'cache'))
        t = json.loads((run / 'evaluation.json').read_text())['operating_point']['threshold']
        q = p.assign(prob_normal=1 - prob, prob_pneumonia=prob, predicted=np.where(prob >= t, 'pneumonia', 'normal'))
        q.to_csv(tmp_path / name / 'predictions.csv', index=False)
        return tmp_path / name
    r = np.random.default_rng(0)
    guess, like = twin('guess', r.random(len(p))), twin('like', (p.prob_pneumonia + .02 * r.normal(size=len(p))).clip(0, 1))
    far = compare_runs(run, guess, n_boot=300)
    assert far.ranking == ['run', 'guess'] and read_test_log(run)[-1].what == 'compare'
    assert count_test_evaluations(run) == 2 and count_test_evaluations(guess) == 2
    near = compare_runs(run, like, guess, n_boot=300)
    row = near.pairs.query('metric == "auc" and first == "run" and second == "like"').iloc[0]
    said = list(comparison_sentences(near))
    assert near.ranking is None and not row.significant and row.p_holm >= row.p
    assert any('do not differ significantly' in w and 'patients for 80 % power' in w for w in said), said
    with pytest.raises(RunError, match='the test splits differ'): compare_runs(run, family('P1')[1])


@needs_data
def test_real_images_become_an_external_test(tmp_path):
    """122 adult-and-younger NIH images without a finding, read by the real reader; the model is an untrained one, so only the counts
    mean something"""
    source = 'name = "covid_chestxray"\nroot = "covid-chestxray-dataset"\nsample = 200\n'
    settings = {'task': 'covid_vs_other', 'data.views': ['PA'], 'data.duplicates': 'none', 'image.size': 64}
    run = train(tiny_recipe(source, settings), data=DATA, out=tmp_path / 'run', device='cpu', log=lambda s: None)
    test = external_test(run, 'nih', DATA, root='nih-chest-xrays-512', findings=['No Finding'], min_age=18, duplicates='exact', log=len)
    assert test.name == 'nih-chest-xrays-512 No Finding, age 18 and above' and test.excluded == {'age below 18': 26}
    assert (test.n_images, test.n_groups, test.images_per_class) == (96, 89, dict(other=96, covid=0))
    assert not test.synthetic and test.overlap.images == 0
    assert 0 <= test.false_positive_rate.low <= test.false_positive_rate.value <= test.false_positive_rate.high <= 1
