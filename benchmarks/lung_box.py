"""How much of the lungs the fixed box of `covid_cxr.audit.baselines.lung_box` covers, and what it leaves visible.

    python benchmarks/lung_box.py --data ../shared/data

Drawn lung masks of real films (annotations/lungVAE-masks), padded to a square, and the masks of 60 phantoms. The result replaces benchmarks/results/lung_box.json.
"""
import argparse, json, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import numpy as np
from covid_cxr.core import versions
from covid_cxr.audit.baselines import MARGIN, lung_box
from covid_cxr.images import fit_to, read_grey
from covid_cxr.audit.perturb import corners
from covid_cxr.phantom import phantom_family

OUT, SIDE = ROOT / 'benchmarks/results/lung_box.json', 128


def covered(masks, box): return float(np.mean([(m & box).sum() / m.sum() for m in masks if m.any()]))

def phantom_masks(): return phantom_family('P1', 60, size=SIDE, seed=0)[2]

def measure(masks):
    "Mean share of the lung pixels inside the box, and inside the box without its corners"
    box = lung_box(SIDE, SIDE)
    return dict(masks=len(masks), box=covered(masks, box), box_without_corners=covered(masks, box & ~corners(SIDE, SIDE)))


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', default='../shared/data')
    a = p.parse_args()
    files = sorted((Path(a.data) / 'covid-chestxray-dataset/annotations/lungVAE-masks').glob('*.png'))
    if not files: sys.exit(f'no lung masks below {a.data}; give the folder that holds covid-chestxray-dataset with --data.')
    out = dict(command='python benchmarks/lung_box.py --data ../shared/data', date=time.strftime('%Y-%m-%d'), versions=versions(), margin=MARGIN, pixels=SIDE, visible=1 - float(lung_box(SIDE, SIDE).mean()),
               real=measure(np.stack([fit_to(read_grey(f), SIDE) > 127 for f in files])), phantoms=measure(phantom_masks()))
    OUT.write_text(json.dumps(out, indent=1) + '\n')
    print(json.dumps({k: out[k] for k in ('visible', 'real', 'phantoms')}, indent=1))
