"""A BERT of TensorFlow or Keras as a model in the store: transformers' names, compared with the original by computing.

What decides is that a numpy model, which knows the foreign names alone, and transformers agree on the hidden states of
a few rows; weights that were turned or put in the wrong place do not pass.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from llmos_cli.errors import Damaged, LlmosError, UsageError
from llmos_cli.formats.canonical import Json
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.manifest import Manifest
from llmos_cli.formats.names import RefName
from llmos_cli.models.config import parse_config
from llmos_cli.models.foreign.bert import canonical_names, hidden_states, to_torch
from llmos_cli.models.foreign.read import Foreign, read_foreign, read_table
from llmos_cli.models.quiet import quiet
from llmos_cli.models.weights import state_tensors
from llmos_cli.store.local import Store
from llmos_cli.store.transaction import begin

KINDS: Final = ("keras", "tf")
_TOLERANCE: Final = 1e-4  # of the largest value
_TOKENIZERS: Final = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class Brought:
    """`difference` is the largest between transformers' hidden states and the original's, `tensors` how many came."""

    id: ObjectId
    ref: RefName
    tensors: int
    difference: float


def parse_source(text: str) -> tuple[str, Path]:
    """Read `keras:FILE` or `tf:PREFIX`; raises UsageError."""
    kind, colon, path = text.partition(":")
    if not colon or not path or kind not in KINDS:
        raise UsageError(f"--init {text} names no file of TensorFlow or Keras", hint="write keras:FILE.h5 or tf:PREFIX")
    return kind, Path(path).expanduser()


def bring(store: Store, source: str, ref: RefName) -> Brought:
    """Keep a foreign BERT under `ref`; raises LlmosError if transformers does not compute what it computes."""
    kind, path = parse_source(source)
    foreign = read_foreign(kind, path)
    tensors = canonical_names(foreign.tensors)
    table = _config(foreign, tensors)
    state = {name: torch.from_numpy(value.copy()) for name, value in to_torch(tensors).items()}
    difference = _difference(table, tensors, state)
    for again in ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias"):
        state.pop(again, None)  # the word embeddings and the bias again
    small = {"config.json": (json.dumps(table, indent=2, sort_keys=True) + "\n").encode()}
    small |= _tokenizer(foreign.folder, int(table["vocab_size"]))
    meta: dict[str, Json] = {
        "architecture": str(table["architectures"][0]),
        "dtype": "F32",
        "from": foreign.kind,
        "parameters": sum(value.numel() for value in state.values()),
        "parity": float(f"{difference:.2g}"),
    }
    with begin(store, purpose="import", ref=ref) as tx:
        files = [tx.add_bytes(name, data) for name, data in small.items()]
        files.append(tx.add_tensors("model.safetensors", state_tensors(state), metadata={"format": "pt"}))
        commit = tx.commit(Manifest("model", tuple(files), meta, None), message=f"import: {path.name}")
    return Brought(commit.id, ref, len(state), difference)


def _config(foreign: Foreign, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """config.json: what lies beside the weights, held against their shapes."""
    table = read_table(foreign.folder, "config.json", "bert_config.json")
    words = tensors["bert/embeddings/word_embeddings"].shape
    if table.get("model_type", "bert") != "bert":
        raise UsageError(f"{foreign.folder} describes a {table['model_type']}", hint="BERT is what is read")
    if (table.get("vocab_size"), table.get("hidden_size")) != words:
        raise Damaged(f"the configuration in {foreign.folder} is of another model: the weights have {words[0]} words")
    heads = {name.split("/")[0] for name in tensors} | {"/".join(name.split("/")[:2]) for name in tensors}
    architecture = "BertModel"
    if "classifier" in heads:
        architecture = "BertForSequenceClassification"
    elif "cls/predictions" in heads:
        architecture = "BertForPreTraining" if "cls/seq_relationship" in heads else "BertForMaskedLM"
    kept = {key: value for key, value in table.items() if key not in ("torch_dtype", "transformers_version")}
    return kept | {"model_type": "bert", "architectures": [architecture], "dtype": "float32"}


def _difference(table: dict[str, Any], tensors: dict[str, np.ndarray], state: dict[str, torch.Tensor]) -> float:
    from transformers import BertModel

    config = parse_config(table)
    vocab, longest = int(table["vocab_size"]), int(table.get("max_position_embeddings", 512))
    ids = np.random.default_rng(0).integers(0, vocab, (2, min(16, longest)))
    expected = hidden_states(tensors, table, ids)
    body = {name.removeprefix("bert."): value for name, value in state.items() if name.startswith("bert.")}
    with quiet(), torch.random.fork_rng(devices=[]), torch.inference_mode():
        model = BertModel(config).eval()
        try:
            found = model.load_state_dict(body, strict=False)
        except RuntimeError as exc:
            raise Damaged(f"the weights do not fit the configuration: {' '.join(str(exc).split())[:200]}") from exc
        missing = [name for name in found.missing_keys if not name.startswith("pooler.")]
        if missing or found.unexpected_keys:
            names = ", ".join([*missing, *found.unexpected_keys][:3])
            raise Damaged(f"the weights do not fit the configuration: {names}")
        computed = model(input_ids=torch.from_numpy(ids)).last_hidden_state.numpy()
    difference = float(np.abs(computed - expected).max())
    if not difference <= _TOLERANCE * max(1.0, float(np.abs(expected).max())):
        raise LlmosError(
            f"transformers does not compute what these weights compute: hidden states differ by {difference:.3g}",
            hint="look at hidden_act and layer_norm_eps in its configuration",
        )
    return difference


def _tokenizer(folder: Path, vocab_size: int) -> dict[str, bytes]:
    """The tokenizer that lies there, or one made of its vocab.txt; nothing without either."""
    found = {name: (folder / name).read_bytes() for name in _TOKENIZERS if (folder / name).is_file()}
    vocabulary = folder / "vocab.txt"
    if "tokenizer.json" in found or not vocabulary.is_file():
        return found
    from tokenizers import BertWordPieceTokenizer

    words = vocabulary.read_text("utf-8").splitlines()
    if len(words) > vocab_size:
        raise Damaged(f"{vocabulary} has {len(words):,} words, the model {vocab_size:,}")
    settings = json.loads(found.get("tokenizer_config.json", b"{}"))
    cased = any(word != word.lower() for word in words if not (word.startswith("[") and word.endswith("]")))
    lower = bool(settings.get("do_lower_case", not cased))
    made = BertWordPieceTokenizer({word: number for number, word in enumerate(words)}, lowercase=lower)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "do_lower_case": lower,
        "unk_token": "[UNK]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "mask_token": "[MASK]",
    }
    return {
        "tokenizer.json": made.to_str(pretty=False).encode(),
        "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode(),
    }
