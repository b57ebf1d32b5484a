"""Which stored chunks belong to tensors, how their words are read, and which older chunk each is likely to resemble."""

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate

from llmos_cli.errors import LlmosError
from llmos_cli.formats.codec import Words
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.manifest import Chunk, Manifest
from llmos_cli.formats.tensors import find_tensors
from llmos_cli.store.gc.reach import Root
from llmos_cli.store.handle import Store
from llmos_cli.store.intake.bases import Base, NewFile, find_base, nothing_near, open_base
from llmos_cli.store.packs.objects import open_file, read_manifest


@dataclass(frozen=True)
class Kin:
    """A chunk of a tensor and the one that lies at the same place in the model's base, if it has one."""

    chunk: Chunk
    words: Words
    near: Chunk | None


def tensor_chunks(store: Store, roots: Iterable[Root]) -> Iterator[Kin]:
    """The tensors of all living models; the base of one is what its ref was before, or a model that resembles it."""
    done: set[ObjectId] = set()
    for values in _by_ref(roots):
        for oid, before in zip(values, [*values[1:], None], strict=True):
            if oid not in done:
                done.add(oid)
                try:
                    yield from _chunks(store, oid, before)
                except LlmosError as exc:
                    store.progress.warn(f"@{oid.short} stays as it is: {exc.message}")


def _by_ref(roots: Iterable[Root]) -> Iterable[list[ObjectId]]:
    """The values of each ref, newest first."""
    found: dict[object, dict[ObjectId, None]] = {}
    for number, root in enumerate(roots):
        found.setdefault(root.ref or number, {})[root.id] = None
    return [list(values) for values in found.values()]


def _chunks(store: Store, oid: ObjectId, before: ObjectId | None) -> Iterator[Kin]:
    manifest = read_manifest(store, oid)
    files = _files(store, manifest)
    if not files:
        return
    base = _base(store, oid, files, before)
    entries = {entry.path: entry for entry in manifest.files}
    for file in files:
        chunks = entries[file.name].chunks
        starts = [0, *accumulate(chunk.size for chunk in chunks)]
        near = base.near(file.name, file.tensors) if base else nothing_near
        for tensor in file.tensors:
            if tensor.words.width:
                for number in range(bisect_left(starts, tensor.start), bisect_left(starts, tensor.end)):
                    yield Kin(chunks[number], tensor.words, near(starts[number]))


def _files(store: Store, manifest: Manifest) -> list[NewFile]:
    files = []
    for entry in manifest.files:
        read = open_file(store, entry).read
        tensors = find_tensors(entry.path, read, entry.size, entry.path)
        if tensors:
            files.append(NewFile(entry.path, tensors, read))
    return files


def _base(store: Store, oid: ObjectId, files: list[NewFile], before: ObjectId | None) -> Base | None:
    if before:
        try:
            base = open_base(store, before)
        except LlmosError:  # an earlier value that a clone never had
            base = None
        if base:
            return base
    return find_base(store, files, but=oid)
