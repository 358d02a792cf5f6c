"Files from outside, changed at random and on purpose: an error that names the file, never a crash, a hang, an endless allocation or a silent wrong answer; no code in them runs, no path leads out of its folder."
import ast, gzip, io, json, os, pickle, subprocess, sys, time
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import given, strategies as st
from PIL import Image
from fuzz import KINDS
import balms
from balms.image_lists import ImageListDataset, load_lists, read_list
from balms.models import get_model, load_weights
from balms.recipes import read_ledger

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
    for label in ('99999999999', '9'*5000, '10000000'):
        (tmp_path/'a_train.txt').write_text(f'x.jpg 0\ny.jpg {label}\n'); (tmp_path/'a_test.txt').write_text('z.jpg 0\n')
        with pytest.raises(ValueError, match=r'a_train\.txt:2: the label 9*1?0*.* is out of range'): load_lists(tmp_path)


def test_a_list_that_is_a_bomb(tmp_path):
    "300 MB of spaces in 300 KB: refused by name"
    with gzip.open(tmp_path/'a_train.txt.gz', 'wb', 1) as f:
        for _ in range(300): f.write(b' '*2**20)
    with pytest.raises(ValueError, match=r'a_train\.txt\.gz is longer than a list of images can be'): read_list(tmp_path/'a_train.txt.gz')


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
    import zipfile
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
        with pytest.raises(ValueError, match=f'{name}: does not decode'): ImageListDataset([name], tmp_path).image(0)
    from balms.data import load_folder
    for s in ('train', 'test'):
        (tmp_path/'f'/s/'c').mkdir(parents=True); (tmp_path/'f'/s/'c/0.png').write_bytes(png.getvalue())
    for name, data in (('1.eps', eps), ('1.png', bytes(bad))):
        (p := tmp_path/'f/train/c'/name).write_bytes(data)
        with pytest.raises(ValueError, match=f'Not a readable image: .*{name}'): load_folder(tmp_path/'f', 8)
        p.unlink()
    (tmp_path/'f/train/c/1.png').symlink_to(tmp_path/'none')
    with pytest.raises(FileNotFoundError, match='1.png'): load_folder(tmp_path/'f', 8)
