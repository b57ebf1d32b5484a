"""The order in which rows are seen: a pure function of (dataset id, seed, step), so resuming needs one integer.

Each epoch visits every row once, in an order given by a keyed permutation of 0..rows-1: a Feistel network over the
smallest even number of bits that holds `rows`, walked along its cycle until the value falls inside (fewer than four
turns on average). Nothing is stored: one row of a trillion costs the same as one of ten. The round keys come from
BLAKE3, so two seeds, epochs or datasets share nothing.

Of a dataset larger than `WINDOW_BYTES` the order keeps reading local: blocks of rows that follow one another are
permuted, and rows are permuted within windows of so many blocks. Whoever streams needs one window at a time.

This order is part of what makes a training run repeatable: changing it changes every result. Ranks, workers and
accumulation divide a batch, they never choose it: `share` says how.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from llmos_cli.errors import UsageError
from llmos_cli.formats.ids import ObjectId, object_id
from llmos_cli.formats.limits import CHUNK_BYTES, MiB

WINDOW_BYTES: Final = 256 * MiB
_KEPT_SLOTS: Final = 4096
_MOST_KEPT: Final = 4 * _KEPT_SLOTS  # many at once cost less each
_ROUNDS: Final = 8
_MIX: Final = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # the finaliser of SplitMix64
_SHIFTS: Final = (np.uint64(30), np.uint64(27), np.uint64(31))


def batch_indices(dataset_id: ObjectId, seed: int, step: int, batch_size: int, rows: int) -> np.ndarray:
    """The rows of batch `step` (from 0); a batch at the end of an epoch goes on with the next epoch's first rows."""
    if rows < 1 or batch_size < 1 or step < 0:
        raise ValueError(f"no batch {step} of {batch_size} out of {rows} rows")
    slot, stop = step * batch_size, (step + 1) * batch_size
    parts = []
    while slot < stop:
        epoch, first = divmod(slot, rows)
        count = min(stop - slot, rows - first)
        parts.append(sample_indices(dataset_id, seed, epoch, rows, range(first, first + count)))
        slot += count
    return np.concatenate(parts)


@dataclass(frozen=True)
class Rows:
    """What is put in order: `count` rows of a dataset, the first of them `first` among all that are read together.
    Blocks of `block` rows are read at once; every `window` of them is permuted as one."""

    id: ObjectId
    count: int
    block: int
    window: int
    first: int = 0


def rows_of(dataset_id: ObjectId, count: int, row_bytes: int, *, first: int = 0, among: int = 1) -> Rows:
    """The rows of a dataset that shares its window with the others `among` which it is."""
    return Rows(
        dataset_id, count, max(1, CHUNK_BYTES // row_bytes), max(1, WINDOW_BYTES // CHUNK_BYTES // among), first
    )


class Order:
    """The rows of any batch of a run. What it remembers only saves computing it again."""

    def __init__(self, slots: Callable[[range], np.ndarray], kept: int = _KEPT_SLOTS) -> None:
        self._slots = slots
        self._size = kept  # slots that are computed together
        self._kept: dict[int, np.ndarray] = {}
        self._coming: Callable[[np.ndarray], None] | None = None
        self._told = 0

    def tell(self, coming: Callable[[np.ndarray], None]) -> None:
        """Call `coming` with the rows of the next few thousand slots, ever before they are asked for."""
        self._coming = coming

    def batch(self, step: int, batch_size: int) -> np.ndarray:
        """The rows of batch `step`, from 0."""
        start, stop = step * batch_size, (step + 1) * batch_size
        first, last = start // self._size, (stop - 1) // self._size
        if self._coming and last >= self._told:
            self._tell_of(range(max(first, self._told), last + 2), self._coming)
        if first == last:
            start -= first * self._size
            return self._part(first)[start : start + batch_size]
        parts = np.concatenate([self._part(number) for number in range(first, last + 1)])
        return parts[start - first * self._size :][:batch_size]

    def _tell_of(self, parts: range, coming: Callable[[np.ndarray], None]) -> None:
        for number in parts:
            coming(self._part(number))
        self._told = parts.stop

    def _part(self, number: int) -> np.ndarray:
        part = self._kept.get(number)
        if part is None:
            part = self._slots(range(number * self._size, (number + 1) * self._size))
            self._kept = {key: kept for key, kept in self._kept.items() if key in (number - 1, number + 1)}
            self._kept[number] = part
        return part


def order_of(rows: Rows, seed: int) -> Order:
    """The order of one dataset, epoch after epoch."""
    if rows.count < 1:
        raise ValueError("there are no rows to put in order")
    kept = min(_MOST_KEPT, max(_KEPT_SLOTS // 16, rows.count))
    return Order(lambda slots: run_indices(rows, seed, slots), kept)


def run_indices(rows: Rows, seed: int, slots: range) -> np.ndarray:
    """The rows that `slots`, counted through all epochs, hold."""
    parts, slot = [], slots.start
    while slot < slots.stop:
        epoch, first = divmod(slot, rows.count)
        count = min(slots.stop - slot, rows.count - first)
        parts.append(_epoch_indices(rows, seed, epoch, range(first, first + count)))
        slot += count
    return np.concatenate(parts) + rows.first


def share(indices: np.ndarray, *, ranks: int, rank: int, parts: int) -> list[np.ndarray]:
    """What a rank sees of a batch: one run of rows for each of `parts` accumulated parts. Part by part and rank by rank
    they make up the batch, whatever the number of ranks.

    Raises UsageError, naming the numbers of ranks that would do, unless every share is as large as the others.
    """
    size = len(indices)
    if size % (ranks * parts):
        legal = [str(number) for number in range(1, size // parts + 1) if size % (number * parts) == 0]
        asked = f"a batch of {size} in {parts} parts" if parts > 1 else f"a batch of {size}"
        can = f"it can be divided among {', '.join(legal)}" if legal else "choose a batch that --accumulate divides"
        raise UsageError(f"{asked} cannot be divided among {ranks} ranks", hint=can)
    return list(indices.reshape(parts, ranks, -1)[:, rank])


def _epoch_indices(rows: Rows, seed: int, epoch: int, slots: range) -> np.ndarray:
    full, rest = divmod(rows.count, rows.block)
    if full <= rows.window:
        return sample_indices(rows.id, seed, epoch, rows.count, slots)
    windows = -(-full // rows.window)
    parts, slot, size = [], slots.start, rows.window * rows.block
    block_keys = _round_keys(rows.id, seed, epoch, "blocks")
    while slot < slots.stop:
        window = min(slot // size, windows - 1)
        first_block = window * rows.window
        blocks = min(rows.window, full - first_block)
        inside = blocks * rows.block + (rest if window == windows - 1 else 0)  # what is no whole block comes last
        start = slot - window * size
        count = min(slots.stop - slot, inside - start)
        values = np.arange(start, start + count, dtype=np.uint64)
        order = _permutation(values, inside, _round_keys(rows.id, seed, epoch, f"window {window}"))
        which, row = np.divmod(order.astype(np.int64), rows.block)
        held = _permutation(np.arange(first_block, first_block + blocks, dtype=np.uint64), full, block_keys)
        parts.append(np.append(held.astype(np.int64), full)[which] * rows.block + row)
        slot += count
    return np.concatenate(parts)


def sample_indices(dataset_id: ObjectId, seed: int, epoch: int, rows: int, slots: range) -> np.ndarray:
    """The rows that `slots` of an epoch hold; over range(rows) this is a permutation of it."""
    if slots.step != 1 or not 0 <= slots.start <= slots.stop <= rows:
        raise ValueError(f"{slots} is not inside an epoch of {rows} rows")
    values = np.arange(slots.start, slots.stop, dtype=np.uint64)
    return _permutation(values, rows, _round_keys(dataset_id, seed, epoch)).astype(np.int64)


def scattered(dataset_id: ObjectId, seed: int, number: int, size: int) -> np.ndarray:
    """A permutation of range(size) of its own for each `number`."""
    return _permutation(np.arange(size, dtype=np.uint64), size, _round_keys(dataset_id, seed, number, "mix")).astype(
        np.int64
    )


def _permutation(values: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Where a keyed permutation of range(size) takes `values`."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    outside = np.arange(values.size)
    while outside.size:
        values[outside] = _permute(values[outside], half, keys)
        outside = outside[values[outside] >= np.uint64(size)]
    return values


def _round_keys(dataset_id: ObjectId, seed: int, epoch: int, what: str = "") -> np.ndarray:
    text = f"llmos order 1\n{dataset_id}\n{seed}\n{epoch}\n" + (f"{what}\n" if what else "")
    digest = b"".join(object_id(f"{text}{part}".encode()) for part in range(_ROUNDS * 8 // 32))
    return np.frombuffer(digest, dtype="<u8")


def _permute(values: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
    """One pass of the network over values of 2 * `half` bits."""
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> shift, values & mask
    mixed, scratch = np.empty_like(values), np.empty_like(values)
    for key in keys:
        np.bitwise_xor(right, key, out=mixed)
        _mix(mixed, scratch)
        mixed &= mask
        mixed ^= left
        left, right, mixed = right, mixed, left
    return (left << shift) | right


def _mix(values: np.ndarray, scratch: np.ndarray) -> None:
    for shift, factor in zip(_SHIFTS, _MIX, strict=False):
        values ^= np.right_shift(values, shift, out=scratch)
        values *= factor
    values ^= np.right_shift(values, _SHIFTS[-1], out=scratch)
