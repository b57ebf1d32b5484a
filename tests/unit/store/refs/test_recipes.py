from typing import Any

from llmos_cli.formats.ids import object_id
from llmos_cli.formats.manifest import Recipe, Source
from llmos_cli.store.fsck.fsck import reindex
from llmos_cli.store.local import Store
from llmos_cli.store.refs.recipes import find_made

RECIPE = Recipe("shard", {"size": 4}, sources=(Source("a.txt", 1, object_id(b"a")),), seed=1, tools={"llmos": "1"})


def test_what_was_made_is_found_by_exactly_its_recipe(store: Store, lab: Any) -> None:
    assert find_made(store, RECIPE) is None
    lab.add("plain", {"f": b"0"})
    commit = lab.add("x", {"f": b"1"}, recipe=RECIPE)
    assert find_made(store, RECIPE) == commit.id
    assert find_made(store, Recipe("shard", {"size": 5}, sources=RECIPE.sources, seed=1, tools={"llmos": "1"})) is None
    assert find_made(store, Recipe("shard")) is None
    lab.remove("x")
    assert find_made(store, RECIPE) == commit.id


def test_it_is_found_again_after_the_index_was_lost(store: Store, lab: Any) -> None:
    commit = lab.add("x", {"f": b"1"}, recipe=RECIPE)
    reindex(store)
    assert find_made(store, RECIPE) == commit.id
    store.index.drop_pack(next(iter(store.index.packs())))
    assert find_made(store, RECIPE) == commit.id


def test_what_is_no_longer_whole_is_not_found(store: Store, lab: Any) -> None:
    data = lab.noise(5000)
    lab.add("shared", {"f": data})
    lab.add("x", {"f": data, "g": b"own"}, recipe=RECIPE)
    assert find_made(store, RECIPE) is not None
    lab.pack_of(object_id(data)).unlink()
    assert find_made(store, RECIPE) is None


def test_what_gc_took_is_not_found(store: Store, lab: Any) -> None:
    lab.add("x", {"f": b"1"}, recipe=RECIPE)
    assert find_made(store, RECIPE) is not None
    lab.remove("x")
    lab.gc(grace=0)
    assert find_made(store, RECIPE) is None


def test_a_damaged_manifest_is_passed_over(store: Store, lab: Any) -> None:
    commit = lab.add("x", {"f": b"1"}, recipe=RECIPE)
    lab.flip(*lab.payload_at(commit.id))
    assert find_made(store, RECIPE) is None
    again = lab.add("y", {"f": b"1"}, recipe=RECIPE)
    assert again.id == commit.id
    assert find_made(store, RECIPE) == commit.id
