"""Int8 weights: one symmetric scale a row, and the modules that compute with them without unpacking the model.

In a file a quantized weight `X.weight` is I8 [rows, columns] beside `X.weight_scale` F32 [rows, 1]; the value is
weight * scale. config.json says so in the words of compressed-tensors ("int-quantized", 8 bits, by channel): `targets`
are module classes, `ignore` the modules of those classes that stay as they were. Tied modules share the weight and
have a scale tensor each, as readers of that vocabulary expect. One thing it has no word for stands under the key
"llmos": Conv1D weights, which their class keeps as [in, out], lie as [out, in] (`transposed`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmos_cli.errors import LlmosError

SCALE: Final = ".weight_scale"
WEIGHT: Final = ".weight"
_CONV1D: Final = "Conv1D"
QUANTIZABLE: Final = {nn.Linear: "Linear", nn.Embedding: "Embedding", Conv1D: _CONV1D}
_LEVELS: Final = 127
_PACKED_MULTIPLE: Final = 16  # columns the CPU kernel reads at a time
_ALIGNMENT: Final = 64
_FORMAT: Final = "int-quantized"
_WEIGHTS: Final = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}


@dataclass(frozen=True)
class Scheme:
    """Which modules of a model hold int8 weights: those of the classes `targets` but for the names in `ignore`."""

    targets: frozenset[str]
    ignore: frozenset[str]

    def config(self) -> dict[str, Any]:
        """The `quantization_config` that says it in config.json."""
        group = {"targets": sorted(self.targets), "weights": dict(_WEIGHTS), "format": _FORMAT}
        config: dict[str, Any] = {
            "quant_method": "compressed-tensors",
            "format": _FORMAT,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": sorted(self.ignore),
        }
        if _CONV1D in self.targets:
            config["llmos"] = {"transposed": [_CONV1D]}
        return config


def read_scheme(quantization: Any) -> Scheme:
    """Read a `quantization_config`; raises LlmosError for every scheme but ours."""
    try:
        targets, ignore = quantization["config_groups"]["group_0"]["targets"], quantization["ignore"]
        scheme = Scheme(frozenset(targets), frozenset(ignore))
        if quantization == scheme.config() and scheme.targets <= set(QUANTIZABLE.values()):
            return scheme
    except (TypeError, KeyError):
        pass
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    raise LlmosError(
        f"the model is quantized in a way that llmos cannot run ({str(method)[:40]})",
        hint="take the unquantized model and run llmos quantize REF NAME --scheme int8",
    )


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 [rows, columns], float32 scales [rows, 1]): scale = absmax / 127 of the row, 1 for a row of zeros.

    A row that holds a NaN or an infinity has a scale that is not finite either.
    """
    values = weight.to(torch.float32, copy=True)
    scale = torch.linalg.vector_norm(values, ord=torch.inf, dim=1, keepdim=True) / _LEVELS
    # A row so small that its scale is zero or subnormal is a row of zeros for any dtype a model computes in.
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)
    return values.div_(scale).round_().clamp_(-_LEVELS, _LEVELS).to(torch.int8), scale


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
    """Put int8 modules in the place of those that the config names, before weights are loaded."""
    scheme = read_scheme(quantization_config)
    for name, reason in quantizable(model).items():
        module = model.get_submodule(name)
        if reason is None and name not in scheme.ignore and QUANTIZABLE[type(module)] in scheme.targets:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, _int8_twin(module))


def _int8_twin(module: nn.Module) -> nn.Module:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    with torch.device(weight.device):
        if isinstance(module, nn.Embedding):
            return Int8Embedding(*weight.shape, padding_idx=module.padding_idx, dtype=weight.dtype)
        rows, columns = weight.shape if isinstance(module, nn.Linear) else weight.shape[::-1]
        return Int8Linear(columns, rows, bias=module.bias is not None, dtype=weight.dtype)
