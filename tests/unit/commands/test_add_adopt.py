"""`llmos add --adopt` as a user sees it."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Llmos = Callable[..., Any]


@pytest.fixture
def model(llmos: Llmos, folder: Path) -> Path:
    """A store, and a folder with one large file, one that is the same, and a small one."""
    assert llmos("init").code == 0
    model = folder / "model"
    model.mkdir()
    (model / "big.bin").write_bytes(random.Random(3).randbytes(1_200_000))
    (model / "small.json").write_text("{}")
    return model


def test_it_says_what_it_did_with_each_file(llmos: Llmos, model: Path) -> None:
    done = llmos("add", "--adopt", model, "m")
    assert done.code == 0
    how = "shared by reflink" if _writable(model) else "linked"
    assert f"big.bin: {how}, 1.20 MB" in done.err
    assert "1 file below 1.00 MB: copied" in done.err
    assert "1.20 MB adopted" in done.err
    again = llmos("add", "--adopt", model, "m")
    assert "1 file that the store had already: nothing to do" in again.err
    assert llmos("fsck").code == 0


def test_its_json(llmos: Llmos, model: Path) -> None:
    found = llmos("--json", "add", "--adopt", model, "m").json
    assert found["adopted_bytes"] == 1_200_000
    assert found["new_bytes"] < 5000
    big, small = found["adopted"]
    assert (Path(big["file"]).name, big["size"], big["reason"]) == ("big.bin", 1_200_000, None)
    assert big["how"] in ("reflink", "hardlink")
    assert (Path(small["file"]).name, small["how"], small["reason"]) == ("small.json", "copy", "it is small")
    assert llmos("--json", "add", model, "m").json["adopted"] == []


def test_dry_run_changes_nothing(llmos: Llmos, model: Path) -> None:
    said = llmos("add", "--adopt", "--dry-run", model, "m")
    assert "as files m:latest, adopting what can be" in said.out
    assert _writable(model)


def test_damage_is_an_error_that_names_the_file(llmos: Llmos, model: Path) -> None:
    assert llmos("add", "--adopt", model, "m").code == 0
    (lying,) = Path(".llmos/adopted").glob("*/*")
    lying.chmod(0o600)
    lying.write_bytes(b"x" * 1_200_000)
    told = llmos("checkout", "m", "out")
    assert told.code == 13
    assert "big.bin, which has changed" in told.err
    assert "hint: add an intact copy of that file again, or pull it" in told.err
    assert llmos("fsck").code == 13


def test_gc_and_du_name_adopted_files(llmos: Llmos, model: Path) -> None:
    assert llmos("add", "--adopt", model, "m").code == 0
    assert "1.20 MB of the store is adopted files" in llmos("du").out
    assert llmos("--json", "du").json["adopted_bytes"] == 1_200_000
    assert llmos("rm", "m").code == 0
    assert "1 adopted file let go" in llmos("gc", "--grace", "0", "--dry-run").out
    assert llmos("--json", "gc", "--grace", "0").json["released_files"] == 1
    assert not list(Path(".llmos/adopted").glob("*/*"))
    assert (model / "big.bin").stat().st_size == 1_200_000


def _writable(model: Path) -> bool:
    return bool((model / "big.bin").stat().st_mode & 0o200)
