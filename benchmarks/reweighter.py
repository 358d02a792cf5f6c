"""The Meta Reweighter against the plain step of stage 2, and on CUDA a step of both stages at full size.

    python benchmarks/reweighter.py [--threads 2] [--device cpu] [--turns 5] [--bs 2] [--side 320] [--classes 1230]
    python benchmarks/reweighter.py --device cuda --bs 8 --side 800 --precision bfloat16 --stage1   # LVIS's sizes, and
                                                                                        # the hours of its schedule

Mask R-CNN, ResNet-50 with a feature pyramid, all frozen but the box classifier; images are digit scenes of the side
given. Sides:
    plain           the step of stage 2 with BalancedSigmoid: no mask head, since nothing of it is trained
    with mask head  the same, with torchvision's training pass as it is
    reweighter      plain, and the Meta Reweighter; the regions of a step are the meta regions of the next
    own meta batch  plain, and the Meta Reweighter with a second batch of as many images
Scenes have a few digits each and are quick to decode: photos of LVIS have more objects, and may keep a loader busier
than the device. Sides run in turns, so that whatever else the machine does falls on each; a ratio is the median over
turns of the ratio within a turn.
"""
import statistics
import tempfile
import time
from copy import deepcopy
from functools import partial
from types import SimpleNamespace
import torch
from fastcore.script import call_parse
from torchvision.ops import FrozenBatchNorm2d
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from balms.annotations import read_annotations
from balms.detection_recipe import SEG_PRESETS
from balms.detector import SEG_METHODS, InstanceSeg, mask_rcnn, sum_losses
from balms.instance_data import digit_scenes, instance_dls
from balms.roi_reweighter import RoIReweighter, box_classifier_learner
from balms.stage import TrainOnly

LIMIT = 1.6      # reweighter over plain


class KeepMasks(Callback):
    "Let the mask head run in stage 2"
    order = 41
    def before_fit(self): self.model.roi_heads.classifier_only = False


def learner(a, net, dls, second=True):
    "Stage 2, or stage 1 at a rate of 0: random weights would run away, and a network that finds nothing has less to do"
    sgd = partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9)
    learn = Learner(dls, deepcopy(net).to(a.device), loss_func=sum_losses, opt_func=sgd, lr=.02 if second else 0.,
                    cbs=[InstanceSeg(), TrainOnly()])
    learn.create_mbar, learn.logger = False, lambda *_: None
    if a.precision == 'bfloat16': learn.to_bf16()
    if not second: return learn
    return box_classifier_learner(learn, SEG_METHODS['bs'].loss(torch.logspace(4.7, 0, a.classes), 56_740.))


def seconds(a, learn, cbs, steps):
    "Seconds a step"
    learn.dls.train.n_batches = steps
    if a.device == 'cuda': torch.cuda.synchronize()
    start = time.perf_counter()
    with learn.no_bar(): learn.fit(1, cbs=list(cbs))
    if a.device == 'cuda': torch.cuda.synchronize()
    return (time.perf_counter() - start)/steps


def step_time(a, net, dls, second):
    learn, cbs = learner(a, net, dls, second), [RoIReweighter()] if second else []
    seconds(a, learn, cbs, 2)
    return statistics.median(seconds(a, learn, cbs, a.steps) for _ in range(a.turns))


def schedule(a, net, loaders, stage2):
    "Time and memory of stage 1, and the hours of the paper's schedule on one device, and on 8 that talk in no time"
    if a.device == 'cuda':
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    preset, stage1 = SEG_PRESETS['paper'], step_time(a, net, loaders(0), False)
    hours = lambda one, two: (preset['iters']*one + preset['iters2']*two)/3600
    memory = f', at most {torch.cuda.max_memory_allocated()/2**30:.1f} GiB' if a.device == 'cuda' else ''
    print(f'stage 1: {1000*stage1:.1f} ms a step{memory}')
    if a.bs != preset['bs']: return
    one = loaders(0, bs=1)
    shared = hours(step_time(a, net, one, False), step_time(a, net, one, True))
    print(f'the schedule of {preset["iters"]:,} + {preset["iters2"]:,} steps: {hours(stage1, stage2):.1f} hours on one '
          f'such device, {shared:.1f} on 8 with an image each')


@call_parse
def main(
    threads:int=2, # CPU threads
    device:str='cpu', # cpu or cuda
    turns:int=5, # How often each side runs
    steps:int=3, # Steps a turn
    bs:int=2, # Images a step
    side:int=320, # Of the images, in pixels
    classes:int=1230, # Without background
    precision:str='float32', # float32 or bfloat16
    stage1:bool=False, # Also time a step of stage 1, and say the hours of the paper's schedule
):
    "The Meta Reweighter against the plain step of stage 2"
    a = SimpleNamespace(**locals())
    torch.set_num_threads(threads)
    tmp = tempfile.TemporaryDirectory()
    root = digit_scenes(tmp.name, n=16, n_valid=1, size=side)
    anns = read_annotations(root/'digits_train.json', root)
    def loaders(seed, bs=bs): return instance_dls(anns, anns, bs=bs, device=device, seed=seed, n_batches=steps)
    torch.manual_seed(0)
    net = mask_rcnn(classes, min_size=side, max_size=2*side, norm_layer=FrozenBatchNorm2d, trainable_layers=3)
    endless = loaders(1).train
    endless.n_batches = 10**6
    sides = {'plain': (), 'with mask head': (KeepMasks(),), 'reweighter': (RoIReweighter(),),
             'own meta batch': (RoIReweighter(meta_dl=endless),)}
    learners = {name: learner(a, net, loaders(0)) for name in sides}
    for name, cbs in sides.items(): seconds(a, learners[name], cbs, 2)                   # warm up
    times = [{name: seconds(a, learners[name], cbs, steps) for name, cbs in sides.items()} for _ in range(turns)]
    learners.clear()                                                                     # their memory is not a run's
    where = torch.cuda.get_device_name() if device == 'cuda' else f'{threads} CPU threads'
    print(f'{where}, torch {torch.__version__}, {bs} images of {side} pixels, {classes} classes, {precision}')
    for name in sides:
        ms, ratio = (statistics.median(v) for v in ([1000*t[name] for t in times], [t[name]/t['plain'] for t in times]))
        print(f'    {name:16} {ms:9.1f} ms a step   {ratio:5.2f} times the plain one')
    ratio = statistics.median(t['reweighter']/t['plain'] for t in times)
    print(f'reweighter over plain: {ratio:.2f}, limit {LIMIT}: {"yes" if ratio <= LIMIT else "NO"}')
    if stage1: schedule(a, net, loaders, statistics.median(t['reweighter'] for t in times))
    raise SystemExit(ratio > LIMIT)
