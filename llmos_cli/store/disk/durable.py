"""The one owner of everything that makes a change on disk permanent: fsync, rename, link, unlink, create.

Every function is one durable step: when it returns, the step survives a crash; when it raises, nothing is visible.
It knows nothing of packs, refs or objects. An fsync that fails is never retried on the same file: the kernel has
already marked the lost pages clean (ATC'20, "Can Applications Recover from fsync Failures?").
"""

import contextlib
import errno
import fcntl
import os
import stat
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from llmos_cli.errors import LlmosError, Unsafe, from_os_error
from llmos_cli.formats import limits
from llmos_cli.formats.ids import Buffer
from llmos_cli.formats.names import check_path
from llmos_cli.store.disk.forks import ForkLock

TEMP_PREFIX: Final = ".tmp-"
LINK_SUFFIX: Final = ".link"  # of a temporary name for somebody else's file
_TRIES: Final = 20
_OPEN_FOLDERS: Final = 2 * limits.PATH_DEPTH
_FICLONE: Final = 0x40049409  # <linux/fs.h>: share another file's blocks, copy-on-write
_REAL_TROUBLE: Final = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)  # not just "cannot be done here"

_making_folders = ForkLock()  # or a thread would take after a folder that another has not opened yet


def fresh_name() -> str:
    """32 hex digits that nobody else will choose. As `uuid` makes them, which takes milliseconds to import."""
    return os.urandom(16).hex()


def temp_path(folder: Path) -> Path:
    """A fresh name in `folder`, unique across processes and hosts."""
    return folder / f"{TEMP_PREFIX}{fresh_name()}"


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Create `path` (it must not exist), hand it out for writing, make its bytes durable; on any error remove it."""
    with _reporting(f"writing {path}"):
        created = False
        try:
            with open(path, "xb", buffering=0, opener=_open_new) as file:
                created = True
                yield file
                os.fsync(file.fileno())
        except BaseException:
            if created:
                with contextlib.suppress(OSError):
                    os.unlink(path)
            raise


def write_all(file: BinaryIO, *parts: Buffer) -> None:
    """Write buffers one after the other with few system calls; loops over short writes."""
    waiting = [memoryview(part).cast("B") for part in parts if len(part)]
    with _reporting(f"writing {file.name}"):
        while waiting:
            written = os.writev(file.fileno(), waiting[:64])
            while waiting and written >= len(waiting[0]):
                written -= len(waiting.pop(0))
            if written:
                waiting[0] = waiting[0][written:]


def publish(temp: Path, target: Path, *, mode: int | None = None) -> None:
    """Give a durable temporary file its final name (replacing what is there) and make the name durable."""
    with _reporting(f"publishing {target}"):
        if mode is not None:
            os.chmod(temp, mode)
        os.replace(temp, target)
        _sync_folder(target.parent)


def publish_new(temp: Path, target: Path) -> bool:
    """Give a durable temporary file its final name only if nobody has it: exactly one of many racers gets True.

    link(2) is the one exclusive create that also holds on NFS; the temporary name goes away in every case.
    """
    with _reporting(f"publishing {target}"):
        try:
            won = _link(temp, target)
            if won:
                try:
                    _sync_folder(target.parent)
                except BaseException:  # what may not survive must not be built upon
                    with contextlib.suppress(OSError):
                        os.unlink(target)
                    raise
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temp)
        return won


def clone_file(source: int, temp: Path) -> str | None:
    """Make `temp` a new file with the bytes of an open one, sharing its blocks until either changes. Returns why that
    cannot be done, None if it is."""
    with _reporting(f"writing {temp}"):
        fd = os.open(temp, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        done = False
        try:
            fcntl.ioctl(fd, _FICLONE, source)
            done = True
        except OSError as exc:
            if exc.errno in _REAL_TROUBLE:
                raise
            return _refusal(exc)
        finally:
            os.close(fd)
            if not done:
                with contextlib.suppress(OSError):
                    os.unlink(temp)
    return None


def link_file(source: Path, temp: Path) -> str | None:
    """Give a file the further name `temp`. Returns why that cannot be done, None if it is."""
    with _reporting(f"linking {source}"):
        try:
            os.link(source, temp)
        except OSError as exc:
            if exc.errno in (*_REAL_TROUBLE, errno.ENOENT):
                raise
            return _refusal(exc)
    return None


def seal(path: Path, mode: int | None) -> None:
    """Make the bytes of a file that others have written durable, and its mode if one is given."""
    with _reporting(f"writing {path}"):
        if mode is not None:
            os.chmod(path, mode)
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def publish_shared(temp: Path, target: Path) -> None:
    """Like `publish`, for a name that may be one more of the very file that is at `target` already: rename(2) then
    leaves both."""
    publish(temp, target)
    remove(temp)


def set_mode(path: Path, mode: int) -> None:
    """Change who may do what with a file."""
    with _reporting(f"changing the mode of {path}"):
        os.chmod(path, mode)


def write_file(path: Path, data: Buffer, *, mode: int | None = None) -> None:
    """Replace `path` by `data` as a whole."""
    temp = temp_path(path.parent)
    with new_file(temp) as file:
        write_all(file, data)
    try:
        publish(temp, path, mode=mode)
    except BaseException:
        remove(temp)
        raise


def ensure_file(path: Path) -> None:
    """Make an empty file unless there is one: for whoever would make it open to everybody."""
    with _reporting(f"creating {path}"), contextlib.suppress(FileExistsError):
        os.close(_open_new(str(path), 0))


def write_volatile(path: Path, data: Buffer) -> None:
    """Replace `path` as a whole, but let a power loss forget it: for leases, which no reboot outlives."""
    temp = temp_path(path.parent)
    with _reporting(f"writing {path}"):
        try:
            with open(temp, "xb", opener=_open_new) as file:
                file.write(data)
            os.replace(temp, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temp)
            raise


def make_folder(path: Path, *, mode: int | None = None) -> None:
    """Create a folder and its parents; each new name is durable.

    New folders are as open as the one they stand in, so that a private store stays private all through and a shared
    remote shared; with `mode`, they have that, less what the umask takes.
    """
    with _reporting(f"creating {path}"):
        for attempt in range(_TRIES):
            try:
                with _making_folders:
                    _make_missing(path, mode)
                return
            except FileNotFoundError:  # somebody removed an empty parent meanwhile
                if attempt == _TRIES - 1:
                    raise


def move(source: Path, target: Path) -> bool:
    """Rename a file or folder durably; False if the source is gone (somebody else moved it first)."""
    with _reporting(f"moving {source}"):
        for attempt in range(_TRIES):
            try:
                os.rename(source, target)
                break
            except FileNotFoundError:
                if not source.exists():
                    return False
                if attempt == _TRIES - 1:  # not just back again from where somebody else had moved it
                    raise
        _sync_folder(target.parent)
        _sync_nearest(source.parent)
        return True


def remove(path: Path) -> bool:
    """Unlink a file; False if it was gone already."""
    with _reporting(f"removing {path}"):
        try:
            os.unlink(path)
        except FileNotFoundError:
            return False
        return True


def remove_empty_folder(path: Path) -> None:
    """Remove a folder if nothing is in it."""
    with contextlib.suppress(OSError):
        os.rmdir(path)


def remove_tree(path: Path) -> None:
    """Unlink a folder and all below it; never follows a symbolic link."""
    with _reporting(f"removing {path}"):
        for folder, subfolders, files in os.walk(path, topdown=False):
            for name in files:
                os.unlink(os.path.join(folder, name))
            for name in subfolders:
                child = os.path.join(folder, name)
                if os.path.islink(child):
                    os.unlink(child)
                else:
                    os.rmdir(child)
        os.rmdir(path)


def touch(path: Path) -> None:
    """Set a file's time to now: somebody needs it."""
    with _reporting(f"touching {path}"), contextlib.suppress(FileNotFoundError):
        os.utime(path)


def flush(fd: int) -> None:
    """Start getting a file's bytes to the disk before it is complete, so that the last fsync has little left to do."""
    with _reporting("flushing a file"):
        os.fdatasync(fd)


def hasten(fd: int, start: int, size: int) -> None:
    """The same without waiting, for a run of bytes: only an advice, after which Linux begins to write them."""
    with contextlib.suppress(OSError, AttributeError):  # not every system takes it
        os.posix_fadvise(fd, start, size, os.POSIX_FADV_DONTNEED)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    with _reporting(f"syncing {path}"):
        _sync_folder(path)


class Destination:
    """A folder to write files into and never outside of: every step down is opened without following links.

    Keeps a bounded number of folders open, so that a tree of any size can be written. Used by one thread.
    """

    def __init__(self, root: Path) -> None:
        make_folder(root, mode=0o777)
        self.root = root
        self._folders: OrderedDict[str, int] = OrderedDict()
        with _reporting(f"opening {root}"):
            self._root_fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def __enter__(self) -> "Destination":
        return self

    def __exit__(self, *_: object) -> None:
        for fd in (self._root_fd, *self._folders.values()):
            os.close(fd)
        self._folders.clear()

    def kind(self, path: str) -> str | None:
        """What is at a relative path: None, "file", or "other" (a folder, a link, a device)."""
        with _reporting(f"looking at {self.root / path}"):
            try:
                folder, name = self._open_parent(path, create=False)
                mode = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
            except FileNotFoundError:
                return None
            return "file" if stat.S_ISREG(mode) else "other"

    @contextlib.contextmanager
    def replace(self, path: str) -> Iterator[int]:
        """Hand out a descriptor for new bytes; when they are complete and durable, `path` changes to them."""
        with _reporting(f"writing {self.root / path}"):
            folder, name = self._open_parent(path, create=True)
            temp = f"{TEMP_PREFIX}{fresh_name()}"
            fd = os.open(temp, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644, dir_fd=folder)
            try:
                try:
                    yield fd
                    os.fsync(fd)
                finally:
                    os.close(fd)
                os.rename(temp, name, src_dir_fd=folder, dst_dir_fd=folder)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temp, dir_fd=folder)
                raise

    def sync(self) -> None:
        """Make the names in every folder that was written to durable."""
        with _reporting(f"syncing {self.root}"):
            for fd in (*self._folders.values(), self._root_fd):
                _sync_folder_fd(fd)

    def _open_parent(self, path: str, *, create: bool) -> tuple[int, str]:
        *parts, name = check_path(path).split("/")
        at, parent = "", self._root_fd
        for part in parts:
            at = f"{at}/{part}" if at else part
            parent = self._open_child(parent, part, at, create=create)
        while len(self._folders) > _OPEN_FOLDERS:  # deeper than any path: the one in use stays open
            _, fd = self._folders.popitem(last=False)
            try:
                _sync_folder_fd(fd)
            finally:
                os.close(fd)
        return parent, name

    def _open_child(self, parent: int, part: str, at: str, *, create: bool) -> int:
        if at in self._folders:
            self._folders.move_to_end(at)
            return self._folders[at]
        if create:
            with contextlib.suppress(FileExistsError):
                os.mkdir(part, dir_fd=parent)
        try:
            fd = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        except OSError as exc:
            if exc.errno in (errno.ELOOP, errno.ENOTDIR):
                raise Unsafe(f"{self.root / at} is not a folder: refusing to write through it") from exc
            raise
        self._folders[at] = fd
        return fd


def _make_missing(path: Path, mode: int | None) -> None:
    if path.is_dir():
        return
    _make_missing(path.parent, mode)
    try:
        if mode is None:
            inherited = stat.S_IMODE(os.stat(path.parent).st_mode)
            os.mkdir(path, inherited)
            if stat.S_IMODE(os.stat(path).st_mode) != inherited:
                os.chmod(path, inherited)
        else:
            os.mkdir(path, mode)
    except FileExistsError:
        if not path.is_dir() and os.path.lexists(path):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from None
    _sync_folder(path.parent)


def _open_new(path: str, flags: int) -> int:
    """Readable for those who may look into its folder, as far as the umask lets them."""
    mode = 0o666 & os.stat(os.path.dirname(path) or ".").st_mode
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)


def _refusal(exc: OSError) -> str:
    if exc.errno == errno.EXDEV:
        return "it is on another file system"
    if exc.errno in (errno.EPERM, errno.EACCES):
        return "the system does not allow it"
    if exc.errno == errno.EMLINK:
        return "it has as many names as a file can have"
    return "the file system cannot"


def _link(temp: Path, target: Path) -> bool:
    try:
        os.link(temp, target)
    except FileExistsError:
        return False
    except OSError as exc:
        if exc.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        return _create_exclusively(temp, target)
    return True


def _create_exclusively(temp: Path, target: Path) -> bool:
    """For file systems without hard links: O_EXCL, then the bytes. A crash in between leaves an entry that its own
    checksum refuses."""
    try:
        with new_file(target) as file:
            write_all(file, temp.read_bytes())
    except FileExistsError:
        return False
    return True


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _sync_folder_fd(fd)
    finally:
        os.close(fd)


def _sync_nearest(path: Path) -> None:
    """Make the names in a folder durable or, if somebody has removed it since, the removal."""
    try:
        _sync_folder(path)
    except FileNotFoundError:
        _sync_nearest(path.parent)


def _sync_folder_fd(fd: int) -> None:
    try:
        os.fsync(fd)
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise


@contextlib.contextmanager
def _reporting(what: str) -> Iterator[None]:
    """Turn an OSError into the error a user can act on; FileExistsError stays, callers decide on it."""
    try:
        yield
    except (FileExistsError, LlmosError):
        raise
    except OSError as exc:
        raise from_os_error(exc, what) from exc
