"""`llmos gc`: give back the space of what nothing needs."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmos_cli.errors import Damaged, PartlyDone, Unsafe, UsageError
from llmos_cli.ui.session import Session, session
from llmos_cli.ui.text import duration, plural, size, when

if TYPE_CHECKING:
    from llmos_cli.remote.gc.collect import RemoteGcPlan, RemoteGcResult
    from llmos_cli.store.gc.gc import GcPlan, GcResult, PackPlan
    from llmos_cli.store.gc.repack import RepackPlan, RepackResult
    from llmos_cli.store.gc.undelete import Removed
    from llmos_cli.store.gc.why import Place
    from llmos_cli.store.handle import Store


def gc(
    ctx: typer.Context,
    refs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[REF]...", help="With --undelete: only these refs.", show_default=False),
    ] = None,
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
    repack: Annotated[
        bool, typer.Option("--repack", help="First store anew what today's codecs would make smaller.")
    ] = False,
    why: Annotated[
        str | None,
        typer.Option("--why", metavar="OBJECT", help="Only say what keeps a REF, @ID or pack.", show_default=False),
    ] = None,
    undelete: Annotated[bool, typer.Option("--undelete", help="Bring back what is in the trash.")] = False,
    remote: Annotated[
        str | None,
        typer.Option("--remote", metavar="REMOTE", help="Give back space there, not here.", show_default=False),
    ] = None,
) -> None:
    """Remove what no ref, recent history or running command needs.

    Data goes to the trash first and is unlinked by a later gc, once it has been there for the grace period. Safe beside
    anything else that uses the store.

    --repack rewrites packs whose chunks another codec or a base would make clearly smaller, packs that are small or
    partly dead, and long chains of differences. --why says what keeps an object, or when it may go. --undelete brings
    back removed refs, never over one that lives, and packs.

    Examples:
      llmos gc --dry-run
      llmos gc
      llmos gc --grace 0        (at once; for a store that nobody else uses)
      llmos gc --repack
      llmos gc --why @3f2a9c01
      llmos gc --undelete tiny:try1
      llmos gc --remote nas --dry-run
    """
    here = session(ctx)
    if (why is not None) + undelete + repack > 1:
        raise UsageError("--why, --undelete and --repack are three different things", hint="llmos gc --help")
    if refs and not undelete:
        raise UsageError("gc takes refs only with --undelete", hint=f"llmos gc --undelete {refs[0]}")
    if grace is not None and (undelete or why is not None):
        raise UsageError("--grace is for what goes, not with --why or --undelete", hint="llmos gc --help")
    if remote is not None and (why is not None or undelete or repack):
        raise UsageError("--remote goes with --dry-run and --grace only", hint=f"llmos gc --remote {remote} --dry-run")
    with here.open_store() as store:
        if remote is not None:
            _collect_there(here, store, remote, None if grace is None else grace * 3600, dry_run=dry_run)
        elif why is not None:
            _explain(here, store, why)
        elif undelete:
            _undelete(here, store, refs or [], dry_run=dry_run)
        else:
            _collect(here, store, None if grace is None else grace * 3600, dry_run=dry_run, repack=repack)


def _collect(here: Session, store: "Store", grace: float | None, *, dry_run: bool, repack: bool) -> None:
    from llmos_cli.store.gc.clock import check_clock
    from llmos_cli.store.gc.gc import execute_gc, plan_gc

    if dry_run:
        try:
            check_clock(store)
        except Unsafe as exc:
            here.out.warn(f"gc would refuse: {exc.message}")
    anew: dict[str, Any] = {}
    if repack:
        from llmos_cli.store.gc.repack import execute_repack, plan_repack

        ahead = plan_repack(store, grace_seconds=grace)
        result = None if dry_run else execute_repack(store, ahead, here.out.progress)
        anew = {"repack": _repacked(ahead, result)}
        for text in _repack_lines(ahead, result):
            here.out.line(text)
    plan = plan_gc(store, grace_seconds=grace)
    done = None if dry_run else execute_gc(store, plan, here.out.progress)
    found = _found(plan, done) | anew
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
    if dry_run and (plan.trash or plan.rewrite or plan.unlink or plan.orphans or plan.temporary or _has_work(anew)):
        here.out.hint("llmos gc --repack does it" if repack else "llmos gc does it")


def _found(plan: "GcPlan", done: "GcResult | None") -> dict[str, Any]:
    at_once = plan.trashed_bytes if plan.grace_seconds == 0 and not plan.writers else 0
    return {
        "dry_run": done is None,
        "grace_seconds": plan.grace_seconds,
        "trash": _packs(plan.trash),
        "rewrite": _packs(plan.rewrite),
        "unlink": _packs(plan.unlink),
        "temporary": [{"path": str(path), "size": num_bytes} for path, num_bytes in plan.temporary],
        "live_bytes": plan.live_bytes,
        "unreachable_bytes": plan.unreachable_bytes,
        "kept_bytes": plan.kept_bytes,
        "waiting_bytes": plan.waiting_bytes,
        "trashed_bytes": done.trashed_bytes if done else plan.trashed_bytes,
        "freed_bytes": done.freed_bytes if done else plan.freed_bytes + at_once,
        "orphans": [{"file": str(orphan.name), "freed": orphan.size} for orphan in plan.orphans],
        "released_files": done.released if done else 0,
        "restored_packs": done.restored if done else 0,
        "writers": plan.writers,
    }


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


# --------------------------------------------------------------------------------------------------------------- remote


def _collect_there(here: Session, store: "Store", name: str, grace: float | None, *, dry_run: bool) -> None:
    from llmos_cli.remote.gc.collect import execute_remote_gc, plan_remote_gc
    from llmos_cli.remote.open import find_remote

    target = find_remote(store, name, here.cwd)
    plan = plan_remote_gc(store, target, grace_seconds=grace)
    done = None if dry_run else execute_remote_gc(store, target, plan, here.out.progress)
    here.out.result(_found_there(target.label, plan, done))
    would, freed = "would be " if dry_run else "", done.freed_bytes if done else plan.freed_bytes
    trashed = done.trashed_bytes if done else plan.trashed_bytes
    here.out.line(f"{size(freed)} {would}freed at {target.label}, {size(trashed)} {would}moved to its trash")
    for text in _details_there(plan):
        here.out.line(f"  {text}")
    if done and done.restored > len(plan.back):
        here.out.say(f"{plural(done.restored - len(plan.back), 'pack')} came back: somebody needs them again")
    if plan.missing:
        here.out.warn(
            f"{plural(plan.missing, 'object')} that refs at {target.label} need are not there: "
            f"push them anew, or see what is hurt: llmos pull {target.label} --all --dry-run"
        )
    if dry_run and (plan.trash or plan.back or plan.unlink):
        here.out.hint(f"llmos gc --remote {target.label} does it")


def _found_there(label: str, plan: "RemoteGcPlan", done: "RemoteGcResult | None") -> dict[str, Any]:
    def listed(packs: Any) -> list[dict[str, Any]]:
        return [{"key": item.key, "size": item.size} for item in packs]

    return {
        "remote": label,
        "dry_run": done is None,
        "grace_seconds": plan.grace_seconds,
        "trash": listed(plan.trash),
        "back": listed(plan.back),
        "unlink": listed(plan.unlink),
        "live_bytes": plan.live_bytes,
        "kept_bytes": plan.kept_bytes,
        "waiting_bytes": plan.waiting_bytes,
        "trashed_bytes": done.trashed_bytes if done else plan.trashed_bytes,
        "freed_bytes": done.freed_bytes if done else plan.freed_bytes,
        "restored_packs": done.restored if done else 0,
        "unreadable_packs": plan.unreadable,
        "missing_objects": plan.missing,
        "writers": plan.writers,
    }


def _details_there(plan: "RemoteGcPlan") -> list[str]:
    wait = duration(plan.grace_seconds)
    gone = "removed" if plan.grace_seconds == 0 and not plan.writers else "to the trash"
    lines = [
        (len(plan.trash), f"{plural(len(plan.trash), 'pack')} {gone}: nothing in them is needed"),
        (len(plan.back), f"{plural(len(plan.back), 'pack')} back from the trash: needed after all"),
        (len(plan.unlink), f"{plural(len(plan.unlink), 'pack')} removed: in the trash for {wait} or longer"),
        (plan.kept_bytes, f"{size(plan.kept_bytes)} not needed, but younger than {wait} or in packs that are"),
        (plan.waiting_bytes, f"{size(plan.waiting_bytes)} wait in the trash for their {wait}"),
        (plan.unreadable, f"{plural(plan.unreadable, 'pack')} cannot be read and stay"),
        (plan.writers, f"{plural(plan.writers, 'command')} at work there: nothing is removed meanwhile"),
    ]
    return [text for number, text in lines if number]


# --------------------------------------------------------------------------------------------------------------- repack


def _repacked(plan: "RepackPlan", done: "RepackResult | None") -> dict[str, Any]:
    return {
        "packs": _packs(plan.packs),
        "small_packs": plan.small,
        "chunks": len(plan.anew),
        "estimated_saved_bytes": plan.saved_bytes,
        "replaced_packs": done.replaced if done else 0,
        "new_packs": done.packs if done else 0,
        "stored_anew": done.anew if done else 0,
        "saved_bytes": done.before - done.after if done else 0,
    }


def _repack_lines(plan: "RepackPlan", done: "RepackResult | None") -> list[str]:
    if not plan.packs:
        return ["nothing to repack"]
    if done:
        first = f"{plural(done.replaced, 'pack')} became {done.packs}: {size(done.before)}, now {size(done.after)}"
        return [first, f"  {plural(done.anew, 'chunk')} stored anew"]
    lines = [f"{plural(len(plan.packs), 'pack')} would be rewritten: about {size(plan.saved_bytes)} less"]
    if plan.anew:
        lines.append(f"  {plural(len(plan.anew), 'chunk')} stored anew")
    if plan.small:
        lines.append(f"  {plural(plan.small, 'small pack')} put together")
    return lines


def _has_work(anew: dict[str, Any]) -> bool:
    return bool(anew and anew["repack"]["packs"])


# ------------------------------------------------------------------------------------------------------------------ why


def _explain(here: Session, store: "Store", text: str) -> None:
    from llmos_cli.store.gc.why import explain

    found = explain(store, text)
    here.out.result(
        {
            "object": str(found.id),
            "what": found.what,
            "needed": found.is_needed,
            "chains": [list(chain) for chain in found.chains],
            "count": found.count,
            "places": [
                {
                    "pack": str(place.pack),
                    "in_trash": place.in_trash,
                    "codec": place.codec,
                    "stored": place.stored,
                    "base": str(place.base) if place.base else None,
                    "fate": place.fate,
                    "after": _iso(place.after),
                }
                for place in found.places
            ],
        }
    )
    if found.is_needed:
        here.out.line(f"{found.what} {found.id.short} is needed:")
    else:
        here.out.line(f"nothing needs {found.what} {found.id.short}")
    for chain in found.chains:
        here.out.line(f"  {' -> '.join(chain)}")
    if found.count > len(found.chains):
        here.out.line(f"  and {found.count - len(found.chains)} more")
    for place in found.places:
        here.out.line(f"  {_place(place)}")


def _place(place: "Place") -> str:
    where = f"in the trash, in pack {place.pack.short}" if place.in_trash else f"in pack {place.pack.short}"
    how = f" ({place.codec}, {size(place.stored)})" if place.codec else f" ({size(place.stored)})"
    if place.base:
        how = f" ({place.codec} on {place.base.short}, {size(place.stored)})"
    if place.fate == "needed":
        return where + how
    after = _iso(place.after)
    return f"{where}{how}: {place.fate}{f', from {when(after)} on' if after else ''}"


def _iso(time: float | None) -> str | None:
    from datetime import UTC, datetime

    return None if time is None else datetime.fromtimestamp(time, UTC).isoformat(timespec="seconds")


# ------------------------------------------------------------------------------------------------------------- undelete


def _undelete(here: Session, store: "Store", names: list[str], *, dry_run: bool) -> None:
    from llmos_cli.formats.names import parse_ref
    from llmos_cli.store.gc.undelete import execute_undelete, plan_undelete

    plan = plan_undelete(store, [parse_ref(name) for name in names])
    done = None if dry_run else execute_undelete(store, plan)
    back = done.refs if done else plan.refs
    left = [*plan.kept, *((item, exc.message) for item, exc in (done.failed if done else ()))]
    packs = done.packs if done else len(plan.packs)
    here.out.result(
        {
            "dry_run": dry_run,
            "restored": [_removed(item) for item in back],
            "left": [{**_removed(item), "why": reason} for item, reason in left],
            "packs": packs,
        }
    )
    would = "would come" if dry_run else "is"
    for item in back:
        here.out.line(f"{item.ref} {would} back (@{item.entry.id.short}, removed {when(_iso(item.time) or '')})")
    for item, reason in left:
        here.out.line(f"{item.ref} (@{item.entry.id.short}) stays in the trash: {reason}")
    if packs:
        here.out.line(f"{plural(packs, 'pack')} {'would leave' if dry_run else 'left'} the trash")
    if not (back or left or packs):
        here.out.line("the trash is empty")
    if done and done.failed:
        which = ", ".join(str(item.ref) for item, _ in done.failed)
        first = done.failed[0][1]
        lost = any(isinstance(exc, Damaged) for _, exc in done.failed)
        raise (Damaged if lost else PartlyDone)(
            f"{which} could not be brought back: {first.message}", hint=first.hint or "see what is wrong: llmos fsck"
        )


def _removed(item: "Removed") -> dict[str, Any]:
    return {"ref": str(item.ref), "id": str(item.entry.id), "removed": _iso(item.time)}
