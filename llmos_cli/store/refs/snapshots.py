"""Snapshots that lie in a store because it is the remote of backups: they keep what they name alive, as refs do."""

from collections.abc import Iterator

from llmos_cli.errors import from_os_error
from llmos_cli.formats import limits
from llmos_cli.formats.layout import SNAPSHOTS
from llmos_cli.formats.snapshot import Snapshot, SnapshotName, decode_snapshot, parse_snapshot_name
from llmos_cli.store.handle import Store


def snapshot_names(store: Store) -> list[SnapshotName]:
    """The snapshots in a store, the oldest first; a failure to list must never look like "none"."""
    folder = store.root / SNAPSHOTS
    try:
        names = [parse_snapshot_name(path.name) for path in folder.iterdir()]
    except FileNotFoundError:
        return []
    except OSError as exc:
        raise from_os_error(exc, f"listing {folder}") from exc
    return sorted(name for name in names if name)


def read_snapshot(store: Store, name: SnapshotName) -> Snapshot | None:
    """A snapshot, None if it was pruned meanwhile; raises Damaged."""
    path = store.root / name.key
    try:
        with open(path, "rb") as file:
            data = file.read(limits.SNAPSHOT_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise from_os_error(exc, f"reading {path}") from exc
    return decode_snapshot(data, name)


def read_snapshots(store: Store) -> Iterator[tuple[SnapshotName, Snapshot]]:
    """Every snapshot in a store; raises Damaged for one that cannot be read."""
    for name in snapshot_names(store):
        snapshot = read_snapshot(store, name)
        if snapshot:
            yield name, snapshot
