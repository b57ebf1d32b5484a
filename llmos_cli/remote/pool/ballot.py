"""How the nodes of a pool agree on the one value of a key, whoever races and whichever minority of them is gone.

A move of a ref is a file that is created exclusively. On one node the node decides who was first. Several nodes can
each have a different first, and a majority of them may never agree: three racers, three nodes, one each. So the file
itself is not the vote. Votes are files beside it, under names that nobody else uses, and a key is given its value, on
all nodes, only after the value has been *chosen*:

1. A proposer takes a ballot (a number higher than all it has seen, and its own random id, so no two are equal). At
   each node it writes an empty vote of its ballot, **then** lists the votes there. It needs this from a majority. If
   it sees a vote of a higher ballot it gives up this ballot. If it sees votes with a value, it takes over the value of
   the highest ballot among them; otherwise it proposes its own.
2. At each node it writes a vote of its ballot with the value, **then** lists the votes there. From a majority, with no
   higher ballot in sight: the value is chosen.

This is Disk Paxos (Gafni and Lamport, 2003) with one disk block a ballot; nodes need no more than to keep files and to
list what has been written. Why two racers on different majorities cannot both win: say ballot b chose v, and b' > b
gets to step 2. Their majorities share a node. There, b wrote its value before it listed and saw no vote of b', so the
first vote of b' came after that; hence b' listed after b wrote, and saw it. So b' took over a value from a ballot of
at least b, which by induction is v. Nothing is chosen twice, however many processes stop, wait or come back in
between.

Then the value is *learned*: the key is created with it at every node. Whoever finds the key at any node finds the
chosen value, and a reader needs no majority to believe it, only to be sure that there is nothing newer. Votes are
removed, at nodes that have the key, once a majority has it: a proposer that comes later looks for the key after it has
listed, so it finds one or the other.

What is left when a proposer dies: after step 1, empty votes, which bind nobody (the next ballot is higher); within
step 2, a value on some nodes, which the next proposer for the key, or `remote repair`, takes over and completes, since
it may have been chosen; while learning, a key on some nodes, which the next one copies to the rest. A node that was
down lacks keys, and gets them by a repair. A node that has lost its files has lost its votes, so it must not vote as
if it had never cast any: it has no card (see formats/pool.py), and `fence` keeps it out. The same check keeps out
proposers that do not know of the newest members: from one epoch to the next any two majorities share a node, and that
node knows.
"""

import random
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from llmos_cli.errors import Busy, LlmosError, NotFound, RemoteUnavailable
from llmos_cli.formats.ids import checksum
from llmos_cli.formats.pool import VOTES
from llmos_cli.remote.pool.fanout import STALL_SECONDS, ask_all
from llmos_cli.remote.transports.transport import Transport

Fence = Callable[[Transport], None]
Nodes = Mapping[str, Transport]

_TRIES: Final = 40
_PAUSE_SECONDS: Final = 0.02  # before the first new try, at least; then up to twice as much each time, up to
_LONGEST_PAUSE_SECONDS: Final = 5.0
_CHECK_BYTES: Final = 17


class Ballot(NamedTuple):
    number: int
    proposer: str


class Vote(NamedTuple):
    ballot: Ballot
    has_value: bool


@dataclass(frozen=True)
class _Sight:
    """What a proposer sees at a node after its vote: the key's value, if the node has learned it; the other votes; of
    those with a value the one of the highest ballot."""

    learned: bytes | None
    highest: Ballot
    accepted: tuple[Ballot, bytes] | None


class _Overtaken(Exception):
    def __init__(self, number: int) -> None:
        self.number = number


def decide(
    nodes: Nodes, quorum: int, key: str, value: bytes | None, fence: Fence, *, stall: float = STALL_SECONDS
) -> bytes | None:
    """The value of `key`: `value` if nothing has been chosen yet, else what has. None only where `value` is None, for
    completing what others have left, and there is nothing.

    Raises RemoteUnavailable unless `quorum` nodes take part. The value is chosen then, not learned yet.
    """
    number = 0
    for attempt in range(_TRIES):
        start = time.monotonic()
        try:
            return _run(nodes, quorum, key, Ballot(number + 1, uuid.uuid4().hex), value, fence, stall)
        except _Overtaken as exc:
            number = exc.number
        took = max(_PAUSE_SECONDS, time.monotonic() - start)  # give whoever is ahead the time to finish
        time.sleep(random.uniform(took, min(_LONGEST_PAUSE_SECONDS, took * 2 ** (attempt + 1))))
        known = _learned(nodes, key, stall)
        if known is not None:
            return known
    raise Busy(f"{key} is being moved by others all the time", hint="run the command again")


def learn(nodes: Nodes, key: str, value: bytes, *, stall: float = STALL_SECONDS) -> dict[str, bool | LlmosError]:
    """Give a key its chosen value at all nodes; which of them have it now, or what kept them from it."""

    def at(node: Transport) -> bool:
        return node.create(key, value) or node.read(key) == value

    return ask_all(nodes, at, stall=stall)


def forget_votes(nodes: Nodes, key: str, *, stall: float = STALL_SECONDS) -> None:
    """Remove the votes on a key at nodes that have it; nothing is lost where that fails."""

    def at(node: Transport) -> None:
        for name in _votes(node, key):
            node.delete(_vote_key(key, name))

    ask_all(nodes, at, stall=stall)


def pending(nodes: Nodes, *, stall: float = STALL_SECONDS) -> set[str]:
    """The keys that a value has been proposed for: somebody is moving them, or has left them half moved. Empty votes
    alone bind nobody, and go with the next move."""
    found: set[str] = set()
    for answer in ask_all(nodes, lambda node: [key for key, _ in node.list(f"{VOTES}/")], stall=stall).values():
        if not isinstance(answer, LlmosError):
            found.update(key for vote in answer if vote.endswith(".2") and (key := _voted_on(vote)))
    return found


def _learned(nodes: Nodes, key: str, stall: float) -> bytes | None:
    """The value of a key, if some node has learned it."""
    answers = ask_all(nodes, lambda node: node.read(key) if node.size(key) is not None else None, stall=stall)
    return next((answer for answer in answers.values() if isinstance(answer, bytes)), None)


def _run(
    nodes: Nodes, quorum: int, key: str, ballot: Ballot, value: bytes | None, fence: Fence, stall: float
) -> bytes | None:
    seen = _ask(nodes, quorum, key, Vote(ballot, False), b"", fence, stall)
    accepted = max((sight.accepted for sight in seen if sight.accepted), default=None)
    for sight in seen:
        if sight.learned is not None:
            return sight.learned
    _give_way(seen, ballot)
    if accepted:
        value = accepted[1]
    if value is None:
        return None
    seen = _ask(nodes, quorum, key, Vote(ballot, True), value, fence, stall)
    for sight in seen:
        if sight.learned is not None:
            return sight.learned
    _give_way(seen, ballot)
    return value


def _give_way(seen: Iterable[_Sight], ballot: Ballot) -> None:
    highest = max(sight.highest for sight in seen)
    if highest > ballot:
        raise _Overtaken(highest.number)


def _ask(nodes: Nodes, quorum: int, key: str, vote: Vote, value: bytes, fence: Fence, stall: float) -> list[_Sight]:
    answers = ask_all(nodes, lambda node: _cast(node, key, vote, value, fence), stall=stall)
    seen = [answer for answer in answers.values() if isinstance(answer, _Sight)]
    if len(seen) < quorum:
        errors = [answer for answer in answers.values() if isinstance(answer, LlmosError)]
        why = f": {errors[0].message}" if errors else ""
        raise RemoteUnavailable(
            f"{key} needs {quorum} nodes of the pool to agree, and {len(seen)} of {len(nodes)} answer{why}",
            hint=errors[0].hint if errors else None,
        )
    return seen


def _cast(node: Transport, key: str, vote: Vote, value: bytes, fence: Fence) -> _Sight:
    """Vote, then look: the order is what everything rests on."""
    node.create(_vote_key(key, vote), f"{checksum(value):016x}\n".encode() + value)
    others = [other for other in _votes(node, key) if other != vote]
    accepted, vanished = None, False
    for other in sorted((other for other in others if other.has_value), reverse=True):
        try:
            data = node.read(_vote_key(key, other))
        except NotFound:
            vanished = True
            break
        if data[:_CHECK_BYTES] == f"{checksum(data[_CHECK_BYTES:]):016x}\n".encode():
            accepted = (other.ballot, data[_CHECK_BYTES:])
            break  # else it was being written when its writer died, and has never counted
    fence(node)
    learned = node.read(key) if node.size(key) is not None else None
    if vanished and learned is None:
        raise RemoteUnavailable(f"{node.url} has lost a vote on {key}")
    return _Sight(learned, max((other.ballot for other in others), default=Ballot(0, "")), accepted)


def _votes(node: Transport, key: str) -> list[Vote]:
    folder, _, _ = key.rpartition("/")
    found = []
    for listed, _ in node.list(f"{VOTES}/{folder}/" if folder else f"{VOTES}/"):
        if _voted_on(listed) == key:
            *_, number, proposer, phase = listed.rsplit(".", 3)
            found.append(Vote(Ballot(int(number), proposer), phase == "2"))
    return found


def _vote_key(key: str, vote: Vote) -> str:
    return f"{VOTES}/{key}.{vote.ballot.number:010d}.{vote.ballot.proposer}.{2 if vote.has_value else 1}"


def _voted_on(vote: str) -> str | None:
    """The key that a file is a vote on; None if it is something else."""
    parts = vote.removeprefix(f"{VOTES}/").rsplit(".", 3)
    if len(parts) != 4 or not parts[1].isdecimal() or len(parts[2]) != 32 or parts[3] not in ("1", "2"):
        return None
    return parts[0]
