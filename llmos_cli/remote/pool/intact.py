"""Whether bytes that a node of a pool gave are what its files should hold, by what they say of themselves.

Checksums find rot, not forgery; ids are checked by whoever uses the bytes. Here it is decided whether another copy
should be asked. What has no checksum passes.
"""

import struct
import threading
from typing import Final, TypeVar

from llmos_cli.errors import Damaged, LlmosError, UnknownVersion
from llmos_cli.formats.frame import HEADER_BYTES, check_payload, decode_header
from llmos_cli.formats.ids import checksum, object_id
from llmos_cli.formats.layout import PACK_SUFFIX, PACKS, REFS, SNAPSHOTS
from llmos_cli.formats.names import RefName
from llmos_cli.formats.pack import ALIGNMENT, END_MAGIC, ENTRY_SIZE, HEADER_SIZE, TRAILER_SIZE, aligned, pack_header
from llmos_cli.formats.reflog import RefEntry, decode_entry, parse_entry_name

Value = TypeVar("Value")

_MOST_REMEMBERED: Final = 65_536
_TRAILER = struct.Struct("<QI4xQ24xQ")  # offset and entries of the index, its checksum, the trailer's own


class Intact:
    """Remembers what packs must be like: their sizes, and where their indexes are, with which checksum. Packs of one
    name have the same bytes, so what one node has shown holds for the others."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sizes: dict[str, int] = {}
        self._indexes: dict[str, tuple[int, int]] = {}

    def expect(self, key: str, size: int) -> None:
        """A pack of this size has been listed."""
        self._remember(self._sizes, key, size)

    def problem(self, key: str, data: bytes, start: int, end: int | None) -> str | None:
        """What is wrong with a range of a key, None if nothing is known to be."""
        if key.startswith(f"{SNAPSHOTS}/"):
            whole = start == 0 and end is None
            return "is damaged" if whole and str(object_id(data)) not in key else None
        if not (key.startswith(f"{PACKS}/") and key.endswith(PACK_SUFFIX)):
            return "is a damaged move" if start == 0 and is_move(key, data) is False else None
        if end is not None and len(data) < end - start:
            return "is cut short"
        if start == 0 and data[:HEADER_SIZE] != pack_header()[: len(data)]:
            return "does not start as a pack"
        with self._lock:
            size, index = self._sizes.get(key), self._indexes.get(key)
        if len(data) >= TRAILER_SIZE and (start + len(data) == size or data.endswith(END_MAGIC)):
            return self._in_end(key, data, start)
        if index and start == index[0]:
            return None if checksum(data) == index[1] else "has a damaged index"
        return _in_frames(data) if start % ALIGNMENT == 0 and start else None

    def _in_end(self, key: str, data: bytes, start: int) -> str | None:
        """A range that reaches to the last byte."""
        offset, count, index_check, check = _TRAILER.unpack_from(data, len(data) - TRAILER_SIZE)
        size = offset + count * ENTRY_SIZE + TRAILER_SIZE
        if check != checksum(data[-TRAILER_SIZE:][: TRAILER_SIZE - 16]) or start + len(data) != size:
            return "has a damaged trailer"
        self._remember(self._indexes, key, (offset, index_check))
        if start <= offset and checksum(data[offset - start : -TRAILER_SIZE]) != index_check:
            return "has a damaged index"
        return _in_frames(data[HEADER_SIZE:offset]) if start == 0 else None

    def _remember(self, table: dict[str, Value], key: str, value: Value) -> None:
        with self._lock:
            if len(table) >= _MOST_REMEMBERED:
                table.clear()
            table[key] = value


def is_move(key: str, data: bytes) -> bool | None:
    """Whether this is a move of a ref that reads back; None if the key is not that of one."""
    parts = key.split("/")
    sequence = parse_entry_name(parts[-1])
    if len(parts) != 4 or parts[0] != REFS or sequence is None:
        return None
    try:
        decode_entry(data, RefName(parts[1], parts[2]), sequence)
    except UnknownVersion:
        return True
    except LlmosError:
        return False
    return True


def is_same_move(key: str, one: bytes, other: bytes) -> bool:
    """Whether two moves say the same but for when, by whom and why: a push that was killed and is made again."""
    entries = [_decoded(key, data) for data in (one, other)]
    return None not in entries and len({(entry.id, entry.previous) for entry in entries if entry}) == 1


def _decoded(key: str, data: bytes) -> RefEntry | None:
    if not is_move(key, data):
        return None
    _, name, tag, sequence = key.split("/")
    try:
        return decode_entry(data, RefName(name, tag), int(sequence))
    except LlmosError:
        return None


def _in_frames(data: bytes) -> str | None:
    """What is wrong with a run of frames."""
    view, at = memoryview(data), 0
    while at < len(view):
        try:
            frame = decode_header(view[at : at + HEADER_BYTES])
            stop = at + HEADER_BYTES + frame.payload_size
            if stop > len(view):
                return None  # no more of it was asked for
            check_payload(frame, view[at + HEADER_BYTES : stop])
        except UnknownVersion:
            return None
        except Damaged:
            return "has a damaged frame"
        at = aligned(stop)
    return None
