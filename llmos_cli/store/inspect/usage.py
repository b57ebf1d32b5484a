"""Where the bytes are: what each ref's files amount to, what it added to the store, with whom it shares, what saved it.

An account that adds up: what several refs need is counted for the oldest of them, so the rows sum to the store, and for
every ref `logical = stored + dedup + compression + delta`.

Objects are numbers, and sets of them arrays: a million chunks under thousands of refs fit in little memory. Which refs
need an object is its *class*: every ref splits the classes of what it needs, so there are as many as there are
different sets of refs, not as there are objects.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from llmos_cli.errors import Damaged
from llmos_cli.formats.ids import ID_BYTES, ObjectId
from llmos_cli.formats.manifest import Manifest
from llmos_cli.formats.names import RefName
from llmos_cli.formats.pack import HEADER_SIZE, TRAILER_SIZE
from llmos_cli.store.handle import Store
from llmos_cli.store.packs.adopted import list_adopted
from llmos_cli.store.packs.ledger import Ledger
from llmos_cli.store.packs.objects import read_manifest
from llmos_cli.store.packs.packs import list_packs, sync_index, total_size
from llmos_cli.store.refs.refs import RefEntry, read_ref, ref_names

SHARERS: Final = 100  # names of refs that share with one: more help nobody, and every ref may share with every other

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Saved:
    """Bytes: `dedup` are stored already, for this ref or an older one; `compression` and `delta` is what encoding saves
    of the rest, less what headers, the manifest and bases that nobody else needs take. They may be below zero."""

    dedup: int = 0
    compression: int = 0
    delta: int = 0

    def __add__(self, other: "Saved") -> "Saved":
        return Saved(self.dedup + other.dedup, self.compression + other.compression, self.delta + other.delta)


@dataclass(frozen=True)
class RefUsage:
    """Bytes: `logical` of its files, `stored` of what it needs and no older ref does, `own` of what no other ref needs.

    `shared_with` names other refs that need some of the same objects, at most SHARERS, the largest common part first;
    `sharers` counts them all. `missing` objects are not in the store.
    """

    ref: RefName
    id: ObjectId
    kind: str
    logical: int
    stored: int
    own: int
    saved: Saved
    shared_with: tuple[RefName, ...]
    sharers: int
    missing: int


@dataclass(frozen=True)
class Usage:
    """`logical`, `stored` and `saved` are the sums of the refs, oldest first; `problems` says which could not be read.

    `disk` is what all packs and `adopted` files take; the latter may share their bytes with files outside. What of it
    is not `stored` is `other`: earlier values of refs and what nothing needs any more. `trash` waits to be unlinked.
    """

    refs: tuple[RefUsage, ...]
    problems: tuple[tuple[RefName, str], ...]
    logical: int
    stored: int
    saved: Saved
    disk: int
    other: int
    trash: int
    packs: int
    adopted: int


def usage(store: Store) -> Usage:
    """Measure the store by its current refs."""
    entries, problems = _entries(store)
    sync_index(store)
    account = _Account(store.index.ledger())
    for entry in entries:
        try:
            account.add(entry, read_manifest(store, entry.id))
        except Damaged as exc:
            problems.append((entry.ref, exc.message))
    refs = account.refs()
    stored = sum(ref.stored for ref in refs)
    packs = list_packs(store.packs).values()
    adopted = total_size(list_adopted(store).values())
    disk = total_size(packs) + adopted
    return Usage(
        refs,
        tuple(problems),
        logical=sum(ref.logical for ref in refs),
        stored=stored,
        saved=sum((ref.saved for ref in refs), Saved()),
        disk=disk,
        other=max(0, disk - stored - len(packs) * (HEADER_SIZE + TRAILER_SIZE)),
        trash=total_size(list_packs(store.trash).values()),
        packs=len(packs),
        adopted=adopted,
    )


def _entries(store: Store) -> tuple[list[RefEntry], list[tuple[RefName, str]]]:
    """The refs' values, the oldest first, and what is wrong with those that have none."""
    entries, problems = [], []
    for ref in ref_names(store):
        try:
            entry = read_ref(store, ref)
        except Damaged as exc:
            problems.append((ref, exc.message))
        else:
            entries += [entry] if entry else []
    return sorted(entries, key=lambda entry: (entry.time, entry.ref)), problems


@dataclass(frozen=True)
class _Sums:
    entry: RefEntry
    kind: str
    logical: int
    stored: int
    saved: Saved
    missing: int


class _Account:
    """Refs are added one after the other; the sums of each are final, its sharers known when all are in."""

    def __init__(self, ledger: Ledger) -> None:
        self._ids = np.frombuffer(ledger.ids, f"S{ID_BYTES}")  # compared byte by byte, as SQLite sorts them
        self._plain = np.frombuffer(ledger.plain, np.int64)
        self._stored = np.frombuffer(ledger.stored, np.int64)
        self._is_delta = np.frombuffer(ledger.is_delta, np.bool_)
        self._bases = self._find(ledger.bases)
        deltas = self._find(ledger.deltas)
        everything = np.arange(len(self._ids))
        self._first_base = np.searchsorted(deltas, everything)
        self._base_count = np.searchsorted(deltas, everything, "right") - self._first_base
        self._class_of = np.zeros(len(self._ids), np.int64)
        self._parents = [0]  # of a class: the class it was split from, and the ref that split it
        self._splitters = [-1]
        self._sums: list[_Sums] = []

    def add(self, entry: RefEntry, manifest: Manifest) -> None:
        chunks = [chunk for file in manifest.files for chunk in file.chunks]
        found = self._find(b"".join(chunk.id for chunk in chunks))
        content = np.unique(found[found >= 0])
        needed = self._closed(np.union1d(content, self._find(entry.id)))
        fresh = needed[self._class_of[needed] == 0]
        mine = np.isin(fresh, content, assume_unique=True)
        delta = fresh[mine & self._is_delta[fresh]]
        stored, plain = int(self._stored[fresh].sum()), int(self._plain[fresh[mine]].sum())
        rests = fresh[~mine & (fresh != self._find(entry.id))]  # bases that are no part of the files
        by_delta = int(self._plain[delta].sum() - self._stored[delta].sum() - self._stored[rests].sum())
        lacking = sum(chunks[number].size for number in np.flatnonzero(found < 0))
        saved = Saved(manifest.size - lacking - plain, plain - stored - by_delta, by_delta)
        self._split(needed)
        missing = len({chunks[number].id for number in np.flatnonzero(found < 0)})
        self._sums.append(_Sums(entry, manifest.kind, manifest.size, stored, saved, missing))

    def refs(self) -> tuple[RefUsage, ...]:
        own = [0] * len(self._sums)
        shared: list[dict[int, None]] = [{} for _ in self._sums]  # insertion order: the largest common part first
        everyone = [0] * len(self._sums)  # bit sets
        sizes = np.bincount(self._class_of, self._stored, minlength=len(self._parents)).astype(np.int64)
        used = np.bincount(self._class_of, minlength=len(self._parents)) > 0
        for number in sorted(np.flatnonzero(used).tolist(), key=lambda number: -sizes[number]):
            members = list(self._members(number))[::-1]
            if len(members) == 1:
                own[members[0]] += int(sizes[number])
                continue
            mask = sum(1 << member for member in members)
            for member in members:
                everyone[member] |= mask
                for other in members:
                    if len(shared[member]) > SHARERS:
                        break
                    shared[member][other] = None
        return tuple(
            RefUsage(
                sums.entry.ref,
                sums.entry.id,
                sums.kind,
                sums.logical,
                sums.stored,
                own[number],
                sums.saved,
                tuple(self._sums[other].entry.ref for other in shared[number] if other != number)[:SHARERS],
                max(0, everyone[number].bit_count() - 1),
                sums.missing,
            )
            for number, sums in enumerate(self._sums)
        )

    def _find(self, ids: bytes | bytearray) -> Numbers:
        """The numbers of objects, -1 for those that are not there."""
        wanted = np.frombuffer(ids, self._ids.dtype)
        if not len(self._ids):
            return np.full(len(wanted), -1)
        numbers = np.searchsorted(self._ids, wanted)
        numbers[numbers == len(self._ids)] = 0
        return np.where(self._ids[numbers] == wanted, numbers, -1)

    def _closed(self, numbers: Numbers) -> Numbers:
        """These objects and the bases they rest on, and theirs in turn."""
        numbers = numbers[numbers >= 0]
        waiting = numbers
        while len(waiting := waiting[self._base_count[waiting] > 0]):
            counts, first = self._base_count[waiting], self._first_base[waiting]
            steps = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            bases = self._bases[np.repeat(first, counts) + steps]
            waiting = np.setdiff1d(bases[bases >= 0], numbers)
            numbers = np.union1d(numbers, waiting)
        return numbers

    def _split(self, needed: Numbers) -> None:
        """The next ref needs these objects: those of one class make a new class."""
        old, places = np.unique(self._class_of[needed], return_inverse=True)
        self._class_of[needed] = len(self._parents) + places
        self._parents += old.tolist()
        self._splitters += [len(self._sums)] * len(old)

    def _members(self, number: int) -> Iterator[int]:
        """The refs that need the objects of a class."""
        while number:
            yield self._splitters[number]
            number = self._parents[number]
