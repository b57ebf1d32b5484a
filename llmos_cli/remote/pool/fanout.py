"""Asking several nodes at once, without waiting for one that is silent.

Threads are daemons: a call that never comes back must not keep the process from ending. An LlmosError is an answer
about its node; anything else that is raised is about the call and goes to the caller.
"""

import threading
import time
from collections.abc import Callable, Mapping
from typing import Final, Generic, TypeVar

from llmos_cli.errors import LlmosError, RemoteUnavailable

STALL_SECONDS: Final = 30.0

Node = TypeVar("Node")
Answer = TypeVar("Answer")


class Call(Generic[Answer]):
    """One call on a thread of its own; `beat` says that it gets on."""

    def __init__(self, function: Callable[["Call[Answer]"], Answer]) -> None:
        self._function = function
        self._last = time.monotonic()
        self._done = threading.Event()
        self._answer: Answer | None = None
        self._error: BaseException | None = None
        threading.Thread(target=self._run, name="node", daemon=True).start()

    def beat(self) -> None:
        self._last = time.monotonic()

    def answer(self, stall: float) -> Answer:
        """What came back; raises what was raised, RemoteUnavailable once it has been silent for `stall` seconds."""
        while not self._done.wait(max(0.0, self._last + stall - time.monotonic())):
            if time.monotonic() - self._last >= stall:
                raise RemoteUnavailable(f"no answer for {stall:.0f} seconds")
        if self._error:
            raise self._error
        return self._answer  # type: ignore[return-value]

    def _run(self) -> None:
        try:
            self._answer = self._function(self)
        except BaseException as exc:  # noqa: BLE001 - handed to whoever waits
            self._error = exc
        self._done.set()


def ask_all(
    nodes: Mapping[str, Node], ask: Callable[[Node], Answer], *, stall: float = STALL_SECONDS
) -> dict[str, Answer | LlmosError]:
    """The answer of every node, by its name, or the error that came instead."""

    def start(node: Node) -> Call[Answer]:
        return Call(lambda _: ask(node))

    calls = {name: start(node) for name, node in nodes.items()}
    answers: dict[str, Answer | LlmosError] = {}
    for name, call in calls.items():
        try:
            answers[name] = call.answer(stall)
        except LlmosError as exc:
            answers[name] = exc
    return answers


def ask_one(ask: Callable[[], Answer], *, stall: float = STALL_SECONDS) -> Answer:
    """One answer; raises RemoteUnavailable where none comes."""
    return Call(lambda _: ask()).answer(stall)
