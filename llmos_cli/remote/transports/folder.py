"""A folder as a remote: a disk, a mounted file system, another store. All changes go through the durable writer.

The folder has the layout of a store, so `llmos --store FOLDER fsck` and `gc` work on it. A link, pipe or device in a
file's place is refused: whoever else can write there must not make us read something else, or hang.
"""

import errno
import os
import stat
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

from llmos_cli.errors import AccessDenied, Damaged, LlmosError, NoSpace, NotFound, RemoteUnavailable, from_os_error
from llmos_cli.formats import limits
from llmos_cli.formats.ids import IdHasher, ObjectId
from llmos_cli.formats.layout import FORMAT_FILE, FORMAT_TEXT, TRASH
from llmos_cli.progress import Silent, Task
from llmos_cli.remote.transports.transport import Dated, check_key, check_prefix
from llmos_cli.store.disk import durable
from llmos_cli.store.local import FOLDERS

_TRIES: Final = 5
_BLOCK_BYTES: Final = 4 * limits.MiB
_LEFTOVER_SECONDS: Final = 86400.0  # a temporary file nobody has written to for a day belongs to a dead process
_AWAY: Final = {
    errno.ESTALE,
    errno.ENOTCONN,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENODEV,
    errno.ENXIO,
    errno.EREMOTEIO,
}


class FolderTransport:
    """Bytes under keys, as files below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._sending = threading.Lock()

    @property
    def url(self) -> str:
        return str(self.root)

    def initialise(self) -> None:
        """Only the last folder is made: a missing parent is more likely a disk that is not mounted."""
        with self._reporting("preparing it"):
            if not self.root.parent.is_dir():
                raise RemoteUnavailable(
                    f"the folder {self.root.parent} is not there", hint="mount what belongs there, or make the folder"
                )
            durable.make_folder(self.root, mode=0o777)  # as open as the umask lets it: others may be meant to use it
            for folder in FOLDERS:
                durable.make_folder(self.root / folder)
            self._sweep()
        self.create(FORMAT_FILE, FORMAT_TEXT)

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        return ((item.key, item.size) for item in self.dated(prefix))

    def dated(self, prefix: str) -> Iterator[Dated]:
        return self._walk(self.root / check_prefix(prefix), prefix)

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        with self._reporting(f"reading {key}", key):
            fd = os.open(self._path(key), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                status = os.fstat(fd)
                if not stat.S_ISREG(status.st_mode):
                    raise Damaged(f"{self._path(key)} is not a regular file")
                stop = status.st_size if end is None else min(end, status.st_size)
                return _pread(fd, start, stop)
            finally:
                os.close(fd)

    def size(self, key: str) -> int | None:
        with self._reporting(f"looking at {key}"):
            try:
                return os.stat(self._path(key), follow_symlinks=False).st_size
            except (FileNotFoundError, NotADirectoryError):
                return None

    def put_file(self, key: str, path: Path, name: ObjectId, task: Task) -> None:
        """One value at a time, hashed beside being written: a kill then costs one value at most."""
        target = self._path(key)
        with self._sending, open(path, "rb", buffering=0) as source, self._reporting(f"writing {key}"):
            self._make_parent(target)
            temp = durable.temp_path(target.parent)
            with durable.new_file(temp) as file:
                if _copy(source, path, file, task) != name:
                    raise Damaged(
                        f"{path} does not have the bytes its name stands for", hint="see what it affects: llmos fsck"
                    )
            try:
                durable.publish(temp, target, mode=0o444)
            except BaseException:
                durable.remove(temp)
                raise

    def create(self, key: str, data: bytes) -> bool:
        with self._reporting(f"creating {key}"):
            for _ in range(_TRIES):
                with suppress(NotFound):  # somebody removed the folder at this moment (a ref was deleted)
                    return self._create(self._path(key), data)
            return self._create(self._path(key), data)

    def delete(self, key: str) -> None:
        with self._reporting(f"removing {key}"):
            durable.remove(self._path(key))
            self._tidy(key)

    def set_aside(self, key: str, to: str) -> None:
        source, target = self._path(key), self._path(to)
        with self._reporting(f"moving {key}", key):
            os.stat(source, follow_symlinks=False)
            self._make_parent(target)
            try:
                durable.touch(source)
            except AccessDenied:  # somebody else's: its time is theirs to set, and begins anew in a copy
                self._copy_aside(source, target)
            else:
                if not durable.move(source, target):
                    raise NotFound(f"{key} is not at {self.url}")
            self._tidy(key)

    def bring_back(self, key: str, to: str) -> None:
        self.set_aside(key, to)

    def _copy_aside(self, source: Path, target: Path) -> None:
        temp = durable.temp_path(target.parent)
        with (
            open(source, "rb", buffering=0) as file,
            durable.new_file(temp) as copy,
            Silent().task("copying") as task,
        ):
            _copy(file, source, copy, task)
        durable.publish(temp, target, mode=0o444)
        durable.remove(source)

    def _tidy(self, key: str) -> None:
        """The folder of one gc in the trash goes with the last thing in it."""
        folder = self._path(key).parent
        if folder.parent == self.root / TRASH:
            durable.remove_empty_folder(folder)

    def _create(self, target: Path, data: bytes) -> bool:
        self._make_parent(target)
        temp = durable.temp_path(target.parent)
        with durable.new_file(temp) as file:
            durable.write_all(file, data)
        return durable.publish_new(temp, target)

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def _make_parent(self, target: Path) -> None:
        """A root that has gone away must not be made anew on the disk below its mount point."""
        if not self.root.is_dir():
            raise RemoteUnavailable(
                f"the remote {self.url} has gone away", hint="run the command again when it is back"
            )
        durable.make_folder(target.parent)

    def _walk(self, folder: Path, prefix: str) -> Iterator[Dated]:
        with self._reporting(f"listing {prefix or 'it'}"):
            try:
                with os.scandir(folder) as listing:
                    children = sorted(listing, key=lambda child: child.name)
            except (FileNotFoundError, NotADirectoryError):
                return
        for child in children:
            if child.name.startswith(durable.TEMP_PREFIX):
                continue
            if child.is_dir(follow_symlinks=False):
                yield from self._walk(folder / child.name, f"{prefix}{child.name}/")
                continue
            with self._reporting(f"listing {prefix or 'it'}"):
                try:
                    status = child.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
            yield Dated(f"{prefix}{child.name}", status.st_size, status.st_mtime)

    def _sweep(self) -> None:
        """Remove what pushes that were killed left behind."""
        for path in [*self.root.glob(f"{durable.TEMP_PREFIX}*"), *self.root.glob(f"packs/*/{durable.TEMP_PREFIX}*")]:
            with suppress(FileNotFoundError, AccessDenied):  # somebody else's, where each may remove their own
                if time.time() - path.lstat().st_mtime > _LEFTOVER_SECONDS:
                    durable.remove(path)

    @contextmanager
    def _reporting(self, what: str, key: str | None = None) -> Iterator[None]:
        """Turn errors into ones that name this remote; with `key`, an absent file is that key's absence."""
        try:
            yield
        except NoSpace as exc:
            raise self._no_space(what) from exc
        except (FileExistsError, LlmosError):
            raise
        except OSError as exc:
            if key is not None and exc.errno in (errno.ENOENT, errno.ENOTDIR):
                raise NotFound(f"{key} is not at {self.url}") from exc
            if exc.errno == errno.ELOOP:
                raise Damaged(f"a symbolic link is in the way while {what} at {self.url}") from exc
            if exc.errno in _AWAY:
                reason = exc.strerror or str(exc)
                raise RemoteUnavailable(f"{self.url} cannot be reached while {what}: {reason}") from exc
            error = from_os_error(exc, f"{what} at {self.url}")
            raise (self._no_space(what) if isinstance(error, NoSpace) else error) from exc

    def _no_space(self, what: str) -> NoSpace:
        return NoSpace(
            f"no space left at {self.url} while {what}",
            hint="free some space there and run the command again: it goes on with what has arrived",
        )


def _copy(source: BinaryIO, path: Path, target: BinaryIO, task: Task) -> ObjectId:
    """Write one file to another; returns the id of the bytes that were written. They start for the disk at once."""
    hasher, done = IdHasher(), 0
    buffers = [memoryview(bytearray(_BLOCK_BYTES)) for _ in range(2)]  # one is hashed while the next is read
    hashing: Future[None] | None = None
    with ThreadPoolExecutor(1, "hash") as helper:
        while count := _read_into(source, buffers[0], path):
            block = buffers[0][:count]
            if hashing:
                hashing.result()
            hashing = helper.submit(hasher.update, block)
            durable.write_all(target, block)
            durable.hasten(target.fileno(), done, count)
            done += count
            task.advance(count)
            buffers.reverse()
    return hasher.id()


def _read_into(source: BinaryIO, buffer: memoryview, path: Path) -> int:
    try:
        return int(source.readinto(buffer))  # type: ignore[attr-defined]
    except OSError as exc:
        raise from_os_error(exc, f"reading {path}") from exc


def _pread(fd: int, start: int, stop: int) -> bytes:
    data = os.pread(fd, max(0, stop - start), start)
    while len(data) < stop - start:
        more = os.pread(fd, stop - start - len(data), start + len(data))
        if not more:
            break
        data += more
    return data
