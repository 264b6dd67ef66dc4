"""The out-of-distribution check: what is no frontal chest radiograph gets a reason, what is one gets an answer, in every process alike."""
import json, os, shutil
import numpy as np, pandas as pd, pytest
from PIL import Image
from conftest import DATA, needs_data, python
from covid_cxr.core import BundleError, choices
from covid_cxr.images import ImageRule, read_picture
from covid_cxr.ood import (OODCheck, OODKind, change_images, check_colour, coverage_curve, evaluate_ood_check,
                           fit_ood_check, make_ood_images)
from covid_cxr.phantom import make_other_view, make_phantom


def _chests(seed, n, size=128):
    return np.stack([make_phantom(seed, i // 2, i % 2, size=size, lesion=.5 * (i % 4 > 1)).image for i in range(n)])


@pytest.fixture(scope='module')
def fitted():
    chests = _chests(3, 260)
    return fit_ood_check(chests[:180], [i // 2 for i in range(180)]), chests[180:]


def test_images_of_other_kinds_are_stopped(fitted):
    "FPR at 95 % keep at most .05 on what is no radiograph and on turned and inverted ones, at most .3 on side views"
    check, fresh = fitted
    views = {k: np.stack([make_other_view(k, 3, i, size=128) for i in range(40)]) for k in ('lateral', 'ct')}
    others = {**{k: make_ood_images(k, 20, 128) for k in choices(OODKind)}, **change_images(fresh), **views}
    found = evaluate_ood_check(check, fresh, others).set_index('kind')
    assert found.loc['frontal', 'passed'] >= .88
    assert set(found.index) == {'frontal', *others} and (found['auroc'].drop('frontal') >= .98).all(), found
    assert (found['fpr95'].drop(['frontal', 'lateral']) <= .05).all() and found.loc['lateral', 'fpr95'] <= .3, found
    assert (found['passed'].drop(['frontal', 'lateral']) <= .05).all(), found


def test_an_upright_chest_stays_itself_whatever_its_frame(fitted):
    "Bars around an image, another size and a slight change of brightness are no reason to decline"
    check, fresh = fitted
    ok = fresh[[check.check(x) is None for x in fresh]][:40]
    padded = [np.pad(x, ((20, 20), (6, 6))) for x in ok]
    resized = [np.asarray(Image.fromarray(x).resize((160, 160))) for x in ok]
    darker = [(x * .93).astype(np.uint8) for x in ok]
    for changed, least in ((padded, .5), (resized, .85), (darker, .9)):
        assert np.mean([check.check(x) is None for x in changed]) >= least


def test_reasons_name_what_is_wrong(fitted):
    check, fresh = fitted
    def said(images): return [check.check(x) or '' for x in images]
    wrong = {'inverted': 255 - fresh[:20], 'upside down': fresh[:20, ::-1, ::-1], '90 degrees': np.rot90(fresh[:20], 1, (1, 2)),
             'one even shade': make_ood_images('black', 5, 128)}
    for word, images in wrong.items():
        assert np.mean([word in s for s in said(images)]) >= .8, (word, said(images)[:5])
    assert all(s == '' or (s.endswith('.') and s.count('\n') == 0) for s in said(make_ood_images('clouds', 10, 128)))


@pytest.mark.parametrize('keep', [.8, .9, .95])
def test_the_limit_keeps_what_it_promises(keep):
    "Over several populations, new patients pass at about the stated share"
    passed = []
    for seed in range(4):
        chests = _chests(40 + seed, 160, 48)
        check = fit_ood_check(chests[:100], [i // 2 for i in range(100)], keep=keep, seed=seed)
        passed.append(np.mean(check.score(chests[100:]) <= check.limit))
    assert abs(np.mean(passed) - keep) < .08, passed


def test_groups_left_out_together_matter():
    "Copies of one image on both sides make left-out distances too small; the groups prevent it"
    chests = np.repeat(_chests(7, 60, 64)[::2], 4, axis=0)
    with_groups, without = fit_ood_check(chests, [i // 4 for i in range(len(chests))]), fit_ood_check(chests)
    assert with_groups.limit > 1.2 * without.limit


def test_a_check_is_json_and_the_same_in_a_fresh_process(fitted, tmp_path):
    check, fresh = fitted
    (tmp_path / 'check.json').write_text(json.dumps(check.to_dict()))
    np.save(tmp_path / 'images.npy', fresh[:10])
    out = python('import json, sys\nimport numpy as np\nfrom covid_cxr.ood import OODCheck\n'
                 'assert not {"torch", "scipy", "pandas"} & set(sys.modules)\n'
                 'check = OODCheck.from_dict(json.load(open(sys.argv[1])))\n'
                 'print(json.dumps(check.score(np.load(sys.argv[2])).tolist()))', tmp_path / 'check.json', tmp_path / 'images.npy')
    assert np.allclose(json.loads(out), check.score(fresh[:10]), rtol=1e-9)
    broken = dict(check.to_dict(), limit=float('nan'))
    with pytest.raises(BundleError, match='limit'): OODCheck.from_dict(broken)


def test_colour(tmp_path):
    chest = _chests(3, 1)[0]
    rgb = np.stack([chest] * 3, -1)
    Image.fromarray(rgb).save(tmp_path / 'grey.jpg', quality=60)
    Image.fromarray(chest).convert('P').save(tmp_path / 'palette.png')
    r = np.random.default_rng(0)
    photo = Image.fromarray(r.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((128, 128))
    photo.save(tmp_path / 'photo.png')
    shares = [read_picture(tmp_path / n, ImageRule(96)).colour_share for n in ('grey.jpg', 'palette.png', 'photo.png')]
    assert [check_colour(share) is None for share in shares] == [True, True, False] and shares[1] == 0


def test_coverage_curve_by_hand():
    c = coverage_curve([3, 1, 2, 2], [0, 1, 1, 0])
    assert c['coverage'].tolist() == [.25, .75, 1] and c['limit'].tolist() == [1, 2, 3]
    assert c['accuracy'].tolist() == pytest.approx([1, 2 / 3, .5])


def test_a_run_carries_its_check(phantom_run, tmp_path):
    "Written by train, obeyed by predict, overruled by a person, absent in an older bundle"
    from covid_cxr.predict import load_predictor
    predictor, page = load_predictor(phantom_run), tmp_path / 'page.png'
    Image.fromarray(make_ood_images('document', 1, 200)[0]).save(page)
    assert predictor.ood_check is not None and predictor.ood_check.n > 24
    said = predictor.predict(page)
    assert said.label is None and said.probabilities is None and said.declined and said.warning is None
    warned, off = predictor.predict(page, ood='warn'), predictor.predict(page, ood='off')
    assert warned.label and warned.warning == said.declined and off.warning is None and off.probabilities == warned.probabilities
    files = pd.read_csv(phantom_run / 'predictions.csv').query('split == "test"').path.tolist()
    assert np.mean([p.declined is not None for p in predictor.predict(files)]) <= .15
    assert predictor.predict(phantom_run / 'new-image.png').declined is None
    without = _bundle(phantom_run, tmp_path / 'without', lambda b: [b.pop(k) for k in ('ood_check', 'feature_check')])
    assert load_predictor(without).input_check is None
    assert load_predictor(without).predict(page).probabilities == off.probabilities


def _bundle(run, to, change):
    "A copy of a run's bundle with its description changed"
    shutil.copytree(run / 'bundle', to)
    b = json.loads((to / 'bundle.json').read_text())
    change(b)
    (to / 'bundle.json').write_text(json.dumps(b))
    return to


@pytest.mark.parametrize('name', ['gate', 'input_gate'])
def test_a_bundle_in_the_early_words_is_read(phantom_run, tmp_path, name):
    "The check under its early names, and the account of the run as early runs wrote it"
    from covid_cxr.predict import load_predictor
    now = json.loads((phantom_run / 'bundle/bundle.json').read_text())
    early = dict(
        format='covid_cxr bundle', version=1, not_for=now['not_for'], synthetic=True, arch=now['arch'], classes=now['classes'],
        image=dict(size=64, how='pad', stretch='none', version=now['image']['version']), mean=.449, std=.226,
        threshold=now['threshold'], temperature=now['temperature'], operating_point={}, weights=now['weights'],
        provenance=dict(recipe='demo', part='test', input_gate=dict(part='test', images=20, declined=1, keep=.95)),
        versions={}, **{name: now['ood_check']})
    shutil.copytree(phantom_run / 'bundle', tmp_path / 'early')
    (tmp_path / 'early/bundle.json').write_text(json.dumps(early))
    a, b = load_predictor(phantom_run), load_predictor(tmp_path / 'early')
    assert b.ood_check.to_dict() == a.ood_check.to_dict()
    assert b.predict(phantom_run / 'new-image.png') == a.predict(phantom_run / 'new-image.png')
    (tmp_path / 'early/bundle.json').write_text(json.dumps({**early, name: dict(now['ood_check'], limit=None)}))
    with pytest.raises(BundleError, match='out-of-distribution check'): load_predictor(tmp_path / 'early')


@needs_data
def test_real_radiographs_pass_and_real_others_do_not():
    "Frontal images of one half of the patients, then the other half, side views and CT slices of the same collection"
    from covid_cxr.images import ImageRule, load_image
    from covid_cxr.sources import read_covid_chestxray
    t = read_covid_chestxray(DATA / 'covid-chestxray-dataset')
    t = t[[isinstance(p, str) and os.path.isfile(p) for p in t['path']]]
    def load(rows): return np.stack([load_image(p, ImageRule(128)) for p in rows['path']])
    frontal = t[(t['view'] == 'PA') & t['patient'].notna()]
    names = np.random.default_rng(0).permutation(frontal['patient'].unique())
    own = frontal['patient'].isin(names[:int(.7 * len(names))])
    check = fit_ood_check(load(frontal[own]), frontal['patient'][own].tolist())
    fresh = load(frontal[~own])
    others = {'side': load(t[t['view'] == 'L']), 'ct': load(t[t['view'].isin(['Axial', 'Coronal'])]), **change_images(fresh)}
    found = evaluate_ood_check(check, fresh, others).set_index('kind')
    assert found.loc['frontal', 'passed'] >= .87 and len(fresh) > 50, found
    assert found.loc['side', 'passed'] <= .3 and (found['passed'].drop(['frontal', 'side']) <= .05).all(), found
    assert (found['auroc'].drop('frontal') > .95).all(), found


def test_blank_files_and_short_chunks_do_not_stop_a_batch(phantom_run, tmp_path):
    "A blank file is declined with a sentence whatever was asked for; a PNG with a short optional chunk is answered"
    import struct, zlib
    from covid_cxr.predict import load_predictor
    predictor, chest = load_predictor(phantom_run), make_phantom(5, 0, 0, size=128, lesion=0.).image
    Image.new('L', (90, 130), 0).save(tmp_path / 'black.png')
    Image.fromarray(chest).save(tmp_path / 'chest.png')
    data = (tmp_path / 'chest.png').read_bytes()
    short = struct.pack('>I', 1) + b'gAMA\0' + struct.pack('>I', zlib.crc32(b'gAMA\0'))
    (tmp_path / 'short.png').write_bytes(data[:33] + short + data[33:])
    for ood in ('decline', 'warn', 'off'):
        for on_bad in ('raise', 'decline'):
            black, plain, odd = predictor.predict([tmp_path / n for n in ('black.png', 'chest.png', 'short.png')], on_bad=on_bad, ood=ood)
            assert black.declined.startswith('not a chest radiograph: it is one even shade (0 of 255)') and black.label is None
            assert (odd.label, odd.declined, odd.probabilities) == (plain.label, plain.declined, plain.probabilities)
