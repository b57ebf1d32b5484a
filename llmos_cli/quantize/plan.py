"""Which tensors of a stored model take which form and which stay, and why: from headers only, no weight is read.

The modules come from the model class built without memory; what a file calls a tensor and what the class calls it
may differ by the class's prefix, nothing else counts as the same.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Final

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmos_cli.errors import Damaged, LlmosError, UsageError
from llmos_cli.formats.manifest import FileEntry, Manifest
from llmos_cli.formats.safetensors import TensorInfo
from llmos_cli.models.config import load_config
from llmos_cli.models.heads import head_of
from llmos_cli.models.load import meta_model
from llmos_cli.models.quantized import QUANTIZABLE, SCALE, WEIGHT, prepare_quantized, quantizable, tied_modules
from llmos_cli.models.quiet import quiet
from llmos_cli.models.schemes import INT8, Form, Scheme
from llmos_cli.store.inspect.tensors import tensor_table
from llmos_cli.store.local import Store

_FLOATS: Final = {"BF16", "F16", "F32", "F64"}
_SHAPE_BYTES: Final = 16
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Quantized:
    """A stored tensor that takes a form; `transposed` if it lies as [in, out]. `module` is the layer it belongs to.

    `scale_names` are its own scale's and one for each module that shares the weight but has no tensor of its own:
    weights are tied by the loader, scales are not.
    """

    entry: FileEntry
    info: TensorInfo
    transposed: bool
    scale_names: tuple[str, ...]
    form: Form
    module: str
    inner: bool = True  # neither the embedding nor the head

    @property
    def rows(self) -> int:
        return self.info.shape[1 if self.transposed else 0]

    @property
    def columns(self) -> int:
        return self.info.shape[0 if self.transposed else 1]

    @property
    def scale_dtype(self) -> str:
        """A scale for every row is exact; of the many scales of groups, two bytes each are enough."""
        return "F32" if not self.form.group else "F16" if self.info.dtype == "F16" else "BF16"

    @property
    def nbytes(self) -> int:
        return self.nbytes_as(self.form)

    def nbytes_as(self, form: Form) -> int:
        """Its bytes in some form, scales included."""
        weights = self.rows * self.columns * form.bits // 8
        scales = self.rows * (self.columns // form.group if form.group else 1) * len(self.scale_names)
        return weights + scales * (2 if form.group else 4) + (_SHAPE_BYTES if form.packed else 0)


@dataclass(frozen=True)
class QuantizePlan:
    """`reasons` says why a layer stays, or takes another form than was asked for; layers of the same place in different
    blocks stand under one name ("*")."""

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


def make_plan(
    store: Store,
    manifest: Manifest,
    asked: Form,
    choices: Mapping[str, Form] = MappingProxyType({}),
    *,
    plain_ends: bool = False,
) -> QuantizePlan:
    """Decide for every tensor of a model or checkpoint; raises UsageError for one that is quantized already. `choices`
    are forms for some modules by name, instead of the one that was asked for. With `plain_ends` what would take eight
    bits instead of the form that was asked for stays as it is, and so do the embedding and the head."""
    if manifest.kind not in ("model", "checkpoint"):
        raise UsageError(f"a {manifest.kind} cannot be quantized", hint="name a model or a checkpoint: llmos ls")
    config = load_config(store, manifest)
    if getattr(config, "quantization_config", None) is not None:
        raise UsageError("the model is quantized already", hint="quantize the model it was made from: llmos log REF")
    model = meta_model(config, head_of(config))
    table = tensor_table(store, manifest)
    reasons = quantizable(model)
    stored = {name: stored_name(name + WEIGHT, model, table) for name in reasons}
    quantized: dict[str, Quantized] = {}
    forms: dict[str, Form] = {}
    notes: dict[str, str] = {}
    for group in _groups(reasons, tied_modules(model)):
        found = [tensor for name in group if (tensor := stored[name]) is not None]
        reason = next((reasons[name] for name in group if reasons[name]), None)
        if reason is None and not found:
            reason = "its weight is stored under another name"
        if reason is None:
            reason = next((text for name in found if (text := _unfit(table[name][1]))), None)
        wanted = next((choices[name] for name in group if name in choices), asked)
        form, note = _form_for(model, group, wanted) if reason is None else (None, None)
        if plain_ends and form is not None and (form != wanted or _ends(model, group)):
            form, note = None, "the program it is made for would not read it"
        reason = reason or (note if form is None else None)
        sharing = [name + SCALE for name in group if stored[name] is None]
        for name in group:
            reasons[name] = reasons[name] or reason
            tensor = stored[name]
            if form is not None:
                forms[name] = form
                if note and tensor is not None:
                    notes[tensor] = note
            if form is not None and tensor is not None:
                if plain_ends and type(model.get_submodule(name)) is Conv1D:
                    raise LlmosError(
                        f"only transformers reads quantized {config.model_type} models", hint="leave out --for"
                    )
                scales = (tensor.removesuffix(WEIGHT) + SCALE, *sharing)
                quantized[tensor] = _quantized(table, tensor, model, name, scales, form, inner=not _ends(model, group))
                sharing = []
    if not {asked, *choices.values()} & set(forms.values()):
        raise LlmosError(f"no layer of this {model.config.model_type} model can be quantized to {asked.name}")
    ignored = frozenset(name for name, reason in reasons.items() if reason is not None)
    scheme = Scheme(_targets(model, forms, asked), ignored)
    _check_runs(model, scheme)
    layers = notes | {stored[name] or name + WEIGHT: reason for name, reason in reasons.items() if reason is not None}
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


def _form_for(model: PreTrainedModel, group: list[str], asked: Form) -> tuple[Form | None, str | None]:
    """The form of modules that share a weight, and why it is not the one that was asked for."""
    if asked != INT8 and _ends(model, group):
        if asked.dynamic:
            return None, "the embedding and the head lose most and gain little"
        return INT8, "int8: the embedding and the head lose most with few bits"
    module = model.get_submodule(group[0])
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    columns = weight.shape[1 if isinstance(module, nn.Linear | nn.Embedding) else 0]
    if asked.group and columns % asked.group:
        return INT8, f"int8: its {columns} columns are no multiple of {asked.group}"
    return asked, None


def _ends(model: PreTrainedModel, group: list[str]) -> bool:
    """Whether one of these modules is the embedding or the head."""
    head = model.get_output_embeddings()
    modules = [model.get_submodule(name) for name in group]
    return any(isinstance(module, nn.Embedding) or module is head for module in modules)


def _targets(model: PreTrainedModel, forms: Mapping[str, Form], asked: Form) -> dict[Form, frozenset[str]]:
    """What takes each form: the one that was asked for by class, others by name."""
    classes = frozenset(QUANTIZABLE[type(model.get_submodule(name))] for name, form in forms.items() if form == asked)
    named: dict[Form, frozenset[str]] = {asked: classes} if classes else {}
    for form in sorted({form for form in forms.values() if form != asked}, key=lambda form: (form.name, form.group)):
        named[form] = frozenset(name for name, taken in forms.items() if taken == form)
    return named


def _groups(names: Mapping[str, str | None], pairs: list[tuple[str, str]]) -> list[list[str]]:
    """The modules, those that share a weight together."""
    group = {name: [name] for name in names}
    for target, source in pairs:
        if target in group and source in group and group[target] is not group[source]:
            group[source].extend(group[target])
            for name in group[target]:
                group[name] = group[source]
    return [members for name, members in group.items() if members[0] == name]


def stored_name(name: str, model: PreTrainedModel, table: Mapping[str, tuple[FileEntry, TensorInfo]]) -> str | None:
    short = name.removeprefix(f"{model.base_model_prefix}.")
    return name if name in table else short if short in table else None


def _check_runs(model: PreTrainedModel, scheme: Scheme) -> None:
    """Refuse a class whose code computes with weights past their layers: its plain form runs without memory, its
    quantized form does not. A class that cannot run without memory at all is taken to be well-behaved."""

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
            raise LlmosError(f"a {model.config.model_type} model does not run with quantized weights") from exc


def _unfit(info: TensorInfo) -> str | None:
    if info.dtype not in _FLOATS:
        return f"stored as {info.dtype}"
    return "empty" if 0 in info.shape else None


def _quantized(
    table: Mapping[str, tuple[FileEntry, TensorInfo]],
    tensor: str,
    model: PreTrainedModel,
    name: str,
    scale_names: tuple[str, ...],
    form: Form,
    *,
    inner: bool,
) -> Quantized:
    (entry, info), module = table[tensor], model.get_submodule(name)
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    if info.shape != tuple(weight.shape):
        raise Damaged(
            f"the weights do not fit config.json: tensor {info.name!r} has the shape {list(info.shape)} "
            f"instead of {list(weight.shape)}"
        )
    return Quantized(entry, info, not isinstance(module, nn.Linear | nn.Embedding), scale_names, form, name, inner)
