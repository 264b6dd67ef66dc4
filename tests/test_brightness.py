"""The same picture, written in any way that a file allows, gives the same 8-bit picture, or is refused with one sentence."""
import io, itertools, struct, warnings, zlib
import numpy as np, pytest
from PIL import Image
from conftest import examples
from hypothesis import HealthCheck, given, settings, strategies as st
from covid_cxr.brightness import DEPTHS, Refused, Stored, find_range, read_dicom, robust_ends, to_grey, to_levels
from covid_cxr.core import ImageError, new_table
from covid_cxr.cache import check_images
from covid_cxr.images import BlankImage, ImageRule, apply_rule, is_blank, load_image, read_grey, read_picture, to_8bit

N = 64
Y, X = np.mgrid[:N, :N] / (N - 1)
IMAGE = 1 - .8 * sum(np.exp(-((X - c) ** 2 / .02 + (Y - .5) ** 2 / .08)) for c in (.28, .72))
IMAGE = np.clip((IMAGE - IMAGE.min()) / (IMAGE.max() - IMAGE.min()) * 1.02 - .01, 0, 1)     # some pixels are black, some are white
FRAME = np.abs(X - .5) > .42
RULE = ImageRule(64)


def levels(bits): return np.rint(IMAGE * ((1 << bits) - 1)).astype(np.int64)


def table_item(entries, start=0, stated=16, signed=False):
    from pydicom.dataset import Dataset
    item = Dataset()
    item.add_new('LUTDescriptor', 'SS' if signed else 'US', [len(entries) % 65536, start, stated])
    item.add_new('LUTData', 'OW', np.asarray(entries).astype('<u2').tobytes())
    return [item]


def dicom(path, stored, bits, allocated=16, high=None, signed=False, kind='MONOCHROME2', preamble=b'\0' * 128, **tags):
    "Write a DICOM file; `stored` are the numbers, shifted to their place by the high bit"
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.sequence import Sequence
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = '1.2.840.10008.1.2.1', '1.2.840.10008.5.1.4.1.1.1.1'
    meta.MediaStorageSOPInstanceUID = '1.2.3'
    ds = FileDataset(None, {}, file_meta=meta, preamble=preamble)
    high = bits - 1 if high is None else high
    words = stored if high == bits - 1 else (stored & (1 << bits) - 1) << high + 1 - bits
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Rows, ds.Columns, ds.SamplesPerPixel = meta.MediaStorageSOPClassUID, '1.2.3', *stored.shape, 1
    ds.PhotometricInterpretation, ds.BitsAllocated, ds.BitsStored = kind, allocated, bits
    ds.HighBit, ds.PixelRepresentation = high, int(signed)
    for name, value in tags.items():
        if name.startswith('Pixel'): ds.add_new(name, 'SS' if signed else 'US', value)
        else: setattr(ds, name, Sequence(value) if name.endswith('Sequence') else value)
    ds.PixelData = (words & (1 << allocated) - 1).astype(f'<u{allocated // 8}').tobytes()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        ds.save_as(path, enforce_file_format=True)
    return path


def gap(path, want=IMAGE, where=np.s_[:]): return np.abs(read_grey(path).astype(float) - want * 255)[where].max()


WAYS = list(itertools.product((8, 16), DEPTHS, (0, 1, 2, 3, 4, 6, 8), ('own', 'top'), ('unsigned', 'offset', 'positive'),
                              ('MONOCHROME1', 'MONOCHROME2')))
WAYS = [(a, used, used + more, high, sign, kind) for a, used, more, high, sign, kind in WAYS
        if used + more + (sign == 'positive') <= a and not (high == 'top' and used + more == a)]


def written(used, bits, sign, kind):
    "(numbers, lowest, stored bits) of the picture"
    a = levels(used) if kind == 'MONOCHROME2' else (1 << used) - 1 - levels(used)
    low = -(1 << used - 1) if sign == 'offset' else 0
    return a + low, low, bits + (sign == 'positive')


def meaning(used, low, how):
    "Tags that say: numbers from `low` on, of so many bits, are black to white"
    top = (1 << used) - 1
    if how == 'none': return {}
    if how == 'LINEAR': return dict(WindowCenter=low + (top + 1) / 2, WindowWidth=top + 1)
    if how == 'LINEAR_EXACT': return dict(WindowCenter=low + top / 2, WindowWidth=top, VOILUTFunction=how)
    stated = 16 if how == 'table' else 8                    # a vendor's mistake: the entries have more bits than is stated
    entries = np.rint(np.arange(top + 1) * (65535 / top)).astype(int)
    return dict(VOILUTSequence=table_item(entries, low, stated, signed=low < 0))


def test_there_are_many_ways(): assert len(WAYS) > 200


@pytest.mark.parametrize('how', ['none', 'LINEAR', 'LINEAR_EXACT', 'table', 'table stated too shallow'])
@pytest.mark.parametrize('padded', [False, True])
def test_a_dicom_file_written_any_way_is_one_picture(how, padded, tmp_path):
    "Bits allocated, stored and used, high bit, sign, polarity, window or table, padding, preamble: within two levels of 255"
    worst = {}
    for i, (allocated, used, bits, high, sign, kind) in enumerate(WAYS):
        if padded and (bits == used or allocated == 8): continue                        # no number is left for padding
        a, low, bits = written(used, bits, sign, kind)
        tags = meaning(used, low, how)
        if padded:
            pad = (1 << bits - (sign != 'unsigned')) - 1                                # the largest number of the header
            a, tags = np.where(FRAME, pad, a), dict(tags, PixelPaddingValue=pad)
        preamble = (b'\0' * 128, b'II*\0\x08'.ljust(128, b'\0'), b'MM\0*'.ljust(128, b'\0'), b'BM'.ljust(128, b'\0'))[i % 4]
        top = allocated - 1 if high == 'top' else None
        file = dicom(tmp_path / 'a.dcm', a, bits, allocated, top, sign != 'unsigned', kind, preamble, **tags)
        worst[allocated, used, bits, high, sign, kind] = gap(file, np.where(FRAME, 0, IMAGE) if padded else IMAGE)
    assert len(worst) > 60 and max(worst.values()) <= 2, sorted(worst.items(), key=lambda kv: -kv[1])[:5]


@pytest.mark.parametrize('kind', ['MONOCHROME1', 'MONOCHROME2'])
@pytest.mark.parametrize('slope', [1, 2, .5, -1, -3])
def test_a_rescale_does_not_change_a_picture_without_a_window(slope, kind, tmp_path):
    a = levels(12) if (kind == 'MONOCHROME2') == (slope > 0) else 4095 - levels(12)
    for bits in (12, 14, 16): assert gap(dicom(tmp_path / 'a.dcm', a, bits, kind=kind, RescaleSlope=slope, RescaleIntercept=-1000)) <= 2


def test_signed_numbers_written_as_unsigned_and_ranges_far_from_zero(tmp_path):
    for name, a in (('offset', levels(12) + 32768), ('far', np.rint(20000 + IMAGE * 3794).astype(int)), ('CT', levels(12) - 1024)):
        assert gap(dicom(tmp_path / 'a.dcm', a, 16, signed=name == 'CT')) <= 2, name
    a = np.rint(33069 + IMAGE * 3794).astype(int)                                       # 301 to 4095, written with an offset of 32768
    assert gap(dicom(tmp_path / 'a.dcm', a, 16), (301 + IMAGE * 3794) / 4095) <= 1
    assert gap(png(tmp_path / 'a.png', [a], 0), (301 + IMAGE * 3794) / 4095) <= 1


def test_padding_in_every_place(tmp_path):
    "Inside and outside of the stored bits, as a value and as a range, in either polarity, with and without a window"
    want = np.where(FRAME, 0, IMAGE)
    for kind, (pad, limit, signed), window in itertools.product(('MONOCHROME1', 'MONOCHROME2'),
            [(0, None, False), (65535, None, False), (60000, 65535, False), (-2000, None, True), (-32768, -30000, True)], (False, True)):
        base = levels(12) if kind == 'MONOCHROME2' else 4095 - levels(12)
        base = np.maximum(base, 1)                                                      # no pixel of the image is 0, which may be padding
        tags = dict(PixelPaddingValue=pad, **meaning(12, 0, 'LINEAR' if window else 'none'))
        if limit is not None: tags['PixelPaddingRangeLimit'] = limit
        frame = np.where(Y < .5, pad, pad if limit is None else limit)
        for bits in (13, 16):
            file = dicom(tmp_path / 'a.dcm', np.where(FRAME, frame, base), bits, signed=signed, kind=kind, **tags)
            assert gap(file, want) <= 2, (kind, pad, limit, window, bits)


def test_nothing_but_padding_is_refused(tmp_path):
    file = dicom(tmp_path / 'a.dcm', np.full((N, N), 7), 12, PixelPaddingValue=7)
    with pytest.raises(ImageError, match='all of it is padding'): read_grey(file)


@pytest.mark.parametrize('share', [.02, .1, .2, .24, .249, .251, .26, .4, .5, .75, 1])
def test_a_window_is_not_guessed_a_second_time(share, tmp_path):
    "An image that fills a share of its window is as bright as that share says; there is no step at a quarter"
    width = 4095 / share
    for signed in (False, True):
        window = dict(WindowCenter=width / 2, WindowWidth=width, VOILUTFunction='LINEAR_EXACT')
        file = dicom(tmp_path / 'a.dcm', levels(12), 16, signed=signed, **window)
        assert gap(file, IMAGE * share) <= 1


@settings(max_examples=examples(150), deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_windows_and_tables_are_pydicoms(data, tmp_path):
    "Modality and VOI transformations against pydicom.pixels, for random windows, signs and rescales"
    from pydicom import dcmread
    from pydicom.pixels import apply_modality_lut, apply_voi_lut
    bits, signed = data.draw(st.sampled_from([8, 10, 12, 16])), data.draw(st.booleans())
    low = -(1 << bits - 1) if signed else 0
    function = data.draw(st.sampled_from(['LINEAR', 'LINEAR_EXACT', 'SIGMOID']))
    slope = data.draw(st.sampled_from([None, 1., 2.5]))
    tags = {} if slope is None else dict(RescaleSlope=slope, RescaleIntercept=data.draw(st.integers(-100, 100)))
    center, width = data.draw(st.integers(low, low + (1 << bits))), data.draw(st.integers(2, 1 << bits))
    tags.update(WindowCenter=center, WindowWidth=width, VOILUTFunction=function)
    file = dicom(tmp_path / 'a.dcm', levels(bits) + low, bits, 8 if bits == 8 else 16, signed=signed, **tags)
    ds = dcmread(file)
    with np.errstate(over='ignore'): a = apply_voi_lut(apply_modality_lut(ds.pixel_array, ds), ds).astype(float)
    first, last = (np.float64(slope or 1) * v + float(tags.get('RescaleIntercept', 0)) for v in (low, low + (1 << bits) - 1))
    assert np.abs(read_grey(file) - (a - first) / (last - first) * 255).max() <= .51 + 1 / 257


@pytest.mark.parametrize('top,stated', [(4095, 12), (65520, 12), (4095, 16), (255, 8), (255, 16), (1023, 8), (16383, 12)])
def test_the_depth_of_a_table_is_found_from_its_entries_where_the_header_is_wrong(top, stated, tmp_path):
    entries = np.rint(np.arange(4096) * (top / 4095)).astype(int)
    assert gap(dicom(tmp_path / 'a.dcm', levels(12), 12, VOILUTSequence=table_item(entries, 0, stated))) <= 2


def test_a_modality_table(tmp_path):
    for entries in (np.arange(4096), np.arange(4096) + 1000, np.arange(4096) * 16):
        assert gap(dicom(tmp_path / 'a.dcm', levels(12), 12, ModalityLUTSequence=table_item(entries))) <= 2
        assert gap(dicom(tmp_path / 'a.dcm', 4095 - levels(12), 12, kind='MONOCHROME1', ModalityLUTSequence=table_item(entries))) <= 2


WRONG = {   # name: (keywords of the file, a word of the reason)
    'more bits used than stored': (dict(stored=levels(12), bits=8), 'other bits than the 8'),
    'signed, more bits used than stored': (dict(stored=levels(14) - 8192, bits=12, signed=True), 'other bits than the 12'),
    'numbers below the stated bits': (dict(stored=levels(16), bits=16, BitsStored=12, HighBit=15), 'other bits than the 12'),
    'more bits than there are': (dict(stored=levels(12), bits=17), 'Bits Stored'),
    'no bits': (dict(stored=levels(12), bits=12, BitsStored=0), 'Bits Stored'),
    'a high bit outside': (dict(stored=levels(12), bits=12, HighBit=16), 'HighBit 16'),
    'a window without width': (dict(stored=levels(12), bits=12, WindowCenter=5, WindowWidth=0), 'width 0'),
    'an unknown function': (dict(stored=levels(12), bits=12, WindowCenter=5, WindowWidth=9, VOILUTFunction='CUBIC'), 'CUBIC'),
    'a rescale to one number': (dict(stored=levels(12), bits=12, RescaleSlope=0, RescaleIntercept=1), 'RescaleSlope'),
}


@pytest.mark.parametrize('name', WRONG)
def test_a_header_that_contradicts_its_numbers_is_refused_with_one_sentence(name, tmp_path):
    kw, word = WRONG[name]
    with pytest.raises(ImageError) as e: read_grey(dicom(tmp_path / 'a.dcm', **kw))
    assert word in str(e.value) and str(e.value).count('. ') <= 1 and str(e.value).endswith('.')


@pytest.mark.parametrize('shape, right', [('IDENTITY', 'MONOCHROME2'), ('INVERSE', 'MONOCHROME1'), ('', 'both'), ('LIN OD', 'none')])
@pytest.mark.parametrize('window', [False, True])
def test_the_polarity_is_stated_twice_and_used_once(shape, right, window, tmp_path):
    "PS3.3 C.8.11.3.1.2: INVERSE goes with MONOCHROME1, IDENTITY with MONOCHROME2 and colour; two that contradict are refused"
    tags = meaning(12, 0, 'LINEAR' if window else 'none')
    for kind, a in (('MONOCHROME1', 4095 - levels(12)), ('MONOCHROME2', levels(12))):
        file = dicom(tmp_path / 'a.dcm', a, 12, kind=kind, PresentationLUTShape=shape, **tags)
        if right in (kind, 'both'): assert gap(file) <= 2
        else:
            with pytest.raises(ImageError, match=f'{kind} and PresentationLUTShape {shape}, which contradict'): read_grey(file)


def colour_dicom(path, bits=8, planar=0, kind='RGB', **tags):
    "The picture as three equal channels, or as luma with two channels of no colour"
    a = levels(bits)
    none = np.full_like(a, 1 << bits - 1)
    channels = np.stack([a, a, a] if kind == 'RGB' else [a, none, none], 0 if planar else 2)
    file = dicom(path, channels.reshape(3 * N, N), bits, 8 if bits == 8 else 16, kind=kind, PlanarConfiguration=planar, **tags)
    from pydicom import dcmread
    ds = dcmread(file)
    ds.Rows, ds.Columns, ds.SamplesPerPixel = N, N, 3
    ds.save_as(file)
    return file


@pytest.mark.parametrize('planar', [0, 1])
@pytest.mark.parametrize('kind', ['RGB', 'YBR_FULL'])
def test_grey_in_colour_channels_of_a_dicom_file(kind, planar, tmp_path):
    "Of 8 bits it is the same picture; of more it is refused by name"
    file = colour_dicom(tmp_path / 'a.dcm', planar=planar, kind=kind)
    assert gap(file) <= 1 and read_picture(file, RULE).colour_share < .01
    for bits in (10, 12, 16):
        with pytest.raises(ImageError, match='colour of 8 are read|cannot be decoded'): read_grey(colour_dicom(file, bits, planar, kind))
    with pytest.raises(ImageError, match='contradict each other'):
        read_grey(colour_dicom(file, PresentationLUTShape='INVERSE', kind=kind))


def test_bits_of_an_overlay_are_left_out(tmp_path):
    a = levels(12) | np.where(X > Y, 1 << 14, 0)
    plain = dicom(tmp_path / 'a.dcm', a, 12)
    with pytest.raises(ImageError, match='other bits'): read_grey(plain)                # the header does not say what they are
    from pydicom import dcmread
    ds = dcmread(plain)
    ds.add_new(0x60000100, 'US', 16)
    ds.add_new(0x60000102, 'US', 14)
    ds.save_as(plain)
    assert gap(plain) <= 2


def chunk(name, body): return struct.pack('>I', len(body)) + name + body + struct.pack('>I', zlib.crc32(name + body))


def png(path, channels, colour, bits=16, *extra):
    "A PNG by hand, of any colour type"
    a = np.dstack(channels)
    rows = b''.join(b'\0' + row.astype('>u2' if bits == 16 else 'u1').tobytes() for row in a.reshape(len(a), -1))
    head = chunk(b'IHDR', struct.pack('>IIBBBBB', a.shape[1], a.shape[0], bits, colour, 0, 0, 0))
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + head + b''.join(extra) + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b''))
    return path


def tiff(path, channels, bits=16, photometric=1, order='<', compression=1, fmt=1):
    "A TIFF by hand: little or big endian, packed with zlib or not"
    a, n = np.dstack(channels), len(channels)
    body = a.astype(f'{order}u{bits // 8}').tobytes()
    if compression == 8: body = zlib.compress(body)
    at = 8 + len(body) + len(body) % 2
    extra = n > 3 or n == 2
    tags = [(256, 4, 1, a.shape[1]), (257, 4, 1, a.shape[0]), (258, 3, n, None), (259, 3, 1, compression), (262, 3, 1, photometric),
            (273, 4, 1, 8), (277, 3, 1, n), (278, 4, 1, a.shape[0]), (279, 4, 1, len(body)),
            *([(338, 3, 1, 2)] if extra else []), (339, 3, n, None)]
    rest, wide, out = b'', {258: [bits] * n, 339: [fmt] * n}, struct.pack(order + 'H', len(tags))
    for tag, kind, count, value in tags:
        if value is None:
            values = struct.pack(f'{order}{count}H', *wide[tag])
            if count > 2:
                entry = struct.pack(order + 'I', at + 2 + 12 * len(tags) + 4 + len(rest))
                rest += values + b'\0' * (len(values) % 2)
            else: entry = values.ljust(4, b'\0')
        else: entry = struct.pack(order + ('H' if kind == 3 else 'I'), value).ljust(4, b'\0')
        out += struct.pack(order + 'HHI', tag, kind, count) + entry
    head = (b'II*\0' if order == '<' else b'MM\0*') + struct.pack(order + 'I', at)
    path.write_bytes(head + body.ljust(at - 8, b'\0') + out + b'\0' * 4 + rest)
    return path


@pytest.mark.parametrize('used', DEPTHS)
def test_a_png_of_16_bits_written_any_way_is_one_picture(used, tmp_path):
    a, full = levels(used), np.full((N, N), 65535)
    for colour, channels in ((0, [a]), (2, [a] * 3), (4, [a, full]), (6, [a] * 3 + [full])):
        assert gap(png(tmp_path / 'a.png', channels, colour)) <= 1, colour
    clear = np.where(FRAME, 0, 65535)
    want = np.where(FRAME, 0, IMAGE)
    for colour, channels in ((4, [a, clear]), (6, [a] * 3 + [clear])):
        assert gap(png(tmp_path / 'a.png', channels, colour), want) <= 1, colour
    b = np.where(FRAME, 65535, np.minimum(a, 65534))                                    # the one clear colour is white: it does not count
    for colour, channels in ((0, [b]), (2, [b] * 3)):
        named = chunk(b'tRNS', struct.pack('>H', 65535) * len(channels))
        assert gap(png(tmp_path / 'a.png', channels, colour, 16, named), want) <= 1, colour


@pytest.mark.parametrize('order', '<>')
@pytest.mark.parametrize('compression', [1, 8])
def test_a_tiff_written_any_way_is_one_picture_or_refused(order, compression, tmp_path):
    read = 0
    for used in DEPTHS:
        a = levels(used)
        for bits in (8, 16) if used == 8 else (16,):
            top = (1 << bits) - 1
            full = np.full_like(a, top)
            for photometric, channels in ((1, [a]), (0, [(1 << used) - 1 - a]), (0, [top - a]), (2, [a] * 3),
                                          (2, [a] * 3 + [full]), (1, [a, full])):
                file = tiff(tmp_path / 'a.tif', channels, bits, photometric, order, compression)
                try: assert gap(file) <= 1, (used, bits, photometric, len(channels))
                except ImageError as e: assert photometric != 2 or len(channels) > 3, (bits, photometric, len(channels), e)
                else: read += 1
    assert read >= 5 * 3


def test_tiff_white_is_zero_is_never_white(tmp_path):
    "Fewer bits used than stored, of either reading"
    for used, bits in ((12, 16), (14, 16), (16, 16), (8, 8)):
        assert gap(tiff(tmp_path / 'a.tif', [(1 << used) - 1 - levels(used)], bits, photometric=0)) <= 1


@settings(max_examples=examples(60), deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(used=st.sampled_from((8, 10, 12, 14)), value=st.integers(0, 65535), y=st.integers(0, N - 1), x=st.integers(0, N - 1))
def test_one_hot_or_dead_pixel_changes_nothing_else(used, value, y, x, tmp_path):
    a = levels(used)
    a[y, x] = value
    others = np.ones((N, N), bool)
    others[y, x] = False
    for file in (png(tmp_path / 'a.png', [a], 0), png(tmp_path / 'b.png', [a] * 3, 2), dicom(tmp_path / 'a.dcm', a, 16)):
        assert gap(file, where=others) <= 1
    b = (1 << used) - 1 - levels(used)
    b[y, x] = value
    assert gap(dicom(tmp_path / 'a.dcm', b, 16, kind='MONOCHROME1'), where=others) <= 1
    assert gap(tiff(tmp_path / 'a.tif', [b], photometric=0), where=others) <= 1
    assert np.abs(to_8bit(a.astype(np.uint16)) - IMAGE * 255)[others].max() <= 1


def test_hot_pixels_of_a_large_picture(tmp_path):
    rng = np.random.default_rng(0)
    a = rng.integers(0, 4096, (400, 500)).astype(np.uint16)
    hot = a.copy()
    hot.flat[rng.choice(a.size, a.size // 12_000, replace=False)] = 65535
    same = hot == a
    assert np.array_equal(to_8bit(hot)[same], to_8bit(a)[same]) and (to_8bit(hot)[~same] == 255).all()
    assert robust_ends(np.arange(900).reshape(30, 30)) == (0, 899)                      # too few pixels to leave any out


@settings(max_examples=examples(300), deadline=None, database=None)
@given(low=st.integers(-32768, 65535), span=st.integers(0, 65535), bits=st.integers(1, 16), signed=st.booleans(), inverted=st.booleans())
def test_laws_of_the_range(low, span, bits, signed, inverted):
    "Whatever occurs lies within the range; the picture uses no level above white; order is kept, or turned around"
    first, last = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    low = min(max(low, first), last)
    high = min(low + span, last)
    a = np.linspace(low, high, 40).round().astype(int)[None].repeat(40, 0)
    stored = Stored(a, bits, signed, inverted)
    black, white = find_range(stored)
    assert black <= max(low, 0) and white >= high and black < white + (low == high)
    out = to_levels(to_grey(stored)).astype(int)
    assert out.min() >= 0 and out.max() <= 255
    assert (np.diff(out[0]) <= 0).all() if inverted else (np.diff(out[0]) >= 0).all()
    if bits > 8 and signed and low < -(high // 16) and high > low: assert out.max() - out.min() >= 62        # never flat


def test_eight_bits_are_left_alone(tmp_path):
    "A dark, a bright and a pale picture of eight bits stay what they are, in every format"
    for a in (levels(8) // 5, 255 - levels(8) // 5, 100 + levels(8) // 10):
        a8 = a.astype(np.uint8)
        files = [png(tmp_path / 'a.png', [a], 0, 8), tiff(tmp_path / 'a.tif', [a], 8), dicom(tmp_path / 'a.dcm', a, 8, 8)]
        Image.fromarray(a8).save(tmp_path / 'a.bmp')
        for file in (*files, tmp_path / 'a.bmp'): assert np.array_equal(read_grey(file), a8)
        assert np.array_equal(255 - read_grey(dicom(tmp_path / 'a.dcm', a, 8, 8, kind='MONOCHROME1')), a8)
        assert np.array_equal(apply_rule(a8, RULE), load_image(files[0], RULE))


@pytest.mark.parametrize('shade', [0, 77, 255])
def test_a_blank_picture_is_refused_and_excluded_with_its_reason(shade, tmp_path):
    blank = np.full((N, N), shade)
    framed = np.where(np.maximum(abs(X - .5), abs(Y - .5)) > .42, 254 - shade, shade)
    noisy = np.clip(blank + np.random.default_rng(0).integers(-1, 2, (N, N)), 0, 255)
    files = [png(tmp_path / f'{i}.png', [a], 0, 8) for i, a in enumerate((blank, framed, noisy))]
    Image.new('RGB', (200, 150), (shade,) * 3).save(tmp_path / 'a.jpg')
    files += [tmp_path / 'a.jpg', png(tmp_path / 'deep.png', [blank * 16], 0), dicom(tmp_path / 'a.dcm', blank, 8, 8),
              dicom(tmp_path / 'window.dcm', levels(12), 12, WindowCenter=20000 if shade else -20000, WindowWidth=100)]
    for file in files:
        for rule in (RULE, ImageRule(32, 'crop', 'minmax'), ImageRule(224, 'squash')):
            with pytest.raises(BlankImage, match='one even shade'): load_image(file, rule)
            with pytest.raises(BlankImage, match='one even shade'): read_picture(file, rule)
    good = png(tmp_path / 'good.png', [levels(8)], 0, 8)
    t = new_table([dict(image_id=f.name, path=str(f)) for f in (*files, good)], 'mine')
    done = check_images(t, RULE, on_bad='exclude')
    assert done['excluded_rule'].dropna().tolist() == ['blank image'] * len(files) and done['excluded'].isna().sum() == 1
    assert set(done['excluded_step'].dropna()) == {'files'}
    with pytest.raises(ImageError, match=f'{len(files)} of {len(files) + 1} images'): check_images(t, RULE)
    assert not is_blank(read_grey(good))


def test_blank_pictures_have_no_fingerprint(tmp_path):
    from covid_cxr.duplicates import fingerprints
    files = [png(tmp_path / f'{i}.png', [np.full((N + i, N), 0)], 0, 8) for i in range(3)]
    fp = fingerprints(files)
    assert {why.rule for why in fp.problem} == {'blank image'} and not fp.usable.any()


def test_a_blank_picture_is_told_from_an_unreadable_one_wherever_tables_are_made(tmp_path):
    "Grouping compares neither and says why; an inspection lists each under its own title; the cache gives the reason"
    from covid_cxr.cache import ImageCache
    from covid_cxr.curate.quality import inspect_source
    from covid_cxr.sources import read_folder
    from covid_cxr.table import group_leaksafe
    for c in ('COVID', 'Normal'): (tmp_path / 'own' / c).mkdir(parents=True)
    png(tmp_path / 'own/COVID/good.png', [levels(8)], 0, 8)
    png(tmp_path / 'own/Normal/black.png', [np.zeros((N, N), int)], 0, 8)
    (tmp_path / 'own/Normal/page.png').write_text('<html>')
    t = read_folder(tmp_path / 'own')
    with pytest.warns(UserWarning, match='2 of 3 pictures could not be compared, e.g. .*black.png: blank image: it is one even shade'):
        assert group_leaksafe(t)['group'].nunique() == 3
    look = inspect_source('folder', tmp_path / 'own', 'near')
    named = [look[name]['image_id'].tolist() for name in ('blank', 'unreadable')]
    assert named == [['folder:Normal/black.png'], ['folder:Normal/page.png']]
    assert {'file_blank', 'file_unreadable'} <= {n.subject for n in look.notes}
    reasons = ImageCache(tmp_path / 'c', RULE).warm(t['path'], on_bad='exclude')
    assert [r.rule for r in reasons.values()] == ['blank image', 'image unreadable']


def test_a_picture_and_its_colour_come_from_one_decode(tmp_path, monkeypatch):
    "The pixels are those of load_image, the share is that of the file, for every mode and format"
    from covid_cxr import images
    grey = Image.fromarray(levels(8).astype(np.uint8)).resize((900, 1000))
    photo = Image.merge('RGB', [grey, grey.point(lambda v: v // 2), grey.point(lambda v: v // 3)])
    slides = {'L': (grey, 0), 'RGB': (Image.merge('RGB', [grey] * 3), 0), 'photo': (photo, 1)}
    made = []
    for name, (im, share) in slides.items():
        for kind, kw in (('jpg', dict(quality=90)), ('png', {}), ('bmp', {}), ('tif', {}), ('webp', dict(lossless=True))):
            im.save(tmp_path / f'{name}.{kind}', **kw)
            made.append((tmp_path / f'{name}.{kind}', share))
    photo.save(tmp_path / 'rgb.jpg', keep_rgb=True)                                     # stores red, green and blue
    photo.convert('CMYK').save(tmp_path / 'cmyk.jpg')
    photo.quantize(64).save(tmp_path / 'palette.png')
    photo.save(tmp_path / 'progressive.jpg', progressive=True)
    made += [(tmp_path / n, 1) for n in ('rgb.jpg', 'cmyk.jpg', 'palette.png', 'progressive.jpg')]
    a = levels(12)
    made += [(png(tmp_path / 'deep.png', [a, a // 2, a // 4], 2), 1), (png(tmp_path / 'deep-grey.png', [a] * 3, 2), 0)]
    opened = []
    monkeypatch.setattr(images, '_decode', lambda *args, real=images._decode: (opened.append(args[0]), real(*args))[1])
    for file, share in made:
        for rule in (ImageRule(224), ImageRule(64), ImageRule(256, 'crop'), ImageRule(64, 'pad', 'minmax')):
            opened.clear()
            picture = read_picture(file, rule)
            assert len(opened) == 1
            assert np.array_equal(picture.pixels, load_image(file, rule)), (file.name, rule)
            assert picture.colour_share > .4 if share else picture.colour_share < .01, (file.name, picture.colour_share)


def test_a_short_optional_chunk_does_not_matter(tmp_path):
    "gAMA, cHRM, sBIT, pHYs and others of no length: the decoder never sees them"
    for name in (b'gAMA', b'cHRM', b'sBIT', b'pHYs', b'bKGD', b'sRGB', b'tIME', b'iCCP', b'hIST'):
        file = png(tmp_path / 'a.png', [levels(8)], 0, 8, chunk(name, b'\0'))
        assert read_picture(file, RULE).colour_share == 0 and gap(file) <= 1


def test_pydicoms_own_files_are_read_or_refused(caplog):
    "DICOM PS3.10 7.1: CT_small.dcm and MR_small.dcm have a TIFF header in their preamble"
    from pathlib import Path
    import pydicom
    folder, read = Path(pydicom.__file__).parent / 'data/test_files', []
    for f in sorted(folder.glob('*.dcm')):
        try: a = read_grey(f)
        except ImageError as e: assert f.name in str(e) and '\n' not in str(e)
        else:
            read.append(f.name)
            assert a.dtype == np.uint8 and a.max() > a.min(), f.name
    assert {'CT_small.dcm', 'MR_small.dcm'} <= set(read) and len(read) >= 10 and not caplog.records        # nor does pydicom talk


def test_what_has_no_grey_reading_is_refused():
    from pydicom.dataset import Dataset
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [9, 0, 16], b'\0\0'
    from covid_cxr.brightness import _dicom_table
    with pytest.raises(Refused, match='shorter than it says'): _dicom_table(item)
    with pytest.raises(FileNotFoundError): read_dicom('/nowhere.dcm')
