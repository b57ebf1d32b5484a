"""Stopping a program at every step it takes to make a change permanent, without a hook in the program.

`store/disk/durable.py` alone changes what is on disk, so a stand-in for its `os` module sees every step:

- `killed_at(k, work)` forks a child that leaves by `os._exit` just before its k-th step (at a write: half-way through).
  What it did before is all there, as after SIGKILL or a panic of the program.
- `failing_at(k, error, work)` lets the k-th step fail, as a bad disk does, or a full one, which stays full; the process
  goes on.
- `record(work)` runs the work and notes its steps; `power_losses` then makes, for every moment in between, the folders
  that a power loss may leave behind: bytes that were not fsynced are gone, and so are names whose folder was not
  fsynced, in several mixtures, because a disk may keep any of them.
- `misordered` reads the notes and says where a name was given before its bytes were durable.
"""

import errno
import os
import shutil
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from llmos_cli.errors import LlmosError
from llmos_cli.store.disk import durable

KILLED: Final = 99
STEPS: Final = {"writev", "fsync", "chmod", "replace", "rename", "link", "unlink", "mkdir", "rmdir", "utime"}
GROWING: Final = {"open", "writev", "fsync", "link", "mkdir"}  # what a full disk refuses
MOST_STEPS: Final = 2000
VOLATILE: Final = "leases"  # the one folder whose files need not survive

Work = Callable[[], object]


class _Stand:
    """The `os` module as durable.py sees it; `step` is called instead of everything that changes something."""

    def __init__(self, step: Callable[..., Any]) -> None:
        self._step = step

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name == "open":
            return lambda path, flags, *rest, **more: (
                self._step(name, real, path, flags, *rest, **more)
                if flags & os.O_CREAT
                else self._opened(real(path, flags, *rest, **more), path, more.get("dir_fd"))
            )
        return (lambda *args, **more: self._step(name, real, *args, **more)) if name in STEPS else real

    def _opened(self, fd: int, path: Any, dir_fd: int | None) -> int:
        note = getattr(self._step, "opened", None)
        if note:
            note(fd, path, dir_fd)
        return fd


@contextmanager
def watched(step: Callable[..., Any]) -> Iterator[None]:
    durable.os = _Stand(step)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        durable.os = os  # type: ignore[attr-defined]


# ---------------------------------------------------------------------------------------------- kill


def killed_at(number: int, work: Work) -> bool:
    """Do `work` in a child that dies at its step `number`, counted from 1; False if it was done before that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # later Pythons dislike fork beside threads
        child = os.fork()
    if child == 0:
        try:
            with watched(_Countdown(number)):
                work()
        except BaseException:  # noqa: BLE001 - nothing of the test runner may run in the child
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, KILLED), f"step {number}: the child failed with {code}"
    return code == KILLED


def sweep(
    prepared: Path,
    folder: Path,
    work: Callable[[Path], object],
    examine: Callable[[Path, str], None],
    stopped_at: Callable[[int, Work], bool] = killed_at,
    *,
    every: int = 1,
) -> int:
    """Stop `work` at every step (or at `every` second, third, ...), each time on a fresh copy of `prepared`; returns
    about how many steps it has.

    `examine` gets the folder and where it was stopped, in words; "" when it was not.
    """
    for number in range(1, MOST_STEPS, every):
        fresh(prepared, folder)
        stopped = stopped_at(number, lambda: work(folder))
        examine(folder, f"step {number}" if stopped else "")
        if not stopped:
            return number - 1
    raise AssertionError("it never ended")


def usually(every: int) -> int:
    """How much of all that could be tried is tried in the suite; with LLMOS_CRASH=all it is everything."""
    return 1 if os.environ.get("LLMOS_CRASH") == "all" else every


def fresh(prepared: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(prepared, folder)


class _Countdown:
    """Steps may come from several threads; the process ends at one of them, whichever it is."""

    def __init__(self, left: int) -> None:
        self._left = left
        self._lock = threading.Lock()

    def __call__(self, name: str, real: Callable[..., Any], *args: Any, **more: Any) -> Any:
        with self._lock:
            self._left -= 1
            if self._left <= 0:
                if name == "writev":
                    data = b"".join(args[1])
                    os.write(args[0], data[: len(data) // 2])
                os._exit(KILLED)
        # Nobody waits for the disk: what a killed process has written is not lost.
        return None if name == "fsync" else real(*args, **more)


# ---------------------------------------------------------------------------------------------- fail


@dataclass(frozen=True)
class Outcome:
    """What became of work of which one step failed: the step, "" if it has fewer, and what was raised, if anything."""

    step: str
    raised: LlmosError | None


def failing_at(number: int, error: int, work: Work) -> Outcome:
    """Do `work` while its step `number` fails, and with ENOSPC every later one that needs room as well. Whatever it
    raises must be an error of ours."""
    failure = _Failure(number, error)
    raised: LlmosError | None = None
    with watched(failure):
        try:
            work()
        except LlmosError as exc:
            raised = exc
    return Outcome(failure.step, raised)


class _Failure:
    def __init__(self, left: int, error: int) -> None:
        self.step = ""
        self._left = left
        self._error = error
        self._lock = threading.Lock()

    def __call__(self, name: str, real: Callable[..., Any], *args: Any, **more: Any) -> Any:
        with self._lock:
            self._left -= 1
            if self._left == 0:
                self.step = name
            if self._left == 0 or (self._left < 0 and self._error == errno.ENOSPC and name in GROWING):
                raise OSError(self._error, os.strerror(self._error))
        return None if name == "fsync" else real(*args, **more)


# ---------------------------------------------------------------------------------------------- record


@dataclass
class File:
    """An inode: the bytes written to it, and how many of them an fsync has made durable."""

    data: bytes = b""
    synced: bytes = b""


@dataclass(frozen=True)
class Step:
    """One step: what was called, on which paths (relative to the root), and for a new file its inode."""

    name: str
    path: str
    target: str = ""
    data: bytes = b""


@dataclass
class Notes:
    """The steps of one run, in order."""

    root: Path
    steps: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._paths: dict[int, str] = {}

    def opened(self, fd: int, path: Any, dir_fd: int | None) -> None:
        with self._lock:
            self._paths[fd] = self._relative(path, dir_fd)

    def __call__(self, name: str, real: Callable[..., Any], *args: Any, **more: Any) -> Any:
        with self._lock:
            result = real(*args, **more)
            if name == "open":
                self._paths[result] = self._relative(args[0], more.get("dir_fd"))
                self.steps.append(Step("create", self._paths[result]))
            elif name == "writev":
                self.steps.append(Step(name, self._paths[args[0]], data=b"".join(args[1])[:result]))
            elif name == "fsync":
                self.steps.append(Step(name, self._paths[args[0]]))
            elif name in ("replace", "rename", "link"):
                source = self._relative(args[0], more.get("src_dir_fd"))
                target = self._relative(args[1], more.get("dst_dir_fd"))
                self.steps.append(Step("link" if name == "link" else "rename", source, target))
            else:
                self.steps.append(Step(name, self._relative(args[0], more.get("dir_fd"))))
            return result

    def _relative(self, path: Any, dir_fd: int | None) -> str:
        text = os.fspath(path)
        return f"{self._paths[dir_fd]}/{text}" if dir_fd is not None else os.path.relpath(text, self.root)


def record(root: Path, work: Work) -> list[Step]:
    """Do the work below `root` and note its steps."""
    notes = Notes(root)
    with watched(notes):
        work()
    return notes.steps


def misordered(steps: list[Step]) -> list[str]:
    """What was given a name before its bytes were durable, or whose name was never made durable."""
    found: list[str] = []
    dirty: set[str] = set()
    named: dict[str, str] = {}  # folder -> a name in it that is not durable yet
    for step in steps:
        if VOLATILE in (part for path in (step.path, step.target) for part in path.split("/")):
            continue
        if step.name in ("create", "writev"):
            dirty.add(step.path)
        elif step.name == "fsync":
            dirty.discard(step.path)
            named.pop(step.path, None)
        elif step.name in ("rename", "link") and step.target.split("/")[-2:-1] == ["tmp"]:
            if step.path in dirty:
                dirty.add(step.target)  # one temporary name for another
        elif step.name in ("rename", "link"):
            if step.path in dirty:
                found.append(f"{step.target} was named before its bytes were durable")
            named[os.path.dirname(step.target)] = step.target
            dirty.discard(step.path)
    return found + [f"the name {name} was never made durable" for name in named.values()]


# ---------------------------------------------------------------------------------------------- power loss


FOLDER: Final = File()  # stands for a folder in the table of names


@dataclass
class _Change:
    """A change of names in a folder, waiting for that folder to be fsynced."""

    step: Step
    folders: tuple[str, ...]
    file: File | None
    durable: bool = False


class Disk:
    """What a disk holds after some steps: durable changes, and those that it may still lose."""

    def __init__(self, before: Path) -> None:
        self._names: dict[str, File] = {}
        for path in sorted(before.glob("**/*")):
            name = str(path.relative_to(before))
            if path.is_dir():
                self._names[name] = FOLDER
            elif not path.name.startswith("index.db"):
                data = path.read_bytes()
                self._names[name] = File(data, data)
        self._now = dict(self._names)
        self._changes: list[_Change] = []

    def apply(self, step: Step) -> None:
        """Take one step."""
        if step.name == "writev":
            self._now[step.path].data += step.data
            return
        if step.name == "fsync":
            file = self._now.get(step.path, FOLDER)
            if file is not FOLDER:
                file.synced = file.data
                return
            for change in self._changes:
                change.durable = change.durable or step.path in change.folders
            while self._changes and self._changes[0].durable:
                _change(self._names, self._changes.pop(0))
            return
        if step.name in ("chmod", "utime"):
            return
        folders = tuple({os.path.dirname(path) or "." for path in (step.path, step.target) if path})
        file = File() if step.name == "create" else self._now.get(step.path)
        change = _Change(step, folders, file)
        _change(self._now, change)
        self._changes.append(change)

    def remains(self) -> Iterator[tuple[str, dict[str, bytes | None]]]:
        """What a power loss may leave now: (which mixture, path -> bytes, None for a folder)."""
        waiting = {folder for change in self._changes if not change.durable for folder in change.folders}
        yield "nothing that was not asked for", self._mixture(lambda change: False)
        if not waiting:
            return
        yield "every name", self._mixture(lambda change: True)
        for folder in sorted(waiting) if len(waiting) > 1 else ():
            yield f"the names in {folder}", self._mixture(lambda change, folder=folder: folder in change.folders)
            yield (
                f"all but those in {folder}",
                self._mixture(lambda change, folder=folder: folder not in change.folders),
            )

    def _mixture(self, keep: Callable[[_Change], bool]) -> dict[str, bytes | None]:
        names = dict(self._names)
        for change in self._changes:
            if change.durable or keep(change):
                _change(names, change)
        return {name: None if file is FOLDER else file.synced for name, file in names.items()}


def _change(names: dict[str, File], change: _Change) -> None:
    step = change.step
    if step.name in ("unlink", "rmdir"):
        names.pop(step.path, None)
    elif step.name == "mkdir":
        names.setdefault(step.path, FOLDER)
    elif step.name == "create":
        names[step.path] = change.file or File()
    elif step.name in ("rename", "link") and change.file is not None:
        if step.name == "rename":
            for name in [name for name in names if name.startswith(f"{step.path}/")]:
                names[step.target + name[len(step.path) :]] = names.pop(name)
            names.pop(step.path, None)
        names[step.target] = change.file


def power_losses(before: Path, steps: list[Step], folder: Path, *, every: int = 1) -> Iterator[str]:
    """Make in `folder`, for every moment between two steps, what a power loss may leave; yields when that was,
    "" for the moment after the last step.

    The index is left out: it is a cache, and has its own way of being durable. Equal remains are made once; of the rest
    every one, or `every` second, third, ...
    """
    disk = Disk(before)
    seen: set[int] = set()
    for number in range(len(steps) + 1):
        done = number == len(steps)
        for mixture, files in disk.remains():
            mark = hash((done, *sorted(files.items(), key=lambda item: item[0])))
            if mark in seen:
                continue
            seen.add(mark)
            if done or len(seen) % every == 0:
                _make(files, folder)
                yield "" if done else f"after step {number} of {len(steps)}, {mixture}"
        if number < len(steps) and not _is_volatile(steps[number]):
            disk.apply(steps[number])


def _is_volatile(step: Step) -> bool:
    return VOLATILE in step.path.split("/") or VOLATILE in step.target.split("/")


def _make(files: dict[str, bytes | None], folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in sorted(files, key=lambda name: name.count("/")):
        data = files[name]
        path = folder / name
        if data is None:
            path.mkdir(parents=True, exist_ok=True)
        elif path.parent.is_dir():  # a file whose folder is lost is lost with it
            path.write_bytes(data)
