"""Packs as the store writes them, checked as its fsck does: whatever was done to the bytes, it is found."""

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos_cli.errors import Damaged
from llmos_cli.formats import codec, pack
from llmos_cli.formats.codec import OPAQUE, Words
from llmos_cli.formats.frame import (
    CHUNK,
    HEADER_BYTES,
    MANIFEST,
    check_id,
    check_payload,
    decode_header,
    decode_payload,
    encode_header,
    new_frame,
    plain_limit,
)
from llmos_cli.formats.ids import checksum, object_id

HINTS = st.sampled_from([OPAQUE, Words(1), Words(2), Words(2, True), Words(4, True), Words(8, True)])
OBJECTS = st.lists(
    st.tuples(
        st.sampled_from([CHUNK, CHUNK, MANIFEST]),
        st.one_of(st.binary(max_size=200), st.builds(bytes.__mul__, st.binary(min_size=1, max_size=9), st.just(70))),
        HINTS,
    ),
    max_size=5,
)


def build(objects: Sequence[tuple[int, bytes, Words]]) -> bytes:
    body, entries = pack.pack_header(), []
    for kind, plain, words in objects:
        encoded = codec.encode(memoryview(plain), words)
        frame = new_frame(kind, object_id(plain), len(plain), encoded)
        entries.append(pack.entry_of(frame, len(body)))
        body += b"".join([encode_header(frame), *map(bytes, encoded.parts)])
        body += pack.padding(len(body))
    return body + pack.pack_end(entries, len(body))


def check(data: bytes) -> list[bytes]:
    """The plain bytes of every object, after every check there is but the pack's own name."""
    plains = []
    entries = pack.read_index(lambda start, end: data[start:end], len(data))
    for entry in entries:
        frame = pack.check_entry(entry, data[entry.offset : entry.offset + HEADER_BYTES])
        payload = memoryview(data)[entry.offset + HEADER_BYTES : entry.end]
        check_payload(frame, payload)
        plain = bytearray(frame.plain_size)
        decode_payload(frame, payload, memoryview(plain))
        check_id(frame, plain)
        pack.check_padding(entry, data[entry.end : pack.aligned(entry.end)])
        plains.append(bytes(plain))
    return plains


@given(OBJECTS)
def test_a_pack_gives_back_what_was_put_in(objects: list[tuple[int, bytes, Words]]) -> None:
    data = build(objects)
    assert check(data) == [plain for _, plain, _ in objects]
    entries = pack.read_index(lambda start, end: data[start:end], len(data))
    assert [entry.kind for entry in entries] == [kind for kind, _, _ in objects]
    fixed = pack.HEADER_SIZE + pack.TRAILER_SIZE
    assert fixed + sum(entry.stored_size for entry in entries) == len(data)


@given(OBJECTS)
def test_an_index_can_be_rebuilt_from_the_frames_alone(objects: list[tuple[int, bytes, Words]]) -> None:
    data = build(objects)
    entries, at = [], pack.HEADER_SIZE
    while data[at : at + 4] == b"LLMF":
        entries.append(pack.entry_of(decode_header(data[at : at + HEADER_BYTES]), at))
        at = pack.aligned(entries[-1].end)
    assert data[at:] == pack.pack_end(entries, at)


SMALL = build(
    [
        (CHUNK, b"raw", OPAQUE),
        (CHUNK, b"tokens, tokens, " * 20, OPAQUE),
        (CHUNK, b"\x11\x22\x33\x3c" * 40 + b"!", Words(4, True)),
        (MANIFEST, b'{"files":[]}', OPAQUE),
    ]
)


def test_every_flipped_bit_of_a_pack_is_damage() -> None:
    names = {entry.codec for entry in pack.read_index(lambda start, end: SMALL[start:end], len(SMALL))}
    assert names == {codec.RAW, codec.ZSTD, codec.PLANES}
    data = bytearray(SMALL)
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Damaged):
            check(bytes(data))
        data[bit // 8] ^= 1 << bit % 8
    assert data == SMALL


def test_every_truncation_of_a_pack_is_damage() -> None:
    for size in range(len(SMALL)):
        with pytest.raises(Damaged):
            check(SMALL[:size])
        blank = SMALL[:size] + bytes(len(SMALL) - size)  # what a crash may leave of a file of the right length
        if blank != SMALL:
            with pytest.raises(Damaged):
                check(blank)
    with pytest.raises(Damaged):
        check(SMALL + b"\0")


def forgeries(data: bytes) -> Iterator[bytes]:
    """The data with every byte in turn set to each value that a field may be confused by."""
    for at, old in enumerate(data):
        for value in {0, 1, 2, 3, 4, 8, 9, 127, 255, old ^ 1, old ^ 128} - {old}:
            yield data[:at] + bytes([value]) + data[at + 1 :]


def test_a_forged_header_is_refused_or_means_just_what_it_says() -> None:
    """Somebody hostile can make the checksum fit; what is believed must still be within the declared limits."""
    accepted = 0
    for entry in pack.read_index(lambda start, end: SMALL[start:end], len(SMALL)):
        for head in forgeries(SMALL[entry.offset : entry.offset + HEADER_BYTES - 8]):
            data = head + checksum(head).to_bytes(8, "little")
            try:
                frame = decode_header(data)
            except Damaged:
                continue
            accepted += 1
            assert encode_header(frame) == data
            assert frame.plain_size <= plain_limit(frame.kind)
            with pytest.raises(Damaged):
                check(SMALL[: entry.offset] + data + SMALL[entry.offset + HEADER_BYTES :])
    assert accepted > 100


def test_a_forged_index_is_refused_or_means_just_what_it_says() -> None:
    entries = pack.read_index(lambda start, end: SMALL[start:end], len(SMALL))
    start = len(SMALL) - pack.TRAILER_SIZE - len(entries) * pack.ENTRY_SIZE
    index, trailer = SMALL[start : -pack.TRAILER_SIZE], SMALL[-pack.TRAILER_SIZE : -16]
    accepted = 0
    for forged_index, head in (
        *(
            (forged, trailer[:16] + checksum(forged).to_bytes(8, "little") + trailer[24:])
            for forged in forgeries(index)
        ),
        *((index, forged) for forged in forgeries(trailer)),
    ):
        data = SMALL[:start] + forged_index + head + checksum(head).to_bytes(8, "little") + SMALL[-8:]
        try:
            found = pack.read_index(lambda start, end, data=data: data[start:end], len(data))
        except Damaged:
            continue
        accepted += 1
        assert data[start:] == pack.pack_end(found, start)
        with pytest.raises(Damaged):
            check(data)
    assert accepted > 100
