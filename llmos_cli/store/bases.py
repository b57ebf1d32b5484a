"""What a new tensor is likely to resemble: the same tensor of a model that is stored already.

A base is found by name (`--base`), as the value that a ref had before, or among the newest stored models whose
tensors have the same names, dtypes and rows, judged on sampled bytes. Being wrong costs nothing but time: each chunk
decides for itself whether a delta pays.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from posixpath import dirname
from typing import Final

from llmos_cli.errors import LlmosError
from llmos_cli.formats import codec, limits
from llmos_cli.formats.ids import Buffer, ObjectId, object_id
from llmos_cli.formats.manifest import Chunk, FileEntry, Manifest
from llmos_cli.formats.tensors import TensorInfo, find_tensors
from llmos_cli.store.handle import Store
from llmos_cli.store.objects import open_file, read_manifest, read_object
from llmos_cli.store.refs import RefEntry, read_ref, ref_names

_NEWEST: Final = 64  # refs that are looked at for a base
_JUDGED: Final = 6  # of those that fit, how many are judged
_SAMPLES: Final = 4
_SAMPLE_BYTES: Final = 64 * limits.KiB
_WORTH: Final = 0.9
_FACT: Final = "layout"

Nearby = Callable[[int], Chunk | None]


def nothing_near(_start: int) -> Chunk | None:
    """No base."""
    return None


@dataclass(frozen=True)
class Base:
    """A stored manifest: for each (folder, tensor) its chunks by their offset in the tensor."""

    id: ObjectId
    tensors: Mapping[tuple[str, str], Mapping[int, Chunk]]

    def chunk(self, folder: str, tensor: str, offset: int) -> Chunk | None:
        return self.tensors.get((folder, tensor), {}).get(offset)

    def near(self, name: str, tensors: Sequence[TensorInfo]) -> Nearby:
        """For a file `name` with these tensors, in file order: from an offset in it to the chunk it resembles."""
        starts, folder = [tensor.start for tensor in tensors], dirname(name)

        def find(start: int) -> Chunk | None:
            at = bisect_right(starts, start) - 1
            while at > 0 and tensors[at].start == tensors[at].end:
                at -= 1  # an empty tensor starts where the one after it does, or the one before ends
            return self.chunk(folder, tensors[at].name, start - tensors[at].start) if at >= 0 else None

        return find


@dataclass(frozen=True)
class NewFile:
    """A file that is to be stored: its tensors, and how to read it."""

    name: str
    tensors: Sequence[TensorInfo]
    read: Callable[[int, int], Buffer]


def open_base(store: Store, oid: ObjectId) -> Base | None:
    """A stored manifest as a base; None if it has no tensors. Raises Damaged if it cannot be read."""
    tensors: dict[tuple[str, str], dict[int, Chunk]] = {}
    for entry, found in _tables(store, read_manifest(store, oid)):
        starts = [0, *accumulate(chunk.size for chunk in entry.chunks)]
        for tensor in found:
            first, last = bisect_left(starts, tensor.start), bisect_left(starts, tensor.end)
            tensors[dirname(entry.path), tensor.name] = {
                starts[number] - tensor.start: entry.chunks[number]
                for number in range(first, min(last, len(entry.chunks)))
            }
    return Base(oid, tensors) if tensors else None


def find_base(store: Store, files: Iterable[NewFile], *, first: ObjectId | None = None) -> Base | None:
    """The stored model that the files resemble most, `first` among equals; None if none is near enough."""
    files = [file for file in files if file.tensors]
    samples = _samples(files)
    if not samples:
        return None
    layout = _layout((file.name, file.tensors) for file in files)
    best, best_size = None, _WORTH * sum(codec.encode(plain, words).size for _, words, plain in samples)
    for oid in _candidates(store, layout, first):
        try:
            base = open_base(store, oid)
            size = _delta_size(store, base, samples) if base else None
        except LlmosError:
            continue
        if size is not None and size < best_size:
            best, best_size = base, size
    return best


_Sample = tuple[tuple[str, str, int], codec.Words, memoryview]  # (folder, tensor, offset), how to read it, its bytes


def _samples(files: Sequence[NewFile]) -> list[_Sample]:
    """A run from the middle of each of the largest tensors."""
    tensors = [(file, tensor) for file in files for tensor in file.tensors if tensor.words.width]
    tensors.sort(key=lambda item: (item[1].start - item[1].end, item[1].name))
    samples = []
    for file, tensor in tensors[:_SAMPLES]:
        size = tensor.end - tensor.start
        offset = size // 2 // limits.CHUNK_BYTES * limits.CHUNK_BYTES
        run = memoryview(file.read(tensor.start + offset, tensor.start + min(size, offset + _SAMPLE_BYTES)))
        if run:
            samples.append(((dirname(file.name), tensor.name, offset), tensor.words, run))
    return samples


def _delta_size(store: Store, base: Base, samples: Sequence[_Sample]) -> int | None:
    total = 0
    for place, words, plain in samples:
        chunk = base.chunk(*place)
        if chunk is None:
            return None
        total += codec.encode_delta(plain, memoryview(read_object(store, chunk.id))[: len(plain)], words).size
    return total


def _candidates(store: Store, layout: ObjectId, first: ObjectId | None) -> list[ObjectId]:
    """Manifests with this layout, the newest refs' first."""
    newest = sorted(_readable_refs(store), key=lambda entry: entry.time, reverse=True)[:_NEWEST]
    ids = list(dict.fromkeys([*([first] if first else []), *(entry.id for entry in newest)]))
    known = store.index.facts(_FACT, ids)
    fresh = {oid: _layout_of(store, oid) for oid in ids if oid not in known}
    if fresh:
        store.index.add_facts(_FACT, fresh.items())
    return [oid for oid in ids if (known.get(oid) or fresh.get(oid)) == layout][:_JUDGED]


def _readable_refs(store: Store) -> Iterator[RefEntry]:
    for ref in ref_names(store):
        with suppress(LlmosError):  # a broken one is no reason not to store anything else
            entry = read_ref(store, ref)
            if entry:
                yield entry


def _layout_of(store: Store, oid: ObjectId) -> bytes:
    try:
        tables = [(entry.path, found) for entry, found in _tables(store, read_manifest(store, oid))]
    except LlmosError:
        return b""
    return _layout(tables) if tables else b""


def _layout(tables: Iterable[tuple[str, Sequence[TensorInfo]]]) -> ObjectId:
    """What models with the same tensors have in common; the number of rows may differ (a vocabulary that grew)."""
    lines = sorted(
        f"{dirname(path)}\0{tensor.name}\0{tensor.dtype}\0{tensor.shape[1:]}"
        for path, tensors in tables
        for tensor in tensors
    )
    return object_id("\n".join(lines).encode())


def _tables(store: Store, manifest: Manifest) -> Iterable[tuple[FileEntry, Sequence[TensorInfo]]]:
    for entry in manifest.files:
        tensors = find_tensors(entry.path, open_file(store, entry).read, entry.size, entry.path)
        if tensors:
            yield entry, tensors
