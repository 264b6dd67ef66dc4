"""The command line: every example parses, every choice comes from its type, older command lines still work and say so."""
import shlex
import pytest
from conftest import cli, here, python
from covid_cxr.cache import OnBad
from covid_cxr.cli import COMMANDS, OLD_FLAGS, make_parser, renew_command
from covid_cxr.core import Split, choices
from covid_cxr.deploy.explain import MapMethod
from covid_cxr.predict import OnBadFile, OODMode
from covid_cxr.recipe import load_recipe
from covid_cxr.runs.external import Search
from covid_cxr.sources import SOURCES

VERBS = ['demo', 'train', 'inspect', 'download', 'predict', 'explain', 'evaluate', 'external', 'audit', 'report', 'compare', 'ensemble',
         'calibrate', 'reproduce', 'export', 'push', 'serve', 'recipes', 'recipe', 'checks', 'completion']
NEEDED = dict(train='R', inspect='R --data D', predict='RUN a.png', explain='RUN a.png', evaluate='RUN', external='RUN nih', audit='RUN',
              report='RUN', compare='A B', ensemble='A B --out X', calibrate='RUN D --out X', reproduce='--data D', export='RUN --out X',
              push='RUN anna/model', serve='BUNDLE')


def parse(line): return make_parser().parse_args(shlex.split(line))


def test_the_verbs(): assert [c.name for c in COMMANDS] == VERBS


@pytest.mark.parametrize('command', COMMANDS, ids=lambda c: c.name)
def test_every_help_example_parses_and_names_what_there_is(command):
    words = shlex.split(command.example)
    assert words[:2] == ['covid-cxr', command.name] and renew_command(words[1:]) == (words[1:], [])
    args = make_parser().parse_args(words[1:])
    assert args.do is command.do
    if command.name in ('external', 'download'): assert args.source in SOURCES
    if command.name in ('train', 'recipe'): load_recipe(args.recipe)
    if command.name == 'inspect' and args.what not in SOURCES: load_recipe(args.what)


@pytest.mark.parametrize('command', COMMANDS, ids=lambda c: c.name)
def test_help_fits_a_terminal_and_ends_with_the_example(command, capsys):
    with pytest.raises(SystemExit) as e: make_parser(command.name).parse_args([command.name, '--help'])
    text = capsys.readouterr().out
    assert e.value.code == 0 and ' '.join(command.example.split()) in ' '.join(text.split())


def _choices(command, flag):
    sub = next(a for a in make_parser()._actions if a.dest == 'command')
    return next(a for a in sub.choices[command]._actions if flag in a.option_strings).choices


@pytest.mark.parametrize('command, flag, kind', [
    ('evaluate', '--split', Split), ('predict', '--ood', OODMode), ('predict', '--on-bad', OnBadFile), ('external', '--on-bad', OnBad),
    ('external', '--duplicates', Search), ('explain', '--method', MapMethod)])
def test_choices_come_from_the_types(command, flag, kind): assert tuple(_choices(command, flag)) == choices(kind)


def test_whatever_a_command_writes_is_named_with_out():
    for name in ('demo', 'train', 'inspect', 'download', 'predict', 'explain', 'report', 'compare', 'reproduce', 'export'):
        assert parse(f"{name} {NEEDED.get(name, '')} --out there").out == 'there', name


OLDER = [
    ('predict RUN a.png --csv o.csv', 'predict RUN a.png --out o.csv'),
    ('predict RUN a.png --csv=o.csv --gate=off', 'predict RUN a.png --out=o.csv --ood=off'),
    ('predict RUN a.png --gate warn --on-bad stop', 'predict RUN a.png --ood warn --on-bad raise'),
    ('download nih --to data', 'download nih --out data'),
    ('export RUN --to my-model --pickle', 'export RUN --out my-model --pickle'),
    ('evaluate RUN --part valid', 'evaluate RUN --split valid'),
    ('evaluate RUN --on nih --data D --findings Pneumonia Effusion', 'external RUN --data D --findings Pneumonia Effusion -- nih'),
    ('evaluate --on=nih RUN --exclude-bad --min-age 18 --part test', 'external RUN --on-bad exclude --min-age 18 -- nih')]


@pytest.mark.parametrize('old, new', OLDER)
def test_older_command_lines_still_work_and_say_so(old, new):
    now, notes = renew_command(shlex.split(old))
    assert now == shlex.split(new) and notes and all(' is now ' in n for n in notes)
    parse(new)


def test_every_old_flag_is_tried():
    tried = [set(old.replace('=', ' ').split()) for old, _ in OLDER]
    for command, flags in OLD_FLAGS.items():
        commands = {command, 'evaluate'} if command == 'external' else {command}         # external began as a flag of evaluate
        for flag in flags: assert any(set(flag.split()) <= words and commands & words for words in tried), (command, flag)


def test_an_old_flag_is_told_on_the_error_channel(tmp_path):
    p = cli('export', tmp_path, '--to', tmp_path / 'x')
    assert p.returncode == 1 and 'no bundle in' in p.stderr
    assert 'note: --to is now --out (the old name still works)' in p.stderr
    p = cli('evaluate', tmp_path, '--on', 'nih')
    assert p.returncode == 1 and 'no run directory' in p.stderr
    assert "note: 'evaluate RUN --on SOURCE' is now 'external RUN SOURCE'" in p.stderr


@pytest.mark.parametrize('line', ['--help', 'train --help', 'predict --help', 'audit --help', 'reproduce --help', 'download --help'])
def test_help_is_free_of_torch_and_pandas(line):
    code = ('import sys\nfrom covid_cxr.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n'
            'assert "torch" not in sys.modules and "pandas" not in sys.modules')
    assert 'usage: covid-cxr' in python(code, *line.split())


def test_a_choice_that_is_none_is_refused_by_name(capsys):
    lines = 'predict RUN a.png --ood of', 'evaluate RUN --split tets', 'reproduce --data D --only covid-2021'
    for line in lines:
        with pytest.raises(SystemExit) as e: make_parser().parse_args(line.split())
        assert e.value.code == 2 and 'invalid choice' in capsys.readouterr().err


def test_options_of_a_reader_on_the_command_line(tmp_path):
    "inspect and external read a source of your own with its patients; a recipe has its own place for options"
    from PIL import Image
    from covid_cxr.phantom import make_phantom
    for i in range(4):
        folder = tmp_path / 'own' / ('healthy' if i % 2 else 'COVID')
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(make_phantom(seed=1, patient=i, size=64).image).save(folder / f'p{i // 2}_{i}.png')
    own = 'inspect', 'folder', '--data', tmp_path / 'own', '--option', r'patient=(p\d+)_'
    p = here(*own, '--option', 'findings.healthy=No Finding')
    assert p.returncode == 0 and '; 2 patients; from folder' in p.stdout, p.stdout + p.stderr
    for more, words in ((['--option', 'patient'], "option patient has no '='"), (['--option', 'patiens=x'], "no option 'patiens'"),):
        p = here(*own, *more)
        assert p.returncode == 1 and words in p.stderr
    assert 'data.sources.SOURCE.options' in here('inspect', 'covid-2020', '--data', tmp_path, '--option', 'a=1').stderr


def test_every_listed_suffix_is_read(tmp_path):
    "A format that no reader decodes, such as .pgm, is not listed as an image"
    from PIL import Image
    from covid_cxr.core import IMAGE_SUFFIXES
    from covid_cxr.images import read_grey
    for suffix in IMAGE_SUFFIXES:
        if suffix in ('.dcm', '.dicom'): continue
        Image.new('L', (64, 64), 9).convert('RGB').save(tmp_path / f'a{suffix}')
        assert read_grey(tmp_path / f'a{suffix}').shape == (64, 64)
    assert not {'.pgm', '.ppm', '.pnm', '.jp2'} & set(IMAGE_SUFFIXES)
