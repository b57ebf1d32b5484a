"""`train --procs N`: starts the ranks of a run on this machine, hears what the first one says, and ends them together.

This process trains nothing and imports no torch. A rank that fails or dies ends the run with one error; a signal to
this process is passed on once, so that the ranks stop at the same step and keep a checkpoint; a rank whose parent is
gone asks itself to stop. Nothing outlives the run.
"""

import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from multiprocessing.process import parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from llmos_cli.errors import Interrupted, LlmosError, UsageError
from llmos_cli.progress import Progress, Task
from llmos_cli.store.local import Store, open_store
from llmos_cli.train.checkpoints.signals import StopFlag, stop_flag
from llmos_cli.train.plan import Plan
from llmos_cli.train.result import Trained

if TYPE_CHECKING:
    from llmos_cli.train.checkpoints.saver import Saved
    from llmos_cli.train.parallel.ranks import Rank
    from llmos_cli.train.run import Started

PARALLEL: Final = ("ddp",)
MOST_RANKS: Final = 1024
_POLL_SECONDS: Final = 0.2
_CAUSE_SECONDS: Final = 3.0  # when a rank loses another: how long to look for why
_PATIENCE_SECONDS: Final = 60.0  # for ranks that were asked to stop: a checkpoint may be large


@dataclass(frozen=True)
class Launch:
    """Processes on this machine, and which of how many machines it is; `meeting` is HOST:PORT of the first."""

    procs: int = 1
    nodes: int = 1
    node: int = 0
    meeting: str | None = None

    @property
    def ranks(self) -> int:
        return self.procs * self.nodes


@dataclass(frozen=True)
class _Ended:
    """A rank's last word: what it made, the error a user can understand, or what crashed."""

    trained: Trained | None = None
    error: LlmosError | None = None
    crash: str | None = None


@dataclass
class _Process:
    index: int
    process: SpawnProcess
    pipe: Connection
    ended: _Ended | None = None
    gone: bool = False


@dataclass
class _Heard:
    """What to do with what rank 0 says."""

    progress: Progress
    started: Callable[["Started"], None]
    saved: Callable[["Saved"], None]
    tasks: dict[int, Any] = field(default_factory=dict)


def check_launch(launch: Launch, parallel: str, batch: int, accumulate: int) -> None:
    """Refuse what cannot be, in the time it takes to look at numbers."""
    if parallel not in PARALLEL:
        raise UsageError(
            f"--parallel {parallel} is not offered: each process holds the whole model",
            hint="use --parallel ddp, and --accumulate or --precision bf16 where memory is short",
        )
    for flag, value, low, high in (
        ("--procs", launch.procs, 1, MOST_RANKS),
        ("--nnodes", launch.nodes, 1, MOST_RANKS),
        ("--node-rank", launch.node, 0, launch.nodes - 1),
    ):
        if not low <= value <= high:
            raise UsageError(f"{flag} {value} is not a whole number from {low:,} to {high:,}")
    if launch.nodes > 1 and launch.meeting is None:
        raise UsageError("--nnodes needs a place to meet", hint="name the first machine: --rdzv HOST:PORT")
    if launch.nodes == 1 and launch.meeting is not None:
        raise UsageError("--rdzv is for several machines", hint="say how many: --nnodes N")
    if batch % (launch.ranks * accumulate):
        legal = [str(n) for n in range(1, min(batch, 64) + 1) if batch % (n * accumulate) == 0]
        parts = f" in {accumulate} parts each" if accumulate > 1 else ""
        raise UsageError(
            f"a batch of {batch} rows cannot be shared by {launch.ranks} processes{parts}",
            hint=f"use one of {', '.join(legal)} processes, or another --batch",
        )


def ignored_config(home: Path) -> tuple[str, ...]:
    """What to say of an `accelerate config` that lies where accelerate looks: nothing in it is used here."""
    folder = home / ".cache" / "huggingface" / "accelerate"
    found = [folder / name for name in ("default_config.yaml", "default_config.json") if (folder / name).exists()]
    return tuple(f"{path} is not used: --procs, --precision and --nnodes say it here" for path in found)


def launch_run(
    store: Store,
    plan: Plan,
    launch: Launch,
    *,
    safe: str,
    progress: Progress,
    started: Callable[["Started"], None] = lambda _: None,
    saved: Callable[["Saved"], None] = lambda _: None,
) -> Trained:
    """Train as planned in `launch.procs` processes; like `run.run`. The caller holds the run."""
    with _meeting(launch) as meeting, stop_flag() as flag, _processes(store, plan, launch, meeting, safe) as processes:
        heard = _Heard(progress, started, saved)
        _follow(processes, heard, flag)
        for task in heard.tasks.values():
            task[0].__exit__(None, None, None)
        return _result(processes, plan, flag)


def follow_parent() -> None:
    """Ask this process to stop when the one that started it is gone; to be called once, in a process of its own."""

    def follow() -> None:
        parent = parent_process()
        if parent is not None:
            parent.join()
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, name="parent", daemon=True).start()


def _follow(processes: list[_Process], heard: _Heard, flag: StopFlag) -> None:
    """Until all have ended; the first that fails has the others stopped."""
    asked, deadline = False, float("inf")
    while alive := [item for item in processes if not item.gone]:
        if flag and not asked:
            asked, deadline = True, time.monotonic() + _PATIENCE_SECONDS
            for item in alive:
                item.process.terminate()
        ready = set(wait([item.pipe for item in alive], timeout=_POLL_SECONDS))
        for item in alive:
            if item.pipe in ready:
                _hear(item, heard)
        if any(item.gone and not _succeeded(item) for item in processes):
            deadline = min(deadline, time.monotonic() + _CAUSE_SECONDS)
        if time.monotonic() > deadline:
            return


def _hear(item: _Process, heard: _Heard) -> None:
    try:
        message = item.pipe.recv()
    except (EOFError, OSError):
        item.process.join()
        item.gone = True
        return
    match message:
        case _Ended():
            item.ended = message
        case ("started", event):
            heard.started(event)
        case ("saved", event):
            heard.saved(event)
        case ("warn", text):
            heard.progress.warn(text)
        case ("task", number, label, total, unit):
            context = heard.progress.task(label, total=total, unit=unit)
            heard.tasks[number] = (context, context.__enter__())
        case ("advance", number, amount):
            heard.tasks[number][1].advance(amount)
        case ("note", number, text):
            heard.tasks[number][1].note(text)
        case ("close", number):
            heard.tasks.pop(number)[0].__exit__(None, None, None)


def _succeeded(item: _Process) -> bool:
    return item.ended is not None and item.ended.error is None and item.ended.crash is None


def _result(processes: list[_Process], plan: Plan, flag: StopFlag) -> Trained:
    """The model, or the one error that says most: what a rank knows, who died, what crashed."""
    for item in processes:  # all know it in the end
        if item.ended and item.ended.trained:
            return item.ended.trained
    errors = [item.ended.error for item in processes if item.ended and item.ended.error]
    known = [error for error in errors if not isinstance(error, Interrupted)]
    again = f"go on with: llmos train {plan.label} --resume"
    if known:
        raise known[0]
    if flag:
        said = errors[0] if errors else None
        raise flag.error(
            said.message if said else "stopped; the last checkpoint stays", hint=said.hint if said else again
        )
    for item in processes:
        if item.ended is None and item.gone:
            code = item.process.exitcode or 0
            cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise LlmosError(f"process {item.index} of the run was ended by {cause}", hint=again)
    if errors:
        raise errors[0]
    for item in processes:
        if item.ended and item.ended.crash:
            raise LlmosError(f"process {item.index} of the run failed: {item.ended.crash}", hint=again)
    raise LlmosError("the run ended without a model", hint=again)


@contextmanager
def _meeting(launch: Launch) -> Iterator[str]:
    """Where the ranks find each other: a file, as long as they are on one machine."""
    if launch.meeting is not None:
        yield f"tcp://{launch.meeting}"
        return
    with tempfile.TemporaryDirectory(prefix="llmos-ranks-") as folder:
        yield f"file://{folder}/meeting"


@contextmanager
def _processes(store: Store, plan: Plan, launch: Launch, meeting: str, safe: str) -> Iterator[list[_Process]]:
    """The ranks of this machine, all of them gone in the end."""
    from llmos_cli.train.parallel.ranks import Rank

    context = multiprocessing.get_context("spawn")
    found: list[_Process] = []
    try:
        for local in range(launch.procs):
            index = launch.node * launch.procs + local
            rank = Rank(index, launch.ranks, local, launch.procs, meeting)
            ours, theirs = context.Pipe()
            process = context.Process(target=_be, args=(store.root, safe, plan, rank, theirs), name=f"rank {index}")
            process.start()
            theirs.close()
            found.append(_Process(index, process, ours))
        yield found
    finally:
        for item in found:
            if item.process.is_alive():
                item.process.kill()
            item.process.join()
            item.pipe.close()


def _be(root: Path, safe: str, plan: Plan, rank: "Rank", pipe: Connection) -> None:
    """The life of a rank."""
    os.setpgid(0, 0)  # Ctrl-C is the parent's: it asks all ranks to stop, once
    follow_parent()
    import torch

    from llmos_cli.train.run import run_rank

    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, torch.get_num_threads() // rank.neighbours))
    told = _Told(pipe, speaks=rank.writes)
    try:
        with open_store(root, told, safe=safe) as store:
            trained = run_rank(
                store,
                plan,
                rank,
                progress=told,
                started=lambda event: told.say("started", event),
                saved=lambda event: told.say("saved", event),
            )
        ended = _Ended(trained)
    except LlmosError as exc:
        ended = _Ended(error=plain(exc))
    except MemoryError:
        ended = _Ended(error=LlmosError("there is not enough memory for this", hint="see: llmos train ... --plan"))
    except Exception as exc:  # noqa: BLE001 - said to the parent, which knows whether another rank was the cause
        ended = _Ended(crash=f"{type(exc).__name__}: {' '.join(str(exc).split())[:300]}")
    with suppress(OSError):
        pipe.send(ended)


class _Told:
    """The progress of rank 0, told to the parent; that of the others is nobody's."""

    def __init__(self, pipe: Connection, *, speaks: bool) -> None:
        self._pipe, self._speaks, self._tasks = pipe, speaks, 0

    def say(self, *message: Any) -> None:
        if self._speaks:
            with suppress(OSError):  # a parent that is gone is noticed elsewhere
                self._pipe.send(message)

    def warn(self, message: str) -> None:
        self.say("warn", message)

    @contextmanager
    def task(self, label: str, *, total: int | None = None, unit: str = "B") -> Iterator[Task]:
        self._tasks += 1
        self.say("task", self._tasks, label, total, unit)
        yield _ToldTask(self, self._tasks)
        self.say("close", self._tasks)


class _ToldTask:
    def __init__(self, told: _Told, number: int) -> None:
        self._told, self._number = told, number

    def advance(self, amount: int = 1) -> None:
        self._told.say("advance", self._number, amount)

    def note(self, text: str) -> None:
        self._told.say("note", self._number, text)


def plain(error: LlmosError) -> LlmosError:
    """An error that can travel, of the nearest kind that takes a message and a hint."""
    kind = next(base for base in type(error).__mro__ if base.__module__ == LlmosError.__module__)
    plain: LlmosError = kind(error.message, hint=error.hint)
    plain.code = error.code
    return plain
