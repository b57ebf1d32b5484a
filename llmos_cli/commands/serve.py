"""`llmos serve`: answer requests over HTTP, straight from the store."""

import shlex
from typing import Annotated

import typer

from llmos_cli.ui.session import session
from llmos_cli.ui.text import duration, size


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

    Routes: /v1/models, /v1/completions, /v1/chat/completions (both also as streams), /health. One request computes at
    a time, 16 wait, more get 503. Ctrl-C lets those that run finish.

    Examples:
      llmos serve tiny
      llmos serve tiny-int8 --port 8080
      llmos serve @3f2a9c01 --port 0 --json
    """
    import json
    import time
    from contextlib import closing

    from llmos_cli.serve.server import HttpServer, allowed_hosts, bind, url_of
    from llmos_cli.store.leases import hold
    from llmos_cli.store.resolve import resolve

    here = session(ctx)
    out = here.out

    def fault(text: str) -> None:
        for line in [text] if out.json else text.splitlines():
            out.warn(line)

    with here.open_store() as store, closing(bind(host, port, insecure=insecure)) as bound:
        found = resolve(store, ref)
        with hold(store, "serve", [found.id]):
            out.say(f"loading {found.label} @{found.id.short}")
            from llmos_cli.serve.app import Served, build_app
            from llmos_cli.serve.load import check_servable, load_engine
            from llmos_cli.serve.worker import Worker

            manifest = check_servable(store, found)
            loaded = load_engine(store, manifest, out.progress)
            warm_seconds = loaded.engine.warm_up()
            url = url_of(bound)

            def ready() -> None:
                out.result(
                    {
                        "url": url,
                        "id": str(found.id),
                        "ref": found.label,
                        "kind": manifest.kind,
                        "device": loaded.device,
                        "context": loaded.engine.context,
                        "seconds": {
                            "tokenizer": round(loaded.tokenizer_seconds, 3),
                            "model": round(loaded.model_seconds, 3),
                            "warm_up": round(warm_seconds, 3),
                        },
                    }
                )
                out.text(f"{url}\n")
                out.say(
                    f"serving {found.label}, {size(manifest.size)}, context {loaded.engine.context} tokens, on "
                    f"{loaded.device}: tokenizer {duration(loaded.tokenizer_seconds)}, weights "
                    f"{duration(loaded.model_seconds)}, first tokens {duration(warm_seconds)}"
                )
                body = json.dumps({"model": found.label, "prompt": "import ", "max_tokens": 16})
                out.hint(f"curl {url}/v1/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}")

            worker = Worker(loaded.engine)
            worker.start()
            try:
                app = build_app(
                    worker,
                    Served(found.label, found.id, int(time.time())),
                    hosts=allowed_hosts(bound, host),
                    fault=fault,
                    access=out.detail if here.verbose else None,
                )
                HttpServer(app, bound, ready).run()
            finally:
                worker.stop()
