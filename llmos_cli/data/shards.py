"""Token shards: streams of documents in, safetensors files of a given size out, as layout.py tells.

Documents of packed tasks are cut into pieces of at most a row, and the pieces of about one shard are packed together;
the rows that are least full wait for the next shard's documents. Every token is kept. Memory is bounded by about three
shards a split and one batch of text. It knows nothing of where text or tokenizers come from.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from llmos_cli.data.encode import Encoded
from llmos_cli.data.layout import DTYPES, RAGGED_TASKS, SHARD_PREFIX, SPLITS, TABLE_COLUMNS, dtype_name, split_folder
from llmos_cli.data.packing import best_fit
from llmos_cli.formats.canonical import Json
from llmos_cli.formats.ids import IdHasher, object_id
from llmos_cli.formats.manifest import FileEntry
from llmos_cli.progress import Task
from llmos_cli.store.transaction import Tensor

if TYPE_CHECKING:
    from llmos_cli.store.transaction import Transaction

_I64: Final = DTYPES["I64"]
_DIGEST_BYTES: Final = 8


@dataclass(frozen=True)
class Shape:
    """What shards are to look like; `pad_id` fills the ends of rows, `shard_size` counts bytes of tokens."""

    task: str
    seq_len: int
    shard_size: int
    dtype: np.dtype
    pad_id: int

    @property
    def ragged(self) -> bool:
        return self.task in RAGGED_TASKS


@dataclass
class Counts:
    """What a split holds; `lengths[n]` counts documents of at most 2**n tokens that are longer than half of it."""

    documents: int = 0
    tokens: int = 0
    rows: int = 0
    shards: int = 0
    lengths: dict[int, int] = field(default_factory=dict)
    labels: dict[int, int] = field(default_factory=dict)

    def as_json(self) -> dict[str, Json]:
        found: dict[str, Json] = {
            "documents": self.documents,
            "tokens": self.tokens,
            "rows": self.rows,
            "shards": self.shards,
            "lengths": {str(1 << power): number for power, number in sorted(self.lengths.items())},
        }
        if self.labels:
            found["labels"] = {str(label): number for label, number in sorted(self.labels.items())}
        return found


@dataclass(frozen=True)
class Shards:
    """What was written: the files, named, and what each split holds."""

    files: tuple[FileEntry, ...]
    splits: dict[str, Counts]
    text_bytes: int

    @property
    def documents(self) -> int:
        return sum(counts.documents for counts in self.splits.values())

    @property
    def tokens(self) -> int:
        return sum(counts.tokens for counts in self.splits.values())

    @property
    def rows(self) -> int:
        """Rows to train on."""
        return self.splits["train"].rows if "train" in self.splits else 0

    def facts(self, shape: Shape) -> dict[str, Json]:
        """What a dataset's manifest tells of them."""
        facts: dict[str, Json] = {
            "documents": self.documents,
            "tokens": self.tokens,
            "rows": self.rows,
            "shards": len(self.files),
            "splits": {split: counts.as_json() for split, counts in self.splits.items()},
        }
        room = sum(counts.rows for counts in self.splits.values()) * shape.seq_len
        if not shape.ragged and room:
            facts["fill"] = round(self.tokens / room, 6)
        return facts


def write_shards(tx: "Transaction", stream: Iterable[Encoded], shape: Shape, *, task: Task) -> Shards:
    """Write the whole stream through `tx`; a shard holds as many whole rows, or documents, as fit, at least one."""
    writers: dict[str, _Writer] = {}
    text_bytes = 0
    for run in stream:
        if run.split not in writers:
            writers[run.split] = (_RaggedWriter if shape.ragged else _PackedWriter)(tx, shape)
        writers[run.split].add(run)
        text_bytes += run.text_bytes
        task.advance(run.text_bytes)
    files: list[FileEntry] = []
    counts: dict[str, Counts] = {}
    for split in SPLITS:
        if split in writers:
            entries, counts[split] = writers[split].finish()
            files += [
                replace(entry, path=f"{split_folder(split)}{SHARD_PREFIX}{number:05}-of-{len(entries):05}.safetensors")
                for number, entry in enumerate(entries)
            ]
    return Shards(tuple(files), counts, text_bytes)


class _Writer(Protocol):
    def add(self, run: Encoded) -> None: ...

    def finish(self) -> tuple[list[FileEntry], Counts]: ...


class _Table:
    """What is told of documents, collected as they end and handed out with a shard."""

    def __init__(self) -> None:
        self.counts = Counts()
        self._rows: list[np.ndarray] = []
        self._digests: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self._parts: list[np.ndarray] = []
        self._hasher: IdHasher | None = None  # of the document that has not ended
        self._open = 0  # its tokens so far

    def add(self, run: Encoded) -> None:
        ends = np.asarray(run.ends, np.int64)
        lengths = np.diff(ends, prepend=-self._open)
        self.counts.documents += len(ends)
        self.counts.tokens += run.ids.size
        for power, number in zip(*np.unique(_powers(lengths), return_counts=True), strict=True):
            self.counts.lengths[int(power)] = self.counts.lengths.get(int(power), 0) + int(number)
        if run.labels is not None:
            for label, number in zip(*np.unique(run.labels, return_counts=True), strict=True):
                self.counts.labels[int(label)] = self.counts.labels.get(int(label), 0) + int(number)
            self._labels.append(np.asarray(run.labels, _I64))
        if run.parts is not None:
            self._parts.append(np.asarray(run.parts, _I64))
        self._rows.append(np.column_stack([np.asarray(run.origins, _I64).reshape(-1, 3), lengths]))
        self._digests.append(self._digest(run, ends))
        last = int(ends[-1]) if ends.size else -self._open
        self._open = run.ids.size - last

    def take(self, number: int | None = None) -> dict[str, np.ndarray]:
        """The tensors about the documents that ended, or about the first `number` of them."""
        tensors = {}
        for name, held, empty in (
            ("documents", self._rows, np.empty((0, TABLE_COLUMNS), _I64)),
            ("digests", self._digests, np.empty(0, DTYPES["U64"])),
            ("labels", self._labels, None),
            ("parts", self._parts, None),
        ):
            if held or empty is not None:
                joined = np.concatenate(held) if held else empty
                assert joined is not None
                tensors[name] = joined[:number]
                held[:] = [] if number is None else [joined[number:]]
        return tensors

    def _digest(self, run: Encoded, ends: np.ndarray) -> np.ndarray:
        data, width = _bytes(np.ascontiguousarray(run.ids)), run.ids.dtype.itemsize
        found, start = [], 0
        for end in (ends * width).tolist():
            if self._hasher is None:
                found.append(object_id(data[start:end])[:_DIGEST_BYTES])
            else:
                self._hasher.update(data[start:end])
                found.append(self._hasher.id()[:_DIGEST_BYTES])
                self._hasher = None
            start = end
        if start < len(data):
            self._hasher = self._hasher or IdHasher()
            self._hasher.update(data[start:])
        told = [np.asarray(column, _I64) for column in (run.parts, run.labels) if column is not None]
        if told:
            rows = np.column_stack(told)
            found = [object_id(digest + row.tobytes())[:_DIGEST_BYTES] for digest, row in zip(found, rows, strict=True)]
        return np.frombuffer(b"".join(found), DTYPES["U64"])


class _PackedWriter:
    """Holds pieces until they fill a shard, packs them and writes the fullest rows."""

    def __init__(self, tx: "Transaction", shape: Shape) -> None:
        self._tx, self._shape = tx, shape
        self._shard_rows = max(1, shape.shard_size // (shape.seq_len * shape.dtype.itemsize))
        self._table = _Table()
        self._entries: list[FileEntry] = []
        self._tokens = np.empty(0, shape.dtype)
        self._loss: np.ndarray | None = None
        self._runs: list[Encoded] = []  # not yet joined to those
        self._pieces = np.empty((0, 3), np.int64)  # document, where in it, length: in the order they lie in
        self._new: list[np.ndarray] = []
        self._held = 0  # tokens in pieces
        self._open = self._offset = (
            0  # of the piece that has not ended: its tokens, and where in its document it begins
        )

    def add(self, run: Encoded) -> None:
        first = self._table.counts.documents
        self._table.add(run)
        self._runs.append(run)
        self._new.append(self._cut(run, first))
        self._held += int(self._new[-1][:, 2].sum())
        while (
            self._held > self._shard_rows * self._shape.seq_len
        ):  # so that something is left to tell the last ends with
            self._write()

    def finish(self) -> tuple[list[FileEntry], Counts]:
        while self._held or not self._entries:
            self._write()
        counts = self._table.counts
        counts.shards = len(self._entries)
        return self._entries, counts

    def _cut(self, run: Encoded, first: int) -> np.ndarray:
        """The pieces that end in a run; what is left of its last document is open."""
        row = self._shape.seq_len
        ends = np.asarray(run.ends, np.int64)
        starts = np.concatenate([[-self._open], ends])
        lengths = np.concatenate([ends, [run.ids.size]]) - starts
        offsets = np.zeros_like(starts)
        offsets[0] = self._offset
        numbers = -(-lengths // row)
        numbers[-1] = lengths[-1] // row
        self._open = int(lengths[-1] - numbers[-1] * row)
        self._offset = int(offsets[-1] + numbers[-1] * row)
        within = np.arange(numbers.sum()) - np.repeat(np.cumsum(numbers) - numbers, numbers)
        return np.column_stack(
            [
                np.repeat(np.arange(first, first + len(starts)), numbers),
                np.repeat(offsets, numbers) + within * row,
                np.minimum(row, np.repeat(lengths, numbers) - within * row),
            ]
        )

    def _write(self) -> None:
        """Write one shard of the first pieces, if need be of all."""
        self._join()
        row_length = self._shape.seq_len
        ends = np.cumsum(self._pieces[:, 2])
        number = int(np.searchsorted(ends, self._shard_rows * row_length)) + 1
        pieces, starts = self._pieces[:number], (ends - self._pieces[:, 2])[:number]
        packed = best_fit(pieces[:, 2], row_length)
        fullest = np.sort(np.argsort(-packed.filled, kind="stable")[: self._shard_rows])
        new_row = np.full(len(packed.filled), -1)
        new_row[fullest] = np.arange(len(fullest))
        order = packed.order[new_row[packed.row_of[packed.order]] >= 0]
        rows = new_row[packed.row_of[order]]
        chosen = pieces[order]
        columns = np.cumsum(chosen[:, 2]) - chosen[:, 2]
        columns -= (np.cumsum(packed.filled[fullest]) - packed.filled[fullest])[rows]
        shape = len(fullest), row_length
        tokens = np.full(shape, self._shape.pad_id, self._shape.dtype)
        _copy(self._tokens, starts[order], chosen[:, 2], tokens, rows * row_length + columns)
        tensors = {"segments": np.column_stack([rows, chosen]), **self._table.take()}
        if self._loss is not None:
            tensors["loss"] = np.zeros(shape, np.uint8)
            _copy(self._loss, starts[order], chosen[:, 2], tensors["loss"], rows * row_length + columns)
        self._entries.append(_add(self._tx, len(self._entries), tensors | {"tokens": tokens}))
        self._table.counts.rows += len(fullest)
        self._drop(np.sort(order), starts)

    def _join(self) -> None:
        if not self._runs:
            return
        losses = [run.loss for run in self._runs]
        if self._loss is not None or any(loss is not None for loss in losses):
            before = np.ones(len(self._tokens), np.uint8) if self._loss is None else self._loss
            parts = [np.ones(run.ids.size, np.uint8) if run.loss is None else run.loss for run in self._runs]
            self._loss = np.concatenate([before, *parts])
        self._tokens = np.concatenate([self._tokens, *(run.ids for run in self._runs)])
        self._pieces = np.concatenate([self._pieces, *self._new])
        self._runs, self._new = [], []

    def _drop(self, written: np.ndarray, starts: np.ndarray) -> None:
        """Forget pieces that were written; `starts` tells where those that were looked at begin."""
        looked = len(starts)
        stay = np.ones(len(self._pieces), bool)
        stay[written] = False
        left = np.flatnonzero(stay[:looked])
        end = int(starts[-1] + self._pieces[looked - 1, 2]) if looked else 0
        spans = [(int(starts[at]), int(starts[at] + self._pieces[at, 2])) for at in left]
        spans.append((end, len(self._tokens)))
        self._tokens = np.concatenate([self._tokens[start:stop] for start, stop in spans])
        if self._loss is not None:
            self._loss = np.concatenate([self._loss[start:stop] for start, stop in spans])
        self._held -= int(self._pieces[written, 2].sum())
        self._pieces = self._pieces[stay]


class _RaggedWriter:
    """Holds documents until they fill a shard."""

    def __init__(self, tx: "Transaction", shape: Shape) -> None:
        self._tx, self._shape = tx, shape
        self._room = max(1, shape.shard_size // shape.dtype.itemsize)
        self._table = _Table()
        self._entries: list[FileEntry] = []
        self._runs: list[Encoded] = []
        self._tokens = np.empty(0, shape.dtype)
        self._loss: np.ndarray | None = None
        self._ends: list[np.ndarray] = []
        self._size = 0

    def add(self, run: Encoded) -> None:
        self._table.add(run)
        self._ends.append(np.asarray(run.ends, np.int64) + self._size)
        self._runs.append(run)
        self._size += run.ids.size
        if self._size > self._room:
            self._write_full()

    def finish(self) -> tuple[list[FileEntry], Counts]:
        self._write_full()
        ends = np.concatenate(self._ends)
        if ends.size or not self._entries:
            self._write(ends, len(ends))
        counts = self._table.counts
        counts.rows, counts.shards = counts.documents, len(self._entries)
        return self._entries, counts

    def _write_full(self) -> None:
        """Write shards while there are more whole documents than fit into one."""
        ends = np.concatenate(self._ends)
        while ends.size and ends[-1] > self._room:
            number = max(1, int(np.searchsorted(ends, self._room, side="right")))
            if number == len(ends):
                break
            ends = self._write(ends, number)
        self._ends = [ends]

    def _write(self, ends: np.ndarray, number: int) -> np.ndarray:
        """Write the first documents; returns where the others end then."""
        self._tokens = np.concatenate([self._tokens, *(run.ids for run in self._runs)])
        if any(run.loss is not None for run in self._runs):
            parts = [np.ones(run.ids.size, np.uint8) if run.loss is None else run.loss for run in self._runs]
            self._loss = np.concatenate([np.empty(0, np.uint8) if self._loss is None else self._loss, *parts])
        self._runs = []
        size = int(ends[number - 1]) if number else 0
        tensors = {"offsets": np.concatenate([[0], ends[:number]]).astype(_I64), **self._table.take(number)}
        if self._loss is not None:
            tensors["loss"], self._loss = self._loss[:size], self._loss[size:]
        tensors["tokens"], self._tokens = self._tokens[:size], self._tokens[size:]
        self._entries.append(_add(self._tx, len(self._entries), tensors))
        self._size -= size
        return ends[number:] - size


def _add(tx: "Transaction", number: int, tensors: dict[str, np.ndarray]) -> FileEntry:
    return tx.add_tensors(
        f"{SHARD_PREFIX}{number:05}.safetensors",
        [
            Tensor(name, dtype_name(array.dtype), array.shape, partial(_bytes, array))
            for name, array in sorted(tensors.items())
        ],
    )


def _copy(source: np.ndarray, starts: np.ndarray, lengths: np.ndarray, target: np.ndarray, places: np.ndarray) -> None:
    """Copy runs of `source` to their places in `target`, counted through its rows."""
    flat = target.reshape(-1)
    for start, length, place in zip(starts.tolist(), lengths.tolist(), places.tolist(), strict=True):
        flat[place : place + length] = source[start : start + length]


def _powers(lengths: np.ndarray) -> np.ndarray:
    """The power of two that each length fits into."""
    powers: np.ndarray = np.frexp(np.maximum(lengths, 1) - 0.5)[1]
    return powers


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).data.cast("B") if array.size else memoryview(b"")
