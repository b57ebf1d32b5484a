"""Files that are arriving from elsewhere and are not whole yet: kept in `tmp/` under what they are to be, so that
whoever asks for the same bytes again goes on from what has arrived. Nobody believes one before its digest is checked.

Their life is bounded: they go when they are stored, and gc takes those that nobody has written to for a week.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from llmos_cli.errors import from_os_error
from llmos_cli.formats.ids import object_id
from llmos_cli.store.disk import durable
from llmos_cli.store.handle import Store

SUFFIX: Final = ".part"
LIFE_SECONDS: Final = 7 * 86400.0


def partial_path(store: Store, digest: str) -> Path:
    """Where the file with this digest ("sha256:...") grows."""
    return store.tmp / f"{object_id(digest.encode())}{SUFFIX}"


def grow(path: Path) -> BinaryIO:
    """Open a partial to add to its end, making it if it is not there. One process at a time does so."""
    try:
        return open(path, "a+b", buffering=0)
    except OSError as exc:
        raise from_os_error(exc, f"writing {path}") from exc


def drop_partial(path: Path) -> None:
    """Remove what is of no more use."""
    durable.remove(path)


def old_partials(store: Store, now: float) -> Iterator[tuple[Path, int]]:
    """Those that nobody goes on with, and their sizes."""
    for path in store.tmp.glob(f"*{SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):
            status = path.lstat()
            if now - status.st_mtime >= LIFE_SECONDS:
                yield path, status.st_size
