"""Leases: files that say a live process is writing or using objects, so that gc leaves them alone.

They save work and prevent waste; correctness does not rest on them. A lease whose process is gone is removed by
whoever notices; one of another host counts for half an hour after its last renewal.
"""

import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import uuid4

from llmos_cli.errors import Busy, Damaged
from llmos_cli.formats.ids import ObjectId, parse_id
from llmos_cli.store import durable
from llmos_cli.store.handle import Store
from llmos_cli.store.identity import ProcessIdentity, is_alive, this_process

RENEW_SECONDS: Final = 300.0
STALE_SECONDS: Final = 1800.0
_FIELDS: Final = {"boot", "host", "objects", "pid", "purpose", "started", "writes"}


@dataclass(frozen=True)
class Lease:
    """`writes` marks a transaction: what it has published so far is not reachable yet. `since` is a Unix time."""

    path: Path
    process: ProcessIdentity
    purpose: str
    objects: tuple[ObjectId, ...]
    writes: bool
    since: float


@contextlib.contextmanager
def hold(store: Store, purpose: str, objects: Sequence[ObjectId], *, writes: bool = False) -> Iterator[Lease]:
    """Keep manifests alive while the block runs; renewed in the background."""
    process = this_process()
    path = store.leases / f"{uuid4().hex}.json"
    _write(path, process, purpose, objects, writes)
    with _renewed(path):
        yield Lease(path, process, purpose, tuple(objects), writes, time.time())


@contextlib.contextmanager
def hold_alone(store: Store, name: str, purpose: str, objects: Sequence[ObjectId] = ()) -> Iterator[None]:
    """Like `hold`, but only one process may hold `name`: raises Busy naming the holder."""
    path = store.leases / f"only-{name}.json"
    temp = durable.temp_path(store.leases)
    for _ in range(3):
        _write(temp, this_process(), purpose, objects, False)
        if durable.publish_new(temp, path):
            break
        for lease in live_leases(store):
            if lease.path == path:
                process = lease.process
                raise Busy(
                    f"{purpose}: already running as process {process.pid} on {process.host}",
                    hint="wait for it, or stop it first",
                )
    else:
        raise Busy(f"{purpose}: the lease {path} keeps coming back", hint="run the command again")
    with _renewed(path):
        yield


def live_leases(store: Store) -> list[Lease]:
    """The leases of processes that still run; those of dead ones are removed. Raises Damaged for an unreadable one."""
    live = []
    for path in sorted(store.leases.glob("*.json")):
        try:
            since = path.stat().st_mtime
            lease = _read(path, since)
        except FileNotFoundError:
            continue
        alive = is_alive(lease.process)
        if alive is None:
            alive = time.time() - since < STALE_SECONDS
        if alive:
            live.append(lease)
        else:
            durable.remove(path)
    return live


@contextlib.contextmanager
def _renewed(path: Path) -> Iterator[None]:
    stop = threading.Event()

    def renew() -> None:
        while not stop.wait(RENEW_SECONDS):
            durable.touch(path)

    threading.Thread(target=renew, name="lease", daemon=True).start()
    try:
        yield
    finally:
        stop.set()
        durable.remove(path)


def _write(path: Path, process: ProcessIdentity, purpose: str, objects: Sequence[ObjectId], writes: bool) -> None:
    fields = {"purpose": purpose, "objects": [str(oid) for oid in objects], "writes": writes}
    durable.write_volatile(path, json.dumps(dataclasses.asdict(process) | fields).encode())


def _read(path: Path, since: float) -> Lease:
    try:
        fields = json.loads(path.read_bytes())
        if set(fields) != _FIELDS:
            raise ValueError("it does not have the fields of a lease")
        process = ProcessIdentity(str(fields["host"]), str(fields["boot"]), int(fields["pid"]), str(fields["started"]))
        objects = tuple(parse_id(text) for text in fields["objects"])
        return Lease(path, process, str(fields["purpose"]), objects, fields["writes"] is True, since)
    except (ValueError, TypeError, Damaged) as exc:
        raise Damaged(
            f"the lease {path} cannot be read: {exc}", hint="if nothing uses the store, remove the file"
        ) from exc
