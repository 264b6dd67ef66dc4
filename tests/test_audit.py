"""The checks checked: every phantom with a known fault by every check that should, or should not, find it, and one case that fails
each check beside one that passes. A check that misses its planted fault, or finds one on a clean phantom, breaks the build;
`benchmarks/audit_matrix.py` is the same at full size."""
import dataclasses, json
from types import SimpleNamespace
import numpy as np, pandas as pd
import pytest
import torch
from PIL import Image
from conftest import ROOT
from covid_cxr.audit import checks_numbers
from covid_cxr.audit.baselines import Baseline, SmallCNN
from covid_cxr.audit.case import (CHECKS, RULES, Audit, AuditError, Case, Headline, NotRun, Verdict, VerdictWord, measure_headline,
                                  phantom_case, read_audit, run_check, worst)
from covid_cxr.audit.checks_model import within_source_auc
from covid_cxr.audit.perturb import recompress
from covid_cxr.audit.run import audit_case, checks_table, rules_table
from covid_cxr.audit.sentences import describe_audit, describe_headline, describe_not_run, describe_rule, describe_verdict
from covid_cxr.core import RunError, choices, new_table, write_json
from covid_cxr.evaluate import Estimate, evaluate
from covid_cxr.ood import fit_ood_check
from covid_cxr.phantom import FAMILY, make_phantom
from covid_cxr.runs.folder import RunFolder
from covid_cxr.runs.test_log import log_test_evaluation

FINE = ('PASS', 'UNDERPOWERED')
EXPECTED = {   # phantom -> check -> verdicts that are right; what is not listed may say anything
    'P0':  dict(A1=FINE, A5=FINE, A6=('UNDERPOWERED',), A7=('UNDERPOWERED',), A10=FINE, A12=('FAIL', 'UNDERPOWERED')),
    'P1':  dict(A1=FINE, A5=FINE, A6=('PASS', 'UNDERPOWERED'), A7=('PASS',), A10=FINE, A12=('PASS',)),
    'P2':  dict(A1=FINE, A5=('FAIL',), A6=('FAIL',), A7=('FAIL',), A10=FINE, A12=('FAIL',)),
    'P3':  dict(A1=FINE, A5=('FAIL',), A6=('FAIL',), A7=('FAIL',), A10=FINE),
    # the site is in the features (WARN), yet the disease is told within each
    'P4':  dict(A1=FINE, A5=('FAIL',), A6=('FAIL',), A7=('PASS',), A8=('WARN', 'PASS'), A10=FINE),
    'P4b': dict(A1=FINE, A5=('FAIL',), A6=('FAIL',), A7=('PASS',), A8=('FAIL',), A10=FINE, A12=('FAIL', 'UNDERPOWERED')),
    'P5':  dict(A1=('FAIL',), A10=('FAIL',)),
}


@pytest.fixture(scope='module')
def audited():
    "Every phantom and its quick audit"
    cases = {name: phantom_case(name, patients=100, size=48, n_boot=300) for name in EXPECTED}
    for case in cases.values(): case.quick = True
    return {name: (case, *audit_case(case)) for name, case in cases.items()}


@pytest.mark.parametrize('phantom,code', [(p, a) for p, row in EXPECTED.items() for a in row])
def test_verdict(audited, phantom, code):
    verdicts = audited[phantom][1]
    assert worst(verdicts, code) in EXPECTED[phantom][code], '\n'.join(describe_verdict(v) for v in verdicts if v.check == code)


def test_the_matrix_speaks_of_the_whole_family(): assert set(EXPECTED) == set(FAMILY)


def test_models_are_as_good_inside_as_the_plan_says(audited):
    "An audit of a network that learned nothing would prove nothing"
    for name in ('P1', 'P2', 'P3', 'P4', 'P4b'): assert audited[name][0].auc.value > .85, name
    assert audited['P0'][0].auc.low < .5 < audited['P0'][0].auc.high + .1


def test_headlines(audited):
    headlines = {n: measure_headline(case) for n, (case, *_) in audited.items()}
    reads = {n: h.reads_lungs for n, h in headlines.items()}
    assert reads['P1'] and not (reads['P0'] or reads['P2'] or reads['P4b'] or reads['P5']), reads
    for n, h in headlines.items():
        case = audited[n][0]
        assert h.model_auc.value == case.auc.value
        assert abs(h.auc_gain.value - (case.auc.value - h.best_baseline.auc.value)) < 1e-9, n
        assert h.best_baseline.auc.value == max(b.auc.value for b in case.baselines if b.kind == 'image_without_lungs')
        assert h.reads_lungs == (h.auc_gain.low > 0 and h.model_auc.low > .5) and h.better_than_chance == (h.model_auc.low > .5)


# ---- one case that fails each check, one that passes

def small_case(n=300, signal=2., images=1, seed=0, sharpen=1., side=16, **columns):
    "n test patients and as many training patients; the log-odds of the ill are higher by `signal`"
    r, who = np.random.default_rng(seed), np.repeat(np.arange(2 * n), images)
    ill = who % 2 == 1
    logit = signal * (ill - .5) + np.repeat(r.normal(0, signal ** .5, 2 * n), images)
    table = pd.DataFrame(dict(image_id=[f'i{k}' for k in range(len(who))], label=np.where(ill, 'ill', 'well'),
                              group=[f'p{w}' for w in who], split=np.where(who < n, 'test', 'train')))
    return Case(table.assign(**columns), np.zeros((len(who), side, side), np.uint8), 1 / (1 + np.exp(-sharpen * logit)), ('well', 'ill'),
                n_boot=300, operating_point=dict(goal='youden', hash='0123456789'), seed=seed)


def with_pair(a, b, verdict='duplicate'):
    return dataclasses.replace(small_case(), pairs=pd.DataFrame([(a, b, verdict)], columns=['a', 'b', 'verdict']))


def with_baseline(name, kind, signal):
    case = small_case()
    s = small_case(signal=signal, seed=7).probs[case.evaluated]
    auc = evaluate(case.y, s, case.groups, n_boot=300)['auc']
    return dataclasses.replace(case, baselines=[Baseline(name, kind, 'what it saw', auc, s)])


def files_case(folder, real):
    "Forty patients with three image files each; their ids are real, or dealt at random"
    rows, who = [], np.repeat(np.arange(40), 3)
    for k, w in enumerate(who):
        path = folder / f'{k}.png'
        Image.fromarray(make_phantom(0, int(w), k % 3, 64, wobble=.15).image).save(path)
        rows.append(dict(path=str(path), image_id=path.name, finding='No Finding', patient=f'p{w}'))
    t = new_table(rows, 'covid_chestxray').assign(label='well', split=np.where(who % 2, 'train', 'test'))
    t = t if real else t.assign(patient=np.random.default_rng(0).permutation(t['patient']))
    return Case(t.assign(group=t['patient']), np.zeros((120, 16, 16), np.uint8), np.full(120, .5), ('well', 'ill'),
                fingerprints=folder / 'prints.npz')


def grainy_case(reads):
    "The healthy went through a coarse JPEG; the model reads the grain, or the brightness of the middle"
    r, y = np.random.default_rng(0), np.arange(240) % 2
    x = r.integers(60, 180, (240, 32, 32)).astype(np.uint8)
    x[y == 0] = recompress(x[y == 0], 30)
    x[y == 1, 8:24, 8:24] += 40
    grain = lambda x: (np.abs(np.diff(x.astype(float), axis=2)).mean((1, 2)) - 38) / 3
    middle = lambda x: (x[:, 8:24, 8:24].mean((1, 2)) - x.mean((1, 2)) - 15) / 8
    score = lambda x: 1 / (1 + np.exp(-(grain if reads == 'grain' else middle)(x)))
    t = pd.DataFrame(dict(label=np.where(y, 'ill', 'well'), group=np.arange(240), split=np.where(np.arange(240) < 120, 'train', 'test')))
    return Case(t, x, score(x), ('well', 'ill'), images=x[120:], score=score, n_boot=300)


def bright_case(where, zero, seed):
    "A network of one weight that reads brightness, and images with a bright spot"
    body, head = torch.nn.Conv2d(1, 1, 1), torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(1, 1))
    with torch.no_grad():
        for p in (*body.parameters(), *head.parameters()): p.fill_(1.)
    x = np.random.default_rng(0).integers(0, 60, (40, 32, 32)).astype(np.uint8)
    x[:, where, where] = 240
    t = pd.DataFrame(dict(label=np.where(np.arange(40) % 2, 'ill', 'well'), group=np.arange(40), split='test'))
    return Case(t, x, np.full(40, .5), ('well', 'ill'), images=x, network=SmallCNN(torch.nn.Sequential(body, head), zero, 60., (32, 32)),
                n_boot=300, seed=seed)


def external_case(auc):
    "A case with one external test of two classes"
    test = SimpleNamespace(name='elsewhere', n_images=100, n_groups=90, one_class=False, estimates=dict(auc=auc), false_positive_rate=None)
    return dataclasses.replace(small_case(), external_tests=(test,))


def stored_case(change):
    "A run whose stored numbers are those of its predictions; the model answers `change` more than was written"
    case = small_case()
    return dataclasses.replace(case, images=case.small[case.evaluated], score=lambda x: np.clip(case.p + change, 0, 1),
                               folder=SimpleNamespace(path=None, result=case.evaluation))


def halves(case):
    "A case whose patients are dealt to two sources; half the size, so that trainings are short"
    names = case.table['group'].map({g: 'AB'[k % 2] for k, g in enumerate(case.table['group'].unique())})
    return dataclasses.replace(case, table=case.table.assign(source=names), small=case.small[:, ::2, ::2])


def women_guessed():
    sex = np.where(np.arange(600) % 4 < 2, 'F', 'M')
    case = small_case(sex=sex)
    return dataclasses.replace(case, probs=np.where(sex == 'F', np.random.default_rng(1).random(600), case.probs))


HAND_MADE = {   # check -> a case that it must find something in, the verdict, a case that it must pass
    'check_duplicates': (lambda: with_pair('i0', 'i400'), 'FAIL', lambda: with_pair('i0', 'i400', 'look')),
    'check_file_properties': (lambda: with_baseline('file properties', 'file', 2.), 'FAIL',
                              lambda: with_baseline('file properties', 'file', .01)),
    'check_metadata': (lambda: with_baseline('metadata', 'metadata', 2.), 'FAIL', lambda: with_baseline('metadata', 'metadata', .01)),
    'check_acquisition': (lambda: grainy_case('grain'), 'WARN', lambda: grainy_case('middle')),
    'check_gain': (lambda: with_baseline('edge', 'image_without_lungs', 2.), 'FAIL',
                   lambda: with_baseline('edge', 'image_without_lungs', .01)),
    'check_threshold': (lambda: dataclasses.replace(small_case(), operating_point=None), 'FAIL', small_case),
    'check_calibration': (lambda: small_case(sharpen=3.), 'WARN', small_case),
    'check_subgroups': (women_guessed, 'FAIL', lambda: small_case(sex=np.where(np.arange(600) % 4 < 2, 'F', 'M'))),
    'check_stored_numbers': (lambda: stored_case(.01), 'FAIL', lambda: stored_case(0)),
    'check_external': (lambda: external_case(Estimate(.52, .4, .6, 100)), 'FAIL', lambda: external_case(Estimate(.9, .85, .95, 100))),
    'check_maps': (lambda: bright_case(slice(0, 3), 0., 1), 'WARN', lambda: bright_case(slice(12, 20), 60., 0)),
}
ON_PHANTOMS = {   # check -> phantom that it must find something in, the verdict, phantom that it must pass
    'check_groups': ('P5', 'FAIL', 'P1'), 'check_image_without_lungs': ('P2', 'FAIL', 'P1'), 'check_occlusion': ('P2', 'FAIL', 'P1'),
    'check_markers': ('P2', 'FAIL', 'P1'), 'check_within_source': ('P4b', 'FAIL', 'P4'), 'check_permutation': ('P5', 'FAIL', 'P1'),
}


def answers(name, case):
    check = CHECKS[name]
    assert check.lacks(dataclasses.replace(case, quick=False, baselines=case.baselines)) is None
    verdicts = run_check(check, case)
    assert {v.check for v in verdicts} == {check.code} and {v.rule for v in verdicts} <= {*check.rules, 'possible'}
    return worst(verdicts, check.code)


@pytest.mark.parametrize('name', HAND_MADE)
def test_check_on_hand_made_cases(name):
    bad, verdict, good = HAND_MADE[name]
    assert (answers(name, bad()), answers(name, good())) == (verdict, 'PASS')


@pytest.mark.parametrize('name', ON_PHANTOMS)
def test_check_on_phantoms(audited, name):
    bad, verdict, good = ON_PHANTOMS[name]
    assert answers(name, audited[bad][0]) == verdict and answers(name, audited[good][0]) in FINE


def test_check_patient_id_signal(tmp_path):
    for name in ('dealt', 'real'): (tmp_path / name).mkdir()
    assert answers('check_patient_id_signal', files_case(tmp_path / 'dealt', real=False)) == 'WARN'
    assert answers('check_patient_id_signal', files_case(tmp_path / 'real', real=True)) == 'PASS'


def test_check_lungs_only_is_no_cure_on_p4b(audited):
    "Trained on the lungs alone, the network still reads the exposure curve, and the verdict is not PASS"
    case = audited['P4b'][0]
    v, = run_check(CHECKS['check_lungs_only'], case)
    assert v.value > .8 and v.low > .7 and v.verdict == 'INFO' and 'not show' in describe_verdict(v)
    assert worst(audited['P4b'][1], 'A8') == 'FAIL' and not measure_headline(case).reads_lungs


def test_check_source_signal(audited):
    case = audited['P1'][0]
    site = np.random.default_rng(0).integers(0, 2, len(case.table))
    assert answers('check_source_signal', audited['P4'][0]) == 'WARN'
    assert answers('check_source_signal', dataclasses.replace(case, table=case.table.assign(site=site))) in FINE


def test_check_left_out_source(audited):
    "Lesions in both sources hold; a marker in one and nothing in the other do not"
    marker, plain = audited['P2'][0], phantom_case('P0', patients=60, n_boot=300, epochs=1)
    table = pd.concat([c.table.assign(source=s) for c, s in ((marker, 'marked'), (plain, 'plain'))], ignore_index=True)
    small = np.concatenate([marker.small, plain.small])
    unlike = Case(table, small[:, ::2, ::2], marker.score(small), marker.classes, n_boot=300)
    assert answers('check_left_out_source', halves(audited['P1'][0])) == 'PASS'
    assert answers('check_left_out_source', unlike) == 'FAIL'


def test_check_permutation_training(audited, monkeypatch):
    half = lambda case: dataclasses.replace(case, small=case.small[:, ::2, ::2])
    for name, trainings, right in (('P5', 3, ('FAIL',)), ('P0', 5, FINE)):
        monkeypatch.setattr(checks_numbers, 'TRAININGS', trainings)
        assert answers('check_permutation_training', half(audited[name][0])) in right


def test_check_precision():
    v, = run_check(CHECKS['check_precision'], small_case(100, images=3))
    assert 2 < v.value < 4 and v.verdict == 'INFO' and 70 < v.facts['effective_n'] < 150


def test_check_predictive_values():
    verdicts = run_check(CHECKS['check_predictive_values'], small_case())
    assert [v.verdict for v in verdicts] == ['INFO'] * 4 and [v.value for v in verdicts] == sorted(v.value for v in verdicts)
    assert [v.facts['prevalence'] for v in verdicts] == [.01, .05, .2, .5]


def test_check_history(tmp_path):
    "The number of evaluations is that of the log; one training is UNDERPOWERED, sibling runs or not"
    run = tmp_path / 'run'
    for folder in (run, tmp_path / 'run-seed1'): write_json(folder / 'run.json', dict(status='training'))
    for what in ('train', 'audit', 'compare'): log_test_evaluation(run, what, metrics=dict(auc=.9))
    seen, spread = run_check(CHECKS['check_history'], dataclasses.replace(small_case(), folder=RunFolder.open(run, finished=False)))
    assert (seen.value, seen.verdict, spread.value, spread.verdict) == (3, 'INFO', 1, 'UNDERPOWERED')


def test_check_ood(audited):
    case = audited['P1'][0]
    train = case.small[case.train]
    upside_down, upright = (dataclasses.replace(case, ood=fit_ood_check(x)) for x in (train[:, ::-1], train))
    assert [run_check(CHECKS['check_ood'], c)[0].verdict for c in (upside_down, upright)] == ['WARN', 'PASS']


def test_every_check_of_the_registry_is_tested_here():
    alone = {n.removeprefix('test_') for n in globals() if n.startswith('test_check_')}
    told = {*HAND_MADE, *ON_PHANTOMS, *alone, *(n.removesuffix('_is_no_cure_on_p4b') for n in alone)}
    assert set(CHECKS) <= told


# ---- registry, rules, thresholds

def test_the_registry_is_whole():
    assert list(dict.fromkeys(checks_table()['code'])) == [f'A{k}' for k in range(1, 22)]
    for name, check in CHECKS.items():
        assert check.run.__name__ == name and check.title and check.needs and check.rules, name
        assert check.run.__doc__.startswith(check.code), name
    told = rules_table().set_index('rule')['checks']
    assert {r for r in RULES if not told[r]} == {'possible', 'precise'}


@pytest.mark.parametrize('rule, threshold, value, name, case, verdict', [
    ('metadata_auc', 'fail', .99, 'check_metadata', lambda: with_baseline('metadata', 'metadata', 2.), 'WARN'),
    ('copies_across', 'most', 1, 'check_duplicates', lambda: with_pair('i0', 'i400'), 'PASS'),
    ('worst_subgroup', 'p', 0, 'check_subgroups', women_guessed, 'PASS'),
    ('same_probabilities', 'difference', .1, 'check_stored_numbers', lambda: stored_case(.01), 'PASS'),
    ('external_auc', 'chance', .3, 'check_external', lambda: external_case(Estimate(.52, .4, .6, 100)), 'WARN'),
    ('threshold_regret', 'warn', -1, 'check_threshold', small_case, 'WARN'),
    ('map_of_random_weights', 'correlation', -2, 'check_maps', lambda: bright_case(slice(12, 20), 60., 0), 'WARN')])
def test_code_reads_the_thresholds_that_the_report_prints(monkeypatch, rule, threshold, value, name, case, verdict):
    changed = dataclasses.replace(RULES[rule], thresholds={**RULES[rule].thresholds, threshold: value})
    monkeypatch.setitem(RULES, rule, changed)
    assert answers(name, case()) == verdict and str(value) in changed.words


def test_what_a_case_lacks_is_not_run_and_said(audited):
    case, _, not_run = audited['P1']
    missing = {n.check: n.missing for n in not_run}
    assert missing['A2'] == 'pairs' and missing['A18'] == 'external tests' and missing['A20'] == 'run folder'
    assert {n.check for n in not_run if n.missing == 'time'} == {'A5', 'A8', 'A9', 'A10'}
    assert {n.check for n in not_run if n.missing == 'subject'} == {'A3', 'A4', 'A8'}        # no file, no metadata, no source is recorded
    for _, verdicts, others in audited.values():
        assert {v.check for v in verdicts} | {n.check for n in others} == {c.code for c in CHECKS.values()}
    assert 'covid-cxr external' in describe_not_run(NotRun('A18', 'external tests', 'external tests'))
    with pytest.raises(AuditError, match='needs pairs'): CHECKS['check_duplicates'].run(case)


def test_a_refusal_of_the_library_is_one_underpowered_verdict():
    case = with_pair('i0', 'i400')
    v, = run_check(CHECKS['check_duplicates'], dataclasses.replace(case, table=case.table.drop(columns='image_id')))
    assert v.verdict == 'UNDERPOWERED' and v.rule == 'possible' and 'image_id' in describe_verdict(v)


# ---- what the verdicts say

def test_within_source_auc_tells_site_present_from_site_used(audited):
    value = {n: within_source_auc(audited[n][0], 'site').auc.value for n in ('P4', 'P4b')}
    assert value['P4'] > .8 and value['P4b'] < .65, value


def test_a_leak_by_patient_is_named(audited):
    case, verdicts = audited['P5'][:2]
    v = next(v for v in verdicts if v.check == 'A1' and v.name.startswith('the same group'))
    assert v.verdict == 'FAIL' and v.value == case.table.groupby('group')['split'].nunique().gt(1).sum() and 'P5-' in describe_verdict(v)


def test_copies_across_the_split_are_named():
    def verdicts(*pair): return CHECKS['check_duplicates'].run(with_pair(*pair))
    assert [v.verdict for v in verdicts('i400', 'i0')] == ['FAIL', 'PASS'] and 'i400 = i0' in describe_verdict(verdicts('i400', 'i0')[0])
    assert [v.verdict for v in verdicts('i400', 'i0', 'look')] == ['PASS', 'PASS']
    assert [v.verdict for v in verdicts('i0', 'i1')] == ['PASS', 'WARN']
    assert [v.verdict for v in verdicts('i400', 'i401')] == ['PASS', 'PASS']


def test_every_verdict_carries_a_rule_and_becomes_the_same_sentence_after_json(audited):
    for _, verdicts, _ in audited.values():
        for v in verdicts:
            again = Verdict.from_dict(json.loads(json.dumps(v.to_dict())))
            text = describe_verdict(v)
            assert describe_verdict(again) == text and text.endswith('.') and text[0] == text[0].upper()
            assert 'nan' not in text.lower().split() and 'None' not in text
            assert describe_rule(v) == RULES[v.rule].words and v.verdict in choices(VerdictWord) and v.facts
            if v.value == v.value and v.low == v.low: assert v.low - 1e-9 <= v.high, text


def an_audit(case, verdicts, not_run):
    return Audit('phantom', True, True, case.split, '2026-11-28T00:00:00Z', {}, measure_headline(case), tuple(verdicts),
                 tuple(case.baselines), tuple(not_run), 1.)


def test_an_audit_is_the_same_after_json_and_fits_the_screen(audited):
    for case, verdicts, not_run in audited.values():
        audit = an_audit(case, verdicts, not_run)
        again = Audit.from_dict(json.loads(json.dumps(audit.to_dict())))
        for every in (False, True):
            text = describe_audit(audit, every)
            assert describe_audit(again, every) == text and max(map(len, text.splitlines())) <= 100
            shown = [v for v in verdicts if every or v.verdict in ('FAIL', 'WARN')]
            assert all(v.name in ' '.join(text.split()) for v in shown) and describe_headline(audit.headline) in ' '.join(text.split())
        short = describe_audit(audit).split('\n')
        assert not any(line.startswith(('PASS', 'INFO', 'UNDERPOWERED', 'NOT RUN')) for line in short)
        assert sum(audit.counts.values()) == len(verdicts)


# ---- audits that were written by version 1

KEPT = sorted(p.parent for p in (ROOT / 'benchmarks/results').glob('*/audit.json'))


@pytest.mark.parametrize('run', KEPT, ids=lambda p: p.name)
def test_an_audit_of_version_1_is_read_number_by_number(run):
    raw, audit = json.loads((run / 'audit.json').read_text()), read_audit(run)
    assert raw['version'] == 1 and audit.counts == raw['verdicts'] and len(audit.not_run) == len(raw['not_run'])
    none = lambda v: None if v != v else v
    assert [[v.check, v.verdict, *map(none, (v.value, v.low, v.high))] for v in audit.verdicts] == \
        [[r[k] for k in ('audit', 'verdict', 'value', 'low', 'high')] for r in raw['rows']]
    assert all(v.n and not v.facts for v in audit.verdicts) and not {v.rule for v in audit.verdicts} & {'possible', 'precise'}
    for v in audit.verdicts: assert describe_verdict(v).startswith(v.name[0].upper() + v.name[1:])
    e = lambda d: [d[k] for k in ('value', 'low', 'high')]
    h, old = audit.headline, raw['headline']
    for new, name in ((h.model_auc, 'model_auc'), (h.auc_gain, 'floor_adjusted_auc'), (h.auc_gain_over_metadata, 'above_provenance')):
        assert list(new[:3]) == e(old[name])
    assert h.reads_lungs == old['reads_lungs'] and h.best_baseline.kind == 'image_without_lungs' and h.metadata_baseline.kind == 'metadata'
    assert [b.auc.value for b in audit.baselines] == [b['auc']['value'] for b in raw['floors']]
    assert Audit.from_dict(json.loads(json.dumps(audit.to_dict()))).to_dict() == audit.to_dict()


def test_what_was_not_run_in_version_1_keeps_its_reason():
    audit = read_audit(next(p for p in KEPT if p.name.startswith('pneumonia')))
    assert {n.missing for n in audit.not_run if n.check == 'A9'} == {'time'} or not audit.quick
    assert {n.missing for n in audit.not_run} <= {'time', 'masks', 'pairs', 'external tests', 'out-of-distribution check'}


def test_a_damaged_or_unknown_audit_is_refused(tmp_path):
    assert read_audit(tmp_path) is None
    write_json(tmp_path / 'audit.json', dict(format='covid_cxr audit', version=3))
    with pytest.raises(RunError, match='version 3.*audit'): read_audit(tmp_path)
    write_json(tmp_path / 'audit.json', dict(format='covid_cxr audit', version=1))
    with pytest.raises(RunError, match='damaged'): read_audit(tmp_path)
    write_json(tmp_path / 'audit.json', dict(format='covid_cxr audit', version=2, headline={}))
    with pytest.raises(RunError, match='damaged'): read_audit(tmp_path)


def test_a_headline_without_baselines_claims_nothing():
    h = measure_headline(small_case())
    assert isinstance(h, Headline) and not h.reads_lungs and h.better_than_chance and 'No baseline' in describe_headline(h)
