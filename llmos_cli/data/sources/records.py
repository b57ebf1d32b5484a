"""Bytes to records: JSON lines, CSV, TSV. One bad record is told with its place, and the next one is read.

CSV is what spreadsheets and pandas write: commas, quotes doubled within quotes, line ends within quotes. TSV has no
quotes, as in most corpora. Both begin with a line of column names.
"""

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from llmos_cli.formats.limits import MiB

LINE_BYTES: Final = 256 * MiB
MEND: Final = "mend it, or leave such records out with --skip-bad"
_QUOTED: Final = re.compile(r'"((?:[^"]++|"")*+)"')
_QUOTED_BYTES: Final = re.compile(rb'(?:[^"]++|"")*+"')  # what is left of it


@dataclass(frozen=True)
class Raw:
    """The bytes of one record, where it begins, and its number from 1; None if it is over the limit."""

    data: bytes | None
    offset: int
    number: int


class BadRecord(Exception):
    """Why a record cannot be used; the text goes after its place."""

    def __init__(self, why: str, hint: str = MEND) -> None:
        super().__init__(why)
        self.hint = hint


def read_lines(blocks: Iterator[bytes], offset: int, number: int) -> Iterator[Raw]:
    """Lines without their ends, the first being `number` and lying at `offset`; a line over the limit is not held."""
    held: list[bytes] = []
    size = 0
    for block in blocks:
        head, *rest = block.split(b"\n")
        for part in [head, *rest[:-1]] if rest else []:
            size += len(part)
            yield Raw(b"".join((*held, part)) if size <= LINE_BYTES else None, offset, number)
            offset, number = offset + size + 1, number + 1
            held, size = [], 0
        tail = rest[-1] if rest else head
        size += len(tail)
        if size <= LINE_BYTES:
            held.append(tail)
        else:
            held = []
    if size:
        yield Raw(b"".join(held) if size <= LINE_BYTES else None, offset, number)


def read_csv(blocks: Iterator[bytes], offset: int, number: int) -> Iterator[Raw]:
    """The records of a CSV file, each with its line ends within quotes."""
    held: list[bytes] = []
    size = start = 0
    quoted = False
    for line in read_lines(blocks, offset, 0):
        if not held:
            start, size = line.offset, 0
        if line.data is None:
            yield Raw(None, start, number)
            held, number = [], number + 1
            continue
        quoted = _ends_quoted(line.data, bool(held) and quoted)
        held.append(line.data)
        size += len(line.data) + 1
        if size > LINE_BYTES or not quoted:
            yield Raw(b"\n".join(held) if size <= LINE_BYTES else None, start, number)
            held, number = [], number + 1
    if held:
        yield Raw(b"\n".join(held), start, number)


def _ends_quoted(line: bytes, quoted: bool) -> bool:
    """Whether a quote is open at the end of a line, at whose beginning one was or was not."""
    if b'"' not in line:
        return quoted
    at = 0
    while True:
        if quoted or line.startswith(b'"', at):
            found = _QUOTED_BYTES.match(line, at if quoted else at + 1)
            if found is None:
                return True
            quoted, at = False, found.end()
        at = line.find(b",", at) + 1
        if not at:
            return False


def decode(raw: Raw) -> str:
    """The text of a record, or BadRecord: too long, not UTF-8."""
    if raw.data is None:
        raise BadRecord(f"is longer than {LINE_BYTES // MiB} MiB")
    data = raw.data.removeprefix(codecs.BOM_UTF8) if raw.offset == 0 else raw.data
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as exc:
        at = raw.offset + exc.start + len(raw.data) - len(data)
        raise BadRecord(f"is not UTF-8 text (byte 0x{data[exc.start]:02x} at offset {at})") from None
    if "\0" in text:
        raise BadRecord("is not text (it has a NUL byte)")
    return text.removesuffix("\r")


def parse_json(text: str) -> dict[str, Any]:
    """A JSON object, or BadRecord."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise BadRecord("is nested too deeply") from None
    except json.JSONDecodeError as exc:
        raise BadRecord(f"is not valid JSON: {exc.msg} (column {exc.colno})") from exc
    except ValueError as exc:
        raise BadRecord("has a number of thousands of digits") from exc
    if not isinstance(value, dict):
        raise BadRecord("is not a JSON object")
    return value


def parse_columns(text: str, columns: tuple[str, ...], *, tabs: bool) -> dict[str, Any]:
    """A line of a table by its columns' names, or BadRecord."""
    fields = text.split("\t") if tabs else split_csv(text)
    if fields is None:
        raise BadRecord("has a quote that does not end")
    if len(fields) != len(columns):
        raise BadRecord(f"has {len(fields)} fields where the first line names {len(columns)}")
    return dict(zip(columns, fields, strict=True))


def split_csv(text: str) -> list[str] | None:
    """The fields of a record; None if a quote in it does not end."""
    if '"' not in text:
        return text.split(",")
    fields, at = [], 0
    while True:
        quoted = ""
        if text.startswith('"', at):
            found = _QUOTED.match(text, at)
            if found is None:
                return None
            quoted, at = found[1].replace('""', '"'), found.end()
        end = text.find(",", at)
        fields.append(quoted + text[at : end if end >= 0 else len(text)].removesuffix("\r" if end < 0 else ""))
        if end < 0:
            return fields
        at = end + 1
