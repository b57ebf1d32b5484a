"""Pull: what a remote has and the store lacks. Manifests first, then missing frames, then refs.

A plan reads manifests only and changes nothing. Executing it fetches, proves and installs, looks elsewhere at the
remote where something proves wrong, and moves refs last. Killed at any point, it leaves whole packs that the next pull
does not ask for again.
"""

import os
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Final

from llmos_cli.errors import Conflict, Damaged, LlmosError, NoSpace, NotFound
from llmos_cli.formats import limits
from llmos_cli.formats.codec import ADOPTED
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.manifest import Manifest
from llmos_cli.formats.names import RefName
from llmos_cli.formats.pack import Entry
from llmos_cli.progress import Progress
from llmos_cli.remote.exchange.ancestry import remote_held, rests_on
from llmos_cli.remote.exchange.catalog import Catalog, Place, RemotePack, read_catalog, with_trash
from llmos_cli.remote.exchange.fetch import BadPack, Fetch, fetch, fetch_manifest
from llmos_cli.remote.exchange.known import note_refs
from llmos_cli.remote.exchange.refs import RemoteRef, list_remote_refs, read_remote_ref
from llmos_cli.remote.exchange.signed import check_signed, must_be_signed, read_remote_signatures
from llmos_cli.remote.open import Remote, require_ready
from llmos_cli.remote.transports.transport import Transport
from llmos_cli.store.handle import Store
from llmos_cli.store.leases import hold
from llmos_cli.store.packs.objects import read_manifest
from llmos_cli.store.packs.packs import secure, sync_index
from llmos_cli.store.refs.point import confirm
from llmos_cli.store.refs.refs import read_ref, update_ref
from llmos_cli.store.refs.signatures import keep_signatures

_WHOLE_SHARE: Final = 0.5  # a pack is taken whole if at least this much of it is missing here,
_TWICE_SHARE: Final = 1 / 16  # and no more of it than this is here already
_PAUSES: Final = (0.0, 0.1, 0.5)  # before looking once more, while packs come and go there
_TRIES: Final = 16  # bad packs passed over before giving up


@dataclass(frozen=True)
class PulledRef:
    """`status`: "new", "moved", "forced", "unchanged", or "ahead" (the local ref has moved on; it stays)."""

    ref: RefName
    id: ObjectId
    previous: ObjectId | None
    status: str

    @property
    def moves(self) -> bool:
        return self.status in ("new", "moved", "forced")


@dataclass(frozen=True)
class PullPlan:
    """`needed` are the objects that the refs rest on, with the plain size each must have (None: a manifest).
    `lost` are manifests that the store has only in a damaged copy; `signatures` come along, by ref; `packs` says
    whether packs may be taken whole."""

    refs: tuple[PulledRef, ...]
    needed: Mapping[ObjectId, int | None]
    lost: frozenset[ObjectId]
    fetches: tuple[Fetch, ...]
    catalog: Catalog
    signatures: Mapping[RefName, tuple[bytes, ...]] = field(default_factory=dict)
    packs: bool = True

    @property
    def total_bytes(self) -> int:
        return sum(item.size for item in self.fetches)


@dataclass(frozen=True)
class PullResult:
    """`received` bytes in `packs` new packs; `reused` objects were here already."""

    refs: tuple[PulledRef, ...]
    received: int
    packs: int
    reused: int


def plan_pull(
    store: Store, remote: Remote, refs: Sequence[RefName] | None, *, force: bool, signed: bool = False
) -> PullPlan:
    """Decide what a pull of `refs` (None: all) would fetch and move; with `signed`, or if the store's settings say so,
    only what somebody trusted has signed.

    Raises NotFound for a ref the remote lacks, Conflict naming the refs that have gone different ways on the two
    sides, Damaged if the remote cannot give all that a ref needs, Unsafe for one that should be signed and is not.
    """
    transport = remote.transport
    require_ready(transport)
    sync_index(store)
    found = _find(store, remote, refs)
    signatures = {seen.ref: read_remote_signatures(transport, seen) for seen in found}
    if signed or must_be_signed(store, remote):
        check_signed(store, remote, [(seen, signatures[seen.ref]) for seen in found])
    pulled = tuple(_decide(store, remote, seen, force=force) for seen in found)
    apart = [str(item.ref) for item in pulled if item.status == "diverged"]
    if apart:
        raise Conflict(
            f"{', '.join(apart)} has gone different ways here and at {remote.label}",
            hint=f"keep yours under another name (llmos tag {apart[0]} {apart[0]}-mine), then pull with --force",
        )
    wanted = {item.id for item in pulled if item.status != "ahead"}
    return replace(plan_manifests(store, transport, wanted, pulled), signatures=signatures)


def plan_manifests(
    store: Store, transport: Transport, manifests: Set[ObjectId], refs: tuple[PulledRef, ...] = ()
) -> PullPlan:
    """Decide what to fetch so that these manifests are here whole; raises Damaged if the remote cannot give it."""
    catalog = read_catalog(store, transport, store.progress)
    for pause in _PAUSES:  # a gc there may be at work, or was stopped before it brought back what is needed
        try:
            return _plan(store, transport, catalog, manifests, refs)
        except (Damaged, NotFound):
            time.sleep(pause)
            catalog = with_trash(store, transport, store.progress, read_catalog(store, transport, store.progress))
    return _plan(store, transport, catalog, manifests, refs)


def _plan(
    store: Store, transport: Transport, catalog: Catalog, manifests: Set[ObjectId], refs: tuple[PulledRef, ...]
) -> PullPlan:
    wanted = sorted(manifests)
    needed: dict[ObjectId, int | None] = {}
    lost = frozenset(oid for oid in wanted if _is_lost(store, oid))
    for oid in wanted:
        if store.index.has(oid) and oid not in lost:
            manifest = read_manifest(store, oid)
        else:
            manifest, catalog = _fetch_manifest(transport, catalog, oid)
        needed[oid] = None
        for entry in manifest.files:
            for chunk in entry.chunks:
                if needed.setdefault(chunk.id, chunk.size) != chunk.size and chunk.id not in wanted:
                    raise _wrong_size(chunk.id, chunk.size)
    return PullPlan(refs, needed, lost, _plan_fetches(store, transport, catalog, needed, lost), catalog)


def plan_chunks(store: Store, transport: Transport, catalog: Catalog, chunks: Mapping[ObjectId, int]) -> PullPlan:
    """Decide how to fetch these chunks of so many plain bytes, what they rest on, and nothing else."""
    fetches = _plan_fetches(store, transport, catalog, chunks, frozenset(), packs=False)
    return PullPlan((), dict(chunks), frozenset(), fetches, catalog, packs=False)


def execute_pull(store: Store, remote: Remote, plan: PullPlan, progress: Progress) -> PullResult:
    """Carry out a plan. Raises Damaged if the remote gives something wrong and has it nowhere else, Conflict if a
    local ref moved meanwhile, NoSpace before anything is fetched."""
    _check_space(store, plan)
    with hold(store, f"pull from {remote.label}", [], writes=True):
        installed = _fetch_all(store, remote, plan, progress)
        objects = plan.needed.keys() | store.index.bases(plan.needed.keys())
        packs = secure(store, objects, fresh=installed.keys())
        conflicts, moves = [], []
        for item in plan.refs:
            try:
                if item.moves:
                    message = f"pulled from {remote.label}"
                    moves.append(update_ref(store, item.ref, item.id, expected=item.previous, message=message))
            except Conflict as exc:
                conflicts.append(exc)
        confirm(store, objects, packs, moves)
        for item in plan.refs:
            current = read_ref(store, item.ref) if plan.signatures.get(item.ref) else None
            if current and current.id == item.id:
                keep_signatures(store, current, plan.signatures[item.ref])
        note_refs(store, remote, [item.ref for item in plan.refs])
        if conflicts:
            raise conflicts[0]
    missing = {entry.id for item in plan.fetches for entry in item.entries} & plan.needed.keys()
    return PullResult(plan.refs, sum(installed.values()), len(installed), len(plan.needed) - len(missing))


def _find(store: Store, remote: Remote, refs: Sequence[RefName] | None) -> list[RemoteRef]:
    if refs is None:
        return list(list_remote_refs(remote.transport, store.progress).values())
    found = []
    for ref in dict.fromkeys(refs):
        seen = read_remote_ref(remote.transport, ref, store.progress)
        if not seen.entry and not seen.problem:
            raise NotFound(
                f"no ref {ref} at {remote.label}", hint=f"pull all there is: llmos pull {remote.label} --all"
            )
        found.append(seen)
    return found


def _decide(store: Store, remote: Remote, seen: RemoteRef, *, force: bool) -> PulledRef:
    if seen.problem:
        raise seen.problem
    assert seen.entry
    there, here = seen.entry.id, read_ref(store, seen.ref)
    if here is None:
        status = "new"
    elif here.id == there:
        status = "unchanged"
    elif force:
        status = "forced"
    elif rests_on(store, here, there):
        status = "ahead"
    else:
        status = "moved" if remote_held(remote.transport, seen, here.id) else "diverged"
    return PulledRef(seen.ref, there, here.id if here else None, status)


def _is_lost(store: Store, oid: ObjectId) -> bool:
    if store.index.has(oid):
        try:
            read_manifest(store, oid)
        except Damaged as exc:
            store.progress.warn(f"{exc.message}; fetching it anew")
            return True
    return False


def _fetch_manifest(transport: Transport, catalog: Catalog, oid: ObjectId) -> tuple[Manifest, Catalog]:
    """A manifest from the remote, and the catalog less what proved wrong on the way."""
    problem: BadPack | None = None
    for place in catalog.manifest_places(oid):
        try:
            return fetch_manifest(transport, place), catalog
        except BadPack as exc:
            problem = problem or exc
            catalog = catalog.without(exc.pack, exc.id)
    raise problem.problem if problem else _absent(transport, catalog, oid)


def _plan_fetches(
    store: Store,
    transport: Transport,
    catalog: Catalog,
    needed: Mapping[ObjectId, int | None],
    lost: frozenset[ObjectId],
    *,
    packs: bool = True,
) -> tuple[Fetch, ...]:
    """Where to take what is missing from: as few packs as a greedy choice gives, whole where it pays (if `packs`)."""
    missing: dict[ObjectId, tuple[Place, ...]] = {}
    for oid, size in needed.items():
        here = [] if oid in lost else store.index.locate(oid)
        if here and size not in (None, here[0].entry.plain_size):
            raise _wrong_size(oid, size)
        if not here:
            missing[oid] = _places(transport, catalog, oid, manifest=size is None)
    weight: defaultdict[ObjectId, int] = defaultdict(int)
    for places in missing.values():
        for place in places:
            weight[place.pack.name] += place.entry.stored_size
    chosen: dict[ObjectId, Place] = {}
    waiting = dict.fromkeys(missing, limits.DELTA_DEPTH + 1)  # and the depth it must be less deep than
    while waiting:
        oid, below = waiting.popitem()
        if oid in chosen and chosen[oid].entry.depth < below:
            continue
        if oid not in missing and any(copy.entry.depth < below for copy in store.index.locate(oid)):
            continue
        places = missing.get(oid) or _places(transport, catalog, oid, manifest=False)
        place = chosen[oid] = min(places, key=lambda item: (item.entry.depth, -weight[item.pack.name], item.pack.name))
        if needed.get(oid) not in (None, place.entry.plain_size):
            raise _wrong_size(oid, needed[oid])
        if place.entry.depth >= below:
            raise _absent(transport, catalog, oid)
        if place.entry.depth:  # a delta is worth nothing without its base
            waiting[place.entry.base] = min(place.entry.depth, waiting.get(place.entry.base, place.entry.depth))
    by_pack: defaultdict[ObjectId, list[Entry]] = defaultdict(list)
    for place in chosen.values():
        by_pack[place.pack.name].append(place.entry)
    chosen_from = ((catalog.packs[name], by_pack[name]) for name in sorted(by_pack))
    return tuple(
        Fetch(pack, pack.entries, True)
        if packs and _is_worth_whole(store, pack, entries)
        else Fetch(pack, tuple(sorted(entries, key=lambda entry: entry.offset)), False)
        for pack, entries in chosen_from
    )


def _is_worth_whole(store: Store, pack: RemotePack, entries: Sequence[Entry]) -> bool:
    """Whether to take all of a pack where these entries are missing: it keeps its name, and is not asked for again."""
    if not pack.intact or any(entry.codec == ADOPTED for entry in pack.entries):
        return False
    if sum(entry.stored_size for entry in entries) < _WHOLE_SHARE * pack.size:
        return False
    missing = {entry.id for entry in entries}
    others = (entry for entry in pack.entries if entry.id not in missing)
    return sum(entry.stored_size for entry in others if store.index.has(entry.id)) <= _TWICE_SHARE * pack.size


def _places(transport: Transport, catalog: Catalog, oid: ObjectId, *, manifest: bool) -> tuple[Place, ...]:
    places = catalog.manifest_places(oid) if manifest else catalog.places(oid)
    if not places:
        raise _absent(transport, catalog, oid)
    return places


def _fetch_all(store: Store, remote: Remote, plan: PullPlan, progress: Progress) -> dict[ObjectId, int]:
    """Fetch until nothing is missing, passing over what proves wrong; returns the packs installed and their sizes."""
    transport, catalog, fetches = remote.transport, plan.catalog, plan.fetches
    installed: dict[ObjectId, int] = {}
    problem: LlmosError | None = None
    gone: Counter[ObjectId] = Counter()
    for _ in range(_TRIES):
        try:
            with progress.task(f"pulling from {remote.label}", total=sum(item.size for item in fetches)) as task:
                fetch(store, transport, fetches, catalog, installed, task)
            return installed
        except BadPack as exc:
            problem = exc.problem
            if isinstance(problem, NotFound):  # a gc there has moved things
                gone[exc.pack] += 1
                catalog, fetches = _find_again(store, transport, plan, catalog, exc.pack, gone)
            else:
                catalog = catalog.without(exc.pack, exc.id)
                try:
                    fetches = _plan_fetches(store, transport, catalog, plan.needed, plan.lost, packs=plan.packs)
                except Damaged:
                    raise problem from None
        progress.warn(f"{problem.message}; looking for what is needed elsewhere there")
    assert problem
    raise problem


def _find_again(
    store: Store, transport: Transport, plan: PullPlan, catalog: Catalog, pack: ObjectId, gone: Counter[ObjectId]
) -> tuple[Catalog, tuple[Fetch, ...]]:
    """Where to take what is still missing from, after a pack was not where it should be. It may be in the trash, or on
    its way back; at first, and after some times, it is taken for one that is listed and not there."""
    listed = pack in catalog.packs and not catalog.packs[pack].aside
    problem: Damaged | None = None
    for number, pause in enumerate(_PAUSES):
        time.sleep(pause)
        catalog = read_catalog(store, transport, store.progress)
        if listed and (number == 0 or gone[pack] >= len(_PAUSES)):
            catalog = catalog.without_pack(pack)
        catalog = with_trash(store, transport, store.progress, catalog)
        try:
            return catalog, _plan_fetches(store, transport, catalog, plan.needed, plan.lost, packs=plan.packs)
        except Damaged as exc:
            problem = exc
    assert problem
    raise problem


def _check_space(store: Store, plan: PullPlan) -> None:
    status = os.statvfs(store.root)
    free = status.f_bavail * status.f_frsize
    if plan.total_bytes > free:
        raise NoSpace(
            f"{store.root} has {free} bytes free, the pull needs {plan.total_bytes}", hint="free some space: llmos gc"
        )


def _absent(transport: Transport, catalog: Catalog, oid: ObjectId) -> Damaged:
    if oid in catalog.adopted:
        return Damaged(
            f"object {oid.short} is not at {transport.url}: it lies in a file that was adopted by that store",
            hint="push from that store to a remote: the bytes themselves are sent; then pull from there",
        )
    why = "" if not catalog.unreadable else f", where {len(catalog.unreadable)} of its packs cannot be read"
    return Damaged(
        f"object {oid.short} is missing at {transport.url}{why}", hint="push it again from a store that is whole"
    )


def _wrong_size(oid: ObjectId, size: int | None) -> Damaged:
    return Damaged(f"object {oid.short} does not have the {size} bytes that a manifest says")
