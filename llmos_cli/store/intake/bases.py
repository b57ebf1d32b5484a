"""What a new tensor is likely to resemble: the same tensor of a model that is stored already.

A base is found by name (`--base`), as the value that a ref had before, or among the newest stored models that have the
same large tensors (names, dtypes and rows; their number may differ), judged on sampled bytes. Being wrong costs nothing
but time: each chunk decides for itself whether a delta pays.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, islice
from posixpath import dirname
from typing import Final

from llmos_cli.errors import LlmosError
from llmos_cli.formats import codec, limits
from llmos_cli.formats.ids import Buffer, ObjectId, checksum
from llmos_cli.formats.manifest import Chunk, FileEntry, Manifest
from llmos_cli.formats.tensors import TensorInfo, find_tensors
from llmos_cli.store.handle import Store
from llmos_cli.store.packs.objects import open_file, read_manifest, read_object
from llmos_cli.store.refs.refs import RefEntry, read_ref, ref_names

_NEWEST: Final = 64  # refs that are looked at for a base
_JUDGED: Final = 6  # of those that fit, how many are judged
_SAMPLES: Final = 4
_SAMPLE_BYTES: Final = 64 * limits.KiB
_SMALL: Final = 0.02  # tensors below this share of the largest say nothing about a model
_WORTH: Final = 0.9
_FACT: Final = "tensors"

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


def find_base(
    store: Store, files: Iterable[NewFile], *, first: ObjectId | None = None, but: ObjectId | None = None
) -> Base | None:
    """The stored model that the files resemble most, `first` among equals, never `but`; None if none is near enough."""
    files = [file for file in files if file.tensors]
    samples = _samples(files)
    if not samples:
        return None
    best, best_size = None, _WORTH * sum(codec.encode(sample.plain, sample.words).size for sample in samples)
    for oid in _candidates(store, {sample.mark for sample in samples}, first):
        if oid == but:
            continue
        try:
            base = open_base(store, oid)
            size = _delta_size(store, base, samples) if base else None
        except LlmosError:
            continue
        if size is not None and size < best_size:
            best, best_size = base, size
    return best


@dataclass(frozen=True)
class _Sample:
    """A run of bytes from `offset` on in one of the new tensors."""

    folder: str
    tensor: str
    offset: int
    mark: bytes
    words: codec.Words
    plain: memoryview


def _samples(files: Sequence[NewFile]) -> list[_Sample]:
    """From the middle of each of the largest tensors."""
    tensors = [(file, tensor) for file in files for tensor in file.tensors if tensor.words.width]
    tensors.sort(key=lambda item: (item[1].start - item[1].end, item[1].name))
    samples: list[_Sample] = []
    for file, tensor in tensors[:_SAMPLES]:
        size = tensor.end - tensor.start
        if samples and size < _SMALL * (tensors[0][1].end - tensors[0][1].start):
            break
        offset = size // 2 // limits.CHUNK_BYTES * limits.CHUNK_BYTES
        plain = memoryview(file.read(tensor.start + offset, tensor.start + min(size, offset + _SAMPLE_BYTES)))
        if plain:
            folder = dirname(file.name)
            samples.append(_Sample(folder, tensor.name, offset, _mark(folder, tensor), tensor.words, plain))
    return samples


def _delta_size(store: Store, base: Base, samples: Sequence[_Sample]) -> int | None:
    total = 0
    for sample in samples:
        chunk = base.chunk(sample.folder, sample.tensor, sample.offset)
        if chunk is None:
            return None
        before = memoryview(read_object(store, chunk.id))[: len(sample.plain)]
        total += codec.encode_delta(sample.plain, before, sample.words).size
    return total


def _candidates(store: Store, marks: Set[bytes], first: ObjectId | None) -> list[ObjectId]:
    """Manifests that have tensors with these marks, the newest refs' first."""
    newest = sorted(_readable_refs(store), key=lambda entry: entry.time, reverse=True)[:_NEWEST]
    ids = list(dict.fromkeys([*([first] if first else []), *(entry.id for entry in newest)]))
    known = store.index.facts(_FACT, ids)
    fresh: dict[bytes, bytes] = {oid: _marks_of(store, oid) for oid in ids if oid not in known}
    if fresh:
        store.index.add_facts(_FACT, fresh.items())
    every = known | fresh
    fitting = (oid for oid in ids if marks <= {every[oid][at : at + 8] for at in range(0, len(every[oid]), 8)})
    return list(islice(fitting, _JUDGED))


def _readable_refs(store: Store) -> Iterator[RefEntry]:
    for ref in ref_names(store):
        with suppress(LlmosError):  # a broken one is no reason not to store anything else
            entry = read_ref(store, ref)
            if entry:
                yield entry


def _marks_of(store: Store, oid: ObjectId) -> bytes:
    try:
        tables = list(_tables(store, read_manifest(store, oid)))
    except LlmosError:
        return b""
    return b"".join(sorted(_mark(dirname(entry.path), tensor) for entry, tensors in tables for tensor in tensors))


def _mark(folder: str, tensor: TensorInfo) -> bytes:
    """8 bytes for what two tensors have in common that may rest on each other; the number of rows may differ (a
    vocabulary that grew)."""
    return checksum(f"{folder}\0{tensor.name}\0{tensor.dtype}\0{tensor.shape[1:]}".encode()).to_bytes(8, "little")


def _tables(store: Store, manifest: Manifest) -> Iterable[tuple[FileEntry, Sequence[TensorInfo]]]:
    for entry in manifest.files:
        tensors = find_tensors(entry.path, open_file(store, entry).read, entry.size, entry.path)
        if tensors:
            yield entry, tensors
