"""Sending packs: which ones, made how, and the confirmation that they have arrived.

A chunk that lies in an adopted file is encoded on the way: the other side has no such file.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from llmos_cli.errors import Damaged, Interrupted, NotFound, RemoteUnavailable
from llmos_cli.formats import codec, limits
from llmos_cli.formats.codec import ADOPTED
from llmos_cli.formats.frame import HEADER_BYTES, Frame, check_id, check_payload, encode_header, new_frame
from llmos_cli.formats.ids import Buffer, ObjectId
from llmos_cli.formats.layout import pack_key
from llmos_cli.formats.pack import ENTRY_SIZE, HEADER_SIZE, TRAILER_SIZE, Entry, aligned
from llmos_cli.progress import Task
from llmos_cli.remote.exchange.catalog import Place, RemotePack, list_trash, read_remote_pack
from llmos_cli.remote.exchange.fetch import BadPack, prove_object
from llmos_cli.remote.exchange.parallel import in_order
from llmos_cli.remote.exchange.remembered import Memory, recall
from llmos_cli.remote.pool.pool import PoolTransport
from llmos_cli.remote.transports.transport import Transport
from llmos_cli.store.handle import Store
from llmos_cli.store.packs.frames import decode_read, indexed_base, read_frame
from llmos_cli.store.packs.packs import PackWriter

_STREAMS: Final = 2  # one is sent while another is made or confirmed; a transport sends one at a time
_WHOLE_SHARE: Final = 0.5


@dataclass(frozen=True)
class WholePack:
    """A pack of the store that travels as it is."""

    name: ObjectId
    size: int
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class FreshPack:
    """A pack to be made for the journey from frames of the store's packs, given as (pack, entry)."""

    frames: tuple[tuple[ObjectId, Entry], ...]

    @property
    def size(self) -> int:
        return HEADER_SIZE + TRAILER_SIZE + sum(_travel_size(entry) for _, entry in self.frames)


Shipment = WholePack | FreshPack


def plan_shipments(store: Store, needed: Set[ObjectId], missing: Set[ObjectId]) -> tuple[Shipment, ...]:
    """How `missing` objects travel, of the `needed` ones that may; raises Damaged for an object the store lacks."""
    by_pack: defaultdict[ObjectId, list[Entry]] = defaultdict(list)
    for oid in missing:
        here = store.index.locate(oid)
        if not here:
            raise Damaged(f"object {oid.short} is missing from the store", hint="see what it affects: llmos fsck")
        best = min(here, key=lambda copy: copy.entry.codec == ADOPTED)
        by_pack[best.pack].append(best.entry)
    sizes = store.index.packs()
    whole: list[Shipment] = []
    frames: list[tuple[ObjectId, Entry]] = []
    for name in sorted(by_pack):
        entries = tuple(store.index.entries(name))
        worth = sum(entry.stored_size for entry in by_pack[name]) >= _WHOLE_SHARE * sizes[name]
        if worth and all(entry.id in needed and entry.codec != ADOPTED for entry in entries):
            whole.append(WholePack(name, sizes[name], entries))
        else:
            frames += [(name, entry) for entry in sorted(by_pack[name], key=lambda entry: entry.offset)]
    return (*whole, *_fresh_packs(frames))


def send(
    store: Store, transport: Transport, shipments: Sequence[Shipment], sent: dict[ObjectId, int], task: Task
) -> None:
    """Send packs and confirm each; what has arrived is noted in `sent` with its size, or 0 if it only had to be brought
    back from the trash there.

    Raises FileNotFoundError if a pack of the store is gone, Damaged if one is not what it should be.
    """
    memory, counted = recall(store, transport), _Stoppable(task)
    aside = {} if isinstance(transport, PoolTransport) or not shipments else list_trash(transport)

    def send_one(shipment: Shipment) -> tuple[RemotePack, int]:
        if isinstance(shipment, WholePack):
            pack = RemotePack(shipment.name, shipment.size, shipment.entries)
            if _bring_back(store, transport, pack, aside):
                counted.advance(pack.size)
                return pack, 0
            try:
                transport.put_file(pack.key, store.pack_path(pack.name), pack.name, counted)
            except Damaged:  # maybe only its index: its frames are checked one by one, and a broken one is named
                pack = _send_fresh(store, transport, FreshPack(tuple((pack.name, e) for e in pack.entries)), counted)
        else:
            pack = _send_fresh(store, transport, shipment, counted)
        _confirm(store, transport, pack, memory if isinstance(shipment, FreshPack) else None)
        return pack, pack.size

    with closing(in_order(send_one, shipments, workers=_STREAMS, limit=_STREAMS)) as arrived:
        try:
            for pack, size in arrived:
                sent[pack.name] = size
                counted.note(f"{len(sent)} of {len(shipments)} packs")
        except BaseException:
            counted.stop()
            raise
        finally:
            memory.save()


def _bring_back(
    store: Store, transport: Transport, pack: RemotePack, aside: Mapping[ObjectId, tuple[str, int]]
) -> bool:
    """Take a pack out of the trash there, where a gc has put it; False if it must be sent. Not in a pool: it may lie in
    the trash of fewer nodes than it must be at."""
    if pack.name not in aside:
        return False
    try:
        transport.bring_back(aside[pack.name][0], pack.key)
        _confirm(store, transport, pack, None)
    except (NotFound, RemoteUnavailable):
        return False
    return True


class _Stoppable:
    """A task that ends what is under way, at its next block, once one transfer has failed or the user has said stop."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._stopped = False

    def stop(self) -> None:
        self._stopped = True

    def advance(self, amount: int = 1) -> None:
        if self._stopped:
            raise Interrupted("stopped")
        self._task.advance(amount)

    def note(self, text: str) -> None:
        self._task.note(text)


def _fresh_packs(frames: Sequence[tuple[ObjectId, Entry]]) -> list[FreshPack]:
    """Cut at the target size, in an order that does not depend on what was sent before."""
    packs, start, size = [], 0, 0
    for number, (_, entry) in enumerate(frames):
        if number > start and size + _travel_size(entry) > limits.PACK_TARGET_BYTES:
            packs.append(FreshPack(tuple(frames[start:number])))
            start, size = number, 0
        size += _travel_size(entry)
    return [*packs, FreshPack(tuple(frames[start:]))] if frames else []


def _travel_size(entry: Entry) -> int:
    """What a frame takes in a pack made for the journey; of an adopted chunk the most it can take."""
    if entry.codec == ADOPTED:
        return aligned(HEADER_BYTES + entry.plain_size) + ENTRY_SIZE
    return entry.stored_size


def _send_fresh(store: Store, transport: Transport, shipment: FreshPack, task: Task) -> RemotePack:
    writer = _write_pack(store, shipment)
    try:
        pack = RemotePack(writer.finish(), writer.size, tuple(writer.entries))
        transport.put_file(pack.key, writer.path, pack.name, task)
    finally:
        writer.discard()
    return pack


def _write_pack(store: Store, shipment: FreshPack) -> PackWriter:
    writer = PackWriter(store.tmp)
    try:
        for pack, entry in shipment.frames:
            frame, payload = _read_whole(store.pack_path(pack), entry)
            if frame.codec == ADOPTED:
                frame, parts = _encoded(store, frame, payload)
                writer.append(frame, encode_header(frame), parts)
            else:
                writer.append(frame, encode_header(frame), (payload,))
    except BaseException:
        writer.discard()
        raise
    return writer


def _read_whole(path: Path, entry: Entry) -> tuple[Frame, memoryview]:
    try:
        frame, payload = read_frame(path, entry)
        check_payload(frame, payload)
    except Damaged as exc:
        raise Damaged(exc.message, hint="see what it affects: llmos fsck") from exc
    return frame, payload


def _encoded(store: Store, adopted: Frame, payload: memoryview) -> tuple[Frame, Sequence[Buffer]]:
    """An adopted chunk as a frame that stands on its own."""
    plain = memoryview(bytearray(adopted.plain_size))
    decode_read(store, adopted, payload, plain)
    check_id(adopted, plain)
    encoded = codec.encode(plain, codec.Words(adopted.width, adopted.rotated))
    return new_frame(adopted.kind, adopted.id, adopted.plain_size, encoded), encoded.parts


def _confirm(store: Store, transport: Transport, pack: RemotePack, memory: Memory | None) -> None:
    """Being told that a pack was stored is no proof: read its size, its index and one object back."""
    problem = RemoteUnavailable(
        f"{transport.url} does not have what it was just sent ({pack_key(pack.name)})",
        hint="run the command again; what has arrived is not sent twice",
    )
    if transport.size(pack.key) != pack.size:
        raise problem
    try:
        if read_remote_pack(transport, pack.name, pack.size, memory).entries != pack.entries:
            raise problem
        prove_object(transport, Place(pack, pack.entries[-1]), partial(indexed_base, store))
    except (Damaged, NotFound, BadPack) as exc:
        raise problem from exc
