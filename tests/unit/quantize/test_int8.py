import json
from collections.abc import Callable

import pytest
import torch

from llmos_cli.errors import Damaged, LlmosError, UsageError
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.manifest import Manifest, Recipe
from llmos_cli.formats.names import parse_ref
from llmos_cli.models.load import load_model
from llmos_cli.models.quantized import Int8Embedding, Int8Linear
from llmos_cli.models.schemes import INT8
from llmos_cli.models.weights import load_state_dict
from llmos_cli.progress import Silent
from llmos_cli.quantize import run as quantizing
from llmos_cli.quantize.run import QuantizeResult, Request
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import read_file, read_manifest
from llmos_cli.store.refs.refs import list_refs, read_ref

Put = Callable[..., ObjectId]
IDS = torch.arange(40)[None]


@pytest.fixture
def quantize(store: Store) -> Callable[..., tuple[Manifest, QuantizeResult]]:
    def run(source: ObjectId, name: str = "small") -> tuple[Manifest, QuantizeResult]:
        result = quantizing.quantize(store, source, Request(INT8), parse_ref(name), progress=Silent())
        return read_manifest(store, result.id), result

    return run


Quantize = Callable[..., tuple[Manifest, QuantizeResult]]


@pytest.mark.parametrize("config", ["llama-tied", "llama-untied", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantized_model_loads_and_says_nearly_the_same(
    store: Store, put_model: Put, quantize: Quantize, config: str, dtype: torch.dtype
) -> None:
    source = put_model(config=config, dtype=dtype)
    manifest, result = quantize(source)
    plain = load_model(store, read_manifest(store, source))
    progress = Silent()
    small = load_model(store, manifest, progress=progress)
    assert progress.warnings == []
    kinds = [type(module) for module in small.modules()]
    assert kinds.count(Int8Embedding) == 1
    assert kinds.count(Int8Linear) == (8 if config == "gpt2" else 14) + 1
    assert not any(isinstance(module, torch.nn.Linear) for module in small.modules())
    assert small.dtype == dtype
    assert not any(parameter.requires_grad for parameter in small.parameters())
    head, embedding = small.get_output_embeddings(), small.get_input_embeddings()
    assert (head.weight is embedding.weight) == (config != "llama-untied")
    assert head.weight_scale.equal(embedding.weight_scale) == (config != "llama-untied")
    with torch.no_grad():
        before, after = plain(IDS).logits.float(), small(IDS).logits.float()
    assert ((before - after).norm() / before.norm()).item() < 0.02
    assert result.bytes_after < result.bytes_before * (0.3 if dtype == torch.float32 else 0.6)


def test_what_is_stored_is_the_scheme_and_nothing_else(store: Store, put_model: Put, quantize: Quantize) -> None:
    source = put_model(dtype=torch.bfloat16, files={"generation_config.json": b"{}", "pytorch_model.bin": b"x"})
    manifest, result = quantize(source)
    original = load_state_dict(store, read_manifest(store, source))
    state = load_state_dict(store, manifest)
    assert manifest.kind == "model"
    assert {entry.path for entry in manifest.files} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for name, tensor in original.items():
        if tensor.ndim == 2:
            scale = state[f"{name}_scale"]
            assert (state[name].dtype, scale.dtype, tuple(scale.shape)) == (torch.int8, torch.float32, (len(tensor), 1))
            assert ((state[name] * scale - tensor.float()).abs() <= scale * 0.50001).all()
        else:
            assert state[name].equal(tensor)
    entry = manifest.file("config.json")
    assert entry is not None
    config = json.loads(read_file(store, entry))
    assert config["quantization_config"]["format"] == "int-quantized"
    assert manifest.recipe is not None
    assert manifest.recipe.inputs == {"model": source}
    assert manifest.meta["quantized"] == 15
    assert manifest.meta["parameters"] == sum(tensor.numel() for tensor in original.values())
    assert result.bytes_after == sum(tensor.nbytes for tensor in state.values())
    assert result.bits_per_weight == pytest.approx(8 * result.bytes_after / manifest.meta["parameters"], abs=1e-3)


def test_layers_that_stay_are_listed_with_the_reason(put_model: Put, quantize: Quantize) -> None:
    _, result = quantize(put_model(config="gpt2"))
    assert list(result.kept) == ["transformer.wpe.weight"]
    assert "positions" in result.kept["transformer.wpe.weight"]


def test_an_embedding_that_scales_itself_stays_with_its_head(store: Store, put_model: Put, quantize: Quantize) -> None:
    manifest, result = quantize(put_model(config="gemma"))
    assert set(result.kept) == {"lm_head.weight", "model.embed_tokens.weight"}
    assert "GemmaTextScaledWordEmbedding" in result.kept["model.embed_tokens.weight"]
    assert "shares its weight" in result.kept["lm_head.weight"]
    assert torch.isfinite(load_model(store, manifest)(IDS).logits).all()


def test_a_class_that_computes_with_weights_past_its_layers_is_refused(
    store: Store, put_model: Put, capfd: pytest.CaptureFixture[str]
) -> None:
    source = put_model(config="mamba")
    capfd.readouterr()
    with pytest.raises(LlmosError, match="mamba"):
        quantizing.quantize(store, source, Request(INT8), parse_ref("small"), progress=Silent())
    assert read_ref(store, parse_ref("small")) is None
    assert capfd.readouterr() == ("", "")


def test_a_layer_stored_in_a_narrow_dtype_stays(store: Store, put_model: Put, quantize: Quantize) -> None:
    name = "model.layers.0.mlp.up_proj.weight"

    def narrow(state: dict[str, torch.Tensor]) -> None:
        state[name] = state[name].to(torch.float8_e4m3fn)

    manifest, result = quantize(put_model(change=narrow))
    assert result.kept == {"model.layers.*.mlp.up_proj.weight": "stored as F8_E4M3"}
    assert load_state_dict(store, manifest)[name].dtype == torch.float8_e4m3fn


def test_the_same_model_again_is_found(store: Store, put_model: Put, quantize: Quantize) -> None:
    source = put_model()
    _, first = quantize(source, "one")
    _, second = quantize(source, "two")
    assert not first.made_before
    assert second.made_before
    assert first.id == second.id
    assert {str(entry.ref) for entry in list_refs(store) if entry.id == first.id} == {"one:latest", "two:latest"}


def test_a_checkpoint_leaves_its_training_state_behind(put_model: Put, quantize: Quantize) -> None:
    files = {"training/state.json": b"{}", "training/state.safetensors": b"x"}
    manifest, _ = quantize(put_model(kind="checkpoint", files=files))
    assert manifest.kind == "model"
    assert not any(entry.path.startswith("training/") for entry in manifest.files)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.self_attn.v_proj.weight", "model.norm.weight"])
def test_a_weight_that_is_not_finite_is_named_and_changes_nothing(
    store: Store, put_model: Put, value: float, name: str
) -> None:
    def spoil(state: dict[str, torch.Tensor]) -> None:
        state[name].view(-1)[7] = value

    source = put_model(change=spoil)
    with pytest.raises(Damaged, match=name.replace(".", r"\.")):
        quantizing.quantize(store, source, Request(INT8), parse_ref("small"), progress=Silent())
    assert read_ref(store, parse_ref("small")) is None


def test_a_model_is_quantized_once(put_model: Put, quantize: Quantize) -> None:
    _, result = quantize(put_model())
    with pytest.raises(UsageError, match="already"):
        quantize(result.id)


def test_only_models_are_quantized(put_data: Put, quantize: Quantize) -> None:
    with pytest.raises(UsageError, match="dataset"):
        quantize(put_data())


def test_weights_of_another_shape_are_named(put_model: Put, quantize: Quantize) -> None:
    with pytest.raises(Damaged, match=r"embed_tokens.*512, 64.*512, 32"):
        quantize(put_model(settings={"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}))


def test_blocks_of_rows_give_what_the_whole_gives(
    store: Store, put_model: Put, quantize: Quantize, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = quantize(put_model(config="gpt2"))
    monkeypatch.setattr("llmos_cli.quantize.write._BLOCK_BYTES", 700)
    other = put_model("again", config="gpt2", recipe=Recipe("test"))
    parts, result = quantize(other)
    assert not result.made_before
    assert parts.file("model.safetensors") == whole.file("model.safetensors")
