"""Your own images and your own question, from the command line: two folders, or a table; every refusal says what to do in its words."""
import json, re, shutil
import numpy as np, pandas as pd, pytest
from PIL import Image
from conftest import ROOT, here
from covid_cxr.core import SYNTHETIC, VocabularyError
from covid_cxr.phantom import make_phantom
from covid_cxr.recipe import build_table, dump_recipe, load_recipe, override, parse_recipe, recipe_hash
from covid_cxr.runs.folder import RunFolder

QUICK = ('--size', '32', '--epochs', '1', '--arch', 'cnn3', '--weights', 'none', '--device', 'cpu', '--set', 'evaluation.n_boot=200')
PATTERN = '(p[0-9]+)_'


def picture(person, k, ill): return Image.fromarray(make_phantom(1, person, k, 48, .6 * ill, wobble=1).image)


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    "Two images of each of 24 people in two folders, and a table that says the same; the folder is called as a person would call it"
    root, rows = tmp_path_factory.mktemp('own') / 'my images', ['File;Pat-Nr;tb;Diagnosis;Set']
    for p in range(24):
        for k in range(2):
            file = f"{'TB' if p % 2 else 'healthy'}/p{p:02d}_{k}.png"
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            picture(p, k, p % 2).save(root / file)
            word = 'healthy' if p % 2 == 0 else 'old TB' if p % 4 == 1 else 'new TB'
            rows.append(f"{file};{p}.0;{p % 2}.0;{word};{'test' if p < 8 else 'train'}")
    (root / 'list.csv').write_text('\n'.join(rows) + '\n')
    return root


TABLE = ('--path-column', 'file', '--patient-column', 'PAT-NR')


@pytest.fixture(scope='module')
def run(images, tmp_path_factory):
    "The three commands: train, report, predict"
    out = tmp_path_factory.mktemp('runs') / 'tb'
    p = here('train', '--images', images, '--patient-pattern', PATTERN, '--out', out, *QUICK)
    assert p.returncode == 0, p.stderr
    (out / 'said.txt').write_text(p.stdout)
    return out


def test_two_folders_are_trained_and_every_page_says_their_words(run):
    said = (run / 'said.txt').read_text()
    assert 'your images: 48 images in 2 classes: \'healthy\' 24, \'TB\' 24' in said
    assert "'healthy' is the negative class by its word" in said
    assert 'patients: 24; whole patients are trained on or evaluated' in said and f'covid-cxr predict {run}' in said
    folder = RunFolder.open(run)
    assert folder.classes == ('healthy', 'TB') and folder.table['patient'].nunique() == 24
    assert (folder.table.groupby('patient')['split'].nunique() == 1).all()
    assert folder.evaluation['task'] == 'TB_vs_healthy' and 'threshold' in (run / 'summary.txt').read_text()
    assert parse_recipe((run / 'recipe.toml').read_text()) == folder.recipe


def test_the_next_two_commands_work(run, images):
    p = here('report', run, '--no-thumbnails')
    assert p.returncode == 0 and 'the word &#39;TB&#39;' in (run / 'report.html').read_text()
    p = here('predict', run, images / 'TB', images / 'healthy' / 'p00_0.png', '--ood', 'warn')
    assert p.returncode == 0 and p.stdout.count('(healthy 0.') == 25 and 'was not known' not in p.stderr, p.stderr


def test_the_other_commands_work(run, images):
    assert here('evaluate', run, '--n-boot', '100').returncode == 0
    p = here('audit', run, '--quick', '--n-boot', '100')
    assert p.returncode == 0 and 'lung-free baseline' in p.stdout, p.stderr
    p = here('external', run, 'folder', '--data', images, '--n-boot', '100')        # the same images: every one is left out or marked
    assert 'unknown finding' not in p.stderr
    p = here('inspect', '--images', images, '--patient-pattern', PATTERN)
    assert p.returncode == 0 and '48 used + 0 excluded; 24 patients' in p.stdout


def test_a_folder_of_one_class_is_looked_at_and_not_trained(tmp_path):
    for k in range(3):
        (tmp_path / 'all' / 'series').mkdir(parents=True, exist_ok=True)
        picture(k, 0, 0).save(tmp_path / 'all' / 'series' / f'p{k}.png')
    p = here('inspect', '--images', tmp_path / 'all', '--out', tmp_path / 'seen')
    assert p.returncode == 0 and '3 rows in = 3 used + 0 excluded' in p.stdout and (tmp_path / 'seen/index.html').is_file()
    p = here('train', '--images', tmp_path / 'all', '--out', tmp_path / 'run', *QUICK)
    assert p.returncode == 1 and "has 'series' (3); training needs two classes or more" in p.stderr


def test_the_same_command_again_shows_the_result(run, images):
    p = here('train', '--images', images, '--patient-pattern', PATTERN, '--out', run, *QUICK)
    assert p.returncode == 0 and 'already finished' in p.stdout


def test_the_run_can_be_made_again_from_its_recipe(run, images):
    again = build_table(parse_recipe((run / 'recipe.toml').read_text()), images)
    kept = RunFolder.open(run).table
    assert (again.set_index('image_id')['split'] == kept.set_index('image_id')['split']).all()


def test_without_patients_every_page_says_what_it_costs(images, tmp_path):
    p = here('train', '--images', images, '--out', tmp_path / 'run', *QUICK)
    assert p.returncode == 0 and 'WARNING: no image has a known patient (--patient-pattern' in p.stdout
    assert 'nothing of this run is "per patient"' in p.stdout
    unknown = 'the patient of 48 used images is not known, so a person may be on both sides'
    assert unknown in (tmp_path / 'run' / 'summary.txt').read_text()
    assert 'The patient of 48 of 48 images is not recorded' in (tmp_path / 'run' / 'report.html').read_text()
    assert 'The patient of 48 of 48 images is not recorded' in (tmp_path / 'run' / 'model-card.md').read_text().replace('\\', '')
    p = here('predict', tmp_path / 'run', images / 'TB' / 'p01_0.png', '--ood', 'off')
    assert 'the patient of 48 images of this model was not known' in p.stderr
    audit = here('audit', tmp_path / 'run', '--quick', '--n-boot', '100')
    assert audit.returncode == 0 and 'No patient ids are recorded' in audit.stdout


def dry(*args):
    "What a training would start from: the recipe and what is said, without the training"
    import contextlib, io
    from covid_cxr import cli
    parsed = cli.make_parser('train').parse_args(['train', *map(str, args)])
    with contextlib.redirect_stdout(io.StringIO()) as out:
        own = cli._own_images(parsed)
        return cli._own_recipe(own, parsed), own.data, out.getvalue()


@pytest.mark.parametrize('label, classes', [('tb', ['0', '1']), ('diagnosis', ['healthy', 'new TB', 'old TB'])])
def test_a_table_gives_the_same(images, label, classes):
    recipe, data, said = dry('--table', images / 'list.csv', *TABLE, '--label-column', label)
    assert list(recipe.question.classes) == classes and data == images and 'patients: 24' in said
    t = build_table(override(recipe, {'image.size': 32}), data)
    assert sorted(t['label'].unique()) == sorted(classes) and t['patient'].nunique() == 24 and t['excluded'].isna().all()
    assert parse_recipe(dump_recipe(recipe)) == recipe and dump_recipe(recipe).count('[task]') == 1


def test_three_classes_train(images, tmp_path):
    asked = '--label-column', 'Diagnosis', '--positive', 'new tb'
    p = here('train', '--table', images / 'list.csv', *TABLE, *asked, '--out', tmp_path / 'r', *QUICK)
    assert p.returncode == 0, p.stderr
    assert RunFolder.open(tmp_path / 'r').classes == ('healthy', 'old TB', 'new TB') and (tmp_path / 'r' / 'report.html').is_file()
    p = here('audit', tmp_path / 'r', '--quick', '--n-boot', '100')
    assert p.returncode == 0, p.stderr


def test_folders_and_a_table_go_together(images):
    "The folders say the class, the table says who it is; images that it does not name stay unknown and are counted"
    recipe, data, said = dry('--images', images, '--table', images / 'list.csv', *TABLE)
    assert recipe.data.sources[0].name == 'folder' and 'patients: 24;' in said
    part = images.parent / 'part.csv'
    part.write_text('\n'.join((images / 'list.csv').read_text().splitlines()[:11]) + '\n')
    recipe, data, said = dry('--images', images, '--table', part, *TABLE)
    assert 'WARNING: 38 images of 48 have no known patient' in said


def test_the_split_of_the_folders_is_kept(images, tmp_path):
    for f in images.glob('*/*.png'):
        to = tmp_path / 'all' / ('test' if int(f.name[1:3]) < 8 else 'train') / f.parent.name / f.name
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(f, to)
    recipe, data, said = dry('--images', tmp_path / 'all', '--patient-pattern', PATTERN)
    assert recipe.split.kind == 'official' and 'split: test/ as it is, validation drawn from the rest by patient' in said
    t = build_table(override(recipe, {'image.size': 32}), data)
    assert ((t['split'] == 'test') == t['path'].str.contains('/test/')).all() and set(t['split']) == {'train', 'valid', 'test'}
    (tmp_path / 'all' / 'train' / 'TB' / 'p09_0.png').rename(tmp_path / 'all' / 'test' / 'TB' / 'p09_0.png')
    p = here('train', '--images', tmp_path / 'all', '--patient-pattern', PATTERN, '--out', tmp_path / 'run', *QUICK)
    assert p.returncode == 1 and 'stand in the official test split and outside it' in p.stderr and '--set split.kind=group' in p.stderr
    assert not (tmp_path / 'run').exists()


def test_a_split_column_is_kept(images):
    recipe, data, said = dry('--table', images / 'list.csv', *TABLE, '--label-column', 'tb', '--split-column', 'set')
    assert recipe.split.kind == 'official'


def test_a_recipe_of_ones_own_keeps_its_task(images, tmp_path):
    "Two words are one class, and a word that the task does not name is left out"
    text = '[task]\nname = "tb"\nclasses = ["no", "yes"]\n[task.words]\nhealthy = "no"\n"new TB" = "yes"\n'
    (tmp_path / 'mine.toml').write_text('name = "mine"\n' + text + '[[data.sources]]\nname = "folder"\n[split]\ntest_pct = 0\n')
    recipe, data, said = dry(tmp_path / 'mine.toml', '--table', images / 'list.csv', *TABLE, '--label-column', 'diagnosis')
    assert "36 images in 2 classes: 'no' 24, 'yes' 12" in said and '12 images not used: word outside the task (12)' in said
    assert recipe.question.name == 'tb' and recipe.split.test_pct == 0


# --- refusals: one sentence, in the words of the command line ---------------------------------------------------------------------

FEW = [f'TB/p0{i}_0.png' for i in (1, 3, 5)] + [f'healthy/p0{i}_0.png' for i in (0, 2, 4)]
TREES = {   # files of a folder, below it; what is said
    'one-class': (FEW[:3], [], "has 'TB' (3); training needs two classes"),
    'three-images': (FEW[:2] + FEW[3:4], [], "class 'healthy' has 1 image; training, validation and test need 3 patients of every class"),
    'empty': ([], [], 'holds no image'),
    'a-level-deep': ([f'siteA/{f}' for f in FEW] + [f'siteB/{f}' for f in FEW], [], 'the classes are a level too deep; give --images'),
    'one-folder-above': ([f'data/{f}' for f in FEW], [], 'the classes are a level too deep; give --images'),
    'beside-the-splits': ([f'train/{f}' for f in FEW] + [f'other/{f}' for f in FEW], [], 'and beside them other; move one of the two away'),
    'a-class-missing-in-test': ([f'train/{f}' for f in FEW] + [f'test/{f}' for f in FEW[:1]], [], "test/ has no image of class 'healthy'"),
    'no-such-positive': (FEW, ['--positive', 'tuberculosis'], '--positive tuberculosis: there is no such class (classes: healthy, TB)'),
    'no-such-negative': (FEW, ['--negative', 'helthy'], "--negative helthy: there is no such class, did you mean 'healthy'?"),
    'one-patient': (FEW, ['--patient-pattern', '(png)'], "all 6 images are of one patient, 'png'; it must tell patients apart"),
    'a-patient-per-class': (FEW, ['--patient-pattern', '(TB|healthy)'], 'has 3 images of 1 patient (as --patient-pattern'),
    'pattern-matches-nothing': (FEW, ['--patient-pattern', '(IM-[0-9]+)'], 'is not in 6 of 6 paths below'),
    'pattern-without-brackets': (FEW, ['--patient-pattern', 'p[0-9]+'], 'put what names the patient into brackets'),
    'pattern-is-none': (FEW, ['--patient-pattern', '(p[0-9]+'], 'is no regular expression'),
    'data-too': (FEW, ['--data', '.'], 'leave --data out'),
    'column-without-table': (FEW, ['--label-column', 'x'], '--label-column needs the table'),
    'other-task': (FEW, ['demo'], "'covid_vs_other' of the recipe does not know your words (healthy and TB); leave the recipe out"),
}


@pytest.mark.parametrize('case', TREES)
def test_folders_that_cannot_be_trained(case, images, tmp_path):
    names, more, words = TREES[case]
    (tmp_path / 'in').mkdir()
    for name in names:
        (tmp_path / 'in' / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(images / '/'.join(name.split('/')[-2:]), tmp_path / 'in' / name)
    refused(words, tmp_path, '--images', tmp_path / 'in', *more)


def refused(words, tmp_path, *args):
    "Exit code 1, one sentence, nothing left behind"
    p = here('train', *args, '--out', tmp_path / 'run', *QUICK)
    assert p.returncode == 1 and words in p.stderr and p.stderr.startswith('covid-cxr: ') and p.stderr.count('\n') == 1, p.stderr
    assert 'Traceback' not in p.stderr and 'findings=' not in p.stderr and not (tmp_path / 'run').exists()


@pytest.mark.parametrize('args, words', [
    (['--images', 'nowhere'], '--images nowhere: there is no such folder'),
    (['--table', 'no.csv'], '--table no.csv: there is no such file'),
    ([], 'name a recipe'), (['--positive', 'TB'], '--positive is for your own images'),
    (['--patient-pattern', '(p)'], 'is for your own images')])
def test_what_is_not_there(args, words, tmp_path): refused(words, tmp_path, *args)


@pytest.mark.parametrize('args, words', [
    ([], '--table needs --path-column, the files of the images (columns of '),
    (['--path-column', 'file'], '--table needs --label-column, the classes (columns of '),
    (['--path-column', 'fil', '--label-column', 'tb'], "no such column, did you mean 'file'? (it has: file, pat-nr, tb, diagnosis, set)"),
    (['--path-column', 'file', '--label-column', 'dx'], '--label-column dx: '),
    (['--path-column', 'file', '--label-column', 'pat-nr'], '--label-column pat-nr has 24 different words'),
    (['--path-column', 'diagnosis', '--label-column', 'tb'], 'file missing (48)'),
    (['--path-column', 'file', '--label-column', 'tb', '--patient-pattern', PATTERN], 'name --patient-column')])
def test_tables_that_cannot_be_trained(args, words, images, tmp_path): refused(words, tmp_path, '--table', images / 'list.csv', *args)


def test_labels_that_are_blank_are_left_out_and_counted(images, tmp_path):
    t = pd.read_csv(images / 'list.csv', sep=';', dtype=str)
    t.loc[:3, 'tb'], t.loc[4:5, 'tb'], t.loc[6, 'tb'] = np.nan, ' unknown ', ' 1.0 '
    t.to_csv(tmp_path / 'blank.csv', index=False)
    recipe, data, said = dry('--images', images, '--table', tmp_path / 'blank.csv', *TABLE, '--label-column', 'tb')
    assert '42 images in 2 classes' in said and '6 images not used: finding not stated (6)' in said
    assert list(recipe.question.classes) == ['0', '1']


def test_files_that_cannot_be_read(images, tmp_path):
    shutil.copytree(images, tmp_path / 'in')
    (tmp_path / 'in' / 'TB' / 'broken.png').write_text('no picture')
    args = 'train', '--images', tmp_path / 'in', '--out', tmp_path / 'run', *QUICK
    p = here(*args)
    assert p.returncode == 1 and 'broken.png' in p.stderr and '--on-bad exclude' in p.stderr and not (tmp_path / 'run').exists()
    p = here(*args, '--on-bad', 'exclude')
    assert p.returncode == 0 and RunFolder.open(tmp_path / 'run').table['excluded'].notna().sum() == 1


def test_words_of_public_collections_stay_closed(images):
    "Only a task with words of its own reads a folder's words as they stand"
    recipe = override(load_recipe('own-images'), {'data.sources.folder.root': '[]', 'task': 'covid_vs_other'})
    with pytest.raises(VocabularyError, match="unknown finding: 'TB' .24., 'healthy' .24."): build_table(recipe, images)
    assert recipe_hash(recipe) != recipe_hash(load_recipe('own-images'))


def test_phantoms_stay_phantoms(images, tmp_path):
    shutil.copytree(images, tmp_path / 'in')
    (tmp_path / 'in' / 'SYNTHETIC.txt').write_text('phantoms')
    p = here('train', '--images', tmp_path / 'in', '--patient-pattern', PATTERN, '--out', tmp_path / 'run', *QUICK)
    assert p.returncode == 0 and 'SYNTHETIC' in (tmp_path / 'run' / 'summary.txt').read_text()
    assert (RunFolder.open(tmp_path / 'run').table['licence'] == SYNTHETIC).all()
    assert json.loads((tmp_path / 'run' / 'run.json').read_text())['synthetic'] is True


# --- the page ---------------------------------------------------------------------------------------------------------------------

def test_the_page_shows_three_commands_and_no_picture():
    cells = json.loads((ROOT / 'nbs/tutorials/three_commands.ipynb').read_text(encoding='utf-8'))['cells']
    shown = [line.split()[1] for line in re.findall(r'(?m)^\$ (covid-cxr .*)$', '\n'.join(''.join(c['source']) for c in cells))]
    assert shown == ['train', 'report', 'predict'] and all(not c.get('outputs') and not c.get('attachments') for c in cells)


def test_the_page_prints_what_the_three_commands_printed():
    "benchmarks/three_commands.py typed them; '...' stands for lines that are left out"
    kept = json.loads((ROOT / 'benchmarks/results/three_commands.json').read_text(encoding='utf-8'))
    cells = json.loads((ROOT / 'nbs/tutorials/three_commands.ipynb').read_text(encoding='utf-8'))['cells']
    page = '\n'.join(''.join(c['source']) for c in cells)
    blocks = re.findall(r'```text\n\$ (.*?)\n(.*?)\n```', page, re.S)
    assert [b[0] for b in blocks] == [c['command'] for c in kept['commands']] and all(c['code'] == 0 for c in kept['commands'])
    for (_, text), c in zip(blocks, kept['commands']):
        shown, printed = text.splitlines(), iter(c['printed'])
        assert all(line in printed for line in shown if line != '...'), 'a line that was not printed, or out of order'
        assert '...' in shown or shown == c['printed']
