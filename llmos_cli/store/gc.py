"""Giving space back, in two steps that each wait for the grace period: unreachable packs go to the trash, where
whoever needs them finds them again; packs that have been there long enough are unlinked.

A plan first, then its execution, which looks again before anything irreversible. Safe beside writers (their packs are
younger than their lease; what they share is brought back from the trash before they publish), readers (they look in
the trash) and servers (leases are roots). While a transaction is open nothing is unlinked.
"""

import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from llmos_cli.formats.frame import encode_header
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.pack import Entry
from llmos_cli.progress import Progress
from llmos_cli.store import durable
from llmos_cli.store.handle import Store
from llmos_cli.store.leases import hold, hold_alone, live_leases
from llmos_cli.store.packs import PackWriter, list_packs, read_frame, read_pack_index, sync_index
from llmos_cli.store.reach import find_roots, reachable

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
    `waiting_bytes` in the trash but not long enough. While `writers` are at work nothing is unlinked.
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

    @property
    def trashed_bytes(self) -> int:
        return sum(pack.freed for pack in (*self.trash, *self.rewrite))

    @property
    def freed_bytes(self) -> int:
        return sum(pack.size for pack in self.unlink) + sum(size for _, size in self.temporary)


@dataclass(frozen=True)
class GcResult:
    """Bytes moved to the trash, bytes given back to the disk, packs restored because somebody needs them again."""

    trashed_bytes: int
    freed_bytes: int
    restored: int


def plan_gc(store: Store, *, grace_seconds: float | None = None, now: float | None = None) -> GcPlan:
    """Decide what can go; changes nothing but the index. Raises Damaged if any root cannot be read."""
    now = time.time() if now is None else now
    grace = store.config.gc.grace_hours * _HOUR_SECONDS if grace_seconds is None else grace_seconds
    sync_index(store)
    writers = [lease for lease in live_leases(store) if lease.writes]
    oldest_write = min((lease.since for lease in writers), default=now)
    live = reachable(store, find_roots(store, since=now - store.config.gc.keep_days * _DAY_SECONDS))
    present = list_packs(store.packs)
    homes = _homes(store, live, set(present))
    trash, rewrite = [], []
    live_bytes = kept_bytes = 0
    for name, path in present.items():
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        entries = store.index.entries(name)
        staying = tuple(entry for entry in entries if homes.get(entry.id) == name)
        staying_bytes = sum(entry.stored_size for entry in staying)
        dead_bytes = sum(entry.stored_size for entry in entries) - staying_bytes
        live_bytes += staying_bytes
        if not dead_bytes or not entries:
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
        status = path.stat()
        if now - status.st_mtime >= grace and not writers:
            unlink.append(PackPlan(name, path, status.st_size, (), status.st_size))
        else:
            waiting_bytes += status.st_size
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
    )


def execute_gc(store: Store, plan: GcPlan, progress: Progress) -> GcResult:
    """Carry out a plan. Raises Busy if another gc runs. Crashing at any point loses nothing; the next gc goes on."""
    with hold_alone(store, "gc", "gc"):
        with progress.task("rewriting packs", total=sum(pack.size - pack.freed for pack in plan.rewrite)) as task:
            for pack in plan.rewrite:
                _rewrite(store, pack)
                task.advance(pack.size - pack.freed)
        for pack in (*plan.trash, *plan.rewrite):
            store.index.drop_pack(pack.name)
            durable.touch(pack.path)  # its time in the trash starts now
            durable.move(pack.path, store.trash / pack.path.name)
        restored = _restore_needed(store)
        freed = 0
        if not any(lease.writes for lease in live_leases(store)):
            now_ready = (*plan.unlink, *(plan.trash + plan.rewrite if plan.grace_seconds == 0 else ()))
            for pack in now_ready:
                if durable.remove(store.trash / pack.path.name):
                    freed += pack.freed
        for path, size in plan.temporary:
            if path.is_dir():
                durable.remove_tree(path)
                freed += size
            elif durable.remove(path):
                freed += size
        return GcResult(plan.trashed_bytes, freed, restored)


def _homes(store: Store, live: set[ObjectId], present: set[ObjectId]) -> dict[ObjectId, ObjectId]:
    """For each live object the one pack that keeps it; further copies are dead weight."""
    homes: dict[ObjectId, ObjectId] = {}
    for name in sorted(present):
        for entry in store.index.entries(name):
            if entry.id in live:
                homes.setdefault(entry.id, name)
    return homes


def _rewrite(store: Store, plan: PackPlan) -> None:
    """Copy the live frames of a pack, as they are, into a new one."""
    with hold(store, "gc", [], writes=True):
        writer = PackWriter(store.tmp)
        try:
            for entry in plan.live:
                frame, payload = read_frame(plan.path, entry)
                writer.append(frame, encode_header(frame), (payload,))
        except BaseException:
            writer.discard()
            raise
        writer.publish(store)


def _restore_needed(store: Store) -> int:
    """Look again: whatever became reachable while we worked leaves the trash."""
    live = reachable(store, find_roots(store, since=time.time() - store.config.gc.keep_days * _DAY_SECONDS))
    missing = {oid for oid in live if not store.index.has(oid)}
    if not missing:
        return 0
    restored = 0
    for name, path in list_packs(store.trash).items():
        size, entries = read_pack_index(path)
        if any(entry.id in missing for entry in entries):
            target = store.pack_path(name)
            durable.make_folder(target.parent)
            durable.touch(path)
            if durable.move(path, target):
                store.index.add_pack(name, size, entries)
                restored += 1
    return restored


def _leftovers(store: Store, now: float, oldest_write: float, grace: float, writing: bool) -> list[tuple[Path, int]]:
    """Temporary files no living transaction can own, and removed refs whose time in the trash is over."""
    found: dict[Path, int] = defaultdict(int)
    for folder in (store.tmp, store.leases):
        for path in folder.glob(f"{durable.TEMP_PREFIX}*"):
            status = path.lstat()
            if status.st_mtime < oldest_write and (not writing or now - status.st_mtime >= _DAY_SECONDS):
                found[path] = status.st_size
    for path in store.trash.glob("ref-*"):
        if now - path.lstat().st_mtime >= max(grace, store.config.gc.keep_days * _DAY_SECONDS):
            found[path] = sum(child.lstat().st_size for child in path.glob("**/*"))
    return sorted(found.items())
