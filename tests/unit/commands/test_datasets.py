"""What `show` and `diff` tell of datasets."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Llmos = Callable[..., Any]
TEXTS = ["the first", "a \x1b[31mred\x1b[0m\r\n\ttext", "the third"]


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def data(llmos: Llmos, store: Path) -> Path:
    """Three documents as `web`, in rows of 16 tokens."""
    path = write(store.parent / "web.jsonl", TEXTS)
    assert llmos("shard", path, "web", "--tokenizer", "train:257", "--seq-len", "16").code == 0
    return path


def test_show_draws_splits_and_lengths(llmos: Llmos, data: Path) -> None:
    lines = llmos("show", "web").out.splitlines()
    splits = lines.index("splits")
    assert lines[splits + 1].split() == ["SPLIT", "DOCUMENTS", "TOKENS", "ROWS", "SHARDS"]
    meta = llmos("show", "web", "--json").json["meta"]
    assert lines[splits + 2].split() == ["train", "3", str(meta["tokens"]), str(meta["rows"]), "1"]
    assert lines[splits + 3] == f"  rows are {100 * meta['fill']:.1f} % full"
    title = lines.index("tokens in a document, train")
    assert [line.split()[:3] for line in lines[title + 1 : title + 3]] == [["to", "16", "2"], ["to", "32", "1"]]
    assert lines[title + 1].endswith("#" * 40)
    assert lines[title + 2].endswith(" " + "#" * 20)
    assert any("1 file" in line and "web.jsonl @" in line for line in lines)


def test_a_sample_reads_as_text_and_moves_no_cursor(llmos: Llmos, data: Path) -> None:
    ran = llmos("show", "web", "--sample", "3")
    assert ran.code == 0
    assert "\x1b" not in ran.out
    assert ran.out.split("\n\n")[0].splitlines()[1:] == ["  the first"]
    assert "  a \\x1b[31mred\\x1b[0m\\r\n      text\n" in ran.out
    documents = llmos("show", "web", "--sample", "3", "--json").json["documents"]
    assert [document["text"] for document in documents] == TEXTS
    assert [document["document"] for document in documents] == [0, 1, 2]


def test_a_long_document_is_cut_in_a_sample_and_whole_by_its_number(llmos: Llmos, store: Path) -> None:
    text = "word " * 500
    path = write(store.parent / "long.jsonl", [text])
    assert llmos("shard", path, "long", "--tokenizer", "train:257", "--seq-len", "16").code == 0
    assert llmos("show", "long", "--sample", "1").out.splitlines()[-1].strip() == (
        "(1,900 more characters: --document 0)"
    )
    assert llmos("show", "long", "--document", "0").out.count("word") == 500


def test_a_document_is_asked_for_by_number(llmos: Llmos, data: Path) -> None:
    assert "the third" in llmos("show", "web", "--document", "2").out
    missing = llmos("show", "web", "--document", "3")
    assert (missing.code, "there is no document 3" in missing.err) == (10, True)
    assert llmos("show", "web", "--document", "0", "--sample", "1").code == 2
    assert llmos("show", "web", "--sample", "1", "--split", "valid").code == 10


def test_diff_of_datasets_names_documents(llmos: Llmos, data: Path) -> None:
    write(data, [*TEXTS[1:], "one more"])
    assert llmos("shard", data, "next", "--tokenizer", "web", "--seq-len", "32").code == 0
    ran = llmos("diff", "web", "next")
    lines = ran.out.splitlines()
    assert "  train: 2 equal, 1 added, 1 removed" in lines
    assert any(line.startswith("    - 0, ") and line.endswith(": the first") for line in lines)
    assert any(line.startswith("    + 2, ") and line.endswith(": one more") for line in lines)
    assert "TENSOR" not in ran.out
    found = llmos("diff", "web", "next", "--json").json
    train = found["documents"]["splits"]["train"]
    assert (train["equal"], train["added"], train["removed"]) == (2, 1, 1)
    assert train["examples_added"][0]["text"] == "one more"
    assert found["summary"]["values"] is None
