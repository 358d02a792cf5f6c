"Detectors with the balanced loss: losses of Table 4, odd batches, fits that are interrupted, the Meta Reweighter"
import copy, pickle, threading
from functools import partial
import pytest, torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.schedule import *
from fastai.callback.training import GradientAccumulation
from fastai.learner import Learner, load_learner
from fastai.optimizer import OptimWrapper
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn
from balms.baselines import LDAM
from balms.detector import SEG_METHODS, InstanceSeg, detect, mask_rcnn, sum_losses, use_loss
from balms.instance_data import digit_scenes, instance_dls
from balms.annotations import read_annotations
from balms.influence import trial_step
from balms.stage import TrainOnly
from balms.roi_reweighter import (
    BoxClassifierOnly, RoIReweighter, box_classifier_learner, region_weights, reweighting_gradient, sigmoid_residual)
from balms.sigmoid import BalancedSigmoid
from balms.sigmoid_baselines import SigmoidEqualization


@pytest.fixture(scope='module')
def scenes(tmp_path_factory): return digit_scenes(tmp_path_factory.mktemp('scenes'), n=30, n_valid=6)


def small_net(loss, k=4):
    torch.manual_seed(0)
    return mask_rcnn(k, loss, backbone='resnet18', width=32, norm_layer=partial(torch.nn.GroupNorm, 8), min_size=64,
                     max_size=128, anchors=(8, 16, 24, 32, 64), box_batch_size_per_image=16,
                     rpn_post_nms_top_n_train=50)


def loss_of(method, k=10, total=20): return SEG_METHODS[method].loss(torch.ones(k), total)


def images_without_objects(n=2):
    target = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long),
                  masks=torch.zeros(0, 64, 64, dtype=torch.uint8))
    return [torch.rand(3, 64, 64) for _ in range(n)], [dict(target) for _ in range(n)]


def one_object(label):
    images, targets = images_without_objects(1)
    masks = torch.ones(1, 64, 64, dtype=torch.uint8)
    targets[0].update(boxes=torch.tensor([[5., 5, 40, 40]]), labels=torch.tensor([label]), masks=masks)
    return images, targets


def learner(scenes, net, n=2, **kwargs):
    anns = read_annotations(scenes/'digits_train.json', scenes)
    dls, sgd = instance_dls(anns, anns, bs=2, n_batches=n, **kwargs), partial(OptimWrapper, opt=torch.optim.SGD)
    learn = Learner(dls, net, loss_func=sum_losses, opt_func=sgd, cbs=[InstanceSeg(), TrainOnly()])
    learn.create_mbar, learn.logger = False, lambda *_: None
    return learn


def fit(learn, *cbs):
    with learn.no_bar(): learn.fit(1, .01, cbs=list(cbs))


class Stop(Callback):
    order = 99
    def after_batch(self): raise KeyboardInterrupt


def test_the_losses_are_those_of_table_4():
    n, total = torch.tensor([50., 5, 2, 1]), 100
    loss = {name: method.loss(n, total) for name, method in SEG_METHODS.items()}
    z, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 4, 4])
    f = n/total
    shift = (f/(1 - f)).log()
    assert torch.allclose(loss['bs'].shift, shift, atol=1e-5)
    shifted, one_hot = z + shift*(y < 4)[:, None], F.one_hot(y, 5)[:, :4].float()
    by_hand = F.binary_cross_entropy_with_logits(shifted, one_hot, reduction='none').sum(1)
    for name in ('bs', 'balms'): assert torch.allclose(loss[name](z, y), by_hand, atol=1e-5)
    assert loss['ldam'].margin[0] == 0 and loss['ldam'].margin[1:].argmax() == 3 and isinstance(loss['ldam'], LDAM)
    assert isinstance(loss['eql'], SigmoidEqualization) and loss['eql'].threshold == 1.76e-3
    w = SEG_METHODS['class_balanced'].weights(n)
    assert (w.diff() > 0).all()
    a = region_weights(torch.tensor([0, 1, 4]), w)
    assert a[0] == 1 and torch.allclose(a[1:], w[[0, 3]]/w[[0, 3]].mean())


def test_images_without_objects_train():
    losses = small_net(loss_of('sigmoid', 4))(*images_without_objects())
    assert all(torch.isfinite(v) for v in losses.values()) and losses['loss_classifier'] > 0
    sum(losses.values()).backward()


def test_another_number_of_classes_gets_masks_for_them():
    net = use_loss(small_net(None, 5), 10)
    assert torch.isfinite(net(*one_object(10))['loss_mask'])


def test_faster_rcnn_takes_the_loss():
    torch.manual_seed(0)
    net = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=5)
    net = use_loss(net, 4, BalancedSigmoid([4, 3, 2, 1], total=20, reduction='none'))
    assert all(torch.isfinite(v) for v in net(*one_object(3)).values())


def test_autocast_computes_the_classification_loss_in_float32():
    net = small_net(loss_of('sigmoid', 4))
    with torch.autocast('cpu', torch.bfloat16): losses = net(*images_without_objects())
    assert losses['loss_classifier'].dtype == torch.float32 and torch.isfinite(losses['loss_classifier'])


def test_boxes_are_float32_under_autocast():
    net = small_net(loss_of('sigmoid', 4)).eval()
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16): boxes = net([torch.rand(3, 64, 64)])[0]['boxes']
    rounded = (boxes == boxes.bfloat16().float()).float().mean()
    assert boxes.dtype == torch.float32 and len(boxes) and rounded < .5


def test_detections_come_one_batch_at_a_time(scenes):
    learn = learner(scenes, small_net(None, 10))
    found = detect(learn.model, learn.dls.valid)
    learn.model.train()
    next(found)
    assert not learn.model.training
    found.close()
    assert learn.model.training


def test_export_takes_no_data_along(scenes, tmp_path):
    learn = learner(scenes, small_net(None, 10))
    learn.path = tmp_path
    learn.export('d.pkl')
    again = load_learner(tmp_path/'d.pkl')
    assert len(again.dls.train_ds) == 0 and len(again.model.eval()([torch.rand(3, 64, 64)])[0]['boxes']) <= 300


def test_a_reweighter_is_pickled_without_data(scenes):
    learn = box_classifier_learner(learner(scenes, small_net(None, 10)), loss_of('bs'))
    fit(learn, reweighter := RoIReweighter())
    assert reweighter.meta is not None
    again = pickle.loads(pickle.dumps(reweighter))
    assert again.meta is None and again.meta_dl is None and torch.equal(again.psi.w, reweighter.psi.w)


def test_a_refused_loss_changes_nothing(scenes):
    learn = learner(scenes, small_net(None, 10))
    with pytest.raises(ValueError, match='BalancedSigmoid'):
        box_classifier_learner(learn, BalancedSigmoid([1]*10, total=20), scales=True)
    assert type(learn.model.roi_heads.box_predictor.cls_score) is torch.nn.Linear


def test_a_fit_that_is_interrupted_leaves_nothing_behind(scenes):
    learn = learner(scenes, small_net(None, 10))
    requires_grad = lambda: {n for n, p in learn.model.named_parameters() if p.requires_grad}
    trained = requires_grad()
    for _ in range(2): box_classifier_learner(learn, loss_of('bs'))
    assert sum(isinstance(cb, BoxClassifierOnly) for cb in learn.cbs) == 1
    reweighter = RoIReweighter()
    with pytest.raises(KeyboardInterrupt): fit(learn, reweighter, Stop())
    heads = learn.model.roi_heads
    assert heads.row_weights is None and heads.watch is None and reweighter.now is None
    copy.deepcopy(learn.model)
    fit(learn)
    assert not heads.classifier_only and requires_grad() == trained
    with pytest.raises(KeyboardInterrupt): fit(learn, Stop())
    learn.remove_cb(BoxClassifierOnly)
    assert not heads.classifier_only and requires_grad() == trained
    before = heads.mask_head[0][0].weight.clone()
    learn.create_opt()
    fit(learn)
    assert not torch.equal(before, heads.mask_head[0][0].weight)


def test_sigmoid_residual_is_the_gradient():
    z, y = torch.randn(7, 4, requires_grad=True), torch.tensor([0, 1, 2, 3, 4, 4, 0])
    BalancedSigmoid([4, 3, 2, 1], tau=0., total=20, reduction='sum')(z, y).backward()
    assert torch.allclose(sigmoid_residual(z.detach(), y), z.grad, atol=1e-6)


def test_without_foreground_the_weights_have_no_gradient():
    f, head, y = torch.randn(8, 3), torch.nn.Linear(3, 4), torch.zeros(8, dtype=torch.long)
    step = partial(trial_step, torch.optim.SGD(head.parameters(), .1))
    a = region_weights(y, torch.rand(4))
    with torch.no_grad(): g = reweighting_gradient(list(head.parameters()), f, torch.randn(8, 4), y, a, f, y, step)
    assert torch.equal(g, torch.zeros(4))


class Pool:
    "Means over threads that stand for ranks"
    def __init__(self, n): self.slots, self.barrier, self.own = [None]*n, threading.Barrier(n), threading.local()
    def __call__(self, t):
        self.slots[self.own.rank] = t
        self.barrier.wait()
        mean = torch.stack(self.slots).mean(0)
        self.barrier.wait()
        return mean
    def run(self, f):
        out = [None]*len(self.slots)
        def go(i):
            self.own.rank = i
            out[i] = f(i)
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
    loss, plain = (BalancedSigmoid([9, 5, 2, 1], total=20, tau=tau, reduction='none').double() for tau in (1., 0.))
    rows = lambda l, z, y: l(z, (y - 1) % (k + 1))
    head, w = torch.nn.Linear(d, k).double(), torch.randn(k).double().requires_grad_()
    params, opt = list(head.parameters()), torch.optim.SGD(head.parameters(), .5)

    pooled = torch.where(y > 0, torch.cat([w.new_ones(1), w.sigmoid()])[y], 1.)
    pooled = torch.where(y > 0, pooled/pooled[y > 0].mean(), pooled)
    whole = torch.stack([rows(loss, head(f[r]), y[r]) for r in (0, 1)])
    grads = torch.autograd.grad((whole*pooled).mean(), params, create_graph=True)
    new = [p - .5*g for p, g in zip(params, grads)]
    meta = torch.stack([rows(plain, F.linear(fm[r], *new), ym[r]) for r in (0, 1)]).mean()
    exact = torch.autograd.grad(meta, w)[0]

    pool = Pool(2)
    def rank(r):
        a = region_weights(y[r], w.detach().sigmoid(), pool)
        z = head(f[r]).detach().requires_grad_()
        dz = torch.autograd.grad((rows(loss, z, y[r])*a).mean(), z)[0]
        step, mean_grads = partial(trial_step, opt), [g.detach() for g in grads]
        with torch.no_grad():
            return a, reweighting_gradient(params, f[r], dz, y[r], a, fm[r], ym[r], step, mean_grads, pool)
    (a0, g0), (a1, g1) = pool.run(rank)
    assert torch.allclose(torch.stack([a0, a1]), pooled.detach())
    foreground = torch.cat([a0[y[0] > 0], a1[y[1] > 0]])
    assert torch.allclose(foreground.mean(), torch.ones(1).double())
    for g in (g0, g1): assert torch.allclose(g*(1 - w.detach().sigmoid()), exact, atol=1e-12)


def test_a_reweighter_checks_each_fit_and_begins_again_with_another_network(scenes):
    reweighter = RoIReweighter(lr=.1)
    one = box_classifier_learner(learner(scenes, small_net(None, 10)), loss_of('bs'))
    fit(one, reweighter)
    w = reweighter.psi.w.clone()
    fit(one, reweighter)
    assert not torch.equal(w, reweighter.psi.w) and reweighter.n_steps == 4
    with pytest.raises(ValueError, match='box_classifier_learner'):
        fit(learner(scenes, small_net(None, 10)), reweighter)
    other = box_classifier_learner(learner(scenes, small_net(None, 12)), loss_of('bs', 12))
    fit(other, reweighter)
    assert len(reweighter.psi.w) == 12 and reweighter.n_steps == 2
    with pytest.raises(ValueError, match='GradientAccumulation'): fit(other, RoIReweighter(), GradientAccumulation(4))
    with pytest.raises(ValueError, match='Two RoIReweighters'): fit(other, RoIReweighter(), RoIReweighter())
    with pytest.raises(ValueError, match='no batches'): fit(other, RoIReweighter(meta_dl=[]))
    softmax = learner(scenes, small_net(loss_of('softmax'), 10))
    with pytest.raises(ValueError, match='background'): fit(softmax, RoIReweighter())


def test_the_learning_rate_finder_leaves_the_weights_as_they_were(scenes):
    learn = box_classifier_learner(learner(scenes, small_net(None, 10), 3), loss_of('bs'))
    fit(learn, reweighter := RoIReweighter(lr=.1))
    learn.add_cb(reweighter)
    w = reweighter.psi.w.clone()
    with learn.no_bar(): learn.lr_find(num_it=3, show_plot=False)
    assert torch.equal(w, reweighter.psi.w) and reweighter.n_steps == 3


def test_a_meta_loader_goes_on_where_it_was(scenes):
    anns = read_annotations(scenes/'digits_train.json', scenes)
    class Seen(RoIReweighter):
        def meta_regions(self):
            f, y = super().meta_regions()
            self.seen.append(f.clone())
            return f, y
    def make():
        reweighter = Seen(meta_dl=instance_dls(anns, bs=2, n_batches=3, seed=7).train)
        reweighter.seen = []
        return reweighter
    def stage2(n): return box_classifier_learner(
        learner(scenes, small_net(None, 10), n, seed=1, flip=False), loss_of('bs'))
    torch.manual_seed(0)
    whole = make()
    fit(stage2(5), whole)
    assert torch.equal(whole.history[0][1], torch.full((10,), .5))         # the start is recorded as it was
    torch.manual_seed(0)
    one, first = stage2(3), make()
    fit(one, first)
    state, random = first.state_dict(), torch.get_rng_state()
    two, second = stage2(2), make()
    second.load_state_dict(state)
    two.model.load_state_dict(one.model.state_dict())
    two.opt.load_state_dict(one.opt.state_dict())
    two.dls.train.load_state_dict(one.dls.train.state_dict())
    torch.set_rng_state(random)
    fit(two, second)
    seen = first.seen + second.seen
    assert len(seen) == len(whole.seen) == 5 and all(map(torch.equal, seen, whole.seen))
