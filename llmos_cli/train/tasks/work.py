"""What one optimizer step computes, as plain arrays: what goes into the model, what should come out, and by how much
the summed loss is divided. A task makes it out of a dataset's batch; the loop divides and counts it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch.nn import functional

IGNORED: Final = -100  # a target that nothing is asked of


@dataclass(frozen=True)
class Work:
    """Rows first in every array. `targets` are token or label ids, shaped as the logits without their last axis, or
    scores (float32). The loss is the sum over those that are not IGNORED by `counted`, the number of them in the whole
    step, so that neither parts nor ranks change it. `tokens` is what the step is said to have gone through. `few`: most
    targets are IGNORED, and it is worth computing the others alone.
    """

    inputs: Mapping[str, np.ndarray]
    targets: np.ndarray
    counted: int
    tokens: int
    options: Mapping[str, Any] = field(default_factory=dict)  # for the model, the same for every part
    few: bool = False

    def share(self, rank: int, ranks: int) -> "Work":
        """The rows of one of several ranks; what they are divided by stays that of the whole step."""
        if ranks == 1:
            return self
        rows = len(self.targets) // ranks
        own = slice(rank * rows, (rank + 1) * rows)
        return replace(
            self, inputs={name: value[own] for name, value in self.inputs.items()}, targets=self.targets[own]
        )

    def parts(self, number: int, device: torch.device) -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        """The rows in so many runs of equal length, on `device`: inputs and targets."""
        inputs = {name: torch.from_numpy(value).to(device).chunk(number) for name, value in self.inputs.items()}
        targets = torch.from_numpy(self.targets).to(device).chunk(number)
        return [({name: split[at] for name, split in inputs.items()}, part) for at, part in enumerate(targets)]


class Task(Protocol):
    """A split of a dataset as work: `count` rows or examples, of `longest` tokens at most."""

    @property
    def count(self) -> int: ...

    @property
    def longest(self) -> int: ...

    def work(self, slot: int, indices: np.ndarray) -> Work:
        """The work of the rows at `indices`, which are the run's `slot`-th and following, counted from 0."""
        ...


def logits_of(model: Any, work: Work, inputs: Mapping[str, torch.Tensor], targets: torch.Tensor) -> Any:
    """What the model says of one part of `work`, and the targets that belong to it."""
    if not work.few or getattr(model, "_compiled_call_impl", None) is not None:  # what is compiled takes no hook
        return model(**inputs, **work.options).logits, targets
    flat = targets.reshape(-1)
    where = (flat != IGNORED).nonzero().squeeze(1)

    def pick(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return args[0].reshape(-1, args[0].shape[-1])[where], *args[1:]

    # The last layer, one vector a word, is most of the work of a small model: it sees the positions that count.
    last = getattr(model, "module", model).get_output_embeddings()
    hook = last.register_forward_pre_hook(pick)
    try:
        return model(**inputs, **work.options).logits, flat[where]
    finally:
        hook.remove()


def summed_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The sum over all targets that count, in float32: cross-entropy of ids, squared error of scores."""
    if targets.is_floating_point():
        return functional.mse_loss(logits.float().reshape(-1), targets.reshape(-1), reduction="sum")
    return functional.cross_entropy(
        logits.float().reshape(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=IGNORED, reduction="sum"
    )
