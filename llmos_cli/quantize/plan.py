"""Which tensors of a stored model take int8 and which stay, with the reason: from headers only, no weight is read.

The modules come from the model class built without memory; what a file calls a tensor and what the class calls it
may differ by the class's prefix, nothing else counts as the same.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Final

import torch
from torch import nn
from transformers import PreTrainedModel

from llmos_cli.errors import Damaged, LlmosError, UsageError
from llmos_cli.formats.manifest import FileEntry, Manifest
from llmos_cli.formats.safetensors import TensorInfo
from llmos_cli.models.config import load_config
from llmos_cli.models.load import meta_model
from llmos_cli.models.quantized import QUANTIZABLE, SCALE, WEIGHT, Scheme, prepare_quantized, quantizable, tied_modules
from llmos_cli.models.quiet import quiet
from llmos_cli.store.inspect.tensors import tensor_table
from llmos_cli.store.local import Store

_FLOATS: Final = {"BF16", "F16", "F32", "F64"}
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Quantized:
    """A stored tensor that takes int8; `transposed` if it lies as [in, out].

    `scale_names` are its own scale's and one for each module that shares the weight but has no tensor of its own:
    weights are tied by the loader, scales are not.
    """

    entry: FileEntry
    info: TensorInfo
    transposed: bool
    scale_names: tuple[str, ...]

    @property
    def rows(self) -> int:
        return self.info.shape[1 if self.transposed else 0]

    @property
    def columns(self) -> int:
        return self.info.shape[0 if self.transposed else 1]

    @property
    def nbytes(self) -> int:
        return self.rows * (self.columns + 4 * len(self.scale_names))


@dataclass(frozen=True)
class QuantizePlan:
    """`reasons` says why a layer stays, layers of the same place in different blocks under one name ("*")."""

    scheme: Scheme
    quantized: Mapping[str, Quantized]
    kept: Mapping[str, tuple[FileEntry, TensorInfo]]
    reasons: Mapping[str, str]

    @property
    def parameters(self) -> int:
        infos = [item.info for item in self.quantized.values()] + [info for _, info in self.kept.values()]
        return sum(prod(info.shape) for info in infos)

    @property
    def bytes_before(self) -> int:
        infos = [item.info for item in self.quantized.values()] + [info for _, info in self.kept.values()]
        return sum(info.end - info.start for info in infos)

    @property
    def bytes_after(self) -> int:
        """Bytes of all tensors, scales included."""
        kept = sum(info.end - info.start for _, info in self.kept.values())
        return kept + sum(item.nbytes for item in self.quantized.values())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes_after / self.parameters if self.parameters else 0.0


def plan_int8(store: Store, manifest: Manifest) -> QuantizePlan:
    """Decide for every tensor of a model or checkpoint; raises UsageError for one that is quantized already."""
    if manifest.kind not in ("model", "checkpoint"):
        raise UsageError(f"a {manifest.kind} cannot be quantized", hint="name a model or a checkpoint: llmos ls")
    config = load_config(store, manifest)
    if getattr(config, "quantization_config", None) is not None:
        raise UsageError("the model is quantized already", hint="quantize the model it was made from: llmos log REF")
    model = meta_model(config)
    table = tensor_table(store, manifest)
    reasons = quantizable(model)
    stored = {name: _stored_name(name + WEIGHT, model, table) for name in reasons}
    quantized: dict[str, Quantized] = {}
    for group in _groups(reasons, tied_modules(model)):
        found = [tensor for name in group if (tensor := stored[name]) is not None]
        reason = next((reasons[name] for name in group if reasons[name]), None)
        if reason is None and not found:
            reason = "its weight is stored under another name"
        if reason is None:
            reason = next((text for name in found if (text := _unfit(table[name][1]))), None)
        sharing = [name + SCALE for name in group if stored[name] is None]
        for name in group:
            reasons[name] = reasons[name] or reason
            tensor = stored[name]
            if reason is None and tensor is not None:
                scales = (tensor.removesuffix(WEIGHT) + SCALE, *sharing)
                quantized[tensor] = _quantized(*table[tensor], model.get_submodule(name), scales)
                sharing = []
    if not quantized:
        raise LlmosError(f"no layer of this {model.config.model_type} model can be quantized to int8")
    scheme = Scheme(
        frozenset(QUANTIZABLE[type(model.get_submodule(name))] for name, reason in reasons.items() if reason is None),
        frozenset(name for name, reason in reasons.items() if reason is not None),
    )
    _check_runs(model, scheme)
    layers = {stored[name] or name + WEIGHT: reason for name, reason in reasons.items() if reason is not None}
    kept = {name: item for name, item in table.items() if name not in quantized}
    for name, (_, info) in kept.items():
        if len(info.shape) > 1 and name not in layers:
            layers[name] = "not the weight of a linear layer or of the input embedding"
    return QuantizePlan(
        scheme,
        dict(sorted(quantized.items())),
        dict(sorted(kept.items())),
        {_NUMBER.sub("*", name): reason for name, reason in sorted(layers.items())},
    )


def _groups(names: Mapping[str, str | None], pairs: list[tuple[str, str]]) -> list[list[str]]:
    """The modules, those that share a weight together."""
    group = {name: [name] for name in names}
    for target, source in pairs:
        if target in group and source in group and group[target] is not group[source]:
            group[source].extend(group[target])
            for name in group[target]:
                group[name] = group[source]
    return [members for name, members in group.items() if members[0] == name]


def _stored_name(name: str, model: PreTrainedModel, table: Mapping[str, tuple[FileEntry, TensorInfo]]) -> str | None:
    short = name.removeprefix(f"{model.base_model_prefix}.")
    return name if name in table else short if short in table else None


def _check_runs(model: PreTrainedModel, scheme: Scheme) -> None:
    """Refuse a class whose code computes with weights past their layers: its plain form runs without memory, its int8
    form does not. A class that cannot run without memory at all is taken to be well-behaved."""

    def problem() -> Exception | None:
        try:
            with quiet(), torch.inference_mode():
                model(input_ids=torch.zeros(1, 4, dtype=torch.int64, device="meta"), use_cache=False)
        except (RuntimeError, NotImplementedError, TypeError, AttributeError, ValueError) as exc:
            return exc
        return None

    if problem() is None:
        prepare_quantized(model, scheme.config())
        if exc := problem():
            raise LlmosError(f"a {model.config.model_type} model does not run with int8 weights") from exc


def _unfit(info: TensorInfo) -> str | None:
    if info.dtype not in _FLOATS:
        return f"stored as {info.dtype}"
    return "empty" if 0 in info.shape else None


def _quantized(entry: FileEntry, info: TensorInfo, module: nn.Module, scale_names: tuple[str, ...]) -> Quantized:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    if info.shape != tuple(weight.shape):
        raise Damaged(
            f"the weights do not fit config.json: tensor {info.name!r} has the shape {list(info.shape)} "
            f"instead of {list(weight.shape)}"
        )
    return Quantized(entry, info, not isinstance(module, nn.Linear | nn.Embedding), scale_names)
