"""Odd, damaged and hostile files: each is read right or refused by name; nothing else escapes, nothing is replaced, nothing warns."""
import io, os, struct, subprocess, sys, threading, warnings, zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np, PIL.Image, PIL.ImageFile, pytest
from PIL import Image
from hypothesis import HealthCheck, given, settings, strategies as st
from conftest import DATA, ROOT, examples, needs_data
from covid_cxr.core import ImageError, choices
from covid_cxr.brightness import MAX_PIXELS, Grey, to_levels
from covid_cxr.images import (REDUCED_MEAN, REDUCED_P99, BlankImage, How, ImageRule, _decode, apply_rule, file_facts, fit_to,
                              image_errors, load_image, read_grey, read_picture, to_8bit)

H, W = 96, 80


def drawing(h=H, w=W, seed=0):
    "A smooth drawing with two dark lungs and a bright corner: no half of it resembles another"
    y, x = np.mgrid[:h, :w] / [[[h]], [[w]]]
    a = 200 - 120 * sum(np.exp(-((x - c) / .13) ** 2 - ((y - .5) / .27) ** 2) for c in (.3, .7)) - 50 * x * y
    a[: h // 8, : w // 8] = 250
    return np.clip(a + np.random.default_rng(seed).normal(0, 2, (h, w)), 0, 255).astype(np.uint8)


PIXELS = drawing()
DEEP = PIXELS.astype(np.uint16) * 16 + 7          # 12 bits in 16


def save(im, kind, **kw):
    b = io.BytesIO()
    im.save(b, kind, **kw)
    return b.getvalue()


def png(im=None, **kw): return save(im or Image.fromarray(PIXELS), 'PNG', **kw)
def jpg(im=None, **kw): return save(im or Image.fromarray(PIXELS), 'JPEG', quality=kw.pop('quality', 95), **kw)


def chunk(name, body, crc=None):
    return struct.pack('>I', len(body)) + name + body + struct.pack('>I', zlib.crc32(name + body) if crc is None else crc)


def by_hand(h, w, depth, colour, *chunks, interlaced=0):
    "A PNG of these chunks behind its header"
    header = chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, depth, colour, 0, 0, interlaced))
    return b'\x89PNG\r\n\x1a\n' + header + b''.join(chunks) + chunk(b'IEND', b'')


def raw_png(h, w, depth, colour, rows, *extra, cut=None):
    "A PNG by hand: `rows` are the bytes of each line"
    data = zlib.compress(b''.join(b'\0' + r for r in rows)[:cut])
    return by_hand(h, w, depth, colour, *extra, chunk(b'IDAT', data))


def interlaced(cut=None):
    "The drawing as an Adam7 PNG"
    passes = [(0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1)]
    rows = b''.join(b'\0' + row.tobytes() for y, dy, x, dx in passes for row in PIXELS[y::dy, x::dx])
    return by_hand(H, W, 8, 0, chunk(b'IDAT', zlib.compress(rows[:cut])), interlaced=1)


def many_small_parts():
    "The drawing with its data in chunks of seven bytes"
    d = png()
    at = d.index(b'IDAT')
    data = d[at + 4:-16]
    return d[:at - 4] + b''.join(chunk(b'IDAT', data[k:k + 7]) for k in range(0, len(data), 7)) + d[-12:]


def before_idat(data, *extra):
    at = data.index(b'IDAT') - 4
    return data[:at] + b''.join(extra) + data[at:]


def exif(orientation, order='<'):
    return struct.pack(order + '2sHIHHHIHHI', b'II' if order == '<' else b'MM', 42, 8, 1, 0x0112, 3, 1, orientation, 0, 0)


def app1(data, body): return data[:2] + b'\xff\xe1' + struct.pack('>H', len(body) + 8) + b'Exif\0\0' + body + data[2:]


def rgba(alpha):
    return Image.merge('RGBA', [Image.fromarray(PIXELS)] * 3 + [Image.fromarray(alpha)])


def palette(transparent=None):
    im = Image.fromarray(PIXELS // 4)
    im = im.convert('P')
    im.putpalette([v for i in range(256) for v in (min(i * 4, 255),) * 3])
    return save(im, 'PNG', **({} if transparent is None else dict(transparency=transparent)))


def dicom(stored=None, syntax='1.2.840.10008.1.2.1', drop=(), **tags):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return _dicom(stored, syntax, drop, tags)


def _dicom(stored, syntax, drop, tags):
    from pydicom.dataset import FileDataset, FileMetaDataset
    stored = DEEP if stored is None else stored
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = syntax, '1.2.840.10008.5.1.4.1.1.1', '1.2.3.4'
    ds = FileDataset('x', {}, file_meta=meta, preamble=b'\0' * 128)
    wide = stored.dtype.itemsize * 8
    values = dict(SOPClassUID=meta.MediaStorageSOPClassUID, SOPInstanceUID='1.2.3.4', PatientName='Doe^Jane', Rows=stored.shape[0],
                  Columns=stored.shape[1], SamplesPerPixel=1,
                  PhotometricInterpretation='MONOCHROME2', BitsAllocated=wide, BitsStored=12 if wide == 16 else 8,
                  HighBit=11 if wide == 16 else 7, PixelRepresentation=0, PixelData=stored.tobytes())
    for k, v in {**values, **tags}.items():
        if k not in drop: setattr(ds, k, v)
    if isinstance(tags.get('PixelData'), list):
        from pydicom.encaps import encapsulate
        ds.PixelData = encapsulate(tags['PixelData'])
        ds['PixelData'].VR, ds['PixelData'].is_undefined_length = 'OB', True
    b = io.BytesIO()
    ds.save_as(b, enforce_file_format=True)
    return b.getvalue()


def voi_lut(packed=False):
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [4096, 0, 8], [min(255, i // 8) for i in range(4096)]
    item['LUTDescriptor'].VR, item['LUTData'].VR = 'US', 'US'
    if packed:
        item['LUTData'].VR = 'OW'
        item.LUTData = bytes(item.LUTData)
    return dict(VOILUTSequence=Sequence([item]))


def modality_lut():
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence
    item = Dataset()
    item.LUTDescriptor, item.LUTData, item.ModalityLUTType = [4096, 0, 16], list(range(4095, -1, -1)), 'US'
    item['LUTDescriptor'].VR, item['LUTData'].VR = 'US', 'US'
    return dict(ModalityLUTSequence=Sequence([item]))


def tiff16_white_is_zero():
    body = (65535 - DEEP).astype('<u2').tobytes()
    tags = [(256, 3, 1, W), (257, 3, 1, H), (258, 3, 1, 16), (259, 3, 1, 1), (262, 3, 1, 0), (273, 4, 1, 8), (277, 3, 1, 1),
            (278, 3, 1, H), (279, 4, 1, len(body))]
    directory = struct.pack('<H', len(tags)) + b''.join(struct.pack('<HHII', *t) for t in tags)
    return b'II*\0' + struct.pack('<I', 8 + len(body)) + body + directory + b'\0\0\0\0'


def huge_jpeg():
    d = jpg()
    at = d.index(b'\xff\xc0')
    return d[:at + 5] + struct.pack('>HH', 60000, 60000) + d[at + 9:]


def huge_gif():
    screen, picture = struct.pack('<HHBBB', 65000, 65000, 0, 0, 0), struct.pack('<HHHHB', 0, 0, 65000, 65000, 0)
    return b'GIF89a' + screen + b',' + picture + b'\x08\x01\x00\x00;'


def many_scans():
    d, out = jpg(progressive=True), b''
    first, end = d.index(b'\xff\xda'), d.rindex(b'\xff\xd9')
    second = min(i for i in (d.find(b'\xff\xda', first + 2), d.find(b'\xff\xc4', first + 2)) if i > 0)
    return d[:end] + d[first:second] * 3000 + d[end:]


def halves(data, share): return data[:int(len(data) * share)]


EOI = b'\xff\xd9'
STRIPE = np.where(np.arange(W) < W // 2, 255, 0).astype(np.uint8)[None].repeat(H, 0)
half_clear = np.where(np.arange(H)[:, None] < H // 2, np.uint8(0), PIXELS)
luma = np.asarray(Image.merge('RGB', [Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS), Image.fromarray(PIXELS // 2)]).convert('L'))
colour = Image.merge('RGB', [Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS), Image.fromarray(PIXELS // 2)])
WINDOWED = (np.clip((DEEP - 2047.5) / 1999 + .5, 0, 1) * 65535 + .5).astype(np.uint16)      # PS3.3 C.11.2.1.2.1
SPREAD = (DEEP / 4095 * 65535 + .5).astype(np.uint16)      # DICOM: 12 bits over the full range

READ = {   # name: (file name, bytes, the pixels that must come back, largest difference allowed)
    'png-grey': ('a.png', png(), PIXELS, 0),
    'png-grey-alpha': ('a.png', png(Image.merge('LA', [Image.fromarray(PIXELS), Image.fromarray(STRIPE)])), PIXELS * (STRIPE > 0), 0),
    'png-rgb': ('a.png', png(colour), luma, 0),
    'png-rgba-opaque': ('a.png', png(rgba(np.full_like(PIXELS, 255))), PIXELS, 0),
    'png-rgba-on-black': ('a.png', png(rgba(STRIPE)), PIXELS * (STRIPE > 0), 0),
    'png-rgba-half': ('a.png', png(rgba(np.full_like(PIXELS, 51))), (PIXELS / 5 + .5).astype(np.uint8), 1),
    'png-palette': ('a.png', palette(), np.minimum(PIXELS // 4 * 4, 255), 0),
    'png-palette-transparency': ('a.png', palette(bytes([0] * 20 + [255] * 236)), np.where(PIXELS // 4 < 20, 0, PIXELS // 4 * 4), 0),
    'png-palette-one-clear-colour': ('a.png', palette(int(PIXELS[0, 0] // 4)),
                                     np.where(PIXELS // 4 == PIXELS[0, 0] // 4, 0, PIXELS // 4 * 4), 0),
    'png-grey-one-clear-level': ('a.png', png(transparency=250), np.where(PIXELS == 250, 0, PIXELS), 0),
    'png-1-bit': ('a.png', png(Image.fromarray(STRIPE).convert('1')), STRIPE, 0),
    'png-2-bit': ('a.png', raw_png(H, W, 2, 0, [bytes([0b00011011] * (W // 4))] * H),
                  np.tile(np.array([0, 85, 170, 255], np.uint8), (H, W // 4)), 0),
    'png-16-bit': ('a.png', png(Image.fromarray(DEEP)), DEEP, 0),
    'png-16-bit-one-clear-level': ('a.png', before_idat(png(Image.fromarray(DEEP)), chunk(b'tRNS', struct.pack('>H', DEEP[0, 0]))),
                                   np.where(DEEP == DEEP[0, 0], np.uint16(0), DEEP), 0),
    'png-16-bit-rgb': ('a.png', raw_png(H, W, 16, 2, [b''.join(bytes([v, 9]) * 3 for v in row) for row in PIXELS.tolist()]), PIXELS, 1),
    'png-16-bit-alpha': ('a.png', raw_png(H, W, 16, 4, [b''.join(bytes([v, 9, 255, 255]) for v in row) for row in PIXELS.tolist()]),
                         PIXELS, 1),
    'png-name-in-capitals': ('A.PNG', png(), PIXELS, 0),
    'png-interlaced': ('a.png', interlaced(), PIXELS, 0),
    'png-named-jpg': ('a.jpg', png(), PIXELS, 0),
    'png-named-nothing': ('drawing', png(), PIXELS, 0),
    'png-odd-name': ('a b\u00e9\u200b#%20.png', png(), PIXELS, 0),
    'png-turned': ('a.png', before_idat(png(), chunk(b'eXIf', exif(6))), np.rot90(PIXELS, -1), 0),
    'png-text-bomb': ('a.png', before_idat(png(), chunk(b'zTXt', b'k\0\0' + zlib.compress(b'x' * 70_000_000))), PIXELS, 0),
    'png-profile-rubbish': ('a.png', before_idat(png(), chunk(b'iCCP', b'p\0\0rubbish')), PIXELS, 0),
    'png-bytes-behind': ('a.png', png() + b'<script>' * 100, PIXELS, 0),
    'png-one-frame-apng': ('a.png', before_idat(png(), chunk(b'acTL', struct.pack('>II', 1, 0))), PIXELS, 0),
    'png-many-small-parts': ('a.png', many_small_parts(), PIXELS, 0),
    'png-constant': ('a.png', png(Image.fromarray(np.full((H, W), 77, np.uint8))), np.full((H, W), 77), 0),
    'jpeg-grey': ('a.jpg', jpg(), PIXELS, 12),
    'jpeg-rgb': ('a.jpg', jpg(colour, subsampling=0), luma, 16),
    'jpeg-cmyk': ('a.jpg', jpg(Image.fromarray(PIXELS).convert('RGB').convert('CMYK')), PIXELS, 16),
    'jpeg-progressive': ('a.jpg', jpg(progressive=True), PIXELS, 12),
    'jpeg-progressive-rgb': ('a.jpg', jpg(Image.fromarray(PIXELS).convert('RGB'), progressive=True), PIXELS, 14),
    'jpeg-restart-markers': ('a.jpg', jpg(restart_marker_rows=1), PIXELS, 12),
    'jpeg-named-png': ('a.png', jpg(), PIXELS, 12),
    'jpeg-mid-grey': ('a.jpg', jpg(Image.fromarray(np.full((H, W), 128, np.uint8))), np.full((H, W), 128), 0),
    'jpeg-mid-grey-corner': ('a.jpg', jpg(Image.fromarray(np.where(np.arange(H)[:, None] < 64, PIXELS, 128).astype(np.uint8))),
                             np.where(np.arange(H)[:, None] < 64, PIXELS, 128), 14),
    'jpeg-mid-grey-restart': ('a.jpg', jpg(Image.fromarray(np.full((H, W), 128, np.uint8)), restart_marker_blocks=1),
                              np.full((H, W), 128), 0),
    'jpeg-broken-exif': ('a.jpg', app1(jpg(), b'II*\0\x08\0\0\0\xff\xff' + b'\xee' * 40), PIXELS, 12),
    'jpeg-exif-far-away': ('a.jpg', app1(jpg(), b'MM\0*\x7f\xff\xff\xff'), PIXELS, 12),
    'jpeg-orientation-9': ('a.jpg', app1(jpg(), exif(9)), PIXELS, 12),
    'jpeg-thumbnail-with-markers': ('a.jpg', app1(jpg(), b'II*\0' + jpg(Image.fromarray(PIXELS[:40, :40]))), PIXELS, 12),
    'jpeg-second-picture-behind': ('a.jpg', jpg() + jpg(Image.fromarray(255 - PIXELS)), PIXELS, 12),
    'jpeg-bytes-behind': ('a.jpg', jpg() + b'\0' * 5000, PIXELS, 12),
    'jpeg-profile-rubbish': ('a.jpg', jpg()[:2] + b'\xff\xe2\0\x10ICC_PROFILE\0\1\1' + jpg()[2:], PIXELS, 12),
    'bmp': ('a.bmp', save(Image.fromarray(PIXELS), 'BMP'), PIXELS, 0),
    'gif': ('a.gif', save(Image.fromarray(PIXELS), 'GIF'), PIXELS, 0),
    'tiff': ('a.tif', save(Image.fromarray(PIXELS), 'TIFF'), PIXELS, 0),
    'tiff-16-bit': ('a.tif', save(Image.fromarray(DEEP), 'TIFF'), DEEP, 0),
    'tiff-16-bit-white-is-zero': ('a.tif', tiff16_white_is_zero(), DEEP, 0),
    'tiff-turned': ('a.tif', save(Image.fromarray(PIXELS), 'TIFF', tiffinfo={0x0112: 3}), PIXELS[::-1, ::-1], 0),
    'webp-named-png': ('a.png', save(Image.fromarray(PIXELS).convert('RGB'), 'WEBP', lossless=True), PIXELS, 0),
    'dicom': ('a.dcm', dicom(), SPREAD, 1),
    'dicom-without-suffix': ('IM0001', dicom(), SPREAD, 1),
    'dicom-8-bit': ('a.dcm', dicom(PIXELS), PIXELS, 0),
    'dicom-monochrome1': ('a.dcm', dicom((4095 - DEEP).astype(np.uint16), PhotometricInterpretation='MONOCHROME1'), SPREAD, 1),
    'dicom-rescaled': ('a.dcm', dicom(RescaleSlope=2, RescaleIntercept=-1024), SPREAD, 1),
    'dicom-negative-slope': ('a.dcm', dicom((4095 - DEEP).astype(np.uint16), RescaleSlope=-1, RescaleIntercept=4095), SPREAD, 1),
    'dicom-signed': ('a.dcm', dicom((DEEP.astype(np.int16) - 2048), PixelRepresentation=1), SPREAD, 1),
    'dicom-windowed': ('a.dcm', dicom(WindowCenter=2048, WindowWidth=2000), WINDOWED, 3),
    'dicom-two-windows': ('a.dcm', dicom(WindowCenter=[2048, 100], WindowWidth=[2000, 10]), WINDOWED, 3),
    'dicom-voi-table': ('a.dcm', dicom(**voi_lut()), (np.minimum(255, DEEP // 8) / 255 * 65535 + .5).astype(np.uint16), 1),
    'dicom-modality-table': ('a.dcm', dicom((4095 - DEEP).astype(np.uint16), **modality_lut()), SPREAD, 1),
    'dicom-voi-table-packed': ('a.dcm', dicom(**voi_lut(packed=True)),
                               (np.minimum(255, DEEP // 8) / 255 * 65535 + .5).astype(np.uint16), 1),
    'dicom-table-then-window': ('a.dcm', dicom((4095 - DEEP).astype(np.uint16), **modality_lut(), WindowCenter=2048, WindowWidth=2000),
                                WINDOWED, 3),
    'dicom-sigmoid': ('a.dcm', dicom(WindowCenter=2048, WindowWidth=2000, VOILUTFunction='SIGMOID'),
                      (65535 / (1 + np.exp(-4 * (DEEP - 2048.) / 2000)) + .5).astype(np.uint16), 1),
    'dicom-linear-exact': ('a.dcm', dicom(WindowCenter=2048, WindowWidth=2000, VOILUTFunction='LINEAR_EXACT'),
                           (np.clip((DEEP - 2048.) / 2000 + .5, 0, 1) * 65535 + .5).astype(np.uint16), 1),
    'dicom-overlay-bits': ('a.dcm', dicom((DEEP | 0x8000).astype(np.uint16)), SPREAD, 1),
    'dicom-signed-window': ('a.dcm', dicom((DEEP.astype(np.int16) - 2048), PixelRepresentation=1, WindowCenter=0, WindowWidth=2000),
                            WINDOWED, 3),
    'dicom-blank-window': ('a.dcm', dicom(WindowCenter=None, WindowWidth=None), SPREAD, 1),
    'dicom-rgb': ('a.dcm', dicom(np.asarray(colour), Rows=H, Columns=W, SamplesPerPixel=3, PlanarConfiguration=0,
                                 PhotometricInterpretation='RGB'), luma, 0),
    'dicom-jpeg-inside': ('a.dcm', dicom(PIXELS, '1.2.840.10008.1.2.4.50', PixelData=[jpg()]), PIXELS, 12),
    'dicom-window-of-wrong-type': ('a.dcm', dicom(WindowCenter='2048.00000000000000000', WindowWidth='2000'), WINDOWED, 3),
    'dicom-bytes-behind': ('a.dcm', dicom(PixelData=DEEP.tobytes() + b'\0' * 64), SPREAD, 1),
}
for _o, _a in {1: PIXELS, 2: PIXELS[:, ::-1], 3: PIXELS[::-1, ::-1], 4: PIXELS[::-1], 5: PIXELS.T, 6: np.rot90(PIXELS, -1),
               7: PIXELS[::-1, ::-1].T, 8: np.rot90(PIXELS)}.items():
    READ[f'jpeg-orientation-{_o}'] = ('a.jpg', app1(jpg(), exif(_o, '<>'[_o % 2])), _a, 12)

REFUSED = {   # name: (file name, bytes, a word of the reason)
    'empty': ('a.jpg', b'', 'empty'),
    'one-byte': ('a.jpg', b'\xff', ''),
    'text': ('a.jpg', b'not found, sorry\n' * 30, 'text'),
    'html-named-jpg': ('a.jpg', b'<!DOCTYPE html><html><body>404</body></html>', 'web page'),
    'xml-named-png': ('a.png', b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', 'web page'),
    'pdf': ('a.png', b'%PDF-1.7\n' + bytes(500), 'PDF'),
    'nifti-gz': ('a.nii.gz', __import__('gzip').compress(bytes(2000)), 'gzip'),
    'nifti': ('a.nii', bytes(344) + b'n+1\0' + bytes(2000), 'NIfTI'),
    'zip': ('a.png', b'PK\x03\x04' + bytes(200), 'zip'),
    'git-lfs-pointer': ('a.png', b'version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n', 'git-lfs'),
    'numpy-array': ('a.npy', b'\x93NUMPY\1\0' + bytes(200), 'numpy'),
    'heic': ('a.jpg', b'\0\0\0\x18ftypheic' + bytes(200), 'HEIC'),
    'jpeg-2000': ('a.jpg', save(Image.fromarray(PIXELS), 'JPEG2000'), 'JPEG 2000'),
    'noise': ('a.jpg', np.random.default_rng(0).bytes(3000), 'no picture format'),
    'zeros': ('a.dcm', bytes(3000), 'no picture format'),
    'svg': ('a.png', b'<svg xmlns="http://www.w3.org/2000/svg"></svg>', 'web page'),
    'png-signature-only': ('a.png', b'\x89PNG\r\n\x1a\n', 'truncated PNG'),
    'png-cut-in-header': ('a.png', png()[:20], 'truncated PNG'),
    'png-cut-in-data': ('a.png', halves(png(), .5), 'truncated PNG'),
    'png-without-end': ('a.png', png()[:-12], 'truncated PNG'),
    'png-bit-flipped': ('a.png', (lambda d: d[:len(d) // 2] + bytes([d[len(d) // 2] ^ 1]) + d[len(d) // 2 + 1:])(png()), 'damaged PNG'),
    'png-wrong-checksum-in-header': ('a.png', png()[:30] + bytes([png()[30] ^ 1]) + png()[31:], 'damaged PNG'),
    'png-too-few-lines': ('a.png', raw_png(H, W, 8, 0, [bytes(W)] * H, cut=(W + 1) * (H - 3)), ''),
    'png-interlaced-too-few-lines': ('a.png', interlaced(-900), 'truncated'),
    'png-no-data': ('a.png', by_hand(H, W, 8, 0), ''),
    'png-not-zlib': ('a.png', by_hand(H, W, 8, 0, chunk(b'IDAT', b'rubbish' * 99)), ''),
    'png-unknown-filter': ('a.png', by_hand(H, W, 8, 0, chunk(b'IDAT', zlib.compress((b'\x09' + bytes(W)) * H))), ''),
    'png-bomb': ('a.png', raw_png(50000, 50000, 8, 0, [bytes(50000)] * 10), 'says 50000 x 50000'),
    'png-wide-bomb': ('a.png', raw_png(2, 2 ** 31 - 1, 1, 0, [b'\0']), 'header says'),
    'png-zero-size': ('a.png', raw_png(0, 0, 8, 0, []), '0 x 0'),
    'png-depth-3': ('a.png', raw_png(H, W, 3, 0, [bytes(W)] * H), ''),
    'png-animated': ('a.png', save(Image.fromarray(PIXELS), 'PNG', save_all=True, append_images=[Image.fromarray(255 - PIXELS)]),
                     'animated'),
    'png-unknown-part': ('a.png', before_idat(png(), chunk(b'CgBI', b'\0\0\0\0')), 'CgBI'),
    'png-length-lies': ('a.png', png()[:33] + b'\x7f\xff\xff\xff' + png()[37:], 'truncated PNG'),
    'png-palette-missing': ('a.png', raw_png(H, W, 8, 3, [bytes([9] * W)] * H), ''),
    'png-thumbnail': ('a.png', png(Image.fromarray(PIXELS[:20, :20])), '20 x 20'),
    'png-strip': ('a.png', png(Image.fromarray(np.zeros((40, 900), np.uint8))), '900 x 40'),
    'jpeg-signature-only': ('a.jpg', b'\xff\xd8\xff\xe0', 'cut short'),
    'jpeg-cut-in-header': ('a.jpg', jpg()[:200], 'cut short'),
    'jpeg-cut-in-data': ('a.jpg', halves(jpg(), .7), 'truncated JPEG'),
    'jpeg-without-end-marker': ('a.jpg', jpg()[:-2], 'truncated JPEG'),
    'jpeg-cut-then-end-marker': ('a.jpg', halves(jpg(), .7) + EOI, 'truncated JPEG'),
    'jpeg-cut-late-then-end-marker': ('a.jpg', halves(jpg(), .93) + EOI, 'truncated JPEG'),
    'jpeg-rgb-cut-then-end-marker': ('a.jpg', halves(jpg(colour), .7) + EOI, 'truncated JPEG'),
    'jpeg-cmyk-cut-then-end-marker': ('a.jpg', halves(jpg(colour.convert('CMYK')), .7) + EOI, 'truncated JPEG'),
    'jpeg-restart-cut-then-end-marker': ('a.jpg', halves(jpg(restart_marker_rows=1), .7) + EOI, 'truncated JPEG'),
    'jpeg-progressive-cut-then-end-marker': ('a.jpg', halves(jpg(progressive=True), .6) + EOI, 'truncated JPEG'),
    'jpeg-progressive-last-scan-missing': ('a.jpg', jpg(progressive=True)[:jpg(progressive=True).rindex(b'\xff\xda')] + EOI,
                                           'scans are missing'),
    'jpeg-many-scans': ('a.jpg', many_scans(), 'exhaust'),
    'jpeg-bomb': ('a.jpg', huge_jpeg(), 'says 60000 x 60000'),
    'jpeg-12-bit': ('a.jpg', (lambda d: d.replace(b'\xff\xc0\0\x0b\x08', b'\xff\xc1\0\x0b\x0c'))(jpg()), ''),
    'jpeg-lossless': ('a.jpg', jpg().replace(b'\xff\xc0', b'\xff\xc3'), 'lossless'),
    'jpeg-end-before-picture': ('a.jpg', b'\xff\xd8\xff\xd9' + bytes(90), 'before its picture'),
    'jpeg-without-frame': ('a.jpg', (lambda d, i: d[:i] + d[i + 13:])(jpg(), jpg().index(b'\xff\xc0')), 'frame'),
    'jpeg-without-tables': ('a.jpg', jpg().replace(b'\xff\xdb', b'\xff\xe5'), ''),
    'gif-animated': ('a.gif', save(Image.fromarray(PIXELS), 'GIF', save_all=True, append_images=[Image.fromarray(255 - PIXELS)]),
                     'several pictures'),
    'gif-cut': ('a.gif', halves(save(Image.fromarray(PIXELS), 'GIF'), .5), ''),
    'gif-bomb': ('a.gif', huge_gif(), ''),
    'bmp-cut': ('a.bmp', halves(save(Image.fromarray(PIXELS), 'BMP'), .6), ''),
    'bmp-bomb': ('a.bmp', (lambda d: d[:18] + struct.pack('<ii', 60000, 60000) + d[26:])(save(Image.fromarray(PIXELS), 'BMP')),
                 'header says'),
    'tiff-pages': ('a.tif', save(Image.fromarray(PIXELS), 'TIFF', save_all=True, append_images=[Image.fromarray(PIXELS)]),
                   'several pictures'),
    'tiff-cut': ('a.tif', halves(save(Image.fromarray(PIXELS), 'TIFF'), .5), ''),
    'tiff-float': ('a.tif', save(Image.fromarray(PIXELS.astype(np.float32)), 'TIFF'), 'mode is F'),
    'tiff-negative': ('a.tif', save(Image.fromarray(PIXELS.astype(np.int32) - 300), 'TIFF'), '-'),
    'tiff-loop': ('a.tif', b'II*\0\x08\0\0\0\0\0\x08\0\0\0' + bytes(60), ''),
    'webp-cut': ('a.webp', halves(save(Image.fromarray(PIXELS).convert('RGB'), 'WEBP'), .5), ''),
    'webp-bomb': ('a.webp', b'RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0' + b'\xff\xff\xff' * 2, 'header says'),
    'webp-stub': ('a.webp', b'RIFF\x04\0\0\0WEBP', 'truncated WebP'),
    'dicom-frames': ('a.dcm', dicom(NumberOfFrames=30), '30 frames'),
    'dicom-bomb': ('a.dcm', dicom(Rows=60000, Columns=60000), 'header says'),
    'dicom-cut': ('a.dcm', halves(dicom(), .5), ''),
    'dicom-stub': ('a.dcm', bytes(128) + b'DICM', ''),
    'dicom-without-pixels': ('a.dcm', dicom(drop=['PixelData']), 'without pixels'),
    'dicom-report': ('a.dcm', dicom(drop=['PixelData', 'Rows', 'Columns']), 'without a picture'),
    'dicom-palette': ('a.dcm', dicom(PIXELS, PhotometricInterpretation='PALETTE COLOR'), 'PALETTE COLOR'),
    'dicom-window-of-no-width': ('a.dcm', dicom(WindowCenter=5, WindowWidth=0), 'width 0'),
    'dicom-flat-rescale': ('a.dcm', dicom(RescaleSlope=0, RescaleIntercept=9), 'RescaleSlope'),
    'dicom-short-table': ('a.dcm', dicom(**{k: (setattr(v[0], 'LUTData', [1, 2, 3]), v)[1] for k, v in voi_lut().items()}), 'lookup table'),
    'dicom-lossless-jpeg': ('a.dcm', dicom(syntax='1.2.840.10008.1.2.4.70', PixelData=[b'\xff\xd8' + bytes(50) + EOI]),
                            'JPEG Lossless'),
    'dicom-jpeg-ls': ('a.dcm', dicom(syntax='1.2.840.10008.1.2.4.80', PixelData=[b'\xff\xd8' + bytes(50) + EOI]), 'JPEG-LS'),
    'dicom-unknown-syntax': ('a.dcm', dicom().replace(b'1.2.840.10008.1.2.1\0', b'1.2.840.10008.9.9.9\0'), ''),
    'dicom-deflated': ('a.dcm', dicom(syntax='1.2.840.10008.1.2.1.99'), 'deflated'),
    'dicom-without-preamble': ('a.dcm', dicom()[132:], 'preamble'),
    'dicom-thumbnail': ('a.dcm', dicom(DEEP[:16, :16].copy()), '16 x 16'),
    'dicom-pixels-missing-half': ('a.dcm', dicom(PixelData=DEEP.tobytes()[:DEEP.nbytes // 2]), ''),
}


BLANK = ('png-constant', 'jpeg-mid-grey', 'jpeg-mid-grey-restart')       # whole files, with nothing to see in them


def test_there_are_enough_odd_files(): assert len(READ) >= 50 and len(REFUSED) >= 50 and len(READ) + len(REFUSED) >= 120


@pytest.fixture(autouse=True)
def silent():
    "No warning escapes, and PIL's switches are left as they were"
    before = PIL.Image.MAX_IMAGE_PIXELS, PIL.ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        yield
    assert [str(w.message) for w in seen if not issubclass(w.category, ResourceWarning)] == []
    assert before == (PIL.Image.MAX_IMAGE_PIXELS, PIL.ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))


@pytest.mark.parametrize('name', READ)
def test_odd_but_whole_files_are_read_right(name, tmp_path):
    file, data, want, gap = READ[name]
    path = tmp_path / file
    path.write_bytes(data)
    got, white = _decode(str(path))[:2]
    assert got.shape == want.shape
    assert got.dtype == (np.uint16 if white > 255 else np.uint8) and got.max() <= white
    if want.max() > 255: white_wanted = 4095 if want is DEEP or name == 'png-16-bit-one-clear-level' else 65535
    else: white_wanted = 255
    bound = gap / white_wanted + 1e-9 + (white != white_wanted) * .5 / min(white, white_wanted)
    assert np.abs(got / white - want / white_wanted).max() <= bound
    levels = read_grey(path)
    assert levels.dtype == np.uint8 and np.array_equal(levels, to_levels(Grey(got, white)))
    assert np.abs(levels.astype(int) - want / white_wanted * 255).max() <= max(1, gap * 255 / white_wanted)
    if name in BLANK:
        with pytest.raises(BlankImage, match='one even shade'): load_image(str(path), ImageRule(48))
    else: assert load_image(str(path), ImageRule(48)).shape == (48, 48)
    facts = file_facts(path)
    assert facts.bytes == len(data) and {facts.width, facts.height} == {H, W}
    assert path.read_bytes() == data                        # the source is never touched


@pytest.mark.parametrize('name', REFUSED)
def test_damaged_and_hostile_files_are_refused_by_name(name, tmp_path):
    file, data, word = REFUSED[name]
    path = tmp_path / file
    path.write_bytes(data)
    for read in (read_grey, lambda p: load_image(p, ImageRule(48)), lambda p: load_image(p, ImageRule(48, 'crop', 'minmax'))):
        with pytest.raises(ImageError) as e: read(path)
        assert str(path) in str(e.value) and word in str(e.value)
        assert '\n' not in str(e.value).replace(str(path), '') and str(e.value).endswith('.')


def test_files_that_are_not_files(tmp_path):
    os.mkfifo(tmp_path / 'pipe.png')
    (tmp_path / 'loop.png').symlink_to(tmp_path / 'loop.png')
    (tmp_path / 'dead.png').symlink_to(tmp_path / 'nowhere.png')
    (tmp_path / 'folder.png').mkdir()
    for name, word in (('pipe.png', 'ordinary'), ('loop.png', ''), ('dead.png', 'no such file'), ('folder.png', 'folder'),
                       ('lost.png', 'no such file'), ('x' * 300 + '.png', ''), ('deep/er/a.png', 'no such file')):
        for read in (read_grey, file_facts):
            with pytest.raises(ImageError) as e: read(tmp_path / name)
            assert name in str(e.value) and word in str(e.value)
    for path in (None, 3, float('nan'), '', b''):
        with pytest.raises(ImageError, match='not a path|cannot use'): read_grey(path)


def test_pil_set_to_pad_is_refused_not_obeyed(tmp_path, monkeypatch):
    (tmp_path / 'a.jpg').write_bytes(halves(jpg(), .7))
    monkeypatch.setattr(PIL.ImageFile, 'LOAD_TRUNCATED_IMAGES', True)
    with pytest.raises(ImageError, match='LOAD_TRUNCATED_IMAGES'): read_grey(tmp_path / 'a.jpg')
    monkeypatch.undo()


@pytest.mark.parametrize('kind', ['png', 'jpg', 'progressive', 'dcm', 'gif', 'bmp', 'tif', 'lzw', 'webp'])
def test_every_cut_is_refused_or_leaves_the_pixels_whole(kind, tmp_path):
    "A file cut at any place, with or without an end marker behind it, is never read as other pixels"
    im = Image.fromarray(PIXELS)
    data = {'png': png(), 'jpg': jpg(), 'progressive': jpg(progressive=True), 'dcm': dicom(), 'gif': save(im, 'GIF'),
            'bmp': save(im, 'BMP'), 'tif': save(im, 'TIFF'),
            'lzw': save(im, 'TIFF', compression='tiff_lzw'), 'webp': save(im.convert('RGB'), 'WEBP')}[kind]
    path = tmp_path / f'a.{kind}'
    path.write_bytes(data)
    whole = read_grey(path)
    for n in np.linspace(1, len(data) - 3, 60).astype(int):
        for tail in (b'', EOI):
            path.write_bytes(data[:n] + tail)
            try: got = read_grey(path)
            except ImageError as e:
                assert str(path) in str(e)
                continue
            differ = (got != whole).sum()
            assert differ <= (64 if kind == 'jpg' else 0), n                     # of a JPEG, at most the one last block of 8 x 8 pixels


@settings(max_examples=examples(250), deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(['png', 'png16', 'jpg', 'progressive', 'gif', 'tif', 'bmp', 'webp', 'dcm']), data=st.data())
def test_no_other_error_escapes_from_random_damage(kind, data, tmp_path):
    "Bytes changed, cut out and put in at random: a picture or an ImageError with the name, never anything else"
    whole = {'png': png(), 'png16': png(Image.fromarray(DEEP)), 'jpg': jpg(colour), 'progressive': jpg(progressive=True),
             'gif': save(Image.fromarray(PIXELS), 'GIF'), 'tif': save(colour, 'TIFF'),
             'bmp': save(colour, 'BMP'), 'webp': save(colour, 'WEBP'), 'dcm': dicom(WindowCenter=2000, WindowWidth=3000)}[kind]
    b = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.one_of(st.integers(0, min(400, len(b) - 1)), st.integers(0, len(b) - 1)))       # headers are where it hurts
        what = data.draw(st.sampled_from(['set', 'cut', 'put']))
        if what == 'set': b[at] = data.draw(st.integers(0, 255))
        elif what == 'cut' and len(b) > 50: del b[at:at + data.draw(st.integers(1, 40))]
        else: b[at:at] = data.draw(st.binary(min_size=1, max_size=20))
    path = tmp_path / f'a.{kind}'
    path.write_bytes(b)
    try: a = read_grey(path)
    except ImageError as e: assert str(path) in str(e)
    else: assert a.ndim == 2 and a.dtype == np.uint8 and min(a.shape) >= 32
    if kind.startswith('png') and bytes(b) != whole:
        # a PNG has checksums: the right pixels or none
        try:
            with image_errors(path): assert (_decode(str(path)).pixels == (DEEP if kind == 'png16' else PIXELS)).all()
        except ImageError as e: assert not isinstance(e.__cause__, AssertionError)


BOMB = """
import resource, sys, threading
from covid_cxr.core import ImageError, choices
from covid_cxr.images import ImageRule, load_image, read_grey
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for f in sys.argv[1:]:
    try: load_image(f, ImageRule(48)); print('read', f)
    except ImageError as e: pass
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) // 1024)
"""


def test_memory_stays_bounded_for_bombs(tmp_path):
    "All bombs together cost less than 150 MB over what importing costs"
    bombs = {**{n: REFUSED[n][:2] for n in REFUSED if 'bomb' in n or n == 'jpeg-many-scans'},
             **{n: READ[n][:2] for n in READ if 'bomb' in n}}
    files = []
    for name, (file, data) in bombs.items():
        (tmp_path / name).mkdir()
        files.append(tmp_path / name / file)
        files[-1].write_bytes(data)
    assert len(files) >= 8
    p = subprocess.run([sys.executable, '-c', BOMB, *map(str, files)], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert p.returncode == 0, p.stderr[-2000:]
    lines = p.stdout.split()
    assert int(lines[-1]) < 150, p.stdout
    assert [l for l in lines[:-1] if 'bomb' in l and 'text-bomb' not in l] == []


def test_a_picture_just_below_the_limit_is_refused_by_its_header_not_by_pil(tmp_path):
    "Between PIL's own warning (89 megapixels) and our limit nothing warns; above it the header is enough"
    side = 9600
    assert PIL.Image.MAX_IMAGE_PIXELS < side * side < MAX_PIXELS
    Image.new('1', (side, side)).save(tmp_path / 'big.png')
    assert read_grey(tmp_path / 'big.png').shape == (side, side)
    (tmp_path / 'bigger.png').write_bytes(raw_png(10001, 10000, 8, 0, [b'']))
    with pytest.raises(ImageError, match='says 10000 x 10001'): read_grey(tmp_path / 'bigger.png')


def test_threads_read_what_one_thread_reads(tmp_path):
    names = [n for n in READ if 'bomb' not in n]
    for n in names: (tmp_path / n).write_bytes(READ[n][1])
    one = [read_grey(tmp_path / n) for n in names]
    with ThreadPoolExecutor(8) as pool: many = list(pool.map(lambda n: read_grey(tmp_path / n), names * 4))
    for a, b in zip(one * 4, many): assert a.dtype == b.dtype and np.array_equal(a, b)
    assert threading.active_count() < 20


@settings(max_examples=examples(120), deadline=None, database=None)
@given(h=st.integers(32, 200), w=st.integers(32, 200), size=st.integers(16, 130), how=st.sampled_from(choices(How)),
       top=st.sampled_from([1, 255, 256, 1023, 4095, 65535]), seed=st.integers(0, 99))
def test_laws_of_fitting(h, w, size, how, top, seed):
    "Shape, type, no halo, symmetry under mirroring, and order of depth and resize, for any picture"
    a = np.random.default_rng(seed).integers(0, top + 1, (h, w)).astype(np.uint16 if top > 255 else np.uint8)
    out, small = fit_to(a, size, how), to_8bit(a)
    assert out.shape == (size, size) and out.dtype == np.uint8
    assert np.array_equal(out, fit_to(small, size, how))
    assert out.max() <= small.max() and (how == 'pad' or out.min() >= small.min())
    assert np.array_equal(out, fit_to(a.copy(order='F'), size, how)) and np.array_equal(out, fit_to(a, size, how))
    turned = fit_to(np.ascontiguousarray(a.T), size, how).T
    assert np.abs(turned.astype(int) - out).max() <= 1


def test_reduced_decode_stays_within_its_bound_on_drawings(tmp_path):
    "Every rule for which a JPEG is read at 1/2 or 1/4"
    used = set()
    for h, w, mode in ((700, 900, 'L'), (1537, 1290, 'RGB'), (2049, 1801, 'L')):
        im = Image.fromarray(drawing(h, w)).convert(mode)
        im.save(tmp_path / 'a.jpg', quality=88)
        full = read_grey(tmp_path / 'a.jpg')
        for size in (224, 300, 512):
            for how in choices(How):
                rule = ImageRule(size, how)
                used.add(_decode(tmp_path / 'a.jpg', rule).scale)
                gap = np.abs(load_image(tmp_path / 'a.jpg', rule).astype(int) - apply_rule(full, rule))
                assert gap.mean() <= REDUCED_MEAN and np.percentile(gap, 99) <= REDUCED_P99, (h, w, rule)
    assert used == {1, 2, 4}


def test_rule_key_is_the_same_in_another_process():
    p = subprocess.run([sys.executable, '-c', 'from covid_cxr.images import ImageRule; print(ImageRule(300, "squash").key)'],
                       capture_output=True, text=True, cwd=ROOT)
    assert p.stdout.strip() == ImageRule(300, 'squash').key


@needs_data
def test_untouched_originals_are_read_by_content():
    files = sorted(f for f in (DATA / 'originals').rglob('*') if f.is_file())
    misnamed = 0
    for f in files:
        a, facts = read_grey(f), file_facts(f)
        assert a.shape == (facts.height, facts.width) and a.dtype == np.uint8 and a.std() > 5
        misnamed += facts.format == 'PNG' and f.suffix in ('.jpg', '.jpeg')
        with Image.open(f) as im:                                   # PIL's own reading is the independent answer
            flat = Image.new('RGBA', im.size, (0, 0, 0, 255))
            flat.alpha_composite(im.convert('RGBA'))
        assert np.abs(a.astype(int) - np.asarray(flat.convert('L'))).max() <= 1, f.name
    assert len(files) >= 19 and misnamed >= 2


@needs_data
def test_originals_reduced_decode_stays_within_its_bound():
    files = [f for f in sorted((DATA / 'originals').rglob('*')) if f.is_file() and file_facts(f).format == 'JPEG']
    assert len(files) >= 10
    for f in files:
        full = read_grey(f)
        for rule in (ImageRule(224), ImageRule(300, 'squash'), ImageRule(512), ImageRule(512, 'crop')):
            gap = np.abs(load_image(f, rule).astype(int) - apply_rule(full, rule))
            assert gap.mean() <= REDUCED_MEAN and np.percentile(gap, 99) <= REDUCED_P99, (f.name, rule)


@needs_data
def test_every_image_of_the_covid_set_is_read():
    files = sorted(f for f in (DATA / 'covid-chestxray-dataset' / 'images').iterdir() if f.is_file())
    assert len(files) == 662
    rule = ImageRule(224)
    with ThreadPoolExecutor(2) as pool: images = list(pool.map(lambda f: load_image(f, rule), files))
    assert all(a.shape == (224, 224) and a.dtype == np.uint8 and a.std() > 3 for a in images)


@needs_data
def test_real_files_under_a_wrong_suffix_are_read_the_same(tmp_path):
    "The COVID set holds PNGs named .jpg; here seventeen real PNGs are named so"
    files = sorted((DATA / 'covid-chestxray-dataset' / 'images').glob('*.png'))[:17]
    assert len(files) == 17
    for f in files:
        other = tmp_path / f'{f.stem}.jpg'
        other.write_bytes(f.read_bytes())
        assert file_facts(other).format == 'PNG' and np.array_equal(read_grey(other), read_grey(f))
