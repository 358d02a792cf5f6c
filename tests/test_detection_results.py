"What a detection run leaves for its user: AP by class, result files, predictions; and what it may start from"
import json
import pytest, torch
pytest.importorskip('faster_coco_eval')
from balms.annotations import read_annotations
from balms.detection_cli import balms_lvis, balms_lvis_predict, balms_lvis_score
from balms.detection_recipe import DetectionRecipe
from balms.detection_results import class_table, load_detection_run, predict_photos, score_results
from balms.detection_runs import load_detector, run_detection
from balms.instance_data import digit_scenes
from balms.weights import read_tensors

FAST = dict(preset='small', iters=4, drops=(), warmup=1)
LWS = DetectionRecipe('x', 'lws', **FAST, iters2=2, drops2=())


@pytest.fixture(scope='module')
def scenes(tmp_path_factory): return digit_scenes(tmp_path_factory.mktemp('scenes'), n=30, n_valid=6)


@pytest.fixture(scope='module')
def files(scenes): return scenes/'digits_train.json', scenes/'digits_val.json', scenes


@pytest.fixture(scope='module')
def runs(scenes, files):
    run_detection(LWS, *files, scenes/'runs', 'cpu')
    return scenes/'runs'


def test_results_of_a_finished_run_are_written_without_training(files, runs, monkeypatch):
    "Asked for later, they are computed from the model, and the row stays as it was; their AP is that of the row"
    row_file, results = runs/LWS.key/'row.json', runs/LWS.key/'results.json'
    before = row_file.read_bytes()
    assert not results.exists()
    row = run_detection(LWS, *files, runs, 'cpu', results=True)
    assert results.exists() and row_file.read_bytes() == before
    train, valid = (read_annotations(file) for file in files[:2])
    scores, per_class = score_results(results, valid, train)
    assert scores['AP'] == row['AP'] and scores['APr'] == row['APr'] and per_class == row['per_class']


def test_results_of_boxes_have_no_ap_of_masks(files, runs):
    run_detection(LWS, *files, runs, 'cpu', results=True)
    rows = json.loads((runs/LWS.key/'results.json').read_text())
    for row in rows: del row['segmentation']
    valid = read_annotations(files[1])
    with pytest.raises(ValueError, match='segmentation'): score_results(rows, valid)
    assert 'AP' not in score_results(rows, valid, boxes_only=True)[0]


def test_classes_by_name_from_common_to_rare(files, runs):
    row = run_detection(LWS, *files, runs, 'cpu')
    lines = class_table([row], read_annotations(files[0]).names, as_csv=True).splitlines()
    counts = [int(line.split(',')[2]) for line in lines[1:]]
    assert lines[0] == 'class,group,training images,lws' and counts == sorted(counts, reverse=True)
    assert lines[1].startswith('digit 0,')


def test_a_run_is_loaded_without_its_annotations(files, runs):
    "It finds what the detector of `load_detector` does, scales of LWS included"
    net, about = load_detection_run(runs/LWS.key)
    image = [torch.rand(3, 96, 96)]
    with torch.no_grad(): one, other = net(image)[0], load_detector(LWS, files[0], runs)(image)[0]
    assert all(torch.equal(one[k], other[k]) for k in one) and about['category_ids'] == list(range(1, 11))


def test_photos_are_predicted_and_drawn(scenes, runs, tmp_path):
    predict_photos(runs/LWS.key, [scenes/'val', scenes/'train/0000.png'], tmp_path/'out')
    assert len(list((tmp_path/'out').glob('*.png'))) == 7
    found = predict_photos(runs/LWS.key, scenes/'val/0000.png', tmp_path/'all', thresh=0., draw=False)
    assert found == json.loads((tmp_path/'all/detections.json').read_text())
    assert not list((tmp_path/'all').glob('*.png'))
    assert found and all(f['category'] == f'digit {f["category_id"] - 1}' for f in found)
    some = sorted(f['score'] for f in found)[len(found)//2]
    fewer = predict_photos(runs/LWS.key, scenes/'val/0000.png', tmp_path/'some', thresh=some, draw=False)
    assert 0 < len(fewer) < len(found) and min(f['score'] for f in fewer) >= some
    (tmp_path/'a.jpg').write_bytes(b'')
    with pytest.raises(ValueError, match='a.jpg'):
        predict_photos(runs/LWS.key, [scenes/'val', tmp_path/'a.jpg'], tmp_path)


def test_a_run_starts_from_a_file_of_weights(files, runs, tmp_path):
    "Here of another run with other classes; its content is part of the recipe's name"
    weights = runs/LWS.stage1.key/'model.safetensors'
    r = DetectionRecipe('x', 'sigmoid', **(FAST | dict(iters=1, lr=0.)), weights=str(weights), boxes_only=True)
    run_detection(r, *files, tmp_path, 'cpu')
    start, end = read_tensors(weights), read_tensors(tmp_path/r.key/'model.safetensors')
    assert torch.equal(start['backbone.body.conv1.weight'], end['backbone.body.conv1.weight'])
    with pytest.raises(ValueError, match='model.safetensors has the weights of another network'):
        run_detection(DetectionRecipe('x', 'sigmoid', **FAST, width=16, weights=str(weights)), *files, tmp_path, 'cpu')


def test_options_of_the_command(files, tmp_path, capsys):
    common = [*map(str, files), '--preset', 'small', '--device', 'cpu', '--out', str(tmp_path)]
    balms_lvis([*common, '--method', 'sigmoid', '--epochs', '0.5', '--bs', '2', '--size', '64', '--lr', '0.001'])
    assert 'digit 0' in capsys.readouterr().out
    row = json.loads(next(tmp_path.glob('*/row.json')).read_text())
    assert row['changed'] | dict(iters=0) == dict(bs=2, min_size=[64], max_size=106, iters=0, lr=.001)
    assert row['recipe']['iters'] == 7 and row['recipe']['data'] == 'digits_train'         # of 29 photos with something
    for wrong in (['--iters', '2', '--epochs', '2'], ['--meta-lr', '1'], ['--model', 'vgg16'], ['--weights', 'a.pth']):
        with pytest.raises(SystemExit) as e: balms_lvis([*common, '--method', 'sigmoid', *wrong])
        assert e.value.code == 2
    for command, args in ((balms_lvis_score, [files[1], 'none.json']), (balms_lvis_predict, [tmp_path, files[2]])):
        with pytest.raises(SystemExit) as e: command([*map(str, args)])
        assert e.value.code == 2
