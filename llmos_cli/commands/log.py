"""`llmos log`: a ref's history and what its object was made from."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmos_cli.ui.session import session
from llmos_cli.ui.signers import signer_json, signer_text
from llmos_cli.ui.text import plural, safe_line, size, when
from llmos_cli.ui.tree import tree_lines

if TYPE_CHECKING:
    from llmos_cli.formats.ids import ObjectId
    from llmos_cli.formats.manifest import Recipe
    from llmos_cli.store.refs.lineage import Ancestor, Lineage

SHOWN_SOURCES = 3
SHOWN_PARAMS = 6


def log(
    ctx: typer.Context,
    ref: Annotated[str, typer.Argument(metavar="[REMOTE/]REF", help="Whose history.", show_default=False)],
) -> None:
    """Show a ref's history and the tree of what it was made from.

    The newest value stands first. REF, REF~1, REF~2 and so on name them for every other command. Of REMOTE/REF only
    the moves and manifests are read, and nothing is kept.

    Examples:
      llmos log tiny
      llmos log tiny:v1 --json
      llmos log @3f2a9c01
      llmos log nas/tiny
    """
    from llmos_cli.remote.exchange.anywhere import history as moves_of
    from llmos_cli.remote.exchange.anywhere import resolve_anywhere, signers_of
    from llmos_cli.store.refs.lineage import trace

    here = session(ctx)
    with here.open_store() as store:
        source = resolve_anywhere(store, ref, here.cwd)
        moves = moves_of(store, source)
        signed = [signers_of(store, source, move) for move in moves]
        lineage = trace(store, source.id)
    history = [
        {
            "sequence": move.sequence,
            "id": str(move.id),
            "time": move.time,
            "who": move.who,
            "message": move.message,
            "signed": [signer_json(item) for item in by],
        }
        for move, by in zip(moves, signed, strict=True)
    ]
    objects = {str(oid): _as_json(ancestor) for oid, ancestor in lineage.objects.items()}
    found = {"ref": source.local_label, "remote": source.remote, "id": str(source.id)}
    here.out.result({**found, "history": history, "objects": objects})
    if source.named:
        here.out.line(f"History of {source.at(source.named)}")
        rows = [
            [
                "  " + (f"~{back}" if back else "now"),
                move.id.short,
                when(move.time),
                move.who,
                "; ".join([move.message, *(f"signed by {signer_text(item)}" for item in signed[back])]),
            ]
            for back, move in enumerate(moves)
        ]
        here.out.table(["  value", "id", "when", "who", "what"], rows, spare={2, 3})
        here.out.line()
    here.out.line("Made from")
    for line in _tree(lineage, source.label if source.remote and source.ref else None, plain=here.out.plain):
        here.out.line("  " + line)


def _tree(lineage: "Lineage", label: str | None, *, plain: bool) -> Sequence[str]:
    """The lineage as lines: an object, below it the command that made it, below that its inputs and sources. The root
    is called by its `label` (None: by the ref that names it)."""
    shown: set[ObjectId] = set()

    def children(node: tuple[str, Any]) -> list[tuple[str, Any]]:
        kind, value = node
        if kind == "command":
            inputs = [(f"{role}: ", oid) for role, oid in sorted(value.inputs.items())]
            return inputs + ([("sources", value.sources)] if value.sources else [])
        if kind == "sources" or value in shown:
            return []
        shown.add(value)
        manifest = lineage.objects[value].manifest
        return [("command", manifest.recipe)] if manifest and manifest.recipe else []

    def text(node: tuple[str, Any]) -> str:
        kind, value = node
        if kind == "command":
            return _command(value)
        if kind == "sources":
            names = [safe_line(source.name) for source in value[:SHOWN_SOURCES]]
            more = ["..."] if len(value) > SHOWN_SOURCES else []
            total = size(sum(source.size for source in value))
            return f"{plural(len(value), 'file')}, {total}: {', '.join(names + more)}"
        name = label if value == lineage.root else None
        return kind + _object(lineage.objects[value], name, seen=value in shown)

    return list(tree_lines(("", lineage.root), text, children, plain=plain))


def _object(ancestor: "Ancestor", label: str | None, *, seen: bool) -> str:
    names = [label] if label else ancestor.labels
    name = f"{names[0]} @{ancestor.id.short}" if names else f"@{ancestor.id.short}"
    if ancestor.manifest is None:
        return f"{name}  ({ancestor.problem})"
    shown = f"{name}  {ancestor.manifest.kind}, {size(ancestor.manifest.size)}"
    return f"{shown}  (as above)" if seen and ancestor.manifest.recipe else shown


def _command(recipe: "Recipe") -> str:
    scalars = [f"{key}={value}" for key, value in recipe.params.items() if isinstance(value, str | int | float)]
    parts = [recipe.command, *scalars[:SHOWN_PARAMS], *(["..."] if len(scalars) > SHOWN_PARAMS else [])]
    if recipe.seed is not None:
        parts.append(f"seed={recipe.seed}")
    return "by " + safe_line(" ".join(parts))


def _as_json(ancestor: "Ancestor") -> dict[str, Any]:
    from llmos_cli.store.refs.lineage import describe_recipe

    manifest = ancestor.manifest
    return {
        "refs": list(ancestor.labels),
        "problem": ancestor.problem,
        "kind": manifest and manifest.kind,
        "size": manifest and manifest.size,
        "recipe": describe_recipe(manifest.recipe) if manifest and manifest.recipe else None,
    }
