from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig

from llmos_cli.errors import Damaged, LlmosError, Unsafe, UsageError
from llmos_cli.formats.manifest import Manifest
from llmos_cli.models.load import llama_config, load_config, load_model, new_model
from llmos_cli.models.weights import drop_tied
from llmos_cli.progress import Silent
from llmos_cli.store.local import Store

Put = Callable[..., Manifest]
EVERY = pytest.mark.parametrize("config", ["llama-tied", "llama-untied", "qwen2", "gpt2"], indirect=True)
LLAMA = pytest.mark.parametrize("config", ["llama-tied"], indirect=True)
IDS = torch.arange(20)[None]


def files(config: PretrainedConfig, **changes: Any) -> dict[str, Any]:
    return {"config.json": config.to_diff_dict() | changes}


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_comes_back_bit_for_bit(
    store: Store, put: Put, config: PretrainedConfig, dtype: torch.dtype, capfd: pytest.CaptureFixture[str]
) -> None:
    state = {name: tensor.to(dtype) for name, tensor in drop_tied(new_model(config, seed=1)).items()}
    reference = LlamaForCausalLM if config.model_type == "llama" else None
    model = load_model(store, put(state, files(config)))
    back = drop_tied(model)
    assert back.keys() == state.keys()
    assert all(back[name].dtype == dtype and back[name].equal(state[name]) for name in state)
    assert not model.training
    assert model.dtype == dtype
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.isfinite(model(IDS).logits).all()
    if reference is not None:
        expected = reference.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
        capfd.readouterr()
        assert type(model) is reference
        assert model(IDS).logits.equal(expected(IDS).logits)
    assert capfd.readouterr() == ("", "")


@EVERY
def test_the_embedding_and_the_head_are_one_if_tied(store: Store, put: Put, config: PretrainedConfig) -> None:
    model = load_model(store, put(drop_tied(new_model(config, seed=1)), files(config)))
    one = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert one == config.tie_word_embeddings


@LLAMA
def test_each_tensor_keeps_its_own_dtype_unless_one_is_asked_for(
    store: Store, put: Put, config: PretrainedConfig
) -> None:
    state = {name: tensor.bfloat16() for name, tensor in drop_tied(new_model(config, seed=1)).items()}
    state["model.norm.weight"] = state["model.norm.weight"].float() + 1e-6
    manifest = put(state, files(config))
    model = load_model(store, manifest)
    assert model.model.norm.weight.equal(state["model.norm.weight"])
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert {p.dtype for p in load_model(store, manifest, dtype=torch.float32).parameters()} == {torch.float32}


@LLAMA
def test_buffers_that_are_not_stored_are_computed(store: Store, put: Put, config: PretrainedConfig) -> None:
    fresh = new_model(config, seed=1)
    state = {name: tensor.bfloat16() for name, tensor in drop_tied(fresh).items()}
    loaded = dict(load_model(store, put(state, files(config))).named_buffers())
    assert loaded.keys() == dict(fresh.named_buffers()).keys()
    assert all(loaded[name].equal(buffer) for name, buffer in fresh.named_buffers())


@pytest.mark.parametrize("config", ["gpt2"], indirect=True)
def test_a_file_may_leave_out_the_prefix_of_the_class(store: Store, put: Put, config: PretrainedConfig) -> None:
    state = drop_tied(new_model(config, seed=1))
    short = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    back = drop_tied(load_model(store, put(short, files(config))))
    assert all(back[name].equal(state[name]) for name in state)


@LLAMA
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model.norm.weight": None}, "missing model.norm.weight"),
        ({"model.embed_tokens.weight": None}, "missing lm_head.weight, model.embed_tokens.weight"),
        ({"extra.weight": torch.ones(2)}, "unexpected extra.weight"),
        ({"model.norm.weight": torch.ones(3)}, r"of another shape model.norm.weight \[3\] instead of \[64\]"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    store: Store, put: Put, config: PretrainedConfig, change: dict[str, Any], named: str
) -> None:
    state = drop_tied(new_model(config, seed=1)) | change
    manifest = put({name: tensor for name, tensor in state.items() if tensor is not None}, files(config))
    with pytest.raises(Damaged, match=named):
        load_model(store, manifest)


@LLAMA
@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn])
def test_weights_it_cannot_compute_with_are_refused(
    store: Store, put: Put, config: PretrainedConfig, dtype: torch.dtype
) -> None:
    state = drop_tied(new_model(config, seed=1)) | {"model.norm.weight": torch.ones(64).to(dtype)}
    with pytest.raises(LlmosError, match=r"model\.norm\.weight"):
        load_model(store, put(state, files(config)))


@LLAMA
def test_tied_weights_that_differ_are_both_kept_and_said(store: Store, put: Put, config: PretrainedConfig) -> None:
    state = drop_tied(new_model(config, seed=1))
    state["lm_head.weight"] = state["model.embed_tokens.weight"] + 1
    progress = Silent()
    model = load_model(store, put(state, files(config)), progress=progress)
    assert model.lm_head.weight.equal(state["lm_head.weight"])
    assert "tied weights" in progress.warnings[0]


@LLAMA
@pytest.mark.parametrize(
    "place", [{"auto_map": {"AutoConfig": "evil.Config"}}, {"text_config": {"auto_map": {"AutoModel": "evil.M"}}}]
)
def test_code_that_comes_with_a_model_is_refused(
    store: Store, put: Put, config: PretrainedConfig, place: dict[str, Any]
) -> None:
    with pytest.raises(Unsafe, match="auto_map"):
        load_config(store, put(None, files(config, **place)))


@LLAMA
def test_a_config_cannot_choose_kernels(store: Store, put: Put, config: PretrainedConfig) -> None:
    evil = {"_attn_implementation": "hub/kernel", "attn_implementation": "hub/kernel"}
    model = load_model(store, put(drop_tied(new_model(config, seed=1)), files(config, **evil)))
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"model_type": "never-heard-of"}, UsageError, "never-heard-of"),
        ({"model_type": "clip"}, LlmosError, "clip"),
        ({"hidden_size": 8}, Damaged, "no model_type"),
        ({"model_type": "llama", "hidden_size": "x"}, Damaged, "hidden_size"),
        ({"model_type": "llama", "num_attention_heads": 0}, Damaged, "llama"),
        ([1], Damaged, "not a table"),
        (b"{", Damaged, "not valid JSON"),
    ],
)
def test_a_bad_config_is_one_clear_error(
    store: Store, put: Put, values: Any, error: type[LlmosError], message: str
) -> None:
    with pytest.raises(error, match=message):
        load_model(store, put({"x": torch.ones(1)}, {"config.json": values}))


def test_a_manifest_without_a_config_is_not_a_model(store: Store, put: Put) -> None:
    with pytest.raises(LlmosError, match=r"config\.json"):
        load_model(store, put({"x": torch.ones(1)}))


@LLAMA
def test_generation_defaults_travel_with_the_model(store: Store, put: Put, config: PretrainedConfig) -> None:
    extra = {"generation_config.json": {"eos_token_id": [3, 4], "temperature": 0.5, "do_sample": True}}
    model = load_model(store, put(drop_tied(new_model(config, seed=1)), files(config) | extra))
    assert model.generation_config.eos_token_id == [3, 4]


@EVERY
def test_a_new_model_is_a_function_of_its_seed(config: PretrainedConfig) -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first, again, other = (drop_tied(new_model(config, seed=seed)) for seed in (5, 5, 6))
    assert torch.get_rng_state().equal(before)
    assert all(first[name].equal(again[name]) for name in first)
    assert any(not first[name].equal(other[name]) for name in first)
    assert {tensor.dtype for tensor in first.values()} == {torch.float32}


@LLAMA
def test_loading_leaves_the_random_state_alone(store: Store, put: Put, config: PretrainedConfig) -> None:
    manifest = put(drop_tied(new_model(config, seed=1)), files(config))
    before = torch.get_rng_state()
    load_model(store, manifest)
    assert torch.get_rng_state().equal(before)


def test_depth_is_the_one_dial_for_size() -> None:
    config = llama_config(3, 1000, 128, eos=1, bos=2, pad=0)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (192, 3, 3)
    assert (config.max_position_embeddings, config.eos_token_id, config.tie_word_embeddings) == (128, 1, True)
    assert isinstance(config, LlamaConfig)
    with pytest.raises(UsageError):
        llama_config(0, 1000, 128)
