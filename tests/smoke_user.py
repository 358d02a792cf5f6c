"What a user's own environment must do: every module imports from anywhere, the loss trains, and nothing needs nbdev."
import importlib, importlib.util, os, pkgutil, sys, tempfile

os.chdir(tempfile.gettempdir())                    # not in the clone: only the installed package can answer
assert (
    os.environ.get('BALMS_SMOKE_DEV') or importlib.util.find_spec('nbdev') is None
), 'nbdev is installed: this is not a user\'s environment'

import balms
names = [m.name for m in pkgutil.iter_modules(balms.__path__) if not m.name.startswith('_')]
assert 'core' in names, names
for name in names:
    mod = importlib.import_module(f'balms.{name}')
    for o in getattr(mod, '__all__', []): assert hasattr(mod, o), f'balms.{name} has no {o}'
assert not [m for m in sys.modules if m.partition('.')[0] == 'nbdev']

import torch
from balms.core import BalancedSoftmax
logits = torch.zeros(4, 3, requires_grad=True)
loss = BalancedSoftmax([100, 10, 1])(logits, torch.tensor([0, 0, 1, 2]))
loss.backward()
assert loss.isfinite() and logits.grad.isfinite().all() and logits.grad.abs().sum() > 0

import fastai, torchvision
print(
    f'balms {balms.__version__}: {", ".join(names)}; Python {sys.version.split()[0]}, torch {torch.__version__},'
    f' torchvision {torchvision.__version__}, fastai {fastai.__version__}'
)

# The newest fastai: train, predict, save and load
import pathlib
from fastai.learner import Learner, load_learner
from fastai.callback.mixup import MixUp
from fastcore.basics import noop
from balms.data import array_dls, load_digits, long_tail
from balms.core import class_counts
from balms.metrics import shot_metrics
from balms.models import small_cnn, body_fc

train, test = load_digits()
dls = array_dls(long_tail(train, 20), test, bs=64, n_batches=30, device='cpu')
learn = Learner(
    dls,
    small_cnn(10),
    loss_func=BalancedSoftmax.from_dls(dls),
    metrics=shot_metrics(class_counts(dls)),
    splitter=body_fc,
    cbs=MixUp(),
)
with learn.no_bar(), learn.no_logging():
    learn.fit(2, 1e-2)
    probs, _ = learn.get_preds()
    logits, _ = learn.get_preds(act=noop)
assert torch.allclose(probs, logits.softmax(1), atol=1e-6)
with tempfile.TemporaryDirectory() as d:
    learn.export(pathlib.Path(d)/'model.pkl')
    again = load_learner(pathlib.Path(d)/'model.pkl')
with again.no_bar():
    assert torch.allclose(again.get_preds(dl=again.dls.test_dl(test.images[:5]))[0], probs[:5], atol=1e-5)
print('fit with MixUp, get_preds, export and load_learner work')

# Decoupled training with the Meta Sampler, on images and on a bank of features
from torch import nn
from balms.meta import MetaSampler
from balms.over_balance import OverBalance
from balms.sampled_loader import resampled

learn.remove_cb(learn.mix_up)
for views in (0, 2):
    cb = MetaSampler()
    with learn.no_bar(), learn.no_logging():
        learn.fit_classifier(1, 0.1, loss_func=BalancedSoftmax.from_dls(dls), views=views, cbs=cb)
    assert cb.closed_form and cb.n_steps == 30 and cb.psi.w.isfinite().all()
with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=[MetaSampler(), OverBalance()])
learn.dls = resampled(dls)
with learn.no_bar(), learn.no_logging(): learn.fit_classifier(1, .1, loss_func=nn.CrossEntropyLoss(), scales=True)
with tempfile.TemporaryDirectory() as d:
    learn.export(pathlib.Path(d)/'model.pkl')
    again = load_learner(pathlib.Path(d)/'model.pkl')
print('fit_classifier with MetaSampler, a feature bank, LWS, OverBalance and resampled loaders work')
