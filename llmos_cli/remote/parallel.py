"""Work on several threads whose results come back in order, with a bounded number under way."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int, window: int | None = None
) -> Iterator[Result]:
    """`map` over threads. At most `window` results (twice the workers) exist at a time; the first error ends it.

    Close it (`contextlib.closing`) if it may not be used to its end: that stops what has not begun and waits for the rest.
    """
    limit = window or 2 * workers
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers, "remote") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= limit:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
