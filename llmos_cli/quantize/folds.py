"""Features made larger or smaller before they are quantized, so that the model computes what it did.

What leaves a norm is divided by a factor for each feature, and the columns of the layers that read it are multiplied by
the same: the norm's own weights take the division. SmoothQuant (arXiv:2211.10438) does it for the sake of the inputs,
whose outliers would coarsen every token's scale; AWQ (arXiv:2306.00978) for the sake of the weights that matter most.
How far to go is chosen for each norm by what the layers behind it lose, and "not at all" is among the choices.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn

from llmos_cli.models.quantized import quantize_rows
from llmos_cli.quantize import grid

STRENGTHS: Final = (0.2, 0.35, 0.5, 0.65, 0.8)
SAMPLE: Final = 256  # tokens to measure on
_LEAST: Final = 1e-5


@dataclass
class Inputs:
    """What a layer gets: the mean of x.T x, the largest of each feature, and a sample of tokens."""

    second: torch.Tensor
    peak: torch.Tensor
    sample: torch.Tensor


@dataclass(frozen=True)
class Fold:
    """A norm and the layers that read it and nothing else, by their names within the block."""

    norm: str
    layers: tuple[str, ...]


Weights = Mapping[str, torch.Tensor]
"""By layer, [out, in] in float32."""


def find_folds(block: nn.Module, run: Callable[[], torch.Tensor], layers: Sequence[str]) -> list[Fold]:
    """The norms of a block whose output goes into `layers` only, found by running it: with the norm halved and those
    layers doubled it must compute the same."""
    left: dict[str, torch.Tensor] = {}
    reads: dict[str, list[str]] = {}

    def leaves(name: str, made: object) -> None:
        if isinstance(made, torch.Tensor):
            left[name] = made

    def enters(name: str, x: torch.Tensor) -> None:
        for norm, made in left.items():
            if made is x:
                reads.setdefault(norm, []).append(name)

    norms = [name for name, module in block.named_modules() if type(module).__name__.endswith("Norm")]
    hooks = [
        block.get_submodule(name).register_forward_hook(lambda _, __, made, name=name: leaves(name, made))
        for name in norms
    ]
    hooks += [
        block.get_submodule(name).register_forward_pre_hook(lambda _, given, name=name: enters(name, given[0]))
        for name in layers
    ]
    try:
        before = run()
    finally:
        for hook in hooks:
            hook.remove()
    found = [Fold(norm, tuple(names)) for norm, names in reads.items()]
    return [fold for fold in found if _computes_the_same(block, run, fold, before)]


def _computes_the_same(block: nn.Module, run: Callable[[], torch.Tensor], fold: Fold, before: torch.Tensor) -> bool:
    changed = [
        *(parameter for parameter in block.get_submodule(fold.norm).parameters()),
        *(block.get_parameter(f"{name}.weight") for name in fold.layers),
    ]
    factors = [0.5 if parameter.ndim == 1 else 2.0 for parameter in changed]  # exact, there and back
    with torch.no_grad():
        for parameter, factor in zip(changed, factors, strict=True):
            parameter.mul_(factor)
        after = run()
        for parameter, factor in zip(changed, factors, strict=True):
            parameter.div_(factor)
    return torch.allclose(before, after, rtol=1e-4, atol=1e-5 * float(before.abs().amax()))


def smooth_factor(weights: Weights, inputs: Inputs) -> torch.Tensor | None:
    """The factor of each feature for weights and inputs of eight bits; None if none is better."""
    peak = torch.stack([weight.abs().amax(0) for weight in weights.values()]).amax(0).clamp_min(_LEAST)
    given = inputs.peak.clamp_min(_LEAST)
    x = inputs.sample
    wanted = {name: x @ weight.t() for name, weight in weights.items()}

    def loss(factor: torch.Tensor) -> float:
        tokens = torch.mul(*quantize_rows(x / factor))
        return sum(
            float((tokens @ torch.mul(*quantize_rows(weight * factor)).t() - wanted[name]).square().sum())
            for name, weight in weights.items()
        )

    return _best([given.pow(strength) / peak.pow(1 - strength) for strength in STRENGTHS], loss, torch.ones_like(given))


def awq_factor(weights: Weights, inputs: Inputs, group: int, dtype: torch.dtype) -> torch.Tensor | None:
    """The factor of each feature for weights of four bits; None if none is better."""
    size = inputs.second.diagonal().clamp_min(_LEAST**2).sqrt()
    importance = inputs.second.diagonal()

    def loss(factor: torch.Tensor) -> float:
        total = 0.0
        for weight in weights.values():
            made = grid.search(weight * factor, group, dtype, importance / factor.square())
            missed = grid.dequantize(made, group) / factor - weight
            total += float(((missed @ inputs.second) * missed).sum())
        return total

    tried = [size.pow(strength) for strength in STRENGTHS]
    return _best([one / (one.amax() * one.amin()).sqrt() for one in tried], loss, torch.ones_like(size))


def _best(
    tried: Sequence[torch.Tensor], loss: Callable[[torch.Tensor], float], none: torch.Tensor
) -> torch.Tensor | None:
    losses = [loss(none), *(loss(factor) for factor in tried)]
    best = losses.index(min(losses))
    return tried[best - 1] if best else None


def exact(factor: torch.Tensor, norm: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A factor near to this one by which the norm's weights can be divided in the dtype they are stored in."""
    divided = (norm / factor).to(dtype).float()
    return torch.where((divided != 0) & (norm != 0), norm / divided, torch.ones_like(factor))
