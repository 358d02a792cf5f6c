"""Samplers: the rates by chi-square tests that wrong rates fail, edges, ranks, and the same indices after a restart.

Seeds are fixed, so each p-value is one number and no test fails by chance. `P` is what a right sampler falls below once
in a thousand seeds; a wrong one is asked to fall below `WRONG`.
"""
import io, math, pickle, sys
from copy import deepcopy
import numpy as np, pytest, torch
from PIL import Image
from scipy.stats import chi2, chi2_contingency, chisquare, kstest
from hypothesis import given, settings, strategies as st
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset
from fastai.vision.all import (CategoryBlock, DataBlock, DataLoaders, ImageBlock, ImageDataLoaders, Learner,
                               MultiCategoryBlock, Normalize, PILImageBW, RandomSplitter, SkipItemException, TfmdDL,
                               Transform, get_image_files, load_learner, nn, parent_label)
from balms.array_loader import ArrayDL, ShuffledIndices, array_dls
from balms.core import class_counts
from balms.datasets import load_digits
from balms.long_tail import long_tail, long_tail_counts
from balms.sampled_loader import SampledDL, resampled
from balms.samplers import ClassSampler, CleansUp, ProgressiveSampling, progressive_rates, sampling_rates

P, WRONG = 1e-3, 1e-9
n = torch.tensor(long_tail_counts(500, 10, 50))
order = torch.randperm(int(n.sum()), generator=torch.Generator().manual_seed(3))
y = torch.repeat_interleave(torch.arange(10), n)[order]
linux = pytest.mark.skipif(sys.platform != 'linux', reason='fastai has workers on Linux only')
with_workers = pytest.mark.parametrize('workers', (0, 2))


class Items(Dataset):
    "Index and label of each item"
    def __init__(self, targets=y): self.targets = targets
    def __len__(self): return len(self.targets)
    def __getitem__(self, i): return torch.tensor(i), self.targets[i]


def sampled(seed=0, bs=16, workers=0, n_batches=None, rates=None, rank=0, world=1, **kwargs):
    "A loader of items drawn by class"
    sampler = ClassSampler(y, rates, seed, rank=rank, world_size=world)
    return SampledDL(Items(), bs=bs, sampler=sampler, num_workers=workers, n_batches=n_batches, **kwargs)


def digits():
    train, test = load_digits()
    return long_tail(train, 20), test


def saved(state):
    "Through a file and back"
    f = io.BytesIO()
    torch.save(state, f)
    f.seek(0)
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


def same_batches(a, b):
    "Inputs of two loaders, or one and a list of them"
    inputs = lambda batches: [x[0] if isinstance(x, (tuple, list)) else x for x in batches]
    return all(torch.equal(u, v) for u, v in zip(inputs(a), inputs(b), strict=True))


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
        rates = sampling_rates(c)
        assert rates.dtype == torch.float64 and rates.tolist() == pytest.approx([.75, .25])
    assert sampling_rates([10**12, 1, 0], 0).tolist() == [.5, .5, 0]


# ---- the draw

RATES = dict(instance=sampling_rates(n), root=sampling_rates(n, .5), progressive=progressive_rates(n, .5),
             balanced=sampling_rates(n, 0), own=torch.tensor([5., 0, 1, 0, 0, 2, .1, 3, 0, .02]))


@pytest.mark.parametrize('rates', RATES.values(), ids=RATES)
@pytest.mark.parametrize('seed', (0, 1))
def test_draws_have_the_rates(rates, seed):
    "Drawn in batches and iterated"
    iterated = torch.tensor(list(ClassSampler(y, rates, seed + 10, num_samples=20_000)))
    idxs = torch.cat([ClassSampler(y, rates, seed).draw(100_000), iterated])
    assert p_classes(idxs, rates) > P and p_images(idxs) > P
    sign = torch.ones(10).double()
    sign[(rates > 0).nonzero().flatten()[::2]] = -1
    assert p_classes(idxs, rates*(1 + .05*sign)) < WRONG                 # 5 % off is seen
    idxs[::20] = idxs[::20].clamp_max(len(y)//2)                         # so are a few favoured images
    assert p_images(idxs) < WRONG


def test_p_values_are_uniform():
    "Neither too regular nor too irregular: p-values over seeds have the distribution that independent draws give them"
    draws = [ClassSampler(y, RATES['root'], seed).draw(5000) for seed in range(300)]
    assert kstest([p_classes(i, RATES['root']) for i in draws], 'uniform').pvalue > P
    assert kstest([p_images(i) for i in draws], 'uniform').pvalue > P
    twice = [torch.cat([i[:2500], i[:2500]]) for i in draws]             # the shares scatter too much
    assert kstest([p_classes(i, RATES['root']) for i in twice], 'uniform').pvalue < WRONG


def test_draws_are_independent():
    c = y[ClassSampler(y, RATES['own']).draw(100_000)]
    seen = c.unique()
    table = lambda c: torch.bincount(c[:-1]*10 + c[1:], minlength=100).view(10, 10)[seen][:, seen]
    assert chi2_contingency(table(c)).pvalue > P
    assert chi2_contingency(table(c.sort().values)).pvalue < WRONG


weights = st.one_of(st.just(0.), st.floats(1e-12, 1e6), st.sampled_from([1e-12, 1., 1.5e308, 1e-300]))
some_weights = st.lists(weights, min_size=1, max_size=12).filter(any)


@settings(max_examples=150, deadline=None)
@given(some_weights, st.integers(0, 9))
def test_any_rates(rates, seed):
    labels, r = torch.arange(len(rates)).repeat(3), torch.tensor(rates, dtype=torch.float64)
    s = ClassSampler(labels, rates, seed)
    r = r/r.max()
    assert torch.allclose(s.rates, r/r.sum(), rtol=1e-12, atol=0) and s.rates.isfinite().all()
    c, i = s.draw_classes(2000), s.draw(500)
    assert c.dtype == torch.int64 and 0 <= c.min() and c.max() < len(r) and (r[c] > 0).all()
    assert (r[labels[i]] > 0).all() and len(i) == 500


@settings(max_examples=100, deadline=None)
@given(some_weights)
def test_the_ends_of_the_uniform_numbers(rates):
    "At 0 and just below 1: a class that has a rate, never class k, and no image beyond the last of its class"
    labels, rand = torch.arange(len(rates)).repeat(3), torch.rand
    s = ClassSampler(labels, rates)
    for u in (0., math.nextafter(1, 0)):
        try:
            torch.rand = lambda n, dtype, u=u, **_: torch.full((n,), u, dtype=dtype)     # in single precision 1
            c, i = s.draw_classes(1), s.images_of(torch.arange(len(rates)))
        finally: torch.rand = rand
        assert c < len(rates) and s.rates[c] > 0 and (u or c == s.rates.nonzero()[0])
        assert torch.equal(labels[i], torch.arange(len(rates)))


def test_a_sum_that_rounds_neighbours_apart(monkeypatch):
    "A GPU adds in parallel: the cumulative sum may not be exactly monotone. A rate of 0 is 0 all the same."
    exact, gen = torch.Tensor.cumsum, torch.Generator().manual_seed(0)
    def rough(t, dim):
        noise = 1 + 1e-3*torch.rand(len(t), generator=gen).double() if t.is_floating_point() else 1
        return exact(t, dim)*noise
    monkeypatch.setattr(torch.Tensor, 'cumsum', rough)
    r = torch.tensor([0., 1, 0, 0, 1e-9, 1, 0, 1, 0, 0])
    assert (r[ClassSampler(torch.arange(10), r).draw_classes(100_000)] > 0).all()


def test_one_class_one_image():
    assert ClassSampler([0]).draw(3).tolist() == [0, 0, 0] and ClassSampler([0, 0], [1e-300]).draw(2).shape == (2,)


def test_labels_of_any_kind():
    want = ClassSampler(y, seed=5).draw(50)
    subset = Subset(Items(), range(len(y)))
    for labels in (y.tolist(), y.numpy(), y.to(torch.uint8), y[:, None], Items(), subset, DataLoader(Items())):
        assert torch.equal(ClassSampler(labels, seed=5).draw(50), want)
    s = ClassSampler(y, num_classes=12)
    assert len(s.rates) == 12 and not s.rates[10:].any()
    train, test = load_digits()
    dls = array_dls(train.subset(train.targets < 7), test, device='cpu')  # classes 7 to 9 are in the test set only
    assert resampled(dls).train.sampler.rates.tolist() == pytest.approx([1/7]*7 + [0]*3)


ERRORS = {
    'no images': (lambda: ClassSampler([]), ValueError), 'integers': (lambda: ClassSampler([0., 1.]), TypeError),
    'multi-label': (lambda: ClassSampler(torch.eye(3)), ValueError),
    r'\(9,\)': (lambda: ClassSampler(y, torch.ones(9)), ValueError),
    r'not finite .*\[9\]': (lambda: ClassSampler(y, [1]*9 + [math.inf]), ValueError),
    'zero': (lambda: ClassSampler(y, [0]*10), ValueError),
    r'classes \[1\]': (lambda: ClassSampler([0, 2, 2], [1, 1, 1]), ValueError),
    'rank must be 0..1': (lambda: ClassSampler(y, rank=2, world_size=2), ValueError),
    r'images of classes \[1\]': (lambda: ClassSampler([0, 2]).images_of(torch.tensor([0, 1])), ValueError)}


@pytest.mark.parametrize('named', ERRORS)
def test_errors(named):
    make, error = ERRORS[named]
    with pytest.raises(error, match=named): make()


def test_nothing_else_moves_the_draws():
    a, b = ClassSampler(y), ClassSampler(y)
    torch.manual_seed(1)
    first = a.draw(20)
    torch.rand(3)
    assert torch.equal(torch.cat([first, a.draw(20)]), torch.cat([b.draw(20), b.draw(20)]))
    copies, want = (pickle.loads(pickle.dumps(a)), deepcopy(a)), a.draw(9)
    assert all(torch.equal(c.draw(9), want) for c in copies)


# ---- ranks

@pytest.mark.parametrize('world', (2, 3))
def test_ranks_together_are_one_process(world):
    one = ClassSampler(y, RATES['root'])
    ranks = [ClassSampler(y, RATES['root'], rank=r, world_size=world) for r in range(world)]
    for _ in range(3):
        assert torch.equal(torch.cat([s.draw(40) for s in ranks]), one.draw(40*world))
        for s in (one, *ranks): s.set_rates(RATES['own'])
    epoch, share = [list(s) for s in ranks], len(y)//world
    chunks = [one.draw(min(64, share - i)*world).view(world, -1) for i in range(0, share, 64)]
    assert torch.cat(chunks, 1).tolist() == epoch and {len(e) for e in epoch} == {share}


@linux
@with_workers
def test_loaders_on_ranks(workers):
    "Each rank reads its own items; one rank's state serves the others"
    make = lambda rank, seed=0: sampled(seed, 8, workers, 10, RATES['root'], rank, 2)
    one, both = ClassSampler(y, RATES['root']), [make(0), make(1)]
    its = [iter(d) for d in both]
    for _ in range(4): assert torch.equal(torch.cat([next(it)[0] for it in its]), one.draw(16))
    state = saved(both[0].state_dict())
    again = make(1, seed=9)
    again.load_state_dict(state)
    for (x, _), (u, _) in zip(its[1], again): assert torch.equal(x, u)
    assert len(sampled(bs=8, rank=0, world=2)) == round(math.ceil(len(y)/8)/2)


# ---- resumed bit for bit

def change(sampler, i): sampler.set_rates(progressive_rates(n, i/20))


def test_resume_array_dl():
    train, test = digits()
    counts = class_counts(train)
    make = lambda seed: resampled(array_dls(train, test, bs=20, n_batches=15, device='cpu'), seed=seed).train
    def steps(dl, i):
        for j, batch in enumerate(dl):
            dl.sampler.set_rates(progressive_rates(counts, (i + j)/20))
            yield batch
    a, b = make(0), make(1)
    it = steps(a, 0)
    for _ in range(6): next(it)
    state = saved(a.state_dict())
    rest = list(it)
    b.load_state_dict(state)
    assert len(rest) == 9
    for (x, t), (u, v) in zip(rest, steps(b, 6)): assert torch.equal(x, u) and torch.equal(t, v)


@linux
@with_workers
@pytest.mark.parametrize('drop_last', (False, True))
def test_resume_torch_loader(workers, drop_last):
    "Also over the end of the epoch, and stopped twice"
    make = lambda seed: ClassSampler(y, RATES['balanced'], seed)
    load = lambda s: DataLoader(Items(), 100, sampler=s, num_workers=workers, drop_last=drop_last)
    a, b, c = make(0), make(1), make(2)
    epochs = [[x for x, _ in load(a)] for _ in range(2)]
    a = make(0)
    it = iter(load(a))
    for _ in range(5): next(it)
    b.load_state_dict(saved(a.state_dict(used=500)))
    it = iter(load(b))
    got = [next(it)[0] for _ in range(2)]
    c.load_state_dict(saved(b.state_dict(used=700)))
    got += [x for x, _ in load(c)]
    assert same_batches(got, epochs[0][5:]) and same_batches(load(c), epochs[1])


def test_resume_with_rates_that_change():
    "What was drawn by the old rates and not used is in the state"
    a, b, handed = ClassSampler(y), ClassSampler(y, seed=3), []
    it = iter(a)
    for i in range(330):
        change(a, i/50)
        handed.append(next(it))
    b.load_state_dict(saved(a.state_dict(used=290)))                     # 40 are with the workers
    assert list(b) == handed[290:] + list(it)


def test_state_at_the_end_of_an_epoch():
    a, b = ClassSampler(y), ClassSampler(y, seed=1)
    list(a)
    b.load_state_dict(saved(a.state_dict()))
    assert a.state_dict()['used'] == 0 and list(b) == list(a)
    next(iter(a))                                                        # left, and started again: a whole epoch
    assert len(list(a)) == len(y)


def test_state_remembers_enough():
    "65,536 indices back, as many as 32 workers with 4 batches of 512"
    a, b = (ClassSampler(y, num_samples=200_000, seed=seed) for seed in (0, 1))
    it = iter(a)
    drawn = [next(it) for _ in range(100_000)]
    b.load_state_dict(a.state_dict(used=100_000 - 65_000))
    it = iter(b)
    assert [next(it) for _ in range(65_000)] == drawn[-65_000:]
    for used in (100, 100_001):
        with pytest.raises(ValueError, match=f'not {used}'): a.state_dict(used=used)


@pytest.mark.parametrize('spoil,named', [
    (dict(images=7), '7 images'), (dict(rates=torch.ones(3)), '3 classes'),
    (dict(gen=torch.zeros(16, dtype=torch.uint8)), '16 bytes in its generator'),
    (dict(ahead=torch.zeros(2, 5, dtype=torch.long)), '2 ranks')])
def test_state_of_something_else(spoil, named):
    s = ClassSampler(y)
    with pytest.raises(ValueError, match=named): s.load_state_dict({**s.state_dict(), **spoil})


@linux
@with_workers
def test_resume_sampled_dl(workers):
    def steps(dl, i):
        for j, (x, _) in enumerate(dl):
            change(dl.sampler, i + j)
            yield x
    whole = list(steps(sampled(0, workers=workers, n_batches=20), 0))
    a, b, c = (sampled(seed, workers=workers, n_batches=k) for seed, k in ((0, 20), (1, 13), (2, 8)))
    it = steps(a, 0)
    for _ in range(7): next(it)
    state = saved(a.state_dict())
    assert state['ahead'].shape == (2*workers, 1, 16)
    b.load_state_dict(state)
    assert saved(b.state_dict())['ahead'].equal(state['ahead'])          # saved again before it goes on
    b.one_batch()
    it = steps(b, 7)
    got = [next(it) for _ in range(5)]
    c.load_state_dict(saved(b.state_dict()))
    assert same_batches(got + list(steps(c, 12)), whole[7:])


@linux
@with_workers
def test_an_epoch_that_is_broken_off(workers):
    "No draw is lost, here or after a restart; a state that is loaded counts, not an iterator that still lives"
    make = lambda: sampled(workers=workers, n_batches=12)
    dl = make()
    whole, dl = [x for _ in range(2) for x, _ in dl], make()
    it = iter(dl)
    for i in range(5): assert torch.equal(next(it)[0], whole[i])
    it.close()
    other = make()
    other.load_state_dict(saved(dl.state_dict()))
    for d in (dl, other): assert same_batches(d, whole[5:17])
    it = iter(dl)
    next(it)
    state = dl.state_dict()
    want = [next(it)[0] for _ in range(2)]
    dl.load_state_dict(state)
    it.close()
    for w, (x, _) in zip(want, dl): assert torch.equal(x, w)


@linux
def test_an_epoch_within_an_epoch():
    dl = sampled(workers=1, n_batches=6)
    it = iter(dl)
    next(it)
    ahead = dl.state_dict()['ahead']
    assert len(list(dl)) == 6 and torch.equal(dl.state_dict()['ahead'], ahead)
    assert torch.equal(next(it)[0], ahead[0, 0])


def test_any_sampler_in_a_sampled_dl():
    "`ShuffledIndices` knows neither ranks nor rates"
    dl = SampledDL(Items(), bs=50, sampler=ShuffledIndices(len(y)), num_workers=0)
    seen = torch.cat([x for x, _ in dl])
    assert len(seen[:len(y)].unique()) == len(y) and len(dl) == math.ceil(len(y)/50)


# ---- staleness

@linux
@pytest.mark.parametrize('workers,prefetch', ((0, 2), (1, 2), (2, 1), (2, 3)))
def test_staleness(workers, prefetch):
    dl = sampled(bs=64, workers=workers, n_batches=20, prefetch_factor=prefetch)
    it = iter(dl)
    for _ in range(8): next(it)
    dl.sampler.set_rates(torch.eye(10)[9])
    by_old_rates = [bool((t != 9).any()) for _, t in it]
    assert dl.staleness == workers*prefetch
    assert by_old_rates == [True]*dl.staleness + [False]*(12 - dl.staleness)


@linux
def test_staleness_of_an_ordinary_loader():
    s = ClassSampler(y)
    it = iter(DataLoader(Items(), 10, sampler=s, num_workers=2, prefetch_factor=3))
    next(it)
    s.set_rates(torch.eye(10)[9])
    after = torch.cat([t for _, t in it])
    assert 0 < (after != 9).nonzero().max() + 1 <= 2*3*10 + 63


# ---- fastai

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp('files'), np.random.default_rng(0)
    for split, counts in (('train', (60, 20, 6)), ('valid', (5, 5, 5))):
        for j, m in enumerate(counts):
            (root/split/'abc'[j]).mkdir(parents=True)
            for i in range(m):
                pixels = (rng.random((8, 8))*80 + 80*j).astype(np.uint8)
                Image.fromarray(pixels).save(root/split/'abc'[j]/f'{i}.png')
    return root


def folder_dls(root, workers=0, kind='folder'):
    kw = dict(bs=8, num_workers=workers, device='cpu')
    tfms = Normalize.from_stats([.5], [.5], cuda=False)
    if kind == 'folder': return ImageDataLoaders.from_folder(root, img_cls=PILImageBW, batch_tfms=tfms, **kw)
    blocks, splitter = (ImageBlock(PILImageBW), CategoryBlock), RandomSplitter(.2, seed=1)
    block = DataBlock(blocks, get_items=get_image_files, get_y=parent_label, splitter=splitter, batch_tfms=tfms)
    return block.dataloaders(root, **kw)


@linux
@pytest.mark.parametrize('kind', ('folder', 'block'))
@with_workers
def test_learner(folder, kind, workers, tmp_path):
    "Training, validation, predictions of the training set in order, pictures, export"
    torch.manual_seed(0)
    before = folder_dls(folder, workers, kind)
    dls = resampled(before)
    assert type(dls) is type(before) and type(before.train) is TfmdDL and dls.valid is before.valid
    assert (dls.vocab, dls.path, dls.device) == (before.vocab, before.path, before.device)
    assert len(dls.train) == len(before.train) and dls.train.staleness == 2*workers
    x, t = next(iter(dls.train))
    assert (type(x).__name__, type(t).__name__) == ('TensorImageBW', 'TensorCategory') and -1.01 <= x.min() < 0
    assert chisquare(class_counts(torch.cat([t for _ in range(30) for _, t in dls.train]), 3)).pvalue > P
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    learn = Learner(dls, net, loss_func=nn.CrossEntropyLoss(), cbs=ProgressiveSampling())
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 1e-2)
        learn.validate()
        _, targs = learn.get_preds(ds_idx=0, reorder=False)
    assert torch.equal(class_counts(targs, 3), class_counts(before))     # the training set, each image once
    for unique in (False, True, False): dls.show_batch(max_n=4, unique=unique)
    learn.export(tmp_path/'m.pkl')
    again = load_learner(tmp_path/'m.pkl')
    assert again.dls.train.sampler is None
    files = sorted((folder/'valid').glob('*/*.png'))
    with again.no_bar(), learn.no_bar():
        preds = [one.get_preds(dl=one.dls.test_dl(files))[0] for one in (learn, again)]
    assert torch.allclose(*preds)


@linux
def test_looking_changes_nothing(folder):
    a, b = (resampled(folder_dls(folder, w), seed=4) for w in (0, 2))
    it = iter(b.train)
    got = [next(it)[1]]
    b.show_batch(max_n=2)
    b.show_batch(max_n=2, unique=True)
    b.train.one_batch()
    b.train.new(shuffle=False).one_batch()
    got += [t for _, t in it]
    assert all(torch.equal(g, t) for g, (_, t) in zip(got, a.train, strict=True))
    looked = torch.cat([b.train.one_batch()[1] for _ in range(3)])
    assert chisquare(class_counts(looked, 3)).pvalue > P


def test_loaders_made_from_loaders():
    dl = sampled(bs=8, n_batches=3)
    next(iter(dl))
    assert same_batches(dl, pickle.loads(pickle.dumps(dl)))
    new = dl.new(bs=4)
    assert isinstance(new, SampledDL) and new.sampler is dl.sampler
    assert (new.n_batches, new.bs, new.prefetch_factor) == (3, 4, 2)
    assert SampledDL.from_dl(dl.new(prefetch_factor=5), dl.sampler).prefetch_factor == 5
    assert dl.new(Items(y[:10])).sampler is None and len(dl.new(Items(y[:10]), shuffle=False)) == 2
    assert type(dl.new(cls=TfmdDL)) is TfmdDL


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
@with_workers
def test_skipped_items(workers):
    class Odd(Items):
        def __getitem__(self, i):
            if i % 2 == 0: raise SkipItemException()
            return super().__getitem__(i)
    sizes = [len(x) for x, _ in SampledDL(Odd(), bs=32, sampler=ClassSampler(y), num_workers=workers, n_batches=4)]
    assert len(sizes) == 4 and all(4 < size < 28 for size in sizes)


@linux
def test_errors_in_workers_reach_the_user():
    class Bad(Items):
        def __getitem__(self, i): raise OSError('unreadable.png')
    dl = SampledDL(Bad(), bs=4, sampler=ClassSampler(y), num_workers=1)
    with pytest.raises(OSError, match='unreadable.png'): next(iter(dl))


def test_fastai_deals_out_an_epoch(monkeypatch):
    "fastai's `DistributedDL` gets draws by the rates, and no second splitting"
    pytest.importorskip('accelerate')
    from fastai.distributed import DistributedDL
    monkeypatch.setattr(DistributedDL, '_broadcast', lambda self, t, rank: t)
    def part(rank):
        dl = sampled(n_batches=200, rates=RATES['balanced'])
        return torch.cat([x for x, _ in DistributedDL(dl, rank=rank, world_size=2)])
    parts, one = [part(0), part(1)], ClassSampler(y, RATES['balanced'])
    whole = torch.cat([one.draw(16) for _ in range(200)])
    assert [len(p) for p in parts] == [1600, 1600] and p_classes(torch.cat(parts), RATES['balanced']) > P
    assert torch.equal(torch.cat(parts).sort().values, whole.sort().values)
    with pytest.raises(ValueError, match='DistributedDL'): sampled(rank=0, world=2).get_idxs()


class Stream(IterableDataset):
    def __iter__(self): return iter([(torch.tensor(1.), 0)]*20)


def test_what_cannot_be_resampled(folder):
    class Own(TfmdDL):
        def create_batch(self, b): return b
    stream = TfmdDL(Stream(), bs=4, num_workers=0)
    blocks, labels = (ImageBlock, MultiCategoryBlock), lambda f: [f.parent.name, 'all']
    several = DataBlock(blocks, get_items=get_image_files, get_y=labels).dataloaders(folder, bs=4, num_workers=0)
    own = DataLoaders(Own(Items(), bs=4, num_workers=0))
    other_state = dict(ahead=torch.zeros(1, 1, 8))
    with pytest.raises(ValueError, match='Stream'): resampled(DataLoaders(stream))
    with pytest.raises(ValueError, match='Stream'): SampledDL.from_dl(stream, ClassSampler(y))
    with pytest.raises(ValueError, match='multi-label'): resampled(several)
    with pytest.raises(TypeError, match='ClassSampler'): resampled(DataLoader(Items()))
    with pytest.raises(ValueError, match='Own .*create_batch'): resampled(own)
    with pytest.raises(ValueError, match='batch size'): sampled(bs=None)
    with pytest.raises(ValueError, match='batches of 8'): sampled(bs=9).load_state_dict(other_state)


def test_resampled_in_memory():
    dls = array_dls(*digits(), bs=50, n_batches=40, device='cpu')
    counts, new = class_counts(dls), resampled(dls, power=.5, seed=7)
    assert isinstance(new.train, ArrayDL) and len(new.train) == 40 and isinstance(dls.train.sampler, ShuffledIndices)
    seen = class_counts(torch.cat([t.as_subclass(torch.Tensor) for _, t in new.train]), 10)
    assert chisquare(seen, sampling_rates(counts, .5)*2000).pvalue > P
    assert chisquare(seen, sampling_rates(counts, 0)*2000).pvalue < WRONG
    assert resampled(dls, rates=range(10)).train.sampler.rates.tolist() == pytest.approx([i/45 for i in range(10)])
    assert [len(resampled(dls, rank=r, world_size=2).train) for r in range(2)] == [20, 20]
    assert len(resampled(dls, n_batches=3).train) == 3


# ---- callbacks

def rates_used(dls, epochs, *args, **kwargs):
    "The rates that each batch was drawn by, with `ProgressiveSampling` of these arguments"
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), loss_func=nn.CrossEntropyLoss())
    s, used = dls.train.sampler, []
    draw = s.draw_ranks
    def spy(bs):
        used.append(s.rates.clone())
        return draw(bs)
    s.draw_ranks = spy
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 1e-3, cbs=ProgressiveSampling(*args, **kwargs))
    return torch.stack(used)


class Pictures(Items):
    "Images one by one, as they come from files"
    def __init__(self, ds):
        super().__init__(ds.targets)
        self.images = ds.images.float()/255
    def __getitem__(self, i): return self.images[i], self.targets[i]


@pytest.mark.parametrize('in_memory', (True, False))
def test_progressive(in_memory):
    train, test = digits()
    k = class_counts(train)
    def dls(n_batches=10):
        if in_memory: d = array_dls(train, test, bs=16, device='cpu')
        else: d = DataLoaders.from_dsets(Pictures(train), Pictures(test), bs=16, num_workers=0, device='cpu')
        return resampled(d, n_batches=n_batches)
    by_step, by_epoch = rates_used(dls(), 3), rates_used(dls(), 3, every='epoch')
    own = rates_used(dls(), 1, lambda counts, t: sampling_rates(counts, 1 - t))
    expect = lambda f, n: torch.stack([f(i) for i in range(n)])
    assert torch.allclose(by_step, expect(lambda i: progressive_rates(k, i/30), 30), rtol=1e-12)
    assert torch.allclose(by_epoch, expect(lambda i: progressive_rates(k, i//10/3), 30), rtol=1e-12)
    assert torch.allclose(own, expect(lambda i: sampling_rates(k, 1 - i/10), 10), rtol=1e-12)
    assert torch.equal(rates_used(dls(18), 1, start=12), by_step[12:])   # from a checkpoint: the same numbers


def test_progressive_needs_rates():
    with pytest.raises(ValueError, match='resampled'): rates_used_plain()
    with pytest.raises(ValueError, match='step'): ProgressiveSampling(every='step')


def rates_used_plain():
    dls = array_dls(*digits(), device='cpu')
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), loss_func=nn.CrossEntropyLoss())
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=ProgressiveSampling())


@pytest.mark.parametrize('fails', (False, True))
def test_cleans_up(fails):
    "Once, when the callback is taken out, with the learner still at hand; also after an error"
    dls = array_dls(*digits(), bs=64, n_batches=2, device='cpu')
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), loss_func=nn.CrossEntropyLoss())
    cleaned = []
    class Changes(CleansUp):
        def before_batch(self):
            if fails: raise ZeroDivisionError('stop')
        def clean_up(self): cleaned.append(self.learn)
    with learn.no_bar(), learn.no_logging():
        if fails:
            with pytest.raises(ZeroDivisionError): learn.fit(1, cbs=Changes())
        else: learn.fit(1, cbs=Changes())
    assert cleaned == [learn]


# ---- on a GPU

@pytest.mark.cuda
def test_gpu():
    "Right rates, no waiting, resumed; a state of the CPU is refused"
    s = ClassSampler(y, RATES['own'], device='cuda')
    r = torch.rand(10, device='cuda').double()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        a = s.draw(100_000)
        s.set_rates(r)
        b = s.draw(100_000)
    finally: torch.cuda.set_sync_debug_mode('default')
    assert a.is_cuda and p_classes(a.cpu(), RATES['own']) > P and p_images(a.cpu()) > P
    assert p_classes(b.cpu(), r.cpu()) > P
    state, t = saved(s.state_dict()), ClassSampler(y, device='cuda', seed=3)
    t.load_state_dict(state)
    assert torch.equal(t.draw(50), s.draw(50))
    with pytest.raises(ValueError, match='kind of device'): ClassSampler(y).load_state_dict(state)
    with pytest.raises(ValueError, match='negative'): s.set_rates(-r, check=True)
