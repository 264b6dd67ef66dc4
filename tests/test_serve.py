"""The server of a model: what it answers, what it refuses, what breaks it (nothing), and what it leaves behind (nothing)."""
import contextlib, http.client, io, json, logging, os, re, shutil, signal, socket, subprocess, sys, threading, time
from pathlib import Path
from urllib.parse import urlsplit
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from conftest import ROOT, build_once, examples, here, python
from covid_cxr.deploy.api import openapi_document
from covid_cxr.deploy.guard import Limits, log_request
from covid_cxr.deploy.serve import open_service, serving
from covid_cxr.deploy.worker import write_example_bundle
from covid_cxr.phantom import make_phantom
from covid_cxr.runs.folder import open_run
from test_findings_run import FINDINGS, make_findings_run

TOKEN = 'a-token-for-the-tests'
HEAVY = {'torch', 'fastai', 'pandas', 'sklearn', 'matplotlib'}


def png(array):
    out = io.BytesIO()
    Image.fromarray(array).save(out, 'png')
    return out.getvalue()


RADIOGRAPH = png(make_phantom(seed=2, patient=99, size=128).image)
NOISE = png(np.random.default_rng(0).integers(0, 256, (128, 128)).astype(np.uint8))


@pytest.fixture(scope='module')
def several(shared_folder): return build_once(shared_folder / 'findings-run', make_findings_run)


@pytest.fixture(scope='module')
def bundle(shared_folder): return build_once(shared_folder / 'served-bundle', write_example_bundle)


class Served:
    "A running server, and a client of it"
    def __init__(self, service, address, lines):
        self.service, self.address, self.lines = service, address, lines
        self.host = urlsplit(address).netloc

    def ask(self, method, path, body=None, **headers):
        "(status, headers, body)"
        connection = http.client.HTTPConnection(self.host, timeout=30)
        try:
            connection.request(method, path, body, {k.replace('_', '-'): v for k, v in headers.items()})
            reply = connection.getresponse()
            return reply.status, reply.headers, reply.read()
        finally: connection.close()

    def predict(self, data, path='/api/predict', **headers):
        status, _, body = self.ask('POST', path, data, Content_Type='image/png', **headers)
        return status, json.loads(body)

    def form(self, path, files, fields=(), **headers):
        body, kind = form(files, fields)
        return self.ask('POST', path, body, Content_Type=kind, **headers)


def form(files, fields=()):
    "A multipart form of (name, bytes) and its content type"
    parts = [f'Content-Disposition: form-data; name="files"; filename="{n}"\r\n\r\n'.encode() + d for n, d in files]
    parts += [f'Content-Disposition: form-data; name="{n}"\r\n\r\n{v}'.encode() for n, v in fields]
    return b''.join(b'--xXx\r\n' + p + b'\r\n' for p in parts) + b'--xXx--\r\n', 'multipart/form-data; boundary=xXx'


@contextlib.contextmanager
def running(bundle, **options):
    text = io.StringIO()
    service = open_service(bundle, log=lambda *line: log_request(*line, to=text), **options)
    with serving(service) as address: yield Served(service, address, text)


@pytest.fixture(scope='module')
def server(bundle):
    limits = Limits(file_bytes=4_000_000, request_bytes=6_000_000, files=3, per_minute=1000, upload_seconds=1.5, header_seconds=.6)
    with running(bundle, timeout=4., limits=limits) as s: yield s


# answers

def test_an_answer_a_decline_and_a_file_that_is_no_picture(server):
    status, _, body = server.form('/api/predict', [('a.png', RADIOGRAPH), ('b.png', NOISE), ('c.txt', b'a letter')])
    got = json.loads(body)
    assert status == 200 and [a['status'] for a in got['answers']] == ['answered', 'declined', 'declined']
    good, noise, letter = got['answers']
    assert good['predicted'] in good['probabilities'] and abs(sum(good['probabilities'].values()) - 1) < 1e-6
    assert good['thresholds'] == {'pneumonia': .4} and good['name'] == 'a.png' and got['synthetic']
    assert 'training' in noise['why'] and 'text' in letter['why'] and '/proc' not in letter['why']
    assert 'diagnosis' in got['not_for']


def test_the_same_numbers_as_predict(server, bundle, tmp_path):
    from covid_cxr.predict import load_predictor
    (tmp_path / 'a.png').write_bytes(RADIOGRAPH)
    want = load_predictor(bundle).predict(tmp_path / 'a.png').probabilities
    got = server.predict(RADIOGRAPH)[1]['answers'][0]['probabilities']
    assert max(abs(got[k] - want[k]) for k in want) < 1e-6


def test_a_heat_map_comes_when_asked_for(server):
    import base64
    assert server.predict(RADIOGRAPH)[1]['answers'][0]['heat_map'] is None
    drawn = server.predict(RADIOGRAPH, '/api/predict?heat_map=on')[1]['answers'][0]['heat_map']
    picture, overlay = (Image.open(io.BytesIO(base64.b64decode(drawn[k]))) for k in ('picture', 'overlay'))
    assert (picture.size, picture.mode, overlay.size, overlay.mode) == ((64, 64), 'L', (64, 64), 'RGB')
    assert server.predict(NOISE, '/api/predict?heat_map=on')[1]['answers'][0]['heat_map'] is None


def test_a_dicom_file(server):
    pydicom = pytest.importorskip('pydicom')
    from pydicom.uid import ExplicitVRLittleEndian, DigitalXRayImageStorageForPresentation as kind
    ds, pixels = pydicom.Dataset(), make_phantom(seed=2, patient=99, size=128).image
    ds.file_meta = pydicom.dataset.FileMetaDataset(dict(pydicom.dataset.FileMetaDataset()))
    ds.file_meta.TransferSyntaxUID, ds.file_meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, kind
    ds.file_meta.MediaStorageSOPInstanceUID = '1.2.3'
    ds.SOPClassUID, ds.SOPInstanceUID, ds.PatientName = kind, '1.2.3', 'Secret^Patient'
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = *pixels.shape, 1, 'MONOCHROME2'
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation, ds.PixelData = 8, 8, 7, 0, pixels.tobytes()
    out = io.BytesIO()
    pydicom.dcmwrite(out, ds, enforce_file_format=True)
    status, got = server.predict(out.getvalue())
    assert status == 200 and got['answers'][0]['status'] == 'answered' and 'Secret' not in json.dumps(got)


def test_the_form_works_without_a_script(server):
    name = '<img src=x onerror=alert(1)>&.png'
    status, headers, body = server.form('/', [(name, RADIOGRAPH), ('noise.png', NOISE)], [('heat_map', 'on')])
    text = body.decode()
    assert status == 200 and '<img src=x' not in text and '&lt;img src=x onerror=alert(1)&gt;' in text
    assert text.count('<li class="answer') == 2 and 'predicted: ' in text and 'no prediction: ' in text
    assert text.count('data:image/png;base64,') == 2
    status, _, body = server.form('/answers', [('a.png', RADIOGRAPH)])
    assert body.decode().lstrip().startswith('<li class="answer answered">')


def test_several_findings_are_answered_together(several, tmp_path):
    from covid_cxr.predict import load_predictor
    row = open_run(several).evaluated.iloc[0]
    data = Path(row['path']).read_bytes()
    want = load_predictor(several).predict(row['path'])
    assert here('export', several, '--out', tmp_path / 'model').returncode == 0
    with running(tmp_path / 'model', limits=Limits(per_minute=1000), timeout=20.) as s:
        _, got = s.predict(data)
        model = json.loads(s.ask('GET', '/api/model')[2])
        page = s.form('/', [('a.png', data)])[2].decode()
    answer = got['answers'][0]
    assert model['several_findings'] and model['classes'] == FINDINGS and 'any number of 2 findings' in page
    if want.declined: assert answer['status'] == 'declined' and answer['predicted'] is None
    assert answer['probabilities'] == pytest.approx(want.probabilities, abs=1e-5)
    assert want.declined or answer['predicted'] == list(want.labels)


def test_a_request_without_a_file_is_one_sentence(server):
    for path in ('/', '/answers'): assert b'no file came' in server.form(path, [])[2]
    status, got = server.predict(b'')
    assert (status, got) == (400, {'error': 'no file came with this request; choose one or more.'})


def test_a_character_set_that_is_none_is_refused(server):
    body, kind = form([('a.png', RADIOGRAPH)])
    for charset in ('undefined', 'punycode'):
        status, _, said = server.ask('POST', '/api/predict', body, Content_Type=f'{kind}; charset={charset}')
        assert (status, json.loads(said)['error']) == (400, 'the form cannot be read; send it as multipart/form-data.'), charset


# the model and the documents

def test_the_page_says_what_the_model_is_and_is_not(server):
    text = server.ask('GET', '/')[2].decode()
    for said in ('not for diagnosis', 'SYNTHETIC', 'Frozen thresholds', 'pneumonia from 0.400 on', 'Calibrated',
                 'from random weights', 'Input check'):
        assert said in text, said
    model = json.loads(server.ask('GET', '/api/model')[2])
    assert model['classes'] == ['normal', 'pneumonia'] and model['thresholds'] == {'pneumonia': .4}


def schema_of(document, name):
    return {'$ref': f'#/components/schemas/{name}', 'components': document['components']}


def test_the_openapi_document_is_valid_and_true(server):
    jsonschema, openapi = pytest.importorskip('jsonschema'), pytest.importorskip('openapi_spec_validator')
    document = json.loads(server.ask('GET', '/openapi.json')[2])
    openapi.validate(document)
    openapi.validate(openapi_document(server.service.model, Limits(), token=True))
    def check(name, value): jsonschema.Draft202012Validator(schema_of(document, name)).validate(value)
    for files in ([('a.png', RADIOGRAPH)], [('b.png', NOISE), ('c', b'no')]):
        check('Answers', json.loads(server.form('/api/predict', files, [('heat_map', 'on')])[2]))
    check('Model', json.loads(server.ask('GET', '/api/model')[2]))
    check('Health', json.loads(server.ask('GET', '/health')[2]))
    check('Error', server.predict(b'')[1])
    with pytest.raises(jsonschema.ValidationError): check('Answers', dict(answers=[dict(file=0)]))
    for path, methods in document['paths'].items():
        for method in methods: assert server.ask(method.upper(), path)[0] not in (404, 405)
    page = server.ask('GET', '/api')[2].decode()
    assert all(path in page for path in document['paths'])


def test_metrics_count(server):
    def counted():
        lines = server.ask('GET', '/metrics')[2].decode().splitlines()
        return {k: float(v) for k, v in (line.rsplit(' ', 1) for line in lines if not line.startswith('#'))}
    before = counted()
    server.predict(RADIOGRAPH)
    after = counted()
    for name in ('covid_cxr_answers_total{status="answered"}', 'covid_cxr_answer_seconds_count'):
        assert after[name] == before[name] + 1
    assert after['covid_cxr_workers_up'] == 1


# what breaks a worker

def worker_of(server): return next(iter(server.service.pool.workers)).process


def wait_until_up(server):
    end = time.monotonic() + 20
    while server.ask('GET', '/health')[0] != 200 or not server.service.pool.free.qsize():
        assert time.monotonic() < end
        time.sleep(.02)


def in_the_middle(server, *signals):
    "The reply for a request whose worker gets these signals while it works"
    process, got = worker_of(server), []
    process.send_signal(signal.SIGSTOP)               # so that the answer is not there before the signals are
    asked = threading.Thread(target=lambda: got.append(server.predict(RADIOGRAPH)))
    asked.start()
    while server.service.pool.free.qsize(): time.sleep(.005)      # the file is being answered
    for s in signals: process.send_signal(s)
    asked.join(20)
    return got[0]


def test_a_crash_is_one_sentence_and_the_server_goes_on(server):
    wait_until_up(server)
    restarts = server.service.pool.restarts
    status, got = in_the_middle(server, signal.SIGSEGV, signal.SIGCONT)
    assert status == 422 and got['answers'][0]['failure'] == 'crash' and 'broke the program' in got['answers'][0]['why']
    assert server.predict(RADIOGRAPH)[1]['answers'][0]['status'] == 'answered'
    wait_until_up(server)
    assert json.loads(server.ask('GET', '/health')[2]) == dict(status='ok', workers_up=1, workers=1, restarts=restarts + 1)


def test_a_file_that_takes_too_long_is_stopped(server, monkeypatch):
    wait_until_up(server)
    monkeypatch.setattr(next(iter(server.service.pool.workers)), 'timeout', .5)
    began = time.monotonic()
    status, got = in_the_middle(server)
    assert status == 504 and got['answers'][0]['failure'] == 'timeout' and time.monotonic() - began < 5
    assert server.predict(RADIOGRAPH)[1]['answers'][0]['status'] == 'answered'


def test_a_worker_that_dies_with_nothing_to_do_costs_no_answer(server):
    wait_until_up(server)
    worker_of(server).kill()
    worker_of(server).wait()
    assert server.predict(RADIOGRAPH)[1]['answers'][0]['status'] == 'answered'


def test_health_says_that_no_worker_is_up(server, monkeypatch):
    wait_until_up(server)
    real, held = server.service.pool.start, threading.Event()
    def late():
        held.wait(20)
        return real()
    monkeypatch.setattr(server.service.pool, 'start', late)
    in_the_middle(server, signal.SIGKILL)
    status, _, body = server.ask('GET', '/health')
    held.set()
    assert status == 503 and json.loads(body)['status'] == 'starting'
    wait_until_up(server)


# limits

def test_limits_on_bytes_and_files(server):
    big = b'\x89PNG' + bytes(4_100_000)
    assert server.predict(big)[0] == 413
    assert server.form('/api/predict', [('a', big)])[0] == 413
    status, _, body = server.form('/api/predict', [(f'{i}.png', RADIOGRAPH) for i in range(4)])
    assert status == 413 and 'more than 3 files' in json.loads(body)['error']
    status, headers, body = server.ask('POST', '/api/predict', None, Content_Type='image/png', Content_Length='99999999999999999999999')
    assert status in (400, 413)
    with socket.create_connection(server.host.split(':'), timeout=10) as s:      # a length that is not said
        s.sendall(f'POST /api/predict HTTP/1.1\r\nHost: {server.host}\r\nTransfer-Encoding: chunked\r\n\r\n'.encode())
        with contextlib.suppress(OSError):
            for _ in range(8): s.sendall(b'f4240\r\n' + bytes(1_000_000) + b'\r\n')
        assert b' 413 ' in s.recv(100)


def test_a_slow_upload_and_a_silent_connection_are_closed(server):
    with socket.create_connection(server.host.split(':'), timeout=10) as s:
        s.sendall(f'POST /api/predict HTTP/1.1\r\nHost: {server.host}\r\nContent-Length: 9000\r\n\r\nslowly'.encode())
        assert b' 408 ' in s.recv(100)
    with socket.create_connection(server.host.split(':'), timeout=10) as s:
        s.sendall(b'GET / HTTP/1.1\r\nHost')
        assert s.recv(100) == b''


def test_a_connection_that_reads_no_reply_is_closed(server):
    "However much it asks for; the server's end of it is one of the open files of this process"
    before = len(os.listdir('/dev/fd'))
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        s.connect(('127.0.0.1', int(server.host.split(':')[1])))
        s.sendall(f'GET /openapi.json HTTP/1.1\r\nHost: {server.host}\r\n\r\n'.encode() * 800)
        assert server.ask('GET', '/health')[0] == 200 and len(os.listdir('/dev/fd')) >= before + 2
        end = time.monotonic() + 20
        while len(os.listdir('/dev/fd')) > before + 1:
            assert time.monotonic() < end
            time.sleep(.05)


def test_a_broken_body_is_refused_once(server, caplog):
    "Before its reply and behind it; the request is logged, and no library reports a mistake"
    logging.getLogger('uvicorn.error').setLevel(logging.ERROR)
    start = f'POST /nothing HTTP/1.1\r\nHost: {server.host}\r\nTransfer-Encoding: chunked\r\n\r\n'.encode()
    logged = len(server.lines.getvalue().splitlines())
    with socket.create_connection(server.host.split(':'), timeout=10) as s:
        s.sendall(start + b'no chunk\r\n')
        assert b' 400 ' in s.recv(100)
        while s.recv(1000): pass
    with socket.create_connection(server.host.split(':'), timeout=10) as s:
        s.sendall(start + b'1\r\nx\r\n')
        reply = s.recv(100)
        s.sendall(b'no chunk\r\n')
        with contextlib.suppress(ConnectionError):
            while piece := s.recv(1000): reply += piece
        assert b' 404 ' in reply and reply.count(b'HTTP/1.1') == 1
    assert len(server.lines.getvalue().splitlines()) == logged + 2 and not caplog.records


def test_too_many_requests_and_too_many_at_once(bundle):
    with running(bundle, limits=Limits(per_minute=3, at_once=1)) as s:
        with s.service.place():
            status, headers, body = s.ask('POST', '/api/predict', RADIOGRAPH, Content_Type='image/png')
            assert status == 503 and int(headers['Retry-After']) > 0 and json.loads(body)['error']
        assert [s.predict(RADIOGRAPH)[0] for _ in range(3)] == [200, 200, 429]
        status, headers, body = s.form('/answers', [('a.png', RADIOGRAPH)])
        assert status == 429 and int(headers['Retry-After']) > 10 and b'class="answer failed"' in body


def test_requests_at_the_same_time_wait_for_the_one_worker(server):
    got = []
    asked = [threading.Thread(target=lambda: got.append(server.predict(RADIOGRAPH))) for _ in range(5)]
    for t in asked: t.start()
    for t in asked: t.join(30)
    assert [(status, a['answers'][0]['status']) for status, a in got] == [(200, 'answered')] * 5


def test_a_picture_of_a_billion_pixels_is_declined_by_its_header(server):
    header = RADIOGRAPH[:16] + (40000).to_bytes(4, 'big') * 2 + RADIOGRAPH[24:]
    got = server.predict(header)[1]['answers'][0]
    assert got['status'] == 'declined'


# who may ask

def test_other_names_and_other_sites_are_refused(server):
    for host in ('evil.example.com', '127.0.0.1.evil.com', '192.168.0.7'): assert server.ask('GET', '/', Host=host)[0] == 421
    assert server.ask('GET', '/', Host='localhost:80')[0] == 200
    for headers in (dict(Origin='http://evil.example.com'), dict(Origin='null'), dict(Sec_Fetch_Site='cross-site'),
                    dict(Sec_Fetch_Site='same-site')):
        status, got = server.predict(RADIOGRAPH, **headers)
        assert status == 403 and 'another site' in got['error']
    assert server.predict(RADIOGRAPH, Origin=server.address.rstrip('/'), Sec_Fetch_Site='same-origin')[0] == 200


def test_the_address_that_a_client_says_chooses_no_page(server, monkeypatch):
    "Older releases of starlette make `Request.url` of the Host header as it was sent, or fail at it"
    from starlette.requests import Request
    def said(request): raise ValueError('Invalid IPv6 URL')
    monkeypatch.setattr(Request, 'url', property(said))
    assert [server.ask('GET', path)[0] for path in ('/', '/api', '/health', '/nothing')] == [200, 200, 200, 404]
    assert server.predict(RADIOGRAPH)[0] == 200 and server.ask('GET', '/', Host='[')[0] == 421


def test_a_token_opens_the_page_and_the_endpoint(bundle):
    with running(bundle, token=TOKEN, names=['xray.example.org']) as s:
        behind = dict(Host='xray.example.org', Authorization=f'Bearer {TOKEN}')          # a reverse proxy with TLS
        assert s.predict(RADIOGRAPH, Origin='https://xray.example.org', **behind)[0] == 200
        assert s.predict(RADIOGRAPH, Origin='https://other.example.org', **behind)[0] == 403
        status, headers, _ = s.ask('GET', '/')
        assert (status, headers['Location']) == (303, '/login')
        for path in ('/api/model', '/metrics', '/openapi.json'):
            status, headers, body = s.ask('GET', path)
            assert status == 401 and headers['WWW-Authenticate'] == 'Bearer' and json.loads(body)['error']
        assert s.ask('GET', '/health')[0] == 200
        assert s.predict(RADIOGRAPH)[0] == s.predict(RADIOGRAPH, Authorization='Bearer wrong')[0] == 401
        assert s.predict(RADIOGRAPH, path=f'/api/predict?token={TOKEN}')[0] == 401
        assert s.predict(RADIOGRAPH, Authorization=f'Bearer {TOKEN}')[0] == 200
        sent = dict(Content_Type='application/x-www-form-urlencoded')
        assert s.ask('POST', '/login', 'token=wrong', **sent)[0] == 401
        status, headers, _ = s.ask('POST', '/login', f'token={TOKEN}', **sent)
        cookie = headers['Set-Cookie']
        assert status == 303 and TOKEN not in cookie and 'HttpOnly' in cookie and 'samesite=strict' in cookie.lower()
        assert s.ask('GET', '/', Cookie=cookie.split(';')[0])[0] == 200
        assert s.ask('GET', '/', Cookie=f'{s.service.door.cookie_name}=x')[0] == 303
        assert [s.ask('POST', '/login', 'token=wrong', **sent)[0] for _ in range(9)][-1] == 429
        document = json.loads(s.ask('GET', '/openapi.json', Authorization=f'Bearer {TOKEN}')[2])
        assert document['components']['securitySchemes']['token']['scheme'] == 'bearer' and TOKEN not in s.lines.getvalue()


# what it leaves behind

def test_every_reply_forbids_what_the_page_does_not_need(server):
    asked = [('GET', p) for p in ('/', '/api', '/login', '/style.css', '/script.js', '/health', '/metrics', '/nothing', '/api/model')]
    for method, path in [*asked, ('POST', '/'), ('PUT', '/'), ('POST', '/api/predict'), ('OPTIONS', '/api/predict')]:
        status, headers, body = server.ask(method, path)
        policy = headers['Content-Security-Policy']
        assert policy.startswith("default-src 'none'") and 'unsafe' not in policy and "frame-ancestors 'none'" in policy
        assert (headers['X-Content-Type-Options'], headers['Cache-Control']) == ('nosniff', 'no-store'), path
        assert headers['Referrer-Policy'] == 'same-origin' and 'server' not in headers
        assert 'Access-Control-Allow-Origin' not in headers
        if 'html' in headers['Content-Type']:
            text = body.decode()
            assert not re.search(r'<style|\sstyle=|\son\w+=|javascript:|<script(?! src="script.js")', text), path
            assert not re.search(r'(?:src|href|action)="(?:https?:)?//', text), path


WATCH = '''
import os, sys
seen, on = [], [False]
def watch(event, args):
    if not on[0]: return
    if event == 'open' and isinstance(args[0], (str, bytes)) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        seen.append((event, str(args[0])))
    if event in ('os.mkdir', 'os.rename', 'tempfile.mkstemp', 'tempfile.mkdtemp', 'os.link', 'os.symlink'):
        seen.append((event, str(args[0])))
sys.addaudithook(watch)
'''


def test_an_upload_is_never_written_and_nothing_heavy_is_imported(bundle, tmp_path):
    "Of the server and of its worker, each in a fresh process with an eye on every file that is opened for writing"
    (tmp_path / 'body').write_bytes(form([('secret-name.png', RADIOGRAPH + bytes(3_000_000))], [('heat_map', 'on')])[0])
    (tmp_path / 'a.png').write_bytes(RADIOGRAPH)
    python(WATCH + f'''
import io, urllib.request
from covid_cxr.deploy.guard import log_request
from covid_cxr.deploy.serve import open_service, serving
text = io.StringIO()
body = open(sys.argv[2], 'rb').read()
service = open_service(sys.argv[1], log=lambda *line: log_request(*line, to=text))
with serving(service) as address:
    kind = {{'Content-Type': 'multipart/form-data; boundary=xXx'}}
    def ask(): return urllib.request.urlopen(urllib.request.Request(address + 'api/predict', body, kind)).read()
    ask()
    on[0] = True
    assert b'"answers"' in ask()
    on[0] = False
assert not seen, seen
assert 'secret' not in text.getvalue() and '<10MB' in text.getvalue(), text.getvalue()
assert not {HEAVY!r} & set(sys.modules), {HEAVY!r} & set(sys.modules)
''', bundle, tmp_path / 'body')
    python(WATCH + f'''
from covid_cxr.deploy.worker import answer_file, file_of, limit_process, write_example_bundle
from covid_cxr.predict import load_predictor
predictor, data = load_predictor(sys.argv[1], backend='onnx'), open(sys.argv[2], 'rb').read()
shared = os.memfd_create('file')
os.write(shared, data)
limit_process(1_500_000_000)
on[0] = True
with file_of(b'', shared) as path: got = answer_file(predictor, path, heat_map=True)
on[0] = False
assert got.status == 'answered' and got.heat_map, got
assert not seen, seen
assert not {HEAVY!r} & set(sys.modules), {HEAVY!r} & set(sys.modules)
''', bundle, tmp_path / 'a.png')


def test_the_log_names_no_file_and_no_client(server):
    server.form('/api/predict', [('Mueller-Karl-1950.png', RADIOGRAPH)])
    server.ask('GET', '/some/Mueller/path')
    lines = server.lines.getvalue().splitlines()
    assert lines and 'Mueller' not in server.lines.getvalue() and '127.0.0.1' not in server.lines.getvalue()
    line = re.compile(r'\d{4}-\d\d-\d\dT[\d:.+Z-]+ \d{3} (/[a-z./]*|other) (-|[<>]\d+[kM]B) \d+\.\d\ds')
    assert all(line.fullmatch(text) for text in lines), lines[-3:]


# whatever is sent

CONTENT = st.sampled_from(['image/png', 'multipart/form-data; boundary=xXx', 'multipart/form-data',
                           'application/x-www-form-urlencoded', '\t'])


@settings(max_examples=examples(25), deadline=None)
@given(data=st.data())
def test_whatever_is_sent_gets_one_sentence(server, data):
    "Forms that are cut, doubled and changed: an answer or one sentence, never a mistake of the server"
    body = bytearray(form([('a.png', data.draw(st.sampled_from([RADIOGRAPH, NOISE, b''])))], [('heat_map', 'on')])[0])
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(body)))
        body[at:at + data.draw(st.integers(0, 60))] = data.draw(st.binary(max_size=30))
    path, kind = data.draw(st.sampled_from(['/api/predict', '/answers', '/', '/login'])), data.draw(CONTENT)
    status, headers, text = server.ask('POST', path, bytes(body), Content_Type=kind)
    assert status in (200, 303, 400, 401, 413, 422, 429), (status, text[:300])
    assert b'Traceback' not in text
    if path == '/api/predict' and status != 200: assert len(json.loads(text).get('error') or json.loads(text)['answers']) > 0


@settings(max_examples=examples(25), deadline=None)
@given(data=st.binary(max_size=300),
       line=st.sampled_from([b'', b'GET / HTTP/1.1\r\n', b'POST /api/predict HTTP/1.1\r\nHost: localhost\r\n']))
def test_whatever_bytes_come_the_server_goes_on(server, data, line):
    with socket.create_connection(server.host.split(':'), timeout=10) as s:
        s.sendall(line + data + b'\r\n\r\n')
        s.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError): assert b' 500 ' not in s.recv(200)
    assert server.ask('GET', '/health')[0] == 200


# the command line

def test_the_command_serves_until_it_is_interrupted(bundle):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    code = 'from covid_cxr.cli import main; raise SystemExit(main())'
    p = subprocess.Popen([sys.executable, '-c', code, 'serve', str(bundle), '--port', str(port), '--token', TOKEN], cwd=ROOT,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        first, token = p.stdout.readline(), p.stdout.readline()
        assert f'http://127.0.0.1:{port}/' in first and TOKEN in token
        end = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError):
                connection = http.client.HTTPConnection('127.0.0.1', port, timeout=5)
                connection.request('GET', '/api/model', headers={'Authorization': f'Bearer {TOKEN}'})
                assert connection.getresponse().status == 200
                connection.close()
                break
            assert time.monotonic() < end
            time.sleep(.05)
        taken = here('serve', bundle, '--port', port)
        assert taken.returncode == 1 and 'cannot listen on 127.0.0.1' in taken.stderr
        p.send_signal(signal.SIGINT)
        out, err = p.communicate(timeout=20)
        assert 'Traceback' not in err and 'was stopped' in out, err
        assert ' 200 /api/model - ' in err and p.returncode == 0
    finally:
        p.kill()
        p.wait()


def test_what_cannot_be_served_is_one_sentence(bundle, tmp_path):
    from covid_cxr.bundle import export_bundle
    plain = export_bundle(bundle, tmp_path / 'plain', format='safetensors')
    for args, said in (([plain], 'has no ONNX file'), ([tmp_path], 'no bundle in'), ([bundle, '--port', 70000], 'not from 0 to 65535'),
                       ([bundle, '--token', 'short'], '16 or more'), ([bundle, '--per-minute', 0], 'above zero')):
        p = here('serve', *args)
        assert p.returncode == 1 and said in p.stderr and p.stderr.count('\n') == 1, p.stderr


def test_a_bundle_that_was_changed_says_so_on_every_page(bundle, tmp_path):
    changed = shutil.copytree(bundle, tmp_path / 'changed')
    text = (changed / 'bundle.json').read_text()
    (changed / 'bundle.json').write_text(text.replace('"threshold": 0.4', '"threshold": 0.1'))
    with running(changed) as s: page = s.ask('GET', '/')[2].decode()
    assert 'ALTERED: bundle.json in this bundle' in page and str(tmp_path) not in page
