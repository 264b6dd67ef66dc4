"""What the check of the input by a lung network costs and gains: the share declined among frontal radiographs and among what is none.

    python benchmarks/lung_check.py --net FOLDER      about ten minutes on one core; FOLDER: of benchmarks/lungs.py --final

Frontal images: one per patient of the Kaggle children, of NIH adults, and of those patients of the COVID collection whose lungs were not
drawn by hand (the network never saw them). No frontal chest: lateral views of the COVID collection, the frontal images turned by 90 and 180
degrees and inverted, and drawn pictures (noise, documents, ...). The lung network sees every picture as a prediction shows it: whole,
padded to its size. Beside it stands the check that a bundle carries: `fit_ood_check`, fitted on the frontal images of further
patients of the same collection. The result replaces benchmarks/results/lung_check.json.
"""
import argparse, json, time
from collections import Counter
from pathlib import Path
from record import RESULTS, about, machine, write_result
import numpy as np, torch
from covid_cxr.core import choices, data_folder, used
from covid_cxr.images import ImageRule, apply_rule, load_image, read_grey, to_8bit
from covid_cxr.model.cut import lung_finder
from covid_cxr.model.lungs import LungFault, find_lung_masks
from covid_cxr.ood import OODKind, change_images, fit_ood_check, make_ood_images
from covid_cxr.sources import read_covid_chestxray, read_kaggle_pneumonia, read_nih
from covid_cxr.stats.bootstrap import patient_wilson

OUT, SIDE = RESULTS / 'lung_check.json', 128      # pixels of the pictures that the other check sees
SAMPLE, FITTED, TURNED, MADE = 300, 300, 100, 20  # images: evaluated, fitted, turned and inverted, drawn of each kind


def one_each(rows, seed=0):
    "One image of each patient, in a random order"
    rows = rows[rows['path'].notna()].sample(frac=1, random_state=seed)
    return rows.drop_duplicates('patient')


def collections(data):
    "Rows of frontal images, one per patient: {name: (to evaluate, to fit the other check)}"
    covid = used(read_covid_chestxray(data))
    drawn = set(find_lung_masks(data)['patient'])
    new = covid[~covid['patient'].isin(drawn)]
    nih = used(read_nih(Path(data) / 'nih-chest-xrays'))
    tables = {'Kaggle children': used(read_kaggle_pneumonia(Path(data) / 'chest-xray-pneumonia')),
              'NIH adults': nih[nih['age_years'] >= 18], 'COVID collection, PA': new[new['view'] == 'PA'],
              'COVID collection, AP': new[new['view'].isin(['AP', 'AP Supine'])]}
    rows = {name: one_each(t) for name, t in tables.items()}
    fitted = {name: r.iloc[SAMPLE:SAMPLE + FITTED] for name, r in rows.items()}
    fitted['COVID collection, PA'] = fitted['COVID collection, AP'] = one_each(covid[covid['patient'].isin(drawn)]).head(FITTED)
    return {name: (r.head(SAMPLE), fitted[name]) for name, r in rows.items()}


def laterals(data):
    "Rows of lateral views of the COVID collection, one per patient"
    table = read_covid_chestxray(data)
    table = table[(table['view'] == 'L') & table['path'].map(lambda p: isinstance(p, str) and Path(p).is_file())]
    return one_each(table).head(SAMPLE)


# ---- one set of pictures
def look(finder, pictures):
    "Fault of every picture, and the seconds that it took"
    start = time.process_time()
    faults = [finder(to_8bit(np.ascontiguousarray(a))).fault or 'none' for a in pictures]
    return faults, (time.process_time() - start) / max(1, len(faults))


def shares(faults, others, patients):
    "What the lung network declines, the other check, and either: shares with intervals over patients"
    lungs, other = np.array([f != 'none' for f in faults]), np.array(others, bool)
    told = dict(lungs=lungs, other=other, either=lungs | other)
    out = {k: patient_wilson(v, patients) for k, v in told.items()}
    return dict(images=len(lungs), faults={f: Counter(faults).get(f, 0) for f in choices(LungFault)},
                **{k: dict(share=round(e.value, 4), low=round(e.low, 4), high=round(e.high, 4)) for k, e in out.items()})


def measure(finder, check, pictures, patients):
    "One set of pictures"
    faults, seconds = look(finder, pictures)
    small = (apply_rule(np.ascontiguousarray(a), ImageRule(SIDE)) for a in pictures)
    return dict(shares(faults, [check.check(a) is not None for a in small], patients), seconds_per_image=round(seconds, 4))


def run(net, data):
    finder, found, checks, kept = lung_finder(net), {}, {}, {}
    for name, (rows, fitted) in collections(data).items():
        checks[name] = fit_ood_check([load_image(p, ImageRule(SIDE)) for p in fitted['path']], list(fitted['patient']))
        pictures = [read_grey(p) for p in rows['path']]
        found[name] = dict(measure(finder, checks[name], pictures, rows['patient']), frontal=True)
        print(name, found[name], flush=True)
        good = [a for a in pictures if finder(a).fault == ''][:TURNED]
        kept[name] = good
    for name in ('Kaggle children', 'COVID collection, PA'):
        for change in change_images(np.zeros((1, 16, 16), np.uint8)):
            changed = [change_images(a[None])[change][0] for a in kept[name]]
            label = f'{name}, {change}'
            found[label] = dict(measure(finder, checks[name], changed, range(len(changed))), frontal=False)
            print(label, found[label], flush=True)
    rows, check = laterals(data), checks['COVID collection, PA']
    found['COVID collection, lateral'] = dict(measure(finder, check, [read_grey(p) for p in rows['path']], rows['patient']), frontal=False)
    for kind in choices(OODKind):
        made = make_ood_images(kind, MADE, 224)
        found[f'drawn: {kind}'] = dict(measure(finder, check, made, range(MADE)), frontal=False)
    return dict(network=finder.net.name, side=SIDE, sets=found)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--net', required=True, help='folder of a lung network')
    p.add_argument('--data', default=str(data_folder()), help='folder of the collections')
    p.add_argument('--out', default=str(OUT))
    a = p.parse_args()
    torch.set_num_threads(1)
    write_result(a.out, dict(about(), machine=machine(), **run(a.net, a.data)))
