"""`llmos gc`: give back the space of what nothing needs."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmos_cli.ui.session import session
from llmos_cli.ui.text import duration, plural, size

if TYPE_CHECKING:
    from llmos_cli.store.gc import GcPlan, PackPlan


def gc(
    ctx: typer.Context,
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would happen.")] = False,
    grace: Annotated[
        float | None,
        typer.Option(
            "--grace",
            metavar="HOURS",
            min=0,
            help="Age before data may go.  [default: gc.grace_hours, 24]",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Remove what no ref, recent history or running command needs.

    Data goes to the trash first and is unlinked by a later gc, once it has been there for the grace period. Safe beside
    anything else that uses the store.

    Examples:
      llmos gc --dry-run
      llmos gc
      llmos gc --grace 0        (at once; for a store that nobody else uses)
    """
    from llmos_cli.store.gc import execute_gc, plan_gc

    here = session(ctx)
    with here.open_store() as store:
        plan = plan_gc(store, grace_seconds=None if grace is None else grace * 3600)
        done = None if dry_run else execute_gc(store, plan, here.out.progress)
    at_once = plan.trashed_bytes if plan.grace_seconds == 0 and not plan.writers else 0
    found: dict[str, Any] = {
        "dry_run": dry_run,
        "grace_seconds": plan.grace_seconds,
        "trash": _packs(plan.trash),
        "rewrite": _packs(plan.rewrite),
        "unlink": _packs(plan.unlink),
        "temporary": [{"path": str(path), "size": num_bytes} for path, num_bytes in plan.temporary],
        "live_bytes": plan.live_bytes,
        "kept_bytes": plan.kept_bytes,
        "waiting_bytes": plan.waiting_bytes,
        "trashed_bytes": done.trashed_bytes if done else plan.trashed_bytes,
        "freed_bytes": done.freed_bytes if done else plan.freed_bytes + at_once,
        "orphans": [{"file": str(orphan.name), "freed": orphan.size} for orphan in plan.orphans],
        "released_files": done.released if done else 0,
        "restored_packs": done.restored if done else 0,
        "writers": plan.writers,
    }
    here.out.result(found)
    would = "would be " if dry_run else ""
    here.out.line(
        f"{size(found['freed_bytes'])} {would}freed, {size(found['trashed_bytes'])} {would}moved to the trash"
    )
    for text in _details(plan):
        here.out.line(f"  {text}")
    if done and done.restored:
        here.out.say(f"{plural(done.restored, 'pack')} came back from the trash: somebody needs them again")
    if done and done.released and any(orphan.size == 0 for orphan in plan.orphans):
        here.out.say("adopted files that have other names stay there, read-only: chmod u+w makes them writable")
    if plan.writers:
        here.out.say(f"{plural(plan.writers, 'command')} at work in this store: nothing is unlinked meanwhile")
    if dry_run and (plan.trash or plan.rewrite or plan.unlink or plan.orphans or plan.temporary):
        here.out.hint("llmos gc does it")


def _details(plan: "GcPlan") -> list[str]:
    wait = duration(plan.grace_seconds)
    gone = "unlinked" if plan.grace_seconds == 0 and not plan.writers else "to the trash"
    lines = [
        (len(plan.trash), f"{plural(len(plan.trash), 'pack')} {gone}: nothing in them is needed"),
        (len(plan.rewrite), f"{plural(len(plan.rewrite), 'pack')} rewritten: most of them is not needed"),
        (len(plan.unlink), f"{plural(len(plan.unlink), 'pack')} unlinked: in the trash for {wait} or longer"),
        (len(plan.orphans), f"{plural(len(plan.orphans), 'adopted file')} let go: nothing needs it any more"),
        (len(plan.temporary), f"{plural(len(plan.temporary), 'leftover')} of interrupted commands removed"),
        (plan.kept_bytes, f"{size(plan.kept_bytes)} not needed, but younger than {wait} or not worth a rewrite"),
        (plan.waiting_bytes, f"{size(plan.waiting_bytes)} wait in the trash for their {wait}"),
    ]
    return [text for number, text in lines if number]


def _packs(packs: "tuple[PackPlan, ...]") -> list[dict[str, Any]]:
    return [{"pack": str(pack.name), "size": pack.size, "freed": pack.freed} for pack in packs]
