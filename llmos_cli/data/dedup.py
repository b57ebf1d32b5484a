"""Duplicates among documents: equal ones by the id of their text, near ones by MinHash (rensa, the extra `dedup`).

The first of several stays. Near means that of the runs of five words (single characters where a script has no spaces)
at least four fifths are shared; of a document over 4 MiB the beginning is looked at. Needs memory: about 150 bytes a
document for equal ones, about 3 KB for near ones.
"""

import re
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any, Final, Literal

from llmos_cli.errors import UsageError
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.limits import MiB

Dedup = Literal["exact", "near"]
NEAR: Final = 0.8
LOOK_CHARS: Final = 4 * MiB
_WORDS: Final = 5
_HASHES: Final = 128
_BANDS: Final = 16
_SEED: Final = 42
_WORD: Final = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+?(?=[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af])|\w+"
)

Place = tuple[int, int]  # file, record


class Duplicates:
    """Asks of each document in turn whether one like it was there before."""

    def __init__(self, kind: Dedup) -> None:
        self._equal: dict[bytes, Place] = {}
        self._near = _Near() if kind == "near" else None

    def twin(self, text_id: ObjectId, text: str, place: Place) -> tuple[str, Place] | None:
        """How ("equal", "near") and where a document like it was met; None, and it is noted, if it is the first."""
        known = self._equal.setdefault(text_id[:16], place)
        if known != place:
            return "equal", known
        found = self._near.twin(text, place) if self._near else None
        if found is None:
            return None
        self._equal[text_id[:16]] = found  # this one goes, so it is not what later ones are equal to
        return "near", found


class _Near:
    def __init__(self) -> None:
        if find_spec("rensa") is None:
            raise UsageError("--dedup near needs rensa", hint="pip install 'llmos[dedup]'")
        from rensa import RMinHashLSH

        self._index: Any = RMinHashLSH(threshold=NEAR, num_perm=_HASHES, num_bands=_BANDS)
        self._known: list[tuple[Place, Any]] = []

    def twin(self, text: str, place: Place) -> Place | None:
        from rensa import RMinHash

        sketch = RMinHash(num_perm=_HASHES, seed=_SEED)
        sketch.update(list(shingles(text)))
        for number in sorted(self._index.query(sketch)):
            met, other = self._known[int(number)]
            if sketch.jaccard(other) >= NEAR:
                return met
        self._index.insert(len(self._known), sketch)
        self._known.append((place, sketch))
        return None


def shingles(text: str) -> Iterator[str]:
    """Every run of five words, whatever their case and what stands between; of a shorter text the whole of it."""
    words: Sequence[str] = _WORD.findall(text.casefold()) or [text]
    for start in range(max(1, len(words) - _WORDS + 1)):
        yield " ".join(words[start : start + _WORDS])
