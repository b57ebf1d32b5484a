"""How good a model is at a task, in numbers: what training reports of a split set aside and eval keeps.

Definitions. loss: the mean over all targets, in nats, or the mean squared error of scores. accuracy: the share of
targets that the model holds most likely. macro_f1: the mean over labels of F1, 2 x right / (said + true), a label that
is neither said nor true left out. perplexity: exp(loss) of tokens; of masked ones it is a pseudo-perplexity.
pearson: the correlation of scores with what is said of them.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from llmos_cli.errors import LlmosError
from llmos_cli.progress import Progress, Silent
from llmos_cli.train.tasks.labelled import LabelledTask
from llmos_cli.train.tasks.work import IGNORED, Task, logits_of, summed_loss


def score(
    task: Task,
    model: Any,
    device: torch.device,
    *,
    batch: int,
    indices: Sequence[int] | np.ndarray | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """The task's metrics over rows `indices` (None: all). The random state and the model's mode stay as they are.

    Masks are those of the slots 0 and following, so they are the same every time.
    """
    indices = np.arange(task.count) if indices is None else np.asarray(indices)
    summed, counted = 0.0, 0
    said: list[np.ndarray] = []
    true: list[np.ndarray] = []
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), (progress or Silent()).task("scoring", total=len(indices), unit="rows") as bar:
            for start in range(0, len(indices), batch):
                work = task.work(start, indices[start : start + batch])
                ((inputs, targets),) = work.parts(1, device)
                logits, targets = logits_of(model, work, inputs, targets)
                summed += summed_loss(logits, targets).item()
                counted += work.counted
                best = logits.float().reshape(-1) if targets.is_floating_point() else logits.argmax(-1)
                said.append(best.reshape(-1).cpu().numpy())
                true.append(targets.reshape(-1).cpu().numpy())
                bar.advance(len(targets))
    finally:
        model.train(training)
    if not counted:
        raise LlmosError("there is nothing to score")
    loss = summed / counted
    if not math.isfinite(loss):
        raise LlmosError("the model's loss is not a finite number", hint="its weights overflow or are damaged")
    return {"loss": loss} | _more(task, loss, np.concatenate(said), np.concatenate(true))


def macro_f1(said: np.ndarray, true: np.ndarray) -> float:
    """The mean of each label's F1, of those that are said or true at all."""
    found = []
    for label in np.union1d(said, true):
        right = int(((said == label) & (true == label)).sum())
        found.append(2 * right / (int((said == label).sum()) + int((true == label).sum())))
    return float(np.mean(found))


def _more(task: Task, loss: float, said: np.ndarray, true: np.ndarray) -> dict[str, float]:
    if isinstance(task, LabelledTask):
        if task.labels.scores is not None:
            spread = float(said.std() * true.std())
            together = float(((said - said.mean()) * (true - true.mean())).mean())
            return {"pearson": together / spread if spread else 0.0}
        return {"accuracy": float((said == true).mean()), "macro_f1": macro_f1(said, true)}
    counts = true != IGNORED
    return {"perplexity": math.exp(min(loss, 700.0)), "accuracy": float((said == true)[counts].mean())}
