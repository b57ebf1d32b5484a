"""Pack files of the local store: writing one, reading frames from one, keeping the index in step with the folder."""

import contextlib
import os
from collections.abc import Collection, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from llmos_cli.errors import AccessDenied, Damaged, LlmosError, NotFound, UnknownVersion, from_os_error
from llmos_cli.formats import limits
from llmos_cli.formats.codec import ADOPTED, DELTA
from llmos_cli.formats.frame import HEADER_BYTES, Frame, check_id, check_payload, decode_header, decode_payload
from llmos_cli.formats.ids import Buffer, IdHasher, ObjectId, parse_id
from llmos_cli.formats.layout import PACK_SUFFIX
from llmos_cli.formats.pack import (
    ALIGNMENT,
    HEADER_SIZE,
    Entry,
    aligned,
    entry_of,
    pack_end,
    pack_header,
    padding,
    read_index,
)
from llmos_cli.store.disk import durable
from llmos_cli.store.handle import Store
from llmos_cli.store.packs.adopted import has_adopted
from llmos_cli.store.packs.chains import DEEPEST
from llmos_cli.store.packs.frames import read_frame
from llmos_cli.store.packs.index import Location

_BATCH: Final = 100_000  # objects that are noted together
_TRIES: Final = 4  # a gc may move a pack again and again while we look for it


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
        try:
            self._write(pack_header())
        except BaseException:
            self.discard()
            raise

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
        durable.make_folder(target.parent)
        durable.publish(temp, target, mode=0o444)  # over one of the same name, whose bytes may have rotted
    except BaseException:
        durable.remove(temp)
        raise
    store.index.add_pack(name, size, entries)
    return name


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
        hint = exc.hint or "see what it affects: llmos fsck"
        raise type(exc)(f"{exc.message} (in {path})", hint=hint) from exc


@dataclass(frozen=True)
class PackContent:
    """What a pack holds. `problem` says why its index could not be read; `entries` are then the frames found in it."""

    size: int
    entries: tuple[Entry, ...]
    problem: LlmosError | None


def read_pack(path: Path) -> PackContent:
    """A pack's content from its index or, where that is damaged, from the frames themselves; NotFound if it is gone."""
    try:
        size, entries = read_pack_index(path)
    except NotFound:
        raise
    except LlmosError as exc:
        if isinstance(exc, UnknownVersion) or not isinstance(exc, Damaged):
            return PackContent(0, (), exc)
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                return PackContent(size, tuple(_salvage(path, file.fileno(), size)), exc)
        except FileNotFoundError:
            raise NotFound(f"pack {path.name} is gone") from exc
        except OSError:
            return PackContent(0, (), exc)
    return PackContent(size, entries, None)


def _salvage(path: Path, fd: int, size: int) -> Iterator[Entry]:
    """The frames that stand in a damaged pack, by their own headers. Bytes inside a payload may look like a frame, so
    each is proven by its id; a delta or an adopted chunk, whose bytes are elsewhere, only counts where a frame must
    begin."""
    at, in_step = HEADER_SIZE, True
    while at + HEADER_BYTES <= size:
        try:
            entry = entry_of(decode_header(os.pread(fd, HEADER_BYTES, at)), at)
        except Damaged:
            at, in_step = at + ALIGNMENT, False
            continue
        whole = _stands(path, entry, in_step)
        if whole:
            yield entry
        in_step = in_step or whole
        at = aligned(entry.end) if in_step else at + ALIGNMENT


def _stands(path: Path, entry: Entry, in_step: bool) -> bool:
    try:
        frame, payload = read_frame(path, entry)
        check_payload(frame, payload)
        if entry.codec in (DELTA, ADOPTED):
            return in_step
        plain = memoryview(bytearray(frame.plain_size))
        decode_payload(frame, payload, plain)
        check_id(frame, plain)
    except (Damaged, FileNotFoundError):
        return False
    return True


def list_packs(folder: Path) -> dict[ObjectId, Path]:
    """The pack files below a folder by name; whatever else lies there is passed over.

    Raises Damaged or AccessDenied for a folder that cannot be listed: that must never look like "no packs".
    """

    def refuse(exc: OSError) -> None:
        if isinstance(exc, FileNotFoundError) and exc.filename != str(folder):
            return  # removed meanwhile
        if isinstance(exc, FileNotFoundError):
            raise Damaged(f"the folder {folder} is missing", hint="restore it from a backup") from exc
        raise from_os_error(exc, f"listing {exc.filename}") from exc

    found: dict[ObjectId, Path] = {}
    for at, subfolders, files in os.walk(folder, onerror=refuse):
        subfolders.sort()
        for file in sorted(files):
            stem, suffix = os.path.splitext(file)
            if suffix == PACK_SUFFIX:
                with contextlib.suppress(Damaged):
                    found[parse_id(stem)] = Path(at, file)
    return found


def total_size(paths: Iterable[Path]) -> int:
    """The bytes of some packs; one that a gc has moved meanwhile counts nothing."""
    total = 0
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


@dataclass(frozen=True)
class Sync:
    """What `sync_index` did: packs added to the index, packs dropped from it, packs that could not be read."""

    packs: int
    dropped: int
    damaged: tuple[tuple[ObjectId, str], ...]


def sync_index(store: Store) -> Sync:
    """Bring the index in step with the packs folder. Of a damaged pack only the frames that stand are noted.

    What the index knows is durable: whoever published a pack may have died before its name was.
    """
    indexed = store.index.packs()
    present = list_packs(store.packs)
    added, dropped, damaged = 0, 0, []
    for name in indexed.keys() - present.keys():
        if not store.pack_path(name).exists():
            store.index.drop_pack(name)
            dropped += 1
    new = {name: present[name] for name in present.keys() - indexed.keys()}
    for folder in {path.parent for path in new.values()}:
        with contextlib.suppress(AccessDenied):  # a read-only file system cannot and need not
            durable.sync_folder(folder)
    batch: list[tuple[ObjectId, int, Sequence[Entry]]] = []
    for name, path in new.items():
        try:
            content = read_pack(path)
        except NotFound:
            continue
        if content.problem:
            damaged.append((name, content.problem.message))
        if content.entries:
            batch.append((name, content.size, content.entries))
            added += 1
        if sum(len(entries) for _, _, entries in batch) >= _BATCH:
            store.index.add_packs(batch)
            batch = []
    if batch:
        store.index.add_packs(batch)
    return Sync(added, dropped, tuple(damaged))


def reread_packs(store: Store) -> None:
    """Note every pack anew from its own content, in case the index is wrong about some."""
    for name, path in list_packs(store.packs).items():
        with contextlib.suppress(NotFound):
            content = read_pack(path)
            if content.entries:
                store.index.add_pack(name, content.size, content.entries)


def find_in_packs(store: Store, oid: ObjectId) -> bool:
    """Look for an object in every pack itself, in case the index is wrong about one, or altogether."""
    for name, path in list_packs(store.packs).items():
        try:
            content = read_pack(path)
        except NotFound:
            continue
        if any(entry.id == oid for entry in content.entries):
            store.index.add_pack(name, content.size, content.entries)
            if all(location.pack != name for location in store.index.locate(oid)):
                store.index.rebuild()
            return True
    return False


def restore_from_trash(store: Store, oid: ObjectId) -> bool:
    """Bring back the pack in the trash that holds an object; False if none does. Of several copies the least deep one
    comes back: what rests on the object may need it."""
    found: list[tuple[int, ObjectId, Path, PackContent]] = []
    for name, path in list_packs(store.trash).items():
        try:
            content = read_pack(path)
        except NotFound:
            continue
        found += [(entry.depth, name, path, content) for entry in content.entries if entry.id == oid]
    found.sort(key=lambda item: item[:2])
    return any(restore_pack(store, name, path, content) for _, name, path, content in found)


def restore_pack(store: Store, name: ObjectId, path: Path, content: PackContent) -> bool:
    """Move a pack from the trash back to its place; False if it has gone from there for good."""
    target = store.pack_path(name)
    durable.make_folder(target.parent)
    durable.touch(path)
    if not durable.move(path, target) and not target.exists():
        return False
    store.index.add_pack(name, content.size, content.entries)
    return True


def secure(store: Store, objects: Iterable[ObjectId], *, fresh: Set[ObjectId]) -> Set[ObjectId]:
    """Make sure that objects about to become reachable are all there, and make the packs that hold them young again.
    Returns those packs.

    `fresh` packs were just written. A delta is there if its base is, in a copy that is less deep. What a gc took
    meanwhile comes back from the trash; raises Damaged if it cannot.
    """
    packs: set[ObjectId] = set()
    lost: set[ObjectId] = set()
    problem: Damaged | None = None
    for oid in objects:  # all of them: whoever tries again must not be told of the next one only then
        try:
            _find_whole(store, oid, DEEPEST, packs, lost)
        except Damaged as exc:
            problem = problem or exc
    if problem:
        raise problem
    for pack in packs - fresh:
        durable.touch(store.pack_path(pack))
    return packs


def find_holder(store: Store, oid: ObjectId, known: Collection[ObjectId] = ()) -> ObjectId | None:
    """A pack that the index says holds an object and whose file exists; `known` ones need no look. A chunk whose
    adopted file is gone is nowhere."""
    for location in store.index.locate(oid):
        if location.entry.codec == ADOPTED and not has_adopted(store, location.entry.base):
            continue
        if location.pack in known or store.pack_path(location.pack).exists():
            return location.pack
    return None


def _find_whole(store: Store, oid: ObjectId, below: int, packs: set[ObjectId], lost: set[ObjectId]) -> None:
    """Note the packs of a copy of less than this depth and of what it rests on; brought back from the trash if they
    must be. What turns out to be `lost` is not looked for again."""
    for attempt in range(_TRIES if oid not in lost else 0):
        if any(_is_whole(store, location, packs, lost) for location in _less_deep(store, oid, below)):
            return
        sync_index(store)
        if attempt and not restore_from_trash(store, oid):
            find_in_packs(store, oid)
    lost.add(oid)
    above = [delta for delta, _, _ in store.index.resting({oid})]
    for unreadable in (oid, *above):  # what it lies in or rests on is gone: next time it must not count as stored
        for location in store.index.locate(unreadable):
            if location.entry.codec == ADOPTED or location.entry.base in lost:
                store.index.forget(unreadable, location.pack)
    raise Damaged(
        f"object {oid.short} was removed while it was being used", hint="run the command again: it will be stored anew"
    )


def _less_deep(store: Store, oid: ObjectId, below: int) -> list[Location]:
    return [location for location in store.index.locate(oid) if location.entry.depth < below]


def _is_whole(store: Store, location: Location, packs: set[ObjectId], lost: set[ObjectId]) -> bool:
    entry = location.entry
    if entry.codec == ADOPTED and not has_adopted(store, entry.base):
        return False
    if location.pack not in packs and not store.pack_path(location.pack).exists():
        return False
    if entry.depth:
        try:
            _find_whole(store, entry.base, entry.depth, packs, lost)
        except Damaged:
            return False
    packs.add(location.pack)
    return True
