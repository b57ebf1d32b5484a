"""What is reachable: from refs, their recent moves, snapshots and leases to manifests, from manifests to chunks.

A root that cannot be read is an error, never "nothing": what cannot be listed must not look like garbage.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from llmos_cli.errors import Damaged, UnknownVersion
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.manifest import Manifest, listed_chunks
from llmos_cli.formats.names import RefName
from llmos_cli.store.handle import Store
from llmos_cli.store.leases import live_leases
from llmos_cli.store.packs.objects import read_object
from llmos_cli.store.refs.refs import read_ref, ref_history, ref_names
from llmos_cli.store.refs.snapshots import read_snapshots


@dataclass(frozen=True)
class Root:
    """A manifest that keeps objects alive, and why. `required`: it must be there (a current ref, a lease)."""

    id: ObjectId
    why: str
    ref: RefName | None
    required: bool


def find_roots(store: Store, *, since: float) -> list[Root]:
    """Current refs, moves of refs younger than `since` (a Unix time) with what they replaced, snapshots of backups, and
    live leases."""
    roots = []
    for ref in ref_names(store):
        history = ref_history(store, ref)
        current = history[0] if history else read_ref(store, ref)  # which raises if none of its moves can be read
        if current is None:
            continue
        roots.append(Root(current.id, f"ref {ref}", ref, True))
        for number, move in enumerate(history):
            recent = _unix(move.time) >= since
            if number and recent:
                roots.append(Root(move.id, f"log of {ref}", ref, False))
            if move.previous and recent:  # it was current until this move
                roots.append(Root(move.previous, f"log of {ref}", ref, False))
    for name, snapshot in read_snapshots(store):
        roots.extend(Root(oid, f"snapshot {name.time}-{name.id.short}", None, True) for oid in snapshot.manifests)
    for lease in live_leases(store):
        roots.extend(Root(oid, f"lease of process {lease.process.pid}", None, True) for oid in lease.objects)
    return roots


def objects_of(oid: ObjectId, manifest: Manifest) -> Iterable[ObjectId]:
    """A manifest and its chunks."""
    yield oid
    for entry in manifest.files:
        for chunk in entry.chunks:
            yield chunk.id


def reachable(store: Store, roots: Iterable[Root]) -> set[bytes]:
    """Every object that some root needs, delta bases included; raises Damaged if a required manifest is unreadable."""
    live = named_by(store, roots)
    live |= store.index.bases(live)
    return live


def named_by(store: Store, roots: Iterable[Root]) -> set[bytes]:
    """The manifests that are roots, and their chunks; raises Damaged if a required one is unreadable."""
    named: set[bytes] = set()
    for root in roots:
        if root.id not in named:
            named.update(chunks_of(store, root))
    return named


def chunks_of(store: Store, root: Root) -> Sequence[bytes]:
    """A root and the chunks of its manifest; nothing for an earlier value that cannot be read any more."""
    known = store.index.has(root.id)
    try:
        chunks = listed_chunks(read_object(store, root.id, verify_id=True))
    except Damaged as exc:
        if not (root.required or isinstance(exc, UnknownVersion)):
            if known:  # it may also be gone: a clone has only the newest values
                store.progress.warn(f"{root.why} cannot be read, so it keeps nothing alive: {exc.message}")
            return ()
        if not _is_root_yet(store, root.id):
            return ()
        raise Damaged(f"{root.why} cannot be read: {exc.message}", hint="see what is wrong: llmos fsck") from exc
    return [root.id, *chunks]


def _is_root_yet(store: Store, oid: ObjectId) -> bool:
    """Since the roots were listed a ref may have gone or moved on, and its old value with it."""
    return any(root.required and root.id == oid for root in find_roots(store, since=float("inf")))


def _unix(time: str) -> float:
    try:
        return datetime.fromisoformat(time).timestamp()
    except ValueError:
        return float("inf")  # an odd time keeps what it guards
