"""Masked-token prediction as in BERT: of the tokens of a row about 15 % are asked for, and of those 80 % are shown as
the mask, 10 % as some other token, 10 % as they are.

Which ones is a pure function of the seed and of the row's slot in the run: new in every epoch, the same after a resume
and for any number of ranks and parts. The bits come from Philox by counter, so nothing is drawn and nothing is kept.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from llmos_cli.data.batches import TokenRows
from llmos_cli.train.tasks.work import IGNORED, Work

SHARE: Final = 0.15
_AS_MASK, _AS_OTHER = 0.8, 0.9  # below the first: the mask; below the second: another token; else as it is
_UNIT: Final = 2.0**-53


@dataclass(frozen=True)
class Masking:
    """`special` ids are never asked for; what stands in for a token is one of `vocab_size`."""

    seed: int
    mask_id: int
    vocab_size: int
    special: tuple[int, ...]

    def apply(self, ids: np.ndarray, slot: int, real: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """What the model is shown, and its targets; `real` says what is no padding. The first row is the run's
        `slot`-th."""
        can = ~np.isin(ids, self.special)
        if real is not None:
            can &= real
        chance = np.empty((3, *ids.shape))
        for row in range(len(ids)):
            chance[:, row] = _uniform(self.seed, slot + row, 3 * ids.shape[1]).reshape(3, -1)
        chosen = can & (chance[0] < SHARE)
        # A row in which none came up gives its likeliest, so that no row, and so no step, is without.
        none = np.flatnonzero(can.any(axis=1) & ~chosen.any(axis=1))
        chosen[none, np.where(can, chance[0], np.inf)[none].argmin(axis=1)] = True
        shown = ids.copy()
        shown[chosen & (chance[1] < _AS_MASK)] = self.mask_id
        other = chosen & (chance[1] >= _AS_MASK) & (chance[1] < _AS_OTHER)
        shown[other] = (chance[2][other] * self.vocab_size).astype(np.int64)
        return shown, np.where(chosen, ids, IGNORED)


@dataclass(frozen=True)
class MaskedTask:
    """Documents in one row do not see each other: each position attends to those of its own document alone.

    `first_position` is the position of a document's first token; None for a model that takes none.
    """

    rows: TokenRows
    masking: Masking
    first_position: int | None

    @property
    def count(self) -> int:
        return self.rows.rows

    @property
    def longest(self) -> int:
        return self.rows.seq_len

    def work(self, slot: int, indices: np.ndarray) -> Work:
        batch = self.rows.batch(indices)
        documents = batch.document_ids
        shown, targets = self.masking.apply(batch.input_ids, slot, None if documents is None else documents >= 0)
        inputs = {"input_ids": shown}
        if documents is not None:
            inputs["attention_mask"] = documents[:, None, :, None] == documents[:, None, None, :]
            if self.first_position is not None and batch.position_ids is not None:
                # What no document covers may be further on than any position there is.
                inputs["position_ids"] = np.where(documents >= 0, batch.position_ids, 0) + self.first_position
        tokens = batch.input_ids.size if documents is None else int((documents >= 0).sum())
        return Work(inputs, targets, int((targets != IGNORED).sum()), tokens, few=True)


def first_position(model: Any, parameters: Any) -> int | None:
    """The position id of a first token; `parameters` are the names of what the model's forward takes."""
    if "position_ids" not in parameters:
        return None
    embeddings = getattr(model.base_model, "embeddings", None)
    # RoBERTa and its kin count from behind the padding token's id.
    counts_from = hasattr(embeddings, "create_position_ids_from_input_ids")
    return int(embeddings.padding_idx) + 1 if embeddings is not None and counts_from else 0


def _uniform(seed: int, slot: int, count: int) -> np.ndarray:
    raw = np.random.Philox(key=[seed, 0x6D6C6D], counter=[0, 0, slot, 0]).random_raw(count)
    values: np.ndarray = (raw >> np.uint64(11)) * _UNIT
    return values
