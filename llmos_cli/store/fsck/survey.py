"""What a store has beside what its refs need: the looking, which `fsck` reports and a repair works from.

Changes no pack and no ref. The index is put right in passing, and what a gc took too early comes back from the trash,
as it does for any reader. Memory grows with the number of objects by little more than their ids.
"""

import contextlib
import os
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from llmos_cli.errors import AccessDenied, Damaged, LlmosError, NoSpace, NotFound
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.manifest import decode_manifest, listed_chunks
from llmos_cli.formats.names import RefName
from llmos_cli.formats.pack import Entry
from llmos_cli.progress import Progress, Silent, Task
from llmos_cli.store.fsck.verify import Checked, check_pack, verify
from llmos_cli.store.handle import Store
from llmos_cli.store.packs.chains import DEEPEST, Chains
from llmos_cli.store.packs.index import mark_of
from llmos_cli.store.packs.objects import read_object
from llmos_cli.store.packs.packs import list_packs, read_pack, restore_pack, total_size
from llmos_cli.store.refs.moves import RefLog, kept_since, kept_values, read_log
from llmos_cli.store.refs.refs import ref_names
from llmos_cli.store.refs.snapshots import read_snapshot, snapshot_names

_WORKERS: Final = min(os.cpu_count() or 1, 16)
_AHEAD: Final = 4 * _WORKERS
_TRIES: Final = 3


@dataclass(frozen=True)
class DamagedPack:
    """A pack in which something is wrong: with the pack itself (`problem`), or with objects in it. `whole` are the
    frames that stand, `held` is everything that is known to have been in it."""

    name: ObjectId
    path: Path
    size: int
    problem: str | None
    failures: dict[ObjectId, str]
    whole: tuple[Entry, ...]
    held: frozenset[ObjectId]


@dataclass(frozen=True)
class Fault:
    """Something wrong that is not about objects."""

    what: str
    where: str
    refs: tuple[str, ...] = ()


class Survey:
    """Look once with `look`; look again after something was repaired: only what is new is read.

    `packs` gives size and frames of what was checked, `absent` what the index says was in packs that are gone, `unread`
    why manifests cannot be read, `labels` which refs (NAME:TAG, or NAME:TAG~N for an earlier value) are at a manifest.
    """

    def __init__(self, store: Store, *, quick: bool, progress: Progress) -> None:
        self.store = store
        self.quick = quick
        self.packs: dict[ObjectId, tuple[int, int]] = {}
        self.damaged: dict[ObjectId, DamagedPack] = {}
        self.absent: dict[ObjectId, frozenset[ObjectId]] = {}
        self.unread: dict[ObjectId, str] = {}
        self.logs: dict[RefName, RefLog] = {}
        self.faults: list[Fault] = []
        self.labels: dict[ObjectId, dict[str, None]] = {}
        self._progress = progress
        self._current: set[ObjectId] = set()
        self._users: defaultdict[ObjectId, set[ObjectId]] = defaultdict(set)
        self._traced: set[ObjectId] = set()
        self._suspects: Set[ObjectId] = frozenset()
        self._chains = Chains()
        self._unproven: list[tuple[ObjectId, Path, Entry]] = []
        self._stuck: dict[ObjectId, list[tuple[int, ObjectId]]] = {}
        self._resting: dict[ObjectId, set[ObjectId]] = {}
        self._roots: dict[ObjectId, int] | None = None

    @property
    def readable(self) -> Mapping[ObjectId, int]:
        """The objects that can be read, and the least depth of a copy that can."""
        return self._chains.readable

    def look(self) -> None:
        """Check the packs that have not been checked yet, and what refs need that is not there."""
        self._roots = None
        self._scan()
        self._trace()
        for _ in range(_TRIES):  # a gc may have moved packs while we looked, or died before it looked again
            lacking = self.lacking()
            seen = len(self.packs)
            if not lacking:
                return
            self._bring_back(lacking | self._stuck_on())
            self._scan()
            if len(self.packs) == seen:
                return
            self._trace()

    def look_again_at(self, pack: ObjectId) -> None:
        """A pack has changed: the next look checks it anew."""
        self.packs.pop(pack, None)
        self.damaged.pop(pack, None)

    def lacking(self) -> set[ObjectId]:
        """What refs need and cannot have."""
        return {
            oid for oid, users in self._users.items() if oid not in self.readable and not users.isdisjoint(self.labels)
        }

    def refs_of(self, oid: ObjectId) -> tuple[str, ...]:
        """The refs (and earlier values, as NAME:TAG~N) that need an object, itself or for a delta that rests on it.
        Only known for what is missing, or lies in a damaged pack."""
        lost = oid not in self.readable
        above = (delta for delta in self._resting.get(oid, ()) if not (lost and delta in self.readable))
        return tuple(sorted({ref for found in (oid, *above) for ref in self.direct_refs_of(found)}))

    def direct_refs_of(self, oid: ObjectId) -> set[str]:
        """The refs whose manifests name an object."""
        return {label for manifest in self._users.get(oid, ()) for label in self.labels.get(manifest, ())}

    @property
    def roots(self) -> Set[ObjectId]:
        """The objects that all harm comes from."""
        if self._roots is None:
            self._roots = self.wanted()
        return self._roots.keys()

    def wanted(self, impossible: Set[ObjectId] = frozenset()) -> dict[ObjectId, int]:
        """What would make everything readable again, each with the depth that a copy must stay below: what is lacking,
        or the base that it rests on, unless that is `impossible` to get."""
        found: dict[ObjectId, int] = {}
        waiting = [(oid, DEEPEST) for oid in self.lacking()]
        while waiting:
            oid, below = waiting.pop()
            bases = [(base, depth) for depth, base in self._stuck.get(oid, ()) if depth < below]
            reachable = [(base, depth) for base, depth in bases if base not in impossible]
            if reachable:
                waiting += (item for item in reachable if self._chains.depth_of(item[0]) >= item[1])
            elif oid not in impossible:
                found[oid] = min(below, found.get(oid, DEEPEST))
        self._chains.limit(found)
        return found

    def is_elsewhere(self, entry: Entry) -> bool:
        """Whether an undamaged pack has a copy that may stand in for this one."""
        return any(
            location.pack not in self.damaged
            and location.entry.depth <= entry.depth
            and self.store.pack_path(location.pack).exists()
            for location in self.store.index.locate(entry.id)
        )

    # ------------------------------------------------------------------------------------------ packs

    def _scan(self) -> None:
        marks = self.store.index.marks()
        try:
            present = list_packs(self.store.packs)
        except LlmosError as exc:
            self._fault(Fault(exc.message, "packs"))
            present = {}
        paths = {name: path for name, path in present.items() if name not in self.packs}
        total, unit = (len(paths), "packs") if self.quick else (total_size(paths.values()), "B")
        with self._progress.task("checking", total=total or None, unit=unit) as task:
            for name, path, checked in self._check(paths, task):
                self._note(name, path, checked, marks.get(name))
                if self.quick:
                    task.advance()
        self._settle_index()
        self.absent = {
            name: frozenset(entry.id for entry in self.store.index.entries(name))
            for name in self.store.index.packs().keys() - self.packs.keys()
        }
        self._resolve()

    def _check(self, paths: dict[ObjectId, Path], task: Task) -> Iterator[tuple[ObjectId, Path, Checked]]:
        waiting: deque[tuple[ObjectId, Path, Future[Checked]]] = deque()

        def first() -> Iterator[tuple[ObjectId, Path, Checked]]:
            name, path, job = waiting.popleft()
            with contextlib.suppress(NotFound):  # gc took it while we looked
                yield name, path, job.result()

        with ThreadPoolExecutor(_WORKERS, "fsck") as workers:
            try:
                for name, path in paths.items():
                    waiting.append((name, path, workers.submit(check_pack, self.store, name, path, self.quick, task)))
                    if len(waiting) > _AHEAD:
                        yield from first()
                while waiting:
                    yield from first()
            finally:
                workers.shutdown(cancel_futures=True)

    def _note(self, name: ObjectId, path: Path, checked: Checked, mark: tuple[int, int] | None) -> None:
        failures = checked.failures
        whole = checked.entries
        if failures:
            whole = tuple(entry for entry in whole if entry.id not in failures)
        self.packs[name] = (checked.size, len(checked.entries))
        self._unproven += [(name, path, entry) for entry in checked.unproven]
        self._chains.add(whole, proven=not self.quick, but={entry.id for entry in checked.unproven})
        if not (failures or checked.problem) and mark == (checked.size, mark_of(whole)):
            return
        if failures or checked.problem:
            held = frozenset(entry.id for entry in (*self.store.index.entries(name), *checked.entries))
            self.damaged[name] = DamagedPack(name, path, checked.size, checked.problem, failures, whole, held)
        elif mark is not None:  # one that is not indexed at all may be on its way to the trash
            self.store.index.add_pack(name, checked.size, whole)

    def _settle_index(self) -> None:
        """A damaged pack only counts for what is nowhere else: what it lost can then be stored anew, and a gc can take
        it once it holds nothing any more."""
        for pack in self.damaged.values():
            left = [entry for entry in pack.whole if not self.is_elsewhere(entry)]
            if set(left) != set(self.store.index.entries(pack.name)):
                self.store.index.add_pack(pack.name, pack.size, left)

    def _resolve(self) -> None:
        """Find out what can be read, and what may hurt a ref."""
        if self.quick:
            self._chains.resolve()
        self._unproven.sort(key=lambda item: item[2].depth)
        self._unproven = [item for item in self._unproven if not self._is_proven(*item)]
        self._stuck = self._chains.stuck()
        suspects = {oid for pack in self.damaged.values() for oid in pack.held}.union(*self.absent.values())
        self._resting = self._chains.resting_on(suspects)
        suspects.update(self._resting, *self._resting.values())
        if suspects - self._suspects:
            self._traced.clear()
        self._suspects = suspects

    def _is_proven(self, name: ObjectId, path: Path, entry: Entry) -> bool:
        """Try a delta again whose base could not be had."""
        if self._chains.depth_of(entry.base) >= entry.depth:
            return False
        try:
            if verify(self.store, path, entry):
                self._chains.can_read(entry.id, entry.depth)
                return True
        except (Damaged, FileNotFoundError):
            self.look_again_at(name)
            return True
        return False

    def _stuck_on(self) -> set[ObjectId]:
        return {base for links in self._stuck.values() for _, base in links}

    def _bring_back(self, missing: Set[ObjectId]) -> None:
        """Packs in the trash that hold something a ref needs leave it, as they would for a reader."""
        for name, path in list_packs(self.store.trash).items():
            with contextlib.suppress(NotFound, AccessDenied, NoSpace):
                content = read_pack(path)
                if any(entry.id in missing and self._stands(path, entry) for entry in content.entries):
                    restore_pack(self.store, name, path, content)

    def _stands(self, path: Path, entry: Entry) -> bool:
        try:
            verify(self.store, path, entry)
        except (LlmosError, FileNotFoundError):
            return False
        return True

    # ------------------------------------------------------------------------------------------ refs

    def _trace(self) -> None:
        """Read every manifest that a ref needs; note who needs what is missing or suspect."""
        self._read_refs()
        fresh = [oid for oid in self.labels if oid not in self._traced]
        with self._progress.task("following refs", total=len(fresh), unit="objects") as task:
            for oid in fresh:
                self._follow(oid)
                task.advance()

    def _follow(self, manifest: ObjectId) -> None:
        if manifest not in self.readable:
            if manifest in self._current or manifest in self._suspects:  # a clone has the newest values only
                self._users[manifest].add(manifest)
            return
        try:
            data = read_object(self.store, manifest, verify_id=True)
            chunks = listed_chunks(data) if self.quick else _chunks(data)
        except LlmosError as exc:
            self.unread[manifest] = exc.message
            self._chains.readable.pop(manifest, None)
            self._users[manifest].add(manifest)
            return
        self.unread.pop(manifest, None)
        self._traced.add(manifest)
        if manifest in self._suspects:
            self._users[manifest].add(manifest)
        for chunk in chunks:
            if chunk not in self.readable or chunk in self._suspects:
                self._users[ObjectId(chunk)].add(manifest)

    def _read_refs(self) -> None:
        since = kept_since(self.store)
        self.logs, self.labels, self._current = {}, {}, set()
        self.faults = [fault for fault in self.faults if fault.where == "packs"]
        shown, self.store.progress = self.store.progress, (recorder := Silent())
        try:
            for ref in ref_names(self.store):
                try:
                    self.logs[ref] = read_log(self.store, ref)
                except LlmosError as exc:
                    self._fault(Fault(exc.message, f"ref {ref}", (str(ref),)))
        except LlmosError as exc:
            self._fault(Fault(exc.message, "refs"))
        finally:
            self.store.progress = shown
        for warning in recorder.warnings:
            self._fault(Fault(warning, "refs"))
        for log in self.logs.values():
            if log.value:
                self._current.add(log.value.id)
            for oid, label in kept_values(log, since):
                self.labels.setdefault(oid, {})[label] = None
        self._read_snapshots()

    def _read_snapshots(self) -> None:
        for name in snapshot_names(self.store):
            label = f"snapshot {name.time}-{name.id.short}"
            try:
                snapshot = read_snapshot(self.store, name)
            except LlmosError as exc:
                self._fault(Fault(exc.message.removeprefix(f"{label} "), label))
                continue
            for oid in snapshot.manifests if snapshot else ():
                self.labels.setdefault(oid, {})[label] = None
                self._current.add(oid)

    def _fault(self, fault: Fault) -> None:
        if fault not in self.faults:
            self.faults.append(fault)


def _chunks(data: bytes) -> Iterable[ObjectId]:
    return (chunk.id for entry in decode_manifest(data).files for chunk in entry.chunks)
