"""Any model that transformers can generate with, one text after the other in a step, each with transformers' own cache.

What the lean decoder does not know runs here: slower for many clients, but the same answers.
"""

import inspect
from collections.abc import Sequence
from typing import Any, Final

import torch
from transformers import DynamicCache

from llmos_cli.errors import LlmosError
from llmos_cli.serve.runner.spans import Span

SLOTS: Final = 4


class GenericRunner:
    """A text's cache is made with its first span."""

    rewinds = False

    def __init__(self, model: Any, *, slots: int = SLOTS) -> None:
        self.model, self.slots = model.eval(), slots
        known = inspect.signature(model.forward).parameters
        self._keeps_logits = "logits_to_keep" in known
        self._cache_word = "cache" if "cache" in known else "past_key_values"  # its name until transformers 5.24
        self._caches: dict[int, DynamicCache] = {}

    def fits(self, slots: int, length: int) -> bool:
        return True

    def run(self, spans: Sequence[Span]) -> torch.Tensor:
        return torch.cat([self._logits(span) for span in spans])

    def take(self, slot: int, start: int, end: int) -> torch.Tensor:
        raise NotImplementedError

    def put(self, slot: int, start: int, block: torch.Tensor) -> None:
        raise NotImplementedError

    def clear(self, slot: int) -> None:
        self._caches.pop(slot, None)

    @torch.inference_mode()
    def _logits(self, span: Span) -> torch.Tensor:
        if span.start == 0:
            self._caches[span.slot] = DynamicCache(config=self.model.config)
        cache = self._caches[span.slot]
        ids = torch.tensor([list(span.tokens)], device=self.model.device)
        more: dict[str, Any] = {self._cache_word: cache}
        if self._keeps_logits:
            more["logits_to_keep"] = max(span.wanted, 1)
        logits = self.model(input_ids=ids, use_cache=True, **more).logits[0]
        _check_length(self.model, cache, span.end)
        wanted: torch.Tensor = logits[len(logits) - span.wanted :].float().cpu()
        return wanted


def _check_length(model: Any, cache: DynamicCache, length: int) -> None:
    """A model that leaves the cache alone would go on as if there had been no prompt."""
    try:
        kept = cache.get_seq_length()
    except ValueError:
        kept = 0
    if kept != length:
        raise LlmosError(f"a {type(model).__name__} keeps no key-value cache that can be continued")
