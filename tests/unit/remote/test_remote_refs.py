"""Looking at a remote in place: what is said, and what it costs."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmos_cli.errors import RemoteUnavailable
from llmos_cli.remote.transports.folder import FolderTransport

Run = Callable[..., tuple[int, Any, str]]
MODEL_BYTES = 12 * 300_000


def packs(store: str) -> list[Path]:
    return list(Path(store).rglob("*.pack"))


def test_show_says_what_a_pull_would_give_and_reads_little(reader: Run, read_bytes: Callable[[], int]) -> None:
    code, there, _ = reader("show", "nas/tiny", "--tensors", "--json")
    assert code == 0
    assert 0 < read_bytes() < MODEL_BYTES / 20
    assert packs("reader") == []
    assert (there["ref"], there["remote"], there["tensors"]["count"]) == ("tiny:latest", "nas", 12)
    assert reader("pull", "nas", "tiny")[0] == 0
    here = reader("show", "tiny", "--tensors", "--json")[1]
    assert here == {**there, "remote": None, "refs": ["tiny:latest"]}


def test_ls_lists_the_remote_and_takes_a_pattern(reader: Run, read_bytes: Callable[[], int]) -> None:
    code, found, _ = reader("ls", "nas", "--json")
    assert (code, found["remote"]) == (0, "nas")
    assert [(ref["ref"], ref["kind"]) for ref in found["refs"]] == [("tiny:latest", "model"), ("tuned:latest", "model")]
    assert all(ref["size"] > MODEL_BYTES for ref in found["refs"])
    assert read_bytes() < MODEL_BYTES / 20
    assert [ref["ref"] for ref in reader("ls", "nas/tu*", "--json")[1]["refs"]] == ["tuned:latest"]
    assert reader("ls", "--json")[1]["refs"] == []
    reader("pull", "nas", "tiny")
    reader("tag", "tiny", "nas")
    assert [ref["ref"] for ref in reader("ls", "nas", "--json")[1]["refs"]] == ["nas:latest"]
    assert len(reader("ls", "nas/", "--json")[1]["refs"]) == 2


def test_log_and_earlier_values(reader: Run) -> None:
    reader("--store", "writer", "tag", "tuned", "tiny", "--force")
    reader("--store", "writer", "push", "nas", "tiny")
    code, found, _ = reader("log", "nas/tiny", "--json")
    assert (code, found["remote"], len(found["history"])) == (0, "nas", 2)
    earlier = reader("show", "nas/tiny~1", "--json")[1]["id"]
    assert [move["id"] for move in found["history"]] == [found["id"], earlier]
    assert reader("show", f"nas/@{earlier[:12]}", "--json")[1]["id"] == earlier
    assert reader("show", "nas/tiny~2")[0] == 10
    assert f"  @{earlier[:12]}  model" in reader("log", "nas/tiny~1")[1]
    code, text, _ = reader("log", "nas/tiny")
    assert "History of nas/tiny:latest" in text
    assert f"  nas/tiny:latest @{found['id'][:12]}  model" in text


def test_diff_tells_which_tensors_differ_without_reading_them(reader: Run, read_bytes: Callable[[], int]) -> None:
    reader("pull", "nas", "tiny")
    for old in ("tiny", "nas/tiny"):
        read_bytes()
        code, found, _ = reader("diff", old, "nas/tuned", "--json")
        assert code == 0
        assert read_bytes() < MODEL_BYTES / 20
        assert found["new"]["remote"] == "nas"
        changed = [tensor["name"] for tensor in found["tensors"] if tensor["status"] != "equal"]
        assert (changed, found["summary"]["tensors"]["equal"]) == (["model.layers.3.w"], 11)
        assert found["shared_bytes"] > MODEL_BYTES * 10 / 12
    _, text, err = reader("diff", "tiny", "nas/tuned")
    assert "model.layers.3.w  values" in text
    assert "llmos pull" in err


def test_a_lie_at_the_remote_is_found_out(reader: Run) -> None:
    (pack,) = (path for path in packs("nas") if path.stat().st_size > MODEL_BYTES)
    data = bytearray(pack.read_bytes())
    at = data.find(b'"model_type": "llama"')
    assert at > 0
    data[at + 2 : at + 4] = b"MO"
    pack.chmod(0o644)
    pack.write_bytes(data)
    assert reader("diff", "nas/tiny", "nas/tuned")[0] == 0  # nobody needs to read what is equal
    assert reader("diff", "nas/tiny", "nas/tiny")[0] == 0
    Path("other").mkdir()
    Path("other/config.json").write_bytes(b"{}")
    assert reader("add", "other", "other")[0] == 0
    code, _, err = reader("diff", "nas/tiny", "other")
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
def test_what_cannot_be_found_or_meant(reader: Run, words: tuple[str, ...], code: int) -> None:
    found, out, err = reader(*words)
    assert (found, out) == (code, "")
    assert "hint: " in err


def test_a_remote_that_does_not_answer(reader: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: object) -> bytes:
        raise RemoteUnavailable("nas does not answer")

    monkeypatch.setattr(FolderTransport, "read", silent)
    for words in (("show", "nas/tiny"), ("ls", "nas"), ("log", "nas/tiny"), ("diff", "nas/tiny", "nas/tuned")):
        assert reader(*words)[0] == 16


def test_diff_reads_no_big_file_that_differs(reader: Run, read_bytes: Callable[[], int]) -> None:
    for seed, name in enumerate(("old", "new")):
        Path(name).mkdir()
        dice = random.Random(seed)
        Path(name, "shard.data").write_bytes(dice.randbytes(3_000_000))
        Path(name, "big.json").write_text(f'{{"value": "{dice.randbytes(1_000_000).hex()}"}}')
        Path(name, "small.json").write_text(f'{{"seed": {seed}}}')
        reader("--store", "writer", "add", name, name)
    assert reader("--store", "writer", "push", "nas", "old", "new")[0] == 0
    read_bytes()
    code, found, _ = reader("diff", "nas/old", "nas/new", "--json")
    assert code == 0
    assert read_bytes() < MODEL_BYTES / 20
    files = {file["path"]: file for file in found["files"]}
    assert {path: file["status"] for path, file in files.items()} == dict.fromkeys(files, "changed")
    assert files["small.json"]["changes"] == [{"path": "seed", "status": "changed", "old": 0, "new": 1}]
    assert (files["big.json"]["changes"], found["summary"]["values"]) == (None, None)
