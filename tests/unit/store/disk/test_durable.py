import errno
import os
import stat
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from llmos_cli.errors import AccessDenied, Damaged, LlmosError, NoSpace, NotFound, Unsafe
from llmos_cli.store.disk import durable
from llmos_cli.store.disk.durable import Destination


def failing(error: int, only: Callable[[int], bool] = lambda fd: True) -> Callable[[int], None]:
    """An fsync that fails, for all files or for some."""
    real = os.fsync

    def fsync(fd: int) -> None:
        if only(fd):
            raise OSError(error, os.strerror(error))
        real(fd)

    return fsync


def is_folder(fd: int) -> bool:
    return stat.S_ISDIR(os.fstat(fd).st_mode)


def temporaries(folder: Path) -> list[Path]:
    return list(folder.glob("**/.tmp-*"))


def test_a_new_file_has_its_bytes(tmp_path: Path) -> None:
    with durable.new_file(tmp_path / "f") as file:
        durable.write_all(file, b"a", bytearray(b"bc"), memoryview(b""), memoryview(b"d"))
    assert (tmp_path / "f").read_bytes() == b"abcd"


def test_an_error_while_writing_leaves_no_file(tmp_path: Path) -> None:
    def write() -> None:
        with durable.new_file(tmp_path / "f") as file:
            durable.write_all(file, b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("link", [False, True], ids=["file", "dangling link"])
def test_a_new_file_never_replaces_or_follows_what_is_there(tmp_path: Path, *, link: bool) -> None:
    path = tmp_path / "f"
    if link:
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.write_bytes(b"old")
    with pytest.raises(FileExistsError), durable.new_file(path):
        pass
    assert path.is_symlink() if link else path.read_bytes() == b"old"
    assert not (tmp_path / "elsewhere").exists()


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.writev
    monkeypatch.setattr(durable.os, "writev", lambda fd, parts: real(fd, [bytes(parts[0])[:3]]))
    with durable.new_file(tmp_path / "f") as file:
        durable.write_all(file, b"0123456789", b"ab", b"cdefg")
    assert (tmp_path / "f").read_bytes() == b"0123456789abcdefg"


def test_more_parts_than_one_system_call_takes(tmp_path: Path) -> None:
    parts = [bytes([number % 256]) * (number % 5) for number in range(3000)]
    with durable.new_file(tmp_path / "f") as file:
        durable.write_all(file, *parts)
    assert (tmp_path / "f").read_bytes() == b"".join(parts)


def test_a_failed_fsync_is_reported_once_and_the_file_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(durable.os, "fsync", failing(errno.EIO, lambda fd: calls.append(fd) is None))
    with pytest.raises(Damaged, match="input/output error"):
        durable.write_file(tmp_path / "f", b"bytes")
    assert len(calls) == 1
    assert not list(tmp_path.iterdir())


def test_no_space_that_only_fsync_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_bytes(b"old")
    monkeypatch.setattr(durable.os, "fsync", failing(errno.ENOSPC))
    with pytest.raises(NoSpace):
        durable.write_file(tmp_path / "f", b"new bytes")
    assert (tmp_path / "f").read_bytes() == b"old"
    assert not temporaries(tmp_path)


def test_a_new_name_whose_folder_cannot_be_synced_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temp = tmp_path / ".tmp-1"
    temp.write_bytes(b"x")
    monkeypatch.setattr(durable.os, "fsync", failing(errno.EIO, is_folder))
    with pytest.raises(Damaged):
        durable.publish_new(temp, tmp_path / "name")
    assert not list(tmp_path.iterdir())


def test_a_file_system_that_cannot_sync_folders_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable.os, "fsync", failing(errno.EINVAL, is_folder))
    durable.make_folder(tmp_path / "a" / "b")
    durable.write_file(tmp_path / "a" / "b" / "f", b"x")
    with Destination(tmp_path / "out") as destination:
        with destination.replace("c/d") as fd:
            os.write(fd, b"y")
        destination.sync()
    assert (tmp_path / "out" / "c" / "d").read_bytes() == b"y"


@pytest.mark.parametrize("has_links", [True, False], ids=["hard links", "no hard links"])
def test_one_of_many_racers_gets_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, has_links: bool) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    if not has_links:
        monkeypatch.setattr(durable.os, "link", refuse)
    barrier = threading.Barrier(32)

    def race(number: int) -> bool:
        temp = durable.temp_path(tmp_path)
        durable.write_file(temp, b"%d" % number)
        barrier.wait()
        return durable.publish_new(temp, tmp_path / "name")

    with ThreadPoolExecutor(32) as threads:
        won = list(threads.map(race, range(32)))
    assert won.count(True) == 1
    assert (tmp_path / "name").read_bytes() == b"%d" % won.index(True)
    assert [path.name for path in tmp_path.iterdir()] == ["name"]


def test_folders_are_made_while_others_remove_them(tmp_path: Path) -> None:
    stop = threading.Event()

    def remove() -> None:
        while not stop.is_set():
            durable.remove_empty_folder(tmp_path / "a" / "b")
            durable.remove_empty_folder(tmp_path / "a")
            time.sleep(0.0002)

    with ThreadPoolExecutor(1) as threads:
        done = threads.submit(remove)
        try:
            for _ in range(200):
                durable.make_folder(tmp_path / "a" / "b")
        finally:
            stop.set()
        done.result()


def test_a_file_in_a_folders_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(LlmosError, match="Not a directory while creating"):
        durable.make_folder(tmp_path / "a" / "b")
    with pytest.raises(LlmosError, match="Not a directory while creating"):
        durable.make_folder(tmp_path / "a")


def test_moving_what_is_gone_is_no_error_but_a_missing_target_is(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    assert not durable.move(tmp_path / "gone", tmp_path / "b")
    with pytest.raises(NotFound):
        durable.move(tmp_path / "a", tmp_path / "nowhere" / "b")
    assert durable.move(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"x"


def test_removing_a_tree_does_not_follow_links(tmp_path: Path) -> None:
    (tmp_path / "outside" / "deep").mkdir(parents=True)
    (tmp_path / "outside" / "file").write_bytes(b"stays")
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub" / "link").symlink_to(tmp_path / "outside")
    (tree / "file").symlink_to(tmp_path / "outside" / "file")
    durable.remove_tree(tree)
    assert not tree.exists()
    assert (tmp_path / "outside" / "file").read_bytes() == b"stays"


def test_touching_or_removing_what_is_gone_is_silent(tmp_path: Path) -> None:
    durable.touch(tmp_path / "gone")
    assert not durable.remove(tmp_path / "gone")
    durable.remove_empty_folder(tmp_path / "gone")


def test_a_volatile_file_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(durable.os, "replace", refuse)
    with pytest.raises(NoSpace):
        durable.write_volatile(tmp_path / "lease", b"x")
    assert not list(tmp_path.iterdir())


class TestDestination:
    def test_files_appear_whole_with_their_folders(self, tmp_path: Path) -> None:
        with Destination(tmp_path / "out") as destination:
            for path in ("a", "b/c", "b/d/e"):
                with destination.replace(path) as fd:
                    os.write(fd, path.encode())
                    assert not (tmp_path / "out" / path).exists()
            destination.sync()
            assert destination.kind("b/c") == "file"
            assert destination.kind("b/d") == "other"
            assert destination.kind("b/x") is None
            assert destination.kind("no/such/folder") is None
        assert [(tmp_path / "out" / path).read_text() for path in ("a", "b/c", "b/d/e")] == ["a", "b/c", "b/d/e"]

    def test_a_linked_folder_inside_is_refused_and_its_target_untouched(self, tmp_path: Path) -> None:
        outside = tmp_path / "outside"
        outside.mkdir()
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "sub").symlink_to(outside)
        with Destination(tmp_path / "out") as destination:
            with pytest.raises(Unsafe, match="refusing to write through it"), destination.replace("sub/f"):
                pass
            with pytest.raises(Unsafe):
                destination.kind("sub/f")
        assert not list(outside.iterdir())

    @pytest.mark.parametrize("path", ["../f", "a/../../f", "/f", "", "."])
    def test_a_path_that_leads_out_is_refused(self, tmp_path: Path, path: str) -> None:
        with Destination(tmp_path / "out") as destination, pytest.raises(Unsafe), destination.replace(path):
            pass
        assert [found.name for found in tmp_path.iterdir()] == ["out"]

    def test_a_link_in_a_files_place_is_replaced_not_followed(self, tmp_path: Path) -> None:
        target = tmp_path / "target"
        target.write_bytes(b"stays")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "f").symlink_to(target)
        with Destination(tmp_path / "out") as destination:
            assert destination.kind("f") == "other"
            with destination.replace("f") as fd:
                os.write(fd, b"new")
        assert target.read_bytes() == b"stays"
        assert not (tmp_path / "out" / "f").is_symlink()

    def test_a_file_in_a_folders_place_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"stays")
        with Destination(tmp_path) as destination, pytest.raises(Unsafe), destination.replace("a/b"):
            pass
        assert (tmp_path / "a").read_bytes() == b"stays"

    def test_an_error_leaves_the_old_file_and_nothing_else(self, tmp_path: Path) -> None:
        (tmp_path / "f").write_bytes(b"old")

        def write() -> None:
            with Destination(tmp_path) as destination, destination.replace("f") as fd:
                os.write(fd, b"half")
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write()
        assert [path.name for path in tmp_path.iterdir()] == ["f"]
        assert (tmp_path / "f").read_bytes() == b"old"

    def test_more_folders_than_descriptors(self, tmp_path: Path) -> None:
        before = len(os.listdir("/proc/self/fd"))
        with Destination(tmp_path / "out") as destination:
            for number in range(400):
                with destination.replace(f"{number}/{'/'.join('abcdegh')}/f") as fd:
                    os.write(fd, b"%d" % number)
            assert len(os.listdir("/proc/self/fd")) - before < 150
            destination.sync()
        assert len(list((tmp_path / "out").glob("**/f"))) == 400


@pytest.mark.root
def test_a_full_disk_is_no_space_and_leaves_nothing(mount: Callable[..., Path]) -> None:
    folder = mount("1m")
    with pytest.raises(NoSpace), durable.new_file(folder / "f") as file:
        durable.write_all(file, bytes(2 << 20))
    assert not list(folder.iterdir())
    durable.write_file(folder / "f", b"fits")


@pytest.mark.root
def test_a_read_only_disk_is_access_denied(mount: Callable[..., Path], remount: Callable[[Path, str], None]) -> None:
    folder = mount("1m")
    (folder / "f").write_bytes(b"old")
    remount(folder, "ro")
    for attempt in (
        lambda: durable.write_file(folder / "f", b"new"),
        lambda: durable.make_folder(folder / "new"),
        lambda: durable.remove(folder / "f"),
        lambda: durable.move(folder / "f", folder / "g"),
        lambda: durable.write_volatile(folder / "v", b""),
    ):
        with pytest.raises(AccessDenied, match="Read-only file system while"):
            attempt()
    assert (folder / "f").read_bytes() == b"old"


def test_a_folder_without_permission_is_access_denied(
    tmp_path: Path, as_nobody: Callable[[Callable[[], Any]], Any]
) -> None:
    (tmp_path / "locked").mkdir(mode=0o700)
    tmp_path.chmod(0o755)

    def attempt() -> str:
        try:
            durable.write_file(tmp_path / "locked" / "f", b"x")
        except LlmosError as exc:
            return exc.code
        return "written"

    if os.geteuid() == 0:
        assert as_nobody(attempt) == "access-denied"
