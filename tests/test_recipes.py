"""Every shipped recipe runs from end to end on phantoms; those of the articles say what their protocol leaks; on the real data they give the articles' counts."""
import importlib.resources, json, re, shutil
import pandas as pd, pytest
from conftest import DATA, ROOT, cli, needs_data
from covid_cxr.recipe import build_table, list_recipes, load_recipe, override

NAMES = sorted(list_recipes().name)
LEAKY = {'pneumonia-cnn', 'pneumonia-explained', 'covid-2020-article', 'covid-2020-asides', 'effusion-resnet'}
SMALL = {'image.size': 32, 'model.arch': 'cnn3', 'model.weights': 'none', 'training.bs': 4, 'training.rounds': '[{epochs = 1, lr = 0.001}]', 'evaluation.n_boot': 100}


@pytest.fixture(scope='session')
def trees(tmp_path_factory):
    "Every collection that a recipe reads, as phantoms, where the recipes look for it"
    from covid_cxr.phantom import write_coronahack_csv, write_nih_tree, write_phantom_trees
    root = tmp_path_factory.mktemp('trees') / 'data'
    write_phantom_trees(root, seed=1, size=48, n_patients=40, n_normal=60, n_pneumonia=60)
    write_nih_tree(root / 'nih-chest-xrays', n_patients=60, seed=1, size=48)
    write_coronahack_csv(root / 'coronahack', root / 'chest-xray-pneumonia', root / 'covid-chestxray-dataset')
    shutil.copytree(root / 'chest-xray-pneumonia', root / 'chest-xray-pneumonia-512')
    (root / 'covid-chestxray-metadata-history').mkdir()
    shutil.copy(root / 'covid-chestxray-dataset' / 'metadata.csv', root / 'covid-chestxray-metadata-history' / '2020-03-15.csv')
    return root


@pytest.mark.parametrize('name', NAMES)
def test_a_recipe_runs_to_its_report(name, trees, tmp_path):
    from covid_cxr.runs.train import train
    said = []
    recipe = override(load_recipe(name), SMALL)
    out = train(recipe, data=trees, out=tmp_path / 'run', device='cpu', cache_dir=trees.parent / 'cache', log=said.append)
    e, state = json.loads((out / 'evaluation.json').read_text()), json.loads((out / 'run.json').read_text())
    assert state['status'] == 'finished' and state['synthetic'] and e['synthetic']
    assert (state['leaking_groups'] > 0) <= (name in LEAKY), 'only an article\'s own protocol may leak'
    assert any('LEAK' in line for line in said) == (state['leaking_groups'] > 0)
    pred = pd.read_csv(out / 'predictions.csv')
    probs = [c for c in pred if c.startswith('prob_')]
    assert (abs(pred[probs].sum(axis=1) - 1) < 1e-5).all() and e['part'] == ('valid' if name in ('covid-2020-article', 'covid-2020-asides') else 'test')
    assert 'SYNTHETIC' in (out / 'summary.txt').read_text() and (out / 'bundle' / 'bundle.json').is_file()
    from covid_cxr.report.page import write_report
    page = write_report(out, thumbnails=False).read_text()
    assert recipe.title.split(':')[0] in page and 'SYNTHETIC' in page.upper() and (out / 'model-card.md').is_file()


def test_leaks_of_an_article_are_found_on_phantoms(trees):
    t = build_table(override(load_recipe('pneumonia-cnn'), SMALL), trees)
    crossing = t[t.excluded.isna()].groupby('group').split.nunique()
    assert (crossing > 1).any(), 'an image split of children with several films must cut some of them'
    with pytest.raises(Exception, match='groups stand in more than one part'): build_table(override(load_recipe('pneumonia-cnn'), {**SMALL, 'split.allow_leak': False}), trees)


def test_a_recipe_runs_from_the_command_line(trees, tmp_path):
    p = cli('train', 'effusion-resnet', '--data', trees, '--out', tmp_path / 'run', '--size', '32', '--epochs', '1', '--arch', 'cnn3', '--device', 'cpu', '--set', 'evaluation.n_boot=100')
    assert p.returncode == 0, p.stderr[-2000:]
    assert re.search(r'auc 0\.\d+|auc 1\.000', p.stdout) and 'LEAK' in p.stdout and (tmp_path / 'run' / 'report.html').is_file()


def test_all_is_reproduced_from_the_command_line(trees, tmp_path):
    "In its quick form: an article with its folds, the in-domain weights, and the arms that start from them; a second call trains nothing"
    args = ('reproduce', '--data', trees, '--out', tmp_path / 'all', '--quick', '--only', 'effusion-resnet', 'pretrain', '--device', 'cpu', '--cache', trees.parent / 'cache')
    p = cli(*args)
    assert p.returncode == 0, p.stderr[-2000:]
    runs = {r.name for r in (tmp_path / 'all' / 'runs').iterdir()}
    assert {'effusion-resnet', 'effusion-resnet-honest-fold1', 'pretrain', 'covid-2020-within-in-domain-fold0'} <= runs and len(runs) == 10
    md = (tmp_path / 'all' / 'reproduce.md').read_text()
    for words in ('Synthetic phantoms', 'Quick', 'Starting weights', 'in-domain', 'from scratch', 'Above the best rival that saw no lung', 'fold 1', 'together'): assert words in md and words in p.stdout, words
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / 'all' / 'runs').glob('*/predictions.csv')}
    assert cli(*args).returncode == 0 and before == {f: f.stat().st_mtime_ns for f in before}
    assert 'lacks' in cli('reproduce', '--data', tmp_path, '--out', tmp_path / 'none').stderr and not (tmp_path / 'none').exists()


@pytest.mark.parametrize('name', NAMES)
def test_a_recipe_says_where_it_comes_from(name):
    text = importlib.resources.files('covid_cxr').joinpath('recipes', f'{name}.toml').read_text(encoding='utf-8')
    head = text[:text.index('name =')]
    assert head.startswith('# ') and len(head) > 100
    if name in LEAKY - {'covid-2020-asides'} | {'coronahack-vgg'}:
        for word in ('https://', 'Claims:', 'It did:', 'chosen by us:', 'Wrong with it:'): assert word in head, word


def test_pairs_differ_in_the_data_and_the_choice_alone():
    "An article's protocol and its leak-safe twin have the same network, picture and schedule"
    for a in ('pneumonia-cnn', 'pneumonia-explained', 'coronahack-vgg', 'effusion-resnet'):
        one, two = load_recipe(a), load_recipe(f'{a}-honest')
        assert (one.task, one.image, one.model, one.seed) == (two.task, two.image, two.model, two.seed)
        skip = ('keep', 'patience', 'monitor')
        assert {k: v for k, v in vars(one.training).items() if k not in skip} == {k: v for k, v in vars(two.training).items() if k not in skip}
        assert not two.split.allow_leak and two.data.repeats == 'drop'


@needs_data
def test_the_articles_counts_on_the_real_tables():
    "Splits and samples without opening an image"
    from covid_cxr.core import used
    from covid_cxr.recipe import _split, read_one_source
    from covid_cxr.table import join_tables, filter_views, label_for
    def table(name):
        r = load_recipe(name)
        t = join_tables([read_one_source(s, DATA, r.seed) for s in r.data.sources])
        t = label_for(filter_views(t, r.data.views) if r.data.views else t, r.task)
        return used(_split(t.assign(group=t['patient'].where(t['patient'].notna(), t['image_id'])), r.split, r.seed))
    counts = table('pneumonia-cnn').groupby('split').size()
    assert counts.to_dict() == {'train': 4099, 'valid': 1171, 'test': 586} or counts.to_dict() == {'train': 4099, 'valid': 1172, 'test': 585}
    assert table('pneumonia-explained').groupby('split').size().to_dict() == {'train': 5216, 'valid': 16, 'test': 624}
    march = table('covid-2020-article')
    assert (march.label == 'covid').sum() == 35 and (march.source == 'covid_chestxray').sum() == 58
    assert (march.split == 'test').sum() == 0 and abs((march.split == 'valid').sum() - 65) <= 2 and abs(len(march) - 261) <= 3
    assert (table('coronahack-vgg').split == 'test').sum() == 624
    assert table('effusion-resnet').label.value_counts().to_dict() == {'no_finding': 393, 'effusion': 65}


RESULTS = ROOT / 'benchmarks' / 'results'
LADDERS = sorted(p for p in RESULTS.glob('*/ladder.json'))


@pytest.mark.parametrize('file', LADDERS, ids=lambda p: p.parent.name)
def test_kept_rungs_follow_from_their_predictions(file):
    classes = ['normal', 'pneumonia'] if 'pneumonia' in file.parent.name or 'coronahack' in file.parent.name else ['other', 'covid']
    for rung in json.loads(file.read_text())['rungs']:
        p = pd.read_csv(file.parent / rung['predictions'])
        assert len(p) == rung['n_images'] and p.group.nunique() == rung['n_groups'] and 'path' not in p
        called = p[f'prob_{classes[1]}'] >= rung['threshold']
        for metric, right in (('false_positive_rate', called[p.label == classes[0]]), ('recall', called[p.label == classes[1]])):
            if metric in rung['estimates']: assert right.mean() == pytest.approx(rung['estimates'][metric]['value']), (rung['name'], metric)


def test_the_ledger_of_claims_follows_from_the_files():
    "Accuracy under an article's protocol, by hand from predictions.csv"
    from covid_cxr.articles.reproduce import ABSENT, REPORTED_RESULTS, find_results, reproduce_table
    table, found = reproduce_table(RESULTS, n_boot=100).set_index(['article', 'metric']), find_results(RESULTS)
    seen = 0
    for key, a in REPORTED_RESULTS.items():
        for column, name in (('protocol', a.protocol), ('leak_safe', a.honest)):
            if name not in found: assert (table.loc[key][column] == ABSENT).all(); continue
            metric, parts = ('accuracy' if (key, 'accuracy') in table.index else 'recall'), []
            for r in found[name]:
                pred = pd.read_csv(r['folder'] / 'predictions.csv')
                pred = pred[pred.split == r['evaluation']['part']]
                positive = [c for c in pred if c.startswith('prob_')][1]
                called = pred[positive] >= (.5 if column == 'protocol' else r['evaluation']['operating_point']['threshold'])
                parts.append(pd.DataFrame(dict(right=called == (pred.label == positive[5:]), sick=pred.label == positive[5:])))
            all_ = pd.concat(parts)
            value = (all_ if metric == 'accuracy' else all_[all_.sick]).right.mean()
            assert table.loc[(key, metric), column].startswith(f'{value:.3f}'), (key, column)
            seen += 1
    assert seen, 'no kept run belongs to an article'
