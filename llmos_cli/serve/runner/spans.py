"""What a runner is asked to compute: for each slot, a few tokens that follow those it has seen.

A slot holds the keys and values of one text. A prompt goes in as spans of many tokens, an answer as spans of one, and
tokens that were guessed are checked as a span of which every row is wanted. One call computes spans of many slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Span:
    """Tokens at positions `start`, `start + 1`, ... of a slot's text; the logits of the last `wanted` come back."""

    slot: int
    start: int
    tokens: Sequence[int]
    wanted: int = 1

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


class Runner(Protocol):
    """Computes spans. Not for two threads at once."""

    slots: int
    """How many texts at once."""

    rewinds: bool
    """Whether a span may begin before the end of what its slot has seen, and blocks can be taken out and put back."""

    @property
    def model(self) -> Any:
        """The transformers model it computes."""
        ...

    def fits(self, slots: int, length: int) -> bool:
        """Whether the memory for keys and values allows so many texts as long as this."""
        ...

    def run(self, spans: Sequence[Span]) -> torch.Tensor:
        """Logits [sum of `wanted`, vocabulary] as float32 on the CPU, in the order of the spans."""
        ...

    def take(self, slot: int, start: int, end: int) -> torch.Tensor:
        """A copy of the keys and values of these positions."""
        ...

    def put(self, slot: int, start: int, block: torch.Tensor) -> None:
        """Put back what `take` gave, at the same positions of any slot."""
        ...

    def clear(self, slot: int) -> None:
        """Forget a slot's text."""
        ...
