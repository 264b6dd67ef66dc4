"""What was damaged or made to harm: pictures, bundles, run folders and requests end in an answer or in one sentence.

    python benchmarks/attack.py

10,000 changed pictures of every format, 1,000 changed bundles (bundle.json, safetensors), 1,000 changed ONNX files, 300 changed run
folders and 1,000 changed requests to the server, each kind in a process of its own, two of them at a time: twenty minutes on two cores. It
stops at the first traceback, at the first sentence that is none, at a crash, and at whatever takes more than 10 s of processor time or 2 GB
of memory. The result replaces benchmarks/results/attack.json. `make test` runs the same with a few of each (tests/test_attack.py).

A request must bring a full reply or the end of the connection within 10 s by the clock: a page, an answer, a refusal or that there is too
much to do, never a mistake of the server, and nothing of the machine. Every 50 requests, and behind the last, the server is well and a good
picture has the answer that it had. Then no request, thread, process or open file is left.

A further kind is a class with `change()`, which makes the next attack and names it, and `end()`, which says in one or two words what it
ended in; it needs one entry in ATTACKS, with how many of it are tried. It may have a `close()`, and `memory`, bytes of other processes.
"""
import argparse, collections, contextlib, copy, faulthandler, hashlib, io, json, logging, math, os, random, re, resource, shutil, socket
import struct, subprocess, sys, tempfile, threading, time, warnings, zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from record import RESULTS, ROOT, about, machine, write_result
import numpy as np
from PIL import Image

OUT = RESULTS / 'attack.json'
MOST_SECONDS, MOST_BYTES = 10, 2_000_000_000
MOST_WAITED = 300        # seconds by the clock for one change, on a machine that may be busy
SIDE = 96


def drawing(seed=0):
    "Two dark lungs, a bright corner, some noise"
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    a = 200 - 120 * sum(np.exp(-((x - c) / .13) ** 2 - ((y - .5) / .27) ** 2) for c in (.3, .7)) - 50 * x * y
    a[:12, :12] = 250
    return np.clip(a + np.random.default_rng(seed).normal(0, 2, a.shape), 0, 255).astype(np.uint8)


# ---- pictures --------------------------------------------------------------------------------------------------------------------------

def by_pil():
    "name -> bytes of the drawing in every format that PIL writes"
    grey = Image.fromarray(drawing())
    deep = Image.fromarray(drawing().astype(np.uint16) * 16 + 7)
    rgb = Image.merge('RGB', [grey, grey.point(lambda v: 255 - v), grey])
    modes = {'grey': grey, 'deep': deep, 'rgb': rgb, 'rgba': rgb.convert('RGBA'), 'la': grey.convert('LA'), 'palette': rgb.quantize(64),
             'bits': grey.convert('1'), 'cmyk': rgb.convert('CMYK')}
    ways = [('png', m, {}) for m in ('grey', 'deep', 'rgb', 'rgba', 'la', 'palette', 'bits')]
    ways += [('jpeg', m, dict(quality=90, **kw)) for m in ('grey', 'rgb', 'cmyk') for kw in ({}, dict(progressive=True))]
    ways += [('jpeg', 'grey', dict(restart_marker_rows=1)), ('jpeg', 'rgb', dict(keep_rgb=True))]
    ways += [('tiff', m, {}) for m in ('grey', 'deep', 'rgb', 'rgba', 'bits', 'cmyk', 'palette')]
    ways += [('tiff', m, dict(compression=c)) for m in ('grey', 'deep', 'rgb') for c in ('tiff_lzw', 'tiff_adobe_deflate', 'packbits')]
    ways += [('bmp', m, {}) for m in ('grey', 'rgb', 'bits')] + [('gif', 'grey', {}), ('gif', 'palette', {})]
    ways += [('webp', 'rgb', dict(lossless=True)), ('webp', 'rgb', {}), ('webp', 'rgba', {})]
    out = {}
    for kind, mode, options in ways:
        b = io.BytesIO()
        modes[mode].save(b, kind, **options)
        out[' '.join((kind, mode, *map(str, options.values())))] = b.getvalue()
    return out


def deep_png(colour):
    "A PNG of 16-bit channels, written by hand"
    channels = {2: 3, 4: 2, 6: 4}[colour]
    a = np.repeat(drawing().astype('>u2')[..., None] * 16, channels, 2)
    rows = b''.join(b'\0' + row.tobytes() for row in a)
    head = struct.pack('>IIBBBBB', SIDE, SIDE, 16, colour, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + b''.join(map(chunk, (b'IHDR', b'IDAT', b'IEND'), (head, zlib.compress(rows), b'')))


def chunk(name, body): return struct.pack('>I', len(body)) + name + body + struct.pack('>I', zlib.crc32(name + body))


def lookup_table(top):
    "A DICOM table of 4,096 entries"
    from pydicom.dataset import Dataset
    item = Dataset()
    item.add_new('LUTDescriptor', 'US', [4096, 0, 16])
    item.add_new('LUTData', 'OW', (np.arange(4096) * top // 4095).astype('<u2').tobytes())
    return [item]


def data_set(stored, syntax='1.2.840.10008.1.2.1', **tags):
    "A DICOM data set of the drawing"
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.sequence import Sequence
    meta, size, kind = FileMetaDataset(), stored.dtype.itemsize * 8, '1.2.840.10008.5.1.4.1.1.1'
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = syntax, kind, '1.2.3'
    ds = FileDataset(None, {}, file_meta=meta, preamble=b'\0' * 128)
    usual = dict(SOPClassUID=kind, SOPInstanceUID='1.2.3', Rows=SIDE, Columns=SIDE, SamplesPerPixel=1,
                 PhotometricInterpretation='MONOCHROME2', BitsAllocated=size, BitsStored=min(size, 12), HighBit=min(size, 12) - 1,
                 PixelRepresentation=0, PixelData=stored.tobytes())
    for name, value in {**usual, **tags}.items(): setattr(ds, name, Sequence(value) if name.endswith('Sequence') else value)
    if syntax.endswith('.50'): ds['PixelData'].VR, ds['PixelData'].is_undefined_length = 'OB', True
    return ds


def data_sets(jpeg):
    "name -> DICOM data set of the drawing; one holds a JPEG"
    from pydicom.encaps import encapsulate
    deep, grey = drawing().astype(np.uint16) * 16 + 7, drawing()
    window = dict(WindowCenter=2048, WindowWidth=2000, VOILUTFunction='SIGMOID', RescaleSlope=2, RescaleIntercept=-9)
    colour = dict(SamplesPerPixel=3, PlanarConfiguration=0, PhotometricInterpretation='RGB')
    return {'dicom': data_set(deep), 'dicom 8 bits': data_set(grey),
            'dicom inverted': data_set(4095 - deep, PhotometricInterpretation='MONOCHROME1', PresentationLUTShape='INVERSE'),
            'dicom signed': data_set(deep.astype(np.int16) - 2048, PixelRepresentation=1), 'dicom window': data_set(deep, **window),
            'dicom padded': data_set(deep, PixelPaddingValue=7, PixelPaddingRangeLimit=200),
            'dicom table': data_set(deep, VOILUTSequence=lookup_table(65535)),
            'dicom modality table': data_set(deep, ModalityLUTSequence=lookup_table(4095)),
            'dicom colour': data_set(np.dstack([grey] * 3), **colour),
            'dicom jpeg': data_set(grey, '1.2.840.10008.1.2.4.50', PixelData=encapsulate([jpeg]))}


def saved(ds):
    "The bytes of a DICOM file"
    b = io.BytesIO()
    ds.save_as(b, enforce_file_format=True)
    return b.getvalue()


def changed_bytes(data, rng):
    "One to six bytes set, cut out, put in or repeated; headers are where it hurts"
    b = bytearray(data)
    for _ in range(rng.randrange(1, 7)):
        at, n, kind = rng.randrange(rng.choice((min(400, len(b)), len(b)))), rng.randrange(1, 40), rng.randrange(6)
        if kind == 0: b[at] = rng.randrange(256)
        elif kind == 1: b[at] ^= 1 << rng.randrange(8)
        elif kind == 2 and len(b) > 100: del b[at:at + n]
        elif kind == 3: b[at:at] = rng.randbytes(n)
        elif kind == 4: b[at:at + n] = rng.choice((b'\0', b'\xff')) * min(n, len(b) - at)
        else: b[at:at] = b[rng.randrange(len(b)):][:n * 20]
    return bytes(b[:rng.randrange(1, len(b))] if rng.random() < .1 else b)


OPTIONAL = b'tRNS', b'PLTE', b'iCCP', b'zTXt', b'acTL', b'eXIf', b'gAMA', b'sBIT'


def repacked(body, rng):
    "Compressed bytes whose content is changed, or, where an earlier change has spoilt them, themselves changed"
    try: return zlib.compress(changed_bytes(zlib.decompress(body), rng))
    except zlib.error: return changed_bytes(body, rng)


def changed_png(data, rng):
    "Chunks changed, doubled or left out, with checksums that are right again"
    chunks, at = [], 8
    while at < len(data):
        n = int.from_bytes(data[at:at + 4], 'big')
        chunks.append((data[at + 4:at + 8], data[at + 8:at + 8 + n]))
        at += 12 + n
    for _ in range(rng.randrange(1, 3)):
        i = rng.randrange(len(chunks))
        name, body = chunks[i]
        kind = rng.randrange(6)
        if kind == 0: del chunks[i]
        elif kind == 1: chunks.insert(i, (name, body))
        elif kind == 2 and name == b'IDAT': chunks[i] = name, repacked(body, rng)
        elif kind == 3: chunks.insert(i, (rng.choice(OPTIONAL), rng.randbytes(rng.randrange(60))))
        elif body: chunks[i] = name, changed_bytes(body, rng)
        if not chunks: return data[:8]
    return data[:8] + b''.join(chunk(*c) for c in chunks)


ODD_TAGS = (0, 1, -1, 7, 255, 65535, 2 ** 31 - 1, 1e300, 1e-9, float('nan'), float('inf'), '', 'x', 'INVERSE', None, [], [1, 2], b'',
            b'\xff\xff')


def changed_dicom(ds, rng):
    "Elements of a data set changed or left out, then written; None where pydicom does not write it"
    ds = copy.deepcopy(ds)
    for _ in range(rng.randrange(1, 4)):
        name = rng.choice([e.keyword for e in ds if e.keyword])
        if rng.random() < .2: del ds[name]
        else:
            with contextlib.suppress(Exception): setattr(ds, name, rng.choice(ODD_TAGS))
    try: return saved(ds)
    except Exception: return None


class Pictures:
    "Pictures of every format, changed one by one and read in every way"
    def __init__(self, run, work, rng):
        self.rng, self.file = rng, work / 'picture'
        self.samples = {**by_pil(), **{f'png deep {c}': deep_png(c) for c in (2, 4, 6)}}
        self.sets = data_sets(self.samples['jpeg grey 90'])
        self.samples.update({name: saved(ds) for name, ds in self.sets.items()})
        for name in self.samples: self.change(name, self.samples[name])
        assert all(self.end() == 'read' for name in self.samples if not self.change(name, self.samples[name]))

    def change(self, name=None, data=None):
        "Write the next picture, or this one"
        self.name = name or self.rng.choice(list(self.samples))
        good, rng = self.samples[self.name], self.rng
        if data is None and self.name in self.sets and rng.random() < .5: data = changed_dicom(self.sets[self.name], rng)
        if data is None and self.name.startswith('png') and rng.random() < .7: data = changed_png(good, rng)
        self.file.write_bytes(changed_bytes(good, rng) if data is None else data)

    def end(self):
        "What this picture ends in"
        from covid_cxr.core import ImageError
        from covid_cxr.images import BlankImage, ImageRule, file_facts, load_image, read_grey, read_picture
        ends = []
        small, stretched = ImageRule(64), ImageRule(224, 'crop', 'minmax')
        for read in (read_grey, file_facts, lambda f: load_image(f, small), lambda f: read_picture(f, stretched)):
            try: read(self.file)
            except BlankImage as e: ends.append('blank')
            except ImageError as e:
                assert str(self.file) in str(e) and '\n' not in str(e) and str(e).endswith('.') and len(str(e)) < 1000, str(e)
                ends.append('refused')
            else: ends.append('read')
        assert len({e for e in (ends[0], *ends[2:]) if e != 'blank'}) < 2, ends          # every way of reading agrees
        return ends[2]


# ---- bundles ---------------------------------------------------------------------------------------------------------------------------

ODD = (float('nan'), float('inf'), -float('inf'), 0, -1, 1, 2, 1e308, -1e-308, 10**400, 300_000, 4096, .5, True, False, None,
       '', 'x', '=1+1', 'a\x1b[31m', 'x' * 10_000, '../..', [], {}, [[]], [None], {'a': 1}, ['a', 'b'], ['a', 'a'], [1, 2], [[1, 2], [3]])


def places(values, path=()):
    "Every place in a JSON value"
    yield path
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for k, v in items: yield from places(v, (*path, k))


def change_value(values, rng):
    "Change one place of a JSON value"
    *start, last = rng.choice([p for p in places(values) if p])
    place = values
    for k in start: place = place[k]
    how = rng.random()
    if how < .2 and isinstance(place, dict): del place[last]
    elif how < .3 and isinstance(place, dict): place[rng.choice(('x', 'classes', 'ood_check', ''))] = rng.choice(ODD)
    elif how < .4 and isinstance(place[last], list): place[last] = place[last] * rng.choice((0, 2, 1000))
    elif how < .45: place[last] = [f'class {i}' for i in range(300_000)]
    elif how < .6 and isinstance(place[last], (int, float)): place[last] = place[last] * rng.choice((-1, 1e6, 1e-6, 64))
    else: place[last] = rng.choice(ODD)


def changed_json(values, rng):
    "The JSON text of a value in which one to three things were changed"
    values = copy.deepcopy(values)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if any(places(values)): change_value(values, rng)
    text = json.dumps(values).encode()
    if rng.random() < .15:                      # bytes, not values
        i = rng.randrange(len(text))
        text = rng.choice((text[:i], text[:i] + b'\xff' + text[i + 1:], text[:i] + text[i + 7:], text[:i] + b'[' * 50_000 + text[i:], b''))
    return text


def changed_weights(data, rng):
    "A safetensors file in which the header or the values were changed"
    n = int.from_bytes(data[:8], 'little')
    header, body = json.loads(data[8:8 + n]), data[8 + n:]
    kind = rng.randrange(6)
    if kind == 0: return data[:rng.choice((0, 3, 8, 20, 8 + n, len(data) - 4))]
    if kind == 1: return rng.choice((2**63, 2**64 - 1, 0, 1, len(data), n + 1, n - 1, 10**8)).to_bytes(8, 'little') + data[8:]
    if kind == 2:
        i = rng.randrange(8 + n, len(data) - 4)
        return data[:i] + struct.pack('<f', rng.choice((float('nan'), float('inf'), 3e38, 0.))) + data[i + 4:]
    if kind == 3: return data + b'\0' * rng.choice((1, 8, 1000))
    text = changed_json(header, rng)
    return len(text).to_bytes(8, 'little') + text + body


def asked(folder, picture, name):
    "What a bundle ends in: an answer, no answer, or one sentence"
    from covid_cxr.core import BundleError
    from covid_cxr.predict import load_predictor
    try: p = load_predictor(folder).predict(picture, ood='off')
    except BundleError as e:
        assert 20 < len(str(e)) < 1000 and '\n' not in str(e) and '\x1b' not in str(e), str(e)
        return f'{name} refused'
    if p.label is None: return f'{name} declined'
    assert all(math.isfinite(v) for v in p.probabilities.values()) and p.label in p.probabilities
    return f'{name} answered'


class Bundles:
    "A bundle whose description or weights are changed, with a fitting SHA-256, opened and asked"
    def __init__(self, run, work, rng):
        from covid_cxr.bundle import DESCRIPTION, MANIFEST, WEIGHTS, find_bundle
        self.folder, self.rng = Path(shutil.copytree(find_bundle(run), work / 'bundle')), rng
        self.description, self.weights = self.folder / DESCRIPTION, self.folder / WEIGHTS
        (self.folder / MANIFEST).unlink(missing_ok=True)
        self.good, self.bytes = json.loads(self.description.read_text()), self.weights.read_bytes()
        if self.good.get('feature_check'):       # as one that was made for a place
            head = dict(logit=1., weights=[.1] * self.good['feature_check']['features'], bias=0., temperature=1.)
            self.good |= dict(threshold=.5, site=dict(name='a ward', head=head))
        self.picture = np.random.default_rng(0).integers(0, 255, (32, 32), dtype=np.uint8)

    def change(self):
        "Write the next bundle"
        weights = self.rng.random() < .5
        self.name = 'weights' if weights else 'description'
        new = changed_weights(self.bytes, self.rng) if weights else self.bytes
        self.weights.write_bytes(new)
        described = dict(self.good, weights=dict(self.good['weights'], sha256=hashlib.sha256(new).hexdigest()))
        self.description.write_bytes(json.dumps(described).encode() if weights else changed_json(described, self.rng))

    def end(self): return asked(self.folder, self.picture, self.name)


# ---- networks --------------------------------------------------------------------------------------------------------------------------

ODD_NUMBERS = (0, 1, -1, 2, 3, 7, 1000, 65_536, 2**31 - 1, 2**31, 2**40, 2**62, -2**63)
GROWING = ('Tile', 'Expand', 'ConstantOfShape', 'Range', 'Pad', 'Resize', 'MatMul', 'Concat', 'Gather', 'Reshape')


def changed_attribute(proto, rng):
    "A number of an attribute changed, put in or left out"
    nodes = [n for n in proto.graph.node if n.attribute]
    if not nodes: return
    a = rng.choice(rng.choice(nodes).attribute)
    if a.ints: rng.choice((lambda: a.ints.append(rng.choice(ODD_NUMBERS)), lambda: a.ints.__setitem__(0, rng.choice(ODD_NUMBERS)),
                           lambda: a.ints.pop()))()
    elif a.type == 1: a.f = rng.choice((float('nan'), float('inf'), -1., 0., 1e30))
    else: a.i = rng.choice(ODD_NUMBERS)


def changed_tensor(proto, rng):
    "Shape, data type, place or numbers of a tensor changed"
    t, how = rng.choice(proto.graph.initializer), rng.randrange(6)
    if how == 0 and t.dims: t.dims[0] = rng.choice(ODD_NUMBERS)
    elif how == 1: t.dims[:] = list(t.dims)[::-1]
    elif how == 2: t.dims.append(rng.choice((0, 1, 2**40)))
    elif how == 3: t.data_type = rng.randrange(30)
    elif how == 4:
        t.data_location = 1
        t.external_data.add(key='location', value=rng.choice(('/etc/passwd', '../../secret', '/dev/zero')))
    elif t.raw_data: t.raw_data = changed_bytes(t.raw_data, rng) if rng.random() < .5 else b'\xff' * len(t.raw_data)


def changed_node(proto, rng):
    "A node renamed, doubled, moved, left out, or fed with something else: also with what comes later, a circle"
    nodes, how = proto.graph.node, rng.randrange(7)
    i = rng.randrange(len(nodes))
    if how == 0: nodes[i].op_type = rng.choice(('Loop', 'If', 'Scan', 'NoSuch', 'Relu', 'Sqrt', 'Flatten', 'GlobalMaxPool', *GROWING))
    elif how == 1: nodes[i].domain = rng.choice(('com.microsoft', 'ai.onnx.ml', 'x'))
    elif how == 2: nodes.insert(i, nodes[i])
    elif how == 3: nodes.append(nodes.pop(i))
    elif how == 4: nodes.pop(i)
    elif nodes[i].input:
        names = [name for n in nodes for name in n.output] + ['image', '', 'nowhere']
        nodes[i].input[rng.randrange(len(nodes[i].input))] = rng.choice(names)


def grown(proto, rng):
    "One to four operations put in that make a tensor larger, up to what no memory holds; or so many of them that none ends"
    from onnx import helper, numpy_helper
    if not proto.graph.node[-1].input: return
    name = proto.graph.node[-1].input[0]
    if rng.random() < .3:        # all of it known before an image comes, behind a copy of one stored number
        proto.graph.initializer.append(numpy_helper.from_array(np.ones((1, 1, 1, 1), np.float32), 'stored'))
        proto.graph.node.insert(len(proto.graph.node) - 1, helper.make_node('Identity', ['stored'], ['copied']))
        name = 'copied'
    for k in range(rng.choice((1, 1, 2, 4, 200))):
        kind, shape = rng.choice(GROWING[:3]), rng.choice(([1, 50, 50, 50], [1, 1, 1000, 1000], [2**31, 2], [300, 300], [2, 2, 2, 2]))
        proto.graph.initializer.append(numpy_helper.from_array(np.array(shape), f'grown{k}'))
        inputs = [f'grown{k}'] if kind == 'ConstantOfShape' else [name, f'grown{k}']
        proto.graph.node.insert(len(proto.graph.node) - 1, helper.make_node(kind, inputs, [f'large{k}']))
        name = f'large{k}'
    proto.graph.node[-1].input[0] = name


def changed_graph(proto, rng):
    "Inputs, outputs, functions, graphs within graphs"
    g, how = proto.graph, rng.randrange(7)
    if how == 0: g.output[rng.randrange(len(g.output))].name = rng.choice(('logits', 'nowhere', 'image', ''))
    elif how == 1: g.output.pop()
    elif how == 2: g.input[0].type.tensor_type.shape.dim[rng.randrange(4)].dim_value = rng.choice(ODD_NUMBERS)
    elif how == 3: g.input.append(g.input[0])
    elif how == 4: proto.functions.add(name='f', domain='x')
    elif how == 5: rng.choice(g.node).attribute.add(name='body', type=5).g.name = 'inner'
    else: proto.opset_import[0].version = rng.choice((0, 1, 6, 12, 99, 2**40))


def changed_onnx(data, rng):
    "An ONNX file in which fields, shapes, attributes, names or bytes were changed"
    import onnx
    if rng.random() < .2: return changed_bytes(data, rng)
    proto = onnx.load_from_string(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        if proto.graph.node and proto.graph.initializer:
            rng.choice((changed_attribute, changed_tensor, changed_node, changed_node, grown, changed_graph))(proto, rng)
    return proto.SerializeToString()


class Networks:
    "A bundle whose ONNX file is changed, with a fitting SHA-256, opened and asked"
    def __init__(self, run, work, rng):
        from covid_cxr.bundle import DESCRIPTION, MANIFEST, ONNX
        self.folder, self.rng = work / 'network', rng
        export = 'import sys; from covid_cxr.bundle import export_bundle; export_bundle(*sys.argv[1:], format="onnx")'
        words = [sys.executable, '-W', 'ignore', '-c', export, run, self.folder]       # elsewhere: torch is no part of what is attacked
        subprocess.run([*map(str, words)], check=True, cwd=ROOT)
        self.description, self.file = self.folder / DESCRIPTION, self.folder / ONNX
        (self.folder / MANIFEST).unlink(missing_ok=True)
        self.good, self.bytes, self.name = json.loads(self.description.read_text()), self.file.read_bytes(), 'onnx'
        self.picture = np.random.default_rng(0).integers(0, 255, (32, 32), dtype=np.uint8)

    def change(self):
        "Write the next network"
        new = changed_onnx(self.bytes, self.rng)
        self.file.write_bytes(new)
        described = dict(self.good, onnx=dict(self.good['onnx'], sha256=hashlib.sha256(new).hexdigest()))
        self.description.write_bytes(json.dumps(described).encode())

    def end(self): return asked(self.folder, self.picture, 'network')


# ---- run folders -----------------------------------------------------------------------------------------------------------------------

REPORTED = 'audit.json', 'external.json', 'baselines.csv', 'history.csv'      # files that the report reads and no other command
ATTACKED = (*REPORTED, 'run.json', 'evaluation.json', 'predictions.csv', 'table.csv', 'recipe.toml', 'test_log.jsonl', 'manifest.json',
            'bundle/bundle.json', 'bundle/weights.safetensors', 'external/elsewhere.csv')


def complete_run(run):
    "Give a finished run of the demo what audit and external test leave: invented baselines, and the checks of the table alone"
    import pandas as pd
    from covid_cxr.audit.case import read_audit
    from covid_cxr.bundle import writing_files
    from covid_cxr.core import used
    from covid_cxr.report.context import write_example_audit
    from covid_cxr.runs.external import external_test
    from covid_cxr.runs.folder import RunFolder, write_table
    folder = RunFolder.open(run)
    own = used(folder.table)
    external_test(run, own[own['split'] == 'test'], name='elsewhere', n_boot=100, duplicates='exact', log=len)
    with writing_files(run, ['audit.json', 'baselines.csv']):
        write_example_audit(run, n_boot=100)
        ids = folder.evaluated['image_id'].to_numpy()
        rows = [pd.DataFrame(dict(image_id=ids, baseline=b.name, kind=b.kind, score=.5)) for b in read_audit(run).baselines]
        write_table(pd.concat(rows, ignore_index=True), Path(run) / 'baselines.csv')
    return run


def changed_text(raw, rng):
    "Bytes of a text file with something changed"
    i, kind = rng.randrange(len(raw)), rng.randrange(8)
    if kind == 0: return raw[:i]
    if kind == 1: return raw[:i] + bytes([rng.randrange(256)]) + raw[i + 1:]
    if kind == 2: return raw[:i] + rng.choice((b'NaN', b'"', b'\xff\xfe', b'{', b'[' * 3000, b',,', b'\n')) + raw[i:]
    lines = raw.splitlines(keepends=True)
    j = rng.randrange(len(lines))
    if kind == 3: return b''.join(lines[:j] + lines[j + 1:])
    if kind == 4: return b''.join(lines[:j] + [lines[j]] * 3 + lines[j + 1:])
    if kind == 5 and raw[:1] == b'{':
        with contextlib.suppress(ValueError): return changed_json(json.loads(raw), rng)
    old = rng.choice((b'1', b'0.', b'"', b'true', b'test', b'covid', b'[', b'a'))
    return raw.replace(old, rng.choice((b'-1', b'null', b'1e999', b'x', b'{}', b'')), rng.choice((1, -1)))


class Folders:
    "A whole run, one file of which is changed, before the commands that read it"
    def __init__(self, run, work, rng):
        kept = shutil.ignore_patterns('cache', 'checkpoints', 'plots', 'export.pkl')
        self.run, self.rng = Path(shutil.copytree(run, work / 'run', ignore=kept)), rng
        if not (self.run / 'audit.json').exists(): complete_run(self.run)
        self.good = {self.run / f: (self.run / f).read_bytes() for f in ATTACKED}

    def change(self):
        "Put everything back, change one file"
        for f, raw in self.good.items(): f.write_bytes(raw)
        file = self.rng.choice(list(self.good))
        self.name = file.relative_to(self.run).as_posix()
        changed = changed_weights if file.suffix == '.safetensors' else changed_text
        file.write_bytes(changed(self.good[file], self.rng))

    def commands(self):
        "The commands that read the changed file"
        evaluate, report = ('evaluate', self.run, '--n-boot', 100), ('report', self.run)
        if self.name.startswith('bundle'): return [('predict', self.run, self.run / 'new-image.png')]
        if self.name in REPORTED or self.name.startswith('external'): return [report]
        return [evaluate, report] if self.rng.random() < .2 else [evaluate]

    def end(self):
        "What the commands end in: one word for all"
        from covid_cxr.audit.case import read_audit
        from covid_cxr.core import CxrError
        from covid_cxr.runs.external import read_external_tests
        from covid_cxr.runs.folder import RunFolder
        codes = [self.said(*words) for words in self.commands()]
        for name in ('rows', 'evaluated', 'result', 'source_baseline', 'threshold', 'history', 'bundle', 'baseline_scores'):
            with contextlib.suppress(CxrError): getattr(RunFolder.open(self.run), name)
        for read in (read_audit, read_external_tests):
            with contextlib.suppress(CxrError): read(self.run)
        return 'refused' if any(codes) else 'answered'

    def said(self, *words):
        "The exit code of a command that ends in an answer or in one sentence"
        from covid_cxr.cli import main
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): code = main([*map(str, words)])
        sentences = [line for line in err.getvalue().splitlines() if line.startswith('covid-cxr: ')]
        assert code in (0, 1) and 'Traceback' not in err.getvalue() and len(sentences) == code, err.getvalue()[-1500:]
        return code


# ---- requests --------------------------------------------------------------------------------------------------------------------------

TOKEN = 'a-token-for-the-attack'
ASKED = [('GET', p) for p in ('/', '/login', '/style.css', '/script.js', '/api', '/api/model', '/openapi.json', '/health', '/metrics')]
SENT = [('POST', p) for p in ('/api/predict', '/api/predict?heat_map=on', '/answers', '/')]
ODD_METHODS = ('HEAD', 'PUT', 'DELETE', 'OPTIONS', 'TRACE', 'CONNECT', 'PATCH', 'get', '', 'G ET', 'G\0ET', 'X' * 20_000, 'PRI', 'GET\t')
ODD_PATHS = ('', '*', '//', '///etc/passwd', '/../../../etc/passwd', '/%2e%2e/%2e%2e/etc/passwd', '/..%2f..%2fetc%2fpasswd',
             '/style.css/..', '/style.css%00.html', '/%', '/%zz', '/%ff%fe', '/%0d%0aX-Odd: 1', '/\\..\\..\\x', '/health/', '/health#x',
             '/health;x=1', '/health?', '//health', '/%68ealth', '/api//predict', 'http://elsewhere.example/health', 'health',
             '/?' + 'a=1&' * 3000, '/' + 'x' * 60_000, '/' + '../' * 4000, '/api/predict?heat_map=%00', '/login?token=' + TOKEN, '/?\xff',
             '/' + '%41' * 4000, '/{{7*7}}', '/health?[')
ODD_VERSIONS = ('HTTP/1.0', 'HTTP/0.9', 'HTTP/2.0', 'HTTP/9.9', 'HTTP/1.1 x', 'http/1.1', 'HTTP/', '', 'RTSP/1.0', 'HTTP/1.1\0')
ODD_HOSTS = ('', 'elsewhere.example', '127.0.0.1.elsewhere.example', '[', ']', '[::1', '[::1]:x', '[::1]x', 'localhost:99999999',
             'localhost:-1', 'localhost/health', 'localhost:80/login?', 'localhost:80#', 'a@localhost', 'localhost@elsewhere.example',
             'x' * 9000, '\xff', '<script>', '127.0.0.1, localhost', 'LOCALHOST', '0', '0x7f.1', 'localhost.',
             '\u2100'.encode().decode('latin-1'), 'local host', '%')
ODD_HEADERS = (('Origin', 'http://elsewhere.example'), ('Origin', 'null'), ('Origin', ''), ('Origin', '://'), ('Origin', '\xff'),
               ('Sec-Fetch-Site', 'cross-site'), ('Cookie', 'covid-cxr-0=x'), ('Cookie', '=;=;' * 2000), ('Cookie', 'a="\\' * 1500),
               ('Cookie', '\xff'), ('Authorization', 'Bearer'), ('Authorization', 'Bearer wrong'), ('Authorization', 'Bearer \xff'),
               ('Authorization', 'Basic eDp5'), ('Authorization', 'x' * 9000), ('Expect', '100-continue'), ('Expect', 'x'),
               ('Upgrade', 'websocket'), ('Connection', 'Upgrade, HTTP2-Settings'), ('Connection', 'keep-alive'), ('X', 'x' * 100_000),
               ('Range', 'bytes=0-,0-,0-'), ('Accept-Encoding', 'gzip;q=nan'), ('Content-Encoding', 'gzip'), ('X-Forwarded-For', '\'"<'),
               ('X-Forwarded-Host', 'elsewhere.example'), ('Forwarded', 'for=;;'), ('X-HTTP-Method-Override', 'DELETE'), ('', ''),
               ('X y', 'z'), ('X\0', 'y'), ('X', 'y\0z'), ('X', 'y\rz'), ('X', 'y\n z'), (' X', 'y'), ('X\xff', 'y'), ('Trailer', 'Host'),
               ('TE', 'trailers'))
ODD_LENGTHS = ('-1', '0', '1', '+5', '5, 5', '5, 6', ' 7 ', '0x10', '1e3', 'x', '', '9' * 18, '9' * 400, '1_0', '\xb2', '\xb25', '3.0',
               '2147483648')
ODD_CODINGS = ('chunked', 'Chunked', 'chunked, chunked', 'gzip, chunked', 'identity', 'xchunked', ' chunked ', 'chunked;q=1', '',
               'chunked\0')
ODD_CHUNKS = (b'-1', b'0x5', b'5;x=' + b'y' * 300, b'', b'g', b'f' * 16, b'f' * 30, b'5\0', b'+5', b' 5', b'05', b'5 ', b'\xff', b'5\n',
              b'5;\0')
FORM = 'multipart/form-data; boundary=xXx'
CHARSETS = ('idna', 'punycode', 'utf-16', 'utf-7', 'rot13', 'base64', 'undefined', 'unicode_escape', 'raw_unicode_escape', 'zlib', 'x', '',
            '"\xff"')
ODD_TYPES = (*(f'{FORM}; charset={c}' for c in CHARSETS), '"', ';' * 3000, '\xff', '', 'image/png', 'text/plain', 'application/json',
             'multipart/', 'multipart/form-data', 'multipart/form-data; boundary', 'multipart/form-data; boundary=',
             'multipart/form-data; boundary=""', 'multipart/form-data; boundary="xXx', 'multipart/form-data; boundary=' + 'x' * 9000,
             'multipart/form-data; boundary=\xff\xfe', 'multipart/mixed; boundary=xXx', 'MULTIPART/FORM-DATA; BOUNDARY=xXx',
             f'{FORM}; boundary=yYy', 'multipart/form-data; boundary=x X', 'multipart/form-data; boundary*=utf-8\'\'x%00',
             'application/x-www-form-urlencoded', 'application/x-www-form-urlencoded; charset=idna')
ODD_NAMES = ('', 'a\0b.png', 'a\nb.png', 'a\r\nX-Odd: 1\r\n\r\nb', 'a"b', 'a\\"b', 'a\\', '\'', '../../a.png', 'C:\\a.png',
             '\u202egnp.exe', '\ud800', '<script>alert(1)</script>', '=1+1', '\x1b[31m', 'x' * 4000, 'x' * 100_000, '%0d%0a',
             '"; name="token', '\xff', '\u0130' * 200, ';;;', 'xn--a')
ODD_FORMS = (b'', b'=', b'&' * 5000, b'token', b'token=' + b'x' * 9000, b'token=%', b'token=%00%ff', b'token=\xff\0', b'a=1&' * 1500,
             b'token=x&token=', b'{}', b'[' * 9000, b'{"files": [1e999]}', b'null', b'\xef\xbb\xbf{}', f'token={TOKEN}'.encode(),
             b'%' * 9000, b';a=1;b=2', b'+' * 9000)
NOISE = (b'\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03', b'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n', b'\0' * 5000, b'\r\n' * 5000, b'\n', b' ',
         b'GET /\r\n\r\n', b'GET / HTTP/1.1\r\n' + b'a: b\r\n' * 5000, b'GET / HTTP/1.1\n\n', b'A' * 70_000, b'SSH-2.0-x\r\n',
         b'\x04\x01\0\x50\x7f\0\0\x01\0')


class Message:
    "A request in parts, each of which can be changed"
    def __init__(self, method, path, headers, body=b'', kind='image/png'):
        self.method, self.path, self.version, self.headers, self.body = method, path, 'HTTP/1.1', dict(headers), body
        self.framed, self.more = body, []        # the body as it is sent, headers that come twice
        if method == 'POST': self.headers.update({'Content-Type': kind, 'Content-Length': len(body)})

    def __bytes__(self):
        line = ' '.join((self.method, self.path, self.version))
        lines = [line, *(f'{k}: {v}' for k, v in [*self.headers.items(), *self.more])]
        return '\r\n'.join(lines).encode('latin-1', 'replace') + b'\r\n\r\n' + self.framed

    def bring(self, body):
        "Another body of the right length"
        self.body = self.framed = body
        self.headers['Content-Length'] = len(body)


def change_line(m, rng):
    "Method, path or version"
    name, odd = rng.choice((('method', ODD_METHODS), ('path', ODD_PATHS), ('path', ODD_PATHS), ('version', ODD_VERSIONS)))
    setattr(m, name, rng.choice(odd))


def change_headers(m, rng):
    "Headers left out, put in, doubled, far too many"
    how = rng.randrange(6)
    if how == 0: m.headers.pop(rng.choice(list(m.headers)))
    elif how == 1: m.headers['Host'] = rng.choice(ODD_HOSTS)
    elif how == 2: m.more += [(k, m.headers[k]) for k in [rng.choice(list(m.headers))]]
    elif how == 3: m.more += [(f'X-{i}', 'y' * 50) for i in range(rng.choice((10, 99, 2000)))]
    else: m.more += rng.sample(ODD_HEADERS, rng.choice((1, 1, 2, 5)))
    if how == 5: m.headers.pop('Authorization', None)


def change_length(m, rng):
    "A length that is wrong, negative, huge, doubled or no number"
    size = len(m.body)
    length = rng.choice((*ODD_LENGTHS, size - 1, size + 1, size * 2, size // 2, f'{size}, {size}', f'0{size}'))
    if rng.random() < .2: m.more.append(('Content-Length', length))
    else: m.headers['Content-Length'] = length


def chunked(body, rng):
    "A body in chunks, one in two of them with something wrong"
    pieces = [body[i:i + 5000] for i in range(0, len(body), 5000)] or [b'x']
    chunks = [b'%x\r\n' % len(p) + p + b'\r\n' for p in pieces]
    i, how = rng.randrange(len(chunks)), rng.randrange(8)
    if how == 0: chunks[i] = rng.choice(ODD_CHUNKS) + b'\r\n' + chunks[i]
    elif how == 1: chunks[i] = chunks[i][:-2]
    elif how == 2: chunks[i] = chunks[i].replace(b'\r\n', b'\n')
    elif how == 3: chunks[i] = b''.join(b'1\r\n%c\r\n' % c for c in pieces[i][:3000])
    ends = b'0\r\n\r\n', b'0\r\n\r\n', b'0\r\n\r\n', b'0\r\nX: y\r\n\r\n', b'0\r\n' + b'X: y\r\n' * 9000, b'', b'0\r\n'
    return b''.join(chunks) + rng.choice(ends)


def change_chunks(m, rng):
    "In chunks, whole or broken; with a length beside them, which may be wrong too"
    m.headers['Transfer-Encoding'] = rng.choice(ODD_CODINGS) if rng.random() < .3 else 'chunked'
    m.framed = chunked(m.body, rng)
    if rng.random() < .7: m.headers.pop('Content-Length', None)


def part(data, name='files', filename='a.png', *lines):
    "One part of a form"
    named = f'; filename="{filename}"' if filename is not None else ''
    head = '\r\n'.join((f'Content-Disposition: form-data; name="{name}"{named}', *lines))
    return b'--xXx\r\n' + head.encode('utf-8', 'replace') + b'\r\n\r\n' + data + b'\r\n'


def odd_part(data, rng):
    "A part with something odd about it"
    odd, how = rng.choice(ODD_NAMES), rng.randrange(9)
    if how == 0: return part(data, odd)
    if how == 1: return part(data[:rng.choice((0, 100, 20_000))], odd, None)
    if how == 2: return part(data, 'files', 'a.png', f"Content-Disposition: form-data; name=x; filename*=utf-8''{rng.choice(ODD_NAMES)}")
    if how == 3: return part(data, 'files', 'a.png', rng.choice(('X: ' + 'y' * 50_000, 'X', ': y', 'X\0: y', 'X: y', 'X: y\r\n' * 3000)))
    if how == 4: return part(part(data) + b'--xXx--\r\n', 'files', 'a.png', 'Content-Type: multipart/mixed; boundary=xXx')
    if how == 5:
        without = rng.choice((b'name=', b'form-data', b'Content-Disposition', b'\r\n', b'"', b'--'))
        return part(data).replace(without, rng.choice((b'', b'x')))
    if how == 6: return part(data, 'files', 'a.png', f'Content-Type: {rng.choice(ODD_TYPES)}', 'Content-Transfer-Encoding: base64')
    return part(data, 'files', odd)


def changed_form(data, rng):
    "A multipart form that is odd, very long, cut off or changed"
    parts, end, how = [part(data)], rng.choice((b'--xXx--\r\n', b'--xXx--', b'--xXx\r\n', b'')), rng.randrange(8)
    if how == 0: parts = [part(b'x', f'name{i}', rng.choice((None, 'a.png'))) for i in range(rng.choice((6, 12, 500)))]
    elif how == 1: parts = [part(data[:200]) for _ in range(rng.choice((2, 5, 6, 900)))]
    elif how == 2: return changed_bytes(b''.join(parts) + b'--xXx--\r\n', rng)
    elif how == 3: parts.insert(0, rng.choice((b'before\r\n', b'\r\n' * 3000, b'--xX', b'-' * 9000, b'--xXx\r\n' * 300, b'\0')))
    elif how == 4: parts.append(part(rng.choice((b'on', b'x' * 20_000, b'\xff\xfe', b'xn--\xff')), 'heat_map', None))
    else: parts.insert(rng.randrange(2), odd_part(data, rng))
    return b''.join(parts) + (b'--xXx--\r\n' if how > 4 else end)


def change_form(m, rng):
    "A form of pictures, and what is said of its kind"
    if m.method != 'POST': m.method, m.path = 'POST', '/api/predict'
    m.bring(changed_form(m.body, rng))
    m.headers['Content-Type'] = rng.choice(ODD_TYPES) if rng.random() < .5 else FORM


def change_fields(m, rng):
    "A form of fields, or JSON, for any page"
    m.method, m.path = 'POST', rng.choice(('/login', '/login', *(p for _, p in (*ASKED, *SENT))))
    m.bring(rng.choice(ODD_FORMS))
    m.headers['Content-Type'] = rng.choice(('application/x-www-form-urlencoded', 'application/json', FORM, *ODD_TYPES))


CHANGES = dict(line=change_line, headers=change_headers, length=change_length, chunks=change_chunks, form=change_form,
               fields=change_fields)


REPLIED = {'content-type', 'content-length', 'date', 'connection', 'location', 'set-cookie', 'retry-after', 'www-authenticate',
           'content-security-policy', 'x-content-type-options', 'x-frame-options', 'referrer-policy', 'cross-origin-opener-policy',
           'cross-origin-resource-policy', 'permissions-policy', 'cache-control', 'transfer-encoding'}


def body_of(headers, raw):
    "The body of a reply, None where it is cut off, and what comes behind it"
    if 'content-length' in headers:
        n = int(headers['content-length'])
        return raw[:n] if len(raw) >= n else None, raw[n:]
    if 'transfer-encoding' not in headers: return raw, b''
    body = b''
    while raw:
        size, _, raw = raw.partition(b'\r\n')
        n = int(size, 16)
        if not n: return body, raw[2:]
        body, raw = body + raw[:n], raw[n + 2:]
    return None, b''


def head_of(head):
    "Status and headers of a reply: only such as this server sends"
    line, *lines = head.decode('latin-1').split('\r\n')
    assert re.fullmatch(r'HTTP/1\.1 [1-5]\d\d [ -~]*', line) and all(': ' in x for x in lines), head[:300]
    headers = {k.lower(): v for k, v in (x.split(': ', 1) for x in lines)}
    assert set(headers) <= REPLIED, set(headers) - REPLIED
    return int(line.split()[1]), headers


def replies_in(raw, to_head):
    "(status, headers, body) of each reply that a connection brought; the body is None where it is cut off, as it may be by a reset"
    found = []
    while b'\r\n\r\n' in raw:
        head, _, raw = raw.partition(b'\r\n\r\n')
        status, headers = head_of(head)
        if status == 100: continue
        without = to_head and (not raw or raw.startswith(b'HTTP/1.1 '))
        body, raw = (b'', raw) if without else body_of(headers, raw)
        found.append((status, headers, body))
    return found


def children():
    "Numbers of the processes that this one has started and not yet collected"
    return {int(n) for f in Path('/proc/self/task').glob('*/children') for n in f.read_text().split()}


class Errors(logging.Handler):
    "What libraries log as an error: the traceback of a mistake that no reply shows"
    def __init__(self):
        super().__init__(logging.ERROR)
        self.seen = []

    def emit(self, record): self.seen.append(self.format(record))


def open_files(): return len(os.listdir('/dev/fd'))


def wait_for(what, seconds=5):
    "Wait until something is so"
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, (what, threading.enumerate(), children())
        time.sleep(.02)


class Requests:
    "Requests to the server of a bundle, changed in every part and sent as bytes; it runs in this process, its worker in another"
    def __init__(self, run, work, rng):
        from covid_cxr.bundle import export_bundle
        from covid_cxr.deploy.guard import Limits, RateLimit
        from covid_cxr.deploy.serve import open_service, serving
        bundle, self.good = export_bundle(run, work / 'served', format='onnx'), (Path(run) / 'new-image.png').read_bytes()
        self.rng, self.pictures, self.n, self.memory, self.logged = rng, Pictures(run, work, rng), 0, 0, []
        self.hidden = [str(p) for p in (ROOT, work, sys.prefix)] + ['site-packages', '/proc/', 'Traceback', TOKEN]
        self.before, self.errors = (set(threading.enumerate()), children(), open_files()), Errors()
        logging.getLogger().addHandler(self.errors)
        limits = Limits(1_000_000, 1_500_000, files=5, upload_seconds=2, header_seconds=.5, per_minute=10**6)
        self.service = open_service(bundle, token=TOKEN, names=['served.example'], timeout=MOST_SECONDS - 2, limits=limits,
                                    log=lambda *line: self.logged.append(line))
        self.service.tries = RateLimit(10**6)
        self.running = contextlib.ExitStack()
        self.host = self.running.enter_context(serving(self.service)).split('/')[2]
        logging.getLogger('uvicorn.error').setLevel(logging.ERROR)
        self.files = open_files()
        self.headers = {'Host': self.host, 'Connection': 'close', 'Authorization': f'Bearer {TOKEN}'}
        self.answer = self.asked_well()

    def picture(self):
        "A good picture, whole or changed, or a picture or DICOM file of the other attack"
        if self.rng.random() < .3: return self.good if self.rng.random() < .5 else changed_bytes(self.good, self.rng)
        self.pictures.change()
        return self.pictures.file.read_bytes()

    def message(self, sends):
        "A good request with a changed picture, or one for a page"
        method, path = self.rng.choice(SENT if sends else ASKED)
        if not sends: return Message(method, path, self.headers)
        data = self.picture()
        if self.rng.random() < .5 and path.startswith('/api'): return Message(method, path, self.headers, data)
        return Message(method, path, self.headers, part(data) + b'--xXx--\r\n', FORM)

    def changed(self):
        "A request with one or two changes, named after the first"
        self.name = self.rng.choice(list(CHANGES))
        m = self.message(self.name in ('length', 'chunks', 'form') or self.rng.random() < .4)
        for name in (self.name, *self.rng.sample(list(CHANGES), self.rng.choice((0, 0, 1)))): CHANGES[name](m, self.rng)
        return bytes(m)

    def change(self):
        "Make the next request, or several; `sent` is what each connection sends, `ends` whether it then says that nothing follows"
        rng, how = self.rng, self.rng.random()
        self.whole, self.ends = how < .25, False
        if how < .22: self.name, self.sent = 'picture', [bytes(self.message(True))]
        elif how < .25: self.name, self.sent = 'crowd', [bytes(self.message(True)) for _ in range(9)]
        elif how < .8: self.sent = [self.changed()]
        elif how < .88: self.sent, self.ends, self.name = self.cut(self.changed()), rng.random() < .8, 'cut off'
        elif how < .93: self.sent, self.name = [self.pipelined()], 'pipelined'
        elif how < .94: self.sent, self.name = [bytes(Message('GET', '/openapi.json', {**self.headers, 'Connection': ''})) * 800], 'unread'
        else: self.sent, self.name = [rng.choice((*NOISE, rng.randbytes(3000), changed_bytes(self.changed(), rng)))], 'noise'

    def cut(self, data):
        "The start of a request"
        return [data[:self.rng.randrange(self.rng.choice((min(len(data), 300), len(data))))]]

    def pipelined(self):
        "Several requests behind one another that keep the connection, the last of them changed"
        kept = {**self.headers, 'Connection': 'keep-alive'}
        first = [bytes(Message(*self.rng.choice(ASKED), kept)) for _ in range(self.rng.choice((1, 3, 40)))]
        return b''.join(first) + self.changed()

    def brought(self, connection):
        "What comes back until the other side ends the connection"
        raw = bytearray()
        with contextlib.suppress(ConnectionError):
            while piece := connection.recv(1 << 16): raw += piece
        return bytes(raw)

    def send(self, data, ends, room):
        "A connection that has sent this, as far as the other side took it, with room for so many bytes that come back"
        host, port = self.host.split(':')
        connection = socket.socket()
        connection.settimeout(MOST_SECONDS)
        if room: connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
        connection.connect((host, int(port)))
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
            if ends: connection.shutdown(socket.SHUT_WR)
        return connection

    def exchange(self, sent, ends=False, reads=True):
        "The replies that each connection brings, in less than ten seconds"
        start, found = time.monotonic(), []
        with contextlib.ExitStack() as opened:
            connections = [opened.enter_context(self.send(data, ends, None if reads else 4096)) for data in sent]
            if not reads:
                wait_for(lambda: open_files() > self.files + len(sent))       # the server's ends are files of this process too
                wait_for(lambda: open_files() <= self.files + len(sent), MOST_SECONDS)
            else: found = [replies_in(self.brought(c), b'HEAD' in data) for c, data in zip(connections, sent)]
        assert time.monotonic() - start < MOST_SECONDS, time.monotonic() - start
        return found

    def told(self, status, headers, body):
        "One reply in one or two words: only what a server may say, and nothing of this machine"
        assert status in (200, 303, 422, 503) or 400 <= status < 422 or status == 431, (status, body[:500])
        text = body.decode()
        told = [word for word in self.hidden if word in text or word in str(headers)]
        assert not told, (told, text[:500])
        answers = json.loads(text).get('answers', ()) if 'application/json' in headers.get('content-type', '') and text else ()
        assert all(a['failure'] in (None, 'memory') for a in answers), answers
        if answers and status == 200: return answers[0]['status']
        return {200: 'page', 303: 'sent on', 422: 'failed', 503: 'busy'}.get(status, f'refused {status}')

    def end(self):
        "What the request ended in: the first reply, or that the connection was closed"
        found = self.exchange(self.sent, self.ends, self.name != 'unread')
        cut = [r for replies in found for r in replies if r[2] is None]
        words = [self.told(*r) for replies in found for r in replies if r[2] is not None]
        assert not self.whole or (not cut and len(words) == len(self.sent) and not any('refused' in w for w in words)), (words, cut)
        self.n += 1
        if self.n % 50 == 0: assert self.asked_well() == self.answer
        assert not self.errors.seen and all(status != 500 for _, status, *_ in self.logged), (self.errors.seen[:1], self.logged[-3:])
        return 'busy' if 'busy' in words else words[0] if words else 'closed'

    def asked_well(self):
        "The answer for a good picture; the server is well, and its worker is the first one"
        asked = [bytes(Message('GET', '/health', self.headers)), bytes(Message('POST', '/api/predict', self.headers, self.good))]
        (health,), (answer,) = [self.exchange([data])[0] for data in asked]
        assert (health[0], json.loads(health[2])) == (200, dict(status='ok', workers_up=1, workers=1, restarts=0)), health
        assert answer[0] == 200 and json.loads(answer[2])['answers'][0]['status'] == 'answered', answer
        return json.loads(answer[2])

    def close(self):
        "Stop the server, which is well: no request, no thread, no process and no open file is left"
        service, pool = self.service, self.service.pool
        assert self.asked_well() == self.answer
        wait_for(lambda: not service.busy and pool.free.qsize() == pool.size)
        self.memory = max(largest_memory(w.process.pid) for w in pool.workers)
        self.running.close()
        logging.getLogger().removeHandler(self.errors)
        threads, processes, files = self.before
        wait_for(lambda: set(threading.enumerate()) <= threads and children() <= processes and open_files() <= files)


# ---- the attack ------------------------------------------------------------------------------------------------------------------------

ATTACKS = {'pictures': (Pictures, 10_000), 'bundles': (Bundles, 1_000), 'networks': (Networks, 1_000), 'folders': (Folders, 300),
           'requests': (Requests, 1_000)}
SLOW_FIRST = sorted(ATTACKS, key=lambda kind: kind != 'folders')      # two at a time


def largest_memory(process='self'):
    "Bytes of memory that a process has held at most; what `getrusage` says counts that of its parent, which it was copied from"
    status = Path(f'/proc/{process}/status')
    for line in status.read_text().splitlines() if status.exists() else []:
        if line.startswith('VmHWM:'): return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def attack(kind, n, run, seed=7):
    "n changed files of one kind in this process: what they ended in, processor seconds of the slowest, bytes of memory"
    warnings.simplefilter('ignore')
    ends, slowest, start = collections.Counter(), (0., ''), time.perf_counter()
    with tempfile.TemporaryDirectory() as work, contextlib.ExitStack() as after:
        attacked = ATTACKS[kind][0](run, Path(work), random.Random(seed))
        after.callback(getattr(attacked, 'close', int))
        for i in range(n):
            attacked.change()
            faulthandler.dump_traceback_later(MOST_WAITED, exit=True)         # also while a library computes
            before = time.process_time()
            try: ends[attacked.end()] += 1
            except Exception as e: raise AssertionError(f'{kind}, change {i} of seed {seed}, {attacked.name}') from e
            slowest = max(slowest, (round(time.process_time() - before, 2), attacked.name))
            assert slowest[0] < MOST_SECONDS, slowest
    faulthandler.cancel_dump_traceback_later()
    memory = max(largest_memory(), getattr(attacked, 'memory', 0))
    assert memory < MOST_BYTES, memory
    return dict(kind=kind, n=n, ends=dict(sorted(ends.items())), slowest_seconds=slowest[0], slowest=slowest[1], memory_bytes=memory,
                seconds=round(time.perf_counter() - start))


def attack_apart(kind, n, run, seed=7):
    "The same in a process of its own, so that its memory is its own"
    words = [sys.executable, __file__, '--kind', kind, '--n', n, '--run', run, '--seed', seed]
    p = subprocess.run([*map(str, words)], capture_output=True, text=True, cwd=ROOT)
    if p.returncode: raise SystemExit(f'{kind}: exit code {p.returncode}; {p.stderr[-3000:]}')
    return json.loads(p.stdout.splitlines()[-1])


def small_run(folder):
    "A finished run of the demo that trains in half a minute"
    from covid_cxr.cli import main
    settings = ['--set', 'data.phantom_patients=60', '--set', 'training.stages=[{epochs=2,lr=0.001}]', '--set', 'evaluation.n_boot=200']
    assert main(['demo', '--out', str(folder), *settings, '--size', '32', '--arch', 'cnn3', '--weights', 'none', '--device', 'cpu']) == 0
    return complete_run(folder)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--kind', choices=list(ATTACKS), help='only this kind, in this process, to the screen')
    p.add_argument('--n', type=int, help='so many changes (default: those named above)')
    p.add_argument('--run', help='a finished run of the demo (default: one is trained)')
    p.add_argument('--seed', type=int, default=7)
    p.add_argument('--out', default=str(OUT))
    a = p.parse_args()
    if a.kind: print(json.dumps(attack(a.kind, a.n or ATTACKS[a.kind][1], a.run, a.seed)))
    else:
        with tempfile.TemporaryDirectory() as work:
            run = a.run or small_run(Path(work) / 'run')
            def attacked(kind): return attack_apart(kind, a.n or ATTACKS[kind][1], run, a.seed)
            with ThreadPoolExecutor(2) as two: rows = [*two.map(attacked, SLOW_FIRST)]
            rows.sort(key=lambda r: [*ATTACKS].index(r['kind']))
        for r in rows: print(r)
        write_result(a.out, dict(about(), machine=machine(), seed=a.seed, rows=rows))
