"""The Meta Sampler against the plain classifier step and against the paper's text word by word, in one process.

    python benchmarks/meta.py [--threads 2] [--device cpu] [--seconds 20]

(a) is the plain step: draw a batch, classifier, Balanced Softmax, backward, SGD with Nesterov momentum and decay.
(b) is the step of the paper's text: Gumbel noise over all N images for each of the B slots, one-hot draws with a
straight-through gradient, and second-order autograd through the classifier's step.
All run in turns, so that whatever else the machine does falls on each. A ratio is the median over turns of the ratio
within a turn.
"""
import argparse, statistics, time, warnings
import torch, torch.nn.functional as F
from torch import nn
from functools import partial
from torch.utils._python_dispatch import TorchDispatchMode
from balms.core import BalancedSoftmax
from balms.data import ArrayDL, ArrayDataset, array_dls, long_tail_counts
from balms.decoupled import ClassifierOnly, feature_bank
from balms.influence import trial_step
from balms.meta import MetaSampler
from balms.meta_gradient import ClassRates, closed_form_influence, rate_gradient
from balms.models import get_model
from balms.samplers import ClassSampler, sampling_rates

SETTINGS = {  # N is long_tail_counts' sum; limits of ours/(a) and (b)/ours
    'CIFAR-100-LT features': dict(n_max=500, k=100, imbalance=100, d=64, over_a=3.5, under_b=15),
    'ImageNet-LT features': dict(n_max=None, k=1000, imbalance=256, d=512, over_a=3.5, under_b=50),
}
B, LR = 512, .1


def problem(n_max, k, imbalance, d, device, **_):
    "Features and labels; in place of ImageNet-LT's profile an exponential one with as many images"
    if n_max: counts = torch.tensor(long_tail_counts(n_max, k, imbalance))
    else:
        counts = torch.tensor([max(5, int(1280*256**(-(i/(k - 1))**.9))) for i in range(k)])
        counts[:] = (counts*115_846/counts.sum()).round()
        counts[0] += 115_846 - counts.sum()
    y = torch.arange(k).repeat_interleave(counts).to(device)
    return torch.randn(len(y), d, device=device), y, counts


class Plain:
    "(a): and what the others build on"
    def __init__(self, X, Y, counts, instance_balanced=True):
        torch.manual_seed(0)
        self.X, self.Y, self.counts, self.k = X, Y, counts, len(counts)
        self.head = nn.Linear(X.shape[1], self.k).to(X.device)
        self.loss = BalancedSoftmax(counts).to(X.device)
        self.opt = torch.optim.SGD(self.head.parameters(), LR, momentum=.9, nesterov=True, weight_decay=5e-4)
        self.sampler = ClassSampler(Y, device=X.device)
    def backward(self):
        idx = self.sampler.draw(B)
        self.f, self.y = self.X[idx], self.Y[idx]
        self.z = self.head(self.f)
        self.z.retain_grad()
        self.loss(self.z, self.y).backward()
    def step(self):
        self.backward()
        self.opt.step(); self.opt.zero_grad()


class Ours(Plain):
    "The closed form: `balms.meta_gradient` in a plain PyTorch loop"
    def __init__(self, *a):
        super().__init__(*a)
        self.psi = ClassRates(self.counts).to(self.X.device)
        self.rates = self.psi.rates()
        self.psi_opt = torch.optim.Adam(self.psi.parameters(), .01, (.9, .99), fused=True)
        self.meta = ClassSampler(self.Y, sampling_rates(self.counts, 0.), 1, device=self.X.device)
        self.params = list(self.head.parameters())
        self.trial = partial(trial_step, self.opt)
    def step(self):
        self.backward()
        with torch.no_grad():
            idx = self.meta.draw(B)
            meta, grads = (self.X[idx], self.Y[idx]), [p.grad for p in self.params]
            influence = closed_form_influence(self.params, self.f, self.z.grad, *meta, self.trial, grads)
            self.psi.w.grad = rate_gradient(influence, self.y, self.rates)*(1 - self.psi.r)
        self.psi_opt.step()
        self.rates = self.psi.rates()
        self.sampler.set_rates(self.rates)
        self.opt.step(); self.opt.zero_grad()


class WordByWord(Plain):
    "(b): the paper's text"
    def __init__(self, *a):
        super().__init__(*a)
        self.psi = torch.zeros(self.k, device=self.X.device, requires_grad=True)
        self.psi_opt = torch.optim.Adam([self.psi], .01, (.9, .99))
        self.meta = ClassSampler(self.Y, sampling_rates(self.counts, 0.), 1, device=self.X.device)
    def step(self):
        soft = F.gumbel_softmax(F.logsigmoid(self.psi)[self.Y].expand(B, -1), tau=1)          # B x N
        value, idx = soft.max(1)
        f, y, chosen = self.X[idx], self.Y[idx], 1 + value - value.detach()
        l = F.cross_entropy(self.head(f) + self.loss.shift, y, reduction='none')
        params = list(self.head.parameters())
        grads = torch.autograd.grad((chosen*l).mean(), params, create_graph=True)
        trial = [p - LR*g for p, g in zip(params, grads)]
        m = self.meta.draw(B)
        self.psi_opt.zero_grad()
        self.psi.grad, = torch.autograd.grad(F.cross_entropy(F.linear(self.X[m], *trial), self.Y[m]), [self.psi])
        self.psi_opt.step()
        self.loss(self.head(f), y).backward()
        self.opt.step(); self.opt.zero_grad()


class Largest(TorchDispatchMode):
    "The largest tensor that is made under it, in elements"
    numel = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if not isinstance(t, torch.Tensor): continue
            if t.untyped_storage().nbytes() >= t.numel()*t.element_size(): self.numel = max(self.numel, t.numel())
        return out


def race(steps, seconds, sync, reps=1):
    "Seconds a step of each, by turns"
    turns, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(turns) < 5:
        names = list(steps)[::1 if len(turns) % 2 else -1]
        t = {}
        for n in names:
            r = reps.get(n, 1) if isinstance(reps, dict) else reps
            begin = time.perf_counter()
            for _ in range(r): steps[n]()
            sync()
            t[n] = (time.perf_counter() - begin)/r
        turns.append(t)
    return turns


def ratio(turns, a, b):
    lo, mid, hi = statistics.quantiles([t[a]/t[b] for t in turns], n=4)
    return mid, f'{mid:6.2f}  [{lo:.2f}, {hi:.2f}]'


def cached(name, spec, a, sync):
    X, Y, counts = problem(**spec, device=a.device)
    plain, ours, words = Plain(X, Y, counts), Ours(X, Y, counts), WordByWord(X, Y, counts)
    fast = {'plain': plain.step, 'ours': ours.step}
    for s in fast.values():
        for _ in range(20): s()
    turns = race(fast, a.seconds, sync, reps=10 if spec['k'] < 500 else 2)
    words.step()
    slow = race({'ours': ours.step, 'words': words.step}, a.seconds, sync, reps=dict(ours=10))
    with Largest() as big: ours.step()
    med = lambda ts, n: 1e3*statistics.median(t[n] for t in ts)
    (ra, ta), (rb, tb) = ratio(turns, 'ours', 'plain'), ratio(slow, 'words', 'ours')
    n, k, d = len(Y), len(counts), X.shape[1]
    print(f'{name}: N={n:,}, k={k:,}, d={d}, batch {B}')
    print(f'  plain step {med(turns, "plain"):8.2f} ms   ours {med(turns, "ours"):8.2f} ms', end='')
    print(f'   word by word {med(slow, "words"):8.1f} ms')
    print(f'  ours / plain        {ta}   at most {spec["over_a"]}')
    print(f'  word by word / ours {tb}   at least {spec["under_b"]}')
    print(f'  largest array of our step: {big.numel:,} elements; B x k = {B*k:,}, B x N = {B*n:,}')
    return ra <= spec['over_a'] and rb >= spec['under_b'] and big.numel <= max(B*k, B*d, d*k)


def frozen(a, sync, n=10847):
    "A frozen ResNet-32: the plain step and the Meta Sampler inside a fastai `Learner`, on images and on features"
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper
    counts = torch.tensor(long_tail_counts(500, 100, 100))
    y = torch.arange(100).repeat_interleave(counts)
    ds = ArrayDataset(torch.randint(256, (len(y), 3, 32, 32), dtype=torch.uint8), y)
    def learner(cbs, bank=None):
        torch.manual_seed(0)
        dls = array_dls(ds, ds.subset(slice(0, 100)), bs=B, device=a.device)
        net = get_model('resnet32', 100).to(a.device)
        loss = BalancedSoftmax(counts).to(a.device)
        sgd = partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9, nesterov=True)
        learn = Learner(dls, net, loss_func=loss, lr=LR, opt_func=sgd, train_bn=False, cbs=cbs)
        if bank: learn.dls, learn.model = bank_dls(bank, learn), net.fc
        return learn
    def bank_dls(bank, learn):
        dls = DataLoaders(ArrayDL(bank, B, shuffle=True, device=a.device), ArrayDL(bank, 1000, device=a.device),
                          device=a.device)
        dls.c = 100
        return dls
    def stepper(learn):
        "One training step of a learner that stands in the middle of a fit"
        learn.remove_cbs([cb for cb in learn.cbs if cb.name in ('progress', 'recorder')])
        learn.create_opt()
        learn.opt.set_hypers(lr=LR)
        learn.epoch, learn.n_epoch, learn.n_iter, learn.dl = 0, 1, 1, learn.dls.train
        learn('before_fit'); learn('before_epoch'); learn('before_train')
        dl = learn.dls.train
        def step(): learn.one_batch(0, dl.after_batch(dl.batch(dl.sampler.draw(B))))
        return step
    bank = feature_bank(learner([]), 1)
    steps = {'plain': stepper(learner([ClassifierOnly()])), 'ours': stepper(learner([ClassifierOnly(), MetaSampler()])),
             'plain, bank': stepper(learner([], bank)), 'ours, bank': stepper(learner([MetaSampler()], bank))}
    for s in steps.values(): s()
    turns = race(steps, 2*a.seconds, sync, reps={'plain, bank': 10, 'ours, bank': 10})
    med = lambda n: 1e3*statistics.median(t[n] for t in turns)
    pairs = ('ours', 'plain'), ('ours, bank', 'plain'), ('ours, bank', 'plain, bank')
    (ra, ta), (rb, tb), (_, tc) = (ratio(turns, *pair) for pair in pairs)
    print(f'frozen ResNet-32, 32x32 images, batch {B}, through a fastai Learner:')
    print('  ' + '   '.join(f'{n} {med(n):.1f} ms' for n in steps))
    print(f'  ours / plain                     {ta}   at most 2.1')
    print(f'  ours with a bank / plain         {tb}   at most 1.2')
    print(f'  ours with a bank / plain with a bank {tc}')
    return ra <= 2.1 and rb <= 1.2


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--threads', type=int, default=torch.get_num_threads())
    p.add_argument('--device', default='cpu')
    p.add_argument('--seconds', type=float, default=20)
    a = p.parse_args()
    warnings.filterwarnings('ignore')
    torch.set_num_threads(a.threads)
    sync = torch.cuda.synchronize if a.device.startswith('cuda') else lambda: None
    print(f'torch {torch.__version__}, {a.device}, {a.threads} threads')
    ok = [cached(n, s, a, sync) for n, s in SETTINGS.items()] + [frozen(a, sync)]
    print(f'all within their limits: {"yes" if all(ok) else "NO"}')
    return 0 if all(ok) else 1


if __name__ == '__main__': raise SystemExit(main())
