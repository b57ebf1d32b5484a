"""`llmos ls`: the refs of a store."""

from typing import TYPE_CHECKING, Annotated

import typer

from llmos_cli.errors import Damaged
from llmos_cli.ui.session import session
from llmos_cli.ui.text import plural, size, when

if TYPE_CHECKING:
    from llmos_cli.store.refs import RefEntry

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

    from llmos_cli.store.refs import read_ref, ref_names
    from llmos_cli.store.summaries import summaries

    here = session(ctx)
    listed, rows, damaged = [], [], []
    with here.open_store() as store:
        entries: dict[str, RefEntry | None] = {}  # None: damaged
        for ref in ref_names(store):
            if pattern and not fnmatchcase(str(ref), pattern) and not fnmatchcase(ref.name, pattern):
                continue
            try:
                if entry := read_ref(store, ref):
                    entries[str(ref)] = entry
            except Damaged:
                entries[str(ref)] = None
        known = summaries(store, (entry.id for entry in entries.values() if entry))
    for name, entry in entries.items():
        if entry is None:
            damaged.append(name)
            rows.append([name, "damaged", "?", "?", "?"])
            continue
        about = known.get(entry.id)
        if about is None:
            damaged.append(name)
        listed.append(
            {
                "ref": name,
                "name": entry.ref.name,
                "tag": entry.ref.tag,
                "kind": about.kind if about else None,
                "id": str(entry.id),
                "size": about.size if about else None,
                "time": entry.time,
            }
        )
        shown = size(about.size) if about else "?"
        rows.append([name, about.kind if about else "damaged", entry.id.short, shown, when(entry.time)])
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
