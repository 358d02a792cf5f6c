"""Changes files at random and hands them to what reads them, in a process of its own with a limit on memory and on time. Started by `test_fuzz.py`: `python fuzz.py KIND N SEED FOLDER`; prints what was wrong as JSON.

Right is an error that names the file (`ValueError` or `OSError`), or a result that `check` finds to be what the bytes say. Wrong is also an error behind which no memory was left, and a change that costs more than `GROWTH` of memory. A crash or a hang ends this process, which the test sees."""
import gzip, io, json, os, random, resource, signal, sys, warnings
from pathlib import Path
import numpy as np, torch
from PIL import Image


def numbers(rng): return rng.choice((b'0', b'-1', b'99999999999999999999', b'1'*5000, b'2147483648', b'4294967295', b'1e400', b'nan'))


def mutate(data, rng, other=b''):
    "One to four changes, of many kinds"
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        i = rng.randrange(len(data) + 1); j = min(len(data), i + rng.randint(1, rng.choice((2, 16, 4096))))
        how = rng.randrange(11)
        if how == 0 and data: data[i % len(data)] ^= 1 << rng.randrange(8)
        elif how == 1 and data: data[i % len(data)] = rng.randrange(256)
        elif how == 2: data[i:i] = rng.randbytes(rng.randint(1, 64))
        elif how == 3: del data[i:j]
        elif how == 4: data[i:i] = data[i:j]*rng.choice((1, 3, 100))
        elif how == 5: del data[i:]
        elif how == 6: data[i:j] = rng.choice((b'\xff', b'\0', b' ', b'\n', b'/', b'['))*(j - i)
        elif how == 7: data[i:j] = numbers(rng)
        elif how == 8: data[i:i] = rng.choice((b'../', b'/etc/passwd 0\n', b'\0', b'\r\n', b'\t', b'\\', b'C:\\x 1\n', b'\xef\xbb\xbf', b'\xff\xfe', '\u2028 1\n'.encode(), b'NaN', b'{"', b'PK\3\4'))
        elif how == 9 and other: data[i:j] = other[i:j + rng.randint(0, 64)]
        elif how == 10: data[i:i + 8] = rng.choice((2**63 - 1, 2**40, 2**31, 2**64 - 1)).to_bytes(8, rng.choice(('little', 'big')))
    return bytes(data)


def lists(d):
    "A training list: no line is lost or altered, no path leads out of the root, no label is beyond the list"
    from balms.list_loader import load_lists
    from balms.lists import read_list
    lines = [f'train/c{j}/{i}.jpg {j}' for j in range(8) for i in range(12)]
    (d/'a_test.txt').write_text('\n'.join(l.replace('train', 'test') for l in lines) + '\n')
    path = d/'a_train.txt'
    def check():
        lst = read_list(path)
        text = path.read_bytes().decode('utf-8-sig').replace('\r\n', '\n').replace('\r', '\n').split('\n')
        text = text[:-1] if text[-1] == '' else text
        assert len(lst) == len(text) and lst.lines == list(range(1, len(text) + 1)), 'lines were lost'
        for file, label, line in zip(lst.files, lst.targets.tolist(), text):
            assert line.split() == f'{file} {label}'.split() or line.strip().endswith(str(label)) or int(line.split()[-1]) == label, (line, file, label)
            assert (Path('/root/x')/file).is_relative_to('/root/x') and '..' not in Path(file).parts, file
        train, _ = load_lists(d)
        assert train.c <= len(train)
    return path, ('\n'.join(lines) + '\n').encode(), check


def lists_gz(d):
    path, data, _ = lists(d)
    path.unlink(missing_ok=True); path = d/'a_train.txt.gz'
    from balms.lists import read_list
    def check(): assert all('..' not in Path(f).parts for f in read_list(path).files)
    return path, gzip.compress(data), check


def ledger(d):
    "Rows are dicts of the bytes' own lines, and make a table, or the row that does not is named"
    from balms.rows import read_rows
    from balms.tables import format_table
    path = d/'ledger.jsonl'
    rows = [dict(key=f'k{i}', recipe=dict(data='digits', imbalance=50, preset='small', method='bs', seed=i), changed={'lr': .1}, train_crc=i, environments=[{}], seconds=1., overall=90., many=99., medium=90., few=None, ece=5., nll=.5, per_class=[.1]*10) for i in range(6)]
    def check():
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter('always'); res = read_rows(path)
        assert len(res) + len(told) >= sum(map(bool, path.read_bytes().split(b'\n'))) and all(isinstance(r, dict) for r in res), 'a line was left out silently'
        try: format_table(res)
        except ValueError as e:
            if not any(f'The row {r["key"]} ' in str(e) for r in res): raise AssertionError(f'names no row: {e}') from e
    return path, ''.join(json.dumps(r) + '\n' for r in rows).encode(), check


def _same(a, b):
    if isinstance(a, torch.Tensor): return isinstance(b, torch.Tensor) and torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict): return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(_same, a, b))
    return a == b


def checkpoints(d):
    "A checkpoint is what was saved, to the bit, or refused"
    from balms.models import get_model
    from balms.recipes import _checkpoint, _save
    about, net = dict(recipe='r', train_crc=1), get_model('small_cnn', 10, 1)
    opt = torch.optim.SGD(net.parameters(), .1, momentum=.9)
    net(torch.randn(2, 1, 8, 8)).sum().backward(); opt.step()
    state = dict(about=about, step=7, seconds=1.5, model=net.state_dict(), opt=opt.state_dict(), data=dict(pos=3, gen=torch.get_rng_state()), rng=torch.get_rng_state(), cuda=[], scaler={}, cbs={})
    path = d/'checkpoint.pt'; _save(path, state)
    def check(): assert _same(_checkpoint(path, about), state), 'silently another state'
    return path, path.read_bytes(), check


def weights(d):
    "Weights in a file of today: loaded as they were saved, or refused"
    from balms.models import get_model, load_weights
    net, new = get_model('small_cnn', 10, 1), get_model('small_cnn', 10, 1)
    path = d/'weights.pth'; torch.save(net.state_dict(), path)
    def check(): load_weights(new, path, keep_classifier=True); assert _same(new.state_dict(), net.state_dict()), 'silently other weights'
    return path, path.read_bytes(), check


def old_weights(d):
    "In the format of old releases, which has no checksums: never a crash"
    from balms.models import get_model, load_weights
    net = get_model('small_cnn', 10, 1)
    path = d/'weights.pth'; torch.save(net.state_dict(), path, _use_new_zipfile_serialization=False)
    return path, path.read_bytes(), lambda: load_weights(net, path, keep_classifier=True)


def cache(d):
    "A cached array is what was made, or is made again: never an error"
    from balms.data import cached
    os.environ['BALMS_CACHE'] = str(d)
    arrays, about = dict(train=np.arange(1200, dtype=np.uint8).reshape(100, 3, 2, 2), test=np.ones((10, 3, 2, 2), np.uint8)), dict(vocab=['a', 'b'])
    make = lambda: cached('digits', [1, 'a'], lambda: (arrays, about))
    make(); path = d/'digits.npz'
    def check():
        try: got, said = make()
        except Exception as e: raise AssertionError(f'{type(e).__name__}: {e}') from e
        assert said == about and got.keys() == arrays.keys() and all(np.array_equal(got[k], arrays[k]) and got[k].dtype == arrays[k].dtype for k in arrays), 'silently other arrays'
    return path, path.read_bytes(), check


def _image(d, name, **kw):
    "A folder of images of which one is changed: an error that names it, or images of the size that was asked for and all others as they were"
    from balms.data import load_folder
    os.environ['BALMS_CACHE'] = str(d/'cache')
    rng = np.random.default_rng(0)
    for s in ('train', 'test'):
        for c in 'ab':
            (d/s/c).mkdir(parents=True, exist_ok=True)
            for i in range(2): Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)).save(d/s/c/f'{i}.png')
    want = load_folder(d, 8)[0].images
    (d/'train/b/1.png').unlink(); path = d/'train/b'/f'1.{name}'
    Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(path, **kw)
    def check():
        for f in (d/'cache').glob('*'): f.unlink()
        got = load_folder(d, 8)[0].images
        assert got.shape == want.shape and torch.equal(got[:3], want[:3])
    return path, path.read_bytes(), check


def _listed(d, name):
    "An image of a list that is changed: an error that names it, or an image"
    from balms.list_loader import ImageListDataset
    path = d/f'1.{name}'
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(path)
    def check():
        x = ImageListDataset([path.name], d).image(0)
        assert x.dtype == torch.uint8 and x.ndim == 3 and x.shape[0] == 3
    return path, path.read_bytes(), check


def pack(d):
    "A pack has the images that were packed, or says that it does not"
    from balms.list_loader import load_lists
    from balms.lists import sample_tree
    from balms.packs import PackedDataset, pack_images
    train, _ = load_lists(sample_tree(d/'tree', n_max=6, imbalance=3))
    path = d/'train.pack'
    ds = pack_images(train, path, short=12, num_workers=0)
    want = [ds.image(i) for i in range(len(ds))]
    def check():
        ds = PackedDataset(path)
        assert len(ds) == len(want) and ds.targets.tolist() == train.targets.tolist() and all(torch.equal(ds.image(i), w) for i, w in enumerate(want)), 'silently other images'
    return path, path.read_bytes(), check


def annotations(d):
    "An annotation file, run lengths and polygons in turn, is read whole, and its images and masks are there, and AP is measured, or what is wrong is said"
    from balms.lvis import InstanceAP, InstanceDataset, digit_scenes, read_annotations
    path = digit_scenes(d, n=4, n_valid=2, size=24, imbalance=3)/'digits_train.json'
    file = json.loads(path.read_bytes())
    for a in file['annotations'][::2]: x, y, w, h = a['bbox']; a['segmentation'] = [[x, y, x + w, y, x + w, y + h/2], [x, y, x + w, y + h/2, x + w, y + h, x, y + h]]
    path.write_text(json.dumps(file))
    def check():
        anns = read_annotations(path, d/'train')
        assert len(anns) and int(anns.instance_counts.sum()) >= 0 and (anns.instance_counts >= 0).all()
        ds, ap = InstanceDataset(anns, train=False), InstanceAP(anns)
        for i in range(len(ds)):
            x, t = ds[i]
            ap.add([dict(boxes=t['boxes'].as_subclass(torch.Tensor), labels=t['labels'], scores=torch.ones(len(t['labels'])), masks=t['masks'].as_subclass(torch.Tensor)[:, None].float())], [t['image_id']])
            assert t['boxes'].isfinite().all() and t['masks'].shape[-2:] == x.shape[-2:] and ((1 <= t['labels']) & (t['labels'] <= anns.c)).all() and (t['boxes'][:, :2] <= t['boxes'][:, 2:]).all()
        assert all(v != v or 0 <= v <= 1 for v in ap.compute().values())
    return path, path.read_bytes(), check


def values(data, rng, other):
    "One to three values of a JSON file are others"
    d = json.loads(data)
    for _ in range(rng.randint(1, 3)):
        at, steps = d, rng.randint(2, 6)
        for _ in range(steps):
            keys = list(at) if isinstance(at, dict) else range(len(at))
            if not keys: break
            k = rng.choice(keys)
            if not isinstance(at[k], (dict, list)) or rng.random() < .2:
                at[k] = rng.choice((None, -1, 0, 2**31, 2**63, 10**30, 1e308, float('nan'), float('inf'), '', 'x', '../../etc/passwd', [], {}, [[]], [0]*7, True, {'size': [2**20, 2**20], 'counts': [2**40]}, {'size': [24, 24], 'counts': 'zzzz'}, {'size': [24, 24], 'counts': [577]}, [[0, 0, 1e7, 0, 1e7, 1e7, 0, 1e7]], [[0, 0, float('nan'), 5, 5, 5]], [['a']*6], '0', at[k]*1000 if isinstance(at[k], (str, list)) else 3.7)); break
            at = at[k]
        if rng.random() < .1 and isinstance(at, dict) and at: del at[rng.choice(list(at))]
    return json.dumps(d).encode()


def annotation_values(d): return (*annotations(d), values)


KINDS = dict(lists=lists, annotations=annotations, annotation_values=annotation_values, lists_gz=lists_gz, ledger=ledger, checkpoints=checkpoints, weights=weights, old_weights=old_weights, cache=cache, pack=pack,
             **{f'image_{n}': (lambda d, n=n: _image(d, n)) for n in ('png', 'jpeg', 'gif', 'bmp', 'webp', 'tiff', 'ppm')},
             **{f'listed_{n}': (lambda d, n=n: _listed(d, n)) for n in ('png', 'jpeg', 'gif', 'bmp', 'webp', 'tiff')})


GROWTH = 256                                                                  # MiB


def peak():
    "MiB of memory that this process has had at most"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/(2**10 if sys.platform == 'linux' else 2**20)


def no_memory(e):
    "Whether an error comes from one that says that there was no memory"
    seen = []
    while e is not None and e not in seen:
        if isinstance(e, MemoryError) or any(s in str(e).lower() for s in ('alloc', 'out of memory')): return True
        seen.append(e); e = e.__cause__ or e.__context__
    return False


class Hang(BaseException): pass
def hang(*_): raise Hang()


def fuzz(kind, n, seed, folder):
    "{n, refused, wrong: [(seed, what)]}"
    path, data, check, *how = KINDS[kind](folder)
    path.write_bytes(data); check()                                           # as it is, it is right
    refused, wrong, last = 0, [], data
    signal.signal(signal.SIGALRM, hang)
    for s in range(seed, seed + n):
        rng = random.Random(s)
        changed = (how[0] if how else mutate)(data, rng, last); last = changed
        path.write_bytes(changed)
        before = peak()
        try:
            signal.alarm(20)
            check()
        except (ValueError, OSError) as e:
            refused += 1
            named = path.name in str(e) or kind == 'lists' and 'a_test.txt' in str(e)     # a class that training lacks now
            if not named: wrong.append((s, f'does not name the file: {type(e).__name__}: {e}'[:300]))
            if no_memory(e): wrong.append((s, f'asked for all memory: {type(e).__name__}: {e}'[:300]))
        except BaseException as e: wrong.append((s, f'{type(e).__name__}: {e}'[:300]))
        finally: signal.alarm(0)
        if peak() - before > GROWTH: wrong.append((s, f'took {peak() - before:.0f} MiB more'))
    return dict(n=n, refused=refused, wrong=wrong)


def limit_memory(more=2*2**30):
    "No more than `more` bytes over what this process has now"
    size = int(open('/proc/self/statm').read().split()[0])*resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + more,)*2)


if __name__ == '__main__':
    import balms.recipes, balms.list_loader, balms.packs
    warnings.simplefilter('ignore')
    kind, n, seed, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    if sys.platform == 'linux': limit_memory()
    out = {}
    for k in KINDS if kind == 'all' else kind.split(','):
        (folder/k).mkdir(parents=True, exist_ok=True)
        print(f'{k} from seed {seed}', file=sys.stderr, flush=True)
        out[k] = fuzz(k, n, seed, folder/k)
    print(json.dumps(out))
