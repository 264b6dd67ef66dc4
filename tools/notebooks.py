"""Keep notebooks, modules and README in step. Run from the repository root:

    python tools/notebooks.py run nbs/core.ipynb ...      execute top to bottom, save outputs, clean, export
    python tools/notebooks.py export [nbs/x.ipynb ...]    export without executing (all, unless named)
    python tools/notebooks.py readme                      execute nbs/index.ipynb and write README.md
    python tools/notebooks.py check                       exit 1, naming the file, when anything is out of step
"""
import json, os, re, shutil, sys, tempfile, textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
BANNER = '<!-- Made from nbs/index.ipynb by tools/notebooks.py: edit the notebook, not this file. -->\n'
MARK = r'^[ \t]*#[ \t]*\|[ \t]*'                     # nbdev reads '# | export' as it reads '#| export'
EXPORTED = 'export|exports|exporti'                 # exporti keeps a name out of __all__
HEAVY, MOST_CELLS = 150_000, 120                    # bytes and cells of a notebook that can still be reviewed


def sidebar():
    "[(section or None, [notebook below nbs/, ...]), ...] in the order of nbs/sidebar.yml"
    import yaml
    contents = yaml.safe_load((ROOT / 'nbs/sidebar.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']
    return [(None, [c]) if isinstance(c, str) else (c['section'], c['contents']) for c in contents]


def notebooks():
    found = (ROOT / 'nbs').rglob('*.ipynb')
    return sorted(p for p in found if not any(part.startswith(('.', '_')) for part in p.relative_to(ROOT / 'nbs').parts))


def cells(path):
    "The cells of a notebook, the source of each as one text"
    found = json.loads(path.read_text(encoding='utf-8'))['cells']
    return [dict(c, source=''.join(c['source'])) for c in found]


def code_cells(path): return [c for c in cells(path) if c['cell_type'] == 'code']


def has_directive(source, words):
    "Does a cell hold one of these directives ('hide|echo: false')?"
    return bool(re.search(rf'{MARK}({words})(?!\w)', source, re.M))


def without_directives(source): return re.sub(MARK + r'.*\n?', '', source, flags=re.M).strip('\n')


def hides_code(source): return has_directive(source, r'hide|hide_input|echo:\s*false')


def exported_module(path):
    "'stats/paired.py' for a library notebook, None for any other"
    for c in code_cells(path):
        m = re.search(MARK + r'default_exp +([\w.]+)', c['source'], re.M)
        if m: return m[1].replace('.', '/') + '.py'
    return None


def _skipped(cell):
    first = cell.source.strip().splitlines()[:3]
    return any(re.match(r'#\|\s*(eval:\s*false|slow|gpu|notest)\b', line) for line in first)


def _save_outputs(nb, path):
    "Keep what the cells printed and drew, unless the notebook was edited while it ran"
    from execnb.nbio import read_nb, write_nb
    from nbdev.clean import nbdev_clean
    if [(c.id, c.source) for c in read_nb(path).cells] != [(c.id, c.source) for c in nb.cells]:
        sys.exit(f'{path.name} was edited while it ran; run it again to keep its outputs')
    for c in nb.cells:                          # warnings name paths of this machine; what a reader should see is printed
        if c.cell_type == 'code': c.outputs = [o for o in c.outputs if o.get('name') != 'stderr']
    write_nb(nb, path)
    nbdev_clean(str(path))


def run(path, save=True):
    "Execute one notebook as nbdev_test would, but keep what it prints and draws"
    from execnb.nbio import read_nb
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
    if save: _save_outputs(nb, path)
    return nb


def _wrap_names(module):
    "nbdev wraps the list of names without counting what stands before it"
    text = module.read_text(encoding='utf-8')
    wrap = lambda m: textwrap.fill(' '.join(m[0].split()), 120, subsequent_indent=' ' * 11, break_on_hyphens=False)
    module.write_text(re.sub(r'^__all__ = \[[^]]*]', wrap, text, count=1, flags=re.M), encoding='utf-8')


def export(dest, paths=None):
    "Export library notebooks (all, unless named) into `dest`"
    from nbdev.export import nb_export
    for p in paths or notebooks():
        name = exported_module(p)
        if not name: continue
        nb_export(str(p), lib_path=str(dest))
        module = Path(dest) / name
        if module.is_file(): _wrap_names(module)      # a notebook without exported cells makes none


def fenced(language, text): return f'```{language}\n{text}\n```\n'


def printed(output):
    "An output as Markdown; '' for one without text"
    data = output.get('data', {})
    if 'text/markdown' in data: return ''.join(data['text/markdown']).strip() + '\n'
    text = ''.join(output.get('text') or data.get('text/plain') or '')
    return fenced('text', text.rstrip()) if text.strip() else ''


def readme_text():
    "nbs/index.ipynb as Markdown: hidden cells dropped, code fenced as Python, printed results as text"
    out = [BANNER]
    for c in cells(ROOT / 'nbs/index.ipynb'):
        source = c['source'].strip()
        if c['cell_type'] == 'markdown': out.append(source + '\n')
        if c['cell_type'] != 'code' or has_directive(source, 'hide'): continue
        if not hides_code(source): out.append(fenced('python', without_directives(source)))
        out += filter(None, map(printed, c['outputs']))
    return '\n'.join(out)


def _code(path):
    "A module's text without the way back to its notebook, which depends on where it was exported to"
    return re.sub(r'\S*nbs/', 'nbs/', path.read_text(encoding='utf-8'))


MADE = '__init__.py', '_modidx.py'                  # the two files of a package that no notebook exports


def modules(lib): return {str(p.relative_to(lib)) for p in lib.rglob('*.py') if p.name not in MADE}


def _module_faults():
    "Modules that are not what their notebooks export"
    with tempfile.TemporaryDirectory() as d:
        lib, mine = Path(d) / 'covid_cxr', ROOT / 'covid_cxr'
        for p in mine.rglob('__init__.py'):
            (lib / p.relative_to(mine)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(p, lib / p.relative_to(mine))
        export(lib)
        for p in sorted(modules(lib) | modules(mine)):
            if not (lib / p).exists(): yield f'covid_cxr/{p} has no notebook: delete it or write one'
            elif not (mine / p).exists() or _code(lib / p) != _code(mine / p):
                yield f'covid_cxr/{p} differs from its notebook: tools/notebooks.py export (nbdev_update first, if the module was edited)'


def _notebook_faults(p):
    nb, rel = json.loads(p.read_text(encoding='utf-8')), p.relative_to(ROOT)
    ids = [c.get('id') for c in nb['cells']]
    if None in ids or len(set(ids)) < len(ids): yield f'{rel}: every cell needs an id of its own'
    if any(c.get('execution_count') for c in nb['cells']): yield f'{rel}: not clean: run nbdev_clean'
    outputs = [o for c in nb['cells'] for o in c.get('outputs', [])]
    if any(o.get('output_type') == 'error' for o in outputs): yield f'{rel}: holds a failed cell'
    if len(ids) > MOST_CELLS: yield f'{rel}: {len(ids)} cells, over {MOST_CELLS}: too long to read'
    if p.stat().st_size > HEAVY: yield f'{rel}: {p.stat().st_size // 1000} KB, over {HEAVY // 1000}: too heavy to review'


def _wing_faults():
    for wing in sorted({p.parent for p in (ROOT / 'covid_cxr').rglob('*.py')}):
        if not (wing / '__init__.py').is_file(): yield f'{wing.relative_to(ROOT)} has no __init__.py: it would not be installed'


def _sidebar_faults():
    listed = [n for _, names in sidebar() for n in names]
    there = [str(p.relative_to(ROOT / 'nbs')) for p in notebooks()]
    yield from (f'nbs/sidebar.yml does not list {n}' for n in there if n not in listed)
    yield from (f'nbs/sidebar.yml lists {n}, which is not there' for n in listed if n not in there)
    yield from (f'nbs/sidebar.yml lists {n} twice' for n in sorted({n for n in listed if listed.count(n) > 1}))


def faults():
    "Everything that is out of step, one line each"
    yield from _wing_faults()
    yield from _module_faults()
    for p in notebooks(): yield from _notebook_faults(p)
    yield from _sidebar_faults()
    if (ROOT / 'README.md').read_text(encoding='utf-8') != readme_text():
        yield 'README.md is not fresh: python tools/notebooks.py readme'


def check():
    bad = list(faults())
    print('\n'.join(bad) or 'notebooks, modules and README agree')
    return 1 if bad else 0


if __name__ == '__main__':
    cmd, args = (sys.argv[1:2] or ['help'])[0], [Path(a).resolve() for a in sys.argv[2:]]
    os.environ.setdefault('OMP_NUM_THREADS', '2')
    if cmd == 'run':
        if not args: sys.exit('name the notebooks to run')
        for a in args:
            run(a)
            print('ran', a.relative_to(ROOT))
        export(ROOT / 'covid_cxr', args)
    elif cmd == 'export': export(ROOT / 'covid_cxr', args)
    elif cmd == 'readme':
        run(ROOT / 'nbs/index.ipynb')
        (ROOT / 'README.md').write_text(readme_text(), encoding='utf-8')
    elif cmd == 'check': sys.exit(check())
    else: sys.exit(__doc__)
