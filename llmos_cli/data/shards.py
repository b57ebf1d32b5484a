"""Token shards: the token stream of a corpus as rows of equal length, in safetensors files of a given size.

The stream is every document's tokens and an end-of-text id, one document after the other. A shard `tokens-I-of-N`
holds `tokens` [rows, seq_len] and `document_offsets`, the positions in the whole stream where the documents that start
in it begin; the last one also holds `tail`, what is left after the last whole row. Nothing is dropped.
Memory is bounded by one shard and one batch of text. It knows nothing of where text or tokenizers come from.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from llmos_cli.data.encode import Tokens
from llmos_cli.formats.manifest import FileEntry
from llmos_cli.progress import Task
from llmos_cli.store.transaction import Tensor

if TYPE_CHECKING:
    from llmos_cli.store.transaction import Transaction

_NAMES: Final = {2: "U16", 4: "U32"}


@dataclass(frozen=True)
class Shards:
    """What was written: the files, named, and the counts."""

    files: tuple[FileEntry, ...]
    documents: int
    tokens: int
    rows: int
    text_bytes: int


def token_dtype(vocab_size: int) -> np.dtype:
    """Two bytes a token while every id fits, else four."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def dtype_name(dtype: np.dtype) -> str:
    """The name that safetensors has for a token dtype."""
    return _NAMES[dtype.itemsize]


def write_shards(
    tx: "Transaction", stream: Iterable[Tokens], *, seq_len: int, shard_size: int, dtype: np.dtype, task: Task
) -> Shards:
    """Write the whole stream through `tx`; a shard holds as many whole rows as fit in `shard_size`, at least one."""
    shard_rows = max(1, shard_size // (seq_len * dtype.itemsize))
    packer = _Packer(tx, seq_len, shard_rows, dtype)
    text_bytes = 0
    for tokens in stream:
        packer.add(tokens)
        text_bytes += tokens.text_bytes
        task.advance(tokens.text_bytes)
    entries = packer.finish()
    files = tuple(
        replace(entry, path=f"tokens-{number:05}-of-{len(entries):05}.safetensors")
        for number, entry in enumerate(entries)
    )
    return Shards(files, packer.documents, packer.position, packer.position // seq_len, text_bytes)


class _Packer:
    """Collects tokens until a shard is full and it is certain that another whole row follows, then writes it."""

    def __init__(self, tx: "Transaction", seq_len: int, shard_rows: int, dtype: np.dtype) -> None:
        self.documents = 0
        self.position = 0
        self._tx = tx
        self._seq_len, self._shard_rows, self._dtype = seq_len, shard_rows, dtype
        self._entries: list[FileEntry] = []
        self._starts: list[np.ndarray] = [np.zeros(1, np.int64)]
        self._buffer = np.empty((shard_rows + 1) * seq_len, dtype)
        self._filled = 0

    def add(self, tokens: Tokens) -> None:
        self._starts.append(np.array(tokens.ends, np.int64) + self.position)
        self.documents += len(tokens.ends)
        self.position += tokens.ids.size
        rest = tokens.ids
        while rest.size:
            part, rest = np.split(rest, [self._buffer.size - self._filled])
            self._buffer[self._filled : self._filled + part.size] = part
            self._filled += part.size
            if self._filled == self._buffer.size:
                self._write(self._shard_rows, self.position - rest.size - self._filled)

    def finish(self) -> list[FileEntry]:
        self._write(self._filled // self._seq_len, self.position - self._filled, last=True)
        return self._entries

    def _write(self, rows: int, begin: int, *, last: bool = False) -> None:
        """Write `rows` rows, whose first token is at `begin` in the stream; what follows them starts the next shard."""
        size = rows * self._seq_len
        tokens, rest = self._buffer[:size], self._buffer[size : self._filled]
        name = _NAMES[self._dtype.itemsize]
        offsets = self._take_starts(begin + (self._filled if last else size))
        tensors = [
            Tensor("document_offsets", "I64", offsets.shape, lambda: _bytes(offsets)),
            Tensor("tokens", name, (rows, self._seq_len), lambda: _bytes(tokens)),
        ]
        if last and rest.size:
            tensors.append(Tensor("tail", name, rest.shape, lambda: _bytes(rest)))
        self._entries.append(self._tx.add_tensors(f"tokens-{len(self._entries):05}.safetensors", tensors))
        self._buffer[: rest.size] = rest.copy()
        self._filled = rest.size

    def _take_starts(self, end: int) -> np.ndarray:
        """Where the documents that begin before `end` do so; the end of the last document begins none."""
        starts = np.concatenate(self._starts)
        inside = int(np.searchsorted(starts, end))
        self._starts = [starts[inside:]]
        return starts[:inside].astype("<i8")


def _bytes(array: np.ndarray) -> memoryview:
    return array.data.cast("B") if array.size else memoryview(b"")
