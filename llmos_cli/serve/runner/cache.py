"""The keys and values of all slots: one tensor a layer for each, grown as texts come and grow, within a budget.

Of each head of a slot the tokens lie one after the other ([slots, heads, length, width]), so that attention reads
them in order, all slots in one call.
"""

from collections.abc import Sequence
from typing import Final

import torch

_STEP: Final = 64  # tokens by which a text's room grows at least


class SlotCache:
    """Grows by copying; `capacity` tokens in each of `slots` at the moment."""

    def __init__(
        self,
        layers: int,
        heads: int,
        width: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        context: int,
        budget: int,
    ) -> None:
        self._heads, self._width, self._dtype, self._device = heads, width, dtype, device
        self._context, self._budget = context, budget
        self.token_bytes = 2 * layers * heads * width * dtype.itemsize
        self.slots = self.capacity = 0
        empty = torch.empty((0, heads, 0, width), dtype=dtype, device=device)
        self.keys, self.values = [empty] * layers, [empty] * layers

    def fits(self, slots: int, length: int) -> bool:
        return slots * length * self.token_bytes <= self._budget

    @property
    def size(self) -> int:
        """Bytes held."""
        return self.slots * self.capacity * self.token_bytes

    def provide(self, slots: int, length: int) -> None:
        """Have room for texts of `length` in the first `slots`; what is there is kept."""
        if slots <= self.slots and length <= self.capacity:
            return
        slots = max(self.slots, slots)
        capacity = self.capacity
        if length > capacity:
            # by a quarter at least, so that a long text is not copied for every step
            capacity = min(self._context, -(-max(length, capacity * 5 // 4) // _STEP) * _STEP)
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                shape = (slots, self._heads, capacity, self._width)
                new = torch.zeros(shape, dtype=self._dtype, device=self._device)
                new[: self.slots, :, : self.capacity] = old
                tensors[layer] = new
        self.slots, self.capacity = slots, capacity

    def places(self, slots: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Where the rows of tokens lie in `keys[layer].view(-1, width)`: those of all heads for each token."""
        heads = torch.tensor(slots).unsqueeze(1) * self._heads + torch.arange(self._heads)
        return (heads * self.capacity + torch.tensor(positions).unsqueeze(1)).view(-1).to(self._device)

    def take(self, slot: int, start: int, end: int) -> torch.Tensor:
        """A copy, [2, layers, heads, tokens, width]."""
        return torch.stack(
            [torch.stack([tensor[slot, :, start:end] for tensor in tensors]) for tensors in (self.keys, self.values)]
        )

    def put(self, slot: int, start: int, block: torch.Tensor) -> None:
        end = start + block.shape[3]
        self.provide(slot + 1, end)
        for tensors, parts in zip((self.keys, self.values), block, strict=True):
            for tensor, part in zip(tensors, parts, strict=True):
                tensor[slot, :, start:end] = part
