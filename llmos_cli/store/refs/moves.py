"""The moves of a ref as they lie on the disk, damaged ones included: what is wrong with each, what it hurts, and what
it must have been.

A move is only ever given back the bytes it is proven to have had: by its own checksum, or by a copy of the same log
that fits between its neighbours and either agrees with most of what is left of it or goes on with the very move after
it.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from llmos_cli.errors import Damaged, LlmosError, UnknownVersion, from_os_error
from llmos_cli.formats import limits
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.layout import ref_key
from llmos_cli.formats.names import RefName
from llmos_cli.formats.reflog import RefEntry, decode_entry, encode_entry, parse_entry_name
from llmos_cli.store.disk import durable
from llmos_cli.store.handle import Store

_DAY_SECONDS: Final = 86400.0
_ALIKE: Final = 0.75  # of the bytes of a damaged move must be those of what it is said to have been


@dataclass(frozen=True)
class DamagedMove:
    """A move that does not read back: `data` is what is left of it, `earlier` and `later` its whole neighbours."""

    ref: RefName
    sequence: int
    path: Path
    data: bytes
    why: str
    earlier: RefEntry | None
    later: RefEntry | None

    @property
    def where(self) -> str:
        return f"ref {self.ref} (move {self.sequence})"

    @property
    def is_bypassed(self) -> bool:
        """Whether the ref has moved on as if this move had not been: then nothing rests on it."""
        return self.later is not None and self.later.previous == (self.earlier.id if self.earlier else None)


@dataclass(frozen=True)
class RefLog:
    """The moves of a ref, newest first."""

    ref: RefName
    moves: tuple[RefEntry, ...]
    damaged: tuple[DamagedMove, ...]

    @property
    def value(self) -> RefEntry | None:
        return self.moves[0] if self.moves else None


def read_log(store: Store, ref: RefName) -> RefLog:
    """Every move of a ref; raises UnknownVersion for one that only a newer llmos can read."""
    folder = store.refs / ref.name / ref.tag
    whole: list[RefEntry] = []
    broken: list[tuple[int, Path, bytes, str]] = []
    for sequence, path in _files(folder):
        data = b""
        try:
            with open(path, "rb") as file:
                data = file.read(limits.REF_FILE_BYTES + 1)
            whole.append(decode_entry(data, ref, sequence))
        except FileNotFoundError:
            continue  # trimmed, or the ref was deleted
        except OSError as exc:
            broken.append((sequence, path, data, from_os_error(exc, f"reading {path}").message))
        except UnknownVersion:
            raise
        except Damaged as exc:
            broken.append((sequence, path, data, exc.message))
    damaged = [
        DamagedMove(
            ref,
            sequence,
            path,
            data,
            why,
            max((move for move in whole if move.sequence < sequence), key=lambda move: move.sequence, default=None),
            min((move for move in whole if move.sequence > sequence), key=lambda move: move.sequence, default=None),
        )
        for sequence, path, data, why in broken
    ]
    return RefLog(ref, tuple(sorted(whole, key=lambda move: -move.sequence)), tuple(reversed(damaged)))


def kept_values(log: RefLog, since: float) -> Iterator[tuple[ObjectId, str]]:
    """A ref's value and the earlier ones that are kept, each with what a user would type to get it."""
    for number, move in enumerate(log.moves):
        recent = unix_time(move.time) >= since
        if number == 0 or recent:
            yield move.id, f"{log.ref}~{number}" if number else str(log.ref)
        if recent and move.previous:  # it was current until this move
            yield move.previous, f"{log.ref}~{number + 1}"


def kept_since(store: Store) -> float:
    """The time after which the earlier values of refs are kept."""
    return time.time() - store.config.gc.keep_days * _DAY_SECONDS


def unix_time(iso: str) -> float:
    """The time of a move."""
    try:
        return datetime.fromisoformat(iso).timestamp()
    except ValueError:
        return float("inf")  # an odd time keeps what it guards


def correct_move(move: DamagedMove) -> bool:
    """Put a move right of which one bit has flipped; False if that is not what happened to it."""
    data = one_bit_off(move.data, lambda trial: _decode(move, trial) is not None)
    return data is not None and _restore(move, data)


def restore_move(move: DamagedMove, read: Callable[[str], bytes]) -> bool:
    """Give a move back the bytes that another copy of the store has of it, read by their key; False if those are not
    proven to be the same move."""
    data = _read_copy(read, move.ref, move.sequence)
    entry = _decode(move, data)
    if entry is None or not _fits(move, entry):
        return False
    if _alike(data, move.data) < _ALIKE:
        after = move.later
        if after is None or _read_copy(read, move.ref, after.sequence) != encode_entry(after):
            return False
    return _restore(move, data)


def one_bit_off(data: bytes, stands: Callable[[bytes], bool]) -> bytes | None:
    """What stands and differs from `data` in one bit; None if nothing does."""
    trial = bytearray(data)
    for at in range(len(trial)):
        for bit in range(8):
            trial[at] ^= 1 << bit
            if stands(bytes(trial)):
                return bytes(trial)
            trial[at] ^= 1 << bit
    return None


def _decode(move: DamagedMove, data: bytes) -> RefEntry | None:
    try:
        return decode_entry(data, move.ref, move.sequence)
    except Damaged:
        return None


def _fits(move: DamagedMove, entry: RefEntry) -> bool:
    """Whether the moves next to it were made before and after this one."""
    before = move.earlier if move.earlier and move.earlier.sequence == move.sequence - 1 else None
    after = move.later if move.later and move.later.sequence == move.sequence + 1 and not move.is_bypassed else None
    return (before is None or entry.previous == before.id) and (after is None or after.previous == entry.id)


def _read_copy(read: Callable[[str], bytes], ref: RefName, sequence: int) -> bytes:
    try:
        return read(ref_key(ref, sequence))
    except LlmosError:
        return b""


def _restore(move: DamagedMove, data: bytes) -> bool:
    if not move.path.exists():
        return False  # the ref was deleted meanwhile
    durable.write_file(move.path, data)
    return True


def _alike(one: bytes, other: bytes) -> float:
    """The share of bytes that are equal, place by place."""
    return sum(a == b for a, b in zip(one, other, strict=False)) / max(len(one), len(other), 1)


def _files(folder: Path) -> list[tuple[int, Path]]:
    try:
        paths = list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as exc:
        raise from_os_error(exc, f"listing {folder}") from exc
    found = ((parse_entry_name(path.name), path) for path in paths)
    return sorted((number, path) for number, path in found if number is not None)
