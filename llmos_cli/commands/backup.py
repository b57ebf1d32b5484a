"""`llmos backup`: everything, as a dated snapshot at a remote."""

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmos_cli.errors import UsageError
from llmos_cli.ui.session import Session, session
from llmos_cli.ui.text import duration, plural, size, when

if TYPE_CHECKING:
    from llmos_cli.formats.snapshot import Snapshot, SnapshotName
    from llmos_cli.remote.backup.snapshots import Policy

_DAYS: Any = typer.Option("--keep-daily", metavar="N", min=0, help="Keep the newest snapshot of the last N days.")
_WEEKS: Any = typer.Option("--keep-weekly", metavar="N", min=0, help="And of the last N weeks.")
_MONTHS: Any = typer.Option("--keep-monthly", metavar="N", min=0, help="And of the last N months.")


def backup(
    ctx: typer.Context,
    remote: Annotated[str, typer.Argument(metavar="REMOTE", help="A remote's name, or a URL.", show_default=False)],
    *,
    listing: Annotated[bool, typer.Option("--list", help="List the snapshots there.")] = False,
    daily: Annotated[int, _DAYS] = 0,
    weekly: Annotated[int, _WEEKS] = 0,
    monthly: Annotated[int, _MONTHS] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
) -> None:
    """Keep everything at a remote as a dated snapshot.

    All refs, their logs, and what they and their kept history need. Only what the remote lacks is sent, and it is read
    back; the remote's own refs are not touched. With --keep-..., older snapshots of this store are then removed, and
    their data goes with the next llmos gc --remote REMOTE.

    Examples:
      llmos backup nas
      llmos backup nas --keep-daily 7 --keep-weekly 4 --keep-monthly 12
      llmos backup nas --list
    """
    from llmos_cli.remote.backup.snapshots import Policy, list_snapshots
    from llmos_cli.remote.open import find_remote

    here = session(ctx)
    policy = Policy(daily, weekly, monthly)
    if listing and (policy.prunes or dry_run):
        raise UsageError("--list only lists", hint=f"llmos backup {remote} --list")
    if not listing:
        _back_up(here, remote, policy, dry_run=dry_run)
        return
    with here.open_store() as store:
        target = find_remote(store, remote, here.cwd)
        found = list_snapshots(target, here.out.progress)
    here.out.result({"remote": target.name, "url": target.transport.url, "snapshots": [_describe(*i) for i in found]})
    if not found:
        here.out.say(f"no snapshots at {target.label}")
        here.out.hint(f"llmos backup {target.label}")
        return
    rows = [[f"@{name.id.short}", when(snap.time), str(len(snap.refs)), snap.source] for name, snap in found]
    here.out.table(["id", "time", "refs", "store"], rows, right=(2,))


def _back_up(here: Session, remote: str, policy: "Policy", *, dry_run: bool) -> None:
    from llmos_cli.remote.backup.backup import execute_backup, execute_prune, plan_backup, plan_prune
    from llmos_cli.remote.backup.snapshots import list_snapshots
    from llmos_cli.remote.open import find_remote, is_ready

    start = time.monotonic()
    with here.open_store() as store:
        target = find_remote(store, remote, here.cwd)
        plan = plan_backup(store, target)
        done = None if dry_run else execute_backup(store, target, plan, here.out.progress)
        there = list_snapshots(target, here.out.progress) if policy.prunes and is_ready(target.transport) else []
        pruned = [item for item in plan_prune(there, policy) if item[1].source == plan.snapshot.source]
        if not dry_run:
            execute_prune(target, pruned)
    seconds = time.monotonic() - start
    sending, snapshot = plan.sending, plan.snapshot
    sent, packs = (done.sent, done.packs) if done else (sending.total_bytes, len(sending.shipments))
    here.out.result(
        {
            "remote": target.name,
            "url": target.transport.url,
            "snapshot": str(done.name) if done else None,
            "id": str(done.name.id) if done else None,
            "time": snapshot.time,
            "source": snapshot.source,
            "refs": len(snapshot.refs),
            "manifests": len(snapshot.manifests),
            "sent": sent,
            "packs": packs,
            "present": sending.present,
            "present_bytes": sending.present_bytes,
            "pruned": [_describe(*item) for item in pruned],
            "dry_run": dry_run,
            "seconds": round(seconds, 3),
        }
    )
    refs = plural(len(snapshot.refs), "ref")
    if done:
        here.out.line(f"backed up {refs} to {target.label} @{done.name.id.short} ({when(snapshot.time)})")
    else:
        here.out.line(f"would back up {refs} to {target.label}")
    verb = "to send" if dry_run else "sent"
    there_already = f", {size(sending.present_bytes)} there already" if sending.present else ""
    here.out.say(f"{size(sent)} {verb} in {plural(packs, 'pack')}{there_already}, {duration(seconds)}")
    for name, old in pruned:
        here.out.line(f"{'would remove' if dry_run else 'removed'} snapshot @{name.id.short} ({when(old.time)})")


def _describe(name: "SnapshotName", snapshot: "Snapshot") -> dict[str, Any]:
    return {
        "snapshot": str(name),
        "id": str(name.id),
        "time": snapshot.time,
        "source": snapshot.source,
        "refs": len(snapshot.refs),
        "manifests": len(snapshot.manifests),
    }
