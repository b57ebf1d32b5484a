"""Giving space back, in two steps that each wait for the grace period: unreachable packs go to the trash, where
whoever needs them finds them again; packs that have been there long enough are unlinked.

A plan first, then its execution, which looks again before anything irreversible. Safe beside writers (their packs are
younger than their lease; what they share is brought back from the trash before they publish), readers (they look in
the trash) and servers (leases are roots). While a transaction is open nothing is unlinked. A copy of a living object
is unlinked only after another copy has been read and proven by its id.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from llmos_cli.errors import Damaged, NoSpace, NotFound
from llmos_cli.formats.frame import check_payload, encode_header
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.pack import Entry
from llmos_cli.progress import Progress
from llmos_cli.store.disk import durable
from llmos_cli.store.gc.clock import check_clock
from llmos_cli.store.gc.orphans import Orphan, find_orphans, release_orphans
from llmos_cli.store.gc.reach import Root, find_roots, reachable
from llmos_cli.store.gc.weights import Weight, staying, weigh
from llmos_cli.store.handle import Store
from llmos_cli.store.leases import hold, hold_alone, live_leases
from llmos_cli.store.packs.chains import DEEPEST
from llmos_cli.store.packs.frames import read_frame, verify_frame
from llmos_cli.store.packs.packs import (
    PackWriter,
    find_holder,
    list_packs,
    read_pack,
    reread_packs,
    restore_pack,
    sync_index,
)
from llmos_cli.store.packs.partials import old_partials

_ASIDE = "gc-"  # folders of the trash, each of one gc
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
    def unreachable_bytes(self) -> int:
        """What nothing needs, in packs and in the trash, whether or not it may go now."""
        return self.trashed_bytes + self.kept_bytes + self.waiting_bytes + sum(pack.size for pack in self.unlink)

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


@dataclass(frozen=True)
class Moment:
    """When a plan is made, and what counts as old then: past the grace period, and from before any open transaction."""

    now: float
    grace: float
    oldest_write: float
    writers: int

    def is_settled(self, written: float) -> bool:
        return self.now - written >= self.grace and written < self.oldest_write


def moment(store: Store, grace_seconds: float | None, now: float | None) -> Moment:
    """Look at the clock and at who is writing."""
    now = time.time() if now is None else now
    grace = store.config.gc.grace_hours * _HOUR_SECONDS if grace_seconds is None else grace_seconds
    writers = [lease for lease in live_leases(store) if lease.writes]
    return Moment(now, grace, min((lease.since for lease in writers), default=now), len(writers))


def roots_now(store: Store, now: float) -> list[Root]:
    """What keeps objects alive now."""
    return find_roots(store, since=now - store.config.gc.keep_days * _DAY_SECONDS)


def living(store: Store, now: float) -> set[bytes]:
    """Every object that is needed now. Raises Damaged if any root cannot be read."""
    return reachable(store, roots_now(store, now))


def is_worth_a_rewrite(weight: Weight) -> bool:
    """Whether so much of a pack is dead that an ordinary gc copies the rest."""
    return weight.dead >= _REWRITE_DEAD_SHARE * (weight.dead + weight.live)


def plan_gc(store: Store, *, grace_seconds: float | None = None, now: float | None = None) -> GcPlan:
    """Decide what can go; changes nothing but the index. Raises Damaged if any root cannot be read."""
    sync_index(store)
    when = moment(store, grace_seconds, now)
    live = living(store, when.now)
    present = list_packs(store.packs)
    judged = _judge(store, when, live, present)
    trash = tuple(pack for pack in judged.going if not pack.live)
    rewrite = tuple(pack for pack in judged.going if pack.live)
    unlink, waiting_bytes = [], 0
    for name, path in list_packs(store.trash).items():
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        if when.now - status.st_mtime >= when.grace and not when.writers:
            unlink.append(PackPlan(name, path, status.st_size, (), status.st_size))
        else:
            waiting_bytes += status.st_size
    at_once = (*trash, *rewrite) if when.grace == 0 and not when.writers else ()
    gone = {pack.name for pack in (*unlink, *at_once)}
    return GcPlan(
        trash,
        rewrite,
        tuple(unlink),
        tuple(_leftovers(store, when)),
        judged.live_bytes,
        judged.kept_bytes,
        waiting_bytes,
        when.writers,
        when.grace,
        () if when.writers else find_orphans(store, without=gone, before=when.now - when.grace),
    )


@dataclass(frozen=True)
class _Judged:
    going: list[PackPlan]
    live_bytes: int
    kept_bytes: int


def _judge(store: Store, when: Moment, live: set[bytes], present: dict[ObjectId, Path]) -> _Judged:
    """Which packs go. What stays on the disk must stay readable, needed or not: whoever finds a chunk in the store
    does not write it again. So a dead delta in a pack that stays keeps its base alive."""
    weights = weigh(store, live, present.keys())
    if weights.found < len(live):  # missing, or only from the index: what can be found must not look dead
        reread_packs(store)
        weights = weigh(store, live, present.keys())
    all_there = weights.found == len(live)
    while True:
        going, kept_bytes, bases = [], 0, set()
        for name, weight in weights.packs.items():
            try:
                status = present[name].stat()
            except FileNotFoundError:
                continue
            dead = weight.dead
            emptied = not weight.objects and all_there  # damaged; what is needed of it is whole elsewhere
            if emptied:
                dead = status.st_size
            if not (dead or emptied):
                continue
            if not when.is_settled(status.st_mtime) or (weight.staying and not is_worth_a_rewrite(weight)):
                kept_bytes += dead
                bases |= weight.bases
                continue
            freed = dead if weight.staying else status.st_size
            going.append((name, status.st_size, freed, weight))
        fresh = {ObjectId(base) for base in bases if base not in live and store.index.has(ObjectId(base))}
        if not fresh:
            break
        live |= fresh | store.index.bases(fresh)
        weights = weigh(store, live, present.keys())
    plans = [
        PackPlan(name, present[name], size, staying(store, name, weight, live) if weight.staying else (), freed)
        for name, size, freed, weight in going
    ]
    return _Judged(plans, sum(weight.live for weight in weights.packs.values()), kept_bytes)


def execute_gc(store: Store, plan: GcPlan, progress: Progress, *, now: float | None = None) -> GcResult:
    """Carry out a plan. Raises Busy if another gc runs, Unsafe if the clock cannot be trusted. Crashing at any point
    loses nothing; the next gc goes on."""
    check_clock(store, now)
    with alone(store):
        trashed = 0
        with progress.task("rewriting packs", total=sum(pack.size - pack.freed for pack in plan.rewrite)) as task:
            for pack in plan.rewrite:
                if _rewrite(store, pack):
                    trashed += trash_pack(store, pack)
                task.advance(pack.size - pack.freed)
        trashed += sum(trash_pack(store, pack) for pack in plan.trash)
        freed = sum(size for path, size in plan.temporary if _remove(path))
        # A writer that is seen here may still need anything; one that is not has either moved its ref already, which
        # the marking below sees, or begins only now, when the index no longer offers it what lies in the trash.
        writing = any(lease.writes for lease in live_leases(store))
        ready = () if writing else plan.unlink + (plan.trash + plan.rewrite if plan.grace_seconds == 0 else ())
        folder = store.trash / f"{_ASIDE}{durable.fresh_name()}"
        aside = [(pack, _set_aside(store, pack, folder)) for pack in ready]
        restored = _restore_needed(store, {pack.name for pack in ready})
        freed += sum(pack.freed for pack, path in aside if durable.remove(path))
        durable.remove_empty_folder(folder)
        released, released_bytes = release_orphans(store, plan.orphans)
        return GcResult(trashed, freed + released_bytes, restored, released)


@contextlib.contextmanager
def alone(store: Store) -> Iterator[None]:
    """One gc at a time; but where the disk has no room even for a lease, giving space back is worth a race of two."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(NoSpace):
            stack.enter_context(hold_alone(store, "gc", "gc"))
        yield


def _set_aside(store: Store, pack: PackPlan, folder: Path) -> Path:
    """Move a pack within the trash to a folder from which only this gc unlinks: what is found to be dead after that
    cannot have come there anew by another gc, though neither may see the other's lease. Whoever needs it finds it."""
    source = pack.path if pack.path.is_relative_to(store.trash) else store.trash / pack.path.name
    try:
        durable.make_folder(folder)
        durable.move(source, folder / source.name)
    except NoSpace:  # then giving space back is worth a race of two
        return source
    return folder / source.name


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


def trash_pack(store: Store, pack: PackPlan) -> int:
    """Take a pack out of the index, then out of sight; returns the bytes that this will free."""
    store.index.drop_pack(pack.name)
    durable.touch(pack.path)  # its time in the trash starts now
    return pack.freed if durable.move(pack.path, store.trash / pack.path.name) else 0


def _restore_needed(store: Store, ready: set[ObjectId]) -> int:
    """Look again: a pack leaves the trash if something alive in it is nowhere else. The other copies of what is in a
    pack that is `ready` to be unlinked are proven, and not too deep for what rests on them."""
    waiting = list_packs(store.trash)
    live: Set[bytes] = living(store, time.time()) if waiting else frozenset()
    above: dict[bytes, int] = {}  # for what is to go: the least depth of a delta that rests on it
    going = {entry.id for name in ready & waiting.keys() for entry in _entries(waiting[name]) if entry.id in live}
    for _, base, depth in store.index.resting(going) if going else ():
        above[base] = min(depth, above.get(base, depth))
    whole: dict[ObjectId, int] = {}  # the depths that copies outside the trash, proven, do not exceed
    for name, path in waiting.items():
        for entry in _entries(path):
            if entry.id not in live:
                continue
            most = max(entry.depth, above.get(entry.id, DEEPEST) - 1)
            if whole.get(entry.id, DEEPEST) <= most:
                continue
            found = _proven_depth(store, entry.id, most) if name in ready else None
            if found is None and (name in ready or not find_holder(store, entry.id)):
                with contextlib.suppress(NotFound):  # another gc was faster, one way or the other
                    restore_pack(store, name, path, read_pack(path))
                break
            if found is not None:
                whole[entry.id] = found
    return sum(store.pack_path(name).exists() for name in waiting)  # reading manifests brings some back as well


def _entries(path: Path) -> Sequence[Entry]:
    with contextlib.suppress(NotFound):
        return read_pack(path).entries
    return ()


def _proven_depth(store: Store, oid: ObjectId, most: int) -> int | None:
    """The depth of a copy outside the trash that has been read and proven, and is not deeper than `most`."""
    for location in store.index.locate(oid):
        if location.entry.depth <= most:
            with contextlib.suppress(Damaged, FileNotFoundError):
                verify_frame(store, store.pack_path(location.pack), location.entry)
                return location.entry.depth
    return None


def _remove(path: Path) -> bool:
    if path.name.startswith(_ASIDE):
        durable.remove_empty_folder(path)  # and never what somebody has put there meanwhile
        return True
    if path.is_dir() and not path.is_symlink():
        durable.remove_tree(path)
        return True
    return durable.remove(path)


def _leftovers(store: Store, when: Moment) -> list[tuple[Path, int]]:
    """Temporary files no living transaction can own, and removed refs whose time in the trash is over."""
    found: dict[Path, int] = {}
    for folder in (store.root, store.tmp, store.leases):
        for path in folder.glob(f"{durable.TEMP_PREFIX}*"):
            with contextlib.suppress(FileNotFoundError):
                status = path.lstat()
                linked = path.suffix == durable.LINK_SUFFIX  # its times of writing are its owner's
                written = status.st_ctime if linked else status.st_mtime
                age = when.now - written
                if age >= _BUSY_SECONDS and written < when.oldest_write and (not when.writers or age >= _DAY_SECONDS):
                    found[path] = status.st_size
    found.update(old_partials(store, when.now))
    keep = max(when.grace, store.config.gc.keep_days * _DAY_SECONDS)
    for path in store.trash.glob(f"{_ASIDE}*"):
        with contextlib.suppress(OSError):
            if when.now - path.lstat().st_mtime >= _BUSY_SECONDS and not any(path.iterdir()):
                found[path] = 0
    for path in store.trash.glob("ref-*"):
        with contextlib.suppress(FileNotFoundError):
            if when.now - path.lstat().st_mtime >= keep:
                found[path] = sum(child.lstat().st_size for child in path.glob("**/*"))
    return sorted(found.items())
