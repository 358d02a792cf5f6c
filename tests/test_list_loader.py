"Loading images from lists: bad files, workers, samplers and the Meta Sampler, a restart, memory."
import os, subprocess, sys
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from fastai.callback.core import Callback
from fastai.learner import Learner
from balms.core import BalancedSoftmax
from balms.datasets import read_image
from balms.list_loader import ImageListDataset, list_dls, load_lists
from balms.lists import read_list, sample_tree
from balms.meta import MetaSampler
from balms.models import get_model
from balms.packs import pack_images
from balms.sampled_loader import SampledDL, resampled
from balms.samplers import ClassSampler

ROLLUP = Path('/proc/self/smaps_rollup')
from_proc = pytest.mark.skipif(not (ROLLUP.exists() and 'Pss_Anon' in ROLLUP.read_text()),
                                reason='memory is read from /proc')


@pytest.fixture(scope='module')
def tree(tmp_path_factory): return sample_tree(tmp_path_factory.mktemp('lists')/'digits')


@pytest.mark.parametrize('workers', [0, 2])
def test_a_bad_image_stops_training_by_name(tree, tmp_path, workers):
    "Missing or truncated: the error has list, line and file, also from a worker"
    good = tree/read_list(tree/'digits_train.txt').files[0]
    (tmp_path/'cut.jpg').write_bytes(good.read_bytes()[:-99])
    for file, why in (('none.jpg', 'No such file'), ('cut.jpg', 'truncated')):
        for split in ('train', 'test'): (tmp_path/f'l_{split}.txt').write_text(f'{file} 0\n')
        train, test = load_lists(tmp_path)
        dls = list_dls(train, test, bs=1, size=32, num_workers=workers, device='cpu')
        with pytest.raises((OSError, ValueError), match='l_test.txt:1: ') as e: list(dls.valid)
        assert file in str(e.value) and why in str(e.value)


@pytest.mark.parametrize('mode', ['RGB', 'L', 'CMYK'])
@pytest.mark.parametrize('how', [dict(quality=95), dict(quality=60, progressive=True), dict(quality=90, subsampling=0)])
def test_jpeg_is_what_pillow_reads(tmp_path, mode, how):
    "Bit for bit, although another decoder reads it"
    im = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)).resize((300, 200))
    im.convert(mode).save(tmp_path/'x.jpg', **how)
    x = ImageListDataset(['x.jpg'], tmp_path).image(0)
    assert np.array_equal(x.permute(1, 2, 0), np.asarray(read_image(tmp_path/'x.jpg')))


def test_what_a_view_raises_is_named(tree):
    def view(x): raise KeyError('no such thing')
    ds = load_lists(tree)[0].with_view(view)
    with pytest.raises(ValueError, match=f'digits_train.txt:3: {tree}/{ds.files[2]}: .*no such thing'): ds[2]


def test_samplers_and_meta(tree):
    "Counts, resampling and the Meta Sampler work on the loaders, in workers too; no image is opened for them"
    train, test = load_lists(tree)
    dls = list_dls(train, test, bs=40, size=32, flip=0, num_workers=2, device='cpu')
    balanced = resampled(dls, power=0, n_batches=10)
    assert isinstance(balanced.train, SampledDL) and balanced.train.staleness > 0
    y = torch.cat([y.as_subclass(torch.Tensor) for _, y in balanced.train])
    n = torch.bincount(y, minlength=10)
    assert len(y) == 400 and (n - 40).abs().max() < 30, n
    assert ClassSampler(train).counts.tolist() == [64, 43, 29, 20, 13, 9, 6, 4, 2, 2]
    seen = []
    class Spy(Callback):
        def after_batch(self):
            if self.training: seen.append(self.y.as_subclass(torch.Tensor).clone())
    meta, loss = MetaSampler(meta_bs=20), BalancedSoftmax.from_dls(dls)
    learn = Learner(dls, get_model('resnet8', 10), loss_func=loss, cbs=[meta, Spy()], train_bn=False)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2)
    assert meta.n_steps == len(seen) > 0 and not torch.allclose(meta.psi.r, torch.full((10,), .5))


def test_number_of_workers_changes_nothing_in_validation(tree):
    train, test = load_lists(tree)
    a, b = ([x for x, _ in list_dls(train, test, bs=64, size=24, num_workers=n, device='cpu').valid] for n in (0, 2))
    assert all(torch.equal(p, q) for p, q in zip(a, b))


@pytest.mark.parametrize('workers', [0, 2])
def test_random_windows_survive_a_restart(tree, workers):
    "Stopped after three batches: the fourth and those after it are the same, windows and colours, bit for bit"
    train, test = load_lists(tree)
    def loader():
        dls = list_dls(train, test, bs=16, size=24, preset='code', num_workers=workers, device='cpu')
        return SampledDL.from_dl(dls.train, ClassSampler(train, seed=3), seed=5, n_batches=6)
    whole = list(loader())
    first = loader()
    batches = iter(first)
    for _ in range(3): next(batches)
    state = first.state_dict()
    batches.close()
    again, forgetful = loader(), loader()
    again.load_state_dict(state)
    forgetful.load_state_dict({**state, 'used': 0})
    batch = next(iter(again))
    assert torch.equal(batch[0], whole[3][0]) and torch.equal(batch[1], whole[3][1])
    assert not torch.equal(next(iter(forgetful))[0], whole[3][0])                # the number of the batch decides


def phone(tmp_path, n=4):
    "A list of photos of 48x64 from a phone that was held upright, and the same upright in their pixels, as PNG"
    rng, exif = np.random.default_rng(0), Image.Exif()
    exif[0x112] = 6
    for split in ('train', 'test'):
        for folder in ('phone', 'upright'): (tmp_path/folder/split).mkdir(parents=True)
        for i in range(n):
            im = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)).resize((64, 48), Image.BICUBIC)
            file = tmp_path/f'phone/{split}/{i}.jpg'
            im.save(file, quality=95, exif=exif)
            Image.fromarray(np.rot90(np.asarray(Image.open(file)), -1)).save(tmp_path/f'upright/{split}/{i}.png')
        for folder, end in (('phone', 'jpg'), ('upright', 'png')):
            lines = [f'{split}/{i}.{end} {i % 2}\n' for i in range(n)]
            (tmp_path/folder/f'my_{split}.txt').write_text(''.join(lines))
    return tmp_path/'phone', tmp_path/'upright'


@pytest.mark.parametrize('workers', [0, 1])
def test_photos_of_a_phone_stand_upright(tmp_path, workers):
    "Files, packs, images packed as they are, batches; not where the caller says so, as for the published sets"
    a, b = map(load_lists, phone(tmp_path))
    for p, q in zip(a, b):
        assert p[1][0].shape == (3, 64, 48) and all(torch.equal(p[i][0], q[i][0]) for i in range(4))
    def batch(sets):
        return next(iter(list_dls(*sets, bs=4, size=24, num_workers=workers, device='cpu').valid))[0]
    assert torch.equal(batch(a), batch(b))
    for short in (32, 64):                                                       # 64: stored as they are, with the tag
        def packs(sets, name):
            paths = [tmp_path/f'{name}{split}{short}.zip' for split in ('train', 'test')]
            return [pack_images(ds, p, short, quality=None, num_workers=0) for ds, p in zip(sets, paths)]
        p, q = packs(a, 'phone'), packs(b, 'upright')
        assert all(torch.equal(p[s].image(i), q[s].image(i)) for s in range(2) for i in range(4))
        assert torch.equal(batch(p), batch(q))
    lossy = pack_images(a[0], tmp_path/'lossy.zip', short=32, num_workers=0).image(0)
    assert lossy.shape[1] > lossy.shape[2]
    stored = load_lists(tmp_path/'phone', orient=False)[0]
    assert torch.equal(stored[0][0].rot90(-1, (1, 2)), a[0][0][0])
    assert pack_images(stored, tmp_path/'stored.zip', short=64, num_workers=0).image(0).shape == (3, 48, 64)


def anonymous():
    "Memory of this process and its children that is not a mapped file, what they share counted once, in KB"
    def one(pid):
        lines = Path(f'/proc/{pid}/smaps_rollup').read_text().splitlines()
        return int(next(l for l in lines if l.startswith('Pss_Anon')).split()[1])
    children = Path(f'/proc/{os.getpid()}/task/{os.getpid()}/children').read_text().split()
    return one(os.getpid()) + sum(one(k) for k in children)


def in_own_process(name, *args):
    "The numbers that a function of this file returns; what other tests left in memory would be copied into workers"
    code = f'''import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_list_loader as t
print(*t.{name}(*sys.argv[1:]))'''
    r = subprocess.run([sys.executable, '-c', code, *map(str, args)], capture_output=True, text=True, timeout=300,
                       env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert r.returncode == 0, r.stderr
    return [int(x) for x in r.stdout.split()]


def memory_of_epochs(tree, pack):
    train, test = load_lists(tree)
    if pack: train = pack_images(train, pack, short=32, num_workers=0)
    train = train.subset(torch.arange(len(train)).repeat(20))
    dl = list_dls(train, test, bs=64, size=16, num_workers=1, device='cpu').train
    used = []
    for _ in range(12):
        for i, _ in enumerate(dl):
            if i == 30: used.append(anonymous())
    return used


@pytest.mark.slow
@from_proc
@pytest.mark.parametrize('packed', [False, True])
def test_memory_does_not_grow(tree, tmp_path, packed):
    "Twelve epochs of a long list: it takes some until memory is where it stays, and there it stays"
    used = in_own_process('memory_of_epochs', tree, tmp_path/'p.zip' if packed else '')
    assert max(used[9:]) - max(used[5:8]) < 8_000, used


def memory_of_a_long_list(tree):
    train, test = load_lists(tree)
    long = train.subset(torch.arange(300_000) % len(train))
    dls = list_dls(long, test, bs=64, size=16, num_workers=1, device='cpu')
    used = []
    for i, _ in enumerate(resampled(dls, 1, n_batches=210).train):
        if i in (20, 200): used.append(anonymous())
    return used


@pytest.mark.slow
@from_proc
def test_workers_share_the_names(tree):
    "A worker reads from a list of 300,000 names and does not come to own a copy of it"
    used = in_own_process('memory_of_a_long_list', tree)
    assert used[1] - used[0] < 10_000, used
