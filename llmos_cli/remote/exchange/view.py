"""Looking at a remote without pulling: `REMOTE/REF` stands for what a ref is there.

A store that looks at a remote reads from there what it lacks: manifests, headers, small files, object by object, each
proven by its id. Nothing of it is kept. A remote is meant by its name, which like a ref's has no "/".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmos_cli.errors import Damaged, NotFound, UsageError
from llmos_cli.formats.frame import MANIFEST
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.names import RefName, parse_target
from llmos_cli.formats.pack import Entry
from llmos_cli.remote.exchange.catalog import Catalog, read_catalog
from llmos_cli.remote.exchange.fetch import read_in_place
from llmos_cli.remote.exchange.refs import RemoteRef, read_remote_ref, remote_log
from llmos_cli.remote.open import Remote, check_remote_name, find_remote, require_ready
from llmos_cli.store.handle import Store
from llmos_cli.store.packs.packs import sync_index


@dataclass(frozen=True)
class View:
    """A remote as a place to read from."""

    store: Store
    remote: Remote
    catalog: Catalog

    @property
    def label(self) -> str:
        return self.remote.label

    def entries(self, oid: ObjectId) -> Sequence[Entry]:
        return [place.entry for place in self.catalog.places(oid)]

    def read(self, oid: ObjectId) -> tuple[Entry, memoryview] | None:
        found = read_in_place(self.store, self.remote.transport, self.catalog, oid)
        if found is None and oid in self.catalog.adopted:
            raise Damaged(
                f"object {oid.short} cannot be read at {self.label}: it lies in a file that was adopted by that store",
                hint="push from that store to a remote: the bytes themselves are sent",
            )
        return found


def look_at(store: Store, name: str, cwd: Path) -> View:
    """Let a store read from a remote what it lacks; raises NotFound for a name that no remote has."""
    known = next((place for place in store.elsewhere if isinstance(place, View) and place.remote.name == name), None)
    if known:
        return known
    return open_view(store, find_remote(store, check_remote_name(name), cwd))


def open_view(store: Store, remote: Remote) -> View:
    """Let a store read from a remote what it lacks; raises NotFound if there is none."""
    require_ready(remote.transport)
    sync_index(store)
    view = View(store, remote, read_catalog(store, remote.transport, store.progress))
    store.elsewhere = (*store.elsewhere, view)
    return view


def read_at(view: View, text: str) -> tuple[ObjectId, RefName | None, RemoteRef | None]:
    """The manifest that a ref or an id prefix means at a remote, the ref if its newest value is meant, and the ref."""
    target = parse_target(text)
    if target.prefix is not None:
        return _by_prefix(view, target.prefix), None, None
    assert target.ref
    seen = read_remote_ref(view.remote.transport, target.ref, view.store.progress)
    if seen.problem:
        raise seen.problem
    if seen.entry is None:
        raise NotFound(f"no ref {target.ref} at {view.label}", hint=f"list what is there: llmos ls {view.label}/")
    if target.back == 0:
        return seen.entry.id, target.ref, seen
    moves = list(remote_log(view.remote.transport, seen))
    if target.back < len(moves):
        return moves[target.back].id, None, seen
    raise NotFound(
        f"ref {target.ref} at {view.label} has no value {target.back} moves back",
        hint=f"its history: llmos log {view.label}/{target.ref}",
    )


def _by_prefix(view: View, prefix: str) -> ObjectId:
    found = [
        oid
        for oid, places in view.catalog.objects.items()
        if oid.hex().startswith(prefix) and any(place.entry.kind == MANIFEST for place in places)
    ]
    if len(found) == 1:
        return found[0]
    if not found:
        raise NotFound(f"no manifest @{prefix} at {view.label}", hint=f"list its refs: llmos ls {view.label}/")
    raise UsageError(f"the id prefix @{prefix} is ambiguous at {view.label}", hint="type more digits")
