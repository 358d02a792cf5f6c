"Edge cases of `balms.after_training`: dtypes, scale, sizes, boundaries, what there is no answer to"
import math

import pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from balms.after_training import estimate_prior, fit_temperature
from balms.theory import GaussianClasses, change_prior

quick = settings(max_examples=40, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)


def rng(seed): return torch.Generator().manual_seed(seed)
def problem(seed, n=300, k=4, noise=1.):
    "Logits with some truth in them, and labels drawn from a softmax of them"
    z = 2*torch.randn(n, k, dtype=torch.double, generator=rng(seed))
    return noise*z, torch.multinomial(z.softmax(1), 1, generator=rng(seed + 1))[:, 0]


# the temperature

@quick
@given(seeds, st.floats(1e-3, 1e3))
def test_temperature_scales_with_the_logits(seed, f):
    z, y = problem(seed)
    assert math.isclose(fit_temperature(f*z, y), f*fit_temperature(z, y), rel_tol=1e-8)


@quick
@given(seeds, st.lists(st.floats(1, 1e4), min_size=4, max_size=4))
def test_temperature_is_a_minimum(seed, prior):
    z, y = problem(seed)
    shift = torch.tensor(prior, dtype=torch.double).log()
    loss = lambda t: F.cross_entropy(z/t + shift, y).item()
    try: T = fit_temperature(z, y, prior)
    except ValueError as e: assert 'say nothing' in str(e) and loss(1e9) <= loss(1e3) + 1e-9; return
    assert loss(T) <= min(loss(T*f) for f in (.5, .9, .99, 1.01, 1.1, 2)) + 1e-12


def test_temperature_against_a_grid():
    "An independent search, on a fine grid"
    z, y = problem(3)
    grid = torch.logspace(-1, 1, 20001, dtype=torch.double)
    best = grid[torch.stack([F.cross_entropy(z/t, y) for t in grid[::200]]).argmin()*200]
    near = torch.linspace(best*.95, best*1.05, 2001, dtype=torch.double)
    assert abs(fit_temperature(z, y) - near[torch.stack([F.cross_entropy(z/t, y) for t in near]).argmin()]) < 1e-4*best


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize('int_dtype', [torch.uint8, torch.int32, torch.int64])
def test_temperature_dtypes(dtype, int_dtype):
    z, y = problem(0)
    assert math.isclose(fit_temperature(z.to(dtype), y.to(int_dtype)), fit_temperature(z, y), rel_tol=.01)
    assert isinstance(fit_temperature(z.to(dtype), y), float)


def test_temperature_keeps_the_answer_and_needs_no_grad():
    z, y = problem(1, noise=5.)
    z.requires_grad_()
    T = fit_temperature(z, y)
    assert torch.equal((z/T).argmax(1), z.argmax(1)) and z.grad is None


def test_temperature_of_huge_and_masked_logits():
    "Logits of 1e4, and classes that a mask has put far below: no overflow"
    z, y = problem(2)
    assert math.isclose(fit_temperature(1e4*z, y), 1e4*fit_temperature(z, y), rel_tol=1e-6)
    far = torch.cat([z, torch.full((len(z), 1), -1e4, dtype=torch.double)], 1)
    assert math.isclose(fit_temperature(far, y), fit_temperature(z, y), rel_tol=1e-6)


def test_one_wrong_sample_is_enough():
    z = torch.eye(3, dtype=torch.double).repeat(10, 1)*5
    y = torch.arange(3).repeat(10)
    with pytest.raises(ValueError, match='no temperature is too low'): fit_temperature(z, y)
    y[0] = 1
    T = fit_temperature(z, y)
    assert math.isclose((z/T).softmax(1).amax(), 29/30, rel_tol=1e-6)          # as sure as it is right


@pytest.mark.parametrize(
    'bad',
    [lambda z, y: (z[:0], y[:0]), lambda z, y: (z[0], y[0]), lambda z, y: (z, y[:-1])],
)
def test_temperature_shapes(bad):
    with pytest.raises(ValueError, match='Need logits'): fit_temperature(*bad(*problem(0)))


# the class shares

world = GaussianClasses(2*torch.randn(6, 4, generator=rng(0)))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seeds)
def test_a_known_prior_is_found(seed):
    g = rng(seed)
    true = torch.distributions.Dirichlet(torch.ones(6)).sample() if seed % 2 else torch.rand(6, generator=g)
    n = (6000*true/true.sum()).long().clamp_min(1)
    x, y = world.sample(n, g)
    q = estimate_prior(world.posterior(x))
    assert (q - n/n.sum()).abs().max() < .03


def test_whatever_prior_the_probabilities_hold_for():
    x, _ = world.sample([900, 300, 100, 50, 20, 5], rng(1))
    p = world.posterior(x)
    q = estimate_prior(p, tol=1e-11)
    for old in ([1, 2, 3, 4, 5, 6], [1e6, 1e4, 1e3, 100, 10, 1]):
        assert (estimate_prior(change_prior(p, old), old, tol=1e-11) - q).abs().max() < 1e-4


@quick
@given(seeds, st.integers(1, 40), st.integers(2, 8))
def test_the_bound_is_one(seed, n, k):
    "No other shares have a likelihood that is higher by more than the tolerance"
    p = (3*torch.randn(n, k, dtype=torch.double, generator=rng(seed))).softmax(1)
    q = estimate_prior(p, tol=1e-5)
    assert abs(q.sum().item() - 1) < 1e-12 and (q >= 0).all() and q.dtype == torch.double
    assert (p/(p @ q)[:, None]).mean(0).max() <= 1 + 1e-5 + 1e-12                 # the gradient, by hand
    L = lambda v: (p @ v).log().mean()
    others = torch.distributions.Dirichlet(torch.ones(k, dtype=torch.double)).sample((200,))
    assert all(L(v) <= L(q) + 1e-5 for v in others) and all(L(.999*q + .001*v) <= L(q) + 1e-5 for v in others)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision(dtype):
    x, _ = world.sample([900, 300, 100, 50, 20, 5], rng(1))
    p = world.posterior(x)
    assert (estimate_prior(p.to(dtype)) - estimate_prior(p)).abs().max() < .01


def test_confident_rows_and_absent_classes():
    "Zeros in probabilities are no division by zero; a class that nobody can be gets exactly nothing"
    p = torch.eye(4)[torch.tensor([0, 0, 0, 1])]
    assert (estimate_prior(p) - torch.tensor([.75, .25, 0, 0])).abs().max() < 1e-12
    with pytest.raises(ValueError, match='k > 1'): estimate_prior(torch.ones(3, 1))
    # nothing to learn from: as at the start
    assert (estimate_prior(torch.full((5, 4), .25)) - .25).abs().max() < 1e-12


def test_many_classes():
    "1,000 classes, and a prior with a tail of 1e5"
    k, g = 1000, rng(0)
    p = (6*F.one_hot(torch.randint(100, (3000,), generator=g), k) + torch.randn(3000, k, generator=g)).softmax(1)
    q = estimate_prior(p, tol=1e-4)
    assert q.isfinite().all() and q[:100].sum() > .9
    n = 1e5**torch.linspace(0, -1, k, dtype=torch.double)
    assert estimate_prior(change_prior(p.double(), n), n, tol=1e-4)[:100].sum() > .9


def test_inputs_are_left_alone():
    p = problem(0)[0].softmax(1).requires_grad_()
    before = p.detach().clone()
    q = estimate_prior(p, torch.tensor([4., 3, 2, 1]))
    assert torch.equal(p.detach(), before) and not q.requires_grad


@pytest.mark.parametrize(
    'p, what',
    [
        (torch.rand(4), 'must be'),
        (torch.zeros(0, 3), 'must be'),
        (torch.tensor([[0.5, 0.2]]), 'sum to 1'),
        (torch.tensor([[1.5, -0.5]]), 'sum to 1'),
        (torch.tensor([[math.nan, 1.0]]), 'finite'),
    ],
)
def test_not_probabilities(p, what):
    with pytest.raises(ValueError, match=what): estimate_prior(p)
