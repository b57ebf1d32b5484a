"""The rows of a token dataset as numpy batches, read straight out of the store. No torch.

Rows are fetched in any order. They are held as stored (two or four bytes a token) in blocks of about one chunk, least
recently used out first, so memory is bounded whatever the dataset's size, and what fits is decoded once. Every read is
verified by the store. Nothing but the shards that are read is opened. Which rows a step sees is `order.py`'s affair.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from llmos_cli.data.layout import (
    DTYPES,
    TABLE_COLUMNS,
    ShardFile,
    Split,
    name_of,
    open_shard,
    shard_entries,
)
from llmos_cli.data.mixing import MIX, folders_of
from llmos_cli.errors import Damaged, UsageError
from llmos_cli.formats.limits import CHUNK_BYTES, MiB
from llmos_cli.formats.manifest import FileEntry, Manifest
from llmos_cli.store.local import Store

CACHE_BYTES: Final = 512 * MiB
_PLAN_BYTES: Final = 64 * MiB
_OPEN_SHARDS: Final = 64


@dataclass(frozen=True)
class Batch:
    """Rows of token ids, [n, seq_len] of int64, and what a model must know where a row is more than one document.

    Of a batch whose rows are one full document each the other fields are None: every token but a row's first is
    learned. `position_ids` begin anew with each document, `document_ids` number those of a row (-1: padding),
    `learned` says which tokens are to be predicted: none that begins a document, no padding, and what the task says.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray | None = None
    document_ids: np.ndarray | None = None
    learned: np.ndarray | None = None


@dataclass(frozen=True)
class _Plan:
    """Where the segments of a shard's rows lie; those of row r are `first[r]` to `first[r + 1]`."""

    seq_len: int
    first: np.ndarray
    columns: np.ndarray
    filled: np.ndarray
    single: np.ndarray  # rows that are one whole segment

    @property
    def size(self) -> int:
        return self.first.nbytes + self.columns.nbytes + self.filled.nbytes + self.single.nbytes


class TokenRows:
    """`rows` rows of `seq_len` token ids of one split. Safe from several threads."""

    def __init__(
        self, store: Store, manifest: Manifest, *, split: Split = "train", cache_bytes: int = CACHE_BYTES
    ) -> None:
        found = [_entries(manifest, split, number) for number in range(len(folders_of(manifest)))]
        entries = [entry for part, _ in found for entry in part]
        if manifest.kind != "dataset" or not entries:
            what = f"a {manifest.kind} without token shards" if split == "train" else f"without a {split} split"
            raise UsageError(f"{name_of(manifest)} is {what}", hint="make training data: llmos shard TEXT NAME")
        self._store, self._entries = store, entries
        self._lock = threading.RLock()
        self._opened: OrderedDict[int, ShardFile] = OrderedDict()
        self._plans: OrderedDict[int, _Plan | None] = OrderedDict()
        first = self._shard(0)
        if len(first.tensors["tokens"].shape) != 2:
            raise UsageError(
                f"{name_of(manifest)} holds examples of different lengths ({manifest.meta.get('task')}), not rows"
            )
        self.seq_len: int = first.tensors["tokens"].shape[1]
        self._dtype = DTYPES[first.tensors["tokens"].dtype]
        self._counts = np.array(self._count_rows(found), np.int64)
        self._ends = np.cumsum(self._counts)
        self.rows: int = int(self._ends[-1])
        self._tokens = _Blocks(self, "tokens", self._dtype, cache_bytes)
        self._loss = _Blocks(self, "loss", DTYPES["U8"], cache_bytes // 2) if "loss" in first.tensors else None

    @property
    def row_bytes(self) -> int:
        return self.seq_len * self._dtype.itemsize

    def row_batch(self, indices: np.ndarray) -> np.ndarray:
        """The rows at `indices`, as [len(indices), seq_len] of int64."""
        return self._tokens.take(*self._places(indices)).astype(np.int64)

    def batch(self, indices: np.ndarray) -> Batch:
        """The rows at `indices` with what is to be known of the documents in them."""
        shards, rows = self._places(indices)
        ids = self._tokens.take(shards, rows).astype(np.int64)
        plans = {number: self._plan(number) for number in set(shards.tolist())}
        if self._loss is None and all(
            plan is None or bool(plan.single[rows[shards == number]].all()) for number, plan in plans.items()
        ):
            return Batch(ids)
        filled = np.full(len(ids), self.seq_len)
        begins = []
        for number, plan in plans.items():
            here = np.flatnonzero(shards == number)
            begins.append(here * self.seq_len if plan is None else _begins(plan, rows, here, filled))
        ended = np.flatnonzero(filled < self.seq_len)
        begins.append(ended * self.seq_len + filled[ended])
        starts = np.sort(np.concatenate(begins))
        lengths = np.append(starts[1:], ids.size) - starts
        row = starts // self.seq_len
        numbers = np.arange(len(starts)) - np.searchsorted(starts, row * self.seq_len)
        numbers[starts - row * self.seq_len >= filled[row]] = -1
        positions = np.arange(ids.size) - np.repeat(starts, lengths)
        documents = np.repeat(numbers, lengths).reshape(ids.shape)
        learned = documents >= 0
        learned.reshape(-1)[starts] = False
        if self._loss is not None:
            learned &= self._loss.take(shards, rows) != 0
        return Batch(ids, positions.reshape(ids.shape), documents, learned)

    def in_order(self, batch_size: int) -> Iterator[Batch]:
        """Every token once: batches of rows in stored order; of an older dataset then its tail, one short row.

        A tail of a single token is left out: nothing can be predicted in it.
        """
        for start in range(0, self.rows, batch_size):
            yield self.batch(np.arange(start, min(start + batch_size, self.rows)))
        tail = self.tail()
        if tail.size > 1:
            yield Batch(tail[None, :])

    def tail(self) -> np.ndarray:
        """The tokens that an older dataset has after the last whole row, fewer than `seq_len`."""
        shard = self._shard(len(self._entries) - 1)
        tail = shard.read("tail")
        if tail is None:
            return np.empty(0, np.int64)
        if tail.ndim != 1 or len(tail) >= self.seq_len:
            raise Damaged(f"{shard.entry.path} has a malformed tail")
        return tail.astype(np.int64)

    def _places(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The shard of each row and where in it."""
        indices = np.asarray(indices, np.int64)
        if indices.size and not 0 <= indices.min() <= indices.max() < self.rows:
            raise IndexError(f"a row is outside the {self.rows} rows of this dataset")
        shards = np.searchsorted(self._ends, indices, side="right")
        return shards, indices - (self._ends - self._counts)[shards]

    def _count_rows(self, found: list[tuple[list[FileEntry], int | None]]) -> list[int]:
        """The rows of each shard: all but a dataset's last have as many as its first, so few need to be opened."""
        counts: list[int] = []
        for entries, total in found:
            if not entries:
                continue
            at = len(counts)
            if total is None:
                counts += [self._shard(at + number).tensors["tokens"].shape[0] for number in range(len(entries))]
                continue
            each = self._shard(at).tensors["tokens"].shape[0]
            last = total - each * (len(entries) - 1)
            if not 0 <= last <= each:
                raise Damaged(f"{entries[0].path} has {each} rows, which do not make up the {total} of the dataset")
            counts += [each] * (len(entries) - 1) + [last]
        for number in range(len(self._opened)):
            self._check(number, counts[number])
        return counts

    def _check(self, number: int, rows: int) -> None:
        shard = self._shard(number)
        tokens = shard.tensors["tokens"]
        if tokens.shape != (rows, self.seq_len) or DTYPES[tokens.dtype] != self._dtype:
            raise Damaged(f"{shard.entry.path} does not have the dtype and row length of the shards before it")

    def _shard(self, number: int) -> ShardFile:
        with self._lock:
            shard = self._opened.get(number)
            if shard is None:
                self._opened[number] = shard = open_shard(self._store, self._entries[number])
                if hasattr(self, "_ends"):
                    self._check(number, int(self._counts[number]))
                    while len(self._opened) > _OPEN_SHARDS:
                        self._opened.popitem(last=False)
            return shard

    def _plan(self, number: int) -> _Plan | None:
        """The plan of a shard; None where rows are one segment each."""
        with self._lock:
            if number in self._plans:
                self._plans.move_to_end(number)
                return self._plans[number]
            shard = self._shard(number)
            rows = int(self._counts[number])
            plan = None
            if "segments" in shard.tensors:
                plan = _read_plan(shard, rows, self.seq_len)
                if plan.single.all():
                    plan = None
            self._plans[number] = plan
            while len(self._plans) > 1 and sum(held.size for held in self._plans.values() if held) > _PLAN_BYTES:
                self._plans.popitem(last=False)
            return plan


class _Blocks:
    """One tensor of whole rows, `[rows, seq_len]` a shard, held in blocks of rows: the newest that were asked for."""

    def __init__(self, rows: TokenRows, tensor: str, dtype: np.dtype, cache_bytes: int) -> None:
        self._rows, self._tensor = rows, tensor
        row_bytes = rows.seq_len * dtype.itemsize
        self._height = max(1, CHUNK_BYTES // row_bytes)
        numbers = -(-rows._counts // self._height)
        self._first = np.cumsum(numbers) - numbers  # the first block of each shard
        total = int(numbers.sum())
        self._room = max(1, min(total, cache_bytes // (self._height * row_bytes)))
        self._held = np.empty((self._room * self._height, rows.seq_len), dtype)  # memory comes as it is written to
        self._place = np.full(total, -1)  # of each block among those held
        self._block = np.full(self._room, -1)  # and the other way round
        self._used = np.zeros(self._room, np.int64)
        self._clock = 0

    def take(self, shards: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Rows by shard and number in it, as stored."""
        number, within = np.divmod(rows, self._height)
        blocks = self._first[shards] + number
        with self._rows._lock:
            places = self._place[blocks]
            if places.size and places.min() < 0:
                if len(np.unique(blocks)) > self._room:
                    half = len(rows) // 2
                    parts = [self.take(shards[part], rows[part]) for part in (slice(half), slice(half, None))]
                    return np.concatenate(parts)
                self._fetch(shards, blocks)
                places = self._place[blocks]
            self._clock += 1
            self._used[places] = self._clock
            taken: np.ndarray = self._held.take(places * self._height + within, axis=0)
            return taken

    def _fetch(self, shards: np.ndarray, blocks: np.ndarray) -> None:
        """Read those that are not held; what the same batch needs stays."""
        self._clock += 1
        self._used[self._place[blocks[self._place[blocks] >= 0]]] = self._clock
        missing, at = np.unique(blocks, return_index=True)
        for block, shard in zip(missing.tolist(), shards[at].tolist(), strict=True):
            if self._place[block] >= 0:
                continue
            place = int(self._used.argmin())
            if self._block[place] >= 0:
                self._place[self._block[place]] = self._block[place] = -1
            self._read(shard, block - int(self._first[shard]), place * self._height)
            self._place[block], self._block[place], self._used[place] = place, block, self._clock

    def _read(self, number: int, block: int, at: int) -> None:
        shard = self._rows._shard(number)
        info = shard.tensors.get(self._tensor)
        count = min(self._height, int(self._rows._counts[number]) - block * self._height)
        held = self._held[at : at + count]
        if info is None or DTYPES[info.dtype] != held.dtype or info.shape[1:] != held.shape[1:]:
            raise Damaged(f"{shard.entry.path} has no {self._tensor!r} that fits its rows")
        shard.reader.readinto(info.start + block * self._height * held[0].nbytes, held.reshape(-1).data.cast("B"))


def _entries(manifest: Manifest, split: Split, number: int) -> tuple[list[FileEntry], int | None]:
    """The shards of one dataset of a mix (or of a dataset alone), and how many rows they have if that is known."""
    entries = shard_entries(manifest, split, folders_of(manifest)[number])
    mix = manifest.meta.get(MIX)
    part = mix[number] if isinstance(mix, list) else None
    facts = part if isinstance(part, dict) else manifest.meta
    splits = facts.get("splits")
    told = splits.get(split) if isinstance(splits, dict) else None
    rows = told.get("rows") if isinstance(told, dict) else None
    return entries, rows if isinstance(rows, int) else None


def _read_plan(shard: ShardFile, rows: int, seq_len: int) -> _Plan:
    segments = shard.table("segments", TABLE_COLUMNS)
    row, length = segments[:, 0], segments[:, 3]
    first = np.searchsorted(row, np.arange(rows + 1))
    before = np.concatenate([[0], np.cumsum(length)])
    filled = before[first[1:]] - before[first[:-1]]
    in_order = bool((np.diff(row) >= 0).all()) and (not row.size or 0 <= row[0] <= row[-1] < rows)
    if not in_order or (length < 1).any() or (filled > seq_len).any():
        raise Damaged(f"{shard.entry.path} has segments that do not fit its rows")
    columns = before[:-1] - before[first[:-1]][row]
    single = (np.diff(first) == 1) & (filled == seq_len)
    return _Plan(seq_len, first, columns.astype(np.int32), filled.astype(np.int32), single)


def _begins(plan: _Plan, rows: np.ndarray, here: np.ndarray, filled: np.ndarray) -> np.ndarray:
    """Where segments begin, counted through a batch, in its rows `here`; says in `filled` how far each is filled."""
    first = plan.first[rows[here]]
    numbers = plan.first[rows[here] + 1] - first
    each = np.arange(numbers.sum()) + np.repeat(first - (np.cumsum(numbers) - numbers), numbers)
    filled[here] = plan.filled[rows[here]]
    begins: np.ndarray = np.repeat(here, numbers) * plan.seq_len + plan.columns[each]
    return begins
