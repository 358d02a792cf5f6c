"A finished run is used: its model, predictions of new photos, export, the report."
import base64, csv, io, json, os, subprocess, sys
from html.parser import HTMLParser
from pathlib import Path
import numpy as np, pytest, torch, torchvision
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from balms.baselines import CosineLinear
from balms.class_report import write_report
from balms.core import class_counts
from balms.differences import difference_rows
from balms.export import export_run
from balms.learner import load_images, recipe_learner
from balms.lists import sample_tree
from balms.models import get_model
from balms.photo_runs import PhotoRecipe, PhotoRuns
from balms.predict import find_photos, for_shares, load_run, own_shares, photo_probabilities
from balms.recipe import Recipe
from balms.rows import read_row
from balms.run_commands import balms_export, balms_predict, balms_report
from balms.runs import evaluate, run
from balms.weights import load_model, save_model

SCORES = 'overall', 'many', 'medium', 'few', 'ece', 'nll', 'per_class', 'p_y'


def save_photos(folder, images):
    "Images (n, c, h, w) as files without loss, in order"
    folder.mkdir(parents=True)
    for i, x in enumerate(images.numpy()):
        Image.fromarray(x[0] if len(x) == 1 else x.transpose(1, 2, 0)).save(folder/f'{i:04}.png')
    return find_photos([folder])


def photo_folder(root, seed=0):
    "Photos of odd sizes in train/<class>, test/<class>: JPEG, PNG, with alpha, turned by their tag"
    rng = np.random.default_rng(seed)
    for split, numbers in (('train', (14, 8, 5)), ('test', (6, 6, 6))):
        for color, (name, n) in enumerate(zip(('blue cup', 'rød kopp', 'tasse à thé'), numbers)):
            (root/split/name).mkdir(parents=True)
            for i in range(n):
                size = rng.integers(20, 40, 2)
                pixels = rng.integers(0, 120, (*size, 3)).astype(np.uint8)
                pixels[..., color] += 100
                im, kind = Image.fromarray(pixels), i % 3
                if kind == 2: im.putalpha(Image.fromarray(pixels[..., 0]))
                exif = Image.Exif()
                exif[274] = 6 if kind == 1 else 1
                im.save(root/split/name/f'{i} ø.{"png" if kind == 2 else "jpg"}', exif=exif)
    return root


def runs_own(recipe, model):
    "Probabilities and labels of the test set, by the way of the run itself"
    train, test = load_images(recipe)
    learn = recipe_learner(recipe, train, test, class_counts(train), 'cpu')
    learn.model.load_state_dict(model.state_dict())
    with learn.no_bar(): return learn.get_preds(act=lambda x: x.softmax(1))


@pytest.mark.parametrize('method', ('ldam', 'ldam_drw'))
def test_a_model_with_a_classifier_of_its_method(tmp_path, method):
    recipe = Recipe(method=method, iters=4)
    run(recipe, tmp_path, device='cpu')
    net, about = load_model(tmp_path/recipe.key/'model.safetensors')
    assert type(net.fc) is CosineLinear and about['recipe']['method'] == method
    assert net(torch.randn(2, 1, 8, 8)).abs().max() <= 1 + 1e-6


@pytest.mark.parametrize('method', ('softmax', 'bs_sigmoid', 'ldam', 'posthoc', 'tau_norm', 'crt', 'balms'))
def test_every_score_of_the_row_comes_back_from_files(tmp_path, method):
    "Whatever the loss makes of logits, and whatever is done to them after training"
    stage2 = dict(iters2=20, views=1) if method in ('crt', 'balms') else {}
    recipe = Recipe(method=method, iters=60, **stage2)
    row = run(recipe, tmp_path, device='cpu')
    test = load_images(recipe)[1]
    learn = load_run(tmp_path/recipe.key, 'cpu')
    probs = photo_probabilities(learn, save_photos(tmp_path/'photos', test.images))
    scores = evaluate(probs.log(), test.targets, row['counts'])
    for name in SCORES: assert scores[name] == pytest.approx(row[name], abs=2e-3 if name == 'ece' else 2e-5), name
    assert own_shares(row).max() > .2 if method in ('softmax', 'ldam') else own_shares(row).max() < .11


@pytest.mark.parametrize('size', (12, 17))
def test_photos_of_a_folder(tmp_path, size):
    "JPEG, alpha, orientation, odd sizes, names with spaces and letters of other languages"
    root = photo_folder(tmp_path/'photos')
    recipe = Recipe(str(root), method='bs', model='resnet8', size=size, iters=6, bs=8, warmup=2)
    row = run(recipe, tmp_path/'runs', device='cpu')
    learn = load_run(tmp_path/'runs'/recipe.key, 'cpu')
    want, targs = runs_own(recipe, learn.model)
    probs = photo_probabilities(learn, find_photos([root/'test']), workers=2)
    torch.testing.assert_close(probs, want, rtol=0, atol=1e-5)
    assert evaluate(probs.log(), targs, row['counts'])['per_class'] == row['per_class']
    assert list(learn.dls.vocab) == ['blue cup', 'rød kopp', 'tasse à thé']


def test_photos_in_lists(tmp_path):
    tree = sample_tree(tmp_path/'digits', n_max=32, imbalance=16)
    recipe = Recipe(str(tree), method='bs', model='resnet8', size=24, bs=16, iters=10)
    row = run(recipe, tmp_path/'runs', device='cpu', workers=0)
    learn, test = load_run(tmp_path/'runs'/recipe.key, 'cpu'), load_images(recipe)[1]
    probs = photo_probabilities(learn, [test.root/f for f in test.files])
    torch.testing.assert_close(probs, runs_own(recipe, learn.model)[0], rtol=0, atol=1e-5)
    assert evaluate(probs.log(), test.targets, row['counts'])['per_class'] == row['per_class']


@pytest.mark.parametrize('method', ('posthoc', 'balms', 'ldam'))
def test_photos_of_a_frozen_run(tmp_path, method):
    "The whole network is in the file, and the report knows the test photos by name"
    root = photo_folder(tmp_path/'photos')
    save_model(tmp_path/'w.safetensors', get_model('resnet8', 5))
    recipe = PhotoRecipe(str(root), method=method, model='resnet8', weights=str(tmp_path/'w.safetensors'), size=32,
                         views=1, bs=8, lr=.01, iters=3)
    row = PhotoRuns(recipe, tmp_path/'runs', 'cpu', workers=0).run(recipe)
    folder, files = tmp_path/'runs'/recipe.key, find_photos([root/'test'])
    probs = photo_probabilities(load_run(folder, 'cpu'), files)
    targs = torch.arange(3).repeat_interleave(6)
    scores = evaluate(probs.log(), targs, row['counts'])
    for name in SCORES: assert scores[name] == pytest.approx(row[name], abs=2e-3 if name == 'ece' else 5e-5), name
    text = write_report(folder, device='cpu').read_text()
    assert text.count('<figure>') == (probs.argmax(1) != targs).sum() and ' ø.' in text
    (root/'train/blue cup/0 ø.jpg').unlink()
    with pytest.raises(ValueError, match='other images'): write_report(folder, device='cpu')


def test_photos_of_a_fine_tuned_run(tmp_path):
    root = photo_folder(tmp_path/'photos')
    recipe = PhotoRecipe(str(root), method='bs', model='resnet8', size=24, epochs=2, bs=8, warmup=1)
    recipe = recipe.with_steps(len(load_images(recipe)[0]))
    row = run(recipe, tmp_path/'runs', device='cpu', workers=0)
    folder, files = tmp_path/'runs'/recipe.key, find_photos([root/'test'])
    probs = photo_probabilities(load_run(folder, 'cpu'), files)
    scores = evaluate(probs.log(), torch.arange(3).repeat_interleave(6), row['counts'])
    for name in SCORES: assert scores[name] == pytest.approx(row[name], abs=2e-3 if name == 'ece' else 5e-5), name
    with open(write_report(folder, device='cpu').with_suffix('.csv'), newline='', encoding='utf-8') as f:
        recall = {r['class']: r['recall in %'] for r in csv.DictReader(f)}
    assert recall['rød kopp'] == f'{100*row["per_class"][1]:.1f}'


def test_a_learner_that_can_be_trained_on(tmp_path):
    "The loaders of one's own images take the place of the empty ones"
    recipe = Recipe(method='bs', iters=30)
    run(recipe, tmp_path, device='cpu')
    learn = load_run(tmp_path/recipe.key, 'cpu')
    train, test = load_images(recipe)
    own = recipe_learner(recipe, train, test, class_counts(train), 'cpu')
    assert torch.equal(own.loss_func.shift, learn.loss_func.shift)
    learn.dls = own.dls
    before = read_row(tmp_path/recipe.key)['nll']
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 1e-3)
        assert learn.validate()[1] > .5 and torch.isfinite(torch.tensor(before))


def test_shares_by_bayes():
    p, own, q = torch.rand(50, 4).softmax(1), torch.tensor([8., 4, 2, 1]), torch.tensor([1., 2, 3, 4])
    want = p.double()*q/own
    torch.testing.assert_close(for_shares(p, own, q), want/want.sum(1, keepdim=True), rtol=0, atol=1e-6)
    assert for_shares(torch.tensor([[1., 0.]]), [1, 1], [1, 1]).tolist() == [[1., 0.]]


# ---- export

def exported(tmp_path, **kw):
    "A run on photos, its folder, and what it says of its test photos"
    root = photo_folder(tmp_path/'photos')
    recipe = Recipe(str(root), **(dict(method='bs', model='resnet8', size=32, iters=4, bs=8, warmup=1) | kw))
    run(recipe, tmp_path/'runs', device='cpu')
    learn, files = load_run(tmp_path/'runs'/recipe.key, 'cpu'), find_photos([root/'test'])
    images = torch.stack([learn.dls.train_ds.prepare(f) for f in files])/255
    return tmp_path/'runs'/recipe.key, images, photo_probabilities(learn, files)


@pytest.mark.parametrize('kw', (dict(method='posthoc'), dict(method='bs_sigmoid'), dict(method='ldam'),
                                dict(model='timm/test_resnet')), ids=str)
def test_exports_agree(tmp_path, kw):
    "Photos in 0..1 go in, the probabilities of predictions come out, any number at a time"
    if 'model' in kw: pytest.importorskip('timm')
    folder, images, want = exported(tmp_path, **kw)
    file, about = export_run(folder, 'torchscript'), {'about.json': ''}
    loaded = torch.jit.load(file, _extra_files=about)
    assert json.loads(about['about.json'])['classes'] == ['blue cup', 'rød kopp', 'tasse à thé']
    for n in (1, 18): torch.testing.assert_close(loaded(images[:n]), want[:n], rtol=0, atol=1e-5)
    for name in ('onnx', 'onnxscript'): pytest.importorskip(name, reason=f'{name} writes ONNX')
    runtime = pytest.importorskip('onnxruntime', reason='onnxruntime reads ONNX')
    session = runtime.InferenceSession(export_run(folder, 'onnx', tmp_path/'mine.onnx'))
    assert json.loads(session.get_modelmeta().custom_metadata_map['size']) == [32, 32]
    for n in (1, 18):
        (got,) = session.run(None, dict(images=images[:n].numpy()))
        torch.testing.assert_close(torch.from_numpy(got), want[:n], rtol=0, atol=1e-5)


@pytest.mark.parametrize('name', ('timm/test_resnet', 'densenet121', 'mobilenet_v3_small'))
def test_exported_weights_are_those_of_the_library(tmp_path, name):
    "timm's or torchvision's own network loads them, nothing missing, and gives the same"
    if name.startswith('timm/'): timm = pytest.importorskip('timm')
    folder, images, want = exported(tmp_path, model=name, method='posthoc', iters=2)
    file = export_run(folder, 'safetensors')
    with safe_open(file, 'pt') as f: about = {k: json.loads(v) for k, v in f.metadata().items() if k != 'format'}
    make = timm.create_model if name.startswith('timm/') else torchvision.models.get_model
    net = make(name.removeprefix('timm/'), num_classes=3)
    net.load_state_dict(load_file(file))
    mean, std = (torch.tensor(about[k]).view(-1, 1, 1) for k in ('mean', 'std'))
    torch.testing.assert_close(net.eval()((images - mean)/std).softmax(1), want, rtol=0, atol=1e-5)


def test_export_refuses(tmp_path, monkeypatch):
    recipe = Recipe(method='ldam', iters=2)
    run(recipe, tmp_path, device='cpu')
    with pytest.raises(ValueError, match='CosineLinear'): export_run(tmp_path/recipe.key, 'safetensors')
    monkeypatch.setattr('balms.export.find_spec', lambda name: None)
    with pytest.raises(ImportError, match=r'balms\[export\]'): export_run(tmp_path/recipe.key, 'onnx')
    assert not [*(tmp_path/recipe.key).glob('model.*.safetensors'), *(tmp_path/recipe.key).glob('*.onnx')]


# ---- the report

class Page(HTMLParser):
    "Texts of cells by row, pictures, what is loaded from elsewhere"
    def __init__(self, text):
        super().__init__()
        self.rows, self.pictures, self.outside, self.stack = [], [], [], []
        self.feed(text)
        assert not self.stack, self.stack
    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == 'tr': self.rows.append([])
        if tag in ('td', 'th'): self.rows[-1].append('')
        if tag == 'img': self.pictures.append(attrs)
        self.outside += [v for k, v in attrs.items() if k in ('src', 'href') and not v.startswith('data:image/')]
        if tag not in ('meta', 'img', 'br', 'html'): self.stack.append(tag)
    def handle_endtag(self, tag): assert tag == 'html' or self.stack.pop() == tag
    def handle_data(self, data):
        if self.stack and self.stack[-1] in ('td', 'th'): self.rows[-1][-1] += data


def test_report(tmp_path):
    "Names as they are, also odd ones; numbers by the definition; everything inside the one file"
    root = photo_folder(tmp_path/'photos')
    for split in ('train', 'test'): (root/split/'rød kopp').rename(root/split/'<b>&"kopp')
    shared = dict(model='resnet8', size=32, iters=12, bs=8, warmup=2)
    for method in ('softmax', 'bs'):
        recipe = Recipe(str(root), method=method, **shared)
        row = run(recipe, tmp_path/'runs', device='cpu')
    folder = tmp_path/'runs'/recipe.key
    path = write_report(folder, device='cpu')
    page = Page(path.read_text(encoding='utf-8'))
    probs, targs = runs_own(recipe, load_run(folder, 'cpu').model)
    predicted = probs.argmax(1)
    names = ['<b>&"kopp', 'blue cup', 'tasse à thé']
    want = {}
    for j, name in enumerate(names):
        hit, given = ((predicted == j) & (targs == j)).sum().item(), (predicted == j).sum().item()
        recall, precision = f'{100*hit/6:.1f}', f'{100*hit/given:.1f}' if given else ''
        want[name] = [name, str(row['counts'][j]), '6', recall, precision]
        assert recall == f'{100*row["per_class"][j]:.1f}'
    found = {r[0]: r[:5] for r in page.rows if r and r[0] in names}
    assert found == want and [r[0] for r in page.rows if r and r[0] in names][0] == 'blue cup'      # the common one
    wrong = (predicted != targs).sum().item()
    assert len(page.pictures) == 3 + wrong and all(p['alt'] for p in page.pictures) and not page.outside
    assert any('Softmax' in r[0] and len(r) == 6 for r in page.rows)                                # the methods
    with open(path.with_suffix('.csv'), newline='', encoding='utf-8') as f: table = list(csv.reader(f))
    assert {r[0]: r[:5] for r in table[1:]} == want
    first = page.pictures[0]['src'].partition(',')[2]
    assert Image.open(io.BytesIO(base64.b64decode(first))).size[0] > 300


def test_report_of_lists_and_of_other_images(tmp_path):
    tree = sample_tree(tmp_path/'digits', n_max=32, imbalance=16)
    recipe = Recipe(str(tree), method='bs', model='resnet8', size=24, bs=16, iters=4)
    run(recipe, tmp_path/'runs', device='cpu', workers=0)
    folder = tmp_path/'runs'/recipe.key
    text = write_report(folder, tmp_path/'mail.html', 5, device='cpu').read_text()
    assert text.count('<figure>') == 5 and '.jpg' in text and (tmp_path/'mail.csv').exists()
    lines = (tree/'digits_train.txt').read_text().splitlines()
    (tree/'digits_train.txt').write_text('\n'.join(lines[:-1]))
    with pytest.raises(ValueError, match='other images'): write_report(folder, device='cpu')


def test_differences_are_paired():
    "A seed that is good for both methods does not count as a difference"
    def row(method, seed, overall, few=1., **changed):
        recipe = dict(data='d', method=method, seed=seed)
        return dict(recipe=recipe, changed=changed, train_crc=1, overall=overall, few=few)
    a = [row('softmax', s, v) for s, v in enumerate((50., 60, 70))]
    b = [row('bs', s, v, None) for s, v in enumerate((52., 63, 71))]
    (table,) = difference_rows(a + b).values()
    assert table[1]['overall − Softmax'] == '+2.0 ± 0.6' and table[1]['overall'] == '62.0 ± 5.5'
    assert table[0]['overall − Softmax'] == '' == table[1]['few − Softmax']
    assert difference_rows(a[:1] + b[:1])['d'][1]['overall − Softmax'] == '+2.0'
    assert len(difference_rows(a + [dict(r, train_crc=2) for r in b])) == 2            # of other images
    quarter = [row('bs_quarter', s, 50.) for s in range(3)]
    changed = [dict(r, changed=dict(lr=.2)) for r in b]
    (table,) = difference_rows(quarter + changed + b, 'bs').values()                   # not of the nearest name
    assert 'overall − Balanced Softmax' in table[0]


# ---- the commands

@pytest.fixture
def digits_run(tmp_path, monkeypatch):
    "A finished run below the folder that one is in, and photos"
    monkeypatch.chdir(tmp_path)
    recipe = Recipe(method='softmax', iters=100)
    run(recipe, 'runs', device='cpu')
    test = load_images(recipe)[1]
    save_photos(tmp_path/'photos/a b', test.images[::25])
    (tmp_path/'photos/._0000.png').write_text('no photo')
    (tmp_path/'photos/notes.txt').write_text('no photo')
    return f'runs/{recipe.key}', test.targets[::25]


def command(name, *args):
    code = f'from balms.run_commands import {name}; {name}()'
    env = dict(os.environ, PYTHONPATH=str(Path(__file__).resolve().parent.parent), OMP_NUM_THREADS='1')
    return subprocess.run([sys.executable, '-c', code, *args], capture_output=True, text=True, timeout=300, env=env)


def test_predict_command(digits_run):
    "A table with a line a photo; another prior changes it; nothing but that is said"
    folder, targs = digits_run
    out = command('balms_predict', folder, 'photos', '--out', 'p.csv', '--device', 'cpu')
    assert out.returncode == 0 and not out.stderr and out.stdout == '20 photos: p.csv\n', out
    with open('p.csv', newline='') as f: rows = list(csv.DictReader(f))
    assert rows[3]['file'] == 'photos/a b/0003.png' and len(rows) == 20
    assert all(float(r['probability']) >= float(r['its probability']) and r['class'] != r['runner-up'] for r in rows)
    balms_predict([folder, 'photos', '--out', 'q.csv', '--prior', ','.join(f'{j}={10**(j > 6)}' for j in range(10))])
    with open('q.csv', newline='') as f: other = list(csv.DictReader(f))
    rare = lambda rows: sum(int(r['class']) > 6 for r in rows)
    assert rare(other) > rare(rows) and abs(rare(other) - (targs > 6).sum()) < abs(rare(rows) - (targs > 6).sum())


def test_what_cannot_be_predicted(digits_run, capsys):
    "Each fault is a line with its name, and status 2"
    folder, _ = digits_run
    Path('photos/torn.jpg').write_bytes(b'\xff\xd8\xff torn')
    Path('photos/empty.png').write_bytes(b'')
    Path('none').mkdir()
    for args, words in (([folder, 'photos'], ('torn.jpg', 'empty.png')), ([folder, 'none'], ('none',)),
                        ([folder, 'nowhere'], ('nowhere',)), (['runs', 'photos'], (folder,)),
                        (['none', 'photos'], ('row.json',)),
                        ([folder, 'photos', '--skip-bad', '--prior', '1=1'], ('without 0',)),
                        ([folder, 'photos', '--device', 'tpu9'], ('tpu9',))):
        with pytest.raises(SystemExit) as e: balms_predict(args)
        err = capsys.readouterr().err
        assert e.value.code == 2 and all(w in err for w in words), (args, err)
    balms_predict([folder, 'photos', '--skip-bad', '--estimate-prior', '--device', 'cpu'])
    out = capsys.readouterr().out
    assert out.count('left out') == 2 and 'estimated class shares' in out and '20 photos' in out


def test_export_and_report_commands(digits_run, capsys):
    folder, _ = digits_run
    balms_export([folder, '--format', 'torchscript', '--out', 'm.pt'])
    balms_report([folder, '--device', 'cpu', '--out', 'r.html'])
    balms_report(['runs'])
    out = capsys.readouterr().out
    assert Path('m.pt').exists() and Path('r.csv').exists() and 'r.html and r.csv' in out and 'Softmax' in out
    for name in ('balms_predict', 'balms_export', 'balms_report'):
        with pytest.raises(SystemExit) as e: globals()[name](['--help'])
        assert e.value.code == 0
