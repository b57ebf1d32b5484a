"""How a dataset lies on disk: safetensors files `tokens-I-of-N.safetensors`, those of the training split at the top,
those of the others below `valid/` and `test/`. A number in a table is int64 unless said otherwise.

Packed (tasks lm, mlm, chat): rows of equal length, ready to be sliced.
  tokens     [rows, seq_len]  u16 or u32; what no segment covers, at a row's end, is padding
  segments   [n, 4]           the pack plan, row by row from the left: row, document, where in the document, length.
                              Documents are numbered through the split. A model sees one segment at a time.
  loss       [rows, seq_len]  u8, if the task has it: 1 where a token is to be learned

Ragged (tasks classify, pair, seq2seq): one document an example, of any length.
  tokens     [n]              u16 or u32, one document after the other
  offsets    [k + 1]          where each document begins, and the end of the last
  loss       [n]              u8, if the task has it
  parts      [k]              if documents have a second text: where it begins, counted from the document's start

Both, for each of the k documents that *end* in this shard, in order (a long one may have begun in an earlier shard):
  documents  [k, 4]           file (a number in the recipe's sources), byte offset, record number, tokens
  digests    [k]              u64: eight bytes of the id of the document's tokens, part and label
  labels     [k]              if the task has them

A shard of tokens takes at most the shard size asked for, so N = ceil(D / S). Older datasets have `document_offsets` in
place of `segments`, and a `tail` of tokens after the last whole row; such rows are read as one segment each.
"""

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from llmos_cli.errors import Damaged, NotFound, UsageError
from llmos_cli.formats.ids import object_id
from llmos_cli.formats.manifest import FileEntry, Manifest, encode_manifest
from llmos_cli.formats.safetensors import TensorInfo, read_table
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import FileReader, open_file

Split = Literal["train", "valid", "test"]
SPLITS: Final[tuple[Split, ...]] = ("train", "valid", "test")
RAGGED_TASKS: Final = ("classify", "pair", "seq2seq")
LAYOUT: Final = 2  # of what is written; told in recipes, so that older work is not taken for it
SHARD_PREFIX: Final = "tokens-"
TABLE_COLUMNS: Final = 4
DTYPES: Final[dict[str, np.dtype]] = {
    "U8": np.dtype("u1"),
    "U16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
}
_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class ShardFile:
    """An open shard: its tensors by name."""

    entry: FileEntry
    reader: FileReader
    tensors: dict[str, TensorInfo]

    def read(self, name: str) -> np.ndarray | None:
        """A whole tensor; None if the shard does not have it."""
        info = self.tensors.get(name)
        if info is None:
            return None
        array = np.empty(info.shape, DTYPES[info.dtype])
        if array.size:
            self.reader.readinto(info.start, array.reshape(-1).data.cast("B"))
        return array

    def table(self, name: str, columns: int) -> np.ndarray:
        """An int64 table that must be there (one column: a list)."""
        array = self.read(name)
        shape = (-1,) if columns == 1 else (-1, columns)
        if array is None or array.dtype != DTYPES["I64"] or array.ndim != len(shape) or array.shape[1:] != shape[1:]:
            raise Damaged(f"{self.entry.path} has no table {name!r} of {columns} columns")
        return array


def dtype_name(dtype: np.dtype) -> str:
    """The name that safetensors has for a dtype."""
    return _NAMES[dtype]


def token_dtype(vocab_size: int) -> np.dtype:
    """Two bytes a token while every id fits, else four."""
    return DTYPES["U16"] if vocab_size <= 1 << 16 else DTYPES["U32"]


def split_folder(split: Split) -> str:
    return "" if split == "train" else f"{split}/"


def splits_of(manifest: Manifest) -> tuple[Split, ...]:
    """The splits that a dataset has."""
    return tuple(split for split in SPLITS if shard_entries(manifest, split))


def shard_entries(manifest: Manifest, split: Split = "train", below: str = "") -> list[FileEntry]:
    """The shards of a split in order; `below` is the folder that a mix keeps a dataset in."""
    prefix = below + split_folder(split) + SHARD_PREFIX
    return [entry for entry in manifest.files if entry.path.startswith(prefix)]


def check_split(manifest: Manifest, text: str) -> Split:
    """Read the name of a split that a dataset has; raises UsageError or NotFound."""
    for split in SPLITS:
        if split == text:
            found = splits_of(manifest)
            if manifest.kind == "dataset" and split not in found and not manifest.meta.get("mix"):
                known = ", ".join(found) or "none"
                raise NotFound(
                    f"{name_of(manifest)} has no {split} split (it has: {known})",
                    hint="llmos shard ... --split valid=0.01 sets documents aside",
                )
            return split
    raise UsageError(f"{text!r} is no split", hint=f"the splits are {', '.join(SPLITS)}")


def name_of(manifest: Manifest) -> str:
    return f"@{object_id(encode_manifest(manifest)).short}"


def open_shard(store: Store, entry: FileEntry) -> ShardFile:
    """Read a shard's header; raises Damaged unless it has tokens."""
    reader = open_file(store, entry)
    tensors = {info.name: info for info in read_table(reader.read, reader.size, entry.path)}
    tokens = tensors.get("tokens")
    if tokens is None or tokens.dtype not in ("U16", "U32") or len(tokens.shape) not in (1, 2) or 0 in tokens.shape[1:]:
        raise Damaged(f"{entry.path} has no rows of tokens")
    return ShardFile(entry, reader, tensors)
