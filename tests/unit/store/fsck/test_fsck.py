import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmos_cli.errors import Damaged
from llmos_cli.formats.frame import HEADER_BYTES
from llmos_cli.formats.ids import object_id
from llmos_cli.formats.manifest import Manifest
from llmos_cli.formats.names import RefName
from llmos_cli.formats.pack import ALIGNMENT, HEADER_SIZE, TRAILER_SIZE
from llmos_cli.progress import Silent
from llmos_cli.store.fsck.fsck import FsckReport, check, reindex
from llmos_cli.store.fsck.settings import mend_settings
from llmos_cli.store.gc.gc import execute_gc, plan_gc
from llmos_cli.store.local import Store, init_store, open_store, save_config
from llmos_cli.store.packs.objects import read_object
from llmos_cli.store.refs.refs import read_ref
from llmos_cli.store.transaction import Tensor, begin

FILES = {"a": b"first" * 300, "b": bytes(range(256)) * 30, "c": b"third"}


def described(report: FsckReport) -> str:
    return "\n".join(f"{item.where}: {item.what} ({', '.join(item.referrers)})" for item in report.problems)


def test_a_sound_store(store: Store, lab: Any) -> None:
    assert lab.fsck() == FsckReport((), 0, 0, 0, False)
    lab.add("x", FILES)
    lab.add("y", FILES | {"d": b"4"})
    for quick in (False, True):
        report = lab.fsck(quick=quick)
        assert not report.problems
        assert (report.packs, report.objects, report.quick) == (2, 6, quick)
        assert report.bytes == sum(path.stat().st_size for path in lab.packs())


def test_leftovers_of_a_crash_are_no_damage(store: Store, lab: Any) -> None:
    lab.add("x", FILES)
    lab.add("y", {"f": b"unreachable"})
    lab.remove("y")
    (store.tmp / ".tmp-1").write_bytes(b"half a pack")
    (store.leases / "dead.json").write_bytes(b"")
    (store.refs / "empty" / "latest").mkdir(parents=True)
    store.index.drop_pack(next(iter(store.index.packs())))
    lab.sound()


@pytest.mark.parametrize("place", ["payload", "header"])
def test_a_flipped_bit_in_a_frame_is_named_with_object_pack_and_refs(store: Store, lab: Any, place: str) -> None:
    lab.add("x", FILES)
    lab.add("y", {"a": FILES["a"]})
    lab.add("z", {"other": b"fine"})
    oid = object_id(FILES["a"])
    path, at = lab.payload_at(oid)
    lab.flip(path, at + 3 if place == "payload" else at - HEADER_BYTES + 9)
    report = lab.fsck()
    text = described(report)
    pack = path.name[:12]
    assert f"object {oid.short} in pack {pack}" in text
    assert "(x:latest, y:latest)" in text
    assert "ref x:latest: 1 of its objects are missing or damaged" in text
    assert "ref y:latest: 1 of its objects are missing or damaged" in text
    assert "z:latest" not in text
    assert len(report.problems) == 3
    quick = [item.where for item in lab.fsck(quick=True).problems]
    assert quick == ([] if place == "payload" else [item.where for item in report.problems])


def test_every_byte_of_a_pack_matters(store: Store, lab: Any) -> None:
    lab.add("x", {"f": b"a short file", "g": b"z" * 200})
    path = lab.packs()[0]
    size = path.stat().st_size
    for at in range(0, size, 7):
        lab.flip(path, at, 16)
        report = lab.fsck()
        assert report.problems, f"byte {at} of {size}"
        lab.flip(path, at, 16)
    reindex(store)
    lab.sound()


@pytest.mark.parametrize("where", ["magic", "index", "trailer", "padding", "cut", "empty", "longer", "NUL"])
def test_a_damaged_pack_is_named_and_what_stands_in_it_counts(store: Store, lab: Any, where: str) -> None:
    lab.add("x", FILES)
    path = lab.packs()[0]
    data = path.read_bytes()
    if where in ("magic", "index", "trailer", "padding"):
        entries = store.index.entries(next(iter(store.index.packs())))
        padded = next(entry.end for entry in entries if entry.end % ALIGNMENT)
        lab.flip(path, {"magic": 0, "index": -TRAILER_SIZE - 5, "trailer": -1, "padding": padded}[where])
    else:
        path.chmod(0o600)
        path.write_bytes({"cut": data[:-700], "empty": b"", "longer": data + b"\0", "NUL": bytes(len(data))}[where])
    text = described(lab.fsck())
    assert f"pack {path.name[:12]}" in text
    assert "(x:latest)" in text
    whole = where in ("magic", "index", "trailer", "padding", "longer")
    assert ("ref x:latest" in text) == (not whole)
    if whole:
        assert lab.read("x") == FILES


def test_a_missing_pack_is_named_with_the_refs_it_takes_along(store: Store, lab: Any) -> None:
    lab.add("x", FILES)
    lab.add("y", {"f": b"fine"})
    oid = object_id(FILES["a"])
    path = lab.pack_of(oid)
    path.unlink()
    text = described(lab.fsck())
    assert f"pack {path.name[:12]}: its file is missing" in text
    assert "ref x:latest" in text
    assert "y:latest" not in text


def test_a_missing_pack_that_nobody_needs_is_no_damage(store: Store, lab: Any) -> None:
    lab.add("x", FILES)
    path = lab.packs()[0]
    lab.remove("x")
    path.unlink()
    lab.sound()


def test_swapped_packs(store: Store, lab: Any) -> None:
    lab.add("x", {"f": b"1" * 300})
    lab.add("y", {"f": b"2" * 300})
    one, two = lab.packs()
    one.rename(one.with_name("swap"))
    two.rename(one)
    one.with_name("swap").rename(two)
    report = lab.fsck()
    assert [item.what.split(" ", 2)[2] for item in report.problems] == [
        "does not have the bytes its name stands for"
    ] * 2


def test_a_damaged_manifest(store: Store, lab: Any) -> None:
    commit = lab.add("x", FILES)
    lab.flip(*lab.payload_at(commit.id))
    text = described(lab.fsck())
    assert f"object {commit.id.short} in pack" in text
    assert "ref x:latest" in text
    assert len(lab.fsck().problems) == 2


def test_damaged_refs(store: Store, lab: Any) -> None:
    lab.add("x", FILES)
    lab.add("x", {"f": b"2"})
    lab.add("y", FILES)
    for ref in ("x", "y"):
        max((store.refs / ref / "latest").iterdir()).write_bytes(b"\0" * 50)
    text = described(lab.fsck())
    assert "ref x:latest (move 2): is empty, cut short or damaged; using move 1, @" in text
    assert "ref y:latest (move 1): is empty, cut short or damaged; no other value is left (y:latest)" in text
    assert not lab.warnings()


def test_missing_folders_are_problems_not_crashes(store: Store, lab: Any) -> None:
    lab.add("x", FILES)
    store.packs.rename(store.root / "elsewhere")
    text = described(lab.fsck())
    assert "is missing" in text
    assert "ref x:latest" in text
    (store.root / "elsewhere").rename(store.packs)
    lab.sound()
    store.refs.rename(store.root / "elsewhere")
    assert "refs folder" in described(lab.fsck())


def test_the_index_is_put_right_in_passing(store: Store, lab: Any) -> None:
    commit = lab.add("x", FILES)
    location = store.index.locate(commit.id)[0]
    store.index.add_pack(location.pack, 1, [])
    lab.sound()
    store.index.forget(commit.id, location.pack)
    lab.sound()
    assert store.index.locate(commit.id) == [location]


def test_after_damage_was_seen_adding_again_heals(store: Store, lab: Any) -> None:
    lab.add("x", FILES)
    lab.flip(*lab.payload_at(object_id(FILES["b"])))
    assert lab.fsck().problems
    lab.add("again", {"b": FILES["b"]})
    assert lab.read("x") == FILES
    remaining = lab.fsck()
    assert not remaining.problems
    assert [item.what for item in remaining.notes] == ["fails its checksum; another copy of it is whole"]
    execute_gc(store, plan_gc(store, grace_seconds=0), Silent())
    assert lab.read("x") == FILES


def test_reindex_tells_what_it_could_not_read(store: Store, lab: Any) -> None:
    lab.add("x", FILES)
    lab.add("y", {"f": b"1"})
    damaged = lab.pack_of(object_id(FILES["a"]))
    lab.flip(damaged, -1)
    done = reindex(store)
    assert done.packs == 2
    assert len(done.damaged) == 1
    assert damaged.name in done.damaged[0]
    assert lab.read("x") == FILES


def test_it_is_safe_beside_a_gc_that_rewrites(
    store: Store, lab: Any, in_processes: Callable[[int, Callable[[int], Any]], list[Any]]
) -> None:
    for number in range(6):
        lab.add(f"keep{number}", {"k": lab.noise(30_000, number)})
        lab.add(f"both{number}", {"k": lab.noise(30_000, number), "d": lab.noise(80_000, 100 + number)})
    store.close()

    def work(number: int) -> list[str]:
        with open_store(store.root, Silent()) as mine:
            if number == 0:
                for victim in range(6):
                    entry = read_ref(mine, RefName(f"both{victim}"))
                    assert entry is not None
                    from llmos_cli.store.refs.refs import delete_ref

                    delete_ref(mine, RefName(f"both{victim}"), expected=entry.id)
                    execute_gc(mine, plan_gc(mine, grace_seconds=0), Silent())
                return []
            found = []
            for _ in range(12):
                report = check(mine, quick=number == 1, progress=Silent())
                found += [item.what for item in report.problems if not item.where.startswith("ref both")]
            return found

    assert in_processes(3, work) == [[], [], []]


def test_an_unreadable_pack_is_a_problem(store: Store, lab: Any, as_nobody: Any) -> None:
    lab.add("x", FILES)
    path: Path = lab.packs()[0]
    store.close()
    subprocess.run(["chmod", "-R", "a+rX", store.root.parent], check=True)
    path.chmod(0)

    def attempt() -> str:
        with open_store(store.root, Silent(), safe="*") as mine:
            return described(check(mine, quick=False, progress=Silent()))

    if os.geteuid() == 0:
        text = as_nobody(attempt)
        assert "Permission denied" in text
        assert "x:latest" in text


def test_an_empty_pack_of_the_right_shape(store: Store, lab: Any) -> None:
    assert HEADER_SIZE == 64
    lab.add("x", {})
    lab.sound()
    assert lab.read("x") == {}


def test_damage_that_hurts_no_ref_is_a_note(store: Store, lab: Any) -> None:
    lab.add("x", FILES)
    lab.add("gone", {"f": lab.noise(5000)})
    lab.remove("gone")
    lab.flip(*lab.payload_at(object_id(lab.noise(5000))))
    report = lab.fsck()
    assert not report.problems
    (note,) = report.notes
    assert note.what.endswith("fails its checksum; nothing in it is needed any more: gc will remove it")
    lab.gc()
    assert not lab.fsck().notes


def test_an_emptied_pack_goes_once_its_content_is_back(store: Store, lab: Any) -> None:
    lab.add("x", {"f": lab.noise(5000)})
    path: Path = lab.packs()[0]
    path.chmod(0o600)
    path.write_bytes(b"")
    assert "(x:latest)" in described(lab.fsck())
    with pytest.raises(Damaged):
        lab.gc()
    lab.add("more", {"f": lab.noise(5000), "g": b"another"})
    lab.add("again", {"f": lab.noise(5000)})
    report = lab.fsck()
    assert not report.problems
    assert [item.where for item in report.notes] == [f"pack {path.name[:12]}"]
    assert path.exists()
    lab.gc()
    assert not path.exists()
    assert not lab.fsck().notes


def test_earlier_values_count_as_long_as_they_are_kept(store: Store, lab: Any) -> None:
    lab.add("x", {"f": lab.noise(5000)})
    lab.add("x", FILES)
    lab.flip(*lab.payload_at(object_id(lab.noise(5000))))
    (_, problem) = lab.fsck().problems
    assert (problem.where, problem.what) == ("ref x:latest~1", "1 of its objects are missing or damaged")
    store.config = replace(store.config, gc=replace(store.config.gc, keep_days=0.0))
    report = lab.fsck()
    assert not report.problems
    assert len(report.notes) == 1


def test_a_damaged_base_is_named_with_what_rests_on_it(store: Store, lab: Any) -> None:
    values = np.random.default_rng(0).normal(0, 0.02, 4000).astype(np.float32)
    chunks = []
    for step in range(2):
        values[step] += 1
        data = values.tobytes()
        with begin(store, purpose="test", ref=RefName("run")) as tx:
            entry = tx.add_tensors("model.safetensors", [Tensor("w", "F32", (4000,), lambda data=data: data)])
            chunks.append(entry.chunks[-1].id)
            tx.commit(Manifest("model", (entry,)), message="")
    assert [store.index.locate(oid)[0].entry.depth for oid in chunks] == [0, 1]
    lab.sound()
    path, at = lab.payload_at(chunks[0])
    lab.flip(path, at)
    report = lab.fsck()
    base = next(item for item in report.problems if item.where.startswith("object"))
    assert base.objects == (chunks[0],)
    assert base.referrers == ("run:latest", "run:latest~1")
    assert "ref run:latest: 1 of its objects are missing or damaged" in described(report)
    lab.flip(path, at)
    lab.sound()
    path.rename(store.root / "away")
    for quick in (True, False):
        text = described(lab.fsck(quick=quick))
        assert f"pack {path.name[:12]}: its file is missing" in text
        assert "ref run:latest: 2 of its objects are missing or damaged" in text
    (store.root / "away").rename(path)
    lab.sound()


def test_a_damaged_earlier_move_is_a_problem_until_the_ref_has_moved_on_without_it(store: Store, lab: Any) -> None:
    lab.add("x", {"f": b"1"})
    lab.add("x", {"f": b"2"})
    lab.add("x", {"f": b"3"})
    folder = store.refs / "x" / "latest"
    second = folder / "0000000002"
    value = read_ref(store, RefName("x"))
    assert value is not None
    assert value.previous is not None
    second.write_bytes(b"\0" * 100)
    text = described(lab.fsck())
    assert text == (
        f"ref x:latest (move 2): is empty, cut short or damaged; it pointed to @{value.previous.short} (x:latest)"
    )
    (folder / "0000000003").unlink()
    assert "using move 1" in described(lab.fsck())
    lab.add("x", {"f": b"4"})
    report = lab.fsck()
    assert not report.problems
    assert [item.what for item in report.notes] == ["is empty, cut short or damaged; the ref has moved on since"]


def test_settings_that_somebody_or_something_has_changed_are_noted(store: Store, lab: Any) -> None:
    path = store.root / "config.toml"
    written = path.read_bytes()
    path.write_bytes(written.replace(b"24.0", b"20.0"))
    (note,) = lab.fsck().notes
    assert note.where == "config.toml"
    path.write_bytes(b"[gc]\ngrace_hours = 20\n")
    lab.sound()
    assert not lab.fsck().notes
    save_config(store, store.config)
    assert path.read_bytes() == written
    assert not lab.fsck().notes


def test_settings_with_a_flipped_bit_are_put_right_if_they_cannot_be_read(store: Store) -> None:
    names = ("FORMAT", "config.toml")
    written = {name: (store.root / name).read_bytes() for name in names}
    assert mend_settings(store.root) == []
    mended = 0
    for name, data in written.items():
        for at in range(len(data)):
            for bit in range(8):
                trial = bytearray(data)
                trial[at] ^= 1 << bit
                (store.root / name).write_bytes(trial)
                if mend_settings(store.root):
                    assert (store.root / name).read_bytes() == data
                    mended += 1
                else:
                    (store.root / name).write_bytes(data)
    assert mended > 0.6 * 8 * sum(map(len, written.values())), "all but comments and other versions"


@pytest.mark.root
def test_a_store_on_a_read_only_file_system_can_be_checked_and_read(
    mount: Callable[..., Path], remount: Callable[[Path, str], None]
) -> None:
    folder = mount("20m")
    root = folder / ".llmos"
    init_store(root)
    with open_store(root, Silent()) as mine:
        with begin(mine, purpose="test", ref=RefName("x")) as tx:
            entry = tx.add_bytes("a", FILES["a"])
            tx.commit(Manifest("files", (entry,)), message="")
        payload = mine.index.locate(object_id(FILES["a"]))[0]
        path, at = mine.pack_path(payload.pack), payload.entry.offset + HEADER_BYTES
    for _ in range(2):
        remount(folder, "ro")
        for quick in (False, True):
            with open_store(root, Silent()) as mine:
                assert described(check(mine, quick=quick, progress=Silent())) == ""
                assert read_object(mine, object_id(FILES["a"])) == FILES["a"]
        remount(folder, "rw")
        for extra in root.glob("index.db*"):
            extra.unlink()
    path.chmod(0o600)
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    remount(folder, "ro")
    with open_store(root, Silent()) as mine:
        for _ in range(2):
            assert "(x:latest)" in described(check(mine, quick=False, progress=Silent()))
