"Photos of your own: every form they come in, all that can be wrong with them, and runs on them."
import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import balms.photo_features
import balms.photo_runs
from balms.cli import balms_train
from balms.datasets import clothes_folder
from balms.photo_features import photo_features, split_bank
from balms.photo_runs import PhotoRecipe, PhotoRuns, bank_logits, choose_settings, train_classifier
from balms.photos import check_photos, describe_photos, find_photo_set, scan_photos, split_photos, without_bad
from balms.lists import balms_check
from balms.metrics import mean_class_accuracy
from balms.models import get_model
from balms.rows import read_rows
from balms.weights import load_model, save_model


def photo(path, seed=0, size=(12, 9), **kw):
    "A small photo of random colours"
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    Image.fromarray(pixels).save(path, **kw)
    return path


def folder(root, **classes):
    "A folder of class folders with so many photos each"
    for i, (name, n) in enumerate(classes.items()):
        for j in range(n): photo(root/name.replace('__', '/')/f'{j}.png', 1000*i + j)
    return root


def names(photos, split=None):
    keep = photos.splits == split if split is not None else slice(None)
    return photos.files[keep].tolist()


# ---- the forms that photos come in

def test_class_folders(tmp_path):
    root = folder(tmp_path, cat=2, dog=1)
    photo(root/'cat/a week/later/7.JPG', 7)                                      # in folders within a class
    for other in ('__MACOSX/cat/0.png', '.cache/bird/1.png', 'cat/._0.png', 'cat/Thumbs.db', 'cat/.DS_Store'):
        (root/other).parent.mkdir(parents=True, exist_ok=True)
        (root/other).write_bytes(b'x')
    (root/'cat/notes.txt').write_text('x')
    photo(root/'loose.png')
    photos = find_photo_set(root)
    assert photos.vocab == ['cat', 'dog'] and names(photos) == ['cat/0.png', 'cat/1.png', 'cat/a week/later/7.JPG',
                                                               'dog/0.png']
    left_out = {reason: files.tolist() for reason, files in photos.left_out.items()}
    assert left_out == {'no images': ['cat/notes.txt'], 'in no class folder': ['loose.png']}
    assert 'notes.txt' in (text := describe_photos(scan_photos(photos)[0])) and 'loose.png' in text


@pytest.mark.parametrize('other', ('test', 'valid', 'Val'))
def test_split_folders(tmp_path, other):
    root = folder(tmp_path, train__cat=4, train__dog=4, **{f'{other}__cat': 1, f'{other}__dog': 1})
    for label in ('cat', 'dog'): photo(root/other/label/'0.png', hash(label) % 99 + 5000)
    photos = split_photos(find_photo_set(root), valid_per_class=1)
    assert names(photos, 'test') == [f'{other}/cat/0.png', f'{other}/dog/0.png']   # valid/ where there is no test/
    assert photos.counts('valid').tolist() == [1, 1] and photos.counts('train').tolist() == [3, 3]


def test_a_valid_folder_beside_a_test_folder_is_to_choose_by(tmp_path):
    root = folder(tmp_path, train__a=3, train__b=3, valid__a=1, valid__b=1, test__a=1, test__b=1)
    photos = split_photos(find_photo_set(root))
    assert photos.counts('train').tolist() == [3, 3] and names(photos, 'valid') == ['valid/a/0.png', 'valid/b/0.png']


def test_lists(tmp_path):
    from balms.lists import sample_tree
    photos = find_photo_set(sample_tree(tmp_path, n_max=8, imbalance=4))
    assert photos.c == 10 and photos.counts('train')[[0, 9]].tolist() == [8, 2]
    assert {'valid', 'test'} <= {*photos.splits}


def table(path, text):
    path.write_text(text, encoding='utf-8')
    return path


def test_csv(tmp_path):
    root = folder(tmp_path/'photos', x=3)
    for i in range(3): shutil.move(root/f'x/{i}.png', root/f'x/photo {i}.png')
    csv = table(tmp_path/'labels.csv', '\ufeffwho,Image,Label,Split\nme,x/photo 0.png,猫,train\nme,photo 1,Ärmel lang,'
                'train\nme,x\\photo 2.png,猫,test\n')
    photos = find_photo_set(root, csv)
    assert photos.vocab == ['Ärmel lang', '猫'] and photos.splits.tolist() == ['train', 'train', 'test']
    assert names(photos) == ['x/photo 0.png', 'x/photo 1.png', 'x/photo 2.png']
    plain = find_photo_set(root, table(tmp_path/'plain.csv', 'a,b\nphoto 0,1\nphoto 1,01\n'))
    assert plain.vocab == ['01', '1']                                            # labels are text


@pytest.mark.parametrize('text, named', [
    ('file,label\n0.png,a\n7.png,b\n', 'row 3.*7.png'), ('file,label\n0.png,a\n1.png,\n', 'row 3'),
    ('file,label\n0.png,a\n0.png,b\n', 'x/0.png'), ('file,label,split\n0.png,a,train\n1.png,b,dev\n', "row 3.*'dev'"),
    ('file\n0.png\n', 'labels.csv'), ('file,label\n', 'labels.csv')])
def test_bad_csv(tmp_path, text, named):
    root = folder(tmp_path/'photos', x=3)
    with pytest.raises(ValueError, match=named): find_photo_set(root, table(tmp_path/'labels.csv', text))
    with pytest.raises(FileNotFoundError): find_photo_set(root, tmp_path/'none.csv')


def test_names_of_macs_and_others(tmp_path):
    "One class, whichever way its accent is written"
    root = folder(tmp_path, train__Blouse=1, **{'train__Jupe\u0301': 1, 'test__Jup\u00e9': 1})
    assert find_photo_set(root).vocab == ['Blouse', 'Jup\u00e9']


# ---- nothing to learn, or too little

def test_no_photos(tmp_path):
    with pytest.raises(FileNotFoundError, match='none'): find_photo_set(tmp_path/'none')
    with pytest.raises(ValueError, match=tmp_path.name): find_photo_set(tmp_path)
    (tmp_path/'cat').mkdir()
    (tmp_path/'cat/notes.txt').write_text('x')
    with pytest.raises(ValueError, match='<class>'): find_photo_set(tmp_path)


def test_one_class_is_refused(tmp_path):
    folder(tmp_path, photos__cat=3, photos__dog=3)
    with pytest.raises(ValueError, match="'photos'"): find_photo_set(tmp_path)   # a folder too high
    assert find_photo_set(tmp_path/'photos').c == 2
    with pytest.raises(ValueError, match="'cat'"): find_photo_set(tmp_path/'photos', drop=['dog'])


def test_junk_labels(tmp_path):
    root = folder(tmp_path, **{'Not sure': 2, 'Other': 2, 'Skip': 2, 'Hat': 3, 'Top': 3})
    photos = find_photo_set(root, drop=['Not sure', 'Other', 'Skip'])
    assert photos.vocab == ['Hat', 'Top'] and photos.counts().tolist() == [3, 3]
    assert [len(files) for files in photos.left_out.values()] == [6]
    with pytest.raises(ValueError, match='Maybe.*Hat'): find_photo_set(root, drop=['Maybe'])
    with pytest.raises(ValueError, match='No photos'): find_photo_set(root, drop=[p.name for p in root.iterdir()])


def test_a_class_in_test_alone(tmp_path):
    root = folder(tmp_path, train__a=2, train__b=2, test__a=1, test__new=1)
    with pytest.raises(ValueError, match='new'): find_photo_set(root)


def test_classes_of_one_and_two_photos_are_trained_on(tmp_path):
    photos = split_photos(find_photo_set(folder(tmp_path, many=40, one=1, two=2, three=3)))
    assert photos.vocab == ['many', 'one', 'three', 'two']
    assert photos.counts('test').tolist() == [10, 0, 1, 0] and photos.counts('valid').tolist() == [10, 0, 0, 0]
    assert photos.counts('train').tolist() == [20, 1, 2, 2]
    assert 'one' in (text := describe_photos(scan_photos(photos)[0])) and 'two' in text
    with pytest.raises(ValueError, match='three photos'): split_photos(find_photo_set(folder(tmp_path/'x', a=2, b=1)))


def test_a_thousand_classes(tmp_path):
    photos = split_photos(find_photo_set(folder(tmp_path, **{f'c{i:03}': 3 for i in range(1000)})))
    assert photos.c == 1000 and (photos.counts('train') == 2).all() and (photos.counts('test') == 1).all()
    assert len(describe_photos(scan_photos(photos)[0])) < 1000


def test_held_out_photos_depend_on_their_seed_alone(tmp_path):
    photos = find_photo_set(folder(tmp_path, a=30, b=30))
    again, other = split_photos(photos), split_photos(photos, seed=1)
    assert (split_photos(photos).splits == again.splits).all() and (other.splits != again.splits).any()
    assert (split_photos(photos).counts('valid') == [6, 6]).all()               # a third of the 20 others


# ---- what is wrong with photos

def spoil(root):
    "Every fault that one file can have; its name says which"
    good = (root/'a/0.png').read_bytes()
    (root/'a/empty.jpg').touch()
    (root/'a/cut.png').write_bytes(good[:-40])
    photo(root/'a/cut.jpg', 50, (64, 64))
    (root/'a/cut.jpg').write_bytes((root/'a/cut.jpg').read_bytes()[:-300])
    (root/'a/text.jpg').write_text('not a photo')
    (root/'a/phone.heic').write_bytes(b'....ftypheic')
    shutil.copy(root/'b/0.png', root/'a/z other label.png')
    return {'a/empty.jpg', 'a/cut.png', 'a/cut.jpg', 'a/text.jpg', 'a/phone.heic', 'b/0.png'}


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    root = folder(tmp_path, a=4, b=4)
    bad = spoil(root)
    shutil.copy(root/'a/1.png', root/'a/1 again.png')                            # does no harm
    photos, problems = scan_photos(find_photo_set(root))
    assert {photos.files[i] for i in problems} == bad
    with pytest.raises(ValueError) as e: without_bad(photos, problems)
    assert all(name in str(e.value) for name in bad)
    rest = without_bad(photos, problems, skip_bad=True)
    assert len(rest) == len(photos) - len(bad) and '1 again.png' in str(rest.files)
    text, ok = check_photos(root)
    assert not ok and all(name in text for name in bad) and 'byte for byte: 1' in text
    again = scan_photos(find_photo_set(root))
    assert again[1] == problems and (again[0].crcs == photos.crcs).all()        # from the cache
    (root/'a/text.jpg').unlink()
    assert len(scan_photos(find_photo_set(root))[1]) == len(bad) - 1            # which knows the files


def test_a_photo_in_training_and_test(tmp_path):
    root = folder(tmp_path, train__a=2, train__b=2, test__a=1, test__b=1)
    photo(root/'test/b/0.png', 99)
    shutil.copy(root/'train/a/0.png', root/'test/a/0.png')
    photos, problems = scan_photos(find_photo_set(root))
    assert [str(photos.files[i]) for i in problems] in (['train/a/0.png'], ['test/a/0.png'])


def test_all_of_a_class_bad(tmp_path):
    root = folder(tmp_path, a=3, b=3)
    (root/'c').mkdir()
    (root/'c/1.jpg').touch()
    photos, problems = scan_photos(find_photo_set(root))
    with pytest.raises(ValueError, match="'c'"): without_bad(photos, problems, skip_bad=True)


def test_kinds_of_files(tmp_path):
    "Grey of 16 bits, alpha, a palette, CMYK: used, as squares of 8 bits"
    from balms.photo_features import SquarePhotos
    grey = np.arange(108, dtype=np.uint16).reshape(9, 12)*600
    files = [tmp_path/name for name in ('a/grey.png', 'a/alpha.png', 'b/palette.gif', 'b/cmyk.jpg')]
    for f in files: f.parent.mkdir(exist_ok=True)
    Image.fromarray(grey).save(files[0])
    Image.new('RGBA', (12, 9), (0, 0, 0, 0)).save(files[1])
    photo(tmp_path/'rgb.png')
    Image.open(tmp_path/'rgb.png').quantize(8).save(files[2])
    Image.open(tmp_path/'rgb.png').convert('CMYK').save(files[3])
    photos, problems = scan_photos(find_photo_set(tmp_path))
    assert not problems and len(photos) == 4
    squares = {p.name: SquarePhotos([p], 9)[0] for p in photos.paths}
    assert all(s.shape == (3, 9, 9) and s.dtype == torch.uint8 for s in squares.values())
    assert (squares['alpha.png'] == 255).all() and squares['grey.png'].float().std() > 50


# ---- features and runs, with a small network of one's own

@pytest.fixture(scope='module')
def small(tmp_path_factory):
    "Weights of a small network, in place of a pretrained one"
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('weights')/'small.safetensors'
    save_model(path, get_model('small_cnn', 4, 3))
    return str(path)


def coloured(root, n=12):
    "Photos of three classes that a colour tells apart, with a tail"
    rng = np.random.default_rng(0)
    for label, (name, m) in enumerate(dict(red=n, green=n//2, blue=n//3).items()):
        for i in range(m):
            pixels = rng.integers(0, 120, (10, 14, 3), np.uint8)
            pixels[..., label] += 120
            (root/name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root/name/f'{i}.png')
    return root


def test_features_are_kept(tmp_path, small, monkeypatch):
    photos = find_photo_set(coloured(tmp_path/'p'))
    how = dict(network='small_cnn', weights=small, size=8, workers=0)
    bank = photo_features(photos, views=2, **how)
    assert bank.images.shape == (2*len(photos), 64) and bank.targets.tolist() == photos.labels.tolist()*2
    made = []
    monkeypatch.setattr(balms.photo_features, 'get_model', lambda *a, **kw: made.append(a) or get_model(*a, **kw))
    assert torch.equal(photo_features(photos, views=2, **how).images, bank.images) and not made
    assert torch.equal(photo_features(photos, views=1, **how).images, bank.images[:len(photos)]) and len(made) == 1
    photo_features(photos, **dict(how, size=9))
    other = shutil.copy(small, tmp_path/'other.safetensors')
    photo_features(photos, views=2, **dict(how, weights=str(other)))            # the same content
    assert len(made) == 2
    torch.manual_seed(1)
    save_model(other, get_model('small_cnn', 4, 3))
    photo_features(photos, views=2, **dict(how, weights=str(other)))
    os.utime(photos.paths[0], (1, 1))
    photo_features(photos, views=2, **how)
    assert len(made) == 4                                                        # other weights, another file
    split = split_photos(photos)
    train = split_bank(bank, split, 'train')
    assert len(train) == 2*split.counts('train').sum() and train.views == 2


def recipes(root, small, *methods, **kw):
    settings = dict(model='small_cnn', weights=small, size=8, views=1, valid_per_class=2, test_per_class=2, bs=16) | kw
    return [PhotoRecipe(str(root), method=m, **settings) for m in methods]


def test_every_method_trains_on_features(tmp_path, small):
    from balms.methods import METHODS
    todo = recipes(coloured(tmp_path/'p'), small, *METHODS, lr=.05, iters=20)
    runs = PhotoRuns(todo[0], tmp_path/'runs', 'cpu', 0)
    for r in todo:
        row = runs.run(r)
        assert 0 <= row['overall'] <= 100 and row['chosen'] == dict(lr=.05, iters=20)
        net, about = load_model(tmp_path/'runs'/r.key/'model.safetensors')
        assert net.fc.out_features == 3 and about['classes'] == ['blue', 'green', 'red']
    assert len(read_rows(tmp_path/'runs')) == len(METHODS)


def test_settings_are_chosen_on_held_out_photos(tmp_path, small, monkeypatch):
    "The pair with the highest accuracy on them; neither test photos nor other seeds have a part in it"
    monkeypatch.setattr(balms.photo_runs, 'LENGTHS', (1, 60))
    monkeypatch.setattr(balms.photo_runs, 'LEARNING_RATES', (1e-6, .05))
    one, other = recipes(coloured(tmp_path/'p', 30), small, 'posthoc', 'posthoc', valid_per_class=6)
    runs = PhotoRuns(one, tmp_path/'runs', 'cpu', 0)
    rows = [runs.run(r) for r in (one, replace(other, seed=1))]
    assert rows[0]['chosen'] == rows[1]['chosen'] and len(rows[0]['chosen']['tried']) == 4
    train, valid = runs.part('train'), runs.part('valid')
    counts, scores = torch.bincount(train.targets), {}
    for lr in (1e-6, .05):
        for iters in (1, 60):
            logits = bank_logits(one, train_classifier(one, train, counts, lr, iters), valid, counts)
            scores[lr, iters] = round(100*mean_class_accuracy(logits, valid.targets).item(), 2)
    chosen = rows[0]['chosen']
    assert scores[chosen['lr'], chosen['iters']] == chosen['valid'] == max(scores.values()) > min(scores.values())
    kept = choose_settings(replace(one, iters=7), train, valid)
    assert kept['iters'] == 7 and len(kept['tried']) == 2


def test_a_run_folder_of_other_photos(tmp_path, small):
    r, = recipes(coloured(tmp_path/'p'), small, 'bs', lr=.05, iters=3)
    first = PhotoRuns(r, tmp_path/'runs', 'cpu', 0).run(r)
    assert PhotoRuns(r, tmp_path/'runs', 'cpu', 0).run(r) == json.loads(json.dumps(first))
    photo(tmp_path/'p/red/new.png', 77)
    with pytest.raises(ValueError, match=r.key): PhotoRuns(r, tmp_path/'runs', 'cpu', 0).run(r)


def test_weights_of_another_network(tmp_path, small):
    r, = recipes(coloured(tmp_path/'p'), small, 'bs', model='resnet8')
    with pytest.raises(ValueError, match='small.safetensors'): PhotoRuns(r, tmp_path/'runs', 'cpu', 0).run(r)


# ---- the command

@pytest.fixture
def train(capsys, tmp_path, monkeypatch):
    "Runs `balms_train` and gives back (exit status, stdout, stderr)"
    monkeypatch.chdir(tmp_path)
    def go(*args):
        status = 0
        try: balms_train([str(a) for a in args])
        except SystemExit as e: status = e.code
        return status, *capsys.readouterr()
    return go


def test_the_command(train, tmp_path, small):
    root = coloured(tmp_path/'my photos')
    how = ['--model', 'small_cnn', '--weights', small, '--size', 12, '--iters', 10, '--lr', .05, '--workers', 0]
    how += ['--seeds', 1, '--device', 'cpu']
    status, out, err = train('--data', root, '--frozen', *how, '--method', 'softmax', 'bs')
    assert status == 0, err
    assert 'small_cnn' in out and 'my photos: 22 photos of 3 classes' in out and 'imbalance' in out
    assert len(read_rows(tmp_path/'runs')) == 2 and list((tmp_path/'runs').glob('my_photos*.png'))
    status, out, err = train('--data', root, '--frozen', *how, '--method', 'bs', '--preset', 'paper')
    assert status == 2 and 'preset' in err and err.count('\n') == 1
    (root/'red/bad.jpg').write_text('x')
    status, out, err = train('--data', root, '--frozen', *how, '--method', 'bs')
    assert status == 2 and 'red/bad.jpg' in err and '--skip-bad' in err
    status, out, err = train('--data', root, '--skip-bad', *how, '--method', 'bs')
    assert status == 0 and 'red/bad.jpg' in out, err


def test_fine_tuning(train, tmp_path, small):
    "A pretrained network is trained from its weights, in one stage or two, and leaves a model with names of classes"
    root = coloured(tmp_path/'p', 24)
    how = ['--model', 'small_cnn', '--weights', small, '--size', 12, '--workers', 0, '--seeds', 1, '--device', 'cpu']
    how += ['--bs', 8, '--iters2', 10]
    status, out, err = train('--data', root, '--epochs', 2, *how, '--method', 'bs', 'balms')
    assert status == 0, err
    assert 'fine-tuned' in out and 'small_cnn' in out
    rows = {row['recipe']['method']: row for row in read_rows(tmp_path/'runs')}
    assert rows['bs']['recipe']['iters'] == round(2*sum(rows['bs']['counts'])/8) and len(rows['balms']['r']) == 3
    _, about = load_model(tmp_path/'runs'/rows['bs']['key']/'model.safetensors')
    assert about['classes'] == ['blue', 'green', 'red'] and about['size'] == [12, 12]
    assert train('--data', root, '--epochs', 2, *how, '--method', 'bs', '--frozen')[0] == 2
    status, out, err = train('--data', root, '--epochs', 2, *how, '--method', 'bs')
    assert status == 2 and 'iters2' in err                                       # no second stage


@pytest.mark.parametrize('options, size, photos', [
    ([], 100, True), ([], 40, False), (['--size', 100], 40, True), (['--size', 32], 100, False),
    (['--frozen'], 40, True), (['--imbalance', 2], 100, False), (['--epochs', 1], 40, True)])
def test_which_folders_are_photos(tmp_path, options, size, photos):
    "Above 64 pixels a pretrained network, unless a recipe in memory is asked for"
    from balms.cli import _are_photos, _train_parser
    for split in ('train', 'test'):
        for label in 'ab': photo(tmp_path/split/label/'0.png', size=(size, size + 20))
    args = ['--data', str(tmp_path), *map(str, options)]
    assert _are_photos(_train_parser().parse_args(args)) == photos


def test_a_read_only_folder_of_photos(train, tmp_path, small):
    "Nothing is written beside the photos"
    root = coloured(tmp_path/'p')
    before = sorted(root.rglob('*'))
    how = ['--model', 'small_cnn', '--weights', small, '--size', 8, '--iters', 3, '--lr', .05, '--workers', 0]
    status, out, err = train('--data', root, *how, '--method', 'bs', '--seeds', 1, '--device', 'cpu')
    assert status == 0 and sorted(root.rglob('*')) == before, err
    status, out, err = train('--data', root, '--frozen', '--out', root/'red/0.png')    # an output folder that cannot be
    assert status == 2 and '0.png' in err


def test_clothes_are_found_whole():
    photos, problems = scan_photos(find_photo_set(clothes_folder()))
    assert not problems and photos.counts('test').tolist() == [10]*17 and photos.counts('train').max() == 250


def test_balms_check_of_a_folder(tmp_path, capsys):
    root = folder(tmp_path/'photos', a=3, b=3)
    assert balms_check(str(root)) == 0 and 'photos: 6 photos of 2 classes' in capsys.readouterr().out
    bad = spoil(root)
    assert balms_check(str(root)) == 1
    out = capsys.readouterr().out
    assert all(name in out for name in bad), out
    csv = table(tmp_path/'labels.csv', 'file,label\na/0.png,x\nb/1.png,y\n')
    assert balms_check(str(root), csv=str(csv)) == 0 and '2 photos of 2 classes' in capsys.readouterr().out
    assert balms_check(str(root), csv=str(tmp_path/'none.csv')) == 2
