import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos_cli.store.inspect.changes import ABSENT, Lines, json_changes, line_changes, read_json

VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(-2, 2).map(abs) | st.text("ab. \x1b", max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("ab.", max_size=2), inner, max_size=4),
    max_leaves=12,
)


def paths(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    found = json_changes(old, new, keep=100)
    assert found.count == len(found.items)
    return {change.path: (change.old, change.new) for change in found.items}


def test_values_in_tables_are_named_by_their_path() -> None:
    old = {"model": {"size": 1, "act": "gelu"}, "gone": None}
    new = {"model": {"size": 2, "act": "gelu"}, "fresh": {"a": 1}}
    assert paths(old, new) == {"model.size": (1, 2), "gone": (None, ABSENT), "fresh": (ABSENT, {"a": 1})}
    assert [change.status for change in json_changes(old, new, keep=9).items] == ["changed", "removed", "added"]


def test_keys_that_are_no_words_are_quoted() -> None:
    assert set(paths({"a.b": {"Ġthe": 1}}, {"a.b": {"Ġthe": 2}})) == {'["a.b"]["Ġthe"]'}


def test_lists_are_compared_from_both_ends() -> None:
    assert paths([1, 2, 3], [1, 9, 3]) == {"[1]": (2, 9)}
    assert paths({"l": [1, 2, 3]}, {"l": [1, 2, 8, 9, 3]}) == {"l[2:4]": (ABSENT, [8, 9])}
    assert paths([1, 2, 3], [2, 3]) == {"[0]": (1, ABSENT)}
    assert paths([[1], [2]], [[1], [0], [2]]) == {"[1]": (ABSENT, [0])}
    assert paths([1, 1, 1], [1]) == {"[1:3]": ([1, 1], ABSENT)}
    assert paths([0, 1, 2, 9], [0, 5, 9]) == {"[1:3]": ([1, 2], 5)}


def test_numbers_and_booleans_are_different_values() -> None:
    assert set(paths([1, 1, 0], [1.0, True, False])) == {"[0]", "[1]", "[2]"}
    assert paths(1, [1]) == {"": (1, [1])}
    assert paths([[1]], [[1], [True]]) == {"[1]": (ABSENT, [True])}


def test_all_changes_are_counted_but_few_kept() -> None:
    found = json_changes(list(range(1000)), list(range(1, 1001)), keep=3)
    assert (found.count, [change.path for change in found.items]) == (1000, ["[0]", "[1]", "[2]"])


@given(VALUES, VALUES)
def test_values_have_no_changes_if_and_only_if_they_are_the_same_json(old: Any, new: Any) -> None:
    same = json.dumps(old, sort_keys=True) == json.dumps(new, sort_keys=True)
    assert (json_changes(old, new, keep=1).count == 0) == same
    assert json_changes(old, old, keep=1).count == 0


def test_nesting_costs_no_stack() -> None:
    old: Any = 1
    new: Any = 2
    for _ in range(20_000):
        old, new = [old], [new]
    assert json_changes(old, new, keep=1).count == 1


@pytest.mark.parametrize("data", [b"{", b"\xff\xfe", b"[" * 100_000, b"[" + b"1," * 5_000_000 + b"1]"])
def test_what_is_no_json_or_too_much_of_it_is_absent(data: bytes) -> None:
    assert read_json(data) is ABSENT


def test_json_as_people_write_it() -> None:
    assert read_json(b'{"limit": [0.0, Infinity]}') == {"limit": [0.0, float("inf")]}
    nan = read_json(b"[NaN]")
    assert json_changes(nan, read_json(b"[NaN]"), keep=1).count == 0


def test_lines() -> None:
    assert line_changes(b"a\nb\nc\n", b"a\nx\nc\nd\n") == Lines(2, 1)
    assert line_changes(b"a\nb\n", b"b\na\n") == Lines(0, 0)
    assert line_changes(b"a\n" * 3, b"a\n") == Lines(0, 2)
    assert line_changes(b"a", b"\xff") is None
    assert line_changes(b"a\0", b"b") is None
