"Runs of two and four processes on CPU: the weights of one process, the same rates on all, killed and resumed, and what happens when one of them ends."
import os, signal, socket, subprocess, sys, time
from importlib.util import find_spec
import pytest, torch
from balms.image_lists import sample_tree
from balms.recipes import Recipe, read_ledger, run

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason='torch without torch.distributed')
NET = '''
import os, sys, torch, balms.models as models, balms.recipes as m
from collections import OrderedDict
from torch import nn
def plain(k, in_channels=3):
    "A network without batch normalisation"
    return nn.Sequential(OrderedDict(body=nn.Sequential(nn.Conv2d(in_channels, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()), fc=nn.Linear(32, k)))
models.MODELS['plain'] = plain
'''
exec(NET)
LIST = dict(model='plain', size=24, bs=16, iters=8, threads=1)
DIGITS = dict(model='plain', bs=32, iters=12, augment='none')


@pytest.fixture(scope='module')
def tree(tmp_path_factory): return sample_tree(tmp_path_factory.mktemp('lists')/'digits', n_max=32, imbalance=16)


def start(world, code, net=NET):
    "Processes that run `code`, as torchrun would start them"
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port), 'WORLD_SIZE': str(world)}
    return [subprocess.Popen([sys.executable, '-c', net + code], env={**env, 'RANK': str(i), 'LOCAL_RANK': str(i)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for i in range(world)]


def call(world, code, net=NET):
    ps = start(world, code, net)
    outs = [p.communicate(timeout=200) for p in ps]
    return [(p.returncode, *o) for p, o in zip(ps, outs)]


def runs(recipes, out, **kw): return f'''
for r in {[r.row for r in recipes]!r}: print(m.run(m.Recipe(**r), {str(out)!r}, device='cpu', workers=1, **{kw!r})['nll'])'''


def both(recipes, out, **kw):
    "Run on two processes; both must say the same"
    (c0, o0, e0), (c1, o1, e1) = call(2, runs(recipes, out, **kw))
    assert c0 == c1 == 0, e0 + e1
    assert o0 == o1


def model(out, r): return torch.load(out/r.key/'model.pt', weights_only=True)


def close(a, b, r, *worlds):
    "The same weights, rates and scores, to rounding; `worlds`: processes of both, else one and two"
    x, y = model(a, r), model(b, r)
    for k in x['model']: torch.testing.assert_close(x['model'][k], y['model'][k], rtol=1e-3, atol=1e-4)
    if x['r']: torch.testing.assert_close(torch.tensor(x['r']), torch.tensor(y['r']), rtol=1e-3, atol=1e-4)
    (p,), (q,) = ([row for row in read_ledger(d/'ledger.jsonl') if row['key'] == r.key] for d in (a, b))
    assert abs(p['nll'] - q['nll']) < 1e-3 and p['counts'] == q['counts'] and (p.get('processes', 1), q.get('processes', 1)) == (worlds*2 or (1, 2))


def test_two_processes_are_one(tree, tmp_path):
    "Lists with windows and jitter in workers, and images in memory: the weights, rates and scores of one process; also for weighted losses, and in pieces"
    recipes = [Recipe(tree, method=m, augment='window', **LIST, **({'iters2': 8} if m in ('balms', 'bs_dt_mr', 'lws') else {})) for m in ('cbw', 'balms', 'bs_dt_mr', 'lws', 'cbs')]
    recipes += [Recipe(method=m, **DIGITS, **({'iters2': 10} if m == 'balms' else {})) for m in ('cbw', 'balms')]
    for r in recipes: run(r, tmp_path/'one', device='cpu', workers=1)
    both(recipes, tmp_path/'two')
    for r in recipes: close(tmp_path/'one', tmp_path/'two', r)
    assert len(read_ledger(tmp_path/'two'/'ledger.jsonl')) == len(recipes)           # one of them writes
    both(recipes[:2], tmp_path/'pieces', micro_bs=3)
    for r in recipes[:2]: close(tmp_path/'one', tmp_path/'pieces', r)


@pytest.mark.parametrize('data,method,stage', [('lists', 'balms', 1), ('lists', 'balms', 2), ('digits', 'balms', 2), ('digits', 'eql', 1)], ids=str)
def test_killed_and_resumed(tree, tmp_path, data, method, stage):
    "Both processes killed in the middle of a stage, with batch normalisation and augmentation, and a loss that draws numbers of its own on each (eql); resumed, both stages are those of a run that was not killed, bit for bit"
    kw = dict(model='resnet8', size=24, bs=16, iters=9, iters2=8, augment='window', threads=1) if data == 'lists' else dict(bs=32, iters=6, iters2=8)
    r = Recipe(tree if data == 'lists' else 'digits', method=method, **({k: v for k, v in kw.items() if k != 'iters2'} if method == 'eql' else kw))
    both([r], tmp_path/'a')
    hit = r.first.key if stage == 1 else r.key
    kill = f'''
import signal
write = m.Checkpoint._write
def _write(self, state):
    write(self, state)
    if self.path.parent.name == {hit!r} and self.step == 4: self.ranks.agree(True); os.kill(os.getpid(), signal.SIGKILL)
m.Checkpoint._write = _write'''
    assert [c for c, _, _ in call(2, kill + runs([r], tmp_path/'b', every=0))] == [-signal.SIGKILL]*2
    assert torch.load(tmp_path/'b'/hit/'checkpoint.pt', weights_only=True)['step'] == 4 and not (tmp_path/'b'/hit/'model.pt').exists()
    with pytest.raises(ValueError, match='was saved by 2 processes, and these are 1'): run(r, tmp_path/'b', device='cpu')
    both([r], tmp_path/'b')
    for stage in (r.first, r):
        a, b = model(tmp_path/'a', stage), model(tmp_path/'b', stage)
        assert all(torch.equal(a['model'][k], b['model'][k]) for k in a['model']) and a['r'] == b['r']
    assert read_ledger(tmp_path/'a'/'ledger.jsonl')[-1]['nll'] == read_ledger(tmp_path/'b'/'ledger.jsonl')[-1]['nll']


def test_one_that_is_killed_ends_the_other(tmp_path):
    "Within a minute, with a message that says what happened"
    kill = '''
import signal
agree = m.Ranks.agree
def _agree(self, *flags):
    self.n = getattr(self, 'n', 0) + 1
    if self.rank == 1 and self.n == 5: os.kill(os.getpid(), signal.SIGKILL)
    return agree(self, *flags)
m.Ranks.agree = _agree'''
    began = time.monotonic()
    (c0, _, e0), (c1, _, _) = call(2, kill + runs([Recipe(method='bs', **DIGITS)], tmp_path))
    assert c1 == -signal.SIGKILL and c0 == 1 and 'lost the others: one has ended' in e0 and time.monotonic() - began < 60, e0


def test_an_error_in_one_ends_the_other(tree, tmp_path):
    "An image that only the second process reads"
    code = '''
import balms.image_lists as il
image = il.ImageListDataset.image
def broken(self, i):
    if os.environ['RANK'] == '1': raise ValueError('a damaged image')
    return image(self, i)
il.ImageListDataset.image = broken'''
    began = time.monotonic()
    (c0, _, e0), (c1, _, e1) = call(2, code + runs([Recipe(tree, method='bs', **LIST)], tmp_path))
    assert time.monotonic() - began < 60
    assert c0 == c1 == 1 and 'a damaged image' in e1 and 'lost the others' in e0, e0


def test_errors_of_all(tree, tmp_path):
    "What cannot be is said by each, and nobody waits"
    for (r, kw), what in (((Recipe(method='bs', **{**DIGITS, 'bs': 33}), {}), 'bs=33 cannot be shared out between 2 processes'), ((Recipe(method='bs', **DIGITS), dict(sync_bn=True)), 'sync_bn needs a CUDA device')):
        for c, _, e in call(2, runs([r], tmp_path, **kw)): assert c == 1 and what in e, e


TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', '2', '--standalone']
ACCELERATE = [sys.executable, '-m', 'accelerate.commands.launch', '--main_process_port', '0']
accelerate = pytest.mark.skipif(not find_spec('accelerate'), reason='accelerate is not installed')


def command(line, cwd, *more):
    return subprocess.run([*line, '-m', 'balms.cli', 'train', '--method', 'bs', '--seeds', '1', '--iters', '20', '--device', 'cpu', *more], cwd=cwd, env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore'}, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope='module')
def by_torchrun(tmp_path_factory): d = tmp_path_factory.mktemp('torchrun'); return command(TORCHRUN, d), d/'runs'/'ledger.jsonl'


def test_command(by_torchrun):
    "One line starts it: one table, from the first process"
    r, ledger = by_torchrun
    assert r.returncode == 0 and r.stdout.count('Balanced Softmax') == 1 and r.stdout.count('[1/1]') == 1, r.stderr
    assert read_ledger(ledger)[0]['processes'] == 2


@accelerate
def test_accelerate_starts_what_torchrun_starts(tmp_path, by_torchrun):
    "The same scores by two processes, to the last digit"
    r = command([*ACCELERATE, '--multi_gpu', '--num_processes', '2'], tmp_path)
    assert r.returncode == 0 and r.stdout.count('[1/1]') == 1, r.stderr
    (a,), (b,) = map(read_ledger, (by_torchrun[1], tmp_path/'runs'/'ledger.jsonl'))
    assert a['processes'] == b['processes'] == 2 and a['nll'] == b['nll'] and a['per_class'] == b['per_class']


@accelerate
def test_accelerate_with_one_process_says_so(tmp_path):
    "--cpu starts one process whatever the number, and precision is not accelerate's affair: both are said"
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    env.pop('PYTHONWARNINGS', None)
    r = subprocess.run([*ACCELERATE, '--cpu', '--num_processes', '2', '--mixed_precision', 'bf16', '-m', 'balms.cli', 'train', '--method', 'bs', '--seeds', '1', '--iters', '20', '--device', 'cpu'], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
    assert r.returncode == 0 and 'accelerate has started one process, whatever --num_processes says' in r.stderr and 'mixed_precision=bf16 of accelerate is not looked at' in r.stderr, r.stderr
    (row,) = read_ledger(tmp_path/'runs'/'ledger.jsonl')
    assert 'processes' not in row and row['recipe']['precision'] == 'float32'


def test_four_processes_are_one(tmp_path):
    "Gradients in every step, learned rates, scores: those of one process; for both ways to share out a loss"
    recipes = [Recipe(method=m, **DIGITS, **({'iters2': 10} if m == 'balms' else {})) for m in ('cbw', 'balms')]
    for r in recipes: run(r, tmp_path/'one', device='cpu')
    outs = call(4, runs(recipes, tmp_path/'four'))
    assert [c for c, _, _ in outs] == [0]*4, ''.join(e for _, _, e in outs)
    assert len({o for _, o, _ in outs}) == 1                                        # all say the same
    for r in recipes:
        x, y = model(tmp_path/'one', r), model(tmp_path/'four', r)
        for k in x['model']: torch.testing.assert_close(x['model'][k], y['model'][k], rtol=1e-3, atol=1e-4)
        if x['r']: torch.testing.assert_close(torch.tensor(x['r']), torch.tensor(y['r']), rtol=1e-3, atol=1e-4)
    p, q = (read_ledger(tmp_path/d/'ledger.jsonl') for d in ('one', 'four'))
    assert len(q) == 2 and all(row['processes'] == 4 for row in q)
    for a, b in zip(p, q): assert a['counts'] == b['counts'] and abs(a['nll'] - b['nll']) < 1e-3 and abs(a['overall'] - b['overall']) < .5 and len(b['per_class']) == 10


GRAD = '''
import torch, torch.distributed as dist
from torch import nn
from balms.core import BalancedSoftmax
dist.init_process_group('gloo')
torch.manual_seed(0)
rank, world = dist.get_rank(), dist.get_world_size()
x, y, net, loss = torch.randn(24, 6), torch.randint(5, (24,)), nn.Linear(6, 5), BalancedSoftmax([1000, 100, 10, 5, 1])
ddp = nn.parallel.DistributedDataParallel(net)
loss(ddp(x.chunk(world)[rank]), y.chunk(world)[rank]).backward()
torch.save([p.grad for p in net.parameters()], f'{OUT}.{world}.{rank}')
dist.destroy_process_group()
'''


@pytest.mark.parametrize('world', (2, 4))
def test_gradients_are_those_of_one_process(tmp_path, world):
    "The loss alone, in DistributedDataParallel as anyone would use it"
    for c, _, e in call(world, f'OUT = {str(tmp_path/"g")!r}' + GRAD, ''): assert c == 0, e
    torch.manual_seed(0)
    from balms.core import BalancedSoftmax
    x, y, net = torch.randn(24, 6), torch.randint(5, (24,)), torch.nn.Linear(6, 5)
    BalancedSoftmax([1000, 100, 10, 5, 1])(net(x), y).backward()
    for rank in range(world):
        for p, g in zip(net.parameters(), torch.load(f'{tmp_path}/g.{world}.{rank}', weights_only=True)): torch.testing.assert_close(p.grad, g)


def test_one_of_four_dies_and_the_run_resumes(tmp_path):
    "The third is killed in stage 2, after a checkpoint: the others end within a minute with an error that says so; the same four go on and end with the weights, rates and scores of the run that was whole"
    r = Recipe(method='balms', bs=32, iters=6, iters2=8)
    line = runs([r], tmp_path/'a', every=0)
    assert [c for c, _, _ in call(4, line)] == [0]*4
    die = '''
import signal
agree = m.Ranks.agree
def _agree(self, *flags):
    self.n = getattr(self, 'n', 0) + 1
    if self.rank == 2 and self.n == 11: os.kill(os.getpid(), signal.SIGKILL)
    return agree(self, *flags)
m.Ranks.agree = _agree'''
    ps = start(4, die + runs([r], tmp_path/'b', every=0))
    assert ps[2].wait(200) == -signal.SIGKILL
    began = time.monotonic()
    errs = [p.communicate(timeout=90)[1] for p in ps]
    assert time.monotonic() - began < 60 and [p.returncode for p in ps] == [1, 1, -signal.SIGKILL, 1]
    for i in (0, 1, 3): assert f'Process {i} of 4 lost the others: one has ended' in errs[i] and 'goes on from the last checkpoint' in errs[i], errs[i]
    step = torch.load(tmp_path/'b'/r.key/'checkpoint.pt', weights_only=True)['step']
    assert 0 < step < 8 and not read_ledger(tmp_path/'b'/'ledger.jsonl')
    assert [c for c, _, _ in call(4, runs([r], tmp_path/'b'))] == [0]*4
    close(tmp_path/'a', tmp_path/'b', r, 4)                                          # to rounding: with more than two, the order of a sum depends on how DistributedDataParallel has packed the gradients
    assert len(read_ledger(tmp_path/'b'/'ledger.jsonl')) == 1
