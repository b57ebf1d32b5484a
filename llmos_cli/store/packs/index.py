"""The index: which object lies where, in SQLite. A cache: everything in it can be rebuilt from the packs.

A row that is wrong cannot do harm: every read compares the frame it finds with the id it asked for. So a lost, old
or broken index is thrown away and filled again, and where the disk is full or read-only an index in memory takes its
place. Nothing here knows what a pack file is: `refill` is given by whoever opens the store.
"""

import contextlib
import functools
import os
import sqlite3
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

from llmos_cli.errors import Busy, Damaged, LlmosError
from llmos_cli.formats import limits
from llmos_cli.formats.codec import ADOPTED
from llmos_cli.formats.frame import HEADER_BYTES, MANIFEST
from llmos_cli.formats.ids import ID_BYTES, ObjectId
from llmos_cli.formats.pack import ALIGNMENT, ENTRY_SIZE, Entry
from llmos_cli.store.disk import durable
from llmos_cli.store.disk.forks import ForkLock
from llmos_cli.store.packs.ledger import Ledger

SCHEMA_VERSION: Final = 2
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
CREATE TABLE facts (kind TEXT, key BLOB, value BLOB NOT NULL, PRIMARY KEY (kind, key)) WITHOUT ROWID;
"""
_MALFORMED: Final = " OR ".join(
    [f"typeof({name}) != 'blob' OR length({name}) != {ID_BYTES}" for name in ("id", "base")]
    + [
        f"typeof({name}) != 'integer' OR {name} NOT BETWEEN 0 AND {limits.PACK_BYTES}"
        for name in ("offset", "payload", "plain", "kind", "codec", "depth")
    ]
)
_IN_PACK: Final = f"(payload + {HEADER_BYTES + ALIGNMENT - 1}) / {ALIGNMENT} * {ALIGNMENT} + {ENTRY_SIZE}"
_FEW: Final = 4000  # objects that are looked up one by one rather than sifted out of all
_BATCH: Final = 4096
_STORED: Final = f"{_IN_PACK} + (CASE codec WHEN {ADOPTED} THEN plain ELSE 0 END)"
_ROW = "o.id, o.base, o.offset, o.payload, o.plain, o.kind, o.codec, o.depth"
_COMPLETE: Final = 0x6C6C6D6F  # application_id of an index that has been filled once
_WAL_TRIES: Final = 1000
_CACHE_KIB: Final = 32 * 1024  # of pages, taken only as they are used: ids are spread all over the file
_MEMORY: Final = ":memory:"
_NO_FILE: Final = {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_PERM,
}

Copy = tuple[bytes, int, int, bytes | None]
"""A copy of an object: id, number of its pack, bytes it takes there, a delta's base."""
Double = tuple[bytes, int, int, int, int]
"""One of several copies of an object: id, kind, depth, bytes it takes, number of its pack."""

P = ParamSpec("P")
T = TypeVar("T")


class _Unusable(Exception):
    """The database cannot go on: it is broken, or (`keep`) its file cannot be written here."""

    def __init__(self, why: str, *, keep: bool) -> None:
        super().__init__(why)
        self.keep = keep


def _healing(method: "Callable[Concatenate[Index, P], T]") -> "Callable[Concatenate[Index, P], T]":
    """If the database turns out to be unusable, put a new one in its place and try again."""

    @functools.wraps(method)
    def call(self: "Index", /, *args: P.args, **kwargs: P.kwargs) -> T:
        with self._lock:
            self._reopen_after_fork()
            for _ in range(2):
                try:
                    return method(self, *args, **kwargs)
                except _Unusable as exc:
                    self._replace(exc)
            try:
                return method(self, *args, **kwargs)
            except _Unusable as exc:
                raise Damaged(
                    f"the index {self._path} is damaged: {exc}", hint="rebuild it: llmos fsck --reindex"
                ) from exc

    return call


@dataclass(frozen=True)
class Location:
    """Where an object lies: the pack's name and its index line."""

    pack: ObjectId
    entry: Entry


class Index:
    """Thread-safe: one connection behind one lock; a look-up takes microseconds. A forked child opens its own."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = ForkLock()
        self._pid = os.getpid()
        self._in_memory = False
        self.refill: Callable[[], object] = lambda: None
        with self._lock:
            try:
                self._connection = self._connect()
            except _Unusable as exc:
                self._start_anew(in_memory=exc.keep)

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def reset(self) -> None:
        """Throw the index away; the caller fills it again."""
        with self._lock:
            self._connection.close()
            self._start_anew(in_memory=self._in_memory)

    def rebuild(self) -> None:
        """It says what is not so: throw it away and fill it again."""
        with self._lock:
            self._replace(_Unusable("it contradicts the packs", keep=False))

    @property
    def is_complete(self) -> bool:
        """Whether it has been filled; one that lost a race with a crash has not."""
        return self._complete

    def mark_complete(self) -> None:
        if not self._complete:
            self._mark()

    @_healing
    def packs(self) -> dict[ObjectId, int]:
        """The indexed packs and their sizes in bytes."""
        with self._cursor() as cursor:
            return {_id(name): size for name, size in cursor.execute("SELECT name, size FROM packs")}

    def add_pack(self, name: ObjectId, size: int, entries: Sequence[Entry]) -> None:
        """Note a pack, in place of whatever was noted of it before."""
        self.add_packs([(name, size, entries)])

    @_healing
    def add_packs(self, packs: Iterable[tuple[ObjectId, int, Sequence[Entry]]]) -> None:
        """Note packs, all or none; in the order of ids, so that many touch each page of the database once."""
        rows: list[tuple[Entry, int]] = []
        with self._cursor(write=True) as cursor:
            for name, size, entries in packs:
                is_new = cursor.execute("INSERT OR IGNORE INTO packs (name, size) VALUES (?, ?)", (name, size)).rowcount
                row = cursor.execute("SELECT number FROM packs WHERE name = ?", (name,)).fetchone()
                if row is None:
                    raise _Unusable("a pack cannot be noted", keep=False)
                if not is_new:
                    cursor.execute("DELETE FROM objects WHERE pack = ?", row)
                rows += [(entry, row[0]) for entry in entries]
            rows.sort()
            cursor.executemany(
                "INSERT OR REPLACE INTO objects VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    (e.id, pack, e.base, e.offset, e.payload_size, e.plain_size, e.kind, e.codec, e.depth)
                    for e, pack in rows
                ),
            )

    @_healing
    def drop_pack(self, name: ObjectId) -> None:
        with self._cursor(write=True) as cursor:
            cursor.execute("DELETE FROM objects WHERE pack = (SELECT number FROM packs WHERE name = ?)", (name,))
            cursor.execute("DELETE FROM packs WHERE name = ?", (name,))

    @_healing
    def forget(self, oid: ObjectId, pack: ObjectId) -> None:
        """A copy turned out to be damaged: it does not count as stored, so that adding it again stores it anew."""
        query = "DELETE FROM objects WHERE id = ? AND pack = (SELECT number FROM packs WHERE name = ?)"
        with self._cursor(write=True) as cursor:
            cursor.execute(query, (oid, pack))

    @_healing
    def locate(self, oid: ObjectId) -> list[Location]:
        """Every place an object lies, oldest pack first."""
        query = f"SELECT p.name, {_ROW} FROM objects o JOIN packs p ON p.number = o.pack WHERE o.id = ? ORDER BY o.pack"
        with self._cursor() as cursor:
            return [Location(_id(row[0]), _entry(row[1:])) for row in cursor.execute(query, (oid,))]

    @_healing
    def packs_of(self, objects: Iterable[ObjectId]) -> dict[ObjectId, list[ObjectId]]:
        """The packs in which each of many objects lies, oldest first."""
        query = "SELECT p.name FROM objects o JOIN packs p ON p.number = o.pack WHERE o.id = ? ORDER BY o.pack"
        with self._cursor() as cursor:
            return {oid: [_id(name) for (name,) in cursor.execute(query, (oid,))] for oid in objects}

    @_healing
    def has(self, oid: ObjectId) -> bool:
        with self._cursor() as cursor:
            return cursor.execute("SELECT 1 FROM objects WHERE id = ? LIMIT 1", (oid,)).fetchone() is not None

    @_healing
    def entries(self, pack: ObjectId) -> list[Entry]:
        """The objects of a pack in file order."""
        query = f"SELECT {_ROW} FROM objects o WHERE o.pack = (SELECT number FROM packs WHERE name = ?) ORDER BY offset"
        with self._cursor() as cursor:
            return [_entry(row) for row in cursor.execute(query, (pack,))]

    @_healing
    def marks(self) -> dict[ObjectId, tuple[int, int]]:
        """The indexed packs: for each its size and what `mark_of` would give for its entries. One pass over all."""
        with self._cursor() as cursor:
            sums: dict[int, int] = {}
            for number, *row in cursor.execute(f"SELECT o.pack, {_ROW} FROM objects o"):
                sums[number] = sums.get(number, 0) + hash(tuple(row))
            rows = cursor.execute("SELECT number, name, size FROM packs")
            return {_id(name): (size, sums.get(number, 0)) for number, name, size in rows}

    @_healing
    def ledger(self) -> Ledger:
        """What every object takes in packs and adopted files, all its copies together, and what deltas rest on."""
        sums = f"SELECT id, MIN(plain), MIN(depth), SUM({_STORED}) FROM objects GROUP BY id ORDER BY id"
        rests = "SELECT id, base FROM objects WHERE depth > 0 ORDER BY id"
        ledger = Ledger(bytearray(), array("q"), array("q"), bytearray(), bytearray(), bytearray())
        with self._cursor() as cursor:
            cursor.execute(sums)
            while rows := cursor.fetchmany(_BATCH):
                ids, plain, depth, stored = zip(*rows, strict=True)
                ledger.ids.extend(_joined(ids))
                try:
                    ledger.plain.extend(plain)
                    ledger.stored.extend(stored)
                    ledger.is_delta.extend(map(bool, bytes(depth)))
                except (TypeError, ValueError, OverflowError) as exc:
                    raise _Unusable("a row has a value outside the declared limits", keep=False) from exc
            cursor.execute(rests)
            while rows := cursor.fetchmany(_BATCH):
                deltas, bases = zip(*rows, strict=True)
                ledger.deltas.extend(_joined(deltas))
                ledger.bases.extend(_joined(bases))
        return ledger

    @_healing
    def bases(self, objects: Set[bytes]) -> set[ObjectId]:
        """The bases that stored deltas among `objects` rest on, and theirs in turn."""
        found: set[ObjectId] = set()
        fresh: Set[bytes] = objects
        with self._cursor() as cursor:
            while fresh:  # copies of one object may rest on different bases
                if len(fresh) <= _FEW:
                    query = "SELECT base FROM objects WHERE id = ? AND depth > 0"
                    named = (row[0] for oid in fresh for row in cursor.execute(query, (oid,)))
                else:
                    rows = cursor.execute("SELECT id, base FROM objects WHERE depth > 0")
                    named = (base for oid, base in rows if oid in fresh)
                new = {_id(base) for base in named if base not in found}
                found |= new
                fresh = new
        return found

    @_healing
    def resting(self, bases: Set[bytes]) -> list[tuple[ObjectId, ObjectId, int]]:
        """The stored deltas that rest right on some of `bases`: delta, base, depth."""
        with self._cursor() as cursor:
            rows = cursor.execute("SELECT id, base, depth FROM objects WHERE depth > 0")
            return [(_id(oid), _id(base), depth) for oid, base, depth in rows if base in bases]

    @_healing
    def over_copies(self, work: "Callable[[dict[int, ObjectId], Iterable[Copy], Iterable[Double]], T]") -> T:
        """Give `work` the names of the packs by number, every copy of every object, and once more those of objects that
        have several, one object after the other; returns what it does. Others may write meanwhile: all three are as of
        one moment. It is done again if the index turns out to be broken."""
        with self._cursor(snapshot=True) as cursor:
            if cursor.execute(f"SELECT 1 FROM objects WHERE {_MALFORMED} LIMIT 1").fetchone():
                raise _Unusable("a row has a value outside the declared limits", keep=False)
            names = {number: _id(name) for number, name in cursor.execute("SELECT number, name FROM packs")}
            doubles = (
                f"SELECT id, kind, depth, {_IN_PACK}, pack FROM objects "
                "WHERE id IN (SELECT id FROM objects GROUP BY id HAVING count(*) > 1) ORDER BY id"
            )
            known = "+pack IN (SELECT number FROM packs)"  # +: not by the index on packs, which would jump about
            copies = f"SELECT id, pack, {_IN_PACK}, iif(depth, base, NULL) FROM objects WHERE {known}"
            return work(names, cursor.execute(copies), self._connection.execute(doubles))

    @_healing
    def starting_with(self, prefix: str) -> list[ObjectId]:
        """Ids of objects of any kind that start with a hex prefix, in order."""
        with self._cursor() as cursor:
            query = "SELECT DISTINCT id FROM objects WHERE id BETWEEN ? AND ? ORDER BY id"
            return [_id(row[0]) for row in cursor.execute(query, _range(prefix))]

    @_healing
    def adopted(self) -> set[tuple[ObjectId, ObjectId]]:
        """The adopted files that chunks lie in, each with a pack that says so."""
        query = "SELECT DISTINCT o.base, p.name FROM objects o JOIN packs p ON o.pack = p.number WHERE o.codec = ?"
        with self._cursor() as cursor:
            return {(_id(file), _id(pack)) for file, pack in cursor.execute(query, (ADOPTED,))}

    @_healing
    def manifests(self, prefix: str = "") -> list[ObjectId]:
        """Ids of manifests that start with a hex prefix, in order."""
        query = "SELECT DISTINCT id FROM objects WHERE kind = ? AND id BETWEEN ? AND ? ORDER BY id"
        with self._cursor() as cursor:
            return [_id(row[0]) for row in cursor.execute(query, (MANIFEST, *_range(prefix)))]

    @_healing
    def unread_manifests(self) -> list[ObjectId]:
        """Manifests whose recipe is not in the index yet."""
        query = "SELECT DISTINCT id FROM objects WHERE kind = ? AND id NOT IN (SELECT manifest FROM recipes)"
        with self._cursor() as cursor:
            return [_id(row[0]) for row in cursor.execute(query, (MANIFEST,))]

    @_healing
    def add_recipes(self, rows: Iterable[tuple[ObjectId, ObjectId | None]]) -> None:
        with self._cursor(write=True) as cursor:
            cursor.executemany("INSERT OR REPLACE INTO recipes VALUES (?, ?)", rows)

    @_healing
    def made_by(self, recipe: ObjectId) -> list[ObjectId]:
        with self._cursor() as cursor:
            rows = cursor.execute("SELECT manifest FROM recipes WHERE recipe = ? ORDER BY manifest", (recipe,))
            return [_id(row[0]) for row in rows]

    @_healing
    def facts(self, kind: str, keys: Iterable[bytes]) -> dict[bytes, bytes]:
        """What was noted under `kind` for these keys: derived values that save work, and can be derived again."""
        with self._cursor() as cursor:
            found = {}
            for key in keys:
                row = cursor.execute("SELECT value FROM facts WHERE kind = ? AND key = ?", (kind, key)).fetchone()
                if row is not None and isinstance(row[0], bytes):
                    found[key] = row[0]
            return found

    @_healing
    def add_facts(self, kind: str, rows: Iterable[tuple[bytes, bytes]]) -> None:
        """Note values under keys, in place of what was there."""
        with self._cursor(write=True) as cursor:
            cursor.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?, ?)", [(kind, *row) for row in rows])

    @_healing
    def _mark(self) -> None:
        with self._cursor(write=True) as cursor:
            cursor.execute(f"PRAGMA application_id={_COMPLETE}")
        self._complete = True

    def _connect(self) -> sqlite3.Connection:
        if not self._in_memory:
            with contextlib.suppress(LlmosError):  # SQLite says it better
                durable.ensure_file(self._path)
        try:
            connection = sqlite3.connect(
                _MEMORY if self._in_memory else self._path, timeout=60, isolation_level=None, check_same_thread=False
            )
        except sqlite3.Error as exc:
            raise self._error(exc) from exc
        try:
            _use_wal(connection)
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute(f"PRAGMA cache_size=-{_CACHE_KIB}")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version == 0:
                connection.execute("BEGIN IMMEDIATE")
                (version,) = connection.execute("PRAGMA user_version").fetchone()
                if version == 0:  # nobody else was faster
                    for statement in _SCHEMA.split(";"):
                        connection.execute(statement)
                    connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
                connection.execute("COMMIT")
            elif version != SCHEMA_VERSION:
                raise _Unusable(f"version {version} is unknown", keep=False)
            connection.execute("SELECT name FROM packs LIMIT 1").fetchone()
            self._complete = connection.execute("PRAGMA application_id").fetchone() == (_COMPLETE,)
        except (sqlite3.Error, UnicodeDecodeError) as exc:  # a broken schema makes messages that are no text
            connection.close()
            raise self._error(exc) from exc
        except BaseException:
            connection.close()
            raise
        return connection

    def _start_anew(self, *, in_memory: bool) -> None:
        """Connect to an empty database: a new file, or memory where the file cannot be replaced."""
        self._in_memory = in_memory
        if not in_memory:
            try:
                for suffix in ("", "-wal", "-shm"):
                    durable.remove(self._path.with_name(self._path.name + suffix))
                self._connection = self._connect()
                return
            except (LlmosError, _Unusable):
                self._in_memory = True
        self._connection = self._connect()

    def _replace(self, why: _Unusable) -> None:
        with contextlib.suppress(sqlite3.Error):
            self._connection.close()
        self._start_anew(in_memory=why.keep or self._in_memory)
        self.refill()

    def _reopen_after_fork(self) -> None:
        """SQLite's connections must not cross a fork; the parent's is left alone, not even closed."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._parents_connection = self._connection
            if not self._in_memory:
                self._connection = self._connect()

    @contextlib.contextmanager
    def _cursor(self, *, write: bool = False, snapshot: bool = False) -> Iterator[sqlite3.Cursor]:
        try:
            if not (write or snapshot):
                yield self._connection.cursor()
                return
            self._connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            try:
                yield self._connection.cursor()
                self._connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")
                raise
        except (sqlite3.Error, UnicodeDecodeError) as exc:
            raise self._error(exc) from exc

    def _error(self, exc: Exception) -> Exception:
        if isinstance(exc, sqlite3.ProgrammingError):
            return exc  # a bug of ours
        code = getattr(exc, "sqlite_errorcode", -1) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return Busy(f"the index {self._path} is locked by another process", hint="run the command again")
        return _Unusable(str(exc), keep=code in _NO_FILE)


def mark_of(entries: Iterable[Entry]) -> int:
    """A number that entries in any order have in common with no others; it holds in this process only."""
    return sum(map(hash, entries))


def _use_wal(connection: sqlite3.Connection) -> None:
    """SQLite does not wait by itself when several processes switch a new database to its write-ahead log at once."""
    for _ in range(_WAL_TRIES):
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as exc:
            if getattr(exc, "sqlite_errorcode", -1) & 0xFF != sqlite3.SQLITE_BUSY:
                raise
            time.sleep(0.01)
    connection.execute("PRAGMA journal_mode=WAL")


def _entry(row: Sequence[Any]) -> Entry:
    """A row as an index line; a value that cannot be means that the database is broken."""
    try:
        entry = Entry(_id(row[0]), _id(row[1]), *row[2:])
    except TypeError as exc:
        raise _Unusable(str(exc), keep=False) from exc
    numbers = (entry.offset, entry.payload_size, entry.plain_size, entry.kind, entry.codec, entry.depth)
    if not all(type(number) is int and 0 <= number <= limits.PACK_BYTES for number in numbers):
        raise _Unusable("a row has a value outside the declared limits", keep=False)
    return entry


def _range(prefix: str) -> tuple[bytes, bytes]:
    """The first and the last id that start with a hex prefix."""
    return bytes.fromhex(prefix.ljust(2 * ID_BYTES, "0")), bytes.fromhex(prefix.ljust(2 * ID_BYTES, "f"))


def _joined(ids: Sequence[object]) -> bytes:
    if any(type(value) is not bytes or len(value) != ID_BYTES for value in ids):
        raise _Unusable("a row has a malformed id", keep=False)
    return b"".join(ids)  # type: ignore[arg-type]


def _id(value: object) -> ObjectId:
    if not isinstance(value, bytes) or len(value) != ID_BYTES:
        raise _Unusable("a row has a malformed id", keep=False)
    return ObjectId(value)
