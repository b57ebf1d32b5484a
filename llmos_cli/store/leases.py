"""Leases: files that say a live process is writing or using objects, so that gc leaves them alone.

They save work and prevent waste; correctness does not rest on them. A lease whose process is gone is removed by
whoever notices; one of another host, or one that cannot be read (a power loss leaves such), counts for half an hour
after its last renewal.
"""

import contextlib
import dataclasses
import json
import os
import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from llmos_cli.errors import Busy, Damaged, LlmosError, from_os_error
from llmos_cli.formats.ids import ObjectId, parse_id
from llmos_cli.store.disk import durable
from llmos_cli.store.disk.identity import ProcessIdentity, is_alive, this_process
from llmos_cli.store.handle import Store

RENEW_SECONDS: Final = 300.0
STALE_SECONDS: Final = 1800.0
_LOOKS: Final = 40
_LOOK_SECONDS: Final = 0.005
_TRIES: Final = 4
_CLOCK_SECONDS: Final = 300.0  # how far the clocks of hosts and file systems may differ
_FIELDS: Final = {"boot", "host", "objects", "pid", "purpose", "since", "started", "writes"}


@dataclass(frozen=True)
class Lease:
    """`writes` marks a transaction: what it has published so far is not reachable yet. It began after the Unix time
    `since`."""

    path: Path
    process: ProcessIdentity
    purpose: str
    objects: tuple[ObjectId, ...]
    writes: bool
    since: float


@contextlib.contextmanager
def hold(store: Store, purpose: str, objects: Sequence[ObjectId], *, writes: bool = False) -> Iterator[Lease]:
    """Keep manifests alive while the block runs; renewed in the background."""
    path = store.leases / f"{durable.fresh_name()}.json"
    lease = _write(path, purpose, objects, writes)
    with _renewed(path):
        yield lease


@contextlib.contextmanager
def hold_alone(store: Store, name: str, purpose: str, objects: Sequence[ObjectId] = ()) -> Iterator[None]:
    """Like `hold`, but only one process may hold `name`: raises Busy naming the holder.

    Each raises its own flag and then looks for others: of two at once at least one sees the other and steps back, and
    the one whose flag comes first keeps it up meanwhile, so that of many at once one gets in. A file that all fight for
    would not do, for whoever clears away a dead holder's may hit that of a new one.
    """
    prefix = f"only-{name}-"
    path = store.leases / f"{prefix}{durable.fresh_name()}.json"

    def rivals() -> list[Lease]:
        return [item for item in live_leases(store) if item.path.name.startswith(prefix) and item.path != path]

    for attempt in range(_TRIES):
        others = rivals()
        if not others:
            _write(path, purpose, objects, False)
            with _renewed(path):
                for _ in range(_LOOKS):
                    others = rivals()
                    if not others:
                        yield
                        return
                    if others[0].path < path:
                        break
                    time.sleep(_LOOK_SECONDS)
        time.sleep(random.uniform(0, 0.02 * attempt))
    holder = others[0].process
    raise Busy(
        f"{purpose}: already running as process {holder.pid} on {holder.host}", hint="wait for it, or stop it first"
    )


def live_leases(store: Store) -> list[Lease]:
    """The leases of processes that still run; those of dead ones are removed. Raises Damaged for an unreadable one."""
    live = []
    for path in _lease_files(store):
        try:
            fresh = time.time() - path.stat().st_mtime < STALE_SECONDS
            lease = _read(path)
        except FileNotFoundError:
            continue
        except Damaged:
            if fresh:
                raise
            durable.remove(path)
            continue
        except OSError as exc:
            raise from_os_error(exc, f"reading the lease {path}") from exc
        alive = is_alive(lease.process)
        if fresh if alive is None else alive:
            live.append(lease)
        else:
            durable.remove(path)
    return live


def parse_lease(data: bytes, where: str) -> tuple[tuple[ObjectId, ...], bool]:
    """What a lease says, wherever it was read: its objects, and whether its holder writes. Raises Damaged."""
    lease = _parse(Path(where), data)
    return lease.objects, lease.writes


def _lease_files(store: Store) -> list[Path]:
    """A failure to list must never look like "nobody"."""
    try:
        return sorted(store.leases / name for name in os.listdir(store.leases) if name.endswith(".json"))
    except OSError as exc:
        raise from_os_error(exc, f"listing {store.leases}") from exc


@contextlib.contextmanager
def _renewed(path: Path) -> Iterator[None]:
    stop = threading.Event()

    def renew() -> None:
        while not stop.wait(RENEW_SECONDS):
            with contextlib.suppress(LlmosError):  # a file system that is away for a moment may come back
                durable.touch(path)

    threading.Thread(target=renew, name="lease", daemon=True).start()
    try:
        yield
    finally:
        stop.set()
        with contextlib.suppress(LlmosError):  # what was done under the lease is done; a dead holder's is removed
            durable.remove(path)


def _write(path: Path, purpose: str, objects: Sequence[ObjectId], writes: bool) -> Lease:
    lease = Lease(path, this_process(), purpose, tuple(objects), writes, time.time() - _CLOCK_SECONDS)
    fields = {"purpose": purpose, "objects": [str(oid) for oid in objects], "writes": writes, "since": lease.since}
    durable.write_volatile(path, json.dumps(dataclasses.asdict(lease.process) | fields).encode())
    return lease


def _read(path: Path) -> Lease:
    return _parse(path, path.read_bytes())


def _parse(path: Path, data: bytes) -> Lease:
    try:
        fields = json.loads(data)
        if set(fields) != _FIELDS:
            raise ValueError("it does not have the fields of a lease")
        process = ProcessIdentity(str(fields["host"]), str(fields["boot"]), int(fields["pid"]), str(fields["started"]))
        objects = tuple(parse_id(text) for text in fields["objects"])
        return Lease(path, process, str(fields["purpose"]), objects, fields["writes"] is True, float(fields["since"]))
    except (ValueError, TypeError, Damaged) as exc:
        raise Damaged(
            f"the lease {path} cannot be read: {exc}",
            hint="if nothing uses the store, remove the file; after half an hour it is ignored",
        ) from exc
