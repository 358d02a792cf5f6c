"LVIS and COCO: the published counts and samples where they are at hand, another evaluator, bad files, workers, the command."
import importlib.util, json, os, pickle, re, subprocess, sys, types
from pathlib import Path
import numpy as np, pytest, torch
pytest.importorskip('faster_coco_eval')
from balms.lvis import (LVIS_FACTS, Annotations, InstanceAP, InstanceDataset, RepeatFactorSampler, balms_check_lvis, check_annotations, coco_to_lvis, detections, digit_scenes, frequency_groups, instance_dls,
                        outline_mask, read_annotations, repeat_factors)

DATA = Path(os.environ.get('BALMS_LVIS', ''))
published = pytest.mark.skipif(not os.environ.get('BALMS_LVIS'), reason="LVIS's sample and counts are not at hand: BALMS_LVIS names no folder")
COCO = Path(os.environ.get('BALMS_COCO', ''))
with_coco = pytest.mark.skipif(not os.environ.get('BALMS_COCO'), reason='no COCO images at hand: BALMS_COCO names no folder with train2017, val2017 and annotations')


@pytest.fixture(scope='module')
def root(tmp_path_factory): return digit_scenes(tmp_path_factory.mktemp('lvis')/'digits')


def changed(root, tmp_path, change):
    d = json.loads((root/'digits_train.json').read_text()); change(d); (tmp_path/'c.json').write_text(json.dumps(d))
    return tmp_path/'c.json'


def as_output(t, score=1.): return dict(boxes=t['boxes'].as_subclass(torch.Tensor), labels=t['labels'], scores=torch.full((len(t['labels']),), score), masks=t['masks'].as_subclass(torch.Tensor)[:, None].float())


def counts_file(path):
    "An annotation file with the counts of LVIS v0.5: each instance in some image, as often as the counts say"
    cats = json.loads((DATA/'lvis_v0.5_train_category_counts.json').read_text())
    n, anns, k = cats['annotated_images'], [], 0
    for c in cats['categories']:
        for j in range(c['instance_count']):
            anns.append(dict(id=len(anns), image_id=(k + j % c['image_count']) % n, category_id=c['id'], bbox=[0, 0, 9, 9], area=81, segmentation=[[0, 0, 9, 0, 9, 9]]))
        k += c['image_count']
    images = [dict(id=i, height=10, width=10, neg_category_ids=[], not_exhaustive_category_ids=[]) for i in range(n)]
    path.write_text(json.dumps(dict(images=images, annotations=anns, categories=[{k: c[k] for k in ('id', 'name')} for c in cats['categories']])))
    return cats


@published
def test_counts_of_lvis_v05(tmp_path):
    "A file with the published counts of every category: k, instances, imbalance and groups as in the facts"
    cats, f = counts_file(tmp_path/'lvis_v0.5_train.json'), LVIS_FACTS['v0.5']
    r = check_annotations(tmp_path/'lvis_v0.5_train.json', version='v0.5')
    assert r.ok, str(r)
    assert '56,740 images, 1,230 classes, 693,958 instances, federated, imbalance 26148, rare/common/frequent 454/461/315' in str(r)
    a = read_annotations(tmp_path/'lvis_v0.5_train.json')
    assert a.image_counts.tolist() == [c['image_count'] for c in cats['categories']] and a.instance_counts.tolist() == [c['instance_count'] for c in cats['categories']]
    assert a.groups == [c['frequency'] for c in cats['categories']] == frequency_groups(a.image_counts)
    r = repeat_factors(a)
    f = a.image_counts.double()/len(a)
    assert r.max() == (.001/f.min()).sqrt() and r.min() == 1
    want = torch.ones(len(a), dtype=torch.float64)
    for i, j in a.pairs.tolist(): want[i] = max(want[i], (.001/f[j - 1])**.5)
    assert torch.allclose(r, want, rtol=1e-12)


@published
def test_sample_of_lvis():
    "LVIS's own 100 images: all polygons make masks whose area and box are those of the annotations; ground truth has AP 1"
    path = DATA/'lvis_val_100.json'
    a = read_annotations(path)
    assert len(a) == 100 and a.c == 1230 and len(a.labels) == int(a.instance_counts.sum()) == 977 and a.federated and not any(a.dropped.values())
    assert a.neg(0) == json.loads(path.read_text())['images'][0]['neg_category_ids']                   # ids 1..1230 are their own labels
    ap, shift = InstanceAP(a), []
    for i in range(len(a)):
        (h, w), r = a.sizes[i].tolist(), a.rows(i)
        if not len(r): continue                                                                      # some have none
        masks = np.stack([outline_mask(a.outlines[j], h, w) for j in r.tolist()])
        shift += (torch.tensor(masks.sum((1, 2))) - a.areas[r]).abs().div(a.areas[r].sqrt()).tolist()
        boxes = torch.cat([a.boxes[r, :2], a.boxes[r, :2] + a.boxes[r, 2:]], 1)
        ap.add([dict(boxes=boxes, labels=a.labels[r], scores=torch.ones(len(r)), masks=torch.from_numpy(masks)[:, None].float())], [int(a.image_ids[i])])
    assert max(shift) < 3 and np.median(shift) < .3                                                   # in square roots of the area: edges are drawn on whole pixels
    r = ap.compute()
    assert all(abs(r[k] - 1) < 1e-9 for k in ('AP', 'AP50', 'AP75', 'APr', 'APc', 'APf', 'APb', 'APbr')), r
    ap.reset()
    assert ap.compute()['AP'] == 0 == ap.compute()['APbf']


@published
def test_photos_of_the_sample():
    "Version 0.5 names photos of 2014, the folder has those of 2017: found by number; the missing ones are named, or left out"
    path, photos = DATA/'lvis_val_100.json', DATA/'val2017'
    with pytest.raises(FileNotFoundError, match='91 of 100 photos .* are not there'): read_annotations(path, photos)
    with pytest.warns(UserWarning, match='91 of 100'): a = read_annotations(path, photos, skip_missing=True)
    assert len(a) == 9 and len(a.skipped) == 91 and int(a.instance_counts.sum()) == 55
    ds = InstanceDataset(a)
    for i in range(len(ds)):
        x, t = ds[i]
        assert x.shape[1:] == t['masks'].shape[1:] and (t['masks'].flatten(1).sum(1) > 0).all() and len(t['labels']) == len(t['boxes'])


@with_coco
def test_coco(tmp_path):
    "COCO with crowds and run lengths, as it is and in LVIS's form; batches of photos of unequal sizes"
    files = [COCO/'annotations'/f'instances_{s}2017.json' for s in ('train', 'val')]
    a = read_annotations(files[0], COCO/'train2017')
    d = json.loads(files[0].read_text())
    crowds = sum(o['iscrowd'] for o in d['annotations'])
    assert len(a.labels) == 470 and a.dropped['crowd'] == crowds and int(a.instance_counts.sum()) == 470 - crowds and a.cat_ids[-1] == 90 and a.c == 80
    b = read_annotations(coco_to_lvis(files[1], tmp_path/'val.json', train=files[0]), COCO/'val2017')
    assert b.groups == a.groups and not a.federated and b.federated
    ap, vs = InstanceAP(b), InstanceDataset(b, train=False)
    for i in range(len(vs)): ap.add([as_output(vs[i][1])], [vs[i][1]['image_id']])
    r = ap.compute()
    assert r['AP'] > .999 and r['APb'] > .999, r
    batches = [list(instance_dls(a, b, bs=4, num_workers=n, device='cpu').train) for n in (0, 2)]
    assert all(torch.equal(x, y) for p, q in zip(*batches) for x, y in zip((*p[0], *(t['masks'] for t in p[1])), (*q[0], *(t['masks'] for t in q[1]))))


def test_another_evaluator(root, monkeypatch):
    "The same AP as LVIS's own package, for detections that are right, moved, of the wrong class, unknown and too many"
    monkeypatch.setattr(np, 'float', float, raising=False)                                           # it is of 2020, and knows no later numpy
    if not importlib.util.find_spec('cv2'): monkeypatch.setitem(sys.modules, 'cv2', types.ModuleType('cv2'))   # it draws with that
    pytest.importorskip('lvis', reason="LVIS's own evaluator is not installed: pip install --no-deps lvis pycocotools")
    from lvis import LVIS, LVISEval, LVISResults
    a, rng = read_annotations(root/'digits_val.json', root), np.random.default_rng(0)
    ap, vs, outputs = InstanceAP(a, max_dets=12), InstanceDataset(a, train=False), []
    for i in range(len(vs)):
        t = vs[i][1]
        o = [as_output(t)]*4
        o = {k: torch.cat([x[k] for x in o]) for k in o[0]}
        n = len(o['labels'])
        o['scores'] = torch.rand(n, generator=torch.Generator().manual_seed(i))
        o['labels'] = torch.where(torch.tensor(rng.random(n) < .3), torch.tensor(rng.integers(1, 11, n)), o['labels'])
        for j in range(n):
            dx = int(rng.integers(0, 8)); o['masks'][j] = o['masks'][j].roll(dx, -1); o['boxes'][j] += torch.tensor([dx, 0, dx, 0])
        outputs.append(o); ap.add([o], [t])
    mine = ap.compute(chunk=4)
    for kind, b in (('segm', ''), ('bbox', 'b')):
        res = [{k: v for k, v in r.items() if k != ('bbox' if kind == 'segm' else 'segmentation')} for r in detections(outputs, a.image_ids, a)]
        gt = LVIS(str(root/'digits_val.json'))
        ev = LVISEval(gt, LVISResults(gt, res, max_dets=12), kind); ev.params.max_dets = 12
        ev.run()
        for k in ('AP', 'AP50', 'AP75', 'APs', 'APm', 'APr', 'APc', 'APf'):
            want = ev.results[k]
            assert (np.isnan(mine[f'AP{b}{k[2:]}']) and want == -1) or abs(mine[f'AP{b}{k[2:]}'] - want) < 1e-9, (kind, k, mine, dict(ev.results))
    assert .05 < mine['AP'] < .95


@pytest.mark.parametrize('change,what', [
    (lambda d: d['images'].append(d['images'][0]), 'image 1: the id is given twice'),
    (lambda d: d['categories'].append(dict(id=3, name='x')), 'category 3: the id is given twice'),
    (lambda d: d['annotations'][4].update(id=1), 'annotation 1: the id is given twice'),
    (lambda d: d['annotations'][4].update(category_id=99), 'annotation 5: its category 99 is not in the file'),
    (lambda d: d['annotations'][4].update(image_id=999), 'annotation 5: its image 999 is not in the file'),
    (lambda d: d['annotations'][4].update(bbox=[1, 2, 3]), 'annotation 5: box'),
    (lambda d: d['annotations'][4].update(bbox=[1, 2, 3, float('inf')]), 'annotation 5: box'),
    (lambda d: d['annotations'][4].update(segmentation='xyz'), 'annotation 5: its segmentation is neither'),
    (lambda d: d['annotations'][4]['segmentation'].update(size=[5, 5]), 'annotation 5: run lengths for an image of'),
    (lambda d: d['annotations'][4].pop('area'), 'annotation 5: no area'),
    (lambda d: d['images'][2].pop('width'), 'image 3: no width'),
    (lambda d: d['images'][2].update(width=0), 'image 3: its size is'),
    (lambda d: d['images'][2].pop('not_exhaustive_category_ids'), 'image 3: no not_exhaustive_category_ids'),
    (lambda d: d['images'][2].update(neg_category_ids=[77]), r'image 3: neg_category_ids names the categories \[77\]'),
    (lambda d: d.update(categories=[]), 'its category .* is not in the file|there are no categories'),
    (lambda d: d.pop('images'), 'it needs the lists')])
def test_bad_files_are_refused_by_name(root, tmp_path, change, what):
    with pytest.raises(ValueError, match=what): read_annotations(changed(root, tmp_path, change))


def small(path, seg=((1, 1, 6, 1, 6, 6, 1, 6),), image={}, category={}, **annotation):
    "A file of one image of 10 by 20 with one instance, and its photo beside it"
    from PIL import Image
    Image.new('RGB', (20, 10)).save(path/'1.png')
    (path/'s.json').write_text(json.dumps(dict(images=[dict(id=1, height=10, width=20, file_name='1.png') | image], categories=[dict(id=j, name='ab'[j - 1]) | category for j in (1, 2)],
                                               annotations=[dict(id=7, image_id=1, category_id=1, bbox=[1, 1, 5, 5], area=25., segmentation=seg) | annotation])))
    return path/'s.json'


FAR = [[[0, 0, v, 0, v, v, 0, v]] for v in (1e5, 1e7, 1e9, 1e18, 1e308, 10**400, float('inf'), float('nan'), -1e9)] + [[[0, 0, 2**70, 0, 5, 5]], [[0, 0, 61, 0, 5, 5]], [[0, 0, 5, -11, 5, 5]], [[-19, -9, 39, 19]*10**5]]
ODD = [['a']], [['a']*6], ['abcdef'], [{'a': 1}], [5], [None], [[[0, 0], [5, 0], [5, 5]]], [[0, 0, 5, 0, 5, 5, 1]]
LENGTHS = 'zzzz', 'PPPP'*5, '\x7f'*50, 'o'*1000, 'é', '\ud800', '0', '1'*100000, 'nnnnnnnnnnnnnn0', 'PPPPPP8'*65536, 5, True, {'a': 1}, [300], [2**32 + 200], [200, 2**31], [-5, 205], [100]*100, [1.5, 198.5], ['a'], [None], [True]*200, [[100, 100]], [0], [10**30]


def test_outlines_are_checked_when_they_are_read(tmp_path):
    "Polygons far away, and what is no polygon; run lengths that are not those of the image: by name, with and without photos, and in the check"
    for what, segs in (('its polygons (reach|are)|a polygon is not', FAR), ('a polygon is not a list of numbers', ODD), ('(its|compressed) counts are', [dict(size=[10, 20], counts=c) for c in LENGTHS]),
                       ('run lengths for an image of', [dict(size=s, counts=[200]) for s in ([20, 10], [10., 20.], '10', 5, None, [[10], [20]])]), ('neither polygons', [None, 5, 'abc'])):
        for seg in segs:
            path = small(tmp_path, seg)
            for images in (None, tmp_path):
                with pytest.raises(ValueError, match=rf's\.json\nannotation 7: .*({what})'): read_annotations(path, images)
            assert len((r := check_annotations(path)).problems) == 1 and r.problems[0].startswith('annotation 7: ') and len(str(r)) < 1000
    for seg, area in (([[-3, -2, 22, -2, 22, 12, -3, 12]], 200), ([[0, 0], [1, 1, 6, 1, 6, 6, 1, 6]], 25), (dict(size=[10, 20], counts=[0, 200]), 200), (dict(size=[10, 20], counts=[50, 30, 120, 0]), 30)):
        assert InstanceDataset(read_annotations(small(tmp_path, seg), tmp_path))[0][1]['masks'].sum() == area
    assert InstanceDataset(read_annotations(small(tmp_path, [[1, 1]]), tmp_path), train=False).dropped['outline'] == 1


@pytest.mark.parametrize('what', ['lengths', 'far', 'long'])
def test_outlines_cost_little(tmp_path, what):
    "In a process of its own, with AP after reading: less than 300 MiB and 20 seconds, where it was gigabytes or did not end"
    seg = dict(lengths=dict(size=[10, 20], counts='zzzz'), far=[[0, 0, 1e7, 0, 1e7, 1e7, 0, 1e7]], long=[[-19, -9, 39, 19]*10**5])[what]
    code = f'''
import resource, sys, time, torch
from balms.lvis import *
unit = 2**10 if sys.platform == 'linux' else 2**20
begin, before = time.time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    a = read_annotations({str(small(tmp_path, seg))!r}, {str(tmp_path)!r}); InstanceDataset(a)[0]; ap = InstanceAP(a)
    ap.add([dict(boxes=torch.tensor([[1., 1, 6, 6]]), labels=torch.tensor([1]), scores=torch.tensor([.9]), masks=torch.ones(1, 1, 10, 20))], [1]); print(ap.compute())
except ValueError as e: print(e)
print('cost', (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)//unit, time.time() - begin)'''
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120)
    mib, seconds = map(float, r.stdout.rsplit('cost ', 1)[1].split())
    assert 's.json\nannotation 7: ' in r.stdout and mib < 300 and seconds < 20, r


def test_compressed_lengths():
    "As faster-coco-eval reads them, whatever the mask; what is cut off or has other characters is refused, or is another mask"
    from balms.lvis import _coco, _lengths
    mask, rng = _coco()[2], np.random.default_rng(0)
    for i in range(300):
        h, w = rng.integers(1, 400, 2)
        m = np.asfortranarray(np.kron(rng.random((h//9 + 1, w//9 + 1)) < rng.random(), np.ones((9, 9)))[:h, :w], dtype=np.uint8)
        s = mask.encode(m)['counts'].decode(); n = _lengths(s)
        assert (n >= 0).all() and n.sum() == h*w and np.array_equal(np.repeat(np.arange(len(n)) % 2, n), m.T.ravel())
        assert mask.frPyObjects(dict(size=[int(h), int(w)], counts=n.tolist()), int(h), int(w))['counts'] in (s, s.encode())


@pytest.mark.parametrize('change,what', [
    (lambda d: d['images'].append([]), 'image at place 120: it is \\[\\], not an object'),
    (lambda d: d['annotations'].insert(0, None), 'annotation at place 0: it is None, not an object'),
    (lambda d: d['categories'].append(5), 'category at place 10: it is 5, not an object'),
    (lambda d: d['annotations'][4].update(image_id=[]), 'annotation 5: its image \\[\\] is not in the file'),
    (lambda d: d['annotations'][4].update(image_id=True), 'annotation 5: its image True'),
    (lambda d: d['annotations'][4].update(category_id=[1]), 'annotation 5: its category \\[1\\] is not'),
    (lambda d: d['annotations'][4].update(bbox=[10**400, 1, 1, 1]), 'annotation 5: box .* is not made of numbers'),
    (lambda d: d['annotations'][4].update(bbox=[5, 5, -3, 3]), 'annotation 5: box .* is negative'),
    (lambda d: d['annotations'][4].update(area=-5), 'annotation 5: box .* area -5 is negative'),
    (lambda d: d['annotations'][4].update(iscrowd='0'), "annotation 5: its iscrowd is '0', not 0 or 1"),
    (lambda d: d['annotations'][4].update(iscrowd='false'), "annotation 5: its iscrowd is 'false'"),
    (lambda d: d['annotations'][4].update(iscrowd=[]), 'annotation 5: its iscrowd is'),
    (lambda d: d['images'][2].update(height=True), 'image 3: its size is \\[True, 96\\]'),
    (lambda d: d['images'][2].update(height=2**70), 'image 3: its size is'),
    (lambda d: d['images'][2].update(height='96'), 'image 3: its size is'),
    (lambda d: d['images'][2].update(id=10**30), 'image 1000000000000000000000000000000: its id has more than 64 bits'),
    (lambda d: d['images'][2].update(id='x'*10**6), "image 'xxx.*: its id is not a whole number"),
    (lambda d: d['images'][2].update(neg_category_ids=None), 'image 3: neg_category_ids is None, not a list'),
    (lambda d: d['images'][2].update(neg_category_ids=[77, 'x']), 'image 3: neg_category_ids is .*, not a list of ids'),
    (lambda d: d['images'][2].update(neg_category_ids=[a['category_id'] for a in d['annotations'] if a['image_id'] == 3]), 'image 3: neg_category_ids names .* which are annotated there'),
    (lambda d: [im.pop('neg_category_ids') for im in d['images']] and d['images'][2].update(not_exhaustive_category_ids=[77]), r'image 3: not_exhaustive_category_ids names the categories \[77\]'),
    (lambda d: d['images'][2].update(file_name=5), 'image 3: its file_name is 5, not a text'),
    (lambda d: d['images'][2].update(coco_url=[]), 'image 3: its coco_url is'),
    (lambda d: d['categories'][2].update(frequency='x'), "category 3: its frequency is 'x', not r, c or f"),
    (lambda d: d['categories'][2].update(frequency=[]), 'category 3: its frequency is'),
    (lambda d: d['categories'][2].update(frequency=None), 'category 3: its frequency is None')])
def test_odd_values_are_problems_of_the_report(root, tmp_path, capsys, change, what):
    "Refused by the name of file and object; the check says so, and its command ends with 1"
    path = changed(root, tmp_path, change)
    with pytest.raises(ValueError, match=rf'(?s)c\.json\n.*{what}') as e: read_annotations(path)
    assert len(str(e.value)) < 5000 and 'not as LVIS or COCO write it' not in str(e.value)
    assert what.startswith(('image', 'annotation', 'category')) and any(re.match(what, p) for p in check_annotations(path).problems)
    with pytest.raises(SystemExit) as e: balms_check_lvis([str(path)])
    assert e.value.code == 1 and what.split(':')[0][:9] in capsys.readouterr().out


def test_names_of_photos_that_are_none(root, tmp_path):
    "null is no name, and half a character can be printed"
    path = changed(root, tmp_path, lambda d: (d['images'][0].update(file_name=None, coco_url=None), d['images'][1].update(file_name='\ud800.png')))
    r = check_annotations(path, root)
    assert r.problems == ['image 1: no photo 000000000001.jpg', r'image 2: no photo \ud800.png'] and str(r).encode()
    assert len(read_annotations(path)) == 120


def test_what_was_not_foreseen_names_the_file(root, monkeypatch):
    "Of whatever kind it is, in reading and in the check"
    for e in (TypeError('odd'), ValueError('Overflow'), KeyError('x'), ZeroDivisionError('z'), AssertionError()):
        def take(self, anns): raise e
        monkeypatch.setattr(Annotations, '_take', take)
        with pytest.raises(ValueError, match=f'digits_train.json is not as LVIS or COCO write it .{type(e).__name__}'): read_annotations(root/'digits_train.json')
        assert [type(e).__name__ in p for p in check_annotations(root/'digits_train.json').problems] == [True]
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match='No folder'): check_annotations(root/'digits_train.json', root/'none')


def test_crowds_as_json_says_them(tmp_path):
    for v, n in ((0, 0), (False, 0), (1, 1), (True, 1)): assert read_annotations(small(tmp_path, iscrowd=v)).dropped['crowd'] == n


def test_a_bad_photo_stops_training_by_name(root, tmp_path):
    "Cut off, or of another size: file and image are named, from a worker too"
    for i, data in ((1, (root/'train/0000.png').read_bytes()[:-99]), (2, None)):
        path = changed(root, tmp_path, lambda d: d.update(images=d['images'][i - 1:i], annotations=[a for a in d['annotations'] if a['image_id'] == i]))
        (tmp_path/'train').mkdir(exist_ok=True)
        from PIL import Image
        if data: (tmp_path/'train/0000.png').write_bytes(data)
        else: Image.new('RGB', (50, 40)).save(tmp_path/'train/0001.png')
        for n in (0, 1):
            with pytest.raises(ValueError, match=f'image {i}: .*000{i - 1}.png: ') as e: list(instance_dls(read_annotations(path, tmp_path), bs=1, num_workers=n, device='cpu').train)
            assert data or 'it is [40, 50], but [96, 96]' in str(e.value)


def test_grey_photos_and_orientation(root, tmp_path):
    "Grey becomes RGB; the orientation tag is not looked at"
    from PIL import Image
    (tmp_path/'train').mkdir()
    im = Image.open(root/'train/0000.png').convert('L').crop((0, 0, 96, 48))
    exif = Image.Exif(); exif[0x0112] = 6
    im.save(tmp_path/'train/0000.jpg', exif=exif)
    path = changed(root, tmp_path, lambda d: d.update(images=[{**d['images'][0], 'file_name': 'train/0000.jpg', 'height': 48}], annotations=[dict(id=1, image_id=1, category_id=1, bbox=[-5, 1, 20, 20], area=9, segmentation=[[0, 1, 15, 1, 15, 21]])]))
    x, t = InstanceDataset(read_annotations(path, tmp_path))[0]
    assert x.shape == (3, 48, 96) and torch.equal(x[0], x[2]) and t['boxes'].tolist() == [[0, 1, 15, 21]]


def test_photos_by_url(root, tmp_path):
    "Version 1 has no file names; photos of both COCO folders are found"
    def url(d):
        for i, im in enumerate(d['images']): del im['file_name']; im['coco_url'] = f'http://images.cocodataset.org/{"train" if i % 2 else "val"}2017/{i:012}.png'
    path = changed(root, tmp_path, url)
    for i in range(120):
        f = tmp_path/('train' if i % 2 else 'val')/f'{"train" if i % 2 else "val"}2017'/f'{i:012}.png'
        f.parent.mkdir(parents=True, exist_ok=True); f.write_bytes((root/f'train/{i:04}.png').read_bytes())
    for images in (tmp_path, [tmp_path/'train', tmp_path/'val']):
        a = read_annotations(path, images)
        assert torch.equal(InstanceDataset(a)[7][0], InstanceDataset(read_annotations(root/'digits_train.json', root))[7][0])
    (tmp_path/'train/train2017/000000000007.png').unlink()
    with pytest.raises(FileNotFoundError, match='1 of 120 photos .*\n.*image 8: no photo train2017/000000000007.png'): read_annotations(path, tmp_path)


def test_without_the_extra(root):
    "Reading needs no faster-coco-eval; masks say what to install"
    code = f'''
import sys; sys.modules['faster_coco_eval'] = None
from balms.lvis import *
a = read_annotations({str(root/"digits_train.json")!r}, {str(root)!r}); print(repeat_factors(a).shape)
try: InstanceDataset(a)[0]
except ImportError as e: print(e)'''
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert "pip install 'balms[lvis]'" in r.stdout, r.stderr


def test_command(root, tmp_path, capsys):
    "Exit status and report, once in a process of its own"
    code = 'from balms.lvis import balms_check_lvis; balms_check_lvis()'
    r = subprocess.run([sys.executable, '-c', code, str(root/'digits_train.json'), '--images', str(root), '--decode', '--workers', '1'], capture_output=True, text=True)
    assert r.returncode == 0 and '120 of 120 found, all of them decoded' in r.stdout, r.stderr
    def run(*args):
        with pytest.raises(SystemExit) as e: balms_check_lvis([str(a) for a in args])
        return e.value.code, capsys.readouterr()
    status, said = run(root/'digits_train.json', '--version', 'v1')
    assert status == 1 and 'classes: 10, but 1203 in LVIS v1' in said.out
    status, said = run(tmp_path/'none.json')
    assert status == 2 and 'No annotation file' in said.err
    assert run(root/'digits_train.json', '--images', tmp_path/'none')[0] == 2


def test_sampler_with_plain_torch(root):
    "As the sampler of PyTorch's loader: epochs differ, and one that was broken off goes on"
    from torch.utils.data import DataLoader
    ds = InstanceDataset(read_annotations(root/'digits_train.json', root))
    s = RepeatFactorSampler(repeat_factors(ds, .2), seed=5)
    epoch = lambda n: [t['image_id'] for b in DataLoader(ds, 4, sampler=s, collate_fn=list, num_workers=n) for _, t in b]
    first, second = epoch(0), epoch(0)
    assert first != second and len(first) == len(s.epoch_order(0)) > len(ds)
    s.set_epoch(0); assert epoch(1) == first
    s.set_epoch(0, used=40); assert epoch(0) == first[40:]


def test_batches_survive_a_restart(root):
    "A loader with workers, saved in the middle of an epoch in one process and gone on in a new one"
    a = read_annotations(root/'digits_train.json', root)
    flat = lambda b: (b[2].tolist(), [float(x.sum()) for x in b[0]], [t['boxes'].tolist() for t in b[1]])
    make = lambda: instance_dls(a, bs=4, seed=2, t=.2, num_workers=1, device='cpu').train
    one = make(); want = [flat(b) for _ in range(2) for b in one]
    two = make(); it = iter(two); got = [flat(next(it)) for _ in range(11)]; state = pickle.dumps(two.state_dict()); it.close()
    three = make(); three.load_state_dict(pickle.loads(state))
    assert got + [flat(b) for b in three] == want[:11 + len(three)]
