"""The cache of Hugging Face's tools, as they lay it out."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from llmos_cli.errors import Damaged, NotFound, UsageError
from llmos_cli.formats.names import parse_ref
from llmos_cli.progress import Silent
from llmos_cli.store.handle import Store
from llmos_cli.store.intake.add import execute_add, plan_add
from llmos_cli.store.intake.adopt import HARDLINK, REFLINK
from llmos_cli.store.refs.refs import ref_names
from llmos_cli.store.transaction import Commit

FIRST, SECOND = "a" * 40, "b" * 40


def add(store: Store, path: Path, **options: Any) -> Commit:
    return execute_add(store, plan_add([path]), parse_ref("x"), Silent(), **options)


def fill(repo: Path, commit: str, files: Mapping[str, bytes], *, big: int = 100) -> None:
    """What a download leaves: big files named by SHA-256, others as git does."""
    (repo / "blobs").mkdir(parents=True, exist_ok=True)
    for path, data in files.items():
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        blob = repo / "blobs" / (hashlib.sha256(data).hexdigest() if len(data) > big else git)
        blob.write_bytes(data)
        link = repo / "snapshots" / commit / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(*[".."] * (2 + path.count("/")), "blobs", blob.name))


@pytest.fixture
def files(lab: Any) -> dict[str, bytes]:
    return {"config.json": b"{}", "model.bin": lab.noise(5000), "1_Pooling/config.json": b'{"a": 1}'}


@pytest.fixture
def repo(tmp_path: Path, files: dict[str, bytes]) -> Path:
    """Two snapshots, main at the first."""
    repo = tmp_path / "hub" / "models--org--tiny.v1"
    fill(repo, FIRST, files)
    fill(repo, SECOND, {"config.json": b"{...}"})
    (repo / "refs" / "refs" / "pr").mkdir(parents=True)
    (repo / "refs" / "main").write_text(FIRST)
    (repo / "refs" / "refs" / "pr" / "1").write_text(SECOND)
    return repo


@pytest.mark.parametrize(
    "place",
    [
        "models--org--tiny.v1",
        f"models--org--tiny.v1/snapshots/{FIRST}",
        "org/tiny.v1",
        "org/tiny.v1@main",
        f"models--org--tiny.v1@{FIRST}",
    ],
)
def test_every_way_to_name_a_snapshot(store: Store, repo: Path, lab: Any, files: dict[str, bytes], place: str) -> None:
    add(store, repo.parent / place)
    assert lab.read("x") == files


def test_another_revision(store: Store, repo: Path, lab: Any) -> None:
    for place in (f"org/tiny.v1@{SECOND}", f"models--org--tiny.v1/snapshots/{SECOND}"):
        add(store, repo.parent / place)
        assert lab.read("x") == {"config.json": b"{...}"}
    with pytest.raises(NotFound, match="no snapshot of 'v9'"):
        plan_add([repo.parent / "org/tiny.v1@v9"])
    with pytest.raises(NotFound, match="no snapshot of"):
        plan_add([repo.parent / "models--org--tiny.v1@.."])


def test_without_main_the_only_snapshot_is_meant(store: Store, repo: Path) -> None:
    (repo / "refs" / "main").unlink()
    with pytest.raises(UsageError, match="2 snapshots"):
        plan_add([repo])
    for path in (repo / "snapshots" / FIRST).rglob("*"):
        if path.is_symlink():
            path.unlink()
    (repo / "snapshots" / FIRST / "1_Pooling").rmdir()
    (repo / "snapshots" / FIRST).rmdir()
    assert [name for name, _ in plan_add([repo]).files] == ["config.json"]


def test_a_blob_whose_bytes_are_others_is_refused(store: Store, repo: Path) -> None:
    for link in (repo / "snapshots" / FIRST / "model.bin", repo / "snapshots" / FIRST / "config.json"):
        good = link.read_bytes()
        link.resolve().write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(Damaged, match=f"{link.name} does not have the bytes"):
            add(store, repo)
        link.resolve().write_bytes(good)
    assert ref_names(store) == []


def test_a_snapshot_that_is_there_in_part_is_refused(store: Store, repo: Path) -> None:
    (repo / "snapshots" / FIRST / "model.bin").resolve().unlink()
    with pytest.raises(Damaged, match=r"model\.bin has no bytes"):
        plan_add([repo])


def test_links_out_of_the_repository_are_not_followed(store: Store, repo: Path, tmp_path: Path, lab: Any) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "secret").write_bytes(b"a key")
    (repo / "snapshots" / SECOND / "leak.json").symlink_to(tmp_path / "blobs" / "secret")
    plan = plan_add([repo / "snapshots" / SECOND])
    assert [name for name, _ in plan.files] == ["config.json"]
    assert [reason for _, reason in plan.skipped] == ["a symbolic link"]


def test_blobs_are_adopted_where_they_lie(store: Store, tmp_path: Path, lab: Any) -> None:
    repo = tmp_path / "hub" / "models--org--big"
    fill(repo, FIRST, {"model.bin": lab.noise(1_200_000)})
    done = add(store, repo, adopt=True)
    assert [item.how in (HARDLINK, REFLINK) for item in done.adoptions] == [True]
    assert lab.read("x") == {"model.bin": lab.noise(1_200_000)}
