import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from llmos_cli.formats.ids import ObjectId, object_id
from llmos_cli.formats.pack import Entry
from llmos_cli.store.local import Store, init_store, open_store
from llmos_cli.store.packs.cached import FOLDER, Cached

KIB = 1024


class Far:
    """A place with objects of one KiB, which counts how often it is read."""

    label = "far"

    def __init__(self, number: int) -> None:
        plain = [at.to_bytes(4, "little") * (KIB // 4) for at in range(number)]
        self.objects = {object_id(data): data for data in plain}
        self.reads = 0

    def entries(self, oid: ObjectId) -> Sequence[Entry]:
        return [Entry(oid, ObjectId(bytes(32)), 0, KIB, KIB, 1, 0, 0)] if oid in self.objects else []

    def read(self, oid: ObjectId) -> tuple[Entry, memoryview] | None:
        self.reads += 1
        return (self.entries(oid)[0], memoryview(self.objects[oid])) if oid in self.objects else None


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    init_store(tmp_path / ".llmos")
    with open_store(tmp_path / ".llmos") as opened:
        yield opened


def read_all(cache: Cached, far: Far) -> int:
    """Read everything; returns how many reads came through."""
    before = far.reads
    for oid, data in far.objects.items():
        found = cache.read(oid)
        assert found is not None
        assert found[1] == data
    return far.reads - before


def size(store: Store) -> int:
    return sum(path.stat().st_size for path in (store.root / FOLDER).rglob("*") if path.is_file())


def test_what_fits_is_read_once_also_by_the_next_process(store: Store) -> None:
    far = Far(100)
    assert read_all(Cached(store, far, 200 * KIB), far) == 100
    assert read_all(Cached(store, far, 200 * KIB), far) == 0


def test_a_dataset_larger_than_the_cache_finds_its_share_in_every_epoch(store: Store) -> None:
    far = Far(400)
    cache = Cached(store, far, 200 * KIB)
    read_all(cache, far)
    for _ in range(3):
        assert read_all(cache, far) < 240
        assert size(store) <= 200 * KIB


def test_bytes_that_are_not_what_they_should_be_are_fetched_again(store: Store) -> None:
    far = Far(3)
    cache = Cached(store, far, 10 * KIB)
    read_all(cache, far)
    flipped, cut, _ = sorted(path for path in (store.root / FOLDER).rglob("*") if path.is_file())
    flipped.write_bytes(b"\x55" + flipped.read_bytes()[1:])
    cut.write_bytes(cut.read_bytes()[:100])
    assert read_all(cache, far) == 2
    assert read_all(cache, far) == 0


def test_what_nobody_has_read_for_long_goes_first(store: Store) -> None:
    old, new = Far(150), Far(300)
    for oid in list(new.objects)[:150]:
        del new.objects[oid]
    read_all(Cached(store, old, 200 * KIB), old)
    for path in (store.root / FOLDER).glob("??/*"):
        os.utime(path, (0, 0))
    cache = Cached(store, new, 200 * KIB)
    read_all(cache, new)
    assert read_all(cache, new) < 15


def test_no_room_at_all_is_no_error(store: Store) -> None:
    far = Far(5)
    cache = Cached(store, far, 0)
    assert read_all(cache, far) == read_all(cache, far) == 5
    assert size(store) == 0


def test_a_cache_that_cannot_be_written_costs_time_alone(store: Store) -> None:
    far = Far(3)
    (store.root / "cache").mkdir(exist_ok=True)
    (store.root / FOLDER).write_bytes(b"in the way")
    cache = Cached(store, far, 10 * KIB)
    assert read_all(cache, far) == read_all(cache, far) == 3


def test_what_is_not_there_is_not_there(store: Store) -> None:
    assert Cached(store, Far(1), 10 * KIB).read(object_id(b"another")) is None
