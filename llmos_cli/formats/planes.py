"""Words to byte planes and back, in numpy. Knows nothing of compression.

A plane holds one byte of every word, the most significant first. A rotated word is turned left by one before, which
brings the exponent of a float into a byte of its own and the sign to the end. Words are the
machine's own, which is little-endian wherever torch runs.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from llmos_cli.formats.ids import Buffer
from llmos_cli.formats.kernels import scratch_bytes

WORD_TYPES: Final[dict[int, type[np.unsignedinteger]]] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

Array = npt.NDArray[np.unsignedinteger]


def split(plain: memoryview, width: int, rotated: bool, room: memoryview) -> list[memoryview]:
    """The planes of a run of whole words, as views of `room`, which is as long; a single plane is `plain` itself."""
    return [plain] if width == 1 else split_words(np.frombuffer(plain, WORD_TYPES[width]), rotated, room)


def split_words(words: Array, rotated: bool, room: memoryview) -> list[memoryview]:
    """The planes of words, as views of `room`.

    Shift-and-narrow is twice as fast as a strided copy, and memory that is used again twice as fast as fresh memory.
    """
    width, count, kind = words.itemsize, len(words), words.dtype.type
    planes = [room[plane * count : (plane + 1) * count] for plane in range(width)]
    left = scratch("left", words.dtype, count)
    if rotated:
        sign = scratch("sign", words.dtype, count)
        np.left_shift(words, kind(1), out=left)
        np.right_shift(words, kind(8 * width - 1), out=sign)
        np.bitwise_or(left, sign, out=left)
        words = left
    for number, plane in enumerate(reversed(planes)):
        if number:
            words = np.right_shift(words, kind(8), out=left)
        np.copyto(np.frombuffer(plane, np.uint8), words, casting="unsafe")
    return planes


def merge(planes: Sequence[Buffer], rotated: bool, out: memoryview) -> None:
    """The inverse of `split`, written into `out`."""
    width = len(planes)
    words = np.frombuffer(out, WORD_TYPES[width])
    kind = words.dtype.type
    for number, plane in enumerate(planes):
        narrow = np.frombuffer(plane, np.uint8)
        if number:
            words <<= kind(8)
            words |= narrow
        else:
            np.copyto(words, narrow)
    if rotated:
        sign = scratch("sign", words.dtype, len(words))
        np.left_shift(words, kind(8 * width - 1), out=sign)
        words >>= kind(1)
        words |= sign


def step(before: Buffer, plane: Buffer) -> memoryview:
    """A plane XOR the one before it: from plane to step and back."""
    return np.bitwise_xor(np.frombuffer(before, np.uint8), np.frombuffer(plane, np.uint8)).data


def scratch(name: str, dtype: np.dtype[Any], count: int) -> Array:
    """Words of scratch memory."""
    return np.frombuffer(scratch_bytes(name, count * dtype.itemsize), dtype, count)
