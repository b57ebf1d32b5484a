"""Every form of weights: what is written, that others read it, and what calibration adds."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from llmos_cli.errors import Damaged, LlmosError, UsageError
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.manifest import Manifest
from llmos_cli.formats.names import parse_ref
from llmos_cli.models.load import load_model
from llmos_cli.models.quantized import DynamicLinear, Int4Linear, Int8Embedding, pack_nibbles, unpack_nibbles
from llmos_cli.models.schemes import FP8, INT8, KNOWN, W8A8, Form, Scheme, int4, read_scheme
from llmos_cli.progress import Silent
from llmos_cli.quantize import calibrate
from llmos_cli.quantize import run as quantizing
from llmos_cli.quantize.run import Request, make_request
from llmos_cli.store.inspect.tensors import tensor_table
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import read_file, read_manifest

Put = Callable[..., ObjectId]
IDS = torch.arange(2 * 24).view(2, 24)


def make(store: Store, source: ObjectId, request: Request) -> Manifest:
    return read_manifest(store, quantizing.quantize(store, source, request, parse_ref("small"), progress=Silent()).id)


def checked_out(store: Store, manifest: Manifest, folder: Path) -> Path:
    for entry in manifest.files:
        (folder / entry.path).parent.mkdir(parents=True, exist_ok=True)
        (folder / entry.path).write_bytes(read_file(store, entry))
    return folder


def test_nibbles_lie_as_compressed_tensors_lays_them() -> None:
    torch.manual_seed(0)
    values = torch.randint(-8, 8, (5, 64), dtype=torch.int8)
    packed = pack_nibbles(values)
    assert torch.equal(packed, pack_to_int32(values, 4))
    assert torch.equal(unpack_nibbles(packed), values)
    assert torch.equal(unpack_from_int32(packed, 4, torch.Size(values.shape)).to(torch.int8), values)


@pytest.mark.parametrize("form", KNOWN, ids=str)
def test_a_scheme_reads_back_what_it_says(form: Form) -> None:
    mixed = {INT8: frozenset({"lm_head"})} if form != INT8 else {}
    scheme = Scheme({form: frozenset({"Linear"}), **mixed}, frozenset({"model.layers.0.mlp.up_proj"}))
    read = read_scheme(scheme.config())
    assert read == scheme
    assert read.form_of("model.layers.1.mlp.up_proj", "Linear") == form
    assert read.form_of("model.layers.0.mlp.up_proj", "Linear") is None
    assert read.form_of("lm_head", "Linear") == (INT8 if mixed else form)


@pytest.mark.parametrize("config", ["llama-tied", "llama-untied"])
@pytest.mark.parametrize("form", [INT8, int4(), int4(64), W8A8, FP8], ids=str)
def test_transformers_reads_the_same_model(
    store: Store, put_model: Put, form: Form, config: str, tmp_path: Path
) -> None:
    made = make(store, put_model(config=config), Request(form, "search" if form.group else "rtn"))
    ours = load_model(store, made)
    theirs = AutoModelForCausalLM.from_pretrained(checked_out(store, made, tmp_path / "model"))
    with torch.inference_mode():
        a, b = ours(IDS).logits, theirs(IDS).logits
    # Activations are rounded, too, and then a last bit can move a value to the next step.
    assert (a - b).abs().max() < (0.05 if form.dynamic else 1e-5) * a.abs().max()


@pytest.mark.parametrize("form", [INT8, int4(), W8A8], ids=str)
def test_an_encoder_is_quantized_with_its_head(store: Store, put_model: Put, form: Form, tmp_path: Path) -> None:
    source = put_model(config="bert")
    made = make(store, source, Request(form, "search" if form.group else "rtn"))
    ours = load_model(store, made, head="masked")
    plain = load_model(store, read_manifest(store, source), head="masked")
    theirs = AutoModelForMaskedLM.from_pretrained(checked_out(store, made, tmp_path / "model"))
    with torch.inference_mode():
        a, b, c = (model(IDS).logits for model in (ours, theirs, plain))
    assert (a - b).abs().max() < (0.05 if form.dynamic else 1e-5) * a.abs().max()
    assert (a - c).abs().max() < (0.3 if form.packed else 0.05) * c.abs().max()
    assert tensor_table(store, made)[
        "bert.encoder.layer.0.attention.self.query.weight" + ("_packed" if form.packed else "")
    ][1].dtype == ("I32" if form.packed else "I8")


def test_four_bits_take_the_layers_and_eight_what_is_sensitive(store: Store, put_model: Put) -> None:
    made = make(store, put_model(config="llama-untied"), Request(int4(), "search"))
    modules = dict(load_model(store, made).named_modules())
    assert isinstance(modules["model.embed_tokens"], Int8Embedding)
    assert not isinstance(modules["lm_head"], Int4Linear)
    assert sum(isinstance(module, Int4Linear) for module in modules.values()) == 14
    table = {name: info for name, (_, info) in tensor_table(store, made).items()}
    packed = table["model.layers.0.mlp.down_proj.weight_packed"]
    assert (packed.dtype, packed.shape) == ("I32", (64, 128 // 8))
    assert table["model.layers.0.mlp.down_proj.weight_scale"].shape == (64, 128 // 32)
    assert made.meta["scheme"] == "int4"
    assert 4.5 < float(str(made.meta["bits_per_weight"])) < 8


def test_columns_that_no_group_divides_take_eight_bits_and_it_is_said(store: Store, put_model: Put) -> None:
    made = make(store, put_model(config="llama-tied"), Request(int4(128), "rtn"))
    kept = made.meta["kept"]
    assert isinstance(kept, dict)
    assert kept["model.layers.*.self_attn.q_proj.weight"] == "int8: its 64 columns are no multiple of 128"
    assert "model.layers.*.mlp.down_proj.weight" not in kept


def test_dynamic_layers_say_what_stays(store: Store, put_model: Put) -> None:
    made = make(store, put_model(config="llama-untied"), Request(W8A8))
    model = load_model(store, made)
    assert sum(isinstance(module, DynamicLinear) for module in model.modules()) == 14
    kept = made.meta["kept"]
    assert isinstance(kept, dict)
    assert set(kept) == {"lm_head.weight", "model.embed_tokens.weight"}


@pytest.mark.parametrize("config", ["llama-tied", "gpt2"])
def test_calibration_comes_nearer_to_the_model_than_the_best_scales(
    store: Store, put_model: Put, put_data: Put, config: str
) -> None:
    source, data = put_model(config=config), put_data(rows=64)
    with torch.inference_mode():
        plain = load_model(store, read_manifest(store, source))(IDS).logits
        errors = [
            float((load_model(store, make(store, source, request))(IDS).logits - plain).square().mean())
            for request in (
                Request(int4(), "rtn"),
                Request(int4(), "search"),
                Request(int4(), "awq", data, rows=64),
                Request(int4(), "gptq", data, rows=64),
            )
        ]
    rtn, search, awq, gptq = errors
    assert gptq < search < rtn
    assert awq < rtn


@pytest.mark.parametrize("config", ["llama-tied", "gpt2"])
def test_smoothing_moves_outliers_from_inputs_into_weights(
    store: Store, put_model: Put, put_data: Put, config: str, tmp_path: Path
) -> None:
    def spread(state: dict[str, torch.Tensor]) -> None:
        for name, tensor in state.items():
            if "layernorm" in name or "ln_" in name:
                tensor[3::16] *= 30

    source, data = put_model(config=config, change=spread), put_data(rows=64)
    made = [make(store, source, request) for request in (Request(W8A8), Request(W8A8, "smooth", data, rows=64))]
    with torch.inference_mode():
        plain = load_model(store, read_manifest(store, source))(IDS).logits
        rough, smooth = (float((load_model(store, one)(IDS).logits - plain).square().mean()) for one in made)
    assert smooth < 0.5 * rough
    assert tensor_table(store, made[0]).keys() == tensor_table(store, made[1]).keys(), "folded into the norms"
    if config == "llama-tied":
        theirs = AutoModelForCausalLM.from_pretrained(checked_out(store, made[1], tmp_path / "model"))
        with torch.inference_mode():
            assert (theirs(IDS).logits - plain).square().mean() < 0.5 * rough


class _Stop(Exception):
    pass


@pytest.mark.parametrize(("form", "method"), [(int4(), "gptq"), (int4(), "awq"), (W8A8, "smooth")], ids=str)
def test_a_calibration_that_was_stopped_goes_on_and_ends_in_the_same_id(
    store: Store, put_model: Put, put_data: Put, form: Form, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, data = put_model(), put_data(rows=64)
    request = Request(form, method, data, rows=64)
    one_block, calls = calibrate._one_block, itertools.count()

    def stopping(*arguments: Any) -> Any:
        if next(calls) == 1:
            raise _Stop
        return one_block(*arguments)

    monkeypatch.setattr(calibrate, "_one_block", stopping)
    with pytest.raises(_Stop):
        quantizing.quantize(store, source, request, parse_ref("small"), progress=Silent())
    resumed = quantizing.quantize(store, source, request, parse_ref("small"), progress=Silent())
    assert next(calls) == 3, "the first block was not calibrated again"
    monkeypatch.undo()
    monkeypatch.setattr("llmos_cli.quantize.run.find_made", lambda *_: None)
    monkeypatch.setattr("llmos_cli.quantize.calibrate.find_made", lambda *_: None)
    through = quantizing.quantize(store, source, request, parse_ref("again"), progress=Silent())
    assert resumed.id == through.id


def test_what_cannot_be_calibrated_is_refused(store: Store, put_model: Put, put_data: Put) -> None:
    with pytest.raises(UsageError, match="at least 1,024 tokens"):
        make(store, put_model(), Request(int4(), "gptq", put_data("few", rows=4)))

    def spoil(state: dict[str, torch.Tensor]) -> None:
        state["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.nan

    with pytest.raises(Damaged, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        make(store, put_model("bad", change=spoil), Request(int4(), "gptq", put_data(rows=64)))
    with pytest.raises(LlmosError, match=r"--method search|be calibrated|quantized"):
        make(store, put_model("mamba", config="mamba"), Request(int4(), "gptq", put_data(rows=64)))


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"scheme": "int8", "group": 32}, "--group is for --scheme int4"),
        ({"scheme": "fp8", "method": "gptq"}, "--method gptq is not for --scheme fp8"),
        ({"scheme": "int4", "group": 48}, "--group 48 is not offered"),
        ({"scheme": "int4", "method": "gptq"}, "needs a dataset"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(arguments: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        make_request(**{"group": None, "method": None, "data": None, "rows": 128, **arguments})
