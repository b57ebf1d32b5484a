"""Documents to token ids, on every core, in order and in bounded memory. Knows nothing of rows, shards or the store."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np

from llmos_cli.data.corpus import Piece
from llmos_cli.data.tokenizer import Encoding
from llmos_cli.formats.limits import MiB

_BATCH_CHARS: Final = 1 * MiB


@dataclass(frozen=True)
class Tokens:
    """A run of the token stream; `ends` are the positions in it just after a document's end, `text_bytes` its text."""

    ids: np.ndarray
    ends: list[int]
    text_bytes: int


def encode_pieces(pieces: Iterable[Piece], encoding: Encoding, dtype: np.dtype) -> Iterator[Tokens]:
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


def _join(ids: list[list[int]], batch: list[Piece], eos_id: int, dtype: np.dtype) -> Tokens:
    stream: list[int] = []
    ends = []
    for part, piece in zip(ids, batch, strict=True):
        stream += part
        if piece.last:
            stream.append(eos_id)
            ends.append(len(stream))
    return Tokens(np.array(stream, dtype), ends, sum(len(piece.text.encode("utf-8")) for piece in batch))
