"""Taking a file into the store without a second copy of its bytes: as a reflink or, where the file system has none, as
a hard link to a file made read-only.

The bytes are read once, to learn the ids of their chunks. Order: reflink or link in `tmp/`, hash, make durable,
publish under `adopted/`; only then are frames written that need it. A crash leaves the old state and what gc knows.
A hard link has other names that somebody may write through: whoever reads a chunk checks it.
"""

import contextlib
import errno
import fcntl
import os
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from llmos_cli.errors import LlmosError
from llmos_cli.formats import limits
from llmos_cli.formats.adopted import Place, encode_place
from llmos_cli.formats.codec import Words
from llmos_cli.formats.ids import IdHasher, ObjectId, checksum, object_id
from llmos_cli.formats.manifest import Chunk, FileEntry
from llmos_cli.formats.names import check_path
from llmos_cli.progress import Task
from llmos_cli.store.disk import durable
from llmos_cli.store.handle import Store
from llmos_cli.store.intake.ingest import check_unchanged, cut_file, filler, opened
from llmos_cli.store.packs.adopted import adopted_path, list_adopted, note_origin
from llmos_cli.store.packs.pipeline import Pipeline, cores

REFLINK: Final = "reflink"
HARDLINK: Final = "hardlink"
COPY: Final = "copy"
KNOWN: Final = "known"
MIN_BYTES: Final = 1_000_000  # a smaller file takes less as a compressed copy than it would cost to look after


@dataclass(frozen=True)
class Adoption:
    """What was done with one file: adopted by REFLINK or HARDLINK; stored as a COPY, and `reason`; or nothing, since
    the store KNOWN had it all. `read_only`: the file was made so."""

    path: Path
    how: str
    size: int
    reason: str = ""
    read_only: bool = False


@dataclass(frozen=True)
class _Piece:
    """A chunk of the file and where it lies in it."""

    chunk: Chunk
    words: Words
    place: Place


def adopt_path(
    store: Store, pipeline: Pipeline, name: str, path: Path, task: Task
) -> tuple[FileEntry | None, Adoption]:
    """Adopt a file; no entry if that cannot be, so that it must be stored as usual.

    Raises what storing it would: LlmosError if it changes meanwhile, Damaged for a broken safetensors file.
    """
    check_path(name)
    with opened(path) as (fd, before):
        size = before.st_size
        if size < MIN_BYTES:
            return None, Adoption(path, COPY, size, "it is small")
        temp = durable.temp_path(store.tmp)
        link = temp.with_suffix(durable.LINK_SUFFIX)
        if durable.clone_file(fd, temp) is None:
            with _removed_unless_published(temp), opened(temp) as (cloned, _):
                return _take(store, pipeline, name, path, cloned, size, temp, task, REFLINK)
        reason = _why_not_linked(fd, before)
        if not reason and not _is_adopted(store, before):
            reason = durable.link_file(path.resolve(), link) or ""
        if reason:
            return None, Adoption(path, COPY, size, reason)
        with _removed_unless_published(link):
            return _take(store, pipeline, name, path, fd, size, link, task, HARDLINK)


def _take(
    store: Store, pipeline: Pipeline, name: str, path: Path, fd: int, size: int, temp: Path, task: Task, how: str
) -> tuple[FileEntry, Adoption]:
    before = os.fstat(fd)
    file, pieces = _survey(fd, name, path, size, task)
    check_unchanged(path, before, os.fstat(fd))
    fresh = [piece for piece in pieces if pipeline.claim(piece.chunk.id)]
    pipeline.written.reused += size - sum(piece.chunk.size for piece in fresh)
    entry = FileEntry(name, tuple(piece.chunk for piece in pieces))
    if not fresh:
        return entry, Adoption(path, KNOWN, size)
    locked = False
    if how == HARDLINK:
        locked = _publish_link(store, path, fd, before, temp, file)
    else:
        durable.seal(temp, 0o444)
        _publish(store, temp, file)
    note_origin(store, file, path.absolute())
    pipeline.put_adopted([(piece.chunk, encode_place(piece.place, piece.words)) for piece in fresh], file)
    return entry, Adoption(path, how, size, read_only=locked)


def _publish_link(store: Store, path: Path, fd: int, before: os.stat_result, temp: Path, file: ObjectId) -> bool:
    """Publish a hard link; returns whether the file had to be made read-only. If it cannot be published it is left as
    it was."""
    if not temp.exists():  # it is adopted already, as what it was before it changed
        reason = durable.link_file(path.resolve(), temp)
        if reason:
            raise LlmosError(f"{path} cannot be linked into the store: {reason}", hint="add it without --adopt")
    check_unchanged(path, before, temp.stat())
    writable = before.st_mode & 0o222
    try:
        durable.seal(temp, before.st_mode & 0o7555 if writable else None)
        check_unchanged(path, before, os.fstat(fd))
        if _is_written_to(fd):
            raise LlmosError(f"{path} was opened for writing meanwhile", hint="run the command again when that is done")
        _publish(store, temp, file)
    except BaseException:
        if writable:
            with contextlib.suppress(LlmosError):
                durable.set_mode(temp, before.st_mode & 0o7777)
        raise
    return bool(writable)


def _publish(store: Store, temp: Path, file: ObjectId) -> None:
    target = adopted_path(store, file)
    durable.make_folder(target.parent)
    durable.publish_shared(temp, target)  # over one of the same name, whose bytes may have rotted


def _survey(fd: int, name: str, path: Path, size: int, task: Task) -> tuple[ObjectId, list[_Piece]]:
    """Read a file once: the id of the whole, and its chunks. Chunks are hashed on every core, the whole in order."""
    whole = IdHasher()
    pieces: list[_Piece] = []
    fill = filler(fd, path)

    def hash_chunk(start: int, words: Words, plain: memoryview) -> _Piece:
        fill(start, plain)
        return _Piece(Chunk(object_id(plain), len(plain)), words, Place(start, checksum(plain)))

    free = [bytearray(limits.CHUNK_BYTES) for _ in range(cores() + 2)]
    waiting: deque[tuple[Future[_Piece], bytearray]] = deque()

    def finish_next() -> None:
        future, buffer = waiting.popleft()
        piece = future.result()
        whole.update(memoryview(buffer)[: piece.chunk.size])
        pieces.append(piece)
        free.append(buffer)
        task.advance(piece.chunk.size)

    with ThreadPoolExecutor(cores(), "adopt") as workers:
        try:
            for start, end, words in cut_file(fd, name, path, size):
                if not free:
                    finish_next()
                buffer = free.pop()
                plain = memoryview(buffer)[: end - start]
                waiting.append((workers.submit(hash_chunk, start, words, plain), buffer))
            while waiting:
                finish_next()
        finally:
            for future, _ in waiting:
                future.cancel()
    return whole.id(), pieces


@contextlib.contextmanager
def _removed_unless_published(temp: Path) -> Iterator[None]:
    try:
        yield
    finally:
        durable.remove(temp)


def _is_adopted(store: Store, status: os.stat_result) -> bool:
    """Whether this very file is in the store already; it then needs no further name unless it has changed."""
    if status.st_nlink > 1:
        for path in list_adopted(store).values():
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(path.lstat(), status):
                    return True
    return False


def _why_not_linked(fd: int, status: os.stat_result) -> str:
    if status.st_mode & 0o222 and os.geteuid() not in (0, status.st_uid):
        return "it belongs to another user, who can write to it"
    return "somebody has it open for writing" if _is_written_to(fd) else ""


def _is_written_to(fd: int) -> bool:
    """Whether anybody has the file open for writing, as far as the system tells: it then grants no read lease."""
    if not hasattr(fcntl, "F_SETLEASE"):
        return False
    try:
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)  # a writer who comes now is told of by a signal that is ignored
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as exc:
        return exc.errno == errno.EAGAIN
    return False
