"""A store and ways to hurt it."""

import json
import os
import random
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmos_cli.formats.frame import HEADER_BYTES
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.manifest import Manifest, Recipe
from llmos_cli.formats.names import parse_ref
from llmos_cli.formats.safetensors import encode_header
from llmos_cli.progress import Silent
from llmos_cli.store.fsck.fsck import FsckReport, check
from llmos_cli.store.gc.gc import GcResult, execute_gc, plan_gc
from llmos_cli.store.local import Store, init_store, open_store
from llmos_cli.store.packs.objects import read_file, read_manifest
from llmos_cli.store.packs.packs import list_packs
from llmos_cli.store.refs.refs import delete_ref, read_ref
from llmos_cli.store.transaction import Commit, begin

DTYPES = {"uint8": "U8", "uint16": "BF16", "int32": "I32", "int64": "I64", "float32": "F32", "float16": "F16"}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    init_store(tmp_path / ".llmos")
    with open_store(tmp_path / ".llmos", Silent()) as opened:
        yield opened


@dataclass(frozen=True)
class Lab:
    """What the tests of the store do again and again."""

    store: Store

    @staticmethod
    def noise(size: int, seed: int = 0) -> bytes:
        return random.Random(seed).randbytes(size)

    @staticmethod
    def text(size: int, seed: int = 0) -> bytes:
        """Compressible, but without repetition at a distance that would make chunks equal."""
        generator = random.Random(seed)
        words = [bytes(generator.choices(b"abcdefghijklmnopqrstuvwxyz", k=generator.randint(2, 9))) for _ in range(999)]
        return b" ".join(generator.choices(words, k=size // 4))[:size]

    @staticmethod
    def safetensors(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> bytes:
        described = [(name, DTYPES[str(array.dtype)], array.shape) for name, array in tensors.items()]
        return encode_header(described, metadata or {}) + b"".join(array.tobytes() for array in tensors.values())

    def add(
        self,
        name: str,
        files: Mapping[str, bytes],
        *,
        kind: str = "files",
        recipe: Recipe | None = None,
        store: Store | None = None,
    ) -> Commit:
        with begin(store or self.store, purpose="test", ref=parse_ref(name)) as tx:
            entries = tuple(tx.add_bytes(path, data) for path, data in files.items())
            return tx.commit(Manifest(kind, entries, recipe=recipe), message=f"add {name}")

    def read(self, name: str, store: Store | None = None) -> dict[str, bytes]:
        store = store or self.store
        entry = read_ref(store, parse_ref(name))
        assert entry is not None, f"{name} is gone"
        return {file.path: read_file(store, file) for file in read_manifest(store, entry.id).files}

    def remove(self, name: str) -> None:
        entry = read_ref(self.store, parse_ref(name))
        assert entry is not None
        delete_ref(self.store, parse_ref(name), expected=entry.id)

    def gc(self, grace: float | None = 0.0, store: Store | None = None) -> GcResult:
        store = store or self.store
        return execute_gc(store, plan_gc(store, grace_seconds=grace), Silent())

    def fsck(self, *, quick: bool = False, store: Store | None = None) -> FsckReport:
        return check(store or self.store, quick=quick, progress=Silent())

    def sound(self, store: Store | None = None) -> None:
        report = self.fsck(store=store)
        assert not report.problems, report.problems

    def packs(self) -> list[Path]:
        return list(list_packs(self.store.packs).values())

    def pack_of(self, oid: ObjectId) -> Path:
        return self.store.pack_path(self.store.index.locate(oid)[0].pack)

    def payload_at(self, oid: ObjectId) -> tuple[Path, int]:
        """The pack of an object and where its payload starts in it."""
        location = self.store.index.locate(oid)[0]
        return self.store.pack_path(location.pack), location.entry.offset + HEADER_BYTES

    @staticmethod
    def flip(path: Path, offset: int, mask: int = 1) -> None:
        """Change bits of one byte, as a bad disk does: the time of the file stays."""
        status = path.stat()
        mode = status.st_mode
        path.chmod(0o600)
        with open(path, "r+b") as file:
            file.seek(offset, os.SEEK_SET if offset >= 0 else os.SEEK_END)
            at = file.tell()
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ mask]))
        path.chmod(mode)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    @staticmethod
    def age(path: Path, seconds: float) -> None:
        then = time.time() - seconds
        os.utime(path, (then, then), follow_symlinks=False)

    def age_all(self, seconds: float) -> None:
        """Make everything in the packs, the trash and the temporary folders older."""
        for folder in (self.store.packs, self.store.trash, self.store.tmp, self.store.leases):
            for path in (*folder.glob("**/*.pack"), *folder.glob("ref-*"), *folder.glob(".tmp-*")):
                self.age(path, seconds)

    def leftovers(self) -> list[Path]:
        return [path for path in self.store.root.glob("**/.tmp-*") if path.exists()]

    def warnings(self) -> list[str]:
        assert isinstance(self.store.progress, Silent)
        return self.store.progress.warnings


@pytest.fixture
def lab(store: Store) -> Lab:
    return Lab(store)


@pytest.fixture
def in_processes() -> Callable[[int, Callable[[int], Any]], list[Any]]:
    """Run `work(number)` in that many forked processes at once; gives what each returned (through JSON)."""

    def run(count: int, work: Callable[[int], Any]) -> list[Any]:
        gate_out, gate_in = os.pipe()
        children = []
        for number in range(count):
            answer_out, answer_in = os.pipe()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # later Pythons dislike fork beside threads
                pid = os.fork()
            if pid == 0:
                try:
                    os.close(gate_in)
                    os.close(answer_out)
                    os.read(gate_out, 1)  # returns when the parent closes its end
                    answer: Any = {"result": work(number)}
                except BaseException as exc:  # noqa: BLE001 - a child has nobody else to tell
                    answer = {"error": f"{type(exc).__name__}: {exc}"}
                os.write(answer_in, json.dumps(answer).encode())
                os._exit(0)
            os.close(answer_in)
            children.append((pid, answer_out))
        os.close(gate_out)
        os.close(gate_in)
        return [_collect(pid, answer) for pid, answer in children]

    return run


def _collect(pid: int, answer: int) -> Any:
    with open(answer, "rb") as pipe:
        data = pipe.read()
    os.waitpid(pid, 0)
    told = json.loads(data) if data else {"error": "the child died"}
    assert "error" not in told, told["error"]
    return told["result"]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mount a small tmpfs; `mount(size)` gives its folder. For tests marked `root`."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small file system")
    mounted: list[Path] = []

    def make(size: str, *options: str) -> Path:
        folder = tmp_path / f"mount{len(mounted)}"
        folder.mkdir()
        done = _run("mount", "-t", "tmpfs", "-o", ",".join((f"size={size}", *options)), "llmos-test", str(folder))
        if done.returncode:
            pytest.skip(f"cannot mount here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        _run("umount", "-l", str(folder))


def _run(*command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def remount() -> Callable[[Path, str], None]:
    def change(folder: Path, options: str) -> None:
        done = _run("mount", "-o", f"remount,{options}", str(folder))
        if done.returncode:
            pytest.skip(f"cannot remount here: {done.stderr.strip()}")

    return change


@pytest.fixture
def as_nobody() -> Callable[[Callable[[], Any]], Any]:
    """Run something without root's power to read everything, in a child."""

    def run(work: Callable[[], Any]) -> Any:
        answer_out, answer_in = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            try:
                os.close(answer_out)
                if os.geteuid() == 0:
                    os.setgroups([])
                    os.setgid(65534)
                    os.setuid(65534)
                answer: Any = {"result": work()}
            except BaseException as exc:  # noqa: BLE001 - a child has nobody else to tell
                answer = {"error": f"{type(exc).__name__}: {exc}"}
            os.write(answer_in, json.dumps(answer).encode())
            os._exit(0)
        os.close(answer_in)
        return _collect(pid, answer_out)

    return run
