"""The CIFAR augmentation of the paper for a whole batch at once against one image at a time: images a second, ratios.

    python benchmarks/augment.py [--device cpu] [--seconds 20] [--workers 2]

Crop with padding 4, flip, AutoAugment (CIFAR-10 policy) and Cutout 16, on batches of 512 images of 3 x 32 x 32, into
one uint8 tensor. `ours` is `balms.augment.AutoAugmentCutout` on a uint8 batch. The others are torchvision's transforms,
called once an image, and a Cutout that sets a slice to zero: on PIL images, as the usual training script has them, in
this process and in `--workers` DataLoader workers (one thread each), and on tensors. (Ours takes the paper's form of
AutoAugment; other lengths of translations and grey for black cost nothing.) The sides are timed in short
turns, so that whatever else the machine does falls on all of them; workers have an empty queue when their turn begins,
and a full one, which stops them, when it is another's. Figures are medians over the turns.

The limit is for ours on as many cores as there are workers. Ours is timed with that many threads and with one; the
better of the two counts, because on a machine that does other things threads wait for each other at every operation.

Images of 224 x 224 pixels with the ImageNet policy come after it, without a limit: there one image is enough work for
a call.

With `--device cuda` ours runs on the GPU, as it is, compiled, and as a CUDA graph: microseconds a batch, against a
training step.
"""
import argparse
import os
import statistics
import time

import numpy as np
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T

from balms.augment import AutoAugment, AutoAugmentCutout, CropFlip, Cutout, RandAugment, TrivialAugmentWide
from balms.datasets import data_root, load_data
from balms.image_ops import OPS

LIMIT, GOAL = 2, 3                                     # ours, in images a second of PIL in loader workers
STEP_SHARE = .15                                       # ours, of a training step on a GPU
BS = 512


def images(n=4096):
    "CIFAR-10 if it is at hand, else crops of scikit-learn's two photographs"
    if (data_root()/'cifar10').is_dir():
        x = load_data('cifar10')[0].images
        return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:n]], 'CIFAR-10'
    from sklearn.datasets import load_sample_images
    small = [Image.fromarray(p).resize((160, 107), Image.Resampling.BOX) for p in load_sample_images().images]
    small = [torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in small]
    rng = np.random.default_rng(0)
    which, rows, columns = rng.integers(2, size=n), rng.integers(75, size=n), rng.integers(128, size=n)
    crops = [small[k][:, i:i + 32, j:j + 32] for k, i, j in zip(which, rows, columns)]
    return torch.stack(crops), "crops of scikit-learn's photographs"


def pil_images(x): return [Image.fromarray(i.permute(1, 2, 0).numpy()) for i in x]


def cutout(x, size=16):
    "One image (c, h, w), in place"
    i, j = (int(torch.randint(n, (1,))) - size//2 for n in x.shape[1:])
    x[:, max(i, 0):i + size, max(j, 0):j + size] = 0
    return x


class OneByOne(Dataset):
    "torchvision's transforms on one PIL image, or tensor, at a time"
    def __init__(self, ims, last):
        policy = T.AutoAugment(T.AutoAugmentPolicy.CIFAR10)
        self.ims = ims
        self.tfm = T.Compose([T.RandomCrop(32, 4), T.RandomHorizontalFlip(), policy, *last, cutout])
    def __len__(self): return len(self.ims)
    def __getitem__(self, i): return self.tfm(self.ims[i])
    def batch(self, idxs): return torch.stack([self[i] for i in idxs.tolist()])


class Forever:
    "Shuffled batches of indices without an end"
    def __init__(self, n): self.n = n
    def __iter__(self):
        while True: yield from torch.randperm(self.n).split(BS)


class Workers:
    "Batches from loader workers; a turn begins with an empty queue and ends with a full one"
    def __init__(self, ds, n):
        loader = DataLoader(ds, batch_sampler=Forever(len(ds)), num_workers=n, prefetch_factor=2)
        self.n, self.it = n, iter(loader)
        for _ in range(4*n): next(self.it)                               # started, and warm
    def turn(self, reps):
        for _ in range(2*self.n): next(self.it)                          # what they had made while others were timed
        start = time.perf_counter()
        for _ in range(reps): next(self.it)
        took = (time.perf_counter() - start)/reps
        time.sleep(3*2*self.n*took)                                # until the queue is full again, and the workers rest
        return took


def in_turns(sides, seconds, least=5):
    "`{name: [seconds a call in each turn]}` of `{name: function that takes a turn}`"
    times, end = {k: [] for k in sides}, time.perf_counter() + seconds
    while min(map(len, times.values())) < least or time.perf_counter() < end:
        for k, f in sides.items(): times[k].append(f())
    return times


def timed(f, reps, threads=1, sync=lambda: None):
    def turn():
        torch.set_num_threads(threads)
        f()
        sync()
        start = time.perf_counter()
        for _ in range(reps): f()
        sync()
        took = (time.perf_counter() - start)/reps
        torch.set_num_threads(1)
        return took
    return turn


def operations(f, x):
    "Operations of a call, views left out: one kernel each on a GPU, or a few"
    class Count(TorchDispatchMode):
        n = 0
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            self.n += not f.is_view
            return f(*args, **(kwargs or {}))
    f(x.to('meta'))
    with Count() as c: f(x.to('meta'))
    return c.n


def parts(x, gen, seconds, sync=lambda: None):
    "Each augmentation, and each operation alone"
    fs = {repr(f): f for f in (CropFlip(), AutoAugment(), Cutout(), RandAugment(), TrivialAugmentWide())}
    fs |= {o: AutoAugment([((o, 1., 5), ('Identity', 0., 0))]) for o in OPS[1:]}
    sides = {k: timed(lambda f=f: f(x, gen), 3, 1, sync) for k, f in fs.items()}
    for k, t in in_turns(sides, seconds).items():
        print(f'    {k:40} {statistics.median(t)*1e6:8.0f} us for {len(x)} images')


def small_images(a):
    "Times of the paper's augmentation, by side"
    x, source = images()
    print(f'{source}, batches of {BS}, torch {torch.__version__}, {os.cpu_count()} cores, '
          f'load {os.getloadavg()[0]:.1f}')
    aug, gen, idx = AutoAugmentCutout(), torch.Generator().manual_seed(0), iter(Forever(len(x)))
    pil, tensors = OneByOne(pil_images(x), [T.PILToTensor()]), OneByOne(x, [])
    workers = Workers(pil, a.workers)
    def ours(): return aug(x[next(idx)], gen)
    sides = {'ours, 1 thread': timed(ours, 5),
             f'ours, {a.workers} threads': timed(ours, 5, a.workers),
             f'PIL, {a.workers} workers': lambda: workers.turn(2*a.workers),
             'PIL, this process': timed(lambda: pil.batch(next(idx)), 1),
             'tensors, this process': timed(lambda: tensors.batch(next(idx)), 1)}
    times = in_turns(sides, a.seconds)
    parts(x[:BS], gen, a.seconds/4)
    return times


def large_images(seconds):
    x, _ = images(32)
    x = torch.nn.functional.interpolate(x.float(), size=224, mode='bilinear').byte()
    gen, aug = torch.Generator().manual_seed(0), AutoAugment('imagenet')
    pil, theirs = pil_images(x), T.Compose([T.AutoAugment(), T.PILToTensor()])
    times = in_turns({'ours': timed(lambda: aug(x, gen), 2),
                      'PIL': timed(lambda: torch.stack([theirs(i) for i in pil]), 1)}, seconds)
    rates = [f'{k} {32/statistics.median(t):,.0f} images/s' for k, t in times.items()]
    print('32 images of 224 x 224, ImageNet policy, one thread:', ', '.join(rates))


def on_cpu(a):
    times = small_images(a)
    for k, t in times.items(): print(f'    {k:22} {BS/statistics.median(t):9,.0f} images/s')
    def ratio(one, other): return statistics.median(q/p for p, q in zip(times[one], times[other]))
    ours, others = list(times)[:2], list(times)[2:]
    for k in ours: print(f'{k}: ' + ', '.join(f'{ratio(k, other):.1f} x {other}' for other in others))
    best = max(ratio(k, others[0]) for k in ours)
    print(f'ours is at least {LIMIT} x {others[0]}: {"yes" if best >= LIMIT else "NO"}; '
          f'goal {GOAL}: {"yes" if best >= GOAL else "no"}')
    large_images(a.seconds/4)
    return best >= LIMIT


def training_step(device):
    "A step of the paper's CIFAR network, bfloat16 and channels last"
    from balms.models import get_model
    net = get_model('resnet32', 100).to(device, memory_format=torch.channels_last)
    opt = torch.optim.SGD(net.parameters(), .1, .9, weight_decay=5e-4, nesterov=True)
    x = torch.randn(BS, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    y = torch.randint(100, (BS,), device=device)
    def step():
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            loss = torch.nn.functional.cross_entropy(net(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad(set_to_none=False)
    return step


def captured(f, gen=None):
    "`f` as a CUDA graph"
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3): f()
    torch.cuda.current_stream().wait_stream(side)
    g = torch.cuda.CUDAGraph()
    if gen is not None: g.register_generator_state(gen)
    with torch.cuda.graph(g): f()
    return g.replay


def on_cuda(a):
    device = torch.device(a.device)
    x, source = images(BS)
    x, gen, aug, fused = x.to(device), torch.Generator(device).manual_seed(0), AutoAugmentCutout(), AutoAugmentCutout()
    print(f'{source}, batches of {BS}, torch {torch.__version__}, {torch.cuda.get_device_name(device)}; '
          f'{operations(aug, x)} operations a batch')
    fused.compile(3, 32, 32, device, fullgraph=True)
    fused(x, gen)
    aug(x, gen)
    torch.cuda.set_sync_debug_mode('error')                              # an error if anything waits
    aug(x, gen)
    torch.cuda.set_sync_debug_mode('default')
    def sync(): torch.cuda.synchronize(device)
    def ours(): return aug(x, gen)
    def compiled(): return fused(x, gen)
    step = training_step(device)
    sides = {'step': step, 'step, graph': captured(step), 'ours': ours, 'ours, graph': captured(ours, gen),
             'ours, compiled': compiled, 'ours, compiled, graph': captured(compiled, gen)}
    times = in_turns({k: timed(f, 50, 1, sync) for k, f in sides.items()}, a.seconds)
    medians = {k: statistics.median(t) for k, t in times.items()}
    for k, t in medians.items(): print(f'    {k:22} {t*1e6:8.0f} us')
    best, whole = min(t for k, t in medians.items() if 'ours' in k), min(t for k, t in medians.items() if 'step' in k)
    small = best <= STEP_SHARE*whole
    print(f'ours takes {best/whole:.1%} of the fastest step, at most {STEP_SHARE:.0%}: {"yes" if small else "NO"}')
    parts(x, gen, a.seconds/4, sync)
    return small


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--device', default='cpu')
    p.add_argument('--seconds', type=float, default=20)
    p.add_argument('--workers', type=int, default=2)
    a = p.parse_args()
    torch.set_num_threads(1)
    return 0 if (on_cuda if a.device.startswith('cuda') else on_cpu)(a) else 1


if __name__ == '__main__': raise SystemExit(main())
