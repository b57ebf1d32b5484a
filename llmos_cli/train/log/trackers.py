"""Trackers that draw a run's curves, by way of accelerate. The run's own log is there anyway: a tracker that fails
warns once, and training goes on.

A resumed run goes on in the curve that it began: TensorBoard forgets what came after the checkpoint, the others know
the run by its key.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from llmos_cli.errors import UsageError
from llmos_cli.progress import Progress

if TYPE_CHECKING:
    from llmos_cli.train.plan import Plan

TRACKERS: Final = ("tensorboard", "wandb", "mlflow", "trackio")


def check_tracker(name: str) -> str:
    """Refuse a tracker that is not offered or not installed; returns its name."""
    if name not in TRACKERS:
        raise UsageError(f"--log {name} is not offered", hint=f"use one of {', '.join(TRACKERS)}")
    if find_spec(name) is None:
        install = "'llmos[tensorboard]'" if name == "tensorboard" else name
        raise UsageError(f"--log {name} needs {name}, which is not installed", hint=f"pip install {install}")
    return name


class Tracker:
    """One tracker of one run."""

    def __init__(self, name: str, tracker: Any, progress: Progress) -> None:
        self._name, self._progress = name, progress
        self._tracker: Any | None = tracker

    def log(self, line: Mapping[str, Any]) -> None:
        """Hand on the numbers of a step."""
        if self._tracker is None:
            return
        values = {key: value for key, value in line.items() if key not in ("step", "time")}
        try:
            self._tracker.log(values, step=line["step"])
        except Exception as exc:  # noqa: BLE001 - whatever a tracker's client meets, training goes on
            self._give_up(exc)

    def close(self) -> None:
        try:
            if self._tracker is not None:
                self._tracker.finish()
        except Exception as exc:  # noqa: BLE001 - the same
            self._give_up(exc)

    def _give_up(self, exc: Exception) -> None:
        self._tracker = None
        self._progress.warn(f"{self._name} failed ({exc}); the run's own log goes on without it")


@contextmanager
def open_tracker(plan: "Plan", run: str, folder: Path, progress: Progress) -> Iterator[Tracker | None]:
    """The tracker that a plan asks for, None if it asks for none."""
    if plan.log is None:
        yield None
        return
    tracker = Tracker(plan.log, _start(plan.log, plan, run, folder), progress)
    try:
        yield tracker
    finally:
        tracker.close()


def _start(name: str, plan: "Plan", run: str, folder: Path) -> Any:
    from accelerate import tracking

    logging.getLogger("accelerate").setLevel(logging.ERROR)
    found: Any
    if name == "tensorboard":
        found = tracking.TensorBoardTracker(run, folder / "tensorboard", purge_step=plan.start + 1)
    elif name == "wandb":
        found = tracking.WandBTracker(plan.target.name, id=run, name=run, resume="allow", dir=str(folder))
    elif name == "mlflow":
        found = tracking.MLflowTracker(plan.target.name, run_name=run)
    else:
        found = tracking.TrackioTracker(plan.target.name, name=run, resume="allow")
    try:
        found.start()
    except Exception as exc:
        raise UsageError(f"--log {name} cannot start: {exc}", hint=f"set {name} up, or leave --log out") from exc
    return found
