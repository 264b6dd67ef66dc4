"""NIH's fourteen findings trained, evaluated and audited by the recipe `nih-findings`: what can be estimated on this cut, and what cannot.

python benchmarks/nih_findings.py --data DATA --out RUN

The run directory RUN is an ordinary one; a run that was stopped goes on, and a finished one is only read. Kept in
benchmarks/results/nih_findings.json: per finding the images with and without it, AUC, sensitivity and specificity with intervals over
patients, the frozen threshold, the best lung-free baseline and the gain over it, or the reason why it is NOT ESTIMABLE."""
import argparse
from record import RESULTS, about, machine, write_result
from covid_cxr.audit.findings import read_findings_audit
from covid_cxr.audit.run import audit_findings
from covid_cxr.report.findings import write_findings_report
from covid_cxr.runs.folder import FindingsRun
from covid_cxr.runs.train import train

METRICS = ('auc', 'average_precision', 'recall', 'specificity')


def of_finding(r, audit):
    "One finding as plain values"
    row = dict(finding=r.finding, **r.count._asdict(), reason=r.reason)
    if r.evaluation is None: return row
    metrics = {m: r[m].to_dict() for m in METRICS} | dict(threshold=r.evaluation.threshold)
    h, best = audit.findings[r.finding].headline, audit.findings[r.finding].headline.best_baseline
    return row | metrics | dict(best_baseline=best and best.name, best_baseline_auc=best and best.auc.to_dict(),
                                gain=h.auc_gain.to_dict(), outcome=audit.gains[r.finding])


def summary(run, audit):
    "What is kept of a run"
    result, history = run.result, run.history
    return dict(recipe=run.recipe.name, recipe_hash=run.state['recipe_hash'], size=run.recipe.image.size, arch=run.bundle['arch'],
                images={s: int((run.rows['split'] == s).sum()) for s in ('train', 'valid', 'test')},
                epochs=len(history), training_seconds=round(float(history['seconds'].sum())), n_groups=result.n_groups,
                mean={m: result.macro[m].to_dict() for m in METRICS}, temperature=run.bundle['temperature'],
                findings=[of_finding(r, audit) for r in result.results],
                audit_seconds=round(audit.whole.seconds), verdicts={k: n for k, n in audit.counts.items() if n})


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--data', required=True, help='folder that holds the collections')
    p.add_argument('--out', required=True, help='run directory')
    p.add_argument('--cache', help='keep decoded images here')
    a = p.parse_args()
    run = FindingsRun.open(train('nih-findings', data=a.data, out=a.out, device='cpu', cache_dir=a.cache))
    audit = read_findings_audit(run) or audit_findings(run.path, cache_dir=a.cache)
    print(write_findings_report(run.path))
    write_result(RESULTS / 'nih_findings.json', dict(about(), machine=machine(), **summary(run, audit)))
    print(run.result)


if __name__ == '__main__': main()
