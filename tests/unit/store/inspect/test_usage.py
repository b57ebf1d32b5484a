"""What `du` says adds up: row by row, over all rows, and to what lies on the disk."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from llmos_cli.formats.ids import object_id
from llmos_cli.formats.manifest import Manifest
from llmos_cli.formats.names import parse_ref
from llmos_cli.progress import Silent
from llmos_cli.store.inspect import usage as usage_module
from llmos_cli.store.inspect.usage import RefUsage, Usage, usage
from llmos_cli.store.intake.add import execute_add, plan_add
from llmos_cli.store.local import Store
from llmos_cli.store.packs.packs import list_packs
from llmos_cli.store.refs.refs import read_ref, update_ref
from llmos_cli.store.transaction import begin

RANDOM = np.random.default_rng(5)
WEIGHTS = (RANDOM.standard_normal(300_000) * 0.02).astype(np.float32)
TUNED = WEIGHTS + (RANDOM.standard_normal(300_000) * 1e-6).astype(np.float32)


def rows(store: Store) -> dict[str, RefUsage]:
    """The rows by ref, after a look at the sums."""
    found = usage(store)
    adds_up(store, found)
    return {str(row.ref): row for row in found.refs}


def adds_up(store: Store, found: Usage) -> None:
    for row in found.refs:
        saved = row.saved
        assert row.logical == row.stored + saved.dedup + saved.compression + saved.delta, row
        assert 0 <= row.own <= row.stored
    assert found.logical == sum(row.logical for row in found.refs)
    assert found.stored == sum(row.stored for row in found.refs)
    total = (found.saved.dedup, found.saved.compression, found.saved.delta)
    assert found.logical == found.stored + sum(total)
    packs = list_packs(store.packs).values()
    assert found.disk == sum(path.stat().st_size for path in packs) + found.adopted
    assert found.disk == found.stored + found.other + 128 * found.packs


def names(row: RefUsage) -> list[str]:
    return [str(ref) for ref in row.shared_with]


def test_what_refs_share_counts_for_the_older_one(store: Store, lab: Any) -> None:
    shared, own = lab.noise(100_000, 1), lab.noise(50_000, 2)
    lab.add("one", {"s": shared})
    lab.add("two", {"s": shared, "o": own, "again": own})
    one, two = rows(store).values()
    assert (one.logical, two.logical) == (100_000, 200_000)
    assert 100_000 < one.stored < 102_000
    assert one.own < 2000
    assert (one.saved.dedup, two.saved.dedup) == (0, 150_000)
    assert 50_000 < two.own == two.stored < 52_000
    assert (names(one), names(two)) == (["two:latest"], ["one:latest"])
    assert usage(store).other == 0


def test_a_second_name_costs_nothing_and_leaves_nothing_to_own(store: Store, lab: Any) -> None:
    commit = lab.add("zebra", {"f": lab.noise(10_000, 1)})
    update_ref(store, parse_ref("zebra:v1"), commit.id, expected=None, message="")
    old, new = rows(store).values()
    assert (old.own, new.own, new.stored, new.saved.dedup) == (0, 0, 0, 10_000)
    assert (old.sharers, new.sharers) == (1, 1)
    lab.remove("zebra:v1")
    alone = rows(store)["zebra:latest"]
    assert alone.own == alone.stored > 10_000
    assert (alone.shared_with, alone.sharers) == ((), 0)


def test_what_encoding_saves_is_told_from_what_a_base_saves(store: Store, lab: Any, tmp_path: Any) -> None:
    for name, array in (("base", WEIGHTS), ("tune", TUNED)):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(lab.safetensors({"w": array}))
        execute_add(store, plan_add([path]), parse_ref(name), Silent())
    base, tune = rows(store).values()
    size = WEIGHTS.nbytes
    assert 0.15 * size < base.saved.compression < 0.2 * size
    assert base.saved.delta == 0
    assert 0.3 * size < tune.saved.delta
    assert -2000 < tune.saved.compression < 100
    assert (names(base), names(tune)) == (["tune:latest"], ["base:latest"])
    assert base.own < 3000  # its chunk is the base of another
    lab.remove("base")
    alone = rows(store)["tune:latest"]
    assert alone.own == alone.stored > base.stored
    assert -size < alone.saved.delta < 0  # what it rests on counts against it
    assert usage(store).other < 3000


def test_sharers_are_the_closest_first_and_counted_where_they_are_many(
    store: Store, lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, weights = lab.noise(300, 1), lab.noise(50_000, 2)
    for name in ("a", "b", "c"):
        lab.add(name, {"config": config, "own": lab.noise(2000, ord(name))})
    lab.add("y", {"config": config, "w": weights})
    lab.add("z", {"config": config, "w": weights})
    found = rows(store)
    assert names(found["z:latest"]) == ["y:latest", "a:latest", "b:latest", "c:latest"]
    assert found["a:latest"].sharers == 4
    monkeypatch.setattr(usage_module, "SHARERS", 2)
    found = rows(store)
    assert names(found["z:latest"]) == ["y:latest", "a:latest"]
    assert {row.sharers for row in found.values()} == {4}


def test_the_account_of_many_refs_is_that_of_sets(store: Store, lab: Any) -> None:
    """Against the plain definition, in sets, for refs that share at random."""
    dice = np.random.default_rng(11)
    parts = [lab.noise(200 + 50 * number, number) for number in range(30)]
    for number in range(12):
        with begin(store, purpose="test", ref=parse_ref(f"m{number:02}")) as tx:
            chosen = dice.choice(30, 8, replace=False)
            entries = [tx.add_bytes(f"f{part:02}", parts[part]) for part in sorted(chosen)]
            tx.commit(Manifest("files", tuple(entries)), message="")
    found = rows(store)
    needs = {}
    for name in found:
        entry = read_ref(store, parse_ref(name))
        assert entry is not None
        needs[name] = {entry.id} | {object_id(data) for data in lab.read(name).values()}
    stored = {oid: store.index.locate(oid)[0].entry.stored_size for ids in needs.values() for oid in ids}
    seen: set[Any] = set()
    for name, row in found.items():
        others = set().union(*(ids for other, ids in needs.items() if other != name))
        assert row.own == sum(stored[oid] for oid in needs[name] - others)
        assert row.stored == sum(stored[oid] for oid in needs[name] - seen)
        assert set(names(row)) == {other for other, ids in needs.items() if other != name and ids & needs[name]}
        seen |= needs[name]


def test_what_nobody_needs_shows_until_it_is_gone(store: Store, lab: Any) -> None:
    lab.add("x", {"f": lab.noise(100_000, 1)})
    lab.add("y", {"f": lab.noise(10_000, 2)})
    lab.remove("x")
    before = usage(store)
    assert before.other > 100_000
    lab.age_all(1e6)
    lab.gc(grace=3600)
    waiting = usage(store)
    assert waiting.trash > 100_000
    assert waiting.other == 0
    lab.age_all(1e6)
    lab.gc(grace=3600)
    assert usage(store).trash == 0


def test_an_empty_store_uses_nothing(store: Store) -> None:
    found = usage(store)
    adds_up(store, found)
    assert (found.refs, found.logical, found.stored, found.disk, found.other) == ((), 0, 0, 0, 0)


def test_a_ref_that_cannot_be_read_is_named_and_the_rest_counted(store: Store, lab: Any) -> None:
    commit = lab.add("bad", {"f": lab.noise(1000, 1)})
    lab.add("good", {"f": lab.noise(1000, 2)})
    path, at = lab.payload_at(commit.id)
    lab.flip(path, at)
    found = usage(store)
    assert [str(row.ref) for row in found.refs] == ["good:latest"]
    ((ref, problem),) = found.problems
    assert str(ref) == "bad:latest"
    assert commit.id.short in problem


def test_objects_that_are_gone_are_counted_as_missing(store: Store, lab: Any) -> None:
    kept, gone = lab.noise(5000, 1), lab.noise(7000, 2)
    lab.add("kept", {"f": kept})
    lab.add("m", {"f": kept, "g": gone})
    with_all = {str(row.ref): row for row in usage(store).refs}["m:latest"]
    entry = store.index.locate(object_id(gone))[0]
    store.index.forget(object_id(gone), entry.pack)
    row = {str(row.ref): row for row in usage(store).refs}["m:latest"]
    assert (with_all.missing, row.missing) == (0, 1)
    assert row.saved == dataclasses.replace(with_all.saved, compression=row.saved.compression)
    assert row.stored < with_all.stored - 7000
