"""Storing anew what time has made a bad choice: chunks from before a codec or a base was known, deltas whose base only
lives on because they rest on it, chains longer than are written today, packs that are small or partly dead.

A plan first; a pack is rewritten only if that is worth it. Then its living frames go into new packs, copied or stored
anew, and what is stored anew is decoded again before it is written. The new packs are read back and proven object by
object; only then do the old ones move to the trash, where they wait like any garbage. Stopped anywhere, this leaves
copies too many, which the next gc takes.
"""

import contextlib
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

from llmos_cli.errors import Damaged, LlmosError, NoSpace
from llmos_cli.formats import codec, limits
from llmos_cli.formats.frame import CHUNK, Frame, check_payload, encode_header, new_frame
from llmos_cli.formats.ids import NO_ID, Buffer, ObjectId
from llmos_cli.formats.pack import Entry
from llmos_cli.progress import Progress, Task
from llmos_cli.store.fsck.verify import check_pack
from llmos_cli.store.gc.choices import REPACKED, WORTH_DELTA, Choice, Chooser
from llmos_cli.store.gc.clock import check_clock
from llmos_cli.store.gc.gc import Moment, PackPlan, alone, moment, roots_now, trash_pack
from llmos_cli.store.gc.kin import tensor_chunks
from llmos_cli.store.gc.reach import named_by
from llmos_cli.store.gc.weights import Weight, staying, weigh
from llmos_cli.store.handle import Store
from llmos_cli.store.leases import hold
from llmos_cli.store.packs.frames import read_frame
from llmos_cli.store.packs.objects import read_object
from llmos_cli.store.packs.packs import PackWriter, list_packs, sync_index
from llmos_cli.store.packs.pipeline import cores

_WORTH_PACK: Final = 0.1  # of a pack must be won to rewrite it
_SMALL: Final = 0.25  # of a pack's target: packs below this are put together, if that at least halves their number
_AHEAD: Final = 2 * cores()

_Stored = tuple[Frame, Sequence[Buffer]]


@dataclass(frozen=True)
class RepackPlan:
    """`packs` are rewritten, `small` of them only to be put together; `anew` says which chunks are stored anew."""

    packs: tuple[PackPlan, ...] = ()
    anew: Mapping[ObjectId, Choice] = field(default_factory=dict)
    small: int = 0

    @property
    def moved_bytes(self) -> int:
        return sum(entry.stored_size for pack in self.packs for entry in pack.live)

    @property
    def saved_bytes(self) -> int:
        """About what the store will take less."""
        return sum(choice.saved for choice in self.anew.values()) + sum(pack.freed for pack in self.packs)


@dataclass(frozen=True)
class RepackResult:
    """Packs that have been replaced and how many took their place, the bytes before and after, chunks stored anew."""

    replaced: int = 0
    packs: int = 0
    before: int = 0
    after: int = 0
    anew: int = 0


def plan_repack(store: Store, *, grace_seconds: float | None = None, now: float | None = None) -> RepackPlan:
    """What is worth storing anew; changes nothing but the index. Raises Damaged if any root cannot be read."""
    sync_index(store)
    when = moment(store, grace_seconds, now)
    roots = roots_now(store, when.now)
    named = named_by(store, roots)
    live = named | store.index.bases(named)
    present = list_packs(store.packs)
    weights = weigh(store, live, present.keys()).packs
    free = _movable(store, when, weights)
    chooser = Chooser(store, named, free.keys())
    chooser.free_bases(store.index.resting(live))
    chooser.improve(tensor_chunks(store, roots))
    worth, small = _worth_it(free, weights, chooser)
    plans = [
        PackPlan(name, present[name], free[name], staying(store, name, weights[name], live), weights[name].dead)
        for name in worth
    ]
    anew = {oid: choice for oid, choice in chooser.choices.items() if chooser.homes[oid].pack in worth}
    return RepackPlan(tuple(plans), anew, small)


def execute_repack(store: Store, plan: RepackPlan, progress: Progress, *, now: float | None = None) -> RepackResult:
    """Carry out a plan. Raises Busy beside another gc, Unsafe if the clock cannot be trusted."""
    if not plan.packs:
        return RepackResult()
    check_clock(store, now)
    with alone(store):
        with hold(store, "repack", [], writes=True):
            writer = _Rewriter(store)
            with progress.task("repacking", total=plan.moved_bytes) as task:
                writer.write(plan, task)
            proven = _proven(store, writer.sizes, progress)
        # What was written may be, to the byte, one of the packs that it was to replace.
        replaced = writer.into.keys() - writer.sizes.keys()
        done = [pack for pack in plan.packs if pack.name in replaced and writer.into[pack.name] <= proven.keys()]
        for pack in done:
            trash_pack(store, pack)
    return RepackResult(len(done), len(proven), sum(pack.size for pack in done), sum(proven.values()), writer.anew)


def _movable(store: Store, when: Moment, weights: Mapping[ObjectId, Weight]) -> dict[ObjectId, int]:
    """The packs that may be rewritten, oldest first, and their sizes: what is dead in them is past the grace period,
    and nobody is writing them. Those of adopted chunks stay: they live as long as the file does."""
    adopted = {pack for _, pack in store.index.adopted()}
    found = []
    for name, weight in weights.items():
        if name not in adopted and weight.staying:
            with contextlib.suppress(FileNotFoundError):
                status = store.pack_path(name).stat()
                if when.is_settled(status.st_mtime) if weight.dead else status.st_mtime < when.oldest_write:
                    found.append((status.st_mtime, name, status.st_size))
    return {name: size for _, name, size in sorted(found)}


def _worth_it(
    free: Mapping[ObjectId, int], weights: Mapping[ObjectId, Weight], chooser: Chooser
) -> tuple[list[ObjectId], int]:
    """The packs to rewrite, and how many of them only because they are small."""
    won = {name: weights[name].dead for name in free}
    must = set()
    for oid, choice in chooser.choices.items():
        pack = chooser.homes[oid].pack
        won[pack] += choice.saved
        if choice.must:
            must.add(pack)
    worth = {name for name, size in free.items() if name in must or won[name] >= _WORTH_PACK * size}
    small = [name for name, size in free.items() if name not in worth and size < _SMALL * limits.PACK_TARGET_BYTES]
    needed = -(-sum(free[name] for name in small) // limits.PACK_TARGET_BYTES)
    if 2 * needed > len(small):
        small = []
    return [name for name in free if name in worth or name in small], len(small)


class _Rewriter:
    """Writes new packs. `into` says which new packs an old one went into, whole; `sizes` are those of the new ones."""

    def __init__(self, store: Store) -> None:
        self.into: dict[ObjectId, set[ObjectId]] = {}
        self.sizes: dict[ObjectId, int] = {}
        self.anew = 0
        self._store = store
        self._writer: PackWriter | None = None
        self._ids: set[ObjectId] = set()
        self._parts: defaultdict[ObjectId, set[ObjectId]] = defaultdict(set)
        self._sources: set[ObjectId] = set()  # of the pack that is being written
        self._whole: set[ObjectId] = set()

    def write(self, plan: RepackPlan, task: Task) -> None:
        """Write what a plan says; a pack that cannot be read stays, and where the disk is full the rest does."""
        try:
            for pack in plan.packs:
                try:
                    for entry, stored in self._stored(pack, plan.anew):
                        self._append(pack.name, stored)
                        task.advance(entry.stored_size)
                    self._whole.add(pack.name)
                except (Damaged, FileNotFoundError) as exc:
                    self._store.progress.warn(f"pack {pack.name.short} stays as it is: {exc}")
            self._close()
        except NoSpace as exc:
            self._store.progress.warn(f"there is no room to repack the rest: {exc.message}")
        finally:
            if self._writer:
                self._writer.discard()
                self._writer = None
                self._whole -= self._sources
        self.into = {name: self._parts[name] for name in self._whole}

    def _stored(self, pack: PackPlan, anew: Mapping[ObjectId, Choice]) -> Iterator[tuple[Entry, _Stored]]:
        """The living frames of a pack in order, those to be stored anew a few ahead on every core."""
        waiting: deque[tuple[Entry, Future[_Stored | None] | None]] = deque()

        def first() -> tuple[Entry, _Stored]:
            entry, job = waiting.popleft()
            stored = job.result() if job else None
            if stored is None:
                frame, payload = read_frame(pack.path, entry)
                check_payload(frame, payload)
                return entry, (frame, (payload,))
            self.anew += 1
            return entry, stored

        with ThreadPoolExecutor(cores(), "repack") as workers:
            try:
                for entry in pack.live:
                    choice = anew.get(entry.id) if entry.kind == CHUNK else None
                    job = workers.submit(_store_anew, self._store, entry, choice, anew) if choice else None
                    waiting.append((entry, job))
                    while len(waiting) > _AHEAD:
                        yield first()
                while waiting:
                    yield first()
            finally:
                workers.shutdown(cancel_futures=True)

    def _append(self, source: ObjectId, stored: _Stored) -> None:
        frame, parts = stored
        if self._writer and (self._writer.is_full() or frame.id in self._ids):
            self._close()
        self._writer = self._writer or PackWriter(self._store.tmp)
        self._writer.append(frame, encode_header(frame), parts)
        self._ids.add(frame.id)
        self._sources.add(source)

    def _close(self) -> None:
        if self._writer is None:
            return
        writer, self._writer = self._writer, None
        try:
            name = writer.finish()
            size = writer.size
            writer.install(self._store)
        except BaseException:
            self._whole -= self._sources
            raise
        self.sizes[name] = size
        for source in self._sources:
            self._parts[source].add(name)
        self._ids, self._sources = set(), set()


def _store_anew(store: Store, entry: Entry, choice: Choice, anew: Mapping[ObjectId, Choice]) -> _Stored | None:
    """A chunk as today's codecs store it, proven to decode again; None if what is there is not larger."""
    plain = memoryview(read_object(store, entry.id, verify_id=True))
    best, base, before = codec.encode(plain, choice.words), NO_ID, None
    if choice.base and _will_be_whole(store, choice.base, anew):
        below = memoryview(read_object(store, choice.base, verify_id=True))
        delta = codec.encode_delta(plain, below, choice.words)
        if delta.size < WORTH_DELTA * best.size:
            best, base, before = delta, choice.base, below
    if best.size >= entry.payload_size and not choice.must:
        store.index.add_facts(REPACKED, [(entry.id, choice.base or b"")])
        return None
    parts = [bytes(part) for part in best.parts]
    again = memoryview(bytearray(len(plain)))
    codec.decode(best.codec, best.width, best.rotated, memoryview(b"".join(parts)), again, before)
    if again != plain:
        raise Damaged(f"object {entry.id.short} does not come back from its new form")
    kept = codec.Encoded(best.codec, best.width, best.rotated, parts)
    return new_frame(CHUNK, entry.id, len(plain), kept, base, 1 if before else 0), parts


def _will_be_whole(store: Store, base: ObjectId, anew: Mapping[ObjectId, Choice]) -> bool:
    choice = anew.get(base)
    if choice:
        return choice.base is None
    return any(location.entry.depth == 0 for location in store.index.locate(base))


def _proven(store: Store, sizes: Mapping[ObjectId, int], progress: Progress) -> dict[ObjectId, int]:
    """The new packs of which every object has been read back and has its id."""
    proven = {}
    with progress.task("proving", total=sum(sizes.values())) as task:
        for name, size in sizes.items():
            with contextlib.suppress(LlmosError):
                checked = check_pack(store, name, store.pack_path(name), False, task)
                if not (checked.problem or checked.failures or checked.unproven):
                    proven[name] = size
    return proven
