"Run notebooks in place, each in a process of its own: `python tools/run_notebooks.py [nbs/x.ipynb ...] [--check]`"
import os, subprocess, sys, tempfile, time, warnings
from pathlib import Path

from execnb.shell import CaptureShell
from fastcore.script import Param, call_parse
from nbdev.clean import nbdev_clean
from nbdev.process import extract_directives

root = Path(__file__).resolve().parent.parent

def _prepare(cell):
    "Before `cell` runs: drop its old outputs. True, which skips it and keeps them, for what cannot run here."
    if cell.cell_type != 'code' or 'nbdev_export(' in cell.source: return True
    directives = extract_directives(cell, remove=False)
    if (directives.get('eval:') or [''])[0].lower() == 'false': return True
    if 'cuda' in directives:
        import torch
        if not torch.cuda.is_available(): return True
    cell.outputs = []

def run_nb(path, check=False):
    "Run the notebook at `path` from top to bottom; write its outputs only if every cell ran."
    before = path.read_text(encoding='utf-8')
    os.chdir(path.parent); sys.path.insert(0, str(root))
    shell = CaptureShell(path.parent, mpl_format='png')
    warnings.filterwarnings('ignore', module='(?!balms|__main__)')   # not a reader's business
    # without this machine's paths
    warnings.formatwarning = lambda message, category, *_, **__: f'{category.__name__}: {message}\n'
    with tempfile.TemporaryDirectory() as tmp:
        done = Path(tmp)/path.name
        try: shell.execute(path, done, exc_stop=True, preproc=_prepare)
        except Exception: sys.exit(shell.prettytb(path.name))
        nbdev_clean(str(done))
        if path.read_text(encoding='utf-8') != before: sys.exit(f'{path.name} was edited while it ran: nothing written')
        if not check: path.write_text(done.read_text(encoding='utf-8'), encoding='utf-8')

@call_parse
def main(
    paths:Param('Notebooks; default: all of nbs/', str, nargs='*'),
    check:bool=False, # Only see whether they run; write nothing
):
    "Run notebooks in place from top to bottom and keep their outputs"
    paths = [Path(p).resolve() for p in paths or sorted((root/'nbs').glob('[!_.]*.ipynb'))]
    start = time.time()
    if len(paths) == 1: run_nb(paths[0], check)
    for p in paths if len(paths) > 1 else []:
        if subprocess.run([sys.executable, __file__, str(p)] + ['--check']*check).returncode: sys.exit(1)
    if len(paths) == 1: print(f'{paths[0].name} {time.time() - start:.0f} s', flush=True)
