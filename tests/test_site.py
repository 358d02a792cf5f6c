"""The site's own parts: the figure that a reader moves computes what the package computes, in node and in a browser;
with scripts off it is a picture."""
import json, os, re, shutil, socket, subprocess, time, urllib.request
from pathlib import Path

import pytest, torch
from balms.core import log_prior
from balms.theory import GaussianClasses

root = Path(__file__).resolve().parent.parent
figure = root/'nbs/images/label_shift.html'
world = GaussianClasses([[-1.5], [0.], [1.5]])
CASES = [
    ([1000, 100, 10], [100, 100, 100], 1),
    ([1000, 100, 10], [100, 100, 100], 0),
    ([1000, 100, 10], [10, 100, 1000], 1),
    ([5000, 50, 50], [1, 1, 9], 0.5),
    ([7, 7, 7], [3, 1, 2], 1.5),
    ([1, 10000, 3], [10000, 1, 1], 2),
]

def answers(n, q, tau, x):
    "Posteriors of plain softmax, Balanced Softmax and the truth at points x, (3, N, 3)"
    n, x = torch.tensor(n, dtype=torch.double), torch.as_tensor(x, dtype=torch.double)[:, None]
    trained = world.posterior(x, n).log()                              # logits + shift, whatever the shift was
    return torch.stack([trained.softmax(1), (trained - log_prior(n, tau, q)).softmax(1), world.posterior(x, q)])

def errors(n, q, tau):
    "Share of the test set that each of the three predicts wrong"
    x = torch.linspace(-12, 12, 240001, dtype=torch.double)
    joint = world.log_lik(x[:, None]).exp()*torch.tensor(q)/sum(q)
    return [1 - (joint.gather(1, p.argmax(1, keepdim=True)).sum()*(x[1] - x[0])).item() for p in answers(n, q, tau, x)]

def test_figure_is_self_contained():
    text = figure.read_text()
    assert not re.search(r'https?:|//[a-z]+\.|@import|fetch\(|XMLHttpRequest|import\(|<link|<script[^>]+src', text)
    assert (
        re.findall(r'(?:src|href)="([^"]*)"', text) == ['label_shift.png']
        and (figure.parent / 'label_shift.png').exists()
    )
    assert re.search(r'<noscript>.*<img[^>]+alt="[^"]{80,}".*</noscript>', text, re.S)

def in_node(code):
    "Value of the JavaScript expression `code`, after the figure's mathematics"
    if not shutil.which('node'): pytest.skip('node is not installed')
    maths = re.search(r'<script id="maths">(.*?)</script>', figure.read_text(), re.S)[1]
    out = subprocess.run(
        ['node', '-e', f'{maths}\nconsole.log(JSON.stringify({code}))'], capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout)

def test_figure_computes_what_the_package_computes():
    xs = [-5.5, -2.2, -.75, 0., .3, 1.1, 4., 5.5]
    got = in_node(
        f'{json.dumps(CASES)}.map(([n, q, tau]) => {json.dumps(xs)}.map(x => [plain(x, n), balanced(x, n, tau, q),'
        ' truth(x, q)]))'
    )
    for (n, q, tau), g in zip(CASES, got):
        assert (torch.tensor(g, dtype=torch.double).transpose(0, 1) - answers(n, q, tau, xs)).abs().max() < 1e-6, (
            n,
            q,
            tau,
        )
    got = in_node(f'{json.dumps(CASES)}.map(([n, q, tau]) => logPrior(n, tau, q))')
    for (n, q, tau), g in zip(CASES, got): assert (torch.tensor(g) - log_prior(n, tau, q)).abs().max() < 1e-5

def test_figure_boundaries_and_errors():
    x = torch.linspace(-5.5, 5.5, 22001, dtype=torch.double)
    got = in_node(
        f'{json.dumps(CASES)}.map(([n, q, tau]) => [x => plain(x, n), x => balanced(x, n, tau, q), x => truth(x,'
        ' q)].map(f => [boundaries(f), error(f, q)]))'
    )
    for case, sides in zip(CASES, got):
        for p, (cut, err), want in zip(answers(*case, x), sides, errors(*case)):
            best = p.argmax(1); at = (best.diff() != 0).nonzero()[:, 0]
            assert [b[1:] for b in cut] == [[best[i].item(), best[i + 1].item()] for i in at], case
            assert all(x[i] - 1e-4 <= b[0] <= x[i + 1] + 1e-4 for i, b in zip(at, cut)), case
            assert abs(err - want) < 5e-5, case

# --- citations

# "Kang et al. 2020", "Kang et al. (2020", "DeVries and Taylor 2017", "Kakade, Sridharan and Tewari (2008)"
_cited = re.compile(
    r"((?:Van |van der )?[A-Z][\w-]+(?:(?:, [A-Z][\w-]+)* and [A-Z][\w-]+| et al\.)) \(?((?:19|20)\d\d)\b"
)

def sources(path): return [''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells']]

def test_every_citation_is_in_the_bibliography():
    entries = re.findall(
        r'^- \[\]\{#([\w-]+)\}\*\*(.+?)\.\*\*', '\n'.join(sources(root / 'nbs/bibliography.ipynb')), re.M
    )
    assert len(entries) > 30 and len({k for k, _ in entries}) == len(entries)
    cited = {
        (f'{m[1]} {m[2]}', p.name)
        for p in sorted((root / 'nbs').glob('[!_.]*.ipynb'))
        for s in sources(p)
        for m in _cited.finditer(s)
    }
    assert ('Kang et al. 2020', '11_decoupled.ipynb') in cited
    missing = {c for c in cited if not any(c[0] == e or c[0].endswith(f', {e}') for _, e in entries)}
    assert not missing, f'cited, but not in nbs/bibliography.ipynb: {sorted(missing)}'

def test_glossary():
    "Every term has an anchor and says something; no term twice"
    terms = re.findall(r'^\[\]\{#([\w-]+)\}\*\*(.+?)\.\*\* (.+)$', '\n'.join(sources(root/'nbs/glossary.ipynb')), re.M)
    assert (
        len(terms) > 30
        and len({k for k, *_ in terms}) == len({t for _, t, _ in terms}) == len(terms)
        and all(len(d) > 30 for *_, d in terms)
    )

# --- the front door

def test_one_version():
    "settings.ini, the package, the changelog and the citation file name one version"
    import balms
    from configparser import ConfigParser
    ini = ConfigParser(delimiters=['=']); ini.read(root/'settings.ini')
    version = ini['DEFAULT']['version']
    assert balms.__version__ == version
    assert re.search(r'^## (\S+)', (root/'CHANGELOG.md').read_text(), re.M)[1] == version
    assert yaml_of('CITATION.cff')['version'] == version

def yaml_of(path):
    return pytest.importorskip('yaml', reason='PyYAML is part of the developer environment').safe_load(
        (root / path).read_text(encoding='utf-8')
    )

def test_citation_file():
    cff = yaml_of('CITATION.cff')
    assert (
        cff['cff-version'] == '1.2.0'
        and cff['type'] == 'software'
        and cff['title']
        and cff['message']
        and cff['authors']
        and cff['license'] == 'Apache-2.0'
    )
    paper, = cff['references']
    assert paper['type'] == 'conference-paper' and len(paper['authors']) == 7 and '2007.10740' in paper['url']

@pytest.mark.parametrize('name', ['bug', 'question', 'method'])
def test_issue_template(name):
    form = yaml_of(f'.github/ISSUE_TEMPLATE/{name}.yml')
    assert form['name'] and form['description'] and form['labels']
    asked = [o for o in form['body'] if o['type'] != 'markdown']
    assert asked and all(o['attributes']['label'] and o['type'] in ('textarea', 'input', 'dropdown') for o in asked)
    assert len({o['id'] for o in asked}) == len(asked) and any(o.get('validations', {}).get('required') for o in asked)

def test_workflows_are_pinned():
    for name in ('test', 'deploy'):
        job, = yaml_of(f'.github/workflows/{name}.yaml')['jobs'].values()
        for step in job['steps']:
            assert 'run' in step or re.search(r'@v\d|@[0-9a-f]{40}$', step['uses']), step
            if 'setup-python' in step.get('uses', ''): assert step['with']['python-version']
            if 'quarto' in step.get('uses', ''): assert re.fullmatch(r'\d+\.\d+\.\d+', step['with']['version'])
    # what is published comes from a known system
    assert yaml_of('.github/workflows/deploy.yaml')['jobs']['deploy']['runs-on'] != 'ubuntu-latest'

# --- in a browser, by the WebDriver protocol

class Browser:
    "A browser without a window, for the with-statement; `scripts=False` turns scripts off"
    def __init__(self, scripts=True, size=(900, 800)): self.scripts, self.size = scripts, size
    def __enter__(self):
        driver = shutil.which('chromedriver')
        binary = os.environ.get('BALMS_BROWSER') or next(
            filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None
        )
        if not driver or not binary:
            pytest.skip('chromedriver and Chromium are not installed: apt-get install chromium chromium-driver')
        with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
        self.url, self.proc = f'http://127.0.0.1:{port}', subprocess.Popen(
            [driver, f'--port={port}'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        args = [
            '--headless=new',
            '--no-sandbox',
            '--disable-gpu',
            '--disable-dev-shm-usage',
            '--window-size={},{}'.format(*self.size),
            '--hide-scrollbars',
        ]
        prefs = {} if self.scripts else {'profile.managed_default_content_settings.javascript': 2}
        caps = {
            'browserName': 'chrome',
            'goog:loggingPrefs': {'browser': 'ALL'},
            'goog:chromeOptions': dict(binary=binary, args=args, prefs=prefs),
        }
        for _ in range(150):
            try:
                if self.call('GET', '/status')['ready']: break
            except OSError: time.sleep(.2)
        try: self.url += '/session/' + self.call('POST', '/session', capabilities=dict(alwaysMatch=caps))['sessionId']
        except Exception: self.proc.kill(); raise
        return self
    def __exit__(self, *_):
        try: self.call('DELETE', '')
        finally: self.proc.terminate(); self.proc.wait(30)
    def call(self, method, path, **body):
        req = urllib.request.Request(
            self.url + path,
            json.dumps(body).encode() if method == 'POST' else None,
            {'Content-Type': 'application/json'},
            method=method,
        )
        return json.load(urllib.request.urlopen(req, timeout=60))['value']
    def open(self, url): self.call('POST', '/url', url=url)
    def all(self, css):
        return [next(iter(e.values())) for e in self.call('POST', '/elements', using='css selector', value=css)]
    def text(self, css): return self.call('GET', f'/element/{self.all(css)[0]}/text')
    def click(self, css): self.call('POST', f'/element/{self.all(css)[0]}/click')
    def keys(self, css, text): self.call('POST', f'/element/{self.all(css)[0]}/value', text=text)
    def js(self, code): return self.call('POST', '/execute/sync', script=code, args=[])
    def shown(self):
        return [float(self.text(f'#err-{k}').removesuffix(' %')) / 100 for k in ('plain', 'balanced', 'best')]

HOME, END, RIGHT, TAB = '\ue011', '\ue010', '\ue014', '\ue004'       # WebDriver's names of keys

def test_figure_in_a_browser():
    close = lambda got, case: all(abs(a - b) < 6e-4 for a, b in zip(got, errors(*case)))
    n, q = CASES[0][:2]
    with Browser() as b:
        b.open(figure.as_uri())
        assert close(b.shown(), (n, q, 1))
        b.keys('#tau', HOME)                                         # the keyboard moves it
        assert b.text('#tau-out') == '0.00' and close(b.shown(), (n, q, 0)) and b.shown()[0] == b.shown()[1]
        curves = lambda side: b.js(
            f'return [...document.querySelectorAll("#{side} path[fill=none][stroke-width=\\"2\\"]")].map(p =>'
            ' p.getAttribute("d"))'
        )
        assert len(curves('plain')) == 3 and curves('plain') == curves('balanced')     # tau = 0 is plain softmax
        b.keys('#tau', END); assert b.text('#tau-out') == '2.00' and close(b.shown(), (n, q, 2))
        b.click('#set-start'); assert b.text('#tau-out') == '1.00'
        b.click('#set-same'); assert close(b.shown(), (n, n, 1)) and b.shown()[0] == b.shown()[2]
        b.click('#set-turned'); assert close(b.shown(), (n, n[::-1], 1)) and b.text('#q2-out') == '1,000'
        b.click('#set-start'); b.keys('#n2', END + RIGHT)
        assert b.text('#n2-out') == '10,000' and close(b.shown(), ([1000, 100, 10000], q, 1))
        for e in b.all('#controls input'):
            assert re.match(
                'Training|Test|Strength', b.call('GET', f'/element/{e}/computedlabel')
            ), 'a slider without a name'
        for side in ('plain', 'balanced'):
            assert 'prediction changes' in b.js(f'return document.getElementById("{side}-desc").textContent')
        order = []                                                   # Tab reaches all of them
        b.js('document.body.focus()')
        for _ in range(13):
            b.call(
                'POST',
                '/actions',
                actions=[
                    dict(type='key', id='k', actions=[dict(type='keyDown', value=TAB), dict(type='keyUp', value=TAB)])
                ],
            )
            order.append(b.js('return document.activeElement.id'))
        assert {
            'n0',
            'n1',
            'n2',
            'q0',
            'q1',
            'q2',
            'tau',
            'set-balanced',
            'set-same',
            'set-turned',
            'set-start',
        } <= set(order), order
        n2, q2, tau = CASES[3]
        b.open('about:blank')
        b.open(figure.as_uri() + '#n=5000,50,50&q=1,1,9&tau=.5')
        assert close(b.shown(), CASES[3])
        b.open('about:blank')
        b.open(figure.as_uri() + '#n=0,x,50&tau=99')
        assert close(b.shown(), (n, q, 1)) or b.text('#n2-out') == '50'
        assert not b.call('POST', '/se/log', type='browser')          # no error, no warning

def test_figure_in_a_page(tmp_path):
    """In a page of its own site the frame becomes as high as the figure, on a phone too, and nothing is wider than the
    page"""
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
    from threading import Thread
    shutil.copy(figure, tmp_path)
    (tmp_path / 'index.html').write_text(
        '<body style="margin: 0"><iframe src="label_shift.html" style="width: 100%; height: 700px; border: 0"></iframe>'
    )
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_): pass
    with ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=tmp_path)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        heights = []
        try:
            for width in (500, 1000):
                with Browser(size=(width, 900)) as b:
                    b.open(f'http://127.0.0.1:{server.server_port}/index.html')
                    inside = 'document.querySelector("iframe").contentDocument.documentElement'
                    for _ in range(50):
                        if b.js('return document.querySelector("iframe").style.height') != '700px': break
                        time.sleep(.1)
                    heights.append(int(b.js('return document.querySelector("iframe").style.height').removesuffix('px')))
                    assert b.js(
                        f'return {inside}.scrollHeight <= {inside}.clientHeight + 1 && {inside}.scrollWidth <='
                        f' {inside}.clientWidth'
                    )
        finally: server.shutdown()
    assert heights[0] > 900 > heights[1] > 500 and heights[1] != 700, heights

def test_figure_without_scripts():
    with Browser(scripts=False) as b:
        b.open(figure.as_uri())
        displayed = lambda css: b.call('GET', f'/element/{b.all(css)[0]}/displayed')
        assert displayed('noscript img') and not displayed('#live')
        size = b.call('GET', f'/element/{b.all("noscript img")[0]}/rect')
        assert size['width'] > 400 and size['height'] > 200
