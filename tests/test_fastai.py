"The losses in fastai's hands: every callback and call that touches a loss, on real digits."
import pytest, torch
from fastai.vision.all import (Callback, CutMix, Learner, MixUp, accuracy, load_learner, nn, noop)
from balms.core import BalancedSigmoid, BalancedSoftmax, class_counts
from balms.data import array_dls, load_digits, long_tail
from balms.metrics import ECE, shot_metrics


@pytest.fixture(scope='module')
def dls():
    train, test = load_digits()
    return array_dls(long_tail(train, 20), test, bs=64, n_batches=15, device='cpu')


def make(dls, loss, **kw):
    torch.manual_seed(0)
    return Learner(
        dls,
        nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)),
        loss_func=loss,
        metrics=accuracy,
        **kw
    )


@pytest.mark.parametrize('cb', (None, MixUp, CutMix))
@pytest.mark.parametrize(
    'make_loss',
    (BalancedSoftmax.from_dls, lambda d: BalancedSoftmax.from_dls(d, label_smoothing=0.1), BalancedSigmoid.from_dls),
    ids=('bs', 'bs_smooth', 'sigmoid'),
)
def test_learner(dls, make_loss, cb, tmp_path):
    learn = make(dls, make_loss(dls), cbs=cb() if cb else None)
    sigmoid = isinstance(learn.loss_func, BalancedSigmoid)
    with learn.no_bar(), learn.no_logging():
        learn.fit(3, 1e-2)
        probs, targs, decoded, losses = learn.get_preds(with_loss=True, with_decoded=True)
        logits, _ = learn.get_preds(act=noop)
        valid = learn.validate()[0]
    assert learn.recorder.values[-1][-1] > .3 and learn.loss_func.reduction == 'mean'
    torch.testing.assert_close(probs, logits.sigmoid() if sigmoid else logits.softmax(1))          # no shift
    assert torch.equal(decoded, logits.argmax(1)) and len(losses) == len(targs) == 500
    assert abs(losses.mean().item() - valid) < 1e-4
    learn.export(tmp_path/'m.pkl')
    again = load_learner(tmp_path/'m.pkl')
    with again.no_bar():
        torch.testing.assert_close(again.get_preds(dl=again.dls.test_dl(dls.valid_ds.images[:9]))[0], probs[:9])
    assert torch.equal(again.loss_func.shift, learn.loss_func.shift)


def test_show_results(dls):
    import matplotlib
    matplotlib.use('Agg')
    learn = make(dls, BalancedSoftmax.from_dls(dls))
    with learn.no_bar(): learn.show_results(max_n=4)
    dls.show_batch(max_n=4)


def test_mixup_mixes_the_balanced_loss(dls):
    "MixUp's loss is the lerp of the two unreduced balanced losses"
    learn = make(dls, BalancedSoftmax.from_dls(dls), cbs=MixUp())
    seen = []
    class Spy(Callback):
        order = 95
        def after_loss(self):
            if self.training and not seen:
                loss, lam = self.learn.mix_up.old_lf, self.learn.mix_up.lam
                per = lambda y: nn.functional.cross_entropy(self.learn.pred + loss.shift, y, reduction='none')
                y1, y = self.learn.mix_up.yb1[0], self.learn.yb[0]
                seen.append(
                    (
                        self.learn.loss_grad.item(),
                        torch.lerp(per(y1.as_subclass(torch.Tensor)), per(y.as_subclass(torch.Tensor)), lam.view(-1))
                        .mean()
                        .item(),
                    )
                )
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=Spy())
    assert abs(seen[0][0] - seen[0][1]) < 1e-5


def test_metrics_survive_export(dls, tmp_path):
    learn = make(dls, BalancedSoftmax.from_dls(dls))
    learn.metrics = [*shot_metrics(class_counts(dls)), ECE()]
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert list(learn.recorder.metric_names) == [
        'epoch',
        'train_loss',
        'valid_loss',
        'mean_class_acc',
        'many_acc',
        'medium_acc',
        'few_acc',
        'ece',
        'time',
    ]
    learn.export(tmp_path/'m.pkl')
    assert load_learner(tmp_path/'m.pkl').metrics[1].name == 'many_acc'


def test_vision_learner_with_from_dls(tmp_path):
    "The README's lines, with an untrained network: nothing is downloaded"
    import numpy as np
    from PIL import Image
    from fastai.vision.all import ImageDataLoaders, Resize, resnet18, vision_learner
    rng = np.random.default_rng(0)
    for s, ns in (('train', (12, 6, 3)), ('test', (3, 3, 3))):
        for j, (c, n) in enumerate(zip('abc', ns)):
            (tmp_path/s/c).mkdir(parents=True)
            for i in range(n):
                Image.fromarray((80 * j + rng.integers(0, 60, (40, 40, 3))).astype(np.uint8)).save(
                    tmp_path / s / c / f'{i}.png'
                )
    dls = ImageDataLoaders.from_folder(
        tmp_path, train='train', valid='test', item_tfms=Resize(32), bs=8, num_workers=0, device='cpu'
    )
    learn = vision_learner(
        dls,
        resnet18,
        pretrained=False,
        loss_func=BalancedSoftmax.from_dls(dls),
        metrics=shot_metrics(class_counts(dls)),
    )
    assert class_counts(dls).tolist() == [12, 6, 3]
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(1)
