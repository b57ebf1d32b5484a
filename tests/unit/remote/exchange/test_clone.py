from pathlib import Path
from typing import Any

import pytest

from llmos_cli.errors import NotFound, RemoteUnavailable, Unsafe
from llmos_cli.progress import Silent
from llmos_cli.remote.exchange.clone import execute_clone, plan_clone
from llmos_cli.remote.transports.folder import FolderTransport
from llmos_cli.store.local import open_store

Exchange = Any


@pytest.fixture
def filled(exchange: Exchange) -> Exchange:
    here = exchange.store("here")
    exchange.commit(here, "web", a=exchange.noise(1))
    exchange.commit(here, "tiny:v1", a=exchange.noise(2))
    exchange.push(here)
    return exchange


def clone(exchange: Exchange, url: str = "nas", folder: str = "copy") -> Any:
    return execute_clone(plan_clone(url, Path(folder), exchange.folder, Silent()), Silent())


def test_all_refs_arrive_and_the_remote_is_known(filled: Exchange) -> None:
    here = filled.store("here")
    done = clone(filled)
    with open_store(filled.folder / "copy/.llmos") as copy:
        assert {ref: filled.value(copy, ref) for ref in ("web", "tiny:v1")} == {
            ref: filled.value(here, ref) for ref in ("web", "tiny:v1")
        }
        assert copy.config.remotes == {"origin": str(filled.folder / "nas")}
        assert filled.problems(copy) == []
    assert len(done.refs) == 2


def test_a_store_can_be_cloned_by_its_folder(exchange: Exchange) -> None:
    store = exchange.store("project/.llmos")
    exchange.commit(store, "web", a=exchange.noise(1))
    clone(exchange, "project")
    with open_store(exchange.folder / "copy/.llmos") as copy:
        assert exchange.value(copy, "web") == exchange.value(store, "web")


def test_a_wrong_url_leaves_nothing_behind(exchange: Exchange) -> None:
    with pytest.raises(NotFound):
        clone(exchange, "nowhere")
    assert not (exchange.folder / "copy").exists()


def test_a_folder_in_use_is_refused(filled: Exchange) -> None:
    (filled.folder / "copy").mkdir()
    (filled.folder / "copy/thesis.txt").write_bytes(b"x")
    with pytest.raises(Unsafe, match=r"thesis\.txt"):
        clone(filled)
    assert not (filled.folder / "copy/.llmos").exists()
    (filled.folder / "copy/thesis.txt").unlink()
    clone(filled)
    with pytest.raises(Unsafe, match="holds a store already") as caught:
        clone(filled)
    assert "pull origin --all" in str(caught.value.hint)


def test_a_clone_that_failed_is_finished_by_a_pull(filled: Exchange, monkeypatch: pytest.MonkeyPatch) -> None:
    read = FolderTransport.read

    def cut(self: FolderTransport, key: str, start: int = 0, end: int | None = None) -> bytes:
        data = read(self, key, start, end)
        if len(data) > 100_000:
            raise RemoteUnavailable("the line is cut")
        return data

    monkeypatch.setattr(FolderTransport, "read", cut)
    with pytest.raises(RemoteUnavailable) as caught:
        clone(filled)
    assert "pull origin --all" in str(caught.value.hint)
    monkeypatch.undo()
    copy = filled.store("copy/.llmos")
    assert copy.config.remotes == {"origin": str(filled.folder / "nas")}
    filled.pull(copy)
    assert filled.problems(copy) == []


def test_a_clone_that_was_killed_before_there_was_a_store_can_be_repeated(filled: Exchange) -> None:
    (filled.folder / "copy/.llmos/packs").mkdir(parents=True)
    clone(filled)


def test_an_empty_remote_gives_an_empty_store(exchange: Exchange) -> None:
    exchange.remote().transport.initialise()
    assert clone(exchange).refs == ()
