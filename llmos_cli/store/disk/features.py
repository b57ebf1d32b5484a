"""What this machine and a folder's file system can do, each tried for real.

A store rests on fsync, on renaming over a file and on creating a name exclusively; the rest says what to expect.
Nothing here decides anything: `doctor` shows it.
"""

import fcntl
import mmap
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from llmos_cli.errors import LlmosError
from llmos_cli.store.disk import durable

_SKEW_SECONDS = 5.0


@dataclass(frozen=True)
class Feature:
    """`needed` features must work for a store to keep its promises."""

    name: str
    works: bool
    needed: bool
    detail: str


@dataclass(frozen=True)
class Disk:
    folder: Path
    filesystem: str
    total: int
    free: int
    features: tuple[Feature, ...]


@dataclass(frozen=True)
class Machine:
    """`usable_cores` and `memory` are what this process may use: affinity and container limits counted."""

    cores: int
    usable_cores: int
    memory: int
    available: int


def probe_machine() -> Machine:
    cores = os.cpu_count() or 1
    usable = float(len(os.sched_getaffinity(0)))
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdigit() and period.isdigit():
        usable = min(usable, int(quota) / int(period))
    table = dict(line.split(":", 1) for line in _read("/proc/meminfo").splitlines() if ":" in line)
    total, available = (_kib(table.get(key, "")) for key in ("MemTotal", "MemAvailable"))
    limit = _read("/sys/fs/cgroup/memory.max")
    if limit.isdigit():
        total = min(total, int(limit))
        used = _read("/sys/fs/cgroup/memory.current")
        available = min(available, total - int(used or 0))
    return Machine(cores, max(1, round(usable)), total, max(0, available))


def probe_disk(folder: Path) -> Disk:
    """Try the file system under `folder` in a temporary folder, removed afterwards; raises AccessDenied or NoSpace."""
    space = os.statvfs(folder)
    scratch = durable.temp_path(folder)
    durable.make_folder(scratch)
    try:
        features = tuple(
            _try(name, needed, probe, scratch)
            for name, needed, probe in (
                ("fsync", True, _fsync),
                ("rename over a file", True, _rename_over),
                ("exclusive create", True, _exclusive),
                ("hard link", False, _hard_link),
                ("memory map", True, _memory_map),
                ("flock", False, _flock),
                ("case-sensitive names", False, _case_sensitive),
                ("clock agrees with the disk", False, _clock),
            )
        )
    finally:
        durable.remove_tree(scratch)
    total, free = space.f_blocks * space.f_frsize, space.f_bavail * space.f_frsize
    return Disk(folder, _filesystem(folder), total, free, features)


def _try(name: str, needed: bool, probe: Callable[[Path], str], scratch: Path) -> Feature:
    """A probe returns a detail ("" for none) or raises: AssertionError says what was seen instead."""
    folder = scratch / name.replace(" ", "-")
    durable.make_folder(folder)
    try:
        return Feature(name, True, needed, probe(folder))
    except (OSError, AssertionError, LlmosError) as exc:
        return Feature(name, False, needed, str(exc))


def _fsync(folder: Path) -> str:
    start = time.perf_counter()
    durable.write_file(folder / "file", b"x")
    return f"{1000 * (time.perf_counter() - start):.1f} ms to write a file for good"


def _rename_over(folder: Path) -> str:
    durable.write_file(folder / "file", b"old")
    durable.write_file(folder / "file", b"new")
    _expect((folder / "file").read_bytes() == b"new", "the old bytes stayed")
    return ""


def _exclusive(folder: Path) -> str:
    won = []
    for data in (b"first", b"second"):
        temp = durable.temp_path(folder)
        durable.write_file(temp, data)
        won.append(durable.publish_new(temp, folder / "name"))
    _expect(won == [True, False] and (folder / "name").read_bytes() == b"first", "a name could be taken twice")
    return ""


def _hard_link(folder: Path) -> str:
    temp = durable.temp_path(folder)
    durable.write_file(temp, b"x")
    inode = temp.stat().st_ino
    durable.publish_new(temp, folder / "name")
    _expect((folder / "name").stat().st_ino == inode, "no hard links here: names are created by copying")
    return ""


def _memory_map(folder: Path) -> str:
    durable.write_file(folder / "file", b"mapped")
    with open(folder / "file", "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        _expect(view[:] == b"mapped", "other bytes were read")
    return ""


def _flock(folder: Path) -> str:
    path = folder / "file"
    durable.write_file(path, b"x")
    with open(path, "rb") as first, open(path, "rb") as second:
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with suppress(BlockingIOError):
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
            raise AssertionError("two processes could hold one lock")
    return ""


def _case_sensitive(folder: Path) -> str:
    durable.write_file(folder / "Name", b"x")
    _expect(not (folder / "name").exists(), "'Name' and 'name' are one file")
    return ""


def _clock(folder: Path) -> str:
    durable.write_file(folder / "file", b"x")
    skew = (folder / "file").stat().st_mtime - time.time()
    _expect(abs(skew) < _SKEW_SECONDS, f"the file system's clock is off by {skew:.0f} s")
    return ""


def _expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise AssertionError(otherwise)


def _filesystem(folder: Path) -> str:
    """The type of the mount that holds `folder`, as /proc/mounts tells it."""
    best, found = -1, "unknown"
    resolved = folder.resolve()
    for line in _read("/proc/mounts").splitlines():
        fields = line.split()
        if len(fields) < 3:
            continue
        point = Path(fields[1].replace("\\040", " "))
        if len(point.parts) > best and resolved.is_relative_to(point):
            best, found = len(point.parts), fields[2]
    return found


def _read(path: str) -> str:
    with suppress(OSError):
        return Path(path).read_text("utf-8", "replace").strip()
    return ""


def _kib(text: str) -> int:
    number = text.strip().partition(" ")[0]
    return int(number) * 1024 if number.isdigit() else 0
