"""Adopting a file, and letting go of one, stopped at every step: by kill, by power loss, by a disk that fails. The ref
has its old value or the new one, whole; the user's file keeps its bytes; what is left over, gc knows."""

import errno
import os
import random
import shutil
import time
from pathlib import Path
from types import ModuleType
from typing import Final

import pytest

from llmos_cli.formats.manifest import Manifest
from llmos_cli.formats.names import parse_ref
from llmos_cli.progress import Silent
from llmos_cli.store.fsck.fsck import check
from llmos_cli.store.gc.gc import execute_gc, plan_gc
from llmos_cli.store.intake.add import execute_add, plan_add
from llmos_cli.store.local import Store, init_store, open_store
from llmos_cli.store.packs.adopted import list_adopted, list_trashed
from llmos_cli.store.packs.objects import read_file, read_manifest
from llmos_cli.store.refs.refs import delete_ref, read_ref
from llmos_cli.store.transaction import begin

pytestmark = pytest.mark.slow

DATA: Final = random.Random(1).randbytes(1_100_000)
YEAR: Final = 365 * 86400.0


def adopt(folder: Path, name: str = "m") -> None:
    with open_store(folder / "store") as store:
        execute_add(store, plan_add([folder / "model.bin"]), parse_ref(name), Silent(), adopt=True)


def let_go(folder: Path) -> None:
    with open_store(folder / "store") as store:
        execute_gc(store, plan_gc(store, grace_seconds=0), Silent())


def value(store: Store, name: str) -> dict[str, bytes] | None:
    entry = read_ref(store, parse_ref(name))
    return {item.path: read_file(store, item) for item in read_manifest(store, entry.id).files} if entry else None


def prepare(folder: Path) -> Path:
    folder.mkdir()
    (folder / "model.bin").write_bytes(DATA)
    os.utime(folder / "model.bin", (1e9, 1e9))
    init_store(folder / "store")
    with open_store(folder / "store") as store, begin(store, purpose="test", ref=parse_ref("other")) as tx:
        tx.commit(Manifest("files", (tx.add_bytes("f", b"other"),)), message="add")
    return folder


def prepare_garbage(folder: Path) -> Path:
    prepare(folder)
    adopt(folder)
    with open_store(folder / "store") as store:
        entry = read_ref(store, parse_ref("m"))
        assert entry
        delete_ref(store, parse_ref("m"), expected=entry.id)
    return folder


def examine(folder: Path, where: str) -> None:
    """Whole, and after a repeat and a gc as if nothing had happened."""
    assert (folder / "model.bin").read_bytes() == DATA, where
    with open_store(folder / "store") as store:
        assert value(store, "m") in (None, {"model.bin": DATA}), where
        assert value(store, "other") == {"f": b"other"}, where
        problems = check(store, quick=False, progress=Silent()).problems
        assert not problems, (where, problems)
    adopt(folder, "again")
    with open_store(folder / "store") as store:
        for name in ("m", "again"):
            entry = read_ref(store, parse_ref(name))
            if entry:
                delete_ref(store, parse_ref(name), expected=entry.id)
        for lease in store.leases.iterdir():
            lease.unlink()  # one that could not be removed: its process is this one, and lives
        for _ in range(2):
            execute_gc(store, plan_gc(store, grace_seconds=0, now=time.time() + YEAR), Silent())
        assert not list_adopted(store), where
        assert not list_trashed(store), where
        assert not list(store.tmp.iterdir()), where
        assert value(store, "other") == {"f": b"other"}, where
    assert (folder / "model.bin").read_bytes() == DATA, where


def test_adopting_killed_at_every_step(harness: ModuleType, scratch: Path) -> None:
    steps = harness.sweep(prepare(scratch / "prepared"), scratch / "run", adopt, examine, every=harness.usually(2))
    assert steps > 20


def test_letting_go_killed_at_every_step(harness: ModuleType, scratch: Path) -> None:
    steps = harness.sweep(prepare_garbage(scratch / "prepared"), scratch / "run", let_go, examine)
    assert steps > 10


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_adopting_while_a_step_fails(harness: ModuleType, scratch: Path, error: int) -> None:
    prepared = prepare(scratch / "prepared")
    for number in range(1, 200, harness.usually(2)):
        harness.fresh(prepared, scratch / "run")
        outcome = harness.failing_at(number, error, lambda: adopt(scratch / "run"))
        with open_store(scratch / "run" / "store") as store:
            done = value(store, "m") is not None
        assert done or outcome.raised, outcome
        examine(scratch / "run", f"{outcome.step} {number}")
        if not outcome.step:
            return
    raise AssertionError("it never ended")


def test_power_loss_while_adopting(harness: ModuleType, scratch: Path) -> None:
    prepared = prepare(scratch / "prepared")
    shutil.copytree(prepared, scratch / "run")
    steps = harness.record(scratch / "run", lambda: adopt(scratch / "run"))
    assert not harness.misordered(steps)
    for where in harness.power_losses(prepared, steps, scratch / "left"):
        examine(scratch / "left", where)
