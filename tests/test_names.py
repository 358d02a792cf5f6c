"Every public name of the package is documented: what it is, each parameter, an example in a notebook, and a page to find it on."
import ast, importlib, inspect, io, json, pkgutil, re, tokenize
from functools import cache
from pathlib import Path

import pytest
import balms
from balms._modidx import d as index

root = Path(__file__).resolve().parent.parent
MODULES = sorted(m.name for m in pkgutil.iter_modules(balms.__path__) if not m.name.startswith('_'))

@cache
def module(name):
    "A module's syntax tree, and the lines that have a comment"
    text = (root/f'balms/{name}.py').read_text(encoding='utf-8')
    return ast.parse(text), {t.start[0] for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT and len(t.string) > 2}

def bare(name, attr):
    "Parameters or fields of `attr` in the module that no comment explains"
    tree, comments = module(name)
    node = next((n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == attr), None)
    if isinstance(node, ast.ClassDef):
        if any('dataclass' in ast.unparse(o) for o in node.decorator_list) or any('NamedTuple' in ast.unparse(o) for o in node.bases):
            return [n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and not n.target.id.startswith('_') and not comments & set(range(n.lineno, n.end_lineno + 1))]
        init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == '__init__'), None)
        if init is None: return [o for base in node.bases if isinstance(base, ast.Name) for o in bare(name, base.id)]      # a base of this module
        node = init
    if node is None: return []
    a = node.args
    args = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
    return [o.arg for o in args if o.arg not in ('self', 'cls') and not o.arg.startswith('_') and o.lineno not in comments]

@cache
def examples():
    "Name to the notebooks with a cell that uses it and does not define it"
    used = {}
    for p in sorted((root/'nbs').glob('[!_.]*.ipynb')):
        for c in json.loads(p.read_text(encoding='utf-8'))['cells']:
            if c['cell_type'] != 'code': continue
            try: tree = ast.parse(''.join(c['source']))
            except SyntaxError: continue                               # a cell of a shell
            defined = {n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))} | {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
            for n in ast.walk(tree):
                name = n.id if isinstance(n, ast.Name) else n.attr if isinstance(n, ast.Attribute) else None
                if name and name not in defined: used.setdefault(name, set()).add(p.name)
    return used

@pytest.mark.parametrize('name', MODULES)
def test_public_names_are_documented(name):
    mod, faults = importlib.import_module(f'balms.{name}'), []
    for attr in getattr(mod, '__all__', []):
        o = getattr(mod, attr)
        if inspect.isclass(o) or inspect.isfunction(o):
            if not (o.__doc__ or '').strip(): faults.append(f'{attr}: no docstring')
            if b := bare(name, attr): faults.append(f'{attr}: no word on {", ".join(b)}')
            if f'balms.{name}.{attr}' not in index['syms'][f'balms.{name}']: faults.append(f'{attr}: not in the index, so without a page or a link to its source')
        if attr not in examples(): faults.append(f'{attr}: no example, no cell of a notebook uses it')
    assert not faults, '\n'.join(faults)
