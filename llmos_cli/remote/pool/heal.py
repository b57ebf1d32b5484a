"""Making a pool whole again: half-made moves are completed, nodes that lost their files let in again, everything that
lies on all nodes put where it is missing, and every pack copied, from a copy that is proven whole, to the nodes that
should have it. Adding or removing a node and healing is rebalancing.

Copies where they no longer belong are removed last, and only while every node is there and all copies of that pack at
its own nodes have been read and found whole: at no moment are there fewer whole copies than `replicas` because of it.
"""

from collections.abc import Collection, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from llmos_cli.errors import Damaged, LlmosError, NotFound, PartlyDone
from llmos_cli.formats import limits
from llmos_cli.formats.ids import IdHasher, ObjectId
from llmos_cli.formats.layout import REFS, SNAPSHOTS, pack_key
from llmos_cli.progress import Progress, Task
from llmos_cli.remote.exchange.parallel import in_order
from llmos_cli.remote.pool.ballot import pending
from llmos_cli.remote.pool.members import renew
from llmos_cli.remote.pool.pool import BLANK, DOWN, UP, PoolTransport
from llmos_cli.remote.pool.scrub import KeyCopies, PackCopies, Survey, key_problem, look, read_keys, scrub, verify
from llmos_cli.remote.transports.transport import Transport
from llmos_cli.store.disk import durable

_STREAMS: Final = 2
_BLOCK_BYTES: Final = 8 * limits.MiB


@dataclass(frozen=True)
class PackMove:
    """`to` are nodes that lack a whole copy, `away` those that need not have one and have."""

    pack: PackCopies
    to: tuple[str, ...]
    away: tuple[str, ...]


@dataclass(frozen=True)
class HealPlan:
    """`renewed` are blank nodes, `settled` keys with votes on them, `keys` what some node lacks of what lies on all;
    `lost` packs have no whole copy at the nodes that answer. `proven`: every byte was read."""

    survey: Survey
    renewed: tuple[str, ...]
    settled: tuple[str, ...]
    keys: tuple[KeyCopies, ...]
    moves: tuple[PackMove, ...]
    lost: tuple[PackCopies, ...]
    proven: bool

    @property
    def copies(self) -> int:
        return sum(len(move.to) for move in self.moves)

    @property
    def copied_bytes(self) -> int:
        return sum(len(move.to) * move.pack.size for move in self.moves)

    @property
    def removals(self) -> int:
        return sum(len(move.away) for move in self.moves)

    @property
    def has_work(self) -> bool:
        return bool(self.renewed or self.settled or self.keys or self.moves)


@dataclass(frozen=True)
class Healed:
    """What was done; `failed` are copies that could not be made, by key with the reason."""

    copies: int
    copied_bytes: int
    removed: int
    keys: int
    failed: tuple[tuple[str, str], ...]


def plan_heal(pool: PoolTransport, progress: Progress, *, quick: bool, leaving: Collection[str] = ()) -> HealPlan:
    """Decide what to do; with `quick` a copy of the right length counts as whole until it is copied from. Nodes that
    are `leaving` count for nothing but as sources."""
    seen = read_keys(pool, look(pool)) if quick else scrub(pool, progress)
    blank = () if leaving else tuple(sorted(name for name, node in seen.nodes.items() if node.state == BLANK))
    able = set(seen.asked) | set(blank)
    everybody = all(node.state in (UP, BLANK) for node in seen.nodes.values()) and able == set(seen.nodes)
    moves, lost = [], []
    for pack in seen.packs.values():
        if not pack.whole:
            lost.append(pack)
            continue
        wanted = [name for name in pool.rank(pack.name) if name in able.difference(leaving)][: pool.members.replicas]
        to = tuple(name for name in wanted if name not in pack.whole)
        away = tuple(sorted((pack.whole | pack.bad.keys()) - set(wanted))) if everybody and not leaving else ()
        if to or away:
            moves.append(PackMove(pack, to, away))
    keys = [copies for copies in seen.keys.values() if copies.value is not None and able - copies.whole]
    settled = tuple(sorted(pending(pool.live)))
    return HealPlan(seen, blank, settled, tuple(keys), tuple(moves), tuple(lost), not quick)


def execute_heal(pool: PoolTransport, plan: HealPlan, tmp: Path, progress: Progress) -> tuple[PoolTransport, Healed]:
    """Carry out a plan; returns the pool as it is then (nodes that were let in again belong to it)."""
    for key in plan.settled:
        if key.startswith((f"{REFS}/", f"{SNAPSHOTS}/")):
            pool.settle(key)
    if plan.renewed:
        pool = renew(pool, fill_keys)
    failed: list[tuple[str, str]] = []
    keys = _spread_keys(pool, read_keys(pool, look(pool)), failed)
    copies = copied = removed = 0

    def carry(move: PackMove) -> tuple[PackMove, int, str | None]:
        return move, *_copy(pool, move, tmp, task)

    with (
        progress.task("copying packs", total=plan.copied_bytes) as task,
        closing(in_order(carry, plan.moves, workers=_STREAMS, limit=_STREAMS)) as carried,
    ):
        for move, made, why in carried:
            copies, copied = copies + made, copied + made * move.pack.size
            if why:
                failed.append((pack_key(move.pack.name), why))
            elif move.away:
                removed += _remove(pool, move, read=not plan.proven)
    return pool, Healed(copies, copied, removed, keys, tuple(failed))


def drain(pool: PoolTransport, leaving: Collection[str], tmp: Path, progress: Progress) -> int:
    """Copy what nodes that are about to leave have to those that will keep it; returns how many copies that took.

    Raises PartlyDone unless everything has its copies without them.
    """
    plan = plan_heal(pool, progress, quick=True, leaving=leaving)
    healed = execute_heal(pool, plan, tmp, progress)[1]
    if healed.failed:
        key, why = healed.failed[0]
        raise PartlyDone(
            f"{len(healed.failed)} packs cannot be copied to the nodes that stay ({key}: {why})",
            hint="see how the pool is: llmos remote status",
        )
    return healed.copies


def fill_keys(pool: PoolTransport, node: Transport) -> None:
    """Give a node all that lies on all nodes."""
    for copies in read_keys(pool, look(pool)).keys.values():
        if copies.value is not None:
            _give(node, copies.key, copies.value)


def _spread_keys(pool: PoolTransport, seen: Survey, failed: list[tuple[str, str]]) -> int:
    done = 0
    for copies in seen.keys.values():
        if copies.value is None:
            failed.append((copies.key, "no node has a whole copy"))
            continue
        for name in seen.asked - copies.whole:
            try:
                _give(pool.live[name], copies.key, copies.value)
                done += 1
            except (LlmosError, KeyError) as exc:
                failed.append((copies.key, str(exc)))
    return done


def _give(node: Transport, key: str, value: bytes) -> None:
    """Put right one copy; what is there and whole stays."""
    try:
        there = node.read(key)
    except NotFound:
        there = None
    except Damaged:
        there = b""
    if there == value:
        return
    if there is not None and key_problem(key, there) is None:
        return  # two nodes say different things, which must not be; nothing is thrown away
    if there is not None:
        node.delete(key)
    node.create(key, value)


def _copy(pool: PoolTransport, move: PackMove, tmp: Path, task: Task) -> tuple[int, str | None]:
    """Copy a pack to the nodes that lack it; how many have it now, and what went wrong."""
    if not move.to:
        return 0, None
    temp = durable.temp_path(tmp)
    why = "no whole copy of it can be read"
    live = pool.live
    try:
        for source in [name for name in pool.rank(move.pack.name) if name in move.pack.whole and name in live]:
            try:
                _fetch(live[source], move.pack.name, move.pack.size, temp)
                break
            except LlmosError as exc:
                why = exc.message
        else:
            return 0, why
        made, problem = 0, None
        for name in move.to:
            try:
                live[name].put_file(pack_key(move.pack.name), temp, move.pack.name, task)
                if why_not := verify(live[name], move.pack.name, move.pack.size):
                    raise Damaged(f"{live[name].url}: the copy {why_not}")
                made += 1
            except LlmosError as exc:
                problem = exc.message
            except KeyError:
                problem = f"{pool.nodes[name].url} does not answer"
        return made, problem
    finally:
        durable.remove(temp)


def _fetch(node: Transport, pack: ObjectId, size: int, temp: Path) -> None:
    """A copy of a pack as a local file, proven by its name."""
    durable.remove(temp)
    hasher = IdHasher()
    with durable.new_file(temp) as file:
        for start in range(0, size, _BLOCK_BYTES):
            data = node.read(pack_key(pack), start, min(start + _BLOCK_BYTES, size))
            hasher.update(data)
            durable.write_all(file, data)
        if hasher.id() != pack:
            raise Damaged(f"{pack_key(pack)} at {node.url} does not have the bytes its name stands for")


def _remove(pool: PoolTransport, move: PackMove, *, read: bool) -> int:
    """Remove copies that are too many, once those that count are sure."""
    live = pool.live
    homes: Sequence[str] = pool.rank(move.pack.name)[: pool.members.replicas]
    if set(live) != set(pool.nodes) or set(homes) & set(move.away):
        return 0
    for name in homes:
        if live[name].size(pack_key(move.pack.name)) != move.pack.size:
            return 0
        if read and name not in move.to and verify(live[name], move.pack.name, move.pack.size):
            return 0
    for name in move.away:
        live[name].delete(pack_key(move.pack.name))
    return len(move.away)


def down(plan: HealPlan) -> list[str]:
    """The nodes that could not be asked."""
    return [node.url for name, node in plan.survey.nodes.items() if node.state == DOWN or _silent(plan, name)]


def _silent(plan: HealPlan, name: str) -> bool:
    return name not in plan.survey.asked and plan.survey.nodes[name].state != BLANK
