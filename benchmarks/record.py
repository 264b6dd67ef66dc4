"""What every result file says of itself: command, date, versions, machine. It also makes the library of this checkout importable."""
import gzip, json, os, platform, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / 'benchmarks' / 'results'
sys.path.insert(0, str(ROOT))


def cpu_model():
    "Name of the processor"
    for line in open('/proc/cpuinfo') if os.path.exists('/proc/cpuinfo') else []:
        if line.startswith('model name'): return line.split(':', 1)[1].strip()
    return platform.processor() or 'unknown'


def load_average():
    "Other work of the last minute"
    return round(os.getloadavg()[0], 2)


def machine(**more):
    "Processor, cores and threads"
    return dict(cpu=cpu_model(), cores=os.cpu_count(), threads=1, system=platform.system(), **more)


def command_line(words=None):
    "The command as it was given, with a placeholder for every folder: 'python benchmarks/x.py --data DATA'"
    script, *rest = sys.argv if words is None else words
    out, flag = ['python', f'benchmarks/{Path(script).name}'], ''
    for word in rest:
        name, equals, value = word.partition('=')
        if equals and os.sep in value: word = f"{name}={name.lstrip('-').upper()}"
        out.append(flag.lstrip('-').upper() if os.sep in word else word)
        flag = word
    return ' '.join(out)


def about():
    "The first fields of a result: how and when it was made, and with what"
    from covid_cxr.core import versions
    return dict(command=command_line(), date=time.strftime('%Y-%m-%d'), versions=versions())


def write_result(path, result):
    "Replace a result file"
    from covid_cxr.core import write_json
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)


def write_compressed(path, table):
    "PATH.gz, a table as CSV: the same table gives the same bytes (no time stamp, no name inside). `runs.folder.find_file` finds it as PATH"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(path.name + '.gz').write_bytes(gzip.compress(table.to_csv(index=False).encode(), 9, mtime=0))


def kept_folders(results=RESULTS):
    "Folders of the kept runs, those that were trained for their audit at the end"
    return [f.parent for d in (Path(results), Path(results) / 'audited') for f in sorted(d.glob('*/run.json'))]


def append_result(path, result):
    "Add a result to a file that keeps all of them"
    path = Path(path)
    kept = json.loads(path.read_text(encoding='utf-8')) if path.exists() else []
    write_result(path, [*kept, result])
