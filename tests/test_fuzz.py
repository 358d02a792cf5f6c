"Files that are damaged: an error that names the file, never a crash or a silent wrong answer; no code in them runs."
import ast, os, pickle, time
from pathlib import Path
import pytest, torch
from hypothesis import given, strategies as st
import balms
from balms.lists import read_list
from balms.models import small_cnn
from balms.weights import load_weights, read_tensors
from fuzz import KINDS, equal, fuzz

SLOW_TO_READ = ('pack', 'annotations')


@pytest.mark.parametrize('kind', KINDS)
def test_damaged_files(kind, tmp_path):
    refused, wrong = fuzz(kind, 10 if kind in SLOW_TO_READ else 40, 0, tmp_path)
    assert not wrong, wrong[:5]
    assert refused or kind == 'cache'                                    # which is made again


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_many_damaged_files(kind, tmp_path, nightly):
    refused, wrong = fuzz(kind, 1000, int(time.time()) if nightly else 0, tmp_path)
    assert not wrong, wrong[:5]


@given(st.text(st.sampled_from('./\\ab 0-1\t\0:~é\u2028\n\r'), max_size=40), st.sampled_from(('', ' 0', '\t1', ' 1 0')))
def test_no_line_of_a_list_leads_out_of_its_root(tmp_path_factory, text, label):
    path = tmp_path_factory.mktemp('list')/'a_train.txt'
    path.write_bytes((text + label + '\n').encode())
    try: images = read_list(path)
    except ValueError as e: assert path.name in str(e)
    else:
        for file in images.files:
            inside = os.path.normpath(os.path.join('/root/x', file))
            assert inside == '/root/x' or inside.startswith('/root/x/'), file


@pytest.mark.parametrize('new', (True, False), ids=('zip', 'before 2020'))
def test_what_torch_saves_is_read(new, tmp_path):
    "Views, one storage twice, all types, nothing at all, plain values"
    x = torch.arange(10.)
    saved = dict(x=x, part=x[2:5], rows=x.view(2, 5).T, none=torch.zeros(0, 3), one=torch.tensor(3),
                 half=x.half(), bits=x > 4, parameter=torch.nn.Parameter(x), plain=dict(a=[1, 2.5, 'é', None, True]))
    torch.save(saved, tmp_path/'w.pth', _use_new_zipfile_serialization=new)
    assert equal(read_tensors(tmp_path/'w.pth'), saved)


class Executes:
    def __init__(self, path): self.path = path
    def __reduce__(self): return open, (str(self.path), 'w')


def test_no_pickle_is_executed(tmp_path):
    bad, net = Executes(tmp_path/'executed'), small_cnn(10)
    pickle.loads(pickle.dumps(bad)).close()                              # it would be
    (tmp_path/'executed').unlink()
    def new(p): torch.save({'w': bad}, p)
    def old(p): torch.save({'w': bad}, p, _use_new_zipfile_serialization=False)
    def plain(p): p.write_bytes(pickle.dumps({'w': bad}))
    for write in (new, old, plain):
        write(tmp_path/'w.pth')
        with pytest.raises(ValueError, match='w.pth'): load_weights(net, tmp_path/'w.pth')
    assert not (tmp_path/'executed').exists()


def test_nothing_in_the_package_loads_pickles():
    "torch.load has weights_only=True, np.load has not allow_pickle=True, and no other reader of pickles is called"
    for path in Path(balms.__file__).parent.glob('*.py'):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if not isinstance(node, ast.Call): continue
            name, options = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert name not in ('pickle.load', 'eval', 'exec', 'os.system', 'load_learner'), (path.name, name)
            if name == 'torch.load': assert options.get('weights_only') == 'True', path.name
            if name == 'np.load': assert options.get('allow_pickle', 'False') == 'False', path.name
