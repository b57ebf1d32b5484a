"""What a remote must be able to do: keep bytes under keys. Every transport passes the suite in `tests/contract/`.

It knows nothing of packs, refs or manifests, and nothing above it knows where the bytes are. The one exclusive step
is `create`, and it is all the compare-and-swap that refs need: a ref is a folder of numbered moves. Everything else is
named by content, so doing it twice, or from two machines at once, does no harm.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from llmos_cli.errors import Unsafe
from llmos_cli.formats import limits
from llmos_cli.formats.ids import ObjectId
from llmos_cli.progress import Task

_PART: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*\Z")
_DEPTH: Final = 8


@dataclass(frozen=True)
class Dated:
    """What a list tells of a key; `time` is when it got its value, in seconds since 1970 by the clock over there."""

    key: str
    size: int
    time: float


class Transport(Protocol):
    """All methods may be called from several threads. Errors are LlmosErrors that name the URL: RemoteUnavailable,
    AccessDenied, NoSpace, NotFound (a key that is absent), Unsafe (a malformed key)."""

    @property
    def url(self) -> str:
        """Where it is, as shown to people; never holds a secret."""

    def initialise(self) -> None:
        """Make an empty remote where there is none; its FORMAT appears last. Does nothing to one that is there."""

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Keys below a prefix ("" or one that ends in "/") with their sizes, in no order.

        Unfinished writes are left out. Nothing below the prefix is no error, being unable to tell is. A key that does
        not fit `check_key` may appear if somebody else put it there.
        """

    def dated(self, prefix: str) -> Iterator[Dated]:
        """The same with times."""

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """The bytes from `start` to `end` (None: to the last one); fewer if the value ends before."""

    def size(self, key: str) -> int | None:
        """The size of a value in bytes, None if the key is absent."""

    def put_file(self, key: str, path: Path, name: ObjectId, task: Task) -> None:
        """Store a local file whose bytes hash to `name`: whole, durable, in the place of what was there.

        The hash is compared while the bytes pass; raises Damaged, and leaves the key as it was, if it differs. Raises
        FileNotFoundError if `path` is gone. `task` advances by the bytes sent.
        """

    def create(self, key: str, data: bytes) -> bool:
        """Store a small value if the key is absent: exactly one of many racers gets True, on all machines."""

    def delete(self, key: str) -> None:
        """Remove a key; a key that is absent is no error."""

    def set_aside(self, key: str, to: str) -> None:
        """Give a value another key, where its time begins anew; NotFound if it is not there. Stopped half way, it has
        both keys, never none."""

    def bring_back(self, key: str, to: str) -> None:
        """The way back. Where a removal may be carried out late, after its answer was lost, the value stays at `key` as
        well: the one from `to` may yet come."""


class SlowToAsk:
    """What a transport inherits from if a question to it costs a round trip: what it answers is then remembered."""


def check_key(key: str) -> str:
    """Return `key` if every transport can hold it and none can be led astray by it; raises Unsafe otherwise."""
    parts = key.split("/")
    if len(parts) > _DEPTH or not all(_PART.match(part) and len(part) <= limits.PATH_PART_BYTES for part in parts):
        raise Unsafe(f"unsafe key {key[:200]!r}")
    return key


def check_prefix(prefix: str) -> str:
    """Return `prefix` if it is empty or a key that ends in "/"; raises Unsafe otherwise."""
    if prefix:
        if not prefix.endswith("/"):
            raise Unsafe(f"unsafe prefix {prefix[:200]!r}: it must end in '/'")
        check_key(prefix[:-1])
    return prefix
