"""What is told of each step: to the log of the run, to a tracker, on the live line.

All figures but memory are of the run, not of this process: a run that was killed and resumed has one curve, and its
goodput counts what the kills have cost. Definitions:

- seconds: of the step, from asking for its data to its end, evaluation and the wait for a checkpoint's copy left out.
- data_wait: the share of them spent waiting for data.
- checkpoint_stall_ms: how long training stood still for a checkpoint, of this step or the one before.
- checkpoint_new_bytes, checkpoint_reused_bytes: what a checkpoint that was written meanwhile added to the store, and
  the plain bytes that were there already.
- memory_bytes: the most that this process, or the card, has taken.
- mfu: of the card's peak (`peaks.py`), 6 operations a parameter and token; left out where the peak is not known.
- goodput: steps that count, in seconds, by the seconds since the run was first started.
"""

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch

from llmos_cli.progress import Progress
from llmos_cli.store.local import Store
from llmos_cli.train.checkpoints.saver import Saved
from llmos_cli.train.log.metrics import RunLog
from llmos_cli.train.log.peaks import peak_flops
from llmos_cli.train.log.trackers import Tracker, open_tracker
from llmos_cli.train.loop import StepDone
from llmos_cli.train.plan import Plan

_SMOOTHING: Final = 0.9  # of the rate shown while training
_FLOPS: Final = 6  # a parameter and token: two forward, four backward


class Reporter:
    """Turns steps into the log's lines and the live line."""

    def __init__(
        self,
        log: RunLog,
        tracker: Tracker | None,
        note: Callable[[str], None],
        advance: Callable[[int], None],
        *,
        steps: int,
        parameters: int,
        device: torch.device,
        precision: str,
        began: float,
    ) -> None:
        self.log, self._tracker, self._note, self._advance = log, tracker, note, advance
        self._steps, self._parameters, self._device = steps, parameters, device
        self._peak = peak_flops(device, precision)
        self._began = began if log.began is None else min(log.began, began)
        self._productive = log.productive
        self._tokens, self._seconds, self._rate, self._step_seconds = 0, 0.0, 0.0, 0.0
        self._saved: list[Saved] = []

    @property
    def tokens_per_second(self) -> float | None:
        return self._tokens / self._seconds if self._seconds else None

    def note_saved(self, event: Saved) -> None:
        """Take note of a checkpoint: the next line tells of it."""
        self._saved.append(event)

    def report(self, event: StepDone, *, stalled: float = 0.0, scored: Mapping[str, float] | None = None) -> None:
        """Tell of a step that was applied, after whatever belongs to it."""
        seconds = max(event.seconds, 1e-9)
        rate = event.tokens / seconds
        self._rate = _smooth(self._rate, rate)
        self._step_seconds = _smooth(self._step_seconds, seconds)
        self._tokens += event.tokens
        self._seconds += event.seconds
        self._productive += event.seconds
        now = time.time()
        elapsed = max(now - self._began, 1e-9)
        line: dict[str, Any] = {
            "step": event.step,
            "loss": event.loss,
            "lr": event.lr,
            "grad_norm": event.grad_norm,
            "tokens": event.tokens,
            "tokens_per_second": round(rate, 1),
            "seconds": round(event.seconds, 6),
            "data_wait": round(event.waited / seconds, 4),
            "memory_bytes": _memory(self._device),
            "goodput": round(min(1.0, self._productive / elapsed), 4),
            "elapsed": round(elapsed, 3),
            "eta_seconds": round((self._steps - event.step) * self._step_seconds, 1),
            "time": round(now, 3),
        }
        if self._peak is not None:
            line["mfu"] = round(_FLOPS * self._parameters * rate / self._peak, 4)
        if stalled:
            line["checkpoint_stall_ms"] = round(1000 * stalled, 3)
        if self._saved:
            line["checkpoint_step"] = self._saved[-1].step
            line["checkpoint_seconds"] = round(sum(saved.seconds for saved in self._saved), 3)
            line["checkpoint_new_bytes"] = sum(saved.commit.stored for saved in self._saved)
            line["checkpoint_reused_bytes"] = sum(saved.commit.reused for saved in self._saved)
            self._saved.clear()
        line |= scored or {}
        self.log.append(line)
        if self._tracker:
            self._tracker.log(line)
        self._note(f"loss {event.loss:.2f} · {self._rate:,.0f} tok/s")
        self._advance(1)


@contextmanager
def open_reporter(
    store: Store, plan: Plan, progress: Progress, *, parameters: int, device: torch.device, began: float
) -> Iterator[Reporter]:
    """The reporter of a run that this process began to prepare at `began`, a Unix time."""
    folder = store.root / "logs" / "train"
    run = f"{plan.target.name}-{plan.key}"
    left = plan.config.steps - plan.start
    with (
        RunLog(folder / f"{run}.jsonl", progress, resumed_at=plan.start, anew=not plan.goes_on) as log,
        open_tracker(plan, run, folder, progress) as tracker,
        progress.task("training", total=left, unit="steps") as task,
    ):
        yield Reporter(
            log,
            tracker,
            task.note,
            task.advance,
            steps=plan.config.steps,
            parameters=parameters,
            device=device,
            precision=plan.config.precision,
            began=began,
        )


def _smooth(before: float, value: float) -> float:
    return _SMOOTHING * before + (1 - _SMOOTHING) * value if before else value


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
