"Runs ended by SIGKILL at any moment go on and end as if nothing had been, bit for bit; a damaged file is named."
import json, os, random, signal, subprocess, sys
import pytest, torch
from balms.checkpoint import Interrupted
from balms.methods import METHODS
from balms.recipe import Recipe
from balms.rows import read_row
from balms.runs import run
from balms.weights import read_metadata, read_tensors

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
ENV = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore'}
BALMS = Recipe(method='balms', iters=40, iters2=300, bs=32)
BS = Recipe(method='bs', iters=12, bs=32)

# Run in a process of its own: it forks a child for each life [what, n, every] and says which stage was killed.
# `every` seconds between two checkpoints; SIGKILL comes after n training steps ('step'), with half of the n-th file
# written ('half'), before the n-th file gets its name ('move'), or after n seconds ('time').
LIVES = '''
import json, os, random, signal, sys, time
import numpy as np, torch
from balms.checkpoint import Checkpoint
from balms.learner import load_images
from balms.recipe import Recipe
from balms.runs import run

after_batch, replace, count = Checkpoint.after_batch, os.replace, [0]

def count_to(n, stage):
    count[0] += 1
    if count[0] != n: return
    os.write(said, stage.encode())
    os.kill(os.getpid(), signal.SIGKILL)

def arm(what, n):
    stage = ['']
    def after_step(self):
        stage[0] = self.folder.name
        after_batch(self)
        if what == 'step': count_to(n, stage[0])
    def half(fd):
        if what != 'half': return
        if count[0] + 1 == n: os.ftruncate(fd, os.fstat(fd).st_size//2)
        count_to(n, stage[0])
    def move(a, b):
        if what == 'move': count_to(n, stage[0])
        replace(a, b)
    Checkpoint.after_batch, os.fsync, os.replace = after_step, half, move

def life(recipe, out, what=None, n=0, every=30.):
    global said
    read, said = os.pipe()
    pid = os.fork()
    if not pid:
        seed = int.from_bytes(os.urandom(4), 'big')              # nothing may come from what was before
        torch.manual_seed(seed); np.random.seed(seed); random.seed(seed)
        code = 1
        try: arm(what, n); run(recipe, out, device='cpu', every=every); code = 0
        except BaseException: sys.excepthook(*sys.exc_info()); sys.stderr.flush()
        finally: os._exit(code)
    os.close(said)
    if what == 'time': time.sleep(n); os.kill(pid, signal.SIGKILL)
    status, stage = os.waitpid(pid, 0)[1], os.read(read, 4096).decode()
    os.close(read)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL: return [what, stage]
    if status: raise SystemExit(f'{recipe.key}: ended with status {status} in {what}')

ends = []
for recipe, out, lives in json.loads(sys.stdin.read()):
    recipe = Recipe(**recipe)
    load_images(recipe)                                          # imports happen once, before the forks
    ends += [life(recipe, out, *l) for l in lives]
    if life(recipe, out): raise SystemExit('the last life was ended, too')
print(json.dumps(ends))
'''


def lives(jobs, hashes=0):
    "Live through [(recipe, folder, lives)]: (what, key of the stage) of each kill"
    text, env = json.dumps([(r.to_row(), str(out), ls) for r, out, ls in jobs]), {**ENV, 'PYTHONHASHSEED': str(hashes)}
    p = subprocess.run([sys.executable, '-c', LIVES], input=text, env=env, capture_output=True, text=True, timeout=600)
    assert p.returncode == 0, p.stderr[-3000:]
    return [end for end in json.loads(p.stdout.splitlines()[-1]) if end]


def result(out, r):
    "All of a run that must not differ: its row but for time and environment; weights and rates of its stages"
    row = {k: v for k, v in read_row(out/r.key).items() if k not in ('seconds', 'environments')}
    files = [out/key/'model.safetensors' for key in dict.fromkeys((r.stage1.key, r.key))]
    return row, [read_tensors(f) for f in files], [read_metadata(f).get('r') for f in files]


def assert_same(a, b, r):
    (row, tensors, rates), (row2, tensors2, rates2) = result(a, r), result(b, r)
    assert row == row2 and rates == rates2
    for s, t in zip(tensors, tensors2):
        assert s.keys() == t.keys() and all(torch.equal(s[k], t[k]) for k in s), r.key


def left(out):
    "Names of the files in the folders of runs"
    return sorted({f.name for f in out.glob('*/*') if f.name != '.lock'})


def test_killed_twenty_times(tmp_path):
    "Both stages, after steps, at any time, in the middle of writing a file, between two moves"
    rng = random.Random(0)
    def some(n):
        every = (0, 0, .03)
        return [[rng.choice(('step', 'step', 'half', 'move')), rng.randint(1, 5), rng.choice(every)] for _ in range(n)]
    in_stage1 = some(8) + [['step', 40, 0], ['half', 2, 0], ['move', 2, 0]]
    in_stage2 = some(9) + [['time', rng.uniform(.05, .3), 0], ['step', 250, 0], ['half', 1, .1]]
    lives([(BALMS, tmp_path/'whole', [])])
    ends = lives([(BALMS, tmp_path/'killed', in_stage1 + in_stage2)])
    stages = [stage for _, stage in ends]
    assert len(ends) >= 20 and {what for what, _ in ends} >= {'step', 'half', 'move'}
    assert stages.count(BALMS.stage1.key) >= 5 and stages.count(BALMS.key) >= 5, ends
    assert_same(tmp_path/'whole', tmp_path/'killed', BALMS)
    assert left(tmp_path/'killed') == ['model.safetensors', 'row.json']


def short(method): return Recipe(method=method, iters=6, bs=32, **({'iters2': 5} if METHODS[method].two_stages else {}))


SOME = ['eql', 'ldam_drw', 'lws', 'bs_dt_mr', 'ncm', 'posthoc']


@pytest.mark.parametrize('methods', [SOME, pytest.param(list(METHODS), marks=pytest.mark.slow)], ids=('some', 'all'))
def test_methods_killed_and_resumed(tmp_path, methods):
    "After a step, and with half a checkpoint written; in another process, with other hashes, in another order"
    lives([(short(m), tmp_path/'whole', []) for m in methods], hashes=1)
    kills = [['step', 3, 0], ['half', 3, 0]]
    ends = lives([(short(m), tmp_path/'killed', kills) for m in reversed(methods)], hashes=2)
    trained = {short(m).key for m in methods if METHODS[m].loss}
    assert trained <= {stage for _, stage in ends}
    for m in methods: assert_same(tmp_path/'whole', tmp_path/'killed', short(m))
    assert len({result(tmp_path/'whole', short(m))[0]['nll'] for m in methods}) > .8*len(methods)      # methods differ


def stopped(out, r=BS, at=7):
    "The newest checkpoint of a run that has two, at step `at` and one before"
    for stop in (at - 1, at):
        with pytest.raises(Interrupted): run(r, out, device='cpu', stop_at=stop)
    return out/r.stage1.key/'checkpoint.pt'


def change_a_bit(path):
    "One bit of a weight, which torch.load alone does not see"
    data, weight = bytearray(path.read_bytes()), torch.load(path, weights_only=True)['model']['fc.weight']
    data[data.find(weight.numpy().tobytes()) + 2] ^= 1
    path.write_bytes(data)


DAMAGES = dict(truncated=lambda p: p.write_bytes(p.read_bytes()[:-1000]), empty=lambda p: p.write_bytes(b''),
               bit=change_a_bit, text=lambda p: p.write_text('no checkpoint'))


@pytest.mark.parametrize('how', DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, how):
    path = stopped(tmp_path/'b')
    DAMAGES[how](path)
    with pytest.warns(UserWarning, match=r'checkpoint\.pt .*checkpoint\.old\.pt, step 6'):
        run(BS, tmp_path/'b', device='cpu')
    run(BS, tmp_path/'a', device='cpu')
    assert_same(tmp_path/'a', tmp_path/'b', BS)
    path = stopped(tmp_path/'c')
    path.with_name('checkpoint.old.pt').unlink()
    DAMAGES[how](path)
    with pytest.raises(ValueError, match=r'checkpoint\.pt'): run(BS, tmp_path/'c', device='cpu')
    assert not (path.parent/'row.json').exists()


def test_a_checkpoint_of_another_recipe_is_named(tmp_path):
    path, other = stopped(tmp_path), tmp_path/Recipe(method='bs', iters=12, bs=32, seed=1).key
    path.parent.rename(other)
    with pytest.raises(ValueError, match=r'checkpoint\.pt'):
        run(Recipe(method='bs', iters=12, bs=32, seed=1), tmp_path, device='cpu')


def test_a_damaged_model_is_named(tmp_path):
    "Of stage 1, when stage 2 wants to begin from it"
    r = Recipe(method='bs_dt', iters=6, iters2=5, bs=32)
    run(r.stage1, tmp_path, device='cpu')
    path = tmp_path/r.stage1.key/'model.safetensors'
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r'model\.safetensors'): run(r, tmp_path, device='cpu')


def test_a_run_that_goes_on_in_another_way_says_so(tmp_path):
    "Both ways are in the row of the run, and of the methods that start from it; normally there is one"
    stopped(tmp_path, Recipe(method='softmax', iters=12, bs=32))
    row = run(Recipe(method='softmax', iters=12, bs=32), tmp_path, device='cpu', micro_bs=8)
    whole, cut = row['environments']
    assert 'micro_bs' not in whole and cut == dict(whole, micro_bs=8)
    assert len(run(Recipe(method='posthoc', iters=12, bs=32), tmp_path, device='cpu')['environments']) == 2
    assert len(run(BS, tmp_path, device='cpu')['environments']) == 1


@pytest.mark.parametrize('stage', (1, 2))
def test_stopped_between_the_last_step_and_the_model(tmp_path, monkeypatch, stage):
    "Ctrl-C after training is over and before its model is saved: the model is saved, and the run says it was stopped"
    import balms.stage
    r, n, handler = Recipe(method='balms', iters=6, iters2=5, bs=32), [0], signal.getsignal(signal.SIGINT)
    save = balms.stage.save_model
    def save_model(*args, **kwargs):
        n[0] += 1
        if n[0] == stage: os.kill(os.getpid(), signal.SIGINT)
        save(*args, **kwargs)
    monkeypatch.setattr(balms.stage, 'save_model', save_model)
    with pytest.raises(Interrupted): run(r, tmp_path, device='cpu')
    assert (tmp_path/(r.stage1, r)[stage - 1].key/'model.safetensors').exists()
    assert signal.getsignal(signal.SIGINT) is handler
    for out in (tmp_path, tmp_path/'a'): run(r, out, device='cpu')
    assert_same(tmp_path/'a', tmp_path, r)


def test_three_processes_in_one_folder(tmp_path):
    "The same recipes at the same time: each stage is trained once, by one of them, and the others say that they wait"
    recipes = [Recipe(method=m, iters=30, bs=32, iters2=20) for m in ('bs_dt', 'balms')]
    recipes.append(recipes[0].stage1)
    code = f'''
from balms.recipe import Recipe
from balms.runs import run
from fastai.learner import Learner
fit = Learner.fit
def told(self, *args, **kw):
    with open({str(tmp_path/"fits")!r}, 'a') as f: f.write('fit\\n')
    return fit(self, *args, **kw)
Learner.fit = told
for r in {[r.to_row() for r in recipes]!r}: run(Recipe(**r), {str(tmp_path/"b")!r}, device='cpu', every=0)'''
    line = [sys.executable, '-c', code]
    ps = [subprocess.Popen(line, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    outs = [p.communicate(timeout=300) for p in ps]
    assert [p.returncode for p in ps] == [0]*3, outs
    for r in recipes:
        run(r, tmp_path/'a', device='cpu')
        assert_same(tmp_path/'a', tmp_path/'b', r)
    assert (tmp_path/'fits').read_text() == 'fit\n'*3            # stage 1 of both, and their stages 2
    assert 'Waiting for another process' in ''.join(out for out, _ in outs)


def test_a_disk_that_is_full(tmp_path):
    "No room for a checkpoint: an error that names it, the one before as it was; with room again the run goes on"
    path = stopped(tmp_path)
    before = path.read_bytes()
    code = f'''
import resource, signal
from balms.recipe import Recipe
from balms.runs import run
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before)//2}, resource.RLIM_INFINITY))
run(Recipe(**{BS.to_row()!r}), {str(tmp_path)!r}, device='cpu', every=0)'''
    p = subprocess.run([sys.executable, '-c', code], env=ENV, capture_output=True, text=True, timeout=200)
    assert p.returncode == 1 and 'File too large' in p.stderr and 'checkpoint' in p.stderr.splitlines()[-1], p.stderr
    assert path.read_bytes() == before and left(tmp_path) == ['checkpoint.old.pt', 'checkpoint.pt']
    for out in (tmp_path, tmp_path/'a'): run(BS, out, device='cpu')
    assert_same(tmp_path/'a', tmp_path, BS)
