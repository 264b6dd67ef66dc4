"""What the documentation tells people to type is understood, and what it names exists."""
import json, re, shlex
import pytest
from conftest import ROOT


def _prose():
    yield 'README.md', (ROOT / 'README.md').read_text()
    for p in sorted((ROOT / 'nbs').rglob('*.ipynb')):
        if '.ipynb_checkpoints' in p.parts: continue
        cells = json.loads(p.read_text(encoding='utf-8'))['cells']
        yield str(p.relative_to(ROOT)), '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')


def commands():
    "(file, command) of every indented, shown or quoted covid-cxr command with arguments, without the file that takes what it prints"
    for name, text in _prose():
        for line in re.findall(r'^(?: {4}|\$ )(covid-cxr .*)$', text, re.M): yield name, line.split('#')[0].strip()
        for line in re.findall(r'`(covid-cxr [a-z]+ [^`]+)`', text): yield name, line


# words in capitals stand for something of the reader's own
@pytest.mark.parametrize('name,command', [c for c in commands() if '...' not in c[1]], ids=lambda v: v[:60])
def test_a_documented_command_is_understood(name, command):
    from covid_cxr.cli import make_parser
    make_parser().parse_args(shlex.split(command.partition(' > ')[0])[1:])


def test_there_are_documented_commands(): assert len(list(commands())) > 15


def test_the_readme_is_one_screen_and_a_half():
    text = (ROOT / 'README.md').read_text()
    assert len(text.splitlines()) <= 125
    for figure in re.findall(r'!\[[^]]*\]\(([^)]+)\)', text):
        assert figure.startswith('https://'), 'an address that works where only the README is shown'
        assert (ROOT / figure.split('/main/')[1]).is_file(), figure


def test_the_makefile_names_files_that_exist():
    text = (ROOT / 'Makefile').read_text()
    for f in re.findall(r'\b((?:tests|tools|benchmarks)/\w+\.py)\b', text): assert (ROOT / f).is_file(), f


def test_every_name_of_the_sidebar_has_a_page_of_docs():
    import sys
    sys.path.insert(0, str(ROOT / 'tools'))
    import docs, notebooks
    named = {s for _, sections in docs.GROUPS if sections for s in sections}
    assert named <= {s for s, _ in notebooks.sidebar()}, named


def test_wheel_and_sdist_hold_every_file_of_the_package():
    from fnmatch import fnmatch
    setup, manifest = (ROOT / 'setup.py').read_text(), (ROOT / 'MANIFEST.in').read_text()
    patterns = re.search(r"package_data=\{'covid_cxr': \[([^]]+)\]", setup)[1].replace("'", '').replace(',', ' ').split()
    package = ROOT / 'covid_cxr'
    files = [str(p.relative_to(package)) for p in package.rglob('*') if p.is_file() and p.suffix not in ('.py', '.pyc')]
    assert files and all(any(fnmatch(f, p) for p in patterns) for f in files), files
    assert all(any(fnmatch(f, f'*{k.lstrip("*")}') for k in manifest.splitlines()[1].split()[2:]) for f in files), files
    for name in ('settings.ini', 'README.md', 'LICENSE'): assert name in manifest.splitlines()[0]
    for wing in {p.parent for p in package.rglob('*.py')}: assert (wing / '__init__.py').is_file(), wing
