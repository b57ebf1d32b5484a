"""A graph answers as the model does, whatever runs it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llmos_cli.app import main
from llmos_cli.errors import LlmosError
from llmos_cli.export.run import GRAPHS, export
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.names import parse_ref
from llmos_cli.models.schemes import INT8
from llmos_cli.progress import Silent
from llmos_cli.quantize.run import Request, quantize
from llmos_cli.store.local import Store

Put = Callable[..., ObjectId]


@pytest.mark.slow
@pytest.mark.parametrize(("fmt", "config"), [("pt2", "bert"), ("onnx", "llama-tied"), ("openvino", "gpt2")])
def test_a_graph_answers_as_the_model_does(
    root: Path, put_model: Put, fmt: str, config: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    put_model(config=config)
    call = ["--store", str(root), "export", "tiny", "--format", fmt, "--json", "--to"]
    assert main([*call, str(tmp_path / "out")]) == 0
    made = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert made["parity"]["same_top"] == 1.0
    assert made["parity"]["kl"] < 1e-6
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json"} < written
    assert any(name.startswith("model.") for name in written)
    assert main([*call, str(tmp_path / "again")]) == 0
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["made_before"]


@pytest.mark.parametrize("fmt", GRAPHS)
def test_quantized_models_are_refused_before_any_work(store: Store, put_model: Put, fmt: str) -> None:
    small = quantize(store, put_model(), Request(INT8), parse_ref("small"), progress=Silent())
    with pytest.raises(LlmosError, match="is quantized"):
        export(store, small.id, "small", fmt, None, None, progress=Silent())
