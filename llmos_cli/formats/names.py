"""Names that come from outside: paths inside a manifest and refs. One function each validates them, in and out.

A path is checked under the rules of every system at once (a store made on Linux is checked out on Windows too):
no absolute, drive or UNC form, no `.` or `..`, no control character, backslash or colon, no reserved device name.
"""

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from llmos_cli.errors import Unsafe, UsageError
from llmos_cli.formats import limits
from llmos_cli.formats.ids import parse_prefix

_RESERVED: Final = {"con", "prn", "aux", "nul", "conin$", "conout$"} | {
    f"{device}{digit}" for device in ("com", "lpt") for digit in "123456789¹²³"
}
_INVISIBLE: Final = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_FILE: Final = -1
_REF_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*\Z")
_TARGET = re.compile(r"(?P<ref>[^~@]+)(?:~(?P<back>[0-9]{0,9}))?\Z")


def check_path(path: str) -> str:
    """Return `path` if it may name a file inside a manifest; raises Unsafe and names it otherwise."""

    def refuse(why: str) -> Unsafe:
        return Unsafe(f"unsafe path {path[:200]!r}: {why}")

    if not path or path.startswith("/"):
        raise refuse("it must be relative and not empty")
    try:
        size = len(path.encode("utf-8"))
    except UnicodeEncodeError:
        raise refuse("it is not valid Unicode") from None
    if size > limits.PATH_BYTES:
        raise refuse(f"longer than {limits.PATH_BYTES} bytes")
    if unicodedata.normalize("NFC", path) != path:
        raise refuse("it is not in Unicode normal form C")
    parts = path.split("/")
    if len(parts) > limits.PATH_DEPTH:
        raise refuse(f"deeper than {limits.PATH_DEPTH} folders")
    for part in parts:
        if part in ("", ".", ".."):
            raise refuse("it has an empty, '.' or '..' part")
        if len(part.encode("utf-8")) > limits.PATH_PART_BYTES:
            raise refuse(f"a part is longer than {limits.PATH_PART_BYTES} bytes")
        if any(unicodedata.category(char) in _INVISIBLE for char in part):
            raise refuse("it has a control or invisible character")
        if "\\" in part or ":" in part:
            raise refuse("it has a backslash or a colon")
        if part[-1] in " .":
            raise refuse("a part ends in a space or a dot")
        if part.split(".")[0].rstrip(" ").lower() in _RESERVED:
            raise refuse("a part is a reserved device name")
    return path


def check_paths(paths: Iterable[str]) -> None:
    """Check paths that will live in one folder: each by itself, then collisions by case and file against folder.

    Folders are numbered as they appear, so that memory grows with the paths' length and not with its square.
    """
    seen: dict[tuple[int, str], tuple[str, int]] = {}  # folder, folded part -> its spelling, its own number
    for path in paths:
        parts = check_path(path).split("/")
        folder = 0
        for depth, part in enumerate(parts, 1):
            new = (part, _FILE if depth == len(parts) else len(seen) + 1)
            known = seen.setdefault((folder, _fold(part)), new)
            if known[0] != part:
                raise Unsafe(f"{known[0]!r} and {part!r} in path {path[:200]!r} collide where case is ignored")
            if known is not new and _FILE in (known[1], new[1]):
                raise Unsafe(f"path {path[:200]!r} stands twice, or is both a file and a folder")
            folder = known[1]


def _fold(part: str) -> str:
    """One spelling for all that a file system may take for the same name (Unicode 3.13, canonical caseless match)."""
    if part.isascii():
        return part.lower()
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", part).casefold())


@dataclass(frozen=True, order=True)
class RefName:
    """`name:tag`; both parts are letters, digits and `.`, `_`, `+`, `-`, and start with a letter or a digit."""

    name: str
    tag: str = "latest"

    def __post_init__(self) -> None:
        for part in (self.name, self.tag):
            if (
                not _REF_PART.match(part)
                or len(part) > limits.REF_PART_BYTES
                or part.endswith((".", ".lock"))
                or ".." in part
            ):
                raise UsageError(
                    f"malformed ref name {f'{self.name}:{self.tag}'[:200]!r}",
                    hint="use NAME or NAME:TAG: letters, digits, '.', '_', '+', '-', starting with a letter or digit",
                )

    def __str__(self) -> str:
        return f"{self.name}:{self.tag}"


def parse_ref(text: str) -> RefName:
    """Read `name` or `name:tag`; raises UsageError."""
    name, separator, tag = text.partition(":")
    return RefName(name, tag) if separator else RefName(name)


@dataclass(frozen=True)
class Target:
    """What a user typed for an object: a ref and how many values back, or the prefix of a manifest id."""

    ref: RefName | None
    back: int
    prefix: str | None


def parse_target(text: str) -> Target:
    """Read `name`, `name:tag`, `name:tag~N` or `@PREFIX`; raises UsageError."""
    if text.startswith("@"):
        return Target(None, 0, parse_prefix(text[1:]))
    match = _TARGET.match(text)
    if not match:
        raise UsageError(f"malformed ref {text[:200]!r}", hint="write NAME, NAME:TAG, NAME:TAG~1 or @ID")
    back = match["back"]
    return Target(parse_ref(match["ref"]), 0 if back is None else int(back or 1), None)
