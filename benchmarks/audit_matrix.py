"""Which audit finds which planted fault: every phantom of the family by every audit.

    python benchmarks/audit_matrix.py                     all audits, 64 px, 160 + 160 patients: about an hour on two cores
    python benchmarks/audit_matrix.py --quick             without what costs minutes

Each phantom carries one known fault (see covid_cxr.phantom.phantom_family). A small network is trained on its training patients and audited; beside the
verdicts stand its AUC inside, and outside, where the shortcut is broken. The result replaces benchmarks/results/audit_matrix.json.
"""
import argparse, json, os, platform, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault('OMP_NUM_THREADS', '1')
import numpy as np, pandas as pd
from covid_cxr.audit.checks import Case, audit_case, check_lungs_only, headline, worst
from covid_cxr.core import versions
from covid_cxr.evaluate import evaluate
from covid_cxr.phantom import FAMILY, phantom_family
from covid_cxr.audit.small_cnn import fit_small_cnn

OUT = ROOT / 'benchmarks/results/audit_matrix.json'
WORDS = dict(P0='nothing planted', P1='lesion', P2='marker', P3='lesion and marker', P4='lesion and site', P4b='site only', P5='a random label per patient, split by image')


def phantom_case(name, patients=160, size=64, seed=0, n_boot=1000, epochs=8):
    "Training and test patients of one phantom and a network trained on them; P5 is split by image -> Case, the network"
    if name == 'P5':
        x, t, m = phantom_family(name, patients, size=size, seed=seed)
        t = t.assign(split=np.where(np.random.default_rng(seed).random(len(t)) < .5, 'train', 'test'))
    else:
        parts = [(s, *phantom_family(name, patients, size=size, seed=10 * seed + k)) for k, s in enumerate(('train', 'test'))]
        t = pd.concat([t.assign(split=s, patient=t['patient'] + s) for s, _, t, _ in parts], ignore_index=True)
        x, m = (np.concatenate([p[i] for p in parts]) for i in (1, 3))
    t = t.assign(group=t['patient'], label=np.where(t['label'] == 1, 'ill', 'well'))
    t = t if FAMILY[name].has_site else t.drop(columns='site')
    test = (t['split'] == 'test').to_numpy()
    net = fit_small_cnn(x[~test], (t['label'] == 'ill')[~test], seed=seed, epochs=epochs)
    return Case(t, x, net.score(x), ('well', 'ill'), films=x[test], score=net.score, features=net.features, masks=m, film_masks=m[test],
                operating_point=dict(goal='fixed=0.5'), n_boot=n_boot, seed=seed), net


def outside_auc(name, net, patients, size, seed=0):
    "AUC where the shortcut is broken"
    x, t, _ = phantom_family(name, patients, size=size, seed=10 * seed + 5, broken=True)
    return evaluate(t['label'], net.score(x), t['patient'], n_boot=500)['auc']


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--quick', action='store_true')
    p.add_argument('--patients', type=int, default=160)
    p.add_argument('--size', type=int, default=64)
    p.add_argument('--phantoms', nargs='+', default=list(FAMILY))
    p.add_argument('--out', default=str(OUT))
    a = p.parse_args()
    verdicts, details, start = {}, {}, time.perf_counter()
    for name in a.phantoms:
        case, net = phantom_case(name, a.patients, a.size)
        rows, floors, _ = audit_case(case, a.quick)
        alone = next((r for r in rows if r.name == 'network trained on the lungs alone'), None) or check_lungs_only(case)[0]
        out = outside_auc(name, net, a.patients, a.size)
        audits = sorted({r.audit for r in rows if r.verdict != 'INFO'}, key=lambda v: int(v[1:]))
        verdicts[f'{name} {WORDS[name]}'] = {'AUC inside': f'{case.auc.value:.2f}', 'AUC outside': f'{out.value:.2f}', 'AUC trained on lungs alone': f'{alone.value:.2f}', 'AUC above the floor': f"{headline(case, floors)['floor_adjusted_auc']['value']:+.2f}", **{k: worst(rows, k) for k in audits}}
        details[name] = dict(headline=headline(case, floors), rows=[r.to_dict() for r in rows])
        print(name, verdicts[f'{name} {WORDS[name]}'], f'{time.perf_counter() - start:.0f} s', flush=True)
    from keep_run import cpu_model
    Path(a.out).write_text(json.dumps(dict(command=' '.join(['python benchmarks/audit_matrix.py', *sys.argv[1:]]), date=time.strftime('%Y-%m-%d'), versions=versions(), machine=dict(cpu=cpu_model(), cores=os.cpu_count(), threads=1, system=platform.system()),
                                           patients=a.patients, size=a.size, quick=a.quick, seconds=round(time.perf_counter() - start), verdicts=verdicts, details=details), indent=1) + '\n')
