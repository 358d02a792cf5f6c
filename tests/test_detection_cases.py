"""What people's own boxes and masks broke, from public threads.

A heading names the threads of its cases by repository and number, a docstring those of its own; it says what happened
before, and the test what is right. "Of the same kind" was in no thread."""
import json, os, shutil, subprocess, sys, unicodedata
import numpy as np, pytest, torch
from PIL import Image
pytest.importorskip('faster_coco_eval')
from balms.annotations import check_annotations, coco_to_lvis, read_annotations
from balms.detection_recipe import DetectionRecipe
from balms.detection_runs import detection_table, run_detection
from balms.detector import mask_rcnn
from balms.instance_ap import InstanceAP
from balms.instance_data import InstanceDataset, digit_scenes

FAST = dict(preset='small', iters=2, drops=(), warmup=1)


@pytest.fixture(scope='module')
def scenes(tmp_path_factory): return digit_scenes(tmp_path_factory.mktemp('scenes'), n=30, n_valid=6)


def content_of(scenes, split='train'): return json.loads((scenes/f'digits_{split}.json').read_text())


def write(folder, name, content):
    (folder/name).write_text(json.dumps(content))
    return folder/name


def changed(scenes, tmp_path, change, split='train'):
    "A copy of the annotations of a split, with `change` made to it"
    content = content_of(scenes, split)
    change(content)
    return write(tmp_path, f'{split}.json', content)


def bare_names(content):
    "As tools write them: names without the folder of the split"
    for im in content['images']: im['file_name'] = im['file_name'].split('/')[1]


def as_coco(content):
    for im in content['images']: del im['neg_category_ids'], im['not_exhaustive_category_ids']
    for c in content['categories']: del c['frequency']


def each_box(form):
    def change(content):
        for a in content['annotations']: a['bbox'] = form(*a['bbox'])
    return change


CORNERS, TURNED = (lambda x, y, w, h: [x, y, x + w, y + h]), (lambda x, y, w, h: [y, x, h, w])


# Photos: PyTorch-YOLOv3#488, maskrcnn-benchmark#73, fastai#2270, timm#334, detectron2#788 and #863,
# label-studio#7294, cvat#9300

def test_photos_of_two_splits_with_the_same_names(scenes, tmp_path):
    """PyTorch-YOLOv3#488, maskrcnn-benchmark#73. Before: `--images train val` took the validation photos from train/,
    and the check called it right. Now that is an error, and each split has its own folder."""
    train, valid = (changed(scenes, tmp_path, bare_names, split) for split in ('train', 'val'))
    both = [scenes/'train', scenes/'val']
    with pytest.raises(ValueError, match='0000.png'): read_annotations(valid, both)
    assert not check_annotations(valid, both).ok
    right = read_annotations(valid, scenes/'val')
    assert all(f'{os.sep}val{os.sep}' in file for file in right.files)
    recipe = DetectionRecipe('x', 'softmax', **FAST)
    row = run_detection(recipe, train, valid, scenes/'train', tmp_path/'runs', 'cpu', valid_images=scenes/'val')
    assert row['valid'] == 'val.json'


def test_the_address_says_which_of_two(scenes, tmp_path):
    "The same kind: COCO's `coco_url` has the folder that `file_name` lacks, and both folders have that name"
    def change(content):
        bare_names(content)
        for im in content['images']: im['coco_url'] = f'http://images.example.org/val/{im["file_name"]}'
    anns = read_annotations(changed(scenes, tmp_path, change, 'val'), scenes)
    assert all(f'{os.sep}val{os.sep}' in file for file in anns.files)


def test_a_photo_in_training_and_validation_is_said(scenes, tmp_path):
    "Before: nothing was said of photos in both sets"
    valid = write(tmp_path, 'v.json', content_of(scenes))
    with pytest.warns(UserWarning, match='both in training'):
        recipe = DetectionRecipe('x', 'softmax', **FAST)
        run_detection(recipe, scenes/'digits_train.json', valid, scenes, tmp_path, 'cpu')


@pytest.mark.parametrize('split', ['train', 'val'])
def test_sizes_are_compared_before_training(scenes, tmp_path, split, monkeypatch):
    "Before: a validation photo of another size was found when both stages were trained"
    monkeypatch.setattr('balms.detection_runs.fit_stage', lambda *a, **k: pytest.fail('trained'))
    root = shutil.copytree(scenes, tmp_path/'copy')
    last = sorted((root/split).glob('*.png'))[-1]
    Image.open(last).resize((96, 90)).save(last)
    with pytest.raises(ValueError, match=rf'digits_{split}.json(.*\n)*.*{last.name} is 96 x 90, not 96 x 96'):
        files = root/'digits_train.json', root/'digits_val.json', root
        run_detection(DetectionRecipe('x', 'bs', **FAST), *files, tmp_path, 'cpu')


def one_photo(folder, name='a.jpg', size=(60, 40), tag=None, annotated=None, **image):
    "An annotation file of one photo, stored with an orientation tag"
    exif, (w, h) = Image.Exif(), annotated or size
    if tag: exif[0x0112] = tag
    folder.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size).save(folder/name, exif=exif)
    outline = [[1, 1, 21, 1, 21, 31, 1, 31]]
    own = dict(id=1, image_id=1, category_id=1, bbox=[1, 1, 20, 30], area=600, segmentation=outline)
    images = [dict(dict(id=1, file_name=name, width=w, height=h), **image)]
    return write(folder, 'a.json', dict(images=images, annotations=[own], categories=[dict(id=1, name='x')]))


def test_photos_that_were_annotated_upright(tmp_path):
    "detectron2#788 and #863. Before: refused by size, without the word orientation, and no option obeyed the tag"
    path = one_photo(tmp_path, tag=6, annotated=(40, 60))
    report = check_annotations(path, tmp_path)
    assert not report.ok and '--orient' in report.problems[0]
    with pytest.raises(ValueError, match='orient=True'): InstanceDataset(read_annotations(path, tmp_path))[0]
    upright = read_annotations(path, tmp_path, orient=True)
    assert InstanceDataset(upright)[0][0].shape == (3, 60, 40) and check_annotations(path, tmp_path, orient=True).ok


def test_tags_that_leave_the_size_are_counted(tmp_path):
    "Of the same kind: a photo stored upside down has the same size either way, so the check says that it is there"
    report = check_annotations(one_photo(tmp_path, tag=3), tmp_path)
    assert report.ok and 'a.jpg' in next(line for line in report.lines if 'orientation' in line)


@pytest.mark.parametrize('name', ['./train/0001.png', 'train\\0001.png', 'C:\\set\\train\\0001.png',
                                  '..\\..\\media\\train\\0001.png', '/home/me/train/0001.png'])
def test_paths_as_tools_write_them(scenes, tmp_path, name):
    "label-studio#7294, and others. Before: `./train/x.jpg` was ambiguous with val/x.jpg, backslashes were not found"
    def change(content): content['images'][1]['file_name'] = name
    anns = read_annotations(changed(scenes, tmp_path, change), scenes)
    assert anns.files[1] == str(scenes/'train/0001.png')


def test_folders_that_are_links(scenes, tmp_path):
    "Before: below `--images` links to folders were not searched, so all photos were missing"
    (tmp_path/'photos').mkdir()
    (tmp_path/'photos/linked').symlink_to(scenes/'train')
    (tmp_path/'photos/circle').symlink_to(tmp_path/'photos')
    assert len(read_annotations(scenes/'digits_train.json', tmp_path/'photos').files) == 30


def test_one_photo_that_is_found_twice(scenes, tmp_path):
    "Of the same kind: a folder given twice, or inside another one; before, its photos were called missing"
    path = changed(scenes, tmp_path, bare_names)
    for folders in ([scenes/'train', scenes/'train'], [scenes/'train', f'{scenes}/train/../train']):
        assert len(read_annotations(path, folders).files) == 30


def test_names_with_accents_from_a_mac(tmp_path):
    "Before: a name that macOS had stored with the accent by itself was not found"
    path = one_photo(tmp_path, unicodedata.normalize('NFD', 'café.jpg'))
    content = json.loads(path.read_text())
    content['images'][0]['file_name'] = unicodedata.normalize('NFC', 'café.jpg')
    assert read_annotations(write(tmp_path, 'b.json', content), tmp_path).files


# Boxes: detectron2#2957 and #1833, vision#2740, armory#1491

@pytest.mark.parametrize('form,hint', [(CORNERS, 'x1, y1, x2, y2'), (TURNED, 'y, x, height, width')])
def test_boxes_of_another_form(scenes, tmp_path, form, hint):
    """detectron2#2957 and #1833, vision#2740, armory#1491. Before: they passed every check, and the truth itself scored
    APb 0.28 and 0.68. Run lengths are compared with --decode, and before training; polygons when the file is read."""
    path = changed(scenes, tmp_path, each_box(form))
    (problem,) = check_annotations(path, scenes, decode=True).problems
    assert hint in problem
    with pytest.raises(ValueError, match=hint):
        run_detection(DetectionRecipe('x', 'softmax', **FAST), path, scenes/'digits_val.json', scenes, tmp_path, 'cpu')


def test_one_box_that_is_elsewhere(scenes, tmp_path):
    "The same, of one annotation: it is named, and the file can be used"
    def change(content): content['annotations'][3]['bbox'] = [0, 0, 4, 4]
    report = check_annotations(changed(scenes, tmp_path, change), scenes, decode=True)
    assert report.ok and any('around the mask (1): 4' in line for line in report.lines)


def test_boxes_that_are_shares_of_the_image(scenes, tmp_path):
    "Of the same kind, from YOLO's files: numbers in 0..1, for boxes alone"
    path = changed(scenes, tmp_path, each_box(lambda x, y, w, h: [x/96, y/96, w/96, h/96]))
    with pytest.raises(ValueError, match='shares of the image'): read_annotations(path, boxes=True)


# Groups, and names: eqlv2#5, lvis-api#21, BalancedGroupSoftmax#5, SparseInst#114

def three_commonest(anns, groups=None):
    ap = InstanceAP(anns, kinds=('bbox',), groups=groups)
    for _, t in InstanceDataset(anns, train=False):
        known = t['labels'] <= 3
        ap.add([dict(boxes=t['boxes'][known], labels=t['labels'][known], scores=torch.ones(int(known.sum())))], [t])
    return ap.compute()


def test_groups_go_by_training_images(tmp_path):
    """eqlv2#5, lvis-api#21. Before: AP_r, AP_c, AP_f of COCO's files went by the validation images, and perfect
    detections of the three commonest digits gave APr 0.30; by training images it is 0, .5 and 1."""
    root = digit_scenes(tmp_path/'digits')
    train, valid = (read_annotations(changed(root, tmp_path, as_coco, split), root) for split in ('train', 'val'))
    scores = three_commonest(valid, train.groups)
    assert [round(scores[k], 2) for k in ('APbr', 'APbc', 'APbf')] == [0, .5, 1]
    assert np.isnan(three_commonest(valid)['APbr'])                             # nobody has said the groups
    lvis = read_annotations(coco_to_lvis(valid.path, tmp_path/'lvis.json', train=train.path), root)
    assert three_commonest(lvis)['APbf'] == 1


def test_a_run_takes_the_groups_of_training(scenes, tmp_path, monkeypatch):
    seen = []
    class Noted(InstanceAP):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            seen.append(self.groups)
    monkeypatch.setattr('balms.detection_runs.InstanceAP', Noted)
    train, valid = (changed(scenes, tmp_path, as_coco, split) for split in ('train', 'val'))
    row = run_detection(DetectionRecipe('x', 'softmax', **FAST), train, valid, scenes, tmp_path/'runs', 'cpu')
    assert ''.join(seen[0]) == row['groups'] == ''.join(read_annotations(train).groups)
    assert row['groups'] != ''.join(read_annotations(valid).groups)


def test_own_data_under_the_name_of_lvis(scenes, tmp_path):
    "Before: without --data they stood beside the paper's numbers; now LVIS's counts are asked for"
    with pytest.raises(ValueError, match='digits_train.json is not LVIS v0.5'):
        files = scenes/'digits_train.json', scenes/'digits_val.json', scenes
        run_detection(DetectionRecipe(**FAST), *files, tmp_path, 'cpu')


def test_runs_of_different_lengths_are_not_averaged():
    "Before: with `changed=True` runs of 8 and of 300 steps had one mean"
    def row(ap, **changed):
        recipe = dict(data='x', preset='small', method='bs', seed=0)
        scores = dict.fromkeys(('AP', 'APr', 'APc', 'APf', 'APb'), ap)
        return dict(scores, key='k', recipe=recipe, changed=changed, environments=[])
    table = detection_table([row(2., iters=8), row(10.)], 'x', 'small', changed=True)
    assert 'Balanced Softmax, iters=8 | 2.0' in table and 'Balanced Softmax | 10.0' in table and '6.0' not in table


# Losses, before the first step: matterport/Mask_RCNN#418, detr#249

def in_every_image(content):
    for im in content['images']:
        if any(a['image_id'] == im['id'] and a['category_id'] == 1 for a in content['annotations']): continue
        own = next(a for a in content['annotations'] if a['image_id'] == im['id'] or True)
        content['annotations'].append({**own, 'id': 1000 + im['id'], 'image_id': im['id'], 'category_id': 1})
        im['neg_category_ids'] = [c for c in im['neg_category_ids'] if c != 1]


def test_a_class_in_every_image(scenes, tmp_path, monkeypatch):
    """matterport/Mask_RCNN#418, detr#249. Before: the check said nothing, the default method trained stage 1 to its end
    and then stopped at "Classes [0]", and the flag that was hinted at trained stage 1 again."""
    path = changed(scenes, tmp_path, in_every_image)
    report = check_annotations(path)
    assert any("every annotated image (1): 'digit 0'" in line for line in report.lines)
    files = path, scenes/'digits_val.json', scenes, tmp_path/'runs', 'cpu'
    with monkeypatch.context() as m:
        m.setattr('balms.detection_runs.fit_stage', lambda *a, **k: pytest.fail('trained'))
        with pytest.raises(ValueError, match="Balanced Softmax: .*'digit 0'.*--min-images"):
            run_detection(DetectionRecipe('x', 'bs', **FAST), *files)
    own = dict(FAST, iters2=2, drops2=())
    assert DetectionRecipe('x', 'bs', **own, min_images=.5).stage1 == DetectionRecipe('x', 'bs', **own).stage1
    assert run_detection(DetectionRecipe('x', 'bs', **own, min_images=.5), *files)['AP'] is not None


def test_a_root_class_that_nothing_is_annotated_with(scenes, tmp_path):
    "Of Roboflow's files. Before: it passed the check and was refused by index; stage 1 needs no count of it"
    def change(content): content['categories'].append(dict(id=11, name='objects', frequency='r'))
    path = changed(scenes, tmp_path, change)
    assert any("without a training image (1): 'objects'" in line for line in check_annotations(path).lines)
    with pytest.raises(ValueError, match="'objects'"):
        run_detection(DetectionRecipe('x', 'bs', **FAST), path, scenes/'digits_val.json', scenes, tmp_path, 'cpu')


@pytest.mark.parametrize('method', ['softmax', 'sigmoid', 'focal'])
def test_methods_without_counts_need_none(method):
    from balms.detector import SEG_METHODS
    SEG_METHODS[method].loss(torch.tensor([5., 0, 8]), 8)


# What a recipe, a file and a plain install can be: cocoapi#450, detectron2#3359, rf-detr#609, myvision#17

@pytest.mark.parametrize('name,value', [
    ('lr', -1), ('max_size', 0), ('min_size', (0,)), ('anchors', (8,)), ('proposals', ()), ('min_images', 0),
    ('seed', -1), ('drops', (-1,)), ('min_size', (2000,))])
def test_values_that_cannot_be(name, value):
    "Before: most were accepted, and an error of torchvision in the first step"
    with pytest.raises(ValueError, match=name): DetectionRecipe(**{name: value})


@pytest.mark.parametrize('weights', ['my.pth', 'IMAGENET1K_V9'])
def test_weights_that_are_not_there(weights):
    "Before: KeyError. Now the published names, and that a file does, too"
    with pytest.raises(ValueError, match=f"IMAGENET1K_V1.*file.*'{weights}'"): mask_rcnn(3, weights_backbone=weights)


def test_no_limit_of_detections(scenes):
    "Before: max_dets=-1, LVIS's \"no limit\", ended in vector::_M_default_append"
    anns = read_annotations(scenes/'digits_val.json', scenes)
    ap = InstanceAP(anns, max_dets=-1, kinds=('bbox',))
    for _, t in InstanceDataset(anns, train=False):
        if not len(t['labels']): continue
        label = (t['labels'][:1] % 10 + 1).repeat(400)                          # 400 of another class, in front
        boxes = torch.cat([t['boxes'][:1].repeat(400, 1), t['boxes']])
        scores = torch.cat([torch.ones(400), torch.full((len(t['labels']),), .5)])
        ap.add([dict(boxes=boxes, labels=torch.cat([label, t['labels']]), scores=scores)], [t])
    assert ap.compute()['APb'] > 0
    with pytest.raises(ValueError, match='max_dets'): InstanceAP(anns, max_dets=0)


@pytest.mark.parametrize('segmentation,what', [
    ([1, 1, 5, 1, 5, 5], 'one flat list'), ([[[1, 1], [5, 1], [5, 5]]], 'points'), ([[1, 1, 5, 1, 5]], 'odd number'),
    ([[1, 1, 5, 1, 5, float('nan')]], 'finite')])
def test_wrong_polygons_are_told_apart(scenes, tmp_path, segmentation, what):
    "Before: three of them had one message, which was untrue for one"
    def change(content): content['annotations'][0]['segmentation'] = segmentation
    with pytest.raises(ValueError, match=what): read_annotations(changed(scenes, tmp_path, change))


def test_what_is_seldom_meant_is_said(scenes, tmp_path):
    "Before: nothing was said of doubled annotations, of categories of one name, of a photo under two ids"
    def change(content):
        content['annotations'].append({**content['annotations'][0], 'id': 999})
        content['categories'][1]['name'] = 'digit 0'
        content['images'][1]['file_name'] = content['images'][0]['file_name']
    lines = '\n'.join(check_annotations(changed(scenes, tmp_path, change)).lines)
    for what in ('same box and class in an image (2): 1, 999', 'same name (2): 1, 2', 'same photo (2): 1, 2'):
        assert what in lines


@pytest.mark.parametrize('command', ['balms_check_lvis', 'balms_lvis'])
def test_a_plain_install(scenes, tmp_path, command):
    "Before: a traceback, and status 1, which means that the data are wrong. Now one line, and status 2"
    module = dict(balms_check_lvis='annotations', balms_lvis='detection_cli')[command]
    script = f"import sys; sys.modules['faster_coco_eval'] = None\nfrom balms.{module} import {command}\n{command}()\n"
    (tmp_path/'command.py').write_text(script)
    files = [scenes/'digits_train.json', *([scenes/'digits_val.json', scenes] if command == 'balms_lvis' else [])]
    options = dict(balms_check_lvis=['--images', scenes, '--decode'],
                   balms_lvis=['--preset', 'small', '--data', 'x', '--out', tmp_path, '--device', 'cpu'])[command]
    args = [sys.executable, '-W', 'ignore', tmp_path/'command.py', *files, *options]
    r = subprocess.run([*map(str, args)], capture_output=True, text=True)
    assert r.returncode == 2 and "pip install 'balms[lvis]'" in r.stderr and 'Traceback' not in r.stderr, r.stderr
