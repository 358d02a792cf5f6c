"""Balanced Softmax against plain cross-entropy: time of forward and backward, as a ratio measured in one process.

    python benchmarks/core.py [--threads 2] [--device cpu] [--seconds 4]

The two are timed in short turns, so that whatever else the machine does falls on both. Times are medians over the turns, the
ratio is the median over the turns of the ratio within a turn, with its quartiles. First some large arrays are made and freed, as
a network does in each step: before that, glibc gives small arrays back to the system each time and page faults are measured.
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
    p.add_argument('--threads', type=int, default=torch.get_num_threads()); p.add_argument('--device', default='cpu'); p.add_argument('--seconds', type=float, default=4)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    sync = torch.cuda.synchronize if a.device.startswith('cuda') else lambda: None
    print(f'torch {torch.__version__}, {a.device}, {a.threads} threads, about {a.seconds:g} s a shape')
    ok = True
    for _ in range(3): del [torch.ones(7*2**20) for _ in range(4)][:]            # 28 MB each, below glibc's limit of 32
    for n, k in SHAPES:
        x, y = torch.randn(n, k, device=a.device, requires_grad=True), torch.randint(k, (n,), device=a.device)
        losses = F.cross_entropy, BalancedSoftmax(torch.randint(1, 5000, (k,))).to(a.device)
        reps = max(1, int(5e5/(n*k)))
        for f in losses: step(f, x, y, 3*reps, sync)
        pairs, end = [], time.perf_counter() + a.seconds
        while time.perf_counter() < end:
            order = (0, 1) if len(pairs) % 2 else (1, 0)
            t = {i: step(losses[i], x, y, reps, sync) for i in order}
            pairs.append((t[0], t[1]))
        ce, bs = (statistics.median(t) for t in zip(*pairs))
        lo, ratio, hi = statistics.quantiles([b/c for c, b in pairs], n=4)
        ok &= ratio <= LIMIT
        print(f'({n:5}, {k:5})  F.cross_entropy {1e6*ce:8.0f} us   BalancedSoftmax {1e6*bs:8.0f} us   ratio {ratio:.2f}  [{lo:.2f}, {hi:.2f}]')
    print(f'all at most {LIMIT}: {"yes" if ok else "NO"}')
    return 0 if ok else 1


if __name__ == '__main__': raise SystemExit(main())
