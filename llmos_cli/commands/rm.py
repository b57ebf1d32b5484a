"""`llmos rm`: take names away."""

from typing import Annotated

import typer

from llmos_cli.errors import UsageError
from llmos_cli.ui.session import session
from llmos_cli.ui.text import plural


def rm(
    ctx: typer.Context,
    refs: Annotated[list[str], typer.Argument(metavar="REF...", help="Refs to remove.", show_default=False)],
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
) -> None:
    """Remove refs. Their objects stay until 'llmos gc'.

    What a removed ref pointed to can still be named by its id until gc has thrown it away: no sooner than a day later,
    unless the store's gc.grace_hours says otherwise.

    Examples:
      llmos rm old
      llmos rm tiny:try1 tiny:try2
      llmos tag @3f2a9c01 old        (brings it back)
    """
    from llmos_cli.formats.names import parse_target
    from llmos_cli.store.refs.refs import delete_ref
    from llmos_cli.store.refs.resolve import resolve

    here = session(ctx)
    for text in refs:
        target = parse_target(text)
        if target.ref is None or target.back:
            raise UsageError(f"{text!r} is not a ref that can be removed", hint="name it as NAME or NAME:TAG")
    with here.open_store() as store:
        found = {resolved.ref: resolved.id for resolved in (resolve(store, text) for text in refs)}
        for ref, oid in found.items():
            assert ref is not None
            if not dry_run:
                delete_ref(store, ref, expected=oid)
            here.out.line(f"{'would remove' if dry_run else 'removed'} {ref} (@{oid.short})")
    removed = [{"ref": str(ref), "id": str(oid)} for ref, oid in found.items()]
    here.out.result({"removed": removed, "dry_run": dry_run})
    if not dry_run:
        here.out.say(f"{plural(len(found), 'ref')} removed; 'llmos gc' gives their space back later")
        first, oid = next(iter(found.items()))
        here.out.hint(f"undo: llmos tag @{oid.short} {first}")
