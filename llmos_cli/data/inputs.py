"""Which files the words on a command line mean: files, folders (recursively) and globs, in one fixed order.

A folder is read in sorted order without hidden entries and the folders in `SKIPPED_FOLDERS`; what is there but is no
regular file (a pipe, a socket, a device, a link to a folder) is never opened, and said. A file reached twice is taken
once. This module opens nothing; `corpus.py` does.
"""

import glob
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from llmos_cli.errors import NotFound, Unsafe, UsageError, from_os_error
from llmos_cli.progress import Progress

STDIN: Final = "-"
SKIPPED_FOLDERS: Final = frozenset({"__pycache__", "node_modules", "site-packages", "dist-packages"})
_KINDS: Final = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISDIR, "a link to a folder"),
)


@dataclass(frozen=True)
class Input:
    """A file to read: its name in recipes, and its name in messages.

    The recipe's name is relative to where the argument lies, so that it does not depend on where this machine keeps
    the corpus.
    """

    path: Path
    name: str
    label: str


def find_inputs(words: Sequence[str], progress: Progress, stdin: Input | None = None) -> list[Input]:
    """The files that `words` mean, in order, `stdin` standing for "-".

    Raises NotFound, Unsafe (not a regular file), UsageError (an empty folder) or AccessDenied.
    """
    seen: set[tuple[int, int]] = set()
    found = []
    for word in words:
        if word == STDIN and stdin is not None:
            found.append(stdin)
            continue
        for path in _expand(word):
            for item, inode in _find(path, progress):
                if inode not in seen:
                    seen.add(inode)
                    found.append(item)
    return found


def _expand(word: str) -> list[Path]:
    if os.path.lexists(word) or not glob.has_magic(word):
        return [Path(word)]
    matches = sorted(glob.glob(word, recursive=True))
    if not matches:
        raise NotFound(f"no file matches {word!r}")
    return [Path(match) for match in matches]


def _find(path: Path, progress: Progress) -> Iterator[tuple[Input, tuple[int, int]]]:
    try:
        status = path.stat()
    except OSError as exc:
        if isinstance(exc, FileNotFoundError) and not path.is_symlink():
            raise NotFound(f"there is no file or folder {path}") from exc
        raise from_os_error(exc, f"reading {path}") from exc
    if stat.S_ISDIR(status.st_mode):
        name = Path(os.path.abspath(path)).name
        empty = True
        for child, inode in _walk(path, progress):
            empty = False
            yield Input(child, _printable(f"{name}/{child.relative_to(path).as_posix()}"), str(child)), inode
        if empty:
            raise UsageError(f"{path} holds no files to read", hint="hidden files are taken only when they are named")
    elif stat.S_ISREG(status.st_mode):
        yield Input(path, _printable(path.name), str(path)), (status.st_dev, status.st_ino)
    else:
        raise Unsafe(f"{path} is {_kind(status)}, not a file", hint=f"to read a stream: llmos shard - NAME < {path}")


def _walk(folder: Path, progress: Progress) -> Iterator[tuple[Path, tuple[int, int]]]:
    """The regular files below `folder`, sorted, each with what identifies it; folders may be of any depth."""
    stack = [folder]
    while stack:
        path = stack.pop()
        try:
            link = path.is_symlink()
            status = path.stat()
            if stat.S_ISREG(status.st_mode):
                yield path, (status.st_dev, status.st_ino)
            elif stat.S_ISDIR(status.st_mode) and (not link or path == folder):
                stack += [path / name for name in sorted(os.listdir(path), reverse=True) if _wanted(name)]
            else:
                progress.warn(f"left out {path}: it is {_kind(status)}")
        except FileNotFoundError:
            progress.warn(f"left out {path}: it is a link to nothing, or gone")
        except OSError as exc:
            if not path.is_symlink():
                raise from_os_error(exc, f"reading {path}") from exc
            progress.warn(f"left out {path}: {exc.strerror or exc}")


def _wanted(name: str) -> bool:
    return not name.startswith(".") and name not in SKIPPED_FOLDERS


def _kind(status: os.stat_result) -> str:
    return next((text for test, text in _KINDS if test(status.st_mode)), "a special file")


def _printable(name: str) -> str:
    """A file name as text; bytes that are not UTF-8 are spelled out, because a recipe is Unicode."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
