"""Which checkpoints of a run are kept, by their role.

- NAME:checkpoint is the newest, with everything that the next step depends on. Its log holds those before it, which a
  gc takes once they are older than the store's `keep_days`; `last` shortens that log to so many and gives their space
  back at once.
- NAME:step-N (`every`) and NAME:best (`best`) are models: the weights of that step without the optimizer's state, which
  is twice their size and of no use to whoever evaluates or serves them. They share the weights of their checkpoint.

All of it happens after the new checkpoint is durable.
"""

from typing import Final

from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.manifest import Manifest
from llmos_cli.formats.names import RefName
from llmos_cli.store.gc.superseded import give_back
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import read_manifest
from llmos_cli.store.refs.refs import read_ref, ref_history
from llmos_cli.store.refs.relog import trim_log
from llmos_cli.store.transaction import begin
from llmos_cli.train.config import FALLING
from llmos_cli.train.origin import checkpoint_recipe, same_run
from llmos_cli.train.plan import BEST_TAG, STATE_FOLDER, STEP_TAG, Plan

METRIC: Final = "metric"  # in the meta of NAME:best, what it is the best of


def keep_by_role(store: Store, plan: Plan, step: int, manifest: Manifest, metric: float | None) -> None:
    """Give the checkpoint of `step`, which is in the store, the refs it has earned, and let go those before it."""
    keep = plan.keep
    if keep.every is not None and step % keep.every == 0:
        _point(store, plan, f"{STEP_TAG}{step}", step, manifest, {})
    if keep.best is not None and metric is not None and _is_better(store, plan, metric):
        _point(store, plan, BEST_TAG, step, manifest, {METRIC: keep.best, keep.best: metric})
        if keep.last is not None:
            _shorten(store, plan, RefName(plan.target.name, BEST_TAG), 1)
    if keep.last is not None:
        _shorten(store, plan, plan.checkpoint_ref, keep.last - 1)  # the oldest one left names the one before it


def _is_better(store: Store, plan: Plan, metric: float) -> bool:
    entry = read_ref(store, RefName(plan.target.name, BEST_TAG))
    if entry is None:
        return True
    held = read_manifest(store, entry.id)
    if not same_run(held.recipe, plan.recipe):
        return True
    assert plan.keep.best is not None
    before = held.meta.get(plan.keep.best) if held.meta.get(METRIC) == plan.keep.best else None
    if type(before) is not float:
        return True
    return metric < before if plan.keep.best in FALLING else metric > before


def _point(store: Store, plan: Plan, tag: str, step: int, checkpoint: Manifest, facts: dict[str, str | float]) -> None:
    ref = RefName(plan.target.name, tag)
    files = tuple(entry for entry in checkpoint.files if not entry.path.startswith(f"{STATE_FOLDER}/"))
    with begin(store, purpose=f"train {plan.target.name}", ref=ref) as tx:
        manifest = Manifest(plan.kind, files, {**checkpoint.meta, **facts}, checkpoint_recipe(plan.recipe, step))
        tx.commit(manifest, message=f"train: step {step} of {plan.config.steps}")


def _shorten(store: Store, plan: Plan, ref: RefName, moves: int) -> None:
    """Leave the newest moves of this run in a ref's log; those of other runs, before it, are not ours to drop."""
    ours = []
    for move in ref_history(store, ref):
        if not _is_ours(store, plan, move.id):
            break
        ours.append(move)
    gone = ours[moves:]
    if gone:
        trim_log(store, ref, gone)
        give_back(store, [oid for move in gone for oid in (move.id, move.previous) if oid is not None])


def _is_ours(store: Store, plan: Plan, oid: ObjectId) -> bool:
    return same_run(read_manifest(store, oid).recipe, plan.recipe)
