"""Commits checkpoints: each one transaction, the previous one untouched until the new one is in the store."""

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from llmos_cli.errors import NoSpace
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.manifest import Manifest
from llmos_cli.models.tokenizers import tokenizer_entries
from llmos_cli.models.weights import drop_tied, state_tensors
from llmos_cli.store.local import Store
from llmos_cli.store.transaction import Commit, begin
from llmos_cli.train.checkpoint import POSITION, TENSORS, Position, capture, encode_position
from llmos_cli.train.plan import Plan, checkpoint_recipe, tokenizer_source

_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Saved:
    """A checkpoint was committed."""

    step: int
    commit: Commit
    seconds: float


class Saver:
    """Knows what a run has committed last; `small_files` are config.json and the like, the same in every checkpoint."""

    def __init__(
        self,
        store: Store,
        plan: Plan,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        *,
        small_files: Mapping[str, bytes],
        saved: Callable[[Saved], None],
    ) -> None:
        self._store, self._plan, self._model, self._optimizer = store, plan, model, optimizer
        self._small_files, self._saved = small_files, saved
        self._parameters = sum(parameter.numel() for parameter in model.parameters())
        self._grew = 0
        self.last: tuple[ObjectId, Manifest] | None = None
        self.last_step = plan.start
        if plan.resume:
            self.last = plan.resume.id, plan.resume.manifest

    @property
    def where(self) -> str:
        """The last checkpoint, in words."""
        if self.last is None:
            return "no checkpoint was made yet"
        return f"{self._plan.checkpoint_ref} holds step {self.last_step:,}"

    def save(self, position: Position) -> tuple[ObjectId, Manifest]:
        """Commit the state after `position.step` unless it was committed last; returns the last checkpoint."""
        if self.last is not None and self.last_step == position.step:
            return self.last
        began = time.perf_counter()
        self._check_space(position)
        plan = self._plan
        try:
            with begin(self._store, purpose=f"checkpoint {plan.target.name}", ref=plan.checkpoint_ref) as tx:
                files = [tx.add_bytes(name, data) for name, data in self._small_files.items()]
                files += tokenizer_entries(tokenizer_source(plan))
                files.append(tx.add_tensors(_WEIGHTS, state_tensors(drop_tied(self._model)), metadata={"format": "pt"}))
                files.append(tx.add_tensors(TENSORS, state_tensors(capture(self._model, self._optimizer))))
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
        except NoSpace as exc:
            raise self._no_space(position, exc.message) from exc
        self._grew, self.last, self.last_step = commit.stored, (commit.id, manifest), position.step
        self._saved(Saved(position.step, commit, time.perf_counter() - began))
        return self.last

    def _meta(self, position: Position) -> dict[str, str | int | float | None]:
        return {
            "architecture": type(self._model).__name__,
            "dtype": "F32",
            "loss": position.loss,
            "parameters": self._parameters,
            "step": position.step,
            "steps": self._plan.config.steps,
            "task": "lm",
            "tokens": position.tokens,
        }

    def _check_space(self, position: Position) -> None:
        """What the last save took is known: a save that cannot fit is not begun."""
        free = shutil.disk_usage(self._store.root).free
        if free < self._grew:
            reason = f"no space left: a checkpoint takes about {self._grew:,} bytes and {free:,} are free"
            raise self._no_space(position, reason)

    def _no_space(self, position: Position, reason: str) -> NoSpace:
        return NoSpace(
            f"step {position.step:,} could not be saved: {reason}; {self.where}",
            hint=f"free some space (llmos gc), then: llmos train {self._plan.label} --resume",
        )
