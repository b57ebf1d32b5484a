"""Which texts are computed in the next step: those being made go one token further, a new prompt a part at a time.

Slots are few: texts wait for one in the order in which they came, and for memory for their keys and values. A step
takes every text that is being made and at most PREFILL_TOKENS of prompts, so that a long prompt does not hold up the
others. A text alone may have its next tokens guessed. An error of one text is its own; one of the model ends all
that were in the step. One thread steps.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

import torch

from llmos_cli.serve.lookup import guess
from llmos_cli.serve.prefix import BLOCK, PrefixCache
from llmos_cli.serve.runner.spans import Runner, Span
from llmos_cli.serve.sequence import Text

PREFILL_TOKENS: Final = 256  # of prompts in a step


@dataclass(eq=False)
class Request:
    """A text on its way. `cancelled` is asked before each step; `failed` hears of an error, `left` of the end of any
    kind. Times are of the monotonic clock: when it came, got a slot, had its first token."""

    text: Text
    cancelled: Callable[[], bool]
    failed: Callable[[Exception], None]
    left: Callable[[], None]
    came: float = field(default_factory=time.perf_counter)
    began: float | None = None
    first: float | None = None
    last: float | None = None
    slot: int = -1
    computed: int = 0  # tokens whose keys and values the slot holds


class Watch(Protocol):
    """Whoever counts."""

    def token(self, seconds: float) -> None:
        """A token came so long after the one before."""
        ...

    def left(self, request: Request) -> None:
        """A request has ended, however."""
        ...


class Scheduler:
    """Slots and the queue before them; `watch` may be set."""

    def __init__(self, runner: Runner, *, prefixes: PrefixCache | None = None) -> None:
        self.runner = runner
        self.prefixes = prefixes if runner.rewinds else None
        self.watch: Watch | None = None
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._free = list(range(runner.slots))
        self.guessed = self.guessed_right = 0

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def step(self) -> bool:
        """Compute one step; False if there was nothing to do."""
        for request in [*self.running, *self.waiting]:
            if request.cancelled():
                self._leave(request)
        self._admit()
        work = self._plan()
        if not work:
            return False
        try:
            found = self.runner.run([span for _, span in work])
        except Exception as exc:  # noqa: BLE001 - it is raised again where the requests are awaited
            for request, _ in work:
                request.failed(exc)
                self._leave(request)
            return True
        at = 0
        for request, span in work:
            logits = found[at : at + span.wanted]
            at += span.wanted
            try:
                self._take(request, span, logits)
            except Exception as exc:  # noqa: BLE001 - of this text alone
                request.failed(exc)
                self._leave(request)
        return True

    def drop(self, request: Request) -> None:
        """Take a request out, if it is still here."""
        self._leave(request)

    def drop_all(self, error: Exception | None) -> None:
        """End everything, with an error if nobody asked for it."""
        for request in [*self.running, *self.waiting]:
            if error is not None:
                request.failed(error)
            self._leave(request)

    def _admit(self) -> None:
        while self.waiting and self._free:
            request = self.waiting[0]
            longest = max(r.text.prompt_length + r.text.room for r in [*self.running, request])
            slot = min(self._free)
            highest = max([slot, *(r.slot for r in self.running)])
            if self.running and not self.runner.fits(highest + 1, longest):
                return
            self.waiting.popleft()
            self._free.remove(slot)
            request.slot, request.began = slot, time.perf_counter()
            if self.prefixes is not None:
                for number, block in enumerate(self.prefixes.find(request.text.tokens)):
                    self.runner.put(slot, number * BLOCK, block)
                    request.computed = (number + 1) * BLOCK
            self.running.append(request)

    def _plan(self) -> list[tuple[Request, Span]]:
        work, left = [], PREFILL_TOKENS
        alone = len(self.running) == 1
        for request in self.running:
            tokens, start = request.text.tokens, request.computed
            if start == len(tokens) - 1:
                more = self._guess(request) if alone else []
                work.append((request, Span(request.slot, start, [tokens[-1], *more], 1 + len(more))))
            elif left > 0:
                part = tokens[start : start + left]
                left -= len(part)
                whole = start + len(part) == len(tokens)
                work.append((request, Span(request.slot, start, part, int(whole))))
        return work

    def _guess(self, request: Request) -> list[int]:
        text = request.text
        if not (self.runner.rewinds and text.predictable and text.room - text.made > 1):
            return []
        return guess(text.tokens)[: text.room - text.made - 1]

    def _take(self, request: Request, span: Span, logits: torch.Tensor) -> None:
        if not span.wanted:
            request.computed = span.end
            return
        guesses = list(span.tokens[1:]) if span.wanted > 1 else []
        self.guessed += len(guesses)
        request.computed = span.end - len(guesses)
        if request.first is None:
            request.first = time.perf_counter()
            self._keep(request)  # others may ask the same while this one is answered
        for number, row in enumerate(logits):
            token = request.text.take(row)
            now = time.perf_counter()
            if self.watch is not None and request.last is not None:
                self.watch.token(now - request.last)
            request.last = now
            if token is None:
                self._keep(request)
                self._leave(request)
                return
            if number == len(guesses) or token != guesses[number]:
                return
            self.guessed_right += 1
            request.computed += 1

    def _keep(self, request: Request) -> None:
        if self.prefixes is not None:
            slot, known = request.slot, request.text.tokens[: request.computed]
            self.prefixes.offer(known, lambda start, end: self.runner.take(slot, start, end))

    def _leave(self, request: Request) -> None:
        if request in self.running:
            self.running.remove(request)
            self.runner.clear(request.slot)
            self._free.append(request.slot)
        elif request in self.waiting:
            self.waiting.remove(request)
        else:
            return
        request.left()
        if self.watch is not None:
            self.watch.left(request)
