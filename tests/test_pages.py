"""The docs site builds without a warning; in a real browser nothing is wider than the window, at desktop and at phone width."""
import re, shutil, subprocess, sys
import pytest
from conftest import ROOT

BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
MISSING = 'no chromium or chrome on PATH: pages were not opened in a browser'
def in_browser(test): return pytest.mark.browser(pytest.mark.skipif(not BROWSER, reason=MISSING)(test))


FLAGS = ('--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
         '--disable-component-update', '--disable-sync', '--hide-scrollbars', '--allow-file-access-from-files')
MEASURE = '''<script>window.addEventListener("load", () => {
  const scrolls = e => { for (; e && e !== document.body; e = e.parentElement)
    if (e.matches("aside, .sidebar-drawer, .toc-drawer") ||
        ["auto", "scroll", "hidden"].includes(getComputedStyle(e).overflowX)) return true;
    return false; };
  const wide = [...document.querySelectorAll("body *")].filter(e => !scrolls(e) &&
    e.getBoundingClientRect().right > window.innerWidth + 1);
  parent.postMessage("measured " + document.documentElement.scrollWidth + " of " + window.innerWidth + " " +
    wide.slice(0, 3).map(e => e.tagName + "." + e.className).join(", "), "*"); });</script>'''
# a headless window is never narrower than 500 px, a frame in it may be
FRAME = '''<html><head><title>not measured</title></head><body>
<script>window.addEventListener("message", e => { document.title = e.data; });</script>
<iframe src="%s" style="width:%dpx;height:9000px;border:0"></iframe></body></html>'''


def overflow(page, width, tmp_path):
    "Width of the page's content, and the first elements that stick out of a window of this width"
    copy, frame = page.with_name(f'measured-{width}.html'), page.with_name(f'frame-{width}.html')
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', '', page.read_text(encoding='utf-8'))
    copy.write_text(text.replace('</body>', MEASURE + '</body>'), encoding='utf-8')
    frame.write_text(FRAME % (copy.name, width), encoding='utf-8')
    command = [BROWSER, *FLAGS, f'--user-data-dir={tmp_path}/profile', '--window-size=1400,900', '--virtual-time-budget=4000',
               '--dump-dom', frame.as_uri()]
    out = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    for f in (copy, frame): f.unlink()
    m = re.search(r'<title>measured (\d+) of (\d+) ([^<]*)</title>', out)
    assert m, out[:500]
    assert int(m[2]) == width, f'the window is {m[2]} px wide'
    return int(m[1]), m[3]


@pytest.fixture(scope='module')
def report_page(tmp_path_factory):
    from covid_cxr.report.context import write_example_run
    from covid_cxr.report.page import write_report
    return write_report(write_example_run(tmp_path_factory.mktemp('run') / 'example'))


@in_browser
@pytest.mark.parametrize('width', [1280, 390])
def test_the_report_fits_the_window(report_page, width, tmp_path):
    content, wide = overflow(report_page, width, tmp_path)
    assert content <= width + 1 and not wide, wide


@in_browser
def test_a_page_that_is_too_wide_is_found(tmp_path):
    page = tmp_path / 'wide.html'
    page.write_text('<html><body><p style="width:900px">too wide for a phone</p></body></html>')
    content, wide = overflow(page, 390, tmp_path)
    assert content > 391 and wide.startswith('P.')


@pytest.fixture(scope='module')
def docs(tmp_path_factory):
    out = tmp_path_factory.mktemp('docs')
    p = subprocess.run([sys.executable, ROOT / 'tools/docs.py', '--out', out / 'site'], capture_output=True, text=True, timeout=300)
    assert p.returncode == 0, p.stdout + p.stderr
    return out / 'site/html'


def test_the_docs_build_without_a_warning(docs):
    assert (docs / 'index.html').is_file() and (docs / 'search.html').is_file()


@in_browser
@pytest.mark.parametrize('width', [1280, 390])
@pytest.mark.parametrize('page', ['index', 'table', 'glossary', 'results'])
def test_the_docs_fit_the_window(docs, page, width, tmp_path):
    content, wide = overflow(docs / f'{page}.html', width, tmp_path)
    assert content <= width + 1 and not wide, wide
