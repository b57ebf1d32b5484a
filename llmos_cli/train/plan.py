"""What a `train` command will do, decided without torch: inputs, recipe, and where it continues from.

Whatever can be refused is refused here, in the time it takes to read a few small objects.
"""

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from typing import Final

from llmos_cli import __version__
from llmos_cli.data.layout import check_split
from llmos_cli.errors import NotFound, UsageError
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.manifest import Manifest, Recipe, recipe_key
from llmos_cli.formats.names import RefName, parse_ref
from llmos_cli.remote.exchange.anywhere import resolve_streamed
from llmos_cli.store.leases import hold_alone
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import read_manifest
from llmos_cli.store.refs.recipes import find_made
from llmos_cli.store.refs.refs import read_ref, ref_names
from llmos_cli.store.refs.resolve import resolve
from llmos_cli.train.config import (
    ALLOWED,
    EVAL,
    SKIPPED,
    Options,
    Retention,
    TrainConfig,
    check_save_every,
    clipped,
    default_save_every,
    differences,
    from_params,
)
from llmos_cli.train.config import resolve as resolve_config
from llmos_cli.train.inputs import check_dataset, check_parent, check_sizes, tokenizer_file
from llmos_cli.train.log.trackers import check_tracker
from llmos_cli.train.origin import CHECKPOINT_TAG, Checkpoint, find_checkpoint, read_checkpoint

BEST_TAG: Final = "best"
STEP_TAG: Final = "step-"
STATE_FOLDER: Final = "training"  # in a checkpoint, what a finished model leaves behind


@dataclass(frozen=True)
class Plan:
    """A training run, ready to start. `resume` is where it continues; `made` is the result if it exists already.
    `origin` is the checkpoint of another run that it was to begin with."""

    target: RefName
    checkpoint_ref: RefName
    config: TrainConfig
    recipe: Recipe
    data_id: ObjectId
    data: Manifest
    data_label: str
    model_id: ObjectId | None
    model: Manifest | None
    save_every: int
    resume: Checkpoint | None
    made: ObjectId | None
    notes: tuple[str, ...]
    keep: Retention
    origin: Checkpoint | None = None
    eval_every: int | None = None
    goes_on: bool = False  # asked to be resumed
    log: str | None = None  # the tracker that draws it

    @property
    def key(self) -> str:
        """Names the run in logs and leases. Tools do not count, so an upgrade keeps the run; nor does what was passed
        over, so its curve goes on."""
        params = {key: value for key, value in self.recipe.params.items() if key != SKIPPED}
        return recipe_key(replace(self.recipe, params=params, tools={})).short

    @property
    def kind(self) -> str:
        """What the run makes."""
        return "adapter" if self.config.lora is not None else "model"

    @property
    def label(self) -> str:
        """The target as one would type it."""
        return self.target.name if self.target == RefName(self.target.name) else str(self.target)

    @property
    def start(self) -> int:
        return self.resume.step if self.resume else 0

    @property
    def own(self) -> Checkpoint | None:
        """The checkpoint of this very run that it continues from."""
        return None if self.resume is self.origin else self.resume

    def is_saved(self, step: int) -> bool:
        """Whether a checkpoint is due after this step: it may be the best, or is kept. The last one is always saved."""
        by_score = self.keep.best is not None and self.keep.best.startswith(EVAL)
        due = (self.save_every, self.keep.every, self.eval_every if by_score else None)
        return any(every is not None and step % every == 0 for every in due)


def hold_run(store: Store, name: str) -> AbstractContextManager[None]:
    """Be the only trainer of a run, from before the plan to the end; raises Busy naming the other one."""
    run = parse_ref(name).name
    return hold_alone(store, f"train-{run}", f"train {run}")


def make_plan(
    store: Store,
    name: str,
    *,
    data: str | None,
    model: str | None,
    options: Options,
    save_every: int | None = None,
    eval_every: int | None = None,
    keep: Retention | None = None,
    resume: bool = False,
    fork: str | None = None,
    allow: Collection[str] = (),
    anew: bool = False,
    log: str | None = None,
) -> Plan:
    """Decide what to train; raises UsageError, NotFound, Unsafe or Damaged for what cannot be.

    With `fork` it begins with that checkpoint, optimizer and all, and takes from it what is not said. With `allow`
    ("data", "config") a resumed run may differ in that from its checkpoint, and is a fork of it. With `anew` it is made
    even if it was made before.
    """
    target = parse_ref(name)
    if target.tag == CHECKPOINT_TAG:
        raise UsageError(f"{target} names the checkpoints of a run", hint=f"write {target.name}")
    checkpoint_ref = RefName(target.name, CHECKPOINT_TAG)
    _refuse_other_kind(store, target)
    keep = keep or Retention()
    _check_kept(store, target.name, keep)
    found = read_checkpoint(store, checkpoint_ref)
    origin = find_checkpoint(store, fork) if fork is not None else None
    source = found if found and resume else origin
    recorded = _recorded(source) if source else None
    if origin and (model is not None or options.depth is not None or options.config is not None):
        raise UsageError("--fork and --model, --depth or --config all say what to start from", hint="give one of them")

    data_id = resolve_streamed(store, data, near="tokenizer/").id if data else recorded.data if recorded else None
    if data_id is None:
        raise UsageError("--data is missing", hint="make a dataset with: llmos shard TEXT... NAME")
    if not data and not store.index.locate(data_id):
        raise NotFound(f"dataset @{data_id.short} is not in this store", hint="say where it is: --data REMOTE/REF")
    model_id = resolve(store, model).id if model else None
    if recorded and model is None and options.depth is None and options.config is None:
        model_id = recorded.model
    config = resolve_config(options, from_model=model_id is not None, recorded=recorded.config if recorded else None)
    every = default_save_every(config.steps) if save_every is None else check_save_every(save_every)

    data_label = data or f"@{data_id.short}"
    dataset = read_manifest(store, data_id)
    check_dataset(dataset, data_label)
    if keep.best is not None and keep.best.startswith(EVAL) and eval_every is None:
        raise UsageError(f"--keep-best {keep.best} goes by scores of the valid split", hint="add --eval-every N")
    if eval_every is not None:
        check_save_every(eval_every, "--eval-every")
        check_split(dataset, "valid")
    parent = None
    if model_id is not None:
        parent = read_manifest(store, model_id)
        check_parent(store, parent, model or f"@{model_id.short}", dataset, data_label)
    if config.config is not None:
        check_sizes(config.config, "--config", dataset, data_label)

    inputs = {"data": data_id} | ({"model": model_id} if model_id is not None else {})
    began_with = origin.id if origin else recorded.origin if recorded else None
    if began_with is not None:
        inputs["checkpoint"] = began_with
    differs = _differences(config, inputs, found) if found is not None else []
    notes = []
    if found is not None and resume and differs and {what for what, _ in differs} <= set(allow):
        notes.append(f"going on from {checkpoint_ref} with what is allowed: {'; '.join(text for _, text in differs)}")
        origin, inputs["checkpoint"], differs = found, found.id, []
    if origin:
        check_parent(store, origin.manifest, origin.label, dataset, data_label)
    if origin and origin.step >= config.steps:
        raise UsageError(
            f"{origin.label} holds step {origin.step:,}: there is nothing left of {config.steps:,} steps",
            hint="give more --steps",
        )
    recipe = Recipe("train", config.params(), inputs, (), config.seed, _tools(config))
    made = None if anew else find_made(store, recipe)
    if found is not None and made is None:
        if resume and differs:
            raise UsageError(
                f"{checkpoint_ref} belongs to another run: {'; '.join(text for _, text in differs)}",
                hint=_how_to_go_on(differs),
            )
        if differs:
            notes.append(f"{checkpoint_ref} is of another run, which stays in its log: llmos log {checkpoint_ref}")
            found = None
        elif not resume and found.step < config.steps:
            raise UsageError(
                f"{checkpoint_ref} already holds step {found.step:,} of {config.steps:,} of this run",
                hint="add --resume to continue it, or drop it with: llmos rm " + str(checkpoint_ref),
            )
        if found is not None and found.recipe.tools != recipe.tools:
            notes.append(
                f"{checkpoint_ref} was made by other versions: {_tool_changes(found.recipe.tools, recipe.tools)}"
            )
    elif resume and made is None and not origin:
        notes.append(f"there is no {checkpoint_ref} yet: starting at step 0")
    return Plan(
        target,
        checkpoint_ref,
        config,
        recipe,
        data_id,
        dataset,
        data_label,
        model_id,
        parent,
        every,
        None if made else found or origin,
        made,
        tuple(notes),
        keep,
        origin,
        eval_every,
        resume,
        None if log is None else check_tracker(log),
    )


def tokenizer_source(plan: Plan) -> Manifest:
    """Whose tokenizer the trained model carries: the parent's if it has one, else the dataset's."""
    return plan.model if plan.model is not None and tokenizer_file(plan.model) is not None else plan.data


@dataclass(frozen=True)
class _Recorded:
    config: TrainConfig
    data: ObjectId | None
    model: ObjectId | None
    origin: ObjectId | None


def _recorded(checkpoint: Checkpoint) -> _Recorded:
    recipe = checkpoint.recipe
    config = from_params(recipe.params, recipe.seed, checkpoint.label)
    inputs = recipe.inputs
    return _Recorded(config, inputs.get("data"), inputs.get("model"), inputs.get("checkpoint"))


def _differences(config: TrainConfig, inputs: Mapping[str, ObjectId], found: Checkpoint) -> list[tuple[str, str]]:
    """In what a run differs from the one of a checkpoint, each as what it is ("config" for any setting) and in words.

    Steps to pass over that are still ahead of the checkpoint make no difference to it.
    """
    theirs = found.recipe.inputs
    roles = [
        (role, f"{role} ({_short(inputs.get(role))} asked, {_short(theirs.get(role))} in the checkpoint)")
        for role in sorted({*inputs, *theirs})
        if inputs.get(role) != theirs.get(role)
    ]
    recorded = _recorded(found).config
    if clipped(config.skip_steps, found.step) == clipped(recorded.skip_steps, found.step):
        config = replace(config, skip_steps=recorded.skip_steps)
    return roles + [("config", text) for text in differences(config, recorded)]


def _how_to_go_on(differs: Sequence[tuple[str, str]]) -> str:
    kinds = sorted({what for what, _ in differs})
    anew = "start anew without --resume (the old checkpoint stays in the log)"
    if set(kinds) <= set(ALLOWED):
        return f"repeat that run's options, or go on all the same with --allow {','.join(kinds)}, or {anew}"
    return f"repeat that run's options, or {anew}"


def _short(oid: ObjectId | None) -> str:
    return "none" if oid is None else f"@{oid.short}"


def _check_kept(store: Store, name: str, keep: Retention) -> None:
    """Refuse before training what would be refused at the first checkpoint to keep."""
    for ref in ref_names(store):
        kept = (keep.every and ref.tag.startswith(STEP_TAG)) or (keep.best and ref.tag == BEST_TAG)
        if ref.name == name and kept:
            _refuse_other_kind(store, ref)


def _refuse_other_kind(store: Store, ref: RefName) -> None:
    entry = read_ref(store, ref)
    if entry is not None and (manifest := read_manifest(store, entry.id)).kind not in ("model", "adapter"):
        raise UsageError(f"{ref} is a {manifest.kind}, not a model", hint="choose another name for the model")


def _tools(config: TrainConfig) -> dict[str, str]:
    """Versions of what decides the bytes; of a package that is missing there is none, and its user says so."""
    more = (("peft", config.lora is not None), ("schedulefree", config.optimizer == "schedule-free"))
    used = ["accelerate", "torch", "transformers", *(name for name, asked in more if asked and find_spec(name))]
    return {"llmos": __version__} | {name: version(name) for name in used}


def _tool_changes(theirs: Mapping[str, str], ours: Mapping[str, str]) -> str:
    names = sorted(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name))
    return ", ".join(f"{name} {theirs.get(name, 'none')} then, {ours.get(name, 'none')} now" for name in names)
