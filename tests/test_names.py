"Every public name of the package is documented: what it is, each parameter, an example in a notebook, and a page."
import ast, importlib, inspect, io, json, pkgutil, tokenize
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
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return ast.parse(text), {t.start[0] for t in tokens if t.type == tokenize.COMMENT and len(t.string) > 2}


def is_record(node):
    "Whether a class is a dataclass or a named tuple, whose fields are its parameters"
    marks = [ast.unparse(n) for n in (*node.decorator_list, *node.bases)]
    return any('dataclass' in m or 'NamedTuple' in m for m in marks)


def undocumented(name, attr):
    "Parameters or fields of `attr` in the module that no comment explains"
    tree, comments = module(name)
    found = [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == attr]
    if not found: return []
    node = found[0]
    if isinstance(node, ast.ClassDef) and is_record(node):
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and not n.target.id.startswith('_')]
        return [n.target.id for n in fields if not comments & set(range(n.lineno, n.end_lineno + 1))]
    if isinstance(node, ast.ClassDef):
        init = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == '__init__']
        if not init: return [p for b in node.bases if isinstance(b, ast.Name) for p in undocumented(name, b.id)]
        node = init[0]
    a = node.args
    parameters = [p for p in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg) if p]
    named = [p for p in parameters if p.arg not in ('self', 'cls') and not p.arg.startswith('_')]
    return [p.arg for p in named if p.lineno not in comments]


def used_names(source):
    "Names that a cell uses and does not define"
    try: tree = ast.parse(source)
    except SyntaxError: return set()                                         # a cell of a shell
    defined = {n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    for n in tree.body:
        if isinstance(n, ast.Assign): defined |= {t.id for t in n.targets if isinstance(t, ast.Name)}
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    return (used | {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}) - defined


@cache
def examples():
    "All names that some cell of a notebook uses"
    used = set()
    for p in sorted((root/'nbs').glob('[!_.]*.ipynb')):
        cells = json.loads(p.read_text(encoding='utf-8'))['cells']
        used |= set().union(*(used_names(''.join(c['source'])) for c in cells if c['cell_type'] == 'code'))
    return used


@pytest.mark.parametrize('name', MODULES)
def test_public_names_are_documented(name):
    mod, faults = importlib.import_module(f'balms.{name}'), []
    for attr in getattr(mod, '__all__', []):
        o = getattr(mod, attr)
        if getattr(o, '__module__', mod.__name__) != mod.__name__: continue   # documented there
        if inspect.isclass(o) or inspect.isfunction(o):
            if not (o.__doc__ or '').strip(): faults.append(f'{attr}: no docstring')
            if lacks := undocumented(name, attr): faults.append(f'{attr}: no word on {", ".join(lacks)}')
            if f'balms.{name}.{attr}' not in index['syms'][f'balms.{name}']:
                faults.append(f'{attr}: not in the index, so without a page or a link to its source')
        if attr not in examples(): faults.append(f'{attr}: no example, no cell of a notebook uses it')
    assert not faults, '\n'.join(faults)
