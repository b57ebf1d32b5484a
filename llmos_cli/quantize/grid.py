"""Weights onto a grid of four bits: which scale a group takes, and which values. Arithmetic on tensors only.

A group of columns of a row has one scale; a weight becomes the nearest of scale * (-8 ... 7). A scale may be negative:
the grid has one step more on one side, and the largest weight of a group is worth it. `search` chooses the scales that
lose least, `hqq` those that lose least of most weights and let outliers go (half-quadratic quantization, p = 0.7, with
the scale to be found where others find a zero point), `gptq` also makes up for the error of each column in those that
are still to come, as far as the inputs of the layer let it (GPTQ, arXiv:2210.17323; with columns taken by importance
and the scales fixed before).
"""

from dataclasses import dataclass
from typing import Final

import torch

LOW: Final = -8
HIGH: Final = 7
_SHRINKS: Final = (1.1, 1.0, 0.9, 0.8)  # of the scale that puts a group's largest weight on the grid's end
_REFITS: Final = 2
_HQQ_NORM, _HQQ_STEPS, _HQQ_BETA, _HQQ_KAPPA = 0.7, 20, 10.0, 1.01
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


def hqq(weight: torch.Tensor, group: int, dtype: torch.dtype) -> Grid:
    """Scales for which the weights that are missed are missed as few as can be: what a robust norm takes for outliers
    is left out of the fit of the scale, and the more so the longer it goes on."""
    grouped = _grouped(weight, group)
    scale = _best_scale(grouped, None, dtype)
    beta = _HQQ_BETA / grouped.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
    fitted, best = scale, _robust(grouped, scale)
    for _ in range(_HQQ_STEPS):
        values = _round(grouped, fitted).float()
        missed = grouped - values * fitted.float().unsqueeze(-1)
        size = missed.abs().clamp_min(1e-30)
        outliers = missed.sign() * (size - size.pow(_HQQ_NORM - 1) / beta.pow(2 - _HQQ_NORM)).clamp_min_(0)
        fitted = _stored(_fitted(grouped - outliers, values, None), dtype)
        loss = _robust(grouped, fitted)
        better = loss < best
        best, scale = torch.where(better, loss, best), torch.where(better, fitted, scale)
        beta = beta * _HQQ_KAPPA
    return Grid(_round(grouped, scale).flatten(1), scale)


def _robust(grouped: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    step = scale.float().unsqueeze(-1)
    return (_round(grouped, scale).float() * step - grouped).abs().pow(_HQQ_NORM).sum(-1)


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
    """Of some shrinks of the scale that puts the largest weight on the longer end of the grid the best, and then the
    least-squares scale of the values it gives where that is better still."""
    weigh = None if importance is None else importance.float().view(1, grouped.shape[1], grouped.shape[2])
    end = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True)).squeeze(-1) / LOW
    best = torch.full(end.shape, torch.inf)
    scale = torch.ones(end.shape, dtype=dtype)
    error = torch.empty_like(grouped)

    def keep(wanted: torch.Tensor) -> None:
        nonlocal best, scale
        tried = _stored(wanted, dtype)
        step = tried.float().unsqueeze(-1)
        torch.div(grouped, step, out=error)
        error.round_().clamp_(LOW, HIGH).mul_(step).sub_(grouped).square_()
        loss = (error if weigh is None else error.mul_(weigh)).sum(-1)
        better = loss < best
        best, scale = torch.where(better, loss, best), torch.where(better, tried, scale)

    for shrink in _SHRINKS:
        keep(end * shrink)
    for _ in range(_REFITS):
        keep(_fitted(grouped, _round(grouped, scale).float(), weigh))
    return scale


def _fitted(grouped: torch.Tensor, values: torch.Tensor, weigh: torch.Tensor | None) -> torch.Tensor:
    """The scale that loses least for these values, by least squares."""
    weighed = values if weigh is None else values * weigh
    return (grouped * weighed).sum(-1) / (values * weighed).sum(-1).clamp_min(1e-30)


def _span(grouped: torch.Tensor) -> torch.Tensor:
    """absmax / 7.5: the largest weight falls between the last steps of either side."""
    return grouped.abs().amax(-1) / ((HIGH - LOW) / 2)


def _stored(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As it will be read back; 1 for a group so small that its scale would vanish."""
    kept = scale.to(dtype)
    return torch.where(kept.abs() < torch.finfo(dtype).tiny, torch.ones_like(kept), kept)


def _round(grouped: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (grouped / scale.float().unsqueeze(-1)).round_().clamp_(LOW, HIGH).to(torch.int8)
