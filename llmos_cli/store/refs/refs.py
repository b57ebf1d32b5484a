"""Refs: names that move. A ref is the folder `refs/NAME/TAG/` of numbered moves; the highest valid number is its value.

The compare-and-swap is the exclusive creation of the next number: of many writers exactly one gets it, with no lock
that could be left behind or that a network file system fakes. A writer that was overtaken (the log was trimmed, or
the ref deleted and made anew) finds that its move does not follow the value it saw, and gives it back.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from llmos_cli.errors import Conflict, Damaged, LlmosError, NotFound, UnknownVersion, UsageError, from_os_error
from llmos_cli.formats import limits
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.names import RefName
from llmos_cli.formats.reflog import RefEntry, decode_entry, encode_entry, entry_name, parse_entry_name
from llmos_cli.store.disk import durable
from llmos_cli.store.disk.identity import who_am_i
from llmos_cli.store.handle import Store

__all__ = ["RefEntry", "delete_ref", "list_refs", "read_ref", "ref_history", "ref_names", "update_ref"]


def read_ref(store: Store, ref: RefName) -> RefEntry | None:
    """A ref's current value, None if there is no such ref.

    A damaged last move is passed over with a warning: the ref has the value of the last move that reads back. Raises
    Damaged if none does.
    """
    return _read_from(store, ref, _sequences(store, ref))


def ref_names(store: Store) -> list[RefName]:
    """Every ref that has a folder, in order, whether or not it can be read."""
    names = []
    for name in _subfolders(store, store.refs):
        for tag in _subfolders(store, store.refs / name):
            try:
                names.append(RefName(name, tag))
            except UsageError:
                store.progress.warn(f"{store.refs / name / tag} is not a ref; passing over it")
    return sorted(names)


def list_refs(store: Store) -> list[RefEntry]:
    """Every ref's current value, by name. Raises Damaged rather than leave a ref out."""
    entries = (read_ref(store, ref) for ref in ref_names(store))
    return [entry for entry in entries if entry]


def sound_refs(store: Store) -> list[RefEntry]:
    """The refs that can be read: for names beside an answer, which a damaged ref elsewhere must not take away."""
    found = []
    for ref in ref_names(store):
        with contextlib.suppress(Damaged):
            found.append(read_ref(store, ref))
    return [entry for entry in found if entry]


def refs_naming(store: Store, manifests: Iterable[ObjectId]) -> list[RefEntry]:
    """The refs that can be read and one of whose moves names one of these: only these are decoded."""
    texts = [str(oid).encode() for oid in manifests]
    found = []
    for ref in ref_names(store):
        with contextlib.suppress(Damaged):
            if any(text in data for data in _texts(_folder(store, ref)) for text in texts):
                found.append(read_ref(store, ref))
    return [entry for entry in found if entry]


def ref_history(store: Store, ref: RefName) -> list[RefEntry]:
    """A ref's moves, newest first; damaged ones are passed over with a warning."""
    entries = []
    for sequence in reversed(_sequences(store, ref)):
        try:
            entry = _read_move(_folder(store, ref), ref, sequence)
        except UnknownVersion:
            raise
        except Damaged as exc:
            store.progress.warn(exc.message)
            continue
        if entry:
            entries.append(entry)
    return entries


def update_ref(store: Store, ref: RefName, new: ObjectId, *, expected: ObjectId | None, message: str) -> RefEntry:
    """Move a ref from `expected` (None: it must not exist) to `new`; raises Conflict if somebody was faster."""
    sequences = _sequences(store, ref)
    current = _read_from(store, ref, sequences)
    if (current.id if current else None) != expected:
        raise _conflict(ref, expected, current)
    if current and current.id == new:
        return current
    sequence = (sequences[-1] if sequences else 0) + 1
    entry = RefEntry(ref, sequence, new, expected, _now(), who_am_i(), message[:1000])
    publish_move(store, entry)
    return entry


def overwrite_ref(store: Store, ref: RefName, new: ObjectId, *, message: str) -> RefEntry:
    """Give a value again to a ref none of whose moves can be read; raises Conflict if somebody does so meanwhile."""
    sequence = (_sequences(store, ref) or [0])[-1] + 1
    entry = RefEntry(ref, sequence, new, None, _now(), who_am_i(), message[:1000])
    publish_move(store, entry)
    return entry


def publish_move(store: Store, entry: RefEntry) -> None:
    """Make one move the ref's newest; raises Conflict if its number is taken or overtaken."""
    folder = _folder(store, entry.ref)
    target = folder / entry_name(entry.sequence)
    durable.make_folder(folder)
    temp = durable.temp_path(store.tmp)
    with durable.new_file(temp) as file:
        durable.write_all(file, encode_entry(entry))
    try:
        won = durable.publish_new(temp, target)
    except NotFound:  # the ref was deleted at this moment
        won = False
    if not won:
        raise _conflict(entry.ref, entry.previous, read_ref(store, entry.ref))
    if not _follows(store, entry):
        if _read_move(folder, entry.ref, entry.sequence) == entry:  # not that of somebody who began anew
            durable.remove(target)
        raise _conflict(entry.ref, entry.previous, read_ref(store, entry.ref))


def take_back(store: Store, entry: RefEntry) -> None:
    """Undo a move that was just made and must not stand, unless somebody has built upon it."""
    folder = _folder(store, entry.ref)
    is_newest = _sequences(store, entry.ref)[-1:] == [entry.sequence]
    if is_newest and _read_move(folder, entry.ref, entry.sequence) == entry:
        durable.remove(folder / entry_name(entry.sequence))
        durable.sync_folder(folder)


def delete_ref(store: Store, ref: RefName, *, expected: ObjectId) -> RefEntry:
    """Remove a ref with its log (into the trash, where gc keeps it for the grace period)."""
    sequences = _sequences(store, ref)
    current = _read_from(store, ref, sequences)
    if current is None:
        raise NotFound(f"no ref {ref}", hint="list them: llmos ls")
    if current.id != expected:
        raise _conflict(ref, expected, current)
    folder = _folder(store, ref)
    durable.touch(folder)
    target = durable.temp_path(store.trash)
    target = target.with_name(f"ref-{ref.name}-{ref.tag}-{target.name.removeprefix(durable.TEMP_PREFIX)}")
    if not durable.move(folder, target):
        raise _conflict(ref, expected, None)
    if _numbers(target) != sequences or _read_move(target, ref, current.sequence) != current:
        # somebody moved it before it was gone, and that move must not be lost
        with contextlib.suppress(LlmosError):  # made anew by a third; then the move stays in the trash with the log
            durable.make_folder(folder.parent)
            durable.move(target, folder)
        raise _conflict(ref, expected, read_ref(store, ref))
    durable.remove_empty_folder(folder.parent)
    return current


def read_removed(folder: Path, ref: RefName) -> RefEntry | None:
    """The last value that reads back of a ref that was moved, log and all, to `folder`."""
    for sequence in reversed(_numbers(folder)):
        with contextlib.suppress(Damaged):
            return _read_move(folder, ref, sequence)
    return None


def _read_from(store: Store, ref: RefName, sequences: list[int]) -> RefEntry | None:
    problem: Damaged | None = None
    folder = _at(store, ref)
    for sequence in reversed(sequences):
        try:
            entry = _read_move(folder, ref, sequence)
        except UnknownVersion:
            raise
        except Damaged as exc:
            problem = problem or exc
            continue
        if entry:
            if problem:
                store.progress.warn(f"{problem.message}; using move {sequence} of {ref}")
            return entry
    if problem:
        raise Damaged(
            problem.message, hint=f"no earlier value of {ref} is left; point it anew: llmos tag --force @ID {ref}"
        )
    return None


def _value(store: Store, ref: RefName, sequences: list[int]) -> RefEntry | None:
    """A ref's value for a writer, to whom a ref with nothing but damaged moves is one without a value."""
    try:
        return _read_from(store, ref, sequences)
    except UnknownVersion:
        raise
    except Damaged as exc:
        store.progress.warn(exc.message)
        return None


def _follows(store: Store, entry: RefEntry) -> bool:
    """Whether a move just made stands right after the value it replaces, and is the newest or was built upon."""
    folder, sequences = _folder(store, entry.ref), _sequences(store, entry.ref)
    earlier = [number for number in sequences if number < entry.sequence]
    later = [number for number in sequences if number > entry.sequence]
    before = _value(store, entry.ref, earlier)
    if (before.id if before else None) != entry.previous or _read_move(folder, entry.ref, entry.sequence) != entry:
        return False
    after = _read_move(folder, entry.ref, later[0]) if later else None
    return not later or (after is not None and (after.sequence, after.previous) == (entry.sequence + 1, entry.id))


def _read_move(folder: Path | str, ref: RefName, sequence: int) -> RefEntry | None:
    path = f"{folder}/{entry_name(sequence)}"
    try:
        return decode_entry(_read(path), ref, sequence)
    except FileNotFoundError:
        return None  # trimmed meanwhile
    except OSError as exc:
        raise from_os_error(exc, f"reading {path}") from exc


def _read(path: str) -> bytes:
    """What a move's file holds, a byte more than it may at most; there are thousands, and `open` is slow."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = b""
        while len(data) <= limits.REF_FILE_BYTES and (more := os.read(fd, limits.REF_FILE_BYTES + 1 - len(data))):
            data += more
        return data
    finally:
        os.close(fd)


def _sequences(store: Store, ref: RefName) -> list[int]:
    return _numbers(_at(store, ref))


def _numbers(path: Path | str) -> list[int]:
    try:
        numbers = [parse_entry_name(name) for name in os.listdir(path)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as exc:
        raise from_os_error(exc, f"listing {path}") from exc
    return sorted(number for number in numbers if number is not None)


def _subfolders(store: Store, path: Path) -> list[str]:
    """A failure to list must never look like "no refs": gc would take everything."""
    try:
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    except FileNotFoundError:
        if path == store.refs:
            raise Damaged(f"the refs folder {store.refs} is missing", hint="restore it from a backup") from None
        return []
    except OSError as exc:
        raise from_os_error(exc, f"listing {path}") from exc


def _texts(folder: Path) -> Iterator[bytes]:
    """What is written in the files of a ref's folder, as it is."""
    try:
        for name in os.listdir(folder):
            yield _read(f"{folder}/{name}")
    except FileNotFoundError:
        return  # removed, or trimmed, meanwhile
    except OSError as exc:
        raise from_os_error(exc, f"reading {folder}") from exc


def _folder(store: Store, ref: RefName) -> Path:
    return Path(_at(store, ref))


def _at(store: Store, ref: RefName) -> str:
    return f"{store.refs}/{ref.name}/{ref.tag}"  # there are thousands, and a Path takes as long as reading its file


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _conflict(ref: RefName, expected: ObjectId | None, current: RefEntry | None) -> Conflict:
    was = f"@{expected.short}" if expected else "absent"
    now = f"@{current.id.short}" if current else "absent"
    return Conflict(f"ref {ref} moved meanwhile: it was {was} and is {now}", hint=f"look at it: llmos log {ref}")
