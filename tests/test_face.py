"""What a person meets first: one way of answering for every verb, completion, progress, a small installation, a release."""
import json, os, re, shlex, shutil, subprocess, sys
from types import SimpleNamespace
import pandas as pd, pytest
from conftest import ROOT, SMALL, STAGES, here, python
from covid_cxr.cli import COMMANDS, Answer, make_parser
from covid_cxr.deploy import checks
from covid_cxr.runs.folder import RunFolder

sys.path.insert(0, str(ROOT / 'tools'))
import docker_steps, light_install, release


# --- one JSON document ---------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def place(phantom_run, tmp_path_factory):
    "A run that may be written to, a second one, a page of a run, an audit: what the slow verbs would make"
    from covid_cxr.audit.case import Audit
    tmp = tmp_path_factory.mktemp('face')
    for name in ('run', 'other'): shutil.copytree(phantom_run, tmp / name)
    audit = json.loads(next((ROOT / 'tests/audits_version_1').glob('pneumonia*/audit.json')).read_text())
    return SimpleNamespace(tmp=tmp, run=tmp / 'run', audit=Audit.from_dict(audit))


@pytest.fixture
def slow(place, monkeypatch):
    "Slow work stands still: what the verbs say of it is tested here, the work itself elsewhere"
    import covid_cxr.articles.reproduce, covid_cxr.audit.run, covid_cxr.report.findings
    import covid_cxr.runs.compare, covid_cxr.runs.ensemble, covid_cxr.runs.external, covid_cxr.runs.local, covid_cxr.runs.sentences
    from covid_cxr.core import write_text
    def reproduce(out, **how):
        write_text(f'{out}/reproduce.md', 'reported and reproduced')
        return pd.DataFrame([dict(run='a', auc=.9, low=.8, high=float('nan'))])
    test = covid_cxr.runs.external.read_external_tests(KEPT)[0]
    site = SimpleNamespace(to_dict=lambda: dict(name='local', threshold=.4))
    monkeypatch.setattr(covid_cxr.audit.run, 'audit_run', lambda *a, **k: place.audit)
    monkeypatch.setattr(covid_cxr.report.findings, 'write_any_report', lambda run, *a: place.run / 'report.html')
    monkeypatch.setattr(covid_cxr.runs.external, 'external_test', lambda *a, **k: test)
    monkeypatch.setattr(covid_cxr.runs.compare, 'compare_runs', lambda *a, **k: SimpleNamespace(to_dict=lambda: dict(pairs=[])))
    monkeypatch.setattr(covid_cxr.runs.sentences, 'describe_comparison', lambda found: 'do not differ')
    monkeypatch.setattr(covid_cxr.runs.ensemble, 'ensemble_runs', lambda *a: place.run)
    monkeypatch.setattr(covid_cxr.runs.local, 'calibrate_for_site', lambda *a: site)
    monkeypatch.setattr(covid_cxr.articles.reproduce, 'reproduce', reproduce)


KEPT = ROOT / 'benchmarks/results/covid-2020-article-imagenet-seed42'
RECIPE = ' '.join(map(shlex.quote, [*SMALL, *STAGES]))
LINES = {
    'demo': f'demo --no-audit --out RUN {RECIPE}', 'train': f'train demo --out RUN {RECIPE}',
    'inspect': 'inspect --images RUN/data/chest-xray-pneumonia/chest_xray/train', 'download': 'download',
    'predict': 'predict RUN RUN/new-image.png', 'explain': 'explain RUN RUN/new-image.png --out MAPS',
    'evaluate': 'evaluate RUN --n-boot 100', 'external': f'external {KEPT} kaggle_pneumonia', 'audit': 'audit RUN', 'report': 'report RUN',
    'compare': 'compare RUN OTHER', 'ensemble': 'ensemble RUN RUN --out X',
    'calibrate': 'calibrate RUN D --out X', 'reproduce': 'reproduce --data D --out OTHER',
    'export': 'export RUN --out NEW --format safetensors', 'recipes': 'recipes', 'recipe': 'recipe demo', 'checks': 'checks',
    'completion': 'completion bash'}


def words(place, line):
    "The line with the folders of this test"
    for name, path in dict(RUN=place.run, OTHER=place.tmp / 'other', NEW=place.tmp / 'new', MAPS=place.tmp / 'maps', D=place.tmp).items():
        line = re.sub(rf'\b{name}\b', str(path), line)
    return shlex.split(line)


def test_every_verb_is_asked(): assert {c.name for c in COMMANDS} - {*LINES} == {'serve', 'push'}     # tests/test_serve.py, test_hub.py


@pytest.mark.parametrize('command', [c for c in COMMANDS if c.name in LINES], ids=lambda c: c.name)
def test_every_verb_answers_as_one_document(command, place, slow):
    p = here(*words(place, LINES[command.name]), '--json')
    told = json.loads(p.stdout, parse_constant=lambda word: pytest.fail(f'{word} is no JSON'))
    assert (told['command'], told['exit_code']) == (command.name, p.returncode)
    assert told['result'] and set(told['result']) <= set(command.answers), p.stderr


def test_a_network_in_8_bits_says_what_was_measured(place):
    p = here('export', place.run, '--out', place.tmp / 'small', '--format', 'int8', '--json')
    told = json.loads(p.stdout)['result']
    assert told['files'] == ['bundle.json', 'manifest.json', 'model.onnx'] and told['int8']['images'] > 5, p.stderr
    assert here('export', place.run, '--out', place.tmp / 'small-2', '--format', 'int8').stdout.startswith('8 bits on ')


def test_numbers_are_numbers(place, slow):
    e = json.loads(here('evaluate', place.run, '--n-boot', 100, '--json').stdout)['result']['evaluation']
    assert e['n_images'] > 10 and 'curves' not in e and set(e['estimates']['auc']) == {'value', 'low', 'high', 'n', 'note'}
    assert 0 <= e['estimates']['auc']['value'] <= 1
    one = json.loads(here('predict', place.run, place.run / 'new-image.png', '--json').stdout)['result']['answers'][0]
    assert sum(one['probabilities'].values()) == pytest.approx(1) and one['declined'] is None
    table = json.loads(here('reproduce', '--data', 'D', '--out', place.tmp / 'made', '--json').stdout)['result']['table']
    assert table == [dict(run='a', auc=.9, low=.8, high=None)]


def test_an_error_is_a_document_too(tmp_path):
    p = here('evaluate', tmp_path / 'nowhere', '--json')
    told = json.loads(p.stdout)
    assert p.returncode == told['exit_code'] == 1 and 'no run directory' in told['error'] and told['error'] in p.stderr


def test_every_key_is_in_the_help(capsys):
    for c in COMMANDS:
        with pytest.raises(SystemExit): make_parser(c.name).parse_args([c.name, '--help'])
        text = capsys.readouterr().out
        assert all(f'  {key}: ' in text for key in c.answers) and '--json' in text and '--quiet' in text
    assert all(c.answers for c in COMMANDS if c.name in LINES)


# --- more, and less ---------------------------------------------------------------------------------------------------

def test_quiet_says_the_result_alone_and_verbose_says_more(place):
    line = 'predict', place.run, place.run / 'new-image.png'
    usual, quiet, more = here(*line), here(*line, '-q'), here(*line, '-v')
    assert usual.stdout == quiet.stdout == more.stdout and quiet.stderr == '' and 'SYNTHETIC' in usual.stderr
    assert re.search(r'numpy [\d.]+', more.stderr) and re.search(r'[\d.]+ s, \d+ MB at most, exit code 0', more.stderr)
    said = here('train', 'demo', '--out', place.run, *SMALL, *STAGES, '-q').stdout
    assert 'AUC' in said and 'report: ' in said and 'already finished' not in said
    p = here('evaluate', place.tmp, '-v')
    assert 'Traceback' in p.stderr and p.returncode == 1


def test_what_was_altered_is_said_also_when_quiet(place, tmp_path):
    run = shutil.copytree(place.tmp / 'other', tmp_path / 'run')
    with open(run / 'summary.txt', 'a') as f: f.write('better')
    assert 'ALTERED' in here('evaluate', run, '--n-boot', 100, '-q').stderr


def test_an_answer_needs_no_text():
    assert Answer({}).text == '' and Answer({}).code == 0


# --- the log of a run -------------------------------------------------------------------------------------------------

def test_a_run_has_a_log_without_places(phantom_run, tmp_path):
    text, run = (phantom_run / 'log.txt').read_text(), RunFolder.open(phantom_run)
    assert f'hash {run.state["recipe_hash"]}' in text and 'numpy' in text and 'stage 2 epoch 3' in text
    assert re.findall(r' (begin|end|stopped) train', text) == ['begin', 'end'] and str(phantom_run) not in text
    assert all(re.match(r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ ', line) for line in text.splitlines())
    assert not re.search(r'\.(png|jpe?g|dcm)\b|\s/\w', text)
    copy = shutil.copytree(phantom_run, tmp_path / 'run')
    with open(copy / 'log.txt', 'a') as f: f.write('more\n')
    assert RunFolder.open(copy).integrity.status == 'verified'


# --- progress ---------------------------------------------------------------------------------------------------------

WORK = ('import sys, time\nfrom covid_cxr.words import above_progress, progress\n'
        'for i in progress(range(40), "images read"):\n    time.sleep(.03)\n'
        '    if i == 30:\n        with above_progress(): print("said in between", flush=True)')


def on_a_terminal(code):
    "What a pseudo-terminal shows"
    main, side = os.openpty()
    p = subprocess.Popen([sys.executable, '-c', code], stdout=side, stderr=side, cwd=ROOT)
    os.close(side)
    seen = b''
    while True:
        try: data = os.read(main, 4096)
        except OSError: break
        if not data: break
        seen += data
    os.close(main)
    assert p.wait() == 0
    return seen.decode()


def test_a_terminal_shows_the_time_that_is_left():
    seen = on_a_terminal(WORK)
    assert re.search(r'\d+ of 40 images read, \d s left', seen) and seen.endswith('\r\x1b[K')
    assert re.search(r'\r\x1b\[Ksaid in between\r?\n', seen)                    # above the line, not behind it
    assert 'left' not in python(WORK + '\nprint(file=sys.stderr)') and python(WORK).strip() == 'said in between'


def test_reading_images_shows_it(phantom_run):
    "Duplicates and the cache of images use it; audits and predictions go through the same function"
    files = sorted((phantom_run / 'data').rglob('*.jpeg'))[:12]
    code = (f'from covid_cxr import words\nwords._FIRST = words._EVERY = 0\nfiles = {[str(f) for f in files]!r}\n'
            'from covid_cxr.duplicates import fingerprints\nfrom covid_cxr.cache import _find_bad\n'
            'fingerprints(files)\n_find_bad(files, open, 1)')
    assert len(re.findall(rf'{len(files) - 1} of {len(files)} images read', on_a_terminal(code))) == 2


# --- completion -------------------------------------------------------------------------------------------------------

def completed(script, *typed):
    "What bash offers for the last word"
    code = (f'source {shlex.quote(str(script))}\nfunction=$(complete -p covid-cxr | sed "s/.*-F \\([^ ]*\\) .*/\\1/")\n'
            f'COMP_WORDS=({" ".join(map(shlex.quote, typed))})\nCOMP_CWORD={len(typed) - 1}\n'
            f'$function covid-cxr {shlex.quote(typed[-1])} {typed[-2]}\necho "${{COMPREPLY[@]}}"')
    p = subprocess.run(['bash', '-c', code], capture_output=True, text=True, timeout=60)
    assert p.returncode == 0, p.stderr
    return p.stdout.split()


def test_bash_completes_verbs_options_and_words(tmp_path):
    p = here('completion', 'bash')
    assert p.returncode == 0
    script = tmp_path / 'completion.bash'
    script.write_text(p.stdout)
    assert completed(script, 'covid-cxr', 'pre') == ['predict'] and set(completed(script, 'covid-cxr', 'rec')) == {'recipe', 'recipes'}
    assert '--on-bad' in completed(script, 'covid-cxr', 'predict', '--o')
    assert completed(script, 'covid-cxr', 'evaluate', 'RUN', '--split', 'va') == ['valid']


@pytest.mark.parametrize('shell', ['zsh', 'tcsh'])
def test_other_shells_have_a_script(shell): assert 'predict' in here('completion', shell).stdout


# --- without torch ----------------------------------------------------------------------------------------------------

BLOCKED = 'torch torchvision fastai fastcore pandas scipy sklearn matplotlib timm huggingface_hub safetensors onnx'
WITHOUT = '''import contextlib, importlib.machinery, io, json, sys
found = importlib.machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None): return None if name.split('.')[0] in BLOCKED else found(name, path, target)
importlib.machinery.PathFinder.find_spec = staticmethod(find_spec)
from covid_cxr.cli import main
told = []
for line in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try: code = main(line)
        except SystemExit as e: code = e.code
    told.append([line[0], code, out.getvalue(), err.getvalue()])
print(json.dumps(told))'''


def test_what_works_without_torch_and_what_says_what_to_install(place, phantom_run, tmp_path):
    from covid_cxr.bundle import export_bundle
    bundle = export_bundle(phantom_run, tmp_path / 'bundle', format='onnx')
    works = 'predict', 'explain', 'checks', 'download', 'completion', 'export'
    lines = [['--help'], ['predict', '--help'], ['predict', str(bundle), str(phantom_run / 'new-image.png')], ['checks', '--json'],
             ['download'], ['completion', 'bash'], *(words(place, line) for verb, line in LINES.items() if verb not in works)]
    told = json.loads(python(f'BLOCKED = {BLOCKED.split()}\n{WITHOUT}', json.dumps(lines)))
    for verb, code, out, err in told[:6]: assert code == 0 and (out or err) and 'pip install covid_cxr' not in err, (verb, code, err)
    assert 'covid 0.' in told[2][2] and json.loads(told[3][2])['result']['installation'] == 'predict'
    for verb, code, out, err in told[6:]:
        told = rf'covid-cxr: covid-cxr {verb} needs \w+, which is not installed; .+: pip install covid_cxr\.\n'
        assert code == 1 and re.fullmatch(told, err), err


def test_requirements_stand_in_step():
    s = light_install.settings()
    full, small = shlex.split(s['requirements']), shlex.split(s['predict_requirements'])
    assert light_install.requirements() == small and set(small) <= set(full)
    names = lambda lines: {re.match(r'[\w-]+', line)[0] for line in lines}
    assert names(small) == set(checks.PREDICT) and set(checks.FULL) <= names(full) | {'numpy'}


def test_a_fault_is_told_with_its_cure(monkeypatch):
    monkeypatch.setattr(checks, 'installed_version', lambda name: None if name == 'pillow' else '1.0')
    p = here('checks')
    assert p.returncode == 1 and 'pillow: not there; pip install pillow' in p.stdout
    assert p.stdout.rstrip().endswith('missing or damaged: pillow.')


# --- container and release --------------------------------------------------------------------------------------------

def test_the_steps_of_the_container():
    steps = docker_steps.read_steps((ROOT / 'Dockerfile').read_text())
    docker_steps.check_steps(steps)
    assert json.loads(dict(steps)['CMD'])[:3] == ['covid-cxr', 'serve', docker_steps.NAME] and '/health' in dict(steps)['HEALTHCHECK']
    assert 'torch' not in (ROOT / 'requirements-predict.txt').read_text().replace('without torch', '')
    assert docker_steps.ignored(('.git', 'config'), ['.git']) and not docker_steps.ignored(('covid_cxr', 'core.py'), ['.git', 'tests'])


@pytest.mark.parametrize('text, words', [
    ('FROM x\nUSER root\nHEALTHCHECK CMD ["a"]\nCMD ["b"]', 'as root'), ('FROM x\nUSER cxr\nCMD ["b"]', 'HEALTHCHECK'),
    ('FROM x\nUSER cxr\nRUN a\nHEALTHCHECK CMD ["a"]\nCMD ["b"]', 'before USER'), ('FROM x\nADD http://x /', 'ADD is not known')])
def test_a_container_that_is_not_ours_is_refused(text, words):
    with pytest.raises(SystemExit, match=words): docker_steps.check_steps(docker_steps.read_steps(text))


def test_the_workflow_uploads_what_was_built_and_nothing_else():
    import yaml
    text = (ROOT / '.github/workflows/release.yml').read_text()
    jobs = yaml.safe_load(text)['jobs']
    assert 'id-token' not in str(jobs['build']) and jobs['publish']['permissions'] == {'id-token': 'write'}
    assert jobs['publish']['needs'] == 'build'
    assert any('make release' in step.get('run', '') for step in jobs['build']['steps'])
    assert not re.search(r'https?://|secrets\.|password:', text)


def test_a_release_refuses_what_is_wrong(tmp_path):
    import zipfile
    assert release.check_version() == light_install.settings()['version']
    with pytest.raises(SystemExit, match='the tag is v9'): release.check_version('v9')
    wheel, names = tmp_path / 'a.whl', ['covid_cxr/a.py', 'covid_cxr/b.png', 'a.dist-info/RECORD']
    with zipfile.ZipFile(wheel, 'w') as z: [z.writestr(n, 'x') for n in names]
    with pytest.raises(SystemExit, match='lacks covid_cxr/c.py; holds covid_cxr/b.png'):
        release.check_wheel(wheel, {'covid_cxr/a.py', 'covid_cxr/c.py'})
    with pytest.raises(SystemExit, match=r'holds covid_cxr/b.png\.'): release.check_wheel(wheel, set(names[:2]))
    assert {'numpy', 'h11', 'uvicorn'} <= set(release.closure(light_install.requirements()))


def test_a_bill_holds_what_is_needed_and_no_place():
    links = dict(externalReferences=[dict(url='file:///x'), dict(url='https://x')])
    parts = [{'name': n, 'bom-ref': n, **links} for n in ('Jinja2', 'MarkupSafe', 'mypy')]
    every = dict(components=parts, metadata={}, dependencies=[dict(ref='Jinja2', dependsOn=['MarkupSafe', 'mypy']), dict(ref='mypy')])
    bill = release.bill_of(every, ['jinja2>=3'], '1.0', 'small')
    assert [c['name'] for c in bill['components']] == ['Jinja2', 'MarkupSafe'] and 'file:' not in json.dumps(bill)
    assert bill['dependencies'] == [dict(ref='Jinja2', dependsOn=['MarkupSafe']), dict(ref='covid_cxr==1.0', dependsOn=['Jinja2'])]
