"""From a file's bytes to chunks: where to cut, what the bytes are. Tensors are cut at their boundaries, all else by
content (FastCDC), so that a renamed, re-sharded or edited file finds its parts again.

Never holds a file in memory: opaque files pass through a window of a few chunks, tensors are read chunk by chunk.
"""

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from posixpath import dirname
from typing import BinaryIO, Final

from llmos_cli.errors import LlmosError, Unsafe, from_os_error
from llmos_cli.formats import limits
from llmos_cli.formats.codec import OPAQUE, Words
from llmos_cli.formats.ids import Buffer
from llmos_cli.formats.manifest import Chunk, FileEntry
from llmos_cli.formats.names import check_path
from llmos_cli.formats.safetensors import check_tensor_name, encode_header, tensor_bytes, words_of
from llmos_cli.formats.tensors import TensorInfo, find_tensors
from llmos_cli.progress import Task
from llmos_cli.store.intake.bases import Base, nothing_near
from llmos_cli.store.packs.pipeline import Pipeline

# FastCDC sizes for files without tensors (minimum, average, maximum): small enough that an edit costs little
CDC_BYTES: Final = (256 * limits.KiB, 1 * limits.MiB, limits.CHUNK_BYTES)
_WINDOW_BYTES: Final = 4 * limits.CHUNK_BYTES
_OWN_CHUNK_BYTES: Final = 4 * limits.KiB  # below this a tensor of a foreign file costs more alone than it could save


@dataclass(frozen=True)
class Tensor:
    """A tensor to store: dtype by its safetensors name ("BF16"), shape, and its little-endian bytes when asked."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: Callable[[], Buffer]


def put_path(pipeline: Pipeline, name: str, path: Path, task: Task, base: Base | None = None) -> FileEntry:
    """Store a regular file; raises Damaged for a broken safetensors file, LlmosError if it changes while it is read."""
    check_path(name)
    with opened(path) as (fd, before):
        sink = _Sink(pipeline, task, [])
        tensors = find_tensors(name, partial(_pread, fd, path), before.st_size, str(path)) or ()
        near = base.near(name, tensors) if base else nothing_near
        for start, end, words in _cuts(name, tensors, before.st_size, partial(_pread, fd, path)):
            sink.put(start, end, words, filler(fd, path), near(start))
        entry = sink.entry(name)
        check_unchanged(path, before, os.fstat(fd))
    return entry


@contextmanager
def opened(path: Path) -> Iterator[tuple[int, os.stat_result]]:
    """A regular file, open for reading, and its status; raises Unsafe for anything else."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # O_NONBLOCK: a fifo must not hang us
    except OSError as exc:
        raise from_os_error(exc, f"reading {path}") from exc
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise Unsafe(f"{path} is not a regular file")
        yield fd, status
    finally:
        os.close(fd)


def check_unchanged(path: Path, before: os.stat_result, after: os.stat_result) -> None:
    """Raise LlmosError if a file was written to, or is another one."""
    if (before.st_size, before.st_mtime_ns, before.st_ino) != (after.st_size, after.st_mtime_ns, after.st_ino):
        raise LlmosError(f"{path} changed while it was read", hint="run the command again when nothing writes to it")


def cut_file(fd: int, name: str, path: Path, size: int) -> Iterator[tuple[int, int, Words]]:
    """Where the chunks of an open file begin and end, and what words they are made of. What `put_path` would store is
    cut the same."""
    read = partial(_pread, fd, path)
    return _cuts(name, find_tensors(name, read, size, str(path)) or (), size, read)


def put_stream(pipeline: Pipeline, name: str, stream: BinaryIO, task: Task) -> FileEntry:
    """Store what a stream gives, cut by content."""
    check_path(name)
    sink = _Sink(pipeline, task, [])
    window = bytearray()
    at_end = False
    while not at_end or window:
        while not at_end and len(window) < _WINDOW_BYTES:
            block = stream.read(_WINDOW_BYTES - len(window))
            at_end = not block
            window += block
        used = 0
        for cut in _cdc_cuts(bytes(window), final=at_end):
            sink.put(used, cut, OPAQUE, _copier(bytes(window[used:cut]), used))
            used = cut
        del window[:used]
    return sink.entry(name)


def put_tensors(
    pipeline: Pipeline,
    name: str,
    tensors: Sequence[Tensor],
    metadata: dict[str, str],
    task: Task,
    base: Base | None = None,
) -> FileEntry:
    """Store a safetensors file made of `tensors` in this order; each one's bytes are asked for when its turn comes."""
    check_path(name)
    for tensor in tensors:
        check_tensor_name(tensor.name, name)
    header = encode_header([(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors], metadata)
    sink = _Sink(pipeline, task, [])
    for start, end in _grid(0, len(header)):
        sink.put(start, end, OPAQUE, _copier(header, 0))
    for tensor in tensors:
        given = memoryview(tensor.data())
        data = given.cast("B") if given.nbytes else memoryview(b"")
        expected = tensor_bytes(tensor.dtype, tensor.shape, tensor.name)
        if len(data) != expected:
            raise ValueError(f"tensor {tensor.name!r} gave {len(data)} bytes instead of {expected}")
        words = words_of(tensor.dtype)
        for start, end in _grid(0, len(data)):
            near = base.chunk(dirname(name), tensor.name, start) if base else None
            sink.put(start, end, words, _copier(data, 0), near)
        pipeline.drain()  # the tensor's memory is the caller's again
    return sink.entry(name)


@dataclass(frozen=True)
class _Sink:
    """Where the chunks of one file go, in order."""

    pipeline: Pipeline
    task: Task
    chunks: list[Chunk]

    def put(
        self,
        start: int,
        end: int,
        words: Words,
        fill_from: Callable[[int, memoryview], None],
        base: Chunk | None = None,
    ) -> None:
        self.pipeline.put(end - start, words, lambda out: fill_from(start, out), self._done, base)

    def _done(self, chunk: Chunk) -> None:
        self.chunks.append(chunk)
        self.task.advance(chunk.size)

    def entry(self, name: str) -> FileEntry:
        self.pipeline.drain()
        return FileEntry(name, tuple(self.chunks))


def filler(fd: int, path: Path) -> Callable[[int, memoryview], None]:
    """Reads of an open file from a start on into memory."""

    def fill(start: int, out: memoryview) -> None:
        got = 0
        try:
            while got < len(out):
                count = os.preadv(fd, [out[got:]], start + got)
                if count == 0:
                    raise LlmosError(f"{path} became shorter while it was read", hint="run the command again")
                got += count
        except OSError as exc:
            raise from_os_error(exc, f"reading {path} at byte {start + got}") from exc

    return fill


def _copier(data: Buffer, origin: int) -> Callable[[int, memoryview], None]:
    view = memoryview(data)

    def fill(start: int, out: memoryview) -> None:
        out[:] = view[start - origin : start - origin + len(out)]

    return fill


def status_of(path: Path) -> os.stat_result:
    """A file's status; raises the error a user can act on."""
    try:
        return path.stat()
    except OSError as exc:
        raise from_os_error(exc, f"reading {path}") from exc


def reader(path: Path) -> Callable[[int, int], bytes]:
    """Reads of a file's bytes from start to end; each opens it anew."""

    def read(start: int, end: int) -> bytes:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as exc:
            raise from_os_error(exc, f"reading {path}") from exc
        try:
            return _pread(fd, path, start, end)
        finally:
            os.close(fd)

    return read


def _pread(fd: int, path: Path, start: int, end: int) -> bytes:
    out = bytearray(max(0, end - start))
    filler(fd, path)(start, memoryview(out))
    return bytes(out)


def _cuts(
    name: str, tensors: Sequence[TensorInfo], size: int, read: Callable[[int, int], bytes]
) -> Iterator[tuple[int, int, Words]]:
    """Tensors on a grid from their own start, so that each is found again in whatever file it lies; between them, the
    bytes as they fall."""
    own = name.endswith(".safetensors")  # cut as `put_tensors` cuts it
    at = 0
    for tensor in tensors:
        if tensor.end - tensor.start < (1 if own else _OWN_CHUNK_BYTES):
            continue
        for start, end in _grid(at, tensor.start) if own else _by_content(at, tensor.start, read):
            yield start, end, OPAQUE
        for start, end in _grid(tensor.start, tensor.end):
            yield start, end, tensor.words
        at = tensor.end
    for start, end in _grid(at, size) if own else _by_content(at, size, read):
        yield start, end, OPAQUE


def _by_content(start: int, stop: int, read: Callable[[int, int], bytes]) -> Iterator[tuple[int, int]]:
    """A run of bytes cut by FastCDC, window by window."""
    while start < stop:
        end = min(stop, start + _WINDOW_BYTES)
        ends = _cdc_cuts(read(start, end), final=end == stop)
        for first, last in pairwise([0, *ends]):
            yield start + first, start + last
        start += ends[-1]


def _grid(start: int, end: int) -> Iterator[tuple[int, int]]:
    """A run of bytes on a grid of whole chunks from its own start."""
    while start < end:
        stop = min(end, start + limits.CHUNK_BYTES)
        yield start, stop
        start = stop


def _cdc_cuts(window: bytes, *, final: bool) -> list[int]:
    """Ends of the chunks that begin in a window; without `final`, only those that more bytes cannot move."""
    minimum, average, maximum = CDC_BYTES
    if len(window) <= minimum:
        return [len(window)] if final and window else []
    from pyfastcdc import FastCDC

    ends = [
        chunk.offset + chunk.length for chunk in FastCDC(average, min_size=minimum, max_size=maximum).cut_buf(window)
    ]
    return ends if final else [end for end in ends if end <= len(window) - maximum] or ends[:1]
