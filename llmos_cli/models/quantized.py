"""Modules that compute with quantized weights without unpacking the model, and putting them where a scheme says.

How the weights lie in files is in schemes.py.
"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmos_cli.models.schemes import CONV1D, Form, read_scheme

SCALE: Final = ".weight_scale"
WEIGHT: Final = ".weight"
PACKED: Final = ".weight_packed"
SHAPE: Final = ".weight_shape"
QUANTIZABLE: Final = {nn.Linear: "Linear", nn.Embedding: "Embedding", Conv1D: CONV1D}
FP8_DTYPE: Final = torch.float8_e4m3fn
FP8_MAX: Final = 448.0
_LEVELS: Final = 127
_NIBBLES: Final = 8  # in a 32-bit word
_ZERO: Final = 8  # the nibble that stands for 0
_PACKED_MULTIPLE: Final = 16  # columns the CPU kernel reads at a time
_ALIGNMENT: Final = 64


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 [rows, columns], float32 scales [rows, 1]): scale = absmax / 127 of the row, 1 for a row of zeros.

    A row that holds a NaN or an infinity has a scale that is not finite either.
    """
    values = weight.to(torch.float32, copy=True)
    scale = values.abs().amax(1, keepdim=True) / _LEVELS  # a tenth of the time that a norm takes
    # A row so small that its scale is zero or subnormal is a row of zeros for any dtype a model computes in.
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)
    return values.div_(scale).round_().clamp_(-_LEVELS, _LEVELS).to(torch.int8), scale


def quantize_rows_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(float8 [rows, columns], float32 scales [rows, 1]): scale = absmax / 448 of the row, 1 for a row of zeros."""
    values = weight.to(torch.float32, copy=True)
    scale = values.abs().amax(1, keepdim=True) / FP8_MAX
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)
    return values.div_(scale).clamp_(-FP8_MAX, FP8_MAX).to(FP8_DTYPE), scale


def pack_nibbles(values: torch.Tensor) -> torch.Tensor:
    """Int8 values of -8 to 7, [rows, columns], as int32 words of eight, [rows, columns / 8], the first in the lowest
    bits."""
    rows, columns = values.shape
    nibbles = (values + _ZERO).contiguous().view(torch.uint8).view(rows, columns // 2, 2)
    return (nibbles[..., 0] | (nibbles[..., 1] << 4)).view(torch.int32)  # the machine's own words are little-endian


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_nibbles`, as int8."""
    pairs = packed.contiguous().view(torch.uint8).view(packed.shape[0], -1, 1)
    nibbles = torch.cat((pairs & 15, pairs >> 4), dim=2).view(packed.shape[0], -1)
    return nibbles.view(torch.int8) - _ZERO


class Int8Linear(nn.Module):
    """A linear layer with int8 weights: y = (x @ weight.T) * scale + bias.

    The int8 values are exact in every floating dtype, so the only rounding beyond that of an ordinary layer is the one
    of the product to x's dtype before the float32 scale is applied. float16 applies the scale first: products with
    unscaled int8 values could leave its range.
    """

    weight_scale: torch.Tensor

    def __init__(self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.zeros(out_features, in_features, dtype=torch.int8), requires_grad=False)
        self.register_buffer("weight_scale", torch.ones(out_features, 1, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype), requires_grad=False) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)
        if x.dtype == torch.float16:
            y = functional.linear(rows, (self.weight * self.weight_scale).to(x.dtype))
        else:
            product = self._packed(rows) if self._can_pack(x) else functional.linear(rows, self.weight.to(x.dtype))
            y = (product * self.weight_scale.view(-1)).to(x.dtype)
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _can_pack(self, x: torch.Tensor) -> bool:
        return (
            x.dtype == torch.bfloat16
            and x.device.type == "cpu"
            and self.in_features % _PACKED_MULTIPLE == 0
            and self.weight.data_ptr() % _ALIGNMENT == 0
            and x.numel() > 0
        )

    def _packed(self, rows: torch.Tensor) -> torch.Tensor:
        # The kernel takes bfloat16 scales, which would cost 0.2 % a row: it gets ones, the float32 scale follows.
        ones = torch.ones(self.out_features, dtype=rows.dtype)
        product: torch.Tensor = torch.ops.aten._weight_int8pack_mm(rows.contiguous(), self.weight, ones)
        return product


class Int4Linear(nn.Module):
    """A linear layer with int4 weights in groups: y = x @ ((nibbles - 8) * scale).T + bias.

    The weight is unpacked for each call; serving has kernels that need not.
    """

    weight_packed: nn.Parameter
    weight_scale: torch.Tensor
    weight_shape: torch.Tensor

    def __init__(self, in_features: int, out_features: int, *, group: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features, self.group, self.dtype = in_features, out_features, group, dtype
        packed = torch.zeros(out_features, in_features // _NIBBLES, dtype=torch.int32)
        self.weight_packed = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("weight_scale", torch.ones(out_features, in_features // group, dtype=dtype))
        self.register_buffer("weight_shape", torch.tensor([out_features, in_features]))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype), requires_grad=False) if bias else None

    @property
    def weight(self) -> torch.Tensor:
        """Nothing: for classes that start the weights of the layers below them before theirs are loaded."""
        return torch.empty(0)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight as [out, in]."""
        values = unpack_nibbles(self.weight_packed).view(self.out_features, -1, self.group)
        return (values.to(dtype) * self.weight_scale.to(dtype).unsqueeze(-1)).view(self.out_features, self.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.dense(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, group={self.group}"


class DynamicLinear(nn.Module):
    """A linear layer whose weights have 8 bits, integers or floats, and whose input is quantized token by token:
    y = (quantized x @ weight.T) * scale of the token * scale of the row + bias.

    Products of int8 are exact in float32 for the widths of real layers up to a rounding of the sum; processors with
    integer instructions take them as they are.
    """

    weight_scale: torch.Tensor

    def __init__(self, in_features: int, out_features: int, *, kind: str, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        stored = torch.int8 if kind == "int" else FP8_DTYPE
        self.weight = nn.Parameter(torch.zeros(out_features, in_features, dtype=stored), requires_grad=False)
        self.register_buffer("weight_scale", torch.ones(out_features, 1, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype), requires_grad=False) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features).float()
        if self.weight.dtype == torch.int8:
            tokens, scale = quantize_rows(rows)
            # The kernel of CPUs has no smallest size; that of CUDA wants more than 16 rows.
            whole = x.device.type == "cpu" and x.numel() > 0
            product = (
                torch._int_mm(tokens, self.weight.t()).float() if whole else tokens.float() @ self.weight.float().t()
            )
        else:
            tokens, scale = quantize_rows_fp8(rows)
            product = tokens.float() @ self.weight.float().t()
        y = (product * scale * self.weight_scale.float().view(-1)).to(x.dtype)
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, weights={self.weight.dtype}"


class Int8Embedding(nn.Module):
    """An embedding with int8 rows: looked up, then scaled."""

    weight_scale: torch.Tensor

    def __init__(self, num_embeddings: int, embedding_dim: int, *, padding_idx: int | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        self.dtype = dtype
        weight = torch.zeros(num_embeddings, embedding_dim, dtype=torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("weight_scale", torch.ones(num_embeddings, 1, dtype=torch.float32))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = functional.embedding(ids, self.weight)
        return (rows * functional.embedding(ids, self.weight_scale)).to(self.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


def quantizable(model: PreTrainedModel) -> dict[str, str | None]:
    """Every module that might take the scheme, by name, with the reason why it cannot (None if it can)."""
    embedding = model.get_input_embeddings()
    reasons: dict[str, str | None] = {}
    for name, module in model.named_modules():
        if not isinstance(module, tuple(QUANTIZABLE)):
            continue
        if type(module) not in QUANTIZABLE:
            reasons[name] = f"its class {type(module).__name__} computes with the weight itself"
        elif isinstance(module, nn.Embedding) and module is not embedding:
            reasons[name] = "an embedding of positions, small and sensitive"
        else:
            reasons[name] = None
    for target, source in tied_modules(model):
        reason = reasons.get(target, "not a linear layer") or reasons.get(source, "not a linear layer")
        if reason is not None:
            for name in (target, source):
                if reasons.get(name, reason) is None:
                    reasons[name] = f"shares its weight with a layer that stays: {reason}"
    return reasons


def tied_modules(model: PreTrainedModel) -> list[tuple[str, str]]:
    """(target, source) names of modules whose weights are one."""
    pairs = (getattr(model, "all_tied_weights_keys", None) or {}).items()
    return [
        (target.removesuffix(WEIGHT), source.removesuffix(WEIGHT))
        for target, source in pairs
        if target.endswith(WEIGHT) and source.endswith(WEIGHT)
    ]


def prepare_quantized(model: PreTrainedModel, quantization_config: Mapping[str, Any]) -> None:
    """Put quantized modules in the place of those that the config names, before weights are loaded."""
    scheme = read_scheme(quantization_config)
    for name, reason in quantizable(model).items():
        module = model.get_submodule(name)
        form = scheme.form_of(name, QUANTIZABLE[type(module)]) if reason is None else None
        if form is not None:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, twin(module, form))


def twin(module: nn.Module, form: Form) -> nn.Module:
    """The module that computes what `module` does with weights of this form, yet to be loaded."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    dtype = weight.dtype
    with torch.device(weight.device):
        if isinstance(module, nn.Embedding):
            return Int8Embedding(*weight.shape, padding_idx=module.padding_idx, dtype=dtype)
        rows, columns = weight.shape if isinstance(module, nn.Linear) else weight.shape[::-1]
        bias = module.bias is not None
        if form.packed:
            return Int4Linear(columns, rows, group=form.group, bias=bias, dtype=dtype)
        if form.dynamic:
            return DynamicLinear(columns, rows, kind=form.kind, bias=bias, dtype=dtype)
        return Int8Linear(columns, rows, bias=bias, dtype=dtype)
