"""llmos gc, with --repack, --why and --undelete."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Llmos = Callable[..., Any]


@pytest.fixture
def removed(llmos: Llmos, store: Path) -> str:
    """A ref that was removed; gives its id."""
    (store.parent / "data").write_bytes(os.urandom(9000))
    oid: str = llmos("add", "data", "data", "--json").json["id"]
    llmos("rm", "data")
    return oid


def test_it_says_what_nothing_needs_and_what_it_freed(llmos: Llmos, removed: str) -> None:
    dry = llmos("gc", "--json", "--dry-run").json
    assert dry["unreachable_bytes"] > 9000
    assert dry["freed_bytes"] == 0
    done = llmos("gc", "--json", "--grace", "0").json
    assert done["freed_bytes"] > 9000
    assert llmos("gc", "--json").json["unreachable_bytes"] == 0


def test_why_of_what_is_needed_and_what_is_not(llmos: Llmos, removed: str) -> None:
    ran = llmos("gc", "--why", "notes")
    assert ran.code == 0
    assert "is needed:\n  ref notes:latest -> manifest @" in ran.out
    found = llmos("gc", "--why", f"@{removed[:12]}", "--json").json
    assert (found["object"], found["what"], found["needed"], found["chains"]) == (removed, "manifest", False, [])
    assert found["places"][0]["fate"] == "to the trash with the next gc"
    assert found["places"][0]["after"].endswith("+00:00")
    assert llmos("gc", "--why", removed[:12]).out.startswith(f"nothing needs manifest {removed[:12]}\n  in pack ")
    assert llmos("gc", "--why", "nothing-like-it").code == 10


def test_undelete(llmos: Llmos, removed: str) -> None:
    assert "data:latest would come back" in llmos("gc", "--undelete", "--dry-run").out
    assert llmos("show", "data").code == 10
    ran = llmos("gc", "--undelete", "data", "--json")
    assert ran.code == 0
    assert [item["ref"] for item in ran.json["restored"]] == ["data:latest"]
    assert llmos("show", "data", "--json").json["id"] == removed
    assert llmos("gc", "--undelete", "data").code == 10
    assert llmos("gc", "--undelete").out == "the trash is empty\n"
    llmos("rm", "data")
    llmos("tag", "notes", "data")
    assert llmos("gc", "--undelete", "data").code == 17
    ran = llmos("gc", "--undelete")
    assert ran.code == 0
    assert "stays in the trash: there is such a ref" in ran.out


def test_what_cannot_come_back_is_said(llmos: Llmos, store: Path, removed: str) -> None:
    for path in store.glob("packs/*/*.pack"):
        if removed.encode() not in path.read_bytes() and len(path.read_bytes()) > 9000:
            path.unlink()
    ran = llmos("gc", "--undelete")
    assert ran.code == 13
    assert "data:latest could not be brought back: object" in ran.err


def test_repack(llmos: Llmos, store: Path) -> None:
    for number in range(4):
        (store.parent / "data").write_bytes(os.urandom(5000))
        llmos("add", "data", f"data:{number}")
    ran = llmos("gc", "--repack", "--dry-run")
    assert "small packs put together" in ran.out
    assert "llmos gc --repack does it" in ran.err
    packs = set(store.glob("packs/*/*.pack"))
    assert len(packs) >= 5
    done = llmos("gc", "--repack", "--grace", "0", "--json").json["repack"]
    assert (done["replaced_packs"], done["new_packs"]) == (len(packs), 1)
    assert len(set(store.glob("packs/*/*.pack"))) == 1
    assert llmos("fsck").code == 0
    assert llmos("gc", "--repack").out.startswith("nothing to repack\n")
    assert "repack" not in llmos("gc", "--json").json


def test_a_clock_that_is_off_is_refused_but_looking_is_not(llmos: Llmos, store: Path, removed: str) -> None:
    pack = next(store.glob("packs/*/*.pack"))
    os.utime(pack, (time.time() + 900, time.time() + 900))
    for words in (("gc",), ("gc", "--grace", "0")):
        ran = llmos(*words)
        assert ran.code == 14
        assert f"{pack} is from the future (15 minutes from now)" in ran.err
        assert f"touch {pack}" in ran.err
    ran = llmos("gc", "--dry-run")
    assert ran.code == 0
    assert "gc would refuse" in ran.err
    os.utime(pack)
    assert llmos("gc").code == 0


@pytest.mark.parametrize(
    "words",
    [
        ("--why", "notes", "--undelete"),
        ("--repack", "--undelete"),
        ("notes",),
        ("--why", "notes", "--grace", "0"),
        ("--undelete", "--grace", "0"),
    ],
)
def test_what_does_not_go_together(llmos: Llmos, store: Path, words: tuple[str, ...]) -> None:
    assert llmos("gc", *words).code == 2
