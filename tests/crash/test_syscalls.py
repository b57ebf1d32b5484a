"""From outside: a command is killed at, or denied, every single system call by which it changes something on disk.

Nothing of the program is replaced; strace (Debian package strace) does it. Whatever is left must open, pass fsck, hold
the old value or the new one, leave the source alone, and let the command be run again.
"""

import inspect
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import pytest

from llmos_cli.commands.gc import gc as gc_command
from llmos_cli.formats.manifest import Manifest
from llmos_cli.formats.names import parse_ref
from llmos_cli.formats.safetensors import encode_header
from llmos_cli.progress import Silent
from llmos_cli.store.fsck import check
from llmos_cli.store.gc import execute_gc, plan_gc
from llmos_cli.store.local import Store, init_store, open_store
from llmos_cli.store.objects import read_file, read_manifest
from llmos_cli.store.refs import delete_ref, list_refs, read_ref
from llmos_cli.store.transaction import begin

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

GROWING: Final = ("write", "pwrite64", "writev", "ftruncate", "link", "linkat", "mkdir", "mkdirat")  # need room
NAMES: Final = ("rename", "renameat", "renameat2", "unlink", "unlinkat", "rmdir", "chmod", "fchmod", "utimensat")
SYNCS: Final = ("fsync", "fdatasync")
WATCHED: Final = (*GROWING, *NAMES, *SYNCS)
MOST: Final = 60  # tries of one fault at one system call; more are sampled
PACK_BYTES: Final = 40_000
DAY: Final = 86400.0
State = dict[str, dict[str, bytes]]  # ref -> its files


@dataclass(frozen=True)
class Fault:
    """What strace does at the n-th call of these names, and the exit codes it may lead to; 0: it did not matter."""

    inject: str
    names: tuple[str, ...]
    codes: tuple[int, ...]
    most: int = MOST


FAULTS: Final = {
    "killed": Fault("signal=KILL:when={n}", WATCHED, (-9,)),
    "full": Fault("error=ENOSPC:when={n}+", (*GROWING, *SYNCS), (0, 15)),  # and it stays full
    "broken": Fault("error=EIO:when={n}", WATCHED, (0, 13)),
    "over quota": Fault("error=EDQUOT:when={n}", (*GROWING, *SYNCS), (0, 15), most=4),
}


@dataclass(frozen=True)
class Command:
    """A command line below a folder, and what fills its store and its sources before."""

    prepare: Callable[[Path], None]
    argv: tuple[str, ...]


def noise(seed: int, size: int = 30_000) -> bytes:
    return random.Random(seed).randbytes(size)


def commit(store: Store, name: str, **content: bytes) -> None:
    with begin(store, purpose="test", ref=parse_ref(name)) as tx:
        tx.commit(Manifest("files", tuple(tx.add_bytes(path, data) for path, data in content.items())), message="test")


def remove(store: Store, name: str) -> None:
    entry = read_ref(store, parse_ref(name))
    assert entry is not None
    delete_ref(store, parse_ref(name), expected=entry.id)


def age(store: Store) -> None:
    then = time.time() - 30 * DAY
    for folder in (store.packs, store.trash, store.tmp):
        for path in (*folder.glob("**/*.pack"), *folder.glob("ref-*"), *folder.glob(".tmp-*")):
            os.utime(path, (then, then))


def prepare_add(folder: Path) -> None:
    """A model of several packs is to replace an older one, a part of which it shares."""
    source = folder / "source"
    source.mkdir()
    words = noise(3, 32_000)
    header = encode_header([("a", "BF16", (8000,)), ("b", "BF16", (8000,))], {})
    (source / "model.safetensors").write_bytes(header + words)
    (source / "config.json").write_bytes(b"{}")
    (source / "notes").write_bytes(noise(1))
    with opened(folder) as store:
        commit(store, "run", notes=noise(1), old=noise(2))
        commit(store, "other", text=b"text " * 500)


def prepare_gc(folder: Path) -> None:
    """Dead packs, a mostly dead one, one in the trash, one there that is needed, a removed ref, a leftover."""
    with opened(folder) as store:
        commit(store, "trashed", f=noise(30))
        remove(store, "trashed")
        age(store)
        execute_gc(store, plan_gc(store, grace_seconds=DAY), Silent())
        commit(store, "dead", f=noise(20))
        commit(store, "mixed", text=b"text " * 500, big=noise(31, 90_000))
        commit(store, "other", text=b"text " * 500)
        commit(store, "run", notes=noise(1), old=noise(2))
        remove(store, "dead")
        remove(store, "mixed")
        (store.tmp / ".tmp-leftover").write_bytes(b"half a pack")
        age(store)


COMMANDS: Final = {
    "add": Command(prepare_add, ("add", "{folder}/source", "run")),
    "gc": Command(prepare_gc, ("gc", "--grace", "0")),
    "repack": Command(prepare_gc, ("gc", "--repack", "--grace", "0")),
}
if "repack" not in inspect.signature(gc_command).parameters:
    del COMMANDS["repack"]


@contextmanager
def opened(folder: Path) -> Iterator[Store]:
    with open_store(folder / "store") as store:
        yield store


def state(store: Store) -> State:
    return {
        str(entry.ref): {file.path: read_file(store, file) for file in read_manifest(store, entry.id).files}
        for entry in list_refs(store)
    }


def problems(store: Store) -> list[str]:
    return [f"{item.where}: {item.what}" for item in check(store, quick=False, progress=Silent()).problems]


def source(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (folder / "source").glob("*")}


@pytest.fixture
def tracer(tracing: ModuleType, scratch: Path) -> Iterator[Any]:
    (scratch / "traced").mkdir()
    with tracing.open_tracer(scratch / "traced", pack_bytes=PACK_BYTES) as tracer:
        yield tracer


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_every_system_call(command: Command, fault: Fault, tracer: Any, scratch: Path) -> None:
    prepared, folder = scratch / "prepared", scratch / "now"
    init_store(prepared / "store")
    command.prepare(prepared)
    argv = [*(word.format(folder=folder) for word in command.argv), "--store", str(folder / "store")]

    def fresh() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(prepared, folder)

    fresh()
    with opened(folder) as store:
        before = state(store)
    fresh()
    ran = tracer.run(*argv, watch=WATCHED)
    assert ran.code == 0, ran.err
    with opened(folder) as store:
        after = state(store)
    assert sum(ran.calls.values()) > 30
    met = 0
    for name, last in sorted(ran.calls.items()):
        if name not in fault.names:
            continue
        for number in sampled(last, fault.most):
            fresh()
            untouched = source(folder)
            failed = tracer.run(*argv, inject=f"{name}:{fault.inject.format(n=number)}")
            where = f"{name} {number} of {last}: exit {failed.code}, {failed.err}"
            met += failed.met
            assert failed.code in fault.codes or (failed.code == 0 and not failed.met), where
            assert "Traceback" not in failed.err, where
            assert source(folder) == untouched, where
            with opened(folder) as store:
                assert problems(store) == [], where
                assert state(store) in ((after,) if failed.code == 0 else (before, after)), where
            again = tracer.run(*argv)
            assert again.code == 0, f"{where}; again: {again.err}"
            with opened(folder) as store:
                assert state(store) == after, where
                assert problems(store) == [], where
    assert met > 20


def sampled(last: int, most: int) -> list[int]:
    """The numbers from 1 to `last`, or as many of them as allowed, evenly: always the first and the last."""
    if last <= most:
        return list(range(1, last + 1))
    return sorted({1 + round(index * (last - 1) / (most - 1)) for index in range(most)})
