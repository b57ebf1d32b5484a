"""From the last checkpoint to the finished model: the same files without the training state, so it costs nothing."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmos_cli.errors import Damaged
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.manifest import Manifest
from llmos_cli.formats.names import RefName
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import read_manifest
from llmos_cli.store.refs.point import point
from llmos_cli.store.refs.refs import read_ref
from llmos_cli.store.transaction import begin
from llmos_cli.train.origin import read_checkpoint
from llmos_cli.train.plan import STATE_FOLDER, Plan


@dataclass(frozen=True)
class Trained:
    """`unchanged` says that nothing had to be trained; `tokens_per_second` counts this process's steps only."""

    id: ObjectId
    ref: RefName
    step: int
    loss: float
    tokens: int
    checkpoint: ObjectId | None
    tokens_per_second: float | None = None
    log: Path | None = None
    unchanged: bool = False


def use_made(store: Store, plan: Plan, made: ObjectId) -> Trained:
    """Point the ref at the model that this recipe made before."""
    manifest = read_manifest(store, made)
    entry = read_ref(store, plan.target)
    if entry is None or entry.id != made:
        message = f"train: made before as @{made.short}"
        point(store, plan.target, made, expected=entry.id if entry else None, message=message)
    checkpoint = read_checkpoint(store, plan.checkpoint_ref)
    ours = checkpoint is not None and checkpoint.recipe == plan.recipe
    return Trained(
        made,
        plan.target,
        plan.config.steps,
        *_figures(manifest.meta, made),
        checkpoint.id if checkpoint and ours else None,
        unchanged=True,
    )


def publish_model(store: Store, plan: Plan, checkpoint_id: ObjectId, checkpoint: Manifest) -> Trained:
    """Commit the model that a run's last checkpoint holds under the run's name."""
    files = tuple(entry for entry in checkpoint.files if not entry.path.startswith(f"{STATE_FOLDER}/"))
    meta = {key: value for key, value in checkpoint.meta.items() if key != "step"}
    loss, tokens = _figures(meta, checkpoint_id)
    with begin(store, purpose=f"train {plan.target.name}", ref=plan.target) as tx:
        commit = tx.commit(
            Manifest(plan.kind, files, meta, plan.recipe), message=f"train: {plan.config.steps} steps, loss {loss:.4f}"
        )
    return Trained(commit.id, plan.target, plan.config.steps, loss, tokens, checkpoint_id)


def _figures(meta: Mapping[str, Any], oid: ObjectId) -> tuple[float, int]:
    loss, tokens = meta.get("loss"), meta.get("tokens")
    if type(loss) is not float or type(tokens) is not int:
        raise Damaged(f"@{oid.short} does not say what it was trained to")
    return loss, tokens
