"""`llmos ls`: the refs of a store."""

from typing import TYPE_CHECKING, Annotated

import typer

from llmos_cli.errors import Damaged
from llmos_cli.ui.session import session
from llmos_cli.ui.text import plural, size, when

if TYPE_CHECKING:
    from llmos_cli.formats.names import RefName
    from llmos_cli.store.refs.refs import RefEntry

SHOWN_DAMAGED = 5


def ls(
    ctx: typer.Context,
    pattern: Annotated[
        str | None,
        typer.Argument(
            metavar="[REMOTE/]PATTERN",
            help="Only refs that match, as in 'web*', or REMOTE/PATTERN.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """List what the store holds, by name.

    PATTERN is matched against NAME and NAME:TAG; '*' stands for anything. REMOTE/ lists what is at a remote, as does
    the name of a remote where no ref here has it.

    Examples:
      llmos ls
      llmos ls 'tiny*'
      llmos ls nas
      llmos ls 'nas/tiny*' --json
    """
    from fnmatch import fnmatchcase

    from llmos_cli.store.inspect.summaries import summaries
    from llmos_cli.store.refs.refs import read_ref, ref_names

    here = session(ctx)
    listed, rows, damaged = [], [], []
    with here.open_store() as store:
        names = ref_names(store)
        view, wanted = None, pattern
        if pattern:
            from llmos_cli.remote.exchange.anywhere import split_remote
            from llmos_cli.remote.exchange.view import look_at

            parts = split_remote(pattern)
            if pattern in store.config.remotes and not any(ref.name == pattern for ref in names):
                parts = pattern, ""
            view, wanted = (look_at(store, parts[0], here.cwd), parts[1]) if parts else (None, pattern)

        def matches(ref: "RefName") -> bool:
            return not wanted or fnmatchcase(str(ref), wanted) or fnmatchcase(ref.name, wanted)

        entries: dict[str, RefEntry | None] = {}  # None: damaged
        if view:
            from llmos_cli.remote.exchange.known import note_all_refs, note_refs
            from llmos_cli.remote.exchange.refs import list_remote_refs

            there = list_remote_refs(view.remote.transport, store.progress, matches)
            (note_refs if wanted else note_all_refs)(store, view.remote, there)
            entries = {str(ref): seen.entry for ref, seen in there.items()}
        for ref in () if view else names:
            if not matches(ref):
                continue
            try:
                if entry := read_ref(store, ref):
                    entries[str(ref)] = entry
            except Damaged:
                entries[str(ref)] = None
        listing = (entry.id for entry in entries.values() if entry)
        known = summaries(store, (oid for oid in listing if view is None or view.entries(oid)))
        place = view.remote.transport.url if view else str(store.root)
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
    here.out.result({"store": str(store.root), "remote": view.remote.name if view else None, "refs": listed})
    if rows:
        here.out.table(["ref", "kind", "id", "size", "changed"], rows, right={3}, spare={1, 4})
    elif wanted:
        here.out.say(f"no ref matches {pattern!r}")
    elif view:
        here.out.say(f"{view.label} has no refs")
    else:
        here.out.say(f"the store {store.root} is empty")
        here.out.hint("llmos add PATH NAME")
    if damaged:
        named = ", ".join([*damaged[:SHOWN_DAMAGED], *(["..."] if len(damaged) > SHOWN_DAMAGED else [])])
        raise Damaged(
            f"{plural(len(damaged), 'ref')} damaged, or without a manifest: {named} ({place})",
            hint="see what is wrong: llmos fsck" if view is None else "push them again from a store that is whole",
        )
