"""What must hold for any numbers: logits in -1e4..1e4, counts 1..1e9, 2 to 100,000 classes, every floating type.
Compiled and eager, autocast and float32, CPU and CUDA agree; a trained classifier can be exported.

300 examples a property, the same ones each time; with `BALMS_PROFILE=nightly` 10,000, others each time."""
import pytest, torch, torch.nn.functional as F
from hypothesis import HealthCheck, given, settings, strategies as st
from balms.core import (
    BalancedSigmoid,
    BalancedSoftmax,
    adjust_logits,
    balanced_softmax_loss,
    class_counts,
    log_odds_prior,
    log_prior,
)
from balms.methods import METHODS

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EPS = {d: torch.finfo(d).eps for d in DTYPES}
some = settings(suppress_health_check=[HealthCheck.too_slow])


@st.composite
def cases(draw, most=17, rows=3):
    """(logits, labels, counts, dtype): 2 to 2^`most` classes, at most 100,000, from numbers that a seed draws and from
    the ends of their ranges"""
    k = min(round(2**draw(st.floats(1, most))), 100_000)
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype, y = draw(st.sampled_from(DTYPES)), torch.randint(k, (rows,), generator=g)
    counts = dict(
        any=lambda: (10 ** (9 * torch.rand(k, generator=g, dtype=torch.float64))).round().long(),
        equal=lambda: torch.full((k,), draw(st.sampled_from((1, 7, 10**9)))),
        head=lambda: torch.ones(k, dtype=torch.long).index_fill(0, y[:1], 10**9),
        tail=lambda: torch.full((k,), 10**9).index_fill(0, y[:1], 1),
    )[draw(st.sampled_from(('any', 'any', 'equal', 'head', 'tail')))]()
    x = draw(st.sampled_from((0., 1., 30., 1e4)))*(2*torch.rand(rows, k, generator=g, dtype=torch.float64) - 1)
    how = draw(st.sampled_from(('as drawn', 'as drawn', 'high', 'low', 'equal')))
    if how == 'equal': x = torch.full_like(x, draw(st.sampled_from((-1e4, 0., 1e4))))
    elif how != 'as drawn': x = x.clamp(-1e4, 1e4).scatter(1, y[:, None], 1e4 if how == 'high' else -1e4)
    return x.to(dtype), y, counts, dtype


def graded(f, x, *args):
    "Loss and gradient"
    x = x.detach().clone().requires_grad_()
    l = f(x, *args)
    return l.detach(), torch.autograd.grad(l.sum(), x)[0]


def naive(x, y, counts, tau=1.):
    "Eq. 4 and its gradient, phihat - onehot, in float64"
    z = x.double() + tau*counts.double().log()
    p = (z - z.max(1, keepdim=True).values).exp()
    lse = p.sum(1).log() + z.max(1).values
    return lse - z.gather(1, y[:, None])[:, 0], p/p.sum(1, keepdim=True) - F.one_hot(y, x.shape[1])


def close(a, b, dtype, scale, k, out=0.):
    """Equal to the rounding of what it is computed in, at numbers of size `scale` and in torch's sum over `k` classes,
    of the prior, which is float32, and of the type that the result has, `out`"""
    tol = EPS[torch.promote_types(dtype, torch.float32)]*(6*scale + k/8) + 6*EPS[torch.float32]*30 + out
    torch.testing.assert_close(a.double(), b.double(), rtol=tol, atol=tol)


def each_close(g, want, of, dtype, scale, k=1, times=1):
    """Each entry of a gradient, p - onehot, for itself, `times` larger than it was computed: p to the relative rounding
    of an exponential of numbers of size `scale`, then the difference, and the type that it has. `of`: the size of p,
    or of what moves with the logit"""
    wide = torch.promote_types(dtype, torch.float32)
    rel = EPS[wide]*(6*scale + k/8) + 6*EPS[torch.float32]*30
    # smaller numbers become zero
    least = max(torch.finfo(dtype).tiny*EPS[dtype], torch.finfo(torch.float32).tiny)*times
    # a difference from one is right to the rounding of one
    tol = rel*of.double() + 2*EPS[dtype]*want.double().abs() + 2*EPS[wide]*(want < 0) + least
    wrong = (g.double() - want.double()).abs() > tol
    assert not wrong.any(), (int(wrong.sum()), g[wrong][:3], want[wrong][:3], tol[wrong][:3])


@some
@given(cases())
def test_balanced_softmax_is_finite_and_has_the_right_value_and_gradient(case):
    "Eq. 4 in float64, term by term"
    x, y, counts, dtype = case
    l, g = graded(lambda x: BalancedSoftmax(counts, reduction='none')(x, y), x)
    want, wg = naive(x, y, counts)
    assert (
        l.isfinite().all()
        and (l >= 0).all()
        and g.isfinite().all()
        and l.dtype == torch.promote_types(dtype, torch.float32)
        and g.dtype == dtype
    )
    size = float(x.abs().max())
    close(l, want, dtype, size, len(counts))
    each_close(g, wg, wg + F.one_hot(y, len(counts)), dtype, size, len(counts))
    close(l.mean(), BalancedSoftmax(counts)(x, y), dtype, size, len(counts))
    assert torch.equal(l, balanced_softmax_loss(x, y, counts, reduction='none'))


@some
@given(cases(), st.floats(0, 2))
def test_identities_of_balanced_softmax(case, tau):
    """Equal counts and tau=0 are cross-entropy, to the bit; counts count by their ratios; a shift of all logits and an
    order of the classes change nothing; evaluation is cross-entropy; a prior that is added can be taken away"""
    x, y, counts, dtype = case
    size, k, wide = float(x.abs().max()), len(counts), torch.promote_types(dtype, torch.float32)
    ce = F.cross_entropy(x.to(wide), y, reduction='none')
    loss = lambda x, y, counts, **kw: balanced_softmax_loss(x, y, counts, reduction='none', **kw)
    assert (
        torch.equal(loss(x, y, torch.full((k,), 5), tau=tau), ce)
        and torch.equal(loss(x, y, counts, tau=0), ce)
        and torch.equal(loss(x, y, counts, tau=tau, target_prior=counts), ce)
    )
    assert torch.equal(BalancedSoftmax(counts, tau=tau, reduction='none').eval()(x, y), ce)
    l = loss(x, y, counts, tau=tau)
    close(loss(x, y, counts.double()*1e-3, tau=tau), l, dtype, size, k)
    close(loss(x.to(wide) + 3, y, counts, tau=tau), l, dtype, size, k)
    perm = torch.randperm(k, generator=torch.Generator().manual_seed(k))
    close(loss(x[:, perm], perm.argsort()[y], counts[perm], tau=tau), l, dtype, size, k)
    close(loss(adjust_logits(x.to(wide), counts, tau), y, counts, tau=tau), ce, dtype, size, k)
    prior = log_prior(counts, tau)
    assert prior.isfinite().all() and prior.max() == 0 and prior.dtype == torch.float32
    assert graded(lambda x: loss(x, y, counts, tau=tau), x.double())[1].sum(1).abs().max() < 1e-9


@some
@given(cases(most=14), st.booleans(), st.booleans())
def test_balanced_sigmoid_is_finite_and_has_the_right_value_and_gradient(case, constant, foreground_only):
    "Supplement A.2 in float64, with a background row"
    x, y, counts, dtype = case
    k, y = len(counts), y.clone()
    y[-1] = k
    total = int(counts.sum()) + 1
    f = BalancedSigmoid(counts, total=total, constant=constant, foreground_only=foreground_only, reduction='none')
    l, g = graded(lambda x: f(x, y), x)
    n = counts.double()
    shift = (n/(total - n)*(k - 1 if constant else 1)).log()
    z, t = x.double() + shift*((y < k)[:, None] if foreground_only else 1), F.one_hot(y, k + 1)[:, :k].double()
    size = float(x.abs().max()) + float(shift.abs().max())
    assert (
        l.isfinite().all()
        and g.isfinite().all()
        and torch.equal(f.shift, log_odds_prior(counts, total, constant=constant))
    )
    each_close(g, z.sigmoid() - t, z.sigmoid()*(-z).sigmoid(), dtype, size)
    want = (F.softplus(z) - t*z).sum(1)
    torch.testing.assert_close(
        l.double(),
        want,
        rtol=6 * (EPS[torch.promote_types(dtype, torch.float32)] * size + EPS[torch.float32] * 30),
        atol=1e-4 * k**0.5,
    )


@some
@given(cases(most=10), st.sampled_from(sorted(m for m, v in METHODS.items() if v.loss)), st.integers(0, 2**31))
def test_every_loss_of_the_tables_is_finite_and_agrees_with_itself_in_float64(case, method, seed):
    "Value and gradient in each type, against the same loss of the same logits in float64"
    x, y, counts, dtype = case
    f = METHODS[method].loss(counts)
    if METHODS[method].head: x = (x.double()/1e4).to(dtype)                     # cosines
    # as a training step hands them over
    def once(x):
        torch.manual_seed(seed)
        return graded(lambda x: f(x.to(torch.promote_types(x.dtype, torch.float32)), y), x)
    (l, g), (want, wg) = once(x), once(x.double())
    assert l.isfinite() and g.isfinite().all(), (method, l, want)
    size = float(x.abs().max())*(getattr(f, 's', 1) or 1)
    tol = 20*EPS[torch.promote_types(dtype, torch.float32)]*(size + 30)
    torch.testing.assert_close(l.double(), want.double(), rtol=tol, atol=tol*len(counts)**.5)
    torch.testing.assert_close(
        g.double(),
        wg.double(),
        rtol=tol + EPS[dtype],
        atol=4 * EPS[torch.promote_types(dtype, torch.float32)] * (getattr(f, "s", 1) or 1)
        + torch.finfo(dtype).tiny * EPS[dtype],
    )


@some
@given(cases(most=12))
def test_gradients_of_gradients(case):
    "phihat (onehot - phihat), as the Meta Sampler needs them; by autograd and finite"
    x, y, counts, _ = case
    x = x.double().requires_grad_()
    g, = torch.autograd.grad(balanced_softmax_loss(x, y, counts, reduction='sum'), x, create_graph=True)
    v = torch.linspace(-1, 1, x.shape[1], dtype=torch.float64)
    h, = torch.autograd.grad((g*v).sum(), x)
    p = naive(x.detach(), y, counts)[1] + F.one_hot(y, x.shape[1])
    want = p*(v - (p*v).sum(1, keepdim=True))
    # of each for itself; the prior is float32
    assert ((h - want).abs() <= 1e-5*p + 1e-15).all()


@settings(some, max_examples=min(settings().max_examples//10, 200))
@given(cases(most=12), st.sampled_from((BalancedSoftmax, BalancedSigmoid)))
def test_compiled_and_eager_agree(case, loss):
    "One compiled function for any number of classes, value and gradient"
    x, y, counts, dtype = case
    if loss is BalancedSigmoid: f = loss(counts, total=int(counts.sum()) + 1)
    else: f = loss(counts)
    torch._dynamo.reset()
    (l, g), (l2, g2) = graded(f, x, y), graded(
        torch.compile(f, backend='aot_eager', fullgraph=True, dynamic=True), x, y
    )
    size = float(x.abs().max())
    close(l, l2, dtype, size*len(counts)**.5, len(counts)); each_close(g2, g, g.abs(), dtype, size, len(counts))


def step(device='cpu', autocast=None, compiled=False):
    "Loss and gradients of one training step of a small network on long-tailed digits"
    from balms.data import load_digits, long_tail
    from balms.models import get_model
    torch.manual_seed(0)
    train = long_tail(load_digits()[0], 50)
    x, y, net = (
        (train.images[:64].float() / 255).to(device),
        train.targets[:64].to(device),
        get_model('small_cnn', 10, 1).to(device),
    )
    loss = BalancedSoftmax(class_counts(train)).to(device)
    f = lambda x, y: loss(net(x), y)
    if compiled: torch._dynamo.reset(); f = torch.compile(f, backend='aot_eager')
    with torch.autocast(device, autocast, enabled=autocast is not None): l = f(x, y)
    assert l.dtype == torch.float32
    l.backward()
    return l.item(), torch.cat([p.grad.flatten().cpu() for p in net.parameters()])


@pytest.mark.parametrize(
    'kw,tol',
    [
        (dict(compiled=True), 1e-5),
        (dict(autocast=torch.bfloat16), 2e-2),
        pytest.param(dict(device='cuda'), 1e-4, marks=pytest.mark.cuda),
    ],
    ids=['compiled', 'autocast', 'cuda'],
)
def test_a_training_step_agrees_with_float32_eager_on_cpu(kw, tol):
    (a, g), (b, h) = step(), step(**kw)
    assert abs(a - b) < tol*abs(a) and (g - h).norm() < 3*tol*g.norm(), ((g - h).norm()/g.norm(), a, b)


@pytest.mark.cuda
@settings(some, max_examples=100)
@given(cases())
def test_cpu_and_cuda_agree(case):
    x, y, counts, dtype = case
    f = BalancedSoftmax(counts, reduction='none')
    (l, g), (l2, g2) = graded(f, x, y), graded(f.cuda(), x.cuda(), y.cuda())
    size = float(x.abs().max())
    close(l, l2.cpu(), dtype, size, len(counts))
    each_close(g2.cpu(), g, g + F.one_hot(y, len(counts)), dtype, size, len(counts))


def test_a_trained_classifier_can_be_exported(tmp_path):
    """By torch.export, saved and loaded, for any number of images: the logits and the predictions of the model; no
    count is in it"""
    from balms.data import load_digits
    from balms.recipe import Recipe
    from balms.runs import run
    from balms.weights import load_model
    r = Recipe(method='balms', iters=40, iters2=20)
    run(r, tmp_path, device='cpu')
    net, _ = load_model(tmp_path/r.key/'model.safetensors')
    x = load_digits()[1].images[:50].float()/255
    # torch 2.6 cannot load what it has traced strictly
    program = torch.export.export(net, (x[:8],), dynamic_shapes=({0: torch.export.Dim('n', min=2)},), strict=False)
    torch.export.save(program, f := tmp_path/'model.pt2')
    again = torch.export.load(f).module()
    for n in (2, 8, 50): torch.testing.assert_close(again(x[:n]), net(x[:n]))
