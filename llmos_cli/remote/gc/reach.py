"""What is reachable at a remote: from its refs, their kept history, its snapshots, and the leases of those who work in
it where it is a store itself, to manifests and chunks.

What cannot be listed or read is an error, never "nothing". Manifests are read here where the store has them.
"""

from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Final

from llmos_cli.errors import Damaged, NotFound, UnknownVersion
from llmos_cli.formats import limits
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.manifest import listed_chunks
from llmos_cli.formats.names import RefName
from llmos_cli.formats.reflog import RefEntry
from llmos_cli.remote.backup.snapshots import fetch_snapshot, snapshot_names
from llmos_cli.remote.exchange.catalog import Catalog
from llmos_cli.remote.exchange.fetch import read_in_place
from llmos_cli.remote.exchange.parallel import in_order
from llmos_cli.remote.exchange.refs import RemoteRef, list_moves, remote_log
from llmos_cli.remote.transports.transport import Transport
from llmos_cli.store.handle import Store
from llmos_cli.store.leases import STALE_SECONDS, parse_lease
from llmos_cli.store.packs.objects import read_object
from llmos_cli.store.refs.moves import unix_time

_LEASES: Final = "leases/"
_LEASE_BYTES: Final = limits.MiB
_STREAMS: Final = 8
_READERS: Final = 2
_TRIES: Final = 3


@dataclass(frozen=True)
class RemoteRoot:
    """A manifest that keeps objects alive, and why. `required`: it must be there."""

    id: ObjectId
    why: str
    required: bool


@dataclass(frozen=True)
class Roots:
    """`writers`: how many are writing in the remote as in a store of their own."""

    found: tuple[RemoteRoot, ...]
    writers: int


def find_roots(transport: Transport, *, now: float, keep_seconds: float) -> Roots:
    """All that keeps objects alive at a remote, where the time is `now`; moves count for `keep_seconds`."""
    roots: list[RemoteRoot] = []
    for ref, log in _logs(transport):
        roots.append(RemoteRoot(log[0].id, f"ref {ref}", True))
        for number, move in enumerate(log):
            if unix_time(move.time) >= now - keep_seconds:
                earlier = ([move.id] if number else []) + ([move.previous] if move.previous else [])
                roots += [RemoteRoot(oid, f"log of {ref}", False) for oid in earlier]
    for name in snapshot_names(transport):
        try:
            snapshot = fetch_snapshot(transport, name)
        except NotFound:
            continue  # pruned meanwhile
        roots += [RemoteRoot(oid, f"snapshot {name.time}-{name.id.short}", True) for oid in snapshot.manifests]
    writers = 0
    for item in transport.dated(_LEASES):
        if item.key.endswith(".json") and now - item.time < STALE_SECONDS:
            try:
                objects, writes = parse_lease(transport.read(item.key, 0, _LEASE_BYTES), f"{transport.url}/{item.key}")
            except NotFound:
                continue
            roots += [RemoteRoot(oid, f"the lease {item.key}", True) for oid in objects]
            writers += writes
    return Roots(tuple(roots), writers)


def named_by(store: Store, transport: Transport, catalog: Catalog, roots: Iterable[RemoteRoot]) -> set[bytes]:
    """The manifests that are roots, and their chunks; raises Damaged if a required one is unreadable."""
    once: dict[ObjectId, RemoteRoot] = {}
    for root in roots:
        if root.required or root.id not in once:
            once[root.id] = root

    def read(root: RemoteRoot) -> tuple[ObjectId, list[bytes]] | None:
        try:
            return root.id, listed_chunks(_manifest(store, transport, catalog, root.id))
        except UnknownVersion:
            raise
        except Damaged as exc:
            if not root.required:
                return None  # a clone pushes only the newest values, and what is gone keeps nothing
            raise Damaged(
                f"{root.why} at {transport.url} cannot be read: {exc.message}",
                hint="push it anew from a store that has it, then run the command again",
            ) from exc

    named: set[bytes] = set()
    with closing(in_order(read, once.values(), workers=_READERS)) as found:
        for item in found:
            if item:
                named.add(item[0])
                named.update(item[1])
    return named


def _manifest(store: Store, transport: Transport, catalog: Catalog, oid: ObjectId) -> bytes:
    if store.index.has(oid):
        try:
            return read_object(store, oid, verify_id=True)
        except Damaged:
            pass
    found = read_in_place(store, transport, catalog, oid)
    if found is None:
        raise Damaged(f"object {oid.short} is missing")
    return bytes(found[1])


def _logs(transport: Transport) -> Iterator[tuple[RefName, list[RefEntry]]]:
    """Every ref with its moves, newest first; raises Damaged if the newest cannot be read."""

    def read(item: tuple[RefName, tuple[int, ...]]) -> tuple[RefName, list[RefEntry]]:
        ref, sequences = item
        for _ in range(_TRIES):
            log = list(remote_log(transport, RemoteRef(ref, sequences)))
            if not sequences or (log and log[0].sequence == sequences[-1]):
                return ref, log
            sequences = list_moves(transport, ref).get(ref, ())  # it may have gone or moved on meanwhile
        raise Damaged(
            f"the newest move of ref {ref} at {transport.url} cannot be read, so nobody knows what it needs",
            hint="push the ref anew with --force, or remove it there",
        )

    with closing(in_order(read, list_moves(transport).items(), workers=_STREAMS)) as logs:
        for ref, log in logs:
            if log:
                yield ref, log
