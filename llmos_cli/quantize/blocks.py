"""The blocks of a stored model, one after the other, on what they really get as input.

There is one block in memory, which takes the weights of each in its turn; the hidden states of some rows of a dataset
wait between two blocks.
"""

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from llmos_cli.errors import Damaged, LlmosError
from llmos_cli.formats.limits import MiB
from llmos_cli.formats.manifest import FileEntry, Manifest
from llmos_cli.formats.safetensors import TensorInfo
from llmos_cli.models.config import load_config
from llmos_cli.models.heads import head_of, model_class
from llmos_cli.models.quiet import quiet
from llmos_cli.models.weights import read_tensor
from llmos_cli.quantize.folds import SAMPLE, Inputs
from llmos_cli.quantize.plan import stored_name
from llmos_cli.store.inspect.tensors import tensor_table
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import open_file

HIDDEN_BYTES: Final = 256 * MiB
BATCH_ROWS: Final = 8


@dataclass(frozen=True)
class Blocks:
    """A model with a single block, whose weights are those of one stored block after the other."""

    model: PreTrainedModel
    prefix: str  # of the blocks' names, as in "model.layers"
    block: nn.Module
    count: int
    table: Mapping[str, tuple[FileEntry, TensorInfo]]  # the stored tensors

    def stored(self, number: int, name: str) -> str | None:
        """What a parameter of block `number` is called where it is stored."""
        return stored_name(f"{self.prefix}.{number}.{name}", self.model, self.table)


Others = tuple[tuple[Any, ...], dict[str, Any]]
"""What a block is called with beside the hidden states."""


@dataclass
class Hidden:
    """What goes into the next block: hidden states by batch, and what else its call takes."""

    states: list[torch.Tensor]
    others: list[Others]


def open_blocks(store: Store, source: Manifest) -> Blocks:
    config = copy.deepcopy(load_config(store, source))
    count = getattr(config, "num_hidden_layers", None)
    if not isinstance(count, int) or count < 1:
        raise no_blocks(config.model_type)
    config.num_hidden_layers = 1
    if isinstance(getattr(config, "layer_types", None), list):
        if len(set(config.layer_types)) > 1:
            raise no_blocks(config.model_type)
        config.layer_types = config.layer_types[:1]
    config.dtype = torch.float32
    with quiet(), torch.random.fork_rng(devices=[]):
        model = model_class(config, head_of(config))(config).float().eval()
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    lists = [(name, module) for name, module in lists if len(module) == 1 and list(module.parameters())]
    if not lists:
        raise no_blocks(config.model_type)
    prefix, module = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    table = tensor_table(store, source)
    blocks = Blocks(model, prefix, module[0], count, table)
    for name, parameter in model.named_parameters():
        if not name.startswith(f"{prefix}.0."):
            _fill(store, blocks, stored_name(name, model, table), name, parameter)
    return blocks


def no_blocks(kind: str) -> LlmosError:
    return LlmosError(f"the blocks of a {kind} model cannot be calibrated one by one", hint="use --method search")


def _fill(store: Store, blocks: Blocks, found: str | None, name: str, parameter: nn.Parameter) -> None:
    """Give a parameter of the one-block model its stored value."""
    if found is None:
        raise Damaged(f"the model has no tensor {name!r}")
    entry, info = blocks.table[found]
    tensor = read_tensor(open_file(store, entry), info)
    if tensor.shape != parameter.shape:
        raise no_blocks(str(blocks.model.config.model_type))
    with torch.no_grad():
        parameter.copy_(tensor)


class _Caught(Exception):
    """The first block was reached."""


class _Catcher(nn.Module):
    """Stands in the place of the first block and keeps what it is called with."""

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        self.caught: list[tuple[torch.Tensor, Others]] = []
        for name in ("attention_type", "layer_type", "is_sliding"):
            if hasattr(like, name):
                setattr(self, name, getattr(like, name))

    def forward(self, states: torch.Tensor, *rest: Any, **others: Any) -> None:
        self.caught.append((states, (rest, others)))
        raise _Caught


def begin_with(blocks: Blocks, rows: np.ndarray) -> Hidden:
    """What goes into the first block, of as many rows as HIDDEN_BYTES hold."""
    width = blocks.model.get_input_embeddings().weight.shape[1]
    most = max(1, HIDDEN_BYTES // (4 * rows.shape[1] * width))
    parent, _, leaf = blocks.prefix.rpartition(".")
    catcher = _Catcher(blocks.block)
    modules = blocks.model.get_submodule(parent).get_submodule(leaf)
    assert isinstance(modules, nn.ModuleList)
    modules[0] = catcher
    hidden = Hidden([], [])
    try:
        with torch.inference_mode(), quiet():
            for first in range(0, min(len(rows), most), BATCH_ROWS):
                ids = torch.from_numpy(rows[first : min(first + BATCH_ROWS, most)].astype(np.int64))
                with contextlib.suppress(_Caught):
                    blocks.model(input_ids=ids, use_cache=False)
                states, others = catcher.caught.pop()
                hidden.states.append(states)
                hidden.others.append(others)
    finally:
        modules[0] = blocks.block
    return hidden


def load_block(store: Store, blocks: Blocks, number: int) -> None:
    """Let the block be the stored one of this number."""
    for name, parameter in blocks.block.named_parameters():
        _fill(store, blocks, blocks.stored(number, name), f"{blocks.prefix}.{number}.{name}", parameter)


def run_block(block: nn.Module, hidden: Hidden, at: int = 0) -> torch.Tensor:
    """What a block makes of one batch."""
    rest, others = hidden.others[at]
    with torch.inference_mode(), quiet():
        made = block(hidden.states[at], *rest, **others)
    states: torch.Tensor = made[0] if isinstance(made, tuple) else made
    return states


def inputs_of(block: nn.Module, hidden: Hidden, names: Sequence[str]) -> dict[str, Inputs]:
    """What each layer gets; layers with one input share one."""
    found: dict[str, Inputs] = {}
    first_of: dict[str, str] = {}
    counts: dict[str, int] = {}
    seen: list[tuple[torch.Tensor, str]] = []  # held, so that no other tensor takes the same memory meanwhile

    def watch(name: str, x: torch.Tensor) -> None:
        first_of.setdefault(name, next((other for kept, other in seen if kept is x), name))
        seen.append((x, name))
        if first_of[name] != name:
            return
        rows = x.reshape(-1, x.shape[-1]).float()
        product, peak = rows.T @ rows, rows.abs().amax(0)
        if name not in found:
            found[name] = Inputs(product, peak, rows[:: max(1, len(rows) // SAMPLE)][:SAMPLE].clone())
        else:
            found[name].second.add_(product)
            found[name].peak = torch.maximum(found[name].peak, peak)
        counts[name] = counts.get(name, 0) + len(rows)

    hooks = [
        block.get_submodule(name).register_forward_pre_hook(lambda _, inputs, name=name: watch(name, inputs[0]))
        for name in names
    ]
    try:
        for at in range(len(hidden.states)):
            run_block(block, hidden, at)
            seen.clear()
    finally:
        for hook in hooks:
            hook.remove()
    missing = [name for name in names if name not in first_of]
    if missing:
        raise LlmosError(f"layer {missing[0]} gets no input of its own", hint="use --method search")
    for name, inputs in found.items():
        inputs.second = inputs.second / counts[name]
    return {name: found[first_of[name]] for name in names}


def advance(block: nn.Module, hidden: Hidden) -> None:
    """Move the hidden states through a block."""
    for at in range(len(hidden.states)):
        hidden.states[at] = run_block(block, hidden, at)
