"""Near copies: what is planted is found, what is no copy is not joined, and the known copies in real collections come out by name."""
import json
import numpy as np, pandas as pd, pytest
from PIL import Image
from conftest import DATA, ROOT, needs_data

# Least share of planted copies that must be found. Crops and turns are where hashes alone find none.
LEAST_RECALL = {'half size': 1., 'JPEG quality 30': 1., 'brighter': .95, 'more contrast': .9, 'black frame': .95, 'mirrored': 1.,
                'inverted': 1., 'cropped 3 %': .95, 'cropped 6 %': .9, 'corner cropped 5 %': .9, 'turned 3 degrees': .9}
N, OTHERS = 14, 60
RAPID = 'covid-19-rapidly-progressive-acute-respiratory-distress-syndrome-ards'
SAME_IMAGE = [  # patients of the June 2020 state, and the two files that show one image; each pair was laid on each other by a person
    ('97', '178', f'{RAPID}-admission.jpg', '16660_2_1.jpg'), ('97', '178', f'{RAPID}-day-1.jpg', '16660_3_1.jpg'),
    ('97', '178', f'{RAPID}-day-2.jpg', '16660_4_1.jpg'), ('97', '178', f'{RAPID}-day-3.jpg', '16660_5_1.jpg'),
    ('78', '201', '353889E0-A1E8-4F9E-A0B8-F24F36BCFBFB.jpeg', 'case_72_RX-TORACE1.jpg'),
    ('30', '31', 'pneumonia-7.jpg', 'streptococcus-pneumoniae-pneumonia-temporal-evolution-1-day1.jpg'),
    ('137', '202', 'A7E260CE-8A00-4C5F-A7F5-27336527A981.jpeg', 'case_76_1-3.png'),
    ('192', '196', 'AR-2.jpg', 'extubation-1.jpg'), ('193', '195', '2-chest-filmc.jpg', '7-fatal-covid19.jpg')]
TWICE_LISTED = {frozenset(p) for p in (('285', '339'), ('287', '340'))}          # one file name on two rows


@pytest.fixture(scope='module')
def planted(tmp_path_factory):
    "Synthetic images 'image:p' with one copy per edit, and other patients: the pairs, and the group of each picture"
    from covid_cxr.duplicates import EDITS, find_near
    from covid_cxr.phantom import make_phantom
    d, rows = tmp_path_factory.mktemp('copies'), []

    def add(name, array):
        Image.fromarray(np.ascontiguousarray(array)).save(d / f'{len(rows)}.png')
        rows.append(dict(image_id=name, path=str(d / f'{len(rows)}.png')))
    for p in range(N):
        image = make_phantom(11, p, 0, size=256).image
        add(f'image:{p}', image)
        for e in LEAST_RECALL: add(f'{e}:{p}', EDITS[e](image))
    for p in range(OTHERS): add(f'other:{p}', make_phantom(11, N + p, 0, size=256).image)
    pairs = find_near(pd.DataFrame(rows))
    return pairs, components([r['image_id'] for r in rows], pairs)


def components(ids, pairs):
    "Group number of every id when pairs with the verdict 'duplicate' are joined"
    group = {i: i for i in ids}

    def top(i):
        while group[i] != i: i = group[i]
        return i
    for p in pairs[pairs['verdict'] == 'duplicate'].itertuples(): group[top(p.a)] = top(p.b)
    return {i: top(i) for i in ids}


def test_the_edits_that_were_asked_for_are_all_planted():
    from covid_cxr.duplicates import EDITS
    assert set(LEAST_RECALL) <= set(EDITS)


@pytest.mark.parametrize('edit', LEAST_RECALL)
def test_recall_of_a_planted_edit(planted, edit):
    found = np.mean([planted[1][f'{edit}:{p}'] == planted[1][f'image:{p}'] for p in range(N)])
    assert found >= LEAST_RECALL[edit], f'{edit}: {found:.0%} of {N} copies were joined with their image'


def test_no_other_patient_is_joined(planted):
    pairs, _ = planted
    sure = pairs[pairs['verdict'] == 'duplicate']
    assert len(sure) >= N, 'nothing was found at all'
    wrong = [(p.a, p.b) for p in sure.itertuples() if p.a.split(':')[1] != p.b.split(':')[1] or p.a.startswith('other')]
    assert wrong == []


def test_the_order_of_the_rows_means_nothing(tmp_path):
    from covid_cxr.duplicates import EDITS, find_near
    from covid_cxr.phantom import make_phantom
    for p in range(6):
        image = make_phantom(5, p, size=256).image
        Image.fromarray(image).save(tmp_path / f'{p}.png')
        Image.fromarray(np.ascontiguousarray(EDITS['mirrored'](image))).save(tmp_path / f'm{p}.png')
    table = pd.DataFrame([dict(image_id=f.stem, path=str(f)) for f in sorted(tmp_path.glob('*.png'))])
    first = find_near(table)
    assert len(first) >= 6
    pd.testing.assert_frame_equal(first, find_near(table.sample(frac=1, random_state=3)))


@pytest.fixture(scope='module')
def covid_pairs():
    "Table of the June 2020 state, and the near copies in it"
    from covid_cxr.duplicates import find_near
    from covid_cxr.sources import read_covid_chestxray
    t = read_covid_chestxray(DATA / 'covid-chestxray-dataset')
    return t.set_index('image_id'), find_near(t)


def number(table, image_id): return table.loc[image_id, 'patient'].split(':')[-1]


@needs_data
def test_one_image_under_two_patients_is_found_by_name(covid_pairs):
    t, pairs = covid_pairs
    sure = pairs[pairs['verdict'] == 'duplicate']
    found = {frozenset((a.split(':')[1], b.split(':')[1])): (number(t, a), number(t, b)) for a, b in zip(sure['a'], sure['b'])}
    for p, q, f, g in SAME_IMAGE:
        assert frozenset((f, g)) in found, f'{f} and {g} (patients {p} and {q}) are one image'
        assert set(found[frozenset((f, g))]) == {p, q}


@needs_data
def test_no_other_patients_of_the_covid_set_are_joined(covid_pairs):
    t, pairs = covid_pairs
    sure = pairs[pairs['verdict'] == 'duplicate']
    joined = {frozenset((number(t, a), number(t, b))) for a, b in zip(sure['a'], sure['b'])}
    assert {j for j in joined if len(j) == 2} == {frozenset((p, q)) for p, q, *_ in SAME_IMAGE} | TWICE_LISTED


@needs_data
def test_two_images_of_one_patient_are_two_images(covid_pairs):
    "Serial images are for a person to look at and join nothing. (Synthetic ones would not show it: their anatomy is redrawn exactly.)"
    t, pairs = covid_pairs
    look = pairs[pairs['verdict'] == 'look']
    assert len(look) and all(number(t, a) == number(t, b) for a, b in zip(look['a'], look['b']))
    assert look['score'].max() < .75 and pairs.loc[pairs['verdict'] == 'duplicate', 'score'].min() > .85


@needs_data
def test_exact_copies_in_the_children_set_are_the_known_ones():
    from covid_cxr.duplicates import find_exact
    answer = pd.read_csv(DATA / 'kaggle-official-split.csv', dtype=str).set_index('file')
    files = sorted((DATA / 'chest-xray-pneumonia').rglob('*.jpeg'))
    assert len(files) == len(answer) == 5856
    pairs = find_exact(pd.DataFrame(dict(image_id=[f.name for f in files], path=[str(f) for f in files])))
    group = components([f.name for f in files], pairs)
    ours = pd.Series(group).groupby(pd.Series(group)).groups
    ours = {frozenset(v) for v in ours.values() if len(v) > 1}
    known = {frozenset(v) for v in answer.dropna(subset='exact_dup_group').groupby('exact_dup_group').groups.values()}
    assert ours == known
    assert len(ours) == 30 and sum(map(len, ours)) == 62
    splits = [sorted(answer.loc[list(g), 'official_split']) for g in ours]
    assert sum(s == ['test', 'test'] for s in splits) == 6 and not any({'train', 'test'} <= set(s) for s in splits)


RESULTS = ROOT / 'benchmarks' / 'results' / 'near_duplicates.json'


def kept(column):
    "The kept measurements that hold this column"
    return [k for k in json.loads(RESULTS.read_text()) if column in k]


def test_growth_follows_from_the_stored_sizes():
    for k in kept('slopes'):
        rows = pd.DataFrame(k['sizes'])
        for column, slope in k['slopes'].items():
            r = rows.dropna(subset=column)
            assert len(r) >= 2 and np.polyfit(np.log(r['n']), np.log(r[column]), 1)[0] == pytest.approx(slope, abs=.006), column
        both = rows.dropna(subset='times_faster')
        fair = 'cpu_seconds' if 'all_pairs_cpu_seconds' in both else 'seconds'
        assert len(both) and np.allclose(both[f'all_pairs_{fair}'] / both[fair], both['times_faster'], atol=.06)
    assert kept('slopes')[-1]['sizes'][-1]['n'] == 100_000


def test_results_name_no_place_and_count_what_they_list():
    assert not any(w in RESULTS.read_text() for w in ('/home', '/tmp', '/work', 'C:\\'))
    r = kept('independent_copies')[-1]
    assert 0 <= r['false_duplicates'] <= len(r['pairs_under_other_names']) and r['independent_copies_found'] <= r['independent_copies']
    assert set(LEAST_RECALL) <= set(r['recall']) and all(0 <= v <= 1 for v in r['recall'].values())
