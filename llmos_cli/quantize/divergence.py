"""How far the next-token distributions of one model are from those of another, over the same tokens.

For every predicted token: the KL divergence of the model from the reference, the sum over the vocabulary of
p * log(p / q) in nats, p the reference's; whether both hold the same token most likely; and both losses. As llama.cpp's
`llama-perplexity --kl-divergence` defines them, in float32.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from llmos_cli.errors import LlmosError
from llmos_cli.progress import Progress


@dataclass(frozen=True)
class Divergence:
    """`kl_mean`, `kl_999` (99.9 % of tokens lie below it) and `kl_max` in nats; `same_top` the share of tokens on which
    both would decide alike; losses in nats a token of the `reference` and of the model."""

    kl_mean: float
    kl_999: float
    kl_max: float
    same_top: float
    reference_loss: float
    loss: float
    tokens: int


def diverge(
    reference: PreTrainedModel,
    model: PreTrainedModel,
    rows: np.ndarray,
    *,
    learned: np.ndarray | None = None,
    positions: np.ndarray | None = None,
    batch: int,
    progress: Progress,
) -> Divergence:
    """Compare over `rows`, [rows, tokens] of ids, on the tokens that `learned` names, of the same shape (padding and
    the beginnings of documents are not), or on all but each row's first. `positions` that begin anew keep the documents
    of a row apart. Both models in eval mode on one device. Memory: the logits of a batch twice, in float32."""
    found: list[torch.Tensor] = []
    same = tokens = 0
    losses = [0.0, 0.0]
    device = reference.get_input_embeddings().weight.device
    with torch.inference_mode(), progress.task("comparing", total=len(rows), unit="rows") as task:
        for first in range(0, len(rows), batch):
            ids = torch.as_tensor(rows[first : first + batch], dtype=torch.int64, device=device)
            more = {}
            if positions is not None:
                more = {"position_ids": torch.as_tensor(positions[first : first + batch], device=device)}
            p, q = (one(input_ids=ids, use_cache=False, **more).logits[:, :-1].float() for one in (reference, model))
            wanted = torch.ones_like(ids, dtype=torch.bool)
            if learned is not None:
                wanted = torch.as_tensor(learned[first : first + batch], device=device).bool()
            wanted = wanted[:, 1:]
            targets, p, q = ids[:, 1:][wanted], p[wanted], q[wanted]
            for at, logits in enumerate((p, q)):
                losses[at] += float(functional.cross_entropy(logits, targets, reduction="sum"))
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
            p, q = p.log_softmax(-1), q.log_softmax(-1)
            found.append((p.exp() * (p - q)).sum(-1).clamp_min(0).cpu())
            tokens += targets.numel()
            task.advance(len(ids))
    if not tokens:
        raise LlmosError("there is no row of at least two tokens to compare on")
    kl = torch.cat(found).sort().values
    mean = float(kl.mean())
    if not (math.isfinite(mean) and all(map(math.isfinite, losses))):
        raise LlmosError("a loss is not a finite number", hint="the weights of one model overflow or are damaged")
    at = min(len(kl) - 1, math.ceil(0.999 * len(kl)) - 1)
    return Divergence(mean, float(kl[at]), float(kl[-1]), same / tokens, losses[0] / tokens, losses[1] / tokens, tokens)
