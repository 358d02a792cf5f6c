"""The losses: every combination of input that `F.cross_entropy` takes, compiled and not, and what must hold for any
numbers."""
import itertools, shutil, subprocess, sys
import pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from balms.core import BalancedSigmoid, BalancedSoftmax, adjust_logits, balanced_softmax_loss
from balms.core import class_counts, log_odds_prior, log_prior

COUNTS = [5000, 900, 120, 20, 3]
K = len(COUNTS)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TARGETS = ['index', 'index_2d', 'probabilities', 'probabilities_2d', 'one']
ops = dict(eager=lambda f: f, compiled=lambda f: torch.compile(f, backend='aot_eager', fullgraph=True))


def make(kind, dtype, ignore=None):
    shape = {'index': (8, K), 'probabilities': (8, K), 'one': (K,)}.get(kind, (2, K, 3, 4))
    x = torch.randn(shape).to(dtype)
    if kind.startswith('prob'):
        return x, torch.randn(shape).softmax(1).to(torch.float64 if dtype == torch.float64 else torch.float32)
    y = torch.randint(K, shape[:1] + shape[2:] if len(shape) > 1 else ())
    if ignore is not None and y.ndim: y.view(-1)[::3] = ignore
    return x, y


def naive(x, y, counts, ignore, reduction, weight=None):
    "Eq. 4 of the paper in float64, term by term"
    x = x.double() if x.ndim > 1 else x.double()[None]
    y = y if y.ndim or y.is_floating_point() else y[None]
    n = torch.tensor(counts, dtype=torch.float64).view(1, -1, *[1]*(x.ndim - 2))
    logp = (n*x.exp()/(n*x.exp()).sum(1, keepdim=True)).log()
    if y.is_floating_point(): l = -(y.double()*logp).sum(1)
    else:
        keep = y != ignore
        l = -logp.gather(1, torch.where(keep, y, 0).unsqueeze(1)).squeeze(1)*keep
    if reduction == 'none': return l
    if reduction == 'sum': return l.sum()
    return l.sum()/(l.numel() if y.is_floating_point() else keep.sum())


@pytest.mark.parametrize('mode', ops)
@pytest.mark.parametrize('kind', TARGETS)
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_matrix(dtype, kind, mode):
    torch._dynamo.reset()
    for reduction, ignore in itertools.product(('mean', 'sum', 'none'), (-100, 2)):
        if kind.startswith('prob') and ignore != -100: continue       # `F.cross_entropy` refuses this too
        x, y = make(kind, dtype, ignore)
        x.requires_grad_()
        loss = ops[mode](BalancedSoftmax(COUNTS, reduction=reduction, ignore_index=ignore))
        got, want = loss(x, y), naive(x.detach(), y, COUNTS, ignore, reduction)
        want = want.reshape(got.shape)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
        got.sum().backward()
        ref = x.detach().double().requires_grad_()
        naive(ref, y, COUNTS, ignore, reduction).sum().backward()
        assert x.grad.dtype == dtype
        tol = {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(dtype, 1e-5)
        torch.testing.assert_close(x.grad.double(), ref.grad, rtol=tol, atol=tol)


@pytest.mark.parametrize('smoothing', (0., .1))
@pytest.mark.parametrize('weighted', (False, True))
@pytest.mark.parametrize('kind', TARGETS)
def test_options_as_cross_entropy(kind, weighted, smoothing):
    x, y = make(kind, torch.float32)
    kw = dict(weight=torch.rand(K) + .1 if weighted else None, label_smoothing=smoothing)
    shift = log_prior(COUNTS).view(*([1, K] + [1]*(x.ndim - 2) if x.ndim > 1 else [K]))
    torch.testing.assert_close(balanced_softmax_loss(x, y, COUNTS, **kw), F.cross_entropy(x + shift, y, **kw))
    torch.testing.assert_close(BalancedSoftmax(COUNTS, **kw)(x, y), F.cross_entropy(x + shift, y, **kw))


@pytest.mark.skipif(not (shutil.which('g++') or shutil.which('clang++')), reason='torch.compile needs a C++ compiler')
def test_inductor():
    torch._dynamo.reset()
    x, y = make('index', torch.float32)
    f = BalancedSoftmax(COUNTS)
    torch.testing.assert_close(torch.compile(f)(x, y), f(x, y))


@pytest.mark.parametrize('dtype', (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize('loss', (BalancedSoftmax, BalancedSigmoid))
def test_autocast(loss, dtype):
    "Under autocast the loss is computed in float32: it equals the float32 loss of the rounded logits"
    net, x, y = torch.nn.Linear(6, K), torch.randn(8, 6), torch.randint(K, (8,))
    with torch.autocast('cpu', dtype):
        logits = net(x)
        l = loss(COUNTS)(logits, y)
    assert logits.dtype == dtype and l.dtype == torch.float32
    torch.testing.assert_close(l, loss(COUNTS)(logits.float(), y))


counts_st = st.lists(st.integers(1, 10**9), min_size=2, max_size=40)


@settings(max_examples=100, deadline=None)
@given(counts_st, st.sampled_from(DTYPES), st.floats(0, 1e4), st.integers(0, 2**31))
def test_finite_and_right(counts, dtype, scale, seed):
    "Counts 1 to 1e9, logits up to 1e4 in size: finite, gradient rows sum to 0, scaling counts changes nothing"
    g = torch.Generator().manual_seed(seed)
    x = ((torch.rand(4, len(counts), generator=g)*2 - 1)*min(scale, 6e4)).to(dtype).requires_grad_()
    y = torch.randint(len(counts), (4,), generator=g)
    l = balanced_softmax_loss(x, y, counts, reduction='none')
    l.sum().backward()
    assert l.isfinite().all() and (l >= 0).all() and x.grad.isfinite().all()
    assert x.grad.double().sum(1).abs().max() < {torch.bfloat16: .1, torch.float16: .02}.get(dtype, 1e-4)
    torch.testing.assert_close(
        balanced_softmax_loss(x, y, [7 * c for c in counts], reduction='none'), l, rtol=1e-5, atol=1e-3
    )
    s = BalancedSigmoid(counts, total=2*sum(counts))(x.detach(), y)
    assert s.isfinite()


@settings(max_examples=100, deadline=None)
@given(counts_st, st.floats(0, 2), st.integers(0, 2**31))
def test_identities(counts, tau, seed):
    g = torch.Generator().manual_seed(seed)
    k = len(counts)
    x, y = torch.randn(6, k, generator=g), torch.randint(k, (6,), generator=g)
    ce = F.cross_entropy(x, y)
    assert torch.equal(balanced_softmax_loss(x, y, [counts[0]]*k, tau=tau), ce)
    assert torch.equal(balanced_softmax_loss(x, y, counts, tau=0), ce)
    assert torch.equal(balanced_softmax_loss(x, y, counts, tau=tau, target_prior=counts), ce)
    torch.testing.assert_close(
        balanced_softmax_loss(adjust_logits(x, counts, tau), y, counts, tau=tau), ce, rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(adjust_logits(x, counts) + log_prior(counts), x, rtol=1e-4, atol=1e-4)
    assert log_prior(counts, tau).max() == 0
    assert torch.equal(log_odds_prior([counts[0]]*k, constant=True), torch.zeros(k))


def test_the_shift_has_the_sign_of_theorem_1():
    """log n is added in training and taken off after it: a rare class has the smaller shift, and more probability at
    test"""
    shift = log_prior([100, 10, 1])
    assert shift[0] > shift[1] > shift[2]
    odds = log_odds_prior([100, 10, 1], total=1000)
    assert odds[0] > odds[1] > odds[2]
    same = torch.zeros(1, 3)
    assert adjust_logits(same, [100, 10, 1]).argmax() == 2                        # post-hoc: towards the rare class
    loss = balanced_softmax_loss(same.expand(3, 3), torch.arange(3), [100, 10, 1], reduction='none')
    assert loss[0] < loss[1] < loss[2]                                            # a rare label surprises more


def test_eval_is_cross_entropy_and_shift_is_training_only():
    x, y = make('index', torch.float32)
    loss = BalancedSoftmax(COUNTS)
    assert not torch.allclose(loss(x, y), F.cross_entropy(x, y))
    assert torch.equal(loss.eval()(x, y), F.cross_entropy(x, y))
    assert torch.equal(loss.activation(x), x.softmax(1)) and torch.equal(loss.decodes(x), x.argmax(1))


def test_state_dict_moves_and_keeps_precision():
    net = torch.nn.ModuleDict(dict(loss=BalancedSoftmax(COUNTS), fc=torch.nn.Linear(2, 2))).half()
    assert net['fc'].weight.dtype == torch.half and torch.equal(net['loss'].shift, log_prior(COUNTS))
    other = BalancedSoftmax([1]*K)
    other.load_state_dict(BalancedSoftmax(COUNTS).state_dict())
    assert torch.equal(other.shift, log_prior(COUNTS))
    assert BalancedSoftmax(COUNTS).to('meta').shift.device.type == 'meta'


BAD_COUNTS = [
    ([], 'empty'),
    ([5, 0, 3, 0], r'no samples in classes \[1, 3\]'),
    ([5, -1], r'negative for classes \[1\]'),
    ([5, float('nan')], r'not finite for classes \[1\]'),
    ([float('inf'), 1], r'not finite for classes \[0\]'),
    ([[5, 1]], 'one-dimensional'),
    (7, 'one-dimensional'),
    ('abc', 'must be numbers'),
    (None, 'must be numbers'),
]


@pytest.mark.parametrize(
    'make', (BalancedSoftmax, BalancedSigmoid, log_prior, lambda c: adjust_logits(torch.zeros(1, 2), c))
)
@pytest.mark.parametrize('counts,message', BAD_COUNTS, ids=str)
def test_bad_counts(make, counts, message):
    with pytest.raises((ValueError, TypeError), match=message): make(counts)


@pytest.mark.parametrize('loss', (BalancedSoftmax, BalancedSigmoid))
def test_bad_targets(loss):
    f, x = loss(COUNTS), torch.randn(8, K)
    with pytest.raises(IndexError, match='0..4'): f(x, torch.full((8,), 6))
    with pytest.raises(IndexError, match='0..4'): f(x, torch.full((8,), -1))
    with pytest.raises(ValueError, match='counts 5'): f(torch.randn(8, 4), torch.zeros(8).long())
    with pytest.raises(ValueError, match='shape of input'): f(x, torch.rand(8, 4))
    with pytest.raises(ValueError, match='input'): f(x, torch.zeros(3).long())


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_class_weights_in_any_precision(dtype):
    n, k = 8, K
    x, y, w = torch.randn(n, k).to(dtype), torch.randint(k, (n,)), torch.rand(k) + .1
    counts = torch.randint(1, 99, (k,))
    want = F.cross_entropy(x.double() + log_prior(counts), y, w.double())
    for loss in (
        BalancedSoftmax(counts, weight=w),
        BalancedSoftmax(counts, weight=w).half(),
        BalancedSoftmax(counts, weight=w).double(),
    ):
        assert loss.weight.dtype == torch.float32
        torch.testing.assert_close(loss(x, y).double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        balanced_softmax_loss(x, y, counts, weight=w.to(dtype)).double(),
        F.cross_entropy(x.double() + log_prior(counts), y, w.to(dtype).double()),
        rtol=1e-5,
        atol=1e-5,
    )


def test_core_imports_torch_alone():
    code = (
        "import sys, torch; before = set(sys.modules); import balms.core; print(sorted(m for m in set(sys.modules) -"
        " before if not m.startswith('balms')))"
    )
    assert (
        subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'
    )


def test_from_dls_does_not_open_images(tmp_path):
    "fastai's `DataBlock` looks at one image when it is set up; after that the files may be anything"
    import numpy as np
    from PIL import Image
    from fastai.data.core import DataLoaders, TfmdDL
    from fastai.vision.all import (
        CategoryBlock,
        DataBlock,
        ImageBlock,
        MultiCategoryBlock,
        get_image_files,
        parent_label,
    )
    def write(image):
        for c, n in (('ant', 9), ('bee', 4), ('cow', 2)):
            (tmp_path/'d'/c).mkdir(parents=True, exist_ok=True)
            for f in (tmp_path / 'd' / c / f'{i}.png' for i in range(n)):
                Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(f) if image else f.write_text('no image')
    split = lambda fs: ([i for i, f in enumerate(fs) if f.stem != '0'], [i for i, f in enumerate(fs) if f.stem == '0'])
    for y_block in (CategoryBlock, MultiCategoryBlock):
        write(image=True)
        get_y = parent_label if y_block is CategoryBlock else (lambda f: [f.parent.name])
        dsets = DataBlock((ImageBlock, y_block), get_items=get_image_files, get_y=get_y, splitter=split).datasets(
            tmp_path / 'd'
        )
        dls = DataLoaders(TfmdDL(dsets.train, bs=2, num_workers=0), TfmdDL(dsets.valid, bs=2, num_workers=0))
        write(image=False)
        assert class_counts(dls).tolist() == [8, 3, 1]
        assert torch.equal(BalancedSoftmax.from_dls(dls).shift, log_prior([8, 3, 1]))
        # samples, not labels
        assert torch.equal(BalancedSigmoid.from_dls(dls).shift, log_odds_prior([8, 3, 1], total=12))
