"""Weights set to zero before they are quantized, the smallest of each row first."""

from typing import Final

import torch

TWO_OF_FOUR: Final = "2:4"


def prune(rows: torch.Tensor, sparsity: str) -> torch.Tensor:
    """Rows with the smallest weights zero: that share of each, or two of every four columns."""
    if sparsity == TWO_OF_FOUR:
        quads = rows.reshape(rows.shape[0], -1, 4)
        small = quads.abs().argsort(dim=-1, stable=True)[..., :2]
        return quads.scatter(-1, small, 0).view_as(rows)
    count = round(float(sparsity) * rows.shape[1])
    small = rows.abs().argsort(dim=-1, stable=True)[:, :count]
    return rows.scatter(-1, small, 0)
