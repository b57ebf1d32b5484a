"""The payload of an adopted chunk: where in the adopted file its bytes lie, and the checksum they must have.

The frame's header names the file (as its base) and says how the bytes are to be read as words, so that they can be
encoded when they leave the store. Knows nothing of where adopted files lie, nor how they are read.
"""

import struct
from dataclasses import dataclass
from typing import Final

from llmos_cli.errors import Damaged
from llmos_cli.formats import codec
from llmos_cli.formats.ids import Buffer

_PLACE = struct.Struct("<Q Q")  # offset, checksum of the plain bytes
PLACE_BYTES: Final = _PLACE.size
_FILE_BYTES: Final = 1 << 62  # no file is longer


@dataclass(frozen=True)
class Place:
    """`offset` of the chunk in the adopted file, `check` the checksum of its plain bytes."""

    offset: int
    check: int


def encode_place(place: Place, words: codec.Words) -> codec.Encoded:
    """The payload, and the words that the chunk is made of."""
    rotated = words.is_float and words.width > 1
    return codec.Encoded(codec.ADOPTED, words.width, rotated, (_PLACE.pack(place.offset, place.check),))


def decode_place(payload: Buffer) -> Place:
    """Read a payload; raises Damaged."""
    if len(payload) != PLACE_BYTES:
        raise Damaged(f"an adopted chunk has a payload of {len(payload)} bytes instead of {PLACE_BYTES}")
    place = Place(*_PLACE.unpack(payload))
    if place.offset > _FILE_BYTES:
        raise Damaged("an adopted chunk lies beyond the end of any file")
    return place
