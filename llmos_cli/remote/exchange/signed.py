"""Signatures at a remote: read beside the refs that are pulled, sent beside those that are pushed."""

from collections.abc import Sequence
from typing import Final

from llmos_cli.errors import NotFound, Unsafe
from llmos_cli.formats import limits
from llmos_cli.formats.layout import REFS
from llmos_cli.formats.names import RefName
from llmos_cli.formats.reflog import RefEntry
from llmos_cli.formats.signature import signature_name
from llmos_cli.remote.exchange.refs import RemoteRef
from llmos_cli.remote.open import Remote, normal_url, open_remote
from llmos_cli.remote.transports.transport import Transport
from llmos_cli.store.handle import Store
from llmos_cli.store.refs.keys import require_cryptography
from llmos_cli.store.refs.signatures import require_signed, signatures_of

EVERY: Final = "*"


def must_be_signed(store: Store, remote: Remote) -> bool:
    """Whether config.toml says so: by the remote's name, also where somebody types its URL, or for every one."""
    for name in store.config.require_signed:
        url = store.config.remotes.get(name)
        if name in (EVERY, remote.name):
            return True
        if url and open_remote(normal_url(url, store.root), store.progress.warn).url == remote.transport.url:
            return True
    return False


def read_remote_signatures(transport: Transport, seen: RemoteRef) -> tuple[bytes, ...]:
    """The files beside a ref's newest move; raises Unsafe if there are more than anybody would need."""
    if len(seen.signed) > limits.SIGNATURES:
        raise Unsafe(f"{seen.ref} at {transport.url} has {len(seen.signed)} signatures, more than {limits.SIGNATURES}")
    files = []
    for name in seen.signed:
        try:
            files.append(transport.read(f"{_folder(seen.ref)}{name}", 0, limits.SIGNATURE_BYTES + 1))
        except NotFound:
            continue
    return tuple(files)


def check_signed(store: Store, remote: Remote, refs: Sequence[tuple[RemoteRef, tuple[bytes, ...]]]) -> None:
    """Raise Unsafe unless the newest value of each ref is signed by somebody trusted, and is not an old one."""
    require_cryptography()
    for seen, files in refs:
        if seen.id:
            require_signed(store, seen.ref, seen.id, files, remote.label)


def send_signatures(store: Store, transport: Transport, move: RefEntry, there: Sequence[str]) -> int:
    """Give a remote the signatures of a value that it lacks beside its move; returns how many."""
    names = {signature_name(move.sequence, data): data for data in signatures_of(store, move.ref, move.id)}
    missing = [name for name in sorted(names) if name not in there]
    for name in missing:
        transport.create(f"{_folder(move.ref)}{name}", names[name])
    return len(missing)


def _folder(ref: RefName) -> str:
    return f"{REFS}/{ref.name}/{ref.tag}/"
