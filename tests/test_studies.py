"The full path of a study, on a folder in the layout of CIFAR-10 that is made here: what a GPU would run, a few steps of it."
import shutil
import numpy as np, pytest, torch
from PIL import Image
from balms.data import long_tail_counts
from balms.recipes import Recipe, read_ledger, run
from balms.studies import Study, compare, linked_table


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    "cifar10/{train,test}/<class>/*.png with just the images that imbalance 200 asks for"
    d, rng = tmp_path_factory.mktemp('data'), np.random.default_rng(0)
    for split, ns in (('train', long_tail_counts(200, 10, 200)), ('test', [2]*10)):
        for j, n in enumerate(ns):
            (d/'cifar10'/split/f'c{j}').mkdir(parents=True)
            for i in range(n): Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(d/'cifar10'/split/f'c{j}'/f'{i}.png')
    return d


def study(root, out, **kw): return Study('cifar10', (200,), out=out, root=root, scale='full', model='resnet8', iters=3, bs=16, iters2=2, **kw)


def test_full_study(root, tmp_path):
    s = study(root, tmp_path/'runs')
    rows = s.run(('softmax', 'bs', 'balms'), seeds=2, device='cpu')
    assert [(r['recipe']['method'], r['recipe']['seed']) for r in rows] == [(m, i) for i in (0, 1) for m in ('softmax', 'bs', 'balms')]
    assert rows[0]['recipe']['preset'] == 'paper' and rows[0]['recipe']['augment'] == 'autoaugment_cutout' and rows[0]['counts'][0] == 200 and len(rows[2]['r']) == 10
    assert study(root, tmp_path/'runs').run(('softmax', 'bs', 'balms'), seeds=2, device='cpu') == rows and len(read_ledger(tmp_path/'runs/ledger.jsonl')) == 6
    assert s.note.startswith('Full runs: cifar10, preset paper') and 'iters=3' in s.note
    f, y = s.features('bs', 200, device='cpu')
    assert f.shape == (20, 64) and y.tolist() == [j for j in range(10) for _ in range(2)]
    assert 'missing' in linked_table(rows, 5)[0] and '](#' not in linked_table(rows, 5)[0]     # changed recipes are no cells of a table
    with pytest.raises(ValueError, match='No seed has both'): compare(rows, 'bs', 'softmax')


def test_scale_of_the_environment(monkeypatch):
    monkeypatch.setenv('BALMS_SCALE', 'full')
    assert Study('cifar100').full and not Study('cifar100', scale='small').full
    monkeypatch.setenv('BALMS_SCALE', 'huge')
    with pytest.raises(ValueError, match='BALMS_SCALE'): Study('cifar10')


@pytest.mark.skipif(shutil.which('g++') is None and shutil.which('c++') is None, reason='torch.compile needs a C++ compiler')
def test_compiled_run_is_the_same_recipe(tmp_path, monkeypatch):
    "The same key, the same weights to rounding, and the second stage on a compiled body"
    r, used, compile = Recipe(iters=25, iters2=10, method='balms', threads=1), [], torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self, *args, **kw: (used.append(self), compile(self, *args, **kw))[1])
    plain, fast = run(r, tmp_path/'a', device='cpu'), run(r, tmp_path/'b', device='cpu', compile=True)
    assert plain['key'] == fast['key'] and (plain['compile'], fast['compile']) == (False, True)
    assert len(used) == 2 and all(m._compiled_call_impl is not None for m in used)            # the body, in both stages
    assert abs(plain['nll'] - fast['nll']) < .05
    a, b = (torch.load(tmp_path/d/r.first.key/'model.pt', weights_only=True)['model'] for d in 'ab')
    assert list(a) == list(b) and all(torch.allclose(a[k].float(), b[k].float(), atol=.02) for k in a)
