"""Files that are damaged at random, and what reads them. `KINDS` says for each kind of file how a good one is made and
how it is read. Reading a damaged one gives the same as before, where a checksum protects the file, or something of the
same kind, or a `ValueError` or `OSError` that names the file: never a crash, and never silently something else.

    python tests/fuzz.py weights 1000 0        # kind, number of damaged files, first seed; without arguments all kinds
"""
import gzip, json, os, random, sys, tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Callable
import numpy as np, torch
from PIL import Image


# ---- damage

def cut_off(data, rng): return data[:rng.randrange(len(data))]


def flip_bits(data, rng):
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)): data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def zero_block(data, rng):
    start = rng.randrange(len(data))
    stop = min(len(data), start + rng.choice((8, 64, 512, 4096)))
    return data[:start] + bytes(stop - start) + data[stop:]


DAMAGE = (cut_off, flip_bits, zero_block)


# ---- kinds of files

@dataclass
class Kind:
    make: Callable # Folder -> path of a good file
    read: Callable # Path -> what it says
    protected: bool = True # A checksum protects all that is read: a damaged file never says anything else


def equal(a, b):
    if isinstance(a, torch.Tensor): return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray): return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict): return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def network():
    from balms.models import small_cnn
    torch.manual_seed(0)
    return small_cnn(10)


def make_weights(folder, **kwargs):
    torch.save(network().state_dict(), folder/'weights.pth', **kwargs)
    return folder/'weights.pth'


def make_model(folder):
    from balms.weights import save_model
    save_model(folder/'model.safetensors', network(), network='small_cnn', classes=list('abcdefghij'), in_channels=1)
    return folder/'model.safetensors'


def read_weights(path):
    from balms.weights import load_weights
    net = network()
    for p in net.parameters(): p.data.zero_()
    load_weights(net, path, keep_classifier=True)
    return net.state_dict()


def read_model(path):
    from balms.weights import load_model
    model, metadata = load_model(path)
    return model.state_dict(), metadata


def make_checkpoint(folder):
    from balms.checkpoint import save_checkpoint
    net = network()
    opt = torch.optim.SGD(net.parameters(), .1, momentum=.9)
    net(torch.randn(2, 1, 8, 8)).sum().backward()
    opt.step()
    state = dict(run_id='{}', train_crc=1, step=7, seconds=1.5, model=net.state_dict(), opt=opt.state_dict(),
                 data=dict(position=3, gen=torch.get_rng_state()))
    save_checkpoint(folder, state)
    return folder/'checkpoint.pt'


def read_checkpoint(path):
    from balms.checkpoint import read_checkpoint
    return read_checkpoint(path.parent, '{}')


def make_list(folder, name='a_train.txt'):
    lines = ''.join(f'train/c{j}/{i}.jpg {j}\n' for j in range(8) for i in range(12)).encode()
    (folder/name).write_bytes(gzip.compress(lines) if name.endswith('gz') else lines)
    return folder/name


def read_list(path):
    from balms.lists import read_list
    images = read_list(path)
    for file in images.files:
        inside = os.path.normpath(os.path.join('/root/images', file)).startswith('/root/images')
        assert inside, f'{file} leads out of the folder of images'
    return list(images.files), images.targets


def make_row(folder):
    from balms.rows import write_row
    row = dict(key='k', recipe=dict(data='digits', imbalance=50, method='bs', seed=0), changed={}, train_crc=1,
               seconds=1., overall=90., many=99., medium=90., few=None, ece=5., nll=.5, per_class=[.1]*10,
               environments=[dict(balms='1', device='cpu')])
    write_row(folder, row)
    return folder/'row.json'


def read_row(path):
    from balms.rows import read_row
    return read_row(path.parent)


def make_ledger(folder):
    row = json.loads(make_row(folder).read_text())
    rows = [dict(row, key=f'k{i}') for i in range(6)]
    (folder/'ledger.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    return folder/'ledger.jsonl'


def read_ledger(path):
    from balms.rows import read_rows
    return read_rows(path)


ARRAYS = dict(train=np.arange(1200, dtype=np.uint8).reshape(100, 3, 2, 2), test=np.ones((10, 3, 2, 2), np.uint8))


def cached_arrays(path):
    "A cache that cannot be read is made again"
    from balms.datasets import cached
    os.environ['BALMS_CACHE'] = str(path.parent)
    return cached('arrays', [1, 'a'], lambda: (ARRAYS, dict(vocab=['a', 'b'])))


def make_cache(folder):
    cached_arrays(folder/'arrays.npz')
    return folder/'arrays.npz'


def image_kind(suffix):
    def make(folder):
        pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder/f'image.{suffix}')
        return folder/f'image.{suffix}'
    def read(path):
        from balms.datasets import read_image
        image = read_image(path)
        assert image.mode == 'RGB'
        return image.size
    return Kind(make, read, protected=False)


def make_pack(folder):
    from balms.lists import sample_tree
    from balms.list_loader import load_lists
    from balms.packs import pack_images
    train, _ = load_lists(sample_tree(folder/'tree', n_max=6, imbalance=3))
    pack_images(train, folder/'train.zip', short=12, num_workers=0)
    return folder/'train.zip'


def read_pack(path):
    from balms.packs import PackedDataset
    ds = PackedDataset(path)
    return ds.targets, [ds.image(i) for i in range(len(ds))]


def make_annotations(folder):
    from balms.instance_data import digit_scenes
    return digit_scenes(folder, n=4, n_valid=2, size=24, imbalance=3)/'digits_train.json'


def read_annotations(path):
    from balms.annotations import read_annotations
    a = read_annotations(path, path.parent/'train')
    assert (a.instance_counts >= 0).all()
    for row in range(int(a.instance_counts.sum())): a.mask(row)
    return len(a)


KINDS = dict(
    weights=Kind(make_weights, read_weights), model=Kind(make_model, read_model),
    old_weights=Kind(lambda d: make_weights(d, _use_new_zipfile_serialization=False), read_weights, protected=False),
    checkpoint=Kind(make_checkpoint, read_checkpoint), cache=Kind(make_cache, cached_arrays),
    list=Kind(make_list, read_list, protected=False),
    list_gz=Kind(lambda d: make_list(d, 'a_train.txt.gz'), read_list),
    row=Kind(make_row, read_row, protected=False), ledger=Kind(make_ledger, read_ledger, protected=False),
    pack=Kind(make_pack, read_pack), annotations=Kind(make_annotations, read_annotations, protected=False),
    **{f'image_{suffix}': image_kind(suffix) for suffix in ('png', 'jpeg', 'gif', 'bmp', 'webp', 'tiff')})


def fuzz(name, n, seed, folder):
    "Damage a file of this kind `n` times: how many were refused, and what was wrong, as [(seed, what)]"
    kind = KINDS[name]
    path = kind.make(Path(folder))
    data, refused, wrong = path.read_bytes(), 0, []
    good = kind.read(path)
    for s in range(seed, seed + n):
        rng = random.Random(s)
        path.write_bytes(rng.choice(DAMAGE)(data, rng))
        try: got = kind.read(path)
        except (ValueError, OSError) as e:
            refused += 1
            if path.name not in str(e): wrong.append((s, f'does not name the file: {type(e).__name__}: {e}'[:300]))
        except BaseException as e:
            if isinstance(e, KeyboardInterrupt): raise
            wrong.append((s, f'{type(e).__name__}: {e}'[:300]))
        else:
            if kind.protected and not equal(got, good): wrong.append((s, 'silently something else'))
            elif type(got) is not type(good): wrong.append((s, f'a {type(got).__name__}'))
    return refused, wrong


if __name__ == '__main__':
    names, n, seed = sys.argv[1:2] or list(KINDS), int((sys.argv[2:3] or [300])[0]), int((sys.argv[3:4] or [0])[0])
    for name in names:
        with tempfile.TemporaryDirectory() as folder: refused, wrong = fuzz(name, n, seed, folder)
        print(f'{name:12} {n} damaged, {refused} refused, {len(wrong)} wrong', *wrong[:5], sep='\n    ')
