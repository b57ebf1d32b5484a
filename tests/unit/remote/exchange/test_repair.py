"""What rot takes from a store comes back from another copy, and only what is proven."""

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmos_cli.errors import NotFound, RemoteUnavailable
from llmos_cli.formats.frame import HEADER_BYTES
from llmos_cli.formats.ids import ObjectId, object_id
from llmos_cli.formats.manifest import Manifest
from llmos_cli.formats.names import parse_ref
from llmos_cli.formats.pack import TRAILER_SIZE
from llmos_cli.progress import Silent
from llmos_cli.remote.exchange.repair import Repair, find_sources, repair
from llmos_cli.remote.open import Remote, add_remote
from llmos_cli.remote.transports.folder import FolderTransport
from llmos_cli.store.fsck.fsck import FsckReport, check
from llmos_cli.store.gc.gc import execute_gc, plan_gc
from llmos_cli.store.handle import Store
from llmos_cli.store.packs import deltas
from llmos_cli.store.packs.packs import list_packs, sync_index
from llmos_cli.store.transaction import Tensor, begin

Exchange = Any


def mend(store: Store, *remotes: Remote, quick: bool = False) -> Repair:
    return repair(store, remotes, quick=quick, progress=Silent())


def look(store: Store) -> FsckReport:
    return check(store, quick=False, progress=Silent())


def text(report: FsckReport) -> str:
    lines = [*report.problems, *report.notes]
    return "\n".join(f"{item.where}: {item.what} ({', '.join(item.referrers)})" for item in lines)


def is_clean(store: Store) -> bool:
    report = look(store)
    return not report.problems and not report.notes


def flip(path: Path, at: int, mask: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= mask
    path.chmod(0o644)
    path.write_bytes(data)


def hurt(store: Store, oid: ObjectId) -> Path:
    """Flip a bit in the payload of every copy of an object."""
    for location in store.index.locate(oid):
        path = store.pack_path(location.pack)
        flip(path, location.entry.offset + HEADER_BYTES + location.entry.payload_size // 2)
    return path


def state(store: Store) -> dict[str, bytes]:
    """Every pack and every move of every ref, byte for byte."""
    return {
        str(path.relative_to(store.root)): path.read_bytes()
        for folder in (store.packs, store.refs)
        for path in folder.glob("**/*")
        if path.is_file()
    }


def collect(store: Store) -> None:
    execute_gc(store, plan_gc(store, grace_seconds=0), Silent())


@pytest.fixture
def long_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deltas, "CHAIN", 3)


A, B, C = (random.Random(seed).randbytes(30_000) for seed in (1, 2, 3))


def train(store: Store, ref: str, steps: int, *, also: str = "") -> list[ObjectId]:
    """Values of a ref of which each rests on the one before."""
    values = np.random.default_rng(0).normal(0, 0.02, 4000).astype(np.float32)
    made = []
    for step in range(steps):
        values[np.random.default_rng(step).integers(0, len(values), 40)] += np.float32(1e-4)
        data = values.astype("<f4").tobytes()
        with begin(store, purpose="test", ref=parse_ref(ref)) as tx:
            entry = tx.add_tensors("model.safetensors", [Tensor("w", "F32", (4000,), lambda data=data: data)])  # type: ignore[misc]
            note = [tx.add_bytes("note", also.encode())] if also else []
            made.append(entry.chunks[-1].id)
            tx.commit(Manifest("model", (entry, *note)), message=f"step {step}")
    return made


@pytest.mark.parametrize("place", ["payload", "header", "index", "trailer", "empty", "gone", "twice"])
def test_a_pack_that_is_whole_elsewhere_is_put_right_in_place(exchange: Exchange, place: str) -> None:
    store = exchange.store("here")
    exchange.commit(store, "x", a=A, b=B)
    exchange.commit(store, "y", c=C)
    exchange.push(store)
    before = state(store)
    location = store.index.locate(object_id(A))[0]
    path = store.pack_path(location.pack)
    at = {"payload": 2000, "header": location.entry.offset + 40, "index": -TRAILER_SIZE - 5, "trailer": -1}.get(place)
    if at is not None:
        flip(path, at)
    elif place == "twice":
        flip(path, location.entry.offset + HEADER_BYTES)
        flip(path, -TRAILER_SIZE - 5)
    else:
        path.unlink()
        if place == "empty":
            path.write_bytes(b"")
    assert look(store).problems
    done = mend(store, exchange.remote())
    assert not done.report.problems
    assert not done.report.notes
    assert [(item.where, item.source) for item in done.repaired] == [(f"pack {location.pack.short}", "nas")]
    assert done.repaired[0].refs == ("x:latest",)
    assert state(store) == before
    assert is_clean(store)


def test_objects_come_one_by_one_where_packs_differ_and_gc_takes_the_damaged_pack(exchange: Exchange) -> None:
    store, other = exchange.store("here"), exchange.store("other")
    exchange.commit(store, "x", a=A, b=B)
    exchange.commit(other, "y", a=A, c=C)
    path = hurt(store, object_id(A))
    done = mend(store, exchange.remote("other"))
    assert not done.report.problems
    assert [item.where.split()[0] for item in done.repaired] == ["object", "pack"]
    assert done.repaired[0].source == "other"
    assert "what stands in it is copied" in done.repaired[1].how
    assert [item.what.partition("; ")[2] for item in done.report.notes] == [
        "nothing in it is needed any more: gc will remove it"
    ]
    assert path.exists()
    assert text(look(store)) == text(done.report)
    collect(store)
    assert not path.exists()
    assert is_clean(store)
    assert exchange.files(store, "x") == {"a.bin": A, "b.bin": B}


def test_a_lost_manifest_and_then_what_it_names(exchange: Exchange) -> None:
    store, other = exchange.store("here"), exchange.store("other")
    oid = exchange.commit(store, "x", a=A, b=B)
    exchange.commit(other, "a", a=A, c=C)
    exchange.commit(other, "b", b=B, c=C)
    assert exchange.commit(other, "x", a=A, b=B) == oid
    for path in list_packs(store.packs).values():
        path.unlink()
    done = mend(store, exchange.remote("other"))
    assert not done.report.problems
    assert {item.objects for item in done.repaired} == {(oid,), (object_id(A),), (object_id(B),)}
    assert exchange.files(store, "x") == {"a.bin": A, "b.bin": B}


def test_earlier_values_are_restored_as_well(exchange: Exchange) -> None:
    store, other = exchange.store("here"), exchange.store("other")
    exchange.commit(store, "x", a=A)
    exchange.commit(other, "x", a=A)
    exchange.commit(store, "x", b=B)
    hurt(store, object_id(A))
    report = look(store)
    assert {ref for item in report.problems for ref in item.referrers} == {"x:latest~1"}
    assert "ref x:latest~1: 1 of its objects are missing or damaged" in text(report)
    done = mend(store, exchange.remote("other"))
    assert not done.report.problems
    assert done.repaired[0].refs == ("x:latest~1",)


def test_a_value_that_a_clone_never_had_is_not_missed(exchange: Exchange) -> None:
    store, other = exchange.store("here"), exchange.store("other")
    exchange.commit(store, "x", a=A)
    exchange.push(store)
    exchange.pull(other, "x")
    exchange.commit(store, "x", b=B)
    exchange.push(store)
    exchange.pull(other, "x")
    execute_gc(other, plan_gc(other, grace_seconds=0), Silent())
    assert is_clean(other)


@pytest.mark.usefixtures("long_chains")
def test_a_damaged_base_hurts_what_rests_on_it_and_comes_back(exchange: Exchange) -> None:
    store, other = exchange.store("here"), exchange.store("other")
    chunks = train(store, "run", 3)
    assert [store.index.locate(oid)[0].entry.depth for oid in chunks] == [0, 1, 2]
    train(other, "elsewhere", 3, also="so that its packs differ")
    hurt(store, chunks[0])
    for quick in (False, True):
        report = check(store, quick=quick, progress=Silent())
        refs = {item.where.partition(" in ")[0]: item.referrers for item in report.problems}
        if not quick:
            assert refs[f"object {chunks[0].short}"] == ("run:latest", "run:latest~1", "run:latest~2")
            assert "ref run:latest: 1 of its objects are missing or damaged" in text(report)
            assert sum(item.where.startswith("object") for item in report.problems) == 1
    done = mend(store, exchange.remote("other"))
    assert not done.report.problems
    assert done.repaired[0].objects == (chunks[0],)
    assert look(store).problems == ()
    collect(store)
    assert is_clean(store)
    assert store.index.locate(chunks[2])[0].entry.depth == 2


@pytest.mark.usefixtures("long_chains")
def test_a_base_that_lies_deeper_elsewhere_is_encoded_anew(exchange: Exchange) -> None:
    store, other = exchange.store("here"), exchange.store("other")
    chunks = train(store, "run", 3)
    exchange.pull(other, "run", source="here")
    order = train_backwards(other, chunks, store)
    assert other.index.locate(chunks[0])[0].entry.depth == order
    hurt(store, chunks[0])
    done = mend(store, exchange.remote("other"))
    assert not done.report.problems
    assert min(location.entry.depth for location in store.index.locate(chunks[0])) == 0
    collect(store)
    assert is_clean(store)


def train_backwards(other: Store, chunks: list[ObjectId], store: Store) -> int:
    """Store in `other` the first chunk as a delta on the last; returns its depth there."""
    from llmos_cli.formats import codec
    from llmos_cli.formats.frame import CHUNK, encode_header, new_frame
    from llmos_cli.store.packs.objects import read_object
    from llmos_cli.store.packs.packs import PackWriter

    for path in list_packs(other.packs).values():
        path.unlink()
    writer = PackWriter(other.tmp)
    last, first = read_object(store, chunks[2]), read_object(store, chunks[0])
    words = codec.Words(4, True)
    encoded = codec.encode(memoryview(last), words)
    frame = new_frame(CHUNK, chunks[2], len(last), encoded)
    writer.append(frame, encode_header(frame), encoded.parts)
    delta = codec.encode_delta(memoryview(first), memoryview(last), words)
    frame = new_frame(CHUNK, chunks[0], len(first), delta, chunks[2], 1)
    writer.append(frame, encode_header(frame), delta.parts)
    writer.publish(other)
    other.index.reset()
    from llmos_cli.store.packs.packs import sync_index

    sync_index(other)
    return 1


def test_the_delta_itself_comes_where_its_base_is_lost_everywhere(exchange: Exchange) -> None:
    store, other = exchange.store("here"), exchange.store("other")
    chunks = train(store, "run", 2)
    data = exchange.files(store, "run")
    with begin(other, purpose="test", ref=parse_ref("plain")) as tx:
        values = data["model.safetensors"][-16000:]
        entry = tx.add_tensors("model.safetensors", [Tensor("w", "F32", (4000,), lambda: values)])
        tx.commit(Manifest("model", (entry,)), message="")
    assert entry.chunks[-1].id == chunks[1]
    hurt(store, chunks[0])
    done = mend(store, exchange.remote("other"))
    assert {item.where for item in done.report.problems if item.where.startswith("ref")} == {"ref run:latest~1"}
    assert exchange.files(store, "run") == data


def test_damage_at_one_source_is_passed_over_for_another(exchange: Exchange) -> None:
    store, other = exchange.store("here"), exchange.store("other")
    exchange.commit(store, "x", a=A, b=B)
    exchange.commit(other, "y", a=A, c=C)
    exchange.push(store)
    path = hurt(store, object_id(A))
    flip(exchange.folder / "nas" / "packs" / path.parent.name / path.name, path.stat().st_size // 3)
    hurt(exchange.store("nas"), object_id(A))
    done = mend(store, exchange.remote("nas"), exchange.remote("other"))
    assert not done.report.problems
    assert {item.source for item in done.repaired} == {"other", "this store"}


def test_what_nobody_has_is_said_and_the_rest_is_restored(exchange: Exchange) -> None:
    store, other = exchange.store("here"), exchange.store("other")
    exchange.commit(store, "x", a=A)
    exchange.commit(store, "y", b=B)
    exchange.commit(other, "y", b=B)
    hurt(store, object_id(A))
    hurt(store, object_id(B))
    done = mend(store, exchange.remote("other"))
    assert "ref x:latest: 1 of its objects are missing or damaged" in text(done.report)
    assert "y:latest" not in " ".join(ref for item in done.report.problems for ref in item.referrers)
    assert text(look(store)) == text(done.report)
    assert exchange.files(store, "y") == {"b.bin": B}


def test_an_object_whose_only_damage_is_here_twice_or_in_the_trash(exchange: Exchange) -> None:
    store = exchange.store("here")
    exchange.commit(store, "x", a=A)
    path = store.pack_path(store.index.locate(object_id(A))[0].pack)
    path.rename(store.trash / path.name)
    assert is_clean(store)
    assert path.exists()


def test_a_pack_with_a_bad_end_is_copied_without_anybodys_help(exchange: Exchange) -> None:
    store = exchange.store("here")
    exchange.commit(store, "x", a=A, b=B)
    train(store, "run", 3)
    for path in list_packs(store.packs).values():
        flip(path, -1)
    assert look(store).problems
    done = mend(store)
    assert not done.report.problems
    assert {item.source for item in done.repaired} == {"this store"}
    collect(store)
    assert is_clean(store)
    assert exchange.files(store, "x") == {"a.bin": A, "b.bin": B}
    assert exchange.files(store, "run")


def test_a_move_with_a_flipped_bit_is_put_right(exchange: Exchange) -> None:
    store = exchange.store("here")
    exchange.commit(store, "x", a=A)
    exchange.commit(store, "x", b=B)
    before = state(store)
    for number in (1, 2):
        path = store.refs / "x" / "latest" / f"{number:010}"
        for at in range(0, path.stat().st_size, 3):
            flip(path, at, 1 << at % 8)
            assert f"ref x:latest (move {number})" in text(look(store))
            done = mend(store)
            assert [item.where for item in done.repaired] == [f"ref x:latest (move {number})"]
            assert not done.report.problems
            assert state(store) == before


def test_a_move_comes_from_a_copy_of_the_same_log_only(exchange: Exchange, tmp_path: Path) -> None:
    store, other = exchange.store("here"), exchange.store("other")
    exchange.commit(store, "x", a=A)
    exchange.commit(store, "x", b=B)
    exchange.commit(store, "x", c=C)
    first = {path.name: path.read_bytes() for path in (store.refs / "x" / "latest").iterdir()}
    folder = other.refs / "x" / "latest"
    folder.mkdir(parents=True)
    for name, data in first.items():
        (folder / name).write_bytes(data)
    before = state(store)
    newest, middle = (store.refs / "x" / "latest" / f"{number:010}" for number in (3, 2))
    newest.write_bytes(newest.read_bytes()[:-30] + b"\0" * 30)
    middle.write_bytes(b"")
    assert "(move 3)" in text(look(store))
    assert "(move 2)" in text(look(store))
    done = mend(store, exchange.remote("other"))
    assert {item.where for item in done.repaired} >= {"ref x:latest (move 3)"}
    assert not mend(store, exchange.remote("other")).report.problems
    assert state(store) == before
    newest.write_bytes(b"\0" * len(first[newest.name]))
    done = mend(store, exchange.remote("other"))
    assert not done.repaired
    assert "ref x:latest (move 3): is empty, cut short or damaged; using move 2" in text(done.report)
    (folder / middle.name).write_bytes(first[middle.name].replace(b"add b", b"add z"))
    middle.write_bytes(b"")
    assert not mend(store, exchange.remote("other")).repaired


class Flaky(FolderTransport):
    """A remote that can be reached for a while."""

    def __init__(self, root: Path, reads: int) -> None:
        super().__init__(root)
        self.left = reads

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise RemoteUnavailable(f"{self.url} cannot be reached")
        return super().read(key, start, end)


def test_a_source_that_goes_away_does_not_end_the_repair(exchange: Exchange) -> None:
    store, other = exchange.store("here"), exchange.store("other")
    exchange.commit(store, "x", a=A, b=B, c=C)
    exchange.commit(other, "y", a=A)
    exchange.commit(other, "z", b=B, c=C)
    healthy = state(store)
    for reads in range(12):
        for path, data in healthy.items():
            (store.root / path).unlink(missing_ok=True)
            (store.root / path).write_bytes(data)
        sync_index(store)
        for data in (A, B, C):
            hurt(store, object_id(data))
        progress = Silent()
        flaky = Remote("flaky", Flaky(exchange.folder / "other", reads))
        done = repair(store, [flaky, exchange.remote("other")], quick=False, progress=progress)
        assert not done.report.problems
        assert ("flaky is passed over" in "".join(progress.warnings)) == any(
            item.source == "other" for item in done.repaired
        )
        for path in list_packs(store.packs).values():
            path.unlink()
        store.index.reset()


def test_sources_by_name_by_folder_and_all(exchange: Exchange) -> None:
    store, other = exchange.store("here"), exchange.store("other")
    exchange.commit(store, "x", a=A)
    exchange.commit(other, "x", a=A)
    add_remote(store, "nas", str(exchange.folder / "other"), exchange.folder)
    add_remote(store, "later", str(exchange.folder / "later"), exchange.folder)
    assert [source.label for source in find_sources(store, [], exchange.folder)] == ["nas"]
    assert isinstance(store.progress, Silent)
    assert "remote later is passed over: no llmos remote" in store.progress.warnings[-1]
    for name in ("nas", "other", "./other", str(exchange.folder / "other")):
        assert find_sources(store, [name], exchange.folder)[0].transport.url == str(exchange.folder / "other")
    for name in ("later", "nass", "./nowhere"):
        with pytest.raises(NotFound):
            find_sources(store, [name], exchange.folder)


def test_a_sound_store_is_not_written_to(exchange: Exchange) -> None:
    store = exchange.store("here")
    exchange.commit(store, "x", a=A)
    (store.leases).chmod(0o500)
    before = {path: path.stat().st_mtime_ns for path in store.root.glob("**/*") if "index.db" not in path.name}
    done = mend(store, exchange.remote("nowhere"))
    assert done.repaired == ()
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert os.listdir(store.leases) == []
