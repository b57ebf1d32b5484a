"""A proxy that spoils what passes through it: in front of a real server it is a bad network and a broken gateway.

`FaultProxy` answers on loopback and forwards to one server. A `Fault` says what goes wrong with which requests, and how
often; the first one that matches a request is used. `seen` notes every request, so that tests can count them.
"""

import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final
from urllib.parse import urlsplit

BLOCK: Final = 64 * 1024
_HOP: Final = {"connection", "keep-alive", "transfer-encoding", "content-length", "te", "upgrade"}


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]
    size: int

    @property
    def is_list(self) -> bool:
        return self.method == "GET" and ("list-type=" in self.path or "comp=list" in self.path)


@dataclass
class Fault:
    """What to do to requests that `where` picks, `times` often (None: for ever).

    `forward`: whether the server gets the request although the client is told `status`, or nothing (`status` 0: the
    connection is reset). The others spoil the answer: `cut` resets the connection after so many bytes of the body,
    `drip` sends so many bytes a second, `stall` sends the head and then nothing, `change` makes another body (with
    status 200). `delay` waits first; `strip` takes a header out of the request; `stale` answers as the first time;
    `swallow` resets the connection after so many bytes of the request's body.
    """

    where: Callable[[Request], bool] = lambda request: True
    times: int | None = None
    status: int | None = None
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    forward: bool = False
    cut: int | None = None
    drip: int | None = None
    stall: bool = False
    change: Callable[[bytes], bytes] | None = None
    delay: float = 0.0
    strip: str = ""
    stale: bool = False
    swallow: int | None = None
    hits: int = 0


@dataclass(frozen=True)
class _Answer:
    status: int
    headers: list[tuple[str, str]]
    body: bytes


class FaultProxy:
    """`url` is where it answers; faults may be changed at any time."""

    def __init__(self, upstream: str) -> None:
        parts = urlsplit(upstream)
        self._upstream = (parts.hostname or "", parts.port or 80)
        self.faults: list[Fault] = []
        self.seen: list[Request] = []
        self._lock = threading.Lock()
        self._first: dict[str, _Answer] = {}
        self._closing = threading.Event()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def forget(self) -> None:
        """No more faults, and nothing seen yet."""
        self.faults, self.seen = [], []

    def count(self, method: str | None = None) -> int:
        return sum(method in (None, request.method) for request in self.seen)

    def choose(self, request: Request) -> Fault:
        with self._lock:
            self.seen.append(request)
            for fault in self.faults:
                if fault.where(request) and (fault.times is None or fault.hits < fault.times):
                    fault.hits += 1
                    return fault
        return Fault()

    def ask(self, request: Request, body: bytes) -> _Answer:
        """The server's own answer."""
        upstream = http.client.HTTPConnection(*self._upstream, timeout=60)
        try:
            upstream.putrequest(request.method, request.path, skip_host=True, skip_accept_encoding=True)
            for name, value in request.headers.items():
                if name.lower() not in _HOP:
                    upstream.putheader(name, value)
            upstream.putheader("Content-Length", str(len(body)))
            upstream.endheaders(body)
            response = upstream.getresponse()
            data = response.read()
            return _Answer(response.status, response.getheaders(), data)
        finally:
            upstream.close()

    def first(self, request: Request, answer: _Answer) -> _Answer:
        with self._lock:
            return self._first.setdefault(request.path, answer)

    def wait(self, seconds: float) -> None:
        self._closing.wait(seconds)

    @property
    def closing(self) -> bool:
        return self._closing.is_set()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is none of our business."""


class _Handler(BaseHTTPRequestHandler):
    owner: FaultProxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def _serve(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        headers = dict(self.headers.items())
        request = Request(self.command, self.path, headers, size)
        fault = self.owner.choose(request)
        if fault.swallow is not None:
            self.rfile.read(min(size, fault.swallow))
            return self._reset()
        body = self.rfile.read(size)
        if fault.delay:
            self.owner.wait(fault.delay)
        if fault.strip:
            headers = {name: value for name, value in headers.items() if name.lower() != fault.strip.lower()}
            request = Request(self.command, self.path, headers, size)
        if fault.status is not None:
            if fault.forward:
                self.owner.ask(request, body)
            if fault.status == 0:
                return self._reset()
            return self._answer(_Answer(fault.status, list(fault.headers.items()), fault.body), Fault())
        answer = self.owner.ask(request, body)
        if fault.stale:
            answer = self.owner.first(request, answer)
        elif request.is_list:
            self.owner.first(request, answer)
        if fault.change:
            answer = _Answer(answer.status, answer.headers, fault.change(answer.body))
        return self._answer(answer, fault)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do_PROPFIND = _serve  # noqa: N815

    def _answer(self, answer: _Answer, fault: Fault) -> None:
        self.send_response_only(answer.status)
        length = str(len(answer.body))
        for name, value in answer.headers:
            if name.lower() == "content-length" and self.command == "HEAD":
                length = value
            elif name.lower() not in _HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.flush()
        if self.command == "HEAD":
            return
        if fault.stall:
            while not self.owner.closing:
                self.owner.wait(0.1)
            return self._reset()
        if fault.cut is not None:
            self.wfile.write(answer.body[: fault.cut])
            self.wfile.flush()
            return self._reset()
        for start in range(0, len(answer.body), fault.drip or BLOCK):
            self.wfile.write(answer.body[start : start + (fault.drip or BLOCK)])
            if fault.drip and not self.owner.closing:
                self.wfile.flush()
                self.owner.wait(1.0)

    def _reset(self) -> None:
        """Close with RST, as a router does that has lost the connection."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()


@contextmanager
def fault_proxy(upstream: str) -> Iterator[FaultProxy]:
    proxy = FaultProxy(upstream)
    try:
        yield proxy
    finally:
        proxy.close()


def flipped(data: bytes) -> bytes:
    """One bit of the middle byte is wrong."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :] if data else data


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for something that another process does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
