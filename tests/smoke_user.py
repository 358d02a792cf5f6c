"What a user's own environment must do: every module imports from anywhere, the loss trains, and nothing needs nbdev."
import importlib, importlib.util, os, pkgutil, sys, tempfile

os.chdir(tempfile.gettempdir())                    # not in the clone: only the installed package can answer
assert importlib.util.find_spec('nbdev') is None, 'nbdev is installed: this is not a user\'s environment'

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
print(f'balms {balms.__version__}: {", ".join(names)}; Python {sys.version.split()[0]}, torch {torch.__version__}, torchvision {torchvision.__version__}, fastai {fastai.__version__}')
