"""`llmos restore`: refs, their logs and their data back from a snapshot."""

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmos_cli.ui.session import session
from llmos_cli.ui.text import duration, plural, size, when

if TYPE_CHECKING:
    from llmos_cli.remote.backup.restore import RestoredRef

_DONE = {"new": "new", "moved": "moved forward", "forced": "set back, forced"}


def restore(
    ctx: typer.Context,
    remote: Annotated[str, typer.Argument(metavar="REMOTE", help="A remote's name, or a URL.", show_default=False)],
    refs: Annotated[
        list[str] | None, typer.Argument(metavar="REF...", help="Refs to restore.  [default: all]", show_default=False)
    ] = None,
    *,
    at: Annotated[
        str | None,
        typer.Option(
            "--at",
            metavar="TIME",
            help="The newest snapshot at this time, or @ID.  [default: newest]",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Set refs back that have moved on.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
) -> None:
    """Bring back what a backup has kept.

    Into an empty store, or one in use: a ref that is not here comes back with its whole log. One that has moved on
    stays as it is and the exit code is 17, unless --force; what it held then stays in its log.

    Examples:
      llmos restore nas
      llmos restore nas --at 2026-11-25 web tiny:v2
      llmos init; llmos restore /mnt/nas/models
    """
    from llmos_cli.formats.names import parse_ref
    from llmos_cli.remote.backup.restore import execute_restore, plan_restore
    from llmos_cli.remote.open import find_remote

    here = session(ctx)
    wanted = [parse_ref(text) for text in refs or []]
    start = time.monotonic()
    with here.open_store() as store:
        source = find_remote(store, remote, here.cwd)
        plan = plan_restore(store, source, wanted, at, force=force)
        done = None if dry_run else execute_restore(store, source, plan, here.out.progress)
    seconds = time.monotonic() - start
    received = done.received if done else plan.fetching.total_bytes
    listed = [_describe(item) for item in plan.refs]
    first = listed[0] if listed else {"ref": None, "id": None}
    here.out.result(
        {
            "remote": source.name,
            "url": source.transport.url,
            "snapshot": str(plan.name),
            "time": plan.snapshot.time,
            "refs": listed,
            "id": first["id"],
            "ref": first["ref"],
            "received": received,
            "packs": done.packs if done else len(plan.fetching.fetches),
            "reused": done.reused if done else None,
            "dry_run": dry_run,
            "seconds": round(seconds, 3),
        }
    )
    would = "would restore" if dry_run else "restored"
    for item in plan.refs:
        if item.status in _DONE:
            here.out.line(f"{would} {item.ref} @{item.id.short} ({_DONE[item.status]})")
    unchanged = sum(item.status not in _DONE for item in plan.refs)
    if unchanged:
        here.out.line(f"{plural(unchanged, 'ref')} unchanged")
    verb = "to fetch" if dry_run else "received"
    here.out.say(
        f"as of {when(plan.snapshot.time)} (@{plan.name.id.short}): {size(received)} {verb}, {duration(seconds)}"
    )


def _describe(item: "RestoredRef") -> dict[str, Any]:
    return {
        "ref": str(item.ref),
        "id": str(item.id),
        "previous": str(item.current.id) if item.current else None,
        "status": item.status,
        "moves": len(item.moves),
    }
