"""What changed between two JSON values: the paths and values that differ, and how many lines of two texts do.

Pure; it knows nothing of files. A list that became longer or shorter is compared from both its ends, so that items
put in or taken out are one change and not a change of everything behind them.
"""

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

JSON_BYTES: Final = 64 << 20  # a larger file is no settings file
_JSON_VALUES: Final = 4_000_000  # some 60 bytes of memory each
TEXT_BYTES: Final = 16 << 20
_PLAIN_KEY = re.compile(r"[A-Za-z_][\w-]*\Z", re.ASCII)


class Absent(Enum):
    """`ABSENT` stands in place of a value that is not there (None is one that is)."""

    ABSENT = "absent"


ABSENT: Final = Absent.ABSENT


@dataclass(frozen=True)
class Change:
    """`path` as in "layers[3].size"; "" is the whole value."""

    path: str
    old: Any
    new: Any

    @property
    def status(self) -> str:
        return "added" if self.old is ABSENT else "removed" if self.new is ABSENT else "changed"


@dataclass(frozen=True)
class Changes:
    """The first `items` of `count` changes, in the order of the old value."""

    items: tuple[Change, ...] = ()
    count: int = 0


@dataclass(frozen=True)
class Lines:
    """How many lines of a text are new and how many are gone; both 0 if they only stand in another order."""

    added: int
    removed: int


def json_changes(old: Any, new: Any, *, keep: int) -> Changes:
    """Compare two values as `json.loads` gives them; at most `keep` of the changes are kept, all are counted."""
    items: list[Change] = []
    count = 0
    for change in _walk(old, new):
        count += 1
        if len(items) < keep:
            items.append(change)
    return Changes(tuple(items), count)


def read_json(data: bytes) -> Any:
    """The JSON value of a file, or ABSENT if it is none, or too large to be compared in bounded memory.

    As lenient as what reads such files: infinities and duplicate keys pass.
    """
    if len(data) > JSON_BYTES or sum(map(data.count, (b"[", b"{", b",", b":"))) > _JSON_VALUES:
        return ABSENT
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return ABSENT


def line_changes(old: bytes, new: bytes) -> Lines | None:
    """Compare two files line by line; None if either is not UTF-8 text or is too large."""
    if max(len(old), len(new)) > TEXT_BYTES or b"\0" in old or b"\0" in new:
        return None
    try:
        old.decode("utf-8")
        new.decode("utf-8")
    except UnicodeDecodeError:
        return None
    before, after = Counter(old.splitlines()), Counter(new.splitlines())
    return Lines((after - before).total(), (before - after).total())


def _walk(old: Any, new: Any) -> Iterator[Change]:
    open_pairs = [iter([("", old, new)])]
    while open_pairs:
        pair = next(open_pairs[-1], None)
        if pair is None:
            open_pairs.pop()
            continue
        path, a, b = pair
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            open_pairs.append(_by_key(path, a, b))
        elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
            open_pairs.append(_by_place(path, a, b))
        elif isinstance(a, list) and isinstance(b, list):
            head, tail = _common(a, b)
            before, after = a[head : len(a) - tail], b[head : len(b) - tail]
            yield Change(_slice(path, head, len(before) or len(after)), _items(before), _items(after))
        elif not _same_plain(a, b):
            yield Change(path, a, b)


def _slice(path: str, first: int, length: int) -> str:
    return f"{path}[{first}]" if length == 1 else f"{path}[{first}:{first + length}]"


def _items(values: list[Any]) -> Any:
    """Items of a list that were put in or taken out: one stands for itself, none is absent."""
    return values if len(values) > 1 else values[0] if values else ABSENT


def _by_key(path: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """What may differ between two tables; equal plain values are left out before a path is spelled."""
    for key in itertools.chain(a, (key for key in b if key not in a)):
        pair = a.get(key, ABSENT), b.get(key, ABSENT)
        if not _same_plain(*pair):
            yield _below(path, key), *pair


def _by_place(path: str, a: list[Any], b: list[Any]) -> Iterator[tuple[str, Any, Any]]:
    for at, pair in enumerate(zip(a, b, strict=True)):
        if not _same_plain(*pair):
            yield f"{path}[{at}]", *pair


def _common(a: list[Any], b: list[Any]) -> tuple[int, int]:
    """How many items two lists share at their start, and at their end."""
    shorter = min(len(a), len(b))
    head = next((at for at in range(shorter) if not _same(a[at], b[at])), shorter)
    tail = next((at for at in range(shorter - head) if not _same(a[-1 - at], b[-1 - at])), shorter - head)
    return head, tail


def _same(a: Any, b: Any) -> bool:
    if not isinstance(a, Mapping | list) or type(a) is not type(b):
        return _same_plain(a, b)
    return a == b and next(_walk(a, b), None) is None


def _same_plain(a: Any, b: Any) -> bool:
    """Equal as JSON, and neither a table nor a list: 1, 1.0 and true are three values, NaN is one."""
    if isinstance(a, Mapping | list) or type(a) is not type(b):
        return False
    return bool(a == b) or (a != a and b != b)  # noqa: PLR0124 - a NaN is not equal to itself


def _below(path: str, key: str) -> str:
    if not _PLAIN_KEY.match(key):
        return f"{path}[{json.dumps(key, ensure_ascii=False)}]"
    return f"{path}.{key}" if path else key
