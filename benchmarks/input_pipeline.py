"""Images per second from file to float batch: covid_cxr's reader and cache compared with plain fastai, measured in one run.

    python benchmarks/input_pipeline.py

Both sides fill the same fastai DataLoader (num_workers=0, same batch size, same files, same order) and end in a float32 batch.
- fastai:  DataBlock(ImageBlock, item_tfms=Resize(size)): RGB, as the library's documentation does it
- ours:    one grey channel by `ImageCache.get`: the first pass decodes and writes the cache, the later passes read it
Two sets: distinct copies of untouched originals (mostly 1,100 to 2,700 px), and a sample of a collection already reduced to a short side
of 512 px. Every measurement is a process of its own, the sides take turns, and the sources are in the page cache for both.
The figures are medians over the repeats; they are appended to benchmarks/results/input_pipeline.json.
"""
import argparse, json, os, resource, shutil, statistics, subprocess, sys, tempfile, time, warnings
from pathlib import Path
from record import RESULTS, about, append_result, load_average, machine
from covid_cxr.core import data_folder

OUT, SIDES = RESULTS / 'input_pipeline.json', ('fastai', 'ours')


def peak_mb():
    "Largest memory of this process so far"
    unit = 1024 if sys.platform == 'darwin' else 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit / 1024


def fastai_loader(files, size, bs):
    "Plain fastai"
    from fastai.vision.all import DataBlock, ImageBlock, IndexSplitter, Resize
    block = DataBlock(blocks=ImageBlock, splitter=IndexSplitter([]), item_tfms=Resize(size))
    return block.dataloaders(files, bs=bs, num_workers=0, device='cpu').train.new(shuffle=False, drop_last=False)


def our_loader(files, size, bs, folder):
    "The same DataLoader over the cache"
    import torch
    from fastai.vision.all import DataBlock, IndexSplitter, IntToFloatTensor, TensorImageBW, Transform, TransformBlock
    from covid_cxr.cache import ImageCache
    from covid_cxr.images import ImageRule
    cache = ImageCache(folder, ImageRule(size))

    class Read(Transform):
        def encodes(self, path: Path): return TensorImageBW(torch.from_numpy(cache.get(path))[None])
    images = TransformBlock(type_tfms=Read(), batch_tfms=IntToFloatTensor())
    block = DataBlock(blocks=images, splitter=IndexSplitter([]))
    return block.dataloaders(files, bs=bs, num_workers=0, device='cpu').train.new(shuffle=False, drop_last=False)


def make_loader(side, files, size, bs, folder):
    return fastai_loader(files, size, bs) if side == 'fastai' else our_loader(files, size, bs, folder)


def one_pass(loader, n, channels, size):
    "Seconds for all batches; what comes out is checked"
    seen, start = 0, time.perf_counter()
    for batch in loader:
        x = batch[0]
        seen += len(x)
    seconds = time.perf_counter() - start
    assert seen == n and tuple(x.shape[1:]) == (channels, size, size) and str(x.dtype) == 'torch.float32'
    assert 0 <= float(x.min()) and float(x.max()) <= 1
    return seconds


def write_two_images(folder):
    "A PNG and a JPEG of noise: what is imported late is imported with them"
    import numpy as np
    from PIL import Image
    files = [Path(folder) / f'warm{i}.{ending}' for i, ending in enumerate(('png', 'jpg'))]
    for i, f in enumerate(files): Image.fromarray(np.random.default_rng(i).integers(0, 256, (600, 500), dtype=np.uint8)).save(f)
    return files


def measure(side, listing, size, bs, passes):
    "One side, in this process; prints seconds per pass and memory as JSON"
    warnings.simplefilter('ignore')
    import torch
    torch.set_num_threads(1)
    files = [Path(f) for f in json.loads(Path(listing).read_text())]
    channels = 3 if side == 'fastai' else 1
    with tempfile.TemporaryDirectory() as d:
        one_pass(make_loader(side, write_two_images(d), size, bs, f'{d}/warm'), 2, channels, size)
        for f in files: f.read_bytes()
        before, loader = peak_mb(), make_loader(side, files, size, bs, f'{d}/cache')
        seconds = [one_pass(loader, len(files), channels, size) for _ in range(passes)]
    print(json.dumps(dict(seconds=seconds, mb_before=before, mb_peak=peak_mb())))


def run_side(side, listing, a):
    "What `measure` said in a process of its own"
    command = [sys.executable, __file__, '--side', side, '--listing', str(listing), '--size', str(a.size), '--bs', str(a.bs),
               '--passes', str(a.passes)]
    p = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS='1'))
    if p.returncode: sys.exit(f'{side} failed:\n{p.stderr[-3000:]}')
    return json.loads(p.stdout.strip().splitlines()[-1])


def compare(name, files, a, tmp):
    "Both sides in turns; medians and ratios"
    listing = Path(tmp) / f'{name}.json'
    listing.write_text(json.dumps([str(f) for f in files]))
    runs = {side: [] for side in SIDES}
    for _ in range(a.repeats):
        for side in SIDES: runs[side].append(run_side(side, listing, a))
    def rate(side, passes): return len(files) / statistics.median(s for r in runs[side] for s in r['seconds'][passes])
    passes = dict(first=slice(0, 1), later=slice(1, None))
    rates = {(side, k): rate(side, passes[k]) for side in SIDES for k in passes}
    memory = {s: round(statistics.median(r['mb_peak'] for r in runs[s])) for s in SIDES}
    out = dict(set=name, files=len(files), mean_kb=round(sum(f.stat().st_size for f in files) / len(files) / 1024))
    out.update({f'{side}_{k}': round(v, 1) for (side, k), v in rates.items()})
    out.update({f'ratio_{k}': round(rates['ours', k] / rates['fastai', k], 2) for k in passes})
    out.update({f'peak_mb_{s}': memory[s] for s in SIDES}, ratio_memory=round(memory['ours'] / memory['fastai'], 2))
    return dict(out, runs=runs)


def copy_originals(originals, copies, tmp):
    "Distinct copies of each original"
    out = []
    for k in range(copies):
        folder = Path(tmp) / f'copy{k}'
        folder.mkdir()
        out += [Path(shutil.copyfile(f, folder / f'{i:02}{f.suffix}')) for i, f in enumerate(originals)]
    return out


def sets(a, tmp):
    "name -> files"
    data = Path(a.data)
    originals = sorted(f for f in (data / 'originals').rglob('*') if f.is_file())
    covid = sorted(f for f in (data / 'covid-chestxray-dataset' / 'images').glob('*') if f.is_file())
    if not originals or not covid:
        sys.exit(f'no originals/ and covid-chestxray-dataset/images/ below {data}; give the folder that holds both with --data.')
    step = max(1, len(covid) // a.sample)
    return {'originals': copy_originals(originals, a.copies, tmp), 'covid-512': covid[::step][:a.sample]}


def show(record, repeats):
    "The record for a person"
    print(record['command'], record['machine'], f'images per second, medians of {repeats} processes a side:', sep='\n')
    for r in record['results']:
        passes = [f"{k} pass: fastai {r[f'fastai_{k}']}, ours {r[f'ours_{k}']}, ratio {r[f'ratio_{k}']}" for k in ('first', 'later')]
        print(f"  {r['set']:10} {'; '.join(passes)}; peak MB: fastai {r['peak_mb_fastai']}, ours {r['peak_mb_ours']}")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', default=str(data_folder()), help='folder that holds originals/ and covid-chestxray-dataset/images/')
    p.add_argument('--copies', type=int, default=10, help='distinct copies of each original')
    p.add_argument('--sample', type=int, default=330, help='images of the reduced collection')
    p.add_argument('--size', type=int, default=512)
    p.add_argument('--bs', type=int, default=8)
    p.add_argument('--passes', type=int, default=3, help='one first pass and the rest later passes; 2 or more')
    p.add_argument('--repeats', type=int, default=3, help='processes per side')
    p.add_argument('--out', default=str(OUT))
    p.add_argument('--side', choices=SIDES, help=argparse.SUPPRESS)
    p.add_argument('--listing', help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.passes < 2: sys.exit('--passes must be 2 or more: the first pass fills the cache.')
    if a.side: return measure(a.side, a.listing, a.size, a.bs, a.passes)
    before = load_average()
    with tempfile.TemporaryDirectory() as tmp: results = [compare(name, files, a, tmp) for name, files in sets(a, tmp).items()]
    made = dict(about(), machine=machine(load_before=before))
    record = dict(made, size=a.size, bs=a.bs, results=results)
    append_result(a.out, record)
    show(record, a.repeats)


if __name__ == '__main__': main()
