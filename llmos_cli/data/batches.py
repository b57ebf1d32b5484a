"""The rows of a token dataset as numpy batches, read straight out of the store. No torch.

Rows are fetched in any order. Tokens are held as stored (two or four bytes each) in blocks of one chunk, least
recently used out first, so memory is bounded whatever the dataset's size, and what fits is decoded once. Every read is
verified by the store. Which rows a step sees is `order.py`'s affair.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from llmos_cli.errors import Damaged, UsageError
from llmos_cli.formats.ids import object_id
from llmos_cli.formats.limits import CHUNK_BYTES, MiB
from llmos_cli.formats.manifest import FileEntry, Manifest, encode_manifest
from llmos_cli.formats.safetensors import TensorInfo, read_table
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import open_file

CACHE_BYTES: Final = 512 * MiB
SHARD_PREFIX: Final = "tokens-"
_DTYPES: Final[dict[str, np.dtype]] = {"U16": np.dtype("<u2"), "U32": np.dtype("<u4")}


@dataclass(frozen=True)
class _Shard:
    entry: FileEntry
    tokens: TensorInfo
    tail: TensorInfo | None


class TokenRows:
    """`rows` rows of `seq_len` token ids; `tail` are the tokens after the last whole row. Safe from several threads."""

    def __init__(self, store: Store, manifest: Manifest, *, cache_bytes: int = CACHE_BYTES) -> None:
        entries = [entry for entry in manifest.files if entry.path.startswith(SHARD_PREFIX)]
        if manifest.kind != "dataset" or not entries:
            name = object_id(encode_manifest(manifest)).short
            raise UsageError(
                f"@{name} is a {manifest.kind} without token shards", hint="make training data: llmos shard TEXT NAME"
            )
        self._store = store
        self._shards = [_open_shard(store, entry) for entry in entries]
        first = self._shards[0].tokens
        self.seq_len: int = first.shape[1]
        self._dtype = _DTYPES[first.dtype]
        for shard in self._shards:
            if shard.tokens.dtype != first.dtype or shard.tokens.shape[1] != self.seq_len:
                raise Damaged(f"{shard.entry.path} does not have the dtype and row length of the shards before it")
        self._ends = np.cumsum([shard.tokens.shape[0] for shard in self._shards])
        self.rows: int = int(self._ends[-1])
        self._lock = threading.Lock()
        self._blocks: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._room = max(1, cache_bytes // CHUNK_BYTES)

    def row_batch(self, indices: np.ndarray) -> np.ndarray:
        """The rows at `indices`, as [len(indices), seq_len] of int64."""
        indices = np.asarray(indices)
        if indices.size and not 0 <= indices.min() <= indices.max() < self.rows:
            raise IndexError(f"a row is outside the {self.rows} rows of this dataset")
        batch = np.empty((len(indices), self.seq_len), np.int64)
        shards = np.searchsorted(self._ends, indices, side="right")
        for at, (shard, row) in enumerate(zip(shards.tolist(), indices.tolist(), strict=True)):
            self._copy(shard, row - (int(self._ends[shard - 1]) if shard else 0), batch[at])
        return batch

    def in_order(self, batch_size: int) -> Iterator[np.ndarray]:
        """Every token once: batches of whole rows in stored order, then the tail as a batch of one short row.

        A tail of a single token is left out: nothing can be predicted in it.
        """
        for start in range(0, self.rows, batch_size):
            yield self.row_batch(np.arange(start, min(start + batch_size, self.rows)))
        tail = self.tail()
        if tail.size > 1:
            yield tail[None, :]

    def tail(self) -> np.ndarray:
        """The tokens after the last whole row, fewer than `seq_len`."""
        shard = self._shards[-1]
        if shard.tail is None:
            return np.empty(0, np.int64)
        data = open_file(self._store, shard.entry).read(shard.tail.start, shard.tail.end)
        return np.frombuffer(data, self._dtype).astype(np.int64)

    def _copy(self, shard: int, row: int, target: np.ndarray) -> None:
        """One row, which may lie across blocks."""
        per_block = CHUNK_BYTES // self._dtype.itemsize
        at, done = row * self.seq_len, 0
        while done < self.seq_len:
            number, offset = divmod(at + done, per_block)
            part = self._block(shard, number)[offset : offset + self.seq_len - done]
            target[done : done + part.size] = part
            done += part.size

    def _block(self, shard: int, number: int) -> np.ndarray:
        key = shard, number
        with self._lock:
            block = self._blocks.get(key)
            if block is not None:
                self._blocks.move_to_end(key)
                return block
        info = self._shards[shard].tokens
        start = info.start + number * CHUNK_BYTES
        block = np.empty((min(start + CHUNK_BYTES, info.end) - start) // self._dtype.itemsize, self._dtype)
        open_file(self._store, self._shards[shard].entry).readinto(start, block.data.cast("B"))
        with self._lock:
            self._blocks[key] = block
            while len(self._blocks) > self._room:
                self._blocks.popitem(last=False)
        return block


def _open_shard(store: Store, entry: FileEntry) -> _Shard:
    path, reader = entry.path, open_file(store, entry)
    tensors = {info.name: info for info in read_table(reader.read, reader.size, path)}
    tokens, tail = tensors.get("tokens"), tensors.get("tail")
    if tokens is None or tokens.dtype not in _DTYPES or len(tokens.shape) != 2 or not tokens.shape[1]:
        raise Damaged(f"{path} has no rows of tokens")
    if tail is not None and (tail.dtype != tokens.dtype or len(tail.shape) != 1 or tail.shape[0] >= tokens.shape[1]):
        raise Damaged(f"{path} has a malformed tail")
    return _Shard(entry, tokens, tail)
