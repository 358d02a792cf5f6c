"Networks of other libraries by name, with weights of a hub that needs no network here."
import pytest, torch
from torch import nn
from balms.models import body_fc, classifier_input, find_classifier, get_model, load_weights, split_classifier


@pytest.mark.parametrize('name', ['resnet18', 'densenet121', 'vit_b_32', 'swin_t', 'googlenet', 'efficientnet_b0', 'regnet_y_400mf'])
def test_torchvision(name):
    net = get_model(name, 5)
    x = torch.randn(2, 3, 224, 224)
    assert net.train()(x).shape == (2, 5) and find_classifier(net) is net.fc
    net.eval()
    assert torch.equal(net.fc(net.body(x)), net(x)) and torch.equal(classifier_input(net, x), net.body(x))
    assert len({id(p) for g in body_fc(net) for p in g}) == len(list(net.parameters()))


@pytest.mark.parametrize('name', ['convnextv2_atto', 'timm/resnet18', 'vit_tiny_patch16_224', 'mobilenetv3_small_050', 'swin_tiny_patch4_window7_224'])
def test_timm(name):
    pytest.importorskip('timm')
    net = get_model(name, 5).eval()
    x = torch.randn(2, 3, 224, 224)
    assert net(x).shape == (2, 5) and torch.equal(net.fc(net.body(x)), net(x))


def test_timm_refused():
    pytest.importorskip('timm')
    with pytest.raises(ValueError, match='cannot be split'): get_model('deit_tiny_distilled_patch16_224', 5)
    assert get_model('timm/resnet18', 5, in_channels=1)(torch.randn(2, 1, 64, 64)).shape == (2, 5)
    with pytest.raises(ValueError, match="Near: .*convnextv2_atto"): get_model('convnextv2_ato', 5)
    with pytest.raises(ValueError, match='choose from DEFAULT'): get_model('convnextv2_atto', 5, weights='IMAGENET1K_V1')


def test_without_timm(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, 'timm', None)
    with pytest.raises(ValueError, match='timm, which has more, is not installed'): get_model('convnextv2_atto', 5)
    assert get_model('resnet18', 5).fc.out_features == 5


def test_published_weights_from_the_hub(tmp_path, monkeypatch):
    "What torchvision's hub has in its folder is loaded, and the classifier is new"
    from torchvision.models import ResNet18_Weights, resnet18
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    theirs = resnet18().eval()
    f = tmp_path/'hub/checkpoints'/ResNet18_Weights.IMAGENET1K_V1.url.rsplit('/', 1)[1]
    f.parent.mkdir(parents=True); torch.save(theirs.state_dict(), f)
    net = get_model('resnet18', 1000, weights='IMAGENET1K_V1').eval()
    assert torch.equal(net.body.conv1.weight, theirs.conv1.weight) and not torch.equal(net.fc.weight, theirs.fc.weight)
    assert torch.equal(get_model('resnet18', 7, weights=f).body.conv1.weight, theirs.conv1.weight)                    # the same from a file
    with pytest.raises(ValueError, match=f'{f.name} has the weights of another network'): get_model('resnet34', 7, weights=f)


def test_a_refused_file_changes_nothing(tmp_path):
    from torchvision.models import resnet18
    net = get_model('resnet10', 5)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    torch.save(resnet18().state_dict(), tmp_path/'w.pth')
    with pytest.raises(ValueError): load_weights(net, tmp_path/'w.pth')
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_refused_network_is_left_as_it_was():
    class Scaled(nn.Module):
        def __init__(self): super().__init__(); self.fc = nn.Linear(12, 3)
        def forward(self, x): return 2*self.fc(x.flatten(1))
    net = Scaled()
    with pytest.raises(ValueError, match='cannot be split'): split_classifier(net, 2)
    assert isinstance(net.fc, nn.Linear)
