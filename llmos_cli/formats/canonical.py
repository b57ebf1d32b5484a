"""Canonical JSON: one value, one byte string.

UTF-8, keys sorted by code point, no white space, no NaN or infinity, integers within 64 bits, floats in the shortest
form that reads back (Python's repr). Decoding is strict: what does not encode back to the same bytes is refused.
"""

import json
from typing import Any, Final

from llmos_cli.errors import Damaged
from llmos_cli.formats import limits

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key stands twice")
    return table


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


# Made once: there are thousands of small values to read, and making these takes as long as reading one.
_ENCODER: Final = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
_DECODER: Final = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_constant)


def encode(value: Json) -> bytes:
    """The one byte string of `value`; raises ValueError for a value that JSON cannot hold exactly."""
    _check(value, 0)
    return _ENCODER.encode(value).encode("utf-8")


def decode(data: bytes, what: str) -> Json:
    """Read canonical JSON; raises Damaged, naming `what`, for anything that `encode` would not have written."""
    value = loads(data, what)
    check_canonical(value, data, what)
    return value


def check_canonical(value: Json, data: bytes, what: str) -> None:
    """Refuse a value read from `data` unless `encode` would have written exactly `data`; raises Damaged."""
    try:
        again = encode(value)
    except ValueError as exc:
        raise Damaged(f"{what} is not canonical JSON: {exc}") from exc
    if again != data:
        raise Damaged(f"{what} is not canonical JSON")


def loads(data: bytes, what: str) -> Json:
    """Read any JSON, but refuse duplicate keys, NaN, invalid UTF-8, deep nesting and too many values.

    Raises Damaged naming `what`. The values are bounded because an empty list costs 30 times its bytes in memory.
    """
    if data.count(b"[") + data.count(b"{") + data.count(b",") > limits.JSON_VALUES:
        raise Damaged(f"{what} has more than {limits.JSON_VALUES} JSON values")

    try:
        value: Json = _DECODER.decode(data.decode("utf-8"))
    except (ValueError, RecursionError) as exc:
        raise Damaged(f"{what} is not valid JSON: {str(exc)[:200] or 'nested too deeply'}") from exc
    return value


def _check(value: Json, depth: int) -> None:
    if depth > limits.JSON_DEPTH:
        raise ValueError(f"nested deeper than {limits.JSON_DEPTH}")
    if type(value) is str:  # most are, and there are millions
        return
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError("a key is not a string")
            _check(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            if type(item) is not str:
                _check(item, depth + 1)
    elif isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**63:
        raise ValueError("an integer is outside 64 bits")
    elif value is not None and not isinstance(value, bool | int | float | str):
        raise ValueError(f"{type(value).__name__} is not JSON")
