"""`llmos init`: make a store."""

from pathlib import Path
from typing import Annotated

import typer

from llmos_cli.ui.session import session


def init(
    ctx: typer.Context,
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="DIR", help="Where; the store is DIR/.llmos.", show_default=False, readable=False),
    ] = None,
) -> None:
    """Make a store for data, models and results.

    Without DIR it is made in the current folder as ./.llmos; with --store exactly there. A store that is already there
    stays as it is.

    Examples:
      llmos init
      llmos init /data/models
      llmos --store /data/store init
    """
    from llmos_cli.store.local import STORE_FOLDER, init_store

    here = session(ctx)
    root = here.cwd / folder / STORE_FOLDER if folder else here.cwd / (here.store_path or STORE_FOLDER)
    created = init_store(root, safe=here.safe_stores)
    here.out.result({"store": str(root), "created": created})
    here.out.line(f"made a store at {root}" if created else f"{root} is a store already")
    here.out.hint("llmos add PATH NAME keeps files in it, llmos shard TEXT NAME makes training data")
