"""As many rows of the paper's CIFAR tables as fit into so many seconds, on a GPU that you have for minutes.

    python tools/timed_runs.py cifar100 --imbalance 100 --root cifar100_lt100.npz --seconds 500 --out runs \\
        --precision bfloat16 --graphs [--compile] [--workers 2] [--seeds 1] [--methods softmax,bs,balms]

Several processes (`--workers`) train at once, since one alone leaves the GPU waiting. First Softmax, since its model
serves all the methods that train a classifier again, with Balanced Softmax beside it; then these methods; then the
others of the paper's Tables 2 and 8; seed by seed. The first steps are timed, and no run is begun that would not end in
time, as far as can be told from those that have ended.

Each row is `OUT/<key>/row.json` as soon as there is one; `--ledger` also collects them in a file, and `--models` the
trained networks of first stages, with the checkpoints of those that are under way at the end. The same command goes on
from what is in OUT, or in these files, also after it was killed. Without the history of git, give the commit in the
environment variable BALMS_COMMIT.
"""
import argparse
import multiprocessing
import os
import time
import zipfile
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from balms.checkpoint import Interrupted, read_checkpoint
from balms.learner import data_crc, load_images
from balms.methods import METHODS
from balms.recipe import Recipe
from balms.rows import collect_rows, read_rows
from balms.runs import run

FIRST = 'softmax bs posthoc bs_dt balms bs_cbs_dt crt lws dt_ms bs_dt_mr bs_quarter_dt bs_quarter_dt_ms'.split()
THEN = 'cbs bs_quarter class_balanced ldam eql focal cbw ldam_drw cbs_bs bs_bs bs_cbs bs_s cbs_s cbs_cbs s_s'.split()
MARGIN = 1.15                                                         # an estimate may be so much too low


def options():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('data', choices=('cifar10', 'cifar100', 'digits'))
    p.add_argument('--root', help='folder, or packed file, of the images')
    for name, kind, default in (('imbalance', float, 100), ('seconds', float, 500), ('workers', int, 3),
                                ('seeds', int, 2), ('iters', int, None), ('iters2', int, None), ('bs', int, None)):
        p.add_argument(f'--{name}', type=kind, default=default)
    for name, default in (('out', 'runs'), ('ledger', None), ('models', None), ('device', None), ('preset', 'paper'),
                          ('precision', 'float32'), ('model', None), ('methods', ','.join(FIRST + THEN))):
        p.add_argument(f'--{name}', default=default)
    for name in ('compile', 'graphs'): p.add_argument(f'--{name}', action='store_true')
    a = p.parse_args()
    a.methods = a.methods.split(',')
    return a


def recipe(a, method, seed):
    iters2 = a.iters2 if METHODS[method].two_stages else None
    return Recipe(a.data, a.imbalance, method, a.preset, seed=seed, precision=a.precision, iters=a.iters, iters2=iters2,
                  model=a.model, bs=a.bs)


def train(a, r):
    "Train by a recipe, in a process of its own: its row, and the seconds that all of it took"
    began = time.monotonic()
    try: row = run(r, a.out, a.root, a.device, compile=a.compile, graphs=a.graphs, every=10.)
    except Interrupted: row = None
    return r, row, time.monotonic() - began


class Estimate:
    "How long a run takes, by the checkpoints of those that are under way, and by those that have ended"
    def __init__(self, a):
        self.a, self.step, self.second, self.seen = a, None, None, {}            # seconds of a step, of a second stage
        self.crc = data_crc(load_images(recipe(a, 'softmax', 0), a.root)[0])

    def watch(self, recipes):
        "Seconds of a step, from two checkpoints"
        for r in recipes:
            state = read_checkpoint(Path(self.a.out)/r.key, dict(recipe=r.identity, train_crc=self.crc))
            if state is None or r != r.stage1: continue
            now = state['step'], state['seconds']
            before = self.seen.setdefault(r.key, now)
            if self.step is None and now[0] > before[0]:
                self.step = (now[1] - before[1])/(now[0] - before[0])
                print(f'a step takes {1e3*self.step:.2f} ms', flush=True)

    def learn(self, r, took, row):
        if r == r.stage1: self.step = row['seconds']/r.iters
        elif r.iters2: self.second = max(self.second or 0, took)

    def seconds(self, r, has_stage1):
        "At most"
        second = (self.second or 20.) if r != r.stage1 else 8.
        return MARGIN*(second + (0. if has_stage1 else r.iters*(self.step or 0.)))


def keep(a):
    "Collect what is there into the ledger and the file of models and checkpoints"
    out = Path(a.out)
    if a.ledger and list(out.glob('*/row.json')): collect_rows(out, a.ledger)
    if not a.models: return
    stage1 = {recipe(a, m, seed).stage1.key for m in a.methods for seed in range(a.seeds)}
    new = Path(a.models).with_suffix('.new')
    with zipfile.ZipFile(new, 'w') as z:
        for f in sorted([*out.glob('*/model.safetensors'), *out.glob('*/checkpoint.pt')]):
            if f.parent.name in stage1: z.write(f, f.relative_to(out))
    os.replace(new, a.models)


def work(a, pool, end):
    "Start what can be started, in order, whenever a process is free"
    out, estimate, waiting, running = Path(a.out), Estimate(a), [], set()
    def done(r): return (out/r.key/'model.safetensors').exists()
    for group in (FIRST, THEN):
        waiting += [recipe(a, m, seed) for seed in range(a.seeds) for m in group if m in a.methods]
    waiting.sort(key=lambda r: r.method != 'softmax' and (r.method, r.seed) != ('bs', 0))       # others wait for these
    under_way = {}
    while True:
        for r in list(waiting):
            if len(running) == a.workers: break
            if r != r.stage1 and not done(r.stage1) or r.stage1.key in under_way: continue
            waiting.remove(r)
            if time.monotonic() + estimate.seconds(r, done(r.stage1)) > end:
                print(f'{r.method:18} seed {r.seed}  no time', flush=True)
                continue
            running.add(pool.submit(train, a, r))
            if r == r.stage1: under_way[r.key] = r
        if not running: return
        ended, running = wait(running, 2., FIRST_COMPLETED)
        if time.monotonic() > end and not ended: return
        if estimate.step is None: estimate.watch(under_way.values())
        for future in ended:
            r, row, took = future.result()
            under_way.pop(r.key, None)
            estimate.learn(r, took, row)
            print(f'{r.method:18} seed {r.seed}  {row["overall"]:6.2f}  {took:6.1f} s', flush=True)
            keep(a)


def main():
    a, began = options(), time.monotonic()
    Path(a.out).mkdir(parents=True, exist_ok=True)
    if a.models and Path(a.models).exists():
        with zipfile.ZipFile(a.models) as z:
            z.extractall(a.out, [name for name in z.namelist() if not (Path(a.out)/name).exists()])
    os.environ['OMP_NUM_THREADS'] = str(max(1, min(4, os.cpu_count()//a.workers)))
    pool = ProcessPoolExecutor(a.workers, multiprocessing.get_context('spawn'))
    try: work(a, pool, began + a.seconds)
    finally:
        for process in list((pool._processes or {}).values()): process.terminate()  # a run writes a checkpoint first
        pool.shutdown(wait=True, cancel_futures=True)
    keep(a)
    for row in read_rows(a.out):
        known = [name for name in ('overall', 'many', 'medium', 'few') if row.get(name) is not None]
        scores = '  '.join(f'{name} {row[name]:6.2f}' for name in known)
        print(f'{row["key"]:48} {scores}  {row["seconds"]:7.1f} s')


if __name__ == '__main__': main()
