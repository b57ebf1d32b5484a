"""A model's card: what it is, what it was made from and how, what was measured of it. From manifests and reports only.

A function of the model and of the reports that are known of it and its siblings (what was made from the same model and
compared with it); no time and no host, so that the same knowledge gives the same card.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from llmos_cli.errors import LlmosError, UsageError
from llmos_cli.export.markup import Block, Code, Heading, Plot, Table, Text
from llmos_cli.formats import canonical
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.manifest import Manifest
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import read_file, read_manifest
from llmos_cli.store.refs.lineage import Ancestor, ref_labels, trace

CARD_FILE: Final = "README.md"
FRONT_MATTER: Final = "---\nlibrary_name: transformers\ntags:\n- llmos\n---\n\n"  # what hubs read
Name = Callable[[ObjectId], str]
_REPORT: Final = "report.json"
_PLAIN: Final = (str, int, float, bool)
_MOST: Final = 40  # of a recipe's parameters, or of reports


@dataclass(frozen=True)
class Report:
    """What was measured: of `model`, maybe held against another, on a dataset."""

    id: ObjectId
    model: ObjectId
    against: ObjectId | None
    data: ObjectId | None
    values: Mapping[str, Any]


def reports_of(store: Store, model: ObjectId) -> tuple[Report, ...]:
    """The stored reports of a model and of its siblings: what was compared with the model that both were made from."""
    recipe = read_manifest(store, model).recipe
    family = {model} | ({recipe.inputs["model"]} if recipe and "model" in recipe.inputs else set())
    found = []
    for oid in store.index.manifests():
        try:
            manifest = read_manifest(store, oid)
        except LlmosError:
            continue
        inputs = manifest.recipe.inputs if manifest.kind == "report" and manifest.recipe else {}
        entry = manifest.file(_REPORT)
        if entry is None or not (inputs.get("model") == model or inputs.get("against") in family):
            continue
        try:
            values = canonical.loads(read_file(store, entry), _REPORT)
        except LlmosError:
            continue
        if isinstance(values, dict) and "model" in inputs:
            found.append(Report(oid, inputs["model"], inputs.get("against"), inputs.get("data"), values))
    return tuple(sorted(found, key=lambda report: str(report.id)))


def card(store: Store, model: ObjectId, title: str, reports: tuple[Report, ...]) -> list[Block]:
    """The card as a page. Raises UsageError for what is no model."""
    lineage = trace(store, model)
    own = lineage.objects[model].manifest
    if own is None or own.kind not in ("model", "checkpoint", "adapter"):
        raise UsageError(f"{title} is a {own.kind if own else 'missing object'}, not a model", hint="llmos ls")
    labels = ref_labels(store)

    def name(oid: ObjectId) -> str:
        return f"{labels[oid][0]} @{oid.short}" if oid in labels else f"@{oid.short}"

    blocks: list[Block] = [Heading(title, 1), Table(("what", "value"), _facts(model, own))]
    blocks += _measured(store, model, reports, name)
    blocks += _origins(model, lineage.objects, name)
    blocks += _data(lineage.objects, name)
    return blocks


def _facts(model: ObjectId, manifest: Manifest) -> tuple[tuple[str, str], ...]:
    rows = [("id", str(model)), ("size", f"{manifest.size:,} bytes in {len(manifest.files)} files")]
    rows += [(key, _value(value)) for key, value in sorted(manifest.meta.items()) if isinstance(value, _PLAIN)]
    kept = manifest.meta.get("kept")
    if isinstance(kept, dict):
        rows += [(f"kept: {layer}", str(reason)) for layer, reason in sorted(kept.items())[:_MOST]]
    return tuple(rows)


def _measured(store: Store, model: ObjectId, reports: tuple[Report, ...], name: Name) -> list[Block]:
    blocks: list[Block] = []
    mine = [report for report in reports if report.model == model]
    rows = []
    for report in mine[:_MOST]:
        numbers = [(key, value) for key, value in sorted(report.values.items()) if isinstance(value, int | float)]
        where = f"on {name(report.data)}" if report.data else ""
        where += f" against {name(report.against)}" if report.against else ""
        rows += [(key, _value(value), where) for key, value in numbers]
    blocks.append(Heading("Measured"))
    if rows:
        blocks.append(Table(("metric", "value", "where"), tuple(rows)))
    else:
        blocks.append(Text("Nothing was measured yet: llmos eval REF --data DATASET."))
    points = _points(store, reports, name)
    if points:
        blocks += [Heading("Size against quality", 3), Plot("megabytes", "perplexity, times the original's", points)]
    return blocks


def _points(store: Store, reports: tuple[Report, ...], name: Name) -> tuple[tuple[str, float, float], ...]:
    """What was made from one model and compared with it, and the model: size and ratio of perplexities."""
    points: dict[ObjectId, tuple[str, float, float]] = {}
    for report in reports:
        before, after = report.values.get("perplexity_against"), report.values.get("perplexity")
        if report.against is None or not before or not after or report.model == report.against:
            continue
        for oid, ratio in ((report.model, float(after) / float(before)), (report.against, 1.0)):
            try:
                points.setdefault(oid, (name(oid).partition(" @")[0], read_manifest(store, oid).size / 1e6, ratio))
            except LlmosError:
                continue
    return tuple(sorted(points.values(), key=lambda point: point[1])) if len(points) > 1 else ()


def _origins(model: ObjectId, objects: Mapping[ObjectId, Ancestor], name: Name) -> list[Block]:
    """How it was made, step by step: each object with its recipe, the last step first."""
    blocks: list[Block] = [Heading("Made by")]
    waiting, seen = [model], {model}
    for oid in waiting:
        manifest = objects[oid].manifest
        recipe = manifest.recipe if manifest else None
        if recipe is None:
            blocks.append(Text(f"{name(oid)} came from outside{'' if manifest else ', and is not here'}."))
            continue
        inputs = ", ".join(f"{role} {name(other)}" for role, other in sorted(recipe.inputs.items()))
        sources = f" from {len(recipe.sources)} files" if recipe.sources else ""
        blocks.append(Text(f"{name(oid)} by {recipe.command}{sources}{f' of {inputs}' if inputs else ''}:"))
        params = {**recipe.params, **({"seed": recipe.seed} if recipe.seed is not None else {})}
        lines = [f"{key} = {_value(value)}" for key, value in sorted(params.items())[:_MOST]]
        lines.append("tools: " + ", ".join(f"{tool} {what}" for tool, what in sorted(recipe.tools.items())))
        blocks.append(Code("\n".join(lines)))
        fresh = [other for other in recipe.inputs.values() if other in objects and other not in seen]
        seen |= set(fresh)
        waiting += fresh
    return blocks


def _data(objects: Mapping[ObjectId, Ancestor], name: Name) -> list[Block]:
    rows = []
    for oid, item in sorted(objects.items(), key=lambda pair: str(pair[0])):
        if item.manifest is not None and item.manifest.kind == "dataset":
            meta = item.manifest.meta
            said = [f"{key} {_value(meta[key])}" for key in ("task", "documents", "rows", "seq_len") if key in meta]
            rows.append((name(oid), ", ".join(said)))
    return [Heading("Data"), Table(("dataset", "what"), tuple(rows))] if rows else []


def _value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value) if isinstance(value, str) else canonical.encode(value).decode()
