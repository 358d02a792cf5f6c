"The Meta Sampler and the Meta Reweighter as a user meets them: inside a `Learner`, resumed, exported, on two ranks"
import os, random, subprocess, sys, textwrap
from copy import deepcopy
from functools import partial
import fastai.callback.progress  # noqa: F401 (`no_bar`)
import numpy as np
import pytest, torch, torch.nn.functional as F
from PIL import Image
from torch import nn
from hypothesis import given, settings, strategies as st
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.schedule import Learner
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import load_learner
from fastai.optimizer import Adam, OptimWrapper
from fastai.vision.all import ImageDataLoaders, aug_transforms, resnet18, vision_learner
import balms.influence
from balms.augment import CropFlip
from balms.baselines import CosineLinear
from balms.core import BalancedSoftmax, balanced_softmax_loss, class_counts
from balms.data import FeatureBank, array_dls, load_digits, long_tail
from balms.decoupled import ClassifierOnly, feature_bank
from balms.influence import weight_gradient
from balms.meta import MetaReweighter, MetaSampler
from balms.meta_gradient import ClassRates, rate_gradient, soft_draw
from balms.models import get_model
from balms.sampled_loader import resampled
from balms.samplers import ClassSampler, sampling_rates

SGD = partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9, nesterov=True, weight_decay=1e-3)
COUNTS = torch.tensor([400, 120, 40, 12])
BOTH = pytest.mark.parametrize('cls', [MetaSampler, MetaReweighter])
WEIGHT = torch.tensor([1., 2., 1., 3.])


def bank(counts=COUNTS, d=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(len(counts)).repeat_interleave(counts)
    features = torch.randn(len(y), d, generator=g) + 2*torch.randn(len(counts), d, generator=g)[y]
    return FeatureBank(features, y, [str(i) for i in range(len(counts))])


def digits():
    train, test = load_digits()
    return long_tail(train, 20), test


def learner(ds, model, cbs=(), loss=None, n=6, bs=32, valid=None, augment=None, opt=SGD, lr=.1):
    dls = array_dls(ds, valid or ds, bs=bs, n_batches=n, augment=augment, device='cpu')
    loss = loss or BalancedSoftmax.from_dls(dls)
    learn = Learner(dls, model, loss_func=loss, opt_func=opt, lr=lr, cbs=cbs, train_bn=False)
    drop = ['progress']
    if ds.images.dtype == torch.float64: drop.append('recorder')                       # fastai's knows float32 only
    return learn.remove_cbs([cb for cb in learn.cbs if cb.name in drop])


def fit(learn, n=1, cbs=None):
    with learn.no_logging(): learn.fit(n, cbs=cbs)
    return learn


def linear(seed=0, d=5, k=4):
    torch.manual_seed(seed)
    return nn.Linear(d, k)


def two_layers(seed=0, d=5, k=4):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(d, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(.3), nn.Linear(8, k))


class SeenLabels(Callback):
    "The labels of each training batch"
    order, run_valid = 61, False
    def __init__(self): self.seen = []
    def before_batch(self): self.seen.append(self.yb[0].as_subclass(torch.Tensor).clone())
    def shares(self, k): return torch.bincount(torch.cat(self.seen), minlength=k)/sum(map(len, self.seen))


class Fail(Callback):
    "An error in the third training batch"
    order = 70
    def before_batch(self):
        if self.training and self.iter == 2: raise ZeroDivisionError('stop')


# --- one step, beside the definitions

def one_step(cls, counts=COUNTS, **kwargs):
    "One step of a callback on float64 features, and what the training batch and the classifier were before"
    ds, model = bank(counts), linear().double()
    ds.images = ds.images.double()
    cb = cls(lr=.01, seed=3, trial='sgd', **kwargs)
    class Before(Callback):
        order, run_valid = 61, False
        def before_batch(self):
            self.features, self.labels = self.xb[0].clone(), self.yb[0].as_subclass(torch.Tensor).clone()
            self.params = [p.detach().clone().requires_grad_() for p in model.parameters()]
    before = Before()
    fit(learner(ds, model, [cb, before], n=1, bs=16, lr=.3))
    return ds, cb, before


def second_order(ds, before, w, weights):
    "Gradient of the meta loss after the weighted step, by w: the paper's construction, by autograd twice"
    weight, bias = before.params
    counts = class_counts(ds)
    losses = balanced_softmax_loss(before.features @ weight.T + bias, before.labels, counts, reduction='none')
    g = torch.autograd.grad((weights*losses).mean(), [weight, bias], create_graph=True)
    i = ClassSampler(ds, sampling_rates(counts, 0.), seed=4).draw(16)
    logits = ds.images[i] @ (weight - .3*g[0]).T + bias - .3*g[1]
    return torch.autograd.grad(F.cross_entropy(logits, ds.targets[i]), w)[0]


def rings_of(noise, classes, rates, counts):
    "When each image of classes of up to four rings (b, N), and which of them is drawn (b,), from `soft_draw`'s noise"
    b, k = len(classes), len(rates)
    clocks = -noise.double().log()
    first, gaps = clocks[:, 0], clocks[:, 1:].view(b, 4, k)
    rings = torch.empty(b, int(counts.sum()), dtype=torch.float64)
    starts = counts.cumsum(0) - counts
    for row in range(b):
        for c in range(k):
            time, images = first[row].clone(), list(range(starts[c], starts[c] + counts[c]))
            if c == classes[row]: rings[row, images.pop(0)] = time
            for j, image in enumerate(images):
                time = time + gaps[row, j, c]/(len(images) - j)*counts[c]/rates[c]
                rings[row, image] = time
    return rings, starts[classes]


def straight_through(w, noise, classes, counts):
    "The weight of each loss by the paper's text: one-hot draws over all images, with the gradient of the soft ones"
    image_class = torch.arange(len(counts)).repeat_interleave(counts)
    rates = (counts.double().log() + F.logsigmoid(w)).softmax(0).detach()
    rings, drawn = rings_of(noise, classes, rates, counts)
    gumbel = -(rings*(rates/counts)[image_class]).log()
    soft = (F.logsigmoid(w)[image_class] + gumbel).softmax(1)                               # b x N
    assert torch.equal(soft.argmax(1), drawn)
    hard = F.one_hot(drawn, len(image_class)) + soft - soft.detach()
    return hard.gather(1, drawn[:, None])[:, 0]


def test_a_step_of_the_sampler_is_that_of_likelihood_ratios():
    ds, cb, before = one_step(MetaSampler)
    w = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    log_rates = (COUNTS.double().log() + F.logsigmoid(w)).log_softmax(0)[before.labels]
    want = second_order(ds, before, w, (log_rates - log_rates.detach()).exp())
    assert want.abs().max() > 1e-5
    torch.testing.assert_close(cb.psi.w.grad.double(), want, rtol=1e-4, atol=1e-9)


def test_a_step_of_the_papers_estimator_is_the_papers_construction():
    "Instance-level straight-through draws, a B x N matrix, and autograd twice; exact for classes of up to four images"
    counts = torch.tensor([4, 4, 3, 1])
    ds, cb, before = one_step(MetaSampler, counts, estimator='gumbel')
    noise = torch.rand(1, 16, 17, generator=torch.Generator().manual_seed(5))[0]
    w = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    want = second_order(ds, before, w, straight_through(w, noise, before.labels, counts))
    assert want.abs().max() > 1e-5
    torch.testing.assert_close(cb.psi.w.grad.double(), want, rtol=1e-4, atol=1e-8)


def test_a_step_of_the_reweighter_is_its_definition():
    ds, cb, before = one_step(MetaReweighter)
    w = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    weights = w.sigmoid()[before.labels]
    want = second_order(ds, before, w, weights/weights.mean())
    torch.testing.assert_close(cb.psi.w.grad.double(), want, rtol=1e-4, atol=1e-9)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(1, 12), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_gradients_of_rates_and_weights_are_autograds(counts, b, seed):
    g, counts = torch.Generator().manual_seed(seed), torch.tensor(counts)
    w = torch.randn(len(counts), generator=g).double().requires_grad_()
    log_rates = (counts.double().log() + F.logsigmoid(w)).log_softmax(0)
    rates, slope = log_rates.detach().exp(), 1 - w.detach().sigmoid()
    y, u = torch.multinomial(rates, b, replacement=True, generator=g), torch.randn(b, generator=g).double()
    noise = torch.rand(b, 1 + 4*len(counts), generator=g).double().clamp_min(1e-6)
    want, = torch.autograd.grad((u*log_rates[y]).sum(), w)
    torch.testing.assert_close(rate_gradient(u, y, rates)*slope, want, rtol=1e-6, atol=1e-9)
    want, = torch.autograd.grad((u*straight_through(w, noise, y, counts)).sum(), w)
    got = rate_gradient(u, y, rates, 'gumbel', counts, lambda shape: noise)
    torch.testing.assert_close(got*slope, want, rtol=1e-6, atol=1e-9)
    s = w.sigmoid()[y]
    want, = torch.autograd.grad((u*s/s.mean()).sum(), w)
    s = (s/s.mean()).detach()
    torch.testing.assert_close(weight_gradient(u*s, y, s, len(counts))*slope, want, rtol=1e-6, atol=1e-9)


def every_clock(classes, rates, counts, g):
    "The paper's B x N construction, given the classes that are drawn: share, masses, when images ring, their class"
    image_class = torch.arange(len(counts)).repeat_interleave(counts)
    rand = partial(torch.rand, generator=g, dtype=torch.float64)
    first = -rand(len(classes), 1).log()
    rings = first - rand(len(classes), len(image_class)).log()/(rates/counts)[image_class]
    rings.scatter_(1, (counts.cumsum(0) - counts)[classes][:, None], first)
    sums = torch.zeros(len(classes), len(counts)).double().index_add_(1, image_class, 1/rings)
    return 1/first[:, 0]/sums.sum(1), sums/sums.sum(1, keepdim=True), rings, image_class


UNEVEN = torch.tensor([900, 200, 30, 4])
TWO_RATES = pytest.mark.parametrize('rates', [UNEVEN.double()/UNEVEN.sum(), torch.full((4,), .25).double()])


@TWO_RATES
def test_soft_draws_of_the_same_clocks_differ_by_what_is_left_out(rates):
    "Of each class the first four rings are given: the rest has the right mean, and the spread that the page states"
    g = torch.Generator().manual_seed(0)
    y = torch.multinomial(rates, 3000, replacement=True, generator=g)
    share, mass, rings, image_class = every_clock(y, rates, UNEVEN, g)
    first, gaps = rings.min(1, keepdim=True)[0], torch.ones(len(y), 4, 4).double()
    for c in range(4):
        own = rings[:, image_class == c]
        others = own.masked_fill(own == first, torch.inf).sort(1)[0][:, :4]
        waiting = (UNEVEN[c] - (y == c).long())[:, None] - torch.arange(4)
        gaps[:, :, c] = (torch.cat([first, others], 1).diff(dim=1)*rates[c]/UNEVEN[c]*waiting).where(waiting > 0, 1.)
    noise = torch.cat([(-first).exp(), (-gaps.flatten(1)).exp()], 1)
    share_4, mass_4 = soft_draw(y, rates, UNEVEN, noise)
    apart = mass/(share*first[:, 0])[:, None] - mass_4/(share_4*first[:, 0])[:, None]      # of the sums of 1/R
    assert apart[:, 3].abs().max() < 1e-7*(1/first).max()
    fourth = first + gaps.cumsum(1)[:, 3]/rates                                             # for large classes
    bound = (rates/fourth).sqrt()[:, :2]
    z = apart[:, :2]/bound
    assert (z.square().mean(0) < 1.1).all() and (z.mean(0).abs() < 4/3000**.5).all()


@TWO_RATES
def test_soft_draws_have_the_means_and_spreads_of_the_papers(rates):
    g = torch.Generator().manual_seed(0)
    y = torch.multinomial(rates, 30_000, replacement=True, generator=g)
    noise = torch.rand(len(y), 17, generator=g).double()
    found = []
    for share, mass in (every_clock(y, rates, UNEVEN, g)[:2], soft_draw(y, rates, UNEVEN, noise)):
        found.append(torch.stack([share, *mass.T, *(share[:, None]*mass).T]))
    theirs, ours = found
    z = (ours.mean(1) - theirs.mean(1))/(theirs.var(1) + ours.var(1)).sqrt()*len(y)**.5
    assert z.abs().max() < 4
    torch.testing.assert_close(ours.std(1)[:4], theirs.std(1)[:4], rtol=.04, atol=0)


@given(st.floats(1e-6, 1.), st.integers(1, 10**6), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_soft_draws_are_distributions(rare, n, seed):
    rates = torch.tensor([1., rare])
    rates /= rates.sum()
    y, noise = torch.arange(2).repeat(50), torch.rand(100, 9, generator=torch.Generator().manual_seed(seed))
    noise[0], noise[1] = 0, 1 - 2**-24                                                     # the ends of what rand gives
    share, mass = soft_draw(y, rates, torch.tensor([n, 1]), noise)
    assert share.isfinite().all() and mass.isfinite().all() and (share > 0).all()
    assert (mass.gather(1, y[:, None])[:, 0] >= share*(1 - 1e-5)).all()
    torch.testing.assert_close(mass.sum(1), torch.ones(100))


@pytest.mark.parametrize('estimator', ['expected', 'gumbel'])
def test_an_influence_that_all_samples_share_moves_no_rate(estimator):
    "Likelihood ratios cancel in a batch in proportion, the paper's on average; a class-level draw has 0.067"
    g, counts = torch.Generator().manual_seed(0), torch.tensor([9000, 1000])
    y = torch.tensor([0]*9 + [1]).repeat(20_000)
    uniform = partial(torch.rand, generator=g, dtype=torch.float64)
    shared, rates = torch.full((len(y),), 1/len(y)).double(), counts.double()/10_000
    got = rate_gradient(shared, y, rates, estimator, counts, uniform)
    assert got.abs().max() < (1e-12 if estimator == 'expected' else .003)


# --- closed form and autograd

@pytest.mark.parametrize('trial', ['optimizer', 'sgd'])
@BOTH
def test_closed_form_and_autograd_agree_in_a_learner(cls, trial):
    got = []
    for backprop in ('closed', 'autograd'):
        cb = cls(backprop=backprop, trial=trial, lr=.1)
        learn = fit(learner(bank(), linear(), [cb], n=20))
        got.append((cb.psi.w.detach(), learn.model.weight.detach()))
    assert got[0][0].abs().max() > .05
    for a, b in zip(*got): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('loss', [
    nn.CrossEntropyLoss(), BalancedSoftmax(COUNTS, weight=WEIGHT), BalancedSoftmax(COUNTS, label_smoothing=.1),
    BalancedSoftmax(COUNTS, reduction='sum')])
def test_any_loss_gives_the_same_influence_both_ways(loss):
    grads = {}
    for backprop in ('closed', 'autograd'):
        cb = MetaSampler(backprop=backprop, estimator='expected')
        fit(learner(bank(), linear(), [cb], deepcopy(loss), n=1, lr=.01))
        grads[backprop] = cb.psi.w.grad
    torch.testing.assert_close(grads['closed'], grads['autograd'], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize('drift', [False, True])
def test_frozen_network_on_images_with_normalisation_drifting_or_not(drift):
    train, test = digits()
    got = []
    for backprop in ('closed', 'autograd'):
        torch.manual_seed(0)
        net, cb = get_model('small_cnn', 10, 1), MetaSampler(backprop=backprop, estimator='expected')
        fit(learner(train, net, [ClassifierOnly(drift), cb], n=8, valid=test))
        got.append((cb.psi.w.detach(), net.body[0][1].running_mean.clone()))
    torch.testing.assert_close(got[0][0], got[1][0], rtol=1e-3, atol=1e-5)
    assert torch.equal(got[0][1], got[1][1]) and bool(got[0][1].abs().sum() > 0) == drift


def test_dropout_is_the_same_in_both_passes(monkeypatch):
    "By autograd the training batch passes again: its shares must sum to the loss of the first pass"
    sums, losses, shares_of = [], [], balms.influence.loss_shares
    def watched(*args):
        shares = shares_of(*args)
        sums.append(float(torch.func.debug_unwrap(shares).sum()))
        return shares
    monkeypatch.setattr(balms.influence, 'loss_shares', watched)
    class Watch(Callback):
        run_valid = False
        def after_loss(self): losses.append(self.loss.item())
    fit(learner(bank(), two_layers(), [MetaSampler(), Watch()], n=5))
    assert len(sums) == 5 and sums == pytest.approx(losses, rel=1e-5)


def test_nonlinear_heads_go_by_autograd():
    for head in (CosineLinear(5, 4), nn.utils.parametrizations.weight_norm(linear())):
        cb = MetaSampler()
        fit(learner(bank(), head, n=3), cbs=[cb])
        assert not cb.closed_form and cb.psi.w.grad.abs().sum() > 0
        with pytest.raises(ValueError, match='last linear layer'):
            fit(learner(bank(), head, n=1), cbs=[MetaSampler(backprop='closed')])


# --- training is left alone

@pytest.mark.parametrize('frozen', [False, True])
@pytest.mark.parametrize('make', [linear, two_layers])
def test_training_is_that_without_the_meta_step(make, frozen):
    "Weights, normalisation statistics, optimiser state and random numbers: nothing but the rates is touched"
    got, cb = [], MetaSampler(lr=0.)
    for cbs in ([cb], []):
        net = make()
        if frozen and make is two_layers:
            for p in net[:-1].parameters(): p.requires_grad_(False)
        learn = learner(bank(), net, cbs, n=20)
        if not cbs: learn.dls.train.sampler = ClassSampler(bank(), seed=0)
        fit(learn)
        momentum = [learn.opt.opt.state[p]['momentum_buffer'] for p in net.parameters() if p.requires_grad]
        got.append([*net.state_dict().values(), *momentum, torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*got))
    assert torch.equal(cb.psi.w, torch.zeros(4)) and cb.psi.w.grad.abs().sum() > 0


@pytest.mark.parametrize('loss', [
    lambda: BalancedSoftmax(COUNTS), lambda: BalancedSoftmax(COUNTS, weight=WEIGHT),
    lambda: nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=.1), lambda: partial(F.cross_entropy, weight=WEIGHT),
    lambda: nn.CrossEntropyLoss(ignore_index=0)])
def test_reweighter_starts_as_plain_training_with_any_loss(loss):
    a = fit(learner(bank(), linear(), [MetaReweighter(lr=0.)], loss(), n=20))
    b = fit(learner(bank(), linear(), loss=loss(), n=20))
    torch.testing.assert_close(a.model.weight, b.model.weight, rtol=1e-4, atol=1e-5)


def test_goes_on_from_fit_to_fit_and_leaves_nothing_behind():
    learn, cb = learner(bank(), linear(), n=5), MetaSampler(record=1)
    sampler = learn.dls.train.sampler
    fit(learn, cbs=[cb])
    w = cb.psi.w.detach().clone()
    fit(learn, cbs=[cb])
    assert cb.n_steps == 10 and len(cb.history) == 10 and not torch.equal(w, cb.psi.w)
    assert learn.dls.train.sampler is sampler and not learn.model._forward_hooks and not learn.model._forward_pre_hooks
    cb.plot()


@pytest.mark.parametrize('make', [linear, two_layers])
def test_an_exception_in_training_leaves_a_learner_that_can_be_used(make):
    learn, cb = learner(bank(), make(), n=5, valid=bank(COUNTS//4)), MetaSampler()
    sampler = learn.dls.train.sampler
    with pytest.raises(ZeroDivisionError): fit(learn, cbs=[cb, Fail()])
    assert learn.dls.train.sampler is sampler and not any(m._forward_hooks for m in learn.model.modules())
    with learn.no_bar(): learn.validate()
    for cbs in ([], [cb], [MetaSampler()]): fit(learn, cbs=cbs)
    assert learn.dls.train.sampler is sampler


def test_learning_rate_finder_puts_the_rates_back():
    cb = MetaSampler()
    learn = fit(learner(bank(), linear(), [cb], n=30))
    w, steps = cb.psi.w.detach().clone(), cb.n_steps
    with learn.no_bar(): learn.lr_find(num_it=20, show_plot=False)
    assert torch.equal(cb.psi.w, w) and cb.n_steps == steps


class Look(Callback):
    "Validation and prediction between epochs, for which fastai calls before_fit and after_fit, too"
    busy = False
    def after_epoch(self):
        if self.busy: return
        self.busy = True
        self.learn.validate()
        self.learn.get_preds(dl=self.dls.valid)
        self.busy = False


def test_validation_and_prediction_between_epochs_change_nothing():
    got = []
    for look in ([], [Look()]):
        cb = MetaSampler(lr=.1, estimator='expected')
        learn = learner(bank(), two_layers(), n=4, valid=bank(COUNTS//4))
        sampler = learn.dls.train.sampler
        with learn.no_bar(): fit(learn, 3, cbs=[ClassifierOnly(), cb, *look])
        assert cb.n_steps == 12 and learn.dls.train.sampler is sampler
        assert all(p.requires_grad for p in learn.model.parameters())
        got.append(cb.psi.w.detach().clone())
    assert torch.equal(*got)


# --- stopped and resumed, exported

@BOTH
@pytest.mark.parametrize('make', [linear, two_layers])
def test_resumes_bit_for_bit(cls, make):
    "State after 7 steps, put into a new process's objects: the next 8 steps are those that would have come"
    class Stop(Callback):
        order = 200
        def after_batch(self):
            if self.iter + 1 < 7: return
            parts = dict(model=self.model, opt=self.opt, dl=self.dls.train, cb=first_cb)
            self.state = deepcopy({name: part.state_dict() for name, part in parts.items()})
            self.random = torch.get_rng_state()
            raise CancelFitException()
    class Load(Callback):
        order = 100
        def before_train(self):
            parts = dict(model=self.model, opt=self.opt, dl=self.dls.train, cb=second_cb)
            for name, part in parts.items(): part.load_state_dict(stop.state[name])
            torch.set_rng_state(stop.random)
    whole_cb, first_cb, second_cb, stop = cls(lr=.1), cls(lr=.1), cls(lr=.1), Stop()
    whole = fit(learner(bank(), make(), n=15), cbs=[whole_cb])
    fit(learner(bank(), make(), n=15), cbs=[first_cb, stop])
    second = fit(learner(bank(), make(9), n=8), cbs=[second_cb, Load()])
    assert torch.equal(second_cb.psi.w, whole_cb.psi.w) and not torch.equal(first_cb.psi.w, whole_cb.psi.w)
    for name, v in whole.model.state_dict().items(): assert torch.equal(v, second.model.state_dict()[name]), name


def test_a_state_given_to_a_new_callback_goes_on():
    whole, cb = learner(bank(), linear(), n=6), MetaSampler(lr=.1)
    fit(whole, cbs=[cb])
    state, weights, opt = deepcopy((cb.state_dict(), whole.model.state_dict(), whole.opt.state_dict()))
    fit(whole, cbs=[cb])
    again, cb2 = learner(bank(), linear(), n=6), MetaSampler(lr=.1)
    again.create_opt()
    again.model.load_state_dict(weights)
    again.opt.load_state_dict(opt)
    cb2.load_state_dict(state)
    fit(again, cbs=[cb2])
    assert torch.equal(cb.psi.w, cb2.psi.w) and torch.equal(whole.model.weight, again.model.weight)


def test_an_exported_learner_predicts_and_holds_no_training_data(tmp_path):
    ds, cb = bank(COUNTS*60), MetaSampler(lr=.1)
    learn = fit(learner(ds, linear(), [cb], n=3))
    learn.path = tmp_path
    learn.export()
    assert (tmp_path/'export.pkl').stat().st_size < ds.images.nbytes/4
    again = load_learner(tmp_path/'export.pkl')
    assert torch.equal(again.meta_sampler.psi.w, cb.psi.w) and again.meta_sampler.sampler is None
    preds = []
    for one in (learn, again):
        with one.no_bar(): preds.append(one.get_preds(dl=one.dls.test_dl(ds.images[:9]))[0])
    torch.testing.assert_close(*preds)
    fit(learn)                                                       # and the learner that was exported goes on
    assert cb.n_steps == 6


def test_other_data_are_drawn_by_their_own_classes():
    "A callback used again with another training set"
    cb = MetaSampler(lr=0.)
    for counts in (COUNTS, COUNTS.flip(0)//4):
        labels = SeenLabels()
        fit(learner(bank(counts), linear(), n=60), cbs=[cb, labels])
        torch.testing.assert_close(labels.shares(4), (counts/counts.sum()).float(), atol=.05, rtol=0)


def test_settings_arrive():
    cb = MetaSampler(lr=.02, betas=(.8, .95), init_pow=.3, count_pow=0., meta_bs=7, record=2)
    fit(learner(bank(), linear(), n=5), cbs=[cb])
    group = cb.psi_opt.param_groups[0]
    assert group['lr'] == .02 and tuple(group['betas']) == (.8, .95) and cb.meta_dl.bs == 7
    assert [s for s, _ in cb.history] == [0, 2, 4]
    torch.testing.assert_close(cb.history[0][1], ClassRates(COUNTS, .3).r, atol=.02, rtol=0)
    torch.testing.assert_close(cb.psi.log_n, torch.zeros(4))
    grads = []
    for estimator in ('expected', 'gumbel'):
        cb = MetaSampler(estimator=estimator)
        fit(learner(bank(), linear(), n=1, lr=.3), cbs=[cb])
        grads.append(cb.psi.w.grad)
    assert not torch.allclose(*grads)


# --- several processes, mixed precision

RANKS = '''
    import sys, torch, torch.distributed as dist
    from functools import partial
    sys.path.insert(0, {tests!r})
    from test_meta import ClassSampler, MetaReweighter, MetaSampler, bank, fit, learner, linear
    from torch import nn
    torch.set_num_threads(1)
    rank, world, store, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    if world > 1: dist.init_process_group('gloo', init_method=f'file://{{store}}', rank=rank, world_size=world)
    res = {{}}
    for make in (linear, lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), linear(1, 8))):
        for cls in (MetaSampler, MetaReweighter, partial(MetaSampler, estimator='gumbel')):
            torch.manual_seed(0)
            model, cb, ds = make().double(), cls(lr=.1), bank()
            ds.images = ds.images.double()
            net = nn.parallel.DistributedDataParallel(model) if world > 1 else model
            learn = learner(ds, net, n=12, bs=32//world)
            if isinstance(cb, MetaReweighter):                        # the joint batch, each rank its slice
                learn.dls.train.sampler = ClassSampler(ds, rank=rank, world_size=world)
            fit(learn, cbs=[cb])
            res[len(res)] = (cb.psi.w.detach(), [p.detach() for p in model.parameters()])
    torch.save(res, f'{{out}}.{{world}}.{{rank}}')
    if world > 1: dist.destroy_process_group()
'''


def test_two_ranks_hold_the_same_rates_and_those_of_one_process_with_the_joint_batch(tmp_path):
    script = tmp_path/'ranks.py'
    script.write_text(textwrap.dedent(RANKS.format(tests=os.path.dirname(os.path.abspath(__file__)))))
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join(sys.path)}
    def start(rank, world):
        line = [sys.executable, script, str(rank), str(world), tmp_path/'store', tmp_path/'out']
        return subprocess.Popen(line, env=env, stderr=subprocess.PIPE, text=True)
    for world in (2, 1):
        for p in [start(r, world) for r in range(world)]:
            err = p.communicate(timeout=240)[1]
            assert p.returncode == 0, err
    one, a, b = (torch.load(f'{tmp_path}/out.{n}', weights_only=True) for n in ('1.0', '2.0', '2.1'))
    for i in one:
        assert torch.equal(a[i][0], b[i][0]) and one[i][0].abs().max() > .05
        torch.testing.assert_close(a[i][0], one[i][0], rtol=1e-3, atol=1e-4)
        for p, q in zip(a[i][1], one[i][1]): torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


@pytest.mark.cuda
@pytest.mark.parametrize('precision', ['to_fp16', 'to_bf16'])
@pytest.mark.parametrize('backprop', ['closed', 'autograd'])
def test_mixed_precision_on_cuda(precision, backprop):
    train, test = digits()
    torch.manual_seed(0)
    cb = MetaSampler(backprop=backprop)
    dls = array_dls(train, test, bs=64, n_batches=20, device='cuda')
    loss, net = BalancedSoftmax.from_dls(dls).cuda(), get_model('small_cnn', 10, 1).cuda()
    learn = Learner(dls, net, loss_func=loss, opt_func=SGD, lr=.1, train_bn=False)
    getattr(learn, precision)()
    fit(learn, cbs=[ClassifierOnly(), cb])
    assert cb.psi.w.isfinite().all() and cb.psi.w.abs().sum() > 0


# --- networks and loaders that people have

def test_fastai_adam_and_all_layers_of_a_cnn_with_augmentation():
    "What a user has who changes nothing: fastai's Adam, everything trained"
    train, test = digits()
    torch.manual_seed(0)
    cb, augment = MetaSampler(lr=.05), CropFlip(1, flip=False)
    net = get_model('small_cnn', 10, 1)
    learn = fit(learner(train, net, [cb], n=60, bs=64, valid=test, augment=augment, opt=Adam, lr=3e-3))
    assert cb.psi.w.isfinite().all() and cb.psi.w.abs().max() > .05
    probs, targs = learn.get_preds()
    assert (probs.argmax(1) == targs).float().mean() > .5


def test_bank_of_views_is_the_network_on_augmented_images():
    train, test = digits()
    torch.manual_seed(0)
    learn = learner(train, get_model('small_cnn', 10, 1), valid=test, augment=CropFlip(1, flip=False))
    views = feature_bank(learn, 3)
    assert len(views) == 3*len(train) and torch.equal(class_counts(views), 3*class_counts(train))
    assert not torch.equal(views.images[:len(train)], views.images[len(train):2*len(train)])
    with torch.no_grad(): want = learn.get_preds(act=lambda x: x)[0]
    torch.testing.assert_close(learn.model.fc(feature_bank(learn, 1, 1).images).detach(), want)


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "A folder of small images, 60/20/6 for training"
    root, rng = tmp_path_factory.mktemp('photos'), np.random.default_rng(0)
    for split, counts in (('train', (60, 20, 6)), ('valid', (8, 8, 8))):
        for c, n in enumerate(counts):
            folder = root/split/f'class{c}'
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = (rng.random((16, 16, 3)) + np.eye(3)[c])*127
                Image.fromarray(pixels.astype(np.uint8)).save(folder/f'{i}.png')
    return root


def photo_dls(photos, **kwargs):
    "Loaders of these images, and the loss for them"
    torch.manual_seed(0)
    random.seed(0)
    kwargs = dict(num_workers=0, device='cpu', **kwargs)
    dls = ImageDataLoaders.from_folder(photos, train='train', valid='valid', bs=16, **kwargs)
    return dls, BalancedSoftmax.from_dls(dls)


@pytest.mark.parametrize('workers', [0, 2])
def test_vision_learner_over_files_with_workers(photos, workers):
    torch.manual_seed(0)
    dls = ImageDataLoaders.from_folder(photos, train='train', valid='valid', bs=16, num_workers=workers,
                                       batch_tfms=aug_transforms(size=16), device='cpu')
    loss = BalancedSoftmax.from_dls(dls)
    learn = vision_learner(dls, resnet18, pretrained=False, normalize=False, loss_func=loss)
    train, cb = dls.train, MetaSampler(lr=.1)
    before = {n: p.clone() for n, p in learn.model.state_dict().items()}
    with learn.no_bar(), learn.no_logging(): learn.fit_classifier(2, 1e-3, cbs=cb)
    moved = [n for n, p in learn.model.state_dict().items() if not torch.equal(p, before[n])]
    assert moved == ['1.8.weight'] and cb.psi.w.abs().sum() > 0 and cb.n_steps == 2*round(86/16)
    assert cb.staleness == 2*workers and learn.dls.train is train
    with learn.no_bar(), learn.no_logging():
        learn.fit_classifier(1, 1e-3, views=1, cbs=MetaReweighter())
        learn.validate()


def test_everything_trained_by_vision_learner(photos):
    "Batch normalisation in training mode, dropout, in-place ReLUs, max pooling: the derivative goes through all of it"
    dls, loss = photo_dls(photos)
    learn = vision_learner(dls, resnet18, pretrained=False, normalize=False, loss_func=loss)
    learn.unfreeze()
    cb = MetaSampler(lr=.1)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=cb)
    assert not cb.closed_form and cb.psi.w.isfinite().all() and cb.psi.w.abs().sum() > 0


def test_validation_between_epochs_leaves_the_rates_of_a_file_loader(photos):
    class Loaders(Callback):
        order = 70
        def before_train(self): loaders.append(type(self.learn.dl).__name__)
    dls, loss = photo_dls(photos)
    loaders, net = [], nn.Sequential(nn.Flatten(), nn.Linear(3*256, 3))
    learn = Learner(dls, net, loss_func=loss, opt_func=SGD)
    with learn.no_bar(), learn.no_logging(): learn.fit(3, 1e-3, cbs=[MetaSampler(), Look(), Loaders()])
    assert loaders == ['SampledDL']*3 and type(learn.dls.train).__name__ == 'TfmdDL'


def test_class_balanced_loader_stays_so_on_a_bank():
    train, test = digits()
    torch.manual_seed(0)
    learn, labels = learner(train, get_model('small_cnn', 10, 1), valid=test, n=40), SeenLabels()
    learn.dls = resampled(learn.dls, power=0.)
    with learn.no_bar(), learn.no_logging(): learn.fit_classifier(1, .1, views=2, cbs=labels)
    torch.testing.assert_close(labels.shares(10), torch.full((10,), .1), atol=.035, rtol=0)


def test_classifier_is_reset_or_not_and_after_a_failure_what_it_was():
    train, test = digits()
    learn = learner(train, get_model('small_cnn', 10, 1), valid=test)
    before, seen = learn.model.fc.weight.detach().clone(), []
    class FailAtOnce(Callback):
        def before_batch(self):
            seen.append(self.model.fc.weight.detach().clone())
            raise ZeroDivisionError('stop')
    for reset in (False, True):
        with pytest.raises(ZeroDivisionError): learn.fit_classifier(1, .1, reset=reset, cbs=FailAtOnce())
        assert torch.equal(before, seen[-1]) != reset and torch.equal(before, learn.model.fc.weight)
    assert all(p.requires_grad for p in learn.model.parameters()) and learn.opt is None


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self): yield from ((torch.zeros(5), 0) for _ in range(64))


def test_loaders_that_cannot_draw_by_class():
    tensors = torch.utils.data.TensorDataset(torch.zeros(40, 5), torch.arange(40) % 4)
    for dl in (DataLoader(Stream(), bs=8, n=64), torch.utils.data.DataLoader(tensors, 8)):
        learn = Learner(DataLoaders(dl, dl), linear(), loss_func=nn.CrossEntropyLoss(), opt_func=SGD)
        with pytest.raises(ValueError, match='MetaSampler needs images'): learn.fit(1, cbs=MetaSampler())


@pytest.mark.parametrize('name', ['resnet10t', 'vit_tiny_patch16_224', 'mobilenetv3_small_050'])
def test_decoupled_training_of_a_timm_model(photos, name):
    timm = pytest.importorskip('timm')
    dls, loss = photo_dls(photos)
    size = dict(img_size=16, patch_size=8) if 'vit' in name else {}
    net, cb = timm.create_model(name, num_classes=3, pretrained=False, **size), MetaSampler(lr=.1)
    learn = Learner(dls, net, loss_func=loss, opt_func=SGD)
    before = {n: p.clone() for n, p in net.state_dict().items()}
    with learn.no_bar(), learn.no_logging(): head = learn.fit_classifier(1, .1, cbs=cb)
    assert head is net.get_classifier()
    moved = {n.rsplit('.', 1)[0] for n, p in net.state_dict().items() if not torch.equal(p, before[n])}
    assert moved == {n for n, m in net.named_modules() if m is head}
    with learn.no_bar(), learn.no_logging(): learn.fit_classifier(1, .1, views=1, scales=True)


# --- what a fit costs, and what it leaves

def test_labels_are_read_once(monkeypatch):
    "Counts, sampler and meta batches of one fit, and of the next, share one reading of the labels"
    import balms.meta as meta
    reads, read_labels = [], meta.read_labels
    monkeypatch.setattr(meta, 'read_labels', lambda ds: reads.append(ds) or read_labels(ds))
    train, test = digits()
    learn = learner(train, get_model('small_cnn', 10, 1), [MetaSampler()], n=2, bs=16, valid=test)
    fit(learn)
    fit(learn)
    assert len(reads) == 1


@pytest.mark.parametrize('bn_passes', [False, True])
def test_batches_that_batch_normalisation_sees(bn_passes):
    "Its own alone, or those of the meta step too, as in the released code"
    train, test = digits()
    net, drift = get_model('small_cnn', 10, 1), ClassifierOnly(bn_drift=True)
    fit(learner(train, net, [drift, MetaSampler(bn_passes=bn_passes)], n=5, bs=16, valid=test))
    counts = {m.num_batches_tracked.item() for m in net.modules() if hasattr(m, 'num_batches_tracked')}
    assert counts == {15 if bn_passes else 5}


def test_plot_before_a_fit():
    with pytest.raises(ValueError, match='MetaSampler'): MetaSampler().plot()


@pytest.mark.parametrize('cbs', [[], [ClassifierOnly]], ids=['all layers', 'the classifier'])
def test_compiled_network(cbs):
    "Learned rates of a network behind torch.compile are those of the network"
    train, test = digits()
    def rates(compiled):
        torch.manual_seed(0)
        net, cb = get_model('small_cnn', 10, 1), MetaSampler(lr=.05)
        if compiled: net = torch.compile(net, backend='aot_eager')
        fit(learner(train, net, [*(make() for make in cbs), cb], n=10, bs=16, valid=test))
        return cb.psi.w.detach()
    torch.testing.assert_close(rates(True), rates(False), rtol=1e-3, atol=1e-4)
