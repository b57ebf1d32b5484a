"""Documents to token ids, on every core, in order and in bounded memory. Knows nothing of rows, shards or the store."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np

from llmos_cli.data.corpus import Piece
from llmos_cli.data.tokenizer import Encoding
from llmos_cli.formats.limits import MiB

UNKNOWN: Final = -1  # in an origin: not told
_BATCH_CHARS: Final = 1 * MiB


@dataclass(frozen=True)
class Encoded:
    """A run of one split's token stream: documents one after the other; the last may go on in the next run."""

    ids: np.ndarray  # [n] token ids, two or four bytes each
    ends: np.ndarray  # [k] int64: positions in ids just after the end of each document that ends here
    text_bytes: int
    origins: np.ndarray  # [k, 3] int64: file in the recipe's sources, byte offset in it (decompressed), record from 1
    loss: np.ndarray | None = None  # [n] uint8: 1 where the loss counts (chat, seq2seq); None: everywhere
    parts: np.ndarray | None = None  # [k] int64: where the second text begins within the document (pair, seq2seq)
    labels: np.ndarray | None = None  # [k] int64 (classify, pair)
    split: str = "train"


def encode_pieces(pieces: Iterable[Piece], encoding: Encoding, dtype: np.dtype) -> Iterator[Encoded]:
    """The token stream of `pieces`, an end-of-text id after each document.

    The library spreads a batch over all cores; meanwhile this thread turns the batch before into numbers.
    """

    def encode(batch: list[Piece]) -> list[list[int]]:
        texts = [piece.text for piece in batch]
        return [item.ids for item in encoding.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    with ThreadPoolExecutor(1, "tokenize") as pool:
        before = None
        for batch in _batches(pieces):
            running = pool.submit(encode, batch), batch
            if before is not None:
                yield _join(before[0].result(), before[1], encoding.eos_id, dtype)
            before = running
        if before is not None:
            yield _join(before[0].result(), before[1], encoding.eos_id, dtype)


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text) + 64  # many tiny documents are not free either
        if size >= _BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _join(ids: list[list[int]], batch: list[Piece], eos_id: int, dtype: np.dtype) -> Encoded:
    stream: list[int] = []
    ends = []
    for part, piece in zip(ids, batch, strict=True):
        stream += part
        if piece.last:
            stream.append(eos_id)
            ends.append(len(stream))
    text_bytes = sum(len(piece.text.encode("utf-8")) for piece in batch)
    origins = np.full((len(ends), 3), UNKNOWN, np.int64)
    return Encoded(np.array(stream, dtype), np.array(ends, np.int64), text_bytes, origins)
