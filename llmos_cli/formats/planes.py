"""Words to byte planes and back, in numpy. Knows nothing of compression.

A plane holds one byte of every word, the most significant first. A rotated word is turned left by one before, which
brings the exponent of a float into a byte of its own and the sign to the end. Words are the
machine's own, which is little-endian wherever torch runs.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np

from llmos_cli.formats.ids import Buffer

_WORDS: Final[dict[int, type[np.unsignedinteger]]] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
WIDTHS: Final = tuple(_WORDS)


def split(plain: memoryview, width: int, rotated: bool) -> list[memoryview]:
    """The planes of a run of whole words; shift-and-narrow is twice as fast as a strided copy."""
    if width == 1:
        return [plain]
    words = np.frombuffer(plain, _WORDS[width])
    bits = 8 * width
    planes = []
    for plane in range(width):
        shift = bits - 8 * (plane + 1) - rotated
        if shift >= 0:
            plane_bytes = (words >> words.dtype.type(shift)).astype(np.uint8)
        else:  # the lowest plane of a rotated word: its last bit is the sign
            low, sign = words << words.dtype.type(1), words >> words.dtype.type(bits - 1)
            low |= sign
            plane_bytes = low.astype(np.uint8)
        planes.append(plane_bytes.data)
    return planes


def merge(planes: Sequence[Buffer], rotated: bool, out: memoryview) -> None:
    """The inverse of `split`, written into `out`; works in place, within the cache of one chunk."""
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
    words |= narrow[-1] >> 1
    sign = narrow[-1].astype(words.dtype)
    sign <<= kind(8 * width - 1)
    words |= sign
