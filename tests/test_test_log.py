"""The record of every evaluation on a test split: it counts, it notices tampering, it survives processes that die or write at once."""
import json, shutil, signal, subprocess, sys, time
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from conftest import ROOT, examples
from covid_cxr.core import CxrError, RunError, sha256_file, write_json
from covid_cxr.runs.test_log import (TEST_LOG, TestLogError, count_test_evaluations, describe_test_evaluations, log_head,
                                     log_test_evaluation, read_test_log)

TestLogError.__test__ = False            # an error, no test


def _run(folder, entries=0, **more):
    state = dict(status='training', recipe_hash='a' * 64, started='2020-06-22T10:00:00Z', table_sha256='b' * 64)
    write_json(folder / 'run.json', dict(state, **more))
    for i in range(entries): log_test_evaluation(folder, 'audit', metrics=dict(auc=.8 + i / 100, f1=float('nan')), threshold=.3)
    return folder


@pytest.fixture(scope='module')
def chain(tmp_path_factory):
    "Four entries, as bytes; the folder may be changed and is put back"
    run = _run(tmp_path_factory.mktemp('chain'), entries=4)
    return run, (run / TEST_LOG).read_bytes()


def test_a_second_evaluation_increments(tmp_path):
    run = _run(tmp_path / 'r')
    for n in (1, 2, 3):
        e = log_test_evaluation(run, 'audit')
        assert e.n == n == count_test_evaluations(run) and json.loads((run / 'run.json').read_text())['test_log'] == log_head(e)
    assert describe_test_evaluations(run) == 'this test split was evaluated 3 times'
    assert count_test_evaluations(run, 'nih') == 0 and issubclass(TestLogError, CxrError)


@settings(max_examples=examples(300), deadline=None)
@given(st.data())
def test_any_changed_byte_is_noticed(chain, data):
    "Whatever byte is changed, and to whatever: refused, or (only the end of the last line) an entry fewer than run.json remembers"
    run, good = chain
    at = data.draw(st.integers(0, len(good) - 1))
    new = data.draw(st.integers(0, 255).filter(lambda b: b != good[at]))
    (run / TEST_LOG).write_bytes(good[:at] + bytes([new]) + good[at + 1:])
    try:
        with pytest.raises(TestLogError, match='line|whole entries'): read_test_log(run)
    finally: (run / TEST_LOG).write_bytes(good)


@settings(max_examples=examples(100), deadline=None)
@given(st.permutations(range(4)), st.integers(0, 4))
def test_any_other_order_or_selection_is_noticed(chain, order, keep):
    run, good = chain
    lines = good.splitlines(keepends=True)
    text = b''.join(lines[i] for i in order[:keep])
    (run / TEST_LOG).write_bytes(text)
    try:
        if text == good: assert len(read_test_log(run)) == 4
        else:
            with pytest.raises(TestLogError): read_test_log(run)
            with pytest.raises(TestLogError): log_test_evaluation(run, 'audit')
            assert (run / TEST_LOG).read_bytes() == text, 'nothing is written on a broken chain'
    finally: (run / TEST_LOG).write_bytes(good)


def test_the_line_is_named(chain):
    run, good = chain
    lines = good.splitlines(keepends=True)
    cases = {'line 3 .* was edited': [*lines[:2], lines[2].replace(b'0.82', b'0.92'), lines[3]],
             'line 2 .* it is entry 3: an entry was removed': [lines[0], *lines[2:]],
             'line 2 .* the order was changed': [lines[0], lines[2], lines[1], lines[3]],
             'has 3 whole entries and run.json remembers 4: the last ones were removed': lines[:3],
             'line 4 is cut off': [*lines[:3], lines[3][:30]],
             'line 5 .* does not fit': [*lines, lines[3]],
             'line 1 .* is no entry': [b'[1]\n', *lines[1:]]}
    try:
        for words, bad in cases.items():
            (run / TEST_LOG).write_bytes(b''.join(bad))
            with pytest.raises(TestLogError, match=words): read_test_log(run)
    finally: (run / TEST_LOG).write_bytes(good)


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    run = _run(tmp_path / 'r')
    code = '''import sys
from covid_cxr.runs.test_log import log_test_evaluation
for i in range(15): log_test_evaluation(sys.argv[1], sys.argv[2])'''
    several = [subprocess.Popen([sys.executable, '-c', code, run, f'process {i}'], cwd=ROOT) for i in range(4)]
    assert [p.wait() for p in several] == [0] * 4
    entries = read_test_log(run)
    assert len(entries) == 60 == json.loads((run / 'run.json').read_text())['test_log']['entries']
    assert {e.what for e in entries} == {f'process {i}' for i in range(4)}


def test_a_killed_writer_leaves_a_log_that_holds(tmp_path):
    run, chance = _run(tmp_path / 'r'), np.random.default_rng(3)
    code = 'import sys\nfrom covid_cxr.runs.test_log import log_test_evaluation\nwhile True: log_test_evaluation(sys.argv[1], "audit")'
    for _ in range(4):
        p, before = subprocess.Popen([sys.executable, '-c', code, run], cwd=ROOT), len(read_test_log(run))
        end = time.time() + 30
        while len(read_test_log(run)) <= before and time.time() < end: time.sleep(.01)
        time.sleep(chance.random() * .05)
        p.send_signal(signal.SIGKILL)
        p.wait()
        assert len(read_test_log(run)) > before
    n = len(read_test_log(run))
    assert log_test_evaluation(run, 'audit').n == n + 1 and [e.n for e in read_test_log(run)] == list(range(1, n + 2))


def test_a_run_directory_that_cannot_be_written(tmp_path):
    run = _run(tmp_path / 'r', entries=1)
    (run / TEST_LOG).unlink()
    (run / TEST_LOG).mkdir()
    with pytest.raises(RunError, match='cannot open'): log_test_evaluation(run, 'audit')


def test_training_writes_the_first_entry(phantom_run):
    entries, e = read_test_log(phantom_run), json.loads((phantom_run / 'evaluation.json').read_text())
    first = entries[0]
    assert first.what == 'train' and first.split == 'test' and first.threshold == e['operating_point']['threshold']
    assert first.metrics['auc'] == e['test']['estimates']['auc']['value'] and first.images == e['test']['n_images']
    assert first.predictions_sha256 == sha256_file(phantom_run / 'predictions.csv')
    assert first.table_sha256 == sha256_file(phantom_run / 'table.csv')
    assert 'this test split was evaluated 1 time\n' in (phantom_run / 'summary.txt').read_text()


def test_showing_and_resuming_is_no_second_evaluation(phantom_run, tmp_path):
    "A finished run shown again; and one that was killed between the evaluation and its end"
    from covid_cxr.recipe import load_recipe
    from covid_cxr.runs.train import train
    run = tmp_path / 'run'
    shutil.copytree(phantom_run, run)
    kept = (run / TEST_LOG).read_bytes().splitlines(keepends=True)[:1]      # only the training's own entry, whatever other tests evaluated
    first = read_test_log(run)[0]
    (run / TEST_LOG).write_bytes(b''.join(kept))
    write_json(run / 'run.json', dict(json.loads((run / 'run.json').read_text()), test_log=dict(entries=1, head=first.hash)))
    before, lines = len(read_test_log(run)), []
    assert before == 1
    train(load_recipe(run / 'recipe.toml'), out=run, device='cpu', log=lines.append)
    assert 'already finished' in lines[0] and len(read_test_log(run)) == before
    state = json.loads((run / 'run.json').read_text())
    unfinished = {k: v for k, v in state.items() if k not in ('finished', 'test_log')}   # no head: killed between the line and run.json
    write_json(run / 'run.json', dict(unfinished, status='training'))
    train(load_recipe(run / 'recipe.toml'), out=run, device='cpu', log=lines.append)
    now = json.loads((run / 'run.json').read_text())
    assert now['status'] == 'finished' and len(read_test_log(run)) == before == now['test_log']['entries']
    assert (run / 'predictions.csv').read_bytes() == (phantom_run / 'predictions.csv').read_bytes()


def test_a_tampered_log_stops_the_run_in_one_sentence(phantom_run, tmp_path, capsys):
    from covid_cxr.cli import main
    run = tmp_path / 'run'
    shutil.copytree(phantom_run, run, ignore=shutil.ignore_patterns('cache'))
    text = (run / TEST_LOG).read_text()
    (run / TEST_LOG).write_text(text.replace('"auc": 0', '"auc": 1', 1))
    assert main(['train', str(run / 'recipe.toml'), '--out', str(run), '--device', 'cpu']) == 1
    said = [l for l in capsys.readouterr().err.splitlines() if l.startswith('covid-cxr: ')]
    assert len(said) == 1 and 'line 1' in said[0] and 'was edited' in said[0], said
