"""Backup: everything that refs and their kept history need goes to a remote, then one snapshot that names it.

Only what the remote lacks is sent, as in a push; refs at the remote are not touched, so one remote can serve both. The
snapshot comes last and is read back: killed before, a backup leaves packs that the next one does not send again. A gc
at the remote keeps what snapshots name. Pruning removes snapshots; their data is for that gc.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from llmos_cli.errors import Damaged, NotFound, RemoteUnavailable
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.names import RefName
from llmos_cli.formats.reflog import RefEntry
from llmos_cli.formats.snapshot import Snapshot, SnapshotName, encode_snapshot, name_snapshot
from llmos_cli.progress import Progress
from llmos_cli.remote.backup.snapshots import Found, Policy, kept_by
from llmos_cli.remote.exchange.catalog import Catalog
from llmos_cli.remote.exchange.push import PushPlan, look_again, plan_objects, send_all
from llmos_cli.remote.open import Remote, is_ready, require_ready
from llmos_cli.remote.pool.pool import read_secured
from llmos_cli.store.disk.identity import who_am_i
from llmos_cli.store.gc.reach import objects_of
from llmos_cli.store.handle import Store
from llmos_cli.store.leases import hold
from llmos_cli.store.packs.objects import read_manifest
from llmos_cli.store.packs.packs import sync_index
from llmos_cli.store.refs.moves import kept_since, unix_time
from llmos_cli.store.refs.refs import read_ref, ref_history, ref_names
from llmos_cli.store.refs.signatures import signature_files


@dataclass(frozen=True)
class BackupPlan:
    """The snapshot as it would be, and what has to be sent for it."""

    snapshot: Snapshot
    sending: PushPlan


@dataclass(frozen=True)
class BackupResult:
    """`sent` bytes in `packs` packs."""

    name: SnapshotName
    sent: int
    packs: int


def plan_backup(store: Store, remote: Remote, now: datetime | None = None) -> BackupPlan:
    """Decide what to send; raises NotFound if the store has no refs: a store that was lost and made anew must not look
    like the newest state. Raises Damaged if a ref cannot be read, or something it needs is missing."""
    ready = is_ready(remote.transport)
    sync_index(store)
    refs = {ref: log for ref in ref_names(store) if (log := _log(store, ref))}
    if not refs:
        raise NotFound(
            "nothing to back up: the store has no refs", hint=f"to get back what was lost: llmos restore {remote.label}"
        )
    needed: set[ObjectId] = set()
    manifests: set[ObjectId] = set()
    for oid in sorted({log[-1].id for log in refs.values()}):
        manifests.add(oid)
        needed.update(objects_of(oid, read_manifest(store, oid)))
    for oid in sorted(_earlier(store, refs.values()) - manifests):
        objects = _whole(store, oid)
        if objects:
            manifests.add(oid)
            needed |= objects
    catalog = read_secured(store, remote.transport, store.progress) if ready else Catalog({}, {})
    time = (now or datetime.now(UTC)).astimezone(UTC).isoformat(timespec="milliseconds")
    signed = {ref: tuple(files) for ref in refs if (files := signature_files(store, ref))}
    snapshot = Snapshot(time, source_of(store), refs, tuple(sorted(manifests)), signed)
    return BackupPlan(snapshot, plan_objects(store, catalog, (), frozenset(needed), initialise=not ready))


def execute_backup(store: Store, remote: Remote, plan: BackupPlan, progress: Progress) -> BackupResult:
    """Send, then make the snapshot; raises RemoteUnavailable if the remote does not have what it was sent."""
    sent: dict[ObjectId, int] = {}
    data = encode_snapshot(plan.snapshot)
    name = name_snapshot(plan.snapshot, data)
    transport = remote.transport
    with hold(store, f"backup to {remote.label}", plan.snapshot.manifests, writes=True):
        transport.initialise()
        require_ready(transport)
        send_all(store, remote, plan.sending, sent, progress)
        transport.create(name.key, data)
        look_again(store, remote, plan.sending, sent, progress)
        if transport.read(name.key) != data:
            raise RemoteUnavailable(f"{transport.url} does not have the snapshot it was just sent ({name.key})")
    return BackupResult(name, sum(sent.values()), len(sent))


def plan_prune(found: Sequence[Found], policy: Policy) -> list[Found]:
    """The snapshots that a policy does not keep, the oldest first."""
    kept = kept_by(policy, found)
    return [item for item in found if item[0] not in kept]


def execute_prune(remote: Remote, pruned: Sequence[Found]) -> None:
    """Remove snapshots, and nothing else."""
    for name, _ in pruned:
        remote.transport.delete(name.key)


def source_of(store: Store) -> str:
    """Whose store this is, and where; a policy prunes each source's snapshots by themselves."""
    return f"{who_am_i()}:{store.root}"


def _log(store: Store, ref: RefName) -> tuple[RefEntry, ...]:
    """A ref's moves, the oldest first; raises Damaged if none can be read."""
    moves = tuple(reversed(ref_history(store, ref)))
    if not moves:
        read_ref(store, ref)
    return moves


def _earlier(store: Store, logs: Iterable[tuple[RefEntry, ...]]) -> set[ObjectId]:
    """The values that a gc here keeps for the logs' sake."""
    since = kept_since(store)
    found: set[ObjectId] = set()
    for log in logs:
        for move in log:
            if unix_time(move.time) >= since:
                found |= {move.id} | ({move.previous} if move.previous else set())
    return found


def _whole(store: Store, oid: ObjectId) -> set[ObjectId]:
    """What an earlier value needs; nothing if it is not here any more, or never was: clones have the newest only."""
    if not store.index.has(oid):
        return set()
    try:
        objects = set(objects_of(oid, read_manifest(store, oid)))
    except Damaged:
        return set()
    return objects if all(store.index.has(item) for item in objects) else set()
