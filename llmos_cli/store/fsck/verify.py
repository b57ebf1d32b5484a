"""Checking one pack: its structure or (not `quick`) every byte of it, in one pass from its start to its end.

Knows the pack and, for deltas, where the index says their bases lie. Changes nothing and judges nothing: it returns
what is wrong with which object.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from llmos_cli.errors import Damaged, LlmosError, NotFound, from_os_error
from llmos_cli.formats import limits
from llmos_cli.formats.codec import ADOPTED
from llmos_cli.formats.frame import HEADER_BYTES, Frame, check_id, check_payload
from llmos_cli.formats.ids import IdHasher, ObjectId
from llmos_cli.formats.pack import HEADER_SIZE, Entry, aligned, check_entry, check_padding, lists_header
from llmos_cli.progress import Task
from llmos_cli.store.handle import Store
from llmos_cli.store.packs.adopted import describe_adopted, has_adopted
from llmos_cli.store.packs.frames import decode_read, indexed_base, read_frame
from llmos_cli.store.packs.packs import read_pack

_RUN_BYTES: Final = limits.CHUNK_BYTES + limits.MiB  # of frames that are read together
_NEAR_BYTES: Final = 16 * limits.KiB  # headers no further apart are read together, with what lies between them

_memory = threading.local()


@dataclass
class Checked:
    """A pack: what it holds, what is wrong with its objects by id and with itself. `unproven` are deltas that stand,
    but whose bases cannot be had."""

    size: int
    entries: tuple[Entry, ...]
    problem: str | None
    failures: dict[ObjectId, str] = field(default_factory=dict)
    unproven: list[Entry] = field(default_factory=list)


def check_pack(store: Store, name: ObjectId, path: Path, quick: bool, task: Task) -> Checked:
    """Check a pack; with `quick` its index and the headers of its frames. Raises NotFound if it is gone."""
    content = read_pack(path)
    checked = Checked(content.size, content.entries, content.problem.message if content.problem else None)
    if content.problem and not content.entries:
        return checked
    try:
        with open(path, "rb", buffering=0) as file:
            if quick:
                _check_headers(store, file.fileno(), checked)
            else:
                whole = _check_frames(store, path, file.fileno(), checked, task)
                if whole and not checked.problem and _hash_rest(file.fileno(), whole, checked) != name:
                    checked.problem = f"pack {name.short} does not have the bytes its name stands for"
    except FileNotFoundError as exc:
        raise NotFound(f"pack {name.short} is gone") from exc
    except OSError as exc:
        checked.problem = checked.problem or from_os_error(exc, f"reading {path}").message
    return checked


def verify(store: Store, path: Path, entry: Entry) -> bool:
    """Prove that a pack holds an object at an index line, by its id; False for a delta that stands, but whose base
    cannot be had. Raises Damaged, or FileNotFoundError."""
    base = _base(store, entry)
    frame, payload = read_frame(path, entry)
    return _prove(store, entry, frame, payload, base)


def _check_headers(store: Store, fd: int, checked: Checked) -> None:
    for run in _runs(checked.entries, near=_NEAR_BYTES):
        start = run[0].offset
        data = memoryview(_read(fd, start, run[-1].offset + HEADER_BYTES))
        for entry in run:
            at = entry.offset - start
            if len(data) >= at + HEADER_BYTES and lists_header(entry, data, at):
                continue
            try:
                check_entry(entry, data[at : at + HEADER_BYTES])
                if entry.codec == ADOPTED and not has_adopted(store, entry.base):
                    raise Damaged(f"it lies in {describe_adopted(store, entry.base)}, which is gone")
            except Damaged as exc:
                checked.failures[entry.id] = exc.message


def _check_frames(store: Store, path: Path, fd: int, checked: Checked, task: Task) -> IdHasher | None:
    """Prove every object; returns the hash of what lies before the pack's index, None if something is wrong there."""
    begun = IdHasher()
    begun.update(_read(fd, 0, HEADER_SIZE))
    hasher: IdHasher | None = begun
    for run in _runs(checked.entries):
        start, stop = run[0].offset, aligned(run[-1].end)
        try:
            data = _read_run(fd, start, stop)
        except OSError:  # on a bad spot of the disk: which objects lie there?
            data, hasher = None, None
        for entry in run:
            try:
                whole = verify(store, path, entry) if data is None else _check_frame(store, entry, data, start, checked)
            except (LlmosError, FileNotFoundError) as exc:
                checked.failures[entry.id] = exc.message if isinstance(exc, LlmosError) else "is gone"
                hasher = None
                continue
            if not whole:
                checked.unproven.append(entry)
            task.advance(entry.stored_size)
        if hasher and data is not None:
            hasher.update(data)
    return hasher


def _check_frame(store: Store, entry: Entry, data: memoryview, start: int, checked: Checked) -> bool:
    at, payload_at, end = (number - start for number in (entry.offset, entry.offset + HEADER_BYTES, entry.end))
    if not checked.problem:
        try:
            check_padding(entry, data[end : aligned(entry.end) - start])
        except Damaged as exc:
            checked.problem = exc.message
    try:
        frame = check_entry(entry, data[at:payload_at])
    except Damaged as exc:
        raise type(exc)(f"object {entry.id.short}: {exc.message}", hint=exc.hint) from exc
    return _prove(store, entry, frame, data[payload_at:end], _base(store, entry))


def _prove(store: Store, entry: Entry, frame: Frame, payload: memoryview, base: memoryview | None) -> bool:
    if entry.depth and base is None:
        check_payload(frame, payload)
        return False
    plain = _room("plain", limits.CHUNK_BYTES, frame.plain_size)
    decode_read(store, frame, payload, plain, base)
    check_id(frame, plain)
    return True


def _base(store: Store, entry: Entry) -> memoryview | None:
    try:
        return indexed_base(store, entry) if entry.depth else None
    except Damaged:
        return None


def _hash_rest(fd: int, hasher: IdHasher, checked: Checked) -> ObjectId:
    at = aligned(checked.entries[-1].end) if checked.entries else HEADER_SIZE
    while block := os.pread(fd, limits.MiB, at):
        hasher.update(block)
        at += len(block)
    return hasher.id()


def _runs(entries: Sequence[Entry], near: int = _RUN_BYTES) -> Iterator[Sequence[Entry]]:
    """Cut frames into neighbours to be read together; with `near`, only those whose headers are no further apart."""
    first = 0
    for number in range(1, len(entries) + 1):
        if (
            number == len(entries)
            or entries[number].end - entries[first].offset > _RUN_BYTES
            or entries[number].offset - entries[number - 1].offset > near
        ):
            yield entries[first:number]
            first = number


def _read(fd: int, start: int, stop: int) -> bytes:
    return os.pread(fd, stop - start, start)


def _read_run(fd: int, start: int, stop: int) -> memoryview:
    """The bytes from `start` to `stop`, fewer if the file ends before, in memory of this thread."""
    buffer = _room("run", _RUN_BYTES + limits.KiB, stop - start)
    got = 0
    while got < len(buffer) and (count := os.preadv(fd, [buffer[got:]], start + got)):
        got += count
    return buffer[:got]


def _room(purpose: str, usual: int, size: int) -> memoryview:
    """Memory of this thread, used again and again: fresh pages would cost more than what is done in them."""
    if size > usual:  # a big manifest; not worth keeping
        return memoryview(bytearray(size))
    buffer: bytearray | None = getattr(_memory, purpose, None)
    if buffer is None:
        buffer = bytearray(usual)
        setattr(_memory, purpose, buffer)
    return memoryview(buffer)[:size]
