"""Quantized weights found by what the layers of a model really get as input, block by block.

The rows of a dataset go through the model one block of layers after the other: first with the weights as they are, to
see the inputs of every linear layer, then with the weights as they have become, so that a block is calibrated on what
the quantized blocks before it give. Memory: one block in float32, its largest input statistics, and the rows' hidden
states. Every finished block is an object of its own, found again by its recipe: a run that was killed goes on after the
last one.

| method | for | what is found |
|---|---|---|
| gptq | int4 | values that make up for each other's errors |
| awq | int4 | factors of features (folds.py), then the scales that lose least |
| smooth | w8a8 | factors of features |
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from torch import nn

from llmos_cli.errors import Damaged, UsageError
from llmos_cli.formats.manifest import FileEntry, Manifest, Recipe
from llmos_cli.formats.safetensors import TensorInfo
from llmos_cli.models.quantized import WEIGHT, quantize_rows
from llmos_cli.models.weights import TORCH_DTYPES, read_tensor, tensor_source
from llmos_cli.progress import Progress
from llmos_cli.quantize import folds, grid
from llmos_cli.quantize.blocks import (
    Blocks,
    Hidden,
    advance,
    begin_with,
    inputs_of,
    load_block,
    open_blocks,
    run_block,
)
from llmos_cli.quantize.folds import Inputs
from llmos_cli.quantize.grid import Grid
from llmos_cli.quantize.plan import Quantized, QuantizePlan
from llmos_cli.store.inspect.tensors import tensor_table
from llmos_cli.store.leases import hold
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import open_file, read_manifest
from llmos_cli.store.refs.recipes import find_made
from llmos_cli.store.transaction import begin

MIN_TOKENS: Final = 1024  # fewer say too little of what a layer gets
VALUES: Final = ".values"
SCALES: Final = ".scales"
FACTOR: Final = ".factor"
_FILE: Final = "block.safetensors"

Made = dict[str, torch.Tensor]
"""What was found for a block: by the names of stored tensors and VALUES, SCALES or FACTOR."""


@dataclass(frozen=True)
class Calibrated:
    """What was found for all blocks, and where it lies."""

    store: Store
    found: Mapping[str, tuple[FileEntry, TensorInfo]]

    def grid(self, name: str) -> Grid | None:
        """The values of a stored tensor."""
        if name + VALUES not in self.found:
            return None
        return Grid(self.read(name + VALUES), self.read(name + SCALES))

    def factor(self, name: str) -> torch.Tensor | None:
        """What the columns of a stored matrix are to be multiplied by, or a norm's weights divided by."""
        return self.read(name + FACTOR) if name + FACTOR in self.found else None

    def read(self, name: str) -> torch.Tensor:
        entry, info = self.found[name]
        return read_tensor(open_file(self.store, entry), info)


@contextmanager
def calibrated(
    store: Store,
    source: Manifest,
    plan: QuantizePlan,
    method: str,
    rows: np.ndarray,
    recipe: Recipe,
    *,
    progress: Progress,
) -> Iterator[Calibrated]:
    """Calibrate the weights in the model's blocks on `rows`, [rows, tokens] of token ids.

    Raises UsageError if there are too few tokens, LlmosError for a model without blocks that follow one another.
    Inside the context gc leaves what was found alone.
    """
    if rows.size < MIN_TOKENS:
        raise UsageError(
            f"calibration needs at least {MIN_TOKENS:,} tokens, the dataset gives {rows.size:,}",
            hint="name a larger dataset with --data, or use --method search or rtn",
        )
    blocks = open_blocks(store, source)
    by_block = _by_block(plan, blocks)
    found: dict[str, tuple[FileEntry, TensorInfo]] = {}
    with ExitStack() as stack, progress.task("calibrating", total=blocks.count, unit="blocks") as task:
        hidden: Hidden | None = None
        for number in range(blocks.count):
            step = replace(recipe, command="quantize-block", params={**recipe.params, "block": number})
            made = find_made(store, step)
            if made is None:
                hidden = hidden or _resumed(store, blocks, by_block, rows, Calibrated(store, found), number)
                values = _one_block(store, blocks, hidden, number, by_block[number], method)
                with begin(store, purpose="quantize") as tx:
                    entry = tx.add_tensors(_FILE, [tensor_source(name, values[name]) for name in sorted(values)])
                    made = tx.commit(Manifest("files", (entry,), {"block": number}, step), message="quantize").id
            else:
                hidden = None
            stack.enter_context(hold(store, "quantize", [made]))
            found |= tensor_table(store, read_manifest(store, made))
            task.advance(1)
        yield Calibrated(store, found)


def _by_block(plan: QuantizePlan, blocks: Blocks) -> list[dict[str, Quantized]]:
    """For each block, its weights of the form that was asked for, by their layers' names within the block."""
    found: list[dict[str, Quantized]] = [{} for _ in range(blocks.count)]
    for item in plan.quantized.values():
        head, _, rest = item.module.removeprefix(f"{blocks.prefix}.").partition(".")
        if (item.form.packed or item.form.dynamic) and item.module.startswith(f"{blocks.prefix}.") and head.isdigit():
            found[int(head)][rest] = item
    return found


def _resumed(
    store: Store,
    blocks: Blocks,
    by_block: list[dict[str, Quantized]],
    rows: np.ndarray,
    known: Calibrated,
    number: int,
) -> Hidden:
    """What goes into block `number`, through the quantized blocks before it."""
    hidden = begin_with(blocks, rows)
    for before in range(number):
        load_block(store, blocks, before)
        stored = _stored_names(blocks, before, by_block[before])
        suffixes = (VALUES, SCALES, FACTOR)
        names = [name + suffix for name in stored.values() for suffix in suffixes if name + suffix in known.found]
        _put(blocks.block, by_block[before], stored, {name: known.read(name) for name in names})
        advance(blocks.block, hidden)
    return hidden


def _stored_names(blocks: Blocks, number: int, items: Mapping[str, Quantized]) -> dict[str, str]:
    """What the parameters of a block are called where they are stored."""
    names = {name: blocks.stored(number, name) or name for name, _ in blocks.block.named_parameters()}
    return names | {name + WEIGHT: item.info.name for name, item in items.items()}


def _one_block(
    store: Store,
    blocks: Blocks,
    hidden: Hidden,
    number: int,
    items: Mapping[str, Quantized],
    method: str,
) -> Made:
    """Calibrate a block and move the hidden states through it."""
    load_block(store, blocks, number)
    stored = _stored_names(blocks, number, items)
    weights = {name: _weight(blocks.block, name, item) for name, item in items.items()}
    for name, weight in weights.items():
        if not bool(torch.isfinite(weight).all()):
            raise Damaged(
                f"tensor {stored[name + WEIGHT]!r} holds a value that is not a finite number",
                hint="the model diverged or was damaged before it was added; use an earlier checkpoint",
            )
    inputs = inputs_of(blocks.block, hidden, list(items))
    made: Made = {}
    if method != "gptq":
        made |= _factors(blocks.block, hidden, weights, inputs, items, stored, method)
    for name, item in items.items():
        if item.form.packed:
            found = _grid(weights[name], inputs[name], item, made.get(item.info.name + FACTOR), method)
            made |= {item.info.name + VALUES: found.values, item.info.name + SCALES: found.scale}
    _put(blocks.block, items, stored, made)
    advance(blocks.block, hidden)
    return made


def _factors(
    block: nn.Module,
    hidden: Hidden,
    weights: folds.Weights,
    inputs: Mapping[str, Inputs],
    items: Mapping[str, Quantized],
    stored: Mapping[str, str],
    method: str,
) -> Made:
    made: Made = {}
    for fold in folds.find_folds(block, lambda: run_block(block, hidden), list(items)):
        read = {name: weights[name] for name in fold.layers}
        first = items[fold.layers[0]]
        if method == "awq":
            factor = folds.awq_factor(read, inputs[fold.layers[0]], first.form.group, _kept(first))
        else:
            factor = folds.smooth_factor(read, inputs[fold.layers[0]])
        if factor is not None:
            norm = block.get_parameter(fold.norm + WEIGHT).detach()
            factor = folds.exact(factor, norm, TORCH_DTYPES[first.info.dtype])
            made |= {items[name].info.name + FACTOR: factor for name in fold.layers}
            made |= {
                stored[name] + FACTOR: factor
                for name in (f"{fold.norm}{WEIGHT}", f"{fold.norm}.bias")
                if name in stored
            }
    return made


def _grid(weight: torch.Tensor, inputs: Inputs, item: Quantized, factor: torch.Tensor | None, method: str) -> Grid:
    if method == "gptq":
        return grid.gptq(weight, item.form.group, _kept(item), inputs.second)
    importance = inputs.second.diagonal()
    if factor is None:
        return grid.search(weight, item.form.group, _kept(item), importance)
    return grid.search(weight * factor, item.form.group, _kept(item), importance / factor.square())


def _kept(item: Quantized) -> torch.dtype:
    return TORCH_DTYPES[item.scale_dtype]


def _weight(block: nn.Module, name: str, item: Quantized) -> torch.Tensor:
    weight = block.get_parameter(name + WEIGHT).detach()
    return weight.t().contiguous() if item.transposed else weight


def _put(block: nn.Module, items: Mapping[str, Quantized], stored: Mapping[str, str], made: Made) -> None:
    """Let the block compute with the weights that a reader will see."""
    layers = {name + WEIGHT: item for name, item in items.items()}
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            factor = made.get(stored[name] + FACTOR)
            item = layers.get(name)
            if item is None:
                if factor is not None:
                    parameter.div_(factor)
                continue
            if stored[name] + VALUES in made:
                weight = grid.dequantize(
                    Grid(made[stored[name] + VALUES], made[stored[name] + SCALES]), item.form.group
                )
            else:
                plain = _weight(block, name.removesuffix(WEIGHT), item)
                weight = torch.mul(*quantize_rows(plain if factor is None else plain * factor))
            parameter.copy_(weight.t() if item.transposed else weight)
