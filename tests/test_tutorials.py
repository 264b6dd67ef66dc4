"""The tutorials: short, with a promise in the first lines, a place on the site, and never a picture of a patient in what is kept."""
import json, re
import pytest
import yaml
from conftest import ROOT

FOLDER = ROOT / 'nbs/tutorials'
NAMES = sorted(p.stem for p in FOLDER.glob('*.ipynb'))
TO_RUN = [n for n in NAMES if n not in ('three_commands', 'one_minute', 'first_run', 'own_images')]       # these train, step by step
DRAWS_IMAGES = re.compile(r'\b(imshow|matshow|show_batch|show_results|plot_top_losses|plot_prediction_grid|plot_explanation|thumbnail)\b')


def cells(name): return json.loads((FOLDER / f'{name}.ipynb').read_text(encoding='utf-8'))['cells']


def source(cell): return ''.join(cell['source'])


def printed(cell): return ''.join(''.join(o.get('text') or o.get('data', {}).get('text/plain') or '') for o in cell.get('outputs', []))


def pictures(cell): return [o for o in cell.get('outputs', []) if any(k.startswith('image/') for k in o.get('data', {}))]


def kept_of(name): return 'real' if any(printed(c).startswith('real radiographs') for c in cells(name)) else 'phantoms'


def radiographs(of, kept):
    "Cells that kept a picture of a patient"
    if kept == 'phantoms': return []
    guarded = re.compile(r'^if not real:.*', re.M)
    return [c['id'] for c in of if c['cell_type'] == 'code' and pictures(c) and DRAWS_IMAGES.search(guarded.sub('', source(c)))]


@pytest.mark.parametrize('name', TO_RUN)
def test_a_tutorial_says_first_what_a_reader_can_do_at_its_end(name):
    title, promise, *_ = source(cells(name)[0]).splitlines()
    assert title.startswith('# ') and promise.startswith('> At the end you can '), name


@pytest.mark.parametrize('name', TO_RUN)
def test_a_tutorial_is_read_in_one_sitting(name):
    assert 15 <= len(cells(name)) <= 30, len(cells(name))
    code = [source(c) for c in cells(name) if c['cell_type'] == 'code']
    assert sum(len(c.splitlines()) for c in code) <= 180 and not any('eval: false' in c for c in code)


@pytest.mark.parametrize('name', NAMES)
def test_every_tutorial_stands_on_the_site(name):
    site = yaml.safe_load((ROOT / 'nbs/sidebar.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']
    listed = next(s['contents'] for s in site if isinstance(s, dict) and s['section'] == 'Tutorials')
    assert listed.count(f'tutorials/{name}.ipynb') == 1 and len(listed) == len(NAMES)


@pytest.mark.parametrize('name', TO_RUN)
def test_no_picture_of_a_patient_is_kept(name):
    assert radiographs(cells(name), kept_of(name)) == []
    switch = any('CXR_DATA' in source(c) for c in cells(name) if c['cell_type'] == 'code')
    assert switch or kept_of(name) == 'phantoms'
    assert kept_of(name) == 'real' or any('phantoms' in printed(c).lower() for c in cells(name)), 'phantoms are shown, and not named'


def test_a_picture_of_a_patient_would_be_found():
    shown = dict(cell_type='code', id='x', source=['dls.show_batch()'], outputs=[{'data': {'image/png': ''}}])
    guarded = dict(shown, source=['if not real: dls.show_batch()'])
    assert radiographs([shown], 'real') == ['x'] and radiographs([shown], 'phantoms') == radiographs([guarded], 'real') == []


def test_the_dicom_page_kept_no_word_of_a_header():
    of = cells('dicom_folder')
    assert all(any(word in source(c) for c in of) for word in ('Roe', '4711')), 'the words that are searched for'
    assert not any(word in printed(c) for c in of for word in ('Roe', 'Jane', '4711', '19700101'))
