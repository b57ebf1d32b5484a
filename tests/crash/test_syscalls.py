"""From outside: a command is killed at, or denied, the system calls by which it changes something on disk.

Nothing of the program is replaced; strace (Debian package strace) does it. Whatever is left must open, pass fsck, hold
the old value or the new one, leave the source alone, and let the command be run again. Of all calls of a command the
suite takes a few; every single one by hand: LLMOS_CRASH=all pytest tests/crash/test_syscalls.py
"""

import os
import random
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import pytest

from llmos_cli.errors import Damaged, NotFound
from llmos_cli.formats.codec import RAW, Encoded
from llmos_cli.formats.frame import CHUNK, new_frame
from llmos_cli.formats.frame import encode_header as encode_frame_header
from llmos_cli.formats.ids import object_id
from llmos_cli.formats.manifest import Manifest
from llmos_cli.formats.names import RefName, parse_ref
from llmos_cli.formats.safetensors import encode_header
from llmos_cli.progress import Silent
from llmos_cli.store.fsck.fsck import check
from llmos_cli.store.gc.gc import execute_gc, plan_gc
from llmos_cli.store.local import Store, init_store, open_store
from llmos_cli.store.packs.objects import read_file, read_manifest
from llmos_cli.store.packs.packs import PackWriter, list_packs
from llmos_cli.store.refs.refs import delete_ref, read_ref, ref_names
from llmos_cli.store.transaction import Tensor, begin

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

GROWING: Final = ("write", "pwrite64", "writev", "ftruncate", "link", "linkat", "mkdir", "mkdirat")  # need room
NAMES: Final = ("rename", "renameat", "renameat2", "unlink", "unlinkat", "rmdir", "chmod", "fchmod", "utimensat")
SYNCS: Final = ("fsync", "fdatasync")
WATCHED: Final = (*GROWING, *NAMES, *SYNCS)
PACK_BYTES: Final = 40_000
DAY: Final = 86400.0
State = dict[str, dict[str, bytes] | None]  # ref -> its files


@dataclass(frozen=True)
class Fault:
    """What strace does at the n-th call of these names, the exit codes it may lead to (0: it did not matter), and at
    how many of all calls of a command the suite does it."""

    inject: str
    names: tuple[str, ...]
    codes: tuple[int, ...]
    most: int


FAULTS: Final = {
    "killed": Fault("signal=KILL:when={n}", WATCHED, (-9,), 5),
    "full": Fault("error=ENOSPC:when={n}+", (*GROWING, *SYNCS), (0, 15), 4),  # and it stays full
    "broken": Fault("error=EIO:when={n}", WATCHED, (0, 13), 5),
    "over quota": Fault("error=EDQUOT:when={n}", (*GROWING, *SYNCS), (0, 15), 2),
}


@dataclass(frozen=True)
class Command:
    """A command line below a folder, what fills its store and its sources before, and how it may end when it is given
    once more (10: what was to be removed is gone)."""

    prepare: Callable[[Path], None]
    argv: tuple[str, ...]
    again: tuple[int, ...] = (0,)


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


def prepare_adopt(folder: Path) -> None:
    prepare_add(folder)
    (folder / "source" / "large").write_bytes(noise(4, 1_100_000))


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


def prepare_repack(folder: Path) -> None:
    """As for a gc, and two versions of a model that were stored before there were planes and deltas."""
    prepare_gc(folder)
    words = [random.Random(6).gauss(0, 0.02) for _ in range(8000)]
    with opened(folder) as store:
        for step in (0, 1):
            plain = b"".join(struct.pack("<f", word * (1 + step / 5000))[2:] for word in words)
            frame = new_frame(CHUNK, object_id(plain), len(plain), Encoded(RAW, 0, False, (plain,)))
            writer = PackWriter(store.tmp)
            writer.append(frame, encode_frame_header(frame), (plain,))
            writer.publish(store)
            with begin(store, purpose="test", ref=RefName("model")) as tx:
                entry = tx.add_tensors("model.safetensors", [Tensor("w", "BF16", (8000,), lambda plain=plain: plain)])
                tx.commit(Manifest("model", (entry,)), message="test")
        age(store)


def prepare_trash(folder: Path) -> None:
    """Two removed refs; the pack of one of them is in the trash, too."""
    prepare_refs(folder)
    with opened(folder) as store:
        remove(store, "run")
        age(store)
        execute_gc(store, plan_gc(store, grace_seconds=DAY), Silent())
        remove(store, "other")


def prepare_refs(folder: Path) -> None:
    with opened(folder) as store:
        commit(store, "run", notes=noise(1), old=noise(2))
        commit(store, "other", text=b"text " * 500)


def prepare_damage(folder: Path) -> None:
    """A bit has flipped in a pack, another pack is gone, the end of a third is cut off; a copy has all three."""
    with opened(folder) as store:
        commit(store, "run", notes=noise(1))
        commit(store, "other", f=noise(2))
        commit(store, "third", f=noise(3))
        packs = sorted(list_packs(store.packs).values())
    shutil.copytree(folder / "store", folder / "copy")
    for path in packs:
        path.chmod(0o644)
    data = bytearray(packs[0].read_bytes())
    data[9000] ^= 1
    packs[0].write_bytes(data)
    packs[1].unlink()
    packs[2].write_bytes(packs[2].read_bytes()[:-70])


COMMANDS: Final = {
    "init": Command(lambda folder: shutil.rmtree(folder / "store"), ("init",)),
    "add": Command(prepare_add, ("add", "{folder}/source", "run")),
    "adopt": Command(prepare_adopt, ("add", "--adopt", "{folder}/source", "run")),
    "tag": Command(prepare_refs, ("tag", "other", "run", "--force")),
    "rm": Command(prepare_refs, ("rm", "other"), (0, 10)),
    "checkout": Command(prepare_refs, ("checkout", "run", "{folder}/out", "--force")),
    "gc": Command(prepare_gc, ("gc", "--grace", "0")),
    "repack": Command(prepare_repack, ("gc", "--repack", "--grace", "0")),
    "undelete": Command(prepare_trash, ("gc", "--undelete")),
    "repair": Command(prepare_damage, ("fsck", "--repair", "--from", "{folder}/copy")),
}


@contextmanager
def opened(folder: Path) -> Iterator[Store]:
    with open_store(folder / "store") as store:
        yield store


def state(folder: Path) -> State | None:
    """What the refs hold (None: it cannot be read); None where there is no store."""
    try:
        with opened(folder) as store:
            return {str(ref): _value(store, ref) for ref in ref_names(store) if read_ref(store, ref)}
    except NotFound:
        return None


def _value(store: Store, ref: RefName) -> dict[str, bytes] | None:
    entry = read_ref(store, ref)
    assert entry is not None
    try:
        return {file.path: read_file(store, file) for file in read_manifest(store, entry.id).files}
    except Damaged:
        return None


def problems(folder: Path) -> list[str]:
    with opened(folder) as store:
        return [f"{item.where}: {item.what}" for item in check(store, quick=False, progress=Silent()).problems]


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("*")}


@pytest.fixture(scope="module")
def tracer(tracing: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with tracing.open_tracer(tmp_path_factory.mktemp("traced"), pack_bytes=PACK_BYTES) as tracer:
        yield tracer


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_every_system_call(command: Command, fault: Fault, tracer: Any, harness: ModuleType, scratch: Path) -> None:
    prepared, folder = scratch / "prepared", scratch / "now"
    init_store(prepared / "store")
    command.prepare(prepared)
    argv = [*(word.format(folder=folder) for word in command.argv), "--store", str(folder / "store")]

    def fresh() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(prepared, folder)

    fresh()
    before = state(folder)
    is_sound = before is not None and not problems(folder)
    fresh()
    ran = tracer.run(*argv, watch=WATCHED)
    assert ran.code == 0, ran.err
    after = state(folder)
    assert after is not None
    made = {name: data for name, (data, _) in files(folder / "out").items()}
    points = [(name, n) for name, last in sorted(ran.calls.items()) if name in fault.names for n in range(1, last + 1)]
    assert len(points) > 5
    met = 0
    for name, number in sampled(points, harness.usually(fault.most)):
        fresh()
        untouched = files(folder / "source")
        failed = tracer.run(*argv, inject=f"{name}:{fault.inject.format(n=number)}")
        where = f"{name} {number} of {ran.calls[name]}: exit {failed.code}, {failed.err}"
        met += failed.met
        assert failed.code in fault.codes or (failed.code == 0 and not failed.met), where
        assert "Traceback" not in failed.err, where
        assert files(folder / "source") == untouched, where
        now = state(folder)
        if is_sound:
            assert problems(folder) == [], where
        if failed.code == 0:
            assert now == after, where
        elif before is not None and now != before:
            assert all(now and now.get(ref) in (before.get(ref), after.get(ref)) for ref in {**before, **after}), where
        again = tracer.run(*argv)
        assert again.code in command.again, f"{where}; again: {again.err}"
        assert state(folder) == after, where
        assert problems(folder) == [], where
        assert {name: data for name, (data, _) in files(folder / "out").items() if name[0] != "."} == made, where
    assert met > 0


def sampled(points: list[tuple[str, int]], most: int) -> list[tuple[str, int]]:
    """All of them for 1, else that many, evenly spread: always the first and the last."""
    if most == 1 or len(points) <= most:
        return points
    return [points[round(index * (len(points) - 1) / (most - 1))] for index in range(most)]
