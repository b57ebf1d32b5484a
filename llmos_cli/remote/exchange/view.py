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
from llmos_cli.formats.reflog import RefEntry
from llmos_cli.remote.exchange.catalog import Catalog, read_catalog
from llmos_cli.remote.exchange.fetch import read_in_place
from llmos_cli.remote.exchange.refs import RemoteRef, read_remote_ref, remote_log
from llmos_cli.remote.exchange.signed import read_remote_signatures
from llmos_cli.remote.open import Remote, check_remote_name, find_remote, require_ready
from llmos_cli.store.handle import Store
from llmos_cli.store.packs.packs import sync_index
from llmos_cli.store.refs.refs import ref_history
from llmos_cli.store.refs.resolve import Resolved, resolve
from llmos_cli.store.refs.signatures import Signed, judge_all, signers


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


@dataclass(frozen=True)
class Found(Resolved):
    """What was resolved, here or at a remote. `named` is the ref that was typed, also where an earlier value of it was
    meant; `seen` is that ref as it is at the remote."""

    named: RefName | None = None
    view: View | None = None
    seen: RemoteRef | None = None

    @property
    def remote(self) -> str | None:
        return self.view.remote.name if self.view else None

    @property
    def label(self) -> str:
        return f"{self.remote}/{self.local_label}" if self.view else self.local_label

    @property
    def local_label(self) -> str:
        """Without the remote."""
        return str(self.ref) if self.ref else f"@{self.id.short}"

    def at(self, ref: RefName) -> str:
        """Another ref of the same place, as it is typed."""
        return f"{self.remote}/{ref}" if self.view else str(ref)


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


def split_remote(text: str) -> tuple[str, str] | None:
    """The remote's name and the rest of `REMOTE/REST`; None for what is meant here. Raises UsageError for a path or URL
    in the place of a name."""
    name, slash, rest = text.partition("/")
    if not slash:
        return None
    if "/" in rest or ":" in name or name in ("", ".", ".."):
        raise UsageError(
            f"malformed ref {text[:200]!r}",
            hint="write REMOTE/REF; a remote that has only a URL is given a name first: llmos remote add NAME URL",
        )
    return name, rest


def resolve_anywhere(store: Store, text: str, cwd: Path) -> Found:
    """Find the manifest, of `REMOTE/REF` at that remote. From then on the store reads what it lacks from there."""
    parts = split_remote(text)
    if parts is None:
        here = resolve(store, text)
        return Found(here.id, here.ref, parse_target(text).ref)
    target = parse_target(parts[1])
    view = look_at(store, parts[0], cwd)
    if target.prefix is not None:
        return Found(_by_prefix(view, target.prefix), None, None, view)
    assert target.ref
    seen = read_remote_ref(view.remote.transport, target.ref, store.progress)
    if seen.problem:
        raise seen.problem
    if seen.entry is None:
        raise NotFound(f"no ref {target.ref} at {view.label}", hint=f"list what is there: llmos ls {view.label}/")
    if target.back == 0:
        return Found(seen.entry.id, target.ref, target.ref, view, seen)
    moves = list(remote_log(view.remote.transport, seen))
    if target.back < len(moves):
        return Found(moves[target.back].id, None, target.ref, view, seen)
    raise NotFound(
        f"ref {target.ref} at {view.label} has no value {target.back} moves back",
        hint=f"its history: llmos log {view.label}/{target.ref}",
    )


def history(store: Store, found: Found) -> list[RefEntry]:
    """The moves of the ref that was named, newest first; none where an id was."""
    if found.view:
        return list(remote_log(found.view.remote.transport, found.seen)) if found.seen else []
    return ref_history(store, found.named) if found.named else []


def signers_of(store: Store, found: Found, move: RefEntry | None = None) -> list[Signed]:
    """Who has signed a ref's value, or a move of it (at a remote the newest only), judged by whom this store trusts."""
    if found.view is None:
        if move:
            return signers(store, move.ref, move.id, move.sequence)
        return signers(store, found.ref, found.id) if found.ref else []
    entry = found.seen.entry if found.seen else None
    if found.seen is None or entry is None or (move or entry) != entry or (move is None and found.ref is None):
        return []
    files = read_remote_signatures(found.view.remote.transport, found.seen)
    return judge_all(store, entry.ref, entry.id, files)


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
