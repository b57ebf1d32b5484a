"""What the benchmarks share: the machine in words, alternating runs, medians as ratios to a yardstick."""

import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

Run = Callable[[], float]  # seconds


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


def timed(command: list[str], cwd: Path | None = None, env: Mapping[str, str] | None = None) -> float:
    """Wall seconds of a command that must succeed."""
    started = time.perf_counter()
    subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return time.perf_counter() - started


def alternate(runs: Mapping[str, Run], rounds: int) -> dict[str, list[float]]:
    """Every contender once a round, so that a drift of the machine hits all alike."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
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
        print(f"{name:24}{median:9.3f}s{min(seconds):9.3f}s{median / base:8.2f}  {notes.get(name, '')}")


def missing(tool: str) -> bool:
    """Whether a peer is not installed; says so."""
    if shutil.which(tool):
        return False
    print(f"skipped: {tool} is not installed")
    return True
