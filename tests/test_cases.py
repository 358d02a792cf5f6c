"""What people's own data and loops broke elsewhere, tried on this package: the case, the public thread where it was
reported, what was done before (in the docstring), and what has to be done (in the test). Nothing is downloaded."""
import gzip
from collections import Counter
from functools import partial

import numpy as np, pandas as pd, pytest, torch, torch.nn.functional as F
from fastai.callback.mixup import MixUp
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.all import (CategoryBlock, DataBlock, DataLoaders, Datasets, MultiCategoryBlock, TfmdDL,
                             TransformBlock)
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from torch import nn
from torch.utils.data import (ConcatDataset, DataLoader, Dataset, RandomSampler, StackDataset, Subset,
                              SubsetRandomSampler, WeightedRandomSampler, random_split)

from balms.after_training import estimate_prior, fit_temperature
from balms.baselines import FocalLoss, LDAM
from balms.core import BalancedSigmoid, BalancedSoftmax, adjust_logits, balanced_softmax_loss, class_counts, log_prior
from balms.decoupled import ScaledLinear, feature_bank, nearest_class_mean, tau_normalize
from balms.meta import MetaSampler
from balms.metrics import (ECE, ece, marginal_likelihood, mean_class_accuracy, per_class_accuracy, plot_marginal,
                           reliability, shot_accuracy, shot_masks, shot_metrics)
from balms.lists import read_list, sample_tree
from balms.models import check_classifier, find_classifier
from balms.samplers import sampling_rates
from balms.sigmoid import log_odds_prior
from balms.sigmoid_baselines import SigmoidFocalLoss


# one logit

def fit_line(loss, x, y):
    "A line under `loss`, to the end"
    torch.manual_seed(0)
    net = nn.Linear(1, 1)
    opt = torch.optim.LBFGS(net.parameters(), max_iter=100, line_search_fn='strong_wolfe')
    def closure():
        opt.zero_grad()
        l = loss(net(x), y)
        l.backward()
        return l
    opt.step(closure)
    return net


def test_one_logit_is_trained_the_right_way_up():
    """kornia#1308, mmpretrain#533. Labels 0/1 of shape (N,) were read as "the class" and "background": .022 right.
    And the rows without the class got no shift, so the loss of (N, 1) floats corrected nothing."""
    gen = torch.Generator().manual_seed(0)
    y = (torch.rand(4000, generator=gen) < .1).long()
    x = torch.randn(4000, 1, generator=gen) + 4*y[:, None]
    loss = BalancedSigmoid([int(y.sum())], total=len(y))
    with pytest.raises(ValueError, match='float'): loss(x, y)
    with pytest.raises(ValueError, match='float'): SigmoidFocalLoss([1])(x, y)
    with pytest.raises(ValueError, match='float'): loss(x[:, :, None, None], y[:, None, None])      # a mask
    net = fit_line(loss, x, y.float()[:, None])
    right = loss.decodes(loss.activation(net(x))).long()[:, 0] == y
    assert right.float().mean() > .97 and abs((-net.bias/net.weight).item() - 2) < .15
    torch.testing.assert_close(loss(x, y[:, None]), loss(x, y.float()[:, None]))


@pytest.mark.parametrize('make', [BalancedSoftmax, log_prior, partial(adjust_logits, torch.zeros(3, 1)),
                                  partial(balanced_softmax_loss, torch.zeros(3, 1), torch.zeros(3).long())])
def test_a_softmax_of_one_class(make):
    "The same case with the other loss: it was 0 whatever the logits, and a logit was adjusted by 0"
    with pytest.raises(ValueError, match='BalancedSigmoid'): make([40])


@pytest.mark.parametrize('score', [
    per_class_accuracy, mean_class_accuracy, partial(shot_accuracy, counts=[90, 10]), ece, reliability,
    lambda preds, targs: marginal_likelihood(preds)])
def test_scores_of_one_output(score):
    "The largest of one column is column 0, always, and its softmax 1: accuracies and ECE of it were numbers"
    targs = torch.tensor([0, 1, 0, 1])
    for preds in (torch.randn(4, 1), torch.ones(4, 1), torch.rand(4)):
        with pytest.raises(ValueError): score(preds, targs)


def quiet(learn):
    learn.remove_cbs([cb for cb in learn.cbs if cb.name == 'progress'])
    return learn


def tiny_learner(outputs, metrics, k=3, n=60, loss_func=None):
    "A learner of n rows with 4 numbers and a class each"
    data = [(torch.randn(4), torch.tensor(i % k)) for i in range(n)]
    dls = DataLoaders(*(TfmdDL(data, bs=20, num_workers=0) for _ in range(2)))
    return quiet(Learner(dls, nn.Linear(4, outputs), loss_func=loss_func or CrossEntropyLossFlat(), metrics=metrics))


def test_metrics_of_one_output():
    "shot_metrics said 1.0 of the first class and 0 of all others"
    loss = lambda x, y: F.binary_cross_entropy_with_logits(x[:, 0], y.float())
    with pytest.raises(ValueError, match='by its sign'): tiny_learner(1, shot_metrics([30, 30]), 2, 60, loss).fit(1)
    with pytest.raises(ValueError, match='k > 1'): tiny_learner(1, ECE(), 2, 60, loss).fit(1)


def test_float_labels_and_columns():
    "Labels as floats were compared with anything; a column (N, 1) of labels was compared with each prediction"
    logits, y = torch.randn(50, 3), torch.randint(3, (50,))
    with pytest.raises(TypeError, match='float'): per_class_accuracy(logits, y.float())
    with pytest.raises(ValueError, match='float'): per_class_accuracy(logits.argmax(1).float(), y, 3)
    for dtype in (torch.int8, torch.uint8, torch.int32, torch.uint16):
        column = y[:, None].to(dtype)
        assert torch.equal(per_class_accuracy(logits, column), per_class_accuracy(logits, y))
        assert torch.equal(ece(logits.softmax(1), column), ece(logits.softmax(1), y))
        assert fit_temperature(10*logits + 9*F.one_hot(y, 3), column) == fit_temperature(
            10*logits + 9*F.one_hot(y, 3), y)


# counts that carry their classes

LABELS = pd.Series([0]*3 + [1] + [2]*7)


@pytest.mark.parametrize('counts', [
    LABELS.value_counts(), LABELS.value_counts(ascending=True), Counter(LABELS), {2: 7, 1: 1, 0: 3},
    Counter(torch.tensor(LABELS)), LABELS.groupby(LABELS).size()[::-1]], ids=str)
def test_counts_with_their_classes(counts):
    "logit-adj-pytorch#2, banner#2, fastbook#410: value_counts was taken by frequency, [3, 1, 7] as [7, 3, 1]"
    want = [3, 1, 7]
    assert torch.equal(log_prior(counts), log_prior(want))
    assert torch.equal(log_odds_prior(counts), log_odds_prior(want))
    assert torch.equal(BalancedSoftmax(want, target_prior=counts).shift, torch.zeros(3))
    assert BalancedSoftmax([1, 1, 1], weight=counts).weight.tolist() == want
    assert torch.equal(sampling_rates(counts), sampling_rates(want))
    assert torch.equal(shot_masks(counts)['few'], shot_masks(want)['few'])
    y = torch.arange(3).repeat_interleave(20)
    assert shot_accuracy(torch.eye(3)[y], y, counts)['overall'] == 1.
    line = plot_marginal({'p': [.1, .2, .7]}, counts).lines[0]
    assert line.get_ydata().tolist() == pytest.approx([.7, .1, .2])                 # from common to rare


def test_a_counter_is_counted_already():
    "class_counts(Counter(y)) counted the keys: one of each, and the loss was plain cross-entropy"
    assert class_counts(Counter(LABELS)).tolist() == [3, 1, 7]
    assert class_counts({0: 3, 2: 7}, num_classes=4).tolist() == [3, 0, 7, 0]
    assert BalancedSoftmax.from_dls(Counter(LABELS)).shift.argmin() == 1
    with pytest.raises(ValueError, match=r'classes \[1\]'): BalancedSoftmax({0: 3, 2: 7})


@pytest.mark.parametrize('counts', [Counter('aabc'), pd.Series(list('aabc')).value_counts(), {0.: 1, 1.: 3},
                                    {-1: 3, 0: 5}], ids=str)
def test_counts_with_names(counts):
    "Names were dropped, and their order was that of frequency"
    for make in (BalancedSoftmax, BalancedSigmoid, shot_masks):
        with pytest.raises(ValueError, match='vocab'): make(counts)


@pytest.mark.parametrize('series', [
    LABELS[LABELS != 1], LABELS.sample(frac=1, random_state=0), pd.concat([LABELS, LABELS]), LABELS.astype('Int64'),
    LABELS.astype('category'), LABELS.astype('uint16'), LABELS.astype('int8'), LABELS[::-1], LABELS.to_frame('label'),
    LABELS.to_numpy()[::-1], LABELS.to_numpy().astype(object)], ids=lambda s: f'{type(s).__name__}')
def test_a_column_of_a_table(series):
    "A Series after train_test_split, drop or concat raised KeyError: 2, or said `pass integers`, which it had"
    want = np.bincount(np.asarray(series).astype(int).ravel(), minlength=3).tolist()
    assert class_counts(series, 3).tolist() == want
    class Table(Dataset):
        targets = series
        def __len__(self): return len(series)
    assert class_counts(Table(), 3).tolist() == want


# labels of the drawn items

class Items(Dataset):
    "Eight items, whose labels are known"
    targets, target_transform = [0, 0, 0, 0, 0, 1, 1, 2], None
    def __init__(self, target_transform=None): self.target_transform = target_transform
    def __len__(self): return 8
    def __getitem__(self, i):
        y = self.targets[i]
        return torch.zeros(2), y if self.target_transform is None else self.target_transform(y)


@pytest.mark.parametrize('transform,want', [
    (lambda y: 2 - y, [1, 2, 5]), (lambda y: min(y, 1), [5, 3]), (lambda y: torch.eye(3)[y], [5, 2, 1]),
    ({0: 1, 1: 0, 2: 2}.get, [2, 5, 1])])
def test_target_transform(transform, want):
    "fastai#3706: the labels of the files were counted, not those that target_transform makes of them"
    ds = Items(transform)
    shuffled = DataLoader(ds, sampler=RandomSampler(ds))
    for part in (ds, DataLoader(ds), Subset(ds, range(8)), ConcatDataset([ds]), shuffled):
        assert class_counts(part).tolist() == want
    drawn = [int(torch.as_tensor(y).argmax()) if torch.is_tensor(y) else y for _, y in ds]
    assert class_counts(drawn).tolist() == want
    assert class_counts(Subset(ds, [7])).sum() == 1


def test_a_loader_that_draws_its_own_shares():
    "pytorch#97944: samplers were ignored, so after a weighted sampler the correction was made twice"
    ds = Items()
    drawn = DataLoader(ds, sampler=SubsetRandomSampler([0, 5, 7]))
    assert class_counts(drawn).tolist() == [1, 1, 1]
    assert class_counts(DataLoader(ds, batch_size=2, shuffle=True)).tolist() == [5, 2, 1]
    assert class_counts(DataLoader(random_split(ds, [6, 2])[0])).sum() == 6
    weighted = WeightedRandomSampler([.1]*5 + [.25]*2 + [.5], 8)
    class Own(list): "A batch sampler without a sampler"
    for loader in (DataLoader(ds, sampler=weighted), DataLoader(ds, batch_sampler=Own([[0, 7], [5, 7]]))):
        for make in (class_counts, BalancedSoftmax.from_dls, BalancedSigmoid.from_dls):
            with pytest.raises(ValueError, match='WeightedRandomSampler|Own'): make(loader)
    assert class_counts(DataLoader(ds, sampler=weighted).dataset).tolist() == [5, 2, 1]


def test_weighted_dataloaders_of_fastai():
    "The same case in fastai"
    import fastai.callback.data  # noqa: F401, which has weighted_dataloaders
    block = DataBlock((TransformBlock, CategoryBlock), get_y=lambda i: 'ab'[i % 4 == 0])
    items, split = range(40), dict(bs=4, num_workers=0)
    even = block.weighted_dataloaders(list(items), [1]*40, **split)
    assert class_counts(even).sum() == 32
    uneven = block.weighted_dataloaders(list(items), list(range(1, 41)), **split)
    with pytest.raises(ValueError, match='WeightedDL'): BalancedSoftmax.from_dls(uneven)


def test_labels_of_other_items():
    "A wrapper that leaves items out, a list of class names, two data sets side by side: other numbers of labels"
    class Wrapped(Dataset):
        def __init__(self, dataset, n): self.dataset, self.n = dataset, n
        def __len__(self): return self.n
    assert class_counts(Wrapped(Items(), 8)).tolist() == [5, 2, 1]
    with pytest.raises(ValueError, match='5 items, but 8 labels'): class_counts(Wrapped(Items(), 5))
    class Named(Items):
        targets, labels = None, [0, 1, 2]
    with pytest.raises(ValueError, match='Named has 8 items, but 3 labels'): class_counts(Named())
    with pytest.raises(ValueError, match='StackDataset has 8 items'): class_counts(StackDataset(Items(), Items()))


# values that are not probabilities

def test_logits_in_place_of_probabilities_and_back():
    "torchmetrics#974, small-text#39: ece of logits was 8.0; get_preds() of fastai, probabilities, passed as logits"
    logits, y = 5*torch.randn(40, 4), torch.randint(4, (40,))
    for score in (lambda p: ece(p, y), lambda p: reliability(p, y), marginal_likelihood, estimate_prior):
        score(logits.softmax(1))
        score(logits.softmax(1).half())
        for bad in (logits, logits.sigmoid(), logits.log_softmax(1), logits*torch.nan):
            with pytest.raises(ValueError, match='probs'): score(bad)
    for score in (lambda z: fit_temperature(z, y), lambda z: adjust_logits(z, [4, 3, 2, 1])):
        score(logits)
        score(logits.log_softmax(1))
        for bad in (logits.softmax(1), logits.softmax(1).half(), F.one_hot(y, 4).float()):
            with pytest.raises(ValueError, match='probabilities'): score(bad)
    masks = torch.randn(2, 4, 3, 3)
    adjust_logits(masks, [4, 3, 2, 1])
    with pytest.raises(ValueError, match='probabilities'): adjust_logits(masks.softmax(1), [4, 3, 2, 1])


@pytest.mark.parametrize('loss', [BalancedSoftmax, BalancedSigmoid, FocalLoss, LDAM, SigmoidFocalLoss])
def test_class_weights_that_are_none(loss):
    "1/n of a class without images: the loss was NaN from the first batch on"
    for bad in (1/torch.tensor([3., 0, 1]), [1, float('nan'), 2], [1, -1, 2]):
        with pytest.raises(ValueError, match=r'weight .* classes \[1\]'): loss([3, 2, 1], weight=bad)
    with pytest.raises(ValueError, match='vocab'): loss([3, 2, 1], weight=dict(a=1, b=2, c=3))
    assert loss([3, 2, 1], weight=[0, 1, 2]).weight.tolist() == [0, 1, 2]


def multi_label_dls():
    block = DataBlock((TransformBlock, MultiCategoryBlock), get_y=lambda i: ['ab', 'a', 'b', 'abc'][i % 4])
    return block.dataloaders(list(range(40)), bs=4, num_workers=0)


def test_multi_label_loaders_are_no_softmax():
    "BalancedSoftmax.from_dls trained a softmax on several labels a sample"
    dls = multi_label_dls()
    for loss in (BalancedSoftmax, LDAM, FocalLoss):
        with pytest.raises(ValueError, match='BalancedSigmoid'): loss.from_dls(dls)
    loss = BalancedSigmoid.from_dls(dls, multilabel=True)
    assert torch.equal(loss.shift, log_odds_prior(class_counts(dls), len(dls.train_ds)))
    assert not loss.foreground_only and BalancedSigmoid([3, 1], total=9).foreground_only
    one = F.one_hot(torch.tensor([0, 0, 1]), 2)
    assert torch.equal(BalancedSoftmax.from_dls(one).shift, log_prior([2, 1]))            # one-hot rows are one class


# shapes and types of targets, other frameworks

@pytest.mark.parametrize('dtype', [torch.int8, torch.uint8, torch.int16, torch.int32, torch.uint16, torch.bool])
@pytest.mark.parametrize('loss', [BalancedSoftmax, BalancedSigmoid, FocalLoss, LDAM, SigmoidFocalLoss])
def test_targets_of_any_integer_type_and_in_a_column(loss, dtype):
    "fastai#3860, #1070: (N, 1) and int8, as a table has them, failed where CrossEntropyLossFlat takes them"
    f, x, y = loss([5, 3]), torch.randn(6, 2), torch.tensor([0, 1, 1, 0, 0, 1])
    want = f(x, y)
    for target in (y.to(dtype), y.to(dtype)[:, None]): assert torch.equal(f(x, target), want)
    pixels = f(x[..., None, None].expand(6, 2, 3, 3), y.to(dtype)[:, None, None, None].expand(6, 1, 3, 3))
    torch.testing.assert_close(pixels, want)


def test_a_fastai_table_from_file_to_training():
    "fastai#3860: from_dls knew nothing of tables"
    from fastai.tabular.all import Categorify, Normalize, TabularDataLoaders, tabular_learner
    rng = np.random.default_rng(0)
    table = pd.DataFrame(dict(a=rng.normal(size=200), b=rng.choice(list('xy'), 200), y=['p']*120 + ['q']*60 + ['r']*20))
    dls = TabularDataLoaders.from_df(table, y_names='y', cat_names=['b'], cont_names=['a'], bs=20,
                                     procs=[Categorify, Normalize], y_block=CategoryBlock())
    assert class_counts(dls).tolist() == dls.train_ds.items.y.value_counts().sort_index().tolist()
    counts = class_counts(dls)
    learn = tabular_learner(dls, layers=[8], loss_func=BalancedSoftmax.from_dls(dls), metrics=[accuracy, ECE(),
                            *shot_metrics(counts)])
    quiet(learn).fit(1)
    assert len(learn.recorder.values[0]) == 8 and all(np.isfinite(learn.recorder.values[0][:4]))


def identity(x): return x
class Mask(torch.Tensor): "What a segmentation loader has for a label"


def test_masks_and_two_targets():
    "Every mask was opened before the error came; of two targets the first was counted"
    opened = []
    def mask(i):
        opened.append(i)
        return torch.zeros(4, 4).as_subclass(Mask)
    with pytest.raises(ValueError, match='Mask .*count pixels'): class_counts(Datasets(range(9), [[identity], [mask]]))
    assert len(opened) <= 2                                                     # fastai looks at one when it is set up
    two = Datasets(range(9), [[identity], [lambda i: i % 3], [lambda i: i % 2]], n_inp=1)
    with pytest.raises(ValueError, match='2 targets'): class_counts(two)
    assert class_counts(two.tls[-1]).tolist() == [5, 4]


@pytest.mark.parametrize('strict', [False, True])
def test_export_and_full_graphs(strict):
    "MONAI#1592: the functional loss could not be compiled in one graph or exported, nor the module without `strict`"
    x, y = torch.randn(6, 3), torch.randint(3, (6,))
    class Functional(nn.Module):
        def forward(self, x, y): return balanced_softmax_loss(x, y, [5, 3, 1])
    class Adjusted(nn.Module):
        def forward(self, x, y): return adjust_logits(x, [5, 3, 1])
    for f in (Functional(), Adjusted(), BalancedSoftmax([5, 3, 1]), BalancedSigmoid([5, 3, 1])):
        exported = torch.export.export(f, (x, y), strict=strict).module()
        torch.testing.assert_close(exported(x, y), f(x, y))
        if strict: continue
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(f, backend='eager', fullgraph=True)(x, y), f(x, y))


# a class without training images

def test_a_class_without_training_images():
    "`few` is 0 to 19 images, but the metric raised at 0, at the end of the first epoch"
    assert shot_masks([200, 30, 0])['few'].tolist() == [False, False, True]
    learn = tiny_learner(3, shot_metrics([200, 30, 0]))
    learn.fit(1)
    assert not any(np.isnan(learn.recorder.values[0]))
    with pytest.raises(ValueError, match=r'negative for classes \[1\]'): shot_metrics([5, -1])      # before any epoch
    with pytest.raises(ValueError, match='3 classes, but there are 2'): tiny_learner(3, shot_metrics([5, 1])).fit(1)


def test_ece_of_batches_is_that_of_the_whole():
    "The metric kept all logits of the validation set: 10 GB for 50,000 images of 50,000 classes"
    learn = tiny_learner(3, ECE())
    learn.fit(1)
    probs, targs = learn.get_preds()
    assert learn.recorder.values[0][-1] == pytest.approx(ece(probs, targs).item(), abs=1e-6)
    assert not any(len(v) > 15 for v in vars(learn.metrics[0]).values() if torch.is_tensor(v))


def test_a_detector_of_one_class():
    "Its regions say 1 for the class and 0 for background; the loss of one logit takes no indices"
    from types import SimpleNamespace
    from balms.detector import LossHeads
    logits, labels = torch.randn(6, 1), torch.tensor([0, 1, 1, 0, 0, 1])
    loss = BalancedSigmoid([3], total=40, reduction='none')
    heads = SimpleNamespace(loss_func=loss, box_predictor=SimpleNamespace(background=False), row_weights=None)
    assert torch.equal(LossHeads.class_loss(heads, logits, labels), loss(logits, labels.float()[:, None]).mean())


# the classifier

class Gated(nn.Module):
    "A squeeze-and-excite gate of linear layers, and a convolution as classifier"
    def __init__(self):
        super().__init__()
        self.classifier, self.gate = nn.Conv2d(4, 3, 1), nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 4))
    def forward(self, x): return self.classifier((x*self.gate(x).sigmoid())[..., None, None])[..., 0, 0]

class Adapter(nn.Module):
    "A linear layer with one of low rank beside it"
    def __init__(self, base):
        super().__init__()
        self.base, self.lora_A, self.lora_B = base, nn.Linear(4, 1, False), nn.Linear(1, 3, False)
    def forward(self, x): return self.base(x) + self.lora_B(self.lora_A(x))

def with_softmax(): return nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3), nn.Softmax(1))
def two_heads():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)
        def forward(self, x): return self.a(x) + self.b(x)
    return Net()


def weights_of(learn): return {k: v.clone() for k, v in learn.model.state_dict().items()}
def is_as_before(learn, weights): return all(torch.equal(v, weights[k]) for k, v in learn.model.state_dict().items())
def stage1(model):
    "A learner with a trained network"
    torch.manual_seed(0)
    learn = tiny_learner(3, accuracy)
    learn.model, learn.lr = model, .05
    learn.fit(1)
    return learn


@pytest.mark.parametrize('make', [Gated, lambda: nn.Sequential(nn.BatchNorm1d(4), Adapter(nn.Linear(4, 3))),
                                  with_softmax, two_heads])
@pytest.mark.parametrize('kwargs', [dict(), dict(scales=True), dict(views=1), dict(bn_drift=True)], ids=str)
def test_the_last_linear_layer_is_not_the_classifier(make, kwargs):
    "deit#82, setfit#271, peft#310: a gate, or an adapter, was started again and trained in place of the classifier"
    learn = stage1(make())
    weights, loss = weights_of(learn), learn.loss_func
    with pytest.raises(ValueError, match='not that of its last linear layer'):
        learn.fit_classifier(1, loss_func=BalancedSoftmax([1, 2, 3]), **kwargs)
    assert is_as_before(learn, weights) and learn.loss_func is loss
    assert not any(type(m) is ScaledLinear for m in learn.model.modules())
    for change in (nearest_class_mean, feature_bank):
        with pytest.raises(ValueError, match='not that of its last linear layer'): change(learn)
    assert is_as_before(learn, weights) and all(p.requires_grad for p in learn.model.parameters())


@pytest.mark.parametrize('weight_norm', [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm,
                                         nn.utils.weight_norm])
@pytest.mark.filterwarnings('ignore:.*weight_norm.* is deprecated')
def test_a_weight_that_is_computed(weight_norm):
    "With weight_norm the `new` classifier kept its weights, and tau_normalize changed nothing"
    learn = stage1(nn.Sequential(nn.BatchNorm1d(4), weight_norm(nn.Linear(4, 3))))
    weights = weights_of(learn)
    for change in (lambda: learn.fit_classifier(1), lambda: nearest_class_mean(learn),
                   lambda: tau_normalize(find_classifier(learn.model))):
        with pytest.raises(ValueError, match='weight_norm'): change()
    assert is_as_before(learn, weights)


def test_the_look_at_the_classifier_changes_nothing():
    "Modes of single layers, numbers of dropout, statistics"
    net = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3)).train()
    net[0].eval()
    before, random = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    assert check_classifier(net, torch.randn(5, 4, generator=torch.Generator())) is net[2]
    assert [m.training for m in net] == [False, True, True] and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and not net[2]._forward_hooks


@pytest.mark.parametrize('cbs', [lambda: [MetaSampler(), GradientAccumulation(128)], lambda: [MetaSampler(), MixUp()],
                                 lambda: [MetaSampler(), MetaSampler()]])
@pytest.mark.parametrize('kwargs', [dict(), dict(scales=True), dict(views=1), dict(reset=False)], ids=str)
def test_a_refused_second_stage_leaves_the_first(cbs, kwargs):
    "Accuracy fell from .810 to .130, and after MixUp's refusal the learner could not even validate"
    learn = stage1(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)))
    weights, scores, loss, dl = weights_of(learn), learn.validate(), learn.loss_func, learn.dls.train
    with pytest.raises(ValueError, match='MetaSampler'):
        learn.fit_classifier(1, loss_func=BalancedSoftmax([1, 2, 3]), cbs=cbs(), **kwargs)
    assert is_as_before(learn, weights) and learn.validate() == scores
    assert learn.loss_func is loss and learn.dls.train is dl and learn.opt is None
    assert all(p.requires_grad for p in learn.model.parameters()) and type(learn.model[1]) is nn.Linear


def test_an_interrupted_second_stage_keeps_what_it_has():
    "Ctrl-C is no error: what was learned until then stays, and its scales are folded"
    from fastai.callback.core import Callback
    class Stop(Callback):
        def after_batch(self):
            if self.training: raise KeyboardInterrupt
    learn = stage1(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)))
    weights = weights_of(learn)
    with pytest.raises(KeyboardInterrupt): learn.fit_classifier(1, scales=True, cbs=Stop())
    assert type(learn.model[1]) is nn.Linear and not is_as_before(learn, weights)


def test_files_of_a_bank_are_where_those_of_the_learner_are(tmp_path, monkeypatch):
    "fastai#2043: with views=1 SaveModelCallback and CSVLogger wrote into the working directory"
    elsewhere = tmp_path/'elsewhere'
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    learn = stage1(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)))
    learn.path, learn.model_dir = tmp_path/'mine', 'models'
    learn.path.mkdir()
    learn.fit_classifier(1, views=1, cbs=[SaveModelCallback(), CSVLogger()])
    assert not list(elsewhere.iterdir())
    assert {str(f.relative_to(learn.path)) for f in learn.path.rglob('*.*')} == {'models/model.pth', 'history.csv'}


# lists

LINES = 'a/1.jpg 0\nb/ü.jpg 1\n'


@pytest.mark.parametrize('data', [
    LINES.encode('utf-16'), LINES.encode('utf-8-sig'), (LINES + '\n  \n').encode(),
    LINES.replace('\n', '\r\n').encode(), LINES.rstrip().encode(), (LINES + '\n').encode('utf-16')], ids=range(6))
@pytest.mark.parametrize('pack,name', [(bytes, 'l.txt'), (gzip.compress, 'l.txt.gz')], ids=['plain', 'gzip'])
def test_lists_as_people_write_them(tmp_path, data, pack, name):
    "tensorflow/models#261, LightCNN#5: UTF-16, as PowerShell writes, was `not a text file`; a blank last line an error"
    (tmp_path/name).write_bytes(pack(data))
    images = read_list(tmp_path/name)
    assert (images.files, images.targets.tolist(), images.lines) == (['a/1.jpg', 'b/ü.jpg'], [0, 1], [1, 2])


@pytest.mark.parametrize('data,where,what', [
    (LINES.encode('latin-1'), ':2', 'UTF-8'), (b'a.jpg 0\nb.jpg, 1\n', ':2', 'only a space before the label'),
    (b'a.jpg 0\nb.jpg,1\n', ':2', 'with a space'), (b'"a b.jpg" 0\n', ':1', 'without quotes'),
    (b'a.jpg 0\n\nb.jpg 1\n', ':2', 'empty line'), (b'\n\n', '', 'the list is empty'),
    (b'{"images": []}', ':1', 'JSON'), (b'\n[{"file_name": "a.jpg"}]', ':1', 'JSON')])
@pytest.mark.parametrize('pack,suffix', [(bytes, ''), (gzip.compress, '.gz')], ids=['plain', 'gzip'])
def test_lists_that_are_none(tmp_path, data, where, what, pack, suffix):
    "caffe#1951: latin-1 had no line, `a.jpg, 0` was a missing file `a.jpg,`, .json.gz `one word, '{'`"
    path = tmp_path/f'list{suffix}'
    path.write_bytes(pack(data))
    with pytest.raises(ValueError, match=what) as e: read_list(path)
    assert f'{path}{where}: ' in str(e.value)


def test_training_and_validation_lists_without_a_test_list(tmp_path):
    "BagofTricks-LT#13, SADE#7: the published lists of iNaturalist 2018, train and val, could not start; nor own ones"
    from balms.learner import load_images
    from balms.recipe import Recipe
    from balms.runs import run
    root = sample_tree(tmp_path/'photos', n_max=16, imbalance=4)
    recipe = partial(Recipe, data=str(root), method='bs', iters=2, bs=8, size=16)
    assert len(load_images(recipe())[1]) == 200 and len(load_images(recipe(eval_list='val'))[1]) == 50
    (root/'digits_test.txt').unlink()
    with pytest.raises(FileNotFoundError, match='eval_list'): load_images(recipe())
    row = run(recipe(eval_list='val'), tmp_path/'runs', workers=0)
    assert row['recipe']['eval_list'] == row['changed']['eval_list'] == 'val'
    assert recipe().key != recipe(eval_list='val').key and 'eval_list' not in recipe().identity
    inat = Recipe('inaturalist18')
    assert inat.eval_list == 'val' and not inat.changed
    with pytest.raises(ValueError, match='eval_list'): recipe(eval_list='train')
    with pytest.raises(ValueError, match='eval_list'): Recipe('digits', eval_list='val')
