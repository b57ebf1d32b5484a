"""How far apart two runs of tensor elements are: in words, in bits and in values.

Pure arithmetic on bytes in bounded memory; it knows nothing of files or stores. Words are compared by their bits, so
-0.0 differs from 0.0 and equal NaNs are equal. Values are compared in float64, over the elements that are finite on
both sides. Dtypes without plain values (fp8, 4-bit, complex, packed blocks) have no distance but that of their bits;
where a dtype is unknown or its elements are no whole bytes, a word is a byte.
"""

import math
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np

from llmos_cli.formats.safetensors import DTYPE_BITS

FLOATS: Final = frozenset({"F16", "BF16", "F32", "F64"})
_CODES: Final = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BOOL": "<u1", "U8": "<u1", "U16": "<u2", "U32": "<u4", "U64": "<u8",
    "I8": "<i1", "I16": "<i2", "I32": "<i4", "I64": "<i8",
}  # fmt: skip
_VALUED: Final = _CODES.keys() | {"BF16"}
_BLOCK: Final = 1 << 16  # elements; the float64 arrays of a block stay in a core's cache
_ROW: Final = 1 << 13  # elements of one dot product: few enough that BLAS does not start threads of its own for it


@dataclass(frozen=True)
class Tally:
    """What was counted over some elements. Tallies of parts add up to the tally of the whole.

    `infinite_old` and `infinite_new` count NaN and infinities; the sums leave out elements that are either on one side.
    """

    words: int = 0
    changed: int = 0
    bits: int = 0
    infinite_old: int = 0
    infinite_new: int = 0
    largest: float = 0.0
    sum_change: float = 0.0
    square_change: float = 0.0
    square_old: float = 0.0
    square_new: float = 0.0

    def __add__(self, other: "Tally") -> "Tally":
        added = {item.name: getattr(self, item.name) + getattr(other, item.name) for item in fields(self)}
        return Tally(**added | {"largest": max(self.largest, other.largest)})


@dataclass(frozen=True)
class Distance:
    """How far a tensor moved. What a pair of dtypes does not have is None: `bits` of two dtypes, values of fp8.

    `changed` counts among `compared` words; `bits` is the mean number of differing bits a word. `relative` is the L2
    norm of the change over that of the old values (None if those are all zero), `cosine` that of the angle between old
    and new values (None if either are all zero).
    """

    compared: int
    changed: int
    bits: float | None
    largest: float | None = None
    mean: float | None = None
    relative: float | None = None
    cosine: float | None = None
    infinite: tuple[int, int] = (0, 0)


def word_bytes(dtype: str) -> int:
    """Bytes of what counts as one word of a dtype."""
    return max(1, DTYPE_BITS.get(dtype, 8) // 8)


def comparable(old: str, new: str) -> bool:
    """Whether elements of these dtypes can be compared one by one: by bits if equal, else by value if both floats."""
    return old == new or (old in FLOATS and new in FLOATS)


def has_values(dtype: str) -> bool:
    """Whether elements of this dtype have values that can be subtracted."""
    return dtype in _VALUED


def tally(old: memoryview, new: memoryview | None, dtypes: tuple[str, str]) -> Tally:
    """Count over two runs of equally many elements; `new` is None where it is known to be the same bytes."""
    first, second = dtypes
    step_old, step_new = (_BLOCK * word_bytes(dtype) for dtype in dtypes)
    rooms = [np.empty(_BLOCK) for _ in range(3)]
    total = Tally()
    with np.errstate(all="ignore"):
        for number in range(-(-len(old) // step_old)):
            part = old[number * step_old :][:step_old]
            other = part if new is None else new[number * step_new :][:step_new]
            if first == second:
                total += _same_dtype(part, other, first, rooms)
            else:
                a, b = _values(part, first, rooms[0]), _values(other, second, rooms[1])
                total += _moved(a, b, rooms[2], int(np.count_nonzero(a != b)), 0)
    return total


def distance(total: Tally, *, bits: bool = True, values: bool = True) -> Distance:
    """What a tally over a whole tensor amounts to; `bits` and `values` say what its dtypes have of these."""
    mean_bits = total.bits / max(1, total.words) if bits else None
    if not values:
        return Distance(total.words, total.changed, mean_bits)
    norms = math.sqrt(total.square_old) * math.sqrt(total.square_new)
    cosine = (total.square_old + total.square_new - total.square_change) / (2 * norms) if norms else None
    return Distance(
        total.words,
        total.changed,
        mean_bits,
        total.largest,
        total.sum_change / max(1, total.words),
        math.sqrt(total.square_change / total.square_old) if total.square_old else None,
        None if cosine is None else max(-1.0, min(1.0, cosine)),
        (total.infinite_old, total.infinite_new),
    )


def _same_dtype(old: memoryview, new: memoryview, dtype: str, rooms: list[Any]) -> Tally:
    width = word_bytes(dtype)
    count = len(old) // width
    differing = 0
    bits = 0
    if new is not old:
        whole = len(old) // 8 * 8
        words = np.empty(len(old), np.uint8)
        np.bitwise_xor(_array(old[:whole], "<u8"), _array(new[:whole], "<u8"), out=words[:whole].view("<u8"))
        np.bitwise_xor(_array(old[whole:], "u1"), _array(new[whole:], "u1"), out=words[whole:])
        differing = int(np.count_nonzero(words.view(f"<u{width}")))
        if differing:
            bits = int(np.bitwise_count(words[:whole].view("<u8")).sum(dtype=np.int64))
            bits += int(np.bitwise_count(words[whole:]).sum(dtype=np.int64))
    if dtype not in _VALUED:
        return Tally(count, differing, bits)
    a = _values(old, dtype, rooms[0])
    b = _values(new, dtype, rooms[1]) if differing else a
    return _moved(a, b, rooms[2], differing, bits)


def _moved(a: Any, b: Any, room: Any, differing: int, bits: int) -> Tally:
    """The tally of two runs of float64 values; where both are the same array, nothing moved."""
    square_old = _square(a)
    square_new = square_old if a is b else _square(b)
    bad_old = bad_new = 0
    if not math.isfinite(square_old + square_new):
        finite_old, finite_new = np.isfinite(a), np.isfinite(b)
        bad_old, bad_new = len(a) - int(np.count_nonzero(finite_old)), len(b) - int(np.count_nonzero(finite_new))
        both = finite_old & finite_new
        a, b = np.where(both, a, 0.0), np.where(both, b, 0.0)
        square_old, square_new = _square(a), _square(b)
    if not differing:
        return Tally(len(a), 0, 0, bad_old, bad_new, square_old=square_old, square_new=square_new)
    change = np.subtract(b, a, out=room[: len(a)])
    square_change = _square(change)
    np.abs(change, out=change)
    return Tally(
        len(a),
        differing,
        bits,
        bad_old,
        bad_new,
        float(change.max()),
        float(change.sum()),
        square_change,
        square_old,
        square_new,
    )


def _square(values: Any) -> float:
    whole = len(values) // _ROW * _ROW
    rows, rest = values[:whole].reshape(-1, _ROW), values[whole:]
    return float(np.vecdot(rows, rows).sum() + np.dot(rest, rest))


def _values(data: memoryview, dtype: str, room: Any) -> Any:
    """The elements as float64 in the memory of `room`."""
    if dtype == "BF16":
        wide = _array(data, "<u2").astype("<u4")
        wide <<= 16
        found = wide.view("<f4")
    else:
        found = _array(data, _CODES[dtype])
    out = room[: len(found)]
    out[:] = found
    return out


def _array(data: memoryview, code: str) -> Any:
    return np.frombuffer(data, code)
