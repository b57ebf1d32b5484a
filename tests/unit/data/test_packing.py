import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos_cli.data.packing import best_fit


def slow_best_fit(lengths: list[int], room: int) -> list[int]:
    """How many tokens each row holds, by looking at every row for every piece."""
    rows: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in range(len(rows)) if rows[row] + length <= room]
        if fitting:
            rows[max(fitting, key=lambda row: rows[row])] += length
        else:
            rows.append(length)
    return rows


@given(lengths=st.lists(st.integers(1, 32), max_size=200))
def test_pieces_go_where_they_leave_the_least_room(lengths: list[int]) -> None:
    packed = best_fit(np.array(lengths, np.int64), 32)
    assert sorted(packed.filled.tolist()) == sorted(slow_best_fit(lengths, 32))
    held = np.zeros(len(packed.filled), np.int64)
    np.add.at(held, packed.row_of, np.array(lengths, np.int64))
    assert held.tolist() == packed.filled.tolist()
    assert (packed.filled <= 32).all()
    assert sorted(packed.order.tolist()) == list(range(len(lengths)))
    assert (np.diff(packed.row_of[packed.order]) >= 0).all()


def test_rows_may_be_long() -> None:
    lengths = np.random.default_rng(0).integers(1, 1 << 20, 500)
    packed = best_fit(lengths, 1 << 20)
    assert lengths.sum() / (len(packed.filled) << 20) > 0.94


@pytest.mark.parametrize("length", [0, 9])
def test_a_piece_that_fits_no_row_is_a_bug(length: int) -> None:
    with pytest.raises(ValueError, match="not of 1 to 8"):
        best_fit(np.array([length]), 8)
