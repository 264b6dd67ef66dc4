"""Films per second from file to float batch: covid_cxr's reader and cache against plain fastai, measured in one run.

    python benchmarks/input_pipeline.py --data ../shared/data

Both sides fill the same fastai DataLoader (num_workers=0, same batch size, same files, same order) and end in a float32 batch.
- fastai:  DataBlock(ImageBlock, item_tfms=Resize(size)): RGB, as the library's documentation does it
- ours:    one grey channel by `ImageCache.get`: the first pass decodes and writes the cache, the later passes read it
Two sets: distinct copies of untouched originals (mostly 1,100 to 2,700 px), and a sample of a collection already reduced to a short side of 512 px.
Every measurement is a process of its own, the sides take turns, and the sources are in the page cache for both.
The figures are medians over the repeats; they are appended to benchmarks/results/input_pipeline.json.
"""
import argparse, datetime, json, os, platform, resource, shutil, statistics, subprocess, sys, tempfile, time, warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def peak_mb(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 if sys.platform != 'darwin' else 1024) / 1024


def fastai_loader(files, size, bs):
    "Plain fastai"
    from fastai.vision.all import DataBlock, ImageBlock, IndexSplitter, Resize
    block = DataBlock(blocks=ImageBlock, splitter=IndexSplitter([]), item_tfms=Resize(size))
    return block.dataloaders(files, bs=bs, num_workers=0, device='cpu').train.new(shuffle=False, drop_last=False)


def our_loader(files, size, bs, cache):
    "The same DataLoader over the cache"
    import torch
    from fastai.vision.all import DataBlock, IndexSplitter, IntToFloatTensor, TensorImageBW, Transform, TransformBlock

    class Read(Transform):
        def encodes(self, path: Path): return TensorImageBW(torch.from_numpy(cache.get(path))[None])
    block = DataBlock(blocks=TransformBlock(type_tfms=Read(), batch_tfms=IntToFloatTensor()), splitter=IndexSplitter([]))
    return block.dataloaders(files, bs=bs, num_workers=0, device='cpu').train.new(shuffle=False, drop_last=False)


def one_pass(loader, n, channels, size):
    "Seconds for all batches; what comes out is checked"
    seen, start = 0, time.perf_counter()
    for batch in loader:
        x = batch[0]
        seen += len(x)
    seconds = time.perf_counter() - start
    assert seen == n and tuple(x.shape[1:]) == (channels, size, size) and str(x.dtype) == 'torch.float32' and 0 <= float(x.min()) and float(x.max()) <= 1
    return seconds


def measure(side, listing, size, bs, passes):
    "One side, in this process; prints seconds per pass and memory as JSON"
    warnings.simplefilter('ignore')
    import numpy as np, torch
    from PIL import Image
    torch.set_num_threads(1)
    files = [Path(f) for f in json.loads(Path(listing).read_text())]
    with tempfile.TemporaryDirectory() as d:
        for i in range(2): Image.fromarray(np.random.default_rng(i).integers(0, 256, (600, 500), dtype=np.uint8)).save(f'{d}/warm{i}.{("png", "jpg")[i]}')
        def loader(fs, folder):
            if side == 'fastai': return fastai_loader(fs, size, bs)
            from covid_cxr.cache import ImageCache
            from covid_cxr.images import ImageRule
            return our_loader(fs, size, bs, ImageCache(f'{d}/{folder}', ImageRule(size)))
        channels = 3 if side == 'fastai' else 1
        one_pass(loader([Path(f'{d}/warm0.png'), Path(f'{d}/warm1.jpg')], 'w'), 2, channels, size)      # what is imported late is imported now
        for f in files: f.read_bytes()
        before, dl = peak_mb(), loader(files, 'c')
        seconds = [one_pass(dl, len(files), channels, size) for _ in range(passes)]
    print(json.dumps(dict(seconds=seconds, mb_before=before, mb_peak=peak_mb())))


def run_side(side, listing, args):
    p = subprocess.run([sys.executable, __file__, '--side', side, '--listing', str(listing), '--size', str(args.size), '--bs', str(args.bs), '--passes', str(args.passes)],
                       capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS='1'))
    if p.returncode: sys.exit(f'{side} failed:\n{p.stderr[-3000:]}')
    return json.loads(p.stdout.strip().splitlines()[-1])


def compare(name, files, args, tmp):
    "Both sides in turns; medians and ratios"
    listing = Path(tmp) / f'{name}.json'
    listing.write_text(json.dumps([str(f) for f in files]))
    runs = {'fastai': [], 'ours': []}
    for _ in range(args.repeats):
        for side in runs: runs[side].append(run_side(side, listing, args))
    rate = lambda side, k: len(files) / statistics.median(s for r in runs[side] for s in r['seconds'][k])
    first, later = slice(0, 1), slice(1, None)
    memory = {s: round(statistics.median(r['mb_peak'] for r in runs[s])) for s in runs}
    out = dict(set=name, files=len(files), mean_kb=round(sum(f.stat().st_size for f in files) / len(files) / 1024),
               fastai_first=rate('fastai', first), fastai_later=rate('fastai', later), ours_first=rate('ours', first), ours_later=rate('ours', later))
    out = {k: round(v, 1) if isinstance(v, float) else v for k, v in out.items()}
    return dict(out, ratio_first=round(rate('ours', first) / rate('fastai', first), 2), ratio_later=round(rate('ours', later) / rate('fastai', later), 2),
                peak_mb_fastai=memory['fastai'], peak_mb_ours=memory['ours'], ratio_memory=round(memory['ours'] / memory['fastai'], 2), runs=runs)


def sets(args, tmp):
    "name -> files"
    data = Path(args.data)
    originals = sorted(f for f in (data / 'originals').rglob('*') if f.is_file())
    covid = sorted(f for f in (data / 'covid-chestxray-dataset' / 'images').glob('*') if f.is_file())
    if not originals or not covid: sys.exit(f'no originals/ and covid-chestxray-dataset/images/ below {data}; give the folder that holds both with --data.')
    copies = []
    for k in range(args.copies):
        (Path(tmp) / f'copy{k}').mkdir()
        for i, f in enumerate(originals): copies.append(Path(shutil.copyfile(f, Path(tmp) / f'copy{k}' / f'{i:02}{f.suffix}')))
    step = max(1, len(covid) // args.sample)
    return {'originals': copies, 'covid-512': covid[::step][:args.sample]}


def cpu_model():
    try: return next(l.split(':', 1)[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name'))
    except (OSError, StopIteration): return platform.processor() or 'unknown'


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', default='../shared/data', help='folder that holds originals/ and covid-chestxray-dataset/images/')
    p.add_argument('--copies', type=int, default=10, help='distinct copies of each original')
    p.add_argument('--sample', type=int, default=330, help='films of the reduced collection')
    p.add_argument('--size', type=int, default=512)
    p.add_argument('--bs', type=int, default=8)
    p.add_argument('--passes', type=int, default=3, help='one first pass and the rest later passes; 2 or more')
    p.add_argument('--repeats', type=int, default=3, help='processes per side')
    p.add_argument('--out', default=str(ROOT / 'benchmarks' / 'results' / 'input_pipeline.json'))
    p.add_argument('--side', choices=['fastai', 'ours'], help=argparse.SUPPRESS)
    p.add_argument('--listing', help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.passes < 2: sys.exit('--passes must be 2 or more: the first pass fills the cache.')
    if args.side: return measure(args.side, args.listing, args.size, args.bs, args.passes)
    from covid_cxr.core import versions, write_json
    with tempfile.TemporaryDirectory() as tmp: results = [compare(name, files, args, tmp) for name, files in sets(args, tmp).items()]
    record = dict(command='python benchmarks/input_pipeline.py ' + ' '.join(sys.argv[1:]), date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
                  machine=dict(cpu=cpu_model(), cores=os.cpu_count(), load_before=round(os.getloadavg()[0], 2)), versions=versions(), size=args.size, bs=args.bs, results=results)
    out = Path(args.out)
    write_json(out, (json.loads(out.read_text()) if out.exists() else []) + [record])
    print(f"{record['command']}\n{record['machine']}\nfilms per second, medians of {args.repeats} processes a side:")
    for r in results:
        print(f"  {r['set']:10} first pass: fastai {r['fastai_first']:7}  ours {r['ours_first']:7}  ratio {r['ratio_first']:5} | later passes: fastai {r['fastai_later']:7}  ours {r['ours_later']:7}  "
              f"ratio {r['ratio_later']:5} | peak MB: fastai {r['peak_mb_fastai']}, ours {r['peak_mb_ours']}")
    print(f'appended to {args.out}')


if __name__ == '__main__': main()
