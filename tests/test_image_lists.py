"Images in lists: the published lists where they are at hand, the command, samplers and the Meta Sampler on the loaders, workers, bad files, packs, memory."
import gzip, io, json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from balms.core import class_counts
from balms.image_lists import (LIST_FACTS, Centre, ListReport, Resized, ImageListDataset, PackedDataset, check_lists, decode_rgb, find_lists, list_dls, load_lists, pack_images, read_list, sample_tree)

LISTS = Path(os.environ.get('BALMS_LISTS', ''))
published = pytest.mark.skipif(not os.environ.get('BALMS_LISTS'), reason='the published lists are not at hand: BALMS_LISTS names no folder')


@pytest.fixture(scope='module')
def tree(tmp_path_factory): return sample_tree(tmp_path_factory.mktemp('lists')/'digits')


@published
def test_places_lt():
    "All three lists, exactly as published"
    r = check_lists('places_lt', lists=LISTS)
    assert r.ok, str(r)
    assert 'train: 62,500 images, 365 classes of 4,980..5, imbalance 996, many/medium/few 131/163/71' in str(r)
    assert 'val: 7,300 images, 365 classes of 20..20' in str(r) and 'test: 36,500 images, 365 classes of 100..100' in str(r) and 'no folder was given' in str(r)
    lst = read_list(find_lists(LISTS, 'places_lt')['train'], 365)
    counts = json.loads((LISTS/'places_lt_cls_num_list.json').read_text())
    assert class_counts(lst).tolist() == counts


@published
def test_imagenet_lt():
    "Without its training list, which the check says; the counts are those of the facts"
    r = check_lists('imagenet_lt', lists=LISTS)
    assert r.ok and 'train: no list' in str(r) and 'test: 50,000 images, 1,000 classes of 50..50' in str(r) and 'val: 20,000 images, 1,000 classes of 20..20' in str(r)
    n, f = json.loads((LISTS/'imagenet_lt_cls_num_list.json').read_text()), LIST_FACTS['imagenet_lt']
    assert (len(n), sum(n), max(n), min(n), (sum(i > 100 for i in n), sum(20 <= i <= 100 for i in n), sum(i < 20 for i in n))) == (f.classes, f.train, f.largest, f.smallest, f.shots)


@published
@pytest.mark.parametrize('change,what', [
    (lambda ls: ls[:-1], ['images: 62499, but 62500']), (lambda ls: ls + [ls[0]], [':62501: the image of line 1 again']),
    (lambda ls: ls[:5] + [ls[5].rsplit(' ', 1)[0] + ' 365'] + ls[6:], [':6: the label 365 is out of range 0..364']),
    (lambda ls: [l for l in ls if not l.endswith(' 17')], ['no images of classes [17]', 'smallest: 0, but 5']),
    (lambda ls: ls[:9] + [ls[9].replace('/', '\\')] + ls[10:], [':10: a Windows path'])])
def test_a_changed_list_is_found(tmp_path, change, what):
    paths = find_lists(LISTS, 'places_lt')
    ls = gzip.decompress(paths['train'].read_bytes()).decode().splitlines()
    (tmp_path/'train.txt').write_text('\n'.join(change(ls)) + '\n')
    r = check_lists('places_lt', lists={**paths, 'train': tmp_path/'train.txt'})
    assert not r.ok and all(any(w in p for p in r.problems) for w in what), str(r)


def run(*args): return subprocess.run([sys.executable, '-c', 'from balms.image_lists import balms_check; balms_check()', *map(str, args)], capture_output=True, text=True)


def test_command(tree, tmp_path):
    assert (r := run('own', '--root', tree)).returncode == 0 and 'images: 442 decoded' in r.stdout, r.stderr
    ls = (tree/'digits_train.txt').read_text()
    (tmp_path/'my_train.txt').write_text(ls + 'train/none.jpg 0\n../x.jpg 1\n')
    r = run('own', '--root', tree, '--lists', tmp_path)
    assert r.returncode == 1 and 'my_train.txt:193: no file' in r.stdout and 'my_train.txt:194: the path \'../x.jpg\' leads out of the image root' in r.stdout and 'test: no list' in r.stdout
    assert run('own').returncode == 2 and run('imagenet', '--root', tree).returncode == 2 and run('own', '--root', tmp_path/'no').returncode == 2


@pytest.mark.parametrize('workers', [0, 2])
def test_a_bad_image_stops_training_by_name(tree, tmp_path, workers):
    "Missing or truncated: the error has list, line and file, also from a worker"
    (tmp_path/'cut.jpg').write_bytes((tree/read_list(tree/'digits_train.txt').files[0]).read_bytes()[:-99])
    for file, why in (('none.jpg', 'No such file'), ('cut.jpg', 'image file is truncated')):
        (tmp_path/'l_train.txt').write_text(f'{file} 0\n'); (tmp_path/'l_test.txt').write_text(f'{file} 0\n')
        train, test = load_lists(tmp_path)
        dls = list_dls(train, test, bs=1, size=32, num_workers=workers, device='cpu')
        with pytest.raises((OSError, ValueError), match='l_test.txt:1: ') as e: list(dls.valid)
        assert file in str(e.value) and why in str(e.value)


def test_samplers_and_meta(tree):
    "Counts, resampling and the Meta Sampler work on the loaders, in workers too; no image is opened for them"
    from fastai.learner import Learner
    from fastai.callback.core import Callback
    from balms.core import BalancedSoftmax
    from balms.meta import MetaSampler
    from balms.models import get_model
    from balms.samplers import ClassSampler, SampledDL, resampled
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
    net = get_model('resnet8', 10)
    learn = Learner(dls, net, loss_func=BalancedSoftmax.from_dls(dls), cbs=[ms := MetaSampler(meta_bs=20), Spy()], train_bn=False)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2)
    assert ms.n_steps == len(seen) > 0 and not torch.allclose(ms.psi.r, torch.full((10,), .5))


def test_same_views_as_in_the_workers(tree):
    "One process or two give the same validation batches, and packing without loss changes nothing in them"
    train, test = load_lists(tree)
    a, b = ([x for x, _ in list_dls(train, test, bs=64, size=24, num_workers=n, device='cpu').valid] for n in (0, 2))
    assert all(torch.equal(p, q) for p, q in zip(a, b))


def test_a_pack_is_written_whole_or_not_at_all(tree, tmp_path):
    "Killed while it packs: no file of that name, the old one as it was"
    code = f'''
import sys, time, balms.image_lists as m
train, _ = m.load_lists({str(tree)!r})
shrink = m._shrink
def slow(*a): print("one", flush=True); time.sleep(.05); return shrink(*a)
m._shrink = slow
m.pack_images(train, {str(tmp_path/"p.pack")!r}, short=32, num_workers=0)'''
    for old in (False, True):
        if old: before = pack_images(load_lists(tree)[1], tmp_path/'p.pack', short=32, num_workers=0).path.read_bytes()
        p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE)
        p.stdout.readline(); time.sleep(.2); p.send_signal(signal.SIGKILL); p.wait()
        assert (tmp_path/'p.pack').exists() == old
        if old: assert (tmp_path/'p.pack').read_bytes() == before and len(PackedDataset(tmp_path/'p.pack')) == 200
    p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    for f in set(tmp_path.iterdir()) - {tmp_path/'p.pack'}: f.unlink()                         # what SIGKILL left
    p.stdout.readline(); time.sleep(.2); p.send_signal(signal.SIGINT); p.wait()
    assert [f.name for f in tmp_path.iterdir()] == ['p.pack']                                   # Ctrl-C leaves nothing


def _anonymous():
    "Memory of this process and its children that is not a mapped file, what they share counted once, in KB"
    def one(pid): return int(next(l for l in Path(f'/proc/{pid}/smaps_rollup').read_text().splitlines() if l.startswith('Pss_Anon')).split()[1])
    kids = Path(f'/proc/{os.getpid()}/task/{os.getpid()}/children').read_text().split()
    return one(os.getpid()) + sum(one(k) for k in kids)


@pytest.mark.skipif(not (Path('/proc/self/smaps_rollup').exists() and 'Pss_Anon' in Path('/proc/self/smaps_rollup').read_text()), reason='memory is read from /proc')
@pytest.mark.parametrize('packed', [False, True])
def test_memory_does_not_grow(tree, tmp_path, packed):
    "Twelve epochs of a long list: it takes some until memory is where it stays, and there it stays"
    used = _alone('_epochs', tree, tmp_path/'p.pack' if packed else '')
    assert max(used[9:]) - max(used[5:8]) < 8_000, used                                                # KB


def _alone(name, *args):
    "The numbers that a function of this file returns in a process of its own: what other tests left in memory would be copied into workers"
    code = f'import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_image_lists as t; print(*t.{name}(*sys.argv[1:]))'
    r = subprocess.run([sys.executable, '-c', code, *map(str, args)], capture_output=True, text=True, timeout=300, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert r.returncode == 0, r.stderr
    return [int(x) for x in r.stdout.split()]


def _epochs(tree, pack):
    train, test = load_lists(tree)
    if pack: train = pack_images(train, pack, short=32, num_workers=0)
    train = train.subset(torch.arange(len(train)).repeat(20))
    dl = list_dls(train, test, bs=64, size=16, num_workers=1, device='cpu').train
    used = []
    for _ in range(12):
        for i, b in enumerate(dl):
            if i == 30: used.append(_anonymous())
    return used


@pytest.mark.skipif(not (Path('/proc/self/smaps_rollup').exists() and 'Pss_Anon' in Path('/proc/self/smaps_rollup').read_text()), reason='memory is read from /proc')
def test_workers_share_the_names(tree):
    "A worker reads from a list of 300,000 names and does not come to own a copy of it"
    used = _alone('_long_list', tree)
    assert used[1] - used[0] < 10_000, used                                                      # KB


def _long_list(tree):
    from balms.samplers import resampled
    train, test = load_lists(tree)
    dls = list_dls(train.subset(torch.arange(300_000) % len(train)), test, bs=64, size=16, num_workers=1, device='cpu')
    used = []
    for i, _ in enumerate(resampled(dls, 1, n_batches=210).train):
        if i in (20, 200): used.append(_anonymous())
    return used


def test_shared_memory_is_used_again(tree):
    "A batch that is kept does not change when later ones come, and a worker has few places for batches"
    train, test = load_lists(tree)
    dls = list_dls(train, test, bs=8, size=32, num_workers=2, device='cpu')
    kept = [x for x, _ in dls.valid]
    want = [x for x, _ in list_dls(train, test, bs=8, size=32, num_workers=0, device='cpu').valid]
    assert len(kept) == 25 and all(torch.equal(a, b) for a, b in zip(kept, want))
    from balms.image_lists import ImageListDL, _collate
    held = [x for x, _ in ImageListDL(test._copy(view=lambda x: x[:, :8, :8], parcels=True), bs=8, num_workers=1, create_batch=_collate, device='cpu')]   # parcels nobody opens
    assert all(torch.equal(torch.stack(p.parts()), torch.stack([test.image(i)[:, :8, :8] for i in range(8*j, 8*j + 8)])) for j, p in enumerate(held))


def test_pack_in_spawned_workers(tree, tmp_path):
    "A pack that was read from can be sent to another process: the map stays here"
    import pickle
    pack = pack_images(load_lists(tree)[1], tmp_path/'t.pack', short=32, num_workers=0)
    x = pack[3][0]
    again = pickle.loads(pickle.dumps(pack))
    assert again._map == (None, None) and torch.equal(again[3][0], x)


def test_formats(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    for mode in ('RGB', 'L', 'CMYK'):
        Image.fromarray(rgb).convert(mode).save(f := io.BytesIO(), 'jpeg'); assert decode_rgb(f.getvalue()).shape == (3, 20, 30)
    for mode in ('RGB', 'L', 'RGBA', 'P', 'LA', '1'):
        Image.fromarray(rgb).convert(mode).save(f := io.BytesIO(), 'png'); assert decode_rgb(f.getvalue()).shape == (3, 20, 30)
    Image.fromarray(rgb).save(f := io.BytesIO(), 'gif', save_all=True, append_images=[Image.fromarray(255 - rgb)])
    with pytest.raises(ValueError, match='2 frames'): decode_rgb(f.getvalue())


def phone(tmp_path, n=4):
    "A list of photos of 48x64 from a phone that was held upright, and the same upright in their pixels, as PNG"
    rng, exif = np.random.default_rng(0), Image.Exif()
    exif[0x112] = 6
    for d in ('phone', 'upright'): (tmp_path/d).mkdir()
    for i in range(n):
        im = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)).resize((64, 48), Image.Resampling.BICUBIC)
        im.save(tmp_path/f'phone/{i}.jpg', quality=95, exif=exif)
        im.save(f := io.BytesIO(), 'jpeg', quality=95)
        Image.fromarray(np.rot90(decode_rgb(f.getvalue()).permute(1, 2, 0).numpy(), -1)).save(tmp_path/f'upright/{i}.png')
    for d, end in (('phone', 'jpg'), ('upright', 'png')):
        for s in ('train', 'test'): (tmp_path/d/f'my_{s}.txt').write_text(''.join(f'{s}/{i}.{end} {i % 2}\n' for i in range(n)))
        for s in ('train', 'test'): shutil.copytree(tmp_path/d, tmp_path/d/s, ignore=lambda d, fs: [f for f in fs if not f.endswith(end)])
    return tmp_path/'phone', tmp_path/'upright'


@pytest.mark.parametrize('workers', [0, 1])
def test_photos_of_a_phone_stand_upright(tmp_path, workers):
    "Orientation 6: files, packs with and without loss, images packed as they are, batches; not for the published sets, whose results were obtained without"
    a, b = map(load_lists, phone(tmp_path))
    for p, q in zip(a, b):
        assert p[1][0].shape == (3, 64, 48) and all(torch.equal(p[i][0], q[i][0]) for i in range(4))
    batches = lambda train, test, preset='code': [x for dl in list_dls(train, test, bs=4, size=24, preset=preset, flip=0, jitter=0, num_workers=workers, device='cpu') for x, _ in dl]
    assert torch.equal(batches(*a)[-1], batches(*b)[-1])
    for short in (32, 64):                                                                      # 64: stored as they are, with the tag
        packs = [[pack_images(ds, tmp_path/f'{name}{s}{short}.pack', short=short, quality=None, num_workers=0) for s, ds in zip('ab', sets)] for name, sets in (('phone', a), ('upright', b))]
        for p, q in zip(*packs): assert all(torch.equal(p.image(i), q.image(i)) for i in range(4))
        assert torch.equal(batches(*packs[0])[-1], batches(*packs[1])[-1])
    lossy = pack_images(a[0], tmp_path/'lossy.pack', short=32, num_workers=0)
    assert lossy.image(0).shape[1] > lossy.image(0).shape[2]
    stored = load_lists(tmp_path/'phone', orient=False)[0]
    assert stored[0][0].shape == (3, 48, 64) and torch.equal(stored[0][0].rot90(-1, (1, 2)), a[0][0][0])
    assert pack_images(stored, tmp_path/'stored.pack', short=64, num_workers=0).image(0).shape == (3, 48, 64)
    assert a[0]._copy(encoded=True)._item(0).x.ndim == 3 and stored._copy(encoded=True)._item(0).x.ndim == 1      # nvJPEG knows no tags: a worker decodes what is to be turned
    assert check_lists(None, tmp_path/'phone').ok


def _drop(tree, keep): lines = (tree/'digits_train.txt').read_text().splitlines(); (tree/'digits_train.txt').write_text('\n'.join(l for l in lines if keep(l)) + '\n')
def _third(tree, new): lines = (tree/'digits_train.txt').read_text().splitlines(); lines[2] = new(lines); (tree/'digits_train.txt').write_text('\n'.join(lines) + '\n')
def _image(tree, f): f(tree/(tree/'digits_train.txt').read_text().splitlines()[2].split()[0])


BAD = {                                                                       # what is wrong, what training says of it, and the check
    'missing': (lambda t: _image(t, Path.unlink), 'digits_train.txt:3: {t}/train/digit0/0002.jpg: No such file', 'digits_train.txt:3: no file {t}/train/digit0/0002.jpg'),
    'truncated': (lambda t: _image(t, lambda f: f.write_bytes(f.read_bytes()[:-200])), 'digits_train.txt:3: {t}/train/digit0/0002.jpg: does not decode: image file is truncated', 'digits_train.txt:3: {t}/train/digit0/0002.jpg: does not decode: image file is truncated'),
    'no label': (lambda t: _third(t, lambda ls: ls[2].split()[0]), 'digits_train.txt:3: one word', None),
    'no number': (lambda t: _third(t, lambda ls: ls[2] + '.5'), "digits_train.txt:3: the label '0.5' is not a whole number", None),
    'windows': (lambda t: _third(t, lambda ls: ls[2].replace('/', '\\')), 'digits_train.txt:3: a Windows path', None),
    'twice': (lambda t: _third(t, lambda ls: ls[0]), 'digits_train.txt:3: the image of line 1 again', None),
    'twice, two labels': (lambda t: _third(t, lambda ls: ls[0][:-1] + '1'), 'digits_train.txt:3: the image of line 1 again, there with label 0', None),
    'below 0': (lambda t: _third(t, lambda ls: ls[2][:-1] + '-1'), 'digits_train.txt:3: the label -1 is out of range', None),
    'beyond': (lambda t: _third(t, lambda ls: ls[2][:-1] + '12'), 'digits_train.txt: no images of classes [10, 11]', None),
    'class in test only': (lambda t: _drop(t, lambda l: not l.endswith(' 9')), 'digits_test.txt:181: class 9, of which training has no images', None),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_named_by_file_and_line(tmp_path, tree, capsys, name):
    "By training and by the check, in short and without a traceback, also from a worker"
    from balms.cli import balms_train
    change, said, found = BAD[name]
    change(t := Path(shutil.copytree(tree, tmp_path/'t')))
    assert (found or said).format(t=t) in '\n'.join(check_lists(None, t).problems)
    with pytest.raises(SystemExit) as e: balms_train(['--data', str(t), '--size', '8', '--method', 'bs', '--seeds', '1', '--iters', '13', '--workers', '1', '--device', 'cpu', '--out', str(tmp_path/'runs')])
    err = capsys.readouterr().err
    assert e.value.code == 2 and said.format(t=t) in err and 'Traceback' not in err and err.startswith('balms_train: error: '), err


def test_skip_missing_counts(tmp_path, tree, capsys):
    "Says how many of which list, file by file, and the ledger keeps the number"
    from balms.cli import balms_train
    from balms.recipes import read_ledger
    t = Path(shutil.copytree(tree, tmp_path/'t'))
    for split in ('train', 'train', 'test'): next((t/split/'digit0').iterdir()).unlink()
    with pytest.warns(UserWarning) as w: balms_train(['--data', str(t), '--size', '8', '--method', 'bs', '--seeds', '1', '--iters', '2', '--workers', '0', '--device', 'cpu', '--out', str(tmp_path/'runs'), '--skip-missing'])
    said = '\n'.join(str(o.message) for o in w)
    assert f'2 of 192 images of {t}/digits_train.txt are missing and are skipped' in said and f'1 of 200 images of {t}/digits_test.txt' in said and said.count(': no file ') == 3
    (row,) = read_ledger(tmp_path/'runs'/'ledger.jsonl')
    assert row['skipped'] == 3 and row['counts'][0] == 62
    shutil.rmtree(t/'test')
    with pytest.raises(FileNotFoundError, match='digits_test.txt: none of its 200 images is in'): load_lists(t, skip_missing=True)


def test_weights_of_another_network(tmp_path, tree, capsys):
    "A file of another architecture, of none at all, and no file: each by name"
    from balms.cli import balms_train
    from balms.models import get_model
    torch.save(get_model('resnet34', 10).state_dict(), tmp_path/'other.pth'); torch.save([1], tmp_path/'list.pth'); (tmp_path/'text.pth').write_text('weights')
    for file, why in (('other', 'has the weights of another network'), ('list', 'list.pth'), ('text', 'text.pth'), ('none', 'none.pth')):
        with pytest.raises(SystemExit) as e: balms_train(['--data', str(tree), '--size', '8', '--method', 'bs', '--seeds', '1', '--iters', '2', '--workers', '0', '--device', 'cpu', '--out', str(tmp_path/'runs'), '--weights', str(tmp_path/f'{file}.pth')])
        err = capsys.readouterr().err
        assert e.value.code == 2 and f'{file}.pth' in err and why in err and 'Traceback' not in err, err


def test_a_tensor_is_looked_at_as_bytes_are():
    "A program in PostScript, and a damaged PNG, which torchvision's decoder does not survive"
    for data, what in ((b'%!PS-Adobe-3.0 EPSF-3.0\nshowpage', 'PostScript'), (b'\x89PNG\r\n\x1a\n' + bytes(40), 'does not decode'), (b'', 'empty')):
        with pytest.raises(ValueError, match=what): decode_rgb(torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8))


def measured(*args): from test_fuzz import measured; return measured(*args)                     # imported here: a process of `_alone` that has more in memory shares more with its workers


def test_long_lines_of_a_list(tmp_path):
    "Of 8,192 characters at most; a report of long problems is made in time that grows with their length, and is short"
    (tmp_path/'c.jpg').write_bytes(b''); (f := tmp_path/'a_train.txt').write_text('b ' + 'a'*80_000 + ' 0\nc.jpg 0\n')
    t = time.time()
    with pytest.raises(ValueError, match=r'a_train\.txt is longer than a list of images can be, or has such a line: line 1'): read_list(f)
    r = check_lists(None, tmp_path, dict(train=f))
    assert 'a_train.txt is longer than' in str(r) and len(str(r)) < 1000
    f.write_text('\n'.join(f'x {"a"*8180}{i:03} 0' for i in range(100)))                           # each as long as it may be
    said = str(check_lists(None, tmp_path, dict(train=f)))
    assert 'a_train.txt:1: ' in said and 'File name too long' in said and '... and 97 more like it' in said and len(said) < 10_000, said
    said = str(ListReport('x', [], ['x '*5 + 'a'*80_000, "'"*80_000, 'a/'*40_000, '1 '*40_000, 'a b'*30_000]*20))
    assert len(said) < 20_000 and time.time() - t < 5


def test_skip_missing_names_what_cannot_be_looked_for(tmp_path, tree):
    "A name that is too long for the system, by list and line"
    (f := tmp_path/'a_train.txt').write_text('c.jpg 0\n' + 'a'*300 + ' 0\n')
    with pytest.raises(OSError, match=r'a_train\.txt:2: a+.*: File name too long'): load_lists(tree, dict(train=f, test=f), skip_missing=True)


def test_a_list_of_many_lines_costs_little(tmp_path):
    "At most 270 bytes a line, and in the check no more than twice that; it was 410"
    (f := tmp_path/'a_train.txt').write_text(''.join(f'{i:06x} 0\n' for i in range(150_000)))
    mib, said = measured('print(len(il.read_list(sys.argv[1])))', f)
    assert said == '150000' and mib*2**20/150_000 < 270, mib
    mib, said = measured('print(il.check_lists(None, lists={"train": sys.argv[1]}).ok)', f)
    assert said == 'True' and mib*2**20/150_000 < 540, mib


def test_a_pipe_is_not_waited_for(tmp_path):
    "As an image, a list, or behind a link; by name"
    os.mkfifo(tmp_path/'p'); (tmp_path/'l.jpg').symlink_to(tmp_path/'p'); (tmp_path/'a_test.txt').write_text('l.jpg 0\n')
    for name in ('p', 'l.jpg'):
        with pytest.raises(OSError, match=f':1: .*{name}: a pipe or a device, not a file'): ImageListDataset([name], tmp_path)[0]
        with pytest.raises(OSError, match=f'a pipe or a device, not a file: .*{name}'): read_list(tmp_path/name)
    assert 'l.jpg is not a file' in str(check_lists(None, tmp_path)) and 'a pipe or a device' in str(check_lists(None, tmp_path, dict(test=tmp_path/'p')))
    shutil.copy(sample_tree(tmp_path/'t', n_max=2, imbalance=1)/'train/digit0/0000.jpg', tmp_path/'r.jpg'); (tmp_path/'ok.jpg').symlink_to('r.jpg')
    assert ImageListDataset(['ok.jpg'], tmp_path)[0][0].ndim == 3


@pytest.mark.parametrize('size', [(20_000, 1), (1, 60_000)])
def test_a_thin_image_is_refused_by_name(tmp_path, size):
    "Its resized size would be gigabytes: at less than 48 MiB it is an error with list, line and file, from a worker too, and on the way to the device"
    Image.new('RGB', size).save(tmp_path/'thin.png'); (tmp_path/'a_test.txt').write_text('thin.png 0\n')
    code = """
ds = il.ImageListDataset(il.read_list(sys.argv[1] + '/a_test.txt'), sys.argv[1], view=il.Centre())
for see in (lambda: ds[0], lambda: il.Unpack('cpu', ds.view)(il.Parcel.of([ds._copy(encoded=True)._item(0)]))):
    try: see()
    except ValueError as e: print(e)"""
    mib, said = measured(code, tmp_path)
    first, second = said.splitlines()
    assert mib < 48 and first.startswith(f'{tmp_path}/a_test.txt:1: {tmp_path}/thin.png: {size[0]:,} x {size[1]:,} pixels, too long and thin') and second.startswith(f'{tmp_path}/a_test.txt:1: {size[0]:,} x'), (mib, said)
    ds = ImageListDataset(read_list(tmp_path/'a_test.txt'), tmp_path)
    with pytest.raises(ValueError, match='a_test.txt:1: .*thin.png: .*too long and thin'): list(list_dls(ds, ds, bs=1, num_workers=1, device='cpu').valid)
    pack = pack_images(ds, tmp_path/'a.pack', short=32, num_workers=0)                          # small already: as it is
    with pytest.raises(ValueError, match='a.pack: image 0 .thin.png, line 1 of a_test.txt.: .*too long and thin'): pack.with_view(Centre())[0]
    assert ds.with_view(Resized(24))[0][0].shape == (3, 24, 24)


def test_a_resize_has_no_larger_step_on_the_way(tmp_path):
    "One pixel wide and three million high, to a square of 224: the step between would have 224 times as many"
    Image.new('1', (1, 3_000_000)).save(tmp_path/'high.png')
    mib, said = measured("try: il.ImageListDataset(['high.png'], sys.argv[1], view=il.Resized(224))[0]\nexcept ValueError as e: print(e)", tmp_path)
    assert mib < 64 and 'high.png: 1 x 3,000,000 pixels, too long and thin' in said, (mib, said)


def test_what_a_view_raises_is_named(tree):
    "Whatever it is, by list, line and file"
    def view(x): raise KeyError('no such thing')
    ds = load_lists(tree)[0].with_view(view)
    with pytest.raises(ValueError, match=f'digits_train.txt:3: {tree}/{ds.files[2]}: .*no such thing'): ds[2]


def test_an_image_that_cannot_be_packed_is_named(tmp_path):
    "JPEG has at most 65,500 pixels a side; no pack is left"
    Image.new('RGB', (70_000, 34)).save(tmp_path/'wide.png'); (tmp_path/'a_test.txt').write_text('wide.png 0\n')
    ds = ImageListDataset(read_list(tmp_path/'a_test.txt'), tmp_path)
    with pytest.raises(ValueError, match='a_test.txt:1: .*wide.png: 65,882 x 32 pixels, too long for JPEG'): pack_images(ds, tmp_path/'a.pack', short=32, num_workers=0)
    assert pack_images(ds, tmp_path/'b.pack', short=32, quality=None, num_workers=0).image(0).shape[1] == 32 and not list(tmp_path.glob('a.pack*'))


def test_a_damaged_image_in_a_pack_is_named(tmp_path):
    "One that was packed as it is and cannot be decoded"
    Image.new('RGB', (40, 40)).save(f := io.BytesIO(), 'png')
    ds = ImageListDataset(['x.png'], tmp_path); (tmp_path/'x.png').write_bytes(f.getvalue())
    pack = pack_images(ds, tmp_path/'a.pack', short=64, num_workers=0)
    pack.read = lambda i: b'nothing'
    with pytest.raises(ValueError, match='a.pack: image 0 .x.png.*: does not decode: not an image'): pack.image(0)


def test_the_device_gets_no_file_that_is_too_large():
    "The worker refuses it"
    from balms.image_lists import _jpeg_size, _plain_jpeg
    Image.new('RGB', (30, 20)).save(f := io.BytesIO(), 'jpeg'); data = f.getvalue(); i = data.index(b'\xff\xc0') + 5
    big = data[:i] + (20_000).to_bytes(2, 'big')*2 + data[i + 4:]
    assert _plain_jpeg(data) and not _plain_jpeg(big) and _jpeg_size(data) == (30, 20)
    for hidden in (big[:2] + b'junk' + big[2:], big[:2] + b'\xff'*1000 + big[2:], big[:2] + b'\xff\xd0\xff\x00' + big[2:]):     # as libjpeg, which finds it behind these
        assert _jpeg_size(hidden) == (20_000, 20_000)
        with pytest.raises(ValueError, match='pixels|not an image'): decode_rgb(hidden)
    t = time.process_time()
    for data in (b'\xff\xd8' + b'\xff'*2_000_000, b'\xff\xd8\xff' + bytes(2_000_000), b'\xff\xd8' + b'\xff\xe0\0\2'*200_000):
        with pytest.raises(ValueError): decode_rgb(data)
    assert time.process_time() - t < 10
