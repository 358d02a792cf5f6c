"A finished run is used: its model, predictions of new photos, export, the report."
import pytest, torch
from balms.baselines import CosineLinear
from balms.recipe import Recipe
from balms.runs import run
from balms.weights import load_model


@pytest.mark.parametrize('method', ('ldam', 'ldam_drw'))
def test_a_model_with_a_classifier_of_its_method(tmp_path, method):
    recipe = Recipe(method=method, iters=4)
    run(recipe, tmp_path, device='cpu')
    net, about = load_model(tmp_path/recipe.key/'model.safetensors')
    assert type(net.fc) is CosineLinear and about['recipe']['method'] == method
    assert net(torch.randn(2, 1, 8, 8)).abs().max() <= 1 + 1e-6
