"""Keep notebooks, modules and README in step. Run from the repository root:

    python tools/notebooks.py run nbs/00_core.ipynb ...   execute top to bottom, save outputs, clean, export
    python tools/notebooks.py readme                      execute nbs/index.ipynb and write README.md
    python tools/notebooks.py check                       exit 1, naming the file, when anything is out of step
"""
import os, re, shutil, sys, tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault('OMP_NUM_THREADS', '2')
BANNER = '<!-- Made from nbs/index.ipynb by tools/notebooks.py: edit the notebook, not this file. -->\n'


def notebooks(): return sorted(p for p in (ROOT / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts and not p.name.startswith('.'))

def _skipped(cell):
    first = cell.source.strip().splitlines()[:3]
    return any(re.match(r'#\|\s*(eval:\s*false|slow|gpu|notest)\b', l) for l in first)

def run(path, save=True):
    "Execute one notebook as nbdev_test would, but keep what it prints and draws"
    from execnb.nbio import read_nb, write_nb
    from execnb.shell import CaptureShell
    nb = read_nb(path)
    here = os.getcwd()
    os.chdir(path.parent)
    try: CaptureShell(path.parent).run_all(nb, exc_stop=True, preproc=lambda c: c.cell_type != 'code' or _skipped(c))
    except Exception:
        bad = next((c.id for c in nb.cells if any(o.get('output_type') == 'error' for o in c.get('outputs', []))), 'unknown')
        print(f'{path.name}: cell {bad} failed', file=sys.stderr)
        raise
    finally: os.chdir(here)
    if save:
        for c in nb.cells:                          # warnings name paths of this machine; what a reader should see is printed
            if c.cell_type == 'code': c.outputs = [o for o in c.outputs if o.get('name') != 'stderr']
        write_nb(nb, path)
        from nbdev.clean import nbdev_clean
        nbdev_clean(str(path))
    return nb

def export(dest, paths=None):
    "Export library notebooks (all, unless named) into `dest`"
    from nbdev.export import nb_export
    for p in paths or notebooks():
        if re.search(r'#\|\s*default_exp', p.read_text(encoding='utf-8')): nb_export(str(p), lib_path=str(dest))

def readme_text():
    "nbs/index.ipynb as Markdown: hidden cells dropped, code fenced as Python, printed results as text"
    import json
    cells, out = json.loads((ROOT / 'nbs/index.ipynb').read_text(encoding='utf-8'))['cells'], [BANNER]
    for c in cells:
        src = ''.join(c['source']).strip()
        if c['cell_type'] == 'markdown': out.append(src + '\n'); continue
        if re.search(r'^#\|\s*hide\b', src, re.M): continue
        if not re.search(r'^#\|\s*echo:\s*false', src, re.M): out.append('```python\n' + re.sub(r'^#\|.*\n', '', src, flags=re.M) + '\n```\n')
        for o in c['outputs']:
            data = o.get('data', {})
            text = o.get('text') or data.get('text/markdown') or data.get('text/plain')
            if text: out.append(''.join(text).strip() + '\n' if 'text/markdown' in data else '```text\n' + ''.join(text).rstrip() + '\n```\n')
    return '\n'.join(out)

def _code(path):
    "A module's text without the way back to its notebook, which depends on where it was exported to"
    return re.sub(r'\S*nbs/', 'nbs/', path.read_text(encoding='utf-8'))

def check():
    bad = []
    with tempfile.TemporaryDirectory() as d:
        lib = Path(d) / 'covid_cxr'
        lib.mkdir()
        shutil.copy(ROOT / 'covid_cxr/__init__.py', lib)
        export(lib)
        for p in sorted({q.name for q in lib.glob('*.py')} | {q.name for q in (ROOT / 'covid_cxr').glob('*.py')}):
            if p.startswith('_') : continue
            new, old = lib / p, ROOT / 'covid_cxr' / p
            if not new.exists(): bad.append(f'covid_cxr/{p} has no notebook: delete it or write one')
            elif not old.exists() or _code(new) != _code(old): bad.append(f'covid_cxr/{p} differs from its notebook: run nbdev_export (after nbdev_update, if the module was edited)')
    for p in notebooks():
        import json
        nb, rel = json.loads(p.read_text(encoding='utf-8')), p.relative_to(ROOT)
        ids = [c.get('id') for c in nb['cells']]
        if None in ids or len(set(ids)) < len(ids): bad.append(f'{rel}: every cell needs an id of its own')
        if any(c.get('execution_count') for c in nb['cells']): bad.append(f'{rel}: not clean: run nbdev_clean')
        if any(o.get('output_type') == 'error' for c in nb['cells'] for o in c.get('outputs', [])): bad.append(f'{rel}: holds a failed cell')
        if p.stat().st_size > 400_000: bad.append(f'{rel}: {p.stat().st_size // 1000} KB, too heavy to review')
    if (ROOT / 'README.md').read_text(encoding='utf-8') != readme_text(): bad.append('README.md is not fresh: python tools/notebooks.py readme')
    print('\n'.join(bad) or 'notebooks, modules and README agree')
    return 1 if bad else 0


if __name__ == '__main__':
    cmd, args = (sys.argv[1:2] or ['help'])[0], sys.argv[2:]
    if cmd == 'run':
        for a in args: run(Path(a).resolve()); print('ran', a)
        export(ROOT / 'covid_cxr', [Path(a).resolve() for a in args])
    elif cmd == 'readme':
        run(ROOT / 'nbs/index.ipynb')
        (ROOT / 'README.md').write_text(readme_text(), encoding='utf-8')
    elif cmd == 'check': sys.exit(check())
    else: sys.exit(__doc__)
