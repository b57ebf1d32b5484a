"""Measures the perplexity of a stored model on a stored dataset, after checking that they speak of the same tokens.

Knows nothing of reports and refs.
"""

from collections.abc import Iterator
from typing import Final

import numpy as np

from llmos_cli.data.batches import Batch, TokenRows
from llmos_cli.errors import Damaged, UsageError
from llmos_cli.formats.canonical import Json
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.manifest import Manifest
from llmos_cli.models.config import load_config
from llmos_cli.models.device import pick_device
from llmos_cli.models.load import load_model
from llmos_cli.models.packed import keeps_apart
from llmos_cli.models.perplexity import Packed, perplexity
from llmos_cli.models.quiet import quiet
from llmos_cli.models.tokenizers import TOKENIZER_FILE, tokenizer_entries
from llmos_cli.progress import Progress
from llmos_cli.store.local import Store

_MAX_BATCH: Final = 32
_MAX_LOGITS: Final = 1 << 25  # in a batch whose size was not given


def measure(
    store: Store,
    model: Manifest,
    data: Manifest,
    rows: TokenRows,
    *,
    limit: int | None,
    batch: int | None,
    progress: Progress,
) -> dict[str, Json]:
    """Score all of `rows`, or `limit` evenly spaced ones; the numbers are rounded to what repeats exactly."""
    vocab_size = check_match(store, model, data, rows.seq_len)
    device = pick_device()
    loaded = load_model(store, model, device=device, progress=progress)
    size = batch or max(1, min(_MAX_BATCH, _MAX_LOGITS // (rows.seq_len * vocab_size)))
    scored = limit or rows.rows
    with quiet() as messages:
        found = perplexity(
            loaded,
            _batches(rows, size, limit, apart=keeps_apart(loaded, rows.seq_len)),
            progress=progress,
            total=limit or rows.rows + (rows.tail().size > 1),
            bytes_per_token=_bytes_per_token(data),
        )
    for message in messages:
        progress.warn(message)
    return {
        "bits_per_byte": None if found.bits_per_byte is None else round(found.bits_per_byte, 6),
        "device": device.type,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "loss": round(found.loss, 6),
        "perplexity": float(f"{found.perplexity:.7g}"),
        "rows": scored,
        "rows_total": rows.rows,
        "tokens": found.tokens,
    }


def check_match(store: Store, model: Manifest, data: Manifest, seq_len: int) -> int:
    """The model's vocabulary size; raises UsageError unless the dataset's tokens mean the same to the model."""
    config = load_config(store, model).get_text_config()
    vocab_size, context = config.vocab_size, getattr(config, "max_position_embeddings", None)
    if not isinstance(vocab_size, int) or vocab_size < 1:
        raise Damaged("config.json has no vocabulary size")
    again = "make the dataset again: llmos shard TEXT NAME --tokenizer MODEL"
    theirs, ours = (_tokenizer_chunks(manifest) for manifest in (model, data))
    if theirs is not None and ours is not None and theirs != ours:
        raise UsageError("the dataset was made with another tokenizer than the model's", hint=again)
    known = data.meta.get("vocab_size")
    if isinstance(known, int) and known > vocab_size:
        raise UsageError(f"the dataset has {known} different tokens, the model knows {vocab_size}", hint=again)
    if isinstance(context, int) and seq_len > context:
        raise UsageError(
            f"the dataset has rows of {seq_len} tokens, the model's context is {context}",
            hint=f"make the dataset again: llmos shard TEXT NAME --seq-len {context}",
        )
    return vocab_size


def sample_rows(store: Store, model: Manifest, data: Manifest, count: int) -> Batch:
    """At most `count` evenly spaced rows of a dataset, checked to mean the same to the model."""
    rows = TokenRows(store, data)
    check_match(store, model, data, rows.seq_len)
    count = min(count, rows.rows)
    return rows.batch(np.arange(count, dtype=np.int64) * rows.rows // max(1, count))


def _tokenizer_chunks(manifest: Manifest) -> tuple[ObjectId, ...] | None:
    for entry in tokenizer_entries(manifest):
        if entry.path == TOKENIZER_FILE:
            return tuple(chunk.id for chunk in entry.chunks)
    return None


def _batches(rows: TokenRows, batch: int, limit: int | None, *, apart: bool) -> Iterator[np.ndarray | Packed]:
    if limit is None:
        yield from (_scored(part, apart) for part in rows.in_order(batch))
        return
    chosen = np.arange(limit, dtype=np.int64) * rows.rows // limit
    for first in range(0, limit, batch):
        yield _scored(rows.batch(chosen[first : first + batch]), apart)


def _scored(batch: Batch, apart: bool) -> np.ndarray | Packed:
    if batch.position_ids is None or batch.learned is None:
        return batch.input_ids
    return Packed(batch.input_ids, batch.position_ids if apart else None, batch.learned)


def _bytes_per_token(data: Manifest) -> float | None:
    value = data.meta.get("bytes_per_token")
    return float(value) if isinstance(value, int | float) and value > 0 else None
