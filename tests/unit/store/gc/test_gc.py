import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmos_cli.config import Config, GcConfig
from llmos_cli.errors import Busy, Damaged, LlmosError, NoSpace, Unsafe
from llmos_cli.formats import limits
from llmos_cli.formats.ids import ObjectId, object_id
from llmos_cli.formats.manifest import Manifest
from llmos_cli.formats.names import RefName
from llmos_cli.progress import Silent
from llmos_cli.store.gc.clock import check_clock
from llmos_cli.store.gc.gc import execute_gc, plan_gc
from llmos_cli.store.gc.reach import find_roots, reachable
from llmos_cli.store.gc.repack import execute_repack, plan_repack
from llmos_cli.store.gc.weights import staying, weigh
from llmos_cli.store.leases import hold, hold_alone
from llmos_cli.store.local import Store, init_store, open_store
from llmos_cli.store.packs.objects import open_file, read_file, read_manifest, read_object
from llmos_cli.store.packs.packs import list_packs, sync_index
from llmos_cli.store.refs.refs import delete_ref, read_ref
from llmos_cli.store.transaction import Tensor, begin

DAY = 86400.0


@pytest.fixture
def small_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PACK_TARGET_BYTES", 200_000)


@pytest.fixture
def mixed(lab: Any) -> dict[str, bytes]:
    """A pack of which less than half is alive; gives what must survive."""
    keep = {"keep": lab.noise(40_000, 1)}
    lab.add("both", keep | {"drop": lab.noise(90_000, 2)})
    lab.add("kept", keep)
    lab.remove("both")
    return keep


def trash(store: Store) -> list[Path]:
    return list(list_packs(store.trash).values())


def test_nothing_to_do_in_an_empty_store_or_one_that_is_all_needed(store: Store, lab: Any) -> None:
    for _ in range(2):
        plan = plan_gc(store, grace_seconds=0)
        assert (plan.trash, plan.rewrite, plan.unlink, plan.temporary) == ((), (), (), ())
        done = execute_gc(store, plan, Silent())
        assert (done.trashed_bytes, done.freed_bytes, done.restored) == (0, 0, 0)
        lab.add("x", {"f": lab.noise(10_000)})
    assert plan_gc(store, grace_seconds=0).live_bytes > 10_000


def test_a_plan_changes_nothing(store: Store, lab: Any) -> None:
    lab.add("x", {"f": lab.noise(10_000)})
    lab.remove("x")
    plan = plan_gc(store, grace_seconds=0)
    assert len(plan.trash) == 1
    assert plan.trashed_bytes == lab.packs()[0].stat().st_size
    assert lab.packs()


def test_both_steps_wait_for_the_grace_period(store: Store, lab: Any) -> None:
    lab.add("x", {"f": lab.noise(10_000)})
    lab.remove("x")
    size = lab.packs()[0].stat().st_size
    plan = plan_gc(store)
    assert not plan.trash
    assert plan.kept_bytes > 10_000
    lab.age_all(2 * DAY)
    assert lab.gc(grace=None).trashed_bytes == size
    assert not lab.packs()
    assert len(trash(store)) == 1
    assert plan_gc(store).waiting_bytes == size
    assert lab.gc(grace=None).freed_bytes == 0
    lab.age(trash(store)[0], 2 * DAY)
    assert lab.gc(grace=None).freed_bytes == size
    assert not trash(store)
    lab.sound()


def test_the_grace_period_is_a_setting(store: Store, lab: Any) -> None:
    store.config = Config(GcConfig(grace_hours=1.0))
    lab.add("x", {"f": lab.noise(10_000)})
    lab.remove("x")
    lab.age_all(3000)
    assert not plan_gc(store).trash
    lab.age_all(4000)
    assert plan_gc(store).trash


def test_with_no_grace_it_is_gone_at_once(store: Store, lab: Any) -> None:
    commit = lab.add("x", {"f": lab.noise(10_000)})
    lab.add("y", {"g": b"stays"})
    lab.remove("x")
    done = lab.gc(grace=0)
    assert done.freed_bytes == done.trashed_bytes > 10_000
    assert not trash(store)
    with pytest.raises(Damaged):
        read_object(store, commit.id)
    assert lab.read("y") == {"g": b"stays"}
    lab.sound()


def test_a_mostly_dead_pack_is_rewritten_and_nothing_alive_is_lost(
    store: Store, lab: Any, mixed: dict[str, bytes]
) -> None:
    before = lab.packs()
    plan = plan_gc(store, grace_seconds=0)
    assert [len(pack.live) for pack in plan.rewrite] == [1]
    done = execute_gc(store, plan, Silent())
    assert done.freed_bytes > 90_000
    assert plan.rewrite[0].path in before
    assert plan.rewrite[0].path not in lab.packs()
    assert lab.read("kept") == mixed
    lab.sound()
    assert not plan_gc(store, grace_seconds=0).rewrite
    assert sum(path.stat().st_size for path in lab.packs()) < 45_000


def test_a_rewritten_pack_waits_in_the_trash_too(store: Store, lab: Any, mixed: dict[str, bytes]) -> None:
    lab.age_all(2 * DAY)
    lab.gc(grace=None)
    assert len(trash(store)) == 1
    assert lab.gc(grace=None).restored == 0  # its living frames are elsewhere
    lab.age(trash(store)[0], 2 * DAY)
    lab.gc(grace=None)
    assert not trash(store)
    assert lab.read("kept") == mixed
    lab.sound()


def test_a_copy_is_unlinked_only_after_the_other_was_proven(store: Store, lab: Any, mixed: dict[str, bytes]) -> None:
    lab.age_all(2 * DAY)
    lab.gc(grace=None)
    lab.flip(*lab.payload_at(object_id(mixed["keep"])))
    lab.age(trash(store)[0], 2 * DAY)
    assert lab.gc(grace=None).restored == 1
    assert lab.read("kept") == mixed


def test_a_pack_with_damaged_frames_is_not_rewritten(store: Store, lab: Any, mixed: dict[str, bytes]) -> None:
    lab.add("other", {"f": lab.noise(10_000, 3)})
    lab.remove("other")
    lab.flip(*lab.payload_at(object_id(mixed["keep"])))
    before = set(lab.packs())
    plan = plan_gc(store, grace_seconds=0)
    assert len(plan.rewrite) == 1
    execute_gc(store, plan, Silent())
    assert plan.rewrite[0].path in set(lab.packs())
    assert len(before - set(lab.packs())) == 1  # the rest of the work was done
    assert any("stays as it is" in text for text in lab.warnings())
    assert not lab.leftovers()


def test_a_duplicate_goes_but_never_the_only_good_one(store: Store, lab: Any) -> None:
    data = lab.noise(30_000)
    lab.add("x", {"f": data})
    store.index.drop_pack(store.index.locate(object_id(data))[0].pack)
    lab.add("x", {"f": data, "g": lab.noise(20_000, 1)})
    store.index.reset()
    assert sum(path.stat().st_size for path in lab.packs()) > 80_000
    store.config = Config(GcConfig(keep_days=0.0))
    lab.gc(grace=0)
    assert lab.read("x") == {"f": data, "g": lab.noise(20_000, 1)}
    lab.sound()
    assert sum(path.stat().st_size for path in lab.packs()) < 60_000


@pytest.mark.parametrize("damaged", [0, 1])
def test_of_a_good_and_a_damaged_copy_the_good_one_survives(store: Store, lab: Any, damaged: int) -> None:
    data = lab.noise(30_000)
    lab.add("one", {"f": data})
    one = store.index.locate(object_id(data))[0]
    store.index.drop_pack(one.pack)
    lab.add("two", {"f": data, "g": b"makes another pack"})
    two = store.index.locate(object_id(data))[0]
    store.index.reset()
    victim = (one, two)[damaged]
    lab.flip(store.pack_path(victim.pack), victim.entry.offset + 500)
    for _ in range(3):
        lab.gc(grace=0)
        assert lab.read("one") == {"f": data}
        assert lab.read("two") == {"f": data, "g": b"makes another pack"}


def test_what_a_ref_was_before_stays_for_the_retention(store: Store, lab: Any) -> None:
    first = lab.add("x", {"f": lab.noise(10_000, 1)})
    lab.add("x", {"f": lab.noise(10_000, 2)})
    lab.age_all(5 * DAY)
    assert not plan_gc(store).trash
    read_manifest(store, first.id)
    store.config = Config(GcConfig(keep_days=0.0))
    assert len(plan_gc(store).trash) == 1
    lab.gc(grace=0)
    with pytest.raises(Damaged):
        read_manifest(store, first.id)
    lab.sound()


def test_an_old_value_that_is_gone_is_no_obstacle(store: Store, lab: Any) -> None:
    """A clone has only the newest."""
    first = lab.add("x", {"f": lab.noise(10_000, 1)})
    lab.add("x", {"f": lab.noise(10_000, 2)})
    lab.pack_of(first.id).unlink()
    lab.gc(grace=0)
    assert lab.read("x") == {"f": lab.noise(10_000, 2)}
    assert not lab.warnings()


def test_an_old_value_that_is_damaged_is_said(store: Store, lab: Any) -> None:
    first = lab.add("x", {"f": lab.noise(10_000, 1)})
    lab.add("x", {"f": lab.noise(10_000, 2)})
    path, at = lab.payload_at(first.id)
    lab.flip(path, at)
    lab.gc(grace=None)
    assert any("keeps nothing alive" in text for text in lab.warnings())


def test_leases_are_roots(store: Store, lab: Any) -> None:
    commit = lab.add("x", {"f": lab.noise(10_000)})
    lab.remove("x")
    with hold(store, "serving", [commit.id]):
        assert lab.gc(grace=0).trashed_bytes == 0
        assert read_manifest(store, commit.id).size == 10_000
    assert lab.gc(grace=0).trashed_bytes > 0


@pytest.mark.parametrize("what", ["ref", "manifest", "missing manifest", "listing"])
def test_a_root_that_cannot_be_read_stops_it(store: Store, lab: Any, what: str) -> None:
    lab.add("dead", {"f": lab.noise(10_000, 1)})
    lab.remove("dead")
    commit = lab.add("x", {"f": lab.noise(10_000)})
    if what == "ref":
        for path in (store.refs / "x" / "latest").iterdir():
            path.write_bytes(b"")
    elif what == "manifest":
        lab.flip(*lab.payload_at(commit.id))
    elif what == "missing manifest":
        lab.pack_of(commit.id).unlink()
    else:
        store.refs.rename(store.root / "elsewhere")
    before = lab.packs()
    with pytest.raises(Damaged):
        lab.gc(grace=0)
    assert lab.packs() == before
    assert not trash(store)


def test_nothing_is_unlinked_while_somebody_writes(store: Store, lab: Any) -> None:
    lab.add("x", {"f": lab.noise(10_000)})
    lab.remove("x")
    lab.age_all(2 * DAY)
    lab.gc(grace=3600)
    lab.age(trash(store)[0], 2 * DAY)
    with begin(store, purpose="test"):
        plan = plan_gc(store, grace_seconds=0)
        assert plan.writers == 1
        assert not plan.unlink
        execute_gc(store, plan, Silent())
        assert trash(store)
    late = plan_gc(store, grace_seconds=0)
    with begin(store, purpose="test"):  # it began between plan and execution
        execute_gc(store, late, Silent())
        assert trash(store)
    lab.gc(grace=0)
    assert not trash(store)


def test_what_became_reachable_after_the_plan_comes_back(store: Store, lab: Any) -> None:
    data = {"f": lab.noise(10_000)}
    lab.add("x", data)
    lab.remove("x")
    plan = plan_gc(store, grace_seconds=0)
    lab.add("y", data)
    done = execute_gc(store, plan, Silent())
    assert done.restored == 1
    assert done.freed_bytes == 0
    assert lab.read("y") == data
    assert not trash(store)
    lab.sound()


def test_what_a_crashed_gc_left_in_the_trash_is_found_by_readers_and_fsck(store: Store, lab: Any) -> None:
    data = {"f": lab.noise(10_000)}
    lab.add("x", data)
    path = lab.packs()[0]
    path.rename(store.trash / path.name)
    lab.sound()
    assert not trash(store)
    lab.packs()[0].rename(store.trash / path.name)
    assert lab.read("x") == data
    assert not trash(store)


def test_temporary_files_of_the_dead_go_those_of_the_living_stay(store: Store, lab: Any) -> None:
    lab.add("x", {"f": b"1"})
    old, young = store.tmp / ".tmp-old", store.tmp / ".tmp-young"
    lease, config = store.leases / ".tmp-lease", store.root / ".tmp-config"
    stranger = store.tmp / "not ours"
    for path in (old, young, lease, config, stranger):
        path.write_bytes(b"x" * 1000)
    for path in (old, lease, config, stranger):
        lab.age(path, 2 * DAY)
    assert lab.gc(grace=None).freed_bytes == 3000
    assert young.exists()
    assert stranger.exists()
    assert not old.exists()
    lab.age(young, 3600)
    with begin(store, purpose="test"):
        lab.gc(grace=0)
        assert young.exists()
    lab.gc(grace=0)
    assert not young.exists()


def test_a_removed_ref_stays_in_the_trash_for_the_retention(store: Store, lab: Any) -> None:
    lab.add("x", {"f": b"1"})
    lab.remove("x")
    lab.age_all(10 * DAY)
    lab.gc(grace=0)
    assert list(store.trash.glob("ref-x-*"))
    lab.age_all(20 * DAY)
    lab.gc(grace=0)
    assert not list(store.trash.iterdir())


def test_two_at_once(store: Store, lab: Any) -> None:
    lab.add("x", {"f": b"1"})
    plan = plan_gc(store, grace_seconds=0)
    with hold_alone(store, "gc", "gc"), pytest.raises(Busy):
        execute_gc(store, plan, Silent())
    execute_gc(store, plan, Silent())


def test_a_plan_carried_out_twice_or_late(store: Store, lab: Any) -> None:
    lab.add("x", {"f": lab.noise(10_000)})
    lab.remove("x")
    plan = plan_gc(store, grace_seconds=0)
    lab.gc(grace=0)
    done = execute_gc(store, plan, Silent())
    assert (done.trashed_bytes, done.freed_bytes) == (0, 0)


def test_the_clock_of_the_store_runs_ahead(store: Store, lab: Any) -> None:
    """Files of the future are young, not infinitely old."""
    lab.add("x", {"f": lab.noise(10_000)})
    lab.remove("x")
    lab.age_all(-365 * DAY)
    assert not plan_gc(store).trash
    assert not plan_gc(store, now=time.time() + 60).trash


def test_a_deleted_ref_frees_only_what_is_its_own(store: Store, lab: Any, small_packs: None) -> None:
    shared = {f"s{number}": lab.noise(150_000, number) for number in range(4)}
    own = {f"o{number}": lab.noise(150_000, 10 + number) for number in range(4)}
    lab.add("one", shared)
    lab.add("two", shared | own)
    lab.remove("two")
    done = lab.gc(grace=0)
    assert 590_000 < done.freed_bytes < 640_000
    assert lab.read("one") == shared
    lab.sound()


def test_an_index_that_lost_rows_does_not_make_live_packs_dead(store: Store, lab: Any) -> None:
    data = {"f": lab.noise(10_000)}
    commit = lab.add("x", data)
    location = store.index.locate(object_id(data["f"]))[0]
    store.index.forget(object_id(data["f"]), location.pack)
    store.index.forget(commit.id, location.pack)
    lab.gc(grace=0)
    assert lab.read("x") == data
    lab.sound()


def test_the_same_bytes_as_chunk_and_as_manifest(store: Store, lab: Any) -> None:
    """A file may hold the very bytes of a manifest: both kinds of frame stay findable."""
    commit = lab.add("x", {"f": b"1"})
    text = read_object(store, commit.id)
    copy = store.root / "copy"
    shutil.copytree(store.packs, copy)
    lab.remove("x")
    lab.gc(grace=0)
    lab.add("y", {"manifest.json": text})
    for path in copy.glob("**/*.pack"):
        (store.packs / path.parent.name).mkdir(exist_ok=True)
        path.rename(store.packs / path.parent.name / path.name)
    lab.add("x", {"f": b"1"})
    lab.gc(grace=0)
    assert commit.id in store.index.manifests(str(commit.id))
    assert lab.read("y") == {"manifest.json": text}
    assert lab.read("x") == {"f": b"1"}


@pytest.mark.root
def test_a_full_disk_can_be_collected_and_then_used(mount: Callable[..., Path], lab: Any) -> None:
    folder = mount("8m")
    root = folder / ".llmos"
    init_store(root)
    old = {"f": lab.noise(1 << 20, 1)}
    with open_store(root, Silent()) as store:
        lab.add("old", old, store=store)
        lab.add("dead", {"f": lab.noise(2 << 20, 2)}, store=store)
    with open_store(root, Silent()) as store:
        with pytest.raises(NoSpace) as caught:
            lab.add("big", {"f": lab.noise(12 << 20, 3)}, store=store)
        assert caught.value.exit_code == 15
        assert not [path for path in root.glob("**/.tmp-*") if path.exists()]
        assert lab.read("old", store) == old
        lab.sound(store)
    fill(folder)
    with open_store(root, Silent()) as store:
        assert lab.read("old", store) == old
        with pytest.raises(NoSpace):
            lab.add("small", {"f": b"small"}, store=store)
        assert lab.read("old", store) == old
        _delete(store, "dead")
        done = lab.gc(grace=0, store=store)
        assert done.freed_bytes > 2 << 20
        lab.add("next", {"f": lab.noise(1 << 20, 4)}, store=store)
        assert lab.read("next", store) == {"f": lab.noise(1 << 20, 4)}
        lab.sound(store)
    with open_store(root, Silent()) as store:
        assert lab.read("old", store) == old
        lab.sound(store)


def fill(folder: Path) -> None:
    """Leave not one byte free."""
    with open(folder / "filler", "wb", buffering=0) as file:
        for size in (1 << 16, 4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    assert os.statvfs(folder).f_bavail == 0


def _delete(store: Store, name: str) -> None:
    entry = read_ref(store, RefName(name))
    assert entry is not None
    delete_ref(store, RefName(name), expected=entry.id)


@pytest.mark.root
def test_space_that_runs_out_while_packs_are_rewritten(mount: Callable[..., Path], lab: Any) -> None:
    root = mount("4m") / ".llmos"
    init_store(root)
    with open_store(root, Silent()) as store:
        keep = {"keep": lab.noise(900_000, 1)}
        lab.add("both", keep | {"drop": lab.noise(1_500_000, 2)}, store=store)
        lab.add("kept", keep, store=store)
        lab.add("dead", {"f": lab.noise(300_000, 3)}, store=store)
        _delete(store, "both")
        _delete(store, "dead")
        fill(root.parent)
        done = lab.gc(grace=0, store=store)
        assert done.freed_bytes > 290_000
        assert lab.read("kept", store) == keep
        lab.sound(store)


def test_a_store_that_may_not_be_written_to(store: Store, lab: Any, as_nobody: Any) -> None:
    lab.add("x", {"f": lab.noise(10_000)})
    lab.remove("x")
    store.close()
    subprocess.run(["chmod", "-R", "a+rX", store.root.parent], check=True)

    def attempt() -> str:
        with open_store(store.root, Silent(), safe="*") as mine:
            plan = plan_gc(mine, grace_seconds=0)
            assert len(plan.trash) == 1
            try:
                execute_gc(mine, plan, Silent())
            except LlmosError as exc:
                return exc.code
        return "done"

    if os.geteuid() == 0:
        assert as_nobody(attempt) == "access-denied"


def put_tensor(store: Store, ref: str, values: np.ndarray, **extra: bytes) -> ObjectId:
    """Commit a model of one tensor; gives the id of its chunk."""
    data = values.tobytes()
    with begin(store, purpose="test", ref=RefName(ref)) as tx:
        entries = [tx.add_tensors("model.safetensors", [Tensor("w", "F32", values.shape, lambda: data)])]
        entries += [tx.add_bytes(name, content) for name, content in extra.items()]
        tx.commit(Manifest("model", tuple(entries)), message="")
    return object_id(data)


def test_what_stays_on_the_disk_stays_readable_needed_or_not(store: Store, lab: Any) -> None:
    """A delta that nothing needs lies in a pack that stays; whoever stores its chunk again does not write it anew."""
    values = np.random.default_rng(0).normal(0, 0.02, 4000).astype(np.float32)
    first, noise = values, lab.noise(100_000)
    second = np.concatenate([first[:10] + 1, first[10:]])
    base = put_tensor(store, "run", first)
    delta = put_tensor(store, "run", second, other=noise)
    assert store.index.locate(delta)[0].entry.base == base
    lab.add("keep", {"other": noise})
    lab.remove("run")
    lab.gc()
    put_tensor(store, "again", second, other=noise)
    assert lab.read("again")["model.safetensors"].endswith(second.tobytes())
    lab.sound()


def test_a_delta_whose_base_is_gone_is_stored_anew(store: Store, lab: Any) -> None:
    first = np.random.default_rng(0).normal(0, 0.02, 4000).astype(np.float32)
    second = np.concatenate([first[:10] + 1, first[10:]])
    base = put_tensor(store, "run", first)
    put_tensor(store, "run", second)
    lab.pack_of(base).unlink()
    with pytest.raises(Damaged) as caught:
        put_tensor(store, "again", second)
    assert caught.value.hint == "run the command again: it will be stored anew"
    put_tensor(store, "again", second)
    assert lab.read("again")["model.safetensors"].endswith(second.tobytes())


@pytest.mark.parametrize("minutes", [-6, 6])
def test_a_clock_that_is_not_that_of_the_file_system(store: Store, lab: Any, minutes: int) -> None:
    lab.add("x", {"f": lab.noise(10_000)})
    lab.remove("x")
    lab.age_all(2 * DAY)
    plan = plan_gc(store)
    with pytest.raises(Unsafe, match=r"minutes (ahead of|behind) that of the file system") as caught:
        execute_gc(store, plan, Silent(), now=time.time() + 60 * minutes)
    assert caught.value.exit_code == 14
    assert lab.packs()
    assert not lab.leftovers()
    execute_gc(store, plan, Silent(), now=time.time() + 60)
    assert not lab.packs()


@pytest.mark.parametrize("what", ["pack", "trashed pack", "lease"])
def test_something_from_the_future(store: Store, lab: Any, what: str) -> None:
    lab.add("x", {"f": lab.noise(10_000)})
    lab.add("y", {"f": b"stays"})
    with contextlib.ExitStack() as stack:
        if what == "lease":
            stack.enter_context(hold(store, "training", []))
            (lease,) = store.leases.glob("*.json")
            fields = json.loads(lease.read_bytes())
            lease.write_text(json.dumps(fields | {"since": time.time() + 600}))
        elif what == "pack":
            lab.age(lab.packs()[0], -3600)
        else:
            lab.remove("x")
            lab.gc(grace=0.5)
            lab.age_all(DAY)
            lab.gc(grace=3600)
            lab.age(trash(store)[0], -3600)
        before = lab.packs()
        with pytest.raises(Unsafe) as caught:
            lab.gc()
        assert lab.packs() == before
        hint = caught.value.hint
        assert hint
        assert hint.startswith("set the clock")
        plan_gc(store, grace_seconds=0)
    if what != "lease":
        os.utime(hint.rpartition(" ")[2])
        lab.gc()
        lab.sound()


def test_an_old_lease_of_another_host_does_not_stand_in_the_way(store: Store, lab: Any) -> None:
    with hold(store, "training", []):
        check_clock(store)
        check_clock(store, time.time() + 200)


def test_a_gc_and_a_repack_and_a_reader_at_once(store: Store, lab: Any, small_packs: None, in_processes: Any) -> None:
    """Each either does its part or says that another is at it."""
    data = {f"f{number}": lab.noise(60_000, number) for number in range(6)}
    for name, content in data.items():
        lab.add(name, {"f": content})
        lab.add("dead", {"f": lab.noise(60_000, ord(name[1]))})
    lab.remove("dead")
    store.close()

    def work(number: int) -> str:
        with open_store(store.root, Silent()) as mine:
            for _ in range(3):
                try:
                    if number == 0:
                        lab.gc(store=mine)
                    elif number == 1:
                        execute_repack(mine, plan_repack(mine, grace_seconds=0), Silent())
                    else:
                        for name, content in data.items():
                            assert lab.read(name, mine) == {"f": content}
                except Busy:
                    continue
        return "done"

    assert in_processes(4, work) == ["done"] * 4
    with open_store(store.root, Silent()) as mine:
        lab.gc(store=mine)
        for name, content in data.items():
            assert lab.read(name, mine) == {"f": content}
        lab.sound(mine)


def test_a_reader_whose_pack_is_moved_and_unlinked_goes_on(store: Store, lab: Any, mixed: dict[str, bytes]) -> None:
    value = read_ref(store, RefName("kept"))
    assert value
    (file,) = read_manifest(store, value.id).files
    reader = open_file(store, file)
    assert reader.read(0, 10) == mixed["keep"][:10]
    with open_store(store.root, Silent()) as other:
        lab.gc(store=other)
    assert reader.read(10, 40_000) == mixed["keep"][10:]
    assert read_file(store, file) == mixed["keep"]


def test_weights_are_exact(store: Store, lab: Any) -> None:
    """What is alive and dead of each pack adds up to what lies in it, twofold objects counted once."""
    data = lab.noise(30_000)
    lab.add("x", {"f": data})
    store.index.drop_pack(store.index.locate(object_id(data))[0].pack)
    lab.add("y", {"f": data, "g": lab.noise(20_000, 1)})
    store.index.reset()
    sync_index(store)
    live = reachable(store, find_roots(store, since=0))
    found = weigh(store, live, list_packs(store.packs).keys())
    assert found.found == len(live)
    for name, weight in found.packs.items():
        entries = store.index.entries(name)
        kept = staying(store, name, weight, live)
        assert weight.objects == len(entries)
        assert weight.staying == len(kept)
        assert weight.live == sum(entry.stored_size for entry in kept)
        assert weight.dead == sum(entry.stored_size for entry in set(entries) - set(kept))
    assert sum(len(weight.spare) for weight in found.packs.values()) == 1
