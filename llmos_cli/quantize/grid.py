"""Weights onto a grid of four bits: which scale a group takes, and which values. Arithmetic on tensors only.

A group of columns of a row has one scale; a weight becomes the nearest of scale * (-8 ... 7). `search` chooses the
scales that lose least, `gptq` also makes up for the error of each column in those that are still to come, as far as the
inputs of the layer let it (GPTQ, arXiv:2210.17323; with columns taken by importance and the scales fixed before).
"""

from dataclasses import dataclass
from typing import Final

import torch

LOW: Final = -8
HIGH: Final = 7
_SHRINKS: Final = tuple(1 - step / 40 for step in range(17))  # of the scale that spans a group
_BLOCK: Final = 128
_DAMP: Final = 0.01


@dataclass(frozen=True)
class Grid:
    """`values` int8 [rows, columns], `scale` [rows, columns / group] in the dtype it is stored in."""

    values: torch.Tensor
    scale: torch.Tensor


def rtn(weight: torch.Tensor, group: int, dtype: torch.dtype) -> Grid:
    """Round to nearest: the scale spans the group."""
    grouped = _grouped(weight, group)
    scale = _stored(_span(grouped), dtype)
    return Grid(_round(grouped, scale).flatten(1), scale)


def search(weight: torch.Tensor, group: int, dtype: torch.dtype, importance: torch.Tensor | None = None) -> Grid:
    """The scale of each group that loses least of all shrinks tried: the squared error, by column as `importance`
    [columns] weighs it (the mean square of what the layer's input has there)."""
    grouped = _grouped(weight, group)
    scale = _best_scale(grouped, importance, dtype)
    return Grid(_round(grouped, scale).flatten(1), scale)


def gptq(weight: torch.Tensor, group: int, dtype: torch.dtype, hessian: torch.Tensor) -> Grid:
    """Values that lose least in what the layer gives, for inputs x with the mean of x.T x in `hessian` [columns,
    columns]."""
    work = weight.float().clone()
    hessian = hessian.float().clone()
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    diagonal[dead] = 1.0
    work[:, dead] = 0.0
    scale = _best_scale(_grouped(work, group), diagonal, dtype)
    order = torch.argsort(diagonal, descending=True, stable=True)
    inverse = _inverse_factor(hessian[order][:, order])
    work = work[:, order]
    spread = scale.float().repeat_interleave(group, dim=1)[:, order]
    values = torch.empty(work.shape, dtype=torch.int8)
    columns = work.shape[1]
    for first in range(0, columns, _BLOCK):
        last = min(first + _BLOCK, columns)
        block, factor = work[:, first:last], inverse[first:last, first:last]
        errors = torch.empty_like(block)
        for at in range(last - first):
            column, step = block[:, at], spread[:, first + at]
            nearest = (column / step).round_().clamp_(LOW, HIGH)
            values[:, first + at] = nearest.to(torch.int8)
            error = (column - nearest * step) / factor[at, at]
            block[:, at:] -= error.unsqueeze(1) * factor[at, at:].unsqueeze(0)
            errors[:, at] = error
        work[:, last:] -= errors @ inverse[first:last, last:]
    back = torch.argsort(order)
    return Grid(values[:, back].contiguous(), scale)


def dequantize(grid: Grid, group: int) -> torch.Tensor:
    """The weight that a reader sees, float32."""
    return (_grouped(grid.values, group) * grid.scale.float().unsqueeze(-1)).flatten(1)


def _grouped(weight: torch.Tensor, group: int) -> torch.Tensor:
    """[rows, groups, columns of a group], float32."""
    return weight.float().reshape(weight.shape[0], -1, group)


def _inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse, damped until there is one."""
    mean = hessian.diagonal().mean()
    for damp in (_DAMP, 10 * _DAMP, 100 * _DAMP):
        damped = hessian + torch.eye(hessian.shape[0]) * (damp * mean)
        lower, problem = torch.linalg.cholesky_ex(damped)
        if problem == 0:
            upper, problem = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if problem == 0:
                factor: torch.Tensor = upper
                return factor
    return torch.diag(1 / torch.sqrt(hessian.diagonal()))


def _best_scale(grouped: torch.Tensor, importance: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Of all shrinks of the scale that spans a group the best, and then the least-squares scale of the values it gives
    where that is better still."""
    span = _span(grouped)
    weigh = torch.ones(1) if importance is None else importance.float().view(1, grouped.shape[1], grouped.shape[2])
    best = torch.full(span.shape, torch.inf)
    scale = torch.ones(span.shape, dtype=dtype)

    def keep(wanted: torch.Tensor) -> None:
        nonlocal best, scale
        tried = _stored(wanted, dtype)
        step = tried.float().unsqueeze(-1)
        error = (grouped / step).round_().clamp_(LOW, HIGH).mul_(step).sub_(grouped).square_()
        loss = error.mul_(weigh).sum(-1)
        better = loss < best
        best, scale = torch.where(better, loss, best), torch.where(better, tried, scale)

    for shrink in _SHRINKS:
        keep(span * shrink)
    values = _round(grouped, scale).float()
    keep((grouped * values * weigh).sum(-1) / (values.square() * weigh).sum(-1).clamp_min(1e-30))
    return scale


def _span(grouped: torch.Tensor) -> torch.Tensor:
    """absmax / 7.5: the largest weight falls between the last steps of either side."""
    return grouped.abs().amax(-1) / ((HIGH - LOW) / 2)


def _stored(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As it will be read back; 1 for a group so small that its scale would vanish."""
    kept = scale.to(dtype)
    return torch.where(kept < torch.finfo(dtype).tiny, torch.ones_like(kept), kept)


def _round(grouped: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (grouped / scale.float().unsqueeze(-1)).round_().clamp_(LOW, HIGH).to(torch.int8)
