"""Distances against plain numpy on whole arrays."""

from typing import Any

import numpy as np
import pytest

from llmos_cli.store.inspect.distance import Tally, comparable, distance, has_values, tally, word_bytes

CODES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I8": "<i1", "U8": "<u1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}
SIZE = 70_001  # more than a block, and no multiple of anything


def view(array: Any) -> memoryview:
    return memoryview(array.tobytes())


def bf16(values: Any) -> Any:
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype("<u2")


def from_bf16(words: Any) -> Any:
    return (words.astype(np.uint32) << 16).view(np.float32)


def bits_of(old: bytes, new: bytes) -> int:
    return (int.from_bytes(old, "little") ^ int.from_bytes(new, "little")).bit_count()


def check(found: Any, old: Any, new: Any) -> None:
    a, b = old.astype(np.float64), new.astype(np.float64)
    assert found.largest == np.abs(b - a).max()
    assert found.mean == pytest.approx(np.abs(b - a).mean(), rel=1e-9)
    assert found.relative == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a), rel=1e-9)
    assert found.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-9)


@pytest.mark.parametrize("dtype", CODES)
def test_values_bits_and_words_of_every_plain_dtype(dtype: str) -> None:
    rng = np.random.default_rng(3)
    old = (rng.standard_normal(SIZE) * 20).astype(CODES[dtype])
    new = old.copy()
    new[::3] += np.array(2, CODES[dtype])
    found = distance(tally(view(old), view(new), (dtype, dtype)))
    assert (found.compared, found.changed) == (SIZE, np.count_nonzero(old != new))
    assert found.bits == bits_of(old.tobytes(), new.tobytes()) / SIZE
    check(found, old, new)


def test_bfloat16() -> None:
    rng = np.random.default_rng(4)
    old, new = bf16(rng.standard_normal(SIZE)), bf16(rng.standard_normal(SIZE))
    found = distance(tally(view(old), view(new), ("BF16", "BF16")))
    assert found.changed == np.count_nonzero(old != new)
    check(found, from_bf16(old), from_bf16(new))


def test_two_float_dtypes_have_values_but_no_bits() -> None:
    new = np.random.default_rng(5).standard_normal(SIZE).astype(np.float32)
    old = bf16(new)
    found = distance(tally(view(old), view(new), ("BF16", "F32")), bits=False)
    assert found.bits is None
    assert found.changed == np.count_nonzero(from_bf16(old) != new)
    check(found, from_bf16(old), new)


@pytest.mark.parametrize(("dtype", "width"), [("F8_E4M3", 1), ("F4", 1), ("Q4_K", 1), ("C64", 8)])
def test_other_dtypes_have_bits_only(dtype: str, width: int) -> None:
    rng = np.random.default_rng(6)
    old = rng.integers(0, 256, SIZE * 8, np.uint8)
    new = old.copy()
    new[40] ^= 7
    assert (word_bytes(dtype), has_values(dtype)) == (width, False)
    found = distance(tally(view(old), view(new), (dtype, dtype)), values=False)
    assert (found.compared, found.changed) == (SIZE * 8 // width, 1)
    assert found.bits == 3 / (SIZE * 8 // width)
    assert (found.largest, found.mean, found.relative, found.cosine) == (None, None, None, None)


def test_parts_add_up_to_the_whole() -> None:
    rng = np.random.default_rng(7)
    old = rng.standard_normal(1000).astype(np.float32)
    new = old + np.float32(0.01)
    pair = ("F32", "F32")
    whole = tally(view(old), view(new), pair)
    parts = tally(view(old[:100]), view(new[:100]), pair) + tally(view(old[100:]), view(new[100:]), pair)
    assert (parts.words, parts.changed, parts.bits, parts.largest) == (1000, whole.changed, whole.bits, whole.largest)
    assert parts.square_change == pytest.approx(whole.square_change)
    assert parts + Tally() == parts


def test_a_part_known_to_be_equal_counts_like_one_that_is_compared() -> None:
    old = np.arange(10, dtype=np.float32)
    assert tally(view(old), None, ("F32", "F32")) == tally(view(old), view(old), ("F32", "F32"))


def test_what_is_not_finite_is_counted_and_left_out() -> None:
    old = np.array([1, 2, np.nan, np.inf, 5], np.float32)
    new = np.array([1, np.inf, np.nan, 4, 7], np.float32)
    found = distance(tally(view(old), view(new), ("F32", "F32")))
    assert found.infinite == (2, 2)
    assert found.changed == 3  # the same NaN is the same word
    assert found.largest == 2.0
    assert found.relative == pytest.approx(2 / np.sqrt(26))


def test_zeros_have_no_direction_and_nothing_to_compare_with() -> None:
    zeros, ones = np.zeros(4, np.float32), np.ones(4, np.float32)
    grown = distance(tally(view(zeros), view(ones), ("F32", "F32")))
    assert (grown.relative, grown.cosine, grown.largest) == (None, None, 1.0)
    signs = distance(tally(view(zeros), view(-zeros), ("F32", "F32")))
    assert (signs.changed, signs.largest) == (4, 0.0)
    nothing = distance(tally(memoryview(b""), memoryview(b""), ("F32", "F32")))
    assert (nothing.compared, nothing.mean) == (0, 0.0)


def test_which_dtypes_can_be_compared() -> None:
    assert comparable("F8_E4M3", "F8_E4M3")
    assert comparable("BF16", "F32")
    assert not comparable("I8", "F32")
    assert not comparable("I8", "U8")
