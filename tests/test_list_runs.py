"Recipes on images in lists: killed and resumed with workers, packs, cut batches, what is refused."
import os, signal, subprocess, sys
import pytest, torch
from balms.core import class_counts
from balms.learner import recipe_learner
from balms.list_loader import load_lists
from balms.lists import sample_tree
from balms.packs import pack_images
from balms.recipe import Recipe
from balms.rows import read_row
from balms.runs import run
from balms.stage import Execution
from balms.weights import read_tensors

ENV = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore'}
SMALL = dict(model='resnet8', size=24, bs=16, iters=14)
SECOND = dict(SMALL, iters2=12)


@pytest.fixture(scope='module')
def tree(tmp_path_factory): return sample_tree(tmp_path_factory.mktemp('lists')/'digits', n_max=32, imbalance=16)


def model(out, r): return read_tensors(out/r.key/'model.safetensors')


def assert_same(a, b, r):
    x, y = model(a, r), model(b, r)
    assert all(torch.equal(x[k], y[k]) for k in x)
    p, q = read_row(a/r.key), read_row(b/r.key)
    assert all(p.get(k) == q.get(k) for k in ('overall', 'nll', 'p_y', 'per_class', 'counts', 'train_crc', 'r'))


def killed(out, r, at):
    "Start the run in a process, and end it with SIGKILL after the checkpoint of step `at` of its last stage"
    code = f'''
import os, signal
from balms.checkpoint import Checkpoint
from balms.recipe import Recipe
from balms.runs import run
save = Checkpoint.save
def save_and_die(self):
    save(self)
    if self.folder.name == {r.key!r} and self.step == {at}: os.kill(os.getpid(), signal.SIGKILL)
Checkpoint.save = save_and_die
run(Recipe(**{r.to_row()!r}), {str(out)!r}, device='cpu', workers=2, every=0)'''
    p = subprocess.run([sys.executable, '-c', code], env=ENV, capture_output=True, text=True, timeout=240)
    assert p.returncode == -signal.SIGKILL, p.stderr
    assert torch.load(out/r.key/'checkpoint.pt', weights_only=True)['step'] == at


@pytest.mark.parametrize('method,augment', [('bs', 'window'), ('balms', 'window'), ('lws', 'resize')])
def test_killed_with_workers_and_resumed(tree, tmp_path, method, augment):
    "SIGKILL in the middle of an epoch: weights, rates and scores are those of the run that was not killed, bit for bit"
    r = Recipe(tree, method=method, augment=augment, **(SMALL if method == 'bs' else SECOND))
    run(r, tmp_path/'a', device='cpu', workers=2)
    killed(tmp_path/'b', r, 5)
    run(r, tmp_path/'b', device='cpu', workers=2)
    assert_same(tmp_path/'a', tmp_path/'b', r)


def test_number_of_workers_changes_nothing_without_learned_rates(tree, tmp_path):
    r = Recipe(tree, method='crt', augment='window', **SECOND)
    for n in (0, 2): run(r, tmp_path/str(n), device='cpu', workers=n)
    assert_same(tmp_path/'0', tmp_path/'2', r)


def test_the_number_of_the_batch_is_what_makes_a_run_resumable(tree):
    "With the loader's count forgotten, windows are others"
    train, test = load_lists(tree)
    r, execution = Recipe(tree, method='softmax', augment='window', **SMALL), Execution(torch.device('cpu'), workers=0)
    a, b, c = (recipe_learner(r, train, test, class_counts(train), execution).dls.train for _ in range(3))
    batches = iter(a)
    next(batches)
    state = a.state_dict()
    want = next(batches)[0]
    b.load_state_dict(state)
    c.load_state_dict({**state, 'used': 0})
    assert torch.equal(next(iter(b))[0], want) and not torch.equal(next(iter(c))[0], want)


def test_packs(tree, tmp_path):
    "A pack of images that are small already gives what the files give; the pack of another list is refused"
    for split, ds in zip(('train', 'test'), load_lists(tree)): pack_images(ds, tmp_path/f'{split}.pack', num_workers=0)
    r, packs = Recipe(tree, method='softmax', **SMALL), {split: tmp_path/f'{split}.pack' for split in ('train', 'test')}
    a = run(r, tmp_path/'a', device='cpu', workers=0)
    b = run(r, tmp_path/'b', device='cpu', workers=0, pack=packs)
    assert a['nll'] == b['nll'] and a['train_crc'] != b['train_crc']
    assert a['images'] == 'files' and b['images'] == b['test_images'] == 'pack, short side 256, quality 95'
    with pytest.raises(ValueError, match='other images'): run(r, tmp_path/'a', device='cpu', pack=packs['train'])
    with pytest.raises(ValueError, match=r'test\.pack'): run(r, tmp_path/'c', device='cpu', pack=packs['test'])


def test_cut_batches(tree, tmp_path):
    "Stage 2 in pieces has the same classifier; stage 1, with batch normalisation, another network, and the row says so"
    r = Recipe(tree, method='balms', augment='plain', **SECOND)
    run(r, tmp_path/'a', device='cpu', workers=0)
    (tmp_path/'b').mkdir()
    (tmp_path/'b'/r.stage1.key).symlink_to(tmp_path/'a'/r.stage1.key)
    row = run(r, tmp_path/'b', device='cpu', workers=0, micro_bs=8)
    a, b = model(tmp_path/'a', r), model(tmp_path/'b', r)
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=1e-4, atol=1e-5)
    assert row['key'] == r.key and [e.get('micro_bs') for e in row['environments']] == [None, 8]
    whole, cut = (run(r.stage1, tmp_path/d, device='cpu', workers=0, micro_bs=n) for d, n in (('a', None), ('c', 8)))
    assert cut['key'] == whole['key'] and cut['nll'] != whole['nll']


@pytest.mark.parametrize('kw,what', [
    (dict(imbalance=10), 'imbalance'), (dict(preset='paper'), 'iters'),
    (dict(preset='code', iters=5, method='crt'), 'iters2'), (dict(augment='crop_flip'), "'crop_flip'"),
    (dict(model='resnet19'), "'resnet19'")])
def test_refused(tree, kw, what):
    with pytest.raises(ValueError, match=what): Recipe(tree, **{'method': 'softmax', **kw})


def test_refused_runs(tree, tmp_path):
    digits, lists = Recipe(method='bs'), dict(device='cpu', workers=0)
    with pytest.raises(ValueError, match='lists'): run(digits, tmp_path, device='cpu', lists=tree)
    with pytest.raises(ValueError, match='micro_bs'): run(digits, tmp_path, device='cpu', micro_bs=0)
    with pytest.raises(ValueError, match='micro_bs=24'): run(digits, tmp_path, device='cpu', micro_bs=24)
    imagenet = Recipe('imagenet_lt', method='softmax')
    for root, name in ((tree/'none', 'none'), (tree, 'ImageNet_LT_train.txt')):
        with pytest.raises(FileNotFoundError, match=name): run(imagenet, tmp_path, root=root, device='cpu')
    with pytest.raises(ValueError, match='resnet8'):
        run(Recipe(tree, method='softmax', weights='DEFAULT', **SMALL), tmp_path, **lists)
    for method, name in (('lade', 'LADE'), ('cbw', 'CBW'), ('ldam_drw', 'DRW')):
        with pytest.raises(ValueError, match=name):
            run(Recipe(tree, method=method, **SMALL), tmp_path, micro_bs=4, **lists)
