import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GemmaConfig, GPT2Config, LlamaConfig, MambaConfig, PretrainedConfig

from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.manifest import FileEntry, Manifest, Recipe
from llmos_cli.formats.names import parse_ref
from llmos_cli.models.load import new_model
from llmos_cli.models.weights import drop_tied, state_tensors
from llmos_cli.store.local import Store, init_store, open_store
from llmos_cli.store.transaction import Tensor, begin

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama-tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-untied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=False),
    "gpt2": lambda: GPT2Config(
        vocab_size=512, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    ),
    "gemma": lambda: GemmaConfig(**SIZES, head_dim=16),
    "mamba": lambda: MambaConfig(vocab_size=512, hidden_size=64, num_hidden_layers=2, state_size=8),
}
TOKENIZER = {"tokenizer.json": b'{"one": 1}', "tokenizer_config.json": b"{}"}
Put = Callable[..., ObjectId]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    init_store(tmp_path / ".llmos")
    return tmp_path / ".llmos"


@pytest.fixture
def store(root: Path) -> Iterator[Store]:
    with open_store(root) as opened:
        yield opened


@pytest.fixture
def put_model(store: Store) -> Put:
    """Commit a random model; `change` edits its tensors, `files` are added."""

    def put(
        name: str = "tiny",
        *,
        config: str = "llama-tied",
        dtype: torch.dtype = torch.float32,
        kind: str = "model",
        change: Callable[[dict[str, torch.Tensor]], None] | None = None,
        files: Mapping[str, bytes] | None = None,
        settings: Mapping[str, Any] | None = None,
        recipe: Recipe | None = None,
    ) -> ObjectId:
        built = CONFIGS[config]()
        state = {name: tensor.to(dtype) for name, tensor in drop_tied(new_model(built, seed=1)).items()}
        if change:
            change(state)
        values = json.dumps(built.to_diff_dict() | dict(settings or {})).encode()
        with begin(store, purpose="test", ref=parse_ref(name)) as tx:
            entries = [tx.add_tensors("model.safetensors", state_tensors(state)), tx.add_bytes("config.json", values)]
            entries += [tx.add_bytes(path, data) for path, data in (TOKENIZER | dict(files or {})).items()]
            return tx.commit(Manifest(kind, tuple(entries), recipe=recipe), message="test").id

    return put


@pytest.fixture
def put_data(store: Store) -> Put:
    """Commit a dataset of `rows` rows and a tail of 5 tokens."""

    def put(
        name: str = "web",
        *,
        rows: int = 20,
        seq_len: int = 32,
        vocab_size: int = 512,
        tokenizer: Mapping[str, bytes] | None = None,
    ) -> ObjectId:
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, vocab_size, (rows, seq_len)).astype("<u2")
        tail = rng.integers(0, vocab_size, 5).astype("<u2")
        with begin(store, purpose="test", ref=parse_ref(name)) as tx:
            shard = tx.add_tensors(
                "tokens-00000-of-00001.safetensors",
                [
                    Tensor("tail", "U16", tail.shape, tail.tobytes),
                    Tensor("tokens", "U16", tokens.shape, tokens.tobytes),
                ],
            )
            files: list[FileEntry] = [
                tx.add_bytes(f"tokenizer/{path}", data) for path, data in (tokenizer or TOKENIZER).items()
            ]
            meta = {"vocab_size": vocab_size, "bytes_per_token": 2.5, "rows": rows, "seq_len": seq_len}
            return tx.commit(Manifest("dataset", (shard, *files), meta), message="test").id

    return put
