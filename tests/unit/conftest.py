"""Unit tests work in memory: an fsync on a disk costs more than the rest of a test. tests/e2e works on the disk."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

_MEMORY: Final = "/dev/shm"
_ROOM: Final = 1 << 30  # a container often has 64 MiB there


def _in_memory() -> bool:
    return os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free > _ROOM


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="llmos-test-", dir=_MEMORY if _in_memory() else None) as folder:
        yield Path(folder)
