"""The main job across processes: train, kill, resume, export, predict, refuse."""
import json, math, os, random, re, resource, shutil, signal, subprocess, time
import numpy as np, pandas as pd, pytest
from PIL import Image
from conftest import SMALL, STAGES, cli, here, python, start, tiny_recipe
from covid_cxr.core import RunError, used, write_json
from covid_cxr.recipe import dump_recipe
from covid_cxr.runs.folder import RunFolder


def test_the_demo_says_where_everything_is(phantom_run):
    text = (phantom_run / 'stdout.txt').read_text()
    for what in ('export.pkl', 'predictions.csv', 'plots', 'bundle', 'SYNTHETIC', 'prediction: ', 'source baseline'):
        assert what in text, what
    assert re.search(r'auc [01]\.\d{3} \[[01]\.\d{3}, [01]\.\d{3}\]', text), 'a metric with its interval'
    for name in ('recipe.toml', 'run.json', 'table.csv', 'reconciliation.txt', 'history.csv', 'lr_find.csv', 'predictions.csv',
                 'evaluation.json', 'summary.txt', 'export.pkl', 'bundle/bundle.json', 'bundle/weights.safetensors', 'plots/confusion.png',
                 'plots/roc.png', 'plots/history.png', 'test_log.jsonl'): assert (phantom_run / name).stat().st_size > 0, name


def test_no_patient_is_on_two_sides(phantom_run):
    t = pd.read_csv(phantom_run / 'table.csv', low_memory=False)
    used = t[t.excluded.isna()]
    assert (used.groupby('group').split.nunique() == 1).all() and (used.groupby('patient').split.nunique() == 1).all()
    assert len(used) + t.excluded.notna().sum() == len(t)
    pred = pd.read_csv(phantom_run / 'predictions.csv')
    assert list(pred.columns[:8]) == ['path', 'patient', 'group', 'split', 'label', 'predicted', 'prob_other', 'prob_covid']
    assert sorted(pred.path) == sorted(used.path) and np.allclose(pred.prob_other + pred.prob_covid, 1)


def test_evaluation_json_follows_from_predictions_csv(phantom_run, tmp_path):
    from sklearn.metrics import accuracy_score, roc_auc_score
    e = json.loads((phantom_run / 'evaluation.json').read_text())
    pred = pd.read_csv(phantom_run / 'predictions.csv').query('split == "test"')
    values = e['test']['estimates']
    y = pred.label == 'covid'
    assert values['auc']['value'] == pytest.approx(roc_auc_score(y, pred.prob_covid))
    assert values['accuracy']['value'] == pytest.approx(accuracy_score(y, pred.prob_covid >= e['operating_point']['threshold']))
    assert values['auc']['low'] <= values['auc']['value'] <= values['auc']['high']
    run = shutil.copytree(phantom_run, tmp_path / 'run', ignore=shutil.ignore_patterns('cache', 'data', 'checkpoints'))
    again = here('evaluate', run, '--n-boot', '200')
    assert again.returncode == 0 and f"{values['auc']['value']:.3f}" in again.stdout, again.stderr


def test_fresh_processes_predict_what_the_learner_did(phantom_run, tmp_path):
    "The bundle through the command line, and the pickle through fastai, both in processes of their own"
    pred = pd.read_csv(phantom_run / 'predictions.csv').query('split == "test"').reset_index(drop=True)
    p = cli('predict', phantom_run, *pred.path, '--out', tmp_path / 'out.csv', '--ood', 'off')
    assert p.returncode == 0, p.stderr
    got = pd.read_csv(tmp_path / 'out.csv')
    assert list(got.path) == list(pred.path) and list(got.predicted) == list(pred.predicted)
    assert (got[['prob_other', 'prob_covid']] - pred[['prob_other', 'prob_covid']]).abs().max().max() < 1e-5
    (tmp_path / 'paths.json').write_text(json.dumps(list(pred.path)))
    python('import json, sys, warnings\nwarnings.simplefilter("ignore")\nimport numpy as np\nfrom fastai.learner import load_learner\n'
           'learn = load_learner(sys.argv[1])\npaths = json.load(open(sys.argv[2]))\n'
           'with learn.no_bar(): probs, _ = learn.get_preds(dl=learn.dls.test_dl(paths))\nnp.save(sys.argv[3], probs.numpy())\n'
           'with learn.no_bar(): label, _, one = learn.predict(paths[0])\n'
           'assert str(label) in learn.dls.vocab and abs(float(one[1] - probs[0][1])) < 1e-5',
           phantom_run / 'export.pkl', tmp_path / 'paths.json', tmp_path / 'probs.npy')
    assert np.abs(np.load(tmp_path / 'probs.npy') - pred[['prob_other', 'prob_covid']].to_numpy()).max() < 1e-5


def test_one_file_many_files_and_a_folder_agree(phantom_run, tmp_path):
    from covid_cxr.predict import load_predictor
    files = pd.read_csv(phantom_run / 'predictions.csv').path[:5]
    for i, f in enumerate(files): shutil.copy(f, tmp_path / f'{i}{os.path.splitext(f)[1]}')
    predictor = load_predictor(phantom_run)
    folder = predictor.predict(tmp_path, bs=2)
    assert [os.path.basename(p.path)[0] for p in folder] == list('01234')
    for one, p in zip(files, folder): assert predictor.predict(one).probabilities == pytest.approx(p.probabilities, abs=1e-5)


def _train(out): return start('train', 'demo', '--out', out, *SMALL, *STAGES, said=out.with_suffix('.said'))


def test_a_killed_run_ends_like_an_undisturbed_one(phantom_run, tmp_path):
    "SIGKILL while preparing, after the first epoch, at a random moment, and at the end; then let it finish"
    out, chance, kills = tmp_path / 'run', random.Random(5), 0
    kept = out / 'checkpoints/history.csv'
    moments = [lambda: (out / 'run.json').exists(), lambda: (out / 'checkpoints/last.pt').exists(),
               lambda: kept.exists() and len(pd.read_csv(kept)) >= 2, lambda: (out / 'predictions.csv').exists()]
    for reached in moments:
        p, end = _train(out), time.time() + 120
        while p.is_alive() and not reached() and time.time() < end: time.sleep(.02)
        time.sleep(chance.random() * .5)
        p.kill()
        p.join()
        kills += p.exitcode == -signal.SIGKILL
    assert kills >= 3
    p = _train(out)
    p.join()
    assert p.exitcode == 0, out.with_suffix('.said').read_text()[-2000:]
    assert not [f for f in out.rglob('.*') if f.name != '.lock' and 'cache' not in f.parts], 'half-written files are left'
    a, b = (pd.read_csv(f / 'history.csv').drop(columns='seconds') for f in (phantom_run, out))
    pd.testing.assert_frame_equal(a, b, check_exact=True)
    a, b = (pd.read_csv(f / 'predictions.csv').filter(like='prob_') for f in (phantom_run, out))
    pd.testing.assert_frame_equal(a, b, check_exact=True)


def test_two_processes_do_not_share_a_folder(tmp_path):
    first, end = _train(tmp_path / 'run'), time.time() + 60
    try:
        while not (tmp_path / 'run' / '.lock').exists() and time.time() < end: time.sleep(.05)
        time.sleep(.3)
        second = here('train', 'demo', '--out', tmp_path / 'run', *SMALL, *STAGES)
        assert second.returncode == 1 and 'another process is working' in second.stderr
    finally:
        first.kill()
        first.join()


HEADER = 'patientid,finding,view,modality,filename,folder\n'


def _tree(tmp_path, text, **files):
    root = tmp_path / 'data' / 'covid-chestxray-dataset'
    (root / 'images').mkdir(parents=True)
    (root / 'metadata.csv').write_text(text)
    for name, content in files.items(): (root / 'images' / name.replace('_', '.')).write_bytes(content)
    return tmp_path / 'data'


COVID_TREE = 'name = "covid_chestxray"\nroot = "covid-chestxray-dataset"\n'


def _recipe(tmp_path, source=COVID_TREE, **settings):
    "A recipe file"
    usual = {'task': 'covid_vs_other', 'data.duplicates': 'none', 'image.size': 64, 'model.arch': 'resnet18', 'training.bs': 2}
    f = tmp_path / 'mine.toml'
    f.write_text(dump_recipe(tiny_recipe(source, {**usual, **settings})))
    return f


def _png(seed=0):
    import io
    from PIL import Image
    from covid_cxr.phantom import make_phantom
    b = io.BytesIO()
    Image.fromarray(make_phantom(seed=seed, size=64).image).save(b, 'png')
    return b.getvalue()


def _many(bad=None):
    "A CSV and its pictures, ten patients, one of the files replaced"
    files = {f'f{i}_png': _png(i) for i in range(10)}
    if bad is not None: files['f3_png'] = bad
    rows = ''.join(f"{i},{'COVID-19' if i % 2 else 'No Finding'},PA,X-ray,f{i}.png,images\n" for i in range(10))
    return HEADER + rows, files


def _refused(p, *words, out=None):
    assert p.returncode == 1, (p.returncode, p.stdout, p.stderr[-1500:])
    lines = [l for l in p.stderr.strip().splitlines() if l.startswith('covid-cxr: ')]
    assert len(lines) == 1 and 'Traceback' not in p.stderr, p.stderr[-1500:]
    for w in words: assert w in lines[0], (w, lines[0])
    if out is not None: assert not out.exists(), f'{out} was left behind: {sorted(out.rglob("*"))[:5]}'


def test_refusals_before_training_leave_nothing_behind(tmp_path):
    out, good = tmp_path / 'out', _recipe(tmp_path)
    def run(recipe, data, *more): return here('train', recipe, '--data', data, '--out', out, *more)
    _refused(run('covid-2020', tmp_path / 'nowhere', '--weights', 'none'), 'nowhere', out=out)
    _refused(run(good, _tree(tmp_path / 'a', 'patientid,wrong\n1,2\n')), 'finding', out=out)
    _refused(run(good, _tree(tmp_path / 'b', HEADER + '1,Covd,PA,X-ray,a.png,images\n', a_png=_png())), "'Covd' (1)", out=out)
    alike = HEADER + '1,COVID-19,PA,X-ray,a.png,images\n2,COVID-19,PA,X-ray,b.png,images\n'
    _refused(run(good, _tree(tmp_path / 'c', alike, a_png=_png(), b_png=_png(1))), 'other', out=out)
    text, files = _many(bad=_png()[:200])
    _refused(run(good, _tree(tmp_path / 'd', text, **files)), 'f3.png', out=out)
    bad = tmp_path / 'bad.toml'
    bad.write_text(good.read_text().replace('[training]\n', '[training]\nepoch = 3\n'))
    _refused(run(bad, tmp_path), 'training.epoch', out=out)
    _refused(run('covid-2020', tmp_path, '--set', 'image.sise=3'), "did you mean 'size'", out=out)
    _refused(run(tmp_path / 'missing.toml', tmp_path), 'missing.toml', out=out)


def test_weights_that_cannot_be_had_name_the_file_and_the_place(tmp_path, monkeypatch):
    "ImageNet weights without a network: which file, where to put it, and how to do without"
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    for k in ('http_proxy', 'https_proxy'): monkeypatch.setenv(k, 'http://127.0.0.1:9')
    p = here('train', 'covid-2020', '--data', tmp_path, '--out', tmp_path / 'out')
    _refused(p, 'resnet50-11ad3fa6.pth', str(tmp_path / 'torch'), "weights='none'", out=tmp_path / 'out')


def test_an_output_folder_that_cannot_be_written(tmp_path):
    text, files = _many()
    data, recipe = _tree(tmp_path, text, **files), _recipe(tmp_path)
    (tmp_path / 'file').write_text('')
    _refused(here('train', recipe, '--data', data, '--out', tmp_path / 'file' / 'out'), 'cannot write')
    _refused(here('train', recipe, '--data', data, '--out', tmp_path / 'file'), 'is a file')
    if os.geteuid():                                                    # the superuser may write everywhere
        (tmp_path / 'ro').mkdir(mode=0o555)
        _refused(here('train', recipe, '--data', data, '--out', tmp_path / 'ro' / 'out'), 'cannot write')


def _small_disk():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))


def test_a_disk_that_fills_up(tmp_path):
    "No file may grow beyond 2 MB: the first checkpoint cannot be written; what is there stays whole"
    text, files = _many()
    data, recipe, out, said = _tree(tmp_path, text, **files), _recipe(tmp_path), tmp_path / 'out', tmp_path / 'said'
    p = start('train', recipe, '--data', data, '--out', out, said=said, prepare=_small_disk)
    p.join()
    _refused(subprocess.CompletedProcess((), p.exitcode, '', said.read_text()), 'cannot write')
    assert not list(out.rglob('*.pt')) and not (out / 'predictions.csv').exists() and not (out / 'bundle').exists()
    p = here('train', recipe, '--data', data, '--out', out)               # with room again, the same command goes on
    assert p.returncode == 0, p.stderr[-2000:]


def test_predict_refuses_by_name(phantom_run, tmp_path):
    (tmp_path / 'bad.png').write_bytes(b'no picture')
    good = phantom_run / 'new-image.png'
    one_by_one = here('predict', phantom_run, good, tmp_path / 'bad.png', '--out', tmp_path / 'o.csv', '--bs', 1)
    _refused(one_by_one, 'bad.png', out=tmp_path / 'o.csv')
    _refused(here('predict', tmp_path, good), 'no bundle')
    _refused(here('predict', phantom_run, tmp_path / 'missing.png'), 'missing.png')
    _refused(here('predict', phantom_run, good, '--out', tmp_path / 'bad.png' / 'o.csv'), 'cannot write')
    p = here('predict', phantom_run, good, tmp_path / 'bad.png', '--out', tmp_path / 'o.csv', '--on-bad', 'decline')
    assert p.returncode == 3 and pd.read_csv(tmp_path / 'o.csv').declined.notna().tolist() == [False, True]     # some were declined
    assert '1 answer stood there already' in p.stderr and not list(tmp_path.glob('o.csv.*'))


def test_an_exported_bundle_stands_alone(phantom_run, tmp_path):
    assert here('export', phantom_run, '--out', tmp_path / 'model').returncode == 0
    assert sorted(p.name for p in (tmp_path / 'model').iterdir()) == ['bundle.json', 'manifest.json', 'model.onnx', 'weights.safetensors']
    p = here('predict', tmp_path / 'model', phantom_run / 'new-image.png')
    assert p.returncode == 0 and 'covid' in p.stdout and 'SYNTHETIC' in p.stderr and 'Not a medical device' in p.stderr
    _refused(here('export', phantom_run, '--out', tmp_path / 'model'), 'exists already')


def test_version_and_usage():
    import covid_cxr
    assert cli('--version').stdout.strip() == f'covid-cxr {covid_cxr.__version__}'
    assert cli('trane').returncode == 2


@pytest.mark.parametrize('name, damage, word', [
    ('best.pt', lambda raw: raw[:len(raw) // 2], 'best.pt is not the file that was written'), ('best.pt', None, 'best.pt.* is missing'),
    ('best.pt', lambda raw: raw[:4000] + bytes([raw[4000] ^ 255]) + raw[4001:], 'best.pt is not the file that was written'),
    ('last.pt', lambda raw: raw[:len(raw) // 2], 'last.pt is damaged'), ('last.pt', lambda raw: b'', 'last.pt is damaged')])
def test_damaged_checkpoints_are_named(phantom_run, tmp_path, name, damage, word):
    from covid_cxr.runs.train import train
    run = shutil.copytree(phantom_run, tmp_path / 'run', ignore=shutil.ignore_patterns('cache', 'data', 'plots'))
    state = json.loads((run / 'run.json').read_text())
    write_json(run / 'run.json', dict(state, status='training'))
    file = run / 'checkpoints' / name
    if damage is None: file.unlink()
    else: file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(RunError, match=word): train(str(run / 'recipe.toml'), out=run, device='cpu', log=len)


def test_weights_that_blow_up_in_the_last_step(tmp_path):
    "The training loss was still a number, the validation loss is not: the sentence that a NaN training loss gets"
    import torch
    from covid_cxr.learner import auc_score
    assert math.isnan(auc_score(torch.tensor([[float('nan'), 1.], [.5, .5]]), torch.tensor([0, 1])))
    for c in ('COVID', 'Normal'):
        folder = tmp_path / 'data/images' / c
        folder.mkdir(parents=True)
        for i in range(24):
            pixels = np.random.default_rng(i + 99 * (c == 'COVID')).integers(0, 255, (48, 48), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f'{i}.png')
    noise = {'image.size': 32, 'model.arch': 'cnn3', 'split.valid_pct': .25, 'split.test_pct': .25, 'training.bs': 8,
             'training.opt': 'sgd', 'training.stages': '[{epochs = 1, lr = 9.9}]'}
    recipe = _recipe(tmp_path, 'name = "folder"\nroot = ["images"]\n', **noise)
    p = here('train', recipe, '--data', tmp_path / 'data', '--out', tmp_path / 'run', '--device', 'cpu')
    _refused(p, 'no longer a number')


def _noise_images(folder, seed):
    "84 images of noise of each class, as a folder per class that tells no patients"
    for c in ('NORMAL', 'COVID'):
        (folder / c).mkdir(parents=True)
        for i in range(84):
            pixels = np.random.default_rng((seed, i, c == 'COVID')).integers(0, 200 + 55 * (c == 'COVID'), (48, 48), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / c / f'{i}.png')


def test_nothing_is_said_of_patients_that_are_not_recorded(tmp_path):
    "Training, evaluation, comparison and external test of images without patient ids"
    for seed, name in enumerate(('inside', 'outside')): _noise_images(tmp_path / 'data' / name, seed)
    tiny = {'image.size': 32, 'model.arch': 'cnn3', 'split.valid_pct': .25, 'split.test_pct': .25, 'training.bs': 8}
    recipe = _recipe(tmp_path, 'name = "folder"\nroot = ["inside"]\n', **tiny)
    run, twin, data = tmp_path / 'run', tmp_path / 'twin', tmp_path / 'data'
    p = here('train', recipe, '--data', data, '--out', run, '--device', 'cpu')
    assert p.returncode == 0, p.stderr[-2000:]
    assert 'the patient of 168 used images is not known, so a person may be on both sides' in p.stdout
    shutil.copytree(run, twin)
    external = ['external', run, 'folder', '--data', data, '--root', 'outside', '--duplicates', 'exact']
    for words in (['evaluate', run, '--n-boot', 100], ['compare', run, twin, '--n-boot', 100], external):
        p = here(*words)
        assert p.returncode == 0 and 'is not recorded' in p.stdout, (p.stdout, p.stderr[-2000:])
        assert not re.search(r'(of|over|these) (\d+ )?patients|patients needed|patients for 80', p.stdout), p.stdout


def test_a_run_on_phantoms_is_found_from_any_folder(phantom_run, tmp_path, monkeypatch):
    paths = RunFolder.open(phantom_run).table['path'].dropna()
    assert all(map(os.path.isabs, paths))
    monkeypatch.chdir(tmp_path)
    short = ['--size', 32, '--arch', 'cnn3', '--set', 'training.stages=[{epochs = 1, lr = 0.001}]']
    p = here('demo', '--no-audit', '--out', 'demo', *SMALL, *short)
    monkeypatch.undo()
    assert p.returncode == 0, p.stderr[-2000:]
    found = RunFolder.open(tmp_path / 'demo')
    assert used(found.table)['path'].map(os.path.isfile).all() and found.integrity.status == 'verified'
