"Runs of instance segmentation: every method, runs that are killed, two processes, the command"
import json, os, signal, subprocess, sys
import pytest, torch
from balms.checkpoint import Interrupted
from balms.detection_recipe import DetectionRecipe
from balms.detection_runs import detection_table, load_detector, run_detection
from balms.detector import SEG_METHODS, SegMethod
from balms.instance_data import digit_scenes
from balms.rows import read_row, read_rows
from balms.sigmoid import BalancedSigmoid
from balms.weights import read_tensors

STAGE1, STAGE2 = dict(preset='small', iters=6, drops=(4,), warmup=2), dict(iters2=4, drops2=(3,))
CLASSIFIER = ['roi_heads.box_predictor.cls_score.weight', 'roi_heads.box_predictor.cls_score.bias']


@pytest.fixture(scope='module')
def scenes(tmp_path_factory): return digit_scenes(tmp_path_factory.mktemp('scenes'), n=30, n_valid=6)


def files(root): return dict(train=root/'digits_train.json', valid=root/'digits_val.json', images=root)


def recipe(method, **changes):
    stage2 = STAGE2 if SEG_METHODS[method].stage1 else {}
    return DetectionRecipe('digit scenes', method, **(STAGE1 | stage2 | changes))


def model_of(out, recipe): return read_tensors(out/recipe.key/'model.safetensors')


def different(a, b): return [name for name in a if not torch.equal(a[name], b[name])]


def test_every_method_of_table_4_trains_and_can_be_loaded(scenes, tmp_path):
    heads = {}
    for name in SEG_METHODS:
        row = run_detection(recipe(name), **files(scenes), out=tmp_path)
        assert row['AP'] is not None and row['APb'] is not None and len(row['per_class']) == 10
        net = load_detector(recipe(name), scenes/'digits_train.json', tmp_path)
        heads[name] = net.roi_heads.box_predictor.cls_score
        assert len(net([torch.rand(3, 96, 96)])[0]['scores']) <= 300
    outputs = {name: 10 + method.background for name, method in SEG_METHODS.items()}
    assert {name: head.out_features for name, head in heads.items()} == outputs
    special = {name: type(head).__name__ for name, head in heads.items() if type(head) is not torch.nn.Linear}
    assert special == dict(ldam='CosineLinear', lws='ScaledLinear')
    for name in ('bs', 'balms'):
        stage1, stage2 = (model_of(tmp_path, r) for r in (recipe(name).stage1, recipe(name)))
        assert sorted(different(stage1, stage2)) == sorted(CLASSIFIER)
    assert len(read_rows(tmp_path)) == len(SEG_METHODS)
    assert run_detection(recipe('balms'), **files(scenes), out=tmp_path) == read_row(tmp_path/recipe('balms').key)
    assert DetectionRecipe(**read_row(tmp_path/recipe('balms').key)['recipe']) == recipe('balms')


def test_a_class_without_images_is_named_and_can_be_given_a_count(scenes, tmp_path):
    train, valid = (json.loads((scenes/f'digits_{split}.json').read_text()) for split in ('train', 'val'))
    train['categories'].append(dict(id=11, name='unseen', frequency='r', image_count=0, instance_count=0))
    valid['categories'] = train['categories']
    (tmp_path/'t.json').write_text(json.dumps(train))
    (tmp_path/'v.json').write_text(json.dumps(valid))
    where = dict(train=tmp_path/'t.json', valid=tmp_path/'v.json', images=scenes, out=tmp_path/'runs')
    with pytest.raises(ValueError, match="'unseen'"): run_detection(recipe('bs'), **where)
    assert run_detection(recipe('bs', min_images=.5), **where)['per_class'][10] is None
    (tmp_path/'v.json').write_text(json.dumps(dict(valid, info=dict(year=2026))))
    with pytest.raises(ValueError, match='valid_crc'): run_detection(recipe('bs', min_images=.5), **where)


def test_a_meta_batch_of_its_own(scenes, tmp_path):
    r = recipe('balms', meta_bs=2)
    assert r.stage1 == recipe('sigmoid') and r.key != recipe('balms').key
    stopped = STAGE1['iters'] + 2
    with pytest.raises(Interrupted): run_detection(r, **files(scenes), out=tmp_path/'b', stop_at=stopped)
    a, b = (run_detection(r, **files(scenes), out=tmp_path/out) for out in 'ab')
    assert a['r'] == b['r'] and a['AP'] == b['AP'] and a['changed']['meta_bs'] == 2


def test_a_method_of_ones_own(scenes, tmp_path, monkeypatch):
    calls = []
    def weights(n):
        calls.append(n)
        return torch.arange(1., 11)
    monkeypatch.setitem(SEG_METHODS, 'mine', SegMethod('Mine', SEG_METHODS['bs'].loss, 'sigmoid', weights=weights))
    run_detection(recipe('mine'), **files(scenes), out=tmp_path)
    assert len(calls) == 2                                               # before training, and in stage 2
    net = load_detector(recipe('mine'), scenes/'digits_train.json', tmp_path)
    assert type(net.roi_heads.loss_func) is BalancedSigmoid
    odd = SegMethod('Odd', SEG_METHODS['softmax'].loss, 'sigmoid', background=True)
    monkeypatch.setitem(SEG_METHODS, 'odd', odd)
    with pytest.raises(ValueError, match='Odd starts from Sigmoid'):
        run_detection(recipe('odd'), **files(scenes), out=tmp_path)


KILLED = '''
import os, signal, sys
from pathlib import Path
from balms import checkpoint
from balms.detection_runs import DetectionRecipe, run_detection
root, out, stage, step = Path(sys.argv[1]), *sys.argv[2:4], int(sys.argv[4])
save = checkpoint.save_checkpoint
def save_and_die(folder, state):
    save(folder, state)
    if stage in str(folder) and state['step'] >= step: os.kill(os.getpid(), signal.SIGKILL)
if step: checkpoint.save_checkpoint = save_and_die
recipe = DetectionRecipe('digit scenes', 'balms', 'small', iters=8, drops=(6,), iters2=8, drops2=(6,))
run_detection(recipe, root/'digits_train.json', root/'digits_val.json', root, out, every=0., device='cpu')
'''


@pytest.mark.slow
def test_killed_in_both_stages_it_ends_with_the_same_bits(scenes, tmp_path):
    script = tmp_path/'run.py'
    script.write_text(KILLED)
    def go(out, stage='none', step=0):
        args = [sys.executable, script, scenes, tmp_path/out, stage, str(step)]
        return subprocess.run(args, capture_output=True, text=True)
    assert go('whole').returncode == 0
    for stage, step in (('sigmoid', 3), ('sigmoid', 5), ('balms', 2), ('balms', 5)):
        assert go('killed', stage, step).returncode == -signal.SIGKILL
    r = go('killed')
    assert r.returncode == 0, r.stderr
    (a,), (b,) = (read_rows(tmp_path/out) for out in ('whole', 'killed'))
    assert all(a[k] == b[k] for k in ('AP', 'APb', 'r', 'key', 'per_class'))
    a, b = (read_tensors(tmp_path/out/a['key']/'model.safetensors') for out in ('whole', 'killed'))
    assert not different(a, b)


TWO_PROCESSES = '''
import json, sys
from pathlib import Path
import torch.distributed as dist
from balms import detection_runs
root, out = Path(sys.argv[1]), Path(sys.argv[2])
detect = detection_runs.detect
def noted(model, dl):
    sums = [float(v.double().sum()) for v in model.state_dict().values()]
    (out/f'weights{dist.get_rank()}.json').write_text(json.dumps(sums))
    return detect(model, dl)
detection_runs.detect = noted
recipe = detection_runs.DetectionRecipe('digit scenes', 'balms', 'small', iters=4, drops=(3,), iters2=4, drops2=(3,))
files = root/'digits_train.json', root/'digits_val.json', root
row = detection_runs.run_detection(recipe, *files, out/'runs', device='cpu')
(out/f'row{dist.get_rank()}.json').write_text(json.dumps(row))
'''


def test_two_processes_have_the_same_weights_and_one_row(scenes, tmp_path):
    script = tmp_path/'run.py'
    script.write_text(TWO_PROCESSES)
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']
    r = subprocess.run([*torchrun, str(script), str(scenes), str(tmp_path)], capture_output=True, text=True,
                       env=dict(os.environ, OMP_NUM_THREADS='1'), timeout=300)
    assert r.returncode == 0, r.stderr[-3000:]
    read = lambda name: [json.loads((tmp_path/f'{name}{i}.json').read_text()) for i in (0, 1)]
    weights, rows = read('weights'), read('row')
    assert weights[0] == weights[1] and all(torch.isfinite(torch.tensor(weights[0])))
    assert rows[0] == rows[1] and [rows[0]] == read_rows(tmp_path/'runs')
    assert rows[0]['environments'][0]['processes'] == 2 and len(set(rows[0]['r'])) > 1


def test_the_command(scenes, tmp_path):
    def go(*options):
        args = [scenes/'digits_train.json', scenes/'digits_val.json', scenes, '--preset', 'small', '--iters', '2',
                '--out', tmp_path, '--device', 'cpu', *options]
        command = [sys.executable, '-m', 'balms.detection_cli', *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True)
    r = go('--method', 'sigmoid,balms', '--iters2', '2')
    assert r.returncode == 0 and 'balms seed 0' in r.stdout and '| BALMS, iters=2, iters2=2' in r.stdout, r.stderr
    classes = (tmp_path/'digits_train-small-classes.csv').read_text()
    assert classes.startswith('class,group,training images,sigmoid,balms')
    for wrong, what in ((['--method', 'best'], 'softmax'), (['--iters2', '2', '--method', 'sigmoid'], 'iters2')):
        r = go(*wrong)
        assert r.returncode == 2 and what in r.stderr and 'Traceback' not in r.stderr


def test_boxes_alone(scenes, tmp_path):
    "Without outlines a Faster R-CNN is trained, and AP is that of boxes"
    content = json.loads((scenes/'digits_train.json').read_text())
    for a in content['annotations']: del a['segmentation'], a['area']
    (tmp_path/'boxes.json').write_text(json.dumps(content))
    r = recipe('bs', boxes_only=True)
    row = run_detection(r, tmp_path/'boxes.json', tmp_path/'boxes.json', scenes, tmp_path/'runs', 'cpu')
    assert row['AP'] is None and row['APb'] is not None and len(row['per_class']) == 10
    assert not any('mask' in name for name in model_of(tmp_path/'runs', r))
    assert 'AP_b |' in detection_table([row], 'digit scenes', 'small', changed=True)
    assert 'masks' not in load_detector(r, tmp_path/'boxes.json', tmp_path/'runs')([torch.rand(3, 96, 96)])[0]
    assert recipe('bs').key == recipe('bs', boxes_only=None).key != r.key


def test_small_runs_never_stand_beside_the_paper():
    recipe = dict(data='lvis_v0.5', preset='small', method='bs', seed=0)
    small = dict(key='x', recipe=recipe, changed={}, environments=[])
    small.update(dict.fromkeys(('AP', 'APr', 'APc', 'APf', 'APb'), 1.))
    table = detection_table([small])
    assert '1.0' not in table and '*missing* / 26.3' in table and ' / ' not in detection_table([small], preset='small')
    changed = dict(small, recipe=dict(recipe, preset='paper'), changed={'lr': 1})
    assert '*missing* / 26.3' in detection_table([changed])
    bfloat16 = dict(small, recipe=dict(recipe, preset='paper'), environments=[dict(precision='bfloat16')])
    assert 'Balanced Softmax, bfloat16 | 1.0 / 26.3' in detection_table([bfloat16])


def test_a_row_of_images_is_named_in_a_table_of_detection():
    row = dict(key='of-images', recipe=dict(data='x', preset='small', method='bs'), changed={}, environments=[])
    with pytest.raises(ValueError, match='of-images'): detection_table([row], 'x', 'small')
