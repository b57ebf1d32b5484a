"""Which nodes of a pool keep which pack: rendezvous hashing, also called highest random weight.

Every node gets a weight for every pack, from BLAKE3 of both names; the `replicas` heaviest keep it. So a pack's place
follows from its name and the members alone, on every machine, with no table to keep: N packs make about K = N*R/M a
node, and a node that comes or goes moves only what it gets or had, about 1/M of the data.
"""

from collections.abc import Iterable

from llmos_cli.formats.ids import ObjectId, object_id


def ranked(pack: ObjectId, nodes: Iterable[str]) -> list[str]:
    """All nodes, by their weight for a pack: the first ones keep it, the next one takes over where one is missing."""
    return sorted(nodes, key=lambda node: (object_id(node.encode() + b"\0" + pack), node), reverse=True)


def homes(pack: ObjectId, nodes: Iterable[str], replicas: int) -> list[str]:
    """The nodes that should keep a pack; all of them where there are fewer than `replicas`."""
    return ranked(pack, nodes)[:replicas]
