"""A verb of the store takes the same memory whatever the size of a file: at most 400 MB, and 64 MB a thread."""

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmos_cli.store.packs.pipeline import cores

pytestmark = pytest.mark.slow

MIB = 1 << 20
ALLOWED = 400e6 + 64e6 * cores()
SIZE = int(1.6 * ALLOWED) // MIB * MIB


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """On a disk: this would be much for memory-backed files."""
    folder = tmp_path_factory.mktemp("memory")
    yield folder
    shutil.rmtree(folder)


def peak(folder: Path, *words: str) -> int:
    """The peak of resident memory of a command, in bytes. Its measure starts with that of who starts it, so that is a
    small process."""
    code = (
        "import os, sys; child = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ); "
        "_, status, used = os.wait4(child, 0); print(os.waitstatus_to_exitcode(status), used.ru_maxrss * 1024)"
    )
    command = [sys.executable, "-c", code, sys.executable, "-m", "llmos_cli", "-q", "--store", "store", *words]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    status, memory = ran.stdout.split()[-2:]
    assert status == "0", ran.stderr
    return int(memory)


def test_memory_does_not_grow_with_the_file(folder: Path) -> None:
    """A sparse file with noise here and there, and many chunks that are all different."""
    generator = random.Random(1)
    noise = generator.randbytes(8 * MIB)
    with open(folder / "large", "wb") as file:
        for number in range(24):
            file.seek(number * SIZE // 24)
            file.write(b"%d" % number + noise)
        file.truncate(SIZE)
    peaks = {
        words[0]: peak(folder, *words)
        for words in (("init",), ("add", "large", "x"), ("fsck",), ("checkout", "x", "out"), ("gc",))
    }
    assert os.path.getsize(folder / "out" / "large") == SIZE
    assert all(memory <= ALLOWED for memory in peaks.values()), peaks
