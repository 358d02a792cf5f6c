"""Runs recipes in forked children, each life ended by SIGKILL where it is told to, until all are through. A process of its own, started by `test_kill_resume.py`; prints what happened as JSON.

A life is `[what, n, every]`: `every` seconds between two checkpoints, and the end comes after n training steps (`step`), before the n-th checkpoint after n steps (`before`), with half of the n-th checkpoint
written (`half`), at the n-th move of a file into its place (`move`), with the finished model of the n-th stage there but not yet cleared up (`done`), in evaluation (`evaluate`), with half of its row in the ledger (`row`), after n seconds (`time`)."""
import io, json, os, random, signal, sys, time
from contextlib import contextmanager
from pathlib import Path
import numpy as np, torch
import balms.recipes as m

seen = None                                                                   # where a life says how it ended

os.fsync = lambda fd: None                                                    # a killed process loses nothing that the system has; and there are many checkpoints


def end(what):
    where = dict(what=what, stage=current[0], step=current[1])
    os.write(seen, json.dumps(where).encode()); os.kill(os.getpid(), signal.SIGKILL)


current, steps = [None, 0], [0]


def arm(what, n):
    "Make this process end as it is told"
    count, after, replace, save, clear, evaluate, ledger = [0], m.Checkpoint.after_batch, os.replace, torch.save, m._clear, m.evaluate, m._ledger
    def nth(): count[0] += 1; return count[0] == n
    def after_batch(self):
        current[:] = self.path.parent.name, self.step + 1
        if self.training: steps[0] += 1
        if what == 'before' and self.training and nth(): end(what)
        after(self)
        if what == 'step' and self.training and nth(): end(what)
    def half(state, f, *args, **kwargs):
        if what == 'half' and nth():
            b = io.BytesIO(); save(state, b)
            f.write(b.getvalue()[:len(b.getvalue())//2]); f.flush(); end(what)
        save(state, f, *args, **kwargs)
    def move(a, b):
        if what == 'move' and nth(): end(what)
        replace(a, b)
    def cleared(folder): end(what) if what == 'done' and nth() else clear(folder)
    def evaluated(*args): return end(what) if what == 'evaluate' else evaluate(*args)
    class Half:
        def __init__(self, f): self.f = f
        def __getattr__(self, name): return getattr(self.f, name)
        def write(self, line): self.f.write(line[:len(line)//2]); end(what)
    @contextmanager
    def torn(path):
        with ledger(path) as (f, rows): yield (Half(f) if what == 'row' else f), rows
    m.Checkpoint.after_batch, torch.save, os.replace, m._clear, m.evaluate, m._ledger = after_batch, half, move, cleared, evaluated, torn


def life(recipe, out, what=None, n=0, every=30.):
    "How one life ended: None if it was through, else what it said. Raises if it ended otherwise"
    global seen
    read, seen = os.pipe()
    pid = os.fork()
    if not pid:
        code = 1
        torch.manual_seed(int.from_bytes(os.urandom(7), 'big')); np.random.seed(int.from_bytes(os.urandom(4), 'big')); random.seed()     # nothing may come from what was before
        try: arm(what, n); m.run(recipe, out, device='cpu', every=every); code = 0
        except BaseException: sys.excepthook(*sys.exc_info()); sys.stderr.flush()
        finally: os._exit(code)
    os.close(seen)
    if what == 'time': time.sleep(n); os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    said = os.read(read, 4096); os.close(read)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL: return json.loads(said or json.dumps(dict(what=what)))
    if status: raise SystemExit(f'{recipe.key}: ended with status {status} in {what}')


if __name__ == '__main__':
    ends = []
    for recipe, out, lives in json.loads(sys.stdin.read()):
        recipe = m.Recipe(**recipe)
        for l in lives: ends.append([recipe.method, life(recipe, Path(out), *l)])
        if life(recipe, Path(out)) is not None: raise SystemExit('the last life was ended, too')
    print(json.dumps(ends))
