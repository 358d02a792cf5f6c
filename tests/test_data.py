"Data: files written whole, images of any form, folders, CIFAR from every source the same, and the loader."
import io
import os
import resource
import signal
import struct
import subprocess
import sys
import time
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import balms.datasets
from balms.array_loader import ArrayDL, array_dls
from balms.augment import CropFlip
from balms.core import class_counts
from balms.datasets import (CIFAR, cache_dir, cached, cifar_order, clothes_folder, data_root, load_data, load_digits,
                            load_folder, read_image)
from balms.files import file_crc, folder_lock, write_file
from balms.long_tail import ArrayDataset, long_tail, long_tail_counts, long_tail_indices

both = pytest.mark.parametrize('name', ['cifar10', 'cifar100'])
# checksums of the subsets of the ledger, by imbalance
LEDGER = dict(cifar10={100: 2872795356, 200: 3246379448}, cifar100={10: 3688500548, 100: 3887653649, 200: 169298080})


def crc(ds): return zlib.crc32(ds.targets.numpy(), zlib.crc32(ds.images.contiguous().numpy()))


def noise(*size, seed=0): return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def encoded(im, fmt, **kwargs):
    im.save(f := io.BytesIO(), fmt, **kwargs)
    return f.getvalue()


# --- files

def test_permissions_are_the_ordinary_ones(tmp_path):
    "Of files and caches alike, as the umask says"
    root = folder(tmp_path/'d')
    before = os.umask(0o027)
    try:
        write_file(tmp_path/'a', b'x')
        load_folder(root)
    finally: os.umask(before)
    for f in tmp_path/'a', *cache_dir().glob('*.npz'): assert f.stat().st_mode & 0o777 == 0o640, f


def test_a_process_killed_while_it_writes(tmp_path):
    "The file is as it was"
    write_file(tmp_path/'a', b'before')
    code = '''
import os, signal, sys
from balms.files import write_file
def write(f):
    f.write(bytes(10_000_000))
    f.flush()
    os.kill(os.getpid(), signal.SIGKILL)
write_file(sys.argv[1], write)'''
    p = subprocess.run([sys.executable, '-c', code, str(tmp_path/'a')])
    assert p.returncode == -signal.SIGKILL and (tmp_path/'a').read_bytes() == b'before'


def test_errors_of_the_disk_name_the_file(tmp_path):
    with pytest.raises(IsADirectoryError, match=str(tmp_path)): write_file(tmp_path, b'x')
    with pytest.raises(FileNotFoundError, match='none'): write_file(tmp_path/'none'/'a', b'x')
    assert not list(tmp_path.iterdir())


def test_checksum_is_of_the_content(tmp_path):
    for name in 'ab': write_file(tmp_path/name, noise(3_000_000).tobytes())
    assert file_crc(tmp_path/'a') == file_crc(tmp_path/'b') == zlib.crc32(noise(3_000_000))


def test_a_lock_is_given_back_by_a_killed_process(tmp_path, capsys):
    code = '''
import sys, time
from balms.files import folder_lock
with folder_lock(sys.argv[1], 'nobody'):
    print('has it', flush=True)
    time.sleep(60)'''
    p = subprocess.Popen([sys.executable, '-c', code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline() == 'has it\n'
    start = time.time()
    subprocess.Popen(['sh', '-c', f'sleep .5; kill -9 {p.pid}'])
    with folder_lock(tmp_path, 'the other run'): waited = time.time() - start
    p.wait()
    assert waited > .4 and capsys.readouterr().out.count('the other run') == 1


# --- one image file

@pytest.mark.parametrize('fmt', ['jpeg', 'png', 'webp', 'tiff'])
def test_an_image_is_turned(tmp_path, fmt):
    "All eight orientations"
    im = Image.fromarray(noise(3, 2, 3)).resize((16, 24), 0)
    lossless = dict(jpeg=dict(quality=100, subsampling=0), webp=dict(lossless=True)).get(fmt, {})
    for tag in range(1, 9):
        exif = Image.Exif()
        exif[0x112] = tag
        got = np.asarray(read_image(encoded(im, fmt, exif=exif, **lossless))).astype(int)
        want = np.asarray(im).astype(int)
        if tag >= 5: want = want.transpose(1, 0, 2)
        if tag in (2, 3, 7, 6): want = want[:, ::-1]
        if tag in (3, 4, 7, 8): want = want[::-1]
        assert got.shape == want.shape and abs(got - want).max() <= (3 if fmt == 'jpeg' else 0), tag


@pytest.mark.parametrize('fmt', ['png', 'tiff'])
def test_grey_of_16_bits_is_scaled(fmt):
    values = np.array([[0, 128, 129, 257], [32768, 65406, 65407, 65535]], np.uint16)
    got = np.asarray(read_image(encoded(Image.fromarray(values), fmt)))
    assert np.array_equal(got[..., 0], (values/257).round()) and (got == got[..., :1]).all()


def test_grey_of_16_bits_as_pgm():
    got = np.asarray(read_image(b'P5 2 1 65535\n' + struct.pack('>HH', 257, 65535)))
    assert got.tolist() == [[[1]*3, [255]*3]]


def test_values_without_a_known_scale_are_refused():
    with pytest.raises(ValueError, match='these bytes'):
        read_image(encoded(Image.fromarray(np.full((4, 4), .5, np.float32)), 'tiff'))


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'P'])
def test_transparent_parts_are_white(mode):
    im = Image.new('RGBA', (4, 1), (90, 90, 90, 255))
    im.putpixel((0, 0), (90, 90, 90, 0))
    kwargs = dict(transparency=0) if mode == 'P' else {}
    if mode == 'P': im = Image.fromarray(np.array([[0, 1, 1, 1]], np.uint8)).convert('P')
    got = np.asarray(read_image(encoded(im.convert(mode), 'png', **kwargs)))
    assert got[0, 0].tolist() == [255]*3 and got[0, 1].tolist() == [1 if mode == 'P' else 90]*3


@pytest.mark.parametrize('fmt', ['gif', 'png', 'webp', 'tiff', 'mpo'])
def test_of_several_frames_the_first(fmt):
    first, second = Image.new('RGB', (20, 10), (200, 0, 0)), Image.new('RGB', (20, 10), (0, 0, 200))
    got = np.asarray(read_image(encoded(first, fmt, save_all=True, append_images=[second])))
    assert got.shape == (10, 20, 3) and got[..., 0].min() > 190 and got[..., 2].max() < 10


def test_a_decompression_bomb_is_named(tmp_path):
    "A header of 400 million pixels"
    data = encoded(Image.fromarray(noise(40, 30, 3)), 'bmp')
    (tmp_path/'a.bmp').write_bytes(data[:18] + struct.pack('<ii', 20_000, 20_000) + data[26:])
    start = time.time()
    with pytest.raises(ValueError, match='a.bmp.*400000000'): read_image(tmp_path/'a.bmp')
    assert time.time() - start < 1


# --- folders

def folder(root, train=(6, 3, 2), test=(2, 2, 2), size=(8, 8), fmt='png', mode='RGB'):
    rng = np.random.default_rng(0)
    for split, ns in (('train', train), ('test', test)):
        for c, n in zip('abc', ns):
            (root/split/c).mkdir(parents=True, exist_ok=True)
            for i in range(n):
                im = Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8))
                im.convert(mode).save(root/split/c/f'{i}.{fmt}')
    return root


@pytest.mark.parametrize('fmt,mode', [
    ('png', 'RGB'), ('png', 'L'), ('png', 'RGBA'), ('png', 'P'), ('jpg', 'RGB'), ('webp', 'RGB'), ('bmp', 'RGB'),
    ('gif', 'P'), ('tiff', 'RGB')])
def test_image_formats(tmp_path, fmt, mode):
    train, test = load_folder(folder(tmp_path/'d', fmt=fmt, mode=mode))
    assert train.images.shape == (11, 3, 8, 8) and class_counts(train).tolist() == [6, 3, 2] and len(test) == 6
    want = np.asarray(Image.open(tmp_path/f'd/train/a/0.{fmt}').convert('RGB')).transpose(2, 0, 1)
    assert np.array_equal(train.images[0], want)


def test_folder_is_read_again_when_it_changes(tmp_path):
    root = folder(tmp_path/'d')
    a, _ = load_folder(root)
    t = time.time() - 100
    Image.fromarray(np.full((8, 8, 3), 9, np.uint8)).save(root/'train/a/0.png')
    os.utime(root/'train/a/0.png', (t, t))
    b, _ = load_folder(root)
    assert not torch.equal(a.images[0], b.images[0]) and torch.equal(a.images[1:], b.images[1:])
    (root/'train/c/1.png').unlink()
    assert len(load_folder(root)[0]) == 10


def test_sizes(tmp_path):
    root = folder(tmp_path/'d')
    Image.fromarray(np.zeros((9, 8, 3), np.uint8)).save(root/'train/b/9.png')
    with pytest.raises(ValueError, match='9.png'): load_folder(root)
    assert load_folder(root, size=6)[0].images.shape == (12, 3, 6, 6)


def test_all_files_that_cannot_be_read_are_named(tmp_path):
    root = folder(tmp_path/'d')
    bad = ['train/a/0.png', 'train/a/5.png', 'train/c/1.png', 'test/b/0.png', 'test/c/1.png']
    for f in bad: (root/f).write_bytes((root/f).read_bytes()[:-60])
    with pytest.raises(ValueError) as e: load_folder(root)
    for f in bad: assert str(e.value).count(f) == 1
    for i in range(100): (root/f'train/a/bad{i}.png').write_bytes(b'')
    with pytest.raises(ValueError) as e: load_folder(root)
    assert str(e.value).count('\n') < 25 and '85 more' in str(e.value)


@pytest.mark.parametrize('spoil,named', [
    (lambda r: (r/'train/b/x.png').write_bytes(b'not an image'), 'x.png'),
    (lambda r: (r/'train/b/y.png').symlink_to(r/'none'), 'y.png'),
    (lambda r: [(r/'train'/c).mkdir() for c in 'de'], 'train/d.*train/e'),
    (lambda r: [f.unlink() for f in (r/'test/a').iterdir()], 'test/a'),
    (lambda r: (r/'test/z').mkdir(), r"\['z'\]"),
    (lambda r: (r/'test').rename(r/'val'), 'test'),
])
def test_bad_folder(tmp_path, spoil, named):
    spoil(folder(tmp_path/'d'))
    with pytest.raises((ValueError, FileNotFoundError), match=named): load_folder(tmp_path/'d')


def test_what_is_in_a_class_folder(tmp_path):
    "Folders and links to them are left out with a warning; links to files are images; hidden files are left out"
    root = folder(tmp_path/'d')
    (root/'train/a/sub').mkdir()
    (root/'test/b/link').symlink_to(root/'train/a')
    (root/'train/a/.hidden').mkdir()
    with pytest.warns(UserWarning, match='2 folders.*test/b/link'): train, _ = load_folder(root)
    assert len(train) == 11
    (root/'train/a/sub').rmdir()
    (root/'test/b/link').unlink()
    (root/'train/a/9.png').symlink_to(root/'train/b/0.png')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert len(load_folder(root)[0]) == 12


def test_clothes(tmp_path, monkeypatch):
    "The photos of the package, unpacked once, whole or not at all"
    def full(*args): raise OSError(28, 'No space left on device')
    folder = clothes_folder()
    monkeypatch.setattr(zipfile.ZipFile, 'extractall', full)
    assert clothes_folder() == folder
    assert len([*folder.glob('train/*/*')]) == 1225 and len([*folder.glob('test/*/*')]) == 170
    assert 'CC0' in (folder/'README.md').read_text()
    train, test = load_data('clothes', size=16)
    assert class_counts(train).max() == 250 and class_counts(test).tolist() == [10]*17
    monkeypatch.setenv('BALMS_CACHE', str(tmp_path/'other'))
    with pytest.raises(OSError, match='No space left'): clothes_folder()
    assert not [*(tmp_path/'other').glob('*/*')]


def test_a_cache_that_cannot_be_written(tmp_path):
    "The images are there all the same, with one warning that names the file; nothing half written is left"
    root = folder(tmp_path/'d')
    want = load_folder(root, 8)[0].images
    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    code = '''
import sys
from balms.datasets import load_folder
for _ in range(2): print(len(load_folder(sys.argv[1], 8)[0]))'''
    for cache, preexec in ((tmp_path/'full', full), (root/'train/a/0.png', None), (Path('/proc/none'), None)):
        env = {**os.environ, 'BALMS_CACHE': str(cache), 'PYTHONWARNINGS': 'always'}
        p = subprocess.run([sys.executable, '-c', code, str(root)], env=env, preexec_fn=preexec, capture_output=True,
                           text=True)
        assert p.stdout == '11\n11\n' and p.stderr.count('cache could not be written') == 1, p.stderr
        assert str(cache) in p.stderr
    assert not list((tmp_path/'full').iterdir())
    assert torch.equal(load_folder(root, 8)[0].images, want)


def test_a_damaged_cache_is_made_again():
    "A byte changed anywhere, or the file cut short anywhere: the same arrays"
    def make(): return dict(x=noise(500)), dict(names=['a', 'b'])
    cached('t', 1, make)
    file = cache_dir()/'t.npz'
    data = file.read_bytes()
    for i in range(0, len(data), 7):
        changed = bytearray(data)
        changed[i] ^= 1 << i % 8
        for bad in bytes(changed), data[:i]:
            file.write_bytes(bad)
            arrays, about = cached('t', 1, make)
            assert np.array_equal(arrays['x'], noise(500)) and about == dict(names=['a', 'b']), i


# --- CIFAR

def listed_images(name):
    "Images of 4 bytes that are their own checksums, for the list of the package, and their labels"
    with np.load(Path(balms.datasets.__file__).with_name('cifar_order.npz')) as z: listed = z[name]
    labels = np.repeat(np.arange(CIFAR[name][1]), long_tail_counts(*CIFAR[name], 10))
    return listed, labels


@both
def test_subsets_do_not_depend_on_what_else_is_there(name, monkeypatch):
    "The subset at imbalance 10, the whole data set, shuffled, and the subset at 100 give the same subsets, to the bit"
    def image_crcs(images): return images.numpy().reshape(len(images), 4).view(np.uint32)[:, 0]
    monkeypatch.setattr(balms.datasets, 'image_crcs', image_crcs)
    listed, labels = listed_images(name)
    per_class, k = CIFAR[name]
    def dataset(crcs, labels, seed):
        order = np.random.default_rng(seed).permutation(len(crcs))
        images = crcs[order].view(np.uint8).reshape(-1, 1, 2, 2)
        return cifar_order(ArrayDataset(images, labels[order], [str(i) for i in range(k)]), name)
    thin = dataset(listed, labels, 1)
    rest = np.repeat(np.arange(k), per_class - np.bincount(labels))
    others = np.random.default_rng(3).integers(2**32, size=len(rest)).astype(np.uint32)
    full = dataset(np.concatenate([others, listed]), np.concatenate([rest, labels]), 2)
    pack = long_tail(full, 100)
    assert len(full) == per_class*k and class_counts(full).unique().tolist() == [per_class]
    for imbalance in 10, 20, 50, 100, 200:
        want = long_tail(thin, imbalance)
        assert class_counts(want).tolist() == long_tail_counts(per_class, k, imbalance)
        assert crc(long_tail(full, imbalance)) == crc(want)
        if imbalance >= 100: assert crc(long_tail(pack, imbalance)) == crc(want)
    larger = long_tail(full, 5)                                             # beyond the list: what is in it comes first
    assert class_counts(larger).tolist() == long_tail_counts(per_class, k, 5)
    assert set(listed.tolist()) <= set(image_crcs(larger.images).tolist())
    assert crc(long_tail(full, 100, split_seed=1)) != crc(long_tail(thin, 100, split_seed=1))


def real(name):
    "The folder of a real CIFAR subset at imbalance 10; skips where there is none"
    if not (data_root()/name/'train').is_dir(): pytest.skip(f'no {name}/train in $BALMS_DATA')
    return data_root()/name


@both
def test_real_cifar(name):
    "Counts of the literature, nested subsets, the checksums of the ledger with the list and without it"
    real(name)
    train, test = load_data(name)
    plain, _ = load_folder(data_root()/name)
    assert (len(test), train.c) == (10_000, CIFAR[name][1]) and class_counts(test).unique().numel() == 1
    before = None
    for imbalance in 10, 20, 50, 100, 200:
        idxs = set(long_tail_indices(train.targets, imbalance, order=train.order).tolist())
        assert len(idxs) == sum(long_tail_counts(*CIFAR[name], imbalance)) and (before is None or idxs < before)
        before = idxs
    for imbalance, want in LEDGER[name].items():
        for ds in train, plain: assert crc(long_tail(ds, imbalance)) == want


@both
def test_real_cifar_among_others(name):
    "All of the real images in a whole data set, shuffled: the same subsets"
    real(name)
    train, _ = load_folder(data_root()/name)
    per_class, k = CIFAR[name]
    labels = np.repeat(np.arange(k), per_class - np.bincount(train.targets))
    images = torch.cat([train.images, torch.from_numpy(noise(len(labels), 3, 32, 32))])
    order = np.random.default_rng(0).permutation(len(images))
    full = ArrayDataset(images[order], np.concatenate([train.targets, labels])[order], train.vocab)
    full = cifar_order(full, name)
    for imbalance, want in LEDGER[name].items(): assert crc(long_tail(full, imbalance)) == want


@both
def test_real_pack(name):
    pack = data_root()/f'{name}_lt100.npz'
    if not pack.is_file(): pytest.skip(f'no {pack.name} in $BALMS_DATA')
    train, test = load_data(name, root=pack)
    assert class_counts(test).tolist() == [10_000//train.c]*train.c and 'pack' in train.source
    for imbalance in 100, 200: assert crc(long_tail(train, imbalance)) == LEDGER[name][imbalance]
    other = dict(cifar10='cifar100', cifar100='cifar10')[name]
    with pytest.raises(ValueError, match=pack.name): load_data(other, root=pack)


def test_a_pack(tmp_path):
    "Three images of the test set and 40 to train on, which are two rows of the mosaic"
    def mosaic(images):
        padded = np.zeros((-(-len(images)//32)*32, 3, 32, 32), np.uint8)
        padded[:len(images)] = images
        rows = padded.reshape(-1, 32, 3, 32, 32).transpose(0, 3, 1, 4, 2)
        return np.frombuffer(encoded(Image.fromarray(rows.reshape(-1, 1024, 3)), 'webp', lossless=True), np.uint8)
    train, test = noise(40, 3, 32, 32), noise(3, 3, 32, 32, seed=1)
    arrays = dict(A00000=mosaic(train[:32]), A00032=mosaic(train[32:]), B00000=mosaic(test), i=np.arange(40) + 2,
                  y=np.arange(50) % 10, yb=np.array([3, 1, 2]), vocab=np.array([f'c{i}' for i in range(10)]))
    np.savez(tmp_path/'a.npz', **arrays)
    got, got_test = load_data('cifar10', root=tmp_path/'a.npz')
    assert np.array_equal(got.images, train) and got.targets.tolist() == [(i + 2) % 10 for i in range(40)]
    assert np.array_equal(got_test.images, test) and got_test.targets.tolist() == [3, 1, 2] and got.vocab[9] == 'c9'
    np.savez(tmp_path/'b.npz', x=train)
    with pytest.raises(ValueError, match='b.npz'): load_data('cifar10', root=tmp_path/'b.npz')


def test_torchvision_cifar(tmp_path, monkeypatch):
    "The counts of the literature from torchvision's arrays, decoded once"
    import torchvision
    calls = []
    class Fake:
        base_folder, classes = 'cifar-10-batches-py', [f'c{i}' for i in range(10)]
        def __init__(self, root, train=True, download=False):
            calls.append(train)
            (Path(root)/self.base_folder).mkdir(exist_ok=True)
            (Path(root)/self.base_folder/'data_batch_1').write_text('here')
            n = 50_000 if train else 10_000
            self.targets = [i % 10 for i in range(n)]
            self.data = np.broadcast_to((np.arange(n) % 256).astype(np.uint8)[:, None, None, None], (n, 2, 2, 3))
    monkeypatch.setattr(torchvision.datasets, 'CIFAR10', Fake)
    train, test = load_data('cifar10', root=tmp_path)
    before = len(calls)
    train, test = load_data('cifar10', root=tmp_path)
    assert len(calls) == before and len(test) == 10_000                     # the second time from the cache
    assert class_counts(long_tail(train, 200)).tolist() == long_tail_counts(5000, 10, 200)
    assert train.images.shape == (50_000, 3, 2, 2) and train.images[7, 0, 0, 0] == 7 and train.vocab == Fake.classes
    assert train.source == '50,000 images of torchvision' == long_tail(train, 200).source


def test_bad_names(tmp_path):
    with pytest.raises(ValueError, match='mnist.*digits, cifar10, cifar100'): load_data('mnist')
    with pytest.raises(FileNotFoundError, match='none'): load_data(str(tmp_path/'none'))
    (tmp_path/'empty').mkdir()
    with pytest.raises(FileNotFoundError, match='empty/train'): load_data(tmp_path/'empty')
    with pytest.raises(ValueError, match='size'): load_data('digits', size=9)
    with pytest.raises(ValueError, match='uint8'): ArrayDataset(torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match='targets'): ArrayDataset(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), [1])


# --- the loader

def test_no_images_to_draw_from():
    with pytest.raises(ValueError, match='no images'):
        next(iter(ArrayDL(torch.zeros(0, 1, 2, 2, dtype=torch.uint8), shuffle=True)))


def test_loader_draws_when_asked():
    "Indices are drawn at the moment of the batch: a sampler that changes is seen at once"
    class Fixed:
        now = 0
        def draw(self, bs): return torch.full((bs,), self.now)
    ds, s = ArrayDataset(torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1), torch.arange(5)), Fixed()
    it = iter(ArrayDL(ds, bs=3, shuffle=True, sampler=s, n_batches=5))
    for i in range(5):
        s.now = i
        assert next(it)[1].tolist() == [i]*3


def test_loader_state_is_the_whole_state():
    train, test = load_digits()
    def loader(): return array_dls(train, test, bs=50, augment=CropFlip(1), n_batches=20, seed=3, device='cpu').train
    a = loader()
    it = iter(a)
    for _ in range(7): next(it)
    state = a.state_dict()
    want = [next(it) for _ in range(3)]
    b = loader()
    b.load_state_dict(state)
    for (x, y), (u, v) in zip(want, b): assert torch.equal(x, u) and torch.equal(y, v)


def test_validation_is_the_test_set_in_order():
    train, test = load_digits()
    dls = array_dls(train, test, test_bs=128, device='cpu')
    labels = torch.cat([y for _, y in dls.valid]).as_subclass(torch.Tensor)
    assert torch.equal(labels, test.targets) and len(dls.valid) == 4
    x = torch.cat([x for x, _ in dls.train])
    assert abs(x.mean()) < .05 and abs(x.std() - 1) < .05                   # normalised
