"""Does a model take rows of several documents? Tried out, since no field of a config says it for every architecture."""

from typing import Any, Final

import torch

_PROBE: Final = 8  # tokens


def keeps_apart(model: Any, seq_len: int) -> bool:
    """Whether what stands before a position 0 changes nothing after it: only then is a row of several documents as good
    as a row for each. (A model may take positions and yet attend to all that came before.)"""
    if seq_len < _PROBE:
        return True
    half = _PROBE // 2
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(_PROBE, device=device).remainder(2).repeat(2, 1)
    ids[1, :half] = 1 - ids[0, :half]
    positions = torch.arange(_PROBE, device=device).remainder(half).repeat(2, 1)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            first, second = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, half:].float()
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False
    finally:
        model.train(training)
    return torch.allclose(first, second, rtol=1e-3, atol=1e-5, equal_nan=True)
