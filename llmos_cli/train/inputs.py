"""Do a dataset and a model fit together? Answered from their small files, without torch or transformers."""

from collections.abc import Mapping
from typing import Final

from llmos_cli.data.layout import RAGGED_TASKS
from llmos_cli.data.tasks.fields import LABELLED, TASKS
from llmos_cli.errors import Damaged, UsageError
from llmos_cli.formats import canonical
from llmos_cli.formats.canonical import Json
from llmos_cli.formats.manifest import FileEntry, Manifest
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import read_file
from llmos_cli.train.config import check_trainable

_LENGTH_KEYS: Final = ("max_position_embeddings", "n_positions", "seq_length")


def model_config(store: Store, manifest: Manifest, what: str) -> dict[str, Json]:
    """A model's config.json, parsed without transformers."""
    entry = manifest.file("config.json")
    if entry is None:
        raise UsageError(f"{what} has no config.json", hint="add a Hugging Face model folder with: llmos add DIR NAME")
    table = canonical.loads(read_file(store, entry), f"config.json of {what}")
    if not isinstance(table, dict):
        raise Damaged(f"config.json of {what} is not a table")
    return table


def check_dataset(data: Manifest, label: str) -> None:
    """Raise UsageError unless `data` is a dataset with at least one row to predict in."""
    if data.kind != "dataset":
        raise UsageError(f"{label} is a {data.kind}, not a dataset", hint="make one with: llmos shard TEXT... NAME")
    task = data.meta.get("task")
    if task not in TASKS:
        raise UsageError(f"{label} is for the task {task!r}, which is not trained", hint="see: llmos shard --help")
    if dataset_number(data, "rows", label) < 1:
        if task in RAGGED_TASKS:
            raise UsageError(f"{label} has no examples to train on", hint="shard more records")
        raise UsageError(
            f"{label} has fewer tokens than one row of {dataset_number(data, 'seq_len', label)}",
            hint="shard more text, or shard it with a smaller --seq-len",
        )
    if task in LABELLED and not data.meta.get("labels"):
        raise UsageError(
            f"{label} has no labels to learn", hint="say which field holds them: llmos shard ... --field label=KEY"
        )
    if dataset_number(data, "seq_len", label) < 2:
        raise UsageError(f"{label} has rows of one token, in which there is nothing to predict")


def check_parent(
    store: Store, parent: Manifest, label: str, data: Manifest, data_label: str, *, to_score: bool = False
) -> None:
    """Raise UsageError or Unsafe unless `parent` is a model that speaks the dataset's tokens, and can be trained or is
    only `to_score`."""
    if parent.kind not in ("model", "checkpoint") and not (to_score and parent.kind == "adapter"):
        hint = "llmos merge makes a model of it" if parent.kind == "adapter" else "llmos ls shows what there is"
        raise UsageError(f"{label} is of kind {parent.kind}, not a model", hint=hint)
    table = model_config(store, parent, label)
    check_trainable({**table, "quantization_config": None} if to_score else table, label)
    check_sizes(table, label, data, data_label)
    ours, theirs = tokenizer_file(data), tokenizer_file(parent)
    if ours and theirs and not _same_tokenizer(store, ours, theirs):
        raise UsageError(
            f"{data_label} was made with another tokenizer than {label} has",
            hint=f"shard the text with the model's own: llmos shard ... --tokenizer {label}",
        )


def check_sizes(table: Mapping[str, Json], label: str, data: Manifest, data_label: str) -> None:
    """Raise UsageError if the rows or the vocabulary are larger than what a config.json provides for, or if it is of a
    family that the task is not for."""
    if table.get("is_encoder_decoder") and data.meta.get("task") != "seq2seq":
        raise UsageError(
            f"{label} is an encoder-decoder, and {data_label} is for the task {data.meta.get('task')}",
            hint="it trains on what llmos shard --task seq2seq makes",
        )
    seq_len, tokens = dataset_number(data, "seq_len", data_label), dataset_number(data, "vocab_size", data_label)
    vocab = table.get("vocab_size")
    if isinstance(vocab, int) and tokens > vocab:
        raise UsageError(
            f"{data_label} uses a vocabulary of {tokens:,} tokens, more than the {vocab:,} of {label}",
            hint="use a model with a larger vocab_size, or shard with that model's tokenizer",
        )
    for key in _LENGTH_KEYS:
        longest = table.get(key)
        if isinstance(longest, int) and seq_len > longest:
            raise UsageError(
                f"{data_label} has rows of {seq_len:,} tokens, but {label} takes at most {longest:,} ({key})",
                hint=f"shard the text again with --seq-len {longest}",
            )


def dataset_number(data: Manifest, key: str, label: str) -> int:
    """One of a dataset's counts."""
    value = data.meta.get(key)
    if type(value) is not int:
        raise Damaged(f"dataset {label} does not say its {key}")
    return value


def row_bytes(data: Manifest) -> int:
    """Bytes of tokens in a row, or in an example at most: by them the order keeps reading local."""
    return dataset_number(data, "seq_len", "the dataset") * (4 if data.meta.get("dtype") == "U32" else 2)


def tokenizer_file(manifest: Manifest) -> FileEntry | None:
    """The tokenizer.json of a model or a dataset."""
    return manifest.file("tokenizer/tokenizer.json") if manifest.kind == "dataset" else manifest.file("tokenizer.json")


def _same_tokenizer(store: Store, ours: FileEntry, theirs: FileEntry) -> bool:
    if ours.chunks == theirs.chunks:
        return True
    tables = [canonical.loads(read_file(store, entry), entry.path) for entry in (ours, theirs)]
    views = [
        {key: table.get(key) for key in ("model", "added_tokens")} if isinstance(table, dict) else {}
        for table in tables
    ]
    return views[0] == views[1]
