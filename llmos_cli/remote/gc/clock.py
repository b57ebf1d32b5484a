"""Whether the clock of a remote can be trusted with the ages of what lies there, on which a gc decides.

Ages come from the times that the remote itself gives to what it stores. Where its clock and the one here are apart, one
of them is wrong, and nobody here knows which; what comes from the future says that a clock was wrong.
"""

import secrets
import time
from collections.abc import Iterable
from typing import Final

from llmos_cli.errors import Unsafe
from llmos_cli.formats.layout import TRASH
from llmos_cli.remote.pool.pool import PoolTransport
from llmos_cli.remote.transports.transport import Dated, Transport
from llmos_cli.store.gc.clock import SKEW_SECONDS, span

_PROBES: Final = f"{TRASH}/clock-"
_LEFT_SECONDS: Final = 3600.0


def remote_now(transport: Transport, now: float | None = None) -> float:
    """The time at a remote, of a pool that of its slowest clock; raises Unsafe where it is not about the time here."""
    nodes = list(transport.live.values()) if isinstance(transport, PoolTransport) else [transport]
    return min(_time_at(node, now) for node in nodes)


def check_times(transport: Transport, found: Iterable[Dated], now: float) -> None:
    """Raise Unsafe if something comes from the future."""
    for item in found:
        if item.time > now + SKEW_SECONDS:
            raise Unsafe(
                f"{item.key} at {transport.url} is from the future ({span(item.time - now)} from now)",
                hint="a clock was wrong: set it; a gc works again once that time has come",
            )


def _time_at(node: Transport, now: float | None) -> float:
    """The time that a node gives to what is stored there now."""
    key = f"{_PROBES}{secrets.token_hex(8)}"
    node.create(key, b"")
    try:
        probes = {item.key: item.time for item in node.dated(f"{TRASH}/") if item.key.startswith(_PROBES)}
    finally:
        node.delete(key)
    made = probes.get(key)
    for other, time_made in probes.items():
        if made is not None and time_made < made - _LEFT_SECONDS:  # of a gc that was killed
            node.delete(other)
    if made is None:
        raise Unsafe(
            f"{node.url} does not list what was just stored there", hint="a gc must see all there is; try again later"
        )
    apart = (time.time() if now is None else now) - made
    if abs(apart) > SKEW_SECONDS:
        direction = "ahead of" if apart > 0 else "behind"
        raise Unsafe(
            f"the clock of this machine is {span(abs(apart))} {direction} that of {node.url}",
            hint="set the clock, then run the command again; --dry-run only looks",
        )
    return made
