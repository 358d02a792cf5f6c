"""Augmentation: each operation against torchvision's on one image, both ways through a batch, draws, floats, errors.

"Equal" is equal in every bit. The one tolerance is for images so large (over 65,793 pixels) that single precision no
longer sums their grey values exactly: there the mean of Contrast depends on the order of the sum, and a value may
differ by one.
"""
import math
import pickle

import pytest
import torch
import torchvision.transforms as T
from PIL import Image, ImageOps
from hypothesis import given, settings, strategies as st
from scipy.stats import binomtest, chisquare
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import functional as TF

from balms.array_loader import array_dls
from balms.augment import (POLICIES, AutoAugment, AutoAugmentCutout, Chain, CropFlip, Cutout, RandAugment,
                           TrivialAugmentWide)
from balms.datasets import data_root, load_data
from balms.image_ops import OPS, SIGNED, apply_ops, magnitudes
from balms.long_tail import ArrayDataset

P = 1e-3                           # a right sampler falls below it once in a thousand seeds; seeds are fixed
ALL = [CropFlip(4), Cutout(16), AutoAugment('cifar10'), AutoAugment('imagenet'), AutoAugment('svhn'), RandAugment(),
       TrivialAugmentWide(), AutoAugmentCutout(), AutoAugment(released=True)]
POLICY = [f for f in ALL if hasattr(f, 'draw')]
cuda = pytest.mark.cuda


def seeded(s=0, device='cpu'): return torch.Generator(device).manual_seed(s)
def noise(n, c=3, h=32, w=32, s=0):
    return torch.randint(256, (n, c, h, w), dtype=torch.uint8, generator=seeded(s))
def slope(m): return math.degrees(math.atan(m))
def affine(x, dx, dy, sx, sy, center, fill): return TF.affine(x, 0., [dx, dy], 1., [sx, sy], center=center, fill=fill)


def theirs(x, o, m, fill=None):
    "torchvision's own operation on one image, tensor or PIL"
    return dict(
        Identity=lambda: x,
        Brightness=lambda: TF.adjust_brightness(x, 1 + m),
        Contrast=lambda: TF.adjust_contrast(x, 1 + m),
        Posterize=lambda: TF.posterize(x, int(m)),
        Solarize=lambda: TF.solarize(x, m),
        Invert=lambda: TF.invert(x),
        AutoContrast=lambda: TF.autocontrast(x),
        Equalize=lambda: TF.equalize(x),
        ShearX=lambda: affine(x, 0, 0, slope(m), 0., [0, 0], fill),
        ShearY=lambda: affine(x, 0, 0, 0., slope(m), [0, 0], fill),
        TranslateX=lambda: affine(x, int(m), 0, 0., 0., None, fill),
        TranslateY=lambda: affine(x, 0, int(m), 0., 0., None, fill),
        Rotate=lambda: TF.rotate(x, m, fill=fill),
        Color=lambda: TF.adjust_saturation(x, 1 + m),
        Sharpness=lambda: TF.adjust_sharpness(x, 1 + m))[o]()


def each(x, o, m, fill=None): return torch.stack([theirs(i, o, m, fill) for i in x])


def kinds(c, h, w):
    "Noise, dark, one value, a ramp, black and white, black, nearly one value"
    x = noise(7, c, h, w)
    x[1] = x[1]//4 + 100
    x[2] = 77
    x[3] = (torch.arange(h*w)*7 % 256).view(h, w)
    x[4] = (x[4] > 200)*255
    x[5] = 0
    x[6] = 9
    x[6, :, 0, 0] = 10
    return x


def levels(o, bins, size, wide=False):
    "All magnitudes of an operation, with both signs where it has them"
    ms = magnitudes(o, bins, size, wide).unique().tolist()
    return ms + [-m for m in ms] if o in SIGNED else ms


# ---- operations

@pytest.mark.parametrize('o', OPS)
@pytest.mark.parametrize('c,h,w', [(3, 32, 32), (1, 28, 28), (3, 17, 23), (1, 33, 8), (3, 3, 3), (3, 2, 5), (1, 1, 1)])
def test_equal_to_torchvision(o, c, h, w):
    "Every level of AutoAugment, RandAugment and TrivialAugment, both signs, on both ways"
    x = kinds(c, h, w)
    ms = levels(o, 10, (h, w)) + levels(o, 31, (h, w)) + levels(o, 31, (h, w), wide=True)
    for m in sorted(set(ms)):
        want = each(x, o, m)
        for dense in (False, True):
            got = apply_ops(x, o, m, dense=dense)
            assert got.dtype == torch.uint8 and torch.equal(got, want), (m, dense)


def test_equal_on_cifar():
    if not (data_root()/'cifar10').is_dir(): pytest.skip('no cifar10 in $BALMS_DATA')
    x = load_data('cifar10')[0].images[::5000]
    for o in OPS:
        for m in levels(o, 10, (32, 32)): assert torch.equal(apply_ops(x, o, m), each(x, o, m)), (o, m)


@pytest.mark.parametrize('fill', (128, [10, 20, 30], (255,)))
@pytest.mark.parametrize('o', ('ShearX', 'ShearY', 'TranslateX', 'TranslateY', 'Rotate'))
def test_fill(o, fill):
    x = noise(3, h=16, w=20)
    each_channel = [float(f) for f in fill] if isinstance(fill, (list, tuple)) else [float(fill)]*3
    for m in levels(o, 10, (16, 20)):
        want = each(x, o, m, each_channel)
        for dense in (False, True): assert torch.equal(apply_ops(x, o, m, fill, dense), want), m


def test_magnitudes_are_torchvisions():
    size = 20, 33
    for space, bins, wide in ((T.AutoAugment()._augmentation_space(10, size), 10, False),
                              (T.RandAugment()._augmentation_space(31, size), 31, False),
                              (T.TrivialAugmentWide()._augmentation_space(31), 31, True)):
        for o, (m, signed) in space.items():
            assert signed == (o in SIGNED)
            assert torch.equal(magnitudes(o, bins, size, wide), m.double().expand(bins)), o


def test_large_images():
    "224 x 224 is exact; above 65,793 pixels the mean grey of Contrast may round another way"
    x = noise(2, h=224, w=224)
    for o, m in dict(Contrast=.55, Equalize=0., Rotate=26.7, ShearY=-.3, Sharpness=.9, AutoContrast=0.).items():
        assert torch.equal(apply_ops(x, o, m), each(x, o, m)), o
    x = noise(2, h=300, w=301)
    assert (apply_ops(x, 'Contrast', .55).int() - each(x, 'Contrast', .55).int()).abs().max() <= 1


@pytest.mark.parametrize('o,share,mean', [
    ('Contrast', .5, .5), ('AutoContrast', .1, .1), ('Color', .5, .5), ('Sharpness', .1, .1), ('ShearX', .1, 6),
    ('ShearY', .1, 6), ('Rotate', .01, 1), ('Brightness', 0, 0), ('Posterize', 0, 0), ('Solarize', 0, 0),
    ('Invert', 0, 0), ('Equalize', 0, 0), ('TranslateX', 0, 0), ('TranslateY', 0, 0)])
def test_how_far_from_pil(o, share, mean):
    "On noise, where a neighbour is as far away as any other pixel; the notebook has the figures for photographs"
    x, d = noise(8), []
    for m in levels(o, 10, (32, 32)):
        want = torch.stack([TF.pil_to_tensor(theirs(TF.to_pil_image(i), o, m)) for i in x])
        d.append((apply_ops(x, o, m).int() - want.int()).abs())
    d = torch.stack(d).float()
    assert (d > 0).float().mean() <= share and d.mean() <= mean
    if o in ('Contrast', 'AutoContrast', 'Color', 'Sharpness'): assert d.max() <= 1


# ---- crop, flip and Cutout, against loops over images

@pytest.mark.parametrize('dtype', (torch.uint8, torch.float32, torch.int16))
@pytest.mark.parametrize('pad,h,w', [(4, 32, 32), (1, 5, 9), (0, 6, 6), (3, 2, 1)])
def test_crop_flip(dtype, pad, h, w):
    x, gen = noise(40, h=h, w=w).to(dtype), seeded(1)
    def drawn(n): return torch.randint(n, (40, 1), generator=gen).flatten().tolist()
    i, flip, j = drawn(2*pad + 1), drawn(2), drawn(2*pad + 1)
    want = torch.stack([TF.crop(TF.pad(a, pad), i[k], j[k], h, w) for k, a in enumerate(x)])
    for k in range(40):
        if flip[k]: want[k] = want[k].flip(-1)
    assert torch.equal(CropFlip(pad)(x, seeded(1)), want)
    assert len(set(i)) == len(set(j)) == 2*pad + 1 and set(flip) == {0, 1}


@pytest.mark.parametrize('dtype', (torch.uint8, torch.float32, torch.int16))
@pytest.mark.parametrize('size,h,w', [(16, 32, 32), (5, 9, 20), (1, 4, 4), (50, 8, 8)])
def test_cutout(dtype, size, h, w):
    x, gen = noise(40, h=h, w=w).to(dtype), seeded(1)
    if dtype.is_floating_point: x[:, :, 0] = math.nan                             # what is cut out is 0 whatever it was
    rows, cols = ((torch.randint(n, (40, 1), generator=gen).flatten() - size//2).tolist() for n in (h, w))
    want = x.clone()
    for image, i, j in zip(want, rows, cols): image[:, max(i, 0):max(i + size, 0), max(j, 0):max(j + size, 0)] = 0
    got = Cutout(size)(x, seeded(1))
    assert got.dtype == dtype
    if dtype.is_floating_point: got, want = got.nan_to_num(-1), want.nan_to_num(-1)
    assert torch.equal(got, want)


# ---- batches

side = st.integers(1, 12)
images = st.tuples(st.integers(0, 6), st.sampled_from((1, 3)), side, side, st.integers(0, 2**31))


@settings(max_examples=60, deadline=None)
@given(images, st.data())
def test_a_batch_is_its_images(shape, data):
    "Whatever is in the batch with it, in whatever order, on whichever way: an image gets its own operation"
    b, c, h, w, seed = shape
    x = noise(b, c, h, w, seed)
    ops = [data.draw(st.sampled_from(OPS)) for _ in range(b)]
    ms = [data.draw(st.sampled_from(levels(o, 10, (h, w)))) for o in ops]
    got = apply_ops(x, ops, ms)
    assert got.shape == x.shape and torch.equal(got, apply_ops(x, ops, ms, dense=True))
    for i in range(b): assert torch.equal(got[i], theirs(x[i], ops[i], ms[i]))
    before = x.clone()
    apply_ops(x, ops, ms)
    assert torch.equal(x, before)                                                             # the input is left alone


@pytest.mark.parametrize('f', POLICY, ids=repr)
@pytest.mark.parametrize('c,h,w', [(3, 32, 32), (1, 28, 20)])
def test_both_ways_alike(f, c, h, w):
    x, dense = noise(200, c, h, w), pickle.loads(pickle.dumps(f))
    dense.dense = True
    assert torch.equal(f(x, seeded(2)), dense(x, seeded(2)))


@pytest.mark.parametrize('f', ALL, ids=repr)
def test_seeded(f):
    "The same seed gives the same batch, another seed another; neither the global generator nor the images matter"
    x, state = noise(64), torch.get_rng_state()
    a = f(x, g := seeded(1))
    assert a.shape == x.shape and a.dtype == x.dtype and not a.is_set_to(x)
    torch.rand(3)
    assert torch.equal(f(x, seeded(1)), a)
    torch.set_rng_state(state)
    assert not torch.equal(f(x, seeded(2)), a) and not torch.equal(f(x, g), a)
    assert torch.equal(torch.get_rng_state(), state)
    h, k = seeded(1), seeded(1)
    f(x, h)
    f(x*0 + 3, k)
    assert torch.equal(h.get_state(), k.get_state())
    assert torch.equal(pickle.loads(pickle.dumps(f))(x, seeded(1)), a)                       # as in an exported learner
    assert len({i.numpy().tobytes() for i in f(x[:1].repeat(64, 1, 1, 1), seeded(1))}) > 8  # images draw for themselves
    assert f(x[:0], seeded()).shape == (0, 3, 32, 32)


@pytest.mark.parametrize('name', POLICIES)
def test_policy_is_torchvisions(name):
    ours, tv, x = AutoAugment(name), T.AutoAugment(T.AutoAugmentPolicy(name)), noise(300, h=20, w=27)
    sub, applied, sign = ours.sample(300, seeded(5))
    draws = iter(zip(sub.tolist(), (~applied).float(), sign))
    tv.get_params = lambda n: next(draws)
    assert torch.equal(ours(x, seeded(5)), torch.stack([tv(i) for i in x]))


def as_the_authors(x, o, level, sign):
    "One operation of the released code of Ren et al. 2020 on a PIL image; shears with the nearest pixel"
    share, slope, width, height = 150/331*level/9, .3*level/9, *x.size
    def moved(*matrix): return x.transform(x.size, Image.Transform.AFFINE, matrix, fillcolor=(128, 128, 128))
    if o == 'TranslateX': return moved(1, 0, -sign*share*width, 0, 1, 0)
    if o == 'TranslateY': return moved(1, 0, 0, 0, 1, -sign*share*height)
    if o == 'ShearX': return moved(1, sign*slope, 0, 0, 1, 0)
    if o == 'ShearY': return moved(1, 0, 0, sign*slope, 1, 0)
    if o == 'Rotate': return x.rotate(sign*30*level/9, fillcolor=(128, 128, 128))
    if o == 'Solarize': return ImageOps.solarize(x, 256*(1 - level/9))


@pytest.mark.parametrize('o', ('TranslateX', 'TranslateY', 'Rotate', 'Solarize', 'ShearX', 'ShearY'))
@pytest.mark.parametrize('h,w', [(32, 32), (20, 27)])
def test_released_form(o, h, w):
    "Every level and sign, all equal, but for pixels that a shear or a rotation puts between two others"
    x, between = noise(8, h=h, w=w), {('ShearX', 2): .05, ('ShearX', 6): .11, ('ShearY', 2): .05, ('ShearY', 6): .11}
    for level in range(10):
        aug = AutoAugment([((o, 1., level), ('Identity', 0., 0))], released=True, dense=False)
        for negative, sign in enumerate((1, -1)):
            e = torch.tensor([[2 - negative]*8, [0]*8])
            want = [TF.pil_to_tensor(as_the_authors(TF.to_pil_image(i), o, level, sign)) for i in x]
            differ = (aug.apply(x, e) != torch.stack(want)).float().mean()
            assert differ <= (.002 if o == 'Rotate' else between.get((o, level), 0)), (level, sign)


def test_augmentation_of_the_paper_is_the_released_form():
    _, policy, _ = AutoAugmentCutout().augments
    assert (policy.policy, policy.released, policy.fill) == ('cifar10', True, 128)
    assert (AutoAugment().released, AutoAugment().fill, AutoAugment(released=True, fill=0).fill) == (False, 0, 0)


# ---- draws

def policy_p(aug, n=60_000, seed=0):
    "p-values of: sub-policies, each operation's frequency, signs"
    sub, applied, sign = aug.sample(n, seeded(seed))
    counts = sub.bincount(minlength=len(aug.subs))
    each = []
    for i, operations in enumerate(aug.subs):
        for j, (_, p, _) in enumerate(operations):
            each.append(binomtest(int(applied[sub == i, j].sum()), int(counts[i]), p).pvalue)
    signs = (2*sign[:, 0] + sign[:, 1]).bincount(minlength=4)
    return chisquare(counts).pvalue, min(each)*len(each), chisquare(signs).pvalue


@pytest.mark.parametrize('name', POLICIES)
def test_distribution_of_subpolicies(name): assert min(policy_p(AutoAugment(name))) > P


def test_wrong_draws_are_seen():
    class Twice(AutoAugment):
        def sample(self, n, gen=None, device='cpu'):
            sub, applied, sign = super().sample(n, gen, device)
            return torch.where((sub == 3) & (sign[:, 0] > 0), 4, sub), applied, sign
    class Half(AutoAugment):
        def sample(self, n, gen=None, device='cpu'):
            sub, applied, sign = super().sample(n, gen, device)
            return sub, applied.flip(1), sign
    class Positive(AutoAugment):
        def sample(self, n, gen=None, device='cpu'):
            sub, applied, sign = super().sample(n, gen, device)
            return sub, applied, sign | sign.flip(1)
    for cls, i in ((Twice, 0), (Half, 1), (Positive, 2)): assert policy_p(cls())[i] < 1e-9


def test_entries_say_operation_level_and_sign():
    aug = AutoAugment('imagenet')
    pairs, (sub, applied, sign), e = aug._pairs(32, 32), aug.sample(500, seeded(1)), aug.draw(500, seeded(1))
    for i in range(500):
        for j, (o, _, level) in enumerate(aug.subs[sub[i]]):
            m = float(magnitudes(o)[level])*(1 if sign[i, j] or o not in SIGNED else -1)
            assert pairs[e[j, i]] == ((o, m) if applied[i, j] else ('Identity', 0.))


@pytest.mark.parametrize('aug', (RandAugment(), TrivialAugmentWide()), ids=repr)
def test_even_draws(aug):
    pairs, e = aug._pairs(32, 32), aug.draw(50_000, seeded(1))
    assert e.shape[0] == (2 if type(aug) is RandAugment else 1)
    for row in e: assert chisquare(row.bincount(minlength=len(pairs))).pvalue > P
    assert {o for o, _ in pairs} == set(OPS) - {'Invert'}


# ---- dtypes, devices, errors

@pytest.mark.parametrize('dtype', (torch.float32, torch.float64, torch.float16))
@pytest.mark.parametrize('dense', (None, True))
def test_floats_are_rounded_to_8_bits(dtype, dense):
    x, f = noise(50), AutoAugment(dense=dense)
    y = f((x/255).to(dtype), seeded(1))
    assert y.dtype == dtype and torch.equal(y, (f(x, seeded(1))/255).to(dtype))
    z = apply_ops((x/255*.998).to(dtype), 'Identity', 0)                          # between two levels: to the nearest
    assert ((z*255).float() - (z*255).float().round()).abs().max() < .1


@pytest.mark.parametrize('bad', (-.01, 1.01, math.nan, math.inf))
def test_floats_out_of_range(bad):
    x = noise(4)/255
    x[2, 1, 3, 3] = bad
    with pytest.raises(ValueError, match='image 2'): AutoAugment()(x, seeded())
    y = AutoAugment(dense=True)(x, seeded())
    assert y[2].isnan().all() and not y[[0, 1, 3]].isnan().any()


@pytest.mark.parametrize('call,named', [
    (lambda: AutoAugment('cifar100'), "'cifar100'.*cifar10, imagenet, svhn"),
    (lambda: RandAugment(magnitude=31), '31'),
    (lambda: AutoAugment()(noise(2, 2)), r'\(2, 2, 32, 32\)'),
    (lambda: AutoAugment()(noise(2)[0]), r'\(3, 32, 32\)'),
    (lambda: CropFlip()(noise(2)[0]), r'\(3, 32, 32\)'),
    (lambda: Cutout()(noise(2)[0]), r'\(3, 32, 32\)'),
    (lambda: AutoAugment()(noise(2).int()), 'torch.int32'),
    (lambda: AutoAugment(fill=300)(noise(2)), '300'),
    (lambda: AutoAugment(fill=(1, 2))(noise(2)), '3 channels'),
    (lambda: apply_ops(noise(2), 'Blur', 0), "'Blur'"),
    (lambda: apply_ops(noise(2), 'Solarize', 257), 'Solarize.*257'),
    (lambda: apply_ops(noise(2), 'Color', -1.5), 'Color.*-1.5'),
    (lambda: apply_ops(noise(2), 'Rotate', math.nan), 'Rotate')])
def test_errors(call, named):
    with pytest.raises(ValueError, match=named): call()


class Forbid(TorchDispatchMode):
    "Fails on operations that wait for a device"
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        waits = '_local_scalar_dense', 'nonzero', 'item', 'masked_select', 'unique', 'bincount', 'equal.default'
        assert not any(s in str(f) for s in waits), f
        return f(*args, **(kwargs or {}))


@pytest.mark.parametrize('f', ALL, ids=repr)
def test_nothing_waits_for_the_device(f):
    "Tensors of the meta device have no values, so a shape or an `if` that depends on one fails there"
    x = noise(16).to('meta')
    f(x)
    with Forbid(): assert f(x).shape == x.shape
    if f in POLICY:
        with Forbid(): assert f(x.float()).dtype == torch.float32
        f = pickle.loads(pickle.dumps(f))
        f.dense = False
        with pytest.raises((NotImplementedError, RuntimeError, AssertionError)), Forbid(): f(x)


@pytest.mark.parametrize('f', POLICY, ids=repr)
def test_one_graph(f):
    "Traced without a break, and the same afterwards"
    f = pickle.loads(pickle.dumps(f))
    f.dense = True
    x, e = noise(32), f.draw(32, seeded(1))
    want = f.apply(x, e)
    assert torch.equal(torch.compile(f.apply, fullgraph=True, backend='aot_eager')(x, e), want)


def test_resumed_loader():
    data = ArrayDataset(noise(64), torch.arange(64) % 10)
    dl = array_dls(data, data, bs=16, augment=Chain(CropFlip(4), RandAugment(), Cutout(8)), device='cpu').train
    list(dl)
    state = dl.state_dict()
    want = [x for x, _ in dl]
    dl.load_state_dict(state)
    assert all(torch.equal(a, b) for (a, _), b in zip(dl, want))


@cuda
@pytest.mark.parametrize('f', POLICY, ids=repr)
def test_cuda_equals_cpu(f):
    x, e = noise(512), f.draw(512, seeded(1))
    assert torch.equal(f.apply(x.cuda(), e.cuda()).cpu(), f.apply(x, e))


@cuda
def test_cuda_graph_draws_anew():
    aug, x, gen = AutoAugmentCutout(), noise(512).cuda(), seeded(1, 'cuda')
    aug(x, gen)
    torch.cuda.set_sync_debug_mode('error')
    try: aug(x, gen)
    finally: torch.cuda.set_sync_debug_mode('default')
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(gen)
    with torch.cuda.graph(graph): y = aug(x, gen)
    gen.manual_seed(7)
    graph.replay()
    a = y.clone()
    graph.replay()
    b = y.clone()
    gen.manual_seed(7)
    assert torch.equal(aug(x, gen), a) and torch.equal(aug(x, gen), b) and not torch.equal(a, b)
