from typing import Any

from llmos_cli.formats.manifest import Recipe
from llmos_cli.store.local import Store
from llmos_cli.store.refs.lineage import ref_labels, trace


def test_a_lineage_goes_down_to_what_is_there(store: Store, lab: Any) -> None:
    data = lab.add("data", {"f": b"data"})
    base = lab.add("base", {"f": b"base"})
    model = lab.add("model", {"f": b"1"}, recipe=Recipe("train", inputs={"data": data.id, "model": base.id}))
    small = lab.add("small", {"f": b"2"}, recipe=Recipe("quantize", inputs={"model": model.id}))
    lab.pack_of(base.id).unlink()
    found = trace(store, small.id)
    assert set(found.objects) == {small.id, model.id, data.id, base.id}
    assert found.objects[model.id].labels == ("model:latest",)
    assert found.objects[model.id].inputs == {"data": data.id, "model": base.id}
    assert found.objects[base.id].manifest is None
    assert found.objects[base.id].problem


def test_earlier_values_have_a_name_too(store: Store, lab: Any) -> None:
    first, second = lab.add("x", {"f": b"1"}), lab.add("x", {"f": b"2"})
    assert ref_labels(store) == {second.id: ("x:latest",), first.id: ("x:latest~1",)}


def test_only_what_is_asked_for_is_read(store: Store, lab: Any) -> None:
    first, second = lab.add("x", {"f": b"1"}), lab.add("x", {"f": b"2"})
    other = lab.add("y", {"f": b"3"})
    every = ref_labels(store)
    assert ref_labels(store, [other.id]) == {other.id: every[other.id]}
    assert ref_labels(store, [first.id]) == {oid: every[oid] for oid in (first.id, second.id)}
    assert ref_labels(store, []) == {}
