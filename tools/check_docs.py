"""Check the pages without Quarto: `python tools/check_docs.py [--mathjax DIR]`

The notebooks go through nbdev's processors, as for the site, and then through pandoc; what a reader would find broken
is reported.
"""
import ast, importlib, inspect, json, pkgutil, re, shutil, subprocess, sys, tempfile, warnings
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pypandoc, yaml
from execnb.nbio import read_nb
from fastcore.script import call_parse
from nbdev.config import get_config
from nbdev.doclinks import _nbpath2html

sys.path.insert(0, str(Path(__file__).parent))
from readme import is_shown, option, process, project, root

texts = 'README.md', 'CHANGELOG.md', 'CONTRIBUTING.md'
# A backticked `Name` or `name()` may be defined in any of these, in balms, or in its own notebook.
known_modules = (
    'builtins numpy matplotlib.pyplot torch torch.nn torch.nn.functional torch.optim torch.utils.data torch.distributed'
    ' torchvision torchvision.models fastai.vision.all fastai.callback.all fastcore.test nbdev.showdoc'
).split()
known_classes = (
    'builtins.str builtins.list builtins.dict builtins.set pathlib.Path torch.Tensor torch.nn.Module'
    ' fastai.learner.Learner fastai.data.core.DataLoaders'.split()
)

# --- what is on a page

@cache
def pandoc(text, fmt):
    "Pandoc's syntax tree of `text`."
    out = subprocess.run(
        [pypandoc.get_pandoc_path(), '-f', fmt, '-t', 'json'],
        input=text,
        capture_output=True,
        text=True,
        encoding='utf-8',
        check=True,
    )
    return json.loads(out.stdout)['blocks']

def nodes(tree):
    "Every element of pandoc's syntax tree."
    if isinstance(tree, list):
        for o in tree: yield from nodes(o)
    elif isinstance(tree, dict):
        if 't' in tree: yield tree
        for o in tree.values(): yield from nodes(o)

def flat(tree):
    "Plain text of pandoc elements."
    return ''.join(
        (
            ' '
            if o['t'] in ('Space', 'SoftBreak')
            else o['c'] if o['t'] == 'Str' else o['c'][1] if o['t'] in ('Code', 'Math') else ''
        )
        for o in nodes(tree)
    )

def nb2md(nb):
    "What a processed notebook shows, as markdown; code is left out, it holds nothing to check."
    for c in nb.cells:
        if c.cell_type == 'markdown': yield c.source
        if c.cell_type != 'code' or not is_shown(c): continue
        if (m := re.search(r'^show_doc\(([\w.]+)', c.source, re.M)) and not c.get('outputs'): yield f'### {m[1]}'
        if option(c, 'label'): yield f'[]{{#{option(c, "label")}}}'
        for o in c.get('outputs', []):
            for mime in ('text/markdown', 'text/latex'):
                if mime in o.get('data', {}): yield ''.join(o['data'][mime]); break

def _head(cell): return re.match(r'(\s*#\s*\|.*\n?)*', cell.source)[0]

def figure_alt(cell, i):
    """Alt text of output `i` of a processed cell, or '': the option `fig-alt`, one text for all outputs or, as Quarto
    reads a list, one entry an output."""
    alt = yaml.safe_load('\n'.join(re.findall(r'#\s*\|\s*(fig-alt:.*)', _head(cell))) or '{}').get('fig-alt')
    if isinstance(alt, list): alt = alt[i] if i < len(alt) else ''
    return alt.strip() if isinstance(alt, str) else ''

def alt_faults(nb):
    "The first line of code of every figure without an alt text in a processed notebook"
    for c in nb.cells:
        if c.cell_type != 'code' or not is_shown(c): continue
        for i, o in enumerate(c.get('outputs', [])):
            if any(k.startswith('image/') for k in o.get('data', {})) and not figure_alt(c, i):
                yield c.source[len(_head(c)) :].partition('\n')[0]

class Page:
    "What can be wrong on one page: its ids, links, images, formulas, names and references."
    def __init__(self, path, text, fmt, nb=None):
        self.path, self.nb = path, nb
        self.ids, self.links, self.images, self.maths, self.names, self.refs, self.stray, self.rows = (
            set(),
            [],
            [],
            [],
            [],
            [],
            [],
            [],
        )
        for o in nodes(pandoc(text, fmt)):
            t, c = o['t'], o.get('c')
            if t == 'Header': self.ids.add(c[1][0])
            elif t in ('Div', 'Span', 'CodeBlock', 'Code', 'Link', 'Image', 'Figure', 'Table'): self.ids.add(c[0][0])
            if t == 'Link': self.links.append((c[2][0], flat(c[1])))
            elif t == 'Image': self.images.append((c[2][0], flat(c[1])))
            elif t == 'Math': self.maths.append((c[0]['t'] == 'DisplayMath', c[1].strip()))
            elif t == 'Code': self.names.append(c[1])
            elif t == 'Cite': self.refs += [i['citationId'] for i in c[0]]
            elif t in ('RawInline', 'RawBlock') and c[0] == 'tex':
                if c[1].startswith(r'\begin'): self.maths.append((True, c[1].strip()))
                else: self.stray.append(c[1])
            elif t in ('RawInline', 'RawBlock') and c[0] == 'html': self._html(c[1])
            elif t == 'LineBlock': self.rows.append('| ' + flat(c))     # what pandoc takes a row without a head for
            elif t in ('Para', 'Plain'): self._text(flat([i for i in c if i['t'] in ('Str', 'Space', 'SoftBreak')]))
        self.ids.discard('')

    def _html(self, s):
        for tag in re.findall(r'<[a-z][^>]*>', s, re.I):
            a = dict(re.findall(r'([a-z]+)="([^"]*)"', tag, re.I))
            self.ids |= {a[k] for k in ('id', 'name') if k in a}
            if 'href' in a: self.links.append((a['href'], tag))
            if tag.lower().startswith('<iframe') and 'src' in a: self.links.append((a['src'], tag))
            if tag.lower().startswith('<img') and 'src' in a: self.images.append((a['src'], a.get('alt', '')))

    def _text(self, s):
        self.ids |= set(re.findall(r'\{#(eq-[\w-]+)\}', s))
        if re.search(r'\$(?!\d)', s): self.stray.append(s)           # pandoc made no formula of it
        if re.match(r'\|.*\|$', s): self.rows.append(s)               # nor a table row of this

# --- names

def resolve(name):
    "Does the dotted `name` import?"
    parts = name.split('.')
    for i in range(len(parts), 0, -1):
        try: o = importlib.import_module('.'.join(parts[:i]))
        except ImportError: continue
        return has_attrs(o, parts[i:])
    return False

def has_attrs(o, attrs):
    "Has `o` these nested `attrs`? What a class sets on `self`, takes or annotates counts too."
    for i, a in enumerate(attrs):
        if hasattr(o, a): o = getattr(o, a); continue
        if not inspect.isclass(o) or i < len(attrs) - 1: return False
        own = [k for k in o.__mro__ if k.__module__.startswith('balms')]
        return a in inspect.signature(o).parameters or any(
            a in k.__dict__.get('__annotations__', {}) or re.search(rf'\bself\.{a}\b', inspect.getsource(k))
            for k in own
        )
    return True

@cache
def exports(lib):
    "Exported symbols of the package `lib`, name -> object."
    res = {}
    for m in pkgutil.iter_modules(importlib.import_module(lib).__path__):
        if m.name.startswith('_'): continue
        mod = importlib.import_module(f'{lib}.{m.name}')
        res.update({n: getattr(mod, n) for n in getattr(mod, '__all__', [])})
    return res

@cache
def known():
    "Names of the libraries that a reader knows."
    res = {n for m in known_modules for n in dir(importlib.import_module(m))}
    return res | {n for c in known_classes for n in dir(pkgutil.resolve_name(c))}

def defined(nb):
    "Names that the code cells of `nb` define or import."
    res = set()
    for c in nb.cells if nb else []:
        for o in (n for tree in c.parsed_() or [] for n in ast.walk(tree)):
            if isinstance(o, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)): res.add(o.name)
            elif isinstance(o, ast.Name) and isinstance(o.ctx, ast.Store): res.add(o.id)
            elif isinstance(o, (ast.Import, ast.ImportFrom)):
                res |= {(a.asname or a.name).split('.')[0] for a in o.names}
                if isinstance(o, ast.ImportFrom) and o.names[0].name == '*' and resolve(o.module):
                    res |= set(dir(importlib.import_module(o.module)))
    return res

def is_dead(name, own, lib):
    "Does `name` look like a project name and resolve to nothing? `own` are names of its notebook."
    if re.fullmatch(rf'{lib}(\.\w+)+(\(.*\))?', name): return not resolve(name.partition('(')[0])
    ours = exports(lib)
    if m := re.fullmatch(r'(\w+)\.([\w.]+?)(\(.*\))?', name):
        return m[1] in ours and inspect.isclass(ours[m[1]]) and not has_attrs(ours[m[1]], m[2].split('.'))
    call = name.endswith('()')
    if not re.fullmatch(r'\w+\(\)' if call else r'[A-Z]\w*[a-z]\w*', name): return False
    name = name.removesuffix('()')
    if name in ours or name in own or name in known(): return False
    return not (call and any(hasattr(o, name) for o in ours.values() if inspect.isclass(o)))

# --- formulas

def unbalanced(tex):
    "Are the braces of `tex` unbalanced?"
    depth = 0
    for b in re.findall(r'[{}]', re.sub(r'\\.', '', tex)):
        depth += 1 if b == '{' else -1
        if depth < 0: return True
    return depth != 0

_mathjax = r"""
const tex = {packages: {'[-]': ['noundefined', 'noerrors', 'bussproofs']}, formatError: (_, e) => { throw e }}
const say = f => ([display, tex]) => {
    try { f.texReset(); f.tex2mml(tex, {display}); return null }
    catch (e) { return e.message }
}
require(process.argv[1]).init({loader: {load: ['input/tex-full']}, tex}).then(f =>
    console.log(JSON.stringify(JSON.parse(require('fs').readFileSync(0)).map(say(f)))))
"""

def mathjax_errors(maths, folder):
    "What MathJax, in `folder`/node_modules, says of each formula (is it displayed?, TeX); None for a good one."
    where = Path(folder).resolve()/'node_modules/mathjax'
    if not where.exists(): sys.exit(f'No MathJax in {folder}: npm install --no-save --prefix {folder} mathjax@3')
    return json.loads(
        subprocess.run(
            ['node', '-e', _mathjax, str(where)],
            input=json.dumps(maths),
            capture_output=True,
            text=True,
            encoding='utf-8',
            check=True,
        ).stdout
    )

# --- the check

def title_faults(nb):
    "nbdev makes the title of the cell with the H1 and drops whatever else that cell says."
    heads = [
        c
        for c in nb.cells
        if c.cell_type == 'markdown'
        and re.search(r'^# ', re.sub(r'^```.*?^```', '', c.source, flags=re.M | re.S), re.M)
    ]
    if len(heads) != 1: yield f'{len(heads)} level-one headings instead of one'
    for c in heads[:1]:
        lines = [l for l in c.source.splitlines() if l.strip()]
        if not (lines[0].startswith('# ') and len([l for l in lines if l.startswith('> ')]) == 1):
            yield 'the first cell must be one "# title" and one "> promise" line'
        for l in lines:
            if not re.match(r'# |> |- \S+:', l): yield f'the site drops this line of the title cell: {l}'

def sidebar(o):
    "Every page that a part of _quarto.yml names."
    if isinstance(o, str): yield o
    elif isinstance(o, list):
        for i in o: yield from sidebar(i)
    elif isinstance(o, dict):
        for k in ('contents', 'href', 'file', 'left', 'right'): yield from sidebar(o.get(k))

class Check:
    "Every fault in the pages of the project at `root`, as `page: what: text`."
    def __init__(self, root, mathjax=None):
        self.root, self.pages, self.faults = Path(root).resolve(), {}, []
        with tempfile.TemporaryDirectory() as tmp:
            tmp = Path(tmp)
            for o in ('nbs', 'balms', 'settings.ini'):
                src = self.root/o
                if src.is_dir():
                    shutil.copytree(
                        src, tmp / o, symlinks=True, ignore=shutil.ignore_patterns('.*', '__pycache__', '_proc', 'runs')
                    )
                elif src.exists():
                    shutil.copy(src, tmp)
            with project(tmp), warnings.catch_warnings():
                warnings.simplefilter('ignore')
                cfg = get_config()
                self.lib, self.site, self.repo = (
                    cfg.lib_path.name,
                    cfg.doc_host + cfg.doc_baseurl + '/',
                    f'{cfg.git_url}/blob/{cfg.branch}/',
                )
                for p in sorted(tmp.glob('nbs/[!_.]*.ipynb')): self.read_nb(p, f'nbs/{p.name}')
        for p in texts:
            if (self.root/p).exists(): self.pages[p] = Page(p, (self.root/p).read_text(encoding='utf-8'), 'gfm')
        self.urls = {_nbpath2html(Path(p)).name: p for p in self.pages if p.endswith('.ipynb')}
        for p in self.pages.values(): self.page(p)
        if mathjax: self.mathjax(mathjax)
        self.sidebar()

    def say(self, page, what, text=''):
        self.faults.append(f'{page}: {what}' + f': {" ".join(text.split())[:200]}' * bool(text))

    def read_nb(self, file, path):
        nb = read_nb(file)
        for what in title_faults(nb): self.say(path, what)
        for i, c in enumerate(nb.cells):
            for o in c.get('outputs', []):
                if o.output_type == 'error': self.say(path, f'stored error in cell {i}', f'{o.ename}: {o.evalue}')
        try: done = process(file)
        except Exception as e:
            self.say(
                path,
                f'the site cannot be built ({type(e.__cause__ or e).__name__}: {e.__cause__ or e}); nbdev runs every'
                ' cell with an import, and those that export or show_doc, but no other',
                str(e),
            )
            done = process(file, skip=['exec_show_docs'])
        for line in alt_faults(done): self.say(path, 'figure without alt text (#| fig-alt: "...")', line)
        self.pages[path] = Page(path, '\n\n'.join(nb2md(done)), 'markdown', nb)

    def target(self, page, url):
        "What is wrong with a link from `page` to `url`, or None."
        if url.startswith(self.repo):
            return (
                None
                if (self.root / unquote(url[len(self.repo) :].partition('#')[0])).exists()
                else 'not in the repository'
            )
        own = url.startswith(self.site)
        if own: url = url[len(self.site):]
        elif re.match(r'[a-z][a-z0-9+.-]*:|//', url, re.I): return
        path, _, anchor = unquote(url).partition('#')
        on_site = own or page.nb is not None
        if not path and not own: to = page.path
        elif on_site and (path or 'index.html') in self.urls: to = self.urls[path or 'index.html']
        else:
            file = (self.root/('nbs' if on_site else '.')/path).resolve()
            to = file.relative_to(self.root).as_posix() if file.is_relative_to(self.root) else None
            if to is None or not file.exists() or file.suffix == '.ipynb' and to not in self.pages:
                return 'no such page' if file.suffix == '.ipynb' else 'no such file'
            if on_site and not to.startswith('nbs/'): return f'outside of nbs/, so not on the site: use {self.repo}{to}'
        if anchor and to in self.pages and anchor not in self.pages[to].ids: return f'no such anchor in {to}'

    def page(self, p):
        for url, text in p.links:
            if '](' in text: self.say(p.path, 'link within a link (backticks in its text are one already)', text)
            if why := self.target(p, url):
                auto = url.startswith(self.site) and '#' in url
                self.say(
                    p.path,
                    f'dead link ({why})',
                    f'[{text}]({url})'
                    + auto
                    * ' (where nbdev made it from backticks: document the name with show_doc, or put spaces inside the'
                    ' backticks)',
                )
        for url, alt in p.images:
            if not url.startswith('data:') and (why := self.target(p, url)):
                self.say(p.path, f'missing image ({why})', url)
            if not alt.strip(): self.say(p.path, 'image without alt text', url)
        own = defined(p.nb)
        for name in p.names:
            if is_dead(name, own, self.lib): self.say(p.path, 'name that resolves to nothing', f'`{name}`')
        for ref in p.refs:
            if re.match(r'(eq|fig|tbl|sec)-', ref) and ref not in p.ids:
                self.say(p.path, 'reference to nothing', f'@{ref}')
        for _, tex in p.maths:
            if unbalanced(tex): self.say(p.path, 'formula with unbalanced braces', tex)
        for s in p.rows: self.say(p.path, 'table row outside of a table', s)
        for s in p.stray: self.say(p.path, 'TeX or a dollar sign that makes no formula', s)

    def mathjax(self, folder):
        maths = [(p.path, m) for p in self.pages.values() for m in p.maths]
        for (path, (_, tex)), err in zip(maths, mathjax_errors([m for _, m in maths], folder)):
            if err: self.say(path, f'formula that MathJax refuses ({err})', tex)

    def sidebar(self):
        site = yaml.safe_load((self.root/'_quarto.yml').read_text(encoding='utf-8'))['website']
        listed = list(sidebar(site.get('sidebar')))
        for o in listed + list(sidebar(site.get('navbar'))):
            if not re.match(r'[a-z]+:', o) and not (self.root / 'nbs' / o).exists():
                self.say('_quarto.yml', 'no such page', o)
        for f in sorted((self.root/'nbs').glob('[!_.]*.ipynb')):
            if f.name not in listed: self.say('_quarto.yml', 'notebook that is not in the sidebar', f.name)

    def counts(self):
        n = lambda o: sum(len(getattr(p, o)) for p in self.pages.values())
        return f'{len(self.pages)} pages, {n("links")} links, {n("maths")} formulas checked'

@call_parse
def main(
    mathjax:str=None, # Folder whose node_modules has MathJax: also typeset every formula
):
    "Check every page, link, name and formula of the documentation"
    check = Check(root, mathjax)
    print(*check.faults, sep='\n', end='\n'*bool(check.faults))
    print(f'{check.counts()}: ' + (f'{len(check.faults)} faults' if check.faults else 'no fault'))
    sys.exit(bool(check.faults))
