"""One text into another: task seq2seq. The loss is on the target alone.

An encoder-decoder reads the source and writes the target. Any other model goes on from source to target in one row, as
it would when asked to generate.
"""

from dataclasses import dataclass

import numpy as np

from llmos_cli.data.examples import Examples
from llmos_cli.errors import Damaged
from llmos_cli.train.tasks.language import next_tokens
from llmos_cli.train.tasks.work import IGNORED, Work


@dataclass(frozen=True)
class TranslatedTask:
    """`start_id` is what a decoder begins with; None for a model without an encoder. `longest` is the most tokens of a
    source and of a target, or of both in one row."""

    examples: Examples
    longest: int
    pad_id: int
    start_id: int | None

    @property
    def count(self) -> int:
        return self.examples.count

    def work(self, slot: int, indices: np.ndarray) -> Work:
        pairs = self.pairs(indices)
        if self.start_id is None:
            rows = [np.concatenate(pair) for pair in pairs]
            ids, real = _padded(rows, self.pad_id)
            begins = np.array([len(source) for source, _ in pairs])
            learned = real & (np.arange(ids.shape[1]) >= begins[:, None])
            return next_tokens({"input_ids": ids, "attention_mask": real.astype(np.int64)}, learned)
        sources, source_mask = _padded([source for source, _ in pairs], self.pad_id)
        targets, real = _padded([target for _, target in pairs], self.pad_id)
        begun = np.concatenate([np.full((len(pairs), 1), self.start_id), targets[:, :-1]], axis=1)
        inputs = {
            "input_ids": sources,
            "attention_mask": source_mask.astype(np.int64),
            "decoder_input_ids": begun,
        }
        tokens = int(real.sum())
        return Work(inputs, np.where(real, targets, IGNORED), tokens, tokens, {"use_cache": False})

    def pairs(self, indices: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Source and target of each example, cut to what the model takes; ends of text stay."""
        batch = self.examples.batch(indices)
        if batch.parts is None:
            raise Damaged("the dataset has examples without a target")
        lengths = batch.attention_mask.sum(axis=1)
        found = []
        for ids, part, length in zip(batch.input_ids, batch.parts, lengths, strict=True):
            source, target = ids[:part], ids[part:length]
            if self.start_id is not None:
                found.append((_cut(source, self.longest), _cut(target, self.longest)))
            else:
                source = _cut(source, max(self.longest - len(target), self.longest // 2))
                found.append((source, _cut(target, self.longest - len(source))))
        return found


def _cut(ids: np.ndarray, longest: int) -> np.ndarray:
    return ids if len(ids) <= longest else np.append(ids[: longest - 1], ids[-1])


def _padded(rows: list[np.ndarray], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of equal length, and what of them is no padding."""
    lengths = np.array([len(row) for row in rows])
    real = np.arange(int(lengths.max())) < lengths[:, None]
    ids = np.full(real.shape, pad_id, np.int64)
    ids[real] = np.concatenate(rows)
    return ids, real
