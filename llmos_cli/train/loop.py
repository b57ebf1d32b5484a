"""One optimizer step, and the loop over steps. It knows neither the store nor the disk: batches come from a function
of the step, results go to a callback, and a step that cannot be applied leaves the model as it was.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn import functional

from llmos_cli.data.batches import Batch
from llmos_cli.errors import LlmosError
from llmos_cli.train.config import TrainConfig
from llmos_cli.train.optimizer import learning_rate

IGNORED = -100


@dataclass(frozen=True)
class StepDone:
    """A step that was applied; `step` counts from 1, `tokens` are those predicted in it."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    seconds: float


class Diverged(LlmosError):
    """The loss or the gradient is no longer a number."""

    code = "diverged"


class Stopped(Exception):
    """A stop was asked for in the middle of a step; nothing of that step was applied."""


def accumulate_gradients(
    accelerator: Accelerator, model: Any, batch: Batch, parts: int, stop: Callable[[], bool] = lambda: False
) -> tuple[torch.Tensor, int]:
    """Add the gradient of the mean loss over all predicted tokens of `batch`, computed in `parts` micro-batches.

    Each part adds its summed loss over the tokens of the whole batch, so the split does not change the gradient.
    Positions that begin anew tell a model where a document ends that it must not look beyond.
    """
    rows = torch.from_numpy(batch.input_ids).to(accelerator.device)
    learned = rows
    if batch.learned is not None:
        learned = rows.masked_fill(torch.from_numpy(~batch.learned).to(rows.device), IGNORED)
    # Labels are shifted, not the logits: slicing logits would copy the largest tensor of the step.
    labels = functional.pad(learned[:, 1:], (0, 1), value=IGNORED)
    tokens = int((labels != IGNORED).sum())
    if not tokens:
        raise LlmosError("a batch has no token to predict", hint="choose a larger --batch, or longer documents")
    positions: Any = [None] * parts
    if batch.position_ids is not None:
        positions = torch.from_numpy(batch.position_ids).to(rows.device).chunk(parts)
    total = torch.zeros((), dtype=torch.float32, device=rows.device)
    for ids, targets, places in zip(rows.chunk(parts), labels.chunk(parts), positions, strict=True):
        if stop():
            raise Stopped
        more = {} if places is None else {"position_ids": places}
        logits = model(input_ids=ids, use_cache=False, **more).logits.float()
        summed = functional.cross_entropy(
            logits.view(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=IGNORED, reduction="sum"
        )
        loss = summed / tokens
        accelerator.backward(loss)
        total += loss.detach()
    return total, tokens


def run_steps(
    accelerator: Accelerator,
    model: Any,
    optimizer: Any,
    config: TrainConfig,
    *,
    start: int,
    batch: Callable[[int], Batch],
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
        began = time.perf_counter()
        random_state = capture_random_state()
        rows = batch(step)
        lr = learning_rate(step, steps=config.steps, warmup=config.warmup, peak=config.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        try:
            total, tokens = accumulate_gradients(accelerator, model, rows, config.accumulate, stop)
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
        done(StepDone(step + 1, loss, grad_norm, lr, tokens, time.perf_counter() - began))
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
