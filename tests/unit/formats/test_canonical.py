"""Canonical JSON: one form, and no form that costs more than its limits."""

import tracemalloc

import pytest

from llmos_cli.errors import Damaged
from llmos_cli.formats import canonical, limits


def test_the_form_is_fixed() -> None:
    value = {"b": [1, -0.0, 1.5, 1e22, True, None], "a": 'é\n"\\\x7f\u2028', "B": {}, "ä": []}
    assert canonical.encode(value) == (
        '{"B":{},"a":"é\\n\\"\\\\\x7f\u2028","b":[1,-0.0,1.5,1e+22,true,null],"ä":[]}'.encode()
    )


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xef\xbb\xbf{}",
        b'"\xff"',
        b"NaN",
        b"-Infinity",
        b"[1,]",
        b'{"a":1,"a":1}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"9" * 5000,
        b"{}{}",
        b"'a'",
    ],
    ids=lambda text: text[:12],
)
def test_what_is_not_plain_json_is_damaged(text: bytes) -> None:
    with pytest.raises(Damaged, match="the thing is not valid JSON"):
        canonical.loads(text, "the thing")


@pytest.mark.parametrize(
    "text",
    [b" 1", b"1\n", b"1.50", b"1E5", b"1e400", b"-0", b'{"b":1,"a":1}', b'{"a": 1}', b'"\\u0061"', b'"\\/"',
     b'"\\ud800"', b"9223372036854775808", b"[" * 34 + b"]" * 34],
)  # fmt: skip
def test_json_in_another_form_is_damaged(text: bytes) -> None:
    canonical.loads(text, "the thing")
    with pytest.raises(Damaged, match="the thing is not canonical JSON"):
        canonical.decode(text, "the thing")


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), 2**63, -(2**63) - 1, {1: 2}, b"x", (1,), {"a": object()}, "\ud800"]
)
def test_what_json_cannot_hold_exactly_is_not_written(value: object) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        canonical.encode(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("item", [b"[],", b"{},", b"0,", b'{"":0},'])
def test_a_json_bomb_is_refused_before_it_is_read(item: bytes) -> None:
    bomb = b"[" + item * limits.JSON_VALUES
    tracemalloc.start()
    try:
        with pytest.raises(Damaged, match="more than 12000000 JSON values"):
            canonical.loads(bomb, "the thing")
        assert tracemalloc.get_traced_memory()[1] < limits.MiB
    finally:
        tracemalloc.stop()
