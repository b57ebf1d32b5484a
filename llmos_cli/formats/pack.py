"""Packs: an immutable file of frames with its own index at the end, named by the BLAKE3-256 of its bytes.

Header, frames (each starting on a multiple of 64), footer index, trailer. A reader on a remote needs three range
reads: trailer, index, frame. Frames describe themselves, so an index of the whole store can be rebuilt from packs.
"""

import struct
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from llmos_cli.errors import Damaged, UnknownVersion
from llmos_cli.formats import codec, limits
from llmos_cli.formats.frame import (
    CHUNK,
    HEADER_BYTES,
    MANIFEST,
    Frame,
    decode_header,
    header_lists,
    plain_limit,
    rests_fit,
)
from llmos_cli.formats.ids import NO_ID, Buffer, ObjectId, checksum

MAGIC: Final = b"LLMPACK\x00"
END_MAGIC: Final = b"LLMPEND\x00"
VERSION: Final = 1
ALIGNMENT: Final = 64

_HEADER = struct.Struct("<8s I 52x")
_ENTRY = struct.Struct("<32s 32s Q II BBB 5s")  # id base offset payload plain kind codec depth reserved
_RESERVED: Final = bytes(5)
_TRAILER = struct.Struct("<Q I I Q 24x")  # index offset, entries, version, index check
_TRAILER_END = struct.Struct("<Q8s")  # trailer check, magic
HEADER_SIZE: Final = _HEADER.size
_HEADER_FIELDS: Final = 12  # the rest is reserved
TRAILER_SIZE: Final = _TRAILER.size + _TRAILER_END.size
ENTRY_SIZE: Final = _ENTRY.size


class Entry(NamedTuple):
    """One line of a pack's index; a tuple, since there are millions. `offset` is where the frame's header starts,
    `base` a delta's base or the file that an adopted chunk lies in."""

    id: ObjectId
    base: ObjectId
    offset: int
    payload_size: int
    plain_size: int
    kind: int
    codec: int
    depth: int

    @property
    def end(self) -> int:
        return self.offset + HEADER_BYTES + self.payload_size

    @property
    def stored_size(self) -> int:
        """Bytes it takes in the pack, its padding and index line included."""
        return aligned(HEADER_BYTES + self.payload_size) + ENTRY_SIZE


def entry_of(frame: Frame, offset: int) -> Entry:
    return Entry(
        frame.id, frame.base, offset, frame.payload_size, frame.plain_size, frame.kind, frame.codec, frame.depth
    )


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def pack_header() -> bytes:
    return _HEADER.pack(MAGIC, VERSION)


def padding(size: int) -> bytes:
    """Zero bytes that bring a length to the alignment."""
    return bytes(aligned(size) - size)


def pack_end(entries: Sequence[Entry], index_offset: int) -> bytes:
    """The footer index and the trailer, for frames written so far up to `index_offset`."""
    index = b"".join(
        _ENTRY.pack(e.id, e.base, e.offset, e.payload_size, e.plain_size, e.kind, e.codec, e.depth, _RESERVED)
        for e in entries
    )
    trailer = _TRAILER.pack(index_offset, len(entries), VERSION, checksum(index))
    return index + trailer + _TRAILER_END.pack(checksum(trailer), END_MAGIC)


def read_index(read: Callable[[int, int], Buffer], size: int) -> tuple[Entry, ...]:
    """Read a pack's index through `read(start, end)`; `size` is the pack's length in bytes. Raises Damaged.

    The structure is checked as a whole: frames in order, no gap, no overlap, nothing outside the file.
    """
    if not HEADER_SIZE + TRAILER_SIZE <= size <= limits.PACK_BYTES:
        raise Damaged(f"a pack of {size} bytes cannot be")
    header = bytes(read(0, HEADER_SIZE))
    if header != pack_header():
        if len(header) == HEADER_SIZE and header[: len(MAGIC)] == MAGIC and not any(header[_HEADER_FIELDS:]):
            raise UnknownVersion(
                f"a pack of version {_HEADER.unpack(header)[1]} is unknown", hint="use a newer llmos, or run llmos fsck"
            )
        raise Damaged("a pack does not start with a pack header")
    trailer = bytes(read(size - TRAILER_SIZE, size))
    if len(trailer) != TRAILER_SIZE:
        raise Damaged("a pack is cut short")
    check, magic = _TRAILER_END.unpack_from(trailer, _TRAILER.size)
    if magic != END_MAGIC or check != checksum(trailer[: _TRAILER.size]):
        raise Damaged("a pack has no valid trailer: it is cut short or damaged")
    index_offset, count, version, index_check = _TRAILER.unpack_from(trailer)
    if version != VERSION:
        raise UnknownVersion(f"a pack of version {version} is unknown", hint="use a newer llmos")
    if any(trailer[24 : _TRAILER.size]) or count > limits.PACK_FRAMES:
        raise Damaged("a pack's trailer is outside the declared limits")
    if index_offset + count * ENTRY_SIZE + TRAILER_SIZE != size:
        raise Damaged("a pack's index does not fit its length")
    index = bytes(read(index_offset, size - TRAILER_SIZE))
    if len(index) != count * ENTRY_SIZE or checksum(index) != index_check:
        raise Damaged("a pack's index fails its checksum")
    entries = tuple(_entry(fields) for fields in _ENTRY.iter_unpack(index))
    at = HEADER_SIZE
    for entry in entries:
        if entry.offset != at:
            raise Damaged("a pack's index has a gap or an overlap")
        at = aligned(entry.end)
    if at != index_offset:
        raise Damaged("a pack's index does not start after its last frame")
    return entries


def check_entry(entry: Entry, header: Buffer) -> Frame:
    """Read the frame header that an index line points to; raises Damaged if they disagree."""
    frame = decode_header(header)
    if entry_of(frame, entry.offset) != entry:
        raise Damaged(f"object {entry.id.short}: the index and the frame disagree")
    return frame


def lists_header(entry: Entry, data: Buffer, at: int) -> bool:
    """Whether `data` surely has at `at` the frame header that an index line points to; False wants `check_entry`."""
    oid, base, _, payload, plain, kind, codec_id, depth = entry
    return header_lists(data, at, (oid, base, payload, plain, kind, codec_id, depth))


def check_padding(entry: Entry, data: Buffer) -> None:
    """Padding after a frame must be zero; `data` is what lies between its payload and the next frame."""
    if any(bytes(data)):
        raise Damaged(f"object {entry.id.short} is followed by bytes that must be zero")


def _entry(fields: tuple[bytes, bytes, int, int, int, int, int, int, bytes]) -> Entry:
    oid, base, offset, payload, plain, kind, codec_id, depth, reserved = fields
    if kind not in (CHUNK, MANIFEST) or codec_id not in codec.CODEC_NAMES or reserved != _RESERVED:
        raise UnknownVersion("a pack's index has an entry of an unknown kind or codec", hint="use a newer llmos")
    if plain > plain_limit(kind) or payload > plain_limit(kind) or depth > limits.DELTA_DEPTH:
        raise Damaged("a pack's index has an entry outside the declared limits")
    base_id = NO_ID if base == NO_ID else ObjectId(base)
    entry = Entry(ObjectId(oid), base_id, offset, payload, plain, kind, codec_id, depth)
    if not rests_fit(codec_id, depth, base_id):
        raise Damaged("a pack's index has an entry whose base does not fit its codec")
    return entry
