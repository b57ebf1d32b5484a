"""What keeps an object, down to the last link, or when it may go."""

import time
from typing import Any

import numpy as np
import pytest

from llmos_cli.errors import NotFound, UsageError
from llmos_cli.formats.ids import object_id, parse_id
from llmos_cli.formats.manifest import Manifest
from llmos_cli.formats.names import RefName
from llmos_cli.store.gc.why import MOST, explain
from llmos_cli.store.leases import hold
from llmos_cli.store.local import Store
from llmos_cli.store.transaction import Tensor, begin

DAY = 86400.0


def test_a_chunk_is_kept_by_every_ref_that_names_it(store: Store, lab: Any) -> None:
    shared = lab.noise(9000)
    one = lab.add("one", {"a/f": shared})
    two = lab.add("two", {"other": b"1", "z": shared})
    found = explain(store, str(object_id(shared))[:10])
    assert (found.what, found.id, found.count) == ("chunk", object_id(shared), 2)
    assert found.chains == (
        ("ref one:latest", f"manifest @{one.id.short}", "file a/f", f"chunk {object_id(shared).short}"),
        ("ref two:latest", f"manifest @{two.id.short}", "file z", f"chunk {object_id(shared).short}"),
    )
    (place,) = found.places
    assert (place.fate, place.after, place.codec) == ("needed", None, "raw")


def test_a_ref_an_id_and_a_pack_can_be_asked_for(store: Store, lab: Any) -> None:
    commit = lab.add("x", {"f": lab.noise(9000)})
    lab.add("x", {"f": b"2"})
    assert explain(store, "x~1").id == commit.id == explain(store, f"@{commit.id.short}").id
    assert explain(store, "x~1").what == "manifest"
    assert explain(store, "x~1").chains == (("log of x:latest", f"manifest @{commit.id.short}"),)
    pack = parse_id(lab.pack_of(commit.id).stem)
    found = explain(store, str(pack))
    assert (found.what, found.id, found.count) == ("pack", pack, 2)
    assert [(place.pack, place.stored) for place in found.places] == [(pack, lab.pack_of(commit.id).stat().st_size)]


def test_a_running_command_is_named(store: Store, lab: Any) -> None:
    commit = lab.add("x", {"f": b"1"})
    lab.remove("x")
    with hold(store, "serving", [commit.id]):
        ((why, _),) = explain(store, f"@{commit.id.short}").chains
        assert why.startswith("lease of process ")
    assert not explain(store, f"@{commit.id.short}").is_needed


def test_a_base_is_kept_by_what_rests_on_it(store: Store, lab: Any) -> None:
    values = np.random.default_rng(0).normal(0, 0.02, 4000).astype(np.float32)
    chunks = []
    for step in range(2):
        values[step] += 1
        data = values.tobytes()
        with begin(store, purpose="test", ref=RefName("run")) as tx:
            entry = tx.add_tensors("model.safetensors", [Tensor("w", "F32", (4000,), lambda data=data: data)])
            tx.commit(Manifest("model", (entry,)), message="")
        chunks.append(object_id(data))
    base, delta = chunks
    named = explain(store, str(delta)).chains[0]
    assert (*named, f"base {base.short}") in explain(store, str(base)).chains
    (place,) = explain(store, str(delta)).places
    assert (place.codec, place.base) == ("delta", base)


def test_what_nothing_needs_and_when_it_may_go(store: Store, lab: Any) -> None:
    data = lab.noise(9000)
    lab.add("x", {"f": data})
    lab.remove("x")
    written = lab.packs()[0].stat().st_mtime
    found = explain(store, str(object_id(data)))
    assert (found.count, found.is_needed, found.chains) == (0, False, ())
    (place,) = found.places
    assert (place.in_trash, place.fate) == (False, "to the trash with the next gc")
    assert place.after == pytest.approx(written + DAY)
    lab.age_all(2 * DAY)
    lab.gc(grace=None)
    (place,) = explain(store, str(object_id(data))).places
    assert (place.in_trash, place.fate) == (True, "unlinked by a later gc")
    assert place.after == pytest.approx(time.time() + DAY, abs=60)
    lab.gc()
    with pytest.raises(NotFound):
        explain(store, str(object_id(data)))


@pytest.mark.parametrize(("dead", "fate"), [(90_000, "left behind when"), (9_000, "stays while most")])
def test_what_lies_among_living(store: Store, lab: Any, dead: int, fate: str) -> None:
    keep, drop = lab.noise(40_000, 1), lab.noise(dead, 2)
    lab.add("both", {"keep": keep, "drop": drop})
    lab.add("kept", {"keep": keep})
    lab.remove("both")
    (place,) = explain(store, str(object_id(drop))).places
    assert place.fate.startswith(fate)


def test_many_chains_are_counted_and_some_shown(store: Store, lab: Any) -> None:
    for number in range(MOST + 3):
        lab.add(f"x{number}", {"f": b"1"})
    found = explain(store, str(object_id(b"1")))
    assert (found.count, len(found.chains)) == (MOST + 3, MOST)


def test_what_cannot_be_meant(store: Store, lab: Any) -> None:
    for number in range(1, 300):
        lab.add("x", {"f": b"%d" % number})
    with pytest.raises(NotFound):
        explain(store, "nothing")
    with pytest.raises(NotFound):
        explain(store, "@" + "0" * 64)
    with pytest.raises(UsageError):
        explain(store, "@xyz")
    prefixes = [str(oid)[:4] for oid in store.index.starting_with("")]
    twice = [prefix for prefix in prefixes if prefixes.count(prefix) > 1]
    if twice:
        with pytest.raises(UsageError, match="ambiguous"):
            explain(store, f"@{twice[0]}")
