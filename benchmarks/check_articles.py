"""Do the numbers that the articles print follow from whole films? And do the result files that one author published say what the article says?

    python benchmarks/check_articles.py --articles ../shared/articles

Every claim is searched for in all confusion matrices of its test set (`covid_cxr.stats.paired.check_published`). The published CSVs are recounted: calls against the larger
probability, probabilities against one, files named twice, and the shares that the article quotes. The result replaces benchmarks/results/article_numbers.json.
"""
import argparse, json, re, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import pandas as pd
from covid_cxr.stats.paired import check_published
from covid_cxr.core import versions

OUT = ROOT / 'benchmarks/results/article_numbers.json'
REPORTED_RESULTS = (   # article, test set as (positive, negative) or (total, None) where the article does not say, numbers as printed
    ('pneumonia-cnn', (585, None), dict(accuracy='.9624', precision='.9655', recall='.9836', specificity='.9051', f1='.9745')),
    ('pneumonia-explained', (390, 234), dict(accuracy='.87', false_positive_rate='.19')),
    ('covid-2020, validation', (65, None), dict(accuracy='.938')),
    ('covid-2020, test', (4, 74), dict(accuracy='.962')),
    ('coronahack-vgg', (390, 234), dict(accuracy='.921')),
    ('Kermany et al. 2018 (the data set\'s own paper)', (390, 234), dict(accuracy='.928', recall='.932', specificity='.901')),
)


def check_claim(n_pos, n_neg, numbers):
    "Confusion matrices that fit, and (where the class counts are not said) the class counts that allow one"
    if n_neg is not None:
        m = check_published(n_pos, n_neg, **numbers)
        return dict(test_set=f'{n_pos} positive, {n_neg} negative', matrices=len(m), first=m.iloc[0].to_dict() if len(m) else None)
    fits = {k: check_published(k, n_pos - k, **numbers) for k in range(1, n_pos)}
    fits = {k: m for k, m in fits.items() if len(m)}
    k = min(fits, default=None)
    return dict(test_set=f'{n_pos} films, shares of the classes not said', matrices=sum(map(len, fits.values())), positives_possible=[min(fits), max(fits)] if fits else None, first=fits[k].iloc[0].to_dict() if fits else None)


def recount(file, label, probs, name):
    "What one published CSV says when it is counted again"
    t = pd.read_csv(file)
    p = t[probs].map(lambda s: [float(v) for v in re.findall(r'\d*\.\d+(?:e-?\d+)?|\d+\.?', s.split('[')[1])[:2]])
    called = t[label].str.strip().str.lower()
    larger = p.map(lambda v: 'covid' if v[0] >= v[1] else 'other')
    return t, dict(rows=len(t), called_covid=int((called == 'covid').sum()), share_covid=round(float((called == 'covid').mean()), 4), calls_against_the_larger_probability=int((called != larger).sum()),
                   largest_error_of_the_sum=round(float(p.map(lambda v: abs(sum(v) - 1)).max()), 4), files_named_twice=int(t[name].map(lambda s: Path(str(s)).name).duplicated().sum()),
                   probabilities_that_repeat=int(t[probs].duplicated().sum()))


if __name__ == '__main__':
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--articles', default='../shared/articles')
    a = a.parse_args()
    claims = [dict(article=name, printed=numbers, **check_claim(*n, numbers)) for name, n, numbers in REPORTED_RESULTS]
    folder, files = Path(a.articles) / 'covid-2020-results', {}
    for file, label, probs, name, claim in (('Bacterial_test.csv', 'predicted label', 'probabilities', 'filename', .1871), ('viral_test.csv', 'predicted label', 'probabilities', 'filename', .1208)):
        _, files[file] = recount(folder / file, label, probs, name)
        files[file].update(claimed_share_covid=claim, agrees=abs(files[file]['share_covid'] - claim) < 1e-4)
    t, files['NCOV_test_results.csv'] = recount(folder / 'NCOV_test_results.csv', 'Predicted Label', 'Positive, Negative (COVID-19)', 'Filename')
    remark = t['Remark'].fillna('').str.strip().str.upper()
    kaggle = t['References'].str.contains('kaggle')
    covid = t['Predicted Label'].str.strip().str.lower() == 'covid'
    right = (covid & ~kaggle) | (~covid & kaggle)
    files['NCOV_test_results.csv'].update(covid_films=int((~kaggle).sum()), right=int(right.sum()), accuracy=round(float(right.mean()), 4), claimed_accuracy=.962, agrees=abs(float(right.mean()) - .962) < 6e-4,
                                          remarks=remark[remark != ''].value_counts().to_dict(), false_alarms=int((covid & kaggle).sum()), missed=int((~covid & ~kaggle).sum()))
    out = dict(command='python benchmarks/check_articles.py --articles ../shared/articles', date=time.strftime('%Y-%m-%d'), versions=versions(), claims=claims, files=files)
    OUT.write_text(json.dumps(out, indent=1) + '\n')
    print(json.dumps(dict(claims=claims, files=files), indent=1))
