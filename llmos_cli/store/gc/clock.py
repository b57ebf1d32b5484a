"""Whether the clock can be trusted with ages, on which a gc decides.

A file that is made now must have the time that it is now, and nothing that lies in the store may come from the future:
another host that writes here, or this one before its clock was set, told another time. Where they differ, what is
young may look old.
"""

import time
from typing import Final

from llmos_cli.errors import AccessDenied, NoSpace, Unsafe
from llmos_cli.store.disk import durable
from llmos_cli.store.handle import Store
from llmos_cli.store.leases import live_leases
from llmos_cli.store.packs.packs import list_packs

SKEW_SECONDS: Final = 300.0  # how far the clocks of hosts and file systems may differ
_DAY_SECONDS: Final = 86400.0


def check_clock(store: Store, now: float | None = None) -> None:
    """Raise Unsafe if the time here (`now`) is not that of the store."""
    apart = _of_file_system(store, now)
    if apart is not None and abs(apart) > SKEW_SECONDS:
        direction = "ahead of" if apart > 0 else "behind"
        raise Unsafe(
            f"the clock of this machine is {span(abs(apart))} {direction} that of the file system of {store.root}",
            hint="set the clock, then run the command again; llmos gc --dry-run only looks",
        )
    latest = (time.time() if now is None else now) + SKEW_SECONDS
    for lease in live_leases(store):
        begun = lease.since + SKEW_SECONDS  # its holder's clock, when it began
        if begun > latest:
            raise Unsafe(
                f"process {lease.process.pid} on {lease.process.host} ({lease.purpose}) says it began in "
                f"{span(begun - latest + SKEW_SECONDS)} from now: the clocks of the two machines differ",
                hint="set the clocks, then run the command again; llmos gc --dry-run only looks",
            )
    for folder in (store.packs, store.trash):
        for path in list_packs(folder).values():
            try:
                ahead = path.stat().st_mtime - latest
            except FileNotFoundError:
                continue
            if ahead > 0:
                raise Unsafe(
                    f"{path} is from the future ({span(ahead + SKEW_SECONDS)} from now): a clock is or was wrong",
                    hint=f"set the clock; if it is right now: touch {path}",
                )


def _of_file_system(store: Store, now: float | None) -> float | None:
    """Seconds by which the clock here is ahead of the file system's; None where no file can be made."""
    probe = durable.temp_path(store.tmp)
    try:
        durable.write_volatile(probe, b"")
    except (AccessDenied, NoSpace):
        return None
    try:
        made = probe.stat().st_mtime
    except FileNotFoundError:
        return None
    finally:
        durable.remove(probe)
    return (time.time() if now is None else now) - made


def span(seconds: float) -> str:
    """A time in words."""
    for name, length in (("days", _DAY_SECONDS), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {name}"
    return f"{seconds:.0f} seconds"
