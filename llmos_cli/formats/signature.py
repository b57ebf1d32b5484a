"""A signature of a ref's value, as a file beside the move that gave it: who says that this ref is this manifest.

What is signed is a statement of its own, not the move: a move is made anew at every remote, with another number and
time, and the statement travels along unchanged. It has a serial, which only grows for a ref, so that an earlier value
cannot be shown again as if it were the newest. Knows nothing of cryptography.
"""

import re
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from llmos_cli.errors import Damaged, UnknownVersion, UsageError
from llmos_cli.formats import canonical, limits
from llmos_cli.formats.ids import ObjectId, object_id, parse_id
from llmos_cli.formats.names import RefName, parse_ref
from llmos_cli.formats.reflog import SEQUENCE_DIGITS, entry_name

VERSION: Final = 1
CONTEXT: Final = b"llmos ref signature 1\n"
SUFFIX: Final = ".sig"
KEY_PREFIX: Final = "ed25519:"
_HEX_KEY: Final = re.compile(r"[0-9a-f]{64}\Z")
_HEX_VALUE: Final = re.compile(r"[0-9a-f]{128}\Z")
_NAME: Final = re.compile(rf"([0-9]{{{SEQUENCE_DIGITS}}})\.[0-9a-f]{{32}}\.sig\Z")
_FIELDS: Final = {"expires", "id", "key", "previous", "ref", "serial", "signature", "time", "version"}


@dataclass(frozen=True)
class Statement:
    """`previous` is what the ref held before; `time` and `expires` (None: never) are ISO 8601 in UTC."""

    ref: RefName
    id: ObjectId
    previous: ObjectId | None
    serial: int
    time: str
    expires: str | None = None


@dataclass(frozen=True)
class Signature:
    """`key` is the signer's public key, 64 hex digits."""

    statement: Statement
    key: str
    value: bytes


def signed_bytes(statement: Statement) -> bytes:
    """What a signature is over: a line that says what this is, then the statement as canonical JSON."""
    return CONTEXT + canonical.encode(_fields(statement))


def encode_signature(signature: Signature) -> bytes:
    """The bytes of the file: the statement with key and signature as canonical JSON, and a newline."""
    fields = _fields(signature.statement) | {"key": signature.key, "signature": signature.value.hex()}
    return canonical.encode(fields) + b"\n"


def decode_signature(data: bytes, what: str) -> Signature:
    """Read the file strictly; says nothing of whether the signature is good. Raises Damaged or UnknownVersion."""
    if len(data) > limits.SIGNATURE_BYTES or not data.endswith(b"\n"):
        raise Damaged(f"{what} is cut short, or larger than {limits.SIGNATURE_BYTES} bytes")
    value = canonical.decode(data[:-1], what)
    if isinstance(value, dict) and type(value.get("version")) is int and value["version"] != VERSION:
        raise UnknownVersion(f"{what} has the unknown version {value['version']}", hint="use a newer llmos")
    if not isinstance(value, dict) or set(value) != _FIELDS or type(value["version"]) is not int:
        raise Damaged(f"{what} does not have the fields of a signature")
    try:
        return _read(value)
    except (Damaged, UsageError, ValueError) as exc:
        raise Damaged(f"{what} is malformed: {exc}") from exc


def signature_name(sequence: int, data: bytes) -> str:
    """The name of a signature's file beside move `sequence`; that of its own bytes, so that each is written once."""
    return f"{entry_name(sequence)}.{str(object_id(data))[:32]}{SUFFIX}"


def parse_signature_name(name: str) -> int | None:
    """The number of the move that a file is a signature of; None if it is none."""
    match = _NAME.match(name)
    return int(match[1]) if match else None


def parse_public_key(text: str) -> str:
    """The 64 hex digits of "ed25519:..."; raises UsageError."""
    digits = text.removeprefix(KEY_PREFIX)
    if digits == text or not _HEX_KEY.match(digits):
        raise UsageError(f"{text[:100]!r} is not a public key", hint=f"it is {KEY_PREFIX} and 64 hex digits")
    return digits


def _fields(statement: Statement) -> dict[str, canonical.Json]:
    return {
        "expires": statement.expires,
        "id": str(statement.id),
        "previous": str(statement.previous) if statement.previous else None,
        "ref": str(statement.ref),
        "serial": statement.serial,
        "time": statement.time,
        "version": VERSION,
    }


def _read(value: dict[str, Any]) -> Signature:
    serial, key, digits = value["serial"], value["key"], value["signature"]
    if type(serial) is not int or serial < 1:
        raise ValueError("the serial is not a number from 1")
    if not isinstance(key, str) or not _HEX_KEY.match(key):
        raise ValueError("the key is not 64 hex digits")
    if not isinstance(digits, str) or not _HEX_VALUE.match(digits):
        raise ValueError("the signature is not 128 hex digits")
    if not isinstance(value["ref"], str) or str(parse_ref(value["ref"])) != value["ref"]:
        raise ValueError("it names no ref")
    previous = None if value["previous"] is None else parse_id(value["previous"])
    for name in ("time", "expires"):
        if value[name] is not None or name == "time":
            _check_time(value[name])
    statement = Statement(
        parse_ref(value["ref"]), parse_id(value["id"]), previous, serial, value["time"], value["expires"]
    )
    return Signature(statement, key, bytes.fromhex(digits))


def _check_time(text: object) -> None:
    if not isinstance(text, str) or datetime.fromisoformat(text).tzinfo is None:
        raise ValueError("a time has no time zone")
