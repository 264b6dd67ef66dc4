"""A model is shared and fetched over a real server on loopback that speaks the needed part of the Hub's HTTP API, honest and hostile."""
import base64, hashlib, json, shutil, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import numpy as np, pytest
from conftest import here, python
from covid_cxr.bundle import DESCRIPTION, MANIFEST, ONNX, WEIGHTS, find_bundle, write_manifest
from covid_cxr.core import BundleError, RunError, write_json
from covid_cxr.model import hub as model_hub
from covid_cxr.model.hub import HubAddress, fetch_folder, parse_hub_address
from covid_cxr.predict import load_predictor

REPO, TOKEN = 'anna/tiny', 'hf_secret_token'
NAMES = (DESCRIPTION, WEIGHTS, ONNX)


class Hub(ThreadingHTTPServer):
    "Repositories in memory: commits of files, large ones by their SHA-256 as LFS objects"
    daemon_threads = True

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.repos, self.lfs, self.seen, self.answers = {}, {}, [], {}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self): return f'http://127.0.0.1:{self.server_port}'

    def commit(self, repo, files, branch='main'):
        "A commit on a branch; its id"
        sha = hashlib.sha1(json.dumps([sorted(files), len(self.repos), branch, len(self.seen)]).encode()).hexdigest()
        r = self.repos.setdefault(repo, dict(private=False, branches={}, commits={}))
        r['commits'][sha] = {**r['commits'].get(r['branches'].get(branch), {}), **files}
        r['branches'][branch] = sha
        return sha


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def log_message(self, *args): pass

    def body(self): return self.rfile.read(int(self.headers.get('Content-Length') or 0))

    def reply(self, data=b'', status=200, **headers):
        data = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        said = {'Content-Length': len(data), **{k.replace('_', '-'): v for k, v in headers.items()}}
        for k, v in said.items(): self.send_header(k, str(v))
        self.end_headers()
        if self.command != 'HEAD': self.wfile.write(data)

    def handle_one(self):
        s, path, body = self.server, self.path.split('?')[0], self.body()
        s.seen.append((self.command, path, self.headers.get('Authorization')))
        if answer := s.answers.get(path.rpartition('/')[2]): return answer(self)
        writes = self.command in ('POST', 'PUT') and not path.startswith('/lfs/') and path != '/api/validate-yaml'
        if writes and self.headers.get('Authorization') != f'Bearer {TOKEN}': return self.reply(dict(error='log in'), 401)
        parts = path.strip('/').split('/')
        repo = '/'.join(parts[2:4] if parts[0] == 'api' else parts[:2])
        if path == '/api/repos/create':
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get('organization') else f"anna/{asked['name']}"
            private = bool(asked.get('private')) or asked.get('visibility') == 'private'
            if name in s.repos: return self.reply(dict(error='exists', url=f'{s.url}/{name}'), 409)
            s.repos[name] = dict(private=private, branches={}, commits={})
            s.commit(name, {'.gitattributes': b''})
            return self.reply(dict(url=f'{s.url}/{name}'))
        if path == '/api/validate-yaml': return self.reply(dict(errors=[], warnings=[]))
        if parts[0] == 'lfs': return self.lfs(parts[1], body)
        if path.endswith('.git/info/lfs/objects/batch'):
            objects = [dict(oid=o['oid'], size=o['size'], actions=dict(upload=dict(href=f"{s.url}/lfs/{o['oid']}")))
                       for o in json.loads(body)['objects']]
            return self.reply(dict(transfer='basic', objects=objects))
        if repo not in s.repos: return self.reply(dict(error='no such repository'), 404, X_Error_Code='RepoNotFound')
        return self.of_repo(s.repos[repo], repo, parts, body)

    def lfs(self, oid, body):
        if self.command == 'GET': return self.reply(self.server.lfs[oid])
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.lfs[oid] = body
        self.reply()

    def of_repo(self, r, repo, parts, body):
        s, verb = self.server, parts[4] if len(parts) > 4 else ''
        if parts[0] != 'api':                                        # anna/tiny/resolve/<commit>/<name>
            found = r['commits'].get(r['branches'].get(parts[3], parts[3]), {}).get(parts[4])
            if found is None: return self.reply(b'', 404, X_Error_Code='EntryNotFound')
            if isinstance(found, str): return self.reply(b'', 302, Location=f'{s.url}/lfs/{found}')
            return self.reply(found)
        if verb == 'preupload':
            files = [dict(path=f['path'], uploadMode='lfs' if f['size'] > 20000 else 'regular', shouldIgnore=False)
                     for f in json.loads(body)['files']]
            return self.reply(dict(files=files))
        if verb == 'branch':
            if parts[5] in r['branches']: return self.reply(dict(error='exists'), 409)
            r['branches'][parts[5]] = r['branches']['main']
            return self.reply({})
        if verb == 'commit':
            files = {}
            for line in map(json.loads, body.splitlines()):
                v = line['value']
                if line['key'] == 'file': files[v['path']] = base64.b64decode(v['content'])
                if line['key'] == 'lfsFile': files[v['path']] = v['oid']
            sha = s.commit(repo, files, parts[5])
            return self.reply(dict(commitUrl=f'{s.url}/{repo}/commit/{sha}', commitOid=sha, success=True))
        revision = parts[5] if verb == 'revision' else 'main'
        sha = r['branches'].get(revision, revision)
        if sha not in r['commits']: return self.reply(dict(error='no such revision'), 404, X_Error_Code='RevisionNotFound')
        self.reply(dict(id=repo, modelId=repo, sha=sha, private=r['private'], tags=[], downloads=0, likes=0,
                        siblings=[dict(rfilename=n) for n in r['commits'][sha]]))

    do_GET = do_HEAD = do_POST = do_PUT = handle_one


@pytest.fixture
def server(monkeypatch, tmp_path):
    import huggingface_hub.constants as c
    s = Hub()
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    for name, value in dict(ENDPOINT=s.url, HF_HOME=str(tmp_path / 'home'), HF_HUB_OFFLINE=False, HF_HUB_DISABLE_XET=True,
                            HUGGINGFACE_CO_URL_TEMPLATE=s.url + '/{repo_id}/resolve/{revision}/{filename}').items():
        monkeypatch.setattr(c, name, value)
    yield s
    s.shutdown()


def files_of(server, address):
    return {n: server.lfs[v] if isinstance(v, str) else v for n, v in server.repos[address.repo]['commits'][address.revision].items()}


def with_licences(bundle, folder, licences):
    "The bundle with other licences on record, and a pickle and an image beside its files"
    shutil.copytree(bundle, folder)
    b = json.loads((folder / DESCRIPTION).read_text())
    write_json(folder / DESCRIPTION, {**b, 'provenance': {**b['provenance'], 'licences': licences}})
    (folder / 'export.pkl').write_bytes(b'a pickle')
    (folder / 'patient.png').write_bytes(b'an image')
    write_manifest(folder, [DESCRIPTION, WEIGHTS, ONNX])
    return folder


def test_a_model_is_pushed_and_opened_with_equal_answers(server, tiny_bundle, tmp_path):
    from huggingface_hub import ModelCard
    folder = with_licences(tiny_bundle, tmp_path / 'model', {'CC BY 4.0': 8})
    p = here('push', folder, REPO)
    assert p.returncode == 0, p.stderr
    address = parse_hub_address(p.stdout.split()[1])
    shared = files_of(server, address)
    assert set(shared) == {'.gitattributes', *NAMES, MANIFEST, 'README.md'}                   # no pickle, no image
    assert address.pinned and any(isinstance(v, str) for v in server.repos[REPO]['commits'][address.revision].values())
    card = ModelCard(shared['README.md'].decode())
    assert (card.data.license, card.data.library_name, card.data.datasets) == ('cc-by-4.0', 'covid_cxr', ['x'])
    assert card.data.eval_results[0].metric_value == .75 and 'not for diagnosis' in card.text
    local, server.seen[:] = load_predictor(tiny_bundle), []
    fetched = load_predictor(str(address))
    x = np.random.default_rng(0).integers(0, 256, (3, 64, 64), np.uint8)
    assert np.array_equal(fetched.probabilities(x), local.probabilities(x)) and fetched.integrity.status == 'verified'
    asked = {path.rpartition('/')[2] for _, path, _ in server.seen if '/resolve/' in path}
    assert asked == {MANIFEST, *NAMES}
    server.seen.clear()
    assert find_bundle(str(address)) == find_bundle(str(address)) and not server.seen         # kept, and not asked for again


def test_a_branch_and_a_private_repository(server, tiny_bundle):
    from covid_cxr.deploy.hub import push_model
    address = push_model(tiny_bundle, 'anna/mine', private=True, revision='second')
    assert server.repos['anna/mine']['private'] and server.repos['anna/mine']['branches']['second'] == address.revision
    server.repos['anna/mine']['private'] = False
    with pytest.raises(RunError, match='exists and is public'): push_model(tiny_bundle, 'anna/mine', private=True)


def test_licences_that_do_not_allow_it_keep_a_model_here(server, tiny_bundle, tmp_path):
    from covid_cxr.deploy.hub import push_model
    for i, licences in enumerate(({'CC BY-NC-ND 4.0': 2}, {'not stated': 3, 'CC0 1.0': 9}, {'a licence of our own': 1}, {})):
        folder = with_licences(tiny_bundle, tmp_path / str(i), licences)
        p = here('push', folder, REPO)
        assert p.returncode == 1 and 'this model is not published' in p.stderr and not server.seen
    address = push_model(folder, REPO, rights='Consent of the hospital of 3 May.')
    assert 'Who published this model says: "Consent of the hospital of 3 May."' in files_of(server, address)['README.md'].decode()
    private = push_model(folder, 'anna/private', private=True)
    assert '**Not for publication:**' in files_of(server, private)['README.md'].decode()


def test_without_a_token_or_a_name_nothing_is_pushed(server, tiny_bundle, monkeypatch):
    from covid_cxr.deploy.hub import push_model
    monkeypatch.setenv('HF_TOKEN', 'hf_wrong')
    with pytest.raises(RunError, match='could not be pushed') as e: push_model(tiny_bundle, REPO)
    assert 'hf_wrong' not in str(e.value) and '\n' not in str(e.value) and not server.repos
    for name in ('anna', '../x', 'anna/tiny@main', 'a/b/c'):
        with pytest.raises((BundleError, RunError)): push_model(tiny_bundle, name)


def honest(server, tiny_bundle, **changed):
    "An address of the files of a bundle, some of them changed behind the back of the manifest"
    return HubAddress(REPO, server.commit(REPO, {**{f.name: f.read_bytes() for f in tiny_bundle.iterdir()}, **changed}))


def manifest(**files):
    return json.dumps(dict(files={n: dict(size=len(v), sha256=hashlib.sha256(v).hexdigest()) for n, v in files.items()})).encode()


def refused(server, address, why):
    "One sentence, and nothing is kept"
    from pathlib import Path
    import huggingface_hub.constants as c
    with pytest.raises(BundleError, match=why) as e: find_bundle(str(address))
    assert '\n' not in str(e.value) and TOKEN not in str(e.value)
    assert [f for f in Path(c.HF_HOME).rglob('*') if f.is_file()] == []


def test_an_address_without_a_commit_is_refused_with_the_one_to_write(server, tiny_bundle):
    address = honest(server, tiny_bundle)
    for where in ('hf://anna/tiny', 'hf://anna/tiny@main'):
        with pytest.raises(BundleError, match=f'today it is {address}: write that'): load_predictor(where)
    for where in ('hf://anna', 'hf://anna/tiny@', 'hf://../tiny@' + 'a' * 40, 'hf://anna/tiny@a b'):
        with pytest.raises(BundleError, match='is no address of a model'): load_predictor(where)
    with pytest.raises(BundleError, match='cannot be asked for'): load_predictor('hf://anna/none')
    with pytest.raises(BundleError, match='it is not there'): load_predictor(f'hf://anna/tiny@{"0" * 40}')


def test_what_is_not_the_file_of_the_manifest_is_not_kept(server, tiny_bundle):
    weights = (tiny_bundle / WEIGHTS).read_bytes()
    refused(server, honest(server, tiny_bundle, **{WEIGHTS: weights[:-1] + bytes([weights[-1] ^ 1])}), 'SHA-256 differs')
    refused(server, honest(server, tiny_bundle, **{WEIGHTS: weights[:-1]}), 'size or SHA-256 differs')
    refused(server, honest(server, tiny_bundle, **{WEIGHTS: weights + b'x'}), 'larger than the')
    for name in ('../evil.py', '/tmp/evil', 'export.pkl', 'a/b', '', 'bundle.json\0'):
        refused(server, honest(server, tiny_bundle, **{MANIFEST: manifest(**{name: b'x'})}), 'which no bundle has')
    for size in (-1, 1 << 60, '9', 1.5, True, None):
        text = json.dumps(dict(files={WEIGHTS: dict(size=size, sha256='0' * 64)})).encode()
        refused(server, honest(server, tiny_bundle, **{MANIFEST: text}), 'impossible size')
    for text in (b'<html>', b'[]', b'{"files": 3}', b'{"files": {"bundle.json": 1}}', b'[' * 5000):
        refused(server, honest(server, tiny_bundle, **{MANIFEST: text}), 'is damaged')


def test_a_giant_file_is_left_at_its_limit(server, tiny_bundle):
    address, sent = honest(server, tiny_bundle), []
    def endless(handler):
        handler.send_response(200)
        handler.end_headers()                                        # no length: it goes on until the other side leaves
        handler.close_connection = True
        try:
            while len(sent) < 4000:
                handler.wfile.write(bytes(1 << 16))
                sent.append(1)
        except OSError: pass
    server.answers[MANIFEST] = endless
    refused(server, address, 'larger than the')
    assert len(sent) < 200                                           # of 64 KiB; the limit is one million bytes
    server.answers[MANIFEST] = lambda handler: handler.reply(b'x', Content_Length=1 << 40)
    refused(server, address, 'larger than the')
    server.answers[MANIFEST] = lambda handler: (handler.reply(b'{}', Content_Length=9), setattr(handler, 'close_connection', True))
    refused(server, address, 'cannot be fetched')                    # it breaks off
    server.answers[MANIFEST] = lambda handler: handler.reply(b'x', 500)
    refused(server, address, 'the Hub answers 500')


def test_a_redirect_leaves_the_hub_for_nowhere_and_takes_no_token(server, tiny_bundle, monkeypatch):
    other = Hub()
    address = honest(server, tiny_bundle)
    other.repos, other.lfs = server.repos, server.lfs
    for to in (f'{other.url}/x', 'http://localhost:1/x', 'http://169.254.169.254/latest', 'file:///etc/passwd',
               'https://huggingface.co.evil.org/x', 'http://huggingface.co/x', '//evil.org/x'):
        server.answers[MANIFEST] = lambda handler, to=to: handler.reply(b'', 302, Location=to)
        refused(server, address, 'is no part of it')
    assert not other.seen
    server.answers[MANIFEST] = lambda handler: handler.reply(b'', 302, Location=handler.path)
    refused(server, address, 'redirects without end')
    assert model_hub._may_go_to('https://cdn-lfs.hf.co/a', server.url) and model_hub._may_go_to('https://huggingface.co/a', server.url)
    server.answers[MANIFEST] = lambda handler: handler.reply(b'', 302, Location=other.url + handler.path)
    monkeypatch.setattr(model_hub, '_may_go_to', lambda url, endpoint: True)                   # as if it were a part of the Hub
    assert fetch_folder(str(address), NAMES).is_dir()
    assert [token for _, _, token in other.seen] == [None] and f'Bearer {TOKEN}' in [token for _, _, token in server.seen]


def test_a_fresh_process_goes_where_the_environment_says(server, tiny_bundle, tmp_path):
    address = honest(server, tiny_bundle)
    env = dict(HF_ENDPOINT=server.url, HF_HOME=str(tmp_path / 'other'), HF_HUB_OFFLINE='0', HF_TOKEN=TOKEN)
    code = ('import sys\nfrom covid_cxr.predict import load_predictor\np = load_predictor(sys.argv[1])\n'
            'assert not {"torch", "fastai", "pandas", "pickle5"} & set(sys.modules)\nprint(p.classes, p.integrity.status)')
    assert python(code, address, env=env).strip() == "['no', 'yes'] verified"
    server.shutdown()
    assert python(code, address, env={**env, 'HF_HUB_OFFLINE': '1'}).strip() == "['no', 'yes'] verified"


def test_a_light_install_is_told_what_to_install(monkeypatch, tiny_bundle):
    from covid_cxr.deploy.hub import push_model
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(BundleError, match=r"pip install 'covid_cxr\[hub\]'"): load_predictor(f'hf://anna/tiny@{"a" * 40}')
    with pytest.raises(RunError, match=r"pip install 'covid_cxr\[hub\]'"): push_model(tiny_bundle, REPO)
