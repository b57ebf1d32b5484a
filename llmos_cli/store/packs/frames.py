"""Reading one frame where it lies in a pack, with what it rests on: the base of a delta, the file of an adopted chunk.

A delta is never followed to a copy of its base whose depth is not smaller than its own, so a chain ends, whatever the
packs say. All memory but the caller's is this thread's own and used again and again: fresh pages for every chunk would
cost more than decoding it.
"""

import os
import threading
from collections.abc import Callable
from pathlib import Path

from llmos_cli.errors import Damaged, from_os_error
from llmos_cli.formats import limits
from llmos_cli.formats.codec import ADOPTED
from llmos_cli.formats.frame import HEADER_BYTES, Frame, check_payload, decode_payload, plain_limit
from llmos_cli.formats.ids import object_id
from llmos_cli.formats.pack import Entry, aligned, check_entry
from llmos_cli.store.handle import Store
from llmos_cli.store.packs.adopted import read_adopted

BaseReader = Callable[[Entry], memoryview]
"""The plain bytes of the base that a delta rests on; raises Damaged naming it if it cannot be had."""

_memory = threading.local()


def read_frame(path: Path, entry: Entry) -> tuple[Frame, memoryview]:
    """Read a frame's header and payload; the memory is this thread's scratch, valid until its next read.

    Raises FileNotFoundError if the pack is gone, Damaged if it does not hold the entry there.
    """
    if entry.payload_size > plain_limit(entry.kind):
        raise Damaged(f"object {entry.id.short}: its index line is outside the declared limits")
    size = HEADER_BYTES + entry.payload_size
    buffer = scratch(size)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            got = 0
            while got < size:
                count = os.preadv(fd, [buffer[got:]], entry.offset + got)
                if count == 0:
                    raise Damaged(f"object {entry.id.short}: pack {path.name} is cut short")
                got += count
        finally:
            os.close(fd)
    except FileNotFoundError:
        raise
    except OSError as exc:
        raise from_os_error(exc, f"reading object {entry.id.short} at byte {entry.offset} of {path}") from exc
    try:
        return check_entry(entry, buffer[:HEADER_BYTES]), buffer[HEADER_BYTES:]
    except Damaged as exc:
        raise type(exc)(f"object {entry.id.short}: {exc.message}", hint=exc.hint) from exc


def decode_frame(store: Store, path: Path, entry: Entry, out: memoryview, base_of: BaseReader) -> None:
    """Fill `out`, which has the object's plain size, from the frame at `entry`. Raises as `read_frame` does."""
    base = base_of(entry) if entry.depth else None  # first: reading it uses the scratch memory
    frame, payload = read_frame(path, entry)
    decode_read(store, frame, payload, out, base)


def decode_read(
    store: Store, frame: Frame, payload: memoryview, out: memoryview, base: memoryview | None = None
) -> None:
    """Check a frame of this store that has been read and fill `out` from it; raises Damaged."""
    if frame.codec == ADOPTED:
        check_payload(frame, payload)
        read_adopted(store, frame, payload, out)
    else:
        decode_payload(frame, payload, out, base)


def verify_frame(store: Store, path: Path, entry: Entry) -> None:
    """Prove that a pack holds an object at an index line, by its id. Raises Damaged, or FileNotFoundError."""
    if entry.plain_size > plain_limit(entry.kind):
        raise Damaged(f"object {entry.id.short}: its index line is outside the declared limits")
    plain = memoryview(bytearray(entry.plain_size))
    decode_frame(store, path, entry, plain, lambda delta: indexed_base(store, delta))
    if object_id(plain) != entry.id:
        raise Damaged(f"object {entry.id.short} does not have the bytes its id names")


def indexed_base(store: Store, delta: Entry) -> memoryview:
    """A base from where the index says it lies, and nowhere else."""
    problem = "is missing"
    for location in store.index.locate(delta.base):
        if location.entry.depth >= delta.depth:
            continue
        out = room(location.entry)
        try:
            path = store.pack_path(location.pack)
            decode_frame(store, path, location.entry, out, lambda below: indexed_base(store, below))
        except FileNotFoundError:
            continue
        except Damaged as exc:
            problem = f"cannot be read: {exc.message}"
            continue
        return out
    raise Damaged(f"object {delta.id.short} rests on object {delta.base.short}, which {problem}")


def room(entry: Entry) -> memoryview:
    """Memory of this thread for a base: one for each depth, since those of a chain are in use together."""
    rooms: dict[int, bytearray] | None = getattr(_memory, "rooms", None)
    if rooms is None:
        rooms = _memory.rooms = {}
    if entry.depth not in rooms:
        rooms[entry.depth] = bytearray(limits.CHUNK_BYTES)
    if entry.plain_size > limits.CHUNK_BYTES:
        raise Damaged(f"object {entry.id.short} is too large to be a base")
    return memoryview(rooms[entry.depth])[: entry.plain_size]


def scratch(size: int) -> memoryview:
    """Memory of this thread for a frame, valid until the next call."""
    usual = limits.CHUNK_BYTES + HEADER_BYTES
    if size > usual:  # a big manifest; not worth keeping
        return memoryview(bytearray(size))
    buffer: bytearray | None = getattr(_memory, "frame", None)
    if buffer is None:
        buffer = _memory.frame = bytearray(aligned(usual))
    return memoryview(buffer)[:size]
