"The full path of a study, on a folder in the layout of CIFAR-10 that is made here: what a GPU would run, a few steps."
import shutil
import numpy as np, pytest, torch
from PIL import Image
from balms.linked_tables import linked_table
from balms.long_tail import long_tail_counts
from balms.recipe import Recipe
from balms.rows import read_rows
from balms.runs import run
from balms.studies import Study, compare
from balms.weights import read_tensors


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    "cifar10/{train,test}/<class>/*.png with just the images that imbalance 200 asks for"
    folder, rng = tmp_path_factory.mktemp('data'), np.random.default_rng(0)
    for split, counts in (('train', long_tail_counts(200, 10, 200)), ('test', [2]*10)):
        for j, n in enumerate(counts):
            of_class = folder/'cifar10'/split/f'c{j}'
            of_class.mkdir(parents=True)
            for i in range(n):
                Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(of_class/f'{i}.png')
    return folder


def study(root, out):
    return Study('cifar10', (200,), out=out, root=root, scale='full', model='resnet8', iters=3, bs=16, iters2=2)


def test_full_study(root, tmp_path):
    s, methods = study(root, tmp_path/'runs'), ('softmax', 'bs', 'balms')
    rows = s.run(methods, seeds=2, device='cpu')
    assert [(r['recipe']['method'], r['recipe']['seed']) for r in rows] == [(m, i) for i in (0, 1) for m in methods]
    assert (rows[0]['recipe']['preset'], rows[0]['recipe']['augment']) == ('paper', 'autoaugment_cutout')
    assert rows[0]['counts'][0] == 200 and len(rows[2]['r']) == 10
    assert study(root, tmp_path/'runs').run(methods, seeds=2, device='cpu') == rows
    assert len(read_rows(tmp_path/'runs')) == 6
    assert s.note.startswith('Full runs: cifar10, preset paper') and 'iters=3' in s.note
    f, y = s.features('bs', 200, device='cpu')
    assert f.shape == (20, 64) and y.tolist() == [j for j in range(10) for _ in range(2)]
    table, _ = linked_table(rows, 5)
    assert 'missing' in table and '](#' not in table                         # changed recipes are no cells of a table
    with pytest.raises(ValueError, match='No seed has both'): compare(rows, 'bs', 'softmax')


def test_scale_of_the_environment(monkeypatch):
    monkeypatch.setenv('BALMS_SCALE', 'full')
    assert Study('cifar100').full and not Study('cifar100', scale='small').full
    monkeypatch.setenv('BALMS_SCALE', 'huge')
    with pytest.raises(ValueError, match='BALMS_SCALE'): Study('cifar10')


@pytest.mark.skipif(not (shutil.which('g++') or shutil.which('c++')), reason='torch.compile needs a C++ compiler')
def test_compiled_run_is_the_same_recipe(tmp_path, monkeypatch):
    "The same key, the same weights to rounding, and the second stage on a compiled body"
    r, compiled, compile_ = Recipe(iters=25, iters2=10, method='balms', threads=1), [], torch.nn.Module.compile
    def compile_and_note(self, *args, **kwargs):
        compiled.append(self)
        return compile_(self, *args, **kwargs)
    monkeypatch.setattr(torch.nn.Module, 'compile', compile_and_note)
    plain, fast = run(r, tmp_path/'a', device='cpu'), run(r, tmp_path/'b', device='cpu', compile=True)
    assert plain['key'] == fast['key']
    assert [row['environments'][-1]['compile'] for row in (plain, fast)] == [False, True]
    assert len(compiled) == 2 and all(m._compiled_call_impl is not None for m in compiled)    # the body, in both stages
    assert abs(plain['nll'] - fast['nll']) < .05
    a, b = (read_tensors(tmp_path/d/r.stage1.key/'model.safetensors') for d in 'ab')
    assert list(a) == list(b) and all(torch.allclose(a[k].float(), b[k].float(), atol=.02) for k in a)
