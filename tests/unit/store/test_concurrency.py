"""Writers, readers and several gcs at once, in real processes: never a dangling reference, never a lost update.

Everything is done three times: as it is; on a file system where locks do nothing (SQLite's are the only ones there
are: its index then breaks now and then, and must heal); and where in addition nobody sees a lease, so that nothing but
the order of steps keeps one process from another's objects.
"""

import contextlib
import os
import random
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from llmos_cli.errors import Busy, Conflict, Damaged
from llmos_cli.formats import limits
from llmos_cli.formats.manifest import Manifest
from llmos_cli.formats.names import RefName
from llmos_cli.progress import Silent
from llmos_cli.store import leases, transaction
from llmos_cli.store.gc.gc import execute_gc, plan_gc
from llmos_cli.store.leases import STALE_SECONDS
from llmos_cli.store.local import Store, open_store
from llmos_cli.store.packs import index
from llmos_cli.store.packs.objects import open_file, read_file, read_manifest
from llmos_cli.store.packs.packs import list_packs
from llmos_cli.store.refs import point
from llmos_cli.store.refs.refs import delete_ref, read_ref, ref_history
from llmos_cli.store.transaction import begin

REF = RefName("x")
FORKS = 15
Content = dict[str, bytes]
InProcesses = Callable[[int, Callable[[int], Any]], list[Any]]


@pytest.fixture(params=["as it is", "no locks", "no locks, no leases"])
def world(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the processes that a test forks can rely on."""
    if request.param != "as it is":
        monkeypatch.setattr(index, "sqlite3", _Lockless())
    if request.param == "no locks, no leases":
        monkeypatch.setattr(leases, "_lease_files", lambda store: [])
    return request.param


class _Lockless:
    """SQLite on a file system whose locks always succeed."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sqlite3, name)

    def connect(self, path: Path | str, **options: Any) -> sqlite3.Connection:
        if path == ":memory:":
            return sqlite3.connect(path, **options)
        return sqlite3.connect(f"file:{path}?vfs=unix-none", uri=True, **options)


@contextlib.contextmanager
def opened(store: Store) -> Iterator[Store]:
    with open_store(store.root, Silent()) as mine:
        yield mine


def commit(store: Store, name: str, content: Content) -> None:
    with begin(store, purpose="test", ref=RefName(name)) as tx:
        tx.commit(Manifest("files", tuple(tx.add_bytes(path, data) for path, data in content.items())), message="")


def again_if_taken(work: Callable[[], object]) -> bool:
    """Do it; False if a gc at once took what it was using, which it must have noticed."""
    try:
        work()
    except Damaged as exc:
        if "while it was being used" not in exc.message:
            raise
        return False
    return True


def remove(store: Store, name: str) -> None:
    entry = read_ref(store, RefName(name))
    assert entry
    delete_ref(store, RefName(name), expected=entry.id)


def collect(store: Store) -> None:
    with contextlib.suppress(Busy):
        execute_gc(store, plan_gc(store, grace_seconds=0), Silent())


def meet(store: Store, name: str, count: int) -> None:
    """Wait until that many processes are here."""
    folder = store.root / f"meet-{name}"
    folder.mkdir(exist_ok=True)
    (folder / str(os.getpid())).touch()
    while len(os.listdir(folder)) < count:
        time.sleep(0.002)


def test_of_32_processes_one_wins_each_round(store: Store, lab: Any, in_processes: InProcesses, world: str) -> None:
    """All have seen the same value and all commit: one gets 0, the others 17, and the log has every winner."""
    count, rounds = 32, 3

    def work(number: int) -> list[bool]:
        with opened(store) as mine:
            won = []
            for turn in range(rounds):
                with begin(mine, purpose="test", ref=REF) as tx:
                    meet(mine, f"{turn}-begun", count)
                    entry = tx.add_bytes("f", b"%d %d" % (turn, number))
                    try:
                        tx.commit(Manifest("files", (entry,)), message=f"{turn} {number}")
                        won.append(True)
                    except Conflict:  # exit code 17
                        won.append(False)
                meet(mine, f"{turn}-done", count)
        return won

    answers = in_processes(count, work)
    winners = [[number for number in range(count) if answers[number][turn]] for turn in range(rounds)]
    assert [len(numbers) for numbers in winners] == [1] * rounds
    with opened(store) as mine:
        log = ref_history(mine, REF)
        assert [move.message for move in reversed(log)] == [f"{turn} {winners[turn][0]}" for turn in range(rounds)]
        assert [move.previous for move in log] == [move.id for move in log[1:]] + [None]
        lab.sound(mine)


def test_who_loses_and_tries_again_gets_into_the_log(
    store: Store, lab: Any, in_processes: InProcesses, world: str
) -> None:
    def work(number: int) -> int:
        with opened(store) as mine:
            for tries in range(1, 1000):
                try:
                    commit(mine, "x", {"f": b"%d" % number})
                    return tries
                except Conflict:
                    time.sleep(random.uniform(0, 0.02))
        raise AssertionError("it never got its turn")

    tries = in_processes(16, work)
    with opened(store) as mine:
        log = ref_history(mine, REF)
        assert {lab_file(mine, move.id) for move in log} == {b"%d" % number for number in range(16)}
        assert len(log) == 16
        assert max(tries) > 1
        lab.sound(mine)


def lab_file(store: Store, oid: Any) -> bytes:
    return read_file(store, read_manifest(store, oid).files[0])


@pytest.mark.slow
def test_writers_readers_and_gcs_at_once(
    store: Store, lab: Any, in_processes: InProcesses, world: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two gcs with no grace, two that add and remove the same few contents again and again (so that what they find in
    the store was often thrown away a moment ago), two that read: what was acknowledged can always be read."""
    monkeypatch.setattr(limits, "PACK_TARGET_BYTES", 30_000)
    until = time.monotonic() + 2.0
    kept = {f"f{seed}": lab.noise(8000, seed) for seed in range(9)}
    commit(store, "kept", kept)

    def work(number: int) -> int:
        return (collecting, collecting, churning, churning, reading, reading)[number](number)

    def collecting(number: int) -> int:
        with opened(store) as mine:
            count = 0
            while time.monotonic() < until:
                try:
                    count += again_if_taken(lambda: collect(mine))
                except Damaged as exc:  # a writer has moved its ref and not looked again yet: then a gc stops
                    if "leases" not in world or "cannot be read" not in exc.message:
                        raise
            return count

    def churning(number: int) -> int:
        generator = random.Random(number)
        with opened(store) as mine:
            count = 0
            while time.monotonic() < until:
                content = {f"f{seed}": lab.noise(8000, seed) for seed in generator.sample(range(6, 12), 3)}
                if again_if_taken(lambda content=content: commit(mine, f"w{number}", content)):
                    assert lab.read(f"w{number}", mine) == content
                    count += 1
                    if generator.random() < 0.5:
                        remove(mine, f"w{number}")
        return count

    def reading(number: int) -> int:
        count = 0
        while time.monotonic() < until:
            with opened(store) as mine:
                for _ in range(5):
                    assert lab.read("kept", mine) == kept
                    count += 1
        return count

    assert all(in_processes(6, work))
    with opened(store) as mine:
        lab.sound(mine)
        assert lab.read("kept", mine) == kept
        monkeypatch.undo()
        lab.gc(store=mine)
        lab.sound(mine)
        assert not list_packs(mine.trash)


def test_reading_what_a_gc_is_moving(
    store: Store, lab: Any, in_processes: InProcesses, world: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has a file open goes on reading it, though a gc has its pack rewritten and unlinked meanwhile."""
    monkeypatch.setattr(limits, "PACK_TARGET_BYTES", 10_000_000)
    for number in range(6):
        keep = {"keep": lab.noise(20_000, number)}
        lab.add(f"both{number}", keep | {"junk": lab.noise(60_000, 100 + number)})
        lab.add(f"keep{number}", keep)

    def work(number: int) -> int:
        with opened(store) as mine:
            if number == 0:
                meet(mine, "reading", 4)
                for turn in range(6):
                    remove(mine, f"both{turn}")
                    before = set(list_packs(mine.packs))
                    collect(mine)
                    assert set(list_packs(mine.packs)) - before, "no pack was rewritten"
                (mine.root / "done").touch()
                return 1
            readers = [open_file(mine, manifest_of(mine, f"keep{turn}").files[0]) for turn in range(6)]
            meet(mine, "reading", 4)
            rounds = 0
            while not (mine.root / "done").exists() or not rounds:
                for turn, reader in enumerate(readers):
                    data = memoryview(bytearray(20_000))
                    reader.readinto(0, data)
                    assert data == lab.noise(20_000, turn)
                rounds += 1
            return rounds

    assert all(in_processes(4, work))
    with opened(store) as mine:
        lab.sound(mine)


def manifest_of(store: Store, name: str) -> Manifest:
    entry = read_ref(store, RefName(name))
    assert entry
    return read_manifest(store, entry.id)


MOMENTS = {
    "adding": None,  # what it stops before
    "securing": (point, "secure"),
    "moving the ref": (transaction, "update_ref"),
    "looking again": (point, "confirm"),
}


@pytest.mark.parametrize("taken", ["what it found", "what it wrote"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_writer_stopped_for_an_hour(
    store: Store, lab: Any, monkeypatch: pytest.MonkeyPatch, moment: str, taken: str
) -> None:
    """SIGSTOP; its lease, of another host, goes stale; a gc with no grace takes all that no ref needs; SIGCONT. The
    writer either succeeds and everything is there, or fails, says so, and succeeds when it is run again."""
    old = {"f": lab.noise(50_000)}
    lab.add("kept", {"g": b"kept"})
    if taken == "what it found":
        lab.add("old", old)
        lab.remove("old")

    def stop() -> None:
        for path in store.leases.iterdir():
            path.write_text(path.read_text().replace(os.uname().nodename, "elsewhere"))
        os.kill(os.getpid(), signal.SIGSTOP)

    def writer() -> int:
        with opened(store) as mine:
            try:
                commit_and_stop(mine, old, moment, stop)
            except Damaged as exc:
                return exc.exit_code if "run the command again" in (exc.hint or "") else 98
        return 0

    child = forked(writer)
    _, status = os.waitpid(child, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    for path in store.leases.iterdir():
        lab.age(path, STALE_SECONDS + 60)
    lab.gc(grace=0)
    lab.gc(grace=0)
    assert lab.read("kept") == {"g": b"kept"}
    os.kill(child, signal.SIGCONT)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with opened(store) as mine:
        lab.sound(mine)
        assert code == (0 if moment == "looking again" or (moment, taken) == ("adding", "what it wrote") else 13)
        assert (read_ref(mine, REF) is not None) == (code == 0)
        commit(mine, "x", old)
        assert lab.read("x", mine) == old
        lab.sound(mine)


def commit_and_stop(store: Store, content: Content, moment: str, stop: Callable[[], None]) -> None:
    """Runs in a child, so what it replaces is replaced nowhere else."""
    if place := MOMENTS[moment]:
        module, name = place
        real = getattr(module, name)

        def stopping(*args: Any, **more: Any) -> Any:
            setattr(module, name, real)
            stop()
            return real(*args, **more)

        setattr(module, name, stopping)
    with begin(store, purpose="test", ref=REF) as tx:
        files = tuple(tx.add_bytes(path, data) for path, data in content.items())
        if moment == "adding":
            stop()
        tx.commit(Manifest("files", files), message="")


def forked(work: Callable[[], int]) -> int:
    child = os.fork()
    if child == 0:
        try:
            os._exit(work())
        except BaseException:  # noqa: BLE001 - nothing of the test runner may run in the child
            os._exit(99)
    return child


def test_packs_are_weighed_as_of_one_moment(store: Store, lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gc reads of many packs, one table after the other, while another process publishes one."""
    lab.add("x", {"f": b"1"})
    real = index._id
    with opened(store) as other:

        def id_read(value: object) -> Any:
            monkeypatch.setattr(index, "_id", real)
            commit(other, "y", {"f": b"2"})
            return real(value)

        monkeypatch.setattr(index, "_id", id_read)
        names, seen = store.index.over_copies(lambda names, copies, _: (names, {row[1] for row in copies}))
    assert index._id is real
    assert seen <= names.keys()
    assert lab.gc(grace=0).freed_bytes == 0
    lab.sound()


def test_forks_beside_threads_that_read_and_write(store: Store, lab: Any) -> None:
    """One open store and one open file, as a data loader has them: threads go on, and every child can use both."""
    data = lab.noise(3 << 20)
    lab.add("x", {"f": data})
    reader = open_file(store, manifest_of(store, "x").files[0])
    stop = threading.Event()

    def reading(seed: int) -> int:
        generator, count = random.Random(seed), 0
        while not stop.is_set():
            start = generator.randrange(len(data) - 100)
            assert reader.read(start, start + 100) == data[start : start + 100]
            count += 1
        return count

    def writing(seed: int) -> int:
        count = 0
        while not stop.is_set():
            commit(store, f"w{seed}", {"f": b"%d %d" % (seed, count)})
            count += 1
        return count

    def child() -> int:
        signal.alarm(20)  # or a lock that a thread held when we were made would be waited for in vain
        assert reader.read(1 << 20, 2 << 20) == data[1 << 20 : 2 << 20]
        commit(store, f"child{os.getpid()}", {"f": b"child"})
        return 0

    with ThreadPoolExecutor(3) as threads:
        jobs = [threads.submit(reading, 1), threads.submit(reading, 2), threads.submit(writing, 3)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(forked(child), 0)[1]) for _ in range(FORKS)]
        stop.set()
        assert all(job.result() for job in jobs)
    assert codes == [0] * FORKS
    lab.sound()
