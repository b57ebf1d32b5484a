"""What differs between the tensors of two objects: which are equal, and how far the others moved.

What is equal is known from chunk ids; only tensors that differ are read, piece by piece on every core, in bounded
memory. Tensors are paired by folder and name, whatever files they lie in, so that shard layouts do not matter.
"""

import os
import posixpath
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Final

from llmos_cli.formats import limits
from llmos_cli.formats.tensors import TensorInfo
from llmos_cli.progress import Progress
from llmos_cli.store.handle import Store
from llmos_cli.store.inspect.census import Census, Layout, Tensor
from llmos_cli.store.inspect.distance import Distance, Tally, comparable, distance, has_values, tally, word_bytes
from llmos_cli.store.packs.objects import FileReader, open_file

_WORKERS: Final = min(os.cpu_count() or 1, 16)
_memory = threading.local()


@dataclass(frozen=True)
class TensorDiff:
    """A tensor on both sides, or on one. `distance` is None where nothing was compared: equal, or not comparable."""

    name: str
    old: Tensor | None
    new: Tensor | None
    equal: bool = False
    distance: Distance | None = None

    @property
    def status(self) -> str:
        return status(self.old, self.new, self.equal)

    @property
    def size(self) -> int:
        """Its bytes, as they are in the new object where it is there."""
        tensor = self.new or self.old
        return tensor.size if tensor else 0


@dataclass(frozen=True)
class TensorDiffs:
    """All pairs of two objects. Of all `words` that both have and that can be compared, `changed` differ; `overall` is
    the distance of the tensors that changed, taken as one: None if none did that has values."""

    tensors: tuple[TensorDiff, ...]
    words: int
    changed: int
    overall: Distance | None


def status(old: object, new: object, equal: bool) -> str:
    """The word for a pair of which either may be None: added, removed, equal or changed."""
    if old is None:
        return "added"
    if new is None:
        return "removed"
    return "equal" if equal else "changed"


@dataclass(frozen=True)
class _Piece:
    """A piece of a pair of tensors to be measured: byte ranges in their files; `same` if its bytes are known to be."""

    pair: int
    old: tuple[int, int]
    new: tuple[int, int]
    same: bool

    @property
    def cost(self) -> int:
        """Bytes to be read."""
        return (self.old[1] - self.old[0]) + (0 if self.same else self.new[1] - self.new[0])


def compare_tensors(
    store: Store, left: Census, right: Census, progress: Progress, *, measure: bool = True
) -> TensorDiffs:
    """Compare all tensors of two objects; raises Damaged, naming it, for an object that cannot be read. Unless
    `measure`, only those are read of which the chunks do not tell whether they are equal."""
    layouts = (_layouts(left), _layouts(right))
    diffs = [_by_ids(diff, layouts) for diff in _pair(left.tensors, right.tensors)]
    pieces = [
        piece
        for number, diff in enumerate(diffs)
        if measure or _cut_otherwise(diff, layouts)
        for piece in _pieces(number, diff, layouts)
    ]
    readers = (_readers(store, left), _readers(store, right))
    tallies: dict[int, Tally] = {}
    if pieces:
        with progress.task("comparing", total=sum(piece.cost for piece in pieces)) as task:
            for piece, counted in _measure(diffs, pieces, readers):
                tallies[piece.pair] = tallies.get(piece.pair, Tally()) + counted
                task.advance(piece.cost)
    words = changed = 0
    moved = Tally()
    for number, diff in enumerate(diffs):
        if diff.equal and diff.old:
            words += diff.old.size // word_bytes(diff.old.info.dtype)
        elif number in tallies:
            counted = tallies[number]
            words += counted.words
            changed += counted.changed
            diffs[number] = found = _with_distance(diff, counted)
            if found.distance and found.distance.largest is not None:
                moved += counted
    return TensorDiffs(tuple(diffs), words, changed, distance(moved, bits=False) if moved.words else None)


def _with_distance(diff: TensorDiff, counted: Tally) -> TensorDiff:
    old, new = _infos(diff)
    alike = old.dtype == new.dtype
    if alike and old.shape == new.shape and not counted.changed:  # cut into other chunks, as by an earlier version
        return replace(diff, equal=True)
    return replace(diff, distance=distance(counted, bits=alike, values=has_values(old.dtype) and has_values(new.dtype)))


def _pair(left: Sequence[Tensor], right: Sequence[Tensor]) -> Iterator[TensorDiff]:
    """Pair tensors by folder and name. A name that stands in several files of a folder is paired by file first."""
    sides: dict[tuple[str, str], tuple[list[Tensor], list[Tensor]]] = {}
    for side, tensors in enumerate((left, right)):
        for tensor in tensors:
            key = posixpath.dirname(tensor.file.path), tensor.info.name
            sides.setdefault(key, ([], []))[side].append(tensor)
    for (folder, name), (old, new) in sides.items():
        if len(old) <= 1 and len(new) <= 1:
            label = posixpath.join(folder, name)
            yield TensorDiff(label, old[0] if old else None, new[0] if new else None)
            continue
        there = {tensor.file.path: tensor for tensor in new}
        here = {tensor.file.path for tensor in old}
        spare = [tensor for tensor in new if tensor.file.path not in here]
        for tensor in old:
            other = there.get(tensor.file.path) or (spare.pop(0) if spare else None)
            yield TensorDiff(f"{tensor.file.path}: {name}", tensor, other)
        for tensor in spare:
            yield TensorDiff(f"{tensor.file.path}: {name}", None, tensor)


def _by_ids(diff: TensorDiff, layouts: tuple[dict[str, Layout], dict[str, Layout]]) -> TensorDiff:
    """Equal if the same chunks hold it; with other chunks it may still be, which only its bytes can tell."""
    if diff.old is None or diff.new is None:
        return diff
    a, b = diff.old.info, diff.new.info
    if (a.dtype, a.shape, a.end - a.start) != (b.dtype, b.shape, b.end - b.start):
        return diff
    runs = layouts[0][diff.old.file.path].runs(a.start, a.end), layouts[1][diff.new.file.path].runs(b.start, b.end)
    return replace(diff, equal=list(runs[0]) == list(runs[1]))


def _pieces(number: int, diff: TensorDiff, layouts: tuple[dict[str, Layout], dict[str, Layout]]) -> Iterator[_Piece]:
    """Cut what can be compared of a pair into pieces of a chunk's size: with equal dtypes on the grid of the chunks."""
    if diff.equal or diff.old is None or diff.new is None:
        return
    old, new = diff.old.info, diff.new.info
    widths = word_bytes(old.dtype), word_bytes(new.dtype)
    words, step = _common_words(diff.old, diff.new), limits.CHUNK_BYTES // max(widths)
    a, b = layouts[0][diff.old.file.path], layouts[1][diff.new.file.path]
    for first in range(0, words, step):
        last = min(words, first + step)
        here = old.start + first * widths[0], old.start + last * widths[0]
        there = new.start + first * widths[1], new.start + last * widths[1]
        same = old.dtype == new.dtype and list(a.runs(*here)) == list(b.runs(*there))
        yield _Piece(number, here, there, same)


def _cut_otherwise(diff: TensorDiff, layouts: tuple[dict[str, Layout], dict[str, Layout]]) -> bool:
    """Whether both sides may have the same bytes in other chunks."""
    if diff.equal or diff.old is None or diff.new is None:
        return False
    a, b = diff.old.info, diff.new.info
    if (a.dtype, a.shape, a.end - a.start) != (b.dtype, b.shape, b.end - b.start):
        return False
    runs = layouts[0][diff.old.file.path].runs(a.start, a.end), layouts[1][diff.new.file.path].runs(b.start, b.end)
    return [(run.first, run.size, run.chunk_size) for run in runs[0]] != [
        (run.first, run.size, run.chunk_size) for run in runs[1]
    ]


def _common_words(old: Tensor, new: Tensor) -> int:
    """How many words can be compared one by one: all if there are as many, else those of the rows that both have."""
    if not comparable(old.info.dtype, new.info.dtype):
        return 0
    words = old.size // word_bytes(old.info.dtype), new.size // word_bytes(new.info.dtype)
    rows = len(old.info.shape) == len(new.info.shape) and old.info.shape[1:] == new.info.shape[1:]
    return min(words) if words[0] == words[1] or rows else 0


def _measure(
    diffs: Sequence[TensorDiff], pieces: Sequence[_Piece], readers: Sequence[dict[str, FileReader]]
) -> Iterator[tuple[_Piece, Tally]]:
    """Read and count on every core; a few pieces are under way at a time."""

    def count(piece: _Piece) -> Tally:
        diff = diffs[piece.pair]
        assert diff.old
        assert diff.new
        dtypes = diff.old.info.dtype, diff.new.info.dtype
        if piece.same and not has_values(dtypes[0]):
            return Tally((piece.old[1] - piece.old[0]) // word_bytes(dtypes[0]))
        a = _read(0, readers[0][diff.old.file.path], piece.old)
        b = None if piece.same else _read(1, readers[1][diff.new.file.path], piece.new)
        return tally(a, b, dtypes)

    waiting: deque[tuple[_Piece, Future[Tally]]] = deque()
    with ThreadPoolExecutor(_WORKERS, "compare") as workers:
        try:
            for piece in pieces:
                waiting.append((piece, workers.submit(count, piece)))
                if len(waiting) > 2 * _WORKERS:
                    done, future = waiting.popleft()
                    yield done, future.result()
            for done, future in waiting:
                yield done, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


def _read(side: int, reader: FileReader, where: tuple[int, int]) -> memoryview:
    """The bytes of a range, in memory that this thread uses again and again."""
    rooms: list[bytearray] | None = getattr(_memory, "rooms", None)
    if rooms is None:
        rooms = _memory.rooms = [bytearray(limits.CHUNK_BYTES), bytearray(limits.CHUNK_BYTES)]
    out = memoryview(rooms[side])[: where[1] - where[0]]
    reader.readinto(where[0], out)
    return out


def _infos(diff: TensorDiff) -> tuple[TensorInfo, TensorInfo]:
    assert diff.old
    assert diff.new
    return diff.old.info, diff.new.info


def _layouts(census: Census) -> dict[str, Layout]:
    return {path: Layout(entry) for path, entry in census.files.items()}


def _readers(store: Store, census: Census) -> dict[str, FileReader]:
    return {path: open_file(store, entry) for path, entry in census.files.items()}
