"""AdamW and its learning rate: which parameters decay, and the rate as a pure function of the step.

There is no scheduler object, so there is no scheduler state that could be restored wrongly.
"""

import math
from typing import Final

import torch
from torch import nn

BETAS: Final = (0.9, 0.95)
EPS: Final = 1e-8
FLOOR: Final = 0.1  # the cosine ends at this share of the peak


def learning_rate(step: int, *, steps: int, warmup: int, peak: float) -> float:
    """The rate of step `step` (from 0): linear up to the peak over `warmup` steps, then a cosine to 10 % of it."""
    if step < warmup:
        return peak * (step + 1) / warmup
    last = max(1, steps - 1 - warmup)
    done = min(1.0, (step - warmup) / last)
    return peak * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * done)))


def build_optimizer(model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; only matrices decay, since norms and biases are scales, not weights."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=BETAS, eps=EPS, fused=True)
