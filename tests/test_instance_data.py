"Samplers and loaders of images with instances: plain PyTorch, restarts; AP against another evaluator."
import importlib.util, json, pickle, sys, types
import numpy as np, pytest, torch
from torch.utils.data import DataLoader
pytest.importorskip('faster_coco_eval')
from balms.annotations import coco_to_lvis, read_annotations
from balms.instance_ap import InstanceAP, detections
from balms.instance_data import InstanceDataset, RepeatFactorSampler, digit_scenes, instance_dls, repeat_factors


@pytest.fixture(scope='module')
def root(tmp_path_factory): return digit_scenes(tmp_path_factory.mktemp('lvis')/'digits')


def as_output(t, score=1.):
    boxes, masks = (t[k].as_subclass(torch.Tensor) for k in ('boxes', 'masks'))
    return dict(boxes=boxes, labels=t['labels'], scores=torch.full((len(boxes),), score), masks=masks[:, None].float())


def test_sampler_with_plain_torch(root):
    "As the sampler of PyTorch's loader: epochs differ, and one that was stopped goes on"
    ds = InstanceDataset(read_annotations(root/'digits_train.json', root))
    s = RepeatFactorSampler(repeat_factors(ds, .2), seed=5)
    def epoch(n):
        loader = DataLoader(ds, 4, sampler=s, collate_fn=list, num_workers=n)
        return [t['image_id'] for batch in loader for _, t in batch]
    first, second = epoch(0), epoch(0)
    assert first != second and len(first) == len(s.epoch_order(0)) > len(ds)
    s.set_epoch(0)
    assert epoch(1) == first
    s.set_epoch(0, used=40)
    assert epoch(0) == first[40:]


def test_batches_survive_a_restart(root):
    "A loader with workers, saved in the middle of an epoch in one process and gone on in a new one"
    a = read_annotations(root/'digits_train.json', root)
    def flat(b): return b[2].tolist(), [float(x.sum()) for x in b[0]], [t['boxes'].tolist() for t in b[1]]
    def loader(): return instance_dls(a, bs=4, seed=2, t=.2, num_workers=1, device='cpu').train
    one, two, three = loader(), loader(), loader()
    want = [flat(b) for _ in range(2) for b in one]
    it = iter(two)
    got = [flat(next(it)) for _ in range(11)]
    state = pickle.dumps(two.state_dict())
    it.close()
    three.load_state_dict(pickle.loads(state))
    assert got + [flat(b) for b in three] == want[:11 + len(three)]


def noisy_outputs(a, vs):
    "Detections that are right, moved, of the wrong class, unknown and too many"
    rng, outputs = np.random.default_rng(0), []
    for i, (_, t) in enumerate(vs):
        o = {k: torch.cat([v]*4) for k, v in as_output(t).items()}
        n = len(o['labels'])
        o['scores'] = torch.rand(n, generator=torch.Generator().manual_seed(i))
        is_wrong = torch.tensor(rng.random(n) < .3)
        o['labels'] = torch.where(is_wrong, torch.tensor(rng.integers(1, a.c + 1, n)), o['labels'])
        for j in range(n):
            dx = int(rng.integers(0, 8))
            o['masks'][j] = o['masks'][j].roll(dx, -1)
            o['boxes'][j] += torch.tensor([dx, 0, dx, 0])
        outputs.append(o)
    return outputs


def test_another_evaluator(root, monkeypatch):
    "The same AP as LVIS's own package"
    monkeypatch.setattr(np, 'float', float, raising=False)                    # it is of 2020, and knows no later numpy
    if not importlib.util.find_spec('cv2'):                                   # it draws with that
        monkeypatch.setitem(sys.modules, 'cv2', types.ModuleType('cv2'))
    pytest.importorskip('lvis', reason="LVIS's own evaluator is not installed: pip install --no-deps lvis pycocotools")
    from lvis import LVIS, LVISEval, LVISResults
    a = read_annotations(root/'digits_val.json', root)
    ap, vs = InstanceAP(a, max_dets=12), InstanceDataset(a, train=False)
    outputs = noisy_outputs(a, vs)
    ap.add(outputs, a.image_ids)
    mine = ap.compute(chunk=4)
    for kind, b, other in (('segm', '', 'bbox'), ('bbox', 'b', 'segmentation')):
        found = [{k: v for k, v in r.items() if k != other} for r in detections(outputs, a.image_ids, a)]
        truth = LVIS(str(root/'digits_val.json'))
        ev = LVISEval(truth, LVISResults(truth, found, max_dets=12), kind)
        ev.params.max_dets = 12
        ev.run()
        for k in ('AP', 'AP50', 'AP75', 'APs', 'APm', 'APr', 'APc', 'APf'):
            want, got = ev.results[k], mine[f'AP{b}{k[2:]}']
            assert (np.isnan(got) and want == -1) or abs(got - want) < 1e-9, (kind, k, mine, dict(ev.results))
    assert .05 < mine['AP'] < .95


def test_classes_in_parts_and_in_lvis_form_have_the_same_ap(root, tmp_path):
    "However many classes the evaluator has at a time; and as COCO or in LVIS's form"
    content = json.loads((root/'digits_val.json').read_text())
    for im in content['images']: del im['neg_category_ids'], im['not_exhaustive_category_ids']
    content['annotations'][0]['iscrowd'] = 1
    (tmp_path/'coco.json').write_text(json.dumps(content))
    coco_to_lvis(tmp_path/'coco.json', tmp_path/'lvis.json', train=root/'digits_train.json')
    scores = []
    for name in ('coco', 'lvis'):
        a = read_annotations(tmp_path/f'{name}.json', root)
        ap = InstanceAP(a)
        ap.add(noisy_outputs(a, InstanceDataset(a, train=False)), a.image_ids)
        scores += [ap.compute(chunk=n) for n in (3, 100)]
    assert str(scores[0]) == str(scores[1]) and str(scores[2]) == str(scores[3])
    assert all(abs(scores[0][k] - scores[2][k]) < 1e-12 for k in ('AP', 'AP50', 'APb', 'APb75'))
