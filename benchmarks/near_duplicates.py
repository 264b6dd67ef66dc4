"""Near-duplicate search: how time and memory grow, against the comparison of all pairs; and what is found among real films.

    python benchmarks/near_duplicates.py                                   growth, 6,000 to 100,000 hashes
    python benchmarks/near_duplicates.py --data ../shared/data             planted edits and independent copies among real films

Growth: random hashes, as alike as those of real chest films (median .55, 99th percentile .88 of unrelated pairs), 2 % of them copies of others:
cropped by up to 8 %, turned by up to 3 degrees, every second one mirrored, every fourth inverted, and roughened. Every size is a process of its own.
The rival is the same search with one cell: all pairs, same variants, same ranking, same process layout; it runs up to --rival hashes.
Real films: every EDIT of covid_cxr.duplicates in films drawn at random, one edit per film, hidden among all films of both collections; and, where they are
there, copies of the same films that others reduced in another way. "Found" means: joined with its original by pairs with the verdict 'duplicate'.
Seconds are wall seconds and CPU seconds of the search alone, on one thread; times_faster compares CPU seconds, which other work disturbs less. load_before is the load average of the last minute before a size was begun: what other work
ran beside it. Results are appended to benchmarks/results/near_duplicates.json.
"""
import argparse, json, os, platform, resource, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault('OMP_NUM_THREADS', '1')
import numpy as np, pandas as pd
from covid_cxr.core import versions
from covid_cxr.duplicates import EDITS, change_hash, find_near, nearest_hashes

OUT = ROOT / 'benchmarks/results/near_duplicates.json'
RAPID = 'covid-19-rapidly-progressive-acute-respiratory-distress-syndrome-ards'
SAME_FILM = [  # pairs under two names that were laid on each other and looked at: one film
    ('16660_2_1.jpg', f'{RAPID}-admission.jpg'), ('16660_3_1.jpg', f'{RAPID}-day-1.jpg'), ('16660_4_1.jpg', f'{RAPID}-day-2.jpg'), ('16660_5_1.jpg', f'{RAPID}-day-3.jpg'),
    ('A7E260CE-8A00-4C5F-A7F5-27336527A981.jpeg', 'case_76_1-3.png'), ('353889E0-A1E8-4F9E-A0B8-F24F36BCFBFB.jpeg', 'case_72_RX-TORACE1.jpg'),
    ('pneumonia-7.jpg', 'streptococcus-pneumoniae-pneumonia-temporal-evolution-1-day1.jpg'), ('2-chest-filmc.jpg', '7-fatal-covid19.jpg'),
    ('AR-1.jpg', 'AR-2.jpg'), ('AR-1.jpg', 'extubation-1.jpg'), ('AR-2.jpg', 'extubation-1.jpg'),
    ('35AF5C3B-D04D-4B4B-92B7-CB1F67D83085.jpeg', 'D5ACAA93-C779-4E22-ADFA-6A220489F840.jpeg'), ('E63574A7-4188-4C8D-8D17-9D67A18A1AFA.jpeg', 'F4341CE7-73C9-45C6-99C8-8567A5484B63.jpeg'),
    ('133da583a6452e2e6e09f86a5541eb_jumbo.jpeg', '6ed02c7c0f5f876f310e67e410e4fc_jumbo.jpeg'),
]


def like_films(n, rng):
    "(n, 256) random hashes with the common part and the falling spectrum that chest films have"
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
        crop, turn = np.clip(rng.uniform(-.01, .08) + rng.uniform(-.01, .01, 4), 0, .1), rng.uniform(-3, 3) if i % 3 == 0 else 0
        copy = change_hash(h[i:i + 1], tuple(crop), turn, mirrored=i % 2 == 1, inverted=i % 4 == 3)[0]
        h[len(h) - m + i] = copy + rng.standard_normal(256) * .02
    return [(i, len(h) - m + i) for i in range(m)]

def one_size(n, cells):
    "One search in this process -> JSON on stdout"
    rng = np.random.default_rng(0)
    h = like_films(n, rng)
    pairs = plant(h, rng)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, (time.perf_counter(), time.process_time())
    a, b, _, _ = nearest_hashes(h, cells=cells)
    seconds, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    found = set(zip(np.minimum(a, b).tolist(), np.maximum(a, b).tolist()))
    print(json.dumps(dict(seconds=round(seconds, 2), cpu_seconds=round(cpu, 2), peak_mb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024), before_mb=round(before / 1024),
                          recall=round(float(np.mean([p in found for p in pairs])), 4), candidates=len(a))))

def load(): return round(os.getloadavg()[0], 2)

def spawn(n, cells):
    p = subprocess.run([sys.executable, __file__, '--one', str(n), '--cells', str(cells)], capture_output=True, text=True)
    if p.returncode: sys.exit(f'the search among {n} hashes failed:\n{p.stderr[-3000:]}')
    return json.loads(p.stdout)

def slope(rows, key):
    "Power of n by which a column grows: least squares on logarithms"
    return round(float(np.polyfit(np.log([r['n'] for r in rows]), np.log([r[key] for r in rows]), 1)[0]), 2)

def growth(sizes, rival):
    rows = []
    for n in sizes:
        busy = load()
        r = spawn(n, 0)
        row = dict(n=n, **r, load_before=busy)
        if n <= rival:
            b = spawn(n, 1)
            row.update(all_pairs_seconds=b['seconds'], all_pairs_cpu_seconds=b['cpu_seconds'], all_pairs_recall=b['recall'], all_pairs_peak_mb=b['peak_mb'], times_faster=round(b['cpu_seconds'] / r['cpu_seconds'], 1))
        rows.append(row)
        print(row, flush=True)
    both = [r for r in rows if 'all_pairs_seconds' in r]
    slopes = {k: slope(rows, k) for k in ('seconds', 'cpu_seconds', 'peak_mb')} | ({k: slope(both, k) for k in ('all_pairs_seconds', 'all_pairs_cpu_seconds')} if len(both) > 1 else {})
    print('log-log slopes', slopes)
    return dict(what='growth', sizes=rows, slopes=slopes)

def joined(pairs, ids):
    "Component number of every id under pairs with verdict 'duplicate'"
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components
    at, d = {v: i for i, v in enumerate(ids)}, pairs[pairs['verdict'] == 'duplicate']
    a, b = [at[i] for i in d['a']], [at[i] for i in d['b']]
    return dict(zip(ids, connected_components(coo_matrix((np.ones(len(a)), (a, b)), shape=(len(at),) * 2), directed=False)[1]))

def films(data, folder): return sorted(p for p in (Path(data) / folder).rglob('*') if p.suffix.lower() in ('.jpg', '.jpeg', '.png'))

def real(data, per_edit):
    "Recall per planted edit, recall of independently reduced copies, pairs of different films that were called duplicates"
    from PIL import Image
    from covid_cxr.images import read_grey, to_8bit
    base = films(data, 'chest-xray-pneumonia') + films(data, 'covid-chestxray-dataset/images')
    again = films(data, 'chest-xray-pneumonia-512') + films(data, 'nih-chest-xrays-512/images') + films(data, 'nih-chest-xrays/images')
    rows = [dict(image_id=f'{p.name}#{i}', path=str(p)) for i, p in enumerate(base + again)]
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as d:
        planted = {}
        for k, i in enumerate(rng.permutation(len(base))[:per_edit * len(EDITS)]):
            name = list(EDITS)[k % len(EDITS)]
            Image.fromarray(np.ascontiguousarray(EDITS[name](to_8bit(read_grey(base[i]))))).save(f'{d}/{k}.png')
            rows.append(dict(image_id=f'edit#{k}', path=f'{d}/{k}.png'))
            planted[f'edit#{k}'] = (name, f'{base[i].name}#{i}')
        table, start = pd.DataFrame(rows), time.process_time()
        pairs = find_near(table)
        seconds = time.process_time() - start
    group = joined(pairs, table['image_id'])
    recall = {name: float(np.mean([group[e] == group[o] for e, (n, o) in planted.items() if n == name])) for name in EDITS}
    twins = table[~table['image_id'].isin(planted)].assign(name=lambda t: t['image_id'].str.split('#').str[0], group=lambda t: t['image_id'].map(group)).groupby('name')['group']
    twins = twins.agg(['size', 'nunique']).query('size > 1')
    film = {i: planted[i][1].split('#')[0] if i in planted else i.split('#')[0] for i in table['image_id']}
    sure = pairs[(pairs['verdict'] == 'duplicate') & (pairs['kind'] == 'near')]
    exact = joined(pairs[pairs['kind'] != 'near'], table['image_id'])
    equal = {i.split('#')[0]: exact[i] for i in table['image_id'][::-1] if i not in planted}            # copies of one file are one film, whatever their names
    other = sorted({tuple(sorted((film[a], film[b]))) for a, b in zip(sure['a'], sure['b'])})
    other = [(a, b) for a, b in other if equal[a] != equal[b]]
    out = dict(what='real films', films=len(base) + len(again), planted_per_edit=per_edit, recall={k: round(v, 3) for k, v in recall.items()}, independent_copies=len(twins),
               independent_copies_found=int((twins['nunique'] == 1).sum()), pairs_under_other_names=[list(p) for p in other], to_look_at=int((pairs['verdict'] == 'look').sum()),
               cpu_seconds=round(seconds))
    return judged(out)

def judged(out):
    "A pair under two names is a false alarm unless a person who laid the two on each other saw one film"
    out['false_duplicates'] = sum(p not in [sorted(s) for s in SAME_FILM] for p in out['pairs_under_other_names'])
    print(json.dumps(out, indent=1))
    return out

def keep(result, command, busy):
    from keep_run import cpu_model
    old = json.loads(OUT.read_text()) if OUT.exists() else []
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(old + [dict(date=time.strftime('%Y-%m-%d'), command=command, machine=dict(cpu=cpu_model(), cores=os.cpu_count(), threads=1, system=platform.system(), load_before=busy), versions=versions(), **result)], indent=1) + '\n')


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--sizes', type=int, nargs='+', default=[6_000, 12_500, 25_000, 50_000, 100_000])
    p.add_argument('--rival', type=int, default=25_000, help='largest n for the comparison of all pairs')
    p.add_argument('--data', help='folder with the real films')
    p.add_argument('--per-edit', type=int, default=60)
    p.add_argument('--one', type=int, help=argparse.SUPPRESS)
    p.add_argument('--cells', type=int, default=0, help=argparse.SUPPRESS)
    a, busy = p.parse_args(), load()
    if a.one: one_size(a.one, a.cells or None)
    elif a.data:
        keep(real(a.data, a.per_edit), f'python benchmarks/near_duplicates.py --data DATA --per-edit {a.per_edit}', busy)
    else: keep(growth(a.sizes, a.rival), ' '.join(['python benchmarks/near_duplicates.py', *sys.argv[1:]]), busy)
