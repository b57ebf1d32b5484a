"""`llmos du`: for scripts, and for people on terminals of any width."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Llmos = Callable[..., Any]
LONG = "a-fine-tune-of-the-base-with-a-name-that-nobody-would-type:v1-with-a-tag-of-the-same-kind"


@pytest.fixture
def twins(llmos: Llmos, store: Path) -> Path:
    (store.parent / "big").write_bytes(os.urandom(50_000))
    (store.parent / "small").write_bytes(os.urandom(2_000))
    llmos("add", "big", "one")
    llmos("add", "big", "small", LONG)
    return store


def test_for_scripts(llmos: Llmos, twins: Path) -> None:
    told = llmos("du", "--json").json
    found = {item["ref"]: item for item in told["refs"]}
    one, two = found["one:latest"], found[LONG]
    assert one["logical_bytes"] == 50_000
    assert two["logical_bytes"] == 52_000
    older, newer = (one, two) if one["saved"]["dedup"] == 0 else (two, one)  # both may be of the same second
    assert (older["own_bytes"] < 3000, newer["saved"]["dedup"]) == (True, 50_000)
    assert (one["shared_with"], two["shared_with"], one["shared_with_more"]) == ([LONG], ["one:latest"], 0)
    for item in (*told["refs"], told):
        assert item["logical_bytes"] == item["stored_bytes"] + sum(item["saved"].values())
    for key in ("logical_bytes", "stored_bytes"):
        assert told[key] == sum(item[key] for item in told["refs"])
    assert told["disk_bytes"] == sum(path.stat().st_size for path in twins.glob("packs/*/*.pack"))
    assert set(told) == {
        "refs",
        "logical_bytes",
        "stored_bytes",
        "saved",
        "disk_bytes",
        "other_bytes",
        "trash_bytes",
        "adopted_bytes",
        "packs",
    }


def test_for_people(llmos: Llmos, twins: Path) -> None:
    lines = llmos("du").out.splitlines()
    assert lines[0].split() == ["REF", "FILES", "STORED", "OWN", "SAVED", "SHARED", "WITH"]
    (row,) = (line for line in lines if line.startswith("one:latest"))
    assert row.split()[1:3] == ["50.0", "kB"]
    assert row.endswith("  a-fine-tune..e-same-kind")
    assert any("of files in" in line for line in lines)
    assert "saved 50.0 kB by dedup" in lines


def test_refs_that_are_named_are_told_in_detail(llmos: Llmos, twins: Path) -> None:
    lines = [line.split("  ") for line in llmos("du", LONG, "one").out.splitlines()]
    assert {line[0] for line in lines} >= {LONG, "one:latest"}
    facts = {parts[1]: parts[-1].strip() for parts in lines if len(parts) > 2}
    assert facts["shares with"] in (LONG, "one:latest")
    assert facts["saved by dedup"] == "50.0 kB"
    assert not any("of files in" in part for line in lines for part in line)  # that is about the whole store


def test_only_refs_have_sums(llmos: Llmos, twins: Path) -> None:
    for name in ("@0123", "one~1"):
        ran = llmos("du", name)
        assert (ran.code, ran.out) == (2, "")
    assert llmos("du", "ones").code == 10


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_a_table_fits_the_terminal(llmos: Llmos, twins: Path, on_terminal: Callable[..., str], columns: int) -> None:
    lines = on_terminal(columns, "du").splitlines()
    rows = lines[: lines.index("")]
    assert max(map(len, rows)) <= columns
    assert [line.split()[:3] for line in rows if line.startswith("one:")] == [["one:latest", "50.0", "kB"]]
    head = rows[0].split()
    assert head[:3] == ["REF", "FILES", "STORED"]
    assert (head[-1] == "WITH") == (columns >= 80)
    assert (LONG in rows[1] or LONG in rows[2]) == (columns >= 200)


def test_a_damaged_ref_is_named_and_the_others_are_told(llmos: Llmos, twins: Path) -> None:
    (move,) = (twins / "refs" / "one" / "latest").iterdir()
    move.chmod(0o600)
    move.write_bytes(b"\0" * 10)
    ran = llmos("du", "--json")
    assert ran.code == 13
    assert "one:latest" in ran.err
    assert LONG in {item["ref"] for item in ran.json["refs"]}
