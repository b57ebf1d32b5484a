"""The payload of an adopted chunk, and what a frame that has one may say."""

from dataclasses import replace
from typing import Any

import pytest

from llmos_cli.errors import Damaged
from llmos_cli.formats import pack
from llmos_cli.formats.adopted import PLACE_BYTES, Place, decode_place, encode_place
from llmos_cli.formats.codec import ADOPTED, OPAQUE, RAW, Words
from llmos_cli.formats.frame import CHUNK, MANIFEST, decode_header, decode_payload, encode_header, new_frame
from llmos_cli.formats.ids import NO_ID, checksum, object_id

PLAIN = bytes(range(256)) * 4
FILE = object_id(b"the whole file")
PLACE = Place(4096, checksum(PLAIN))
ENCODED = encode_place(PLACE, Words(2, True))
FRAME = new_frame(CHUNK, object_id(PLAIN), len(PLAIN), ENCODED, FILE)


def test_a_place_reads_back() -> None:
    payload = b"".join(map(bytes, ENCODED.parts))
    assert len(payload) == PLACE_BYTES == FRAME.payload_size
    assert decode_place(payload) == PLACE


@pytest.mark.parametrize("payload", [b"", bytes(15), bytes(17), b"\xff" * 16])
def test_a_place_that_cannot_be_is_damaged(payload: bytes) -> None:
    with pytest.raises(Damaged):
        decode_place(payload)


@pytest.mark.parametrize("words", [OPAQUE, Words(1), Words(2, True), Words(4), Words(8, True)])
def test_the_header_names_the_file_and_the_words(words: Words) -> None:
    frame = new_frame(CHUNK, object_id(PLAIN), len(PLAIN), encode_place(PLACE, words), FILE)
    assert decode_header(encode_header(frame)) == frame
    assert (frame.base, frame.depth, frame.width, frame.rotated) == (FILE, 0, words.width, words.is_float)


@pytest.mark.parametrize(
    "change",
    [
        {"base": NO_ID},
        {"depth": 1},
        {"kind": MANIFEST},
        {"payload_size": 15},
        {"width": 3},
        {"width": 0},
        {"codec": RAW},
    ],
)
def test_a_header_that_contradicts_itself_is_damaged(change: dict[str, Any]) -> None:
    with pytest.raises(Damaged):
        decode_header(encode_header(replace(FRAME, **change)))


def test_the_bytes_are_not_in_the_payload_and_the_hint_says_where_to_get_them() -> None:
    payload = memoryview(b"".join(map(bytes, ENCODED.parts)))
    with pytest.raises(Damaged, match="a file that a store has adopted") as caught:
        decode_payload(FRAME, payload, memoryview(bytearray(len(PLAIN))))
    assert "push from that store" in str(caught.value.hint)


def test_a_pack_lists_the_file() -> None:
    frame = encode_header(FRAME) + b"".join(map(bytes, ENCODED.parts))
    body = pack.pack_header() + frame
    body += pack.padding(len(body))
    entry = pack.entry_of(FRAME, pack.HEADER_SIZE)
    data = body + pack.pack_end([entry], len(body))
    (read,) = pack.read_index(lambda start, end: data[start:end], len(data))
    assert (read, read.codec, read.base) == (entry, ADOPTED, FILE)
    assert not pack.lists_header(entry, data, entry.offset)  # wants a closer look: is the file there?
    for wrong in (entry._replace(base=NO_ID), entry._replace(depth=1)):
        broken = body + pack.pack_end([wrong], len(body))
        with pytest.raises(Damaged):
            pack.read_index(lambda start, end: broken[start:end], len(broken))  # noqa: B023
