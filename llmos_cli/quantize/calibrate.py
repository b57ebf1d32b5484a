"""Values of four bits found by what the layers of a model really get as input, block by block.

The rows of a dataset go through the model one block of layers after the other: first with the weights as they are, to
see the inputs of every linear layer, then with the weights as they have become, so that a block is calibrated on what
the quantized blocks before it give. Memory: one block in float32, its largest input statistics, and the rows' hidden
states, at most `HIDDEN_BYTES`. Every finished block is an object of its own, found again by its recipe: a run that was
killed goes on after the last one.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from llmos_cli.errors import Damaged, LlmosError, UsageError
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.limits import MiB
from llmos_cli.formats.manifest import FileEntry, Manifest, Recipe
from llmos_cli.formats.safetensors import TensorInfo
from llmos_cli.models.config import load_config
from llmos_cli.models.heads import model_class
from llmos_cli.models.quantized import WEIGHT
from llmos_cli.models.quiet import quiet
from llmos_cli.models.weights import read_tensor, tensor_source
from llmos_cli.progress import Progress
from llmos_cli.quantize import grid
from llmos_cli.quantize.grid import Grid
from llmos_cli.quantize.plan import Quantized, QuantizePlan, stored_name
from llmos_cli.store.inspect.tensors import tensor_table
from llmos_cli.store.leases import hold
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import open_file, read_manifest
from llmos_cli.store.refs.recipes import find_made
from llmos_cli.store.transaction import begin

HIDDEN_BYTES: Final = 256 * MiB
BATCH_ROWS: Final = 8
MIN_TOKENS: Final = 1024  # fewer say too little of what a layer gets
_VALUES: Final = ".values"
_SCALES: Final = ".scales"
_FILE: Final = "block.safetensors"


@dataclass(frozen=True)
class Blocks:
    """A model with a single block, whose weights are those of one stored block after the other."""

    model: PreTrainedModel
    prefix: str  # of the blocks' names, as in "model.layers"
    block: nn.Module
    count: int


@dataclass(frozen=True)
class Calibrated:
    """What was found, by the names of stored tensors: where it lies."""

    store: Store
    found: Mapping[str, tuple[FileEntry, Mapping[str, TensorInfo]]]

    def __call__(self, name: str) -> Grid | None:
        if name not in self.found:
            return None
        entry, table = self.found[name]
        reader = open_file(self.store, entry)
        return Grid(read_tensor(reader, table[name + _VALUES]), read_tensor(reader, table[name + _SCALES]))


@contextmanager
def calibrated(
    store: Store, source: Manifest, plan: QuantizePlan, rows: np.ndarray, recipe: Recipe, *, progress: Progress
) -> Iterator[Calibrated]:
    """Calibrate every weight of four bits in the model's blocks on `rows`, [rows, tokens] of token ids.

    Raises UsageError if there are too few tokens, LlmosError for a model without blocks that follow one another.
    Inside the context gc leaves what was found alone.
    """
    if rows.size < MIN_TOKENS:
        raise UsageError(
            f"calibration needs at least {MIN_TOKENS:,} tokens, the dataset gives {rows.size:,}",
            hint="name a larger dataset with --data, or use --method search",
        )
    blocks = _open_blocks(store, source)
    by_block = _by_block(plan, blocks)
    found: dict[str, tuple[FileEntry, Mapping[str, TensorInfo]]] = {}
    with ExitStack() as stack, progress.task("calibrating", total=blocks.count, unit="blocks") as task:
        hidden: _Hidden | None = None
        for number in range(blocks.count):
            step = replace(recipe, command="quantize-block", params={**recipe.params, "block": number})
            made = find_made(store, step)
            if made is None:
                hidden = hidden or _start(store, source, blocks, plan, rows, found, number)
                made = _one_block(store, source, blocks, hidden, number, by_block[number], step)
            else:
                hidden = None
            stack.enter_context(hold(store, "quantize", [made]))
            entry = read_manifest(store, made).files[0]
            table = {name: info for name, (_, info) in tensor_table(store, read_manifest(store, made)).items()}
            found |= {item.info.name: (entry, table) for item in by_block[number].values()}
            task.advance(1)
        yield Calibrated(store, found)


Others = tuple[tuple[Any, ...], dict[str, Any]]
"""What a block is called with beside the hidden states."""


@dataclass
class _Hidden:
    """What goes into the next block: hidden states by batch, and what else its call takes."""

    states: list[torch.Tensor]
    others: list[Others]


def _open_blocks(store: Store, source: Manifest) -> Blocks:
    config = copy.deepcopy(load_config(store, source))
    count = getattr(config, "num_hidden_layers", None)
    if not isinstance(count, int) or count < 1:
        raise _no_blocks(config.model_type)
    config.num_hidden_layers = 1
    if isinstance(getattr(config, "layer_types", None), list):
        if len(set(config.layer_types)) > 1:
            raise _no_blocks(config.model_type)
        config.layer_types = config.layer_types[:1]
    config.dtype = torch.float32
    with quiet(), torch.random.fork_rng(devices=[]):
        model = model_class(config)(config).float().eval()
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    lists = [(name, module) for name, module in lists if len(module) == 1 and list(module.parameters())]
    if not lists:
        raise _no_blocks(config.model_type)
    prefix, module = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    blocks = Blocks(model, prefix, module[0], count)
    table = tensor_table(store, source)
    for name, parameter in model.named_parameters():
        if not name.startswith(f"{prefix}.0."):
            _fill(store, table, model, name, name, parameter)
    return blocks


def _no_blocks(kind: str) -> LlmosError:
    return LlmosError(f"the blocks of a {kind} model cannot be calibrated one by one", hint="use --method search")


def _fill(store: Store, table: Any, model: PreTrainedModel, name: str, stored: str, parameter: nn.Parameter) -> None:
    """Give a parameter of the one-block model its stored value."""
    found = stored_name(stored, model, table)
    if found is None:
        raise Damaged(f"the model has no tensor {stored!r}")
    entry, info = table[found]
    tensor = read_tensor(open_file(store, entry), info)
    if tensor.shape != parameter.shape:
        raise _no_blocks(str(model.config.model_type))
    with torch.no_grad():
        parameter.copy_(tensor)


def _by_block(plan: QuantizePlan, blocks: Blocks) -> list[dict[str, Quantized]]:
    """For each block, its weights of four bits by their layers' names within the block."""
    found: list[dict[str, Quantized]] = [{} for _ in range(blocks.count)]
    for item in plan.quantized.values():
        head, _, rest = item.module.removeprefix(f"{blocks.prefix}.").partition(".")
        if item.form.packed and item.module.startswith(f"{blocks.prefix}.") and head.isdigit():
            found[int(head)][rest] = item
    return found


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


def _start(
    store: Store,
    source: Manifest,
    blocks: Blocks,
    plan: QuantizePlan,
    rows: np.ndarray,
    found: Mapping[str, tuple[FileEntry, Mapping[str, TensorInfo]]],
    number: int,
) -> _Hidden:
    """What goes into block `number`, through the quantized blocks before it."""
    width = blocks.model.get_input_embeddings().weight.shape[1]
    most = max(1, HIDDEN_BYTES // (4 * rows.shape[1] * width))
    parent, _, leaf = blocks.prefix.rpartition(".")
    catcher = _Catcher(blocks.block)
    modules = blocks.model.get_submodule(parent).get_submodule(leaf)
    assert isinstance(modules, nn.ModuleList)
    modules[0] = catcher
    hidden = _Hidden([], [])
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
    values = Calibrated(store, found)
    by_block = _by_block(plan, blocks)
    for before in range(number):
        _load_block(store, source, blocks, before)
        _put(blocks.block, by_block[before], {name: values(item.info.name) for name, item in by_block[before].items()})
        _advance(blocks.block, hidden)
    return hidden


def _load_block(store: Store, source: Manifest, blocks: Blocks, number: int) -> None:
    table = tensor_table(store, source)
    for name, parameter in blocks.block.named_parameters():
        _fill(store, table, blocks.model, name, f"{blocks.prefix}.{number}.{name}", parameter)


def _one_block(
    store: Store,
    source: Manifest,
    blocks: Blocks,
    hidden: _Hidden,
    number: int,
    items: Mapping[str, Quantized],
    step: Recipe,
) -> ObjectId:
    """Calibrate a block, move the hidden states through it, and keep what was found."""
    _load_block(store, source, blocks, number)
    statistics = _inputs_of(blocks.block, hidden, list(items))
    found: dict[str, Grid | None] = {}
    for name, item in items.items():
        weight = _weight(blocks.block, name, item)
        kept = torch.float16 if item.scale_dtype == "F16" else torch.bfloat16
        if not bool(torch.isfinite(weight).all()):
            raise Damaged(
                f"tensor {item.info.name!r} holds a value that is not a finite number",
                hint="the model diverged or was damaged before it was added; use an earlier checkpoint",
            )
        found[name] = grid.gptq(weight, item.form.group, kept, statistics[name])
    _put(blocks.block, items, found)
    _advance(blocks.block, hidden)
    tensors = []
    for name, item in sorted(items.items()):
        made = found[name]
        assert made is not None
        tensors += [tensor_source(item.info.name + _SCALES, made.scale)]
        tensors += [tensor_source(item.info.name + _VALUES, made.values)]
    with begin(store, purpose="quantize") as tx:
        entry = tx.add_tensors(_FILE, tensors)
        return tx.commit(Manifest("files", (entry,), {"block": number}, step), message="quantize").id


def _inputs_of(block: nn.Module, hidden: _Hidden, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """For each layer the mean of x.T x over its inputs x; layers with one input share one."""
    sums: dict[str, torch.Tensor] = {}
    first_of: dict[str, str] = {}
    counts: dict[str, int] = {}
    seen: list[tuple[torch.Tensor, str]] = []  # held, so that no other tensor takes the same memory meanwhile

    def watch(name: str, x: torch.Tensor) -> None:
        first_of.setdefault(name, next((other for kept, other in seen if kept is x), name))
        seen.append((x, name))
        if first_of[name] == name:
            rows = x.reshape(-1, x.shape[-1]).float()
            product = rows.T @ rows
            sums[name] = product if name not in sums else sums[name].add_(product)
            counts[name] = counts.get(name, 0) + len(rows)

    hooks = [
        block.get_submodule(name).register_forward_pre_hook(lambda _, inputs, name=name: watch(name, inputs[0]))
        for name in names
    ]
    try:
        with torch.inference_mode(), quiet():
            for states, (rest, others) in zip(hidden.states, hidden.others, strict=True):
                block(states, *rest, **others)
                seen.clear()
    finally:
        for hook in hooks:
            hook.remove()
    missing = [name for name in names if name not in first_of]
    if missing:
        raise LlmosError(f"layer {missing[0]} gets no input of its own", hint="use --method search")
    return {name: sums[first_of[name]] / counts[first_of[name]] for name in names}


def _advance(block: nn.Module, hidden: _Hidden) -> None:
    with torch.inference_mode(), quiet():
        for at, (states, (rest, others)) in enumerate(zip(hidden.states, hidden.others, strict=True)):
            made = block(states, *rest, **others)
            hidden.states[at] = made[0] if isinstance(made, tuple) else made


def _weight(block: nn.Module, name: str, item: Quantized) -> torch.Tensor:
    weight = block.get_parameter(name + WEIGHT).detach()
    return weight.t().contiguous() if item.transposed else weight


def _put(block: nn.Module, items: Mapping[str, Quantized], found: Mapping[str, Grid | None]) -> None:
    """Let the block compute with the weights that a reader will see."""
    for name, item in items.items():
        made = found[name]
        assert made is not None
        weight = grid.dequantize(made, item.form.group)
        with torch.no_grad():
            block.get_parameter(name + WEIGHT).copy_(weight.t() if item.transposed else weight)
