"""Exclusive creation at an object store that has none: by lock objects, for gateways that ignore `If-None-Match: *`.

Whoever wants to create a key first writes a claim beside it, then lists the claims. Only who sees no claim but its own
goes on; of several that see each other the first by name waits and the others withdraw. A claim is written before the
list is read, so of two, one at least sees the other: never do both go on. That needs a store that lists what it has
just stored (S3, Ceph RGW and their like do) and writers that do not sleep for minutes in between: a claim that is
older by `STALE_SECONDS`, by the server's own clock, counts as that of a dead process.
"""

import random
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Final, Protocol

from llmos_cli.errors import Busy
from llmos_cli.remote.transports.transport import Dated

LOCKS: Final = "locks"
MARKER: Final = f"{LOCKS}/ALWAYS"  # a remote that has it is written to in this way by everybody
STALE_SECONDS: Final = 600.0
_PATIENCE_SECONDS: Final = 120.0


class Shelf(Protocol):
    """What an object store must be able to do for this."""

    def put(self, key: str, data: bytes) -> None: ...

    def delete(self, key: str) -> None: ...

    def exists(self, key: str) -> bool: ...

    def dated(self, prefix: str) -> Iterator[Dated]: ...


def create_locked(shelf: Shelf, key: str, data: bytes, *, sleep: Callable[[float], None] = time.sleep) -> bool:
    """Store a value if the key is absent; raises Busy if others hold on to it for too long."""
    end = time.monotonic() + _PATIENCE_SECONDS
    pause = 0.02
    while time.monotonic() < end:
        if shelf.exists(key):
            return False
        folder = f"{LOCKS}/{key}/"
        claim = f"{folder}{secrets.token_hex(16)}"
        shelf.put(claim, b"")
        try:
            while time.monotonic() < end:
                others = _others(shelf, folder, claim)
                if not others:
                    if shelf.exists(key):
                        return False
                    shelf.put(key, data)
                    return True
                if min(others) < claim:
                    break
                sleep(pause * random.uniform(0.5, 1.0))
        finally:
            shelf.delete(claim)
        sleep(pause * random.uniform(0.5, 1.5))
        pause = min(pause * 1.5, 1.0)
    raise Busy(f"{key} is being created by somebody else", hint="run the command again")


def _others(shelf: Shelf, folder: str, claim: str) -> list[str]:
    """The claims of others that live; those of dead processes are removed."""
    claims = {item.key: item.time for item in shelf.dated(folder)}
    mine = claims.pop(claim, None)
    if mine is None:
        return [""]  # taken for dead, or not listed yet: withdraw
    dead = [name for name, made in claims.items() if mine - made > STALE_SECONDS]
    for name in dead:
        shelf.delete(name)
    return [name for name in claims if name not in dead]
