"""The audits audited: every phantom with a known fault by every audit that should, or should not, find it. An audit that misses its planted fault, or cries wolf on
a clean phantom, breaks the build; `benchmarks/audit_matrix.py` is the same at full size."""
import sys
import numpy as np, pandas as pd
import pytest
from conftest import ROOT
sys.path.insert(0, str(ROOT / 'benchmarks'))
from audit_matrix import phantom_case
from covid_cxr import audit
from covid_cxr.audit.checks import Verdict, audit_case, headline, worst

FINE = ('PASS', 'UNDERPOWERED')
EXPECTED = {   # phantom -> audit -> verdicts that are right; what is not listed may say anything
    'P0':  dict(A1=FINE, A5=FINE, A6=('UNDERPOWERED',), A7=('UNDERPOWERED',), A10=FINE, A12=('FAIL', 'UNDERPOWERED')),
    'P1':  dict(A1=FINE, A5=FINE, A6=('PASS', 'UNDERPOWERED'), A7=('PASS',), A10=FINE, A12=('PASS',)),
    'P2':  dict(A1=FINE, A5=('FAIL',), A6=('FAIL',), A7=('FAIL',), A10=FINE, A12=('FAIL',)),
    'P3':  dict(A1=FINE, A5=('FAIL',), A6=('FAIL',), A7=('FAIL',), A10=FINE),
    'P4':  dict(A1=FINE, A5=('FAIL',), A6=('FAIL',), A7=('PASS',), A8=('WARN', 'PASS'), A10=FINE),      # the site is in the features (WARN), yet the disease is told within each
    'P4b': dict(A1=FINE, A5=('FAIL',), A6=('FAIL',), A7=('PASS',), A8=('FAIL',), A10=FINE, A12=('FAIL', 'UNDERPOWERED')),
    'P5':  dict(A1=('FAIL',), A10=('FAIL',)),
}


@pytest.fixture(scope='module')
def audited():
    cases = {name: phantom_case(name, patients=100, size=48, n_boot=300)[0] for name in EXPECTED}
    return {name: (case, *audit_case(case, quick=True)) for name, case in cases.items()}


@pytest.mark.parametrize('phantom,number', [(p, a) for p, row in EXPECTED.items() for a in row])
def test_verdict(audited, phantom, number):
    rows = audited[phantom][1]
    assert worst(rows, number) in EXPECTED[phantom][number], '\n'.join(str(r) for r in rows if r.audit == number)


def test_the_matrix_speaks_of_the_whole_family():
    from covid_cxr.phantom import FAMILY
    assert set(EXPECTED) == set(FAMILY)


def test_models_are_as_good_inside_as_the_plan_says(audited):
    "An audit of a network that learned nothing would prove nothing"
    for name in ('P1', 'P2', 'P3', 'P4', 'P4b'): assert audited[name][0].auc.value > .85, name
    assert audited['P0'][0].auc.low < .5 < audited['P0'][0].auc.high + .1


def test_within_source_auc_tells_site_present_from_site_used(audited):
    value = {n: audit.within_source_auc(audited[n][0], 'site')[0] for n in ('P4', 'P4b')}
    assert value['P4'] > .8 and value['P4b'] < .65, value


def test_lungs_alone_are_no_cure_on_p4b(audited):
    "Trained on the lungs alone, the network still reads the exposure curve, and the row does not say PASS"
    case = audited['P4b'][0]
    row, = audit.check_lungs_only(case)
    assert row.value > .8 and row.low > .7 and row.verdict == 'INFO' and 'not show' in row.words, str(row)
    assert worst(audited['P4b'][1], 'A8') == 'FAIL' and not headline(case, audited['P4b'][2])['reads_lungs']


def test_headlines(audited):
    reads = {n: headline(c, floors)['reads_lungs'] for n, (c, _, floors, _) in audited.items()}
    assert reads['P1'] and not (reads['P0'] or reads['P2'] or reads['P4b'] or reads['P5']), reads
    for n, (c, _, floors, _) in audited.items():
        h = headline(c, floors)
        assert h['model_auc']['value'] == c.auc.value
        assert abs(h['floor_adjusted_auc']['value'] - (c.auc.value - h['pixel_floor']['auc']['value'])) < 1e-9, n
        assert h['pixel_floor']['auc']['value'] == max(f.auc.value for f in floors if f.kind == 'pixels')


def test_a_leak_by_patient_is_named(audited):
    case, rows = audited['P5'][:2]
    row = next(r for r in rows if r.audit == 'A1' and r.name.startswith('the same group'))
    assert row.verdict == 'FAIL' and row.value == case.table.groupby('group')['split'].nunique().gt(1).sum() and 'P5-' in row.words


def test_copies_across_the_split_are_named(audited):
    case = audited['P1'][0]
    ids = [f'i{k}' for k in range(len(case.table))]
    first, other = int(np.flatnonzero(case.train)[0]), int(np.flatnonzero(case.at)[0])
    pair = lambda a, b, verdict: dict(a=ids[a], b=ids[b], kind='near', verdict=verdict, score=.99, alike=.99, edit='none')
    import dataclasses
    make = lambda *pairs: dataclasses.replace(case, table=case.table.assign(image_id=ids), pairs=pd.DataFrame(pairs, columns=['a', 'b', 'kind', 'verdict', 'score', 'alike', 'edit']))
    assert [r.verdict for r in audit.check_duplicates(make(pair(first, other, 'duplicate')))] == ['FAIL', 'PASS']
    assert ids[first] in audit.check_duplicates(make(pair(first, other, 'duplicate')))[0].words
    assert [r.verdict for r in audit.check_duplicates(make(pair(first, other, 'look')))] == ['PASS', 'PASS']
    assert [r.verdict for r in audit.check_duplicates(make(pair(other, other + 1, 'duplicate')))] == ['PASS', 'WARN']
    assert [r.verdict for r in audit.check_duplicates(make())] == ['PASS', 'PASS']


def test_every_row_carries_a_rule_a_meaning_and_a_known_verdict(audited):
    for _, rows, _, not_run in audited.values():
        for r in rows:
            assert r.rule and r.words.endswith(('.', '%.')) and r.verdict in audit.VERDICTS, str(r)
            assert isinstance(r, Verdict) and r.to_dict()['audit'] == r.audit
            if r.value == r.value and r.low == r.low: assert r.low - 1e-9 <= r.high, str(r)
        assert {n['audit'] for n in not_run} >= {'A5', 'A8', 'A10'}
