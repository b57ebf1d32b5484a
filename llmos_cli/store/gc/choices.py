"""Which chunks are worth storing anew, chunk by chunk, estimated on samples.

A chunk that something rests on is never made a delta, nor is one that is to serve as a base, so that chains stay as
short as they are written today.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Final

from llmos_cli.errors import LlmosError
from llmos_cli.formats import codec, limits
from llmos_cli.formats.ids import ObjectId
from llmos_cli.store.gc.kin import Kin
from llmos_cli.store.handle import Store
from llmos_cli.store.packs.deltas import CHAIN
from llmos_cli.store.packs.frames import read_frame
from llmos_cli.store.packs.index import Location
from llmos_cli.store.packs.objects import read_object

REPACKED: Final = "repacked"  # the fact that nothing can be won with a chunk, and on which base
WORTH_DELTA: Final = 0.9  # of what a chunk takes without a base
_WORTH: Final = 0.95  # of what it takes now: above that a chunk, or a family, stays as it is
_MIN_BYTES: Final = 1024
_SAMPLES: Final = 4
_SAMPLE_BYTES: Final = 16 * limits.KiB


@dataclass(frozen=True)
class Choice:
    """How to store a chunk anew: how its bytes are read, what it may rest on, about what that saves. `must`: even if it
    takes more, since that shortens a chain or frees a base."""

    words: codec.Words
    base: ObjectId | None
    saved: int
    must: bool = False


class Chooser:
    """`choices` so far, and `homes`: the copies that they replace. Only chunks in `free` packs are chosen."""

    def __init__(self, store: Store, named: Set[bytes], free: Set[ObjectId]) -> None:
        self.choices: dict[ObjectId, Choice] = {}
        self.homes: dict[ObjectId, Location] = {}
        self._store = store
        self._named = named
        self._free = free
        self._rested: set[ObjectId] = set()  # what must not become a delta

    def free_bases(self, resting: Sequence[tuple[ObjectId, ObjectId, int]]) -> None:
        """Choose among deltas (with base and depth): those of long chains, those whose base nothing else needs."""
        self._rested.update(base for _, base, _ in resting)
        families: defaultdict[ObjectId, list[ObjectId]] = defaultdict(list)
        for oid, base, depth in resting:
            home = self._home(oid) if oid in self._named else None
            if home is None or (home.entry.base, home.entry.depth) != (base, depth):
                continue
            if depth > CHAIN:
                self._shorten(oid, home)
            elif base not in self._named:
                families[base].append(oid)
        for base, members in sorted(families.items()):
            self._free_base(base, sorted(members))

    def improve(self, kin: Iterable[Kin]) -> None:
        """Choose among the chunks of tensors those that another codec, or a delta on their kin, would make smaller."""
        seen: set[ObjectId] = set()
        for item in kin:
            oid = item.chunk.id
            if oid in seen or oid in self.choices or item.chunk.size < _MIN_BYTES:
                continue
            seen.add(oid)
            home = self._home(oid)
            if home is None or home.pack not in self._free or home.entry.depth:
                continue
            base = self._base_for(item)
            if base is None and home.entry.codec not in (codec.RAW, codec.ZSTD):
                continue
            if self._store.index.facts(REPACKED, [oid]).get(oid) == (base or b""):
                continue
            self._consider(home, item.words, base)

    def _consider(self, home: Location, words: codec.Words, base: ObjectId | None) -> None:
        entry = home.entry
        try:
            plain = memoryview(read_object(self._store, entry.id))
            before = memoryview(read_object(self._store, base)) if base else None
        except LlmosError:
            return
        whole = _estimate(plain, None, words)
        best = min(entry.payload_size, whole)
        rests = before is not None and (size := _estimate(plain, before, words)) < WORTH_DELTA * best
        if rests:
            best = size
        if best < _WORTH * entry.payload_size and entry.payload_size - best >= limits.KiB // 4:
            self._choose(home, Choice(words, base if rests else None, entry.payload_size - best))

    def _choose(self, home: Location, choice: Choice) -> None:
        self.choices[home.entry.id] = choice
        self.homes[home.entry.id] = home
        if choice.base:
            self._rested.add(choice.base)

    def _base_for(self, item: Kin) -> ObjectId | None:
        """What a chunk may rest on: its kin if that is stored whole and stays so, or else what that one rests on."""
        if item.near is None or item.chunk.id in self._rested:
            return None
        oid: ObjectId | None = item.near.id
        for _ in range(2):
            if oid is None or oid == item.chunk.id or oid not in self._named:
                return None
            chosen, home = self.choices.get(oid), self._home(oid)
            if chosen:
                below = chosen.base
            elif home:
                below = home.entry.base if home.entry.depth else None
            else:
                return None
            if below is None:
                return oid
            oid = below
        return None

    def _shorten(self, oid: ObjectId, home: Location) -> None:
        bottom: Location | None = home
        while bottom and bottom.entry.depth:
            bottom = self._home(bottom.entry.base)
        if bottom is None or home.pack not in self._free or oid in self.choices:
            return
        words = self._words(home)
        if words:
            base = bottom.entry.id if bottom.entry.id in self._named else None
            self._choose(home, Choice(words, base, 0, must=True))

    def _free_base(self, base: ObjectId, members: Sequence[ObjectId]) -> None:
        """Store one of the deltas whole and the others on that one, if that takes less than they and their base do."""
        homes = [self.homes.get(oid) or self._home(oid) for oid in members]
        below = self._home(base)
        found = [home for home in homes if home and home.pack in self._free]
        if below is None or len(found) < len(members) or any(oid in self.choices for oid in members):
            return
        words = [self._words(home) for home in found]
        first: memoryview | None = None
        now, then = below.entry.stored_size, 0
        try:
            for oid, home, how in zip(members, found, words, strict=True):
                if how is None:
                    return
                plain = memoryview(read_object(self._store, oid))
                size = _estimate(plain, None, how)
                then += size if first is None else min(size, _estimate(plain, first, how))
                now += home.entry.stored_size
                first = plain if first is None else first
        except LlmosError:
            return
        if then >= _WORTH * now:
            return
        for number, (home, how) in enumerate(zip(found, words, strict=True)):
            assert how
            self._choose(home, Choice(how, members[0] if number else None, 0 if number else now - then, must=True))
        self._rested.add(members[0])

    def _home(self, oid: ObjectId) -> Location | None:
        """The copy that a gc would keep."""
        copies = [copy for copy in self._store.index.locate(oid) if self._store.pack_path(copy.pack).exists()]
        return min(copies, key=lambda copy: (copy.entry.depth, copy.entry.stored_size, copy.pack), default=None)

    def _words(self, home: Location) -> codec.Words | None:
        """How a delta was read when it was stored: its frame says."""
        try:
            frame, _ = read_frame(self._store.pack_path(home.pack), home.entry)
        except (LlmosError, FileNotFoundError):
            return None
        return codec.Words(frame.width, frame.rotated)


def _estimate(plain: memoryview, base: memoryview | None, words: codec.Words) -> int:
    """About what a chunk would take, whole or on a base, judged on a few runs of words from all over it."""
    common = len(plain) if base is None else min(len(plain), len(base))
    common = common // 16 * 16
    parts = [plain] if base is None else [plain, base]
    if common > 2 * _SAMPLES * _SAMPLE_BYTES:
        step = (common - _SAMPLE_BYTES) // (_SAMPLES - 1) // 16 * 16
        starts = [number * step for number in range(_SAMPLES)]
        parts = [memoryview(b"".join(part[start : start + _SAMPLE_BYTES] for start in starts)) for part in parts]
    sample, *before = parts
    encoded = codec.encode_delta(sample, before[0], words) if before else codec.encode(sample, words)
    return int(encoded.size * len(plain) / max(1, len(sample)))
