import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmos_cli.commands.shard import parse_size
from llmos_cli.errors import UsageError

Llmos = Callable[..., Any]


@pytest.fixture
def corpus(llmos: Llmos, folder: Path) -> Path:
    assert llmos("init").code == 0
    (folder / "corpus").mkdir()
    (folder / "corpus" / "a.txt").write_text("the cat sat on the mat\n" * 40)
    (folder / "corpus" / "b.txt").write_text("the dog sat on the cat\n" * 40)
    return folder / "corpus"


def test_shard_says_what_it_made_and_what_comes_next(llmos: Llmos, corpus: Path) -> None:
    ran = llmos("shard", corpus, "web:v1", "--tokenizer", "train:280", "--seq-len", "16", "--shard-size", "1KiB")
    assert ran.code == 0
    assert "dataset web:v1 @" in ran.out
    assert "2 documents" in ran.out
    assert "rows of 16 tokens" in ran.out
    assert "llmos train NAME --data web:v1" in ran.err


def test_json_names_the_result_and_a_repeat_is_cached(llmos: Llmos, corpus: Path) -> None:
    words = ("shard", corpus, "web", "--tokenizer", "train:280", "--seq-len", "16", "--json")
    first, again = llmos(*words).json, llmos(*words).json
    assert first["ref"] == "web:latest"
    assert first["kind"] == "dataset"
    assert first["documents"] == 2
    assert first["text_bytes"] == 2 * 40 * 23
    assert (first["cached"], again["cached"]) == (False, True)
    assert (again["id"], again["stored"]) == (first["id"], 0)


def test_standard_input_is_a_dash(llmos: Llmos, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"t": "one"}\n{"t": "two"}\n')))
    ran = llmos("shard", "-", "in", "--field", "t", "--tokenizer", "train:280", "--seq-len", "2", "--json")
    assert ran.json["documents"] == 2


def test_bad_files_are_one_error_or_are_left_out(llmos: Llmos, corpus: Path) -> None:
    (corpus / "bad.bin").write_bytes(b"a\0b")
    (corpus / "empty").write_bytes(b"")
    ran = llmos("shard", corpus, "web", "--tokenizer", "train:280")
    assert ran.code == 2
    assert "bad.bin is not text (a NUL byte at offset 1), and 1 more of 4 files" in ran.err
    assert "--skip-bad" in ran.err
    ran = llmos("shard", corpus, "web", "--tokenizer", "train:280", "--skip-bad", "--json")
    assert ran.code == 3
    assert ran.json["skipped"] == 2
    assert "web:latest was made without 2 files that cannot be used" in ran.err
    assert "bad.bin" in ran.err


def test_little_text_is_one_row_that_is_not_full(llmos: Llmos, corpus: Path) -> None:
    (corpus / "c.txt").write_text("x")
    ran = llmos("shard", corpus / "c.txt", "tiny", "--tokenizer", "train:280")
    assert ran.code == 0
    assert "1 row of 256" in ran.out.replace("1 rows", "1 row")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("shard", "corpus"), 2),
        (("shard", "corpus", "no/good"), 2),
        (("shard", "corpus", "web", "--shard-size", "4Q"), 2),
        (("shard", "corpus", "web", "--seq-len", "1"), 2),
        (("shard", "corpus", "web", "--tokenizer", "train:5"), 2),
        (("shard", "corpus", "web", "--tokenizer", "nothing"), 10),
        (("shard", "nothing", "web"), 10),
    ],
)
def test_what_cannot_work_has_its_exit_code(llmos: Llmos, corpus: Path, words: tuple[str, ...], code: int) -> None:
    ran = llmos(*words)
    assert (ran.code, ran.out) == (code, "")
    assert "error:" in ran.err


def test_outside_a_store_nothing_is_read(llmos: Llmos, folder: Path) -> None:
    ran = llmos("shard", "corpus", "web")
    assert ran.code == 10
    assert "llmos init" in ran.err


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("4MB", 4_000_000),
        ("64MiB", 64 << 20),
        ("1.5k", 1500),
        ("2 GiB", 2 << 30),
        ("7b", 7),
        ("10kb", 10_000),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "4Q", "-4MB", "4iB", "1e9", "4 M B", "٤MB"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        parse_size(text)


def test_datasets_are_mixed_by_weight(llmos: Llmos, corpus: Path) -> None:
    assert llmos("shard", corpus, "web", "--tokenizer", "train:280", "--seq-len", "16").code == 0
    assert llmos("shard", corpus / "a.txt", "code", "--tokenizer", "web", "--seq-len", "16").code == 0
    ran = llmos("shard", "--mix", "web:3,code:0.5", "both", "--json")
    assert ran.code == 0
    assert ran.json["mix"] == {"web": "3", "code": "1/2"}
    one, other = (llmos("show", name, "--json").json["meta"]["rows"] for name in ("web", "code"))
    assert ran.json["rows"] == one + other
    assert llmos("shard", "--mix", "web:3,nothing", "both").code == 10
    assert llmos("shard", corpus, "--mix", "web", "both").code == 2
    assert llmos("shard", "both").code == 2
