"Lists: the published ones where they are at hand, the command, and what is said of files that are wrong."
import gzip, json, os, re, shutil, subprocess, sys
from pathlib import Path
import numpy as np, pytest
from balms.lists import (LIST_FACTS, ListReport, check_lists, count_shots, find_lists, read_list, sample_tree,
                         summarize_problems)

LISTS = Path(os.environ.get('BALMS_LISTS', ''))
published = pytest.mark.skipif(not os.environ.get('BALMS_LISTS'),
                               reason='the published lists are not at hand: BALMS_LISTS names no folder')


@pytest.fixture(scope='module')
def tree(tmp_path_factory): return sample_tree(tmp_path_factory.mktemp('lists')/'digits')


@published
def test_places_lt():
    "All three lists, exactly as published"
    r = check_lists('places_lt', lists=LISTS)
    assert r.ok, str(r)
    train = 'train: 62,500 images, 365 classes of 4,980..5, imbalance 996, many/medium/few 131/163/71'
    for line in (train, 'val: 7,300 images, 365 classes of 20..20', 'test: 36,500 images, 365 classes of 100..100'):
        assert line in str(r)
    lst = read_list(find_lists(LISTS, 'places_lt')['train'], 365)
    assert np.bincount(lst.targets).tolist() == json.loads((LISTS/'places_lt_cls_num_list.json').read_text())


@published
def test_imagenet_lt():
    "Without its training list, which the check says; the counts are those of the facts"
    r = check_lists('imagenet_lt', lists=LISTS)
    assert r.ok and 'train: no list' in str(r)
    assert 'test: 50,000 images, 1,000 classes of 50..50' in str(r)
    assert 'val: 20,000 images, 1,000 classes of 20..20' in str(r)
    n, f = json.loads((LISTS/'imagenet_lt_cls_num_list.json').read_text()), LIST_FACTS['imagenet_lt']
    assert (len(n), sum(n), max(n), min(n)) == (f.classes, f.train, f.largest, f.smallest)
    assert count_shots(n) == f.shots


CHANGES = {
    'one less': (lambda ls: ls[:-1], ['images: 62499, but 62500']),
    'one twice': (lambda ls: ls + [ls[0]], [':62501: the image of line 1 again']),
    'label': (lambda ls: ls[:5] + [ls[5].rsplit(' ', 1)[0] + ' 365'] + ls[6:],
              [':6: the label 365 is out of range 0..364']),
    'class': (lambda ls: [l for l in ls if not l.endswith(' 17')], ['no images of classes [17]', 'smallest: 0, but 5']),
    'windows': (lambda ls: ls[:9] + [ls[9].replace('/', '\\')] + ls[10:], [':10: a Windows path']),
}


@published
@pytest.mark.parametrize('name', CHANGES)
def test_a_changed_list_is_found(tmp_path, name):
    change, what = CHANGES[name]
    paths = find_lists(LISTS, 'places_lt')
    lines = gzip.decompress(paths['train'].read_bytes()).decode().splitlines()
    (tmp_path/'train.txt').write_text('\n'.join(change(lines)) + '\n')
    r = check_lists('places_lt', lists={**paths, 'train': tmp_path/'train.txt'})
    assert not r.ok and all(any(w in p for p in r.problems) for w in what), str(r)


@pytest.fixture
def command(tmp_path):
    "Runs `balms_check` as its installed script does"
    script = tmp_path/'balms_check'
    script.write_text('import sys\nfrom balms.lists import balms_check\nsys.exit(balms_check())\n')
    def run(*args):
        return subprocess.run([sys.executable, script, *map(str, args)], capture_output=True, text=True)
    return run


def test_command(tree, tmp_path, command):
    r = command('own', '--root', tree)
    assert r.returncode == 0 and 'images: 442 decoded' in r.stdout, r.stderr
    assert 'looked for, not decoded' in command('own', '--root', tree, '--no-decode').stdout
    (tmp_path/'my_train.txt').write_text((tree/'digits_train.txt').read_text() + 'train/none.jpg 0\n../x.jpg 1\n')
    r = command('own', '--root', tree, '--lists', tmp_path)
    assert r.returncode == 1
    assert 'my_train.txt:193: no file' in r.stdout and "my_train.txt:194: the path '../x.jpg'" in r.stdout
    assert 'test: no list' in r.stdout
    for args in (['own'], ['imagenet', '--root', tree], ['own', '--root', tmp_path/'no']):
        r = command(*args)
        assert r.returncode == 2 and 'balms_check: error: ' in r.stderr and 'Traceback' not in r.stderr


def test_help_does_not_wait_for_torch():
    code = 'import sys, balms.lists; print("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout == 'False\n'


def test_a_report_is_short():
    "However much is wrong"
    problems = [f'a.txt:{i}: no file' for i in range(10_000)]
    report = str(ListReport('x', ['a line'], problems))
    assert report.startswith('a line\n10,000 problems:\na.txt:0: no file') and len(report.splitlines()) < 30
    assert summarize_problems(problems[:2]) == 'a.txt:0: no file\na.txt:1: no file'
    assert summarize_problems(problems[:21]).endswith('... and 1 more')


def third_line(new):
    "A change of the third line of the training list"
    def change(tree):
        path = tree/'digits_train.txt'
        lines = path.read_text().splitlines()
        lines[2] = new(lines)
        path.write_text('\n'.join(lines) + '\n')
    return change


def image(change):
    "A change of the image in the third line"
    return lambda tree: change(tree/(tree/'digits_train.txt').read_text().splitlines()[2].split()[0])


def without_class_9(tree):
    path = tree/'digits_train.txt'
    path.write_text('\n'.join(l for l in path.read_text().splitlines() if not l.endswith(' 9')) + '\n')


BAD = {                                                        # what is wrong, and what the check says of it
    'missing': (image(Path.unlink), 'digits_train.txt:3: no file {t}/train/digit0/0002.jpg'),
    'truncated': (image(lambda f: f.write_bytes(f.read_bytes()[:-200])), 'digits_train.txt:3: .*{t}/train/digit0/0002'),
    'empty': (image(lambda f: f.write_bytes(b'')), 'digits_train.txt:3: .*{t}/train/digit0/0002'),
    'folder': (image(lambda f: (f.unlink(), f.mkdir())), 'digits_train.txt:3: no file {t}/train/digit0/0002.jpg'),
    'no label': (third_line(lambda ls: ls[2].split()[0]), 'digits_train.txt:3: one word'),
    'no number': (third_line(lambda ls: ls[2] + '.5'), "digits_train.txt:3: the label '0.5'"),
    'windows': (third_line(lambda ls: ls[2].replace('/', '\\')), 'digits_train.txt:3: a Windows path'),
    'twice': (third_line(lambda ls: ls[0]), 'digits_train.txt:3: the image of line 1 again'),
    'two labels': (third_line(lambda ls: ls[0][:-1] + '1'), 'digits_train.txt:3: .*, there with label 0'),
    'below 0': (third_line(lambda ls: ls[2][:-1] + '-1'), 'digits_train.txt:3: the label -1'),
    'beyond': (third_line(lambda ls: ls[2][:-1] + '12'), r'digits_train.txt: no images of classes \[10, 11\]'),
    'class in test only': (without_class_9, 'digits_test.txt:181: class 9, of which training has no images'),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_named_by_file_and_line(tmp_path, tree, name):
    change, what = BAD[name]
    t = Path(shutil.copytree(tree, tmp_path/'t'))
    change(t)
    problems = check_lists(None, t).problems
    pattern = re.compile(what.format(t=t))
    assert any(pattern.search(p) for p in problems), problems
