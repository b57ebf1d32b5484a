"""The proof that a run can be resumed, for a user's own configuration: a short run is killed twice at random points and
resumed each time, another one runs through, and both must end in the same ids.

Each attempt is a process of its own, because what is proven is what SIGKILL leaves. The runs have names of their own
and none of what they made is left to a later run: only objects that the next gc takes.
"""

import os
import random
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

from llmos_cli.errors import LlmosError, NotFound
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.names import RefName
from llmos_cli.progress import Progress, Silent, Task
from llmos_cli.store.disk import durable
from llmos_cli.store.gc.superseded import give_back
from llmos_cli.store.local import Store, open_store
from llmos_cli.store.packs.objects import read_manifest
from llmos_cli.store.refs.refs import delete_ref, ref_history
from llmos_cli.train.config import Options, clipped
from llmos_cli.train.origin import CHECKPOINT_TAG
from llmos_cli.train.plan import Plan, hold_run, make_plan

STEPS: Final = 24
_SAVE_EVERY: Final = 3
_KILLS: Final = 2
_PAUSE: Final = 0.05
_PATIENCE: Final = 2.0  # of a step's time, after a step, until the kill: in the middle of the next, or of a checkpoint


@dataclass(frozen=True)
class Asked:
    """What a run of the proof is made of, as `make_plan` takes it."""

    name: str
    data: str | None
    model: str | None
    fork: str | None
    options: Options


@dataclass(frozen=True)
class Verified:
    """Both runs ended in `model` and `checkpoint`; the one was killed after `killed_at` and went on at `resumed_at`."""

    steps: int
    killed_at: tuple[int, ...]
    resumed_at: tuple[int, ...]
    model: ObjectId
    checkpoint: ObjectId


class _Committed:
    """A checkpoint is in the store."""


@dataclass(frozen=True)
class _Ended:
    model: ObjectId
    checkpoint: ObjectId


def verify(store: Store, plan: Plan, asked: Asked, *, safe: str, progress: Progress) -> Verified:
    """Run the proof for a plan; raises LlmosError, naming the files that differ, if it fails."""
    asked = replace(asked, options=_shortened(plan, asked.options))
    steps = asked.options.steps or 0
    chance = random.Random()  # the proof is for any point, so it is another one each time
    prefix = f"verify-{os.urandom(4).hex()}"
    killed, through = replace(asked, name=f"{prefix}-killed"), replace(asked, name=f"{prefix}-through")
    killed_at, resumed_at = [], []
    total = (_KILLS + 2) * (steps - plan.start)
    try:
        with progress.task("proving", total=total, unit="steps") as task:
            reached, left = plan.start, steps - plan.start
            for number in range(_KILLS):  # in each stretch of the run, somewhere after its first checkpoint
                first, last = (plan.start + (number + part) * left // (_KILLS + 1) for part in (0, 1))
                at = max(reached, chance.randint(min(first + _SAVE_EVERY + 1, last), last))
                reached, began = _killed(store, killed, safe, at, chance.random() * _PATIENCE, task)
                killed_at.append(reached)
                resumed_at.append(began)
            one, began = _through(store, killed, safe, task)
            other, _ = _through(store, through, safe, task)
        resumed = (*resumed_at[1:], began)
        if one != other:
            raise LlmosError(
                f"killed after steps {_listed(killed_at)} and resumed, the run ended in another model than one that "
                f"ran through; they differ in {_differing(store, one, other)}",
                hint="a kernel that is not deterministic does this; llmos doctor shows devices and versions",
            )
        return Verified(steps - plan.start, tuple(killed_at), resumed, one.model, one.checkpoint)
    finally:
        _clean(store, (killed.name, through.name))


def _shortened(plan: Plan, options: Options) -> Options:
    steps = min(plan.config.steps, plan.start + STEPS)
    warmup = min(plan.config.warmup, steps)
    skipped = None if options.skip_steps is None else clipped(options.skip_steps, steps)
    return replace(options, steps=steps, warmup=warmup, skip_steps=skipped)


def _killed(store: Store, asked: Asked, safe: str, at: int, patience: float, task: Task) -> tuple[int, int]:
    """Start or resume a run and kill it some time after step `at`, once it has saved; returns the step it reached, and
    began with."""
    began: int | None = None
    reached, is_saved = 0, False
    last, seconds = time.monotonic(), 0.0
    with _started(store, asked, safe) as (process, pipe):
        for message in _messages(pipe):
            if isinstance(message, _Ended):
                break
            if isinstance(message, _Committed):
                is_saved = True
                continue
            if began is None:
                began = message
            else:
                seconds = time.monotonic() - last
                task.advance()
            reached, last = message, time.monotonic()
            if reached >= at and not is_saved:
                time.sleep(_PAUSE)  # steps of a small model are over before its first checkpoint is written
            pipe.send(None)
            if reached >= at and is_saved:
                break
        time.sleep(seconds * patience)
        process.kill()
        process.join()
    return reached, began or 0


def _through(store: Store, asked: Asked, safe: str, task: Task) -> tuple[_Ended, int]:
    """Start or resume a run and see it through; returns its result, and the step it began with."""
    began: int | None = None
    with _started(store, asked, safe) as (_, pipe):
        for message in _messages(pipe):
            if isinstance(message, _Ended):
                return message, began or 0
            if isinstance(message, _Committed):
                continue
            if began is None:
                began = message
            else:
                task.advance()
            pipe.send(None)
    raise LlmosError("a run of the proof ended without a result", hint="see why: run it without --verify-resume")


@contextmanager
def _started(store: Store, asked: Asked, safe: str) -> Iterator[tuple[Any, Connection]]:
    context = get_context("forkserver")  # which has torch imported once and for all, and has not used it
    context.set_forkserver_preload(["llmos_cli.train.run"])
    ours, theirs = context.Pipe()
    process = context.Process(target=_attempt, args=(store.root, safe, asked, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        if process.is_alive():
            process.kill()
        process.join()
        ours.close()


def _messages(pipe: Connection) -> Iterator[Any]:
    """What a run says until its end: the step it begins with and each step, after which it waits for an answer, what it
    has saved, its result; raises the error it ended with."""
    with suppress(EOFError):
        while True:
            message = pipe.recv()
            if isinstance(message, LlmosError):
                raise message
            yield message


def _attempt(root: Path, safe: str, asked: Asked, pipe: Connection) -> None:
    """The whole life of a process that trains for the proof."""
    os.setpgid(0, 0)  # Ctrl-C is the parent's, which kills
    from llmos_cli.train.run import run

    try:
        with open_store(root, Silent(), safe=safe) as store, hold_run(store, asked.name):
            plan = make_plan(
                store,
                asked.name,
                data=asked.data,
                model=asked.model,
                options=asked.options,
                save_every=_SAVE_EVERY,
                fork=asked.fork,
                resume=True,
                anew=True,
            )
            steps = _Steps(pipe, plan.start)
            done = run(
                store,
                plan,
                progress=steps,
                started=lambda _: steps.advance(0),
                saved=lambda _: pipe.send(_Committed()),
            )
            assert done.checkpoint is not None
            pipe.send(_Ended(done.id, done.checkpoint))
    except LlmosError as exc:
        pipe.send(type(exc)(exc.message, hint=exc.hint))


class _Steps(Silent):
    """Tells the other end of a pipe of every step."""

    def __init__(self, pipe: Connection, step: int) -> None:
        super().__init__()
        self._pipe, self._step = pipe, step

    def task(self, label: str, *, total: int | None = None, unit: str = "B") -> AbstractContextManager[Task]:
        return nullcontext(self) if label == "training" else super().task(label, total=total, unit=unit)

    def advance(self, amount: int = 1) -> None:
        self._step += amount
        self._pipe.send(self._step)
        self._pipe.recv()

    def note(self, text: str) -> None:
        pass


def _differing(store: Store, one: _Ended, other: _Ended) -> str:
    """The files of two checkpoints that are not the same."""
    files = [{entry.path: entry for entry in read_manifest(store, end.checkpoint).files} for end in (one, other)]
    return ", ".join(path for path in sorted({*files[0], *files[1]}) if files[0].get(path) != files[1].get(path))


def _listed(steps: list[int]) -> str:
    return " and ".join(map(str, steps))


def _clean(store: Store, names: tuple[str, ...]) -> None:
    """Take away the refs and logs of the proof, and give back the space of what only they needed."""
    made: list[ObjectId] = []
    for ref in (RefName(name, tag) for name in names for tag in (CHECKPOINT_TAG, "latest")):
        history = ref_history(store, ref)
        made += [move.id for move in history]
        if history:
            with suppress(NotFound):
                delete_ref(store, ref, expected=history[0].id)
    for name in names:
        for path in (store.root / "logs" / "train").glob(f"{name}-*.jsonl"):
            durable.remove(path)
    give_back(store, made)
