"Runs of two processes on CPU: the weights of one process, killed and resumed, and what happens when one of them ends."
import os, signal, socket, subprocess, sys, time
from collections import OrderedDict
from importlib.util import find_spec
import pytest, torch
from torch import nn
import balms.models
from balms.core import BalancedSoftmax
from balms.lists import sample_tree
from balms.recipe import Recipe
from balms.rows import read_row, read_rows
from balms.runs import run
from balms.weights import read_metadata, read_tensors

pytestmark = pytest.mark.skipif(not (torch.distributed.is_available() and find_spec('accelerate')),
                                reason='needs torch.distributed and accelerate: pip install "balms[distributed]"')
ENV = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore'}
LIST = dict(model='plain', size=24, bs=16, iters=8, threads=1)
DIGITS = dict(model='plain', bs=32, iters=12, augment='none')


def plain(k, in_channels=3):
    "A network without batch normalisation"
    body = nn.Sequential(nn.Conv2d(in_channels, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return nn.Sequential(OrderedDict(body=body, fc=nn.Linear(32, k)))


HEAD = '''
import os, signal, torch
from balms.checkpoint import Checkpoint
from balms.models import MODELS
from balms.recipe import Recipe
from balms.runs import run
from balms.scale import Ranks
from test_distributed import plain
MODELS['plain'] = plain
'''


@pytest.fixture(autouse=True)
def _plain(monkeypatch): monkeypatch.setitem(balms.models.MODELS, 'plain', plain)


@pytest.fixture(scope='module')
def tree(tmp_path_factory): return sample_tree(tmp_path_factory.mktemp('lists')/'digits', n_max=32, imbalance=16)


def start(world, code):
    "Processes that run `code`, as torchrun would start them"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    path = os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
    env = {**ENV, 'PYTHONPATH': path, 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port), 'WORLD_SIZE': str(world)}
    return [subprocess.Popen([sys.executable, '-c', HEAD + code], env={**env, 'RANK': str(i), 'LOCAL_RANK': str(i)},
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for i in range(world)]


def call(world, code):
    "(exit status, output, errors) of each process"
    ps = start(world, code)
    outs = [p.communicate(timeout=200) for p in ps]
    return [(p.returncode, *o) for p, o in zip(ps, outs)]


def runs(recipes, out, **kw):
    return f'''
for r in {[r.to_row() for r in recipes]!r}:
    print(run(Recipe(**r), {str(out)!r}, device='cpu', workers=1, **{kw!r})['nll'])'''


def run_on(world, recipes, out, **kw):
    "Run on so many processes; all must say the same"
    outs = call(world, runs(recipes, out, **kw))
    assert [c for c, _, _ in outs] == [0]*world, ''.join(e for _, _, e in outs)
    assert len({o for _, o, _ in outs}) == 1


def saved(out, r):
    file = out/r.key/'model.safetensors'
    return read_tensors(file), read_metadata(file).get('r')


def assert_close(a, b, r, world=2):
    "The same weights, rates and scores as one process has, to rounding"
    (x, rates), (y, rates2) = saved(a, r), saved(b, r)
    for k in x: torch.testing.assert_close(x[k], y[k], rtol=1e-3, atol=1e-4)
    if rates: torch.testing.assert_close(torch.tensor(rates), torch.tensor(rates2), rtol=1e-3, atol=1e-4)
    p, q = read_row(a/r.key), read_row(b/r.key)
    assert abs(p['nll'] - q['nll']) < 1e-3 and p['counts'] == q['counts']
    assert [e.get('processes', 1) for row in (p, q) for e in row['environments']] == [1, world]


def test_two_processes_are_one(tree, tmp_path):
    "Lists with windows and jitter in workers, and images in memory; also for weighted losses, and in pieces"
    second = dict(iters2=8)
    recipes = [Recipe(tree, method=m, augment='window', **LIST) for m in ('cbw', 'cbs')]
    recipes += [Recipe(tree, method=m, augment='window', **LIST, **second) for m in ('balms', 'bs_dt_mr', 'lws')]
    recipes += [Recipe(method='cbw', **DIGITS), Recipe(method='balms', **DIGITS, iters2=10)]
    for r in recipes: run(r, tmp_path/'one', device='cpu', workers=1)
    run_on(2, recipes, tmp_path/'two')
    for r in recipes: assert_close(tmp_path/'one', tmp_path/'two', r)
    assert len(read_rows(tmp_path/'two')) == len(recipes)
    pieces = recipes[-1]                                             # no augmentation: pieces draw their own numbers
    run_on(2, [pieces], tmp_path/'pieces', micro_bs=4)
    assert_close(tmp_path/'one', tmp_path/'pieces', pieces)


@pytest.mark.slow
def test_four_processes_are_one(tmp_path):
    recipes = [Recipe(method='cbw', **DIGITS), Recipe(method='balms', **DIGITS, iters2=10)]
    for r in recipes: run(r, tmp_path/'one', device='cpu')
    run_on(4, recipes, tmp_path/'four')
    for r in recipes: assert_close(tmp_path/'one', tmp_path/'four', r, 4)


KILL = '''
save = Checkpoint.save
def save_and_die(self):
    save(self)
    if self.folder.name == {key!r} and self.step == 4:
        self.ranks.agree(True)                                       # all have saved
        os.kill(os.getpid(), signal.SIGKILL)
Checkpoint.save = save_and_die
'''


@pytest.mark.parametrize('data,method,stage', [pytest.param('lists', 'balms', 1, marks=pytest.mark.slow),
                                               ('lists', 'balms', 2), ('digits', 'eql', 1)])
def test_killed_and_resumed(tree, tmp_path, data, method, stage):
    "Both processes, in the middle of a stage, with augmentation, and a loss that draws random numbers on each (eql)"
    lists = dict(model='resnet8', size=24, bs=16, iters=9, augment='window', threads=1)
    kw = lists if data == 'lists' else dict(bs=32, iters=6)
    if method == 'balms': kw = dict(kw, iters2=8)
    r = Recipe(tree if data == 'lists' else 'digits', method=method, **kw)
    run_on(2, [r], tmp_path/'a')
    key = r.stage1.key if stage == 1 else r.key
    outs = call(2, KILL.format(key=key) + runs([r], tmp_path/'b', every=0))
    assert [c for c, _, _ in outs] == [-signal.SIGKILL]*2
    assert torch.load(tmp_path/'b'/key/'checkpoint.pt', weights_only=True)['step'] == 4
    with pytest.raises(ValueError, match='2 processes'): run(r, tmp_path/'b', device='cpu')
    run_on(2, [r], tmp_path/'b')
    for s in (r.stage1, r):
        (x, rates), (y, rates2) = saved(tmp_path/'a', s), saved(tmp_path/'b', s)
        assert all(torch.equal(x[k], y[k]) for k in x) and rates == rates2
    assert read_row(tmp_path/'a'/r.key)['nll'] == read_row(tmp_path/'b'/r.key)['nll']


def test_one_that_is_killed_ends_the_other(tmp_path):
    "Within a minute, with a message that says what happened"
    kill = '''
agree, n = Ranks.agree, [0]
def agree_or_die(self, *flags):
    n[0] += 1
    if self.rank == 1 and n[0] == 5: os.kill(os.getpid(), signal.SIGKILL)
    return agree(self, *flags)
Ranks.agree = agree_or_die'''
    began = time.monotonic()
    (c0, _, e0), (c1, _, _) = call(2, kill + runs([Recipe(method='bs', **DIGITS)], tmp_path))
    assert c1 == -signal.SIGKILL and c0 == 1 and 'LostProcess' in e0 and time.monotonic() - began < 60, e0


def test_an_error_in_one_ends_the_other(tree, tmp_path):
    "An image that only the second process reads"
    code = '''
from balms.list_loader import ImageListDataset
image = ImageListDataset.image
def broken(self, i):
    if os.environ['RANK'] == '1': raise ValueError('a damaged image')
    return image(self, i)
ImageListDataset.image = broken'''
    (c0, _, e0), (c1, _, e1) = call(2, code + runs([Recipe(tree, method='bs', **LIST)], tmp_path))
    assert c0 == c1 == 1 and 'a damaged image' in e1 and 'LostProcess' in e0, e0


def test_errors_of_all(tmp_path):
    "What cannot be done is said by each, and nobody waits"
    even, uneven = Recipe(method='bs', **DIGITS), Recipe(method='bs', **{**DIGITS, 'bs': 33})
    for r, kw, what in ((uneven, {}, 'bs=33'), (even, dict(sync_bn=True), 'sync_bn')):
        for c, _, e in call(2, runs([r], tmp_path, **kw)): assert c == 1 and what in e, e


TORCHRUN = 'torch.distributed.run --nproc_per_node 2 --standalone'
ACCELERATE = 'accelerate.commands.launch --main_process_port 0 --multi_gpu --num_processes 2'


@pytest.mark.parametrize('launch', [TORCHRUN, pytest.param(ACCELERATE, marks=pytest.mark.slow)])
def test_command(tmp_path, launch):
    "One line starts it: one table, from the first process"
    line = f'-m {launch} -m balms.cli train --method bs --seeds 1 --iters 20 --device cpu'.split()
    p = subprocess.run([sys.executable, *line], cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=200)
    assert p.returncode == 0, p.stderr
    assert p.stdout.count('Balanced Softmax') == 1 and p.stdout.count('[1/1]') == 1
    (row,) = read_rows(tmp_path/'runs')
    assert row['environments'][0]['processes'] == 2


GRAD = '''
from torch import distributed as dist, nn
from balms.core import BalancedSoftmax
dist.init_process_group('gloo')
torch.manual_seed(0)
rank, world, loss = dist.get_rank(), dist.get_world_size(), BalancedSoftmax([1000, 100, 10, 5, 1])
x, y, net = torch.randn(24, 6), torch.randint(5, (24,)), nn.Linear(6, 5)
ddp = nn.parallel.DistributedDataParallel(net)
loss(ddp(x.chunk(world)[rank]), y.chunk(world)[rank]).backward()
torch.save([p.grad for p in net.parameters()], f'{OUT}.{rank}')
dist.destroy_process_group()
'''


def test_gradients_are_those_of_one_process(tmp_path):
    "The loss alone, in DistributedDataParallel as anyone would use it"
    for c, _, e in call(2, f'OUT = {str(tmp_path/"g")!r}' + GRAD): assert c == 0, e
    torch.manual_seed(0)
    x, y, net = torch.randn(24, 6), torch.randint(5, (24,)), nn.Linear(6, 5)
    BalancedSoftmax([1000, 100, 10, 5, 1])(net(x), y).backward()
    for rank in range(2):
        grads = torch.load(f'{tmp_path}/g.{rank}', weights_only=True)
        for p, g in zip(net.parameters(), grads): torch.testing.assert_close(p.grad, g)


def test_one_process_needs_no_accelerate(tmp_path):
    "Neither installed nor imported"
    code = "import sys; sys.modules['accelerate'] = None; from balms.cli import main; main(sys.argv[1:])"
    line = 'train --method bs --seeds 1 --iters 5 --device cpu'.split()
    p = subprocess.run([sys.executable, '-c', code, *line], cwd=tmp_path, env=ENV, capture_output=True, text=True)
    assert p.returncode == 0, p.stderr
    two = {**ENV, 'WORLD_SIZE': '2', 'RANK': '0'}
    p = subprocess.run([sys.executable, '-c', code, *line], cwd=tmp_path, env=two, capture_output=True, text=True)
    assert p.returncode == 2 and 'balms[distributed]' in p.stderr
