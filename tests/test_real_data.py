"""The real-data path: the counts that are known, and the main job on real radiographs, small. Skips, saying so, where they are not."""
import json
import numpy as np, pandas as pd, pytest
from conftest import DATA, cli, needs_data, python

pytestmark = needs_data


def test_the_june_2020_state_has_its_known_counts():
    from covid_cxr.sources import read_covid_chestxray
    from covid_cxr.table import filter_views, reconcile
    from covid_cxr.core import used
    t = filter_views(read_covid_chestxray(DATA / 'covid-chestxray-dataset'), ['PA'])
    u = used(t)
    assert len(t) == 751 == len(u) + t['excluded'].notna().sum()
    assert len(u) == 313 and u['patient'].nunique() == 205
    assert (u['finding'] == 'Pneumonia/Viral/COVID-19').sum() == 217 and u['finding'].isna().sum() == 12
    assert '751 rows in = 313 used + 438 excluded' in str(reconcile(t))


@pytest.mark.parametrize('state, pa, covid', [('2020-03-15', 58, 35), ('2020-06-22', 313, 217)])
def test_both_states_of_the_set_build(state, pa, covid):
    from covid_cxr.recipe import build_table, load_recipe, override
    from covid_cxr.core import used
    metadata = f'"covid-chestxray-metadata-history/{state}.csv"'
    recipe = override(load_recipe('covid-2020'), {
        'data.duplicates': 'none', 'data.sources.covid_chestxray.metadata': metadata, 'image.size': 32})
    t = build_table(recipe, DATA)
    u = used(t)
    mine = t[(t['source'] == 'covid_chestxray') & t['excluded'].isna() | (t['excluded'] == 'finding not stated')]
    assert len(mine) == pa and (u['label'] == 'covid').sum() == covid
    assert (u['source'] == 'kaggle_pneumonia').sum() >= 203
    assert (u.groupby('group')['split'].nunique() == 1).all()


def test_the_main_job_on_real_radiographs_small(tmp_path):
    "Train for one epoch at 64 px, and predict held-out real images in a fresh process; nothing is said about the number"
    p = cli('train', 'covid-2020', '--data', DATA, '--out', tmp_path / 'run', '--weights', 'none', '--arch', 'resnet18', '--size', '64',
            '--device', 'cpu', '--set', 'training.stages=[{epochs = 1, lr = 0.001}]', '--set', 'evaluation.n_boot=200',
            '--set', 'data.sources.kaggle_pneumonia.sample=60')
    assert p.returncode == 0, p.stderr[-2000:]
    assert 'rows in' in p.stdout and 'SYNTHETIC' not in p.stdout and 'source baseline' in p.stdout
    pred = pd.read_csv(tmp_path / 'run' / 'predictions.csv')
    test = pred[pred.split == 'test'].head(12)
    q = cli('predict', tmp_path / 'run', *test.path, '--out', tmp_path / 'out.csv')
    assert q.returncode == 0, q.stderr[-2000:]
    assert np.allclose(pd.read_csv(tmp_path / 'out.csv').prob_covid, test.prob_covid, atol=1e-5)
    t = pd.read_csv(tmp_path / 'run' / 'table.csv', low_memory=False)
    linked = t[t.excluded.isna()].set_index('patient').group
    for a, b in (('97', '178'), ('78', '201')):                            # one patient under two numbers, known since 2020
        both = [set(linked.get([f'covid_chestxray:{x}'], pd.Series(dtype=object))) for x in (a, b)]
        if all(both): assert both[0] == both[1], (a, b)
