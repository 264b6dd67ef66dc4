"""Phantoms: the same for the same arguments, alike within a patient, quirks and faults as promised, learnable but not trivially so."""
import csv, json, random, re, subprocess, sys, zlib
import numpy as np, pandas as pd, pytest
from PIL import Image, ImageOps
from scipy.ndimage import gaussian_filter
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, StratifiedKFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from conftest import ROOT
from covid_cxr.core import CxrError, RunError
from covid_cxr.phantom import (FAMILY, FAULTS, PATTERNS, SCHEMAS, make_other_view, make_phantom, phantom_family, plant_faults,
                               write_covid_tree, write_kaggle_tree, write_phantom_folder, write_phantom_trees)


def _unit(x):
    x = x.reshape(len(x), -1).astype(float)
    x = x - x.mean(1, keepdims=True)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def _read(path):
    with Image.open(path) as im: return im.point(lambda v: v / 257).convert('L') if im.mode.startswith('I') else im.convert('L')


def _alike(a, b, n=48):
    "Correlation of two pictures after both are squashed to n x n"
    a, b = (_unit(np.asarray(im.resize((n, n), Image.Resampling.BOX))[None])[0] for im in (a, b))
    return float(a @ b)


def _zones(images, lungs):
    "Brightness, roughness and brightest tenth of 12 lung zones, each relative to the lungs as a whole"
    out = []
    for image, m in zip(images / 255., lungs):
        v = (gaussian_filter(image, 1.5) - image[m].mean()) / image[m].std()
        ys, xs = np.nonzero(m)
        cuts, row = np.quantile(ys, [0, 1 / 3, 2 / 3, 1]), []
        for side in (xs < m.shape[1] / 2, xs >= m.shape[1] / 2):
            for lo, hi in zip(cuts, cuts[1:]):
                for outer in (xs < np.median(xs[side]), xs >= np.median(xs[side])):
                    q = v[ys[side & outer & (ys >= lo) & (ys <= hi)], xs[side & outer & (ys >= lo) & (ys <= hi)]]
                    row += [q.mean(), q.std(), np.quantile(q, .9)] if len(q) > 3 else [0, 0, 0]
        out.append(row)
    return np.array(out)


def _logistic(): return make_pipeline(StandardScaler(), LogisticRegression(C=.05, max_iter=500))


def _grouped_auc(features, y, groups):
    return roc_auc_score(y, cross_val_predict(_logistic(), features, y, groups=groups, cv=GroupKFold(5), method='predict_proba')[:, 1])


# ---------------------------------------------------------------- one image

def test_the_same_arguments_give_the_same_bytes_in_any_process_and_order():
    code = ('import sys, zlib\nfrom covid_cxr.phantom import make_phantom\n'
            'for p in (2, 0, 1): print(p, zlib.crc32(make_phantom(7, p, 1, 96, lesion=.5).image.tobytes()))')
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert out.returncode == 0, out.stderr
    there = dict(line.split() for line in out.stdout.splitlines())
    assert there == {str(p): str(zlib.crc32(make_phantom(7, p, 1, 96, lesion=.5).image.tobytes())) for p in range(3)}


def test_global_random_state_neither_matters_nor_moves():
    np.random.seed(1), random.seed(1)
    a = make_phantom(5, 1, 0, 64, lesion=.5).image
    state = np.random.get_state()[1].tolist(), random.getstate()
    np.random.seed(2), random.seed(2)
    assert (make_phantom(5, 1, 0, 64, lesion=.5).image == a).all()
    np.random.seed(1), random.seed(1)
    make_phantom(6, 1, 0, 64, lesion=.5)
    assert (np.random.get_state()[1].tolist(), random.getstate()) == state


@pytest.mark.parametrize('size', [32, 64, 256])
@pytest.mark.parametrize('pattern', PATTERNS)
def test_masks_say_where_the_opacity_is(size, pattern):
    for p in range(3):
        ill, well = make_phantom(1, p, 0, size, .6, pattern), make_phantom(1, p, 0, size)
        assert (ill.lung_mask == well.lung_mask).all() and .1 < ill.lung_mask.mean() < .5
        assert ill.lesion_mask.any() and not (ill.lesion_mask & ~ill.lung_mask).any() and not well.lesion_mask.any()
        change = ill.image.astype(int) - well.image
        assert change.min() >= -1, 'an opacity never darkens'
        assert change[ill.lesion_mask].mean() > 8 and change[~ill.lung_mask].mean() < .1 * change[ill.lesion_mask].mean()


def test_images_of_a_patient_are_more_alike_than_images_of_two():
    x = np.stack([make_phantom(0, p, k, 64, lesion=.5 * (p % 2)).image[:58] for p in range(40) for k in range(2)])
    c, who = _unit(x) @ _unit(x).T, np.repeat(np.arange(40), 2)
    same = who[:, None] == who
    pairs = np.triu(np.ones_like(same), 1).astype(bool)
    within, between = c[pairs & same], c[pairs & ~same]
    assert roc_auc_score(np.r_[np.ones(len(within)), np.zeros(len(between))], np.r_[within, between]) > .75
    assert between.max() < .97 and within.max() < .995, 'two images are never near-duplicates by accident'


def test_exposure_and_anatomy_say_nothing_about_the_disease():
    x, t, lungs = phantom_family('P1', n_patients=80, images_per_patient=(2, 2), size=48, seed=3)
    outside = np.array([[i[~m][:1500].mean(), i[~m][:1500].std(), np.median(i[:20]), m.mean()] for i, m in zip(x, lungs)])
    assert .35 < _grouped_auc(outside, t.label.to_numpy(), t.patient) < .65


def test_other_views_are_deterministic_and_unlike_a_frontal_image():
    frontal = np.stack([make_phantom(2, p, 0, 64).image[:58] for p in range(8)])
    for kind in ('lateral', 'ct'):
        other = make_other_view(kind, 2, 1, size=64)
        assert other.shape == (64, 64) and other.dtype == np.uint8 and (other == make_other_view(kind, 2, 1, size=64)).all()
        assert (_unit(frontal) @ _unit(other[None, :58])[0]).max() < .7


@pytest.mark.parametrize('bad', [dict(size=16), dict(size=64.5), dict(lesion=-.1), dict(lesion=float('nan')), dict(pattern='apical'),
                                 dict(aspect=9), dict(scale=2), dict(patient=-1), dict(image='second'), dict(wobble=2)])
def test_an_image_that_cannot_be_is_refused_by_name(bad):
    with pytest.raises(CxrError, match=str(list(bad.values())[0])): make_phantom(0, **bad)


def test_a_smaller_body_leaves_air_at_the_sides_and_changes_nothing_else():
    whole, small = (make_phantom(4, 2, 0, 96, scale=s) for s in (1., .8))
    assert (make_phantom(4, 2, 0, 96).image == whole.image).all()
    dark = lambda f: (f.image[20:80, :6] < 30).mean()
    assert dark(small) > dark(whole) + .3 and small.lung_mask.mean() < .75 * whole.lung_mask.mean()


# ---------------------------------------------------------------- the COVID tree

@pytest.fixture(scope='module', params=[('2020-03', 'utf-8'), ('2020-06', 'latin-1'), ('final', 'utf-8')], ids=lambda p: p[0])
def covid(request, tmp_path_factory):
    schema, encoding = request.param
    root = tmp_path_factory.mktemp(schema) / 'tree'
    return schema, encoding, root, write_covid_tree(root, n_patients=16, seed=4, size=48, schema=schema, encoding=encoding)


def test_metadata_has_the_words_and_columns_of_its_era(covid):
    schema, encoding, root, truth = covid
    raw = (root / 'metadata.csv').read_bytes()
    assert any(b > 127 for b in raw), 'a byte that is not ASCII'
    if encoding == 'latin-1':
        with pytest.raises(UnicodeDecodeError): raw.decode('utf-8')
    head = next(csv.reader(raw.decode(encoding).splitlines()))
    assert head == SCHEMAS[schema]
    assert ('Patientid' in head and ' url' in head and 'clinical notes' in head) == (schema == '2020-03')
    assert ('modality' in head and 'folder' in head and head[-1] == '') == (schema != '2020-03')
    assert ('RT_PCR_positive' in head) == (schema == 'final')
    m = pd.read_csv(root / 'metadata.csv', encoding=encoding, dtype=str)
    assert len(m) == len(truth.rows)
    covid_word = 'Pneumonia/Viral/COVID-19' if schema == 'final' else 'COVID-19'
    assert {covid_word, 'No Finding', 'No finding ', 'todo'} <= set(m.finding.dropna()) and m.finding.isna().any()
    assert ('COVID-19, ARDS' in set(m.finding)) <= (schema != 'final')
    assert ('Pneumonia/Viral/Herpes ' in set(m.finding)) == (schema == 'final')
    assert {'PA', '?', 'Axial', 'Coronal', 'AP erect', 'AP semi erect'} <= set(m['view'].dropna()) and m['view'].isna().any()
    assert m.license.isna().any() and m.age.isna().any() and m.iloc[:, 0].str.fullmatch(r'\d+b?').all()
    assert any('\n' in n for n in m['clinical notes' if schema == '2020-03' else 'clinical_notes'].dropna())
    hosts = m[' url' if schema == '2020-03' else 'url'].str.split('/').str[2]
    assert hosts.str.endswith('.example').all() and set(hosts[m.finding == covid_word]) != set(hosts[m.finding == 'No Finding'])


def test_files_of_the_covid_tree_are_as_mixed_as_the_real_ones(covid):
    schema, encoding, root, truth = covid
    m = pd.read_csv(root / 'metadata.csv', encoding=encoding, dtype=str)
    on_disk, named, q = {p.name for p in (root / 'images').iterdir()}, m.filename, truth.quirks
    assert set(named) - on_disk == set(q['missing_file'] + q['volumes']) and len(q['missing_file']) == 1
    assert on_disk - set(named) == set(q['unreferenced']) and len(q['unreferenced']) == 1
    assert sorted(named[named.duplicated()]) == q['listed_twice'] and m.iloc[:, 0][named == q['listed_twice'][0]].nunique() == 2
    assert len(q['volumes']) == (0 if schema == '2020-03' else 2) and all(v.endswith('.nii.gz') for v in q['volumes'])
    seen, wrong = {}, []
    for name in on_disk:
        with Image.open(root / 'images' / name) as im:
            im.load()
            seen.setdefault(im.mode, []).append(name)
            if im.format == 'PNG' and name.lower().endswith(('jpg', 'jpeg')): wrong.append(name)
    assert {'L', 'RGB', 'RGBA', 'P'} <= set(seen) and any(k.startswith('I') for k in seen)
    assert sorted(wrong) == sorted(q['png_named_jpg']) and wrong
    assert {n.rsplit('.', 1)[1] for n in on_disk} >= {'jpg', 'png', 'jpeg', 'PNG', 'JPG'}
    for mask in (root / 'annotations/lungVAE-masks').iterdir():
        image = [n for n in on_disk if n.rsplit('.', 1)[0] == mask.name[:-len('_mask.png')]]
        with Image.open(mask) as a, Image.open(root / 'images' / image[0]) as b:
            assert a.mode == '1' and a.size == b.size and a.getextrema() == (0, 255)
    assert (m.iloc[:, 0].value_counts() > 1).sum() >= 3, 'several images of one patient'
    assert (root / 'SYNTHETIC.txt').is_file()


def test_a_tree_is_the_same_for_the_same_seed_and_replaces_only_its_like(tmp_path):
    def files(): return {p.relative_to(tmp_path / 't').as_posix(): p.read_bytes() for p in (tmp_path / 't').rglob('*') if p.is_file()}
    write_covid_tree(tmp_path / 't', n_patients=4, seed=9, size=32)
    first = files()
    (tmp_path / 't/images/extra.png').write_bytes(b'old')
    write_covid_tree(tmp_path / 't', n_patients=4, seed=9, size=32)
    assert files() == first
    write_covid_tree(tmp_path / 't', n_patients=4, seed=8, size=32)
    assert files() != first
    (tmp_path / 'mine').mkdir(), (tmp_path / 'mine/image.png').write_bytes(b'mine')
    for write in (write_covid_tree, write_kaggle_tree, write_phantom_trees, write_phantom_folder):
        with pytest.raises(RunError, match='are not phantoms'): write(tmp_path / 'mine', size=32)
    (tmp_path / 'mine/SYNTHETIC.txt').write_text('a note of mine')
    with pytest.raises(RunError, match='are not phantoms'): write_phantom_trees(tmp_path / 'mine', size=32)
    assert (tmp_path / 'mine/image.png').read_bytes() == b'mine'
    with pytest.raises(RunError, match='cannot write'): write_phantom_trees(tmp_path / 'mine/image.png/below', size=32)


# ---------------------------------------------------------------- the paediatric tree

def test_kaggle_names_folders_and_people(tmp_path):
    truth = write_kaggle_tree(tmp_path / 'k', n_normal=30, n_pneumonia=45, seed=2, size=32)
    files = sorted(p.relative_to(tmp_path / 'k/chest_xray').as_posix() for p in (tmp_path / 'k').rglob('*.jpeg'))
    assert files == sorted(r['file'] for r in truth.rows) and len(files) == 75
    normal = re.compile(r'(train|val|test)/NORMAL/(NORMAL2-)?(IM-\d{4})-0001(-\d{4})?\.jpeg')
    ill = re.compile(r'(train|val|test)/PNEUMONIA/person(\d+)_(bacteria|virus)_(\d+)\.jpeg')
    n = [m for m in map(normal.fullmatch, files) if m]
    p = [m for m in map(ill.fullmatch, files) if m]
    assert len(n) == 30 and len(p) == 45 and {m[2] for m in n} == {None, 'NORMAL2-'} and any(m[4] for m in n)
    parts = {}
    for key, part in [*((m[3], m[1]) for m in n), *(((m[2], m[3]), m[1]) for m in p)]: parts.setdefault(key, set()).add(part)
    assert all(len(v) == 1 for v in parts.values()), 'no person is in two folders by the right patient id'
    assert max(sum(m[2] == k[0] and m[3] == k[1] for m in p) for k in parts if isinstance(k, tuple)) > 1, 'several images of one person'
    kinds = {k: {m[1] for m in p if m[2] == k} for k in {m[2] for m in p if m[3] == 'bacteria'} & {m[2] for m in p if m[3] == 'virus'}}
    assert kinds and any({'train', 'test'} <= v for v in kinds.values()), 'the bare number collides across kinds and folders'


def test_a_nested_archive_brings_its_junk(tmp_path):
    write_kaggle_tree(tmp_path / 'k', n_normal=4, n_pneumonia=6, size=32, nested=True)
    assert (tmp_path / 'k/chest_xray/chest_xray/train/NORMAL').is_dir() and list((tmp_path / 'k/__MACOSX').rglob('._*.jpeg'))
    assert list((tmp_path / 'k').rglob('.DS_Store'))
    for junk in (tmp_path / 'k').rglob('._*.jpeg'):
        with pytest.raises(OSError): Image.open(junk)


# ---------------------------------------------------------------- faults

@pytest.fixture(scope='module')
def planted(tmp_path_factory):
    root = tmp_path_factory.mktemp('faults') / 'both'
    truth = write_phantom_trees(root, seed=3, size=96, n_patients=24, n_normal=12, n_pneumonia=12, faults=True)
    m = pd.read_csv(root / 'covid-chestxray-dataset/metadata.csv', dtype=str, keep_default_na=False)
    return root, truth.faults, m.drop_duplicates('filename').set_index('filename')


def test_every_fault_is_written_down_with_its_files(planted):
    root, faults, m = planted
    assert json.loads((root / 'planted.json').read_text()) == faults and set(faults) == set(FAULTS)
    for name, fault in faults.items():
        for f in fault['files']: assert (root / f).is_file() == (name != 'missing_file'), f
        rows = [f.split('/')[-1] for f in fault['files'] if f.startswith('covid')]
        assert set(rows) <= set(m.index), 'every file in the COVID tree has a row'
    pairs = [f for k, v in faults.items() for f in v['files']]
    assert len(pairs) == len(set(pairs)), 'no image serves two faults'


def test_copies_are_copies_and_what_was_done_to_them_was_done(planted):
    root, faults, m = planted
    def pair(name): return [root / f for f in faults[name]['files']]
    def patients(name): return [m.patientid[f.name] for f in pair(name) if f.name in m.index]
    for name in ('exact_copy', 'label_conflict', 'split_copy'):
        a, b = pair(name)
        assert a.read_bytes() == b.read_bytes(), name
    a, b = pair('label_conflict')
    assert m.finding[a.name] != m.finding[b.name]
    a, b = pair('exact_copy')
    assert m.finding[a.name] == m.finding[b.name]
    for a, b in faults['shared_patient']['pairs']: assert _alike(_read(root / a), _read(root / b)) > .99
    assert len(faults['shared_patient']['pairs']) > 1 and len(set(patients('shared_patient'))) == 2
    for name in ('exact_copy', 'recompressed', 'small_crop', 'border_added', 'mirrored', 'label_conflict'):
        assert len(set(patients(name))) == 2, name
    a, b = map(_read, pair('recompressed'))
    assert b.width < a.width and np.asarray(b).mean() > np.asarray(a).mean() and _alike(a, b) > .99
    a, b = map(_read, pair('mirrored'))
    assert _alike(ImageOps.mirror(a), b) > .99 > _alike(a, b)
    a, b = map(_read, pair('small_crop'))
    assert b.width < a.width and _alike(a.crop((.04 * a.width, .04 * a.height, .96 * a.width, .96 * a.height)), b) > .98
    a, b = map(_read, pair('border_added'))
    edge = (b.width - a.width) // 2
    assert edge > 0 and np.asarray(b)[:edge - 1].max() < 30 and _alike(a, b.crop((edge, edge, b.width - edge, b.height - edge))) > .99
    a, b = pair('cross_source')
    assert 'chest_xray' in a.as_posix() and 'covid-chestxray-dataset' in b.as_posix() and _alike(_read(a), _read(b)) > .999
    with pytest.raises(OSError): _read(pair('truncated_file')[0])


def test_wrong_patient_id_is_a_trap_and_split_patient_a_leak(planted):
    root, faults, _ = planted
    parse = lambda f: re.search(r'(train|test)/PNEUMONIA/person(\d+)_(bacteria|virus)', f).groups()
    (p1, n1, k1), (p2, n2, k2) = map(parse, faults['wrong_patient_id']['files'])
    assert n1 == n2 and k1 != k2 and p1 != p2
    (p1, n1, k1), (p2, n2, k2) = map(parse, faults['split_patient']['files'])
    assert (n1, k1) == (n2, k2) and p1 != p2
    assert len({f.split('/')[-3] for f in faults['split_copy']['files']}) == 2


def test_faults_are_planted_once_and_only_into_phantoms(planted, tmp_path):
    with pytest.raises(RunError, match='already'): plant_faults(planted[0])
    with pytest.raises(RunError, match='no phantom tree'): plant_faults(tmp_path)
    write_phantom_trees(tmp_path / 'few', size=32, n_patients=4, n_normal=4, n_pneumonia=4)
    with pytest.raises(RunError, match='more patients'): plant_faults(tmp_path / 'few')
    for schema in ('2020-03', 'final'):
        write_phantom_trees(tmp_path / schema, size=32, n_patients=16, n_normal=6, n_pneumonia=4, schema=schema, faults=True)
        assert pd.read_csv(tmp_path / schema / 'covid-chestxray-dataset/metadata.csv').filename.str.startswith('fault-').sum() == 9


# ---------------------------------------------------------------- what can be learnt

def test_disease_is_learnable_and_not_trivial():
    r, x, m, y, g = np.random.default_rng(0), [], [], [], []
    for p in range(110):
        ill = p % 2
        strength = ill * (.1 if r.random() < .2 else r.uniform(.33, .77))       # as the tree writers draw it, around .55
        for k in range(2):
            f = make_phantom(11, p, k, 64, strength)
            x.append(f.image), m.append(f.lung_mask), y.append(ill), g.append(p)
    x, y, g = np.stack(x), np.array(y), np.array(g)
    auc = _grouped_auc(_zones(x, m), y, g)
    assert .75 < auc < .995, auc
    assert _grouped_auc(x[:, :20, :].reshape(len(x), -1) / 255., y, g) < .7, 'neck and shoulders know nothing'


# inside and outside AUC of a logistic regression that sees the corner, the side strips or the lungs: lowest and highest allowed
EXPECTED = dict(P0=dict(corner=(.3, .7, .3, .7), sides=(.3, .7, .3, .7), lungs=(.3, .7, .3, .7)),
                P1=dict(corner=(.3, .7, .3, .7), sides=(.3, .7, .3, .7), lungs=(.9, 1, .9, 1)),
                P2=dict(corner=(.85, 1, .3, .7), sides=(.3, .7, .3, .7), lungs=(.3, .7, .3, .7)),
                P3=dict(corner=(.85, 1, .3, .7), sides=(.3, .7, .3, .7), lungs=(.9, 1, .9, 1)),
                P4=dict(sides=(.78, 1, .3, .7), lungs=(.9, 1, .9, 1)),
                P4b=dict(sides=(.78, 1, .3, .7)))


@pytest.mark.parametrize('name', EXPECTED)
def test_the_family_carries_what_it_says_and_nothing_else(name):
    see = dict(corner=lambda x, m: x[:, :20, :16].reshape(len(x), -1) / 255.,
               sides=lambda x, m: x[:, 20:50, :4].mean((1, 2))[:, None] / 255., lungs=_zones)
    x, t, m = phantom_family(name, n_patients=90, images_per_patient=(2, 2), seed=1)
    xo, to, mo = phantom_family(name, n_patients=90, images_per_patient=(2, 2), seed=1, broken=True)
    assert len(x) == len(t) == len(m) == 180 and set(t.columns) >= {'label', 'patient', 'site', 'marker'}
    assert not set(t.patient) & set(to.patient)
    for what, (lo, hi, out_lo, out_hi) in EXPECTED[name].items():
        f = see[what](x, m)
        inside = _grouped_auc(f, t.label.to_numpy(), t.patient)
        outside = roc_auc_score(to.label, _logistic().fit(f, t.label).predict_proba(see[what](xo, mo))[:, 1])
        assert lo <= inside <= hi and out_lo <= outside <= out_hi, (what, inside, outside)


def test_p4b_goes_through_the_lungs():
    x, t, m = phantom_family('P4b', n_patients=90, images_per_patient=(2, 2), seed=1)
    dark = np.array([[i[k].mean()] for i, k in zip(x, m)])
    assert _grouped_auc(dark, t.label.to_numpy(), t.patient) > .7, 'masking the lungs out does not remove an exposure shortcut'


def test_p5_rewards_memory_when_images_are_split_and_nothing_when_patients_are():
    x, t, _ = phantom_family('P5', n_patients=60, size=48, seed=1)
    assert (t.groupby('patient').label.nunique() == 1).all() and (t.groupby('patient').size() == 4).all()
    y, f = t.label.to_numpy(), _unit(x[:, :44])
    def score(cv, groups):
        near = KNeighborsClassifier(3, weights='distance')
        return roc_auc_score(y, cross_val_predict(near, f, y, groups=groups, cv=cv, method='predict_proba')[:, 1])
    assert score(StratifiedKFold(5, shuffle=True, random_state=0), None) > .95
    assert .3 < score(GroupKFold(5), t.patient) < .7


def test_a_folder_gives_its_class_away_by_file_only_when_asked(tmp_path):
    for quality, lo, hi in (((85, 85), .3, .7), ((95, 75), .99, 1)):
        t = write_phantom_folder(tmp_path / str(quality[0]), n_patients=24, size=64, lesion=0, quality=quality)
        bits = []
        for f in t.file:
            with Image.open(tmp_path / str(quality[0]) / f) as im:
                bits.append(-(tmp_path / str(quality[0]) / f).stat().st_size / im.width / im.height)
        assert lo <= roc_auc_score(t.label == 'PNEUMONIA', bits) <= hi, (quality, bits)
        assert (t.lesion == 0).all() and set(t.label) == {'NORMAL', 'PNEUMONIA'}


def test_family_names_are_those_of_the_audits(): assert list(FAMILY) == ['P0', 'P1', 'P2', 'P3', 'P4', 'P4b', 'P5']
