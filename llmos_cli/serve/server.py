"""The socket and the HTTP server on it: bind first, announce when ready, finish what runs when told to stop.

The socket is bound before anything slow happens, so that a taken port is known at once; it listens only when the
server answers. SIGINT and SIGTERM stop it gently, a second one at once.
"""

import errno
import ipaddress
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Final

import uvicorn

from llmos_cli.errors import (
    AccessDenied,
    Busy,
    Interrupted,
    LlmosError,
    Terminated,
    Unsafe,
    UsageError,
    from_os_error,
)
from llmos_cli.serve.guard import App

DRAIN_SECONDS: Final = 30
KEEP_ALIVE_SECONDS: Final = 15
HEADER_BYTES: Final = 64 << 10
KEY_BYTES: Final = 16


def read_key(path: Path) -> bytes:
    """The API key in a file: one line that only its owner can read; raises UsageError or Unsafe."""
    try:
        mode, key = path.stat().st_mode, path.read_bytes().strip()
    except OSError as exc:
        raise from_os_error(exc, f"reading the API key {path}") from exc
    if mode & 0o077:
        raise Unsafe(f"others can read the API key in {path}", hint=f"chmod 600 {path}")
    if len(key) < KEY_BYTES or not key.isascii() or len(key.split()) != 1:
        raise UsageError(
            f"{path} holds no API key: one word of at least {KEY_BYTES} letters is needed",
            hint=f"umask 077; python -c 'import secrets; print(secrets.token_urlsafe(32))' > {path}",
        )
    return key


def bind(host: str, port: int, *, guarded: bool = False) -> socket.socket:
    """A bound socket (`port` 0 picks a free one). Anything but a loopback address is Unsafe unless `guarded` by a
    key."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM) if host else []
    except (socket.gaierror, UnicodeError):
        found = []
    if not found:
        raise UsageError(f"{host!r} is not an address of this machine", hint="use --host 127.0.0.1")
    family, kind, protocol, _, address = min(found, key=lambda info: info[0] != socket.AF_INET)
    if not guarded and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        raise Unsafe(
            f"refused to listen on {host}: others could reach the server there, and it would answer everybody",
            hint="use --host 127.0.0.1, or give an API key with --api-key-file",
        )
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as exc:
        bound.close()
        raise _bind_error(exc, host, port) from exc
    return bound


def url_of(bound: socket.socket) -> str:
    """Where clients find a bound socket; for a wildcard address, this machine itself."""
    name, port = bound.getsockname()[:2]
    address = ipaddress.ip_address(str(name).partition("%")[0])
    if address.is_unspecified:
        address = ipaddress.ip_address("127.0.0.1" if address.version == 4 else "::1")
    return f"http://[{address}]:{port}" if address.version == 6 else f"http://{address}:{port}"


def allowed_hosts(bound: socket.socket, host: str) -> frozenset[str] | None:
    """The Host headers to answer: loopback names on a loopback bind, any (None) elsewhere."""
    name = str(bound.getsockname()[0])
    if not ipaddress.ip_address(name.partition("%")[0]).is_loopback:
        return None
    return frozenset({"localhost", "127.0.0.1", "[::1]", host.lower(), f"[{name}]" if ":" in name else name})


class HttpServer:
    """One server on a bound socket; `ready` is called once it answers."""

    def __init__(
        self, app: App, bound: socket.socket, ready: Callable[[], None], *, drain_seconds: int = DRAIN_SECONDS
    ) -> None:
        self._bound = bound
        self._server = _Server(_config(app, drain_seconds), ready)

    def run(self) -> None:
        """Serve until `stop` is called, or until a signal comes: then raise Interrupted or Terminated."""
        with _remembered_signals(self._server) as signals:
            self._server.run(sockets=[self._bound])
        if signal.SIGTERM in signals:
            raise Terminated("the server was stopped by SIGTERM")
        if signals:
            raise Interrupted("the server was stopped")

    @property
    def stopping(self) -> bool:
        """Whether it takes no more requests."""
        return self._server.should_exit

    def stop(self) -> None:
        """Take no more requests, finish those that run, and let `run` return; callable from any thread."""
        self._server.should_exit = True


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A second signal of any kind stops at once."""
        if self.should_exit:
            self.force_exit = True
        super().handle_exit(sig, frame)


def _config(app: App, drain_seconds: int) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http="h11",
        loop="asyncio",
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=drain_seconds,
        h11_max_incomplete_event_size=HEADER_BYTES,
    )


@contextmanager
def _remembered_signals(server: uvicorn.Server) -> Iterator[list[int]]:
    """uvicorn stops gently on a signal and then raises it again, to the handlers from before: these note it."""
    signals: list[int] = []

    def note(number: int, _frame: Any) -> None:
        signals.append(number)
        server.should_exit = True

    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _bind_error(exc: OSError, host: str, port: int) -> LlmosError:
    if exc.errno == errno.EADDRINUSE:
        return Busy(
            f"port {port} on {host} is taken by another program", hint="use --port 0 for a free one, or another number"
        )
    if exc.errno == errno.EACCES:
        return AccessDenied(f"port {port} needs more rights than you have", hint="use a port from 1024 up, or --port 0")
    if exc.errno == errno.EADDRNOTAVAIL:
        return UsageError(f"{host!r} is not an address of this machine", hint="use --host 127.0.0.1")
    return LlmosError(f"cannot listen on {host} port {port}: {exc.strerror or exc}")
