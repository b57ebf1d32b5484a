"""The optimizers and the learning rate: which parameters decay, and the rate as a pure function of the step.

There is no scheduler object, so there is no scheduler state that could be restored wrongly. `--lr` means about the same
to AdamW, Muon (whose steps are brought to AdamW's size) and schedule-free AdamW; SGD and Adafactor want more.
"""

import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, Final

import torch
from torch import nn

from llmos_cli.errors import UsageError

BETAS: Final = (0.9, 0.95)
EPS: Final = 1e-8
MOMENTUM: Final = 0.9  # of SGD
FLOOR: Final = 0.1  # the cosine ends at this share of the peak
FALL: Final = 0.2  # the share of the steps in which "wsd" falls to nothing


def learning_rate(step: int, *, steps: int, warmup: int, peak: float, schedule: str = "cosine") -> float:
    """The rate of step `step` (from 0): linear up to the peak over `warmup` steps, then as the schedule says.

    cosine: to 10 % of the peak. linear: evenly, to nothing behind the last step. wsd: the peak, and in the last fifth
    of the steps evenly to nothing. constant: the peak.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return peak * (steps - step) / max(1, steps - warmup)
    if schedule == "wsd":
        falling = max(1, min(steps - warmup, math.ceil(FALL * steps)))
        return peak * min(1.0, (steps - step) / falling)
    last = max(1, steps - 1 - warmup)
    done = min(1.0, (step - warmup) / last)
    return peak * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * done)))


def build_optimizer(model: nn.Module, *, lr: float, weight_decay: float, name: str = "adamw") -> torch.optim.Optimizer:
    """The optimizer of this name over the trainable parameters; only matrices decay, since norms and biases are scales,
    not weights. Raises UsageError where its package is missing."""
    if name == "muon":
        hidden, others = _split(model)
        adamw = _adamw(_groups(others, weight_decay), lr)
        if not hidden:
            return adamw
        # Steps of AdamW's size, so that one rate suits both.
        muon = torch.optim.Muon(hidden, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        return Together([muon, adamw]) if others else muon
    groups = _groups([parameter for parameter in model.parameters() if parameter.requires_grad], weight_decay)
    return _BUILDERS[name](groups, lr)


class Together(torch.optim.Optimizer):
    """Several optimizers, each for parameters of its own, that step as one."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        groups = [group for part in parts for group in part.param_groups]
        super().__init__([{"params": group["params"]} for group in groups], {})
        self.param_groups = groups
        self.parts = parts
        for part in parts:
            part.state = self.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()

    def load_state_dict(self, state_dict: Any) -> None:
        """Nothing: accelerate moves a state that is empty yet, and a checkpoint's is put in place by parameter."""


def state_sets(optimizer: torch.optim.Optimizer) -> tuple[frozenset[str], ...]:
    """The sets of tensors that an optimizer may keep for a parameter, by their names."""
    if isinstance(optimizer, Together):
        return tuple(found for part in optimizer.parts for found in state_sets(part))
    return _KEPT[type(optimizer).__name__]


def state_shape(key: str, parameter: torch.Tensor) -> torch.Size:
    """The shape of what is kept as `key` for a parameter."""
    shape = list(parameter.shape)
    return torch.Size(
        {"step": [], "row_var": [*shape[:-1], 1], "col_var": [*shape[:-2], 1, *shape[-1:]]}.get(key, shape)
    )


def group_numbers(optimizer: torch.optim.Optimizer) -> dict[str, tuple[dict[str, Any], str]]:
    """What an optimizer counts for a whole group, by a name of its own: the group, and the key in it."""
    return {
        f"group.{number}.{key}": (group, key)
        for number, group in enumerate(optimizer.param_groups)
        for key in _COUNTED
        if key in group
    }


def _adamw(groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=lr, betas=BETAS, eps=EPS, fused=True)


def _adafactor(groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(groups, lr=lr)


def _sgd(groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=lr, momentum=MOMENTUM)


def _schedule_free(groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    if find_spec("schedulefree") is None:
        raise UsageError("--optimizer schedule-free needs a package", hint="pip install 'llmos[optimizers]'")
    import schedulefree

    built: torch.optim.Optimizer = schedulefree.AdamWScheduleFree(groups, lr=lr, betas=BETAS, eps=EPS)
    return built


_BUILDERS: Final[dict[str, Callable[[list[dict[str, Any]], float], torch.optim.Optimizer]]] = {
    "adamw": _adamw,
    "adafactor": _adafactor,
    "sgd": _sgd,
    "schedule-free": _schedule_free,
}
_KEPT: Final = {
    "AdamW": (frozenset({"exp_avg", "exp_avg_sq", "step"}),),
    "Muon": (frozenset({"momentum_buffer"}),),
    "Adafactor": (frozenset({"col_var", "row_var", "step"}), frozenset({"step", "variance"})),
    "SGD": (frozenset({"momentum_buffer"}),),
    "AdamWScheduleFree": (frozenset({"exp_avg_sq", "z"}),),
}
_COUNTED: Final = ("k", "lr_max", "scheduled_lr", "weight_sum")  # by schedule-free


def _groups(parameters: Sequence[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices between embeddings and head, which Muon is for, and all other trainable parameters."""
    body = getattr(model, "base_model", model)
    inside = {id(parameter) for parameter in body.parameters()}
    tables = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    hidden: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            matrix = parameter.ndim == 2 and min(parameter.shape) > 1
            chosen = matrix and id(parameter) in inside and id(parameter) not in tables
            (hidden if chosen else others).append(parameter)
    return hidden, others
