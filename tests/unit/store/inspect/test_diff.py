"""Two objects compared: which tensors and files are equal, and what differs in the others."""

import json
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmos_cli.errors import Damaged
from llmos_cli.formats import limits
from llmos_cli.formats.ids import ObjectId, object_id
from llmos_cli.formats.manifest import Manifest, Recipe
from llmos_cli.formats.names import parse_ref
from llmos_cli.progress import Silent
from llmos_cli.store.inspect.changes import ABSENT, Lines
from llmos_cli.store.inspect.diff import Comparison, compare
from llmos_cli.store.inspect.tensordiff import TensorDiff
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import read_manifest
from llmos_cli.store.transaction import begin

RNG = np.random.default_rng(0)
W = {name: RNG.standard_normal((8, 16)).astype(np.float32) for name in "abcd"}

Add = Callable[..., ObjectId]


@pytest.fixture
def add(store: Store, lab: Any, tmp_path: Path) -> Add:
    """Store files under a name as `llmos add` does: tensors are cut at their boundaries."""

    def run(name: str, files: Mapping[str, Any], *, recipe: Recipe | None = None, **meta: Any) -> ObjectId:
        with begin(store, purpose="test", ref=parse_ref(name)) as tx:
            entries = []
            for path, data in files.items():
                plain = tmp_path / "file"
                plain.write_bytes(data if isinstance(data, bytes) else lab.safetensors(data))
                entries.append(tx.add_path(path, plain))
            return tx.commit(Manifest("model", tuple(entries), meta, recipe), message=name).id

    return run


@pytest.fixture
def diff(store: Store) -> Callable[[ObjectId, ObjectId], Comparison]:
    return lambda old, new: compare(store, old, new, Silent())


def tensors(found: Comparison) -> dict[str, TensorDiff]:
    return {tensor.name: tensor for tensor in found.tensors.tensors}


def statuses(found: Comparison) -> dict[str, str]:
    return {tensor.name: tensor.status for tensor in found.tensors.tensors}


def index(**weight_map: str) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": weight_map}).encode()


def test_tensors_are_equal_changed_added_or_removed(add: Add, diff: Any) -> None:
    moved = W["b"] + np.float32(0.5)
    found = diff(
        add("x", {"model.safetensors": {"a": W["a"], "b": W["b"], "c": W["c"]}}),
        add("y", {"model.safetensors": {"a": W["a"], "b": moved, "d": W["d"]}}),
    )
    assert statuses(found) == {"a": "equal", "b": "changed", "c": "removed", "d": "added"}
    distance = tensors(found)["b"].distance
    assert (distance.compared, distance.changed) == (128, 128)
    assert distance.largest == pytest.approx(0.5, abs=1e-6)
    assert distance.relative == pytest.approx(np.linalg.norm(moved - W["b"]) / np.linalg.norm(W["b"]), rel=1e-6)
    assert (found.tensors.words, found.tensors.changed) == (256, 128)
    assert found.tensors.overall.relative == distance.relative
    assert (found.files[0].status, found.files[0].has_tensors) == ("changed", True)


def test_files_laid_out_otherwise_hold_equal_tensors(add: Add, diff: Any) -> None:
    shards = {
        "model-1.safetensors": {"c": W["c"], "a": W["a"]},
        "model-2.safetensors": {"b": W["b"]},
        "model.safetensors.index.json": index(
            a="model-1.safetensors", b="model-2.safetensors", c="model-1.safetensors"
        ),
    }
    found = diff(add("x", {"model.safetensors": {name: W[name] for name in "abc"}}), add("y", shards))
    assert statuses(found) == dict.fromkeys("abc", "equal")
    assert {file.path: file.status for file in found.files} == {
        "model.safetensors": "removed",
        **dict.fromkeys(shards, "added"),
    }
    assert found.tensors.changed == 0
    assert found.tensors.overall is None


def test_what_is_equal_is_not_read(store: Store, add: Add, diff: Any, lab: Any) -> None:
    x = add("x", {"model.safetensors": {"a": W["a"], "b": W["b"]}})
    y = add("y", {"model.safetensors": {"a": W["a"], "b": W["b"] * 2}})
    path, offset = lab.payload_at(object_id(W["a"].tobytes()))
    lab.flip(path, offset)
    assert statuses(diff(x, y)) == {"a": "equal", "b": "changed"}
    path, offset = lab.payload_at(object_id(W["b"].tobytes()))
    lab.flip(path, offset)
    with pytest.raises(Damaged, match=object_id(W["b"].tobytes()).short):
        diff(x, y)


def test_tensors_cut_at_other_places_are_compared_by_their_bytes(lab: Any, add: Add, diff: Any) -> None:
    """As `add_bytes` cuts them, by content, and not at their boundaries."""
    new = {"a": W["a"], "b": W["b"] * 2}
    found = diff(
        lab.add("x", {"model.safetensors": lab.safetensors({"a": W["a"], "b": W["b"]})}).id,
        add("y", {"model.safetensors": new}),
    )
    assert statuses(found) == {"a": "equal", "b": "changed"}
    assert tensors(found)["a"].distance is None
    same = diff(
        lab.add("x", {"model.safetensors": lab.safetensors(new), "t": b"t"}).id, add("y", {"model.safetensors": new})
    )
    assert {file.path: file.status for file in same.files} == {"model.safetensors": "equal", "t": "removed"}


def test_large_tensors_are_compared_piece_by_piece(add: Add, diff: Any) -> None:
    old = np.arange(3 * limits.CHUNK_BYTES // 4 + 5, dtype=np.float32)
    new = old.copy()
    new[-1] += 64
    new[limits.CHUNK_BYTES // 4] += 1
    x, y = add("x", {"m.safetensors": {"w": old}}), add("y", {"m.safetensors": {"w": new}})
    tracemalloc.start()
    try:
        distance = tensors(diff(x, y))["w"].distance
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (distance.compared, distance.changed, distance.largest) == (len(old), 2, 64)
    wide = old.astype(np.float64)
    assert distance.relative == pytest.approx(np.sqrt(64**2 + 1) / np.linalg.norm(wide))
    assert peak < 80 * limits.MiB


def test_another_dtype_or_shape(add: Add, diff: Any) -> None:
    half = W["a"].astype(np.float16)
    grown = np.concatenate([W["b"], W["d"]])
    found = tensors(
        diff(
            add("x", {"m.safetensors": {"a": half, "b": W["b"], "c": W["c"], "d": W["d"]}}),
            add(
                "y",
                {"m.safetensors": {"a": half.astype(np.float32), "b": grown, "c": W["c"].T.copy(), "d": np.int32([1])}},
            ),
        )
    )
    assert {tensor.status for tensor in found.values()} == {"changed"}
    assert (found["a"].distance.changed, found["a"].distance.bits) == (0, None)
    assert (found["b"].distance.compared, found["b"].distance.changed) == (128, 0)
    assert found["c"].distance.compared == 128
    assert found["d"].distance is None


def test_a_name_in_several_files_is_compared_file_by_file(add: Add, diff: Any) -> None:
    x = {"t-1.safetensors": {"tokens": W["a"]}, "t-2.safetensors": {"tokens": W["b"]}, "z.safetensors": {"z": W["c"]}}
    found = diff(
        add("x", x), add("y", x | {"t-2.safetensors": {"tokens": W["d"]}, "t-3.safetensors": {"tokens": W["b"]}})
    )
    assert statuses(found) == {
        "t-1.safetensors: tokens": "equal",
        "t-2.safetensors: tokens": "changed",
        "t-3.safetensors: tokens": "added",
        "z": "equal",
    }


def test_folders_are_told_apart(add: Add, diff: Any) -> None:
    found = diff(
        add("x", {"model.safetensors": {"a": W["a"]}, "training/state.safetensors": {"a": W["b"]}}),
        add("y", {"model.safetensors": {"a": W["a"]}, "training/state.safetensors": {"a": W["c"]}}),
    )
    assert statuses(found) == {"a": "equal", "training/a": "changed"}


def test_fp8_has_bits_and_no_values(add: Add, diff: Any) -> None:
    def fp8(data: bytes) -> bytes:
        from llmos_cli.formats.safetensors import encode_header

        return encode_header([("w", "F8_E5M2", (4,))], {}) + data

    found = diff(add("x", {"m.safetensors": fp8(b"\0\0\0\0")}), add("y", {"m.safetensors": fp8(b"\0\0\0\3")}))
    distance = tensors(found)["w"].distance
    assert (distance.changed, distance.bits, distance.largest) == (1, 0.5, None)
    assert found.tensors.overall is None


def test_json_and_text_files(add: Add, diff: Any) -> None:
    found = diff(
        add("x", {"config.json": b'{"n": 1, "m": 2}', "a.txt": b"1\n2\n", "same": b"s", "b.bin": b"\0", "gone": b"g"}),
        add("y", {"config.json": b'{"n": 1, "k": 3}', "a.txt": b"1\n3\n4\n", "same": b"s", "b.bin": b"\1", "new": b""}),
    )
    files = {file.path: file for file in found.files}
    assert {path: file.status for path, file in files.items()} == {
        "config.json": "changed",
        "a.txt": "changed",
        "same": "equal",
        "b.bin": "changed",
        "gone": "removed",
        "new": "added",
    }
    values = {change.path: (change.old, change.new) for change in files["config.json"].values.items}
    assert values == {"m": (2, ABSENT), "k": (ABSENT, 3)}
    assert files["a.txt"].lines == Lines(2, 1)
    assert (files["b.bin"].values, files["b.bin"].lines) == (None, None)
    assert (files["gone"].old, files["gone"].new, files["new"].new) == (1, None, 0)


def test_a_json_file_that_is_broken_is_a_text(add: Add, diff: Any) -> None:
    (file,) = diff(add("x", {"c.json": b"{"}), add("y", {"c.json": b"{\n}"})).files
    assert (file.values, file.lines) == (None, Lines(1, 0))


def test_meta_and_recipe(add: Add, diff: Any) -> None:
    x = add("x", {}, recipe=Recipe("train", {"lr": 0.1, "steps": 5}, seed=1), loss=2.5)
    y = add("y", {}, recipe=Recipe("train", {"lr": 0.2, "steps": 5}, {"data": x}, seed=1), loss=2.0)
    found = diff(x, y)
    assert [(change.path, change.old, change.new) for change in found.meta.items] == [("loss", 2.5, 2.0)]
    recipe = {change.path: (change.old, change.new) for change in found.recipe.items}
    assert recipe == {"params.lr": (0.1, 0.2), "inputs.data": (ABSENT, str(x))}
    unmade = diff(add("z", {}), y)
    assert ("seed", ABSENT, 1) in [(change.path, change.old, change.new) for change in unmade.recipe.items]


def test_an_object_and_itself(store: Store, add: Add, diff: Any) -> None:
    x = add("x", {"model.safetensors": {"a": W["a"]}, "config.json": b"{}"})
    found = diff(x, x)
    assert {tensor.status for tensor in found.tensors.tensors} == {"equal"}
    assert {file.status for file in found.files} == {"equal"}
    assert found.shared == read_manifest(store, x).size


def test_a_file_whose_tensors_cannot_be_believed_is_compared_as_a_file(lab: Any, diff: Any) -> None:
    header = json.dumps({"\x1b[31m": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    evil = len(header).to_bytes(8, "little") + header + b"x"
    found = diff(lab.add("x", {"m.safetensors": evil}).id, lab.add("y", {"m.safetensors": evil[:-1] + b"y"}).id)
    assert found.tensors.tensors == ()
    assert [file.status for file in found.files] == ["changed"]
    (problem,) = found.problems
    assert "\x1b" not in problem
