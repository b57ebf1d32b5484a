"""The order in which rows are seen: a pure function of (dataset id, seed, step), so resuming needs one integer.

Each epoch visits every row once, in an order given by a keyed permutation of 0..rows-1: a Feistel network over the
smallest even number of bits that holds `rows`, walked along its cycle until the value falls inside (fewer than four
turns on average). Nothing is stored: one row of a trillion costs the same as one of ten. The round keys come from
BLAKE3, so two seeds, epochs or datasets share nothing.

This order is part of what makes a training run repeatable: changing it changes every result. It knows nothing of
ranks, workers or accumulation; those divide a batch, they never choose it.
"""

from typing import Final

import numpy as np

from llmos_cli.formats.ids import ObjectId, object_id

_ROUNDS: Final = 8
_MIX: Final = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # the finaliser of SplitMix64


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


def sample_indices(dataset_id: ObjectId, seed: int, epoch: int, rows: int, slots: range) -> np.ndarray:
    """The rows that `slots` of an epoch hold; over range(rows) this is a permutation of it."""
    if slots.step != 1 or not 0 <= slots.start <= slots.stop <= rows:
        raise ValueError(f"{slots} is not inside an epoch of {rows} rows")
    half = max(1, ((rows - 1).bit_length() + 1) // 2)
    keys = _round_keys(dataset_id, seed, epoch)
    values = np.arange(slots.start, slots.stop, dtype=np.uint64)
    outside = np.arange(values.size)
    while outside.size:
        values[outside] = _permute(values[outside], half, keys)
        outside = outside[values[outside] >= np.uint64(rows)]
    return values.astype(np.int64)


def _round_keys(dataset_id: ObjectId, seed: int, epoch: int) -> np.ndarray:
    text = f"llmos order 1\n{dataset_id}\n{seed}\n{epoch}\n"
    digest = b"".join(object_id(f"{text}{part}".encode()) for part in range(_ROUNDS * 8 // 32))
    return np.frombuffer(digest, dtype="<u8")


def _permute(values: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
    """One pass of the network over values of 2 * `half` bits."""
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(30))) * _MIX[0]
    values = (values ^ (values >> np.uint64(27))) * _MIX[1]
    values ^= values >> np.uint64(31)
    return values
