"""HDFS as a remote, through hdfs-native (no Java). Not yet verified against a cluster: see the contract suite.

A value is written under another name, closed, and renamed: the name node does that in one step, and without
`overwrite` it refuses where the name is taken, which is how a move is created. Addresses of name nodes, Kerberos and
encryption on the wire come from the Hadoop settings that hdfs-native finds ($HADOOP_CONF_DIR, $HADOOP_HOME).
"""

import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from llmos_cli.errors import AccessDenied, Damaged, LlmosError, NoSpace, NotFound, RemoteUnavailable, from_os_error
from llmos_cli.formats import limits
from llmos_cli.formats.ids import IdHasher, ObjectId
from llmos_cli.formats.layout import FORMAT_FILE, FORMAT_TEXT
from llmos_cli.progress import Task
from llmos_cli.remote.transports.transport import Dated, SlowToAsk, check_key, check_prefix

if TYPE_CHECKING:
    from hdfs_native import Client

_TEMP: Final = ".tmp-"
_BOUNDS: Final = {  # by itself it goes on for minutes
    "dfs.client.failover.max.attempts": "8",
    "dfs.client.failover.sleep.base.millis": "200",
    "dfs.client.failover.sleep.max.millis": "5000",
    "dfs.client.socket-timeout": "30000",
}
_BLOCK_BYTES: Final = 4 * limits.MiB
_FULL: Final = ("QuotaExceeded", "could only be written to 0 of")
_REFUSED: Final = ("AccessControlException", "Permission denied", "SASL", "Kerberos", "GSSAPI")
_TAKEN: Final = ("FileAlreadyExists", "already exists", "AlreadyExists")


class HdfsTransport(SlowToAsk):
    """Bytes under keys, as files below a folder. `server` is "hdfs://HOST:PORT", `root` an absolute path."""

    def __init__(self, server: str, root: str) -> None:
        self._server = server
        self._root = root
        self._sending = threading.Lock()

    @property
    def url(self) -> str:
        return f"{self._server}{self._root}"

    def initialise(self) -> None:
        with self._reporting("preparing it"):
            self._client.mkdirs(self._root or "/", create_parent=True)
        self.create(FORMAT_FILE, FORMAT_TEXT)

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        return ((item.key, item.size) for item in self.dated(prefix))

    def dated(self, prefix: str) -> Iterator[Dated]:
        folder = f"{self._root}/{check_prefix(prefix)}".rstrip("/") or "/"
        return self._walk(folder)

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        with self._reporting(f"reading {key}", key):
            reader = self._client.read(self._path(key))
            stop = reader.size if end is None else min(end, reader.size)
            return bytes(reader.read_range(start, stop - start)) if stop > start else b""

    def size(self, key: str) -> int | None:
        path = self._path(key)
        with self._reporting(f"looking at {key}"):
            try:
                status = self._client.get_file_info(path)
            except FileNotFoundError:
                return None
            except Exception as exc:
                if "is not a directory" in str(exc):  # part of the key is a file
                    return None
                raise
            return None if status.isdir else status.length

    def put_file(self, key: str, path: Path, name: ObjectId, task: Task) -> None:
        """One value at a time: a kill then costs one value at most."""
        target = self._path(key)
        with (
            self._sending,
            open(path, "rb", buffering=0) as source,
            self._reporting(f"writing {key}"),
            self._written(target) as (temp, writer),
        ):
            hasher = IdHasher()
            while block := _read(source, path):
                hasher.update(block)
                writer.write(block)
                task.advance(len(block))
            if hasher.id() != name:
                raise Damaged(
                    f"{path} does not have the bytes its name stands for", hint="see what it affects: llmos fsck"
                )
            _close(writer)
            self._client.rename(temp, target, overwrite=True)

    def create(self, key: str, data: bytes) -> bool:
        target = self._path(key)
        with self._reporting(f"creating {key}"), self._written(target) as (temp, writer):
            writer.write(data)
            _close(writer)
            try:
                self._client.rename(temp, target, overwrite=False)
            except Exception as exc:
                if not self._exists(temp):  # an answer was lost: it is our value that got the name
                    return True
                if isinstance(exc, FileExistsError) or any(word in str(exc) for word in _TAKEN):
                    return False
                raise
            return True

    def delete(self, key: str) -> None:
        path = self._path(key)
        with self._reporting(f"removing {key}"), suppress(FileNotFoundError):
            self._client.delete(path)

    def set_aside(self, key: str, to: str) -> None:
        source, target = self._path(key), self._path(to)
        now = round(time.time() * 1000)
        with self._reporting(f"moving {key}", key):
            self._client.mkdirs(target.rpartition("/")[0], create_parent=True)
            self._client.set_times(source, now, now)
            self._client.rename(source, target, overwrite=True)

    def bring_back(self, key: str, to: str) -> None:
        self.set_aside(key, to)

    @cached_property
    def _client(self) -> "Client":
        if find_spec("hdfs_native") is None:
            raise LlmosError("HDFS needs the hdfs-native library", hint="pip install 'llmos[hdfs]'")
        from hdfs_native import Client

        return Client(self._server, config=_BOUNDS)

    @contextmanager
    def _written(self, target: str) -> Iterator[tuple[str, Any]]:
        """A file beside `target` to be written, and gone in the end unless it was renamed."""
        from hdfs_native import WriteOptions

        folder = target.rpartition("/")[0]
        temp = f"{folder}/{_TEMP}{secrets.token_hex(8)}"
        writer = self._client.create(temp, WriteOptions(create_parent=True, overwrite=False))
        try:
            yield temp, writer
        finally:
            with suppress(Exception):
                self._client.delete(temp)

    def _exists(self, path: str) -> bool:
        try:
            self._client.get_file_info(path)
        except FileNotFoundError:
            return False
        return True

    def _walk(self, folder: str) -> Iterator[Dated]:
        with self._reporting("listing it"):
            try:
                found = list(self._client.list_status(folder, recursive=True))
            except FileNotFoundError:
                return
        for status in found:
            path = status.path if status.path.startswith("/") else f"{folder}/{status.path}"
            if not status.isdir and not path.rpartition("/")[2].startswith(_TEMP):
                yield Dated(path.removeprefix(f"{self._root}/"), status.length, status.modification_time / 1000)

    def _path(self, key: str) -> str:
        return f"{self._root}/{check_key(key)}"

    @contextmanager
    def _reporting(self, what: str, key: str | None = None) -> Iterator[None]:
        """Turn what hdfs-native raises (errors of the system, and RuntimeError with the name node's words)."""
        try:
            yield
        except LlmosError:
            raise
        except Exception as exc:
            text = str(exc)
            if isinstance(exc, FileNotFoundError) and key is not None:
                raise NotFound(f"{key} is not at {self.url}") from exc
            if any(word in text for word in _FULL):
                raise NoSpace(f"no space left at {self.url} while {what}", hint="free some space there") from exc
            if isinstance(exc, PermissionError) or any(word in text for word in _REFUSED):
                raise AccessDenied(f"{self.url} refused {what}", hint="check your rights there, or run kinit") from exc
            why = "it is in safe mode" if "SafeMode" in text else type(exc).__name__
            raise RemoteUnavailable(
                f"{self.url} cannot be reached while {what}: {why}",
                hint="check the address, then run the command again: it goes on with what has arrived",
            ) from exc


def _read(source: Any, path: Path) -> bytes:
    try:
        return os.read(source.fileno(), _BLOCK_BYTES)
    except OSError as exc:
        raise from_os_error(exc, f"reading {path}") from exc


def _close(writer: Any) -> None:
    """On the disks of the data nodes, not only in their memory; erasure-coded files cannot be asked for that."""
    with suppress(Exception):
        writer.hsync()
    writer.close()
