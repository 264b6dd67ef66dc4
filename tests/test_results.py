"""Every committed result is derived again from its predictions: no number in prose without a file, no file without its predictions."""
import json
import pandas as pd, pytest
from conftest import ROOT

RUNS = sorted(p.parent for p in (ROOT / 'benchmarks' / 'results').glob('*/predictions.csv'))


def test_there_are_results(): assert RUNS, 'no run is kept under benchmarks/results'


@pytest.mark.parametrize('run', RUNS, ids=lambda p: p.name)
def test_a_kept_run_follows_from_its_predictions(run):
    from covid_cxr.evaluate import choose_threshold, evaluate
    from covid_cxr.recipe import parse_recipe
    from covid_cxr.table import as_task
    recipe, e = parse_recipe((run / 'recipe.toml').read_text()), json.loads((run / 'evaluation.json').read_text())
    classes = list(as_task(recipe.task).classes)
    pred = pd.read_csv(run / 'predictions.csv')
    assert 'path' not in pred and not pred.image_id.str.contains('/').any()
    assert (pred.groupby('group').split.nunique() == 1).all() or e['leaking_groups'], 'a group on two sides'
    v, t = pred[pred.split == 'valid'], pred[pred.split == e['part']]
    point = choose_threshold(v.label.to_numpy(), v[f'prob_{classes[1]}'].to_numpy(), goal=recipe.evaluation.goal, classes=classes)
    assert point.threshold == pytest.approx(e['operating_point']['threshold'])
    again = evaluate(t.label.to_numpy(), t[f'prob_{classes[1]}'].to_numpy(), groups=t.group.to_numpy(), threshold=point.threshold, classes=classes,
                     n_boot=recipe.evaluation.n_boot, seed=recipe.seed).to_dict()['estimates']
    for m, kept in e[e['part']]['estimates'].items():
        for k in ('value', 'low', 'high'): assert (again[m][k] is None) == (kept[k] is None) and (kept[k] is None or again[m][k] == pytest.approx(kept[k], abs=1e-9)), (m, k)
    summary = (run / 'summary.txt').read_text()
    assert f"auc {e[e['part']]['estimates']['auc']['value']:.3f}" in summary
