"""Training, end to end: builds what a plan names, runs the loop, has checkpoints committed and at last the model."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import count

import torch
from accelerate.utils import set_seed
from transformers import PreTrainedModel

from llmos_cli.data.layout import RAGGED_TASKS
from llmos_cli.data.mixing import training_order
from llmos_cli.errors import Damaged, UsageError
from llmos_cli.models.quiet import quiet
from llmos_cli.models.weights import load_state_dict
from llmos_cli.progress import Progress, Silent
from llmos_cli.store.leases import hold
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import read_file
from llmos_cli.train.average import Average, average_of
from llmos_cli.train.build import build, prepare_model
from llmos_cli.train.causal import check_causal
from llmos_cli.train.checkpoints.checkpoint import POSITION, Position, decode_position, restore
from llmos_cli.train.checkpoints.saver import Saved, Saver
from llmos_cli.train.checkpoints.signals import stop_flag
from llmos_cli.train.device import describe, is_slow, open_accelerator
from llmos_cli.train.inputs import row_bytes
from llmos_cli.train.log.reporting import open_reporter
from llmos_cli.train.loop import Diverged, StepDone, run_steps, settle
from llmos_cli.train.optimizer import build_optimizer
from llmos_cli.train.parallel.ranks import ALONE, Rank, agree, any_of, heard_from_first, joined
from llmos_cli.train.plan import STATE_FOLDER, Plan
from llmos_cli.train.result import Trained, publish_model
from llmos_cli.train.scoring import score
from llmos_cli.train.tasks.opened import head_for, open_task, reading_ahead, task_of


@dataclass(frozen=True)
class Started:
    """What is about to be trained, for a person to read."""

    architecture: str
    parameters: int
    tokens_per_step: int | None  # None where examples differ in length
    device: str
    start: int
    new: tuple[str, ...] = ()
    trained: int | None = None  # of the parameters, where the others stay as they are


def run(
    store: Store,
    plan: Plan,
    *,
    progress: Progress,
    started: Callable[[Started], None] = lambda _: None,
    saved: Callable[[Saved], None] = lambda _: None,
) -> Trained:
    """Train as planned and commit the model; raises Interrupted, after a checkpoint, when a signal asked to stop.

    The caller holds the run (`plan.hold_run`) since before the plan was made.
    """
    trained = run_rank(store, plan, ALONE, progress=progress, started=started, saved=saved)
    assert trained is not None
    return trained


def run_rank(
    store: Store,
    plan: Plan,
    rank: Rank,
    *,
    progress: Progress,
    started: Callable[[Started], None] = lambda _: None,
    saved: Callable[[Saved], None] = lambda _: None,
) -> Trained | None:
    """What one of several processes does of `run`; None from those that do not write, if it was stopped."""
    began, config = time.time(), plan.config
    origin = plan.origin.id if plan.origin else None
    inputs = [oid for oid in (plan.data_id, plan.model_id, origin) if oid is not None]
    with (
        quiet(),
        joined(rank),
        hold(store, f"train {plan.target.name}", inputs),
        open_accelerator(config.precision, rank.count) as accelerator,
    ):
        if not agree(f"{plan.key} {plan.start} {plan.save_every} {plan.eval_every}"):
            raise UsageError("the machines do not train the same: their options or checkpoints differ")
        if is_slow(accelerator.device, config.precision):
            progress.warn(f"this processor has no {config.precision} instructions: fp32 is many times faster here")
        built = build(store, plan, progress)
        model = built.model
        task = open_task(store, plan.data, model, seed=config.seed, progress=progress)
        order = training_order(plan.data_id, plan.data, row_bytes(plan.data), config.seed)
        if head_for(task_of(plan.data), model.config) == "causal":
            check_causal(model, task.longest)
        valid = None
        if plan.eval_every is not None:
            valid = open_task(store, plan.data, model, seed=config.seed, split="valid", progress=Silent())
        prepare_model(model, config)
        raw = build_optimizer(model, lr=config.lr, weight_decay=config.weight_decay, name=config.optimizer)
        prepared, optimizer = accelerator.prepare(model, raw)
        if rank.count > 1:
            first = task.work(0, order.batch(0, config.batch))
            settle(accelerator, prepared, optimizer, first, config.accumulate)
        average = average_of(model, raw, ema=config.ema)
        set_seed(config.seed)
        position = _restore(store, plan, model, raw, average)

        def note_saved(event: Saved) -> None:
            assert reporter is not None
            reporter.note_saved(event)
            saved(event)

        saver = (
            Saver(
                store,
                plan,
                model,
                raw,
                small_files=built.small_files,
                form=built.form,
                average=average,
                saved=note_saved,
            )
            if rank.writes
            else None
        )
        parameters = sum(parameter.numel() for parameter in model.parameters())
        tokens = None if task_of(plan.data) in RAGGED_TASKS else config.batch * (task.longest - 1)
        device = describe(accelerator.device)
        moved = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        started(Started(type(model).__name__, parameters, tokens, device, position.step, built.new, moved))

        with (
            stop_flag() as flag,
            open_reporter(store, plan, progress, parameters=parameters, device=accelerator.device, began=began)
            if saver
            else nullcontext() as reporter,
            saver or nullcontext(),
            reading_ahead(task, order),
        ):

            def done(event: StepDone) -> None:
                nonlocal position
                position = Position(event.step, position.tokens + event.tokens, event.loss)
                average.update(event.step)
                scored: dict[str, float] = {}
                if valid is not None and plan.eval_every and event.step % plan.eval_every == 0:
                    with average.shown():
                        found = score(valid, prepared, accelerator.device, batch=config.batch)
                    scored = {f"eval_{name}": value for name, value in found.items()}
                if saver is None or reporter is None:
                    return
                saver.note(event, scored)
                saver.poll()
                if plan.is_saved(event.step) and event.step < config.steps:
                    saver.save(position)
                reporter.report(event, stalled=saver.stalled(), scored=scored)

            try:
                reached = run_steps(
                    accelerator,
                    prepared,
                    optimizer,
                    config,
                    start=position.step,
                    work=lambda step: task.work(step * config.batch, order.batch(step, config.batch)),
                    done=done,
                    stop=lambda: any_of(bool(flag), accelerator.device),
                    settle=saver.settle if saver else lambda: None,
                )
            except Diverged as exc:
                if saver is None:
                    raise
                saver.finish()
                ahead = next(step for step in count(position.step + 1) if not config.skips(step))
                again = f"llmos train {plan.label} --resume --skip-steps {ahead}"
                raise Diverged(exc.message, hint=f"{saver.where}; try a smaller --lr, or go around: {again}") from exc
            if reached == config.steps:  # the last ones may have been passed over
                position = replace(position, step=reached)
            if saver is None or reporter is None:
                return heard_from_first(None) if position.step == config.steps else None
            if position.step > 0:
                saver.save(position)
            saver.finish()
            if position.step < config.steps:
                raise flag.error(
                    f"stopped at step {position.step:,} of {config.steps:,}; {saver.where}",
                    hint=f"go on with: llmos train {plan.label} --resume",
                )
            assert saver.last is not None
            trained = publish_model(store, plan, *saver.last)
        trained = replace(trained, tokens_per_second=reporter.tokens_per_second, log=reporter.log.path)
        return heard_from_first(trained)


def _restore(
    store: Store, plan: Plan, model: PreTrainedModel, optimizer: torch.optim.Optimizer, average: Average
) -> Position:
    if plan.resume is None:
        return Position()
    what = f"checkpoint @{plan.resume.id.short}"
    entry = plan.resume.manifest.file(POSITION)
    position = decode_position(read_file(store, entry) if entry else b"", what)
    if position.step != plan.start:
        raise Damaged(f"{what} says step {plan.start} in its recipe and {position.step} in {POSITION}")
    restore(model, optimizer, load_state_dict(store, plan.resume.manifest, STATE_FOLDER), what, average)
    return position
