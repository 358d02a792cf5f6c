"""A training step of the CIFAR recipe through fastai's `Learner` against the same step in a loop written by hand.

    python benchmarks/step.py [--threads 2] [--device cpu] [--seconds 60] [--bs 512] [--model resnet32] [--side 32]
                              [--precision float32] [--compile] [--recipe] [--profile]
    python benchmarks/step.py --device cuda --model resnet10 --side 224 --precision bfloat16    # a step of ImageNet-LT

Sides, all with the loader and the augmentation of the package, the same network and loss:
    by hand   a loop of six lines, torch's SGD
    run       what `balms.runs.run` trains with: a `Learner` without fastai's recorder and progress bar
    Learner   as it comes: fastai's SGD, with momentum, and recorder
    recorded  on CUDA: the step as one CUDA graph (`balms.cuda_graphs.GraphedStep`), without fastai's loop around it
They run in turns, so that whatever else the machine does falls on each; a ratio is the median over turns of the ratio
within a turn. A loop without a network follows, where the cost of the loop itself shows, and two ways to get batches
without loader workers.

On Linux the C library gives large blocks of memory back to the system when they are freed and asks for them again in
the next step, which makes a step on the CPU longer and its time vary by tens of percent, more than the loops differ.
So on the CPU the script starts itself again with that switched off; `--malloc default` leaves it as it is.

On CUDA also: what share of a step augmentation is, the floor of a step (operations and bytes of the network over the
rates that this card reaches in a matrix product and in a copy), with --recipe the whole recipe of the paper, 13,000
steps of 512 images, and with --profile the kernels that take the most time in a step. Images larger than 32 pixels are
not augmented here, since loader workers do that (`benchmarks/loading.py`), and the hours of ImageNet-LT's 90 epochs
follow from the step.
"""
import argparse
import os
import statistics
import sys
import time
from contextlib import nullcontext
from functools import partial
import torch
from fastai.callback.core import CancelBatchException
from fastai.callback.progress import ProgressCallback
from fastai.data.core import TfmdDL
from fastai.learner import Learner, Recorder
from fastai.optimizer import SGD, OptimWrapper
from fastcore.basics import noop
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from balms.array_loader import array_dls
from balms.core import BalancedSoftmax, class_counts
from balms.cuda_graphs import GraphedStep
from balms.learner import recipe_learner
from balms.long_tail import ArrayDataset
from balms.models import get_model
from balms.recipe import AUGMENTS, PRESETS, Recipe
from balms.stage import Execution, TrainOnly

LIMIT, SHARE = 1.10, .15                   # run over by hand; augmentation over the step
RECIPE_S, GOAL_S = 120, 60                 # seconds of 13,000 steps
MALLOC = {'MALLOC_MMAP_THRESHOLD_': str(2**33), 'MALLOC_TRIM_THRESHOLD_': str(2**33)}


def images(n=12_406, side=32):
    "Random images of 10 classes, as many as CIFAR-10-LT has, or fewer where they are large"
    if side > 32: n = min(n, 2048)
    return ArrayDataset(torch.randint(256, (n, 3, side, side), dtype=torch.uint8), torch.arange(n) % 10)


def learner(a, plain=False):
    "The `Learner` of a recipe, as `run` trains it; or, `plain`, with fastai's optimiser and recorder"
    augment = 'none' if a.side > 32 else 'autoaugment_cutout'
    r = Recipe('cifar10', 100, 'bs', 'paper', model=a.model, bs=a.bs, augment=augment, precision=a.precision)
    train = images(side=a.side)
    execution = Execution(torch.device(a.device), a.compile)
    learn = recipe_learner(r, train, images(100, a.side), class_counts(train), execution)
    if plain: learn.opt_func = partial(SGD, mom=.9, decouple_wd=False)
    else: learn.remove_cbs([ProgressCallback, Recorder])
    return learn


def by_hand(learn, a, precision='float32'):
    "A function that takes n steps"
    net, loss, dl = learn.model.to(memory_format=torch.channels_last), learn.loss_func, learn.dls.train
    opt = torch.optim.SGD(net.parameters(), .1, momentum=.9, nesterov=True, weight_decay=5e-4, fused=a.device != 'cpu')
    amp = nullcontext if precision == 'float32' else partial(torch.autocast, 'cuda', dtype=getattr(torch, precision))
    def go(n):
        net.train()
        for _ in range(n):
            x, y = dl.make(dl.sampler.draw(dl.bs))
            opt.zero_grad()
            with amp(): value = loss(net(x.as_subclass(Tensor)), y.as_subclass(Tensor))
            value.backward()
            opt.step()
    return go


def through(learn):
    "A function that takes n steps of a `Learner`"
    learn.create_mbar, learn.logger = False, noop
    def go(n):
        learn.dls.train.n_batches = n
        with learn.no_bar(): learn.fit(1, cbs=TrainOnly())
    return go


def recorded(learn, a):
    "A function that takes n steps, each one CUDA graph"
    step, dl = GraphedStep(a.precision), learn.dls.train
    learn.opt = learn.opt_func(learn.splitter(learn.model), lr=.1)
    learn.model.to(memory_format=torch.channels_last).train()
    step.learn = learn
    step.before_train()
    def go(n):
        for _ in range(n):
            step.take(dl.sampler.draw(dl.bs))
            try: step.before_batch()
            except CancelBatchException: pass
    return go


def timed(f, n, a):
    "Seconds a step"
    sync = torch.cuda.synchronize if a.device != 'cpu' else noop
    sync()
    began = time.perf_counter()
    f(n)
    sync()
    return (time.perf_counter() - began)/n


def turns(sides, n, seconds, a, least=5):
    "Seconds a step of each side, turn by turn"
    for f in sides.values(): f(n)                                    # compile, choose algorithms, allocate
    out, end = [], time.perf_counter() + seconds
    while len(out) < least or time.perf_counter() < end: out.append({k: timed(f, n, a) for k, f in sides.items()})
    return out


def show(out, base, unit=1e3, name='ms a step'):
    "Print the sides, and return the ratio of each to `base`"
    medians = {}
    for k in out[0]:
        times, ratios = [t[k]*unit for t in out], [t[k]/t[base] for t in out]
        low, _, high = statistics.quantiles(ratios, n=4)
        medians[k] = statistics.median(ratios)
        print(f'    {k:20} {statistics.median(times):9.3f} {name}   {medians[k]:6.3f} x {base}'
              f'   (quartiles {low:.3f} to {high:.3f})')
    return medians


def loop_alone(a):
    "The same three sides with next to no network"
    def tiny(plain=False):
        train = images(256, 8)
        sgd = partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9, nesterov=True, weight_decay=5e-4)
        net = nn.Sequential(nn.Flatten(), nn.Linear(192, 10)).to(a.device)
        learn = Learner(array_dls(train, train, bs=4, device=a.device), net, BalancedSoftmax([100]*10).to(a.device),
                        opt_func=partial(SGD, mom=.9, decouple_wd=False) if plain else sgd)
        if not plain: learn.remove_cbs([ProgressCallback, Recorder])
        return learn
    return {'by hand': by_hand(tiny(), a), 'run': through(tiny()), 'Learner': through(tiny(True))}


class AugmentedImages(list):
    "PIL images, augmented one by one with torchvision"
    def __init__(self, images):
        from torchvision import transforms as T
        super().__init__(images)
        self.transform = T.Compose([T.RandomCrop(32, 4), T.RandomHorizontalFlip(),
                                    T.AutoAugment(T.AutoAugmentPolicy.CIFAR10), T.ToTensor(),
                                    T.RandomErasing(1., (.25, .25), (1., 1.))])
    def __getitem__(self, i): return self.transform(super().__getitem__(i)), 0


def data_paths(a):
    "Batches without workers: one gather and whole-batch augmentation; image by image with torchvision"
    from PIL import Image
    ds, bs = images(), a.bs
    fast = array_dls(ds, ds, bs=bs, augment=AUGMENTS['autoaugment_cutout'](), device=a.device).train
    pil = AugmentedImages([Image.fromarray(o.permute(1, 2, 0).numpy()) for o in ds.images[:4*bs]])
    slow = TfmdDL(pil, bs=bs, shuffle=True, num_workers=0, device=torch.device(a.device))
    def draw(n):
        for _ in range(n): fast.make(fast.sampler.draw(bs))
    def each(n):
        batches = iter(slow)
        for _ in range(n): next(batches)
    return {'ArrayDL, whole batch': draw, 'TfmdDL, image by image': each}


def floor(a):
    "Seconds that a step takes at least: operations and bytes of the network over what the card reaches; both rates"
    half = torch.float32 if a.precision == 'float32' else getattr(torch, a.precision)
    net, moved = get_model(a.model, 10).to(a.device), [0]
    def count(m, i, o):
        # a convolution reads and writes its ends once forward, twice backward; normalisation in one pass each way
        i, o = i[0].numel(), o.numel()
        moved[0] += (3*(i + o) if isinstance(m, nn.Conv2d) else 5*o)*torch.finfo(half).bits//8
    x = torch.randn(a.bs, 3, a.side, a.side, device=a.device)
    with FlopCounterMode(display=False) as flop_counter: net(x).sum().backward()
    for m in net.modules():
        if isinstance(m, (nn.Conv2d, nn.BatchNorm2d)): m.register_forward_hook(count)
    net(x)
    def rate(f, work, n=20):
        f()
        return work/min(timed(lambda k: [f() for _ in range(k)], n, a) for _ in range(5))
    side = 4096 if a.device != 'cpu' else 1024
    square = torch.randn(side, side, device=a.device, dtype=half)
    block = torch.empty(2**28 if a.device != 'cpu' else 2**24, device=a.device, dtype=torch.uint8)
    other = torch.empty_like(block)
    flops, bytes_s = rate(lambda: square @ square, 2*side**3), rate(lambda: other.copy_(block), 2*block.numel())
    return flop_counter.get_total_flops()/flops, moved[0]/bytes_s, flops, bytes_s


def on_cuda(a):
    "Augmentation's share, the floor of a step, and what a whole recipe takes"
    learn, ok = learner(a), True
    dl, step = learn.dls.train, by_hand(learn, a, a.precision)
    sides = dict(step=step)
    if dl.augment:
        sides['augmentation'] = lambda n: [dl.augment(dl.dataset.images[:a.bs], dl.generator()) for _ in range(n)]
    out = turns(sides, 50, a.seconds/4, a)
    took = statistics.median(t['step'] for t in out)
    if dl.augment:
        share = statistics.median(t['augmentation']/t['step'] for t in out)
        ok &= share <= SHARE
        print(f'Augmentation is {share:.1%} of a step; at most {SHARE:.0%}: {"yes" if share <= SHARE else "NO"}')
    compute, memory, flops, bytes_s = floor(a)
    print(f'Floor of a step: {1e3*compute:.2f} ms of operations at {flops/1e12:.0f} TFLOP/s, {1e3*memory:.2f} ms of '
          f'memory at {bytes_s/1e12:.2f} TB/s; the step takes {1e3*took:.2f} ms, {compute/took:.0%} of the peak')
    if a.side > 32:
        steps = 115_846//a.bs
        print(f'ImageNet-LT, 90 epochs of {steps} such steps: {90*steps*took/3600:.2f} hours, if the loader keeps up')
    if a.recipe:
        n = PRESETS['paper']['iters']
        s = timed(through(learn), n, a)*n
        ok &= s <= RECIPE_S
        print(f'{n:,} steps of {a.bs}: {s:.0f} s; at most {RECIPE_S} s: {"yes" if s <= RECIPE_S else "NO"}, '
              f'goal {GOAL_S} s: {"yes" if s <= GOAL_S else "no"}')
    return ok


def profile(f, n=5):
    "Print the kernels that take the most time of a step"
    f(n)
    with torch.profiler.profile() as p: f(n)
    kernels = sorted(p.key_averages(), key=lambda e: -e.self_device_time_total)[:20]
    total = sum(e.self_device_time_total for e in p.key_averages())
    print(f'The GPU is at work for {total/n/1e3:.2f} ms of a step')
    for e in kernels: print(f'    {e.self_device_time_total/n/1e3:7.3f} ms {e.count//n:5} times   {e.key[:110]}')


def options():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in dict(threads=2, device='cpu', seconds=60., bs=512, model='resnet32', side=32,
                              precision='float32').items():
        p.add_argument(f'--{name}', type=type(default), default=default)
    for name in ('compile', 'recipe', 'profile'): p.add_argument(f'--{name}', action='store_true')
    p.add_argument('--malloc', choices=('keep', 'default'), default='keep')
    return p.parse_args()


def main():
    a = options()
    if a.device == 'cpu' and a.malloc == 'keep' and sys.platform == 'linux' and not MALLOC.keys() & os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MALLOC})
    torch.set_num_threads(a.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True     # floor and step alike
    cuda = a.device != 'cpu'
    print(f'torch {torch.__version__}, {torch.cuda.get_device_name() if cuda else "cpu"}, {a.threads} threads, '
          f'{a.model}, batches of {a.bs} images of {a.side} pixels, {a.precision}{", compiled" if a.compile else ""}')
    print('A step with the network')
    sides = {'by hand': by_hand(learner(a), a, a.precision)}
    sides |= {'run': through(learner(a)), 'Learner': through(learner(a, plain=True))}
    if cuda: sides['recorded'] = recorded(learner(a), a)
    ratio = show(turns(sides, 50 if cuda else 3, a.seconds, a), 'by hand')['run']
    ok = ratio <= LIMIT
    print(f'    run at most {LIMIT} times by hand: {"yes" if ok else "NO"}')
    print('Without a network: batches of 4 tiny images, one linear layer')
    show(turns(loop_alone(a), 200, a.seconds/10, a), 'by hand', 1e6, 'us a step')
    if a.side == 32:
        print('Batches without loader workers')
        show(turns(data_paths(a), 4, a.seconds/10, a), 'ArrayDL, whole batch', 1e3, 'ms a batch')
    if cuda: ok &= on_cuda(a)
    if cuda and a.profile: profile(by_hand(learner(a), a, a.precision))
    return 0 if ok else 1


if __name__ == '__main__': raise SystemExit(main())
