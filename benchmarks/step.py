"""A training step of the CIFAR recipe through fastai's `Learner` against the same step in a loop written by hand: ratios measured in one process.

    python benchmarks/step.py [--threads 2] [--device cpu] [--seconds 60] [--bs 512] [--model resnet32] [--side 32] [--precision float32] [--compile] [--recipe]
    python benchmarks/step.py --device cuda --model resnet10 --side 224 --precision bfloat16      # a step of ImageNet-LT

Sides, all with the loader and the augmentation of the package, the same network and loss:
    by hand            a loop of six lines, torch's SGD
    Learner, FastLoop  what `balms.recipes.run` trains with
    Learner            as it comes: fastai's SGD, with momentum, and recorder, no `FastLoop`
They run in turns, so that whatever else the machine does falls on each; a ratio is the median over turns of the ratio within a turn.
A loop without a network follows, where the cost of the loop itself shows, and two ways to get batches without loader workers.

On Linux the C library gives large blocks of memory back to the system when they are freed and asks for them again in the next step,
which makes a step on the CPU longer and its time vary by tens of percent, more than the loops differ. So on the CPU the script starts
itself again with that switched off (MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_); `--malloc default` leaves it as it is.

On CUDA also: what share of a step augmentation is, the floor of a step (operations and bytes of the network over the rates that
this card reaches in a matrix product and in a copy), and with --recipe the whole recipe of the paper, 13,000 steps of 512 images.
With images larger than 32 pixels there is no augmentation, since that is done in loader workers (`benchmarks/loading.py`), and the hours
of ImageNet-LT's 90 epochs follow from the step, on one card and on eight that lose nothing.
"""
import argparse, os, statistics, sys, time
from contextlib import nullcontext
from functools import partial
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from fastai.data.core import TfmdDL
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper, SGD
from fastcore.basics import noop
from balms.core import BalancedSoftmax, class_counts
from balms.data import ArrayDataset, array_dls
from balms.models import get_model
from balms.recipes import AUGMENTS, PRESETS, Recipe, TrainOnly, recipe_learner
from balms.speed import FastLoop

LIMIT, SHARE, RECIPE_S, GOAL_S = 1.10, .15, 120, 60   # Learner over by hand; augmentation over the step; seconds of 13,000 steps


def images(n=12_406, side=32):
    "Random images of 10 classes, as many as CIFAR-10-LT has, or fewer where they are large: times do not depend on what is in them"
    if side > 32: n = min(n, 2048)
    return ArrayDataset(torch.randint(256, (n, 3, side, side), dtype=torch.uint8), torch.arange(n) % 10)


def learner(a, augment='autoaugment_cutout', fast=True):
    "The `Learner` of a recipe; or, not `fast`, one as fastai makes it"
    r = Recipe('cifar10', 100, 'bs', 'paper', model=a.model, bs=a.bs, augment='none' if a.side > 32 else augment, precision=a.precision)
    train = images(side=a.side)
    learn = recipe_learner(r, train, images(100, a.side), class_counts(train), torch.device(a.device), a.compile)
    if fast: return learn
    learn.remove_cbs(FastLoop)
    learn.opt_func = partial(SGD, mom=.9, decouple_wd=False)
    return learn


def by_hand(learn, a):
    "A function that takes n steps"
    net, loss, dl = learn.model.to(memory_format=torch.channels_last), learn.loss_func, learn.dls.train
    opt = torch.optim.SGD(net.parameters(), .1, momentum=.9, nesterov=True, weight_decay=5e-4, fused=a.device != 'cpu')
    amp = partial(torch.autocast, 'cuda', dtype=getattr(torch, a.precision)) if a.precision != 'float32' else nullcontext
    def go(n):
        net.train()
        for _ in range(n):
            x, y = dl.make(dl.sampler.draw(dl.bs))
            opt.zero_grad()
            with amp(): l = loss(net(x.as_subclass(Tensor)), y.as_subclass(Tensor))
            l.backward()
            opt.step()
    return go


def through(learn):
    "A function that takes n steps of a `Learner`"
    learn.create_mbar, learn.logger = False, noop
    def go(n):
        learn.dls.train.n_batches = n
        with learn.no_bar(): learn.fit(1, cbs=TrainOnly())
    return go


def timed(f, n, a):
    "Seconds a step"
    sync = torch.cuda.synchronize if a.device != 'cpu' else noop
    sync(); t = time.perf_counter(); f(n); sync()
    return (time.perf_counter() - t)/n


def turns(sides, n, seconds, a, least=5):
    "Seconds a step of each side, turn by turn"
    for f in sides.values(): f(n)                                    # compile, choose algorithms, allocate
    out, end = [], time.perf_counter() + seconds
    while len(out) < least or time.perf_counter() < end: out.append({k: timed(f, n, a) for k, f in sides.items()})
    return out


def show(out, base, unit=1e3, name='ms a step'):
    for k in out[0]:
        v, r = [t[k]*unit for t in out], [t[k]/t[base] for t in out]
        print(f'    {k:20} {statistics.median(v):9.3f} {name}   {statistics.median(r):6.3f} x {base}   (quartiles {" to ".join(f"{q:.3f}" for q in statistics.quantiles(r, n=4)[::2])})')
    return {k: statistics.median(t[k]/t[base] for t in out) for k in out[0]}


def loop_alone(a):
    "The same three sides with next to no network"
    def tiny(fast):
        tr = images(256, 8)
        dls = array_dls(tr, tr, bs=4, device=a.device)
        opt = partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9, nesterov=True, weight_decay=5e-4) if fast else partial(SGD, mom=.9, decouple_wd=False)
        return Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(192, 10)).to(a.device), loss_func=BalancedSoftmax([100]*10).to(a.device), opt_func=opt, cbs=FastLoop() if fast else None)
    b = argparse.Namespace(**{**vars(a), 'precision': 'float32'})
    return {'by hand': by_hand(tiny(True), b), 'Learner, FastLoop': through(tiny(True)), 'Learner': through(tiny(False))}


def data_paths(a):
    "Batches without workers: one gather and whole-batch augmentation on the device; image by image with torchvision, collated by fastai"
    from PIL import Image
    from torchvision import transforms as T
    from torchvision.transforms import functional as TF
    ds, bs = images(), a.bs
    fast = array_dls(ds, ds, bs=bs, augment=AUGMENTS['autoaugment_cutout'](), device=a.device).train
    one = T.Compose([T.RandomCrop(32, 4), T.RandomHorizontalFlip(), T.AutoAugment(T.AutoAugmentPolicy.CIFAR10), TF.to_tensor, T.RandomErasing(1., (.25, .25), (1., 1.))])
    pil = [Image.fromarray(o.permute(1, 2, 0).numpy()) for o in ds.images[:4*bs]]
    class Images(list):
        def __getitem__(self, i): return one(list.__getitem__(self, i)), 0
    slow = TfmdDL(Images(pil), bs=bs, shuffle=True, num_workers=0, device=torch.device(a.device))
    def draw(n):
        for _ in range(n): fast.make(fast.sampler.draw(bs))
    def each(n):
        it = iter(slow)
        for _ in range(n): next(it)
    return {'ArrayDL, whole batch': draw, 'TfmdDL, image by image': each}


def floor(a):
    "Seconds that a step takes at least: operations and bytes of the network over what the card reaches; and both rates"
    dev, half = a.device, torch.float32 if a.precision == 'float32' else getattr(torch, a.precision)
    net = get_model(a.model, 10).to(dev)
    x = torch.randn(a.bs, 3, a.side, a.side, device=dev)
    with FlopCounterMode(display=False) as fc: net(x).sum().backward()
    seen, hooks = [], [m.register_forward_hook(lambda m, i, o: seen.append((m, i[0].numel(), o.numel()))) for m in net.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]
    net(x)
    size = torch.finfo(half).bits//8
    # a convolution reads and writes each of its ends once forward and twice backward; normalisation and ReLU in one pass each way
    moved = sum((3*(i + o) if isinstance(m, nn.Conv2d) else 2*o + 3*o) for m, i, o in seen)*size
    def rate(f, work, n=20):
        f(); best = min(timed(lambda k: [f() for _ in range(k)], n, a) for _ in range(5))
        return work/best
    s = 4096 if dev != 'cpu' else 1024
    A = torch.randn(s, s, device=dev, dtype=half); big = torch.empty(2**28 if dev != 'cpu' else 2**24, device=dev, dtype=torch.uint8); other = torch.empty_like(big)
    flops, bytes_s = rate(lambda: A @ A, 2*s**3), rate(lambda: other.copy_(big), 2*big.numel())
    return fc.get_total_flops()/flops, moved/bytes_s, flops, bytes_s


def on_cuda(a):
    "Augmentation's share, the floor of a step, and what a whole recipe takes"
    learn, ok = learner(a), True
    dl, step = learn.dls.train, by_hand(learn, a)
    sides = dict(step=step, augmentation=lambda n: [dl.augment(dl.dataset.images[:a.bs], dl.generator()) for _ in range(n)]) if dl.augment else dict(step=step)
    out = turns(sides, 50, a.seconds/4, a)
    took = statistics.median(t['step'] for t in out)
    if dl.augment:
        share = statistics.median(t['augmentation']/t['step'] for t in out)
        ok &= share <= SHARE
        print(f'Augmentation is {100*share:.1f} % of a step (alone, one after the other); at most {100*SHARE:.0f} %: {"yes" if share <= SHARE else "NO"}')
    compute, memory, flops, bytes_s = floor(a)
    print(f'Floor of a step: {1e3*compute:.2f} ms of operations at {flops/1e12:.0f} TFLOP/s, {1e3*memory:.2f} ms of memory at {bytes_s/1e12:.2f} TB/s; '
          f'the step takes {1e3*took:.2f} ms, {100*compute/took:.0f} % of the measured peak')
    if a.side > 32:
        hours = 90*(115_846//a.bs)*took/3600
        print(f'ImageNet-LT, 90 epochs of {115_846//a.bs} such steps: {hours:.2f} hours on this card, {hours/8:.2f} on eight that lose nothing, if the loader keeps up')
    if a.recipe:
        n = PRESETS['paper']['iters']
        s = timed(through(learn), n, a)*n
        ok &= s <= RECIPE_S
        print(f'{n:,} steps of {a.bs}: {s:.0f} s; at most {RECIPE_S} s: {"yes" if s <= RECIPE_S else "NO"}, goal {GOAL_S} s: {"yes" if s <= GOAL_S else "no"}')
    return ok


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--threads', type=int, default=2); p.add_argument('--device', default='cpu'); p.add_argument('--seconds', type=float, default=60)
    p.add_argument('--bs', type=int, default=512); p.add_argument('--model', default='resnet32'); p.add_argument('--side', type=int, default=32); p.add_argument('--precision', default='float32')
    p.add_argument('--compile', action='store_true'); p.add_argument('--recipe', action='store_true')
    p.add_argument('--malloc', choices=('keep', 'default'), default='keep')
    a = p.parse_args()
    if a.device == 'cpu' and a.malloc == 'keep' and sys.platform == 'linux' and 'MALLOC_TRIM_THRESHOLD_' not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, 'MALLOC_MMAP_THRESHOLD_': str(2**33), 'MALLOC_TRIM_THRESHOLD_': str(2**33)})
    torch.set_num_threads(a.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True     # in float32, floor and step alike
    cuda, ok = a.device != 'cpu', True
    print(f'torch {torch.__version__}, {torch.cuda.get_device_name() if cuda else "cpu"}, {a.threads} threads, {a.model}, batches of {a.bs} images of {a.side} pixels, {a.precision}{", compiled" if a.compile else ""}')

    print('A step with the network')
    sides = {'by hand': by_hand(learner(a), a), 'Learner, FastLoop': through(learner(a)), 'Learner': through(learner(a, fast=False))}
    r = show(turns(sides, 50 if cuda else 3, a.seconds, a), 'by hand')
    ok &= r['Learner, FastLoop'] <= LIMIT
    print(f'    through Learner at most {LIMIT} times by hand: {"yes" if r["Learner, FastLoop"] <= LIMIT else "NO"}')

    print('Without a network: batches of 4 tiny images, one linear layer')
    show(turns(loop_alone(a), 200, a.seconds/10, a), 'by hand', 1e6, 'us a step')

    if a.side == 32:
        print('Batches without loader workers')
        show(turns(data_paths(a), 4, a.seconds/10, a), 'ArrayDL, whole batch', 1e3, 'ms a batch')

    if cuda: ok &= on_cuda(a)
    return 0 if ok else 1


if __name__ == '__main__': raise SystemExit(main())
