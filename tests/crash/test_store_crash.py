"""The store is stopped at every step of everything it does: by kill, by power loss, by a disk that is full or broken.
Whatever is left must open, pass fsck, hold every value that was acknowledged byte for byte, and let the work be done
again.

The suite kills at every step; of what a power loss may leave it tries every third, of what a bad disk may refuse every
second. Everything, by hand: LLMOS_CRASH=all pytest tests/crash
"""

import errno
import os
import random
import shutil
import signal
import time
import warnings
from array import array
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import pytest

from llmos_cli.errors import Conflict, Damaged, LlmosError, NoSpace, NotFound
from llmos_cli.formats import limits
from llmos_cli.formats.frame import MANIFEST
from llmos_cli.formats.manifest import Manifest
from llmos_cli.formats.names import RefName, parse_ref
from llmos_cli.formats.safetensors import encode_header
from llmos_cli.progress import Silent
from llmos_cli.remote.exchange.repair import find_sources, repair
from llmos_cli.store.checkout import execute_checkout, plan_checkout
from llmos_cli.store.disk import durable
from llmos_cli.store.fsck.fsck import check
from llmos_cli.store.fsck.settings import mend_settings
from llmos_cli.store.gc.gc import execute_gc, plan_gc
from llmos_cli.store.gc.repack import execute_repack, plan_repack
from llmos_cli.store.gc.undelete import execute_undelete, plan_undelete
from llmos_cli.store.intake.add import execute_add, plan_add
from llmos_cli.store.local import Store, init_store, open_store
from llmos_cli.store.packs.objects import read_file, read_manifest
from llmos_cli.store.packs.packs import list_packs, read_pack, sync_index
from llmos_cli.store.refs.point import point
from llmos_cli.store.refs.refs import delete_ref, list_refs, read_ref
from llmos_cli.store.transaction import Tensor, begin

pytestmark = pytest.mark.slow

DAY: Final = 86400.0
Content = dict[str, bytes]
State = dict[str, Content]  # ref -> its files


def noise(seed: int, size: int = 30_000) -> bytes:
    return random.Random(seed).randbytes(size)


def commit(store: Store, name: str, content: Content) -> None:
    with begin(store, purpose="test", ref=parse_ref(name)) as tx:
        files = tuple(tx.add_bytes(path, data) for path, data in content.items())
        tx.commit(Manifest("files", files), message=f"commit {name}")


def save(store: Store, step: int) -> None:
    """A checkpoint as `train` makes it: the tokenizer is taken over, the tensors move a little, the position is new."""
    old = read_ref(store, RefName("run", "checkpoint"))
    kept = [entry for entry in read_manifest(store, old.id).files if entry.path == "tokenizer.json"] if old else []
    with begin(store, purpose="checkpoint", ref=RefName("run", "checkpoint")) as tx:
        files = kept or [tx.add_bytes("tokenizer.json", noise(7))]
        files.append(tx.add_bytes("config.json", b"{}"))
        files.append(tx.add_tensors("model.safetensors", [tensor("embedding", 0), tensor("head", step)]))
        files.append(tx.add_tensors("training/state.safetensors", [tensor("exp_avg.head", 100 + step)]))
        files.append(tx.add_bytes("training/state.json", b'{"step":%d}' % step))
        tx.commit(Manifest("checkpoint", tuple(files)), message=f"step {step}")


@cache
def tensor(name: str, seed: int) -> Tensor:
    """Floats of which a few thousandths are new with each seed."""
    words = array("f", (random.Random(1).gauss(0, 0.02) for _ in range(8000)))
    generator = random.Random(seed)
    for _ in range(40):
        words[generator.randrange(len(words))] = generator.gauss(0, 0.02)
    data = words.tobytes()
    return Tensor(name, "F32", (len(words),), lambda: data)


def remove(store: Store, name: str) -> None:
    entry = read_ref(store, parse_ref(name))
    if entry:
        delete_ref(store, parse_ref(name), expected=entry.id)


def collect(store: Store, grace: float) -> None:
    execute_gc(store, plan_gc(store, grace_seconds=grace), Silent())


def state(store: Store) -> State:
    return {
        str(entry.ref): {file.path: read_file(store, file) for file in read_manifest(store, entry.id).files}
        for entry in list_refs(store)
    }


def problems(store: Store) -> list[str]:
    return [f"{item.where}: {item.what}" for item in check(store, quick=False, progress=Silent()).problems]


def age(store: Store, seconds: float = 30 * DAY) -> None:
    then = time.time() - seconds
    for folder in (store.packs, store.trash, store.tmp, store.leases):
        for path in (*folder.glob("**/*.pack"), *folder.glob("ref-*"), *folder.glob(".tmp-*")):
            os.utime(path, (then, then))


OLD: Final[Content] = {"config.json": b"{}", "weights": noise(1), "state": noise(2), "empty": b""}
OTHER: Final[Content] = {"notes": noise(5), "sub/deep": b"text " * 500}


@dataclass(frozen=True)
class Scenario:
    """Something the store does. `prepare` fills an empty store, `act` is what is interrupted; afterwards every ref has
    its value from before or from after."""

    prepare: Callable[[Store], None]
    act: Callable[[Store], None]


def prepare_refs(store: Store) -> None:
    commit(store, "run", OLD)
    commit(store, "other", OTHER)


def prepare_garbage(store: Store) -> None:
    """Dead packs, one that is mostly dead, one that waits in the trash, a removed ref, a leftover."""
    for number in range(2):
        commit(store, f"dead{number}", {"f": noise(20 + number)})
    commit(store, "trashed", {"f": noise(30)})
    remove(store, "trashed")
    age(store)
    collect(store, DAY)
    assert list_packs(store.trash)
    commit(store, "mixed", OTHER | {"big": noise(31, 90_000), "more": noise(32)})
    prepare_refs(store)
    for name in ("mixed", "dead0", "dead1"):
        remove(store, name)
    (store.tmp / ".tmp-leftover").write_bytes(b"half a pack")
    age(store)


def prepare_trash(store: Store) -> None:
    """What a gc leaves that was stopped before it looked again: packs in the trash that are needed."""
    prepare_refs(store)
    for path in list_packs(store.packs).values():
        path.rename(store.trash / path.name)


def commit_many(store: Store) -> None:
    commit(store, "new", {f"f{number}": noise(50 + number, 60_000) for number in range(3)})


def tag(store: Store) -> None:
    entry, other = read_ref(store, RefName("run")), read_ref(store, RefName("other"))
    assert entry is not None
    assert other is not None
    point(store, RefName("run"), other.id, expected=entry.id, message="tag")


def prepare_removed(store: Store) -> None:
    """What is to be pointed to again was removed, and is in the trash."""
    prepare_refs(store)
    remove(store, "other")
    age(store)
    collect(store, DAY)
    assert list_packs(store.trash)


def tag_removed(store: Store) -> None:
    run = read_ref(store, RefName("run"))
    assert run is not None
    sync_index(store)
    trashed = (entry for path in list_packs(store.trash).values() for entry in read_pack(path).entries)
    found = {*store.index.manifests(), *(entry.id for entry in trashed if entry.kind == MANIFEST)}
    (oid,) = found - {run.id}
    point(store, RefName("back"), oid, expected=None, message="tag")


def prepare_source(store: Store) -> None:
    """A model that resembles one in the store, and shares a file with another."""
    prepare_refs(store)
    save(store, 1)
    source = store.root.parent / "source"
    if not source.exists():
        (source / "sub").mkdir(parents=True)
        words = tensor("head", 2).data()
        header = encode_header([("embedding", "F32", (8000,)), ("head", "F32", (8000,))], {})
        (source / "model.safetensors").write_bytes(header + tensor("embedding", 0).data() + words)
        (source / "config.json").write_bytes(b"{}")
        (source / "sub" / "weights").write_bytes(noise(1))
        (source / "sub" / "empty").touch()
        for path in source.glob("**/*"):
            os.utime(path, (1e9, 1e9))


def prepare_unpacked(store: Store) -> None:
    """Small packs, a partly dead one, and a base that only lives on because others rest on it."""
    commit(store, "mixed", {"notes": noise(5), "big": noise(31, 20_000)})
    commit(store, "other", {"notes": noise(5)})
    remove(store, "mixed")
    for step in (1, 2):
        save(store, step)
    entry = read_ref(store, RefName("run", "checkpoint"))
    assert entry is not None
    point(store, RefName("kept"), entry.id, expected=None, message="keep")
    remove(store, "run:checkpoint")
    age(store)
    assert plan_repack(store, grace_seconds=0).packs


def repack(store: Store) -> None:
    execute_repack(store, plan_repack(store, grace_seconds=0), Silent())


def undelete(store: Store) -> None:
    execute_undelete(store, plan_undelete(store))


def add(store: Store) -> None:
    execute_add(store, plan_add([store.root.parent / "source"]), RefName("run"), Silent())


def read_all(store: Store) -> None:
    state(store)


SCENARIOS: Final = {
    "first commit": Scenario(lambda store: None, lambda store: commit(store, "run", OLD)),
    "commit of several packs": Scenario(prepare_refs, commit_many),
    "checkpoint": Scenario(lambda store: save(store, 1), lambda store: save(store, 2)),
    "add": Scenario(prepare_source, add),
    "tag": Scenario(prepare_refs, tag),
    "tag what was removed": Scenario(prepare_removed, tag_removed),
    "remove": Scenario(prepare_refs, lambda store: remove(store, "other")),
    "gc": Scenario(prepare_garbage, lambda store: collect(store, DAY)),
    "gc at once": Scenario(prepare_garbage, lambda store: collect(store, 0)),
    "repack": Scenario(prepare_unpacked, repack),
    "undelete": Scenario(prepare_removed, undelete),
    "bring back": Scenario(prepare_trash, read_all),
}


@pytest.fixture(autouse=True)
def small_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PACK_TARGET_BYTES", 100_000)


@dataclass(frozen=True)
class Prepared:
    """A store before the work, and what its refs hold before and after it."""

    root: Path
    scenario: Scenario
    before: State
    after: State

    def act(self, root: Path) -> None:
        with open_store(root) as store:
            self.scenario.act(store)

    def examine(self, root: Path, where: str, *, done: bool = False) -> None:
        """What an interruption left must be whole, old or new (new if it was `done`), and fit to go on with."""
        with open_store(root) as store:
            assert problems(store) == [], where
            now = state(store)
            for ref in self.before.keys() | self.after.keys():
                allowed = (self.before.get(ref), self.after.get(ref)) if where and not done else (self.after.get(ref),)
                assert now.get(ref) in allowed, f"{where}: {ref}"
        with suppress(Conflict, NotFound):  # what was done already cannot always be done again
            self.act(root)
        with open_store(root) as store:
            assert state(store) == self.after, where
            age(store)
            collect(store, 0)
            collect(store, 0)
            assert problems(store) == [], where
            assert state(store) == self.after, where
            assert not list_packs(store.trash), where
            assert not list(store.tmp.iterdir()), where
            assert not list(store.leases.iterdir()), where


@pytest.fixture(params=SCENARIOS)
def prepared(request: pytest.FixtureRequest, scratch: Path) -> Prepared:
    scenario = SCENARIOS[request.param]
    root = scratch / "before"
    init_store(root)
    with open_store(root) as store:
        scenario.prepare(store)
    twin = scratch / "twin"
    shutil.copytree(root, twin)
    with open_store(twin) as store:
        before = state(store)
    shutil.rmtree(twin)
    shutil.copytree(root, twin)
    with open_store(twin) as store:
        scenario.act(store)
        after = state(store)
    return Prepared(root, scenario, before, after)


def test_killed_at_any_step(prepared: Prepared, harness: ModuleType, scratch: Path) -> None:
    assert harness.sweep(prepared.root, scratch / "now", prepared.act, prepared.examine) >= 5


@pytest.mark.parametrize(("error", "kind"), [(errno.ENOSPC, NoSpace), (errno.EIO, Damaged)], ids=["full", "broken"])
def test_any_step_may_fail(
    prepared: Prepared, harness: ModuleType, scratch: Path, error: int, kind: type[LlmosError]
) -> None:
    """A full disk stays full, a broken one fails once. The process lives on, so nothing may stay open either."""
    leftovers = len(list(prepared.root.glob("tmp/.tmp-*")))
    outcome = None

    def stopped_at(number: int, work: Callable[[], object]) -> bool:
        nonlocal outcome
        files = open_files()
        outcome = harness.failing_at(number, error, work)
        assert open_files() == files, f"step {number}: {outcome.step}"
        return bool(outcome.step)

    def examine(root: Path, where: str) -> None:
        assert outcome is not None
        where = where and f"{where}: {outcome.step}"
        assert outcome.raised is None or type(outcome.raised) is kind, where
        # Only what could not be removed may be left: a temporary file, or a lease, which ends with its process.
        spared = 1 if outcome.step == "unlink" else 0
        leases = list(root.glob("leases/*"))
        assert len(list(root.glob("tmp/.tmp-*"))) - leftovers + len(leases) <= spared, where
        for lease in leases:
            lease.unlink()
        prepared.examine(root, where, done=outcome.raised is None)

    every = harness.usually(2)
    assert harness.sweep(prepared.root, scratch / "now", prepared.act, examine, stopped_at, every=every) >= 5


def open_files() -> int:
    return len(os.listdir("/dev/fd"))


def test_power_lost_at_any_step(prepared: Prepared, harness: ModuleType, scratch: Path) -> None:
    root = scratch / "recorded"
    shutil.copytree(prepared.root, root)
    steps = harness.record(root, lambda: prepared.act(root))
    assert harness.misordered(steps) == []
    for where in harness.power_losses(prepared.root, steps, scratch / "now", every=harness.usually(3)):
        prepared.examine(scratch / "now", where)


def test_a_folder_that_vanishes_behind_a_move(harness: ModuleType, scratch: Path) -> None:
    """Two tags of one name are removed at once: whoever is second also removes the folder of both."""

    def step(name: str, real: Callable[..., Any], *args: Any, **more: Any) -> Any:
        result = real(*args, **more)
        if name == "rename":
            os.rmdir(os.path.dirname(args[0]))
        return result

    init_store(scratch / "store")
    with open_store(scratch / "store") as store:
        commit(store, "run:tag", OLD)
        with harness.watched(step):
            remove(store, "run:tag")
        assert state(store) == {}


def test_making_a_store_is_killed_at_any_step(harness: ModuleType, scratch: Path) -> None:
    (scratch / "before").mkdir()

    def examine(folder: Path, where: str) -> None:
        with suppress(NotFound):
            open_store(folder / "store").close()
        init_store(folder / "store")
        with open_store(folder / "store") as store:
            commit(store, "x", {"f": b"1"})
            assert problems(store) == [], where

    made = harness.sweep(scratch / "before", scratch / "now", lambda folder: init_store(folder / "store"), examine)
    assert made > 15


def test_a_checkout_killed_at_any_step(harness: ModuleType, scratch: Path) -> None:
    content = OLD | {"sub/a": noise(7, 200_000), "sub/deep/b": b"", "sub/deep/c": b"c"}
    before = scratch / "before"
    init_store(before / "store")
    with open_store(before / "store") as store:
        commit(store, "run", content)
    (before / "out" / "sub").mkdir(parents=True)
    (before / "out" / "sub" / "a").write_bytes(b"old")

    def work(folder: Path) -> None:
        with open_store(folder / "store") as store:
            entry = read_ref(store, RefName("run"))
            assert entry is not None
            plan = plan_checkout(read_manifest(store, entry.id), folder / "out", force=True)
            execute_checkout(store, plan, Silent())

    def examine(folder: Path, where: str) -> None:
        found = {
            str(path.relative_to(folder / "out")): path.read_bytes()
            for path in (folder / "out").glob("**/*")
            if path.is_file() and not path.name.startswith(".tmp-")
        }
        for path, data in found.items():
            assert data in (content[path], b"old"), f"{where}: {path} is neither old nor new"
        work(folder)
        assert all((folder / "out" / path).read_bytes() == data for path, data in content.items())

    assert harness.sweep(before, scratch / "now", work, examine) > 15
    root = scratch / "recorded"
    shutil.copytree(before, root)
    assert harness.misordered(harness.record(root, lambda: work(root))) == []


def test_a_repair_killed_at_any_step(harness: ModuleType, scratch: Path) -> None:
    """Of four packs one has a flipped bit, one is gone, one lacks its end; a move and config.toml have a flipped bit. A
    copy has all. Nothing gets worse, and the next repair ends where it should."""
    before = scratch / "before"
    init_store(before / "store")
    with open_store(before / "store") as store:
        for number in range(4):
            commit(store, f"r{number}", {"f": noise(number)})
        names = sorted(list_packs(store.packs).values())
        whole = state(store)
    shutil.copytree(before / "store", before / "copy")
    flip(names[0], 9000)
    names[1].unlink()
    names[2].chmod(0o644)
    os.truncate(names[2], names[2].stat().st_size - 70)
    flip(before / "store" / "refs" / "r3" / "latest" / "0000000001", 30)
    flip(before / "store" / "config.toml", 3)

    def work(folder: Path) -> None:
        mend_settings(folder / "store")
        with open_store(folder / "store") as store:
            repair(store, find_sources(store, [str(folder / "copy")], folder), quick=False, progress=Silent())

    def hurt(folder: Path) -> int:
        mend_settings(folder / "store")
        with open_store(folder / "store") as store:
            return len(problems(store))

    shutil.copytree(before, scratch / "twin")
    worst = hurt(scratch / "twin")
    assert worst >= 4

    def examine(folder: Path, where: str) -> None:
        assert hurt(folder) <= (worst if where else 0), where
        work(folder)
        with open_store(folder / "store") as store:
            assert problems(store) == [], where
            assert state(store) == whole, where

    assert harness.sweep(before, scratch / "now", work, examine, every=harness.usually(2)) > 20


def flip(path: Path, at: int) -> None:
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_killed_fifty_times_at_random(scratch: Path) -> None:
    """A worker commits, tags, removes and collects as fast as it can; after each SIGKILL everything it had acknowledged
    must be there. What it was about to do when it died may have happened or not."""
    root = scratch / "store"
    init_store(root)
    generator = random.Random(20)
    known: dict[str, int | None] = {}
    acknowledged = 0
    for turn in range(50):
        seed = generator.randrange(1 << 30)
        told = _worked_and_killed(root, seed, 0.01 + 0.12 * generator.random())
        acknowledged += sum(line[0] == "done" for line in told)
        begun: tuple[str, int | None] | None = None
        for word, name, number in told:
            begun = (name, number) if word == "begin" else None
            if word == "done":
                known[name] = number
        with open_store(root, Silent()) as store:
            assert problems(store) == [], f"turn {turn}"
            now = state(store)
            for name, number in known.items():
                allowed = {number, begun[1]} if begun and begun[0] == name else {number}
                found = now.get(f"{name}:latest")
                assert found in [None if item is None else _numbered(item) for item in allowed], f"turn {turn}: {name}"
                known[name] = next(item for item in allowed if found == (None if item is None else _numbered(item)))
            if begun and begun[0] not in known and f"{begun[0]}:latest" in now:
                known[begun[0]] = begun[1]
            assert {f"{name}:latest" for name, number in known.items() if number is not None} == now.keys()
    assert acknowledged > 20


def _numbered(number: int) -> Content:
    return {"shared": noise(number % 7, 4000), "own": b"%d" % number * 300}


def _worked_and_killed(root: Path, seed: int, seconds: float) -> list[tuple[str, str, int | None]]:
    """Let a child work until it is killed; gives what it said it was about to do and had done."""
    pipe_out, pipe_in = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        with suppress(BaseException):
            os.close(pipe_out)
            _work(root, random.Random(seed), pipe_in)
        os._exit(1)
    os.close(pipe_in)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    with open(pipe_out, encoding="ascii") as pipe:
        lines = [line.split() for line in pipe.read().splitlines(keepends=True) if line.endswith("\n")]
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == -signal.SIGKILL, "the worker failed by itself"
    return [(word, name, None if number == "-" else int(number)) for word, name, number in lines]


def _work(root: Path, generator: random.Random, pipe: int) -> None:
    def say(word: str, name: str, number: int | None) -> None:
        os.write(pipe, f"{word} {name} {'-' if number is None else number}\n".encode())

    with open_store(root) as store:
        while True:
            name = generator.choice("abcde")
            number = generator.randrange(10_000)
            action = generator.random()
            if action < 0.7:
                say("begin", name, number)
                commit(store, name, _numbered(number))
                say("done", name, number)
            elif action < 0.8:
                say("begin", name, None)
                remove(store, name)
                say("done", name, None)
            else:
                collect(store, generator.choice((0, 0, 3600)))


def test_gc_in_a_loop_beside_writers_and_readers(scratch: Path) -> None:
    """For some seconds one process collects with no grace at all, while two add, read, remove and add again the very
    same content: no value that was acknowledged may ever be broken."""
    root = scratch / "store"
    init_store(root)
    until = time.monotonic() + 4.0
    children = [_forked(_collect_until, root, until), *(_forked(_churn_until, root, until, n) for n in range(2))]
    failures = [text for child in children if (text := child())]
    assert failures == []
    with open_store(root) as store:
        assert problems(store) == []
        collect(store, 0)
        assert problems(store) == []
        state(store)


def _forked(work: Callable[..., None], *args: Any) -> Callable[[], str]:
    pipe_out, pipe_in = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            work(*args)
        except BaseException as exc:  # noqa: BLE001 - a child has nobody else to tell
            os.write(pipe_in, f"{work.__name__}: {type(exc).__name__}: {exc}".encode())
        os._exit(0)
    os.close(pipe_in)

    def answer() -> str:
        with open(pipe_out, encoding="utf-8") as pipe:
            text = pipe.read()
        os.waitpid(child, 0)
        return text

    return answer


def _collect_until(root: Path, until: float) -> None:
    with open_store(root) as store:
        while time.monotonic() < until:
            collect(store, 0)


def _churn_until(root: Path, until: float, number: int) -> None:
    """The same few contents again and again, so that what is added was often removed a moment ago."""
    generator = random.Random(number)
    with open_store(root) as store:
        while time.monotonic() < until:
            content = {f"f{seed}": noise(seed, 8000) for seed in generator.sample(range(6), 3)}
            name = f"w{number}"
            try:
                commit(store, name, content)
            except Damaged as exc:
                if "while it was being used" not in exc.message:  # the one honest way to lose the race
                    raise
                continue
            assert state_of(store, name) == content
            if generator.random() < 0.5:
                remove(store, name)


def state_of(store: Store, name: str) -> Content:
    entry = read_ref(store, parse_ref(name))
    assert entry is not None, f"{name} is gone"
    return {file.path: read_file(store, file) for file in read_manifest(store, entry.id).files}


@pytest.mark.parametrize("forgotten", ["folders", "files"])
def test_the_harness_sees_a_forgotten_fsync(
    harness: ModuleType, scratch: Path, monkeypatch: pytest.MonkeyPatch, forgotten: str
) -> None:
    """Or all of the above proves nothing."""
    init_store(scratch / "before")
    root = scratch / "recorded"
    shutil.copytree(scratch / "before", root)
    if forgotten == "folders":
        monkeypatch.setattr(durable, "_sync_folder", lambda path: None)
    with open_store(root) as store:
        steps = harness.record(root, lambda: commit(store, "run", OLD))
    monkeypatch.undo()
    if forgotten == "files":
        steps = [step for step in steps if step.name != "fsync" or "tmp" not in step.path]
    assert harness.misordered(steps)
    outcomes = set()
    for _ in harness.power_losses(scratch / "before", steps, scratch / "now"):
        with open_store(scratch / "now") as store:
            outcomes.add("damaged" if problems(store) else "sound")
    assert outcomes == {"sound", "damaged"}
