import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from llmos_cli.errors import Busy, LlmosError
from llmos_cli.serve.sampling import Sampling
from llmos_cli.serve.sequence import Piece
from llmos_cli.serve.worker import Worker


def until_cancelled(prompt: list[int], cancelled: Callable[[], bool]) -> Iterator[Piece]:
    made = 0
    while not cancelled():
        made += 1
        yield Piece("x", made)


@pytest.fixture
def run(scripted: Any) -> Callable[..., None]:
    def run(test: Callable[[Worker], Any], generate: Any = until_cancelled, waiting: int = 2) -> None:
        worker = Worker(scripted(generate), waiting=waiting)
        worker.start()
        try:
            asyncio.run(asyncio.wait_for(test(worker), 20))
        finally:
            worker.stop()
        assert not worker.alive

    return run


def test_places_are_bounded_and_come_back(run: Callable[..., None]) -> None:
    async def test(worker: Worker) -> None:
        jobs = [worker.admit() for _ in range(3)]
        with pytest.raises(Busy, match="3 requests are already waiting"):
            worker.admit()
        for job in jobs:
            job.close()
            job.close()
        assert worker.running == 0
        worker.admit().close()

    run(test)


def test_closing_stops_the_computation_and_the_next_one_runs(run: Callable[..., None]) -> None:
    async def test(worker: Worker) -> None:
        for _ in range(50):
            job = worker.admit()
            job.start([1], Sampling())
            assert (await job.next()) == Piece("x", 1)
            job.close()
        assert worker.running == 0

    run(test)


def test_a_slow_reader_does_not_keep_the_place_of_a_finished_computation(run: Callable[..., None]) -> None:
    def three(prompt: list[int], cancelled: Callable[[], bool]) -> Iterator[Piece]:
        yield from (Piece("a", 1), Piece("b", 2), Piece("c", 3, "length"))

    async def test(worker: Worker) -> None:
        job = worker.admit()
        job.start([1], Sampling())
        while worker.running:
            await asyncio.sleep(0.001)
        assert [await job.next() for _ in range(4)][-2:] == [Piece("c", 3, "length"), None]

    run(test, three)


def test_an_error_reaches_its_own_request_only(run: Callable[..., None]) -> None:
    def odd(prompt: list[int], cancelled: Callable[[], bool]) -> Iterator[Piece]:
        if prompt[0] % 2:
            raise ValueError("odd")
        yield Piece("even", 1, "stop")

    async def test(worker: Worker) -> None:
        for number in range(4):
            job = worker.admit()
            job.start([number], Sampling())
            if number % 2:
                with pytest.raises(ValueError, match="odd"):
                    await job.next()
            else:
                assert await job.next() == Piece("even", 1, "stop")
            job.close()

    run(test, odd)


def test_a_disconnect_ends_a_request_that_waits(run: Callable[..., None]) -> None:
    async def test(worker: Worker) -> None:
        first, second = worker.admit(), worker.admit()
        first.start([1], Sampling())
        second.start([2], Sampling())
        gone = asyncio.Event()

        async def receive() -> dict[str, Any]:
            await gone.wait()
            return {"type": "http.disconnect"}

        second.watch(receive)
        gone.set()
        assert await second.next() is None
        second.close()
        assert await first.next() is not None
        first.close()

    run(test)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_model_thread_that_dies_is_seen_and_leaves_nobody_waiting(run: Callable[..., None]) -> None:
    def dying(prompt: list[int], cancelled: Callable[[], bool]) -> Iterator[Piece]:
        raise SystemExit
        yield

    async def test(worker: Worker) -> None:
        first, second = worker.admit(), worker.admit()
        second_started = threading.Event()
        first.start([1], Sampling())
        second.start([2], Sampling())
        second_started.set()
        for job in (first, second):
            with pytest.raises(LlmosError, match="stopped"):
                await job.next()
        assert not worker.alive
        with pytest.raises(LlmosError, match="stopped"):
            worker.admit()

    run(test, dying)


def test_stopping_cancels_what_computes(run: Callable[..., None]) -> None:
    async def test(worker: Worker) -> None:
        job = worker.admit()
        job.start([1], Sampling())
        await job.next()
        await asyncio.to_thread(worker.stop)
        while await job.next() is not None:
            pass

    run(test)
