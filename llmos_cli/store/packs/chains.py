"""Which objects can be read, given the copies that stand: a delta only where a copy of its base can that is less deep.

Knows nothing of packs or refs. A delta costs two ids of memory, a plain object one.
"""

import struct
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Set
from typing import Final

from llmos_cli.formats import limits
from llmos_cli.formats.ids import ID_BYTES, ObjectId
from llmos_cli.formats.pack import Entry

DEEPEST: Final = limits.DELTA_DEPTH + 1  # the depth of what cannot be read at all
_LINK = struct.Struct(f"{ID_BYTES}s{ID_BYTES}s")  # a delta and its base


class Chains:
    """`readable` gives for each object the least depth of a copy that can be read."""

    def __init__(self) -> None:
        self.readable: dict[ObjectId, int] = {}
        self._links = [bytearray() for _ in range(DEEPEST)]

    def add(self, entries: Iterable[Entry], *, proven: bool, but: Container[ObjectId] = ()) -> None:
        """Note copies that stand; a delta can be read if that is `proven`, `but` for these, or once it is resolved."""
        for oid, base, _, _, _, _, _, depth in entries:
            if depth == 0:
                self.readable[oid] = 0
                continue
            self._links[depth] += oid + base
            if proven and oid not in but:
                self.can_read(oid, depth)

    def can_read(self, oid: ObjectId, depth: int) -> None:
        """A copy of this depth has been read."""
        self.readable[oid] = min(depth, self.readable.get(oid, depth))

    def depth_of(self, oid: bytes) -> int:
        """The least depth of a copy that can be read; `DEEPEST` if none can."""
        return self.readable.get(oid, DEEPEST)  # type: ignore[call-overload, no-any-return]

    def resolve(self) -> None:
        """Count deltas whose bases are there, by depth: a chain is only as whole as its bottom."""
        for depth, oid, base in self._each():
            if self.depth_of(base) < depth < self.depth_of(oid):
                self.readable[ObjectId(oid)] = depth

    def stuck(self) -> dict[ObjectId, list[tuple[int, ObjectId]]]:
        """The deltas that stand but cannot be read: for each the depths and bases of its copies."""
        found: defaultdict[ObjectId, list[tuple[int, ObjectId]]] = defaultdict(list)
        for depth, oid, base in self._each():
            if oid not in self.readable:
                found[ObjectId(oid)].append((depth, ObjectId(base)))
        return found

    def resting_on(self, suspects: Set[bytes]) -> dict[ObjectId, set[ObjectId]]:
        """For each suspect, and each base that cannot be read, the deltas that rest on it, near or far."""
        below: dict[bytes, set[ObjectId]] = {}
        for _, oid, base in self._each():
            found = below.get(base, set())
            if base in suspects or base not in self.readable:
                found = found | {ObjectId(base)}
            if found:
                below.setdefault(oid, set()).update(found)
        above: defaultdict[ObjectId, set[ObjectId]] = defaultdict(set)
        for oid, bases in below.items():
            for base in bases:
                above[base].add(ObjectId(oid))
        return above

    def limit(self, wanted: dict[ObjectId, int]) -> None:
        """Lower the depths that copies of `wanted` must stay below to those of the stuck deltas that rest on them."""
        for depth, oid, base in self._each() if wanted else ():
            if base in wanted and oid not in self.readable:
                wanted[ObjectId(base)] = min(depth, wanted[ObjectId(base)])

    def _each(self) -> Iterator[tuple[int, bytes, bytes]]:
        """Depth, delta, base; the least deep first."""
        for depth, links in enumerate(self._links):
            for oid, base in _LINK.iter_unpack(links):
                yield depth, oid, base
