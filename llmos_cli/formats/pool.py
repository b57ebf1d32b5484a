"""What the nodes of a pool keep about the pool: who they are, and who is a member since when.

Each node has a card that says which member of which pool it is, and in which life: a node that was wiped has none, and
counts for nothing until it has been filled and let in again, under its id (which decides what it keeps) and in a new
life (which tells it from what it was). The members are one file an epoch, never changed. All end in a checksum, as a
move of a ref does.
"""

import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from llmos_cli.errors import Damaged, UnknownVersion
from llmos_cli.formats import canonical, limits
from llmos_cli.formats.canonical import Json
from llmos_cli.formats.ids import checksum
from llmos_cli.formats.reflog import entry_name, parse_entry_name

VERSION: Final = 1
CARD_KEY: Final = "pool/node"
MEMBERS: Final = "pool/members"
VOTES: Final = "pool/votes"
_ID = re.compile(r"[0-9a-f]{32}\Z")


@dataclass(frozen=True)
class Card:
    """Who a node is; all are random ids of 32 hex digits."""

    pool: str
    node: str
    life: str


@dataclass(frozen=True, order=True)
class Member:
    """A node: its id and its life, and its URL as whoever added it saw it."""

    id: str
    life: str
    url: str


@dataclass(frozen=True)
class Members:
    """The members of a pool in one epoch, sorted by id, and how many of them keep each pack. `renewed` have lost their
    files and are out until they have been filled again."""

    pool: str
    epoch: int
    replicas: int
    nodes: tuple[Member, ...]
    renewed: tuple[Member, ...] = ()

    @property
    def majority(self) -> int:
        return len(self.nodes) // 2 + 1


def new_id() -> str:
    """A random id of a pool, a node or a life."""
    return uuid.uuid4().hex


def members_key(epoch: int) -> str:
    return f"{MEMBERS}/{entry_name(epoch)}"


def parse_members_key(key: str) -> int | None:
    """The epoch of a key; None for anything else that may lie there."""
    folder, _, name = key.rpartition("/")
    return parse_entry_name(name) if folder == MEMBERS else None


def encode_card(card: Card) -> bytes:
    return sealed({"life": card.life, "node": card.node, "pool": card.pool, "version": VERSION})


def decode_card(data: bytes) -> Card:
    """Read a node's card; raises Damaged or UnknownVersion."""
    value = unsealed(data, "the card of a pool's node", {"life", "node", "pool", "version"})
    return Card(_id(value["pool"]), _id(value["node"]), _id(value["life"]))


def encode_members(members: Members) -> bytes:
    return sealed(
        {
            "epoch": members.epoch,
            "nodes": _encode_nodes(members.nodes),
            "pool": members.pool,
            "renewed": _encode_nodes(members.renewed),
            "replicas": members.replicas,
            "version": VERSION,
        }
    )


def decode_members(data: bytes, epoch: int) -> Members:
    """Read the members of an epoch strictly; raises Damaged or UnknownVersion."""
    what = f"the list of a pool's members ({epoch})"
    value = unsealed(data, what, {"epoch", "nodes", "pool", "renewed", "replicas", "version"})
    replicas = value["replicas"]
    if value["epoch"] != epoch or type(replicas) is not int:
        raise Damaged(f"{what} is malformed")
    found, renewed = _decode_nodes(value["nodes"], what), _decode_nodes(value["renewed"], what)
    if len({node.id for node in found + renewed}) != len(found + renewed):
        raise Damaged(f"{what} has a node twice")
    if not 1 <= len(found) <= limits.POOL_NODES or not 1 <= replicas <= limits.POOL_NODES:
        raise Damaged(f"{what} is outside the declared limits")
    return Members(_id(value["pool"]), epoch, replicas, found, renewed)


def sealed(fields: dict[str, Json]) -> bytes:
    """Two lines: canonical JSON, then its XXH3-64 in hex."""
    body = canonical.encode(fields)
    return body + f"\n{checksum(body):016x}\n".encode()


def unsealed(data: bytes, what: str, fields: set[str]) -> dict[str, Json]:
    """The fields of what `sealed` has written; raises Damaged or UnknownVersion, naming `what`."""
    body, newline, check = data.partition(b"\n")
    if not newline or check != f"{checksum(body):016x}\n".encode():
        raise Damaged(f"{what} is empty, cut short or damaged")
    value = canonical.decode(body, what)
    if isinstance(value, dict) and isinstance(value.get("version"), int) and value["version"] != VERSION:
        raise UnknownVersion(f"{what} has the unknown version {value['version']}", hint="use a newer llmos")
    if not isinstance(value, dict) or set(value) != fields or type(value["version"]) is not int:
        raise Damaged(f"{what} does not have its fields")
    return value


def _encode_nodes(nodes: Iterable[Member]) -> list[Json]:
    return [{"id": node.id, "life": node.life, "url": node.url} for node in nodes]


def _decode_nodes(value: Json, what: str) -> tuple[Member, ...]:
    if not isinstance(value, list):
        raise Damaged(f"{what} is malformed")
    found = tuple(_member(node, what) for node in value)
    if list(found) != sorted(found):
        raise Damaged(f"{what} has its nodes in the wrong order")
    return found


def _member(value: Json, what: str) -> Member:
    if not isinstance(value, dict) or set(value) != {"id", "life", "url"} or not isinstance(value["url"], str):
        raise Damaged(f"{what} has a malformed node")
    return Member(_id(value["id"]), _id(value["life"]), value["url"])


def _id(value: Json) -> str:
    if not isinstance(value, str) or not _ID.match(value):
        raise Damaged(f"not the id of a pool or a node: {str(value)[:80]!r}")
    return value
