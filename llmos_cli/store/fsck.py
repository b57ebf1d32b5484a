"""Checking the store: every invariant, every byte. Reports, never repairs by deleting."""

import contextlib
import os
from collections import Counter, defaultdict
from collections.abc import Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from llmos_cli.errors import Damaged, LlmosError, NotFound, from_os_error
from llmos_cli.formats.frame import HEADER_BYTES
from llmos_cli.formats.ids import IdHasher, ObjectId
from llmos_cli.formats.pack import Entry, aligned, check_entry, check_padding
from llmos_cli.progress import Progress, Silent, Task
from llmos_cli.store.frames import verify_frame
from llmos_cli.store.handle import Store
from llmos_cli.store.objects import read_manifest
from llmos_cli.store.packs import Sync, list_packs, read_pack, restore_pack, sync_index
from llmos_cli.store.reach import objects_of
from llmos_cli.store.refs import RefEntry, read_ref, ref_names

_BLOCK: Final = 8 << 20
_WORKERS: Final = min(os.cpu_count() or 1, 16)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: what, where (a pack, an object, a ref) and the refs that need it."""

    what: str
    where: str
    referrers: tuple[str, ...]


@dataclass(frozen=True)
class FsckReport:
    """`packs`, `objects`, `bytes` are what was looked at; with `quick` the bytes of payloads were not read."""

    problems: tuple[Problem, ...]
    packs: int
    objects: int
    bytes: int
    quick: bool


def check(store: Store, *, quick: bool, progress: Progress) -> FsckReport:
    """Check structure (`quick`) or every id, checksum and pack name as well; never raises for damage, it lists it.

    The index is a cache: where it disagrees with a pack it is put right, and a damaged copy of an object no longer
    counts as stored, so that adding or pulling it again brings it back.
    """
    found = _Found()
    _check_packs(store, found, quick, progress)
    absent = {
        name: {entry.id for entry in store.index.entries(name)}
        for name in store.index.packs().keys() - found.packs.keys()
    }
    needs = _needs(store, found)
    if needs.keys() - found.good:  # a gc may have moved packs while we looked, or died before it looked again
        _bring_back(store, needs.keys() - found.good)
        _check_packs(store, found, quick, progress)
    missing = needs.keys() - found.good
    for name, held in absent.items():
        if lost := held & missing:
            found.problems.append((f"its file is missing, and with it {len(lost)} objects", f"pack {name.short}", lost))
    lacking: Counter[str] = Counter(ref for oid in missing for ref in needs[oid])
    unreadable = {where for _, where, _ in found.problems}
    for ref, count in sorted(lacking.items()):
        if f"ref {ref}" in unreadable:
            continue
        what = f"{count} of its objects are missing or damaged"
        found.problems.append((what, f"ref {ref}", {oid for oid in missing if ref in needs[oid]}))
    listed = tuple(
        Problem(what, where, tuple(sorted({ref for oid in objects for ref in needs.get(oid, ())})))
        for what, where, objects in found.problems
    )
    return FsckReport(listed, len(found.packs), found.objects, sum(found.packs.values()), quick)


@dataclass(frozen=True)
class ReindexResult:
    packs: int
    damaged: tuple[str, ...]


def reindex(store: Store) -> ReindexResult:
    """Throw the index away and build it from the packs alone."""
    store.index.reset()
    done: Sync = sync_index(store)
    store.index.mark_complete()
    return ReindexResult(done.packs, tuple(message for _, message in done.damaged))


@dataclass
class _Found:
    """`packs` that were checked and their sizes, objects that are whole, and (what, where, the objects it is about)."""

    packs: dict[ObjectId, int] = field(default_factory=dict)
    objects: int = 0
    good: set[ObjectId] = field(default_factory=set)
    problems: list[tuple[str, str, set[ObjectId]]] = field(default_factory=list)


@dataclass(frozen=True)
class _Checked:
    """A pack: what is in it, what is wrong with objects in it by id, what is wrong with the pack itself."""

    size: int
    entries: tuple[Entry, ...]
    failures: dict[ObjectId, str]
    problem: str | None


def _check_packs(store: Store, found: _Found, quick: bool, progress: Progress) -> None:
    """Check every pack that has not been checked yet."""
    try:
        paths = {name: path for name, path in list_packs(store.packs).items() if name not in found.packs}
    except LlmosError as exc:
        found.problems.append((exc.message, "packs", set()))
        return
    total = 0 if quick else sum(path.stat().st_size for path in paths.values() if path.exists())
    with progress.task("checking", total=total or None) as task, ThreadPoolExecutor(_WORKERS, "fsck") as workers:
        jobs = {name: workers.submit(_check_pack, store, name, path, quick, task) for name, path in paths.items()}
        for name, job in jobs.items():
            try:
                checked = job.result()
            except NotFound:
                continue  # gc took it while we looked
            known = set(store.index.entries(name))
            found.packs[name] = checked.size
            found.objects += len(checked.entries)
            found.good.update(entry.id for entry in checked.entries if entry.id not in checked.failures)
            if checked.problem:
                ids = {entry.id for entry in known | set(checked.entries)}
                found.problems.append((checked.problem, f"pack {name.short}", ids))
            for oid, what in checked.failures.items():
                found.problems.append((what, f"object {oid.short} in pack {name.short}", {oid}))
            whole = tuple(entry for entry in checked.entries if entry.id not in checked.failures)
            if known != set(whole) and (known or checked.failures):
                store.index.add_pack(name, checked.size, whole)


def _check_pack(store: Store, name: ObjectId, path: Path, quick: bool, task: Task) -> _Checked:
    """Read a pack whole (or, with `quick`, its structure); raises NotFound if it is gone."""
    content = read_pack(path)
    problem = content.problem.message if content.problem else None
    failures: dict[ObjectId, str] = {}
    try:
        with open(path, "rb") as file:
            for number, entry in enumerate(content.entries):
                try:
                    if quick:
                        check_entry(entry, os.pread(file.fileno(), HEADER_BYTES, entry.offset))
                        continue
                    verify_frame(store, path, entry)
                except LlmosError as exc:
                    failures[entry.id] = exc.message
                if not content.problem:
                    last = number + 1 == len(content.entries)
                    stop = aligned(entry.end) if last else content.entries[number + 1].offset
                    problem = problem or _padding_problem(file.fileno(), entry, stop)
                task.advance(entry.stored_size)
            if not (quick or failures or problem) and _hash(file.fileno()) != name:
                problem = f"pack {name.short} does not have the bytes its name stands for"
    except FileNotFoundError as exc:
        raise NotFound(f"pack {name.short} is gone") from exc
    except OSError as exc:
        problem = from_os_error(exc, f"reading {path}").message
    return _Checked(content.size, content.entries, failures, problem)


def _padding_problem(fd: int, entry: Entry, stop: int) -> str | None:
    try:
        check_padding(entry, os.pread(fd, stop - entry.end, entry.end))
    except Damaged as exc:
        return exc.message
    return None


def _hash(fd: int) -> ObjectId:
    hasher = IdHasher()
    at = 0
    while block := os.pread(fd, _BLOCK, at):
        hasher.update(block)
        at += len(block)
    return hasher.id()


def _bring_back(store: Store, missing: Set[ObjectId]) -> None:
    """Packs in the trash that hold something a ref needs leave it, as they would for a reader."""
    for name, path in list_packs(store.trash).items():
        with contextlib.suppress(NotFound):
            content = read_pack(path)
            if any(entry.id in missing for entry in content.entries):
                restore_pack(store, name, path, content)


def _needs(store: Store, found: _Found) -> dict[ObjectId, set[str]]:
    """Which refs need which object; a ref or manifest that cannot be read is a problem."""
    needs: dict[ObjectId, set[str]] = defaultdict(set)
    for entry in _refs(store, found):
        ref = str(entry.ref)
        needs[entry.id].add(ref)
        try:
            manifest = read_manifest(store, entry.id)
        except LlmosError as exc:
            found.problems.append((exc.message, f"ref {ref}", {entry.id}))
            continue
        for oid in objects_of(entry.id, manifest):
            needs[oid].add(ref)
    return needs


def _refs(store: Store, found: _Found) -> list[RefEntry]:
    """Every ref that can be read; what is wrong with the others, and with damaged moves, becomes a problem."""
    entries = []
    shown, store.progress = store.progress, (recorder := Silent())
    try:
        for ref in ref_names(store):
            try:
                entry = read_ref(store, ref)
            except LlmosError as exc:
                found.problems.append((exc.message, f"ref {ref}", set()))
                continue
            if entry:
                entries.append(entry)
    except LlmosError as exc:
        found.problems.append((exc.message, "refs", set()))
    finally:
        store.progress = shown
    found.problems += [(warning, "refs", set()) for warning in recorder.warnings]
    return entries
