"""A process that trains trials, one after the other, as they come through a pipe from the process that searches.

Each trial is a run of `train` under a name of its own, so what stops the worker at any moment costs at most the steps
since the last checkpoint. A worker whose parent is gone has nobody to train for: it asks itself to stop.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from llmos_cli.errors import Interrupted, LlmosError, UsageError
from llmos_cli.formats.ids import ObjectId
from llmos_cli.progress import Silent
from llmos_cli.store.local import Store, open_store
from llmos_cli.train.config import Options
from llmos_cli.train.parallel.launch import follow_parent, plain
from llmos_cli.train.plan import Plan, hold_run, make_plan
from llmos_cli.train.tune.objective import Objective


@dataclass(frozen=True)
class Job:
    """A trial to train. `data` and `model` name objects by id; `name` is the run's."""

    number: int
    name: str
    options: Mapping[str, Any]
    data: str
    model: str | None
    save_every: int | None
    objective: Objective


@dataclass(frozen=True)
class Reported:
    """A checkpoint was scored; the worker waits to be told whether to stop here (True)."""

    number: int
    step: int
    value: float


@dataclass(frozen=True)
class Done:
    number: int
    value: float
    model: ObjectId
    steps: int


@dataclass(frozen=True)
class Pruned:
    number: int
    why: str


@dataclass(frozen=True)
class Failed:
    """`error` is what the trial ended with; a `fatal` one would end every other trial, too."""

    number: int
    error: LlmosError
    fatal: bool


@dataclass(frozen=True)
class Warned:
    message: str


Message = Reported | Done | Pruned | Failed | Warned


class _Prune(Exception):
    """The trial is worse than others at this step."""


def work(root: Path, safe: str, slot: int, jobs: int, pipe: Connection) -> None:
    """Train what comes until None does: the whole life of a worker process, the `slot`-th of `jobs`."""
    os.setpgid(0, 0)  # Ctrl-C is the parent's: it asks all workers to stop, once
    follow_parent()
    import torch

    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    if torch.cuda.is_available():
        torch.cuda.set_device(slot % torch.cuda.device_count())
    try:
        with open_store(root, Silent(), safe=safe) as store:
            while (job := pipe.recv()) is not None:
                pipe.send(_trained(store, job, pipe))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except Interrupted as exc:  # its run keeps a checkpoint; the parent sees that nobody answers
        raise SystemExit(exc.exit_code) from exc


def _trained(store: Store, job: Job, pipe: Connection) -> Message:
    from llmos_cli.train.loop import Diverged

    try:
        return _train(store, job, pipe)
    except _Prune as exc:
        return Pruned(job.number, str(exc))
    except Diverged as exc:
        return Pruned(job.number, exc.message)
    except Interrupted:
        raise
    except LlmosError as exc:
        # What is wrong with this trial is another's chance; what is wrong with the store is nobody's.
        return Failed(job.number, plain(exc), fatal=type(exc) not in (LlmosError, UsageError))
    except MemoryError:
        return Failed(job.number, LlmosError("there is not enough memory for it"), fatal=False)


def _train(store: Store, job: Job, pipe: Connection) -> Done:
    from llmos_cli.train.checkpoints.saver import Saved
    from llmos_cli.train.result import publish_model, use_made
    from llmos_cli.train.run import run

    def saved(event: Saved) -> None:
        if event.step >= plan.config.steps:
            return
        pipe.send(Reported(job.number, event.step, job.objective.loss(store, event.commit.id)))
        if pipe.recv():
            raise _Prune(f"worse than others at step {event.step:,}")

    with hold_run(store, job.name):
        plan = _plan(store, job)
        if plan.made is not None:
            trained = use_made(store, plan, plan.made)
        elif plan.resume and plan.start == plan.config.steps:
            trained = publish_model(store, plan, plan.resume.id, plan.resume.manifest)
        else:
            trained = run(store, plan, progress=_Warnings(pipe), saved=saved)
        return Done(job.number, job.objective.loss(store, trained.id), trained.id, trained.step)


def _plan(store: Store, job: Job) -> Plan:
    """Where this trial was left, or, if its name holds checkpoints of something else, from the start."""
    more: dict[str, Any] = {
        "data": job.data,
        "model": job.model,
        "options": Options(**job.options),
        "save_every": job.save_every,
    }
    try:
        return make_plan(store, job.name, **more, resume=True)
    except UsageError:
        return make_plan(store, job.name, **more)


class _Warnings(Silent):
    """Passes warnings on."""

    def __init__(self, pipe: Connection) -> None:
        super().__init__()
        self._pipe = pipe

    def warn(self, message: str) -> None:
        self._pipe.send(Warned(message))
