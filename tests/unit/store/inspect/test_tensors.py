import json
from typing import Any

import numpy as np
import pytest

from llmos_cli.errors import Damaged, NotFound, Unsafe
from llmos_cli.formats.names import RefName
from llmos_cli.store.inspect.tensors import tensor_table
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import open_file, read_manifest
from llmos_cli.store.refs.refs import read_ref

W = {"w": np.arange(12, dtype=np.float32).reshape(3, 4)}
V = {"v": np.arange(5, dtype=np.int64)}


def table(store: Store, lab: Any, files: dict[str, bytes], folder: str = "") -> Any:
    lab.add("x", files)
    entry = read_ref(store, RefName("x"))
    assert entry is not None
    return tensor_table(store, read_manifest(store, entry.id), folder)


def index(**weight_map: str) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": weight_map}).encode()


def test_one_file(store: Store, lab: Any) -> None:
    found = table(store, lab, {"model.safetensors": lab.safetensors(W | V), "config.json": b"{}"})
    assert set(found) == {"w", "v"}
    entry, info = found["w"]
    assert (info.dtype, info.shape) == ("F32", (3, 4))
    assert open_file(store, entry).read(info.start, info.end) == W["w"].tobytes()


def test_shards_with_an_index_and_a_folder(store: Store, lab: Any) -> None:
    files = {
        "model-1.safetensors": lab.safetensors(W),
        "model-2.safetensors": lab.safetensors(V),
        "leftover.safetensors": lab.safetensors({"old": V["v"]}),
        "model.safetensors.index.json": index(w="model-1.safetensors", v="model-2.safetensors"),
        "training/state.safetensors": lab.safetensors({"moment": V["v"]}),
    }
    assert set(table(store, lab, files)) == {"w", "v"}
    assert set(table(store, lab, files, "training")) == {"moment"}


@pytest.mark.parametrize(
    ("weight_map", "error"),
    [
        ({"w": "model-1.safetensors", "v": "model-9.safetensors"}, Damaged),
        ({"w": "model-2.safetensors", "v": "model-2.safetensors"}, Damaged),
        ({"w": "model-1.safetensors", "v": "model-1.safetensors"}, Damaged),
        ({"w": "model-1.safetensors", "v": "model-2.safetensors", "u": "model-2.safetensors"}, Damaged),
        ({"w": "../model-1.safetensors"}, Unsafe),
        ({"w": "model-1.bin"}, Unsafe),
    ],
)
def test_an_index_that_does_not_fit_its_shards(
    store: Store, lab: Any, weight_map: dict[str, str], error: type[Exception]
) -> None:
    files = {
        "model-1.safetensors": lab.safetensors(W),
        "model-2.safetensors": lab.safetensors(V),
        "model.safetensors.index.json": index(**weight_map),
    }
    with pytest.raises(error):
        table(store, lab, files)


def test_a_name_in_two_files_and_no_tensors_at_all(store: Store, lab: Any) -> None:
    with pytest.raises(Damaged, match="two files"):
        table(store, lab, {"a.safetensors": lab.safetensors(W), "b.safetensors": lab.safetensors(W)})
    with pytest.raises(NotFound, match="no safetensors"):
        table(store, lab, {"config.json": b"{}"})
    with pytest.raises(NotFound, match="training"):
        table(store, lab, {"model.safetensors": lab.safetensors(W)}, "training")


def test_a_stored_file_that_is_no_safetensors_file(store: Store, lab: Any) -> None:
    """It cannot come in by `add`, but it can by a pull."""
    with pytest.raises(Damaged, match=r"model\.safetensors"):
        table(store, lab, {"model.safetensors": b"12345678 not really"})
