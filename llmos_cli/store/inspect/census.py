"""Every tensor of every file of an object, and what each takes in the store.

Reads headers and the index, no tensor. A file whose header cannot be believed has no tensors here; it is named, so
that the rest can still be shown.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from llmos_cli.errors import Damaged, Unsafe
from llmos_cli.formats.codec import CODEC_NAMES
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.manifest import FileEntry, Manifest
from llmos_cli.formats.tensors import TensorInfo, find_tensors
from llmos_cli.store.handle import Store
from llmos_cli.store.packs.objects import open_file
from llmos_cli.store.packs.packs import sync_index

MISSING: Final = "missing"


@dataclass(frozen=True)
class Tensor:
    """A tensor and the file it lies in."""

    file: FileEntry
    info: TensorInfo

    @property
    def size(self) -> int:
        return self.info.end - self.info.start


@dataclass(frozen=True)
class Census:
    """The tensors in the order of the files, the files that hold them by path, and why others cannot be read."""

    tensors: tuple[Tensor, ...]
    files: Mapping[str, FileEntry]
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """A part of a stored chunk: `size` bytes from `first` on."""

    id: ObjectId
    first: int
    size: int
    chunk_size: int


@dataclass(frozen=True)
class Footprint:
    """What a tensor takes: stored bytes, and its plain bytes by the codec they are stored under. A chunk that is shared
    with other tensors counts fully for each; one that also holds other bytes counts by its share."""

    stored: int
    codecs: dict[str, int]


def take_census(store: Store, manifest: Manifest) -> Census:
    """Find the tensors of all files."""
    tensors: list[Tensor] = []
    files: dict[str, FileEntry] = {}
    problems: list[str] = []
    for entry in manifest.files:
        try:
            table = find_tensors(entry.path, open_file(store, entry).read, entry.size, entry.path)
        except (Damaged, Unsafe) as exc:
            problems.append(exc.message)
            continue
        if table is None:
            continue
        files[entry.path] = entry
        tensors += (Tensor(entry, info) for info in table)
    return Census(tuple(tensors), files, tuple(problems))


class Layout:
    """Where the bytes of a file lie, chunk by chunk."""

    def __init__(self, entry: FileEntry) -> None:
        self._chunks = entry.chunks
        self._starts = list(accumulate((chunk.size for chunk in entry.chunks), initial=0))

    def runs(self, start: int, end: int) -> Iterator[Run]:
        """What holds the bytes from `start` to `end`, in order."""
        number = max(0, bisect_right(self._starts, start) - 1)
        while start < end:
            chunk, begin = self._chunks[number], self._starts[number]
            stop = min(end, begin + chunk.size)
            yield Run(chunk.id, start - begin, stop - start, chunk.size)
            start, number = stop, number + 1


def footprints(store: Store, tensors: Iterable[Tensor]) -> list[Footprint]:
    """What each tensor takes, by the index: of several copies of a chunk, the one that is read first."""
    layouts: dict[str, Layout] = {}
    known: dict[ObjectId, tuple[str, int]] = {}
    result = []
    for tensor in tensors:
        layout = layouts.get(tensor.file.path) or layouts.setdefault(tensor.file.path, Layout(tensor.file))
        codecs: dict[str, int] = {}
        stored = 0.0
        for run in layout.runs(tensor.info.start, tensor.info.end):
            if run.id not in known:
                known[run.id] = _stored(store, run.id, searched=MISSING in codecs)
            codec, size = known[run.id]
            codecs[codec] = codecs.get(codec, 0) + run.size
            stored += size * run.size / run.chunk_size
        result.append(Footprint(round(stored), codecs))
    return result


def _stored(store: Store, oid: ObjectId, *, searched: bool) -> tuple[str, int]:
    """The codec and the stored bytes of a chunk; what the index lacks is looked for in new packs once a tensor."""
    if not searched and not store.elsewhere and not store.index.has(oid):
        sync_index(store)
    copies = [location.entry for location in store.index.locate(oid)]
    copies = copies or [entry for place in store.elsewhere for entry in place.entries(oid)]
    if not copies:
        return MISSING, 0
    entry = min(copies, key=lambda copy: copy.depth)
    return CODEC_NAMES.get(entry.codec, str(entry.codec)), entry.stored_size
