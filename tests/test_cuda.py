"""What `run` does on a GPU: as on the CPU, without waiting for it in a step, compiled or not, stopped and resumed."""
import pytest, torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.learner import Recorder
from balms.checkpoint import Interrupted
from balms.core import class_counts
from balms.cuda_graphs import Graphed, GraphedStep
from balms.decoupled import ClassifierOnly, classifier_optimizer
from balms.learner import load_images, recipe_learner
from balms.long_tail import ArrayDataset
from balms.meta import MetaReweighter, MetaSampler
from balms.models import find_classifier
from balms.recipe import Recipe
from balms.runs import run
from balms.stage import Execution, TrainOnly
from balms.weights import read_tensors

pytestmark = pytest.mark.cuda


class NoWaits(Callback):
    "An error for each wait of a step for the GPU, from the third step on"
    def before_batch(self):
        if self.iter == 2: torch.cuda.set_sync_debug_mode('error')
    def after_train(self): torch.cuda.set_sync_debug_mode('default')


def cifar_learner(method, n_batches=10, bs=128, **kwargs):
    "A `Learner` of the recipe on random images"
    images = torch.randint(256, (2_000, 3, 32, 32), dtype=torch.uint8)
    train = ArrayDataset(images, torch.arange(2_000) % 10)
    recipe = Recipe('cifar10', 100, method, 'paper', bs=bs, precision=kwargs.pop('precision', 'float32'))
    learn = recipe_learner(recipe, train, train, class_counts(train), Execution(torch.device('cuda'), **kwargs), bs)
    learn.dls.train.n_batches = n_batches
    learn.remove_cbs([ProgressCallback, Recorder])
    learn.create_mbar = False
    return learn


@pytest.mark.parametrize('precision', ['float32', 'bfloat16'])
@pytest.mark.parametrize('method', ['bs', 'cbs', 'bs_cbs_dt', 'balms', 'bs_dt_mr'])
def test_a_step_does_not_wait(method, precision):
    learn, meta = cifar_learner(method, precision=precision), dict(balms=MetaSampler, bs_dt_mr=MetaReweighter)
    cbs = [NoWaits(), TrainOnly()]
    if method not in ('bs', 'cbs'):
        learn.opt = classifier_optimizer(learn, find_classifier(learn.model))
        cbs.append(ClassifierOnly())
    if method in meta: cbs.append(meta[method]())
    try: learn.fit(1, cbs=cbs)
    finally: torch.cuda.set_sync_debug_mode('default')
    assert all(p.isfinite().all() for p in learn.model.parameters())


def weights_after(n, cbs=(), **kwargs):
    "Weights and the state of the augmentation's generator after n steps"
    torch.manual_seed(0)
    learn = cifar_learner('bs', n, **kwargs)
    learn.fit(1, cbs=[TrainOnly(), *cbs])
    flat = torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    return flat, learn.dls.train.generator().get_state()


def test_compiled_is_eager_to_rounding():
    a, b = weights_after(3)[0], weights_after(3, compile=True)[0]
    assert (a - b).norm() < .02*a.norm()


def test_recorded_step_is_the_usual_one_to_rounding():
    "Images, random numbers, learning rate and optimiser of each step, in a graph that was recorded at the fourth"
    (a, state), (b, state2) = weights_after(8), weights_after(8, [GraphedStep()])
    assert (a - b).norm() < .02*a.norm() and torch.equal(state, state2)
    c = weights_after(8, [GraphedStep('bfloat16')])[0]
    assert (a - c).norm() < .3*a.norm()


def test_recorded_functions():
    f = Graphed(lambda x: x.sin() + 1)
    for n in (4, 4, 7, 4):
        x = torch.randn(n, device='cuda')
        torch.testing.assert_close(f(x), x.sin() + 1)


def test_as_on_the_cpu():
    "The same images, start and order of batches, without augmentation: weights equal to rounding"
    recipe, weights = Recipe('digits', 50, 'bs', augment='none', threads=1), []
    train, test = load_images(recipe)
    for device in ('cpu', 'cuda'):
        learn = recipe_learner(recipe, train, test, class_counts(train), device)
        learn.dls.train.n_batches = 5
        learn.fit(1, cbs=TrainOnly())
        weights.append(torch.cat([p.detach().cpu().flatten() for p in learn.model.parameters()]))
    assert (weights[0] - weights[1]).norm() < .01*weights[0].norm()


@pytest.mark.parametrize('graphs', [False, True])
@pytest.mark.parametrize('method', ['bs', 'balms'])
def test_stopped_and_resumed(tmp_path, method, graphs):
    "To rounding: cuDNN sums in any order, and training makes more of it"
    recipe = Recipe('digits', 50, method, iters=40, lr=.01, **(dict(iters2=30) if method == 'balms' else {}))
    row = run(recipe, tmp_path/'whole', device='cuda', graphs=graphs)
    for stop in (17, 30):
        with pytest.raises(Interrupted): run(recipe, tmp_path/'stopped', device='cuda', graphs=graphs, stop_at=stop)
    again = run(recipe, tmp_path/'stopped', device='cuda', graphs=graphs)
    a, b = (read_tensors(tmp_path/out/recipe.key/'model.safetensors') for out in ('whole', 'stopped'))
    for name in a: assert (a[name].float() - b[name].float()).norm() <= .05*a[name].float().norm() + 1e-3, name
    assert row['environments'][-1]['device'] == torch.cuda.get_device_name() and abs(row['nll'] - again['nll']) < .05
