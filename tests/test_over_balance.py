"The recorder of gradient and p(y), against independent formulas and in every way that a fit can go; and Eq. 12."
import gc, weakref
import matplotlib
matplotlib.use('Agg')
import pytest, torch, torch.nn.functional as F
from torch import nn, Tensor
from fastai.vision.all import Callback, CancelFitException, Learner, MixUp, load_learner
from fastai.callback.fp16 import MixedPrecision
from balms.core import BalancedSigmoid, BalancedSoftmax, class_counts
from balms.array_loader import array_dls
from balms.datasets import load_digits
from balms.long_tail import ArrayDataset, long_tail
from balms.metrics import marginal_likelihood
from balms.over_balance import OverBalance


@pytest.fixture(scope='module')
def sets():
    train, test = load_digits()
    return long_tail(train, 20), test


def net(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))


def make(sets, loss=None, cbs=None, model=None, seed=0, bs=37, n_batches=7, **kw):
    torch.manual_seed(seed)
    # 500 test images: the last batch is smaller
    dls = array_dls(*sets, bs=bs, test_bs=230, n_batches=n_batches, seed=seed, device='cpu', **kw)
    return Learner(dls, net() if model is None else model, loss_func=loss or BalancedSoftmax(class_counts(dls)),
                   cbs=cbs)


def fit(learn, *a, **kw):
    with learn.no_bar(), learn.no_logging(): learn.fit(*a, **kw)
    return learn


class Logits(Callback):
    "What the model said and what was asked, as float64, batch by batch"
    def before_fit(self): self.seen = []
    def after_pred(self):
        if self.training:
            self.seen.append((self.epoch, self.pred.detach().as_subclass(Tensor).double().clone(),
                              self.y.as_subclass(Tensor).clone()))


def masses(seen, shift, epoch, weight=None):
    "Eq. 11's positives and negatives, sample by sample"
    pos, neg = torch.zeros(2, 10, dtype=torch.float64)
    for e, z, y in seen:
        if e != epoch: continue
        w = torch.ones(10, dtype=torch.float64) if weight is None else weight.double()
        total = sum(w[t] for t in y)                              # the loss is a weighted mean
        for row, t in zip(z + shift.double(), y):
            p = row.exp()/row.exp().sum()
            for j in range(10):
                if j == t: pos[j] += w[t]*(1 - p[j])/total
                else: neg[j] += w[t]*p[j]/total
    return pos, neg


@pytest.mark.parametrize('kind', ('softmax', 'balanced', 'quarter', 'weighted'))
def test_masses(sets, kind):
    "The recorded sums are those of the positives and negatives of Eq. 11"
    n = class_counts(sets[0].targets)
    weight = (n.sum()/n).float() if kind == 'weighted' else None
    if kind in ('softmax', 'weighted'): loss = nn.CrossEntropyLoss(weight)
    else: loss = BalancedSoftmax(n, tau=.25 if kind == 'quarter' else 1.)
    cb, spy = OverBalance(), Logits()
    fit(make(sets, loss, [cb, spy]), 2, 1e-2)
    shift = {'balanced': n.log(), 'quarter': n.log()/4}.get(kind, torch.zeros(10))
    assert cb.positive.shape == cb.negative.shape == cb.p_y.shape == (2, 10) and cb.positive.dtype == torch.float64
    for epoch in range(2):
        pos, neg = masses(spy.seen, shift, epoch, weight)
        torch.testing.assert_close(cb.positive[epoch], pos, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(cb.negative[epoch], neg, rtol=1e-4, atol=1e-6)
    # rows of a softmax's gradient sum to 0
    torch.testing.assert_close(cb.positive.sum(1), cb.negative.sum(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(cb.ratio, cb.positive/(cb.positive + cb.negative))
    assert torch.equal(cb.counts, n)


def test_marginal(sets):
    "p(y) is that of the model after each epoch, over all of the validation set"
    cb, after = OverBalance(), []
    class Later(Callback):
        order = 99
        def after_epoch(self):
            was = self.model.training
            self.model.eval()
            with torch.no_grad(): probs = [self.model(x.as_subclass(Tensor)).softmax(1) for x, _ in self.dls.valid]
            after.append(torch.cat(probs).double().mean(0))
            self.model.train(was)
    learn = make(sets, cbs=cb)
    fit(learn, 3, 1e-2, cbs=Later())
    torch.testing.assert_close(cb.p_y, torch.stack(after), rtol=1e-5, atol=1e-7)
    with learn.no_bar(): torch.testing.assert_close(cb.p_y[-1].float(), marginal_likelihood(learn.get_preds()[0]))


def test_equal_shares(sets):
    "Equal counts, class-balanced batches and a model that says nothing: every class has the same share"
    full = load_digits()[0]
    images = torch.cat([full.images[full.targets == j][:40] for j in range(10)])
    train = ArrayDataset(images, torch.arange(10).repeat_interleave(40), full.vocab)
    class Each:
        def draw(self, bs): return torch.randint(40, (bs,)) + 40*(torch.arange(bs) % 10)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    for p in model.parameters(): nn.init.zeros_(p)
    cb = OverBalance()
    fit(make((train, sets[1]), cbs=cb, model=model, bs=50, n_batches=4, sampler=Each()), 1, 0.)
    for v, total in ((cb.positive[0], 4*.9), (cb.negative[0], 4*.9), (cb.p_y[0], 1.)):
        torch.testing.assert_close(v, torch.full((10,), total/10, dtype=torch.float64), rtol=1e-5, atol=0)


def test_no_effect(sets):
    "Bit for bit the same weights and losses as without"
    a, b = (fit(make(sets, cbs=c), 2, 1e-2) for c in (None, OverBalance()))
    assert all(torch.equal(x, y) for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values()))
    assert a.recorder.values == b.recorder.values
    assert torch.equal(torch.stack(a.recorder.losses), torch.stack(b.recorder.losses))


class Scale(Callback):
    "Automatic mixed precision's loss scaling, on the CPU; `bad` steps overflow"
    order = 10
    def __init__(self, bad=()): self.bad = bad
    def before_fit(self):
        self.learn.scaler, self.step = torch.amp.GradScaler('cpu', init_scale=2.**16, growth_interval=2), 0
    def before_backward(self):
        self.learn.loss_grad = self.scaler.scale(self.loss_grad)*(float('inf') if self.step in self.bad else 1)
        self.step += 1
    def before_step(self):
        for p in self.model.parameters(): p.grad = torch.where(p.grad.isfinite(), p.grad, 0)/self.scaler._scale
    def after_step(self): self.scaler.update(self.scaler._scale*2)
    def after_fit(self): self.learn.scaler = None


def test_loss_scale(sets):
    "Sums are free of the loss scale, though it changes from step to step"
    plain, scaled = OverBalance(), OverBalance()
    fit(make(sets, cbs=plain), 1, 1e-2); fit(make(sets, cbs=[scaled, Scale()]), 1, 1e-2)
    torch.testing.assert_close(scaled.positive, plain.positive, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(scaled.negative, plain.negative, rtol=1e-4, atol=1e-7)


def test_overflow_is_not_counted(sets):
    "A step whose gradient overflowed is left out, and the others stay"
    cb, spy = OverBalance(), Logits()
    fit(make(sets, cbs=[cb, spy, Scale(bad=(2, 5))]), 1, 1e-2)
    n = class_counts(sets[0].targets)
    pos, neg = masses([s for i, s in enumerate(spy.seen) if i not in (2, 5)], n.log(), 0)
    torch.testing.assert_close(cb.positive[0], pos, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(cb.negative[0], neg, rtol=1e-4, atol=1e-6)


@pytest.mark.cuda
@pytest.mark.parametrize('amp', ('fp16', 'bf16'))
def test_mixed_precision(sets, amp):
    "fastai's own mixed precision, on a GPU: sums as in float32, to its precision"
    got = []
    for cbs in ([], [MixedPrecision(amp)]):
        torch.manual_seed(0)
        dls, cb = array_dls(*sets, bs=64, n_batches=20, device='cuda'), OverBalance()
        fit(Learner(dls, net().cuda(), loss_func=BalancedSoftmax(class_counts(dls)).cuda(), cbs=[cb, *cbs]), 1, 1e-3)
        assert cb.positive.device.type == 'cpu' and cb.p_y.isfinite().all()
        got.append(cb)
    torch.testing.assert_close(got[0].positive, got[1].positive, rtol=.1, atol=.02)


def test_exception(sets):
    "After an error in an epoch: no hook is left, nothing is half recorded, and the next fit starts a new record"
    cb, learn, refs = OverBalance(), None, []
    class Boom(Callback):
        order = 60
        def after_pred(self):
            if self.training: refs.append(weakref.ref(self.pred))
        def after_loss(self):
            if self.training and self.epoch == 1 and self.iter == 3: raise RuntimeError('boom')
    learn = make(sets, cbs=cb)
    with pytest.raises(RuntimeError, match='boom'): fit(learn, 3, 1e-2, cbs=Boom())
    assert len(cb.positive) == len(cb.p_y) == 1
    for m in learn.model.modules():
        assert not (m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)
    learn.pred = learn.loss = learn.loss_grad = None
    gc.collect()
    assert all(r() is None for r in refs)                                   # and with the batch its hook
    with learn.no_bar(), learn.no_logging(): learn.validate()
    assert len(cb.positive) == len(cb.p_y) == 1 and cb.p_y.isfinite().all()
    before = cb.positive.clone()
    fit(learn, 2, 1e-2)
    assert len(cb.positive) == len(cb.p_y) == 2 and not torch.equal(cb.positive[:1], before)


def test_cancel(sets):
    "A fit that a callback stops early keeps its whole epochs"
    cb = OverBalance()
    class Stop(Callback):
        def after_batch(self):
            if self.training and self.epoch == 2: raise CancelFitException()
    fit(make(sets, cbs=cb), 5, 1e-2, cbs=Stop())
    assert len(cb.positive) == 2 and cb.p_y.isfinite().all()


def test_other_passes_leave_the_record_alone(sets):
    "validate, get_preds and lr_find add nothing; get_preds inside a fit does not disturb p(y)"
    cb = OverBalance()
    class Peek(Callback):
        order = 99
        def after_train(self): self.learn.get_preds(ds_idx=0, inner=True)
    learn = make(sets, cbs=cb)
    fit(learn, 2, 1e-2, cbs=Peek())
    rec = [v.clone() for v in (cb.positive, cb.negative, cb.p_y)]
    with learn.no_bar(), learn.no_logging():
        learn.validate(); learn.get_preds()
        import fastai.callback.schedule                                      # noqa: F401, has lr_find
        learn.lr_find(num_it=8, show_plot=False, suggest_funcs=())
    assert all(torch.equal(a, b) for a, b in zip(rec, (cb.positive, cb.negative, cb.p_y)))
    preds = []
    class Own(Callback):
        order = 98
        def before_validate(self): preds.clear()
        def after_pred(self):
            if not self.training: preds.append(self.pred.as_subclass(Tensor).softmax(1).double())
        def after_epoch(self): self.p = torch.cat(preds).mean(0) if preds else None
    own = Own()
    fit(learn, 1, 1e-2, cbs=[own, Peek()])
    assert len(cb.positive) == 1                                             # a new fit, a new record
    torch.testing.assert_close(cb.p_y[0], own.p, rtol=1e-6, atol=0)


def test_resumed_fit_goes_on(sets):
    cb = OverBalance()
    learn = make(sets, cbs=cb)
    fit(learn, 2, 1e-2); fit(learn, 4, 1e-2, start_epoch=2)
    assert len(cb.positive) == len(cb.p_y) == 4


def test_without_validation(sets):
    "p(y) is nan, and the plot has the gradient alone"
    from balms.stage import TrainOnly
    cb = OverBalance()
    learn = fit(make(sets, cbs=[cb, TrainOnly()]), 2, 1e-2)
    assert len(cb.positive) == 2 and cb.p_y.isnan().all() and cb.p_y.shape == (2, 10)
    assert len(cb.plot()) == 1
    learn.remove_cb(TrainOnly)
    with learn.no_bar(), learn.no_logging(): learn.validate()
    assert cb.p_y.isnan().all()


def test_plot(sets):
    "Shares that sum to 1, common classes first; any order of classes"
    flip = [ArrayDataset(d.images, 9 - d.targets, d.vocab) for d in sets]                # class 9 is the most common
    cb = OverBalance()
    with pytest.raises(ValueError, match='no epoch'): cb.plot()
    fit(make(flip, cbs=cb), 2, 1e-2)
    ax, ax2 = cb.plot(epoch=0)
    lines = {l.get_label(): torch.as_tensor(l.get_ydata()) for l in ax.lines}
    torch.testing.assert_close(lines['raises the logit (its own samples)'],
                               (cb.positive[0]/cb.positive[0].sum()).flip(0))
    torch.testing.assert_close(lines['lowers it (those of others)'], (cb.negative[0]/cb.negative[0].sum()).flip(0))
    torch.testing.assert_close(torch.as_tensor(ax2.lines[0].get_ydata()), cb.p_y[0].flip(0))
    assert any(set(l.get_ydata()) == {.1} for l in ax.lines) and len(cb.plot(axs=ax)) == 1


def test_soft_targets_and_other_losses(sets):
    "MixUp, label smoothing and sigmoids are recorded as well; the sign says what raises a logit"
    n = class_counts(sets[0].targets)
    for loss, cbs in ((BalancedSoftmax(n), [MixUp()]), (BalancedSoftmax(n, label_smoothing=.1), []),
                      (BalancedSigmoid(n), [])):
        cb = OverBalance()
        fit(make(sets, loss, [cb, *cbs]), 1, 1e-2)
        assert (cb.positive > 0).all() and (cb.negative > 0).all()
        same = torch.allclose(cb.positive.sum(), cb.negative.sum(), rtol=1e-4)
        assert same != isinstance(loss, BalancedSigmoid)                     # only a softmax's rows sum to 0


def test_dense_predictions(sets):
    "Logits (n, k, h, w): every pixel is a sample"
    class Grid(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 10, 5, 4)
        def forward(self, x): return self.conv(x)
    def loss(z, y): return F.cross_entropy(z, y[:, None, None].expand(-1, *z.shape[2:]))
    cb, spy = OverBalance(), Logits()
    fit(make(sets, loss, [cb, spy], Grid()), 1, 1e-2)
    want = 0
    for _, z, y in spy.seen:
        flat = z.movedim(1, -1).reshape(-1, 10)
        hot = F.one_hot(y.repeat_interleave(z.shape[2]*z.shape[3]), 10)
        err = (flat.softmax(1) - hot)/len(flat)
        want = want + torch.stack([(-err).clamp(min=0).sum(0), err.clamp(min=0).sum(0)])
    torch.testing.assert_close(torch.stack([cb.positive[0], cb.negative[0]]), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('model, error, text', [
    (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 7)), ValueError,
     r'the 10 classes of `counts` on axis 1, but the model returns shape \(37, 7\)'),
    (lambda: nn.Sequential(nn.Flatten(0), nn.Linear(64*37, 10)), ValueError, r'returns shape \(10,\)'),
    (lambda: Heads(), TypeError, 'returns a tuple'),
], ids=('classes', 'axis', 'heads'))
def test_errors(sets, model, error, text):
    with pytest.raises(error, match=text): fit(make(sets, cbs=OverBalance(), model=model()), 1)


class Heads(nn.Module):
    def __init__(self): super().__init__(); self.a, self.b = nn.Linear(64, 10), nn.Linear(64, 10)
    def forward(self, x): return self.a(x.flatten(1)), self.b(x.flatten(1))


def test_export(sets, tmp_path):
    cb = OverBalance()
    learn = fit(make(sets, cbs=cb), 1, 1e-2)
    learn.export(tmp_path/'m.pkl')
    again = next(c for c in load_learner(tmp_path/'m.pkl').cbs if isinstance(c, OverBalance))
    assert torch.equal(again.positive, cb.positive)


# --- Eq. 12

def weights(s, n, cbs=True):
    "Log of what samples of each of two classes weigh, with plain margin s, beside plain softmax"
    s = torch.tensor(s, dtype=torch.float64)
    r = (n[0]/n[1]).log()
    wrong = lambda m: F.logsigmoid(-m)
    return torch.stack([wrong(s + r) - wrong(s), wrong(s - r) - wrong(s)]) - n.log()*cbs


@pytest.mark.parametrize('imbalance', (10., 100., 1000.))
def test_exponent(imbalance):
    "Of Balanced Softmax with class-balanced sampling: 1 if sure and wrong, 2 if undecided, 3 if sure and right"
    n = torch.tensor([imbalance, 1.], dtype=torch.float64)
    for s, p in ((-40., 1), (0., 2), (40., 3)):
        w = weights(s, n)
        assert abs((w[1] - w[0])/n[0].log() - p) < 1e-9
        w = weights(s, n, cbs=False)
        assert abs((w[1] - w[0])/n[0].log() - (p - 1)) < 1e-9


def test_equation_12():
    "The ratios and their one factor; Eq. 11 by the plain softmax; and that Eq. 12's positives do not converge to it"
    torch.manual_seed(0)
    k, n = 4, torch.tensor([1000., 100, 10, 5], dtype=torch.float64)
    y = torch.arange(k).repeat_interleave(torch.tensor([20, 10, 5, 5]))
    N = torch.bincount(y).double()
    f = torch.randn(len(y), 6, dtype=torch.float64)
    gaps = []
    for scale in (1., 5., 15., 30.):
        z = scale*F.one_hot(y, k).double() + torch.randn(len(y), k, dtype=torch.float64)
        q, p = (z + n.log()).softmax(1), z.softmax(1)
        c = (q*n[y, None]/n).sum(1, keepdim=True)
        torch.testing.assert_close(q, p*n/n[y, None]*c)
        torch.testing.assert_close(c, q.gather(1, y[:, None])/p.gather(1, y[:, None]))
        hot = F.one_hot(y, k).double()
        rest = lambda v: v*(1 - hot)
        eq11 = ((hot*rest(q).sum(1, keepdim=True) - rest(q))/N[y, None]).T @ f
        pair = lambda j, i: (c*p[:, i:i+1]*f)[y == j].sum(0)
        exact = torch.stack([sum(n[i]/n[j]*pair(j, i)/N[j] - n[j]/n[i]*pair(i, j)/N[i] for i in range(k) if i != j)
                             for j in range(k)])
        torch.testing.assert_close(exact, eq11)
        gaps.append(((rest(q).sum(1)/rest(p).sum(1)).log().abs().mean(), c.log().abs().mean()))
    assert gaps[-1][1] < 1e-6 and gaps[-1][0] > 1                              # c -> 1, (1 - phihat)/(1 - phi) does not
