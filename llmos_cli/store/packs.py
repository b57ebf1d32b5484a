"""Pack files of the local store: writing one, reading frames from one, keeping the index in step with the folder."""

import contextlib
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from llmos_cli.errors import Damaged, NotFound, from_os_error
from llmos_cli.formats import limits
from llmos_cli.formats.frame import HEADER_BYTES, Frame
from llmos_cli.formats.ids import Buffer, IdHasher, ObjectId, parse_id
from llmos_cli.formats.layout import PACK_SUFFIX
from llmos_cli.formats.pack import Entry, aligned, check_entry, entry_of, pack_end, pack_header, padding, read_index
from llmos_cli.store import durable
from llmos_cli.store.handle import Store

_scratch = threading.local()


class PackWriter:
    """A pack in the making: frames are appended to the temporary file `path`, `publish` makes it a pack.

    Publishing is `finish` (complete and durable, its name known) and `install` (visible); a pack that is to go
    elsewhere, or whose name must be compared first, is finished and then installed or discarded.
    """

    def __init__(self, tmp: Path) -> None:
        self.path = durable.temp_path(tmp)
        self._finished = False
        self._context = durable.new_file(self.path)
        self._file: BinaryIO = self._context.__enter__()
        self._hasher = IdHasher()
        self._size = 0
        self.entries: list[Entry] = []
        self._write(pack_header())

    @property
    def size(self) -> int:
        return self._size

    def append(self, frame: Frame, header: bytes, parts: Sequence[Buffer]) -> Entry:
        entry = entry_of(frame, self._size)
        self._write(header, *parts, padding(HEADER_BYTES + frame.payload_size))
        self.entries.append(entry)
        return entry

    def is_full(self) -> bool:
        return self._size >= limits.PACK_TARGET_BYTES or len(self.entries) >= limits.PACK_FRAMES

    def publish(self, store: Store) -> ObjectId:
        """Make the pack durable under its name and index it; its frames are visible from here on."""
        self.finish()
        return self.install(store)

    def finish(self) -> ObjectId:
        """Make the pack complete and durable under its temporary name; returns the name that its bytes give it."""
        try:
            self._write(pack_end(self.entries, self._size))
        except BaseException:
            self.discard()
            raise
        self._finished = True  # from here on the file is no longer removed by the context
        self._context.__exit__(None, None, None)
        return self._hasher.id()

    def install(self, store: Store) -> ObjectId:
        """Make a finished pack visible."""
        return install_pack(store, self.path, self._hasher.id(), self._size, self.entries)

    def discard(self) -> None:
        """Leave nothing behind."""
        if self._finished:
            durable.remove(self.path)
            return
        with contextlib.suppress(_Discard):
            self._context.__exit__(_Discard, _Discard(), None)

    def _write(self, *parts: Buffer) -> None:
        durable.write_all(self._file, *parts)
        for part in parts:
            self._hasher.update(part)
            self._size += len(part)


class _Discard(Exception):
    pass


def install_pack(store: Store, temp: Path, name: ObjectId, size: int, entries: Sequence[Entry]) -> ObjectId:
    """Give a complete, durable temporary file its place among the packs, then index it."""
    target = store.pack_path(name)
    try:
        if target.exists():  # content names: the same bytes won already
            durable.remove(temp)
            durable.touch(target)
        else:
            durable.make_folder(target.parent)
            durable.publish(temp, target, mode=0o444)
    except BaseException:
        durable.remove(temp)
        raise
    store.index.add_pack(name, size, entries)
    return name


def read_frame(path: Path, entry: Entry) -> tuple[Frame, memoryview]:
    """Read a frame's header and payload; the memory is this thread's scratch, valid until its next read.

    Raises FileNotFoundError if the pack is gone, Damaged if it does not hold the entry there.
    """
    size = HEADER_BYTES + entry.payload_size
    buffer = scratch(size)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            got = 0
            while got < size:
                count = os.preadv(fd, [buffer[got:]], entry.offset + got)
                if count == 0:
                    raise Damaged(f"object {entry.id.short}: pack {path.name} is cut short")
                got += count
        finally:
            os.close(fd)
    except FileNotFoundError:
        raise
    except OSError as exc:
        raise from_os_error(exc, f"reading object {entry.id.short} at byte {entry.offset} of {path}") from exc
    return check_entry(entry, buffer[:HEADER_BYTES]), buffer[HEADER_BYTES:]


def scratch(size: int) -> memoryview:
    """Memory of this thread, reused from call to call: fresh pages for every chunk would cost more than decoding it."""
    buffer: bytearray | None = getattr(_scratch, "buffer", None)
    if buffer is None or len(buffer) < size:
        buffer = _scratch.buffer = bytearray(aligned(max(size, limits.CHUNK_BYTES + HEADER_BYTES)))
    return memoryview(buffer)[:size]


def read_pack_index(path: Path) -> tuple[int, tuple[Entry, ...]]:
    """A pack's size and index, from the file alone; raises Damaged naming the pack, NotFound if it is gone."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            return size, read_index(lambda start, end: os.pread(file.fileno(), end - start, start), size)
    except FileNotFoundError as exc:
        raise NotFound(f"pack {path.name} is gone") from exc
    except OSError as exc:
        raise from_os_error(exc, f"reading {path}") from exc
    except Damaged as exc:
        raise Damaged(f"{exc.message} (in {path})", hint="see what it affects: llmos fsck") from exc


def list_packs(folder: Path) -> dict[ObjectId, Path]:
    """The pack files below a folder by name; whatever else lies there is passed over."""
    found: dict[ObjectId, Path] = {}
    for path in sorted(folder.glob(f"**/*{PACK_SUFFIX}")):
        with contextlib.suppress(Damaged):
            found[parse_id(path.stem)] = path
    return found


@dataclass(frozen=True)
class Sync:
    """What `sync_index` did: packs added to the index, packs dropped from it, packs that could not be read."""

    packs: int
    dropped: int
    damaged: tuple[tuple[ObjectId, str], ...]


def sync_index(store: Store) -> Sync:
    """Bring the index in step with the packs folder. A damaged pack is left out and named."""
    indexed = store.index.packs()
    present = list_packs(store.packs)
    added, dropped, damaged = 0, 0, []
    for name in indexed.keys() - present.keys():
        store.index.drop_pack(name)
        dropped += 1
    for name in present.keys() - indexed.keys():
        try:
            size, entries = read_pack_index(present[name])
        except NotFound:
            continue
        except Damaged as exc:
            damaged.append((name, exc.message))
            continue
        store.index.add_pack(name, size, entries)
        added += 1
    return Sync(added, dropped, tuple(damaged))


def restore_from_trash(store: Store, oid: ObjectId) -> bool:
    """Bring back the pack in the trash that holds an object; False if none does."""
    for name, path in list_packs(store.trash).items():
        try:
            size, entries = read_pack_index(path)
        except (Damaged, NotFound):
            continue
        if any(entry.id == oid for entry in entries):
            target = store.pack_path(name)
            durable.make_folder(target.parent)
            durable.touch(path)
            if durable.move(path, target) or target.exists():
                store.index.add_pack(name, size, entries)
                return True
    return False


def secure(store: Store, objects: Iterable[ObjectId], *, fresh: set[ObjectId]) -> None:
    """Make sure that objects about to become reachable are all there, and make the packs that hold them young again.

    `fresh` packs were just written. What a gc took meanwhile comes back from the trash; raises Damaged if it cannot.
    """
    packs: set[ObjectId] = set()
    for oid in objects:
        packs.add(_holder(store, oid, packs | fresh))
    for pack in packs - fresh:
        durable.touch(store.pack_path(pack))


def _holder(store: Store, oid: ObjectId, known: set[ObjectId]) -> ObjectId:
    """A pack that holds an object and exists; brought back from the trash if it must be."""
    for attempt in range(3):
        for location in store.index.locate(oid):
            if location.pack in known or store.pack_path(location.pack).exists():
                return location.pack
        if attempt == 0:
            sync_index(store)
        elif attempt == 1:
            restore_from_trash(store, oid)
    raise Damaged(
        f"object {oid.short} was removed while it was being used", hint="run the command again: it will be stored anew"
    )
