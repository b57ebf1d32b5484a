"""What the nodes of a pool really have: looking at their lists, and reading every byte.

Changes nothing. A copy of a pack is whole if its bytes hash to its name, a copy of a move if it reads back, one of a
snapshot if it hashes to its name; with `percent` the bytes of that share of the packs are read, chosen anew each time.
"""

import random
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Final

from llmos_cli.errors import LlmosError, NotFound
from llmos_cli.formats import limits
from llmos_cli.formats.ids import IdHasher, ObjectId, object_id
from llmos_cli.formats.layout import REFS, SNAPSHOTS, pack_key
from llmos_cli.progress import Progress
from llmos_cli.remote.exchange.catalog import list_remote_packs
from llmos_cli.remote.exchange.parallel import in_order
from llmos_cli.remote.pool.fanout import ask_all
from llmos_cli.remote.pool.intact import is_move
from llmos_cli.remote.pool.placement import homes
from llmos_cli.remote.pool.pool import BLANK, DOWN, Node, PoolTransport
from llmos_cli.remote.transports.transport import Transport

_STREAMS: Final = 4
_BLOCK_BYTES: Final = 8 * limits.MiB


@dataclass(frozen=True)
class PackCopies:
    """The copies of a pack by node: `whole` as far as was looked, `bad` with the reason."""

    name: ObjectId
    size: int
    whole: frozenset[str]
    bad: Mapping[str, str]


@dataclass(frozen=True)
class KeyCopies:
    """The copies of what lies on all nodes: the value that was found whole (None: not read, or at no node), who has
    it, and whose copy is bad."""

    key: str
    value: bytes | None
    whole: frozenset[str]
    bad: Mapping[str, str]


@dataclass(frozen=True)
class Survey:
    """What was found. `asked` are the nodes that could be looked at, `read` bytes were read to the last one."""

    nodes: Mapping[str, Node]
    replicas: int
    asked: frozenset[str]
    packs: Mapping[ObjectId, PackCopies]
    keys: Mapping[str, KeyCopies]
    read: int

    @property
    def num_bytes(self) -> int:
        """What the packs take, each once."""
        return sum(pack.size for pack in self.packs.values())

    @property
    def under_replicated(self) -> tuple[PackCopies, ...]:
        return tuple(pack for pack in self.packs.values() if len(pack.whole) < self.replicas)

    @property
    def unreadable(self) -> tuple[PackCopies, ...]:
        """Packs of which no whole copy is to be seen; a node that is away may have one."""
        return tuple(pack for pack in self.packs.values() if not pack.whole)

    @property
    def misplaced(self) -> tuple[PackCopies, ...]:
        """Packs with enough copies, but not at the nodes that should keep them: a repair moves them."""
        return tuple(
            pack
            for pack in self.packs.values()
            if len(pack.whole) >= self.replicas and pack.whole != set(homes(pack.name, self.nodes, self.replicas))
        )

    @property
    def refs(self) -> int:
        moves = [key for key in self.keys if is_move(key, b"") is not None]
        return len({key.rpartition("/")[0] for key in moves})

    @property
    def lagging(self) -> tuple[str, ...]:
        """Nodes that lack a move or a snapshot that another one has."""
        return tuple(
            sorted(node for node in self.asked if any(node not in copies.whole for copies in self.keys.values()))
        )

    def held(self, node: str) -> tuple[int, int]:
        """Packs and bytes at a node."""
        sizes = [pack.size for pack in self.packs.values() if node in pack.whole or node in pack.bad]
        return len(sizes), sum(sizes)

    def bad(self) -> Iterator[tuple[str, str, str]]:
        """Every copy that is not what it should be: key, node, why."""
        for pack in self.packs.values():
            for node, why in pack.bad.items():
                yield pack_key(pack.name), node, why
        for copies in self.keys.values():
            for node, why in copies.bad.items():
                yield copies.key, node, why


def look(pool: PoolTransport) -> Survey:
    """Look at the lists only."""
    listed = ask_all(pool.live, lambda node: (list_remote_packs(node), _shared_keys(node)), stall=pool.stall)
    found = {name: answer for name, answer in listed.items() if not isinstance(answer, LlmosError)}
    sizes: defaultdict[ObjectId, dict[str, int]] = defaultdict(dict)
    keys: defaultdict[str, set[str]] = defaultdict(set)
    for name, (packs, shared) in found.items():
        for pack, size in packs.items():
            sizes[pack][name] = size
        for key in shared:
            keys[key].add(name)
    nodes = {
        name: node if name in found or node.state in (BLANK, DOWN) else _away(node, listed.get(name))
        for name, node in pool.nodes.items()
    }
    return Survey(
        {**nodes, **pool.waiting},
        pool.members.replicas,
        frozenset(found),
        {pack: _copies(pool, pack, sizes[pack]) for pack in sorted(sizes)},
        {key: KeyCopies(key, None, frozenset(keys[key]), {}) for key in sorted(keys)},
        0,
    )


def scrub(pool: PoolTransport, progress: Progress, percent: float = 100.0) -> Survey:
    """Look, then read: all moves and snapshots, and of the packs this share."""
    seen = look(pool)
    live = {name: node for name, node in pool.live.items() if name in seen.asked}
    count = round(len(seen.packs) * percent / 100) if percent < 100 else len(seen.packs)
    chosen = set(random.sample(sorted(seen.packs), min(len(seen.packs), max(count, 1 if percent > 0 else 0))))
    work = [(seen.packs[pack], name) for pack in sorted(chosen) for name in sorted(seen.packs[pack].whole)]
    keys = _read_all(seen, live)
    bad: defaultdict[ObjectId, dict[str, str]] = defaultdict(dict)

    def check(item: tuple[PackCopies, str]) -> tuple[PackCopies, str, str | None]:
        pack, name = item
        return pack, name, verify(live[name], pack.name, pack.size)

    total = sum(pack.size for pack, _ in work)
    with (
        progress.task("reading every copy" if percent >= 100 else "reading copies", total=total) as task,
        closing(in_order(check, work, workers=_STREAMS)) as checked,
    ):
        for pack, name, why in checked:
            task.advance(pack.size)
            if why:
                bad[pack.name][name] = why
    packs = {
        name: PackCopies(name, pack.size, pack.whole - bad[name].keys(), {**pack.bad, **bad[name]})
        for name, pack in seen.packs.items()
    }
    return Survey(seen.nodes, seen.replicas, seen.asked, packs, keys, total)


def read_keys(pool: PoolTransport, seen: Survey) -> Survey:
    """The same survey with the values of what lies on all nodes."""
    live = {name: node for name, node in pool.live.items() if name in seen.asked}
    return Survey(seen.nodes, seen.replicas, seen.asked, seen.packs, _read_all(seen, live), seen.read)


def verify(node: Transport, pack: ObjectId, size: int) -> str | None:
    """Why a copy of a pack is not what its name stands for, None if it is."""
    hasher = IdHasher()
    try:
        for start in range(0, size, _BLOCK_BYTES):
            hasher.update(node.read(pack_key(pack), start, min(start + _BLOCK_BYTES, size)))
    except NotFound:
        return "is gone"
    except LlmosError as exc:
        return f"cannot be read: {exc.message}"
    return None if hasher.id() == pack else "does not have the bytes its name stands for"


def key_problem(key: str, value: bytes) -> str | None:
    """What is wrong with a copy of a move or a snapshot."""
    if key.startswith(f"{SNAPSHOTS}/"):
        return None if str(object_id(value)) in key else "does not have the bytes its name stands for"
    return "does not read back" if is_move(key, value) is False else None


def _shared_keys(node: Transport) -> list[str]:
    """Moves and what lies beside them, snapshots."""
    return [key for prefix in (REFS, SNAPSHOTS) for key, _ in node.list(f"{prefix}/")]


def _copies(pool: PoolTransport, pack: ObjectId, sizes: Mapping[str, int]) -> PackCopies:
    size = pool.true_size(pack_key(pack), set(sizes.values()))
    bad = {name: f"has {there} bytes, not {size}" for name, there in sizes.items() if there != size}
    return PackCopies(pack, size, frozenset(sizes.keys() - bad.keys()), bad)


def _read_all(seen: Survey, live: Mapping[str, Transport]) -> dict[str, KeyCopies]:
    def read(copies: KeyCopies) -> KeyCopies:
        return _read_copies(copies.key, copies, live)

    with closing(in_order(read, seen.keys.values(), workers=_STREAMS)) as found:
        return {copies.key: copies for copies in found}


def _read_copies(key: str, copies: KeyCopies, live: Mapping[str, Transport]) -> KeyCopies:
    values: dict[str, bytes] = {}
    bad: dict[str, str] = {}
    for name, answer in ask_all(
        {name: live[name] for name in copies.whole if name in live}, lambda node: node.read(key)
    ).items():
        if isinstance(answer, LlmosError):
            bad[name] = answer.message
        elif why := key_problem(key, answer):
            bad[name] = why
        else:
            values[name] = answer
    value = next(iter(values.values()), None)
    for name, other in values.items():
        if other != value:
            bad[name] = "says something else than the other nodes"
    return KeyCopies(key, value, frozenset(values.keys() - bad.keys()), bad)


def _away(node: Node, answer: object) -> Node:
    why = answer.message if isinstance(answer, LlmosError) else "it has failed"
    return Node(node.member, node.transport, DOWN, why)
