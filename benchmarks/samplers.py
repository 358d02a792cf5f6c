"""A batch by class rates against PyTorch's draw over one weight an image: times as ratios measured in one process.

    python benchmarks/samplers.py [--threads 1] [--device cpu] [--seconds 3]

Three long tails, as large as CIFAR-100-LT, ImageNet-LT and two million images, all drawn class-balanced.
`ClassSampler.draw` is compared with `torch.multinomial` over the images' weights, once a batch, as it would be for
rates that change in every step; and with `WeightedRandomSampler`, which draws a whole epoch at once, counted per
batch, for rates that do not change. The sides are timed in short turns, so that whatever else the machine does falls
on all of them. Times are medians over the turns, ratios are medians of the ratio within a turn.
"""
import argparse, statistics, time
import torch
from torch.utils.data import WeightedRandomSampler
from balms.long_tail import long_tail_counts
from balms.samplers import ClassSampler, sampling_rates

SIZES = [(500, 100, 100), (645, 1000, 256), (11_140, 1000, 256)]       # images of the largest class, classes, imbalance
LIMIT_US = 300                                                           # of a draw of 512 on the CPU


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--device', default='cpu')
    p.add_argument('--seconds', type=float, default=3)
    p.add_argument('--bs', type=int, default=512)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    sync = torch.cuda.synchronize if a.device.startswith('cuda') else lambda: None
    print(f'torch {torch.__version__}, {a.device}, {a.threads} threads, batches of {a.bs}')
    ok = True
    for n_max, k, imbalance in SIZES:
        n = torch.tensor(long_tail_counts(n_max, k, imbalance))
        y = torch.repeat_interleave(torch.arange(k), n)
        rates = sampling_rates(n, 0)
        s, w = ClassSampler(y, rates, device=a.device), (rates/n)[y].to(a.device)
        r = rates.to(a.device)
        epoch = WeightedRandomSampler(w.cpu(), len(y))
        sides = {'draw': (lambda s=s: s.draw(a.bs), 100),
                 'set_rates, draw': (lambda s=s, r=r: (s.set_rates(r), s.draw(a.bs)), 100),
                 'multinomial': (lambda w=w: torch.multinomial(w, a.bs, True), 3),
                 'WeightedRandomSampler': (lambda epoch=epoch: list(epoch), 1)}
        turns, end = [], time.perf_counter() + a.seconds
        while len(turns) < 3 or time.perf_counter() < end:
            t = {}
            for side, (f, reps) in sides.items():
                f(); sync(); start = time.perf_counter()
                for _ in range(reps): f()
                sync(); t[side] = (time.perf_counter() - start)/reps*1e6
            t['WeightedRandomSampler'] *= a.bs/len(y)
            turns.append(t)
        us = {side: statistics.median(t[side] for t in turns) for side in sides}
        ratio = {side: statistics.median(t[side]/t['draw'] for t in turns) for side in sides}
        ok &= a.device != 'cpu' or us['draw'] <= LIMIT_US
        print(f'{len(y):,} images, {k:,} classes')
        for side in sides: print(f'    {side:22} {us[side]:9.0f} us a batch   {ratio[side]:7.2f} x draw')
    if a.device == 'cpu': print(f'a draw takes at most {LIMIT_US} us: {"yes" if ok else "NO"}')
    return 0 if ok else 1


if __name__ == '__main__': raise SystemExit(main())
