import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmos_cli.app import main
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.manifest import Recipe

Put = Callable[..., ObjectId]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(root: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str) -> tuple[int, str, str]:
        code = main(["--store", str(root), *arguments])
        out, err = capfd.readouterr()
        return code, out, err

    return call


def last(out: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(out.splitlines()[-1])
    return values


def test_eval_tells_the_perplexity_and_keeps_a_report(run: Run, put_model: Put, put_data: Put) -> None:
    model, data = put_model("tiny:v1"), put_data()
    code, out, err = run("eval", "tiny:v1", "--data", "web", "--json")
    assert (code, err) == (0, "")
    result = last(out)
    assert (result["ref"], result["kind"], result["model"], result["data"]) == (
        "tiny-eval:v1",
        "report",
        str(model),
        str(data),
    )
    assert 400 < result["perplexity"] < 700
    assert result["tokens"] == 20 * 31 + 4
    code, out, _ = run("-q", "eval", "tiny:v1", "--data", "web")
    assert code == 0
    assert f"perplexity  {result['perplexity']:.4f}" in out


def test_eval_keeps_the_report_where_told_and_takes_an_id(run: Run, put_model: Put, put_data: Put) -> None:
    model = put_model()
    put_data()
    first = last(run("eval", f"@{model.short}", "--data", "web", "--max-rows", "2", "--json")[1])
    assert first["ref"] == f"eval-{model.short}:latest"
    named = last(run("eval", "tiny", "--data", "web", "--max-rows", "2", "--name", "results:a", "--json")[1])
    assert (named["ref"], named["id"], named["made_before"]) == ("results:a", first["id"], True)


def test_quantize_tells_size_and_perplexity_before_and_after(run: Run, put_model: Put, put_data: Put) -> None:
    put_model(recipe=Recipe("train", inputs={"data": put_data()}))
    code, out, err = run("quantize", "tiny", "small", "--max-rows", "4", "--json")
    assert (code, err) == (0, "")
    result = last(out)
    assert (result["ref"], result["kind"], result["scheme"]) == ("small:latest", "model", "int8")
    assert result["bytes_after"] < result["bytes_before"] * 0.3
    assert result["perplexity_after"] == pytest.approx(result["perplexity_before"], rel=0.01)
    _, out, _ = run("-q", "quantize", "tiny", "small", "--max-rows", "4")
    assert "bits a weight" in out
    assert "on 4 rows of web:latest" in out


def test_a_model_for_a_task_is_measured_by_its_task(run: Run, root: Path) -> None:
    texts = root.parent / "texts.csv"
    texts.write_text(
        "text,label\n" + "".join(f"{word} {number},{word}\n" for number in range(8) for word in ("a", "b"))
    )
    assert run("shard", str(texts), "kinds", "--task", "classify", "--tokenizer", "train:300")[0] == 0
    assert run("train", "tiny", "--data", "kinds", "--depth", "1", "--steps", "2", "--batch", "2")[0] == 0
    code, out, _ = run("quantize", "tiny", "small", "--scheme", "int4", "--json")
    assert code == 0
    result = last(out)
    assert result["perplexity_after"] is None
    assert result["metrics_after"]["loss"] == pytest.approx(result["metrics_before"]["loss"], rel=0.05)
    assert run("eval", "small", "--data", "kinds", "--json")[0] == 0


def test_quantize_says_that_perplexity_was_not_measured(run: Run, put_model: Put) -> None:
    put_model()
    code, out, err = run("quantize", "tiny", "small")
    assert code == 0
    assert "perplexity" not in out
    assert "perplexity was not measured" in err
    assert "llmos quantize tiny:latest small:latest --data DATASET" in err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("quantize", "tiny", "small", "--scheme", "int9"), 2, "--scheme int8"),
        (("quantize", "tinny", "small"), 10, "did you mean tiny:latest"),
        (("quantize", "tiny", "bad name"), 2, "malformed"),
        (("quantize", "web", "small"), 2, "a dataset cannot be quantized"),
        (("eval", "tiny"), 2, "--data"),
        (("eval", "tiny", "--data", "webb"), 10, "did you mean web:latest"),
        (("eval", "tiny", "--data", "tiny"), 2, "is a model"),
        (("eval", "tiny", "--data", "web", "--max-rows", "0"), 2, "max-rows"),
    ],
)
def test_bad_input_is_one_clear_error(
    run: Run, put_model: Put, put_data: Put, arguments: tuple[str, ...], *, code: int, said: str
) -> None:
    put_model()
    put_data()
    found, out, err = run(*arguments)
    assert (found, out) == (code, "")
    assert said in err
    assert "Traceback" not in err


def test_a_repeat_needs_no_torch(run: Run, root: Path, put_model: Put, put_data: Put) -> None:
    put_model(recipe=Recipe("train", inputs={"data": put_data()}))
    run("quantize", "tiny", "small", "--max-rows", "2")
    script = "import sys; from llmos_cli.app import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    arguments = ["--store", str(root), "quantize", "tiny", "small", "--max-rows", "2", "--json"]
    found = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    first, second = found.stdout.splitlines()
    assert json.loads(first)["made_before"]
    assert second == "False"
