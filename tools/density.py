"""How densely is the code written? Counts what a reader stumbles over, and prints each place:

    python tools/density.py                      every notebook (exported cells), tests/, tools/ and benchmarks/
    python tools/density.py nbs/table.ipynb ...  these alone

Exported cells: no line over 120 characters (160 for one that holds one long string), no ';' that joins statements,
no more than three definitions in a cell, bodies of at most 25 lines (signature and docstring not counted),
every public function annotated, every public name in a visible example of its notebook.
Tests, tools and benchmarks: no line over 140 characters, no ';'.
"""
import ast, io, json, re, sys, tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINE, STRING_LINE, SCRIPT_LINE, BODY, DEFINITIONS = 120, 160, 140, 25, 3


def _tokens(source):
    try: return list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (tokenize.TokenError, SyntaxError): return []


def long_lines(source, limit=LINE, string_limit=STRING_LINE):
    "(line number, length) of lines over the limit; one that holds one long string may be a little longer"
    held = {}
    for t in _tokens(source):
        if t.type == tokenize.STRING or t.type == getattr(tokenize, 'FSTRING_MIDDLE', -1):
            for row in range(t.start[0], t.end[0] + 1): held[row] = max(held.get(row, 0), len(t.string))
    for i, line in enumerate(source.splitlines(), 1):
        allowed = string_limit if held.get(i, 0) >= limit // 2 else limit
        if len(line) > allowed: yield i, len(line)


def joined_statements(source):
    "Line numbers on which ';' joins statements"
    return sorted({t.start[0] for t in _tokens(source) if t.type == tokenize.OP and t.string == ';'})


def _functions(tree): return [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


def _body_lines(function, lines):
    body = function.body
    documented = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant) and isinstance(body[0].value.value, str)
    first = body[1:] if documented else body
    return sum(bool(line.strip()) for line in lines[first[0].lineno - 1:function.end_lineno]) if first else 0


def long_bodies(source):
    "(name, lines) of functions whose body is longer than a reader holds"
    tree, lines = ast.parse(source), source.splitlines()
    return [(f.name, n) for f in _functions(tree) if (n := _body_lines(f, lines)) > BODY]


def _public_functions(node):
    "A public function, or the public methods of a public class"
    if isinstance(node, ast.FunctionDef): found = [node]
    elif isinstance(node, ast.ClassDef) and not node.name.startswith('_'): found = [f for f in node.body if isinstance(f, ast.FunctionDef)]
    else: found = []
    return [f for f in found if not f.name.startswith('_')]


def bare_parameters(source):
    "'function(parameter)' of public functions and methods that lack an annotation; 'function ->' for a missing return type"
    for node in ast.parse(source).body:
        for f in _public_functions(node):
            a = f.args
            every = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
            for arg in every:
                if arg.annotation is None and arg.arg not in ('self', 'cls'): yield f'{f.name}({arg.arg})'
            if f.returns is None: yield f'{f.name} ->'


def _cells(path):
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    return [(c, ''.join(c['source'])) for c in cells if c['cell_type'] == 'code']


def _is_exported(source): return bool(re.search(r'^#\|\s*exporti?s?\b(?!_)', source, re.M))


def _public_names(source):
    for n in ast.parse(source).body:
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)): yield n.name
        elif isinstance(n, ast.Assign): yield from (t.id for t in n.targets if isinstance(t, ast.Name))
        elif isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name): yield n.target.id


def unseen_names(path):
    "Public names that stand in no visible example of their notebook"
    cells = _cells(path)
    visible = '\n'.join(s for _, s in cells if not _is_exported(s) and not re.search(r'^#\|\s*hide\b', s, re.M))
    names = [n for _, s in cells if _is_exported(s) for n in _public_names(s) if not n.startswith('_')]
    return [n for n in dict.fromkeys(names) if not re.search(rf'\b{re.escape(n)}\b', visible)]


def notebook_places(path):
    "(kind, place) of everything that a reader of this notebook stumbles over"
    for cell, source in _cells(path):
        if not _is_exported(source): continue
        where = cell.get('id', '?')
        yield from (('line', f'{where}:{i} has {n} characters') for i, n in long_lines(source))
        yield from (('joined', f'{where}:{i}') for i in joined_statements(source))
        n = sum(isinstance(d, (ast.FunctionDef, ast.ClassDef)) for d in ast.parse(source).body)
        if n > DEFINITIONS: yield 'definitions', f'{where} has {n}'
        yield from (('body', f'{where} {name} has {n} lines') for name, n in long_bodies(source))
        yield from (('annotation', f'{where} {what}') for what in bare_parameters(source))
    yield from (('example', name) for name in unseen_names(path))


def script_places(path):
    source = path.read_text(encoding='utf-8')
    yield from (('line', f'{i} has {n} characters') for i, n in long_lines(source, SCRIPT_LINE, SCRIPT_LINE))
    yield from (('joined', str(i)) for i in joined_statements(source))


def library_notebooks():
    found = (p for p in (ROOT / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
    return sorted(p for p in found if '#| default_exp' in p.read_text(encoding='utf-8'))


def scripts(): return sorted(p for d in ('tests', 'tools', 'benchmarks') for p in (ROOT / d).rglob('*.py'))


def places(path): return list(notebook_places(path) if path.suffix == '.ipynb' else script_places(path))


if __name__ == '__main__':
    paths = [Path(a).resolve() for a in sys.argv[1:]]
    total = {}
    for p in paths or [*library_notebooks(), *scripts()]:
        for kind, place in places(p):
            total[kind] = total.get(kind, 0) + 1
            if paths: print(f'{p.relative_to(ROOT)}: {kind}: {place}')
    print(', '.join(f'{k} {n}' for k, n in sorted(total.items())) or 'nothing')
