"""One move of a ref, as a file: the value a ref was given, the value it had, when, by whom and why.

A ref is a folder of numbered moves and its value is that of the highest number. One file is both the ref and its log
line, so they cannot disagree. The file names the ref and its own number and ends in a checksum: an entry that is empty,
cut short, flipped or copied from another ref is refused, and the ref falls back to the move before it.
"""

from dataclasses import dataclass
from typing import Final

from llmos_cli.errors import Damaged, UnknownVersion, UsageError
from llmos_cli.formats import canonical, limits
from llmos_cli.formats.ids import ObjectId, checksum, parse_id
from llmos_cli.formats.names import RefName

VERSION: Final = 1
SEQUENCE_DIGITS: Final = 10
GONE_SUFFIX: Final = ".gone"
_FIELDS: Final = {"id", "message", "previous", "ref", "sequence", "time", "version", "who"}


@dataclass(frozen=True)
class RefEntry:
    """`time` is ISO 8601 in UTC; `previous` is None for a ref's first value."""

    ref: RefName
    sequence: int
    id: ObjectId
    previous: ObjectId | None
    time: str
    who: str
    message: str


def entry_name(sequence: int) -> str:
    return f"{sequence:0{SEQUENCE_DIGITS}d}"


def parse_entry_name(name: str) -> int | None:
    """The number of a file in a ref's folder; None for anything else that may lie there."""
    return int(name) if len(name) == SEQUENCE_DIGITS and name.isascii() and name.isdecimal() else None


def gone_name(sequence: int) -> str:
    """The name of the file that says: this number and all before are used up, though their moves may be gone."""
    return f"{entry_name(sequence)}{GONE_SUFFIX}"


def parse_gone_name(name: str) -> int | None:
    stem = name.removesuffix(GONE_SUFFIX)
    return parse_entry_name(stem) if stem != name else None


def encode_entry(entry: RefEntry) -> bytes:
    """Two lines: canonical JSON, then its XXH3-64 in hex; raises UsageError for a text that does not fit."""
    fields: dict[str, canonical.Json] = {
        "id": str(entry.id),
        "message": entry.message,
        "previous": None if entry.previous is None else str(entry.previous),
        "ref": str(entry.ref),
        "sequence": entry.sequence,
        "time": entry.time,
        "version": VERSION,
        "who": entry.who,
    }
    try:
        body = canonical.encode(fields)
    except ValueError as exc:
        raise UsageError(f"a move of {entry.ref} cannot be written down: {exc}") from exc
    data = body + f"\n{checksum(body):016x}\n".encode()
    if len(data) > limits.REF_FILE_BYTES:
        raise UsageError(f"a move of {entry.ref} takes {len(data)} bytes", hint="use a shorter message")
    return data


def decode_entry(data: bytes, ref: RefName, sequence: int) -> RefEntry:
    """Read a move strictly; `ref` and `sequence` are where it was found. Raises Damaged or UnknownVersion."""
    what = f"ref {ref} (move {sequence})"
    if len(data) > limits.REF_FILE_BYTES:
        raise Damaged(f"{what} is larger than {limits.REF_FILE_BYTES} bytes")
    body, newline, check = data.partition(b"\n")
    if not newline or check != f"{checksum(body):016x}\n".encode():
        raise Damaged(f"{what} is empty, cut short or damaged")
    value = canonical.decode(body, what)
    if isinstance(value, dict) and isinstance(value.get("version"), int) and value["version"] != VERSION:
        raise UnknownVersion(f"{what} has the unknown version {value['version']}", hint="use a newer llmos")
    if not isinstance(value, dict) or set(value) != _FIELDS or type(value["version"]) is not int:
        raise Damaged(f"{what} does not have the fields of a ref")
    if type(value["sequence"]) is not int:
        raise Damaged(f"{what} has a malformed number")
    texts = [value[key] for key in ("message", "time", "who")]
    if value["ref"] != str(ref) or value["sequence"] != sequence or not all(isinstance(text, str) for text in texts):
        raise Damaged(f"{what} holds a move of another ref")
    try:
        previous = None if value["previous"] is None else parse_id(value["previous"])
        return RefEntry(ref, sequence, parse_id(value["id"]), previous, *map(str, (texts[1], texts[2], texts[0])))
    except Damaged as exc:
        raise Damaged(f"{what} is malformed: {exc.message}") from exc
