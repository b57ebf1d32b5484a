"""`llmos pull`: take from a remote what the store lacks."""

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmos_cli.errors import UsageError
from llmos_cli.ui.session import session
from llmos_cli.ui.text import duration, plural, size

if TYPE_CHECKING:
    from llmos_cli.remote.pull import PulledRef

_DONE = {"new": "new", "moved": "moved", "forced": "moved, forced"}


def pull(
    ctx: typer.Context,
    remote: Annotated[str, typer.Argument(metavar="REMOTE", help="A remote's name, or a URL.", show_default=False)],
    refs: Annotated[
        list[str] | None, typer.Argument(metavar="REF...", help="Refs to pull.", show_default=False)
    ] = None,
    *,
    everything: Annotated[bool, typer.Option("--all", help="Pull every ref.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Take the remote's value where both sides have changed.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be fetched.")] = False,
) -> None:
    """Fetch refs and what they need from a remote.

    Only what the store lacks is fetched, and every byte is checked before it is used. A pull that was stopped goes on
    where it was. With --force, what a ref held before stays in 'llmos log' and as NAME:TAG~1.

    Examples:
      llmos pull nas tiny
      llmos pull nas web:v2 tiny
      llmos pull /mnt/usb/models --all --dry-run
    """
    from llmos_cli.formats.names import parse_ref
    from llmos_cli.remote.open import find_remote
    from llmos_cli.remote.pull import execute_pull, plan_pull

    here = session(ctx)
    if bool(refs) == everything:
        raise UsageError("name the refs to pull, or use --all", hint=f"llmos pull {remote} --all")
    wanted = [parse_ref(text) for text in refs or []]
    start = time.monotonic()
    with here.open_store() as store:
        source = find_remote(store, remote, here.cwd)
        plan = plan_pull(store, source, None if everything else wanted, force=force)
        done = None if dry_run else execute_pull(store, source, plan, here.out.progress)
    seconds = time.monotonic() - start
    received = done.received if done else plan.total_bytes
    listed = [_describe(item) for item in plan.refs]
    first = listed[0] if listed else {"ref": None, "id": None}
    found: dict[str, Any] = {
        "remote": source.name,
        "url": source.transport.url,
        "refs": listed,
        "id": first["id"],
        "ref": first["ref"],
        "received": received,
        "packs": done.packs if done else len(plan.fetches),
        "reused": done.reused if done else None,
        "dry_run": dry_run,
        "seconds": round(seconds, 3),
    }
    here.out.result(found)
    would = "would pull" if dry_run else "pulled"
    for item in plan.refs:
        if item.moves:
            here.out.line(f"{would} {item.ref} @{item.id.short} from {source.label} ({_DONE[item.status]})")
    unchanged = sum(item.status == "unchanged" for item in plan.refs)
    ahead = [str(item.ref) for item in plan.refs if item.status == "ahead"]
    if not plan.refs:
        here.out.line(f"nothing to pull: {source.label} has no refs")
    elif unchanged == len(plan.refs) and not received:
        here.out.line(f"up to date with {source.label}: {plural(unchanged, 'ref')}")
    elif unchanged:
        here.out.line(f"{plural(unchanged, 'ref')} unchanged")
    if ahead:
        here.out.line(f"{', '.join(ahead)} stays: it has moved on from what {source.label} has")
        here.out.hint(f"llmos push {source.label} {' '.join(ahead)}")
    if received:
        verb = "to fetch" if dry_run else "received"
        took = "" if dry_run else f", {duration(seconds)}"
        here.out.say(f"{size(received)} {verb}{took}")


def _describe(item: "PulledRef") -> dict[str, Any]:
    return {
        "ref": str(item.ref),
        "id": str(item.id),
        "previous": str(item.previous) if item.previous else None,
        "status": item.status,
    }
