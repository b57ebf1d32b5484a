"""A push and a pull are killed before their durable steps, one after the other. Whatever is left must be whole:
both stores clean, every ref at its old or its new value, and doing it again ends where it should.

In the suite at every third step; at every one by hand: LLMOS_CRASH=all pytest tests/crash
"""

import os
import random
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import pytest

from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.manifest import Manifest
from llmos_cli.formats.names import RefName, parse_ref
from llmos_cli.progress import Silent
from llmos_cli.remote.exchange import clone
from llmos_cli.remote.exchange.pull import execute_pull, plan_pull
from llmos_cli.remote.exchange.push import execute_push, plan_push
from llmos_cli.remote.open import Remote
from llmos_cli.remote.transports.folder import FolderTransport
from llmos_cli.store.disk import durable
from llmos_cli.store.fsck.fsck import check
from llmos_cli.store.handle import Store
from llmos_cli.store.local import init_store, open_store
from llmos_cli.store.packs.objects import read_file, read_manifest
from llmos_cli.store.refs.refs import list_refs, read_ref
from llmos_cli.store.transaction import begin

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")]

REFS: Final = {"web": 3, "part": 1}  # the number of files of each at its new value


@contextmanager
def opened(folder: Path, name: str) -> Iterator[Store]:
    with open_store(folder / name) as store:
        yield store


def nas(folder: Path) -> Remote:
    return Remote("nas", FolderTransport(folder / "nas"))


def push(folder: Path) -> None:
    with opened(folder, "here") as store:
        execute_push(store, nas(folder), plan_push(store, nas(folder), None, force=False), Silent())


def pull(folder: Path) -> None:
    with opened(folder, "other") as store:
        execute_pull(store, nas(folder), plan_pull(store, nas(folder), None, force=False), Silent())


def commit(store: Store, ref: str, *seeds: int) -> None:
    with begin(store, purpose="test", ref=parse_ref(ref)) as tx:
        files = tuple(tx.add_bytes(f"{seed}.bin", random.Random(seed).randbytes(20_000)) for seed in seeds)
        tx.commit(Manifest("files", files), message="add")


def values(store: Store) -> dict[RefName, ObjectId]:
    return {entry.ref: entry.id for entry in list_refs(store)}


def problems(store: Store) -> list[str]:
    return [f"{item.where}: {item.what}" for item in check(store, quick=False, progress=Silent()).problems]


def read_all(store: Store, ref: str) -> dict[str, bytes]:
    entry = read_ref(store, parse_ref(ref))
    assert entry
    return {item.path: read_file(store, item) for item in read_manifest(store, entry.id).files}


def expected(ref: str) -> dict[str, bytes]:
    seeds = {"web": (1, 2, 3), "part": (11,)}[ref]
    return {f"{seed}.bin": random.Random(seed).randbytes(20_000) for seed in seeds}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent does not wait for the disk either."""

    class Hasty:
        def __getattr__(self, name: str) -> Any:
            return (lambda _: None) if name in ("fsync", "fdatasync") else getattr(os, name)

    monkeypatch.setattr(durable, "os", Hasty())


@pytest.fixture
def before(scratch: Path, quick: None) -> Path:
    """A remote and a second store with the old value of `web`; `here` with its new one and with `part`, which needs a
    few frames of a bigger pack, so that one pack travels whole and one is made for the journey."""
    folder = scratch / "before"
    with ExitStack() as stack:
        for name in ("here", "other"):
            init_store(folder / name)
        here = stack.enter_context(opened(folder, "here"))
        commit(here, "web", 1)
        push(folder)
        pull(folder)
        commit(here, "web", 1, 2, 3)
        commit(here, "unpushed", *range(11, 18))
        commit(here, "part", 11)
    shutil.rmtree(folder / "here/refs/unpushed")
    return folder


def test_a_push_killed_at_any_step(before: Path, scratch: Path, harness: ModuleType) -> None:
    with opened(before, "here") as here, opened(before, "nas") as there:
        new, old = values(here), values(there)

    def examine(folder: Path, where: str) -> None:
        with opened(folder, "here") as here, opened(folder, "nas") as there:
            assert values(here) == new, where
            assert problems(here) == problems(there) == [], where
            for ref, oid in values(there).items():
                assert oid in (old.get(ref), new[ref]), where
        push(folder)
        with opened(folder, "here") as here, opened(folder, "nas") as there:
            assert values(there) == new, where
            assert problems(here) == problems(there) == [], where
            assert all(read_all(there, ref) == expected(ref) for ref in REFS), where

    assert harness.sweep(before, scratch / "now", push, examine, every=harness.usually(3)) > 20


def test_a_first_push_killed_at_any_step(before: Path, scratch: Path, harness: ModuleType) -> None:
    shutil.rmtree(before / "nas")

    def examine(folder: Path, where: str) -> None:
        if (folder / "nas/FORMAT").exists():
            with opened(folder, "nas") as there:
                assert problems(there) == [], where
        push(folder)
        with opened(folder, "here") as here, opened(folder, "nas") as there:
            assert values(there) == values(here), where
            assert problems(there) == [], where

    assert harness.sweep(before, scratch / "now", push, examine, every=harness.usually(3)) > 40


def test_a_pull_killed_at_any_step(before: Path, scratch: Path, harness: ModuleType) -> None:
    with opened(before, "other") as other:
        old = values(other)
    push(before)
    with opened(before, "nas") as there:
        new = values(there)

    def examine(folder: Path, where: str) -> None:
        with opened(folder, "other") as other:
            assert problems(other) == [], where
            for ref, oid in values(other).items():
                assert oid in (old.get(ref), new[ref]), where
            arrived = set(other.index.packs())
        pull(folder)
        with opened(folder, "other") as other, opened(folder, "nas") as there:
            assert values(other) == values(there) == new, where
            assert problems(other) == problems(there) == [], where
            assert all(read_all(other, ref) == expected(ref) for ref in REFS), where
            assert arrived <= set(other.index.packs()), where

    assert harness.sweep(before, scratch / "now", pull, examine, every=harness.usually(3)) > 10


def test_a_clone_killed_at_any_step(before: Path, scratch: Path, harness: ModuleType) -> None:
    def work(folder: Path) -> None:
        plan = clone.plan_clone("nas", Path("copy"), folder, Silent())
        clone.execute_clone(plan, Silent())

    with opened(before, "nas") as there:
        new = values(there)

    def examine(folder: Path, where: str) -> None:
        if not (folder / "copy/.llmos/FORMAT").exists():
            work(folder)  # it had not begun, so it can be begun again
        with opened(folder, "copy/.llmos") as copy:
            assert problems(copy) == [], where
            assert set(copy.config.remotes) == {clone.ORIGIN}, where
            execute_pull(copy, nas(folder), plan_pull(copy, nas(folder), None, force=False), Silent())
            assert values(copy) == new, where
            assert problems(copy) == [], where

    assert harness.sweep(before, scratch / "now", work, examine, every=harness.usually(3)) > 20
