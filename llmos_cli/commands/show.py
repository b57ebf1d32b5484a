"""`llmos show`: everything about one object."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmos_cli.errors import Damaged
from llmos_cli.ui.session import session
from llmos_cli.ui.text import count, plural, safe_line, shorten, size

if TYPE_CHECKING:
    from llmos_cli.formats.manifest import Manifest
    from llmos_cli.store.handle import Store
    from llmos_cli.ui.output import Output

SHOWN_FILES = 10
SHOWN_SOURCES = 3


def show(
    ctx: typer.Context,
    ref: Annotated[str, typer.Argument(metavar="REF", help="What to show.", show_default=False)],
    *,
    files: Annotated[bool, typer.Option("--files", help="List every file.")] = False,
) -> None:
    """Show an object: kind, size, tensors, how it was made, its files.

    Examples:
      llmos show tiny
      llmos show web --files
      llmos show @3f2a9c01 --json
    """
    from llmos_cli.store.lineage import describe_recipe, ref_labels
    from llmos_cli.store.objects import read_manifest
    from llmos_cli.store.resolve import resolve

    here = session(ctx)
    with here.open_store() as store:
        source = resolve(store, ref)
        manifest = read_manifest(store, source.id)
        labels = ref_labels(store)
        tensors = _tensors(store, manifest, here.out)
    recipe = manifest.recipe
    here.out.result(
        {
            "id": str(source.id),
            "ref": source.label,
            "refs": list(labels.get(source.id, ())),
            "kind": manifest.kind,
            "size": manifest.size,
            "tensors": tensors,
            "meta": manifest.meta,
            "recipe": describe_recipe(recipe) if recipe else None,
            "files": [{"path": entry.path, "size": entry.size} for entry in manifest.files],
        }
    )
    facts = [
        ("id", str(source.id)),
        ("kind", manifest.kind),
        ("size", f"{size(manifest.size)} in {plural(len(manifest.files), 'file')}"),
    ]
    if tensors:
        dtypes = ", ".join(f"{dtype} {plural(number, 'tensor')}" for dtype, number in tensors["dtypes"].items())
        facts.append(("tensors", f"{count(tensors['parameters'])} values in {dtypes}"))
    others = [label for label in labels.get(source.id, ()) if label != source.label]
    if others:
        facts.append(("also", ", ".join(others)))
    if recipe:
        facts.append(("made by", recipe.command if recipe.seed is None else f"{recipe.command}, seed {recipe.seed}"))
        for role, oid in sorted(recipe.inputs.items()):
            facts.append(("  " + role, " ".join([*labels.get(oid, ())[:1], f"@{oid.short}"])))
        if recipe.sources:
            names = ", ".join(source.name for source in recipe.sources[:SHOWN_SOURCES])
            more = ", ..." if len(recipe.sources) > SHOWN_SOURCES else ""
            total = size(sum(source.size for source in recipe.sources))
            facts.append(("  sources", f"{plural(len(recipe.sources), 'file')}, {total}: {names}{more}"))
        facts += [("  " + key, _value(value)) for key, value in sorted(recipe.params.items())]
        if recipe.tools:
            facts.append(("  tools", ", ".join(f"{name} {version}" for name, version in sorted(recipe.tools.items()))))
    here.out.line(source.label)
    _facts(here.out.line, facts)
    if manifest.meta:
        here.out.line("facts")
        _facts(here.out.line, [(key, _value(value)) for key, value in sorted(manifest.meta.items())])
    shown = manifest.files if files else manifest.files[:SHOWN_FILES]
    here.out.line("files")
    for entry in shown:
        here.out.line(f"  {size(entry.size):>8}  {safe_line(entry.path)}")
    if len(shown) < len(manifest.files):
        here.out.line(f"  and {count(len(manifest.files) - len(shown))} more (--files lists them)")


def _tensors(store: "Store", manifest: "Manifest", out: "Output") -> dict[str, Any] | None:
    """How many tensors of which dtype, and how many values they have; None where there are none."""
    from math import prod

    from llmos_cli.formats.safetensors import read_table
    from llmos_cli.store.objects import open_file

    dtypes: dict[str, int] = {}
    parameters = 0
    for entry in manifest.files:
        if not entry.path.endswith(".safetensors") or entry.path.startswith("training/"):
            continue
        try:
            table = read_table(open_file(store, entry).read, entry.size, entry.path)
        except Damaged as exc:
            out.warn(exc.message)
            continue
        for info in table:
            dtypes[info.dtype] = dtypes.get(info.dtype, 0) + 1
            parameters += prod(info.shape)
    if not dtypes:
        return None
    return {"count": sum(dtypes.values()), "parameters": parameters, "dtypes": dict(sorted(dtypes.items()))}


def _facts(line: Any, facts: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        line(f"  {name:<{width}}  {safe_line(value)}")


def _value(value: Any) -> str:
    if isinstance(value, bool) or value is None or isinstance(value, Mapping | list):
        return shorten(json.dumps(value), 200)
    return f"{value:,}" if isinstance(value, int) else str(value)
