"Packs: what other programs read, processes, and files that are damaged or cannot be packed."
import io, pickle, shutil, signal, subprocess, sys, time
import pytest, torch
from PIL import Image
from balms.list_loader import ImageListDataset, load_lists
from balms.lists import read_list, sample_tree
from balms.packs import PackedDataset, pack_images


@pytest.fixture(scope='module')
def tree(tmp_path_factory): return sample_tree(tmp_path_factory.mktemp('lists')/'digits')


@pytest.mark.parametrize('program', ['unzip', sys.executable])
def test_other_programs_unpack_it(tree, tmp_path, program):
    "What they give is a tree of the same form"
    if not shutil.which(program): pytest.skip(f'there is no {program}')
    pack = pack_images(load_lists(tree)[0], tmp_path/'train.zip', short=32, num_workers=2)
    out = tmp_path/'out'
    options = ['-q', pack.path, '-d', out] if program == 'unzip' else ['-m', 'zipfile', '-e', pack.path, out]
    subprocess.run([program, *options], check=True)
    images = ImageListDataset(read_list(out/'digits_train.txt'), out)
    assert len(images) == len(pack) and torch.equal(images.targets, pack.targets)
    assert all(torch.equal(images.image(i), pack.image(i)) for i in range(0, len(pack), 20))


def test_a_pack_in_another_process(tree, tmp_path):
    "One that was read from can be sent there: the open file stays here"
    pack = pack_images(load_lists(tree)[1], tmp_path/'t.zip', short=32, num_workers=0)
    x = pack[3][0]
    again = pickle.loads(pickle.dumps(pack))
    assert torch.equal(again[3][0], x) and torch.equal(pack.subset([3])[0][0], x)


def test_a_pack_is_the_one_of_its_list(tree, tmp_path):
    pack = pack_images(load_lists(tree)[0], tmp_path/'t.zip', short=32, num_workers=0)
    lst = read_list(tree/'digits_train.txt')
    PackedDataset(pack.path, of=lst)
    lst.targets[5] = 9
    with pytest.raises(ValueError, match='t.zip .*digits_train.txt:6'): PackedDataset(pack.path, of=lst)
    with pytest.raises(ValueError, match='t.zip .*200'): PackedDataset(pack.path, of=read_list(tree/'digits_test.txt'))


def test_ctrl_c_leaves_the_old_pack(tree, tmp_path):
    "And nothing beside it"
    before = pack_images(load_lists(tree)[1], tmp_path/'p.zip', short=32, num_workers=0).path.read_bytes()
    code = f'''
import time
from balms.list_loader import load_lists
from balms.packs import pack_images
train, _ = load_lists({str(tree)!r})
read = train.read
def slow(i):
    print('one', flush=True)
    time.sleep(.05)
    return read(i)
train.read = slow
pack_images(train, {str(tmp_path/"p.zip")!r}, short=32, num_workers=0)'''
    p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    p.stdout.readline()
    time.sleep(.2)
    p.send_signal(signal.SIGINT)
    p.wait()
    assert p.returncode and [f.name for f in tmp_path.iterdir()] == ['p.zip']
    assert (tmp_path/'p.zip').read_bytes() == before


def test_an_image_that_cannot_be_packed_is_named(tmp_path):
    "JPEG has at most 65,535 pixels a side; no pack is left"
    Image.new('RGB', (70_000, 34)).save(tmp_path/'wide.png')
    (tmp_path/'a_test.txt').write_text('wide.png 0\n')
    ds = ImageListDataset(read_list(tmp_path/'a_test.txt'), tmp_path)
    with pytest.raises((OSError, ValueError), match='a_test.txt:1: .*wide.png'):
        pack_images(ds, tmp_path/'a.zip', short=32, num_workers=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a_test.txt', 'wide.png']
    assert pack_images(ds, tmp_path/'b.zip', short=32, quality=None, num_workers=0).image(0).shape[1] == 32


def test_a_damaged_image_in_a_pack_is_named(tmp_path):
    "One whose checksum is right, and one whose checksum is not"
    file = io.BytesIO()
    Image.new('RGB', (40, 40)).save(file, 'png')
    (tmp_path/'x.png').write_bytes(file.getvalue())
    pack = pack_images(ImageListDataset(['x.png'], tmp_path), tmp_path/'a.zip', short=64, num_workers=0)
    data = bytearray(pack.path.read_bytes())
    data[data.index(file.getvalue()) + 50] ^= 1
    (tmp_path/'b.zip').write_bytes(data)
    with pytest.raises(ValueError, match='b.zip: x.png'): PackedDataset(tmp_path/'b.zip')[0]
    pack.read = lambda i: b'nothing'
    with pytest.raises(ValueError, match='a.zip: x.png'): pack.image(0)
