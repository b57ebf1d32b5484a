"""Which layers of a model get few bits and which more, so that a size is met and as little as possible is lost.

For each layer and each form it might take, the error that the form makes in what the layer gives is measured, as a
share of that: by the size of the layer's real inputs where there is a dataset, else as if all were alike. Then bytes go
where each buys most, beginning with the smallest form everywhere.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from llmos_cli.errors import UsageError
from llmos_cli.formats.manifest import Manifest
from llmos_cli.formats.safetensors import TensorInfo
from llmos_cli.models.quantized import quantize_rows
from llmos_cli.models.schemes import GROUPS, INT8, Form, int4
from llmos_cli.models.weights import TORCH_DTYPES, read_tensor
from llmos_cli.progress import Progress
from llmos_cli.quantize import grid
from llmos_cli.quantize.blocks import advance, begin_with, inputs_of, load_block, open_blocks
from llmos_cli.quantize.plan import Quantized, QuantizePlan
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import open_file

FORMS: Final = (*(int4(group) for group in sorted(GROUPS, reverse=True)), INT8)
_SAMPLE: Final = 256  # rows of a weight to measure on
_PARTS: Final = 16  # taken in runs


@dataclass(frozen=True)
class Option:
    """A form for a layer: its bytes, and its error as a share of what the layer gives."""

    form: Form
    nbytes: int
    error: float


def choose(
    store: Store,
    source: Manifest,
    plan: QuantizePlan,
    bits: float,
    rows: np.ndarray | None,
    *,
    progress: Progress,
) -> dict[str, Form]:
    """The form of each layer, by the module's name, for a model of at most `bits` bits a weight; `plan` has four bits
    everywhere. Raises UsageError, with the bounds, for a size that cannot be met."""
    layers = [item for item in plan.quantized.values() if item.inner]
    least = {item.module: _smallest(item) for item in layers}
    fixed = plan.bytes_after - sum(item.nbytes for item in layers)
    room = int(bits * plan.parameters / 8) - fixed
    if room < sum(item.nbytes_as(least[item.module]) for item in layers):
        smallest = 8 * (fixed + sum(item.nbytes_as(least[item.module]) for item in layers)) / plan.parameters
        raise UsageError(
            f"--bits {bits:g} cannot be met: with four bits in every layer the model has {smallest:.2f} bits a weight",
            hint=f"ask for more: --bits {smallest + 0.1:.1f}",
        )
    with progress.task("measuring layers", total=len(layers), unit="layers") as task:
        options = {}
        for item, importance in _importances(store, source, layers, rows, progress):
            options[item.module] = _options(store, item, importance)
            task.advance(1)
    return {name: option.form for name, option in spend(options, room).items()}


def spend(options: Mapping[str, Sequence[Option]], room: int) -> dict[str, Option]:
    """Take the smallest option of each layer, then, while there is room, what lowers the sum of errors most for its
    bytes. Ties go by name."""
    taken = {name: min(offered, key=lambda option: option.nbytes) for name, offered in options.items()}
    room -= sum(option.nbytes for option in taken.values())

    def steps() -> Iterator[tuple[float, str, Option]]:
        for name, offered in sorted(options.items()):
            for option in offered:
                more, gain = option.nbytes - taken[name].nbytes, taken[name].error - option.error
                if 0 < more <= room and gain > 0:
                    yield gain / more, name, option

    while best := max(steps(), key=lambda step: step[0], default=None):
        _, name, option = best
        room -= option.nbytes - taken[name].nbytes
        taken[name] = option
    return taken


def _smallest(item: Quantized) -> Form:
    return next(form for form in FORMS if not form.group or item.columns % form.group == 0)


def _importances(
    store: Store, source: Manifest, layers: Sequence[Quantized], rows: np.ndarray | None, progress: Progress
) -> Iterator[tuple[Quantized, torch.Tensor]]:
    """Each layer and the mean square of what it gets in each column."""
    if rows is None:
        yield from ((item, torch.ones(item.columns)) for item in layers)
        return
    blocks = open_blocks(store, source)
    hidden = begin_with(blocks, rows)
    for number in range(blocks.count):
        start = f"{blocks.prefix}.{number}."
        mine = {item.module.removeprefix(start): item for item in layers if item.module.startswith(start)}
        load_block(store, blocks, number)
        inputs = inputs_of(blocks.block, hidden, list(mine))
        advance(blocks.block, hidden)
        yield from ((item, inputs[name].second.diagonal()) for name, item in mine.items())
    outside = [item for item in layers if not item.module.startswith(f"{blocks.prefix}.")]
    yield from ((item, torch.ones(item.columns)) for item in outside)


def _options(store: Store, item: Quantized, importance: torch.Tensor) -> list[Option]:
    weight = _sampled(store, item)
    whole = float((weight.square() * importance).sum()) or 1.0
    kept = torch.float16 if item.info.dtype == "F16" else torch.bfloat16

    def error(made: torch.Tensor) -> float:
        return float(((made - weight).square() * importance).sum()) / whole

    return [
        Option(form, item.nbytes_as(form), error(_rounded(weight, form, kept, importance)))
        for form in FORMS
        if not form.group or item.columns % form.group == 0
    ]


def _rounded(weight: torch.Tensor, form: Form, kept: torch.dtype, importance: torch.Tensor) -> torch.Tensor:
    if not form.group:
        return torch.mul(*quantize_rows(weight))
    return grid.dequantize(grid.search(weight, form.group, kept, importance), form.group)


def _sampled(store: Store, item: Quantized) -> torch.Tensor:
    """Rows of a weight in float32, in runs from all over it."""
    reader, info = open_file(store, item.entry), item.info
    if item.transposed:
        return read_tensor(reader, info).t()[:: max(1, item.rows // _SAMPLE)].float()
    row = item.columns * TORCH_DTYPES[info.dtype].itemsize
    count = min(item.rows, _SAMPLE // _PARTS)
    firsts = sorted({part * (item.rows - count) // max(1, _PARTS - 1) for part in range(_PARTS)})

    def run(first: int) -> torch.Tensor:
        start = info.start + first * row
        return read_tensor(
            reader, TensorInfo(info.name, info.dtype, (count, item.columns), start, start + count * row)
        ).float()

    return torch.cat([run(first) for first in firsts])
