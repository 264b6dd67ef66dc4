"""The intervals of the kept results, computed again from their predictions; no value may move:

    python benchmarks/renew_intervals.py      ->  evaluation.json, external.json, audit.json and their texts below benchmarks/results/,
                                                  and explain_errors.json there

Needed when the way in which intervals are computed has changed. What cannot be computed without the images stays as it was measured: the
intervals of baselines, checks and gains in audit.json, the source baseline, and in explain_errors.json all but the difference at one
sensitivity. `make_tables.py` comes afterwards.
"""
import argparse, json, re
from pathlib import Path
from record import RESULTS, kept_folders, write_result
import numpy as np
from explain_errors import matched
from covid_cxr.articles.tables import score_external
from covid_cxr.evaluate import allow_undefined
from covid_cxr.runs.compare import read_evaluated
from covid_cxr.runs.external import read_external_tests
from covid_cxr.runs.folder import RunFolder, evaluate_rows, find_file

ENDS = ('low', 'high', 'note')


def same(a, b): return a is None and b is None or a is not None and b is not None and np.isclose(a, b, rtol=0, atol=1e-9)


def renew(kept, estimates, what):
    "Put the interval of every estimate into the dictionaries of a file"
    for name, e in estimates.items():
        if name not in kept: continue
        new = e.to_dict()
        if not same(kept[name]['value'], new['value']):
            raise SystemExit(f"{what}: {name} was {kept[name]['value']} and is {new['value']}; values must not move.")
        kept[name].update({k: new[k] for k in ENDS})


def renew_text(file, estimates):
    "The same intervals in a text with lines like 'accuracy 0.830  [0.712, 0.930]'"
    text = file.read_text(encoding='utf-8')
    for name, e in estimates.items():
        words = rf"(^ *{name.replace('_', ' ')} {e.value:.3f}  )\[[^]]*\]"
        text = re.sub(words, rf'\g<1>[{e.low:.3f}, {e.high:.3f}]', text, flags=re.M)
    file.write_text(text, encoding='utf-8')


def renew_run(run):
    "evaluation.json and summary.txt of one run; returns its estimates"
    file = find_file(run.path, 'evaluation.json')
    kept = json.loads(file.read_text(encoding='utf-8'))
    about, c = kept[run.split], run.recipe
    rows = run.evaluated_predictions
    rows = rows.assign(group=rows['group'].fillna(rows['image_id']))
    with allow_undefined():
        estimates = evaluate_rows(rows, list(run.classes), about['threshold'], about['n_boot'], c.seed).estimates
    renew(about['estimates'], estimates, run.name)
    write_result(file, kept)
    renew_text(run.file('summary.txt'), estimates)
    return estimates


def renew_external(run):
    "Every external test of one run"
    if run.external_json is None: return
    file = find_file(run.path, 'external.json')
    raw = json.loads(file.read_text(encoding='utf-8'))
    kept = next(v for v in raw.values() if isinstance(v, list) and v and isinstance(v[0], dict))      # whatever the version calls it
    for d, test in zip(kept, read_external_tests(run)):
        if test.threshold is not None: renew(d['estimates'], score_external(run, test, test.threshold), f'{run.name}, {test.name}')
        for old, name in (('sensitivity', 'recall'), ('false_call_rate', 'false_positive_rate')):
            if d.get(old) and name in d['estimates']: d[old] = d['estimates'][name]
    write_result(file, raw)


def renew_audit(run, auc):
    "The model's AUC of an audit is that of its run"
    if run.audit_json is None: return
    raw = json.loads(run.file('audit.json').read_text(encoding='utf-8'))
    old, new = raw['headline']['model_auc'], dict(low=auc.low, high=auc.high)
    before, after = (f"{old['value']:.3f} [{e['low']:.3f}, {e['high']:.3f}]" for e in (old, new))
    old.update(new)
    write_result(run.file('audit.json'), raw)
    text = run.file('audit.txt').read_text(encoding='utf-8')
    run.file('audit.txt').write_text(text.replace(f'model {before}', f'model {after}'), encoding='utf-8')


def renew_matched(kept, results):
    "False positive rates of the two trainings at one sensitivity: the entry of explain_errors.json, from the predictions of both runs"
    folders = {d.name: d for d in kept_folders(results)}
    pair = [read_evaluated(folders[kept['trained'][k]]) for k in ('first', 'second')]
    ids, old = sorted(pair[0].test.index), kept['trained']['at_sensitivity']
    y, groups = (pair[0].test.loc[ids, k].to_numpy(object) for k in ('label', 'group'))
    new = matched(y, *(j.scores(ids) for j in pair), groups, old['sensitivity'])
    for name in ('first', 'second', 'difference'):
        if not same(old[name], new[name]): raise SystemExit(f'explain_errors.json: {name} was {old[name]} and is {new[name]}.')
    return {**old, **new}


def renew_explained(results):
    "explain_errors.json, where it is kept"
    file = results / 'explain_errors.json'
    if not file.exists(): return
    kept = json.loads(file.read_text(encoding='utf-8'))
    kept['trained']['at_sensitivity'] = renew_matched(kept, results)
    write_result(file, kept)
    print(file.name, flush=True)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--results', type=Path, default=RESULTS, help='folder of kept results')
    results = p.parse_args().results
    for folder in kept_folders(results):
        estimates = renew_run(RunFolder.open(folder))
        renew_external(RunFolder.open(folder))
        if 'auc' in estimates: renew_audit(RunFolder.open(folder), estimates['auc'])
        print(folder.name, flush=True)
    renew_explained(results)
