"""A model held against another, mostly the one it was made from: a report that is itself an object.

As with other reports (quality.py), equal work gives an equal id and a repeat is found. Imports no torch until there is
something to measure.
"""

import math
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, Final

from llmos_cli import __version__
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

REPORT_FILE: Final = "report.json"
_MAX_LOGITS: Final = 1 << 24  # of a batch, held four times


@dataclass(frozen=True)
class Comparison:
    """A stored report of a model against another on `tokens` tokens. The ratio of perplexities is above 1 where the
    model is worse; `kl_*` are in nats; `same_top` is a share."""

    id: ObjectId
    made_before: bool
    perplexity: float
    perplexity_against: float
    kl_mean: float
    kl_999: float
    same_top: float
    tokens: int
    rows: int

    @property
    def ratio(self) -> float:
        return self.perplexity / self.perplexity_against


def hold_against(
    store: Store,
    model: ObjectId,
    against: ObjectId,
    data: ObjectId,
    *,
    max_rows: int,
    ref: RefName | None = None,
    progress: Progress,
) -> Comparison:
    """Compare two models on at most `max_rows` evenly spaced rows of a dataset; kept under `ref` if given.

    Raises UsageError unless the dataset's tokens mean the same to both.
    """
    manifests = [read_manifest(store, oid) for oid in (model, against)]
    for manifest in manifests:
        if manifest.kind not in ("model", "checkpoint"):
            raise UsageError(f"a {manifest.kind} cannot be compared", hint="name a model or a checkpoint: llmos ls")
    recipe = Recipe(
        "compare",
        params={"max_rows": max_rows, "version": 3},  # 1 counted padding, 2 let documents of a row see each other
        inputs={"model": model, "against": against, "data": data},
        tools={"llmos": __version__, "torch": version("torch"), "transformers": version("transformers")},
    )
    with begin(store, purpose="compare", ref=ref) as tx:
        made = find_made(store, recipe)
        if made is not None:
            report = read_manifest(store, made)
        else:
            values = _measure(store, manifests, read_manifest(store, data), max_rows, progress)
            values |= {"model": str(model), "against": str(against), "data": str(data)}
            entry = tx.add_bytes(REPORT_FILE, canonical.encode(values) + b"\n")
            facts = {key: values[key] for key in ("kl_mean", "perplexity", "same_top")}
            report = Manifest("report", (entry,), facts, recipe)
        commit = tx.commit(report, message=f"compare: KL divergence {report.meta['kl_mean']}")
    kept = report.file(REPORT_FILE)
    return _read(commit.id, b"" if kept is None else read_file(store, kept), made_before=made is not None)


def check_fit(store: Store, model: Manifest, data: ObjectId) -> None:
    """Raise UsageError unless the tokens of a dataset mean to a model what they mean in the dataset."""
    from llmos_cli.quantize.measure import sample_rows

    sample_rows(store, model, read_manifest(store, data), 1)


def _measure(
    store: Store, manifests: list[Manifest], data: Manifest, max_rows: int, progress: Progress
) -> dict[str, Json]:
    from llmos_cli.models.device import pick_device
    from llmos_cli.models.load import load_model
    from llmos_cli.models.packed import keeps_apart
    from llmos_cli.models.quiet import quiet
    from llmos_cli.quantize.divergence import diverge
    from llmos_cli.quantize.measure import check_match, sample_rows

    rows = sample_rows(store, manifests[0], data, max_rows)
    check_match(store, manifests[1], data, rows.input_ids.shape[1])
    device = pick_device()
    model, against = (load_model(store, manifest, device=device, progress=progress) for manifest in manifests)
    vocab = int(against.get_input_embeddings().weight.shape[0])
    batch = max(1, min(32, _MAX_LOGITS // (rows.input_ids.shape[1] * vocab)))
    with quiet():
        apart = all(keeps_apart(one, rows.input_ids.shape[1]) for one in (model, against))
        found = asdict(
            diverge(
                against,
                model,
                rows.input_ids,
                learned=rows.learned,
                positions=rows.position_ids if apart else None,
                batch=batch,
                progress=progress,
            )
        )
    losses = {"perplexity": found["loss"], "perplexity_against": found.pop("reference_loss")}
    exact: dict[str, Json] = {name: float(f"{value:.6g}") for name, value in found.items() if name != "tokens"}
    exact |= {name: float(f"{math.exp(loss):.7g}") for name, loss in losses.items()}
    return exact | {"tokens": found["tokens"], "rows": len(rows.input_ids), "device": device.type}


def _read(oid: ObjectId, data: bytes, *, made_before: bool) -> Comparison:
    values: Any = canonical.loads(data, REPORT_FILE) if data else None
    try:
        numbers = {
            key: float(values[key]) for key in ("perplexity", "perplexity_against", "kl_mean", "kl_999", "same_top")
        }
        return Comparison(oid, made_before, tokens=int(values["tokens"]), rows=int(values["rows"]), **numbers)
    except (TypeError, KeyError, ValueError) as exc:
        raise Damaged(f"@{oid.short} is not a report of a comparison") from exc
