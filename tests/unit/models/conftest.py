import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, LlamaConfig, PretrainedConfig, Qwen2Config

from llmos_cli.formats.manifest import FileEntry, Manifest
from llmos_cli.models.weights import state_tensors
from llmos_cli.store.local import Store, init_store, open_store
from llmos_cli.store.transaction import begin

SIZES = {
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
    "qwen2": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(
        vocab_size=512, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    ),
}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    init_store(tmp_path / ".llmos")
    with open_store(tmp_path / ".llmos") as opened:
        yield opened


@pytest.fixture
def config(request: pytest.FixtureRequest) -> PretrainedConfig:
    return CONFIGS[request.param]()


@pytest.fixture
def put(store: Store) -> Callable[..., Manifest]:
    """Commit a manifest of a state dict and small files."""

    def commit(
        state: Mapping[str, torch.Tensor] | None, files: Mapping[str, Any] | None = None, kind: str = "model"
    ) -> Manifest:
        with begin(store, purpose="test") as tx:
            entries: list[FileEntry] = []
            if state is not None:
                entries.append(tx.add_tensors("model.safetensors", state_tensors(state)))
            for path, content in (files or {}).items():
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                entries.append(tx.add_bytes(path, data))
            manifest = Manifest(kind, tuple(entries))
            tx.commit(manifest, message="test")
        return manifest

    return commit


@pytest.fixture
def tokenizer_files() -> dict[str, Any]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i + 1 for i, char in enumerate(alphabet)} | {"<eos>": 0}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<eos>",
            "model_max_length": 64,
            "chat_template": "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}",
        },
    }


@pytest.fixture
def sizes() -> dict[str, Any]:
    return dict(SIZES)
