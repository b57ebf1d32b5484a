"""One model with its tokenizer, making texts: many at once, each as if it were alone.

Invariants: a prompt is computed whole or refused; text plus what is asked for fits the context or is refused; the same
prompt, sampling and seed give the same text. Between any two steps a text may be cancelled. It knows nothing of HTTP;
whoever calls `step` owns the model's thread.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from llmos_cli.errors import LlmosError
from llmos_cli.serve.encoder import Encoder
from llmos_cli.serve.prefix import PrefixCache
from llmos_cli.serve.refusal import Refused
from llmos_cli.serve.runner.generic import GenericRunner
from llmos_cli.serve.runner.spans import Runner
from llmos_cli.serve.sampling import Sampling
from llmos_cli.serve.scheduler import Request, Scheduler
from llmos_cli.serve.sequence import Grammar, Piece, Text

if TYPE_CHECKING:
    from llmos_cli.serve.grammar import Grammars

PREFIX_BYTES: Final = 256 << 20


def _never() -> bool:
    return False


def _nothing() -> None:
    pass


class Engine:
    """A loaded model that answers. `runner` computes; without one, any model that transformers knows runs as it is."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        runner: Runner | None = None,
        prefix_bytes: int = PREFIX_BYTES,
    ) -> None:
        if not model.can_generate():
            raise LlmosError(f"a {type(model).__name__} cannot generate text")
        config = model.config.get_text_config()
        self.context = _context(config)
        ends = _ids(getattr(config, "eos_token_id", None)) | _ids(model.generation_config.eos_token_id)
        self.encoder = Encoder(tokenizer, vocabulary=int(config.vocab_size), ends=ends)
        self._tokenizer = tokenizer
        self.runner = runner or GenericRunner(model)
        self.prefixes = PrefixCache(prefix_bytes)
        self.scheduler = Scheduler(self.runner, prefixes=self.prefixes)
        self._stepping = threading.Lock()

    @cached_property
    def grammars(self) -> "Grammars":
        from llmos_cli.serve.grammar import Grammars

        return Grammars(self._tokenizer, size=self.encoder.size, ends=sorted(self.encoder.ends))

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

    def request(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        emit: Callable[[Piece], None],
        *,
        cancelled: Callable[[], bool] = _never,
        failed: Callable[[Exception], None],
        left: Callable[[], None] = _nothing,
        grammar: Grammar | None = None,
        index: int = 0,
    ) -> Request:
        """A text to be made; `add` has it computed. Raises Refused where it does not fit the context."""
        text = Text(prompt, sampling, self.room(prompt, sampling), self.encoder, emit, grammar=grammar, index=index)
        return Request(text, cancelled, failed, left)

    def add(self, request: Request) -> None:
        self.scheduler.add(request)

    def drop(self, request: Request) -> None:
        with self._stepping:
            self.scheduler.drop(request)

    def drop_all(self, error: Exception | None) -> None:
        with self._stepping:
            self.scheduler.drop_all(error)

    def step(self) -> bool:
        """One step of all texts; False if there was nothing to do."""
        with self._stepping:
            return self.scheduler.step()

    def generate(
        self, prompt: Sequence[int], sampling: Sampling, cancelled: Callable[[], bool] = _never
    ) -> Iterator[Piece]:
        """Pieces of one text as they become certain, computed by whoever iterates; ends without a finish reason only
        when `cancelled` says so."""
        pieces: deque[Piece] = deque()
        errors: list[Exception] = []
        over: list[bool] = []
        request = self.request(
            prompt, sampling, pieces.append, cancelled=cancelled, failed=errors.append, left=lambda: over.append(True)
        )
        return self._pieces(request, pieces, errors, over)

    def warm_up(self) -> float:
        """Compute two tokens and throw them away, so that the first user does not wait; the seconds it took."""
        started = time.perf_counter()
        sampling = Sampling(max_tokens=min(2, self.context - 1), temperature=0.0)
        for _ in self.generate([min(self.encoder.ends, default=0)], sampling):
            pass
        return time.perf_counter() - started

    def _pieces(
        self, request: Request, pieces: deque[Piece], errors: list[Exception], over: list[bool]
    ) -> Iterator[Piece]:
        self.add(request)
        try:
            while not over:
                self.step()
                while pieces:
                    yield pieces.popleft()
        finally:
            self.drop(request)
        if errors:
            raise errors[0]


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
