"""The Meta Reweighter against the plain step of stage 2, and on CUDA a step of both stages at full size: ratios measured in one process.

    python benchmarks/reweighter.py [--threads 2] [--device cpu] [--turns 5] [--bs 2] [--side 320] [--classes 1230]
    python benchmarks/reweighter.py --device cuda --bs 8 --side 800 --precision bfloat16 --stage1      # LVIS's sizes, and hours of its schedule

Mask R-CNN, ResNet-50 with a feature pyramid, all frozen but the box classifier; images are digit scenes of the side given. Sides:
    plain           the step of stage 2 with BalancedSigmoid: no mask head, since nothing of it is trained
    with mask head  the same, with torchvision's training pass as it is
    reweighter      plain, and the Meta Reweighter; the regions of a step are the meta regions of the next
    own meta batch  plain, and the Meta Reweighter with a second batch of as many images
Scenes have a few digits each and are quick to decode: photos of LVIS have more objects, and may keep a loader busier than the device.
They run in turns, so that whatever else the machine does falls on each; a ratio is the median over turns of the ratio within a turn.
"""
import argparse, statistics, tempfile, time
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
import torch
from torchvision.ops import FrozenBatchNorm2d
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from fastai.callback.core import Callback
from balms.instance_seg import SEG_METHODS, InstanceSeg, RoIReweighter, box_classifier_learner, mask_rcnn, sum_losses
from balms.lvis import digit_scenes, instance_dls, read_annotations
from balms.recipes import TrainOnly
from balms.seg_runs import SEG_PRESETS

LIMIT = 1.6      # reweighter over plain


class KeepMasks(Callback):
    "Let the mask head run in stage 2"
    order = 41
    def before_fit(self): self.model.roi_heads.classifier_only = False


def learner(a, net, dls, second=True):
    "Stage 2 or stage 1 of a network; stage 1 at a rate of 0, since random weights would run away, and a network that finds nothing has less to do"
    learn = Learner(dls, deepcopy(net).to(a.device), loss_func=sum_losses, opt_func=partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9), lr=.02 if second else 0., cbs=[InstanceSeg(), TrainOnly()])
    learn.create_mbar, learn.logger = False, lambda *_: None
    if a.precision == 'bfloat16': learn.to_bf16()
    if not second: return learn
    n = torch.logspace(4.7, 0, a.classes)
    return box_classifier_learner(learn, SEG_METHODS['bs'].loss(n, 56_740.))


def seconds(learn, cbs, steps, device):
    learn.dls.train.n_batches = steps
    if device == 'cuda': torch.cuda.synchronize()
    t = time.perf_counter()
    with learn.no_bar(): learn.fit(1, cbs=list(cbs))
    if device == 'cuda': torch.cuda.synchronize()
    return (time.perf_counter() - t)/steps


def schedule(a, net, make, anns, s2, learners):
    "Time and memory of stage 1, and the hours of the paper's schedule; with 8 images also those of 8 devices, with one image each, that lose nothing in talking to each other"
    learners.clear()                                                  # their memory is not that of a run
    if a.device == 'cuda': torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
    def step(dls, second):
        learn = learner(a, net, dls, second)
        cbs = (RoIReweighter(),) if second else ()
        seconds(learn, cbs, 2, a.device)
        return statistics.median(seconds(learn, cbs, a.steps, a.device) for _ in range(a.turns))
    r, s1 = SEG_PRESETS['paper'], step(make(0), False)
    hours = lambda one, two: (r['iters']*one + r['iters2']*two)/3600
    print(f'stage 1: {1000*s1:.1f} ms a step' + (f', at most {torch.cuda.max_memory_allocated()/2**30:.1f} GiB' if a.device == 'cuda' else ''))
    if a.bs != r['bs']: return
    one = instance_dls(anns, anns, bs=1, device=a.device, seed=0, n_batches=a.steps)
    print(f'the schedule of {r["iters"]:,} + {r["iters2"]:,} steps: {hours(s1, s2):.1f} hours on one such device, {hours(step(one, False), step(one, True)):.1f} on 8 with an image each')


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in dict(threads=2, device='cpu', turns=5, steps=3, bs=2, side=320, classes=1230, precision='float32').items(): p.add_argument(f'--{name}', default=default, type=type(default))
    p.add_argument('--stage1', action='store_true', help='also time a step of stage 1, and say the hours of the paper\'s schedule')
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    tmp = tempfile.TemporaryDirectory()
    root = digit_scenes(tmp.name, n=16, n_valid=1, size=a.side)
    anns = read_annotations(root/'digits_train.json', root)
    make = lambda seed: instance_dls(anns, anns, bs=a.bs, device=a.device, seed=seed, n_batches=a.steps)
    torch.manual_seed(0)
    net = mask_rcnn(a.classes, min_size=a.side, max_size=2*a.side, norm_layer=FrozenBatchNorm2d, trainable_layers=3)          # as with published weights
    endless = make(1).train; endless.n_batches = 10**6
    sides = {'plain': (), 'with mask head': (KeepMasks(),), 'reweighter': (RoIReweighter(),), 'own meta batch': (RoIReweighter(meta_dl=endless),)}
    learners = {k: learner(a, net, make(0)) for k in sides}
    for k, cbs in sides.items(): seconds(learners[k], cbs, 2, a.device)                       # warm up
    turns = [{k: seconds(learners[k], cbs, a.steps, a.device) for k, cbs in sides.items()} for _ in range(a.turns)]
    where = torch.cuda.get_device_name() if a.device == 'cuda' else f'{a.threads} CPU threads'
    print(f'{where}, torch {torch.__version__}, {a.bs} images of {a.side} pixels, {a.classes} classes, {a.precision}')
    for k in sides: print(f'    {k:16} {1000*statistics.median(t[k] for t in turns):9.1f} ms a step   {statistics.median(t[k]/t["plain"] for t in turns):5.2f} times the plain one')
    ratio = statistics.median(t['reweighter']/t['plain'] for t in turns)
    print(f'reweighter over plain: {ratio:.2f}, limit {LIMIT}: {"yes" if ratio <= LIMIT else "NO"}')
    if a.stage1: schedule(a, net, make, anns, statistics.median(t['reweighter'] for t in turns), learners)
    raise SystemExit(ratio > LIMIT)


if __name__ == '__main__': main()
