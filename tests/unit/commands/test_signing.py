"""Signing as it is typed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Llmos = Callable[..., Any]


@pytest.fixture
def key(llmos: Llmos, store: Path, folder: Path) -> str:
    """alice's public key; the store trusts it, and the private one is in alice.key."""
    public: str = llmos("tag", "--new-key", "alice.key", "--json").json["public"]
    config = store / "config.toml"
    config.write_text(config.read_text() + f'\n[trust]\nalice = "{public}"\n')
    return public


def test_from_a_key_to_a_signed_pull(llmos: Llmos, store: Path, key: str, folder: Path) -> None:
    assert llmos("remote", "add", "nas", "nas").code == 0
    assert llmos("push", "nas", "notes").code == 0
    failed = llmos("pull", "nas", "notes", "--require-signed", "--json")
    assert (failed.code, failed.error["code"]) == (14, "unsafe")
    signed = llmos("tag", "notes", "--sign", "alice.key", "--valid-days", "30", "--json").json["signed"]
    assert signed["key"] == key.removeprefix("ed25519:")
    assert "gave nas 1 signature" in llmos("push", "nas", "notes").out
    assert llmos("pull", "nas", "notes", "--require-signed").code == 0
    assert llmos("show", "notes", "--json").json["signed"][0]["name"] == "alice"
    assert "signed by  alice, until 20" in llmos("show", "notes").out
    assert [len(move["signed"]) for move in llmos("log", "notes", "--json").json["history"]] == [1, 0]
    assert "signed by alice" in llmos("log", "notes").out


def test_a_new_ref_is_signed_as_it_is_made(llmos: Llmos, store: Path, key: str) -> None:
    done = llmos("tag", "notes", "notes:v2", "--sign", "alice.key")
    assert [line.partition(" @")[0].partition(" points")[0] for line in done.out.splitlines()] == [
        "notes:v2 now",
        "signed notes:v2",
    ]
    assert llmos("show", "notes:v2", "--json").json["signed"][0]["state"] == "good"
    assert llmos("show", "notes", "--json").json["signed"] == []


def test_settings_survive_what_is_done_with_remotes(llmos: Llmos, store: Path, key: str) -> None:
    assert llmos("remote", "add", "nas", "nas").code == 0
    config = store / "config.toml"
    config.write_text('require_signed = ["nas"]\n' + config.read_text())
    assert llmos("remote", "add", "other", "other").code == 0
    assert llmos("push", "nas", "notes").code == 0
    assert llmos("pull", "nas", "notes").code == 14
    assert llmos("pull", "./nas", "notes").code == 14
    assert llmos("remote", "rm", "nas").code == 14
    assert (key in config.read_text(), 'require_signed = ["nas"]' in config.read_text()) == (True, True)


def test_a_remote_that_is_misspelt_in_the_settings_is_refused(llmos: Llmos, store: Path, key: str) -> None:
    assert llmos("remote", "add", "nas", "nas").code == 0
    config = store / "config.toml"
    config.write_text('require_signed = ["nsa"]\n' + config.read_text())
    failed = llmos("ls")
    assert (failed.code, "did you mean 'nas'?" in failed.err) == (2, True)


@pytest.mark.parametrize(
    "words",
    [
        ("tag",),
        ("tag", "notes"),
        ("tag", "notes", "--valid-days", "3"),
        ("tag", "notes", "--new-key", "b.key"),
        ("tag", "notes", "--sign", "a.txt"),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(llmos: Llmos, store: Path, folder: Path, words: tuple[str, ...]) -> None:
    (folder / "a.txt").chmod(0o600)
    assert llmos(*words).code == 2
    assert not (folder / "b.key").exists()


def test_a_key_that_others_can_read_signs_nothing(llmos: Llmos, store: Path, key: str, folder: Path) -> None:
    (folder / "alice.key").chmod(0o644)
    failed = llmos("tag", "notes", "notes:v2", "--sign", "alice.key")
    assert (failed.code, "chmod 600" in failed.err) == (14, True)
    assert llmos("show", "notes:v2").code == 10


def test_nothing_is_pruned_on_the_word_of_a_remote_that_is_not_believed(llmos: Llmos, store: Path, key: str) -> None:
    assert llmos("remote", "add", "nas", "nas").code == 0
    assert llmos("tag", "notes", "--sign", "alice.key").code == 0
    assert llmos("push", "nas", "notes").code == 0
    assert llmos("pull", "nas", "--all", "--prune", "--require-signed").code == 14


def test_a_hub_signs_nothing(llmos: Llmos, store: Path) -> None:
    assert llmos("pull", "hf://org/tiny", "--require-signed").code == 14


def test_a_malformed_key_in_the_settings_is_refused(llmos: Llmos, store: Path) -> None:
    config = store / "config.toml"
    config.write_text(config.read_text() + '\n[trust]\nalice = "ed25519:abc"\n')
    failed = llmos("ls")
    assert (failed.code, "[trust] alice" in failed.err) == (2, True)
