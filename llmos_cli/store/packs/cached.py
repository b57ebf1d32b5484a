"""A bounded cache of what is read elsewhere, as plain files in `cache/objects/` named by id.

Nothing here is an only copy: what comes in was read from another place, the store's own objects never do. A file is
believed only if its bytes have the id of its name; else it is removed and the object is read where it came from. When
there is no more room the highest ids go, after those that nobody has read for a week. So of a dataset larger than the
cache each epoch finds the same share again; of what was read last, a scan from end to end would find nothing.
"""

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from llmos_cli.errors import Damaged, LlmosError
from llmos_cli.formats.ids import ObjectId, object_id, parse_id
from llmos_cli.formats.pack import Entry
from llmos_cli.store.disk import durable
from llmos_cli.store.disk.forks import ForkLock
from llmos_cli.store.handle import Elsewhere, Store

FOLDER: Final = "cache/objects"
STALE_SECONDS: Final = 7 * 86400.0
_SCANS: Final = 32  # of the limit: so much is written before the folder is looked at again, others may write too
_LOW: Final = 0.95  # of the limit stays when something has to go
_TOUCH_SECONDS: Final = 86400.0


class Cached:
    """Another place, of which at most `limit` bytes are kept near."""

    def __init__(self, store: Store, place: Elsewhere, limit: int) -> None:
        self.place, self._limit = place, limit
        self._folder = store.root / FOLDER
        self._lock = ForkLock()
        self._bar: ObjectId | None = None  # ids from here on do not stay
        self._room = 0  # to write before the folder is looked at again

    @property
    def label(self) -> str:
        return self.place.label

    def entries(self, oid: ObjectId) -> Sequence[Entry]:
        return self.place.entries(oid)

    def read(self, oid: ObjectId) -> tuple[Entry, memoryview] | None:
        entry = next(iter(self.entries(oid)), None)
        if entry is not None and (plain := self._kept(oid)) is not None:
            return entry, memoryview(plain)
        found = self.place.read(oid)
        if found is not None:
            self._keep(oid, found[1])
        return found

    def _kept(self, oid: ObjectId) -> bytearray | None:
        path = self._path(oid)
        try:
            with open(path, "rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                plain = bytearray(status.st_size)
                whole = file.readinto(plain) == len(plain)
        except OSError:
            return None
        if not whole or object_id(plain) != oid:
            with suppress(LlmosError):
                durable.remove(path)
            return None
        if time.time() - status.st_mtime > _TOUCH_SECONDS:
            with suppress(LlmosError):
                durable.touch(path)
        return plain

    def _keep(self, oid: ObjectId, plain: memoryview) -> None:
        """A cache that cannot be written costs time, nothing else."""
        with suppress(LlmosError, OSError), self._lock:
            if self._room < len(plain):
                self._make_room(len(plain))
            if len(plain) <= self._room and (self._bar is None or oid < self._bar):
                path = self._path(oid)
                durable.make_folder(path.parent)
                durable.write_volatile(path, plain)
                self._room -= len(plain)

    def _make_room(self, size: int) -> None:
        """Look at what there is, and let go what is too much."""
        now = time.time()
        held: list[tuple[bool, ObjectId, int, Path]] = []
        for path in self._folder.glob("??/*"):
            with suppress(OSError, Damaged):
                status = path.lstat()
                held.append((now - status.st_mtime > STALE_SECONDS, parse_id(path.name), status.st_size, path))
        held.sort(key=lambda item: item[:2])
        total = sum(item[2] for item in held)
        step = max(size, self._limit // _SCANS)
        if total + step > self._limit:
            while held and total > self._limit * _LOW:
                stale, oid, freed, path = held.pop()
                durable.remove(path)
                total -= freed
                if not stale:
                    self._bar = oid
        self._room = min(step, self._limit - total)

    def _path(self, oid: ObjectId) -> Path:
        name = str(oid)
        return self._folder / name[:2] / name
