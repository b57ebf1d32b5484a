"""The search, end to end: hands trials to worker processes, hears of their checkpoints, keeps the best under the name.

This process decides and writes the journal; workers train. Nothing is lost when either dies: a trial without an end in
the journal goes on from its last checkpoint.
"""

import multiprocessing
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from llmos_cli.data.layout import check_split, splits_of
from llmos_cli.errors import NotFound, UsageError
from llmos_cli.formats.canonical import Json
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.manifest import Manifest
from llmos_cli.formats.names import RefName, parse_ref
from llmos_cli.progress import Progress, Task
from llmos_cli.store.leases import hold, hold_alone
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import read_manifest
from llmos_cli.store.refs.point import point
from llmos_cli.store.refs.refs import read_ref
from llmos_cli.store.refs.resolve import resolve
from llmos_cli.train.checkpoints.signals import stop_flag
from llmos_cli.train.config import resolve as resolve_config
from llmos_cli.train.inputs import check_dataset, check_parent
from llmos_cli.train.tune.objective import Objective
from llmos_cli.train.tune.space import Search
from llmos_cli.train.tune.study import Study, Trial
from llmos_cli.train.tune.worker import Done, Failed, Job, Message, Pruned, Reported, Warned, work

_POLL_SECONDS: Final = 0.2
_PATIENCE_SECONDS: Final = 60.0  # for a worker that was asked to stop: a checkpoint may be large
_DEATHS: Final = 2  # of the worker on one trial, before that trial is given up


@dataclass(frozen=True)
class Asked:
    """What `llmos tune` was told."""

    name: str
    search: Search
    trials: int = 20
    jobs: int = 1
    data: str | None = None
    model: str | None = None
    valid: str | None = None
    split: str | None = None
    pruner: str = "median"


@dataclass(frozen=True)
class TunePlan:
    """A search whose inputs are known and fit together."""

    target: RefName
    asked: Asked
    data: ObjectId
    model: ObjectId | None
    objective: Objective
    steps: int
    journal: Path
    notes: tuple[str, ...]

    @property
    def definition(self) -> dict[str, Json]:
        """What makes it this search and no other; more trials of it are still it."""
        return {
            **self.asked.search.as_json(),
            "data": str(self.data),
            "model": None if self.model is None else str(self.model),
            "valid": [str(self.objective.data), self.objective.split],
            "pruner": self.asked.pruner,
        }

    def trial_name(self, number: int) -> str:
        return f"{self.target.name}-trial-{number}"


@dataclass(frozen=True)
class Tuned:
    """All trials, and the best with the model that the name now points to."""

    ref: RefName
    trials: tuple[Trial, ...]
    best: Trial | None
    model: ObjectId | None
    journal: Path


@dataclass
class _Worker:
    process: SpawnProcess
    pipe: Connection
    trial: int | None = None


def plan_tuning(store: Store, asked: Asked) -> TunePlan:
    """Decide what to search, without torch; raises UsageError, NotFound or Damaged for what cannot be."""
    target = parse_ref(asked.name)
    if target != RefName(target.name):
        raise UsageError(f"{target} has a tag, but trials need names of their own", hint=f"write {target.name}")
    for flag, value in (("--trials", asked.trials), ("--jobs", asked.jobs)):
        if value < 1:
            raise UsageError(f"{flag} must be at least 1, not {value}")
    search = asked.search
    data, model = asked.data or search.data, asked.model or search.model
    if data is None:
        raise UsageError("--data is missing", hint="make a dataset with: llmos shard TEXT... NAME")
    search.check(from_model=model is not None)
    _refuse_other_kind(store, target)
    data_id = resolve(store, data).id
    dataset = read_manifest(store, data_id)
    check_dataset(dataset, data)
    model_id = None
    if model is not None:
        model_id = resolve(store, model).id
        check_parent(store, read_manifest(store, model_id), model, dataset, data)
    objective, note = _objective(store, asked, data_id, dataset, data)
    return TunePlan(
        target,
        asked,
        data_id,
        model_id,
        objective,
        resolve_config(search.options(search.first), from_model=model is not None).steps,
        store.root / "logs" / "tune" / f"{target.name}.journal",
        (note,),
    )


def tune(
    store: Store, plan: TunePlan, *, progress: Progress, safe: str = "", ended: Callable[[Trial], None] = lambda _: None
) -> Tuned:
    """Have trials trained until there are as many as asked for; raises Interrupted after their checkpoints when a
    signal asked to stop. `safe` is passed on to those who open the store anew."""
    inputs = [oid for oid in (plan.data, plan.model, plan.objective.data) if oid is not None]
    purpose = f"tune {plan.target.name}"
    with hold_alone(store, f"tune-{plan.target.name}", purpose), hold(store, purpose, inputs):
        study = Study(plan.journal, plan.asked.search, plan.definition, pruner=plan.asked.pruner, steps=plan.steps)
        with stop_flag() as flag, _Searcher(store, plan, study, safe, progress, ended) as searcher:
            searcher.run(stop=lambda: bool(flag))
            if flag:
                done = sum(trial.state != "running" for trial in study.trials())
                raise flag.error(
                    f"stopped with {done:,} of {plan.asked.trials:,} trials done; the others keep their checkpoints",
                    hint="the same command goes on",
                )
        best = study.best()
        return Tuned(plan.target, tuple(study.trials()), best, searcher.publish(), plan.journal)


class _Searcher:
    """The workers of a search, and who trains what."""

    def __init__(
        self,
        store: Store,
        plan: TunePlan,
        study: Study,
        safe: str,
        progress: Progress,
        ended: Callable[[Trial], None],
    ) -> None:
        self._store, self._plan, self._study, self._safe = store, plan, study, safe
        self._progress, self._ended = progress, ended
        self._workers: list[_Worker] = []
        self._unfinished = [trial.number for trial in study.trials() if trial.state == "running"]
        self._deaths: dict[int, int] = {}
        self._warned: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let idle workers go and ask the others to stop; whoever does not within a while is killed."""
        for worker in self._workers:
            if worker.trial is None:
                with suppress(OSError):
                    worker.pipe.send(None)
            elif worker.process.is_alive():
                worker.process.terminate()
        deadline = time.monotonic() + _PATIENCE_SECONDS
        for worker in self._workers:
            self._drain(worker, deadline)
            worker.process.join(max(0.0, deadline - time.monotonic()))
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.pipe.close()
        self._workers.clear()

    def run(self, *, stop: Callable[[], bool]) -> None:
        """Until all trials have ended, or `stop` says so."""
        ended = sum(trial.state != "running" for trial in self._study.trials())
        with self._progress.task("tuning", total=self._plan.asked.trials, unit="trials") as task:
            task.advance(min(ended, self._plan.asked.trials))
            while not stop() and self._hand_out():
                for worker in self._ready():
                    if self._hear(worker, task):
                        task.advance()

    def publish(self) -> ObjectId | None:
        """Point the name to the best trial's model."""
        best = self._study.best()
        if best is None:
            return None
        entry = read_ref(self._store, parse_ref(self._plan.trial_name(best.number)))
        if entry is None:
            raise NotFound(
                f"the best trial's model {self._plan.trial_name(best.number)} is gone",
                hint=f"remove {self._plan.journal} to search anew",
            )
        now = read_ref(self._store, self._plan.target)
        if now is None or now.id != entry.id:
            message = f"tune: trial {best.number}, loss {best.value:.4f}"
            point(self._store, self._plan.target, entry.id, expected=now.id if now else None, message=message)
        return entry.id

    def _hand_out(self) -> bool:
        """Give every idle worker a trial; whether any is being trained then."""
        while len([worker for worker in self._workers if worker.trial is not None]) < self._plan.asked.jobs:
            number = self._next()
            if number is None:
                break
            worker = next((worker for worker in self._workers if worker.trial is None), None) or self._start()
            worker.trial = number
            with suppress(OSError):  # a worker that died is heard of by its process
                worker.pipe.send(self._job(number))
        return any(worker.trial is not None for worker in self._workers)

    def _next(self) -> int | None:
        if self._unfinished:
            return self._study.go_on(self._unfinished.pop(0)).number
        begun = len(self._study.trials())
        if begun >= self._plan.asked.trials:
            return None
        plan = self._plan
        first = plan.asked.search.defaults(from_model=plan.model is not None) if begun == 0 else None
        seed = plan.asked.search.fixed.seed or 0
        return self._study.ask(first, seed=seed, at_once=plan.asked.jobs > 1).number

    def _job(self, number: int) -> Job:
        plan = self._plan
        trial = self._study.go_on(number)
        options = plan.asked.search.options(trial.params)
        return Job(
            number,
            plan.trial_name(number),
            {field.name: getattr(options, field.name) for field in fields(options)},
            f"@{plan.data}",
            None if plan.model is None else f"@{plan.model}",
            plan.asked.search.save_every,
            plan.objective,
        )

    def _start(self) -> _Worker:
        slot = len(self._workers)
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(
            target=work,
            args=(self._store.root, self._safe, slot, self._plan.asked.jobs, theirs),
            name=f"trial worker {slot}",
        )
        process.start()
        theirs.close()
        self._workers.append(_Worker(process, ours))
        return self._workers[-1]

    def _ready(self) -> list[_Worker]:
        """Workers that have something to say, or died."""
        found = set(wait([worker.pipe for worker in self._workers], timeout=_POLL_SECONDS))
        return [worker for worker in self._workers if worker.pipe in found]

    def _hear(self, worker: _Worker, task: Task) -> bool:
        """Act on one message; whether it ended a trial."""
        try:
            message: Message = worker.pipe.recv()
        except (EOFError, OSError):
            return self._bury(worker)
        study, number = self._study, worker.trial
        assert number is not None
        match message:
            case Warned():
                if message.message not in self._warned:
                    self._warned.add(message.message)
                    self._progress.warn(message.message)
                return False
            case Reported():
                with suppress(OSError):
                    worker.pipe.send(study.report(number, message.step, message.value))
                task.note(f"trial {number}: loss {message.value:.4f} at step {message.step:,}")
                return False
            case Done():
                study.report(number, message.steps, message.value)
                study.done(number, message.value)
                self.publish()
            case Pruned():
                study.prune(number, message.why)
            case Failed() if message.fatal:
                raise message.error
            case Failed():
                study.fail(number, message.error.message)
        worker.trial = None
        self._ended(study.trials()[number])
        return True

    def _bury(self, worker: _Worker) -> bool:
        """A worker died without a word: its trial goes on in another one, once."""
        worker.process.join()
        worker.pipe.close()
        self._workers.remove(worker)
        number, code = worker.trial, worker.process.exitcode or 0
        if number is None:
            return False
        self._deaths[number] = self._deaths.get(number, 0) + 1
        if self._deaths[number] < _DEATHS:
            self._progress.warn(f"the process of trial {number} was ended by {_cause(code)}; the trial goes on")
            self._unfinished.insert(0, number)
            return False
        self._study.fail(number, f"its process was ended by {_cause(code)}, twice")
        self._ended(self._study.trials()[number])
        return True

    def _drain(self, worker: _Worker, deadline: float) -> None:
        """What a worker says while it stops; nobody is told to go on."""
        while (left := deadline - time.monotonic()) > 0:
            try:
                if not worker.pipe.poll(left):
                    return
                message = worker.pipe.recv()
                if isinstance(message, Reported):
                    self._study.report(message.number, message.step, message.value)
                    worker.pipe.send(False)
                elif isinstance(message, Done):
                    self._study.report(message.number, message.steps, message.value)
                    self._study.done(message.number, message.value)
                    self.publish()
                if not isinstance(message, Reported | Warned):
                    worker.pipe.send(None)
            except (EOFError, OSError):
                return


def _objective(store: Store, asked: Asked, data: ObjectId, manifest: Manifest, label: str) -> tuple[Objective, str]:
    """What is made small, and that in words."""
    if asked.valid is not None:
        found = resolve(store, asked.valid).id
        other = read_manifest(store, found)
        check_dataset(other, asked.valid)
        split = check_split(other, asked.split or "train")
        return Objective(found, split), f"the objective is the loss on {asked.valid} ({split})"
    if asked.split is not None:
        return Objective(
            data, check_split(manifest, asked.split)
        ), f"the objective is the loss on {label} ({asked.split})"
    if "valid" in splits_of(manifest):
        return Objective(data, "valid"), f"the objective is the loss on {label} (valid)"
    return Objective(data, "train"), f"{label} has no valid split: the objective is the loss on what is trained on"


def _refuse_other_kind(store: Store, target: RefName) -> None:
    entry = read_ref(store, target)
    if entry is not None and (kind := read_manifest(store, entry.id).kind) not in ("model", "adapter"):
        raise UsageError(f"{target} is a {kind}, not a model", hint="choose another name for the search")


def _cause(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
