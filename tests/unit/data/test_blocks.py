"""Blocks read out of an array, which notes what was read."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from llmos_cli.data.blocks import Blocks, Readers
from llmos_cli.errors import Damaged

LENGTH = 4
COUNTS = np.array([40, 40, 7])


class Source:
    def __init__(self) -> None:
        self.rows = np.arange(COUNTS.sum() * LENGTH, dtype=np.uint16).reshape(-1, LENGTH)
        self.read: list[tuple[int, int]] = []
        self.broken = False
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, shard: int, row: int, out: np.ndarray) -> None:
        self.read.append((shard, row))
        assert self.gate.wait(10)
        if self.broken:
            raise Damaged("a pack is damaged")
        first = COUNTS[:shard].sum() + row
        out[:] = self.rows[first : first + len(out)]


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def readers() -> Iterator[Readers]:
    readers = Readers()
    yield readers
    readers.close()


def blocks_of(source: Source, readers: Readers, room: int) -> Blocks:
    """Blocks of eight rows; there are 5 + 5 + 1."""
    height = 8 * LENGTH * 2
    return Blocks(COUNTS, (LENGTH, np.dtype("<u2")), height, room * height, source, readers)


def test_whatever_the_room_rows_come_as_they_are(source: Source, readers: Readers) -> None:
    random = np.random.default_rng(0)
    for room in (1, 3, 11):
        blocks = blocks_of(source, readers, room)
        for size in (1, 5, 60):
            rows = random.integers(0, len(source.rows), size)
            assert np.array_equal(blocks.take(rows), source.rows[rows])
        assert blocks.held.nbytes == room * 8 * LENGTH * 2


def test_what_is_expected_is_read_once_and_in_that_order(source: Source, readers: Readers) -> None:
    blocks = blocks_of(source, readers, 4)
    blocks.expect(np.array([86, 41, 3, 42]))
    assert blocks.take(np.array([3, 86, 41]))[:, 0].tolist() == source.rows[[3, 86, 41], 0].tolist()
    assert sorted(source.read) == [(0, 0), (1, 0), (2, 0)]


def test_expecting_much_pushes_out_nothing_that_is_in_use(source: Source, readers: Readers) -> None:
    blocks = blocks_of(source, readers, 3)
    present = np.array([0, 8])
    blocks.take(present)
    blocks.expect(np.arange(16, 87))
    blocks.take(np.array([16]))
    source.read.clear()
    blocks.take(present)
    assert source.read == []


def test_what_was_used_before_makes_room_for_what_is_expected(source: Source, readers: Readers) -> None:
    blocks = blocks_of(source, readers, 2)
    blocks.take(np.array([0, 8]))
    for rows in ([16], [24]):  # the first call still protects what was read before it
        blocks.expect(np.array(rows))
    blocks.take(np.array([24]))
    source.read.clear()
    blocks.take(np.array([24]))
    assert source.read == []


def test_an_error_ahead_is_raised_by_who_needs_the_rows_and_not_for_ever(source: Source, readers: Readers) -> None:
    blocks = blocks_of(source, readers, 4)
    blocks.take(np.array([50]))
    source.broken = True
    blocks.expect(np.array([0]))
    assert blocks.take(np.array([50])).tolist() == [source.rows[50].tolist()]
    with pytest.raises(Damaged, match="a pack is damaged"):
        blocks.take(np.array([0]))
    source.broken = False
    assert blocks.take(np.array([0])).tolist() == [source.rows[0].tolist()]


def test_threads_that_want_the_same_rows_read_them_once(source: Source, readers: Readers) -> None:
    blocks = blocks_of(source, readers, 4)
    source.gate.clear()
    found: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: found.append(blocks.take(np.array([1, 2])))) for _ in range(4)]
    for thread in threads:
        thread.start()
    source.gate.set()
    for thread in threads:
        thread.join()
    assert [part.tolist() for part in found] == [source.rows[[1, 2]].tolist()] * 4
    assert source.read == [(0, 0)]


@pytest.mark.parametrize("row", [-1, 87])
def test_a_row_that_is_not_there_is_an_error(source: Source, readers: Readers, row: int) -> None:
    with pytest.raises(IndexError):
        blocks_of(source, readers, 4).take(np.array([0, row]))
