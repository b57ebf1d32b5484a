"""`llmos fsck`: is everything there, and is it what it was?"""

import time
from typing import Annotated

import typer

from llmos_cli.errors import Damaged
from llmos_cli.ui.session import session
from llmos_cli.ui.text import count, duration, plural, size


def fsck(
    ctx: typer.Context,
    *,
    quick: Annotated[bool, typer.Option("--quick", help="Only the structure, not every byte.")] = False,
    reindex: Annotated[bool, typer.Option("--reindex", help="First rebuild the index from the packs.")] = False,
) -> None:
    """Check the store: every pack, object and ref.

    Reads every byte and compares it with its id, unless --quick. Repairs nothing and removes nothing; damage is listed
    with the refs it affects, and the exit code is then 13.

    Examples:
      llmos fsck
      llmos fsck --quick
      llmos fsck --reindex --json
    """
    from llmos_cli.store.fsck import check
    from llmos_cli.store.fsck import reindex as rebuild

    here = session(ctx)
    start = time.monotonic()
    with here.open_store() as store:
        rebuilt = rebuild(store) if reindex else None
        report = check(store, quick=quick, progress=here.out.progress)
    seconds = time.monotonic() - start
    here.out.result(
        {
            "ok": not report.problems,
            "quick": report.quick,
            "packs": report.packs,
            "objects": report.objects,
            "bytes": report.bytes,
            "reindexed_packs": rebuilt.packs if rebuilt else None,
            "problems": [
                {"what": item.what, "where": item.where, "refs": list(item.referrers)} for item in report.problems
            ],
            "seconds": round(seconds, 3),
        }
    )
    if rebuilt:
        here.out.line(f"index rebuilt from {plural(rebuilt.packs, 'pack')}")
    for item in report.problems:
        here.out.line(f"{item.where}: {item.what}")
        if item.referrers:
            here.out.line(f"  affects {', '.join(item.referrers)}")
    looked = f"{plural(report.packs, 'pack')}, {plural(report.objects, 'object')}, {size(report.bytes)}"
    if report.problems:
        refs = {ref for item in report.problems for ref in item.referrers}
        affected = f"; {count(len(refs))} of the refs affected" if refs else ""
        raise Damaged(
            f"{plural(len(report.problems), 'problem')} in {looked}{affected}",
            hint="what is damaged can come back from a remote (llmos pull) or from its source (llmos add)",
        )
    how = "structure is sound" if quick else "every byte is what it was"
    here.out.line(f"{how}: {looked} ({duration(seconds)})")
