"The tools that make and check the documentation: each kind of fault is reported, alone, and a clean project has none."
import os, shutil, subprocess, sys
from pathlib import Path

import pytest
pytest.importorskip('nbdev', reason='the documentation tools need the developer environment')
pytest.importorskip('pypandoc', reason='the documentation tools need the developer environment')
from execnb.nbio import mk_cell, new_nb, read_nb, write_nb

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root/'tools'))
from check_docs import Check, mathjax_errors, unbalanced
from readme import make_readme
from readme_command import readme_command

def md(s): return mk_cell(s, 'markdown')
def code(s, *outputs): return mk_cell(s) | dict(outputs=list(outputs))
def stream(s): return dict(output_type='stream', name='stdout', text=[s])
def show(**data):
    return dict(output_type='display_data', metadata={}, data={k.replace('_', '/'): [v] for k, v in data.items()})
error = dict(output_type='error', ename='ValueError', evalue='boom', traceback=[])

index = [
    md('# balms\n\n> A promise.'),
    code('#| hide\nsecret = 1'),
    md(
        'See [the shift](00_core.ipynb#the-shift), `log_prior` and ![a dot](images/a.png){width=3}. In code:'
        ' `[x](y.md)`.\n\n## Use {#use}\n\nAn equation $a_1$ and\n\n$$b$$ {#eq-b}\n\n:::'
        ' {.callout-note}\nNote.\n:::\n\n::: {.content-visible when-format="html"}\n\n```{=html}\n<iframe'
        ' src="images/a.png" title="a"></iframe>\n```\n\n:::\n\n::: {.content-hidden'
        ' when-format="html"}\n\nStill.\n\n:::\n\n<!-- command: run -->\n```bash\nbalms_train  # [x](y.md)\n```\n\n<!--'
        ' command: test -->\n```bash\nnbdev_test\npytest\n```'
    ),
    code('print("hi")', stream('hi\n')),
    code('#| echo: false\nprint("there")', stream('there\n')),
    code('#| eval: false\ngo()'),
    code('#| output: false\nstep()', stream('noise\n')),
    code('x', show(text_plain='3', text_markdown='**3**')),
]

core = [
    md('# Core\n\n> Another promise.'),
    code('#| default_exp core'),
    md(
        '## The shift\n\nBack to [the start](index.ipynb#use), to `log_prior`, [its page](#log_prior), and [the'
        ' paper](https://arxiv.org/abs/2007.10740).\n\n$$\\text{shift}_j = \\{\\log n_j\\}$$ {#eq-shift}\n\nIn'
        ' @eq-shift, `balms.core.BalancedSoftmax.from_dls`, `BalancedSoftmax.shift`, `Learner`, `backward()`,\n`Mine`,'
        ' `mine()`, `True`, `nn.Linear`, `from_dls()`, 5 for $5 and $\\frac{1}{k}$ are as they should be.'
    ),
    code('import torch'),
    code('#| export\ndef log_prior(counts): "What the loss adds."'),
    code('class Mine: pass\ndef mine(): pass'),
    code('#| fig-alt: "A dot: red."\nmine()', show(text_plain='1', image_png='iVBOR')),
]

@pytest.fixture(scope='session')
def clean(tmp_path_factory):
    "A small project without a fault."
    d = tmp_path_factory.mktemp('clean')
    for o in ('nbs/images', 'balms'): (d/o).mkdir(parents=True)
    shutil.copy(root/'settings.ini', d)
    (d / '_quarto.yml').write_text(
        'website:\n  sidebar:\n    contents:\n      - text: Start\n        href: index.ipynb\n      - section: All\n   '
        '     contents: [00_core.ipynb]\n'
    )
    (d/'nbs/images/a.png').write_bytes(b'png')
    settings = dict(
        doc_host='https://balms.github.io',
        doc_baseurl='/balms',
        lib_path='balms',
        git_url='https://github.com/balms/balms',
        branch='main',
    )
    syms = {f'balms.core.{n}': (f'core.html#{n}', 'balms/core.py') for n in ('log_prior', '_positive')}
    (d/'balms/_modidx.py').write_text(f'd = {dict(syms={"balms.core": syms}, settings=settings)}\n')
    (d/'balms/core.py').touch()
    for name, cells in (('index', index), ('00_core', core)): write_nb(new_nb(cells), d/f'nbs/{name}.ipynb')
    (d/'README.md').write_text(make_readme(d))
    (d/'CHANGELOG.md').write_text('# Changes\n\n## 0.0.1\n\nFirst, see [README](README.md#use) and [below](#001).\n')
    return d

@pytest.fixture
def repo(clean, tmp_path): return Path(shutil.copytree(clean, tmp_path/'repo'))

def add(repo, *cells, to='00_core', at=None):
    "Put `cells` into a notebook."
    f = repo/f'nbs/{to}.ipynb'; nb = read_nb(f)
    nb.cells[at or len(nb.cells):at or len(nb.cells)] = cells
    write_nb(nb, f)

def test_clean(clean):
    before = {p: p.stat().st_mtime_ns for p in clean.rglob('*')}
    check = Check(clean)
    assert check.faults == []
    assert check.counts() == '4 pages, 12 links, 6 formulas checked'
    assert {p: p.stat().st_mtime_ns for p in clean.rglob('*')} == before      # nothing is left behind

@pytest.mark.parametrize(
    'text, fault',
    [
        ('[x](99_gone.ipynb)', 'dead link (no such page): [x](99_gone.ipynb)'),
        ('[x](gone.csv)', 'dead link (no such file): [x](gone.csv)'),
        ('<a href="gone.csv">x</a>', 'dead link (no such file)'),
        ('<iframe src="images/gone.html" title="x"></iframe>', 'dead link (no such file)'),
        (
            '[x](../settings.ini)',
            'outside of nbs/, so not on the site: use https://github.com/balms/balms/blob/main/settings.ini',
        ),
        ('[x](#gone)', 'dead link (no such anchor in nbs/00_core.ipynb): [x](#gone)'),
        ('[x](index.ipynb#gone)', 'dead link (no such anchor in nbs/index.ipynb): [x](index.ipynb#gone)'),
        ('[x](https://balms.github.io/balms/core.html#gone)', 'dead link (no such anchor in nbs/00_core.ipynb)'),
        ('[x](https://balms.github.io/balms/gone.html)', 'dead link (no such file)'),
        ('[x](https://github.com/balms/balms/blob/main/gone.py)', 'dead link (not in the repository)'),
        ('`_positive`', 'no such anchor in nbs/00_core.ipynb): [_positive]'),
        ('![a dot](images/gone.png)', 'missing image (no such file): images/gone.png'),
        ('![](images/a.png)', 'image without alt text: images/a.png'),
        ('`balms.core.Gone`', 'name that resolves to nothing: `balms.core.Gone`'),
        ('`balms.gone.BalancedSoftmax`', 'name that resolves to nothing'),
        ('`BalancedSoftMax`', 'name that resolves to nothing: `BalancedSoftMax`'),
        ('`BalancedSoftmax.from_gone`', 'name that resolves to nothing'),
        ('`log_priors()`', 'name that resolves to nothing: `log_priors()`'),
        ('see @eq-gone', 'reference to nothing: @eq-gone'),
        ('so $\\frac{1{k}$ is', 'formula with unbalanced braces: \\frac{1{k}'),
        ('$$a = b', 'makes no formula: $$a = b'),
        ('so $ a $ is', 'makes no formula: so $ a $ is'),
        ('so \\alpha is', 'makes no formula: \\alpha'),
        (
            'see [`log_prior`](index.ipynb#use)',
            'link within a link (backticks in its text are one already): [log_prior]',
        ),
        ('# Again', '2 level-one headings instead of one'),
        ('| a | b |\n|---|---|\n| 1 | 2 |\n\n| 3 | 4 |', 'table row outside of a table: | 3 | 4 |'),
    ],
)
def test_fault_in_text(repo, text, fault):
    add(repo, md(text))
    faults = Check(repo).faults
    assert len(faults) == 1 and faults[0].startswith('nbs/00_core.ipynb: ') and fault in faults[0], faults

def test_stored_error(repo):
    add(repo, code('f()', error))
    assert Check(repo).faults == ['nbs/00_core.ipynb: stored error in cell 7: ValueError: boom']

@pytest.mark.parametrize(
    'option, n',
    [
        ('', 2),
        ('#| fig-alt: ""\n', 2),
        ('#| fig-alt: [""]\n', 2),
        ('#| fig-alt: ["", "a", ""]\n', 1),
        ('#| fig-alt: a\n', 0),
        ('#| echo: false\n#| fig-alt: ["", "a: b", "c"]\n', 0),
        ('#| output: false\n', 0),
        ('#| hide\n', 0),
        ('x = 1\n#| fig-alt: a\n', 2),
    ],
)
def test_figure_without_alt_text(repo, option, n):
    figure = show(text_plain='<Figure>', image_png='iVBOR')
    add(repo, code(f'{option}mine()', stream('x'), figure, figure))
    line = 'x = 1' if option.startswith('x') else 'mine()'
    assert Check(repo).faults == [f'nbs/00_core.ipynb: figure without alt text (#| fig-alt: "..."): {line}']*n

def test_title_cell(repo):
    f = repo/'nbs/00_core.ipynb'; nb = read_nb(f)
    nb.cells[0].source += '\n\nLost words.'; write_nb(nb, f)
    assert Check(repo).faults == ['nbs/00_core.ipynb: the site drops this line of the title cell: Lost words.']
    nb.cells[0].source = '# Core'; write_nb(nb, f)
    assert Check(repo).faults == ['nbs/00_core.ipynb: the first cell must be one "# title" and one "> promise" line']

def test_import_cell(repo):
    "nbdev runs cells with an import for the site, but not the ones that define what they use."
    add(repo, code('y = 1'), code('import math\nprint(y)'))
    faults = Check(repo).faults
    assert len(faults) == 1 and "the site cannot be built (NameError: name 'y' is not defined)" in faults[0], faults

def test_sidebar(repo):
    q = repo/'_quarto.yml'; s = q.read_text()
    q.write_text(s.replace('[00_core.ipynb]', '[00_core.ipynb, 01_gone.ipynb]'))
    assert Check(repo).faults == ['_quarto.yml: no such page: 01_gone.ipynb']
    q.write_text(s.replace('[00_core.ipynb]', '[]'))
    assert Check(repo).faults == ['_quarto.yml: notebook that is not in the sidebar: 00_core.ipynb']
    q.write_text(s.replace('      - text: Start\n        href: index.ipynb\n', ''))
    assert Check(repo).faults == ['_quarto.yml: notebook that is not in the sidebar: index.ipynb']

@pytest.mark.parametrize('page', ['README.md', 'CHANGELOG.md', 'CONTRIBUTING.md'])
def test_texts(repo, page):
    with (repo/page).open('a') as f: f.write('\n[x](gone.md) [y](README.md#gone) ![](nbs/images/a.png)\n')
    assert [f.split(': ')[:2] for f in Check(repo).faults] == [
        [page, 'dead link (no such file)'],
        [page, 'dead link (no such anchor in README.md)'],
        [page, 'image without alt text'],
    ]

def test_unbalanced():
    for tex in (r'\{', r'a\}', r'\frac{1}{2}', r'\text{\{}', r'a\\{b}'): assert not unbalanced(tex), tex
    for tex in ('{', '}{', r'\\{', r'\frac{1}{2'): assert unbalanced(tex), tex

@pytest.fixture(scope='session')
def mathjax():
    """A folder with MathJax in its node_modules: $BALMS_MATHJAX, or the project itself after `npm install --no-save
    mathjax@3`."""
    folder = Path(os.environ.get('BALMS_MATHJAX', root))
    if not shutil.which('node'): pytest.skip('node is not installed')
    if not (folder / 'node_modules/mathjax').exists():
        pytest.skip('MathJax is not installed: npm install --no-save mathjax@3')
    return folder

def test_mathjax_errors(mathjax):
    good = [
        (False, 'n_j'),
        (True, r'\begin{aligned} a &= b \\ c &= d \end{aligned}'),
        (True, r'\operatorname*{argmax}_j \hat\phi_j'),
    ]
    bad = {
        r'\frac{a': 'Missing close brace',
        r'\nosuch': r'Undefined control sequence \nosuch',
        r'\left( a': r'Extra \left or missing \right',
        'a^1^2': 'Double exponent',
    }
    errors = mathjax_errors(good + [(False, t) for t in bad], mathjax)
    assert errors[:3] == [None]*3
    for err, want in zip(errors[3:], bad.values()): assert want in err

def test_fault_in_formula(repo, mathjax):
    assert Check(repo, mathjax).faults == []
    add(repo, md(r'so $\nosuch$ is'))
    assert Check(repo, mathjax).faults == [
        r'nbs/00_core.ipynb: formula that MathJax refuses (Undefined control sequence \nosuch): \nosuch'
    ]

def test_readme(clean):
    assert make_readme(clean) == """\
<!-- Made from nbs/index.ipynb by tools/readme.py: edit the notebook, not this file. -->

# balms

> A promise.

See [the shift](nbs/00_core.ipynb#the-shift), [`log_prior`](https://balms.github.io/balms/core.html#log_prior) and ![a dot](nbs/images/a.png). In code: `[x](y.md)`.

## Use

An equation $a_1$ and

$$b$$

Note.

Still.

<!-- command: run -->
```bash
balms_train  # [x](y.md)
```

<!-- command: test -->
```bash
nbdev_test
pytest
```

```python
print("hi")
```

```
hi
```

```
there
```

```python
go()
```

```python
step()
```

```python
x
```

**3**
"""

@pytest.mark.parametrize(
    'output, what',
    [
        (show(text_plain='<Figure>', image_png='iVBOR'), 'save the figure in nbs/images'),
        (error, 'A stored error'),
        (show(text_plain='<IPython.core.display.HTML object>', text_html='<b>3</b>'), 'without text or markdown'),
    ],
)
def test_readme_refuses(repo, output, what):
    add(repo, code('plot()', output), to='index')
    with pytest.raises(ValueError, match=what): make_readme(repo)

def test_readme_command(clean):
    text = (clean/'README.md').read_text()
    assert readme_command(text, 'test') == 'nbdev_test\npytest\n'
    assert readme_command(text, 'run').startswith('balms_train')
    with pytest.raises(ValueError, match='0 bash blocks'):
        readme_command(text.replace('command: run', 'command: go'), 'run')
    with pytest.raises(ValueError, match='2 bash blocks'): readme_command(text + text, 'run')

def test_run_notebooks(repo):
    "Outputs are new, old ones are gone, cells that cannot run keep theirs; after a failure the file is as it was."
    good, bad = repo/'nbs/90_good.ipynb', repo/'nbs/91_bad.ipynb'
    write_nb(new_nb([code('1 + 1'), code('x = 2', stream('old')), code('#| eval: false\n1/0', stream('kept'))]), good)
    write_nb(new_nb([code('1 + 1'), code('print(nosuch)')]), bad)
    cells, before = read_nb(good).cells, bad.read_text()
    res = subprocess.run(
        [sys.executable, str(root / 'tools/run_notebooks.py'), str(good), str(bad)], capture_output=True, text=True
    )
    assert res.returncode == 1 and '90_good.ipynb' in res.stdout
    for o in ('91_bad.ipynb', 'Cell #2', 'print(nosuch)', 'NameError'): assert o in res.stderr, res.stderr
    new = read_nb(good).cells
    assert [(c.id, c.source) for c in new] == [(c.id, c.source) for c in cells]
    assert new[0].outputs[0].data['text/plain'] == ['2'] and new[1].outputs == [] and new[2].outputs[0].text == ['kept']
    assert bad.read_text() == before
