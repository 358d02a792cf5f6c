"""What a reader of the code may rely on: modules and cells of a length to read, names with one meaning, stored outputs.

    python tools/check_code.py

Faults, each with its place, and exit status 1 if there are any:
- a module of more than 350 lines, or a line of more than 120 characters in one;
- an exported cell of more than 25 lines; comments, docstrings, blank lines, signatures, imports and tables of data
  do not count;
- a private name that another module imports, or that two modules define;
- a notebook without any stored output, a figure (a cell with an alt text) without its picture, or an error in one.
"""
import ast
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

root = Path(__file__).resolve().parent.parent
MODULE, CELL, LINE = 350, 25, 120


def is_docstring(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def is_table(node):
    "A literal of more than a line: data to look up, not code to follow"
    return isinstance(node, ast.Assign) and isinstance(
        node.value, (ast.Constant, ast.Dict, ast.List, ast.Tuple, ast.Call, ast.Set)
    )


def statement_lines(source):
    "Lines that hold a statement, without signatures and what else does not count"
    tree, left_out = ast.parse(source), set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            left_out |= set(range(node.lineno + 1, node.body[0].lineno))
        if is_docstring(node) or isinstance(node, (ast.Import, ast.ImportFrom)):
            left_out |= set(range(node.lineno, node.end_lineno + 1))
    for node in tree.body:
        if is_table(node): left_out |= set(range(node.lineno, node.end_lineno + 1))
        if isinstance(node, ast.ClassDef):                             # fields of a dataclass with a comment each
            for field in node.body:
                if isinstance(field, ast.AnnAssign): left_out |= set(range(field.lineno, field.end_lineno + 1))
    lines = enumerate(source.splitlines(), 1)
    return sum(bool(line.strip()) and not line.strip().startswith('#') and n not in left_out for n, line in lines)


def check_modules(paths):
    defined = defaultdict(list)
    for path in paths:
        text = path.read_text(encoding='utf-8')
        lines, tree = text.splitlines(), ast.parse(text)
        if len(lines) > MODULE: yield f'{path}: {len(lines)} lines, more than {MODULE}'
        listing = [
            n for n, line in enumerate(lines[:40], 1) if line.startswith('__all__') or line.startswith('           ')
        ]
        for n, line in enumerate(lines, 1):
            if len(line) > LINE and n not in listing: yield f'{path}:{n}: {len(line)} characters, more than {LINE}'
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                for name in node.names:
                    if name.name.startswith('_'): yield f'{path}:{node.lineno}: imports the private name {name.name}'
        for node in tree.body:
            names = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []
            if isinstance(node, ast.Assign): names = [t.id for t in node.targets if isinstance(t, ast.Name)]
            if isinstance(node, ast.FunctionDef) and any('patch' in ast.unparse(d) for d in node.decorator_list):
                names = []
            for name in names:
                if name.startswith('_') and not name.startswith('__') and name != '_all_':
                    defined[name].append(path.name)
    for name, modules in defined.items():
        if len(set(modules)) > 1: yield f'{name} is defined in {" and ".join(sorted(set(modules)))}'


def check_notebook(path):
    cells = [c for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
    for c in cells:
        source = ''.join(c['source'])
        if re.search(r'^#\|\s*export', source, re.M):
            n = statement_lines(source)
            if n > CELL:
                yield (
                    f'{path.name}, cell {c["id"]}: {n} exported lines, more than {CELL}: {source.splitlines()[1][:60]}'
                )
        if any(o['output_type'] == 'error' for o in c['outputs']):
            yield f'{path.name}, cell {c["id"]}: an error is stored'
        pictures = any('image/png' in o.get('data', {}) or 'text/html' in o.get('data', {}) for o in c['outputs'])
        if re.search(r'^#\|\s*fig-alt', source, re.M) and not pictures:
            yield f'{path.name}, cell {c["id"]}: its figure is not stored'
    if cells and not any(c['outputs'] for c in cells):
        yield f'{path.name}: no output is stored. Run tools/run_notebooks.py'


def main():
    modules = sorted(p for p in (root/'balms').glob('*.py') if p.name not in ('__init__.py', '_modidx.py'))
    notebooks = sorted((root/'nbs').glob('[!_.]*.ipynb'))
    faults = [*check_modules(modules), *(fault for p in notebooks for fault in check_notebook(p))]
    print('\n'.join(str(f).replace(f'{root}/', '') for f in faults))
    print(f'{len(modules)} modules, {len(notebooks)} notebooks: {len(faults) or "no"} faults')
    return 1 if faults else 0


if __name__ == '__main__': sys.exit(main())
