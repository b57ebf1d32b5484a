"""Object ids and checksums: the one place that hashes.

An object id is the BLAKE3-256 of an object's plain bytes: packs come from remotes that may be hostile, and BLAKE3
resists forgery. XXH3-64 only guards stored bytes against accidents, at memory speed; it never names anything.
"""

import re
from typing import Final

from blake3 import blake3
from xxhash import xxh3_64, xxh3_64_intdigest

from llmos_cli.errors import Damaged, UsageError

Buffer = bytes | bytearray | memoryview

ID_BYTES: Final = 32
SHORT_HEX: Final = 12
_HEX = re.compile(r"[0-9a-f]{64}\Z")
_PREFIX = re.compile(r"[0-9a-f]{4,64}\Z")


class ObjectId(bytes):
    """The 32 bytes of a BLAKE3-256 digest; `str()` gives the 64 hex digits, `.short` the first 12."""

    __slots__ = ()  # there are millions

    def __new__(cls, digest: bytes) -> "ObjectId":
        if len(digest) != ID_BYTES:
            raise Damaged(f"an object id has {ID_BYTES} bytes, not {len(digest)}")
        return super().__new__(cls, digest)

    def __str__(self) -> str:
        return self.hex()

    def __repr__(self) -> str:
        return f"ObjectId({self.hex()[:SHORT_HEX]})"

    @property
    def short(self) -> str:
        return self.hex()[:SHORT_HEX]


NO_ID: Final = ObjectId(bytes(ID_BYTES))


def object_id(data: Buffer) -> ObjectId:
    """The id of an object whose plain bytes are `data`."""
    return ObjectId(blake3(data).digest())


def parse_id(text: object) -> ObjectId:
    """Read 64 lower-case hex digits; raises Damaged for anything else."""
    if not isinstance(text, str) or not _HEX.match(text):
        raise Damaged(f"not an object id: {str(text)[:80]!r}")
    return ObjectId(bytes.fromhex(text))


def parse_prefix(text: str) -> str:
    """Check an id prefix as a user types it (4 to 64 hex digits); raises UsageError."""
    lowered = text.lower()
    if not _PREFIX.match(lowered):
        raise UsageError(f"{text[:80]!r} is not an id prefix", hint="an id is 4 to 64 hex digits after '@'")
    return lowered


def checksum(*parts: Buffer) -> int:
    """XXH3-64 of the parts, one after the other."""
    if len(parts) == 1:
        return int(xxh3_64_intdigest(parts[0]))
    state = xxh3_64()
    for part in parts:
        state.update(part)
    return int(state.intdigest())


class IdHasher:
    """Feeds bytes as they pass and gives their object id at the end."""

    def __init__(self) -> None:
        self._state = blake3()

    def update(self, data: Buffer) -> None:
        self._state.update(data)

    def id(self) -> ObjectId:
        return ObjectId(self._state.digest())
