import threading
import time
from contextlib import closing

import pytest

from llmos_cli.remote.exchange.parallel import in_order


def test_results_come_in_the_order_of_the_items() -> None:
    def slow_first(number: int) -> int:
        time.sleep(0.002 * (20 - number))
        return number * number

    assert list(in_order(slow_first, range(20), workers=8)) == [number * number for number in range(20)]


def test_no_more_is_under_way_than_the_limit_allows() -> None:
    lock, now, most = threading.Lock(), [0], [0]

    def work(weight: int) -> int:
        with lock:
            now[0] += weight
            most[0] = max(most[0], now[0])
        time.sleep(0.001)
        return weight

    for weight in in_order(work, [3, 4, 2, 9, 1, 10, 2, 2, 2] * 3, workers=8, limit=10, weigh=lambda item: item):
        with lock:
            now[0] -= weight
    assert most[0] <= 10


def test_what_is_heavier_than_the_limit_still_goes() -> None:
    assert list(in_order(str, [50, 1, 50], workers=2, limit=10, weigh=lambda item: item)) == ["50", "1", "50"]


def test_the_first_error_ends_it() -> None:
    begun: list[int] = []

    def fail(number: int) -> int:
        begun.append(number)
        if number == 3:
            raise ValueError("three")
        return number

    results = in_order(fail, range(1000), workers=2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)
    assert len(begun) < 20


def test_closing_it_early_stops_the_work() -> None:
    begun: list[int] = []
    with closing(in_order(begun.append, range(1000), workers=2)) as results:
        next(results)
    assert len(begun) < 20
