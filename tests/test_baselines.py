"""The baselines against formulas written class by class in float64, and the contract that they share with Balanced
Softmax."""
import copy, itertools, pickle, sys
from functools import partial
import pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from balms.baselines import CBW, LADE, LDAM, CosineLinear, DeferredReweighting, FocalLoss, LogitAdjusted
from balms.baselines import SoftmaxEqualization, VectorScaling, class_weights, effective_number
from balms.core import BalancedSigmoid, BalancedSoftmax
from balms.feature_losses import FeatureLoss, RangeLoss, lifted_structure
from balms.sigmoid_baselines import ClassBalancedLoss, SigmoidEqualization, SigmoidFocalLoss

COUNTS = [5000, 900, 120, 20, 3]
K = len(COUNTS)
N = torch.tensor(COUNTS, dtype=torch.float64)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ops = dict(eager=lambda f: f, compiled=lambda f: torch.compile(f, backend='aot_eager', fullgraph=True))
INV = (1/N)/(1/N).mean()
EFF = (1/((1 - .9999**N)/(1 - .9999)))
EFF = EFF/EFF.mean()


def ce(z): return -(z.exp()/z.exp().sum(1, keepdim=True)).log()
def focal(x, gamma=2.):
    p = x.exp()/x.exp().sum(1, keepdim=True)
    return -(1 - p)**gamma*p.log()
def per_label(change):
    "Column j: the loss of each sample if j were its label"
    def one(z, j): return z.exp().sum(1).log() - z[:, j]
    return lambda x: torch.stack([one(change(x, j), j) for j in range(x.shape[1])], 1)
def ldam(x, j):
    own = torch.eye(K, dtype=torch.float64)[j]
    return 30*(x - own*.5*(min(COUNTS)/COUNTS[j])**.25)
def eql(x, j):
    out = (N/N.sum() < .3/K) & (torch.arange(K) != j)
    return torch.where(out, torch.tensor(float('-inf'), dtype=torch.float64), x)
def lade(x, y, released=False):
    p, r = N/N.sum(), 0.
    for c in range(K):
        m = ((1/K)/p[c if released else y]*x[:, c].exp()).mean().log()
        r = r + p[c]*((-x[y == c, c].mean() if (y == c).any() else 0) + m + .01*m**2)
    return .1*r


# name: how to make it, the loss of each sample under each label (N, k), class weights
SOFTMAX = dict(
    cbw=(CBW, ce, INV),
    focal=(FocalLoss, focal, None),
    cb=(ClassBalancedLoss, ce, EFF),
    ldam=(LDAM, per_label(ldam), None),
    eql=(partial(SoftmaxEqualization, gamma=1), per_label(eql), None),
    la=(partial(LogitAdjusted, tau=0.7), lambda x: ce(x + 0.7 * N.log()), None),
    vs=(VectorScaling, lambda x: ce((N / N.max()) ** 0.15 * x + 1.25 * N.log()), None),
    lade=(LADE, lambda x: ce(x + N.log()), None),
    lade_released=(partial(LADE, released=True), lambda x: ce(x + N.log()), None),
    cb_samples=(partial(ClassBalancedLoss, mean_over='samples'), ce, EFF),
)
INDEX_ONLY = dict(
    ldam='the margin is that of the true class', eql='left out of the softmax', lade='which samples are of class c'
)
INDEX_ONLY['lade_released'] = INDEX_ONLY['lade']


def sigmoid_focal(x, hot):
    p = hot*x.sigmoid() + (1 - hot)*(1 - x.sigmoid())
    return -((hot*.25 + (1 - hot)*.75)*(1 - p)**2*p.log()).sum(1)
def sigmoid_eql(x, hot):
    fg = (hot.sum(1, keepdim=True) > 0).double()
    p = hot*x.sigmoid() + (1 - hot)*(1 - x.sigmoid())
    return -((1 - fg*(N/N.sum() < 1.76e-3)*(1 - hot))*p.log()).sum(1)
def sigmoid_cb(gamma):
    def f(x, hot):
        p = hot*x.sigmoid() + (1 - hot)*(1 - x.sigmoid())
        return -((hot*EFF).sum(1, keepdim=True)*(1 - p)**gamma*p.log()).sum(1)
    return f
SIGMOID = dict(
    focal=(SigmoidFocalLoss, sigmoid_focal),
    eql=(SigmoidEqualization, sigmoid_eql),
    cb=(partial(ClassBalancedLoss, kind='sigmoid'), sigmoid_cb(0)),
    cb_focal=(partial(ClassBalancedLoss, kind='focal'), sigmoid_cb(0.5)),
)
EVERY = {**{f'softmax_{k}': v[0] for k, v in SOFTMAX.items()}, **{f'sigmoid_{k}': v[0] for k, v in SIGMOID.items()}}
every = pytest.mark.parametrize('make', EVERY.values(), ids=EVERY)


def batch(kind, dtype, ignore=None):
    shape = {'index': (8, K), 'probabilities': (8, K), 'one': (K,)}.get(kind, (2, K, 3, 4))
    x = torch.randn(shape).clamp(-2, 2).to(dtype)
    if kind.startswith('prob'):
        return x, torch.randn(shape).softmax(1).to(torch.float64 if dtype == torch.float64 else torch.float32)
    y = torch.randint(K, shape[:1] + shape[2:] if len(shape) > 1 else ())
    if ignore is not None and y.ndim: y.view(-1)[::3] = ignore
    return x, y


def rows(x, y):
    "Logits and targets as (n, k) and (n,) or (n, k), and the shape of the samples"
    if x.ndim == 1: x, y = x[None], y[None]
    return x.movedim(1, -1).reshape(-1, K), y.movedim(1, -1).reshape(-1, K) if y.is_floating_point() else y.reshape(-1)


def naive(name, x, y, ignore, reduction):
    _, terms, w = SOFTMAX[name]
    x, y = rows(x.double(), y)
    l, w = terms(x), torch.ones(K, dtype=torch.float64) if w is None else w
    if y.is_floating_point(): l, total = (y.double()*w*l).sum(1), len(y)
    else:
        keep = y != ignore
        y = torch.where(keep, y, 0)
        l, total = torch.where(keep, (w*l).gather(1, y[:, None])[:, 0], 0.), (w[y]*keep).sum()
        if name == 'cb_samples': total = keep.sum()
        if name.startswith('lade'):
            r = lade(x[keep], y[keep], name == 'lade_released')
            if reduction == 'mean': return l.sum()/total + r
            l = l + r*keep
    return l if reduction == 'none' else l.sum() if reduction == 'sum' else l.sum()/total


@pytest.mark.parametrize('mode', ops)
@pytest.mark.parametrize('kind', ('index', 'index_2d', 'probabilities', 'probabilities_2d', 'one'))
@pytest.mark.parametrize('name', SOFTMAX)
def test_softmax_matrix(name, kind, mode):
    make = SOFTMAX[name][0]
    if kind.startswith('prob') and name in INDEX_ONLY:
        with pytest.raises(ValueError, match=INDEX_ONLY[name]): make(COUNTS)(*batch(kind, torch.float32))
        return
    torch._dynamo.reset()
    for dtype, reduction, ignore in itertools.product(
        DTYPES if mode == 'eager' else DTYPES[1:3], ('mean', 'sum', 'none'), (-100, 2)
    ):
        if kind.startswith('prob') and ignore != -100 or mode == 'compiled' and (ignore == 2) != (reduction == 'mean'):
            continue
        x, y = batch(kind, dtype, ignore)
        if kind == 'one' and y == ignore: y = (y + 1) % K
        x.requires_grad_()
        got = ops[mode](make(COUNTS, reduction=reduction, ignore_index=ignore))(x, y)
        want = naive(name, x.detach(), y, ignore, reduction).reshape(got.shape)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
        if reduction == 'none' and x.ndim > 1: assert got.shape == x[:, 0].shape
        got.sum().backward()
        ref = x.detach().double().requires_grad_()
        naive(name, ref, y, ignore, reduction).sum().backward()
        assert x.grad.dtype == dtype
        tol = {torch.bfloat16: 2e-2, torch.float16: 4e-3}.get(dtype, 2e-5)
        torch.testing.assert_close(x.grad.double(), ref.grad, rtol=tol, atol=tol)


@pytest.mark.parametrize('mode', ops)
@pytest.mark.parametrize('kind', ('index', 'index_2d', 'rows'))
@pytest.mark.parametrize('name', SIGMOID)
def test_sigmoid_matrix(name, kind, mode):
    make, terms = SIGMOID[name]
    torch._dynamo.reset()
    for dtype, reduction, ignore in itertools.product(
        DTYPES if mode == 'eager' else DTYPES[1:2], ('mean', 'sum', 'none'), (-100, 2)
    ):
        x, y = batch('index' if kind == 'rows' else kind, dtype, ignore)
        keep = torch.ones_like(y, dtype=torch.bool) if kind == 'rows' else y != ignore
        t = F.one_hot(y.clamp_min(0), K).movedim(-1, 1).float() if kind == 'rows' else y
        x.requires_grad_()
        got = ops[mode](make(COUNTS, reduction=reduction, ignore_index=ignore))(x, t)
        ref = x.detach().double().requires_grad_()
        l = terms(rows(ref, y)[0], F.one_hot(y.clamp_min(0).flatten(), K).double())*keep.flatten()
        want = l.reshape(y.shape) if reduction == 'none' else l.sum() if reduction == 'sum' else l.sum()/keep.sum()
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
        got.sum().backward(); want.sum().backward()
        tol = {torch.bfloat16: 2e-2, torch.float16: 4e-3}.get(dtype, 2e-5)
        torch.testing.assert_close(x.grad.double(), ref.grad, rtol=tol, atol=tol)


@every
def test_eval_is_the_plain_loss(make):
    x, y = batch('index', torch.float64)
    w = torch.rand(K) + .1
    loss = make(COUNTS, weight=w)
    assert not torch.allclose(loss(x, y), loss.eval()(x, y))
    s = getattr(loss, 's', 1)
    if getattr(loss, 'kind', 'softmax') == 'softmax' and not isinstance(loss, (SigmoidFocalLoss, SigmoidEqualization)):
        torch.testing.assert_close(loss(x, y), F.cross_entropy(s*x, y, w.double()))
        torch.testing.assert_close(loss.activation(x), (s*x).softmax(1))
        t = x.softmax(1)
        # plain: probabilities are welcome
        torch.testing.assert_close(make(COUNTS).eval()(x, t), F.cross_entropy(s*x, t))
    else:
        torch.testing.assert_close(
            loss(x, y),
            F.binary_cross_entropy_with_logits(x, F.one_hot(y, K).double(), w.double(), reduction='none').sum(1).mean(),
        )
        torch.testing.assert_close(loss.activation(x), x.sigmoid())
    assert torch.equal(loss.decodes(x), x.argmax(1)) and loss.y_int


@pytest.mark.parametrize('name', ['cbw', 'focal', 'cb', 'la', 'vs', 'lade', 'ldam'])
def test_label_smoothing_and_weights(name):
    """(1 - e) l_y + e/k sum_j l_j with weights w_j, the mean over the weights of the labels; LDAM: the margin stays on
    the true class"""
    make, terms, own = SOFTMAX[name]
    x, y = batch('index', torch.float64, -100)
    w = torch.rand(K).double() + .1
    keep = y != -100
    i = torch.where(keep, y, 0)
    both = w if own is None else own*w
    if name == 'ldam': l = ce(30*(x - F.one_hot(i, K)*(.5*(min(COUNTS)/N)**.25)))
    else: l = terms(x)
    smooth = (.9*both[i]*l[torch.arange(8), i] + .1/K*(both*l).sum(1))*keep
    want = smooth.sum()/(both[i]*keep).sum() + (lade(x[keep], y[keep]) if name == 'lade' else 0)
    torch.testing.assert_close(make(COUNTS, weight=w, label_smoothing=.1)(x, y), want, rtol=1e-5, atol=1e-6)


def test_refusals():
    x, y = batch('index', torch.float32)
    with pytest.raises(ValueError, match='has no label_smoothing'): SoftmaxEqualization(COUNTS, label_smoothing=.1)
    for kind in ('sigmoid', 'focal'):
        with pytest.raises(ValueError, match='label_smoothing is for kind softmax'):
            ClassBalancedLoss(COUNTS, kind=kind, label_smoothing=0.1)
        for t in (torch.full((8,), K), torch.ones(8, K), torch.zeros(8, K)):
            with pytest.raises(ValueError, match='have no class weight'): ClassBalancedLoss(COUNTS, kind=kind)(x, t)
    for bad in (dict(beta=-1), dict(beta=1.1), dict(kind='x'), dict(gamma=-1)):
        with pytest.raises(ValueError): ClassBalancedLoss(COUNTS, **bad)
    with pytest.raises(ValueError, match='gamma'): SoftmaxEqualization(COUNTS, gamma=2)
    with pytest.raises(ValueError, match='alpha'): SigmoidFocalLoss(alpha=3)


@every
def test_bad_targets_counts_and_options(make):
    f, x = make(COUNTS), torch.randn(8, K)
    for t in (7, -1):
        with pytest.raises(IndexError, match='0..4'): f(x, torch.full((8,), t))
    with pytest.raises(ValueError, match='counts 5'): f(torch.randn(8, 4), torch.zeros(8).long())
    f = make(COUNTS).eval()                                # losses that draw numbers do so in training
    column = torch.zeros(8, 1, dtype=torch.int8)           # as tables have labels
    assert torch.equal(f(x, column), f(x, column[:, 0].long()))
    for t in (torch.zeros(3).long(), torch.zeros(8, 2).long(), torch.rand(8, 4)):
        with pytest.raises((ValueError, RuntimeError)): f(x, t)
    for counts, message in [
        ([], 'empty'),
        ([5, 0, 3, 0], r'no samples in classes \[1, 3\]'),
        ([5, -1], r'negative for classes \[1\]'),
        ([[5, 1]], 'one-dimensional'),
        ('abc', 'must be numbers'),
    ]:
        with pytest.raises((ValueError, TypeError), match=message): make(counts)
    with pytest.raises(ValueError, match='reduction'): make(COUNTS, reduction='avg')
    with pytest.raises(ValueError, match='weight has shape'): make(COUNTS, weight=[1, 2])


@every
@pytest.mark.parametrize('dtype', (torch.bfloat16, torch.float16), ids=str)
def test_autocast(make, dtype):
    net, x, y = torch.nn.Linear(6, K), torch.randn(8, 6), torch.randint(K, (8,))
    with torch.autocast('cpu', dtype):
        logits = net(x)
        l = make(COUNTS)(logits, y)
    assert logits.dtype == dtype and l.dtype == torch.float32
    torch.testing.assert_close(l, make(COUNTS)(logits.float(), y))


@every
def test_buffers_move_keep_precision_and_travel(make):
    loss = make(COUNTS, weight=torch.rand(K))
    before = {n: b.clone() for n, b in loss.named_buffers()}
    for cast in (
        torch.nn.ModuleDict(dict(l=loss)).half()['l'],
        loss.double(),
        pickle.loads(pickle.dumps(loss)),
        copy.deepcopy(loss),
    ):
        for n, b in cast.named_buffers(): assert b.dtype == before[n].dtype and torch.equal(b, before[n])
    other = make([9]*K, weight=torch.ones(K))
    other.load_state_dict(loss.state_dict())
    x, y = batch('index', torch.float32)
    torch.testing.assert_close(other(x, y), loss(x, y))
    assert all(b.device.type == 'meta' for b in loss.to('meta').buffers())
    assert type(loss).__name__ in repr(loss)


@every
def test_axis(make):
    x, y = torch.randn(6, 3, K), torch.randint(K, (6, 3))
    a, b = make(COUNTS, axis=-1), make(COUNTS)
    torch.testing.assert_close(a(x, y), b(x.movedim(-1, 1), y))
    torch.testing.assert_close(a.activation(x), b.activation(x.movedim(-1, 1)).movedim(1, -1))
    assert torch.equal(a.decodes(x), x.argmax(-1))


@every
def test_gradcheck(make):
    x, y = torch.randn(6, K, dtype=torch.double, requires_grad=True), torch.tensor([0, 1, 2, 3, 4, -100])
    assert torch.autograd.gradcheck(lambda x: make(COUNTS)(x, y), x)


def test_half_of_the_coins():
    """The equalization loss leaves out a rare class with probability gamma, from the global generator, and nothing for
    ignored samples"""
    x, y, n = torch.zeros(20000, 2, requires_grad=True), torch.zeros(20000).long(), [99, 1]
    l = SoftmaxEqualization(n, gamma=.7, threshold=.1, reduction='none')(x, y)
    assert abs((l == 0).float().mean() - .7) < .02
    state = torch.get_rng_state()
    a = SoftmaxEqualization(n, threshold=.1)(x, y)
    torch.set_rng_state(state)
    assert torch.equal(a, SoftmaxEqualization(n, threshold=.1)(x, y))
    y[5:] = -100
    SoftmaxEqualization([1, 1], gamma=1, threshold=1)(x, y).backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize('gamma', (0, .1, .5, 1, 2, 5))
def test_focal_of_the_sure(gamma):
    """1 - p rounds to 0: no nan for any gamma, and the gradient of a sample that is wrong for sure is that of cross-
    entropy"""
    x = torch.tensor([[400., 0, -400], [400, 0, -400]], requires_grad=True)
    FocalLoss(gamma=gamma, reduction='sum')(x, torch.tensor([0, 2])).backward()
    assert x.grad[0].abs().max() == 0
    torch.testing.assert_close(x.grad[1], torch.tensor([1., 0, -1]))
    x.grad = None
    SigmoidFocalLoss(gamma=gamma, alpha=None, reduction='sum')(x, torch.tensor([0, 2])).backward()
    assert x.grad.isfinite().all()
    torch.testing.assert_close(x.grad[1, [0, 2]], torch.tensor([1., -1]))


@pytest.mark.parametrize('make', (SigmoidFocalLoss, SigmoidEqualization, BalancedSigmoid))
def test_background(make):
    "Index k is a row of zeros; rare classes are pushed down by it like all others"
    x, bg = torch.randn(4, K), torch.full((4,), K)
    torch.testing.assert_close(make(COUNTS)(x, bg), make(COUNTS)(x, torch.zeros(4, K)))
    plain = F.binary_cross_entropy_with_logits(x, torch.zeros(4, K), reduction='none').sum(1).mean()
    if make is not SigmoidFocalLoss: torch.testing.assert_close(make(COUNTS)(x, bg), plain)


counts_st = st.lists(st.integers(1, 10**7), min_size=2, max_size=20)


@settings(max_examples=60, deadline=None)
@given(counts_st, st.integers(0, 2**31))
def test_identities(counts, seed):
    g, k = torch.Generator().manual_seed(seed), len(counts)
    x, y = torch.randn(6, k, generator=g), torch.randint(k, (6,), generator=g)
    plain, bs = F.cross_entropy(x, y), BalancedSoftmax(counts)(x, y)
    bce = F.binary_cross_entropy_with_logits(x, F.one_hot(y, k).float(), reduction='none').sum(1).mean()
    same = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for f in (
        FocalLoss(counts, gamma=0),
        ClassBalancedLoss(counts, beta=0),
        LDAM(counts, max_m=0, s=1),
        SoftmaxEqualization(counts, gamma=0),
        SoftmaxEqualization(counts, threshold=0),
        VectorScaling(counts, tau=0, gamma=0),
        LogitAdjusted(counts, tau=0),
        LADE(counts, alpha=0, target_prior=counts),
        CBW(counts, weight=counts),
    ):
        same(f(x, y), plain)
    for f in (VectorScaling(counts, tau=1, gamma=0), LogitAdjusted(counts), LADE(counts, alpha=0)): same(f(x, y), bs)
    for f in (
        SigmoidFocalLoss(gamma=0, alpha=None),
        SigmoidEqualization(counts, threshold=0),
        ClassBalancedLoss(counts, beta=0, kind='sigmoid'),
        ClassBalancedLoss(counts, beta=0, kind='focal', gamma=0),
    ):
        same(f(x, y), bce)
    same(ClassBalancedLoss(counts, beta=1)(x, y), CBW(counts)(x, y))
    equal = [counts[0]]*k
    for f in (CBW, ClassBalancedLoss, SoftmaxEqualization, VectorScaling, partial(LADE, alpha=0)):
        same(f(equal)(x, y), plain)
    for f in (CBW, LDAM, VectorScaling, partial(LADE, alpha=.1)): same(f([3*c for c in counts])(x, y), f(counts)(x, y))
    e = effective_number(counts)
    assert (
        (e >= 1 - 1e-9).all()
        and (e <= torch.tensor(counts) + 1e-6).all()
        and (e <= 10000 + 1e-6).all()
        and class_weights(counts).mean().sub(1).abs() < 1e-5
    )


@settings(max_examples=60, deadline=None)
@given(counts_st, st.sampled_from(DTYPES), st.floats(0, 300), st.sampled_from(sorted(EVERY)), st.integers(0, 2**31))
def test_finite(counts, dtype, scale, name, seed):
    g = torch.Generator().manual_seed(seed)
    x = ((torch.rand(4, len(counts), generator=g)*2 - 1)*scale).to(dtype).requires_grad_()
    l = EVERY[name](counts)(x, torch.randint(len(counts), (4,), generator=g))
    l.backward()
    assert l.isfinite() and x.grad.isfinite().all()


def fit(loss, cbs=(), epochs=2, model=None):
    from fastai.callback.progress import ProgressCallback
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.learner import Learner
    items = [(torch.randn(8), torch.tensor(i % K)) for i in range(16)]
    dls = DataLoaders(DataLoader(items, bs=8), DataLoader(items, bs=8))
    learn = Learner(dls, model or torch.nn.Linear(8, K), loss_func=loss, cbs=list(cbs))
    learn.remove_cb(ProgressCallback)
    with learn.no_logging(): learn.fit(epochs, 1e-2)
    return learn


@every
def test_fastai_mixup(make):
    from fastai.callback.mixup import MixUp
    learn = fit(make(COUNTS), [MixUp()])
    assert learn.recorder.values[-1][1] > 0
    probs, _, decoded, losses = learn.get_preds(with_decoded=True, with_loss=True)
    assert len(losses) == 16 and torch.equal(decoded, probs.argmax(1))
    logits = learn.model(torch.stack([x for x, _ in learn.dls.valid_ds]))
    torch.testing.assert_close(probs, learn.loss_func.activation(logits).detach())
    assert type(learn.loss_func).from_dls([0, 0, 1, 2]).y_int


def watch_weight(loss):
    "A callback that notes the loss's weight at each training step"
    from fastai.callback.core import Callback
    class Watch(Callback):
        order, seen = 1, []
        def before_batch(self):
            if self.training: self.seen.append(None if loss.weight is None else loss.weight.clone())
    return Watch()


@pytest.mark.parametrize(
    'make', (LDAM, BalancedSoftmax, BalancedSigmoid, FocalLoss, lambda n: torch.nn.CrossEntropyLoss())
)
def test_deferred(make):
    loss = make(COUNTS)
    watch = watch_weight(loss)
    fit(loss, [DeferredReweighting(COUNTS, start=.5), watch], epochs=2)
    assert [w is None for w in watch.seen] == [True, True, False, False] and loss.weight is None
    torch.testing.assert_close(watch.seen[-1].double(), EFF, rtol=1e-5, atol=1e-5)


def test_deferred_with_own_weights_resumed_and_broken_off():
    w = torch.tensor([1., 2, 3, 4, 5])
    loss = LDAM(COUNTS, weight=w)
    watch = watch_weight(loss)
    # a run that is taken up at 90%
    fit(loss, [DeferredReweighting(COUNTS, progress=lambda: .9), watch], epochs=1)
    assert torch.equal(loss.weight, w)
    torch.testing.assert_close(watch.seen[0].double(), w*EFF, rtol=1e-5, atol=1e-5)
    from fastai.callback.core import Callback
    class Break(Callback):
        order = 2
        def before_batch(self): raise RuntimeError('broken off')
    drw = DeferredReweighting(COUNTS, start=0)
    with pytest.raises(RuntimeError, match='broken off'): fit(loss, [drw, Break()])
    assert not torch.equal(loss.weight, w)
    fit(loss, [drw])
    assert torch.equal(loss.weight, w)


def test_deferred_refusals():
    for loss, message in (
        (CBW(COUNTS), 'from the start'),
        (ClassBalancedLoss(COUNTS), 'from the start'),
        (F.cross_entropy, 'needs a loss with a buffer'),
    ):
        with pytest.raises(ValueError, match=message): fit(loss, [DeferredReweighting(COUNTS)])
    with pytest.raises(ValueError, match='5 counts for 3 class weights'):
        fit(LDAM([1, 2, 3], weight=[1, 1, 1]), [DeferredReweighting(COUNTS)])


def test_cosine_classifier_of_a_network_is_found_and_bounded():
    from balms.models import find_classifier
    net = torch.nn.Sequential(torch.nn.Linear(8, 4), CosineLinear(4, K))
    assert find_classifier(net) is net[1] and net[1].bias is None
    assert net(100*torch.randn(50, 8)).abs().max() <= 1 + 1e-6
    assert net.half()(torch.randn(2, 8).half()).dtype == torch.half


def naive_range(x, y, alpha=5e-5, beta=1e-4, margin=2e4):
    total, centres = 0., []
    for c in sorted(set(y.tolist())):
        own = [v for v, t in zip(x, y) if t == c]
        centres.append(sum(own)/len(own))
        d = sorted((((a - b)**2).sum() for a, b in itertools.combinations(own, 2)), reverse=True)[:2]
        if d: total = total + alpha*len(d)/sum(1/v for v in d)
    return total + beta*max(margin - min(((a - b)**2).sum() for a, b in itertools.combinations(centres, 2)), 0)


def test_range_loss():
    x, y = torch.randn(20, 6).double()*30, torch.arange(20) % 7
    torch.testing.assert_close(RangeLoss()(x, y), naive_range(x, y))
    same = torch.ones(4, 3, requires_grad=True)                                                    # no distance at all
    RangeLoss()(same, torch.tensor([0, 0, 1, 1])).backward()
    assert same.grad.isfinite().all()


def test_feature_loss():
    from fastai.callback.mixup import CutMix, MixUp
    net = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, K))
    def first(weight):
        torch.manual_seed(0)
        learn = fit(
            BalancedSoftmax(COUNTS), [FeatureLoss(lambda x, y: x.square().sum(), weight)], model=copy.deepcopy(net)
        )
        assert not learn.model[-1]._forward_pre_hooks
        return learn
    a, b = first(0.), first(1.)
    assert b.recorder.losses[0] > a.recorder.losses[0]
    # its gradient arrives
    assert b.model[0].weight.norm() < a.model[0].weight.norm()
    for mix in (MixUp, CutMix):
        with pytest.raises(ValueError, match='have two'):
            fit(BalancedSoftmax(COUNTS), [FeatureLoss(RangeLoss()), mix()], model=copy.deepcopy(net))


def test_lifted_structure(monkeypatch):
    monkeypatch.setitem(sys.modules, 'pytorch_metric_learning.losses', None)
    monkeypatch.setitem(sys.modules, 'pytorch_metric_learning', None)
    with pytest.raises(ImportError, match='pip install pytorch-metric-learning'): lifted_structure()
    monkeypatch.undo()
    pytest.importorskip('pytorch_metric_learning')
    x = torch.randn(8, 4, requires_grad=True)
    lifted_structure()(x, torch.arange(8) % 4).backward()
    assert x.grad.isfinite().all()
