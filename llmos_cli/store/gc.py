"""Giving space back, in two steps that each wait for the grace period: unreachable packs go to the trash, where
whoever needs them finds them again; packs that have been there long enough are unlinked.

A plan first, then its execution, which looks again before anything irreversible. Safe beside writers (their packs are
younger than their lease; what they share is brought back from the trash before they publish), readers (they look in
the trash) and servers (leases are roots). While a transaction is open nothing is unlinked. A copy of a living object
is unlinked only after another copy has been read and proven by its id.
"""

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llmos_cli.errors import Damaged, NoSpace, NotFound
from llmos_cli.formats import limits
from llmos_cli.formats.frame import check_payload, encode_header
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.pack import Entry
from llmos_cli.progress import Progress
from llmos_cli.store import durable
from llmos_cli.store.frames import read_frame, verify_frame
from llmos_cli.store.handle import Store
from llmos_cli.store.leases import hold, hold_alone, live_leases
from llmos_cli.store.orphans import Orphan, find_orphans, release_orphans
from llmos_cli.store.packs import (
    PackWriter,
    find_holder,
    list_packs,
    read_pack,
    reread_packs,
    restore_pack,
    sync_index,
)
from llmos_cli.store.reach import find_roots, reachable

_BUSY_SECONDS = 60.0  # a temporary file written to since then is somebody's, lease or not
_REWRITE_DEAD_SHARE = 0.5  # a pack is rewritten once this much of it is dead
_DAY_SECONDS = 86400.0
_HOUR_SECONDS = 3600.0


@dataclass(frozen=True)
class PackPlan:
    """What happens to one pack: `live` are the entries that stay (moved to a new pack), `freed` bytes go."""

    name: ObjectId
    path: Path
    size: int
    live: tuple[Entry, ...]
    freed: int


@dataclass(frozen=True)
class GcPlan:
    """`trash`: packs with nothing alive; `rewrite`: mostly dead ones; `unlink`: those whose time in the trash is over.

    `temporary` are leftovers of dead writers. `kept_bytes` are unreachable but younger than the grace period,
    `waiting_bytes` in the trash but not long enough. While `writers` are at work nothing is unlinked. `orphans` are
    adopted files that no pack will name any more.
    """

    trash: tuple[PackPlan, ...]
    rewrite: tuple[PackPlan, ...]
    unlink: tuple[PackPlan, ...]
    temporary: tuple[tuple[Path, int], ...]
    live_bytes: int
    kept_bytes: int
    waiting_bytes: int
    writers: int
    grace_seconds: float
    orphans: tuple[Orphan, ...] = ()

    @property
    def trashed_bytes(self) -> int:
        return sum(pack.freed for pack in (*self.trash, *self.rewrite))

    @property
    def freed_bytes(self) -> int:
        orphans = sum(orphan.size for orphan in self.orphans)
        return sum(pack.size for pack in self.unlink) + sum(size for _, size in self.temporary) + orphans


@dataclass(frozen=True)
class GcResult:
    """Bytes moved to the trash, bytes given back to the disk, packs restored because somebody needs them again, adopted
    files let go."""

    trashed_bytes: int
    freed_bytes: int
    restored: int
    released: int = 0


def plan_gc(store: Store, *, grace_seconds: float | None = None, now: float | None = None) -> GcPlan:
    """Decide what can go; changes nothing but the index. Raises Damaged if any root cannot be read."""
    now = time.time() if now is None else now
    grace = store.config.gc.grace_hours * _HOUR_SECONDS if grace_seconds is None else grace_seconds
    sync_index(store)
    writers = [lease for lease in live_leases(store) if lease.writes]
    oldest_write = min((lease.since for lease in writers), default=now)
    live = reachable(store, find_roots(store, since=now - store.config.gc.keep_days * _DAY_SECONDS))
    present = list_packs(store.packs)
    homes = _homes(store, live, present)
    if live - {oid for oid, _ in homes}:  # missing, or only from the index: what can be found must not look dead
        reread_packs(store)
        homes = _homes(store, live, present)
    all_there = not live - {oid for oid, _ in homes}
    trash, rewrite = [], []
    live_bytes = kept_bytes = 0
    for name, path in present.items():
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        entries = store.index.entries(name)
        staying = tuple(entry for entry in entries if homes.get((entry.id, entry.kind)) == name)
        staying_bytes = sum(entry.stored_size for entry in staying)
        dead_bytes = sum(entry.stored_size for entry in entries) - staying_bytes
        live_bytes += staying_bytes
        emptied = not entries and all_there  # damaged; a repair saw to it that what is needed of it is whole elsewhere
        if emptied:
            dead_bytes = status.st_size
        if not (dead_bytes or emptied):
            continue
        if now - status.st_mtime < grace or status.st_mtime >= oldest_write:
            kept_bytes += dead_bytes
        elif not staying:
            trash.append(PackPlan(name, path, status.st_size, (), status.st_size))
        elif dead_bytes >= _REWRITE_DEAD_SHARE * (dead_bytes + staying_bytes):
            rewrite.append(PackPlan(name, path, status.st_size, staying, dead_bytes))
        else:
            kept_bytes += dead_bytes
    unlink, waiting_bytes = [], 0
    for name, path in list_packs(store.trash).items():
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        if now - status.st_mtime >= grace and not writers:
            unlink.append(PackPlan(name, path, status.st_size, (), status.st_size))
        else:
            waiting_bytes += status.st_size
    gone = {pack.name for pack in (*unlink, *(trash + rewrite if grace == 0 and not writers else ()))}
    orphans = () if writers else find_orphans(store, without=gone, before=now - grace)
    temporary = tuple(_leftovers(store, now, oldest_write, grace, bool(writers)))
    return GcPlan(
        tuple(trash),
        tuple(rewrite),
        tuple(unlink),
        temporary,
        live_bytes,
        kept_bytes,
        waiting_bytes,
        len(writers),
        grace,
        orphans,
    )


def execute_gc(store: Store, plan: GcPlan, progress: Progress) -> GcResult:
    """Carry out a plan. Raises Busy if another gc runs. Crashing at any point loses nothing; the next gc goes on."""
    with _alone(store):
        trashed = 0
        with progress.task("rewriting packs", total=sum(pack.size - pack.freed for pack in plan.rewrite)) as task:
            for pack in plan.rewrite:
                if _rewrite(store, pack):
                    trashed += _trash(store, pack)
                task.advance(pack.size - pack.freed)
        trashed += sum(_trash(store, pack) for pack in plan.trash)
        freed = sum(size for path, size in plan.temporary if _remove(path))
        # A writer that is seen here may still need anything; one that is not has either moved its ref already, which
        # the marking below sees, or begins only now, when the index no longer offers it what lies in the trash.
        writing = any(lease.writes for lease in live_leases(store))
        ready = () if writing else plan.unlink + (plan.trash + plan.rewrite if plan.grace_seconds == 0 else ())
        restored = _restore_needed(store, {pack.name for pack in ready})
        for pack in ready:
            if durable.remove(store.trash / pack.path.name):
                freed += pack.freed
        released, released_bytes = release_orphans(store, plan.orphans)
        return GcResult(trashed, freed + released_bytes, restored, released)


@contextlib.contextmanager
def _alone(store: Store) -> Iterator[None]:
    """One gc at a time; but where the disk has no room even for a lease, giving space back is worth a race of two."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(NoSpace):
            stack.enter_context(hold_alone(store, "gc", "gc"))
        yield


def _homes(store: Store, live: set[ObjectId], present: Iterable[ObjectId]) -> dict[tuple[ObjectId, int], ObjectId]:
    """For each live object (and kind of frame) the one pack that keeps it; further copies are dead weight.

    The least deep copy stays: what rests on the object may need it.
    """
    homes: dict[tuple[ObjectId, int], tuple[int, ObjectId]] = {}
    for name in present:
        for entry in store.index.entries(name):
            if entry.id in live:
                key, copy = (entry.id, entry.kind), (entry.depth, name)
                homes[key] = min(homes.get(key, copy), copy)
    return {key: name for key, (_, name) in homes.items()}


def _rewrite(store: Store, plan: PackPlan) -> bool:
    """Copy the live frames of a pack into a new one; False if it stays: a frame is damaged, or the disk is full."""
    try:
        _copy_live(store, plan)
    except (Damaged, NoSpace, FileNotFoundError) as exc:
        store.progress.warn(f"pack {plan.name.short} stays as it is: {exc}")
        return False
    return True


def _copy_live(store: Store, plan: PackPlan) -> None:
    with hold(store, "gc", [], writes=True):
        writer = PackWriter(store.tmp)
        try:
            for entry in plan.live:
                frame, payload = read_frame(plan.path, entry)
                check_payload(frame, payload)
                writer.append(frame, encode_header(frame), (payload,))
        except BaseException:
            writer.discard()
            raise
        writer.publish(store)


def _trash(store: Store, pack: PackPlan) -> int:
    store.index.drop_pack(pack.name)
    durable.touch(pack.path)  # its time in the trash starts now
    return pack.freed if durable.move(pack.path, store.trash / pack.path.name) else 0


def _restore_needed(store: Store, ready: set[ObjectId]) -> int:
    """Look again: a pack leaves the trash if something alive in it is nowhere else. The other copies of what is in a
    pack that is `ready` to be unlinked are proven, and no deeper."""
    waiting = list_packs(store.trash)
    live = reachable(store, find_roots(store, since=time.time() - store.config.gc.keep_days * _DAY_SECONDS))
    whole: dict[ObjectId, int] = {}  # the depths that copies outside the trash, proven, do not exceed
    for name, path in waiting.items():
        try:
            content = read_pack(path)
        except NotFound:
            continue
        for entry in content.entries:
            if entry.id not in live or whole.get(entry.id, limits.DELTA_DEPTH + 1) <= entry.depth:
                continue
            if not (_has_whole_copy(store, entry) if name in ready else find_holder(store, entry.id)):
                restore_pack(store, name, path, content)
                break
            if name in ready:
                whole[entry.id] = entry.depth
    return sum(store.pack_path(name).exists() for name in waiting)  # reading manifests brings some back as well


def _has_whole_copy(store: Store, entry: Entry) -> bool:
    for location in store.index.locate(entry.id):
        if location.entry.depth <= entry.depth:
            with contextlib.suppress(Damaged, FileNotFoundError):
                verify_frame(store, store.pack_path(location.pack), location.entry)
                return True
    return False


def _remove(path: Path) -> bool:
    if path.is_dir() and not path.is_symlink():
        durable.remove_tree(path)
        return True
    return durable.remove(path)


def _leftovers(store: Store, now: float, oldest_write: float, grace: float, writing: bool) -> list[tuple[Path, int]]:
    """Temporary files no living transaction can own, and removed refs whose time in the trash is over."""
    found: dict[Path, int] = {}
    for folder in (store.root, store.tmp, store.leases):
        for path in folder.glob(f"{durable.TEMP_PREFIX}*"):
            with contextlib.suppress(FileNotFoundError):
                status = path.lstat()
                linked = path.suffix == durable.LINK_SUFFIX  # its times of writing are its owner's
                written = status.st_ctime if linked else status.st_mtime
                age = now - written
                if age >= _BUSY_SECONDS and written < oldest_write and (not writing or age >= _DAY_SECONDS):
                    found[path] = status.st_size
    for path in store.trash.glob("ref-*"):
        with contextlib.suppress(FileNotFoundError):
            if now - path.lstat().st_mtime >= max(grace, store.config.gc.keep_days * _DAY_SECONDS):
                found[path] = sum(child.lstat().st_size for child in path.glob("**/*"))
    return sorted(found.items())
