"""Commits checkpoints: each one transaction, the previous one untouched until the new one is in the store.

A thread copies the state and writes it while the next step computes; only the update at the end of that step waits for
the copy (`staging.py`). One checkpoint is in flight at most.
"""

import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from statistics import fmean
from types import TracebackType
from typing import Self

import torch
from transformers import PreTrainedModel

from llmos_cli.errors import LlmosError, NoSpace, UsageError, from_os_error
from llmos_cli.formats.canonical import Json
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.manifest import Manifest
from llmos_cli.models.tokenizers import tokenizer_entries
from llmos_cli.models.weights import state_tensors
from llmos_cli.store.intake.bases import Base, open_base
from llmos_cli.store.local import Store
from llmos_cli.store.transaction import Commit, begin
from llmos_cli.train.average import Average
from llmos_cli.train.checkpoints.checkpoint import POSITION, TENSORS, Position, capture, encode_position
from llmos_cli.train.checkpoints.retention import keep_by_role
from llmos_cli.train.checkpoints.staging import Staging
from llmos_cli.train.form import Form
from llmos_cli.train.loop import StepDone
from llmos_cli.train.origin import checkpoint_recipe
from llmos_cli.train.plan import Plan, tokenizer_source


@dataclass(frozen=True)
class Saved:
    """A checkpoint was committed: in `seconds`, for `stalled` of which training stood still."""

    step: int
    commit: Commit
    seconds: float
    stalled: float


@dataclass(frozen=True)
class _Written:
    position: Position
    commit: Commit
    manifest: Manifest
    seconds: float


class Saver:
    """Knows what a run has committed last; `small_files` are config.json and the like, the same in every checkpoint.

    Used by the training thread, which also hears of what was `saved`: at the next step, when it calls `poll`.
    """

    def __init__(
        self,
        store: Store,
        plan: Plan,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        *,
        small_files: Mapping[str, bytes],
        form: Form | None = None,
        average: Average | None = None,
        saved: Callable[[Saved], None],
    ) -> None:
        self._store, self._plan, self._model, self._optimizer = store, plan, model, optimizer
        self._small_files, self._form, self._saved = small_files, form or Form(), saved
        self._average = average or Average()
        self._parameters = sum(parameter.numel() for parameter in model.parameters())
        self._grew = 0
        self._losses: list[float] = []  # of the steps since the last checkpoint
        self._scored: dict[str, float] = {}  # of the last step
        self._staging = Staging(model, optimizer)
        self._stalled = self._untold = 0.0
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._in_flight: Future[_Written] | None = None
        self._asked = plan.start if plan.own else None
        self.last: tuple[ObjectId, Manifest] | None = None
        self.last_step = plan.start
        if plan.own:
            self.last = plan.own.id, plan.own.manifest

    @property
    def where(self) -> str:
        """The last checkpoint, in words."""
        if self.last is None:
            return "no checkpoint was made yet"
        return f"{self._plan.checkpoint_ref} holds step {self.last_step:,}"

    def save(self, position: Position) -> None:
        """Have the state after `position.step` committed unless it was asked for last; waits for the one before.

        Nothing may change it before `settle` returns.
        """
        if self._asked == position.step:
            return
        began = time.perf_counter()
        self.finish()
        self._check_space(position)
        shown = type(self._average) is not Average  # then they are in the model for a moment only
        with self._average.shown():
            weights = self._staging.take(self._form.file, self._form.weights(self._model), at_once=shown)
        state = self._staging.take(TENSORS, capture(self._model, self._optimizer, self._average))
        self._asked = position.step
        metric = self._metric()
        self._losses, self._scored = [], {}
        copied = self._writer.submit(self._staging.copy)
        self._in_flight = self._writer.submit(self._write, position, weights, state, metric, copied)
        self._stalled = time.perf_counter() - began
        self._untold += self._stalled

    def settle(self) -> None:
        """Wait until the state may change: what is being saved has been copied."""
        if not self._staging.is_done:
            began = time.perf_counter()
            self._staging.wait()
            waited = time.perf_counter() - began
            self._stalled += waited
            self._untold += waited

    def stalled(self) -> float:
        """For how many seconds training stood still since this was asked last."""
        untold, self._untold = self._untold, 0.0
        return untold

    def note(self, event: StepDone, scored: Mapping[str, float]) -> None:
        """Take note of what a step lost, and of how it was scored: a checkpoint is judged by the mean loss since the
        one before it, or by the score of its own step."""
        self._losses.append(event.loss)
        self._scored = dict(scored)
        best = self._plan.keep.best
        if scored and best is not None and best != "loss" and best not in scored:
            raise UsageError(f"--keep-best {best} is not a score of this task", hint=f"it has {', '.join(scored)}")

    def _metric(self) -> float | None:
        if self._plan.keep.best == "loss":
            return fmean(self._losses) if self._losses else None
        return self._scored.get(self._plan.keep.best or "")

    def poll(self) -> None:
        """Take note of a checkpoint that has been written; raises what stopped the writer."""
        if self._in_flight is not None and self._in_flight.done():
            self.finish()

    def finish(self) -> None:
        """Wait until what was asked for is committed; raises what stopped the writer."""
        if self._in_flight is None:
            return
        written = self._in_flight.result()
        self._in_flight = None
        self._grew = written.commit.stored
        stalled, self._stalled = self._stalled, 0.0
        self.last, self.last_step = (written.commit.id, written.manifest), written.position.step
        self._saved(Saved(self.last_step, written.commit, written.seconds, stalled))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.shutdown(wait=True)  # it uses the store, which is closed next
        self._staging.clear()

    def _write(
        self,
        position: Position,
        weights: Mapping[str, torch.Tensor],
        state: Mapping[str, torch.Tensor],
        metric: float | None,
        copied: "Future[None]",
    ) -> _Written:
        copied.result()
        began = time.perf_counter()
        plan = self._plan
        try:
            with begin(self._store, purpose=f"checkpoint {plan.target.name}", ref=plan.checkpoint_ref) as tx:
                if tx.expected is None:
                    tx.base = self._first_base()
                files = [tx.add_bytes(name, data) for name, data in self._small_files.items()]
                files += [*tokenizer_entries(tokenizer_source(plan)), *self._form.entries]
                files.append(tx.add_tensors(self._form.file, state_tensors(weights), metadata={"format": "pt"}))
                files.append(tx.add_tensors(TENSORS, state_tensors(state)))
                files.append(
                    tx.add_bytes(
                        POSITION,
                        encode_position(position, plan.config.params(), plan.config.seed, str(plan.data_id)),
                    )
                )
                manifest = Manifest(
                    "checkpoint", tuple(files), self._meta(position), checkpoint_recipe(plan.recipe, position.step)
                )
                commit = tx.commit(manifest, message=f"train: step {position.step} of {plan.config.steps}")
            keep_by_role(self._store, plan, position.step, manifest, metric)
        except OSError as exc:
            raise self._failed(position, from_os_error(exc, "writing it")) from exc
        except LlmosError as exc:
            raise self._failed(position, exc) from exc
        return _Written(position, commit, manifest, time.perf_counter() - began)

    def _first_base(self) -> Base | None:
        """What the first checkpoint of a run resembles: what it began with."""
        began_with = self._plan.origin.id if self._plan.origin else self._plan.model_id
        with suppress(LlmosError):
            return None if began_with is None else open_base(self._store, began_with)
        return None

    def _meta(self, position: Position) -> dict[str, Json]:
        return {
            "architecture": type(self._model).__name__,
            "dtype": "F32",
            "loss": position.loss,
            "parameters": self._parameters,
            "step": position.step,
            "steps": self._plan.config.steps,
            "task": str(self._plan.data.meta.get("task")),
            "tokens": position.tokens,
            **self._form.meta,
        }

    def _check_space(self, position: Position) -> None:
        """What the last save took is known: a save that cannot fit is not begun."""
        free = shutil.disk_usage(self._store.root).free
        if free < self._grew:
            reason = f"no space left: a checkpoint takes about {self._grew:,} bytes and {free:,} are free"
            raise self._failed(position, NoSpace(reason))

    def _failed(self, position: Position, exc: LlmosError) -> LlmosError:
        """The error of its kind, so that the exit code stays, which says what there is to go on from."""
        again = f"llmos train {self._plan.label} --resume"
        hint = f"free some space (llmos gc), then: {again}" if isinstance(exc, NoSpace) else f"go on with: {again}"
        return type(exc)(f"step {position.step:,} could not be saved: {exc.message}; {self.where}", hint=hint)
