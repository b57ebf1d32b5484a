"""What can be chosen beside the form: a size, zeros, a program to run it, memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmos_cli.app import main
from llmos_cli.errors import LlmosError, UsageError
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.manifest import Manifest
from llmos_cli.formats.names import parse_ref
from llmos_cli.models.config import read_config
from llmos_cli.models.load import load_model
from llmos_cli.models.quantized import unpack_nibbles
from llmos_cli.models.schemes import INT8, W8A8, Form, int4
from llmos_cli.models.weights import load_state_dict
from llmos_cli.progress import Silent
from llmos_cli.quantize.memory import peak_bytes
from llmos_cli.quantize.mixed import Option, spend
from llmos_cli.quantize.plan import make_plan
from llmos_cli.quantize.run import Request, make_request, quantize
from llmos_cli.quantize.targets import TARGETS, scheme_for
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import read_file, read_manifest

Put = Callable[..., ObjectId]
IDS = torch.arange(2 * 24).view(2, 24)


def make(store: Store, source: ObjectId, request: Request, **more: Any) -> Manifest:
    result = quantize(store, source, request, parse_ref("small"), progress=Silent(), **more)
    return read_manifest(store, result.id)


def test_bytes_go_where_they_buy_most() -> None:
    low, high = int4(128), INT8
    options = {
        "sensitive": [Option(low, 50, 0.5), Option(high, 100, 0.1)],
        "robust": [Option(low, 50, 0.2), Option(high, 100, 0.19)],
        "harmed": [Option(low, 50, 0.1), Option(high, 100, 0.2)],
    }
    forms = [{name: option.form for name, option in spend(options, room).items()} for room in (150, 249, 1000)]
    assert forms[0] == dict.fromkeys(options, low)
    assert forms[1] == {"sensitive": high, "robust": low, "harmed": low}
    assert forms[2] == {"sensitive": high, "robust": high, "harmed": low}


def spread(state: dict[str, torch.Tensor]) -> None:
    """Outliers in one layer, which few bits cannot hold."""
    state["model.layers.1.self_attn.o_proj.weight"][:, ::32] *= 6


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_size_is_met_and_what_is_sensitive_gets_more(
    store: Store, put_model: Put, put_data: Put, calibrated: bool, tmp_path: Path
) -> None:
    source = put_model(change=spread)
    data = put_data(rows=64) if calibrated else None
    request = make_request("int4", group=None, method="search", data=data, rows=64, bits=6.5)
    made = make(store, source, request)
    assert 5.5 < float(str(made.meta["bits_per_weight"])) <= 6.5
    groups = read_config(store, made)["quantization_config"]["config_groups"].values()
    forms = {target: group["weights"]["num_bits"] for group in groups for target in group["targets"]}
    assert forms["model.layers.1.self_attn.o_proj"] == 8
    assert 4 in forms.values()
    for entry in made.files:
        (tmp_path / entry.path).write_bytes(read_file(store, entry))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.inference_mode():
        ours = load_model(store, made)(IDS).logits
        assert torch.allclose(theirs(IDS).logits, ours, atol=1e-5 * float(ours.abs().max()))
    assert make(store, source, request) == made


def test_a_size_that_cannot_be_met_is_refused_with_its_bound(store: Store, put_model: Put) -> None:
    request = make_request("int4", group=None, method=None, data=None, rows=64, bits=4.0)
    with pytest.raises(UsageError, match=r"has \d\.\d\d bits a weight"):
        make(store, put_model(), request)


@pytest.mark.parametrize("form", [INT8, int4(), W8A8], ids=str)
@pytest.mark.parametrize("config", ["llama-tied", "gpt2"])
def test_half_of_the_weights_are_zero(store: Store, put_model: Put, form: Form, config: str) -> None:
    source = put_model(config=config)
    for sparsity in ("0.75", "2:4"):
        made = make(store, source, Request(form, "search" if form.group else "rtn", sparsity=sparsity))
        assert made.meta["sparsity"] == sparsity
        state = load_state_dict(store, made)
        name = next(name for name in sorted(state) if "down_proj.weight" in name or "mlp.c_proj.weight" in name)
        values = unpack_nibbles(state[name]) if form.packed else state[name]
        if sparsity == "2:4":
            assert int((values.view(len(values), -1, 4) != 0).sum(-1).max()) <= 2
        else:
            assert float((values == 0).float().mean()) >= 0.75
        embedding = next(state[name] for name in state if name.endswith(("embed_tokens.weight", "wte.weight")))
        assert float((embedding == 0).float().mean()) < 0.1


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"scheme": "int4", "sparsity": "0.5", "method": "gptq"}, "would fill the zeros"),
        ({"scheme": "int8", "sparsity": "3:4"}, "neither a share"),
        ({"scheme": "int8", "sparsity": "1.5"}, "neither a share"),
        ({"scheme": "int8", "bits": 5.0}, "between int4 and int8"),
        ({"scheme": "int4", "bits": 5.0, "group": 32}, "between int4 and int8"),
        ({"scheme": "int4", "bits": 5.0, "plain_ends": True}, "only transformers"),
    ],
)
def test_choices_that_make_no_sense_are_refused(arguments: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        make_request(**{"group": None, "method": None, "data": None, "rows": 128, **arguments})


def test_a_program_gets_what_it_has_a_kernel_for() -> None:
    assert {name: scheme_for(name, None) for name in TARGETS} == {
        "transformers": "int8", "vllm": "w8a8", "llama.cpp": "int8", "cpu": "int8", "h100": "fp8",
    }  # fmt: skip
    for name, target in TARGETS.items():
        assert set(target.schemes) | set(target.why) == {"int8", "int4", "w8a8", "fp8"}
        for scheme in target.why:
            with pytest.raises(UsageError, match=f"not for {name}"):
                scheme_for(name, scheme)


def test_for_vllm_the_ends_stay(store: Store, put_model: Put) -> None:
    made = make(store, put_model(config="llama-untied"), Request(int4(128), "rtn", plain_ends=True))
    config = read_config(store, made)["quantization_config"]
    assert config["format"] == "pack-quantized"
    assert {"model.embed_tokens", "lm_head", "model.layers.0.self_attn.q_proj"} <= set(config["ignore"])
    with pytest.raises(LlmosError, match="only transformers reads quantized gpt2"):
        make(store, put_model("gpt", config="gpt2"), Request(int4(), "rtn", plain_ends=True))


def test_memory_is_told_before_and_a_bound_is_held(
    root: Path, store: Store, put_model: Put, put_data: Put, capfd: pytest.CaptureFixture[str]
) -> None:
    source, told = put_model(), []
    plan = make_plan(store, read_manifest(store, source), int4())
    assert peak_bytes(plan, calibrated=True) > peak_bytes(plan, calibrated=False)
    make(store, source, Request(INT8), started=told.append)
    assert told[0] > 100e6
    make(store, source, Request(INT8), started=told.append)
    assert len(told) == 1, "there was nothing to do"
    call = ["--store", str(root), "quantize", "tiny", "less", "--scheme", "fp8"]
    assert main([*call, "--max-memory", "50MB"]) == 2
    assert "--max-memory allows 50 MB" in capfd.readouterr().err
    assert main([*call, "--max-memory", "100GB"]) == 0
    assert "of memory" in capfd.readouterr().err


def test_the_command_knows_programs(root: Path, put_model: Put, capfd: pytest.CaptureFixture[str]) -> None:
    put_model()
    call = ["--store", str(root), "quantize", "tiny", "small"]
    assert main([*call, "--for", "vllm", "--scheme", "int8"]) == 2
    assert "use --scheme w8a8 or fp8 or int4" in capfd.readouterr().err
    assert main([*call, "--for", "vlm"]) == 2
    assert "use --for vllm" in capfd.readouterr().err
    assert main([*call, "--for", "llama.cpp", "--json"]) == 0
    assert '"scheme": "int8"' in capfd.readouterr().out.replace('":"', '": "')
