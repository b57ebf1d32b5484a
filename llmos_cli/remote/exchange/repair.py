"""Repair: whatever refs need and the store has lost comes back from remotes, or from other stores, proven by its id.

What the store itself has is used first. A pack that is damaged here and whole there is put right in place, since its
name proves its bytes; otherwise single objects are fetched, as they are stored there or, where a delta here needs a
base that is less deep, encoded anew. Nothing is deleted, nothing is changed at the other side, and nothing becomes
visible before it is proven: stopped anywhere, this leaves a valid store and less to repair.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

from llmos_cli.errors import AccessDenied, Damaged, LlmosError, NotFound, RemoteUnavailable
from llmos_cli.formats import limits
from llmos_cli.formats.adopted import decode_place
from llmos_cli.formats.codec import ADOPTED, OPAQUE, Words, encode
from llmos_cli.formats.frame import (
    CHUNK,
    HEADER_BYTES,
    Frame,
    check_id,
    check_payload,
    decode_payload,
    encode_header,
    new_frame,
)
from llmos_cli.formats.ids import Buffer, ObjectId
from llmos_cli.formats.layout import adopted_key
from llmos_cli.formats.pack import Entry, check_entry
from llmos_cli.progress import Progress
from llmos_cli.remote.exchange.catalog import Catalog, Place, RemotePack, read_catalog
from llmos_cli.remote.exchange.fetch import BadPack, Fetch, fetch, prove_object, remote_base
from llmos_cli.remote.exchange.parallel import in_order
from llmos_cli.remote.open import Remote, find_remote, require_ready
from llmos_cli.store.fsck.fsck import FsckReport, lost_from, only_in, refs_of, report
from llmos_cli.store.fsck.mend import HERE, Repaired, evacuate
from llmos_cli.store.fsck.survey import Survey
from llmos_cli.store.handle import Store
from llmos_cli.store.leases import hold
from llmos_cli.store.packs.objects import read_object
from llmos_cli.store.packs.packs import PackWriter
from llmos_cli.store.refs.moves import correct_move, restore_move

_STREAMS: Final = 8
_READ_AHEAD_BYTES: Final = 64 * limits.MiB


@dataclass(frozen=True)
class Repair:
    """What the store is like afterwards, and what was put right."""

    report: FsckReport
    repaired: tuple[Repaired, ...]


def find_sources(store: Store, names: Sequence[str], cwd: Path) -> list[Remote]:
    """Where to repair from: `names` are remotes, URLs or folders; without any, every remote that is configured.

    Raises NotFound for a name that is none of these; a configured remote that cannot be used is passed over with a
    warning.
    """
    found = []
    for name in names or store.config.remotes:
        try:
            remote = _find(store, name, cwd)
            require_ready(remote.transport)
            found.append(remote)
        except LlmosError as exc:
            if names:
                raise
            store.progress.warn(f"remote {name} is passed over: {exc.message}")
    return found


def _find(store: Store, name: str, cwd: Path) -> Remote:
    try:
        return find_remote(store, name, cwd)
    except NotFound:
        if not (cwd / name).is_dir():
            raise
        return find_remote(store, f"./{name}", cwd)


def repair(store: Store, remotes: Sequence[Remote], *, quick: bool, progress: Progress) -> Repair:
    """Check the store as `fsck` does and put right what can be. Raises NoSpace or AccessDenied if it cannot write."""
    survey = Survey(store, quick=quick, progress=progress)
    survey.look()
    done: list[Repaired] = []
    if survey.damaged or survey.lacking() or any(log.damaged for log in survey.logs.values()):
        sources = [Source(store, remote, progress) for remote in remotes]
        with hold(store, "repair", [], writes=True):
            for step in (_mend_moves, _replace_packs, _restore_objects, _evacuate):
                done += step(survey, sources)
                survey.look()
    return Repair(report(survey), tuple(done))


class Source:
    """A remote with what it holds, as far as that has not proven wrong. One that goes away is not asked again."""

    def __init__(self, store: Store, remote: Remote, progress: Progress) -> None:
        self.label = remote.label
        self.transport = remote.transport
        self._store = store
        self.progress = progress
        self._is_gone = False
        self._catalog: Catalog | None = None

    @property
    def catalog(self) -> Catalog:
        """What it holds; nothing if it cannot be asked."""
        if self._is_gone:
            return Catalog({}, {})
        if self._catalog is None:
            try:
                self._catalog = read_catalog(self._store, self.transport, self.progress)
            except LlmosError as exc:
                self.lose(exc)
                return Catalog({}, {})
        return self._catalog

    def pass_over(self, pack: ObjectId, oid: ObjectId | None) -> None:
        """Something there has proven wrong."""
        if self._catalog and pack in self._catalog.packs:
            self._catalog = self._catalog.without(pack, oid)

    def lose(self, problem: LlmosError) -> None:
        self._is_gone = True
        self.progress.warn(f"{self.label} is passed over: {problem.message}")

    def read_move(self, key: str) -> bytes:
        return b"" if self._is_gone else self.transport.read(key, 0, limits.REF_FILE_BYTES + 1)


def _mend_moves(survey: Survey, sources: Sequence[Source]) -> Iterator[Repaired]:
    for log in survey.logs.values():
        for move in log.damaged:
            refs = (str(log.ref),)
            if correct_move(move):
                yield Repaired(move.where, "the bit that had flipped is put right", HERE, refs=refs)
                continue
            source = next((source for source in sources if restore_move(move, source.read_move)), None)
            if source:
                yield Repaired(move.where, "restored", source.label, refs=refs)


def _replace_packs(survey: Survey, sources: Sequence[Source]) -> Iterator[Repaired]:
    """Take packs whole that are damaged or gone here."""
    wanted = survey.roots | survey.lacking()
    hurt = {name: lost_from(survey, pack) | only_in(survey, pack) for name, pack in survey.damaged.items()}
    hurt |= {name: set(held & wanted) for name, held in survey.absent.items()}
    for name, known in hurt.items():
        for source in sources:
            pack = source.catalog.packs.get(name)
            needed = known | {entry.id for entry in pack.entries if entry.id in wanted} if pack else known
            if pack and needed and _take_pack(survey.store, source, pack):
                refs = refs_of(survey, needed)
                survey.look_again_at(name)
                yield Repaired(f"pack {name.short}", "restored", source.label, pack.size, refs, tuple(sorted(needed)))
                break


def _take_pack(store: Store, source: Source, pack: RemotePack) -> bool:
    """Put a pack of this name, which proves its bytes, in the place of what is here."""
    installed: dict[ObjectId, int] = {}
    try:
        with source.progress.task(f"restoring from {source.label}", total=pack.size) as task:
            fetch(store, source.transport, (Fetch(pack, pack.entries, True),), source.catalog, installed, task)
    except BadPack as exc:
        source.pass_over(exc.pack, exc.id)
    except (RemoteUnavailable, AccessDenied) as exc:
        source.lose(exc)
    except Damaged:
        source.pass_over(pack.name, None)
    return pack.name in installed


def _restore_objects(survey: Survey, sources: Sequence[Source]) -> Iterator[Repaired]:
    """Object by object, until nothing is wanted that has not been tried."""
    tried: set[ObjectId] = set()
    while wanted := survey.wanted(tried):
        tried |= wanted.keys()
        refs = {oid: survey.refs_of(oid) for oid in wanted}
        for take in (partial(_from_here, survey), *(partial(_from_source, survey, source) for source in sources)):
            for oid, size, label in take({oid: below for oid, below in wanted.items() if oid in refs}):
                yield Repaired(f"object {oid.short}", "restored", label, size, refs.pop(oid, ()), (oid,))
        survey.look()


def _evacuate(survey: Survey, _: Sequence[Source]) -> Iterator[Repaired]:
    return evacuate(survey)


_Found = tuple[Frame, bytes, Sequence[Buffer]]  # a frame, its header, its payload


class _Item(NamedTuple):
    """What to fetch: an object, the depth its copy must stay below, the bytes it takes there."""

    oid: ObjectId
    below: int
    size: int


def _from_here(survey: Survey, wanted: Mapping[ObjectId, int]) -> Iterator[tuple[ObjectId, int, str]]:
    """Bases that are there, but deeper than what rests on them may follow."""
    with _installing(survey.store) as install:
        for oid in wanted.keys() & survey.readable.keys():
            try:
                plain = read_object(survey.store, oid, verify_id=True)
            except LlmosError:
                continue
            yield oid, install(_encoded(CHUNK, oid, plain, OPAQUE)), HERE


def _from_source(survey: Survey, source: Source, wanted: Mapping[ObjectId, int]) -> Iterator[tuple[ObjectId, int, str]]:
    """What a remote can give, bases before what rests on them."""
    store, manifests = survey.store, survey.labels.keys()
    by_depth: defaultdict[int, list[_Item]] = defaultdict(list)
    waiting = dict(wanted)
    planned: set[ObjectId] = set()
    while waiting:
        oid, below = waiting.popitem()
        places = _places(source.catalog, oid, manifest=oid in manifests)
        if not places or oid in planned:
            continue
        planned.add(oid)
        entry = places[0].entry
        by_depth[entry.depth].append(_Item(oid, below, entry.stored_size))
        if entry.depth and not _has_base(store, entry) and entry.base not in planned:
            waiting[entry.base] = min(entry.depth, waiting.get(entry.base, entry.depth))
    total = sum(item.size for items in by_depth.values() for item in items)

    def take(item: _Item) -> tuple[_Item, _Found | None]:
        return item, _take(store, source, item.oid, item.below, manifest=item.oid in manifests)

    with source.progress.task(f"restoring from {source.label}", total=total or None) as task:
        for _, items in sorted(by_depth.items()):
            frames = in_order(take, items, workers=_STREAMS, limit=_READ_AHEAD_BYTES, weigh=lambda item: item.size)
            with _installing(store) as install, closing(frames):
                for item, frame in frames:
                    task.advance(item.size)
                    if frame:
                        yield item.oid, install(frame), source.label


def _take(store: Store, source: Source, oid: ObjectId, below: int, *, manifest: bool) -> _Found | None:
    """One object, proven, from wherever it lies there; None if it cannot be had."""
    catalog = source.catalog
    base_of = partial(remote_base, store, source.transport, catalog)
    for place in _places(catalog, oid, manifest=manifest):
        entry = place.entry
        try:
            if entry.codec == ADOPTED:
                return _from_adopted(source, place)
            proven = prove_object(source.transport, place, base_of)
            if entry.depth == 0 or (entry.depth < below and _has_base(store, entry)):
                return proven.frame, bytes(proven.header), (proven.payload,)
            plain = bytearray(entry.plain_size)
            decode_payload(proven.frame, proven.payload, memoryview(plain), base_of(entry))
            return _encoded(entry.kind, oid, plain, _words(proven.frame))
        except (BadPack, Damaged, NotFound):
            continue
        except LlmosError as exc:
            source.lose(exc)
            return None
    return None


def _from_adopted(source: Source, place: Place) -> _Found:
    """A chunk that another store has in an adopted file."""
    entry = place.entry
    data = memoryview(source.transport.read(place.pack.key, entry.offset, entry.end))
    frame = check_entry(entry, data[:HEADER_BYTES])
    check_payload(frame, data[HEADER_BYTES:])
    start = decode_place(data[HEADER_BYTES:]).offset
    plain = source.transport.read(adopted_key(entry.base), start, start + entry.plain_size)
    check_id(frame, plain)
    return _encoded(entry.kind, entry.id, plain, _words(frame))


def _encoded(kind: int, oid: ObjectId, plain: Buffer, words: Words) -> _Found:
    encoded = encode(memoryview(plain), words)
    frame = new_frame(kind, oid, len(plain), encoded)
    return frame, encode_header(frame), encoded.parts


def _words(frame: Frame) -> Words:
    return Words(frame.width, frame.rotated) if frame.width else OPAQUE


def _places(catalog: Catalog, oid: ObjectId, *, manifest: bool) -> list[Place]:
    """Where an object lies, the least deep copy first."""
    found = (catalog.manifest_places(oid) if manifest else ()) or catalog.places(oid)
    return sorted(found, key=lambda place: place.entry.depth)


def _has_base(store: Store, delta: Entry) -> bool:
    return any(location.entry.depth < delta.depth for location in store.index.locate(delta.base))


@contextmanager
def _installing(store: Store) -> Iterator[Callable[[_Found], int]]:
    """Hand out what writes frames into packs; they are visible when the block ends, those of full packs before."""
    writer: PackWriter | None = None

    def install(found: _Found) -> int:
        nonlocal writer
        writer = writer or PackWriter(store.tmp)
        entry = writer.append(*found)
        if writer.is_full():
            full, writer = writer, None
            full.publish(store)
        return entry.stored_size

    try:
        yield install
    except BaseException:
        if writer:
            writer.discard()
        raise
    if writer:
        writer.publish(store)
