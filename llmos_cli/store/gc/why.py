"""What keeps an object alive: the chains from refs, their logs and running commands down to it. Or that nothing does,
and when it may go."""

import contextlib
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

from llmos_cli.errors import LlmosError, NotFound, UsageError
from llmos_cli.formats.codec import CODEC_NAMES
from llmos_cli.formats.ids import ObjectId, parse_id, parse_prefix
from llmos_cli.store.gc.gc import Moment, is_worth_a_rewrite, moment, roots_now
from llmos_cli.store.gc.reach import Root, chunks_of, reachable
from llmos_cli.store.gc.weights import weigh
from llmos_cli.store.handle import Store
from llmos_cli.store.packs.objects import read_manifest
from llmos_cli.store.packs.packs import list_packs, read_pack, sync_index
from llmos_cli.store.refs.resolve import resolve

MOST: Final = 20  # chains that are spelled out
_SHOWN: Final = 5


@dataclass(frozen=True)
class Place:
    """A pack that holds the object, or the one that is meant, and how: `stored` bytes by a codec, on a base if it is a
    delta. `fate` says what becomes of it, not before the Unix time `after`."""

    pack: ObjectId
    in_trash: bool
    codec: str | None
    stored: int
    base: ObjectId | None
    fate: str
    after: float | None


@dataclass(frozen=True)
class Why:
    """What was asked for; `chains` lead to it from what keeps it (the first `MOST`; there are `count`), each a list of
    steps such as "ref run:latest", "manifest @3f2a...", "file model.safetensors"."""

    what: str
    id: ObjectId
    chains: tuple[tuple[str, ...], ...]
    count: int
    places: tuple[Place, ...]

    @property
    def is_needed(self) -> bool:
        return self.count > 0


def explain(store: Store, text: str, *, now: float | None = None) -> Why:
    """Why a ref's value, @PREFIX, an id or its prefix, or a pack is kept. Raises NotFound, UsageError if ambiguous."""
    sync_index(store)
    when = moment(store, None, now)
    roots = list(dict.fromkeys(roots_now(store, when.now)))
    oid = _find(store, text)
    pack = _pack_path(store, oid)
    if pack:
        targets = {entry.id for entry in read_pack(pack).entries}
        what = "pack"
    else:
        targets = {oid}
        what = "manifest" if store.index.manifests(str(oid)) else "chunk"
    chains, count = _chains(store, roots, targets)
    live = None if count else reachable(store, roots)
    return Why(what, oid, chains, count, tuple(_places(store, when, oid, pack, live)))


# -------------------------------------------------------------------------------------------------------------- finding


def _find(store: Store, text: str) -> ObjectId:
    try:
        if not text.startswith("@"):
            return resolve(store, text).id
    except (NotFound, UsageError) as exc:
        problem: LlmosError = exc
        if not _is_hex(text):
            raise
    else:
        problem = NotFound(f"nothing in this store starts with {text}", hint="list refs and their ids: llmos ls")
    prefix = parse_prefix(text.removeprefix("@"))
    found = set(store.index.starting_with(prefix))
    found.update(name for name in list_packs(store.packs) if str(name).startswith(prefix))
    for name, path in list_packs(store.trash).items():
        found.update(oid for oid in (name, *_ids(path)) if str(oid).startswith(prefix))
    if not found:
        raise problem
    if len(found) > 1:
        shown = ", ".join(f"@{oid.hex()[: len(prefix) + 6]}" for oid in sorted(found)[:_SHOWN])
        raise UsageError(f"the id prefix {prefix} is ambiguous: {shown}", hint="type more digits")
    return found.pop()


def _is_hex(text: str) -> bool:
    try:
        parse_prefix(text)
    except UsageError:
        return False
    return True


def _ids(path: Path) -> Iterator[ObjectId]:
    try:
        yield from (entry.id for entry in read_pack(path).entries)
    except NotFound:
        return


def _pack_path(store: Store, name: ObjectId) -> Path | None:
    here = store.pack_path(name)
    return here if here.exists() else list_packs(store.trash).get(name)


# --------------------------------------------------------------------------------------------------------------- chains


def _chains(store: Store, roots: list[Root], targets: Set[ObjectId]) -> tuple[tuple[tuple[str, ...], ...], int]:
    below = _resting_on(store, targets)
    found: list[tuple[str, ...]] = []
    count = 0
    hits: dict[ObjectId, list[ObjectId]] = {}
    for root in roots:
        if root.id not in hits:
            ids = dict.fromkeys(chunks_of(store, root))
            hits[root.id] = [ObjectId(oid) for oid in ids if oid in targets or oid in below]
        count += len(hits[root.id])
        for oid in islice(hits[root.id], max(0, MOST - len(found))):
            found.append((*_from_root(store, root, oid), *_down(oid, below, targets)))
    return tuple(found), count


def _resting_on(store: Store, targets: Set[ObjectId]) -> Mapping[bytes, ObjectId]:
    """The deltas that rest on a target, near or far, each with the base to go on to."""
    below: dict[bytes, ObjectId] = {}
    fresh: Set[ObjectId] = targets
    while fresh:
        rows = store.index.resting(fresh)
        fresh = {oid for oid, _, _ in rows} - below.keys() - targets
        for oid, base, _ in rows:
            if oid not in targets:
                below.setdefault(oid, base)
    return below


def _from_root(store: Store, root: Root, oid: ObjectId) -> Iterator[str]:
    yield root.why
    yield f"manifest @{root.id.short}"
    if oid != root.id:
        for entry in read_manifest(store, root.id).files:
            if any(chunk.id == oid for chunk in entry.chunks):
                yield f"file {entry.path}"
                break
        yield f"chunk {oid.short}"


def _down(oid: ObjectId, below: Mapping[bytes, ObjectId], targets: Set[ObjectId]) -> Iterator[str]:
    while oid not in targets:
        oid = below[oid]
        yield f"base {oid.short}"


# --------------------------------------------------------------------------------------------------------------- places


def _places(store: Store, when: Moment, oid: ObjectId, pack: Path | None, live: Set[bytes] | None) -> Iterator[Place]:
    """The packs that hold an object, or the one that is meant itself; with `live`, nothing needs it."""
    for folder in (store.packs, store.trash):
        in_trash = folder == store.trash
        held = {location.pack for location in store.index.locate(oid)}
        for name, path in list_packs(folder).items():
            if path != pack if pack else not (in_trash or name in held):
                continue
            with contextlib.suppress(NotFound, FileNotFoundError):
                entries = [entry for entry in read_pack(path).entries if entry.id == oid]
                written = path.stat().st_mtime
                if pack:
                    yield Place(
                        name, in_trash, None, path.stat().st_size, None, *_fate(store, when, live, path, written)
                    )
                elif entries:
                    codec, base = CODEC_NAMES[entries[0].codec], entries[0].base if entries[0].depth else None
                    fate = _fate(store, when, live, path, written)
                    yield Place(name, in_trash, codec, entries[0].stored_size, base, *fate)


def _fate(store: Store, when: Moment, live: Set[bytes] | None, path: Path, written: float) -> tuple[str, float | None]:
    if live is None:
        return "needed", None
    if path.is_relative_to(store.trash):
        return "unlinked by a later gc", written + when.grace
    name = parse_id(path.stem)
    weight = weigh(store, live, {name}).packs.get(name)
    if weight is None or not weight.staying:
        return "to the trash with the next gc", written + when.grace
    if is_worth_a_rewrite(weight):
        return "left behind when the next gc rewrites the pack", written + when.grace
    return "stays while most of the pack is needed; llmos gc --repack leaves it behind sooner", None
