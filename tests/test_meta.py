"The Meta Sampler and the Meta Reweighter as a user meets them: inside a `Learner`, resumed, exported, on two ranks"
import os, subprocess, sys, textwrap, warnings
from copy import deepcopy
from functools import partial
import pytest, torch, torch.nn.functional as F
from torch import nn
from hypothesis import given, settings, strategies as st
import fastai.callback.progress
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.schedule import Learner
from fastai.learner import load_learner
from fastai.optimizer import Adam, OptimWrapper
from balms.core import BalancedSoftmax, balanced_softmax_loss, class_counts
from balms.augment import CropFlip
from balms.data import ArrayDataset, FeatureBank, array_dls, load_digits, long_tail
from balms.decoupled import ClassifierOnly, feature_bank
from balms.meta import ClassRates, MetaReweighter, MetaSampler, closed_form_credit, inner_step, rate_gradient, soft_draw, weight_gradient
from balms.models import get_model
from balms.samplers import ClassSampler, sampling_rates

SGD = partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9, nesterov=True, weight_decay=1e-3)
COUNTS = torch.tensor([400, 120, 40, 12])


def bank(counts=COUNTS, d=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(len(counts)).repeat_interleave(counts)
    return FeatureBank(torch.randn(len(y), d, generator=g) + 2*torch.randn(len(counts), d, generator=g)[y], y, [str(i) for i in range(len(counts))])


def digits():
    train, test = load_digits()
    return long_tail(train, 20), test


def learner(ds, model, cbs=(), loss=None, n=6, bs=32, valid=None, augment=None, opt=SGD, lr=.1, **kw):
    dls = array_dls(ds, valid or ds, bs=bs, n_batches=n, augment=augment, device='cpu')
    learn = Learner(dls, model, loss_func=loss or BalancedSoftmax.from_dls(dls), opt_func=opt, lr=lr, cbs=cbs, train_bn=False, **kw)
    drop = ('progress', 'recorder') if ds.images.dtype == torch.float64 else ('progress',)      # fastai's recorder knows float32 only
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


@pytest.mark.parametrize('inner', ['optimizer', 'sgd'])
@pytest.mark.parametrize('cls', [MetaSampler, MetaReweighter])
def test_closed_form_and_autograd_agree_in_a_learner(cls, inner):
    got = []
    for backprop in ('closed', 'autograd'):
        cb = cls(backprop=backprop, inner=inner, lr=.1)
        learn = fit(learner(bank(), linear(), [cb], n=20))
        got.append((cb.psi.w.detach(), learn.model.weight.detach()))
    assert got[0][0].abs().max() > .05
    for a, b in zip(*got): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('loss', [nn.CrossEntropyLoss(), BalancedSoftmax(COUNTS, weight=[1., 2., 1., 3.]), BalancedSoftmax(COUNTS, label_smoothing=.1), BalancedSoftmax(COUNTS, reduction='sum')])
def test_any_loss_gives_the_same_credit_both_ways(loss):
    grads = {}
    for backprop in ('closed', 'autograd'):
        cb = MetaSampler(backprop=backprop, estimator='expected')
        fit(learner(bank(), linear(), [cb], deepcopy(loss), n=1, lr=.01))
        grads[backprop] = cb.psi.w.grad
    torch.testing.assert_close(grads['closed'], grads['autograd'], rtol=1e-4, atol=1e-7)


def frozen_step(cls, weights=False):
    "One step of a callback beside the paper's construction by second-order autograd, on the same draws"
    ds, model = bank(), linear()
    ds.images = ds.images.double(); model.double()
    cb = cls(lr=.01, seed=3, inner='sgd')
    class Spy(Callback):
        order, run_valid = 61, False
        def before_batch(self): self.x, self.y0 = self.xb[0].clone(), self.yb[0].as_subclass(torch.Tensor).clone(); self.W = [p.detach().clone() for p in model.parameters()]
    spy = Spy()
    fit(learner(ds, model, [cb, spy], n=1, bs=16, lr=.3))
    return ds, cb, spy


def test_a_step_of_the_callback_is_the_papers_construction():
    ds, cb, spy = frozen_step(MetaSampler)
    noise = torch.rand(16, 4, generator=torch.Generator().manual_seed(5))
    rates = ClassRates(COUNTS).rates()
    soft = soft_draw(spy.y0, rates, noise=noise).double()
    w = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    chosen = ((COUNTS.double().log() + F.logsigmoid(w)) + (soft.log() - rates.double().log()).detach()).softmax(1).gather(1, spy.y0[:, None])[:, 0]
    W, b = (p.requires_grad_() for p in spy.W)
    l = balanced_softmax_loss(spy.x @ W.T + b, spy.y0, COUNTS, reduction='none')
    g = torch.autograd.grad(((1 + chosen - chosen.detach())*l).mean(), [W, b], create_graph=True)
    i = ClassSampler(ds, sampling_rates(COUNTS, 0.), seed=4).draw(16)
    meta = F.cross_entropy(ds.images[i] @ (W - .3*g[0]).T + b - .3*g[1], ds.targets[i])
    want, = torch.autograd.grad(meta, w)
    assert want.abs().max() > 1e-5
    torch.testing.assert_close(cb.psi.w.grad.double(), want, rtol=1e-4, atol=1e-9)


def test_a_step_of_the_reweighter_is_its_definition():
    ds, cb, spy = frozen_step(MetaReweighter)
    w = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    s = w.sigmoid()[spy.y0]
    s = s/s.mean()
    W, b = (p.requires_grad_() for p in spy.W)
    l = balanced_softmax_loss(spy.x @ W.T + b, spy.y0, COUNTS, reduction='none')
    g = torch.autograd.grad((s*l).mean(), [W, b], create_graph=True)
    i = ClassSampler(ds, sampling_rates(COUNTS, 0.), seed=4).draw(16)
    meta = F.cross_entropy(ds.images[i] @ (W - .3*g[0]).T + b - .3*g[1], ds.targets[i])
    want, = torch.autograd.grad(meta, w)
    torch.testing.assert_close(cb.psi.w.grad.double(), want, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize('make', [linear, two_layers])
def test_training_is_that_without_the_meta_step(make):
    "Weights, normalisation statistics, optimiser state and random numbers: nothing but the rates is touched"
    cb = MetaSampler(lr=0.)
    a = fit(learner(bank(), make(), [cb], n=20))
    b = learner(bank(), make(), n=20)
    b.dls.train.sampler = ClassSampler(bank(), seed=0)
    fit(b)
    for (n, p), q in zip(a.model.state_dict().items(), b.model.state_dict().values()): assert torch.equal(p, q), n
    for p, q in zip(a.model.parameters(), b.model.parameters()): assert torch.equal(a.opt.opt.state[p]['momentum_buffer'], b.opt.opt.state[q]['momentum_buffer'])
    assert torch.equal(cb.psi.w, torch.zeros(4)) and cb.psi.w.grad.abs().sum() > 0


def test_reweighter_with_equal_weights_is_plain_training():
    a = fit(learner(bank(), linear(), [MetaReweighter(lr=0.)], n=20))
    b = fit(learner(bank(), linear(), n=20))
    torch.testing.assert_close(a.model.weight, b.model.weight, rtol=1e-5, atol=1e-6)


def test_dropout_is_the_same_in_both_passes():
    "By autograd the training batch passes again: its shares must sum to the loss of the first pass"
    class Sum(MetaSampler):
        def _shares(self, pred, y):
            l = super()._shares(pred, y)
            sums.append(l.sum().item() if not torch._C._functorch.is_gradtrackingtensor(l) else float(torch.func.debug_unwrap(l).sum()))
            return l
        def after_loss(self): losses.append(self.learn.loss.item())
    sums, losses = [], []
    fit(learner(bank(), two_layers(), [Sum()], n=5))
    assert len(sums) == 5 and sums == pytest.approx(losses, rel=1e-5)


@given(st.integers(1, 6), st.integers(1, 20), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_gradients_of_rates_and_weights_are_autograds(k, b, seed):
    g = torch.Generator().manual_seed(seed)
    log_n, w = 3*torch.randn(k, generator=g).double(), torch.randn(k, generator=g).double().requires_grad_()
    rates = (log_n + F.logsigmoid(w)).softmax(0).detach()
    y, u, slope = torch.multinomial(rates, b, replacement=True, generator=g), torch.randn(b, generator=g).double(), 1 - w.detach().sigmoid()
    soft = soft_draw(y, rates, .5, generator=g)
    noise = (soft.log()*.5 - rates.log()).nan_to_num(neginf=-1e4)
    chosen = ((log_n + F.logsigmoid(w) + noise)/.5).softmax(1).gather(1, y[:, None])[:, 0]
    want, = torch.autograd.grad((u*chosen).sum(), w)
    torch.testing.assert_close(rate_gradient(u, y, rates, soft, .5)*slope, want, rtol=1e-6, atol=1e-9)
    s = w.sigmoid()[y]
    want, = torch.autograd.grad((u*s/s.mean()).sum(), w)
    s = (s/s.mean()).detach()
    torch.testing.assert_close(weight_gradient(u*s, y, s, k)*slope, want, rtol=1e-6, atol=1e-9)


@given(st.floats(1e-6, 1.), st.floats(.1, 5.), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_soft_draws_are_distributions_that_peak_at_the_draw(rare, tau, seed):
    rates = torch.tensor([1., rare]).double(); rates /= rates.sum()
    y = torch.arange(2).repeat(50)
    m = soft_draw(y, rates, tau, generator=torch.Generator().manual_seed(seed))
    assert m.isfinite().all() and torch.equal(m.argmax(1), y)
    torch.testing.assert_close(m.sum(1), torch.ones(100).double())


@pytest.mark.parametrize('cls', [MetaSampler, MetaReweighter])
@pytest.mark.parametrize('make', [linear, two_layers])
def test_resumes_bit_for_bit(cls, make):
    "State after 7 steps, put into a new process's objects: the next 8 steps are those that would have come"
    class Stop(Callback):
        order = 200
        def __init__(self, at): self.at = at
        def after_batch(self):
            if self.iter + 1 == self.at: raise CancelFitException()
    whole, cb = learner(bank(), make(), n=15, augment=None), cls(lr=.1)
    fit(whole, cbs=[cb])
    first, cb1 = learner(bank(), make(), n=15), cls(lr=.1)
    class Keep(Stop):
        def after_batch(self):
            if self.iter + 1 == self.at: self.state = deepcopy(dict(model=self.model.state_dict(), opt=self.opt.state_dict(), dl=self.dls.train.state_dict(), cb=cb1.state_dict(), rng=torch.get_rng_state()))
            super().after_batch()
    keep = Keep(7)
    fit(first, cbs=[cb1, keep])
    class Load(Callback):
        order = 100
        def before_train(self):
            s = keep.state
            self.model.load_state_dict(s['model']); self.opt.load_state_dict(s['opt']); self.dls.train.load_state_dict(s['dl']); cb2.load_state_dict(s['cb']); torch.set_rng_state(s['rng'])
    second, cb2 = learner(bank(), make(9), n=8), cls(lr=.1, seed=0)
    fit(second, cbs=[cb2, Load()])
    assert torch.equal(cb2.psi.w, cb.psi.w) and not torch.equal(cb1.psi.w, cb.psi.w)
    for k, v in whole.model.state_dict().items(): assert torch.equal(v, second.model.state_dict()[k]), k


def test_goes_on_from_fit_to_fit_and_leaves_nothing_behind():
    learn, cb = learner(bank(), linear(), n=5), MetaSampler(record=1)
    before = learn.dls.train.sampler
    fit(learn, cbs=[cb]); w = cb.psi.w.detach().clone()
    fit(learn, cbs=[cb])
    assert cb.n_steps == 10 and len(cb.history) == 10 and not torch.equal(w, cb.psi.w)
    assert learn.dls.train.sampler is before and not learn.model._forward_hooks and not learn.model._forward_pre_hooks
    cb.plot()


def test_an_exception_in_training_leaves_a_learner_that_can_be_used():
    class Fail(Callback):
        def before_batch(self):
            if self.training and self.iter == 2: raise ZeroDivisionError('stop')
    for make in (linear, two_layers):
        learn, cb = learner(bank(), make(), n=5, valid=bank(COUNTS//4)), MetaSampler()
        before = learn.dls.train.sampler
        with pytest.raises(ZeroDivisionError): fit(learn, cbs=[cb, Fail()])
        assert learn.dls.train.sampler is before and not any(m._forward_hooks for m in learn.model.modules())
        with learn.no_bar(): learn.validate()
        fit(learn); fit(learn, cbs=[cb]); fit(learn, cbs=[MetaSampler()])
        assert learn.dls.train.sampler is before


def test_learning_rate_finder_puts_the_rates_back():
    learn, cb = learner(bank(), linear(), [MetaSampler()], n=30), None
    cb = learn.meta_sampler
    fit(learn); w, steps = cb.psi.w.detach().clone(), cb.n_steps
    with learn.no_bar(): learn.lr_find(num_it=20, show_plot=False)
    assert torch.equal(cb.psi.w, w) and cb.n_steps == steps


def test_export_and_load(tmp_path):
    learn = fit(learner(bank(), linear(), [MetaSampler()], n=5))
    learn.path = tmp_path
    learn.export()
    again = load_learner(tmp_path/'export.pkl')
    assert torch.equal(again.model.weight, learn.model.weight)
    with again.no_bar(): preds = again.get_preds(dl=again.dls.test_dl(bank().images[:9]))[0]
    with learn.no_bar(): torch.testing.assert_close(preds, learn.get_preds(dl=learn.dls.test_dl(bank().images[:9]))[0])


def test_an_exported_learner_holds_no_training_data(tmp_path):
    ds, cb = bank(COUNTS*60), MetaSampler(lr=.1)
    learn = fit(learner(ds, linear(), [cb], n=3))
    learn.path = tmp_path
    learn.export()
    assert (tmp_path/'export.pkl').stat().st_size < ds.images.nbytes/4
    kept = load_learner(tmp_path/'export.pkl').meta_sampler
    assert torch.equal(kept.psi.w, cb.psi.w) and kept.about is None
    fit(learn)                                                       # and the learner that was exported goes on
    assert cb.n_steps == 6


def test_validation_and_prediction_between_epochs_change_nothing():
    "fastai calls before_fit and after_fit for them too"
    class Look(Callback):
        busy = False
        def after_epoch(self):                                       # which they call as well
            if self.busy or not look: return
            self.busy = True
            self.learn.validate(); self.learn.get_preds(dl=self.dls.valid)
            self.busy = False
    got = []
    for look in (False, True):
        learn, cb = learner(bank(), two_layers(), n=4, valid=bank(COUNTS//4)), MetaSampler(lr=.1, estimator='expected')
        before = learn.dls.train.sampler
        with learn.no_bar(): fit(learn, 3, cbs=[ClassifierOnly(), cb, Look()])
        assert cb.n_steps == 12 and learn.dls.train.sampler is before and all(p.requires_grad for p in learn.model.parameters())
        got.append(cb.psi.w.detach().clone())
    assert torch.equal(*got)


def test_fastai_adam_and_all_layers_of_a_cnn_with_augmentation():
    "What a user has who changes nothing: fastai's Adam, everything trained"
    train, test = digits()
    torch.manual_seed(0)
    cb = MetaSampler(lr=.05)
    learn = fit(learner(train, get_model('small_cnn', 10, 1), [cb], n=60, bs=64, valid=test, augment=CropFlip(1, flip=False), opt=Adam, lr=3e-3))
    assert cb.psi.w.isfinite().all() and cb.psi.w.abs().max() > .05
    probs, targs = learn.get_preds()
    assert (probs.argmax(1) == targs).float().mean() > .5


def test_frozen_network_by_both_ways_on_images_with_normalisation_drifting_or_not():
    train, test = digits()
    for drift in (False, True):
        got = []
        for backprop in ('closed', 'autograd'):
            torch.manual_seed(0)
            net, cb = get_model('small_cnn', 10, 1), MetaSampler(backprop=backprop, estimator='expected')
            fit(learner(train, net, [ClassifierOnly(drift), cb], n=8, valid=test))
            got.append((cb.psi.w.detach(), net.body[0][1].running_mean.clone()))
        torch.testing.assert_close(got[0][0], got[1][0], rtol=1e-3, atol=1e-5)
        assert torch.equal(got[0][1], got[1][1]) and bool(got[0][1].abs().sum() > 0) == drift


def test_bank_of_views_is_the_network_on_augmented_images():
    train, test = digits()
    torch.manual_seed(0)
    learn = learner(train, get_model('small_cnn', 10, 1), valid=test, augment=CropFlip(1, flip=False))
    b = feature_bank(learn, 3)
    assert len(b) == 3*len(train) and torch.equal(class_counts(b), 3*class_counts(train))
    assert not torch.equal(b.images[:len(train)], b.images[len(train):2*len(train)])
    v = feature_bank(learn, 1, 1)
    with torch.no_grad(): want = learn.get_preds(act=lambda x: x)[0]
    torch.testing.assert_close(learn.model.fc(v.images).detach(), want)


RANKS = '''
    import sys, torch, torch.distributed as dist
    from functools import partial
    sys.path.insert(0, {tests!r})
    from test_meta import MetaReweighter, MetaSampler, bank, fit, learner, linear, two_layers
    from torch import nn
    torch.set_num_threads(1)
    rank, world, store, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    if world > 1: dist.init_process_group('gloo', init_method=f'file://{{store}}', rank=rank, world_size=world)
    res = {{}}
    for make in (linear, lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), linear(1, 8))):
        for cls in (MetaSampler, MetaReweighter, partial(MetaSampler, estimator='expected')):
            torch.manual_seed(0)
            model, cb = make().double(), cls(lr=.1)
            ds = bank(); ds.images = ds.images.double()
            learn = learner(ds, nn.parallel.DistributedDataParallel(model) if world > 1 else model, n=12, bs=32//world)
            if isinstance(cb, MetaReweighter):                                  # the joint batch, each rank its slice
                from balms.samplers import ClassSampler
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
    start = lambda rank, world: subprocess.Popen([sys.executable, script, str(rank), str(world), tmp_path/'store', tmp_path/'out'], env=env, stderr=subprocess.PIPE, text=True)
    for world in (2, 1):
        for p in [start(r, world) for r in range(world)]:
            err = p.communicate(timeout=240)[1]
            assert p.returncode == 0, err
    one, a, b = (torch.load(f'{tmp_path}/out.{n}', weights_only=True) for n in ('1.0', '2.0', '2.1'))
    for i in one:
        assert torch.equal(a[i][0], b[i][0]) and one[i][0].abs().max() > .05
        torch.testing.assert_close(a[i][0], one[i][0], rtol=1e-3, atol=1e-4)
        for p, q in zip(a[i][1], one[i][1]): torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_mixed_precision_on_cuda():
    train, test = digits()
    for fp in ('to_fp16', 'to_bf16'):
        torch.manual_seed(0)
        cb = MetaSampler()
        dls = array_dls(train, test, bs=64, n_batches=20, device='cuda')
        learn = Learner(dls, get_model('small_cnn', 10, 1).cuda(), loss_func=BalancedSoftmax.from_dls(dls).cuda(), opt_func=SGD, lr=.1, train_bn=False)
        getattr(learn, fp)()
        fit(learn, cbs=[ClassifierOnly(), cb])
        assert cb.psi.w.isfinite().all() and cb.psi.w.abs().sum() > 0


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "A folder of small images, 60/20/6 for training, that fastai loads"
    from PIL import Image
    import numpy as np
    root, rng = tmp_path_factory.mktemp('photos'), np.random.default_rng(0)
    for split, counts in (('train', (60, 20, 6)), ('valid', (8, 8, 8))):
        for c, n in enumerate(counts):
            (root/split/f'class{c}').mkdir(parents=True)
            for i in range(n): Image.fromarray(((rng.random((16, 16, 3))*.5 + np.eye(3)[c]*.5)*255).astype(np.uint8)).save(root/split/f'class{c}'/f'{i}.png')
    return root


@pytest.mark.parametrize('workers', [0, 2])
def test_vision_learner_over_files_with_workers(photos, workers):
    from fastai.vision.all import ImageDataLoaders, aug_transforms, resnet18, vision_learner
    torch.manual_seed(0)
    dls = ImageDataLoaders.from_folder(photos, train='train', valid='valid', bs=16, num_workers=workers, batch_tfms=aug_transforms(size=16), device='cpu')
    learn = vision_learner(dls, resnet18, pretrained=False, normalize=False, loss_func=BalancedSoftmax.from_dls(dls))
    train, cb = dls.train, MetaSampler(lr=.1)
    frozen = {n: p.clone() for n, p in learn.model.state_dict().items()}
    with learn.no_bar(), learn.no_logging(): learn.fit_classifier(2, 1e-3, cbs=cb)
    moved = [n for n, p in learn.model.state_dict().items() if not torch.equal(p, frozen[n])]
    assert moved == ['1.8.weight'] and cb.psi.w.abs().sum() > 0 and cb.n_steps == 2*round(86/16)
    assert cb.staleness == 2*workers and learn.dls.train is train
    with learn.no_bar(), learn.no_logging(): learn.fit_classifier(1, 1e-3, views=1, cbs=MetaReweighter()); learn.validate()


def test_everything_trained_by_vision_learner(photos):
    "Batch normalisation in training mode, dropout, in-place ReLUs, max pooling: the derivative goes through all of it"
    from fastai.vision.all import ImageDataLoaders, resnet18, vision_learner
    torch.manual_seed(0)
    dls = ImageDataLoaders.from_folder(photos, train='train', valid='valid', bs=16, num_workers=0, device='cpu')
    learn = vision_learner(dls, resnet18, pretrained=False, normalize=False, loss_func=BalancedSoftmax.from_dls(dls))
    learn.unfreeze()
    cb = MetaSampler(lr=.1)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=cb)
    assert cb.head is None and cb.psi.w.isfinite().all() and cb.psi.w.abs().sum() > 0


def test_validation_between_epochs_leaves_the_rates_of_a_file_loader(photos):
    from fastai.vision.all import ImageDataLoaders
    torch.manual_seed(0)
    dls = ImageDataLoaders.from_folder(photos, train='train', valid='valid', bs=16, num_workers=0, device='cpu')
    class Look(Callback):
        busy = False
        def before_train(self): loaders.append(type(self.learn.dl).__name__)
        def after_epoch(self):
            if not self.busy: self.busy = True; self.learn.validate(); self.busy = False
    loaders = []
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(3*256, 3)), loss_func=BalancedSoftmax.from_dls(dls), opt_func=SGD)
    look = Look(); look.order = 70
    with learn.no_bar(), learn.no_logging(): learn.fit(3, 1e-3, cbs=[MetaSampler(), look])
    assert loaders == ['SampledDL']*3 and type(learn.dls.train).__name__ == 'TfmdDL'


def test_other_data_are_drawn_by_their_own_classes():
    "A callback used again with another training set, and a state given to a new callback"
    cb, seen = MetaSampler(lr=0.), []
    class Spy(Callback):
        order, run_valid = 61, False
        def before_batch(self): seen.append(self.yb[0].as_subclass(torch.Tensor).clone())
    for counts in (COUNTS, COUNTS.flip(0)//4):
        seen.clear()
        fit(learner(bank(counts), linear(), n=60), cbs=[cb, Spy()])
        share = torch.bincount(torch.cat(seen), minlength=4)/sum(map(len, seen))
        torch.testing.assert_close(share, (counts/counts.sum()).float(), atol=.05, rtol=0)


def test_a_state_given_to_a_new_callback_goes_on():
    whole, cb = learner(bank(), linear(), n=6), MetaSampler(lr=.1)
    fit(whole, 1, cbs=[cb]); state, weights = deepcopy(cb.state_dict()), deepcopy(whole.model.state_dict())
    opt = deepcopy(whole.opt.state_dict())
    fit(whole, 1, cbs=[cb])
    again, cb2 = learner(bank(), linear(), n=6), MetaSampler(lr=.1)
    again.create_opt(); again.model.load_state_dict(weights); again.opt.load_state_dict(opt)
    cb2.load_state_dict(state)
    fit(again, 1, cbs=[cb2])
    assert torch.equal(cb.psi.w, cb2.psi.w) and torch.equal(whole.model.weight, again.model.weight)


def test_settings_arrive():
    cb = MetaSampler(lr=.02, betas=(.8, .95), init_pow=.3, count_pow=0., meta_bs=7, record=2, tau=.5)
    batches = []
    class Spy(Callback):
        order, run_valid = 59, False
        def before_batch(self):
            if not batches: cb._meta_batch, batches[:] = (lambda f=cb._meta_batch: batches.append(f()) or batches[-1]), [None]
    fit(learner(bank(), linear(), n=5), cbs=[cb, Spy()])
    group = cb.psi_opt.param_groups[0]
    assert group['lr'] == .02 and tuple(group['betas']) == (.8, .95) and len(batches[1][1]) == 7 and [s for s, _ in cb.history] == [0, 2, 4]
    torch.testing.assert_close(cb.history[0][1], ClassRates(COUNTS, .3).r, atol=.02, rtol=0)
    torch.testing.assert_close(cb.psi.log_n, torch.zeros(4))
    a, b = (torch.cat([fit(learner(bank(), linear(), n=3, lr=.3), cbs=[c]) and c.psi.w.grad for c in [MetaSampler(tau=t)]]) for t in (1., .3))
    assert not torch.allclose(a, b)


def test_a_noise_of_exactly_zero_is_no_nan():
    m = soft_draw(torch.tensor([1, 0]), torch.tensor([.5, .3, .2]), noise=torch.zeros(2, 3))
    assert m.isfinite().all() and torch.equal(m.argmax(1), torch.tensor([1, 0]))


def test_meta_step_leaves_random_numbers_of_a_frozen_network_in_training_mode():
    got = []
    for cbs in ([MetaSampler(lr=0.)], []):
        net = two_layers()
        for p in net[:-1].parameters(): p.requires_grad_(False)
        learn = learner(bank(), net, n=10)
        if not cbs: learn.dls.train.sampler = ClassSampler(bank(), seed=0)
        got.append(fit(learn, cbs=cbs).model.state_dict())
    assert all(torch.equal(got[0][k], got[1][k]) for k in got[0])


@pytest.mark.parametrize('loss', [lambda: BalancedSoftmax(COUNTS, weight=[1., 2., 1., 3.]), lambda: nn.CrossEntropyLoss(weight=torch.tensor([1., 2., 1., 3.]), label_smoothing=.1),
                                  lambda: partial(F.cross_entropy, weight=torch.tensor([1., 2., 1., 3.])), lambda: nn.CrossEntropyLoss(ignore_index=0)])
def test_reweighter_starts_as_plain_training_with_any_loss(loss):
    a = fit(learner(bank(), linear(), [MetaReweighter(lr=0.)], loss(), n=20))
    b = fit(learner(bank(), linear(), loss=loss(), n=20))
    torch.testing.assert_close(a.model.weight, b.model.weight, rtol=1e-4, atol=1e-5)


def test_nonlinear_heads_go_by_autograd():
    from balms.baselines import CosineLinear
    for head in (CosineLinear(5, 4), nn.utils.parametrizations.weight_norm(linear())):
        cb = MetaSampler()
        fit(learner(bank(), head, n=3), cbs=[cb])
        assert cb.head is None and cb.psi.w.grad.abs().sum() > 0
        with pytest.raises(ValueError, match='needs the last linear layer'): fit(learner(bank(), head, n=1), cbs=[MetaSampler(backprop='closed')])


def test_class_balanced_loader_stays_so_on_a_bank():
    from balms.samplers import resampled
    train, test = digits()
    torch.manual_seed(0)
    learn, seen = learner(train, get_model('small_cnn', 10, 1), valid=test, n=40), []
    class Spy(Callback):
        run_valid = False
        def before_batch(self): seen.append(self.yb[0].as_subclass(torch.Tensor).clone())
    learn.dls = resampled(learn.dls, power=0.)
    with learn.no_bar(), learn.no_logging(): learn.fit_classifier(1, .1, views=2, cbs=Spy())
    share = torch.bincount(torch.cat(seen), minlength=10)/sum(map(len, seen))
    torch.testing.assert_close(share, torch.full((10,), .1), atol=.035, rtol=0)


def test_classifier_starts_anew_or_not_and_is_thawed_after_a_failure():
    class Fail(Callback):
        def before_batch(self): raise ZeroDivisionError('stop')
    train, test = digits()
    learn = learner(train, get_model('small_cnn', 10, 1), valid=test)
    was = learn.model.fc.weight.detach().clone()
    for reset in (False, True):
        with pytest.raises(ZeroDivisionError): learn.fit_classifier(1, .1, reset=reset, cbs=Fail())
        assert torch.equal(was, learn.model.fc.weight) != reset
    assert all(p.requires_grad for p in learn.model.parameters()) and learn.opt is None


def test_loaders_that_cannot_change_their_rates(photos):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self): yield from ((torch.zeros(5), 0) for _ in range(64))
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    dls = DataLoaders(DataLoader(Stream(), bs=8, n=64), DataLoader(Stream(), bs=8, n=64))
    learn = Learner(dls, linear(), loss_func=nn.CrossEntropyLoss(), opt_func=SGD)
    with pytest.raises(ValueError, match='needs a loader whose images can be drawn by class'): learn.fit(1, cbs=MetaSampler())
    torch_dl = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(40, 5), torch.arange(40) % 4), 8)
    learn = Learner(DataLoaders(torch_dl, torch_dl), linear(), loss_func=nn.CrossEntropyLoss(), opt_func=SGD)
    with pytest.raises(ValueError, match='needs a loader whose images can be drawn by class'): learn.fit(1, cbs=MetaSampler())


@pytest.mark.parametrize('name', ['resnet10t', 'vit_tiny_patch16_224', 'mobilenetv3_small_050'])
def test_decoupled_training_of_a_timm_model(photos, name):
    timm = pytest.importorskip('timm')
    from fastai.vision.all import ImageDataLoaders
    torch.manual_seed(0)
    kw = dict(img_size=16, patch_size=8) if 'vit' in name else {}
    dls = ImageDataLoaders.from_folder(photos, train='train', valid='valid', bs=16, num_workers=0, device='cpu')
    learn, cb = Learner(dls, timm.create_model(name, num_classes=3, pretrained=False, **kw), loss_func=BalancedSoftmax.from_dls(dls), opt_func=SGD), MetaSampler(lr=.1)
    state = {n: p.clone() for n, p in learn.model.state_dict().items()}
    with learn.no_bar(), learn.no_logging(): head = learn.fit_classifier(1, .1, cbs=cb)
    assert head is learn.model.get_classifier()
    assert {n.rsplit('.', 1)[0] for n, p in learn.model.state_dict().items() if not torch.equal(p, state[n])} == {n for n, m in learn.model.named_modules() if m is head}
    with learn.no_bar(), learn.no_logging(): learn.fit_classifier(1, .1, views=1, scales=True)
