"""Why a rival that sees the edge of the picture alone tells effusion from no finding: brightness of the four edge strips, by finding and view.

    python benchmarks/effusion_edges.py --data ../shared/data      ->  benchmarks/results/effusion_edges.json

Each strip is 8 % of the side, of the film as it is stored (0 black, 255 white); means over films, with the 95 % bootstrap interval over patients.
"""
import argparse, datetime, json
from pathlib import Path
import numpy as np, pandas as pd
from covid_cxr.core import used, versions
from covid_cxr.images import read_grey, to_8bit
from covid_cxr.recipe import build_table, load_recipe

OUT = Path(__file__).resolve().parent / 'results' / 'effusion_edges.json'
SHARE = .08


def strips(a):
    "Mean brightness of the strips of one film"
    h, w = a.shape
    y, x = round(SHARE * h), round(SHARE * w)
    return dict(top=a[:y].mean(), bottom=a[-y:].mean(), left=a[y:-y, :x].mean(), right=a[y:-y, -x:].mean(), inside=a[y:-y, x:-x].mean())


def mean_over_patients(values, groups, n_boot=2000, seed=0):
    "Mean over films and its interval, patients drawn whole"
    t = pd.DataFrame(dict(v=values, g=groups)).groupby('g').v.agg(['sum', 'count']).to_numpy()
    draw = np.random.default_rng(seed).integers(0, len(t), (n_boot, len(t)))
    means = t[draw].sum(1)
    low, high = np.quantile(means[:, 0] / means[:, 1], [.025, .975])
    return dict(value=float(t[:, 0].sum() / t[:, 1].sum()), low=float(low), high=float(high))


def measure(data):
    t = used(build_table(load_recipe('effusion-resnet-honest'), data))
    t = pd.concat([t.reset_index(drop=True), pd.DataFrame([strips(to_8bit(read_grey(p))) for p in t['path']])], axis=1)
    return [dict(label=label, view=view, strip=s, films=len(x), patients=int(x['group'].nunique()), **mean_over_patients(x[s], x['group']))
            for view, part in (('AP and PA', t), *t.groupby('view')) for label, x in part.groupby('label') for s in ('top', 'bottom', 'left', 'right', 'inside')]


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--data', required=True)
    a = p.parse_args()
    OUT.write_text(json.dumps(dict(command='python benchmarks/effusion_edges.py --data ../shared/data', date=datetime.date.today().isoformat(), versions=versions(), share=SHARE, rows=measure(a.data)), indent=1) + '\n')
    print(OUT)
