from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.manifest import FileEntry, Manifest
from llmos_cli.formats.names import parse_ref
from llmos_cli.store.inspect.census import MISSING, Census, Layout, footprints, take_census
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import read_manifest
from llmos_cli.store.transaction import begin

Count = Callable[..., Census]


@pytest.fixture
def census(store: Store, lab: Any, tmp_path: Path) -> Count:
    def run(files: dict[str, Any]) -> Census:
        with begin(store, purpose="test", ref=parse_ref("x")) as tx:
            entries = []
            for path, data in files.items():
                (tmp_path / "file").write_bytes(data if isinstance(data, bytes) else lab.safetensors(data))
                entries.append(tx.add_path(path, tmp_path / "file"))
            oid = tx.commit(Manifest("files", tuple(entries)), message="x").id
        return take_census(store, read_manifest(store, oid))

    return run


def npy(array: Any) -> bytes:
    import io

    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def test_tensors_of_all_files_and_formats(census: Count) -> None:
    one = np.arange(6, dtype=np.float32)
    found = census({"a.safetensors": {"w": one}, "sub/b.safetensors": {"w": one}, "c.npy": npy(one), "d.txt": b"d"})
    assert [(tensor.file.path, tensor.info.dtype, tensor.size) for tensor in found.tensors] == [
        ("a.safetensors", "F32", 24),
        ("c.npy", "F32", 24),
        ("sub/b.safetensors", "F32", 24),
    ]
    assert set(found.files) == {"a.safetensors", "c.npy", "sub/b.safetensors"}
    assert found.problems == ()


def test_a_broken_file_is_named_and_the_rest_is_counted(store: Store, lab: Any) -> None:
    oid: ObjectId = lab.add(
        "x", {"a.safetensors": b"12345678 broken", "b.safetensors": lab.safetensors({"w": np.zeros(2, np.float32)})}
    ).id
    found = take_census(store, read_manifest(store, oid))
    assert [tensor.info.name for tensor in found.tensors] == ["w"]
    assert "a.safetensors" in found.problems[0]


def test_what_tensors_take(store: Store, census: Count, lab: Any) -> None:
    small = np.zeros(100_000, np.float32)
    noise = np.frombuffer(lab.noise(10_000_000), np.uint8)
    found = census({"m.safetensors": {"noise": noise, "small": small}})
    foots = dict(zip([tensor.info.name for tensor in found.tensors], footprints(store, found.tensors), strict=True))
    assert foots["noise"].codecs == {"raw": 10_000_000}
    assert 10_000_000 < foots["noise"].stored < 10_010_000
    assert sum(foots["small"].codecs.values()) == 400_000
    assert foots["small"].stored < 10_000


def test_a_chunk_that_holds_other_bytes_too_counts_by_its_share(store: Store, lab: Any) -> None:
    pair = {name: np.frombuffer(lab.noise(40_000, seed), np.uint8) for seed, name in enumerate("ab")}
    oid: ObjectId = lab.add("x", {"m.safetensors": lab.safetensors(pair)}).id
    a, b = footprints(store, take_census(store, read_manifest(store, oid)).tensors)
    assert a.stored == b.stored
    assert a.stored == pytest.approx(40_000, rel=0.01)


def test_a_chunk_that_is_not_in_the_store(store: Store, census: Count, lab: Any) -> None:
    found = census({"m.safetensors": {"w": np.arange(100, dtype=np.float32)}})
    for path in lab.packs():
        path.unlink()
    store.index.reset()
    (foot,) = footprints(store, found.tensors)
    assert (foot.stored, foot.codecs) == (0, {MISSING: 400})


def test_layout_of_any_range(census: Count) -> None:
    found = census({"m.safetensors": {"w": np.zeros(3_000_000, np.float32)}})
    entry: FileEntry = found.tensors[0].file
    layout = Layout(entry)
    for start, end in [(0, entry.size), (5, 6), (entry.size, entry.size), (1, entry.size - 1)]:
        runs = list(layout.runs(start, end))
        assert sum(run.size for run in runs) == end - start
    assert [run.id for run in layout.runs(0, entry.size)] == [chunk.id for chunk in entry.chunks]
