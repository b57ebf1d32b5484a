import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from llmos_cli.errors import Conflict, Damaged, NotFound, RemoteUnavailable, UnknownVersion, Unsafe
from llmos_cli.formats.names import parse_ref
from llmos_cli.formats.pack import Entry
from llmos_cli.progress import Silent
from llmos_cli.remote.exchange import push, send
from llmos_cli.remote.exchange.push import execute_push, plan_push
from llmos_cli.remote.transports import folder
from llmos_cli.store.gc import gc
from llmos_cli.store.packs.packs import read_pack_index
from llmos_cli.store.refs.refs import read_ref, ref_history, update_ref

Exchange = Any
Overwrite = Callable[[Path, bytes], None]


def entries_of(path: Path) -> tuple[Entry, ...]:
    return read_pack_index(path)[1]


def test_the_first_push_makes_the_remote_and_everything_arrives(exchange: Exchange) -> None:
    here = exchange.store("here")
    oid = exchange.commit(here, "web", a=exchange.noise(1))
    done = exchange.push(here, "web")
    there = exchange.store("nas")
    assert [(item.status, item.id) for item in done.refs] == [("new", oid)]
    assert done.sent == sum(path.stat().st_size for path in exchange.packs())
    assert exchange.files(there, "web") == {"a.bin": exchange.noise(1)}
    assert exchange.problems(there) == []
    assert exchange.leftovers("nas") == exchange.leftovers("here") == []


def test_packs_at_the_remote_are_read_only(exchange: Exchange) -> None:
    here = exchange.store("here")
    exchange.commit(here, "web", a=exchange.noise(1))
    exchange.push(here, "web")
    assert {path.stat().st_mode & 0o777 for path in exchange.packs()} == {0o444}


def test_nothing_to_do_sends_nothing(exchange: Exchange) -> None:
    here = exchange.store("here")
    exchange.commit(here, "web", a=exchange.noise(1))
    exchange.push(here, "web")
    before = sorted((path, path.stat().st_mtime_ns) for path in (exchange.folder / "nas").rglob("*"))
    done = exchange.push(here, "web")
    assert (done.sent, done.packs, [item.status for item in done.refs]) == (0, 0, ["unchanged"])
    assert done.present == 2
    assert sorted((path, path.stat().st_mtime_ns) for path in (exchange.folder / "nas").rglob("*")) == before


def test_only_what_is_missing_is_sent(exchange: Exchange) -> None:
    here = exchange.store("here")
    base = exchange.noise(1)
    exchange.commit(here, "web:v1", a=base)
    exchange.push(here, "web:v1")
    exchange.commit(here, "web:v2", a=base, b=exchange.noise(2, 20_000))
    done = exchange.push(here, "web:v2")
    assert 20_000 < done.sent < 25_000
    assert done.present == 1
    assert exchange.files(exchange.store("nas"), "web:v2") == {"a.bin": base, "b.bin": exchange.noise(2, 20_000)}


def test_what_a_ref_does_not_rest_on_stays_here(exchange: Exchange) -> None:
    """The second version no longer has the secret, but shares the pack of the first one."""
    here = exchange.store("here")
    shared, secret = exchange.noise(1), exchange.noise(2, 50_000)
    old = exchange.commit(here, "web", a=shared, secret=secret)
    exchange.commit(here, "web", a=shared)
    exchange.push(here, "web")
    ids = {entry.id for path in exchange.packs() for entry in entries_of(path)}
    there = exchange.store("nas")
    assert exchange.files(there, "web") == {"a.bin": shared}
    assert old not in ids
    assert len(ids) == 2


def test_a_pack_that_belongs_whole_travels_as_it_is(exchange: Exchange) -> None:
    here = exchange.store("here")
    exchange.commit(here, "web", a=exchange.noise(1), b=exchange.noise(2))
    exchange.push(here, "web")
    assert [path.name for path in exchange.packs()] == [path.name for path in exchange.packs("here")]


def test_all_pushes_every_ref(exchange: Exchange) -> None:
    here = exchange.store("here")
    ids = {ref: exchange.commit(here, ref, a=exchange.noise(seed)) for seed, ref in enumerate(["a:x", "b:y", "c:z"])}
    exchange.push(here)
    there = exchange.store("nas")
    assert {ref: exchange.value(there, ref) for ref in ids} == ids


def test_the_remote_log_tells_what_happened(exchange: Exchange) -> None:
    here = exchange.store("here")
    first = exchange.commit(here, "web", a=exchange.noise(1))
    exchange.push(here, "web")
    second = exchange.commit(here, "web", b=exchange.noise(2))
    exchange.push(here, "web")
    log = ref_history(exchange.store("nas"), parse_ref("web"))
    assert [(move.id, move.previous, move.message) for move in log] == [
        (second, first, "add b"),
        (first, None, "add a"),
    ]


def test_a_value_that_this_store_never_had_is_not_replaced(exchange: Exchange) -> None:
    here, other = exchange.store("here"), exchange.store("other")
    theirs = exchange.commit(other, "web", a=exchange.noise(1))
    exchange.push(other, "web")
    mine = exchange.commit(here, "web", a=exchange.noise(2))
    with pytest.raises(Conflict, match="web:latest at nas") as caught:
        exchange.push(here, "web")
    assert "llmos pull nas web:latest" in str(caught.value.hint)
    there = exchange.store("nas")
    assert exchange.value(there, "web") == theirs
    assert exchange.push(here, "web", force=True).refs[0].status == "forced"
    assert exchange.value(there, "web") == mine
    assert exchange.value(there, "web") != theirs
    assert [move.previous for move in ref_history(there, parse_ref("web"))] == [theirs, None]


def test_one_conflict_among_many_refs_moves_none(exchange: Exchange) -> None:
    here, other = exchange.store("here"), exchange.store("other")
    exchange.commit(other, "web", a=exchange.noise(1))
    exchange.push(other, "web")
    exchange.commit(here, "web", a=exchange.noise(2))
    exchange.commit(here, "fine", a=exchange.noise(3))
    with pytest.raises(Conflict):
        exchange.push(here)
    assert exchange.value(exchange.store("nas"), "fine") is None
    assert len(exchange.packs()) == 1


def test_work_based_on_what_was_pulled_moves_the_ref(exchange: Exchange) -> None:
    here, other = exchange.store("here"), exchange.store("other")
    exchange.commit(here, "web", a=exchange.noise(1))
    exchange.push(here, "web")
    exchange.pull(other, "web")
    exchange.commit(other, "web", a=exchange.noise(2))
    assert exchange.push(other, "web").refs[0].status == "moved"


def test_being_behind_is_a_conflict_not_a_step_back(exchange: Exchange) -> None:
    here, other = exchange.store("here"), exchange.store("other")
    exchange.commit(here, "web", a=exchange.noise(1))
    exchange.push(here, "web")
    exchange.pull(other, "web")
    newer = exchange.commit(here, "web", a=exchange.noise(2))
    exchange.push(here, "web")
    with pytest.raises(Conflict):
        exchange.push(other, "web")
    assert exchange.value(exchange.store("nas"), "web") == newer


def test_a_ref_set_back_on_purpose_can_be_pushed(exchange: Exchange) -> None:
    here = exchange.store("here")
    first = exchange.commit(here, "web", a=exchange.noise(1))
    second = exchange.commit(here, "web", a=exchange.noise(2))
    exchange.push(here, "web")
    update_ref(here, parse_ref("web"), first, expected=second, message="back")
    exchange.push(here, "web")
    assert exchange.value(exchange.store("nas"), "web") == first


def test_of_many_pushers_exactly_one_moves_the_ref(exchange: Exchange) -> None:
    stores = [exchange.store(f"s{number}") for number in range(6)]
    exchange.push(exchange.store("empty"), to="nas")
    for number, store in enumerate(stores):
        exchange.commit(store, "web", a=exchange.noise(number, 2000))
    remote = exchange.remote()
    plans = [plan_push(store, remote, [parse_ref("web")], force=False) for store in stores]

    def go(number: int) -> bool:
        try:
            execute_push(stores[number], remote, plans[number], Silent())
        except Conflict:
            return False
        return True

    with ThreadPoolExecutor(len(stores)) as pool:
        won = list(pool.map(go, range(len(stores))))
    there = exchange.store("nas")
    assert won.count(True) == 1
    assert exchange.value(there, "web") == exchange.value(stores[won.index(True)], "web")
    assert exchange.problems(there) == []


def test_two_that_push_the_same_at_once_are_both_right(exchange: Exchange) -> None:
    one, two = exchange.store("one"), exchange.store("two")
    for store in (one, two):
        exchange.commit(store, "web:a" if store is one else "web:b", a=exchange.noise(1))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(exchange.push, (one, two)))
    there = exchange.store("nas")
    assert exchange.files(there, "web:a") == exchange.files(there, "web:b")
    assert exchange.problems(there) == []


def test_a_push_that_was_stopped_does_not_send_twice(exchange: Exchange, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames from many packs travel in packs of their own: cut small here, so that several are needed."""
    monkeypatch.setattr(send.limits, "PACK_TARGET_BYTES", 100_000)
    here = exchange.store("here")
    for number in range(6):
        exchange.commit(here, "old", a=exchange.noise(number, 60_000), rest=exchange.noise(99 + number, 80_000))
        exchange.commit(here, f"part{number}", a=exchange.noise(number, 60_000))
    refs = [f"part{number}" for number in range(6)]
    plan = plan_push(here, exchange.remote(), [parse_ref(ref) for ref in refs], force=False)
    assert len(plan.shipments) > 3
    real, sent = folder.FolderTransport.put_file, []

    def put_file(self: Any, key: str, *rest: Any) -> None:
        if len(sent) == 2:
            raise RemoteUnavailable("gone")
        sent.append(key)
        real(self, key, *rest)

    monkeypatch.setattr(folder.FolderTransport, "put_file", put_file)
    with pytest.raises(RemoteUnavailable):
        execute_push(here, exchange.remote(), plan, Silent())
    arrived = {path.name for path in exchange.packs()}
    assert arrived
    monkeypatch.setattr(folder.FolderTransport, "put_file", real)
    done = exchange.push(here, *refs)
    assert done.packs == len(plan.shipments) - len(arrived)
    there = exchange.store("nas")
    assert exchange.problems(there) == []
    assert exchange.files(there, "part3") == {"a.bin": exchange.noise(3, 60_000)}
    assert exchange.leftovers("here") == []


def test_a_pack_damaged_here_is_not_sent(exchange: Exchange, overwrite: Overwrite) -> None:
    here = exchange.store("here")
    exchange.commit(here, "web", a=exchange.noise(1))
    (path,) = exchange.packs("here")
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    overwrite(path, bytes(data))
    with pytest.raises(Damaged, match="fails its checksum"):
        exchange.push(here, "web")
    assert exchange.value(exchange.store("nas"), "web") is None
    assert exchange.packs() == []
    assert exchange.leftovers("nas") == exchange.leftovers("here") == []


def test_a_pack_whose_index_alone_is_damaged_here_still_gives_its_objects(
    exchange: Exchange, overwrite: Overwrite
) -> None:
    here = exchange.store("here")
    exchange.commit(here, "web", a=exchange.noise(1))
    (path,) = exchange.packs("here")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    overwrite(path, bytes(data))
    exchange.push(here, "web")
    assert exchange.problems(exchange.store("nas")) == []


def test_a_pack_cut_short_at_the_remote_is_sent_again(exchange: Exchange, overwrite: Overwrite) -> None:
    here = exchange.store("here")
    exchange.commit(here, "web", a=exchange.noise(1))
    exchange.push(here, "web")
    (path,) = exchange.packs()
    overwrite(path, path.read_bytes()[:-100])
    done = exchange.push(here, "web")
    assert (done.packs, done.refs[0].status) == (1, "unchanged")
    assert exchange.problems(exchange.store("nas")) == []


def test_a_pack_lost_at_the_remote_is_sent_again(exchange: Exchange) -> None:
    here = exchange.store("here")
    exchange.commit(here, "web", a=exchange.noise(1))
    exchange.push(here, "web")
    exchange.packs()[0].unlink()
    exchange.push(here, "web")
    assert exchange.files(exchange.store("nas"), "web") == {"a.bin": exchange.noise(1)}


def test_a_remote_that_drops_what_it_is_sent_is_found_out(exchange: Exchange, monkeypatch: pytest.MonkeyPatch) -> None:
    here = exchange.store("here")
    exchange.commit(here, "web", a=exchange.noise(1))
    monkeypatch.setattr(folder.FolderTransport, "put_file", lambda *_: None)
    with pytest.raises(RemoteUnavailable, match="does not have what it was just sent"):
        exchange.push(here, "web")
    assert exchange.value(exchange.store("nas"), "web") is None


def test_a_remote_that_spoils_what_it_is_sent_is_found_out(
    exchange: Exchange, monkeypatch: pytest.MonkeyPatch, overwrite: Overwrite
) -> None:
    here = exchange.store("here")
    exchange.commit(here, "web", a=b"tiny")
    real = folder.FolderTransport.put_file

    def put_file(self: Any, key: str, *rest: Any) -> None:
        real(self, key, *rest)
        data = bytearray((self.root / key).read_bytes())
        data[entries_of(self.root / key)[-1].end - 1] ^= 1
        overwrite(self.root / key, bytes(data))

    monkeypatch.setattr(folder.FolderTransport, "put_file", put_file)
    with pytest.raises(RemoteUnavailable):
        exchange.push(here, "web")
    assert exchange.value(exchange.store("nas"), "web") is None


def test_what_a_gc_there_takes_during_a_push_is_sent_after_all(
    exchange: Exchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The objects are there but nothing needs them, so a gc takes them just before the ref moves."""
    here = exchange.store("here")
    exchange.commit(here, "web", a=exchange.noise(1))
    exchange.push(here, "web")
    there = exchange.store("nas")
    for path in (exchange.folder / "nas/refs/web/latest").iterdir():
        path.unlink()
    real = push.move_remote_ref

    def move(*args: Any, **kwargs: Any) -> Any:
        gc.execute_gc(there, gc.plan_gc(there, grace_seconds=0), Silent())
        assert exchange.packs() == []
        return real(*args, **kwargs)

    monkeypatch.setattr(push, "move_remote_ref", move)
    done = exchange.push(here, "web")
    assert done.packs == 1
    assert exchange.files(there, "web") == {"a.bin": exchange.noise(1)}


def test_a_gc_here_that_rewrites_packs_during_a_push_does_no_harm(
    exchange: Exchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = exchange.store("here")
    exchange.commit(here, "web", a=exchange.noise(1), big=exchange.noise(2, 900_000))
    exchange.commit(here, "keep", a=exchange.noise(1))
    entry = read_ref(here, parse_ref("web"))
    assert entry
    plan = plan_push(here, exchange.remote(), [parse_ref("keep")], force=False)
    (exchange.folder / "here/refs/web").rename(exchange.folder / "gone")
    gc.execute_gc(here, gc.plan_gc(here, grace_seconds=0), Silent())
    execute_push(here, exchange.remote(), plan, Silent())
    assert exchange.files(exchange.store("nas"), "keep") == {"a.bin": exchange.noise(1)}


def test_a_push_may_go_into_a_living_store(exchange: Exchange) -> None:
    here, there = exchange.store("here"), exchange.store("there")
    exchange.commit(there, "own", a=exchange.noise(1))
    exchange.commit(here, "web", a=exchange.noise(2))
    exchange.push(here, "web", to="there")
    assert exchange.files(there, "web") == {"a.bin": exchange.noise(2)}
    assert exchange.files(there, "own") == {"a.bin": exchange.noise(1)}
    assert exchange.problems(there) == []


def test_a_folder_with_other_things_in_it_is_refused(exchange: Exchange) -> None:
    here = exchange.store("here")
    exchange.commit(here, "web", a=b"x")
    (exchange.folder / "nas").mkdir()
    (exchange.folder / "nas/photo.jpg").write_bytes(b"")
    with pytest.raises(Unsafe, match=r"photo\.jpg"):
        exchange.push(here, "web")
    assert [path.name for path in (exchange.folder / "nas").iterdir()] == ["photo.jpg"]


def test_a_first_push_that_was_killed_early_can_be_repeated(exchange: Exchange) -> None:
    here = exchange.store("here")
    exchange.commit(here, "web", a=b"x")
    (exchange.folder / "nas/packs").mkdir(parents=True)
    (exchange.folder / "nas/.tmp-00").write_bytes(b"llm")
    exchange.push(here, "web")
    assert exchange.problems(exchange.store("nas")) == []


def test_a_disk_that_is_not_mounted_is_not_made_up(exchange: Exchange) -> None:
    here = exchange.store("here")
    exchange.commit(here, "web", a=b"x")
    with pytest.raises(RemoteUnavailable, match="mnt is not there"):
        exchange.push(here, "web", to="mnt/nas")
    assert not (exchange.folder / "mnt").exists()


@pytest.mark.parametrize(("text", "error"), [(b"llmos 2\n", UnknownVersion), (b"", Damaged), (b"junk", Damaged)])
def test_a_remote_of_another_format_is_left_alone(exchange: Exchange, text: bytes, error: type[Damaged]) -> None:
    here = exchange.store("here")
    exchange.commit(here, "web", a=b"x")
    (exchange.folder / "nas").mkdir()
    (exchange.folder / "nas/FORMAT").write_bytes(text)
    with pytest.raises(error, match="nas"):
        exchange.push(here, "web")
    assert [path.name for path in (exchange.folder / "nas").iterdir()] == ["FORMAT"]


def test_an_unknown_ref_is_named(exchange: Exchange) -> None:
    here = exchange.store("here")
    exchange.commit(here, "web", a=b"x")
    with pytest.raises(NotFound, match="no ref wbe:latest") as caught:
        exchange.push(here, "wbe")
    assert "web" in str(caught.value.hint)
    assert not (exchange.folder / "nas").exists()


def test_leftovers_of_killed_pushes_are_swept_after_a_day(exchange: Exchange) -> None:
    here = exchange.store("here")
    exchange.commit(here, "web", a=b"x")
    exchange.push(here, "web")
    old, young = exchange.packs()[0].with_name(".tmp-old"), exchange.packs()[0].with_name(".tmp-young")
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    exchange.commit(here, "more", a=b"y")
    exchange.push(here, "more")
    assert exchange.leftovers("nas") == [young]
