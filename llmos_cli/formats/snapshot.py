"""A snapshot: every ref of a store with its log, as it was at one time, and the manifests that a backup keeps for it.

Canonical JSON, named by its time and the BLAKE3 of its bytes: the name proves it whole, a listing tells the times. With
signatures it is of version 2, which has a field for them; without, of version 1.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from typing import Final

from llmos_cli.errors import Damaged, UnknownVersion, UsageError
from llmos_cli.formats import canonical, limits
from llmos_cli.formats.canonical import Json
from llmos_cli.formats.ids import ObjectId, object_id, parse_id
from llmos_cli.formats.layout import SNAPSHOTS
from llmos_cli.formats.names import RefName, parse_ref
from llmos_cli.formats.reflog import RefEntry
from llmos_cli.formats.signature import decode_signature

VERSION: Final = 1
SIGNED_VERSION: Final = 2
_FIELDS: Final = {"manifests", "refs", "source", "time", "version"}
_MOVE: Final = {"id", "message", "previous", "sequence", "time", "who"}
_NAME = re.compile(r"(\d{8}T\d{6}\.\d{3}Z)-([0-9a-f]{64})\Z")
_STAMP: Final = "%Y%m%dT%H%M%S.%f"
Signatures = tuple[tuple[int, bytes], ...]


@dataclass(frozen=True)
class Snapshot:
    """`time` is ISO 8601 in UTC, to the millisecond; `source` says whose store it is and where; moves go from the
    oldest to the newest. The newest value of every ref is among the `manifests`, older ones as far as the store had
    them. `signatures` are the files beside moves, each with the move's number, sorted."""

    time: str
    source: str
    refs: Mapping[RefName, tuple[RefEntry, ...]]
    manifests: tuple[ObjectId, ...]
    signatures: Mapping[RefName, Signatures] = field(default_factory=dict)


@dataclass(frozen=True, order=True)
class SnapshotName:
    """Where a snapshot lies: its time and the id of its bytes."""

    time: str
    id: ObjectId

    def __str__(self) -> str:
        return f"{self.time}-{self.id}"

    @property
    def key(self) -> str:
        return f"{SNAPSHOTS}/{self}"

    @property
    def moment(self) -> datetime:
        return datetime.strptime(self.time, _STAMP + "%z")


def parse_snapshot_name(name: str) -> SnapshotName | None:
    """Read a file's name; None for anything else that may lie there."""
    match = _NAME.match(name)
    if not match:
        return None
    found = SnapshotName(match[1], ObjectId(bytes.fromhex(match[2])))
    try:
        _ = found.moment
    except ValueError:
        return None
    return found


def name_snapshot(snapshot: Snapshot, data: bytes) -> SnapshotName:
    """The name of a snapshot whose bytes are `data`."""
    return SnapshotName(datetime.fromisoformat(snapshot.time).strftime(_STAMP)[:-3] + "Z", object_id(data))


def encode_snapshot(snapshot: Snapshot) -> bytes:
    """Its bytes; raises UsageError if they are more than a reader takes."""
    refs: dict[str, Json] = {str(ref): [_encode_move(move) for move in moves] for ref, moves in snapshot.refs.items()}
    value: dict[str, Json] = {
        "manifests": [str(oid) for oid in snapshot.manifests],
        "refs": refs,
        "source": snapshot.source,
        "time": snapshot.time,
        "version": SIGNED_VERSION if snapshot.signatures else VERSION,
    }
    if snapshot.signatures:
        value["signatures"] = {
            str(ref): [[number, canonical.decode(data[:-1], "a signature")] for number, data in files]
            for ref, files in snapshot.signatures.items()
        }
    data = canonical.encode(value)
    if len(data) > limits.SNAPSHOT_BYTES:
        raise UsageError(f"the refs and their logs take {len(data)} bytes, more than a snapshot may hold")
    return data


def decode_snapshot(data: bytes, name: SnapshotName) -> Snapshot:
    """Read a snapshot strictly, from where it was found; raises Damaged or UnknownVersion."""
    what = f"snapshot {name.time}-{name.id.short}"
    if len(data) > limits.SNAPSHOT_BYTES:
        raise Damaged(f"{what} is larger than {limits.SNAPSHOT_BYTES} bytes")
    if object_id(data) != name.id:
        raise Damaged(f"{what} does not have the bytes its name stands for")
    value = canonical.decode(data, what)
    version = value.get("version") if isinstance(value, dict) else None
    if isinstance(version, int) and version not in (VERSION, SIGNED_VERSION):
        raise UnknownVersion(f"{what} has the unknown version {version}", hint="use a newer llmos")
    wanted = _FIELDS | {"signatures"} if version == SIGNED_VERSION else _FIELDS
    if not isinstance(value, dict) or set(value) != wanted or type(version) is not int:
        raise Damaged(f"{what} does not have the fields of a snapshot")
    time, source, refs, listed = value["time"], value["source"], value["refs"], value["manifests"]
    if not (isinstance(time, str) and isinstance(source, str) and isinstance(refs, dict) and isinstance(listed, list)):
        raise Damaged(f"{what} is malformed")
    try:
        snapshot = Snapshot(
            time,
            source,
            {parse_ref(ref): _decode_log(parse_ref(ref), moves, what) for ref, moves in refs.items()},
            tuple(_id(oid, what) for oid in listed),
            _decode_signatures(value["signatures"], refs, what) if version == SIGNED_VERSION else {},
        )
        named = name_snapshot(snapshot, data)
    except (UsageError, ValueError) as exc:
        raise Damaged(f"{what} is malformed: {exc}") from exc
    manifests = set(snapshot.manifests)
    if list(snapshot.manifests) != sorted(manifests):
        raise Damaged(f"{what} names its manifests twice or in the wrong order")
    if not all(log[-1].id in manifests for log in snapshot.refs.values()) or named.time != name.time:
        raise Damaged(f"{what} contradicts itself")
    return snapshot


def _encode_move(move: RefEntry) -> Json:
    return {
        "id": str(move.id),
        "message": move.message,
        "previous": None if move.previous is None else str(move.previous),
        "sequence": move.sequence,
        "time": move.time,
        "who": move.who,
    }


def _decode_log(ref: RefName, moves: Json, what: str) -> tuple[RefEntry, ...]:
    if not isinstance(moves, list) or not moves:
        raise Damaged(f"{what}: {ref} has no moves")
    log = tuple(_decode_move(ref, move, what) for move in moves)
    if any(later.sequence <= move.sequence for move, later in pairwise(log)):
        raise Damaged(f"{what}: the moves of {ref} are out of order")
    return log


def _decode_move(ref: RefName, move: Json, what: str) -> RefEntry:
    if not isinstance(move, dict) or set(move) != _MOVE:
        raise Damaged(f"{what}: a move of {ref} is malformed")
    sequence, time, who, message = move["sequence"], move["time"], move["who"], move["message"]
    texts = isinstance(time, str) and isinstance(who, str) and isinstance(message, str)
    if type(sequence) is not int or not 0 < sequence < 10**10 or not texts:
        raise Damaged(f"{what}: a move of {ref} is malformed")
    previous = None if move["previous"] is None else _id(move["previous"], what)
    return RefEntry(ref, sequence, _id(move["id"], what), previous, str(time), str(who), str(message))


def _decode_signatures(
    value: Json, refs: Mapping[str, Json], what: str
) -> dict[RefName, tuple[tuple[int, bytes], ...]]:
    """Each is read as strictly as its file would be, and is about a ref that the snapshot has."""
    if not isinstance(value, dict) or not value or not value.keys() <= refs.keys():
        raise Damaged(f"{what}: its signatures are malformed")
    found = {}
    for text, items in value.items():
        if not isinstance(items, list) or not items:
            raise Damaged(f"{what}: {text} has no signatures")
        files = []
        for item in items:
            if not isinstance(item, list) or len(item) != 2 or type(item[0]) is not int or not 0 < item[0] < 10**10:
                raise Damaged(f"{what}: a signature of {text} is malformed")
            data = canonical.encode(item[1]) + b"\n"
            if str(decode_signature(data, f"{what}: a signature of {text}").statement.ref) != text:
                raise Damaged(f"{what}: a signature of {text} is for another ref")
            files.append((item[0], data))
        if files != sorted(set(files)):
            raise Damaged(f"{what}: the signatures of {text} are out of order")
        found[parse_ref(text)] = tuple(files)
    return found


def _id(value: Json, what: str) -> ObjectId:
    try:
        return parse_id(value)
    except Damaged as exc:
        raise Damaged(f"{what} is malformed: {exc.message}") from exc
