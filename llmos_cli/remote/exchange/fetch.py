"""Bringing frames from a remote into the store. Nothing becomes visible before it is proven.

A remote may be broken or hostile, and the index of a pack may lie. Every frame is compared with its index line, its
checksum, its decoded size and the BLAKE3 id of its plain bytes; a manifest must also read as one. A pack is written
anew from its proven frames, so a pack taken as a whole has its name only if every byte of it was what it should be.
A delta is proven on its base, which is taken from the store (bases are fetched before what rests on them) or, if it is
not there yet, from the remote.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Final

from llmos_cli.errors import Damaged, LlmosError, NotFound, Unsafe
from llmos_cli.formats import limits
from llmos_cli.formats.frame import HEADER_BYTES, MANIFEST, Frame, check_id, decode_payload
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.manifest import Manifest, decode_manifest
from llmos_cli.formats.pack import Entry, aligned, check_entry
from llmos_cli.progress import Task
from llmos_cli.remote.exchange.catalog import Catalog, Place, RemotePack
from llmos_cli.remote.exchange.parallel import in_order
from llmos_cli.remote.transports.transport import Transport
from llmos_cli.store.handle import Store
from llmos_cli.store.packs.frames import BaseReader, indexed_base, scratch
from llmos_cli.store.packs.packs import PackWriter

_WORKERS: Final = max(4, min(os.cpu_count() or 1, 16))
_SPAN_BYTES: Final = 8 * limits.MiB  # neighbouring frames are read together up to this much
_READ_AHEAD_BYTES: Final = (_WORKERS + 2) * _SPAN_BYTES
_REMEDY: Final = "remove that pack there, then push again from a store that is whole"
_one_manifest = threading.Lock()  # up to 512 MiB each while they are decoded: one at a time


@dataclass(frozen=True)
class Fetch:
    """What to take from one pack: some entries, in file order, or the `whole` pack."""

    pack: RemotePack
    entries: tuple[Entry, ...]
    whole: bool

    @property
    def size(self) -> int:
        return sum(entry.stored_size for entry in self.entries)

    @property
    def depth(self) -> int:
        return max(entry.depth for entry in self.entries)


class BadPack(Exception):
    """Something in a remote pack has proven wrong: one object, or (`id` None) the pack as a whole."""

    def __init__(self, pack: ObjectId, oid: ObjectId | None, problem: LlmosError) -> None:
        super().__init__(problem.message)
        self.pack = pack
        self.id = oid
        self.problem = problem


@dataclass(frozen=True)
class _Span:
    """Neighbouring frames of a pack, read together; `last` ends its pack."""

    fetch: Fetch
    entries: tuple[Entry, ...]
    last: bool


@dataclass(frozen=True)
class Proven:
    """A frame whose bytes have been found to be what its index line and its id say."""

    frame: Frame
    header: memoryview
    payload: memoryview


def fetch_manifest(transport: Transport, place: Place) -> Manifest:
    """A manifest, proven by its id; raises BadPack."""
    proven = prove_object(transport, place, _no_base)
    plain = bytearray(proven.frame.plain_size)
    decode_payload(proven.frame, proven.payload, memoryview(plain))
    return decode_manifest(bytes(plain))


def prove_object(transport: Transport, place: Place, base_of: BaseReader) -> Proven:
    """Read one object where it lies and prove it; raises BadPack."""
    span = _Span(Fetch(place.pack, (place.entry,), False), (place.entry,), True)
    return _prove_span(transport, base_of, span)[1][0]


def fetch(
    store: Store,
    transport: Transport,
    fetches: Sequence[Fetch],
    catalog: Catalog,
    installed: dict[ObjectId, int],
    task: Task,
) -> None:
    """Take packs and frames into the store; the packs it grows by are noted in `installed` with their sizes.

    Raises BadPack at the first thing that proves wrong; what was proven by then is kept, so that a next try asks for
    less.
    """
    base_of = partial(remote_base, store, transport, catalog)
    for depth in sorted({item.depth for item in fetches}):
        _fetch(store, transport, [item for item in fetches if item.depth == depth], base_of, installed, task)


def _fetch(
    store: Store,
    transport: Transport,
    fetches: Sequence[Fetch],
    base_of: BaseReader,
    installed: dict[ObjectId, int],
    task: Task,
) -> None:
    installer = _Installer(store, transport, installed)
    prove = partial(_prove_span, transport, base_of)
    try:
        spans = in_order(prove, _spans(fetches), workers=_WORKERS, limit=_READ_AHEAD_BYTES, weigh=_weigh)
        with closing(spans) as proven:
            for span, frames in proven:
                installer.take(span, frames)
                task.advance(sum(entry.stored_size for entry in span.entries))
        installer.flush()
    except BadPack:
        installer.flush()
        raise
    finally:
        installer.close()


class _Installer:
    """Writes proven frames into packs: a pack taken whole into one of the same name, ranges into packs of their own."""

    def __init__(self, store: Store, transport: Transport, installed: dict[ObjectId, int]) -> None:
        self._store = store
        self._transport = transport
        self._installed = installed
        self._whole: PackWriter | None = None
        self._ranges: PackWriter | None = None
        self._finisher = ThreadPoolExecutor(1, "install")
        self._finishing: list[Future[None]] = []

    def take(self, span: _Span, frames: Sequence[Proven]) -> None:
        if span.fetch.whole:
            self._whole = writer = self._whole or PackWriter(self._store.tmp)
        else:
            self._ranges = writer = self._ranges or PackWriter(self._store.tmp)
        for proven in frames:
            writer.append(proven.frame, bytes(proven.header), (proven.payload,))
        if span.fetch.whole and span.last:
            self._whole = None
            self._finish(writer, span.fetch.pack)
        elif writer is self._ranges and writer.is_full():
            self._ranges = None
            self._finish(writer, None)

    def flush(self) -> None:
        """Install what is complete."""
        writer, self._ranges = self._ranges, None
        if writer:
            self._finish(writer, None)
        while self._finishing:
            self._finishing.pop(0).result()

    def close(self) -> None:
        """Stop; what is not complete is discarded."""
        self._finisher.shutdown(wait=True)
        for writer in (self._whole, self._ranges):
            if writer:
                writer.discard()
        self._whole = self._ranges = None

    def _finish(self, writer: PackWriter, expected: RemotePack | None) -> None:
        while len(self._finishing) > 2 or (self._finishing and self._finishing[0].done()):
            self._finishing.pop(0).result()
        self._finishing.append(self._finisher.submit(self._install, writer, expected))

    def _install(self, writer: PackWriter, expected: RemotePack | None) -> None:
        name = writer.finish()
        if expected and name != expected.name:
            writer.discard()
            message = f"pack {expected.key} at {self._transport.url} does not have the bytes its name stands for"
            raise BadPack(expected.name, None, Damaged(message, hint=_REMEDY))
        self._installed[writer.install(self._store)] = writer.size


def _spans(fetches: Sequence[Fetch]) -> Iterator[_Span]:
    for fetched in fetches:
        span: list[Entry] = []
        for entry in fetched.entries:
            if span and (entry.offset != aligned(span[-1].end) or entry.end - span[0].offset > _SPAN_BYTES):
                yield _Span(fetched, tuple(span), False)
                span = []
            span.append(entry)
        yield _Span(fetched, tuple(span), True)


def _weigh(span: _Span) -> int:
    return span.entries[-1].end - span.entries[0].offset


def _prove_span(transport: Transport, base_of: BaseReader, span: _Span) -> tuple[_Span, list[Proven]]:
    """Read and prove neighbouring frames; what is wrong is read a second time: it may have been spoiled on the way."""
    data = _read_span(transport, span)
    try:
        return span, _prove_frames(transport, base_of, span, data)
    except BadPack:
        again = _read_span(transport, span)
        if again == data:
            raise
        return span, _prove_frames(transport, base_of, span, again)


def _read_span(transport: Transport, span: _Span) -> bytes:
    pack = span.fetch.pack
    try:
        return transport.read(pack.key, span.entries[0].offset, span.entries[-1].end)
    except NotFound as exc:
        raise BadPack(pack.name, None, exc) from exc


def _prove_frames(transport: Transport, base_of: BaseReader, span: _Span, data: bytes) -> list[Proven]:
    pack, start, view = span.fetch.pack, span.entries[0].offset, memoryview(data)
    proven = []
    for entry in span.entries:
        try:
            proven.append(_prove(entry, view[entry.offset - start : entry.end - start], base_of))
        except (Damaged, Unsafe) as exc:
            message = f"{exc.message} ({pack.key} at {transport.url})"
            raise BadPack(pack.name, entry.id, type(exc)(message, hint=exc.hint or _REMEDY)) from exc
    return proven


def _prove(entry: Entry, data: memoryview, base_of: BaseReader) -> Proven:
    header, payload = data[:HEADER_BYTES], data[HEADER_BYTES:]
    frame = check_entry(entry, header)
    if frame.kind == MANIFEST:
        with _one_manifest:
            plain = bytearray(frame.plain_size)
            decode_payload(frame, payload, memoryview(plain))
            check_id(frame, plain)
            decode_manifest(bytes(plain))
    else:
        base = base_of(entry) if entry.depth else None
        out = scratch(frame.plain_size)
        decode_payload(frame, payload, out, base)
        check_id(frame, out)
    return Proven(frame, header, payload)


def remote_base(store: Store, transport: Transport, catalog: Catalog, delta: Entry) -> memoryview:
    """The base of a delta, from the store or from the remote."""
    try:
        return indexed_base(store, delta)
    except Damaged as exc:
        found = read_in_place(store, transport, catalog, delta.base, below=delta.depth)
        if found is None:
            raise exc
        return found[1]


def read_in_place(
    store: Store, transport: Transport, catalog: Catalog, oid: ObjectId, *, below: int = limits.DELTA_DEPTH + 1
) -> tuple[Entry, memoryview] | None:
    """An object's plain bytes from the remote, proven and not kept; None if it is not there. Copies of depth `below` or
    deeper do not count. Raises Damaged if no copy is what it should be."""
    base_of = partial(remote_base, store, transport, catalog)
    problem: Damaged | None = None
    for place in catalog.places(oid):
        if place.entry.depth >= below:
            continue
        try:
            proven = prove_object(transport, place, base_of)
        except BadPack as exc:
            problem = Damaged(exc.problem.message, hint=exc.problem.hint)
            continue
        base = base_of(place.entry) if place.entry.depth else None
        plain = memoryview(bytearray(proven.frame.plain_size))
        decode_payload(proven.frame, proven.payload, plain, base)
        return place.entry, plain
    if problem:
        raise problem
    return None


def _no_base(delta: Entry) -> memoryview:
    raise Damaged(f"object {delta.id.short} is a delta, which a manifest never is")
