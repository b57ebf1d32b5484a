"""One thread that computes, and the way to it: the bridge from requests on an event loop to the engine.

The engine's slots and `waiting` places more are all there are; further requests are refused, so memory is bounded. A
request whose client has gone stops within one step, or never begins. An error belongs to its request.
"""

import asyncio
import queue
import threading
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextlib import suppress
from typing import Any

from llmos_cli.errors import Busy, LlmosError
from llmos_cli.serve.engine import Engine
from llmos_cli.serve.sampling import Sampling
from llmos_cli.serve.scheduler import Request
from llmos_cli.serve.sequence import Grammar, Piece

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class Worker:
    """Start it, `admit` requests from the event loop, stop it. `running` counts the places that are taken."""

    def __init__(self, engine: Engine, *, waiting: int = 64) -> None:
        self.engine = engine
        self.waiting = waiting
        self.running = 0
        self._inbox: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
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
        self._inbox.put(None)
        self._thread.join(timeout)

    def admit(self, texts: int = 1) -> "Job":
        """Take the places of a request (call it on the event loop); raises Busy when there are not so many."""
        if not self.alive:
            raise LlmosError("the model thread has stopped")
        if self.running + texts > self.engine.runner.slots + self.waiting:
            raise Busy(f"{self.running} requests are already waiting for the model")
        self.running += texts
        return Job(self, texts)

    def submit(self, request: Request) -> None:
        self._inbox.put(request)

    def stopping(self) -> bool:
        return self._stopping.is_set()

    def _run(self) -> None:
        busy = False
        try:
            while not self._stopping.is_set():
                self._receive(wait=not busy)
                busy = self.engine.step()
        finally:
            died = not self._stopping.is_set()
            self._stopping.set()
            self._receive(wait=False)
            self.engine.drop_all(LlmosError("the model thread has stopped") if died else None)

    def _receive(self, *, wait: bool) -> None:
        with suppress(queue.Empty):
            while True:
                request = self._inbox.get(block=wait)
                wait = False
                if request is not None:
                    self.engine.add(request)


class Job:
    """One request's places: `start` it, await `next` until it gives None, and `close` it whatever happens.

    The places are given back when the computation has ended, even if its reader is slow, or when the job is closed.
    """

    def __init__(self, worker: Worker, texts: int) -> None:
        self._worker, self._texts = worker, texts
        self._loop = asyncio.get_running_loop()
        self._results: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()
        self._cancelled = threading.Event()
        self._watcher: asyncio.Task[None] | None = None
        self._places = self._left = texts

    def start(self, prompt: Sequence[int], sampling: Sampling, grammar: Callable[[], Grammar] | None = None) -> None:
        """Queue the computation of each text."""
        for index in range(self._texts):
            request = self._worker.engine.request(
                prompt,
                sampling.of_text(index),
                self._post,
                cancelled=self.cancelled,
                failed=self._post,
                left=self._text_left,
                grammar=None if grammar is None else grammar(),
                index=index,
            )
            self._worker.submit(request)

    def watch(self, receive: Receive) -> None:
        """Cancel when the client disconnects; the request's body must have been read."""
        self._watcher = self._loop.create_task(self._until_disconnect(receive))

    async def next(self) -> Piece | None:
        """The next piece of any of the texts, or None when there is no more."""
        result = await self._results.get()
        if isinstance(result, Exception):
            raise result
        return result

    def close(self) -> None:
        """Give the places back and stop the computation if it still goes on; may be called twice."""
        self._cancelled.set()
        self._give_back(self._places)
        if self._watcher is not None:
            self._watcher.cancel()

    def cancelled(self) -> bool:
        return self._cancelled.is_set() or self._worker.stopping()

    async def _until_disconnect(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._cancelled.set()
        self._results.put_nowait(None)

    def _post(self, result: Piece | Exception | None) -> None:
        with suppress(RuntimeError):  # the event loop has closed: nobody waits
            self._loop.call_soon_threadsafe(self._results.put_nowait, result)

    def _text_left(self) -> None:
        """Run on the model thread."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._one_over)

    def _one_over(self) -> None:
        self._give_back(min(1, self._places))
        self._left -= 1
        if not self._left:
            self._results.put_nowait(None)

    def _give_back(self, places: int) -> None:
        self._places -= places
        self._worker.running -= places
