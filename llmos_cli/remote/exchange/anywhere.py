"""What is meant by a name that may be of a ref here or, as `REMOTE/REF`, of one at a remote.

Whatever knows remotes is imported only when one is named: most names are of refs here.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmos_cli.errors import UsageError
from llmos_cli.formats.names import RefName, parse_target
from llmos_cli.formats.reflog import RefEntry
from llmos_cli.store.handle import Store
from llmos_cli.store.refs.refs import ref_history
from llmos_cli.store.refs.resolve import Resolved, resolve
from llmos_cli.store.refs.signatures import Signed, judge_all, signers

if TYPE_CHECKING:
    from llmos_cli.remote.exchange.refs import RemoteRef
    from llmos_cli.remote.exchange.view import View


@dataclass(frozen=True)
class Found(Resolved):
    """What was resolved, here or at a remote. `named` is the ref that was typed, also where an earlier value of it was
    meant; `seen` is that ref as it is at the remote."""

    named: RefName | None = None
    view: "View | None" = None
    seen: "RemoteRef | None" = None

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
    from llmos_cli.remote.exchange.view import look_at, read_at

    view = look_at(store, parts[0], cwd)
    oid, ref, seen = read_at(view, parts[1])
    return Found(oid, ref, parse_target(parts[1]).ref, view, seen)


def resolve_streamed(store: Store, text: str, *, near: str = "") -> Found:
    """As `resolve_anywhere`, for a command that reads much of what it names: through a bounded cache on this disk, from
    a remote that may fail for a while. Files below the folder `near` are fetched, so that what is made can hold them.
    """
    found = resolve_anywhere(store, text, store.root)
    if found.view:
        from llmos_cli.remote.exchange.streamed import stream_from

        stream_from(found.view, found.id, near)
    return found


def history(store: Store, found: Found) -> list[RefEntry]:
    """The moves of the ref that was named, newest first; none where an id was."""
    if found.view:
        from llmos_cli.remote.exchange.refs import remote_log

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
    from llmos_cli.remote.exchange.signed import read_remote_signatures

    files = read_remote_signatures(found.view.remote.transport, found.seen)
    return judge_all(store, entry.ref, entry.id, files)
