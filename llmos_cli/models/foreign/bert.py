"""BERT as TensorFlow and Keras name it: names to transformers' and back, and the same computation in numpy.

TensorFlow keeps the matrix of a layer as [in, out], torch as [out, in]. The numpy model computes from the foreign names
alone, so that it can tell whether the weights were put in the right places the right way round.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from llmos_cli.errors import Damaged, UsageError

_LAYER = re.compile(r"layer_(?:\._)?(\d+)\Z")
_HEADS: Final = {"mlm___cls": "cls", "nsp___cls": "cls"}
_TRAINING: Final = re.compile(
    r"(adam|adafactor|lamb)|(^|/)(global_step|good_steps|current_loss_scale)\b", re.IGNORECASE
)
_EPS: Final = 1e-12


def canonical_names(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors by Google's spelling, `bert/encoder/layer_0/...`; optimizer state is left out."""
    found: dict[str, np.ndarray] = {}
    for name, value in tensors.items():
        if _TRAINING.search(name):
            continue
        parts = [_HEADS.get(part, part) for part in name.removesuffix(":0").split("/")]
        starts = [at for at, part in enumerate(parts) if part in ("bert", "cls", "classifier")]
        if not starts:
            continue
        spelled = "/".join(_LAYER.sub(r"layer_\1", part) for part in parts[starts[-1] :])
        spelled = re.sub(r"(word|position|token_type)_embeddings/(weight|embeddings)\Z", r"\1_embeddings", spelled)
        spelled = {"cls/predictions/bias": "cls/predictions/output_bias"}.get(spelled, spelled)
        if spelled in found and not np.array_equal(found[spelled], value):
            raise Damaged(f"{spelled} stands there twice, with different values")
        found[spelled] = value
    if "bert/embeddings/word_embeddings" not in found:
        near = sorted(tensors)[:3]
        raise UsageError(
            f"these are not the weights of a BERT: no word embeddings among {', '.join(near) or 'no tensors'}",
            hint="BERT is what llmos reads of TensorFlow's and Keras' models",
        )
    return found


def to_torch(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """transformers' names and shapes for canonical ones."""
    state = {}
    for name, value in tensors.items():
        turned, spelled = _torch_name(name)
        state[spelled] = np.ascontiguousarray(value.T) if turned else value
    if "cls/predictions/output_bias" in tensors:
        words = state["bert.embeddings.word_embeddings.weight"]
        state.setdefault("cls.predictions.decoder.weight", words)
        state["cls.predictions.decoder.bias"] = state["cls.predictions.bias"]
    return state


def from_torch(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Canonical names and shapes for transformers'; raises UsageError for a weight that no BERT of theirs has."""
    found = {}
    for name, value in state.items():
        if name in ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias") or name.endswith("position_ids"):
            continue  # the word embeddings and the bias again
        spelled = _foreign_name(name, value.ndim)
        found[spelled] = np.ascontiguousarray(value.T) if spelled.endswith("/kernel") else value
    return found


def _torch_name(name: str) -> tuple[bool, str]:
    parts = re.sub(r"layer_(\d+)", r"layer/\1", name).split("/")
    last = {"kernel": "weight", "gamma": "weight", "beta": "bias", "output_bias": "bias", "output_weights": "weight"}
    turned = parts[-1] == "kernel"
    if parts[-1].endswith("_embeddings"):
        parts.append("weight")
    else:
        parts[-1] = last.get(parts[-1], parts[-1])
    return turned, ".".join(parts)


def _foreign_name(name: str, dims: int) -> str:
    parts = re.sub(r"layer\.(\d+)", r"layer_\1", name).split(".")
    if parts[0] not in ("bert", "cls", "classifier"):
        raise UsageError(f"{name} is not a weight of a BERT", hint="--format keras is for BERT; use --format hf")
    if parts[-2].endswith("_embeddings"):
        return "/".join(parts[:-1])
    if parts[-2] == "LayerNorm":
        parts[-1] = {"weight": "gamma", "bias": "beta"}[parts[-1]]
    elif name == "cls.predictions.bias":
        parts[-1] = "output_bias"
    elif name.startswith("cls.seq_relationship"):
        parts[-1] = {"weight": "output_weights", "bias": "output_bias"}[parts[-1]]
    elif parts[-1] == "weight" and dims == 2:
        parts[-1] = "kernel"
    return "/".join(parts)


def hidden_states(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], ids: np.ndarray) -> np.ndarray:
    """What BERT makes of rows of ids, computed in float64 from canonical tensors."""
    heads = int(config["num_attention_heads"])
    eps = float(config.get("layer_norm_eps", _EPS))

    def get(name: str) -> np.ndarray:
        if name not in tensors:
            raise Damaged(f"the weights lack {name}")
        return np.asarray(tensors[name], np.float64)

    def dense(x: np.ndarray, name: str) -> np.ndarray:
        out: np.ndarray = x @ get(f"{name}/kernel") + get(f"{name}/bias")
        return out

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
        out: np.ndarray = scaled * get(f"{name}/gamma") + get(f"{name}/beta")
        return out

    at = "bert/embeddings/"
    x = get(at + "word_embeddings")[ids] + get(at + "position_embeddings")[: ids.shape[1]]
    x = norm(x + get(at + "token_type_embeddings")[0], at + "LayerNorm")
    rows, length, width = x.shape
    for layer in range(int(config["num_hidden_layers"])):
        at = f"bert/encoder/layer_{layer}/"
        q, k, v = (
            dense(x, f"{at}attention/self/{name}").reshape(rows, length, heads, -1).transpose(0, 2, 1, 3)
            for name in ("query", "key", "value")
        )
        scores = q @ k.transpose(0, 1, 3, 2) / math.sqrt(width // heads)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (scores / scores.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3).reshape(rows, length, width)
        x = norm(x + dense(mixed, at + "attention/output/dense"), at + "attention/output/LayerNorm")
        inner = _activation(str(config.get("hidden_act", "gelu")), dense(x, at + "intermediate/dense"))
        x = norm(x + dense(inner, at + "output/dense"), at + "output/LayerNorm")
    return x


def _activation(name: str, x: np.ndarray) -> np.ndarray:
    share: np.ndarray
    if name == "gelu":
        share = 0.5 * (1.0 + np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2.0)))
    elif name in ("gelu_new", "gelu_pytorch_tanh"):
        share = 0.5 * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
    elif name == "relu":
        share = (x > 0).astype(np.float64)
    else:
        raise UsageError(f"a BERT with the activation {name!r} is not read", hint="gelu, gelu_new and relu are")
    out: np.ndarray = x * share
    return out
