"""Which audit check names which planted fault, and how often a check alarms where nothing is planted.

    python benchmarks/faults.py                    7 faults x 3 seeds, and 20 + 20 collections without a fault: half an hour on one core
    python benchmarks/faults.py --part labels      one part alone: faults, alarms, labels, perfect or copies; the others are kept
    python benchmarks/faults.py --seeds 2          fewer collections without a fault; --fault-seeds 1: of each fault
    python benchmarks/faults.py --resume           go on where the last one stopped; audits that are done are not done again

Every collection is made by covid_cxr.audit.faults: files, a split, a small network, one known fault or none. It is audited as
'covid-cxr audit --quick' does, and `clean` as the whole audit does, with an external test on further patients of the same kind
(networks are trained on shuffled labels in the first five of them only: that takes longer than all the rest).
"Named" means that the verdict which must name the fault is a FAIL or a WARN. An alarm is a FAIL or a WARN of a collection in which nothing
is planted: `clean` has a lesion that the model reads, `nothing` has labels without a meaning (there A12 is right to say FAIL).
Perfect: how often calibration (A14) gets a WARN where labels are drawn from the probabilities themselves.
Labels: the check of wrong labels (A23) on made-up log-odds, beside the counts of confident learning (images whose probability of the other
class is above the mean probability of that class among its own images). Copies: phantoms, and real radiographs where CXR_DATA has them,
turned and hidden among other patients; cost: CPU seconds of the search with and without the turned variants.
The result is benchmarks/results/faults.json.
"""
import argparse, contextlib, hashlib, json, os, tempfile, time, warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
os.environ.setdefault('OMP_NUM_THREADS', '1')
from record import RESULTS, about, machine, write_result
import numpy as np, pandas as pd
from PIL import Image
from covid_cxr import duplicates
from covid_cxr.audit.case import CHECKS, Case, Verdict, run_check
from covid_cxr.audit.checks_splits import label_noise_verdict, measure_label_noise
from covid_cxr.audit.faults import PLANTED, fault_case, further_images, naming_verdicts
from covid_cxr.audit.run import audit_case, stated_rates
from covid_cxr.audit.sentences import describe_verdict
from covid_cxr.core import data_folder, write_json
from covid_cxr.duplicates import find_near, nearest_hashes, wave_hash
from covid_cxr.evaluate import evaluate
from covid_cxr.images import read_grey, to_8bit
from covid_cxr.phantom import make_phantom

OUT = RESULTS / 'faults.json'
CLEAN = ('clean', 'nothing')
PATIENTS = {'label noise': 320}     # the others: 200. Whether a fifth of the labels is wrong takes some hundred evaluated images
SHUFFLED = 5      # clean collections for which networks are trained on shuffled labels, too


# ---- faults and false alarms
class Done:
    "Audits that are done, kept in a file until the whole measurement is"
    def __init__(self, file, resume):
        self.file, source = Path(file), Path(fault_case.__code__.co_filename).parent
        self.code = hashlib.sha256(b''.join(f.read_bytes() for f in sorted(source.glob('*.py')))).hexdigest()[:12]
        self.kept = json.loads(self.file.read_text()) if resume and self.file.exists() else {}

    def __call__(self, fault, seed):
        "The verdicts of one collection, and the AUC of its model"
        key = f'{self.code} {fault} {PATIENTS.get(fault, "")} {seed}'                      # of this very code
        if key not in self.kept:
            verdicts, auc = audit_fault(fault, seed)
            self.kept[key] = dict(verdicts=[v.to_dict() for v in verdicts if v.verdict in ('FAIL', 'WARN')], auc=auc)
            write_json(self.file, self.kept)
        return [Verdict.from_dict(v) for v in self.kept[key]['verdicts']], self.kept[key]['auc']


def elsewhere(case, seed):
    "An external test on further patients of the same kind"
    images, ill = further_images('clean', 120, 4000 + seed)
    estimates = evaluate(ill.astype(int), case.score(images), None, case.threshold, n_boot=case.n_boot).estimates
    n = dict(n_images=len(ill), n_groups=len(ill))
    return SimpleNamespace(name='further patients', one_class=False, estimates=estimates, false_positive_rate=None, **n)


@contextlib.contextmanager
def shuffles_left_out(leave):
    "Without the check that trains twenty networks on shuffled labels, which takes longer than all others together"
    name = 'check_permutation_training'
    check = CHECKS.pop(name) if leave else None
    try: yield
    finally:
        if leave: CHECKS[name] = check


def audit_fault(fault, seed):
    "The verdicts of one collection, and the AUC of its model; copies are searched for where they matter"
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        case = fault_case(fault, folder, PATIENTS.get(fault, 200), seed, n_boot=400, copies=fault in ('clean', 'turned copies'))
        if fault == 'clean': case.quick, case.external_tests = False, (elsewhere(case, seed),)
        with shuffles_left_out(seed >= SHUFFLED): return audit_case(case).verdicts, case.auc.value


def measure_faults(seeds, audited):
    "Every fault over some seeds: the verdicts that must name it, and the sentence of the first"
    out = {}
    for fault in (f for f in PLANTED if f not in CLEAN):
        found = [naming_verdicts(fault, audited(fault, seed)[0]) for seed in seeds]
        out[fault] = [named_row(code, name, found) for code, name in PLANTED[fault]]
        print(fault, [r['verdicts'] for r in out[fault]], flush=True)
    return out


def named_row(code, name, found):
    "One verdict that must name a fault, over all seeds"
    rows = [next((v for v in verdicts if v.check == code and v.name.startswith(name)), None) for verdicts in found]
    sentence = next((describe_verdict(v) for v in rows if v), '')
    return dict(check=code, name=name, verdicts=[v.verdict if v else 'not named' for v in rows], sentence=sentence)


def alarms_of(verdicts):
    "'A5 four corners: FAIL', for every FAIL and WARN"
    return sorted({f'{v.check} {v.name.split(":")[0]}: {v.verdict}' for v in verdicts if v.verdict in ('FAIL', 'WARN')})


def measure_alarms(name, seeds, audited):
    "FAIL and WARN where nothing is planted"
    rows = []
    for seed in seeds:
        verdicts, auc = audited(name, seed)
        rows.append(dict(seed=seed, auc=round(auc, 3), alarms=alarms_of(verdicts)))
        print(name, rows[-1], flush=True)
    counts = Counter(a for r in rows for a in r['alarms'])
    checks = Counter(code for r in rows for code in {a.split()[0] for a in r['alarms']})
    rates = {k: round(n / len(rows), 3) for k, n in sorted(checks.items())}
    return dict(seeds=list(seeds), collections=rows, alarms=dict(sorted(counts.items())), rate_per_check=rates, stated_rates=stated_rates())


# ---- calibration of perfect models
def perfect_case(apart, patients, r):
    "One or two images per patient; labels follow from the log-odds: their classes lie `apart` standard deviations apart"
    who = np.repeat(np.arange(patients), r.integers(1, 3, patients))
    ill = r.permutation(np.arange(patients) % 2)
    s = apart * (ill - .5)[who] + .8 * r.normal(size=patients)[who] + .6 * r.normal(size=len(who))
    table = pd.DataFrame(dict(label=np.where(ill[who], 'ill', 'well'), group=who, split='test'))
    return Case(table, np.zeros((len(who), 16, 16), np.uint8), 1 / (1 + np.exp(-apart * s)), ('well', 'ill'), n_boot=400)


def measure_perfect(samples=300, patients=70):
    "Share of perfect models with a WARN: by the interval of the slope alone, and by the two rules of A14"
    r, rows = np.random.default_rng(0), []
    for apart in (1, 2, 3, 4):
        alone, warned = 0, 0
        for _ in range(samples):
            slope, error = run_check(CHECKS['check_calibration'], perfect_case(apart, patients, r))
            alone += slope.high < 1 or slope.low > 1
            warned += 'WARN' in (slope.verdict, error.verdict)
        rows.append(dict(apart=apart, patients=patients, samples=samples, interval_alone=alone / samples, A14=warned / samples))
        print(rows[-1], flush=True)
    return rows


# ---- wrong labels
MODELS = {   # name -> standard deviations between the classes, share of wrong labels, long tail towards the other class
    'weak, AUC .71': (.8, 0, False), 'weak, AUC .76': (1, 0, False), 'middling, AUC .86': (1.5, 0, False), 'good, AUC .96': (2.5, 0, False),
    'weak, some of the ill look healthy': (1, 0, True), 'good, some of the ill look healthy': (3, 0, True),
    'good, 10 % wrong': (3.5, .1, False), 'good, 20 % wrong': (3.5, .2, False), 'very good, 10 % wrong': (5, .1, False)}


def draw_model(signal, wrong, tail, n, r):
    "Labels and probabilities of n images"
    y = np.arange(n) % 2
    noise = (r.gumbel(size=n) - .577) / 1.28 * np.where(y, -1, 1) if tail else r.normal(size=n)
    return y ^ (r.random(n) < wrong), 1 / (1 + np.exp(-(signal * (y - .5) + noise) * signal))


def confident_learning(y, p):
    "Share of the images that the counts of confident learning call wrong"
    bar = [(1 - p[y == 0]).mean(), p[y == 1].mean()]
    return float(np.mean(np.where(y == 1, (1 - p >= bar[0]) & (p < .5), (p >= bar[1]) & (p > .5))))


def measure_labels(samples=200, n=240):
    "The check of wrong labels on models of known kind"
    r, rows = np.random.default_rng(0), []
    for name, how in MODELS.items():
        drawn = [draw_model(*how, n, r) for _ in range(samples)]
        found = [measure_label_noise(y, p, np.arange(n)) for y, p in drawn]
        words = Counter(label_noise_verdict(f) for f in found)
        rows.append(dict(model=name, wrong=how[1], images=n, **{w: words[w] / samples for w in ('WARN', 'UNDERPOWERED', 'PASS')},
                         estimate=round(float(np.mean([f.share.value for f in found])), 3),
                         confident_learning=round(float(np.mean([confident_learning(y, p) for y, p in drawn])), 3)))
    return rows


# ---- turned copies
def turned(degrees): return lambda a: np.asarray(Image.fromarray(a).rotate(degrees, Image.Resampling.BILINEAR))


TURNS = {'1 degree': turned(1), '5 degrees': turned(-5), '8 degrees': turned(8), '10 degrees': turned(10), '12 degrees': turned(-12),
         '15 degrees': turned(15), 'quarter turn': lambda a: np.rot90(a), 'upside down': lambda a: np.rot90(a, 2),
         'mirrored': lambda a: a[:, ::-1], 'flipped': lambda a: a[::-1], 'quarter turn, mirrored': lambda a: np.rot90(a)[:, ::-1],
         'quarter turn and 3 degrees': lambda a: turned(3)(np.ascontiguousarray(np.rot90(a)))}


def phantom_pictures(n): return [make_phantom(11, p, 0, 256, aspect=(1, 1.15, .85)[p % 3]).image for p in range(n)]


def real_pictures(n):
    "Radiographs of n children, or None where the collection is not there"
    files = sorted((data_folder() / 'chest-xray-pneumonia').rglob('*.jpeg'))
    if len(files) < n: return None
    one_each = {f.name.split('_')[0] if f.name.startswith('person') else f.name.rsplit('-', 1)[0]: f for f in files}
    chosen = np.random.default_rng(0).permutation(sorted(one_each))[:n]
    return [to_8bit(read_grey(one_each[k])) for k in chosen]


def write_pictures(folder, pictures, start=0):
    "Pictures as JPEG files -> rows of a table"
    rows = []
    for k, a in enumerate(pictures, start):
        Image.fromarray(np.ascontiguousarray(a)).save(f'{folder}/{k}.jpg', quality=75)
        rows.append(dict(image_id=str(k), path=f'{folder}/{k}.jpg'))
    return rows


def recall_of_turns(pictures, copied):
    "Each turn: how many copies of the first `copied` pictures are found, and pairs of different pictures that are joined"
    out = {}
    with tempfile.TemporaryDirectory() as folder:
        rows = write_pictures(folder, pictures)
        for name, turn in TURNS.items():
            copies = write_pictures(folder, [turn(a) for a in pictures[:copied]], len(pictures))
            pairs = find_near(pd.DataFrame(rows + copies), f'{folder}/prints.npz')
            sure = pairs.loc[pairs['verdict'] == 'duplicate', ['a', 'b']].astype(int).to_numpy()
            right = {int(b - len(pictures)) for a, b in np.sort(sure, 1) if b - len(pictures) == a}
            out[name] = dict(copies=copied, found=len(right), wrong_pairs=len(sure) - len(right), others=len(pictures) - copied)
            for c in copies: Path(c['path']).unlink()
    return out


def search_seconds(hashes):
    start = time.process_time()
    nearest_hashes(hashes)
    return time.process_time() - start


def measure_copies():
    "Recall of turned copies, and what looking for them costs"
    sets = dict(phantoms=(phantom_pictures(40), 10), radiographs=(real_pictures(60), 12))
    recall = {}
    for where, (pictures, copied) in sets.items():
        if pictures is None: continue
        for name, r in recall_of_turns(pictures, copied).items():
            recall.setdefault(name, {})[where] = f'{r["found"]} of {r["copies"]}'
            recall[name][f'{where}, wrong pairs'] = r['wrong_pairs']
    hashes = wave_hash(np.random.default_rng(0).integers(0, 256, (3000, 64, 64)).astype(np.uint8))
    with_turns, kept = search_seconds(hashes), list(duplicates._VARIANTS)
    duplicates._VARIANTS[:] = [v for v in kept if v.entry < len(duplicates._CROPS) + 2]       # as many as before the turns: two of them
    without = search_seconds(hashes)
    duplicates._VARIANTS[:] = kept
    return dict(recall=recall, cost=dict(variants=len(kept), variants_before=4 * (len(duplicates._CROPS) + 2), images=len(hashes),
                                         times_slower=round(with_turns / without, 2)))


PARTS = {   # name -> field of the result, what makes it
    'faults': ('named', lambda a: measure_faults(range(a.fault_seeds), a.audited)),
    'perfect': ('perfect_models', lambda a: measure_perfect()),
    'alarms': ('false_alarms', lambda a: {name: measure_alarms(name, range(a.seeds), a.audited) for name in CLEAN}),
    'labels': ('label_noise', lambda a: measure_labels()),
    'copies': ('turned_copies', lambda a: measure_copies())}

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--part', nargs='+', default=list(PARTS), choices=list(PARTS))
    p.add_argument('--seeds', type=int, default=20, help='collections of each kind without a fault')
    p.add_argument('--fault-seeds', type=int, default=3, help='collections of each fault')
    p.add_argument('--resume', action='store_true', help='keep the audits that are done')
    p.add_argument('--out', default=str(OUT))
    a = p.parse_args()
    a.audited = Done(Path(a.out).with_suffix('.progress.json'), a.resume)
    result = json.loads(Path(a.out).read_text()) if Path(a.out).exists() else {}
    for name in a.part:
        field, make = PARTS[name]
        start = time.perf_counter()
        result = {k: v for k, v in result.items() if k != 'note'} | about() | {'machine': machine(), field: make(a)}
        result['seconds'] = {**result.get('seconds', {}), name: round(time.perf_counter() - start)}
        write_result(a.out, result)
        print(name, result['seconds'][name], 'seconds', flush=True)
    a.audited.file.unlink(missing_ok=True)
