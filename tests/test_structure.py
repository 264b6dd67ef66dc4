"""What holds the library together: data flow one way, imports stay cheap, nothing happens on import."""
import ast, re, subprocess, sys
import pytest
from conftest import ROOT, python

NOTEBOOKS = sorted((ROOT / 'nbs').glob('[0-9]*.ipynb'))


def _order():
    "module name -> place of its notebook"
    found = {}
    for p in NOTEBOOKS:
        m = re.search(r'#\| default_exp (\w+)', p.read_text(encoding='utf-8'))
        if m: found[m.group(1)] = (p.name.split('_')[0], p.name)
    return found


def _imports(module):
    "Every module of ours that a module imports, at the top or inside a function"
    for node in ast.walk(ast.parse((ROOT / 'covid_cxr' / f'{module}.py').read_text(encoding='utf-8'))):
        if isinstance(node, ast.ImportFrom) and node.module == 'covid_cxr': yield from (a.name for a in node.names if a.name != '__version__')
        elif isinstance(node, ast.ImportFrom) and (node.module or '').startswith('covid_cxr.'): yield node.module.split('.')[1]
        elif isinstance(node, ast.Import): yield from (a.name.split('.')[1] for a in node.names if a.name.startswith('covid_cxr.'))


@pytest.mark.parametrize('module', sorted(_order()))
def test_a_module_imports_only_what_stands_before_it(module):
    order = _order()
    for other in _imports(module):
        assert other in order, f'{module} imports {other}, which has no notebook'
        assert order[other] < order[module], f'{order[module][1]} imports {other}, which comes later: data flow one way'


def test_every_module_has_a_notebook_and_no_star_imports():
    modules = {p.stem for p in (ROOT / 'covid_cxr').glob('*.py')} - {'__init__', '_modidx'}
    assert modules == set(_order())
    for m in modules: assert not re.search(r'^from .* import \*', (ROOT / 'covid_cxr' / f'{m}.py').read_text(), re.M), m


def test_notebooks_are_an_afternoons_reading():
    import json
    for p in NOTEBOOKS:
        nb = json.loads(p.read_text(encoding='utf-8'))
        assert len(nb['cells']) <= 120, p.name
        assert p.stat().st_size < 400_000, p.name


def test_the_predict_path_is_free_of_fastai(phantom_run):
    python('import sys, covid_cxr.predict\nassert "torch" not in sys.modules and "fastai" not in sys.modules')
    python('import sys\nfrom covid_cxr.predict import load_predictor\np = load_predictor(sys.argv[1]).predict(sys.argv[2])\n'
           'assert p.label and "torch" in sys.modules\nassert "fastai" not in sys.modules and "matplotlib" not in sys.modules', phantom_run, phantom_run / 'new-image.png')


def test_importing_changes_nothing_global():
    modules = [m for m in _order()]
    python('import importlib, random, sys, warnings\nimport numpy as np, torch, fastai.vision.all\n'
           'random.seed(1); np.random.seed(1); torch.manual_seed(1)\n'
           'before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), list(warnings.filters)\n'
           'for m in sys.argv[1:]: importlib.import_module("covid_cxr." + m)\n'
           'after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), list(warnings.filters)\n'
           'assert before[:3] == after[:3], "random state"\nassert before[3] == after[3], "warning filters"', *modules)


def test_help_answers_without_torch():
    out = subprocess.run([sys.executable, '-c', 'import sys\nfrom covid_cxr.cli import main\ntry: main(["--help"])\nexcept SystemExit: pass\nassert "torch" not in sys.modules'],
                         capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert out.returncode == 0 and 'covid-cxr' in out.stdout, out.stderr


def test_dependencies_stand_in_one_place():
    text = (ROOT / 'setup.py').read_text() + (ROOT / 'pyproject.toml').read_text() + (ROOT / 'Makefile').read_text()
    for name in ('fastai>=', 'torch>=', 'pandas>=', 'nbdev>='): assert name not in text
