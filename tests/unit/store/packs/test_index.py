import os
import random
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmos_cli.errors import LlmosError
from llmos_cli.progress import Silent
from llmos_cli.store.fsck.fsck import reindex
from llmos_cli.store.local import Store, init_store, open_store
from llmos_cli.store.packs.index import Index
from llmos_cli.store.packs.objects import read_object
from llmos_cli.store.packs.packs import list_packs
from llmos_cli.store.refs.refs import list_refs

FILES = {"a.txt": b"first file", "folder/b.bin": bytes(range(256)) * 4000}


def reopened(root: Path, safe: str = "") -> Store:
    return open_store(root, Silent(), safe=safe)


def said(store: Store) -> list[str]:
    assert isinstance(store.progress, Silent)
    return store.progress.warnings


def index_file(store: Store) -> Path:
    return store.root / "index.db"


def edit_index(store: Store, *statements: str) -> None:
    with sqlite3.connect(index_file(store)) as connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()


def test_a_lost_index_is_rebuilt_and_said_so_once(store: Store, lab: Any) -> None:
    lab.add("x", FILES)
    store.close()
    for path in store.root.glob("index.db*"):
        path.unlink()
    with reopened(store.root) as again:
        assert lab.read("x", again) == FILES
        assert any("rebuilt it from 1 packs" in text for text in said(again))
    with reopened(store.root) as quiet:
        assert lab.read("x", quiet) == FILES
        assert not said(quiet)


@pytest.mark.parametrize("damage", ["garbage", "empty", "cut", "old version", "new version", "other tables"])
def test_an_index_that_is_no_index_is_replaced(store: Store, lab: Any, damage: str) -> None:
    lab.add("x", FILES)
    store.close()
    path = index_file(store)
    data = path.read_bytes()
    for extra in ("-wal", "-shm"):
        path.with_name(path.name + extra).unlink(missing_ok=True)
    if damage == "garbage":
        path.write_bytes(lab.noise(40_000))
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "other tables":
        path.unlink()
        edit_index(store, "CREATE TABLE something (else_entirely)", "PRAGMA user_version=1")
    else:
        edit_index(store, f"PRAGMA user_version={99 if damage == 'new version' else -1}")
    with reopened(store.root) as again:
        assert lab.read("x", again) == FILES
        lab.sound(again)


def test_an_index_that_was_never_filled_is_filled(store: Store, lab: Any) -> None:
    """Whoever made it may have been killed before it had read all packs."""
    lab.add("x", FILES)
    store.close()
    for path in store.root.glob("index.db*"):
        path.unlink()
    Index(index_file(store)).close()
    with reopened(store.root) as again:
        assert len(again.index.packs()) == 1
        assert again.index.is_complete


def test_an_index_that_breaks_while_it_is_open_is_replaced(store: Store, lab: Any) -> None:
    lab.add("x", FILES)
    edit_index(store, "DROP TABLE objects")
    assert lab.read("x") == FILES
    assert any("rebuilt" in text for text in lab.warnings())


@pytest.mark.parametrize(
    "change",
    [
        "offset = offset + 64",
        "payload = payload + 1",
        "plain = plain + 1",
        "plain = 1",
        "codec = 1 - codec",
        "kind = 3 - kind",
        "depth = 7",
        "id = zeroblob(32)",
        "base = id",
        "pack = pack + 17",
        "offset = 1099511627776",
        "payload = -5",
        "plain = 9223372036854775807",
        "offset = 'text'",
        "plain = NULL",
        "id = x'00'",
    ],
)
def test_a_wrong_row_does_no_harm(store: Store, lab: Any, change: str) -> None:
    lab.add("x", FILES)
    if "NULL" in change:
        edit_index(store, "PRAGMA writable_schema=1", "UPDATE sqlite_master SET sql = replace(sql, 'NOT NULL', '')")
    edit_index(store, f"UPDATE OR REPLACE objects SET {change}")
    store.close()
    with reopened(store.root) as again:
        assert lab.read("x", again) == FILES
        lab.sound(again)
        assert lab.read("x", again) == FILES


def test_any_flipped_byte_of_the_index_is_survived(store: Store, lab: Any) -> None:
    lab.add("x", FILES)
    store.close()
    path = index_file(store)
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")
    connection.close()
    whole = path.read_bytes()
    generator = random.Random(5)
    used = [at for at, byte in enumerate(whole) if byte]
    for at in generator.sample(used, 60):
        for extra in ("-wal", "-shm"):
            path.with_name(path.name + extra).unlink(missing_ok=True)
        damaged = bytearray(whole)
        damaged[at] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        with reopened(store.root) as again:
            assert lab.read("x", again) == FILES, f"byte {at}"
            lab.sound(again)
            reindex(again)
            assert len(again.index.packs()) == 1


def test_reindex_finds_what_the_index_did_not_know(store: Store, lab: Any) -> None:
    commit = lab.add("x", FILES)
    before = store.index.locate(commit.id)
    store.index.drop_pack(before[0].pack)
    assert not store.index.has(commit.id)
    assert reindex(store).packs == 1
    assert store.index.locate(commit.id) == before


def test_processes_that_open_a_lost_index_at_once(
    store: Store, lab: Any, in_processes: Callable[[int, Callable[[int], Any]], list[Any]]
) -> None:
    for number in range(5):
        lab.add(f"x{number}", {"f": lab.noise(5000, number)})
    store.close()
    for path in store.root.glob("index.db*"):
        path.unlink()

    def work(number: int) -> int:
        with reopened(store.root) as mine:
            lab.add(f"y{number}", {"f": lab.noise(5000, 100 + number)}, store=mine)
            return sum(len(lab.read(entry.ref.name, mine)) for entry in list_refs(mine) if entry.ref.name[0] == "x")

    assert in_processes(12, work) == [5] * 12
    with reopened(store.root) as again:
        lab.sound(again)
        assert len(again.index.packs()) == 17


def test_a_forked_child_uses_an_open_store(
    store: Store, lab: Any, in_processes: Callable[[int, Callable[[int], Any]], list[Any]]
) -> None:
    """As the workers of a data loader do."""
    commit = lab.add("x", FILES)

    def work(number: int) -> bool:
        lab.add(f"child{number}", {"f": b"%d" % number})
        return lab.read("x") == FILES and read_object(store, commit.id) != b""

    assert all(in_processes(4, work))
    assert lab.read("child3") == {"f": b"3"}
    with sqlite3.connect(index_file(store)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()
    lab.sound()


@pytest.mark.root
def test_a_store_on_a_read_only_disk_can_be_read(
    mount: Callable[..., Path], remount: Callable[[Path, str], None], lab: Any
) -> None:
    root = mount("8m") / ".llmos"
    init_store(root)
    with reopened(root) as writable:
        lab.add("x", FILES, store=writable)
    remount(root.parent, "ro")
    with reopened(root) as readable:
        assert lab.read("x", readable) == FILES
        assert len(list_refs(readable)) == 1
        lab.sound(readable)
        with pytest.raises(LlmosError, match="Read-only file system"):
            lab.add("y", {"f": b"new"}, store=readable)
    assert len(list_packs(root / "packs")) == 1


def test_a_store_of_somebody_else_can_be_read(
    store: Store, lab: Any, as_nobody: Callable[[Callable[[], Any]], Any]
) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to become somebody else")
    lab.add("x", {"f": b"shared"})
    store.close()
    subprocess.run(["chmod", "-R", "a+rX", store.root.parent], check=True)

    def work() -> list[str]:
        with reopened(store.root, safe=str(store.root)) as mine:
            try:
                lab.add("y", {"f": b"new"}, store=mine)
            except LlmosError as exc:
                return [lab.read("x", mine)["f"].decode(), exc.code]
        return []

    assert as_nobody(work) == ["shared", "access-denied"]
