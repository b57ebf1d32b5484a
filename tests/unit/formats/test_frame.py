"""Frame headers: every bit counts, and nothing outside the limits is believed."""

import dataclasses
import struct

import pytest

from llmos_cli.errors import Damaged, UnknownVersion
from llmos_cli.formats import codec, limits
from llmos_cli.formats.codec import OPAQUE
from llmos_cli.formats.frame import (
    CHUNK,
    HEADER_BYTES,
    MANIFEST,
    Frame,
    check_id,
    check_payload,
    decode_header,
    decode_payload,
    encode_header,
    new_frame,
)
from llmos_cli.formats.ids import NO_ID, checksum, object_id

PLAIN = b"a chunk of some words and some more words " * 9
ENCODED = codec.encode(memoryview(PLAIN), OPAQUE)
FRAME = new_frame(CHUNK, object_id(PLAIN), len(PLAIN), ENCODED)
PAYLOAD = b"".join(map(bytes, ENCODED.parts))


def sealed(header: bytes) -> bytes:
    """The header with a checksum that fits, as somebody hostile would write it."""
    return header[:-8] + checksum(header[:-8]).to_bytes(8, "little")


def decoded(frame: Frame, payload: bytes) -> bytes:
    out = bytearray(frame.plain_size)
    decode_payload(frame, memoryview(payload), memoryview(out))
    return bytes(out)


def test_a_frame_gives_back_its_object() -> None:
    frame = decode_header(encode_header(FRAME) + b"whatever follows")
    assert frame == FRAME
    assert decoded(frame, PAYLOAD) == PLAIN
    check_id(frame, PLAIN)


def test_every_truncation_and_every_flipped_bit_of_a_header_is_damaged() -> None:
    header = bytearray(encode_header(FRAME))
    assert len(header) == HEADER_BYTES == 128
    for size in range(HEADER_BYTES):
        with pytest.raises(Damaged):
            decode_header(bytes(header[:size]))
    for bit in range(8 * HEADER_BYTES):
        header[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Damaged):
            decode_header(bytes(header))
        header[bit // 8] ^= 1 << bit % 8


def test_every_truncation_and_every_flipped_bit_of_a_payload_is_damaged() -> None:
    payload = bytearray(PAYLOAD)
    for size in range(len(PAYLOAD)):
        with pytest.raises(Damaged, match=FRAME.id.short):
            check_payload(FRAME, PAYLOAD[:size])
    for bit in range(8 * len(PAYLOAD)):
        payload[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Damaged, match=FRAME.id.short):
            decoded(FRAME, bytes(payload))
        payload[bit // 8] ^= 1 << bit % 8


def test_another_valid_object_in_its_place_is_damaged() -> None:
    other = b"another object"
    encoded = codec.encode(memoryview(other), OPAQUE)
    forged = new_frame(CHUNK, FRAME.id, len(other), encoded)
    assert decoded(forged, other) == other
    with pytest.raises(Damaged, match="does not have the bytes its id names"):
        check_id(forged, other)


@pytest.mark.parametrize(("offset", "value"), [(4, 2), (4, 0), (5, 0), (5, 3), (6, 5), (6, 255), (10, 2)])
def test_an_unknown_version_kind_codec_or_hash_is_refused(offset: int, value: int) -> None:
    header = bytearray(encode_header(FRAME))
    header[offset] = value
    with pytest.raises(UnknownVersion):
        decode_header(sealed(bytes(header)))


@pytest.mark.parametrize(
    ("offset", "value"),
    [(11, b"\1"), (20, b"\1"), (100, b"\1"), (119, b"\1"),  # reserved
     (8, b"\1"), (8, b"\2"), (7, b"\2"),  # words, in a zstd frame
     (9, b"\1"), (68, b"\1"),  # a depth or a base without the other
     (12, struct.pack("<I", limits.CHUNK_BYTES + 1)), (16, struct.pack("<I", limits.CHUNK_BYTES + 1)),
     (12, b"\xff" * 4)],
)  # fmt: skip
def test_a_sealed_header_outside_the_rules_is_damaged(offset: int, value: bytes) -> None:
    header = bytearray(encode_header(FRAME))
    header[offset : offset + len(value)] = value
    with pytest.raises(Damaged):
        decode_header(sealed(bytes(header)))


def test_a_delta_names_its_base_and_its_depth() -> None:
    base = PLAIN.replace(b"some", b"more")
    encoded = codec.encode_delta(memoryview(PLAIN), base, codec.Words(2, True))
    frame = new_frame(CHUNK, object_id(PLAIN), len(PLAIN), encoded, object_id(base), 2)
    assert decode_header(encode_header(frame)) == frame
    assert (frame.base, frame.depth, frame.width, frame.rotated) == (object_id(base), 2, 2, True)
    out = bytearray(len(PLAIN))
    decode_payload(frame, memoryview(b"".join(map(bytes, encoded.parts))), memoryview(out), memoryview(base))
    assert out == PLAIN
    with pytest.raises(ValueError, match="base"):
        decoded(frame, b"".join(map(bytes, encoded.parts)))
    with pytest.raises(Damaged, match=frame.id.short):
        decoded(dataclasses.replace(frame, payload_check=0), b"".join(map(bytes, encoded.parts)))


def test_a_delta_needs_a_base_and_a_depth_within_the_limit() -> None:
    base = object_id(b"base")
    good = dataclasses.replace(FRAME, codec=codec.DELTA, width=2, rotated=True, depth=limits.DELTA_DEPTH, base=base)
    assert decode_header(encode_header(good)) == good
    wrong = ({"depth": limits.DELTA_DEPTH + 1}, {"depth": 0}, {"base": NO_ID}, {"codec": codec.PLANES}, {"width": 0})
    for change in wrong:
        with pytest.raises(Damaged):
            decode_header(encode_header(dataclasses.replace(good, **change)))


def test_only_a_manifest_may_be_longer_than_a_chunk() -> None:
    big = dataclasses.replace(FRAME, plain_size=limits.MANIFEST_BYTES)
    with pytest.raises(Damaged):
        decode_header(encode_header(big))
    assert decode_header(encode_header(dataclasses.replace(big, kind=MANIFEST))).plain_size == limits.MANIFEST_BYTES
