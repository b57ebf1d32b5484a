"""What is reachable: from refs, their recent moves and leases to manifests, and from manifests to chunks.

A root that cannot be read is an error, never "nothing": what cannot be listed must not look like garbage.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from llmos_cli.errors import Damaged, UnknownVersion
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.manifest import Manifest
from llmos_cli.formats.names import RefName
from llmos_cli.store.handle import Store
from llmos_cli.store.leases import live_leases
from llmos_cli.store.objects import read_manifest
from llmos_cli.store.refs import list_refs, ref_history


@dataclass(frozen=True)
class Root:
    """A manifest that keeps objects alive, and why. `required`: it must be there (a current ref, a lease)."""

    id: ObjectId
    why: str
    ref: RefName | None
    required: bool


def find_roots(store: Store, *, since: float) -> list[Root]:
    """Current refs, moves of refs younger than `since` (a Unix time) with what they replaced, and live leases."""
    roots = []
    for current in list_refs(store):
        roots.append(Root(current.id, f"ref {current.ref}", current.ref, True))
        for move in ref_history(store, current.ref):
            if move.sequence < current.sequence and _unix(move.time) >= since:
                roots.append(Root(move.id, f"log of {move.ref}", move.ref, False))
            if move.previous and _unix(move.time) >= since:  # it was current until this move
                roots.append(Root(move.previous, f"log of {move.ref}", move.ref, False))
    for lease in live_leases(store):
        roots.extend(Root(oid, f"lease of process {lease.process.pid}", None, True) for oid in lease.objects)
    return roots


def objects_of(oid: ObjectId, manifest: Manifest) -> Iterable[ObjectId]:
    """A manifest and its chunks."""
    yield oid
    for entry in manifest.files:
        for chunk in entry.chunks:
            yield chunk.id


def reachable(store: Store, roots: Iterable[Root]) -> set[ObjectId]:
    """Every object that some root needs, delta bases included; raises Damaged if a required manifest is unreadable."""
    live: set[ObjectId] = set()
    for root in roots:
        if root.id in live:
            continue
        known = store.index.has(root.id)
        try:
            manifest = read_manifest(store, root.id)
        except Damaged as exc:
            if not (root.required or isinstance(exc, UnknownVersion)):
                if known:  # it may also be gone: a clone has only the newest values
                    store.progress.warn(f"{root.why} cannot be read, so it keeps nothing alive: {exc.message}")
                continue
            raise Damaged(f"{root.why} cannot be read: {exc.message}", hint="see what is wrong: llmos fsck") from exc
        live.update(objects_of(root.id, manifest))
    return live | store.index.bases(live)


def _unix(time: str) -> float:
    try:
        return datetime.fromisoformat(time).timestamp()
    except ValueError:
        return float("inf")  # an odd time keeps what it guards
