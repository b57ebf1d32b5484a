from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GemmaConfig, GPT2Config, LlamaConfig

from llmos_cli.errors import LlmosError
from llmos_cli.models.load import build_model, load_config, new_model
from llmos_cli.models.quantized import (
    Int8Embedding,
    Int8Linear,
    prepare_quantized,
    quantizable,
    quantize_rows,
)
from llmos_cli.models.schemes import INT8, Scheme, read_scheme
from llmos_cli.store.local import Store

EVERY = frozenset({"Linear", "Embedding", "Conv1D"})


def int8_linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Int8Linear:
    layer = Int8Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    layer.weight.data, layer.weight_scale = quantize_rows(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def test_every_value_is_within_half_a_step_and_the_largest_is_exact() -> None:
    torch.manual_seed(0)
    weight = torch.randn(32, 100) * torch.logspace(-6, 4, 32)[:, None]
    q, scale = quantize_rows(weight)
    assert (q.dtype, scale.dtype, tuple(scale.shape)) == (torch.int8, torch.float32, (32, 1))
    assert ((q * scale - weight).abs() <= scale * 0.50001).all()
    assert (q.abs().amax(dim=1) == 127).all()
    assert q.min() >= -127


@pytest.mark.parametrize("row", [[0.0, 0.0], [-0.0, 0.0], [1e-44, -1e-44]])
def test_a_row_of_zeros_has_scale_one(row: list[float]) -> None:
    q, scale = quantize_rows(torch.tensor([row]))
    assert (q.tolist(), scale.tolist()) == ([[0, 0]], [[1.0]])


@pytest.mark.parametrize("columns", [48, 50])  # 48 takes the CPU's int8 kernel in bfloat16, 50 cannot
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1.2e-2), (torch.float16, 2e-3)]
)
def test_a_linear_layer_computes_with_the_dequantized_weight(
    columns: int, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(1)
    bias = torch.randn(24, dtype=dtype)
    layer = int8_linear(torch.randn(24, columns), bias)
    for shape in ((columns,), (1, columns), (2, 3, columns), (0, columns)):
        x = torch.randn(*shape, dtype=dtype)
        y = layer(x)
        weight = layer.weight.double() * layer.weight_scale.double()
        expected = x.double() @ weight.T + bias.double()
        assert (y.dtype, y.shape) == (dtype, expected.shape)
        assert torch.allclose(y.double(), expected, rtol=tolerance, atol=tolerance * columns**0.5)


def test_float16_products_do_not_overflow() -> None:
    layer = int8_linear(torch.full((1, 4096), 0.001))
    assert layer(torch.ones(1, 4096, dtype=torch.float16)).item() == pytest.approx(4.096, rel=1e-2)


def test_an_embedding_looks_up_and_scales() -> None:
    weight = torch.randn(10, 8)
    layer = Int8Embedding(10, 8, padding_idx=None, dtype=torch.bfloat16)
    layer.weight.data, layer.weight_scale = quantize_rows(weight)
    found = layer(torch.tensor([[1, 9], [0, 1]]))
    assert (found.dtype, tuple(found.shape)) == (torch.bfloat16, (2, 2, 8))
    assert torch.allclose(found[0, 1].float(), weight[9], atol=0.03)


def test_the_scheme_says_itself_and_reads_itself() -> None:
    scheme = Scheme({INT8: EVERY}, frozenset({"lm_head"}))
    config = scheme.config()
    assert (config["quant_method"], config["format"], config["ignore"]) == (
        "compressed-tensors",
        "int-quantized",
        ["lm_head"],
    )
    assert read_scheme(config) == scheme


@pytest.mark.parametrize(
    "other",
    [
        {"quant_method": "gptq", "bits": 4},
        {**Scheme({INT8: EVERY}, frozenset()).config(), "format": "pack-quantized"},
        {"quant_method": "compressed-tensors"},
    ],
)
def test_other_schemes_are_refused_by_name(store: Store, put: Callable[..., Any], other: dict[str, Any]) -> None:
    config = load_config(store, put(None, {"config.json": {"model_type": "llama", "quantization_config": other}}))
    with pytest.raises(LlmosError, match=str(other["quant_method"])):
        build_model(config, {"x": torch.ones(1)})


def test_what_stays_has_a_reason(sizes: dict[str, Any]) -> None:
    assert set(quantizable(new_model(LlamaConfig(**sizes), seed=0)).values()) == {None}
    gpt2 = quantizable(new_model(GPT2Config(vocab_size=99, n_embd=32, n_layer=1, n_head=2, n_positions=16), seed=0))
    assert {name for name, reason in gpt2.items() if reason} == {"transformer.wpe"}
    gemma = quantizable(new_model(GemmaConfig(**sizes, head_dim=16), seed=0))
    assert set(gemma) > {"model.embed_tokens", "lm_head"}
    assert {name for name, reason in gemma.items() if reason} == {"model.embed_tokens", "lm_head"}


def test_modules_are_swapped_but_for_those_ignored(sizes: dict[str, Any]) -> None:
    model = new_model(LlamaConfig(**sizes, attention_bias=True, tie_word_embeddings=False), seed=0)
    prepare_quantized(model, Scheme({INT8: EVERY}, frozenset({"lm_head"})).config())
    kinds = {name: type(module) for name, module in model.named_modules()}
    assert kinds["model.embed_tokens"] is Int8Embedding
    assert kinds["model.layers.1.self_attn.q_proj"] is Int8Linear
    assert model.model.layers[1].self_attn.q_proj.bias is not None
    assert kinds["lm_head"] is nn.Linear
