"""DICOM in: compressed files against their uncompressed twins, missing decoders, views by the header, no tag of a patient anywhere."""
import io, shutil, struct, subprocess, sys, warnings
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
                  StudyInstanceUID=generate_uid(), SeriesInstanceUID=generate_uid(), StudyID='7', AccessionNumber='A77',
                  StudyDate='20200401', StudyTime='101500', ReferringPhysicianName='Hardy^Godfrey', PatientName=NAME, PatientID=ID,
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


# Answers to DICOM: nothing of a patient unless asked, and in the patient's own study where asked

SECRETS = ('Ramanujan', 'Srinivasa', ID, BIRTH, 'Hardy', 'A77-KEY')


def radiograph(path, size=256, **tags):
    a = make_phantom(seed=9, patient=int(path.stem[-1]), size=size, lesion=.5).image.astype(np.int64)
    return save(data_set(a, 8, **dict(dict(AccessionNumber='A77-KEY'), **tags)), path)


@pytest.fixture
def study(tmp_path):
    "Two radiographs, one of them compressed; a lateral one, a blank one, one cut short; and a PNG"
    folder = tmp_path / 'images'
    folder.mkdir()
    radiograph(folder / 'IM1')
    a = make_phantom(seed=9, patient=2, size=256).image.astype(np.int64)
    save(compressed(a, 8, False, JPEG + '90', AccessionNumber='A77-KEY'), folder / 'IM2')
    radiograph(folder / 'IM3', ViewPosition='LL')
    save(data_set(np.full((256, 256), 9), 8, AccessionNumber='A77-KEY'), folder / 'IM4')
    whole = radiograph(folder / 'IM5').read_bytes()
    (folder / 'IM5').write_bytes(whole[:len(whole) // 2])
    Image.fromarray(a.astype(np.uint8)).save(folder / 'IM6.png')
    return folder


def outputs(folder): return b'\n'.join(f.read_bytes() + f.name.encode() for f in sorted(folder.rglob('*')) if f.is_file())


def test_no_tag_of_a_patient_is_written_anywhere(tiny_bundle, study, tmp_path):
    from covid_cxr.deploy.explain import explain_files
    from covid_cxr.predict import load_predictor
    assert all(word.encode() in (study / 'IM1').read_bytes() for word in SECRETS)
    out, said = tmp_path / 'out', ''
    for name in ('a.csv', 'a.jsonl'):
        p = here('predict', tiny_bundle, study, '--out', out / name, '--on-bad', 'decline', '--ood', 'warn')
        assert p.returncode == 3 and 'IM1' in p.stdout
        said += p.stdout + p.stderr
    explain_files(load_predictor(tiny_bundle), [str(study / 'IM1'), str(study / 'IM4')], out / 'explained', said=print)
    written = outputs(out)
    assert b'IM2' in written and len(list(out.rglob('*'))) >= 5
    for word in SECRETS: assert word not in said and word.encode() not in written, word


def test_a_lateral_view_is_declined_by_its_header(tiny_bundle, study):
    from covid_cxr.predict import load_predictor
    predictor = load_predictor(tiny_bundle)
    frontal, lateral = predictor.predict([study / 'IM1', study / 'IM3'], ood='warn')
    assert 'its view is LL' in lateral.warning and 'view' not in (frontal.warning or '')
    assert predictor.predict(study / 'IM3', ood='off').warning is None
    predictor.ood_check = None
    declined = predictor.predict(study / 'IM3')
    assert declined.label is None and declined.reason.rule == 'no frontal view by its header'
    predictor.bundle['provenance']['views'] = {'L': 4, 'PA': 9}                          # it learned from lateral views
    assert predictor.predict(study / 'IM3').label


def dciodvfy(file):
    "Error lines of dicom3tools' validator, where it is installed; pydicom and highdicom check the same files in any case"
    if shutil.which('dciodvfy') is None: return []
    said = subprocess.run(['dciodvfy', str(file)], capture_output=True, text=True).stderr
    return [line for line in said.splitlines() if line.startswith('Error')]


def texts(item):
    "(name, value) of every text, code and number of a report"
    value = item.get('TextValue') or item.get('UID') or ''
    if item.ValueType == 'NUM': value = float(item.MeasuredValueSequence[0].NumericValue)
    if item.ValueType == 'CODE': value = item.ConceptCodeSequence[0].CodeMeaning
    yield (item.ConceptNameCodeSequence[0].CodeMeaning if item.get('ConceptNameCodeSequence') else ''), value
    for child in item.get('ContentSequence', []): yield from texts(child)


def test_answers_are_filed_in_the_study_of_the_patient(tiny_bundle, study, tmp_path):
    import highdicom as hd
    from pydicom import dcmread
    from covid_cxr.deploy.dicom import _stem
    from covid_cxr.predict import load_predictor
    p = here('predict', tiny_bundle, study, '--out', tmp_path / 'a.csv', '--dicom-out', tmp_path / 'dicom', '--on-bad', 'decline',
             '--ood', 'off')
    assert p.returncode == 3 and '5 answers filed in DICOM' in p.stderr and 'IM6.png: it is no DICOM file' in p.stderr
    files = sorted((tmp_path / 'dicom').iterdir())
    assert len(files) == 5 + 3                                       # five reports; heat maps of the three that were answered
    assert len({dcmread(f).SOPInstanceUID for f in files}) == len({dcmread(f).SeriesInstanceUID for f in files}) == 8
    assert [e for f in files for e in dciodvfy(f)] == []
    predictor = load_predictor(tiny_bundle)
    for source in sorted(study.glob('IM[1-5]')):
        header, answer = dcmread(source, stop_before_pixels=True), predictor.predict([source], on_bad='decline', ood='off')[0]
        stem = _stem(predictor, answer)
        report = hd.sr.srread(tmp_path / 'dicom' / f'{stem}-report.dcm')
        heat_map = tmp_path / 'dicom' / f'{stem}-heat-map.dcm'
        assert heat_map.is_file() == (answer.declined is None)
        for made in [report, *([dcmread(heat_map)] if heat_map.is_file() else [])]:
            for tag in ('PatientName', 'PatientID', 'PatientBirthDate', 'PatientSex', 'StudyInstanceUID', 'StudyID', 'StudyDate',
                        'AccessionNumber', 'ReferringPhysicianName'): assert made[tag].value == header[tag].value, tag
            assert made.SeriesInstanceUID != header.SeriesInstanceUID and made.DeviceSerialNumber == predictor.bundle['weights']['sha256']
            assert 'RESEARCH ONLY - NOT FOR DIAGNOSIS' in made.SeriesDescription
        check_report(report, answer, predictor, header)
        if heat_map.is_file(): check_heat_map(dcmread(heat_map), header)


def check_report(report, answer, predictor, header):
    tree = list(texts(report))
    said = dict(tree)
    assert said['Device Observer Serial Number'] == predictor.bundle['weights']['sha256'] and said['Algorithm Version']
    assert ('Comment', 'RESEARCH ONLY - NOT FOR DIAGNOSIS') in tree and ('Comment', predictor.bundle['not_for']) in tree
    group, = report.content.get_image_measurement_groups()
    assert group.source_images[0].ReferencedSOPSequence[0].ReferencedSOPInstanceUID == header.SOPInstanceUID
    numbers = {m.name.meaning: m.value for m in group.get_measurements()}
    if answer.declined:
        assert numbers == {} and said['Decision of the model'] == 'declined: no answer'
        why = next(v for k, v in tree if k == 'Comment' and v.startswith('No answer: '))
        assert answer.declined.split(':')[-1].strip()[:40] in why and str(answer.path) not in why
    else:
        assert said['Decision of the model'] == f'predicted: {answer.label}'
        want = {f'Probability of {c}': v for c, v in answer.probabilities.items()}
        assert numbers == pytest.approx(want | {f'Threshold of {predictor.classes[-1]}': answer.threshold}, rel=1e-4)


def check_heat_map(image, header):
    from covid_cxr.deploy.dicom import label_picture
    pixels = image.pixel_array
    assert image.Modality == 'OT' and pixels.ndim == 3 and image.SourceImageSequence[0].ReferencedSOPInstanceUID == header.SOPInstanceUID
    step = pixels.shape[1] // 22
    words = label_picture(np.zeros((8, pixels.shape[1], 3), np.uint8), [])[:step]
    assert np.array_equal(pixels[:step], words) and words.max() == 255                   # the words are in the pixels
    assert np.ptp(pixels[-step:].astype(int), axis=2).max() > 0 or np.ptp(pixels.astype(int), axis=2).max() > 0


def test_a_job_that_stops_has_a_report_for_every_row(tiny_bundle, study, tmp_path):
    from covid_cxr.deploy.dicom import AnswersInDicom
    from covid_cxr.predict import list_images, load_predictor, predict_to_file
    predictor, files = load_predictor(tiny_bundle), list_images(study)
    def stop(answer):
        if answer.path.endswith('IM2'): raise KeyboardInterrupt
    filing = AnswersInDicom(predictor, tmp_path / 'dicom')
    with pytest.raises(KeyboardInterrupt): predict_to_file(filing, files, tmp_path / 'a.csv', 1, 'decline', 'off', stop)
    assert filing.written == 2 and len(list((tmp_path / 'dicom').glob('*-report.dcm'))) == 2
    before = {f.name: f.read_bytes() for f in (tmp_path / 'dicom').iterdir()}
    filing = AnswersInDicom(predictor, tmp_path / 'dicom')
    assert predict_to_file(filing, files, tmp_path / 'a.csv', 1, 'decline', 'off').resumed == 2
    assert filing.written == 3 and len(list((tmp_path / 'dicom').glob('*-report.dcm'))) == 5
    assert all((tmp_path / 'dicom' / name).read_bytes() == data for name, data in before.items())
    predictor.bundle['threshold'] = .9                               # another decision is another answer
    filing = AnswersInDicom(predictor, tmp_path / 'dicom')
    assert len(list(filing.stream(files[:1], ood='off'))) == 1 and len(list((tmp_path / 'dicom').glob('*-report.dcm'))) == 6


def test_odd_tags_are_copied_or_refused_without_being_repeated(tmp_path, recwarn, caplog):
    from covid_cxr.deploy.dicom import ModelName, make_report, read_study, write_dicom_answer
    from covid_cxr.predict import Prediction
    from pydicom import dcmread
    model = ModelName('a model', '1', 'ab' * 32)
    names = {'ISO_IR 100': 'Müller^Jürgen', 'ISO_IR 192': 'Ямада^太郎'}
    for charset, name in names.items():
        file = radiograph(tmp_path / 'IM7', 64, SpecificCharacterSet=charset, PatientName=name)
        report = make_report(read_study(file), Prediction(str(file), 'b\\c', {'a': .3, 'b\\c': .7}, .5), model, ['a', 'b\\c'])
        back = dcmread(save(report, tmp_path / 'back.dcm'))
        assert back.PatientName == name and dciodvfy(tmp_path / 'back.dcm') == []
    bare = radiograph(tmp_path / 'IM8', 64, PatientID=None, PatientName=None, StudyDate=None, StudyID=None, ReferringPhysicianName=None)
    report = make_report(read_study(bare), Prediction(str(bare), None, None, .5, 'blank'), model, ['a', 'b'])
    assert report.PatientID in ('', None) and dciodvfy(save(report, tmp_path / 'bare.dcm')) == []
    class Answering: bundle, synthetic, classes = dict(not_for='no', arch='x', weights=dict(sha256='ab' * 32)), False, ['a', 'b']
    for tags in (dict(StudyInstanceUID='../../etc'), dict(StudyInstanceUID='1.2.' + '3' * 80), dict(SOPInstanceUID='')):
        file = radiograph(tmp_path / 'IM9', 64, **tags)
        with pytest.raises(ImageError, match='is missing or is none'):
            write_dicom_answer(Answering, Prediction(str(file), None, None, .5, 'x'), tmp_path)
    odd = radiograph(tmp_path / 'IM9', 64, PatientSex='MRN4711')
    recwarn.clear(), caplog.clear()
    try: write_dicom_answer(Answering, Prediction(str(odd), None, None, .5, 'x'), tmp_path)
    except ImageError as e: assert 'DICOM does not allow' in str(e) and 'MRN4711' not in str(e)
    else: raise AssertionError('a sex that DICOM does not know was written')
    assert not any('MRN4711' in str(w.message) for w in recwarn) and 'MRN4711' not in caplog.text


def test_several_findings_and_several_classes(tmp_path):
    import highdicom as hd
    from covid_cxr.deploy.dicom import ModelName, make_report, read_study
    from covid_cxr.predict import FindingsPrediction, Prediction
    file = radiograph(tmp_path / 'IM1', 64)
    model, study = ModelName('a model', '1', 'ab' * 32), read_study(file)
    findings = FindingsPrediction(str(file), ['Mass'], dict(Mass=.7, Nodule=.1, Hernia=1e-12), dict(Mass=.5, Nodule=.3, Hernia=None))
    report = hd.sr.srread(save(make_report(study, findings, model, ['Mass', 'Nodule', 'Hernia']), tmp_path / 'r.dcm'))
    said = [v for k, v in texts(report) if k == 'Decision of the model']
    assert said == ['predicted', 'not predicted', 'not decided: no threshold was chosen']
    three = Prediction(str(file), 'b', dict(a=.2, b=.5, c=.3), None)
    report = hd.sr.srread(save(make_report(study, three, model, ['a', 'b', 'c']), tmp_path / 'r.dcm'))
    group, = report.content.get_image_measurement_groups()
    assert [m.value for m in group.get_measurements()] == [.2, .5, .3] and dciodvfy(tmp_path / 'r.dcm') == []


def test_without_highdicom_one_sentence_says_what_to_install(monkeypatch, tmp_path):
    from covid_cxr.core import RunError
    from covid_cxr.deploy.dicom import AnswersInDicom
    monkeypatch.setitem(sys.modules, 'highdicom', None)
    with pytest.raises(RunError, match=r"pip install 'covid_cxr\[dicom\]'"): AnswersInDicom(None, tmp_path)
