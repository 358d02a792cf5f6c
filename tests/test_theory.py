"""Properties of `balms.theory`, and the equation index: what the notebooks show must be in it, and what it links to
must exist."""
import importlib, json, math, re
from pathlib import Path

import pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from balms._modidx import d
from balms.core import BalancedSoftmax, log_prior
from balms.theory import (
    GaussianClasses,
    change_prior,
    class_margins,
    fit_linear,
    loss_error,
    margin_bound,
    optimal_margins,
)

nbs = Path(__file__).parent.parent/'nbs'
quick = settings(max_examples=60, deadline=None, derandomize=True)
count = st.floats(1, 26148)
counts = st.lists(count, min_size=2, max_size=40).map(lambda v: torch.tensor(v, dtype=torch.double))
seeds = st.integers(0, 10_000)


def rng(seed): return torch.Generator().manual_seed(seed)


# Theorem 1

@quick
@given(counts, seeds, st.floats(.1, 8))
def test_theorem_1(n, seed, spread):
    "Bayes for the training set, by hand, is Eq. 3 of the balanced posterior"
    k, g = len(n), rng(seed)
    log_lik = spread*torch.randn(20, k, dtype=torch.double, generator=g)
    lik = log_lik.exp()
    phihat = lik*n/(lik*n).sum(1, keepdim=True)
    phi = lik/lik.sum(1, keepdim=True)
    eta = (phi/phi[:, -1:]).log()
    assert ((eta + n.log()).softmax(1) - phihat).abs().max() < 1e-12
    assert (change_prior(phi, n) - phihat).abs().max() < 1e-12
    assert ((eta + log_prior(n).double()).softmax(1) - phihat).abs().max() < 1e-5       # the package's shift is float32


@pytest.mark.parametrize('k', [2, 1230])
def test_theorem_1_at_scale(k):
    n = 26148.**torch.linspace(0, -1, k, dtype=torch.double)
    world = GaussianClasses(torch.randn(k, 8, generator=rng(0)))
    x, _ = world.sample([1]*k, rng(1))
    assert (change_prior(world.posterior(x[:100]), n) - world.posterior(x[:100], n)).abs().max() < 1e-12


@quick
@given(counts, seeds, st.floats(1e-3, 1e3))
def test_change_prior(n, seed, scale):
    g = rng(seed); k = len(n)
    p = torch.randn(5, k, dtype=torch.double, generator=g).softmax(1)
    q = torch.rand(k, dtype=torch.double, generator=g) + .01
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    close(change_prior(p, n, old=n), p)
    close(change_prior(p, scale*n), change_prior(p, n))
    close(change_prior(change_prior(p, n), q, old=n), change_prior(p, q))
    close(change_prior(p, n).sum(1), torch.ones(5, dtype=torch.double))
    assert change_prior(p.float(), n).dtype == torch.float32


@quick
@given(seeds, st.integers(2, 6), st.integers(1, 4))
def test_gaussian_classes(seed, k, dim):
    g = rng(seed)
    means, std, prior = (
        torch.randn(k, dim, generator=g),
        torch.rand(k, generator=g) + 0.3,
        torch.rand(k, generator=g) + 0.1,
    )
    world = GaussianClasses(means, std)
    x, y = world.sample(torch.arange(1, k + 1), g)
    assert torch.equal(torch.bincount(y), torch.arange(1, k + 1))
    ref = torch.stack(
        [torch.distributions.Normal(m.double(), s.double()).log_prob(x).sum(1) for m, s in zip(means, std)], 1
    )
    torch.testing.assert_close(world.log_lik(x), ref)
    joint = ref.exp()*prior.double()
    torch.testing.assert_close(world.posterior(x, prior), joint/joint.sum(1, keepdim=True))


def test_fit_linear():
    "A free bias takes up the shift, without it it cannot; the minimum is one; failures have a name"
    world, n = GaussianClasses([[-1., 0], [1, 0], [0, 1]], std=[1., 2., .5]), torch.tensor([600., 60, 20])
    x, y = world.sample(n, rng(0))
    a, b = fit_linear(x, y), fit_linear(x, y, BalancedSoftmax(n))
    torch.testing.assert_close((a(x) - n.log()).softmax(1), b(x).softmax(1), rtol=0, atol=1e-4)
    a, b = fit_linear(x + 1, y, bias=False), fit_linear(x + 1, y, BalancedSoftmax(n), bias=False)
    assert ((a(x + 1) - n.log()).softmax(1) - b(x + 1).softmax(1)).abs().max() > .05
    net = fit_linear(x, y, weight_decay=.1)
    with torch.enable_grad():
        for p in net.requires_grad_().parameters(): p.grad = None
        F.cross_entropy(net(x), y).backward()
    assert (net.weight.grad + .1*net.weight).abs().max() < 1e-6 and (net.bias.grad + .1*net.bias).abs().max() < 1e-6
    with pytest.raises(ValueError, match='linearly separable'):
        fit_linear(torch.tensor([[-1.0], [1.0]]).double(), torch.tensor([0, 1]))
    with pytest.raises(RuntimeError, match='Not converged after 1 steps'): fit_linear(x, y, max_iter=1)


# Theorem 2

@quick
@given(counts, seeds, st.floats(1e-3, 1e3), st.floats(1e-4, 1e4))
def test_optimal_margins(n, seed, beta, C):
    star, k = optimal_margins(n, beta), len(n)
    torch.testing.assert_close(star.sum(), torch.tensor(beta, dtype=torch.double))
    torch.testing.assert_close(star*n**.25, (star*n**.25)[:1].expand(k))                   # proportional to n^(-1/4)
    term = lambda g: margin_bound(n, g, C)['complexity'].sum()
    torch.testing.assert_close(term(star)*beta, 4*math.sqrt(C)*((n**-.25).sum())**2)       # equality in Cauchy-Schwarz
    other = beta*-torch.rand(50, k, dtype=torch.double, generator=rng(seed)).clamp(1e-6, 1 - 1e-6).log()
    other = beta*other/other.sum(1, keepdim=True)
    mixed = torch.cat([other, .99*star + .01*other])
    assert all(term(g) >= term(star)*(1 - 1e-12) for g in mixed)                           # no other margins do better


@quick
@given(counts, seeds, st.floats(.01, 100), st.floats(.001, .5))
def test_margin_bound(n, seed, C, delta):
    k, g = len(n), torch.rand(len(n), dtype=torch.double, generator=rng(seed)) + .05
    b = margin_bound(n, g, C, margin_error=.1, bound=2., delta=delta)
    assert list(b) == ['margin error', 'complexity', 'scale', 'confidence'] and all(
        v.shape == (k,) and (v >= 0).all() for v in b.values()
    )
    by_hand = .1 + 4/g*(C/n).sqrt() + (torch.log(torch.log2(8/g))/n).sqrt() + (math.log(1/delta)/(2*n)).sqrt()
    torch.testing.assert_close(sum(b.values()), by_hand)
    more = margin_bound(4*n, g, C, margin_error=.1, bound=2., delta=delta)
    for key in ('complexity', 'scale', 'confidence'): torch.testing.assert_close(more[key], b[key]/2)
    assert (
        sum(margin_bound(n, g * 1.1, C, bound=2.0, delta=delta).values())
        < sum(margin_bound(n, g, C, bound=2.0, delta=delta).values())
    ).all()
    assert (margin_bound(n, g, C, delta=delta/2)['confidence'] > margin_bound(n, g, C, delta=delta)['confidence']).all()


@quick
@given(seeds, st.integers(2, 12), st.floats(.1, 10))
def test_errors_and_margins(seed, k, scale):
    g = rng(seed)
    eta, y = scale*torch.randn(200, k, dtype=torch.double, generator=g), torch.randint(k, (200,), generator=g)
    err01 = (eta.argmax(1) != y).double().mean()
    assert loss_error(eta, y, math.log(k) + 1e-12) <= err01 <= loss_error(eta, y)
    curve = [loss_error(eta, y, t).item() for t in (0, .1, .5, 1, 2, 5)]
    assert curve == sorted(curve, reverse=True)
    l, m = F.cross_entropy(eta, y, reduction='none'), class_margins(eta, y, t=1.)
    for j in range(k): assert math.isclose(m[j], 1 - l[y == j].max()) if (y == j).any() else m[j].isinf()


# The equation index

heading, anchor = re.compile(r'^#+ .*$', re.M), re.compile(r'\{#([\w-]+)\}')

def markdown(nb):
    return [''.join(c['source']) for c in json.loads((nbs / nb).read_text())['cells'] if c['cell_type'] == 'markdown']

def sections(nb):
    "[(id or None, text)] of a notebook, one for each heading"
    text = '\n\n'.join(markdown(nb))
    starts = [m.start() for m in heading.finditer(text)] + [len(text)]
    return [
        (m[1] if (m := anchor.search(text[a:b].split('\n')[0])) else None, text[a:b])
        for a, b in zip(starts, starts[1:])
    ]

def rows(texts):
    return [
        [c.strip() for c in line.strip('| ').split(' | ')]
        for t in texts
        for line in t.split('\n')
        if line.startswith('| ') and not line.startswith('|---')
    ]

def links(text): return re.findall(r'\]\(([\w./-]+\.ipynb)(?:#([\w-]+))?\)', text)

def dead(texts, ids):
    "Links of `texts` whose notebook or anchor does not exist; `ids(notebook)` gives its anchors or None"
    return [(nb, a) for t in texts for nb, a in links(t) if ids(nb) is None or (a and a not in ids(nb))]

def ids(nb): return set(re.findall(r'\{#([\w-]+)\}', '\n'.join(markdown(nb)))) if (nbs/nb).exists() else None

index = markdown('equations.ipynb')
theory = sorted({nb for t in index for nb, _ in links(t)})

def test_index_has_no_dead_link():
    assert sum(len(links(t)) for t in index) > 30
    assert dead(index, ids) == []
    assert dead(['[x](01_label_shift.ipynb#no-such-cell) [y](99_none.ipynb)'], ids) == [
        ('01_label_shift.ipynb', 'no-such-cell'),
        ('99_none.ipynb', ''),
    ]

@pytest.mark.parametrize('nb', theory)
def test_theory_notebooks_have_no_dead_link(nb):
    assert dead(markdown(nb), ids) == []
    named = [i for i, _ in sections(nb) if i]
    assert len(named) == len(set(named)), 'an anchor is used twice'

def numbered():
    "{equation number: {(notebook, section id)}} of all equations that any notebook shows with the paper's number"
    out = {}
    for nb in sorted(p.name for p in nbs.glob('*.ipynb')):
        for i, text in sections(nb):
            for num in re.findall(r'\\tag\{Eq\. (\d+)\}', text): out.setdefault(int(num), set()).add((nb, i))
    return out

def test_every_numbered_equation_is_in_the_index():
    shown, listed = numbered(), {int(r[0]): links(' '.join(r)) for r in rows(index) if r[0].isdigit()}
    assert set(range(1, 11)) <= set(shown)
    for num, places in shown.items():
        assert num in listed, f'Eq. {num} is shown in {places} and missing in the index'
        assert places <= set(listed[num]), f'Eq. {num}: the index links to {listed[num]}, it is shown in {places}'

def test_every_proof_step_is_in_the_index():
    linked = {l for t in index for l in links(t)}
    steps = {
        (nb, i)
        for nb in theory
        for i, _ in sections(nb)
        if i and re.match(r'a\d-|equation-|theorem-|corollary-|supplement-', i)
    }
    assert len(steps) > 20 and steps <= linked, steps - linked

def test_every_named_function_imports():
    where = {full[len(mod) + 1:]: mod for mod, names in d['syms'].items() for full in names}
    names = {n for t in index for n in re.findall(r'`([\w.]+)`', t)}
    assert len(names) > 10
    for name in names:
        assert name in where, f'`{name}` is in no module of balms'
        obj = importlib.import_module(where[name])
        for part in name.split('.'): obj = getattr(obj, part)
        assert callable(obj)
