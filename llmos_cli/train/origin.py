"""Checkpoints as what a run goes on from: its own, or any of another run."""

import re
from dataclasses import dataclass, replace
from typing import Final

from llmos_cli.errors import Damaged, NotFound, UsageError
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.manifest import Manifest, Recipe
from llmos_cli.formats.names import RefName, parse_ref
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import read_manifest
from llmos_cli.store.refs.refs import read_ref, ref_history
from llmos_cli.store.refs.resolve import resolve

CHECKPOINT_TAG: Final = "checkpoint"
STEP_PARAM: Final = "at_step"  # in a checkpoint's recipe, what tells it from the finished model's
_AT_STEP = re.compile(r"(?P<run>[^@]+)@(?P<step>[0-9]{1,12})\Z")


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint of some run."""

    id: ObjectId
    manifest: Manifest
    recipe: Recipe  # as of the finished model: without the step
    step: int
    label: str  # as one would type it


def read_checkpoint(store: Store, ref: RefName) -> Checkpoint | None:
    """The checkpoint that `ref` points to; None if there is none, UsageError if it points to something else."""
    entry = read_ref(store, ref)
    return None if entry is None else _checkpoint(entry.id, read_manifest(store, entry.id), str(ref))


def find_checkpoint(store: Store, text: str) -> Checkpoint:
    """A checkpoint by what a user typed: RUN@STEP, RUN (its newest), NAME:checkpoint~N or @ID.

    Raises NotFound, UsageError for what is not a checkpoint.
    """
    if match := _AT_STEP.match(text):
        return _at_step(store, RefName(parse_ref(match["run"]).name, CHECKPOINT_TAG), int(match["step"]))
    if not text.startswith("@") and not {":", "~"} & set(text):
        text = f"{text}:{CHECKPOINT_TAG}"
    oid = resolve(store, text).id
    return _checkpoint(oid, read_manifest(store, oid), text)


def checkpoint_recipe(recipe: Recipe, step: int) -> Recipe:
    """The recipe of the checkpoint at `step` of a run."""
    return replace(recipe, params={**recipe.params, STEP_PARAM: step})


def same_run(one: Recipe | None, other: Recipe) -> bool:
    """Whether two recipes are of one run, at whatever step and by whatever versions."""
    if one is None:
        return False
    parameters = [{key: value for key, value in recipe.params.items() if key != STEP_PARAM} for recipe in (one, other)]
    return parameters[0] == parameters[1] and replace(one, params={}, tools={}) == replace(other, params={}, tools={})


def _checkpoint(oid: ObjectId, manifest: Manifest, label: str) -> Checkpoint:
    recipe = manifest.recipe
    if manifest.kind == "model":
        hint = f"it has no optimizer state: start from its weights with --model {label}"
        raise UsageError(f"{label} is not a training checkpoint but a model", hint=hint)
    if manifest.kind != "checkpoint" or recipe is None or recipe.command != "train":
        raise UsageError(f"{label} is not a training checkpoint but a {manifest.kind}", hint="choose another name")
    params = dict(recipe.params)
    step = params.pop(STEP_PARAM, None)
    if type(step) is not int or step < 0:
        raise Damaged(f"{label} (@{oid.short}) does not say which step it holds")
    return Checkpoint(oid, manifest, replace(recipe, params=params), step, label)


def _at_step(store: Store, ref: RefName, step: int) -> Checkpoint:
    """The newest checkpoint of that step in the log of a run."""
    history = ref_history(store, ref)
    if not history:
        raise NotFound(f"no ref {ref} in this store", hint="list what there is: llmos ls")
    values = [move.id for move in history] + ([history[-1].previous] if history[-1].previous else [])
    there = []
    for number, oid in enumerate(values):
        try:
            found = _checkpoint(oid, read_manifest(store, oid), f"{ref}~{number}" if number else str(ref))
        except (Damaged, NotFound):
            continue  # an earlier value that a gc has taken
        if found.step == step:
            return found
        there.append(found.step)
    raise NotFound(
        f"{ref} has no checkpoint of step {step:,}",
        hint=f"it has those of steps {', '.join(map(str, sorted(set(there))[-10:]))}",
    )
