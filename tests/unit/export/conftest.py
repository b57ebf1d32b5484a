import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.manifest import Manifest
from llmos_cli.formats.names import parse_ref
from llmos_cli.models.load import new_model
from llmos_cli.models.weights import drop_tied, state_tensors
from llmos_cli.store.local import Store, init_store, open_store
from llmos_cli.store.transaction import begin

SIZES: dict[str, Any] = {
    "vocab_size": 320,
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
        vocab_size=320, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    ),
}
Put = Callable[..., ObjectId]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    init_store(tmp_path / ".llmos")
    return tmp_path / ".llmos"


@pytest.fixture
def store(root: Path) -> Iterator[Store]:
    with open_store(root) as opened:
        yield opened


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
def put_model(store: Store, tokenizer: bytes) -> Put:
    """Commit a random model with weights of a size that matters, and a tokenizer."""

    def put(name: str = "tiny", *, config: str = "llama-tied", dtype: torch.dtype = torch.float32) -> ObjectId:
        built = CONFIGS[config]()
        model = new_model(built, seed=1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
        state = {key: tensor.detach().to(dtype) for key, tensor in drop_tied(model).items()}
        settings = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>", "chat_template": "{{ messages }}"}
        with begin(store, purpose="test", ref=parse_ref(name)) as tx:
            entries = [
                tx.add_tensors("model.safetensors", state_tensors(state)),
                tx.add_bytes("config.json", json.dumps(built.to_diff_dict()).encode()),
                tx.add_bytes("tokenizer.json", tokenizer),
                tx.add_bytes("tokenizer_config.json", json.dumps(settings).encode()),
                tx.add_bytes("training/state.json", b"{}"),
            ]
            return tx.commit(Manifest("model", tuple(entries)), message="test").id

    return put
