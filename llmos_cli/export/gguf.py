"""GGUF version 3, as llama.cpp reads it: a stored model's tensors, settings and tokenizer in one file.

Written by gguf-py (llama.cpp's own library), a tensor at a time. Weights of four and eight bits keep their values: an
int4 group becomes Q4_0 blocks and an int8 row Q8_0 blocks with the same scale, rounded to float16.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from llmos_cli.errors import Damaged, LlmosError, UsageError
from llmos_cli.export.tokens import Vocabulary
from llmos_cli.formats.manifest import FileEntry, Manifest
from llmos_cli.formats.safetensors import TensorInfo
from llmos_cli.models.config import load_config
from llmos_cli.models.quantized import PACKED, SCALE, SHAPE, WEIGHT, unpack_nibbles
from llmos_cli.models.weights import read_tensor
from llmos_cli.progress import Task
from llmos_cli.store.inspect.tensors import tensor_table
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import open_file

TYPES: Final = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "mxfp4")
BLOCK: Final = 32
_FILE_TYPES: Final = {
    "f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0",
    "q4_1": "MOSTLY_Q4_1", "mxfp4": "MOSTLY_MXFP4_MOE",
}  # fmt: skip
_SMALL: Final = ("q4_0", "q4_1", "mxfp4")  # the embedding and the head take q8_0 beside these
_ENDS: Final = ("token_embd.weight", "output.weight")


Table = Mapping[str, tuple[FileEntry, TensorInfo]]


@dataclass(frozen=True)
class Family:
    """What a kind of model is called in GGUF, and what its weights need. `paired`: the halves of q and k rows stand
    side by side there (rotary embeddings by pairs), one after the other here."""

    arch: str
    paired: bool = False
    conv1d: bool = False
    rms: bool = True


FAMILIES: Final = {
    "llama": Family("LLAMA", paired=True),
    "mistral": Family("LLAMA", paired=True),
    "qwen2": Family("QWEN2"),
    "qwen3": Family("QWEN3"),
    "gpt2": Family("GPT2", conv1d=True, rms=False),
}
_CONV1D: Final = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


@dataclass(frozen=True)
class _Weight:
    """A tensor to be written: its name there, its shape, and the stored tensors it is made from."""

    target: str
    source: str
    shape: tuple[int, ...]
    type: str


@dataclass(frozen=True)
class GgufPlan:
    """A model's tensors in the order they are written."""

    family: Family
    config: Any
    type: str
    weights: tuple[_Weight, ...]
    nbytes: int


def plan_gguf(store: Store, manifest: Manifest, wanted: str | None) -> GgufPlan:
    """Decide how each tensor is written; raises LlmosError for a kind of model that is not known, UsageError for a type
    that the model's own weights do not have."""
    config = load_config(store, manifest)
    family = FAMILIES.get(config.model_type)
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise LlmosError(
            f"a {config.model_type} model cannot be written as GGUF; known are {known}",
            hint="export with --format hf",
        )
    library = _library()
    names = library.get_tensor_name_map(library.MODEL_ARCH[family.arch], config.num_hidden_layers)
    table = tensor_table(store, manifest)
    own = "q4_0" if any(name.endswith(PACKED) for name in table) else None
    own = own or ("q8_0" if any(name.endswith(SCALE) for name in table) else None)
    if wanted and own and wanted not in (own, "f32", "f16", "bf16"):
        raise UsageError(
            f"the model's weights are {own} already; as {wanted} they would lose twice",
            hint="export the model it was quantized from: llmos log REF",
        )
    kind = wanted or own or "bf16"
    weights = []
    for name in table:
        if name.endswith((SCALE, SHAPE)):
            continue
        plain = name.removesuffix(PACKED) + WEIGHT if name.endswith(PACKED) else name
        if plain == "lm_head.weight" and getattr(config, "tie_word_embeddings", False):
            continue
        target = names.get_name(plain, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise LlmosError(f"GGUF has no place for the tensor {plain!r}", hint="export with --format hf")
        weights.append(_weight(target, plain, name, table, kind, family))
    ordered = tuple(sorted(weights, key=lambda weight: weight.source))
    return GgufPlan(family, config, kind, ordered, sum(info.end - info.start for _, info in table.values()))


def _weight(target: str, plain: str, name: str, table: Table, kind: str, family: Family) -> _Weight:
    shape = table[name][1].shape
    if name.endswith(PACKED):
        shape = (shape[0], shape[1] * 8)
    elif family.conv1d and plain.endswith(_CONV1D) and plain.removesuffix(WEIGHT) + SCALE not in table:
        shape = shape[::-1]
    if len(shape) < 2 or "position_embd" in target:
        return _Weight(target, plain, shape, "f32")
    own = "q8_0" if kind in _SMALL and (target in _ENDS or table[name][1].dtype == "I8") else kind
    return _Weight(target, plain, shape, own if own in ("f32", "f16", "bf16") or shape[-1] % BLOCK == 0 else "f16")


def write_gguf(
    store: Store, manifest: Manifest, plan: GgufPlan, vocabulary: Vocabulary, path: Path, *, name: str, task: Task
) -> None:
    """Write the file; raises Damaged naming a tensor that is not finite."""
    library = _library()
    writer = library.GGUFWriter(path, library.MODEL_ARCH_NAMES[library.MODEL_ARCH[plan.family.arch]])
    _settings(writer, library, plan, name)
    _tokens(writer, vocabulary)
    table = tensor_table(store, manifest)
    for weight in plan.weights:
        if weight.type in ("f32", "f16"):
            dtype = np.dtype(np.float32 if weight.type == "f32" else np.float16)
            writer.add_tensor_info(weight.target, weight.shape, dtype, math.prod(weight.shape) * dtype.itemsize)
        else:
            kind = library.GGMLQuantizationType[weight.type.upper()]
            stored = library.quant_shape_to_byte_shape(weight.shape, kind)
            writer.add_tensor_info(weight.target, stored, np.dtype(np.uint8), math.prod(stored), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for weight in plan.weights:
        writer.write_tensor_data(_data(store, table, weight, plan, library))
        task.advance(sum(info.end - info.start for _, info in _parts(table, weight)))
    writer.close()


def _parts(table: Table, weight: _Weight) -> Iterator[tuple[FileEntry, TensorInfo]]:
    stem = weight.source.removesuffix(WEIGHT)
    for name in (weight.source, stem + PACKED, stem + SCALE, stem + SHAPE):
        if name in table:
            yield table[name]


def _data(store: Store, table: Table, weight: _Weight, plan: GgufPlan, library: Any) -> "np.ndarray[Any, Any]":
    """The bytes of a tensor as GGUF has them, [rows, bytes of a row]."""

    def read(name: str) -> torch.Tensor:
        entry, info = table[name]
        return read_tensor(open_file(store, entry), info)

    stem = weight.source.removesuffix(WEIGHT)
    order = _row_order(weight, plan)
    if stem + PACKED in table and weight.type == "q4_0":
        return order(_q4_0(unpack_nibbles(read(stem + PACKED)), read(stem + SCALE)))
    quantized = stem + SCALE in table
    if quantized and weight.type == "q8_0" and stem + PACKED not in table and table[weight.source][1].dtype == "I8":
        return order(_q8_0(read(weight.source), read(stem + SCALE)))
    if stem + PACKED in table:
        values, scale = unpack_nibbles(read(stem + PACKED)).float(), read(stem + SCALE).float()
        dense = (values.view(*scale.shape, -1) * scale.unsqueeze(-1)).flatten(1)
    elif quantized:
        dense = read(weight.source).float() * read(stem + SCALE)
    else:
        dense = read(weight.source).float()
        if plan.family.conv1d and weight.source.endswith(_CONV1D):
            dense = dense.t().contiguous()
    if not bool(torch.isfinite(dense).all()):
        raise Damaged(f"tensor {weight.source!r} holds a value that is not a finite number")
    array = dense.numpy()
    if weight.type == "f32":
        return order(array)
    if weight.type == "f16":
        return order(array.astype(np.float16))
    quantize: Callable[..., np.ndarray[Any, Any]] = library.quants.quantize
    return order(quantize(array, library.GGMLQuantizationType[weight.type.upper()]))


def _row_order(weight: _Weight, plan: GgufPlan) -> Callable[["np.ndarray[Any, Any]"], "np.ndarray[Any, Any]"]:
    """Rows of q and k as GGUF wants them: of each head the halves by turns."""
    heads = {
        "q_proj.": plan.config.num_attention_heads,
        "k_proj.": getattr(plan.config, "num_key_value_heads", None) or plan.config.num_attention_heads,
    }
    count = next((heads[part] for part in heads if plan.family.paired and part in weight.source), None)
    if count is None:
        return np.ascontiguousarray
    return lambda rows: np.ascontiguousarray(
        rows.reshape(count, 2, rows.shape[0] // count // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
    )


def _q4_0(values: torch.Tensor, scale: torch.Tensor) -> "np.ndarray[Any, Any]":
    """Blocks of 32: the scale as float16, then a byte for two values, the first half of the block in the low bits."""
    rows, columns = values.shape
    nibbles = (values.numpy().astype(np.int8) + 8).astype(np.uint8).reshape(rows, columns // BLOCK, 2, BLOCK // 2)
    packed = nibbles[:, :, 0] | (nibbles[:, :, 1] << 4)
    return _blocks(scale.float().numpy(), packed, columns)


def _q8_0(values: torch.Tensor, scale: torch.Tensor) -> "np.ndarray[Any, Any]":
    """Blocks of 32: the scale as float16, then 32 values."""
    rows, columns = values.shape
    return _blocks(scale.float().numpy(), values.numpy().view(np.uint8).reshape(rows, columns // BLOCK, BLOCK), columns)


def _blocks(scale: "np.ndarray[Any, Any]", packed: "np.ndarray[Any, Any]", columns: int) -> "np.ndarray[Any, Any]":
    each = np.repeat(scale, columns // BLOCK // scale.shape[1], axis=1).astype("<f2")
    return np.concatenate([each[:, :, None].view(np.uint8), packed], axis=2).reshape(len(packed), -1)


def _settings(writer: Any, library: Any, plan: GgufPlan, name: str) -> None:
    config = plan.config
    writer.add_name(name)
    writer.add_file_type(library.LlamaFileType[_FILE_TYPES[plan.type]])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if not plan.family.rms:
        writer.add_feed_forward_length(getattr(config, "n_inner", None) or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head)
    writer.add_value_length(head)
    if plan.family.paired:
        writer.add_rope_dimension_count(head)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear"):
        raise LlmosError(f"rotary embeddings of the kind {kind!r} cannot be written as GGUF yet", hint="--format hf")
    writer.add_rope_freq_base(float(rope.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0))
    if kind == "linear":
        writer.add_rope_scaling_type(library.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def _tokens(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.scores is None:
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.space_prefix)
    for role, number in vocabulary.special.items():
        getattr(writer, f"add_{role}_token_id")(number)
    writer.add_add_bos_token(vocabulary.add_bos)
    if vocabulary.template:
        writer.add_chat_template(vocabulary.template)


def _library() -> Any:
    try:
        import gguf
    except ImportError as exc:
        raise LlmosError("GGUF needs the package gguf", hint="pip install 'llmos[gguf]'") from exc
    return gguf
