"""A run of several findings, from the command line to the report: one tiny run on phantoms, shared by all tests."""
import json, shutil, signal, time
import numpy as np, pandas as pd, pytest
from conftest import DATA, ROOT, build_once, here, needs_data, python, start
from covid_cxr.audit.baselines import WITHOUT_BOX, WITHOUT_MASKS
from covid_cxr.audit.findings import read_findings_audit
from covid_cxr.bundle import FORMAT_VERSION, read_bundle
from covid_cxr.core import RunError, used
from covid_cxr.findings.labels import LEAST_PATIENTS, NIH_FINDINGS
from covid_cxr.model.lungs import save_lung_net, train_lung_net
from covid_cxr.phantom import phantom_family
from covid_cxr.predict import load_predictor
from covid_cxr.recipe import load_recipe, override, recipe_hash
from covid_cxr.runs.folder import FindingsRun, RunFolder, open_run

FINDINGS = ['Effusion', 'Infiltration']
TINY = ['nih-findings', '--set', 'data.phantom_patients=80', '--set', f'task.findings={json.dumps(FINDINGS)}', '--size', '32', '--arch',
        'cnn3', '--weights', 'none', '--set', 'model.head=concat', '--set', 'training.stages=[{epochs = 3, lr = 0.003}]', '--set',
        'evaluation.n_boot=200', '--device', 'cpu', '--seed', '3']


def make_findings_run(out):
    p = here('train', *TINY, '--out', out)
    assert p.returncode == 0, p.stderr[-2000:]
    (out.parent / 'findings-said.txt').write_text(p.stdout)
    p = here('audit', out, '--n-boot', '200')
    assert p.returncode == 0, p.stderr[-2000:]
    (out.parent / 'findings-audit-said.txt').write_text(p.stdout)


@pytest.fixture(scope='session')
def run(shared_folder):
    "One finished and audited run of two findings for all workers. Copy it before you write to it."
    return build_once(shared_folder / 'findings-run', make_findings_run)


@pytest.fixture
def copied(run, tmp_path): return shutil.copytree(run, tmp_path / 'run')


def test_a_run_directory_as_any_other(run):
    found = open_run(run)
    assert isinstance(found, FindingsRun) and found.synthetic and found.integrity.status == 'verified'
    of_each = [start + f for start in ('label_', 'prob_', 'predicted_') for f in FINDINGS]
    p = found.predictions
    assert list(p) == ['path', 'patient', 'group', 'split', *of_each, 'image_id', 'source'] and len(p) == len(used(found.table))
    assert {f'label_{f}' for f in FINDINGS} <= set(found.table) and (p.groupby('group').split.nunique() == 1).all()
    for f, at in found.thresholds.items(): assert (p[f'predicted_{f}'] == (p[f'prob_{f}'] >= at)).all()
    files = 'history.csv', 'manifest.json', 'summary.txt', 'test_log.jsonl', 'report.html', 'model-card.md', 'export.pkl', 'audit.txt'
    for name in files: assert (run / name).is_file(), name
    assert found.evaluate('test', 200) == found.result


def test_what_the_terminal_says(run):
    said = (run.parent / 'findings-said.txt').read_text()
    e = open_run(run).result
    assert f'mean of {len(e.estimable)}' in said and 'one for each finding' in said and 'SYNTHETIC' in said
    assert 'Images with each finding' in said
    for f, why in e.left_out.items(): assert f'{f}: {why}' in said
    assert e.left_out, 'the split is such that one finding is NOT ESTIMABLE'
    again = here('evaluate', run, '--n-boot', '200')
    assert again.returncode == 0 and 'NOT ESTIMABLE' in again.stdout and str(e['Effusion']['auc']) in again.stdout


def test_the_bundle_holds_a_threshold_for_each(run):
    b = read_bundle(run)
    assert (b['activation'], b['classes'], b['version'], len(b['threshold'])) == ('sigmoid', FINDINGS, FORMAT_VERSION, 2)
    assert {f: t for f, t in zip(FINDINGS, b['threshold']) if t is not None} == open_run(run).thresholds


def test_a_fresh_process_predicts_the_same(run, tmp_path):
    rows = open_run(run).evaluated.head(6)
    said = json.loads(python('import sys, json\nfrom covid_cxr.predict import load_predictor\np = load_predictor(sys.argv[1])\n'
                             'print(json.dumps([[x.probabilities, x.labels] for x in p.predict(sys.argv[2:], ood="off")]))',
                             run, *rows['path']))
    for (probs, labels), row in zip(said, rows.to_dict('records')):
        assert list(probs) == FINDINGS
        for f in FINDINGS:
            assert abs(probs[f] - row[f'prob_{f}']) < 1e-4
            assert (f in labels) == (row[f'predicted_{f}'] == 1)
    p = here('predict', run, *rows['path'], '--ood', 'warn', '--out', tmp_path / 'out.csv')
    csv = pd.read_csv(tmp_path / 'out.csv')
    of_each = [start + f for start in ('prob_', 'predicted_') for f in FINDINGS]
    assert p.returncode == 0 and list(csv)[:6] == ['path', *of_each, 'declined']
    assert 'Effusion' in p.stdout and csv['predicted_Effusion'].tolist() == rows['predicted_Effusion'].tolist()


def test_an_exported_bundle_stands_alone(run, tmp_path):
    assert here('export', run, '--out', tmp_path / 'model').returncode == 0
    image = open_run(run).evaluated['path'][0]
    first, second = (load_predictor(f, backend='torch').predict(image, ood='off') for f in (run, tmp_path / 'model'))
    assert first == second and first.probabilities.keys() == set(FINDINGS)
    light = load_predictor(tmp_path / 'model')
    third = light.predict(image, ood='off')
    assert light.backend == 'onnx' and third.labels == first.labels and third.probabilities == pytest.approx(first.probabilities, abs=1e-5)


def test_the_audit_is_written_and_read_back(run):
    audit = read_findings_audit(open_run(run))
    said = (run.parent / 'findings-audit-said.txt').read_text()
    assert set(audit.findings) == set(open_run(run).result.estimable) and audit.left_out == open_run(run).result.left_out
    assert {'A1', 'A2', 'A3', 'A5', 'A12', 'A13', 'A14', 'A20'} <= {v.check for v in audit.verdicts}
    assert {v.check for v in audit.verdicts if v.verdict == 'FAIL'} <= {'A4', 'A12', 'A14', 'A16'}       # no leak, no stale number
    assert any(n.missing == 'several findings' and n.check == 'A6' for n in audit.not_run)
    assert 'NOT ESTIMABLE  Infiltration' in said and 'mean AUC of 1 of 2 findings' in said
    text = (run / 'report.html').read_text()
    for word in ('Findings with an AUC gain', 'Finding by finding', 'NOT ESTIMABLE', 'is asked of one finding at a time', 'CLAIM 2024'):
        assert word in text, word


def test_an_audit_with_found_lungs_names_them_in_every_finding(copied, tmp_path):
    x = phantom_family('P1', 12, (1, 1), size=32, seed=2)
    net = train_lung_net(x.images, x.lungs, size=32, epochs=3, bs=4, weights='none')
    p = here('audit', copied, '--n-boot', '100', '--lungs', save_lung_net(net, tmp_path / 'net'))
    assert p.returncode == 0, p.stderr[-2000:]
    audit, where = read_findings_audit(open_run(copied)), f'the fixed lung box; lungs found by {net.name}'
    assert audit.whole.lungs_from.startswith(where) and ' '.join(p.stdout.split()).count(f'Where the lungs are: {where}') == 1
    assert f'Where the lungs are: {where}' in (copied / 'report.html').read_text()
    for found in audit.findings.values():
        masks = {v.name: v.facts.get('mask', '') for v in found.verdicts if v.check == 'A5'}
        assert masks[WITHOUT_BOX] == 'lung box' and masks[WITHOUT_MASKS].startswith(f'one region from lungs found by {net.name}')
        assert masks['network trained on the lungs alone'].startswith(f'lungs found by {net.name}')
    assert not [n for n in audit.not_run if n.title == 'lungs alone']


def test_a_killed_run_ends_like_an_undisturbed_one(run, tmp_path):
    out = tmp_path / 'run'
    p, end = start('train', *TINY, '--out', out, said=tmp_path / 'said'), time.time() + 120
    while p.is_alive() and not (out / 'checkpoints/last.pt').exists() and time.time() < end: time.sleep(.01)
    p.kill()
    p.join()
    assert here('train', *TINY, '--out', out).returncode == 0
    a, b = (open_run(f).predictions[[f'prob_{f}' for f in FINDINGS]].to_numpy() for f in (run, out))
    np.testing.assert_array_equal(a, b)
    assert p.exitcode in (0, -signal.SIGKILL) and open_run(out).integrity.status == 'verified'


@pytest.mark.parametrize('args', [('compare', 'RUN', 'COPY'), ('external', 'RUN', 'nih', '--data', str(DATA))])
def test_what_needs_one_class_per_image_refuses(run, copied, args):
    p = here(*({'RUN': run, 'COPY': copied}.get(a, a) for a in args))
    assert p.returncode == 1 and 'asks for several findings' in p.stderr and 'Traceback' not in p.stderr
    with pytest.raises(RunError, match='asks for several findings'): RunFolder.open(run)


@pytest.mark.parametrize('args, word', [
    (('--set', 'training.imbalance=oversample'), 'is for one class per image'),
    (('--set', 'task.findings=["Effusion"]'), 'name two or more'),
    (('--set', 'task.findings=["Effusion", "Mass"]'), 'no image with Mass'), (('--positive', 'Effusion'), 'is for your own images'),
    (('--set', 'task.kind=finding'), 'task.kind')])
def test_a_question_that_cannot_be_asked_is_one_sentence(args, word, tmp_path):
    p = here('train', *TINY, *args, '--out', tmp_path / 'x')
    assert p.returncode == 1 and word in p.stderr and 'Traceback' not in p.stderr, p.stderr


def test_an_old_recipe_has_its_hash():
    "Recipes of one class per image know nothing of findings"
    assert not load_recipe('demo').several and 'findings' not in str(load_recipe('covid-2020').task)
    assert recipe_hash(load_recipe('nih-findings')) != recipe_hash(override(load_recipe('nih-findings'), {'task.uncertain': 'positive'}))


# your own table

@pytest.fixture(scope='module')
def own(tmp_path_factory):
    "A folder of images and a CSV with columns of 1, 0 and blank"
    from covid_cxr.phantom import write_nih_tree
    root = tmp_path_factory.mktemp('own')
    rows = pd.DataFrame(write_nih_tree(root, n_patients=50, size=64, seed=2).rows)
    t = pd.DataFrame(dict(file='images/' + rows['file'], who=rows['patient'],
                          Effusion=rows['labels'].str.contains('Effusion').astype(int),
                          Doubt=rows['labels'].str.contains('Infiltration').astype(int).astype(object)))
    t.loc[::5, 'Doubt'], t.loc[3, 'Doubt'] = '', -1
    t.to_csv(root / 'labels.csv', index=False)
    return root


def _own(own, *more, labels='Effusion,Doubt'):
    return here('train', '--table', own / 'labels.csv', '--path-column', 'file', '--patient-column', 'who', '--label-columns', labels,
                '--size', '32', '--arch', 'cnn3', '--weights', 'none', '--set', 'model.head=concat', '--set',
                'training.stages=[{epochs = 1, lr = 0.003}]', '--set', 'evaluation.n_boot=100', '--device', 'cpu', *more)


def test_columns_of_a_table_train(own, tmp_path):
    p = _own(own, '--out', tmp_path / 'run')
    assert p.returncode == 0, p.stderr[-2000:]
    run = open_run(tmp_path / 'run')
    table = pd.read_csv(own / 'labels.csv')
    assert run.classes == ('Effusion', 'Doubt') and run.recipe.training.imbalance == 'none'
    unknown = int(pd.to_numeric(table['Doubt'], errors='coerce').replace(-1, np.nan).isna().sum())
    assert f"'Effusion' {int(table['Effusion'].sum())} of {len(table)}" in p.stdout and f'of {len(table) - unknown}' in p.stdout
    assert int(run.predictions['label_Doubt'].isna().sum()) == unknown and 'next: covid-cxr predict' in p.stdout
    assert (run.predictions.groupby('patient').split.nunique() == 1).all()


@pytest.mark.parametrize('more, labels, word', [
    ((), 'Effusion,Edema', '--label-columns Edema'), ((), 'Effusion', 'name two or more'), ((), 'who,Effusion', 'write 1 (present)'),
    (('--label-column', 'Effusion'), 'Effusion,Doubt', 'give one'), (('--positive', 'Effusion'), 'Effusion,Doubt', 'one class per image'),
    (('--set', 'training.mixup=0.2'), 'Effusion,Doubt', 'training.mixup')])
def test_columns_that_cannot_be_used_are_named(own, more, labels, word, tmp_path):
    p = _own(own, *more, '--out', tmp_path / 'x', labels=labels)
    assert p.returncode == 1 and word in p.stderr and 'Traceback' not in p.stderr, p.stderr
    assert here('train', '--label-columns', 'A,B').stderr.count('\n') == 1


def test_columns_are_inspected(own):
    p = here('inspect', '--table', own / 'labels.csv', '--path-column', 'file', '--patient-column', 'who', '--label-columns',
             'Effusion,Doubt')
    assert p.returncode == 0, p.stderr[-1000:]


# real data

def test_the_kept_run_of_nih():
    "benchmarks/nih_findings.py: fourteen findings, each with numbers or with the reason why there are none"
    kept = json.loads((ROOT / 'benchmarks' / 'results' / 'nih_findings.json').read_text())
    assert [r['finding'] for r in kept['findings']] == list(NIH_FINDINGS)
    assert kept['recipe_hash'] == recipe_hash(load_recipe('nih-findings'))
    told = [r for r in kept['findings'] if not r['reason']]
    for r in kept['findings']:
        assert r['positive'] + r['negative'] + r['unknown'] == kept['images']['test']
        assert ('auc' in r) == (not r['reason']) == (min(r['positive_patients'], r['negative_patients']) >= LEAST_PATIENTS)
    assert kept['mean']['auc']['value'] == pytest.approx(np.mean([r['auc']['value'] for r in told]))
    for r in told: assert (r['outcome'] == 'better') <= (r['gain']['low'] > 0)


@needs_data
def test_some_of_nih(tmp_path):
    from covid_cxr.runs.train import train
    recipe = override(load_recipe('nih-findings'), {
        'data.sources.nih.sample': 260, 'task.findings': ['Pneumonia', 'Infiltration', 'Atelectasis', 'Fibrosis'], 'image.size': 32,
        'model.arch': 'cnn3', 'model.weights': 'none', 'model.head': 'concat', 'training.stages': [dict(epochs=1, lr=.003)],
        'evaluation.n_boot': 100, 'data.duplicates': 'exact'})
    run = open_run(train(recipe, data=DATA, out=tmp_path / 'run', device='cpu', figures=False, log=lambda text: None))
    assert 'Pneumonia' in run.result.estimable and 'patients with it' in run.result['Fibrosis'].reason and not run.synthetic
