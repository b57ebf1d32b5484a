"""Frames: one object as stored. A fixed header of 128 bytes, then the payload.

The header carries everything needed to rebuild the index from packs alone, and already has the two fields of a delta
(base id, depth). `header_check` guards the header, `payload_check` the payload: no bit can flip unnoticed.
"""

import struct
from dataclasses import dataclass
from typing import Final

from llmos_cli.errors import Damaged, UnknownVersion
from llmos_cli.formats import codec, limits
from llmos_cli.formats.adopted import PLACE_BYTES
from llmos_cli.formats.ids import NO_ID, Buffer, ObjectId, checksum, object_id

MAGIC: Final = b"LLMF"
VERSION: Final = 1
HASH_BLAKE3: Final = 1
CHUNK: Final = 1
MANIFEST: Final = 2

# magic version kind codec width rotated depth hash reserved plain payload reserved payload_check id base reserved
_HEADER = struct.Struct("<4s BBBB BBBB I I 8x Q 32s 32s 20x")
_CHECK = struct.Struct("<Q")
HEADER_BYTES: Final = _HEADER.size + _CHECK.size
_NOTHING: Final = bytes(20)


@dataclass(frozen=True)
class Frame:
    """The header of a frame. Sizes are bytes; `depth` is set for delta frames only, `base` for them (the object they
    change) and for adopted ones (the file)."""

    kind: int
    codec: int
    width: int
    rotated: bool
    depth: int
    plain_size: int
    payload_size: int
    payload_check: int
    id: ObjectId
    base: ObjectId


def plain_limit(kind: int) -> int:
    return limits.MANIFEST_BYTES if kind == MANIFEST else limits.CHUNK_BYTES


def new_frame(
    kind: int, oid: ObjectId, plain_size: int, encoded: codec.Encoded, base: ObjectId = NO_ID, depth: int = 0
) -> Frame:
    """The header of an encoded object; `base` and `depth` are a delta's, `base` alone an adopted chunk's."""
    return Frame(
        kind,
        encoded.codec,
        encoded.width,
        encoded.rotated,
        depth,
        plain_size,
        encoded.size,
        checksum(*encoded.parts),
        oid,
        base,
    )


def encode_header(frame: Frame) -> bytes:
    """The 128 header bytes."""
    head = _HEADER.pack(
        MAGIC,
        VERSION,
        frame.kind,
        frame.codec,
        frame.width,
        frame.rotated,
        frame.depth,
        HASH_BLAKE3,
        0,
        frame.plain_size,
        frame.payload_size,
        frame.payload_check,
        frame.id,
        frame.base,
    )
    return head + _CHECK.pack(checksum(head))


def decode_header(data: Buffer) -> Frame:
    """Read 128 header bytes; raises Damaged or UnknownVersion. Nothing is allocated by what the header says."""
    if len(data) < HEADER_BYTES:
        raise Damaged(f"a frame header has {len(data)} bytes instead of {HEADER_BYTES}")
    head = bytes(data[: _HEADER.size])
    magic, version, kind, codec_id, width, rotated, depth, hash_id, reserved, plain, payload, check, oid, base = (
        _HEADER.unpack(head)
    )
    if magic != MAGIC:
        raise Damaged("a frame does not start with its magic")
    if _CHECK.unpack_from(data, _HEADER.size)[0] != checksum(head):
        raise Damaged("a frame header fails its checksum")
    if (
        version != VERSION
        or hash_id != HASH_BLAKE3
        or codec_id not in codec.CODEC_NAMES
        or kind not in (CHUNK, MANIFEST)
    ):
        raise UnknownVersion(f"a frame of version {version} is unknown", hint="use a newer llmos")
    frame = Frame(kind, codec_id, width, bool(rotated), depth, plain, payload, check, ObjectId(oid), ObjectId(base))
    if plain > plain_limit(kind) or payload > plain_limit(kind) or reserved or rotated > 1:
        raise Damaged("a frame header is outside the declared limits")
    if not rests_fit(codec_id, depth, frame.base) or depth > limits.DELTA_DEPTH:
        raise Damaged("a frame header has a base or depth that does not fit its codec")
    if codec_id == codec.ADOPTED:
        if kind != CHUNK or payload != PLACE_BYTES or width not in (0, 1, 2, 4, 8):
            raise Damaged("a frame header of an adopted chunk has fields that cannot be")
    elif (width == 0) != (codec_id in (codec.RAW, codec.ZSTD)):
        raise Damaged("a frame header has words that do not fit its codec")
    if rotated > (width > 1):
        raise Damaged("a frame header has words that do not fit its codec")
    if encode_header(frame) != bytes(data[:HEADER_BYTES]):
        raise Damaged("a frame header has bytes set that must be zero")
    return frame


def rests_fit(codec_id: int, depth: int, base: ObjectId) -> bool:
    """Whether a frame of this codec may have this depth and base: a delta has both, an adopted chunk only a base (the
    file it lies in), any other neither."""
    return (codec_id == codec.DELTA) == (depth > 0) and (codec_id in (codec.DELTA, codec.ADOPTED)) == (base != NO_ID)


def header_lists(data: Buffer, at: int, listed: tuple[ObjectId, ObjectId, int, int, int, int, int]) -> bool:
    """Whether the header at `at` surely stands and says what an index lists: id, base, payload and plain bytes, kind,
    codec, depth. False wants a closer look (`decode_header`); it is not proof of damage. For checking many at once."""
    end = at + _HEADER.size
    magic, version, kind, codec_id, width, rotated, depth, hash_id, reserved, plain, payload, _, oid, base = (
        _HEADER.unpack_from(data, at)
    )
    return (
        (oid, base, payload, plain, kind, codec_id, depth) == listed
        and (magic, version, hash_id, reserved) == (MAGIC, VERSION, HASH_BLAKE3, 0)
        and _CHECK.unpack_from(data, end)[0] == checksum(data[at:end])
        and data[at + 20 : at + 28] == _NOTHING[:8]
        and data[end - 20 : end] == _NOTHING
        and codec_id != codec.ADOPTED
        and codec_id != codec.ADOPTED
        and (width == 0) == (codec_id in (codec.RAW, codec.ZSTD))
        and rotated <= (width > 1)
    )


def check_payload(frame: Frame, payload: Buffer) -> None:
    """Compare a payload with its header, at memory speed; raises Damaged."""
    if len(payload) != frame.payload_size:
        raise Damaged(f"object {frame.id.short} is cut short: {len(payload)} of {frame.payload_size} bytes")
    if checksum(payload) != frame.payload_check:
        raise Damaged(f"object {frame.id.short} fails its checksum")


def decode_payload(frame: Frame, payload: memoryview, out: memoryview, base: memoryview | None = None) -> None:
    """Check and decode a payload into `out`, which has the frame's plain size; raises Damaged naming the object.

    A delta needs `base`, the plain bytes of its base.
    """
    check_payload(frame, payload)
    try:
        codec.decode(frame.codec, frame.width, frame.rotated, payload, out, base)
    except Damaged as exc:
        raise type(exc)(f"object {frame.id.short}: {exc.message}", hint=exc.hint) from exc


def check_id(frame: Frame, plain: Buffer) -> None:
    """Compare plain bytes with the id they were stored under, the full proof; raises Damaged."""
    if object_id(plain) != frame.id:
        raise Damaged(f"object {frame.id.short} does not have the bytes its id names")
