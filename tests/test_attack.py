"""A few of the changed files of `make attack` (benchmarks/attack.py), and kills in the middle of writing."""
import json, os, shutil, sys, warnings
import pytest
from conftest import FORKS, ROOT, here
sys.path.insert(0, str(ROOT / 'benchmarks'))
import attack
from covid_cxr.bundle import MANIFEST, check_manifest, describe_integrity, writing_files
from covid_cxr.core import write_json, write_text
from covid_cxr.runs.folder import RunFolder

FEW = dict(pictures=400, bundles=40, networks=40, folders=8, requests=60)
ENDS = dict(pictures={'blank', 'read', 'refused'}, folders={'answered', 'refused'},
            bundles={'description answered', 'description refused', 'weights answered', 'weights declined', 'weights refused'},
            networks={'network answered', 'network declined', 'network refused'},
            requests={'answered', 'declined', 'failed', 'page', 'sent on', 'busy', 'closed',
                      *(f'refused {status}' for status in (400, 401, 403, 404, 408, 413, 421, 429))})


@pytest.fixture(scope='module')
def complete(phantom_run, tmp_path_factory):
    "The phantom run with an audit, baselines and an external test"
    left_out = shutil.ignore_patterns('checkpoints', 'stdout.txt')
    return attack.complete_run(shutil.copytree(phantom_run, tmp_path_factory.mktemp('complete') / 'run', ignore=left_out))


@pytest.mark.parametrize('kind', FEW)
def test_changed_files_end_in_an_answer_or_a_sentence(kind, complete):
    "In a process of its own, which stops at a traceback, above 10 s of processor time for one file, and above 2 GB"
    found = attack.attack_apart(kind, FEW[kind], complete, seed=11)
    assert set(found['ends']) <= ENDS[kind] and sum(found['ends'].values()) == FEW[kind] and len(found['ends']) > 1
    assert found['slowest_seconds'] < attack.MOST_SECONDS and 0 < found['memory_bytes'] < attack.MOST_BYTES
    refused = sum(n for end, n in found['ends'].items() if 'refused' in end)
    assert FEW[kind] / 5 < refused < FEW[kind]


def _not_protected(path):
    "Listed as such in nbs/runs/folder.ipynb; new-image.png is an image that the demo makes for its one prediction"
    return path.parts[0] in ('data', 'cache', 'checkpoints', 'log.txt', 'new-image.png') or path.name.startswith('.')


def test_a_byte_of_any_file_is_noticed_or_the_file_is_not_protected(complete, tmp_path):
    "Every file of a run with its audit, baselines, external test, report and bundle, and every part of each of them"
    run = shutil.copytree(complete, tmp_path / 'run')
    assert here('report', run).returncode == 0 and RunFolder(run).integrity.status == 'verified'
    seen = {}
    for file in sorted(p for p in run.rglob('*') if p.is_file() and p.stat().st_size):
        name, raw = file.relative_to(run), file.read_bytes()
        if _not_protected(name) or name.name == MANIFEST: continue
        for at in (0, len(raw) // 2, len(raw) - 2):
            file.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1:])
            found = {**seen.get(name.as_posix(), {}), at: RunFolder(run).integrity.altered + check_manifest(run / 'bundle').altered}
            seen[name.as_posix()] = found
        file.write_bytes(raw)
    assert set(attack.ATTACKED) - {MANIFEST} <= set(seen) and len(seen) > 20
    for name, found in seen.items(): assert all(name in altered for altered in found.values()), (name, found)
    assert RunFolder(run).integrity.status == 'verified'


@pytest.mark.parametrize('file, place, value', [
    ('run.json', ['synthetic'], False), ('run.json', ['leaking_groups'], 0), ('recipe.toml', None, None),
    ('bundle/bundle.json', ['threshold'], .9), ('bundle/bundle.json', ['not_for'], 'Approved for diagnosis.'),
    ('evaluation.json', ['test', 'estimates', 'auc', 'value'], .99),
    ('evaluation.json', ['operating_point', 'threshold'], .1), ('audit.json', ['verdicts'], []), ('audit.json', ['headline'], None),
    ('external.json', ['tests'], []), ('baselines.csv', None, None), ('test_log.jsonl', None, None)])
def test_an_edit_that_makes_a_run_look_better_is_named(file, place, value, complete, tmp_path):
    run = shutil.copytree(complete, tmp_path / 'run', ignore=shutil.ignore_patterns('cache', 'data'))
    edited = run / file
    if place is None: edited.write_text(edited.read_text().replace('0', '1'))
    else:
        values = inner = json.loads(edited.read_text())
        for key in place[:-1]: inner = inner[key]
        if inner[place[-1]] == value: inner[place[-1]] = 9
        else: inner[place[-1]] = value
        write_json(edited, values)
    assert RunFolder(run).integrity.altered == (file,)


def test_the_kept_result_is_of_the_whole_attack():
    kept = json.loads(attack.OUT.read_text(encoding='utf-8'))
    assert {r['kind']: r['n'] for r in kept['rows']} == {kind: n for kind, (_, n) in attack.ATTACKS.items()}
    assert sum(r['n'] for r in kept['rows']) >= 13_300
    for r in kept['rows']:
        assert sum(r['ends'].values()) == r['n'] and r['slowest_seconds'] < attack.MOST_SECONDS and r['memory_bytes'] < attack.MOST_BYTES
        assert set(r['ends']) <= ENDS[r['kind']] and kept['command'] == 'python benchmarks/attack.py'


def test_every_format_is_attacked():
    from covid_cxr.images import _MAGIC
    names = ' '.join([*attack.by_pil(), 'dicom'])
    for kind in {kind for _, kind in _MAGIC} | {'WEBP', 'DICOM'}: assert kind.lower() in names, kind


def _report(run):
    from covid_cxr.report.page import write_report
    write_report(run)


def _audit(run):
    with writing_files(run, ['audit.json', 'audit.txt']):
        write_json(run / 'audit.json', dict(version=2))
        write_text(run / 'audit.txt', 'x')


def _log(run):
    from covid_cxr.runs.test_log import log_test_evaluation
    log_test_evaluation(run, 'audit')


WRITERS = {'report': (_report, 4), 'audit': (_audit, 4), 'test log': (_log, 3)}     # the most files that each writes into a run


def _killed(what, run, left):
    "In a process of its own, which is killed behind so many files"
    left, real = [left], os.replace
    def replace(a, b):
        real(a, b)
        left[0] -= 1
        if not left[0]: os._exit(9)
    os.replace = replace
    warnings.simplefilter('ignore')
    WRITERS[what][0](run)


@pytest.mark.parametrize('what', WRITERS)
@pytest.mark.parametrize('first', [True, False])
def test_a_kill_between_two_files_alters_nothing(what, first, complete, tmp_path):
    "Whatever was written when a command was killed: the run is verified, or unverified with the file named, and never altered"
    seen = set()
    for n in range(1, WRITERS[what][1] + 1):
        run = shutil.copytree(complete, tmp_path / f'run{n}', ignore=shutil.ignore_patterns('cache', 'data'))
        if first: _without(run, ('report.html', 'model-card.md', 'audit.json', 'audit.txt', 'test_log.jsonl'))
        p = FORKS.Process(target=_killed, args=(what, run, n))
        p.start()
        p.join()
        assert p.exitcode in (0, 9)
        found = RunFolder(run).integrity
        assert not found.altered and bool(found.unfinished) == (found.status == 'unverified'), (n, found)
        assert not found.unfinished or 'run it again' in describe_integrity(found, run)
        seen.add(p.exitcode)
    assert 9 in seen


def _without(run, names):
    "Take files out of a run and out of its manifest"
    kept = json.loads((run / MANIFEST).read_text())
    for name in names:
        kept['files'].pop(name, None)
        (run / name).unlink(missing_ok=True)
    state = json.loads((run / 'run.json').read_text())
    state.pop('test_log', None)
    (run / 'run.json').write_text(json.dumps(state))
    (run / MANIFEST).write_text(json.dumps(kept))
