"""Every chunk survives every base, in numpy and compiled, and no tampered delta passes for another."""

import contextlib
import functools
import random
import struct
from collections.abc import Iterator

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from llmos_cli.errors import Damaged
from llmos_cli.formats import codec, kernels, native
from llmos_cli.formats.codec import DELTA, Words
from llmos_cli.formats.frame import CHUNK, Frame, check_id, check_payload, decode_payload, new_frame
from llmos_cli.formats.ids import object_id

HINTS = [Words(width, is_float) for width in (1, 2, 4, 8) for is_float in (False, True)]
GROUPED = (2, 4, 8)
LANES = kernels.LANES * kernels.BLOCK
compile_once = functools.cache(native.find_kernels)


@contextlib.contextmanager
def grouping(compiled: bool) -> Iterator[None]:
    """Chunks of any size are grouped by compiled kernels, or none."""
    wanted = {width: compile_once(width) if compiled else None for width in GROUPED}
    assert not compiled or all(wanted.values()), "kernels can be compiled wherever the tests run"
    before, native._ready = native._ready, native._Ready()
    native._ready._kernels, native._ready._final = dict(wanted), set(wanted)
    try:
        yield
    finally:
        native._ready = before


def related(seed: int, size: int, base_size: int, changes: int) -> tuple[bytes, bytes]:
    """A chunk and its base: the same bytes where both have some, but for changes of a byte or of a bit."""
    dice = random.Random(seed)
    base = dice.randbytes(max(size, base_size))
    plain = bytearray(base[:size])
    for _ in range(min(changes, size)):
        plain[dice.randrange(size)] ^= dice.choice([1, 2, 0x80, 0xFF])
    return bytes(plain), base[:base_size]


SIZES = st.integers(0, 100) | st.integers(0, 50_000)
PAIRS = st.one_of(
    st.tuples(st.binary(max_size=200), st.binary(max_size=200)),
    st.builds(related, st.integers(0, 2**32), SIZES, SIZES, st.sampled_from([0, 1, 50, 5000])),
    st.builds(lambda byte, size, base: (bytes([byte]) * size, base), st.integers(0, 255), SIZES, st.binary(max_size=9)),
)


def encoded(plain: bytes, base: bytes, words: Words) -> tuple[codec.Encoded, bytes]:
    one = codec.encode_delta(memoryview(plain), base, words)
    payload = b"".join(map(bytes, one.parts))
    assert one.size == len(payload)
    return one, payload


def decoded(one: codec.Encoded, payload: bytes, base: bytes, size: int) -> bytes:
    out = bytearray(b"\xaa" * size)
    codec.decode(DELTA, one.width, one.rotated, memoryview(payload), memoryview(out), memoryview(base))
    return bytes(out)


@given(PAIRS, st.sampled_from(HINTS), st.booleans())
def test_every_chunk_round_trips_on_every_base(pair: tuple[bytes, bytes], words: Words, compiled: bool) -> None:
    plain, base = pair
    with grouping(compiled):
        one, payload = encoded(plain, base, words)
        assert (one.codec, one.width, one.rotated) == (DELTA, words.width, words.is_float and words.width > 1)
        assert len(payload) <= len(plain) + 8 * words.width
        assert decoded(one, payload, base, len(plain)) == plain


def by_the_page(plain: bytes, base: bytes, width: int, grouped: bool) -> list[bytes]:
    """The planes as README.md tells them, one word after the other."""
    bits, count = 8 * width, len(plain) // width

    def word(data: bytes, index: int) -> int:
        whole = data[index * width : (index + 1) * width]
        return int.from_bytes(whole, "little") if len(whole) == width else 0

    found = []
    for index in range(count):
        old = word(base, index)
        change = (word(plain, index) - old) % (1 << bits)
        signed = change - (1 << bits) if change >> (bits - 1) else change
        found.append(((old >> (bits - 9)) & 0xFF if grouped else 0, (signed << 1 ^ signed >> (bits - 1)) % (1 << bits)))
    found.sort(key=lambda pair: pair[0])
    return [bytes(z >> 8 * (width - 1 - plane) & 0xFF for _, z in found) for plane in range(width)]


@given(PAIRS, st.sampled_from(HINTS), st.booleans())
def test_the_planes_are_those_of_the_contract(pair: tuple[bytes, bytes], words: Words, compiled: bool) -> None:
    plain, base = pair[0][:3000], pair[1]
    whole = len(plain) // words.width * words.width
    grouped = words.is_float and words.width > 1
    with grouping(compiled):
        views, ends = native.subtract(
            memoryview(plain)[:whole], base, words.width, grouped, memoryview(bytearray(len(plain)))
        )
    assert [bytes(view) for view in views] == by_the_page(plain, base, words.width, grouped)
    assert not ends or (len(ends) == 256 and ends == sorted(ends) and ends[-1] == whole // words.width)


@pytest.mark.parametrize("width", GROUPED)
@given(
    seed=st.integers(0, 2**32),
    count=st.integers(0, 9) | st.sampled_from([LANES - 1, LANES, LANES + 1, 2 * LANES + 3]) | st.integers(0, 3 * LANES),
    spread=st.sampled_from([1, 40, 256]),
)
def test_kernels_group_as_numpy_does(width: int, seed: int, count: int, spread: int) -> None:
    dice = random.Random(seed)
    plain, base = (bytes(x % spread for x in dice.randbytes(width * count)) for _ in range(2))
    found, back = [], []
    for compiled in (False, True):
        room, out = memoryview(bytearray(width * count)), bytearray(width * count)
        with grouping(compiled):
            views, ends = native.subtract(memoryview(plain), base, width, True, room)
            native.add(views, base, True, memoryview(out))
            grouped = [bytes(view) for view in views]
            planes = native.split(memoryview(plain), width, True, room)
            again = bytearray(len(plain))
            native.merge(planes, True, memoryview(again))
        found.append((grouped, ends, [bytes(view) for view in planes]))
        back += [bytes(out), bytes(again)]
    assert found[0] == found[1]
    assert back == [plain] * 4


def frame_of(words: Words) -> tuple[Frame, bytes, bytes, bytes]:
    plain, base = related(7, 1203, 1100, 90)
    one, payload = encoded(plain, base, words)
    return new_frame(CHUNK, object_id(plain), len(plain), one, object_id(base), 1), payload, plain, base


@pytest.mark.parametrize("words", HINTS, ids=str)
def test_every_truncation_and_flipped_bit_of_a_payload_is_damaged(words: Words) -> None:
    frame, payload, plain, base = frame_of(words)
    out = bytearray(len(plain))
    decode_payload(frame, memoryview(payload), memoryview(out), memoryview(base))
    assert out == plain
    for size in range(len(payload)):
        with pytest.raises(Damaged, match=frame.id.short):
            check_payload(frame, payload[:size])
        with pytest.raises(Damaged):
            codec.decode(DELTA, frame.width, frame.rotated, memoryview(payload[:size]), memoryview(out), base)
    flipped = bytearray(payload)
    for bit in range(8 * len(payload)):
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Damaged, match=frame.id.short):
            check_payload(frame, flipped)
        try:  # as if somebody had sealed it again: the id is what remains
            codec.decode(DELTA, frame.width, frame.rotated, memoryview(flipped), memoryview(out), base)
        except Damaged:
            pass
        else:
            with contextlib.nullcontext() if out == plain else pytest.raises(Damaged, match="its id names"):
                check_id(frame, out)
        flipped[bit // 8] ^= 1 << bit % 8


def test_another_base_never_passes_for_the_right_one() -> None:
    for words in HINTS:
        frame, payload, plain, base = frame_of(words)
        for wrong in (b"", base[:-8], base + bytes(7) + b"\1", base[1:], bytes(len(base))):
            out = bytearray(len(plain))
            decode_payload(frame, memoryview(payload), memoryview(out), memoryview(wrong))
            with pytest.raises(Damaged, match="its id names"):
                check_id(frame, out)


@st.composite
def forged(draw: st.DrawFn) -> tuple[int, bytes, int]:
    """A delta's payload as somebody hostile would make it: planes of whatever size, said to be of another."""
    width, count = draw(st.sampled_from([1, 2, 4, 8])), draw(st.integers(0, 40))
    table, planes = b"", []
    for _ in range(width):
        plane = draw(st.binary(min_size=count, max_size=count) | st.binary(max_size=50))
        method = draw(st.sampled_from([0, 1, 1, 2]))
        plane = zstandard.compress(plane) if method == 1 else plane
        table += struct.pack("<B3xI", method, draw(st.sampled_from([len(plane)] * 9 + [2**32 - 1])))
        planes.append(plane)
    return width, table + b"".join(planes) + draw(st.binary(max_size=8)), count * width + draw(st.integers(0, width))


@given(forged(), st.binary(max_size=200), st.booleans(), st.booleans())
def test_forged_payloads_are_damaged_or_fill_exactly(
    made: tuple[int, bytes, int], base: bytes, rotated: bool, compiled: bool
) -> None:
    width, payload, size = made
    guard = bytearray(b"\xaa" * (size + 128))
    with grouping(compiled), contextlib.suppress(Damaged):
        codec.decode(DELTA, width, rotated, memoryview(payload), memoryview(guard)[64 : 64 + size], memoryview(base))
    assert guard[:64] == guard[64 + size :] == b"\xaa" * 64


@given(st.integers(0, 9), st.booleans(), st.binary(max_size=200), st.integers(0, 99), st.binary(max_size=99))
def test_noise_is_damaged_or_fills_exactly(width: int, rotated: bool, payload: bytes, size: int, base: bytes) -> None:
    out = bytearray(size)
    with contextlib.suppress(Damaged):
        codec.decode(DELTA, width, rotated, memoryview(payload), memoryview(out), memoryview(base))
    assert len(out) == size
