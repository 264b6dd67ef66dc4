"""What holds the library together: one order, imports one way, light imports, code that a reader can hold."""
import ast, sys
import pytest
from conftest import ROOT, python

sys.path.insert(0, str(ROOT / 'tools'))
import density, notebooks

PACKAGE = ROOT / 'covid_cxr'
LISTED = [name for _, names in notebooks.sidebar() for name in names]
EXPORTS = {n: notebooks.exported_module(ROOT / 'nbs' / n) for n in LISTED}      # notebook -> module, or None
ORDER = {EXPORTS[n]: i for i, n in enumerate(LISTED) if EXPORTS[n]}
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


PUBLIC = '__version__', '__all__'        # Python's own names for others


def private_uses(module):
    "Private names of other modules: imported by name, or reached through a module of ours"
    for other, name in imports(module):
        if name and name.startswith('_') and name not in PUBLIC: yield f'{module} imports {other}.{name}'
    tree = _tree(module)
    named = (a for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and _absolute(module, node) is not None for a in node.names)
    ours = {a.asname or a.name for a in named if any(m == a.name or m.endswith(f'.{a.name}') for m in MODULES)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ours:
            if node.attr.startswith('_') and node.attr not in PUBLIC: yield f'{module} uses {node.value.id}.{node.attr}'


def test_no_private_name_crosses_a_module():
    crossing = [use for m in MODULES for use in private_uses(m)]
    assert not crossing, crossing


def test_the_house_has_few_rooms():
    rooms = {room(m) for m in MODULES}
    assert len(rooms) <= 28, sorted(rooms)
    places = {r: sorted(MODULES[m] for m in MODULES if room(m) == r) for r in rooms}
    for r, at in places.items():
        between = [m for m in MODULES if at[0] < MODULES[m] < at[-1] and room(m) != r]
        assert not between, f'{between} stand inside the wing {r}'


def test_every_module_has_a_notebook_of_its_name():
    assert notebooks.modules(PACKAGE) == set(ORDER)
    for n, m in EXPORTS.items(): assert m in (None, n.replace('.ipynb', '.py')), f'nbs/{n} exports {m}'


def test_no_star_imports():
    for m in set(MODULES) - {'all'}:
        stars = [n for n in ast.walk(_tree(m)) if isinstance(n, ast.ImportFrom) and n.names[0].name == '*']
        assert not stars, m


@pytest.mark.parametrize('path', [*density.library_notebooks(), *density.scripts()], ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_dense(path):
    found = density.places(path)
    assert not found, found


def test_no_line_of_the_package_is_wide():
    "Titles and lists of names too, which the exporter writes; templates and style sheets"
    files = [p for p in PACKAGE.rglob('*') if p.suffix in ('.py', '.j2', '.css')]
    wide = {f'{p.relative_to(ROOT)}:{i}' for p in files for i, _ in density.long_lines(p.read_text(encoding='utf-8'))}
    assert {'.py', '.j2', '.css'} == {p.suffix for p in files}
    assert not wide, sorted(wide)


# module -> what importing it must not import
LIGHT = {'core': 'pandas torch', 'words': 'pandas torch', 'model.settings': 'pandas torch fastai',
         'predict': 'pandas torch fastai matplotlib', 'ood': 'pandas torch scipy', 'model.heatmaps': 'pandas torch scipy',
         'deploy.explain': 'pandas torch fastai matplotlib sklearn skimage', 'cli': 'pandas torch fastai'}


@pytest.mark.parametrize('module', LIGHT)
def test_a_light_import_stays_light(module):
    python(f'import sys, covid_cxr.{module}\nassert not set({LIGHT[module].split()}) & set(sys.modules)')


def test_predict_brings_torch_alone(phantom_run, tmp_path):
    "Opening a bundle, predicting and writing a CSV"
    python('import sys\nfrom covid_cxr.predict import load_predictor, save_predictions\n'
           'p = load_predictor(sys.argv[1]).predict(sys.argv[2])\n'
           'assert p.label and p.probabilities and "torch" in sys.modules\n'
           'save_predictions([p], sys.argv[3])\n'
           'assert not {"fastai", "matplotlib", "pandas"} & set(sys.modules)',
           phantom_run, phantom_run / 'new-image.png', tmp_path / 'out.csv')


def test_importing_changes_nothing_global():
    python('import importlib, random, sys, warnings\nimport numpy as np, torch, fastai.vision.all\n'
           'random.seed(1); np.random.seed(1); torch.manual_seed(1)\n'
           'state = lambda: (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(),\n'
           '                 list(warnings.filters))\n'
           'before = state()\n'
           'for m in sys.argv[1:]: importlib.import_module("covid_cxr." + m)\n'
           'after = state()\n'
           'assert before[:3] == after[:3], "random state"\nassert before[3] == after[3], "warning filters"', *MODULES)


def test_dependencies_stand_in_one_place():
    text = ''.join((ROOT / f).read_text() for f in ('setup.py', 'pyproject.toml', 'Makefile'))
    for name in ('fastai>=', 'torch>=', 'pandas>=', 'nbdev>='): assert name not in text
