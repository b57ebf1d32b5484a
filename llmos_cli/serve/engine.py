"""One model with its tokenizer, computing one text at a time: prefill, then a token a step from the KV cache.

Invariants: a prompt is computed whole or refused; text plus what is asked for fits the context or is refused; the same
prompt, sampling and seed give the same text. Between any two steps the caller may cancel. It knows nothing of HTTP,
queues or threads: two generations at once are safe, but share the cores.
"""

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from transformers import DynamicCache

from llmos_cli.errors import LlmosError
from llmos_cli.serve.encoder import Encoder
from llmos_cli.serve.refusal import Refused
from llmos_cli.serve.sampling import Picker, Sampling
from llmos_cli.serve.text import TextStream

PREFILL_TOKENS: Final = 512  # one step of a prompt: bounds its memory and how long a cancelled one goes on


@dataclass(frozen=True)
class Piece:
    """Text that may be shown; `tokens` made so far; the last piece has the finish reason, "stop" or "length"."""

    text: str
    tokens: int
    finish_reason: str | None = None


def _never() -> bool:
    return False


class Engine:
    """A loaded model that answers."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        if not model.can_generate():
            raise LlmosError(f"a {type(model).__name__} cannot generate text")
        config = model.config.get_text_config()
        self._model = model.eval()
        known = inspect.signature(model.forward).parameters
        self._last_only = "logits_to_keep" in known
        self._cache_word = "cache" if "cache" in known else "past_key_values"  # its name until transformers 5.24
        self.context = _context(config)
        ends = _ids(getattr(config, "eos_token_id", None)) | _ids(model.generation_config.eos_token_id)
        self.encoder = Encoder(tokenizer, vocabulary=int(config.vocab_size), ends=ends)

    def room(self, prompt: Sequence[int], sampling: Sampling, *, field: str = "prompt") -> int:
        """How many tokens may be made after `prompt`; raises Refused, naming the lengths, where it does not fit."""
        left = self.context - len(prompt)
        if left < 1:
            raise Refused(
                f"the prompt's length is {len(prompt)} tokens, and the model's context is {self.context}, "
                "of which the answer needs at least one",
                field=field,
                reason="context_length_exceeded",
                hint="send a shorter prompt",
            )
        wanted = left if sampling.max_tokens is None else sampling.max_tokens
        if wanted > left:
            raise Refused(
                f"the prompt's length is {len(prompt)} tokens and max_tokens is {wanted}, together "
                f"{len(prompt) + wanted}, but the model's context is {self.context}",
                field="max_tokens",
                reason="context_length_exceeded",
                hint=f"ask for at most {left}",
            )
        return wanted

    def generate(
        self, prompt: Sequence[int], sampling: Sampling, cancelled: Callable[[], bool] = _never
    ) -> Iterator[Piece]:
        """Pieces of text as they become certain; ends without a finish reason only when `cancelled` says so."""
        return self._pieces(list(prompt), sampling, self.room(prompt, sampling), cancelled)

    def warm_up(self) -> float:
        """Compute two tokens and throw them away, so that the first user does not wait; the seconds it took."""
        started = time.perf_counter()
        sampling = Sampling(max_tokens=min(2, self.context - 1), temperature=0.0)
        for _ in self.generate([min(self.encoder.ends, default=0)], sampling):
            pass
        return time.perf_counter() - started

    def _pieces(
        self, prompt: list[int], sampling: Sampling, room: int, cancelled: Callable[[], bool]
    ) -> Iterator[Piece]:
        text = TextStream(self.encoder.decode, prompt, sampling.stop)
        # a stop string that is a control token has no text to be found in: it stops as the token that it is
        controls = self.encoder.controls
        ends = self.encoder.ends | {controls[stop] for stop in sampling.stop if stop in controls}
        picker = Picker(sampling)
        cache = DynamicCache(config=self._model.config)
        logits = torch.empty(0)
        for start in range(0, len(prompt), PREFILL_TOKENS):
            if cancelled():
                return
            logits = self._step(prompt[start : start + PREFILL_TOKENS], cache)
        self._check_cache(cache, len(prompt))
        for made in range(1, room + 1):
            if cancelled():
                return
            token = picker.pick(logits)
            if token in ends:
                yield Piece(text.flush(), made, "stop")
                return
            shown = text.push(token)
            if made == room and not text.stopped:
                shown += text.flush()
            if text.stopped:
                yield Piece(shown, made, "stop")
                return
            if made == room:
                yield Piece(shown, made, "length")
                return
            if shown:
                yield Piece(shown, made)
            logits = self._step([token], cache)

    def _check_cache(self, cache: DynamicCache, length: int) -> None:
        """A model that leaves the cache alone would go on as if there had been no prompt."""
        try:
            kept = cache.get_seq_length()
        except ValueError:
            kept = 0
        if kept != length:
            raise LlmosError(f"a {type(self._model).__name__} keeps no key-value cache that can be continued")

    @torch.inference_mode()
    def _step(self, tokens: list[int], cache: DynamicCache) -> torch.Tensor:
        ids = torch.tensor([tokens], device=self._model.device)
        last = {"logits_to_keep": 1} if self._last_only else {}
        logits = self._model(input_ids=ids, use_cache=True, **{self._cache_word: cache}, **last).logits[0, -1]
        # a padded vocabulary has rows that no token stands for
        row: torch.Tensor = logits[: self.encoder.size].float().cpu()
        return row


def _context(config: Any) -> int:
    length = getattr(config, "max_position_embeddings", None)
    if not isinstance(length, int) or length < 2:
        raise LlmosError(
            f"the model's config.json does not say its context length (max_position_embeddings is {length})"
        )
    return length


def _ids(value: Any) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset(value) if isinstance(value, list | tuple) else frozenset({int(value)})
