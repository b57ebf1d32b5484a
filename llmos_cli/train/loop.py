"""One optimizer step, and the loop over steps. It knows neither the store nor the disk nor the task: work comes from a
function of the step, results go to a callback, and a step that cannot be applied leaves the model as it was.
"""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from llmos_cli.errors import LlmosError, UsageError
from llmos_cli.formats.ids import object_id
from llmos_cli.train.config import TrainConfig
from llmos_cli.train.optimizer import learning_rate
from llmos_cli.train.tasks.work import Work, logits_of, summed_loss


@dataclass(frozen=True)
class StepDone:
    """A step that was applied; `step` counts from 1, `tokens` are those that its work went through."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    seconds: float
    waited: float = 0.0  # of these, for the data


class Diverged(LlmosError):
    """The loss or the gradient is no longer a number."""

    code = "diverged"


class Stopped(Exception):
    """A stop was asked for in the middle of a step; nothing of that step was applied."""


def accumulate_gradients(
    accelerator: Accelerator, model: Any, work: Work, parts: int, stop: Callable[[], bool] = lambda: False
) -> torch.Tensor:
    """Add the gradient of the mean loss over all that `work` counts, computed in `parts` micro-batches; returns it.

    Each part adds its summed loss by what the whole step counts, so the split does not change the gradient. Of several
    ranks each computes its share of the rows; the gradient and what is returned are those of all.
    """
    if not work.counted:
        raise LlmosError("a batch has nothing to predict", hint="choose a larger --batch, or longer documents")
    ranks = accelerator.num_processes
    total = torch.zeros((), dtype=torch.float32, device=accelerator.device)
    own = work.share(accelerator.process_index, ranks)
    for part, (inputs, targets) in enumerate(own.parts(parts, accelerator.device), 1):
        if stop():
            raise Stopped
        with nullcontext() if part == parts else accelerator.no_sync(model):
            loss = summed_loss(*logits_of(model, own, inputs, targets)) / work.counted
            accelerator.backward(loss * ranks if ranks > 1 else loss)  # ranks take the mean of their gradients
        total += loss.detach()
    summed: torch.Tensor = accelerator.reduce(total, "sum")
    return summed


def settle(accelerator: Accelerator, model: Any, optimizer: Any, work: Work, parts: int) -> None:
    """Let ranks agree on the order in which they add up gradients, by one pass that counts for nothing.

    DistributedDataParallel decides that by its first pass and keeps to it from the second on: without this, the first
    step after a resume would add up in another order than the same step of a run that was not stopped.
    """
    accumulate_gradients(accelerator, model, work, parts)
    unused = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
    optimizer.zero_grad()
    if unused:
        raise UsageError(
            f"{len(unused)} weights have no part in this task ({unused[0].removeprefix('module.')}), which several "
            "processes cannot share",
            hint="train in one process: leave out --procs",
        )


def run_steps(
    accelerator: Accelerator,
    model: Any,
    optimizer: Any,
    config: TrainConfig,
    *,
    start: int,
    work: Callable[[int], Work],
    done: Callable[[StepDone], None],
    stop: Callable[[], bool] = lambda: False,
    settle: Callable[[], None] = lambda: None,
) -> int:
    """Take steps `start`..`config.steps`; returns how many are done, fewer than all only when `stop` said so.
    `settle` is called before the weights change.

    Raises Diverged before the optimizer would apply a loss or a gradient that is not finite.
    """
    model.train()
    clip = config.clip or math.inf
    for step in range(start, config.steps):
        if stop():
            return step
        if config.skips(step + 1):
            continue
        began = time.perf_counter()
        random_state = capture_random_state()
        asked = work(step)
        waited = time.perf_counter() - began
        lr = learning_rate(
            step, steps=config.steps, warmup=config.warmup, peak=config.lr, schedule=config.schedule_taken
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        if accelerator.process_index:  # the first rank's numbers are in checkpoints, the others' follow from the step
            torch.manual_seed(_seed_of(config.seed, step, accelerator.process_index))
        try:
            total = accumulate_gradients(accelerator, model, asked, config.accumulate, stop)
        except Stopped:
            optimizer.zero_grad()
            restore_random_state(random_state)
            return step
        norm = accelerator.clip_grad_norm_(model.parameters(), clip)
        loss, grad_norm = total.item(), float(norm)
        for what, value in (("loss", loss), ("gradient norm", grad_norm)):
            if not math.isfinite(value):
                raise Diverged(f"the {what} became {value} at step {step + 1}; the step was not applied")
        settle()
        optimizer.step()
        done(StepDone(step + 1, loss, grad_norm, lr, asked.tokens, time.perf_counter() - began, waited))
    return config.steps


def _seed_of(seed: int, step: int, rank: int) -> int:
    return int.from_bytes(object_id(f"{seed} {step} {rank}".encode())[:7])


def capture_random_state() -> dict[str, torch.Tensor]:
    """The state of every generator that a model may draw from, as bytes."""
    state = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state |= {f"rng.cuda.{index}": value for index, value in enumerate(torch.cuda.get_rng_state_all())}
    return state


def restore_random_state(state: dict[str, torch.Tensor]) -> None:
    """Put the generators back; a card that was not there when the state was captured keeps its seed."""
    torch.set_rng_state(state["rng.cpu"])
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if (value := state.get(f"rng.cuda.{index}")) is not None:
                torch.cuda.set_rng_state(value, index)
