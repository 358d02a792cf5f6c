"""L2RW and Meta-Weight-Net: weights and gradients against second derivatives, resumed runs, what they leave alone."""
import itertools
import pytest, torch, torch.nn.functional as F
from fastai.callback.core import Callback, CancelFitException
from fastai.learner import Learner
from fastai.optimizer import SGD
from torch import nn
from balms.array_loader import array_dls
from balms.baselines import FocalLoss
from balms.checkpoint import Interrupted
from balms.core import BalancedSoftmax, plain_tensor
from balms.long_tail import ArrayDataset
from balms.recipe import Recipe
from balms.runs import run
from balms.sample_weights import LearnToReweight, MetaWeightNet
from balms.weights import read_tensors

COUNTS = [60, 25, 10, 5]
LR = .2


def data():
    y = torch.arange(4).repeat_interleave(torch.tensor(COUNTS))
    images = torch.randint(256, (100, 1, 3, 3), generator=torch.Generator().manual_seed(0))
    return ArrayDataset((images//2 + 30*y.view(-1, 1, 1, 1)).clamp(max=255).byte(), y, list('abcd'))


class Stop(Callback):
    "One meta batch for all; training ends before step `at`"
    order = 61
    def __init__(self, cb, at): self.cb, self.at = cb, at
    def before_train(self):
        x, y = next(iter(self.dls.valid))
        self.meta = plain_tensor(x)[::3], plain_tensor(y)[::3]
        self.cb.meta_batches = itertools.repeat(((self.meta[0],), self.meta[1]))
    def before_step(self):
        self.batch = plain_tensor(self.x), plain_tensor(self.y)
        if self.train_iter >= self.at: raise CancelFitException


def trained(cb, loss, frozen, at=2, **kwargs):
    torch.manual_seed(0)
    ds, stop = data(), Stop(cb, at)
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 4))
    if frozen: net[1].requires_grad_(False)
    dls = array_dls(ds, ds, bs=20, device='cpu')
    learn = Learner(dls, net, loss_func=loss, opt_func=SGD, cbs=[cb, stop], **kwargs)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, LR)
    return net, stop


def meta_loss(net, loss, weights, batch, meta):
    "After a plain step on the weighted mean of `loss`, with a graph to the weights"
    (x, y), values = batch, dict(net.named_parameters())
    def forward(values, x): return torch.func.functional_call(net, values, (x,))
    names = [n for n, p in values.items() if p.requires_grad]
    terms = loss(forward(values, x), y)
    grads = torch.autograd.grad((weights*terms).mean(), [values[n] for n in names], create_graph=True)
    after = {n: values[n] - LR*g for n, g in zip(names, grads)}
    return F.cross_entropy(forward({**values, **after}, meta[0]), meta[1]), terms.detach()


losses = pytest.mark.parametrize('make', (nn.CrossEntropyLoss, lambda **kw: BalancedSoftmax(COUNTS, **kw),
                                          lambda **kw: FocalLoss(COUNTS, **kw)), ids=('ce', 'bs', 'focal'))
part = pytest.mark.parametrize('frozen', (False, True), ids=('whole', 'classifier'))


@losses
@part
def test_l2rw_is_the_second_derivative(make, frozen):
    "In the third step, after two that moved the network"
    cb = LearnToReweight()
    net, stop = trained(cb, make(), frozen)
    weights = torch.zeros(20, requires_grad=True)
    value, _ = meta_loss(net, make(reduction='none'), weights, stop.batch, stop.meta)
    useful = (-torch.autograd.grad(value, weights)[0]).clamp_min(0)
    assert cb.closed_form == frozen and 0 < (useful == 0).float().mean() < 1
    torch.testing.assert_close(cb.sample_weights, useful/useful.mean(), rtol=1e-3, atol=1e-4)


@losses
@part
@pytest.mark.parametrize('normalize', (False, True))
def test_mwn_is_the_second_derivative(make, frozen, normalize):
    cb = MetaWeightNet(normalize=normalize, lr=0.)                  # so that the small network stays what it was
    net, stop = trained(cb, make(), frozen)
    _, terms = meta_loss(net, make(reduction='none'), torch.ones(20), stop.batch, stop.meta)
    v = cb.weigher(terms[:, None])[:, 0]
    weights = v/v.mean() if normalize else v
    torch.testing.assert_close(cb.sample_weights, weights.detach(), rtol=1e-5, atol=1e-6)
    value, _ = meta_loss(net, make(reduction='none'), weights, stop.batch, stop.meta)
    want = torch.autograd.grad(value, list(cb.weigher.parameters()))
    largest = max(g.abs().max() for g in want)
    for p, g in zip(cb.weigher.parameters(), want): assert (p.grad - g).abs().max() < 1e-3*largest


@pytest.mark.parametrize('make', (LearnToReweight, MetaWeightNet))
def test_the_step_is_that_of_the_weighted_loss(make):
    "The network's gradient is that of the weighted mean, and nothing of the meta step's is left in it"
    cb = make()
    net, stop = trained(cb, nn.CrossEntropyLoss(), False, at=0)
    (x, y), got = stop.batch, [p.grad.clone() for p in net.parameters()]
    (cb.sample_weights*F.cross_entropy(net(x), y, reduction='none')).mean().backward(inputs=list(net.parameters()))
    for p, g in zip(net.parameters(), got): torch.testing.assert_close(p.grad - g, g, rtol=1e-4, atol=1e-6)


def test_without_a_learning_rate_all_count_alike():
    ds = data()
    cb, dls = LearnToReweight(), array_dls(ds, ds, bs=20, device='cpu')
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(9, 4)), loss_func=nn.CrossEntropyLoss(), cbs=cb)
    with learn.no_bar(), learn.no_logging(), pytest.warns(UserWarning, match='learning rate is 0'): learn.fit(1, 0.)
    assert cb.sample_weights.tolist() == [1.]*20


@pytest.mark.parametrize('method', ('l2rw', 'mwn'))
def test_stopped_and_resumed(method, tmp_path):
    "To the last bit, and no rates of classes in the row"
    r = Recipe(method=method, iters=30, bs=32)
    row = run(r, tmp_path/'a', device='cpu')
    with pytest.raises(Interrupted): run(r, tmp_path/'b', device='cpu', stop_at=13)
    again = run(r, tmp_path/'b', device='cpu')
    a, b = (read_tensors(tmp_path/d/r.key/'model.safetensors') for d in 'ab')
    assert all(torch.equal(a[k], b[k]) for k in a) and row['nll'] == again['nll'] and 'r' not in row


def test_another_training_set_gets_a_new_network():
    cb = MetaWeightNet(lr=.1)
    trained(cb, nn.CrossEntropyLoss(), False)
    first = cb.weigher
    trained(cb, nn.CrossEntropyLoss(), False)
    assert cb.weigher is not first and cb.weigher_opt.param_groups[0]['params'][0] is cb.weigher[0].weight


def test_a_compiled_network_is_refused(tmp_path):
    "Before anything is compiled"
    with pytest.raises(ValueError, match='MetaWeightNet.*leave out compile'):
        run(Recipe(method='mwn', iters=5, bs=32), tmp_path, device='cpu', compile=True)
