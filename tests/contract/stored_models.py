"""Small models and datasets in a store, as pytest fixtures for the rooms that quantize, export and describe them."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.manifest import FileEntry, Manifest, Recipe
from llmos_cli.formats.names import parse_ref
from llmos_cli.models.heads import head_of
from llmos_cli.models.load import new_model
from llmos_cli.models.weights import drop_tied, state_tensors
from llmos_cli.store.local import Store, init_store, open_store
from llmos_cli.store.transaction import Tensor, begin

VOCABULARY = 512
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama-tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-untied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=False, rope_theta=500000.0),
    "mistral": lambda: MistralConfig(**SIZES, head_dim=16, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=16),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    ),
    "gemma": lambda: GemmaConfig(**SIZES, head_dim=16),
    "bert": lambda: BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        architectures=["BertForMaskedLM"],
    ),
    "mamba": lambda: MambaConfig(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, state_size=8),
}
SETTINGS = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>", "chat_template": "{{ messages }}"}
Put = Callable[..., ObjectId]


@pytest.fixture(scope="session")
def tokenizer() -> bytes:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["the cat sat on the mat and the dog sat on the log"] * 20, trainer)
    return made.to_str().encode()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    init_store(tmp_path / ".llmos")
    return tmp_path / ".llmos"


@pytest.fixture
def store(root: Path) -> Iterator[Store]:
    with open_store(root) as opened:
        yield opened


@pytest.fixture
def put_model(store: Store, tokenizer: bytes) -> Put:
    """Commit a random model with a tokenizer. `noise` gives weights a size that matters, `change` edits tensors,
    `settings` its config, `files` are added."""

    def put(
        name: str = "tiny",
        *,
        config: str = "llama-tied",
        dtype: torch.dtype = torch.float32,
        kind: str = "model",
        noise: float = 0.0,
        change: Callable[[dict[str, torch.Tensor]], None] | None = None,
        files: Mapping[str, bytes] | None = None,
        settings: Mapping[str, Any] | None = None,
        recipe: Recipe | None = None,
    ) -> ObjectId:
        built = CONFIGS[config]()
        model = new_model(built, seed=1, head=head_of(built))
        if noise:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(noise * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
        state = {key: tensor.detach().to(dtype) for key, tensor in drop_tied(model).items()}
        if change:
            change(state)
        texts = {
            "config.json": json.dumps(built.to_diff_dict() | dict(settings or {})).encode(),
            "tokenizer.json": tokenizer,
            "tokenizer_config.json": json.dumps(SETTINGS).encode(),
        } | dict(files or {})
        with begin(store, purpose="test", ref=parse_ref(name)) as tx:
            entries = [tx.add_tensors("model.safetensors", state_tensors(state))]
            entries += [tx.add_bytes(path, data) for path, data in texts.items()]
            return tx.commit(Manifest(kind, tuple(entries), recipe=recipe), message="test").id

    return put


@pytest.fixture
def put_data(store: Store, tokenizer: bytes) -> Put:
    """Commit a dataset of `rows` rows and a tail of 5 tokens."""

    def put(
        name: str = "web",
        *,
        rows: int = 20,
        seq_len: int = 32,
        vocab_size: int = VOCABULARY,
        tokenizer: bytes = tokenizer,
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
            files: list[FileEntry] = [tx.add_bytes("tokenizer/tokenizer.json", tokenizer)]
            meta = {"vocab_size": vocab_size, "bytes_per_token": 2.5, "rows": rows, "seq_len": seq_len}
            return tx.commit(Manifest("dataset", (shard, *files), meta), message="test").id

    return put
