"""Balanced Softmax against plain cross-entropy: time of forward and backward, as a ratio measured in one process.

    python benchmarks/core.py [--threads 2] [--device cpu] [--seconds 4] [--compile]

Balanced Softmax adds one array of the size of the logits, which costs most where the logits are small. The two losses
are timed in short turns, so that whatever else the machine does falls on both. Times are medians over the turns, the
ratio is the median of the ratios within a turn, with its quartiles. First some large arrays are made and freed, as a
network does in each step: before that, glibc gives small arrays back to the system each time and page faults are
measured. With --compile both losses are compiled, and the addition is part of the same kernel.
"""
import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from balms.core import BalancedSoftmax

SHAPES = {(512, 100): 1.5, (512, 1000): 1.5, (256, 8142): 1.25, (4096, 1230): 1.25}      # and the largest ratio allowed


def seconds_a_step(loss, x, y, n, sync):
    "Mean seconds of `n` forward and backward passes"
    start = time.perf_counter()
    for _ in range(n):
        x.grad = None
        loss(x, y).backward()
    sync()
    return (time.perf_counter() - start)/n


def compare(losses, x, y, seconds, sync):
    "Pairs of seconds a step, one pair a turn, for about `seconds`"
    n = max(1, int(5e5/x.numel()))
    for loss in losses: seconds_a_step(loss, x, y, 3*n, sync)
    pairs, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        order = (0, 1) if len(pairs) % 2 else (1, 0)
        took = {i: seconds_a_step(losses[i], x, y, n, sync) for i in order}
        pairs.append((took[0], took[1]))
    return pairs


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--threads', type=int, default=torch.get_num_threads())
    p.add_argument('--device', default='cpu')
    p.add_argument('--seconds', type=float, default=4)
    p.add_argument('--compile', action='store_true')
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    sync = torch.cuda.synchronize if a.device.startswith('cuda') else lambda: None
    how = ', compiled' if a.compile else ''
    print(f'torch {torch.__version__}, {a.device}, {a.threads} threads{how}, about {a.seconds:g} s a shape')
    ok = True
    for _ in range(3): del [torch.ones(7*2**20) for _ in range(4)][:]            # 28 MB each, below glibc's limit of 32
    for (n, k), limit in SHAPES.items():
        x, y = torch.randn(n, k, device=a.device, requires_grad=True), torch.randint(k, (n,), device=a.device)
        losses = F.cross_entropy, BalancedSoftmax(torch.randint(1, 5000, (k,))).to(a.device)
        if a.compile: losses = tuple(map(torch.compile, losses))
        pairs = compare(losses, x, y, a.seconds, sync)
        ce, bs = (1e6*statistics.median(t) for t in zip(*pairs))
        low, ratio, high = statistics.quantiles([b/c for c, b in pairs], n=4)
        ok &= ratio <= limit
        print(f'({n:5}, {k:5})  F.cross_entropy {ce:8.0f} us   BalancedSoftmax {bs:8.0f} us   '
              f'ratio {ratio:.2f}  [{low:.2f}, {high:.2f}]  limit {limit}')
    print(f'all within their limits: {"yes" if ok else "NO"}')
    return 0 if ok else 1


if __name__ == '__main__': raise SystemExit(main())
