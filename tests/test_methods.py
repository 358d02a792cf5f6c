"Every method of the tables on long-tailed digits: it trains, evaluates, and is better than chance."
from balms.methods import METHODS
from balms.recipe import METHOD_GROUPS, Recipe
from balms.runs import run


def test_every_method_learns_digits(tmp_path):
    "From shared stage-1 models, shortened; chance is 10 %"
    scores = {}
    for name, method in METHODS.items():
        stage2 = dict(iters2=60, views=1) if method.two_stages else {}
        scores[name] = run(Recipe(method=name, iters=150, **stage2), tmp_path, device='cpu')['overall']
    assert not {m: v for m, v in scores.items() if v < 30}
    assert len([*tmp_path.glob('*/model.safetensors')]) == len(METHODS)      # stage-1 models are shared


def test_the_help_of_the_command_line_has_every_method():
    assert [m for group in METHOD_GROUPS.values() for m in group] == list(METHODS)
