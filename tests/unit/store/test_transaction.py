import io
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmos_cli.errors import Conflict, Damaged, LlmosError, NoSpace, Unsafe
from llmos_cli.formats import limits
from llmos_cli.formats.ids import object_id
from llmos_cli.formats.manifest import FileEntry, Manifest
from llmos_cli.formats.names import RefName
from llmos_cli.store.disk import durable
from llmos_cli.store.inspect.tensors import tensor_table
from llmos_cli.store.intake import ingest
from llmos_cli.store.leases import live_leases
from llmos_cli.store.local import Store
from llmos_cli.store.packs import packs
from llmos_cli.store.packs.objects import read_file, read_manifest
from llmos_cli.store.packs.packs import list_packs
from llmos_cli.store.refs.point import point
from llmos_cli.store.refs.refs import delete_ref, read_ref
from llmos_cli.store.transaction import Tensor, begin

REF = RefName("x")


def files(*entries: FileEntry) -> Manifest:
    return Manifest("files", entries)


def test_a_commit_is_there_with_its_message_and_sizes(store: Store, lab: Any) -> None:
    data = lab.noise(300_000)
    with begin(store, purpose="test", ref=REF) as tx:
        assert [lease.writes for lease in live_leases(store)] == [True]
        entry = tx.add_bytes("f", data)
        same = tx.add_stream("g", io.BytesIO(data))
        commit = tx.commit(files(entry, same), message="two alike")
    assert not live_leases(store)
    assert commit.size == 600_000
    assert commit.reused == 300_000
    assert 300_000 < commit.stored < 305_000
    assert not commit.unchanged
    ref = read_ref(store, REF)
    assert ref is not None
    assert (ref.id, ref.message) == (commit.id, "two alike")
    assert lab.read("x") == {"f": data, "g": data}
    assert not lab.leftovers()


def test_leaving_without_a_commit_leaves_nothing_visible(store: Store, lab: Any) -> None:
    with begin(store, purpose="test", ref=REF) as tx:
        tx.add_bytes("f", lab.noise(100_000))
    assert read_ref(store, REF) is None
    assert not list_packs(store.packs)
    assert not lab.leftovers()
    assert not live_leases(store)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, NoSpace])
def test_an_error_leaves_nothing_visible(store: Store, lab: Any, error: type[BaseException]) -> None:
    def interrupted() -> None:
        with begin(store, purpose="test", ref=REF) as tx:
            tx.add_bytes("f", lab.noise(100_000))
            raise error("stop")

    with pytest.raises(error):
        interrupted()
    assert read_ref(store, REF) is None
    assert not list_packs(store.packs)
    assert not lab.leftovers()
    assert not live_leases(store)
    assert "encode" not in {thread.name.partition("_")[0] for thread in threading.enumerate()}


def test_an_abort_after_a_pack_was_published_leaves_only_what_gc_knows(
    store: Store, lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "PACK_TARGET_BYTES", 100_000)

    def interrupted() -> None:
        with begin(store, purpose="test", ref=REF) as tx:
            tx.add_bytes("f", lab.noise(3 << 20))
            tx.add_bytes("g", lab.noise(3 << 20, 1))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert read_ref(store, REF) is None
    assert not lab.leftovers()
    lab.sound()
    lab.gc()
    assert not list_packs(store.packs)


def test_the_same_content_again_is_unchanged_and_costs_nothing(store: Store, lab: Any) -> None:
    first = lab.add("x", {"f": lab.noise(50_000)})
    before = sorted(path.name for path in lab.packs())
    again = lab.add("x", {"f": lab.noise(50_000)})
    assert again.id == first.id
    assert again.unchanged
    assert (again.stored, again.reused) == (0, 50_000)
    assert sorted(path.name for path in lab.packs()) == before
    elsewhere = lab.add("y", {"f": lab.noise(50_000)})
    assert elsewhere.id == first.id
    assert not elsewhere.unchanged
    assert elsewhere.stored == 0


def test_the_id_is_a_function_of_the_content_alone(store: Store, lab: Any) -> None:
    content = {"b": b"2", "a": b"1", "c/d": b"3"}
    assert lab.add("x", content).id == lab.add("y", dict(reversed(content.items()))).id


def test_entries_of_an_earlier_manifest_cost_nothing(store: Store, lab: Any) -> None:
    old = read_manifest(store, lab.add("x", {"big": lab.noise(200_000), "small": b"1"}).id)
    entry = old.file("big")
    assert entry is not None
    with begin(store, purpose="test", ref=RefName("y")) as tx:
        commit = tx.commit(files(entry, tx.add_bytes("new", b"2")), message="")
    assert commit.stored < 2000
    assert lab.read("y") == {"big": lab.noise(200_000), "new": b"2"}


def test_a_ref_that_moved_meanwhile_is_a_conflict_and_stays(store: Store, lab: Any) -> None:
    lab.add("x", {"f": b"0"})

    def late() -> None:
        with begin(store, purpose="test", ref=REF) as tx:
            lab.add("x", {"f": b"1"})
            tx.commit(files(tx.add_bytes("f", b"2")), message="late")

    with pytest.raises(Conflict) as caught:
        late()
    assert caught.value.exit_code == 17
    assert lab.read("x") == {"f": b"1"}
    lab.sound()


@pytest.mark.parametrize("meanwhile", ["created", "deleted"])
def test_a_ref_made_or_deleted_meanwhile_is_a_conflict(store: Store, lab: Any, meanwhile: str) -> None:
    if meanwhile == "deleted":
        lab.add("x", {"f": b"0"})

    def late() -> None:
        with begin(store, purpose="test", ref=REF) as tx:
            lab.add("x", {"f": b"1"}) if meanwhile == "created" else lab.remove("x")
            tx.commit(files(tx.add_bytes("f", b"2")), message="late")

    with pytest.raises(Conflict):
        late()


def test_of_many_processes_one_commits_and_the_others_conflict(
    store: Store, lab: Any, in_processes: Callable[[int, Callable[[int], Any]], list[Any]]
) -> None:
    def work(number: int) -> bool:
        try:
            with begin(store, purpose="test", ref=REF) as tx:
                entry = tx.add_bytes("f", b"%d" % number)
                (store.root / f"ready-{number}").touch()
                while len(list(store.root.glob("ready-*"))) < 8:
                    time.sleep(0.001)
                tx.commit(files(entry), message="")
        except Conflict:
            return False
        return True

    won = in_processes(8, work)
    assert won.count(True) == 1
    assert lab.read("x") == {"f": b"%d" % won.index(True)}
    lab.sound()


def test_a_chunk_that_gc_trashed_meanwhile_is_brought_back(store: Store, lab: Any) -> None:
    data = lab.noise(100_000)
    lab.add("old", {"f": data})
    lab.remove("old")
    lab.age_all(1e6)
    with begin(store, purpose="test", ref=REF) as tx:
        entry = tx.add_bytes("f", data)
        lab.gc(grace=3600)
        assert list_packs(store.trash)
        assert not list_packs(store.packs)
        commit = tx.commit(files(entry), message="")
    assert commit.reused == 100_000
    assert lab.read("x") == {"f": data}
    lab.sound()
    assert not list_packs(store.trash)


def test_a_chunk_that_is_gone_for_good_meanwhile_is_an_error_and_the_next_try_stores_it(store: Store, lab: Any) -> None:
    data = lab.noise(100_000)
    lab.add("old", {"f": data})

    def unlucky() -> None:
        with begin(store, purpose="test", ref=REF) as tx:
            entry = tx.add_bytes("f", data)
            lab.packs()[0].unlink()
            tx.commit(files(entry), message="")

    with pytest.raises(Damaged) as caught:
        unlucky()
    assert "run the command again" in (caught.value.hint or "")
    assert read_ref(store, REF) is None
    lab.add("x", {"f": data})
    assert lab.read("x") == {"f": data}


def test_the_packs_of_a_running_transaction_survive_gc(store: Store, lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those it published before its lease was last renewed."""
    monkeypatch.setattr(limits, "PACK_TARGET_BYTES", 100_000)
    with begin(store, purpose="test", ref=REF) as tx:
        first = tx.add_bytes("f", lab.noise(3 << 20))
        second = tx.add_bytes("g", lab.noise(3 << 20, 1))
        for path in store.leases.iterdir():
            durable.touch(path)
        assert lab.gc(grace=0).trashed_bytes == 0
        tx.commit(files(first, second), message="")
    lab.sound()
    assert lab.read("x") == {"f": lab.noise(3 << 20), "g": lab.noise(3 << 20, 1)}


def test_tensors_become_a_safetensors_file(store: Store) -> None:
    arrays = {
        "b": np.arange(3_000_000, dtype=np.float32),
        "a": np.arange(6, dtype=np.int64).reshape(2, 3),
        "empty": np.zeros((0, 4), dtype=np.float16),
    }
    names = {"float32": "F32", "int64": "I64", "float16": "F16"}
    asked: list[str] = []

    def tensor(name: str, array: np.ndarray) -> Tensor:
        def data() -> memoryview:
            asked.append(name)
            return array.data

        return Tensor(name, names[str(array.dtype)], array.shape, data)

    with begin(store, purpose="test", ref=REF) as tx:
        entry = tx.add_tensors("model.safetensors", [tensor(name, array) for name, array in arrays.items()])
        tx.commit(Manifest("model", (entry,)), message="")
    assert asked == ["b", "a", "empty"]
    table = tensor_table(store, Manifest("model", (entry,)))
    data = read_file(store, entry)
    for name, array in arrays.items():
        info = table[name][1]
        assert data[info.start : info.end] == array.tobytes()
        assert info.shape == array.shape


def test_a_tensor_that_gives_too_little_or_has_a_bad_name(store: Store, lab: Any) -> None:
    def add(tensor: Tensor) -> None:
        with begin(store, purpose="test", ref=REF) as tx:
            tx.add_tensors("model.safetensors", [tensor])

    with pytest.raises(ValueError, match="gave 3 bytes instead of 4"):
        add(Tensor("t", "F32", (1,), lambda: b"123"))
    with pytest.raises(Unsafe):
        add(Tensor("../../x", "F32", (1,), lambda: b"1234"))
    with pytest.raises(Unsafe):
        add(Tensor("t\n", "F32", (1,), lambda: b"1234"))
    assert not lab.leftovers()


def test_failed_files_do_not_block_the_next(
    store: Store, tmp_path: Path, lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many reads fail, the pool of buffers stays whole."""
    path = tmp_path / "shrinking"
    real = ingest._cuts

    def cut_then_shrink(*arguments: Any) -> Any:
        cuts = list(real(*arguments))
        path.write_bytes(b"")
        return cuts

    monkeypatch.setattr(ingest, "_cuts", cut_then_shrink)
    with begin(store, purpose="test", ref=REF) as tx:
        for number in range(40):
            path.write_bytes(lab.noise(5000, number))
            with pytest.raises(LlmosError, match="shorter"):
                tx.add_path("f", path)
        commit = tx.commit(files(tx.add_bytes("good", lab.noise(3 << 20))), message="")
    assert lab.read("x") == {"good": lab.noise(3 << 20)}
    assert commit.size == 3 << 20
    lab.sound()


def test_a_manifest_with_a_bad_path_is_refused(store: Store, lab: Any) -> None:
    def add(path: str) -> None:
        with begin(store, purpose="test", ref=REF) as tx:
            entry = tx.add_bytes("f", b"1")
            tx.commit(files(FileEntry(path, entry.chunks)), message="")

    for path in ("../x", "/x", "a/../b", "a\\b", "CON", "x\n"):
        with pytest.raises(Unsafe):
            add(path)
    assert read_ref(store, REF) is None
    assert not lab.leftovers()


def test_pointing_a_ref_brings_back_what_it_needs(store: Store, lab: Any) -> None:
    commit = lab.add("x", {"f": b"1", "g": lab.noise(50_000)})
    lab.remove("x")
    lab.age_all(1e6)
    lab.gc(grace=3600)
    assert not list_packs(store.packs)
    point(store, RefName("y"), commit.id, expected=None, message="tag")
    assert not list_packs(store.trash)
    assert set(lab.read("y")) == {"f", "g"}
    with pytest.raises(Conflict):
        point(store, RefName("y"), commit.id, expected=None, message="tag")
    delete_ref(store, RefName("y"), expected=commit.id)
    for path in lab.packs():
        path.unlink()
    with pytest.raises(Damaged):
        point(store, RefName("y"), commit.id, expected=None, message="tag")
    assert read_ref(store, RefName("y")) is None


def test_a_pack_that_fails_to_publish_in_the_background_fails_the_commit(
    store: Store, lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "PACK_TARGET_BYTES", 100_000)
    real = packs.install_pack
    calls = 0

    def install(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            durable.remove(arguments[1])
            raise NoSpace("no space left while publishing")
        return real(*arguments)

    monkeypatch.setattr(packs, "install_pack", install)

    def add() -> None:
        with begin(store, purpose="test", ref=REF) as tx:
            entries = [tx.add_bytes(f"f{number}", lab.noise(300_000, number)) for number in range(8)]
            tx.commit(files(*entries), message="")

    with pytest.raises(NoSpace):
        add()
    assert read_ref(store, REF) is None
    assert not lab.leftovers()
    monkeypatch.undo()
    lab.sound()


def test_transactions_side_by_side_in_threads(store: Store, lab: Any) -> None:
    shared = lab.noise(600_000)

    def work(number: int) -> object:
        return lab.add(f"x{number}", {"shared": shared, "own": lab.noise(50_000, number)}).id

    with ThreadPoolExecutor(6) as threads:
        ids = list(threads.map(work, range(6)))
    assert len(set(ids)) == 6
    for number in range(6):
        assert lab.read(f"x{number}") == {"shared": shared, "own": lab.noise(50_000, number)}
    lab.sound()


def test_a_manifest_stands_after_everything_it_names(store: Store, lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PACK_TARGET_BYTES", 100_000)
    published: list[set[Any]] = []
    real = store.index.add_pack

    def add_pack(name: Any, size: int, entries: Any) -> None:
        published.append({entry.id for entry in entries})
        real(name, size, entries)

    monkeypatch.setattr(store.index, "add_pack", add_pack)
    commit = lab.add("x", {f"f{number}": lab.noise(300_000, number) for number in range(5)})
    assert len(published) > 2
    assert [commit.id in pack for pack in published].index(True) == len(published) - 1
    assert object_id(lab.noise(300_000, 0)) in published[0]
