"""One thread that computes, and the queue before it: the bridge from requests on an event loop to the engine.

At most `waiting` requests wait while one computes; more are refused, so memory is bounded. A request whose client has
gone stops within one step, and is skipped if it has not begun. An error belongs to its request; the next one is served.
"""

import asyncio
import queue
import threading
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextlib import suppress
from typing import Any

from llmos_cli.errors import Busy, LlmosError
from llmos_cli.serve.engine import Engine, Piece
from llmos_cli.serve.sampling import Sampling

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class Worker:
    """Start it, `admit` requests from the event loop, stop it. `running` counts the places that are taken."""

    def __init__(self, engine: Engine, *, waiting: int = 16) -> None:
        self.engine = engine
        self.waiting = waiting
        self.running = 0
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="llmos-model", daemon=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping.is_set()

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float = 10.0) -> None:
        """Cancel what computes and wait for the thread."""
        self._stopping.set()
        self._jobs.put(None)
        self._thread.join(timeout)

    def admit(self) -> "Job":
        """Take a place for one request (call it on the event loop); raises Busy when all are taken."""
        if not self.alive:
            raise LlmosError("the model thread has stopped")
        if self.running > self.waiting:
            raise Busy(f"{self.waiting} requests are already waiting for the model")
        self.running += 1
        return Job(self)

    def submit(self, job: "Job") -> None:
        self._jobs.put(job)

    def stopping(self) -> bool:
        return self._stopping.is_set()

    def _run(self) -> None:
        try:
            while (job := self._jobs.get()) is not None:
                job.compute()
        finally:
            self._stopping.set()
            with suppress(queue.Empty):
                while True:
                    left = self._jobs.get_nowait()
                    if left is not None:
                        left.fail(LlmosError("the model thread has stopped"))


class Job:
    """One request's place: `start` it, await `next` until it gives None, and `close` it whatever happens.

    The place is given back when the computation has ended, even if its reader is slow, or when the job is closed.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        self._results: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()
        self._cancelled = threading.Event()
        self._watcher: asyncio.Task[None] | None = None
        self._open = True
        self._prompt: list[int] = []
        self._sampling = Sampling()

    def start(self, prompt: Sequence[int], sampling: Sampling) -> None:
        """Queue the computation."""
        self._prompt, self._sampling = list(prompt), sampling
        self._worker.submit(self)

    def watch(self, receive: Receive) -> None:
        """Cancel when the client disconnects; the request's body must have been read."""
        self._watcher = self._loop.create_task(self._until_disconnect(receive))

    async def next(self) -> Piece | None:
        """The next piece, or None when there is no more (cancelled, or the piece before had a finish reason)."""
        result = await self._results.get()
        if isinstance(result, Exception):
            raise result
        return result

    def close(self) -> None:
        """Give the place back and stop the computation if it still goes on; may be called twice."""
        self._cancelled.set()
        self._give_back()
        if self._watcher is not None:
            self._watcher.cancel()

    def cancelled(self) -> bool:
        return self._cancelled.is_set() or self._worker.stopping()

    def compute(self) -> None:
        """Run on the model thread."""
        try:
            for piece in self._worker.engine.generate(self._prompt, self._sampling, self.cancelled):
                self._post(piece)
        except Exception as exc:  # noqa: BLE001 - it is raised again where the request is awaited
            self._post(exc)
        finally:
            self._post(None)

    def fail(self, error: Exception) -> None:
        self._post(error)

    async def _until_disconnect(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._cancelled.set()
        self._results.put_nowait(None)

    def _post(self, result: Piece | Exception | None) -> None:
        with suppress(RuntimeError):  # the event loop has closed: nobody waits
            self._loop.call_soon_threadsafe(self._take, result)

    def _take(self, result: Piece | Exception | None) -> None:
        if not isinstance(result, Piece) or result.finish_reason is not None:
            self._give_back()
        self._results.put_nowait(result)

    def _give_back(self) -> None:
        if self._open:
            self._open = False
            self._worker.running -= 1
