"""The weights that a run is known by, where they are not those that it trains: an average of them.

Two methods have one: an exponential moving average (`--ema`), and schedule-free AdamW, which evaluates at a mean of all
its steps. A checkpoint's model.safetensors is the average, so that is what a model ref gets; the weights that training
goes on with lie beside the optimizer's state.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import nn

from llmos_cli.errors import Damaged

_TRAINED: Final = "trained."


class Average:
    """None of it: the weights are those that are trained. `EmaAverage` and `FreeAverage` say what is otherwise."""

    def update(self, step: int) -> None:
        """Take in the weights after `step`, from 1."""

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The model has the average inside of it, and bit for bit what it had before after it."""
        yield

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold besides the average."""
        return {}

    def restore(self, state: dict[str, torch.Tensor], what: str) -> None:
        """Take back out of `state` what `state()` gave; the model was loaded with the average. Raises Damaged."""


class _Kept(Average):
    def __init__(self, model: nn.Module) -> None:
        self._live = {name: value for name, value in model.named_parameters() if value.requires_grad}

    def state(self) -> dict[str, torch.Tensor]:
        return {_TRAINED + name: value.detach() for name, value in self._live.items()}

    def restore(self, state: dict[str, torch.Tensor], what: str) -> None:
        self._averaged(self._live)
        for name, value in self._live.items():
            found = state.pop(_TRAINED + name, None)
            if found is None or found.shape != value.shape or found.dtype != value.dtype:
                raise Damaged(f"{what} lacks the weights that training goes on with: {name}")
            value.data.copy_(found)

    def _averaged(self, live: Mapping[str, torch.Tensor]) -> None:
        """Take the model's weights, as they are now, for the average."""


class EmaAverage(_Kept):
    """An average that follows the weights: after step t it keeps min(decay, (1 + t) / (10 + t)) of itself, so that the
    first steps do not weigh on it for long."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model)
        self._decay = decay
        self._averaged(self._live)

    def update(self, step: int) -> None:
        keep = min(self._decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, value in self._live.items():
                self._average[name].lerp_(value, 1 - keep)

    @contextmanager
    def shown(self) -> Iterator[None]:
        held = {name: value.detach().clone() for name, value in self._live.items()}
        _copy(self._average, self._live)
        try:
            yield
        finally:
            _copy(held, self._live)

    def _averaged(self, live: Mapping[str, torch.Tensor]) -> None:
        self._average = {name: value.detach().clone() for name, value in live.items()}


class FreeAverage(_Kept):
    """What schedule-free AdamW makes of its state when it is told to evaluate."""

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        super().__init__(model)
        self._optimizer = optimizer
        optimizer.train()

    @contextmanager
    def shown(self) -> Iterator[None]:
        held = {name: value.detach().clone() for name, value in self._live.items()}
        self._optimizer.eval()
        try:
            yield
        finally:
            self._optimizer.train()
            _copy(held, self._live)  # its own way back is rounded


def average_of(model: nn.Module, optimizer: Any, *, ema: float | None) -> Average:
    """The average that a run keeps."""
    if ema is not None:
        return EmaAverage(model, ema)
    return FreeAverage(model, optimizer) if type(optimizer).__name__ == "AdamWScheduleFree" else Average()


def _copy(source: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, value in target.items():
            value.copy_(source[name])
