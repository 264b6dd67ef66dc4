"""How well the network of `covid_cxr.model.lungs` finds lungs: five folds by patient, then one network on other collections.

    python benchmarks/lungs.py                  the five folds (40 CPU minutes; a stopped command goes on where it was)
    python benchmarks/lungs.py --final FOLDER   train on all hand-drawn masks, write the network to FOLDER, try it on children and NIH

Images and masks are padded to 192 x 192 pixels. The number of epochs is fixed and the last weights are kept, so nothing is chosen on the
images that are measured. The result is benchmarks/results/lungs.json; each command replaces its own half. The licence of the hand-drawn
masks was not verified: the network may not be handed on.
"""
import argparse, json, time
from collections import Counter
from pathlib import Path
from record import RESULTS, ROOT, about, machine, write_result
import numpy as np, pandas as pd, torch
from covid_cxr.audit.baselines import estimate_auc, split_scores
from covid_cxr.audit.regions import blacken, common_lungs, dilate_masks, lung_box
from covid_cxr.core import choices, data_folder, used, write_json
from covid_cxr.images import ImageRule, fit_to, load_image
from covid_cxr.model.lungs import (AREA, SMALLER_LUNG, LungFault, boundary_error, dice, find_lung_masks, find_lungs, load_lung_net,
                                   lung_fault, read_lung_masks, save_lung_net, train_lung_net)
from covid_cxr.sources import read_covid_chestxray, read_kaggle_pneumonia, read_nih
from covid_cxr.stats.bootstrap import patient_mean, patient_wilson
from covid_cxr.table import fold_by_group, group_leaksafe

OUT, WORK = RESULTS / 'lungs.json', ROOT / 'runs' / 'lungs'
SETTINGS = dict(size=192, epochs=10, bs=8, seed=0, weights='imagenet')
FOLDS, COARSE, SAMPLE = 5, 64, 150
VISIBLE = .10      # of the lungs: more than this outside the box counts as seen
NOTE = ('Trained on the hand-drawn lung masks of the COVID collection, whose licence was not verified: not to be handed on. '
        'Heart shadow and lung behind the diaphragm count as lung.')


def read_rows(data, work):
    "The images with a hand-drawn mask, with group, fold and machine-made mask"
    table = group_leaksafe(read_covid_chestxray(data), cache_file=Path(work) / 'fingerprints.npz')
    group = dict(zip(table['image_id'], table['group']))
    rows = find_lung_masks(data)
    rows = rows.assign(group=rows['image_id'].map(group), label=rows['view'], split=np.nan)
    machine_made = find_lung_masks(data, 'machine-made').set_index('image_id')['mask']
    return fold_by_group(rows, FOLDS).assign(machine_made=rows['image_id'].map(machine_made))


# ---- folds
class Clock:
    "CPU seconds of a training, kept in a file over stops"
    def __init__(self, file):
        self.file, self.start = Path(file), time.process_time()
        self.before = json.loads(self.file.read_text()) if self.file.exists() else 0.

    def log(self, line):
        print(line, flush=True)
        write_json(self.file, self.before + time.process_time() - self.start)


def against(found, masks, prefix=''):
    "Columns of measures, rounded"
    distance = boundary_error(found, masks)
    columns = dict(dice=dice(found, masks), boundary=distance.mean, boundary_p95=distance.p95)
    return {prefix + k: np.round(v, 4) for k, v in columns.items()}


def coarse_dice(net, data):
    "Dice of lungs found in pictures of 64 pixels"
    images = np.stack([fit_to(x, COARSE) for x in data.images])
    masks = np.stack([fit_to(255 * m.astype(np.uint8), COARSE) > 127 for m in data.masks])
    return np.round(dice(find_lungs(net, images), masks), 4)


def measure_fold(rows, k, work):
    "Train on the other folds; measures of the images of this one"
    file, folder = Path(work) / f'fold{k}.json', Path(work) / f'fold{k}'
    if file.exists(): return pd.DataFrame(json.loads(file.read_text()))
    learn, held = (read_lung_masks(r, SETTINGS['size']) for r in (rows[rows['fold'] != k], rows[rows['fold'] == k]))
    net = train_lung_net(*learn, folder=folder, log=Clock(Path(work) / f'seconds{k}.json').log, **SETTINGS)
    mine, found = rows[rows['fold'] == k], find_lungs(net, held.images)
    out = pd.DataFrame(dict(image_id=mine['image_id'].to_numpy(), fold=k, view=mine['view'].to_numpy(), **against(found, held.masks),
                            dice_64=coarse_dice(net, held), fault=[lung_fault(m) for m in found]))
    both = mine['machine_made'].notna().to_numpy()
    other = read_lung_masks(mine[both].assign(mask=mine['machine_made'][both]), SETTINGS['size']).masks
    for name, v in {**against(found[both], other, 'machine_'), 'hand_machine_dice': np.round(dice(held.masks[both], other), 4)}.items():
        out.loc[both, name] = v
    write_json(file, out.to_dict('list'))
    print(f'fold {k}: Dice {out["dice"].mean():.3f}, at {COARSE} pixels {out["dice_64"].mean():.3f}', flush=True)
    return out


MEASURES = ('dice', 'boundary', 'boundary_p95', 'dice_64', 'machine_dice', 'machine_boundary', 'machine_boundary_p95', 'hand_machine_dice')


def summarise(t, n_boot=2000):
    "Mean and interval over patients of every measure; t: columns of lists, with patient"
    t = pd.DataFrame(t)
    def worst(v): return float(v.min() if 'dice' in v.name else v.max())
    def one(values, rows):
        known = rows[values].notna()
        e = patient_mean(rows[values][known].astype(float), rows['patient'][known], n_boot)
        return dict(mean=round(e.value, 4), low=round(e.low, 4), high=round(e.high, 4), images=int(known.sum()),
                    patients=int(rows['patient'][known].nunique()), worst=worst(rows[values]))
    views = {view: one('dice', t[t['view'] == view]) for view in sorted(t['view'].unique())}
    return dict({m: one(m, t) for m in MEASURES}, dice_by_view=views)


def run_folds(data, work):
    rows = read_rows(data, work)
    found = pd.concat([measure_fold(rows, k, work) for k in range(FOLDS)], ignore_index=True)
    group = found['image_id'].map(dict(zip(rows['image_id'], rows['group'])))
    found = found.drop(columns='image_id').assign(patient=pd.factorize(group)[0])
    seconds = sum(json.loads((Path(work) / f'seconds{k}.json').read_text()) for k in range(FOLDS))
    images = {c: [None if v != v else v for v in found[c]] for c in ('patient', 'fold', 'view', 'fault', *MEASURES)}
    return dict(about(), machine=machine(), settings=SETTINGS, cpu_minutes=round(seconds / 60, 1), images=images, summary=summarise(images))


# ---- other collections
def shown(e): return dict(mean=round(e.value, 4), low=round(e.low, 4), high=round(e.high, 4))


def sample(table, n=SAMPLE, seed=0):
    "One image of each of n patients"
    rows = used(table)
    rows = rows[rows['path'].notna()].sample(frac=1, random_state=seed).drop_duplicates('patient')
    return rows.head(n).sort_values('image_id')


def collections(data):
    "Rows of other collections, how their pictures become square, and what they are"
    adults = read_nih(Path(data) / 'nih-chest-xrays')
    return {'Kaggle children, 224 x 224': (sample(read_kaggle_pneumonia(Path(data) / 'chest-xray-pneumonia')), 'squash'),
            'NIH adults, 256 x 256': (sample(adults[adults['age_years'] >= 18]), 'pad')}


def outside_box(masks):
    "Share of each mask's lung pixels that the box of the audit leaves visible"
    box = lung_box(*masks.shape[1:])
    return (masks & ~box).sum((1, 2)) / masks.sum((1, 2))


def measure_outside(masks, patients):
    "What the box leaves visible: mean with interval over patients, and how often it is much"
    share = outside_box(masks)
    mean, often = patient_mean(share, patients), patient_wilson(share > VISIBLE, patients)
    return dict(images=len(masks), visible=shown(mean), largest=round(float(share.max()), 4), share_above=dict(shown(often), above=VISIBLE))


def try_elsewhere(net, data, pictures=None):
    "Faults of the found lungs, and what the box leaves visible of them, by collection"
    out = {}
    for name, (rows, how) in collections(data).items():
        images = np.stack([load_image(p, ImageRule(net.size, how)) for p in rows['path']])
        start = time.process_time()
        found = find_lungs(net, images)
        seconds = (time.process_time() - start) / len(images)
        faults = np.array([lung_fault(m) for m in found])
        counts = Counter(faults)
        good = faults == 'none'
        rate = shown(patient_wilson(~good, rows['patient']))
        area = np.round(np.quantile(found[good].mean((1, 2)), [.05, .5, .95]), 3).tolist()
        out[name] = dict(images=len(images), faults={f: counts.get(f, 0) for f in choices(LungFault)}, failure_rate=rate,
                         seconds_per_image=round(seconds, 4), area=area,
                         box=measure_outside(found[good], rows['patient'][good]))
        if pictures: np.savez(Path(pictures) / f'{name.split()[0]}.npz', images=images, found=found, faults=faults)
    return out


CHILDREN, BASELINE, SEEDS = 600, 64, 5     # images, one per child; pixels that a small network sees; networks whose mean scores


def measure_outline(net, data):
    "Children, half to learn from: what the outline of the found lungs tells by itself, and what is told with lungs hidden in four ways"
    rows = sample(read_kaggle_pneumonia(Path(data) / 'chest-xray-pneumonia'), CHILDREN)
    images = np.stack([load_image(p, ImageRule(net.size, 'squash')) for p in rows['path']])
    shrink = lambda x: np.stack([fit_to(one, BASELINE, 'squash') for one in x])
    small, masks = shrink(images), shrink(255 * find_lungs(net, images).astype(np.uint8)) > 127
    wide, box, region = dilate_masks(masks, shape='diamond'), lung_box(BASELINE, BASELINE), common_lungs(masks)
    seen = {'the outline of the lungs alone': 255 * wide.astype(np.uint8), 'all outside the lungs': blacken(small, wide),
            'all outside the box and the lungs': blacken(small, wide | box), 'all outside the box': blacken(small, box),
            'all outside one region for all': blacken(small, region)}
    y = (rows['finding'] != 'No Finding').to_numpy().astype(int)
    learn = np.random.default_rng(0).permutation(len(y)) < len(y) // 2
    mean_score = lambda x: np.mean([split_scores(x, y, learn, ~learn, 'small_cnn', seed) for seed in range(SEEDS)], 0)
    auc = {name: estimate_auc(y[~learn], mean_score(x)) for name, x in seen.items()}
    hidden = dict(box=round(float(box.mean()), 4), region=round(float(region.mean()), 4))
    counts = dict(seeds=SEEDS, learned=int(learn.sum()), evaluated=int((~learn).sum()))
    return dict(counts, hidden=hidden, auc={name: shown(e) for name, e in auc.items()})


def run_final(data, work, folder, pictures=None):
    rows = find_lung_masks(data)
    drawn = read_lung_masks(rows, SETTINGS['size'])
    clock = Path(work) / 'seconds_final.json'
    net = train_lung_net(*drawn, folder=Path(work) / 'final', log=Clock(clock).log, **SETTINGS)
    net.trained_on = dict(net.trained_on, masks='hand-drawn (v7labs-lung-masks)', patients=int(rows['patient'].nunique()))
    net = load_lung_net(save_lung_net(net, folder, NOTE))
    own = measure_outside(drawn.masks, rows['patient'])
    return dict(about(), machine=machine(), settings=SETTINGS, cpu_minutes=round(json.loads(clock.read_text()) / 60, 1), network=net.name,
                megabytes=round(sum(f.stat().st_size for f in Path(folder).iterdir()) / 1e6, 2),
                bounds=dict(area=AREA, smaller_lung=SMALLER_LUNG, hand_drawn_outside=sum(lung_fault(m) != 'none' for m in drawn.masks)),
                box_on_hand_drawn=own, collections=try_elsewhere(net, data, pictures), outline=measure_outline(net, data))


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', default=str(data_folder()), help='folder of the collections')
    p.add_argument('--work', default=str(WORK), help='checkpoints and fingerprints')
    p.add_argument('--final', metavar='FOLDER', help='train on all masks, write the network there, and try it on other collections')
    p.add_argument('--pictures', metavar='DIR', help='with --final: also write images and found lungs there, to look at')
    p.add_argument('--out', default=str(OUT))
    a = p.parse_args()
    torch.set_num_threads(1)
    Path(a.work).mkdir(parents=True, exist_ok=True)
    half = dict(final=run_final(a.data, a.work, a.final, a.pictures)) if a.final else dict(folds=run_folds(a.data, a.work))
    kept = json.loads(Path(a.out).read_text(encoding='utf-8')) if Path(a.out).exists() else {}
    write_result(a.out, {**kept, **half})
    print(json.dumps(half.get('final') or half['folds']['summary'], indent=1))
