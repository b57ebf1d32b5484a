"""Documents and examples to token ids, on every core, in order and in bounded memory. Knows nothing of rows, shards or
the store.

A text for a classifier, and each text of a pair or translation, gets what the tokenizer itself puts around it ([CLS],
[SEP], </s>), and an end of text where it puts none.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import numpy as np

from llmos_cli.data.corpus import Piece
from llmos_cli.data.tasks.chat import Rendered, encode_chats
from llmos_cli.data.tokenizer import Encoding
from llmos_cli.formats.limits import MiB

_BATCH_CHARS: Final = 1 * MiB
_Item = TypeVar("_Item")


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


@dataclass(frozen=True)
class Ready:
    """An example whose label is a number, whose chat is rendered, and whose split is known."""

    texts: tuple[str, ...]
    origin: tuple[int, int, int]
    split: str
    text_bytes: int
    label: int | None = None
    chat: Rendered | None = None


def encode_pieces(
    pieces: Iterable[Piece], encoding: Encoding, dtype: np.dtype, *, begin_id: int | None = None
) -> Iterator[Encoded]:
    """The token streams of `pieces`, an end-of-text id after each document, and `begin_id` before it if given."""

    def encode(batch: list[Piece]) -> list[list[int]]:
        texts = [piece.text for piece in batch]
        return [item.ids for item in encoding.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    fresh = True

    def join(ids: list[list[int]], batch: list[Piece]) -> Iterator[Encoded]:
        nonlocal fresh
        runs: dict[str, _Run] = {}
        for part, piece in zip(ids, batch, strict=True):
            run = runs.setdefault(piece.split, _Run(piece.split))
            if fresh and begin_id is not None:
                run.ids.append(begin_id)
            run.ids += part
            run.text_bytes += len(piece.text.encode("utf-8"))
            fresh = piece.last
            if piece.last:
                run.ids.append(encoding.eos_id)
                run.end(piece.origin)
        for run in runs.values():
            yield run.joined(dtype)

    return _overlapped(_batches(pieces, lambda piece: len(piece.text)), encode, join)


def encode_examples(examples: Iterable[Ready], encoding: Encoding, dtype: np.dtype, task: str) -> Iterator[Encoded]:
    """The token streams of examples of classify, pair, seq2seq or chat."""
    tokenizer = encoding.tokenizer
    framed = bool(tokenizer.num_special_tokens_to_add(is_pair=False))

    def encode(batch: list[Ready]) -> list[Any]:
        if task == "chat":
            return list(encode_chats(tokenizer, [item.chat for item in batch if item.chat]))
        if task == "pair" and framed:
            return list(tokenizer.encode_batch([item.texts for item in batch]))
        texts = [text for item in batch for text in item.texts]
        return [_ended(item.ids, encoding.eos_id) for item in tokenizer.encode_batch_fast(texts)]

    def join(found: list[Any], batch: list[Ready]) -> Iterator[Encoded]:
        runs: dict[str, _Run] = {}
        each = iter(found)
        for item in batch:
            run = runs.setdefault(item.split, _Run(item.split))
            run.text_bytes += item.text_bytes
            if item.label is not None:
                run.labels.append(item.label)
            first = next(each)
            if task == "chat":
                run.ids += first[0].tolist()
                run.loss += first[1].tolist()
            elif task == "pair" and framed:
                run.ids += _ended(first.ids, encoding.eos_id)
                run.parts.append(first.sequence_ids.index(1) if 1 in first.sequence_ids else len(first.ids))
            else:
                run.ids += first
                if len(item.texts) == 2:
                    second = next(each)
                    run.ids += second
                    run.parts.append(len(first))
                    if task == "seq2seq":
                        run.loss += [0] * len(first) + [1] * len(second)
            run.end(item.origin)
        for run in runs.values():
            yield run.joined(dtype)

    return _overlapped(_batches(examples, lambda item: item.text_bytes), encode, join)


@dataclass
class _Run:
    """A run that grows."""

    split: str
    ids: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    origins: list[tuple[int, int, int]] = field(default_factory=list)
    loss: list[int] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    text_bytes: int = 0

    def end(self, origin: tuple[int, int, int]) -> None:
        self.ends.append(len(self.ids))
        self.origins.append(origin)

    def joined(self, dtype: np.dtype) -> Encoded:
        return Encoded(
            np.array(self.ids, dtype),
            np.array(self.ends, np.int64),
            self.text_bytes,
            np.array(self.origins, np.int64).reshape(-1, 3),
            np.array(self.loss, np.uint8) if self.loss else None,
            np.array(self.parts, np.int64) if self.parts else None,
            np.array(self.labels, np.int64) if self.labels else None,
            self.split,
        )


def _ended(ids: list[int], eos_id: int) -> list[int]:
    return ids if ids and ids[-1] == eos_id else [*ids, eos_id]


def _overlapped(
    batches: Iterator[list[_Item]],
    encode: Callable[[list[_Item]], list[Any]],
    join: Callable[[list[Any], list[_Item]], Iterator[Encoded]],
) -> Iterator[Encoded]:
    """The library spreads a batch over all cores; meanwhile this thread turns the batch before into numbers."""
    with ThreadPoolExecutor(1, "tokenize") as pool:
        before = None
        for batch in batches:
            running = pool.submit(encode, batch), batch
            if before is not None:
                yield from join(before[0].result(), before[1])
            before = running
        if before is not None:
            yield from join(before[0].result(), before[1])


def _batches(items: Iterable[_Item], length: Callable[[_Item], int]) -> Iterator[list[_Item]]:
    batch: list[_Item] = []
    size = 0
    for item in items:
        batch.append(item)
        size += length(item) + 64  # many tiny documents are not free either
        if size >= _BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
