"Data: real CIFAR where it is at hand, torchvision's form of it, and folders that are not as they should be."
import io, os, resource, signal, struct, subprocess, sys, time, warnings, zlib
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image, features
from test_fuzz import measured
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


def pixels(fmt, w, h):
    "A small file whose header says `w` x `h` pixels"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(f := io.BytesIO(), fmt)
    data = f.getvalue()
    at, how = dict(jpeg=(data.find(b'\xff\xc0') + 5, '>HH'), gif=(6, '<HH'), bmp=(18, '<ii'), png=(16, '>II'))[fmt]
    data = data[:at] + struct.pack(how, *((h, w) if fmt == 'jpeg' else (w, h))) + data[at + struct.calcsize(how):]
    return data if fmt != 'png' else data[:29] + struct.pack('>I', zlib.crc32(data[12:29])) + data[33:]


def test_a_few_bytes_do_not_ask_for_gigabytes(tmp_path):
    "Headers of 400 million pixels, WebP of 268 million in 34 bytes: refused by name by both loaders at less than 48 MiB and in less than 2 seconds. A PNG file below the limit takes no more than its pixels in two forms"
    for fmt in ('jpeg', 'gif', 'bmp', 'png'): (tmp_path/f'a.{fmt}').write_bytes(pixels(fmt, 20_000, 20_000))
    (tmp_path/'a.webp').write_bytes(bytes.fromhex('524946461a000000574542505650384c0e0000002ffebfff0f071011fd0f4444ff03'))
    code = '''
import time
from pathlib import Path
from balms.data import _decode
t = time.time()
for f in sorted(Path(sys.argv[1]).glob('a.*')):
    for load in (lambda: _decode(f, None), lambda: _decode(f, 8), lambda: il.ImageListDataset([f.name], f.parent).image(0)):
        try: load(); print('an image', f)
        except ValueError as e: print('pixels' in str(e) and str(f) in str(e) or e)
print(time.time() - t)'''
    mib, said = measured(code, tmp_path)
    *said, seconds = said.splitlines()
    assert said == ['True']*15 and mib < 48 and float(seconds) < 2, (mib, said, seconds)
    chunk = lambda t, d: struct.pack('>I', len(d)) + t + d + struct.pack('>I', zlib.crc32(t + d))
    (tmp_path/'big.png').write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', 13_000, 13_000, 1, 0, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(bytes(1626*13_000))) + chunk(b'IEND', b''))
    for how in ('il.decode_rgb(open(sys.argv[1], "rb").read())', 'from balms.data import _decode; _decode(sys.argv[1], None)'):
        mib, _ = measured(how, tmp_path/'big.png')
        assert mib < 13_000**2*4/2**20 + 100, mib                                # 1 byte a pixel, and 3


def odd_images(d):
    "Files with more than 8 bits a channel, and with more than one image"
    im, other = (Image.fromarray(np.random.default_rng(i).integers(0, 256, (24, 16, 3), dtype=np.uint8)) for i in range(2))
    def save(im, fmt, **kw): im.save(f := io.BytesIO(), fmt, **kw); return f.getvalue()
    chunk = lambda t, d: struct.pack('>I', len(d)) + t + d + struct.pack('>I', zlib.crc32(t + d))
    tags = [(256, 3, 1, 4), (257, 3, 1, 4), (258, 3, 3, 122), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 128), (277, 3, 1, 3), (278, 3, 1, 4), (279, 4, 1, 96)]
    deep = {'rgb.png': b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', 8, 8, 16, 2, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(bytes(49*8))) + chunk(b'IEND', b''),
            'grey.png': save(Image.fromarray(np.zeros((4, 4), np.uint16)), 'png'), 'rgb.ppm': b'P6 4 4 65535\n' + bytes(96), 'ten.ppm': b'P6 4 4 1023\n' + bytes(96), 'plain.ppm': b'P3 1 1 999 1 2 3\n', 'grey.pgm': b'P5 4 4 65535\n' + bytes(32),
            'rgb.tif': b'II*\0' + struct.pack('<IH', 8, 9) + b''.join(struct.pack('<HHII', *t) for t in tags) + struct.pack('<I', 0) + struct.pack('<3H', 16, 16, 16) + bytes(96),
            'float.tif': save(Image.fromarray(np.zeros((4, 4), np.float32)), 'tiff'), 'a.sgi': save(im, 'sgi', bpc=2)}
    if features.check('jpg_2000'):
        j = bytearray(save(im, 'jpeg2000')); j[j.index(b'\xff\x4f\xff\x51') + 42] = 15; deep['a.jp2'] = bytes(j)
    if features.check('avif'):
        j = bytearray(save(im, 'avif')); j[j.index(b'av1C') + 6] |= 64; i = j.index(b'pixi') + 9; j[i:i + 3] = b'\x0a'*3; deep['a.avif'] = bytes(j)
    many = {f'a.{fmt}': save(im, fmt, save_all=True, append_images=[other]) for fmt in ('gif', 'png', 'webp', 'tiff')}
    for files, why in ((deep, 'more than 8 bits'), (many, 'frames, where one image should be')):
        for name, data in files.items():
            (d/name).write_bytes(data); yield d/name, why


def test_what_would_be_cut_off_is_refused_by_both_loaders(tmp_path):
    "Bits of a channel and frames, in all formats that have them; a phone's JPEG with a second picture is one image"
    from balms.data import _decode
    from balms.image_lists import ImageListDataset
    for path, why in odd_images(tmp_path):
        for load in (lambda: _decode(path, None), lambda: _decode(path, 8), lambda: ImageListDataset([path.name], tmp_path).image(0)):
            with pytest.raises(ValueError, match=f'{path}.*{why}'): load()
    im = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 16, 3), dtype=np.uint8))
    im.save(f := tmp_path/'phone.jpg', 'MPO', save_all=True, append_images=[im.rotate(180)])
    assert _decode(f, None).shape == ImageListDataset(['phone.jpg'], tmp_path).image(0).shape == (3, 24, 16)
    im.convert('RGB').save(f := tmp_path/'a.bmp'); (tmp_path/'b.ppm').write_bytes(b'P6 4 4 31\n' + bytes([31]*48))
    assert _decode(f, None).shape == (3, 24, 16) and (_decode(tmp_path/'b.ppm', None) == 255).all()


@pytest.mark.parametrize('fmt', ['jpeg', 'png', 'webp', 'tiff'])
def test_both_loaders_turn_an_image(tmp_path, fmt):
    "All eight orientations, the same pixels"
    from balms.data import _decode
    from balms.image_lists import ImageListDataset
    im = Image.fromarray(np.random.default_rng(0).integers(0, 256, (3, 2, 3), dtype=np.uint8)).resize((16, 24), 0)
    for tag in range(1, 9):
        exif = Image.Exif(); exif[0x112] = tag
        im.save(f := tmp_path/f'{tag}.{fmt}', fmt, exif=exif, **dict(jpeg=dict(quality=100, subsampling=0), webp=dict(lossless=True)).get(fmt, {}))
        a, b = torch.tensor(_decode(f, None)), ImageListDataset([f.name], tmp_path).image(0)
        assert a.shape == b.shape == ((3, 24, 16) if tag < 5 else (3, 16, 24)) and (a.float() - b.float()).abs().max() <= (3 if fmt == 'jpeg' else 0)


def test_what_is_in_a_class_folder(tmp_path):
    "Folders and links to folders are left out with a warning; a pipe, and a link to one, is refused and not waited for; links to files are images"
    root = folder(tmp_path/'d')
    (root/'train/a/sub').mkdir(); (root/'test/b/link').symlink_to(root/'train/a'); (root/'train/a/.hidden').mkdir()
    with pytest.warns(UserWarning, match=r'in the class folders alone: 2 folders inside of these left out, among them .*test/b/link'): train, _ = load_folder(root)
    assert len(train) == 11
    (root/'train/a/sub').rmdir(); (root/'test/b/link').unlink(); (root/'train/a/9.png').symlink_to(root/'train/b/0.png')
    with warnings.catch_warnings():
        warnings.simplefilter('error'); assert len(load_folder(root)[0]) == 12
    os.mkfifo(root/'train/c/pipe'); (tmp_path/'link').symlink_to(root/'train/c/pipe')
    with pytest.raises(ValueError, match='train/c/pipe.*a pipe or a device, not a file'): load_folder(root)
    (root/'train/c/pipe').unlink(); os.mkfifo(tmp_path/'pipe'); (root/'train/c/8.png').symlink_to(tmp_path/'pipe')
    with pytest.raises(ValueError, match='train/c/8.png.*a pipe or a device, not a file'): load_folder(root)


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    "The images are there all the same, with a warning that names the file; nothing half written is left"
    root = folder(tmp_path/'d')
    want = load_folder(root, 8)[0].images
    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500)); signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    code = 'import sys; from balms.data import load_folder; print(len(load_folder(sys.argv[1], 8)[0]))'
    for cache, preexec in ((tmp_path/'full', full), (root/'train/a/0.png', None), (Path('/proc/none'), None)):
        p = subprocess.run([sys.executable, '-c', code, str(root)], env={**os.environ, 'BALMS_CACHE': str(cache), 'PYTHONWARNINGS': 'always'}, preexec_fn=preexec, capture_output=True, text=True)
        assert p.stdout == '11\n' and 'The cache could not be written' in p.stderr and str(cache) in p.stderr, p.stderr
    assert not list((tmp_path/'full').iterdir())
    from balms.data import write_file
    with pytest.raises(IsADirectoryError, match=str(root)): write_file(root, b'x')
    assert torch.equal(load_folder(root, 8)[0].images, want)


@pytest.mark.parametrize('change', [dict(train=None), dict(test=None), dict(more=np.zeros(3, np.uint8)), dict(train=lambda a: a.astype(np.float32)), dict(train=lambda a: a.astype(np.int8)), dict(train=lambda a: a[:-1]), dict(test=lambda a: a[:, :, :4]), dict(train=lambda a: a[0]), dict(train=lambda a: a[:, :1])])
def test_a_cache_of_other_arrays_is_made_again(tmp_path, change):
    "Its fingerprint and checksums are right"
    from balms.data import cache_dir
    root = folder(tmp_path/'d')
    want = load_folder(root, 8)
    (f,) = cache_dir().glob('*.npz')
    with np.load(f) as z: arrays = {k: z[k] for k in z.files}
    arrays.update({k: v(arrays[k]) if callable(v) else v for k, v in change.items()})
    np.savez(f, **{k: v for k, v in arrays.items() if v is not None})
    for a, b in zip(want, load_folder(root, 8)): assert torch.equal(a.images, b.images) and a.images.dtype == b.images.dtype
    with np.load(f) as z: assert {'train', 'test', 'fingerprint', 'about'} == set(z.files) and len(z['train']) == 11
