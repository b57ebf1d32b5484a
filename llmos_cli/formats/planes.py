"""Words to byte planes and back, in numpy. Knows nothing of compression.

A plane holds one byte of every word, the most significant first. A rotated word is turned left by one before, which
brings the exponent of a float into a byte of its own and the sign to the end. Words are the
machine's own, which is little-endian wherever torch runs.
"""

import threading
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from llmos_cli.formats.ids import Buffer

_WORDS: Final[dict[int, type[np.unsignedinteger]]] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
WIDTHS: Final = tuple(_WORDS)


_scratch = threading.local()


def split(plain: memoryview, width: int, rotated: bool, room: memoryview) -> list[memoryview]:
    """The planes of a run of whole words, as views of `room`, which is as long as `plain`.

    Shift-and-narrow is twice as fast as a strided copy, and memory that is used again twice as fast as fresh memory.
    """
    if width == 1:
        return [plain]
    words = np.frombuffer(plain, _WORDS[width])
    count, bits, kind = len(words), 8 * width, words.dtype.type
    shifted = _temporary("shifted", words.dtype, count)
    planes = []
    for plane in range(width):
        view = room[plane * count : (plane + 1) * count]
        shift = bits - 8 * (plane + 1) - rotated
        if shift >= 0:
            np.right_shift(words, kind(shift), out=shifted)
        else:  # the lowest plane of a rotated word: its last bit is the sign
            sign = _temporary("sign", words.dtype, count)
            np.left_shift(words, kind(1), out=shifted)
            np.right_shift(words, kind(bits - 1), out=sign)
            np.bitwise_or(shifted, sign, out=shifted)
        np.copyto(np.frombuffer(view, np.uint8), shifted, casting="unsafe")
        planes.append(view)
    return planes


def merge(planes: Sequence[Buffer], rotated: bool, out: memoryview) -> None:
    """The inverse of `split`, written into `out`."""
    width = len(planes)
    words = np.frombuffer(out, _WORDS[width])
    narrow = [np.frombuffer(plane, np.uint8) for plane in planes]
    if width == 1:
        words[:] = narrow[0]
        return
    kind = words.dtype.type
    np.copyto(words, narrow[0])
    for plane in narrow[1:-1]:
        words <<= kind(8)
        words |= plane
    if not rotated:
        words <<= kind(8)
        words |= narrow[-1]
        return
    words <<= kind(7)
    mantissa = _temporary("mantissa", narrow[-1].dtype, len(words))
    np.right_shift(narrow[-1], np.uint8(1), out=mantissa)
    words |= mantissa
    sign = _temporary("sign", words.dtype, len(words))
    np.copyto(sign, narrow[-1])
    sign <<= kind(8 * width - 1)
    words |= sign


def _temporary(name: str, dtype: np.dtype[np.unsignedinteger], count: int) -> npt.NDArray[np.unsignedinteger]:
    """Memory of this thread, kept from call to call: fresh pages cost as much as the shifts."""
    kept: bytearray | None = getattr(_scratch, name, None)
    size = count * dtype.itemsize
    if kept is None or len(kept) < size:
        kept = bytearray(size)
        setattr(_scratch, name, kept)
    return np.frombuffer(kept, dtype, count)
