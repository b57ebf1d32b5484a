"""Backups: a store is lost, or parts of it, or time is turned back; what comes back is what was there."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from llmos_cli.errors import Conflict, Damaged, NotFound, RemoteUnavailable, UsageError
from llmos_cli.formats.ids import ObjectId, object_id
from llmos_cli.formats.names import RefName, parse_ref
from llmos_cli.formats.reflog import RefEntry
from llmos_cli.formats.snapshot import Snapshot, SnapshotName
from llmos_cli.progress import Silent
from llmos_cli.remote.backup.backup import BackupResult, execute_backup, execute_prune, plan_backup, plan_prune
from llmos_cli.remote.backup.restore import RestorePlan, execute_restore, plan_restore
from llmos_cli.remote.backup.snapshots import Policy, choose, kept_by, list_snapshots
from llmos_cli.remote.open import Remote
from llmos_cli.remote.pool.members import create_pool
from llmos_cli.remote.transports.address import parse_address
from llmos_cli.remote.transports.folder import FolderTransport
from llmos_cli.remote.transports.objectstore import ObjectStoreTransport
from llmos_cli.store.gc.gc import execute_gc, plan_gc
from llmos_cli.store.handle import Store
from llmos_cli.store.local import save_config
from llmos_cli.store.refs.keys import load_key, new_key
from llmos_cli.store.refs.refs import delete_ref, ref_history
from llmos_cli.store.refs.signatures import GOOD, sign_ref, signers

Exchange = Any
Overwrite = Callable[[Path, bytes], None]
START = datetime(2026, 11, 1, 12, tzinfo=UTC)


def back_up(store: Store, remote: Remote, days: float = 0) -> BackupResult:
    plan = plan_backup(store, remote, START + timedelta(days=days))
    return execute_backup(store, remote, plan, Silent())


def restore(store: Store, remote: Remote, *refs: str, at: str | None = None, force: bool = False) -> RestorePlan:
    plan = plan_restore(store, remote, [parse_ref(ref) for ref in refs], at, force=force)
    execute_restore(store, remote, plan, Silent())
    return plan


def logs(store: Store) -> dict[str, bytes]:
    """Every move as it lies on the disk."""
    return {str(path.relative_to(store.refs)): path.read_bytes() for path in sorted(store.refs.glob("*/*/*"))}


def some_history(exchange: Exchange, store: Store) -> dict[str, dict[str, bytes]]:
    """Refs with one and with several values; returns what they hold in the end."""
    exchange.commit(store, "web", a=exchange.noise(1), b=b"first")
    exchange.commit(store, "web", a=exchange.noise(1), b=b"second")
    exchange.commit(store, "web", a=exchange.noise(2), c=b"")
    exchange.commit(store, "tiny:int8", w=exchange.noise(3, 5_000_000))
    return {
        "web": {"a.bin": exchange.noise(2), "c.bin": b""},
        "tiny:int8": {"w.bin": exchange.noise(3, 5_000_000)},
    }


@pytest.mark.parametrize("place", ["folder", "pool", "moto"])
def test_a_store_that_was_lost_comes_back_byte_for_byte(
    exchange: Exchange, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    remote = exchange.remote()
    if place == "pool":
        (tmp_path / "nodes").mkdir()
        urls = [str(tmp_path / "nodes" / name) for name in "abcd"]
        remote = Remote("pool", create_pool(urls, 2, lambda url: FolderTransport(Path(url)), print))
    elif place == "moto":
        server = request.getfixturevalue("moto")
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        remote = Remote("s3", ObjectStoreTransport(parse_address(server.url(f"backup-{tmp_path.name}"))))
    here = exchange.store("here")
    wanted = some_history(exchange, here)
    ids = {ref: exchange.value(here, ref) for ref in wanted}
    earlier = exchange.files(here, "web") and [move.id for move in ref_history(here, parse_ref("web"))]
    before = logs(here)
    back_up(here, remote)
    here.close()
    shutil.rmtree(here.root)
    again = exchange.store("here")
    plan = restore(again, remote)
    assert {item.status for item in plan.refs} == {"new"}
    assert logs(again) == before
    assert {ref: exchange.value(again, ref) for ref in wanted} == ids
    assert {ref: exchange.files(again, ref) for ref in wanted} == wanted
    assert exchange.problems(again) == []
    assert all(again.index.has(oid) for oid in earlier), "earlier values come back too"
    assert {item.status for item in restore(again, remote).refs} == {"unchanged"}
    if place == "pool":
        shutil.rmtree(tmp_path / "nodes" / "b")
        there = exchange.store("there")
        restore(there, remote)
        assert logs(there) == before


def test_nothing_is_sent_twice_and_refs_there_stay(exchange: Exchange) -> None:
    here, remote = exchange.store("here"), exchange.remote()
    some_history(exchange, here)
    first = back_up(here, remote)
    assert first.sent > 5_000_000
    assert back_up(here, remote, days=1).sent == 0
    exchange.commit(here, "web", a=exchange.noise(2), d=exchange.noise(9, 10_000))
    assert 10_000 < back_up(here, remote, days=2).sent < 12_000
    names = [name.time for name, _ in list_snapshots(remote, Silent())]
    assert names == ["20261101T120000.000Z", "20261102T120000.000Z", "20261103T120000.000Z"]
    assert logs(exchange.store("nas")) == {}


def test_a_pushed_remote_keeps_both(exchange: Exchange) -> None:
    here, remote = exchange.store("here"), exchange.remote()
    some_history(exchange, here)
    exchange.push(here, "tiny:int8")
    done = back_up(here, remote)
    assert done.sent < 1_500_000, "what was pushed is there"
    assert exchange.value(exchange.store("nas"), "tiny:int8") == exchange.value(here, "tiny:int8")


def test_time_can_be_turned_back(exchange: Exchange) -> None:
    here, remote = exchange.store("here"), exchange.remote()
    ids = []
    for day in range(3):
        ids.append(exchange.commit(here, "web", a=b"%d" % day))
        back_up(here, remote, days=day)
    for at, expected in (("2026-11-01", 0), ("2026-11-02T13:00:00+00:00", 1), (None, 2), ("2030-01-01", 2)):
        there = exchange.store(f"there-{expected}-{at is None}-{(at or '')[:4]}")
        restore(there, remote, at=at)
        assert exchange.value(there, "web") == ids[expected]
        assert len(ref_history(there, parse_ref("web"))) == expected + 1
    name = list_snapshots(remote, Silent())[1][0]
    there = exchange.store("by-id")
    restore(there, remote, at=f"@{name.id.short}")
    assert exchange.value(there, "web") == ids[1]


def test_a_ref_that_stayed_behind_moves_forward_with_the_very_moves(exchange: Exchange) -> None:
    here, remote = exchange.store("here"), exchange.remote()
    exchange.commit(here, "web", a=b"1")
    back_up(here, remote)
    there = exchange.store("there")
    restore(there, remote)
    exchange.commit(here, "web", a=b"2")
    exchange.commit(here, "web", a=b"3")
    exchange.commit(here, "new", a=b"4")
    back_up(here, remote, days=1)
    plan = restore(there, remote)
    assert {str(item.ref): item.status for item in plan.refs} == {"web:latest": "moved", "new:latest": "new"}
    assert logs(there) == logs(here)


def test_a_ref_that_has_moved_on_is_set_back_only_by_force(exchange: Exchange) -> None:
    here, remote = exchange.store("here"), exchange.remote()
    old = exchange.commit(here, "web", a=b"1")
    exchange.commit(here, "other", a=b"5")
    back_up(here, remote)
    new = exchange.commit(here, "web", a=b"2")
    delete_ref(here, RefName("other"), expected=exchange.value(here, "other"))
    before = logs(here)
    with pytest.raises(Conflict, match="web:latest has moved on"):
        restore(here, remote)
    assert logs(here) == before, "not even the ref that could have been restored"
    restore(here, remote, "other")
    assert exchange.files(here, "other") == {"a.bin": b"5"}
    plan = restore(here, remote, "web", force=True)
    assert [item.status for item in plan.refs] == ["forced"]
    history = ref_history(here, parse_ref("web"))
    assert [move.id for move in history] == [old, new, old]
    assert history[0].message == "restored from nas, as of 2026-11-01T12:00:00.000+00:00"


def test_one_that_went_another_way_is_refused(exchange: Exchange) -> None:
    here, remote, other = exchange.store("here"), exchange.remote(), exchange.store("other")
    exchange.commit(here, "web", a=b"1")
    back_up(here, remote)
    exchange.commit(other, "web", a=b"2")
    with pytest.raises(Conflict, match="or gone another way"):
        restore(other, remote)
    restore(other, remote, force=True)
    assert exchange.files(other, "web") == {"a.bin": b"1"}


def test_a_gc_at_the_remote_keeps_what_snapshots_need_until_they_are_pruned(exchange: Exchange) -> None:
    here, remote = exchange.store("here"), exchange.remote()
    exchange.commit(here, "web", a=exchange.noise(1))
    back_up(here, remote)
    delete_ref(here, RefName("web"), expected=exchange.value(here, "web"))
    exchange.commit(here, "tiny", a=exchange.noise(2))
    back_up(here, remote, days=1)
    nas = exchange.store("nas")
    for _ in range(2):
        execute_gc(nas, plan_gc(nas, grace_seconds=0), Silent())
    assert len(exchange.packs()) == 2
    assert exchange.problems(nas) == []
    there = exchange.store("there")
    restore(there, remote, at="2026-11-01")
    assert exchange.files(there, "web") == {"a.bin": exchange.noise(1)}
    pruned = plan_prune(list_snapshots(remote, Silent()), Policy(daily=1))
    assert [name.time for name, _ in pruned] == ["20261101T120000.000Z"]
    execute_prune(remote, pruned)
    assert len(exchange.packs()) == 2, "pruning removes snapshots, not packs"
    for _ in range(2):
        execute_gc(nas, plan_gc(nas, grace_seconds=0), Silent())
    assert len(exchange.packs()) == 1
    restore(exchange.store("newest"), remote)
    assert exchange.problems(nas) == []


def test_a_gc_at_the_remote_stops_at_a_snapshot_it_cannot_read(exchange: Exchange) -> None:
    here, remote = exchange.store("here"), exchange.remote()
    exchange.commit(here, "web", a=exchange.noise(1))
    back_up(here, remote)
    (path,) = (exchange.folder / "nas/snapshots").iterdir()
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    with pytest.raises(Damaged, match="does not have the bytes its name stands for"):
        plan_gc(exchange.store("nas"), grace_seconds=0)
    assert any("does not have the bytes" in what for what in exchange.problems(exchange.store("nas")))
    progress = Silent()
    assert list_snapshots(remote, progress) == []
    assert "it is passed over" in progress.warnings[0]


def test_fsck_at_the_remote_names_the_snapshot_that_is_hurt(exchange: Exchange, overwrite: Overwrite) -> None:
    from llmos_cli.store.fsck.fsck import check

    here, remote = exchange.store("here"), exchange.remote()
    exchange.commit(here, "web", a=exchange.noise(1))
    back_up(here, remote)
    (path,) = exchange.packs()
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    overwrite(path, bytes(data))
    problems = check(exchange.store("nas"), quick=False, progress=Silent()).problems
    assert any("snapshot 20261101T120000.000Z" in ref for problem in problems for ref in problem.referrers)


def test_values_that_are_not_here_any_more_do_not_stop_a_backup(exchange: Exchange) -> None:
    """A clone has the newest values only, and the log of the one that made it."""
    here, remote = exchange.store("here"), exchange.remote()
    exchange.commit(here, "web", a=exchange.noise(1))
    exchange.commit(here, "web", a=exchange.noise(2))
    exchange.push(here, to="team")
    clone = exchange.store("clone")
    exchange.pull(clone, source="team")
    back_up(clone, remote)
    exchange.commit(clone, "web", a=exchange.noise(3))
    back_up(clone, remote, days=1)
    there = exchange.store("there")
    restore(there, remote)
    assert logs(there) == logs(clone)
    assert exchange.problems(there) == []


def test_an_empty_store_is_no_newest_state(exchange: Exchange) -> None:
    here, remote = exchange.store("here"), exchange.remote()
    with pytest.raises(NotFound, match="the store has no refs") as caught:
        back_up(here, remote)
    assert caught.value.hint == "to get back what was lost: llmos restore nas"
    assert not (exchange.folder / "nas").exists()
    with pytest.raises(NotFound, match="no llmos remote"):
        restore(here, remote)
    other = exchange.store("other")
    exchange.commit(other, "x", a=b"")
    exchange.push(other)
    with pytest.raises(NotFound, match="no snapshots at nas"):
        restore(here, remote)


def test_a_ref_that_no_snapshot_has_is_named(exchange: Exchange) -> None:
    here, remote = exchange.store("here"), exchange.remote()
    exchange.commit(here, "web", a=b"1")
    back_up(here, remote)
    with pytest.raises(NotFound, match="no ref tiny:latest in the snapshot of 2026-11-01T12:00:00"):
        restore(here, remote, "tiny", "web")


def test_a_store_with_damage_is_not_backed_up_as_if_it_were_whole(exchange: Exchange, overwrite: Overwrite) -> None:
    here, remote = exchange.store("here"), exchange.remote()
    exchange.commit(here, "web", a=exchange.noise(1))
    (path,) = exchange.packs("here")
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    overwrite(path, bytes(data))
    with pytest.raises(Damaged):
        back_up(here, remote)
    assert not list((exchange.folder / "nas").glob("snapshots/*"))


def test_a_remote_that_forgets_what_it_was_sent_is_found_out(exchange: Exchange) -> None:
    class Forgetful(FolderTransport):
        def create(self, key: str, data: bytes) -> bool:
            return super().create(key, data[:-1] if key.startswith("snapshots/") else data)

    here = exchange.store("here")
    exchange.commit(here, "web", a=b"1")
    with pytest.raises(RemoteUnavailable, match="does not have the snapshot"):
        back_up(here, Remote("nas", Forgetful(exchange.folder / "nas")))


def found(*moments: str, source: str = "ann@host:/store") -> list[tuple[SnapshotName, Snapshot]]:
    """Snapshots of a store at these times (2026-..., UTC)."""
    log = {RefName("web"): (RefEntry(RefName("web"), 1, ObjectId(bytes(32)), None, "", "", ""),)}
    items = []
    for moment in moments:
        time = datetime.fromisoformat(moment).replace(tzinfo=UTC)
        name = SnapshotName(time.strftime("%Y%m%dT%H%M%S.000Z"), object_id((moment + source).encode()))
        items.append((name, Snapshot(time.isoformat(), source, log, (ObjectId(bytes(32)),))))
    return sorted(items, key=lambda item: item[0])


def kept(policy: Policy, items: list[tuple[SnapshotName, Snapshot]]) -> list[str]:
    return [name.time[4:11] for name in sorted(kept_by(policy, items))]


def test_a_policy_keeps_the_newest_of_each_day_week_and_month() -> None:
    days = found(*[f"2026-10-{day:02d} {hour}:00" for day in range(1, 32) for hour in ("06", "18")])
    assert kept(Policy(daily=3), days) == ["1029T18", "1030T18", "1031T18"]
    assert kept(Policy(weekly=3), days) == ["1018T18", "1025T18", "1031T18"], "weeks end on Sundays"
    assert kept(Policy(daily=2, weekly=2), days) == ["1025T18", "1030T18", "1031T18"]
    months = found("2025-12-31 23:59", "2026-01-01 00:00", "2026-01-31 10:00", "2026-03-05 10:00", "2026-03-05 11:00")
    assert kept(Policy(monthly=2), months) == ["0131T10", "0305T11"]
    assert kept(Policy(monthly=9), months) == ["1231T23", "0131T10", "0305T11"]
    assert len(kept(Policy(), days)) == 62


def test_a_policy_is_for_each_store_on_its_own() -> None:
    both = found("2026-10-01 06:00", "2026-10-02 06:00") + found("2026-10-02 18:00", source="bob@other:/store")
    assert kept(Policy(daily=1), both) == ["1002T06", "1002T18"]


def test_a_restore_takes_the_snapshots_of_its_own_store() -> None:
    mine, other = found("2026-10-01 06:00"), found("2026-10-02 06:00", source="bob@other:/store")
    assert choose(mine + other, None, "ann@host:/store", "nas") == mine[0]
    assert choose(other, None, "ann@host:/store", "nas") == other[0], "a store that was lost may come back elsewhere"
    with pytest.raises(UsageError, match="snapshots of several stores: ann@host:/store, bob@other:/store"):
        choose(mine + other, None, "eve@third:/store", "nas")
    assert choose(mine + other, f"@{other[0][0].id.short}", "eve@third:/store", "nas") == other[0]


@pytest.mark.parametrize("at", ["yesterday", "2026-13-01", "@", "@zzzz", "@0000", "", "0001-01-01"])
def test_times_that_mean_nothing_are_refused(at: str) -> None:
    items = found("2026-10-01 06:00", "2026-10-02 06:00")
    with pytest.raises((UsageError, NotFound)):
        choose(items, at, "ann@host:/store", "nas")


def test_signatures_come_back_with_their_refs(exchange: Exchange, tmp_path: Path) -> None:
    """Of earlier values, too: who has seen a later one must not take an earlier one for the newest."""
    new_key(tmp_path / "key")
    key = load_key(tmp_path / "key")
    store, remote, ref = exchange.store("here"), exchange.remote(), parse_ref("tiny")
    for seed in (1, 2):
        exchange.commit(store, "tiny", a=exchange.noise(seed, 3000))
        sign_ref(store, ref, key, days=None)
    back_up(store, remote)
    before = logs(store)
    assert len([name for name in before if name.endswith(".sig")]) == 2
    other = exchange.store("other")
    restore(other, remote)
    assert logs(other) == before
    save_config(other, replace(other.config, trust={"alice": f"ed25519:{key.public}"}))
    assert [item.state for item in signers(other, ref, exchange.value(other, "tiny"))] == [GOOD]
    for name in list(before):
        if name.endswith(".sig"):
            (other.refs / name).unlink()
    restore(other, remote)
    assert logs(other) == before, "an unchanged ref gets the signatures that it lacks"
    exchange.commit(other, "tiny", a=b"else")
    restore(other, remote, "tiny", force=True)
    assert [item.state for item in signers(other, ref, exchange.value(other, "tiny"))] == []
