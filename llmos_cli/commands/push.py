"""`llmos push`: give a remote what it lacks."""

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmos_cli.errors import PartlyDone, UsageError
from llmos_cli.ui.session import session
from llmos_cli.ui.text import duration, plural, size

if TYPE_CHECKING:
    from llmos_cli.remote.exchange.push import PushedRef

_DONE = {"new": "new", "moved": "moved", "forced": "moved, forced", "unchanged": "unchanged"}


def push(
    ctx: typer.Context,
    remote: Annotated[str, typer.Argument(metavar="REMOTE", help="A remote's name, or a URL.", show_default=False)],
    refs: Annotated[
        list[str] | None, typer.Argument(metavar="REF...", help="Refs to push.", show_default=False)
    ] = None,
    *,
    everything: Annotated[bool, typer.Option("--all", help="Push every ref.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a value there that this store never had.")] = False,
    degraded: Annotated[
        bool, typer.Option("--allow-degraded", help="Let a pool take fewer copies than it should.")
    ] = False,
    prune: Annotated[bool, typer.Option("--prune", help="With --all: remove refs there that are not here.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be sent.")] = False,
) -> None:
    """Send refs and what they need to a remote.

    Only what the remote lacks is sent; it is confirmed there before a ref moves. A push that was stopped goes on where
    it was. The first push makes the remote. --prune removes refs only: what they named stays there until gc --remote.

    Examples:
      llmos push nas tiny
      llmos push nas web:v2 tiny tiny:int8
      llmos push /mnt/usb/models --all --dry-run
    """
    from llmos_cli.formats.names import parse_ref
    from llmos_cli.remote.exchange.known import note_refs
    from llmos_cli.remote.exchange.prune import remove_there, surplus_there
    from llmos_cli.remote.exchange.push import execute_push, plan_push
    from llmos_cli.remote.open import find_remote
    from llmos_cli.remote.pool.pool import shortfall, tolerate

    here = session(ctx)
    if bool(refs) == everything:
        raise UsageError("name the refs to push, or use --all", hint=f"llmos push {remote} --all")
    if prune and not everything:
        raise UsageError("--prune goes with --all", hint=f"llmos push {remote} --all --prune --dry-run")
    wanted = [parse_ref(text) for text in refs or []]
    start = time.monotonic()
    with here.open_store() as store:
        target = find_remote(store, remote, here.cwd)
        if degraded:
            tolerate(target.transport)
        plan = plan_push(store, target, None if everything else wanted, force=force)
        surplus = surplus_there(store, target, here.out.progress) if prune and not plan.initialise else ()
        done = None if dry_run else execute_push(store, target, plan, here.out.progress)
        for seen in () if dry_run else surplus:
            remove_there(target.transport, seen, here.out.progress)
            note_refs(store, target, (), gone=[seen.ref])
    seconds = time.monotonic() - start
    sent = done.sent if done else plan.total_bytes
    packs = done.packs if done else len(plan.shipments)
    listed = [_describe(item) for item in plan.refs]
    first = listed[0] if listed else {"ref": None, "id": None}
    found: dict[str, Any] = {
        "remote": target.name,
        "url": target.transport.url,
        "refs": listed,
        "id": first["id"],
        "ref": first["ref"],
        "sent": sent,
        "packs": packs,
        "present": plan.present,
        "present_bytes": plan.present_bytes,
        "signatures": done.signed if done else None,
        "pruned": [str(seen.ref) for seen in surplus],
        "dry_run": dry_run,
        "degraded_packs": shortfall(target.transport),
        "seconds": round(seconds, 3),
    }
    here.out.result(found)
    would = "would push" if dry_run else "pushed"
    for item in plan.refs:
        if item.moves:
            here.out.line(f"{would} {item.ref} @{item.id.short} to {target.label} ({_DONE[item.status]})")
    signed = done.signed if done else 0
    if signed:
        here.out.line(f"gave {target.label} {plural(signed, 'signature')}")
    for seen in surplus:
        here.out.line(f"{'would remove' if dry_run else 'removed'} {seen.ref} at {target.label}")
    unchanged = sum(not item.moves for item in plan.refs)
    if not plan.refs:
        here.out.line("nothing to push: the store has no refs")
    elif unchanged == len(plan.refs) and not packs and not signed:
        here.out.line(f"{target.label} is up to date: {plural(unchanged, 'ref')}")
    elif unchanged:
        here.out.line(f"{plural(unchanged, 'ref')} unchanged")
    if packs:
        there = f", {plural(plan.present, 'object')} ({size(plan.present_bytes)}) there already" if plan.present else ""
        verb = "to send" if dry_run else "sent"
        took = "" if dry_run else f", {duration(seconds)}"
        here.out.say(f"{size(sent)} {verb} in {plural(packs, 'pack')}{there}{took}")
    if found["degraded_packs"]:
        raise PartlyDone(
            f"{plural(found['degraded_packs'], 'pack')} at {target.label} with fewer copies than there should be",
            hint=f"when its nodes are back, or others are in: llmos remote repair {target.label}",
        )


def _describe(item: "PushedRef") -> dict[str, Any]:
    previous = item.seen.id
    return {
        "ref": str(item.ref),
        "id": str(item.id),
        "previous": str(previous) if previous else None,
        "status": item.status,
    }
