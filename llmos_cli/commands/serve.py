"""`llmos serve`: answer requests over HTTP, straight from the store."""

import json
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from llmos_cli.errors import from_os_error
from llmos_cli.ui.session import Session, session
from llmos_cli.ui.text import duration, size

if TYPE_CHECKING:
    from socket import socket

    from llmos_cli.formats.manifest import Manifest
    from llmos_cli.serve.engine import Engine
    from llmos_cli.serve.guard import Answered
    from llmos_cli.serve.reader import Reader
    from llmos_cli.store.local import Store
    from llmos_cli.store.refs.resolve import Resolved


def serve(
    ctx: typer.Context,
    ref: Annotated[str, typer.Argument(metavar="REF", help="A model or a checkpoint.", show_default=False)],
    *,
    host: Annotated[str, typer.Option("--host", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            "--api-key-file",
            metavar="FILE",
            help="Answer only with the key in this file; an address that others can reach needs one.",
            show_default=False,
            readable=False,
        ),
    ] = None,
    drain: Annotated[
        int, typer.Option("--drain", metavar="SECONDS", min=0, help="When told to stop, let answers finish so long.")
    ] = 30,
    kernel: Annotated[
        str | None,
        typer.Option(
            "--kernel", metavar="dynamic|packed|dense", help="Of quantized weights.  [default: the fastest here]"
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", metavar="fp32|bf16", help="Of the arithmetic.  [default: the fastest here]")
    ] = None,
    request_log: Annotated[
        Path | None,
        typer.Option(
            "--request-log",
            metavar="FILE",
            help="Append a line of JSON for each request, without its text.",
            show_default=False,
            readable=False,
        ),
    ] = None,
) -> None:
    """Answer OpenAI-style requests with a model, without checking it out.

    Routes: /v1/models, /v1/completions, /v1/chat/completions (both also as streams); of an encoder /v1/embeddings, or
    /v1/classify and /v1/rerank; /health, /ready, /metrics (Prometheus). Sixteen texts are made at once, 64 wait, more
    get 503. Ctrl-C lets those that run finish, a second one stops at once.

    Examples:
      llmos serve tiny
      llmos serve tiny-int8 --port 8080
      llmos serve tiny --host 0.0.0.0 --api-key-file key.txt
    """
    from contextlib import ExitStack, closing

    from llmos_cli.serve.servable import check_pins, check_servable
    from llmos_cli.serve.server import bind, read_key
    from llmos_cli.store.leases import hold
    from llmos_cli.store.refs.resolve import resolve

    here = session(ctx)
    check_pins(kernel, dtype)
    key = None if api_key_file is None else read_key(api_key_file)
    with ExitStack() as stack:
        store = stack.enter_context(here.open_store())
        bound = stack.enter_context(closing(bind(host, port, guarded=key is not None)))
        log = None if request_log is None else stack.enter_context(_open_log(request_log))
        found = resolve(store, ref)
        stack.enter_context(hold(store, "serve", [found.id]))
        manifest = check_servable(store, found)
        _serve(here, store, found, manifest, _How(bound, host, key, drain, log, kernel, dtype))


@dataclass(frozen=True)
class _How:
    """What the options come to."""

    bound: "socket"
    host: str
    key: bytes | None
    drain: int
    log: IO[str] | None
    kernel: str | None
    dtype: str | None


def _open_log(path: Path) -> IO[str]:
    try:
        return path.open("a", encoding="utf-8", buffering=1)
    except OSError as exc:
        raise from_os_error(exc, f"opening {path}") from exc


def _serve(here: Session, store: "Store", found: "Resolved", manifest: "Manifest", how: _How) -> None:
    started = time.perf_counter()
    here.out.say(f"loading {found.label} @{found.id.short}")
    from llmos_cli.serve.app import build_app
    from llmos_cli.serve.front import Served
    from llmos_cli.serve.load import load_engine
    from llmos_cli.serve.reader import Reader, ReadingRoom
    from llmos_cli.serve.reading_app import build_reading_app
    from llmos_cli.serve.server import HttpServer, allowed_hosts, url_of
    from llmos_cli.serve.worker import Worker

    seconds = {"libraries": time.perf_counter() - started}
    loaded = load_engine(store, manifest, here.out.progress, kernel=how.kernel, dtype=how.dtype)
    seconds |= loaded.seconds
    engine = loaded.engine
    if not isinstance(engine, Reader):
        seconds["first_tokens"] = engine.warm_up()
    url = url_of(how.bound)
    result = {
        "url": url,
        "id": str(found.id),
        "ref": found.label,
        "kind": manifest.kind,
        "device": loaded.device,
        "context": loaded.engine.context,
        "slots": None if isinstance(engine, Reader) else engine.runner.slots,
        "kernels": loaded.kernels,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }

    def ready() -> None:
        spent = ", ".join(f"{name.replace('_', ' ')} {duration(value)}" for name, value in seconds.items())
        path, body = _example(engine, found.label)
        here.out.result(result)
        here.out.text(f"{url}\n")
        here.out.say(
            f"serving {found.label}, {size(manifest.size)} on {loaded.device}, context {engine.context} tokens; {spent}"
        )
        here.out.detail("computed with " + ", ".join(f"{name} {kind}" for name, kind in loaded.kernels.items()))
        here.out.hint(f"curl {url}{path} -H 'Content-Type: application/json' -d {shlex.quote(body)}")

    def fault(text: str) -> None:
        for line in [text] if here.json else text.splitlines():
            here.out.warn(line)

    def answered(request: "Answered") -> None:
        here.out.detail(f"{request.method} {request.path!r} {request.status} {request.seconds:.3f} s {request.id}")
        if how.log is not None:
            line = {"time": round(time.time(), 3), "id": request.id, "method": request.method, "path": request.path}
            line |= {"status": request.status, "seconds": round(request.seconds, 4), **request.told}
            how.log.write(json.dumps(line) + "\n")

    served = Served(found.label, found.id, int(time.time()))
    shared: dict[str, Any] = {
        "hosts": allowed_hosts(how.bound, how.host),
        "fault": fault,
        "key": how.key,
        "answered": answered,
        "draining": lambda: server.stopping,
    }
    worker: Worker | ReadingRoom
    server: HttpServer
    if isinstance(engine, Reader):
        worker = ReadingRoom(engine)
        app = build_reading_app(worker, served, **shared)
    else:
        worker = Worker(engine)
        app = build_app(worker, served, seconds=seconds, **shared)
    server = HttpServer(app, how.bound, ready, drain_seconds=how.drain)
    worker.start()
    try:
        server.run()
    finally:
        worker.stop()


def _example(engine: "Engine | Reader", label: str) -> tuple[str, str]:
    """A request that can be pasted: path and body."""
    from llmos_cli.serve.reader import Reader

    if not isinstance(engine, Reader):
        return "/v1/completions", json.dumps({"model": label, "prompt": "import ", "max_tokens": 16})
    path = "/v1/classify" if engine.classifies else "/v1/embeddings"
    return path, json.dumps({"model": label, "input": "a text"})
