"Runs ended by SIGKILL at any moment go on and end as if nothing had been, bit for bit; the same recipe gives the same bits in any process; what is damaged or foreign is named and refused."
import json, math, os, random, re, shutil, subprocess, sys, time
from pathlib import Path
import pytest, torch
from balms.recipes import METHODS, Recipe, read_ledger, run

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
ENV = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore'}
BALMS = Recipe(method='balms', iters=40, iters2=300, bs=32)


def short(method): return Recipe(method=method, iters=6, bs=32, **({'iters2': 5} if METHODS[method].two_stages else {}))


def lives(jobs, hashes=0):
    "Start `lives.py` with [(recipe, folder, lives)]; how the lives ended"
    text = json.dumps([(r.row, str(out), ls) for r, out, ls in jobs])
    p = subprocess.run([sys.executable, str(Path(__file__).with_name('lives.py'))], input=text, env={**ENV, 'PYTHONHASHSEED': str(hashes)}, capture_output=True, text=True, timeout=600)
    assert p.returncode == 0, p.stderr[-3000:]
    return json.loads(p.stdout.splitlines()[-1])


def result(out, r):
    "All of a run that must not differ: weights and rates of its stages, and its row but for time, date and commit"
    row, = [row for row in read_ledger(out/'ledger.jsonl') if row['key'] == r.key]
    files = [torch.load(out/k/'model.pt', weights_only=True) for k in {r.first.key, r.key} if (out/k/'model.pt').exists()]
    return {k: v for k, v in row.items() if k not in ('seconds', 'date', 'commit')}, files


def assert_same(a, b, r):
    (row, files), (row2, files2) = result(a, r), result(b, r)
    assert row == row2, (r.key, {k: (row[k], row2.get(k)) for k in row if row[k] != row2.get(k)})
    assert len(files) == len(files2) == len({f.name for f in a.iterdir() if f.name in (r.key, r.first.key)})
    for f, g in zip(files, files2):
        assert f['model'].keys() == g['model'].keys() and f['r'] == g['r']
        assert all(torch.equal(f['model'][k], g['model'][k]) for k in f['model']), r.key


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "Every method, not interrupted, in one process"
    out = tmp_path_factory.mktemp('whole')
    lives([(short(m), out, []) for m in METHODS], hashes=1)
    return out


def test_killed_more_than_twenty_times(tmp_path):
    "Both stages, in steps, at any time, in the middle of writing a checkpoint, between two moves, before the row and in the middle of it"
    rng = random.Random(0)
    some = lambda n: [[rng.choice(('step', 'step', 'before', 'half', 'move')), rng.randint(1, 5), rng.choice((0, 0, .03))] for _ in range(n)]
    plan = some(8) + [['time', rng.uniform(.02, .2), 0] for _ in range(3)] + [['step', 40, 0]] + some(12) + [['move', 3, 0], ['half', 2, 0], ['done', 2, 0], ['evaluate', 0, 0], ['row', 0, 0], ['row', 0, 0]]
    lives([(BALMS, tmp_path/'whole', [])])
    ends = [e for _, e in lives([(BALMS, tmp_path/'killed', plan)]) if e]
    assert len(ends) >= 20
    stage = lambda s: [e for e in ends if e.get('stage') == s.key]
    assert len(stage(BALMS.first)) >= 5 and len(stage(BALMS)) >= 5, ends
    assert {e['what'] for e in ends} == {'step', 'before', 'half', 'move', 'time', 'done', 'evaluate', 'row'}
    assert_same(tmp_path/'whole', tmp_path/'killed', BALMS)
    assert len(read_ledger(tmp_path/'killed'/'ledger.jsonl')) == 1
    assert sorted(p.name for p in (tmp_path/'killed').glob('*/*')) == ['model.pt']*2                 # nothing is left behind


def test_every_method_killed_and_resumed(whole, tmp_path):
    "In each stage that it trains, once after a step and once with half a checkpoint written"
    ends = lives([(short(m), tmp_path, [['step', 3, 0], ['half', 2, 0]]) for m in METHODS], hashes=2)
    trained = {m for m, e in ends if e}
    assert trained >= {m for m, v in METHODS.items() if v.loss}
    for m in trained: assert {e['stage'] for k, e in ends if k == m and e} == {short(m).key}, m      # in its second stage, where it has one: another has trained the first
    for m in METHODS: assert_same(whole, tmp_path, short(m))


def test_same_recipe_same_bits_for_every_method(whole, tmp_path):
    "In another process, with other hashes, in another order"
    lives([(short(m), tmp_path, []) for m in reversed(METHODS)], hashes=3)
    for m in METHODS: assert_same(whole, tmp_path, short(m))
    rows = [result(whole, short(m))[0]['nll'] for m in METHODS]
    assert len(set(rows)) > len(rows)*.8                                          # and methods differ


def stopped(out, r=BALMS, at=7):
    "A run with two checkpoints, at step `at` and one before"
    from balms.recipes import Interrupted
    for stop in (at - 1, at):
        with pytest.raises(Interrupted): run(r, out, device='cpu', stop_at=stop)
    return out/r.first.key/'checkpoint.pt'


def a_bit(path, *_):
    "One bit of a weight, which torch.load alone does not see"
    data, w = bytearray(path.read_bytes()), torch.load(path, weights_only=True)['model']['fc.weight']
    data[data.find(w.numpy().tobytes()) + 2] ^= 1; path.write_bytes(data)


class Evil:
    def __reduce__(self): return open, ('executed', 'w')


BAD = dict(truncated=lambda p: p.write_bytes(p.read_bytes()[:-1000]), empty=lambda p: p.write_bytes(b''), bit=a_bit, text=lambda p: p.write_text('no checkpoint'), other=lambda p: torch.save([1], p),
           weights=lambda p: torch.save({'w': torch.ones(2)}, p), pickle=lambda p: torch.save(dict(about=Evil(), step=1, seconds=0., model={}), p), recipe=lambda p: torch.save({**torch.load(p, weights_only=True), 'about': {}}, p))


@pytest.mark.parametrize('how', BAD)
def test_a_bad_checkpoint_is_named_and_the_one_before_is_used(tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    r = Recipe(method='bs', iters=12, bs=32)
    path = stopped(tmp_path/'b', r)
    BAD[how](path)
    with pytest.warns(UserWarning, match=r'checkpoint\.pt .*goes on from checkpoint\.old, step 6'): run(r, tmp_path/'b', device='cpu')
    run(r, tmp_path/'a', device='cpu')
    assert_same(tmp_path/'a', tmp_path/'b', r)
    assert not (tmp_path/'executed').exists()
    path = stopped(tmp_path/'c', r)
    path.with_suffix('.old').unlink(); BAD[how](path)
    with pytest.raises(ValueError, match=r'checkpoint\.pt .*no good one before it: remove checkpoint\.pt to begin anew'): run(r, tmp_path/'c', device='cpu')
    assert not read_ledger(tmp_path/'c'/'ledger.jsonl') and not (tmp_path/'executed').exists()


def test_a_file_that_cannot_be_read_now_is_not_called_bad(tmp_path, monkeypatch):
    "On a network drive that is away, or without memory: nothing is moved aside, nobody is told to delete it"
    r = Recipe(method='bs', iters=12, bs=32)
    path = stopped(tmp_path, r)
    read = Path.read_bytes
    for error in (OSError(5, 'Input/output error'), OSError(116, 'Stale file handle'), MemoryError()):
        def fails(self): 
            if self.name == 'checkpoint.pt': raise error
            return read(self)
        monkeypatch.setattr(Path, 'read_bytes', fails)
        with pytest.raises(type(error), match='' if isinstance(error, MemoryError) else r'it is not known whether this file is good.*checkpoint\.pt'): run(r, tmp_path, device='cpu')
        assert sorted(p.name for p in path.parent.iterdir()) == ['checkpoint.old', 'checkpoint.pt']
    monkeypatch.setattr(Path, 'read_bytes', read)
    run(r, tmp_path, device='cpu'); run(r, tmp_path/'a', device='cpu')
    assert_same(tmp_path/'a', tmp_path, r)


ODD = dict(step=-5, steps=10**6, seconds=math.nan, text='x', about=torch.ones(3), model={'x': torch.ones(1)}, opt={'state': {}}, rng=torch.ones(3), data=dict(pos=-5, perm=None, gen=torch.get_rng_state()), order=dict(pos=3, perm=torch.zeros(2, dtype=torch.long), gen=torch.get_rng_state()))


@pytest.mark.parametrize('what', ODD)
def test_a_checkpoint_that_does_not_fit_is_named(tmp_path, what):
    "Made with right checksums and other contents: an error with its name, at once"
    r = Recipe(method='bs', iters=12, bs=32)
    path = stopped(tmp_path, r)
    path.with_suffix('.old').unlink()
    saved = torch.load(path, weights_only=True)
    torch.save({**saved, dict(steps='step', text='seconds', order='data').get(what, what): ODD[what]}, path)
    began = time.monotonic()
    with pytest.raises(ValueError, match=r'checkpoint\.pt (is no checkpoint of this package|does not fit this run|is of step)'): run(r, tmp_path, device='cpu')
    assert time.monotonic() - began < 20 and not read_ledger(tmp_path/'ledger.jsonl')


def test_checkpoints_are_forced_to_the_disk(tmp_path, monkeypatch):
    "The file before it gets its name, and the folder after"
    told, fsync, replace = [], os.fsync, os.replace
    def name(fd): return Path(os.readlink(f'/proc/self/fd/{fd}'))
    monkeypatch.setattr(os, 'fsync', lambda fd: told.append(('fsync', name(fd).suffix or 'folder')) or fsync(fd))
    monkeypatch.setattr(os, 'replace', lambda a, b: replace(a, b) or told.append(('replace', Path(a).suffix, Path(b).suffix)))
    from balms.recipes import _save
    for _ in range(2): _save(tmp_path/'checkpoint.pt', dict(a=torch.ones(1)))
    assert told == [('fsync', '.tmp'), ('replace', '.tmp', '.pt'), ('fsync', 'folder'), ('fsync', '.tmp'), ('replace', '.pt', '.old'), ('replace', '.tmp', '.pt'), ('fsync', 'folder')]


def test_a_run_that_goes_on_in_another_way_says_so(tmp_path):
    "A warning, and in the row how the other part was done"
    r = Recipe(method='bs', iters=12, bs=32)
    stopped(tmp_path, r)
    with pytest.warns(UserWarning, match=r'checkpoint\.pt was begun in another way: micro_bs None, now 8\.'): row = run(r, tmp_path, device='cpu', micro_bs=8)
    (other,) = row['also_under']
    assert row['micro_bs'] == 8 and 'micro_bs' not in other and other['threads'] == row['threads'] and other['torch'] == row['torch']
    assert 'also_under' not in run(Recipe(method='bs', iters=12, bs=32, seed=1), tmp_path, device='cpu')
    balms = run(Recipe(method='posthoc', iters=12, bs=32), tmp_path, device='cpu')
    assert 'also_under' not in balms


@pytest.mark.parametrize('stage', (1, 2))
def test_stopped_between_the_last_step_and_the_model(tmp_path, stage):
    "Ctrl-C after training is over and before its model is saved: the model is saved, and the run says that it was stopped"
    import signal
    import balms.recipes as m
    r, n, handler = Recipe(method='balms', iters=6, iters2=5, bs=32), [0], signal.getsignal(signal.SIGINT)
    finite = m._finite
    def stop(*args):
        n[0] += 1
        if n[0] == stage: os.kill(os.getpid(), signal.SIGINT)
        finite(*args)
    m._finite = stop
    try:
        with pytest.raises(m.Interrupted, match=f'Stopped after step {(6, 5)[stage - 1]} of'): run(r, tmp_path, device='cpu')
    finally: m._finite = finite
    assert (tmp_path/(r.first, r)[stage - 1].key/'model.pt').exists() and signal.getsignal(signal.SIGINT) is handler
    run(r, tmp_path, device='cpu'); run(r, tmp_path/'a', device='cpu')
    assert_same(tmp_path/'a', tmp_path, r)


def test_a_bad_model_is_named(tmp_path):
    "Of stage 1, when stage 2 wants to begin from it"
    r = Recipe(method='bs_dt', iters=6, iters2=5, bs=32)
    run(r.first, tmp_path, device='cpu')
    a_bit(tmp_path/r.first.key/'model.pt')
    with pytest.raises(ValueError, match=r'model\.pt .*Bad CRC-32'): run(r, tmp_path, device='cpu')


def test_two_processes_in_one_folder(tmp_path):
    "The same recipes at the same time: each stage is trained once, by one of them, and each recipe has one row"
    code = f'''
import balms.recipes as m
fit = m.Learner.fit
def told(self, *args, **kw):
    with open({str(tmp_path/"fits")!r}, 'a') as f: f.write('fit\\n')
    return fit(self, *args, **kw)
m.Learner.fit = told
for method in ('bs_dt', 'balms', 'softmax'): m.run(m.Recipe(method=method, iters=30, bs=32, **(dict(iters2=20) if method != 'softmax' else {{}})), {str(tmp_path/"b")!r}, device='cpu', every=0)'''
    ps = [subprocess.Popen([sys.executable, '-c', code], env=ENV, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for p in ps: assert (err := p.communicate(timeout=300)[1], p.returncode)[1] == 0, err
    for method in ('bs_dt', 'balms', 'softmax'):
        r = Recipe(method=method, iters=30, bs=32, **(dict(iters2=20) if method != 'softmax' else {}))
        run(r, tmp_path/'a', device='cpu')
        assert_same(tmp_path/'a', tmp_path/'b', r)
    assert len(read_ledger(tmp_path/'b'/'ledger.jsonl')) == 3
    assert (tmp_path/'fits').read_text() == 'fit\n'*3                                                   # softmax, which is stage 1 of both others, and their stages 2


def test_two_processes_in_one_folder_without_locks(tmp_path):
    "As on some network drives: each trains for itself, none writes into another's file; a run may end with an error that says what it missed, and the next one has the right result"
    r = Recipe(method='bs', iters=30, bs=32)
    code = f'''
import balms.recipes as m
m._lock = lambda *args: False
m.run(m.Recipe(**{r.row!r}), {str(tmp_path/"b")!r}, device='cpu', every=0)'''
    ps = [subprocess.Popen([sys.executable, '-c', code], env=ENV, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    outs = [(p.communicate(timeout=300)[1], p.returncode) for p in ps]
    assert 0 in [c for _, c in outs] and all(c == 0 or re.search(r'No such file or directory|is not a file of weights|belongs to', e.splitlines()[-1]) for e, c in outs), outs
    run(r, tmp_path/'b', device='cpu'); run(r, tmp_path/'a', device='cpu')
    assert_same(tmp_path/'a', tmp_path/'b', r)


def test_a_disk_that_is_full(tmp_path):
    "No room for a checkpoint: an error that names it, the one before as it was, and no rest of it; with room again the run goes on"
    r = Recipe(method='bs', iters=12, bs=32)
    path = stopped(tmp_path, r)
    before = path.read_bytes()
    code = f'''
import resource, signal, balms.recipes as m
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before)//2}, resource.RLIM_INFINITY))
m.run(m.Recipe(**{r.row!r}), {str(tmp_path)!r}, device='cpu', every=0)'''
    p = subprocess.run([sys.executable, '-c', code], env=ENV, capture_output=True, text=True, timeout=200)
    assert p.returncode == 1 and f'Cannot write {path}: [Errno 27] File too large' in p.stderr, p.stderr
    assert path.read_bytes() == before and sorted(f.name for f in path.parent.iterdir()) == ['checkpoint.old', 'checkpoint.pt']
    run(r, tmp_path, device='cpu'); run(r, tmp_path/'a', device='cpu')
    assert_same(tmp_path/'a', tmp_path, r)
