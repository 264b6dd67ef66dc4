"""What the input check declines, kind by kind on real files: the check of pixels alone beside the check that also asks the network.

    python benchmarks/input_check.py RUN [RUN ...]      about two minutes on one core for each run; --layers: three more

RUN: finished runs of one network on real radiographs. The check of pixels is that of the bundle, at the limit that it has alone. The new
check is fitted as a training does it: on training images of the run, through the network of the run. Good images of the training place are
those of the validation and test splits; other hospitals, children, lateral views and CT slices come from the collections; photographs from
the packages scikit-image and scikit-learn. Known-wrong images are made of held-out ones. One image of each patient, except held-out images
and CT slices. Intervals are over patients. The result of each run replaces its own entry in benchmarks/results/input_check.json.
"""
import argparse, json
from pathlib import Path
from record import RESULTS, about, machine, write_result
import numpy as np, pandas as pd, torch
from PIL import Image, ImageDraw
from covid_cxr.bundle import load_model, read_bundle
from covid_cxr.core import CxrError, choices, data_folder, used
from covid_cxr.evaluate import patient_wilson
from covid_cxr.images import ImageRule, apply_rule, read_picture
from covid_cxr.model.network import middle_encoder
from covid_cxr.model.settings import MEAN, STD
from covid_cxr.ood import (FeatureCheck, InputCheck, OODCheck, OODKind, check_colour, fit_feature_check, make_ood_images, make_wrong,
                           widen_check)
from covid_cxr.runs.folder import RunFolder
from covid_cxr.sources import read_covid_chestxray, read_kaggle_pneumonia, read_nih

OUT = RESULTS / 'input_check.json'
FITTED, MOST, CHANGED, LAYERED, DRAWN = 200, 80, 30, 48, 8    # images: fitted, of a set, made wrong, at two layers, drawn of each kind


# ---- sets of files
def there(rows): return rows[rows['path'].map(lambda p: isinstance(p, str) and Path(p).is_file())]


def one_each(rows, seed=0):
    "One image of each patient, in a random order"
    return there(rows).sample(frac=1, random_state=seed).drop_duplicates('patient').head(MOST)


def collections(data, known):
    "{kind: rows} of real radiographs, without patients that the run trained on"
    covid = read_covid_chestxray(data)
    frontal, nih = used(covid), used(read_nih(Path(data) / 'nih-chest-xrays'))
    kaggle = used(read_kaggle_pneumonia(Path(data) / 'chest-xray-pneumonia'))
    sets = {'NIH adults': nih[nih['age_years'] >= 18], 'NIH children': nih[nih['age_years'] < 18], 'Kaggle children': kaggle,
            'COVID collection, PA': frontal[frontal['view'] == 'PA'],
            'COVID collection, AP': frontal[frontal['view'].isin(['AP', 'AP Supine'])],
            'COVID collection, lateral': covid[covid['view'] == 'L']}
    found = {name: one_each(rows[~rows['patient'].isin(known)]) for name, rows in sets.items()}
    found['COVID collection, CT slices'] = there(covid[covid['modality'] == 'CT'])
    return {name: rows for name, rows in found.items() if len(rows)}


def photographs():
    "Files of pictures that come with two Python packages"
    import skimage, sklearn
    folders = Path(skimage.__file__).parent / 'data', Path(sklearn.__file__).parent / 'datasets' / 'images'
    return sorted(f for folder in folders for f in folder.iterdir() if f.suffix in ('.png', '.jpg', '.jpeg', '.tif', '.gif'))


def pages(n, rule, seed=0):
    "Printed pages"
    r, out = np.random.default_rng(seed), []
    words = Path(__file__).read_text(encoding='utf-8').split()
    for _ in range(n):
        page = Image.new('L', (420, 594), 250)
        lines = '\n'.join(' '.join(r.choice(words, 8)) for _ in range(int(r.integers(20, 45))))
        ImageDraw.Draw(page).multiline_text((30, 30), lines, fill=20)
        out.append(apply_rule(np.asarray(page), rule))
    return out


# ---- what is declined
def share(hits, patients):
    e = patient_wilson(hits, patients)
    return dict(share=round(e.value, 4), low=round(e.low, 4), high=round(e.high, 4))


class Checks:
    "The check of pixels as it is alone, and the new one"
    def __init__(self, alone, both): self.alone, self.both = alone, both

    def measure(self, images, patients, good, coloured=None):
        "Shares declined of one set"
        coloured = np.zeros(len(images), bool) if coloured is None else coloured
        pixels = np.array([self.alone.check(a) is not None for a in images])
        new, features = self.both.score(images) > 1, self.both.encode(images)
        out = dict(images=len(images), patients=len(set(patients)), good=good, pixels_alone=share(pixels | coloured, patients),
                   new=share(new | coloured, patients), by_network_alone=share(self.both.features.score(features) > 1, patients))
        print({k: v if not isinstance(v, dict) else v['share'] for k, v in out.items()}, flush=True)
        return out


def read_set(rows, rule):
    "(pixels, patients) of the files that can be read"
    found = []
    for path, patient in zip(rows['path'], rows['patient'].fillna(rows['image_id'])):
        try: found.append((read_picture(path, rule).pixels, patient))
        except CxrError as e: print(str(e)[:120])
    return [a for a, _ in found], [p for _, p in found]


def photo_set(rule):
    "(pixels, are its colours a reason?) of photographs"
    found = []
    for f in photographs():
        try: p = read_picture(f, rule)
        except CxrError: continue
        found.append((p.pixels, check_colour(p.colour_share) is not None))
    return [a for a, _ in found], np.array([c for _, c in found])


def made_wrong(held, checks):
    "{kind: shares} of held-out images made wrong"
    kinds = {'inverted': lambda a: 255 - a, 'turned by 180 degrees': lambda a: a[::-1, ::-1],
             'turned by 90 degrees left': lambda a: np.rot90(a), 'turned by 90 degrees right': lambda a: np.rot90(a, 3),
             'a part': lambda a: make_wrong(a, 'a part', int(a[5, 5])), 'left and right exchanged': lambda a: a[:, ::-1]}
    return {f'held out, {k}': checks.measure([np.ascontiguousarray(f(a)) for a in held[0]], held[1], False) for k, f in kinds.items()}


def no_radiographs(rule, checks):
    "{kind: shares} of pictures that are no radiographs"
    photos, coloured = photo_set(rule)
    out = {'photographs, with the rule of colours': checks.measure(photos, range(len(photos)), False, coloured),
           'photographs, in grey': checks.measure(photos, range(len(photos)), False)}
    text = pages(2 * DRAWN, rule)
    out['printed pages'] = checks.measure(text, range(len(text)), False)
    for names, label in ((('black', 'white'), 'blank'), ([k for k in choices(OODKind) if k not in ('black', 'white')], 'drawn pictures')):
        images = [a for k in names for a in make_ood_images(k, DRAWN, rule.size, seed=99)]
        out[label] = checks.measure(images, range(len(images)), False)
    return out


# ---- half-way or at the end?
def end_encoder(model):
    "Mean of the last maps of a network"
    def some(images):
        x = (torch.from_numpy(np.stack(images))[:, None].float() / 255 - MEAN) / STD
        with torch.inference_mode(): return model[0](x).mean((2, 3)).numpy()
    return lambda images: np.concatenate([some(images[i:i + 16]) for i in range(0, len(images), 16)])


def layers(model, images, groups, held, seed):
    "What two layers tell of held-out images and of the same made wrong: shares beyond each of the limits"
    changed = {'held out': held, 'inverted': [255 - a for a in held], 'turned by 180 degrees': [a[::-1, ::-1] for a in held],
               'turned by 90 degrees': [np.rot90(a) for a in held]}
    out = {}
    for name, encode in (('half-way', middle_encoder(model, images[0].shape[0])), ('at the end', end_encoder(model))):
        check = fit_feature_check(images, encode, groups, seed=seed)
        own = np.quantile(check.distance(encode(held)), .98)             # the same cost for both
        out[name] = dict(features=len(check.mean))
        for kind, pictures in changed.items():
            x = encode([np.ascontiguousarray(a) for a in pictures])
            declined, by_distance = float((check.score(x) > 1).mean()), float((check.distance(x) > own).mean())
            out[name][kind] = dict(declined=round(declined, 4), by_distance=round(by_distance, 4))
        print(name, out[name], flush=True)
    return out


# ---- one run
def measure(folder, data, two_layers=False):
    run = RunFolder.open(folder)
    bundle, seed = read_bundle(run.path), run.recipe.seed
    model, rule, alone = load_model(bundle), ImageRule.from_dict(bundle['image']), OODCheck.from_dict(bundle['ood_check'])
    if bundle.get('feature_check') is not None: raise SystemExit(f'{folder} has the new check already; name a run of an earlier version.')
    table = used(run.table)
    train = table[table['split'] == 'train']
    few = train.sample(min(len(train), FITTED), random_state=seed)
    images, groups = read_set(few, rule)
    encode = middle_encoder(model, rule.size)
    features: FeatureCheck = fit_feature_check(images, encode, groups, seed=seed)
    checks = Checks(alone, InputCheck(widen_check(alone), features, encode))
    size = len(json.dumps(features.to_dict()))
    print(run.path.name, 'fitted on', features.n, 'images;', size, 'characters', flush=True)
    held = table[table['split'] != 'train']
    own = read_set(held.sample(min(len(held), 2 * MOST), random_state=0), rule)
    sets = {'held out': checks.measure(*own, True)}
    for name, rows in collections(data, set(train['patient'])).items():
        sets[name] = checks.measure(*read_set(rows, rule), not name.endswith(('lateral', 'CT slices')))
    some = own[0][:CHANGED], own[1][:CHANGED]
    sets |= made_wrong(some, checks) | no_radiographs(rule, checks)
    found = dict(recipe=run.recipe.name, collections=sorted(set(train['source'])), arch=bundle['arch'],
                 started_from=bundle['weights'].get('started_from'), size=rule.size, fitted_on=features.n, characters=size,
                 features=len(features.mean), keep=features.keep, sets=sets)
    return found | (dict(layers=layers(model, images[:LAYERED], groups[:LAYERED], own[0][:CHANGED], seed)) if two_layers else {})


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('runs', nargs='+', metavar='RUN', help='finished runs')
    p.add_argument('--data', default=str(data_folder()), help='folder of the collections')
    p.add_argument('--layers', action='store_true', help='also compare half-way with the end of the network')
    p.add_argument('--out', default=str(OUT))
    a = p.parse_args()
    torch.set_num_threads(1)
    for folder in a.runs:
        kept = json.loads(Path(a.out).read_text(encoding='utf-8'))['runs'] if Path(a.out).is_file() else {}
        write_result(a.out, dict(about(), machine=machine(), runs={**kept, Path(folder).name: measure(folder, a.data, a.layers)}))
