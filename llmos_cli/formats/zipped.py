"""Which entries of a zip file lie in it as they are, and where. Entries are never opened and nothing is extracted.

The directory is read by the standard library's zipfile (zip64 and data descriptors included), through a window that
gives it no more than the limits allow. Odd archives are nobody's fault: the answer is then "none", not an error.
"""

import io
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from llmos_cli.formats import limits
from llmos_cli.formats.ids import Buffer

MAGIC: Final = b"PK\x03\x04"

_LOCAL = struct.Struct("<4s2xHH16xHH")  # magic, flags, method, length of the name, length of the extra field
_NOT_PLAIN: Final = 0x1 | 0x20 | 0x40 | 0x2000  # encrypted, patch data, strong encryption, masked header

Read = Callable[[int, int], Buffer]


@dataclass(frozen=True)
class Entry:
    """An entry that is stored without compression: `start` to `end` in the archive are its bytes."""

    name: str
    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start


def stored_entries(read: Read, size: int) -> tuple[Entry, ...]:
    """The uncompressed entries of the zip file in `read`, in file order; none if it is not one, or entries overlap."""
    import zipfile  # with all it brings, 20 ms that few commands need

    try:
        with zipfile.ZipFile(_Window(read, size)) as archive:
            infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error):
        return ()
    entries = []
    last = 0
    for info in infos:
        if info.header_offset < last:
            return ()
        last = info.header_offset + _LOCAL.size
        header = bytes(read(info.header_offset, last)) if last <= size else b""
        if len(header) < _LOCAL.size:
            return ()
        magic, flags, method, name_length, extra_length = _LOCAL.unpack(header)
        start = last + name_length + extra_length
        last = start + info.compress_size
        if magic != MAGIC or last > size:
            return ()
        plain = method == info.compress_type == zipfile.ZIP_STORED and not (flags | info.flag_bits) & _NOT_PLAIN
        if plain and info.compress_size == info.file_size:
            entries.append(Entry(info.filename, start, last))
    return tuple(entries)


class _Window(io.RawIOBase):
    """A file for zipfile, as far as it needs one."""

    def __init__(self, read: Read, size: int) -> None:
        self._read = read
        self._size = size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if at < 0:
            raise OSError("before the start")
        self._at = at
        return at

    def read(self, size: int = -1, /) -> bytes:
        end = self._size if size < 0 else min(self._size, self._at + size)
        if end - self._at > limits.ZIP_DIRECTORY_BYTES:
            raise ValueError("the directory is too large")
        data = bytes(self._read(self._at, end)) if end > self._at else b""
        self._at += len(data)
        return data
