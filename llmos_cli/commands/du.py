"""`llmos du`: where the bytes are."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmos_cli.errors import Damaged, UsageError
from llmos_cli.ui.facts import fact_lines
from llmos_cli.ui.output import Output
from llmos_cli.ui.session import session
from llmos_cli.ui.text import percent, plural, shorten, size

if TYPE_CHECKING:
    from llmos_cli.store.inspect.usage import RefUsage, Saved, Usage

NARROW_COLUMNS = 72  # below this only the columns that matter most stand beside the name
SHARER_CHARACTERS = 24
SHOWN_SHARERS = 8


def du(
    ctx: typer.Context,
    refs: Annotated[
        list[str] | None, typer.Argument(metavar="REF...", help="Only these refs, in detail.", show_default=False)
    ] = None,
) -> None:
    """Show what refs amount to and what they take on disk.

    FILES is what a checkout would write, STORED what the ref added to the store: what several refs need counts for the
    oldest. OWN is what no other ref needs: what gc could give back if the ref were removed. SAVED is FILES less STORED,
    and what did most of it: dedup (stored already), packed (planes and zstd) or delta.

    Examples:
      llmos du
      llmos du base tiny:v1
      llmos du --json
    """
    from llmos_cli.formats.names import parse_target
    from llmos_cli.store.inspect.usage import usage
    from llmos_cli.store.refs.resolve import resolve

    here = session(ctx)
    for text in refs or ():
        target = parse_target(text)
        if target.ref is None or target.back:
            raise UsageError(f"{text!r} is not a ref's current value", hint="name it as NAME or NAME:TAG")
    with here.open_store() as store:
        wanted = {resolve(store, text).ref for text in refs or ()}
        found = usage(store)
    shown = [item for item in found.refs if not wanted or item.ref in wanted]
    here.out.result(
        {
            "refs": [_ref_json(item) for item in shown],
            "logical_bytes": found.logical,
            "stored_bytes": found.stored,
            "saved": _saved_json(found.saved),
            "disk_bytes": found.disk,
            "other_bytes": found.other,
            "trash_bytes": found.trash,
            "adopted_bytes": found.adopted,
            "packs": found.packs,
        }
    )
    if wanted:
        for item in shown:
            _detail(here.out, item)
    elif shown:
        _table(here.out, shown)
        here.out.line()
    if not wanted:
        _sums(here.out, found)
    for item in shown:
        if item.missing:
            lacking = plural(item.missing, "object")
            here.out.warn(f"{item.ref} lacks {lacking}; llmos fsck says what that hurts")
    for ref, problem in found.problems:
        here.out.warn(f"{ref} is not counted: {problem}")
    if found.problems:
        raise Damaged(
            f"{plural(len(found.problems), 'ref')} cannot be read, so the sums are too small",
            hint="llmos fsck says what is wrong",
        )


def _table(out: Output, shown: "Sequence[RefUsage]") -> None:
    rows = [
        [
            str(item.ref),
            size(item.logical),
            size(item.stored),
            size(item.own),
            _cause(item),
            _sharers(item),
        ]
        for item in sorted(shown, key=lambda item: -item.stored)
    ]
    columns = ["ref", "files", "stored", "own", "saved", "shared with"]
    out.table(columns, rows, right={1, 2, 3, 4}, spare={3, 4, 5} if out.width < NARROW_COLUMNS else ())


def _detail(out: Output, item: "RefUsage") -> None:
    facts = [("files", size(item.logical)), ("stored", size(item.stored)), ("own", size(item.own))]
    facts += [(f"saved by {name}", size(part)) for name, part in _causes(item.saved)]
    if item.sharers:
        names = [str(ref) for ref in item.shared_with[:SHOWN_SHARERS]]
        more = item.sharers - len(names)
        facts.append(("shares with", ", ".join([*names, *([f"{more} more"] if more else [])])))
    out.line(str(item.ref))
    for line in fact_lines(facts):
        out.line(line)


def _sums(out: Output, found: "Usage") -> None:
    if found.logical:
        share = f" ({percent(found.stored, found.logical)})" if found.stored < found.logical else ""
        out.line(f"{size(found.logical)} of files in {size(found.stored)}{share}")
        if causes := [f"{size(part)} by {name}" for name, part in _causes(found.saved)]:
            out.line(f"saved {', '.join(causes)}")
    if found.adopted:
        out.line(f"{size(found.adopted)} of the store is adopted files, which may share their bytes with others")
    if found.other:
        out.line(f"{size(found.other)} more for earlier values of refs and what nothing needs")
    if found.trash:
        out.line(f"{size(found.trash)} more in the trash")
    if found.other or found.trash:
        out.hint("llmos gc --dry-run says what can go")


def _causes(saved: "Saved") -> list[tuple[str, int]]:
    """What saved something, and how much; what headers cost is left to JSON."""
    causes = [("dedup", saved.dedup), ("planes and zstd", saved.compression), ("deltas", saved.delta)]
    return [(name, part) for name, part in causes if part > 0]


def _cause(item: "RefUsage") -> str:
    """How much of the files needs no room, and what did most of that: "76 % delta"."""
    saved = item.logical - item.stored
    parts = {"dedup": item.saved.dedup, "packed": item.saved.compression, "delta": item.saved.delta}
    name = max(parts, key=lambda part: parts[part])
    return f"{100 * saved / item.logical:.0f} % {name}" if saved > 0 else "-"


def _sharers(item: "RefUsage") -> str:
    if not item.sharers:
        return "-"
    more = f" +{item.sharers - 1}" if item.sharers > 1 else ""
    return shorten(str(item.shared_with[0]), SHARER_CHARACTERS) + more


def _ref_json(item: "RefUsage") -> dict[str, Any]:
    return {
        "ref": str(item.ref),
        "id": str(item.id),
        "kind": item.kind,
        "logical_bytes": item.logical,
        "stored_bytes": item.stored,
        "own_bytes": item.own,
        "shared_with": [str(ref) for ref in item.shared_with],
        "shared_with_more": item.sharers - len(item.shared_with),
        "saved": _saved_json(item.saved),
        "missing_objects": item.missing,
    }


def _saved_json(saved: "Saved") -> dict[str, int]:
    return {"dedup": saved.dedup, "compression": saved.compression, "delta": saved.delta}
