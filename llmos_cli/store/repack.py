"""Storing anew what time has made a bad choice: deltas whose base only lives on because they rest on it.

When a base is needed by nothing else (its ref was removed, a checkpoint was thinned out), one of the chunks that rest
on it can be stored whole and the others on that one; the base is then garbage. This is done where it takes less space,
and where a chain is longer than is written today. A plan first; it says what could be gained at most, the execution
keeps only what gains. The old copies go the way of all garbage: their packs to the trash, from where nothing is
unlinked before another copy has been proven.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from llmos_cli.errors import Damaged
from llmos_cli.formats import codec
from llmos_cli.formats.frame import CHUNK, Frame, encode_header, new_frame
from llmos_cli.formats.ids import NO_ID, Buffer, ObjectId
from llmos_cli.formats.pack import Entry
from llmos_cli.progress import Progress
from llmos_cli.store.deltas import CHAIN
from llmos_cli.store.frames import read_frame
from llmos_cli.store.handle import Store
from llmos_cli.store.index import Location
from llmos_cli.store.leases import hold
from llmos_cli.store.objects import read_object
from llmos_cli.store.packs import PackWriter

_WORTH: Final = 0.95  # of what base and deltas take together

_Stored = tuple[Frame, Sequence[Buffer]]


@dataclass(frozen=True)
class Family:
    """Deltas to be stored anew, and the bytes that they and the base they free take now."""

    deltas: tuple[Location, ...]
    size: int

    @property
    def plain_size(self) -> int:
        return sum(location.entry.plain_size for location in self.deltas)


@dataclass(frozen=True)
class RepackResult:
    """Copies that have been replaced, by pack, and the bytes that takes less once they and their bases are gone."""

    replaced: dict[ObjectId, set[ObjectId]]
    saved: int


def plan_repack(store: Store, named: Iterable[ObjectId], kept: dict[ObjectId, Location]) -> tuple[Family, ...]:
    """Families worth a try. `named` are the objects that living manifests name, `kept` the copy that stays of each."""
    named = set(named)
    resting: defaultdict[ObjectId, list[Location]] = defaultdict(list)
    deep: list[Family] = []
    for oid in sorted(named):
        location = kept.get(oid)
        if location is None or not location.entry.depth:
            continue
        if location.entry.depth > CHAIN:
            deep.append(Family((location,), 1 << 62))
        elif location.entry.base not in named:
            resting[location.entry.base].append(location)
    families = []
    for base, deltas in sorted(resting.items()):
        copies = store.index.locate(base)
        if copies:
            size = copies[0].entry.stored_size + sum(location.entry.stored_size for location in deltas)
            families.append(Family(tuple(deltas), size))
    return (*deep, *families)


def execute_repack(store: Store, families: Sequence[Family], progress: Progress) -> RepackResult:
    """Store families anew where that pays; both copies are in the store afterwards. A crash leaves that or less."""
    replaced: defaultdict[ObjectId, set[ObjectId]] = defaultdict(set)
    saved = 0
    writer: PackWriter | None = None
    total = sum(family.plain_size for family in families)
    with hold(store, "repack", [], writes=True), progress.task("repacking", total=total) as task:
        try:
            for family in families:
                try:
                    stored = _store_anew(store, family)
                except (Damaged, FileNotFoundError) as exc:
                    store.progress.warn(f"{plain_names(family)} stay as they are: {exc}")
                    continue
                finally:
                    task.advance(family.plain_size)
                size = sum(128 + frame.payload_size for frame, _ in stored)
                if size >= _WORTH * family.size:
                    continue
                for frame, parts in stored:
                    writer = writer or PackWriter(store.tmp)
                    writer.append(frame, encode_header(frame), parts)
                for location in family.deltas:
                    replaced[location.pack].add(location.entry.id)
                saved += max(0, family.size - size) if family.size < 1 << 62 else 0
                if writer and writer.is_full():
                    writer.publish(store)
                    writer = None
            if writer:
                writer.publish(store)
                writer = None
        finally:
            if writer:
                writer.discard()
    return RepackResult(dict(replaced), saved)


def plain_names(family: Family) -> str:
    return ", ".join(location.entry.id.short for location in family.deltas[:3])


def _store_anew(store: Store, family: Family) -> list[_Stored]:
    """The first whole, the others as deltas on it where that is smaller."""
    stored: list[_Stored] = []
    root: tuple[ObjectId, bytes] | None = None
    for location in family.deltas:
        entry = location.entry
        words = _words(store, location)
        plain = memoryview(read_object(store, entry.id, verify_id=True))
        encoded = codec.encode(plain, words)
        base, depth = NO_ID, 0
        if root:
            delta = codec.encode_delta(plain, root[1], words)
            if delta.size < encoded.size:
                encoded, base, depth = delta, root[0], 1
        else:
            root = entry.id, bytes(plain)
        frame = new_frame(CHUNK, entry.id, len(plain), encoded, base, depth)
        stored.append((frame, [bytes(part) for part in encoded.parts]))
    return stored


def _words(store: Store, location: Location) -> codec.Words:
    """How the chunk was read when it was stored: its delta says."""
    frame, _ = read_frame(store.pack_path(location.pack), location.entry)
    return codec.Words(frame.width, frame.rotated)


def without(entries: Iterable[Entry], replaced: set[ObjectId]) -> tuple[Entry, ...]:
    """What stays of a pack."""
    return tuple(entry for entry in entries if entry.id not in replaced)
