"Every method of the tables on long-tailed digits: it trains, evaluates, and is better than chance"
import pytest
from balms.recipes import METHODS, Recipe, run


def test_every_method_learns_digits(tmp_path):
    "Three seeds each, from shared stage-1 models, shortened; chance is 10 %"
    scores = {}
    for name, m in METHODS.items():
        second = dict(iters2=60, views=1) if m.two_stages else {}
        scores[name] = [run(Recipe('digits', method=name, seed=s, iters=150, **second), tmp_path, device='cpu')['overall'] for s in range(3)]
    assert not {m: v for m, v in scores.items() if min(v) < 30}
    stage1 = {r.name.rsplit('-', 2)[0] for r in tmp_path.iterdir() if r.is_dir()}
    assert len(stage1) == sum(bool(m.loss) for m in METHODS.values())               # nothing is trained twice
