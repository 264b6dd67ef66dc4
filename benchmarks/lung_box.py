"""How much of the lungs the fixed box of `covid_cxr.audit.regions.lung_box` covers, and what it leaves visible.

    python benchmarks/lung_box.py

Machine-made lung masks of radiographs (annotations/lungVAE-masks), padded to a square, and the masks of 60 phantom patients.
The result replaces benchmarks/results/lung_box.json.
"""
import argparse, json, sys
from pathlib import Path
from record import RESULTS, about, write_result
import numpy as np
from covid_cxr.audit.regions import LUNG_MARGIN, corners, lung_box
from covid_cxr.core import data_folder
from covid_cxr.images import fit_to, read_grey
from covid_cxr.phantom import phantom_family

OUT, SIDE = RESULTS / 'lung_box.json', 128
MASKS = 'covid-chestxray-dataset/annotations/lungVAE-masks'


def read_masks(data, size=SIDE, how='pad'):
    "(n, size, size) bool: the machine-made lung masks, without the shadow of the heart"
    files = sorted((Path(data) / MASKS).glob('*.png'))
    if not files: sys.exit(f'no lung masks below {data}; give the folder that holds covid-chestxray-dataset with --data.')
    return np.stack([fit_to(read_grey(f), size, how) > 127 for f in files])

def phantom_masks(): return phantom_family('P1', 60, size=SIDE, seed=0)[2]

def covered(masks, box): return float(np.mean([(m & box).sum() / m.sum() for m in masks if m.any()]))

def measure(masks):
    "Mean share of the lung pixels inside the box, and inside the box without its corners"
    box = lung_box(SIDE, SIDE)
    return dict(masks=len(masks), box=covered(masks, box), box_without_corners=covered(masks, box & ~corners(SIDE, SIDE)))


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', default=str(data_folder()), help='folder that holds covid-chestxray-dataset')
    p.add_argument('--out', default=str(OUT))
    a = p.parse_args()
    found = dict(visible=1 - float(lung_box(SIDE, SIDE).mean()), real=measure(read_masks(a.data)), phantoms=measure(phantom_masks()))
    write_result(a.out, dict(about(), margin=LUNG_MARGIN, pixels=SIDE, **found))
    print(json.dumps(found, indent=1))
