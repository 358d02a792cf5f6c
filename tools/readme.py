"Make README.md from nbs/index.ipynb with nbdev's own processors: `python tools/readme.py [--check]`"
import atexit, difflib, os, posixpath, re, sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import nbdev.doclinks, yaml
from fastcore.script import call_parse
from fastcore.utils import exec_local
from nbdev.config import get_config
from nbdev.process import NBProcessor
from nbdev.processors import FilterDefaults

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root))        # `import balms` is this checkout
sys.dont_write_bytecode = True
header = '<!-- Made from nbs/index.ipynb by tools/readme.py: edit the notebook, not this file. -->'

@contextmanager
def project(root):
    """Work in the nbdev project at `root`. Backticks link to its own pages alone, so nothing depends on what else is
    installed."""
    def refresh(): get_config.cache_clear(); nbdev.doclinks._build_lookup_table.cache_clear()
    cwd, points, in_test = os.getcwd(), nbdev.doclinks.entry_points, os.environ.get('IN_TEST')
    os.chdir(root); refresh()
    lib = get_config().lib_path
    own = SimpleNamespace(name=lib.name, load=lambda: exec_local((lib/'_modidx.py').read_text(encoding='utf-8'), 'd'))
    nbdev.doclinks.entry_points = lambda group: [own]
    os.environ['IN_TEST'] = '1'       # a cell with `nbdev_export()` does nothing
    try: yield
    finally:
        os.chdir(cwd); nbdev.doclinks.entry_points = points
        if in_test is None: del os.environ['IN_TEST']
        refresh()

def process(path, skip=()):
    "The notebook at `path` as nbdev hands it to the site, without the processors named in `skip`."
    proc = NBProcessor(path, procs=[p for p in FilterDefaults().procs() if p.__name__ not in skip])
    try: proc.process()
    finally:
        for p in proc.procs:
            # a shell's own clean-up takes long, and there is one a page
            if hasattr(p, 'k'): atexit.unregister(p.k.atexit_operations)
    return proc.nb

def option(cell, name):
    "Value of a directive such as `#| echo: false`, '' where the cell has none."
    return (cell.directives_.get(f'{name}:') or [''])[0].lower()

def is_shown(cell):
    "Are the outputs of `cell` on the page?"
    return option(cell, 'include') != 'false' and option(cell, 'output') != 'false'

def _fence(text, lang=''):
    ticks = '`'*max(3, 1 + max(map(len, re.findall('`+', text)), default=0))
    return f'{ticks}{lang}\n{text.rstrip()}\n{ticks}'

def _output(o, cell):
    "One stored output as markdown, or `ValueError` for what a README cannot show."
    def no(what): raise ValueError(f'{what} in the cell\n\n{cell.source}')
    if o.output_type == 'error': no('A stored error')
    if o.output_type == 'stream':
        return ''.join(o.text) if option(cell, 'output') == 'asis' else _fence(''.join(o.text))
    if any(k.startswith('image/') for k in o.data):
        no('An image output: save the figure in nbs/images and refer to it as ![what it shows](images/x.png),')
    if 'text/markdown' in o.data: return ''.join(o.data['text/markdown'])
    text = ''.join(o.data.get('text/plain', ''))
    if not text or text.startswith('<IPython.'): no('An output without text or markdown')
    return _fence(text)

def _code(cell):
    "A code cell's source and outputs as markdown blocks."
    src = re.sub(r'\A(\s*#\s*\|.*\n?)+', '', cell.source).strip()
    if src and option(cell, 'echo') != 'false' and option(cell, 'include') != 'false':
        yield _fence(src, cell.metadata.get('language', 'python'))
    if is_shown(cell): yield from (_output(o, cell).strip() for o in cell.get('outputs', []))

_re_fenced = re.compile(r'(^(`{3,}|~{3,}).*?^\2\s*?$)', re.M|re.S)
_re_target = re.compile(
    r'(?P<code>`+).+?(?P=code)|(?P<pre>\]\(|\bsrc="|\bhref="|^\[[^\]]+\]:\s+)(?P<to>[^)\s">]+)', re.M
)

def _from_root(m):
    "A link that is relative to nbs/, relative to the root."
    if m['code'] or re.match(r'[a-z][a-z0-9+.-]*:|[/#]', m['to'], re.I): return m[0]
    return m['pre'] + posixpath.normpath('nbs/' + m['to'])

_re_site_only = re.compile(r'^::: *\{\.content-visible when-format="html"\}\n.*?^:::\n?', re.M|re.S)

def _plain(md):
    "Markdown without what only Quarto understands or only the site can show, its links relative to the root."
    md = _re_site_only.sub('', md)
    parts = _re_fenced.split(md)                                     # text, fenced block, its fence, text, ...
    for i in range(0, len(parts), 3):
        s = re.sub(r'(\]\([^)]*\))\{[^}]*\}', r'\1', parts[i])       # attributes of links and images
        s = re.sub(r'^(#+ .*?)\s*\{[#.][^}]*\}$', r'\1', s, flags=re.M)  # of headings
        s = re.sub(r'\$\$\s*\{#eq-[^}]*\}', '$$', s)                 # of equations
        s = re.sub(r'^:::.*\n?', '', s, flags=re.M)                  # fenced divs
        s = re.sub(r'\n{3,}', '\n\n', s)
        parts[i] = _re_target.sub(_from_root, s)
        if i+2 < len(parts): parts[i+2] = ''
    return ''.join(parts).strip()

def make_readme(root=root):
    "README.md of the project at `root`, as text."
    with project(root): nb = process('nbs/index.ipynb', skip=['insert_warning'])
    blocks = [header]
    for cell in nb.cells:
        if cell.cell_type == 'raw' and cell.source.startswith('---'):
            fm = yaml.safe_load(cell.source.strip().strip('-'))
            blocks += [f'# {fm["title"]}'] + ([f'> {fm["description"]}'] if 'description' in fm else [])
        elif cell.cell_type == 'markdown': blocks.append(_plain(cell.source))
        elif cell.cell_type == 'code': blocks += [_plain(b) for b in _code(cell)]
    return '\n\n'.join(b for b in blocks if b) + '\n'

@call_parse
def main(
    check:bool=False, # Write nothing; exit 1 with a diff where README.md is not what the notebook says
):
    "Make README.md from nbs/index.ipynb"
    file = root/'README.md'
    try: new = make_readme(root)
    except ValueError as e: sys.exit(f'nbs/index.ipynb: {e}')
    old = file.read_text(encoding='utf-8') if file.exists() else ''
    if not check: file.write_text(new, encoding='utf-8')
    elif new != old:
        print(
            *difflib.unified_diff(old.splitlines(), new.splitlines(), 'README.md', 'from nbs/index.ipynb', lineterm=''),
            sep='\n'
        )
        sys.exit('README.md is not up to date: python tools/readme.py')
