"""Adopted files that nothing needs any more: which ones, and letting them go.

A file goes once no pack names it, not even one in the trash, so it outlives whatever could still be brought back. It
leaves through the trash, where whoever turns out to need it finds it. Only the store's own name of it is removed: what
other names it has stay, and so does their being read-only. Its times are other people's; they are never touched.
"""

import contextlib
from collections.abc import Iterable, Set
from dataclasses import dataclass
from pathlib import Path

from llmos_cli.errors import NotFound
from llmos_cli.formats.codec import ADOPTED
from llmos_cli.formats.ids import ObjectId
from llmos_cli.store.disk import durable
from llmos_cli.store.handle import Store
from llmos_cli.store.leases import live_leases
from llmos_cli.store.packs.adopted import list_adopted, list_trashed, restore_adopted, trashed_path
from llmos_cli.store.packs.packs import PackContent, list_packs, read_pack


@dataclass(frozen=True)
class Orphan:
    """An adopted file that no pack names. `size` is what letting it go gives back: nothing while it has other names."""

    name: ObjectId
    path: Path
    size: int


def find_orphans(store: Store, *, without: Set[ObjectId], before: float) -> tuple[Orphan, ...]:
    """Adopted files that only packs `without` name, if any, and whose status has not changed since `before`."""
    found = []
    for name, path in {**list_trashed(store), **list_adopted(store)}.items():
        with contextlib.suppress(FileNotFoundError):
            status = path.lstat()
            if status.st_ctime < before:
                found.append(Orphan(name, path, status.st_size if status.st_nlink == 1 else 0))
    named = _named(store, {orphan.name for orphan in found}, without)
    return tuple(orphan for orphan in found if orphan.name not in named)


def release_orphans(store: Store, orphans: Iterable[Orphan]) -> tuple[int, int]:
    """Remove orphans; returns how many went and the bytes that gives back. While a transaction is open they wait in the
    trash; one that a pack names by now goes back."""
    waiting = [orphan for orphan in orphans if _move_to_trash(store, orphan)]
    if not waiting or any(lease.writes for lease in live_leases(store)):
        return 0, 0
    # Whoever begins to write only now publishes the file under its name again, and cannot rest on this one.
    named = _named(store, {orphan.name for orphan in waiting}, frozenset())
    gone = freed = 0
    for orphan in waiting:
        if orphan.name in named:
            restore_adopted(store, orphan.name)
        elif durable.remove(trashed_path(store, orphan.name)):
            gone, freed = gone + 1, freed + orphan.size
    return gone, freed


def _move_to_trash(store: Store, orphan: Orphan) -> bool:
    target = trashed_path(store, orphan.name)
    return orphan.path == target or durable.move(orphan.path, target)


def _named(store: Store, files: Set[ObjectId], without: Set[ObjectId]) -> Set[ObjectId]:
    """Which of the files some pack names: by the index or, if not by that, as the packs themselves say. All of them if
    a pack cannot be read."""
    named = {file for file, pack in store.index.adopted() if pack not in without and store.pack_path(pack).exists()}
    if files <= named:
        return files
    packs = {**list_packs(store.packs), **list_packs(store.trash), **list_packs(store.packs)}
    for name in packs.keys() - without:
        content = _content(store, name, packs[name])
        if content is None:
            continue
        if content.problem:
            return files
        named.update(entry.base for entry in content.entries if entry.codec == ADOPTED)
    return named & files


def _content(store: Store, name: ObjectId, seen: Path) -> PackContent | None:
    """What a pack that was `seen` holds, though it may be on its way into the trash or back; None if it is gone."""
    for path in (seen, store.pack_path(name), list_packs(store.trash).get(name), store.pack_path(name)):
        with contextlib.suppress(NotFound):
            if path:
                return read_pack(path)
    return None
