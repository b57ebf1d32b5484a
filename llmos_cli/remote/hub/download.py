"""HTTP for reading from a hub: what may be asked, where it may lead, how long it is waited for.

Only http and https are spoken. A redirect is followed to another public host, never to a file, to plain http from
https, or to an address inside the network or the machine, unless the hub itself is there; which address a name stands
for is looked at once the connection is made. The token goes to the hub and to no other host. A request that fails for
a moment is sent again, with growing pauses, for a bounded time without progress.
"""

import http.client
import ipaddress
import random
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeVar
from urllib.error import URLError
from urllib.parse import SplitResult, urljoin, urlsplit

from llmos_cli.errors import LlmosError, RemoteUnavailable, Unsafe

_REDIRECTS: Final = (301, 302, 303, 307, 308)
_MOST_REDIRECTS: Final = 8
_BLOCK_BYTES: Final = 1 << 20
_PROGRESS_BYTES: Final = 1 << 20  # fewer than that are no progress: a drip would be waited for for ever
_PORTS: Final = {"http": 80, "https": 443}
Result = TypeVar("Result")


@dataclass(frozen=True)
class Patience:
    """Seconds: `budget` without progress, `first` the same until the hub has answered once, `stall` without a byte;
    `slow` bytes a second over `stall` seconds are as good as none. `pause` before the first repetition."""

    budget: float = 90.0
    first: float = 15.0
    stall: float = 30.0
    slow: float = 1024.0
    pause: float = 0.5


class Passing(Exception):
    """A failure that may be over in a moment; `after` are the seconds that the other side asks us to wait."""

    def __init__(self, why: str, after: float = 0.0) -> None:
        super().__init__(why)
        self.why = why
        self.after = after


@dataclass(frozen=True)
class Answer:
    """The head of an answer, and its body to be read once."""

    status: int
    headers: Mapping[str, str]
    body: Callable[[], Iterator[bytes]]

    def header(self, name: str) -> str:
        return self.headers.get(name.lower(), "")


class Web:
    """Reads from the hub at `endpoint`, with its `token`. May be used from several threads; `stop` ends them all."""

    def __init__(self, endpoint: str, token: str | None, patience: Patience | None = None) -> None:
        self.endpoint = endpoint.rstrip("/")
        self._origin = _origin(_split(self.endpoint))
        self._token = token
        self._patience = patience or Patience()
        self._answered = False
        self._local = False  # the hub itself is inside the network
        self._stop = threading.Event()

    def stop(self) -> None:
        self._stop.set()

    @contextmanager
    def get(self, url: str, start: int = 0) -> Iterator[Answer]:
        """Ask once for what is at a URL of the hub, from byte `start`; redirects are followed.

        Raises Passing, or Unsafe for a redirect that must not be followed."""
        for _ in range(_MOST_REDIRECTS):
            parts = _split(url)
            self._check(parts)
            with self._request(url, parts, start) as answer:
                if answer.status not in _REDIRECTS:
                    self._answered = True
                    if answer.status in (408, 429) or answer.status >= 500:
                        raise Passing(f"it answered {answer.status}", _seconds(answer.header("Retry-After")))
                    yield answer
                    return
                location = answer.header("Location")
            if not location.isprintable() or not location:
                raise Passing(f"it answered {answer.status} without saying where to go")
            url = urljoin(url, location)
        raise Passing(f"it redirects more than {_MOST_REDIRECTS} times")

    def persist(self, what: str, attempt: Callable[[], Result], arrived: Callable[[], int] = lambda: 0) -> Result:
        """Attempt until it works. Raises RemoteUnavailable once that has failed for too long while no more than before
        had `arrived`."""
        pause, before, since = self._patience.pause, arrived(), time.monotonic()
        while True:
            try:
                return attempt()
            except Passing as exc:
                if arrived() >= before + _PROGRESS_BYTES:
                    pause, before, since = self._patience.pause, arrived(), time.monotonic()
                wait = max(exc.after, pause * random.uniform(0.5, 1.5))
                budget = self._patience.budget if self._answered else self._patience.first
                if time.monotonic() + wait - since > budget:
                    asks = f"; it asks to wait {exc.after:.0f} seconds" if exc.after > pause else ""
                    raise RemoteUnavailable(
                        f"{self.endpoint} does not serve {what}: {exc.why}{asks}",
                        hint="run the command again later: it goes on from what has arrived",
                    ) from exc
            self._stop.wait(wait)
            self._check_stopped()
            pause = min(2 * pause, 10.0)

    def _check(self, parts: SplitResult) -> None:
        """Before anything is connected to."""
        where = f"{parts.scheme}://{parts.hostname or ''}"[:200]
        if parts.scheme not in _PORTS or not parts.hostname or parts.username is not None:
            raise self._astray(where)
        if _origin(parts) == self._origin:
            return
        if parts.scheme == "http" and self._origin[0] == "https":
            raise self._astray(f"{where}, which is not encrypted")
        try:
            address = ipaddress.ip_address(parts.hostname)
        except ValueError:
            return
        self._check_address(address, where)

    def _check_address(self, address: ipaddress.IPv4Address | ipaddress.IPv6Address, where: str) -> None:
        inner = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        address = inner or address
        if not address.is_global and (address.is_link_local or not self._local):
            raise self._astray(f"{where} ({address}), which is inside the network")

    def _astray(self, where: str) -> Unsafe:
        return Unsafe(
            f"{self.endpoint} redirects to {where}: not followed", hint="check HF_ENDPOINT, and who answers there"
        )

    @contextmanager
    def _request(self, url: str, parts: SplitResult, start: int) -> Iterator[Answer]:
        headers = {"Accept-Encoding": "identity", "User-Agent": "llmos"}
        if start:
            headers["Range"] = f"bytes={start}-"
        ours = _origin(parts) == self._origin
        if ours and self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        request = urllib.request.Request(url, headers=headers)
        opener = urllib.request.OpenerDirector()
        check = self._peer_check(parts, ours)
        for handler in (urllib.request.ProxyHandler(), _Http(check), _Https(check)):
            opener.add_handler(handler)
        with _passing(parts.hostname or ""), opener.open(request, timeout=self._patience.stall) as response:
            names = {name.lower(): value for name, value in response.headers.items()}
            yield Answer(response.status, names, lambda: self._body(response))

    def _peer_check(self, parts: SplitResult, ours: bool) -> "Check":
        def check(sock: socket.socket) -> None:
            address = ipaddress.ip_address(str(sock.getpeername()[0]).partition("%")[0])
            if ours:
                self._local = not address.is_global
            else:
                self._check_address(address, f"{parts.scheme}://{parts.hostname}")

        return check

    def _body(self, response: http.client.HTTPResponse) -> Iterator[bytes]:
        end, count = time.monotonic() + self._patience.stall, 0
        while True:
            self._check_stopped()
            block = response.read1(_BLOCK_BYTES)
            if not block:
                return
            yield block
            count += len(block)
            if time.monotonic() > end:
                if count < self._patience.slow * self._patience.stall:
                    raise Passing(f"only {count} bytes came in {self._patience.stall:.0f} seconds")
                end, count = time.monotonic() + self._patience.stall, 0

    def _check_stopped(self) -> None:
        if self._stop.is_set():
            raise LlmosError("stopped")


Check = Callable[[socket.socket], None]


class _Http(urllib.request.HTTPHandler):
    def __init__(self, check: Check) -> None:
        super().__init__()
        self._check = check

    def http_open(self, req: urllib.request.Request) -> Any:
        check = None if _is_proxied(req) else self._check
        return self.do_open(lambda host, **more: _HttpConnection(host, check, **more), req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, check: Check) -> None:
        super().__init__()
        self._check = check

    def https_open(self, req: urllib.request.Request) -> Any:
        check = None if _is_proxied(req) else self._check
        return self.do_open(lambda host, **more: _HttpsConnection(host, check, **more), req)


class _HttpConnection(http.client.HTTPConnection):
    """Looks at whom it is connected to before it sends anything."""

    def __init__(self, host: str, check: Check | None, **more: Any) -> None:
        super().__init__(host, **more)
        self._check_peer = check

    def connect(self) -> None:
        super().connect()
        if self._check_peer:
            self._check_peer(self.sock)


class _HttpsConnection(http.client.HTTPSConnection):
    """The same, encrypted."""

    def __init__(self, host: str, check: Check | None, **more: Any) -> None:
        super().__init__(host, **more)
        self._check_peer = check

    def connect(self) -> None:
        super().connect()
        if self._check_peer:
            self._check_peer(self.sock)


def _is_proxied(request: urllib.request.Request) -> bool:
    """Then the peer is the proxy, which may be inside the network."""
    return request.host != _split(request.full_url).netloc


@contextmanager
def _passing(host: str) -> Iterator[None]:
    """Turn what goes wrong on the way into Passing, but for what will not get better."""
    try:
        yield
    except LlmosError:
        raise
    except (OSError, http.client.HTTPException) as exc:
        reason = exc.reason if isinstance(exc, URLError) else exc
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise RemoteUnavailable(
                f"{host} does not prove who it is: {reason.verify_message}",
                hint="check the clock, SSL_CERT_FILE, proxies",
            ) from exc
        if isinstance(reason, TimeoutError):
            raise Passing("no answer came in time") from exc
        raise Passing(str(reason) or type(reason).__name__) from exc


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - raises for a port that is none
    except ValueError as exc:
        raise Unsafe(f"malformed URL {url[:200]!r}") from exc
    return parts


def _origin(parts: SplitResult) -> tuple[str, str, int | None]:
    return parts.scheme, parts.hostname or "", parts.port or _PORTS.get(parts.scheme)


def _seconds(text: str) -> float:
    """What a Retry-After says, if it says it in seconds."""
    return float(text) if text.isascii() and text.isdecimal() and len(text) < 7 else 0.0
