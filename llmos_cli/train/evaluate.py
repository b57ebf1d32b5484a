"""Scores a stored model on a stored dataset of its task, as a report that is itself an object.

As with perplexity, a report holds results and inputs but no timings, so a repeat is found instead of measured again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

from llmos_cli import __version__
from llmos_cli.data.layout import check_split
from llmos_cli.errors import Damaged, UsageError
from llmos_cli.formats import canonical
from llmos_cli.formats.canonical import Json
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.manifest import Manifest, Recipe
from llmos_cli.formats.names import RefName
from llmos_cli.progress import Progress
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import read_file, read_manifest
from llmos_cli.store.refs.recipes import find_made
from llmos_cli.store.transaction import begin
from llmos_cli.train.inputs import check_dataset, check_parent

if TYPE_CHECKING:
    from llmos_cli.data.layout import Split

REPORT_FILE: Final = "report.json"
DEFAULT_BATCH: Final = 32
_FACTS: Final = ("rows", "rows_total", "task")  # of a report, what is no metric


@dataclass(frozen=True)
class TaskReport:
    """A stored report; `metrics` by name, `rows` of `rows_total` rows or examples were scored."""

    id: ObjectId
    made_before: bool
    task: str
    metrics: Mapping[str, float]
    rows: int
    rows_total: int


def evaluate_task(
    store: Store,
    model: ObjectId,
    data: ObjectId,
    *,
    max_rows: int | None = None,
    batch: int | None = None,
    split: str = "train",
    ref: RefName | None = None,
    progress: Progress,
) -> TaskReport:
    """How well `model` does the task of a split of `data` (`max_rows` evenly spaced rows of it), kept under `ref`.

    Raises UsageError if the model is for something else, or means something else by the dataset's tokens or labels.
    """
    manifest, dataset = read_manifest(store, model), read_manifest(store, data)
    check_dataset(dataset, f"@{data.short}")
    check_parent(store, manifest, f"@{model.short}", dataset, f"@{data.short}", to_score=True)
    found_split = check_split(dataset, split)
    bleu = dataset.meta.get("task") == "seq2seq" and _bleu_version()
    recipe = Recipe(
        "eval",
        params={"batch": batch or DEFAULT_BATCH, "max_rows": max_rows, "split": split, "task": dataset.meta["task"]},
        inputs={"model": model, "data": data},
        tools={"llmos": __version__, "torch": version("torch"), "transformers": version("transformers")}
        | ({"sacrebleu": bleu} if bleu else {}),
    )
    with begin(store, purpose="eval", ref=ref) as tx:
        made = find_made(store, recipe)
        if made is not None:
            report = read_manifest(store, made)
        else:
            measured = _measure(store, manifest, dataset, found_split, max_rows, batch or DEFAULT_BATCH, progress)
            entry = tx.add_bytes(
                REPORT_FILE, canonical.encode(measured | {"data": str(data), "model": str(model)}) + b"\n"
            )
            report = Manifest("report", (entry,), measured, recipe)
        best = next(name for name in ("accuracy", "pearson", "loss") if name in report.meta)
        commit = tx.commit(report, message=f"eval: {best} {report.meta[best]:.4f}")
    return _read(store, commit.id, report, made_before=made is not None)


def _measure(
    store: Store,
    manifest: Manifest,
    data: Manifest,
    split: "Split",
    max_rows: int | None,
    batch: int,
    progress: Progress,
) -> dict[str, Json]:
    import numpy as np

    from llmos_cli.models.config import load_config
    from llmos_cli.models.device import pick_device
    from llmos_cli.models.heads import head_of, model_class
    from llmos_cli.models.load import load_model
    from llmos_cli.models.quiet import quiet
    from llmos_cli.train.checkpoints.writing import write_and_compare
    from llmos_cli.train.scoring import score
    from llmos_cli.train.tasks.labelled import LabelledTask
    from llmos_cli.train.tasks.opened import head_for, open_task, task_of
    from llmos_cli.train.tasks.translated import TranslatedTask

    config, device = load_config(store, manifest), pick_device()
    name = task_of(data)
    head, own = head_for(name, config), head_of(config)
    if head not in (own, "causal"):
        raise UsageError(
            f"a {model_class(config, own).__name__} is not trained for the task {name}",
            hint="train it first: llmos train NAME --data DATASET --model REF",
        )
    with quiet():
        model = load_model(store, manifest, device=device, head=head, progress=progress)
        task = open_task(store, data, model, seed=0, split=split, progress=progress)
        if isinstance(task, LabelledTask) and not task.labels.same_as(config):
            known = ", ".join(map(str, (config.id2label or {}).values()))
            raise UsageError(
                f"the dataset has the labels {', '.join(task.labels.words)}, the model knows {known}",
                hint="shard it with the labels of what the model was trained on: --labels-from REF",
            )
        limit = min(max_rows or task.count, task.count)
        indices = np.arange(limit, dtype=np.int64) * task.count // limit
        metrics = score(task, model, device, batch=batch, indices=indices, progress=progress)
        if isinstance(task, TranslatedTask):
            metrics |= write_and_compare(store, data, task, model, indices, batch=batch, progress=progress)
    rounded: dict[str, Json] = {name: float(f"{value:.6g}") for name, value in metrics.items()}
    return rounded | {"rows": limit, "rows_total": task.count, "task": name}


def _bleu_version() -> str | None:
    from importlib.metadata import PackageNotFoundError

    try:
        return version("sacrebleu")
    except PackageNotFoundError:
        return None


def _read(store: Store, oid: ObjectId, manifest: Manifest, *, made_before: bool) -> TaskReport:
    entry = manifest.file(REPORT_FILE)
    values: Any = None if entry is None else canonical.loads(read_file(store, entry), REPORT_FILE)
    try:
        metrics = {name: float(value) for name, value in values.items() if isinstance(value, float)}
        return TaskReport(
            oid, made_before, str(values["task"]), metrics, int(values["rows"]), int(values["rows_total"])
        )
    except (TypeError, KeyError, ValueError, AttributeError) as exc:
        raise Damaged(f"@{oid.short} is not a report of a task") from exc
