"""`llmos ls`: the refs of a store."""

from typing import Annotated

import typer

from llmos_cli.errors import Damaged
from llmos_cli.ui.session import session
from llmos_cli.ui.text import plural, size, when

SHOWN_DAMAGED = 5


def ls(
    ctx: typer.Context,
    pattern: Annotated[
        str | None, typer.Argument(metavar="PATTERN", help="Only refs that match, as in 'web*'.", show_default=False)
    ] = None,
) -> None:
    """List what the store holds, by name.

    PATTERN is matched against NAME and NAME:TAG; '*' stands for anything.

    Examples:
      llmos ls
      llmos ls 'tiny*'
      llmos ls --json
    """
    from fnmatch import fnmatchcase

    from llmos_cli.store.objects import read_manifest
    from llmos_cli.store.refs import read_ref, ref_names

    here = session(ctx)
    listed, rows, damaged = [], [], []
    with here.open_store() as store:
        for ref in ref_names(store):
            if pattern and not fnmatchcase(str(ref), pattern) and not fnmatchcase(ref.name, pattern):
                continue
            try:
                entry = read_ref(store, ref)
            except Damaged:
                damaged.append(str(ref))
                rows.append([str(ref), "damaged", "?", "?", "?"])
                continue
            if entry is None:
                continue
            kind: str | None = None
            num_bytes: int | None = None
            try:
                manifest = read_manifest(store, entry.id)
                kind, num_bytes = manifest.kind, manifest.size
            except Damaged:
                damaged.append(str(ref))
            listed.append(
                {
                    "ref": str(ref),
                    "name": ref.name,
                    "tag": ref.tag,
                    "kind": kind,
                    "id": str(entry.id),
                    "size": num_bytes,
                    "time": entry.time,
                }
            )
            shown = "?" if num_bytes is None else size(num_bytes)
            rows.append([str(ref), kind or "damaged", entry.id.short, shown, when(entry.time)])
    here.out.result({"store": str(store.root), "refs": listed})
    if rows:
        here.out.table(["ref", "kind", "id", "size", "changed"], rows, right={3}, spare={1, 4})
    elif pattern:
        here.out.say(f"no ref matches {pattern!r}")
    else:
        here.out.say(f"the store {store.root} is empty")
        here.out.hint("llmos add PATH NAME")
    if damaged:
        named = ", ".join([*damaged[:SHOWN_DAMAGED], *(["..."] if len(damaged) > SHOWN_DAMAGED else [])])
        raise Damaged(
            f"{plural(len(damaged), 'ref')} damaged, or without a manifest: {named}",
            hint="see what is wrong: llmos fsck",
        )
