"""Why a baseline that sees the edge of the picture alone separates effusion from no finding: brightness of four edge strips.

    python benchmarks/effusion_edges.py      ->  benchmarks/results/effusion_edges.json

Each strip is 8 % of the side, of the image as it is stored (0 black, 255 white), by finding and view; means over images, with the
95 % bootstrap interval over patients. Beside it: the views of all images of the collection, by finding. `--views` counts them alone.
"""
import argparse, json
from pathlib import Path
from record import RESULTS, about, write_result
import pandas as pd
from covid_cxr.core import data_folder, used
from covid_cxr.images import read_grey, to_8bit
from covid_cxr.recipe import build_table, load_recipe
from covid_cxr.sources import read_nih
from covid_cxr.stats.bootstrap import patient_mean
from covid_cxr.table import label_for

OUT, SHARE = RESULTS / 'effusion_edges.json', .08
STRIPS = ('top', 'bottom', 'left', 'right', 'inside')


def strips(a):
    "Mean brightness of the strips of one image"
    h, w = a.shape
    y, x = round(SHARE * h), round(SHARE * w)
    return dict(top=a[:y].mean(), bottom=a[-y:].mean(), left=a[y:-y, :x].mean(), right=a[y:-y, -x:].mean(), inside=a[y:-y, x:-x].mean())


def row(view, label, strip, t):
    "One strip of the images of one label and view"
    e = patient_mean(t[strip], t['group'])
    counts = dict(images=len(t), patients=int(t['group'].nunique()))
    return dict(label=label, view=view, strip=strip, **counts, value=e.value, low=e.low, high=e.high)


def measure(data):
    "Every strip, by view and label"
    t = used(build_table(load_recipe('effusion-resnet-honest'), data)).reset_index(drop=True)
    t = pd.concat([t, pd.DataFrame([strips(to_8bit(read_grey(p))) for p in t['path']])], axis=1)
    by_label = [(view, label, x) for view, of_view in (('AP and PA', t), *t.groupby('view')) for label, x in of_view.groupby('label')]
    return [row(view, label, s, x) for view, label, x in by_label for s in STRIPS]


def count_views(data):
    "Images of the whole collection by finding and view; no image is read"
    t = used(label_for(read_nih(Path(data) / 'nih-chest-xrays', csv='nih.csv.gz', files='ignore'), 'effusion_vs_no_finding'))
    return {label: {view: int(n) for view, n in rows['view'].value_counts().items()} for label, rows in t.groupby('label')}


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', default=str(data_folder()), help='folder that holds nih-chest-xrays')
    p.add_argument('--out', default=str(OUT))
    p.add_argument('--views', action='store_true', help='count the views alone; the measured rows stay as they are')
    a = p.parse_args()
    kept = json.loads(Path(a.out).read_text(encoding='utf-8')) if a.views else dict(about(), share=SHARE, rows=measure(a.data))
    write_result(a.out, dict(kept, views=dict(about(), counts=count_views(a.data))))
    print(a.out)
