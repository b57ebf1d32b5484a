"""Snapshots at a remote: which there are, reading them, and which of them a policy keeps."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Final

from llmos_cli.errors import Damaged, NotFound, UnknownVersion, UsageError
from llmos_cli.formats import limits
from llmos_cli.formats.layout import SNAPSHOTS
from llmos_cli.formats.snapshot import Snapshot, SnapshotName, decode_snapshot, parse_snapshot_name
from llmos_cli.progress import Progress
from llmos_cli.remote.exchange.parallel import in_order
from llmos_cli.remote.open import Remote, require_ready
from llmos_cli.remote.transports.transport import Transport

_STREAMS: Final = 8
_LEAST_DIGITS: Final = 4
Found = tuple[SnapshotName, Snapshot]


@dataclass(frozen=True)
class Policy:
    """How many days, weeks and months keep their newest snapshot each."""

    daily: int = 0
    weekly: int = 0
    monthly: int = 0

    @property
    def prunes(self) -> bool:
        return bool(self.daily or self.weekly or self.monthly)


def snapshot_names(transport: Transport) -> list[SnapshotName]:
    """The snapshots at a remote, the oldest first."""
    names = (parse_snapshot_name(key.removeprefix(f"{SNAPSHOTS}/")) for key, _ in transport.list(f"{SNAPSHOTS}/"))
    return sorted(name for name in names if name)


def fetch_snapshot(transport: Transport, name: SnapshotName) -> Snapshot:
    """Read a snapshot; raises Damaged naming the remote, NotFound if it was pruned."""
    try:
        return decode_snapshot(transport.read(name.key, 0, limits.SNAPSHOT_BYTES + 1), name)
    except Damaged as exc:
        raise type(exc)(f"{exc.message}, at {transport.url}", hint=exc.hint) from exc


def list_snapshots(remote: Remote, progress: Progress) -> list[Found]:
    """Every snapshot at a remote, the oldest first; one that cannot be read is left out with a warning."""
    require_ready(remote.transport)

    def read(name: SnapshotName) -> Found | str | None:
        try:
            return name, fetch_snapshot(remote.transport, name)
        except UnknownVersion:
            raise
        except Damaged as exc:
            return exc.message
        except NotFound:
            return None

    found = []
    with closing(in_order(read, snapshot_names(remote.transport), workers=_STREAMS)) as read_back:
        for item in read_back:
            if isinstance(item, str):
                progress.warn(f"{item}; it is passed over")
            elif item:
                found.append(item)
    return found


def kept_by(policy: Policy, found: Sequence[Found]) -> set[SnapshotName]:
    """What a policy keeps: of the newest days, weeks and months (UTC) that have one the newest snapshot each, for every
    source on its own, and always the newest of all. Without a policy: everything."""
    if not policy.prunes:
        return {name for name, _ in found}
    kept: set[SnapshotName] = set()
    for source in {snapshot.source for _, snapshot in found}:
        names = sorted((name for name, snapshot in found if snapshot.source == source), reverse=True)
        kept.add(names[0])
        for count, period in ((policy.daily, _day), (policy.weekly, _week), (policy.monthly, _month)):
            newest: dict[str, SnapshotName] = {}
            for name in names:
                newest.setdefault(period(name.moment), name)
            kept.update(list(newest.values())[:count])
    return kept


def choose(found: Sequence[Found], at: str | None, source: str, label: str) -> Found:
    """The snapshot that a user means: the newest one, at a time or before it, or the one whose id begins so.

    With snapshots of several stores, those of `source` are meant; raises UsageError if there are none of it.
    """
    if not found:
        raise NotFound(f"no snapshots at {label}", hint=f"make one: llmos backup {label}")
    if at is not None and at.startswith("@"):
        return _by_id(found, at[1:].lower(), label)
    sources = {snapshot.source for _, snapshot in found}
    if source in sources:
        found = [item for item in found if item[1].source == source]
    elif len(sources) > 1:
        raise UsageError(
            f"{label} has snapshots of several stores: {', '.join(sorted(sources))}",
            hint=f"choose one by its id: llmos backup {label} --list, then --at @ID",
        )
    until = None if at is None else _parse_time(at)
    fitting = [item for item in found if until is None or item[0].moment <= until]
    if not fitting:
        raise NotFound(
            f"no snapshot at {label} is as old as {at}; the oldest is of {found[0][1].time}",
            hint=f"list them: llmos backup {label} --list",
        )
    return fitting[-1]


def _by_id(found: Sequence[Found], prefix: str, label: str) -> Found:
    fitting = [item for item in found if len(prefix) >= _LEAST_DIGITS and str(item[0].id).startswith(prefix)]
    if len(fitting) != 1:
        raise NotFound(
            f"{len(fitting) or 'no'} snapshots at {label} have an id that begins with {prefix[:64]!r}",
            hint=f"list them: llmos backup {label} --list",
        )
    return fitting[0]


def _parse_time(text: str) -> datetime:
    """A date means its last moment; without a zone, local time is meant."""
    try:
        day = date.fromisoformat(text)
    except ValueError:
        try:
            moment = datetime.fromisoformat(text)
        except ValueError:
            raise UsageError(
                f"{text[:100]!r} is not a time", hint="write 2026-11-25, '2026-11-25 14:30' or an id as @ID"
            ) from None
    else:
        moment = datetime.combine(day, time.max) if len(text) <= 10 else datetime.fromisoformat(text)
    try:
        return moment.astimezone(UTC)
    except (OverflowError, ValueError):
        raise UsageError(f"{text[:100]!r} is too far away", hint="write 2026-11-25") from None


def _day(moment: datetime) -> str:
    return moment.date().isoformat()


def _week(moment: datetime) -> str:
    return (moment.date() - timedelta(days=moment.weekday())).isoformat()


def _month(moment: datetime) -> str:
    return moment.strftime("%Y-%m")
