"""Linear layers as functions: weights of one form laid together, each with the kernel that is fastest here.

Which that is depends on the processor, so it is measured at the start (`choose`) and can be told. Weight-only kernels
compute with the stored values; `dynamic` also rounds what goes in, token by token, to the 8 bits (7 without VNNI, whose
predecessor's sums overflow) that integer instructions take.
"""

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional

from llmos_cli.models.quantized import Int4Linear, Int8Linear, quantize_rows, unpack_nibbles

Linear = Callable[[torch.Tensor], torch.Tensor]
"""[rows, in] to [rows, out], both of the dtype that is computed in."""

DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16}
KINDS: Final = ("dynamic", "packed", "dense")
_TRIED: Final = KINDS[:2]  # dense takes four bytes a weight: it is for what else cannot be computed
_ROWS: Final = (1, 16)  # an answer for one client, and for many
_TRIES: Final = 9
_PACKED_MULTIPLE: Final = 16
_GROUPS: Final = (32, 64, 128, 256)


@dataclass(frozen=True)
class Kernels:
    """The dtype of activations, and the kernel for weights of each form."""

    dtype: str = "fp32"
    int8: str = "packed"
    int4: str = "packed"

    @property
    def compute(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def names(self) -> dict[str, str]:
        return asdict(self)


def fuse(modules: Sequence[nn.Module], kernels: Kernels, *, keep: bool = False) -> Linear:
    """One function for modules that take the same input, their outputs side by side.

    The modules lose their weights unless `keep`: laid together they would be in memory twice.
    """
    first = modules[0]
    if all(type(module) is nn.Linear for module in modules):
        built = _dense(modules, kernels)
    elif all(type(module) is Int8Linear for module in modules) and _on_cpu(first):
        built = _int8(modules, kernels)
    elif all(type(module) is Int4Linear for module in modules) and _on_cpu(first) and _same_groups(modules):
        built = _int4(modules, kernels)
    else:
        return _side_by_side(modules)
    if not keep:
        for module in modules:
            for name, parameter in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if parameter.dim() > 1 or name == "bias":
                    module._parameters.pop(name, None)
                    module._buffers.pop(name, None)
    return built


def choose(shape: tuple[int, int], *, forms: Iterable[str], dtype: torch.dtype) -> Kernels:
    """The fastest kernels for a layer of [out, in] weights of these forms ("dense", "int8", "int4"), by trying them.

    Weights that are stored in bfloat16 are computed in float32 where the processor is slow with them.
    """
    forms, columns = set(forms), shape[1]
    found = {"dtype": "fp32"}
    if "dense" in forms and dtype == torch.bfloat16:
        found["dtype"] = _fastest({name: _dense_trial(shape, DTYPES[name]) for name in DTYPES}, columns)
    if "int8" in forms:
        found["int8"] = _fastest({name: _trial(shape, Kernels(int8=name)) for name in _TRIED}, columns)
    if "int4" in forms:
        found["int4"] = _fastest({name: _trial(shape, Kernels(int4=name), four=True) for name in _TRIED}, columns)
    return Kernels(**found)


def has_vnni() -> bool:
    """Whether products of 8-bit integers are summed without overflow by one instruction."""
    check = getattr(torch.cpu, "_is_vnni_supported", None)
    return bool(check and check())


def _dense(modules: Sequence[Any], kernels: Kernels) -> Linear:
    weight = torch.cat([m.weight for m in modules]) if len(modules) > 1 else modules[0].weight
    weight = weight.detach().to(kernels.compute)
    bias = _biases(modules, kernels.compute)
    return lambda x: functional.linear(x, weight, bias)


def _int8(modules: Sequence[Any], kernels: Kernels) -> Linear:
    weight = torch.cat([m.weight for m in modules]) if len(modules) > 1 else modules[0].weight
    weight = weight.detach().contiguous()
    scale = torch.cat([m.weight_scale for m in modules]).view(-1).float()
    bias = _biases(modules, torch.float32)
    name, dtype = kernels.int8, kernels.compute
    if name == "dynamic":
        return _dynamic(weight, scale, bias, dtype)
    if name == "packed" and weight.shape[1] % _PACKED_MULTIPLE == 0:
        return _packed_int8(weight, scale, bias, dtype)
    dense = (weight.float() * scale.unsqueeze(1)).to(dtype)
    narrow = None if bias is None else bias.to(dtype)
    return lambda x: functional.linear(x, dense, narrow)


def _packed_int8(weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> Linear:
    # The kernel takes bfloat16 scales, which would cost 0.2 % a row: it gets ones, the float32 scale follows.
    ones = torch.ones(len(scale), dtype=torch.bfloat16)
    weight = weight if weight.data_ptr() % 64 == 0 else weight.clone()  # which it loads by aligned instructions

    def linear(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops.aten._weight_int8pack_mm(x.to(torch.bfloat16), weight, ones) * scale
        return (y if bias is None else y + bias).to(dtype)

    return linear


def _dynamic(weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> Linear:
    """Integer products: each row is brought to a largest value of 1 first, so that one scale for all of them is a scale
    for each."""
    narrow = not has_vnni()
    zeros = torch.zeros(len(scale), dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that torch will drop such tensors one day: then it is not chosen
        stored = torch._make_per_channel_quantized_tensor(weight, scale.double(), zeros, 0)
    packed = torch.ops.quantized.linear_prepack(stored, None)
    run = torch.ops.quantized.linear_dynamic

    def linear(x: torch.Tensor) -> torch.Tensor:
        x = x.float()
        y: torch.Tensor
        if len(x) == 1:
            y = run(x, packed, narrow)
        else:
            largest = x.abs().amax(1, keepdim=True).clamp_min_(1e-30)
            y = run(x / largest, packed, narrow).mul_(largest)
        return (y if bias is None else y.add_(bias)).to(dtype)

    return linear


def _int4(modules: Sequence[Any], kernels: Kernels) -> Linear:
    group, dtype = modules[0].group, kernels.compute
    packed = torch.cat([m.weight_packed for m in modules]) if len(modules) > 1 else modules[0].weight_packed
    scale = torch.cat([m.weight_scale for m in modules]).float()
    bias = _biases(modules, torch.float32)
    rows, columns = packed.shape[0], modules[0].in_features
    nibbles = unpack_nibbles(packed.detach())
    if kernels.int4 == "packed" and rows % 16 == 0 and group in _GROUPS and columns % group == 0:
        words = torch.ops.aten._convert_weight_to_int4pack_for_cpu((nibbles + 8).int(), 1)
        table = torch.stack((scale.t(), torch.zeros_like(scale.t())), dim=-1).to(torch.bfloat16).contiguous()

        def linear(x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x.to(torch.bfloat16), words, group, table)
            return (y if bias is None else y + bias).to(dtype)

        return linear
    dense = (nibbles.view(rows, -1, group).float() * scale.unsqueeze(-1)).view(rows, columns).to(dtype)
    if kernels.int4 == "dynamic":
        # the finer grid of eight bits a row adds a twentieth of the error that four bits made
        weight, scales = quantize_rows(dense)
        return _dynamic(weight, scales.view(-1), bias, dtype)
    narrow = None if bias is None else bias.to(dtype)
    return lambda x: functional.linear(x, dense, narrow)


def _side_by_side(modules: Sequence[nn.Module]) -> Linear:
    if len(modules) == 1:
        return modules[0]
    return lambda x: torch.cat([module(x) for module in modules], dim=-1)


def _biases(modules: Sequence[Any], dtype: torch.dtype) -> torch.Tensor | None:
    if all(module.bias is None for module in modules):
        return None
    sizes = [module.out_features for module in modules]
    parts = [
        torch.zeros(size, dtype=dtype) if module.bias is None else module.bias.detach().to(dtype)
        for module, size in zip(modules, sizes, strict=True)
    ]
    device = next(module.bias.device for module in modules if module.bias is not None)
    return torch.cat([part.to(device) for part in parts])


def _on_cpu(module: Any) -> bool:
    return bool(module.weight_scale.device.type == "cpu")


def _same_groups(modules: Sequence[Any]) -> bool:
    return len({module.group for module in modules}) == 1


def _dense_trial(shape: tuple[int, int], dtype: torch.dtype) -> Linear:
    weight = torch.zeros(shape, dtype=dtype)
    return lambda x: functional.linear(x.to(dtype), weight)


def _trial(shape: tuple[int, int], kernels: Kernels, *, four: bool = False) -> Linear | None:
    rows, columns = shape
    module: nn.Module
    if four:
        if columns % _GROUPS[0]:
            return None
        module = Int4Linear(columns, rows, group=_GROUPS[0], bias=False, dtype=torch.float32)
    else:
        module = Int8Linear(columns, rows, bias=False, dtype=torch.float32)
    try:
        return fuse([module], kernels)
    except (RuntimeError, AttributeError, NotImplementedError):
        return None  # a torch without it


def _fastest(trials: dict[str, Linear | None], columns: int) -> str:
    """By the product of the times for one row and for many, of those that run; "dense" if none does.

    They run in turns, and the least time counts: something else may be using the processor.
    """
    runs = {name: linear for name, linear in trials.items() if linear is not None}
    costs = dict.fromkeys(runs, 1.0)
    with torch.inference_mode():
        for rows in _ROWS:
            x = torch.rand((rows, columns))
            least = dict.fromkeys(runs, float("inf"))
            for _ in range(_TRIES):
                for name, linear in runs.items():
                    started = time.perf_counter()
                    linear(x)
                    least[name] = min(least[name], time.perf_counter() - started)
            costs = {name: cost * least[name] for name, cost in costs.items()}
    return min(costs, key=lambda name: costs[name]) if costs else "dense"
