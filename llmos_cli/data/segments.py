"""Where the documents in rows begin and end: the pack plans of shards, those held that were used last. No torch.

A row is covered by its segments from the left to its end; padding is one more, numbered -1. So the segments of any rows
tile them without a gap, and all that is to be known of documents comes out of two repetitions.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from llmos_cli.data.layout import TABLE_COLUMNS, ShardFile
from llmos_cli.errors import Damaged
from llmos_cli.formats.limits import MiB
from llmos_cli.store.disk.forks import ForkLock

_PLAN_BYTES: Final = 128 * MiB
_FAR: Final = -(1 << 62)  # a place no row of a shard that is not held can come out at


@dataclass(frozen=True)
class Plan:
    """The segments of a shard's rows, row by row: where those of each row begin among all and how many they are;
    of each segment its length and its number in the row (padding: -1)."""

    first: np.ndarray
    count: np.ndarray
    lengths: np.ndarray
    numbers: np.ndarray

    @property
    def size(self) -> int:
        return self.first.nbytes + self.count.nbytes + self.lengths.nbytes + self.numbers.nbytes


@dataclass(frozen=True)
class Documents:
    """What there is to know of the documents in a batch, [n, seq_len] each; as `Batch` has it."""

    position_ids: np.ndarray
    document_ids: np.ndarray
    learned: np.ndarray


class Segments:
    """The plans of all shards, read by `plan_of` and put one after the other. Safe from several threads."""

    def __init__(self, counts: np.ndarray, seq_len: int, plan_of: Callable[[int], Plan]) -> None:
        self._ends = np.cumsum(counts)
        self._begins = self._ends - counts
        self._seq_len, self._plan_of = seq_len, plan_of
        self._plans: OrderedDict[int, Plan] = OrderedDict()
        self._move = np.full(len(counts), _FAR)  # from a row's number to its place among those held
        self._shared = np.ones(len(counts), bool)  # whether a shard, as far as is known, has rows of several segments
        self._all_single = False
        self._held = _joined([])
        self._steps = np.arange(seq_len)
        self._lock = ForkLock()

    def of(self, rows: np.ndarray, *, apart: bool) -> Documents | None:
        """What is to be known of rows by number; None, unless `apart`, if each is one full document."""
        if self._all_single and not apart:
            return None
        held, at, first = self._places(rows)
        count = held.count[at]
        total = int(count.sum())
        if total == len(rows) and not apart and not (total and held.numbers[first].min() < 0):
            return None
        size = len(rows) * self._seq_len
        if len(self._steps) < size:
            self._steps = np.arange(size)
        steps = self._steps
        each = steps[:total] + (first - (count.cumsum() - count)).repeat(count)
        lengths, numbers = held.lengths[each], held.numbers[each]
        starts = lengths.cumsum() - lengths
        positions = steps[:size] - starts.repeat(lengths)
        documents = numbers.repeat(lengths)
        learned = np.ones(size, bool)
        learned[starts] = False
        if total and numbers.min() < 0:
            learned &= documents >= 0
        shape = len(rows), self._seq_len
        return Documents(positions.reshape(shape), documents.reshape(shape), learned.reshape(shape))

    def _places(self, rows: np.ndarray) -> tuple[Plan, np.ndarray, np.ndarray]:
        """The plans with the place in them of each row, and where its segments begin."""
        shards = self._ends.searchsorted(rows, "right")
        with self._lock:
            held, at = self._held, rows + self._move[shards]
            try:
                return held, at, held.first[at]
            except IndexError:
                self._hold(set(shards.tolist()))
                held, at = self._held, rows + self._move[shards]
                return held, at, held.first[at]

    def _hold(self, needed: set[int]) -> None:
        for number in needed:
            held = self._plans.pop(number, None)
            self._plans[number] = plan = held or self._plan_of(number)
            self._shared[number] = len(plan.lengths) != len(plan.first) or (plan.numbers < 0).any()
        self._all_single = not self._shared.any()
        for number in list(self._plans):
            if sum(plan.size for plan in self._plans.values()) <= _PLAN_BYTES or number in needed:
                break
            del self._plans[number]
        self._held = _joined(list(self._plans.values()))
        self._move[:] = _FAR
        begins = np.cumsum([0, *(len(plan.first) for plan in self._plans.values())])
        for number, begin in zip(self._plans, begins.tolist(), strict=False):
            self._move[number] = begin - self._begins[number]


def read_plan(shard: ShardFile, rows: int, seq_len: int) -> Plan:
    """The plan of a shard; without one, each row is a segment. Raises Damaged if it does not fit the rows."""
    if "segments" not in shard.tensors:
        return Plan(np.arange(rows), np.ones(rows, np.int64), np.full(rows, seq_len), np.zeros(rows, np.int64))
    segments = shard.table("segments", TABLE_COLUMNS)
    row, length = segments[:, 0], segments[:, 3]
    in_order = bool((np.diff(row) >= 0).all()) and (not row.size or 0 <= row[0] <= row[-1] < rows)
    filled = np.bincount(row, length, minlength=rows).astype(np.int64) if in_order else np.zeros(rows, np.int64)
    if not in_order or (length < 1).any() or (filled > seq_len).any():
        raise Damaged(f"{shard.entry.path} has segments that do not fit its rows")
    before = np.bincount(row, minlength=rows)
    first = np.cumsum(before) - before
    (short,) = np.nonzero(filled < seq_len)
    ends = (first + before)[short]
    count = before + (filled < seq_len)
    return Plan(
        np.cumsum(count) - count,
        count,
        np.insert(length, ends, seq_len - filled[short]),
        np.insert(np.arange(len(row)) - first[row], ends, -1),
    )


def _joined(plans: list[Plan]) -> Plan:
    empty = np.empty(0, np.int64)
    begins = np.cumsum([0, *(len(plan.lengths) for plan in plans)])
    firsts = [plan.first + begin for plan, begin in zip(plans, begins.tolist(), strict=False)]
    return Plan(
        np.concatenate([empty, *firsts]),
        np.concatenate([empty, *(plan.count for plan in plans)]),
        np.concatenate([empty, *(plan.lengths for plan in plans)]),
        np.concatenate([empty, *(plan.numbers for plan in plans)]),
    )
