"""Files that were stored before and have not been touched since: their chunks are known without reading a byte.

As in git, a file counts as untouched if its size, times and inode are what they were; one that was written to within
the last moments is not noted, since a later write could leave the same times.
"""

import os
import struct
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from llmos_cli.formats.ids import ID_BYTES, ObjectId, checksum, object_id
from llmos_cli.formats.manifest import Chunk, FileEntry
from llmos_cli.store.handle import Store

_FACT: Final = "stat"
_SETTLED_SECONDS: Final = 2.0  # the coarsest file times in use
_STATUS = struct.Struct("<5Q")  # size, mtime, ctime (nanoseconds), inode, device
_CHUNK = struct.Struct(f"<{ID_BYTES}sI")
_CHECK = struct.Struct("<Q")

Seen = tuple[str, Path, os.stat_result, FileEntry]  # name in the store, path, status from before it was read, entry


def recall(store: Store, name: str, path: Path) -> FileEntry | None:
    """The entry of an untouched file whose chunks are all in the store still; None if it must be read."""
    key = _key(name, path)
    value = store.index.facts(_FACT, [key]).get(key, b"")
    status, chunk_list = value[_CHECK.size :][: _STATUS.size], value[_CHECK.size + _STATUS.size :]
    try:
        if status != _pack(path.stat()) or value[: _CHECK.size] != _CHECK.pack(checksum(status, chunk_list)):
            return None
    except OSError:
        return None
    chunks = tuple(Chunk(ObjectId(oid), size) for oid, size in _CHUNK.iter_unpack(chunk_list))
    return FileEntry(name, chunks) if all(store.index.has(chunk.id) for chunk in chunks) else None


def remember(store: Store, files: Iterable[Seen]) -> None:
    """Note files that have just been stored."""
    settled = time.time() - _SETTLED_SECONDS
    rows = []
    for name, path, status, entry in files:
        if max(status.st_mtime, status.st_ctime) < settled:
            parts = _pack(status), b"".join(_CHUNK.pack(chunk.id, chunk.size) for chunk in entry.chunks)
            rows.append((_key(name, path), _CHECK.pack(checksum(*parts)) + b"".join(parts)))
    if rows:
        store.index.add_facts(_FACT, rows)


def _key(name: str, path: Path) -> ObjectId:
    return object_id(f"{name}\0{os.path.abspath(path)}".encode(errors="surrogateescape"))


def _pack(status: os.stat_result) -> bytes:
    numbers = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev)
    return _STATUS.pack(*(number & 0xFFFF_FFFF_FFFF_FFFF for number in numbers))
