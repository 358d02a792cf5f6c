"""Images a second from lists and from packs beside decoding alone, and memory over epochs: ratios measured in one process.

    python benchmarks/loading.py [--workers 1] [--images 384] [--seconds 60] [--epochs 8]

Photos are made from the two that scikit-learn has: windows of 500x375, saved so that a file has about 110 KB, the mean of
ImageNet. *Decode alone* is the same loader with the same workers, which read and decode each file and return nothing but its
label. The loader reads, decodes, draws a window, resizes it to 224x224 and puts the batch together; *to the device* adds mirror,
colour jitter and normalisation, which the main process does on the whole batch (here on the CPU). Each side runs in short turns,
so that whatever else the machine does falls on all of them; the first batch, in which workers start, is not counted. Rates and
ratios are medians over the turns, a ratio is taken within its turn. Memory is what is not a mapped file (RssAnon), of this process and its workers, half-way
through each epoch of a list of 300,000 names.
"""
import argparse, os, statistics, tempfile, time
from pathlib import Path
import numpy as np, torch
from PIL import Image
from fastai.torch_core import TensorCategory
from balms.image_lists import Centre, ImageListDL, ImageListDataset, RandomWindow, _collate, list_dls, pack_images, read_list
from balms.samplers import resampled

LIMIT = .85                                                             # of decoding alone, photos as they are


def photos(root, n):
    "`n` JPEG files of 500x375 and lists of them"
    from sklearn.datasets import load_sample_images
    rng, ims, size = np.random.default_rng(0), [Image.fromarray(o) for o in load_sample_images().images], []
    for i in range(n):
        x, y = rng.integers(0, 640 - 500, endpoint=True), rng.integers(0, 427 - 375, endpoint=True)
        ims[i % 2].crop((x, y, x + 500, y + 375)).save(root/f'{i:04}.jpg', quality=96)
        size.append((root/f'{i:04}.jpg').stat().st_size)
    for s in ('train', 'test'): (root/f'photos_{s}.txt').write_text(''.join(f'{i:04}.jpg {i % 10}\n' for i in range(n)))
    return sum(size)/n


class DecodeOnly(torch.utils.data.Dataset):
    "Reads and decodes, and returns the label alone"
    n_inp = 1
    def __init__(self, ds): self.ds, self.targets = ds, ds.targets
    def __len__(self): return len(self.ds)
    def __getitem__(self, i): self.ds.image(i); return torch.zeros(1), TensorCategory(self.targets[i])


def rate(dl):
    "Images a second after the first batch"
    n, start = 0, None
    for b in dl:
        if start is None: start = time.perf_counter()
        else: n += len(b[1])
    return n/(time.perf_counter() - start)


def memory():
    "RssAnon of this process and its workers, in MB"
    one = lambda pid: int(next(l for l in Path(f'/proc/{pid}/status').read_text().splitlines() if l.startswith('RssAnon')).split()[1])/1e3
    return one(os.getpid()) + sum(one(k) for k in Path(f'/proc/{os.getpid()}/task/{os.getpid()}/children').read_text().split())


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--workers', type=int, default=1); p.add_argument('--images', type=int, default=384); p.add_argument('--seconds', type=float, default=60)
    p.add_argument('--epochs', type=int, default=8); p.add_argument('--bs', type=int, default=32)
    a = p.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as tmp:
        root = Path(tmp)
        kb = photos(root, a.images)/1e3
        ds = ImageListDataset(read_list(root/'photos_train.txt'), root)
        pack = pack_images(ds, root/'photos.pack', num_workers=0)
        lossless = pack_images(ds, root/'lossless.pack', quality=None, num_workers=0)
        print(f'torch {torch.__version__}, {a.workers} worker{"s"*(a.workers > 1)}, {a.images} photos of 500x375, {kb:.0f} KB; packed {(root/"photos.pack").stat().st_size/a.images/1e3:.0f} KB (JPEG 95), {(root/"lossless.pack").stat().st_size/a.images/1e3:.0f} KB (PNG)')
        plain = lambda ds: ImageListDL(ds, bs=a.bs, num_workers=a.workers, create_batch=_collate, device='cpu')
        sides = {'decode alone': plain(DecodeOnly(ds)), 'training view': plain(ds.with_view(RandomWindow())), 'test view': plain(ds.with_view(Centre())),
                 'training, to the device': list_dls(ds, ds, bs=a.bs, preset='code', num_workers=a.workers, device='cpu').train,
                 'packed: decode alone': plain(DecodeOnly(pack)), 'packed: training view': plain(pack.with_view(RandomWindow())), 'packed: test view': plain(pack.with_view(Centre())),
                 'lossless: training view': plain(lossless.with_view(RandomWindow()))}
        turns, end = [], time.perf_counter() + a.seconds
        while len(turns) < 5 or time.perf_counter() < end: turns.append({s: rate(dl) for s, dl in sides.items()})
        ratio = {s: statistics.median(t[s]/t['decode alone'] for t in turns) for s in sides}
        for s in sides: print(f'    {s:26} {statistics.median(t[s] for t in turns)/a.workers:7.0f} images/s a worker   {ratio[s]:6.2f} x decode alone')
        print(f'    packed: training view / packed: decode alone {statistics.median(t["packed: training view"]/t["packed: decode alone"] for t in turns):.2f};   packed / original, training view {statistics.median(t["packed: training view"]/t["training view"] for t in turns):.2f}    ({len(turns)} turns)')
        ok = ratio['training view'] >= LIMIT
        print(f'the training view reaches {LIMIT:.0%} of decoding alone: {"yes" if ok else "NO"}')
        for name, d in (('lists', ds), ('pack', pack)):
            dls = list_dls(d.subset(torch.arange(300_000) % len(d)), ds, bs=a.bs, size=64, num_workers=a.workers, device='cpu')
            dl, used = resampled(dls, 1, n_batches=40).train, []
            for _ in range(a.epochs): used += [memory() for i, _ in enumerate(dl) if i == 20]
            print(f'    {name}: MB in epochs 1..{a.epochs}: {" ".join(f"{u:.0f}" for u in used)}')
            ok &= max(used[2:]) - used[1] < 16
        print(f'memory grows by less than 16 MB after the second epoch: {"yes" if ok else "see above"}')
    return 0 if ok else 1


if __name__ == '__main__': raise SystemExit(main())
