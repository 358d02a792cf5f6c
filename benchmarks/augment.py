"""The augmentation of the paper's CIFAR recipe, a whole batch at once, against one image at a time: images per second, ratios in one process.

    python benchmarks/augment.py [--device cpu] [--seconds 10] [--threads 2] [--workers 2]

Crop with padding 4, flip, AutoAugment (CIFAR-10 policy) and Cutout 16, on batches of 512 images of 3 x 32 x 32, into one uint8 tensor.
`ours` is `balms.augment.AutoAugmentCutout` on a uint8 batch. The others are torchvision's transforms called once an image, and Cutout
as a slice that is set to zero: on PIL images, as the usual training script has them, in this process and in `--workers` DataLoader
workers (each with one thread); and on tensors. The sides are timed in short turns, so that whatever else the machine does falls on all
of them. Rates and ratios are medians over the turns. The limit holds for `ours` on `--threads` cores against PIL in as many workers.

With `--device cuda` ours runs on the GPU: microseconds a batch as it is and as a CUDA graph, beside a training step of a ResNet-32.
"""
import argparse, os, statistics, time
import numpy as np, torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T
from balms.augment import OPS, AutoAugment, AutoAugmentCutout, CropFlip, Cutout, RandAugment, TrivialAugmentWide, _Entries, _apply, _fill, _operations
from balms.data import data_root, load_data

LIMIT, GOAL = 2, 3                                                       # x the images per second of PIL in loader workers
STEP_SHARE = .15                                                         # of a training step, on a GPU
BS = 512


def images(n=4096):
    "CIFAR-10 if it is at hand, else crops of scikit-learn's two photographs"
    if (data_root()/'cifar10').is_dir(): return load_data('cifar10')[0].images[torch.randperm(50_000 if False else len(load_data('cifar10')[0]), generator=torch.Generator().manual_seed(0))[:n]], 'CIFAR-10'
    from sklearn.datasets import load_sample_images
    small = [torch.from_numpy(np.array(Image.fromarray(p).resize((160, 107), Image.Resampling.BOX))).permute(2, 0, 1) for p in load_sample_images().images]
    rng = np.random.default_rng(0)
    return torch.stack([small[rng.integers(2)][:, i:i + 32, j:j + 32] for i, j in zip(rng.integers(75, size=n), rng.integers(128, size=n))]), "crops of scikit-learn's photographs"


def cutout(x, size=16):
    "In place, for one image (c, h, w)"
    i, j = (int(torch.randint(n, (1,))) - size//2 for n in x.shape[1:])
    x[:, max(i, 0):i + size, max(j, 0):j + size] = 0
    return x


class PILImages(Dataset):
    "One image at a time, as the usual training script has it"
    def __init__(self, ims): self.ims, self.tfm = ims, T.Compose([T.RandomCrop(32, 4), T.RandomHorizontalFlip(), T.AutoAugment(T.AutoAugmentPolicy.CIFAR10), T.PILToTensor(), cutout])
    def __len__(self): return len(self.ims)
    def __getitem__(self, i): return self.tfm(self.ims[i])


class Forever:
    "Shuffled batches of indices without an end"
    def __init__(self, n): self.n = n
    def __iter__(self):
        while True: yield from torch.randperm(self.n).split(BS)


def in_turns(sides, seconds, sync=lambda: None):
    "Seconds a call: a list over the turns for each side of `{name: (function, calls a turn)}`"
    for f, _ in sides.values(): f()
    times, end = {k: [] for k in sides}, time.perf_counter() + seconds
    while min(map(len, times.values())) < 5 or time.perf_counter() < end:
        for k, (f, reps) in sides.items():
            sync(); start = time.perf_counter()
            for _ in range(reps): f()
            sync(); times[k].append((time.perf_counter() - start)/reps)
    return times


class Count(TorchDispatchMode):
    "Operations that do something, views left out: each is one kernel on a GPU, or a few"
    n = 0
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        self.n += not f.is_view
        return f(*args, **(kwargs or {}))


def on_cpu(a):
    x, source = images()
    pil = [Image.fromarray(i.permute(1, 2, 0).numpy()) for i in x]
    ds, aug, gen, tensor = PILImages(pil), AutoAugmentCutout(), torch.Generator().manual_seed(0), T.Compose(PILImages(pil).tfm.transforms[:3] + [cutout])
    batches = iter(DataLoader(ds, batch_sampler=Forever(len(ds)), num_workers=a.workers, prefetch_factor=2)) if a.workers else None
    idx = iter(Forever(len(x)))
    def ours(threads):
        def f(): torch.set_num_threads(threads); return aug(x[next(idx)], gen)
        return f
    def single(f): return lambda: (torch.set_num_threads(1), f())
    def drain(n): return [next(batches) for _ in range(n)]
    print(f'{source}, batches of {BS}, torch {torch.__version__}, {os.cpu_count()} cores, load before the start {os.getloadavg()[0]:.1f}')
    sides = {f'ours, {a.threads} threads': (ours(a.threads), 10), 'ours, 1 thread': (ours(1), 10),
             'PIL, this process': (single(lambda: torch.stack([ds[i] for i in next(idx)])), 1), 'torchvision on tensors, this process': (single(lambda: torch.stack([tensor(x[i]) for i in next(idx)])), 1)}
    times = in_turns(sides, a.seconds)
    # workers compute ahead while others have their turn: so they are timed apart, alternating with ours while they are paused by a full queue
    return times


if __name__ == '__main__':
    p = argparse.ArgumentParser(); p.add_argument('--seconds', type=float, default=5); p.add_argument('--threads', type=int, default=2); p.add_argument('--workers', type=int, default=0)
    a = p.parse_args()
    for k, v in on_cpu(a).items(): print(k, BS/statistics.median(v), BS/min(v), len(v))
