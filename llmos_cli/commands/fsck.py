"""`llmos fsck`: is everything there, is it what it was, and can it be put right?"""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmos_cli.errors import Damaged, UsageError
from llmos_cli.ui.session import Session, session
from llmos_cli.ui.text import count, duration, plural, size

if TYPE_CHECKING:
    from llmos_cli.store.fsck.fsck import FsckReport, Problem
    from llmos_cli.store.fsck.mend import Repaired

_BEFORE = "llmos fsck --repair restores from your remotes; --from DIR from another copy of the store"
_AFTER = "llmos fsck --repair --from another copy of the store, or llmos add of the files again, restores what is left"
_SHOWN = 50
_SHOWN_REFS = 8


def fsck(
    ctx: typer.Context,
    *,
    quick: Annotated[bool, typer.Option("--quick", help="Only the structure, not every byte.")] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Restore what is damaged or missing; deletes nothing.")
    ] = False,
    sources: Annotated[
        list[str] | None,
        typer.Option(
            "--from",
            metavar="REMOTE|DIR",
            help="Repair from this remote or store.  [default: all remotes]",
            show_default=False,
        ),
    ] = None,
    reindex: Annotated[bool, typer.Option("--reindex", help="First rebuild the index from the packs.")] = False,
) -> None:
    """Check the store: every pack, object and ref.

    Reads every byte and compares it with its id, unless --quick. Damage is listed with the refs it affects, and the
    exit code is then 13.

    With --repair, what is damaged or missing comes back from the trash, from remotes or from another copy of the
    store, proven by its id. Nothing is deleted. The exit code is 0 if everything is whole in the end.

    Examples:
      llmos fsck
      llmos fsck --quick
      llmos fsck --repair
      llmos fsck --repair --from /mnt/backup/models
    """
    here = session(ctx)
    if sources and not repair:
        raise UsageError("--from says where to repair from", hint=f"llmos fsck --repair --from {sources[0]}")
    start = time.monotonic()
    report, repaired, rebuilt = _run(here, quick=quick, reindex=reindex, sources=(sources or []) if repair else None)
    seconds = time.monotonic() - start
    here.out.result(
        {
            "ok": not report.problems,
            "quick": report.quick,
            "packs": report.packs,
            "objects": report.objects,
            "bytes": report.bytes,
            "reindexed_packs": rebuilt,
            "problems": [_describe(item) for item in report.problems],
            "notes": [_describe(item) for item in report.notes],
            "repaired": [
                {
                    "what": item.how,
                    "where": item.where,
                    "from": item.source,
                    "bytes": item.size,
                    "refs": list(item.refs),
                    "objects": [str(oid) for oid in item.objects],
                }
                for item in repaired
            ],
            "seconds": round(seconds, 3),
        }
    )
    if rebuilt is not None:
        here.out.line(f"index rebuilt from {plural(rebuilt, 'pack')}")
    _show(here, report, repaired)
    looked = f"{plural(report.packs, 'pack')}, {plural(report.objects, 'object')}, {size(report.bytes)}"
    if report.problems:
        refs = {ref for item in report.problems for ref in item.referrers}
        affected = f"; {plural(len(refs), 'ref')} affected" if refs else ""
        left = "left " if repaired else ""
        raise Damaged(
            f"{plural(len(report.problems), 'problem')} {left}in {looked}{affected}",
            hint=_AFTER if repair else _BEFORE,
        )
    how = "structure is sound" if quick else "every byte is what it was"
    here.out.line(f"{how}: {looked} ({duration(seconds)})")


def _run(
    here: Session, *, quick: bool, reindex: bool, sources: Sequence[str] | None
) -> "tuple[FsckReport, list[Repaired], int | None]":
    """Check, and with `sources` (none named: all remotes) repair; also how many packs were indexed anew."""
    from llmos_cli.store.fsck.fsck import check
    from llmos_cli.store.fsck.fsck import reindex as rebuild
    from llmos_cli.store.fsck.mend import HERE, Repaired
    from llmos_cli.store.fsck.settings import mend_settings

    mended = mend_settings(here.find_store()) if sources is not None else []
    with here.open_store() as store:
        rebuilt = rebuild(store).packs if reindex else None
        if sources is None:
            return check(store, quick=quick, progress=here.out.progress), [], rebuilt
        from llmos_cli.remote.exchange.repair import find_sources
        from llmos_cli.remote.exchange.repair import repair as put_right

        done = put_right(store, find_sources(store, sources, here.cwd), quick=quick, progress=here.out.progress)
    first = [Repaired(name, "the bit that had flipped is put right", HERE) for name in mended]
    return done.report, [*first, *done.repaired], rebuilt


def _show(here: Session, report: "FsckReport", repaired: "list[Repaired]") -> None:
    """What was put right, what is still wrong, what is wrong and hurts nothing."""
    lines = []
    for done in repaired:
        took = f" ({size(done.size)})" if done.size else ""
        origin = "" if done.source == "this store" else f" from {done.source}"
        lines.append(f"repaired {done.where}: {done.how}{origin}{took}")
    _show_some(here, lines, "repaired")
    lines = []
    for item in report.problems:
        own = item.where.removeprefix("ref ").partition(" ")[0]
        refs = [ref for ref in item.referrers if ref != own]
        more = f" and {count(len(refs) - _SHOWN_REFS)} more" if len(refs) > _SHOWN_REFS else ""
        hurts = f"\n  affects {', '.join(refs[:_SHOWN_REFS])}{more}" if refs else ""
        lines.append(f"{item.where}: {item.what}{hurts}")
    _show_some(here, lines, "problems")
    _show_some(here, [f"note: {item.where}: {item.what}" for item in report.notes], "notes")


def _show_some(here: Session, lines: list[str], key: str) -> None:
    for line in lines[:_SHOWN]:
        here.out.line(line)
    if len(lines) > _SHOWN:
        here.out.line(f"and {count(len(lines) - _SHOWN)} more; --json lists all {key}")


def _describe(item: "Problem") -> dict[str, Any]:
    return {
        "what": item.what,
        "where": item.where,
        "refs": list(item.referrers),
        "objects": [str(oid) for oid in item.objects],
    }
