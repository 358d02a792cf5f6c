"""Samplers: the rates by chi-square tests that wrong rates fail, edges, ranks, and the same indices after a restart.

Seeds are fixed, so each p-value is one number and no test fails by chance. `P` is what a right sampler falls below once in a
thousand seeds; a wrong one is asked to fall below `WRONG`.
"""
import io, math, pickle, sys
from copy import deepcopy
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
import numpy as np, pytest, torch
from PIL import Image
from scipy.stats import chi2, chi2_contingency, chisquare, kstest
from hypothesis import given, settings, strategies as st
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset
from fastai.vision.all import (Callback, DataLoaders, DataBlock, CategoryBlock, ImageBlock, ImageDataLoaders, Learner, MultiCategoryBlock, Normalize,
                               PILImageBW, RandomSplitter, SkipItemException, TfmdDL, Transform, get_image_files, load_learner, nn, parent_label)
from balms.core import class_counts
from balms.data import ArrayDL, ShuffledIndices, array_dls, load_digits, long_tail, long_tail_counts
from balms.samplers import ClassSampler, ProgressiveSampling, progressive_rates, sampling_rates
from balms.sampled_loader import SampledDL, resampled

P, WRONG = 1e-3, 1e-9
n = torch.tensor(long_tail_counts(500, 10, 50))
y = torch.repeat_interleave(torch.arange(10), n)[torch.randperm(int(n.sum()), generator=torch.Generator().manual_seed(3))]
linux = pytest.mark.skipif(sys.platform != 'linux', reason='fastai has workers on Linux only')


class Items(Dataset):
    "Index and label of each item"
    def __init__(self, targets=y): self.targets = targets
    def __len__(self): return len(self.targets)
    def __getitem__(self, i): return torch.tensor(i), self.targets[i]


def saved(state):
    "Through a file and back"
    f = io.BytesIO(); torch.save(state, f); f.seek(0)
    return torch.load(f, weights_only=True)


def p_classes(idxs, rates):
    "p-value of the classes of drawn indices; classes with rate 0 must not be there at all"
    seen, rates = class_counts(y[idxs], len(rates)), torch.as_tensor(rates, dtype=torch.float64)
    assert not seen[rates == 0].any()
    keep = rates > 0
    return chisquare(seen[keep], rates[keep]/rates.sum()*len(idxs)).pvalue


def p_images(idxs):
    "p-value of the images within their classes, all classes together"
    stat = df = 0
    for j in y[idxs].unique():
        of = torch.bincount(idxs[y[idxs] == j], minlength=len(y))[y == j].double()
        stat, df = stat + ((of - of.mean())**2).sum()/of.mean(), df + len(of) - 1
    return chi2.sf(stat, df)


# ---- rates

@pytest.mark.parametrize('q', (1, .5, 0, -.5, 3.))
def test_rates_are_powers(q):
    want = n.double().numpy()**q
    assert np.allclose(sampling_rates(n, q), want/want.sum(), rtol=1e-12, atol=0)
    assert torch.allclose(sampling_rates(n*1e6, q), sampling_rates(n, q), rtol=1e-12, atol=0)


@pytest.mark.parametrize('t', (0, .25, 1))
def test_progressive_rates(t):
    assert np.allclose(progressive_rates(n, t), (1 - t)*n.numpy()/n.sum().item() + t/10, rtol=1e-12, atol=0)


def test_counts_of_any_kind():
    for c in ([3, 1], (3, 1), np.array([3, 1]), torch.tensor([3., 1]), torch.tensor([3, 1], dtype=torch.int16)):
        assert sampling_rates(c).dtype == torch.float64 and torch.allclose(sampling_rates(c), torch.tensor([.75, .25]).double(), rtol=1e-12)
    assert sampling_rates([10**12, 1, 0], 0).tolist() == [.5, .5, 0]


# ---- the draw

RATES = dict(instance=sampling_rates(n), root=sampling_rates(n, .5), progressive=progressive_rates(n, .5), balanced=sampling_rates(n, 0),
             own=torch.tensor([5., 0, 1, 0, 0, 2, .1, 3, 0, .02]))


@pytest.mark.parametrize('rates', RATES.values(), ids=RATES)
@pytest.mark.parametrize('seed', (0, 1))
def test_draws_have_the_rates(rates, seed):
    idxs = torch.cat([ClassSampler(y, rates, seed).draw(100_000), torch.tensor(list(ClassSampler(y, rates, seed + 10, num_samples=20_000)))])
    assert p_classes(idxs, rates) > P and p_images(idxs) > P
    sign = torch.ones(10).double(); sign[(rates > 0).nonzero().flatten()[::2]] = -1
    assert p_classes(idxs, rates*(1 + .05*sign)) < WRONG                 # 5 % off is seen
    idxs[::20] = idxs[::20].clamp_max(len(y)//2)                         # so are a few favoured images
    assert p_images(idxs) < WRONG


def test_p_values_are_uniform():
    "Neither too regular nor too irregular: p-values over seeds have the distribution that independent draws give them"
    draws = [ClassSampler(y, RATES['root'], seed).draw(5000) for seed in range(300)]
    assert kstest([p_classes(i, RATES['root']) for i in draws], 'uniform').pvalue > P
    assert kstest([p_images(i) for i in draws], 'uniform').pvalue > P
    regular = [torch.cat([i[:2500], i[:2500]]) for i in draws]           # each draw twice: the shares scatter too much
    assert kstest([p_classes(i, RATES['root']) for i in regular], 'uniform').pvalue < WRONG


def test_draws_are_independent():
    c = y[ClassSampler(y, RATES['own']).draw(100_000)]
    seen = c.unique()
    table = lambda c: torch.bincount(c[:-1]*10 + c[1:], minlength=100).view(10, 10)[seen][:, seen]
    assert chi2_contingency(table(c)).pvalue > P
    assert chi2_contingency(table(c.sort().values)).pvalue < WRONG


weights = st.one_of(st.just(0.), st.floats(1e-12, 1e6), st.sampled_from([1e-12, 1., 1.5e308, 1e-300]))

@settings(max_examples=150, deadline=None)
@given(st.lists(weights, min_size=1, max_size=12).filter(any), st.integers(0, 9))
def test_any_rates(rates, seed):
    k = len(rates)
    labels = torch.arange(k).repeat(3)
    s = ClassSampler(labels, rates, seed)
    r = torch.tensor(rates, dtype=torch.float64); r = r/r.max()
    assert torch.allclose(s.rates, r/r.sum(), rtol=1e-12, atol=0) and s.rates.isfinite().all()
    c = s.draw_classes(2000)
    assert c.dtype == torch.int64 and 0 <= c.min() and c.max() < k and (r[c] > 0).all()
    i = s.draw(500)
    assert (r[labels[i]] > 0).all() and len(i) == 500


@settings(max_examples=100, deadline=None)
@given(st.lists(weights, min_size=1, max_size=12).filter(any))
def test_the_ends_of_the_uniform_numbers(rates):
    "At 0 the first class with a rate, at the largest number below 1 one with a rate, never class k; no image beyond the last of its class"
    s = ClassSampler(torch.arange(len(rates)).repeat(3), rates)
    r, rand = s.rates, torch.rand
    for u in (0., math.nextafter(1, 0)):
        try:
            torch.rand = lambda n, dtype, **_: torch.full((n,), u, dtype=dtype)     # in single precision, u would be 1
            c, i = s.draw_classes(1), s.images_of(torch.arange(len(rates)))
        finally: torch.rand = rand
        assert c < len(r) and r[c] > 0 and (u or c == r.nonzero()[0])
        assert torch.equal(torch.arange(len(rates)).repeat(3)[i], torch.arange(len(rates)))


def test_a_sum_that_rounds_neighbours_apart(monkeypatch):
    "A GPU adds in parallel: the cumulative sum may not be exactly monotone. A rate of 0 is 0 all the same."
    exact, gen = torch.Tensor.cumsum, torch.Generator().manual_seed(0)
    monkeypatch.setattr(torch.Tensor, 'cumsum', lambda t, d: exact(t, d)*(1 + 1e-3*torch.rand(len(t), generator=gen).double()) if t.is_floating_point() else exact(t, d))
    r = torch.tensor([0., 1, 0, 0, 1e-9, 1, 0, 1, 0, 0])
    s = ClassSampler(torch.arange(10), r)
    assert (s._cdf.diff() >= 0).all() and s._cdf[-1] == 1
    assert (r[s.draw_classes(100_000)] > 0).all()


def test_one_class_one_image():
    assert ClassSampler([0]).draw(3).tolist() == [0, 0, 0] and ClassSampler([0, 0], [1e-300]).draw(2).shape == (2,)


def test_labels_of_any_kind():
    want = ClassSampler(y, seed=5).draw(50)
    for labels in (y.tolist(), y.numpy(), y.to(torch.uint8), y[:, None], Items(), Subset(Items(), range(len(y))), DataLoader(Items())):
        assert torch.equal(ClassSampler(labels, seed=5).draw(50), want)
    s = ClassSampler(y, num_classes=12)
    assert len(s.rates) == 12 and not s.rates[10:].any()
    train, test = load_digits()
    dls = array_dls(train.subset(train.targets < 7), test, device='cpu')  # classes 7 to 9 are in the test set only
    assert resampled(dls).train.sampler.rates.tolist() == pytest.approx([1/7]*7 + [0]*3)


@pytest.mark.parametrize('make,error,message', [
    (lambda: ClassSampler([]), ValueError, 'no images to draw from'), (lambda: ClassSampler([0., 1.]), TypeError, 'integers'),
    (lambda: ClassSampler(torch.eye(3)), ValueError, 'multi-label'), (lambda: ClassSampler(y, torch.ones(9)), ValueError, r'shape \(9,\), but there are 10'),
    (lambda: ClassSampler(y, [1]*9 + [math.inf]), ValueError, r'not finite for classes \[9\]'), (lambda: ClassSampler(y, [0]*10), ValueError, 'zero for every class'),
    (lambda: ClassSampler([0, 2, 2], [1, 1, 1]), ValueError, r'positive for classes \[1\], which have no images'),
    (lambda: ClassSampler(y, rank=2, world_size=2), ValueError, 'rank must be 0..1'), (lambda: ClassSampler([0, 2]).images_of(torch.tensor([0, 1])), ValueError, r'no images of classes \[1\]'),
    (lambda: ClassSampler([0, 2], sampling_rates([1, 0, 1], 0)).set_rates([0, 1, 1]), ValueError, r'classes \[1\], which have no images')])
def test_errors(make, error, message):
    with pytest.raises(error, match=message): make()


def test_nothing_else_moves_the_draws():
    a, b = ClassSampler(y), ClassSampler(y)
    torch.manual_seed(1); first = a.draw(20); torch.rand(3); assert torch.equal(torch.cat([first, a.draw(20)]), torch.cat([b.draw(20), b.draw(20)]))
    for c in (pickle.loads(pickle.dumps(a)), deepcopy(a)): assert torch.equal(c.draw(9), b.draw(9)); b = ClassSampler(y); b.draw(20); b.draw(20)


# ---- ranks

@pytest.mark.parametrize('world', (2, 3))
def test_ranks_together_are_one_process(world):
    one, ranks = ClassSampler(y, RATES['root']), [ClassSampler(y, RATES['root'], rank=r, world_size=world) for r in range(world)]
    for _ in range(3):
        assert torch.equal(torch.cat([s.draw(40) for s in ranks]), one.draw(40*world))
        for s in (one, *ranks): s.set_rates(RATES['own'])
    epoch = [list(s) for s in ranks]
    assert {len(e) for e in epoch} == {len(y)//world} and epoch[0] != epoch[1]
    joint = torch.cat([one.draw(min(64, len(y)//world - i)*world).view(world, -1) for i in range(0, len(y)//world, 64)], 1)
    assert joint.tolist() == epoch


@linux
@pytest.mark.parametrize('workers', (0, 2))
def test_loaders_on_ranks(workers):
    "Each rank reads its own items; one rank's state serves the others"
    dl = lambda r, seed=0: SampledDL(Items(), bs=8, sampler=ClassSampler(y, RATES['root'], seed, rank=r, world_size=2), num_workers=workers, n_batches=10)
    one, both = ClassSampler(y, RATES['root']), [dl(0), dl(1)]
    its = [iter(d) for d in both]
    for _ in range(4): assert torch.equal(torch.cat([next(it)[0] for it in its]), one.draw(16))
    state = saved(both[0].state_dict())
    again = dl(1, seed=9); again.load_state_dict(state)
    for (x, _), (u, _) in zip(its[1], again): assert torch.equal(x, u)
    assert len(SampledDL(Items(), bs=8, sampler=both[0].sampler, num_workers=0)) == round(math.ceil(len(y)/8)/2)


# ---- resumed bit for bit

def change(s, i):
    "Rates that differ from batch to batch"
    s.set_rates(progressive_rates(n, i/20))


def test_resume_array_dl():
    train, test = load_digits()
    train = long_tail(train, 20)
    k = class_counts(train)
    make = lambda seed: resampled(array_dls(train, test, bs=20, n_batches=15, device='cpu'), seed=seed).train
    def steps(dl, i):
        for j, b in enumerate(dl): dl.sampler.set_rates(progressive_rates(k, (i + j)/20)); yield b
    a, b = make(0), make(1)
    it = steps(a, 0)
    for _ in range(6): next(it)
    state = saved(a.state_dict())
    rest = list(it)
    b.load_state_dict(state)
    assert len(rest) == 9
    for (x, t), (u, v) in zip(rest, steps(b, 6)): assert torch.equal(x, u) and torch.equal(t, v)


@linux
@pytest.mark.parametrize('workers', (0, 2))
@pytest.mark.parametrize('drop_last', (False, True))
def test_resume_torch_loader(workers, drop_last):
    "Also over the end of the epoch, and stopped twice"
    make = lambda seed: ClassSampler(y, RATES['balanced'], seed)
    load = lambda s: DataLoader(Items(), 100, sampler=s, num_workers=workers, drop_last=drop_last)
    a, b = make(0), make(1)
    epochs = [[x for x, _ in load(a)] for _ in range(2)]
    a = make(0)
    it = iter(load(a))
    for _ in range(5): next(it)
    b.load_state_dict(saved(a.state_dict(used=500)))
    it = iter(load(b))
    got = [next(it)[0] for _ in range(2)]
    c = make(2); c.load_state_dict(saved(b.state_dict(used=700)))
    got += [x for x, _ in load(c)]
    assert all(torch.equal(g, e) for g, e in zip(got, epochs[0][5:], strict=True))
    assert all(torch.equal(g, e) for (g, _), e in zip(load(c), epochs[1], strict=True))


def test_resume_with_rates_that_change():
    "What was drawn by the old rates and not used is in the state"
    a, b = ClassSampler(y), ClassSampler(y, seed=3)
    it, handed = iter(a), []
    for i in range(330): change(a, i/50); handed.append(next(it))
    state = saved(a.state_dict(used=290))                                # 40 are with the workers, the rest of a draw of 64 in the sampler
    assert state['ahead'].shape == (1, 384 - 290) and state['used'] == 290
    b.load_state_dict(state)
    assert list(b) == handed[290:] + list(it)


def test_state_at_the_end_of_an_epoch():
    a, b = ClassSampler(y), ClassSampler(y, seed=1)
    list(a); b.load_state_dict(saved(a.state_dict()))
    assert a.state_dict()['used'] == 0 and list(b) == list(a)
    it = iter(a); next(it)                                               # left, and begun anew: a whole epoch
    assert len(list(a)) == len(y)


def test_state_remembers_enough():
    "65,536 indices back, as many as 32 workers with 4 batches of 512"
    a = ClassSampler(y, num_samples=200_000)
    it = iter(a)
    drawn = [next(it) for _ in range(100_000)]
    b = ClassSampler(y, num_samples=200_000, seed=1); b.load_state_dict(a.state_dict(used=100_000 - 65_000))
    it = iter(b)
    assert [next(it) for _ in range(65_000)] == drawn[-65_000:]
    with pytest.raises(ValueError, match='remembered, not 100'): a.state_dict(used=100)
    with pytest.raises(ValueError, match='used must be'): a.state_dict(used=100_001)


@pytest.mark.parametrize('spoil,named', [
    (dict(images=7), '7 images'), (dict(rates=torch.ones(3)), '3 classes'),
    (dict(gen=torch.zeros(16, dtype=torch.uint8)), '16 bytes in its generator'),
    (dict(ahead=torch.zeros(2, 5, dtype=torch.long)), '2 ranks')])
def test_state_of_something_else(spoil, named):
    s = ClassSampler(y)
    with pytest.raises(ValueError, match=named): s.load_state_dict({**s.state_dict(), **spoil})


@linux
@pytest.mark.parametrize('workers', (0, 2))
def test_resume_sampled_dl(workers):
    make = lambda seed, n_batches=20: SampledDL(Items(), bs=16, sampler=ClassSampler(y, seed=seed), num_workers=workers, n_batches=n_batches)
    def steps(dl, i):
        for j, (x, _) in enumerate(dl): change(dl.sampler, i + j); yield x
    whole = list(steps(make(0), 0))
    a = make(0); it = steps(a, 0)
    for _ in range(7): next(it)
    state = saved(a.state_dict())
    assert state['ahead'].shape == (2*workers, 1, 16)
    b = make(1, 13); b.load_state_dict(state)
    assert saved(b.state_dict())['ahead'].equal(state['ahead'])          # saved again before it goes on
    b.one_batch()
    it = steps(b, 7)
    got = [next(it) for _ in range(5)]
    c = make(2, 8); c.load_state_dict(saved(b.state_dict()))
    got += list(steps(c, 12))
    assert all(torch.equal(g, w) for g, w in zip(got, whole[7:], strict=True))


@linux
@pytest.mark.parametrize('workers', (0, 2))
def test_an_epoch_that_is_broken_off(workers):
    "No draw is lost, in the same process or after a restart; a state that is loaded wins over an iterator that still lives"
    make = lambda: SampledDL(Items(), bs=16, sampler=ClassSampler(y), num_workers=workers, n_batches=12)
    dl = make()
    whole, dl = [x for _ in range(2) for x, _ in dl], make()
    for i, (x, _) in enumerate(dl):
        if i == 4: break                                                 # 0 to 4 are used
    assert torch.equal(x, whole[4])
    other = make(); other.load_state_dict(saved(dl.state_dict()))
    for d in (dl, other): assert all(torch.equal(x, w) for (x, _), w in zip(d, whole[5:17], strict=True))
    it = iter(dl); next(it); state = dl.state_dict(); want = [next(it)[0] for _ in range(2)]
    dl.load_state_dict(state)
    for close in (lambda: None, it.close):
        close()
        assert all(torch.equal(a, b) for a, b in zip(dl.state_dict()['ahead'], state['ahead'], strict=True))
    for (x, _), w in zip(dl, want): assert torch.equal(x, w)


@linux
def test_an_epoch_within_an_epoch():
    dl = SampledDL(Items(), bs=16, sampler=ClassSampler(y), num_workers=1, n_batches=6)
    it = iter(dl); next(it)
    ahead = dl.state_dict()['ahead']
    assert len(list(dl)) == 6 and torch.equal(dl.state_dict()['ahead'], ahead) and torch.equal(next(it)[0], ahead[0, 0])


def test_any_sampler_in_a_sampled_dl():
    "`ShuffledIndices` knows neither ranks nor rates"
    dl = SampledDL(Items(), bs=50, sampler=ShuffledIndices(len(y)), num_workers=0)
    seen = torch.cat([x for x, _ in dl])
    assert len(seen[:len(y)].unique()) == len(y) and len(dl) == math.ceil(len(y)/50)


# ---- staleness

@linux
@pytest.mark.parametrize('workers,prefetch', ((0, 2), (1, 2), (2, 1), (2, 3)))
def test_staleness(workers, prefetch):
    dl = SampledDL(Items(), bs=64, sampler=ClassSampler(y), num_workers=workers, prefetch_factor=prefetch, n_batches=20)
    it = iter(dl)
    for _ in range(8): next(it)
    dl.sampler.set_rates(torch.eye(10)[9])
    old = [bool((t != 9).any()) for _, t in it]
    assert dl.staleness == workers*prefetch and old == [True]*dl.staleness + [False]*(12 - dl.staleness)


@linux
def test_staleness_of_an_ordinary_loader():
    s = ClassSampler(y)
    it = iter(DataLoader(Items(), 10, sampler=s, num_workers=2, prefetch_factor=3))
    next(it); s.set_rates(torch.eye(10)[9])
    after = torch.cat([t for _, t in it])
    assert 0 < (after != 9).nonzero().max() + 1 <= 2*3*10 + 63


# ---- fastai

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp('files'), np.random.default_rng(0)
    for split, ns in (('train', (60, 20, 6)), ('valid', (5, 5, 5))):
        for j, m in enumerate(ns):
            (root/split/'abc'[j]).mkdir(parents=True)
            for i in range(m): Image.fromarray((rng.random((8, 8))*80 + 80*j).astype(np.uint8)).save(root/split/'abc'[j]/f'{i}.png')
    return root


def make_dls(root, kind, workers):
    kw = dict(bs=8, num_workers=workers, device='cpu')
    tfms = Normalize.from_stats([.5], [.5], cuda=False)
    if kind == 'folder': return ImageDataLoaders.from_folder(root, img_cls=PILImageBW, batch_tfms=tfms, **kw)
    block = DataBlock((ImageBlock(PILImageBW), CategoryBlock), get_items=get_image_files, get_y=parent_label, splitter=RandomSplitter(.2, seed=1), batch_tfms=tfms)
    return block.dataloaders(root, **kw)


@linux
@pytest.mark.parametrize('kind', ('folder', 'block'))
@pytest.mark.parametrize('workers', (0, 2))
def test_learner(folder, kind, workers, tmp_path):
    torch.manual_seed(0)
    before = make_dls(folder, kind, workers)
    dls = resampled(before)
    assert type(dls) is type(before) and dls.valid is before.valid and dls.vocab == before.vocab and dls.path == before.path and dls.device == before.device
    assert type(before.train) is TfmdDL and len(dls.train) == len(before.train) and dls.train.staleness == 2*workers
    x, t = next(iter(dls.train))
    assert x.shape == (8, 1, 8, 8) and type(x).__name__ == 'TensorImageBW' and type(t).__name__ == 'TensorCategory' and -1.01 <= x.min() < 0
    seen = class_counts(torch.cat([t for _ in range(30) for _, t in dls.train]), 3)
    assert chisquare(seen).pvalue > P
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), loss_func=nn.CrossEntropyLoss(), cbs=ProgressiveSampling())
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 1e-2); learn.validate()
        probs, targs = learn.get_preds(ds_idx=0, reorder=False)
    assert torch.equal(class_counts(targs, 3), class_counts(before))     # the training set, each image once
    dls.show_batch(max_n=4); dls.show_batch(max_n=4, unique=True); dls.show_batch(max_n=4)
    learn.export(tmp_path/'m.pkl')
    again = load_learner(tmp_path/'m.pkl')
    assert again.dls.train.sampler is None
    files = sorted((folder/'valid').glob('*/*.png'))
    with again.no_bar(), learn.no_bar():
        assert torch.allclose(again.get_preds(dl=again.dls.test_dl(files))[0], learn.get_preds(dl=learn.dls.test_dl(files))[0])


@linux
def test_looking_changes_nothing(folder):
    a, b = (resampled(make_dls(folder, 'folder', w), seed=4) for w in (0, 2))
    it = iter(b.train)
    got = [next(it)[1]]
    b.show_batch(max_n=2); b.show_batch(max_n=2, unique=True); b.train.one_batch(); b.train.new(shuffle=False).one_batch()
    state = b.train.state_dict()
    got += [t for _, t in it]
    assert state['ahead'].shape == (4, 1, 8)
    assert all(torch.equal(g, t) for g, (_, t) in zip(got, a.train, strict=True))
    x, t = b.one_batch()
    assert chisquare(class_counts(torch.cat([b.train.one_batch()[1] for _ in range(3)]), 3)).pvalue > P and len(t) == 8


def test_a_copy_draws_the_same():
    dl = SampledDL(Items(), bs=8, sampler=ClassSampler(y), num_workers=0, n_batches=3)
    next(iter(dl))
    other = pickle.loads(pickle.dumps(dl))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(dl, other, strict=True))
    new = dl.new(bs=4)
    assert SampledDL.from_dl(dl.new(prefetch_factor=5), dl.sampler).prefetch_factor == 5
    assert isinstance(new, SampledDL) and new.sampler is dl.sampler and (new.n_batches, new.bs, new.prefetch_factor) == (3, 4, 2)
    assert dl.new(Items(y[:10])).sampler is None and type(dl.new(cls=TfmdDL)) is TfmdDL and len(dl.new(Items(y[:10]), shuffle=False)) == 2


def test_unique():
    "`show_batch(unique=True)` shows one item again and again"
    dl = SampledDL(Items(), bs=8, sampler=ClassSampler(y), num_workers=0)
    dl.get_idxs = lambda: iter(int, 1)                                   # what fastai puts there for the time: zeros without end
    assert dl.one_batch()[0].tolist() == [0]*8


def test_transforms_that_ask_for_a_batch():
    "`Normalize()` without statistics looks at a batch when the loader is made"
    class Images(Items):
        def __getitem__(self, i): return torch.full((1, 2, 2), float(i)), self.targets[i]
    seen = []
    class Look(Transform):
        def setups(self, dl): seen.append(dl.one_batch()[1])
    SampledDL(Images(), bs=64, sampler=ClassSampler(y, torch.eye(10)[3]), num_workers=0, after_batch=Look())
    assert (seen[0] == 3).all()


@linux
@pytest.mark.parametrize('workers', (0, 2))
def test_skipped_items(workers):
    class Odd(Items):
        def __getitem__(self, i):
            if i % 2 == 0: raise SkipItemException()
            return super().__getitem__(i)
    bs = [len(x) for x, _ in SampledDL(Odd(), bs=32, sampler=ClassSampler(y), num_workers=workers, n_batches=4)]
    assert len(bs) == 4 and all(4 < b < 28 for b in bs)


@linux
def test_errors_in_workers_reach_the_user():
    class Bad(Items):
        def __getitem__(self, i): raise OSError('unreadable.png')
    with pytest.raises(OSError, match='unreadable.png'): next(iter(SampledDL(Bad(), bs=4, sampler=ClassSampler(y), num_workers=1)))


def test_fastai_deals_out_an_epoch(monkeypatch):
    "fastai's `DistributedDL` gets draws by the rates, and no second splitting"
    if not find_spec('accelerate'):                                      # fastai.distributed cannot be imported without it, but needs it for other things
        monkeypatch.setitem(sys.modules, 'accelerate', SimpleNamespace(Accelerator=type('Accelerator', (), {'__init__': lambda self: None})))
        monkeypatch.setitem(sys.modules, 'fastai.distributed', None); del sys.modules['fastai.distributed']   # as it was when the test is over
    distributed = import_module('fastai.distributed')
    monkeypatch.setattr(distributed.DistributedDL, '_broadcast', lambda self, t, rank: t)
    parts = [torch.cat([x for x, _ in distributed.DistributedDL(SampledDL(Items(), bs=16, sampler=ClassSampler(y, RATES['balanced']), num_workers=0, n_batches=200), rank=r, world_size=2)]) for r in range(2)]
    assert [len(p) for p in parts] == [1600, 1600] and p_classes(torch.cat(parts), RATES['balanced']) > P
    assert torch.equal(torch.cat(parts).sort().values, torch.cat([s.draw(16) for s in [ClassSampler(y, RATES['balanced'])] for _ in range(200)]).sort().values)
    with pytest.raises(ValueError, match='deals out its batches'): SampledDL(Items(), bs=16, sampler=ClassSampler(y, rank=0, world_size=2), num_workers=0).get_idxs()


class Stream(IterableDataset):
    def __iter__(self): return iter([(torch.tensor(1.), 0)]*20)


def test_what_cannot_be_resampled(folder):
    with pytest.raises(ValueError, match='Stream is an iterable data set'): resampled(DataLoaders(TfmdDL(Stream(), bs=4, num_workers=0)))
    with pytest.raises(ValueError, match='Stream is an iterable data set'): SampledDL.from_dl(TfmdDL(Stream(), bs=4, num_workers=0), ClassSampler(y))
    multi = DataBlock((ImageBlock, MultiCategoryBlock), get_items=get_image_files, get_y=lambda f: [f.parent.name, 'all']).dataloaders(folder, bs=4, num_workers=0)
    with pytest.raises(ValueError, match='multi-label'): resampled(multi)
    with pytest.raises(TypeError, match='sampler=ClassSampler'): resampled(DataLoader(Items()))
    class Own(TfmdDL):
        def create_batch(self, b): return b
    with pytest.raises(ValueError, match=r'Own makes its batches in a way of its own \(create_batch\)'): resampled(DataLoaders(Own(Items(), bs=4, num_workers=0)))
    with pytest.raises(ValueError, match='needs a batch size'): SampledDL(Items(), bs=None, sampler=ClassSampler(y), num_workers=0)
    with pytest.raises(ValueError, match=r'batches of 8 under way for 1 ranks; this one has batches of 9'):
        SampledDL(Items(), bs=9, sampler=ClassSampler(y), num_workers=0).load_state_dict(dict(ahead=torch.zeros(1, 1, 8)))


def test_resampled_in_memory():
    train, test = load_digits()
    train = long_tail(train, 20)
    dls = array_dls(train, test, bs=50, n_batches=40, device='cpu')
    new = resampled(dls, power=.5, seed=7)
    assert isinstance(new.train, ArrayDL) and new.train.sampler is not dls.train.sampler and len(new.train) == 40 and isinstance(dls.train.sampler, ShuffledIndices)
    k = class_counts(train)
    seen = class_counts(torch.cat([t.as_subclass(torch.Tensor) for _, t in new.train]), 10)
    assert chisquare(seen, sampling_rates(k, .5)*2000).pvalue > P and chisquare(seen, sampling_rates(k, 0)*2000).pvalue < WRONG
    assert torch.allclose(resampled(dls, rates=range(10)).train.sampler.rates, torch.arange(10).double()/45)
    assert [len(resampled(dls, rank=r, world_size=2).train) for r in range(2)] == [20, 20] and len(resampled(dls, n_batches=3).train) == 3


# ---- rates that change

def rates_used(learn, make_cb, epochs, **fit):
    "The rates that each batch was drawn by"
    s, used = learn.dls.train.sampler, []
    draw = s.draw_ranks
    s.draw_ranks = lambda bs: (used.append(s.rates.clone()), draw(bs))[1]
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 1e-3, cbs=make_cb)
    del s.draw_ranks
    return torch.stack(used)


class Pictures(Items):
    "Images one by one, as they come from files"
    def __init__(self, ds): super().__init__(ds.targets); self.images = ds.images.float()/255
    def __getitem__(self, i): return self.images[i], self.targets[i]


def tiny(dls): return Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), loss_func=nn.CrossEntropyLoss())


@pytest.mark.parametrize('loader', ('array', 'sampled'))
def test_progressive(loader):
    train, test = load_digits()
    train = long_tail(train, 20)
    k = class_counts(train)
    def dls(n_batches=10):
        d = array_dls(train, test, bs=16, device='cpu')
        if loader == 'sampled': d = DataLoaders.from_dsets(Pictures(train), Pictures(test), bs=16, num_workers=0, device='cpu')
        return resampled(d, n_batches=n_batches)
    by_step = rates_used(tiny(dls()), ProgressiveSampling(), 3)
    assert torch.allclose(by_step, torch.stack([progressive_rates(k, i/30) for i in range(30)]), rtol=1e-12)
    by_epoch = rates_used(tiny(dls()), ProgressiveSampling(every='epoch'), 3)
    assert torch.allclose(by_epoch, torch.stack([progressive_rates(k, i//10/3) for i in range(30)]), rtol=1e-12)
    rest = rates_used(tiny(dls(18)), ProgressiveSampling(start=12), 1)   # from a checkpoint: the same numbers
    assert torch.equal(rest, by_step[12:])
    own = rates_used(tiny(dls()), ProgressiveSampling(lambda counts, t: sampling_rates(counts, 1 - t)), 1)
    assert torch.allclose(own, torch.stack([sampling_rates(k, 1 - i/10) for i in range(10)]), rtol=1e-12)


def test_progressive_needs_rates():
    train, test = load_digits()
    learn = tiny(array_dls(train, test, device='cpu'))
    with learn.no_bar(), learn.no_logging(), pytest.raises(ValueError, match='see resampled'): learn.fit(1, cbs=ProgressiveSampling())
    with pytest.raises(ValueError, match="'batch' or 'epoch'"): ProgressiveSampling(every='step')


# ---- on a GPU

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_gpu():
    "Right rates, no waiting, resumed; a state of the CPU is refused"
    s = ClassSampler(y, RATES['own'], device='cuda')
    r = torch.rand(10, device='cuda').double()
    torch.cuda.synchronize(); torch.cuda.set_sync_debug_mode('error')
    try:
        a = s.draw(100_000); s.set_rates(r); b = s.draw(100_000)
    finally: torch.cuda.set_sync_debug_mode('default')
    assert a.is_cuda and p_classes(a.cpu(), RATES['own']) > P and p_images(a.cpu()) > P and p_classes(b.cpu(), r.cpu()) > P
    state = saved(s.state_dict())
    t = ClassSampler(y, device='cuda', seed=3); t.load_state_dict(state)
    assert torch.equal(t.draw(50), s.draw(50))
    with pytest.raises(ValueError, match='kind of device'): ClassSampler(y).load_state_dict(state)
    with pytest.raises(ValueError, match='negative'): s.set_rates(-r, check=True)
