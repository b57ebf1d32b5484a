import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmos_cli.errors import AccessDenied, NotFound, Unsafe, UsageError
from llmos_cli.remote.open import add_remote, find_remote, is_ready, normal_url, open_transport, remove_remote
from llmos_cli.store.local import open_store

Exchange = Any


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/mnt/nas", "/mnt/nas"),
        ("nas", "/home/me/here/nas"),
        ("./a:b", "/home/me/here/a:b"),
        ("file:///mnt/nas", "/mnt/nas"),
        ("file://localhost/mnt/a%20b", "/mnt/a b"),
        ("FILE:///mnt/nas", "/mnt/nas"),
        ("--upload-pack=touch x", "/home/me/here/--upload-pack=touch x"),
    ],
)
def test_a_folder_is_kept_by_its_absolute_path(text: str, expected: str) -> None:
    assert normal_url(text, Path("/home/me/here")) == expected


def test_dots_are_resolved(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert normal_url("../b", tmp_path / "a") == str(tmp_path / "b")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ext::sh -c touch% /tmp/x",
        "ext:sh",
        "ftp://host/models",
        "ssh://-oProxyCommand=x/y",
        "host:path",
        "C:\\models",
        "file://host/path",
        "file://",
        "file:///a%00b",
        "file:///a%0ab",
        "file:relative",
        "a\nb",
        "a\0b",
        "\x1b[31m",
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        normal_url(text, Path("/work"))
    assert "a remote is a folder" in str(caught.value.hint) or "file:///PATH" in str(caught.value.hint)


def test_a_remote_is_remembered_by_the_store(exchange: Exchange, tmp_path: Path) -> None:
    store = exchange.store("here")
    assert add_remote(store, "nas", "nas", tmp_path) == str(tmp_path / "nas")
    assert not (tmp_path / "nas").exists()
    with open_store(store.root) as again:
        assert again.config.remotes == {"nas": str(tmp_path / "nas")}
        assert find_remote(again, "nas", Path("/")).transport.url == str(tmp_path / "nas")
        assert remove_remote(again, "nas") == str(tmp_path / "nas")
    with open_store(store.root) as again, pytest.raises(NotFound, match="no remote 'nas'"):
        find_remote(again, "nas", Path("/"))


def test_a_relative_path_written_into_the_settings_starts_at_the_store(exchange: Exchange, tmp_path: Path) -> None:
    store = exchange.store("here")
    (store.root / "config.toml").write_text('[remotes]\nnas = "../nas"\nbad = "ftp://b"\n')
    with open_store(store.root) as again:
        assert find_remote(again, "nas", Path("/")).transport.url == str(tmp_path / "nas")
        with pytest.raises(UsageError, match="ftp"):
            find_remote(again, "bad", Path("/"))


def test_settings_survive_a_new_remote(exchange: Exchange, tmp_path: Path) -> None:
    store = exchange.store("here")
    (store.root / "config.toml").write_text("[gc]\ngrace_hours = 3\n[remotes]\n")
    with open_store(store.root) as again:
        add_remote(again, "nas", "nas", tmp_path)
    with open_store(store.root) as again:
        assert again.config.gc.grace_hours == 3


def test_a_name_is_not_changed_behind_anybodys_back(exchange: Exchange, tmp_path: Path) -> None:
    store = exchange.store("here")
    add_remote(store, "nas", "one", tmp_path)
    add_remote(store, "nas", "one", tmp_path)
    with pytest.raises(UsageError, match="already"):
        add_remote(store, "nas", "two", tmp_path)


@pytest.mark.parametrize("name", ["", "-x", "a/b", "a:b", "..", "a b", "../x", "x" * 200, "a\n"])
def test_malformed_names_are_refused(exchange: Exchange, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="malformed remote name"):
        add_remote(exchange.store("here"), name, "nas", tmp_path)


def test_a_folder_with_other_things_in_it_is_refused(exchange: Exchange, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/one.jpg").write_bytes(b"")
    store = exchange.store("here")
    with pytest.raises(Unsafe, match=r"one\.jpg"):
        add_remote(store, "nas", "photos", tmp_path)
    assert store.config.remotes == {}
    (tmp_path / "empty").mkdir()
    add_remote(store, "nas", "empty", tmp_path)


def test_a_file_is_no_remote(exchange: Exchange, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="not a folder"):
        add_remote(exchange.store("here"), "nas", "file", tmp_path)


def test_a_folder_that_holds_a_store_means_that_store(exchange: Exchange, tmp_path: Path) -> None:
    exchange.store("project/.llmos")
    assert open_transport(str(tmp_path / "project")).url == str(tmp_path / "project/.llmos")
    assert open_transport(str(tmp_path / "project/.llmos")).url == str(tmp_path / "project/.llmos")


def test_a_store_is_not_its_own_remote(exchange: Exchange, tmp_path: Path) -> None:
    store = exchange.store("project/.llmos")
    (tmp_path / "link").symlink_to(tmp_path / "project")
    for text in ("project", "./project/.llmos", "./link"):
        with pytest.raises((UsageError, NotFound)):
            find_remote(store, text, tmp_path)
    with pytest.raises(UsageError, match="this store itself"):
        find_remote(store, "./link", tmp_path)


def test_an_unknown_name_suggests_the_nearest(exchange: Exchange, tmp_path: Path) -> None:
    store = exchange.store("here")
    add_remote(store, "nas", "nas", tmp_path)
    with pytest.raises(NotFound) as caught:
        find_remote(store, "nsa", tmp_path)
    assert caught.value.hint == "did you mean 'nas'?"


@pytest.fixture
def locked() -> Iterator[Path]:
    """A folder that this process may not look into; as root it becomes somebody else for the test."""
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "locked")
        (folder / "inside").mkdir(parents=True)
        os.chmod(name, 0o755)
        os.chmod(folder, 0)
        if root:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            if root:
                os.seteuid(0)
            os.chmod(folder, 0o700)


def test_a_folder_without_permission_is_denied_not_empty(locked: Path) -> None:
    with pytest.raises(AccessDenied, match="locked"):
        is_ready(open_transport(str(locked)))
    with pytest.raises(AccessDenied, match="locked"):
        open_transport(str(locked / "inside/deep"))
