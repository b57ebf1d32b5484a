"""The real `llmos` on disks that are full, read-only or broken, and under limits: the right exit code, one sentence,
the old state, an untouched source. Each command is a process of its own."""

import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import pytest

from llmos_cli.formats.manifest import Manifest
from llmos_cli.formats.names import RefName
from llmos_cli.progress import Silent
from llmos_cli.store.fsck.fsck import check
from llmos_cli.store.local import init_store, open_store
from llmos_cli.store.packs.objects import read_file, read_manifest
from llmos_cli.store.packs.packs import list_packs
from llmos_cli.store.refs.refs import read_ref
from llmos_cli.store.transaction import begin

pytestmark = pytest.mark.slow

MIB: Final = 1 << 20
ADD: Final = ("add", "source", "new")


def noise(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


@dataclass(frozen=True)
class Place:
    """A folder with a store that has the ref `old`, and `source`, which is to be added."""

    folder: Path

    def llmos(self, *words: str, before: tuple[str, ...] = (), **more: Any) -> "subprocess.CompletedProcess[str]":
        environment = {**os.environ, "HOME": str(self.folder), "OPENBLAS_NUM_THREADS": "1"}
        command = [*before, sys.executable, "-B", "-m", "llmos_cli", "--store", str(self.folder / "store"), *words]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
        return subprocess.run(command, cwd=self.folder, env=environment, text=True, check=False, **streams)

    def prepare(self, old: bytes, new: bytes) -> None:
        init_store(self.folder / "store")
        with open_store(self.folder / "store") as store, begin(store, purpose="test", ref=RefName("old")) as tx:
            tx.commit(Manifest("files", (tx.add_bytes("old", old),)), message="old")
        (self.folder / "source").write_bytes(new)

    def value(self, name: str = "old") -> bytes | None:
        with open_store(self.folder / "store", Silent()) as store:
            entry = read_ref(store, RefName(name))
            return read_file(store, read_manifest(store, entry.id).files[0]) if entry else None

    def is_as_before(self, old: bytes, new: bytes) -> None:
        """Nothing of the new ref, no leftovers, the old one whole, the source as it was."""
        assert (self.folder / "source").read_bytes() == new
        assert self.value() == old
        assert self.value("new") is None
        with open_store(self.folder / "store", Silent()) as store:
            assert not check(store, quick=False, progress=Silent()).problems
            assert not [*store.tmp.iterdir(), *store.leases.iterdir()]


def refused(ran: "subprocess.CompletedProcess[str]", code: int, *words: str) -> None:
    assert ran.returncode == code, ran.stderr
    assert "Traceback" not in ran.stderr
    for word in words:
        assert word in ran.stderr


@pytest.fixture
def mounted(scratch: Path) -> Iterator[Callable[[str], Path]]:
    """A tmpfs of a size, for tests marked `root`."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small file system")
    folder = scratch / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "llmos-test", str(folder)], check=False)
        if done.returncode:
            pytest.skip("cannot mount here")
        return folder

    yield mount
    subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)


@pytest.mark.root
def test_a_full_disk(mounted: Callable[[str], Path]) -> None:
    """Add, tag and checkout refuse and change nothing; what is there can be read; rm and gc give space back."""
    place = Place(mounted("size=12m"))
    old, new = noise(1, MIB), noise(2, 3 * MIB)
    place.prepare(old, new)
    with open(place.folder / "filler", "wb", buffering=0) as filler:
        for size in (1 << 16, 4096, 1):
            while size <= os.statvfs(place.folder).f_bavail * os.statvfs(place.folder).f_bsize:
                filler.write(bytes(size))
    refused(place.llmos(*ADD), 15, "no space left", "hint: ")
    place.is_as_before(old, new)
    refused(place.llmos("checkout", "old", "out"), 15)
    refused(place.llmos("tag", "old", "other"), 15)
    place.is_as_before(old, new)
    assert place.llmos("fsck").returncode == 0
    assert place.llmos("rm", "old").returncode == 0
    freed = place.llmos("gc", "--grace", "0")
    assert freed.returncode == 0, freed.stderr
    with open_store(place.folder / "store", Silent()) as store:
        assert not list_packs(store.packs)
    assert os.statvfs(place.folder).f_bavail * os.statvfs(place.folder).f_bsize >= MIB
    os.truncate(place.folder / "filler", 0)
    assert place.llmos(*ADD).returncode == 0
    assert place.value("new") == new


@pytest.mark.root
def test_a_disk_that_fills_while_it_is_written_to(mounted: Callable[[str], Path]) -> None:
    place = Place(mounted("size=8m"))
    old, new = noise(1, MIB), noise(2, 4 * MIB)
    place.prepare(old, new)
    refused(place.llmos(*ADD), 15, "no space left")
    place.is_as_before(old, new)


@pytest.mark.root
def test_a_read_only_disk(mounted: Callable[[str], Path]) -> None:
    folder = mounted("size=12m")
    place = Place(folder)
    old, new = noise(1, MIB), noise(2, MIB)
    place.prepare(old, new)
    if subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=False).returncode:
        pytest.skip("cannot remount here")
    for words in (ADD, ("tag", "old", "x"), ("rm", "old"), ("gc", "--grace", "0")):
        refused(place.llmos(*words), 12, "Read-only file system")
    for words in (("ls",), ("fsck",), ("gc", "--dry-run")):
        ran = place.llmos(*words)
        assert ran.returncode == 0, (words, ran.stderr)
    place.is_as_before(old, new)
    elsewhere = folder.parent / "out"
    assert place.llmos("checkout", "old", str(elsewhere)).returncode == 0
    assert (elsewhere / "old").read_bytes() == old


@pytest.fixture
def place(scratch: Path) -> Place:
    place = Place(scratch)
    place.prepare(noise(1, MIB), noise(2, 2 * MIB))
    return place


def test_few_open_files(place: Place) -> None:
    """`ulimit -n 32`: everything works, with a folder of more files than that."""
    (place.folder / "source").unlink()
    (place.folder / "source").mkdir()
    for number in range(100):
        (place.folder / "source" / f"f{number}").write_bytes(b"%d" % number * 50)
    few = ("prlimit", "--nofile=32:32")
    if not shutil.which(few[0]):
        pytest.skip("prlimit is not installed (Debian: util-linux)")
    for words in (ADD, ("checkout", "new", "out"), ("fsck",), ("gc", "--grace", "0")):
        ran = place.llmos(*words, before=few)
        assert ran.returncode == 0, (words, ran.stderr)
    assert len(list((place.folder / "out").iterdir())) == 100


@pytest.mark.parametrize("most", [6, 9, 12])
def test_too_few_open_files(place: Place, most: int) -> None:
    """Refused or done, and nothing is broken."""
    old, new = noise(1, MIB), noise(2, 2 * MIB)
    ran = place.llmos(*ADD, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (most, most)))
    if ran.returncode == 0:
        assert place.value("new") == new
        return
    if "error: " in ran.stderr:  # Python itself has come as far as us
        refused(ran, 1)
    place.is_as_before(old, new)


def test_a_limit_on_the_size_of_files(place: Place) -> None:
    old, new = noise(1, MIB), noise(2, 2 * MIB)
    ran = place.llmos(*ADD, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB)))
    refused(ran, 15, "no space left")
    place.is_as_before(old, new)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout(place: Place) -> None:
    for words in (("show", "old"), ("--json", "du")):
        with open("/dev/full", "w") as full:
            refused(place.llmos(*words, stdout=full), 15, "no space left while writing output")
    place.is_as_before(noise(1, MIB), noise(2, 2 * MIB))


@pytest.mark.parametrize(
    ("calls", "error", "code", "says"),
    [
        ("writev", "EDQUOT", 15, "no space left"),
        ("fsync", "EDQUOT", 15, "no space left"),
        ("fsync", "EIO", 13, "input/output error"),
    ],
)
def test_a_disk_that_refuses(place: Place, tracing: ModuleType, calls: str, error: str, code: int, says: str) -> None:
    refused(place.llmos(*ADD, before=strace(tracing, calls, error)), code, says)
    place.is_as_before(noise(1, MIB), noise(2, 2 * MIB))


def strace(tracing: ModuleType, calls: str, error: str, *more: str) -> tuple[str, ...]:
    """What lets every such system call of a command fail."""
    if why := tracing.why_not():
        pytest.skip(why)
    options = ("-e", f"trace={calls}", "-e", f"inject={calls}:error={error}")
    return ("strace", "-f", "-qq", "-o", os.devnull, *more, *options)


def test_a_disk_that_does_not_read(place: Place, tracing: ModuleType) -> None:
    """13, with the object and the place in the pack; what lies elsewhere can still be read."""
    (pack,) = list_packs(place.folder / "store" / "packs").values()
    broken = strace(tracing, "?preadv2,preadv,pread64,read", "EIO", "-P", str(pack))
    ran = place.llmos("checkout", "old", "out", before=broken)
    refused(ran, 13, "input/output error", str(pack))
    assert not (place.folder / "out" / "old").exists()
    assert not list((place.folder / "out").glob(".tmp-*"))
    place.is_as_before(noise(1, MIB), noise(2, 2 * MIB))
