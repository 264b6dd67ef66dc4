"""How fast a bundle answers beside fastai's `load_learner(...).predict` and `get_preds`, as ratios measured in one run on one machine.

    python benchmarks/predict_speed.py --run RUN --images FOLDER

RUN is a finished run with its bundle, its export.pkl and its images at hand; FOLDER holds at least 500 images. It takes half an hour on
two quiet cores. The rows are:

- start: from the start of a process to its first printed prediction (`covid-cxr predict`, and three lines with `load_predictor`)
- memory: the largest memory of these processes
- image: one JPEG of 2,000 pixels, end to end in a process that is already running, by the model of RUN, by an untrained ResNet-50 at 512
  pixels (the speed of a network does not depend on what it has learned), and by --bundle
- folder: 500 images of FOLDER, by the model of RUN and by the ResNet-50
- auc: what 8 bits change in the AUC of RUN on its validation split, real images, in onnxruntime and in OpenVINO

Bundles are asked as `covid-cxr predict` asks them, by onnxruntime; the one in 8 bits also by OpenVINO (`--backend openvino`).

Fastai's and our command take turns; each number is the median of --repeats processes. A ratio above 1 says how many times faster or smaller
the own command is. `--tiny` runs everything once with few images, to see that it works. The result replaces
benchmarks/results/predict_speed.json.
"""
import argparse, json, os, statistics, subprocess, sys, tempfile, time
from dataclasses import asdict
from pathlib import Path
import numpy as np
from record import RESULTS, ROOT, about, load_average, machine, write_result

OUT = RESULTS / 'predict_speed.json'
AIMS = {'start': 8, 'start seconds': .8, 'memory': 3, 'image single': 1.4, 'image int8': 5, 'folder single': 2, 'folder int8': 7,
        'auc': .005}
MEMORY = '\nprint([line for line in open("/proc/self/status") if line.startswith("VmHWM")][0].split()[1])'     # kB, of this process alone
CLI = 'import sys; from covid_cxr.cli import main; main(["predict", sys.argv[1], sys.argv[2], "--ood", "off"])'
BARE = ('import sys; from covid_cxr.predict import load_predictor; '
        'print(load_predictor(sys.argv[1]).predict(sys.argv[2], ood="off"), flush=True)')
FASTAI = ('import sys; from fastai.learner import load_learner; learn = load_learner(sys.argv[1]); '
          'print(learn.predict(sys.argv[2]), flush=True)')


def started(code, *words):
    "A command in a process of its own: seconds to its first line, processor seconds, bytes of its largest memory"
    start = time.perf_counter()
    p = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', code + MEMORY, *map(str, words)], stdout=subprocess.PIPE,
                         stderr=subprocess.DEVNULL, env=dict(os.environ, PYTHONPATH=str(ROOT)))
    line = p.stdout.readline()
    first = time.perf_counter() - start
    kilobytes = int(p.stdout.read().split()[-1])
    _, status, used = os.wait4(p.pid, 0)
    assert line and status == 0, (code, words, status)
    return dict(seconds=first, cpu_seconds=used.ru_utime + used.ru_stime, memory=1024 * kilobytes)


def timed(do, n, first=None):
    "Seconds and processor seconds of each of n calls, behind one that is left out: the same, or `first`"
    (first or do)()
    wall, cpu = [], []
    for _ in range(n):
        a, b = time.perf_counter(), time.process_time()
        do()
        wall.append(time.perf_counter() - a)
        cpu.append(time.process_time() - b)
    return dict(seconds=statistics.median(wall), cpu_seconds=statistics.median(cpu))


def work(kind, model, files, n):
    "In this process: one image n times, or a folder once, by a bundle or by an exported Learner"
    if model.endswith('.pkl'):
        from fastai.learner import load_learner
        learn = load_learner(model)
        learn.dls.num_workers = 0
        with learn.no_bar():
            if kind == 'image': found = timed(lambda: learn.predict(files[0]), n)
            else:
                ask = lambda few: learn.get_preds(dl=learn.dls.test_dl(few, bs=8, num_workers=0))
                found = timed(lambda: ask(files), 1, lambda: ask(files[:16]))
            return dict(found, probability=float(learn.predict(files[0])[2][1]))
    from covid_cxr.predict import load_predictor
    folder, _, backend = model.partition('@')
    predictor = load_predictor(folder, backend=backend or 'auto')
    if kind == 'image': found = timed(lambda: predictor.predict(files[0], ood='off'), n)
    else:
        ask = lambda few: list(predictor.stream(few, 8, 'decline', 'off'))
        found = timed(lambda: ask(files), 1, lambda: ask(files[:16]))
    return dict(found, probability=[*predictor.predict(files[0], ood='off').probabilities.values()][1])


def apart(kind, model, files, n, cores):
    "The same in a process of its own, on so many cores"
    with tempfile.NamedTemporaryFile('w', suffix='.json') as f:
        json.dump([kind, str(model), [str(p) for p in files], n], f)
        f.flush()
        env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS=str(cores))
        line = [sys.executable, '-W', 'ignore', __file__, '--worker', f.name, '--cores', str(cores)]
        p = subprocess.run(line, capture_output=True, text=True, env=env, cwd=ROOT)
    if p.returncode: raise SystemExit(p.stderr[-3000:])
    return json.loads(p.stdout.splitlines()[-1])


def taking_turns(commands, repeats):
    "name -> medians of what each command gives, one after the other, again and again, in turned order"
    found = {name: [] for name in commands}
    for i in range(repeats):
        for name in list(commands)[::1 if i % 2 else -1]: found[name].append(commands[name]())
    return {name: {k: statistics.median(r[k] for r in rows) for k in rows[0]} for name, rows in found.items()}


def as_ratios(what, found, other):
    "Rows of the result: each command beside fastai's"
    rows = []
    for name, own in found.items():
        ratios = {f'{k}_ratio': round(found[other][k] / own[k], 2) for k in ('seconds', 'cpu_seconds', 'memory') if k in own}
        rows.append(dict(row=what, command=name, beside=other, **{k: round(v, 6) for k, v in own.items()}, **ratios))
    return rows


def large_jpeg(file, side=2000, patient=1):
    "A phantom as a JPEG of 2,000 pixels"
    from PIL import Image
    from covid_cxr.phantom import make_phantom
    Image.fromarray(make_phantom(seed=3, patient=patient, size=side).image).save(file, quality=92)
    return file


def make_resnet(folder, size, jpeg):
    "An untrained ResNet-50: its pickle, its bundle in single precision and in 8 bits"
    import torch
    from covid_cxr.bundle import Int8File, ONNX, export_bundle, save_bundle
    from covid_cxr.core import new_table
    from covid_cxr.data import cxr_dls
    from covid_cxr.images import ImageRule, load_image
    from covid_cxr.learner import cxr_learner
    from covid_cxr.model.int8 import int8_bytes
    files = [large_jpeg(folder / f'training-{i}.jpg', 512, i) for i in range(8)]
    rows = [dict(path=str(files[i]), image_id=f'{i}', patient=f'{i}', group=f'{i}', label=('no', 'yes')[i % 2],
                 split='valid' if i > 5 else 'train') for i in range(8)]
    torch.manual_seed(1)
    learn = cxr_learner(cxr_dls(new_table(rows, 'phantom'), size=size, bs=2, device='cpu'), 'resnet50', 'none', path=folder)
    own = save_bundle(learn, folder / 'own', synthetic=True)
    single = export_bundle(own, folder / 'single', format='onnx')
    b = json.loads((single / 'bundle.json').read_text())
    x = np.stack([load_image(jpeg, ImageRule.from_dict(b['image']))] * 8)[:, None].astype(np.float32) / 255
    eight = Int8File(int8_bytes((single / ONNX).read_bytes(), (x - b['mean']) / b['std']), [1.], 0., {})
    return in_openvino(dict(fastai=own / 'export.pkl', single=single, int8=export_bundle(own, folder / 'int8', format='int8', int8=eight)))


def in_openvino(models):
    "The same, and the bundle in 8 bits to be asked by OpenVINO"
    return models | dict(openvino=f"{models['int8']}@openvino")


def checked_in_openvino(run, single, int8, calibrated_on):
    "What 8 bits in OpenVINO change in the answers for the validation split of a run"
    from covid_cxr.images import load_image
    from covid_cxr.predict import load_predictor
    from covid_cxr.runs.folder import RunFolder
    from covid_cxr.runs.int8 import compare_int8
    before, after = load_predictor(single), load_predictor(int8, backend='openvino')
    rows = RunFolder.open(run).table.query("split == 'valid'")
    truth = np.stack([rows['label'].to_numpy() == c for c in before.classes], 1).astype(float)
    return compare_int8(before, after, (load_image(p, before.rule) for p in rows['path']), truth, calibrated_on)


def models_of(run, folder):
    "The pickle of a run, its bundle in single precision and in 8 bits, and what 8 bits change in its AUC, by engine"
    from covid_cxr.bundle import export_bundle
    from covid_cxr.runs.int8 import export_int8
    single = export_bundle(run, folder / 'run-single', format='onnx')
    check = export_int8(run, folder / 'run-int8')
    checks = dict(onnxruntime=check, openvino=checked_in_openvino(run, single, folder / 'run-int8', check.calibrated_on))
    models = dict(fastai=Path(run) / 'export.pkl', single=single, int8=folder / 'run-int8')
    return in_openvino(models), {engine: asdict(c) for engine, c in checks.items()}


def start_rows(models, image, repeats):
    "Start and memory"
    other = 'load_learner(export.pkl).predict'
    commands = {other: lambda: started(FASTAI, models['fastai'], image), 'covid-cxr predict': lambda: started(CLI, models['single'], image),
                'load_predictor': lambda: started(BARE, models['single'], image)}
    return as_ratios('start and memory', taking_turns(commands, repeats), other)


def speed_rows(kind, name, models, files, n, repeats, cores):
    "One image or a folder: fastai, single precision and 8 bits"
    other = 'learn.predict' if kind == 'image' else 'learn.get_preds'
    labels = {'fastai': other, 'single': 'bundle, 32 bits', 'int8': 'bundle, 8 bits', 'openvino': 'bundle, 8 bits, OpenVINO',
              'boxed': 'bundle, as shipped', 'boxed_openvino': 'bundle, as shipped, OpenVINO'}
    commands = {labels[k]: lambda m=m: apart(kind, m, files, n, cores) for k, m in models.items()}
    rows = as_ratios(f'{kind}, {name}', taking_turns(commands, repeats), other)
    for r in rows: r['difference'] = abs(r['probability'] - rows[0]['probability'])
    return rows


def measure(a, work_folder):
    "All rows"
    jpeg = large_jpeg(work_folder / 'large.jpg', 600 if a.tiny else 2000)
    files = sorted(f for f in Path(a.images).rglob('*') if f.suffix.lower() in ('.png', '.jpg', '.jpeg'))[:a.n]
    models, check = models_of(a.run, work_folder)
    sets = {'model of RUN': models, 'ResNet-50, 512 px': make_resnet(work_folder, 64 if a.tiny else 512, jpeg)}
    rows = start_rows(models, files[0], a.repeats)
    for name, m in sets.items():
        rows += speed_rows('image', name, m, [jpeg], a.calls, a.repeats, a.cores)
        rows += speed_rows('folder', name, m, files, 1, max(1, a.repeats // 2), a.cores)
    if a.bundle:
        boxed = dict(fastai=models['fastai'], boxed=a.bundle, boxed_openvino=f'{a.bundle}@openvino')
        rows += speed_rows('image', f'{Path(a.bundle).name} beside the model of RUN', boxed, [jpeg], a.calls, a.repeats, a.cores)
    return rows, check


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--run', help='a finished run with export.pkl and its images at hand')
    p.add_argument('--images', help='a folder of at least 500 images')
    p.add_argument('--bundle', help='another bundle as a further row, e.g. covid_cxr/models/pneumonia-small')
    p.add_argument('--repeats', type=int, default=7)
    p.add_argument('--calls', type=int, default=10, help='predictions of one image in each process')
    p.add_argument('--n', type=int, default=500, help='images of the folder')
    p.add_argument('--cores', type=int, default=os.cpu_count())
    p.add_argument('--tiny', action='store_true', help='everything once, with few and small images')
    p.add_argument('--worker', help=argparse.SUPPRESS)
    p.add_argument('--out', default=str(OUT))
    a = p.parse_args()
    if hasattr(os, 'sched_setaffinity'): os.sched_setaffinity(0, set(list(os.sched_getaffinity(0))[:a.cores]))
    if a.worker: print(json.dumps(work(*json.loads(Path(a.worker).read_text()))))
    else:
        if not (a.run and a.images): p.error('--run and --images are needed')
        if a.tiny: a.repeats, a.calls, a.n = 1, 1, 8
        sys.path.insert(0, str(ROOT))
        with tempfile.TemporaryDirectory() as folder: rows, check = measure(a, Path(folder))
        for r in rows: print(r)
        print(check)
        how = dict(machine=machine(cores_used=a.cores, load=load_average()), repeats=a.repeats, images=a.n, aims=AIMS)
        write_result(a.out, dict(about(), **how, rows=rows, int8_on_validation=check))
