"""The checks checked: every phantom with a known fault by every check that should, or should not, find it, and one case that fails
each check beside one that passes. A check that misses its planted fault, or finds one on a clean phantom, breaks the build;
`benchmarks/audit_matrix.py` is the same at full size."""
import dataclasses, json, shutil
from collections import Counter
from types import SimpleNamespace
import numpy as np, pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.stats import norm
from conftest import ROOT
from covid_cxr.audit import checks_numbers
from covid_cxr.audit.baselines import Baseline, SmallCNN, fit_baselines, fit_small_cnn, gain_over_best
from covid_cxr.audit.case import (CHECKS, RULES, Audit, AuditError, Case, Headline, NotAsked, NotRun, Verdict, VerdictWord, gain_outcome,
                                  measure_headline, phantom_case, read_audit, run_check, worst)
from covid_cxr.audit.checks_model import within_source_auc
from covid_cxr.audit.explain import randomise_weights
from covid_cxr.audit.perturb import recompress
from covid_cxr.audit.regions import blacken, lung_box
from covid_cxr.audit.run import audit_case, case_of_run, checks_table, rules_table
from covid_cxr.audit.sentences import describe_audit, describe_headline, describe_not_run, describe_rule, describe_verdict
from covid_cxr.bundle import DESCRIPTION, MANIFEST, WEIGHTS, writing_files
from covid_cxr.core import RunError, choices, new_table, sha256_file, write_json
from covid_cxr.evaluate import Estimate, evaluate
from covid_cxr.ood import fit_ood_check
from covid_cxr.phantom import FAMILY, make_phantom, phantom_family
from covid_cxr.runs.folder import RunFolder
from covid_cxr.runs.test_log import log_test_evaluation

FINE = ('PASS', 'UNDERPOWERED', 'NOT APPLICABLE')
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
        assert h.better_than_chance == (h.model_auc.low > .5) and h.chosen_on == 'evaluated images'      # no phantom has a validation split
        assert h.reads_lungs == (h.auc_gain.low > 0 and h.model_auc.low > .5 and not h.leaking_groups) == (h.gain_outcome == 'better')
    leaks = {n: h.leaking_groups for n, h in headlines.items()}
    assert leaks.pop('P5') > 50 and not any(leaks.values()), leaks
    assert describe_headline(headlines['P5']).startswith('No headline') and headlines['P2'].gain_outcome == 'not better'


# ---- one case that fails each check, one that passes

def small_case(n=300, signal=2., images=1, seed=0, sharpen=1., side=16, **columns):
    "n test patients and as many for training and validation; the log-odds of the ill are higher by `signal`"
    r, who = np.random.default_rng(seed), np.repeat(np.arange(2 * n), images)
    ill = who % 2 == 1
    logit = signal * (ill - .5) + np.repeat(r.normal(0, signal ** .5, 2 * n), images)
    table = pd.DataFrame(dict(image_id=[f'i{k}' for k in range(len(who))], label=np.where(ill, 'ill', 'well'),
                              group=[f'p{w}' for w in who], split=np.select([who < n, who < n + n // 2], ['test', 'train'], 'valid')))
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
    ill = np.arange(40) % 2
    t = pd.DataFrame(dict(label=np.where(ill, 'ill', 'well'), group=np.arange(40), split='test'))
    return Case(t, x, .2 + .6 * ill, ('well', 'ill'), images=x, network=SmallCNN(torch.nn.Sequential(body, head), zero, 60., (32, 32)),
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


# ---- phantoms: a network that was trained on planted images, asked about others

def uncalibrated(case):
    "The probabilities of the network as it was trained"
    return dataclasses.replace(case, probs=case.network.score(case.small))


def jpeg_in_one_class():
    "Nothing but the traces of a JPEG of quality 30 in one class, and a network that was trained on them"
    parts = {split: phantom_family('P0', 50, (1, 2), size=48, seed=seed) for seed, split in enumerate(('train', 'test'), 1)}
    table = pd.concat([t.assign(split=s, group=t['patient'] + s) for s, (_, t, _) in parts.items()], ignore_index=True)
    x, ill, test = np.concatenate([p[0] for p in parts.values()]), (table['label'] == 1).to_numpy(), (table['split'] == 'test').to_numpy()
    x[ill] = recompress(x[ill], 30)
    net = fit_small_cnn(x[~test], ill[~test], epochs=6, bs=8)
    table = table.assign(label=np.where(ill, 'ill', 'well'))
    return Case(table, x, net.score(x), ('well', 'ill'), images=x[test], score=net.score, n_boot=300)


def women_without_lesions(lesion, nothing):
    "The network of the lesion; the women are called ill by chance, and nothing is seen in their images"
    table = pd.concat([lesion.table.assign(sex='M'), nothing.table.assign(sex='F')], ignore_index=True)
    small = np.concatenate([lesion.small, nothing.small])
    return Case(table, small, lesion.score(small), lesion.classes, n_boot=300)


def by_sex(case):
    "Sex is dealt to patients by chance"
    sex = np.where(pd.factorize(case.table['group'])[0] % 4 < 2, 'F', 'M')
    return dataclasses.replace(case, table=case.table.assign(sex=sex))


def elsewhere(case, name, broken):
    "An external test of a case's network on further patients; `broken`: their images do not have the shortcut"
    images, t, _ = phantom_family(name, 80, (1, 2), size=case.small.shape[1], seed=77, broken=broken)
    found = evaluate(t['label'].to_numpy(), case.score(images), t['patient'].to_numpy(), case.threshold, n_boot=300)
    test = SimpleNamespace(name=name, n_images=len(t), n_groups=t['patient'].nunique(), one_class=False, estimates=found.estimates,
                           false_positive_rate=None)
    return dataclasses.replace(case, external_tests=(test,))


def lungs_alone(case):
    "A network that sees nothing but the lung box"
    x = blacken(case.small, ~lung_box(*case.small.shape[1:]))
    net = fit_small_cnn(x[case.train], case.y_all[case.train])
    return dataclasses.replace(case, small=x, images=x[case.evaluated], probs=net.score(x), score=net.score, network=net)


def weights_lost(case):
    "The weights of the trained network replaced by random ones: no training makes a map that ignores what was learned"
    net = case.network
    lost = SmallCNN(randomise_weights(net.net, case.seed), net.mean, net.std, net.size)
    return dataclasses.replace(case, network=lost)


MADE_OF = {   # check -> what becomes of the audited phantoms: a case that it must find something in, the verdict, one that it must pass
    'check_acquisition': (lambda of: jpeg_in_one_class(), 'WARN', lambda of: of['P1']),
    'check_calibration': (lambda of: uncalibrated(of['P1']), 'WARN', lambda of: of['P1']),
    'check_subgroups': (lambda of: women_without_lesions(of['P1'], of['P0']), 'FAIL', lambda of: by_sex(of['P1'])),
    'check_external': (lambda of: elsewhere(of['P2'], 'P2', True), 'FAIL', lambda of: elsewhere(of['P1'], 'P1', False)),
    'check_maps': (lambda of: weights_lost(of['P1']), 'WARN', lambda of: lungs_alone(of['P1'])),
}


@pytest.mark.parametrize('name', MADE_OF)
def test_check_on_what_becomes_of_phantoms(audited, name):
    bad, verdict, good = MADE_OF[name]
    of = {phantom: case for phantom, (case, *_) in audited.items()}
    assert (answers(name, bad(of)), answers(name, good(of))) == (verdict, 'PASS')


def foreign_weights(run, out):
    "A copy of a run with other weights and the hash that belongs to them: the files are in order, the model is not that of the run"
    shutil.copytree(run, out, ignore=shutil.ignore_patterns('cache', 'checkpoints'))
    bundle = out / 'bundle'
    weights = {k: v.flip(0).contiguous() if v.ndim == 4 else v for k, v in load_file(bundle / WEIGHTS).items()}
    names = [WEIGHTS, DESCRIPTION]
    with writing_files(out, [f'bundle/{name}' for name in (*names, MANIFEST)]), writing_files(bundle, names):
        save_file(weights, bundle / WEIGHTS)
        b = json.loads((bundle / DESCRIPTION).read_text())
        write_json(bundle / DESCRIPTION, {**b, 'weights': {**b['weights'], 'sha256': sha256_file(bundle / WEIGHTS)}})
    return out


def test_check_stored_numbers(phantom_run, tmp_path):
    "A run as training left it, and the same one with other weights; a NaN never gets here, because no bundle with one is read"
    whole, foreign = (case_of_run(run, tmp_path / 'cache', copies=False, n_boot=100)
                      for run in (phantom_run, foreign_weights(phantom_run, tmp_path / 'run')))
    assert (answers('check_stored_numbers', foreign), answers('check_stored_numbers', whole)) == ('FAIL', 'PASS')
    assert [v.verdict for v in run_check(CHECKS['check_stored_numbers'], foreign)] == ['FAIL', 'PASS']     # the numbers fit


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
    for v in verdicts: assert describe_verdict(v) and json.dumps(v.facts) is not None      # can be told, and kept as plain JSON
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
    "The number of evaluations is that of the log; how many trainings there were is not known, sibling runs or not"
    run = tmp_path / 'run'
    for folder in (run, tmp_path / 'run-seed1'): write_json(folder / 'run.json', dict(status='training'))
    for what in ('train', 'audit', 'compare'): log_test_evaluation(run, what, metrics=dict(auc=.9))
    seen, spread = run_check(CHECKS['check_history'], dataclasses.replace(small_case(), folder=RunFolder.open(run, finished=False)))
    assert (seen.value, seen.verdict, spread.value, spread.verdict) == (3, 'INFO', 1, 'INFO')
    assert 'whether others were made' in describe_verdict(spread)


def test_check_ood(audited):
    case = audited['P1'][0]
    train = case.small[case.train]
    upside_down, upright = (dataclasses.replace(case, ood=fit_ood_check(x)) for x in (train[:, ::-1], train))
    assert [run_check(CHECKS['check_ood'], c)[0].verdict for c in (upside_down, upright)] == ['WARN', 'PASS']


def test_check_held_out_clusters():
    "The ill of the site of the well, held out whole, are predicted well; the worst cluster is never better than patients at random"
    fall = {}
    for name in ('P4b', 'P1'):
        images, t, _ = phantom_family(name, 420, (1, 1), size=48, seed=5)
        split = np.where(np.arange(len(t)) < 380, 'train', 'test')
        t = t.assign(group=t['patient'], label=np.where(t['label'] == 1, 'ill', 'well'), split=split)
        case = Case(t, images, np.full(len(t), .5), ('well', 'ill'))
        specificity, sensitivity = run_check(CHECKS['check_held_out_clusters'], case)
        assert {specificity.verdict, sensitivity.verdict} == {'INFO'} and specificity.low <= specificity.value <= specificity.high
        fall[name] = max(v.facts['usual'] - v.value for v in (specificity, sensitivity))
    assert fall['P4b'] > .3 and fall['P1'] > 0
    short = dataclasses.replace(case, table=case.table.assign(split=np.where(np.arange(len(t)) < 60, 'train', 'test')))
    assert [v.verdict for v in run_check(CHECKS['check_held_out_clusters'], short)] == ['UNDERPOWERED']


def test_every_check_of_the_registry_is_tested_here():
    alone = {n.removeprefix('test_') for n in globals() if n.startswith('test_check_')}
    told = {*HAND_MADE, *ON_PHANTOMS, *MADE_OF, *alone, *(n.removesuffix('_is_no_cure_on_p4b') for n in alone)}
    told |= {'check_splits', 'check_label_noise', 'check_one_class_sources'}                        # tests/test_faults.py
    assert set(CHECKS) <= told


# ---- no PASS without a question

def bare(**columns):
    "One split, no patient, one value in every column"
    case = small_case(n=60)
    table = case.table[['image_id', 'label', 'group']].assign(split='test', source='mine', view='AP', sex='M', age_years=50., **columns)
    return dataclasses.replace(case, table=table, baselines=[], pairs=pd.DataFrame(columns=['a', 'b', 'verdict']))


def one_class():
    "The evaluated images are all ill; a model, black images, a check of what is no radiograph, and one external test"
    case = small_case(n=120, sex=np.where(np.arange(240) % 4 < 2, 'F', 'M'), source=np.where(np.arange(240) % 8 < 4, 'A', 'B'))
    keep = ~case.evaluated | (case.y_all == 1)
    case = dataclasses.replace(case, table=case.table[keep], small=case.small[keep], probs=case.probs[keep])
    outside, images = external_case(Estimate(.9, .85, .95, 9)).external_tests, case.small[case.evaluated]
    return dataclasses.replace(case, images=images, score=lambda x: np.resize(case.p, len(x)), baselines=[], external_tests=outside,
                               features=lambda x: np.zeros((len(x), 3)))


def blank_baselines():
    "Baselines of every kind that give all images one score"
    case, names = small_case(), {'image_without_lungs': 'edge', 'file': 'file properties', 'metadata': 'metadata'}
    blank = [Baseline(name, kind, 'nothing', Estimate(.5, .5, .5, len(case.y)), np.full(len(case.y), .5)) for kind, name in names.items()]
    return dataclasses.replace(case, baselines=blank)


def chosen_here():
    "No test split: the threshold was chosen on the images that are evaluated"
    case = small_case()
    split = case.table['split'].replace(dict(test='valid', valid='train'))
    return dataclasses.replace(case, table=case.table.assign(split=split), split='valid')


def without_patients(): return dataclasses.replace(small_case(), table=small_case().table.assign(patient=np.nan))


def black_maps(): return dataclasses.replace(bright_case(slice(12, 20), 60., 0), images=np.zeros((40, 32, 32), np.uint8))


def nothing_stored():
    case = stored_case(0)
    folder = SimpleNamespace(path=None, result=dataclasses.replace(case.evaluation, estimates={}))
    return dataclasses.replace(case, folder=folder, score=lambda x: case.p * np.nan)


EMPTY = {   # check -> cases in which there is nothing to ask, or no answer can be had
    'check_groups': (bare, without_patients), 'check_duplicates': (bare,),
    'check_file_properties': (blank_baselines,), 'check_metadata': (blank_baselines,), 'check_image_without_lungs': (blank_baselines,),
    'check_gain': (blank_baselines,), 'check_occlusion': (one_class,), 'check_markers': (one_class,), 'check_acquisition': (one_class,),
    'check_within_source': (bare, one_class), 'check_source_signal': (one_class,), 'check_left_out_source': (bare,),
    'check_permutation': (bare,), 'check_permutation_training': (bare,), 'check_threshold': (one_class, chosen_here),
    'check_calibration': (one_class, chosen_here), 'check_subgroups': (bare, one_class), 'check_stored_numbers': (nothing_stored,),
    'check_external': (one_class, lambda: external_case(Estimate())), 'check_maps': (black_maps,),
    'check_splits': (bare, chosen_here), 'check_label_noise': (one_class, lambda: small_case(n=4)), 'check_one_class_sources': (bare,),
    'check_held_out_clusters': (bare,),
    'check_splits': (bare,), 'check_label_noise': (one_class,),
}
# these report, warn where nothing is recorded, or ask the images themselves
ALWAYS_ASKED = {'check_patient_id_signal', 'check_lungs_only', 'check_precision', 'check_predictive_values', 'check_history', 'check_ood'}


@pytest.mark.parametrize('name,case', [(n, c) for n, cases in EMPTY.items() for c in cases])
def test_nothing_passes_where_there_is_no_question(name, case):
    "Nothing recorded, one value, one class, one split, the threshold chosen here, constant baselines, empty maps, no stored number"
    verdicts = [v for v in run_check(CHECKS[name], case()) if v.rule != 'frozen_threshold' or case is not one_class]
    assert 'PASS' not in {v.verdict for v in verdicts}, [(v.name, v.verdict) for v in verdicts]
    for v in verdicts:
        if v.verdict == 'NOT APPLICABLE': assert v.facts['why'] in choices(NotAsked) and 'nan' not in describe_verdict(v)


def test_every_check_has_an_empty_case_or_reports_only(): assert set(EMPTY) | ALWAYS_ASKED >= set(CHECKS)


def test_not_applicable_is_graver_than_pass_counted_and_shown_with_all():
    verdicts = run_check(CHECKS['check_threshold'], chosen_here())
    assert worst(verdicts, 'A13') == 'NOT APPLICABLE' and [v.facts['why'] for v in verdicts] == ['chosen here'] * 2
    audit = an_audit(dataclasses.replace(chosen_here(), baselines=[]), verdicts, [])
    assert audit.counts['NOT APPLICABLE'] == 2 and '2 NOT APPLICABLE' in describe_audit(audit)
    assert 'chosen on these very images' not in describe_audit(audit) and describe_audit(audit, every=True).count('NOT APPLICABLE A13') == 2


# ---- the headline: leaks, defeat, the best of several

def bright_edge(split_by, patients=150, seed=3):
    "Three images per patient; the edge is brighter in the ill, and the model reads it, and it knows patients by their own brightness"
    r = np.random.default_rng(seed)
    who, ill = np.repeat(np.arange(patients), 3), np.repeat(r.permutation(np.arange(patients) % 2), 3)
    small = r.integers(90, 110, (len(who), 32, 32)) + r.integers(0, 12, patients)[who][:, None, None]
    small[:, :3, :] += (6 * ill)[:, None, None]
    p = 1 / (1 + np.exp(-(small[:, :3].mean((1, 2)) - 108) / 3 - .5 * r.standard_normal(len(who))))
    by = np.repeat(r.random(patients) < .3, 3) if split_by == 'patient' else r.random(len(who)) < .3
    table = pd.DataFrame(dict(label=np.where(ill, 'ill', 'well'), group=who.astype(str), split=np.where(by, 'test', 'train')))
    case = Case(table, small.astype(np.uint8), p, ('well', 'ill'), n_boot=300)
    return dataclasses.replace(case, baselines=fit_baselines(table, case.small, 'ill', retrain=False, n_boot=0))


def test_a_leak_gives_the_baselines_the_same_patients_and_takes_the_headline_away():
    leaking, honest = bright_edge('image'), bright_edge('patient')
    assert all((b.scores != .5).all() for b in leaking.baselines)              # no baseline is mute for the patients that the model knows
    h = measure_headline(leaking)
    assert h.leaking_groups > 50 and not h.reads_lungs and h.gain_outcome == h.metadata_outcome == 'not known'
    assert describe_headline(h).startswith(f'No headline: {h.leaking_groups} patient groups of the evaluated split stand in training')
    assert measure_headline(honest).leaking_groups == 0 and not describe_headline(measure_headline(honest)).startswith('No headline')
    audit = an_audit(leaking, run_check(CHECKS['check_gain'], leaking), [])
    assert 'gain over it' not in describe_audit(audit) and worst(audit.verdicts, 'A12') == 'NOT APPLICABLE'


def test_an_audit_without_the_count_of_a_leaking_run_claims_nothing(tmp_path):
    case = small_case()
    case.baselines = with_baseline('edge', 'image_without_lungs', .01).baselines
    old = an_audit(case, [], []).to_dict()
    assert old['headline']['reads_lungs']
    for key in ('leaking_groups', 'chosen_on', 'metadata_chosen_on'): del old['headline'][key]
    write_json(tmp_path / 'audit.json', old)
    assert read_audit(tmp_path).headline.reads_lungs and read_audit(tmp_path).headline.leaking_groups is None
    write_json(tmp_path / 'run.json', dict(status='finished', leaking_groups=7))
    assert (read_audit(tmp_path).headline.reads_lungs, read_audit(tmp_path).headline.leaking_groups) == (False, 7)


def outcomes(auc, baseline, samples=100, patients=60):
    "Outcomes of gains over one baseline, and how often the interval holds zero"
    r, found, zero = np.random.default_rng(0), [], 0
    ill = (np.arange(patients) < .4 * patients).astype(int)
    for _ in range(samples):
        s, b = (norm.cdf(r.normal(size=patients) + 2 ** .5 * norm.ppf(a) * ill) for a in (auc, baseline))
        made = [Baseline('one', 'image_without_lungs', 'drawn', evaluate(ill, b, n_boot=0)['auc'], b)]
        gain = gain_over_best(ill, s, np.arange(patients), made, 'image_without_lungs', n_boot=200).gain
        found.append(gain_outcome(gain))
        zero += gain.low <= 0
    return Counter(found), zero


def test_a_small_sample_is_no_defeat_and_equal_models_are_not_better():
    "60 patients: a model that is better by .10 is hardly ever called 'not better', although most intervals hold zero"
    found, zero = outcomes(.80, .70)
    assert found['not better'] <= 10 and zero > 60, (found, zero)
    assert outcomes(.75, .75)[0]['better'] <= 7


def test_the_measured_rates_of_the_headline_hold():
    kept = json.loads((ROOT / 'benchmarks/results/headline_rates.json').read_text())
    rows, error = pd.DataFrame(kept['rates']), lambda p: 2 * (p * (1 - p) / kept['samples']) ** .5
    better, equal = rows[rows['true_gain'] > 0], rows[rows['true_gain'] == 0]
    assert set(rows['patients']) == {60, 150} and set(rows['baselines']) == {1, 8} and len(better) == len(equal)
    assert (better['not better'] <= .05 + error(.05)).all() and (equal['better'] <= .025 + error(.025)).all()
    assert (better['plain_defeat'][better['patients'] == 60] > .5).all()       # what the rule before would have said
    on_valid = rows[(rows['chosen_on'] == 'validation split') & (rows['true_gain'] == .15)]
    assert (abs(on_valid['mean_gain'] - .15) < .03).all() and (on_valid['plain_gain'] < .11).all()


def test_numbers_without_an_interval_are_never_printed_as_nan():
    case = dataclasses.replace(with_baseline('edge', 'image_without_lungs', .01), n_boot=0)
    blind = dataclasses.replace(case.baselines[0], auc=Estimate(.5))
    case.baselines = [blind, dataclasses.replace(blind, name='year', kind='metadata')]
    checks = ('check_gain', 'check_threshold', 'check_image_without_lungs', 'check_metadata')
    audit = an_audit(case, [v for c in checks for v in run_check(CHECKS[c], case)], [])
    unknown = dataclasses.replace(audit.headline, auc_gain=Estimate(.1), auc_gain_over_metadata=Estimate())
    assert unknown.gain_outcome == unknown.metadata_outcome == 'not known'
    for text in (describe_audit(audit, every=True), describe_audit(dataclasses.replace(audit, headline=unknown))): assert 'nan' not in text


def test_metadata_that_are_the_same_for_all_give_no_pass():
    "One source, and nothing else recorded: A4 and A12 do not praise the model for beating it"
    case = small_case(source='mine')
    noise = np.random.default_rng(0).integers(0, 255, (600, 32, 32)).astype(np.uint8)
    case.baselines = fit_baselines(case.table, noise, 'ill', retrain=False, n_boot=100)
    verdicts = [v for c in ('check_metadata', 'check_gain') for v in run_check(CHECKS[c], case) if 'metadata' in v.name]
    assert [v.verdict for v in verdicts] == ['NOT APPLICABLE'] * 2 and measure_headline(case).metadata_baseline is None
    assert {b.kind: np.isfinite(b.valid_auc) for b in case.baselines} == dict(image_without_lungs=True, metadata=True)
    assert measure_headline(case).chosen_on == 'validation split'


# ---- registry, rules, thresholds

def test_the_registry_is_whole():
    assert list(dict.fromkeys(checks_table()['code'])) == [f'A{k}' for k in range(1, 26)]
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
    assert {n.check for n in not_run if n.missing == 'subject'} == {'A3', 'A4', 'A8', 'A24'}      # no file, metadata or source is recorded
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


def test_near_images_of_one_patient_are_further_images_and_copies_under_two_are_named():
    def verdicts(a, b, kind):
        case = with_pair(a, b)
        people = case.table['group'].replace(dict(p1='p0'))
        case = dataclasses.replace(case, table=case.table.assign(patient=people), pairs=case.pairs.assign(kind=kind))
        return CHECKS['check_duplicates'].run(case)
    said = {v.rule: v for v in verdicts('i0', 'i1', 'near')}
    assert [v.verdict for v in said.values()] == ['PASS', 'PASS', 'PASS', 'INFO'] and said['further_images'].value == 1
    assert 'further images' in describe_verdict(said['further_images']) and 'repeat' not in describe_verdict(said['copies_within'])
    assert {v.rule: v.verdict for v in verdicts('i0', 'i1', 'pixels')}['copies_within'] == 'WARN'              # equal pixels are a copy
    two = {v.rule: v for v in verdicts('i2', 'i3', 'near')}
    assert two['copies_between_patients'].verdict == two['copies_within'].verdict == 'WARN'
    assert 'i2 of p2 = i3 of p3' in describe_verdict(two['copies_between_patients'])


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

KEPT = sorted(p.parent for p in (ROOT / 'tests/audits_version_1').glob('*/audit.json'))


@pytest.mark.parametrize('run', KEPT, ids=lambda p: p.name)
def test_an_audit_of_version_1_is_read_number_by_number(run):
    raw, audit = json.loads((run / 'audit.json').read_text()), read_audit(run)
    counts = dict.fromkeys(choices(VerdictWord), 0) | raw['verdicts']
    assert raw['version'] == 1 and audit.counts == counts and len(audit.not_run) == len(raw['not_run'])
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


def test_images_of_unknown_patients_are_counted_in_groups():
    case = without_patients()
    said = [describe_verdict(v) for name in ('check_precision', 'check_splits') for v in run_check(CHECKS[name], case)]
    assert 'over groups' in said[0] and not any('patients' in text for text in said), said
    assert any('of the patients' in describe_verdict(v).lower() for v in run_check(CHECKS['check_splits'], small_case()))


def test_a_headline_without_baselines_claims_nothing():
    h = measure_headline(small_case())
    assert isinstance(h, Headline) and not h.reads_lungs and h.better_than_chance and 'No baseline' in describe_headline(h)
