import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from llmos_cli.config import Config, DataConfig, GcConfig
from llmos_cli.errors import AccessDenied, Damaged, LlmosError, NotFound, UnknownVersion, UsageError
from llmos_cli.progress import Silent
from llmos_cli.store.disk import durable
from llmos_cli.store.local import find_store, init_store, open_store, save_config
from llmos_cli.store.refs.refs import list_refs


def test_making_a_store_twice_changes_nothing(tmp_path: Path) -> None:
    root = tmp_path / "a" / "b" / ".llmos"
    assert init_store(root)
    (root / "config.toml").write_text("[gc]\ngrace_hours = 1\n")
    assert not init_store(root)
    with open_store(root) as store:
        assert store.config.gc.grace_hours == 1
    assert {path.name for path in root.iterdir()} >= {"FORMAT", "config.toml", "packs", "refs", "trash", "tmp"}


def test_without_format_there_is_no_store_and_making_it_can_be_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / ".llmos"
    real = durable.write_file

    def stop_before_format(path: Path, data: bytes, *, mode: int | None = None) -> None:
        if path.name == "FORMAT":
            raise KeyboardInterrupt
        real(path, data, mode=mode)

    monkeypatch.setattr(durable, "write_file", stop_before_format)
    with pytest.raises(KeyboardInterrupt):
        init_store(root)
    monkeypatch.undo()
    with pytest.raises(NotFound, match="no llmos store") as caught:
        open_store(root)
    assert "llmos init" in (caught.value.hint or "")
    assert init_store(root)
    open_store(root).close()


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"llmos 2\n", UnknownVersion),
        (b"llmos 1.1\n", UnknownVersion),
        (b"", Damaged),
        (b"llmos 1", Damaged),
        (b"llmos 1\n\n", Damaged),
        (b"\0" * 8, Damaged),
        (b"lloms 1\n", Damaged),
    ],
)
def test_a_format_that_is_unknown_or_damaged(
    store: Any, tmp_path: Path, content: bytes, error: type[LlmosError]
) -> None:
    store.close()
    (store.root / "FORMAT").write_bytes(content)
    (store.root / "index.db").unlink()
    with pytest.raises(error) as caught:
        open_store(store.root)
    assert caught.value.exit_code == 13
    assert type(caught.value) is error
    assert not (store.root / "index.db").exists()


@pytest.mark.parametrize(
    "content",
    [b"[gc", b"[gc]\ngrace = 1\n", b"\xff\xfe", b"[gc]\ngrace_hours = -1\n", b"x = 1", b"[data]\ncache_gb = true"],
)
def test_a_broken_config_is_a_usage_error_that_names_it(store: Any, content: bytes) -> None:
    store.close()
    (store.root / "config.toml").write_bytes(content)
    with pytest.raises(UsageError, match=r"config\.toml"):
        open_store(store.root)
    (store.root / "config.toml").unlink()
    with open_store(store.root) as again:
        assert again.config == Config()


def test_settings_are_kept(store: Any) -> None:
    wanted = Config(GcConfig(1.5, 3.0), {"origin": '/a "quoted" \\ place'}, data=DataConfig(2.5))
    save_config(store, wanted)
    assert store.config == wanted
    with open_store(store.root) as again:
        assert again.config == wanted


def test_a_copy_without_empty_folders_works(store: Any, lab: Any, tmp_path: Path) -> None:
    """Some tools do not copy them."""
    lab.add("x", {"f": b"1"})
    store.close()
    copy = tmp_path / "copy"
    shutil.copytree(store.root, copy)
    for path in copy.iterdir():
        if path.is_dir() and not list(path.iterdir()):
            path.rmdir()
    assert not (copy / "tmp").exists()
    with open_store(copy, Silent()) as again:
        assert lab.read("x", again) == {"f": b"1"}
        lab.add("y", {"f": b"2"}, store=again)
        lab.gc(store=again)
        lab.sound(again)


def test_finding_the_store(tmp_path: Path) -> None:
    home, project, named = tmp_path / "home", tmp_path / "project", tmp_path / "named"
    deep = project / "a" / "b"
    deep.mkdir(parents=True)
    home.mkdir()
    with pytest.raises(NotFound, match="no llmos store in") as caught:
        find_store(None, None, deep, home)
    assert caught.value.exit_code == 10
    init_store(home / ".llmos")
    assert find_store(None, None, deep, home) == home / ".llmos"
    init_store(project / ".llmos")
    assert find_store(None, None, deep, home) == project / ".llmos"
    init_store(named / ".llmos")
    assert find_store(None, str(named), deep, home) == named / ".llmos"
    assert find_store(named / ".llmos", str(project), deep, home) == named / ".llmos"
    with pytest.raises(NotFound, match="missing") as caught:
        find_store(tmp_path / "missing", None, deep, home)
    assert "init" in (caught.value.hint or "")
    (project / "a" / ".llmos").mkdir()  # not a store: only a folder of that name
    assert find_store(None, None, deep, home) == project / ".llmos"


def test_folders_that_may_not_be_looked_into(tmp_path: Path, as_nobody: Any) -> None:
    locked, home = tmp_path / "locked", tmp_path / "home"
    init_store(locked / ".llmos")
    init_store(home / ".llmos")
    for path in (tmp_path, home / ".llmos"):
        path.chmod(0o755)
    locked.chmod(0o700)

    def attempt() -> list[str]:
        found = [str(find_store(None, None, locked / "sub", home))]
        for explicit in (lambda: find_store(locked, None, home, home), lambda: open_store(locked / ".llmos")):
            try:
                explicit()
            except AccessDenied as exc:
                found.append(exc.code)
        return found

    if os.geteuid() == 0:
        assert as_nobody(attempt) == [str(home / ".llmos"), "access-denied", "access-denied"]


def test_an_empty_store_lists_nothing(store: Any) -> None:
    assert list_refs(store) == []
