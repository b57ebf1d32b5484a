"""Refs at a remote: the same numbered moves as in a store, read and made through a transport.

A move is the exclusive creation of the next number; whoever comes second is told so and nothing is lost.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from llmos_cli.errors import Conflict, Damaged, NotFound, UnknownVersion, UsageError
from llmos_cli.formats import limits
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.layout import REFS, ref_key
from llmos_cli.formats.names import RefName
from llmos_cli.formats.reflog import RefEntry, decode_entry, encode_entry, parse_entry_name
from llmos_cli.progress import Progress
from llmos_cli.remote.parallel import in_order
from llmos_cli.remote.transport import Transport
from llmos_cli.store.identity import who_am_i

_STREAMS: Final = 8


@dataclass(frozen=True)
class RemoteRef:
    """A ref as it was seen: the numbers of its moves in order and the newest one that reads back (None: no such ref)."""

    ref: RefName
    sequences: tuple[int, ...]
    entry: RefEntry | None

    @property
    def id(self) -> ObjectId | None:
        return self.entry.id if self.entry else None


def list_remote_refs(transport: Transport, progress: Progress) -> dict[RefName, RemoteRef]:
    """Every ref with its current value, by name. Raises Damaged rather than leave a ref out."""
    numbers: defaultdict[RefName, list[int]] = defaultdict(list)
    for key, _ in transport.list(f"{REFS}/"):
        found = _parse_key(key)
        if found:
            numbers[found[0]].append(found[1])

    def read(ref: RefName) -> RemoteRef:
        return _read(transport, ref, sorted(numbers[ref]), progress)

    with closing(in_order(read, sorted(numbers), workers=_STREAMS)) as refs:  # type: ignore[type-var]
        return {remote.ref: remote for remote in refs if remote.entry}


def read_remote_ref(transport: Transport, ref: RefName, progress: Progress) -> RemoteRef:
    """One ref as it is now. A damaged newest move is passed over with a warning; raises Damaged if none reads back."""
    return _read(transport, ref, _sequences(transport, ref), progress)


def remote_log(transport: Transport, seen: RemoteRef) -> Iterator[RefEntry]:
    """The moves of a ref, newest first, read as they are asked for; damaged ones are left out."""
    for sequence in reversed(seen.sequences):
        try:
            entry = _read_move(transport, seen.ref, sequence)
        except UnknownVersion:
            raise
        except Damaged:
            continue
        if entry:
            yield entry


def move_remote_ref(transport: Transport, seen: RemoteRef, new: ObjectId, *, message: str) -> RefEntry:
    """Give a ref a new value if it still is as it was `seen`; raises Conflict if somebody was faster."""
    last = seen.sequences[-1] if seen.sequences else 0
    time = datetime.now(UTC).isoformat(timespec="seconds")
    entry = RefEntry(seen.ref, last + 1, new, seen.id, time, who_am_i(), message[:1000])
    key = ref_key(seen.ref, entry.sequence)
    if not transport.create(key, encode_entry(entry)):
        raise _conflict(transport, seen)
    after = _sequences(transport, seen.ref)
    overtaken = after[-1:] != [entry.sequence]
    replaced = last > 0 and last not in after  # the ref was removed meanwhile
    if overtaken or replaced:
        transport.delete(key)
        raise _conflict(transport, seen)
    return entry


def _read(transport: Transport, ref: RefName, sequences: list[int], progress: Progress) -> RemoteRef:
    problem: Damaged | None = None
    for sequence in reversed(sequences):
        try:
            entry = _read_move(transport, ref, sequence)
        except UnknownVersion:
            raise
        except Damaged as exc:
            problem = problem or exc
            continue
        if entry:
            if problem:
                progress.warn(f"{problem.message}; using move {sequence} of {ref}")
            return RemoteRef(ref, tuple(sequences), entry)
    if problem:
        raise Damaged(problem.message, hint=f"no earlier value of {ref} is left there; push it anew with --force")
    return RemoteRef(ref, tuple(sequences), None)


def _read_move(transport: Transport, ref: RefName, sequence: int) -> RefEntry | None:
    try:
        return decode_entry(transport.read(ref_key(ref, sequence), 0, limits.REF_FILE_BYTES + 1), ref, sequence)
    except NotFound:
        return None  # trimmed or removed meanwhile
    except Damaged as exc:
        raise type(exc)(f"{exc.message}, at {transport.url}", hint=exc.hint) from exc


def _sequences(transport: Transport, ref: RefName) -> list[int]:
    found = (_parse_key(key) for key, _ in transport.list(f"{REFS}/{ref.name}/{ref.tag}/"))
    return sorted(pair[1] for pair in found if pair and pair[0] == ref)


def _parse_key(key: str) -> tuple[RefName, int] | None:
    """The ref and number that a key stands for; None for anything else that may lie there."""
    parts = key.split("/")
    sequence = parse_entry_name(parts[-1])
    if len(parts) != 4 or sequence is None:
        return None
    try:
        return RefName(parts[1], parts[2]), sequence
    except UsageError:
        return None


def _conflict(transport: Transport, seen: RemoteRef) -> Conflict:
    return Conflict(
        f"ref {seen.ref} at {transport.url} moved while this was under way",
        hint=f"see what is there now: llmos pull, then push {seen.ref} again",
    )
