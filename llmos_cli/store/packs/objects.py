"""Reading objects and files. Every read is checked: frame header, checksum, exact size; manifests also by their id.

An object that is not where the index says is looked for in packs the index does not know, in the trash and in every
pack itself before it is an error: a crash, another process or a gc may have moved it, or the index may be wrong.
While a command looks at a remote in place (`store.elsewhere`), what the index lacks is asked for there.
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from llmos_cli.errors import Damaged, NotFound, UnknownVersion
from llmos_cli.formats import limits
from llmos_cli.formats.frame import plain_limit
from llmos_cli.formats.ids import ObjectId, object_id
from llmos_cli.formats.manifest import Chunk, FileEntry, Manifest, decode_manifest
from llmos_cli.formats.pack import Entry
from llmos_cli.store.disk.forks import ForkLock
from llmos_cli.store.handle import Store
from llmos_cli.store.packs.frames import decode_frame, read_frame, room
from llmos_cli.store.packs.index import Location
from llmos_cli.store.packs.packs import find_in_packs, list_packs, read_pack, restore_from_trash, sync_index

_CACHED_CHUNKS: Final = 8
_ROUNDS: Final = 4
_FSCK: Final = "see what it affects: llmos fsck"


def read_object(store: Store, oid: ObjectId, *, verify_id: bool = False) -> bytes:
    """An object's plain bytes. Raises Damaged naming the object if it is missing or broken."""
    return bytes(_read(store, oid, lambda entry: memoryview(bytearray(entry.plain_size)), verify_id=verify_id))


def read_object_into(store: Store, oid: ObjectId, out: memoryview, *, verify_id: bool = False) -> None:
    """Fill `out` with an object's plain bytes; `out` must have exactly its size."""

    def given(entry: Entry) -> memoryview:
        if entry.plain_size != len(out):
            raise _WrongSize(f"object {oid.short} has {entry.plain_size} bytes, {len(out)} were expected")
        return out

    _read(store, oid, given, verify_id=verify_id)


def read_manifest(store: Store, oid: ObjectId) -> Manifest:
    """A manifest, proven by its id; raises Damaged, UnknownVersion or Unsafe."""
    return decode_manifest(read_object(store, oid, verify_id=True))


def read_file(store: Store, entry: FileEntry) -> bytes:
    """A whole file; for small ones such as config.json."""
    out = bytearray(entry.size)
    open_file(store, entry).readinto(0, memoryview(out))
    return bytes(out)


class FileReader:
    """Random reads of a stored file, decoded on the way; may be used from several threads, and by forked children."""

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
        self._lock = ForkLock()

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


class _WrongSize(Damaged):
    """Whoever asked is wrong, not the object."""


class _NoBase(Damaged):
    """A delta's base cannot be had: the delta itself may be whole."""


def _read(
    store: Store,
    oid: ObjectId,
    out_for: Callable[[Entry], memoryview],
    *,
    verify_id: bool = False,
    below: int = limits.DELTA_DEPTH + 1,
) -> memoryview:
    """Look for an object where the index says, then ever further, until some copy of it can be decoded into the memory
    that `out_for` gives. Copies of depth `below` or deeper do not count."""
    problem: Damaged | None = None
    damaged = False
    out: memoryview | None
    for search in _searches(store):
        if search is find_in_packs and damaged:
            break
        if search is _in_new_packs and (out := _from_elsewhere(store, oid, out_for)) is not None:
            return out
        if search:
            search(store, oid)
        for location in store.index.locate(oid):
            entry, path = location.entry, store.pack_path(location.pack)
            if entry.depth >= below:
                continue
            try:
                if entry.plain_size > plain_limit(entry.kind):
                    raise Damaged(f"object {oid.short}: its index line is outside the declared limits")
                out = _asked_for(path, entry, out_for)
                decode_frame(store, path, entry, out, lambda delta: _base(store, delta))
                if verify_id and object_id(out) != oid:
                    raise Damaged(f"object {oid.short} does not have the bytes its id names")
                return out
            except FileNotFoundError:
                continue
            except (UnknownVersion, _WrongSize):
                raise
            except _NoBase as exc:
                problem = exc
            except Damaged as exc:
                problem = exc
                problem.hint = problem.hint or _FSCK
                damaged = _is_damaged(store, location) or damaged
    if problem is None and store.elsewhere:
        others = ", ".join(place.label for place in store.elsewhere)
        raise Damaged(f"object {oid.short} is missing at {others}, and from the store")
    raise problem or Damaged(f"object {oid.short} is missing from the store", hint=_FSCK)


def _searches(store: Store) -> Iterator[Callable[[Store, ObjectId], object] | None]:
    """Where to look, ever further; again from the start if packs have come or gone meanwhile: a gc may have moved one
    behind our back."""
    yield None
    for _ in range(_ROUNDS):
        before = list_packs(store.packs), list_packs(store.trash)
        yield from (_in_new_packs, restore_from_trash, find_in_packs)
        if (list_packs(store.packs), list_packs(store.trash)) == before:
            return


def _from_elsewhere(store: Store, oid: ObjectId, out_for: Callable[[Entry], memoryview]) -> memoryview | None:
    for place in store.elsewhere:
        if found := place.read(oid):
            entry, plain = found
            out = out_for(entry)
            out[:] = plain
            return out
    return None


def _asked_for(path: Path, entry: Entry, out_for: Callable[[Entry], memoryview]) -> memoryview:
    try:
        return out_for(entry)
    except _WrongSize:
        read_frame(path, entry)  # unless it is the index that is wrong
        raise


def _base(store: Store, delta: Entry) -> memoryview:
    try:
        return _read(store, delta.base, room, below=delta.depth)
    except Damaged as exc:
        raise _NoBase(f"object {delta.id.short} rests on another: {exc.message}", hint=exc.hint) from exc


def _in_new_packs(store: Store, oid: ObjectId) -> None:
    sync_index(store)


def _is_damaged(store: Store, location: Location) -> bool:
    """A read failed: either this copy is damaged, and no longer counts as stored, or the index is wrong about the pack
    and is put right."""
    try:
        content = read_pack(store.pack_path(location.pack))
    except NotFound:
        return False
    if location.entry in content.entries:
        store.index.forget(location.entry.id, location.pack)
        return True
    if content.entries or content.problem is None:
        store.index.add_pack(location.pack, content.size, content.entries)
    return False
