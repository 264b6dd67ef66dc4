"""What a frozen network looks at, on phantoms on which the answer is planted: the probes must see it, and must not see what is not there."""
import numpy as np, pytest
from covid_cxr.audit.baselines import lung_box
from covid_cxr.audit.perturb import (ACQUISITION_FALL, ACQUISITION_SHIFT, HIDDEN_OUTSIDE_FALL, MARKER_FALL, MARKER_RATIO, acquisition_changes, centre_box, hide,
                               paste_marker, measure_acquisition, measure_markers, measure_occlusion, recompress)
from covid_cxr.phantom import phantom_family
from covid_cxr.audit.small_cnn import fit_small_cnn

SIZE = 48
EPOCHS = dict(P0=1, P1=6, P2=5, P3=5, P4=6, P4b=3)


@pytest.fixture(scope='module')
def family():
    "Per phantom: a network trained on some patients; pictures, table and lung masks of others; the mean training picture"
    out = {}
    for name, epochs in EPOCHS.items():
        x, t, _ = phantom_family(name, 120, (2, 2), size=SIZE, seed=1)
        out[name] = (fit_small_cnn(x, t['label'], epochs=epochs), *phantom_family(name, 60, (2, 2), size=SIZE, seed=2), x.mean(0))
    return out


def _occlusion(family, name):
    net, x, t, masks, mean = family[name]
    return measure_occlusion(net.score, x, t['label'], t['patient'], mean, masks, fills=('mean',), n_boot=300).set_index(['hidden', 'region'])


# phantom: AUC untouched, with the box over the lungs hidden, with all but the lungs hidden (lowest, highest); a retrained network may do either on P4, which has both
OCCLUSION = dict(P0=((.30, .70), (.30, .70), (.30, .70)), P1=((.90, 1), (.30, .70), (.88, 1)), P2=((.88, 1), (.85, 1), (.30, .68)),
                 P3=((.93, 1), (.80, 1), (.80, 1)), P4=((.85, 1), (.55, .95), (.65, 1)), P4b=((.80, .97), (.80, .97), (.65, .97)))

@pytest.mark.parametrize('name', OCCLUSION)
def test_hiding_finds_what_carries_the_answer(family, name):
    o = _occlusion(family, name)
    for (low, high), value in zip(OCCLUSION[name], (o['auc_before'].iloc[0], o.loc[('lungs', 'centre box'), 'auc'], o.loc[('outside', 'centre box'), 'auc'])):
        assert low <= value <= high, o
    assert (o['fall_low'] <= o['fall']).all() and (o['fall'] <= o['fall_high']).all()


def test_the_two_rules_of_hiding_tell_a_lesion_from_a_marker_and_from_a_machine(family):
    lesion, marker, machine = (_occlusion(family, n) for n in ('P1', 'P2', 'P4b'))
    assert lesion.loc[('lungs', 'centre box'), 'auc_low'] < .5 and lesion.loc[('outside', 'centre box'), 'fall_low'] < HIDDEN_OUTSIDE_FALL
    assert marker.loc[('lungs', 'centre box'), 'auc_low'] > .6 and marker.loc[('outside', 'centre box'), 'fall_low'] > HIDDEN_OUTSIDE_FALL
    assert machine.loc[('lungs', 'lung masks'), 'auc_low'] > .6 and machine.loc[('outside', 'lung masks'), 'auc_low'] > .5      # an intensity shortcut is in both


@pytest.fixture(scope='module')
def markers(family):
    "Per phantom: the marker probe with two kinds at both upper corners"
    return {n: measure_markers(net.score, x, t['label'], t['patient'], kinds=('R', 'L'), n_boot=300) for n, (net, x, t, _, _) in family.items() if n != 'P0'}


@pytest.mark.parametrize('name', ('P2', 'P3'))
def test_a_planted_marker_is_found(markers, name):
    p = markers[name]
    assert p.auc.low > .5 and p.closed.low > MARKER_RATIO and p.ratio.low > MARKER_RATIO and p.worst['fall'] > MARKER_FALL, p
    assert 'upper left' in p.closed.note
    edits = p.edits.set_index('edit')
    assert edits.loc['corners swapped between the classes', 'auc'] < .5
    assert p.sham['ratio'] < p.ratio.value / 2                                  # a soft blob of equal energy is not a letter


def test_the_auc_of_a_marker_alone_becomes_a_coin_when_the_marker_is_equal_for_all(markers):
    p = markers['P2']
    assert p.auc.value > .88 and p.worst['auc'] < .70 and p.edits.set_index('edit').loc['corners erased on all', 'auc'] < .65


@pytest.mark.parametrize('name', ('P1', 'P4', 'P4b'))
def test_no_marker_is_found_where_none_is_planted(markers, name):
    p = markers[name]
    assert p.closed.low < MARKER_RATIO and p.worst['fall_low'] < MARKER_FALL, (p.closed, p.worst)


def test_a_raw_shift_or_the_flips_would_cry_wolf(family, markers):
    "The two obvious rules: how many logits a marker moves, and how many calls it flips"
    net, x, t, _, _ = family['P0']
    nothing = measure_markers(net.score, x, t['label'], t['patient'], kinds=('R',), n_boot=300)
    assert nothing.auc.low < .5 < nothing.auc.high                              # it has learned nothing, so no verdict about markers may be given
    shift = lambda p: p.pastes[['shift_0', 'shift_1']].abs().to_numpy().max()
    assert shift(markers['P4']) > .5 and markers['P4'].worst['fall_low'] < MARKER_FALL       # it moves, and nothing is lost


def test_class_dependent_jpeg_is_flagged_at_native_size_and_not_after_reducing():
    "Nothing but the traces of a JPEG of quality 30 in one class"
    def films(seed):
        x, t, _ = phantom_family('P0', 60, (1, 2), size=64, seed=seed)
        return np.where((t['label'].to_numpy() == 1)[:, None, None], recompress(x, 30), x), t
    reduced = lambda a: a.reshape(len(a), 16, 4, 16, 4).mean((2, 4)).round().astype(np.uint8)
    changes = {k: v for k, v in acquisition_changes().items() if k in ('JPEG quality 95', 'JPEG quality 75', 'JPEG quality 30')}
    (a, ta), (b, tb) = films(1), films(2)
    seen = {}
    for size, f, epochs in ((64, lambda v: v, 8), (16, reduced, 8)):
        net = fit_small_cnn(f(a), ta['label'], epochs=epochs, bs=8)
        seen[size] = measure_acquisition(net.score, f(b), tb['label'], tb['patient'], changes, n_boot=300).set_index('change')
    native, small = seen[64].loc['JPEG quality 30'], seen[16].loc['JPEG quality 30']
    assert native['auc_before'] > .95 and native['difference_high'] < -ACQUISITION_SHIFT and native['fall_low'] > ACQUISITION_FALL, native
    assert abs(seen[64].loc['JPEG quality 95', 'difference']) < abs(native['difference']) / 4
    assert abs(small['difference']) < ACQUISITION_SHIFT and small['auc_before'] < .75 and small['fall_low'] < ACQUISITION_FALL, small


def test_a_clean_lesion_network_keeps_its_auc_through_the_file(family):
    net, x, t, _, _ = family['P1']
    changes = {k: v for k, v in acquisition_changes().items() if k.startswith('JPEG') or 'grey range' in k or '5 bits' in k}
    a = measure_acquisition(net.score, x, t['label'], t['patient'], changes, n_boot=300)
    assert len(a) == 6 and (a['fall_low'] < ACQUISITION_FALL).all(), a
    assert (a['shift_0_low'] <= a['shift_0']).all() and (a['difference'] - (a['shift_1'] - a['shift_0'])).abs().max() < 1e-9


def test_probes_repeat_and_leave_random_numbers_and_pictures_alone(family):
    net, x, t, _, mean = family['P2']
    kept, state = x.copy(), np.random.get_state()[1].copy()
    one, two = (measure_occlusion(net.score, x, t['label'], t['patient'], mean, fills=('shuffle', 'swap'), n_boot=100, seed=3) for _ in range(2))
    assert one.equals(two)
    hide(x, centre_box(SIZE, SIZE), 'swap'), paste_marker(x)
    assert np.array_equal(x, kept) and np.array_equal(np.random.get_state()[1], state)


def test_the_box_is_the_one_of_the_floors():
    for h, w in ((48, 48), (64, 80), (513, 400)): assert np.array_equal(centre_box(h, w), lung_box(h, w))
