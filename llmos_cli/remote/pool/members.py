"""Who belongs to a pool: making one, opening one, letting nodes in and out.

The nodes keep the list themselves, one file an epoch, so that any one of them tells where the others are and no two
machines go by different lists. The next epoch is agreed on like a ref's move (ballot.py), by a majority of the members
it follows. Nodes are let in one at a time, and filled before; of the ones that leave, those that are gone for good
need not agree, but then all that stay must: some node that took part in whatever was decided is among them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from urllib.parse import unquote

from llmos_cli.errors import Conflict, Damaged, LlmosError, NotFound, RemoteUnavailable, Unsafe, UsageError
from llmos_cli.formats import limits
from llmos_cli.formats.layout import FORMAT_FILE, PACKS, REFS
from llmos_cli.formats.pool import (
    CARD_KEY,
    MEMBERS,
    VOTES,
    Card,
    Member,
    Members,
    decode_card,
    decode_members,
    encode_card,
    encode_members,
    members_key,
    new_id,
    parse_members_key,
)
from llmos_cli.remote.pool.ballot import decide, forget_votes, learn
from llmos_cli.remote.pool.fanout import STALL_SECONDS, ask_all
from llmos_cli.remote.pool.pool import BLANK, DOWN, POOL_SCHEME, UP, Node, PoolTransport
from llmos_cli.remote.transports.transport import Transport

Opener = Callable[[str], Transport]
Warn = Callable[[str], None]


@dataclass(frozen=True)
class Look:
    """What a node says of itself: its card and the newest list of members it has; None if it has none."""

    card: Card | None
    members: Members | None


def look_at(node: Transport) -> Look:
    """Read a node's card and members; raises Damaged if there is a card that cannot be read."""
    try:
        card = decode_card(node.read(CARD_KEY))
    except NotFound:
        return Look(None, None)
    epochs = sorted(epoch for key, _ in node.list(f"{MEMBERS}/") if (epoch := parse_members_key(key)) is not None)
    for epoch in reversed(epochs):
        try:
            return Look(card, decode_members(node.read(members_key(epoch)), epoch))
        except NotFound:
            continue
        except Damaged as exc:
            if exc.code == "unknown-version":
                raise
    return Look(card, None)


def split_pool_url(url: str) -> tuple[str, ...]:
    """The URLs of the nodes in the URL of a pool; raises UsageError."""
    urls = tuple(unquote(part) for part in url.removeprefix(POOL_SCHEME).split(",") if part)
    if not urls or any(part.startswith(POOL_SCHEME) for part in urls):
        raise UsageError(f"malformed pool URL {url[:200]!r}", hint="write pool:URL,URL,...")
    return urls


def open_pool(urls: Sequence[str], opener: Opener, warn: Warn, *, stall: float = STALL_SECONDS) -> PoolTransport:
    """The pool that nodes at these URLs belong to, by the newest list that any of them has.

    Raises NotFound if none belongs to one, RemoteUnavailable if none can be asked, Unsafe if they are of several pools.
    """
    transports = {url: opener(url) for url in dict.fromkeys(urls)}
    looks = ask_all(transports, look_at, stall=stall)
    members = _newest(looks)
    urls_of = {look.card.node: url for url, look in looks.items() if isinstance(look, Look) and look.card}
    further = {
        node.url: opener(node.url) for node in members.nodes if node.id not in urls_of and node.url not in transports
    }
    looks |= ask_all(further, look_at, stall=stall)
    transports |= further
    newest = _newest(looks)
    if newest.epoch > members.epoch:  # the URLs that were given were of members of long ago
        return open_pool([*urls, *(node.url for node in newest.nodes)], opener, warn, stall=stall)
    nodes = {node.id: _node(node, members, urls_of.get(node.id, node.url), transports, looks) for node in members.nodes}
    waiting = {node.id: Node(node, opener(node.url), BLANK, "it is to be let in again") for node in members.renewed}
    return PoolTransport(members, nodes, warn, waiting=waiting, stall=stall)


def find_pool(node: Transport, opener: Opener, warn: Warn) -> PoolTransport | None:
    """The pool that the node at hand is a member of; None if it is none, or cannot be asked."""
    try:
        look = look_at(node)
    except LlmosError:
        return None
    if look.card is None or look.members is None:
        return None
    return open_pool([node.url, *(member.url for member in look.members.nodes)], opener, warn)


def create_pool(urls: Sequence[str], replicas: int, opener: Opener, warn: Warn) -> PoolTransport:
    """Make a pool of empty nodes, or join the one that they are; raises Unsafe for a node that holds something else."""
    nodes = {url: opener(url) for url in dict.fromkeys(urls)}
    looks: dict[str, Look] = {}
    for url, answer in ask_all(nodes, look_at).items():
        if isinstance(answer, LlmosError):
            raise answer
        looks[url] = answer
    if any(look.members for look in looks.values()):
        return _join(urls, looks, replicas, opener, warn)
    if not 1 <= replicas <= len(nodes):
        raise UsageError(f"{replicas} copies need as many nodes, and there are {len(nodes)}", hint="name more URLs")
    if len(nodes) > limits.POOL_NODES:
        raise UsageError(f"a pool has at most {limits.POOL_NODES} nodes")
    for url, node in nodes.items():
        check_empty(url, node)
    members = Members(new_id(), 1, replicas, tuple(sorted(Member(new_id(), new_id(), url) for url in nodes)))
    for member in members.nodes:
        give_card(nodes[member.url], _card_of(members, member), members)
    return open_pool(urls, opener, warn)


def check_empty(url: str, node: Transport) -> None:
    """Raise Unsafe if there are refs, packs or anything else that is not ours."""
    held = next((key for key, _ in node.list("") if key.startswith((f"{REFS}/", f"{PACKS}/"))), None)
    if held is None and node.size(FORMAT_FILE) is None:
        held = next((key for key, _ in node.list("")), None)
    if held:
        raise Unsafe(
            f"{url} is not empty: it holds {held[:200]!r}",
            hint="make a pool of empty nodes, then bring in what is there: llmos clone, then push to the pool",
        )


def give_card(node: Transport, card: Card, members: Members) -> None:
    """Make a node a member. Its votes of an earlier life count for nothing; the card comes last."""
    node.initialise()
    for key, _ in list(node.list(f"{VOTES}/")):
        node.delete(key)
    node.create(members_key(members.epoch), encode_members(members))
    if node.size(CARD_KEY) is not None:
        node.delete(CARD_KEY)
    node.create(CARD_KEY, encode_card(card))


def let_in(
    pool: PoolTransport,
    url: str,
    node: Transport,
    fill: Callable[[PoolTransport, Transport], None],
    again: Member | None = None,
) -> PoolTransport:
    """Add a node: it gets everything that lies on all nodes, then the members agree. Returns the pool as it is then.

    `again` is the member that it was before it lost its files.
    """
    look = look_at(node)
    if look.card and look.card.pool != pool.members.pool:
        raise Unsafe(f"{url} belongs to another pool", hint="use an empty node")
    if look.card and look.card.node in pool.nodes:
        raise UsageError(f"{url} is a member already", hint="llmos remote show")
    if look.card is None and not again:
        check_empty(url, node)
    member = Member(again.id if again else new_id(), new_id(), url)
    nodes = tuple(sorted((*pool.members.nodes, member)))
    if len(nodes) > limits.POOL_NODES:
        raise UsageError(f"a pool has at most {limits.POOL_NODES} nodes")
    give_card(node, _card_of(pool.members, member), pool.members)  # nobody counts on it before the next epoch names it
    fill(pool, node)
    renewed = tuple(other for other in pool.members.renewed if other.id != member.id)
    return _agree(pool, nodes, renewed, {**pool.live, member.id: node}, pool.members.majority)


def let_go(pool: PoolTransport, leaving: Sequence[str], *, lost: bool = False, renewing: bool = False) -> PoolTransport:
    """Take nodes out by their ids, be they there, blank or gone; returns the pool as it is then.

    With `renewing` it is written down that they are to be let in again, whatever happens in between.
    As many as a majority can only go if they are `lost` for good: what only they knew is lost then, and were they to
    come back, those who know no other members would take them for the pool.
    """
    staying = tuple(node for node in pool.members.nodes if node.id not in leaving)
    if len(staying) < pool.members.replicas and any(name in pool.live for name in leaving):
        raise UsageError(
            f"{len(staying)} nodes cannot keep {pool.members.replicas} copies", hint="add a node first: remote add-node"
        )
    if not staying:
        raise UsageError("a pool keeps at least one node", hint="forget the pool: llmos remote rm")
    majority = pool.members.majority
    if len(leaving) >= majority and len(leaving) > 1 and not lost:
        raise UsageError(
            f"{len(leaving)} of {len(pool.members.nodes)} nodes cannot go at once: what only they know would be lost",
            hint="bring some of them back; if they are lost for good: llmos remote rm-node --lost",
        )
    live = {name: node for name, node in pool.live.items() if name not in leaving}
    again = [node for node in pool.members.nodes if node.id in leaving] if renewing else []
    renewed = tuple(sorted([*(node for node in pool.members.renewed if node.id not in leaving), *again]))
    return _agree(pool, staying, renewed, live, len(staying) if lost else min(majority, len(staying)))


def renew(pool: PoolTransport, fill: Callable[[PoolTransport, Transport], None]) -> PoolTransport:
    """Let nodes that have lost their files in again: out, filled, and in with a new life."""
    blank = [node for node in pool.nodes.values() if node.state == BLANK and node.transport]
    if blank:
        pool = let_go(pool, [node.member.id for node in blank], renewing=True)
    for node in list(pool.waiting.values()):
        assert node.transport
        pool = let_in(pool, node.member.url, node.transport, fill, node.member)
    return pool


def _agree(
    pool: PoolTransport,
    nodes: Sequence[Member],
    renewed: tuple[Member, ...],
    live: Mapping[str, Transport],
    quorum: int,
) -> PoolTransport:
    now = pool.members
    wanted = replace(now, epoch=now.epoch + 1, nodes=tuple(nodes), renewed=renewed)
    key, data = members_key(wanted.epoch), encode_members(wanted)

    def fence(node: Transport) -> None:
        if node.size(CARD_KEY) is None:
            raise RemoteUnavailable(f"{node.url} has been emptied")

    voters = {name: node for name, node in live.items() if name in pool.nodes}
    learn(voters, members_key(now.epoch), encode_members(now))  # nobody is two epochs behind
    chosen = decide(voters, quorum, key, data, fence)
    assert chosen is not None
    has = {name for name, answer in learn(live, key, chosen).items() if answer is True}
    if chosen != data:
        raise Conflict("the pool has got other members meanwhile", hint="run the command again")
    if len(has & set(voters)) < quorum:
        raise RemoteUnavailable("too few nodes know the new members", hint="run the command again")
    forget_votes({name: live[name] for name in has}, key)
    left = {member.id: member for member in nodes}
    found = {name: pool.nodes[name] if name in pool.nodes else Node(left[name], live[name], UP) for name in left}
    known = {**pool.nodes, **pool.waiting}
    waiting = {node.id: known[node.id] for node in renewed}
    return PoolTransport(wanted, found, pool.warn, waiting=waiting, stall=pool.stall)


def _newest(looks: Mapping[str, Look | LlmosError]) -> Members:
    found = [look.members for look in looks.values() if isinstance(look, Look) and look.members]
    if len({members.pool for members in found}) > 1:
        raise Unsafe(f"{', '.join(looks)} belong to different pools", hint="name nodes of one pool")
    if found:
        return max(found, key=lambda members: members.epoch)
    errors = [look for look in looks.values() if isinstance(look, LlmosError)]
    if errors:
        raise RemoteUnavailable(
            f"no node of the pool can be asked: {errors[0].message}", hint="run the command again when one is back"
        )
    raise NotFound(
        f"no pool at {', '.join(looks)}: the nodes are empty, or not mounted",
        hint="mount them; or make it: llmos remote add NAME --pool URL...",
    )


def _node(
    member: Member,
    members: Members,
    url: str,
    transports: Mapping[str, Transport],
    looks: Mapping[str, Look | LlmosError],
) -> Node:
    look = looks[url]
    if isinstance(look, LlmosError):
        return Node(member, transports[url], DOWN, look.message)
    if look.card is None:
        return Node(member, transports[url], BLANK, "it is empty")
    if look.card != _card_of(members, member):
        if look.card.pool != members.pool:
            return Node(member, transports[url], DOWN, "another pool is there")
        return Node(member, transports[url], BLANK, "it is as it was in an earlier life")
    return Node(member, transports[url], UP)


def _card_of(members: Members, member: Member) -> Card:
    return Card(members.pool, member.id, member.life)


def _join(urls: Sequence[str], looks: Mapping[str, Look], replicas: int, opener: Opener, warn: Warn) -> PoolTransport:
    pool = open_pool(urls, opener, warn)
    strange = [url for url, look in looks.items() if look.card is None or look.card.node not in pool.nodes]
    if strange:
        raise UsageError(
            f"{', '.join(strange)} is no member of the pool at {next(url for url in urls if url not in strange)}",
            hint="add the remote without it, then: llmos remote add-node",
        )
    if replicas != pool.members.replicas:
        raise UsageError(f"this pool keeps {pool.members.replicas} copies", hint=f"--replicas {pool.members.replicas}")
    return pool
