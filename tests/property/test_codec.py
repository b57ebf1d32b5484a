"""Every byte string survives every codec, and a payload that is not one is refused, whatever its bytes are."""

import random
import struct

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from llmos_cli.errors import Damaged
from llmos_cli.formats import codec
from llmos_cli.formats.codec import OPAQUE, PLANES, RAW, ZSTD, Words

HINTS = [OPAQUE, *(Words(width, is_float) for width in (1, 2, 4, 8) for is_float in (False, True))]
SIZES = st.integers(0, 300) | st.integers(0, 140_000)  # the probes change at 64 B, 16, 32 and 64 KiB


def _floats(seed: int, size: int, kind: str, tail: bytes) -> bytes:
    values = np.random.default_rng(seed).standard_normal(size // 8) * 0.02
    data = values.astype("<f4" if kind == "bf16" else kind).tobytes()
    return (np.frombuffer(data, "<u2")[1::2].tobytes() if kind == "bf16" else data) + tail


PLAIN = st.one_of(
    st.binary(max_size=300),
    st.builds(lambda pattern, size: (pattern * (size // len(pattern) + 1))[:size], st.binary(min_size=1), SIZES),
    st.builds(lambda seed, size: random.Random(seed).randbytes(size), st.integers(), SIZES),
    st.builds(
        _floats, st.integers(0, 2**32), SIZES, st.sampled_from(["bf16", "<f2", "<f4", "<f8"]), st.binary(max_size=7)
    ),
)


def decode(codec_id: int, width: int, rotated: bool, payload: bytes, size: int) -> bytes:
    out = bytearray(size)
    codec.decode(codec_id, width, rotated, memoryview(payload), memoryview(out))
    return bytes(out)


@given(PLAIN, st.sampled_from(HINTS))
def test_every_byte_string_round_trips_and_never_grows(plain: bytes, words: Words) -> None:
    encoded = codec.encode(memoryview(plain), words)
    payload = b"".join(bytes(part) for part in encoded.parts)
    assert encoded.size == len(payload) <= len(plain)
    assert decode(encoded.codec, encoded.width, encoded.rotated, payload, len(plain)) == plain


@given(PLAIN, st.sampled_from(HINTS[1:]))
def test_planes_round_trip_even_where_they_do_not_pay(plain: bytes, words: Words) -> None:
    encoded = codec._planes(memoryview(plain), words)
    payload = b"".join(bytes(part) for part in encoded.parts)
    assert len(payload) <= len(plain) + 8 * words.width
    assert decode(PLANES, encoded.width, encoded.rotated, payload, len(plain)) == plain


@pytest.mark.parametrize("words", HINTS, ids=str)
def test_sizes_at_every_edge(words: Words) -> None:
    for size in (*range(70), 64 << 10, (64 << 10) + 1, (4 << 20) - 3, 4 << 20):
        plain = (b"\x00\x3c\x01\xbc\xfe\x3b" * (size // 6 + 1))[:size]
        encoded = codec.encode(memoryview(plain), words)
        payload = b"".join(bytes(part) for part in encoded.parts)
        assert len(payload) <= size
        assert decode(encoded.codec, encoded.width, encoded.rotated, payload, size) == plain


@given(PLAIN.filter(len), st.sampled_from(HINTS), st.data())
def test_a_payload_cut_short_or_too_long_is_damaged(plain: bytes, words: Words, data: st.DataObject) -> None:
    encoded = codec.encode(memoryview(plain), words) if words.width == 0 else codec._planes(memoryview(plain), words)
    payload = b"".join(bytes(part) for part in encoded.parts)
    cut = data.draw(st.integers(0, len(payload) - 1))
    for wrong in (payload[:cut], payload + b"\0"):
        with pytest.raises(Damaged):
            decode(encoded.codec, encoded.width, encoded.rotated, wrong, len(plain))
    for wrong_size in {len(plain) - 1, len(plain) + 1, 2 * len(plain)}:
        with pytest.raises(Damaged):
            decode(encoded.codec, encoded.width, encoded.rotated, payload, wrong_size)


@st.composite
def forged_planes(draw: st.DrawFn) -> tuple[int, bytes, int]:
    """A planes payload as somebody hostile would make it: every part plausible, none of them promised to fit."""
    width, count = draw(st.sampled_from([1, 2, 4, 8])), draw(st.integers(0, 40))
    table, planes = b"", []
    for _ in range(width):
        plane = draw(st.binary(min_size=count, max_size=count) | st.binary(max_size=50))
        method = draw(st.sampled_from([0, 0, 1, 1, 2, 2, 3, 255]))
        plane = zstandard.compress(plane) if method in (1, 2) else plane
        table += struct.pack("<BBBBI", method, 0, 0, draw(st.sampled_from([0, 0, 0, 1])), len(plane))
        planes.append(plane)
    lie = draw(st.sampled_from([b"", b"\xff" * 8, struct.pack("<B3xI", 1, 2**32 - 1)]))
    payload = (lie + table[len(lie) :]) + b"".join(planes) + draw(st.binary(max_size=9))
    return width, payload, count * width + draw(st.integers(0, width))


@given(forged_planes(), st.booleans())
def test_forged_planes_are_damaged_or_fill_exactly(forged: tuple[int, bytes, int], rotated: bool) -> None:
    width, payload, size = forged
    try:
        plain = decode(PLANES, width, rotated, payload, size)
    except Damaged:
        return
    assert len(plain) == size


@given(
    st.sampled_from([RAW, ZSTD, PLANES]), st.integers(0, 9), st.booleans(), st.binary(max_size=200), st.integers(0, 99)
)
def test_noise_is_damaged_or_fills_exactly(codec_id: int, width: int, rotated: bool, payload: bytes, size: int) -> None:
    try:
        plain = decode(codec_id, width, rotated, payload, size)
    except Damaged:
        return
    assert len(plain) == size
