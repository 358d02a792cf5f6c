"""Balanced Softmax against plain cross-entropy: time of forward and backward, as a ratio of medians measured in one process.

    python benchmarks/core.py [--threads 2] [--device cpu] [--rounds 41]

The two are timed in turns, so that whatever else the machine does falls on both.
"""
import argparse, statistics, time
import torch, torch.nn.functional as F
from balms.core import BalancedSoftmax

SHAPES = [(512, 100), (512, 1000), (256, 8142), (4096, 1230)]
LIMIT = 1.15


def step(loss, x, y, n, sync):
    "Seconds of `n` forward and backward passes"
    t = time.perf_counter()
    for _ in range(n):
        x.grad = None
        loss(x, y).backward()
    sync()
    return (time.perf_counter() - t)/n


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--threads', type=int, default=torch.get_num_threads()); p.add_argument('--device', default='cpu'); p.add_argument('--rounds', type=int, default=41)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    sync = torch.cuda.synchronize if a.device.startswith('cuda') else lambda: None
    print(f'torch {torch.__version__}, {a.device}, {a.threads} threads, median of {a.rounds} rounds')
    ok = True
    for n, k in SHAPES:
        x, y = torch.randn(n, k, device=a.device, requires_grad=True), torch.randint(k, (n,), device=a.device)
        losses = F.cross_entropy, BalancedSoftmax(torch.randint(1, 5000, (k,))).to(a.device)
        reps = max(3, int(2e6/(n*k)))
        for f in losses: step(f, x, y, reps, sync)
        times = [[step(f, x, y, reps, sync) for f in losses] for _ in range(a.rounds)]
        ce, bs = (statistics.median(t) for t in zip(*times))
        ok &= bs/ce <= LIMIT
        print(f'({n:5}, {k:5})  F.cross_entropy {1e6*ce:8.0f} us   BalancedSoftmax {1e6*bs:8.0f} us   ratio {bs/ce:.2f}')
    print(f'all at most {LIMIT}: {"yes" if ok else "NO"}')


if __name__ == '__main__': main()
