"""Files that are taken in without a second copy: what is shared, what is said, what happens when somebody writes."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmos_cli.errors import Damaged, LlmosError
from llmos_cli.formats import codec
from llmos_cli.formats.names import parse_ref
from llmos_cli.progress import Silent, Task
from llmos_cli.remote.exchange.pull import execute_pull, plan_pull
from llmos_cli.remote.exchange.push import execute_push, plan_push
from llmos_cli.remote.open import Remote
from llmos_cli.remote.transports.folder import FolderTransport
from llmos_cli.store.disk import durable
from llmos_cli.store.fsck.fsck import reindex
from llmos_cli.store.gc.gc import execute_gc, plan_gc
from llmos_cli.store.inspect.usage import usage
from llmos_cli.store.intake import adopt as adopting
from llmos_cli.store.intake.add import execute_add, plan_add
from llmos_cli.store.intake.adopt import COPY, HARDLINK, KNOWN, MIN_BYTES, REFLINK
from llmos_cli.store.leases import hold
from llmos_cli.store.local import Store, init_store, open_store
from llmos_cli.store.packs.adopted import list_adopted, list_trashed, trashed_path
from llmos_cli.store.packs.packs import list_packs
from llmos_cli.store.transaction import Commit

ROWS = 400


def weights(seed: int = 0, change: float = 0.0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(0, 0.02, (ROWS, 1000)).astype(np.float32)
    return values + np.float32(change) * np.random.default_rng(9).normal(0, 1, values.shape).astype(np.float32)


def model(lab: Any, seed: int = 0, change: float = 0.0) -> bytes:
    data: bytes = lab.safetensors({"w": weights(seed, change)})
    assert len(data) > MIN_BYTES
    return data


def adopt(store: Store, name: str, *paths: Path, progress: Silent | None = None) -> Commit:
    return execute_add(store, plan_add(paths), parse_ref(name), progress or Silent(), adopt=True)


@pytest.fixture
def file(tmp_path: Path, lab: Any) -> Path:
    """A model's file, not written to for a while; where the tests run, the file system has hard links only."""
    path = tmp_path / "m.safetensors"
    path.write_bytes(model(lab))
    lab.age(path, 1000)
    return path


def overwrite(path: Path, at: int = 900_000, data: bytes = b"changed behind the store's back") -> None:
    """As somebody does who may write to anything, or had it open before."""
    mode = path.stat().st_mode
    path.chmod(0o600)
    with open(path, "r+b") as other:
        other.seek(at)
        other.write(data)
    path.chmod(mode)


def only(store: Store) -> Path:
    (path,) = list_adopted(store).values()
    return path


# ---------------------------------------------------------------------------------------------- hard links


def test_a_hard_link_shares_the_bytes_and_makes_the_file_read_only(store: Store, lab: Any, file: Path) -> None:
    data, time_before = file.read_bytes(), file.stat().st_mtime_ns
    file.chmod(0o664)
    done = adopt(store, "m", file)
    (adoption,) = done.adoptions
    assert (adoption.path, adoption.how, adoption.read_only) == (file, HARDLINK, True)
    assert (done.adopted, done.size, done.reused) == (len(data), len(data), 0)
    assert done.stored < 2000
    assert os.path.samefile(only(store), file)
    assert (file.stat().st_mode & 0o777, file.stat().st_mtime_ns) == (0o444, time_before)
    assert lab.read("m") == {"m.safetensors": data}
    assert not lab.leftovers()
    lab.sound()


def test_the_manifest_is_that_of_an_ordinary_add(store: Store, tmp_path: Path, file: Path) -> None:
    text = tmp_path / "corpus.txt"
    text.write_bytes(bytes(range(256)) * 5000 + b"edited")
    init_store(tmp_path / "other")
    with open_store(tmp_path / "other") as other:
        plain = execute_add(other, plan_add([file, text]), parse_ref("m"), Silent())
    assert adopt(store, "m", file, text).id == plain.id


def test_what_the_store_has_already_is_left_alone(store: Store, lab: Any, file: Path) -> None:
    execute_add(store, plan_add([file]), parse_ref("m"), Silent(), rehash=True)
    before = file.stat()
    done = adopt(store, "m", file)
    assert [item.how for item in done.adoptions] == [KNOWN]
    assert (done.unchanged, done.adopted, done.stored) == (True, 0, 0)
    assert (file.stat().st_mode, file.stat().st_nlink) == (before.st_mode, 1)
    assert not list_adopted(store)


def test_adopting_again_costs_nothing_and_the_third_time_not_even_reading(
    store: Store, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adopt(store, "m", file)
    changed = file.stat().st_ctime_ns
    time.sleep(2.1)  # a file that was written to a moment ago is always read
    again = adopt(store, "m", file)
    assert [item.how for item in again.adoptions] == [KNOWN]
    assert file.stat().st_ctime_ns == changed
    monkeypatch.setattr(adopting, "opened", None)
    assert adopt(store, "m", file).unchanged


def test_a_link_to_a_blob_adopts_the_blob(store: Store, lab: Any, tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / "abc"
    blob.parent.mkdir()
    blob.write_bytes(model(lab))
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "m.safetensors").symlink_to(blob)
    assert [item.how for item in adopt(store, "m", snapshot).adoptions] == [HARDLINK]
    assert os.path.samefile(only(store), blob)
    assert not only(store).is_symlink()


def test_small_files_are_copied(store: Store, tmp_path: Path) -> None:
    small = tmp_path / "config.json"
    small.write_bytes(b"{}")
    done = adopt(store, "m", small)
    assert [(item.how, item.reason) for item in done.adoptions] == [(COPY, "it is small")]
    assert small.stat().st_mode & 0o200
    assert not list_adopted(store)


def test_a_file_that_somebody_writes_to_is_copied(store: Store, lab: Any, file: Path) -> None:
    with open(file, "ab"):
        done = adopt(store, "m", file)
    assert [(item.how, item.reason) for item in done.adoptions] == [(COPY, "somebody has it open for writing")]
    assert not list_adopted(store)
    assert file.stat().st_mode & 0o200
    lab.sound()


@pytest.mark.root
def test_a_file_of_another_file_system_is_copied(store: Store, lab: Any, mount: Callable[..., Path]) -> None:
    file = mount(8 << 20) / "m.safetensors"
    file.write_bytes(model(lab))
    done = adopt(store, "m", file)
    assert [(item.how, item.reason) for item in done.adoptions] == [(COPY, "it is on another file system")]
    assert lab.read("m") == {file.name: file.read_bytes()}
    assert file.stat().st_mode & 0o200
    assert not lab.leftovers()


class _Meddler(Silent):
    """Somebody who writes to the file while it is being read."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file

    @contextmanager
    def task(self, *_: Any, **__: Any) -> Iterator[Task]:
        yield self  # type: ignore[misc]

    def advance(self, _amount: int = 1) -> None:
        overwrite(self.file, 5)

    def note(self, _text: str) -> None: ...


def test_a_file_that_changes_meanwhile_is_refused_and_left_as_it_was(store: Store, lab: Any, file: Path) -> None:
    with pytest.raises(LlmosError, match="changed while it was read"):
        adopt(store, "m", file, progress=_Meddler(file))
    assert file.stat().st_mode & 0o200
    assert file.stat().st_nlink == 1
    assert not list_adopted(store)
    assert not lab.leftovers()


def test_a_disk_that_fails_at_the_end_leaves_the_file_writable(
    store: Store, lab: Any, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise LlmosError("no space")

    monkeypatch.setattr(durable, "publish_shared", full)
    with pytest.raises(LlmosError, match="no space"):
        adopt(store, "m", file)
    assert file.stat().st_mode & 0o200
    assert file.stat().st_nlink == 1
    assert not lab.leftovers()


# ---------------------------------------------------------------------------------------------- reflinks


@pytest.fixture
def reflinks(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system that has reflinks, in a file of its own."""
    make = shutil.which("mkfs.xfs", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if os.geteuid() != 0 or make is None:
        pytest.skip("needs root and mkfs.xfs to make a file system with reflinks")
    image, folder = tmp_path / "image", tmp_path / "mounted"
    folder.mkdir()
    with open(image, "wb") as file:
        file.truncate(320 << 20)
    try:
        subprocess.run([make, "-q", "-m", "reflink=1", str(image)], check=True, capture_output=True)
        subprocess.run(["mount", "-o", "loop", str(image), str(folder)], check=True, capture_output=True)
    except subprocess.CalledProcessError as exc:
        pytest.skip(f"no file system with reflinks can be mounted here: {exc.stderr!r}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.root
def test_a_reflink_shares_the_bytes_and_leaves_both_sides_free(reflinks: Path, lab: Any) -> None:
    init_store(reflinks / ".llmos")
    file = reflinks / "m.safetensors"
    file.write_bytes(data := model(lab))
    mode = file.stat().st_mode
    with open_store(reflinks / ".llmos") as store:
        done = adopt(store, "m", file)
        assert [(item.how, item.read_only) for item in done.adoptions] == [(REFLINK, False)]
        assert (done.adopted, file.stat().st_mode, file.stat().st_nlink) == (len(data), mode, 1)
        overwrite(file)
        assert lab.read("m", store=store) == {"m.safetensors": data}
        lab.sound(store=store)
        assert [item.how for item in adopt(store, "m2", file).adoptions] == [REFLINK]
        file.unlink()
        assert lab.read("m", store=store) == {"m.safetensors": data}
        assert not list(store.tmp.iterdir())


# ---------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize(
    ("hurt", "why"),
    [
        (overwrite, "has changed"),
        (lambda path: os.truncate(path, 1_000_000), "was cut short"),
        (lambda path: path.unlink(), "is gone"),
    ],
)
def test_a_file_that_changed_is_damage_by_name_and_only_there(
    store: Store, lab: Any, file: Path, hurt: Callable[[Path], None], why: str
) -> None:
    adopt(store, "m", file)
    lab.add("other", {"f": lab.noise(2000)})
    data = file.read_bytes()
    hurt(only(store))
    quick = lab.fsck(quick=True).problems
    with pytest.raises(
        Damaged, match=rf"object [0-9a-f]{{12}} lies in the adopted file .*{file.name}, which {why}"
    ) as e:
        lab.read("m")
    assert "add an intact copy" in str(e.value.hint)
    report = lab.fsck()
    assert any(why in item.what and "m:latest" in item.referrers for item in report.problems), report.problems
    assert not any("other:latest" in item.referrers for item in report.problems)
    assert bool(quick) == (why == "is gone")
    assert len(lab.read("other")["f"]) == 2000

    intact = file.with_name("copy.safetensors")
    intact.write_bytes(data)
    lab.age(intact, 1000)
    adopt(store, "m2", intact)
    assert lab.read("m") == {file.name: data}
    assert lab.read("m2") == {intact.name: data}
    assert not lab.fsck().problems


def test_one_that_is_gone_is_noticed_when_it_is_shared(store: Store, lab: Any, file: Path) -> None:
    adopt(store, "m", file)
    only(store).unlink()
    with pytest.raises(Damaged, match="removed while it was being used"):
        execute_add(store, plan_add([file]), parse_ref("again"), Silent())
    execute_add(store, plan_add([file]), parse_ref("again"), Silent())
    assert lab.read("again") == lab.read("m") == {file.name: file.read_bytes()}


# ---------------------------------------------------------------------------------------------- the rest of the store


def test_a_delta_rests_on_an_adopted_chunk(store: Store, lab: Any, file: Path, tmp_path: Path) -> None:
    adopt(store, "m", file)
    tuned = tmp_path / "tuned" / file.name
    tuned.parent.mkdir()
    tuned.write_bytes(model(lab, change=1e-6))
    done = execute_add(store, plan_add([tuned]), parse_ref("tuned"), Silent())
    assert done.as_delta > MIN_BYTES
    assert lab.read("tuned") == {file.name: tuned.read_bytes()}


def test_the_index_is_rebuilt_from_packs_alone(store: Store, lab: Any, file: Path) -> None:
    adopt(store, "m", file)
    reindex(store)
    assert lab.read("m") == {file.name: file.read_bytes()}
    lab.sound()


def test_du_counts_an_adopted_file_once(store: Store, lab: Any, file: Path) -> None:
    adopt(store, "m", file)
    adopt(store, "m:too", file)
    found = usage(store)
    assert found.adopted == file.stat().st_size
    assert found.adopted < found.stored < found.disk < found.adopted + 5000
    assert [ref.own > MIN_BYTES for ref in found.refs] == [False, False]


def test_gc_lets_go_of_it_and_leaves_the_users_file(store: Store, lab: Any, file: Path) -> None:
    data = file.read_bytes()
    adopt(store, "m", file)
    lab.add("other", {"f": b"stays"})
    lab.gc()
    assert only(store)
    lab.remove("m")
    plan = plan_gc(store, grace_seconds=0)
    assert [(orphan.path.exists(), orphan.size) for orphan in plan.orphans] == [(True, 0)]
    done = execute_gc(store, plan, Silent())
    assert done.released == 1
    assert not list_adopted(store)
    assert not list_trashed(store)
    assert (file.read_bytes(), file.stat().st_nlink, file.stat().st_mode & 0o222) == (data, 1, 0)
    lab.sound()


def test_it_outlives_its_pack_in_the_trash(store: Store, lab: Any, file: Path) -> None:
    done = adopt(store, "m", file)
    lab.remove("m")
    lab.age_all(10_000)
    lab.gc(3600.0)
    assert list_packs(store.trash)
    assert only(store)
    assert lab.gc(3600.0).released == 0
    adopt(store, "m", file)  # brings the pack back
    assert adopt(store, "m", file).id == done.id
    lab.sound()


def test_gc_gives_back_the_space_of_one_that_has_no_other_name_after_the_grace_period(
    store: Store, lab: Any, file: Path
) -> None:
    size = file.stat().st_size
    adopt(store, "m", file)
    file.unlink()
    lab.remove("m")
    lab.age_all(10_000)
    later = time.time() + 7200
    execute_gc(store, plan_gc(store, grace_seconds=3600.0), Silent())
    assert not plan_gc(store, grace_seconds=3600.0).orphans
    plan = plan_gc(store, grace_seconds=3600.0, now=later)
    assert [orphan.size for orphan in plan.orphans] == [size]
    assert plan.freed_bytes >= size
    assert execute_gc(store, plan, Silent()).freed_bytes >= size
    assert not list_adopted(store)


def test_while_somebody_writes_it_waits_in_the_trash_and_comes_back_if_needed(
    store: Store, lab: Any, file: Path
) -> None:
    adopt(store, "m", file)
    name = next(iter(list_adopted(store)))
    os.replace(only(store), trashed_path(store, name))  # a gc has died half-way
    with hold(store, "test", [], writes=True):
        assert lab.gc().released == 0
    assert lab.read("m") == {file.name: file.read_bytes()}
    assert only(store)
    os.replace(only(store), trashed_path(store, name))
    lab.sound()
    assert only(store)
    lab.remove("m")
    plan = plan_gc(store, grace_seconds=0)
    with hold(store, "test", [], writes=True):
        assert execute_gc(store, plan, Silent()).released == 0
    assert lab.gc().released == 1


def test_a_pack_that_is_named_meanwhile_keeps_it(store: Store, lab: Any, file: Path) -> None:
    adopt(store, "m", file)
    lab.remove("m")
    plan = plan_gc(store, grace_seconds=0)
    assert plan.orphans
    adopt(store, "again", file)
    assert execute_gc(store, plan, Silent()).released == 0
    assert lab.read("again") == {file.name: file.read_bytes()}
    lab.sound()


# ---------------------------------------------------------------------------------------------- other stores


def push(store: Store, folder: Path) -> int:
    remote = Remote("nas", FolderTransport(folder))
    return execute_push(store, remote, plan_push(store, remote, None, force=False), Silent()).sent


def pull(store: Store, folder: Path) -> None:
    remote = Remote("nas", FolderTransport(folder))
    execute_pull(store, remote, plan_pull(store, remote, None, force=False), Silent())


def test_a_remote_gets_the_bytes_themselves(store: Store, lab: Any, file: Path, tmp_path: Path) -> None:
    data = file.read_bytes()
    adopt(store, "m", file)
    sent = push(store, tmp_path / "nas")
    assert 0.7 * len(data) < sent < 0.9 * len(data)  # as planes: the frame knows that these are floats
    assert push(store, tmp_path / "nas") == 0
    init_store(tmp_path / "twin")
    with open_store(tmp_path / "twin") as twin:
        pull(twin, tmp_path / "nas")
        only(store).unlink()
        file.unlink()
        entries = [entry for name in twin.index.packs() for entry in twin.index.entries(name)]
        assert entries
        assert not [entry for entry in entries if entry.codec == codec.ADOPTED]
        assert lab.read("m", store=twin) == {file.name: data}
        lab.sound(store=twin)


def test_a_damaged_one_is_not_sent(store: Store, lab: Any, file: Path, tmp_path: Path) -> None:
    adopt(store, "m", file)
    overwrite(file)
    with pytest.raises(Damaged, match="has changed"):
        push(store, tmp_path / "nas")
    assert not list((tmp_path / "nas").glob("refs/*/*/*"))


def test_a_store_does_not_take_the_word_of_another_for_bytes(
    store: Store, lab: Any, file: Path, tmp_path: Path
) -> None:
    adopt(store, "m", file)
    init_store(tmp_path / "twin")
    with open_store(tmp_path / "twin") as twin:
        with pytest.raises(Damaged, match="lies in a file that was adopted") as caught:
            pull(twin, store.root)
        assert "push from that store" in str(caught.value.hint)
        assert not list_packs(twin.packs)


def test_what_a_remote_only_points_to_counts_as_missing_there(
    store: Store, lab: Any, file: Path, tmp_path: Path
) -> None:
    adopt(store, "m", file)
    shutil.copytree(store.packs, tmp_path / "nas" / "packs")  # somebody copied the packs over
    shutil.copy(store.root / "FORMAT", tmp_path / "nas")
    assert push(store, tmp_path / "nas") > 0.7 * MIN_BYTES
    init_store(tmp_path / "twin")
    with open_store(tmp_path / "twin") as twin:
        pull(twin, tmp_path / "nas")
        assert lab.read("m", store=twin) == {file.name: file.read_bytes()}
        lab.sound(store=twin)
