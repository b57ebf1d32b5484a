"""Looking at a remote in place: what is said, and what it costs."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmos_cli.app import main
from llmos_cli.errors import RemoteUnavailable
from llmos_cli.formats.safetensors import encode_header
from llmos_cli.remote.folder import FolderTransport

Run = Callable[..., tuple[int, Any, str]]
MODEL_BYTES = 12 * 300_000


def model(seed: int, **other: bytes) -> dict[str, bytes]:
    """The files of a model of twelve layers; `other` gives some tensors other bytes."""
    tensors = [(f"model.layers.{number}.w", "U8", (300_000,)) for number in range(12)]
    data = [other.get(f"w{number}") or random.Random(seed + number).randbytes(300_000) for number in range(12)]
    return {"model.safetensors": encode_header(tensors, {}) + b"".join(data), "config.json": b'{"model_type": "llama"}'}


@pytest.fixture
def llmos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run one command line, in the store `reader`, beside the remote `nas` that `tiny` and `tuned` were pushed to."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LLMOS_STORE", "writer")

    def run(*words: str) -> tuple[int, Any, str]:
        capfd.readouterr()
        code = main(list(words))
        out, err = capfd.readouterr()
        return code, json.loads(out) if "--json" in words and out else out, err

    assert run("init", "writer")[0] == 0
    assert run("remote", "add", "nas", "nas")[0] == 0
    for name, files in (("tiny", model(1)), ("tuned", model(1, w3=random.Random(99).randbytes(300_000)))):
        (tmp_path / name).mkdir()
        for path, data in files.items():
            (tmp_path / name / path).write_bytes(data)
        assert run("add", name, name)[0] == 0
    assert run("push", "nas", "--all")[0] == 0
    monkeypatch.setenv("LLMOS_STORE", "reader")
    assert run("init", "reader")[0] == 0
    assert run("remote", "add", "nas", "nas")[0] == 0
    return run


@pytest.fixture
def read_bytes(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """The bytes read from folders that are remotes since the last question."""
    counts: list[int] = []
    read = FolderTransport.read

    def counting(self: FolderTransport, key: str, start: int = 0, end: int | None = None) -> bytes:
        data = read(self, key, start, end)
        counts.append(len(data))
        return data

    monkeypatch.setattr(FolderTransport, "read", counting)

    def since() -> int:
        total = sum(counts)
        counts.clear()
        return total

    return since


def packs(store: str) -> list[Path]:
    return list(Path(store).rglob("*.pack"))


def test_show_says_what_a_pull_would_give_and_reads_little(llmos: Run, read_bytes: Callable[[], int]) -> None:
    code, there, _ = llmos("show", "nas/tiny", "--tensors", "--json")
    assert code == 0
    assert 0 < read_bytes() < MODEL_BYTES / 20
    assert packs("reader") == []
    assert (there["ref"], there["remote"], there["tensors"]["count"]) == ("tiny:latest", "nas", 12)
    assert llmos("pull", "nas", "tiny")[0] == 0
    here = llmos("show", "tiny", "--tensors", "--json")[1]
    assert here == {**there, "remote": None, "refs": ["tiny:latest"]}


def test_ls_lists_the_remote_and_takes_a_pattern(llmos: Run, read_bytes: Callable[[], int]) -> None:
    code, found, _ = llmos("ls", "nas", "--json")
    assert (code, found["remote"]) == (0, "nas")
    assert [(ref["ref"], ref["kind"]) for ref in found["refs"]] == [("tiny:latest", "model"), ("tuned:latest", "model")]
    assert all(ref["size"] > MODEL_BYTES for ref in found["refs"])
    assert read_bytes() < MODEL_BYTES / 20
    assert [ref["ref"] for ref in llmos("ls", "nas/tu*", "--json")[1]["refs"]] == ["tuned:latest"]
    assert llmos("ls", "--json")[1]["refs"] == []
    llmos("pull", "nas", "tiny")
    llmos("tag", "tiny", "nas")
    assert [ref["ref"] for ref in llmos("ls", "nas", "--json")[1]["refs"]] == ["nas:latest"]
    assert len(llmos("ls", "nas/", "--json")[1]["refs"]) == 2


def test_log_and_earlier_values(llmos: Run) -> None:
    llmos("--store", "writer", "tag", "tuned", "tiny", "--force")
    llmos("--store", "writer", "push", "nas", "tiny")
    code, found, _ = llmos("log", "nas/tiny", "--json")
    assert (code, found["remote"], len(found["history"])) == (0, "nas", 2)
    earlier = llmos("show", "nas/tiny~1", "--json")[1]["id"]
    assert [move["id"] for move in found["history"]] == [found["id"], earlier]
    assert llmos("show", f"nas/@{earlier[:12]}", "--json")[1]["id"] == earlier
    assert llmos("show", "nas/tiny~2")[0] == 10
    code, text, _ = llmos("log", "nas/tiny")
    assert "History of nas/tiny:latest" in text
    assert f"  nas/tiny:latest @{found['id'][:12]}  model" in text


def test_diff_tells_which_tensors_differ_without_reading_them(llmos: Run, read_bytes: Callable[[], int]) -> None:
    llmos("pull", "nas", "tiny")
    for old in ("tiny", "nas/tiny"):
        read_bytes()
        code, found, _ = llmos("diff", old, "nas/tuned", "--json")
        assert code == 0
        assert read_bytes() < MODEL_BYTES / 20
        assert found["new"]["remote"] == "nas"
        changed = [tensor["name"] for tensor in found["tensors"] if tensor["status"] != "equal"]
        assert (changed, found["summary"]["tensors"]["equal"]) == (["model.layers.3.w"], 11)
        assert found["shared_bytes"] > MODEL_BYTES * 10 / 12
    _, text, err = llmos("diff", "tiny", "nas/tuned")
    assert "model.layers.3.w  values" in text
    assert "llmos pull" in err


def test_a_lie_at_the_remote_is_found_out(llmos: Run) -> None:
    (pack,) = (path for path in packs("nas") if path.stat().st_size > MODEL_BYTES)
    data = bytearray(pack.read_bytes())
    at = data.find(b'"model_type": "llama"')
    assert at > 0
    data[at + 2 : at + 4] = b"MO"
    pack.chmod(0o644)
    pack.write_bytes(data)
    assert llmos("diff", "nas/tiny", "nas/tuned")[0] == 0  # nobody needs to read what is equal
    assert llmos("diff", "nas/tiny", "nas/tiny")[0] == 0
    Path("other").mkdir()
    Path("other/config.json").write_bytes(b"{}")
    assert llmos("add", "other", "other")[0] == 0
    code, _, err = llmos("diff", "nas/tiny", "other")
    assert (code, "object" in err, "nas" in err) == (13, True, True)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("show", "nas/nothing"), 10),
        (("show", "nix/tiny"), 10),
        (("log", "nas/@00000000"), 10),
        (("ls", "nix/"), 10),
        (("show", "./nas/tiny"), 2),
        (("show", "s3://bucket/tiny"), 2),
        (("show", "nas/tiny", "--sha256"), 2),
        (("checkout", "nas/tiny", "out"), 2),
    ],
)
def test_what_cannot_be_found_or_meant(llmos: Run, words: tuple[str, ...], code: int) -> None:
    found, out, err = llmos(*words)
    assert (found, out) == (code, "")
    assert "hint: " in err


def test_a_remote_that_does_not_answer(llmos: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: object) -> bytes:
        raise RemoteUnavailable("nas does not answer")

    monkeypatch.setattr(FolderTransport, "read", silent)
    for words in (("show", "nas/tiny"), ("ls", "nas"), ("log", "nas/tiny"), ("diff", "nas/tiny", "nas/tuned")):
        assert llmos(*words)[0] == 16
