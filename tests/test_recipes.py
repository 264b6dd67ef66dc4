"""Every shipped recipe runs from end to end on phantoms; those of the articles say what their protocol leaks; on the real data
they give the articles' counts; and the recipes of kept runs have the hash that they were run with."""
import importlib.resources, json, re, shutil, statistics
import pandas as pd, pytest
from conftest import DATA, ROOT, here, needs_data, tiny_recipe
from covid_cxr.core import LeakError, RecipeError
from covid_cxr.recipe import (OF_FINDINGS, build_table, dump_recipe, list_recipes, load_recipe, override, parse_recipe,
                              recipe_fields, recipe_hash)
from covid_cxr.runs.folder import RunFolder, find_file

NAMES = sorted(list_recipes().name)
LEAKY = {'pneumonia-cnn', 'pneumonia-explained', 'covid-2020-article', 'covid-2020-asides', 'effusion-resnet'}
SMALL = {'image.size': 32, 'model.arch': 'cnn3', 'model.weights': 'none', 'training.bs': 4,
         'training.stages': '[{epochs = 1, lr = 0.001}]', 'evaluation.n_boot': 100}


@pytest.fixture(scope='session')
def trees(tmp_path_factory):
    "Every collection that a recipe reads, as phantoms, where the recipes look for it"
    from covid_cxr.phantom import write_coronahack_csv, write_nih_tree, write_phantom_folder, write_phantom_trees
    root = tmp_path_factory.mktemp('trees') / 'data'
    write_phantom_trees(root, seed=1, size=48, n_patients=40, n_normal=60, n_pneumonia=60)
    write_nih_tree(root / 'nih-chest-xrays', n_patients=60, seed=1, size=48)
    write_phantom_folder(root / 'my-images', n_patients=40, seed=1, size=48)
    for name, word in (('NORMAL', 'healthy'), ('PNEUMONIA', 'TB')): (root / 'my-images' / name).rename(root / 'my-images' / word)
    write_coronahack_csv(root / 'coronahack', root / 'chest-xray-pneumonia', root / 'covid-chestxray-dataset')
    shutil.copytree(root / 'chest-xray-pneumonia', root / 'chest-xray-pneumonia-512')
    (root / 'covid-chestxray-metadata-history').mkdir()
    shutil.copy(root / 'covid-chestxray-dataset' / 'metadata.csv', root / 'covid-chestxray-metadata-history' / '2020-03-15.csv')
    return root


ON_PHANTOMS = {'nih-findings': {'task.findings': ['Effusion', 'Infiltration']}}      # the phantoms have no others


@pytest.mark.parametrize('name', NAMES)
def test_a_recipe_runs_to_its_report(name, trees, tmp_path):
    from covid_cxr.runs.train import train
    said = []
    recipe = override(load_recipe(name), {**SMALL, **ON_PHANTOMS.get(name, {})})
    out = train(recipe, data=trees, out=tmp_path / 'run', device='cpu', cache_dir=trees.parent / 'cache', log=said.append)
    e, state = json.loads((out / 'evaluation.json').read_text()), json.loads((out / 'run.json').read_text())
    assert state['status'] == 'finished' and state['synthetic'] and e['synthetic']
    assert (state['leaking_groups'] > 0) <= (name in LEAKY), 'only an article\'s own protocol may leak'
    assert any('LEAK' in line for line in said) == (state['leaking_groups'] > 0)
    pred = pd.read_csv(out / 'predictions.csv')
    probs = pred[[c for c in pred if c.startswith('prob_')]]
    assert ((probs >= 0) & (probs <= 1)).all(axis=None) and (recipe.several or (abs(probs.sum(axis=1) - 1) < 1e-5).all())
    assert e['split'] == ('valid' if name in ('covid-2020-article', 'covid-2020-asides') else 'test')
    assert 'SYNTHETIC' in (out / 'summary.txt').read_text() and (out / 'bundle' / 'bundle.json').is_file()
    from covid_cxr.report.findings import write_any_report
    page = write_any_report(out, thumbnails=False).read_text()
    assert recipe.title.split(':')[0] in page and 'SYNTHETIC' in page.upper() and (out / 'model-card.md').is_file()


def test_leaks_of_an_article_are_found_on_phantoms(trees):
    t = build_table(override(load_recipe('pneumonia-cnn'), SMALL), trees)
    crossing = t[t.excluded.isna()].groupby('group').split.nunique()
    assert (crossing > 1).any(), 'an image split of children with several images must cut some of them'
    strict = override(load_recipe('pneumonia-cnn'), {**SMALL, 'split.allow_leak': False})
    with pytest.raises(LeakError, match='groups stand in more than one split'): build_table(strict, trees)


def test_a_recipe_runs_from_the_command_line(trees, tmp_path):
    p = here('train', 'effusion-resnet', '--data', trees, '--out', tmp_path / 'run', '--size', '32', '--epochs', '1', '--arch', 'cnn3',
            '--device', 'cpu', '--set', 'evaluation.n_boot=100')
    assert p.returncode == 0, p.stderr[-2000:]
    assert re.search(r'auc 0\.\d+|auc 1\.000', p.stdout) and 'LEAK' in p.stdout and (tmp_path / 'run' / 'report.html').is_file()


def test_all_is_reproduced_from_the_command_line(trees, tmp_path):
    "In its quick form: an article with its folds, the in-domain weights, and its arms; a second call trains nothing"
    from covid_cxr.articles.tables import TITLES
    args = ('reproduce', '--data', trees, '--out', tmp_path / 'all', '--quick', '--only', 'effusion-resnet',
            '--device', 'cpu', '--cache', trees.parent / 'cache')
    p = here(*args)
    assert p.returncode == 0, p.stderr[-2000:]
    runs = {r.name for r in (tmp_path / 'all' / 'runs').iterdir()}
    arms = {f'effusion-resnet-honest-{arm}-seed42-fold{i}' for arm in ('random', 'in-domain') for i in (0, 1)}
    assert runs == {'effusion-resnet', 'effusion-resnet-honest-fold0', 'effusion-resnet-honest-fold1', 'pretrain', *arms}
    md = (tmp_path / 'all' / 'reproduce.md').read_text()
    titles = TITLES['arms'], TITLES['gains']
    for words in ('SYNTHETIC PHANTOMS', 'Quick', *titles, 'in-domain', 'from scratch', 'fold 1', 'together'):
        assert words in md and words in p.stdout, words
    baselines = {f.parent.name for f in (tmp_path / 'all' / 'runs').glob('*/baselines.csv')}
    assert baselines == runs - arms, 'an arm shares the baselines of its split'
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / 'all' / 'runs').glob('*/predictions.csv')}
    assert here(*args).returncode == 0 and before == {f: f.stat().st_mtime_ns for f in before}
    assert 'lacks' in here('reproduce', '--data', tmp_path, '--out', tmp_path / 'none').stderr and not (tmp_path / 'none').exists()


def test_arms_are_planned_as_they_are_written_down():
    "Names and recipes of the two tasks with three seeds, by hand"
    from covid_cxr.articles.reproduce import plan_runs
    folds = ('imagenet', 'imagenet'), ('random', 'none'), ('in-domain', 'out/runs/pretrain/bundle/weights.safetensors')
    by_hand = {
        'model.arch': 'efficientnet_lite0', 'image.size': 224, 'training.bs': 16, 'training.average': .95, 'training.keep': 'last',
        'training.stages': [dict(epochs=1, frozen=True, lr=.002), dict(epochs=9, lr=.001)], 'training.imbalance': 'weighted_loss',
        'training.cost_matrix': [], 'training.opt': 'adam', 'training.schedule': 'one_cycle', 'training.wd': .01, 'training.patience': 0,
        'training.monitor': 'valid_loss', 'training.rotate': 10, 'training.zoom': 1.1, 'training.lighting': .2, 'training.shift': 0.,
        'training.flip': False}
    effusion = 'Article 5, leak-safe (one of 5 folds by patient): effusion with pneumonia against no finding, EfficientNet-Lite0'
    plan = {p.name: p.recipe for p in plan_runs('out/runs', arms=['imagenet', 'random', 'in-domain'])}
    names = list(plan)
    assert names[0] == 'pretrain' and len(names) == len(plan)
    for name, title in (('effusion-resnet-honest', effusion), ('covid-2020-within', load_recipe('covid-2020-within').title)):
        assert [n for n in names if n.startswith(name)] == [
            f'{name}-{arm}-seed{k}-fold{i}' for arm, _ in folds for k in (42, 43, 44) for i in range(5)]
        for arm, weights in folds:
            wanted = {**by_hand, 'title': title, 'seed': 43, 'split.fold': 2, 'model.weights': weights}
            assert plan[f'{name}-{arm}-seed43-fold2'] == override(load_recipe(name), wanted)
    large = plan['pneumonia-resnet-random-seed44']
    assert (large.training.bs, large.training.average, large.image.size, large.seed) == (32, .99, 224, 44)
    assert [(s.epochs, s.frozen, s.lr) for s in large.training.stages] == [(1, True, .002), (3, False, .001)]
    flagship = override(load_recipe('covid-2020'), {'model.arch': 'efficientnet_lite0', 'model.weights': 'imagenet'})
    assert plan['covid-2020-imagenet-seed42'] == flagship
    assert {n.split('-imagenet')[0] for n in names if '-imagenet' in n} == {
        'pneumonia-cnn', 'pneumonia-cnn-honest', 'pneumonia-explained', 'pneumonia-explained-honest', 'pneumonia-suppressed',
        'coronahack-vgg', 'coronahack-vgg-honest', 'coronahack-kinds', 'pneumonia-resnet', 'effusion-resnet', 'effusion-resnet-honest',
        'covid-2020-article', 'covid-2020', 'covid-2020-adults', 'covid-2020-left-out', 'covid-2020-within'}


@pytest.mark.parametrize('name', NAMES)
def test_a_recipe_says_where_it_comes_from(name):
    text = importlib.resources.files('covid_cxr').joinpath('recipes', f'{name}.toml').read_text(encoding='utf-8')
    head = text[:text.index('name =')]
    assert head.startswith('# ') and len(head) > 100
    if name in LEAKY - {'covid-2020-asides'} | {'coronahack-vgg'}:
        for word in ('https://', 'Claims:', 'It did:', 'chosen by us:', 'Wrong with it:'): assert word in head, word


def test_pairs_differ_in_the_data_and_the_choice_alone():
    "An article's protocol and its leak-safe twin have the same network, image rule and schedule"
    for name in ('pneumonia-cnn', 'pneumonia-explained', 'coronahack-vgg', 'effusion-resnet'):
        one, two = load_recipe(name), load_recipe(f'{name}-honest')
        assert (one.task, one.image, one.model, one.seed) == (two.task, two.image, two.model, two.seed)
        skip = ('keep', 'patience', 'monitor')
        a, b = ({k: v for k, v in vars(r.training).items() if k not in skip} for r in (one, two))
        assert a == b
        assert not two.split.allow_leak and two.data.repeats == 'drop'


@needs_data
def test_the_articles_counts_on_the_real_tables():
    "Splits and samples without opening an image"
    from covid_cxr.core import used
    from covid_cxr.recipe import apply_split, read_one_source
    from covid_cxr.table import join_tables, filter_views, label_for
    def table(name):
        r = load_recipe(name)
        t = join_tables([read_one_source(s, DATA, r.seed) for s in r.data.sources])
        t = label_for(filter_views(t, r.data.views) if r.data.views else t, r.task)
        t = t.assign(group=t['patient'].where(t['patient'].notna(), t['image_id']))
        return used(apply_split(t, r.split, r.seed))
    counts = table('pneumonia-cnn').groupby('split').size().to_dict()
    assert counts in ({'train': 4099, 'valid': 1171, 'test': 586}, {'train': 4099, 'valid': 1172, 'test': 585})
    assert table('pneumonia-explained').groupby('split').size().to_dict() == {'train': 5216, 'valid': 16, 'test': 624}
    march = table('covid-2020-article')
    assert (march.label == 'covid').sum() == 35 and (march.source == 'covid_chestxray').sum() == 58
    assert (march.split == 'test').sum() == 0 and abs((march.split == 'valid').sum() - 65) <= 2 and abs(len(march) - 261) <= 3
    assert (table('coronahack-vgg').split == 'test').sum() == 624
    assert table('effusion-resnet').label.value_counts().to_dict() == {'no_finding': 393, 'effusion': 65}


RESULTS = ROOT / 'benchmarks' / 'results'
KEPT = sorted(p.parent for p in RESULTS.glob('*/recipe.toml'))


def test_kept_recipes_have_the_hash_that_they_were_run_with():
    "Although four fields of the training have other names today"
    same = set()
    for folder in KEPT:
        recipe = parse_recipe((folder / 'recipe.toml').read_text(encoding='utf-8'))
        if recipe_hash(recipe) == json.loads((folder / 'run.json').read_text())['recipe_hash']: same.add(folder.name)
        assert parse_recipe(dump_recipe(recipe)) == recipe
    assert len(KEPT) >= 40 and {f.name for f in KEPT} == same


def _late_lines():
    "The lines of the fields that early files did not have, at their defaults"
    import dataclasses
    from covid_cxr import recipe
    sections = (v for v in vars(recipe).values() if dataclasses.is_dataclass(v))
    late = {f.name for cls in sections for f in dataclasses.fields(cls) if 'later' in f.metadata}
    return {f"{f.field.rpartition('.')[2]} = {f.default}" for f in recipe_fields().itertuples() if f.field.rpartition('.')[2] in late}


def _early(recipe):
    "The same recipe as an early file wrote it"
    late = _late_lines()
    text = '\n'.join(line for line in dump_recipe(recipe).split('\n') if line not in late)
    for new, old in dict(stages='rounds', num_it='lr_find_it', opt='optimiser', cost_matrix='costs').items():
        text = re.sub(rf'^{new} = ', f'{old} = ', text.replace(f'[[training.{new}]]', f'[[training.{old}]]'), flags=re.M)
    return text


@pytest.mark.parametrize('name', NAMES)
def test_an_early_file_is_the_same_recipe(name):
    "Old names in a file and on the command line give the same recipe and the same hash"
    recipe = load_recipe(name)
    early = parse_recipe(_early(recipe))
    assert early == recipe and recipe_hash(early) == recipe_hash(recipe)
    old = {'training.rounds': '[{epochs = 2}]', 'training.lr_find_it': '50', 'training.optimiser': 'sgd',
           'training.rounds.0.lr': '0.01'}
    new = {'training.stages': '[{epochs = 2}]', 'training.num_it': '50', 'training.opt': 'sgd', 'training.stages.0.lr': '0.01'}
    assert override(recipe, old) == override(recipe, new)


def test_a_hash_is_of_the_early_text():
    "By hand: SHA-256 of the text that early versions wrote"
    import hashlib
    recipe = load_recipe('demo')
    early, today = (hashlib.sha256(text.encode()).hexdigest() for text in (_early(recipe), dump_recipe(recipe)))
    assert recipe_hash(recipe) == early != today


def test_every_closed_choice_is_refused_by_its_field():
    "A word that a field does not know is an error that names the field, whatever the field"
    closed = {f: words.split(', ') for f, words in recipe_fields()[['field', 'value']].itertuples(index=False) if ', ' in words}
    assert len(closed) >= 14 and {'image.how', 'split.kind', 'training.opt', 'data.on_bad'} <= set(closed)
    for told, words in closed.items():
        name, recipe = told.removesuffix(OF_FINDINGS), load_recipe('nih-findings' if told.endswith(OF_FINDINGS) else 'demo')
        refusal = re.escape(f"{name}='no such word'")
        with pytest.raises(RecipeError, match=refusal): override(recipe, {name: 'no such word'})
        for word in words:
            if (name, word) != ('split.kind', 'source'): override(recipe, {name: word})
    with pytest.raises(RecipeError, match='split.source'): override(load_recipe('demo'), {'split.kind': 'source'})


def test_every_field_of_a_recipe_is_explained():
    t = recipe_fields()
    assert t['meaning'].map(lambda m: isinstance(m, str) and len(m) > 5).all(), t[t['meaning'].isna()]
    assert t['field'].is_unique and len(t) >= 53 and (t['value'].str.len() > 0).all()


# --- a question of one's own, a recipe for a person, a schema for an editor ---------------------------------------------------------

ASKED = """[task]
name = "tb"
classes = ["healthy", "old TB", "TB"]
[task.words]
gesund = "healthy"
"Tbc, alt" = "old TB"
1 = "TB"
[task.findings]
Tuberculosis = "TB"
normal = "healthy"
"""


def test_a_question_of_ones_own_is_a_section():
    recipe = tiny_recipe(FOLDER, {'training.stages': '[{epochs = 2}]'})
    mine = parse_recipe(dump_recipe(recipe).replace('task = "pneumonia_vs_normal"\n', '') + '\n' + ASKED)
    assert parse_recipe(dump_recipe(mine)) == mine and recipe_hash(mine) != recipe_hash(recipe)
    task = mine.question
    assert (task.name, task.classes) == ('tb', ('healthy', 'old TB', 'TB')) and task.class_of_word(' tbc, ALT') == 'old TB'
    assert task.rules == (('Tuberculosis', 'TB'), ('No Finding', 'healthy'))
    assert recipe.question.name == recipe.task == 'pneumonia_vs_normal'


def test_a_word_is_a_task_as_before():
    "A recipe that names its task by a word is written, read and hashed as before"
    for name in set(NAMES) - {'own-images', 'nih-findings'}:
        text = dump_recipe(load_recipe(name))
        assert re.search(r'^task = "\w+"$', text, re.M) and '[task' not in text


@pytest.mark.parametrize('name', NAMES)
def test_a_recipe_for_a_person_is_the_same_recipe(name):
    from covid_cxr.recipe import describe_recipe, read_preface
    recipe = load_recipe(name)
    text = describe_recipe(recipe, read_preface(name))
    assert parse_recipe(text) == recipe and recipe_hash(parse_recipe(text)) == recipe_hash(recipe)
    assert text.startswith(read_preface(name)[0]) and max(map(len, text.splitlines())) < 250
    comments = ' '.join(re.sub(r'(?m)^# ?', '', '\n'.join(line for line in text.splitlines() if line.startswith('#'))).split())
    kind = 'findings' if recipe.several else 'word' if isinstance(recipe.task, str) else 'classes'
    for f in recipe_fields().itertuples():
        field = f.field.removesuffix(OF_FINDINGS)
        of = 'findings' if field != f.field else 'word' if field == 'task' else 'classes'
        if field.partition('.')[0] == 'task' and of != kind: continue      # a word, or a section of one of two kinds
        told = ' '.join(f.meaning.split())
        assert told[1:] in comments, f.field
        if ', ' in f.value: assert f'One of: {f.value}' in comments, f.field
        assert re.search(rf'(?m)^{field.rpartition(".")[2]} = ', text), f.field


def test_the_commands_print_what_the_functions_return():
    from covid_cxr.recipe import recipe_schema
    assert parse_recipe(here('recipe', 'covid-2020').stdout) == load_recipe('covid-2020')
    assert json.loads(here('recipe', '--schema').stdout) == json.loads(json.dumps(recipe_schema()))
    assert "did you mean 'covid-2020'" in here('recipe', 'covid-202').stderr


def fits(value, schema):
    "Does a value fit a JSON schema? Only the words that `recipe_schema` uses"
    kinds = dict(string=str, integer=int, number=(int, float), boolean=bool, array=list, object=dict)
    if 'anyOf' in schema: return any(fits(value, s) for s in schema['anyOf'])
    if 'enum' in schema and value not in schema['enum']: return False
    if 'type' not in schema: return True
    if not isinstance(value, kinds[schema['type']]) or (isinstance(value, bool) and schema['type'] != 'boolean'): return False
    if schema['type'] == 'array': return all(fits(v, schema.get('items', {})) for v in value)
    if schema['type'] != 'object' or 'properties' not in schema: return True
    known = schema['properties']
    return set(schema['required']) <= set(value) <= set(known) and all(fits(v, known[k]) for k, v in value.items())


@pytest.mark.parametrize('name', NAMES)
def test_every_shipped_recipe_fits_the_schema(name):
    from covid_cxr.recipe import describe_recipe, recipe_schema, tomllib
    shipped = importlib.resources.files('covid_cxr').joinpath('recipes', f'{name}.toml').read_text(encoding='utf-8')
    for text in (shipped, dump_recipe(load_recipe(name)), describe_recipe(load_recipe(name))):
        assert fits(tomllib.loads(text), recipe_schema())


@pytest.mark.parametrize('wrong', [
    'seed = "x"', 'sead = 1', 'task = "covid_vs_othr"', '[image]\nhow = "padd"', '[image]\nsize = 2.5',
    '[training]\nstages = [{epoch = 1}]',
    '[task]\nname = "x"', '[task]\nname = "x"\nclasses = [1, 2]', '[[data.sources]]\nroot = ["x"]', '[split]\nallow_leak = 1'])
def test_what_a_recipe_refuses_the_schema_refuses(wrong):
    from covid_cxr.recipe import recipe_schema, tomllib
    values = tomllib.loads(f'name = "x"\n{wrong}\n')
    assert fits({'name': 'x'}, recipe_schema()) and not fits(values, recipe_schema())


EXTERNAL = [f for f in KEPT if RunFolder(f).external_json]


def test_there_are_kept_external_tests(): assert len(EXTERNAL) >= 8


@pytest.mark.parametrize('folder', EXTERNAL, ids=lambda f: f.name)
def test_kept_external_tests_follow_from_their_predictions(folder):
    classes = ['normal', 'pneumonia'] if 'pneumonia' in folder.name or 'coronahack' in folder.name else ['other', 'covid']
    for test in RunFolder(folder).external_json['tests']:
        p = pd.read_csv(find_file(folder, test['predictions']))
        assert len(p) == test['n_images'] and p.group.nunique() == test['n_groups'] and 'path' not in p
        positive = p[f'prob_{classes[1]}'] >= test['threshold']
        by_hand = dict(false_positive_rate=positive[p.label == classes[0]], recall=positive[p.label == classes[1]])
        for metric, right in by_hand.items():
            if metric in test['estimates']: assert right.mean() == pytest.approx(test['estimates'][metric]['value']), (test['name'], metric)


def test_the_table_of_reported_results_follows_from_the_files():
    "Accuracy of an article's protocol at one half, and of its leak-safe twin as frozen, by hand from predictions.csv"
    from covid_cxr.articles.reported import ARTICLES
    from covid_cxr.articles.conditions import find_networks
    from covid_cxr.articles.tables import ABSENT, ONE_HALF, reproduce_table
    table, found = reproduce_table(RESULTS, n_boot=100), find_networks(RESULTS)
    seen = 0
    for key, article in ARTICLES.items():
        for result, name in (('protocol', article.protocol), ('leak-safe', article.leak_safe)):
            rows = table[(table['article'] == key) & (table['result'] == result)]
            if name not in found: assert (rows['run'] == ABSENT).all()
            for n in found.get(name, []):
                same = rows['run'] == n.title
                (row,) = rows[same & ((rows['threshold'] == ONE_HALF) == (result == 'protocol'))].to_dict('records')
                metric = 'accuracy' if row['accuracy'] else 'recall'
                every = [pd.concat([_right_by_hand(run.path, result) for run in runs]) for runs in n.trainings]
                value = statistics.mean((t if metric == 'accuracy' else t[t.ill]).right.mean() for t in every)
                printed = float(row[metric].split()[0])
                assert abs(printed - value) < .00051 and row['images'] == len(every[0]), (key, result, n.title)
                seen += 1
    assert seen, 'no kept run belongs to an article'


def _right_by_hand(folder, result):
    "Is each evaluated image predicted rightly, and is it ill?"
    e, p = json.loads((folder / 'evaluation.json').read_text()), pd.read_csv(find_file(folder, 'predictions.csv'))
    p = p[p.split == e.get('split', e.get('part'))]
    probability = [c for c in p if c.startswith('prob_')][1]
    positive = p[probability] >= (.5 if result == 'protocol' else e['operating_point']['threshold'])
    ill = p.label == probability.removeprefix('prob_')
    return pd.DataFrame(dict(right=positive == ill, ill=ill))


# --- options of a source, and patients of one's own images ------------------------------------------------------------------

FOLDER = 'name = "folder"\nroot = ["own"]\n'


@pytest.fixture(scope='module')
def own_images(tmp_path_factory):
    "Three images of each of 16 people, as a folder per class and as a table; the picture does not give the person away"
    import numpy as np
    from PIL import Image
    from covid_cxr.phantom import make_phantom
    root, rows = tmp_path_factory.mktemp('own'), ['file,pid,dx']
    for p, k in ((p, k) for p in range(16) for k in range(3)):
        file = f"{'PNEUMONIA' if p % 2 else 'NORMAL'}/p{p:03d}_{k}.png"
        (root / 'own' / file).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(make_phantom(1, p, k, 64, .6 * (p % 2), wobble=1).image).save(root / 'own' / file)
        rows.append(f"{file},{p}{'.0' if k == 1 else ''},{2 - p % 2}.0")
    (root / 'own.csv').write_text('\n'.join(rows) + '\n')
    return root


CSV = '''name = "csv"
root = ["own"]
metadata = "own.csv"
options = {columns = {path = "file", patient = "pid", finding = "dx"}, findings = {1 = "Pneumonia", 2 = "No Finding"}}
'''


@pytest.mark.parametrize('source', [FOLDER + "options = {patient = '(p\\d+)_'}\n", CSV], ids=['folder', 'csv'])
def test_patients_of_own_images_are_named_in_a_recipe(source, own_images):
    recipe = tiny_recipe(source)
    assert parse_recipe(dump_recipe(recipe)) == recipe and recipe_hash(recipe) != recipe_hash(tiny_recipe(FOLDER))
    t = build_table(recipe, own_images)
    assert t['patient'].nunique() == 16 and t['excluded'].isna().all()
    person = t['path'].str.extract(r'(p\d+)_')[0]
    assert (t.groupby(person)['split'].nunique() == 1).all() and (t.groupby(person)['group'].nunique() == 1).all()


def test_without_named_patients_the_table_says_so(own_images):
    from covid_cxr.table import count_unknown_patients, reconcile
    t = build_table(tiny_recipe(FOLDER), own_images)
    assert count_unknown_patients(t) == 48 and '48 used images of an unknown patient' in str(reconcile(t))


@pytest.mark.parametrize('source, words', [
    (FOLDER + "patient = '(p)'\n", "is an option of the source 'folder'; write options = {patient = ...}"),
    (FOLDER + "options = {patiens = '(p)'}\n", "no option 'patiens', did you mean 'patient'"),
    (FOLDER + "options = 'patient'\n", 'must be names with values'), (FOLDER + 'options = {patient = 2020-03-05}\n', 'must be text'),
    ('name = "csv"\ncolumns = {}\n', "is an option of the source 'csv'"),
    ('name = "nih"\noptions = {headers = true}\n', "no option 'headers'")])
def test_options_that_no_reader_has_are_refused(source, words):
    with pytest.raises(RecipeError) as e: tiny_recipe(source)
    assert words in str(e.value)


@pytest.mark.parametrize('source, words', [
    (FOLDER + "options = {patient = '(p'}\n", 'no regular expression'), (FOLDER + "options = {patient = 'p'}\n", 'has no group'),
    (FOLDER + 'options = {patient = 5}\n', 'no regular expression'), (FOLDER + 'options = {findings = "x"}\n', 'must name your words'),
    ('name = "csv"\nroot = ["own"]\n', 'name it with metadata in a recipe'),
    ('name = "csv"\nroot = ["own"]\nmetadata = "own.csv"\n', "in a recipe columns stands in the source's options"),
    (CSV.replace('"file"', '"fiel"'), 'own.csv has no column fiel'), (CSV.replace('"pid"', '"file", sex = "pid"'), 'own.csv: unknown sex')])
def test_options_that_do_not_fit_are_sentences(source, words, own_images):
    from covid_cxr.core import CxrError
    with pytest.raises(CxrError) as e: build_table(tiny_recipe(source), own_images)
    assert words in str(e.value)


def test_options_are_set_on_the_command_line(own_images):
    plain = tiny_recipe(FOLDER)
    one = override(plain, {'data.sources.folder.options.patient': r'(p\d+)_'})
    assert one == override(plain, {'data.sources.folder.options': r"{patient = '(p\d+)_'}"}) and plain.data.sources[0].options == {}
    two = override(one, {'data.sources.folder.options.findings.healthy': 'No Finding'})
    assert two.data.sources[0].options == {'patient': r'(p\d+)_', 'findings': {'healthy': 'No Finding'}}


def test_an_empty_option_changes_no_hash():
    for name in NAMES: assert 'options' not in dump_recipe(load_recipe(name))


# --- several findings -------------------------------------------------------------------------------------------------------

SEVERAL = ['Pneumonia', 'Atelectasis|Pneumonia', 'Pneumonia|Atelectasis', 'No Finding', 'Mass|Effusion|Nodule', 'Mass',
           'No Finding|Effusion']


@pytest.mark.parametrize('findings, task, kept', [
    (['Pneumonia'], 'pneumonia_vs_normal', [0, 1, 2]), (['pneumonia', 'normal'], 'pneumonia_vs_normal', [0, 1, 2, 3]),
    (['Effusion'], 'effusion_vs_no_finding', [4]), (['Mass', 'Effusion'], 'covid_vs_other', [4, 5]),
    ([], 'covid_vs_other', [0, 1, 2, 3, 4, 5])])
def test_any_wanted_finding_keeps_an_image(findings, task, kept, tmp_path):
    "In whatever order the source lists them; a contradiction is excluded by its own reason"
    from covid_cxr.core import used
    from covid_cxr.recipe import SourceSpec, read_one_source
    from covid_cxr.table import label_for
    rows = ''.join(f'{i:08d}_000.png,{f},0,{i},60,M,PA\n' for i, f in enumerate(SEVERAL))
    head = 'Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position\n'
    (tmp_path / 'Data_Entry_2017.csv').write_text(head + rows)
    spec = SourceSpec('nih', findings=findings, options={'files': 'ignore'})
    t = label_for(read_one_source(spec, tmp_path, 0), task, every_class=False)
    assert used(t).index.tolist() == kept
    if 'Effusion' in findings: assert t['excluded_rule'][6] == 'findings contradict each other'


@needs_data
@pytest.mark.parametrize('finding, n', [('Effusion', 65), ('No Finding', 393)])
def test_all_wanted_images_of_the_shared_nih_set(finding, n):
    from covid_cxr.core import used
    from covid_cxr.recipe import SourceSpec, read_one_source
    t = read_one_source(SourceSpec('nih', root=['nih-chest-xrays'], findings=[finding]), DATA, 0)
    assert len(used(t)) == n == t['findings'].str.split('|').map(lambda f: finding in f).sum()


def test_a_table_of_a_relative_data_folder_is_understood_elsewhere(own_images, tmp_path, monkeypatch):
    "The pictures are found, and their copies too, after the working folder has changed"
    from covid_cxr.table import group_leaksafe
    recipe = tiny_recipe(FOLDER + "options = {patient = '(p\\d+)_'}\n")
    monkeypatch.chdir(own_images)
    t = build_table(recipe, '.')
    monkeypatch.chdir(tmp_path)
    pd.testing.assert_frame_equal(t, build_table(recipe, own_images))
    assert (group_leaksafe(t, duplicates='exact')['group'] == t['group']).all()
