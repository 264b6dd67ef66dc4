"Quality and licences: every planted fault is found, every count on the page is one of the table, hostile text stays text"
import re
from html.parser import HTMLParser
from pathlib import Path
import numpy as np, pandas as pd, pytest
from PIL import Image
from conftest import DATA, needs_data
from covid_cxr.core import SYNTHETIC, choices, exclude, new_table, used
from covid_cxr.curate.licences import filter_licences, licence_counts, licence_terms
from covid_cxr.curate.quality import NoteLevel, describe_note, inspect_source, inspect_table
from covid_cxr.phantom import write_phantom_trees
from covid_cxr.report.quality_page import (describe_leak, inspection_text, notes_table, run_inspection, write_inspection_csv,
                                           write_inspection_html)
from covid_cxr.sources import NIH_LICENCE, read_covid_chestxray, read_kaggle_pneumonia
from covid_cxr.table import (drop_repeats, filter_views, group_leaksafe, join_tables, label_for, split_by_group, split_official,
                             split_random)


class Page(HTMLParser):
    "What a browser would be asked to do, the tables, and the visible text"
    VOID = {'meta', 'img', 'rect', 'br'}

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.open, self.tables, self.text, self.section, self.cell = [], [], {}, [], None, None
        self.feed(text)
        self.close()
        assert not self.open, f'left open: {self.open}'

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID: self.open.append(tag)
        if tag == 'section': self.section = dict(attrs)['id']
        if tag == 'table': self.tables[self.section] = []
        if tag == 'tr': self.tables[self.section].append([])
        if tag in ('td', 'th'): self.cell = ''

    def handle_endtag(self, tag):
        if tag in self.VOID: return
        assert self.open and self.open[-1] == tag, f'</{tag}> closes {self.open[-3:]}'
        self.open.pop()
        if tag in ('td', 'th'):
            self.tables[self.section][-1].append(self.cell.strip())
            self.cell = None

    def handle_startendtag(self, tag, attrs): self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.cell is not None: self.cell += data
        if self.open and self.open[-1] != 'style': self.text.append(data)

    def number(self, section, row, column):
        head, *rows = self.tables[section]
        return int(next(r for r in rows if r[0] == row)[head.index(column)].replace(',', ''))


def assert_self_contained(page):
    "Nothing runs and nothing is fetched; only plain links lead outside"
    for tag, attrs in page.tags:
        assert tag not in ('script', 'link', 'iframe', 'object', 'embed', 'base', 'form', 'use', 'image', 'video', 'audio')
        for k, v in attrs.items():
            assert not k.startswith('on') and k not in ('srcset', 'style', 'background', 'action', 'xlink:href'), (tag, k)
            if k == 'src': assert v.startswith('data:image/png;base64,')
            if k == 'href': assert tag == 'a' and (v.startswith('#') or v.startswith('https://'))
        if tag == 'img': assert attrs['alt']
        if tag == 'svg': assert attrs.get('aria-label') or attrs.get('aria-hidden')


@pytest.fixture(scope='module')
def planted(tmp_path_factory):
    "Phantom trees with every fault, joined and labelled; the pairs that were planted as image_ids"
    root = tmp_path_factory.mktemp('trees') / 'data'
    faults = write_phantom_trees(root, seed=1, size=64, n_patients=40, n_normal=24, n_pneumonia=12, faults=True, children=True).faults
    table = join_tables([read_covid_chestxray(root), read_kaggle_pneumonia(root)])
    table = label_for(table, 'covid_vs_other')
    ids = {str(Path(p).relative_to(root)): i for p, i in zip(table['path'], table['image_id']) if isinstance(p, str)}
    return root, table, {k: [ids[f] for f in v['files'] if f in ids] for k, v in faults.items()}


COPIES = ('exact_copy', 'recompressed', 'small_crop', 'border_added', 'mirrored', 'label_conflict', 'cross_source', 'split_copy')

def planted_pairs(ids):
    series = ids['shared_patient']
    pairs = [tuple(ids[k]) for k in COPIES] + list(zip(series[::2], series[1::2]))
    return pd.DataFrame(pairs, columns=['a', 'b']).assign(verdict='duplicate', ncc=np.linspace(1, .95, len(pairs)))

def note_of(look, subject): return next((n for n in look.notes if n.subject == subject), None)

def row_of(pairs, ids): return pairs[[{a, b} == set(ids) for a, b in zip(pairs['a'], pairs['b'])]].squeeze()


def test_every_planted_fault_is_named(planted):
    root, table, ids = planted
    problems = {p: 'cannot be decoded' for p in table['path'] if str(p).endswith('fault-truncated_file.jpg')}
    look = inspect_table(table, planted_pairs(ids), problems=problems)
    p = look.pairs
    for k in COPIES: assert len(row_of(p, ids[k])), k
    assert row_of(p, ids['label_conflict'])['two_labels'] and row_of(p, ids['cross_source'])['two_sources']
    assert not row_of(p, ids['exact_copy'])['two_labels'] and row_of(p, ids['exact_copy'])['patients'] == 'two'
    assert row_of(p, ids['split_copy'])['patients'] == 'two' and not row_of(p, ids['split_copy'])['two_sources']
    assert (p['kind'] == 'same file').sum() == 1 == len(look['files_used_twice'])     # the tree lists one file twice
    assert set(ids['missing_file']) < set(look['missing']['image_id'])             # and the tree's own missing file
    assert list(look['unreadable']['image_id']) == ids['truncated_file']
    assert [Path(f).name for f in look['unlisted']['path']] == ['quirk-unreferenced.jpg']
    for subject in ('pairs_two_labels', 'pairs_two_sources', 'pairs_two_patients', 'file_missing', 'file_unreadable', 'file_without_row',
                    'age_not_recorded'): assert note_of(look, subject), subject
    source = describe_note(note_of(look, 'source_gives_label'))
    assert "every 'covid' is from covid_chestxray" in source and "every image of kaggle_pneumonia is 'other'" in source
    assert 'children' in describe_note(note_of(look, 'children_and_adults') or note_of(look, 'class_without_adults'))
    assert look.synthetic == len(table) and 'SYNTHETIC PHANTOMS' in inspection_text(look)


def test_leaks_of_the_official_split_are_alarms_and_a_wrong_patient_id_is_none(planted):
    root, table, ids = planted
    kids = label_for(read_kaggle_pneumonia(root), 'pneumonia_vs_normal')
    kids = kids.assign(group=kids['patient'], split=kids['official_split'])
    look = inspect_table(kids, [tuple(ids['split_copy'])])
    assert look['duplicates'].set_index('kind').loc['all', 'two splits'] == 1
    alarms = {n.subject: n for n in look.notes if n.level == 'alarm'}
    a, b = ids['split_patient']
    group = kids.set_index('image_id').loc[a, 'group']
    assert group in describe_note(alarms['groups_across_splits']) and group in set(look.leak.groups['group'])   # one person in both
    assert not any(kids.set_index('image_id').loc[i, 'group'] in look.account.leaks for i in ids['wrong_patient_id'])
    assert {'pairs_across_splits', 'pairs_without_group'} <= set(alarms)
    assert 'the test has been seen in training' in describe_note(alarms['pairs_across_splits'])
    mended = group_leaksafe(kids, [tuple(ids['split_copy'])], duplicates='none')
    mended = inspect_table(split_official(mended, .2, crossing='exclude'), [tuple(ids['split_copy'])])
    assert not mended.account.leaks and mended['duplicates'].set_index('kind').loc['all', 'two splits'] == 0


@pytest.fixture(scope='module')
def finished(planted):
    root, table, ids = planted
    pairs = planted_pairs(ids)
    table = group_leaksafe(filter_views(table, ['PA', 'AP']), pairs, duplicates='none')
    return split_by_group(drop_repeats(table, pairs[['a', 'b']].values.tolist()), .2, .2, seed=3), pairs


def test_counts_on_the_page_are_counts_of_the_table(finished, tmp_path):
    table, pairs = finished
    look = inspect_table(table, pairs)
    rows = used(table)
    assert look.rows == len(table) == look.used + look['flow']['excluded'].sum() and look.used == len(rows)
    html = write_inspection_html(look, tmp_path / 'index.html').read_text(encoding='utf-8')
    page = Page(html)
    assert_self_contained(page)
    assert page.number('account', 'rows in', 'all') == len(table) and page.number('account', 'used', 'all') == len(rows)
    assert sum(page.number('account', r[0], 'all') for r in page.tables['account'][2:]) == len(table)
    for c in ('covid', 'other'):
        r = rows[rows['label'] == c]
        assert page.number('age', c, 'images') == len(r) and page.number('age', c, 'not recorded') == r['age_years'].isna().sum()
        assert page.number('sex', c, 'F') == (r['sex'] == 'F').sum() and page.number('sex', c, 'not recorded') == r['sex'].isna().sum()
        for s in ('covid_chestxray', 'kaggle_pneumonia'): assert page.number('source', c, s) == (r['source'] == s).sum()
        views = page.tables['view']
        for v in ('PA', 'AP'): assert sum(int(x[views[0].index(v)]) for x in views if x[0] == c) == (r['view'] == v).sum()
    assert page.number('patients', 'all', 'patients') == rows['patient'].nunique()
    assert page.number('licences', SYNTHETIC, 'used') == len(rows)
    assert ('p', {'class': 'banner', 'role': 'alert'}) in page.tags and 'SYNTHETIC PHANTOMS' in ''.join(page.text)
    assert sum(t == 'img' for t, _ in page.tags) == 2 * len(look.pairs) - len([1 for t, a in page.tags if a.get('class') == 'nopic'])
    assert str(Path(table['path'].dropna().iloc[0]).parents[3]) not in html              # no folder of this disk
    assert not look.pairs.loc[look.pairs['used'] == 'both', 'two_splits'].any()


def test_thumbnails_are_limited_and_counted(finished, tmp_path):
    table, pairs = finished
    look = inspect_table(table, pairs)
    page = Page(write_inspection_html(look, tmp_path / 'few.html', most=3).read_text(encoding='utf-8'))
    assert sum('card' == a.get('class') for _, a in page.tags) == 3
    assert f'3 of {len(look.pairs)} pairs are shown; {len(look.pairs) - 3} more' in ''.join(page.text)
    assert 'img' not in {t for t, _ in Page(write_inspection_html(look, tmp_path / 'none.html', thumbnails=False).read_text()).tags}


def test_what_is_written_agrees_and_is_written_whole(finished, tmp_path):
    table, pairs = finished
    said = []
    look = run_inspection(table, pairs, tmp_path / 'out', said.append)
    files = {p.name for p in (tmp_path / 'out').iterdir()}
    assert files == {'index.html', 'inspection.txt', 'notes.csv', *(f'{k}.csv' for k in look.sections)}
    assert (tmp_path / 'out/inspection.txt').read_text(encoding='utf-8') == said[0] and max(map(len, said[0].splitlines())) <= 110
    for k, s in look.sections.items():
        t = pd.read_csv(tmp_path / f'out/{k}.csv')
        assert len(t) == len(s.table) and list(t) == list(s.table), k
    assert pd.read_csv(tmp_path / 'out/age.csv')['images'].iloc[-1] == look.used
    levels = [n.level for n in look.notes]
    assert levels == sorted(levels, key=choices(NoteLevel).index) == list(notes_table(look)['level'])
    again = inspect_table(table.sample(frac=1, random_state=1), pairs)
    assert again['source'].equals(look['source']) and set(map(describe_note, again.notes)) == set(map(describe_note, look.notes))


HOSTILE = ('<script>alert(1)</script>.png', '"><img src=x onerror=alert(1)>.png', "'; DROP TABLE.png", '=cmd|calc.png', 'a&b<i>.png',
           '\x1b[31mred.png', 'rtl\u202egnp.png', 'new\nline.png', '[x](javascript:alert(1)).png')

def test_hostile_names_stay_text(tmp_path):
    "File names, patients, findings, licences, sources and addresses that want to be markup, a formula or a terminal command"
    rows = []
    for k, name in enumerate(HOSTILE):
        f = tmp_path / 'f' / name.replace('/', '_')
        f.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((64, 64), 20 * k, np.uint8)).save(f)
        rows += [dict(path=str(f), image_id=f'{name}{j}', patient=f'{name}{j}', label=name if j else 'b', finding=name, licence=name,
                      source=name, url='javascript:alert(1)', view='PA') for j in (0, 1)]
    (tmp_path / 'f/broken.png').write_bytes(b'<script>')
    rows.append(dict(path=str(tmp_path / 'f/broken.png'), image_id='x', patient='p', label='b', finding='b', source='s'))
    table = new_table(rows)
    table = exclude(table, table.index == 0, '<b>reason</b>')
    look = inspect_table(table, [('x', HOSTILE[1] + '0')], problems={str(tmp_path / 'f/broken.png'): '<script>broken</script>'})
    assert len(look['conflicts']) >= len(HOSTILE)
    html = write_inspection_html(look, tmp_path / 'x.html').read_text(encoding='utf-8')
    page = Page(html)
    assert_self_contained(page)
    assert not {'i', 'script'} & {t for t, _ in page.tags} and '<b>reason' not in html
    assert '<script>alert(1)</script>.png' in ''.join(page.text)                  # shown, as text
    for text in (html, inspection_text(look)): assert not re.search('[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]', text)
    for f in write_inspection_csv(look, tmp_path / 'csv'):
        for line in f.read_text(encoding='utf-8').splitlines():
            assert not re.match(r'''["]?[=+@]''', line) and ',=' not in line and ',"=' not in line


def leaky_rows(n=40):
    "Two images of every patient, no files"
    return new_table([dict(image_id=f's:{i:02}', patient=f's:{i // 2}', group=f's:{i // 2}', label='ab'[i // 2 % 2], source='s',
                           licence='CC0') for i in range(n)])


def test_a_leak_is_red_and_above_everything(tmp_path):
    "In the terminal the first line, on the page the first element, with what it costs; also when it was allowed"
    leaky = split_random(leaky_rows(), .2, .3, seed=3)
    groups = leaky.groupby('group')['split'].nunique()
    cut = set(groups.index[groups > 1])
    seen = ((leaky['split'] == 'test') & leaky['group'].isin(cut)).sum()
    look = inspect_table(leaky, [])
    assert look.leak.state == 'leak' and set(look['leaks']['group']) == cut and look.leak.seen == seen
    assert inspection_text(look).splitlines()[0].startswith(f'LEAK: {len(cut)} groups on both sides of the split')
    assert f"{seen} of {(leaky['split'] == 'test').sum()} test images" in ' '.join(inspection_text(look).split())
    html = write_inspection_html(look, tmp_path / 'leak.html').read_text(encoding='utf-8')
    body = html[html.index('<body>'):]
    assert body.startswith('<body>\n<main>\n<p class="verdict leak" role="alert">LEAK: ')
    assert re.search(r'\.verdict\.leak \{ background: var\(--alarm\)', html)
    page = Page(html)
    assert_self_contained(page)
    assert len(page.tables['leaks']) - 1 == min(len(cut), 20)


def test_a_copy_across_the_split_is_a_leak_where_no_group_knows_it(tmp_path):
    t = split_by_group(leaky_rows(), .2, .3, seed=3)
    train, test = (t['image_id'][t['split'] == p].iloc[0] for p in ('train', 'test'))
    look = inspect_table(t, pd.DataFrame([dict(a=train, b=test, verdict='duplicate', score=.93, edit='mirrored')]))
    assert (look.leak.state, look.leak.pairs, look.leak.seen) == ('leak', 1, 1)
    leak = describe_leak(look.leak)
    assert '1 pair of one picture on both sides' in leak and f"1 of {(t['split'] == 'test').sum()} test images" in leak
    page = write_inspection_html(look, tmp_path / 'x.html').read_text(encoding='utf-8')
    assert '<div class="card cut">' in page and 'agreement 0.930; mirrored' in page
    alike = inspect_table(t, pd.DataFrame([dict(a=train, b=test, verdict='look', score=.7)]))     # alike, for a person to decide: no leak
    assert alike.leak.state == 'tight'
    assert describe_leak(alike.leak) == 'No leak found: no patient, no file and no copy that was found stands on two sides of the split.'
    page = write_inspection_html(alike, tmp_path / 'y.html').read_text(encoding='utf-8')
    assert 'class="card cut"' not in page and 'class="verdict tight"' in page


def test_near_images_of_one_patient_are_no_copies_in_the_test_split():
    rows = [dict(image_id=f'i{k}', path=f'i{k}.png', finding='No Finding', patient=p, view='PA') for k, p in enumerate('aabc')]
    t = new_table(rows, 'mine').assign(label='normal', group=list('aabc'), split='test')
    ids = t['image_id'].tolist()

    def told(a, b, kind):
        pairs = pd.DataFrame([dict(a=ids[a], b=ids[b], kind=kind, verdict='duplicate', score=.95)])
        return [n.details['pictures'] for n in inspect_table(t, pairs).notes if n.subject == 'copies_in_test']
    assert told(0, 1, 'near') == [] and told(0, 1, 'pixels') == told(2, 3, 'near') == [3]       # further images; a copy; two patients


def test_patient_ids_that_say_nothing_are_an_alarm(planted, tmp_path):
    "Patient ids are compared with their pictures whenever the pictures were read"
    from covid_cxr.duplicates import fingerprints
    root, table, ids = planted
    images = used(read_covid_chestxray(root))
    prints = fingerprints(images['path'], tmp_path / 'p.npz')
    wrong = images.assign(patient=[f'x:{i % 12}' for i in np.random.default_rng(0).permutation(len(images))])
    look = inspect_table(wrong, problems=prints)
    line = look['patient_ids'].iloc[0]
    assert line['pairs'] >= 100 and line['verdict'] == 'uninformative' and abs(line['z']) < 3
    assert note_of(look, 'ids_say_nothing').level == 'alarm'
    assert not len(inspect_table(wrong)['patient_ids'])                                 # nothing is said where nothing was compared


def test_a_phantom_among_real_rows_is_an_alarm():
    rows = [dict(image_id=f'{i}', label='ab'[i % 2], source='s', licence=SYNTHETIC if i == 3 else 'CC BY 4.0') for i in range(8)]
    look = inspect_table(new_table(rows))
    first = look.notes[0]
    assert (first.level, first.subject, first.count) == ('alarm', 'phantoms', 1) and 'real images stand beside' in describe_note(first)


def test_unreadable_and_repeated_pictures_are_found_from_the_files(planted):
    "The whole way: files, fingerprints, pairs, page"
    root, table, ids = planted
    look = inspect_source('kaggle_pneumonia', root, duplicates='exact')
    assert {frozenset(p) for p in zip(look.pairs['a'], look.pairs['b'])} == {frozenset(ids['split_copy'])}
    look = inspect_source('covid_chestxray', root, duplicates='exact')
    assert list(look['unreadable']['image_id']) == ids['truncated_file']
    assert len(row_of(look.pairs, ids['exact_copy'])) and len(row_of(look.pairs, ids['label_conflict']))


# ---- licences ----------------------------------------------------------------------------------------------------------------

def test_the_wording_of_nih_is_the_one_that_is_read():
    assert licence_terms(NIH_LICENCE).commercial is True and licence_terms(SYNTHETIC).commercial is True


def test_a_licence_is_never_guessed():
    for w in ('CC BY-NC-SA 4.0 or as agreed', 'ccby', 'BY-SA', 'Apache', 'public', 'for research use', 'CC BY-NC-ND-SA'):
        t = licence_terms(w)
        assert t.stated and (t.commercial, t.derivatives, t.share_alike) == (None, None, None), w


# metadata.csv of ieee8023/covid-chestxray-dataset, 2020-06-19; not stated are 239 blanks and one space
JUNE = {'CC BY-NC-SA': 227, 'CC BY-NC-SA 4.0': 130, 'CC BY 3.0': 92, 'CC BY-NC-ND': 24, 'CC BY-NC-ND 4.0': 12, 'Apache 2.0': 10,
        'listed as authorized for everyone': 7, 'CC BY 4.0': 6, 'CC BY': 2, 'CC BY-SA': 1, 'not stated': 240}

@needs_data
def test_licences_of_the_real_metadata():
    table = read_covid_chestxray(DATA / 'covid-chestxray-dataset')
    assert licence_counts(table).set_index('licence')['images'].to_dict() == JUNE
    fresh = table.assign(excluded=np.nan).astype({'excluded': object})
    left_out = filter_licences(fresh, 'commercial')['excluded'].value_counts().to_dict()
    assert left_out == {'licence not stated': 240, 'licence not commercial: CC BY-NC-SA': 227,
                        'licence not commercial: CC BY-NC-SA 4.0': 130, 'licence not commercial: CC BY-NC-ND': 24,
                        'licence not commercial: CC BY-NC-ND 4.0': 12, 'licence terms not known: listed as authorized for everyone': 7}
    assert len(used(filter_licences(fresh, 'commercial'))) == 92 + 10 + 6 + 2 + 1
    assert len(used(filter_licences(fresh, 'stated'))) == 751 - 240 and len(used(filter_licences(fresh))) == 751
    kept = filter_licences(table, 'commercial')
    assert (kept.loc[table['excluded'].notna(), 'excluded'] == table['excluded'].dropna()).all()


@needs_data
def test_the_planned_join_of_the_real_collections_is_an_alarm():
    "Adults with COVID-19 from case reports against children from one hospital: the field's best-known trap"
    kids = read_kaggle_pneumonia(DATA / 'chest-xray-pneumonia-512')
    table = label_for(join_tables([read_covid_chestxray(DATA / 'covid-chestxray-dataset'), kids]), 'covid_vs_normal')
    look = inspect_table(filter_views(table, 'PA'))
    said = '\n'.join(describe_note(n) for n in look.notes if n.level == 'alarm')
    assert "every 'covid' is from covid_chestxray" in said and "every image of kaggle_pneumonia is 'normal'" in said and 'children' in said
    assert len(look['files_used_twice']) == 5 and (look['missing']['excluded'] == 'file missing').sum() == 10
    adults = (used(filter_views(table, 'PA'))['source'] == 'covid_chestxray').sum()
    assert look['patients'].set_index('source').loc['covid_chestxray', 'images'] == adults


@needs_data
def test_the_official_split_of_the_children_is_tight_and_its_test_has_copies():
    "30 groups of equal files, none across the splits, six redundant among the 624 (pixels only: near copies are left to the slower search)"
    look = inspect_source('kaggle_pneumonia', DATA / 'chest-xray-pneumonia', duplicates='none')
    assert (look.leak.state, look.leak.maker) == ('open', 'publisher')
    assert "publisher's split; pictures were not compared" in describe_leak(look.leak)
    answer = pd.read_csv(DATA / 'kaggle-official-split.csv').dropna(subset=['exact_dup_group'])
    groups = [g for _, g in answer.groupby('exact_dup_group')['file']]
    pairs = [(f'kaggle_pneumonia:{g.iloc[0]}', f'kaggle_pneumonia:{f}') for g in groups for f in g.iloc[1:]]
    look = inspect_table(read_kaggle_pneumonia(DATA / 'chest-xray-pneumonia'), pairs)
    assert len(pairs) == 32 and look.leak.state == 'tight'
    copies = note_of(look, 'copies_in_test')
    assert copies.count == 6 and '624 images show 618 pictures' in describe_note(copies)
