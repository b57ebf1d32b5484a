"""Ctrl-C and SIGTERM as a flag that the loop polls; the second signal acts as if nobody had asked to wait."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from llmos_cli.errors import Interrupted, Terminated


class StopFlag:
    """Which signal asked to stop, if any."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def error(self, message: str, *, hint: str | None = None) -> Interrupted:
        kind = Terminated if self.signal == signal.SIGTERM else Interrupted
        return kind(message, hint=hint)


@contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """Catch SIGINT and SIGTERM while the block runs; off the main thread they cannot be caught: the flag stays down."""
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def first(number: int, frame: FrameType | None) -> None:
        flag.signal = number
        restore()

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, first)
        yield flag
    finally:
        restore()
