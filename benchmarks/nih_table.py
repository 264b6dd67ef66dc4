"""The full NIH ChestX-ray14 table (112,120 rows): read, labelled, grouped by patient, split by patient, checked; then split by image, and the leak found.

    python benchmarks/nih_table.py --data ../shared/data

Needs nih-chest-xrays/nih.csv.gz below the data folder; no picture is read. Wall seconds and processor seconds of each step are medians over --repeats
processes; load_before is the load average of the last minute before the first. The rival in the same run is scikit-learn's GroupShuffleSplit, twice (test, then
validation), on the same rows and patients; it keeps shares of patients, not of classes. Results are appended to benchmarks/results/nih_table.json.
"""
import argparse, datetime, json, os, platform, statistics, subprocess, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault('OMP_NUM_THREADS', '1')
STEPS = ('read', 'label', 'group', 'split by patient', 'check', 'split by image', 'find the leak', 'reconcile the leak', 'GroupShuffleSplit')


def rival(table):
    "Patients dealt by scikit-learn -> rows of each part"
    from sklearn.model_selection import GroupShuffleSplit
    rest, test = next(GroupShuffleSplit(1, test_size=.1, random_state=0).split(table, groups=table['patient']))
    train, valid = next(GroupShuffleSplit(1, test_size=.1 / .9, random_state=0).split(rest, groups=table['patient'].to_numpy()[rest]))
    return len(train), len(valid), len(test)


def measure(data):
    "One pass over all steps in this process -> JSON on stdout"
    from covid_cxr.sources import read_nih
    from covid_cxr.table import check_split, group_leaksafe, label_for, reconcile, split_by_group, split_random
    got, seconds = {}, {}
    def step(name, do):
        wall, cpu = time.perf_counter(), time.process_time()
        got[name] = do()
        seconds[name] = (time.perf_counter() - wall, time.process_time() - cpu)
    step('read', lambda: read_nih(Path(data) / 'nih-chest-xrays', csv='nih.csv.gz', files='ignore'))
    step('label', lambda: label_for(got['read'], {'No Finding': 'no_finding', '*': 'finding'}))
    step('group', lambda: group_leaksafe(got['label'], duplicates='none'))
    step('split by patient', lambda: split_by_group(got['group'], .1, .1))
    step('check', lambda: check_split(got['split by patient']))
    step('split by image', lambda: split_random(got['group'], .1, .1))
    step('find the leak', lambda: check_split(got['split by image'], allow_leak=True))
    step('reconcile the leak', lambda: reconcile(got['split by image']))
    step('GroupShuffleSplit', lambda: rival(got['group']))
    t = got['split by patient']
    print(json.dumps(dict(rows=len(t), groups=int(t['group'].nunique()), crossing=len(got['check']), crossing_by_image=len(got['find the leak']),
                          parts={k: int(v) for k, v in t['split'].value_counts().items()}, seconds=seconds)))


def cpu_model():
    try: return next(l.split(':', 1)[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name'))
    except (OSError, StopIteration): return platform.processor() or 'unknown'


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', default='../shared/data', help='folder that holds nih-chest-xrays/nih.csv.gz')
    p.add_argument('--repeats', type=int, default=3, help='processes')
    p.add_argument('--out', default=str(ROOT / 'benchmarks/results/nih_table.json'))
    p.add_argument('--measure', action='store_true', help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.measure: return measure(args.data)
    if not (Path(args.data) / 'nih-chest-xrays/nih.csv.gz').is_file(): sys.exit(f'no nih-chest-xrays/nih.csv.gz below {args.data}; give the folder that holds it with --data.')
    from covid_cxr.core import versions, write_json
    load, runs = round(os.getloadavg()[0], 2), []
    for _ in range(args.repeats):
        done = subprocess.run([sys.executable, __file__, '--measure', '--data', args.data], capture_output=True, text=True)
        if done.returncode: sys.exit(done.stderr[-2000:])
        runs.append(json.loads(done.stdout))
    wall, cpu = ({s: round(statistics.median(r['seconds'][s][k] for r in runs), 2) for s in STEPS} for k in (0, 1))
    path = STEPS[:5]
    record = dict(command='python benchmarks/nih_table.py ' + ' '.join(sys.argv[1:]), date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
                  machine=dict(cpu=cpu_model(), cores=os.cpu_count(), load_before=load), versions=versions(), repeats=args.repeats,
                  **{k: runs[0][k] for k in ('rows', 'groups', 'crossing', 'crossing_by_image', 'parts')}, wall_seconds=wall, cpu_seconds=cpu,
                  read_to_checked_split=dict(wall=round(sum(wall[s] for s in path), 2), cpu=round(sum(cpu[s] for s in path), 2)),
                  split_over_rival_cpu=round(cpu['split by patient'] / max(cpu['GroupShuffleSplit'], .01), 1))
    out = Path(args.out)
    write_json(out, (json.loads(out.read_text()) if out.exists() else []) + [record])
    print(f"{record['command']}\n{record['machine']}\n{record['rows']:,} rows of {record['groups']:,} patients; parts {record['parts']}; "
          f"crossing groups: {record['crossing']} split by patient, {record['crossing_by_image']:,} split by image")
    for s in STEPS: print(f'  {s:20} {wall[s]:6.2f} s, {cpu[s]:6.2f} s of processor')
    print(f"read to checked split: {record['read_to_checked_split']['wall']} s, {record['read_to_checked_split']['cpu']} s of processor\nappended to {args.out}")


if __name__ == '__main__': main()
