import itertools

import pytest
import torch

from llmos_cli.train.optimizer import build_optimizer, learning_rate


def rates(steps: int, warmup: int) -> list[float]:
    return [learning_rate(step, steps=steps, warmup=warmup, peak=1.0) for step in range(steps)]


def test_warms_up_to_the_peak_then_falls_to_a_tenth() -> None:
    curve = rates(100, 10)
    assert curve[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert max(curve) == 1.0
    assert curve[10] == 1.0
    assert curve[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(curve[10:]))


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (2, 1), (2, 2), (5, 5), (3, 0)])
def test_short_runs_have_a_rate_at_every_step(steps: int, warmup: int) -> None:
    assert all(0.1 <= rate <= 1.0 for rate in rates(steps, warmup))


def test_only_matrices_decay() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    model[0].weight.requires_grad_(True)
    optimizer = build_optimizer(model, lr=1e-3, weight_decay=0.1)
    decay = {tuple(p.shape): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {(4, 4): 0.1, (4,): 0.0}
