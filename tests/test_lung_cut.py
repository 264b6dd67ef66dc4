"""Pictures cut to their lungs: one way in training and prediction, a bundle that carries its network, and a check of the input."""
import dataclasses, json, pickle, shutil, types
from pathlib import Path
import numpy as np, pandas as pd
import pytest
from PIL import Image
from conftest import ROOT, here, small_table, tiny_recipe
from covid_cxr.audit.regions import lung_box
from covid_cxr.bundle import adapt_bundle, export_bundle, join_bundles, lung_files, read_bundle
from covid_cxr.core import BundleError, RecipeError, RunError, WeightsError, sha256_text
from covid_cxr.images import ImageRule, LungCut, apply_rule, fit_to, load_image, read_grey, read_picture
from covid_cxr.model.cut import CUT_MARGIN, NetFinder, cut_rule, find_cut, lung_finder, mark_uncut, restore_finder
from covid_cxr.model.lungs import save_lung_net, train_lung_net
from covid_cxr.phantom import phantom_family
from covid_cxr.predict import load_predictor, predictions_frame
from covid_cxr.recipe import dump_recipe, load_recipe, override, parse_recipe, recipe_hash
from covid_cxr.runs.folder import RunFolder
from covid_cxr.runs.train import train
from covid_cxr.stats.bootstrap import patient_wilson
from covid_cxr.words import format_percent


NOISE = np.random.default_rng(0).integers(0, 256, (64, 64)).astype(np.uint8)


def middle(a): return LungCut(a.shape[0] // 4, a.shape[0] * 3 // 4, a.shape[1] // 8, a.shape[1] * 7 // 8)
def nowhere(a): return LungCut(0, a.shape[0], 0, a.shape[1], 'one piece')


CUTTING = ImageRule(64, lungs=sha256_text('middle'), finder=middle)


@pytest.fixture(scope='module')
def net():
    x = phantom_family('P1', 16, (1, 1), size=64, seed=2)
    return train_lung_net(x.images, x.lungs, size=48, epochs=5, bs=4, weights='none')


@pytest.fixture(scope='module')
def saved(net, tmp_path_factory): return save_lung_net(net, tmp_path_factory.mktemp('lungs') / 'net', 'not to be handed on')


@pytest.fixture(scope='module')
def upright(): return phantom_family('P1', 3, (1, 1), size=96, seed=7).images


# ---- the rule
@pytest.fixture
def files(tmp_path, upright):
    "The same grey picture as PNG, JPEG and array, much wider than high"
    wide = np.pad(np.kron(upright[0], np.ones((6, 6), np.uint8)), ((0, 0), (100, 300)))
    for name in ('a.png', 'a.jpg'): Image.fromarray(wide).save(tmp_path / name, quality=95)
    return wide, tmp_path / 'a.png', tmp_path / 'a.jpg'


@pytest.mark.parametrize('stretch', ['none', 'minmax'])
@pytest.mark.parametrize('how', ['pad', 'squash'])
def test_a_file_and_its_array_are_cut_alike(files, how, stretch):
    wide, png, jpg = files
    rule = dataclasses.replace(CUTTING, how=how, stretch=stretch, size=224)
    part = middle(wide)
    whole = dataclasses.replace(rule, lungs='', finder=None)
    for a in (wide, read_grey(jpg)):                           # a JPEG is decoded in full, although the rule is small
        again = a[part.top:part.bottom, part.left:part.right]
        want = apply_rule(again, whole) if stretch == 'none' else None
        assert want is None or (apply_rule(a, rule) == want).all()
    for file in (png, jpg): assert (load_image(file, rule) == apply_rule(read_grey(file), rule)).all()
    assert (load_image(png, rule) != load_image(png, whole)).any()
    assert read_picture(png, rule)[2:4] == (part, None)


def test_who_only_looks_changes_nothing(files):
    looked = read_picture(files[2], ImageRule(224), middle)
    assert looked.cut is None and looked.lungs.fault == '' and (looked.pixels == load_image(files[2], ImageRule(224))).all()
    lost = dataclasses.replace(CUTTING, finder=nowhere)
    assert (load_image(files[1], lost) == load_image(files[1], ImageRule(64))).all() and read_picture(files[1], lost).cut.fault


def test_rules_of_whole_pictures_are_as_they_were():
    assert ImageRule(64).to_dict() == dict(size=64, how='pad', stretch='none', version=2) and ImageRule(64).key == '2cd227a01bfc'
    assert str(ImageRule(64)) == "ImageRule(size=64, how='pad', stretch='none', suppress='none')"
    assert ImageRule.from_dict(CUTTING.to_dict()) == CUTTING != ImageRule(64) and CUTTING.key != ImageRule(64).key
    assert hash(CUTTING) == hash(dataclasses.replace(CUTTING, finder=nowhere))


@pytest.mark.parametrize('more, word', [(dict(how='crop'), 'cut the lungs again'), (dict(suppress='sternum'), 'places in a whole picture'),
                                        (dict(lungs='7c94941b'), '64 hex digits')])
def test_a_rule_that_cannot_be_is_refused(more, word):
    with pytest.raises(RecipeError, match=word): ImageRule(**{**dict(size=64, lungs=CUTTING.lungs), **more})


def test_a_rule_without_its_finder_reads_nothing(files):
    alone = ImageRule(64, lungs=CUTTING.lungs)
    for read in (lambda: load_image(files[1], alone), lambda: apply_rule(files[0], alone)):
        with pytest.raises(RecipeError, match='is not at hand'): read()


# ---- the network
@pytest.mark.parametrize('shape', [(800, 800), (800, 1200), (1200, 800)], ids=['square', 'wide', 'high'])
def test_the_cut_holds_the_lungs_and_the_margin(monkeypatch, shape):
    "Two bright boxes for lungs, and a network that finds what is bright"
    monkeypatch.setattr('covid_cxr.model.cut.find_lungs', lambda net, x: x > 127)
    (h, w), picture, seeing = shape, np.zeros(shape, np.uint8), types.SimpleNamespace(size=192)
    top, bottom, left, right = h * 3 // 20, h * 17 // 20, w // 10, w * 9 // 10
    picture[top:bottom, left:w * 9 // 20] = picture[top:bottom, w * 11 // 20:right] = 255
    cut, pixel, (high, wide) = find_cut(seeing, picture), max(shape) / 192, (CUT_MARGIN * (bottom - top), CUT_MARGIN * (right - left))
    want = top - high, bottom + high, max(0, left - wide), min(w, right + wide)
    assert cut.fault == '' and cut[:4] == pytest.approx(want, abs=2 * pixel)
    assert (cut.height, cut.width) == (cut.bottom - cut.top, cut.right - cut.left)
    lungs = fit_to(picture[cut.top:cut.bottom, cut.left:cut.right], 128, 'squash') > 127
    assert not (lungs & ~lung_box(128, 128)).any()              # the fixed box of an audit covers them
    picture[:, w // 2:] = 0
    assert find_cut(seeing, picture) == (0, h, 0, w, 'one piece')
    assert find_cut(seeing, np.zeros(shape, np.uint8)).fault == 'nothing found'


def test_the_key_covers_what_changes_a_cut(net, saved, tmp_path):
    assert lung_finder(saved).key == NetFinder(net).key and pickle.loads(pickle.dumps(NetFinder(net))).key == NetFinder(net).key
    card = json.loads((saved / 'lung_net.json').read_text())
    other = shutil.copytree(saved, tmp_path / 'other')
    (other / 'lung_net.json').write_text(json.dumps(dict(card, size=64)))
    assert lung_finder(other).key != NetFinder(net).key
    with pytest.raises(WeightsError, match='is not the one by which'): restore_finder(ImageRule(64, lungs=NetFinder(net).key), other)


# ---- a run
@pytest.fixture(scope='module')
def own(tmp_path_factory):
    "Sixteen phantom patients with two images each in two class folders; one image is noise"
    root = tmp_path_factory.mktemp('own')
    for r in small_table(root, 16, ('well', 'ill'), 16).itertuples():
        (root / 'images' / r.label).mkdir(parents=True, exist_ok=True)
        a = read_grey(r.path)
        Image.fromarray(NOISE if r.path.endswith('p1-0.png') else a).save(root / 'images' / r.label / Path(r.path).name)
    return root / 'images'


SOURCE = '''name = "folder"
root = ["."]
options = {patient = "(p\\\\d+)-"}
[task]
name = "phantoms"
classes = ["well", "ill"]
'''


def recipe_for(saved): return override(tiny_recipe(SOURCE.split('[task]')[0]), {'image.lungs': str(saved)})


@pytest.fixture(scope='module')
def recipe(saved):
    text = dump_recipe(recipe_for(saved)).replace('task = "pneumonia_vs_normal"\n', '') + '\n[task]' + SOURCE.split('[task]')[1]
    return parse_recipe(text)


@pytest.fixture(scope='module')
def run(recipe, own, tmp_path_factory):
    return train(recipe, data=own, out=tmp_path_factory.mktemp('cut') / 'run', device='cpu', figures=False, log=lambda text: None)


def test_the_recipe_keeps_old_hashes(recipe):
    assert recipe_hash(load_recipe('demo')) == recipe_hash(override(load_recipe('demo'), {'image.lungs': ''}))
    assert parse_recipe(dump_recipe(recipe)) == recipe and recipe_hash(recipe) != recipe_hash(override(recipe, {'image.lungs': ''}))
    for field, word in (('image.how', 'crop'), ('image.suppress', 'sternum')):
        with pytest.raises(RecipeError): override(recipe, {field: word})


def test_a_run_says_which_images_stay_whole(run, saved):
    folder, key = RunFolder.open(run), lung_finder(saved).key
    whole = folder.table[folder.table['uncut'].notna()]
    assert whole['path'].str.endswith('p1-0.png').sum() == 1 and len(whole) < 6
    summary = (run / 'summary.txt').read_text()
    assert f'images are cut to their lungs; {len(whole)} of 32 images stay' in summary and 'ill ' in summary
    assert folder.state['lungs'] == key and folder.bundle['image']['lungs'] == key


def test_what_was_trained_on_is_what_is_asked(run, own, saved):
    "The Learner's own predictions, by the exported bundle, from files and from arrays"
    folder, predictor = RunFolder.open(run), load_predictor(run)
    rows = folder.predictions.sort_values('path').head(8)
    found = predictor.predict(list(rows['path']), ood='off')
    for p, q in zip(found, rows.itertuples()):
        assert p.probabilities['ill'] == pytest.approx(q.prob_ill, abs=1e-5)
        assert predictor.predict(read_grey(q.path), ood='off').probabilities == pytest.approx(p.probabilities, abs=1e-6)
    noise = next(p for p in found if p.path.endswith('p1-0.png'))
    assert 'used whole' in noise.uncut and 'no two were found (' in noise.uncut and noise.warning is None
    assert predictions_frame(found)['uncut'].notna().sum() == sum(p.uncut is not None for p in found)
    from fastai.learner import load_learner
    assert float(load_learner(run / 'export.pkl').predict(rows['path'].iloc[0])[2][1]) == pytest.approx(rows['prob_ill'].iloc[0], abs=1e-5)


def test_an_audit_reads_the_cut_pictures(run, saved, tmp_path):
    from covid_cxr.audit.run import case_of_run
    case = case_of_run(run, tmp_path / 'cache', copies=False, n_boot=0)
    assert np.allclose(case.score(case.images), case.p, atol=1e-5)


def test_another_network_does_not_go_on_with_the_run(recipe, run, own, saved, tmp_path):
    begun = shutil.copytree(run, tmp_path / 'run')
    state = json.loads((begun / 'run.json').read_text())
    (begun / 'run.json').write_text(json.dumps(dict(state, status='training', lungs='0' * 64)))
    with pytest.raises(RunError, match='another lung network than when'):
        train(recipe, data=own, out=begun, device='cpu', figures=False, log=lambda text: None)
    gone = override(recipe, {'image.lungs': str(tmp_path / 'nothing')})
    with pytest.raises(WeightsError, match='no lung network in'): train(gone, data=own, out=tmp_path / 'new', log=lambda text: None)
    assert not (tmp_path / 'new').exists()


# ---- a bundle
def test_the_network_travels_with_the_bundle(run, own, tmp_path):
    image = str(sorted(own.rglob('*.png'))[5])
    want = load_predictor(run).predict(image, ood='off').probabilities
    away = export_bundle(run, tmp_path / 'away')
    joined = join_bundles([run, run], tmp_path / 'joined')
    place = adapt_bundle(run, tmp_path / 'place', .5, 1., dict(name='here'))
    for folder in (away, joined, place):
        assert {*lung_files(read_bundle(folder))} == {'lung_net.json', 'lung_net.safetensors'}
        assert load_predictor(folder).integrity.status == 'verified'
    for folder in (away, joined): assert load_predictor(folder).predict(image, ood='off').probabilities == pytest.approx(want, abs=1e-6)
    assert json.loads((away / 'lung_net.json').read_text())['note'] == 'not to be handed on'
    said = here('export', run, '--out', tmp_path / 'again')
    assert said.returncode == 0 and 'lung network: not to be handed on' in said.stderr


def test_a_bundle_without_its_network_is_refused(run, saved, tmp_path):
    lost = shutil.copytree(run / 'bundle', tmp_path / 'lost')
    (lost / 'lung_net.safetensors').unlink()
    with pytest.raises(BundleError, match='lung_net.safetensors of the network that finds them is missing'): load_predictor(lost)
    x = phantom_family('P1', 4, (1, 1), size=64, seed=3)
    other = shutil.copytree(run / 'bundle', tmp_path / 'other')
    save_lung_net(train_lung_net(x.images, x.lungs, size=32, epochs=1, bs=4, weights='none'), other)
    with pytest.raises(WeightsError, match='is not the one by which these images are cut'): load_predictor(other)
    said = here('predict', lost, saved)
    assert said.returncode == 1 and 'copy the whole folder' in said.stderr and 'Traceback' not in said.stderr


# ---- the check of the input
def test_an_image_without_two_lungs_is_declined_warned_of_or_answered(run, saved, upright, tmp_path):
    names = {}
    for name, a in {'upright': upright[0], 'turned': np.rot90(upright[0])}.items():
        Image.fromarray(a).save(tmp_path / f'{name}.png')
        names[name] = str(tmp_path / f'{name}.png')
    looking, plain = load_predictor(run, lungs=saved), load_predictor(run)
    assert plain.ood_check is None                              # too few images were trained on: lungs alone decide
    good, bad = looking.predict([names['upright'], names['turned']])
    assert good == plain.predict(names['upright'])
    assert bad.declined.startswith('not a frontal chest radiograph') and 'no two lungs (' in bad.declined
    assert (bad.reason.step, bad.reason.rule, bad.probabilities) == ('prediction', 'no two lungs found', None)
    warned, off = (looking.predict(names['turned'], ood=how) for how in ('warn', 'off'))
    assert warned.warning == bad.declined and dataclasses.replace(warned, warning=None) == off == plain.predict(names['turned'])
    assert looking.predict(np.ascontiguousarray(np.rot90(upright[0]))).declined == bad.declined
    said = here('predict', run, *names.values(), '--lungs', saved, '--ood', 'warn', '--out', tmp_path / 'out.csv')
    assert said.returncode == 0 and 'the lung network finds no two lungs' in said.stderr and 'note: ' in said.stderr, said.stderr
    assert pd.read_csv(tmp_path / 'out.csv')[['warning', 'uncut']].notna().all(axis=1).tolist() == [False, True]


def test_the_column_of_whole_pictures(saved, own):
    paths = sorted(map(str, own.rglob('*.png')))[:4]
    table = pd.DataFrame(dict(path=paths, excluded=[np.nan, np.nan, 'no', np.nan], label='ill'))
    marked = mark_uncut(table, cut_rule(ImageRule(32), saved))
    assert marked['uncut'].isna().iloc[2] and mark_uncut(table, ImageRule(32)) is table


# ---- kept numbers
@pytest.fixture(scope='module')
def kept(): return json.loads((ROOT / 'benchmarks/results/lung_check.json').read_text(encoding='utf-8'))['sets']


def test_the_kept_shares_follow_from_the_kept_faults(kept):
    for name, found in kept.items():
        n, lost = found['images'], found['images'] - found['faults']['none']
        assert sum(found['faults'].values()) == n and found['lungs']['share'] == pytest.approx(lost / n, abs=1e-4), name
        e = patient_wilson(np.arange(n) < lost, np.arange(n))         # one image of each patient
        assert (found['lungs']['low'], found['lungs']['high']) == pytest.approx((e.low, e.high), abs=1e-4), name
        each = [found[k]['share'] for k in ('lungs', 'other')]
        assert max(each) <= found['either']['share'] <= sum(each) + 1e-4


def test_the_page_says_what_the_check_costs_and_gains(kept):
    page = json.loads((ROOT / 'nbs/predict.ipynb').read_text(encoding='utf-8'))
    prose = ' '.join(''.join(c['source']) for c in page['cells'] if c['cell_type'] == 'markdown')
    children, adults, lateral = (kept[k] for k in ('Kaggle children', 'NIH adults', 'COVID collection, lateral'))
    told = [(children, 'lungs', '{} of the children'), (adults, 'lungs', '{} of the adults'), (lateral, 'lungs', 'it declines {} where'),
            (lateral, 'other', 'alone, declines {}: together all')]
    for found, by, text in told: assert text.format(format_percent(found[by]['share'], 1)) in prose, text
    covid = [kept[f'COVID collection, {view}'] for view in ('PA', 'AP')]
    assert sum(f['images'] for f in covid) == 76 and all(f['lungs']['share'] == 0 for f in covid) and lateral['either']['share'] == 1
    for name, found in kept.items():
        if found['frontal']: assert found['lungs']['share'] < found['other']['share'] and found['lungs']['share'] < .02, name
    turned = [found['lungs']['share'] for name, found in kept.items() if name.endswith('turned 180')]
    assert len(turned) == 2 and max(turned) < .1                                                   # 'and pass'
