"""Build the docs site from the notebooks and docstrings:

    python tools/docs.py [--out _docs]      _docs/html/index.html; any warning is an error

Each notebook becomes a page: its prose, its visible examples with their saved outputs, and for every exported
function its signature, its one-line promise and a table of its parameters. Nothing is executed.
"""
import argparse, ast, base64, importlib, inspect, re, shutil, subprocess, sys
from pathlib import Path
from typing import NamedTuple
from notebooks import (EXPORTED, ROOT, cells, code_cells, exported_module, fenced, has_directive, hides_code, printed, sidebar,
                       without_directives)

GROUPS = (  # caption of the navigation -> sections of nbs/sidebar.yml
    ('Tutorials', ('Tutorials',)), ('How-to', ('How-to',)), ('Results', ('Results',)), ('Five articles', ('articles',)),
    ('Reference', None), ('Words', ('Words',)))
TITLE = 'covid_cxr'


# --- API ----------------------------------------------------------------------------------------------------------

OURS = re.compile(r'\bcovid_cxr(\.\w+)*\.(?=\w)')


def _kind(annotation):
    "An annotation as a reader would write it; '' when there is none"
    if annotation in (inspect.Parameter.empty, None): return ''
    return OURS.sub('', annotation if isinstance(annotation, str) else inspect.formatannotation(annotation))


def _named(text):
    "'<built-in function print>' as a reader would write it"
    return re.sub(r'<(?:built-in )?(?:function|class) \'?([\w.]+)[^>]*>', r'\1', text)


def _parameter_rows(function):
    from fastcore.docments import docments
    notes = docments(function, full=True)
    for name, d in notes.items():
        kind = _kind(d.anno)
        default = '' if name == 'return' or d.default is inspect.Parameter.empty else _named(repr(d.default))
        if name in ('self', 'cls') or not (kind or d.docment): continue
        yield '**returns**' if name == 'return' else f'`{name}`', kind, default, (d.docment or '').replace('\n', ' ')


def _table_row(cells): return '| ' + ' | '.join(str(c).replace('|', '\\|') for c in cells) + ' |'


def _quoted(text): return f'`{text}`' if text else ''


def _signature(name, obj):
    try: text = str(inspect.signature(obj))
    except (TypeError, ValueError): return name
    text = OURS.sub('', re.sub(r"""(: |-> )(['"])(.*?)\2(?=[,) ]|$)""", r'\1\3', _named(text)))    # an annotation, not a default
    if len(name + text) <= 90: return name + text
    inside, _, returns = text[1:].rpartition(')')
    return f'{name}(\n    ' + ',\n    '.join(_split_parameters(inside)) + f'\n){returns}'


def _split_parameters(text):
    "'a: int, b: tuple[int, str] = (1, 2)' -> its two parts"
    parts, depth = [''], 0
    for c in text:
        depth += (c in '([{') - (c in ')]}')
        if c == ',' and not depth: parts.append('')
        else: parts[-1] += c
    return [p.strip() for p in parts]


def _target(module, name):
    "Anchor of a public name; targets know no capitals, so a class and a function of one name are kept apart"
    return f'api-{module}-{"class-" if name[0].isupper() else ""}{name}'.lower()


def api(module, name):
    "Markdown of one public function or class: signature, promise, parameters"
    obj = getattr(importlib.import_module(f'covid_cxr.{module}'), name)
    if not (inspect.isclass(obj) or inspect.isfunction(obj)): return ''
    rows = list(_parameter_rows(obj)) if inspect.isfunction(obj) else []
    promise = inspect.getdoc(obj).splitlines()[0] if obj.__doc__ else ''
    lines = [f'({_target(module, name)})=', '```python', _signature(name, obj), '```', '', promise, '']
    if rows:
        lines += [_table_row(('', 'type', 'default', 'meaning')), _table_row(['---'] * 4)]
        lines += [*(_table_row((a, _quoted(b), _quoted(c), d)) for a, b, c, d in rows), '']
    return '\n'.join(lines)


def _public_names(source):
    named = (n.name for n in ast.parse(source).body if isinstance(n, (ast.FunctionDef, ast.ClassDef)))
    return [n for n in named if not n.startswith('_')]


def _dotted(module): return module and module[:-3].replace('/', '.')    # 'stats/paired.py' -> 'stats.paired'


def exported_names():
    "name -> module of every exported function and class; a name of two modules belongs to the first"
    out = {}
    for _, names in sidebar():
        for n in names:
            path = ROOT / 'nbs' / n
            for c in code_cells(path) if (module := _dotted(exported_module(path))) else ():
                if not has_directive(c['source'], 'exports?'): continue
                for name in _public_names(c['source']): out.setdefault(name, module)
    return out


# --- pages --------------------------------------------------------------------------------------------------------

def _linked(text, names):
    "`name` in prose -> a link to its place in the reference"
    def one(m):
        name = m[1].split('(')[0].split('.')[-1]
        return f'[{m[0]}](#{_target(names[name], name)})' if name in names else m[0]
    text = re.sub(r'\]\(([\w/.-]+)\.ipynb\)', r'](\1.md)', text)             # a link to another notebook is one to its page
    return re.sub(r'(?<![`\[])`([A-Za-z_][\w.]*(?:\(\))?)`(?!`)', one, text)


class Page(NamedTuple):
    name: str                   # of the notebook below nbs/, without .ipynb
    module: str | None          # 'stats.paired' of a library notebook
    names: dict                 # exported name -> its module, for links
    folder: Path                # that the site is built from


def _figure(data, kind, page, number):
    file = page.folder / 'figures' / f'{page.name.replace("/", "-")}-{number}.{kind}'
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(base64.b64decode(''.join(data)))
    return f'![](/figures/{file.name})\n'


def _wrapped(text):
    "Printed sentences wrap at the edge of the window; columns that stand below each other scroll instead"
    aligned = re.search(r'\S {2,}\S', text)
    return text if aligned else text.replace('```text\n', '```{code-block} text\n:class: words\n\n', 1)


def _output(o, page, number):
    data = o.get('data', {})
    for mime, kind in (('image/png', 'png'), ('image/jpeg', 'jpg')):
        if mime in data: return _figure(data[mime], kind, page, number)
    if 'text/markdown' not in data and 'text/html' in data:
        inside = re.sub(r'\n\s*\n', '\n', ''.join(data['text/html']))
        return f'<div class="output">\n{inside}\n</div>\n'
    return _wrapped(printed(o))


FIGURES = 'https://raw.githubusercontent.com/covid-cxr/covid_cxr/main/nbs/figures/'     # as the README needs them


def _own_figures(text, folder):
    "The README's figures from the site itself, so that a page asks no other host"
    for name in re.findall(re.escape(FIGURES) + r'([\w.-]+)', text):
        (folder / 'figures').mkdir(exist_ok=True)
        shutil.copy(ROOT / 'nbs/figures' / name, folder / 'figures' / name)
    return text.replace(FIGURES, '/figures/')


def _example(cell, page, number):
    "A visible cell: its code, and what it printed and drew"
    if not hides_code(cell['source']): yield fenced('python', without_directives(cell['source']))
    for i, o in enumerate(cell['outputs']): yield _output(o, page, f'{number}-{i}')


def _parts(cell, page, number):
    "What a cell gives to its page"
    source = cell['source']
    if cell['cell_type'] == 'markdown': yield _linked(source, page.names) + '\n'
    if cell['cell_type'] != 'code' or not source.strip() or has_directive(source, 'hide|default_exp|exporti'): return
    if has_directive(source, EXPORTED): yield from (api(page.module, n) for n in _public_names(source))
    else: yield from _example(cell, page, number)


def page_text(name, names, folder):
    "One notebook as a MyST page"
    path = ROOT / 'nbs' / name
    page = Page(name[:-6], _dotted(exported_module(path)), names, folder)
    parts = (part for i, c in enumerate(cells(path)) for part in _parts(c, page, i))
    return _own_figures('\n'.join(parts), folder)


def _toctree(caption, names, hidden=True):
    options = [f':caption: {caption}', ':maxdepth: 1', *([':hidden:'] if hidden else [])]
    return '\n'.join(['```{toctree}', *options, '', *(n[:-6] for n in names), '```', ''])


def _index(page):
    sections = [(s, [n for n in names if n != 'index.ipynb']) for s, names in sidebar()]
    named = {s for _, wanted in GROUPS if wanted for s in wanted}
    out = [page]
    for caption, wanted in GROUPS:
        if wanted: names = [n for s, ns in sections if s in wanted for n in ns]
        else: names = [n for s, ns in sections if s not in named for n in ns]
        if names: out.append(_toctree(caption, names))
    return '\n'.join(out)


CONF = '''
project, author, copyright = 'covid_cxr', 'The covid_cxr authors', '2026 onwards, The covid_cxr authors'
extensions = ['myst_parser']
myst_enable_extensions = ['colon_fence', 'dollarmath']
myst_heading_anchors = 4
html_theme, html_title, html_static_path, html_css_files = 'furo', 'covid_cxr', ['_static'], ['docs.css']
html_show_sphinx = False
'''
CSS = '''
.output table { border-collapse: collapse; border: 0; }
.output th, .output td { border: 0; border-bottom: 1px solid var(--color-background-border); padding: .25rem .6rem; text-align: right; }
.output { overflow-x: auto; margin: .5rem 0 1rem; font-size: .85rem; }
.output table { font-size: .85rem; font-variant-numeric: tabular-nums; }
.table-wrapper { overflow-x: auto; }
.table-wrapper table.docutils { margin-left: 0; }
.table-wrapper table { font-size: .78rem; line-height: 1.35; font-variant-numeric: tabular-nums; }
.table-wrapper table.docutils th, .table-wrapper table.docutils td { padding: .2rem .4rem; }
.words pre { white-space: pre-wrap; overflow-wrap: anywhere; }
img { background: #fff; }
/* the column takes the room that the window has: prose stays narrow, tables and printed lines do not */
@media (min-width: 63em) {
  .sidebar-drawer { flex: none; width: 15em; }
  .main { min-width: 0; }
  .content { flex: 1 1 46em; width: auto; min-width: 0; max-width: 70em; padding: 0 2em; box-sizing: border-box; margin-left: 0; }
  .content p, .content li, .content blockquote { max-width: 46em; }
  .table-wrapper p, .output p { max-width: none; }
  .highlight-text pre { white-space: pre-wrap; overflow-wrap: anywhere; }
}
'''


def build(out):
    src = out / 'source'
    shutil.rmtree(out, ignore_errors=True)
    (src / '_static').mkdir(parents=True)
    (src / 'conf.py').write_text(CONF)
    (src / '_static/docs.css').write_text(CSS)
    names = exported_names()
    for _, pages in sidebar():
        for n in pages:
            text, to = page_text(n, names, src), src / (n[:-6] + '.md')
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_text(_index(text) if n == 'index.ipynb' else text, encoding='utf-8')
    command = [sys.executable, '-m', 'sphinx', '-W', '--keep-going', '-q', '-b', 'html', str(src), str(out / 'html')]
    return subprocess.run(command).returncode


if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--out', type=Path, default=ROOT / '_docs')
    args = ap.parse_args()
    code = build(args.out)
    print(f'docs: {args.out}/html/index.html' if code == 0 else 'the docs have warnings; see above')
    sys.exit(code)
