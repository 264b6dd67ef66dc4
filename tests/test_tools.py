"""Each check of tools/ can fail: a small repository with one fault at a time, and what is said about it."""
import inspect, json, shutil, sys
from typing import Literal
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / 'tools'))
import density, docs, notebooks


def cell(source, number, kind='code', **more):
    outputs = dict(outputs=[], execution_count=None) if kind == 'code' else {}
    return dict(cell_type=kind, id=f'cell-{number}', metadata={}, source=source, **outputs, **more)


def write_notebook(path, *sources):
    "A notebook of these cells; one that begins with '# ' and a letter is prose"
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [cell(s, i, 'markdown' if s[:2] == '# ' and s[2].isalpha() else 'code') for i, s in enumerate(sources)]
    kernel = dict(kernelspec=dict(display_name='python3', language='python', name='python3'))
    path.write_text(json.dumps(dict(cells=cells, metadata=kernel, nbformat=4, nbformat_minor=5)))
    return path


ONE = '#| export\ndef one() -> int: return 1'
SIDEBAR = 'website: {sidebar: {contents: [index.ipynb, a.ipynb, {section: w, contents: [w/b.ipynb]}]}}'


@pytest.fixture
def house(tmp_path, monkeypatch):
    "A repository of two modules, one of them in a wing, in which everything is in step"
    for tool in (notebooks, docs, density): monkeypatch.setattr(tool, 'ROOT', tmp_path)
    write_notebook(tmp_path / 'nbs/index.ipynb', '# House', 'print(1)')
    for name in ('a', 'w/b'):
        head = f'#| default_exp {name.replace("/", ".")}'
        write_notebook(tmp_path / f'nbs/{name}.ipynb', f'# {name}', head, ONE, 'one()')
    (tmp_path / 'nbs/sidebar.yml').write_text(SIDEBAR)
    (tmp_path / 'covid_cxr/w').mkdir(parents=True)
    for folder in ('covid_cxr', 'covid_cxr/w'): (tmp_path / folder / '__init__.py').touch()
    notebooks.export(tmp_path / 'covid_cxr')
    (tmp_path / 'README.md').write_text(notebooks.readme_text())
    return tmp_path


def edit(file, old, new): file.write_text(file.read_text().replace(old, new))


def edit_cell(file, **values):
    nb = json.loads(file.read_text())
    nb['cells'][-1].update(values)
    file.write_text(json.dumps(nb))


def many_cells(house): write_notebook(house / 'nbs/a.ipynb', '#| default_exp a', *['1'] * 130)


ERROR = [dict(output_type='error', ename='E', evalue='', traceback=[])]
FAULTS = [   # what is said, what was done
    ('covid_cxr/a.py differs from its notebook', lambda h: edit(h / 'covid_cxr/a.py', 'return 1', 'return 2')),
    ('covid_cxr/w/b.py differs from its notebook', lambda h: (h / 'covid_cxr/w/b.py').unlink()),
    ('covid_cxr/c.py has no notebook', lambda h: (h / 'covid_cxr/c.py').touch()),
    ('covid_cxr/_c.py has no notebook', lambda h: (h / 'covid_cxr/_c.py').touch()),
    ('covid_cxr/w has no __init__.py', lambda h: (h / 'covid_cxr/w/__init__.py').unlink()),
    ('README.md is not fresh', lambda h: edit(h / 'README.md', 'House', 'Hut')),
    ('README.md is not fresh', lambda h: edit(h / 'nbs/index.ipynb', 'print(1)', 'print(2)')),
    ('nbs/a.ipynb: every cell needs an id of its own', lambda h: edit(h / 'nbs/a.ipynb', 'cell-3', 'cell-2')),
    ('nbs/a.ipynb: not clean', lambda h: edit_cell(h / 'nbs/a.ipynb', execution_count=3)),
    ('nbs/a.ipynb: holds a failed cell', lambda h: edit_cell(h / 'nbs/a.ipynb', outputs=ERROR)),
    ('nbs/a.ipynb: 150 KB, over 150', lambda h: edit_cell(h / 'nbs/a.ipynb', source='#' * 150_000)),
    ('nbs/a.ipynb: 131 cells, over 120', many_cells),
    ('nbs/sidebar.yml does not list d.ipynb', lambda h: write_notebook(h / 'nbs/d.ipynb', '# d')),
    ('nbs/sidebar.yml lists w/b.ipynb, which is not there', lambda h: (h / 'nbs/w/b.ipynb').unlink()),
    ('nbs/sidebar.yml lists a.ipynb twice', lambda h: edit(h / 'nbs/sidebar.yml', 'a.ipynb,', 'a.ipynb, a.ipynb,')),
]


def test_what_is_in_step_passes(house, capsys):
    assert notebooks.check() == 0 and 'agree' in capsys.readouterr().out


@pytest.mark.parametrize('words, do', FAULTS)
def test_check_names_what_is_out_of_step(words, do, house, capsys):
    do(house)
    assert notebooks.check() == 1 and words in capsys.readouterr().out


def test_a_directive_is_read_as_nbdev_reads_it():
    for text in ('#| export', '#|export', '# | export', '#| exporti', '#| export w.b', 'x = 1\n#| export\n'):
        assert notebooks.has_directive(text, notebooks.EXPORTED), text
    for text in ('# export', '#| export_here', 'x = "| export"', '#| hide_input'):
        assert not notebooks.has_directive(text, 'export|hide'), text


# ---- density

BODY = 'def f(x: int) -> int:\n    "doc"\n' + '    x = 1\n' * 26
def definitions(n): return '\n'.join(f'def f{i}() -> int: return 1' for i in range(n))


DENSE = {   # kind of place -> an exported cell that has it, and the same cell mended
    'line': ('x = ' + '1 + ' * 30 + '1', 'x = 1'), 'joined': ('x = 1; y = 2', 'x = "1; 2"'),
    'body': (BODY, BODY.replace('    x = 1\n', '', 1)), 'definitions': (definitions(4), definitions(3)),
    'annotation': ('def f(a, b: int) -> int: return a', 'def f(a: int, b: int) -> int: return a')}


@pytest.mark.parametrize('kind', DENSE)
@pytest.mark.parametrize('directive', ['#| export', '# | exporti'])
def test_every_dense_place_is_found(kind, directive, house):
    for source, found in zip(DENSE[kind], (True, False)):
        path = write_notebook(house / 'nbs/a.ipynb', '#| default_exp a', f'{directive}\n{source}', 'x, y, f, f0, f1, f2, f3')
        assert [k for k, _ in density.places(path)] == [kind] * found, density.places(path)
        hidden = write_notebook(house / 'nbs/a.ipynb', '#| default_exp a', source)
        assert not density.places(hidden), 'only what is exported counts'


@pytest.mark.parametrize('source, bare', [
    ('def f(a, *b, c=1, **d): return a', ['f(a)', 'f(c)', 'f(b)', 'f(d)', 'f ->']), ('def _f(a): return a', []),
    ('class _C:\n    def f(self, a): return a', []), ('class C:\n    def f(self, a): return a', ['f(a)', 'f ->']),
    ('class C:\n    def __init__(self, a): self.a = a', ['__init__(a)']), ('class C:\n    def _f(self, a): return a', []),
    ('async def f() : return 1', ['f ->'])])
def test_bare_parameters(source, bare): assert list(density.bare_parameters(source)) == bare


@pytest.mark.parametrize('shown, unseen', [
    ('one()', []), ('test_fail(lambda: one())', []), ('print(f"{one()}")', []), ('house.one()', []), ('# one is shown elsewhere', ['one']),
    ('print("one")', ['one']), ('#| hide\none()', ['one']), ('#| export\none()', ['one']), ('gone()', ['one'])])
def test_a_name_is_seen_where_a_reader_sees_it_at_work(shown, unseen, house):
    path = write_notebook(house / 'nbs/a.ipynb', '#| default_exp a', ONE, shown)
    assert density.unseen_names(path) == unseen


def test_scripts_may_be_a_little_wider(tmp_path):
    script = tmp_path / 's.py'
    script.write_text('x = 1  #' + ' ' * 133 + '\ny = 1; z = 2\n')
    assert density.places(script) == [('line', '1 has 141 characters'), ('joined', '2')]


# ---- docs

def test_a_page_shows_what_a_reader_needs(house):
    path = write_notebook(house / 'nbs/a.ipynb', '# Title', '#| default_exp words', '#| export\ndef format_p(p): ...', 'examples(1)',
                          '#| exporti\ndef _helper(): ...', '#| hide\nhidden(2)', '#| hide_input\nquiet(3)', '#| echo: false\nsilent(4)')
    edit_cell(path, outputs=[dict(output_type='stream', name='stdout', text='what was printed\n')])
    page = docs.page_text('a.ipynb', docs.exported_names(), house)
    for words in ('# Title', '(api-words-format_p)=', 'examples(1)', 'what was printed'): assert words in page, words
    for words in ('_helper', 'hidden(2)', 'quiet(3)', 'silent(4)', '#|'): assert words not in page, words


@pytest.mark.parametrize('annotation, text', [
    (list[int], 'list[int]'), (Literal['a', 'b'], "Literal['a', 'b']"), (int | None, 'int | None'), ('covid_cxr.core.Reason', 'Reason'),
    (None, ''), (inspect.Parameter.empty, '')])
def test_annotations_are_shown_whole(annotation, text): assert docs._kind(annotation) == text


def test_a_signature_keeps_the_quotes_of_a_default():
    def f(how: 'Literal["pad", "crop"]' = 'pad', log: 'Callable | None' = print) -> 'int | None': ...
    assert docs._signature('f', f) == 'f(how: Literal["pad", "crop"] = \'pad\', log: Callable | None = print) -> int | None'


def test_printed_sentences_wrap_and_columns_stay_below_each_other():
    page = docs.Page('table', 'table', {}, ROOT)
    sentence, columns = 'A long sentence. ' * 20, 'metric      value\nauc         0.812'
    assert docs._output(dict(text=sentence), page, '0').startswith('```{code-block} text\n:class: words\n\nA long')
    assert docs._output(dict(text=columns), page, '0') == f'```text\n{columns}\n```\n'
    assert '.words pre { white-space: pre-wrap' in docs.CSS


def test_a_link_that_leads_nowhere_stops_the_docs(house):
    shutil.copytree(ROOT / 'nbs/figures', house / 'nbs/figures')
    edit(house / 'nbs/sidebar.yml', 'a.ipynb, {section: w, contents: [w/b.ipynb]}', '{section: Words, contents: [glossary.ipynb]}')
    write_notebook(house / 'nbs/glossary.ipynb', '# Words\n\nSee [the other](index.ipynb).')
    assert docs.build(house / 'site') == 0 and (house / 'site/html/glossary.html').is_file()
    write_notebook(house / 'nbs/glossary.ipynb', '# Words\n\nSee [the other](gone.ipynb).')
    assert docs.build(house / 'site') == 1
