"""The four verbs as they are typed."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmos_cli.app import main

Run = Callable[..., tuple[int, Any, str]]


@pytest.fixture
def llmos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run one command line in an empty folder: exit code, stdout (parsed with --json), stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LLMOS_STORE", raising=False)

    def run(*words: str) -> tuple[int, Any, str]:
        capfd.readouterr()
        code = main(list(words))
        out, err = capfd.readouterr()
        return code, json.loads(out) if "--json" in words and out else out, err

    return run


@pytest.fixture
def filled(llmos: Run, tmp_path: Path) -> Run:
    (tmp_path / "a.bin").write_bytes(random.Random(1).randbytes(50_000))
    assert llmos("init")[0] == 0
    assert llmos("add", "a.bin", "web")[0] == 0
    assert llmos("remote", "add", "nas", "nas")[0] == 0
    return llmos


def test_there_and_back(filled: Run, tmp_path: Path) -> None:
    code, pushed, _ = filled("push", "nas", "web", "--json")
    assert code == 0
    assert (pushed["ref"], pushed["refs"][0]["status"], pushed["packs"]) == ("web:latest", "new", 1)
    code, cloned, _ = filled("clone", "nas", "copy", "--json")
    assert (code, cloned["id"], cloned["received"]) == (0, pushed["id"], pushed["sent"])
    code, pulled, _ = filled("--store", "copy", "pull", "origin", "--all", "--json")
    assert (code, pulled["id"], pulled["received"]) == (0, pushed["id"], 0)
    assert filled("--store", "copy", "checkout", "web", "out")[0] == 0
    assert (tmp_path / "out/a.bin").read_bytes() == (tmp_path / "a.bin").read_bytes()


def test_what_people_read(filled: Run) -> None:
    code, out, err = filled("push", "nas", "web")
    assert (code, "pushed web:latest @" in out, " to nas (new)" in out) == (0, True, True)
    assert "sent in 1 pack" in err
    assert filled("push", "nas", "web")[1] == "nas is up to date: 1 ref\n"
    assert filled("pull", "nas", "web")[1] == "up to date with nas: 1 ref\n"
    assert "cloned 1 ref" in filled("clone", "nas", "copy")[1]
    (Path("b.bin")).write_bytes(b"more")
    filled("add", "b.bin", "web")
    code, out, err = filled("pull", "nas", "web")
    assert "web:latest stays" in out
    assert "llmos push nas web:latest" in err


def test_a_dry_run_changes_nothing(filled: Run, tmp_path: Path) -> None:
    code, out, err = filled("push", "nas", "--all", "--dry-run")
    assert (code, "would push web:latest" in out, "to send in 1 pack" in err) == (0, True, True)
    assert not (tmp_path / "nas").exists()
    filled("push", "nas", "--all")
    assert filled("--store", "copy", "init")[0] == 0
    code, out, err = filled("--store", "copy", "pull", "./nas", "web", "--dry-run")
    assert (code, "would pull web:latest" in out, "to fetch" in err) == (0, True, True)
    assert list((tmp_path / "copy/packs").rglob("*.pack")) == []


def test_a_url_needs_no_name(filled: Run) -> None:
    code, pushed, _ = filled("push", "./usb", "web", "--json")
    assert (code, pushed["remote"]) == (0, None)
    assert filled("clone", "./usb", "copy")[0] == 0


def test_refs_or_all_but_not_both_or_neither(filled: Run) -> None:
    for verb in ("push", "pull"):
        assert filled(verb, "nas")[0] == 2
        assert filled(verb, "nas", "web", "--all")[0] == 2


def test_exit_codes(filled: Run, tmp_path: Path) -> None:
    filled("push", "nas", "web")
    assert filled("push", "nowhere", "web")[0] == 10
    assert filled("push", "nas", "absent")[0] == 10
    assert filled("pull", "nas", "absent")[0] == 10
    assert filled("push", "nas", "we/b")[0] == 2
    assert filled("push", "ext::sh", "web")[0] == 2
    assert filled("push", "--", "--upload-pack=x", "web")[0] == 10
    assert filled("push", "./no/such/disk", "web")[0] == 16
    assert filled("clone", "nowhere", "copy")[0] == 10
    (tmp_path / "nas/FORMAT").write_bytes(b"junk")
    assert filled("push", "nas", "web")[0] == 13
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/x.jpg").write_bytes(b"")
    assert filled("remote", "add", "p", "photos")[0] == 14
    assert filled("remote", "add", "-x", "nas")[0] == 2


def test_a_conflict_says_the_way_out(filled: Run) -> None:
    Path("b.bin").write_bytes(b"theirs")
    filled("--store", "other", "init")
    filled("--store", "other", "add", "b.bin", "web")
    filled("--store", "other", "push", "./nas", "web")
    code, _, err = filled("push", "nas", "web")
    assert code == 17
    assert "hint: get it first: llmos pull nas web:latest; or replace it there: --force" in err
    assert filled("push", "nas", "web", "--force")[0] == 0
    filled("--store", "third", "init")
    filled("--store", "third", "add", "b.bin", "a.bin", "web")
    code, _, err = filled("--store", "third", "pull", "./nas", "web")
    assert (code, "--force" in err) == (17, True)


def test_what_was_replaced_by_force_elsewhere_moves_on_by_a_pull(filled: Run) -> None:
    Path("b.bin").write_bytes(b"theirs")
    filled("--store", "other", "init")
    filled("--store", "other", "add", "b.bin", "web")
    filled("--store", "other", "push", "./nas", "web")
    filled("push", "nas", "web", "--force")
    code, pulled, _ = filled("--store", "other", "pull", "./nas", "web", "--json")
    assert (code, pulled["refs"][0]["status"]) == (0, "moved")


def test_remotes_are_listed_and_forgotten(filled: Run, tmp_path: Path) -> None:
    assert filled("remote", "ls", "--json")[1] == {"remotes": [{"remote": "nas", "url": str(tmp_path / "nas")}]}
    assert "nas" in filled("remote", "ls")[1]
    assert filled("remote", "rm", "nas")[0] == 0
    assert filled("remote", "rm", "nas")[0] == 10
    assert filled("remote", "ls")[1] == ""


def test_a_remote_is_a_store_that_fsck_and_gc_work_on(filled: Run) -> None:
    filled("push", "nas", "web")
    assert filled("--store", "nas", "fsck")[0] == 0
    assert filled("--store", "nas", "gc")[0] == 0
    assert filled("--store", "nas", "ls")[0] == 0


@pytest.mark.parametrize("verb", ["remote", "push", "pull", "clone"])
def test_help_shows_an_example(llmos: Run, verb: str) -> None:
    code, out, _ = llmos(verb, "--help")
    assert code == 0
    assert f"Examples:\n    llmos {verb}" in out
