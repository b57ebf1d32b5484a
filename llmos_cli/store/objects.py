"""Reading objects and files. Every read is checked: frame header, checksum, exact size; manifests also by their id.

An object that is not where the index says is looked for once more, in packs the index does not know and in the trash,
before it is an error: a crash, another process or a gc may have moved it meanwhile.
"""

import threading
from bisect import bisect_right
from collections import OrderedDict
from typing import Final

from llmos_cli.errors import Damaged
from llmos_cli.formats.frame import check_id, decode_payload
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.manifest import Chunk, FileEntry, Manifest, decode_manifest
from llmos_cli.store.handle import Store
from llmos_cli.store.packs import read_frame, restore_from_trash, sync_index

_CACHED_CHUNKS: Final = 8


def read_object(store: Store, oid: ObjectId, *, verify_id: bool = False) -> bytes:
    """An object's plain bytes. Raises Damaged naming the object if it is missing or broken."""
    locations = store.index.locate(oid)
    size = locations[0].entry.plain_size if locations else None
    if size is None and _search(store, oid):
        size = store.index.locate(oid)[0].entry.plain_size
    if size is None:
        raise _missing(oid)
    out = bytearray(size)
    read_object_into(store, oid, memoryview(out), verify_id=verify_id)
    return bytes(out)


def read_object_into(store: Store, oid: ObjectId, out: memoryview, *, verify_id: bool = False) -> None:
    """Fill `out` with an object's plain bytes; `out` must have exactly its size."""
    problem: Damaged | None = None
    for attempt in range(2):
        for location in store.index.locate(oid):
            try:
                frame, payload = read_frame(store.pack_path(location.pack), location.entry)
                if frame.id != oid or frame.plain_size != len(out):
                    raise Damaged(f"object {oid.short} has {frame.plain_size} bytes, {len(out)} were expected")
                decode_payload(frame, payload, out)
                if verify_id:
                    check_id(frame, out)
                return
            except FileNotFoundError:
                continue
            except Damaged as exc:
                problem = exc
                problem.hint = problem.hint or "see what it affects: llmos fsck"
                if attempt == 0:  # the index may be what is wrong: read this pack's own index again
                    store.index.drop_pack(location.pack)
        if attempt == 0 and not _search(store, oid):
            break
    raise problem or _missing(oid)


def read_manifest(store: Store, oid: ObjectId) -> Manifest:
    """A manifest, proven by its id; raises Damaged, UnknownVersion or Unsafe."""
    return decode_manifest(read_object(store, oid, verify_id=True))


def read_file(store: Store, entry: FileEntry) -> bytes:
    """A whole file; for small ones such as config.json."""
    out = bytearray(entry.size)
    open_file(store, entry).readinto(0, memoryview(out))
    return bytes(out)


class FileReader:
    """Random reads of a stored file, decoded on the way; may be used from several threads."""

    def __init__(self, store: Store, entry: FileEntry) -> None:
        self.entry = entry
        self._store = store
        self._starts: list[int] = []
        at = 0
        for chunk in entry.chunks:
            self._starts.append(at)
            at += chunk.size
        self.size = at
        self._cache: OrderedDict[ObjectId, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, start: int, end: int) -> bytes:
        """The bytes from `start` to `end`."""
        out = bytearray(end - start)
        self.readinto(start, memoryview(out))
        return bytes(out)

    def readinto(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from `start` on; whole chunks are decoded straight into it."""
        out = buffer.cast("B")
        if start < 0 or start + len(out) > self.size:
            raise ValueError(
                f"bytes {start} to {start + len(out)} are outside {self.entry.path!r} of {self.size} bytes"
            )
        done = 0
        number = max(0, bisect_right(self._starts, start) - 1)
        while done < len(out):
            chunk, first = self.entry.chunks[number], start + done - self._starts[number]
            take = min(chunk.size - first, len(out) - done)
            if take == chunk.size:
                read_object_into(self._store, chunk.id, out[done : done + take])
            else:
                out[done : done + take] = memoryview(self._chunk(chunk))[first : first + take]
            done += take
            number += 1

    def _chunk(self, chunk: Chunk) -> bytes:
        with self._lock:
            if chunk.id in self._cache:
                self._cache.move_to_end(chunk.id)
                return self._cache[chunk.id]
        plain = read_object(self._store, chunk.id)
        if len(plain) != chunk.size:
            raise Damaged(f"object {chunk.id.short} has {len(plain)} bytes, {self.entry.path!r} expects {chunk.size}")
        with self._lock:
            self._cache[chunk.id] = plain
            while len(self._cache) > _CACHED_CHUNKS:
                self._cache.popitem(last=False)
        return plain


def open_file(store: Store, entry: FileEntry) -> FileReader:
    return FileReader(store, entry)


def _search(store: Store, oid: ObjectId) -> bool:
    """Look for an object beyond the index; True if the index knows it now."""
    sync_index(store)
    return store.index.has(oid) or restore_from_trash(store, oid)


def _missing(oid: ObjectId) -> Damaged:
    return Damaged(f"object {oid.short} is missing from the store", hint="see what it affects: llmos fsck")
