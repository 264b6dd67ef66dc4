"""Near-duplicate search: how time and memory grow, compared with all pairs; and what is found among real radiographs.

    python benchmarks/near_duplicates.py              growth, 6,000 to 100,000 hashes
    python benchmarks/near_duplicates.py --real       planted edits and independent copies among real radiographs

Growth: random hashes, as alike as those of real chest radiographs (median .55, 99th percentile .88 of unrelated pairs), 2 % of them copies
of others: cropped by up to 8 %, turned by up to 3 degrees, every second one mirrored, every fourth inverted, and roughened. Every size is a
process of its own. It is compared with the same search with one cell: all pairs, same variants, same ranking, same process layout, up to
--all-pairs hashes.
Real: every EDIT of covid_cxr.duplicates in images drawn at random, one edit per image, hidden among all images of both collections; and,
where they are there, copies of the same images that others reduced in another way. "Found" means: joined with its original by pairs with
the verdict 'duplicate'.
Seconds are wall seconds and CPU seconds of the search alone, on one thread; times_faster compares CPU seconds, which other work disturbs
less. load_before is the load average of the last minute before a size was begun. Results are appended to
benchmarks/results/near_duplicates.json.
"""
import argparse, json, os, resource, subprocess, sys, tempfile, time
from pathlib import Path
os.environ.setdefault('OMP_NUM_THREADS', '1')
from record import RESULTS, about, append_result, load_average, machine
import numpy as np, pandas as pd
from covid_cxr.core import data_folder
from covid_cxr.duplicates import EDITS, change_hash, find_near, nearest_hashes

OUT = RESULTS / 'near_duplicates.json'
RAPID = 'covid-19-rapidly-progressive-acute-respiratory-distress-syndrome-ards'
SAME_IMAGE = [  # pairs under two names that were laid on each other and compared by eye: one image
    ('16660_2_1.jpg', f'{RAPID}-admission.jpg'), ('16660_3_1.jpg', f'{RAPID}-day-1.jpg'),
    ('16660_4_1.jpg', f'{RAPID}-day-2.jpg'), ('16660_5_1.jpg', f'{RAPID}-day-3.jpg'),
    ('A7E260CE-8A00-4C5F-A7F5-27336527A981.jpeg', 'case_76_1-3.png'),
    ('353889E0-A1E8-4F9E-A0B8-F24F36BCFBFB.jpeg', 'case_72_RX-TORACE1.jpg'),
    ('pneumonia-7.jpg', 'streptococcus-pneumoniae-pneumonia-temporal-evolution-1-day1.jpg'), ('2-chest-filmc.jpg', '7-fatal-covid19.jpg'),
    ('AR-1.jpg', 'AR-2.jpg'), ('AR-1.jpg', 'extubation-1.jpg'), ('AR-2.jpg', 'extubation-1.jpg'),
    ('35AF5C3B-D04D-4B4B-92B7-CB1F67D83085.jpeg', 'D5ACAA93-C779-4E22-ADFA-6A220489F840.jpeg'),
    ('E63574A7-4188-4C8D-8D17-9D67A18A1AFA.jpeg', 'F4341CE7-73C9-45C6-99C8-8567A5484B63.jpeg'),
    ('133da583a6452e2e6e09f86a5541eb_jumbo.jpeg', '6ed02c7c0f5f876f310e67e410e4fc_jumbo.jpeg'),
]


# ---- growth
def random_hashes(n, rng):
    "(n, 256) random hashes with the common part and the falling spectrum that chest radiographs have"
    k = np.hypot(*np.mgrid[:16, :16])
    fall = (1 + k)**-2.
    fall[0, 0] = 0
    fall /= np.linalg.norm(fall)
    common = np.random.default_rng(1).standard_normal((16, 16)) * fall
    common *= .7 / np.linalg.norm(common)
    h = np.empty((n, 256), np.float16)
    for s in range(0, n, 8192):
        block = common + rng.standard_normal((min(8192, n - s), 16, 16), dtype=np.float32) * (fall * np.sqrt(1 - .7**2))
        h[s:s + 8192] = (block / np.linalg.norm(block, axis=(1, 2), keepdims=True)).reshape(-1, 256)
    return h

def plant(h, rng):
    "Turn the last 2 % into copies of the first 2 %: pairs (i, copy of i)"
    m = len(h) // 50
    for i in range(m):
        crop = np.clip(rng.uniform(-.01, .08) + rng.uniform(-.01, .01, 4), 0, .1)
        turn = rng.uniform(-3, 3) if i % 3 == 0 else 0
        copy = change_hash(h[i:i + 1], tuple(crop), turn, mirrored=i % 2 == 1, inverted=i % 4 == 3)[0]
        h[len(h) - m + i] = copy + rng.standard_normal(256) * .02
    return [(i, len(h) - m + i) for i in range(m)]

def memory_mb(): return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)

def one_size(n, cells):
    "One search in this process -> JSON on stdout"
    rng = np.random.default_rng(0)
    h = random_hashes(n, rng)
    pairs = plant(h, rng)
    before, wall, cpu = memory_mb(), time.perf_counter(), time.process_time()
    a, b, _, _ = nearest_hashes(h, cells=cells)
    seconds = dict(seconds=round(time.perf_counter() - wall, 2), cpu_seconds=round(time.process_time() - cpu, 2))
    found = set(zip(np.minimum(a, b).tolist(), np.maximum(a, b).tolist()))
    recall = round(float(np.mean([p in found for p in pairs])), 4)
    print(json.dumps(dict(seconds, peak_mb=memory_mb(), before_mb=before, recall=recall, candidates=len(a))))

def run_size(n, cells):
    "What `one_size` said in a process of its own"
    p = subprocess.run([sys.executable, __file__, '--one', str(n), '--cells', str(cells)], capture_output=True, text=True)
    if p.returncode: sys.exit(f'the search among {n} hashes failed:\n{p.stderr[-3000:]}')
    return json.loads(p.stdout)

def slope(rows, key):
    "Power of n by which a column grows: least squares on logarithms"
    return round(float(np.polyfit(np.log([r['n'] for r in rows]), np.log([r[key] for r in rows]), 1)[0]), 2)

def measure_size(n, all_pairs):
    "The search among n hashes, and beside it the comparison of all pairs where that is asked for"
    busy, r = load_average(), run_size(n, 0)
    row = dict(n=n, **r, load_before=busy)
    if not all_pairs: return row
    b = run_size(n, 1)
    kept = {f'all_pairs_{k}': b[k] for k in ('seconds', 'cpu_seconds', 'recall', 'peak_mb')}
    return dict(row, **kept, times_faster=round(b['cpu_seconds'] / r['cpu_seconds'], 1))

def measure_growth(sizes, most):
    "All sizes, and the powers of n by which they grow"
    rows = []
    for n in sizes:
        rows.append(measure_size(n, n <= most))
        print(rows[-1], flush=True)
    both = [r for r in rows if 'all_pairs_seconds' in r]
    slopes = {k: slope(rows, k) for k in ('seconds', 'cpu_seconds', 'peak_mb')}
    if len(both) > 1: slopes.update({k: slope(both, k) for k in ('all_pairs_seconds', 'all_pairs_cpu_seconds')})
    print('log-log slopes', slopes)
    return dict(what='growth', sizes=rows, slopes=slopes)


# ---- real radiographs
def joined(pairs, ids):
    "Component number of every id under pairs with verdict 'duplicate'"
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components
    at, d = {v: i for i, v in enumerate(ids)}, pairs[pairs['verdict'] == 'duplicate']
    a, b = [at[i] for i in d['a']], [at[i] for i in d['b']]
    links = coo_matrix((np.ones(len(a)), (a, b)), shape=(len(at),) * 2)
    return dict(zip(ids, connected_components(links, directed=False)[1]))

def image_files(data, *folders):
    endings = ('.jpg', '.jpeg', '.png')
    return [p for folder in folders for p in sorted((Path(data) / folder).rglob('*')) if p.suffix.lower() in endings]

def write_edits(base, per_edit, folder):
    "Edited copies of images drawn at random -> {id: (name of the edit, id of its original)}"
    from PIL import Image
    from covid_cxr.images import read_grey, to_8bit
    planted, names = {}, list(EDITS)
    for k, i in enumerate(np.random.default_rng(0).permutation(len(base))[:per_edit * len(EDITS)]):
        name = names[k % len(names)]
        Image.fromarray(np.ascontiguousarray(EDITS[name](to_8bit(read_grey(base[i]))))).save(f'{folder}/{k}.png')
        planted[f'edit#{k}'] = (name, f'{base[i].name}#{i}')
    return planted

def find_independent_copies(table, planted, group):
    "Images of one file name from several collections: how many, and how many in one group"
    real = table[~table['image_id'].isin(planted)]
    named = real.assign(name=real['image_id'].str.split('#').str[0], group=real['image_id'].map(group))
    copies = named.groupby('name')['group'].agg(['size', 'nunique']).query('size > 1')
    return dict(independent_copies=len(copies), independent_copies_found=int((copies['nunique'] == 1).sum()))

def pairs_under_other_names(table, planted, pairs):
    "Near pairs with the verdict 'duplicate' whose file names differ; equal files are one image, whatever their names"
    ids = table['image_id']
    name = {i: (planted[i][1] if i in planted else i).split('#')[0] for i in ids}
    sure = pairs[(pairs['verdict'] == 'duplicate') & (pairs['kind'] == 'near')]
    exact = joined(pairs[pairs['kind'] != 'near'], ids)
    equal = {i.split('#')[0]: exact[i] for i in ids[::-1] if i not in planted}
    found = sorted({tuple(sorted((name[a], name[b]))) for a, b in zip(sure['a'], sure['b'])})
    return [[a, b] for a, b in found if equal[a] != equal[b]]

def measure_real(data, per_edit):
    "Recall per planted edit, recall of independently reduced copies, pairs of different images with the verdict 'duplicate'"
    base = image_files(data, 'chest-xray-pneumonia', 'covid-chestxray-dataset/images')
    again = image_files(data, 'chest-xray-pneumonia-512', 'nih-chest-xrays-512/images', 'nih-chest-xrays/images')
    rows = [dict(image_id=f'{p.name}#{i}', path=str(p)) for i, p in enumerate(base + again)]
    with tempfile.TemporaryDirectory() as d:
        planted = write_edits(base, per_edit, d)
        table = pd.DataFrame(rows + [dict(image_id=i, path=f"{d}/{i.split('#')[1]}.png") for i in planted])
        start = time.process_time()
        pairs = find_near(table)
        seconds = time.process_time() - start
    group = joined(pairs, table['image_id'])
    recall = {name: round(float(np.mean([group[e] == group[o] for e, (n, o) in planted.items() if n == name])), 3) for name in EDITS}
    other = pairs_under_other_names(table, planted, pairs)
    seen = [sorted(s) for s in SAME_IMAGE]   # a pair is false unless a person who laid the two on each other saw one image
    return dict(what='real images', images=len(base) + len(again), planted_per_edit=per_edit, recall=recall,
                **find_independent_copies(table, planted, group), pairs_under_other_names=other,
                false_duplicates=sum(p not in seen for p in other), to_look_at=int((pairs['verdict'] == 'look').sum()),
                cpu_seconds=round(seconds))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--real', action='store_true', help='measure on real radiographs')
    p.add_argument('--data', default=str(data_folder()), help='folder that holds them')
    p.add_argument('--per-edit', type=int, default=60, help='images per edit')
    p.add_argument('--sizes', type=int, nargs='+', default=[6_000, 12_500, 25_000, 50_000, 100_000], help='hashes')
    p.add_argument('--all-pairs', type=int, default=25_000, help='largest number of hashes for the comparison of all pairs')
    p.add_argument('--out', default=str(OUT))
    p.add_argument('--one', type=int, help=argparse.SUPPRESS)
    p.add_argument('--cells', type=int, default=0, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.one: return one_size(a.one, a.cells or None)
    if a.real and not image_files(a.data, 'chest-xray-pneumonia'):
        sys.exit(f'no chest-xray-pneumonia below {a.data}; give the folder that holds it with --data.')
    made = dict(about(), machine=machine(load_before=load_average()))
    result = measure_real(a.data, a.per_edit) if a.real else measure_growth(a.sizes, a.all_pairs)
    print(json.dumps(result, indent=1))
    append_result(a.out, dict(made, **result))


if __name__ == '__main__': main()
