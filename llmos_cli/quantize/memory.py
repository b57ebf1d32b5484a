"""How much memory quantizing will take at its peak: an estimate from headers, told before the work begins."""

import resource
from typing import Final

import torch

from llmos_cli.errors import UsageError
from llmos_cli.formats.limits import MiB
from llmos_cli.quantize.blocks import HIDDEN_BYTES
from llmos_cli.quantize.plan import Quantized, QuantizePlan

_FLOAT: Final = 4
_WORKING: Final = 16 * MiB  # of a thread: a block of rows in float32, several times
_WRITING: Final = 96 * MiB  # chunks that are encoded and packed meanwhile
_COPIES: Final = 4  # of a matrix of products of inputs: the mean, its order, its inverse, a factor


def peak_bytes(plan: QuantizePlan, *, calibrated: bool) -> int:
    """What the process will hold: what it holds now, the largest tensor in its new form and, for a calibration, the
    model's largest block and its ends in float32 with what is known of their inputs."""
    now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    writing = _WRITING + torch.get_num_threads() * _WORKING + max(
        [_held(item) for item in plan.quantized.values()]
        + [info.end - info.start for _, info in plan.kept.values()],
        default=0,
    )  # fmt: skip
    if not calibrated:
        return now + writing
    ends = sum(item.rows * item.columns for item in plan.quantized.values() if not item.inner)
    blocks: dict[str, list[Quantized]] = {}
    for item in plan.quantized.values():
        if item.inner:
            number = next((part for part in item.module.split(".") if part.isdigit()), "")
            blocks.setdefault(number, []).append(item)
    block = max((sum(item.rows * item.columns for item in items) for items in blocks.values()), default=0)
    widths = [item.columns for items in list(blocks.values())[:1] for item in items]
    inputs = sum(width**2 for width in widths) + (_COPIES + 1) * max(widths, default=0) ** 2
    return now + max(writing, 2 * HIDDEN_BYTES + _FLOAT * (ends + 2 * block + inputs))


def check_memory(needed: int, most: int | None) -> None:
    """Raise UsageError if that is more than was allowed."""
    if most is not None and needed > most:
        raise UsageError(
            f"this takes about {needed / 1e6:,.0f} MB of memory, --max-memory allows {most / 1e6:,.0f} MB",
            hint="search, hqq and rtn hold one tensor at a time: --method search",
        )


def _held(item: Quantized) -> int:
    """Bytes of one tensor while it is quantized; one that lies as [in, out] is read whole, and values are packed."""
    stored = item.info.end - item.info.start
    return item.nbytes * (2 if item.form.packed else 1) + (stored if item.transposed else 0)
