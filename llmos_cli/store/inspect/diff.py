"""What differs between two objects: tensors, other files, meta and recipe.

Files are equal by their chunk ids. Of those that are not, tensors are compared one by one, small JSON and text files by
their values and lines; of others only the sizes are told.
"""

from collections.abc import Iterator, Set
from dataclasses import dataclass, replace
from typing import Any, Final

from llmos_cli.formats import limits
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.manifest import FileEntry, Manifest
from llmos_cli.progress import Progress
from llmos_cli.store.handle import Store
from llmos_cli.store.inspect.census import take_census
from llmos_cli.store.inspect.changes import (
    ABSENT,
    JSON_BYTES,
    TEXT_BYTES,
    Changes,
    Lines,
    json_changes,
    line_changes,
    read_json,
)
from llmos_cli.store.inspect.tensordiff import TensorDiffs, compare_tensors, status
from llmos_cli.store.packs.objects import open_file, read_file, read_manifest
from llmos_cli.store.refs.lineage import describe_recipe

KEPT_CHANGES: Final = 1000
_FAR_BYTES: Final = limits.MiB  # a file that is small also where it has to be fetched
_SHARD_INDEX: Final = ".safetensors.index.json"  # says what the tensors' files say


@dataclass(frozen=True)
class FileDiff:
    """A file on both sides, or on one: sizes in bytes. `has_tensors`: what changed in it is told tensor by tensor.

    `values` are those of a JSON file, `lines` those of another text.
    """

    path: str
    old: int | None
    new: int | None
    equal: bool = False
    has_tensors: bool = False
    values: Changes | None = None
    lines: Lines | None = None

    @property
    def status(self) -> str:
        return status(self.old, self.new, self.equal)


@dataclass(frozen=True)
class Comparison:
    """Two objects side by side. `shared` counts bytes of the new one that lie in chunks of the old; `problems` say
    which files' tensors could not be read: those are compared as plain files."""

    old: Manifest
    new: Manifest
    tensors: TensorDiffs
    files: tuple[FileDiff, ...]
    meta: Changes
    recipe: Changes
    shared: int
    problems: tuple[str, ...]


def compare(store: Store, old: ObjectId, new: ObjectId, progress: Progress, *, measure: bool = True) -> Comparison:
    """Compare two objects; unless `measure`, by chunks: of what differs only small files of JSON or text are read.
    Raises Damaged, naming it, for an object that cannot be read."""
    before, after = read_manifest(store, old), read_manifest(store, new)
    left, right = take_census(store, before), take_census(store, after)
    tensors = compare_tensors(store, left, right, progress, measure=measure)
    chunks = {chunk.id for entry in before.files for chunk in entry.chunks}
    return Comparison(
        before,
        after,
        tensors,
        tuple(_compare_files(store, before, after, left.files.keys() | right.files.keys(), measure)),
        json_changes(before.meta, after.meta, keep=KEPT_CHANGES),
        json_changes(_recipe(before), _recipe(after), keep=KEPT_CHANGES),
        sum(chunk.size for entry in after.files for chunk in entry.chunks if chunk.id in chunks),
        tuple(dict.fromkeys(left.problems + right.problems)),
    )


def _compare_files(
    store: Store, before: Manifest, after: Manifest, with_tensors: Set[str], measure: bool
) -> Iterator[FileDiff]:
    left = {entry.path: entry for entry in before.files}
    right = {entry.path: entry for entry in after.files}
    for path in sorted(left.keys() | right.keys()):
        old, new = left.get(path), right.get(path)
        tensors = path in with_tensors
        if old is None or new is None:
            yield FileDiff(path, old.size if old else None, new.size if new else None, has_tensors=tensors)
            continue
        equal = old.chunks == new.chunks or (measure and _same_bytes(store, old, new))
        found = FileDiff(path, old.size, new.size, equal, tensors)
        small = measure or max(old.size, new.size) <= _FAR_BYTES
        if small and not equal and not tensors and not path.endswith(_SHARD_INDEX):
            found = _with_content(store, found, old, new)
        yield found


def _with_content(store: Store, found: FileDiff, old: FileEntry, new: FileEntry) -> FileDiff:
    """What changed inside a small file of JSON or text."""
    is_json = found.path.endswith(".json")
    if max(old.size, new.size) > (JSON_BYTES if is_json else TEXT_BYTES):
        return found
    before, after = read_file(store, old), read_file(store, new)
    if is_json:
        values = read_json(before), read_json(after)
        if ABSENT not in values:
            return replace(found, values=json_changes(*values, keep=KEPT_CHANGES))
    return replace(found, lines=line_changes(before, after))


def _same_bytes(store: Store, old: FileEntry, new: FileEntry) -> bool:
    """Of files whose chunks differ: they may have one size and be cut differently, as by an earlier version."""
    if old.size != new.size or [chunk.size for chunk in old.chunks] == [chunk.size for chunk in new.chunks]:
        return False
    a, b = open_file(store, old), open_file(store, new)
    steps = range(0, old.size, limits.CHUNK_BYTES)
    ranges = ((start, min(old.size, start + limits.CHUNK_BYTES)) for start in steps)
    return all(a.read(*where) == b.read(*where) for where in ranges)


def _recipe(manifest: Manifest) -> dict[str, Any]:
    return describe_recipe(manifest.recipe) if manifest.recipe else {}
