"The losses in the loops of other libraries, each of them run: what they train with, report, predict and save."
import logging
import pytest, torch, torch.nn.functional as F
from fastai.callback.core import CancelValidException
from fastai.callback.tracker import SaveModelCallback
from fastai.learner import Callback, Learner
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from balms.core import BalancedSoftmax, class_counts
from balms.data import array_dls, load_digits, long_tail
from balms.loops import PlainValidation, TrainerLoss
from balms.metrics import mean_class_accuracy

torch.set_num_threads(1)


@pytest.fixture(scope='module')
def digits():
    "Training and test tensors, and class counts"
    train, test = load_digits()
    train = long_tail(train, 50)
    tensors = lambda ds: (ds.images.float()/255 - .3, ds.targets)
    return tensors(train), tensors(test), class_counts(train)


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


# ---- Hugging Face's Trainer

class Net(nn.Module):
    "A model whose output has `logits`, as those of the library"
    def __init__(self):
        super().__init__()
        self.net = linear()
    def forward(self, pixel_values, labels=None): return dict(logits=self.net(pixel_values))


def hf_trainer(tmp_path, digits, criterion, bs=32, accumulate=1, **kw):
    transformers = pytest.importorskip('transformers', reason='Trainer is of transformers')
    pytest.importorskip('accelerate', reason='Trainer needs accelerate')
    logging.getLogger('transformers').setLevel(logging.ERROR)
    rows = [dict(pixel_values=x, labels=y) for x, y in zip(*digits[0])]
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=bs, gradient_accumulation_steps=accumulate,
        learning_rate=.1, optim='sgd', lr_scheduler_type='constant', max_grad_norm=0., use_cpu=True, report_to=[],
        save_strategy='no', logging_strategy='no', disable_tqdm=True, seed=0, **kw)
    return transformers.Trainer(Net(), args, train_dataset=rows, compute_loss_func=TrainerLoss(criterion))


def test_trainer(tmp_path, digits):
    "Steps are those of the shifted loss, in one batch or in four; the loss that evaluation reports is the plain one"
    weights = []
    for bs, accumulate in ((32, 1), (8, 4)):
        trainer = hf_trainer(tmp_path, digits, BalancedSoftmax(digits[2]), bs, accumulate)
        seen, model = [], trainer.model
        model.register_forward_pre_hook(lambda m, a, kw: seen.append(kw) if m.training else None, with_kwargs=True)
        trainer.train()
        weights.append(model.net[1].weight.detach().clone())
    torch.testing.assert_close(*weights, rtol=0, atol=1e-6)
    ours = linear()
    xs, ys = digits[0]
    for i in range(3):
        x = torch.cat([kw['pixel_values'] for kw in seen[4*i:4*i + 4]])
        y = torch.stack([ys[(xs == one).flatten(1).all(1)][0] for one in x])
        loss = F.cross_entropy(ours(x) + BalancedSoftmax(digits[2]).shift, y)
        for p, g in zip(ours.parameters(), torch.autograd.grad(loss, ours.parameters())): p.data -= .1*g
    torch.testing.assert_close(ours[1].weight, weights[0], rtol=0, atol=1e-5)
    x, y = digits[1]
    reported = trainer.evaluate([dict(pixel_values=a, labels=b) for a, b in zip(x, y)])['eval_loss']
    assert reported == pytest.approx(F.cross_entropy(model.net(x), y).item(), abs=1e-5)
    assert abs(reported - BalancedSoftmax(digits[2])(model.net(x), y).item()) > .1


def test_trainer_leaves_out_ignored_labels(digits):
    loss, (x, y), net = TrainerLoss(BalancedSoftmax(digits[2])), digits[1], linear()
    y = y.clone()
    y[::2] = -100
    want = BalancedSoftmax(digits[2])(net(x), y)
    torch.testing.assert_close(loss(dict(logits=net(x)), y, num_items_in_batch=(y != -100).sum()), want)


# ---- Lightning, with torchmetrics

def test_lightning(tmp_path, digits):
    "The validation loss is plain, a macro recall is the mean per-class accuracy, the checkpoint has the shift"
    L = pytest.importorskip('lightning', reason='lightning is not installed')
    tm = pytest.importorskip('torchmetrics', reason='torchmetrics is not installed')
    logging.getLogger('lightning.pytorch').setLevel(logging.ERROR)
    (train, test, counts), seen = digits, []

    class Lit(L.LightningModule):
        def __init__(self, counts):
            super().__init__()
            self.model, self.criterion = linear(), BalancedSoftmax(counts)
            self.recall, self.ece = tm.Recall('multiclass', num_classes=10, average='macro'), tm.CalibrationError(
                'multiclass', num_classes=10)
        def training_step(self, batch, i):
            x, y = batch
            loss = self.criterion(self.model(x), y)
            seen.append((loss.item(), F.cross_entropy(self.model(x) + self.criterion.shift, y).item()))
            return loss
        def validation_step(self, batch, i):
            x, y = batch
            logits = self.model(x)
            self.recall(logits, y)
            self.ece(self.criterion.activation(logits), y)
            self.log_dict(dict(loss=self.criterion(logits, y), recall=self.recall, ece=self.ece))
        def configure_optimizers(self): return torch.optim.SGD(self.parameters(), .1)

    lit = Lit(counts)
    trainer = L.Trainer(max_epochs=2, accelerator='cpu', logger=False, enable_progress_bar=False,
                        enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path)
    trainer.fit(lit, DataLoader(TensorDataset(*train), 32, shuffle=True), DataLoader(TensorDataset(*test), 100))
    x, y = test
    logits, logged = lit.eval().model(x), trainer.callback_metrics
    assert all(a == pytest.approx(b, abs=1e-5) for a, b in seen)
    assert logged['loss'].item() == pytest.approx(F.cross_entropy(logits, y).item(), abs=1e-5)
    assert logged['recall'].item() == pytest.approx(mean_class_accuracy(logits, y).item(), abs=1e-5)
    trainer.save_checkpoint(tmp_path/'last.ckpt')
    again = Lit([1]*10)
    again.load_state_dict(torch.load(tmp_path/'last.ckpt', weights_only=True)['state_dict'])
    assert torch.equal(again.criterion.shift, lit.criterion.shift)


# ---- timm

def test_timm(tmp_path, digits, monkeypatch):
    "Its loader, Mixup and EMA; classes are counted without opening a file"
    timm = pytest.importorskip('timm', reason='timm is not installed')
    from timm.data import Mixup, create_dataset, create_loader
    from timm.utils import ModelEmaV3
    (x, y), _, all_counts = digits
    kept = torch.cat([(y == j).nonzero().flatten()[:1 + n//6] for j, n in enumerate(all_counts.tolist())])
    for i in kept.tolist():
        (tmp_path/f'train/{y[i]}').mkdir(parents=True, exist_ok=True)
        Image.fromarray(((x[i, 0] + .3)*255).byte().numpy()).save(tmp_path/f'train/{y[i]}/{i}.png')
    dataset = create_dataset('', str(tmp_path/'train'))
    loader = create_loader(dataset, (3, 32, 32), 16, is_training=True, use_prefetcher=False, num_workers=0)
    with monkeypatch.context() as m:
        def opened(*args, **kw): raise AssertionError(f'opened {args[0]}')
        m.setattr('builtins.open', opened)
        m.setattr(Image, 'open', opened)
        counts = class_counts(dataset)
        for o in (dataset.reader, loader, torch.utils.data.Subset(dataset, range(len(dataset)))):
            assert torch.equal(class_counts(o), counts)
    assert torch.equal(counts, class_counts(y[kept]))
    torch.manual_seed(0)
    net = timm.create_model('test_resnet', num_classes=10)
    mixup = Mixup(mixup_alpha=.8, cutmix_alpha=1., label_smoothing=0., num_classes=10)
    criterion = BalancedSoftmax(counts)
    ema, opt = ModelEmaV3(net, decay=.9), torch.optim.SGD(net.parameters(), .05)
    for images, targets in loader:
        if len(images) % 2: continue                                             # Mixup takes even batches
        images, targets = mixup(images, targets)
        logits = net(images)
        loss = criterion(logits, targets)
        want = -(targets*(logits + criterion.shift).log_softmax(1)).sum(1).mean()
        torch.testing.assert_close(loss, want)
        opt.zero_grad()
        loss.backward()
        opt.step()
        ema.update(net)
    images, targets = next(iter(loader))
    assert not torch.equal(ema.module.get_classifier().weight, net.get_classifier().weight)
    plain = criterion.eval()(ema.module.eval()(images), targets)
    torch.testing.assert_close(plain, F.cross_entropy(ema.module(images), targets))


# ---- skorch

def test_skorch(digits):
    "predict_proba gives probabilities, the validation loss is plain, and scikit-learn can clone and search"
    skorch = pytest.importorskip('skorch', reason='skorch is not installed')
    from skorch.helper import predefined_split
    from sklearn.base import clone
    (x, y), (tx, ty), counts = digits
    valid = predefined_split(skorch.dataset.Dataset(tx, ty))
    net = skorch.NeuralNetClassifier(linear, criterion=BalancedSoftmax, criterion__counts=counts, max_epochs=3, lr=.1,
                                     batch_size=len(x), train_split=valid, verbose=0)
    net = clone(net).fit(x, y)
    with torch.no_grad(): logits = net.module_.eval()(tx)
    probs = torch.from_numpy(net.predict_proba(tx))
    torch.testing.assert_close(probs, logits.softmax(1), rtol=0, atol=1e-6)
    assert net.history[-1, 'valid_loss'] == pytest.approx(F.cross_entropy(logits, ty).item(), abs=1e-4)
    first = BalancedSoftmax(counts)(linear()(x), y).item()
    assert net.history[0, 'train_loss'] == pytest.approx(first, abs=1e-4)
    net = net.set_params(criterion__counts=counts.tolist(), criterion__tau=.5).fit(x, y)
    torch.testing.assert_close(net.criterion_.shift, BalancedSoftmax(counts, tau=.5).shift)


# ---- fastai

class Seen(Callback):
    "The loss of each training batch, and the two that it could be"
    def before_fit(self): self.values = []
    def after_loss(self):
        if not self.training: return
        x, y = self.learn.pred.as_subclass(torch.Tensor), self.yb[0].as_subclass(torch.Tensor)
        self.values.append([l.item() for l in (self.loss, F.cross_entropy(x + self.loss_func.shift, y))])


@pytest.mark.parametrize('plain', (False, True))
def test_fastai(tmp_path, plain):
    "get_preds(with_loss=True), valid_loss and what monitors it; training is as it was"
    train, test = load_digits()
    dls = array_dls(long_tail(train, 50), test, bs=64, n_batches=5, device='cpu')
    save = SaveModelCallback(monitor='valid_loss')
    cbs = [PlainValidation()] if plain else []
    learn = Learner(dls, linear(), loss_func=BalancedSoftmax.from_dls(dls), lr=.1, cbs=cbs, path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit(3, cbs=[save, Seen()])
        logits, targs, losses = learn.get_preds(act=lambda x: x, with_loss=True)
        valid = learn.validate()[0]
    shift = 0 if plain else learn.loss_func.shift
    want = F.cross_entropy(logits + shift, targs, reduction='none')
    torch.testing.assert_close(losses, want, rtol=0, atol=1e-5)
    assert valid == pytest.approx(want.mean().item(), abs=1e-5) and valid == pytest.approx(save.best, abs=1e-4)
    assert learn.loss_func.training and learn.loss_func.reduction == 'mean'


def test_plain_validation_leaves_training_alone():
    "Also after a validation that was cancelled, or that ended with an error"
    train, test = load_digits()
    dls = array_dls(long_tail(train, 50), test, bs=64, n_batches=5, device='cpu')
    class Cancels(Callback):
        error = CancelValidException
        def before_validate(self): raise self.error()
    seen, cancels = Seen(), Cancels()
    learn = Learner(dls, linear(), loss_func=BalancedSoftmax.from_dls(dls), lr=.1, cbs=[PlainValidation(), cancels])
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, cbs=seen)
        cancels.error = KeyboardInterrupt
        with pytest.raises(KeyboardInterrupt): learn.validate()
        learn.remove_cb(cancels)
        learn.fit(1, cbs=seen)
    assert len(seen.values) == 5 and all(a == pytest.approx(b, abs=1e-5) for a, b in seen.values)
