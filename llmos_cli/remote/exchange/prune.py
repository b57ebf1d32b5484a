"""Refs that one side has and the other does not any more, and removing them: `push --prune`, `pull --prune`.

A push removes what the remote has and the store lacks. A pull removes only what came from that remote and has not moved
since. Only refs go; what they named stays until a gc.
"""

from collections.abc import Collection
from typing import Final

from llmos_cli.errors import Conflict, Unsafe
from llmos_cli.formats.layout import REFS, ref_key
from llmos_cli.formats.names import RefName
from llmos_cli.formats.reflog import RefEntry, parse_entry_name, parse_gone_name
from llmos_cli.progress import Progress
from llmos_cli.remote.exchange.refs import RemoteRef, list_remote_refs, read_remote_ref, retire
from llmos_cli.remote.open import Remote
from llmos_cli.remote.transports.transport import Transport
from llmos_cli.store.handle import Store
from llmos_cli.store.refs.refs import delete_ref, list_refs

PULLED: Final = "pulled from {}"  # the message of a move that a pull made


def surplus_there(store: Store, remote: Remote, progress: Progress) -> tuple[RemoteRef, ...]:
    """Refs of a remote that the store lacks. Raises Unsafe where that would be all of them."""
    here = {entry.ref for entry in list_refs(store)}
    there = list_remote_refs(remote.transport, progress)
    if there and not here & there.keys():
        raise Unsafe(
            f"the store shares no ref with {remote.label}: --prune would remove all {len(there)} of them there",
            hint="is it the right store? llmos ls",
        )
    return tuple(seen for ref, seen in sorted(there.items()) if ref not in here)


def remove_there(transport: Transport, seen: RemoteRef, progress: Progress) -> None:
    """Remove a ref that still is as it was seen; raises Conflict. The newest move goes last, so that nobody meets an
    older value on the way; one that is made meanwhile is not touched, and is taken back by who made it."""
    if read_remote_ref(transport, seen.ref, progress).id != seen.id:
        raise Conflict(
            f"ref {seen.ref} at {transport.url} moved while this was under way", hint="run the command again"
        )
    retire(transport, seen.ref, seen.sequences[-1])
    for sequence in seen.sequences:
        transport.delete(ref_key(seen.ref, sequence))
    left = {key.rpartition("/")[2]: key for key, _ in transport.list(f"{REFS}/{seen.ref.name}/{seen.ref.tag}/")}
    if all(parse_entry_name(name) is None for name in left):
        newest = max((name for name in left if parse_gone_name(name)), default=None)
        for name, key in left.items():
            if name != newest:
                transport.delete(key)


def surplus_here(store: Store, remote: Remote, there: Collection[RefName]) -> tuple[RefEntry, ...]:
    """Refs of the store that came from a remote, are as they came, and are not there any more."""
    made = PULLED.format(remote.label)
    return tuple(entry for entry in list_refs(store) if entry.ref not in there and entry.message == made)


def remove_here(store: Store, entry: RefEntry) -> None:
    delete_ref(store, entry.ref, expected=entry.id)
