"""Giving space back at a remote, in two steps that each wait for the grace period: packs of which nothing is needed are
put aside into its trash, and what has been there long enough is removed.

Nobody needs to be kept out meanwhile. A push looks, after its refs have moved, whether the packs it relies on are
still there; a gc reads the refs after it has put packs aside, and brings back what they need. Of two that meet, one at
least sees the other: either the push sends anew what was taken, or the gc brings it back. What is removed was first
moved to a folder of this gc alone and the refs were read after that, so no other gc can have put it there meanwhile.
Readers look in the trash for what they miss.

What is young may belong to a push that has not moved its refs yet, and stays. A pack of which anything is needed stays
as a whole: nothing is rewritten far away. In a pool all nodes must be at hand, and a pack that has too few copies does
not count as a place where something is.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Set
from dataclasses import dataclass
from functools import partial
from typing import Final
from uuid import uuid4

from llmos_cli.errors import Damaged, NotFound, UnknownVersion, Unsafe
from llmos_cli.formats import limits
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.layout import PACKS, TRASH, pack_key, trash_key
from llmos_cli.progress import Progress
from llmos_cli.remote.exchange.catalog import Catalog, Place, RemotePack, parse_pack, read_catalog, with_trash
from llmos_cli.remote.exchange.fetch import BadPack, prove_object, remote_base
from llmos_cli.remote.gc.clock import check_times, remote_now
from llmos_cli.remote.gc.reach import Roots, find_roots, named_by
from llmos_cli.remote.open import Remote, require_ready
from llmos_cli.remote.pool.pool import PoolTransport
from llmos_cli.remote.transports.listing import is_published, publish
from llmos_cli.remote.transports.transport import Dated, Transport
from llmos_cli.store.handle import Store
from llmos_cli.store.packs.frames import BaseReader
from llmos_cli.store.packs.packs import sync_index

_HOUR_SECONDS: Final = 3600.0
_DAY_SECONDS: Final = 86400.0
_TRIES: Final = 3
_NOWHERE: Final = limits.DELTA_DEPTH + 1


@dataclass(frozen=True)
class RemoteGcPlan:
    """`trash`: packs to be put aside; `back`: those aside that are needed; `unlink`: those aside whose time is over.

    `kept_bytes` are not needed but young, or in packs that are needed in part; `waiting_bytes` are aside and not long
    enough. `unreadable` packs stay. `missing`: objects that refs need and that are nowhere. While `writers` work in the
    remote as in a store nothing is removed.
    """

    trash: tuple[Dated, ...]
    back: tuple[Dated, ...]
    unlink: tuple[Dated, ...]
    live_bytes: int
    kept_bytes: int
    waiting_bytes: int
    unreadable: int
    missing: int
    writers: int
    grace_seconds: float

    @property
    def trashed_bytes(self) -> int:
        return sum(item.size for item in self.trash)

    @property
    def freed_bytes(self) -> int:
        at_once = self.trashed_bytes if self.grace_seconds == 0 and not self.writers else 0
        return at_once + sum(item.size for item in self.unlink)


@dataclass(frozen=True)
class RemoteGcResult:
    """Bytes put aside and removed, packs that were brought back because somebody needs them."""

    trashed_bytes: int
    freed_bytes: int
    restored: int


@dataclass(frozen=True)
class _Seen:
    """A remote as it was at one moment. `catalog` holds the packs that can be relied on, `everything` the others and
    the trash too; `packs` and `aside` are what is listed. `named` are the objects that roots name."""

    catalog: Catalog
    everything: Catalog
    packs: tuple[Dated, ...]
    aside: tuple[Dated, ...]
    roots: Roots
    named: frozenset[bytes]


def plan_remote_gc(
    store: Store, remote: Remote, *, grace_seconds: float | None = None, now: float | None = None
) -> RemoteGcPlan:
    """Decide what can go there; changes nothing. `now` is the time at the remote, that of this machine by default.
    Raises Damaged if something that keeps objects alive cannot be read, Unsafe if there is no such thing at all."""
    require_ready(remote.transport)
    sync_index(store)
    now = time.time() if now is None else now
    grace = store.config.gc.grace_hours * _HOUR_SECONDS if grace_seconds is None else grace_seconds
    seen = _look(store, remote.transport, now)
    if seen.packs and not seen.roots.found:
        raise Unsafe(
            f"{remote.label} has packs, and no ref or snapshot: a gc would take everything",
            hint="is it the right remote? if so, remove its folder or bucket itself",
        )

    def is_young(item: Dated) -> bool:
        return grace > 0 and now - item.time < grace

    living, back = _needed(seen, young=is_young)
    going, kept = [], 0
    for item in seen.packs:
        pack = seen.everything.packs.get(_name(item))
        if pack is None or any(entry.id in living for entry in pack.entries):
            kept += _dead_bytes(pack, living)
        elif is_young(item):
            kept += item.size
        else:
            going.append(item)
    idle = not seen.roots.writers
    waiting = [item for item in seen.aside if item not in back and _name(item) in seen.everything.packs]
    unlink = [item for item in waiting if idle and not is_young(item)]
    held = {entry.id for pack in seen.everything.packs.values() for entry in pack.entries}
    return RemoteGcPlan(
        tuple(going),
        tuple(back),
        tuple(unlink),
        sum(entry.stored_size for pack in seen.catalog.packs.values() for entry in pack.entries if entry.id in living),
        kept,
        sum(item.size for item in waiting) - sum(item.size for item in unlink),
        len(seen.everything.unreadable),
        len(seen.named - held),
        seen.roots.writers,
        grace,
    )


def execute_remote_gc(
    store: Store, remote: Remote, plan: RemoteGcPlan, progress: Progress, *, now: float | None = None
) -> RemoteGcResult:
    """Carry out a plan; `now` is the time here. Raises Unsafe if the clock there cannot be trusted. Stopped at any
    point it loses nothing; the next one goes on."""
    transport = remote.transport
    there = remote_now(transport, now)
    with progress.task(f"putting packs aside at {remote.label}", total=len(plan.trash)) as task:
        trashed = 0
        for item in plan.trash:
            trashed += item.size if _move(transport, item.key, trash_key(_name(item))) else 0
            task.advance()
    at_once = plan.trash if plan.grace_seconds == 0 and not plan.writers else ()
    folder = f"{TRASH}/gc-{uuid4().hex}"
    aside: set[str] = set()
    for key in [*(item.key for item in plan.unlink), *(trash_key(_name(item)) for item in at_once)]:
        to = f"{folder}/{key.rpartition('/')[2]}"
        if _move(transport, key, to):
            aside.add(to)
    restored: set[ObjectId] = set()
    freed, again = _settle(store, transport, aside, there, restored)
    for _ in range(_TRIES):
        if not again:
            break
        more, again = _settle(store, transport, aside, there, restored)
        freed += more
    if (trashed or restored) and is_published(transport):
        publish(store, transport)
    return RemoteGcResult(trashed, freed, len(restored))


def _settle(
    store: Store, transport: Transport, going: Set[str], now: float, restored: set[ObjectId]
) -> tuple[int, bool]:
    """Read the refs anew: bring back what they need, and remove the rest of what is `going`. Returns the bytes removed,
    and whether another gc was faster with something, so that this must be done again."""
    seen = _look(store, transport, now)
    if seen.roots.writers:
        going = frozenset()
    living, needed = _needed(seen, young=lambda item: True)
    freed, again = 0, False
    for item in seen.aside:
        if item in needed or (item.key in going and not _is_elsewhere(store, transport, seen, item, living)):
            try:
                transport.bring_back(item.key, pack_key(_name(item)))
                restored.add(_name(item))
            except NotFound:
                again = True
        elif item.key in going:
            transport.delete(item.key)
            freed += item.size
    return freed, again


def _needed(seen: _Seen, *, young: Callable[[Dated], bool]) -> tuple[set[bytes], list[Dated]]:
    """The objects that are needed, and what must come back for them. What stays must stay readable, needed or not:
    whoever finds an object there does not send it again. So the bases of all deltas in packs that stay are needed."""
    depths: dict[bytes, int] = {}  # the least one of a copy that can be relied on
    bases: defaultdict[bytes, set[ObjectId]] = defaultdict(set)
    for name, pack in seen.everything.packs.items():
        for entry in () if pack.aside else pack.entries:
            if name in seen.catalog.packs:
                depths[entry.id] = min(entry.depth, depths.get(entry.id, entry.depth))
            if entry.depth:
                bases[entry.id].add(entry.base)
    living: set[bytes] = set()
    back: list[Dated] = []
    listed = [(item, seen.everything.packs[_name(item)]) for item in seen.packs if _name(item) in seen.everything.packs]
    aside = [(item, seen.everything.packs[_name(item)]) for item in seen.aside if _name(item) in seen.everything.packs]
    waiting: set[bytes] = set(seen.named)
    while waiting:
        while waiting:
            oid = waiting.pop()
            living.add(oid)
            waiting |= bases.get(oid, set()) - living
        for item, pack in listed:
            if young(item) or any(entry.id in living for entry in pack.entries):
                waiting |= {entry.base for entry in pack.entries if entry.depth} - living
        for item, pack in () if waiting else aside:
            if any(entry.id in living and depths.get(entry.id, _NOWHERE) > entry.depth for entry in pack.entries):
                back.append(item)
                for entry in pack.entries:
                    depths[entry.id] = min(entry.depth, depths.get(entry.id, entry.depth))
                waiting |= {entry.base for entry in pack.entries if entry.depth} - living
    return living, back


def _is_elsewhere(store: Store, transport: Transport, seen: _Seen, item: Dated, living: Set[bytes]) -> bool:
    """Whether of all that is needed of a pack another copy has been read and proven, on which the same can rest."""
    base_of = partial(remote_base, store, transport, seen.catalog)
    for entry in seen.everything.packs[_name(item)].entries:
        if entry.id in living and not any(
            place.entry.depth <= entry.depth and _is_proven(transport, place, base_of)
            for place in seen.catalog.places(entry.id)
        ):
            return False
    return True


def _is_proven(transport: Transport, place: Place, base_of: BaseReader) -> bool:
    try:
        prove_object(transport, place, base_of)
    except (BadPack, Damaged, NotFound):
        return False
    return True


def _look(store: Store, transport: Transport, now: float) -> _Seen:
    """What is there, and what is needed of it; looked at again where what a ref needs has come or gone meanwhile."""
    for _ in range(_TRIES):
        try:
            return _glance(store, transport, now)
        except UnknownVersion:
            raise
        except Damaged:
            continue
    return _glance(store, transport, now)


def _glance(store: Store, transport: Transport, now: float) -> _Seen:
    """Refs before packs: what they needed then can be seen."""
    keep = store.config.gc.keep_days * _DAY_SECONDS
    roots = find_roots(transport, now=now, keep_seconds=keep)
    here = read_catalog(store, transport, store.progress)
    everything = with_trash(store, transport, store.progress, here)
    named = named_by(store, transport, everything, roots.found)
    packs = tuple(item for item in transport.dated(f"{PACKS}/") if _is_pack(item.key))
    aside = tuple(item for item in transport.dated(f"{TRASH}/") if parse_pack(item.key))
    check_times(transport, [*packs, *aside], now)
    return _Seen(_relied_on(transport, here), everything, packs, aside, roots, frozenset(named))


def _relied_on(transport: Transport, catalog: Catalog) -> Catalog:
    if isinstance(transport, PoolTransport):
        for name in [name for name in catalog.packs if transport.lacks_copies(name)]:
            catalog = catalog.without_pack(name)
    return catalog


def _move(transport: Transport, key: str, to: str) -> bool:
    """Put something aside; False if somebody was faster."""
    try:
        transport.set_aside(key, to)
    except NotFound:
        return False
    return True


def _is_pack(key: str) -> bool:
    name = parse_pack(key)
    return name is not None and key == pack_key(name)


def _name(item: Dated) -> ObjectId:
    name = parse_pack(item.key)
    assert name
    return name


def _dead_bytes(pack: RemotePack | None, living: Set[bytes]) -> int:
    return sum(entry.stored_size for entry in pack.entries if entry.id not in living) if pack else 0
