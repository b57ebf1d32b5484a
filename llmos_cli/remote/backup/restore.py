"""Restore: a store, or some of its refs, as a snapshot says they were: the objects, then the refs with their logs.

A ref that is not there comes back with its whole log, byte for byte; one that has stayed behind gets the moves it
lacks. One that has moved on or gone another way is only set back by force, as one more move: nothing is forgotten.
Signatures come back beside the moves they were made for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from llmos_cli.errors import Conflict, Damaged, NotFound
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.names import RefName
from llmos_cli.formats.reflog import RefEntry
from llmos_cli.formats.snapshot import Snapshot, SnapshotName
from llmos_cli.progress import Progress
from llmos_cli.remote.backup.backup import source_of
from llmos_cli.remote.backup.snapshots import choose, list_snapshots
from llmos_cli.remote.exchange.pull import PullPlan, PullResult, execute_pull, plan_manifests
from llmos_cli.remote.open import Remote
from llmos_cli.store.handle import Store
from llmos_cli.store.leases import hold
from llmos_cli.store.packs.packs import secure
from llmos_cli.store.refs.point import confirm
from llmos_cli.store.refs.refs import overwrite_ref, read_ref, ref_history, update_ref
from llmos_cli.store.refs.relog import extend_log, restore_log
from llmos_cli.store.refs.signatures import restore_signatures

NEW: Final = "new"
MOVED: Final = "moved"
FORCED: Final = "forced"
UNCHANGED: Final = "unchanged"


@dataclass(frozen=True)
class RestoredRef:
    """`status`: "new" (with its log), "moved" (it had stayed behind), "forced" or "unchanged". `moves` are those that
    it lacks, with `exactly` they are made again as they were; `current` is what it points to now."""

    ref: RefName
    id: ObjectId
    current: RefEntry | None
    status: str
    moves: tuple[RefEntry, ...]
    exactly: bool
    damaged: bool = False


@dataclass(frozen=True)
class RestorePlan:
    """What comes back from which snapshot."""

    name: SnapshotName
    snapshot: Snapshot
    refs: tuple[RestoredRef, ...]
    fetching: PullPlan


def plan_restore(store: Store, remote: Remote, refs: Sequence[RefName], at: str | None, *, force: bool) -> RestorePlan:
    """Decide what to fetch and which refs (none named: all of the snapshot) to restore.

    Raises NotFound for a ref the snapshot lacks, Conflict naming those that would not move forward.
    """
    name, snapshot = choose(list_snapshots(remote, store.progress), at, source_of(store), remote.label)
    absent = [str(ref) for ref in refs if ref not in snapshot.refs]
    if absent:
        raise NotFound(
            f"no ref {', '.join(absent)} in the snapshot of {snapshot.time} at {remote.label}",
            hint=f"see others: llmos backup {remote.label} --list, then --at TIME",
        )
    wanted = list(dict.fromkeys(refs)) or sorted(snapshot.refs)
    kept = set(snapshot.manifests)
    found = [_decide(store, ref, snapshot.refs[ref], kept) for ref in wanted]
    apart = [str(item.ref) for item in found if item.status == FORCED]
    if apart and not force:
        raise Conflict(
            f"{', '.join(apart)} has moved on from the snapshot of {snapshot.time}, or gone another way",
            hint="set it back with --force (what it holds now stays in its log), or name only the refs you want",
        )
    manifests = {item.id for item in found}
    manifests |= {oid for item in found for oid in _values(item.moves) if oid in kept}
    return RestorePlan(name, snapshot, tuple(found), plan_manifests(store, remote.transport, manifests))


def execute_restore(store: Store, remote: Remote, plan: RestorePlan, progress: Progress) -> PullResult:
    """Carry out a plan; raises Conflict if a ref here moved meanwhile."""
    with hold(store, f"restore from {remote.label}", [], writes=True):
        done = execute_pull(store, remote, plan.fetching, progress)
        objects = plan.fetching.needed.keys() | store.index.bases(set(plan.fetching.needed))
        packs = secure(store, objects, fresh=frozenset())
        conflicts: list[Conflict] = []
        for item in plan.refs:
            try:
                _restore(store, item, f"restored from {remote.label}, as of {plan.snapshot.time}")
                restore_signatures(store, item.ref, plan.snapshot.signatures.get(item.ref, ()))
            except Conflict as exc:
                conflicts.append(exc)
        confirm(store, objects, packs, ())
        if conflicts:
            raise conflicts[0]
    return done


def _decide(store: Store, ref: RefName, log: tuple[RefEntry, ...], kept: set[ObjectId]) -> RestoredRef:
    value = log[-1]
    try:
        here = read_ref(store, ref)
    except Damaged:
        return RestoredRef(ref, value.id, None, FORCED, (), False, damaged=True)
    if here is None:
        return RestoredRef(ref, value.id, None, NEW, log, True)
    if here.id == value.id:
        return RestoredRef(ref, value.id, here, UNCHANGED, (), False)
    later = tuple(move for move in log if move.sequence > here.sequence)
    if here in log and later:
        there = all(move.id in kept or store.index.has(move.id) for move in later)
        return RestoredRef(ref, value.id, here, MOVED, later, there)
    if any(here.id in (move.id, move.previous) for move in log) and not _has_held(store, ref, value.id):
        return RestoredRef(ref, value.id, here, MOVED, (), False)
    return RestoredRef(ref, value.id, here, FORCED, (), False)


def _has_held(store: Store, ref: RefName, value: ObjectId) -> bool:
    return any(value in (move.id, move.previous) for move in ref_history(store, ref))


def _restore(store: Store, item: RestoredRef, message: str) -> None:
    current = item.current.id if item.current else None
    if item.status == NEW:
        restore_log(store, item.ref, item.moves)
    elif item.status == MOVED and item.exactly:
        extend_log(store, item.moves)
    elif item.damaged:
        overwrite_ref(store, item.ref, item.id, message=message)
    elif item.status != UNCHANGED:
        update_ref(store, item.ref, item.id, expected=current, message=message)


def _values(moves: Sequence[RefEntry]) -> set[ObjectId]:
    return {oid for move in moves for oid in (move.id, move.previous) if oid}
