"Data: real CIFAR where it is at hand, torchvision's form of it, and folders that are not as they should be."
import os, time
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from balms.core import class_counts
from balms.augment import CropFlip
from balms.data import (ArrayDL, ArrayDataset, array_dls, data_root, load_data, load_digits, load_folder, long_tail, long_tail_indices)

real = pytest.mark.parametrize('name,n_max,sizes', [('cifar10', 5000, {10: 20431, 50: 13996, 100: 12406, 200: 11203}), ('cifar100', 500, {10: 19573, 50: 12608, 100: 10847, 200: 9502})])


@real
def test_real_cifar(name, n_max, sizes):
    if not (data_root()/name/'train').is_dir(): pytest.skip(f'no {name}/train in $BALMS_DATA')
    train, test = load_data(name)
    assert (len(test), train.c) == (10_000, len(train.vocab)) and class_counts(test).unique().numel() == 1
    before = None
    for imb, n in sorted(sizes.items()):
        idxs = set(long_tail_indices(train.targets, imb).tolist())
        assert len(idxs) == n and (before is None or idxs < before)
        before = idxs


def test_torchvision_cifar(tmp_path, monkeypatch):
    "The counts of the literature from torchvision's arrays, decoded once"
    import torchvision
    calls = []
    class Fake:
        base_folder, classes = 'cifar-10-batches-py', [f'c{i}' for i in range(10)]
        def __init__(self, root, train=True, download=False):
            calls.append(train)
            (Path(root)/self.base_folder).mkdir(exist_ok=True); (Path(root)/self.base_folder/'data_batch_1').write_text('here')
            n = 5000 if train else 1000
            self.targets = [i % 10 for i in range(10*n)]
            self.data = np.zeros((10*n, 2, 2, 3), np.uint8) + np.arange(10*n, dtype=np.int64)[:, None, None, None].astype(np.uint8)
    monkeypatch.setattr(torchvision.datasets, 'CIFAR10', Fake)
    train, test = load_data('cifar10', root=tmp_path)
    first = len(calls)
    train, test = load_data('cifar10', root=tmp_path)
    assert len(calls) == first                                              # the second time from the cache
    assert class_counts(long_tail(train, 200)).tolist() == [5000, 2775, 1540, 854, 474, 263, 146, 81, 45, 25]
    assert train.images.shape == (50_000, 3, 2, 2) and train.images[7, 0, 0, 0] == 7 and train.vocab == Fake.classes


def folder(root, train=(6, 3, 2), test=(2, 2, 2), size=(8, 8), fmt='png', mode='RGB'):
    rng = np.random.default_rng(0)
    for split, ns in (('train', train), ('test', test)):
        for c, n in zip('abc', ns):
            (root/split/c).mkdir(parents=True, exist_ok=True)
            for i in range(n): Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).convert(mode).save(root/split/c/f'{i}.{fmt}')
    return root


@pytest.mark.parametrize('fmt,mode', [('png', 'RGB'), ('png', 'L'), ('png', 'RGBA'), ('png', 'P'), ('jpg', 'RGB'), ('webp', 'RGB'), ('bmp', 'RGB'), ('gif', 'P'), ('tiff', 'RGB')])
def test_image_formats(tmp_path, fmt, mode):
    train, test = load_folder(folder(tmp_path/'d', fmt=fmt, mode=mode))
    assert train.images.shape == (11, 3, 8, 8) and class_counts(train).tolist() == [6, 3, 2]
    want = np.asarray(Image.open(tmp_path/'d/train/a/0'f'.{fmt}').convert('RGB')).transpose(2, 0, 1)
    assert np.array_equal(train.images[0], want)


def test_folder_is_read_again_when_it_changes(tmp_path):
    root = folder(tmp_path/'d')
    a, _ = load_folder(root)
    t = time.time() - 100
    Image.fromarray(np.full((8, 8, 3), 9, np.uint8)).save(root/'train/a/0.png'); os.utime(root/'train/a/0.png', (t, t))
    b, _ = load_folder(root)
    assert not torch.equal(a.images[0], b.images[0]) and torch.equal(a.images[1:], b.images[1:])
    (root/'train/c/1.png').unlink()
    assert len(load_folder(root)[0]) == 10


def test_16_bit_images_are_refused(tmp_path):
    root = folder(tmp_path/'d')
    Image.fromarray((np.arange(64, dtype=np.uint16)*1000).reshape(8, 8)).save(root/'train/b/0.png')
    with pytest.raises(ValueError, match='more than 8 bits'): load_folder(root)


def test_sizes(tmp_path):
    root = folder(tmp_path/'d')
    Image.fromarray(np.zeros((9, 8, 3), np.uint8)).save(root/'train/b/9.png')
    with pytest.raises(ValueError, match='9.png is not as large as'): load_folder(root)
    assert load_folder(root, size=6)[0].images.shape == (12, 3, 6, 6)


@pytest.mark.parametrize('spoil,message', [
    (lambda r: (r/'train/b/x.png').write_bytes(b'not an image'), 'Not a readable image.*x.png'),
    (lambda r: (r/'train/b/0.png').write_bytes((r/'train/b/0.png').read_bytes()[:-60]), 'Not a readable image.*0.png'),
    (lambda r: (r/'train/d').mkdir(), 'No images in .*train/d'),
    (lambda r: [f.unlink() for f in (r/'test/a').iterdir()], 'No images in .*test/a'),
    (lambda r: (r/'test/z').mkdir(), r"classes that train/ lacks: \['z'\]"),
    (lambda r: (r/'test').rename(r/'val'), 'there is no test/'),
])
def test_bad_folder(tmp_path, spoil, message):
    spoil(folder(tmp_path/'d'))
    with pytest.raises((ValueError, FileNotFoundError), match=message): load_folder(tmp_path/'d')


def test_bad_names(tmp_path):
    with pytest.raises(ValueError, match="Unknown data set 'mnist': choose from digits, cifar10, cifar100"): load_data('mnist')
    with pytest.raises(FileNotFoundError, match='No folder'): load_data(str(tmp_path/'none'))
    (tmp_path/'empty').mkdir()
    with pytest.raises(FileNotFoundError, match='there is no train/'): load_data(tmp_path/'empty')
    with pytest.raises(ValueError, match='size is for folders'): load_data('digits', size=9)
    with pytest.raises(ValueError, match='no images to draw from'): next(iter(ArrayDL(torch.zeros(0, 1, 2, 2, dtype=torch.uint8), shuffle=True)))
    with pytest.raises(ValueError, match='uint8'): ArrayDataset(torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match='targets of shape'): ArrayDataset(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), [1])


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
    dl = lambda: array_dls(train, test, bs=50, augment=CropFlip(1), n_batches=20, seed=3, device='cpu').train
    a = dl(); it = iter(a)
    for _ in range(7): next(it)
    state = a.state_dict()
    want = [next(it) for _ in range(3)]
    b = dl(); b.load_state_dict(state)
    for (x, y), (u, v) in zip(want, b): assert torch.equal(x, u) and torch.equal(y, v)


def test_validation_is_the_test_set_in_order():
    train, test = load_digits()
    dls = array_dls(train, test, test_bs=128, device='cpu')
    assert torch.equal(torch.cat([y for _, y in dls.valid]).as_subclass(torch.Tensor), test.targets) and len(dls.valid) == 4
    x = torch.cat([x for x, _ in dls.train])
    assert abs(x.mean()) < .05 and abs(x.std() - 1) < .05                   # normalised
