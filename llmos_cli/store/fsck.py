"""Checking the store: every invariant, every byte. Reports, never repairs by deleting."""

import os
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from llmos_cli.errors import Damaged, LlmosError, NotFound, from_os_error
from llmos_cli.formats import codec
from llmos_cli.formats.frame import HEADER_BYTES, check_id, decode_payload
from llmos_cli.formats.ids import IdHasher, ObjectId
from llmos_cli.formats.pack import Entry, aligned, check_entry, check_padding
from llmos_cli.progress import Progress, Silent, Task
from llmos_cli.store.handle import Store
from llmos_cli.store.objects import read_manifest
from llmos_cli.store.packs import Sync, list_packs, read_frame, read_pack_index, sync_index
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
    """Check structure (`quick`) or every id, checksum and pack name as well; never raises for damage, it lists it."""
    problems: list[tuple[str, str, set[ObjectId]]] = []
    good: set[ObjectId] = set()
    packs = list_packs(store.packs)
    sizes = {name: path.stat().st_size for name, path in packs.items() if path.exists()}
    total = 0 if quick else sum(sizes.values())
    count = 0
    with progress.task("checking", total=total or None) as task, ThreadPoolExecutor(_WORKERS, "fsck") as workers:
        jobs = {name: workers.submit(_check_pack, name, path, quick, task) for name, path in packs.items()}
        for name, job in jobs.items():
            try:
                entries, failures = job.result()
            except NotFound:
                continue  # gc took it while we looked
            except LlmosError as exc:
                known = {entry.id for entry in store.index.entries(name)}
                problems.append((exc.message, f"pack {name.short}", known))
                continue
            count += len(entries)
            for entry in entries:
                if entry.id in failures:
                    problems.append((failures[entry.id], f"object {entry.id.short} in pack {name.short}", {entry.id}))
                else:
                    good.add(entry.id)
    problems += [
        (f"pack {name.short} is indexed but its file is missing", f"pack {name.short}", set())
        for name in store.index.packs().keys() - packs.keys()
    ]
    needs = _needs(store, good, problems)
    listed = tuple(
        Problem(what, where, tuple(sorted({ref for oid in objects for ref in needs.get(oid, ())})))
        for what, where, objects in problems
    )
    return FsckReport(listed, len(packs), count, sum(sizes.values()), quick)


@dataclass(frozen=True)
class ReindexResult:
    packs: int
    damaged: tuple[str, ...]


def reindex(store: Store) -> ReindexResult:
    """Throw the index away and build it from the packs alone."""
    store.index.reset()
    done: Sync = sync_index(store)
    return ReindexResult(done.packs, tuple(message for _, message in done.damaged))


def _check_pack(name: ObjectId, path: Path, quick: bool, task: Task) -> tuple[tuple[Entry, ...], dict[ObjectId, str]]:
    """A pack's entries and what is wrong with them by id; raises Damaged if the pack as a whole is unusable."""
    _, entries = read_pack_index(path)
    failures: dict[ObjectId, str] = {}
    try:
        with open(path, "rb") as file:
            for number, entry in enumerate(entries):
                try:
                    if quick:
                        check_entry(entry, os.pread(file.fileno(), HEADER_BYTES, entry.offset))
                        continue
                    _check_object(path, entry)
                    stop = entries[number + 1].offset if number + 1 < len(entries) else aligned(entry.end)
                    check_padding(entry, os.pread(file.fileno(), stop - entry.end, entry.end))
                except Damaged as exc:
                    failures[entry.id] = exc.message
                except OSError as exc:
                    failures[entry.id] = from_os_error(exc, f"reading byte {entry.offset}").message
                task.advance(0 if quick else entry.stored_size)
            if not quick and not failures and _hash(file.fileno()) != name:
                raise Damaged(f"pack {name.short} does not have the bytes its name stands for")
    except FileNotFoundError as exc:
        raise NotFound(f"pack {name.short} is gone") from exc
    except OSError as exc:
        raise from_os_error(exc, f"reading {path}") from exc
    return entries, failures


def _check_object(path: Path, entry: Entry) -> None:
    frame, payload = read_frame(path, entry)
    if frame.codec == codec.DELTA:
        raise Damaged(f"object {frame.id.short} is a delta, which this version cannot check")
    plain = bytearray(frame.plain_size)
    decode_payload(frame, payload, memoryview(plain))
    check_id(frame, plain)


def _hash(fd: int) -> ObjectId:
    hasher = IdHasher()
    for block in _blocks(fd):
        hasher.update(block)
    return hasher.id()


def _blocks(fd: int) -> Iterator[bytes]:
    at = 0
    while block := os.pread(fd, _BLOCK, at):
        yield block
        at += len(block)


def _needs(
    store: Store, good: set[ObjectId], problems: list[tuple[str, str, set[ObjectId]]]
) -> dict[ObjectId, set[str]]:
    """Which refs need which object; adds a problem for every ref that is not whole."""
    needs: dict[ObjectId, set[str]] = defaultdict(set)
    for entry in _refs(store, problems):
        ref = str(entry.ref)
        needs[entry.id].add(ref)
        try:
            manifest = read_manifest(store, entry.id)
        except LlmosError as exc:
            problems.append((exc.message, f"ref {ref}", {entry.id}))
            continue
        missing = 0
        for oid in objects_of(entry.id, manifest):
            needs[oid].add(ref)
            missing += oid not in good
        if missing:
            problems.append((f"{missing} of its objects are missing or damaged", f"ref {ref}", {entry.id}))
    return needs


def _refs(store: Store, problems: list[tuple[str, str, set[ObjectId]]]) -> list[RefEntry]:
    """Every ref that can be read; what is wrong with the others, and with damaged moves, becomes a problem."""
    found = []
    shown, store.progress = store.progress, (recorder := Silent())
    try:
        for ref in ref_names(store):
            try:
                entry = read_ref(store, ref)
            except LlmosError as exc:
                problems.append((exc.message, f"ref {ref}", set()))
                continue
            if entry:
                found.append(entry)
    finally:
        store.progress = shown
    problems += [(warning, "refs", set()) for warning in recorder.warnings]
    return found
