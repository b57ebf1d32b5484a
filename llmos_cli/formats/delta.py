"""Words as differences to the words of a base, in byte planes, and back. Knows nothing of compression.

A difference is taken as an integer modulo 2^n and zigzagged, so that a small change of either sign is a small number.
Floats are grouped by the exponent of their base word (a stable partition, undone from the base alone): a step of one
size is many units in the last place of a small float and few of a large one, so every group has a narrow code.

Grouping is compiled (kernels.py). numpy does the same at a tenth of the speed: for the first few chunks of a process,
which would wait longer for the kernels, and wherever they cannot be had. Kernels are compared with numpy before they
are used.
"""

import threading
from collections.abc import Sequence
from typing import Final

import numpy as np

from llmos_cli.formats import limits
from llmos_cli.formats.ids import Buffer
from llmos_cli.formats.kernels import BLOCK, LANES, TABLE, Kernels, compile_kernels, load_kernels
from llmos_cli.formats.planes import WORD_TYPES, Array, merge, scratch, split_words

_LOAD_FROM: Final = 12 * limits.MiB  # about what numpy groups while kernels are loaded
_COMPILE_FROM: Final = 128 * limits.MiB  # and while they are compiled, which is done once for a machine


def subtract(
    plain: memoryview, base: Buffer, width: int, grouped: bool, room: memoryview
) -> tuple[list[memoryview], list[int]]:
    """The planes of the differences of a run of whole words, as views of `room`, which is as long as `plain`, and the
    index after each group's last word (none if not grouped)."""
    words = np.frombuffer(plain, WORD_TYPES[width])
    against = _base_words(base, words)
    kernels = _ready.get(width, len(plain)) if grouped else None
    if kernels is None:
        changes, ends = _differences(words, against, grouped)
        return split_words(changes, False, room), ends
    count = len(words)
    table = np.empty(TABLE, np.uint32)
    kernels.count(against, table)
    kernels.scatter(words, against, table, np.frombuffer(room, np.uint8, width * count))
    views = [room[plane * count : (plane + 1) * count] for plane in range(width)]
    return views, table[-256:].tolist()  # where the last lane has stopped


def add(planes: Sequence[Buffer], base: Buffer, grouped: bool, out: memoryview) -> None:
    """The inverse of `subtract`, written into `out`, which must not overlap the base."""
    width = len(planes)
    words = np.frombuffer(out, WORD_TYPES[width])
    if any(len(plane) != len(words) for plane in planes):
        raise ValueError("a plane has a byte of every word")
    against = _base_words(base, words)
    kernels = _ready.get(width, len(out)) if grouped else None
    if kernels is None:
        merge(planes, False, out)
        _restore(words, against, grouped)
        return
    table = np.empty(TABLE, np.uint32)
    kernels.count(against, table)
    kernels.gather(planes, against, table, words)


def _base_words(base: Buffer, words: Array) -> Array:
    """As many words as there are `words`: those of the base, cut or continued with zeros."""
    whole = min(len(base) // words.itemsize, len(words))
    known = np.frombuffer(base, words.dtype, whole) if whole else words[:0]
    if whole == len(words):
        return known
    padded = scratch("base", words.dtype, len(words))
    padded[:whole] = known
    padded[whole:] = 0
    return padded


def _keys(base: Array) -> Array:
    """The byte by which words are grouped: bits n-9 to n-2, the exponent of bf16 and fp32."""
    return (base >> base.dtype.type(8 * base.itemsize - 9)).astype(np.uint8)


def _differences(words: Array, base: Array, grouped: bool) -> tuple[Array, list[int]]:
    kind = words.dtype.type
    changes, sign = (scratch(name, words.dtype, len(words)) for name in ("delta", "sign"))
    np.subtract(words, base, out=changes)
    np.right_shift(changes, kind(8 * words.itemsize - 1), out=sign)
    np.negative(sign, out=sign)
    changes <<= kind(1)
    changes ^= sign
    if not grouped:
        return changes, []
    keys = _keys(base)
    return changes[np.argsort(keys, kind="stable")], np.cumsum(np.bincount(keys, minlength=256)).tolist()


def _restore(words: Array, base: Array, grouped: bool) -> None:
    kind = words.dtype.type
    if grouped:
        words[np.argsort(_keys(base), kind="stable")] = words.copy()
    sign = np.bitwise_and(words, kind(1), out=scratch("sign", words.dtype, len(words)))
    np.negative(sign, out=sign)
    words >>= kind(1)
    words ^= sign
    words += base


class _Ready:
    """The kernels of a width, from the moment on when having them pays; None until then, and where there are none."""

    def __init__(self) -> None:
        self._kernels: dict[int, Kernels | None] = {}
        self._making = threading.Lock()
        self._tried: set[int] = set()
        self._done = 0

    def get(self, width: int, size: int) -> Kernels | None:
        if width not in self._kernels:
            self._done += size
            compiling = self._done >= _COMPILE_FROM
            if not compiling and (self._done < _LOAD_FROM or width in self._tried):
                return None
            if not self._making.acquire(blocking=False):
                return None
            try:
                if width not in self._kernels:
                    self._tried.add(width)
                    kernels = find_kernels(width, compiling=compiling)
                    if kernels is None and not compiling:
                        return None
                    self._kernels[width] = kernels
            finally:
                self._making.release()
        return self._kernels[width]


_ready = _Ready()


def find_kernels(width: int, *, compiling: bool = True) -> Kernels | None:
    """Kernels that have proven to do what numpy does: as this machine keeps them or, if `compiling`, made anew."""
    for make in (load_kernels, compile_kernels) if compiling else (load_kernels,):
        try:
            kernels = make(width)
            if kernels is not None and _is_right(kernels, width):
                return kernels
        except Exception:  # noqa: BLE001 - whatever keeps them from working, numpy does not need it
            continue
    return None


def _is_right(kernels: Kernels, width: int) -> bool:
    count = 3 * LANES * BLOCK // 2 + LANES - 1
    mixed = np.arange(2 * count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(31)
    words, base = (mixed[half::2].astype(WORD_TYPES[width]) for half in (0, 1))
    changes, ends = _differences(words, base, True)
    expected = b"".join(split_words(changes, False, memoryview(bytearray(width * count))))
    table = np.empty(TABLE, np.uint32)
    back, flat = np.empty_like(words), np.empty(width * count, np.uint8)
    kernels.count(base, table)
    after = table.copy()
    kernels.scatter(words, base, after, flat)
    kernels.gather([plane.data for plane in flat.reshape(width, count)], base, table, back)
    same = flat.tobytes() == expected and after[-256:].tolist() == ends
    return same and bool(np.array_equal(back, words))
