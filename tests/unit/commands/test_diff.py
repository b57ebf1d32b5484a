"""`llmos diff`: what a person and a script see of two objects."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmos_cli.formats.manifest import Manifest, Recipe
from llmos_cli.formats.names import parse_ref
from llmos_cli.formats.safetensors import encode_header
from llmos_cli.store.local import open_store
from llmos_cli.store.transaction import begin

Llmos = Callable[..., Any]
RNG = np.random.default_rng(0)
W = {f"layers.{number}.weight": RNG.standard_normal((4, 8)).astype(np.float32) for number in range(4)}
CONFIG = {"model_type": "llama", "size": 8}


def safetensors(tensors: Mapping[str, Any]) -> bytes:
    head = encode_header([(name, "F32", array.shape) for name, array in tensors.items()], {})
    return head + b"".join(array.tobytes() for array in tensors.values())


def write(folder: Path, tensors: Mapping[str, Any], **files: Any) -> Path:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(safetensors(tensors))
    (folder / "config.json").write_text(json.dumps(files.pop("config", CONFIG)))
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def models(llmos: Llmos, store: Path) -> None:
    """base, and tuned: one tensor moved little, one much, one is gone, one is new; a setting and a text differ."""
    first, second, third, last = W
    tuned = {first: W[first], second: W[second] * 1.01, third: W[third] * 2, "head.weight": W[last]}
    here = store.parent
    assert llmos("add", write(here / "base", W, notes="one\ntwo\n"), "base").code == 0
    assert (
        llmos("add", write(here / "tuned", tuned, config=CONFIG | {"size": 9}, notes="one\n2\n3\n"), "tuned").code == 0
    )


def test_a_summary_and_what_changed_most_first(llmos: Llmos, models: None) -> None:
    ran = llmos("diff", "base", "tuned")
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert lines[0].startswith("base:latest @")
    assert " -> tuned:latest @" in lines[0]
    facts = {line[2:10].strip(): line[10:].strip() for line in lines[1:6]}
    assert facts["tensors"] == "1 equal (128 B), 2 changed (256 B), 1 added (128 B), 1 removed (128 B)"
    assert facts["values"] == "64 of 96 differ (66.7 %)"
    assert facts["change"].startswith("L2 ")
    assert facts["files"] == "3 changed"
    header = next(line for line in lines if line.startswith("TENSOR"))
    assert header.split() == ["TENSOR", "L2", "VALUES", "LARGEST", "COSINE", "BITS", "MEAN"]
    first, second = lines[lines.index(header) + 1 :][:2]
    assert first.split()[:2] == ["layers.2.weight", "1.00"]
    assert second.split()[:2] == ["layers.1.weight", "0.0100"]
    assert any(line.split() == ["head.weight", "added", "-", "F32", "[4,8]"] for line in lines)
    assert any(line.split() == ["layers.3.weight", "removed", "F32", "[4,8]", "-"] for line in lines)
    assert "    ~ size: 8 -> 9" in lines
    assert "2 lines added, 1 removed" in ran.out


def test_the_same_as_json(llmos: Llmos, models: None) -> None:
    found = llmos("diff", "base", "tuned", "--json").json
    assert (found["old"]["ref"], found["new"]["ref"], found["same"]) == ("base:latest", "tuned:latest", False)
    assert found["summary"]["tensors"] == {"equal": 1, "changed": 2, "added": 1, "removed": 1}
    assert found["summary"]["files"] == {"equal": 0, "changed": 3, "added": 0, "removed": 0}
    assert found["summary"]["values"] == {"compared": 96, "changed": 64}
    tensors = {tensor["name"]: tensor for tensor in found["tensors"]}
    assert tensors["layers.0.weight"]["status"] == "equal"
    assert tensors["layers.0.weight"]["distance"] is None
    moved = tensors["layers.2.weight"]
    assert moved["new"] == {"file": "model.safetensors", "dtype": "F32", "shape": [4, 8], "size": 128}
    assert moved["distance"]["relative"] == pytest.approx(1)
    assert moved["distance"]["cosine"] == pytest.approx(1)
    assert 0 < moved["distance"]["bits"] < 9  # twice a value is one up in its exponent
    assert moved["distance"]["infinite"] == {"old": 0, "new": 0}
    files = {file["path"]: file for file in found["files"]}
    assert files["config.json"]["changes"] == [{"path": "size", "status": "changed", "old": 8, "new": 9}]
    assert files["notes"]["lines"] == {"added": 2, "removed": 1}


def test_an_object_and_itself(llmos: Llmos, models: None) -> None:
    ran = llmos("diff", "base", "base:latest", "--exit-code")
    assert ran.code == 0
    assert ran.out.splitlines()[1] == "  the same object"
    assert llmos("diff", "base", "base", "--json").json["same"] is True


def test_exit_code_tells_only_if_asked(llmos: Llmos, models: None) -> None:
    assert llmos("diff", "base", "tuned").code == 0
    ran = llmos("diff", "base", "tuned", "--exit-code")
    assert (ran.code, ran.err) == (1, "")
    assert llmos("diff", "base", "tuned", "--exit-code", "--json").json["same"] is False


def test_other_files_for_equal_tensors(llmos: Llmos, store: Path) -> None:
    here = store.parent
    llmos("add", write(here / "one", W), "one")
    two = write(here / "two", {})
    (two / "model.safetensors").unlink()
    shards = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(W)}
    for shard in set(shards.values()):
        (two / shard).write_bytes(safetensors({name: W[name] for name in W if shards[name] == shard}))
    (two / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    llmos("add", two, "two")
    assert "all 4 equal; only the files they lie in differ (1 file -> 2 files)" in llmos("diff", "one", "two").out
    (two / "x").write_text("x")
    llmos("add", two, "three")
    assert "  tensors  all 4 equal\n" in llmos("diff", "two", "three").out


def test_what_broke_stands_first(llmos: Llmos, store: Path) -> None:
    here = store.parent
    first, second, third, _ = W
    broken, zeros = W[third].copy(), np.zeros_like(W[first])
    broken[0, :3] = np.nan
    llmos("add", write(here / "x", {first: zeros, second: W[second], third: W[third]}), "x")
    llmos("add", write(here / "y", {first: W[first], second: W[second] * 9, third: broken}), "y")
    out = llmos("diff", "x", "y").out
    rows = [line.split() for line in out.splitlines() if line.startswith("layers.")]
    assert [row[0] for row in rows] == [first, third, second]
    assert rows[0][1:3] == ["from", "0"]
    assert rows[1][1] == "NaN/inf"
    assert "0 -> 3 values are infinite or NaN" in out


def test_another_header_around_the_same_tensors(llmos: Llmos, store: Path) -> None:
    here = store.parent
    llmos("add", write(here / "x", W), "x")
    other = write(here / "y", W)
    data = (other / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    (other / "model.safetensors").write_bytes((length + 8).to_bytes(8, "little") + data[8 : 8 + length] + b" " * 8)
    with open(other / "model.safetensors", "ab") as file:
        file.write(data[8 + length :])
    llmos("add", other, "y")
    out = llmos("diff", "x", "y").out
    assert "all 4 equal; only the files they lie in differ" in out
    assert out.rstrip().endswith("the same tensors")


def test_a_screenful_or_all(llmos: Llmos, store: Path) -> None:
    here = store.parent
    many = {f"t{number:03}": np.full(4, number + 1, np.float32) for number in range(100)}
    llmos("add", write(here / "x", many), "x")
    llmos("add", write(here / "y", {name: array * 3 for name, array in many.items()}), "y")
    short = llmos("diff", "x", "y").out
    assert len(short.splitlines()) < 30
    assert "and 85 more (--all lists them)" in short
    whole = llmos("diff", "x", "y", "--all").out
    assert "more" not in whole
    assert sum(line.startswith("t0") for line in whole.splitlines()) == 100
    assert len(llmos("diff", "x", "y", "--json").json["tensors"]) == 100


def test_plain_files_and_objects_of_different_kinds(llmos: Llmos, models: None) -> None:
    ran = llmos("diff", "notes~1", "notes")
    assert ran.code == 0
    assert "b.txt  added    7 B" in ran.out
    assert "TENSOR" not in ran.out
    other = llmos("diff", "notes", "base").out
    assert "kind     files -> model" in other
    assert "4 added" in other


def test_escape_sequences_reach_no_terminal(llmos: Llmos, store: Path) -> None:
    here = store.parent
    evil = "\x1b[31mred\x1b[0m\nFAKE LINE\x9b\u202e"
    llmos("add", write(here / "x", W), "x")
    llmos("add", write(here / "y", W, config=CONFIG | {evil: 1, "a": evil, "b": [evil]}), "y")
    header = json.dumps({evil: {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    broken = len(header).to_bytes(8, "little") + header + b"x"
    with open_store(store) as opened, begin(opened, purpose="test", ref=parse_ref("z")) as tx:
        entry = tx.add_bytes("model.safetensors", broken)
        recipe = Recipe("train", {evil: evil}, tools={evil: evil})
        tx.commit(Manifest("model", (entry,), {evil: {evil: evil}}, recipe), message=evil)
    for words in (
        ("diff", "x", "y"),
        ("diff", "x", "z", "--all"),
        ("show", "z"),
        ("show", "z", "--tensors"),
        ("log", "z"),
    ):
        for extra in ((), ("--json",)):
            ran = llmos(*words, *extra)
            assert ran.code == 0, ran.err
            for mark in "\x1b\x9b\u202e":
                assert mark not in ran.out + ran.err
            assert not any(line.startswith("FAKE") for line in (ran.out + ran.err).splitlines())
    assert "unsafe name" in llmos("diff", "x", "z").err


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("diff", "bass", "tuned"), 10, "did you mean base"),
        (("diff", "base", "tuned~3"), 10, "no value 3 moves back"),
        (("diff", "base"), 2, "NEW_REF"),
        (("diff", "base", "a//b"), 2, "malformed ref"),
        (("diff", "base", "a/b"), 10, "no remote 'a'"),
        (("diff", "base", "@0000"), 10, "no manifest @0000"),
    ],
)
def test_errors_name_what_is_wrong(llmos: Llmos, models: None, words: tuple[str, ...], code: int, text: str) -> None:
    ran = llmos(*words)
    assert (ran.code, ran.out) == (code, "")
    assert text in ran.err
    assert "hint: " in ran.err


def test_outside_a_store(llmos: Llmos, folder: Path) -> None:
    ran = llmos("diff", "a", "b")
    assert (ran.code, ran.out) == (10, "")
    assert "hint: make one here: llmos init" in ran.err


def test_torch_is_not_needed(llmos: Llmos, models: None) -> None:
    code = "from llmos_cli.app import main; main(['diff', 'base', 'tuned']); import sys; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.endswith("False\n")
