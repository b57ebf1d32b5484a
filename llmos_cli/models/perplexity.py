"""Perplexity of a causal model over rows of token ids.

Definition: in each row, every token from the second on is predicted from the tokens before it in the same row (where a
row holds several documents: in the same document, and the first token of each is not predicted); the loss is the mean
negative log-likelihood (nats) over all predicted tokens of all rows, each counted once, taken from a float32
log-softmax; perplexity is exp(loss). Rows may differ in length from batch to batch.
"""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from llmos_cli.errors import LlmosError
from llmos_cli.progress import Progress

_IGNORED: Final = -100


@dataclass(frozen=True)
class Perplexity:
    """`loss` in nats a token, `tokens` how many were predicted, `bits_per_byte` where the text's size is known."""

    perplexity: float
    loss: float
    tokens: int
    bits_per_byte: float | None
    seconds: float


@dataclass(frozen=True)
class Packed:
    """Rows of several documents each: ids, positions that begin anew with each document (None for a model that takes
    no notice of them), and which ids to predict."""

    ids: np.ndarray
    positions: np.ndarray | None
    learned: np.ndarray


def perplexity(
    model: PreTrainedModel,
    rows: Iterable[np.ndarray | torch.Tensor | Packed],
    *,
    progress: Progress,
    total: int | None = None,
    bytes_per_token: float | None = None,
) -> Perplexity:
    """Score batches of ids [batch, sequence], one at a time; `total` is the number of rows, for the progress bar.

    `model` should be in eval mode. Logits of a batch are held once in the model's dtype, in float32 row by row.
    """
    started = time.monotonic()
    embedding = model.get_input_embeddings().weight
    device, vocab_size = embedding.device, embedding.shape[0]
    loss_sum, tokens = 0.0, 0
    with torch.inference_mode(), progress.task("scoring", total=total, unit="rows") as task:
        for batch in rows:
            packed = batch if isinstance(batch, Packed) else None
            ids = torch.as_tensor(packed.ids if packed else batch, dtype=torch.int64, device=device)
            if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
                raise LlmosError(f"token {int(ids.max())} is outside the model's vocabulary of {vocab_size}")
            if ids.shape[1] > 1:
                more, targets = {}, ids
                if packed:
                    if packed.positions is not None:
                        more = {"position_ids": torch.as_tensor(packed.positions, device=device)}
                    targets = ids.masked_fill(torch.as_tensor(~packed.learned, device=device), _IGNORED)
                logits = model(input_ids=ids, use_cache=False, **more).logits
                for row, row_targets in zip(logits, targets, strict=True):
                    loss_sum += functional.cross_entropy(
                        row[:-1].float(), row_targets[1:], reduction="sum", ignore_index=_IGNORED
                    ).item()
                tokens += int((targets[:, 1:] != _IGNORED).sum())
            task.advance(ids.shape[0])
            if tokens:
                task.note(f"loss {loss_sum / tokens:.4f}")
    if not tokens:
        raise LlmosError("there is no row of at least two tokens to score")
    loss = loss_sum / tokens
    if not math.isfinite(loss):
        raise LlmosError("the model's loss is not a finite number", hint="its weights overflow or are damaged")
    bits = None if not bytes_per_token else loss / math.log(2) / bytes_per_token
    return Perplexity(_exp(loss), loss, tokens, bits, time.monotonic() - started)


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        raise LlmosError(f"a loss of {loss:.1f} nats a token has no perplexity") from None
