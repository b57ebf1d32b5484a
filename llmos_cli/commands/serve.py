"""`llmos serve`: answer requests over HTTP, straight from the store."""

import json
import shlex
import time
from typing import TYPE_CHECKING, Annotated

import typer

from llmos_cli.ui.session import Session, session
from llmos_cli.ui.text import duration, size

if TYPE_CHECKING:
    from socket import socket

    from llmos_cli.formats.manifest import Manifest
    from llmos_cli.store.local import Store
    from llmos_cli.store.refs.resolve import Resolved


def serve(
    ctx: typer.Context,
    ref: Annotated[str, typer.Argument(metavar="REF", help="A model or a checkpoint.", show_default=False)],
    *,
    host: Annotated[str, typer.Option("--host", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8000,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Allow an address that others can reach; there is no authentication.")
    ] = False,
) -> None:
    """Answer OpenAI-style requests with a model, without checking it out.

    Routes: /v1/models, /v1/completions, /v1/chat/completions (both also as streams), /health. Sixteen texts are made
    at once, 64 wait, more get 503. Ctrl-C lets those that run finish.

    Examples:
      llmos serve tiny
      llmos serve tiny-int8 --port 8080
      llmos serve @3f2a9c01 --port 0 --json
    """
    from contextlib import closing

    from llmos_cli.serve.servable import check_servable
    from llmos_cli.serve.server import bind
    from llmos_cli.store.leases import hold
    from llmos_cli.store.refs.resolve import resolve

    here = session(ctx)
    with here.open_store() as store, closing(bind(host, port, insecure=insecure)) as bound:
        found = resolve(store, ref)
        with hold(store, "serve", [found.id]):
            _serve(here, store, found, check_servable(store, found), bound, host)


def _serve(here: Session, store: "Store", found: "Resolved", manifest: "Manifest", bound: "socket", host: str) -> None:
    started = time.perf_counter()
    here.out.say(f"loading {found.label} @{found.id.short}")
    from llmos_cli.serve.app import Served, build_app
    from llmos_cli.serve.load import load_engine
    from llmos_cli.serve.server import HttpServer, allowed_hosts, url_of
    from llmos_cli.serve.worker import Worker

    seconds = {"libraries": time.perf_counter() - started}
    loaded = load_engine(store, manifest, here.out.progress)
    seconds |= loaded.seconds
    seconds["first_tokens"] = loaded.engine.warm_up()
    url = url_of(bound)
    result = {
        "url": url,
        "id": str(found.id),
        "ref": found.label,
        "kind": manifest.kind,
        "device": loaded.device,
        "context": loaded.engine.context,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }

    def ready() -> None:
        spent = ", ".join(f"{name.replace('_', ' ')} {duration(value)}" for name, value in seconds.items())
        body = json.dumps({"model": found.label, "prompt": "import ", "max_tokens": 16})
        here.out.result(result)
        here.out.text(f"{url}\n")
        here.out.say(
            f"serving {found.label}, {size(manifest.size)} on {loaded.device}, "
            f"context {loaded.engine.context} tokens; {spent}"
        )
        here.out.hint(f"curl {url}/v1/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}")

    def fault(text: str) -> None:
        for line in [text] if here.json else text.splitlines():
            here.out.warn(line)

    worker = Worker(loaded.engine)
    app = build_app(
        worker,
        Served(found.label, found.id, int(time.time())),
        hosts=allowed_hosts(bound, host),
        fault=fault,
        access=here.out.detail if here.verbose else None,
    )
    worker.start()
    try:
        HttpServer(app, bound, ready).run()
    finally:
        worker.stop()
