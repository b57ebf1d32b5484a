"""A store and a dictionary are led through the same arbitrary life: what the dictionary says is there must be there.

Whatever is done, in whatever order, with a process killed at any of its durable steps in between: afterwards every
value of every ref, and every earlier one that `name~1`, `name~2`, ... still names, reads back byte for byte, and fsck
has nothing to say. Only of what was removed and came back no more than the last value is promised.

A longer life, by hand: pytest tests/property/test_store_machine.py --hypothesis-profile=llmos-long
"""

import importlib.util
import os
import random
import shutil
import sys
import tempfile
from array import array
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Final

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from llmos_cli.errors import Conflict, Damaged, NotFound
from llmos_cli.formats import limits
from llmos_cli.formats.manifest import Manifest
from llmos_cli.formats.names import RefName
from llmos_cli.progress import Silent
from llmos_cli.store.fsck.fsck import check
from llmos_cli.store.gc.gc import execute_gc, plan_gc
from llmos_cli.store.gc.repack import execute_repack, plan_repack
from llmos_cli.store.gc.undelete import execute_undelete, plan_undelete
from llmos_cli.store.local import Store, init_store, open_store
from llmos_cli.store.packs.objects import read_file, read_manifest
from llmos_cli.store.packs.packs import list_packs
from llmos_cli.store.refs.point import point
from llmos_cli.store.refs.refs import delete_ref, read_ref, ref_history
from llmos_cli.store.refs.resolve import resolve
from llmos_cli.store.transaction import Tensor, Transaction, begin

pytestmark = pytest.mark.slow

STEPS: Final = 25
MOST_DURABLE_STEPS: Final = 70  # of any one thing that is done here; who is to be killed later than that is done before
DAY: Final = 86400.0
NAMES: Final = ("a", "b", "c")
Content = dict[str, bytes]
Log = list[int | None]  # the numbers of a ref's contents, newest first; None: one that may be gone
Refs = dict[str, Log]

names = st.sampled_from(NAMES)
numbers = st.integers(0, 11)
graces = st.sampled_from((0.0, 0.0, DAY))
steps = st.integers(1, MOST_DURABLE_STEPS)


def _harness() -> ModuleType:
    path = Path(__file__).parents[1] / "crash" / "harness.py"
    spec = importlib.util.spec_from_file_location("crash_harness", path)
    assert spec
    assert spec.loader
    module = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
    if not hasattr(module, "killed_at"):
        spec.loader.exec_module(module)
    return module


HARNESS: Final = _harness()


@cache
def noise(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


@cache
def weights(number: int) -> bytes:
    """Floats of which a few hundredths are new with each number, so that one is stored as what changed of another."""
    words = array("f", (random.Random(1).gauss(0, 0.02) for _ in range(6000)))
    generator = random.Random(100 + number)
    for _ in range(60):
        words[generator.randrange(len(words))] = generator.gauss(0, 0.02)
    return words.tobytes()


def fill(tx: Transaction, number: int) -> Manifest:
    """Something shared with other numbers, something of its own, and for some weights that resemble others."""
    files = [tx.add_bytes("own", b"%d " % number * 100), tx.add_bytes("shared", noise(number % 3, 30_000))]
    if number % 2:
        tensor = Tensor("w", "F32", (6000,), lambda: weights(number))
        files.append(tx.add_tensors("w.safetensors", [tensor]))
    return Manifest("files", tuple(files))


def read(store: Store, target: str) -> Content:
    manifest = read_manifest(store, resolve(store, target).id)
    return {file.path: read_file(store, file) for file in manifest.files}


@cache
def content(number: int) -> Content:
    """What a number must read back as: taken from a store that nothing ever happens to."""
    with tempfile.TemporaryDirectory() as folder:
        init_store(Path(folder) / "store")
        with open_store(Path(folder) / "store") as store:
            add(store, "x", number)
            found = read(store, "x")
    assert found["own"] == b"%d " % number * 100
    assert found["shared"] == noise(number % 3, 30_000)
    assert number % 2 == 0 or found["w.safetensors"].endswith(weights(number))
    return found


def add(store: Store, name: str, number: int) -> None:
    with begin(store, purpose="test", ref=RefName(name)) as tx:
        tx.commit(fill(tx, number), message=str(number))


def move(store: Store, name: str, target: str) -> None:
    """Point a ref to what another, or a value of its own from before, names."""
    entry = read_ref(store, RefName(name))
    oid = resolve(store, target).id
    point(store, RefName(name), oid, expected=entry.id if entry else None, message="tag")


def remove(store: Store, name: str) -> None:
    entry = read_ref(store, RefName(name))
    assert entry
    delete_ref(store, RefName(name), expected=entry.id)


def collect(store: Store, grace: float) -> None:
    execute_gc(store, plan_gc(store, grace_seconds=grace), Silent())


def repack(store: Store, grace: float) -> None:
    execute_repack(store, plan_repack(store, grace_seconds=grace), Silent())


class Life(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.folder = Path(tempfile.mkdtemp(prefix="llmos-life-", dir=memory))
        init_store(self.folder / "store")
        self.store = open_store(self.folder / "store", Silent())
        self.refs: Refs = {}
        self.removed: list[tuple[str, Log]] = []

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)

    def moved(self, name: str, number: int | None) -> Refs:
        """The refs after one has moved; to where it is already is no move."""
        log = self.refs.get(name, [])
        assert number is not None
        return {**self.refs, name: log if log[:1] == [number] else [number, *log]}

    # ------------------------------------------------------------------------------ what people do

    @initialize(number=numbers)
    def begin_with_something(self, number: int) -> None:
        self.add("a", number)

    @rule(name=names, number=numbers)
    def add(self, name: str, number: int) -> None:
        add(self.store, name, number)
        self.refs = self.moved(name, number)

    @precondition(lambda self: self.refs)
    @rule(data=st.data(), name=names)
    def tag(self, data: st.DataObject, name: str) -> None:
        source = data.draw(st.sampled_from(sorted(self.refs)))
        move(self.store, name, source)
        self.refs = self.moved(name, self.refs[source][0])

    @precondition(lambda self: self.undoable())
    @rule(data=st.data())
    def undo(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.undoable()))
        move(self.store, name, f"{name}~1")
        self.refs = self.moved(name, self.refs[name][1])

    @precondition(lambda self: self.refs)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.refs)))
        remove(self.store, name)
        self.removed.append((name, self.refs[name]))
        self.refs = self.without(name)

    @rule(name=names)
    def bring_back(self, name: str) -> None:
        """A ref that was removed, if nothing is in its place and everything it needs is in the trash yet."""
        try:
            done = execute_undelete(self.store, plan_undelete(self.store, [RefName(name)]))
        except (Conflict, NotFound):
            return
        if done.refs:
            log = self.logs()[name]
            assert any(name == other and log[0] == old[0] for other, old in self.removed)
            self.refs = {**self.refs, name: [log[0], *([None] * (len(log) - 1))]}

    @rule(grace=graces)
    def repack(self, grace: float) -> None:
        repack(self.store, grace)

    @rule(grace=graces)
    def collect(self, grace: float) -> None:
        collect(self.store, grace)

    @rule(name=names, number=numbers, grace=graces)
    def add_while_another_process_collects(self, name: str, number: int, grace: float) -> None:
        """Between the first chunk and the commit; what is found in the store then may be what the other takes."""
        try:
            with begin(self.store, purpose="test", ref=RefName(name)) as tx:
                manifest = fill(tx, number)
                assert not HARNESS.killed_at(10_000, lambda: self.elsewhere(lambda store: collect(store, grace)))
                tx.commit(manifest, message=str(number))
        except Damaged as exc:
            if "while it was being used" not in exc.message:  # the one honest way to lose the race
                raise
            return
        self.refs = self.moved(name, number)

    # ------------------------------------------------------------------------------ what happens to them

    @rule(name=names, number=numbers, step=steps)
    def killed_while_adding(self, name: str, number: int, step: int) -> None:
        self.killed(step, lambda store: add(store, name, number), self.moved(name, number))

    @precondition(lambda self: self.refs)
    @rule(data=st.data(), name=names, step=steps)
    def killed_while_tagging(self, data: st.DataObject, name: str, step: int) -> None:
        source = data.draw(st.sampled_from(sorted(self.refs)))
        after = self.moved(name, self.refs[source][0])
        self.killed(step, lambda store: move(store, name, source), after)

    @precondition(lambda self: self.refs)
    @rule(data=st.data(), step=st.integers(1, 12))
    def killed_while_removing(self, data: st.DataObject, step: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.refs)))
        self.removed.append((name, self.refs[name]))
        self.killed(step, lambda store: remove(store, name), self.without(name))

    @rule(grace=graces, step=steps)
    def killed_while_repacking(self, grace: float, step: int) -> None:
        self.killed(step, lambda store: repack(store, grace), self.refs)

    @rule(grace=graces, step=steps)
    def killed_while_collecting(self, grace: float, step: int) -> None:
        self.killed(step, lambda store: collect(store, grace), self.refs)

    @rule(hours=st.sampled_from((2, 30)))
    def time_passes(self, hours: int) -> None:
        for folder in (self.store.packs, self.store.trash, self.store.tmp):
            for path in (*folder.glob("**/*.pack"), *folder.glob("ref-*"), *folder.glob(".tmp-*")):
                then = path.lstat().st_mtime - hours * 3600
                os.utime(path, (then, then), follow_symlinks=False)

    @rule()
    def everything_is_in_the_trash(self) -> None:
        """As a gc leaves it that went by a list of refs from before, and died before it looked again."""
        for path in list_packs(self.store.packs).values():
            path.rename(self.store.trash / path.name)

    @rule(lost=st.booleans())
    def the_index_is_gone_or_broken(self, lost: bool) -> None:
        self.store.close()
        for path in self.store.root.glob("index.db*"):
            path.unlink() if lost else path.write_bytes(b"\0" * 5000)
        self.store = open_store(self.store.root, Silent())

    # ------------------------------------------------------------------------------ what must be so

    def elsewhere(self, work: Callable[[Store], object]) -> None:
        with open_store(self.store.root, Silent()) as store:
            work(store)

    def killed(self, step: int, work: Callable[[Store], object], after: Refs) -> None:
        before, self.refs = self.refs, after
        if HARNESS.killed_at(step, lambda: self.elsewhere(work)):
            lengths = {name: len(log) for name, log in self.logs().items()}
            if lengths != {name: len(log) for name, log in after.items()}:
                self.refs = before

    def undoable(self) -> list[str]:
        return sorted(name for name, log in self.refs.items() if len(log) > 1 and log[1] is not None)

    def without(self, name: str) -> Refs:
        return {other: log for other, log in self.refs.items() if other != name}

    def logs(self) -> Refs:
        """The refs as the store has them, by what their contents say of themselves."""
        found: Refs = {}
        for name in NAMES:
            if read_ref(self.store, RefName(name)):
                found[name] = []
                for back in range(len(ref_history(self.store, RefName(name)))):
                    try:
                        found[name].append(int(read(self.store, f"{name}~{back}")["own"].split()[0]))
                    except Damaged:
                        found[name].append(None)
        return found

    @invariant()
    def what_should_be_there_is_there(self) -> None:
        assert {name for name in NAMES if read_ref(self.store, RefName(name))} == self.refs.keys()
        for name, log in self.refs.items():
            assert len(ref_history(self.store, RefName(name))) == len(log)
            for back, number in enumerate(log):
                assert number is None or read(self.store, f"{name}~{back}") == content(number), f"{name}~{back}"
        report = check(self.store, quick=False, progress=Silent())
        assert not report.problems


def test_the_store_is_what_a_dictionary_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PACK_TARGET_BYTES", 40_000)
    many = settings(
        max_examples=max(1, settings.default.max_examples // 5),
        stateful_step_count=STEPS,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Life, settings=many)
