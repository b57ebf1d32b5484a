"""What a store remembers of far remotes: the indexes of their packs, so that it asks for each one once.

A pack never changes under its name, so what was read is good for ever. It is kept in `cache/` of the store, one file a
remote, as the last bytes of each pack: index and trailer, which carry their own checksums. A file that is not whole is
no error: what it held is asked for again. Nothing here is believed more than the remote itself: pull proves every byte.
"""

import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from llmos_cli.errors import Damaged, LlmosError
from llmos_cli.formats.ids import ObjectId, checksum, object_id
from llmos_cli.formats.pack import Entry, pack_header, read_index
from llmos_cli.remote.transports.transport import SlowToAsk, Transport
from llmos_cli.store.disk import durable
from llmos_cli.store.handle import Store

CACHE: Final = "cache"
_MAGIC: Final = b"llmos remembers 1\n"
_RECORD: Final = struct.Struct("<32sQQ")  # pack, its size, bytes of its end


class Memory:
    """The ends of packs, by name and size; empty for a remote that is quick to ask."""

    def __init__(self, path: Path | None, ends: Mapping[tuple[ObjectId, int], bytes]) -> None:
        self._path = path
        self._ends = dict(ends)
        self._news = False

    def entries(self, pack: ObjectId, size: int) -> tuple[Entry, ...] | None:
        """The index of a pack of this size, if it is known."""
        end = self._ends.get((pack, size))
        if end is None:
            return None

        def read(start: int, stop: int) -> bytes:
            first = size - len(end)
            return pack_header()[start:stop] if start < first else end[start - first : stop - first]

        try:
            return read_index(read, size)
        except Damaged:
            return None

    def note(self, pack: ObjectId, size: int, end: bytes) -> None:
        """Remember a pack whose index has been read; may be called from several threads."""
        if self._path:
            self._ends[pack, size] = end
            self._news = True

    def save(self, listed: Mapping[ObjectId, int] | None = None) -> None:
        """Write down what is new; with `listed`, what is not at the remote any more is forgotten. A full disk, or a
        store that may only be read, is no error: it costs some requests the next time."""
        if not self._path or not self._news:
            return
        kept = {key: end for key, end in self._ends.items() if listed is None or listed.get(key[0]) == key[1]}
        body = b"".join(_RECORD.pack(name, size, len(end)) + end for (name, size), end in sorted(kept.items()))
        with suppress(LlmosError, OSError):
            durable.make_folder(self._path.parent)
            durable.write_volatile(self._path, _MAGIC + body + checksum(body).to_bytes(8, "little"))
            self._news = False


def recall(store: Store, transport: Transport) -> Memory:
    """What the store remembers of a remote."""
    if not isinstance(transport, SlowToAsk):
        return Memory(None, {})
    path = store.root / CACHE / str(object_id(transport.url.encode()))[:32]
    try:
        return Memory(path, _parse(path.read_bytes()))
    except (OSError, ValueError, struct.error, Damaged):
        return Memory(path, {})


def _parse(data: bytes) -> dict[tuple[ObjectId, int], bytes]:
    body, check = data[len(_MAGIC) : -8], data[-8:]
    if data[: len(_MAGIC)] != _MAGIC or checksum(body).to_bytes(8, "little") != check:
        raise ValueError("not whole")
    ends: dict[tuple[ObjectId, int], bytes] = {}
    at = 0
    while at < len(body):
        name, size, length = _RECORD.unpack_from(body, at)
        at += _RECORD.size
        ends[ObjectId(name), size] = body[at : at + length]
        at += length
    return ends
