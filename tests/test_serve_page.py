"""The page of the server in a real browser: files chosen and dropped, a decline, a heat map, a broken worker, the keyboard, a phone, the
dark, no script, and axe-core's rules of accessibility. Pictures of the pages are kept where COVID_CXR_PICTURES says."""
import importlib.util, os, signal, time
from pathlib import Path
import pytest
from conftest import build_once
from test_pages import in_browser
from test_serve import NOISE, RADIOGRAPH, TOKEN, running, wait_until_up, worker_of
from covid_cxr.deploy.guard import Limits
from covid_cxr.deploy.worker import write_example_bundle

WIDTHS = (1280, 390, 360)


@pytest.fixture(scope='module')
def bundle(shared_folder): return build_once(shared_folder / 'served-bundle', write_example_bundle)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp('files')
    for name, data in (('radiograph with a rather long name of a file from 2026.png', RADIOGRAPH), ('noise.png', NOISE),
                       ('letter.txt', b'Dear colleague')):
        (folder / name).write_bytes(data)
    return sorted(folder.iterdir(), reverse=True)             # the radiograph, the noise, the letter


@pytest.fixture(scope='module')
def server(bundle):
    with running(bundle, timeout=6., limits=Limits(per_minute=1000)) as s: yield s


@pytest.fixture(scope='module')
def page(server, tmp_path_factory):
    from chromium import new_page
    with new_page(tmp_path_factory.mktemp('profile')) as p: yield p


@pytest.fixture
def fresh(page, server):
    "The page as it is opened, on a wide screen in the light"
    wait_until_up(server)
    page.screen(1280)
    page.open(server.address)
    page.events.clear()
    return page


def keep(page, name):
    folder = os.environ.get('COVID_CXR_PICTURES')
    if folder: page.picture(Path(folder) / f'{name}.png')


def told(page): return page.js('document.getElementById("status").textContent')


def answer(page, files, n=None):
    page.choose('#files', files)
    page.js('document.getElementById("send").click()')
    page.wait(f'document.querySelectorAll("li.answer").length >= {n or len(files)} && !document.getElementById("send").disabled')


def lines(page): return page.js('[...document.querySelectorAll("li.answer .line")].map(e => e.textContent)')


@in_browser
def test_files_are_answered_declined_and_drawn(fresh, server, files):
    assert fresh.js('getComputedStyle(document.getElementById("answers")).display') == 'none'
    answer(fresh, files)
    letter, noise, radiograph = lines(fresh)
    assert radiograph.startswith('predicted: ') and 'training' in noise and 'content is text' in letter
    sizes = fresh.js('[...document.querySelectorAll(".heat img")].map(i => [i.complete, i.naturalWidth, i.alt.length > 20])')
    assert sizes == [[True, 64, True]] * 2
    status = told(fresh)
    assert status.endswith('All 3 files are done.') and 'letter.txt: no prediction: ' in status
    assert fresh.js('document.getElementById("status").getAttribute("role")') == 'status'
    assert {u.split('?')[0] for u in fresh.asked_for()} <= {server.address + 'answers'} | {u for u in fresh.asked_for() if u[:5] == 'data:'}
    assert not fresh.complaints()
    keep(fresh, 'answers')


@in_browser
def test_files_are_dropped(fresh, files):
    fresh.js('document.getElementById("heat_map").checked = false')
    fresh.drop('#drop', files[1:])
    fresh.wait('document.querySelectorAll("li.answer.declined").length == 2')
    assert not fresh.js('document.querySelectorAll(".heat").length') and not fresh.complaints()


@in_browser
def test_a_broken_worker_and_a_file_that_is_too_slow_are_told(fresh, server, files):
    process = worker_of(server)
    process.send_signal(signal.SIGSTOP)
    fresh.choose('#files', files[:1])
    fresh.js('document.getElementById("send").click()')
    fresh.wait('document.getElementById("status").textContent.startsWith("Reading ")')
    fresh.wait('document.getElementById("send").disabled')
    while server.service.pool.free.qsize(): time.sleep(.005)
    process.send_signal(signal.SIGSEGV)
    process.send_signal(signal.SIGCONT)
    fresh.wait('document.querySelectorAll("li.answer.failed").length == 1')
    assert 'broke the program that reads it' in lines(fresh)[0] and 'broke the program' in told(fresh)
    keep(fresh, 'failed')
    wait_until_up(server)
    answer(fresh, files[:1], 2)
    assert lines(fresh)[0].startswith('predicted: ')


@in_browser
def test_a_server_that_has_gone_is_told(fresh, files):
    fresh.do('Network.emulateNetworkConditions', offline=True, latency=0, downloadThroughput=-1, uploadThroughput=-1)
    try: answer(fresh, files[:1])
    finally: fresh.do('Network.emulateNetworkConditions', offline=False, latency=0, downloadThroughput=-1, uploadThroughput=-1)
    assert 'cannot be reached' in lines(fresh)[0]


@in_browser
def test_the_keyboard_reaches_everything_in_order(fresh, files):
    def name(): return fresh.js('document.activeElement.id || document.activeElement.textContent.trim()')
    def outlined(): return fresh.js('getComputedStyle(document.activeElement).outlineStyle') != 'none'
    seen = []
    for _ in range(4):
        fresh.press('Tab')
        seen.append(name())
        assert outlined(), name()
    assert seen == ['Skip to the content', 'files', 'heat_map', 'send']
    fresh.choose('#files', files[:1])
    fresh.js('document.getElementById("send").focus()')
    fresh.press('Enter', '\r')
    fresh.wait('document.querySelectorAll("li.answer.answered").length == 1 && !document.getElementById("send").disabled')
    fresh.js('document.getElementById("files").focus()')
    fresh.press('Tab')
    fresh.press('Space', ' ')
    assert not fresh.js('document.getElementById("heat_map").checked')


@in_browser
def test_it_works_without_a_script(fresh, server, files):
    fresh.do('Emulation.setScriptExecutionDisabled', value=True)
    try:
        fresh.open(server.address)
        fresh.choose('#files', files[:2])
        before = len(fresh.named('Page.loadEventFired'))
        for _ in range(4): fresh.press('Tab')
        fresh.press('Enter', '\r')
        fresh.loaded(before)
        assert len(lines(fresh)) == 2 and fresh.js('document.querySelectorAll(".heat img").length') == 2
        keep(fresh, 'no-script')
    finally: fresh.do('Emulation.setScriptExecutionDisabled', value=False)


@in_browser
@pytest.mark.parametrize('dark', [False, True], ids=['light', 'dark'])
@pytest.mark.parametrize('width', WIDTHS)
def test_it_fits_every_window_in_the_light_and_in_the_dark(fresh, server, files, width, dark):
    fresh.screen(width, dark=dark)
    answer(fresh, files)
    assert fresh.overflow() <= 0
    paper = fresh.js('getComputedStyle(document.body).backgroundColor')
    assert (sum(map(int, paper[4:-1].split(','))) < 300) == dark, paper
    assert fresh.js('getComputedStyle(document.getElementById("drop")).transitionDuration') == '0s', 'motion was to be reduced'
    keep(fresh, f'page-{width}-{"dark" if dark else "light"}')
    fresh.open(server.address + 'api')
    assert fresh.overflow() <= 0
    keep(fresh, f'api-{width}-{"dark" if dark else "light"}')


@in_browser
def test_a_token_is_asked_for(page, bundle, files):
    page.screen(390)
    with running(bundle, token=TOKEN) as s:
        page.open(s.address)
        assert page.js('document.title') == 'token needed'
        keep(page, 'token')
        page.js('document.getElementById("token").value = "wrong"')
        before = len(page.named('Page.loadEventFired'))
        page.js('document.querySelector("#login button").click()')
        page.loaded(before)
        assert 'not the token' in page.js('document.querySelector("[role=alert]").textContent')
        page.js(f'document.getElementById("token").value = "{TOKEN}"')
        before = len(page.named('Page.loadEventFired'))
        page.js('document.querySelector("#login button").click()')
        page.loaded(before)
        assert page.js('document.cookie') == '', 'a script can read the cookie'
        answer(page, files[:1])
        assert lines(page)[0].startswith('predicted: ')


RULES = 'wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'best-practice'


def violations(page):
    spec = importlib.util.find_spec('axe_core_python')
    if spec is None: pytest.skip('axe-core is missing: pip install axe-core-python')
    page.js((Path(spec.origin).parent / 'axe.min.js').read_text(encoding='utf-8') + '; true')
    found = page.js(f'axe.run(document, {{runOnly: {list(RULES)!r}}}).then(r => ({{passes: r.passes.length, '
                    'bad: r.violations.map(v => [v.id, v.help, v.nodes.map(n => n.html.slice(0, 150))])}))')
    assert found['passes'] > 15
    return found['bad']


@in_browser
@pytest.mark.parametrize('dark', [False, True], ids=['light', 'dark'])
def test_axe_finds_nothing(fresh, server, files, dark):
    for width in (1280, 360):
        fresh.screen(width, dark=dark)
        fresh.open(server.address)
        answer(fresh, files)
        assert not violations(fresh)
        for path in ('api', 'login', 'nothing'):
            fresh.open(server.address + path)
            assert not violations(fresh), path


@in_browser
def test_axe_finds_what_is_wrong(fresh):
    fresh.js('document.getElementById("files").removeAttribute("aria-describedby"); document.querySelector(".pick").remove()')
    assert any(rule == 'label' for rule, _, _ in violations(fresh))
