"""LISTING: a file at a remote that says what is there, for readers that can fetch but not list: plain web servers.

`remote publish` makes it, every push that changes something renews it. It is a cache: one that is behind hides the
newest push from web readers and nothing else, because packs and moves never change under their names.
"""

from collections.abc import Mapping
from typing import Final

from llmos_cli.errors import Damaged, Unsafe
from llmos_cli.formats.ids import checksum, object_id
from llmos_cli.formats.layout import FORMAT_FILE, PACKS, REFS
from llmos_cli.progress import Silent
from llmos_cli.remote.transports.transport import Transport, check_key
from llmos_cli.store.disk import durable
from llmos_cli.store.handle import Store

LISTING: Final = "LISTING"
_TRIES: Final = 3
_DIGITS: Final = 16


def is_published(transport: Transport) -> bool:
    return transport.size(LISTING) is not None


def publish(store: Store, transport: Transport) -> int:
    """Write down what a remote holds; returns how many keys. Done anew if somebody pushed meanwhile."""
    keys = _keys(transport)
    for _ in range(_TRIES):
        data = render_listing(keys)
        temp = durable.temp_path(store.tmp)
        durable.write_volatile(temp, data)
        try:
            with Silent().task("publishing") as task:
                transport.put_file(LISTING, temp, object_id(data), task)
        finally:
            durable.remove(temp)
        before, keys = keys, _keys(transport)
        if keys == before:
            break
    return len(keys)


def render_listing(keys: Mapping[str, int]) -> bytes:
    """A line for each key: size, space, key; then the checksum of those lines as 16 hex digits."""
    lines = "".join(f"{size} {key}\n" for key, size in sorted(keys.items())).encode("ascii")
    return lines + f"{checksum(lines):016x}\n".encode("ascii")


def parse_listing(data: bytes) -> dict[str, int]:
    """Read it; raises Damaged."""
    lines, check = data[: -_DIGITS - 1], data[-_DIGITS - 1 :]
    if check != f"{checksum(lines):016x}\n".encode("ascii"):
        raise Damaged(f"the {LISTING} is damaged or cut short")
    keys: dict[str, int] = {}
    try:
        for line in lines.decode("ascii").splitlines():
            size, _, key = line.partition(" ")
            keys[check_key(key)] = int(size)
    except (ValueError, Unsafe) as exc:
        raise Damaged(f"the {LISTING} holds something else than keys and sizes") from exc
    return keys


def _keys(transport: Transport) -> dict[str, int]:
    """What readers need: FORMAT, packs and moves."""
    size = transport.size(FORMAT_FILE)
    found = {FORMAT_FILE: size} if size is not None else {}
    for folder in (PACKS, REFS):
        for key, length in transport.list(f"{folder}/"):
            try:
                found[check_key(key)] = length
            except Unsafe:
                continue  # somebody else's
    return found
