"""A release up to the upload, without the network:

    python tools/release.py [--out dist] [--tag v0.1.0]      or: make release

Builds the source archive and the wheel twice from clean copies of the checkout, which must be the same byte by byte; looks into
both; runs `twine check`; writes a bill of materials (CycloneDX) of the full and of the small installation, and SHA256SUMS. What is
left is the upload, which .github/workflows/release.yml does by trusted publishing, without a password."""
import argparse, gzip, hashlib, io, json, os, re, shlex, shutil, subprocess, sys, tarfile, tempfile, zipfile
from importlib import metadata
from pathlib import Path
from packaging.requirements import Requirement
sys.path.insert(0, str(Path(__file__).resolve().parent))
from light_install import ROOT, copy_checkout, requirements, run, settings

NEVER = re.compile(r'\.(png|jpe?g|dcm|pkl|ipynb|so|env)$|(^|/)(tests|data|\.git)/')      # in a wheel
MOST_BYTES = 90_000_000      # of one file: an index takes 100 MB


def git(*words): return subprocess.run(['git', *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def check_version(tag=None):
    "The version, which must be the same everywhere"
    version = settings()['version']
    module = re.search(r'"(.+)"', (ROOT / 'covid_cxr/__init__.py').read_text())[1]
    if module != version: raise SystemExit(f'settings.ini says {version}, covid_cxr/__init__.py {module}.')
    if f'## {version}' not in (ROOT / 'CHANGELOG.md').read_text(): raise SystemExit(f'CHANGELOG.md has no section {version}.')
    if tag is None: return version
    if tag != f'v{version}': raise SystemExit(f'the tag is {tag}, the version {version}.')
    if f'## {version} (unreleased)' in (ROOT / 'CHANGELOG.md').read_text(): raise SystemExit(f'CHANGELOG.md calls {version} unreleased.')
    return version


def without_times(archive, epoch):
    "Write a source archive anew: the members sorted, every time that of the commit, no user"
    with tarfile.open(archive) as old: members = [(m, old.extractfile(m).read() if m.isfile() else b'') for m in old.getmembers()]
    with open(archive, 'wb') as f, gzip.GzipFile('', 'wb', fileobj=f, mtime=epoch) as z, tarfile.open(fileobj=z, mode='w') as new:
        for m, data in sorted(members, key=lambda pair: pair[0].name):
            m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode = epoch, 0, 0, '', '', 0o755 if m.isdir() else 0o644
            m.pax_headers = {}
            new.addfile(m, io.BytesIO(data))


def build(folder, epoch):
    "The two archives of a clean copy"
    source, env = copy_checkout(folder / 'source'), {**os.environ, 'SOURCE_DATE_EPOCH': str(epoch)}
    run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', folder / 'dist', source, env=env)
    archives = sorted((folder / 'dist').iterdir())
    for a in archives:
        if a.name.endswith('.tar.gz'): without_times(a, epoch)
    return archives


def sha256(path): return hashlib.sha256(path.read_bytes()).hexdigest()


def build_twice(folder, epoch):
    "The archives, which are the same when they are built again"
    first, second = build(folder / 'one', epoch), build(folder / 'two', epoch)
    for a, b in zip(first, second, strict=True):
        if sha256(a) != sha256(b): raise SystemExit(f'{a.name} is another file each time it is built.')
    return first


def expected_files():
    "What a wheel has to hold: every file of the package that git knows"
    names = git('ls-files', '-co', '--exclude-standard', 'covid_cxr').splitlines()
    return {n for n in names if (ROOT / n).is_file()}


def check_wheel(wheel, expected):
    "Refuse a wheel that lacks a file, holds another one, or one that is too large"
    with zipfile.ZipFile(wheel) as z: sizes = {i.filename: i.file_size for i in z.infolist()}
    held = {n for n in sizes if '.dist-info/' not in n}
    wrong = [f'lacks {n}' for n in sorted(expected - held)] + [f'holds {n}' for n in sorted(held - expected)]
    wrong += [f'holds {n}' for n in sorted(held) if NEVER.search(n)]
    wrong += [f'{n} has {size:,} bytes' for n, size in sizes.items() if size > MOST_BYTES]
    if wrong: raise SystemExit(f'{wheel.name}: {"; ".join(wrong[:9])}.')


def check_sdist(archive, expected):
    "Refuse a source archive from which the package cannot be built"
    with tarfile.open(archive) as t: held = {n.partition('/')[2] for n in t.getnames()}
    lacking = ({*expected} | {'setup.py', 'settings.ini', 'README.md', 'LICENSE', 'requirements-predict.txt'}) - held
    if lacking: raise SystemExit(f'{archive.name} lacks {", ".join(sorted(lacking)[:9])}.')


def closure(names):
    "The packages that these need here, with those that they need in turn"
    known, seen, new = {}, set(), [Requirement(n) for n in names]
    new = [r for r in new if r.marker is None or r.marker.evaluate()]
    while new:
        r = new.pop()
        if (key := (canonical(r.name), frozenset(r.extras))) in seen: continue
        seen.add(key)
        known[key[0]] = metadata.version(r.name)
        needed = map(Requirement, metadata.requires(r.name) or ())
        new += [q for q in needed if q.marker is None or any(q.marker.evaluate({'extra': e}) for e in ('', *r.extras))]
    return known


def canonical(name): return re.sub(r'[-_.]+', '-', name).lower()


def bill_of(everything, names, version, title):
    "A bill of materials of some packages out of that of a whole environment"
    known = closure(names)
    parts = [c for c in everything['components'] if canonical(c['name']) in known]
    lacking = {*known} - {canonical(c['name']) for c in parts}
    if lacking: raise SystemExit(f'{title}: no entry for {", ".join(sorted(lacking))}.')
    refs, own = {c['bom-ref'] for c in parts}, f'covid_cxr=={version}'
    for c in parts: c['externalReferences'] = [r for r in c.get('externalReferences', ()) if not r['url'].startswith('file:')]
    graph = [dict(ref=d['ref'], dependsOn=[r for r in d.get('dependsOn', ()) if r in refs])
             for d in everything['dependencies'] if d['ref'] in refs]
    direct = {canonical(Requirement(n).name) for n in names}
    graph.append(dict(ref=own, dependsOn=sorted(c['bom-ref'] for c in parts if canonical(c['name']) in direct)))
    about = {'bom-ref': own, 'name': 'covid_cxr', 'version': version, 'type': 'library', 'description': title,
             'licenses': [dict(license=dict(id='Apache-2.0'))]}
    return {**everything, 'metadata': {**everything['metadata'], 'component': about}, 'components': parts, 'dependencies': graph}


def write_bills(out, version, epoch):
    "The bills of both installations"
    env = {**os.environ, 'SOURCE_DATE_EPOCH': str(epoch)}
    found = run(sys.executable, '-m', 'cyclonedx_py', 'environment', '--output-reproducible', '--of', 'JSON', sys.executable, env=env)
    sets = {'full': shlex.split(settings()['requirements']), 'predict': requirements()}
    for kind, names in sets.items():
        bill = bill_of(json.loads(found.stdout), names, version, f'the {kind} installation')
        (out / f'covid_cxr-{version}-{kind}.cdx.json').write_text(json.dumps(bill, indent=1) + '\n')


def release(out, tag=None):
    "Everything up to the upload; returns the files"
    version, epoch, expected = check_version(tag), int(git('log', '-1', '--format=%ct')), expected_files()
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob('covid_cxr-*'): old.unlink()
    with tempfile.TemporaryDirectory() as folder:
        archives = [Path(shutil.copy(a, out / a.name)) for a in build_twice(Path(folder), epoch)]
    wheel, sdist = archives        # in the order of their names
    check_wheel(wheel, expected)
    check_sdist(sdist, expected)
    run(sys.executable, '-m', 'twine', 'check', '--strict', *archives)
    write_bills(out, version, epoch)
    files = sorted(out.glob(f'covid_cxr-{version}*'))
    (out / 'SHA256SUMS').write_text(''.join(f'{sha256(f)}  {f.name}\n' for f in files))
    return files


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--out', type=Path, default=ROOT / 'dist', help='default: dist')
    p.add_argument('--tag', help='the tag that is released, which has to be that of the version')
    args = p.parse_args()
    for f in release(args.out.resolve(), args.tag): print(f'{f.stat().st_size:>12,}  {f.name}')
    print('ready to be uploaded')


if __name__ == '__main__': main()
