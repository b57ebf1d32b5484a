from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from llmos_cli.errors import Conflict, Damaged, NoSpace, NotFound, RemoteUnavailable, UnknownVersion
from llmos_cli.formats.names import parse_ref
from llmos_cli.progress import Silent
from llmos_cli.remote.exchange import pull
from llmos_cli.remote.exchange.pull import execute_pull, plan_pull
from llmos_cli.remote.transports import folder
from llmos_cli.store.gc import gc
from llmos_cli.store.packs.objects import read_file, read_manifest
from llmos_cli.store.packs.packs import read_pack_index
from llmos_cli.store.refs.refs import ref_history, update_ref

Exchange = Any
Overwrite = Callable[[Path, bytes], None]


@pytest.fixture
def filled(exchange: Exchange) -> Exchange:
    """A remote with `web` in it, pushed by the store `here`."""
    here = exchange.store("here")
    exchange.commit(here, "web", a=exchange.noise(1), b=exchange.noise(2))
    exchange.push(here, "web")
    return exchange


def test_everything_arrives_with_the_same_id(filled: Exchange) -> None:
    other = filled.store("other")
    done = filled.pull(other, "web")
    assert [(item.status, item.id) for item in done.refs] == [("new", filled.value(filled.store("here"), "web"))]
    assert filled.files(other, "web") == {"a.bin": filled.noise(1), "b.bin": filled.noise(2)}
    assert filled.problems(other) == []
    assert filled.leftovers("other") == []
    assert done.received == sum(path.stat().st_size for path in filled.packs())


def test_a_whole_pack_keeps_its_name(filled: Exchange) -> None:
    filled.pull(filled.store("other"), "web")
    assert [path.name for path in filled.packs("other")] == [path.name for path in filled.packs()]


def test_nothing_to_do_fetches_nothing(filled: Exchange) -> None:
    other = filled.store("other")
    filled.pull(other, "web")
    done = filled.pull(other)
    assert (done.received, done.packs, [item.status for item in done.refs]) == (0, 0, ["unchanged"])
    assert len(ref_history(other, parse_ref("web"))) == 1


def test_only_what_is_missing_is_fetched(filled: Exchange) -> None:
    here, other = filled.store("here"), filled.store("other")
    filled.pull(other, "web")
    filled.commit(here, "web", a=filled.noise(1), c=filled.noise(3, 10_000))
    filled.push(here, "web")
    done = filled.pull(other, "web")
    assert (done.refs[0].status, done.reused) == ("moved", 1)
    assert done.received < 15_000
    assert filled.files(other, "web") == {"a.bin": filled.noise(1), "c.bin": filled.noise(3, 10_000)}


def test_a_small_part_of_a_pack_is_fetched_as_ranges(filled: Exchange, monkeypatch: pytest.MonkeyPatch) -> None:
    here, other = filled.store("here"), filled.store("other")
    filled.commit(here, "big", small=filled.noise(7, 20_000), rest=filled.noise(8, 900_000))
    filled.commit(here, "little", small=filled.noise(7, 20_000))
    filled.push(here)
    read, taken = folder.FolderTransport.read, []

    def watch(self: Any, key: str, start: int = 0, end: int | None = None) -> bytes:
        data = read(self, key, start, end)
        taken.append(len(data))
        return data

    monkeypatch.setattr(folder.FolderTransport, "read", watch)
    filled.pull(other, "little")
    assert sum(taken) < 60_000
    assert filled.files(other, "little") == {"small.bin": filled.noise(7, 20_000)}
    assert filled.problems(other) == []


def test_the_log_says_where_it_came_from(filled: Exchange) -> None:
    other = filled.store("other")
    filled.pull(other, "web")
    (move,) = ref_history(other, parse_ref("web"))
    assert (move.previous, move.message) == (None, "pulled from nas")


def test_local_work_that_came_after_stays(filled: Exchange) -> None:
    other = filled.store("other")
    filled.pull(other, "web")
    mine = filled.commit(other, "web", c=b"mine")
    done = filled.pull(other, "web")
    assert (done.refs[0].status, filled.value(other, "web")) == ("ahead", mine)


def test_a_local_ref_set_back_on_purpose_stays(filled: Exchange) -> None:
    here = filled.store("here")
    first = filled.value(here, "web")
    second = filled.commit(here, "web", c=b"x")
    filled.push(here, "web")
    update_ref(here, parse_ref("web"), first, expected=second, message="back")
    assert filled.pull(here, "web").refs[0].status == "ahead"


def test_refs_that_went_different_ways_are_told(filled: Exchange) -> None:
    other = filled.store("other")
    mine = filled.commit(other, "web", c=b"mine")
    with pytest.raises(Conflict, match="web:latest has gone different ways") as caught:
        filled.pull(other, "web")
    assert "--force" in str(caught.value.hint)
    assert filled.value(other, "web") == mine
    done = filled.pull(other, "web", force=True)
    assert done.refs[0].status == "forced"
    assert ref_history(other, parse_ref("web"))[0].previous == mine


def test_an_unknown_ref_is_named(filled: Exchange) -> None:
    with pytest.raises(NotFound, match="no ref wbe:latest at nas"):
        filled.pull(filled.store("other"), "wbe")


def test_a_remote_that_is_not_there_is_told(exchange: Exchange) -> None:
    with pytest.raises(NotFound, match="nothing is there"):
        exchange.pull(exchange.store("other"), "web")
    (exchange.folder / "nas").mkdir()
    (exchange.folder / "nas/photo.jpg").write_bytes(b"")
    with pytest.raises(NotFound, match="no llmos remote"):
        exchange.pull(exchange.store("other"), "web")


def test_a_remote_of_another_format_is_refused(filled: Exchange) -> None:
    (filled.folder / "nas/FORMAT").write_bytes(b"llmos 7\n")
    with pytest.raises(UnknownVersion, match="nas"):
        filled.pull(filled.store("other"), "web")


def test_a_store_can_be_pulled_from(exchange: Exchange) -> None:
    here, other = exchange.store("here"), exchange.store("other")
    exchange.commit(here, "web", a=exchange.noise(1))
    exchange.pull(other, "web", source="here")
    assert exchange.files(other, "web") == {"a.bin": exchange.noise(1)}


def test_stale_temporary_files_at_the_remote_are_passed_over(filled: Exchange) -> None:
    for path in (filled.packs()[0].parent, filled.folder / "nas/refs/web/latest", filled.folder / "nas"):
        (path / ".tmp-00").write_bytes(b"half a pack")
    (filled.folder / "nas/packs/notes.txt").write_bytes(b"hello")
    (filled.folder / "nas/refs/web/latest/readme").write_bytes(b"hello")
    filled.pull(filled.store("other"), "web")


def test_a_pull_that_was_stopped_does_not_fetch_twice(filled: Exchange, monkeypatch: pytest.MonkeyPatch) -> None:
    here, other = filled.store("here"), filled.store("other")
    for number in range(5):
        filled.commit(here, f"more{number}", a=filled.noise(10 + number))
    filled.push(here)
    read, budget = folder.FolderTransport.read, [20]

    def cut(self: Any, key: str, start: int = 0, end: int | None = None) -> bytes:
        data = read(self, key, start, end)
        if len(data) > 100_000:
            budget[0] -= 1
            if budget[0] < 0:
                raise RemoteUnavailable("the line is cut")
        return data

    monkeypatch.setattr(folder.FolderTransport, "read", cut)
    budget[0] = 4
    with pytest.raises(RemoteUnavailable):
        filled.pull(other)
    arrived = len(filled.packs("other"))
    assert arrived >= 1
    assert [entry.ref for entry in gc.find_roots(other, since=0)] == []
    assert filled.leftovers("other") == []
    budget[0] = 99
    done = filled.pull(other)
    assert done.packs == len(filled.packs()) - arrived
    assert filled.problems(other) == []


def test_a_pack_that_arrived_but_was_not_indexed_is_not_fetched_again(filled: Exchange) -> None:
    other = filled.store("other")
    filled.pull(other, "web")
    (filled.folder / "other/refs/web/latest/0000000001").unlink()
    for name in other.index.packs():
        other.index.drop_pack(name)
    assert filled.pull(other, "web").received == 0


def test_what_was_lost_here_comes_back(filled: Exchange) -> None:
    other = filled.store("other")
    filled.pull(other, "web")
    filled.packs("other")[0].unlink()
    done = filled.pull(other, "web")
    assert (done.refs[0].status, done.packs) == ("unchanged", 1)
    assert filled.problems(other) == []


def test_what_rotted_here_comes_back(filled: Exchange, overwrite: Overwrite) -> None:
    """Once reading has found a chunk to be damaged, a pull brings it, though the ref has not moved."""
    other = filled.store("other")
    filled.pull(other, "web")
    (path,) = filled.packs("other")
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    overwrite(path, bytes(data))
    with pytest.raises(Damaged):
        filled.files(other, "web")
    filled.pull(other, "web")
    assert filled.files(other, "web") == {"a.bin": filled.noise(1), "b.bin": filled.noise(2)}


def test_a_manifest_that_rotted_here_comes_back(filled: Exchange, overwrite: Overwrite) -> None:
    other = filled.store("other")
    filled.pull(other, "web")
    (path,) = filled.packs("other")
    data = bytearray(path.read_bytes())
    data[read_pack_index(path)[1][-1].end - 1] ^= 1
    overwrite(path, bytes(data))
    filled.pull(other, "web")
    assert filled.files(other, "web") == {"a.bin": filled.noise(1), "b.bin": filled.noise(2)}


def test_a_full_disk_is_told_before_anything_is_fetched(filled: Exchange, monkeypatch: pytest.MonkeyPatch) -> None:
    other = filled.store("other")

    class Full:
        f_bavail, f_frsize = 10, 4096

    monkeypatch.setattr(pull.os, "statvfs", lambda _: Full)
    with pytest.raises(NoSpace, match="40960 bytes free"):
        filled.pull(other, "web")
    assert filled.packs("other") == []


def test_a_ref_that_moves_here_during_a_pull_is_not_overwritten(filled: Exchange) -> None:
    other = filled.store("other")
    plan = plan_pull(other, filled.remote(), [parse_ref("web")], force=False)
    mine = filled.commit(other, "web", c=b"mine")
    with pytest.raises(Conflict):
        execute_pull(other, filled.remote(), plan, Silent())
    assert filled.value(other, "web") == mine


def test_a_gc_here_during_a_pull_loses_nothing(filled: Exchange, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gc with no grace runs again and again while refs are pulled one by one."""
    here, other = filled.store("here"), filled.store("other")
    refs = [f"part{number}" for number in range(5)]
    for number, ref in enumerate(refs):
        filled.commit(here, ref, shared=filled.noise(1), own=filled.noise(50 + number, 30_000))
    filled.push(here)
    stop: list[bool] = []

    def collect() -> int:
        rounds = 0
        while not stop:
            gc.execute_gc(other, gc.plan_gc(other, grace_seconds=0), Silent())
            rounds += 1
        return rounds

    with ThreadPoolExecutor(1) as pool:
        collecting = pool.submit(collect)
        try:
            for ref in refs:
                filled.pull(other, ref)
        finally:
            stop.append(True)
        assert collecting.result() > 0
    for number, ref in enumerate(refs):
        assert filled.files(other, ref) == {"shared.bin": filled.noise(1), "own.bin": filled.noise(50 + number, 30_000)}
    assert filled.problems(other) == []


def test_a_gc_there_that_rewrites_packs_during_a_pull_is_followed(
    exchange: Exchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, other = exchange.store("nas"), exchange.store("other")
    exchange.commit(there, "web", a=exchange.noise(1), big=exchange.noise(2, 900_000))
    exchange.commit(there, "keep", a=exchange.noise(1))
    plan = plan_pull(other, exchange.remote(), [parse_ref("keep")], force=False)
    (exchange.folder / "nas/refs/web").rename(exchange.folder / "gone")
    gc.execute_gc(there, gc.plan_gc(there, grace_seconds=0), Silent())
    execute_pull(other, exchange.remote(), plan, Silent())
    assert exchange.files(other, "keep") == {"a.bin": exchange.noise(1)}


def test_readers_of_an_old_value_are_not_disturbed(filled: Exchange) -> None:
    here, other = filled.store("here"), filled.store("other")
    filled.pull(other, "web")
    old = filled.value(other, "web")
    filled.commit(here, "web", c=filled.noise(3))
    filled.push(here, "web")
    filled.pull(other, "web")
    manifest = read_manifest(other, old)
    assert [read_file(other, item) for item in manifest.files] == [filled.noise(1), filled.noise(2)]
