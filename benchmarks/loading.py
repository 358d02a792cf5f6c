"""Images a second from lists and from packs beside decoding alone, and memory over epochs: ratios measured in one process.

    python benchmarks/loading.py [--workers 1] [--images 384] [--repeat 3] [--seconds 60] [--epochs 8] [--sides decode training]

Photos are made from the two that scikit-learn has: windows of 500x375, about 100 KB a file, as ImageNet's are. *Decode alone* is the
same loader with the same workers, which read and decode each file and return nothing but its label; *decode, send whole* sends the
decoded image as fastai's loader sends a tensor, which is what a loader without transforms does. The loader reads, decodes, draws a
window, resizes it to 224x224 and sends it; *to the device* adds mirror, colour jitter and normalisation, which the main process does on
whole batches, here on the CPU. Workers send the colours of a pixel side by side, as decoders give them; the main process takes them
apart on the device. Where that is a CPU its time is the main process's, part of what is seen by the clock, and is printed by itself.

Rates are images a second of a worker's processor time, which other work on the machine disturbs less than the clock; by the
clock they are printed beside. Each side runs in short turns. Rates and ratios are medians over the turns, a ratio is
taken within its turn. The first batch, in which workers start, is not counted. The limit, and the exit status with it, is against
*decode alone*: decoding with nothing sent. The loader from a pack has a line of its own. All other ratios are for information. Memory is what is not a
mapped file, of this process and its workers, what they share counted once, half-way through each epoch of a list of 300,000 names.
"""
import argparse, os, statistics, tempfile, time
from pathlib import Path
import numpy as np, torch
from PIL import Image
from fastai.data.core import TfmdDL
from fastai.torch_core import TensorCategory
from fastai.vision.core import TensorImage
from balms.image_lists import Centre, ImageListDL, ImageListDataset, Parcel, RandomWindow, Unpack, _One, _collate, list_dls, pack_images, read_list
from balms.samplers import resampled

LIMIT = .85                                                             # of decoding with nothing sent


def photos(root, n):
    "`n` JPEG files of 500x375 and lists of them"
    from sklearn.datasets import load_sample_images
    rng, ims, size = np.random.default_rng(0), [Image.fromarray(o) for o in load_sample_images().images], []
    for i in range(n):
        x, y = rng.integers(0, 640 - 500, endpoint=True), rng.integers(0, 427 - 375, endpoint=True)
        ims[i % 2].crop((x, y, x + 500, y + 375)).save(root/f'{i:04}.jpg', quality=97)
        size.append((root/f'{i:04}.jpg').stat().st_size)
    for s in ('train', 'test'): (root/f'photos_{s}.txt').write_text(''.join(f'{i:04}.jpg {i % 10}\n' for i in range(n)))
    return sum(size)/n


class DecodeOnly(torch.utils.data.Dataset):
    "Reads and decodes, and returns the label alone"
    n_inp = 1
    def __init__(self, ds): self.ds, self.targets = ds, ds.targets
    def __len__(self): return len(self.ds)
    def __getitem__(self, i): self.ds.image(i); return _One(torch.zeros(1, dtype=torch.uint8), ''), TensorCategory(self.targets[i])


class SendWhole(DecodeOnly):
    def __getitem__(self, i): return TensorImage(self.ds.image(i)), TensorCategory(self.targets[i])


def children(): return Path(f'/proc/{os.getpid()}/task/{os.getpid()}/children').read_text().split()


def used(pids): return sum(sum(map(int, Path(f'/proc/{p}/stat').read_text().rsplit(')', 1)[1].split()[11:13])) for p in pids)/os.sysconf('SC_CLK_TCK')


def rate(dl, ahead):
    "Images a second after the first batch: of the workers' processor time, and of the clock"
    n, size, last = 0, len(dl), None
    for i, b in enumerate(dl):
        if i == 0: pids, start = children(), time.perf_counter(); cpu = used(pids)
        else:
            n += len(b[1])
            if i == size - ahead - 1: last = n/(used(pids) - cpu)         # workers are still at it
    return last, n/(time.perf_counter() - start)


def unpacking(parcel):
    "Seconds of processor time an image"
    start = time.process_time(); Unpack('cpu')(parcel); return (time.process_time() - start)/len(parcel)


def memory():
    "Anonymous memory of this process and its workers, in MB, what they share counted once"
    one = lambda pid: int(next(l for l in Path(f'/proc/{pid}/smaps_rollup').read_text().splitlines() if l.startswith('Pss_Anon')).split()[1])/1e3
    return one(os.getpid()) + sum(one(k) for k in children())


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--workers', type=int, default=1); p.add_argument('--images', type=int, default=384); p.add_argument('--seconds', type=float, default=60)
    p.add_argument('--epochs', type=int, default=8); p.add_argument('--bs', type=int, default=32)
    p.add_argument('--repeat', type=int, default=3, help='the photos so many times a turn'); p.add_argument('--sides', nargs='+', help='only sides whose names have one of these words, and no memory  [all]')
    a = p.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as tmp:
        root = Path(tmp)
        kb = photos(root, a.images)/1e3
        ds = ImageListDataset(read_list(root/'photos_train.txt'), root)
        pack = pack_images(ds, root/'photos.pack', num_workers=0)
        lossless = pack_images(ds, root/'lossless.pack', quality=None, num_workers=0)
        print(f'torch {torch.__version__}, {a.workers} worker{"s"*(a.workers > 1)}, {a.images} photos of 500x375, {kb:.0f} KB; packed {(root/"photos.pack").stat().st_size/a.images/1e3:.0f} KB (JPEG 95), {(root/"lossless.pack").stat().st_size/a.images/1e3:.0f} KB (PNG)')
        long = torch.arange(a.repeat*a.images) % a.images
        ds, pack, lossless = (d.subset(long) for d in (ds, pack, lossless))
        plain = lambda ds: ImageListDL(ds, bs=a.bs, num_workers=a.workers, create_batch=_collate, after_batch=[Unpack('cpu')], device='cpu')
        view = lambda ds, v: plain(ds._copy(view=v, parcels=True))
        sides = {'decode alone': plain(DecodeOnly(ds)), 'decode, send whole': TfmdDL(SendWhole(ds), bs=a.bs, num_workers=a.workers, device='cpu'), 'training view': view(ds, RandomWindow()), 'test view': view(ds, Centre()),
                 'training, to the device': list_dls(ds, ds, bs=a.bs, preset='code', num_workers=a.workers, device='cpu').train,
                 'packed: decode alone': plain(DecodeOnly(pack)), 'packed: training view': view(pack, RandomWindow()), 'packed: test view': view(pack, Centre()),
                 'lossless: training view': view(lossless, RandomWindow())}
        if a.sides: sides = {s: d for s, d in sides.items() if s == 'decode alone' or any(w in s for w in a.sides)}
        turns, end = [], time.perf_counter() + a.seconds
        while len(turns) < 5 or time.perf_counter() < end: turns.append({s: rate(dl, 2*a.workers) for s, dl in sides.items()})
        mid = lambda f: statistics.median(f(t) for t in turns)
        for s in sides: print(f'    {s:26}{mid(lambda t: t[s][0]):6.0f} images a worker second   {mid(lambda t: t[s][0]/t["decode alone"][0]):5.2f} x decode alone      by the clock {mid(lambda t: t[s][1]):6.0f} a second {mid(lambda t: t[s][1]/t["decode alone"][1]):5.2f} x')
        parcel, n = Parcel.of([_One(RandomWindow()(ds.image(i))) for i in range(a.bs)]), 50
        apart = [unpacking(parcel) for _ in range(n)]
        print(f'    the main process takes the colours of an image apart in {statistics.median(apart)*1e3:.3f} ms on the CPU')
        if a.sides: return 0
        for x, y in (('training view', 'decode, send whole'), ('packed: training view', 'packed: decode alone'), ('packed: training view', 'training view')): print(f'    {x} / {y}: {mid(lambda t: t[x][0]/t[y][0]):.2f}')
        sent, strict, packed = (mid(lambda t: t[x][0]/t[y][0]) for x, y in (('training view', 'decode, send whole'), ('training view', 'decode alone'), ('packed: training view', 'decode alone')))
        ok, say = strict >= LIMIT, lambda share: f'{"yes" if share >= LIMIT else "NO"}, {share:.0%}'
        print(f'{len(turns)} turns. The loader reaches {LIMIT:.0%} of decoding with nothing sent: {say(strict)}')
        print(f'    From a pack it reaches {LIMIT:.0%} of decoding the photos with nothing sent: {say(packed)}')
        print(f'    For information: {sent:.0%} of a loader that decodes and sends the photo as it is')
        for name, d in (('lists', ds), ('pack', pack)):
            dls = list_dls(d.subset(torch.arange(300_000) % len(d)), ds, bs=a.bs, size=64, num_workers=a.workers, device='cpu')
            dl, mb = resampled(dls, 1, n_batches=40).train, []
            for _ in range(a.epochs): mb += [memory() for i, _ in enumerate(dl) if i == 20]
            print(f'    {name}: MB in epochs 1..{a.epochs}: {" ".join(f"{u:.0f}" for u in mb)}')
            grows = max(mb[1:]) - mb[1]; ok &= grows < 16
            print(f'    memory grows by less than 16 MB after the second epoch: {"yes" if grows < 16 else "NO"}')
    return 0 if ok else 1


if __name__ == '__main__': raise SystemExit(main())
