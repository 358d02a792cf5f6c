"Detectors with the balanced loss: every method runs, odd batches, runs that are killed, two processes"
import copy, json, os, signal, subprocess, sys, threading
import pytest, torch
from functools import partial
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from fastai.learner import Learner, load_learner
from fastai.optimizer import OptimWrapper
from balms.baselines import LDAM, SigmoidEqualization
from balms.core import BalancedSigmoid
from balms.instance_seg import SEG_METHODS, BoxClassifierOnly, InstanceSeg, RoIReweighter, SegMethod, _plain_sigmoid, box_classifier_learner, detect, mask_rcnn, region_weights, reweighting_gradient, sigmoid_residual, sum_losses, use_loss
from balms.lvis import digit_scenes, instance_dls, read_annotations
from balms.meta import inner_step
from balms.recipes import Interrupted, TrainOnly, read_ledger
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
    a = region_weights(torch.tensor([0, 1, 4]), w)
    assert a[0] == 1 and torch.allclose(a[1:], w[[0, 3]]/w[[0, 3]].mean())


def test_a_class_without_images_is_named_and_can_be_given_a_count(scenes, tmp_path):
    d = json.loads((scenes/'digits_train.json').read_text())
    d['categories'].append(dict(id=11, name='unseen', frequency='r', image_count=0, instance_count=0))
    v = json.loads((scenes/'digits_val.json').read_text()); v['categories'] = d['categories']
    for name, o in (('t.json', d), ('v.json', v)): (tmp_path/name).write_text(json.dumps(o))
    where = dict(train=tmp_path/'t.json', valid=tmp_path/'v.json', images=scenes, out=tmp_path)
    with pytest.raises(ValueError, match=r'no samples in classes \[10\]'): run_instance_seg(recipe('bs'), **where)
    assert run_instance_seg(recipe('bs', min_images=.5), **where)['per_class'][10] is None
    (tmp_path/'v.json').write_text(json.dumps(dict(v, info=dict(year=2026))))
    with pytest.raises(ValueError, match='of another content'): run_instance_seg(recipe('bs', min_images=.5), **where)


def test_images_without_objects_train():
    net = small_net(_plain_sigmoid(torch.ones(4), 10))
    losses = net(*nothing())
    assert all(torch.isfinite(v) for v in losses.values()) and losses['loss_classifier'] > 0
    sum(losses.values()).backward()


def test_without_foreground_the_weights_have_no_gradient():
    f, head, y = torch.randn(8, 3), torch.nn.Linear(3, 4), torch.zeros(8, dtype=torch.long)
    opt = torch.optim.SGD(head.parameters(), .1)
    with torch.no_grad(): g = reweighting_gradient(list(head.parameters()), f, torch.randn(8, 4), y, region_weights(y, torch.rand(4)), f, y, partial(inner_step, opt))
    assert torch.equal(g, torch.zeros(4))


class Pool:
    "Means over threads that stand for ranks"
    def __init__(self, n): self.slots, self.barrier, self.own = [None]*n, threading.Barrier(n), threading.local()
    def __call__(self, t):
        self.slots[self.own.rank] = t; self.barrier.wait()
        mean = torch.stack(self.slots).mean(0); self.barrier.wait()
        return mean
    def run(self, f):
        def go(i): self.own.rank = i; out[i] = f(i)
        out = [None]*len(self.slots)
        threads = [threading.Thread(target=go, args=(i,)) for i in range(len(out))]
        for t in threads: t.start()
        for t in threads: t.join()
        return out


def test_ranks_with_unequal_foreground_have_the_gradient_of_the_whole():
    torch.manual_seed(0)
    k, d, n = 4, 5, 40
    f, fm = torch.randn(2, n, d).double(), torch.randn(2, 20, d).double()
    y, ym = torch.randint(1, k + 1, (2, n)), torch.randint(k + 1, (2, 20))
    y[0, 30:], y[1, 5:] = 0, 0
    loss, plain = BalancedSigmoid([9, 5, 2, 1], total=20, reduction='none').double(), BalancedSigmoid([9, 5, 2, 1], total=20, tau=0., reduction='none').double()
    rows = lambda l, z, y: l(z, (y - 1) % (k + 1))
    head, w = torch.nn.Linear(d, k).double(), torch.randn(k).double().requires_grad_()
    params, opt = list(head.parameters()), torch.optim.SGD(head.parameters(), .5)
    pooled = torch.where(y > 0, torch.cat([w.new_ones(1), w.sigmoid()])[y], 1.)
    pooled = torch.where(y > 0, pooled/pooled[y > 0].mean(), pooled)
    grads = torch.autograd.grad((torch.stack([rows(loss, head(f[r]), y[r]) for r in (0, 1)])*pooled).mean(), params, create_graph=True)
    new = [p - .5*g for p, g in zip(params, grads)]
    exact = torch.autograd.grad(torch.stack([rows(plain, torch.nn.functional.linear(fm[r], *new), ym[r]) for r in (0, 1)]).mean(), w)[0]
    pool = Pool(2)
    def rank(r):
        a = region_weights(y[r], w.detach().sigmoid(), pool)
        z = head(f[r]).detach().requires_grad_()
        dz = torch.autograd.grad((rows(loss, z, y[r])*a).mean(), z)[0]
        with torch.no_grad(): return a, reweighting_gradient(params, f[r], dz, y[r], a, fm[r], ym[r], partial(inner_step, opt), [g.detach() for g in grads], pool)
    (a0, g0), (a1, g1) = pool.run(rank)
    assert torch.allclose(torch.stack([a0, a1]), pooled.detach()) and torch.allclose(torch.cat([a0[y[0] > 0], a1[y[1] > 0]]).mean(), torch.ones(1).double())
    for g in (g0, g1): assert torch.allclose(g*(1 - w.detach().sigmoid()), exact, atol=1e-12)


class Stop(Callback):
    order = 99
    def after_batch(self): raise KeyboardInterrupt


def learner(scenes, net, n=2, **kw):
    anns = read_annotations(scenes/'digits_train.json', scenes)
    learn = Learner(instance_dls(anns, anns, bs=2, n_batches=n, **kw), net, loss_func=sum_losses, opt_func=partial(OptimWrapper, opt=torch.optim.SGD), cbs=[InstanceSeg(), TrainOnly()])
    learn.create_mbar, learn.logger = False, lambda *_: None
    return learn


def fit(learn, *cbs):
    with learn.no_bar(): learn.fit(1, .01, cbs=list(cbs))


def test_a_fit_that_is_broken_off_leaves_nothing_behind(scenes):
    loss = lambda: SEG_METHODS['bs'].loss(torch.ones(10), 20)
    learn = learner(scenes, small_net(None, 10))
    trained = {n for n, p in learn.model.named_parameters() if p.requires_grad}
    box_classifier_learner(learn, loss()); box_classifier_learner(learn, loss())
    assert sum(isinstance(cb, BoxClassifierOnly) for cb in learn.cbs) == 1
    with pytest.raises(KeyboardInterrupt): fit(learn, rw := RoIReweighter(), Stop())
    heads = learn.model.roi_heads
    assert heads.row_weights is None and heads.watch is None and rw.now is None
    copy.deepcopy(learn.model)
    fit(learn)
    assert not heads.classifier_only and {n for n, p in learn.model.named_parameters() if p.requires_grad} == trained
    with pytest.raises(KeyboardInterrupt): fit(learn, Stop())
    learn.remove_cb(BoxClassifierOnly)
    assert not heads.classifier_only and {n for n, p in learn.model.named_parameters() if p.requires_grad} == trained
    before = heads.mask_head[0][0].weight.clone()
    learn.create_opt(); fit(learn)
    assert not torch.equal(before, heads.mask_head[0][0].weight)


def test_a_reweighter_checks_each_fit_and_begins_anew_with_another_network(scenes):
    rw, loss = RoIReweighter(lr=.1), SEG_METHODS['bs'].loss(torch.ones(10), 20)
    one = box_classifier_learner(learner(scenes, small_net(None, 10)), loss)
    fit(one, rw); w = rw.psi.w.clone()
    fit(one, rw); assert not torch.equal(w, rw.psi.w) and rw.n_steps == 4
    with pytest.raises(ValueError, match='all that is trained'): fit(learner(scenes, small_net(None, 10)), rw)
    other = box_classifier_learner(learner(scenes, small_net(None, 12)), SEG_METHODS['bs'].loss(torch.ones(12), 20))
    fit(other, rw); assert len(rw.psi.w) == 12 and rw.n_steps == 2
    with pytest.raises(ValueError, match='GradientAccumulation'): fit(other, RoIReweighter(), GradientAccumulation(4))
    with pytest.raises(ValueError, match='Two RoIReweighters'): fit(other, RoIReweighter(), RoIReweighter())
    with pytest.raises(ValueError, match='no batches'): fit(other, RoIReweighter(meta_dl=[]))


def test_a_meta_loader_goes_on_where_it_was(scenes):
    anns = read_annotations(scenes/'digits_train.json', scenes)
    meta = lambda: instance_dls(anns, bs=2, n_batches=3, seed=7).train
    class Seen(RoIReweighter):
        def _meta_regions(self):
            f, y = super()._meta_regions()
            seen.append(f.clone())
            return f, y
    def learn(n): return box_classifier_learner(learner(scenes, small_net(None, 10), n, seed=1, flip=False), SEG_METHODS['bs'].loss(torch.ones(10), 20))
    torch.manual_seed(0); seen = []
    fit(learn(5), rw := Seen(meta_dl=meta())); whole, seen = seen, []
    assert torch.equal(rw.history[0][1], torch.full((10,), .5))       # the start is recorded as it was
    torch.manual_seed(0)
    one = learn(3); fit(one, rw := Seen(meta_dl=meta())); state, random = rw.state_dict(), torch.get_rng_state()
    rw = Seen(meta_dl=meta()); rw.load_state_dict(state)
    two = learn(2); two.model.load_state_dict(one.model.state_dict()); two.opt.load_state_dict(one.opt.state_dict()); two.dls.train.load_state_dict(one.dls.train.state_dict())
    torch.set_rng_state(random)
    fit(two, rw)
    assert len(seen) == len(whole) == 5 and all(torch.equal(a, b) for a, b in zip(seen, whole))


def test_detections_come_one_batch_at_a_time(scenes):
    learn = learner(scenes, small_net(None, 10))
    found = detect(learn.model, learn.dls.valid)
    learn.model.train()
    next(found)
    assert not learn.model.training
    found.close()
    assert learn.model.training


def test_another_number_of_classes_gets_masks_for_them():
    net = use_loss(small_net(None, 5), 10)
    images, targets = nothing(1)
    targets[0].update(boxes=torch.tensor([[5., 5, 40, 40]]), labels=torch.tensor([10]), masks=torch.ones(1, 64, 64, dtype=torch.uint8))
    assert torch.isfinite(net(images, targets)['loss_mask'])


def test_a_refused_loss_changes_nothing(scenes):
    learn = learner(scenes, small_net(None, 10))
    with pytest.raises(ValueError, match='reduction'): box_classifier_learner(learn, BalancedSigmoid([1]*10, total=20), scales=True)
    assert type(learn.model.roi_heads.box_predictor.cls_score) is torch.nn.Linear


def test_export_takes_no_data_along(scenes, tmp_path):
    learn = learner(scenes, small_net(None, 10))
    learn.path = tmp_path
    learn.export('d.pkl')
    again = load_learner(tmp_path/'d.pkl')
    assert len(again.dls.train_ds) == 0 and len(again.model.eval()([torch.rand(3, 64, 64)])[0]['boxes']) <= 300


def test_sigmoid_residual_is_the_gradient():
    z, y = torch.randn(7, 4, requires_grad=True), torch.tensor([0, 1, 2, 3, 4, 4, 0])
    BalancedSigmoid([4, 3, 2, 1], tau=0., total=20, reduction='sum')(z, y).backward()
    assert torch.allclose(sigmoid_residual(z.detach(), y), z.grad, atol=1e-6)


def test_autocast_computes_the_classification_loss_in_float32():
    net = small_net(_plain_sigmoid(torch.ones(4), 10))
    with torch.autocast('cpu', torch.bfloat16): losses = net(*nothing())
    assert losses['loss_classifier'].dtype == torch.float32 and torch.isfinite(losses['loss_classifier'])


def test_boxes_are_float32_under_autocast():
    net = small_net(_plain_sigmoid(torch.ones(4), 10)).eval()
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16): b = net([torch.rand(3, 64, 64)])[0]['boxes']
    assert b.dtype == torch.float32 and len(b) and (b != b.bfloat16().float()).float().mean() > .5     # not rounded to a few places


def test_a_meta_batch_of_its_own_in_a_recipe(scenes, tmp_path):
    r = recipe('balms', meta_bs=2)
    assert r.first == recipe('sigmoid') and r.key != recipe('balms').key
    with pytest.raises(Interrupted): run_instance_seg(r, **files(scenes), out=tmp_path/'b', stop_at=ITERS['iters'] + 2)
    a, b = (run_instance_seg(r, **files(scenes), out=tmp_path/o) for o in 'ab')
    assert a['r'] == b['r'] and a['AP'] == b['AP'] and a['changed']['meta_bs'] == 2
    with pytest.raises(ValueError, match='no learned weights'): recipe('bs', meta_bs=2)


def test_a_method_of_ones_own(scenes, tmp_path, monkeypatch):
    weighed = dict(n=0)
    def weights(n): weighed['n'] += 1; return torch.arange(1., 11)
    monkeypatch.setitem(SEG_METHODS, 'mine', SegMethod('Mine', SEG_METHODS['bs'].loss, 'sigmoid', weights=weights))
    run_instance_seg(recipe('mine'), **files(scenes), out=tmp_path)
    assert weighed['n'] == 1
    assert type(load_detector(recipe('mine'), scenes/'digits_train.json', tmp_path).roi_heads.loss_func) is BalancedSigmoid
    monkeypatch.setitem(SEG_METHODS, 'odd', SegMethod('Odd', SEG_METHODS['softmax'].loss, 'sigmoid', background=True))
    with pytest.raises(ValueError, match='starts from Sigmoid'): run_instance_seg(recipe('odd'), **files(scenes), out=tmp_path)


def test_faster_rcnn_takes_the_loss():
    from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn
    torch.manual_seed(0)
    net = use_loss(fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=5), 4, BalancedSigmoid([4, 3, 2, 1], total=20, reduction='none'))
    images, targets = nothing(1)
    targets[0].update(boxes=torch.tensor([[5., 5, 40, 40]]), labels=torch.tensor([3]))
    assert all(torch.isfinite(v) for v in net(images, targets).values())


def test_the_reweighter_says_what_it_needs(scenes):
    for net, what in ((small_net(None, 10), 'all that is trained'), (small_net(SEG_METHODS['softmax'].loss(torch.ones(10), 20), 10), 'without background')):
        with pytest.raises(ValueError, match=what): fit(learner(scenes, net), RoIReweighter())


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
def noted(learn, valid, how, *args):
    state = learn.model.state_dict()
    (out/f'rank{{how.ranks.rank}}.json').write_text(json.dumps([float(v.double().sum()) for v in state.values()] + [float(v.double().norm()) for v in state.values()]))
    return evaluate(learn, valid, how, *args)
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
