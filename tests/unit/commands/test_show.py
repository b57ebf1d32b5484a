"""`llmos show --tensors` and `--sha256`."""

import hashlib
import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Llmos = Callable[..., Any]


@pytest.fixture
def model(llmos: Llmos, store: Path) -> Path:
    """A model of two tensors, one of them large and made of zeros, and a file in a folder."""
    folder = store.parent / "llama"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "sub" / "a file").write_text("text")
    header = json.dumps(
        {
            "embed": {"dtype": "F32", "shape": [500, 100], "data_offsets": [0, 200_000]},
            "norm": {"dtype": "BF16", "shape": [4], "data_offsets": [200_000, 200_008]},
        }
    ).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(200_000) + bytes(range(8))
    (folder / "model.safetensors").write_bytes(data)
    assert llmos("add", folder, "base").code == 0
    return folder


def test_a_table_of_tensors(llmos: Llmos, model: Path) -> None:
    ran = llmos("show", "base", "--tensors")
    lines = ran.out.splitlines()
    assert lines[0].split() == ["TENSOR", "DTYPE", "SHAPE", "SIZE", "STORED", "CODEC"]
    assert lines[1].split()[:5] == ["embed", "F32", "[500,100]", "200", "kB"]
    assert lines[1].endswith(("planes", "zstd"))
    assert lines[2].split()[:5] == ["norm", "BF16", "[4]", "8", "B"]
    assert lines[2].endswith("raw")
    assert lines[3].startswith("2 tensors, 200 kB stored in ")


def test_tensors_as_json(llmos: Llmos, model: Path) -> None:
    tensors = llmos("show", "base", "--tensors", "--json").json["tensors"]
    assert (tensors["count"], tensors["parameters"]) == (2, 50_004)
    embed, norm = tensors["list"]
    assert (embed["name"], embed["file"], embed["dtype"], embed["shape"], embed["size"]) == (
        "embed",
        "model.safetensors",
        "F32",
        [500, 100],
        200_000,
    )
    assert 0 < embed["stored"] < 2000
    assert sum(embed["codecs"].values()) == 200_000
    assert norm["codecs"] == {"raw": 8}
    assert "list" not in llmos("show", "base", "--json").json["tensors"]


def test_what_is_stored_as_a_difference_says_so(llmos: Llmos, store: Path) -> None:
    here = store.parent
    words = random.Random(0).randbytes(400_000)
    header = b'{"w":{"dtype":"F32","shape":[100000],"data_offsets":[0,400000]}}'
    for name, first in (("old", 0), ("new", 7)):
        data = bytearray(words)
        data[::400] = bytes([first]) * 1000
        (here / name).mkdir()
        (here / name / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    assert llmos("add", here / "old" / "m.safetensors", "old").code == 0
    assert llmos("add", here / "new" / "m.safetensors", "new", "--base", "old").code == 0
    assert llmos("show", "new", "--tensors").out.splitlines()[1].endswith("delta")
    (tensor,) = llmos("show", "new", "--tensors", "--json").json["tensors"]["list"]
    assert tensor["codecs"] == {"delta": 400_000}
    assert tensor["stored"] < 100_000


def test_an_object_without_tensors(llmos: Llmos, model: Path) -> None:
    ran = llmos("show", "notes", "--tensors")
    assert (ran.code, ran.out) == (10, "")
    assert "error: notes:latest has no tensors" in ran.err
    assert "hint: see its files: llmos show notes --files" in ran.err


def test_sha256_of_files_as_sha256sum_reads_it(llmos: Llmos, model: Path) -> None:
    ran = llmos("show", "base", "--sha256")
    assert (ran.code, ran.err) == (0, "")
    assert len(ran.out.splitlines()) == 3
    for line in ran.out.splitlines():
        digest, _, path = line.partition("  ")
        assert digest == hashlib.sha256((model / path).read_bytes()).hexdigest()
    done = subprocess.run(["sha256sum", "-c"], cwd=model, input=ran.out, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_sha256_as_json_and_again(llmos: Llmos, model: Path) -> None:
    first = llmos("show", "base", "--sha256", "--json").json["files"]
    assert {file["path"]: file["sha256"] for file in first} == {
        path.relative_to(model).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in model.rglob("*")
        if path.is_file()
    }
    assert llmos("show", "base", "--sha256", "--json").json["files"] == first
    assert "sha256" not in llmos("show", "base", "--json").json["files"][0]


def test_both_at_once(llmos: Llmos, model: Path) -> None:
    lines = llmos("show", "base", "--tensors", "--sha256").out.splitlines()
    assert lines[0].startswith("TENSOR")
    assert lines[-1].endswith("  sub/a file")
