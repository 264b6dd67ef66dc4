"""How densely is the code written? Prints each place at which a reader stumbles; exit status 1 when there is one:

    python tools/density.py                      every notebook (exported cells), tests/, tools/ and benchmarks/
    python tools/density.py nbs/table.ipynb ...  these alone

Exported cells: no line over 120 characters, no ';' that joins statements, no more than three definitions in a cell,
bodies of at most 25 lines (signature and docstring not counted), every public function annotated, every public name in
a visible example of its notebook. Tests, tools and benchmarks: no line over 140 characters, no ';'.
"""
import ast, io, re, sys, tokenize
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent))
from notebooks import EXPORTED, ROOT, code_cells, exported_module, has_directive, notebooks

LINE, SCRIPT_LINE, BODY, DEFINITIONS = 120, 140, 25, 3
FUNCTION = ast.FunctionDef, ast.AsyncFunctionDef
DEFINITION = *FUNCTION, ast.ClassDef
CALLED = '__init__', '__call__'                     # private by name, yet what a reader calls


def _tokens(source):
    "As far as it can be read as Python"
    try: yield from tokenize.generate_tokens(io.StringIO(source).readline)
    except (tokenize.TokenError, SyntaxError): return


def long_lines(source, limit=LINE):
    "(line number, length) of lines over the limit"
    return [(i, len(line)) for i, line in enumerate(source.splitlines(), 1) if len(line) > limit]


def joined_statements(source):
    "Line numbers on which ';' joins statements"
    return sorted({t.start[0] for t in _tokens(source) if t.type == tokenize.OP and t.string == ';'})


def _functions(tree): return [n for n in ast.walk(tree) if isinstance(n, FUNCTION)]


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
    found = node.body if isinstance(node, ast.ClassDef) and not node.name.startswith('_') else [node]
    return [f for f in found if isinstance(f, FUNCTION) and (f.name in CALLED or not f.name.startswith('_'))]


def bare_parameters(source):
    "'function(parameter)' of public functions and methods that lack an annotation; 'function ->' for a missing return type"
    for node in ast.parse(source).body:
        for f in _public_functions(node):
            a = f.args
            for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))):
                if arg.annotation is None and arg.arg not in ('self', 'cls'): yield f'{f.name}({arg.arg})'
            if f.returns is None and f.name != '__init__': yield f'{f.name} ->'


def _public_names(source):
    "Names that an exported cell defines for others"
    names = []
    for n in ast.parse(source).body:
        if isinstance(n, DEFINITION): names.append(n.name)
        if isinstance(n, (ast.Assign, ast.AnnAssign)):
            targets = n.targets if isinstance(n, ast.Assign) else [n.target]
            names += [t.id for target in targets for t in ast.walk(target) if isinstance(t, ast.Name) and isinstance(t.ctx, ast.Store)]
    return [n for n in names if not n.startswith('_')]


def _exported(path): return [c for c in code_cells(path) if has_directive(c['source'], EXPORTED)]


def _used_names(source):
    "Every name that a cell uses as code, f-strings included; a word in a comment or a string is no example"
    nodes = list(ast.walk(ast.parse(source)))
    return {n.id for n in nodes if isinstance(n, ast.Name)} | {n.attr for n in nodes if isinstance(n, ast.Attribute)}


def _visible_names(path):
    shown = [c['source'] for c in code_cells(path) if not has_directive(c['source'], f'hide|{EXPORTED}')]
    return set().union(*map(_used_names, shown))


def unseen_names(path):
    "Public names that stand in no visible example of their notebook"
    names, seen = [n for c in _exported(path) for n in _public_names(c['source'])], _visible_names(path)
    return [n for n in dict.fromkeys(names) if n not in seen]


def notebook_places(path):
    "(kind, place) of everything that a reader of this notebook stumbles over"
    for cell in _exported(path):
        source, where = cell['source'], cell.get('id', '?')
        yield from (('line', f'{where}:{i} has {n} characters') for i, n in long_lines(source))
        yield from (('joined', f'{where}:{i}') for i in joined_statements(source))
        n = sum(isinstance(d, DEFINITION) for d in ast.parse(source).body)
        if n > DEFINITIONS: yield 'definitions', f'{where} has {n}'
        yield from (('body', f'{where} {name} has {n} lines') for name, n in long_bodies(source))
        yield from (('annotation', f'{where} {what}') for what in bare_parameters(source))
    yield from (('example', name) for name in unseen_names(path))


def script_places(path):
    source = path.read_text(encoding='utf-8')
    yield from (('line', f'{i} has {n} characters') for i, n in long_lines(source, SCRIPT_LINE))
    yield from (('joined', str(i)) for i in joined_statements(source))


def library_notebooks(): return [p for p in notebooks() if exported_module(p)]


def scripts(): return sorted(p for d in ('tests', 'tools', 'benchmarks') for p in (ROOT / d).rglob('*.py'))


def places(path): return list(notebook_places(path) if path.suffix == '.ipynb' else script_places(path))


if __name__ == '__main__':
    paths, total = [Path(a).resolve() for a in sys.argv[1:]], {}
    for p in paths or [*library_notebooks(), *scripts()]:
        for kind, place in places(p):
            total[kind] = total.get(kind, 0) + 1
            print(f'{p.relative_to(ROOT)}: {kind}: {place}')
    print(', '.join(f'{k} {n}' for k, n in sorted(total.items())) or 'nothing')
    sys.exit(bool(total))
