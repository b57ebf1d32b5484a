"""What the benchmarks share: the machine in words, processes and what they cost, alternating runs, medians as ratios to
a yardstick."""

import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import ParamSpec, TypeVar

Run = Callable[[], float]  # seconds
P = ParamSpec("P")
T = TypeVar("T")

RSS = 400e6 + 64e6 * len(os.sched_getaffinity(0))  # what a command may take


def print_machine() -> None:
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    print(
        f"{cpu}, {len(os.sched_getaffinity(0))} cores, Linux {platform.release()}, Python {platform.python_version()}"
    )


@dataclass(frozen=True)
class Cost:
    """Wall seconds, processor seconds and the peak of resident memory in bytes of a process."""

    wall: float
    cpu: float = 0.0
    memory: int = 0


def spend(command: Sequence[str], cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Cost:
    """Run a command that must succeed. Its peak of memory starts with this process's: which must be small."""
    started = time.perf_counter()
    words = ["env", *(("-C", str(cwd)) if cwd else ()), *command]
    files = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2)]
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}  # as installed
    child = os.posix_spawnp(words[0], words, {**inherited, **(env or {})}, file_actions=files)
    _, status, used = os.wait4(child, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise SystemExit(f"failed with {code}: {' '.join(command)}")
    return Cost(time.perf_counter() - started, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)


def timed(command: list[str], cwd: Path | None = None, env: Mapping[str, str] | None = None) -> float:
    """Wall seconds of a command that must succeed."""
    return spend(command, cwd, env).wall


def in_child(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function of a module in a fresh process, which may import and allocate what this one must not."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args, kwargs)


def alternate(runs: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Every contender once a round, so that a drift of the machine hits all alike."""
    taken: dict[str, list[T]] = {name: [] for name in runs}
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
        for name, run in runs.items():
            taken[name].append(run())
    return taken


def report(title: str, taken: Mapping[str, list[float]], yardstick: str, notes: Mapping[str, str]) -> None:
    base = statistics.median(taken[yardstick])
    print(f"\n{title}\n{'':24}{'median':>10}{'least':>10}{'ratio':>8}")
    for name, seconds in taken.items():
        median = statistics.median(seconds)
        print(f"{name:24}{median:9.3f}s{min(seconds):9.3f}s{median / base:8.2f}  {notes.get(name, '')}", flush=True)


def report_costs(title: str, taken: Mapping[str, list[Cost]], yardstick: str, notes: Mapping[str, str]) -> None:
    """As `report`, with processor time and memory."""
    print(f"\n{title}\n{'':24}{'median':>10}{'least':>10}{'ratio':>8}{'cpu':>9}{'peak RSS':>10}")
    base = median(taken[yardstick])
    for name, costs in taken.items():
        walls = [cost.wall for cost in costs]
        cpu = statistics.median(cost.cpu for cost in costs)
        memory = max(cost.memory for cost in costs)
        print(
            f"{name:24}{median(costs):9.3f}s{min(walls):9.3f}s{median(costs) / base:8.2f}{cpu:8.2f}s"
            f"{memory / 1e6:7.0f} MB  {notes.get(name, '')}",
            flush=True,
        )


def median(costs: Sequence[Cost]) -> float:
    return statistics.median(cost.wall for cost in costs)


def goal(what: str, value: float, most: float, unit: str = "x") -> None:
    """Say whether a figure is within its bound."""
    print(f"{'ok    ' if value <= most else 'MISSED'} {what}: {value:.3g}{unit}, at most {most:g}{unit}", flush=True)


def evict(paths: Iterable[Path]) -> None:
    """Have the kernel forget what it holds of some files, which must be on the disk already."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in files_below(folder))


def make_models(folder: Path, gigabytes: float) -> None:
    """As models.py tells, unless they are there."""
    if not (folder / "complete").exists():
        print("training and blowing up the models", file=sys.stderr)
        command = [sys.executable, "-m", "tests.bench.models", str(folder), "--gb", str(gigabytes)]
        subprocess.run(command, check=True, stdout=sys.stderr)
        os.sync()


def missing(tool: str) -> bool:
    """Whether a peer is not installed; says so."""
    if shutil.which(tool):
        return False
    print(f"skipped: {tool} is not installed")
    return True


def version(command: list[str]) -> str:
    """The first line that a tool says of itself."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().splitlines()[0]
