"""The index: which object lies where, in SQLite. A cache: everything in it can be rebuilt from the packs.

A row that is wrong cannot do harm: every read compares the frame it finds with the id it asked for. So a lost, old
or broken index is thrown away and filled again.
"""

import contextlib
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from llmos_cli.errors import AccessDenied, Busy, Damaged, NoSpace
from llmos_cli.formats.frame import MANIFEST
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.pack import Entry
from llmos_cli.store import durable

SCHEMA_VERSION: Final = 1
_SCHEMA = """
CREATE TABLE packs (number INTEGER PRIMARY KEY, name BLOB NOT NULL UNIQUE, size INTEGER NOT NULL);
CREATE TABLE objects (
    id BLOB NOT NULL, pack INTEGER NOT NULL, base BLOB NOT NULL, offset INTEGER NOT NULL, payload INTEGER NOT NULL,
    plain INTEGER NOT NULL, kind INTEGER NOT NULL, codec INTEGER NOT NULL, depth INTEGER NOT NULL,
    PRIMARY KEY (id, pack)
) WITHOUT ROWID;
CREATE INDEX objects_by_pack ON objects (pack);
CREATE INDEX manifests_by_id ON objects (id) WHERE kind = 2;
CREATE TABLE recipes (manifest BLOB PRIMARY KEY, recipe BLOB) WITHOUT ROWID;
CREATE INDEX recipes_by_key ON recipes (recipe);
"""
_ROW = "o.id, o.base, o.offset, o.payload, o.plain, o.kind, o.codec, o.depth"


@dataclass(frozen=True)
class Location:
    """Where an object lies: the pack's name and its index line."""

    pack: ObjectId
    entry: Entry


class Index:
    """Thread-safe: one connection behind one lock; a look-up takes microseconds."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.RLock()
        self.is_new = not path.exists()
        try:
            self._connection = self._connect()
        except sqlite3.DatabaseError as exc:
            if not _is_broken(exc):
                raise self._error(exc) from exc
            self.reset()

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def reset(self) -> None:
        """Throw the index away; the caller fills it again."""
        with self._lock:
            with contextlib.suppress(AttributeError, sqlite3.Error):
                self._connection.close()
            for suffix in ("", "-wal", "-shm"):
                durable.remove(self._path.with_name(self._path.name + suffix))
            self.is_new = True
            self._connection = self._connect()

    def packs(self) -> dict[ObjectId, int]:
        """The indexed packs and their sizes in bytes."""
        with self._cursor() as cursor:
            return {ObjectId(name): size for name, size in cursor.execute("SELECT name, size FROM packs")}

    def add_pack(self, name: ObjectId, size: int, entries: Sequence[Entry]) -> None:
        with self._cursor(write=True) as cursor:
            cursor.execute("INSERT OR IGNORE INTO packs (name, size) VALUES (?, ?)", (name, size))
            (number,) = cursor.execute("SELECT number FROM packs WHERE name = ?", (name,)).fetchone()
            cursor.executemany(
                "INSERT OR REPLACE INTO objects VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    (e.id, number, e.base, e.offset, e.payload_size, e.plain_size, e.kind, e.codec, e.depth)
                    for e in entries
                ),
            )

    def drop_pack(self, name: ObjectId) -> None:
        with self._cursor(write=True) as cursor:
            cursor.execute("DELETE FROM objects WHERE pack = (SELECT number FROM packs WHERE name = ?)", (name,))
            cursor.execute("DELETE FROM packs WHERE name = ?", (name,))

    def locate(self, oid: ObjectId) -> list[Location]:
        """Every place an object lies, oldest pack first."""
        query = f"SELECT p.name, {_ROW} FROM objects o JOIN packs p ON p.number = o.pack WHERE o.id = ? ORDER BY o.pack"
        with self._cursor() as cursor:
            return [Location(ObjectId(row[0]), _entry(row[1:])) for row in cursor.execute(query, (oid,))]

    def has(self, oid: ObjectId) -> bool:
        with self._cursor() as cursor:
            return cursor.execute("SELECT 1 FROM objects WHERE id = ? LIMIT 1", (oid,)).fetchone() is not None

    def entries(self, pack: ObjectId) -> list[Entry]:
        """The objects of a pack in file order."""
        query = f"SELECT {_ROW} FROM objects o WHERE o.pack = (SELECT number FROM packs WHERE name = ?) ORDER BY offset"
        with self._cursor() as cursor:
            return [_entry(row) for row in cursor.execute(query, (pack,))]

    def stored_sizes(self) -> dict[ObjectId, int]:
        """What each object takes in packs, all its copies together, in bytes."""
        with self._cursor() as cursor:
            sizes: dict[ObjectId, int] = {}
            for row in cursor.execute(f"SELECT {_ROW} FROM objects o"):
                entry = _entry(row)
                sizes[entry.id] = sizes.get(entry.id, 0) + entry.stored_size
            return sizes

    def bases(self, objects: set[ObjectId]) -> set[ObjectId]:
        """The bases that stored deltas among `objects` rest on, and theirs in turn."""
        with self._cursor() as cursor:
            rows = cursor.execute("SELECT id, base FROM objects WHERE depth > 0")
            base_of = {ObjectId(oid): ObjectId(base) for oid, base in rows}
        found: set[ObjectId] = set()
        for oid in objects:
            while oid in base_of and base_of[oid] not in found:
                oid = base_of[oid]  # noqa: PLW2901
                found.add(oid)
        return found

    def manifests(self, prefix: str = "") -> list[ObjectId]:
        """Ids of manifests that start with a hex prefix, in order."""
        low = bytes.fromhex(prefix + "0" * (64 - len(prefix)))
        high = bytes.fromhex(prefix + "f" * (64 - len(prefix)))
        query = "SELECT DISTINCT id FROM objects WHERE kind = ? AND id BETWEEN ? AND ? ORDER BY id"
        with self._cursor() as cursor:
            return [ObjectId(row[0]) for row in cursor.execute(query, (MANIFEST, low, high))]

    def unread_manifests(self) -> list[ObjectId]:
        """Manifests whose recipe is not in the index yet."""
        query = "SELECT DISTINCT id FROM objects WHERE kind = ? AND id NOT IN (SELECT manifest FROM recipes)"
        with self._cursor() as cursor:
            return [ObjectId(row[0]) for row in cursor.execute(query, (MANIFEST,))]

    def add_recipes(self, rows: Iterable[tuple[ObjectId, ObjectId | None]]) -> None:
        with self._cursor(write=True) as cursor:
            cursor.executemany("INSERT OR REPLACE INTO recipes VALUES (?, ?)", rows)

    def made_by(self, recipe: ObjectId) -> list[ObjectId]:
        with self._cursor() as cursor:
            rows = cursor.execute("SELECT manifest FROM recipes WHERE recipe = ? ORDER BY manifest", (recipe,))
            return [ObjectId(row[0]) for row in rows]

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=60, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version == 0:
                connection.execute("BEGIN IMMEDIATE")
                (version,) = connection.execute("PRAGMA user_version").fetchone()
                if version == 0:  # nobody else was faster
                    for statement in _SCHEMA.split(";"):
                        connection.execute(statement)
                    connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
                    self.is_new = True
                connection.execute("COMMIT")
            elif version != SCHEMA_VERSION:
                raise sqlite3.DatabaseError("file is not a database of this version")
            connection.execute("SELECT name FROM packs LIMIT 1").fetchone()
        except BaseException:
            connection.close()
            raise
        return connection

    @contextlib.contextmanager
    def _cursor(self, *, write: bool = False) -> Iterator[sqlite3.Cursor]:
        with self._lock:
            try:
                if not write:
                    yield self._connection.cursor()
                    return
                self._connection.execute("BEGIN IMMEDIATE")
                try:
                    yield self._connection.cursor()
                    self._connection.execute("COMMIT")
                except BaseException:
                    with contextlib.suppress(sqlite3.Error):
                        self._connection.execute("ROLLBACK")
                    raise
            except sqlite3.Error as exc:
                raise self._error(exc) from exc

    def _error(self, exc: sqlite3.Error) -> Exception:
        text = str(exc)
        if "full" in text:
            return NoSpace(f"no space left while writing the index {self._path}", hint="free some space (llmos gc)")
        if "locked" in text or "busy" in text:
            return Busy(f"the index {self._path} is locked by another process", hint="run the command again")
        if "readonly" in text or "unable to open" in text:
            return AccessDenied(f"cannot write the index {self._path}: {text}")
        return Damaged(f"the index {self._path} is damaged: {text}", hint="rebuild it: llmos fsck --reindex")


def _is_broken(exc: sqlite3.DatabaseError) -> bool:
    return "malformed" in str(exc) or "not a database" in str(exc) or "no such table" in str(exc)


def _entry(row: tuple[bytes, bytes, int, int, int, int, int, int]) -> Entry:
    return Entry(ObjectId(row[0]), ObjectId(row[1]), *row[2:])
