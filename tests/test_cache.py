"""The image cache: many processes, damage, changed sources, bounds, disks that cannot be written, writers that die."""
import multiprocessing, os, pickle, random, signal, subprocess, sys, time, warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from hypothesis import HealthCheck, given, settings, strategies as st
from conftest import DATA, ROOT, examples, needs_data
from covid_cxr import cache as cache_module, images as images_module
from covid_cxr.cache import CacheWarning, ImageCache, _entries, check_images
from covid_cxr.core import ImageError, new_table, used
from covid_cxr.images import ImageRule, load_image

RULE = ImageRule(64)
ENTRY = 48 + 64 * 64


def draw(path, seed, h=90, w=80):
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h, w), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def files(tmp_path):
    (tmp_path / 'files').mkdir()
    return [draw(tmp_path / 'files' / f'{i:02}.png', i) for i in range(16)]


def entries(folder): return sorted(p for p in Path(folder).rglob('*.cxr') if not p.name.startswith('.'))
def leftovers(folder): return [p for p in Path(folder).rglob('*') if p.name.startswith('.')]


def right(cache, files): return all(np.array_equal(cache.get(f), load_image(f, cache.rule)) for f in files)


@pytest.mark.parametrize('rule', [RULE, ImageRule(100, 'crop'), ImageRule(33, 'squash', 'minmax')])
def test_first_and_later_readings_are_what_load_image_makes(rule, files, tmp_path):
    cache = ImageCache(tmp_path / 'c', rule)
    for _ in range(3): assert right(cache, files)
    s = cache.stats()
    assert (s.misses, s.hits, s.entries, s.damaged, s.evicted) == (16, 32, 16, 0, 0)
    assert s.bytes == 16 * (48 + rule.size ** 2) and leftovers(cache.folder) == []
    again = ImageCache(tmp_path / 'c', rule)
    assert right(again, files) and again.stats().misses == 0


@settings(max_examples=examples(200), deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_is_ever_trusted(data, tmp_path):
    image = tmp_path / 'a.png'
    if not image.exists(): draw(image, 1)
    cache = ImageCache(tmp_path / 'c', RULE)
    want = cache.get(image).copy()
    entry, = entries(cache.folder)
    whole = entry.read_bytes()
    b = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        what = data.draw(st.sampled_from(['flip', 'cut', 'put', 'zero']))
        at = min(data.draw(st.one_of(st.integers(0, 60), st.integers(0, len(whole)))), max(len(b) - 1, 0))
        if what == 'flip' and b: b[at] ^= 1 << data.draw(st.integers(0, 7))
        elif what == 'cut': del b[at:]
        elif what == 'put': b[at:at] = data.draw(st.binary(min_size=1, max_size=5))
        else: b[at:at + 500] = bytes(len(b[at:at + 500]))
    entry.write_bytes(b)
    before = cache.stats().damaged
    assert np.array_equal(cache.get(image), want)
    assert cache.stats().damaged == before + (bytes(b) != whole)
    assert entry.read_bytes() == whole                                       # made anew


def test_an_entry_in_another_entrys_place_is_not_believed(files, tmp_path):
    cache = ImageCache(tmp_path / 'c', RULE)
    right(cache, files)
    a, b = entries(cache.folder)[:2]
    a.write_bytes(b.read_bytes())
    assert right(cache, files) and cache.stats().damaged == 1


def test_a_changed_source_is_noticed(files, tmp_path):
    cache = ImageCache(tmp_path / 'c', RULE)
    right(cache, files)
    f = files[0]
    draw(f, 99)                                                              # other pixels, new date
    assert np.array_equal(cache.get(f), load_image(f, RULE))
    pixels = np.asarray(Image.open(f))
    Image.fromarray(pixels).save(f, compress_level=0)
    old, _ = os.stat(f), cache.get(f)
    Image.fromarray(pixels[::-1]).save(f, compress_level=0)                  # other pixels in as many bytes,
    os.utime(f, ns=(old.st_atime_ns, old.st_mtime_ns))                       # and the date set back
    assert (os.stat(f).st_size, os.stat(f).st_mtime_ns) == (old.st_size, old.st_mtime_ns)
    assert np.array_equal(cache.get(f), load_image(f, RULE))
    os.replace(files[1], f)                                                  # another file moved into its place
    assert np.array_equal(cache.get(f), load_image(f, RULE))
    f.unlink()
    with pytest.raises(ImageError, match=f.name): cache.get(f)               # a source that is gone is not served from memory


def test_strict_knows_a_file_by_its_bytes(files, tmp_path):
    cache = ImageCache(tmp_path / 'c', RULE, strict=True)
    cache.get(files[0])
    copy = tmp_path / 'copy.png'
    copy.write_bytes(files[0].read_bytes())
    os.utime(files[0])
    cache.get(copy), cache.get(files[0])
    assert (cache.stats().entries, cache.stats().hits) == (1, 2)
    copy.write_bytes(files[1].read_bytes())
    assert np.array_equal(cache.get(copy), load_image(files[1], RULE))


def test_another_rule_code_version_or_pillow_makes_other_entries(files, tmp_path, monkeypatch):
    for rule in (RULE, ImageRule(64, 'crop'), ImageRule(64, 'pad', 'minmax'), ImageRule(65)):
        assert right(ImageCache(tmp_path / 'c', rule), files[:3])
    assert len(entries(tmp_path / 'c')) == 12
    cache = ImageCache(tmp_path / 'c', RULE)
    monkeypatch.setattr(images_module, 'VERSION', 99)
    cache.get(files[0])
    monkeypatch.setattr(cache_module.PIL, '__version__', '0.0')
    cache.get(files[0])
    assert cache.stats().hits == 0 and len(entries(tmp_path / 'c')) == 14


def _work(folder, files, seed, max_bytes, queue):
    "One of several processes: read everything three times in its own order, count wrong pictures"
    rng, wrong = random.Random(seed), 0
    cache = ImageCache(folder, RULE, max_bytes=max_bytes)
    want = {f: load_image(f, RULE) for f in files}
    for _ in range(3):
        rng.shuffle(files)
        wrong += sum(not np.array_equal(cache.get(f), want[f]) for f in files)
    queue.put((wrong, cache.stats()))


@pytest.mark.parametrize('room', [1000, 6])
def test_processes_share_one_folder(room, files, tmp_path):
    "Four fresh processes at once, with room for all and with room for six of sixteen"
    ctx = multiprocessing.get_context('spawn')
    queue = ctx.Queue()
    ps = [ctx.Process(target=_work, args=(str(tmp_path / 'c'), [str(f) for f in files], i, room * ENTRY, queue)) for i in range(4)]
    for p in ps: p.start()
    out = [queue.get(timeout=60) for _ in ps]
    for p in ps: p.join(60)
    assert [p.exitcode for p in ps] == [0] * 4 and [wrong for wrong, _ in out] == [0] * 4
    assert all(s.writable and s.damaged == 0 for _, s in out)
    assert leftovers(tmp_path / 'c') == []
    n = len(entries(tmp_path / 'c'))
    assert n == 16 if room == 1000 else n <= 6 + 4                          # at most one entry over for each process
    assert all(p.stat().st_size == ENTRY for p in entries(tmp_path / 'c'))


def test_threads_share_one_cache(files, tmp_path):
    cache = ImageCache(tmp_path / 'c', RULE, max_bytes=8 * ENTRY)
    want = {f: load_image(f, RULE) for f in files}
    with ThreadPoolExecutor(8) as pool: assert all(pool.map(lambda f: np.array_equal(cache.get(f), want[f]), files * 10))
    assert cache.stats().hits + cache.stats().misses == 160


def test_the_bound_holds_and_the_longest_unused_go_first(files, tmp_path):
    cache = ImageCache(tmp_path / 'c', RULE, max_bytes=10 * ENTRY)
    for f in files:
        cache.get(f)
        assert sum(p.stat().st_size for p in entries(cache.folder)) <= cache.max_bytes
    cache = ImageCache(tmp_path / 'd', RULE, max_bytes=10 * ENTRY)
    for f in files[:10]: cache.get(f)
    for p in entries(cache.folder): os.utime(p, (1, 1))
    for f in files[:5]: cache.get(f)                                          # these five are wanted again
    for f in files[10:14]: cache.get(f)
    before = cache.stats()
    for f in files[:5]: cache.get(f)
    assert cache.stats().hits == before.hits + 5 and before.evicted >= 4


def test_files_of_others_in_the_folder_are_left_alone(files, tmp_path):
    folder = tmp_path / 'c'
    mine = [folder / 'note.txt', folder / '64-pad-none' / 'note.cxr', folder / '64-pad-none' / 'a' / 'note.cxr',
            folder / 'x' / 'a' / '.hidden.txt']
    for p in mine:
        p.parent.mkdir(parents=True, exist_ok=True)
        p.write_text('mine')
        os.utime(p, (1, 1))
    cache = ImageCache(folder, RULE, max_bytes=2 * ENTRY)
    for f in files: cache.get(f)
    assert all(p.read_text() == 'mine' for p in mine) and cache.stats().evicted > 0


WRITER = """
import sys
from covid_cxr.cache import ImageCache
from covid_cxr.images import ImageRule
i, files = 0, sys.argv[2:]
print('ready', flush=True)
while True:
    for f in files: ImageCache(sys.argv[1], ImageRule(1500 + i % 200)).get(f)
    i += 1
"""


def test_a_killed_writer_leaves_nothing_that_is_trusted(files, tmp_path):
    "SIGKILL in the middle of writing, several times: whatever stands under a final name is whole"
    rng, folder = random.Random(0), tmp_path / 'c'
    for _ in range(4):
        p = subprocess.Popen([sys.executable, '-c', WRITER, str(folder), *map(str, files[:4])], stdout=subprocess.PIPE, cwd=ROOT)
        assert p.stdout.readline() == b'ready\n'
        time.sleep(.1 + rng.random() * .3)
        p.send_signal(signal.SIGKILL)
        p.wait(20)
        p.stdout.close()
    assert len(entries(folder)) > 4
    for e in entries(folder):
        size = int(e.parent.parent.name.split('-')[0])
        assert cache_module._unpack(np.fromfile(e, np.uint8), size, bytes.fromhex(e.parent.name + e.stem)) is not None
    left = folder / '64-pad-none' / 'a' / '.0123456789abcdef-0011223344556677.cxr'     # as a killed writer leaves it
    left.parent.mkdir(parents=True)
    left.write_bytes(b'half')
    list(_entries(folder))
    assert left.exists()                                                      # perhaps its writer is alive
    os.utime(left, (1, 1))
    list(_entries(folder))
    assert not left.exists() and right(ImageCache(folder, RULE), files)


def test_a_folder_that_cannot_be_made_costs_one_warning(files, tmp_path):
    (tmp_path / 'file').write_text('x')
    with pytest.warns(CacheWarning, match='file') as seen:
        cache = ImageCache(tmp_path / 'file' / 'c', RULE)
        assert right(cache, files) and right(cache, files)
        assert right(pickle.loads(pickle.dumps(cache)), files)
    assert len(seen) == 1 and cache.stats().writable is False and cache.stats().hits == 0


FULL = """
import resource, sys, warnings
import numpy as np
from covid_cxr.cache import CacheWarning, ImageCache
from covid_cxr.images import ImageRule, load_image
cache = ImageCache(sys.argv[1], ImageRule(64))
cache.get(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))       # from here on no file may grow beyond 1000 bytes
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter('always')
    ok = all(np.array_equal(cache.get(f), load_image(f, cache.rule)) for f in sys.argv[2:])
print(ok, len(seen), all(w.category is CacheWarning for w in seen), cache.stats().hits, cache.stats().writable)
"""


def test_a_disk_that_is_full_costs_one_warning_and_old_entries_still_serve(files, tmp_path):
    p = subprocess.run([sys.executable, '-c', FULL, str(tmp_path / 'c'), *map(str, files)], capture_output=True, text=True, cwd=ROOT,
                       timeout=60)
    assert p.stdout.split() == ['True', '1', 'True', '1', 'False'], p.stderr[-2000:]
    assert leftovers(tmp_path / 'c') == [] and len(entries(tmp_path / 'c')) == 1


def test_a_copy_where_the_folder_is_not_writes_nothing(files, tmp_path):
    "An exported Learner carries its cache to machines that never had the folder"
    cache = ImageCache(tmp_path / 'c', RULE)
    cache.get(files[0])
    sent = pickle.dumps(cache)
    assert len(sent) < 1000
    (tmp_path / 'c').rename(tmp_path / 'elsewhere')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        copy = pickle.loads(sent)
        assert right(copy, files)
    assert not (tmp_path / 'c').exists() and copy.rule == RULE


class _Files:
    "A torch data set over a cache"
    def __init__(self, cache, files): self.cache, self.files = cache, files
    def __len__(self): return len(self.files)
    def __getitem__(self, i): return self.cache.get(self.files[i])


def test_workers_of_a_data_loader_share_it(files, tmp_path):
    import torch
    cache = ImageCache(tmp_path / 'c', RULE)
    want = np.stack([load_image(f, RULE) for f in files])
    for _ in range(2):
        dl = torch.utils.data.DataLoader(_Files(cache, files), batch_size=4, num_workers=2)
        assert np.array_equal(torch.cat(list(dl)).numpy(), want)
    assert len(entries(tmp_path / 'c')) == 16 and leftovers(tmp_path / 'c') == []


def table(files): return new_table([dict(image_id=Path(f).name, path=str(f)) for f in files], 'mine')


def test_an_unreadable_image_is_excluded_by_name_and_never_replaced(files, tmp_path):
    files[3].write_bytes(files[3].read_bytes()[:500])
    files[7].write_text('<html>not found</html>')
    files[9].unlink()
    t = table(files)
    with pytest.raises(ImageError) as e: check_images(t, RULE)
    assert all(files[i].name in str(e.value) for i in (3, 7, 9)) and '3 of 16' in str(e.value)
    for cache in (None, ImageCache(tmp_path / 'c', RULE)):
        done = check_images(t, RULE, cache, on_bad='exclude', workers=3)
        assert list(np.flatnonzero(done['excluded'].notna())) == [3, 7, 9] and len(done) == 16 and len(used(done)) == 13
        assert done['excluded'].dropna().str.startswith('image unreadable: ').all()
        assert [w in done['excluded'][i] for i, w in ((3, 'truncated PNG'), (7, 'web page'), (9, 'no such file'))] == [True] * 3
        assert t['excluded'].isna().all()
    assert cache.stats().entries == 13                                     # filled on the way, and nothing stands for the unreadable three
    assert set(cache.warm(files, on_bad='exclude')) == {files[i] for i in (3, 7, 9)}
    with pytest.raises(ImageError, match='3 of 16'): cache.warm(files)
    assert check_images(done, RULE, cache).equals(done)


def test_many_unreadable_images_make_one_short_sentence(tmp_path):
    with pytest.raises(ImageError) as e: check_images(table([tmp_path / f'{i}.png' for i in range(50)]), RULE)
    assert '50 of 50' in str(e.value) and 'and 45 more' in str(e.value) and len(str(e.value)) < 1500


@needs_data
def test_real_images_from_the_cache_are_the_images_decoded(tmp_path):
    files = sorted((DATA / 'covid-chestxray-dataset' / 'images').iterdir())[::12]
    files += sorted(f for f in (DATA / 'originals').rglob('*') if f.is_file())
    cache = ImageCache(tmp_path / 'c', ImageRule(224))
    assert cache.warm(files, workers=2) == {}
    assert right(cache, files[::3]) and cache.stats().hits == len(files[::3]) and cache.stats().misses == len(files)
