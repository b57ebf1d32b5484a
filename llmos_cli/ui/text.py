"""How values read: sizes, counts, durations, times, and text that is safe to show.

Pure functions; nothing here writes. What comes from outside (file names, ref logs, prompts) may hold escape sequences:
`safe` spells them out, so that a name cannot move the cursor or hide a line.
"""

import re
from typing import Final

from llmos_cli.errors import UsageError

_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
_UNSAFE_LINE = re.compile("[\t\n]|" + _UNSAFE.pattern)
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,6})?)\s*([kmg]?)(i?)b?\Z", re.IGNORECASE | re.ASCII)
_UNITS: Final = ("B", "kB", "MB", "GB", "TB", "PB")


def size(num_bytes: float) -> str:
    """`12_345_678` as "12.3 MB" (powers of 1000, as disks are sold)."""
    sign, value = ("-", -num_bytes) if num_bytes < 0 else ("", num_bytes)
    if value < 999.5:
        return f"{sign}{value:.0f} B"
    power = 0
    while value >= 999.5 and power < len(_UNITS) - 1:
        value /= 1000
        power += 1
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{sign}{value:.{digits}f} {_UNITS[power]}"


def parse_size(text: str) -> int:
    """Read "4MB", "64MiB", "1.5G" or a plain number of bytes; raises UsageError."""
    match = _SIZE.match(text.strip())
    if not match or (match[3] and not match[2]):
        raise UsageError(f"{text!r} is not a size", hint="write 4MB, 64MiB or a number of bytes")
    power = " kmg".index(match[2].lower() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def count(number: int) -> str:
    """`1234567` as "1,234,567"."""
    return f"{number:,}"


def duration(seconds: float) -> str:
    """`200.4` as "3 min 20 s"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def when(iso: str) -> str:
    """An ISO time in UTC as local "2026-11-23 14:05"; anything else comes back as it is."""
    from datetime import datetime

    try:
        return datetime.fromisoformat(iso).astimezone().strftime("%Y-%m-%d %H:%M")
    except ValueError:
        return iso


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def plural(number: int, noun: str) -> str:
    """`plural(2, "file")` is "2 files"."""
    return f"{count(number)} {noun}" + ("" if number == 1 else "s")


def safe(text: str) -> str:
    """`text` with escape sequences and invisible characters spelled out; new lines and tabs stay."""
    return _UNSAFE.sub(_spell, text)


def safe_line(text: str) -> str:
    """`text` as one line: as `safe`, and new lines and tabs are spelled out too."""
    return _UNSAFE_LINE.sub(_spell, text)


def shorten(text: str, width: int) -> str:
    """`text` cut in its middle to `width` characters: the end of a name says as much as its start."""
    if len(text) <= width:
        return text
    if width <= 3:
        return text[:width]
    head = (width - 2 + 1) // 2
    return f"{text[:head]}..{text[len(text) - (width - 2 - head) :]}"


def table_lines(
    columns: list[str],
    rows: list[list[str]],
    *,
    right: frozenset[int] = frozenset(),
    spare: frozenset[int] = frozenset(),
    width: int | None = None,
) -> list[str]:
    """A table without boxes: a header and a line a row, two spaces between columns.

    Where a line does not fit in `width`, `spare` columns are left out, the last one first; then texts are shortened,
    the widest first, but none below 6 characters, and no number and no id.
    """
    cells = [[column.upper() for column in columns], *([safe_line(cell) for cell in row] for row in rows)]
    widths = {index: max(len(row[index]) for row in cells) for index in range(len(columns))}

    def excess() -> int:
        return 0 if width is None else sum(widths.values()) + 2 * (len(widths) - 1) - width

    for index in sorted(spare, reverse=True):
        if excess() > 0:
            del widths[index]
    flexible = [index for index in widths if index not in right and columns[index] != "id"]
    while excess() > 0 and flexible:
        widest = max(flexible, key=lambda index: widths[index])
        if widths[widest] <= 6:
            break
        widths[widest] -= 1
    return [
        "  ".join(
            row[index].rjust(wide) if index in right else shorten(row[index], wide).ljust(wide)
            for index, wide in widths.items()
        ).rstrip()
        for row in cells
    ]


def _spell(match: re.Match[str]) -> str:
    code = ord(match[0])
    named = {9: "\\t", 10: "\\n", 13: "\\r"}.get(code)
    return named or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")
