"""Adopted files where they lie in the store: whole, under the BLAKE3 of their bytes, as reflinks or hard links.

Chunks of such a file are frames that say where in it their bytes lie. A hard link can be written to through its other
names, so nothing read from here is believed before its checksum. Knows nothing of how a file gets here.
"""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from llmos_cli.errors import Damaged, from_os_error
from llmos_cli.formats.adopted import decode_place
from llmos_cli.formats.frame import Frame
from llmos_cli.formats.ids import ObjectId, checksum, parse_id
from llmos_cli.formats.layout import ADOPTED, adopted_key
from llmos_cli.store.disk import durable
from llmos_cli.store.handle import Store

_SUFFIX: Final = ".adopted"  # of its name in the trash
_FACT: Final = "adopted"
_HINT: Final = "add an intact copy of that file again, or pull it; what else it affects: llmos fsck"


def adopted_path(store: Store, name: ObjectId) -> Path:
    return store.root / adopted_key(name)


def trashed_path(store: Store, name: ObjectId) -> Path:
    return store.trash / f"{name}{_SUFFIX}"


def has_adopted(store: Store, name: ObjectId) -> bool:
    """Whether an adopted file is there; one that a gc has put into the trash comes back."""
    return adopted_path(store, name).exists() or restore_adopted(store, name)


def restore_adopted(store: Store, name: ObjectId) -> bool:
    """Move an adopted file from the trash back to its place; False if it is not there."""
    target = adopted_path(store, name)
    if not trashed_path(store, name).exists():
        return target.exists()
    durable.make_folder(target.parent)
    return durable.move(trashed_path(store, name), target) or target.exists()


def read_adopted(store: Store, frame: Frame, payload: memoryview, out: memoryview) -> None:
    """Fill `out`, which has the chunk's plain size, from the adopted file; raises Damaged naming object and file."""
    place = decode_place(payload)
    problem = "is gone"
    if has_adopted(store, frame.base):
        try:
            got = _read(adopted_path(store, frame.base), out, place.offset)
        except FileNotFoundError:
            got = -1
        except OSError as exc:
            raise from_os_error(exc, f"reading object {frame.id.short} from {adopted_key(frame.base)}") from exc
        if got == len(out) and checksum(out) == place.check:
            return
        if got >= 0:
            problem = "has changed" if got == len(out) else "was cut short"
    raise Damaged(f"object {frame.id.short} lies in {describe_adopted(store, frame.base)}, which {problem}", hint=_HINT)


def describe_adopted(store: Store, name: ObjectId) -> str:
    """An adopted file in words, with the name that it was adopted by if that is known."""
    was = store.index.facts(_FACT, [name]).get(name)
    origin = f", once {was.decode(errors='replace')}" if was else ""
    return f"the adopted file {adopted_key(name)[:22]}...{origin}"


def note_origin(store: Store, name: ObjectId, path: Path) -> None:
    """Remember by which name a file was adopted, to tell people."""
    store.index.add_facts(_FACT, [(name, os.fsencode(path))])


def list_adopted(store: Store) -> dict[ObjectId, Path]:
    """The adopted files by name; raises LlmosError for a folder that cannot be listed."""
    folder = store.root / ADOPTED
    if not folder.exists():
        return {}
    found: dict[ObjectId, Path] = {}
    try:
        for shelf in sorted(folder.iterdir()):
            if len(shelf.name) == 2:
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    found.update(_named(shelf.iterdir(), ""))
    except OSError as exc:
        raise from_os_error(exc, f"listing {folder}") from exc
    return found


def list_trashed(store: Store) -> dict[ObjectId, Path]:
    """The adopted files in the trash."""
    return dict(_named(store.trash.glob(f"*{_SUFFIX}"), _SUFFIX))


def _named(paths: Iterable[Path], suffix: str) -> Iterable[tuple[ObjectId, Path]]:
    for path in paths:
        with contextlib.suppress(Damaged):
            yield parse_id(path.name.removesuffix(suffix)), path


def _read(path: Path, out: memoryview, start: int) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    got = 0
    try:
        while got < len(out) and (count := os.preadv(fd, [out[got:]], start + got)):
            got += count
    finally:
        os.close(fd)
    return got
