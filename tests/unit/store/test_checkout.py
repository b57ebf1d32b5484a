import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmos_cli.errors import AccessDenied, Damaged, LlmosError, NoSpace, Unsafe
from llmos_cli.formats.ids import object_id
from llmos_cli.formats.manifest import FileEntry, Manifest
from llmos_cli.formats.names import RefName
from llmos_cli.progress import Silent
from llmos_cli.store.checkout import CheckoutPlan, execute_checkout, plan_checkout
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import read_manifest
from llmos_cli.store.refs.refs import read_ref


def manifest(store: Store, name: str = "x") -> Manifest:
    entry = read_ref(store, RefName(name))
    assert entry is not None
    return read_manifest(store, entry.id)


def out(store: Store, target: Path, *, force: bool = False) -> None:
    execute_checkout(store, plan_checkout(manifest(store), target, force=force), Silent())


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("**/*") if path.is_file()}


@pytest.fixture
def files(lab: Any) -> dict[str, bytes]:
    return {
        "a.txt": b"text",
        "empty": b"",
        "sub/deep/er/f.bin": lab.noise(9 << 20),
        "sub/g": lab.text(300_000),
        "sub2/empty": b"",
    }


def test_files_come_out_byte_for_byte(store: Store, lab: Any, tmp_path: Path, files: dict[str, bytes]) -> None:
    lab.add("x", files)
    done = execute_checkout(store, plan_checkout(manifest(store), tmp_path / "new" / "out", force=False), Silent())
    assert tree(tmp_path / "new" / "out") == files
    assert (done.files, done.bytes) == (5, sum(map(len, files.values())))


def test_a_plan_writes_nothing(store: Store, lab: Any, tmp_path: Path) -> None:
    lab.add("x", {"f": b"1"})
    plan = plan_checkout(manifest(store), tmp_path / "out", force=False)
    assert plan.total_bytes == 1
    assert not (tmp_path / "out").exists()


def test_existing_files_are_refused_before_anything_is_written(store: Store, lab: Any, tmp_path: Path) -> None:
    lab.add("x", {"a": b"new", "sub/b": b"new"})
    target = tmp_path / "out"
    (target / "sub").mkdir(parents=True)
    (target / "sub" / "b").write_bytes(b"old")
    (target / "mine").write_bytes(b"mine")
    with pytest.raises(Unsafe, match="sub/b exists") as caught:
        out(store, target)
    assert "--force" in (caught.value.hint or "")
    assert tree(target) == {"sub/b": b"old", "mine": b"mine"}
    out(store, target, force=True)
    assert tree(target) == {"a": b"new", "sub/b": b"new", "mine": b"mine"}


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("what", ["link", "dangling link", "folder", "pipe", "linked folder", "file as folder"])
def test_what_is_no_file_is_refused_even_with_force(
    store: Store, lab: Any, tmp_path: Path, what: str, *, force: bool
) -> None:
    lab.add("x", {"a": b"1", "sub/b": b"2"})
    target, outside = tmp_path / "out", tmp_path / "outside"
    (target / "sub").mkdir(parents=True)
    outside.mkdir()
    (outside / "b").write_bytes(b"outside")
    place = target / "sub" / "b"
    if what == "link":
        place.symlink_to(outside / "b")
    elif what == "dangling link":
        place.symlink_to(outside / "c")
    elif what == "folder":
        place.mkdir()
    elif what == "pipe":
        os.mkfifo(place)
    else:
        (target / "sub").rmdir()
        if what == "linked folder":
            (target / "sub").symlink_to(outside)
        else:
            (target / "sub").write_bytes(b"")
    with pytest.raises(Unsafe):
        out(store, target, force=force)
    assert not (target / "a").exists()
    assert tree(outside) == {"b": b"outside"}


def test_a_link_planted_after_the_plan_is_not_followed(store: Store, lab: Any, tmp_path: Path) -> None:
    lab.add("x", {"sub/b": b"2"})
    target, outside = tmp_path / "out", tmp_path / "outside"
    outside.mkdir()
    plan = plan_checkout(manifest(store), target, force=False)
    target.mkdir()
    (target / "sub").symlink_to(outside)
    with pytest.raises(Unsafe):
        execute_checkout(store, plan, Silent())
    assert not list(outside.iterdir())


def test_a_manifest_that_names_a_place_outside_is_refused(store: Store, lab: Any, tmp_path: Path) -> None:
    lab.add("x", {"f": b"1"})
    chunks = manifest(store).files[0].chunks
    for path in ("../f", "/f", "a/../../f", "a\\f"):
        with pytest.raises(Unsafe):
            plan_checkout(Manifest("files", (FileEntry(path, chunks),)), tmp_path / "out", force=True)
        with pytest.raises(Unsafe):
            execute_checkout(store, CheckoutPlan(tmp_path / "out", (FileEntry(path, chunks),), 1), Silent())
    assert not tree(tmp_path / "out")
    assert not (tmp_path / "f").exists()


def test_a_target_that_is_a_link_to_a_folder_is_the_users_choice(store: Store, lab: Any, tmp_path: Path) -> None:
    lab.add("x", {"f": b"1"})
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    out(store, tmp_path / "link")
    assert tree(tmp_path / "real") == {"f": b"1"}


@pytest.mark.parametrize("target", ["file", "dangling"])
def test_a_target_that_cannot_be_a_folder(store: Store, lab: Any, tmp_path: Path, target: str) -> None:
    lab.add("x", {"f": b"1"})
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(LlmosError):
        out(store, tmp_path / target)
    assert not (tmp_path / "nowhere").exists()


def test_a_damaged_object_leaves_whole_files_and_the_old_one(store: Store, lab: Any, tmp_path: Path) -> None:
    data = lab.noise(9 << 20)
    lab.add("x", {"a": b"fine", "b": data})
    chunk = manifest(store).files[1].chunks[1]
    lab.flip(*lab.payload_at(chunk.id))
    target = tmp_path / "out"
    target.mkdir()
    (target / "b").write_bytes(b"old")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(Damaged, match=chunk.id.short):
        out(store, target, force=True)
    assert tree(target) == {"a": b"fine", "b": b"old"}
    assert len(os.listdir("/proc/self/fd")) <= before


def test_many_folders(store: Store, lab: Any, tmp_path: Path) -> None:
    files = {f"{number:04}/sub/f": b"%d" % number for number in range(600)}
    lab.add("x", files)
    out(store, tmp_path / "out")
    assert tree(tmp_path / "out") == files


def test_what_is_checked_out_is_not_tied_to_the_store(store: Store, lab: Any, tmp_path: Path) -> None:
    lab.add("x", {"f": b"original"})
    out(store, tmp_path / "out")
    (tmp_path / "out" / "f").write_bytes(b"changed!")
    assert lab.read("x") == {"f": b"original"}
    assert object_id(b"original") in {entry.id for entry in store.index.entries(next(iter(store.index.packs())))}


@pytest.mark.root
def test_no_space_is_seen_before_anything_is_written(store: Store, lab: Any, mount: Callable[..., Path]) -> None:
    folder = mount("1m")
    (folder / "f").write_bytes(b"old")
    lab.add("x", {"f": lab.noise(2 << 20)})
    with pytest.raises(NoSpace, match="bytes free"):
        out(store, folder, force=True)
    assert tree(folder) == {"f": b"old"}


@pytest.mark.root
def test_space_that_runs_out_on_the_way(
    store: Store, lab: Any, mount: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = mount("1m")
    (folder / "f").write_bytes(b"old")
    lab.add("x", {"e": b"small", "f": lab.noise(2 << 20)})
    monkeypatch.setattr("llmos_cli.store.checkout._check_space", lambda plan: None)
    with pytest.raises(NoSpace):
        out(store, folder, force=True)
    assert tree(folder) == {"e": b"small", "f": b"old"}


def test_a_folder_without_permission(store: Store, lab: Any, tmp_path: Path, as_nobody: Any) -> None:
    lab.add("x", {"f": b"1"})
    store.root.parent.chmod(0o755)
    (tmp_path / "out").mkdir(mode=0o755)
    plan = plan_checkout(manifest(store), tmp_path / "out", force=False)

    def attempt() -> str:
        try:
            execute_checkout(store, plan, Silent())
        except AccessDenied as exc:
            return exc.message
        return ""

    if os.geteuid() == 0:
        assert str(tmp_path / "out" / "f") in as_nobody(attempt)


@pytest.mark.parametrize("path", [".git/hooks/post-checkout", ".llmos/config.toml", "sub/.GIT/config", ".llmos"])
def test_settings_and_hooks_are_never_written(store: Store, lab: Any, tmp_path: Path, path: str) -> None:
    lab.add("x", {"a.txt": b"text", path: b"#!/bin/sh"})
    with pytest.raises(Unsafe, match="settings or hooks"):
        out(store, tmp_path / "out", force=True)
    assert not (tmp_path / "out").exists()
