"""Refs at a remote: the same numbered moves as in a store, read and made through a transport.

A move is the exclusive creation of the next number; whoever comes second is told so and nothing is lost. A number is
used once: where a removal whose answer was lost is asked for again, or carried out late, it must not hit a newer move
that got the same number. So before a ref's newest move is removed its number is marked as used up.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final

from llmos_cli.errors import Conflict, Damaged, NotFound, UnknownVersion, UsageError
from llmos_cli.formats import limits
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.layout import REFS, ref_key
from llmos_cli.formats.names import RefName
from llmos_cli.formats.reflog import RefEntry, decode_entry, encode_entry, gone_name, parse_entry_name, parse_gone_name
from llmos_cli.formats.signature import parse_signature_name
from llmos_cli.progress import Progress, Silent
from llmos_cli.remote.exchange.parallel import in_order
from llmos_cli.remote.transports.transport import SlowToAsk, Transport
from llmos_cli.store.disk.identity import who_am_i

_STREAMS: Final = 8


@dataclass(frozen=True)
class RemoteRef:
    """A ref as it was seen: the numbers of its moves in order, the newest that reads back (None: no such ref), and
    why none does where there are moves. `signed` are the names of the signatures beside the newest."""

    ref: RefName
    sequences: tuple[int, ...] = ()
    entry: RefEntry | None = None
    problem: Damaged | None = None
    signed: tuple[str, ...] = ()

    @property
    def id(self) -> ObjectId | None:
        return self.entry.id if self.entry else None


def list_remote_refs(
    transport: Transport, progress: Progress, wanted: Callable[[RefName], bool] = lambda ref: True
) -> dict[RefName, RemoteRef]:
    """Every ref that is `wanted` as it is now, by name, those that cannot be read included."""
    numbers: defaultdict[RefName, set[int]] = defaultdict(set)
    signed: defaultdict[RefName, set[str]] = defaultdict(set)
    for key, _ in transport.list(f"{REFS}/"):
        found = _parse_key(key)
        if found:
            numbers[found[0]].add(found[1])
        elif ref := _signed_ref(key):
            signed[ref].add(key.rpartition("/")[2])

    def read(ref: RefName) -> RemoteRef:
        return _with_signatures(_read(transport, ref, sorted(numbers[ref]), progress), signed[ref])

    with closing(in_order(read, sorted(filter(wanted, numbers)), workers=_STREAMS)) as refs:
        return {seen.ref: seen for seen in refs if seen.entry or seen.problem}


def read_remote_ref(transport: Transport, ref: RefName, progress: Progress) -> RemoteRef:
    """One ref as it is now. A damaged newest move is passed over with a warning."""
    keys = [key for key, _ in transport.list(f"{REFS}/{ref.name}/{ref.tag}/")]
    signed = {key.rpartition("/")[2] for key in keys if _signed_ref(key) == ref}
    return _with_signatures(_read(transport, ref, _numbers(keys, ref), progress), signed)


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


def list_moves(transport: Transport, ref: RefName | None = None) -> dict[RefName, tuple[int, ...]]:
    """The numbers of the moves of every ref, or of one, in order; nothing is read."""
    numbers: defaultdict[RefName, set[int]] = defaultdict(set)
    for key, _ in transport.list(f"{REFS}/{ref.name}/{ref.tag}/" if ref else f"{REFS}/"):
        found = _parse_key(key)
        if found:
            numbers[found[0]].add(found[1])
    return {ref: tuple(sorted(numbers[ref])) for ref in sorted(numbers)}


def move_remote_ref(transport: Transport, seen: RemoteRef, new: ObjectId, *, message: str) -> RefEntry:
    """Give a ref a new value if it still is as it was `seen`; raises Conflict if somebody was faster."""
    sequence = max([0, *seen.sequences, _used_up(transport, seen.ref)]) + 1
    time = datetime.now(UTC).isoformat(timespec="seconds")
    entry = RefEntry(seen.ref, sequence, new, seen.id, time, who_am_i(), message[:1000])
    key = ref_key(seen.ref, sequence)
    if not transport.create(key, encode_entry(entry)):
        raise _conflict(transport, seen)
    if not _follows(transport, entry):
        retire(transport, seen.ref, sequence)
        transport.delete(key)
        raise _conflict(transport, seen)
    return entry


def retire(transport: Transport, ref: RefName, sequence: int) -> None:
    """Mark a number, and all below, as used up, before its move is removed. A folder removes at once or not at all."""
    if isinstance(transport, SlowToAsk):
        transport.create(f"{REFS}/{ref.name}/{ref.tag}/{gone_name(sequence)}", b"")


def _used_up(transport: Transport, ref: RefName) -> int:
    """The highest number that is marked so."""
    if not isinstance(transport, SlowToAsk):
        return 0
    keys = (key for key, _ in transport.list(f"{REFS}/{ref.name}/{ref.tag}/"))
    return max((parse_gone_name(key.rpartition("/")[2]) or 0 for key in keys), default=0)


def _follows(transport: Transport, entry: RefEntry) -> bool:
    """Whether a move that was just made stands right after the value it replaces, and is the newest or was built upon.

    It does not if the ref was removed, made anew or trimmed since it was seen, or if its number was used before.
    """
    sequences = _sequences(transport, entry.ref)
    if _used_up(transport, entry.ref) >= entry.sequence:
        return False
    earlier = [number for number in sequences if number < entry.sequence]
    later = [number for number in sequences if number > entry.sequence]
    if entry.sequence not in sequences or _read(transport, entry.ref, earlier, Silent()).id != entry.previous:
        return False
    after = _read_move(transport, entry.ref, later[0]) if later else None
    return not later or (after is not None and after.previous == entry.id)


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
        problem.hint = f"no earlier value of {ref} is left there; push it anew with --force"
    return RemoteRef(ref, tuple(sequences), None, problem)


def _read_move(transport: Transport, ref: RefName, sequence: int) -> RefEntry | None:
    """A move; None if it was trimmed or removed meanwhile. One that does not read is asked for a second time."""

    def read() -> RefEntry:
        return decode_entry(transport.read(ref_key(ref, sequence), 0, limits.REF_FILE_BYTES + 1), ref, sequence)

    try:
        try:
            return read()
        except Damaged:
            return read()
    except NotFound:
        return None
    except Damaged as exc:
        raise type(exc)(f"{exc.message}, at {transport.url}", hint=exc.hint) from exc


def _sequences(transport: Transport, ref: RefName) -> list[int]:
    return _numbers((key for key, _ in transport.list(f"{REFS}/{ref.name}/{ref.tag}/")), ref)


def _numbers(keys: Iterable[str], ref: RefName) -> list[int]:
    found = (_parse_key(key) for key in keys)
    return sorted({pair[1] for pair in found if pair and pair[0] == ref})


def _with_signatures(seen: RemoteRef, names: Set[str]) -> RemoteRef:
    sequence = seen.entry.sequence if seen.entry else None
    signed = tuple(sorted(name for name in names if parse_signature_name(name) == sequence))
    return replace(seen, signed=signed) if signed and sequence is not None else seen


def _signed_ref(key: str) -> RefName | None:
    """The ref that a key is a signature for; None for any other key."""
    parts = key.split("/")
    if len(parts) != 4 or parse_signature_name(parts[-1]) is None:
        return None
    try:
        return RefName(parts[1], parts[2])
    except UsageError:
        return None


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
