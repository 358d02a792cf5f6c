"""As many rows of the paper's CIFAR tables as fit into so many seconds, on a GPU that is only lent.

    python tools/timed_runs.py cifar100 --imbalance 100 --root cifar100_lt100.npz --seconds 500 --out runs

Softmax is trained first, since its model serves all the methods that train a classifier again, then these, then
Balanced Softmax, then the other methods, seed by seed. The first steps are timed, and no run is begun that would not
end in time. Several processes (`--workers`) train a seed each, since one alone leaves the GPU waiting for Python.

Each row is `OUT/<key>/row.json` as soon as there is one; `--ledger` also collects them in a file, and `--models` the
trained networks of first stages. The same command goes on from what is in OUT, or in these files, also after it was
killed. Without the history of git, give the commit in the environment variable BALMS_COMMIT.
"""
import argparse
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from balms.checkpoint import Interrupted, read_checkpoint
from balms.recipe import Recipe
from balms.rows import collect_rows, read_rows
from balms.runs import run

FIRST = 'softmax posthoc bs_dt bs_cbs_dt balms crt lws bs_dt_mr dt_ms bs_quarter_dt bs_quarter_dt_ms bs'.split()
THEN = 'cbs bs_quarter class_balanced ldam eql focal cbw ldam_drw cbs_bs bs_bs bs_cbs bs_s cbs_s cbs_cbs s_s'.split()
STARTS = 'softmax', 'bs', 'cbs'                                       # whose models others start from
MARGIN = 1.15                                                         # an estimate may be so much too low


class Worker:
    "Trains the recipes of some seeds, one after another, as far as they end in time"
    def __init__(self, a, end):
        self.a, self.end, self.compiling = a, end, 30. if a.compile else 5.
        self.step = self.step2 = None                                 # seconds, of the two stages
        self.setup = 5.                                               # seconds: images, network, evaluation

    def recipe(self, method, seed):
        a = self.a
        iters2 = a.iters2 if a.iters2 and Recipe(a.data, method=method).methods[method].two_stages else None
        return Recipe(a.data, a.imbalance, method, a.preset, seed=seed, precision=a.precision, iters=a.iters,
                      iters2=iters2, model=a.model, bs=a.bs)
    def run(self, recipe, **kwargs):
        a = self.a
        return run(recipe, a.out, a.root, a.device, compile=a.compile, **kwargs)
    def done(self, recipe): return (Path(self.a.out)/recipe.key/'model.safetensors').exists()

    def measure(self, recipe):
        "Seconds of a step, by the first steps of a run that will go on from there"
        folder, run_id, stops = Path(self.a.out)/recipe.key, None, (recipe.iters//300 + 2, recipe.iters//60 + 4)
        steps, seconds = [], []
        for stop in stops:
            try: self.run(recipe, stop_at=stop)
            except Interrupted: pass
            run_id = run_id or dict(recipe=recipe.identity, train_crc=self.crc(recipe))
            state = read_checkpoint(folder, run_id)
            steps.append(state['step'])
            seconds.append(state['seconds'])
        self.step = (seconds[1] - seconds[0])/max(steps[1] - steps[0], 1)
        print(f'a step takes {1e3*self.step:.2f} ms', flush=True)

    def crc(self, recipe):
        from balms.learner import data_crc, load_images
        return data_crc(load_images(recipe, self.a.root)[0])

    def seconds(self, recipe):
        "How long a run will take, at most"
        total = self.setup
        if not self.done(recipe.stage1): total += recipe.iters*self.step
        if recipe.iters2:
            total += recipe.iters2*(self.step2 or self.step)
            if not self.step2: total += self.compiling
        return MARGIN*total

    def go(self, recipe):
        began, two_stages = time.monotonic(), recipe != recipe.stage1 and self.done(recipe.stage1)
        row = self.run(recipe)
        took = time.monotonic() - began
        if recipe == recipe.stage1: self.step = min(self.step, row['seconds']/recipe.iters)
        elif not recipe.iters2: self.setup = max(self.setup, took)
        elif two_stages: self.step2 = max(self.step2 or 0., (took - self.setup)/recipe.iters2)
        print(f'{recipe.method:18} seed {recipe.seed}  {row["overall"]:6.2f}  {took:6.1f} s', flush=True)

    def work(self, seeds):
        for methods, some in ((FIRST, seeds), (THEN, seeds)):
            for recipe in (self.recipe(method, seed) for seed in some for method in methods):
                if self.step is None and not self.done(recipe.stage1): self.measure(recipe.stage1)
                if self.step is None: self.step = 0.                  # all of stage 1 is there
                if time.monotonic() + self.seconds(recipe) < self.end: self.go(recipe)
                else: print(f'{recipe.method:18} seed {recipe.seed}  no time', flush=True)


def unpack(file, out):
    "Put models of an earlier call where they were"
    with zipfile.ZipFile(file) as z:
        for name in z.namelist():
            if not (Path(out)/name).exists(): z.extract(name, out)


def keep(a):
    "Collect what is there into the ledger and the file of models"
    out = Path(a.out)
    if a.ledger and list(out.glob('*/row.json')): collect_rows(out, a.ledger)
    if not a.models: return
    models = [f for f in out.glob('*/model.safetensors') if any(f'-{s}-' in f.parent.name for s in STARTS)]
    new = Path(a.models).with_suffix('.new')
    with zipfile.ZipFile(new, 'w') as z:
        for f in models: z.write(f, f.relative_to(out))
    os.replace(new, a.models)


def options():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('data', choices=('cifar10', 'cifar100', 'digits'))
    p.add_argument('--root', help='folder, or packed file, of the images')
    for name, kind, default in (('imbalance', float, 100), ('seconds', float, 500), ('workers', int, 2),
                                ('seeds', int, 4), ('iters', int, None), ('iters2', int, None), ('bs', int, None)):
        p.add_argument(f'--{name}', type=kind, default=default)
    for name, default in (('out', 'runs'), ('ledger', None), ('models', None), ('device', None), ('preset', 'paper'),
                          ('precision', 'float32'), ('model', None)):
        p.add_argument(f'--{name}', default=default)
    p.add_argument('--compile', action='store_true')
    p.add_argument('--worker', type=int, help=argparse.SUPPRESS)
    return p.parse_args()


def main():
    a, began = options(), time.monotonic()
    if a.worker is not None:
        try: Worker(a, began + a.seconds).work(range(a.worker, a.seeds, a.workers))
        except Interrupted as e: print(e)
        return 0
    Path(a.out).mkdir(parents=True, exist_ok=True)
    if a.models and Path(a.models).exists(): unpack(a.models, a.out)
    os.environ['OMP_NUM_THREADS'] = str(max(1, min(4, os.cpu_count()//a.workers)))
    def command(w): return [sys.executable, '-u', *sys.argv, '--worker', str(w), '--seconds', str(a.seconds - 5)]
    workers = [subprocess.Popen(command(w)) for w in range(min(a.workers, a.seeds))]
    found = -1
    while any(w.poll() is None for w in workers):
        time.sleep(1)
        if (now := len(list(Path(a.out).glob('*/*.[js]*')))) != found:
            found = now
            keep(a)
        if time.monotonic() - began > a.seconds:
            for w in workers: w.terminate()                           # `run` writes a checkpoint first
    keep(a)
    for row in read_rows(a.out):
        scores = '  '.join(f'{name} {row[name]:6.2f}' for name in ('overall', 'many', 'medium', 'few') if name in row)
        print(f'{row["key"]:48} {scores}  {row["seconds"]:7.1f} s')
    return max(w.returncode for w in workers)


if __name__ == '__main__': raise SystemExit(main())
