"""What a remote can be relied on for, found out by trying: does it refuse to create what is there already?

Refs rest on that. A gateway that ignores the condition would let two writers win; such a remote is marked as one that
everybody writes to by way of lock objects.
"""

from typing import Final

from llmos_cli.errors import AccessDenied
from llmos_cli.remote.open import is_ready
from llmos_cli.remote.transports.transport import Transport

CONDITIONAL: Final = "conditional put"
LOCKS: Final = "lock objects"
READ_ONLY: Final = "read only"
LINKS: Final = "exclusive names"


def probe(transport: Transport) -> str:
    """How a ref is moved there, one of the words above; leaves nothing behind but, where it is needed, the mark."""
    from llmos_cli.remote.transports.objectstore import ObjectStoreTransport
    from llmos_cli.remote.transports.published import WebTransport

    if isinstance(transport, WebTransport):
        return READ_ONLY
    if not isinstance(transport, ObjectStoreTransport):
        return LINKS
    try:
        if transport.uses_locks():
            return LOCKS
        if transport.creates_exclusively():
            return CONDITIONAL
        if is_ready(transport):
            transport.require_locks()
        return LOCKS
    except AccessDenied:
        return READ_ONLY
