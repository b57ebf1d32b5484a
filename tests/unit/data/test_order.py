import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_cli.data.order import batch_indices, order_of, rows_of, sample_indices, share
from llmos_cli.errors import UsageError
from llmos_cli.formats.ids import object_id

DATA = object_id(b"a dataset")


@given(rows=st.integers(1, 3000), seed=st.integers(-(2**63), 2**63), epoch=st.integers(0, 2**40))
def test_an_epoch_visits_every_row_once(rows: int, seed: int, epoch: int) -> None:
    order = sample_indices(DATA, seed, epoch, rows, range(rows))
    assert np.array_equal(np.sort(order), np.arange(rows))


@given(rows=st.integers(1, 2**50), start=st.integers(0, 2**50), length=st.integers(0, 64))
def test_any_part_of_an_epoch_is_found_without_the_rest(rows: int, start: int, length: int) -> None:
    start %= rows
    slots = range(start, min(start + length, rows))
    part = sample_indices(DATA, 0, 0, rows, slots)
    one_by_one = [int(sample_indices(DATA, 0, 0, rows, range(slot, slot + 1))[0]) for slot in slots]
    assert part.tolist() == one_by_one
    assert all(0 <= row < rows for row in one_by_one)


@given(rows=st.integers(1, 40), batch=st.integers(1, 100), steps=st.integers(1, 5))
def test_batches_run_through_one_epoch_after_the_other(rows: int, batch: int, steps: int) -> None:
    seen = np.concatenate([batch_indices(DATA, 3, step, batch, rows) for step in range(steps)])
    epochs = [sample_indices(DATA, 3, epoch, rows, range(rows)) for epoch in range(len(seen) // rows + 1)]
    assert seen.tolist() == np.concatenate(epochs)[: len(seen)].tolist()


def test_batch_size_does_not_change_the_order() -> None:
    small = [batch_indices(DATA, 0, step, 4, 50) for step in range(24)]
    large = [batch_indices(DATA, 0, step, 12, 50) for step in range(8)]
    assert np.array_equal(np.concatenate(small), np.concatenate(large))


def test_seed_epoch_and_dataset_each_give_another_order() -> None:
    rows = range(1000)
    orders = [
        sample_indices(DATA, 0, 0, 1000, rows),
        sample_indices(DATA, 1, 0, 1000, rows),
        sample_indices(DATA, 0, 1, 1000, rows),
        sample_indices(object_id(b"another"), 0, 0, 1000, rows),
    ]
    for index, order in enumerate(orders):
        assert sum(np.array_equal(order, other) for other in orders) == 1, index


def test_every_order_of_few_rows_occurs() -> None:
    orders = {tuple(sample_indices(DATA, seed, 0, 4, range(4)).tolist()) for seed in range(500)}
    assert len(orders) == 24


def test_the_order_never_changes_between_versions() -> None:
    """These values are a promise: a run that is resumed by a later version must see the same rows."""
    assert batch_indices(DATA, 7, 0, 8, 10).tolist() == [5, 7, 3, 8, 1, 9, 0, 2]
    assert sample_indices(DATA, 0, 0, 10**12, range(5 * 10**11, 5 * 10**11 + 3)).tolist() == [
        486286733882,
        978055203065,
        744564567068,
    ]


@pytest.mark.parametrize(("rows", "batch", "step"), [(0, 1, 0), (5, 0, 0), (5, 1, -1)])
def test_what_has_no_batch_is_refused(rows: int, batch: int, step: int) -> None:
    with pytest.raises(ValueError, match="no batch"):
        batch_indices(DATA, 0, step, batch, rows)


@pytest.mark.parametrize("slots", [range(0, 11), range(-1, 3), range(0, 10, 2)])
def test_slots_outside_an_epoch_are_refused(slots: range) -> None:
    with pytest.raises(ValueError, match="not inside"):
        sample_indices(DATA, 0, 0, 10, slots)


@settings(max_examples=20)
@given(rows=st.integers(100, 5000))
def test_neighbours_are_scattered(rows: int) -> None:
    order = sample_indices(DATA, 0, 0, rows, range(rows)).astype(float)
    assert abs(np.corrcoef(order, np.arange(rows))[0, 1]) < 0.5
    assert np.mean(np.abs(np.diff(order))) > rows / 6


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_any_number_of_ranks_sees_the_same_rows_in_the_same_order(ranks: int, parts: int) -> None:
    order = order_of(rows_of(DATA, 1000, 64), 7)
    for step in (0, 5, 90):
        batch = order.batch(step, 24)
        shares = [share(batch, ranks=ranks, rank=rank, parts=parts) for rank in range(ranks)]
        assert np.concatenate([shares[rank][part] for part in range(parts) for rank in range(ranks)]).tolist() == (
            batch_indices(DATA, 7, step, 24, 1000).tolist()
        )


def test_ranks_that_do_not_divide_a_batch_are_refused_with_those_that_do() -> None:
    with pytest.raises(UsageError, match="a batch of 24 in 2 parts cannot be divided among 5 ranks") as error:
        share(np.arange(24), ranks=5, rank=0, parts=2)
    assert error.value.hint == "it can be divided among 1, 2, 3, 4, 6, 12"


def test_what_an_order_remembers_changes_nothing() -> None:
    forward, rows = order_of(rows_of(DATA, 700, 64), 1), rows_of(DATA, 700, 64)
    batches = [forward.batch(step, 100).tolist() for step in range(120)]
    backward = order_of(rows, 1)
    assert [backward.batch(step, 100).tolist() for step in reversed(range(120))] == batches[::-1]


def test_what_comes_is_told_before_it_is_asked_for_and_once() -> None:
    rows = rows_of(DATA, 3000, 8)
    alone, told = order_of(rows, 1), order_of(rows, 1)
    coming: list[np.ndarray] = []
    told.tell(coming.append)
    start = 500
    for step in range(start, start + 1000):
        batch = told.batch(step, 8)
        assert batch.tolist() == alone.batch(step, 8).tolist()
    slots = np.concatenate(coming).tolist()
    first = start * 8 // 3000 * 3000
    assert slots == np.concatenate([alone.batch(slot, 1) for slot in range(first, first + len(slots))]).tolist()
    assert first + len(slots) >= (start + 1000) * 8 + 3000
