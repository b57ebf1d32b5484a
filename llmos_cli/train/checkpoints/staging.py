"""A copy of a run's state as it is after a step, made while the next step computes.

Forward and backward passes read the parameters and the optimizer's state and do not change them: the update at the end
of the step does. So these are copied by the thread that writes the checkpoint, and only the update has to wait for it.
What a forward pass may change (buffers, random generators) is copied at once. The copies lie in the memory of those
before, which have been written by then: fresh memory costs several times the copy.
"""

from collections.abc import Iterator, Mapping
from itertools import chain
from threading import Event

import numpy as np
import torch
from torch import nn


class Staging:
    """Copies of a model's and an optimizer's tensors, one of each at a time."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model, self._optimizer = model, optimizer
        self._held: dict[str, dict[str, torch.Tensor]] = {}
        self._late: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._done = Event()
        self._done.set()

    @property
    def is_done(self) -> bool:
        """Whether the state may change now."""
        return self._done.is_set()

    def take(self, file: str, tensors: Mapping[str, torch.Tensor], *, at_once: bool = False) -> dict[str, torch.Tensor]:
        """Where the copies of a file's tensors will be once `copy` has run. What may change before the update is in
        them now; everything, if it must be `at_once`."""
        self._done.clear()
        updated = set() if at_once else {_memory(tensor) for tensor in self._updated()}
        room, copies = self._held.get(file, {}), dict[str, torch.Tensor]()
        for name, tensor in tensors.items():
            live = tensor.detach()
            held = copies[name] = _room(room.get(name), live)
            if _memory(live) in updated:
                self._late.append((held, live))
            else:
                held.copy_(live)
        self._held[file] = copies
        return copies

    def copy(self) -> None:
        """Copy what is left; by another thread than the one that trains."""
        try:
            for held, live in self._late:
                _copy(held, live)
        finally:
            self._late = []
            self._done.set()

    def wait(self) -> None:
        """Return once the state may change."""
        self._done.wait()

    def clear(self) -> None:
        self._held = {}

    def _updated(self) -> Iterator[torch.Tensor]:
        states = (value for state in self._optimizer.state.values() for value in state.values())
        return chain(self._model.parameters(), (value for value in states if isinstance(value, torch.Tensor)))


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _room(held: torch.Tensor | None, live: torch.Tensor) -> torch.Tensor:
    if held is None or held.shape != live.shape or held.dtype != live.dtype:
        return torch.empty(live.shape, dtype=live.dtype, pin_memory=live.device.type == "cuda")
    return held


def _copy(held: torch.Tensor, live: torch.Tensor) -> None:
    """Without the threads that torch would copy with: they belong to the step that is being computed."""
    if live.device.type == "cpu" and live.is_contiguous():
        np.copyto(_bytes(held), _bytes(live))
    else:
        held.copy_(live)


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.reshape(-1).view(torch.uint8).numpy()
