"""Next-token prediction over rows of one or several documents: tasks lm and chat."""

from dataclasses import dataclass

import numpy as np

from llmos_cli.data.batches import TokenRows
from llmos_cli.train.tasks.work import IGNORED, Work


@dataclass(frozen=True)
class LanguageTask:
    """Every token but a document's first is predicted, in chats only what the assistant says. `apart`: the model sees
    where documents begin, by positions that begin anew."""

    rows: TokenRows
    apart: bool

    @property
    def count(self) -> int:
        return self.rows.rows

    @property
    def longest(self) -> int:
        return self.rows.seq_len

    def work(self, slot: int, indices: np.ndarray) -> Work:
        batch = self.rows.batch(indices)
        inputs = {"input_ids": batch.input_ids}
        if self.apart and batch.position_ids is not None:
            inputs["position_ids"] = batch.position_ids
        return next_tokens(inputs, batch.learned)


def next_tokens(inputs: dict[str, np.ndarray], learned: np.ndarray | None) -> Work:
    """The work of predicting each token that is `learned` (None: all) from those before it in its row."""
    ids = inputs["input_ids"]
    # Targets are shifted, not the logits: slicing logits would copy the largest tensor of the step.
    targets = np.full_like(ids, IGNORED)
    targets[:, :-1] = ids[:, 1:] if learned is None else np.where(learned[:, 1:], ids[:, 1:], IGNORED)
    counted = int((targets != IGNORED).sum())
    return Work(inputs, targets, counted, counted, {"use_cache": False})
