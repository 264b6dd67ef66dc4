"""Files that were damaged or made to harm: pictures, bundles and run folders end in an answer or in one sentence.

    python benchmarks/attack.py

10,000 changed pictures of every format, 1,000 changed bundles (bundle.json, safetensors), 1,000 changed ONNX files and 300 changed run
folders, each kind in a process of its own, two of them at a time: twenty minutes on two cores. It stops at the first traceback, at the
first sentence that is none, at a crash, and at whatever takes more than 10 s of processor time or 2 GB of memory. The result replaces
benchmarks/results/attack.json. `make test` runs the same with a few of each (tests/test_attack.py).

A further kind (requests to a server, say) is a class with `change()`, which makes the next attack and names it, and `end()`, which says in
one or two words what it ended in; it needs one entry in ATTACKS, with how many of it are tried.
"""
import argparse, collections, contextlib, copy, faulthandler, hashlib, io, json, math, os, random, resource, shutil, struct, subprocess, sys
import tempfile, time, warnings, zlib
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
        from covid_cxr.bundle import DESCRIPTION, MANIFEST, ONNX, export_bundle
        self.folder, self.rng = export_bundle(run, work / 'network', format='onnx'), rng
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


# ---- the attack ------------------------------------------------------------------------------------------------------------------------

ATTACKS = {'pictures': (Pictures, 10_000), 'bundles': (Bundles, 1_000), 'networks': (Networks, 1_000), 'folders': (Folders, 300)}
SLOW_FIRST = sorted(ATTACKS, key=lambda kind: kind != 'folders')      # two at a time


def largest_memory():
    "Bytes of memory that this process has held at most; what `getrusage` says counts that of its parent, which it was copied from"
    for line in open('/proc/self/status') if os.path.exists('/proc/self/status') else []:
        if line.startswith('VmHWM:'): return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def attack(kind, n, run, seed=7):
    "n changed files of one kind in this process: what they ended in, processor seconds of the slowest, bytes of memory"
    warnings.simplefilter('ignore')
    ends, slowest, start = collections.Counter(), (0., ''), time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        attacked = ATTACKS[kind][0](run, Path(work), random.Random(seed))
        for i in range(n):
            attacked.change()
            faulthandler.dump_traceback_later(MOST_WAITED, exit=True)         # also while a library computes
            before = time.process_time()
            try: ends[attacked.end()] += 1
            except Exception as e: raise AssertionError(f'{kind}, change {i} of seed {seed}, {attacked.name}') from e
            slowest = max(slowest, (round(time.process_time() - before, 2), attacked.name))
            assert slowest[0] < MOST_SECONDS, slowest
    faulthandler.cancel_dump_traceback_later()
    memory = largest_memory()
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
