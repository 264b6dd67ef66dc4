"""Which check finds which planted fault: every phantom of the family by every check.

    python benchmarks/audit_matrix.py                     all checks, 64 px, 160 + 160 patients: about two hours on one core
    python benchmarks/audit_matrix.py --quick             without what costs minutes, but with the networks that see no lung

Each phantom carries one known fault (see covid_cxr.phantom.phantom_family). A small network is trained on its training patients and
audited; beside the verdicts stand its AUC inside, and outside, where the shortcut is broken.
The result replaces benchmarks/results/audit_matrix.json.
"""
import argparse, os, time
os.environ.setdefault('OMP_NUM_THREADS', '1')
from record import RESULTS, about, machine, write_result
from covid_cxr.audit.baselines import estimate_auc, fit_baselines
from covid_cxr.audit.case import measure_headline, phantom_case, worst
from covid_cxr.audit.checks_model import check_lungs_only
from covid_cxr.audit.run import audit_case
from covid_cxr.phantom import FAMILY, phantom_family
from covid_cxr.words import format_number

OUT = RESULTS / 'audit_matrix.json'
PLANTED = dict(P0='nothing planted', P1='lesion', P2='marker', P3='lesion and marker', P4='lesion and site', P4b='site only',
               P5='a random label per patient, split by image')


def outside_auc(name, score, patients, size, seed=0):
    "AUC where the shortcut is broken"
    x, t, _ = phantom_family(name, patients, size=size, seed=10 * seed + 5, broken=True)
    return estimate_auc(t['label'], score(x), t['patient'])


def verdict_row(case, verdicts, headline, outside):
    "AUCs as text, and the gravest verdict of every check"
    lungs_alone = next((v for v in verdicts if v.rule == 'lungs_only'), None) or check_lungs_only(case)[0]
    aucs = {'AUC inside': case.auc.value, 'AUC outside': outside.value, 'AUC trained on lungs alone': lungs_alone.value}
    checks = sorted({v.check for v in verdicts if v.verdict != 'INFO'}, key=lambda code: int(code[1:]))
    return {**{k: format_number(v, 2) for k, v in aucs.items()},
            'AUC gain over the best lung-free baseline': format_number(headline.auc_gain.value, 2, signed=True),
            **{code: worst(verdicts, code) for code in checks}}


def measure(name, patients, size, quick):
    "One phantom: its row, and all verdicts behind it"
    case = phantom_case(name, patients, size, n_boot=2000)
    case.quick = quick
    case.baselines = fit_baselines(case.table, case.small, case.positive, case.split, case.masks, case.masks_from, n_boot=case.n_boot,
                                   seed=case.seed)
    verdicts = audit_case(case).verdicts
    headline = measure_headline(case)
    row = verdict_row(case, verdicts, headline, outside_auc(name, case.score, patients, size))
    return row, dict(headline=headline.to_dict(), verdicts=[v.to_dict() for v in verdicts])


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--quick', action='store_true', help='leave out what costs minutes')
    p.add_argument('--patients', type=int, default=160, help='of each split')
    p.add_argument('--size', type=int, default=64, help='pixels')
    p.add_argument('--phantoms', nargs='+', default=list(FAMILY))
    p.add_argument('--out', default=str(OUT))
    a = p.parse_args()
    rows, details, start = {}, {}, time.perf_counter()
    for name in a.phantoms:
        key = f'{name} {PLANTED[name]}'
        rows[key], details[name] = measure(name, a.patients, a.size, a.quick)
        print(key, rows[key], f'{time.perf_counter() - start:.0f} s', flush=True)
    settings = dict(patients=a.patients, size=a.size, quick=a.quick, seconds=round(time.perf_counter() - start))
    write_result(a.out, dict(about(), machine=machine(), **settings, verdicts=rows, details=details))
