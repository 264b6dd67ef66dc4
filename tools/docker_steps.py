"""The steps of the Dockerfile where docker is missing: in an empty venv and an empty folder, as a user without rights.

    python tools/docker_steps.py                                       the model in the box
    python tools/docker_steps.py --bundle DIR                          another bundle instead of the model in the box

COPY, WORKDIR, ENV and RUN are followed as they stand, with the paths below a temporary folder; useradd is left out, and USER must
not be root. Then CMD is started on a free port, and the command of HEALTHCHECK has to succeed while it runs. Exit code 0: all did."""
import argparse, fnmatch, json, os, re, secrets, shlex, shutil, socket, subprocess, sys, tempfile, time
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent))
from light_install import BUNDLE, ROOT, Venv, copy_checkout

NAME, PORT, WAIT = Path(BUNDLE).name, '8000', 60       # what CMD names; seconds until the server has to be healthy
MEANT = 'FROM', 'ENV', 'WORKDIR', 'COPY', 'RUN', 'USER', 'EXPOSE', 'HEALTHCHECK', 'CMD'


def read_steps(text):
    "[(instruction, rest), ...] of a Dockerfile; an instruction that is not known is refused"
    lines = re.sub(r'\\\n\s*', ' ', text).splitlines()
    steps = [tuple(line.split(None, 1)) for line in lines if line.strip() and not line.startswith('#')]
    unknown = [s[0] for s in steps if s[0] not in MEANT]
    if unknown: raise SystemExit(f'{unknown[0]} is not known; known: {", ".join(MEANT)}.')
    return steps


def check_steps(steps):
    "Refuse a Dockerfile that runs as root, or has no health check, or whose last step is not the server"
    users = [rest for word, rest in steps if word == 'USER']
    if not users or users[-1] in ('root', '0'): raise SystemExit('the server would run as root; name a USER.')
    if 'HEALTHCHECK' not in dict(steps) or steps[-1][0] != 'CMD': raise SystemExit('HEALTHCHECK, and CMD at the end, are missing.')
    words = [word for word, _ in steps]
    if 'COPY' in words[words.index('USER'):] or 'RUN' in words[words.index('USER'):]: raise SystemExit('COPY and RUN stand before USER.')


def ignored(path, patterns):
    "Is a path of the checkout left out by .dockerignore?"
    return any(fnmatch.fnmatch(part, p.removeprefix('**/')) for p in patterns for part in (path if p.startswith('**/') else path[:1]))


def copy(source, target):
    "COPY from the checkout"
    patterns = (ROOT / '.dockerignore').read_text().split()
    if source != '.': return shutil.copy(ROOT / source, target)
    return copy_checkout(target, lambda path: ignored(path.parts, patterns))


class Container:
    "A folder and a venv in the place of a container"
    def __init__(self, folder):
        self.root, self.venv = Path(folder) / 'root', Venv(Path(folder) / 'venv')
        self.env = dict(PATH=f'{self.venv.folder / "bin"}:/usr/bin:/bin', HOME=str(folder), LANG='C.UTF-8',
                        COVID_CXR_TOKEN=secrets.token_hex(16))
        self.env |= {k: v for k, v in os.environ.items() if k.startswith(('PIP_', 'SSL_', 'REQUESTS_')) or k.lower().endswith('_proxy')}
        self.cwd = self.root

    def at(self, text): return re.sub(r'(?<![\w.])/app\b', str(self.root / 'app'), text)

    def follow(self, word, rest):
        "One step"
        if word == 'ENV': self.env.update(pair.split('=', 1) for pair in shlex.split(rest) if not pair.startswith('PIP_'))
        if word == 'WORKDIR': self.cwd = Path(self.at(rest))
        if word == 'WORKDIR': self.cwd.mkdir(parents=True, exist_ok=True)
        if word == 'COPY':
            source, target = rest.split()
            Path(self.at(target)).mkdir(parents=True, exist_ok=True)
            copy(source, Path(self.at(target)))
        if word == 'RUN' and not rest.startswith('useradd'):
            subprocess.run(['/bin/sh', '-ec', self.at(rest)], cwd=self.cwd, env=self.env, check=True)

    def start(self, rest, port, bundle=None, **kw):
        "CMD, or the command of HEALTHCHECK, as a process"
        words = [w.replace(PORT, port) for w in json.loads(rest)]
        if bundle: words = [str(bundle) if w == NAME else w for w in words]
        return subprocess.Popen([self.venv.folder / 'bin' / words[0], *words[1:]], cwd=self.cwd, env=self.env, **kw)


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return str(s.getsockname()[1])


def is_healthy(container, server, check, port):
    "Does HEALTHCHECK succeed before the server ends, or the time?"
    end = time.monotonic() + WAIT
    while server.poll() is None and time.monotonic() < end:
        if container.start(check, port, stderr=subprocess.DEVNULL).wait() == 0: return True
        time.sleep(1)
    return False


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--bundle', type=Path, help='a bundle instead of the model in the box')
    args = p.parse_args()
    steps = read_steps((ROOT / 'Dockerfile').read_text())
    check_steps(steps)
    with tempfile.TemporaryDirectory() as folder:
        container, port = Container(folder), free_port()
        for word, rest in steps:
            print(f'{word} {rest}', flush=True)
            container.follow(word, rest)
        server = container.start(dict(steps)['CMD'], port, args.bundle and args.bundle.resolve())
        try: healthy = is_healthy(container, server, re.search(r'CMD (.*)', dict(steps)['HEALTHCHECK'])[1], port)
        finally:
            server.terminate()
            server.wait(30)
    print('healthy' if healthy else 'the server did not become healthy')
    return int(not healthy)


if __name__ == '__main__': sys.exit(main())
