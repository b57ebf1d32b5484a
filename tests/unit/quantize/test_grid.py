"""What rounding to four bits promises: values on the grid, and each finer way loses less than the one before."""

import pytest
import torch

from llmos_cli.quantize import grid

GROUP = 32


def weights(rows: int = 48, columns: int = 256) -> torch.Tensor:
    torch.manual_seed(0)
    weight = torch.randn(rows, columns) * 0.02
    weight[3, 7], weight[5, :] = 0.4, 0.0  # an outlier, a row of zeros
    return weight


def inputs(columns: int = 256) -> torch.Tensor:
    """Inputs of a layer whose features depend on one another and differ in size, as they do in real layers."""
    torch.manual_seed(1)
    mixing = torch.randn(columns, columns) / columns**0.5
    return torch.randn(2048, columns) * torch.logspace(-1.5, 0.5, columns) @ mixing


def loss(made: grid.Grid, weight: torch.Tensor, x: torch.Tensor) -> float:
    return float((x @ (grid.dequantize(made, GROUP) - weight).T).square().mean())


def test_values_lie_on_the_grid_and_near_the_weights() -> None:
    weight = weights()
    for make in (grid.rtn, grid.search, grid.hqq):
        made = make(weight, GROUP, torch.bfloat16)
        assert made.values.dtype == torch.int8
        assert made.values.min() >= grid.LOW
        assert made.values.max() <= grid.HIGH
        assert made.scale.dtype == torch.bfloat16
        step = made.scale.float().abs().repeat_interleave(GROUP, 1)
        assert bool(((grid.dequantize(made, GROUP) - weight).abs() <= step * 4).all())
        assert not grid.dequantize(made, GROUP)[5].any()


def test_each_way_loses_less_than_the_one_before() -> None:
    weight, x = weights(), inputs()
    hessian = x.T @ x / len(x)
    losses = [
        loss(grid.rtn(weight, GROUP, torch.bfloat16), weight, x),
        loss(grid.search(weight, GROUP, torch.bfloat16, hessian.diagonal()), weight, x),
        loss(grid.gptq(weight, GROUP, torch.bfloat16, hessian), weight, x),
    ]
    assert losses[1] < 0.9 * losses[0]
    assert losses[2] < 0.6 * losses[1]


def test_hqq_misses_most_weights_by_less_than_the_least_squares() -> None:
    torch.manual_seed(3)
    weight = torch.distributions.StudentT(2.0).sample((48, 256)) * 0.02
    near, least = (
        (grid.dequantize(make(weight, GROUP, torch.bfloat16), GROUP) - weight).abs() for make in (grid.hqq, grid.search)
    )
    assert near.pow(0.7).mean() < 0.99 * least.pow(0.7).mean()


def test_what_is_on_the_grid_already_stays() -> None:
    torch.manual_seed(2)
    values = torch.randint(grid.LOW, grid.HIGH + 1, (8, 64), dtype=torch.int8)
    values[:, ::GROUP] = grid.LOW  # every group spans the grid
    scale = torch.full((8, 2), 0.125)
    weight = grid.dequantize(grid.Grid(values, scale), GROUP)
    again = grid.search(weight, GROUP, torch.float32)
    assert torch.allclose(grid.dequantize(again, GROUP), weight, atol=1e-6)


@pytest.mark.parametrize("dead", [slice(0, 32), slice(40, 41)])
def test_inputs_that_are_never_seen_do_no_harm(dead: slice) -> None:
    weight, x = weights(), inputs()
    x[:, dead] = 0
    made = grid.gptq(weight, GROUP, torch.bfloat16, x.T @ x / len(x))
    assert bool(torch.isfinite(made.scale.float()).all())
    assert loss(made, weight, x) < loss(grid.rtn(weight, GROUP, torch.bfloat16), weight, x)


def test_the_same_inputs_give_the_same_values() -> None:
    weight, x = weights(), inputs()
    first, second = (grid.gptq(weight, GROUP, torch.bfloat16, x.T @ x) for _ in range(2))
    assert torch.equal(first.values, second.values)
    assert torch.equal(first.scale, second.scale)
