"""Images a second from lists and from packs beside decoding alone, and memory over epochs, in one process.

    python benchmarks/loading.py [--workers 1] [--seconds 60] [--epochs 8] [--sides decode training] [...]

Photos are made from the two that scikit-learn has: windows of 500x375, about 100 KB a file, as ImageNet's are. *Decode
alone* is the loader with the same workers, which read and decode each file and return nothing but its label. The other
sides also draw a window, resize it to 224x224 and send it as whole numbers; *to the device* adds mirror, colour jitter
and normalisation, which the main process does on whole batches, here on the CPU, where they take as long as loading.

Rates are images a second of a worker's processor time, which other work on the machine disturbs less than the clock; by
the clock they are printed beside. Each side runs in short turns. Rates and ratios are medians over the turns, a ratio
is taken within its turn. The first batch, in which workers start, is not counted. The exit status is 1 if the training
view has less than `LIMIT` of the rate of *decode alone*, or if memory grows. Memory is what is not a mapped file, of
this process and its workers, what they share counted once, half-way through each epoch of a list of 300,000 names.
"""
import argparse, os, statistics, tempfile, time
from pathlib import Path
import numpy as np, torch
from PIL import Image
from fastai.torch_core import TensorCategory
from balms.list_loader import Centre, ImageListDL, ImageListDataset, RandomWindow, list_dls
from balms.lists import read_list
from balms.packs import pack_images
from balms.sampled_loader import resampled

LIMIT = .85                                                             # of decoding with nothing sent


def photos(root, n):
    "`n` JPEG files of 500x375 and lists of them. Gives back their size in bytes."
    from sklearn.datasets import load_sample_images
    rng, images, size = np.random.default_rng(0), [Image.fromarray(o) for o in load_sample_images().images], []
    for i in range(n):
        x, y = rng.integers(0, 640 - 500, endpoint=True), rng.integers(0, 427 - 375, endpoint=True)
        images[i % 2].crop((x, y, x + 500, y + 375)).save(root/f'{i:04}.jpg', quality=97)
        size.append((root/f'{i:04}.jpg').stat().st_size)
    lines = ''.join(f'{i:04}.jpg {i % 10}\n' for i in range(n))
    for split in ('train', 'test'): (root/f'photos_{split}.txt').write_text(lines)
    return sum(size)/n


class DecodeOnly(torch.utils.data.Dataset):
    "Reads and decodes, and returns the label alone"
    n_inp = 1
    def __init__(self, ds): self.ds, self.targets = ds, ds.targets
    def __len__(self): return len(self.ds)
    def __getitem__(self, i):
        self.ds.image(i)
        return torch.zeros(1, dtype=torch.uint8), TensorCategory(self.targets[i])


def children(): return Path(f'/proc/{os.getpid()}/task/{os.getpid()}/children').read_text().split()


def processor_seconds(pids):
    ticks = 0
    for pid in pids:
        fields = Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks/os.sysconf('SC_CLK_TCK')


def rate(dl, ahead):
    "Images a second after the first batch: of the workers' processor time, and of the clock"
    n, of_workers = 0, None
    for i, batch in enumerate(dl):
        if i == 0:
            pids, start = children(), time.perf_counter()
            before = processor_seconds(pids)
            continue
        n += len(batch[1])
        if i == len(dl) - ahead - 1: of_workers = n/(processor_seconds(pids) - before)         # workers are still at it
    return of_workers, n/(time.perf_counter() - start)


def memory():
    "Anonymous memory of this process and its workers, in MB, what they share counted once"
    def one(pid):
        lines = Path(f'/proc/{pid}/smaps_rollup').read_text().splitlines()
        return int(next(l for l in lines if l.startswith('Pss_Anon')).split()[1])/1e3
    return one(os.getpid()) + sum(one(k) for k in children())


def make_sides(a, ds, pack, lossless):
    "The loaders by name"
    def plain(ds): return ImageListDL(ds, bs=a.bs, num_workers=a.workers, device='cpu')
    def seen(ds, view): return plain(ds.with_view(view))
    dls = list_dls(ds, ds, bs=a.bs, preset='code', num_workers=a.workers, device='cpu')
    sides = {'decode alone': plain(DecodeOnly(ds)), 'training view': seen(ds, RandomWindow()),
             'test view': seen(ds, Centre()), 'training, to the device': dls.train,
             'packed: decode alone': plain(DecodeOnly(pack)), 'packed: training view': seen(pack, RandomWindow()),
             'packed: test view': seen(pack, Centre()), 'lossless: training view': seen(lossless, RandomWindow())}
    if not a.sides: return sides
    return {s: dl for s, dl in sides.items() if s == 'decode alone' or any(w in s for w in a.sides)}


def measure_rates(a, sides):
    "Print the rates. Gives back whether the training view reaches the limit."
    turns, end = [], time.perf_counter() + a.seconds
    while len(turns) < 5 or time.perf_counter() < end:
        turns.append({s: rate(dl, 2*a.workers) for s, dl in sides.items()})
    def median(f): return statistics.median(f(t) for t in turns)
    for s in sides:
        of_workers, clock = (median(lambda t: t[s][i]) for i in (0, 1))
        ratio, clock_ratio = (median(lambda t: t[s][i]/t['decode alone'][i]) for i in (0, 1))
        print(f'    {s:26}{of_workers:6.0f} images a worker second {ratio:5.2f} x decode alone      '
              f'by the clock {clock:6.0f} a second {clock_ratio:5.2f} x')
    if a.sides: return True
    share = median(lambda t: t['training view'][0]/t['decode alone'][0])
    print(f'{len(turns)} turns. The training view reaches {LIMIT:.0%} of decode alone: '
          f'{"yes" if share >= LIMIT else "NO"}, {share:.0%}')
    return share >= LIMIT


def measure_memory(a, name, train, valid):
    "Print memory over epochs. Gives back whether it stays where it is after the second."
    long = train.subset(torch.arange(300_000) % len(train))
    dls = list_dls(long, valid, bs=a.bs, size=64, num_workers=a.workers, device='cpu')
    dl, mb = resampled(dls, 1, n_batches=40).train, []
    for _ in range(a.epochs): mb += [memory() for i, _ in enumerate(dl) if i == 20]
    print(f'    {name}: MB in epochs 1..{a.epochs}: {" ".join(f"{u:.0f}" for u in mb)}')
    stays = max(mb[1:]) - mb[1] < 16
    print(f'    memory grows by less than 16 MB after the second epoch: {"yes" if stays else "NO"}')
    return stays


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--workers', type=int, default=1)
    p.add_argument('--images', type=int, default=384)
    p.add_argument('--seconds', type=float, default=60)
    p.add_argument('--epochs', type=int, default=8)
    p.add_argument('--bs', type=int, default=32)
    p.add_argument('--repeat', type=int, default=3, help='the photos so many times a turn')
    p.add_argument('--sides', nargs='+', help='only sides whose names have one of these words, and no memory  [all]')
    a = p.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as tmp:
        root = Path(tmp)
        kb = photos(root, a.images)/1e3
        ds = ImageListDataset(read_list(root/'photos_train.txt'), root)
        pack = pack_images(ds, root/'photos.zip', num_workers=0)
        lossless = pack_images(ds, root/'lossless.zip', quality=None, num_workers=0)
        jpeg_kb, png_kb = (o.path.stat().st_size/a.images/1e3 for o in (pack, lossless))
        print(f'torch {torch.__version__}, {a.workers} worker{"s"*(a.workers > 1)}, {a.images} photos of 500x375, '
              f'{kb:.0f} KB; packed {jpeg_kb:.0f} KB (JPEG 95), {png_kb:.0f} KB (PNG)')
        often = torch.arange(a.repeat*a.images) % a.images
        ds, pack, lossless = (d.subset(often) for d in (ds, pack, lossless))
        ok = measure_rates(a, make_sides(a, ds, pack, lossless))
        if not a.sides: ok &= all([measure_memory(a, name, d, ds) for name, d in (('lists', ds), ('pack', pack))])
    return 0 if ok else 1


if __name__ == '__main__': raise SystemExit(main())
