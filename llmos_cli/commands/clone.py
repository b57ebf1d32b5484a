"""`llmos clone`: a new store with everything a remote has."""

import time
from pathlib import Path
from typing import Annotated

import typer

from llmos_cli.ui.session import session
from llmos_cli.ui.text import duration, plural, size


def clone(
    ctx: typer.Context,
    url: Annotated[
        str, typer.Argument(metavar="URL", help="A remote: a folder, a store, s3:, https: ...", show_default=False)
    ],
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Where; the store is DIR/.llmos.", show_default=False, readable=False),
    ],
    *,
    signed: Annotated[
        list[str] | None,
        typer.Option(
            "--require-signed",
            metavar="ed25519:KEY",
            help="Take only what the owner of this key has signed; may be given again.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Make a store in DIR with all refs of a remote.

    The new store knows the remote as 'origin'. DIR must be new or empty. A clone that was stopped is finished with
    'llmos --store DIR pull origin --all'. With --require-signed the keys are noted in its config.toml, and later pulls
    from 'origin' ask for signatures, too.

    Examples:
      llmos clone /mnt/nas/models here
      llmos clone ~/models/.llmos copy
      llmos clone "s3://bucket/models?endpoint=http://127.0.0.1:7480" copy
    """
    from llmos_cli.remote.exchange.clone import ORIGIN, execute_clone, plan_clone

    here = session(ctx)
    start = time.monotonic()
    plan = plan_clone(url, folder, here.cwd, here.out.progress, signed or ())
    done = execute_clone(plan, here.out.progress)
    seconds = time.monotonic() - start
    listed = [{"ref": str(item.ref), "id": str(item.id)} for item in done.refs]
    first = listed[0] if listed else {"ref": None, "id": None}
    here.out.result(
        {
            "store": str(plan.root),
            "remote": ORIGIN,
            "url": plan.url,
            "refs": listed,
            "id": first["id"],
            "ref": first["ref"],
            "received": done.received,
            "packs": done.packs,
            "seconds": round(seconds, 3),
        }
    )
    here.out.line(f"cloned {plural(len(listed), 'ref')}, {size(done.received)}, to {plan.root} in {duration(seconds)}")
    if not listed:
        here.out.warn(f"{plan.url} has no refs yet")
    here.out.hint(f"cd {folder}; llmos ls")
