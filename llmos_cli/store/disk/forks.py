"""Locks that a forked child can use. Of all threads a child has only the one that forked: what the others were in the
middle of stays half done in it, and their locks are never given back. So a fork waits until all of these are free.

Data loaders fork while other threads read. SQLite has locks of its own in memory, which nobody could give back either:
whoever goes into SQLite does so under one of these.
"""

import os
import threading
from types import TracebackType
from weakref import WeakSet


class ForkLock:
    """A re-entrant lock that nobody holds, unless the thread that forks does, at the moment of a fork."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        with _making:
            _all.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._lock.release()


_making = threading.Lock()
_all: WeakSet[ForkLock] = WeakSet()
_taken: list[ForkLock] = []


def _take_all() -> None:
    _making.acquire()
    _taken.extend(_all)
    for lock in _taken:
        lock.__enter__()


def _give_all() -> None:
    while _taken:
        _taken.pop().__exit__(None, None, None)
    _making.release()


os.register_at_fork(before=_take_all, after_in_parent=_give_all, after_in_child=_give_all)
