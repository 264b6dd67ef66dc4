"""The leak-safe network of each article from ImageNet, trained for its audit, tested on other collections, audited in full and kept:

    python benchmarks/audit_articles.py --out OUT [--lungs NET] [NAME ...]      ->  benchmarks/results/audited/NAME-imagenet-audited/

An audit needs the network, and the networks of the tables are not kept. So these are trained again, on a processor, with the settings of
the arm `imagenet` and its first seed; their numbers are their own. `covid-2020` is smaller and shorter here than in the tables, where a
GPU trained it: 224 px and a quarter of the epochs. A recipe with folds is audited on fold 0. NET is the folder of a network that finds
lungs (`benchmarks/lungs.py --final` makes one). Killed, the same command goes on where it stopped. Ten to forty minutes of one core each.
"""
import argparse
from pathlib import Path
from record import RESULTS, command_line
from keep_run import keep
from covid_cxr.articles.conditions import AUDITED
from covid_cxr.articles.reported import ARMS
from covid_cxr.articles.reproduce import run_external_tests
from covid_cxr.audit.baselines import external_baselines
from covid_cxr.audit.case import read_audit
from covid_cxr.audit.run import audit_run
from covid_cxr.audit.sentences import describe_headline
from covid_cxr.core import data_folder
from covid_cxr.recipe import load_recipe, override, with_epochs
from covid_cxr.runs.external import read_external_tests
from covid_cxr.runs.folder import RunFolder
from covid_cxr.runs.train import train

NAMES = ('pneumonia-cnn-honest', 'pneumonia-explained-honest', 'covid-2020', 'coronahack-vgg-honest', 'effusion-resnet-honest')
SIZE, EPOCHS = {'covid-2020': 224}, {'covid-2020': 22}


def recipe_of(name):
    "The arm `imagenet` of a recipe, its first seed"
    settings, seeds = ARMS[name]['imagenet']
    own = {'model.weights': 'imagenet', 'seed': seeds[0], **({'image.size': SIZE[name]} if name in SIZE else {})}
    recipe = override(load_recipe(name), {**settings, **own})
    return with_epochs(recipe, EPOCHS[name]) if name in EPOCHS else recipe


def audited(name, out, lungs):
    "Train, test outside, audit: what is there already is not done again"
    cache = Path(out) / 'cache'
    run = train(recipe_of(name), data=data_folder(), out=Path(out) / f'{name}-imagenet-audited', device='cpu', cache_dir=cache)
    if not read_external_tests(RunFolder.open(run)):
        run_external_tests(run, data_folder(), cache_dir=cache, baselines=external_baselines)
    if read_audit(run) is None: audit_run(run, cache_dir=cache, lungs=lungs)
    return Path(run)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('names', nargs='*', metavar='NAME', help=f"of {', '.join(NAMES)}")
    p.add_argument('--out', required=True, help='folder for the runs; finished ones there are kept')
    p.add_argument('--lungs', help='folder of a network that finds lungs')
    a = p.parse_args()
    for name in a.names or NAMES:
        run = audited(name, a.out, a.lungs)
        keep(run, RESULTS / AUDITED / run.name, command_line())
        print(f'{run.name}: {describe_headline(read_audit(run).headline)}')
