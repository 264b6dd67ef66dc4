"""benchmarks/gpu_articles.py in tiny form: phantoms, 32 px, one epoch, a budget that leaves something out, and what comes back from it."""
import json, re, sys, tarfile, time
from concurrent.futures import ThreadPoolExecutor
import pytest
from conftest import ROOT
from covid_cxr.articles.reported import EXTERNAL_TESTS
from covid_cxr.core import used
from covid_cxr.recipe import build_table
from covid_cxr.runs.folder import RunFolder
sys.path.insert(0, str(ROOT / 'benchmarks'))
import gpu_articles as gpu  # noqa: E402

DONE = ['children', 'covid-2020-random-seed42', 'covid-2020-in-domain-seed42']
ARM = 'pneumonia-resnet-random-seed42'
OUTSIDE = (dict(source='nih', root='nih-chest-xrays', findings=['No Finding'], name='adults without finding'),)
LEFT_OUT = 'published-test-lite2-seed42'


def _main(work, *more):
    few = ['--jobs', '1', '--workers', '0', '--seeds', '1', '--published', '1', '--audit', ARM]
    gpu.main(['--tiny', '--work', str(work), '--out', str(work / 'out'), *few, *more])


@pytest.fixture(scope='module')
def tried(tmp_path_factory):
    "The script once, within a budget that the published test would not keep; the children are measured, the others are given"
    work, measured, real = tmp_path_factory.mktemp('gpu'), [], gpu.measure    # two arms come last, in two folds each

    def measure(job, place):
        measured.append(real(job, place) if job.kind == gpu.CHILDREN else dict(seconds=90_000. if job.kind == gpu.PUBLISHED else 1.))
        return measured[-1]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(gpu, 'measure', measure)
        m.setitem(EXTERNAL_TESTS, 'pneumonia-resnet', OUTSIDE)           # phantoms of NIH are adults
        _main(work, '--minutes', '60', '--arms', '--only', *DONE, LEFT_OUT, 'pneumonia-resnet-random-*')
    return work, json.loads((work / 'out/summary.json').read_text())


def test_what_fits_is_trained_and_what_does_not_is_said(tried):
    work, found = tried
    assert [r['name'] for r in found['runs']] == [*DONE, ARM] and found['failed'] == [] and found['tiny'] is True
    assert [r['name'] for r in found['left_out']] == [LEFT_OUT]
    assert re.match(r'it needs about 1500.0 minutes, (5\d|60)\.\d were left', found['left_out'][0]['why']) and found['minutes_used'] < 60
    assert {r['started_from'] for r in found['runs'][:2]} == {'none'} and found['runs'][2]['started_from'] not in ('none', 'imagenet')
    assert all(r['epochs'] == 1 and r['device'] == 'cpu' for r in found['runs'])
    assert [r['test_evaluations'] for r in found['runs']] == [1, 1, 1, 2]            # the arm was audited too
    assert [a['arm'] for a in found['arms']] == ['children', 'covid-2020-random', 'covid-2020-in-domain', ARM.removesuffix('-seed42')]
    assert found['arms'][1]['auc'] == found['runs'][1]['auc']['value'] and found['estimates']['children']['seconds_per_image'] > 0
    assert not (work / 'runs' / LEFT_OUT).exists()


def test_the_in_domain_stage_has_seen_no_image_of_the_flagship(tried):
    tables = {name: used(RunFolder.open(tried[0] / 'runs' / name).table) for name in DONE}
    assert set(tables['children']['label']) == {'bacterial', 'viral'}
    assert not set(tables['children']['image_id']) & set(tables['covid-2020-in-domain-seed42']['image_id'])
    split = lambda name: tables[name].set_index('image_id')['split'].to_dict()
    assert split('covid-2020-random-seed42') == split('covid-2020-in-domain-seed42')        # the arms differ in their start alone


def test_the_runs_come_back_without_weights_and_can_be_read(tried, tmp_path):
    for file in (tried[0] / 'out').glob('runs-*.tar'):
        with tarfile.open(file) as tar: tar.extractall(tmp_path, filter='data')
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted(f"{r['name']}.tar.xz" for r in tried[1]['runs'])
    for file in tmp_path.glob('*.tar.xz'):
        with tarfile.open(file) as tar:
            assert not [n for n in tar.getnames() if n.endswith(('.pkl', '.safetensors', '.onnx', '.png', '.pt'))]
            tar.extractall(tmp_path, filter='data')
    for r in tried[1]['runs']:
        run = RunFolder.open(tmp_path / 'runs' / r['name'])
        assert run.result.estimates['auc'].value == r['auc']['value'] and len(run.predictions) == len(used(run.table))


def test_archives_are_as_large_as_may_go_back(tried, tmp_path, monkeypatch):
    place, jobs = gpu.Place(tried[0] / 'data', tried[0], tiny=True), [gpu.Job(name, name, 42) for name in [*DONE, ARM]]
    monkeypatch.setattr(gpu, 'ARCHIVE', 1.5 * max(place.run(f'{j.name}.tar.xz').stat().st_size for j in jobs))
    gpu.pack_runs(place, jobs, tmp_path)
    names = []
    for file in sorted(tmp_path.glob('runs-*.tar')):
        with tarfile.open(file) as tar: names.append(tar.getnames())
    assert sum(names, []) == [f'{j.name}.tar.xz' for j in jobs] and len(names) > 1


def test_an_arm_is_audited_and_tested_outside_after_its_training(tried):
    run = RunFolder.open(tried[0] / 'runs' / ARM)
    assert run.file('audit.json').exists() and not json.loads(run.file('audit.json').read_text())['quick']
    assert [t['name'] for t in run.external_json['tests']] == [OUTSIDE[0]['name']]
    others = [RunFolder.open(tried[0] / 'runs' / n) for n in DONE]
    assert [r.file('bundle').exists() for r in others] == [True, False, False]       # weights are kept where others start from them


def test_started_again_nothing_is_trained_twice(tried, monkeypatch):
    work, found = tried
    before = {n: (work / 'runs' / n / 'run.json').stat().st_mtime_ns for n in DONE}
    monkeypatch.setattr(gpu, 'measure', lambda job, place: dict(seconds=1.))
    monkeypatch.setattr(gpu, 'run_job', lambda job, place: 1 / 0)
    _main(work, '--minutes', '1', '--only', *DONE, LEFT_OUT)
    again = json.loads((work / 'out/summary.json').read_text())
    assert again['runs'] == found['runs'][:3] and {n: (work / 'runs' / n / 'run.json').stat().st_mtime_ns for n in DONE} == before
    assert again['left_out'] == [] and again['failed'] == [dict(name=LEFT_OUT, error='ZeroDivisionError: division by zero')]


def test_without_the_run_that_it_starts_from_a_run_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, 'measure', lambda job, place: dict(seconds=100. if job.kind == gpu.CHILDREN else 1.))
    started = []
    monkeypatch.setattr(gpu, 'run_job', lambda job, place: started.append(job.name) or 1.)
    s = gpu.Schedule(gpu.in_order(gpu.flagship(2, 1)), gpu.Place(tmp_path, tmp_path), 1., 1, log=len)
    s.work()
    assert started == ['covid-2020-random-seed42', 'covid-2020-random-seed43', LEFT_OUT]
    why = {r['name']: r['why'] for r in s.left_out}
    assert why['children'] == 'it needs about 1.7 minutes, 1.0 were left'
    assert why['covid-2020-in-domain-seed42'] == 'children is not there to start from' and len(why) == 3


def test_the_packed_images_give_the_same_tables(tried, tmp_path):
    place, jobs = gpu.Place(tried[0] / 'data', tried[0], tiny=True), gpu.flagship(1, 1)
    archives = gpu.pack_data(jobs, place, tmp_path / 'pack', .1)
    assert len(archives) > 2 and max(f.stat().st_size for f in archives) <= 100_000
    for f in archives:
        with tarfile.open(f) as tar: tar.extractall(tmp_path / 'data', filter='data')
    there = gpu.Place(tmp_path / 'data', tmp_path, tiny=True)
    for job in jobs:
        if job.after: continue
        a, b = (used(build_table(gpu.recipe_of(job, p), p.data)).set_index('image_id')[['label', 'group', 'split']] for p in (place, there))
        assert a.equals(b), job.name


def test_the_full_plan_is_that_of_the_articles():
    place = gpu.Place(ROOT, ROOT)
    recipes = {j.name: gpu.recipe_of(j, place) for j in gpu.flagship()}
    assert len(recipes) == 1 + 2 * 5 + 3
    flagship = recipes['covid-2020-random-seed46']
    assert (flagship.model.arch, flagship.image.size, sum(s.epochs for s in flagship.training.stages)) == ('resnet50', 512, 88)
    assert recipes['covid-2020-in-domain-seed42'].model.weights.endswith('children/bundle/weights.safetensors')
    lite2 = recipes[LEFT_OUT]
    assert (lite2.model.arch, lite2.model.weights, lite2.image.size) == ('efficientnet_lite2', 'imagenet', 260)
    assert lite2.split.kind == 'official'


def test_what_has_not_ended_when_the_time_is_over_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, 'measure', lambda job, place: dict(seconds=0.))
    monkeypatch.setattr(gpu, 'executor', lambda jobs: ThreadPoolExecutor(jobs))
    monkeypatch.setattr(gpu, 'run_job', lambda job, place: time.sleep(2))
    s = gpu.Schedule(gpu.in_order(gpu.flagship(1, 1)), gpu.Place(tmp_path, tmp_path), .01, 1, log=len)
    s.work()
    assert [r['why'] for r in s.left_out] == ['it had not ended when the time was over'] + 3 * ['the time was over']


def test_every_arm_of_the_plan_has_its_place_and_what_it_starts_from():
    jobs = gpu.in_order(gpu.flagship() + gpu.arms(gpu.Place(ROOT, ROOT), audit=['pneumonia-cnn-honest-*']))
    assert [j.name for j in jobs[:3]] == ['children', 'pretrain', 'covid-2020-imagenet-seed42']
    assert {j.after for j in jobs if '-in-domain-' in j.name} == {'children', 'pretrain'}
    assert [j.name for j in jobs if j.audit] == ['pneumonia-cnn-honest-imagenet-seed42']
    inside = {j.kind.rpartition('-')[0] for j in jobs if j.planned and not j.external}
    assert inside >= {'effusion-resnet-honest', 'covid-2020-within'}
    left = gpu.matching(jobs, ['effusion-*'], ['*-seed42*'])
    assert {j.seed for j in left} == {43, 44} and len(left) == 2 * 3 * 5
