"""Words as differences to the words of a base, in byte planes, and back. Knows nothing of compression.

A difference is taken as an integer modulo 2^n and zigzagged, so that a small change of either sign is a small number.
Floats are grouped by the exponent of their base word (a stable partition, undone from the base alone): a step of one
size is many units in the last place of a small float and few of a large one, so every group has a narrow code.

This is numpy: what is meant, and what is done where there is no compiled code (native.py).
"""

from collections.abc import Sequence

import numpy as np

from llmos_cli.formats.ids import Buffer
from llmos_cli.formats.planes import WORD_TYPES, Array, merge, scratch, split_words


def subtract(
    plain: memoryview, base: Buffer, width: int, grouped: bool, room: memoryview
) -> tuple[list[memoryview], list[int]]:
    """The planes of the differences of a run of whole words to as many base words, as views of `room`, and the index
    after each group's last word (none if not grouped)."""
    words, against = (np.frombuffer(data, WORD_TYPES[width]) for data in (plain, base))
    changes, ends = _differences(words, against, grouped)
    return split_words(changes, False, room), ends


def add(planes: Sequence[Buffer], base: Buffer, grouped: bool, out: memoryview) -> None:
    """The inverse of `subtract`, written into `out`, which must not overlap the base."""
    merge(planes, False, out)
    words, against = (np.frombuffer(data, WORD_TYPES[len(planes)]) for data in (out, base))
    _restore(words, against, grouped)


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
