"""Lungs: networks that learn phantoms, measures of known shapes, files that are refused, kept numbers, and an audit with found lungs."""
import dataclasses, json, os, shutil, subprocess, sys
import numpy as np
import pytest
from conftest import DATA, ROOT, here, needs_data
from covid_cxr.audit.baselines import WITHOUT_BOX, WITHOUT_MASKS, Baseline, estimate_auc, fit_baselines, split_scores
from covid_cxr.audit.case import CHECKS, Audit, phantom_case, run_check
from covid_cxr.audit.checks_model import check_maps, check_occlusion
from covid_cxr.audit.regions import blacken, common_lungs, lung_box
from covid_cxr.audit.run import case_of_run
from covid_cxr.audit.sentences import describe_audit, describe_lungs, describe_verdict
from covid_cxr.core import ImageError, RunError, SourceError, WeightsError
from covid_cxr.model.lungs import (ARCH, CARD, TENSORS, LungNet, boundary_error, dice, find_lung_masks, find_lungs, keep_two_largest,
                                   load_lung_net, lung_fault, read_lung_masks, save_lung_net, train_lung_net)
from covid_cxr.model.backbones import load_encoder
from covid_cxr.phantom import phantom_family

sys.path.insert(0, str(ROOT / 'benchmarks'))
KEPT = ROOT / 'benchmarks/results/lungs.json'


@pytest.fixture(scope='module')
def phantoms(): return phantom_family('P1', 40, (1, 1), size=64, seed=2)


@pytest.fixture(scope='module')
def net(phantoms):
    "Trained on 28 phantoms, from random weights"
    return train_lung_net(phantoms.images[:28], phantoms.lungs[:28], size=64, epochs=7, bs=4, weights='none')


@pytest.fixture(scope='module')
def kept(net, tmp_path_factory): return save_lung_net(net, tmp_path_factory.mktemp('lungs') / 'net')


# ---- the network
def test_a_network_finds_the_lungs_of_new_phantoms(net, phantoms):
    found, true = find_lungs(net, phantoms.images[28:]), phantoms.lungs[28:]
    assert dice(found, true).mean() > .85 and dice(found, true).min() > .7
    assert np.nanmean(boundary_error(found, true).mean) < 4
    assert dice(found, np.roll(true, 1, 0)).mean() < dice(found, true).mean() - .03       # its own image, not the usual place
    assert [lung_fault(m) for m in found].count('none') >= 11


def test_what_is_learned_is_better_than_the_mean_mask_of_the_training_images(net, phantoms):
    true = phantoms.lungs[28:]
    usual = np.broadcast_to(phantoms.lungs[:28].mean(0) > .5, true.shape)
    assert dice(find_lungs(net, phantoms.images[28:]), true).mean() > dice(usual, true).mean()


def test_a_fresh_process_finds_the_same_lungs(net, kept, phantoms, tmp_path):
    np.save(tmp_path / 'images.npy', phantoms.images[28:34])
    code = ('import sys, numpy as np; from covid_cxr.model.lungs import *; '
            'np.save(sys.argv[3], find_lungs(load_lung_net(sys.argv[1]), np.load(sys.argv[2])))')
    subprocess.run([sys.executable, '-c', code, kept, tmp_path / 'images.npy', tmp_path / 'masks.npy'], check=True, cwd=ROOT,
                   env=dict(os.environ, PYTHONPATH=str(ROOT)), timeout=120)
    assert (np.load(tmp_path / 'masks.npy') == find_lungs(net, phantoms.images[28:34])).all()


def test_other_sizes_and_shapes(net, phantoms):
    large = phantom_family('P1', 4, (1, 1), size=128, seed=5)
    assert dice(find_lungs(net, large.images), large.lungs).mean() > .8
    assert find_lungs(net, phantoms.images[:2, :, :50]).shape == (2, 64, 50)
    assert find_lungs(net, phantoms.images[:0]).shape == (0, 64, 64)


def test_batches_and_neighbours_change_nothing(net, phantoms):
    alone = np.concatenate([find_lungs(net, phantoms.images[i:i + 1]) for i in range(5)])
    assert (find_lungs(net, phantoms.images[:5], bs=2) == alone).all()


def test_the_same_seed_gives_the_same_network_and_leaves_torch_alone(phantoms):
    import torch
    how = dict(size=32, epochs=1, bs=4, weights='none')
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    nets = [train_lung_net(phantoms.images[:8], phantoms.lungs[:8], seed=s, **how) for s in (0, 0, 1)]
    assert torch.equal(torch.rand(1), expected)
    first, same, other = ([p.detach().numpy().ravel() for p in n.joins.parameters()] for n in nets)
    assert all((a == b).all() for a, b in zip(first, same)) and any((a != b).any() for a, b in zip(first, other))


# ---- measures of known shapes
def rectangle(top, bottom, left, right, h=60, w=80):
    m = np.zeros((1, h, w), bool)
    m[0, top:bottom, left:right] = True
    return m


def test_dice_of_known_shapes():
    a = rectangle(10, 30, 10, 30)
    for b, expected in ((a, 1), (rectangle(10, 30, 20, 40), .5), (rectangle(40, 50, 50, 60), 0), (rectangle(10, 20, 10, 30), 2 / 3)):
        assert dice(a, b)[0] == pytest.approx(expected) == pytest.approx(dice(b, a)[0])


def test_boundary_error_of_known_shapes():
    a, diagonal = rectangle(10, 30, 10, 30), 100           # 60 x 80 pixels: the diagonal is 100, one pixel is one percent
    assert boundary_error(a, a) == (0, 0)
    inner = boundary_error(a, rectangle(13, 27, 13, 27))
    assert 3 <= inner.mean[0] <= 3 * 2 ** .5 and 3 <= inner.p95[0] <= 3 * 2 ** .5 * 1.01
    lines = boundary_error(rectangle(10, 11, 0, 80), rectangle(17, 18, 0, 80))
    assert lines.mean[0] == lines.p95[0] == pytest.approx(7 / diagonal * 100)
    assert np.isnan(boundary_error(a, a & False)).all()


def test_two_largest_pieces_without_holes():
    m = rectangle(5, 25, 5, 25) | rectangle(5, 25, 40, 60) | rectangle(40, 45, 40, 45)
    m[0, 10, 10] = False
    cleaned = keep_two_largest(m)
    assert (cleaned == (rectangle(5, 25, 5, 25) | rectangle(5, 25, 40, 60))).all() and (keep_two_largest(cleaned) == cleaned).all()


@pytest.mark.parametrize('mask, fault', [
    (rectangle(0, 0, 0, 0), 'nothing found'), (rectangle(5, 50, 10, 35), 'one piece'), (rectangle(0, 5, 5, 10), 'too small'),
    (rectangle(0, 60, 0, 80), 'too large'), (rectangle(5, 50, 5, 35) | rectangle(5, 10, 45, 75), 'unequal sides'),
    (rectangle(2, 29, 2, 78) | rectangle(31, 58, 2, 78), 'too large'),
    (rectangle(5, 25, 5, 36) | rectangle(30, 50, 5, 36), 'not side by side'),
    (rectangle(5, 50, 5, 35) | rectangle(5, 50, 45, 75), 'none')])
def test_faults_have_names(mask, fault): assert lung_fault(mask[0]) == fault


# ---- refusals, one sentence each
def copy_of(kept, tmp_path):
    shutil.copytree(kept, tmp_path / 'copy')
    return tmp_path / 'copy'


def test_files_that_are_not_those_that_were_written_are_refused(kept, tmp_path, phantoms):
    folder = copy_of(kept, tmp_path)
    raw = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(WeightsError, match='SHA-256 differs'): load_lung_net(folder)
    (folder / TENSORS).write_bytes(raw)
    assert find_lungs(load_lung_net(folder), phantoms.images[:1]).any()


def test_another_weights_file_is_refused_even_with_its_own_hash(kept, tmp_path):
    from safetensors.torch import save_file
    from covid_cxr.core import sha256_file
    folder = copy_of(kept, tmp_path)
    save_file(load_encoder(ARCH, 'none').body.state_dict(), folder / TENSORS)
    card = json.loads((folder / CARD).read_text())
    card['tensors']['sha256'] = sha256_file(folder / TENSORS)
    (folder / CARD).write_text(json.dumps(card))
    with pytest.raises(WeightsError, match='do not fit a lung network'): load_lung_net(folder)
    for missing in (TENSORS, CARD):
        (folder / missing).unlink()
        with pytest.raises(WeightsError, match='is missing'): load_lung_net(folder)


@pytest.mark.parametrize('images', [np.zeros((2, 64, 64, 3), np.uint8), np.zeros((64, 64), np.uint8), np.zeros((2, 8, 64), np.uint8),
                                    np.zeros((2, 64, 64), np.float32), [[1, 2]]], ids=['colour', 'one', 'flat', 'floats', 'list'])
def test_images_of_another_shape_are_refused(net, images):
    with pytest.raises(ImageError, match=r'stack what load_image gives') as e: find_lungs(net, images)
    assert '\n' not in str(e.value) and len(str(e.value)) < 250


def test_other_refusals(phantoms, tmp_path):
    x, m = phantoms.images[:4], phantoms.lungs[:4]
    with pytest.raises(ImageError, match='one bool mask per image'): train_lung_net(x, m.astype(np.uint8))
    with pytest.raises(ImageError, match='leave two images or more'): train_lung_net(x, m, np.array([True] * 3 + [False]))
    with pytest.raises(WeightsError, match='multiple of 16'): train_lung_net(x, m, size=50, weights='none')
    with pytest.raises(WeightsError, match='EfficientNet'): LungNet(load_encoder('resnet18', 'none'))
    with pytest.raises(ImageError, match='cannot be compared'): dice(m, m[:2])
    with pytest.raises(SourceError, match="'drawn by hand'"): find_lung_masks(tmp_path, 'drawn by hand')
    (tmp_path / 'checkpoint.pt').write_bytes(b'no checkpoint')
    with pytest.raises(RunError, match='delete it and train anew'): train_lung_net(x, m, size=32, weights='none', folder=tmp_path)


# ---- an audit with found lungs
@pytest.fixture(scope='module')
def marker(net):
    "The marker phantom with masks that the network found"
    case = phantom_case('P2', patients=30, size=48)
    found = find_lungs(net, case.small)
    assert np.mean([lung_fault(m) == 'none' for m in found]) > .9 and dice(found, case.masks).mean() > .8
    return dataclasses.replace(case, masks=found, image_masks=found[case.evaluated], masks_from=f'lungs found by {net.name}')


def test_the_marker_phantom_is_unmasked_with_found_lungs_too(marker, net):
    verdicts = check_occlusion(marker)
    named = {v.name: v for v in verdicts}
    assert named['lungs hidden (lung box, mean)'].verdict == 'FAIL' and named['lungs hidden (lung box, mean)'].facts['mask'] == 'lung box'
    own = named['lungs hidden (lung masks, mean)']
    assert own.verdict == 'INFO' and own.facts['found'] == 'FAIL' and own.value > .8 and 'outline is still seen' in describe_verdict(own)
    assert describe_verdict(own).endswith(f'(mask: lungs found by {net.name}).')


def test_one_region_for_all_tells_nothing_where_an_outline_would(phantoms):
    rng, y = np.random.default_rng(0), np.arange(120) % 2
    images, masks = rng.integers(90, 110, (120, 32, 32)).astype(np.uint8), np.zeros((120, 32, 32), bool)
    for i, ill in enumerate(y): masks[i, 8:(20 if ill else 26), 6:26] = True           # smaller lungs, and nothing else
    learn = np.arange(120) < 60
    def auc(x): return estimate_auc(y[~learn], split_scores(x, y, learn, ~learn, 'small_cnn', 0), n_boot=0).value
    assert auc(blacken(images, masks)) > .95 and abs(auc(blacken(images, common_lungs(masks))) - .5) < .2
    assert (common_lungs(phantoms.lungs) >= lung_box(64, 64)).all()


def test_the_baseline_with_masks_hides_the_common_region(monkeypatch, marker):
    from covid_cxr.audit import baselines
    seen = []
    def remember(job, y, groups, at, n_boot, seed): seen.append(job)
    monkeypatch.setattr(baselines, '_fit_baseline', remember)
    fit_baselines(marker.table, marker.small, 'ill', masks=marker.masks)
    job, = [j for j in seen if j.name == WITHOUT_MASKS]
    assert (job.features == blacken(marker.small, common_lungs(marker.masks))).all()


def test_every_row_that_used_a_mask_names_it(marker, net):
    found = f'lungs found by {net.name}'
    maps = {v.rule: v for v in check_maps(marker)}
    assert maps['map_in_lung_box'].facts['mask'] == 'lung box' and maps['map_in_lung_masks'].facts['mask'] == found
    assert maps['map_in_lung_masks'].verdict == 'INFO' and maps['map_in_lung_masks'].value < 1        # the letter is in a corner
    alone, = run_check(CHECKS['check_lungs_only'], marker)
    assert alone.facts['mask'] == found and alone.value < .75                                         # no letter, no answer
    hidden = blacken(marker.small, common_lungs(marker.masks))
    scores = split_scores(hidden, marker.y_all, marker.train, marker.evaluated, 'small_cnn', 0)
    auc = estimate_auc(marker.y, scores, marker.groups, 200)
    base = [Baseline(name, 'image_without_lungs', 'a test', auc, scores) for name in (WITHOUT_BOX, WITHOUT_MASKS, 'four corners')]
    rows = {v.name: v for v in run_check(CHECKS['check_image_without_lungs'], dataclasses.replace(marker, baselines=base))}
    assert rows[WITHOUT_BOX].facts['mask'] == 'lung box' and rows[WITHOUT_MASKS].facts['mask'] == f'one region from {found}'
    assert rows[WITHOUT_MASKS].verdict == 'FAIL' and rows[WITHOUT_MASKS].value > .8                   # the letter is left in the picture
    assert 'mask' not in rows['four corners'].facts


def test_a_run_gets_masks_of_the_sizes_of_its_images(phantom_run, kept, tmp_path):
    case = case_of_run(phantom_run, tmp_path / 'cache', copies=False, lungs=kept)
    assert case.masks.shape == case.small.shape and case.image_masks.shape == case.images.shape and case.masks.any((1, 2)).all()
    assert case.masks_from.startswith(f'lungs found by {load_lung_net(kept).name}')


def test_an_audit_says_by_what_it_knows_the_lungs(marker, net):
    found = f'the fixed lung box; lungs found by {net.name}'
    assert marker.lungs_from == found and dataclasses.replace(marker, masks=None, image_masks=None).lungs_from == 'the fixed lung box'
    some = np.where(np.arange(len(marker.images))[:, None, None] < 7, marker.image_masks, False)
    assert dataclasses.replace(marker, masks=None, image_masks=some).lungs_from == f'{found} on 7 of {len(marker.images)} evaluated images'
    kept = json.loads((ROOT / 'benchmarks/results/audited/covid-2020-imagenet-audited/audit.json').read_text(encoding='utf-8'))
    assert 'lungs found by' in kept.pop('lungs_from')
    old = Audit.from_dict(kept)                                                                # before there was this field
    assert describe_lungs(old) == '' and 'Where the lungs' not in describe_audit(old)
    told = Audit.from_dict(dataclasses.replace(old, lungs_from=found).to_dict())
    assert f'Where the lungs are: {found}.' == describe_lungs(told) and describe_lungs(told) in ' '.join(describe_audit(told).split())
    seen = fit_baselines(marker.table, marker.small, 'ill', masks=marker.masks, masks_from=marker.masks_from, n_boot=0)
    assert next(b.seen for b in seen if b.name == WITHOUT_MASKS).endswith(f'nearly every image (lungs found by {net.name})')


def test_the_command_refuses_a_folder_without_a_network(phantom_run, tmp_path):
    said = here('audit', phantom_run, '--quick', '--cache', tmp_path / 'cache', '--lungs', tmp_path / 'nothing')
    assert said.returncode == 1 and 'no lung network in' in said.stderr and 'Traceback' not in said.stderr


# ---- kept numbers
@pytest.fixture(scope='module')
def numbers(): return json.loads(KEPT.read_text(encoding='utf-8'))


def test_the_kept_means_and_intervals_follow_from_the_kept_images(numbers):
    from lungs import summarise
    folds = numbers['folds']
    assert summarise(folds['images']) == folds['summary']
    images = folds['images']
    assert len(images['dice']) == 428 and len(set(images['patient'])) <= 258 and set(images['fold']) == set(range(5))
    folds_of = {}
    for patient, fold in zip(images['patient'], images['fold']): folds_of.setdefault(patient, set()).add(fold)
    assert all(len(f) == 1 for f in folds_of.values())                        # no patient in two folds


def test_what_is_kept_of_other_collections_adds_up(numbers):
    final = numbers['final']
    assert numbers['folds']['cpu_minutes'] + final['cpu_minutes'] <= 60 and final['megabytes'] < 4
    for found in final['collections'].values():
        assert sum(found['faults'].values()) == found['images'] == 150 and found['box']['images'] == found['faults']['none']
        assert found['failure_rate']['mean'] == pytest.approx(1 - found['faults']['none'] / 150, abs=1e-4)
        assert found['seconds_per_image'] < .1


def test_the_page_says_what_was_kept(numbers):
    page, s = json.loads((ROOT / 'nbs/model/lungs.ipynb').read_text(encoding='utf-8')), numbers['folds']['summary']
    prose = ' '.join(''.join(c['source']) for c in page['cells'] if c['cell_type'] == 'markdown')
    for k in ('dice', 'hand_machine_dice', 'machine_dice'): assert f"({s[k]['mean']:.3f})".replace('0.', '.') in prose, k
    children = next(v for k, v in numbers['final']['collections'].items() if 'children' in k)
    assert 'one child in twenty' in prose and round(1 / children['box']['share_above']['mean']) in (20, 21)
    assert '428 hand-drawn masks but one keep' in prose and numbers['final']['bounds']['hand_drawn_outside'] == 1
    told = {seen: e['mean'] for seen, e in numbers['final']['outline']['auc'].items()}
    outline, own, box, region = (told[f'all outside {what}'] if what != 'outline' else told['the outline of the lungs alone']
                                 for what in ('outline', 'the lungs', 'the box', 'one region for all'))
    assert f'{outline:.2f}' == '0.90' and 'alone reaches .90' in prose and region < box < outline < own
    assert s['dice']['mean'] - s['dice_64']['mean'] < .01                      # 'little is lost'


@needs_data
def test_the_two_kinds_of_masks_of_the_collection():
    for kind, n, patients in (('hand-drawn', 428, 258), ('machine-made', 196, 116)):
        rows = find_lung_masks(DATA, kind)
        assert (len(rows), rows['patient'].nunique()) == (n, patients)
    found = read_lung_masks(rows.head(3), 64)
    assert found.images.shape == found.masks.shape == (3, 64, 64) and .1 < found.masks.mean() < .5
