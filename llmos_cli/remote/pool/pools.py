"""Pools by the names people give them: making one, letting a node in or out, and keeping what the name stands for.

The nodes hold the list of members; config.toml holds their URLs as they are seen from here, which is where the looking
begins. A list there that is out of date finds the new one as long as one node in it is still a member.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmos_cli.errors import NotFound, UsageError
from llmos_cli.remote.open import check_remote_name, find_remote, keep_remote, normal_url, open_transport
from llmos_cli.remote.pool.heal import drain, fill_keys
from llmos_cli.remote.pool.members import create_pool, let_go, let_in
from llmos_cli.remote.pool.pool import PoolTransport
from llmos_cli.store.handle import Store


@dataclass(frozen=True)
class PoolRemote:
    """A pool and what it is called here; `name` is None if the user typed a URL."""

    name: str | None
    pool: PoolTransport

    @property
    def label(self) -> str:
        return self.name or self.pool.url


def add_pool(store: Store, name: str, urls: Sequence[str], replicas: int, cwd: Path) -> PoolRemote:
    """Make a pool of empty nodes (or join the one that they are) and give it a name; raises Unsafe, UsageError."""
    check_remote_name(name)
    kept = list(dict.fromkeys(normal_url(url, cwd) for url in urls))
    known = store.config.remotes.get(name)
    if known is not None:
        raise UsageError(f"remote {name!r} is {known} already", hint=f"llmos remote rm {name}")
    pool = create_pool(kept, replicas, open_transport, store.progress.warn)
    keep_remote(store, name, pool.url)
    return PoolRemote(name, pool)


def find_pool_remote(store: Store, text: str, cwd: Path) -> PoolRemote:
    """The pool of this name or URL; raises NotFound, UsageError for a remote that is none."""
    remote = find_remote(store, text, cwd)
    if not isinstance(remote.transport, PoolTransport):
        raise UsageError(
            f"{remote.label} is not a pool", hint="make one: llmos remote add NAME --pool --replicas 2 URL URL..."
        )
    return PoolRemote(remote.name, remote.transport)


def add_node(store: Store, remote: PoolRemote, url: str, cwd: Path) -> PoolRemote:
    """Let a node in; packs move with the next repair."""
    kept = normal_url(url, cwd)
    pool = let_in(remote.pool, kept, open_transport(kept), fill_keys)
    return _renamed(store, remote, pool)


def find_nodes(remote: PoolRemote, texts: Sequence[str], cwd: Path) -> list[str]:
    """The ids of members by their URLs, or the beginnings of their ids; raises NotFound."""
    found = []
    for text in texts:
        urls = {text, normal_url(text, cwd)}
        names = [
            name
            for name, node in (remote.pool.nodes | remote.pool.waiting).items()
            if urls & {node.url, node.member.url} or (len(text) >= 4 and name.startswith(text))
        ]
        if len(names) != 1:
            raise NotFound(f"no node {text[:200]!r} in {remote.label}", hint="see its nodes: llmos remote show")
        found += names
    return list(dict.fromkeys(found))


def remove_nodes(store: Store, remote: PoolRemote, nodes: Sequence[str], *, lost: bool) -> PoolRemote:
    """Take nodes out of the pool. Those that are there give what they have to the others first."""
    if any(name in remote.pool.live for name in nodes):
        drain(remote.pool, nodes, store.tmp, store.progress)
    return _renamed(store, remote, let_go(remote.pool, nodes, lost=lost))


def _renamed(store: Store, remote: PoolRemote, pool: PoolTransport) -> PoolRemote:
    if remote.name is not None:
        keep_remote(store, remote.name, pool.url)
    return PoolRemote(remote.name, pool)
