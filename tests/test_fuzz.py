"Files from outside, changed at random and on purpose: an error that names the file, never a crash, a hang, an endless allocation or a silent wrong answer; no code in them runs, no path leads out of its folder."
import ast, io, json, os, pickle, resource, struct, subprocess, sys, time, zipfile, zlib
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import given, strategies as st
from PIL import Image
from fuzz import KINDS, _same
import balms
from balms.list_loader import ImageListDataset, load_lists
from balms.lists import read_list
from balms.models import get_model, load_weights

ENV = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore'}


@pytest.fixture(scope='module')
def fuzzed(tmp_path_factory, nightly):
    "All kinds in one process, with a limit on memory and time"
    n, seed = (5000, int(time.time())) if nightly else (300, 0)
    out = tmp_path_factory.mktemp('fuzz')
    p = subprocess.run([sys.executable, str(Path(__file__).with_name('fuzz.py')), 'all', str(n), str(seed), str(out)], env=ENV, capture_output=True, text=True, timeout=7200 if nightly else 600)
    assert p.returncode == 0, f'{p.returncode}: {p.stderr[-2000:]}'              # a crash: the last kind that it names
    return json.loads(p.stdout.splitlines()[-1])


@pytest.mark.parametrize('kind', KINDS)
def test_changed_files(fuzzed, kind):
    res = fuzzed[kind]
    assert not res['wrong'], res['wrong'][:5]
    assert res['n'] >= 300 and (kind == 'cache' or res['refused'] > .2*res['n'])


@given(st.text(st.sampled_from('./\\ab 0-1\t\0:~é\u2028\n\r'), max_size=40), st.sampled_from(('', ' 0', '\t1', ' -0', ' 1 0')))
def test_no_line_of_a_list_leads_out_of_the_root(text, label):
    import tempfile
    with tempfile.NamedTemporaryFile('w', suffix='_train.txt', encoding='utf-8', newline='') as f:
        f.write(text + label + '\n'); f.flush()
        try: lst = read_list(f.name)
        except ValueError as e: assert f.name in str(e); return
    for file in lst.files:
        assert os.path.normpath(os.path.join('/root/x', file)).startswith('/root/x/') or os.path.normpath(file) == '.', file


def test_a_label_beyond_all_memory(tmp_path):
    for label in ('99999999999', '10000000'):
        (tmp_path/'a_train.txt').write_text(f'x.jpg 0\ny.jpg {label}\n'); (tmp_path/'a_test.txt').write_text('z.jpg 0\n')
        with pytest.raises(ValueError, match=r'a_train\.txt:2: the label 9*1?0*.* is out of range'): load_lists(tmp_path)


class Evil:
    def __init__(self, path): self.path = path
    def __reduce__(self): return open, (str(self.path), 'w')


def test_no_pickle_is_executed(tmp_path):
    "In weights and lists of arrays; of checkpoints `test_kill_resume.py` says it. Plain pickles, and those of torch, old and new"
    bad, net = Evil(tmp_path/'executed'), get_model('small_cnn', 10, 1)
    pickle.loads(pickle.dumps(bad)).close(); (tmp_path/'executed').unlink()         # it would
    def new(p): torch.save({'w': bad}, p)
    def old(p): torch.save({'w': bad}, p, _use_new_zipfile_serialization=False)
    def plain(p): p.write_bytes(pickle.dumps({'w': bad}))
    for write in (new, old, plain):
        write(p := tmp_path/'w.pth')
        with pytest.raises(ValueError, match=r'w\.pth is not a file of weights, or holds more than tensors'): load_weights(net, p)
        with pytest.raises(ValueError, match=r'w\.pth is not a file of weights'): get_model('small_cnn', 10, 1, weights=p)
    from balms.data import cache_dir, cached
    cache_dir().mkdir(parents=True); np.savez(cache_dir()/'c.npz', fingerprint=np.asarray('1'), about=np.asarray('null'), x=np.asarray([bad], dtype=object))
    assert cached('c', 1, lambda: (dict(x=np.ones(1, np.uint8)), None))[0]['x'].tolist() == [1]
    assert not (tmp_path/'executed').exists()


def test_pickles_of_cifar_are_those_that_are_published(tmp_path, monkeypatch):
    "torchvision compares their MD5 first; others are never opened"
    import torchvision.datasets.cifar as cifar
    from balms.data import load_data
    (d := tmp_path/'cifar-10-batches-py').mkdir()
    for f in ('data_batch_1', 'data_batch_2', 'data_batch_3', 'data_batch_4', 'data_batch_5', 'test_batch', 'batches.meta'): (d/f).write_bytes(pickle.dumps(Evil(tmp_path/'executed')))
    def none(*args, **kwargs): raise OSError('no network')
    monkeypatch.setattr(cifar, 'download_and_extract_archive', none)
    with pytest.raises(OSError, match='cifar10 could not be had in .*no network'): load_data('cifar10', tmp_path)
    assert not (tmp_path/'executed').exists()


def test_nothing_in_the_package_can_execute_a_file():
    "No call that unpickles, but of torch with weights_only=True and of numpy with allow_pickle=False; no eval, no shell, no archive that is unpacked"
    never = {'load_learner', 'Unpickler', 'unpickle', 'system', 'popen', 'extractall', 'unpack_archive', 'unsafe_load', 'full_load', 'read_pickle', 'load_pickle', 'Popen'}
    seen = set()
    for path in Path(balms.__file__).parent.glob('*.py'):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [a.name for a in node.names] + [getattr(node, 'module', None) or '']
                names = [n for n in names if not (path.name == 'lvis.py' and n == 'pickle')]        # of objects in memory that it has pickled itself
                assert not {'pickle', 'dill', 'joblib', 'shelve', 'marshal', 'cloudpickle', 'tarfile', 'yaml'} & set(names), (path.name, names)
            if not isinstance(node, ast.Call): continue
            name, kw = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            last = name.split('.')[-1]
            if (path.name, name) == ('models.py', 'Unpickler'):                                    # torch's own, of weights_only=True
                assert 'from torch._weights_only_unpickler import Unpickler' in path.read_text(encoding='utf-8'); continue
            assert last not in never and name not in ('eval', 'exec'), (path.name, name)
            if name.startswith('pickle.'): assert (path.name, name) in {('lvis.py', 'pickle.dumps'), ('lvis.py', 'pickle.loads')}, (path.name, name)
            if name in ('torch.load', 'np.load', 'numpy.load'):
                assert kw.get('weights_only') == 'True' or kw.get('allow_pickle') == 'False', (path.name, ast.unparse(node)); seen.add(name)
            assert kw.get('shell') is None, (path.name, name)
    assert seen == {'torch.load', 'np.load'}


def test_a_cached_array_that_says_it_is_shorter_is_made_again():
    "Reading it stops before the end of the member, where its checksum would be compared"
    from balms.data import cache_dir, cached
    make = lambda: cached('c', 1, lambda: (dict(x=(np.arange(100_000)%251).astype(np.uint8)), None))[0]['x'].tolist()
    want = make()
    f = cache_dir()/'c.npz'
    data = f.read_bytes(); assert data.count(b"'shape': (100000,)") == 1
    f.write_bytes(data.replace(b"'shape': (100000,)", b"'shape': (  1000,)"))
    assert make() == want


def test_compressed_weights_are_refused(tmp_path):
    "A zip file whose members are compressed could be a bomb; torch writes none"
    torch.save({'w': torch.zeros(1000)}, tmp_path/'a.pth')
    with zipfile.ZipFile(tmp_path/'a.pth') as z, zipfile.ZipFile(tmp_path/'b.pth', 'w', zipfile.ZIP_DEFLATED) as o:
        for i in z.infolist(): o.writestr(i.filename, z.read(i))
    with pytest.raises(ValueError, match=r'b\.pth .*compressed'): load_weights(get_model('small_cnn', 10, 1), tmp_path/'b.pth')


def test_images_that_are_none(tmp_path):
    "A PostScript program, which Pillow would hand to an interpreter; a damaged PNG; a link to nothing in a folder"
    eps = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n'
    png = io.BytesIO(); Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(png, 'png')
    bad = bytearray(png.getvalue()); del bad[200:600]
    for name, data in (('a.eps', eps), ('a.png', bytes(bad))):
        (tmp_path/name).write_bytes(data)
        with pytest.raises(ValueError, match=name): ImageListDataset([name], tmp_path).image(0)
    from balms.data import load_folder
    for s in ('train', 'test'):
        (tmp_path/'f'/s/'c').mkdir(parents=True); (tmp_path/'f'/s/'c/0.png').write_bytes(png.getvalue())
    for name, data in (('1.eps', eps), ('1.png', bytes(bad))):
        (p := tmp_path/'f/train/c'/name).write_bytes(data)
        with pytest.raises(ValueError, match=f'Not a readable image: .*{name}'): load_folder(tmp_path/'f', 8)
        p.unlink()
    (tmp_path/'f/train/c/1.png').symlink_to(tmp_path/'none')
    with pytest.raises(FileNotFoundError, match='1.png'): load_folder(tmp_path/'f', 8)


def zipped(src, dst, change, kind=zipfile.ZIP_STORED):
    "The zip file `src` with other members, all checksums right: `change(name, bytes)`"
    with zipfile.ZipFile(src) as z, zipfile.ZipFile(dst, 'w', kind) as o:
        for i in z.infolist(): o.writestr(i.filename, change(i.filename, z.read(i)))
    return dst


def test_a_record_that_is_shorter_than_its_tensor(tmp_path):
    "Checksums are right: torch 2.6 alone would read what lies in memory behind it. Longer ones, too, and one that is not there"
    torch.save({'w': torch.arange(1000.), 'v': torch.ones(1)}, src := tmp_path/'a.pth')
    for how in (lambda d: d[:4], lambda d: b'', lambda d: d*2):
        bad = zipped(src, tmp_path/'w.pth', lambda n, d: how(d) if n.endswith('/data/0') else d)
        with pytest.raises(ValueError, match=r'w\.pth is not a file of weights.*(bytes|record)'): load_weights(get_model('small_cnn', 10, 1), bad)
    with zipfile.ZipFile(src) as z, zipfile.ZipFile(tmp_path/'w.pth', 'w') as o:
        for i in z.infolist():
            if not i.filename.endswith('/data/1'): o.writestr(i.filename, z.read(i))
    with pytest.raises(ValueError, match=r'w\.pth is not a file of weights'): load_weights(get_model('small_cnn', 10, 1), tmp_path/'w.pth')


@pytest.mark.parametrize('new', (True, False), ids=('zip', 'old'))
def test_what_torch_saves_is_loaded(tmp_path, new):
    "In both formats, to the bit: views, one storage twice, all types, nothing at all, plain values; and its storages are counted right, which for zip files is of use with older releases of torch alone"
    from balms.models import _storages, read_tensors
    x = torch.arange(10.)
    for o in ({}, {'a': x, 'b': x[2:5], 'c': x.view(2, 5).t()}, [torch.ones(3, dtype=d) for d in (torch.uint8, torch.bool, torch.int64, torch.bfloat16, torch.float64, torch.complex64)], {'e': torch.empty(0)}, {'p': torch.nn.Parameter(x)},
              {'s': torch.Size([3]), 'd': torch.float32, 'n': [1, 2.5, None, True, 'x', 2**70, (1,)]}, get_model('small_cnn', 10, 1).state_dict()):
        torch.save(o, f := tmp_path/'w.pth', _use_new_zipfile_serialization=new)
        assert _same(read_tensors(f), o)
    if new:
        with zipfile.ZipFile(f) as z: assert {k: len(z.read(f'w/data/{k}')) for k in _storages(z.read('w/data.pkl'))} == _storages(z.read('w/data.pkl'))


def hidden(dst, shown, real):
    "A zip file in which Python finds `shown` and torch's reader `real`, both [(name, bytes)]: the offset of the directory in its last record is that of another one"
    def parts(members, base):
        out, cd = b'', []
        for n, d in members:
            head = struct.pack('<5H3L2H', 20, 0, 0, 0, 0, zlib.crc32(d), len(d), len(d), len(n), 0)
            cd.append(struct.pack('<4sH', b'PK\1\2', 20) + head + struct.pack('<3H2L', 0, 0, 0, 0, base + len(out)) + n.encode())
            out += b'PK\3\4' + head + n.encode() + d
        return out, cd
    a, cd = parts(real, 0)
    a += b'\0'*max(0, sum(len(n) + len(d) + 40 for n, d in shown) + 2000 - len(a))             # room for offsets to be positive
    at, size = len(a), sum(map(len, cd))
    b, _ = parts(shown, at + size)
    _, cdb = parts(shown, at + size - (at + size + len(b) - at))                                 # Python adds the difference of the directories
    dst.write_bytes(a + b''.join(cd) + b + b''.join(cdb) + struct.pack('<4s4H2LH', b'PK\5\6', 0, 0, len(cdb), len(cdb), size, at, 0))
    return dst


def test_torch_is_given_what_was_checked(tmp_path):
    "A file with two directories, of which Python's reader and torch's take one each: loaded is the one whose checksums and lengths were compared. A member twice is refused"
    from balms.models import read_tensors
    for name, w in (('good', 1.), ('evil', 2.)): torch.save({'w': torch.full((100,), w)}, tmp_path/f'{name}.pth')
    def members(name):
        with zipfile.ZipFile(tmp_path/f'{name}.pth') as z: return [(i.filename.replace('evil/', 'good/'), z.read(i)) for i in z.infolist()]
    f = hidden(tmp_path/'two.pth', members('good'), members('evil'))
    with zipfile.ZipFile(f) as z: assert dict(members('good')) == {n: z.read(n) for n in z.namelist()}
    assert (torch.load(f, weights_only=True)['w'] == 2).all()                                   # torch alone finds the other
    assert (read_tensors(f)['w'] == 1).all()
    with zipfile.ZipFile(tmp_path/'good.pth', 'a') as z, pytest.warns(UserWarning): z.writestr('good/data/0', b'\0'*400)
    with pytest.raises(ValueError, match=r'good\.pth is not a file of weights.*a member twice'): read_tensors(tmp_path/'good.pth')


class Call:
    "Pickled as a call"
    def __init__(self, *call): self.call = call
    def __reduce__(self): return self.call[0], self.call[1:]


@pytest.mark.parametrize('new', (True, False), ids=('zip', 'old'))
def test_names_that_ask_for_memory_are_refused(tmp_path, new):
    "torch.load alone would make these, also with weights_only=True: an endless array, a set of it, and one of whatever memory holds"
    from balms.models import read_tensors
    for what in (Call(bytearray, 2**40), Call(set, Call(bytearray, 2**33)), Call(torch.Tensor, 10, 64), Call(torch.FloatTensor, 10)):
        torch.save({'w': what}, f := tmp_path/'w.pth', _use_new_zipfile_serialization=new)
        began = time.monotonic()
        with pytest.raises(ValueError, match=r'w\.pth is not a file of weights.*it holds (__builtin__|builtins|torch)'): read_tensors(f)
        assert time.monotonic() - began < 5
    torch.save({'module.'*100_000 + 'w': torch.ones(1)}, f, _use_new_zipfile_serialization=new)
    with pytest.raises(ValueError, match=r'w\.pth has the weights of another network'): load_weights(get_model('small_cnn', 10, 1), f)
    torch.save({0: torch.ones(1)}, f, _use_new_zipfile_serialization=new)
    with pytest.raises(ValueError, match=r'w\.pth holds no weights'): load_weights(get_model('small_cnn', 10, 1), f)


def test_old_weights_whose_storages_are_not_there(tmp_path):
    "In the format from before 2020 a tensor of a storage that is not listed would have what memory holds"
    from balms.models import read_tensors
    torch.save({'w': torch.ones(10)}, f := tmp_path/'w.pth', _use_new_zipfile_serialization=False)
    data = f.read_bytes()
    keys = data.rindex(b'\x80\x02]')                                                            # the list of storages, the last pickle
    for bad in (data[:keys] + b'\x80\x02].', data[:-4], data + b'\0'*4):
        f.write_bytes(bad)
        with pytest.raises(ValueError, match=r'w\.pth is not a file of weights.*other storages'): read_tensors(f)


def test_tensors_that_are_no_plain_arrays_are_refused(tmp_path):
    "Quantized ones are not held to their bounds by torch.load; nothing that trains here makes them, or sparse ones"
    from balms.models import read_tensors
    sparse = torch.eye(3).to_sparse()
    for name, t in dict(quantized=torch.quantize_per_tensor(torch.ones(3), .1, 0, torch.qint8), sparse=sparse, csr=sparse.to_sparse_csr(), meta=torch.empty(3, device='meta')).items():
        torch.save({'about': [{'deep': (t,)}]}, f := tmp_path/f'{name}.pth')
        with pytest.raises(ValueError, match=rf'{name}\.pth is not a file of weights'): read_tensors(f)
    o = []
    for _ in range(200): o = [o, o]                                              # 2**200 of them, for those who look at each
    torch.save({'w': o}, f := tmp_path/'many.pth')
    assert list(read_tensors(f)) == ['w']


def test_published_weights_execute_nothing(tmp_path, monkeypatch):
    "A file that someone has put where torchvision keeps its downloads; torch's setting is as it was before"
    from torchvision.models import ResNet18_Weights, resnet18
    monkeypatch.setenv('TORCH_HOME', str(tmp_path)); monkeypatch.delenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', raising=False); monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    f = tmp_path/'hub/checkpoints'/ResNet18_Weights.DEFAULT.url.split('/')[-1]
    f.parent.mkdir(parents=True)
    net = resnet18()
    torch.save(net.state_dict(), f)
    got = get_model('resnet18', 7, weights='DEFAULT').eval()
    assert got.fc.out_features == 7 and torch.equal(got.body.conv1.weight, net.conv1.weight)
    torch.save({**net.state_dict(), 'x': Evil(tmp_path/'executed')}, f)
    with pytest.raises(ValueError, match='The published weights DEFAULT of resnet18 are there, but damaged or not weights'): get_model('resnet18', 7, weights='DEFAULT')
    assert not (tmp_path/'executed').exists() and 'TORCH_FORCE_WEIGHTS_ONLY_LOAD' not in os.environ and os.environ['TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'] == '1'


def measured(code, *args):
    "MiB that `code` costs over its imports, in a process of its own; and what it prints"
    head = 'import resource, sys, balms.recipes, balms.image_lists as il\nbefore = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n'
    tail = '\nprint((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)/(2**10 if sys.platform == "linux" else 2**20))'
    p = subprocess.run([sys.executable, '-c', head + code + tail, *map(str, args)], env=ENV, capture_output=True, text=True, timeout=120)
    assert p.returncode == 0, p.stderr[-2000:]
    *said, mib = p.stdout.splitlines()
    return float(mib), '\n'.join(said)


def test_a_compressed_cache_is_made_again(tmp_path):
    "One that the cache did not write could ask for any size"
    from balms.data import cache_dir, cached
    cache_dir().mkdir(parents=True); np.savez_compressed(cache_dir()/'c.npz', fingerprint='1', about='null', x=np.zeros(1000, np.uint8))
    assert cached('c', 1, lambda: (dict(x=np.ones(2, np.uint8)), None))[0]['x'].tolist() == [1, 1]
