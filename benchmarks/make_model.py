"""Make a model that is shipped with the package again, from the official training images to the files in covid_cxr/models:

    python benchmarks/make_model.py --out RUNS [--lungs NET]      ->  covid_cxr/models/pneumonia-small/, benchmarks/results/pneumonia-small/

The recipe of the same name is trained (half an hour on one core), audited in full, reported, exported in whole numbers of 8 bits (refused
where that changes its answers on the validation split too much) and kept. The shipped file is a little other than the network that was
evaluated, so it answers the published test as well (shipped.csv.gz). Killed, the same command goes on where it stopped. The run keeps the
network in full precision: RUNS/pneumonia-small/bundle.
"""
import argparse, os, shutil
from pathlib import Path
import pandas as pd
from record import ROOT, RESULTS, command_line, write_compressed
from keep_run import keep
from covid_cxr.audit.case import read_audit
from covid_cxr.audit.run import audit_run
from covid_cxr.bundle import write_manifest
from covid_cxr.core import data_folder
from covid_cxr.predict import load_predictor
from covid_cxr.recipe import load_recipe
from covid_cxr.report.findings import write_any_report
from covid_cxr.runs.folder import RunFolder
from covid_cxr.runs.int8 import export_int8
from covid_cxr.runs.train import train

MODELS = ROOT / 'covid_cxr' / 'models'
CARD = 'model-card.md'
LARGEST = 8_000_000     # bytes of a shipped model, all files


def finished(name, out, lungs):
    "The trained, audited and reported run"
    run = train(load_recipe(name), data=data_folder(), out=Path(out) / name, device='cpu', cache_dir=Path(out) / 'cache')
    if read_audit(run) is None: audit_run(run, cache_dir=Path(out) / 'cache', lungs=lungs)
    write_any_report(run, thumbnails=False)
    return run


def ship(run, to):
    "Replace a shipped model by the bundle of a run"
    new = to.with_name(f'{to.name}.new')
    if new.exists(): shutil.rmtree(new)
    print(export_int8(run, new))
    shutil.copyfile(Path(run) / CARD, new / CARD)
    write_manifest(new, os.listdir(new))
    size = sum(f.stat().st_size for f in new.iterdir())
    if size > LARGEST: raise SystemExit(f'{new} has {size:,} bytes, more than {LARGEST:,}.')
    if to.exists(): shutil.rmtree(to)
    new.rename(to)
    print(f'{to}: {size:,} bytes in {", ".join(sorted(f.name for f in to.iterdir()))}')


def answer_test(run, bundle, out):
    "What the shipped file answers on the test split, beside image, group and label"
    r = RunFolder.open(run)
    rows = r.predictions[r.predictions['split'] == 'test']
    paths = r.table.set_index('image_id').loc[rows['image_id'], 'path']
    asked = load_predictor(bundle)
    p = [asked.predict(path, ood='off').probabilities[asked.classes[-1]] for path in paths]
    columns = {c: rows[c].to_numpy() for c in ('image_id', 'group', 'label')}
    write_compressed(out, pd.DataFrame(dict(columns, probability=p)))


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', required=True, help='folder for the run')
    p.add_argument('--name', default='pneumonia-small', help='a shipped recipe (default: pneumonia-small)')
    p.add_argument('--lungs', help='folder of a lung network, for the audit')
    a = p.parse_args()
    run = finished(a.name, a.out, a.lungs)
    ship(run, MODELS / a.name)
    place = RESULTS / a.name
    if place.exists(): shutil.rmtree(place)
    keep(run, place, command_line())
    answer_test(run, MODELS / a.name, place / 'shipped.csv')
    print(RunFolder.open(run).file('summary.txt').read_text())
