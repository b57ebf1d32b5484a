"""Work on several threads whose results come back in order, with a bounded amount under way."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int,
    limit: int | None = None,
    weigh: Callable[[Item], int] = lambda item: 1,
) -> Generator[Result, None, None]:
    """`map` over threads. Results that are under way or waiting weigh at most `limit` together (by default twice the
    workers, each weighing 1), but one may always be; the first error ends it.

    Close it (`contextlib.closing`) where it may not be used to its end: what has not begun is then dropped.
    """
    most = limit or 2 * workers
    waiting: deque[tuple[Future[Result], int]] = deque()
    total = 0
    with ThreadPoolExecutor(workers, "remote") as pool:
        try:
            for item in items:
                weight = weigh(item)
                while waiting and total + weight > most:
                    future, done = waiting.popleft()
                    yield future.result()
                    total -= done
                waiting.append((pool.submit(function, item), weight))
                total += weight
            while waiting:
                yield waiting.popleft()[0].result()
        finally:
            for future, _ in waiting:
                future.cancel()
