"""What a remote holds: its packs and, from their footers, its objects.

A pack that the local store has too, whole, is not asked for: content names make the local index its cache.
The ends of the others are read in parallel; of a remote that is slow to ask they are remembered (remembered.py).
"""

from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

from llmos_cli.errors import Damaged, NotFound
from llmos_cli.formats.codec import ADOPTED
from llmos_cli.formats.frame import MANIFEST
from llmos_cli.formats.ids import ObjectId, parse_id
from llmos_cli.formats.layout import PACK_SUFFIX, PACKS, TRASH, pack_key
from llmos_cli.formats.pack import ENTRY_SIZE, HEADER_SIZE, TRAILER_SIZE, Entry, read_index
from llmos_cli.progress import Progress
from llmos_cli.remote.exchange.parallel import in_order
from llmos_cli.remote.exchange.remembered import Memory, recall
from llmos_cli.remote.transports.transport import Transport
from llmos_cli.store.handle import Store

_STREAMS: Final = 8
_END_BYTES: Final = 8192  # read at once: index and trailer of most packs


@dataclass(frozen=True)
class RemotePack:
    """A pack at a remote. `intact` is False once something in it has proven wrong: it is not taken as a whole. `aside`
    is where it lies if that is the trash."""

    name: ObjectId
    size: int
    entries: tuple[Entry, ...]
    intact: bool = True
    aside: str = ""

    @property
    def key(self) -> str:
        return self.aside or pack_key(self.name)


@dataclass(frozen=True)
class Place:
    """Where an object can be had."""

    pack: RemotePack
    entry: Entry


@dataclass(frozen=True)
class Catalog:
    """`unreadable` are packs whose index cannot be read, by name with the reason; what they hold does not count."""

    packs: Mapping[ObjectId, RemotePack]
    unreadable: Mapping[ObjectId, str]

    @cached_property
    def objects(self) -> Mapping[ObjectId, tuple[Place, ...]]:
        found: dict[ObjectId, tuple[Place, ...]] = {}
        for name in sorted(self.packs):
            pack = self.packs[name]
            for entry in pack.entries:
                if entry.codec != ADOPTED:
                    found[entry.id] = (*found.get(entry.id, ()), Place(pack, entry))
        return found

    @cached_property
    def adopted(self) -> frozenset[ObjectId]:
        """Objects that packs list but that cannot be had here: their bytes lie in files that a store has adopted."""
        listed = (entry for pack in self.packs.values() for entry in pack.entries)
        return frozenset(entry.id for entry in listed if entry.codec == ADOPTED) - self.objects.keys()

    def places(self, oid: ObjectId) -> tuple[Place, ...]:
        return self.objects.get(oid, ())

    def manifest_places(self, oid: ObjectId) -> tuple[Place, ...]:
        return tuple(place for place in self.places(oid) if place.entry.kind == MANIFEST)

    def without_pack(self, pack: ObjectId) -> "Catalog":
        return replace(self, packs={name: other for name, other in self.packs.items() if name != pack})

    def without(self, pack: ObjectId, oid: ObjectId | None) -> "Catalog":
        """The catalog after `pack` has proven wrong: in one object, or (None) only as a whole."""
        damaged = self.packs[pack]
        left = tuple(entry for entry in damaged.entries if entry.id != oid)
        return replace(self, packs={**self.packs, pack: replace(damaged, entries=left, intact=False)})


def read_catalog(store: Store, transport: Transport, progress: Progress) -> Catalog:
    """List a remote's packs and read what they hold; packs that cannot be read are left out with a warning."""
    listed = list_remote_packs(transport)
    memory = recall(store, transport)
    catalog = _read(store, transport, progress, listed, memory)
    memory.save(listed)
    return catalog


def with_trash(store: Store, transport: Transport, progress: Progress, catalog: Catalog) -> Catalog:
    """The catalog and, of what a gc there has put aside, the packs that it lacks: until they are unlinked they can be
    read."""
    aside = {name: item for name, item in list_trash(transport).items() if name not in catalog.packs}
    if not aside:
        return catalog
    listed = {name: size for name, (_, size) in aside.items()}
    keys = {name: key for name, (key, _) in aside.items()}
    found = _read(store, transport, progress, listed, recall(store, transport), keys)
    return replace(catalog, packs={**found.packs, **catalog.packs})


def list_trash(transport: Transport) -> dict[ObjectId, tuple[str, int]]:
    """The packs that lie aside at a remote: key and size."""
    found = ((key, size, parse_pack(key)) for key, size in transport.list(f"{TRASH}/"))
    return {name: (key, size) for key, size, name in found if name}


def _read(
    store: Store,
    transport: Transport,
    progress: Progress,
    listed: Mapping[ObjectId, int],
    memory: Memory,
    keys: Mapping[ObjectId, str] | None = None,
) -> Catalog:
    known, aside = store.index.packs(), keys or {}
    packs: dict[ObjectId, RemotePack] = {}
    unknown: list[tuple[ObjectId, int]] = []
    for name, size in listed.items():
        entries = tuple(store.index.entries(name)) if known.get(name) == size else ()
        if not entries or not _is_whole(size, entries):
            entries = memory.entries(name, size) or ()
        if entries:
            packs[name] = RemotePack(name, size, entries, aside=aside.get(name, ""))
        else:
            unknown.append((name, size))

    def read(item: tuple[ObjectId, int]) -> RemotePack | tuple[ObjectId, str] | None:
        try:
            return read_remote_pack(transport, *item, memory, aside.get(item[0], ""))
        except NotFound:
            return None  # a gc there took it
        except Damaged as exc:
            return item[0], exc.message

    unreadable: dict[ObjectId, str] = {}
    with closing(in_order(read, unknown, workers=_STREAMS)) as found:
        for item in found:
            if isinstance(item, RemotePack):
                packs[item.name] = item
            elif item:
                unreadable[item[0]] = item[1]
    for reason in unreadable.values():
        progress.warn(reason)
    return Catalog(packs, unreadable)


def read_remote_pack(
    transport: Transport, name: ObjectId, size: int, memory: Memory | None = None, aside: str = ""
) -> RemotePack:
    """One pack's index, by range reads; raises Damaged naming pack and remote, NotFound if it is gone.

    What does not read is asked for a second time: it may have been spoiled on the way.
    """
    key = aside or pack_key(name)
    try:
        end = _End(transport, key, size)
        entries = read_index(end.read, size)
    except Damaged:
        try:
            end = _End(transport, key, size)
            entries = read_index(end.read, size)
        except Damaged as exc:
            raise type(exc)(f"{exc.message} ({key} at {transport.url})", hint=exc.hint) from exc
    if memory:
        memory.note(name, size, end.index_and_trailer(len(entries)))
    return RemotePack(name, size, entries, aside=aside)


class _End:
    """A pack as `read_index` reads it: its end in one request, what lies before in more."""

    def __init__(self, transport: Transport, key: str, size: int) -> None:
        self._transport = transport
        self._key = key
        self._first = max(0, size - _END_BYTES)
        self._data = transport.read(self._key, self._first, size)
        self._longer = b""

    def read(self, start: int, stop: int) -> bytes:
        if start >= self._first:
            return self._data[start - self._first : stop - self._first]
        self._longer = self._transport.read(self._key, start, stop)
        return self._longer

    def index_and_trailer(self, entries: int) -> bytes:
        length = entries * ENTRY_SIZE + TRAILER_SIZE
        return self._data[-length:] if length <= len(self._data) else self._longer + self._data[-TRAILER_SIZE:]


def list_remote_packs(transport: Transport) -> dict[ObjectId, int]:
    """The packs at a remote and their sizes; whatever else lies there is passed over."""
    return dict(_packs(transport.list(f"{PACKS}/")))


def _is_whole(size: int, entries: tuple[Entry, ...]) -> bool:
    """Whether these are all the entries of a pack: the local index forgets what has proven damaged here."""
    return size == HEADER_SIZE + sum(entry.stored_size for entry in entries) + TRAILER_SIZE


def _packs(listing: Iterable[tuple[str, int]]) -> Iterable[tuple[ObjectId, int]]:
    for key, size in listing:
        name = parse_pack(key)
        if name and key == pack_key(name):
            yield name, size


def parse_pack(key: str) -> ObjectId | None:
    """The pack that a key says it is, wherever it lies; None for anything else."""
    stem = key.rpartition("/")[2].removesuffix(PACK_SUFFIX)
    try:
        return parse_id(stem) if key.endswith(PACK_SUFFIX) else None
    except Damaged:
        return None
