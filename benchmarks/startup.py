"""What one waits for before anything happens: imports, and a data set that was decoded before.

    python benchmarks/startup.py            # CIFAR too where $BALMS_DATA has it
"""
import os, statistics, subprocess, sys, time


def seconds(code):
    t = time.perf_counter()
    subprocess.run([sys.executable, '-c', code], check=True)
    return time.perf_counter() - t


def main():
    for c in ('import torch', 'import balms.core'): seconds(c)                # warm the file cache
    times = [[seconds(c) for c in ('import torch', 'import balms.core')] for _ in range(9)]
    torch_s, core_s = (statistics.median(t) for t in zip(*times))
    print(f'import torch {torch_s:.2f} s   import balms.core {core_s:.2f} s   ratio {core_s/torch_s:.2f} (at most 1.10)')
    from balms.data import data_root, load_data
    for name in ('cifar10', 'cifar100'):
        if not (data_root()/name).is_dir(): print(f'{name}: not in {data_root()}, skipped'); continue
        for which in ('first start (decodes unless it is in the cache)', 'second start'):
            t = time.perf_counter(); train, test = load_data(name)
            print(f'{name}: {len(train)} + {len(test)} images, {which}: {time.perf_counter() - t:.2f} s')


if __name__ == '__main__': main()
