"""A server beside other work: on a free loopback port, in a thread, for as long as a block runs."""

import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

from llmos_cli.errors import LlmosError
from llmos_cli.serve.app import build_app
from llmos_cli.serve.engine import Engine
from llmos_cli.serve.front import Served
from llmos_cli.serve.guard import Answered
from llmos_cli.serve.reader import Reader, ReadingRoom
from llmos_cli.serve.reading_app import build_reading_app
from llmos_cli.serve.server import HttpServer, allowed_hosts, bind, url_of
from llmos_cli.serve.worker import Worker

START_SECONDS = 30.0


@contextmanager
def serving(
    engine: Engine | Reader,
    served: Served,
    *,
    fault: Callable[[str], None],
    key: bytes | None = None,
    answered: Callable[[Answered], None] = lambda _: None,
    waiting: int = 64,
    drain_seconds: int = 5,
) -> Iterator[str]:
    """Answer requests while the block runs; gives the URL."""
    host = "127.0.0.1"
    with closing(bind(host, 0)) as bound:
        worker: Worker | ReadingRoom
        server: HttpServer
        how: dict[str, Any] = {
            "hosts": allowed_hosts(bound, host),
            "fault": fault,
            "key": key,
            "answered": answered,
            "draining": lambda: server.stopping,
        }
        if isinstance(engine, Reader):
            worker = ReadingRoom(engine, waiting=waiting)
            app = build_reading_app(worker, served, **how)
        else:
            worker = Worker(engine, waiting=waiting)
            app = build_app(worker, served, **how)
        started = threading.Event()
        server = HttpServer(app, bound, started.set, drain_seconds=drain_seconds)
        thread = threading.Thread(target=server.run, name="llmos-http", daemon=True)
        url = url_of(bound)
        worker.start()
        thread.start()
        try:
            if not started.wait(START_SECONDS):
                raise LlmosError(f"the server at {url} did not start within {START_SECONDS:.0f} seconds")
            yield url
        finally:
            server.stop()
            thread.join()
            worker.stop()
