"""Which of two values of a ref comes after the other: by what the ref held earlier, or by what an object was made from.

A ref may only move forward by itself. Whoever has never seen the other side's value must not replace it.
"""

from llmos_cli.errors import Damaged
from llmos_cli.formats.ids import ObjectId
from llmos_cli.remote.exchange.refs import RemoteRef, remote_log
from llmos_cli.remote.transports.transport import Transport
from llmos_cli.store.handle import Store
from llmos_cli.store.refs.lineage import trace
from llmos_cli.store.refs.refs import RefEntry, ref_history


def rests_on(store: Store, current: RefEntry, value: ObjectId) -> bool:
    """Whether a local ref has moved on from `value`: it held it before, or what it holds was made from it."""
    for move in ref_history(store, current.ref):
        if value in (move.id, move.previous):
            return True
    try:
        return value in trace(store, current.id).objects
    except Damaged:
        return False  # its history cannot be told


def remote_held(transport: Transport, seen: RemoteRef, value: ObjectId) -> bool:
    """Whether the remote's ref has moved on from `value`."""
    return any(value in (move.id, move.previous) for move in remote_log(transport, seen))
