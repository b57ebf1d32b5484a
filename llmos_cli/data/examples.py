"""The examples of a ragged dataset (classify, pair, seq2seq) as padded numpy batches. No torch.

Whole shards are held as stored, least recently used out first, and read ahead by threads where a caller says what comes
next. Every read is verified by the store.
"""

from collections import OrderedDict
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Final

import numpy as np

from llmos_cli.data.batches import CACHE_BYTES
from llmos_cli.data.blocks import Readers
from llmos_cli.data.layout import ShardFile, Split, name_of, open_shard, shard_entries
from llmos_cli.data.mixing import folders_of
from llmos_cli.errors import Damaged, UsageError
from llmos_cli.formats.manifest import Manifest
from llmos_cli.store.disk.forks import ForkLock
from llmos_cli.store.local import Store

_AHEAD: Final = 2  # shards that are read before they are needed


@dataclass(frozen=True)
class ExampleBatch:
    """Examples padded to the longest of them: ids and mask [n, longest]; `parts` says where second texts begin,
    `learned` which tokens are targets, where the task tells."""

    input_ids: np.ndarray
    attention_mask: np.ndarray
    labels: np.ndarray | None
    parts: np.ndarray | None
    learned: np.ndarray | None


@dataclass(frozen=True)
class _Held:
    offsets: np.ndarray
    tokens: np.ndarray
    labels: np.ndarray | None
    parts: np.ndarray | None
    loss: np.ndarray | None

    @property
    def size(self) -> int:
        arrays = (self.offsets, self.tokens, self.labels, self.parts, self.loss)
        return sum(array.nbytes for array in arrays if array is not None)


class Examples:
    """`count` examples of one split, by number. Safe from several threads."""

    def __init__(
        self, store: Store, manifest: Manifest, *, pad_id: int, split: Split = "train", cache_bytes: int = CACHE_BYTES
    ) -> None:
        entries = [entry for folder in folders_of(manifest) for entry in shard_entries(manifest, split, folder)]
        self._shards: list[ShardFile] = [open_shard(store, entry) for entry in entries]
        if not self._shards or any("offsets" not in shard.tensors for shard in self._shards):
            raise UsageError(
                f"{name_of(manifest)} has no {split} examples", hint="make some: llmos shard FILE NAME --task classify"
            )
        self._pad_id, self._cache_bytes = pad_id, cache_bytes
        self._ends = np.cumsum([shard.tensors["offsets"].shape[0] - 1 for shard in self._shards])
        self.count = int(self._ends[-1])
        self._held: OrderedDict[int, _Held] = OrderedDict()
        self._loading: dict[int, Future[None]] = {}
        self._readers = Readers()
        self._lock = ForkLock()

    def batch(self, indices: np.ndarray, *, longest: int | None = None) -> ExampleBatch:
        """The examples at `indices`. Of one of more than `longest` tokens the first and the very last are kept, since
        the last may mark the end."""
        indices = np.asarray(indices, np.int64)
        if indices.size and not 0 <= indices.min() <= indices.max() < self.count:
            raise IndexError(f"an example is outside the {self.count} of this dataset")
        shards = np.searchsorted(self._ends, indices, side="right").tolist()
        found: list[tuple[_Held, int, np.ndarray]] = []
        for shard, index in zip(shards, indices.tolist(), strict=True):
            held = self._shard(shard)
            at = index - (int(self._ends[shard - 1]) if shard else 0)
            start, end = held.offsets[at : at + 2].tolist()
            where = np.arange(start, end)
            if longest is not None and len(where) > longest:
                where = np.append(where[: longest - 1], end - 1)
            found.append((held, at, where))
        shape = len(found), max((len(where) for _, _, where in found), default=0)
        ids, mask = np.full(shape, self._pad_id, np.int64), np.zeros(shape, np.int64)
        learned = np.zeros(shape, bool) if found and found[0][0].loss is not None else None
        for row, (held, _, where) in enumerate(found):
            ids[row, : len(where)] = held.tokens[where]
            mask[row, : len(where)] = 1
            if learned is not None and held.loss is not None:
                learned[row, : len(where)] = held.loss[where]
        labels = [int(held.labels[at]) for held, at, _ in found if held.labels is not None]
        parts = [int(held.parts[at]) for held, at, _ in found if held.parts is not None]
        return ExampleBatch(
            ids,
            mask,
            np.array(labels, np.int64) if labels else None,
            np.array(parts, np.int64) if parts else None,
            learned,
        )

    def expect(self, indices: np.ndarray) -> None:
        """Begin to read the first shards that these examples need and that are not held."""
        with self._lock:
            if not self._readers.are_ours:
                self._loading.clear()
            for number in dict.fromkeys(np.searchsorted(self._ends, indices, side="right").tolist()):
                if len(self._loading) == _AHEAD:
                    break
                if number not in self._held and number not in self._loading:
                    self._loading[number] = self._readers.submit(self._load, number)

    def close(self) -> None:
        """Stop reading ahead, before the store is closed."""
        self._readers.close()

    def _shard(self, number: int) -> _Held:
        with self._lock:
            coming = self._loading.get(number) if self._readers.are_ours else None
        if coming is not None:
            wait([coming])  # if it failed, this one will say why
        with self._lock:
            held = self._held.get(number)
            if held is None:
                held = self._keep(number, _read(self._shards[number]))
            self._held.move_to_end(number)
            return held

    def _load(self, number: int) -> None:
        try:
            held = _read(self._shards[number])
            with self._lock:
                self._keep(number, held)
        finally:
            with self._lock:
                self._loading.pop(number, None)

    def _keep(self, number: int, held: _Held) -> _Held:
        self._held[number] = held
        while len(self._held) > 1 and sum(one.size for one in self._held.values()) > self._cache_bytes:
            self._held.popitem(last=False)
        return held


def _read(shard: ShardFile) -> _Held:
    offsets, tokens = shard.table("offsets", 1), shard.read("tokens")
    if tokens is None or offsets[0] != 0 or offsets[-1] != tokens.size or (np.diff(offsets) < 0).any():
        raise Damaged(f"{shard.entry.path} has offsets that do not fit its tokens")
    return _Held(offsets, tokens, shard.read("labels"), shard.read("parts"), shard.read("loss"))
