"""Keys and values of texts that were computed before, in blocks of tokens, for texts that begin in the same way.

A block is known by the tokens in it and all before it, so equal beginnings share blocks. What was not used for the
longest time goes first.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import torch

BLOCK: Final = 64  # tokens


class PrefixCache:
    """At most `budget` bytes of blocks. `queries` and `hits` count prompt tokens, as vLLM does."""

    def __init__(self, budget: int) -> None:
        self._budget, self.size = budget, 0
        self._blocks: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self.queries = self.hits = 0

    def find(self, prompt: Sequence[int]) -> list[torch.Tensor]:
        """Blocks for the beginning of a prompt; at least one token is left to compute."""
        found = []
        for key in _keys(prompt, len(prompt) - 1):
            block = self._blocks.get(key)
            if block is None:
                break
            self._blocks.move_to_end(key)
            found.append(block)
        self.queries += len(prompt)
        self.hits += len(found) * BLOCK
        return found

    def offer(self, tokens: Sequence[int], take: Callable[[int, int], torch.Tensor]) -> None:
        """Keep what is not known yet of a text; `take` gives a copy of the keys and values of positions."""
        for number, key in enumerate(_keys(tokens, len(tokens))):
            if key in self._blocks:
                self._blocks.move_to_end(key)
                continue
            block = take(number * BLOCK, (number + 1) * BLOCK)
            if block.nbytes > self._budget:
                return
            self._blocks[key] = block
            self.size += block.nbytes
            while self.size > self._budget:
                self.size -= self._blocks.popitem(last=False)[1].nbytes


def _keys(tokens: Sequence[int], length: int) -> Iterator[bytes]:
    key = b""
    for start in range(0, length - BLOCK + 1, BLOCK):
        key = hashlib.blake2b(key + array("q", tokens[start : start + BLOCK]).tobytes(), digest_size=16).digest()
        yield key
