"""What the out-of-distribution check lets through, on real images: fitted on the training images of covid-2020, evaluated on the rest.

    python benchmarks/ood_check.py --cache CACHE

Images that should pass are those of the valid and test splits. Others are lateral images and CT slices of the same collection, frontal
images of other kinds (AP, another hospital), pictures that are no radiographs, and left-out images made wrong. The result replaces
benchmarks/results/ood_check.json (before November 2026: input_gate.json).
"""
import argparse, json
from pathlib import Path
from record import RESULTS, about, write_result
import numpy as np
from covid_cxr.core import choices, data_folder, used
from covid_cxr.images import ImageRule, load_image
from covid_cxr.ood import OODKind, change_images, evaluate_ood_check, fit_ood_check, make_ood_images
from covid_cxr.recipe import build_table, load_recipe, override
from covid_cxr.sources import read_source

OUT = RESULTS / 'ood_check.json'


def real_others(data, read):
    "kind -> images that are radiographs and not what the network was trained on"
    whole = read_source('covid_chestxray', Path(data) / 'covid-chestxray-dataset')
    there = whole[whole['path'].map(lambda f: isinstance(f, str) and Path(f).is_file())]
    frontal, other_hospital = used(there), used(read_source('nih', Path(data) / 'nih-chest-xrays-512'))
    return {'lateral images': read(there.loc[there['view'] == 'L', 'path']),
            'CT slices': read(there.loc[there['modality'] == 'CT', 'path']),
            'AP': read(frontal.loc[frontal['view'] == 'AP', 'path']),
            'images of another hospital': read(other_hospital['path'])}


def measure(data, cache, size):
    "Number of training images, and the table of what passes"
    recipe = override(load_recipe('covid-2020'), {'image.size': size})
    table, rule = used(build_table(recipe, data, cache)), ImageRule(size, recipe.image.how, recipe.image.stretch)
    def read(paths): return np.stack([load_image(f, rule) for f in paths])
    train, held_out = table[table['split'] == 'train'], read(table.loc[table['split'] != 'train', 'path'])
    check = fit_ood_check(read(train['path']), train['group'].tolist(), seed=recipe.seed)
    made = {k: make_ood_images(k, 30, size, 0) for k in choices(OODKind)}
    return len(train), evaluate_ood_check(check, held_out, {**made, **change_images(held_out), **real_others(data, read)})


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', default=str(data_folder()), help='folder that holds the collections of covid-2020')
    p.add_argument('--cache', help='folder that keeps decoded images and fingerprints')
    p.add_argument('--size', type=int, default=512)
    p.add_argument('--out', default=str(OUT))
    a = p.parse_args()
    n, t = measure(a.data, a.cache, a.size)
    print(t.round(3).to_string(index=False))
    rows = json.loads(t.to_json(orient='records', double_precision=6))
    write_result(a.out, dict(about(), pixels=a.size, trained_on=n, rows=rows))
