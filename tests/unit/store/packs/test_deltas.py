"""Models that resemble each other are stored as differences, and read back as if they were not."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmos_cli.errors import Damaged, UsageError
from llmos_cli.formats import codec
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.names import parse_ref
from llmos_cli.progress import Silent
from llmos_cli.store import transaction
from llmos_cli.store.intake import statcache
from llmos_cli.store.intake.add import execute_add, plan_add
from llmos_cli.store.intake.ingest import put_path
from llmos_cli.store.local import Store
from llmos_cli.store.packs.deltas import CHAIN
from llmos_cli.store.packs.objects import read_file, read_manifest
from llmos_cli.store.packs.packs import list_packs, sync_index
from llmos_cli.store.refs.refs import read_ref
from llmos_cli.store.transaction import Commit

Model = dict[str, np.ndarray]


def bf16(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def weights(seed: int = 0, rows: int = 1100) -> Model:
    """An embedding of more than one chunk and two smaller tensors, as fp32."""
    random = np.random.default_rng(seed)
    shapes = {"embed": (rows, 2048), "layer.weight": (256, 256), "layer.bias": (256,)}
    return {name: random.normal(0, 0.02, shape).astype(np.float32) for name, shape in shapes.items()}


def trained(model: Model, seed: int) -> Model:
    random = np.random.default_rng(seed)
    return {name: (value + random.normal(0, 1e-4, value.shape)).astype(np.float32) for name, value in model.items()}


class Shelf:
    """Adds models as a user does, from files."""

    def __init__(self, store: Store, folder: Path, lab: Any) -> None:
        self.store, self.folder, self.lab = store, folder, lab

    def add(self, ref: str, model: Model, *, base: ObjectId | None = None, name: str = "model.safetensors") -> Commit:
        path = self.folder / name
        path.write_bytes(self.lab.safetensors({key: bf16(value) for key, value in model.items()}))
        return execute_add(self.store, plan_add([path]), parse_ref(ref), Silent(), base=base)

    def depths(self, ref: str) -> set[int]:
        entry = read_ref(self.store, parse_ref(ref))
        assert entry
        chunks = [chunk for file in read_manifest(self.store, entry.id).files for chunk in file.chunks]
        return {min(copy.entry.depth for copy in self.store.index.locate(chunk.id)) for chunk in chunks[1:]}

    def reads_back(self, ref: str, model: Model) -> bool:
        entry = read_ref(self.store, parse_ref(ref))
        assert entry
        (file,) = read_manifest(self.store, entry.id).files
        return read_file(self.store, file) == self.lab.safetensors({key: bf16(value) for key, value in model.items()})


@pytest.fixture
def shelf(store: Store, tmp_path: Path, lab: Any) -> Shelf:
    return Shelf(store, tmp_path, lab)


def test_the_next_version_of_a_model_is_stored_as_a_difference(shelf: Shelf) -> None:
    first, second = weights(), trained(weights(), 1)
    shelf.add("m", first)
    commit = shelf.add("m", second)
    assert commit.as_delta == 2 * sum(value.size for value in second.values()) - 2 * 256  # the bias is too small
    assert commit.stored < 0.35 * commit.size
    assert shelf.reads_back("m", second)
    assert shelf.reads_back("m:latest", second)


def test_a_fine_tune_under_another_name_finds_its_base(shelf: Shelf) -> None:
    shelf.add("unrelated", weights(7))
    shelf.add("base", weights())
    shelf.add("unrelated2", weights(8))
    commit = shelf.add("chat", trained(weights(), 1), name="renamed.safetensors")
    assert commit.stored < 0.35 * commit.size


def test_an_unrelated_model_of_the_same_shape_is_not_a_difference(shelf: Shelf) -> None:
    shelf.add("base", weights())
    commit = shelf.add("other", weights(7))
    assert commit.as_delta == 0
    assert shelf.depths("other") == {0}


def test_a_vocabulary_that_grew_rests_on_the_rows_in_common(shelf: Shelf) -> None:
    first = weights()
    grown = trained(first, 1)
    grown["embed"] = np.concatenate([grown["embed"], np.zeros((37, 2048), np.float32) + 0.1])
    shelf.add("base", first)
    commit = shelf.add("grown", grown)
    assert commit.stored < 0.4 * commit.size
    assert shelf.reads_back("grown", grown)


def test_a_fine_tune_with_other_small_tensors_in_other_files_finds_its_base(shelf: Shelf) -> None:
    shelf.add("base", weights())
    tuned = trained(weights(), 1)
    tuned["head.bias"] = tuned.pop("layer.bias")
    commit = shelf.add("tuned", tuned, name="model-00001-of-00001.safetensors")
    assert commit.stored < 0.35 * commit.size


def test_only_what_changed_takes_space(shelf: Shelf) -> None:
    first = weights()
    merged = dict(first)
    merged["layer.weight"] = first["layer.weight"] * np.float32(1.01)
    shelf.add("base", first)
    commit = shelf.add("merged", merged)
    assert commit.stored < 0.02 * commit.size


def test_chains_stay_short_and_read_back(shelf: Shelf) -> None:
    model = weights(rows=64)
    versions = []
    for step in range(CHAIN + 4):
        model = trained(model, step)
        versions.append(model)
        shelf.add("run", model)
        shelf.add(f"run:{step}", model)
    assert max(shelf.depths(f"run:{CHAIN + 3}")) <= CHAIN
    assert all(shelf.reads_back(f"run:{step}", model) for step, model in enumerate(versions))


def test_a_base_can_be_named(shelf: Shelf, store: Store) -> None:
    base = shelf.add("base", weights())
    other = {f"renamed.{name}": value for name, value in weights().items()}
    assert shelf.add("other", other).stored < 5000  # equal chunks need no base
    commit = shelf.add("chat", trained(weights(), 2), base=base.id)
    assert commit.as_delta > 0
    (shelf.folder / "notes.txt").write_text("no tensors")
    text = execute_add(store, plan_add([shelf.folder / "notes.txt"]), parse_ref("notes"), Silent())
    with pytest.raises(UsageError, match="no tensors"):
        shelf.add("chat", weights(3), base=text.id)


def test_gc_keeps_what_differences_rest_on(shelf: Shelf, lab: Any) -> None:
    first, second = weights(), trained(weights(), 1)
    shelf.add("base", first)
    shelf.add("chat", second)
    lab.remove("base")
    lab.gc()
    lab.gc()
    assert shelf.reads_back("chat", second)
    lab.sound()


def test_a_damaged_base_is_named_with_what_rests_on_it(shelf: Shelf, store: Store, lab: Any) -> None:
    shelf.add("base", weights())
    shelf.add("chat", trained(weights(), 1))
    base = read_ref(store, parse_ref("base"))
    assert base
    chunk = read_manifest(store, base.id).files[0].chunks[1]
    (location,) = store.index.locate(chunk.id)
    assert location.entry.codec == codec.PLANES
    lab.flip(*lab.payload_at(chunk.id))
    with pytest.raises(Damaged, match=f"rests on another: object {chunk.id.short}"):
        shelf.reads_back("chat", weights())
    hurt = {ref for problem in lab.fsck().problems for ref in problem.referrers}
    assert hurt >= {"base:latest", "chat:latest"}


def test_a_lost_base_is_no_reason_to_refuse_the_next_version(shelf: Shelf, store: Store) -> None:
    shelf.add("m", weights())
    for path in list_packs(store.packs).values():
        path.unlink()
    sync_index(store)
    (store.refs / "m").rename(store.refs / "lost")  # a ref that cannot be read at all, beside one whose value is lost
    shutil.copytree(store.refs / "lost", store.refs / "m")
    second = trained(weights(), 1)
    shelf.add("n", second)
    assert shelf.reads_back("n", second)


def test_an_untouched_file_is_not_read_again(
    shelf: Shelf, store: Store, lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shelf.folder / "data.bin"
    path.write_bytes(lab.noise(300_000))
    monkeypatch.setattr(statcache, "_SETTLED_SECONDS", -1.0)  # do not wait until the file counts as settled
    first = execute_add(store, plan_add([path]), parse_ref("d"), Silent())
    reads: list[Path] = []
    monkeypatch.setattr(transaction, "put_path", lambda *given: reads.append(given[2]) or put_path(*given))
    again = execute_add(store, plan_add([path]), parse_ref("d"), Silent())
    assert (again.id, again.reused, reads) == (first.id, 300_000, [])
    assert execute_add(store, plan_add([path]), parse_ref("d"), Silent(), rehash=True).id == first.id
    assert reads == [path]
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    assert execute_add(store, plan_add([path]), parse_ref("d"), Silent()).id != first.id
    assert lab.read("d")["data.bin"] == data


def test_a_file_written_to_a_moment_ago_is_read_again(shelf: Shelf, store: Store, lab: Any) -> None:
    path = shelf.folder / "data.bin"
    path.write_bytes(b"one")
    first = execute_add(store, plan_add([path]), parse_ref("d"), Silent())
    before = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert execute_add(store, plan_add([path]), parse_ref("d"), Silent()).id != first.id
    assert lab.read("d") == {"data.bin": b"two"}


def test_what_was_noted_of_a_file_counts_only_while_its_chunks_are_there(
    shelf: Shelf, store: Store, lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shelf.folder / "data.bin"
    path.write_bytes(lab.noise(300_000))
    monkeypatch.setattr(statcache, "_SETTLED_SECONDS", -1.0)
    execute_add(store, plan_add([path]), parse_ref("d"), Silent())
    lab.remove("d")
    lab.age_all(10**9)
    lab.gc()
    execute_add(store, plan_add([path]), parse_ref("e"), Silent())
    assert lab.read("e") == {"data.bin": lab.noise(300_000)}
    lab.sound()
