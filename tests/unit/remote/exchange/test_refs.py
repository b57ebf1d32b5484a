from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from llmos_cli.errors import Conflict
from llmos_cli.formats.ids import ObjectId, object_id
from llmos_cli.formats.layout import ref_key
from llmos_cli.formats.names import parse_ref
from llmos_cli.progress import Silent
from llmos_cli.remote.exchange.prune import remove_there
from llmos_cli.remote.exchange.refs import RemoteRef, list_remote_refs, move_remote_ref, read_remote_ref, remote_log
from llmos_cli.remote.transports.folder import FolderTransport
from llmos_cli.remote.transports.transport import SlowToAsk

WEB = parse_ref("web")


@pytest.fixture
def transport(tmp_path: Path) -> FolderTransport:
    made = FolderTransport(tmp_path / "nas")
    made.initialise()
    return made


def oid(text: str) -> ObjectId:
    return object_id(text.encode())


def now(transport: FolderTransport) -> RemoteRef:
    return read_remote_ref(transport, WEB, Silent())


def test_a_ref_moves_from_value_to_value(transport: FolderTransport) -> None:
    assert now(transport) == RemoteRef(WEB)
    for text in ("a", "b", "c"):
        move_remote_ref(transport, now(transport), oid(text), message=text)
    seen = now(transport)
    assert (seen.id, seen.sequences) == (oid("c"), (1, 2, 3))
    assert [(move.message, move.previous) for move in remote_log(transport, seen)] == [
        ("c", oid("b")),
        ("b", oid("a")),
        ("a", None),
    ]
    assert list_remote_refs(transport, Silent()) == {WEB: seen}


def test_who_saw_an_older_value_does_not_move_it(transport: FolderTransport) -> None:
    stale = now(transport)
    move_remote_ref(transport, stale, oid("a"), message="")
    with pytest.raises(Conflict, match="web:latest"):
        move_remote_ref(transport, stale, oid("b"), message="")
    assert now(transport).id == oid("a")


def test_every_move_of_many_at_once_is_kept_or_refused(transport: FolderTransport) -> None:
    """Everybody retries until it is through: nothing is lost and the log is one chain."""

    def move(number: int) -> None:
        while True:
            try:
                move_remote_ref(transport, now(transport), oid(str(number)), message=str(number))
            except Conflict:
                continue
            return

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(move, range(24)))
    log = list(remote_log(transport, now(transport)))
    assert sorted(int(entry.message) for entry in log) == list(range(24))
    assert [entry.previous for entry in log] == [entry.id for entry in log[1:]] + [None]


def test_a_ref_that_was_removed_and_made_anew_is_not_continued(transport: FolderTransport, tmp_path: Path) -> None:
    for text in ("a", "b"):
        move_remote_ref(transport, now(transport), oid(text), message="")
    stale = now(transport)
    (tmp_path / "nas/refs/web").rename(tmp_path / "trash")
    move_remote_ref(transport, now(transport), oid("new"), message="")
    with pytest.raises(Conflict):
        move_remote_ref(transport, stale, oid("c"), message="")
    assert (now(transport).id, now(transport).sequences) == (oid("new"), (1,))


def test_a_damaged_newest_move_is_passed_over_with_a_warning(transport: FolderTransport, tmp_path: Path) -> None:
    move_remote_ref(transport, now(transport), oid("a"), message="")
    (tmp_path / "nas/refs/web/latest/0000000002").write_bytes(b"")
    progress = Silent()
    seen = read_remote_ref(transport, WEB, progress)
    assert seen.id == oid("a")
    assert "using move 1 of web:latest" in progress.warnings[0]
    move_remote_ref(transport, seen, oid("b"), message="")
    assert (now(transport).id, now(transport).sequences) == (oid("b"), (1, 2, 3))


def test_a_ref_of_which_nothing_is_left_is_listed_with_its_problem(transport: FolderTransport, tmp_path: Path) -> None:
    (tmp_path / "nas/refs/web/latest").mkdir(parents=True)
    (tmp_path / "nas/refs/web/latest/0000000001").write_bytes(b"")
    seen = list_remote_refs(transport, Silent())[WEB]
    assert seen.entry is None
    assert seen.problem
    assert "web:latest" in seen.problem.message
    move_remote_ref(transport, seen, oid("a"), message="")
    assert now(transport).id == oid("a")


class Far(FolderTransport, SlowToAsk):
    """A folder that is treated as what is asked by requests, which may be carried out late."""

    meanwhile: Callable[[], object] | None = None

    def create(self, key: str, data: bytes) -> bool:
        if self.meanwhile and not key.endswith(".gone"):
            run, self.meanwhile = self.meanwhile, None
            run()
        return super().create(key, data)


@pytest.fixture
def far(transport: FolderTransport) -> Far:
    return Far(transport.root)


def test_a_removal_that_comes_late_does_not_hit_a_newer_move(far: Far) -> None:
    """The answer was lost, so the same request is made again after somebody has made the ref anew."""
    for text in ("a", "b"):
        move_remote_ref(far, now(far), oid(text), message="")
    seen = now(far)
    remove_there(far, seen, Silent())
    assert list_remote_refs(far, Silent()) == {}
    move_remote_ref(far, RemoteRef(WEB), oid("c"), message="")
    for sequence in seen.sequences:
        far.delete(ref_key(WEB, sequence))
    assert (now(far).id, now(far).sequences) == (oid("c"), (3,))
    remove_there(far, now(far), Silent())
    assert [key for key, _ in far.list("refs/")] == ["refs/web/latest/0000000003.gone"], "one small file is left"


def test_a_move_that_was_taken_back_leaves_its_number_used_up(far: Far) -> None:
    move_remote_ref(far, now(far), oid("a"), message="")
    stale = RemoteRef(WEB, (1,), replace(now(far).entry, id=oid("other")))  # type: ignore[type-var]
    with pytest.raises(Conflict):
        move_remote_ref(far, stale, oid("b"), message="")
    move_remote_ref(far, now(far), oid("c"), message="")
    far.delete(ref_key(WEB, 2))  # late
    assert (now(far).id, now(far).sequences) == (oid("c"), (1, 3))
    move_remote_ref(far, now(far), oid("d"), message="")
    assert [move.id for move in remote_log(far, now(far))] == [oid("d"), oid("c"), oid("a")]


def test_a_number_that_is_used_up_between_looking_and_moving_is_a_conflict(far: Far) -> None:
    def made_and_removed() -> None:
        other = FolderTransport(far.root)
        move_remote_ref(other, now(other), oid("a"), message="")
        remove_there(Far(far.root), now(other), Silent())

    far.meanwhile = made_and_removed
    with pytest.raises(Conflict):
        move_remote_ref(far, now(far), oid("b"), message="")
    assert now(far).id is None
    move_remote_ref(far, now(far), oid("b"), message="")
    assert now(far).sequences == (2,)


def test_the_log_is_one_chain_however_many_move_and_take_back(far: Far) -> None:
    def move(number: int) -> None:
        while True:
            try:
                move_remote_ref(far, now(far), oid(str(number)), message=str(number))
            except Conflict:
                continue
            return

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(move, range(24)))
    log = list(remote_log(far, now(far)))
    assert sorted(int(entry.message) for entry in log) == list(range(24))
    assert [entry.previous for entry in log] == [entry.id for entry in log[1:]] + [None]
