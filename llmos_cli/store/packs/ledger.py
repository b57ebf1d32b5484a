"""What millions of objects take, in columns."""

from array import array
from dataclasses import dataclass


@dataclass(frozen=True)
class Ledger:
    """What the objects of a store take, in columns, since there are millions: ids of 32 bytes each in ascending order,
    plain and stored bytes, and whether the copy that is read first is a delta; then every pair of a delta and its base,
    by the delta's id."""

    ids: bytearray
    plain: "array[int]"
    stored: "array[int]"
    is_delta: bytearray
    deltas: bytearray
    bases: bytearray
