"""Push: what the store has and a remote lacks. Packs first, each one confirmed, then refs.

A plan changes nothing on either side. A pack of the store travels as it is if all it holds belongs to the refs that are
pushed and at least half of it is missing there; otherwise exactly the missing frames are copied, encoded as they are,
into packs made for the journey. Those have the same bytes whenever they are made again, so a push that was killed
does not send twice what has arrived. What a ref does not rest on never leaves the store.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from llmos_cli.errors import Conflict, Damaged
from llmos_cli.formats import limits
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.layout import pack_key
from llmos_cli.formats.names import RefName
from llmos_cli.progress import Progress
from llmos_cli.remote.exchange.ancestry import rests_on
from llmos_cli.remote.exchange.catalog import Catalog, list_remote_packs
from llmos_cli.remote.exchange.known import note_refs
from llmos_cli.remote.exchange.refs import RemoteRef, list_remote_refs, move_remote_ref, read_remote_ref
from llmos_cli.remote.exchange.send import Shipment, plan_shipments, send
from llmos_cli.remote.exchange.signed import send_signatures
from llmos_cli.remote.open import Remote, is_ready, require_ready
from llmos_cli.remote.pool.pool import read_secured
from llmos_cli.remote.transports.listing import is_published, publish
from llmos_cli.store.gc.reach import objects_of
from llmos_cli.store.handle import Store
from llmos_cli.store.leases import hold
from llmos_cli.store.packs.objects import read_manifest
from llmos_cli.store.packs.packs import sync_index
from llmos_cli.store.refs.refs import RefEntry, list_refs, read_ref
from llmos_cli.store.refs.resolve import resolve

_TRIES: Final = 3


@dataclass(frozen=True)
class PushedRef:
    """`status`: "new", "moved", "forced" or "unchanged"; `seen` is the ref as it was at the remote."""

    ref: RefName
    id: ObjectId
    seen: RemoteRef
    status: str
    message: str

    @property
    def moves(self) -> bool:
        return self.status != "unchanged"


@dataclass(frozen=True)
class PushPlan:
    """`needed` are the objects that the refs rest on, `present` those the remote has (`present_bytes` as stored there)
    and `relied_on` the packs it has them in. `initialise`: the remote is not there yet."""

    refs: tuple[PushedRef, ...]
    needed: frozenset[ObjectId]
    shipments: tuple[Shipment, ...]
    present: int
    present_bytes: int
    relied_on: frozenset[ObjectId]
    initialise: bool

    @property
    def total_bytes(self) -> int:
        return sum(item.size for item in self.shipments)


@dataclass(frozen=True)
class PushResult:
    """`sent` bytes in `packs` packs; `present` objects of `present_bytes` were there already. `signed`: signatures that
    the remote lacked."""

    refs: tuple[PushedRef, ...]
    sent: int
    packs: int
    present: int
    present_bytes: int
    signed: int = 0


def plan_push(store: Store, remote: Remote, refs: Sequence[RefName] | None, *, force: bool) -> PushPlan:
    """Decide what a push of `refs` (None: all) would send and move.

    Raises NotFound for a ref the store lacks, Conflict naming the refs whose value at the remote this store has never
    had, Damaged if an object of a ref is missing here.
    """
    local = list_refs(store) if refs is None else [_local(store, ref) for ref in dict.fromkeys(refs)]
    ready = is_ready(remote.transport)
    sync_index(store)
    pushed = tuple(_decide(store, entry, seen, force=force) for entry, seen in _pairs(store, remote, local, ready))
    apart = [str(item.ref) for item in pushed if item.status == "diverged"]
    if apart:
        raise Conflict(
            f"{', '.join(apart)} at {remote.label} has a value that this store has never had",
            hint=f"get it first: llmos pull {remote.label} {' '.join(apart)}; or replace it there: --force",
        )
    needed: set[ObjectId] = set()
    for item in pushed:
        if item.id not in needed:
            needed.update(objects_of(item.id, read_manifest(store, item.id)))
    catalog = read_secured(store, remote.transport, store.progress) if ready else Catalog({}, {})
    return plan_objects(store, catalog, pushed, frozenset(needed), initialise=not ready)


def execute_push(store: Store, remote: Remote, plan: PushPlan, progress: Progress) -> PushResult:
    """Carry out a plan. Raises Conflict if a ref there moved meanwhile (what was sent stays and is not sent again),
    RemoteUnavailable if the remote does not have what it was sent."""
    sent: dict[ObjectId, int] = {}
    with hold(store, f"push to {remote.label}", [item.id for item in plan.refs], writes=True):
        if plan.shipments or plan.initialise:
            remote.transport.initialise()
            require_ready(remote.transport)
        send_all(store, remote, plan, sent, progress)
        conflicts, signed = [], 0
        for item in plan.refs:
            try:
                current, there = item.seen.entry, item.seen.signed
                if item.moves:
                    current, there = move_remote_ref(remote.transport, item.seen, item.id, message=item.message), ()
                if current:
                    signed += send_signatures(store, remote.transport, current, there)
            except Conflict as exc:
                conflicts.append(exc)
        if sent or any(item.moves for item in plan.refs):
            look_again(store, remote, plan, sent, progress)
        if (sent or signed or any(item.moves for item in plan.refs)) and is_published(remote.transport):
            publish(store, remote.transport)
        note_refs(store, remote, [item.ref for item in plan.refs])
        if conflicts:
            raise conflicts[0]
    return PushResult(plan.refs, sum(sent.values()), len(sent), plan.present, plan.present_bytes, signed)


def _local(store: Store, ref: RefName) -> RefEntry:
    resolve(store, str(ref))
    entry = read_ref(store, ref)
    assert entry
    return entry


def _pairs(
    store: Store, remote: Remote, local: Sequence[RefEntry], ready: bool
) -> Sequence[tuple[RefEntry, RemoteRef]]:
    if not ready:
        return [(entry, RemoteRef(entry.ref)) for entry in local]
    if len(local) == 1:
        return [(local[0], read_remote_ref(remote.transport, local[0].ref, store.progress))]
    there = list_remote_refs(remote.transport, store.progress)
    return [(entry, there.get(entry.ref) or RemoteRef(entry.ref)) for entry in local]


def _decide(store: Store, entry: RefEntry, seen: RemoteRef, *, force: bool) -> PushedRef:
    if seen.problem and not force:
        raise seen.problem
    if seen.problem:
        status = "forced"
    elif seen.id is None:
        status = "new"
    elif seen.id == entry.id:
        status = "unchanged"
    elif rests_on(store, entry, seen.id):
        status = "moved"
    else:
        status = "forced" if force else "diverged"
    return PushedRef(entry.ref, entry.id, seen, status, entry.message)


def plan_objects(
    store: Store, catalog: Catalog, refs: tuple[PushedRef, ...], needed: frozenset[ObjectId], *, initialise: bool
) -> PushPlan:
    """Decide how what is `needed` and not in the catalog travels."""
    missing, relied_on = _missing(store, catalog, needed)
    places = [catalog.objects[oid][0] for oid in relied_on]
    return PushPlan(
        refs,
        needed,
        plan_shipments(store, needed | missing, missing),
        len(places),
        sum(place.entry.stored_size for place in places),
        frozenset(place.pack.name for place in places),
        initialise,
    )


def _missing(
    store: Store, catalog: Catalog, needed: frozenset[ObjectId]
) -> tuple[frozenset[ObjectId], frozenset[ObjectId]]:
    """What must be sent, bases of deltas included, and what is relied on there. A base only counts as there if its copy
    is less deep than the delta: nobody reads a chain the other way."""
    missing: set[ObjectId] = set()
    relied_on: set[ObjectId] = set()
    waiting = [(oid, limits.DELTA_DEPTH + 1) for oid in needed]
    while waiting:
        oid, below = waiting.pop()
        there = [place.entry for place in catalog.places(oid) if place.entry.depth < below]
        if oid in missing or (oid in relied_on and there):
            continue
        (relied_on if there else missing).add(oid)
        copies = there or [location.entry for location in store.index.locate(oid)[:1]]
        waiting += [(entry.base, entry.depth) for entry in copies if entry.depth]
    return frozenset(missing), frozenset(relied_on - missing)


def send_all(store: Store, remote: Remote, plan: PushPlan, sent: dict[ObjectId, int], progress: Progress) -> None:
    """Send and confirm; if a gc here has moved a pack meanwhile, its objects are looked up again."""
    for attempt in range(_TRIES):
        if not plan.shipments:
            return
        try:
            with progress.task(f"pushing to {remote.label}", total=plan.total_bytes) as task:
                send(store, remote.transport, plan.shipments, sent, task)
            return
        except FileNotFoundError as exc:
            if attempt == _TRIES - 1:
                raise Damaged(
                    f"a pack of this store is gone: {exc.filename}", hint="see what it affects: llmos fsck"
                ) from exc
            sync_index(store)
            plan = _replan(store, remote, plan)


def look_again(store: Store, remote: Remote, plan: PushPlan, sent: dict[ObjectId, int], progress: Progress) -> None:
    """A gc at the remote may have taken what nothing there needed until the refs moved: then it is sent after all.

    From here on the refs protect it, so once is enough.
    """
    unlisted = (plan.relied_on | sent.keys()) - list_remote_packs(remote.transport).keys()
    if all(remote.transport.size(pack_key(name)) is not None for name in unlisted):  # a list may be behind
        return
    send_all(store, remote, _replan(store, remote, plan), sent, progress)


def _replan(store: Store, remote: Remote, plan: PushPlan) -> PushPlan:
    catalog = read_secured(store, remote.transport, store.progress)
    return plan_objects(store, catalog, plan.refs, plan.needed, initialise=False)
