"""A checkpoint is one commit: the model's files, and in `training/` everything else that the next step depends on.

`training/state.safetensors` holds the optimizer's tensors and the random generators, `training/state.json` the
position. Nothing is pickled, and nothing depends on how often a run was interrupted: a checkpoint of step N has one id.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn

from llmos_cli.errors import Damaged
from llmos_cli.formats import canonical
from llmos_cli.formats.canonical import Json
from llmos_cli.train.average import Average
from llmos_cli.train.loop import capture_random_state, restore_random_state
from llmos_cli.train.optimizer import BETAS, EPS, group_numbers, state_sets, state_shape
from llmos_cli.train.plan import STATE_FOLDER

TENSORS: Final = f"{STATE_FOLDER}/state.safetensors"
POSITION: Final = f"{STATE_FOLDER}/state.json"
VERSION: Final = 1


@dataclass(frozen=True)
class Position:
    """Where a run is: steps applied, tokens predicted so far, the loss of the last step (None before the first)."""

    step: int = 0
    tokens: int = 0
    loss: float | None = None


def encode_position(position: Position, params: Mapping[str, Json], seed: int, data_id: str) -> bytes:
    """training/state.json."""
    return canonical.encode(
        {
            "config": dict(params),
            "data": data_id,
            "loss": position.loss,
            "optimizer": {"betas": list(BETAS), "eps": EPS, "name": params.get("optimizer", "adamw")},
            "seed": seed,
            "step": position.step,
            "tokens": position.tokens,
            "version": VERSION,
        }
    )


def decode_position(data: bytes, what: str) -> Position:
    """Read training/state.json; raises Damaged naming `what`."""
    value = canonical.decode(data, what)
    if not isinstance(value, dict) or value.get("version") != VERSION:
        raise Damaged(f"{what} is not a training position of version {VERSION}")
    step, tokens, loss = value.get("step"), value.get("tokens"), value.get("loss")
    if type(step) is not int or type(tokens) is not int or not (loss is None or type(loss) is float):
        raise Damaged(f"{what} is not a training position")
    return Position(step, tokens, loss)


def capture(
    model: nn.Module, optimizer: torch.optim.Optimizer, average: Average | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of training/state.safetensors, as views of live memory: write them before the next step."""
    state: dict[str, torch.Tensor] = dict(capture_random_state())
    known = frozenset().union(*state_sets(optimizer))
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if key not in known:
                raise ValueError(f"the optimizer keeps {key!r}, which a checkpoint does not hold")
            if value is not None:
                state[f"{key}.{name}"] = value
    for name, (group, key) in group_numbers(optimizer).items():
        state[name] = torch.tensor(group[key], dtype=torch.float64)
    return state | (average.state() if average else {})


def restore(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, torch.Tensor],
    what: str,
    average: Average | None = None,
) -> None:
    """Put back what `capture` took, bit for bit; raises Damaged, naming `what`, if it is not this model's state."""
    waiting = dict(state)
    random_state = {key: waiting.pop(key) for key in list(waiting) if key.startswith("rng.")}
    if "rng.cpu" not in random_state:
        raise Damaged(f"{what} has no random state")
    if average is not None:
        average.restore(waiting, what)
    for name, (group, key) in group_numbers(optimizer).items():
        if name not in waiting:
            raise Damaged(f"{what} lacks the optimizer's {key}")
        group[key] = type(group[key])(waiting.pop(name).item())
    sets = state_sets(optimizer)
    known = sorted(frozenset().union(*sets))
    for name, parameter in model.named_parameters():
        found = {key: waiting.pop(f"{key}.{name}") for key in known if f"{key}.{name}" in waiting}
        if not found:
            continue
        for key, value in found.items():
            if value.shape != state_shape(key, parameter) or value.dtype != torch.float32:
                raise Damaged(f"{what} does not fit the model: {key} of {name}")
        if frozenset(found) not in sets:
            raise Damaged(f"{what} lacks part of the optimizer state of {name}")
        # Copied into torch's own allocations: kernels may pick another path, and other bits, for other alignments.
        optimizer.state[parameter] = {
            key: torch.empty_like(value, device=parameter.device).copy_(value) for key, value in found.items()
        }
    if waiting:
        raise Damaged(f"{what} has state of parameters that the model does not have: {sorted(waiting)[0]}")
    restore_random_state(random_state)
