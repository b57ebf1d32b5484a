"""How well a stored model predicts a stored dataset: perplexity as a report that is itself an object.

A report's bytes hold results and inputs but no timings, so equal work gives an equal id and a repeat is found instead
of measured again. Imports no torch until there is something to measure.
"""

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Final

from llmos_cli import __version__
from llmos_cli.data.batches import TokenRows
from llmos_cli.data.layout import check_split
from llmos_cli.errors import Damaged, UsageError
from llmos_cli.formats import canonical
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.manifest import Manifest, Recipe
from llmos_cli.formats.names import RefName
from llmos_cli.progress import Progress
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import read_file, read_manifest
from llmos_cli.store.refs.recipes import find_made
from llmos_cli.store.transaction import begin

REPORT_FILE: Final = "report.json"
_MAX_LINEAGE: Final = 64


@dataclass(frozen=True)
class Evaluation:
    """A stored report; `rows` of `rows_total` rows were scored."""

    id: ObjectId
    made_before: bool
    perplexity: float
    loss: float
    tokens: int
    rows: int
    rows_total: int
    bits_per_byte: float | None


def evaluate(
    store: Store,
    model: ObjectId,
    data: ObjectId,
    *,
    max_rows: int | None = None,
    batch: int | None = None,
    split: str = "train",
    ref: RefName | None = None,
    progress: Progress,
) -> Evaluation:
    """Perplexity of `model` on a split of `data` (`max_rows` evenly spaced rows of it), kept under `ref` if given.

    `batch` rows are scored at a time, by default as many as suit. Raises UsageError if the dataset's tokens do not
    mean the same to the model.
    """
    for name, number in (("max-rows", max_rows), ("batch", batch)):
        if number is not None and number < 1:
            raise UsageError(f"--{name} must be at least 1, not {number}")
    model_manifest, data_manifest = read_manifest(store, model), read_manifest(store, data)
    if model_manifest.kind not in ("model", "checkpoint", "adapter"):
        raise UsageError(f"a {model_manifest.kind} cannot be evaluated", hint="name a model or a checkpoint: llmos ls")
    rows = TokenRows(store, data_manifest, split=check_split(data_manifest, split))
    limit = max_rows if max_rows is not None and max_rows < rows.rows else None
    recipe = Recipe(
        "eval",
        params={"batch": batch, "max_rows": limit} | ({} if split == "train" else {"split": split}),
        inputs={"model": model, "data": data},
        tools={"llmos": __version__, "torch": version("torch"), "transformers": version("transformers")},
    )
    with begin(store, purpose="eval", ref=ref) as tx:
        made = find_made(store, recipe)
        if made is not None:
            manifest = read_manifest(store, made)
        else:
            from llmos_cli.quantize.measure import measure

            report = measure(store, model_manifest, data_manifest, rows, limit=limit, batch=batch, progress=progress)
            report |= {"data": str(data), "model": str(model)}
            entry = tx.add_bytes(REPORT_FILE, canonical.encode(report) + b"\n")
            facts = {key: report[key] for key in ("loss", "perplexity", "tokens")}
            manifest = Manifest("report", (entry,), facts, recipe)
        commit = tx.commit(manifest, message=f"eval: perplexity {manifest.meta['perplexity']:.4f}")
    return _read_report(store, commit.id, manifest, made_before=made is not None)


def dataset_of(store: Store, model: Manifest) -> ObjectId | None:
    """The dataset that a model, or the model it was made from, was trained on; None if unknown or not in this store."""
    for _ in range(_MAX_LINEAGE):
        inputs = model.recipe.inputs if model.recipe else {}
        if "data" in inputs:
            return inputs["data"] if store.index.has(inputs["data"]) else None
        if "model" not in inputs or not store.index.has(inputs["model"]):
            return None
        model = read_manifest(store, inputs["model"])
    return None


def _read_report(store: Store, oid: ObjectId, manifest: Manifest, *, made_before: bool) -> Evaluation:
    entry = manifest.file(REPORT_FILE)
    values: Any = None if entry is None else canonical.loads(read_file(store, entry), REPORT_FILE)
    try:
        return Evaluation(
            oid,
            made_before,
            float(values["perplexity"]),
            float(values["loss"]),
            int(values["tokens"]),
            int(values["rows"]),
            int(values["rows_total"]),
            None if values["bits_per_byte"] is None else float(values["bits_per_byte"]),
        )
    except (TypeError, KeyError, ValueError) as exc:
        raise Damaged(f"@{oid.short} is not a perplexity report") from exc
