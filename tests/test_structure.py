"""What holds the library together: one order, imports one way, light imports, code that a reader can hold."""
import ast, json, re, subprocess, sys
from pathlib import Path
import pytest
from conftest import ROOT, python

sys.path.insert(0, str(ROOT / 'tools'))
import density, notebooks

PACKAGE = ROOT / 'covid_cxr'
LISTED = [name for _, names in notebooks.sidebar() for name in names]
ORDER = {notebooks.exported_module(ROOT / 'nbs' / n): i for i, n in enumerate(LISTED) if notebooks.exported_module(ROOT / 'nbs' / n)}
MODULES = {m[:-3].replace('/', '.'): i for m, i in ORDER.items()}       # 'stats.paired' -> its place



def room(module): return module.split('.')[0]                          # a wing counts as one room


def _tree(module): return ast.parse((PACKAGE / (module.replace('.', '/') + '.py')).read_text(encoding='utf-8'))


def _absolute(module, node):
    "Full name below covid_cxr of what an ImportFrom names, or None for other packages"
    if node.level:
        base = module.split('.')[:-node.level]
        return '.'.join([*base, *([node.module] if node.module else [])])
    return node.module.removeprefix('covid_cxr').lstrip('.') if (node.module or '').split('.')[0] == 'covid_cxr' else None


def imports(module):
    "(module, name) of everything of ours that a module imports, at the top or inside a function"
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.Import):
            yield from ((a.name.removeprefix('covid_cxr.'), None) for a in node.names if a.name.startswith('covid_cxr.'))
        if not isinstance(node, ast.ImportFrom) or (where := _absolute(module, node)) is None: continue
        for a in node.names:
            inner = f'{where}.{a.name}'.lstrip('.')
            if inner in MODULES: yield inner, None
            elif where: yield where, a.name


@pytest.mark.parametrize('module', sorted(MODULES))
def test_a_module_imports_only_what_stands_above_it(module):
    for other, _ in imports(module):
        assert other in MODULES, f'{module} imports {other}, which has no notebook'
        assert MODULES[other] < MODULES[module], f'{module} imports {other}, which comes later in nbs/sidebar.yml: data flow one way'


def test_no_private_name_crosses_a_module():
    private = [(m, other, name) for m in MODULES for other, name in imports(m) if name and name.startswith('_')]
    crossing = [f'{m} imports {other}.{name}' for m, other, name in private if name != '__version__']
    assert not crossing, crossing


def test_the_house_has_few_rooms():
    rooms = {room(m) for m in MODULES}
    assert len(rooms) <= 28, sorted(rooms)
    places = {r: sorted(MODULES[m] for m in MODULES if room(m) == r) for r in rooms}
    for r, at in places.items():
        between = [m for m in MODULES if at[0] < MODULES[m] < at[-1] and room(m) != r]
        assert not between, f'{between} stand inside the wing {r}'


def test_every_module_has_a_notebook_of_its_name():
    there = {str(p.relative_to(PACKAGE)) for p in PACKAGE.rglob('*.py') if not p.name.startswith('_')}
    assert there == set(ORDER)
    for n in LISTED:
        m = notebooks.exported_module(ROOT / 'nbs' / n)
        assert not m or m == n.replace('.ipynb', '.py'), f'nbs/{n} exports {m}'
    for wing in {Path(m).parent for m in ORDER}: assert (PACKAGE / wing / '__init__.py').is_file(), wing


def test_no_star_imports():
    for m in set(MODULES) - {'all'}:
        stars = [n for n in ast.walk(_tree(m)) if isinstance(n, ast.ImportFrom) and n.names[0].name == '*']
        assert not stars, m


def test_notebooks_are_an_afternoons_reading():
    for p in notebooks.notebooks():
        assert len(json.loads(p.read_text(encoding='utf-8'))['cells']) <= 120, p.name
        assert p.stat().st_size <= notebooks.HEAVY, p.name


@pytest.mark.parametrize('path', [*density.library_notebooks(), *density.scripts()], ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_dense(path):
    found = density.places(path)
    assert not found, found


def test_the_density_gate_can_fail():
    wide = 'x = ' + '1 + ' * 40 + '1\n'
    held = ['x = "' + 'a' * n + '"\n' for n in (140, 180)]
    assert list(density.long_lines(wide)) and [bool(list(density.long_lines(s))) for s in held] == [False, True]
    assert density.joined_statements('a = 1; b = 2\n') == [1] and density.joined_statements('a = "1; 2"\n') == []
    body = 'def f():\n    "doc"\n' + '    x = 1\n' * 26
    assert density.long_bodies(body) == [('f', 26)] and not density.long_bodies(body.replace('    x = 1\n', '', 1))
    assert list(density.bare_parameters('def f(a, b:int): return a')) == ['f(a)', 'f ->']
    assert not list(density.bare_parameters('def _f(a): return a'))


def test_predict_is_free_of_fastai(phantom_run):
    python('import sys, covid_cxr.predict\nassert "torch" not in sys.modules and "fastai" not in sys.modules')
    python('import sys\nfrom covid_cxr.predict import load_predictor\np = load_predictor(sys.argv[1]).predict(sys.argv[2])\n'
           'assert p.label and "torch" in sys.modules\nassert "fastai" not in sys.modules and "matplotlib" not in sys.modules',
           phantom_run, phantom_run / 'new-image.png')


def test_core_and_words_are_free_of_pandas():
    python('import sys, covid_cxr.core, covid_cxr.words\nassert "pandas" not in sys.modules and "torch" not in sys.modules')


def test_importing_changes_nothing_global():
    python('import importlib, random, sys, warnings\nimport numpy as np, torch, fastai.vision.all\n'
           'random.seed(1); np.random.seed(1); torch.manual_seed(1)\n'
           'state = lambda: (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(),\n'
           '                 list(warnings.filters))\n'
           'before = state()\n'
           'for m in sys.argv[1:]: importlib.import_module("covid_cxr." + m)\n'
           'after = state()\n'
           'assert before[:3] == after[:3], "random state"\nassert before[3] == after[3], "warning filters"', *MODULES)


def test_help_answers_without_torch():
    code = ('import sys\nfrom covid_cxr.cli import main\ntry: main(["--help"])\nexcept SystemExit: pass\n'
            'assert "torch" not in sys.modules and "pandas" not in sys.modules')
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert out.returncode == 0 and 'covid-cxr' in out.stdout, out.stderr


def test_dependencies_stand_in_one_place():
    text = ''.join((ROOT / f).read_text() for f in ('setup.py', 'pyproject.toml', 'Makefile'))
    for name in ('fastai>=', 'torch>=', 'pandas>=', 'nbdev>='): assert name not in text
