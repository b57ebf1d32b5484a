"""What every request passes before it reaches a route: who may ask, how much, and what a fault looks like.

On a loopback bind only loopback names are answered (a web page that resolves its own name to 127.0.0.1 is not), and
requests of other web origins are refused everywhere. A fault inside is reported to whoever runs the server and shown
to the client as a fixed text with a request id.
"""

import asyncio
import hashlib
import hmac
import time
import traceback
import uuid
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Final

from llmos_cli.errors import Damaged, LlmosError
from llmos_cli.formats import canonical
from llmos_cli.serve.wire import ApiError, encode

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

BODY_BYTES: Final = 4 << 20
BODY_SECONDS: Final = 60.0
REQUESTS: Final = 128  # at once, each with at most BODY_BYTES
RETRY: Final = {"retry-after": "1"}
CLOSE: Final = {"connection": "close"}  # the rest of the body is not read


@dataclass(frozen=True)
class Answered:
    """A request that is over: `status` 0 if nothing was sent, `told` what its route says of it (tokens, not text)."""

    id: str
    method: str
    path: str
    status: int
    seconds: float
    told: Mapping[str, Any]


class Guard:
    """Wraps the application; `hosts` None means that any Host header is answered, `key` None that anybody is."""

    def __init__(
        self,
        app: App,
        *,
        hosts: frozenset[str] | None,
        key: bytes | None = None,
        fault: Callable[[str], None],
        answered: Callable[[Answered], None] = lambda _: None,
    ) -> None:
        self._app = app
        self._hosts = hosts
        self._key = None if key is None else hashlib.sha256(key).digest()
        self._fault = fault
        self._answered = answered
        self._requests = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"only HTTP is served, not {scope['type']}")
        request_id = f"req-{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        started, status = time.perf_counter(), 0

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", request_id.encode())]}
            await send(message)

        self._requests += 1
        try:
            self._admit(scope)
            await self._app(scope, receive, tagged)
        except ApiError as error:
            await _answer(error, tagged)
        except asyncio.CancelledError:
            # the server stops and this request has not finished in time
            if not status:
                await _answer(shutting_down(), tagged)
        except Exception as exc:  # noqa: BLE001 - the one place where a fault of a request ends
            self._fault(fault_text(request_id, exc))
            if not status:
                await _answer(internal_error(request_id), tagged)
        finally:
            self._requests -= 1
            seconds = time.perf_counter() - started
            self._answered(
                Answered(request_id, scope["method"], scope["path"], status, seconds, scope["state"].get("told", {}))
            )

    def _admit(self, scope: Message) -> None:
        if self._requests > REQUESTS:
            raise ApiError(
                503, "too many requests at once", kind="server_error", code="overloaded", headers=RETRY | CLOSE
            )
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if self._key is not None and scope["path"] != "/health":
            self._check_key(headers.get(b"authorization", ""))
        host = headers.get(b"host", "")
        if self._hosts is not None and host_name(host) not in self._hosts:
            raise ApiError(
                403,
                "this server answers only to the name it is bound to (localhost); the Host header has another name",
                kind="permission_error",
                code="host_not_allowed",
                headers=CLOSE,
            )
        origin = headers.get(b"origin")
        if origin is not None and origin.lower().partition("://")[2] != host.lower():
            raise ApiError(
                403,
                "requests of web pages from other origins are not answered",
                kind="permission_error",
                code="origin_not_allowed",
                headers=CLOSE,
            )

    def _check_key(self, header: str) -> None:
        scheme, _, key = header.partition(" ")
        given = hashlib.sha256(key.strip().encode("latin-1")).digest()  # of one length: comparing tells nothing
        if scheme.lower() != "bearer" or not hmac.compare_digest(given, self._key or b""):
            raise ApiError(
                401,
                "this server answers only with its API key: send the header Authorization: Bearer KEY",
                kind="authentication_error",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer", **CLOSE},
            )


def host_name(header: str) -> str:
    """The name in a Host header, lower case, without the port."""
    name, separator, port = header.strip().lower().rpartition(":")
    return name if separator and port.isdigit() else header.strip().lower()


def fault_text(request_id: str, exc: Exception) -> str:
    """What whoever runs the server should know of a fault."""
    if isinstance(exc, LlmosError):
        return f"request {request_id} failed: {exc.message}"
    return f"request {request_id} failed; this is a bug in llmos\n{''.join(traceback.format_exception(exc))}"


def internal_error(request_id: str) -> ApiError:
    return ApiError(500, f"internal error; request id {request_id}", kind="server_error", code="internal_error")


def shutting_down() -> ApiError:
    return ApiError(
        503, "the server is shutting down", kind="server_error", code="shutting_down", headers=RETRY | CLOSE
    )


async def read_json(headers: Any, receive: Receive) -> Any:
    """The JSON of a request's body; bounded in size, time and depth. Raises ApiError."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # a web page may send other types to another origin without asking first
        raise ApiError(415, "the Content-Type must be application/json", code="unsupported_media_type", headers=CLOSE)
    if headers.get("content-length", "0").isdigit() and int(headers.get("content-length", "0")) > BODY_BYTES:
        raise _too_large()
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ApiError(400, "the client has gone")
                body += message.get("body", b"")
                if len(body) > BODY_BYTES:
                    raise _too_large()
                more = message.get("more_body", False)
    except TimeoutError:
        raise ApiError(
            408, f"the request body did not arrive within {BODY_SECONDS:.0f} seconds", code="timeout", headers=CLOSE
        ) from None
    try:
        return canonical.loads(bytes(body), "the request body")
    except Damaged as exc:
        raise ApiError(400, exc.message, param="body", code="invalid_json") from exc


def _too_large() -> ApiError:
    return ApiError(413, f"the request body is over {BODY_BYTES} bytes", param="body", code="too_large", headers=CLOSE)


async def _answer(error: ApiError, send: Send) -> None:
    body = encode(error.body)
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
