"""The one place that builds an `Accelerator`: which device, which precision, nothing else delegated.

Checkpoints, data order, random state and loss normalisation stay ours; accelerate places, casts and clips.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedDataParallelKwargs

from llmos_cli.errors import UsageError

_MIXED = {"fp32": "no", "bf16": "bf16"}


@contextmanager
def open_accelerator(precision: str, ranks: int = 1) -> Iterator[Accelerator]:
    """An Accelerator for one run of so many ranks, which have joined. Its state is process-wide, so it is cleared
    before and after: runs do not mix."""
    cuda = torch.cuda.is_available()
    if precision == "bf16" and cuda and not torch.cuda.is_bf16_supported():
        raise UsageError(f"{torch.cuda.get_device_name()} has no bf16", hint="use --precision fp32")
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    _forget()
    try:
        # Without cpu=True a machine without a GPU would train every process of a launcher alone, in silence.
        shared = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
        built = Accelerator(mixed_precision=_MIXED[precision], cpu=not cuda, kwargs_handlers=[shared])
        if built.num_processes != ranks:
            raise UsageError(
                f"{built.num_processes} processes were launched where {ranks} should train",
                hint="start llmos without a launcher: llmos train ... --procs N",
            )
        # A launcher's environment may set this; accumulation is ours, and backward() would divide twice.
        built.gradient_accumulation_steps = 1
        with _deterministic(cuda=cuda):
            yield built
        built.free_memory()
    finally:
        _forget()


@contextmanager
def _deterministic(*, cuda: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    switches: Any = torch.utils.deterministic
    fill = switches.fill_uninitialized_memory
    # On CUDA cuBLAS wants its workspace set before the process starts and would fail instead of computing.
    torch.use_deterministic_algorithms(True, warn_only=cuda)
    switches.fill_uninitialized_memory = False  # a twentieth of a step, to find bugs that are not ours
    try:
        yield
    finally:
        switches.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _forget() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def describe(device: torch.device) -> str:
    """The device in words: "cpu, 2 threads" or the card's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type}, {threads} thread{'s' if threads != 1 else ''}"


def is_slow(device: torch.device, precision: str) -> bool:
    """Whether the device has to emulate this precision."""
    if device.type != "cpu" or precision != "bf16":
        return False
    known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return known.get("architecture") == "x86_64" and not (known.get("avx512_bf16") or known.get("amx_bf16"))
