"""Whether bytes that a node of a pool gave are what its files should hold, by what they say of themselves.

Checksums find rot, not forgery; ids are checked by whoever uses the bytes. Here it is decided whether another copy
should be asked. What has no checksum passes.
"""

import struct
import threading
from typing import Final

from llmos_cli.errors import Damaged, LlmosError, UnknownVersion
from llmos_cli.formats.frame import HEADER_BYTES, MAGIC, check_payload, decode_header
from llmos_cli.formats.ids import checksum, object_id
from llmos_cli.formats.layout import PACK_SUFFIX, PACKS, REFS, SNAPSHOTS
from llmos_cli.formats.names import RefName
from llmos_cli.formats.pack import ALIGNMENT, ENTRY_SIZE, HEADER_SIZE, TRAILER_SIZE, aligned, pack_header
from llmos_cli.formats.reflog import decode_entry, parse_entry_name

_MOST_REMEMBERED: Final = 4096


class Intact:
    """Remembers of the trailers it has seen what the index before them must be."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._indexes: dict[tuple[str, str], tuple[int, int, int]] = {}

    def problem(self, node: str, key: str, data: bytes, start: int, end: int | None) -> str | None:
        """What is wrong with a range of a key, None if nothing is known to be."""
        if end is not None and len(data) < end - start and key.startswith(f"{PACKS}/") and key.endswith(PACK_SUFFIX):
            return "is cut short"
        if is_move(key, data) is False and start == 0:
            return "is a damaged move"
        if key.startswith(f"{SNAPSHOTS}/") and start == 0 and end is None and str(object_id(data)) not in key:
            return "is damaged"
        if key.startswith(f"{PACKS}/") and key.endswith(PACK_SUFFIX):
            return self._in_pack(node, key, data, start)
        return None

    def _in_pack(self, node: str, key: str, data: bytes, start: int) -> str | None:
        if start == 0:
            return None if data[:HEADER_SIZE] == pack_header()[: len(data)] else "does not start as a pack"
        with self._lock:
            index = self._indexes.get((node, key))
        if index and start == index[0]:
            return None if checksum(data) == index[2] else "has a damaged index"
        if index and start == index[1] and len(data) == TRAILER_SIZE:
            return self._trailer(node, key, data, start)
        if len(data) == TRAILER_SIZE and data[:4] != MAGIC:
            return self._trailer(node, key, data, start)
        return _frames(data) if start % ALIGNMENT == 0 else None

    def _trailer(self, node: str, key: str, data: bytes, start: int) -> str | None:
        offset, count = struct.unpack_from("<QI", data)
        (index_check,) = struct.unpack_from("<Q", data, 16)
        (check,) = struct.unpack_from("<Q", data, 48)
        if check != checksum(data[:48]) or offset + count * ENTRY_SIZE != start:
            return "has a damaged trailer"
        with self._lock:
            if len(self._indexes) >= _MOST_REMEMBERED:
                self._indexes.clear()
            self._indexes[(node, key)] = (offset, start, index_check)
        return None


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


def _frames(data: bytes) -> str | None:
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
