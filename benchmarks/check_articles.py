"""Do the numbers that the articles print follow from whole images? And do the files of predictions that one author published say what
the article says?

    python benchmarks/check_articles.py

Every printed number is looked for in all confusion matrices of its test set (`covid_cxr.stats.paired.check_published`). The published CSVs
are counted again: predictions against the larger probability, probabilities against one, files named twice, and the shares that the
article quotes. They are read from the folder `articles` beside the data folder.
The result replaces benchmarks/results/article_numbers.json.
"""
import argparse, json, re
from pathlib import Path
from record import RESULTS, about, write_result
import pandas as pd
from covid_cxr.core import data_folder
from covid_cxr.stats.paired import check_published

OUT = RESULTS / 'article_numbers.json'
PRINTED = (   # article, test set as (positive, negative) or (total, None) where the article does not say, numbers as printed
    ('pneumonia-cnn', (585, None), dict(accuracy='.9624', precision='.9655', recall='.9836', specificity='.9051', f1='.9745')),
    ('pneumonia-explained', (390, 234), dict(accuracy='.87', false_positive_rate='.19')),
    ('covid-2020, validation', (65, None), dict(accuracy='.938')),
    ('covid-2020, test', (4, 74), dict(accuracy='.962')),
    ('coronahack-vgg', (390, 234), dict(accuracy='.921')),
    ("Kermany et al. 2018 (the data set's own paper)", (390, 234), dict(accuracy='.928', recall='.932', specificity='.901')),
)
CHILDREN = (('Bacterial_test.csv', .1871), ('viral_test.csv', .1208))   # file, share predicted COVID-19 as the article says it


def fitting_matrices(n_pos, n_neg, numbers):
    "Confusion matrices that fit, and (where the class counts are not said) the class counts that allow one"
    if n_neg is not None:
        m = check_published(n_pos, n_neg, **numbers)
        first = m.iloc[0].to_dict() if len(m) else None
        return dict(test_set=f'{n_pos} positive, {n_neg} negative', matrices=len(m), first=first)
    fits = {k: check_published(k, n_pos - k, **numbers) for k in range(1, n_pos)}
    fits = {k: m for k, m in fits.items() if len(m)}
    possible, first = ([min(fits), max(fits)], fits[min(fits)].iloc[0].to_dict()) if fits else (None, None)
    return dict(test_set=f'{n_pos} images, shares of the classes not said', matrices=sum(map(len, fits.values())),
                positives_possible=possible, first=first)


def two_probabilities(text):
    "The probabilities of COVID-19 and other from the printed tensor"
    return [float(v) for v in re.findall(r'\d*\.\d+(?:e-?\d+)?|\d+\.?', text.split('[')[1])[:2]]


def recount(t, label, probs, name):
    "What one published CSV says when it is counted again"
    p = t[probs].map(two_probabilities)
    predicted = t[label].str.strip().str.lower()
    larger = p.map(lambda v: 'covid' if v[0] >= v[1] else 'other')
    files = t[name].map(lambda s: Path(str(s)).name)
    return dict(
        rows=len(t), predicted_covid=int((predicted == 'covid').sum()), share_covid=round(float((predicted == 'covid').mean()), 4),
        predictions_against_the_larger_probability=int((predicted != larger).sum()),
        largest_error_of_the_sum=round(float(p.map(lambda v: abs(sum(v) - 1)).max()), 4),
        files_named_twice=int(files.duplicated().sum()), probabilities_that_repeat=int(t[probs].duplicated().sum()))


def recount_children(file, reported):
    "A CSV of children, none of whom has COVID-19"
    found = recount(pd.read_csv(file), 'predicted label', 'probabilities', 'filename')
    return dict(found, reported_share_covid=reported, agrees=abs(found['share_covid'] - reported) < 1e-4)


def recount_test(file, reported=.962):
    "The CSV of the test: 4 images with COVID-19, 74 normal children"
    t = pd.read_csv(file)
    kaggle = t['References'].str.contains('kaggle')
    covid = t['Predicted Label'].str.strip().str.lower() == 'covid'
    right = covid != kaggle
    remark = t['Remark'].fillna('').str.strip().str.upper()
    return dict(
        recount(t, 'Predicted Label', 'Positive, Negative (COVID-19)', 'Filename'), covid_images=int((~kaggle).sum()),
        right=int(right.sum()), accuracy=round(float(right.mean()), 4), reported_accuracy=reported,
        agrees=abs(float(right.mean()) - reported) < 6e-4, remarks=remark[remark != ''].value_counts().to_dict(),
        false_positives=int((covid & kaggle).sum()), missed=int((~covid & ~kaggle).sum()))


def measure(articles):
    "Both questions"
    folder = Path(articles) / 'covid-2020-results'
    reported = [dict(article=name, printed=numbers, **fitting_matrices(*n, numbers)) for name, n, numbers in PRINTED]
    files = {file: recount_children(folder / file, share) for file, share in CHILDREN}
    files['NCOV_test_results.csv'] = recount_test(folder / 'NCOV_test_results.csv')
    return dict(reported=reported, files=files)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--articles', default=str(data_folder().parent / 'articles'), help='folder that holds covid-2020-results')
    p.add_argument('--out', default=str(OUT))
    a = p.parse_args()
    found = measure(a.articles)
    write_result(a.out, dict(about(), **found))
    print(json.dumps(found, indent=1))
