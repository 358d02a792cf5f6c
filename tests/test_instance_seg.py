"Detectors with the balanced loss: every method runs, odd batches, runs that are killed, two processes"
import json, os, signal, subprocess, sys, time
import pytest, torch
from functools import partial
from balms.baselines import LDAM, SigmoidEqualization
from balms.core import BalancedSigmoid
from balms.instance_seg import SEG_METHODS, RoIReweighter, _plain_sigmoid, mask_rcnn, region_weights, reweighting_gradient, sigmoid_residual
from balms.lvis import digit_scenes, read_annotations
from balms.meta import inner_step
from balms.recipes import read_ledger
from balms.seg_runs import SegRecipe, load_detector, run_instance_seg, seg_table

ITERS = dict(preset='small', iters=6, drops=(4,), warmup=2)
SECOND = dict(iters2=4, drops2=(3,))


@pytest.fixture(scope='module')
def scenes(tmp_path_factory): return digit_scenes(tmp_path_factory.mktemp('scenes'), n=30, n_valid=6)


def files(root): return dict(train=root/'digits_train.json', valid=root/'digits_val.json', images=root)


def recipe(method, **kw): return SegRecipe('digit scenes', method, **{**ITERS, **(SECOND if SEG_METHODS[method].stage1 else {}), **kw})


def small_net(loss, k=4, **kw):
    torch.manual_seed(0)
    return mask_rcnn(k, loss, backbone='resnet18', width=32, norm_layer=partial(torch.nn.GroupNorm, 8), min_size=64, max_size=128, anchors=(8, 16, 24, 32, 64), box_batch_size_per_image=16, rpn_post_nms_top_n_train=50, **kw)


def nothing(n=2): return [torch.rand(3, 64, 64) for _ in range(n)], [dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long), masks=torch.zeros(0, 64, 64, dtype=torch.uint8)) for _ in range(n)]


def test_every_method_of_table_4_trains_and_can_be_loaded(scenes, tmp_path):
    heads = {}
    for method in SEG_METHODS:
        row = run_instance_seg(recipe(method), **files(scenes), out=tmp_path)
        assert row['AP'] is not None and row['APb'] is not None and len(row['per_class']) == 10
        net = load_detector(recipe(method), scenes/'digits_train.json', tmp_path)
        heads[method] = net.roi_heads.box_predictor.cls_score
        assert len(net([torch.rand(3, 96, 96)])[0]['scores']) <= 300
    assert {m: h.out_features for m, h in heads.items()} == {m: 10 + s.background for m, s in SEG_METHODS.items()}
    assert {m: type(h).__name__ for m, h in heads.items() if type(h) is not torch.nn.Linear} == dict(ldam='CosineLinear', lws='ScaledLinear')
    one = torch.load(tmp_path/'instance_seg'/recipe('bs').first.key/'model.pt', weights_only=True)['model']
    for m in ('bs', 'balms'):
        two = torch.load(tmp_path/'instance_seg'/recipe(m).key/'model.pt', weights_only=True)['model']
        assert [n for n in one if not torch.equal(one[n], two[n])] == ['roi_heads.box_predictor.cls_score.weight', 'roi_heads.box_predictor.cls_score.bias']
    assert len(read_ledger(tmp_path/'instance_seg/ledger.jsonl')) == len(SEG_METHODS)
    assert run_instance_seg(recipe('balms'), **files(scenes), out=tmp_path)['key'] == recipe('balms').key and len(read_ledger(tmp_path/'instance_seg/ledger.jsonl')) == len(SEG_METHODS)


def test_the_losses_are_those_of_table_4():
    n, total = torch.tensor([50., 5, 2, 1]), 100
    loss = {m: s.loss(n, total) for m, s in SEG_METHODS.items()}
    z, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 4, 4])
    f = n/total
    assert torch.allclose(loss['bs'].shift, (f/(1 - f)).log(), atol=1e-5)
    by_hand = torch.nn.functional.binary_cross_entropy_with_logits(z + (f/(1 - f)).log()*(y < 4)[:, None], torch.nn.functional.one_hot(y, 5)[:, :4].float(), reduction='none').sum(1)
    assert torch.allclose(loss['bs'](z, y), by_hand, atol=1e-5) and torch.allclose(loss['balms'](z, y), by_hand, atol=1e-5)
    assert loss['ldam'].margin[0] == 0 and loss['ldam'].margin[1:].argmax() == 3 and isinstance(loss['ldam'], LDAM)
    assert isinstance(loss['eql'], SigmoidEqualization) and loss['eql'].threshold == 1.76e-3
    w = SEG_METHODS['class_balanced'].weights(n)
    assert (w.diff() > 0).all()
    a = region_weights(torch.tensor([0, 1, 4]), w, normalize=False)
    assert a[0] == 1 and torch.equal(a[1:], w[[0, 3]])


def test_a_class_without_images_is_named_and_can_be_given_a_count(scenes, tmp_path):
    d = json.loads((scenes/'digits_train.json').read_text())
    d['categories'].append(dict(id=11, name='unseen', frequency='r', image_count=0, instance_count=0))
    v = json.loads((scenes/'digits_val.json').read_text()); v['categories'] = d['categories']
    for name, o in (('t.json', d), ('v.json', v)): (tmp_path/name).write_text(json.dumps(o))
    where = dict(train=tmp_path/'t.json', valid=tmp_path/'v.json', images=scenes, out=tmp_path)
    with pytest.raises(ValueError, match=r'no samples in classes \[10\]'): run_instance_seg(recipe('bs'), **where)
    assert run_instance_seg(recipe('bs', min_images=.5), **where)['per_class'][10] is None


def test_images_without_objects_train():
    net = small_net(_plain_sigmoid(torch.ones(4), 10))
    losses = net(*nothing())
    assert all(torch.isfinite(v) for v in losses.values()) and losses['loss_classifier'] > 0
    sum(losses.values()).backward()


def test_a_step_without_foreground_leaves_the_weights_alone():
    f, head, y = torch.randn(8, 3), torch.nn.Linear(3, 4), torch.zeros(8, dtype=torch.long)
    opt = torch.optim.SGD(head.parameters(), .1)
    with torch.no_grad(): g = reweighting_gradient(list(head.parameters()), f, torch.randn(8, 4), y, region_weights(y, torch.rand(4)), f, y, partial(inner_step, opt))
    assert not g.isfinite().all()                                     # and `after_backward` takes no such step


def test_sigmoid_residual_is_the_gradient():
    z, y = torch.randn(7, 4, requires_grad=True), torch.tensor([0, 1, 2, 3, 4, 4, 0])
    BalancedSigmoid([4, 3, 2, 1], tau=0., total=20, reduction='sum')(z, y).backward()
    assert torch.allclose(sigmoid_residual(z.detach(), y), z.grad, atol=1e-6)


def test_autocast_computes_the_classification_loss_in_float32():
    net = small_net(_plain_sigmoid(torch.ones(4), 10))
    with torch.autocast('cpu', torch.bfloat16): losses = net(*nothing())
    assert losses['loss_classifier'].dtype == torch.float32 and torch.isfinite(losses['loss_classifier'])


def test_the_reweighter_says_what_it_needs(scenes):
    from fastai.learner import Learner
    from balms.instance_seg import InstanceSeg, sum_losses
    from balms.lvis import instance_dls
    anns = read_annotations(scenes/'digits_train.json', scenes)
    dls = instance_dls(anns, anns, bs=2, n_batches=1)
    for net, what in ((small_net(None, 10), 'all that is trained'), (small_net(SEG_METHODS['softmax'].loss(torch.ones(10), 20), 10), 'without background')):
        learn = Learner(dls, net, loss_func=sum_losses, cbs=[InstanceSeg()])
        with learn.no_bar(), learn.no_logging(), pytest.raises(ValueError, match=what): learn.fit(1, 1e-3, cbs=[RoIReweighter()])


def model_of(out, key): return torch.load(out/'instance_seg'/key/'model.pt', weights_only=True)['model']


def command(root, out, *more): return [sys.executable, '-m', 'balms.seg_runs', '--train', str(root/'digits_train.json'), '--valid', str(root/'digits_val.json'), '--images', str(root), '--data', 'digit scenes',
                                       '--preset', 'small', '--method', 'balms', '--iters', '20', '--iters2', '20', '--out', str(out), '--device', 'cpu', *more]


def test_killed_in_both_stages_it_ends_with_the_same_bits(scenes, tmp_path):
    script = tmp_path/'run.py'
    script.write_text(f'''
import sys, os, signal
from balms import recipes
from balms.seg_runs import SegRecipe, run_instance_seg
from pathlib import Path
kill_at = int(sys.argv[2])
save, n = recipes._save, [0]
def saved(path, state):
    save(path, state)
    n[0] += 1
    if kill_at and state['step'] >= kill_at % 100 and ('balms' in str(path)) == (kill_at > 100): os.kill(os.getpid(), signal.SIGKILL)
recipes._save = saved
root = Path({str(scenes)!r})
run_instance_seg(SegRecipe('digit scenes', 'balms', 'small', iters=8, drops=(6,), iters2=8, drops2=(6,)), root/'digits_train.json', root/'digits_val.json', root, sys.argv[1], every=0., device='cpu')
''')
    go = lambda out, kill: subprocess.run([sys.executable, script, str(tmp_path/out), str(kill)], capture_output=True, text=True)
    assert go('whole', 0).returncode == 0
    for kill in (3, 5, 102, 105): assert go('killed', kill).returncode == -signal.SIGKILL
    r = go('killed', 0)
    assert r.returncode == 0, r.stderr
    a, b = (read_ledger(tmp_path/o/'instance_seg/ledger.jsonl')[-1] for o in ('whole', 'killed'))
    assert {k: a[k] for k in ('AP', 'APb', 'r', 'key', 'per_class')} == {k: b[k] for k in ('AP', 'APb', 'r', 'key', 'per_class')}
    a, b = (model_of(tmp_path/o, a['key']) for o in ('whole', 'killed'))
    assert all(torch.equal(v, b[n]) for n, v in a.items())


def test_two_processes_have_the_same_weights_and_one_row(scenes, tmp_path):
    script = tmp_path/'run.py'
    script.write_text(f'''
import json, sys, torch.distributed as dist
from pathlib import Path
from balms import seg_runs
root, out = Path({str(scenes)!r}), Path({str(tmp_path)!r})
evaluate = seg_runs._evaluate
def noted(learn, valid, how):
    state = learn.model.state_dict()
    (out/f'rank{{how.ranks.rank}}.json').write_text(json.dumps([float(v.double().sum()) for v in state.values()] + [float(v.double().norm()) for v in state.values()]))
    return evaluate(learn, valid, how)
seg_runs._evaluate = noted
row = seg_runs.run_instance_seg(seg_runs.SegRecipe('digit scenes', 'balms', 'small', iters=4, drops=(3,), iters2=4, drops2=(3,)), root/'digits_train.json', root/'digits_val.json', root, out, device='cpu')
(out/f'row{{dist.get_rank()}}.json').write_text(json.dumps(row))
''')
    env = dict(os.environ, OMP_NUM_THREADS='1')
    r = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', str(script)], capture_output=True, text=True, env=env, timeout=300)
    assert r.returncode == 0, r.stderr[-3000:]
    a, b = (json.loads((tmp_path/f'rank{i}.json').read_text()) for i in (0, 1))
    assert a == b and all(torch.isfinite(torch.tensor(a)))
    rows = read_ledger(tmp_path/'instance_seg/ledger.jsonl')
    assert len(rows) == 1 and rows[0]['processes'] == 2
    x, y = (json.loads((tmp_path/f'row{i}.json').read_text()) for i in (0, 1))
    assert x['AP'] == y['AP'] and x['r'] == y['r'] and len(set(x['r'])) > 1


def test_the_command(scenes, tmp_path):
    r = subprocess.run([*command(scenes, tmp_path)[:-2], '--device', 'cpu', '--iters', '2', '--iters2', '2'], capture_output=True, text=True)
    assert r.returncode == 0 and 'digit scenes balms seed 0: AP_m' in r.stdout, r.stderr
    r = subprocess.run(command(scenes, tmp_path, '--method', 'best'), capture_output=True, text=True)
    assert r.returncode == 2 and 'choose from softmax' in r.stderr and 'Traceback' not in r.stderr


def test_small_runs_never_stand_beside_the_paper():
    row = dict(recipe=dict(data='lvis_v0.5', preset='small', method='bs'), changed={}, AP=1., APr=1., APc=1., APf=1., APb=1.)
    assert '1.0' not in seg_table([row]) and '*missing* / 26.3' in seg_table([row]) and ' / ' not in seg_table([row], preset='small')
    assert '*missing* / 26.3' in seg_table([dict(row, recipe=dict(row['recipe'], preset='paper'), changed={'lr': 1})])
