"Recipes on images in lists: killed and resumed with workers, packs, cut batches, what is refused."
import os, signal, subprocess, sys, time
import pytest, torch
from balms.image_lists import list_dls, load_lists, pack_images, sample_tree
from balms.recipes import Recipe, read_ledger, run

ENV = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore'}
SMALL = dict(model='resnet8', size=24, bs=16, iters=14)
SECOND = dict(SMALL, iters2=12)


@pytest.fixture(scope='module')
def tree(tmp_path_factory): return sample_tree(tmp_path_factory.mktemp('lists')/'digits', n_max=32, imbalance=16)


def model(out, r): return torch.load(out/r.key/'model.pt', weights_only=True)


def same(a, b, r):
    x, y = model(a, r), model(b, r)
    assert all(torch.equal(x['model'][k], y['model'][k]) for k in x['model']) and x['r'] == y['r']
    (p,), (q,) = ([row for row in read_ledger(d/'ledger.jsonl') if row['key'] == r.key] for d in (a, b))
    assert all(p[k] == q[k] for k in ('overall', 'nll', 'p_y', 'per_class', 'counts', 'train_crc'))


def killed(tree, out, r, at):
    "Start the run in a process, end it with SIGKILL after the step `at` of its last stage, and say which step the checkpoint has"
    code = f'''
import os, signal, balms.recipes as m
from pathlib import Path
save, n = m.Checkpoint._write, [0]
def _write(self, state):
    save(self, state)
    if self.path.parent.name == {r.key!r} and self.step == {at}: os.kill(os.getpid(), signal.SIGKILL)
m.Checkpoint._write = _write
m.run(m.Recipe(**{r.row!r}), {str(out)!r}, device='cpu', workers=2, every=0)'''
    p = subprocess.run([sys.executable, '-c', code], env=ENV, capture_output=True, text=True, timeout=240)
    assert p.returncode == -signal.SIGKILL, p.stderr
    assert torch.load(out/r.key/'checkpoint.pt', weights_only=True)['step'] == at


@pytest.mark.parametrize('method,augment', [('bs', 'window'), ('balms', 'window'), ('lws', 'resize')])
def test_killed_with_workers_and_resumed(tree, tmp_path, method, augment):
    "SIGKILL in the middle of an epoch: weights, rates and scores are those of the run that was not killed, bit for bit"
    r = Recipe(tree, method=method, augment=augment, **(SMALL if method == 'bs' else SECOND))
    run(r, tmp_path/'a', device='cpu', workers=2)
    killed(tree, tmp_path/'b', r, 5)
    run(r, tmp_path/'b', device='cpu', workers=2)
    same(tmp_path/'a', tmp_path/'b', r)


def test_number_of_workers_changes_nothing_without_learned_rates(tree, tmp_path):
    r = Recipe(tree, method='crt', augment='window', **SECOND)
    for n in (0, 2): run(r, tmp_path/str(n), device='cpu', workers=n)
    same(tmp_path/'0', tmp_path/'2', r)


def test_checkpoint_cannot_be_taken_up_without_the_number_of_the_batch(tree):
    "What the tests above rest on: with the loader's count forgotten, windows are others"
    from balms.recipes import Execution, _loaders
    from balms.core import class_counts
    train, test = load_lists(tree)
    r = Recipe(tree, method='softmax', augment='window', **SMALL)
    make = lambda: _loaders(r, train, test, class_counts(train), Execution(torch.device('cpu'), workers=0), r.bs)[0].train
    a, b, c = make(), make(), make()
    it = iter(a); next(it); s = a.state_dict(); want = next(it)[0]
    b.load_state_dict(s); assert torch.equal(next(iter(b))[0], want)
    c.load_state_dict({**s, 'used': 0}); assert not torch.equal(next(iter(c))[0], want)


def test_packs(tree, tmp_path):
    "A pack without loss, of images that are small already, gives what the files give; the pack of another list is refused"
    train, test = load_lists(tree)
    for s, ds in (('train', train), ('test', test)): pack_images(ds, tmp_path/f'{s}.pack', num_workers=0)
    r = Recipe(tree, method='softmax', **SMALL)
    a = run(r, tmp_path/'a', device='cpu', workers=0)
    b = run(r, tmp_path/'b', device='cpu', workers=0, pack=dict(train=tmp_path/'train.pack', test=tmp_path/'test.pack'))
    assert a['nll'] == b['nll'] and a['train_crc'] != b['train_crc'] and b['images'] == 'pack, short side 256, quality 95' and a['images'] == 'files'
    with pytest.raises(ValueError, match='measured on other images'): run(r, tmp_path/'a', device='cpu', pack=tmp_path/'train.pack')
    with pytest.raises(ValueError, match='test.pack has 200 images'): run(r, tmp_path/'c', device='cpu', pack=tmp_path/'test.pack')


def test_cut_batches(tree, tmp_path):
    "Stage 2 in pieces has the same classifier; stage 1, with batch normalisation, another network, and the row says so"
    r = Recipe(tree, method='balms', augment='plain', **SECOND)
    run(r, tmp_path/'a', device='cpu', workers=0)
    (tmp_path/'b').mkdir(); (tmp_path/'b'/r.first.key).symlink_to(tmp_path/'a'/r.first.key)
    row = run(r, tmp_path/'b', device='cpu', workers=0, micro_bs=6)
    a, b = model(tmp_path/'a', r), model(tmp_path/'b', r)
    for k in a['model']: torch.testing.assert_close(a['model'][k], b['model'][k], rtol=1e-4, atol=1e-5)
    assert row['micro_bs'] == 6 and row['key'] == r.key
    whole, cut = (run(Recipe(tree, method='cbw', **SMALL), tmp_path/str(m), device='cpu', workers=0, micro_bs=m) for m in (None, 6))
    assert 'micro_bs' not in whole and cut['key'] == whole['key'] and cut['nll'] != whole['nll']


@pytest.mark.parametrize('kw,what', [
    (dict(imbalance=10), 'have the tail that they have'), (dict(preset='paper'), 'iters must be given'), (dict(preset='code', iters=5, method='crt'), 'iters2 must be given'),
    (dict(augment='crop_flip'), "Unknown augment 'crop_flip': choose from resize, window, plain"), (dict(model='resnet19'), "Unknown model 'resnet19'")])
def test_refused(tree, kw, what):
    with pytest.raises(ValueError, match=what): Recipe(tree, **{'method': 'softmax', **kw})


def test_refused_runs(tree, tmp_path):
    with pytest.raises(ValueError, match='lists is for images in lists, which digits is not'): run(Recipe(method='bs'), tmp_path, device='cpu', lists=tree)
    with pytest.raises(ValueError, match='micro_bs must be 1 or more'): run(Recipe(method='bs'), tmp_path, device='cpu', micro_bs=0)
    with pytest.raises(FileNotFoundError, match='none'): run(Recipe('imagenet_lt', method='softmax'), tmp_path, root=tree/'none', device='cpu')
    with pytest.raises(FileNotFoundError, match='No lists ImageNet_LT_train.txt'): run(Recipe('imagenet_lt', method='softmax'), tmp_path, root=tree, device='cpu')
    with pytest.raises(ValueError, match='No weights of resnet8 are published'): run(Recipe(tree, method='softmax', weights='DEFAULT', **SMALL), tmp_path, device='cpu')
    with pytest.raises(ValueError, match='cannot be cut, leave out micro_bs'): run(Recipe(tree, method='lade', **SMALL), tmp_path, device='cpu', workers=0, micro_bs=4)
