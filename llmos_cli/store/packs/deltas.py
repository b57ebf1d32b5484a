"""Whether a chunk is stored as a delta, and on which base.

Chains stay short, since reading one costs its length: a delta rests on a chunk that is stored whole. Where the base is
a delta itself, the one below it is taken, until the distance has grown so far that it is better to start anew.
"""

import threading
from dataclasses import dataclass
from typing import Final

from llmos_cli.errors import Damaged
from llmos_cli.formats import codec, limits
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.manifest import Chunk
from llmos_cli.store.handle import Store
from llmos_cli.store.packs.objects import read_object_into

CHAIN: Final = 1  # the greatest depth that is written; reading a delta takes about twice as long as its base
_MIN_BYTES: Final = 1024  # below this a header costs more than a delta saves
_WORTH: Final = 0.9  # of what the chunk takes without a base
_WORTH_AFAR: Final = 0.6  # on a base further back: stored whole, the chunk would serve what comes next as a near base
_SAMPLES: Final = 4
_SAMPLE_BYTES: Final = 16 * limits.KiB

_memory = threading.local()


@dataclass(frozen=True)
class Delta:
    """An encoded delta, the base it rests on, and its depth."""

    encoded: codec.Encoded
    base: ObjectId
    depth: int


def encode_delta(
    store: Store, oid: ObjectId, plain: memoryview, words: codec.Words, base: Chunk, room: memoryview
) -> Delta | None:
    """The chunk `oid` as a delta on `base`, or None where that does not pay or the base cannot be read."""
    if words.width == 0 or len(plain) < _MIN_BYTES:
        return None
    found = _in_chain(store, base)
    if found is None or found[0].id == oid:
        return None
    worth = _WORTH if found[0].id == base.id else _WORTH_AFAR
    base, depth = found
    before = _room(base.size)
    try:
        read_object_into(store, base.id, before)
    except Damaged:
        return None
    if not _pays(plain, before, words, worth):
        return None
    encoded = codec.encode_delta(plain, before, words, room)
    return Delta(encoded, base.id, depth + 1) if encoded.size < worth * len(plain) else None


def _in_chain(store: Store, base: Chunk) -> tuple[Chunk, int] | None:
    """The nearest ancestor of `base`, itself included, on which a delta may rest, and its depth."""
    while True:
        copies = store.index.locate(base.id)
        if not copies:
            return None
        entry = min((copy.entry for copy in copies), key=lambda entry: entry.depth)
        if entry.depth < CHAIN:
            return base, entry.depth
        below = store.index.locate(entry.base)
        if not below:
            return None
        base = Chunk(entry.base, below[0].entry.plain_size)


def _pays(plain: memoryview, base: memoryview, words: codec.Words, worth: float) -> bool:
    """Judged on a few runs of words from all over the chunk."""
    common = min(len(plain), len(base)) // 16 * 16
    if common > 2 * _SAMPLES * _SAMPLE_BYTES:
        step = (common - _SAMPLE_BYTES) // (_SAMPLES - 1) // 16 * 16
        starts = [number * step for number in range(_SAMPLES)]
        plain, base = (
            memoryview(b"".join(data[start : start + _SAMPLE_BYTES] for start in starts)) for data in (plain, base)
        )
    size: int = codec.encode_delta(plain, base, words).size
    return size < worth * codec.encode(plain, words).size


def _room(size: int) -> memoryview:
    buffer: bytearray | None = getattr(_memory, "base", None)
    if buffer is None:
        buffer = _memory.base = bytearray(limits.CHUNK_BYTES)
    return memoryview(buffer)[:size]
