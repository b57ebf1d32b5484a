"""Several nodes as one remote that survives the loss of some of them.

Packs lie on `replicas` nodes each, chosen by their names (placement.py); refs, snapshots and FORMAT on all. What is
read comes from any node that has it and is checked on the way, so that a copy that is absent, cut short, rotten or
silent makes the next node answer. What is written is there `replicas` times or is refused; the value of a ref is agreed
on by a majority (ballot.py). With `replicas` copies any `replicas` - 1 nodes may go, and everything can be read.

A node counts only while it can show its card: one that is empty, wiped or not mounted lacks everything and proves
nothing. A node that fails once is left alone for the rest of the command.
"""

import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import quote

from llmos_cli.errors import Damaged, LlmosError, NoSpace, NotFound, RemoteUnavailable, UsageError
from llmos_cli.formats.ids import IdHasher, ObjectId, object_id, parse_id
from llmos_cli.formats.layout import FORMAT_FILE, PACK_SUFFIX, PACKS, SNAPSHOTS, pack_key
from llmos_cli.formats.pack import TRAILER_SIZE, read_index
from llmos_cli.formats.pool import CARD_KEY, Member, Members, members_key
from llmos_cli.progress import Progress, Task
from llmos_cli.remote.exchange.catalog import Catalog, read_catalog
from llmos_cli.remote.pool.ballot import decide, forget_votes, learn
from llmos_cli.remote.pool.fanout import STALL_SECONDS, Call, ask_all, ask_one
from llmos_cli.remote.pool.intact import Intact, is_move, is_same_move
from llmos_cli.remote.pool.placement import ranked
from llmos_cli.remote.transports.transport import Dated, SlowToAsk, Transport, check_key, check_prefix
from llmos_cli.store.handle import Store

POOL_SCHEME: Final = "pool:"
_OWN: Final = "pool/"
_BLOCK_BYTES: Final = 1 << 22
UP: Final = "up"
BLANK: Final = "blank"
DOWN: Final = "down"
_REMEDY: Final = (
    "bring the nodes back, or take out what is lost for good (llmos remote rm-node), then llmos remote repair"
)
Answer = TypeVar("Answer")
Ranked = list[tuple[str, Transport]]


@dataclass(frozen=True)
class Node:
    """A member as it was found: "up"; "blank" if there is nothing, or not what the members list says; "down"."""

    member: Member
    transport: Transport | None
    state: str
    why: str = ""

    @property
    def url(self) -> str:
        return self.transport.url if self.transport else self.member.url


class PoolTransport(SlowToAsk):
    """A pool as one transport. `degraded`: a pack may have fewer copies than `replicas` (see `shortfall`)."""

    def __init__(
        self,
        members: Members,
        nodes: Mapping[str, Node],
        warn: Callable[[str], None],
        *,
        waiting: Mapping[str, Node] | None = None,
        stall: float = STALL_SECONDS,
    ) -> None:
        self.members = members
        self.nodes = dict(nodes)
        self.waiting = dict(waiting or {})  # those to be let in again
        self.degraded = False
        self.shortfall: dict[ObjectId, int] = {}
        self.warn = warn
        self.stall = stall
        self._intact = Intact()
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._lost: dict[str, LlmosError] = {}
        self._holders: dict[str, frozenset[str]] = {}

    @property
    def url(self) -> str:
        return pool_url(sorted(node.url for node in self.nodes.values()))

    @property
    def live(self) -> dict[str, Transport]:
        """The nodes that have answered so far."""
        with self._lock:
            return {
                name: node.transport
                for name, node in self.nodes.items()
                if node.state == UP and node.transport and name not in self._lost
            }

    @property
    def copies_of_refs(self) -> int:
        """How many nodes must know a value before it counts: with `replicas` - 1 nodes gone, one of them is left."""
        majority = self.members.majority
        return majority if self.degraded else min(len(self.nodes), max(majority, self.members.replicas))

    def initialise(self) -> None:
        """The nodes were made when the pool was; here it is made sure that what comes next can be written."""
        live = self.live
        needed = self.copies_of_refs if self.degraded else max(self.copies_of_refs, self.members.replicas)
        if len(live) < needed:
            raise self._too_few(f"{needed} nodes must answer to write", len(live))
        for name, answer in ask_all(live, lambda node: node.initialise(), stall=self.stall).items():
            self._note(name, answer)

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        check_prefix(prefix)

        def look(node: Transport) -> Sequence[tuple[str, int]]:
            found = [item for item in node.list(prefix) if not item[0].startswith(_OWN)]
            self._fence(node)
            return found

        sizes: defaultdict[str, dict[str, int]] = defaultdict(dict)
        answers = self._ask(look)
        for name, listed in answers.items():
            for key, size in listed:
                sizes[key][name] = size
        missing, bearable = len(self.nodes) - len(answers), self._bearable(prefix)
        if missing > bearable:
            what = f"{len(self.nodes) - bearable} nodes must answer to know all there is"
            raise self._too_few(what, len(answers), next(iter(self._lost.values()), None))
        return self._listed(sizes)

    def dated(self, prefix: str) -> Iterator[Dated]:
        """Of copies the youngest. Every node must answer."""
        check_prefix(prefix)

        def look(node: Transport) -> Sequence[Dated]:
            return [item for item in node.dated(prefix) if not item.key.startswith(_OWN)]

        found: dict[str, Dated] = {}
        for items in self._at_all("nodes must answer to know how old a thing is", look).values():
            for item in items:
                other = found.get(item.key)
                if other is None or item.time > other.time:
                    found[item.key] = item
        return iter(found.values())

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        check_key(key)
        wrong: bytes | None = None
        problem: LlmosError | None = None
        for name, node in self._order(key):
            try:
                data = ask_one(partial(node.read, key, start, end), stall=self.stall)
            except NotFound:
                continue
            except LlmosError as exc:
                problem = self._note(name, exc)
                continue
            why = self._intact.problem(key, data, start, end)
            if why is None:
                return data
            self.warn(f"{key} at {node.url} {why}; another node is asked")
            wrong = wrong if wrong is not None else data
        if wrong is not None:
            return wrong  # whoever asked will find what is wrong with it, and say so
        raise self._absent(key, problem)

    def size(self, key: str) -> int | None:
        check_key(key)
        problem: LlmosError | None = None
        found: list[int] = []
        enough = self.members.replicas if key.startswith(f"{PACKS}/") else 1
        for name, node in self._order(key):
            if len(found) == enough:
                break
            try:
                size = ask_one(partial(node.size, key), stall=self.stall)
            except LlmosError as exc:
                problem = self._note(name, exc)
                continue
            if size is not None:
                found.append(size)
        if found:
            return self.true_size(key, set(found))
        if len(self.nodes) - len(self.live) > self._bearable(key):
            raise self._absent(key, problem)
        return None

    def put_file(self, key: str, path: Path, name: ObjectId, task: Task) -> None:
        """To the first `replicas` nodes of its rank that take it; each is asked back for what it has. One value at a
        time: a kill then costs one value at most."""
        check_key(key)
        with self._sending:
            self._put(key, path, name, task)

    def _put(self, key: str, path: Path, name: ObjectId, task: Task) -> None:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            size = file.tell()
            file.seek(max(0, size - TRAILER_SIZE))
            ending = file.read()

        def put(node: Transport, counter: "_Counter") -> None:
            node.put_file(key, path, name, counter)
            if node.size(key) != size or node.read(key, max(0, size - TRAILER_SIZE), size) != ending:
                raise RemoteUnavailable(f"{node.url} does not have what it was just sent ({key})")
            self._fence(node)

        shared = _Shared(task)
        waiting = self._order(key)
        wanted, done, problem = self.members.replicas, 0, None
        while done < wanted and waiting:
            batch, waiting = waiting[: wanted - done], waiting[wanted - done :]
            calls = [(node, _started(put, transport, shared)) for node, transport in batch]
            for node, call in calls:
                try:
                    call.answer(self.stall)
                    done += 1
                except LlmosError as exc:
                    if isinstance(exc, Damaged) and not _is_whole(path, name):
                        raise
                    problem = self._note(node, exc)
        if done < wanted and not (done and self.degraded):
            if isinstance(problem, NoSpace) and not done:
                raise problem
            raise self._too_few(f"{key} must lie on {wanted} nodes", done, problem)
        if done < wanted:
            with self._lock:
                self.shortfall[name] = done

    def create(self, key: str, data: bytes) -> bool:
        check_key(key)
        live = self.live
        if key == FORMAT_FILE or key.startswith(f"{SNAPSHOTS}/"):  # the same bytes whoever writes them
            answers = ask_all(live, lambda node: node.create(key, data), stall=self.stall)
            won = [answer for answer in answers.values() if not isinstance(answer, LlmosError)]
            if len(won) < self.copies_of_refs:
                raise self._too_few(f"{key} must lie on {self.copies_of_refs} nodes", len(won))
            return any(won)
        known = self._learned(key)
        value = known
        if value is None:
            value = decide(live, self.members.majority, key, data, self._fence, stall=self.stall)
        assert value is not None
        self.spread(key, value)
        return known is None and (value == data or is_same_move(key, value, data))

    def delete(self, key: str) -> None:
        """At every node, or not for sure: a node that is away would bring the key back."""
        check_key(key)

        def at(node: Transport) -> None:
            node.delete(key)

        live = self.live
        forget_votes(live, key, stall=self.stall)  # first: they would give a value that is gone to the next mover
        errors = [exc for exc in ask_all(live, at, stall=self.stall).values() if isinstance(exc, LlmosError)]
        if errors or len(live) < len(self.nodes):
            done = len(live) - len(errors)
            raise self._too_few(f"{key} must be removed from all nodes", done, errors[0] if errors else None)

    def set_aside(self, key: str, to: str) -> None:
        """At every node that has it."""
        self._move(key, to, lambda node: node.set_aside(key, to))

    def bring_back(self, key: str, to: str) -> None:
        """At every node that has it aside."""
        self._move(key, to, lambda node: node.bring_back(key, to))

    def _move(self, key: str, to: str, move: Callable[[Transport], None]) -> None:
        check_key(key)
        check_key(to)

        def at(node: Transport) -> bool:
            try:
                move(node)
            except NotFound:
                return False
            return True

        if not any(self._at_all(f"nodes must answer to move {key}", at).values()):
            raise NotFound(f"{key} is not at {self.url}")

    def _at_all(self, what: str, ask: Callable[[Transport], Answer]) -> dict[str, Answer]:
        """Every node's answer, or none."""
        live = self.live
        answers = ask_all(live, ask, stall=self.stall) if len(live) == len(self.nodes) else {}
        problems = [self._note(name, answer) for name, answer in answers.items() if isinstance(answer, LlmosError)]
        done = {name: answer for name, answer in answers.items() if not isinstance(answer, LlmosError)}
        if len(done) < len(self.nodes):
            raise self._too_few(f"all {len(self.nodes)} {what}", len(done or live), next(iter(problems), None))
        return done

    def spread(self, key: str, value: bytes) -> None:
        """Give a key the value that was chosen for it at all nodes; the votes are forgotten once enough have it."""
        live = self.live
        has = {name for name, answer in learn(live, key, value, stall=self.stall).items() if answer is True}
        if len(has) < self.copies_of_refs:
            raise self._too_few(
                f"{key} has its value, and {self.copies_of_refs} nodes must know it",
                len(has),
                hint="llmos remote repair",
            )
        forget_votes({name: live[name] for name in has}, key, stall=self.stall)

    def settle(self, key: str) -> None:
        """Complete what somebody has left half done."""
        value = self._learned(key)
        if value is None:
            value = decide(self.live, self.members.majority, key, None, self._fence, stall=self.stall)
        if value is not None:
            self.spread(key, value)

    def _listed(self, sizes: Mapping[str, Mapping[str, int]]) -> Iterator[tuple[str, int]]:
        for key, found in sizes.items():
            size = self.true_size(key, set(found.values()))
            if key.startswith(f"{PACKS}/"):
                self._intact.expect(key, size)
                self._holders[key] = frozenset(name for name, there in found.items() if there == size)
            yield key, size

    def lacks_copies(self, pack: ObjectId) -> bool:
        """Whether a pack that was listed is known to have fewer copies than it should: whoever wrote it was stopped, or
        a node lost it. Nodes that are away are taken to have theirs."""
        holders = self._holders.get(pack_key(pack), frozenset())
        homes = self.rank(pack)[: self.members.replicas]
        away = [name for name in homes if name in self.nodes and self._is_away(name)]
        return len(holders) + len(set(away) - holders) < self.members.replicas

    def _is_away(self, name: str) -> bool:
        return self.nodes[name].state == DOWN or name in self._lost

    def rank(self, pack: ObjectId) -> Sequence[str]:
        return ranked(pack, [node.id for node in (*self.members.nodes, *self.members.renewed)])

    def _learned(self, key: str) -> bytes | None:
        """The value a key has at any node."""

        def look(node: Transport) -> bytes | None:
            return node.read(key) if node.size(key) is not None else None

        found = [value for value in self._ask(look).values() if value is not None]
        whole = [value for value in found if is_move(key, value) is not False]
        return next(iter(whole or found), None)

    def _fence(self, node: Transport) -> None:
        """Raise unless a node is still what it was when the pool was opened."""
        if node.size(CARD_KEY) is None:
            raise RemoteUnavailable(f"{node.url} has been emptied", hint="see how the pool is: llmos remote status")
        if node.size(members_key(self.members.epoch + 1)) is not None:
            raise RemoteUnavailable("the pool has got other members meanwhile", hint="run the command again")

    def _ask(self, ask: Callable[[Transport], Answer]) -> dict[str, Answer]:
        answers = ask_all(self.live, ask, stall=self.stall)
        for name, answer in answers.items():
            self._note(name, answer)
        return {name: answer for name, answer in answers.items() if not isinstance(answer, LlmosError)}

    def _order(self, key: str) -> Ranked:
        """The live nodes in the order in which they are asked for a key."""
        live = self.live
        return [(name, live[name]) for name in self.rank(_pack_of(key) or object_id(key.encode())) if name in live]

    def _bearable(self, key: str) -> int:
        """How many nodes may be missing without what is below a key being missed."""
        if key.startswith(f"{PACKS}/"):
            return len(self.nodes) if self.degraded else self.members.replicas - 1
        return self.copies_of_refs - 1

    def _note(self, name: str, answer: object) -> LlmosError | None:
        """A node that cannot be reached is not asked again."""
        if not isinstance(answer, LlmosError):
            return None
        if isinstance(answer, RemoteUnavailable):
            with self._lock:
                new = name not in self._lost
                self._lost[name] = answer
            if new:
                self.warn(f"node {self.nodes[name].url} is passed over: {answer.message}")
        return answer

    def true_size(self, key: str, sizes: set[int]) -> int:
        """Of copies that differ in length the one whose index fits; a pack that was cut short is no other pack."""
        if len(sizes) == 1:
            return next(iter(sizes))
        for size in sorted(sizes, reverse=True):
            for _, node in self._order(key):
                try:
                    read_index(partial(node.read, key), size)
                    return size
                except LlmosError:
                    continue
        return max(sizes)

    def _absent(self, key: str, problem: LlmosError | None) -> LlmosError:
        away = len(self.nodes) - len(self.live)
        if away > self._bearable(key) or (problem and not away):
            return self._too_few(f"{key} is at none of them", len(self.live), problem)
        return NotFound(f"{key} is not at {self.url}")

    def _too_few(
        self, what: str, have: int, problem: LlmosError | None = None, hint: str | None = None
    ) -> RemoteUnavailable:
        away = [node for name, node in self.nodes.items() if name not in self.live]
        names = ", ".join(f"{node.url} is {node.state if node.state != UP else DOWN}" for node in away)
        why = f" ({problem.message})" if problem else f" ({names})" if names else ""
        return RemoteUnavailable(
            f"{what}, and {have} of {len(self.nodes)} do{why}",
            hint=hint or _REMEDY,
        )


def tolerate(transport: Transport) -> None:
    """Let a pool take packs with fewer copies than it should; raises UsageError for what is no pool."""
    if not isinstance(transport, PoolTransport):
        raise UsageError(f"{transport.url} is not a pool", hint="--allow-degraded is about the copies in a pool")
    transport.degraded = True


def read_secured(store: Store, transport: Transport, progress: Progress) -> Catalog:
    """What a remote has for sure, for a writer to rely on: packs of a pool that lack copies do not count."""
    catalog = read_catalog(store, transport, progress)
    if isinstance(transport, PoolTransport) and not transport.degraded:
        for name in [name for name in catalog.packs if transport.lacks_copies(name)]:
            catalog = catalog.without_pack(name)
    return catalog


def shortfall(transport: Transport) -> int:
    """How many packs have been written with fewer copies than they should have."""
    return len(transport.shortfall) if isinstance(transport, PoolTransport) else 0


def pool_url(urls: Iterable[str]) -> str:
    """One URL for the nodes of a pool."""
    return POOL_SCHEME + ",".join(quote(url, safe="/:@~+-._=?&") for url in urls)


class _Shared:
    """One bar for copies that are sent side by side: it shows the one that is ahead."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._lock = threading.Lock()
        self._most = 0

    def reach(self, done: int) -> None:
        with self._lock:
            if done > self._most:
                self._task.advance(done - self._most)
                self._most = done


class _Counter:
    """Counts one copy; every step shows that its node gets on."""

    def __init__(self, shared: _Shared, call: Call[None]) -> None:
        self._shared = shared
        self._call = call
        self._done = 0

    def advance(self, amount: int = 1) -> None:
        self._done += amount
        self._call.beat()
        self._shared.reach(self._done)

    def note(self, text: str) -> None:
        pass


def _started(put: Callable[[Transport, _Counter], None], node: Transport, shared: _Shared) -> Call[None]:
    return Call(lambda call: put(node, _Counter(shared, call)))


def _is_whole(path: Path, name: ObjectId) -> bool:
    hasher = IdHasher()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            hasher.update(block)
    return hasher.id() == name


def _pack_of(key: str) -> ObjectId | None:
    try:
        name = parse_id(key.rpartition("/")[2].removesuffix(PACK_SUFFIX))
    except Damaged:
        return None
    return name if key == pack_key(name) else None
