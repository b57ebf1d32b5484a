"""What all commands have in common: global options, errors, exit codes, JSON."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmos_cli import __version__

Llmos = Callable[..., Any]

NEED_A_STORE = [
    ("add", "a.txt", "name"),
    ("checkout", "name", "out"),
    ("ls",),
    ("show", "name"),
    ("log", "name"),
    ("tag", "name", "other"),
    ("rm", "name"),
    ("du",),
    ("gc",),
    ("fsck",),
]


@pytest.mark.parametrize("words", NEED_A_STORE, ids=lambda words: words[0])
def test_outside_a_store_the_error_says_how_to_make_one(llmos: Llmos, folder: Path, words: tuple[str, ...]) -> None:
    (folder / "a.txt").write_text("x")
    ran = llmos(*words)
    assert (ran.code, ran.out) == (10, "")
    assert "error: no llmos store in" in ran.err
    assert "hint: make one here: llmos init" in ran.err
    ran = llmos(*words, "--json")
    assert (ran.code, ran.out) == (10, "")
    assert ran.error["code"] == "not-found"
    assert ran.error["exit_code"] == 10
    assert "llmos init" in ran.error["hint"]


@pytest.mark.parametrize(
    "words",
    [
        ("add", "a.txt", "no/slash"),
        ("add", "a.txt", "-dash"),
        ("checkout", "a:b:c", "out"),
        ("show", ".."),
        ("log", "name:"),
        ("tag", "notes", "new name"),
        ("rm", "na\x1b[31mme"),
        ("du", "@xyz"),
    ],
    ids=lambda words: words[0],
)
def test_a_malformed_name_is_a_usage_error(llmos: Llmos, store: Path, words: tuple[str, ...]) -> None:
    ran = llmos(*words)
    assert (ran.code, ran.out) == (2, "")
    assert "error: " in ran.err
    assert "hint: " in ran.err
    assert "\x1b" not in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.parametrize(
    "words", [("show", "nots"), ("log", "nots"), ("checkout", "nots", "out"), ("tag", "nots", "x"), ("rm", "nots")]
)
def test_an_unknown_ref_suggests_the_nearest(llmos: Llmos, store: Path, words: tuple[str, ...]) -> None:
    ran = llmos(*words)
    assert (ran.code, ran.out) == (10, "")
    assert "error: no ref nots:latest in this store" in ran.err
    assert "hint: did you mean notes" in ran.err


def test_a_mistyped_command_suggests_the_nearest(llmos: Llmos, folder: Path) -> None:
    ran = llmos("shwo")
    assert ran.code == 2
    assert "Did you mean 'show'" in ran.err
    assert "hint: llmos --help" in ran.err


def test_a_mistyped_option_suggests_the_nearest(llmos: Llmos, folder: Path) -> None:
    ran = llmos("gc", "--dryrun")
    assert ran.code == 2
    assert "--dry-run" in ran.err
    assert "hint: llmos gc --help" in ran.err
    assert llmos("gc", "--dryrun", "--json").error["code"] == "usage"


def test_a_missing_argument_is_named(llmos: Llmos, folder: Path) -> None:
    ran = llmos("show")
    assert ran.code == 2
    assert "REF" in ran.err


def test_global_options_stand_before_or_after_the_command(llmos: Llmos, folder: Path) -> None:
    first = llmos("--store", "a", "--json", "init").json
    second = llmos("init", "--json", "--store", "b").json
    assert first == {"store": str(folder / "a"), "created": True}
    assert second == {"store": str(folder / "b"), "created": True}
    assert llmos("ls", "--store", "a", "--json").json["store"] == str(folder / "a")
    assert llmos("--store", "a", "ls", "--store", "b", "--json").json["store"] == str(folder / "b")


def test_the_value_of_an_option_is_not_taken_for_an_option(llmos: Llmos, store: Path) -> None:
    ran = llmos("show", "--", "--json")
    assert ran.code == 2
    assert "malformed ref" in ran.err


def test_the_store_comes_from_the_environment(llmos: Llmos, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llmos("--store", "elsewhere", "init")
    monkeypatch.setenv("LLMOS_STORE", str(folder / "elsewhere"))
    assert llmos("ls", "--json").json["store"] == str(folder / "elsewhere")
    monkeypatch.setenv("LLMOS_STORE", "")
    assert llmos("ls").code == 10


def test_the_nearest_store_upward_is_used(llmos: Llmos, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    below = store.parent / "x" / "y"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    assert llmos("ls", "--json").json["store"] == str(store)


def test_quiet_leaves_only_results(llmos: Llmos, store: Path) -> None:
    ran = llmos("-q", "add", "a.txt", "other")
    assert ran.err == ""
    assert ran.out.startswith("added files other:latest @")
    assert llmos("add", "a.txt", "third").err != ""


def test_json_is_one_line_on_stdout_and_stderr_stays_empty(llmos: Llmos, store: Path) -> None:
    for words in (("ls",), ("show", "notes"), ("log", "notes"), ("du",), ("gc", "--dry-run"), ("fsck",)):
        ran = llmos(*words, "--json")
        assert (ran.code, ran.err) == (0, ""), words
        assert isinstance(ran.json, dict)


def test_verbose_shows_where_an_error_came_from(llmos: Llmos, store: Path) -> None:
    assert "Traceback" in llmos("-v", "show", "nots").err
    assert "Traceback" in llmos("show", "nots", "-v").err
    assert "Traceback" not in llmos("show", "nots").err


def test_a_bug_says_so_and_shows_its_traceback(llmos: Llmos, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("llmos_cli.store.refs.refs.ref_names", broken)
    ran = llmos("ls")
    assert ran.code == 1
    assert "Traceback" in ran.err
    assert f"error: this is a bug in llmos {__version__}: ZeroDivisionError: oh" in ran.err
    ran = llmos("ls", "--json")
    assert (ran.code, ran.error["code"]) == (1, "bug")
    assert any("ZeroDivisionError" in line for line in ran.error["traceback"])


def test_a_store_of_a_newer_version_is_refused(llmos: Llmos, store: Path) -> None:
    (store / "FORMAT").write_text("llmos 99\n")
    ran = llmos("ls")
    assert ran.code == 13
    assert "99" in ran.err
    assert "newer" in ran.err


def test_a_mistyped_setting_is_refused(llmos: Llmos, store: Path) -> None:
    (store / "config.toml").write_text("[gc]\ngrace_hour = 1\n")
    ran = llmos("ls")
    assert ran.code == 2
    assert "grace_hours" in ran.err


def test_version(llmos: Llmos, folder: Path) -> None:
    assert llmos("--version").out == f"llmos {__version__}\n"


def test_json_survives_odd_file_names(llmos: Llmos, store: Path) -> None:
    (store.parent / "ü 中.txt").write_text("x")
    llmos("add", "ü 中.txt", "odd")
    line = llmos("show", "odd", "--json").out
    assert line.isascii()
    assert json.loads(line)["files"] == [{"path": "ü 中.txt", "size": 1}]
