"""What other ways of answering in 8 bits would give: processor time of one ResNet-50 at 512 px, beside onnxruntime in single precision.

    python benchmarks/int8_engines.py           (with OpenVINO: pip install openvino, 250 MB, into an environment of its own)

`predict_speed.py` asks how fast a bundle answers, decoding and all. This asks the network alone, untrained, one image at a time on two
threads: in 8 bits as it is exported (its first three layers stay as they are), in 8 bits whole, and the exported file in OpenVINO, which
has kernels for the matrix units of recent processors. The commands take turns. The result replaces benchmarks/results/int8_engines.json.
"""
import argparse, importlib.util, statistics, tempfile, time
from pathlib import Path
from record import RESULTS, about, load_average, machine, write_result
import numpy as np
from predict_speed import large_jpeg, make_resnet

OUT = RESULTS / 'int8_engines.json'
THREADS, WHOLE = 2, 'onnxruntime, 8 bits, every layer'


def in_onnxruntime(data):
    "A function that answers one image"
    import onnxruntime as ort
    options = ort.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = ort.InferenceSession(data, options)
    return lambda x: session.run(['logits'], {session.get_inputs()[0].name: x})[0]


def in_openvino(data):
    import openvino
    core, settings = openvino.Core(), {'INFERENCE_NUM_THREADS': THREADS, 'INFERENCE_PRECISION_HINT': 'f32'}
    request = core.compile_model(core.read_model(data), 'CPU', settings).create_infer_request()
    return lambda x: request.infer({0: x})['logits']


def every_layer(data, x):
    "The file in 8 bits, the first layers as well"
    from covid_cxr.model import int8
    kept, int8._FIRST = int8._FIRST, 0
    try: return int8.int8_bytes(data, x)
    finally: int8._FIRST = kept


def engines(folder):
    "{name: a function that answers one image}, and an image"
    from covid_cxr.bundle import ONNX
    from covid_cxr.images import load_image
    from covid_cxr.predict import load_predictor, scale_pixels
    jpeg = large_jpeg(folder / 'large.jpg')
    models = make_resnet(folder, 512, jpeg)
    single, eight = ((models[k] / ONNX).read_bytes() for k in ('single', 'int8'))
    p = load_predictor(models['single'])
    x = scale_pixels(load_image(jpeg, p.rule)[None, None], p.bundle)
    whole = every_layer(single, np.concatenate([x] * 8))
    found = {'onnxruntime, 32 bits': in_onnxruntime(single), 'onnxruntime, 8 bits': in_onnxruntime(eight), WHOLE: in_onnxruntime(whole)}
    if importlib.util.find_spec('openvino'):
        found |= {'OpenVINO, 32 bits': in_openvino(single), 'OpenVINO, 8 bits': in_openvino(eight)}
    return found, x


def measure(repeats):
    "A row for each engine: milliseconds of processor and of waiting, and how many times less than the first"
    with tempfile.TemporaryDirectory() as tmp:
        found, x = engines(Path(tmp))
        times = {name: [] for name in found}
        for _ in range(repeats + 1):
            for name, ask in found.items():
                wall, cpu = time.perf_counter(), time.process_time()
                ask(x)
                times[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    median = {name: [1000 * statistics.median(t) for t in zip(*rows[1:])] for name, rows in times.items()}
    first = next(iter(median.values()))
    return [dict(engine=name, cpu_ms=round(cpu, 1), wall_ms=round(wall, 1), times_less_cpu=round(first[0] / cpu, 2),
                 times_faster=round(first[1] / wall, 2)) for name, (cpu, wall) in median.items()]


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--repeats', type=int, default=15)
    p.add_argument('--out', type=Path, default=OUT)
    a = p.parse_args()
    load = load_average()
    rows = measure(a.repeats)
    write_result(a.out, dict(about(), machine=machine(cores_used=THREADS, load=load), rows=rows))
    for r in rows: print(r)
