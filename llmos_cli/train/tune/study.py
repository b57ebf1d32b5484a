"""What has been tried and what to try next: Optuna's study over a journal in the store, written by one process alone.

The journal is the memory of a search: a trial that is in it without an end was being trained when its process died and
goes on. Each trial's sampler is seeded by the trial's number, so that a search that was killed asks what it would have.
"""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import optuna
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from llmos_cli.errors import Damaged, UsageError, from_os_error
from llmos_cli.formats import canonical
from llmos_cli.formats.canonical import Json
from llmos_cli.train.tune.space import Choice, Dimension, Search, Value

PRUNERS: Final = ("median", "hyperband", "none")
State = Literal["running", "done", "pruned", "failed"]

_STUDY: Final = "tune"
_DEFINITION: Final = "definition"
_WHY: Final = "why"
_STATES: Final[dict[TrialState, State]] = {
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "done",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


@dataclass(frozen=True)
class Trial:
    """`value` is the loss, of a trial without one the last it was heard to have; `why` is what ended it early."""

    number: int
    params: Mapping[str, Value]
    state: State
    value: float | None = None
    steps: int = 0
    why: str | None = None
    reports: Mapping[int, float] = field(default_factory=dict)


class Study:
    """Whoever opens one holds the search alone: nothing here waits for a lock."""

    def __init__(self, path: Path, search: Search, definition: Mapping[str, Json], *, pruner: str, steps: int) -> None:
        optuna.logging.set_verbosity(logging.ERROR)
        self._path, self._search = path, search
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _drop_torn_line(path)
            storage = JournalStorage(_backend(path))
            self._study = optuna.create_study(
                storage=storage, study_name=_STUDY, load_if_exists=True, pruner=_pruner(pruner, steps)
            )
        except OSError as exc:
            raise from_os_error(exc, f"opening {path}") from exc
        except (ValueError, KeyError) as exc:
            raise Damaged(
                f"the journal {path} cannot be read: {exc}", hint="move it away to search anew; trials stay as models"
            ) from exc
        self._check_definition(definition)

    def trials(self) -> list[Trial]:
        """All that were begun, by number."""
        return [_seen(trial) for trial in self._frozen() if trial.state in _STATES]

    def best(self) -> Trial | None:
        """The finished trial of least loss, the first of equals."""
        done = [trial for trial in self.trials() if trial.state == "done" and trial.value is not None]
        return min(done, key=lambda trial: (trial.value, trial.number), default=None)

    def ask(self, first: Mapping[str, Value] | None, *, seed: int, at_once: bool) -> Trial:
        """Begin another trial, the `first` of all with these values; `at_once` says that others run meanwhile."""
        begun = len(self._frozen())
        if begun == 0 and first is not None:
            self._study.enqueue_trial(dict(first))
        self._study.sampler = TPESampler(seed=(seed + 1_000_003 * begun) % 2**32, constant_liar=at_once)
        return self.go_on(self._study.ask().number)

    def go_on(self, number: int) -> Trial:
        """A trial that runs, with the values that it has, or that it was about to be given when its process died."""
        trial = self._trial(number)
        for dimension in self._search.dimensions:
            _suggest(trial, dimension)
        return _seen(self._frozen()[number])

    def report(self, number: int, step: int, value: float) -> bool:
        """Take down the loss of a trial at a step; returns whether it should end there."""
        trial = self._trial(number)
        if step not in self._frozen()[number].intermediate_values:
            trial.report(value, step)
        return trial.should_prune()

    def done(self, number: int, value: float) -> None:
        self._study.tell(number, value)

    def prune(self, number: int, why: str) -> None:
        """End a trial as one that is worse than others."""
        self._trial(number).set_user_attr(_WHY, why)
        self._study.tell(number, state=TrialState.PRUNED)

    def fail(self, number: int, why: str) -> None:
        """End a trial of which nothing can be learned."""
        self._trial(number).set_user_attr(_WHY, why)
        self._study.tell(number, state=TrialState.FAIL)

    def _frozen(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _trial(self, number: int) -> optuna.Trial:
        return optuna.Trial(self._study, self._frozen()[number]._trial_id)

    def _check_definition(self, definition: Mapping[str, Json]) -> None:
        wanted = canonical.encode(dict(definition)).decode()
        found = self._study.user_attrs.get(_DEFINITION)
        if found is None:
            self._study.set_user_attr(_DEFINITION, wanted)
        elif found != wanted:
            theirs = json.loads(found)
            keys = [key for key in sorted({*theirs, *definition}) if theirs.get(key) != definition.get(key)]
            raise UsageError(
                f"{self._path.stem} was begun as another search: it differs in {', '.join(keys)}",
                hint=f"choose another name, or forget that search by removing {self._path}",
            )


class _Alone:
    """The lock of a journal that one process writes."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


def _backend(path: Path) -> BaseJournalBackend:
    return JournalFileBackend(str(path), lock_obj=_Alone())  # type: ignore[arg-type]


def _drop_torn_line(path: Path) -> None:
    """What a process that was killed had written of a line."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        data = file.read()
        file.truncate(data.rfind(b"\n") + 1)


def _pruner(name: str, steps: int) -> BasePruner:
    if name not in PRUNERS:
        raise UsageError(f"--pruner {name} is not offered", hint=f"use one of {', '.join(PRUNERS)}")
    if name == "hyperband":
        return HyperbandPruner(min_resource=max(1, steps // 9), max_resource=steps)
    return MedianPruner(n_startup_trials=4) if name == "median" else NopPruner()


def _suggest(trial: optuna.Trial, dimension: Dimension) -> None:
    if isinstance(dimension, Choice):
        trial.suggest_categorical(dimension.name, list(dimension.values))
    elif dimension.whole:
        step = int(dimension.step or 1)
        trial.suggest_int(dimension.name, int(dimension.low), int(dimension.high), step=step, log=dimension.log)
    else:
        trial.suggest_float(
            dimension.name, float(dimension.low), float(dimension.high), step=dimension.step, log=dimension.log
        )


def _seen(trial: FrozenTrial) -> Trial:
    reports: dict[int, float] = dict(trial.intermediate_values)
    value: Any = trial.value if trial.state == TrialState.COMPLETE else reports.get(max(reports, default=0))
    return Trial(
        trial.number,
        dict(trial.params),
        _STATES[trial.state],
        value if value is not None and math.isfinite(value) else None,
        max(reports, default=0),
        trial.user_attrs.get(_WHY),
        reports,
    )
