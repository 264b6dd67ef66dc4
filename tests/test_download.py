"""`covid_cxr.curate.download` against a server that misbehaves, archives that are out for harm, kills, and a stand-in for Kaggle's client.

Every transfer here is a real one over the loopback address, every archive a real file, every client a real process.
"""
import gzip, hashlib, io, json, os, shutil, signal, socket, stat, struct, subprocess, sys, tarfile, threading, time, urllib.request, zipfile
from dataclasses import FrozenInstanceError
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from covid_cxr.curate import download as dl
from conftest import ROOT, examples
from covid_cxr.core import CxrError
from covid_cxr.curate.download import (DOWNLOADS, ArchiveError, DownloadError, check_folder, content_id, download, fetch, hash_folder,
                                kaggle_command, kaggle_credentials, manifest_text, unpack)

DATA = bytes(range(256)) * 1200 + b'the end'          # 307 kB, of no round length
SHA = hashlib.sha256(DATA).hexdigest()
ETAG = '"one"'


class Server(ThreadingHTTPServer):
    daemon_threads = True
    def handle_error(self, *a): pass                  # a client that hangs up is what these tests are about

class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def log_message(self, *a): pass
    def do_GET(self):
        path = self.path.split('?')[0]
        self.server.seen.append((path, self.headers.get('Range'), self.headers.get('If-Range')))
        self.nth = sum(p == path for p, *_ in self.server.seen)
        self.close_connection = True
        route = self.server.routes.get(path)
        if route is None: return self.say(404)
        route(self)
    def say(self, code, headers=None, body=b'', length=True):
        "One answer; what is not asked for is not sent"
        self.send_response(code)
        for k, v in (headers or {}).items(): self.send_header(k, v)
        if length is True: self.send_header('Content-Length', len(body))
        elif length is not None: self.send_header('Content-Length', length)
        self.end_headers()
        self.wfile.write(body)
    def serve(self, data, etag=ETAG, stop=None, ranges=True, lie=0, modified=None):
        "What a good server does; `stop`: hang up after so many bytes"
        asked, cond = self.headers.get('Range'), self.headers.get('If-Range')
        start = int(asked[6:-1]) if asked and ranges and cond in (None, etag, modified) else 0
        tags = {**({'ETag': etag} if etag else {}), **({'Last-Modified': modified} if modified else {})}
        if start >= len(data) and start: return self.say(416, {'Content-Range': f'bytes */{len(data)}', **tags})
        if start: tags['Content-Range'] = f'bytes {start}-{len(data) - 1}/{len(data)}'
        body = data[start:] if stop is None else data[start:start + stop]
        self.say(206 if start else 200, tags, body, len(data) - start + lie)

@pytest.fixture()
def web(monkeypatch):
    "A server whose routes a test sets; `web.url('/x')`, `web.routes`, `web.seen` (path, Range, If-Range)"
    for k in ('http_proxy', 'HTTP_PROXY', 'https_proxy', 'HTTPS_PROXY', 'all_proxy', 'ALL_PROXY'): monkeypatch.delenv(k, raising=False)
    for k in ('no_proxy', 'NO_PROXY'): monkeypatch.setenv(k, '127.0.0.1')
    server = Server(('127.0.0.1', 0), Handler)
    server.routes, server.seen = {}, []
    server.url = lambda path='': f'http://127.0.0.1:{server.server_port}{path}'
    server.starts = lambda path: [r and int(r[6:-1]) for p, r, _ in server.seen if p == path]
    threading.Thread(target=partial(server.serve_forever, .02), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()

quick = partial(fetch, backoff=.01, timeout=5, retries=3)

def names(folder): return sorted(p.name for p in Path(folder).iterdir())

def refused(match, call, exc=DownloadError):
    "The refusal's words; always one of ours, and always a sentence that ends"
    with pytest.raises(exc, match=match) as e: call()
    assert str(e.value).endswith('.') and '\n' not in str(e.value)
    return str(e.value)


# ---- transfers ----

def test_a_good_server(web, tmp_path):
    web.routes['/f'] = lambda h: h.serve(DATA)
    said = []
    out = quick(web.url('/f'), tmp_path/'deep/f.bin', sha256=SHA, size=len(DATA), progress=said.append)
    assert out.read_bytes() == DATA and names(out.parent) == ['f.bin'] and web.seen == [('/f', None, None)]
    assert said and said[-1] == 'f.bin: 100 % of 307.2 kB'
    assert quick(web.url('/f'), out, sha256=SHA) == out and len(web.seen) == 1          # known: not asked for again

def test_a_line_that_breaks_is_continued(web, tmp_path):
    web.routes['/f'] = lambda h: h.serve(DATA, stop=100_000 if h.nth < 3 else None)
    assert quick(web.url('/f'), tmp_path/'f').read_bytes() == DATA
    assert web.starts('/f') == [None, 100_000, 200_000] and names(tmp_path) == ['f']
    assert [c for *_, c in web.seen] == [None, ETAG, ETAG]

def test_continued_by_date_when_the_tag_is_weak(web, tmp_path):
    day = 'Fri, 19 Jun 2020 10:00:00 GMT'
    web.routes['/f'] = lambda h: h.serve(DATA, etag='W/"one"', modified=day, stop=100_000 if h.nth < 2 else None)
    assert quick(web.url('/f'), tmp_path/'f').read_bytes() == DATA
    assert web.starts('/f') == [None, 100_000] and web.seen[1][2] == day

def test_not_continued_without_proof(web, tmp_path):
    "No tag, no date, no hash: nothing proves that two halves belong together"
    web.routes['/f'] = lambda h: h.serve(DATA, etag=None, stop=100_000 if h.nth < 2 else None)
    assert quick(web.url('/f'), tmp_path/'f').read_bytes() == DATA and web.starts('/f') == [None, None]
    assert quick(web.url('/f'), tmp_path/'g', sha256=SHA).read_bytes() == DATA
    web.seen.clear()
    # the hash is the proof
    assert quick(web.url('/f'), tmp_path/'h', sha256=SHA).read_bytes() == DATA and web.starts('/f') == [None, 100_000]

def test_a_server_that_ignores_range(web, tmp_path):
    web.routes['/f'] = lambda h: h.serve(DATA, ranges=False, stop=100_000 if h.nth < 3 else None)
    assert quick(web.url('/f'), tmp_path/'f', sha256=SHA).read_bytes() == DATA
    assert web.starts('/f') == [None, 100_000, 100_000]

def test_a_file_that_changes_between_two_tries(web, tmp_path):
    other = DATA[::-1] + b'!'
    web.routes['/f'] = lambda h: h.serve(DATA, stop=100_000) if h.nth == 1 else h.serve(other, etag='"two"')
    assert quick(web.url('/f'), tmp_path/'f').read_bytes() == other

def test_a_server_that_continues_another_file(web, tmp_path):
    "It ignores If-Range, but its answer gives it away: by the tag, by the length, or by the piece"
    other = DATA[::-1]
    def changed(h):
        if h.nth == 1: return h.serve(DATA, stop=100_000)
        start = int((h.headers.get('Range') or 'bytes=0-')[6:-1])
        if not start: return h.serve(other, etag='"two"')
        h.say(206, {'ETag': '"two"', 'Content-Range': f'bytes {start}-{len(other) - 1}/{len(other)}'}, other[start:])
    web.routes['/tag'] = changed
    web.routes['/piece'] = lambda h: (h.serve(DATA, stop=100_000) if h.nth == 1 else h.serve(other) if h.nth > 2 else
                                      h.say(206, {'ETag': ETAG, 'Content-Range': f'bytes 50000-{len(DATA) - 1}/{len(DATA)}'},
                                            DATA[50_000:]))
    web.routes['/length'] = lambda h: (h.serve(DATA, stop=100_000) if h.nth == 1 else h.serve(other) if h.nth > 2 else
                                       h.say(206, {'Content-Range': f'bytes 100000-{len(DATA)}/{len(DATA) + 1}'}, DATA[100_000:] + b'x'))
    def nothing(h):
        if h.nth == 1: h.serve(DATA, stop=100_000)
        elif h.nth == 2: h.say(206, {'ETag': ETAG}, DATA[100_000:])
        else: h.serve(other)
    web.routes['/nothing'] = nothing
    for r in ('/tag', '/piece', '/length', '/nothing'):
        assert quick(web.url(r), tmp_path/r[1:]).read_bytes() == other and web.starts(r) == [None, 100_000, None], r

def test_all_was_there_but_the_last_step(web, tmp_path):
    "Killed between the last byte and the move: a 416, or an empty 206 as some caches send it, means that nothing is left to fetch"
    web.routes['/f'] = lambda h: h.serve(DATA)
    web.routes['/g'] = lambda h: h.say(206, {'ETag': ETAG, 'Content-Range': f'bytes {len(DATA)}-{len(DATA) - 1}/{len(DATA)}'})
    for r in '/f', '/g':
        part = dl._Part(tmp_path/r[1:], web.url(r), False)
        part.begin({'ETag': ETAG}, len(DATA))
        part.path.write_bytes(DATA)
        assert quick(web.url(r), tmp_path/r[1:], sha256=SHA).read_bytes() == DATA and web.starts(r) == [len(DATA)]

def test_all_was_there_and_it_is_not_what_was_expected(web, tmp_path):
    web.routes['/f'] = lambda h: h.serve(DATA)
    part = dl._Part(tmp_path/'f', web.url('/f'), False)
    part.begin({'ETag': ETAG}, len(DATA))
    part.path.write_bytes(DATA)
    refused('sent 307207 bytes and 307300 were expected; what came was deleted', lambda: quick(web.url('/f'), tmp_path/'f', size=307_300))
    assert names(tmp_path) == []

def test_a_part_that_is_longer_than_the_file(web, tmp_path):
    web.routes['/f'] = lambda h: h.serve(DATA)
    part = dl._Part(tmp_path/'f', web.url('/f'), False)
    part.begin({'ETag': ETAG}, len(DATA))
    part.path.write_bytes(DATA + b'too much')
    assert quick(web.url('/f'), tmp_path/'f').read_bytes() == DATA and web.starts('/f') == [len(DATA) + 8, None]

@pytest.mark.parametrize('note', ['', 'null', '[1]', '{"url": 3}', '\x00'])
def test_a_part_with_a_broken_note_starts_again(web, tmp_path, note):
    web.routes['/f'] = lambda h: h.serve(DATA)
    (tmp_path/'f.part').write_bytes(b'x' * 1000)
    (tmp_path/'f.part.json').write_text(note)
    assert quick(web.url('/f'), tmp_path/'f').read_bytes() == DATA and web.starts('/f') == [None]

def test_the_part_of_another_address_is_not_used(web, tmp_path):
    web.routes.update({'/a': lambda h: h.serve(DATA, stop=9999), '/b': lambda h: h.serve(DATA[::-1])})
    refused('tries failed', lambda: quick(web.url('/a'), tmp_path/'f', retries=1))
    assert quick(web.url('/b'), tmp_path/'f').read_bytes() == DATA[::-1] and web.starts('/b') == [None]

def test_a_line_that_never_holds_ends_and_is_continued_next_time(web, tmp_path):
    web.routes['/f'] = lambda h: h.serve(DATA, stop=1000 if h.nth < 4 else None)
    said = refused('3 tries failed: the connection broke off after 3000 of 307207 bytes; 3.0 kB are kept in f.part, call again',
                   lambda: quick(web.url('/f'), tmp_path/'f'))
    assert web.url('/f') in said and names(tmp_path) == ['f.part', 'f.part.json']
    lines = []
    assert quick(web.url('/f'), tmp_path/'f', progress=lines.append).read_bytes() == DATA and lines[0] == 'f: continues after 3.0 kB'
    assert web.starts('/f')[-1] == 3000 and names(tmp_path) == ['f']

def test_progress_resets_the_count_of_failures(web, tmp_path):
    big = bytes(5_500_000)
    web.routes['/f'] = lambda h: h.serve(big, stop=1_100_000)
    assert quick(web.url('/f'), tmp_path/'f', retries=2).stat().st_size == len(big) and len(web.seen) == 5

def test_a_restarting_server_does_not_count_as_progress(web, tmp_path):
    "It sends the first 1.1 MB again and again, or more and less of it by turns: that is not an endless loop"
    web.routes['/f'] = lambda h: h.serve(bytes(5_000_000), ranges=False, stop=1_100_000)
    web.routes['/g'] = lambda h: h.serve(bytes(5_000_000), ranges=False,
                                         stop=1_100_000 if h.nth % 2 else 1000) if h.nth < 20 else h.say(404)
    for r in '/f', '/g': refused('3 tries failed', lambda: quick(web.url(r), tmp_path/r[1:]))
    assert len(web.seen) == 8

def test_lengths_that_lie(web, tmp_path):
    web.routes['/long'] = lambda h: h.serve(DATA, lie=7)                    # promises more than there is
    web.routes['/short'] = lambda h: h.serve(DATA, lie=-7)                  # promises less
    refused('broke off after 307207 of 307214|the file at the server is shorter', lambda: quick(web.url('/long'), tmp_path/'a'))
    refused('307200 bytes and 307207 were expected', lambda: quick(web.url('/short'), tmp_path/'b', size=len(DATA)))
    refused('SHA-256 .* was expected: it is another file', lambda: quick(web.url('/short'), tmp_path/'b', sha256=SHA))
    assert not [n for n in names(tmp_path) if n in ('a', 'b') or n.startswith('b')]

def test_a_wrong_hash_leaves_nothing(web, tmp_path):
    web.routes['/f'] = lambda h: h.serve(DATA[:-1] + b'?')
    said = refused('what came was deleted', lambda: quick(web.url('/f'), tmp_path/'f', sha256=SHA, size=len(DATA)))
    assert SHA in said and names(tmp_path) == []

def test_an_unknown_length(web, tmp_path):
    "Without Content-Length only the content can tell; chunks tell themselves"
    web.routes['/open'] = lambda h: h.say(200, {'Connection': 'close'}, DATA, None)
    lines = []
    assert quick(web.url('/open'), tmp_path/'a', progress=lines.append).read_bytes() == DATA and 'did not say how long' in lines[-1]
    refused('broke off after 307207 of 307208', lambda: quick(web.url('/open'), tmp_path/'c', size=len(DATA) + 1, retries=2))
    def chunks(h, cut):
        h.say(200, {'Transfer-Encoding': 'chunked', 'ETag': ETAG}, length=None)
        for i in range(0, len(DATA), 50_000):
            block = DATA[i:i + 50_000]
            h.wfile.write(f'{len(block):x}\r\n'.encode() + block + b'\r\n')
            if cut and i > 100_000: return
        h.wfile.write(b'0\r\n\r\n')
    web.routes['/chunks'] = lambda h: chunks(h, h.nth == 1)
    assert quick(web.url('/chunks'), tmp_path/'b').read_bytes() == DATA and len(web.starts('/chunks')) == 2

def test_an_endless_stream_is_stopped(web, tmp_path):
    def endless(h):
        h.say(200, {}, length=None)
        for _ in range(500): h.wfile.write(bytes(100_000))         # 50 MB will do for endless
    web.routes['/f'] = endless
    refused('goes on beyond the 1.0 MB', lambda: quick(web.url('/f'), tmp_path/'f', max_bytes=1_000_000))
    refused('goes on beyond the 307.2 kB', lambda: quick(web.url('/f'), tmp_path/'f', size=len(DATA)))
    web.routes['/big'] = lambda h: h.say(200, {}, b'', 10**18)
    refused('raise max_bytes', lambda: quick(web.url('/big'), tmp_path/'f'))
    refused('free some space or choose another folder', lambda: quick(web.url('/big'), tmp_path/'f', max_bytes=10**19))
    assert names(tmp_path) == []

def test_a_full_disk_is_not_a_fault_of_the_line(web, tmp_path):
    "The limit on file sizes stands in for the disk: the same error of the same write"
    web.routes['/f'] = lambda h: h.serve(DATA)
    code = ('import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n'
            'from covid_cxr.curate.download import fetch, DownloadError\n'
            'try: fetch(*sys.argv[1:])\nexcept DownloadError as e: print(e)')
    out = subprocess.run([sys.executable, '-c', code, web.url('/f'), str(tmp_path/'f')], capture_output=True, text=True, timeout=60)
    assert 'cannot be written to the disk: File too large; free some space' in out.stdout, out
    assert len(web.seen) == 1 and not (tmp_path/'f').exists()

@pytest.mark.parametrize('code, words', [(401, 'account or accepted terms'), (403, 'account or accepted terms'),
                                         (404, 'there is nothing at'), (410, 'there is nothing at'),
                                         (400, 'cannot be had'), (416, 'cannot be had'), (501, 'cannot be had')])
def test_answers_that_do_not_change_are_not_asked_for_again(web, tmp_path, code, words):
    web.routes['/f'] = lambda h: h.say(code)
    said = refused(f'{words}.*{code}|{code}.*{words}', lambda: quick(web.url('/f?token=secret'), tmp_path/'f'))
    assert len(web.seen) == 1 and 'secret' not in said and names(tmp_path) == []

@pytest.mark.parametrize('code', [408, 429, 500, 502, 503, 504])
def test_a_busy_server_gets_another_try(web, tmp_path, code):
    web.routes['/f'] = lambda h: h.serve(DATA) if h.nth > 2 else h.say(code, {'Retry-After': '0'})
    assert quick(web.url('/f'), tmp_path/'f').read_bytes() == DATA and len(web.seen) == 3

def test_retry_after_is_kept(web, tmp_path):
    web.routes['/f'] = lambda h: h.serve(DATA) if h.nth > 1 else h.say(503, {'Retry-After': '1'})
    began = time.monotonic()
    assert quick(web.url('/f'), tmp_path/'f').read_bytes() == DATA and time.monotonic() - began >= 1
    web.routes['/g'] = lambda h: h.say(429, {'Retry-After': '86400'})
    refused('429 .*asks for 86400 seconds of patience', lambda: quick(web.url('/g'), tmp_path/'g'))

def test_a_silent_and_a_dripping_server(web, tmp_path):
    web.routes['/silent'] = lambda h: time.sleep(3)
    def drip(h):
        h.say(200, {'ETag': ETAG}, length=len(DATA))
        for _ in range(60):
            h.wfile.write(b'x')
            h.wfile.flush()
            time.sleep(.05)
    web.routes['/drip'] = drip
    web.routes['/stops'] = lambda h: (h.say(200, {'ETag': ETAG}, DATA[:5000], len(DATA)), h.wfile.flush(), time.sleep(3))
    began = time.monotonic()
    for r, why in {'/silent': 'silent for too long', '/drip': 'only .* bytes came in 0.3 seconds|silent for too long',
                   '/stops': 'silent for too long.*5.0 kB are kept'}.items():
        refused(why, lambda: quick(web.url(r), tmp_path/r[1:], timeout=.3, retries=1))
    assert time.monotonic() - began < 6          # 9 without a limit

def test_no_server_there_and_nonsense_there(web, tmp_path):
    s = socket.socket()
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
    s.close()
    refused('connection failed', lambda: quick(f'http://127.0.0.1:{port}/f', tmp_path/'f', retries=2))
    web.routes['/f'] = lambda h: h.wfile.write(b'SSH-2.0-OpenSSH\r\n\r\n')
    refused('connection failed', lambda: quick(web.url('/f'), tmp_path/'f', retries=2))
    unknown = dl._net_fault(socket.gaierror(-2, 'Name or service not known'), 'http://no-such-host.invalid/f')
    assert isinstance(unknown, dl._Again) and 'the name no-such-host.invalid cannot be resolved' in str(unknown)

def test_redirects(web, tmp_path):
    to = lambda where, code=302: lambda h: h.say(code, {'Location': where})
    web.routes.update({'/f': lambda h: h.serve(DATA, stop=100_000 if h.nth == 1 else None), '/loop': to('/loop'),
                       '/secret': to((tmp_path/'secret').as_uri()),
                       '/ftp': to('ftp://127.0.0.1/f'), '/gone': to('/nowhere', 301), '/data': to('data:text/plain,hello')})
    (tmp_path/'secret').write_text('of this machine')
    for code in (301, 302, 303, 307, 308):
        web.routes[f'/{code}'] = to('/f', code)
        web.seen.clear()
        assert quick(web.url(f'/{code}'), tmp_path/str(code)).read_bytes() == DATA
        assert web.starts('/f') == [None, 100_000]                        # what is missing is asked for behind the redirect too
    for r, why in {'/loop': 'redirects in a way', '/secret': 'redirects in a way', '/ftp': 'from http to ftp', '/gone': '404',
                   '/data': 'redirects in a way'}.items():
        refused(why, lambda: quick(web.url(r), tmp_path/'out'))
    down = urllib.request.Request('https://example.org/a')
    refused('from https to http, which is not safe',
            lambda: dl._Redirects().redirect_request(down, None, 302, '', {}, 'http://example.org/a'))
    assert not (tmp_path/'out').exists()

def test_a_packed_answer_is_refused(web, tmp_path):
    web.routes['/f'] = lambda h: h.say(200, {'Content-Encoding': 'gzip'}, gzip.compress(DATA))
    refused('packed as gzip', lambda: quick(web.url('/f'), tmp_path/'f'))

def test_two_at_a_time(web, tmp_path):
    go, come = threading.Event(), threading.Event()
    def wait(h):
        come.set()
        go.wait(10)
        h.serve(DATA)
    web.routes['/f'] = wait
    first = threading.Thread(target=quick, args=(web.url('/f'), tmp_path/'f'))
    first.start()
    assert come.wait(10)
    refused('another process is downloading', lambda: quick(web.url('/f'), tmp_path/'f'))
    go.set()
    first.join(10)
    assert (tmp_path/'f').read_bytes() == DATA and names(tmp_path) == ['f']

def test_a_killed_download_is_continued(web, tmp_path):
    "kill -9 in the middle: the next process goes on where it was, and the lock of the dead one is no obstacle"
    big = os.urandom(3_000_000)
    def slow(h):
        if h.nth > 1: return h.serve(big)
        h.say(200, {'ETag': ETAG}, length=len(big))
        for i in range(0, len(big), 50_000):
            h.wfile.write(big[i:i + 50_000])
            h.wfile.flush()
            time.sleep(.02)
    web.routes['/f'] = slow
    code = 'import sys; from covid_cxr.curate.download import fetch; fetch(*sys.argv[1:])'
    p, part = subprocess.Popen([sys.executable, '-c', code, web.url('/f'), str(tmp_path/'f')]), tmp_path/'f.part'
    until = time.monotonic() + 30
    while time.monotonic() < until and not (part.exists() and part.stat().st_size > 500_000): time.sleep(.01)
    p.send_signal(signal.SIGKILL)
    p.wait()
    had = part.stat().st_size
    assert 500_000 < had < len(big) and not (tmp_path/'f').exists()
    quick(web.url('/f'), tmp_path/'f', sha256=hashlib.sha256(big).hexdigest())
    assert web.starts('/f') == [None, had] and names(tmp_path) == ['f']

def test_places_that_cannot_be_written(web, tmp_path):
    web.routes['/f'] = lambda h: h.serve(DATA)
    (tmp_path/'file').write_text('x')
    (tmp_path/'folder').mkdir()
    (tmp_path/'g.part').mkdir()
    refused('cannot (write|be written)', lambda: quick(web.url('/f'), tmp_path/'g'))
    refused('cannot write to', lambda: quick(web.url('/f'), tmp_path/'file/f'))
    refused('is there already', lambda: quick(web.url('/f'), tmp_path/'folder', sha256=SHA))
    refused('is there already', lambda: quick(web.url('/f'), tmp_path/'file', sha256=SHA))

def test_a_file_address(tmp_path):
    (tmp_path/'a b').write_bytes(DATA)
    assert fetch((tmp_path/'a b').as_uri(), tmp_path/'c', sha256=SHA).read_bytes() == DATA
    refused('cannot be read', lambda: fetch(tmp_path.as_uri() + '/none', tmp_path/'d'))
    refused('cannot be read', lambda: fetch(tmp_path.as_uri(), tmp_path/'d'))
    for bad in ('ftp://h/f', 'data:,x', '/etc/passwd', '', 'https://', 'http://h/a b', 'http://h/\r\nX: y'):
        refused('not an address', lambda: fetch(bad, tmp_path/'d'))


# ---- archives ----

def a_zip(path, members, method=zipfile.ZIP_DEFLATED, **attributes):
    "A zip of [(name, bytes)] in this order, names repeated if so asked"
    import warnings
    with zipfile.ZipFile(path, 'w', method) as z, warnings.catch_warnings():
        warnings.simplefilter('ignore')                # "Duplicate name"
        for name, data in (members.items() if isinstance(members, dict) else members):
            i = zipfile.ZipInfo('x')
            i.filename, i.compress_type = name, method
            for k, v in attributes.items(): setattr(i, k, v)
            z.writestr(i, data)
    return path

def a_tar(path, members, mode='w:gz', format=tarfile.PAX_FORMAT):
    "A tar of [(name, bytes or dict of TarInfo fields)]"
    with tarfile.open(path, mode, format=format) as t:
        for name, what in (members.items() if isinstance(members, dict) else members):
            i = tarfile.TarInfo(name)
            if isinstance(what, dict):
                for k, v in what.items(): setattr(i, k, v)
                t.addfile(i)
            else:
                i.size = len(what)
                t.addfile(i, io.BytesIO(what))
    return path

def harmless(archive, match, exc=ArchiveError, **kw):
    "The archive is refused, and nothing was written outside nor left inside"
    home = archive.parent
    before = hash_folder(home)
    refused(match, lambda: unpack(archive, home/'deep/er/out', **kw), exc)
    assert hash_folder(home) == before and names(home/'deep/er') == []
    assert not list(home.parent.glob('evil*')) and not os.path.exists('/evil-of-covid-cxr')

TREE = {'metadata.csv': b'filename\n', 'images/a.png': b'a' * 3000, 'images/\u00e4.png': b'b' * 100_000, 'empty.txt': b''}
HASHES = {k: hashlib.sha256(v).hexdigest() for k, v in TREE.items()}

@pytest.mark.parametrize('kind', ['zip', 'stored', 'tar', 'tar.gz', 'gnu', 'ustar'])
def test_good_archives(tmp_path, kind):
    a = tmp_path/'whatever.bin'                        # the first bytes tell, not the name
    if kind in ('zip', 'stored'): a_zip(a, {**{'images/': b''}, **TREE}, zipfile.ZIP_STORED if kind == 'stored' else zipfile.ZIP_DEFLATED)
    else: a_tar(a, {'./images': dict(type=tarfile.DIRTYPE), **{f'./{k}': v for k, v in TREE.items()}}, 'w:gz' if kind == 'tar.gz' else 'w',
                {'gnu': tarfile.GNU_FORMAT, 'ustar': tarfile.USTAR_FORMAT}.get(kind, tarfile.PAX_FORMAT))
    (tmp_path/'out').mkdir()                           # an empty folder is no obstacle
    assert unpack(a, tmp_path/'out', expects=['metadata.csv', 'images']) == HASHES == hash_folder(tmp_path/'out')
    assert names(tmp_path) == ['out', 'whatever.bin']
    assert list(unpack(a, tmp_path/'part', members=lambda p: p.startswith('images/'))) == sorted(k for k in TREE if '/' in k)
    assert unpack(a, tmp_path/'out') == HASHES         # the very same files: nothing to do
    (tmp_path/'out/extra').write_text('mine')
    refused('already holds other files .*extra', lambda: unpack(a, tmp_path/'out'))
    assert (tmp_path/'out/extra').read_text() == 'mine' and names(tmp_path) == ['out', 'part', 'whatever.bin']

def test_permissions_of_the_archive_are_not_taken_over(tmp_path):
    out = tmp_path/'out'
    unpack(a_tar(tmp_path/'a', {'run.sh': dict(mode=0o6777, size=0)}), out)
    unpack(a_zip(tmp_path/'b', {'run.sh': b'x'}, external_attr=(stat.S_IFREG | 0o6777) << 16), tmp_path/'out2')
    for p in (out/'run.sh', tmp_path/'out2/run.sh'): assert not p.stat().st_mode & (stat.S_ISUID | stat.S_ISGID | stat.S_IXUSR)

ESCAPES = {'../evil': 'leads out', 'a/../../evil': 'leads out', 'images/..': 'leads out', '/evil-of-covid-cxr': 'absolute',
           '//host/evil': 'absolute', 'C:evil': 'drive letter',
           'c:/evil': 'drive letter', '..\\evil': 'backslash', 'a\nb': 'control character', 'x' * 300: 'too long',
           '/'.join('d' * 60): 'too long'}

@pytest.mark.parametrize('name', ESCAPES, ids=lambda n: repr(n[:20]))
@pytest.mark.parametrize('kind', ['zip', 'tar'])
def test_names_that_escape(tmp_path, name, kind):
    home = tmp_path/'home'
    home.mkdir()
    members = [('ok.png', b'fine'), (name, b'evil')]
    harmless(a_zip(home/'a', members) if kind == 'zip' else a_tar(home/'a', members), ESCAPES[name])

@pytest.mark.parametrize('kind', [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_tar_members_that_are_no_files(tmp_path, kind):
    link = kind in (tarfile.SYMTYPE, tarfile.LNKTYPE)
    members = [('ok.png', b'fine'), ('images', dict(type=kind, linkname='/etc' if link else '')), ('images/evil', b'evil')]
    harmless(a_tar(tmp_path/'a', members), 'is a link' if link else 'neither a file nor a folder')
    # unwanted ones are checked too
    harmless(a_tar(tmp_path/'a', members, 'w'), 'is a link' if link else 'neither a file nor a folder', members=lambda p: p == 'ok.png')

@pytest.mark.parametrize('mode, why', [(stat.S_IFLNK, 'is a link'), (stat.S_IFIFO, 'neither'), (stat.S_IFCHR, 'neither'),
                                       (stat.S_IFSOCK, 'neither')])
def test_zip_members_that_are_no_files(tmp_path, mode, why):
    harmless(a_zip(tmp_path/'a', {'images': b'/etc'}, external_attr=(mode | 0o777) << 16), why)

@pytest.mark.parametrize('pair', [('a.png', 'a.png'), ('a.png', 'A.PNG'), ('Images/a', 'images/b'), ('a', 'a/b'), ('a/b', 'a'),
                                  ('\u00e9', 'e\u0301'), ('a', 'a.'), ('a', 'a '), ('x/a', './x//a')])
@pytest.mark.parametrize('kind', ['zip', 'tar'])
def test_names_that_overwrite_each_other(tmp_path, pair, kind):
    members = [(n, str(i).encode()) for i, n in enumerate(pair)]
    harmless(a_zip(tmp_path/'a', members) if kind == 'zip' else a_tar(tmp_path/'a', members), 'would overwrite each other')

def test_bombs(tmp_path):
    zeros = bytes(11_000_000)
    harmless(a_zip(tmp_path/'ratio', {'a': zeros}), '100 times its size')
    harmless(a_tar(tmp_path/'ratio', {'a': zeros}), '100 times its size')
    harmless(a_zip(tmp_path/'many', {f'{i}': bytes(1_000_000) for i in range(12)}), '100 times its size')
    harmless(a_zip(tmp_path/'bytes', {'a': os.urandom(50_000)}), 'unpacks to more than 40.0 kB; raise max_bytes', max_bytes=40_000)
    harmless(a_tar(tmp_path/'bytes', {'a': os.urandom(50_000)}), 'unpacks to more than 40.0 kB; raise max_bytes', max_bytes=40_000)
    for make in a_zip, a_tar: harmless(make(tmp_path/'files', {f'd{i}/f': b'' for i in range(60)}), 'more than 50', max_files=50)
    harmless(a_tar(tmp_path/'folders', {f'd{i}': dict(type=tarfile.DIRTYPE) for i in range(60)}), 'more than 50 members', max_files=50)
    assert unpack(a_zip(tmp_path/'ok', {'a': zeros}), tmp_path/'ok.d', max_ratio=2000)

def test_a_tar_header_that_would_fill_the_memory(tmp_path):
    "A pax header that says it is 3 GB long is never read into memory"
    i = tarfile.TarInfo('pax')
    i.type, i.size = tarfile.XHDTYPE, 3 << 30
    (tmp_path/'a').write_bytes(gzip.compress(i.tobuf(tarfile.USTAR_FORMAT) + bytes(100_000)))
    harmless(tmp_path/'a', 'unreasonable size')

def test_a_tar_with_holes(tmp_path):
    i = tarfile.TarInfo('hole')
    i.type = tarfile.GNUTYPE_SPARSE
    buf = bytearray(i.tobuf(tarfile.GNU_FORMAT))
    buf[483:495] = b'77777777777\0'     # real size: 8 GiB
    buf[148:156] = b' ' * 8
    buf[148:156] = b'%06o\0 ' % sum(buf)
    (tmp_path/'a').write_bytes(bytes(buf) + bytes(1024))
    harmless(tmp_path/'a', 'has holes')

def patch_zip(path, name, at_local, at_central, value, fmt):
    "Overwrite a field of a member in both of its headers"
    raw = bytearray(path.read_bytes())
    n = name.encode()
    for sign, head, off in ((b'PK\3\4', 30, at_local), (b'PK\1\2', 46, at_central)):
        k = raw.find(sign)
        while raw[k + head:k + head + len(n)] != n: k = raw.find(sign, k + 1)
        struct.pack_into(fmt, raw, k + off, value)
    path.write_bytes(raw)
    return path

def test_zips_that_lie(tmp_path):
    body = os.urandom(20_000)
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        a = a_zip(tmp_path/'a', {'a.png': body}, method)
        harmless(patch_zip(a, 'a.png', 22, 24, 10, '<I'), 'damaged|not that long')                  # says 10 bytes
        a = a_zip(tmp_path/'a', {'a.png': body}, method)
        harmless(patch_zip(a, 'a.png', 22, 24, 90_000, '<I'), 'damaged|not that long')              # says 90,000
    a = a_zip(tmp_path/'a', {'a.png': bytes(9_000_000)})
    harmless(patch_zip(a, 'a.png', 22, 24, 100, '<I'), 'damaged|not that long')                     # a bomb that says it is 100 bytes
    harmless(patch_zip(a_zip(tmp_path/'a', {'a.png': body}), 'a.png', 14, 16, 1234, '<I'), 'damaged')   # wrong check sum
    harmless(patch_zip(a_zip(tmp_path/'a', {'a.png': body}), 'a.png', 6, 8, 1, '<H'), 'is encrypted')
    harmless(patch_zip(a_zip(tmp_path/'a', {'a.png': body}), 'a.png', 8, 10, 14, '<H'), 'packed in a way')
    a = a_zip(tmp_path/'a', {'a.png': body, 'b.png': b''})
    raw = a.read_bytes()
    k = raw.rfind(b'a.png')
    a.write_bytes(raw[:k] + b'z.png' + raw[k + 5:])  # the two headers disagree on the name
    harmless(a, 'damaged')

@pytest.mark.parametrize('make', [a_zip, a_tar, partial(a_tar, mode='w')], ids=['zip', 'tar.gz', 'tar'])
def test_archives_cut_anywhere(tmp_path, make):
    "However much is missing: refused, also when the cut is exactly between two members"
    whole = make(tmp_path/'whole', {f'{i}.png': os.urandom(700) for i in range(6)}).read_bytes()
    end = len(whole.rstrip(b'\0')) if make not in (a_zip, a_tar) else len(whole)
    cuts = sorted({*range(0, end, 97), *range(0, end, 512), end - 1} - {end})
    for cut in cuts:
        (tmp_path/'cut').write_bytes(whole[:cut])
        with pytest.raises(ArchiveError): unpack(tmp_path/'cut', tmp_path/'out')
        assert names(tmp_path) == ['cut', 'whole']

def test_things_that_are_no_archives(tmp_path):
    for body, why in {b'': 'but empty', b'\n <!DOCTYPE html><p>sign in': 'a web page', b'Rar!\x1a\x07\0' + bytes(600): 'neither a zip',
                      b'PK\3\4nonsense': 'damaged',
                      gzip.compress(b'just text ' * 100): 'damaged', b'\x1f\x8bnonsense': 'damaged', bytes(5000): 'neither a zip'}.items():
        (tmp_path/'a').write_bytes(body)
        harmless(tmp_path/'a', why)
    harmless(a_zip(tmp_path/'a', {}), 'holds no file')
    harmless(a_zip(tmp_path/'a', {'d/': b''}), 'holds no file')
    harmless(a_tar(tmp_path/'a', {}), 'holds no file')

def test_strip(tmp_path):
    assert set(unpack(a_zip(tmp_path/'a', {'top/': b'', 'top/x': b'1', 'top/d/y': b'2'}), tmp_path/'out', strip=True)) == {'x', 'd/y'}
    harmless(a_zip(tmp_path/'a', {'top/x': b'1', 'other/y': b'2'}), 'one folder was expected', strip=True)
    harmless(a_zip(tmp_path/'a', {'x': b'1'}), 'one folder was expected', strip=True)
    harmless(a_zip(tmp_path/'a', {'top/x': b'1', 'top': b'2'}), 'overwrite each other', strip=True)

def test_what_stands_in_the_way_stays(tmp_path):
    a = a_zip(tmp_path/'a', TREE)
    (tmp_path/'file').write_text('mine')
    os.symlink(tmp_path/'elsewhere', tmp_path/'link')
    for n in ('file', 'link'): refused('is not a folder; move it away', lambda: unpack(a, tmp_path/n))
    assert (tmp_path/'file').read_text() == 'mine' and names(tmp_path) == ['a', 'file', 'link']
    (tmp_path/'.out.unpacking').mkdir()
    (tmp_path/'.out.unpacking/left').write_text('by a killed process')
    assert unpack(a, tmp_path/'out') == hash_folder(tmp_path/'out') == HASHES

@given(st.text(st.characters(), min_size=1, max_size=20) | st.lists(st.sampled_from(['..', '.', 'a', '', 'C:', '\\', '~', '\x00', 'CON']),
                                                                    min_size=1, max_size=6).map('/'.join))
@settings(max_examples=examples(100), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_name_leads_out(tmp_path, name):
    "Whatever the name: refused, or a path below the folder that joins to itself"
    try: parts = dl._safe_parts(name, 'x')
    except ArchiveError: return
    assert '..' not in parts and not any('/' in p or '\\' in p or '\0' in p for p in parts)
    at = os.path.normpath(tmp_path.joinpath(*parts))
    assert Path(at) == tmp_path.joinpath(*parts) and (at + os.sep).startswith(str(tmp_path) + os.sep)

@given(st.sampled_from(['zip', 'tar', 'tgz']), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8))
@settings(max_examples=examples(100), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_anywhere_is_refused_or_harmless(tmp_path, kind, changes):
    "Any bytes changed in an archive: one of our refusals, or files below the folder; never another exception, never a rest"
    home = tmp_path/kind
    home.mkdir(exist_ok=True)
    whole = home/'whole'
    if not whole.exists(): a_zip(whole, TREE) if kind == 'zip' else a_tar(whole, TREE, 'w:gz' if kind == 'tgz' else 'w')
    raw = bytearray(whole.read_bytes())
    for at, byte in changes: raw[at % len(raw)] = byte
    (home/'bad').write_bytes(raw)
    try: unpack(home/'bad', home/'out')
    except CxrError: pass
    else: shutil.rmtree(home/'out')
    assert names(home) == ['bad', 'whole']

def test_a_zip_member_without_a_name_is_refused(tmp_path):
    "A zero byte ends a name, so damage can leave none"
    whole = a_zip(tmp_path/'a', {'QQ': b'x'}).read_bytes()
    (tmp_path/'bad').write_bytes(whole.replace(b'QQ', b'\0Q'))
    with pytest.raises(ArchiveError, match='has no name'): unpack(tmp_path/'bad', tmp_path/'out')
    assert names(tmp_path) == ['a', 'bad']

def test_a_killed_unpacking_leaves_no_half_collection(tmp_path):
    a = a_tar(tmp_path/'a', {f'{i:03}.png': os.urandom(200) for i in range(500)})
    code = ('import sys, time; from covid_cxr.curate.download import unpack; '
            'unpack(*sys.argv[1:], members=lambda p: time.sleep(.01) or True)')
    p, until = subprocess.Popen([sys.executable, '-c', code, str(a), str(tmp_path/'out')]), time.monotonic() + 30
    while time.monotonic() < until and not (tmp_path/'.out.unpacking/020.png').exists(): time.sleep(.002)
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert not (tmp_path/'out').exists() and len(names(tmp_path/'.out.unpacking')) > 20
    assert len(unpack(a, tmp_path/'out')) == 500 == len(names(tmp_path/'out')) and names(tmp_path) == ['a', 'out']


# ---- whole collections ----

def git(folder, *args):
    env = {**os.environ, 'GIT_CONFIG_GLOBAL': os.devnull, 'GIT_CONFIG_SYSTEM': os.devnull}
    who = ['-c', 'user.name=t', '-c', 'user.email=t@example.org', '-c', 'init.defaultBranch=main', '-c', 'commit.gpgsign=false']
    return subprocess.run(['git', *who, *args], cwd=folder, env=env, check=True, capture_output=True).stdout

@pytest.fixture()
def hub(web, tmp_path):
    "The server plays GitHub: archives that git itself has made, at the addresses that `DOWNLOADS` names"
    if shutil.which('git') is None: pytest.skip('git is not installed')
    repo = tmp_path/'repo'
    (repo/'images').mkdir(parents=True)
    (repo/'metadata.csv').write_text('patientid,filename\n1,a.png\n')
    (repo/'images/a.png').write_bytes(b'an image' * 1000)
    git(repo, 'init')
    git(repo, 'add', '.')
    git(repo, 'commit', '-m', 'one')
    web.commits = [git(repo, 'rev-parse', 'HEAD').decode().strip()]
    (repo/'metadata.csv').write_text('patientid,filename\n1,a.png\n2,b.png\n')
    git(repo, 'commit', '-am', 'two')
    web.commits.append(git(repo, 'rev-parse', 'HEAD').decode().strip())
    d = DOWNLOADS['covid_chestxray']
    for c in web.commits:
        data = git(repo, 'archive', '--format=zip', f'--prefix={d.folder}-{c}/', c)
        web.routes[f'/ieee8023/{d.folder}/archive/{c}.zip'] = lambda h, data=data: h.serve(data)
    web.path = lambda c: f'/ieee8023/{d.folder}/archive/{c}.zip'
    return web

def test_a_git_collection(hub, tmp_path):
    a, b = hub.commits
    said, out = [], tmp_path/'data'
    get = partial(download, 'covid_chestxray', out, accept=True, base_url=hub.url(), progress=said.append, backoff=.01)
    root = get(commit=a)
    assert root == out/'covid-chestxray-dataset' and (root/'images/a.png').read_bytes() == b'an image' * 1000
    assert names(out) == ['covid-chestxray-dataset', 'covid-chestxray-dataset.download.json', 'covid-chestxray-dataset.sha256']
    was = json.loads((out/'covid-chestxray-dataset.download.json').read_text())
    assert was['commit'] == a and was['files'] == 2 and was['content'] == content_id(hash_folder(root)) and 'CC BY-NC-SA' in was['licence']
    assert said[0].startswith('covid_chestxray: Every image has its own licence') and said[-1].endswith(f"content {was['content'][:12]}")
    if shutil.which('sha256sum'):                                                      # anyone's sha256sum reads our list
        check = subprocess.run(['sha256sum', '-c', '../covid-chestxray-dataset.sha256'], cwd=root, capture_output=True, text=True)
        assert check.returncode == 0 and check.stdout.count(': OK') == 2
    n = len(hub.seen)
    assert get(commit=a) == root and get(commit=a, content=was['content']) == root and len(hub.seen) == n
    assert 'is asked for' in refused('move it away', lambda: get(commit=b))
    assert get(commit=a, content=was['content']) == root
    other = download('covid_chestxray', tmp_path/'other', accept=True, base_url=hub.url(), commit=a, content=was['content'], progress=None)
    assert hash_folder(other) == hash_folder(root)
    again = partial(download, 'covid_chestxray', accept=True, base_url=hub.url(), progress=None)
    refused('its publisher has changed it', lambda: again(tmp_path/'third', commit=b, content=was['content']))
    assert names(tmp_path/'third') == []

def test_consent_comes_first(hub, tmp_path, capsys):
    refused('read and accepted its terms.*accept=True', lambda: download('covid_chestxray', tmp_path/'data', base_url=hub.url()))
    out = capsys.readouterr().out
    assert 'no diagnostic performance' in out and 'https://github.com/ieee8023' in out
    assert hub.seen == [] and not (tmp_path/'data').exists()
    for name in DOWNLOADS: refused('accept=True', lambda: download(name, tmp_path/'data', progress=None))
    assert not (tmp_path/'data').exists()

def test_an_archive_of_another_commit(hub, tmp_path):
    a, b = hub.commits
    hub.routes[hub.path(a)] = hub.routes[hub.path(b)]
    again = partial(download, 'covid_chestxray', tmp_path/'data', accept=True, base_url=hub.url(), commit=a, progress=None)
    refused(f'an archive of commit {b} and not of {a}', again, ArchiveError)
    assert names(tmp_path/'data') == []

def test_a_bad_archive_is_not_found_again(hub, tmp_path):
    "A collection whose archive is refused is fetched anew by the next call"
    a, good = hub.commits[0], hub.routes[hub.path(hub.commits[0])]
    hub.routes[hub.path(a)] = lambda h: h.serve(a_zip(tmp_path/'bad', {'top/../../evil': b'x'}).read_bytes())
    get = partial(download, 'covid_chestxray', tmp_path/'data', accept=True, base_url=hub.url(), commit=a, progress=None, backoff=.01)
    refused('leads out of the folder', get, ArchiveError)
    hub.routes[hub.path(a)] = lambda h: h.serve(b'<html>sign in</html>')
    refused('a web page', get, ArchiveError)
    hub.routes[hub.path(a)] = lambda h: h.serve(a_zip(tmp_path/'bad', {'top/readme': b'x'}).read_bytes())
    refused('holds no metadata.csv and no images', get, ArchiveError)
    assert names(tmp_path/'data') == []
    hub.routes[hub.path(a)] = good
    assert get().is_dir()

def test_a_download_killed_before_its_unpacking_goes_on(hub, tmp_path):
    "The archive stands there whole: it is not fetched again"
    a = hub.commits[0]
    archive = tmp_path/f'data/covid-chestxray-dataset-{a[:12]}.zip'
    fetch(hub.url(hub.path(a)), archive)
    hub.routes.clear()
    again = partial(download, 'covid_chestxray', tmp_path/'data', accept=True, base_url=hub.url(), commit=a, progress=None)
    assert again().is_dir() and not archive.exists()

def test_what_changes_is_noticed(hub, tmp_path):
    get = partial(download, 'covid_chestxray', tmp_path/'data', accept=True, base_url=hub.url(), commit=hub.commits[0], progress=None)
    root = get()
    (root/'images/a.png').write_bytes(b'edited')
    refused(r'1 changed \(e.g. images/a.png\)', get)
    (root/'images/a.png').unlink()
    (root/'new').touch()
    refused(r'1 missing \(e.g. images/a.png\); 1 new \(e.g. new\)', lambda: check_folder(root))
    (tmp_path/'data/covid-chestxray-dataset.download.json').write_text('{')
    refused('did not come from a download', get)

def test_a_mirror_on_the_disk(hub, tmp_path):
    c = hub.commits[0]
    there = tmp_path/'mirror'/hub.path(c).lstrip('/')
    fetch(hub.url(hub.path(c)), there)
    mirror = (tmp_path/'mirror').as_uri()
    assert download('covid_chestxray', tmp_path/'data', accept=True, base_url=mirror, commit=c, progress=None).is_dir()

def test_by_hand(tmp_path, capsys):
    refused('follow the 3 steps', lambda: download('nih_box', tmp_path, accept=True))
    assert '  1. open the page' in capsys.readouterr().out
    (tmp_path/'nih-chest-xrays').mkdir()
    (tmp_path/'nih-chest-xrays/Data_Entry_2017_v2020.csv').touch()
    assert download('nih_box', tmp_path) == tmp_path/'nih-chest-xrays'


# ---- Kaggle's client ----

CLIENT = '''#!{python}
import json, os, sys, zipfile
log = json.load(open({log!r})) if os.path.exists({log!r}) else []
json.dump(log + [sys.argv[1:]], open({log!r}, 'w'))
{body}
'''
SERVES = '''
place = sys.argv[sys.argv.index('-p') + 1]
out = os.path.join(place, sys.argv[3].split('/')[-1] + '.zip')
sys.stderr.write('Dataset URL: https://www.kaggle.com/datasets/' + sys.argv[3] + chr(10))
for i in range(0, 101, 4): sys.stderr.write(chr(13) + f'{i}%|#####| {i}.0M/100M'); sys.stderr.flush()
with zipfile.ZipFile(out, 'w') as z:
    for name in @NAMES@: z.writestr(name, 'x' * 50)
'''
def serves(names): return SERVES.replace('@NAMES@', repr(list(names)))

@pytest.fixture()
def kaggle(tmp_path, monkeypatch):
    "A stand-in for Kaggle's command line: a real process on the PATH; `kaggle(body)` sets what it does, `kaggle.asked()` what it was asked"
    home = tmp_path/'home'
    home.mkdir()
    for k in [k for k in os.environ if k.startswith('KAGGLE')]: monkeypatch.delenv(k)
    monkeypatch.delenv('XDG_CONFIG_HOME', raising=False)
    monkeypatch.setenv('HOME', str(home))
    monkeypatch.setenv('PATH', f"{tmp_path/'bin'}{os.pathsep}{os.environ['PATH']}")
    (tmp_path/'bin').mkdir()
    log = tmp_path/'asked.json'
    def install(body):
        client = tmp_path/'bin/kaggle'
        client.write_text(CLIENT.format(python=sys.executable, log=str(log), body=body))
        client.chmod(0o755)
    install.asked, install.home = lambda: json.loads(log.read_text()), home
    return install

XRAYS = ['chest_xray/train/NORMAL/IM-0001.jpeg', 'chest_xray/test/NORMAL/IM-0002.jpeg', '__MACOSX/chest_xray/._x']

def test_a_kaggle_collection(kaggle, tmp_path):
    kaggle(serves(XRAYS))
    said, out = [], tmp_path/'data'
    root = download('kaggle_pneumonia', out, accept=True, progress=said.append)
    assert kaggle.asked() == [['datasets', 'download', 'paultimothymooney/chest-xray-pneumonia', '-p',
                               str(out/'.chest-xray-pneumonia.kaggle')]]
    assert set(hash_folder(root)) == set(XRAYS)
    assert names(out) == ['chest-xray-pneumonia', 'chest-xray-pneumonia.download.json', 'chest-xray-pneumonia.sha256']
    assert [s for s in said if '|' in s][:2] == ['kaggle: 0%|#####| 0.0M/100M', 'kaggle: 12%|#####| 12.0M/100M']
    assert sum('|' in s for s in said) == 11
    assert download('kaggle_pneumonia', out, progress=None) == root and len(kaggle.asked()) == 1
    assert names(download('kaggle_pneumonia', tmp_path/'kept', accept=True, keep_archive=True,
                          progress=None).parent)[-1] == 'chest-xray-pneumonia.zip'

def test_a_competition(kaggle, tmp_path):
    kaggle(serves(['stage_2_train_labels.csv', 'stage_2_train_images/a.dcm']))
    assert download('rsna', tmp_path/'data', accept=True, progress=None).name == 'rsna-pneumonia-detection-challenge'
    assert kaggle.asked()[0][:3] == ['competitions', 'download', 'rsna-pneumonia-detection-challenge']

@pytest.mark.parametrize('source, body, words', [
    ('rsna', "sys.exit('403 Client Error: Forbidden for url: https://api.kaggle.com/v1/x')",
     r'refuses .*without a token.*accept the rules at https://www.kaggle.com/competitions/rsna.*/rules'),
    ('rsna', "print('Authentication required to call the Kaggle API.'); sys.exit(1)",
     'without a token, for none was found.*KAGGLE_API_TOKEN'),
    ('coronahack', "raise OSError('Could not find kaggle.json. Make sure it is located in ~/.kaggle')",
     'KAGGLE_API_TOKEN or ~/.kaggle/kaggle.json'),
    ('coronahack', "print('401 - Unauthorized'); sys.exit(1)", 'make a token at'),
    ('coronahack', "print('404 Client Error: Not Found for url'); sys.exit(1)", 'knows no praveengovi/coronahack'),
    ('coronahack', "sys.exit('HTTPSConnectionPool(host=x, port=443): Max retries exceeded with url: /v1')", 'cannot be reached'),
    ('coronahack', "print('it rains'); sys.exit(3)", 'its last words were: it rains'),
    ('coronahack', "sys.exit(3)", 'its last words were: nothing'),
    ('coronahack', "print('User cancelled operation')",
     'ended without coronahack-chest-xraydataset.zip; its last words were: User cancelled'),
    ('coronahack', "pass", 'its last words were: none'),
    ('coronahack', "os.kill(os.getpid(), 9)", 'failed on'),
])
def test_what_the_client_says_becomes_a_cure(kaggle, tmp_path, source, body, words):
    kaggle(body)
    refused(words, lambda: download(source, tmp_path/'data', accept=True, progress=None))
    assert not (tmp_path/'data'/DOWNLOADS[source].folder).exists()

def test_a_token_is_named_and_never_shown(kaggle, tmp_path):
    kaggle("print('403 Client Error: Forbidden'); sys.exit(1)")
    (kaggle.home/'.kaggle').mkdir()
    (kaggle.home/'.kaggle/kaggle.json').write_text('{"username": "me", "key": "very-secret"}')
    said = refused('with the token in .*kaggle.json', lambda: download('rsna', tmp_path/'data', accept=True, progress=None))
    assert 'very-secret' not in said
    home = dict(HOME=str(kaggle.home))
    assert kaggle_credentials({**home, 'KAGGLE_USERNAME': 'a', 'KAGGLE_KEY': 'b'}) == 'KAGGLE_USERNAME and KAGGLE_KEY'
    assert kaggle_credentials(home).endswith('kaggle.json')
    (kaggle.home/'.kaggle/kaggle.json').rename(kaggle.home/'.kaggle/access_token')
    assert kaggle_credentials(home).endswith('access_token')

def test_the_client_is_not_installed(tmp_path):
    "In a Python of its own, without the client on its PATH or among its packages"
    (tmp_path/'empty').mkdir()
    code = ('import importlib.util as u, sys; from covid_cxr.curate import download as d\n'
            'find = u.find_spec; u.find_spec = lambda n, *a: None if n == "kaggle" else find(n, *a)\n'
            'try: d.download("coronahack", sys.argv[1], accept=True, progress=None)\nexcept d.DownloadError as e: print(e)')
    out = subprocess.run([sys.executable, '-c', code, str(tmp_path/'data')], env={**os.environ, 'PATH': str(tmp_path/'empty')},
                         capture_output=True, text=True, timeout=60)
    assert "pip install kaggle" in out.stdout, out

def test_what_kaggle_sends_is_checked_too(kaggle, tmp_path):
    out = tmp_path/'data'
    for members, why in {('chest_xray/train/a', '../../evil'): 'leads out',
                         ('other/a',): 'holds no chest_xray/train and no chest_xray/test'}.items():
        kaggle(serves(members))
        refused(why, lambda: download('kaggle_pneumonia', out, accept=True, progress=None), ArchiveError)
        assert not (out/'chest-xray-pneumonia').exists() and not list(out.rglob('*.zip')) and not (tmp_path/'evil').exists()

def test_a_client_that_failed_goes_on_in_the_same_place(kaggle, tmp_path):
    "Kaggle's client continues what lies in its folder: a failure must not clear it away"
    out = tmp_path/'data'
    kaggle("p = sys.argv[-1]; open(os.path.join(p, 'half.kaggle-partial'), 'w').close(); sys.exit('Connection aborted')")
    refused('goes on where it stopped', lambda: download('kaggle_pneumonia', out, accept=True, progress=None))
    kaggle('assert os.path.exists(os.path.join(sys.argv[-1], "half.kaggle-partial"))\n' + serves(XRAYS))
    assert download('kaggle_pneumonia', out, accept=True, progress=None).is_dir() and not list(out.glob('.*'))

def test_room_for_what_comes(kaggle, tmp_path, monkeypatch):
    "Too little space is said before the client starts; what an interrupted transfer left there is not asked for twice"
    kaggle(serves(XRAYS))
    free = shutil.disk_usage(tmp_path).free
    short = dl.Download(**{**vars(DOWNLOADS['kaggle_pneumonia']), 'about_bytes': free // 2 + 2_000_000_000, 'max_bytes': 10 * free})
    monkeypatch.setitem(DOWNLOADS, 'kaggle_pneumonia', short)
    refused('its archive and what is in it.*free some space',
            lambda: download('kaggle_pneumonia', tmp_path/'data', accept=True, progress=None))
    stage = tmp_path/'data/.chest-xray-pneumonia.kaggle'
    stage.mkdir()
    with open(stage/'half', 'wb') as f: f.truncate(8_000_000_000)          # takes no space itself
    assert download('kaggle_pneumonia', tmp_path/'data', accept=True, progress=None).is_dir() and len(kaggle.asked()) == 1

def test_the_registry():
    from urllib.parse import urlsplit
    for n, d in DOWNLOADS.items():
        assert n == d.name and urlsplit(d.page).scheme == 'https' and d.accept and d.max_bytes > (d.about_bytes or 0)
    with pytest.raises(FrozenInstanceError): DOWNLOADS['nih'].url = 'http://elsewhere'
    assert manifest_text({'b': '2' * 64, 'a': '1' * 64}) == '1' * 64 + '  a\n' + '2' * 64 + '  b\n'

def test_importing_does_nothing(tmp_path):
    "No transfer, no file, and none of the heavy packages"
    code = ("import sys; import covid_cxr.curate.download; "
            "print(sorted(m for m in ('torch', 'fastai', 'pandas', 'requests', 'fastcore', 'kaggle') if m in sys.modules))")
    out = subprocess.run([sys.executable, '-c', code], cwd=tmp_path,
                         env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True, timeout=60)
    assert out.stdout.strip() == '[]' and names(tmp_path) == [], out
