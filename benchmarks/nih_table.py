"""The full NIH ChestX-ray14 table (112,120 rows): read, labelled, grouped by patient, split by patient, checked; then split by image, and
the leak found.

    python benchmarks/nih_table.py

Needs nih-chest-xrays/nih.csv.gz below the data folder; no image is read. Wall seconds and processor seconds of each step are medians over
--repeats processes; load_before is the load average of the last minute before the first. Compared with scikit-learn's GroupShuffleSplit in
the same run, twice (test, then validation), on the same rows and patients; it keeps shares of patients, not of classes.
Results are appended to benchmarks/results/nih_table.json.
"""
import argparse, json, os, statistics, subprocess, sys, time
from pathlib import Path
os.environ.setdefault('OMP_NUM_THREADS', '1')
from record import RESULTS, about, append_result, load_average, machine
from covid_cxr.core import data_folder

OUT = RESULTS / 'nih_table.json'
STEPS = ('read', 'label', 'group', 'split by patient', 'check', 'split by image', 'find the leak', 'reconcile the leak',
         'GroupShuffleSplit')


def group_shuffle_split(table):
    "scikit-learn's split of the patients -> rows of each split"
    from sklearn.model_selection import GroupShuffleSplit
    rest, test = next(GroupShuffleSplit(1, test_size=.1, random_state=0).split(table, groups=table['patient']))
    groups = table['patient'].to_numpy()[rest]
    train, valid = next(GroupShuffleSplit(1, test_size=.1 / .9, random_state=0).split(rest, groups=groups))
    return len(train), len(valid), len(test)


def make_steps(data, got):
    "name -> what is timed; a step finds the results of earlier ones in `got`"
    from covid_cxr.sources import read_nih
    from covid_cxr.table import check_split, group_leaksafe, label_for, reconcile, split_by_group, split_random
    task = {'No Finding': 'no_finding', '*': 'finding'}
    return {
        'read': lambda: read_nih(Path(data) / 'nih-chest-xrays', csv='nih.csv.gz', files='ignore'),
        'label': lambda: label_for(got['read'], task),
        'group': lambda: group_leaksafe(got['label'], duplicates='none'),
        'split by patient': lambda: split_by_group(got['group'], .1, .1),
        'check': lambda: check_split(got['split by patient']),
        'split by image': lambda: split_random(got['group'], .1, .1),
        'find the leak': lambda: check_split(got['split by image'], allow_leak=True),
        'reconcile the leak': lambda: reconcile(got['split by image']),
        'GroupShuffleSplit': lambda: group_shuffle_split(got['group'])}


def measure(data):
    "One pass over all steps in this process -> JSON on stdout"
    got, seconds = {}, {}
    for name, do in make_steps(data, got).items():
        wall, cpu = time.perf_counter(), time.process_time()
        got[name] = do()
        seconds[name] = (time.perf_counter() - wall, time.process_time() - cpu)
    t = got['split by patient']
    counts = dict(rows=len(t), groups=int(t['group'].nunique()), crossing=len(got['check']), crossing_by_image=len(got['find the leak']))
    splits = {k: int(v) for k, v in t['split'].value_counts().items()}
    print(json.dumps(dict(counts, splits=splits, seconds=seconds)))


def run_repeats(data, repeats):
    "What `measure` said in processes of its own"
    runs = []
    for _ in range(repeats):
        done = subprocess.run([sys.executable, __file__, '--measure', '--data', data], capture_output=True, text=True)
        if done.returncode: sys.exit(done.stderr[-2000:])
        runs.append(json.loads(done.stdout))
    return runs


def summarise(runs):
    "Medians of the seconds, and the counts"
    wall, cpu = ({s: round(statistics.median(r['seconds'][s][k] for r in runs), 2) for s in STEPS} for k in (0, 1))
    counts = {k: runs[0][k] for k in ('rows', 'groups', 'crossing', 'crossing_by_image', 'splits')}
    path = dict(wall=round(sum(wall[s] for s in STEPS[:5]), 2), cpu=round(sum(cpu[s] for s in STEPS[:5]), 2))
    ratio = round(cpu['split by patient'] / max(cpu['GroupShuffleSplit'], .01), 1)
    return dict(counts, wall_seconds=wall, cpu_seconds=cpu, read_to_checked_split=path, split_over_group_shuffle_split_cpu=ratio)


def show(record):
    "The record for a person"
    print(record['command'], record['machine'], sep='\n')
    print(f"{record['rows']:,} rows of {record['groups']:,} patients; splits {record['splits']}; "
          f"crossing groups: {record['crossing']} split by patient, {record['crossing_by_image']:,} split by image")
    for s in STEPS: print(f"  {s:20} {record['wall_seconds'][s]:6.2f} s, {record['cpu_seconds'][s]:6.2f} s of processor")
    whole = record['read_to_checked_split']
    print(f"read to checked split: {whole['wall']} s, {whole['cpu']} s of processor")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', default=str(data_folder()), help='folder that holds nih-chest-xrays/nih.csv.gz')
    p.add_argument('--repeats', type=int, default=3, help='processes')
    p.add_argument('--out', default=str(OUT))
    p.add_argument('--measure', action='store_true', help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.measure: return measure(a.data)
    if not (Path(a.data) / 'nih-chest-xrays/nih.csv.gz').is_file():
        sys.exit(f'no nih-chest-xrays/nih.csv.gz below {a.data}; give the folder that holds it with --data.')
    before = load_average()
    runs = run_repeats(a.data, a.repeats)
    made = dict(about(), machine=machine(load_before=before), repeats=a.repeats)
    record = dict(made, **summarise(runs))
    append_result(a.out, record)
    show(record)


if __name__ == '__main__': main()
