"""What of each pack is needed: one pass over the index, in memory that grows with the packs, not with the objects.

Of several copies of an object one pack keeps it; the others are dead weight. The least deep copy stays, since what
rests on the object may need it, and of these the smallest.
"""

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter

from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.pack import Entry
from llmos_cli.store.handle import Store
from llmos_cli.store.packs.index import Copy, Double


@dataclass
class Weight:
    """One pack: how many objects it has and how many of them stay, and the bytes of those that do and that do not.
    `spare` are the living ones that stay in another pack, `bases` what dead deltas in it rest on."""

    objects: int = 0
    staying: int = 0
    live: int = 0
    dead: int = 0
    spare: set[bytes] = field(default_factory=set)
    bases: set[bytes] = field(default_factory=set)


@dataclass(frozen=True)
class Weights:
    """The packs that are there, and how many of the living objects one of them keeps."""

    packs: Mapping[ObjectId, Weight]
    found: int


def weigh(store: Store, live: Set[bytes], present: Set[ObjectId]) -> Weights:
    """Weigh the packs that are present by what is alive."""
    return store.index.over_copies(lambda names, copies, doubles: _weigh(names, copies, doubles, live, present))


def staying(store: Store, pack: ObjectId, weight: Weight, live: Set[bytes]) -> tuple[Entry, ...]:
    """What of a pack stays, in file order."""
    return tuple(entry for entry in store.index.entries(pack) if entry.id in live and entry.id not in weight.spare)


def _weigh(
    names: Mapping[int, ObjectId],
    copies: Iterable[Copy],
    doubles: Iterable[Double],
    live: Set[bytes],
    present: Set[ObjectId],
) -> Weights:
    numbers = max(names, default=0) + 1
    staying, live_bytes, dead, dead_bytes = ([0] * numbers for _ in range(4))  # lists: there are millions of objects
    bases: dict[int, set[bytes]] = {}
    for oid, number, size, base in copies:
        if oid in live:
            staying[number] += 1
            live_bytes[number] += size
        else:
            dead[number] += 1
            dead_bytes[number] += size
            if base is not None:
                bases.setdefault(number, set()).add(base)
    weights = {
        number: Weight(
            staying[number] + dead[number],
            staying[number],
            live_bytes[number],
            dead_bytes[number],
            bases=bases.get(number, set()),
        )
        for number, name in names.items()
        if name in present
    }
    found = sum(weight.staying for weight in weights.values())
    for _, group in groupby(doubles, itemgetter(0)):
        alike = [double for double in group if double[0] in live and double[4] in weights]
        found -= max(0, len(alike) - 1)
        _settle(alike, names, weights)
    return Weights({names[number]: weight for number, weight in weights.items()}, found)


def _settle(alike: Iterable[Double], names: Mapping[int, ObjectId], weights: Mapping[int, Weight]) -> None:
    """Of the copies of each kind the first stays."""
    kept = set()
    for oid, kind, _, size, number in sorted(alike, key=lambda double: (*double[1:4], names[double[4]])):
        if kind in kept:
            weight = weights[number]
            weight.staying -= 1
            weight.live -= size
            weight.dead += size
            weight.spare.add(oid)
        kept.add(kind)
