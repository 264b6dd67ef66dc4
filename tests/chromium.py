"""A headless Chromium, driven through its two pipes: pages are opened, files chosen, keys pressed and pictures taken as a person would."""
import base64, contextlib, json, os, queue, subprocess, threading, time
from test_pages import BROWSER

FLAGS = ('--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
         '--disable-component-update', '--disable-sync', '--hide-scrollbars', '--disable-dev-shm-usage', '--remote-debugging-pipe')
KEYS = dict(Tab=9, Enter=13, Space=32)


class Page:
    "One tab of a browser"
    def __init__(self, profile):
        read_ours, write_theirs = os.pipe()
        read_theirs, write_ours = os.pipe()
        def give():
            saved = [os.dup(read_theirs), os.dup(write_theirs)]
            for fd, to in zip(saved, (3, 4)): os.dup2(fd, to)
        self.process = subprocess.Popen([BROWSER, *FLAGS, f'--user-data-dir={profile}'], stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL, preexec_fn=give, close_fds=False)
        for fd in (read_theirs, write_theirs): os.close(fd)
        self.out, self.inn = os.fdopen(write_ours, 'wb'), os.fdopen(read_ours, 'rb')
        self.n, self.session, self.events, self.replies = 0, None, [], queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        target = self.do('Target.createTarget', url='about:blank')['targetId']
        self.session = self.do('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        for domain in ('Page', 'Runtime', 'Network', 'Log', 'DOM'): self.do(f'{domain}.enable')

    def _listen(self):
        rest = b''
        with contextlib.suppress(OSError, ValueError):
            while chunk := self.inn.read1(1 << 20):
                *whole, rest = (rest + chunk).split(b'\0')
                for text in whole:
                    message = json.loads(text)
                    (self.replies.put if 'id' in message else self.events.append)(message)

    def do(self, method, **params):
        "One command of the DevTools protocol"
        self.n += 1
        session = dict(sessionId=self.session) if self.session else {}
        self.out.write(json.dumps(dict(id=self.n, method=method, params=params, **session)).encode() + b'\0')
        self.out.flush()
        reply = self.replies.get(timeout=60)
        while reply['id'] != self.n: reply = self.replies.get(timeout=60)
        assert 'error' not in reply, (method, reply['error'])
        return reply['result']

    def js(self, code):
        "The value of an expression in the page"
        got = self.do('Runtime.evaluate', expression=code, awaitPromise=True, returnByValue=True)
        assert 'exceptionDetails' not in got, got['exceptionDetails']
        return got['result'].get('value')

    def wait(self, code, seconds=30):
        "Until an expression is true"
        end = time.monotonic() + seconds
        while not self.js(code):
            assert time.monotonic() < end, f'{code} did not become true: {self.js("document.body.innerText")[:2000]}'
            time.sleep(.05)

    def open(self, url):
        before = len(self.named('Page.loadEventFired'))
        self.do('Page.navigate', url=url)
        self.loaded(before)

    def loaded(self, before, seconds=30):
        end = time.monotonic() + seconds
        while len(self.named('Page.loadEventFired')) <= before:
            assert time.monotonic() < end, 'the page did not load'
            time.sleep(.02)

    def named(self, method): return [e['params'] for e in list(self.events) if e['method'] == method]

    def choose(self, selector, files):
        "Choose files in an input"
        root = self.do('DOM.getDocument')['root']['nodeId']
        node = self.do('DOM.querySelector', nodeId=root, selector=selector)['nodeId']
        self.do('DOM.setFileInputFiles', nodeId=node, files=[str(f) for f in files])

    def drop(self, selector, files):
        "Drag files over an element and let them fall"
        box = self.js(f'(() => {{ const r = document.querySelector({selector!r}).getBoundingClientRect(); '
                      'return [r.x + r.width / 2, r.y + r.height / 2] })()')
        data = dict(items=[], files=[str(f) for f in files], dragOperationsMask=1)
        for kind in ('dragEnter', 'dragOver', 'drop'):
            self.do('Input.dispatchDragEvent', type=kind, x=box[0], y=box[1], data=data)

    def press(self, key, text=''):
        name = ' ' if key == 'Space' else key
        for kind in ('keyDown', 'keyUp'):
            said = dict(text=text) if text and kind == 'keyDown' else {}
            self.do('Input.dispatchKeyEvent', type=kind, key=name, code=key, windowsVirtualKeyCode=KEYS[key], **said)

    def screen(self, width, height=900, dark=False, still=True):
        "A window of this width, in the light or in the dark"
        self.do('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
        features = [dict(name='prefers-color-scheme', value='dark' if dark else 'light'),
                    dict(name='prefers-reduced-motion', value='reduce' if still else 'no-preference')]
        self.do('Emulation.setEmulatedMedia', features=features)

    def picture(self, file):
        "The whole page as a PNG file"
        data = self.do('Page.captureScreenshot', captureBeyondViewport=True)['data']
        file.write_bytes(base64.b64decode(data))

    def overflow(self):
        "Pixels by which the page is wider than the window"
        return self.js('document.documentElement.scrollWidth - window.innerWidth')

    def complaints(self):
        "What the browser complained of: errors of scripts, of the network, and of the content security policy"
        logged = [e['entry'] for e in self.named('Log.entryAdded') if e['entry']['level'] == 'error']
        return [f"{e['source']}: {e['text']}" for e in logged] + [str(e) for e in self.named('Runtime.exceptionThrown')]

    def asked_for(self): return [e['request']['url'] for e in self.named('Network.requestWillBeSent')]

    def close(self):
        with contextlib.suppress(OSError, AssertionError, queue.Empty): self.out.close()
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def new_page(profile):
    page = Page(profile)
    try: yield page
    finally: page.close()
