from pathlib import Path

import pytest
import torch

from llmos_cli.data.make import Request, make_dataset
from llmos_cli.formats.names import parse_ref
from llmos_cli.models.config import bert_config, llama_config, parse_config
from llmos_cli.models.load import new_model
from llmos_cli.progress import Silent
from llmos_cli.store.local import init_store, open_store
from llmos_cli.train.config import Options
from llmos_cli.train.parallel.resources import (
    Device,
    Resources,
    Shape,
    _shape,
    estimate,
    find_resources,
    foresee,
    shape_of,
)
from llmos_cli.train.plan import make_plan

SHAPE = Shape(parameters=10_000_000, hidden=512, inner=1408, layers=8, vocab=32_000)
GPT2 = {"model_type": "gpt2", "vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 32}


@pytest.mark.parametrize(
    "config",
    [
        llama_config(3, 500, 64),
        parse_config({**llama_config(2, 500, 64).to_dict(), "num_attention_heads": 4, "num_key_value_heads": 2}),
        bert_config(2, 500, 64, pad=0),
        parse_config(GPT2 | {"tie_word_embeddings": True}),
    ],
    ids=["llama", "grouped", "bert", "gpt2"],
)
def test_parameters_are_counted_from_a_config_to_a_twentieth(config: object) -> None:
    model = new_model(config, seed=0, head="masked" if config.model_type == "bert" else "causal")  # type: ignore[arg-type,attr-defined]
    real = sum(parameter.numel() for parameter in model.parameters())
    assert _shape(config.to_dict(), "it").parameters == pytest.approx(real, rel=0.05)  # type: ignore[attr-defined]


def test_what_is_kept_for_the_backward_pass_is_about_what_torch_keeps() -> None:
    """Storages that autograd holds when the loss is known, of a model whose block is large beside the rest."""
    model = new_model(llama_config(3, 64, 64), seed=0).train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=torch.zeros(4, 64, dtype=torch.int64), use_cache=False).logits.sum()
    held = sum(size for place, size in kept.items() if place not in weights)
    shape = _shape(model.config.to_dict(), "it")
    assert held < estimate(shape, 4, 64, precision="fp32").activations < 2.2 * held


def test_fewer_rows_and_half_precision_take_less_and_more_processes_more() -> None:
    whole = estimate(SHAPE, 16, 512, precision="fp32")
    assert (whole.weights, whole.gradients, whole.optimizer) == (40_000_000, 40_000_000, 80_000_000)
    assert estimate(SHAPE, 4, 512, precision="fp32").activations == pytest.approx(whole.activations / 4)
    assert estimate(SHAPE, 16, 512, precision="bf16").activations < whole.activations
    assert estimate(SHAPE, 16, 512, precision="fp32", processes=2).gradients == 80_000_000


def test_the_cheapest_layout_that_fits_is_proposed(tmp_path: Path) -> None:
    source = tmp_path / "text.txt"
    source.write_text("some words and more of them. " * 200)
    init_store(tmp_path / ".llmos")
    with open_store(tmp_path / ".llmos") as store:
        make_dataset(store, parse_ref("text"), Request((str(source),), "train:300", 32, 1 << 20), progress=Silent())
        options = Options(steps=5, batch=64, depth=8)
        plan = make_plan(store, "big", data="text", model=None, options=options)
        assert find_resources(store).memory > 0

        def proposed(memory: int, *cards: int) -> str | None:
            devices = tuple(Device("card", free) for free in cards)
            layout = foresee(store, plan, Resources(devices, 2, memory, 1 << 40)).proposed
            return None if layout is None else layout.options

        shape = shape_of(store, plan)
        whole, quarter = (estimate(shape, rows, 32, precision="fp32") for rows in (64, 16))
        half = estimate(shape, 64, 32, precision="bf16")
        plenty = 1 << 40
        assert proposed(plenty) == ""
        assert proposed(_with_room(quarter.total)) == "--accumulate 4"
        assert proposed(whole.weights) is None
        assert proposed(plenty, plenty) == ""
        assert proposed(plenty, _with_room(quarter.device)) == "--accumulate 4"
        assert proposed(plenty, _with_room(whole.weights * 4)) is None
        assert proposed(whole.copy, plenty) is None, "the copy for a checkpoint does not fit beside the libraries"
        assert half.device < whole.device


def _with_room(need: int) -> int:
    return int(need / 0.9) + 1
