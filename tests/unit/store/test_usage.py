from typing import Any

from llmos_cli.store.local import Store
from llmos_cli.store.packs import list_packs
from llmos_cli.store.usage import usage


def test_what_refs_share_is_counted_once_on_disk(store: Store, lab: Any) -> None:
    shared, own = lab.noise(100_000, 1), lab.noise(50_000, 2)
    lab.add("one", {"s": shared})
    lab.add("two", {"s": shared, "o": own})
    found = usage(store)
    one, two = found.refs
    assert (one.logical, two.logical, found.logical) == (100_000, 150_000, 250_000)
    assert 100_000 < one.physical < 102_000
    assert one.own < 2000
    assert 50_000 < two.own < 52_000
    assert found.physical == sum(path.stat().st_size for path in list_packs(store.packs).values())
    assert found.needed <= found.physical < 155_000
    assert (found.packs, found.trash) == (2, 0)


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
    assert waiting.other < 1000
    lab.age_all(1e6)
    lab.gc(grace=3600)
    assert usage(store).trash == 0


def test_an_empty_store_uses_nothing(store: Store) -> None:
    found = usage(store)
    assert (found.refs, found.logical, found.needed, found.physical, found.other) == ((), 0, 0, 0, 0)
