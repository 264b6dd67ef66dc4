"""The kept scores of benchmarks/frozen_encoder.py give the kept numbers again, by another way, and the page prints them."""
import json, sys
import numpy as np, pandas as pd
import pytest
from sklearn.metrics import roc_auc_score
from conftest import ROOT
sys.path.insert(0, str(ROOT / 'benchmarks'))
import frozen_encoder  # noqa: E402

KEPT = ROOT / 'benchmarks/results/frozen_encoder.json'
FOUND = json.loads(KEPT.read_text())
TASKS, SEEDS = frozen_encoder.TASKS, frozen_encoder.SEEDS


@pytest.fixture(scope='module')
def scores():
    t = pd.read_csv(KEPT.with_suffix('.csv.gz'))
    return {task: t[t['task'] == task].reset_index(drop=True) for task in TASKS}


@pytest.mark.parametrize('task', TASKS)
@pytest.mark.parametrize('arm', frozen_encoder.ARMS)
def test_every_number_of_a_seed_comes_from_its_scores(scores, task, arm):
    t, kept = scores[task], FOUND['tasks'][task]
    assert (len(t), t['positive'].sum(), t['group'].nunique()) == (kept['images'], kept['positive'], kept['groups'])
    for row in kept['arms'][arm]['seeds']:
        score, fold, y = t[f"{arm}_{row['seed']}"], t[f"fold_{row['seed']}"], t['positive'] == 1
        place = np.nansum([((score.where(fold == f).rank() - .5) / (fold == f).sum()).fillna(0) for f in fold.unique()], axis=0)
        assert row['auc'] == pytest.approx(roc_auc_score(y, place), abs=1e-9)
        found = score >= .5
        shares = dict(sensitivity=found[y].mean(), specificity=(~found)[~y].mean(), accuracy=(found == y).mean())
        assert {m: row[m] for m in shares} == pytest.approx(shares)
    assert [r['seed'] for r in kept['arms'][arm]['seeds']] == list(SEEDS)


@pytest.mark.parametrize('task', TASKS)
def test_means_intervals_and_gains_are_those_of_the_scores(scores, task):
    kept, again = FOUND['tasks'][task], frozen_encoder.summarise(scores[task])
    for name in ('gain', 'baseline', 'baseline_gain'):
        assert (name in kept) == (name in again) and again.get(name) == (pytest.approx(kept[name]) if name in kept else None)
    for arm, of in kept['arms'].items():
        for metric, e in of['mean'].items():
            assert again['arms'][arm]['mean'][metric] == pytest.approx(e), (arm, metric)
            assert e['value'] == pytest.approx(np.mean([r[metric] for r in of['seeds']])) and e['low'] < e['value'] < e['high']
    a, b = (kept['arms'][arm]['mean']['auc']['value'] for arm in ('imagenet', 'random'))
    assert kept['gain']['value'] == pytest.approx(a - b)


def test_every_image_is_tested_once_per_seed_and_patients_stay_together(scores):
    for task, t in scores.items():
        assert t['image_id'].is_unique
        for seed in SEEDS: assert t.groupby('group')[f'fold_{seed}'].nunique().max() == 1
    assert any((scores[TASKS[0]]['fold_42'] != scores[TASKS[0]]['fold_43']))


def test_the_published_test_was_evaluated_once_per_arm_and_seed():
    arms = FOUND['tasks']['pneumonia-resnet']['arms']
    assert all(r['test_evaluations'] == 1 for of in arms.values() for r in of['seeds'])


def test_the_baseline_is_the_best_one_that_is_no_metadata():
    for task in TASKS[:2]:
        kept = FOUND['tasks'][task]
        best = max((b for b in kept['baselines'] if b['kind'] != 'metadata'), key=lambda b: b['auc'])
        assert kept['baseline']['value'] == pytest.approx(best['auc'])


def test_the_page_of_results_prints_them():
    cells = json.loads((ROOT / 'nbs/results.ipynb').read_text())['cells']
    outputs = [o for c in cells if c.get('id', '').startswith('frozen') for o in c.get('outputs', [])]
    text = ''.join(''.join(o['data'].get('text/markdown', '')) for o in outputs)
    for kept in FOUND['tasks'].values():
        for e in [of['mean'][m] for of in kept['arms'].values() for m in of['mean']]:
            assert f"{e['value']:.3f} [{e['low']:.3f}, {e['high']:.3f}]" in text
        assert f"{kept['gain']['value']:+.3f} [" in text


def test_what_the_page_says_of_the_gains():
    tasks = FOUND['tasks']
    assert tasks['pneumonia-resnet']['gain']['low'] < 0 < tasks['pneumonia-resnet']['gain']['high']
    metadata = max(b['auc'] for b in tasks['covid-2020-within']['baselines'] if b['kind'] == 'metadata')
    assert metadata > tasks['covid-2020-within']['arms']['imagenet']['mean']['auc']['high']
