"""The documents of a dataset, one by one: where each came from, what it is, and which two datasets have in common.

A document's tokens are gathered from the rows that its pieces were packed into. What is told of documents lies in
tables of the shards, so that counting, tracing and comparing read no tokens.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Final

import numpy as np

from llmos_cli.data.layout import (
    DTYPES,
    SPLITS,
    TABLE_COLUMNS,
    ShardFile,
    Split,
    check_split,
    name_of,
    open_shard,
    shard_entries,
)
from llmos_cli.data.mixing import MIX, folders_of
from llmos_cli.data.tokenizer import FILES, TOKENIZER_FILE, make_encoding
from llmos_cli.errors import Damaged, LlmosError, NotFound, UsageError
from llmos_cli.formats.ids import parse_id
from llmos_cli.formats.manifest import FileEntry, Manifest, Source
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import read_file, read_manifest

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_FOLDER: Final = "tokenizer/"
_EXCERPT_TOKENS: Final = 64


@dataclass(frozen=True)
class Document:
    """One document: number `number` of its split, from 0. It began at byte `offset` of `source`, after decompression,
    and was its record `record`, from 1; None where that was not told.

    `text` is decoded from its tokens; `second` is the text that it is paired with, if the task has pairs.
    """

    number: int
    split: Split
    source: Source | None
    offset: int | None
    record: int | None
    tokens: int
    digest: str
    label: int | None
    text: str
    second: str | None = None
    cut: bool = False


@dataclass(frozen=True)
class SplitDiff:
    """Documents of a split that both datasets have, and of one alone; of those the first few."""

    split: Split
    equal: int
    added: int
    removed: int
    examples_added: tuple[Document, ...]
    examples_removed: tuple[Document, ...]


@dataclass(frozen=True)
class DocumentsDiff:
    """`problem` says why documents could not be compared."""

    splits: tuple[SplitDiff, ...] = ()
    problem: str | None = None


def sample_documents(store: Store, manifest: Manifest, number: int, *, split: str = "train") -> list[Document]:
    """Up to `number` documents at even distances; the same ones each time. Raises UsageError or NotFound."""
    table = _Documents(store, manifest, check_split(manifest, split))
    number = min(number, table.count)
    return [table.read((2 * at + 1) * table.count // (2 * number)) for at in range(number)]


def find_document(store: Store, manifest: Manifest, number: int, *, split: str = "train") -> Document:
    """Document `number` of a split, from 0. Raises UsageError or NotFound."""
    return _Documents(store, manifest, check_split(manifest, split)).read(number)


def compare_documents(store: Store, old: Manifest, new: Manifest, *, shown: int) -> DocumentsDiff:
    """Which documents were added and removed, split by split, told by what they hold and as often as they occur.

    Order, packing and shard sizes make no difference. With another tokenizer every document is another one.
    """
    if _tokenizer_entries(old) != _tokenizer_entries(new):
        return DocumentsDiff(problem="the datasets have different tokenizers, so documents are not compared")
    found = []
    for split in sorted({*_splits(old), *_splits(new)}, key=SPLITS.index):
        try:
            sides = [_Documents(store, side, split) if split in _splits(side) else None for side in (old, new)]
        except LlmosError as exc:
            return DocumentsDiff(problem=exc.message)
        left, right = (side.digests() if side else np.empty(0, DTYPES["U64"]) for side in sides)
        removed, added = _only(left, right), _only(right, left)
        examples = [
            tuple(side.read(int(at), excerpt=True) for at in where[:shown]) if side else ()
            for side, where in zip(sides, (removed, added), strict=True)
        ]
        found.append(SplitDiff(split, len(left) - len(removed), len(added), len(removed), examples[1], examples[0]))
    return DocumentsDiff(tuple(found))


@dataclass(frozen=True)
class _Part:
    """The shards of one dataset: of a mix there are several."""

    entries: Sequence[FileEntry]
    sources: Sequence[Source]


class _Documents:
    """The documents of one split, of a mix those of all its datasets one after the other."""

    def __init__(self, store: Store, manifest: Manifest, split: Split) -> None:
        if manifest.kind != "dataset":
            raise UsageError(f"{name_of(manifest)} is a {manifest.kind}, not a dataset")
        self._store, self._manifest, self._split = store, manifest, split
        self._parts = _parts(store, manifest, split)
        self._shards = [(part, open_shard(store, entry)) for part in self._parts for entry in part.entries]
        for _, shard in self._shards:
            if "documents" not in shard.tensors:
                raise UsageError(
                    f"{name_of(manifest)} was made by an earlier version, which kept no table of documents",
                    hint="llmos shard makes it anew",
                )
        self._ends = list(accumulate(shard.tensors["documents"].shape[0] for _, shard in self._shards))
        self._tables: dict[int, np.ndarray] = {}

    @property
    def count(self) -> int:
        return self._ends[-1] if self._ends else 0

    def digests(self) -> np.ndarray:
        """Of every document, in order."""
        found = []
        for _, shard in self._shards:
            digests = shard.read("digests")
            if digests is None or digests.shape != shard.tensors["documents"].shape[:1]:
                raise Damaged(f"{shard.entry.path} does not have a digest for every document")
            found.append(digests)
        return np.concatenate(found) if found else np.empty(0, DTYPES["U64"])

    def read(self, number: int, *, excerpt: bool = False) -> Document:
        """Document `number`; with `excerpt` the first words of it."""
        if not 0 <= number < self.count:
            raise NotFound(
                f"there is no document {number:,} in the {self._split} split: it has {self.count:,}, numbered from 0"
            )
        at = bisect_right(self._ends, number)
        part, shard = self._shards[at]
        within = number - (self._ends[at] - shard.tensors["documents"].shape[0])
        source, offset, record, size = self._table(at)[within].tolist()
        wanted = min(size, _EXCERPT_TOKENS) if excerpt else size
        first = self._first_shard(part)
        if "offsets" in shard.tensors:
            ids = _ragged(shard, within, size)[:wanted]
        else:
            ids = self._packed(part, at, number - self._documents_before(first), size)[:wanted]
        second = _value(shard, "parts", within)
        label = _value(shard, "labels", within)
        digests = shard.read("digests")
        text, pair = self._texts(ids, second if second is None or second < len(ids) else None)
        return Document(
            number,
            self._split,
            part.sources[source] if 0 <= source < len(part.sources) else None,
            offset if offset >= 0 else None,
            record if record >= 0 else None,
            size,
            "" if digests is None else digests[within].tobytes().hex(),
            label,
            text,
            pair,
            wanted < size,
        )

    def _table(self, at: int) -> np.ndarray:
        if at not in self._tables:
            self._tables = {at: self._shards[at][1].table("documents", TABLE_COLUMNS)}
        return self._tables[at]

    def _first_shard(self, part: _Part) -> int:
        return next(at for at, (owner, _) in enumerate(self._shards) if owner is part)

    def _documents_before(self, at: int) -> int:
        return self._ends[at - 1] if at else 0

    def _packed(self, part: _Part, at: int, document: int, size: int) -> np.ndarray:
        """The pieces of a document: in the shard that tells of it, those before it and those after."""
        ids = np.zeros(size, np.int64)
        missing = size
        for near in self._nearest_first(part, at):
            shard = self._shards[near][1]
            for row, column, offset, length in _pieces(shard, document):
                if offset + length > size:
                    raise Damaged(f"{shard.entry.path} has more of document {document:,} than it is said to hold")
                ids[offset : offset + length] = _row(shard, row)[column : column + length]
                missing -= length
            if missing <= 0:
                return ids
        raise Damaged(f"document {document:,} of {name_of(self._manifest)} is not all there")

    def _nearest_first(self, part: _Part, at: int) -> Iterator[int]:
        ours = [number for number, (owner, _) in enumerate(self._shards) if owner is part]
        return iter(sorted(ours, key=lambda number: (abs(number - at), number)))

    def _texts(self, ids: np.ndarray, second: int | None) -> tuple[str, str | None]:
        parts = [ids] if second is None else [ids[:second], ids[second:]]
        texts = [self._tokenizer.decode(part.tolist(), skip_special_tokens=True) for part in parts]
        return texts[0], texts[1] if second is not None else None

    @cached_property
    def _tokenizer(self) -> "Tokenizer":
        files = {
            name: read_file(self._store, entry)
            for name in FILES
            if (entry := self._manifest.file(TOKENIZER_FOLDER + name)) is not None
        }
        if TOKENIZER_FILE not in files:
            raise Damaged(f"{name_of(self._manifest)} has no tokenizer to read its documents with")
        return make_encoding(files, name_of(self._manifest)).tokenizer


def _parts(store: Store, manifest: Manifest, split: Split) -> list[_Part]:
    mix = manifest.meta.get(MIX)
    parts = []
    for number, folder in enumerate(folders_of(manifest)):
        recipe = manifest.recipe
        if isinstance(mix, list):
            facts = mix[number]
            recipe = None
            if isinstance(facts, Mapping):
                try:
                    recipe = read_manifest(store, parse_id(str(facts.get("id")))).recipe
                except NotFound:
                    recipe = None  # then only the file's number is lost
        parts.append(_Part(shard_entries(manifest, split, folder), recipe.sources if recipe else ()))
    return [part for part in parts if part.entries]


def _splits(manifest: Manifest) -> tuple[Split, ...]:
    """The splits that a dataset has, or any dataset of a mix."""
    folders = folders_of(manifest)
    return tuple(split for split in SPLITS if any(shard_entries(manifest, split, folder) for folder in folders))


def _pieces(shard: ShardFile, document: int) -> Iterator[tuple[int, int, int, int]]:
    """Row, column, where in the document, and length of each of its pieces in a shard."""
    segments = shard.table("segments", TABLE_COLUMNS)
    for at in np.flatnonzero(segments[:, 1] == document).tolist():
        row, _, offset, length = segments[at].tolist()
        first = int(np.searchsorted(segments[:, 0], row))
        yield row, int(segments[first:at, 3].sum()), offset, length


def _row(shard: ShardFile, row: int) -> np.ndarray:
    info = shard.tensors["tokens"]
    if row >= info.shape[0]:
        raise Damaged(f"{shard.entry.path} has segments that do not fit its rows")
    return _tokens(shard, row * info.shape[1], info.shape[1])


def _ragged(shard: ShardFile, within: int, size: int) -> np.ndarray:
    offsets = shard.table("offsets", 1)
    start = int(offsets[within])
    if not 0 <= start <= start + size <= shard.tensors["tokens"].shape[0]:
        raise Damaged(f"{shard.entry.path} has offsets that do not fit its tokens")
    return _tokens(shard, start, size)


def _tokens(shard: ShardFile, start: int, number: int) -> np.ndarray:
    info = shard.tensors["tokens"]
    held = np.empty(number, DTYPES[info.dtype])
    if number:
        shard.reader.readinto(info.start + start * held.itemsize, held.data.cast("B"))
    return held.astype(np.int64)


def _value(shard: ShardFile, name: str, within: int) -> int | None:
    values = shard.read(name)
    return int(values[within]) if values is not None and within < len(values) else None


def _only(these: np.ndarray, those: np.ndarray) -> np.ndarray:
    """Where in `these` stands what `those` do not have, or have less often, in order."""
    values, inverse = np.unique(np.concatenate([these, those]), return_inverse=True)
    mine, theirs = inverse[: len(these)], inverse[len(these) :]
    held = np.bincount(theirs, minlength=len(values))
    by_value = np.argsort(mine, kind="stable")
    ordered = mine[by_value]
    occurrence = np.empty(len(mine), np.int64)
    occurrence[by_value] = np.arange(len(mine)) - np.searchsorted(ordered, ordered)
    return np.flatnonzero(occurrence >= held[mine])


def _tokenizer_entries(manifest: Manifest) -> list[tuple[str, tuple[bytes, ...]]]:
    return [
        (entry.path, tuple(chunk.id for chunk in entry.chunks))
        for entry in manifest.files
        if entry.path == TOKENIZER_FOLDER + TOKENIZER_FILE
    ]
