"""`llmos tag`: a new name for an object."""

from typing import Annotated

import typer

from llmos_cli.errors import Conflict, Damaged
from llmos_cli.ui.session import session


def tag(
    ctx: typer.Context,
    ref: Annotated[str, typer.Argument(metavar="REF", help="What to point to.", show_default=False)],
    new: Annotated[str, typer.Argument(metavar="NAME", help="The new ref, as NAME or NAME:TAG.", show_default=False)],
    *,
    force: Annotated[bool, typer.Option("--force", help="Move NAME if it points elsewhere.")] = False,
) -> None:
    """Point another ref to an object; nothing is copied.

    A ref that exists moves only with --force; its earlier value stays in 'llmos log' and as NAME:TAG~1.

    Examples:
      llmos tag tiny tiny:v1
      llmos tag tiny~1 tiny --force
      llmos tag @3f2a9c01 best
    """
    from llmos_cli.formats.names import parse_ref
    from llmos_cli.store.point import point, point_anew
    from llmos_cli.store.refs import read_ref
    from llmos_cli.store.resolve import resolve

    here = session(ctx)
    target = parse_ref(new)
    with here.open_store() as store:
        source = resolve(store, ref)
        try:
            current = read_ref(store, target)
        except Damaged:
            if not force:
                raise
            point_anew(store, target, source.id, message=f"tag: {source.label}, over damage")
            current, moved = None, True
        else:
            moved = current is None or current.id != source.id
            if current is not None and moved and not force:
                raise Conflict(
                    f"{target} already points to @{current.id.short}", hint=f"move it: llmos tag {ref} {new} --force"
                )
            if moved:
                expected = current.id if current else None
                point(store, target, source.id, expected=expected, message=f"tag: {source.label}")
    here.out.result({"ref": str(target), "id": str(source.id), "changed": moved})
    here.out.line(f"{target} {'now points' if moved else 'points'} to @{source.id.short}")
