"""Every table of the documentation, made from the kept results, each interval from 2,000 resamples:

    python benchmarks/make_tables.py      ->  benchmarks/results/tables.json, in about a minute

The pages read this file; tests/test_results.py makes the tables again and compares every cell.
"""
import argparse
from record import RESULTS
from covid_cxr.articles.tables import write_tables


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--results', default=str(RESULTS), help='folder of kept results')
    p.add_argument('--n-boot', type=int, default=2000, help='resamples of patients')
    a = p.parse_args()
    print(write_tables(a.results, a.n_boot))
