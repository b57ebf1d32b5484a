"""The write pipeline: chunks are hashed and encoded on every core, and written by one ordered writer.

Bounded memory: at most `2 * cores + 2` chunks are in flight, each in a buffer of a pool that is used again. Packs are
fsynced by a thread of their own while the next one fills. zstd, BLAKE3 and numpy release the GIL.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Final

from llmos_cli.formats import codec, limits
from llmos_cli.formats.frame import CHUNK, MANIFEST, Frame, encode_header, new_frame
from llmos_cli.formats.ids import Buffer, ObjectId, object_id
from llmos_cli.formats.manifest import Chunk
from llmos_cli.store.handle import Store
from llmos_cli.store.packs.deltas import encode_delta
from llmos_cli.store.packs.packs import PackWriter

MAX_WORKERS: Final = 16

Fill = Callable[[memoryview], None]


@dataclass
class Written:
    """What a pipeline has done so far: bytes added to the store, plain bytes that were there already, plain bytes that
    were stored as deltas, plain bytes that stay in adopted files."""

    stored: int = 0
    reused: int = 0
    as_delta: int = 0
    adopted: int = 0
    packs: list[ObjectId] = field(default_factory=list)


@dataclass(frozen=True)
class _Encoded:
    """A chunk that has been through a worker; `frame` is None if its object is in the store already."""

    chunk: Chunk
    frame: Frame | None
    header: bytes
    parts: Sequence[Buffer]


class Pipeline:
    """Turns runs of bytes into stored chunks. Used by one thread; `drain` before reading the chunks."""

    def __init__(self, store: Store) -> None:
        self._store = store
        window = 2 * cores() + 2
        self._workers = ThreadPoolExecutor(cores(), "encode")
        self._finisher = ThreadPoolExecutor(1, "publish")
        self._finishing: list[Future[ObjectId]] = []
        self._buffers: SimpleQueue[bytearray] = SimpleQueue()
        for _ in range(window):
            self._buffers.put(bytearray())
        self._in_flight: deque[tuple[Future[_Encoded], bytearray, Callable[[Chunk], None]]] = deque()
        self._claimed: set[ObjectId] = set()
        self._claim_lock = threading.Lock()
        self._pack: PackWriter | None = None
        self.written = Written()

    def put(
        self, size: int, words: codec.Words, fill: Fill, done: Callable[[Chunk], None], base: Chunk | None = None
    ) -> None:
        """Store a chunk of `size` bytes that `fill` writes into a buffer (in a worker); `done` gets it, in order.

        `base` is a stored chunk that it is likely to resemble.
        """
        while self._buffers.empty():
            self._write_next()
        buffer = self._buffers.get()
        if len(buffer) < 2 * size:  # half for plain bytes, half for planes; grown to the size of a chunk and kept
            buffer = bytearray(2 * min(limits.CHUNK_BYTES, 4 * size))
        self._in_flight.append((self._workers.submit(self._encode, size, words, fill, buffer, base), buffer, done))

    def claim(self, oid: ObjectId) -> bool:
        """Whether an object is neither stored nor about to be; if so, the caller must store it."""
        with self._claim_lock:
            claimed = oid in self._claimed
            self._claimed.add(oid)
        return not claimed and not self._store.index.has(oid)

    def put_adopted(self, pieces: Sequence[tuple[Chunk, codec.Encoded]], file: ObjectId) -> None:
        """Store claimed chunks that lie in an adopted file: in packs of their own, which live as long as the file."""
        self.drain()
        self._close_pack()
        for chunk, encoded in pieces:
            frame = new_frame(CHUNK, chunk.id, chunk.size, encoded, file)
            self._append(frame, encode_header(frame), encoded.parts)
            self.written.adopted += chunk.size
        self._close_pack()

    def drain(self) -> None:
        """Write everything that is in flight."""
        while self._in_flight:
            self._write_next()

    def put_manifest(self, oid: ObjectId, data: bytes) -> None:
        """Append a manifest: the last frame of the last pack, visible only with or after everything it names."""
        self.drain()
        encoded = codec.encode(memoryview(data), codec.OPAQUE)
        frame = new_frame(MANIFEST, oid, len(data), encoded)
        self._append(frame, encode_header(frame), encoded.parts)

    def finish(self) -> Written:
        """Make all packs durable and visible."""
        self.drain()
        self._close_pack()
        while self._finishing:
            self.written.packs.append(self._finishing.pop(0).result())
        return self.written

    def close(self) -> None:
        """Stop; what has not been published is discarded."""
        for future, *_ in self._in_flight:
            future.cancel()
        self._workers.shutdown(wait=True, cancel_futures=True)
        self._in_flight.clear()
        self._finisher.shutdown(wait=True)
        if self._pack:
            self._pack.discard()
            self._pack = None

    def _encode(self, size: int, words: codec.Words, fill: Fill, buffer: bytearray, base: Chunk | None) -> _Encoded:
        plain = memoryview(buffer)[:size]
        fill(plain)
        oid = object_id(plain)
        chunk = Chunk(oid, size)
        if not self.claim(oid):
            return _Encoded(chunk, None, b"", ())
        room = memoryview(buffer)[len(buffer) // 2 :][:size]
        delta = encode_delta(self._store, oid, plain, words, base, room) if base else None
        if delta:
            frame = new_frame(CHUNK, oid, size, delta.encoded, delta.base, delta.depth)
            return _Encoded(chunk, frame, encode_header(frame), delta.encoded.parts)
        encoded = codec.encode(plain, words, room)
        frame = new_frame(CHUNK, oid, size, encoded)
        return _Encoded(chunk, frame, encode_header(frame), encoded.parts)

    def _write_next(self) -> None:
        future, buffer, done = self._in_flight.popleft()
        try:
            item = future.result()
            if item.frame:
                self.written.as_delta += item.chunk.size if item.frame.depth else 0
                self._append(item.frame, item.header, item.parts)
            else:
                self.written.reused += item.chunk.size
        finally:
            self._buffers.put(buffer)
        done(item.chunk)

    def _append(self, frame: Frame, header: bytes, parts: Sequence[Buffer]) -> None:
        if self._pack is None:
            self._pack = PackWriter(self._store.tmp)
        self.written.stored += self._pack.append(frame, header, parts).stored_size
        if self._pack.is_full():
            self._close_pack()

    def _close_pack(self) -> None:
        if self._pack is None:
            return
        while len(self._finishing) > 2 or (self._finishing and self._finishing[0].done()):
            self.written.packs.append(self._finishing.pop(0).result())  # if that failed, `close` discards this one
        self._finishing.append(self._finisher.submit(self._pack.publish, self._store))
        self._pack = None


@contextmanager
def open_pipeline(store: Store) -> Iterator[Pipeline]:
    pipeline = Pipeline(store)
    try:
        yield pipeline
    finally:
        pipeline.close()


def cores() -> int:
    """How many threads are worth having."""
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, MAX_WORKERS)
