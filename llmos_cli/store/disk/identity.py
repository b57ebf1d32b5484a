"""Who this process is: the user and host shown in a ref's log, the process identity that a lease is checked by."""

import contextlib
import getpass
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcessIdentity:
    """A process beyond doubt: its number alone may be reused, together with its start time and the boot it is not.

    `boot` also names the namespace of process numbers: a process in another container cannot be asked.
    """

    host: str
    boot: str
    pid: int
    started: str


def who_am_i() -> str:
    """`user@host`."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):
        user = str(os.getuid())
    return f"{user}@{_host()}"


def _host() -> str:
    """The name of this machine; `socket`, which knows it everywhere, takes milliseconds to import."""
    if hasattr(os, "uname"):
        return os.uname().nodename
    import socket

    return socket.gethostname()


def this_process() -> ProcessIdentity:
    return ProcessIdentity(_host(), _boot_id(), os.getpid(), _start_time(os.getpid()))


def is_alive(process: ProcessIdentity) -> bool | None:
    """Whether the process still runs; None if it belongs to another host or container and cannot be asked."""
    if process.host != _host():
        return None
    ours = _boot_id()
    if process.boot != ours:
        return None if process.boot.partition(" ")[0] == ours.partition(" ")[0] else False
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    started = _start_time(process.pid)
    return None if process.started and not started else started == process.started


def _boot_id() -> str:
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _start_time(pid: int) -> str:
    """Clock ticks since boot at which a process started; empty where /proc does not say."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return ""
