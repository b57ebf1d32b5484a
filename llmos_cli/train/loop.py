"""One optimizer step, and the loop over steps. It knows neither the store nor the disk nor the task: work comes from a
function of the step, results go to a callback, and a step that cannot be applied leaves the model as it was.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from llmos_cli.errors import LlmosError
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

    Each part adds its summed loss by what the whole step counts, so the split does not change the gradient.
    """
    if not work.counted:
        raise LlmosError("a batch has nothing to predict", hint="choose a larger --batch, or longer documents")
    total = torch.zeros((), dtype=torch.float32, device=accelerator.device)
    for inputs, targets in work.parts(parts, accelerator.device):
        if stop():
            raise Stopped
        loss = summed_loss(*logits_of(model, work, inputs, targets)) / work.counted
        accelerator.backward(loss)
        total += loss.detach()
    return total


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
) -> int:
    """Take steps `start`..`config.steps`; returns how many are done, fewer than all only when `stop` said so.

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
        lr = learning_rate(step, steps=config.steps, warmup=config.warmup, peak=config.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
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
        optimizer.step()
        done(StepDone(step + 1, loss, grad_norm, lr, asked.tokens, time.perf_counter() - began, waited))
    return config.steps


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
