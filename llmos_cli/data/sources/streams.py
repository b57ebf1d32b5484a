"""The bytes of a corpus file as they were planned: opened without hanging, unpacked within limits, compared with the
plan. It knows nothing of records.
"""

import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from llmos_cli.errors import Damaged, LlmosError, Unsafe, from_os_error
from llmos_cli.formats.codec import read_zstd
from llmos_cli.formats.limits import MiB

BLOCK: Final = 1 * MiB
PACKED: Final = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
MOST_TIMES: Final = 250  # text packs to a fifth, logs to a fiftieth; what packs better is made to fill disks
SMALL_BYTES: Final = 64 * MiB  # what may come out whatever the ratio


class Unreadable(Exception):
    """What a file holds cannot be unpacked; the text goes after the file's name."""


def opened(path: Path) -> BinaryIO:
    """Open a regular file; what became a pipe since it was found does not block, and is refused."""
    try:
        stream = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0)
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            stream.close()
            raise Unsafe(f"{path} is not a regular file any more")
    except OSError as exc:
        raise from_os_error(exc, f"reading {path}") from exc
    return stream


def blocks(stream: BinaryIO, path: Path, limit: int | None = None) -> Iterator[bytes]:
    """What is left of a stream, or its next `limit` bytes."""
    left = limit
    while left is None or left > 0:
        try:
            block = stream.read(BLOCK if left is None else min(BLOCK, left))
        except OSError as exc:
            raise from_os_error(exc, f"reading {path}") from exc
        if not block:
            return
        if left is not None:
            left -= len(block)
        yield block


def unpacked(source: Iterator[bytes], packing: str, size: int) -> Iterator[bytes]:
    """What `source` unpacks to, in blocks; `size` is its own. Raises Unreadable: damaged, cut short, or a bomb."""
    done, most = 0, max(SMALL_BYTES, MOST_TIMES * size)
    for block in _gunzipped(source) if packing == "gzip" else _unzstd(source):
        done += len(block)
        if done > most:
            raise Unreadable(f"unpacks to more than {MOST_TIMES} times its size, which no text does")
        yield block


def stamp_of(stream: BinaryIO) -> tuple[int, int, int, int]:
    status = os.fstat(stream.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def changed(label: str) -> LlmosError:
    return LlmosError(f"{label} changed while it was read", hint="run the command again once nothing writes to it")


def _gunzipped(source: Iterator[bytes]) -> Iterator[bytes]:
    """All members of a gzip file; zeros after the last are padding."""
    member, fresh = zlib.decompressobj(31), True
    for block in source:
        data = block
        while data:
            if fresh and not data.strip(b"\0"):
                break
            try:
                out = member.decompress(data, BLOCK)
            except zlib.error as exc:
                raise Unreadable(f"is damaged: {exc}") from exc
            fresh = False
            if out:
                yield out
            data = member.unconsumed_tail
            if member.eof:
                data = member.unused_data
                member, fresh = zlib.decompressobj(31), True
    if not fresh:
        while out := member.decompress(member.unconsumed_tail, BLOCK):
            yield out
        if not member.eof:
            raise Unreadable("ends in the middle of its gzip stream")


def _unzstd(source: Iterator[bytes]) -> Iterator[bytes]:
    try:
        yield from read_zstd(source)
    except Damaged as exc:
        raise Unreadable(f"is damaged: {exc.message}") from exc
