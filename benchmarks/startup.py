"""What one waits for before anything happens: imports, `--help`, and a data set that was decoded before.

    python benchmarks/startup.py            # CIFAR too where $BALMS_DATA has it
"""
import statistics
import subprocess
import sys
import time

COMMANDS = {'import torch': ['-c', 'import torch'], 'import balms.core': ['-c', 'import balms.core'],
            'balms_train --help': ['-m', 'balms.cli', 'train', '--help']}
LIMITS = {'import balms.core': 1.10, 'balms_train --help': 1.}           # times `import torch`


def seconds(arguments):
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def data_sets():
    from balms.datasets import data_root, load_data
    for name in ('cifar10', 'cifar100'):
        if not (data_root()/name).is_dir():
            print(f'{name}: not in {data_root()}, skipped')
            continue
        for which in ('first start (decodes unless it is in the cache)', 'second start'):
            began = time.perf_counter()
            train, test = load_data(name)
            print(f'{name}: {len(train)} + {len(test)} images, {which}: {time.perf_counter() - began:.2f} s')


def main():
    for arguments in COMMANDS.values(): seconds(arguments)               # warm the file cache
    turns = [{name: seconds(arguments) for name, arguments in COMMANDS.items()} for _ in range(9)]
    times, ok = {name: statistics.median(t[name] for t in turns) for name in COMMANDS}, True
    for name, s in times.items():
        ratio, limit = s/times['import torch'], LIMITS.get(name)
        ok &= limit is None or ratio <= limit
        print(f'{name:20} {s:.2f} s' + (f'   {ratio:.2f} x import torch (at most {limit:.2f})' if limit else ''))
    data_sets()
    return 0 if ok else 1


if __name__ == '__main__': raise SystemExit(main())
