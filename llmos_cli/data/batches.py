"""The rows of a token dataset as numpy batches, read straight out of the store. No torch.

Rows are fetched in any order. They are held as stored (two or four bytes a token) in blocks (blocks.py), so memory is
bounded whatever the dataset's size, and what fits is decoded once. Every read is verified by the store. Nothing but the
shards that are read is opened. Which rows a step sees is `order.py`'s affair.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from llmos_cli.data.blocks import Blocks, Readers
from llmos_cli.data.layout import (
    DTYPES,
    ShardFile,
    Split,
    name_of,
    open_shard,
    shard_entries,
)
from llmos_cli.data.mixing import MIX, folders_of
from llmos_cli.data.segments import Plan, Segments, read_plan
from llmos_cli.errors import Damaged, UsageError
from llmos_cli.formats.limits import CHUNK_BYTES, MiB
from llmos_cli.formats.manifest import FileEntry, Manifest
from llmos_cli.store.disk.forks import ForkLock
from llmos_cli.store.local import Store

CACHE_BYTES: Final = 512 * MiB
_AHEAD_BYTES: Final = 8 * CHUNK_BYTES
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
        self._lock = ForkLock()
        self._opened: OrderedDict[int, ShardFile] = OrderedDict()
        first = self._shard(0)
        if len(first.tensors["tokens"].shape) != 2:
            raise UsageError(
                f"{name_of(manifest)} holds examples of different lengths ({manifest.meta.get('task')}), not rows"
            )
        self.seq_len: int = first.tensors["tokens"].shape[1]
        self._dtype = DTYPES[first.tensors["tokens"].dtype]
        self._counts = np.array(self._count_rows(found), np.int64)
        self.rows: int = int(self._counts.sum())
        self._segments = Segments(self._counts, self.seq_len, self._plan)
        self._readers = Readers()
        self._tokens = self._blocks("tokens", self._dtype, cache_bytes)
        self._loss = self._blocks("loss", DTYPES["U8"], cache_bytes // 2) if "loss" in first.tensors else None

    @property
    def row_bytes(self) -> int:
        return self.seq_len * self._dtype.itemsize

    def row_batch(self, indices: np.ndarray) -> np.ndarray:
        """The rows at `indices`, as [len(indices), seq_len] of int64."""
        return self._ids(np.asarray(indices, np.int64))

    def batch(self, indices: np.ndarray) -> Batch:
        """The rows at `indices` with what is to be known of the documents in them."""
        rows = np.asarray(indices, np.int64)
        ids = self._ids(rows)
        found = self._segments.of(rows, apart=self._loss is not None)
        if found is None:
            return Batch(ids)
        learned = found.learned
        if self._loss is not None:
            learned &= self._loss.take(rows) != 0
        return Batch(ids, found.position_ids, found.document_ids, learned)

    def expect(self, indices: np.ndarray) -> None:
        """Begin to read these rows, which come next; what has been asked for since the last call stays held."""
        rows = np.asarray(indices, np.int64)
        self._tokens.expect(rows)
        if self._loss is not None:
            self._loss.expect(rows)

    def close(self) -> None:
        """Stop reading ahead, before the store is closed."""
        self._readers.close()

    def in_order(self, batch_size: int) -> Iterator[Batch]:
        """Every token once: batches of rows in stored order; of an older dataset then its tail, one short row.

        A tail of a single token is left out: nothing can be predicted in it.
        """
        step = max(1, _AHEAD_BYTES // self.row_bytes)
        told = 0
        for start in range(0, self.rows, batch_size):
            while told < min(start + batch_size + step, self.rows):
                self.expect(np.arange(told, min(told + step, self.rows)))
                told += step
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

    def _ids(self, rows: np.ndarray) -> np.ndarray:
        try:
            return self._tokens.take(rows).astype(np.int64)
        except IndexError as exc:
            raise IndexError(f"a row is outside the {self.rows} rows of this dataset") from exc

    def _blocks(self, tensor: str, dtype: np.dtype, cache_bytes: int) -> Blocks:
        def read(number: int, row: int, out: np.ndarray) -> None:
            shard = self._shard(number)
            info = shard.tensors.get(tensor)
            if info is None or DTYPES[info.dtype] != out.dtype or info.shape[1:] != out.shape[1:]:
                raise Damaged(f"{shard.entry.path} has no {tensor!r} that fits its rows")
            shard.reader.readinto(info.start + row * out[0].nbytes, out.reshape(-1).data.cast("B"))

        return Blocks(self._counts, (self.seq_len, dtype), CHUNK_BYTES, cache_bytes, read, self._readers)

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
                if hasattr(self, "_counts"):
                    self._check(number, int(self._counts[number]))
                    while len(self._opened) > _OPEN_SHARDS:
                        self._opened.popitem(last=False)
            return shard

    def _plan(self, number: int) -> Plan:
        return read_plan(self._shard(number), int(self._counts[number]), self.seq_len)


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
