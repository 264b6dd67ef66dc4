"""What an encoder gives that is not trained on radiographs: logistic regression on its features, ImageNet weights beside random ones.
Three tasks, five seeds each; benchmarks/PLAN.md says what was fixed before the first of them was evaluated.

    pip install covid_cxr[weights]
    python benchmarks/frozen_encoder.py --runs RUNS      ->  benchmarks/results/frozen_encoder.json and frozen_encoder.csv.gz

The features of an image are computed once per encoder (about .02 s on one quiet core); every fold and every seed after that takes seconds.
RUNS keeps features and one run folder per arm, seed and fold; started again, the script goes on where it stopped.
"""
import argparse, json, time
from dataclasses import asdict
from pathlib import Path
from record import RESULTS, about, machine, write_compressed, write_result
import numpy as np, pandas as pd
from covid_cxr.audit.baselines import fit_baselines
from covid_cxr.audit.run import SMALL
from covid_cxr.cache import ImageCache
from covid_cxr.core import data_folder, used
from covid_cxr.data import cxr_dls
from covid_cxr.evaluate import auc_covariance, bounded_interval, rarer_groups
from covid_cxr.images import ImageRule, fit_to, load_image
from covid_cxr.learner import cxr_learner, embed_images, fit_frozen, predict_frozen
from covid_cxr.recipe import apply_split, build_table, load_recipe, override
from covid_cxr.runs.crossval import pool_predictions, rank_scores
from covid_cxr.runs.folder import RunFolder
from covid_cxr.runs.test_log import read_test_log
from covid_cxr.runs.train import run_from_predictions
from covid_cxr.stats.bootstrap import patient_mean

TASKS = ('effusion-resnet-honest', 'covid-2020-within', 'pneumonia-resnet')
SEEDS = (42, 43, 44, 45, 46)
ARMS = {'imagenet': {'model.weights': 'imagenet', 'training.frozen_encoder': True}, 'random': {'model.weights': 'none'}}
COMMON = {'image.size': 224, 'model.arch': 'efficientnet_lite0', 'model.head': 'linear', 'model.blocks': [2, 3, 4],
          'training.imbalance': 'weighted_loss', 'training.cost_matrix': [], 'evaluation.n_boot': 100}    # intervals: below, of all seeds
SHARES = {'sensitivity': 1, 'specificity': 0}      # metric -> the class of its images


def arm_recipe(task, arm, seed, fold=0): return override(load_recipe(task), {**COMMON, **ARMS[arm], 'seed': seed, 'split.fold': fold})


def folds_of(task):
    split = load_recipe(task).split
    return range(split.n_folds) if split.kind == 'fold' else range(1)


def run_name(task, arm, seed, fold): return f'{task}-{arm}-seed{seed}' + (f'-fold{fold}' if len(folds_of(task)) > 1 else '')


def make_learner(recipe, table, runs, encoder_seed):
    rule, m = ImageRule(**asdict(recipe.image)), recipe.model
    dls = cxr_dls(table, classes=list(recipe.question.classes), rule=rule, bs=32, device='cpu', augment=[],
                  cache=ImageCache(runs / 'cache' / 'images', rule))
    return cxr_learner(dls, m.arch, m.weights, recipe.training.imbalance, path=runs, seed=encoder_seed, head=m.head, blocks=m.blocks)


def embed_all(learn, table, runs, name):
    "The features of every used image, kept; the minutes that the first time took"
    began, file = time.perf_counter(), runs / 'minutes.json'
    embed_images(learn, used(table)['path'].tolist(), runs / 'features')
    kept = json.loads(file.read_text()) if file.is_file() else {}
    kept.setdefault(name, (time.perf_counter() - began) / 60)
    write_result(file, kept)


def evaluate_once(recipe, table, data, out, runs, encoder_seed):
    "One run folder: head fitted, threshold frozen on validation, evaluated split evaluated once"
    learn = make_learner(recipe, table, runs, encoder_seed)
    name = out.name.partition('-seed')[0] + f'-encoder{encoder_seed}'
    embed_all(learn, table, runs, name)
    fit = fit_frozen(learn, runs / 'features', log=len)
    trained = f'fitted a linear head on frozen features of {fit.history["images"].max()} images at {recipe.image.size} px'
    run_from_predictions(recipe, table, predict_frozen(learn, used(table), runs / 'features'), out, fit, trained,
                         export=lambda folder, found, provenance: None, data=str(data), figures=False, log=len)


def unfinished(task, runs, seeds=SEEDS):
    "(arm, seed, fold) of every run that is still to be made"
    every = [(arm, seed, fold) for arm in ARMS for seed in seeds for fold in folds_of(task)]
    folders = {key: runs / run_name(task, *key) for key in every}
    return [k for k, d in folders.items() if not d.is_dir() or RunFolder.open(d, finished=False).state.get('status') != 'finished']


def run_task(task, data, runs, seeds=SEEDS):
    "Every arm, seed and fold of a task that is not finished"
    left = unfinished(task, runs, seeds)
    base = build_table(arm_recipe(task, 'imagenet', seeds[0]), data, runs / 'cache') if left else None
    for arm, seed, fold in left:
        recipe, out = arm_recipe(task, arm, seed, fold), runs / run_name(task, arm, seed, fold)
        encoder_seed = seed if arm == 'random' and len(folds_of(task)) > 1 else seeds[0]
        evaluate_once(recipe, apply_split(base, recipe.split, recipe.seed), data, out, runs, encoder_seed)
        print(task, arm, seed, fold, time.strftime('%H:%M'), flush=True)


def fold_baselines(run, small):
    "What every lung-free baseline of one fold says of its test images; `small` holds the images by their path"
    rows, rule = used(run.table), ImageRule(**asdict(run.recipe.image))
    for path in rows['path']:
        if path not in small: small[path] = fit_to(load_image(path, rule), SMALL, 'squash')
    images, seed = np.stack([small[p] for p in rows['path']]), run.recipe.seed
    found = fit_baselines(rows, images, run.classes[1], retrain=False, n_boot=0, seed=seed)
    ids = rows.loc[rows['split'] == 'test', 'image_id'].to_numpy()
    said = dict(seed=seed, image_id=ids)
    return [pd.DataFrame(dict(said, baseline=b.name, kind=b.kind, score=rank_scores(b.scores))) for b in found]


def baseline_scores(task, runs, seeds=SEEDS):
    "seed, image_id, baseline, kind, score (rank within the fold) of the baselines that every fold allows; computed once"
    file, small = runs / f'{task}-baselines.csv', {}
    if not file.is_file():
        of = [RunFolder.open(runs / run_name(task, 'imagenet', seed, fold)) for seed in seeds for fold in folds_of(task)]
        pd.concat([t for run in of for t in fold_baselines(run, small)]).to_csv(file, index=False)
    t = pd.read_csv(file, dtype={'image_id': str})
    everywhere = t.groupby('baseline').size() == len(t[['seed', 'image_id']].drop_duplicates())
    return t[t['baseline'].map(everywhere)]


def add_baseline(scores, task, runs, seeds=SEEDS):
    "The scores with those of the baseline from image or file that is best on these very images, and the mean AUC of every baseline"
    if len(folds_of(task)) == 1: return scores, []
    t, rows, wide = baseline_scores(task, runs, seeds), [], {}
    for (name, kind), of in t.groupby(['baseline', 'kind']):
        by_image = of.pivot(index='image_id', columns='seed', values='score').loc[scores['image_id']]
        wide[name] = by_image.add_prefix('baseline_').reset_index(drop=True)
        auc = mean_auc(pd.concat([scores, wide[name]], axis=1), {'baseline': 1}, seeds)['value']
        rows.append(dict(baseline=name, kind=kind, auc=auc))
    rows.sort(key=lambda r: -r['auc'])
    best = next(r['baseline'] for r in rows if r['kind'] != 'metadata')
    return pd.concat([scores, wide[best]], axis=1), rows


def task_scores(task, runs, seeds=SEEDS):
    "One row per evaluated image: its fold in every seed, and its scores, of which one half is the frozen threshold"
    columns = {}
    for arm in ARMS:
        for seed in seeds:
            of = [RunFolder.open(runs / run_name(task, arm, seed, fold)) for fold in folds_of(task)]
            p = pool_predictions(of, 'threshold').set_index('image_id').sort_index()
            first = dict(group=p['group'], positive=(p['label'] == of[0].classes[1]).astype(int)) if not columns else {}
            columns |= first | {f'fold_{seed}': p['fold'], f'{arm}_{seed}': p['score']}
    return pd.DataFrame(columns).reset_index().assign(task=task)


def ranked(t, arm, seed):
    "(n,) the place of each image within its fold"
    return t.groupby(f'fold_{seed}')[f'{arm}_{seed}'].transform(lambda s: rank_scores(s)).to_numpy(float)


def mean_auc(t, weights, seeds=SEEDS):
    "Weighted sum of the AUCs of several arms and seeds on the same images, with its interval over patients (clustered DeLong)"
    scores = [ranked(t, arm, seed) for arm in weights for seed in seeds]
    w = np.repeat(list(weights.values()), len(seeds)) / len(seeds)
    y, group = t['positive'].to_numpy(), np.unique(t['group'], return_inverse=True)[1]
    auc, cov = auc_covariance(y, scores, group)
    bounds = (0., 1.) if min(w) > 0 else (-1., 1.)           # an AUC, or a difference of two
    found = bounded_interval(w @ auc, np.sqrt(w @ cov @ w), *bounds, df=rarer_groups(y == 1, group) - 1)
    return dict(value=float(w @ auc), low=float(found.low), high=float(found.high))


def shares(t, arm, seed):
    "{metric: (rows, right)} at the frozen threshold"
    right = ((t[f'{arm}_{seed}'] >= .5).astype(int) == t['positive']).to_numpy(float)
    of_class = {name: (t['positive'] == k).to_numpy() for name, k in SHARES.items()}
    return {name: (rows, right) for name, rows in {'accuracy': np.ones(len(t), bool), **of_class}.items()}


def seed_row(t, arm, seed):
    row = dict(seed=seed, auc=mean_auc(t, {arm: 1}, [seed])['value'])
    return row | {name: float(right[rows].mean()) for name, (rows, right) in shares(t, arm, seed).items()}


def summarise(t, seeds=SEEDS, n_boot=2000):
    "Every number of a task from its kept scores: per arm and seed, their means over seeds, and gains in pairs"
    found = {}
    for arm in ARMS:
        mean, each = dict(auc=mean_auc(t, {arm: 1}, seeds)), [shares(t, arm, s) for s in seeds]
        for name, (rows, _) in each[0].items():
            right = np.mean([s[name][1] for s in each], axis=0)
            mean[name] = dict(zip(('value', 'low', 'high'), patient_mean(right[rows], t['group'].to_numpy()[rows], n_boot)[:3]))
        found[arm] = dict(seeds=[seed_row(t, arm, s) for s in seeds], mean=mean)
    counts = dict(images=len(t), positive=int(t['positive'].sum()), groups=int(t['group'].nunique()))
    gains = dict(gain=mean_auc(t, {'imagenet': 1, 'random': -1}, seeds))
    if t[f'baseline_{seeds[0]}'].notna().all():
        gains |= dict(baseline=mean_auc(t, {'baseline': 1}, seeds), baseline_gain=mean_auc(t, {'imagenet': 1, 'baseline': -1}, seeds))
    return dict(counts, arms=found, **gains)


def add_minutes(found, task, runs):
    "Minutes of the features, and of the heads of every seed"
    kept = json.loads((runs / 'minutes.json').read_text())
    for arm, of in found['arms'].items():
        of['feature_minutes'] = {k.rpartition('encoder')[2]: round(v, 2) for k, v in kept.items() if k.startswith(f'{task}-{arm}-')}
        for row in of['seeds']:
            histories = [RunFolder.open(runs / run_name(task, arm, row['seed'], fold)).history for fold in folds_of(task)]
            row['minutes'] = round(sum(h['seconds'].sum() for h in histories) / 60, 3)
            if len(folds_of(task)) == 1: row['test_evaluations'] = len(read_test_log(runs / run_name(task, arm, row['seed'], 0)))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--runs', type=Path, required=True)
    p.add_argument('--out', type=Path, default=RESULTS / 'frozen_encoder.json')
    a = p.parse_args()
    for task in TASKS: run_task(task, data_folder(), a.runs)
    parts = {task: add_baseline(task_scores(task, a.runs), task, a.runs) for task in TASKS}
    scores, file = pd.concat([t for t, _ in parts.values()]), a.out.with_suffix('.csv.gz')
    write_compressed(a.out.with_suffix('.csv'), scores.map(lambda v: float(f'{v:.6g}') if isinstance(v, float) else v))
    kept, found = pd.read_csv(file), {}
    for task in TASKS:
        found[task] = summarise(kept[kept['task'] == task].reset_index(drop=True))
        found[task] |= dict(baselines=parts[task][1])
        add_minutes(found[task], task, a.runs)
    write_result(a.out, dict(about(), machine=machine(), encoder=COMMON['model.arch'], size=COMMON['image.size'], tasks=found))


if __name__ == '__main__': main()
