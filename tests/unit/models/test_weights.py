from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PretrainedConfig

from llmos_cli.errors import LlmosError, NotFound
from llmos_cli.formats.manifest import Manifest
from llmos_cli.models.load import new_model
from llmos_cli.models.weights import TORCH_DTYPES, drop_tied, load_state_dict, state_tensors
from llmos_cli.store.local import Store

Put = Callable[..., Manifest]


def test_every_dtype_and_shape_comes_back_bit_for_bit_in_aligned_memory(store: Store, put: Put) -> None:
    torch.manual_seed(0)
    raw = torch.randint(0, 2, (3, 16), dtype=torch.uint8)
    state = {f"x.{name}": raw.view(dtype).clone() for name, dtype in TORCH_DTYPES.items()}
    state |= {
        "scalar": torch.tensor(1.5, dtype=torch.bfloat16),
        "empty": torch.empty(0, 4),
        "transposed": torch.arange(12.0).reshape(3, 4).t(),
        "nan": torch.tensor([float("nan"), -0.0]),
        "big": torch.randn(3000, 1000),
    }
    loaded = load_state_dict(store, put(state))
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert (
            loaded[name]
            .contiguous()
            .reshape(-1)
            .view(torch.uint8)
            .equal(tensor.contiguous().reshape(-1).view(torch.uint8))
        )
        assert loaded[name].data_ptr() % 64 == 0


def test_a_contiguous_tensor_is_written_from_its_own_memory() -> None:
    tensor = torch.zeros(4, dtype=torch.bfloat16)
    (source,) = state_tensors({"x": tensor})
    view = memoryview(source.data())
    tensor.fill_(1)
    assert bytes(view) == b"\x80\x3f" * 4
    assert (source.dtype, source.shape) == ("BF16", (4,))


def test_tensors_are_named_in_order() -> None:
    assert [item.name for item in state_tensors({"b": torch.ones(1), "a": torch.ones(1)})] == ["a", "b"]


def test_a_dtype_that_safetensors_lacks_is_named() -> None:
    with pytest.raises(LlmosError, match=r"'x'.*complex128"):
        state_tensors({"x": torch.ones(1, dtype=torch.complex128)})


def test_a_manifest_without_weights_is_an_error(store: Store, put: Put) -> None:
    with pytest.raises(NotFound):
        load_state_dict(store, put(None, {"config.json": {}}))


def test_a_folder_is_read_by_itself(store: Store, put: Put) -> None:
    manifest = put({"a": torch.ones(2)})
    moved = Manifest("checkpoint", tuple(type(e)(f"training/{e.path}", e.chunks) for e in manifest.files))
    assert load_state_dict(store, moved, "training")["a"].tolist() == [1, 1]


@pytest.mark.parametrize(("tied", "extra"), [(True, set()), (False, {"lm_head.weight"})])
def test_tied_duplicates_are_left_out(tied: bool, extra: set[str], sizes: dict[str, Any]) -> None:
    config: PretrainedConfig = LlamaConfig(**sizes, tie_word_embeddings=tied)
    model = new_model(config, seed=0)
    state = drop_tied(model)
    assert state.keys() - (model.state_dict().keys() - {"lm_head.weight"}) == extra
    assert "model.embed_tokens.weight" in state


def test_a_tie_that_was_broken_keeps_both_tensors(sizes: dict[str, Any]) -> None:
    model = new_model(LlamaConfig(**sizes, tie_word_embeddings=True), seed=0)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= drop_tied(model).keys()
