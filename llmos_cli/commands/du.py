"""`llmos du`: where the bytes are."""

from typing import Annotated

import typer

from llmos_cli.errors import UsageError
from llmos_cli.ui.session import session
from llmos_cli.ui.text import percent, size


def du(
    ctx: typer.Context,
    refs: Annotated[
        list[str] | None, typer.Argument(metavar="REF...", help="Only these refs.", show_default=False)
    ] = None,
) -> None:
    """Show what refs amount to and what they take on disk.

    FILES is what a checkout would write, STORED what its objects take in the store, OWN the part of it that no other
    ref uses: what gc could give back if the ref were removed.

    Examples:
      llmos du
      llmos du base tiny:v1
      llmos du --json
    """
    from llmos_cli.formats.names import parse_target
    from llmos_cli.store.resolve import resolve
    from llmos_cli.store.usage import usage

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
            "refs": [
                {
                    "ref": str(item.ref),
                    "id": str(item.id),
                    "kind": item.kind,
                    "logical": item.logical,
                    "physical": item.physical,
                    "own": item.own,
                }
                for item in shown
            ],
            "logical": found.logical,
            "needed": found.needed,
            "physical": found.physical,
            "other": found.other,
            "trash": found.trash,
            "packs": found.packs,
            "adopted": found.adopted,
        }
    )
    if shown:
        rows = [
            [str(item.ref), item.kind, size(item.logical), size(item.physical), size(item.own)]
            for item in sorted(shown, key=lambda item: -item.physical)
        ]
        here.out.table(["ref", "kind", "files", "stored", "own"], rows, right={2, 3, 4})
        here.out.line()
    if found.logical:
        share = f" ({percent(found.needed, found.logical)})" if found.needed < found.logical else ""
        here.out.line(f"{size(found.logical)} of files in {size(found.needed)}{share}")
    if found.adopted:
        here.out.line(f"{size(found.adopted)} of the store is adopted files, which may share their bytes with others")
    if found.other:
        here.out.line(f"{size(found.other)} more for earlier values of refs and what nothing needs")
    if found.trash:
        here.out.line(f"{size(found.trash)} more in the trash")
    if found.other or found.trash:
        here.out.hint("llmos gc --dry-run says what can go")
