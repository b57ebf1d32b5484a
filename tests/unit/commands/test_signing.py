"""Signing as it is typed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from model_signing import hashing, verifying

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


@pytest.fixture
def release_key(folder: Path) -> Path:
    """An elliptic-curve key as openssl makes it; the public one is in release.pub."""
    private = ec.generate_private_key(ec.SECP256R1())
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    path = folder / "release.key"
    path.write_bytes(private.private_bytes(pem, serialization.PrivateFormat.TraditionalOpenSSL, plain))
    path.chmod(0o600)
    public = private.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / "release.pub").write_bytes(public)
    return path


def verify(folder: Path) -> None:
    """As `model_signing verify key release --signature release/model.sig --public-key release.pub` does."""
    verifier = verifying.Config().use_elliptic_key_verifier(public_key=folder / "release.pub")
    hashed = hashing.Config().set_ignored_paths(paths=["model.sig"])
    verifier.set_hashing_config(hashed).verify(folder / "release", folder / "release/model.sig")


def test_a_checkout_is_signed_for_others(llmos: Llmos, store: Path, folder: Path, release_key: Path) -> None:
    done = llmos("checkout", "notes", "release", "--oms", "release.key", "--json").json
    assert done["signature"] == str(folder / "release/model.sig")
    verify(folder)
    assert llmos("checkout", "notes", "release", "--oms", "release.key", "--force").code == 0
    verify(folder)
    assert [path.name for path in (folder / "release").glob(".*")] == []
    changed = next(path for path in (folder / "release").rglob("*") if path.is_file() and path.name != "model.sig")
    changed.write_bytes(changed.read_bytes() + b"!")
    with pytest.raises(ValueError, match="mismatch"):
        verify(folder)


def test_what_would_sign_the_wrong_thing_is_refused_before_anything_is_written(
    llmos: Llmos, store: Path, folder: Path, release_key: Path
) -> None:
    llmos("tag", "--new-key", "alice.key")
    for path, code, word in (("alice.key", 2, "elliptic-curve"), ("absent.key", 10, "absent.key")):
        failed = llmos("checkout", "notes", "release", "--oms", path)
        assert (failed.code, word in failed.err) == (code, True)
    (folder / "release").mkdir()
    (folder / "release/other.txt").write_bytes(b"not ours")
    failed = llmos("checkout", "notes", "release", "--oms", "release.key")
    assert (failed.code, "other.txt" in failed.err) == (14, True)
    release_key.chmod(0o644)
    assert llmos("checkout", "notes", "elsewhere", "--oms", "release.key").code == 14
    assert not (folder / "elsewhere").exists()
    assert [path.name for path in (folder / "release").iterdir()] == ["other.txt"]
