"""What the input gate lets through, on real films: fitted on the training films of covid-2020, judged on its held-out films and on what is none.

    python benchmarks/input_gate.py --data ../shared/data --cache CACHE

Held-out films are those of the valid and test parts. "Others" are side views and CT slices of the same collection, frontal films of other kinds (AP, another
hospital), pictures that are no radiographs, and held-out films made wrong. The result replaces benchmarks/results/input_gate.json.
"""
import argparse, json, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import numpy as np
from covid_cxr.core import used, versions
from covid_cxr.ood import OOD_KINDS, change_images, fit_ood_check, evaluate_ood_check, make_ood_images
from covid_cxr.images import ImageRule, load_image
from covid_cxr.recipe import build_table, load_recipe, override
from covid_cxr.sources import read_source

OUT = ROOT / 'benchmarks/results/input_gate.json'


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', default='../shared/data')
    p.add_argument('--cache', help='folder that keeps decoded pictures and fingerprints')
    p.add_argument('--size', type=int, default=512)
    a = p.parse_args()
    recipe = override(load_recipe('covid-2020'), {'image.size': a.size})
    table, rule = used(build_table(recipe, a.data, a.cache)), ImageRule(a.size, recipe.image.how, recipe.image.stretch)
    pictures = lambda paths: np.stack([load_image(f, rule) for f in paths])
    train, held = table[table['split'] == 'train'], table[table['split'] != 'train']
    gate = fit_ood_check(pictures(train['path']), train['group'].tolist(), seed=recipe.seed)
    films, whole = pictures(held['path']), read_source('covid_chestxray', Path(a.data) / 'covid-chestxray-dataset')
    there = whole[whole['path'].map(lambda f: isinstance(f, str) and Path(f).is_file())]
    others = {k: make_ood_images(k, 30, a.size, 0) for k in OOD_KINDS} | change_images(films)
    others |= {'side views': pictures(there.loc[there['view'] == 'L', 'path']), 'CT slices': pictures(there.loc[there['modality'] == 'CT', 'path']), 'AP': pictures(used(there).loc[used(there)['view'] == 'AP', 'path']),
               'films of another hospital': pictures(used(read_source('nih', Path(a.data) / 'nih-chest-xrays-512'))['path'])}
    t = evaluate_ood_check(gate, films, others)
    print(t.round(3).to_string(index=False))
    rows = json.loads(t.to_json(orient='records', double_precision=6))
    OUT.write_text(json.dumps(dict(command='python benchmarks/input_gate.py --data ../shared/data', date=time.strftime('%Y-%m-%d'), versions=versions(), pixels=a.size, trained_on=len(train), rows=rows), indent=1) + '\n')
