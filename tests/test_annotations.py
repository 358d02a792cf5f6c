"Annotation files of LVIS and COCO: the published counts and samples where they are at hand, faults of files, photos."
import json, os, re, subprocess, sys
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
pytest.importorskip('faster_coco_eval')
from balms.annotation_rules import outline_mask
from balms.annotations import (LVIS_FACTS, balms_check_lvis, check_annotations, coco_to_lvis, frequency_groups,
                               read_annotations)
from balms.instance_data import InstanceDataset, digit_scenes, instance_dls, repeat_factors

LVIS = Path(os.environ.get('BALMS_LVIS', ''))
published = pytest.mark.skipif(not os.environ.get('BALMS_LVIS'),
                               reason="LVIS's sample and counts are not at hand: BALMS_LVIS names no folder")
COCO = Path(os.environ.get('BALMS_COCO', ''))
with_coco = pytest.mark.skipif(not os.environ.get('BALMS_COCO'),
                               reason='BALMS_COCO names no folder with train2017, val2017 and annotations')


@pytest.fixture(scope='module')
def root(tmp_path_factory): return digit_scenes(tmp_path_factory.mktemp('lvis')/'digits')


def changed(root, tmp_path, change):
    content = json.loads((root/'digits_train.json').read_text())
    change(content)
    (tmp_path/'c.json').write_text(json.dumps(content))
    return tmp_path/'c.json'


def test_groups_of_classes_at_their_limits():
    assert frequency_groups([0, 1, 10, 11, 100, 101]) == list('rrrccf')
    assert frequency_groups(torch.tensor([101, 1])) == ['f', 'r']


@published
def test_counts_of_lvis_v05(tmp_path):
    "A file with the published counts of every category: classes, instances, imbalance and groups as in the facts"
    known = json.loads((LVIS/'lvis_v0.5_train_category_counts.json').read_text())
    n, annotations, first = known['annotated_images'], [], 0
    square = dict(bbox=[0, 0, 9, 9], area=81, segmentation=[[0, 0, 9, 0, 9, 9]])
    for c in known['categories']:
        for j in range(c['instance_count']):
            image_id = (first + j % c['image_count']) % n
            annotations.append(dict(id=len(annotations), image_id=image_id, category_id=c['id'], **square))
        first += c['image_count']
    both = dict(neg_category_ids=[], not_exhaustive_category_ids=[])
    images = [dict(id=i, height=10, width=10, **both) for i in range(n)]
    categories = [dict(id=c['id'], name=c['name']) for c in known['categories']]
    path = tmp_path/'lvis_v0.5_train.json'
    path.write_text(json.dumps(dict(images=images, annotations=annotations, categories=categories)))
    del annotations, images
    report = check_annotations(path, version='v0.5')
    assert report.ok and '693,958 instances' in str(report), str(report)
    a = read_annotations(path)
    assert a.image_counts.tolist() == [c['image_count'] for c in known['categories']]
    assert a.groups == [c['frequency'] for c in known['categories']]
    share, want = a.image_counts.double()/len(a), torch.ones(len(a), dtype=torch.float64)
    for i, label in a.pairs.tolist(): want[i] = max(want[i], (.001/share[label - 1])**.5)
    assert torch.allclose(repeat_factors(a), want, rtol=1e-12)


@published
def test_sample_of_lvis():
    "LVIS's own 100 images: all polygons make masks whose area is that of the annotations"
    path = LVIS/'lvis_val_100.json'
    a = read_annotations(path)
    assert len(a) == 100 and a.c == 1230 and len(a.labels) == int(a.instance_counts.sum()) == 977
    assert a.federated and not any(a.dropped.values())
    first = json.loads(path.read_text())['images'][0]
    assert a.neg(0) == first['neg_category_ids']                                    # ids 1..1230 are their own labels
    drawn = torch.tensor([a.mask(row).sum().item() for row in range(977)])
    shift = (drawn - a.areas).abs()/a.areas.sqrt()                                   # edges are drawn on whole pixels
    assert shift.max() < 3 and shift.median() < .3


@published
def test_photos_of_the_sample():
    "Version 0.5 names photos of 2014, the folder has those of 2017: found by number; missing ones named, or left out"
    path, photos = LVIS/'lvis_val_100.json', LVIS/'val2017'
    with pytest.raises(FileNotFoundError, match='91 of 100'): read_annotations(path, photos)
    with pytest.warns(UserWarning, match='91 of 100'): a = read_annotations(path, photos, skip_missing=True)
    assert len(a) == 9 and len(a.skipped) == 91 and int(a.instance_counts.sum()) == 55
    for x, t in InstanceDataset(a):
        assert x.shape[1:] == t['masks'].shape[1:] and (t['masks'].flatten(1).sum(1) > 0).all()


@with_coco
def test_coco(tmp_path):
    "COCO with crowds and run lengths, as it is and in LVIS's form; batches of photos of unequal sizes"
    files = [COCO/'annotations'/f'instances_{split}2017.json' for split in ('train', 'val')]
    a = read_annotations(files[0], COCO/'train2017')
    crowds = sum(o['iscrowd'] for o in json.loads(files[0].read_text())['annotations'])
    assert len(a.labels) == 470 and a.dropped['crowd'] == crowds and int(a.instance_counts.sum()) == 470 - crowds
    assert a.cat_ids[-1] == 90 and a.c == 80
    b = read_annotations(coco_to_lvis(files[1], tmp_path/'val.json', train=files[0]), COCO/'val2017')
    assert b.groups == a.groups and not a.federated and b.federated
    plain, workers = (list(instance_dls(a, b, bs=4, num_workers=n, device='cpu').train) for n in (0, 2))
    for (images, targets, ids), (images2, targets2, ids2) in zip(plain, workers):
        assert ids.equal(ids2) and all(map(torch.equal, images, images2))
        assert all(torch.equal(t['masks'], t2['masks']) for t, t2 in zip(targets, targets2))


def annotation(**values): return lambda d: d['annotations'][4].update(values)
def image(**values): return lambda d: d['images'][2].update(values)
def category(**values): return lambda d: d['categories'][2].update(values)


FAULTS = [
    (lambda d: d['images'].append(d['images'][0]), 'images, id is given twice: 1, 1'),
    (lambda d: d['categories'].append(dict(id=3, name='x')), 'categories, id is given twice: 3, 3'),
    (annotation(id=1), 'annotations, id is given twice: 1, 1'),
    (image(id='x'), 'images, id is not a whole number: x'),
    (annotation(category_id=99), r'annotations, category_id is of no category: 5 \(99\)'),
    (annotation(image_id=999), r'annotations, image_id is of no image: 5 \(999\)'),
    (lambda d: d['annotations'][4].pop('area'), 'annotations, area is missing: 5'),
    (annotation(bbox=None), r'annotations, bbox is missing: 5 \(None\)'),
    (annotation(bbox=[1, 2, 3]), 'annotations, bbox is not four finite numbers: 5'),
    (annotation(bbox=[1, 2, 3, float('inf')]), 'annotations, bbox is not four'),
    (annotation(bbox=['1', '2', '3', '4']), 'annotations, bbox is not four'),
    (annotation(bbox=[5, 5, -3, 3]), 'annotations, bbox has a negative'),
    (annotation(area=-5), 'annotations, area is not'),
    (annotation(area=float('nan')), 'annotations, area is not'),
    (annotation(iscrowd='0'), r"annotations, iscrowd is not 0 or 1: 5 \('0'\)"),
    (annotation(segmentation='xyz'), 'annotations, segmentation is neither'),
    (annotation(segmentation=[1, 1, 5, 1, 5, 5]), 'annotations, segmentation is one flat list'),
    (annotation(segmentation=[[[1, 1], [5, 1], [5, 5]]]), 'annotations, segmentation has points'),
    (annotation(segmentation=[[1, 1, 5, 1, 5]]), 'annotations, segmentation has a polygon with'),
    (annotation(segmentation=[[0, 0, float('nan'), 0, 5, 5]]), 'annotations, segmentation has a polygon with'),
    (annotation(segmentation=[['a']*6]), 'annotations, segmentation has a polygon with'),
    (annotation(segmentation=[[0, 0, 500, 0, 500, 500]]), 'annotations, segmentation reaches out'),
    (annotation(segmentation=[[0, 0, 5, -97, 5, 5]]), 'annotations, segmentation reaches out'),
    (annotation(segmentation=dict(size=[5, 5], counts=[25])), 'annotations, segmentation has run lengths'),
    (annotation(segmentation=dict(size=[96, 96], counts=[300])), 'annotations, segmentation has run lengths'),
    (lambda d: d['images'][2].pop('width'), 'images, width is missing: 3'),
    (image(width=0), r'images, width is not a whole number above 0: 3 \(0\)'),
    (image(height='96'), 'images, height is not'),
    (lambda d: d['images'][2].pop('not_exhaustive_category_ids'), 'images, not_exhaustive_category_ids is missing'),
    (image(neg_category_ids=[77]), r'images, neg_category_ids has ids of no category: 3 \(\[77\]\)'),
    (image(not_exhaustive_category_ids=[77]), 'images, not_exhaustive_category_ids has ids'),
    (lambda d: image(neg_category_ids=[a['category_id'] for a in d['annotations'] if a['image_id'] == 3])(d),
     'images, neg_category_ids has categories that are annotated'),
    (category(frequency='x'), r"categories, frequency is not .*: 3 \('x'\)"),
    (lambda d: d['categories'][2].pop('name'), 'categories, name is missing: 3')]


@pytest.mark.parametrize('change,what', FAULTS)
def test_faulty_files_are_refused_and_reported(root, tmp_path, change, what):
    "By rule, with the ids; the report says the same"
    path, what = changed(root, tmp_path, change), what.replace(': ', r' \(\d+\): ')
    with pytest.raises(ValueError, match=rf'(?s)c\.json.*\n{what}'): read_annotations(path)
    report = check_annotations(path)
    assert not report.ok and re.match(what, report.problems[0])


@pytest.mark.parametrize('change,what', [
    (lambda d: d.pop('images'), 'lists'), (lambda d: d.update(images={}), 'lists'),
    (lambda d: d['images'].append(5), 'lists'), (lambda d: d.update(categories=[]), 'categories')])
def test_what_is_no_annotation_file(root, tmp_path, change, what):
    with pytest.raises(ValueError, match=rf'c\.json .*{what}'): read_annotations(changed(root, tmp_path, change))


def test_all_that_is_wrong_is_told_at_once(root, tmp_path):
    "A line a kind, with the number of objects and the first five"
    def change(d):
        for a in d['annotations'][:40]: a['category_id'] = 99
        d['images'][5]['height'] = -1
    report = check_annotations(changed(root, tmp_path, change))
    assert len(report.problems) == 2 and report.problems[0].startswith('images, height')
    assert '(40): ' in report.problems[1] and report.problems[1].endswith('5 (99), ...')


def small(path, segmentation=((1, 1, 6, 1, 6, 6, 1, 6),), **annotation):
    "A file of one image of 10 by 20 with one instance, and its photo beside it"
    Image.new('RGB', (20, 10)).save(path/'1.png')
    own = dict(id=7, image_id=1, category_id=1, bbox=[1, 1, 5, 5], area=25., segmentation=segmentation) | annotation
    content = dict(images=[dict(id=1, height=10, width=20, file_name='1.png')], annotations=[own],
                   categories=[dict(id=1, name='a'), dict(id=2, name='b')])
    (path/'s.json').write_text(json.dumps(content))
    return path/'s.json'


@pytest.mark.parametrize('segmentation,area', [([[-3, -2, 22, -2, 22, 12, -3, 12]], 200),
                                               ([[0, 0], [1, 1, 6, 1, 6, 6, 1, 6]], 25),
                                               (dict(size=[10, 20], counts=[0, 200]), 200),
                                               (dict(size=[10, 20], counts=[50, 30, 120, 0]), 30)])
def test_outlines_that_are_right(tmp_path, segmentation, area):
    path = small(tmp_path, segmentation)
    assert InstanceDataset(read_annotations(path, tmp_path))[0][1]['masks'].sum() == area


def test_without_an_outline(tmp_path):
    for segmentation in ([[1, 1]], [], dict(size=[10, 20], counts='')):
        path = small(tmp_path, segmentation)
        with pytest.warns(UserWarning, match='no outline'): a = read_annotations(path, tmp_path)
        assert a.left_out['outline'] == [7] and len(InstanceDataset(a, train=False)[0][1]['labels']) == 0
        with pytest.raises(ValueError, match='no image that can be trained on'): InstanceDataset(a)


def test_compressed_run_lengths_of_another_image(tmp_path):
    "They are decoded when a mask is made: an error that names the annotation, not a mask of something else"
    other = outline_mask([[1, 1, 6, 1, 6, 6, 1, 6]], 12, 20)
    from faster_coco_eval.core import mask
    counts = mask.encode(np.asfortranarray(other))['counts'].decode()
    a = read_annotations(small(tmp_path, dict(size=[10, 20], counts=counts)), tmp_path)
    with pytest.raises(ValueError, match=r'Annotation 7 of .*s\.json'): InstanceDataset(a)[0]
    assert any('Annotation 7' in p for p in check_annotations(a.path, tmp_path, decode=True).problems)


@pytest.mark.parametrize('value,n', [(0, 0), (False, 0), (1, 1), (True, 1)])
def test_crowds_as_json_says_them(tmp_path, value, n):
    assert read_annotations(small(tmp_path, iscrowd=value)).dropped['crowd'] == n


def test_categories_in_any_order_and_with_gaps(root, tmp_path):
    "Labels follow the ids"
    def change(d):
        d['categories'] = [{**c, 'id': 10*c['id']} for c in d['categories'][::-1]]
        for a in d['annotations']: a['category_id'] *= 10
        for im in d['images']:
            for key in ('neg_category_ids', 'not_exhaustive_category_ids'): im[key] = [10*c for c in im[key]]
    a, b = read_annotations(root/'digits_train.json'), read_annotations(changed(root, tmp_path, change))
    assert b.names == a.names and b.cat_ids == [10*c for c in a.cat_ids] and b.labels.equal(a.labels)
    assert all(a.neg(i) == b.neg(i) and a.not_exhaustive(i) == b.not_exhaustive(i) for i in range(len(a)))


@pytest.mark.parametrize('workers', [0, 1])
def test_a_bad_photo_stops_training_by_name(root, tmp_path, workers):
    "Cut off, of another size, or gone: file and image are named, from a worker too"
    (tmp_path/'train').mkdir()
    cut, other, gone = (tmp_path/f'train/000{i}.png' for i in range(3))
    cut.write_bytes((root/'train/0000.png').read_bytes()[:-99])
    Image.new('RGB', (50, 40)).save(other)
    Image.new('RGB', (96, 96)).save(gone)
    for i, file in enumerate((cut, other, gone), 1):
        def change(d):
            d['images'] = [im for im in d['images'] if im['id'] == i]
            d['annotations'] = [a for a in d['annotations'] if a['image_id'] == i]
        a = read_annotations(changed(root, tmp_path, change), tmp_path)
        if file == gone: file.unlink()
        with pytest.raises(ValueError, match=f'mage {i} of .*{file.name}'):
            list(instance_dls(a, bs=1, num_workers=workers, device='cpu').train)


def test_grey_photos_and_orientation(root, tmp_path):
    "Grey becomes RGB; the orientation tag is not looked at"
    (tmp_path/'train').mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(root/'train/0000.png').convert('L').crop((0, 0, 96, 48)).save(tmp_path/'train/0000.jpg', exif=exif)
    own = dict(id=1, image_id=1, category_id=1, bbox=[-5, 1, 20, 20], area=9, segmentation=[[0, 1, 15, 1, 15, 21]])
    def change(d):
        d['images'] = [{**d['images'][0], 'file_name': 'train/0000.jpg', 'height': 48}]
        d['annotations'] = [own]
    x, t = InstanceDataset(read_annotations(changed(root, tmp_path, change), tmp_path))[0]
    assert x.shape == (3, 48, 96) and torch.equal(x[0], x[2]) and t['boxes'].tolist() == [[0, 1, 15, 21]]


def test_photos_by_url(root, tmp_path):
    "Version 1 has no file names; photos of both COCO folders are found"
    def change(d):
        for i, im in enumerate(d['images']):
            del im['file_name']
            im['coco_url'] = f'http://images.cocodataset.org/{"train" if i % 2 else "val"}2017/{i:012}.png'
    path = changed(root, tmp_path, change)
    for i in range(120):
        split = 'train' if i % 2 else 'val'
        file = tmp_path/split/f'{split}2017'/f'{i:012}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes((root/f'train/{i:04}.png').read_bytes())
    want = InstanceDataset(read_annotations(root/'digits_train.json', root))[7][0]
    for images in (tmp_path, [tmp_path/'train', tmp_path/'val']):
        assert torch.equal(InstanceDataset(read_annotations(path, images))[7][0], want)
    (tmp_path/'train/train2017/000000000007.png').unlink()
    with pytest.raises(FileNotFoundError, match=r'1 of 120 (.*\n)*.*8 \(train2017/000000000007.png\)'):
        read_annotations(path, tmp_path)


def test_without_the_extra(root):
    "Reading needs no faster-coco-eval; masks say what to install"
    code = f'''
import sys; sys.modules['faster_coco_eval'] = None
from balms.annotations import *
from balms.instance_data import *
a = read_annotations({str(root/"digits_train.json")!r}, {str(root)!r}); print(repeat_factors(a).shape)
try: InstanceDataset(a)[0]
except ImportError as e: print(e)'''
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert "pip install 'balms[lvis]'" in r.stdout, r.stderr


def test_command(root, tmp_path):
    "Exit status and report, as the installed script runs it"
    script = tmp_path/'balms_check_lvis'
    script.write_text('import sys\nfrom balms.annotations import balms_check_lvis\n'
                      "if __name__ == '__main__': sys.exit(balms_check_lvis())\n")
    def run(*args): return subprocess.run([sys.executable, script, *map(str, args)], capture_output=True, text=True)
    r = run(root/'digits_train.json', '--images', f'{root}/train,{root}/val', '--decode', '--workers', 1)
    assert r.returncode == 0 and '120 of 120 found, decoded' in r.stdout, r.stderr
    r = run(root/'digits_train.json', '--version', 'v0.5', '--valid')
    assert r.returncode == 1 and 'classes: 10, but 1230' in r.stdout and 'instances: ' not in r.stdout
    for args in ((tmp_path/'none.json',), (root/'digits_train.json', '--images', tmp_path/'none')):
        r = run(*args)
        assert r.returncode == 2 and f'No {"annotation file" if len(args) == 1 else "folder"}' in r.stderr


def test_command_as_a_function(root, capsys):
    with pytest.raises(SystemExit) as e: balms_check_lvis(str(root/'digits_train.json'))
    assert e.value.code == 0 and 'all that was checked is right' in capsys.readouterr().out
    assert LVIS_FACTS['v0.5']['classes'] == 1230
