"""Giving space back at a remote: what goes and what stays, and that nobody loses anything meanwhile."""

import os
import random
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import store_servers

from llmos_cli.errors import Damaged, RemoteUnavailable, Unsafe
from llmos_cli.formats.ids import ObjectId, object_id
from llmos_cli.formats.manifest import Manifest
from llmos_cli.formats.names import parse_ref
from llmos_cli.progress import Silent
from llmos_cli.remote.backup.backup import execute_backup, execute_prune, plan_backup
from llmos_cli.remote.backup.snapshots import list_snapshots
from llmos_cli.remote.exchange.prune import remove_there
from llmos_cli.remote.exchange.pull import execute_pull, plan_pull
from llmos_cli.remote.exchange.push import execute_push, plan_push
from llmos_cli.remote.exchange.refs import read_remote_ref
from llmos_cli.remote.gc.collect import RemoteGcPlan, RemoteGcResult, execute_remote_gc, plan_remote_gc
from llmos_cli.remote.open import Remote
from llmos_cli.remote.pool.members import create_pool, open_pool
from llmos_cli.remote.pool.scrub import look
from llmos_cli.remote.transports.address import parse_address
from llmos_cli.remote.transports.folder import FolderTransport
from llmos_cli.remote.transports.listing import parse_listing, publish
from llmos_cli.remote.transports.objectstore import ObjectStoreTransport
from llmos_cli.remote.transports.transport import Transport
from llmos_cli.store.handle import Store
from llmos_cli.store.leases import hold
from llmos_cli.store.refs.refs import update_ref
from llmos_cli.store.transaction import Tensor, begin

pytestmark = pytest.mark.timeout(120)
Exchange = Any
DAY = 86400.0


def gc(store: Store, remote: Remote, grace: float | None = None) -> tuple[RemoteGcPlan, RemoteGcResult]:
    plan = plan_remote_gc(store, remote, grace_seconds=grace)
    return plan, execute_remote_gc(store, remote, plan, Silent())


def remove(remote: Remote, ref: str) -> None:
    remove_there(remote.transport, read_remote_ref(remote.transport, parse_ref(ref), Silent()), Silent())


def age(root: Path, seconds: float) -> None:
    """Let everything at a folder have been written so long ago."""
    for path in [*root.glob("packs/*/*"), *root.glob("trash/*")]:
        os.utime(path, (time.time() - seconds,) * 2)


def trash(root: Path) -> list[Path]:
    return sorted(root.glob("trash/**/*.pack"))


def put_tensor(store: Store, ref: str, values: np.ndarray) -> ObjectId:
    data = values.tobytes()
    with begin(store, purpose="test", ref=parse_ref(ref)) as tx:
        entry = tx.add_tensors("model.safetensors", [Tensor("w", "F32", values.shape, lambda: data)])
        tx.commit(Manifest("model", (entry,)), message="")
    return object_id(data)


@pytest.fixture
def here(exchange: Exchange) -> Store:
    """A store that has pushed two refs, each in a pack of its own."""
    store: Store = exchange.store("here")
    for name in ("kept", "gone"):
        exchange.commit(store, name, data=exchange.noise(len(name) + ord(name[0])))
        exchange.push(store, name)
    return store


@pytest.fixture
def nas(exchange: Exchange, here: Store) -> Remote:
    found: Remote = exchange.remote()
    return found


def test_what_a_removed_ref_needed_goes_to_the_trash_and_then_for_good(
    exchange: Exchange, here: Store, nas: Remote, tmp_path: Path
) -> None:
    root = tmp_path / "nas"
    remove(nas, "gone")
    plan, done = gc(here, nas)
    assert (plan.trash, done.trashed_bytes) == ((), 0), "what is young may be a push that has not moved its refs yet"
    assert plan.kept_bytes > 300_000
    age(root, 2 * DAY)
    plan, done = gc(here, nas)
    assert len(plan.trash) == len(trash(root)) == len(exchange.packs()) == 1
    assert done.trashed_bytes == trash(root)[0].stat().st_size
    plan, done = gc(here, nas)
    assert (done.freed_bytes, plan.waiting_bytes) == (0, trash(root)[0].stat().st_size), "its time begins anew"
    age(root, 2 * DAY)
    plan, done = gc(here, nas)
    assert done.freed_bytes > 300_000
    assert list((root / "trash").iterdir()) == []
    clone = exchange.store("clone")
    exchange.pull(clone)
    assert exchange.files(clone, "kept") == exchange.files(here, "kept")


def test_a_dry_run_changes_nothing(exchange: Exchange, here: Store, nas: Remote, tmp_path: Path) -> None:
    remove(nas, "gone")
    before = sorted((tmp_path / "nas").rglob("*"))
    plan = plan_remote_gc(here, nas, grace_seconds=0)
    assert (len(plan.trash), plan.freed_bytes) == (1, plan.trash[0].size)
    assert sorted((tmp_path / "nas").rglob("*")) == before


def test_history_within_its_days_is_kept(exchange: Exchange, here: Store, nas: Remote, tmp_path: Path) -> None:
    old = exchange.value(here, "kept")
    exchange.commit(here, "kept", data=exchange.noise(77))
    exchange.push(here, "kept")
    plan, _ = gc(here, nas, grace=0)
    assert plan.trash == ()
    assert len(exchange.packs()) == 3
    clone = exchange.store("clone")
    exchange.pull(clone)
    assert old != exchange.value(clone, "kept")


def test_snapshots_keep_what_they_name(exchange: Exchange, here: Store, nas: Remote) -> None:
    execute_backup(here, nas, plan_backup(here, nas), Silent())
    remove(nas, "gone")
    assert gc(here, nas, grace=0)[0].trash == ()
    execute_prune(nas, list_snapshots(nas, Silent()))
    assert len(gc(here, nas, grace=0)[0].trash) == 1


def test_a_remote_without_any_ref_is_not_emptied(here: Store, nas: Remote) -> None:
    remove(nas, "gone")
    remove(nas, "kept")
    with pytest.raises(Unsafe, match="a gc would take everything"):
        plan_remote_gc(here, nas, grace_seconds=0)


def test_a_ref_that_cannot_be_read_stops_it(here: Store, nas: Remote, tmp_path: Path) -> None:
    (tmp_path / "nas/refs/gone/latest/0000000001").write_bytes(b"rubbish")
    with pytest.raises(Damaged, match=r"gone:latest .* cannot be read"):
        plan_remote_gc(here, nas, grace_seconds=0)


def test_the_base_of_a_delta_that_stays_is_kept(exchange: Exchange, here: Store, nas: Remote) -> None:
    first = np.random.default_rng(0).normal(0, 0.02, 4000).astype(np.float32)
    second = np.concatenate([first[:10] + 1, first[10:]])
    base = put_tensor(here, "run", first)
    exchange.push(here, "run")
    delta = put_tensor(here, "run", second)
    assert here.index.locate(delta)[0].entry.base == base
    update_ref(here, parse_ref("other"), exchange.value(here, "run"), expected=None, message="")
    exchange.push(here, "run", "other")
    remove(nas, "run")
    remove(nas, "gone")
    assert len(gc(here, nas, grace=0)[0].trash) == 1, "only that of 'gone'"
    clone = exchange.store("clone")
    exchange.pull(clone)
    assert exchange.files(clone, "other")["model.safetensors"].endswith(second.tobytes())


def test_clocks_that_are_apart_refuse(here: Store, nas: Remote, tmp_path: Path) -> None:
    remove(nas, "gone")
    plan = plan_remote_gc(here, nas, grace_seconds=0)
    for now, word in ((time.time() + 3600, "ahead of"), (time.time() - 3600, "behind")):
        with pytest.raises(Unsafe, match=f"clock of this machine is .* {word}"):
            execute_remote_gc(here, nas, plan, Silent(), now=now)
    age(tmp_path / "nas", -DAY)
    with pytest.raises(Unsafe, match="is from the future"):
        plan_remote_gc(here, nas, grace_seconds=0)
    assert len(list((tmp_path / "nas").glob("packs/*/*"))) == 2
    assert list((tmp_path / "nas/trash").iterdir()) == []


# ------------------------------------------------------------------------------------------------------- beside others


@pytest.fixture(params=["folder", "s3"])
def far(request: pytest.FixtureRequest, exchange: Exchange, monkeypatch: pytest.MonkeyPatch) -> Remote:
    """An empty remote: a folder, or Ceph's gateway where it is installed, else moto."""
    if request.param == "folder":
        found: Remote = exchange.remote("far")
        return found
    absent = store_servers.missing(store_servers.CEPH_COMMANDS)
    server: store_servers.S3Server = request.getfixturevalue("moto" if absent else "rgw")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return Remote("far", ObjectStoreTransport(parse_address(server.url(f"gc/{secrets.token_hex(8)}"))))


def push(store: Store, remote: Remote, *refs: str) -> int:
    plan = plan_push(store, remote, [parse_ref(ref) for ref in refs], force=False)
    return execute_push(store, remote, plan, Silent()).sent


def pull(store: Store, remote: Remote) -> None:
    execute_pull(store, remote, plan_pull(store, remote, None, force=False), Silent())


def with_garbage(exchange: Exchange, remote: Remote) -> Store:
    """A store that has `kept` and `gone`, and a remote where nothing needs the pack of `gone` any more."""
    store: Store = exchange.store("writer")
    for name in ("kept", "gone"):
        exchange.commit(store, name, data=exchange.noise(len(name) + ord(name[0])))
        push(store, remote, name)
    remove(remote, "gone")
    return store


def keys(remote: Remote, prefix: str) -> list[str]:
    return sorted(key for key, _ in remote.transport.list(prefix))


def assert_whole(exchange: Exchange, remote: Remote, *refs: str) -> None:
    clone = exchange.store(f"clone-{secrets.token_hex(4)}")
    pull(clone, remote)
    for ref in refs:
        assert exchange.files(clone, ref) == exchange.files(exchange.store("writer"), ref)


def test_a_push_that_relied_on_what_a_gc_took_sends_it_anew(exchange: Exchange, far: Remote) -> None:
    writer = with_garbage(exchange, far)
    plan = plan_push(writer, far, [parse_ref("gone")], force=False)
    assert plan.shipments == ()
    assert gc(writer, far, grace=0)[1].freed_bytes > 300_000
    execute_push(writer, far, plan, Silent())
    assert_whole(exchange, far, "kept", "gone")


def test_a_gc_brings_back_what_a_ref_needs_that_has_come_meanwhile(exchange: Exchange, far: Remote) -> None:
    writer = with_garbage(exchange, far)
    plan = plan_remote_gc(writer, far, grace_seconds=0)
    assert push(writer, far, "gone") == 0
    done = execute_remote_gc(writer, far, plan, Silent())
    assert (done.restored, done.freed_bytes) == (1, 0)
    assert_whole(exchange, far, "kept", "gone")


def test_a_push_brings_back_from_the_trash_what_it_would_send(exchange: Exchange, far: Remote) -> None:
    writer = with_garbage(exchange, far)
    plan = plan_remote_gc(writer, far, now=time.time() + 2 * DAY)
    execute_remote_gc(writer, far, plan, Silent())
    assert len(keys(far, "trash/")) == len(keys(far, "packs/")) == 1
    assert push(writer, far, "gone") == 0
    assert len(keys(far, "packs/")) == 2
    assert_whole(exchange, far, "kept", "gone")
    later = plan_remote_gc(writer, far, now=time.time() + 4 * DAY)
    assert later.trash == later.back == ()
    execute_remote_gc(writer, far, later, Silent())
    assert_whole(exchange, far, "kept", "gone")
    assert keys(far, "trash/") == []


def test_a_pack_in_the_trash_that_is_spoiled_is_sent_anew(exchange: Exchange, here: Store, nas: Remote) -> None:
    remove(nas, "gone")
    plan = plan_remote_gc(here, nas, now=time.time() + 2 * DAY)
    execute_remote_gc(here, nas, plan, Silent())
    (path,) = trash(exchange.folder / "nas")
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-100])
    assert exchange.push(here, "gone").sent > 300_000
    clone = exchange.store("clone")
    exchange.pull(clone)
    assert exchange.files(clone, "gone") == exchange.files(here, "gone")


def test_what_a_gc_that_was_stopped_has_left_in_the_trash_is_read_there_and_brought_back(
    exchange: Exchange, far: Remote
) -> None:
    writer = with_garbage(exchange, far)
    for key in keys(far, "packs/"):
        far.transport.set_aside(key, f"trash/gc-0/{key.rpartition('/')[2]}")
    assert_whole(exchange, far, "kept")
    plan, done = gc(writer, far)
    assert (len(plan.back), done.restored) == (1, 1)
    assert len(keys(far, "packs/")) == 1
    assert_whole(exchange, far, "kept")


def test_what_a_gc_that_was_killed_has_left_to_tell_the_time_goes(here: Store, nas: Remote, tmp_path: Path) -> None:
    for name, hours in (("old", 2), ("new", 0)):
        probe = tmp_path / f"nas/trash/clock-{name}"
        probe.write_bytes(b"")
        os.utime(probe, (time.time() - 3600 * hours,) * 2)
    gc(here, nas)
    assert keys(nas, "trash/") == ["trash/clock-new"]


class Stopped(Exception):
    pass


class Doomed(FolderTransport):
    """Stops for good before its step number `left`."""

    left = 0

    def _step(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Stopped

    def set_aside(self, key: str, to: str) -> None:
        self._step()
        super().set_aside(key, to)

    def bring_back(self, key: str, to: str) -> None:
        self._step()
        super().set_aside(key, to)

    def delete(self, key: str) -> None:
        self._step()
        super().delete(key)


@pytest.mark.parametrize("needed_again", [False, True])
def test_a_gc_that_is_stopped_at_any_step_loses_nothing(exchange: Exchange, needed_again: bool) -> None:
    """And the next one ends where it would have ended."""
    refs, steps, ended = ("kept", "gone") if needed_again else ("kept",), 0, False
    while not ended:
        remote = Remote("far", Doomed(exchange.folder / f"far{steps}"))
        remote.transport.left = 10**9
        writer = with_garbage(exchange, remote)
        plan = plan_remote_gc(writer, remote, grace_seconds=0)
        if needed_again:
            push(writer, remote, "gone")
        remote.transport.left = steps
        try:
            execute_remote_gc(writer, remote, plan, Silent())
            ended = True
        except Stopped:
            steps += 1
        remote.transport.left = 10**9
        assert_whole(exchange, remote, *refs)
        gc(writer, remote, grace=0)
        assert_whole(exchange, remote, *refs)
        assert len(keys(remote, "packs/")) == len(refs)
        assert [key for key in keys(remote, "trash/") if key.endswith(".pack")] == []
    assert steps >= 4


def test_pushes_pulls_and_gcs_at_once_lose_nothing(exchange: Exchange, far: Remote, tmp_path: Path) -> None:
    """Two that push and remove the same things, each pull right after, and a gc without grace that never pauses."""
    stop, errors, rounds, freed = threading.Event(), [], [0, 0], [0]
    shared = exchange.noise(1, 60_000)
    exchange.commit(exchange.store("w0"), "anchor", a=exchange.noise(3, 10_000))
    push(exchange.store("w0"), far, "anchor")

    def until_stopped(prepare: Callable[[Any], Callable[[], None]]) -> Callable[[], None]:
        def run() -> None:
            try:
                with ExitStack() as stack:
                    step = prepare(type(exchange)(tmp_path, stack))
                    while not stop.is_set():
                        step()
            except Exception as exc:  # noqa: BLE001 - it is told below
                errors.append(exc)
                stop.set()

        return run

    def writer(number: int) -> Callable[[Any], Callable[[], None]]:
        def prepare(one: Any) -> Callable[[], None]:
            store, dice = one.store(f"w{number}"), random.Random(number)
            one.commit(store, f"mine{number}", a=shared, b=dice.randbytes(40_000))
            one.commit(store, f"also{number}", a=shared, c=one.noise(9, 50_000))

            def step() -> None:
                ref = dice.choice([f"mine{number}", f"also{number}"])
                push(store, far, ref)
                with ExitStack() as stack:
                    clone = type(exchange)(tmp_path, stack).store(f"c{number}-{rounds[number]}")
                    plan = plan_pull(clone, far, [parse_ref(ref)], force=False)
                    execute_pull(clone, far, plan, Silent())
                    assert one.files(clone, ref) == one.files(store, ref)
                remove(far, ref)
                rounds[number] += 1

            return step

        return prepare

    def collector(one: Any) -> Callable[[], None]:
        store = one.store("gc")

        def step() -> None:
            freed[0] += gc(store, far, grace=0)[1].freed_bytes > 0

        return step

    threads = [threading.Thread(target=until_stopped(work)) for work in (writer(0), writer(1), collector)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 60
    while not stop.is_set() and time.monotonic() < end and (min(rounds) < 5 or freed[0] < 5):
        time.sleep(0.05)
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors
    assert min(*rounds, *freed) >= 5
    last = exchange.store("last")
    pull(last, far)
    assert exchange.problems(last) == []


def test_a_store_that_is_a_remote_keeps_what_its_own_commands_use(exchange: Exchange, here: Store, nas: Remote) -> None:
    remove(nas, "gone")
    there = exchange.store("nas")
    with hold(there, "serve", [exchange.value(here, "gone")]):
        assert gc(here, nas, grace=0)[0].trash == ()
    with hold(there, "add", [], writes=True):
        plan, done = gc(here, nas, grace=0)
        assert (plan.writers, len(plan.trash), done.freed_bytes) == (1, 1, 0), "aside, where it will find it"
    assert gc(here, nas, grace=0)[1].freed_bytes > 300_000
    assert exchange.problems(there) == []


def test_a_published_list_is_made_anew(here: Store, nas: Remote) -> None:
    publish(here, nas.transport)
    remove(nas, "gone")
    gc(here, nas, grace=0)
    listed = parse_listing(nas.transport.read("LISTING"))
    assert sorted(key for key in listed if key.startswith("packs/")) == keys(nas, "packs/")


# ------------------------------------------------------------------------------------------------------------- a pool


@pytest.fixture
def pool(exchange: Exchange, tmp_path: Path) -> Callable[[], Remote]:
    """Three nodes, two copies; opened anew each time, as every command does."""
    urls = [str(tmp_path / f"n{number}") for number in range(3)]

    def opener(url: str) -> Transport:
        return FolderTransport(Path(url))

    create_pool(urls, 2, opener, lambda message: None)
    return lambda: Remote("pool", open_pool(urls, opener, lambda message: None))


def test_a_pool_gives_back_every_copy_and_keeps_all_of_what_is_needed(
    exchange: Exchange, pool: Callable[[], Remote], tmp_path: Path
) -> None:
    writer = with_garbage(exchange, pool())
    plan = plan_remote_gc(writer, pool(), grace_seconds=0)
    push(writer, pool(), "gone")
    done = execute_remote_gc(writer, pool(), plan, Silent())
    assert done.restored == 1
    assert look(pool().transport).under_replicated == ()
    remove(pool(), "gone")
    gc(writer, pool(), grace=0)
    assert len(list(tmp_path.glob("n*/packs/*/*"))) == 2
    assert list(tmp_path.glob("n*/trash/*")) == []
    assert look(pool().transport).under_replicated == ()
    assert_whole(exchange, pool(), "kept")


def test_a_pool_with_a_node_away_is_left_as_it_is(
    exchange: Exchange, pool: Callable[[], Remote], tmp_path: Path
) -> None:
    writer = with_garbage(exchange, pool())
    (tmp_path / "n1").rename(tmp_path / "away")
    with pytest.raises(RemoteUnavailable, match="all 3 nodes must answer"):
        plan_remote_gc(writer, pool(), grace_seconds=0)
    assert not list(tmp_path.glob("*/trash/*"))


def test_a_copy_that_a_pool_has_too_seldom_does_not_count(
    exchange: Exchange, pool: Callable[[], Remote], tmp_path: Path
) -> None:
    """Another pack has the same objects, but one copy of it is lost: the one in the trash comes back, twice."""
    writer = with_garbage(exchange, pool())
    (name,) = {path.stem for path in tmp_path.glob("n*/packs/*/*")} & {
        str(location.pack) for location in writer.index.locate(exchange.value(writer, "kept"))
    }
    plan = plan_remote_gc(writer, pool(), now=time.time() + 2 * DAY)
    execute_remote_gc(writer, pool(), plan, Silent())
    copies = sorted(tmp_path.glob(f"n*/packs/*/{name}.pack"))
    for path in copies:
        path.rename(path.parents[2] / "trash" / path.name)
    copies[0].parent.mkdir(exist_ok=True)
    copies[0].write_bytes((copies[0].parents[2] / "trash" / copies[0].name).read_bytes())
    assert gc(writer, pool())[1].restored == 1
    assert look(pool().transport).under_replicated == ()


# -------------------------------------------------------------------------------------------------------- the command


def test_the_command(reader: Callable[..., tuple[int, Any, str]]) -> None:
    assert reader("--store", "writer", "rm", "tuned")[0] == 0
    assert reader("--store", "writer", "push", "nas", "--all", "--prune")[0] == 0
    code, would, _ = reader("gc", "--remote", "nas", "--grace", "0", "--dry-run", "--json")
    assert (code, would["dry_run"], len(would["trash"])) == (0, True, 1)
    code, found, _ = reader("gc", "--remote", "nas", "--grace", "0", "--json")
    assert (code, found["freed_bytes"], found["remote"]) == (0, would["freed_bytes"], "nas")
    assert reader("pull", "nas", "--all")[0] == 0
    assert reader("gc", "--remote", "nas", "--undelete")[0] == 2
    assert reader("gc", "--remote", "nowhere")[0] == 10
