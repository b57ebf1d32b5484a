"""Does a model predict from the past alone? Tried out, since no field of a config says it for every architecture."""

from typing import Any, Final

import torch

from llmos_cli.errors import UsageError

_PROBE: Final = 8  # tokens, unless rows are shorter


def check_causal(model: Any, seq_len: int) -> None:
    """Raise UsageError if a token changes what is predicted before it: such a model would learn to read the answer."""
    name = type(model).__name__
    ids = torch.arange(min(_PROBE, seq_len)).remainder(2).repeat(2, 1)
    ids[1, -1] = 1 - ids[0, -1]
    model.eval()
    try:
        with torch.no_grad():
            first, second = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    except (TypeError, ValueError, RuntimeError, IndexError) as exc:
        reason = " ".join(str(exc).split())[:200]
        raise UsageError(f"{name} cannot be trained on plain tokens: {reason}") from exc
    if not torch.allclose(first, second, rtol=1e-3, atol=1e-5, equal_nan=True):
        raise UsageError(
            f"{name} sees the tokens it should predict: it is not a causal language model",
            hint='an encoder becomes one with "is_decoder": true in its config.json',
        )
