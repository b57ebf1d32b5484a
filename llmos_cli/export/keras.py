"""A BERT as Keras keeps it: `tf_model.h5`, in the layout that transformers' TensorFlow models loaded and saved.

Groups by layer, weights by their path below it, and both listed in attributes. The file has no time in it: the same
model gives the same bytes.
"""

import io
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from llmos_cli.errors import Damaged
from llmos_cli.models.foreign.bert import canonical_names, from_torch, to_torch
from llmos_cli.models.foreign.read import need_h5py, read_hdf5

KERAS_FILE: Final = "tf_model.h5"
_HEADS: Final = {"cls/predictions": "mlm___cls", "cls/seq_relationship": "nsp___cls", "classifier": "classifier"}
_MODELS: Final = {
    frozenset[str](): "tf_bert_model",
    frozenset({"mlm___cls"}): "tf_bert_for_masked_lm",
    frozenset({"mlm___cls", "nsp___cls"}): "tf_bert_for_pre_training",
    frozenset({"classifier"}): "tf_bert_for_sequence_classification",
}


def keras_file(state: Mapping[str, np.ndarray]) -> bytes:
    """The file of a BERT's weights; raises UsageError for any other model."""
    h5py = need_h5py()
    layers: dict[str, dict[str, np.ndarray]] = {}
    for name, value in sorted(from_torch(state).items()):
        layer = next((own for prefix, own in _HEADS.items() if name.startswith(prefix)), "bert")
        turned = name.endswith("seq_relationship/output_weights")
        layers.setdefault(layer, {})[name] = value.T if turned else value
    model = _MODELS.get(frozenset(layers) - {"bert"}, "tf_bert_model")
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver=("earliest", "v108"), track_order=False) as file:
        file.attrs["layer_names"] = np.array([name.encode() for name in sorted(layers)])
        file.attrs["backend"] = b"tensorflow"
        file.attrs["keras_version"] = b"2.15.0"
        for layer, weights in sorted(layers.items()):
            _group(file.create_group(layer), model, layer, weights)
    data = buffer.getvalue()
    back = to_torch(canonical_names(read_hdf5(io.BytesIO(data), KERAS_FILE)))
    torn = [name for name, value in state.items() if name in back and not np.array_equal(back[name], value)]
    if torn or len(from_torch(back)) != len(from_torch(state)):
        raise Damaged(f"what was written does not read back the same: {', '.join(torn[:3])}")
    return data


def _group(group: Any, model: str, layer: str, weights: Mapping[str, np.ndarray]) -> None:
    named = {f"{model}/{_keras_name(name, layer)}:0": value for name, value in weights.items()}
    group.attrs["weight_names"] = np.array([name.encode() for name in named])
    for name, value in named.items():
        group.create_dataset(name, data=np.asarray(value, np.float32), track_times=False)


def _keras_name(name: str, layer: str) -> str:
    parts = name.split("/")
    if parts[0] == "cls":
        parts[0] = layer
    parts = [part.replace("layer_", "layer_._") if part.startswith("layer_") else part for part in parts]
    if parts[-1] == "word_embeddings":
        parts.append("weight")
    elif parts[-1].endswith("_embeddings"):
        parts.append("embeddings")
    elif parts[-1] == "output_bias" and parts[-2] == "predictions":
        parts[-1] = "bias"
    elif parts[-2] == "seq_relationship":
        parts[-1] = {"output_weights": "kernel", "output_bias": "bias"}[parts[-1]]
    return "/".join(parts)
