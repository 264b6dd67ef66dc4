"""DICOM in: compressed files against their uncompressed twins, missing decoders, views by the header, no tag of a patient anywhere."""
import io, struct, warnings
import numpy as np
import pytest
from PIL import Image
from conftest import here, python
from covid_cxr.brightness import DICOM_DECODERS, read_dicom
from covid_cxr.core import ImageError
from covid_cxr.images import read_grey
from covid_cxr.phantom import make_phantom

NAME, ID, BIRTH = 'Ramanujan^Srinivasa^Q', 'MRN-4711-0815', '18871222'
JPEG = '1.2.840.10008.1.2.4.'
H, W = 72, 88
PICTURE = np.asarray(Image.fromarray(make_phantom(seed=3, patient=1, size=128, lesion=.5).image).resize((W, H)), np.int64)


def stored(bits, signed):
    "The picture with some noise in its lower bits, so that no bit is always the same"
    noise = np.random.default_rng(0).integers(0, 1 << bits - 7, (H, W))
    a = np.minimum((PICTURE << bits - 8) + noise, (1 << bits) - 1)
    return a - (1 << bits - 1) if signed else a


def data_set(a, bits, signed=False, kind='MONOCHROME2', **tags):
    "A radiograph of a patient, uncompressed"
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = generate_uid()
    ds = FileDataset(None, {}, file_meta=meta, preamble=bytes(128))
    wide = 8 if bits <= 8 else 16
    values = dict(SOPClassUID=meta.MediaStorageSOPClassUID, SOPInstanceUID=meta.MediaStorageSOPInstanceUID,
                  StudyInstanceUID=generate_uid(), SeriesInstanceUID=generate_uid(), StudyID='7',
                  AccessionNumber='A77', StudyDate='20200401', StudyTime='101500', ReferringPhysicianName='Hardy^Godfrey', PatientName=NAME, PatientID=ID,
                  PatientBirthDate=BIRTH, PatientSex='M', Modality='DX', ViewPosition='PA',
                  Rows=a.shape[0], Columns=a.shape[1], SamplesPerPixel=1, PhotometricInterpretation=kind,
                  BitsAllocated=wide, BitsStored=bits, HighBit=bits - 1, PixelRepresentation=int(signed))
    for k, v in {**values, **tags}.items():
        if v is not None: setattr(ds, k, v)
    ds.PixelData = (a & (1 << wide) - 1).astype(f'<u{wide // 8}').tobytes()
    ds['PixelData'].VR = 'OW' if wide == 16 else 'OB'
    return ds


def save(ds, path):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        ds.save_as(path, enforce_file_format=True)
    return path


# A JPEG of process 14 (DICOM PS3.5 A.4.1; ITU-T T.81 annex H): no package of Python writes one

LENGTH = 5                                                     # bits of every Huffman code: 17 classes of differences


def differences(a, bits, predictor):
    "What a lossless JPEG stores instead of the numbers"
    ra, rb, rc = np.roll(a, 1, 1), np.roll(a, 1, 0), np.roll(np.roll(a, 1, 0), 1, 1)
    guess = {1: ra, 2: rb, 3: rc, 4: ra + rb - rc, 5: ra + (rb - rc >> 1), 6: rb + (ra - rc >> 1), 7: ra + rb >> 1}[predictor].copy()
    guess[0], guess[1:, 0], guess[0, 0] = ra[0], rb[1:, 0], 1 << bits - 1
    return (a - guess + 32768 & 65535) - 32768


def lossless_jpeg(a, bits, predictor):
    out = []
    for d in differences(a, bits, predictor).ravel().tolist():
        size = 16 if d == -32768 else abs(d).bit_length()
        out.append(f'{size:05b}')
        if 0 < size < 16: out.append(f'{d if d > 0 else d + (1 << size) - 1:0{size}b}')
    text = ''.join(out)
    text += '1' * (-len(text) % 8)
    body = int(text, 2).to_bytes(len(text) // 8, 'big').replace(b'\xff', b'\xff\0')
    table = bytes([0] + [17 if i == LENGTH else 0 for i in range(1, 17)]) + bytes(range(17))
    def segment(marker, data): return b'\xff' + bytes([marker]) + struct.pack('>H', len(data) + 2) + data
    frame = segment(0xc3, struct.pack('>BHHB', bits, *a.shape, 1) + b'\1\x11\0')
    return b'\xff\xd8' + frame + segment(0xc4, table) + segment(0xda, b'\1\1\0' + bytes([predictor, 0, 0])) + body + b'\xff\xd9'


def wrapped(ds, frame, syntax):
    "The same data set with a compressed picture"
    from pydicom.encaps import encapsulate
    ds.PixelData = encapsulate([frame])
    ds['PixelData'].VR, ds['PixelData'].is_undefined_length = 'OB', True
    ds.file_meta.TransferSyntaxUID = syntax
    return ds


def compressed(a, bits, signed, how, **tags):
    ds = data_set(a, bits, signed, **tags)
    if not how.startswith('lossless'):
        plugin = {JPEG + '80': 'pyjpegls', JPEG + '90': 'pylibjpeg'}.get(how, 'pydicom')
        ds.compress(how, encoding_plugin=plugin, generate_instance_uid=False)
        return ds
    predictor = int(how[-1])
    frame = lossless_jpeg(a & (1 << bits) - 1, bits, predictor)
    return wrapped(ds, frame, JPEG + ('70' if predictor == 1 else '57'))


LOSSLESS = {'RLE': '1.2.840.10008.1.2.5', 'JPEG-LS': JPEG + '80', 'JPEG 2000': JPEG + '90', 'JPEG lossless': 'lossless 1',
            **{f'JPEG lossless, predictor {i}': f'lossless {i}' for i in range(2, 8)}}


@pytest.mark.parametrize('name', LOSSLESS)
def test_a_compressed_file_is_its_uncompressed_twin(name, tmp_path):
    for bits, signed in [(8, False), (12, False), (12, True), (16, False)]:
        kind = 'MONOCHROME1' if bits == 12 and not signed else 'MONOCHROME2'
        a = stored(bits, signed)
        plain = save(data_set(a, bits, signed, kind), tmp_path / 'plain.dcm')
        other = save(compressed(a, bits, signed, LOSSLESS[name], kind=kind), tmp_path / 'compressed.dcm')
        assert other.stat().st_size != plain.stat().st_size
        assert np.array_equal(read_dicom(str(plain)).numbers, a)
        assert np.array_equal(read_dicom(str(other)).numbers, a), (bits, signed)
        assert np.array_equal(read_grey(plain), read_grey(other))


def test_lossy_compressions_are_near_their_twin(tmp_path):
    a = stored(12, False)
    plain = read_grey(save(data_set(a, 12), tmp_path / 'plain.dcm')).astype(int)
    def gap(**how):
        ds = data_set(a, 12)
        ds.compress(generate_instance_uid=False, **how)
        return np.abs(read_grey(save(ds, tmp_path / 'lossy.dcm')) - plain).max()
    assert 0 < gap(transfer_syntax_uid=JPEG + '81', jls_error=24) <= 2            # 24 of 4,096 is 1.5 of 256
    assert 0 < gap(transfer_syntax_uid=JPEG + '91', j2k_psnr=[60]) <= 4
    b = io.BytesIO()
    Image.fromarray(stored(8, False).astype(np.uint8)).save(b, 'JPEG', quality=95)
    baseline = save(wrapped(data_set(stored(8, False), 8), b.getvalue(), JPEG + '50'), tmp_path / 'baseline.dcm')
    assert np.array_equal(read_grey(baseline), np.asarray(Image.open(b)))


def test_a_missing_decoder_is_named_with_its_line_of_pip(tmp_path):
    "Every decoder of every compression taken away, in a process of its own"
    ds = data_set(stored(8, False), 8)
    for syntax in (*DICOM_DECODERS, JPEG + '92', JPEG + '102'): save(wrapped(ds, b'\xff\xd8\xff\xd9', syntax), tmp_path / f'{syntax}.dcm')
    said = python('import sys\nfrom pathlib import Path\nfrom pydicom.pixels import get_decoder\nfrom pydicom.uid import UID\n'
                  'from covid_cxr.brightness import DICOM_DECODERS\nfrom covid_cxr.core import ImageError\n'
                  'from covid_cxr.images import read_grey\n'
                  'for s in DICOM_DECODERS:\n    d = get_decoder(UID(s))\n'
                  '    for name in d.available_plugins: d.remove_plugin(name)\n'
                  'for f in sorted(Path(sys.argv[1]).glob("*.dcm")):\n    try: read_grey(f)\n'
                  '    except ImageError as e: print(f.stem, e)', tmp_path)
    lines = dict(line.split(' ', 1) for line in said.splitlines())
    assert len(lines) == len(DICOM_DECODERS) + 2
    for syntax, decoder in DICOM_DECODERS.items():
        assert f'; {decoder.pip_line}, or write it uncompressed.' in lines[syntax] and syntax in lines[syntax]
    for syntax in (JPEG + '92', JPEG + '102'): assert 'none that is read; write it uncompressed' in lines[syntax]


def test_the_extra_brings_every_decoder():
    from configparser import ConfigParser
    from conftest import ROOT
    config = ConfigParser(delimiters=['='], interpolation=None)
    config.read(ROOT / 'settings.ini')
    extra = {word.split('>')[0].split('<')[0] for word in config['DEFAULT']['dicom_requirements'].split()}
    assert {p for d in DICOM_DECODERS.values() for p in d.packages.split()} | {'highdicom'} == extra
    assert "'dicom'" in (ROOT / 'setup.py').read_text()


@pytest.mark.parametrize('name', ['JPEG-LS', 'JPEG 2000', 'JPEG lossless'])
def test_a_compressed_picture_of_another_size_reaches_no_decoder(name, tmp_path):
    ds = compressed(stored(12, False), 12, False, LOSSLESS[name])
    ds.Rows = H - 8
    with pytest.raises(ImageError, match=f'says {W} x {H} pixels and its header {W} x {H - 8}'): read_grey(save(ds, tmp_path / 'a.dcm'))


@pytest.mark.parametrize('name', ['RLE', 'JPEG-LS', 'JPEG 2000', 'JPEG lossless'])
def test_a_damaged_compressed_picture_is_one_sentence_or_a_picture(name, tmp_path):
    whole = save(compressed(stored(12, False), 12, False, LOSSLESS[name]), tmp_path / 'a.dcm').read_bytes()
    r, refused = np.random.default_rng(1), 0
    for i in range(25):
        damaged = bytearray(whole)
        for at in r.integers(len(whole) // 2, len(whole), 8): damaged[at] = r.integers(256)
        if i % 5 == 0: damaged = damaged[:int(len(whole) * r.uniform(.4, .99))]
        (tmp_path / 'b.dcm').write_bytes(damaged)
        try: assert read_grey(tmp_path / 'b.dcm').shape == (H, W)
        except ImageError as e:
            refused += 1
            assert '\n' not in str(e) and 'b.dcm' in str(e)
    assert refused >= 3
