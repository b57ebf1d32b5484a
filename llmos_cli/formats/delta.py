"""Words as differences to the words of a base, in byte planes, and back. Knows nothing of compression.

A difference is taken as an integer modulo 2^n and zigzagged, so that a small change of either sign is a small number.
Floats are grouped by the exponent of their base word (a stable partition, undone from the base alone): a step of one
size is many units in the last place of a small float and few of a large one, so every group has a narrow code.

Grouping is compiled with numba. numpy does the same at a tenth of the speed: for the first few chunks of a process,
which would wait longer for numba, and wherever numba cannot be had. The kernels are compared with numpy before they
are used. They index by what they count in the base themselves, never by a payload: as long as nobody changes the base
meanwhile, every access is within its array.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from llmos_cli.formats import limits
from llmos_cli.formats.ids import Buffer
from llmos_cli.formats.planes import WORD_TYPES, Array, merge, scratch, split_words

_COMPILE_FROM: Final = 64 * limits.MiB  # about what numpy groups while numba is imported and its kernels are loaded
_LANES: Final = 4  # parts of a chunk that a kernel works on by turns, so that it need not wait for its own counters
_BLOCK: Final = 2048  # words of a lane that fit in the nearest cache


def subtract(
    plain: memoryview, base: Buffer, width: int, grouped: bool, room: memoryview
) -> tuple[list[memoryview], list[int]]:
    """The planes of the differences of a run of whole words, as views of `room`, which is as long as `plain`, and the
    index after each group's last word (none if not grouped)."""
    words = np.frombuffer(plain, WORD_TYPES[width])
    against = _base_words(base, words)
    kernels = _compiled.get(width, len(plain)) if grouped else None
    if kernels is None:
        changes, ends = _differences(words, against, grouped)
        return split_words(changes, False, room), ends
    count = len(words)
    table = np.empty(256 * _LANES, np.uint32)
    kernels.count(against, table)
    flat = np.frombuffer(room, np.uint8, width * count)
    kernels.scatter(words, against, table, scratch("delta", words.dtype, count), flat)
    views = [room[plane * count : (plane + 1) * count] for plane in range(width)]
    return views, table[-256:].tolist()  # where the last lane has stopped


def add(planes: Sequence[Buffer], base: Buffer, grouped: bool, out: memoryview) -> None:
    """The inverse of `subtract`, written into `out`, which must not overlap the base."""
    width = len(planes)
    words = np.frombuffer(out, WORD_TYPES[width])
    if any(len(plane) != len(words) for plane in planes):
        raise ValueError("a plane has a byte of every word")
    against = _base_words(base, words)
    kernels = _compiled.get(width, len(out)) if grouped else None
    if kernels is None:
        merge(planes, False, out)
        _restore(words, against, grouped)
        return
    table = np.empty(256 * _LANES, np.uint32)
    kernels.count(against, table)
    narrow = tuple(np.frombuffer(plane, np.uint8) for plane in planes)
    kernels.gather(narrow, against, table, scratch("delta", words.dtype, len(words)), words)


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


@dataclass(frozen=True)
class _Kernels:
    """count(base, table): where the words of each lane and key begin, 256 entries a lane.
    scatter(words, base, table, room for words, planes): the differences into place. gather: the inverse."""

    count: Callable[[Array, Array], None]
    scatter: Callable[[Array, Array, Array, Array, Array], None]
    gather: Callable[[tuple[Array, ...], Array, Array, Array, Array], None]


class _Compiled:
    """The kernels of a width, from the moment on when having them pays; None until then, and where there are none."""

    def __init__(self) -> None:
        self._kernels: dict[int, _Kernels | None] = {}
        self._making = threading.Lock()
        self._done = 0

    def get(self, width: int, size: int) -> _Kernels | None:
        if width not in self._kernels:
            self._done += size
            if self._done < _COMPILE_FROM or not self._making.acquire(blocking=False):
                return None
            try:
                if width not in self._kernels:
                    self._kernels[width] = compile_kernels(width)
            finally:
                self._making.release()
        return self._kernels[width]


_compiled = _Compiled()


def compile_kernels(width: int) -> _Kernels | None:
    """Kernels that have proven to do what numpy does, from numba's cache where it can be read and written."""
    for cached in (True, False):  # a cache that is damaged or on a full disk must not cost more than time
        try:
            kernels = _make_kernels(width, cached)
            if _is_right(kernels, width):
                return kernels
        except Exception:  # noqa: BLE001 - whatever keeps numba from working, numpy does not need it
            continue
    return None


def _is_right(kernels: _Kernels, width: int) -> bool:
    count = 3 * _LANES * _BLOCK // 2 + _LANES - 1
    mixed = np.arange(2 * count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(31)
    words, base = (mixed[half::2].astype(WORD_TYPES[width]) for half in (0, 1))
    changes, ends = _differences(words, base, True)
    table = np.empty(256 * _LANES, np.uint32)
    room, back, flat = np.empty_like(words), np.empty_like(words), np.empty(width * count, np.uint8)
    kernels.count(base, table)
    kernels.scatter(words, base, table.copy(), room, flat)
    kernels.gather(tuple(flat.reshape(width, count)), base, table, room, back)
    expected = split_words(changes, False, memoryview(bytearray(width * count)))
    same = flat.tobytes() == b"".join(expected) and table[-256:].tolist() == ends
    return same and bool(np.array_equal(back, words))


def _make_kernels(width: int, cached: bool) -> _Kernels:
    """numba writes its cache beside this file or, where it may not, below the user's cache folder."""
    from numba import config, njit, types

    if config.DISABLE_JIT:
        raise RuntimeError("numba is told not to compile")
    kind: Any = WORD_TYPES[width]
    u8, u16, u32, u64 = np.uint8, np.uint16, np.uint32, np.uint64
    zero, one, eight, top, exponent = (kind(bits) for bits in (0, 1, 8, 8 * width - 1, 8 * width - 9))
    lanes, block = _LANES, _BLOCK  # what a kernel names is compiled into it, and known to the cache

    # Unsigned indices need no check for negative ones, and constants of the word's type keep the loops in vectors.
    def count(base: Any, table: Any) -> None:
        quarter = len(base) // lanes
        keys = np.empty(block, u8)
        pairs = keys.view(u16)
        seen = np.empty(1 << 16, u32)  # two keys at once: half as many counters to wait for
        table[:] = 0
        for lane in range(lanes):
            part = base[lane * quarter :] if lane == lanes - 1 else base[lane * quarter : (lane + 1) * quarter]
            counts = table[256 * lane : 256 * lane + 256]
            seen[:] = 0
            for at in range(0, len(part), block):
                size = min(block, len(part) - at)
                for i in range(u64(size)):
                    keys[i] = u8(part[u64(at) + i] >> exponent)
                for i in range(u64(size // 2)):
                    seen[pairs[i]] += u32(1)
                if size % 2:
                    counts[keys[size - 1]] += u32(1)
            for first in range(256):
                row = seen[256 * first : 256 * first + 256]
                total = u32(0)
                for second in range(u64(256)):
                    counts[second] += row[second]
                    total += row[second]
                counts[first] += total
        place = u32(0)
        for key in range(256):
            for lane in range(lanes):
                words = table[256 * lane + key]
                table[256 * lane + key] = place
                place += words

    def scatter(words: Any, base: Any, table: Any, room: Any, planes: Any) -> None:
        quarter = len(words) // lanes
        keys, changes = np.empty(lanes * block, u8), np.empty(lanes * block, kind)
        for at in range(0, quarter, block):
            size = min(block, quarter - at)
            for lane in range(lanes):
                start = lane * quarter + at
                new, old = words[start : start + size], base[start : start + size]
                lane_keys, lane_changes = keys[lane * block :], changes[lane * block :]
                for i in range(u64(size)):
                    change = kind(new[i] - old[i])
                    lane_changes[i] = kind(change << one) ^ kind(zero - kind(change >> top))
                    lane_keys[i] = u8(old[i] >> exponent)
            for i in range(u64(size)):
                for lane in range(lanes):
                    j = u64(lane * block) + i
                    key = u64(lane * 256) + u64(keys[j])
                    place = table[key]
                    table[key] = place + u32(1)
                    room[place] = changes[j]
        for i in range(u64(lanes * quarter), u64(len(words))):
            key = u64((lanes - 1) * 256) + u64(u8(base[i] >> exponent))
            place = table[key]
            table[key] = place + u32(1)
            change = kind(words[i] - base[i])
            room[place] = kind(change << one) ^ kind(zero - kind(change >> top))
        for number in range(width):
            shift = kind(8 * (width - 1 - number))
            plane = planes[number * len(words) : (number + 1) * len(words)]
            for i in range(u64(len(words))):
                plane[i] = u8(room[i] >> shift)

    def gather(planes: Any, base: Any, table: Any, room: Any, out: Any) -> None:
        for i in range(u64(len(out))):
            change = zero
            for number in range(width):
                change = kind(change << eight) | kind(planes[number][i])
            room[i] = change
        quarter = len(out) // lanes
        keys, changes = np.empty(lanes * block, u8), np.empty(lanes * block, kind)
        for at in range(0, quarter, block):
            size = min(block, quarter - at)
            for lane in range(lanes):
                old, lane_keys = base[lane * quarter + at : lane * quarter + at + size], keys[lane * block :]
                for i in range(u64(size)):
                    lane_keys[i] = u8(old[i] >> exponent)
            for i in range(u64(size)):
                for lane in range(lanes):
                    j = u64(lane * block) + i
                    key = u64(lane * 256) + u64(keys[j])
                    place = table[key]
                    table[key] = place + u32(1)
                    changes[j] = room[place]
            for lane in range(lanes):
                start = lane * quarter + at
                new, old = out[start : start + size], base[start : start + size]
                lane_changes = changes[lane * block :]
                for i in range(u64(size)):
                    change = lane_changes[i]
                    new[i] = kind(old[i] + kind(kind(change >> one) ^ kind(zero - kind(change & one))))
        for i in range(u64(lanes * quarter), u64(len(out))):
            key = u64((lanes - 1) * 256) + u64(u8(base[i] >> exponent))
            place = table[key]
            table[key] = place + u32(1)
            change = room[place]
            out[i] = kind(base[i] + kind(kind(change >> one) ^ kind(zero - kind(change & one))))

    def kernel(function: Callable[..., None], *arguments: Any) -> Any:
        return njit(types.void(*arguments), nogil=True, cache=cached, error_model="numpy")(function)

    def array(dtype: Any, written: bool) -> Any:
        return types.Array(dtype, 1, "C", readonly=not written, aligned=False)

    word = types.Integer.from_bitwidth(8 * width, signed=False)
    source, target, table_type = array(word, False), array(word, True), array(types.uint32, True)
    planes_type = types.UniTuple(array(types.uint8, False), width)
    return _Kernels(
        kernel(count, source, table_type),
        kernel(scatter, source, source, table_type, target, array(types.uint8, True)),
        kernel(gather, planes_type, source, table_type, target, target),
    )
