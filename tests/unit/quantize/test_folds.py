"""Factors of features: where they may go, and what they are worth."""

import torch
from torch import nn

from llmos_cli.quantize import folds, grid
from llmos_cli.quantize.folds import Fold, Inputs


class Block(nn.Module):
    """Two norms: only what the first gives is read by linear layers alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(32), nn.LayerNorm(32)
        self.up, self.gate, self.down = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)
        self.head = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        y = self.second(x + self.down(self.up(y) * torch.sigmoid(self.gate(y))))
        return self.head(y) + y


def test_a_norm_is_folded_only_if_the_block_computes_the_same() -> None:
    torch.manual_seed(0)
    block, x = Block().eval(), torch.randn(4, 32)
    before = {name: value.clone() for name, value in block.state_dict().items()}
    with torch.no_grad():
        found = folds.find_folds(block, lambda: block(x), ["up", "gate", "down", "head"])
        assert folds.find_folds(block, lambda: block(x), ["up", "down"]) == [], "the gate would see other inputs"
    assert found == [Fold("first", ("up", "gate"))]
    assert all(torch.equal(before[name], value) for name, value in block.state_dict().items())


def inputs(x: torch.Tensor) -> Inputs:
    return Inputs(x.T @ x / len(x), x.abs().amax(0), x[: folds.SAMPLE])


def test_awq_saves_what_large_features_would_lose() -> None:
    torch.manual_seed(1)
    weight, x = torch.randn(64, 128) * 0.02, torch.randn(512, 128)
    x[:, 5::32] *= 40
    factor = folds.awq_factor({"up": weight}, inputs(x), 32, torch.bfloat16)
    assert factor is not None
    importance = x.square().mean(0)
    plain = grid.dequantize(grid.search(weight, 32, torch.bfloat16), 32)
    scaled = grid.dequantize(grid.search(weight * factor, 32, torch.bfloat16, importance / factor**2), 32) / factor
    lost = [float((x @ (made - weight).T).square().mean()) for made in (plain, scaled)]
    assert lost[1] < 0.5 * lost[0]


def test_what_loses_nothing_gets_no_factor() -> None:
    torch.manual_seed(2)
    weight, x = torch.randn(64, 128).sign() * 0.02, torch.randn(512, 128).sign()
    assert folds.smooth_factor({"up": weight}, inputs(x)) is None


def test_norms_are_divided_without_loss() -> None:
    torch.manual_seed(3)
    norm, wanted = torch.rand(256).bfloat16().float(), torch.rand(256) * 10 + 0.1
    norm[7] = 0
    factor = folds.exact(wanted, norm, torch.bfloat16)
    divided = norm / factor
    assert torch.allclose(divided.bfloat16().float(), divided, rtol=1e-6)
    assert factor[7] == 1
    assert torch.allclose(factor[norm != 0], wanted[norm != 0], rtol=0.01)
